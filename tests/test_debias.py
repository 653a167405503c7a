"The method from files to files: what lies there afterwards, nothing twice, mistakes, and a command that is killed."

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from faults import kill_when
from PIL import Image

from aimfair.data import Faces
from aimfair.debias import debias
from aimfair.device import seeded
from aimfair.models import WeightsError, narrow_resnet18

FOUR = [(0, 0), (0, 1), (1, 0), (1, 1)]
BIASED = {(0, 1): 9, (1, 0): 9, (0, 0): 1, (1, 1): 1}

# sets of a few images only: what they show is checked elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:The model handed in gets", "ignore:no sample with")


def noise(counts, seed, size=32):
    "Noise, lighter for each of target and protected attribute: {(target, protected): images} -> Faces."
    rng = np.random.default_rng(seed)
    t, p = np.repeat(np.array(list(counts)), list(counts.values()), axis=0)[rng.permutation(sum(counts.values()))].T
    pixels = rng.integers(0, 120, (len(t), 3, size, size)) + (40 * t + 80 * p)[:, None, None, None]
    return Faces.from_arrays(pixels.astype(np.uint8), t, p)


def times(counts, n):
    return {g: n * c for g, c in counts.items()}


def write_images(root, faces, by_group=False):
    "PNG files and, unless they lie in folders by group, a labels CSV."
    groups = [f"{t}_{p}/" if by_group else "" for t, p in zip(faces.target, faces.protected, strict=True)]
    names = [f"{group}{i:04d}.png" for i, group in enumerate(groups)]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(faces.gather(i)[0].numpy().transpose(1, 2, 0)).save(root / name)
    return pd.DataFrame({"image": names, "target": faces.target, "protected": faces.protected})


NET = "from aimfair.models import narrow_resnet18\n\ndef build():\n    return narrow_resnet18(8)\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A user's folder: photos with labels, synthetic images by group, a network in a file, and its weights."
    root = tmp_path_factory.mktemp("user")
    for name, seed in (("real", 0), ("val", 1), ("test", 2)):
        table = write_images(root / name, noise(times(BIASED, 3), seed))
        table.to_csv(root / name / "labels.csv", index=False)
    write_images(root / "synthetic", noise(dict.fromkeys(FOUR, 12), 3), by_group=True)
    (root / "net.py").write_text(NET)
    with seeded(0):
        torch.save(narrow_resnet18(8).state_dict(), root / "biased.pt")
    return root


def options(root, out="fairer", **changes):
    return {"model": f"{root}/net.py:build", "weights": f"{root}/biased.pt", "real": f"{root}/real/labels.csv", "val": f"{root}/val",
            "synthetic": f"{root}/synthetic", "test": f"{root}/test/labels.csv", "out": f"{root}/{out}", "epochs": 2, "batch_size": 16,
            "lr": 0.01, "size": 32, "device": "cpu", "cache": f"{root}/cache", "progress": False, **changes}


RESULT = ["README.md", "history.csv", "mask.json", "model.safetensors", "predictions.parquet", "report.json", "report.md", "run.json",
          "sensitivity.csv"]


def contents(folder):
    return {f.name: f.read_bytes() for f in sorted(Path(folder).iterdir())}


def test_files_in_files_out_and_nothing_twice(files):
    first = debias(**options(files, "once"))
    assert first.computed and sorted(contents(first.folder)) == RESULT and not (files / "once.partial").exists()
    before = contents(first.folder)
    again = debias(**options(files, "once", device=None))
    assert not again.computed and "was done already" in str(again) and contents(first.folder) == before
    for change, message in (({"k": 40}, "k was None, is 40"), ({"seed": 3}, "seed was 0, is 3"), ({"lr": 0.02}, "lr was 0.01, is 0.02"),
                            ({"real": f"{files}/test"}, r"real \(contents\) was"), ({"test": None}, r"test \(contents\) was .* is None")):
        with pytest.raises(ValueError, match=message):
            debias(**options(files, "once", **change))
    assert contents(first.folder) == before
    report = json.loads((first.folder / "report.json").read_text())
    assert set(report["figures"]) == {"validation", "synthetic", "test"} and "0_0" in report["figures"]["test"]
    assert str(files) not in (first.folder / "report.json").read_text() + (first.folder / "run.json").read_text()


