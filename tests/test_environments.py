"Machines that differ: homes, caches, disks, locales, devices, scripts without a guard, and all that a call has to leave as it was."
import ast
import contextlib
import io
import locale
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import diffusers
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from huggingface_hub.utils.tqdm import progress_bar_states
from PIL import Image, ImageFile

from aimfair import t2i
from aimfair.cli import main
from aimfair.data import DataError, huggingface, load_faces
from aimfair.device import pick_device
from aimfair.experiments import reproduce, run
from aimfair.synthesis import load_generator, make_config, synthesize

datasets = pytest.importorskip("datasets", reason="the extra hub is not installed")

ROOT = Path(__file__).resolve().parents[1]


def python(code, *words, wrap=(), without=(), **env):
    "A script of its own, of these sources; `wrap` are words before the call, `without` are variables that are not set."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    known = {k: v for k, v in os.environ.items() if k not in without}
    return subprocess.run([*wrap, sys.executable, "-c", textwrap.dedent(code), *map(str, words)], capture_output=True, timeout=300,
                          env={**known, "PYTHONPATH": path, **env}, encoding="utf-8", errors="replace")


def command(*words, **how):
    return python("import sys; from aimfair.cli import main; sys.exit(main(sys.argv[1:]))", *words, **how)


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


# ---------------------------------------------------------------- homes, caches, disks

NOBODY = ("unshare", "--user", "--map-user=12345", "--map-group=12345")  # a user whom /etc/passwd does not know, as in a container
HOMELESS = ("HOME", "AIMFAIR_CACHE", "XDG_CACHE_HOME")
LOAD = """
    import sys
    import numpy as np
    import pandas as pd
    from aimfair.data import load_faces
    paths = [f"{sys.argv[1]}/{i}.png" for i in range(3)]
    table = pd.DataFrame({"id": paths, "path": paths, "target": [0, 1, 0]})
    for size in (8, 16):
        faces = load_faces(table, size=size)
    print(faces.gather(slice(None)).numpy().mean((1, 2, 3)).round().tolist())
"""
SHADES = "[0.0, 50.0, 100.0]\n"


def allowed(*words):
    "Skip where this machine does not let us become somebody else, or mount a disk."
    if not shutil.which(words[0]) or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip(f"{' '.join(words[:3])} is not allowed here")
    return words


