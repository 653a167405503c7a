"""The command line from outside: speed, lightness, exit codes, one-line errors and real splits."""
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import types
import warnings
from configparser import ConfigParser
from pathlib import Path

import pandas as pd
import pytest
from pace import slowness
from pydantic import Field

import aimfair
from aimfair.cli import explain, main
from aimfair.core import Settings

ROOT = Path(aimfair.__file__).parents[1]


def run(*words, cwd=None, code=None, **env):
    "The command in a process of its own."
    call = ["-c", textwrap.dedent(code)] if code else ["-m", "aimfair.cli"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    usual = {k: v for k, v in os.environ.items() if k != "AIMFAIR_DEBUG"}
    return subprocess.run([sys.executable, *call, *map(str, words)], cwd=cwd, env={**usual, "PYTHONPATH": path, **env},
                          capture_output=True, text=True, timeout=120)


@pytest.fixture
def celeba(tmp_path):
    "Annotations of 200 images in CelebA's format, 160 of them for training; the first 150 are on disk (as empty files)."
    root = tmp_path / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    rows = [(f"{i:06d}.jpg", 1 if i % 2 else -1, 1 if i // 2 % 2 else -1) for i in range(1, 201)]
    lines = [f"{name} {smiling:2d} {male:2d}" for name, smiling, male in rows]
    (root / "list_attr_celeba.txt").write_text("\n".join(["200", "Smiling Male ", *lines]) + "\n")
    (root / "list_eval_partition.txt").write_text("".join(f"{name} {0 if i < 160 else 1}\n" for i, (name, _, _) in enumerate(rows)))
    for name, _, _ in rows[:150]:
        (root / "img_align_celeba" / name).touch()
    return root


# ---------------------------------------------------------------- help and version

HEAVY = ("torch", "pandas", "numpy", "matplotlib", "aimfair.data", "aimfair.repro", "aimfair.experiments")


@pytest.mark.parametrize("words", ["--help", "", "--version", "data --help", "data split --help", "reproduce -h", "debias --help"])
def test_help_loads_nothing_heavy(words):
    done = run(*words.split(), code=f"""
        import sys
        from aimfair.cli import main
        code = main(sys.argv[1:])
        print("LOADED", [m for m in {HEAVY} if m in sys.modules])
        sys.exit(code)""")
    assert done.returncode == 0 and not done.stderr
    assert "LOADED []" in done.stdout
    assert "Usage: aimfair" in done.stdout or "aimfair " in done.stdout


def test_the_package_itself_is_light():
    assert run(code=f"import sys, aimfair; print([m for m in {HEAVY} if m in sys.modules])").stdout == "[]\n"


def test_help_is_fast():
    def seconds():
        start = time.perf_counter()
        assert run("--help").returncode == 0
        return time.perf_counter() - start
    assert min(seconds() for _ in range(3)) < slowness()


def test_version():
    assert run("--version").stdout == f"aimfair {aimfair.__version__}\n"


def test_split_loads_no_model_and_no_plots(celeba, tmp_path):
    done = run("data", "split", "--root", celeba, "--n", "20", "--out", tmp_path / "s.csv", code="""
        import sys
        from aimfair.cli import main
        code = main(sys.argv[1:])
        assert not {"matplotlib", "torchvision", "aimfair.models", "aimfair.repro"} & set(sys.modules)
        sys.exit(code)""")
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- data split

def oracle(root, target, protected, n, bias):
    "The paper's rule, read from the annotation files with nothing but pandas."
    attributes = pd.read_csv(root / "list_attr_celeba.txt", sep=r"\s+", skiprows=1)
    split = pd.read_csv(root / "list_eval_partition.txt", sep=r"\s+", header=None, index_col=0)[1]
    frame = (attributes.loc[split.index[split == 0], [target, protected]] == 1).astype(int)
    major = round(n / (1 + bias) / 2)
    need = {(0, 1): major, (1, 0): major, (0, 0): n // 2 - major, (1, 1): n // 2 - major}
    keep = [i for (t, p), k in need.items() for i in frame.index[(frame[target] == t) & (frame[protected] == p)][:k]]
    return frame.loc[frame.index.isin(keep)]


@pytest.mark.parametrize("bias, ratio", [("1/9", 1 / 9), ("1:9", 1 / 9), ("0.25", 0.25), ("1", 1.0)])
def test_split_follows_the_rule(celeba, tmp_path, capsys, bias, ratio):
    out = tmp_path / "new" / "split.csv"
    assert main(["data", "split", "--root", str(celeba), "--n", "40", "--bias", bias, "--out", str(out)]) == 0
    chosen, expected = pd.read_csv(out), oracle(celeba, "Smiling", "Male", 40, ratio)
    assert list(chosen.columns) == ["image_id", "target", "protected"]
    assert list(chosen.image_id) == list(expected.index)
    assert (chosen[["target", "protected"]].to_numpy() == expected.to_numpy()).all()
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and "40 images" in printed.out and not printed.err
    assert b"\r" not in out.read_bytes() and [p.name for p in out.parent.iterdir()] == ["split.csv"]


def test_split_val_and_available_only(celeba, tmp_path):
    out = tmp_path / "s.csv"
    assert main(["data", "split", "--root", str(celeba), "--n", "20", "--bias", "1", "--split", "val", "--out", str(out)]) == 0
    assert pd.read_csv(out).image_id.min() > "000160.jpg"
    call = ["data", "split", "--root", str(celeba), "--n", "148", "--bias", "1", "--out", str(out)]
    assert main(call) == 0
    assert pd.read_csv(out).image_id.max() == "000148.jpg"
    (celeba / "img_align_celeba" / "000001.jpg").unlink()
    assert main([*call, "--available-only"]) == 0
    rows = pd.read_csv(out).image_id
    assert "000001.jpg" not in set(rows) and len(rows) == 148 and rows.max() == "000149.jpg"


def test_split_of_a_folder_with_csv(tmp_path):
    (tmp_path / "labels.csv").write_text("file,happy,old\n" + "".join(f"{i}.png,{i % 2},{i // 2 % 2}\n" for i in range(16)))
    out = tmp_path / "s.csv"
    call = ["data", "split", "--dataset", "folder", "--root", str(tmp_path), "--csv", "labels.csv", "--image", "file", "--target", "happy",
            "--protected", "old", "--n", "10", "--bias", "1/4", "--out", str(out)]
    assert main(call) == 0
    assert pd.read_csv(out).groupby(["target", "protected"]).size().to_dict() == {(0, 0): 1, (0, 1): 4, (1, 0): 4, (1, 1): 1}


@pytest.mark.real_data
@pytest.mark.skipif(not os.environ.get("AIMFAIR_DATA"), reason="AIMFAIR_DATA is not set")
@pytest.mark.parametrize("target, protected, n", [("Smiling", "Male", 20000), ("Smiling", "Young", 20000), ("Young", "Male", 2000)])
def test_split_of_real_celeba(tmp_path, target, protected, n):
    root, out = Path(os.environ["AIMFAIR_DATA"]) / "celeba-10k", tmp_path / "s.csv"
    done = run("data", "split", "--dataset", "celeba", "--root", root, "--target", target, "--protected", protected, "--n", n,
               "--bias", "1/9", "--out", out)
    assert done.returncode == 0, done.stderr
    chosen, expected = pd.read_csv(out), oracle(root, target, protected, n, 1 / 9)
    assert list(chosen.image_id) == list(expected.index)
    assert (chosen[["target", "protected"]].to_numpy() == expected.to_numpy()).all()
    assert chosen.groupby(["target", "protected"]).size().to_list() == [n // 20, 9 * n // 20, 9 * n // 20, n // 20]


# ---------------------------------------------------------------- wrong calls

WRONG = {  # words -> what the line must say
    "data split --root ROOT --n 20 --out OUT --bais 1/9": "did you mean --bias?",
    "data split --root ROOT --n 20 --out OUT --availble-only": "did you mean --available-only?",
    "data splt --root ROOT": "split",
    "reprodce": "reproduce",
    "data split": "missing --root, --n, --out",
    "data split --root ROOT --out OUT": "missing --n",
    "data split --dataset celba --root ROOT --n 20 --out OUT": "did you mean celeba?",
    "data split --dataset folder --root ROOT --n 20 --out OUT": "missing --csv, --target, --protected",
    "data split --dataset utkface --available-only --root ROOT --n 20 --out OUT": "--available-only is for celeba",
    "data split --root ROOT --n 20 --out OUT --target Smilling": "did you mean Smiling?",
    "data split --root ROOT --n 20 --out OUT --target Male": "choose two attributes",
    "data split --root ROOT --n 20 --out OUT --bias half": "1/9, 1:9 or 0.111",
    "data split --root ROOT --n 20 --out OUT --bias 1/0": "1/9, 1:9 or 0.111",
    "data split --root ROOT --n 20 --out OUT --bias 9": "bias is 9",
    "data split --root ROOT --n 20 --out OUT --split test": "there are train, val",
    "data split --root ROOT --n many --out OUT": "--n",
    "data split --root ROOT --n 21 --out OUT": "even",
    "data split --root ROOT --n 100000 --out OUT": "needed",
    "data split --root NOWHERE --n 20 --out OUT": "does not exist",
    "data split --root EMPTY --n 20 --out OUT": "list_attr_celeba",
    "data split --root ROOT --n 20 --out ROOT": "directory",
    "data split --dataset folder --root THREE --csv labels.csv --target happy --protected age --n 20 --out OUT":
        "cell happy=0, age=1 has 4 images, 8 are needed",
    "reproduce --aggregation median": "no aggregation 'median'",
    "reproduce --set epochs": "key=value",
    "reproduce --set =3": "key=value",
    "reproduce --set a=1 --set a=2": "given twice",
    "reproduce --seeds 0": "--seeds",
    "reproduce --seeds three": "--seeds",
    "debias": "missing --model, --real, --synthetic, --val, --out",
    "debias --model resnet18 --weights NOWHERE": "does not exist",
    "debias --lern-rate 3": "no such option",
    "debias --k 0": "'0' is neither a whole number above 0 nor auto",
    "debias --bias half": "1/9, 1:9 or 0.111",
    "debias --mean 0.5": "expected three numbers such as 0.485,0.456,0.406",
    "synthesize --prompts toy-smiling-male --per-group 1 --out OUT --filter agrement=0.2": "did you mean agreement?",
    "synthesize --prompts toy-smiling-male --per-group 1 --out OUT --filter distinct": "KIND=THRESHOLD[@MODEL]",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_calls_are_one_line(words, celeba, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "labels.csv").write_text("image_id,happy,age\n" + "".join(f"{i}.png,{i % 2},{i % 3}\n" for i in range(24)))
    places = {"ROOT": celeba, "OUT": tmp_path / "out.csv", "NOWHERE": tmp_path / "nowhere", "EMPTY": tmp_path / "empty",
              "THREE": tmp_path / "three"}
    assert main([str(places.get(w, w)) for w in words.split()]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith("aimfair: ") and printed.err.count("\n") == 1
    assert WRONG[words] in printed.err
    assert not places["OUT"].exists() and sorted(p.name for p in tmp_path.iterdir()) == ["celeba", "empty", "three"]


def test_wrong_call_in_a_process(tmp_path):
    done = run("data", "split", "--root", tmp_path, "--n", "20", "--out", tmp_path / "x.csv")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_debug_shows_the_traceback(tmp_path):
    call = ["data", "split", "--root", tmp_path, "--n", "20", "--out", tmp_path / "x.csv"]
    for done in (run(*call, "--debug"), run("--debug", *call), run(*call, AIMFAIR_DEBUG="1")):
        assert done.returncode == 2 and "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith("aimfair: ")


def test_an_existing_file_survives_a_failed_split(celeba, tmp_path):
    out = tmp_path / "split.csv"
    out.write_text("precious\n")
    assert main(["data", "split", "--root", str(celeba), "--n", "100000", "--out", str(out)]) == 2
    assert out.read_text() == "precious\n"


# ---------------------------------------------------------------- what is passed on

def stand_in(monkeypatch, name, **functions):
    "Put a module of ours in the place of aimfair.NAME."
    module = types.ModuleType(f"aimfair.{name}")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(aimfair, name, module, raising=False)


def test_reproduce_passes_its_options_on(monkeypatch, capsys):
    calls = []

    def reproduce(profile, **options):
        calls.append((profile, options))
        return types.SimpleNamespace(failed={}, left_out={}, files=[Path("figures/a.csv")], plan=types.SimpleNamespace(cases={"a": []}),
                                     report=Path("figures/report.html"))

    stand_in(monkeypatch, "experiments", reproduce=reproduce)
    assert main(["reproduce"]) == 0
    words = "reproduce --profile celeba64 --only a --only b --seeds 2 --out o --store s --set data.root=/x=y --set k=4 --workers 2"
    assert main([*words.split(), "--on", "ray=auto", "--aggregation", "published", "--shareable"]) == 0
    nothing = {"only": None, "seeds": None, "out": None, "store": None, "settings": {}, "workers": None, "aggregation": "mean",
               "on": None, "shareable": False}
    given = {"only": ["a", "b"], "seeds": 2, "out": Path("o"), "store": "s", "settings": {"data.root": "/x=y", "k": "4"},
             "workers": 2, "aggregation": "published", "on": "ray=auto", "shareable": True}
    assert calls == [("toy", nothing), ("celeba64", given)]
    assert capsys.readouterr().out == f"1 files of 1 experiments; report: {Path('figures/report.html')}\n" * 2


def test_a_plan_computes_nothing(monkeypatch, capsys):
    stand_in(monkeypatch, "experiments", make_plan=lambda profile, only, **options: (f"plan of {only}", {"tradeoff: DiGA": "no generator"}))
    assert main(["reproduce", "--plan", "--only", "tradeoff"]) == 0
    assert capsys.readouterr().out == "plan of ['tradeoff']\nleft out: tradeoff: DiGA: no generator\n"


def test_failed_experiments_are_named_with_exit_code_1(monkeypatch, capsys):
    result = types.SimpleNamespace(failed={"partial_finetuning": "no\nspace", "tradeoff": "x"}, files=[], left_out={}, report=None,
                                   plan=types.SimpleNamespace(cases={}))
    stand_in(monkeypatch, "experiments", reproduce=lambda *a, **k: result)
    assert main(["reproduce"]) == 1
    assert capsys.readouterr().err == "aimfair: failed: partial_finetuning: no space\naimfair: failed: tradeoff: x\n"


def test_status_prints_the_frame(monkeypatch, capsys):
    frame = pd.DataFrame({"stage": ["train"], "state": ["done"]})
    stand_in(monkeypatch, "repro", status=lambda store="runs": frame if str(store) == "runs" else frame[:0])
    assert main(["status"]) == 0 and main(["status", "--store", "other"]) == 0
    assert capsys.readouterr().out.split() == ["stage", "state", "train", "done", "the", "store", "is", "empty"]


def test_why_passes_its_options_on(monkeypatch, capsys):
    calls = []
    stand_in(monkeypatch, "repro", why=lambda *given, **options: calls.append((given, options)) or pd.DataFrame())
    assert main("status --why --profile celeba64 --only a --seeds 2 --set k=4 --store s".split()) == 0 and main(["status", "--why"]) == 0
    assert calls == [(("celeba64", ["a"]), {"seeds": 2, "settings": {"k": "4"}, "store": "s"}),
                     (("toy", None), {"seeds": None, "settings": {}, "store": "runs"})]


@pytest.mark.parametrize("ok", [True, False])
def test_the_doctors_verdict_is_the_exit_code(monkeypatch, capsys, ok):
    class Found:
        def __init__(self, *given, **options):
            self.ok, self.asked = ok, (given, options)

        def __str__(self):
            return f"{self.asked}"

    stand_in(monkeypatch, "repro", diagnose=Found)
    assert main("doctor --profile toy --set k=4".split()) == (0 if ok else 1)
    assert capsys.readouterr().out == "(('toy', 'runs'), {'settings': {'k': '4'}})\n"


def test_debias_passes_its_options_on(monkeypatch, tmp_path, capsys):
    calls = []
    stand_in(monkeypatch, "debias", debias=lambda **options: calls.append(options) or "before and after")
    folder = str(tmp_path)
    words = ["debias", "--model", "my.module:build", "--real", folder, "--synthetic", folder, "--val", folder, "--out", folder]
    assert main(words) == 0
    assert main([*words, "--k", "40", "--bias", "1:4", "--epochs", "3", "--lr", "0.02", "--batch-size", "32", "--size", "64", "--seed", "7",
                 "--device", "cpu", "--freeze-batchnorm", "--test", folder, "--mean", "0.5,0.4,0.3", "--std", "1,1,0.5", "--average", "0.5",
                 "--mix", "0.25", "--tolerance", "1"]) == 0
    base = {"model": "my.module:build", **dict.fromkeys(("real", "synthetic", "val", "out"), tmp_path)}
    plain = {**base, "bias": 1 / 9, "seed": 0, "freeze_batchnorm": False, "tolerance": 2.0}
    full = {**base, "test": tmp_path, "k": 40, "bias": 0.25, "epochs": 3, "lr": 0.02, "batch_size": 32, "size": 64, "seed": 7,
            "device": "cpu", "freeze_batchnorm": True, "mean": (0.5, 0.4, 0.3), "std": (1.0, 1.0, 0.5), "average": 0.5, "mix": 0.25,
            "tolerance": 1.0}
    assert calls == [plain, full]
    assert capsys.readouterr().out == "before and after\n" * 2


# ---------------------------------------------------------------- errors from below

def raising(error):
    def function(*args, **options):
        raise error
    return function


@pytest.mark.parametrize("error, code, says", [
    (ValueError("no profile 'toys':\n one of toy"), 2, "no profile 'toys': one of toy"),
    (FileNotFoundError(2, "No such file or directory", "w.pth"), 2, "w.pth: no such file or directory"),
    (PermissionError(13, "Permission denied", "runs"), 2, "runs: permission denied"),
    (ConnectionError("HTTPSConnectionPool: Max retries exceeded"), 2, "no connection"),
    (TimeoutError("timed out"), 2, "no connection"),
    (OSError(28, "No space left on device"), 1, "No space left"),
    (ModuleNotFoundError("No module named 'timm'", name="timm"), 2, "pip install 'aimfair[timm]'"),
    (ModuleNotFoundError("No module named 'their_package'", name="their_package"), 2, "pip install their_package"),
    (KeyboardInterrupt(), 130, "interrupted; run the same command to continue"),
])
def test_errors_from_below(monkeypatch, capsys, error, code, says):
    stand_in(monkeypatch, "experiments", reproduce=raising(error))
    assert main(["reproduce"]) == code
    printed = capsys.readouterr().err
    assert says in printed and printed.count("\n") == 1


def test_an_extra_that_is_named_brings_the_package(repository):
    "Whatever is missing: the line names an extra only where settings.ini has it, with that package in it."
    written = ConfigParser(delimiters=["="], interpolation=None)
    written.read(repository / "settings.ini")
    extras = {name.removesuffix("_requirements"): [re.split("[<>=]", package)[0] for package in packages.split()]
              for name, packages in written["DEFAULT"].items() if name.endswith("_requirements") and name != "dev_requirements"}
    packages = {package for some in extras.values() for package in some}
    for name in (*packages, "dask", "no_such_package"):
        line = explain(ModuleNotFoundError(name=name.replace("-", "_")))[1]
        extra = re.search(r"aimfair\[(\w+)\]", line)
        assert name in extras[extra[1]] if extra else line.endswith(f"pip install {name.replace('-', '_')}")
    assert explain(ModuleNotFoundError(name="timm"))[1].endswith("'aimfair[timm]'")


@pytest.mark.parametrize("name", ["aimfair", "aimfair.nowhere", "_ssl", None])
def test_a_module_that_no_package_brings_is_a_fault(name):
    assert explain(ModuleNotFoundError(name=name)) is None


def test_a_fault_of_the_program_is_not_hidden(monkeypatch):
    stand_in(monkeypatch, "experiments", reproduce=raising(ZeroDivisionError("a fault")))
    with pytest.raises(ZeroDivisionError):
        main(["reproduce"])
    assert explain(RuntimeError("a fault")) is None


def test_an_invalid_setting_names_the_choices(monkeypatch, capsys):
    class Training(Settings):
        epochs: int = Field(5, ge=1)

    class Profile(Settings):
        train: Training = Training()

    stand_in(monkeypatch, "experiments", reproduce=lambda profile, settings, **o: Profile(train=settings))
    assert main(["reproduce", "--set", "epoch=3"]) == 2 and main(["reproduce", "--set", "epochs=0"]) == 2
    unknown, small = capsys.readouterr().err.splitlines()
    assert unknown == "aimfair: no setting 'train.epoch'; did you mean epochs? there are epochs"
    assert small == "aimfair: setting train.epochs = '0': input should be greater than or equal to 1"


def test_warnings_are_one_line(monkeypatch, capsys):
    def reproduce(*args, **options):
        for text in ("2 images\nleft out", "2 images\nleft out", "3 images"):  # data are read by the plan, and again by a table
            warnings.warn(text, UserWarning, stacklevel=1)
        return types.SimpleNamespace(failed={}, left_out={}, files=[], report=None, plan=types.SimpleNamespace(cases={}))

    stand_in(monkeypatch, "experiments", reproduce=reproduce)
    before = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *what: sys.stderr.write(warnings.formatwarning(*what[:4]))
        assert main(["reproduce"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told == ["aimfair: warning: 2 images left out", "aimfair: warning: 3 images"] and warnings.formatwarning is before


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c():
    code = """
        import sys, time, types, aimfair
        module = types.ModuleType("aimfair.experiments")
        def reproduce(*args, **options):
            print("started", flush=True)
            time.sleep(60)
        module.reproduce = reproduce
        sys.modules["aimfair.experiments"] = aimfair.experiments = module
        from aimfair.cli import main
        sys.exit(main(["reproduce"]))"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "aimfair: interrupted; run the same command to continue\n"
