"A wheel and an sdist hold all that is needed outside a checkout, and the package stays light to import."

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest
from pace import slowness

ROOT = Path(__file__).resolve().parent.parent
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".ipynb_checkpoints")
SOURCES = "settings.ini setup.py pyproject.toml MANIFEST.in Makefile constraints.txt LICENSE README.md CHANGELOG.md CONTRIBUTING.md".split()
HEAVY = {"torch", "torchvision", "pandas", "numpy", "matplotlib", "diffusers", "transformers", "fairlearn", "papermill"}


def settings():
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def run(*command, cwd, timeout=600, **environment):
    "Runs a command outside the checkout: no variable points back into it."
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**clean, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    "The sdist of a copy of the sources, and the wheel that is built from nothing but that sdist."
    folder = tmp_path_factory.mktemp("distributions")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, checkout)
    for name in ("aimfair", "nbs", "tests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=IGNORED)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", checkout, cwd=folder)
    wheel, = (folder / "dist").glob("*.whl")
    sdist, = (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def relative_files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_wheel_holds_modules_assets_and_experiment_notebooks(distributions):
    wheel, _ = distributions
    expected = {f"aimfair/{name}" for name in relative_files(ROOT / "aimfair")}
    expected |= {f"aimfair/assets/experiments/{path.name}" for path in (ROOT / "nbs" / "experiments").glob("*.ipynb")}
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        for path in (ROOT / "nbs" / "experiments").glob("*.ipynb"):
            assert archive.read(f"aimfair/assets/experiments/{path.name}") == path.read_bytes()
    assert sorted(names) == sorted(expected)


def test_wheel_is_described(distributions):
    wheel, _ = distributions
    with zipfile.ZipFile(wheel) as archive:
        info, = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        assert any(name.startswith(info) and name.endswith("LICENSE") for name in archive.namelist())
    assert re.search(r"^Name: aimfair$", metadata, re.M)
    assert re.search(rf"^Version: {re.escape(settings()['version'])}$", metadata, re.M)
    assert re.search(r"^License(-Expression)?: Apache-2.0$", metadata, re.M)
    assert re.search(rf"^Requires-Python: >={settings()['min_python']}$", metadata, re.M)
    assert set(re.findall(r"^Provides-Extra: (\w+)$", metadata, re.M)) == {
        "lab", "explore", "docs", "llm", "hub", "timm", "imagenet", "peft", "tensorboard", "trackio", "ray", "s3", "dev"}
    assert "aimfair = aimfair.cli:main" in scripts


def test_sdist_holds_the_sources(distributions):
    _, sdist = distributions
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    notebooks = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert names >= {*SOURCES, *notebooks, *(f"aimfair/{name}" for name in relative_files(ROOT / "aimfair"))}


def test_every_requirement_has_a_tested_version():
    "constraints.txt pins all that settings.ini asks for, once for each Python it may be installed on."
    def name(requirement):
        return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r'[\w.-]+==[\w.!]+(; python_version (<|>=) "3\.\d+")?', line) for line in lines)
    assert len(set(lines)) == len(lines)
    asked = [name(requirement) for key in ("requirements", "lab_requirements", "hub_requirements", "timm_requirements", "dev_requirements")
             for requirement in settings()[key].split()]
    assert set(asked) <= {name(line) for line in lines}


def shortest(measure, repeats=7):
    "Of several fresh processes: other work on the machine can only lengthen a run."
    return min(measure() for _ in range(repeats))


def python(code):
    return run(sys.executable, "-c", code, cwd=ROOT / "tests", timeout=60)  # not above the checkout, which may be called as the package


def loaded_by(code):
    return HEAVY & set(python(f"{code}\nimport sys; print(' '.join(sys.modules))").splitlines()[-1].split())


def test_import_is_light():
    assert not loaded_by("import aimfair")
    timed = "import time; start = time.perf_counter(); import aimfair; print(time.perf_counter() - start)"
    assert shortest(lambda: float(python(timed))) < 0.3 * slowness()


def test_help_is_light():
    command = "import sys; sys.argv = ['aimfair', '--help']; from aimfair.cli import main"  # what the installed script does

    def whole_process():
        start = time.perf_counter()
        assert "reproduce" in python(f"{command}; sys.exit(main())")
        return time.perf_counter() - start

    assert not loaded_by(f"{command}\ntry: main()\nexcept SystemExit: pass")
    assert shortest(whole_process) < slowness()


def remove_in_background(folder):
    "Several GB take minutes to remove on some disks; no test need wait for that."
    code = "import shutil, sys; shutil.rmtree(sys.argv[1], ignore_errors=True)"
    nothing = subprocess.DEVNULL
    subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    "An empty environment into which the wheel was installed, with the tested versions and no extras."
    wheel, _ = distributions
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env", with_pip=True)
    binaries = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    install = [binaries / "python", "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", ROOT / "constraints.txt"]
    try:
        run(*install, wheel, cwd=folder, timeout=1800)
        yield binaries
    finally:
        remove_in_background(folder / "env")


@pytest.mark.slow
class TestInstalledWheel:
    "Outside the checkout, in an environment with the wheel and its requirements only."

    def test_imports_from_the_environment(self, installed, tmp_path):
        place = run(installed / "python", "-c", "import aimfair; print(aimfair.__file__)", cwd=tmp_path).strip()
        assert Path(place).is_relative_to(installed.parent)

    def test_requirements_fit_together(self, installed, tmp_path):
        run(installed / "python", "-m", "pip", "check", cwd=tmp_path)

    def test_every_module_imports_without_extras(self, installed, tmp_path):
        paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "aimfair").rglob("*.py") if not path.stem.startswith("_")]
        run(installed / "python", "-c", "; ".join(f"import {'.'.join(path.parts)}" for path in paths), cwd=tmp_path)

    def test_help(self, installed, tmp_path):
        assert "reproduce" in run(installed / "aimfair", "--help", cwd=tmp_path)

    def test_assets_are_there(self, installed, tmp_path):
        code = "from importlib.resources import files; print(*(f.name for f in (files('aimfair') / 'assets').iterdir()))"
        assert {"experiments", "profiles", "toy_resnet18.safetensors"} <= set(run(installed / "python", "-c", code, cwd=tmp_path).split())

    def test_reproduce_outside_the_checkout(self, installed, tmp_path):
        "The whole way at tiny size: faces, models, gradients, table, figure and executed notebook."
        tiny = ("data.n=80 data.n_train=200 data.n_val=40 data.n_test=80 synthetic.pool=40 synthetic.per_group=20 synthetic.held_out=0 "
                "train.epochs=1 train.batch_size=16 finetune.epochs=1 finetune.batch_size=16 mask.batch_size=16").split()
        settings = [word for setting in tiny for word in ("--set", setting)]
        run(installed / "aimfair", "reproduce", "--only", "finetuning_strategies", "--seeds", "1", "--out", "out", *settings, cwd=tmp_path)
        names = {path.name for path in (tmp_path / "out").rglob("*.*")}
        assert {f"finetuning_strategies.{kind}" for kind in ("csv", "md", "tex", "png", "pdf", "ipynb")} <= names
        assert (tmp_path / "runs").is_dir()