def test_a_folder_that_holds_something_else_is_left_alone(files):
    with pytest.raises(FileExistsError, match="is not a result of debias"):
        debias(**options(files, "real"))
    (files / "empty").mkdir(exist_ok=True)
    with pytest.raises(WeightsError):
        debias(**options(files, "empty", model="toy_resnet18"))  # sixteen channels, the weights have eight


def test_photos_may_come_without_groups(files, tmp_path):
    table = pd.read_csv(files / "real" / "labels.csv")
    for name in table.image:
        os.link(files / "real" / name, tmp_path / name)
    table[["image", "target"]].to_csv(tmp_path / "labels.csv", index=False)
    plain, bare = (debias(**options(files, name, real=real, test=None, epochs=1))
                   for name, real in (("with", f"{files}/real"), ("without", str(tmp_path))))
    assert contents(plain.folder)["model.safetensors"] == contents(bare.folder)["model.safetensors"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"weights": "no.pt"}, "weights: no such file"), ({"real": "no.csv"}, "no.csv: no such file or folder"),
    ({"model": "net.py:build"}, "no such file net.py"), ({"model": "resnet18", "weights": None}, "needs weights=FILE"),
    ({"model": "resnet1"}, "did you mean"), ({"epochs": 0}, "setting epochs = 0"),
    ({"synthetic": None}, "synthetic"), ({"k": 63}, "from 1 to 62"),
])
def test_mistakes_on_the_command_line(files, changes, message):
    given = options(files, "never", **changes)
    given["synthetic"] = given["synthetic"] or f"{files}/real"
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        debias(**given)
    assert "\n" not in str(caught.value) and not list(files.glob("never*"))


# --- the command, in a process of its own


def command(root, given):
    words = [sys.executable, "-m", "aimfair.cli", "debias"]
    for name, value in given.items():
        if name not in ("cache", "progress"):
            words += [f"--{name.replace('_', '-')}", str(value)]
    environment = {**os.environ, "AIMFAIR_CACHE": f"{root}/cache", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(words, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize("k", [None, pytest.param("auto", marks=pytest.mark.slow)])
def test_command_killed_and_started_again_ends_the_same(files, k):
    "kill -9 during fine-tuning; the same command goes on, ends with the same bytes, and then says that it is done."
    name, given = f"killed-{k}", options(files, f"killed-{k}", epochs=30)
    progress = files / f"{name}.partial" / "checkpoint" / "finetuning.pt"
    if k:
        write_images(files / "many", noise(dict.fromkeys(FOUR, 50), 3), by_group=True)
        given |= {"k": k, "synthetic": f"{files}/many", "epochs": 3}
        progress = progress.with_name("candidates")
    process = command(files, given)
    assert kill_when(process, progress.exists)
    assert not (files / name).exists()
    with pytest.raises(ValueError, match="an unfinished run with other options .seed was 0, is 1"):
        debias(**{**given, "seed": 1})
    (files / f"{name}.partial" / ".report.md.0123456789ab.tmp").touch()  # killed while it wrote this
    code, out, err = finished(command(files, given))
    assert code == 0 and "worst group (WST)" in out and "Traceback" not in err, err
    undisturbed = debias(**{**given, "out": f"{files}/undisturbed-{k}"})
    assert contents(files / name) == contents(undisturbed.folder)
    code, out, err = finished(command(files, given))
    assert code == 0 and "was done already" in out
    code, out, err = finished(command(files, {**given, "k": 40}))
    assert code == 2 and f"k was {k}, is 40" in err and len(err.strip().splitlines()) == 1
