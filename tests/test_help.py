"What help in a notebook tells of arguments, asked of a real kernel; and that every public name is documented as it is called."

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

import aimfair
from aimfair.help import argument_help, documented_arguments, documented_fields

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def ask():
    "Ask a kernel, in which the package was imported, about the name before the cursor."
    manager, client = start_new_kernel()
    code = ("from aimfair.metrics import fairness_report\nfrom aimfair.pipeline import AIMFair\nfrom aimfair.training import Fitted\n"
            "from aimfair.training import TrainConfig\nfrom aimfair.data import Faces\ndef own(x=1):  # of a user\n    'Mine.'")
    reply = client.execute_interactive(code, timeout=120)
    assert reply["content"]["status"] == "ok"

    def ask(text, detail=0):
        client.inspect(text, len(text), detail)
        answer = client.get_shell_msg(timeout=60)["content"]
        assert answer["found"]
        return answer["data"]["text/plain"].replace("\x1b[31m", "").replace("\x1b[39m", "")

    yield ask
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_a_function_inside_its_call(ask):
    page = ask("fairness_report(")
    assert "Signature: fairness_report(y_true, y_pred, *, sensitive_features, confidence)" in " ".join(page.split())
    assert "y_true: ArrayLike\n    target labels, shape (n,), any hashable values\ny_pred: ArrayLike" in page
    assert "confidence: float | None = 0.95\n    of the intervals, in (0, 1); None for none" in page
    assert "FairnessReport\n    measures, counts and intervals, as fractions in [0, 1]" in page and "Accuracy, group accuracies" in page


def test_classes_and_methods(ask):
    assert "bias: float = 1 / 9\n    minority : majority of the biased synthetic set, in [0, 1)" in ask("AIMFair(")
    assert "held_out: Faces | None = None\n    synthetic images to measure by" in ask("AIMFair.fit")
    assert "lr: float = 0.01\n    initial learning rate; > 0" in ask("TrainConfig")
    assert "best: dict[str, Best] = dict()\n    val_accuracy's choice" in ask("Fitted")
    assert "cls" not in ask("Faces.from_arrays").partition("Arguments")[2].partition("File")[0]


def test_others_are_left_to_ipython(ask):
    for name in ("sorted", "own"):
        assert "Arguments:" not in ask(name)
    assert "of a user" not in ask("own") and "Mine." in ask("own")
    source = ask("fairness_report", 1)
    assert "Arguments:" not in source and "_check_confidence(confidence)" in source


def test_a_hook_of_the_user_stays():
    code = ("from IPython.testing.globalipapp import start_ipython\nip = start_ipython()\nmine = lambda data: None\n"
            "ip.inspector.mime_hooks = {'text/plain': mine}\nimport aimfair\nprint(ip.inspector.mime_hooks['text/plain'] is mine)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.split() == ["True"], done.stderr


def test_outside_of_ipython_nothing_is_loaded():
    code = "import sys, aimfair; print([m for m in ('IPython', 'aimfair.help', 'inspect', 'ast') if m in sys.modules])"
    before = "import sys; print([m for m in ('IPython', 'aimfair.help', 'inspect', 'ast') if m in sys.modules])"
    run = [subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, cwd=ROOT, timeout=60).stdout for c in (code, before)]
    assert run[0] == run[1]


def public():
    "Everything that the package offers: (name, object)."
    for info in pkgutil.walk_packages(aimfair.__path__, "aimfair."):
        if ".assets" in info.name or info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if getattr(thing, "__module__", "") == info.name and (inspect.isclass(thing) or inspect.isfunction(thing)):
                yield f"{info.name}.{name}", thing


def test_every_public_name_is_told_as_it_is_called():
    "Python's own signature is the oracle, where the source has the arguments and no decorator adds some."
    found = 0
    for name, thing in public():
        argument_help(thing)  # of anything, without an error
        try:
            expected = [p for p in inspect.signature(thing).parameters if p not in ("self", "cls")]
        except (TypeError, ValueError):
            continue
        told = documented_fields(thing) if inspect.isclass(thing) else documented_arguments(thing)
        names = [d.name.lstrip("*") for d in told if d.name != "return"]
        if "run" in names and "config" in expected or not names and inspect.isclass(thing):  # of `baseline`; of a factory
            continue
        assert set(names) >= set(expected), name
        found += 1
    assert found > 600


def test_comments_of_many_kinds_of_signatures(tmp_path, monkeypatch):
    (tmp_path / "kinds.py").write_text('''
def one(a, /, b: int = (1, 2)[0], *c: str, d={"x": 1}, **e) -> dict:  # a dictionary
    return {}

def several(
    a: "a # sign" = "#",  # text with a sign: not a comment
    # a line of its own belongs to nothing
    b=lambda x: x,  # called with (x): returns it
    *, c: dict[str, int] = {
        "x": 1,  # inside of a default
    },  # a table
):  # nothing: it prints
    "Doc."

async def later(x: int,  # a number
                y=2): ...

class Outer:
    class Inner:
        def method(self, n: int,  # images
                   ) -> "Outer":  # itself
            ...
''')
    monkeypatch.syspath_prepend(tmp_path)
    kinds = importlib.import_module("kinds")
    assert [(d.name, d.type, d.default) for d in documented_arguments(kinds.one)] == [
        ("a", "", ""), ("b", "int", "(1, 2)[0]"), ("*c", "str", ""), ("d", "", "{'x': 1}"), ("**e", "", ""), ("return", "dict", "")]
    assert documented_arguments(kinds.one)[-1].comment == "a dictionary"
    assert [d.comment for d in documented_arguments(kinds.several)] == [
        "text with a sign: not a comment", "called with (x): returns it", "a table", "nothing: it prints"]
    assert [(d.name, d.comment) for d in documented_arguments(kinds.later)] == [("x", "a number"), ("y", "")]
    assert [(d.name, d.comment) for d in documented_arguments(kinds.Outer.Inner().method)] == [("n", "images"), ("return", "itself")]
    assert argument_help(kinds.Outer) == [] and argument_help(len) is not None
