"Sets that an images server draws: a real server on loopback, with the bundled generator behind it and moods of its own."
import base64
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from serving import serve

import aimfair
from aimfair import cli
from aimfair.data import image_groups
from aimfair.synthesis import ImageServer, SynthesisError, load_generator, make_config, rejection_report, synthesize

pytest.importorskip("openai")
ROOT = Path(aimfair.__file__).parents[1]
KEY = "img-recognisable-7d6c5b4a-key"
PROMPTS = {"0_0": ["a photo of a non-smiling female", "a young female"], "0_1": ["a photo of a non-smiling male"],
           "1_0": ["a photo of a smiling female", "a smiling female with a hat"], "1_1": ["a photo of a smiling male",
                                                                                          "a smiling male with a beard"]}
WORDS = {"seed": "Unknown parameter: 'seed'.", "response_format": "Unknown parameter: 'response_format'.",
         "n": "Extra inputs are not permitted: n"}


class Studio(ThreadingHTTPServer):
    """Draws with the bundled generator, one image a request, as OpenAI's images endpoint answers.

    turns_down: parameters that it refuses; refuses: words that it will not draw; sizes: all it has; faults: what the first requests get,
    a status, "hang" or "drop"; urls: answers with addresses, the first `lost` of which lead nowhere; pause: seconds an image takes."""
    daemon_threads = True

    def __init__(self, turns_down=(), refuses=(), sizes=None, faults=(), urls=False, lost=0, pause=0.0, revise=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.turns_down, self.refuses, self.sizes, self.faults, self.urls = set(turns_down), refuses, sizes, list(faults), urls
        self.lost, self.pause, self.revise = lost, pause, revise
        self.asked, self.drawn, self.at_once, self.most, self.lock, self.files = [], [], 0, 0, threading.Lock(), {}
        self.headers_of_fetches = []
        _pipe()  # before anybody waits for it
        serve(self)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        "A client that was killed is part of the test."

    def draw(self, body):
        pipe = _pipe()
        noise = torch.Generator().manual_seed(body.get("seed", len(self.drawn)))
        image = pipe(body["prompt"], num_inference_steps=1, guidance_scale=1.0, generator=noise).images[0]
        if "size" in body:
            image = image.resize(tuple(map(int, body["size"].split("x"))))
        data = io.BytesIO()
        image.save(data, "PNG")
        return data.getvalue()


def _pipe(made=[]):  # noqa: B006 loaded once
    if not made:
        made.append(load_generator("bundled", device="cpu"))
    return made[0]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, body, kind="application/json"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", len(body)), ("Retry-After-Ms", 10)):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        s = self.server
        s.headers_of_fetches.append(dict(self.headers))
        with s.lock:
            s.lost -= 1
            lost = s.lost >= 0
        self.send(404, b"gone", "text/plain") if lost else self.send(200, s.files[self.path], "image/png")

    def do_POST(self):
        s, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with s.lock:
            fault = s.faults.pop(0) if s.faults else None
            s.asked.append(body)
            s.at_once += 1
            s.most = max(s.most, s.at_once)
        try:
            self.answer(body, fault)
        finally:
            with s.lock:
                s.at_once -= 1

    def answer(self, body, fault):
        s = self.server
        time.sleep(s.pause)
        if fault == "hang":
            return time.sleep(5)
        if fault == "drop":
            return self.connection.close()
        if fault == "malformed":
            return self.send(200, b'{"created": 0, "data": [{"b64_js')
        if isinstance(fault, int):
            return self.send(fault, {"error": {"message": f"no, {self.headers['Authorization']}"}})
        if self.path != "/v1/images/generations":
            return self.send(404, {"detail": "Not Found"})
        for name in body.keys() & s.turns_down:
            return self.send(400, {"error": {"message": WORDS[name], "type": "invalid_request_error", "param": name}})
        if s.sizes and body.get("size") not in (None, *s.sizes):
            have = " and ".join(f"'{size}'" for size in s.sizes)
            return self.send(400, {"error": {"message": f"Invalid value: '{body['size']}'. Supported values are: {have}.",
                                             "param": "size"}})
        if any(word in body["prompt"] for word in s.refuses):
            return self.send(400, {"error": {"message": "Your request was rejected as a result of our safety system.",
                                             "code": "content_policy_violation"}})
        with s.lock:
            image = s.draw(body)
            s.drawn.append(body)
        item = {"b64_json": base64.b64encode(image).decode()}
        if s.urls:
            path = f"/files/{len(s.files)}.png?secret=1"
            s.files[path], item = image, {"url": f"http://127.0.0.1:{s.server_port}{path}"}
        self.send(200, {"created": 0, "data": [item | ({"revised_prompt": s.revise} if s.revise else {})]})


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    import openai._base_client as client

    monkeypatch.setattr(client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(client, "MAX_RETRY_DELAY", 0.05)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def make(studio, out, per_group=2, prompts=PROMPTS, config=None, seed=0, **options):
    source = ImageServer("bundled", base_url=studio.url, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = synthesize(prompts, generator=source, per_group=per_group, out=out, config=config, seed=seed, progress=False)
    return made, [str(w.message) for w in said if w.category is UserWarning]


def pixels(out, files):
    return np.stack([np.asarray(Image.open(out / f)) for f in files]).astype(int)


def test_a_set_is_that_of_the_same_generator_here(tmp_path):
    studio = Studio()
    there, said = make(studio, tmp_path / "there", per_group=3)
    here = synthesize(PROMPTS, generator=_pipe(), per_group=3, out=tmp_path / "here", config=make_config(steps=1, guidance_scale=1.0),
                      progress=False)
    assert not said and len(studio.drawn) == 12 and studio.most > 1
    assert list(there.columns) == list(here.columns) and list(there.dtypes) == list(here.dtypes)
    same = ["file", "target", "protected", "group", "index", "attempt", "prompt", "prompt_index", "seed", "height", "width"]
    pd.testing.assert_frame_equal(there[same], here[same])
    assert set(there.generator) == {"openai:bundled"}
    assert np.abs(pixels(tmp_path / "there", there.file) - pixels(tmp_path / "here", here.file)).max() <= 2
    assert len(image_groups(tmp_path / "there")) == 12 and not list((tmp_path / "there/received").iterdir())
    asked = len(studio.asked)
    assert len(make(studio, tmp_path / "there", per_group=3)[0]) == 12 and len(studio.asked) == asked  # nothing is asked for again


def test_what_the_server_turns_down_is_left_out_and_said_once(tmp_path):
    studio = Studio(turns_down=WORDS, sizes=["96x64", "128x128"])
    made, said = make(studio, tmp_path, config=make_config(size=48, resize=32))
    assert len(said) == 4 and all(sum(f"no {name}" in s for s in said) == 1 for name in ("seed", "response_format", "n", "48x48"))
    assert len(studio.asked) == 8 + 4 and all(set(body) == {"model", "prompt", "size"} for body in studio.drawn)
    assert {body["size"] for body in studio.drawn} == {"128x128"}  # the nearest by shape
    assert (made[["height", "width"]] == 48).all(axis=None) and pixels(tmp_path, made.file).shape[1:] == (32, 32, 3)


def test_a_setting_of_the_user_is_not_left_out(tmp_path):
    studio = Studio(turns_down=["n"])
    studio.turns_down, WORDS["quality"] = {"quality"}, "Unknown parameter: 'quality'."
    with pytest.raises(SynthesisError, match="quality"):
        make(studio, tmp_path, config=make_config(options={"quality": "low"}))
    for config, word in ((make_config(scheduler="DDIMScheduler"), "scheduler"), (make_config(dtype="float16"), "dtype")):
        with pytest.raises(SynthesisError, match=word):
            make(studio, tmp_path / "other", config=config)


def test_a_seed_that_is_too_long_is_shortened(tmp_path):
    class Short(Studio):
        def draw(self, body):
            assert body["seed"] < 2**31
            return super().draw(body)

    studio = Short()
    normal = Handler.answer
    try:
        def answer(self, body, fault):
            if body["seed"] >= 2**31:
                return self.send(422, {"detail": [{"loc": ["body", "seed"], "msg": "Input should be less than 2147483648"}]})
            return normal(self, body, fault)

        Handler.answer = answer
        made, said = make(studio, tmp_path)
    finally:
        Handler.answer = normal
    assert sorted(made.seed) == sorted(body["seed"] for body in studio.drawn) and ["31 bits" in s for s in said] == [True]


def test_addresses_are_fetched_without_the_key_and_again_where_they_fail(tmp_path):
    studio = Studio(urls=True, lost=2)
    made, _ = make(studio, tmp_path, price=1)
    assert len(made) == 8 and len(studio.drawn) == 8 and made.attrs["cost"]["images"] == 8
    assert not any("Authorization" in headers for headers in studio.headers_of_fetches)


def test_a_server_that_fails_now_and_then(tmp_path, capfd):
    studio = Studio(faults=[429, 500, "drop", 503, "malformed", "hang", 502, 429])
    made, _ = make(studio, tmp_path, timeout=3, max_retries=8)
    assert len(made) == 8 and not studio.faults and made.attrs["cost"]["images"] == 9 and made.attrs["cost"]["lost"] == 1
    drawn = Counter((body["prompt"], body["seed"]) for body in studio.drawn)
    assert len(drawn) == 8 and set(drawn.values()) == {1}
    for place in (*capfd.readouterr(), *(f.read_text(errors="replace") for f in tmp_path.rglob("*") if f.is_file())):
        assert KEY not in place


@pytest.mark.parametrize("fault, words", [(500, "InternalServerError"), (401, "AuthenticationError"), (402, "402")])
def test_a_server_that_stays_broken_is_one_line_and_what_is_there_stays(tmp_path, fault, words):
    studio = Studio()
    make(studio, tmp_path, per_group=1)
    studio.faults = [fault] * 99
    with pytest.raises(SynthesisError, match=words) as error:
        make(studio, tmp_path, per_group=3, max_retries=1)
    assert "\n" not in str(error.value) and KEY not in str(error.value) and "goes on" in str(error.value)
    assert len(pd.read_parquet(tmp_path / "manifest.parquet")) == 4
    studio.faults = []
    assert len(make(studio, tmp_path, per_group=3)[0]) == 12 and len(studio.drawn) == 12


def test_an_answer_that_is_no_image(tmp_path):
    class Broken(Studio):
        def draw(self, body):
            return b"no image at all" if len(self.drawn) < 2 else super().draw(body)

    studio = Broken()
    made, _ = make(studio, tmp_path, per_group=1, price=0.5)
    assert len(made) == 4 and made.attrs["cost"] == {"images": 6, "lost": 2, "price": 0.5, "cost": 3.0}


@pytest.mark.parametrize("reply, words", [
    ({"created": 0, "data": []}, "sent no image"), ({"choices": []}, "sent no image"),
    ({"data": [{"url": "file:///etc/passwd"}]}, "no web address")])
def test_a_server_without_images(tmp_path, reply, words, monkeypatch):
    monkeypatch.setattr(Handler, "answer", lambda self, body, fault: self.send(200, reply))
    studio = Studio()
    with pytest.raises(SynthesisError, match=words) as error:
        make(studio, tmp_path)
    assert "\n" not in str(error.value) and len(studio.asked) == 3


def test_other_prompts_take_the_place_of_refused_ones(tmp_path):
    studio = Studio(refuses=["hat", "young"])
    made, said = make(studio, tmp_path, per_group=4, price=0.25)
    assert dict(made.groupby("group").size()) == dict.fromkeys(PROMPTS, 4)
    assert not made.prompt.str.contains("hat|young").any() and made.attrs["cost"]["cost"] == 4.0  # a refusal costs nothing
    assert sum("refuses a prompt" in s and "safety system" in s for s in said) == len(said) >= 2
    refused = [body for body in studio.asked if "hat" in body["prompt"]]
    assert len(refused) <= 4  # those under way at the same time, and never again
    assert rejection_report(tmp_path).refused["all"] == len(said)
    asked = len(studio.asked)
    make(studio, tmp_path, per_group=6)
    assert len(studio.asked) == asked + 8 and not any("hat" in body["prompt"] for body in studio.asked[asked:])


def test_a_group_whose_prompts_are_all_refused_is_told_and_others_are_made(tmp_path):
    studio = Studio(refuses=["non-smiling male"])
    with pytest.raises(SynthesisError, match="group 0_1 kept 0 of 0 made, turned down by the generator, which refused") as error:
        make(studio, tmp_path, per_group=3)
    assert "\n" not in str(error.value) and dict(pd.read_parquet(tmp_path / "manifest.parquet").groupby("group").size()) == {
        "0_0": 3, "1_0": 3, "1_1": 3}
    assert sum("non-smiling male" in body["prompt"] for body in studio.asked) <= 4


def test_a_budget_ends_the_work_and_a_larger_one_goes_on(tmp_path):
    studio = Studio()
    for budget in (5, 5, 7):
        with pytest.raises(SynthesisError, match=f"budget of {budget} images is used up") as error:
            make(studio, tmp_path, per_group=3, budget=budget, price=0.04)
        assert "\n" not in str(error.value) and len(studio.drawn) == budget == len(pd.read_parquet(tmp_path / "manifest.parquet"))
    made, _ = make(studio, tmp_path, per_group=3, budget=12, price=0.1)
    assert len(made) == len(studio.drawn) == 12
    bill = json.loads((tmp_path / "cost.json").read_text())
    assert bill == made.attrs["cost"] and bill["images"] == 12 and bill["cost"] == pytest.approx(7 * 0.04 + 5 * 0.1)


def test_what_the_server_wrote_in_place_of_a_prompt_is_in_the_manifest(tmp_path):
    made, _ = make(Studio(revise="a photograph of somebody else"), tmp_path, per_group=1)
    assert set(made.revised_prompt) == {"a photograph of somebody else"} and set(made.prompt) <= {p for ps in PROMPTS.values() for p in ps}


@pytest.mark.parametrize("urls, moments", [(False, [7]), pytest.param(True, [3, 7, 12, 17], marks=pytest.mark.slow)])
def test_killed_at_any_moment_no_image_is_asked_for_twice(tmp_path, urls, moments):
    studio, kills = Studio(pause=0.05, urls=urls), 0
    code = f"""
        from aimfair.synthesis import ImageServer, make_config, synthesize
        source = ImageServer("bundled", base_url={studio.url!r}, price=1)
        synthesize({PROMPTS!r}, generator=source, per_group=6, out={str(tmp_path)!r}, progress=False, config=make_config(batch_size=3))"""
    for n in moments:
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "PYTHONPATH": str(ROOT)})
        while process.poll() is None and len(studio.drawn) < n:
            time.sleep(0.01)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.2)  # the server ends what it had begun
    received = {file.stem.rpartition("-")[0] for kind in ("image", "url") for file in tmp_path.glob(f"received/*.{kind}")}
    placed = {f"{file.parent.name}-{file.stem}" for file in tmp_path.glob("?_?/*.png")}
    on_disk = len(received | placed)  # a batch that was killed while it was put in its place lies in both
    assert kills and on_disk >= len(studio.drawn) - 3 * kills
    before = len(studio.drawn)
    made, _ = make(studio, tmp_path, per_group=6, price=1, config=make_config(batch_size=3))
    drawn = Counter((body["prompt"], body["seed"]) for body in studio.drawn)
    assert len(made) == len(drawn) == 24
    assert 24 - on_disk <= len(studio.drawn) - before <= 24 - on_disk + 3 * kills
    assert len(studio.drawn) - 24 <= 3 * kills  # twice only what was under way, and that is on the bill
    assert len(studio.drawn) <= made.attrs["cost"]["images"] <= 24 + 3 * kills
    make(studio, tmp_path / "whole", per_group=6)
    assert np.abs(pixels(tmp_path, made.file) - pixels(tmp_path / "whole", made.file)).max() <= 2