@pytest.fixture
def photos(tmp_path):
    "Three grey pictures, a folder for temporary files, and one that nothing can be written to."
    for i in range(3):
        Image.new("RGB", (20, 20), (50 * i,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "tmp").mkdir()
    (tmp_path / "closed").mkdir(mode=0o555)
    return tmp_path


HOMES = [None, "closed", *(pytest.param(home, marks=pytest.mark.slow) for home in ("/proc/nowhere", "0.png"))]


@pytest.mark.parametrize("home", HOMES)
def test_a_home_that_is_none_does_not_stop_the_work(photos, home):
    "No HOME, none of that name, one that is not ours, and a file: a temporary cache serves, and one warning says so."
    env = {} if home is None else {"HOME": home if home[0] == "/" else str(photos / home)}
    done = python(LOAD, photos, wrap=allowed(*NOBODY), without=HOMELESS, TMPDIR=str(photos / "tmp"), **env)
    assert done.stdout == SHADES, done.stderr
    assert done.stderr.count("DataWarning") == 1 and "set AIMFAIR_CACHE=FOLDER" in done.stderr
    assert f"it goes to {photos}/tmp/aimfair-cache-12345 for now" in done.stderr
    assert len(list((photos / "tmp/aimfair-cache-12345").glob("faces-*/shard-*"))) == 2
    assert (photos / "tmp/aimfair-cache-12345").stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_a_cache_that_is_full_of_what_is_wanted_need_not_be_written(photos):
    assert python(LOAD, photos, AIMFAIR_CACHE=str(photos / "cache")).stdout == SHADES
    for folder in [photos / "cache", *(p for p in (photos / "cache").rglob("*") if p.is_dir())]:
        folder.chmod(0o555)
    done = python(LOAD, photos, wrap=allowed(*NOBODY), AIMFAIR_CACHE=str(photos / "cache"), TMPDIR=str(photos / "tmp"))
    assert done.stdout == SHADES and not done.stderr and not list((photos / "tmp").iterdir())
    Image.new("RGB", (20, 20), (50,) * 3).save(photos / "1.png", compress_level=0)  # another file: now something is missing
    done = python(LOAD, photos, wrap=NOBODY, AIMFAIR_CACHE=str(photos / "cache"), TMPDIR=str(photos / "tmp"))
    assert done.stdout == SHADES and done.stderr.count("DataWarning") == 1
    for folder in (photos / "cache").rglob("*"):
        folder.chmod(0o755)


def test_where_nothing_at_all_can_be_written_a_line_says_so(photos):
    code = LOAD.replace("import sys\n", "import sys, tempfile\n    tempfile.gettempdir = lambda: sys.argv[1] + '/closed'\n", 1)
    done = python(code, photos, wrap=allowed(*NOBODY), without=HOMELESS)
    assert done.stderr.splitlines()[-1] == f"PermissionError: [Errno 13] Permission denied: '{photos}/closed/aimfair-cache-12345'"


def small_disk(folder):
    "Words before a call that has a disk of 256 KB at `folder`."
    return (*allowed("unshare", "--user", "--map-root-user", "--mount"), "sh", "-c",
            f'mount -t tmpfs -o size=256k none {folder} && exec "$0" "$@"')


def test_a_full_disk_is_said_whatever_the_library_makes_of_it(photos):
    (photos / "disk").mkdir()
    done = python("""
        import errno, os, sys
        import numpy as np, torch
        from safetensors.torch import save_file
        from aimfair.core import append_lines, whole_file, whole_folder, write_whole
        disk, big = sys.argv[1], torch.zeros(100_000)

        def numpy_file():
            with whole_folder(disk + "/set") as aside:
                np.save(aside / "a.npy", big.numpy())

        def torch_file(save):
            with whole_file(disk + "/model") as aside:
                save(aside)

        ways = [lambda: write_whole(disk + "/text", "x" * 400_000), lambda: append_lines(disk + "/lines", ["x" * 400_000]), numpy_file,
                lambda: torch_file(lambda file: torch.save({"w": big}, file)), lambda: torch_file(lambda file: save_file({"w": big}, file))]
        for way in ways:
            try:
                way()
            except OSError as error:
                print(error.errno == errno.ENOSPC, error.filename, error.strerror)
        os.unlink(disk + "/lines")
        write_whole(disk + "/small", "what was torn is gone")""", photos / "disk", wrap=small_disk(photos / "disk"))
    if "mount" in done.stderr and not done.stdout:
        pytest.skip("no disk can be mounted here")
    advice = "no space is left on its disk; make room, or name a folder on another disk"
    expected = [f"True {photos}/disk/{name} {advice}" for name in ("text", "lines", "set", "model", "model")]
    assert (done.stdout.splitlines(), done.stderr) == (expected, "")


@pytest.mark.slow
def test_a_full_cache_disk_ends_a_command_in_a_line(photos):
    for folder in ("disk", "faces"):
        (photos / folder).mkdir()
    for i in range(40):
        Image.new("RGB", (64, 64), (5 * i,) * 3).save(photos / f"faces/{i}.png")
        (photos / f"faces/{i}.txt").write_text("a face")
    done = command("t2i", "train", "--data", photos / "faces", "--out", photos / "out", wrap=small_disk(photos / "disk"),
                   AIMFAIR_CACHE=str(photos / "disk"))
    if "mount" in done.stderr and "aimfair" not in done.stderr:
        pytest.skip("no disk can be mounted here")
    assert done.returncode == 1 and "no space is left on its disk" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


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


def test_a_tilde_is_the_home_folder_for_everything_in_the_library_that_takes_a_path(tmp_path):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    done = python("import os, runpy, sys; os.chdir(sys.argv[1]); runpy.run_path(sys.argv[2])", here, ROOT / "tests" / "home_paths.py",
                  HOME=str(home))
    assert done.returncode == 0 and not done.stdout.strip() and not os.listdir(here), done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("words", [["--out=~/a.json"], ["--out", "~/a.json"], ["--out=~/deep/er/a.json"]])
def test_a_tilde_on_the_command_line(tmp_path, words):
    done = command("prompts", "write", "toy-smiling-male", "--per-group=1", *words, HOME=str(tmp_path))
    assert done.returncode == 0 and [p.name for p in tmp_path.rglob("*.json")] == ["a.json"], done.stderr


def test_a_tilde_in_settings_of_the_command_line(tmp_path):
    (tmp_path / "p.toml").write_text("description = 'mine'")
    done = command("doctor", "--profile=~/p.toml", "--set", "data.kind=celeba", "--set=data.root=~/faces", HOME=str(tmp_path))
    assert f"data.root: no folder {tmp_path}/faces" in done.stdout, done.stderr


# ---------------------------------------------------------------- scripts without a guard

SCRIPT = """
from aimfair.experiments import run
done = run({profile!r}, ["ERM"], store={store!r}, workers=2, progress=False, settings={settings})
print("made", done.made)
"""
FEW = {"model.name": "toy_resnet18", "run.tune": False, "synthetic.kind": "studio"}


@pytest.mark.parametrize("way", ["script", pytest.param("pipe", marks=pytest.mark.slow), pytest.param("words", marks=pytest.mark.slow)])
def test_workers_need_no_guard_and_no_file(tmp_path, way):
    code = SCRIPT.format(profile=str(ROOT / "tests/tiny.toml"), store=str(tmp_path / "runs"), settings=FEW)
    (tmp_path / "script.py").write_text(code)
    words = {"script": [str(tmp_path / "script.py")], "pipe": ["-"], "words": ["-c", code]}[way]
    done = subprocess.run([sys.executable, *words], input=code if way == "pipe" else None, capture_output=True, text=True, timeout=300,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stdout.startswith("made ") and done.stdout.count("made") == 1, done.stderr


@pytest.mark.slow
def test_what_the_script_itself_defines_is_computed_in_its_own_process(tmp_path):
    done = python(f"""
        from aimfair.baselines import BASELINES, ERMSettings, baseline, train_erm
        from aimfair.experiments import run

        @baseline("Mine", ERMSettings, "a script")
        def mine(model, train, val, run):
            return train_erm(model, train, val, config=run.config, seed=run.seed, device=run.device, progress=False)

        done = run({str(ROOT / "tests/tiny.toml")!r}, ["ERM"], store={str(tmp_path)!r}, workers=2, progress=False, settings={FEW})
        print("made", done.made)
        """)
    assert done.returncode == 0 and done.stdout.startswith("made "), done.stderr
    assert "computed in one process: mine is defined in the script itself" in done.stderr


# ---------------------------------------------------------------- what a call leaves as it was


def state():
    "What all code of a process shares."
    logs = {name: logging.getLogger(name) for name in ["", *"aimfair diffusers transformers datasets matplotlib PIL papermill".split()]}
    flags = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), torch.get_num_threads(),
             torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision(), torch.backends.cudnn.deterministic,
             torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32, torch.is_autocast_enabled("cpu"))
    return {
        "chance of torch": torch.get_rng_state().tolist(), "chance of numpy": str(np.random.get_state()),
        "chance of Python": random.getstate(), "flags of torch": flags, "errors of numpy": np.geterr(),
        "options of pandas": pd.get_option("display.max_columns"),
        "matplotlib": dict(matplotlib.rcParams), "backend": matplotlib.get_backend(), "figures": plt.get_fignums(),
        "warnings": (list(warnings.filters), warnings.showwarning, warnings.formatwarning),
        "logs": {name: (log.level, list(log.handlers), log.propagate, log.disabled) for name, log in logs.items()},
        "bars": (diffusers.utils.logging.is_progress_bar_enabled(), transformers.utils.logging.is_progress_bar_enabled(),
                 datasets.is_progress_bar_enabled(), dict(progress_bar_states)),
        "environment": dict(os.environ), "folder": os.getcwd(), "path": list(sys.path), "words": list(sys.argv),
        "script": id(sys.modules["__main__"]), "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "output": (sys.stdout, sys.stderr, sys.stdout.errors, sys.excepthook), "locale": locale.setlocale(locale.LC_ALL),
        "Pillow": (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS),
    }


