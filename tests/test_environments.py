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


def latin1(tmp_path):
    "A locale whose encoding is not UTF-8, as the C library makes it; skips where it cannot."
    made = shutil.which("localedef") and subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", tmp_path / "en_US.ISO-8859-1"],
                                                        capture_output=True)
    env = {"LOCPATH": str(tmp_path), "LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    if not made or python("import locale; print(locale.getpreferredencoding(False))", **env).stdout.strip() != "ISO-8859-1":
        pytest.skip("no locale in Latin-1 can be made here")
    return env


def test_words_of_all_languages_survive_another_locale(tmp_path):
    "What was written under one locale is read under the other, by the functions that keep settings and records."
    code = r"""
        import sys  # the words of a command line are read in the locale's encoding, too: hence \u
        from pathlib import Path
        from aimfair.core import append_lines, read_lines, read_settings, write_whole
        root, word = Path(sys.argv[1]), "M\u00fcdigkeit \u6771\u4eac"
        if sys.argv[2] == "write":
            write_whole(root / "p.toml", f'description = "{word}"')
            write_whole(root / "a.json", {"word": word})
            append_lines(root / "a.jsonl", [word])
        assert read_settings(root / "p.toml")["description"] == read_settings(root / "a.json")["word"] == word
        assert read_lines(root / "a.jsonl")[0] == word
        print("same")"""
    plain, odd = {"LC_ALL": "C.UTF-8"}, latin1(tmp_path)
    for first, second in ((plain, odd), (odd, plain)):
        for env, how in ((first, "write"), (second, "read")):
            done = python(code, tmp_path, how, **env)
            assert done.stdout == "same\n", done.stderr
        (tmp_path / "a.jsonl").unlink()


def command(*words, **how):
    return python("import sys; from aimfair.cli import main; sys.exit(main(sys.argv[1:]))", *words, **how)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_a_terminal_that_lacks_letters_gets_others(encoding):
    text = "71 ± 2 % – ██ → Größe \udcff"
    done = python(f"""
        import sys, typer
        from aimfair.cli import shell
        text = {ascii(text)}
        @shell.app.command("say")
        def say():
            print(text)
            typer.echo(text)
            raise ValueError(text)
        before = sys.stdout.errors
        code = shell.main(["say"])
        assert sys.stdout.errors == before
        sys.exit(code)""", PYTHONIOENCODING=encoding)
    assert done.returncode == 2 and "71 " in done.stdout and "Traceback" not in done.stderr, done.stderr
    shown = {"ascii": "71 +- 2 % - ## -> Gr\\xf6\\xdfe \\udcff", "utf-8": "71 ± 2 % – ██ → Größe \\udcff"}.get(encoding, "71 ")
    assert done.stdout.startswith(shown) and shown in done.stderr


# ---------------------------------------------------------------- ~


def test_a_tilde_is_the_home_folder_wherever_a_path_is_said(tmp_path):
    (tmp_path / "p.toml").write_text("[data]\nroot = '~/faces'\nkind = 'celeba'\n[model]\nweights = '~/w.safetensors'\n")
    (tmp_path / "photos").mkdir()
    done = python("""
        from aimfair.core import append_lines, read_settings, whole_folder, write_whole
        from aimfair.data import cache_folder
        from aimfair.experiments import load_profile
        from aimfair.repro import Store, diagnose
        from aimfair.t2i import captioned_faces
        profile = load_profile("~/p.toml")
        print(profile.model.weights, diagnose(profile).rows.found[0], Store("~/runs").root, cache_folder("~/c"), cache_folder(), sep="|")
        print(write_whole("~/new/a.json", {}), read_settings("~/new/a.json"))
        append_lines("~/new/b.jsonl", [1])
        with whole_folder("~/d"):
            pass
        try:
            captioned_faces("~/photos")
        except ValueError as error:
            print(error)
        """, HOME=str(tmp_path), without=("AIMFAIR_CACHE", "XDG_CACHE_HOME"))
    home = str(tmp_path)
    assert not done.stderr, done.stderr
    said = [f"{home}/w.safetensors", f"data.root: no folder {home}/faces", f"{home}/runs", f"{home}/c", f"{home}/.cache/aimfair"]
    assert done.stdout.splitlines()[0].split("|") == said
    assert f"{home}/photos: no captions found" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} >= {"new", "d"} and (tmp_path / "new" / "b.jsonl").is_file()


@pytest.mark.parametrize("words", [["--out=~/a.json"], ["--out", "~/a.json"], ["--out=~/deep/er/a.json"]])
def test_a_tilde_on_the_command_line(tmp_path, words):
    done = command("prompts", "write", "toy-smiling-male", "--per-group=1", *words, HOME=str(tmp_path))
    assert done.returncode == 0 and [p.name for p in tmp_path.rglob("*.json")] == ["a.json"], done.stderr


def test_a_tilde_in_settings_of_the_command_line(tmp_path):
    (tmp_path / "p.toml").write_text("description = 'mine'")
    done = command("doctor", "--profile=~/p.toml", "--set", "data.kind=celeba", "--set=data.root=~/faces", HOME=str(tmp_path))
    assert f"data.root: no folder {tmp_path}/faces" in done.stdout, done.stderr