def test_another_model_is_refused_and_another_address_is_not(tmp_path):
    make(Studio(), tmp_path, per_group=1)
    assert len(make(Studio(), tmp_path, per_group=2)[0]) == 8
    with pytest.raises(SynthesisError, match="generator: openai:bundled there, openai:other asked"):
        synthesize(PROMPTS, generator=ImageServer("other", base_url=Studio().url), per_group=2, out=tmp_path, progress=False)


@pytest.mark.parametrize("options", [{"budget": 0}, {"price": -1}, {"base_url": "localhost:1"}])
def test_servers_that_cannot_be(options):
    with pytest.raises(SynthesisError):
        ImageServer("m", **options)


# the command

def test_the_command_asks_a_server_and_tells_the_bill(tmp_path, capsys):
    studio, file = Studio(), tmp_path / "prompts.json"
    from aimfair.prompts import GrammarBackend, write_prompts

    write_prompts("toy-smiling-male", "plain", backend=GrammarBackend(), per_group=1).save(file)
    words = ["synthesize", "--prompts", str(file), "--generator", "openai:bundled", "--base-url", studio.url.removesuffix("/v1"),
             "--per-group", "2",
             "--out", str(tmp_path / "set"), "--price", "0.02"]
    assert cli.main([*words, "--budget", "3"]) == 2
    assert "aimfair: the budget of 3 images is used up" in capsys.readouterr().err
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "set: 8 images: 2 of 0_0" in out and "8 images paid for, 0.16 in all" in out
    assert cli.main([*words[:3], "--per-group", "1", "--out", str(tmp_path / "x"), "--budget", "3"]) == 2
    assert "--generator openai:MODEL" in capsys.readouterr().err
