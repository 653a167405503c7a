"""aimfair.data on real annotation files and images; needs AIMFAIR_DATA."""
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from pace import slowness

from aimfair.data import Augment, DataError, DataWarning, batches, biased_split, celeba, folder, load_faces, utkface, write_split
from aimfair.groups import hold_out

ROOT = Path(os.environ.get("AIMFAIR_DATA", "/nonexistent"))
pytestmark = pytest.mark.real_data


def needs(name):
    if not (ROOT / name).is_dir():
        pytest.skip(f"AIMFAIR_DATA has no {name}")
    return ROOT / name


@pytest.fixture(scope="module")
def annotations():
    "The attribute list, read in another way than aimfair does."
    with open(needs("celeba-10k") / "list_attr_celeba.txt") as f:
        lines = f.read().split("\n")
    names, rows = lines[1].split(), [line.split() for line in lines[2:] if line]
    values = np.array([row[1:] for row in rows], dtype="S2") == b"1"
    return pd.DataFrame(values.astype(int), columns=names, index=[row[0] for row in rows])


@pytest.mark.parametrize(("target", "protected"), [("Smiling", "Male"), ("Smiling", "Young"), ("Young", "Male")])
def test_the_papers_split(annotations, target, protected):
    rows = biased_split(celeba(needs("celeba-10k"), target=target, protected=protected), n=20_000)
    train = annotations[:162_770]
    expected = [train.index[(train[target] == t) & (train[protected] == p)][:count]
                for t, p, count in ((0, 1, 9000), (1, 0, 9000), (0, 0, 1000), (1, 1, 1000))]
    expected = sorted(np.concatenate(expected))
    assert rows["id"].tolist() == expected
    assert np.array_equal(rows["target"], annotations.loc[expected, target])
    assert np.array_equal(rows["protected"], annotations.loc[expected, protected])


def test_official_partition(annotations):
    table = celeba(needs("celeba-10k"))
    assert table["id"].tolist() == annotations.index.tolist()
    assert table["split"].tolist() == ["train"] * 162_770 + ["val"] * 19_867 + ["test"] * 19_962


def test_every_attribute(annotations):
    root = needs("celeba-10k")
    for name in ("5_o_Clock_Shadow", "Young", "Wearing_Necktie"):
        assert np.array_equal(celeba(root, target=name, protected=None)["target"], annotations[name])
    with pytest.raises(DataError, match="no attribute 'Smilling'.*did you mean Smiling.*Young"):
        celeba(root, target="Smilling")


def test_a_split_takes_seconds(tmp_path):
    code = ("import time; from aimfair.data import *; "
            f"write_split(biased_split(celeba({str(needs('celeba-10k'))!r}), n=20_000), {str(tmp_path / 'split.csv')!r}); "
            "print(time.process_time())")
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(result.stdout) < 8 * slowness()  # about 4 s, most of it for importing
    lines = (tmp_path / "split.csv").read_text().splitlines()
    assert lines[0] == "image_id,Smiling,Male" and len(lines) == 20_001 and lines[1:] == sorted(lines[1:])


def test_training_from_ten_thousand_images(tmp_path):
    root = needs("celeba-10k")
    table = celeba(root, available_only=True)
    assert len(table) == 10_000 and table["split"].eq("train").all()
    with pytest.raises(DataError, match="largest n that fits"):
        biased_split(table, n=20_000)
    rest, held = hold_out(table, share=0.3)
    training = biased_split(rest, n=3000)
    assert not set(held["id"]) & set(training["id"])
    assert abs(held["target"].mean() - table["target"].mean()) < 0.001
    file = write_split(training, tmp_path / "split.csv")
    again = folder(root / "img_align_celeba", file, image="image_id", target="Smiling", protected="Male")
    assert again["path"].tolist() == training["path"].tolist()


def test_real_images_decode_once(tmp_path):
    table = celeba(needs("celeba-6k"), available_only=True)[:600]
    faces = load_faces(table, size=64, cache=tmp_path)
    assert len(faces) == 600 and not faces.dropped
    with patch("PIL.Image.open", side_effect=AssertionError("a file was read")):
        load_faces(table, size=64, cache=tmp_path)
        one = torch.Generator().manual_seed(0)
        for _ in range(2):
            for x, *_ in batches(faces, shuffle=True, augment=Augment(), generator=one):
                assert x.std() > 0.2


def test_utkface(tmp_path):
    root = needs("utkface-dev")
    with pytest.warns(DataWarning, match="61_1_20170109150557335") as caught:
        table = utkface(root)
    names = sorted(os.listdir(root / "UTKFace"))
    assert len(caught) == 1 and len(table) == len(names) - 1 and table.attrs["copies"] == []
    fields = {n: re.match(r"(\d+)_(\d)_(\d)_", n).groups() for n in table["id"]}
    assert table["target"].tolist() == [int(fields[n][1]) for n in table["id"]]
    assert table["protected"].tolist() == [int(fields[n][2] == "0") for n in table["id"]]
    shares = {k: v / len(table) for k, v in Counter(table["split"]).items()}
    assert abs(shares["train"] - 0.7) < 0.02 and abs(shares["val"] - 0.1) < 0.02 and abs(shares["test"] - 0.2) < 0.02
    with pytest.warns(DataWarning):
        old = utkface(root, target="age", protected="gender", age_threshold=40)
    assert old["target"].tolist() == [int(int(fields[n][0]) >= 40) for n in old["id"]]
    assert len(load_faces(table[:300], size=64, cache=tmp_path)) == 300
    assert len(biased_split(table, n=1000)) == 1000