@contextlib.contextmanager
def unusual(bars):
    "Nothing is as it is by default; it is so again afterwards."
    kept = torch.get_num_threads(), torch.get_rng_state(), np.random.get_state(), random.getstate()
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    logs = [logging.getLogger(name) for name in ("diffusers", "transformers", "PIL")]
    before, on = [log.level for log in logs], [library.is_progress_bar_enabled() for library in libraries]
    with warnings.catch_warnings(), matplotlib.rc_context({"font.size": 7.5, "savefig.dpi": 123}):
        warnings.simplefilter("ignore", BytesWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_num_threads(2)
        for log, level in zip(logs, (logging.CRITICAL, logging.INFO, logging.ERROR), strict=True):
            log.setLevel(level)
        for library in libraries:
            (library.enable_progress_bar if bars else library.disable_progress_bar)()
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_num_threads(kept[0]), torch.set_rng_state(kept[1]), np.random.set_state(kept[2]), random.setstate(kept[3])
            for log, level in zip(logs, before, strict=True):
                log.setLevel(level)
            for library, was in zip(libraries, on, strict=True):
                (library.enable_progress_bar if was else library.disable_progress_bar)()


def draw_images(folder):
    synthesize("toy-smiling-male", style="plain", per_group=1, out=folder / "set", device="cpu", progress=False,
               config=make_config(steps=1))


def train_a_generator(folder):
    tiny = {"decoder_steps": 1, "decoder_batch": 4, "decoder_width": 8, "channels": (16, 32), "head_dim": 16, "text_width": 32,
            "text_layers": 1, "tokens": 24, "vocabulary": 640, "steps": 1, "batch_size": 4, "sampling_steps": 1, "latent_channels": 8}
    t2i.train_t2i(*t2i.drawn_faces(8, seed=7, per_face=2), out=folder / "t2i", config=t2i.T2IConfig(**tiny), progress=False)


def read_a_stream(folder):
    images = [str(p) for p in pictures(folder)]
    data = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 4}).cast_column("image", datasets.Image())
    load_faces(huggingface(data.to_iterable_dataset(), cache=folder / "c"), size=16, cache=folder / "c")


