"Machines that differ: homes, caches, disks, locales, devices, scripts without a guard, and all that a call has to leave as it was."
import ast
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(code, *words, wrap=(), without=(), **env):
    "A script of its own, of these sources; `wrap` are words before the call, `without` are variables that are not set."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    known = {k: v for k, v in os.environ.items() if k not in without}
    return subprocess.run([*wrap, sys.executable, "-c", textwrap.dedent(code), *map(str, words)], capture_output=True, timeout=300,
                          env={**known, "PYTHONPATH": path, **env}, encoding="utf-8", errors="replace")


# ---------------------------------------------------------------- locales


def text_calls(tree):
    "Calls that read or write text: of `open`, `read_text`, `write_text`; files that are opened with b are none."
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = getattr(getattr(call.func, "value", None), "id", "")
        modes = [a.value for a in [*call.args, *(k.value for k in call.keywords if k.arg == "mode")] if isinstance(a, ast.Constant)]
        if name in ("read_text", "write_text") or (name == "open" and owner not in ("Image", "os")
                                                    and not any(isinstance(m, str) and "b" in m for m in modes)):
            yield call


@pytest.mark.parametrize("file", sorted((ROOT / "aimfair").rglob("*.py")), ids=lambda f: f.relative_to(ROOT).as_posix())
def test_text_files_are_never_read_in_the_encoding_of_the_machine(file):
    bare = [f"{call.lineno}: {ast.unparse(call)}" for call in text_calls(ast.parse(file.read_text(encoding="utf-8")))
            if not any(k.arg == "encoding" for k in call.keywords)]
    assert not bare, "these need encoding="