def pictures(folder):
    for i in range(8):
        Image.new("RGB", (20, 20), (30 * i,) * 3).save(folder / f"{i}.png")
    return sorted(folder.glob("*.png"))


def wrong_commands(folder):
    for words in (["--versoin"], ["t2i", "train", "--data", "~/nowhere", "--out", str(folder / "o")], ["prompts", "list"], ["doctor"]):
        main(words)


def an_experiment(folder):
    run(ROOT / "tests/tiny.toml", ["ERM"], store=folder / "runs", workers=1, progress=False, settings=FEW)


def a_reproduction(folder):
    reproduce(ROOT / "tests/tiny.toml", only=["layer_sensitivity"], store=folder / "runs", workers=2, progress=False)


CALLS = [lambda folder: load_generator("bundled", device="cpu"), draw_images, train_a_generator, read_a_stream, wrong_commands,
         pytest.param(an_experiment, marks=pytest.mark.slow), pytest.param(a_reproduction, marks=pytest.mark.slow)]


@pytest.mark.parametrize("bars", [True, False], ids=["bars on", "bars off"])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_leaves_everything_as_it_was(call, bars, tmp_path):
    load_generator("bundled", device="cpu")  # what libraries do when they are first imported is not ours
    with unusual(bars):
        before = state()
        call(tmp_path)
        after = state()
    assert {name: (before[name], after[name]) for name in before if before[name] != after[name]} == {}


@pytest.mark.parametrize(("options", "shown"), [({}, True), ({"TQDM_DISABLE": "1"}, False)])
def test_bars_that_the_environment_turns_off_stay_off(options, shown):
    done = python("""
        from aimfair.core import progress_bar
        for disable in (False, True):
            for _ in progress_bar(range(3), disable=disable, desc="counting", delay=0, mininterval=0):
                pass""", **options)
    assert ("counting" in done.stderr) == shown, done.stderr


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("word", [*"cuda gpu GPU 0 cuda:0 CUDA0 cuda:7 nvidia mps xpu meta".split(), 0, torch.device("meta")])
def test_a_device_that_is_not_there_is_refused_in_a_line(word, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"^device is '{word}', which this machine has not .*; cpu is always there$"):
        pick_device(word)


@pytest.mark.parametrize(("word", "found"), [
    (None, "cuda"), ("auto", "cuda"), (" Auto ", "cuda"), ("gpu", "cuda"), ("GPU:1", "cuda:1"), ("gpu 1", "cuda:1"), ("cuda1", "cuda:1"),
    (1, "cuda:1"), (np.int64(1), "cuda:1"), ("\tcuda:0\n", "cuda:0"), (torch.device("cuda:1"), "cuda:1"), (-1, "cpu"), ("cpu", "cpu"),
    (torch.device("cpu"), "cpu")])
def test_a_device_by_every_usual_name(word, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(word) == torch.device(found)


@pytest.mark.parametrize("word", ["cuda:2", "7", 7, "gpu:9"])
def test_a_number_that_no_device_has_is_told_with_how_many_there_are(word, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=f"device is '{word}', which this machine has not; of cuda there is 2, counted from 0"):
        pick_device(word)


# ---------------------------------------------------------------- streams


@pytest.fixture
def shades(tmp_path):
    "Eight pictures by class, as an image folder and in an archive; rows with undecoded images."
    rows = []
    for i, file in enumerate(pictures(tmp_path)):
        place = tmp_path / "folder" / ("no", "yes")[i % 2] / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        rows.append({"image": {"bytes": file.read_bytes(), "path": None}, "label": i % 2})
        file.rename(place)
    shutil.make_archive(str(tmp_path / "zipped/faces"), "zip", tmp_path / "folder")
    return tmp_path, rows


def brightness(table, folder):
    faces = load_faces(table, size=8, cache=folder / "c")
    return {(int(t), round(x)) for t, x in zip(faces.target, faces.gather(slice(None)).numpy().mean((1, 2, 3)), strict=True)}


@pytest.mark.parametrize("kind", ["rows", "generator", "decoded", "parts", "folder", "zip"])
def test_a_stream_is_gone_through_once(shades, kind):
    folder, rows = shades
    options, went = {"cache": folder / "c"}, []

    def once():
        went.append(1)
        for i, row in enumerate(rows):
            inside = {"bytes": None, "path": f"zip://{('no', 'yes')[i % 2]}/{i}.png::{folder / 'zipped/faces.zip'}"}
            image = {"generator": row["image"], "zip": inside}.get(kind) or Image.open(io.BytesIO(row["image"]["bytes"]))
            yield {**row, "image": image}

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    stream = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset(num_shards=2)
    source = {"rows": stream, "parts": datasets.IterableDatasetDict(train=stream, test=stream.take(2))}.get(kind)
    if kind in ("generator", "decoded", "zip"):
        source = datasets.IterableDataset.from_generator(once, features=None if kind == "decoded" else features)
    if kind == "folder":
        source, options["streaming"] = str(folder / "folder"), True
    table = huggingface(source, **options)
    assert brightness(table, folder) == {(i % 2, 30 * i) for i in range(8)}
    assert len(went) <= 1 and len(table) == (10 if kind == "parts" else 8) and table["id"].is_unique
    assert ("split" in table) == (kind in ("parts", "folder"))


def test_mistakes_about_a_stream_are_told_in_a_line(shades):
    folder, rows = shades
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(DataError, match="data set: no column 'lable'; did you mean label?"):
        huggingface(stream, target="lable", cache=folder / "c")
    with pytest.raises(DataError, match="data set: the stream holds no rows"):
        huggingface(stream.take(0), cache=folder / "c")
    with pytest.raises(DataError, match="row 1 has no image"):
        huggingface(datasets.Dataset.from_list([rows[0], {"image": None, "label": 1}]).to_iterable_dataset(), cache=folder / "c")


@pytest.mark.slow
def test_an_image_folder_is_read_without_a_home(shades):
    folder, _ = shades
    (folder / "tmp").mkdir()
    (folder / "here").mkdir()
    done = python("""
        import os, sys
        os.chdir(sys.argv[1] + "/here")
        from aimfair.data import huggingface
        print(len(huggingface(sys.argv[1] + "/folder")))""", folder, wrap=allowed(*NOBODY), TMPDIR=str(folder / "tmp"),
        without=(*HOMELESS, "HF_HOME", "HF_DATASETS_CACHE"))
    assert done.stdout == "8\n" and "set HF_HOME=FOLDER" in done.stderr, done.stderr
    assert not list((folder / "here").iterdir()), "no folder named ~"
