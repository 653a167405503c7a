"""aimfair.data: every format and fault that a notebook cell does not show."""
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from faults import kill_when
from hypothesis import given, settings
from hypothesis import strategies as st
from pace import slowness
from PIL import Image

from aimfair import data
from aimfair.data import (
    Augment,
    DataError,
    DataWarning,
    Faces,
    batches,
    biased_split,
    cache_folder,
    celeba,
    celeba_attributes,
    faces_table,
    folder,
    group_counts,
    image_groups,
    is_celeba,
    load_faces,
    normalize,
    on_disk,
    utkface,
    write_split,
)
from aimfair.data.batching import crop_boxes
from aimfair.groups import names_of

NAMES = ["Male", "Smiling", "Young"]


def picture(seed=0, size=(30, 40), mode="RGB"):
    "A smooth coloured picture."
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 3, size[0]), np.linspace(0, 3, size[1]))
    waves = [127.5 + 120 * np.sin(rng.uniform(0.5, 2) * x + rng.uniform(0.5, 2) * y + rng.uniform(0, 6)) for _ in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8)).convert(mode)


def write_images(root, n, suffix=".png", size=(30, 40)):
    root.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        picture(i, size).save(root / f"{i + 1:06d}{suffix}")
    ids = [f"{i + 1:06d}{suffix}" for i in range(n)]
    return pd.DataFrame({"id": ids, "path": [str(root / i) for i in ids], "target": np.arange(n) % 2, "protected": np.arange(n) // 2 % 2})


def labels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 2, (n, 3))


def write_celeba(root, values, *, style="text", ends="\n", words=("-1", "1"), bom=False, parts="txt"):
    "CelebA's lists, in one of the ways that they travel."
    root.mkdir(parents=True, exist_ok=True)
    ids = [f"{i + 1:06d}.jpg" for i in range(len(values))]
    cells = [[words[v] for v in row] for row in values]
    if style == "csv":
        lines = [",".join(["image_id", *NAMES]), *(",".join([i, *c]) for i, c in zip(ids, cells, strict=True))]
    else:
        lines = [str(len(ids)), " ".join(NAMES) + " ", *(" ".join([i, *(w.rjust(2) for w in c)]) for i, c in zip(ids, cells, strict=True))]
    name = "list_attr_celeba.csv" if style == "csv" else "list_attr_celeba.txt"
    (root / name).write_bytes((b"\xef\xbb\xbf" if bom else b"") + (ends.join(lines) + ends).encode())
    split = [0 if i < 0.6 * len(ids) else 1 if i < 0.8 * len(ids) else 2 for i in range(len(ids))]
    rows = [f"{i},{s}" if parts == "csv" else f"{i} {s}" for i, s in zip(ids, split, strict=True)]
    head = ["image_id,partition"] if parts == "csv" else []
    (root / f"list_eval_partition.{parts}").write_bytes((ends.join(head + rows) + ends).encode())
    return ids, np.array(["train", "val", "test"])[split]


# --- annotations -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("parts", ["txt", "csv"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("words", [("-1", "1"), ("0", "1"), ("False", "True"), ("false", "true")])
@pytest.mark.parametrize("style", ["text", "csv"])
def test_celeba_reads_every_format_alike(tmp_path, style, words, ends, parts):
    values = labels(50)
    ids, split = write_celeba(tmp_path, values, style=style, words=words, ends=ends, parts=parts, bom=style == "csv")
    table = celeba(tmp_path, target="Young", protected="Smiling")
    assert table["id"].tolist() == ids
    assert table["target"].tolist() == values[:, 2].tolist() and table["protected"].tolist() == values[:, 1].tolist()
    assert table["split"].tolist() == split.tolist()
    assert table["target"].dtype == table["protected"].dtype == np.int64
    assert table["path"].iloc[0] == str(tmp_path / "img_align_celeba" / "000001.jpg")


def test_constant_columns_and_unsorted_partition(tmp_path):
    values = np.ones((10, 3), int)
    _, split = write_celeba(tmp_path, values)
    lines = (tmp_path / "list_eval_partition.txt").read_text().splitlines()
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines[::-1]))
    table = celeba(tmp_path)
    assert table["target"].eq(1).all() and table["split"].tolist() == split.tolist()


@pytest.mark.parametrize("style", ["text", "csv"])
def test_an_attribute_called_split_keeps_its_labels(tmp_path, style):
    values = labels(20, seed=3)
    _, split = write_celeba(tmp_path, values, style=style)
    file = next(tmp_path.glob("list_attr_celeba.*"))
    file.write_text(file.read_text().replace(NAMES[1], "split"))
    table = celeba(tmp_path, target="split", protected=NAMES[2])
    assert table["target"].tolist() == values[:, 1].tolist() and table["protected"].tolist() == values[:, 2].tolist()
    assert table["split"].tolist() == split.tolist()


def test_celeba_official_folders(tmp_path):
    write_celeba(tmp_path / "x", labels(4))
    for folder_name, name in (("Anno", "list_attr_celeba.txt"), ("Eval", "list_eval_partition.txt")):
        (tmp_path / folder_name).mkdir()
        (tmp_path / "x" / name).rename(tmp_path / folder_name / name)
    (tmp_path / "Img" / "img_align_celeba").mkdir(parents=True)
    assert celeba(tmp_path)["path"].iloc[0] == str(tmp_path / "Img" / "img_align_celeba" / "000001.jpg")


def edited(file, change):
    file.write_text(change(file.read_text()))


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.replace("000003.jpg", "../03.jpg"), ["../03.jpg", "list_attr_celeba.txt", "root"]),
    (lambda t: t.replace("000003.jpg", "/etc/3.jpg"), ["/etc/3.jpg"]),
    (lambda t: t.replace("000003.jpg", "a/../../3.jpg"), ["a/../../3.jpg"]),
    (lambda t: t.replace("000003.jpg", "..\\3.jpg"), ["..\\\\3.jpg"]),
    (lambda t: t.replace("000003.jpg", "C:/3.jpg"), ["C:/3.jpg"]),
    (lambda t: t.replace("000003.jpg", "000002.jpg"), ["000002.jpg", "more than once"]),
    (lambda t: t.replace("000003.jpg -1", "000003.jpg  7").replace("000003.jpg  1", "000003.jpg  7"),
     ["Male", "'7'", "000003.jpg", "-1/1"]),
    (lambda t: t.replace("000003.jpg -1", "000003.jpg  x").replace("000003.jpg  1", "000003.jpg  x"), ["'x'", "000003.jpg"]),
    (lambda t: t.replace("000003.jpg -1", "000003.jpg  0").replace("000003.jpg  1", "000003.jpg  0"), ["both -1 and 0"]),
    (lambda t: "\n".join(t.splitlines()[:4]) + "\n000003.jpg  1\n", ["000003.jpg"]),
    (lambda t: "", ["first line is empty"]),
    (lambda t: "\n".join(t.splitlines()[:2]), ["no rows"]),
    (lambda t: t.replace("Male", "Mail"), ["no attribute 'Male'; did you mean Mail?", "there are Mail, Smiling, Young"]),
])
@pytest.mark.filterwarnings("ignore::aimfair.data.DataWarning")
def test_broken_attribute_lists_are_named(tmp_path, change, words):
    write_celeba(tmp_path, labels(8))
    edited(tmp_path / "list_attr_celeba.txt", change)
    with pytest.raises(DataError) as caught:
        celeba(tmp_path)
    message = str(caught.value)
    assert "list_attr_celeba" in message and "\n" not in message
    for word in words:
        assert word in message


def test_other_celeba_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        celeba(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="list_attr_celeba.txt"):
        celeba(tmp_path)
    write_celeba(tmp_path, labels(8))
    with pytest.raises(DataError, match="both 'Male'"):
        celeba(tmp_path, target="Male", protected="Male")
    with pytest.raises(DataError, match="none of the 8 listed images"):
        celeba(tmp_path, available_only=True)
    edited(tmp_path / "list_eval_partition.txt", lambda t: t.replace("000003.jpg 0", "000003.jpg 5"))
    with pytest.raises(DataError, match="no split .*5.* train"):
        celeba(tmp_path)
    edited(tmp_path / "list_eval_partition.txt", lambda t: t.replace("000003.jpg 5\n", ""))
    with pytest.raises(DataError, match="000003.jpg"):
        celeba(tmp_path)
    (tmp_path / "list_eval_partition.txt").unlink()
    with pytest.raises(FileNotFoundError, match="list_eval_partition"):
        celeba(tmp_path)


def test_a_cut_off_list_is_noticed(tmp_path):
    write_celeba(tmp_path, labels(8))
    edited(tmp_path / "list_attr_celeba.txt", lambda t: "\n".join(t.splitlines()[:6]) + "\n")
    with pytest.warns(DataWarning, match="announces 8 images, 4 rows"):
        assert len(celeba(tmp_path)) == 4


def test_available_only(tmp_path):
    write_celeba(tmp_path, labels(8))
    write_images(tmp_path / "img_align_celeba", 5, ".jpg")
    (tmp_path / "img_align_celeba" / "000002.jpg").unlink()
    assert celeba(tmp_path, available_only=True)["id"].tolist() == [f"{i:06d}.jpg" for i in (1, 3, 4, 5)]


def test_on_disk(tmp_path):
    write_celeba(tmp_path, labels(8))
    write_images(tmp_path / "img_align_celeba", 3, ".jpg")
    table = celeba(tmp_path)
    assert on_disk(table)["id"].tolist() == ["000001.jpg", "000002.jpg", "000003.jpg"] and on_disk(table).attrs == table.attrs
    (tmp_path / "img_align_celeba").rename(tmp_path / "elsewhere")
    assert len(on_disk(table)) == 0 and list(on_disk(table)) == list(table)


def test_celeba_attributes(tmp_path):
    assert not is_celeba(tmp_path)
    values = labels(8)
    ids, _ = write_celeba(tmp_path, values)
    assert is_celeba(tmp_path)
    frame = celeba_attributes(tmp_path)
    assert list(frame) == NAMES and frame.index.tolist() == ids and np.array_equal(frame, values)
    assert list(celeba_attributes(tmp_path, ["Young", "Male"])) == ["Young", "Male"]
    with pytest.raises(DataError, match="no attribute 'Bald'"):
        celeba_attributes(tmp_path, ["Bald"])


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.tuples(*[st.integers(0, 1)] * 3), min_size=1, max_size=20), style=st.sampled_from(["text", "csv"]),
       ends=st.sampled_from(["\n", "\r\n"]), words=st.sampled_from([("-1", "1"), ("0", "1"), ("False", "True")]))
def test_annotations_survive_the_round_trip(tmp_path_factory, values, style, ends, words):
    root = tmp_path_factory.mktemp("celeba")
    write_celeba(root, values, style=style, ends=ends, words=words)
    table = celeba(root, target="Male", protected="Young")
    assert table[["target", "protected"]].to_numpy().tolist() == [[v[0], v[2]] for v in values]


# --- UTKFace ------------------------------------------------------------------------------------------------------------------

def test_utkface(tmp_path):
    root = tmp_path / "UTKFace"
    root.mkdir()
    good = ["1_0_0_20161219140623097.jpg.chip.jpg", "26_1_2_20170104023621342.jpg", "110_1_4_20170101.png", "030_0_1_5.JPG"]
    bad = ["61_1_20170109150557335.jpg.chip.jpg", "24_3_0_2017.jpg", "5_1_7_2017.jpg", "x_1_1_2017.jpg", "40_0_0_.jpg",
           "40_0_0_20170.5jpg.jpg"]
    for i, name in enumerate(good + bad):
        picture(i).save(root / name, format="jpeg")
    (root / "2_0_0_1.jpg").write_bytes((root / good[0]).read_bytes())  # a copy, later in order
    for other in ("Thumbs.db", ".26_1_2_1.jpg", "readme.txt"):
        (root / other).write_text("x")
    with pytest.warns(DataWarning) as caught:
        table = utkface(tmp_path, target="age", protected="gender", age_threshold=26)
    named, copies = (str(w.message) for w in caught)
    assert all(name in named for name in bad) and "(6)" in named
    assert "2_0_0_1.jpg" in copies and table.attrs["copies"] == ["2_0_0_1.jpg"] and sorted(table.attrs["malformed"]) == sorted(bad)
    expected = {good[3]: (1, 0), good[2]: (1, 1), good[0]: (0, 0), good[1]: (1, 1)}
    assert {i: (t, p) for i, t, p in table[["id", "target", "protected"]].itertuples(index=False)} == expected
    assert table["id"].tolist() == sorted(expected)


@pytest.mark.filterwarnings("ignore::aimfair.data.DataWarning")
def test_utkface_split_keeps_its_sides(tmp_path):
    names = [f"{20 + i % 60}_{i % 2}_{i % 5}_{i}.jpg" for i in range(300)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(str(i).encode())
    before = utkface(tmp_path).set_index("id")["split"]
    for name in names[::3]:
        (tmp_path / name).unlink()
    after = utkface(tmp_path).set_index("id")["split"]
    assert (before[after.index] == after).all() and set(before) == {"train", "val", "test"}
    assert (utkface(tmp_path, seed=1).set_index("id")["split"] != after).any()


@pytest.mark.filterwarnings("ignore::aimfair.data.DataWarning")
def test_utkface_from_names_alone_reads_no_file(tmp_path):
    for i in range(3):
        (tmp_path / f"{20 + i}_{i % 2}_{i}_{i}.jpg").write_bytes(b"the same")
    assert len(utkface(tmp_path)) == 1
    with patch.object(Path, "read_bytes", side_effect=AssertionError("a file was read")):
        table = utkface(tmp_path, find_copies=False)
    assert table["id"].tolist() == ["20_0_0_0.jpg", "21_1_1_1.jpg", "22_0_2_2.jpg"] and table.attrs["copies"] == []
    one = utkface(tmp_path)
    assert one.equals(table[:1])


def test_utkface_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        utkface(tmp_path / "nowhere")
    with pytest.raises(DataError, match="age_gender_race_date"):
        utkface(tmp_path)
    with pytest.raises(DataError, match="no attribute 'rase'.*race"):
        utkface(tmp_path, protected="rase")
    with pytest.raises(DataError, match="both 'age'"):
        utkface(tmp_path, target="age", protected="age")


# --- folder, groups, Hugging Face ---------------------------------------------------------------------------------------------

def test_folder_formats_and_classes(tmp_path):
    lines = ['file,kind,"group",part', "x/1.png,2,True,train", "x/2.png,0,False,valid", '"x/a b.png",1,True,test', ""]
    (tmp_path / "a.csv").write_bytes("\r\n".join(lines).encode())
    table = folder(tmp_path, "a.csv", image="file", target="kind", protected="group", split="part")
    assert table["target"].tolist() == [2, 0, 1] and table["protected"].tolist() == [1, 0, 1]
    assert table["split"].tolist() == ["train", "val", "test"] and table["path"].iloc[2] == str(tmp_path / "x/a b.png")
    for column, choice in (("knid", "kind"), ("grp", "group")):
        with pytest.raises(DataError, match=f"a.csv: no column '{column}'.*{choice}"):
            folder(tmp_path, "a.csv", image="file", target=column)
    with pytest.raises(DataError, match="no column 'name'"):
        folder(tmp_path, "a.csv", image="name", target="kind")
    words = folder(tmp_path, "a.csv", image="file", target="part")
    assert words["target"].tolist() == [1, 2, 0] and names_of(words).target == ("test", "train", "valid")
    with pytest.raises(FileNotFoundError, match="b.csv"):
        folder(tmp_path, "b.csv", image="file", target="kind")


def test_folder_with_missing_values(tmp_path):
    (tmp_path / "a.csv").write_text("file,kind\n1.png,1\n2.png,\n")
    with pytest.raises(DataError, match="kind has no value at 2.png"):
        folder(tmp_path, "a.csv", image="file", target="kind")
    (tmp_path / "a.csv").write_text("file,kind\n1.png,1\n,0\n")
    with pytest.raises(DataError, match="row 2 has no file"):
        folder(tmp_path, "a.csv", image="file", target="kind")


def test_image_groups(tmp_path):
    for group in ("1_0", "0_1"):
        write_images(tmp_path / group, 3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "0_1" / "note.txt").write_text("x")
    table = image_groups(tmp_path)
    assert table["id"].tolist() == [f"{g}/00000{i}.png" for g in ("0_1", "1_0") for i in (1, 2, 3)]
    assert table["target"].tolist() == [0] * 3 + [1] * 3 and table["protected"].tolist() == [1] * 3 + [0] * 3
    (tmp_path / "1_1").mkdir()
    with pytest.raises(DataError, match="1_1: the group is empty"):
        image_groups(tmp_path)
    with pytest.raises(FileNotFoundError):
        image_groups(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_manifest(tmp_path, kind):
    frame = pd.DataFrame({"file": ["b.png", "a.png"], "target": [1, 0], "protected": [0, 1], "prompt": ["x", "y"], "id": [1, 2]})
    file = tmp_path / f"manifest.{kind}"

    def write(f): return f.to_parquet(file) if kind == "parquet" else f.to_csv(file, index=False)

    write(frame)
    table = image_groups(tmp_path)
    assert table["id"].tolist() == ["b.png", "a.png"] and table["prompt"].tolist() == ["x", "y"]
    write(frame.drop(columns="protected"))
    with pytest.raises(DataError, match="no column 'protected'"):
        image_groups(tmp_path)
    write(frame.assign(file=["../b.png", "a.png"]))
    with pytest.raises(DataError, match="leaves the root"):
        image_groups(tmp_path)


def test_faces_table_takes_what_there_is(tmp_path):
    for name in ("0", "1", "10", "2"):
        write_images(tmp_path / "targets" / name, 2)
    (tmp_path / "targets" / "0_1").touch()  # a file, no group
    assert faces_table(tmp_path / "targets", groups=True)["target"].tolist() == [0, 0, 1, 1, 2, 2, 10, 10]
    for name in ("0_1", "1_0"):
        write_images(tmp_path / "groups" / name, 2, ".webp")
    table = faces_table(tmp_path / "groups", groups=True)
    assert table["protected"].tolist() == [1, 1, 0, 0] and on_disk(table).equals(table)
    assert "protected" not in faces_table(tmp_path / "groups", groups=False)
    pd.DataFrame({"file": ["0_1/000001.webp"], "target": [1], "protected": [0]}).to_csv(tmp_path / "groups" / "manifest.csv", index=False)
    for source in (tmp_path / "groups", tmp_path / "groups" / "manifest.csv"):
        assert faces_table(source, groups=True)["id"].tolist() == ["0_1/000001.webp"]
    pd.DataFrame({"image_id": ["0/000002.png"], "target": [1]}).to_csv(tmp_path / "targets" / "labels.csv", index=False)
    for source in (tmp_path / "targets", str(tmp_path / "targets" / "labels.csv")):
        assert faces_table(source, groups=True)["path"].tolist() == [str(tmp_path / "targets" / "0" / "000002.png")]


def test_faces_table_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        faces_table(tmp_path / "nowhere", groups=True)
    (tmp_path / "0").mkdir()
    with pytest.raises(DataError, match="0: the class is empty"):
        faces_table(tmp_path, groups=True)
    (tmp_path / "a.csv").write_text("image,target\n")
    with pytest.raises(DataError, match="no rows"):
        faces_table(tmp_path / "a.csv", groups=True)
    (tmp_path / "a.csv").write_text("picture,target\n1.jpg,0\n")
    with pytest.raises(DataError, match="no column 'image'.*picture"):
        faces_table(tmp_path / "a.csv", groups=True)


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("AIMFAIR_CACHE", raising=False)
    assert cache_folder() == tmp_path / "aimfair"
    monkeypatch.setenv("AIMFAIR_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" and cache_folder(tmp_path) == tmp_path


def test_hugging_face(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra hub is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("AIMFAIR_CACHE", str(tmp_path / "cache"))
    table = write_images(tmp_path / "images", 6)
    features = datasets.Features({"photo": datasets.Image(), "smile": datasets.ClassLabel(names=["no", "yes"]),
                                  "male": datasets.Value("bool")})
    embedded = datasets.Dataset.from_dict({"photo": [{"bytes": Path(p).read_bytes()} for p in table["path"]], "smile": table["target"],
                                           "male": table["protected"].astype(bool)}, features=features)
    expected = load_faces(table, size=16).gather(slice(None)).numpy()
    embedded.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=embedded, validation=embedded.select([1, 0])).save_to_disk(tmp_path / "parts")
    read = dict(image="photo", target="smile", protected="male")
    for source in (embedded, tmp_path / "plain"):
        found = data.huggingface(source, **read)
        assert found["target"].tolist() == table["target"].tolist() and found["protected"].tolist() == table["protected"].tolist()
        assert "split" not in found and np.array_equal(load_faces(found, size=16).gather(slice(None)).numpy(), expected)
    parts = data.huggingface(str(tmp_path / "parts"), **read)
    assert parts["split"].tolist() == ["train"] * 6 + ["val"] * 2 and parts["id"].is_unique
    holes = datasets.Dataset.from_dict({"photo": [None], "smile": [1]}).cast_column("photo", datasets.Image())
    with pytest.raises(DataError, match="row 0 has no photo"):
        data.huggingface(holes, image="photo", target="smile")
    with pytest.raises(DataError, match="no column 'smiling'.*smile"):
        data.huggingface(embedded, image="photo", target="smiling")
    with pytest.raises(DataError, match="cannot be loaded as a Hugging Face data set"):
        (tmp_path / "void").mkdir()
        data.huggingface(tmp_path / "void", **read)


def test_hugging_face_image_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra hub is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    for group in ("cross", "smile"):
        write_images(tmp_path / "images" / group, 2)
    table = data.huggingface(tmp_path / "images", cache=tmp_path / "cache", cache_dir=str(tmp_path / "hf"))
    assert table["target"].tolist() == [0, 0, 1, 1] and table["split"].eq("train").all()
    assert len(load_faces(table, size=16, cache=tmp_path / "cache")) == 4


def test_only_names_that_leave_the_root_are_errors(tmp_path):
    names = ["~a.jpg", "..b.jpg", "c..jpg", "d/e..f/..g.jpg"]
    pd.DataFrame({"image": names, "label": [0, 1, 0, 1]}).to_csv(tmp_path / "a.csv", index=False)
    assert folder(tmp_path, "a.csv", image="image", target="label")["id"].tolist() == names


# --- splits -------------------------------------------------------------------------------------------------------------------

def test_write_split_round_trip(tmp_path):
    write_celeba(tmp_path, labels(300))
    rows = biased_split(celeba(tmp_path, target="Young", protected="Male"), n=40)
    file = write_split(rows, tmp_path / "new" / "split.csv")
    assert file.read_bytes().startswith(b"image_id,Young,Male\n000") and b"\r" not in file.read_bytes()
    again = folder(tmp_path / "img_align_celeba", file, image="image_id", target="Young", protected="Male")
    assert again[["id", "path", "target", "protected"]].equals(rows[["id", "path", "target", "protected"]])
    assert write_split(rows, file, "T", "P").read_text().splitlines()[0] == "image_id,T,P"
    assert os.listdir(tmp_path / "new") == ["split.csv"]


# --- decoding -----------------------------------------------------------------------------------------------------------------

def pixels(path, size=32):
    "One decoded image, from a cache of its own."
    table = pd.DataFrame({"id": ["a"], "path": [str(path)], "target": [0]})
    with tempfile.TemporaryDirectory() as cache:
        return load_faces(table, size=size, cache=cache).gather(0).numpy()[0]


def test_decoding_is_the_published_resize(tmp_path):
    picture(3, (178, 218)).save(tmp_path / "a.jpg", quality=95)
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB").resize((64, 64), Image.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(pixels(tmp_path / "a.jpg", 64), expected)
    picture(3, (1600, 1200)).save(tmp_path / "b.jpg", quality=95)  # read at reduced size
    expected = np.asarray(Image.open(tmp_path / "b.jpg").convert("RGB").resize((64, 64), Image.BILINEAR)).transpose(2, 0, 1)
    assert np.abs(pixels(tmp_path / "b.jpg", 64).astype(int) - expected).mean() < 1


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1", "YCbCr", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = picture(1)
    if mode in ("I;16", "I"):
        image = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16 if mode == "I;16" else np.int32)) * 257)
    else:
        image = image.convert(mode)
    image.save(tmp_path / "a.tif")
    shown = "L" if mode in ("L", "LA", "I;16", "I", "F", "1") else "RGB"
    reference = np.asarray(picture(1).convert(shown).convert("RGB").resize((32, 32), 2))
    got = pixels(tmp_path / "a.tif")
    assert got.shape == (3, 32, 32) and got.dtype == np.uint8
    tolerance = {"1": 40, "P": 25, "CMYK": 2, "YCbCr": 3}.get(mode, 1)
    assert np.abs(got.transpose(1, 2, 0).astype(int) - reference).mean() < tolerance


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_modes(tmp_path, mode):
    picture(1).convert(mode).save(tmp_path / "a.jpg", quality=98)
    reference = np.asarray(picture(1).convert(mode).convert("RGB").resize((32, 32), 2)).transpose(2, 0, 1)
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - reference).mean() < 3


def test_transparency_lies_over_white(tmp_path):
    image = picture(1).convert("RGBA")
    image.putalpha(0)
    image.save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png") == 255).all()
    Image.new("P", (20, 20), 0).save(tmp_path / "b.png", transparency=0)
    assert (pixels(tmp_path / "b.png") == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    upright = picture(2, (40, 60))
    stored = {1: upright, 2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 3: upright.transpose(Image.Transpose.ROTATE_180),
              4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM), 5: upright.transpose(Image.Transpose.TRANSPOSE),
              6: upright.transpose(Image.Transpose.ROTATE_90), 7: upright.transpose(Image.Transpose.TRANSVERSE),
              8: upright.transpose(Image.Transpose.ROTATE_270)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    upright.save(tmp_path / "b.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def spoil(path, how):
    content = Path(path).read_bytes()
    Path(path).write_bytes({"empty": b"", "truncated": content[:len(content) // 2], "text": b"<html>not found</html>"}[how])


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("how", ["empty", "truncated", "text"])
def test_bad_images_are_left_out(tmp_path, how, suffix):
    table = write_images(tmp_path / "images", 100, suffix)
    spoil(table["path"][41], how)
    with pytest.warns(DataWarning, match="1 of 100.*000042") as caught:
        faces = load_faces(table, size=16, cache=tmp_path / "cache")
    assert len(caught) == 1 and list(faces.dropped) == [table["path"][41]]
    assert faces.ids.tolist() == [i for i in table["id"] if not i.startswith("000042")] and len(faces.target) == 99
    assert np.array_equal(faces.gather(41).numpy()[0], pixels(table["path"][42], 16))
    spoil(table["path"][7], how)
    with pytest.raises(DataError, match="2 of 100 .* more than 1 %.*000008"):
        load_faces(table, size=16, cache=tmp_path / "cache")


def test_missing_images(tmp_path):
    table = write_images(tmp_path / "images", 4)
    Path(table["path"][2]).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 .*000003.*available_only"):
        load_faces(table, cache=tmp_path / "cache")


def test_a_second_epoch_reads_no_file(tmp_path):
    table = write_images(tmp_path / "images", 40)
    faces = load_faces(table, size=16, cache=tmp_path / "cache")
    with patch("PIL.Image.open", side_effect=AssertionError("a file was read")):
        again = load_faces(table[::-1], size=16, cache=tmp_path / "cache")
    for path in table["path"]:
        Path(path).unlink()
    epochs = [[x.clone() for x, *_ in batches(faces, 16)] for _ in range(2)]
    assert torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1])) and len(torch.cat(epochs[0])) == 40
    assert torch.equal(again.gather(slice(None, None, -1)), faces.gather(slice(None)))


def count_opened(table, **options):
    real, opened = Image.open, []
    with patch("PIL.Image.open", side_effect=lambda path, *a, **k: (opened.append(str(path)), real(path, *a, **k))[1]):
        return load_faces(table, **options), opened


def test_only_new_and_changed_files_are_decoded(tmp_path):
    table = write_images(tmp_path / "images", 30)
    options = dict(size=16, cache=tmp_path / "cache")
    assert len(count_opened(table[:10], **options)[1]) == 10
    assert len(count_opened(table[5:20], **options)[1]) == 10
    assert count_opened(pd.concat([table[:20], table[:20]]), **options)[1] == []
    picture(99).save(table["path"][3])
    faces, opened = count_opened(table, **options)
    assert sorted(opened) == sorted([table["path"][3], *table["path"][20:]])
    assert all(np.array_equal(faces.gather(i).numpy()[0], pixels(p, 16)) for i, p in enumerate(table["path"]))
    assert len(count_opened(table[:5], size=20, cache=tmp_path / "cache")[1]) == 5


def test_a_damaged_cache_is_decoded_again(tmp_path):
    table = write_images(tmp_path / "images", 8)
    expected = load_faces(table, size=16, cache=tmp_path / "cache").gather(slice(None))
    for shard in (tmp_path / "cache").glob("*/shard-*/images.npy"):
        os.truncate(shard, 500)
    faces, opened = count_opened(table, size=16, cache=tmp_path / "cache")
    assert len(opened) == 8 and torch.equal(faces.gather(slice(None)), expected)


def test_duplicate_rows_and_relative_paths(tmp_path, monkeypatch):
    table = write_images(tmp_path / "images", 4)
    monkeypatch.chdir(tmp_path)
    relative = table.assign(path=[f"images/{i}" for i in table["id"]])
    options = dict(size=16, cache="cache")
    assert len(count_opened(pd.concat([relative, relative]), **options)[1]) == 4
    assert count_opened(table, **options)[1] == []


LOADER = """
import sys, time, pandas as pd
from PIL import Image
from aimfair.data import images
images.SHARD_BYTES = 3 * 16 * 16 * 10
images.cores = lambda: 2
real = Image.open
Image.open = lambda path: (time.sleep(float(sys.argv[3])), real(path))[1]
print("start", flush=True)
images.load_faces(pd.read_csv(sys.argv[1]), size=16, cache=sys.argv[2])
"""


def start_loader(tmp_path, pause):
    code = [sys.executable, "-c", LOADER, str(tmp_path / "table.csv"), str(tmp_path / "cache"), str(pause)]
    return subprocess.Popen(code, stdout=subprocess.PIPE, text=True)


def stored_keys(tmp_path):
    return [k for file in (tmp_path / "cache").glob("*/shard-*/keys.json") for k in json.loads(file.read_text())]


def test_killed_at_any_moment_the_cache_is_whole(tmp_path):
    table = write_images(tmp_path / "images", 200)
    table.to_csv(tmp_path / "table.csv", index=False)
    for target in (0, 30, 71):
        process = start_loader(tmp_path, 0.01)
        process.stdout.readline()
        assert kill_when(process, lambda target=target: len(stored_keys(tmp_path)) >= target)
    for name in (".shard-left.0123456789ab.tmp", ".shard-left.ba9876543210.tmp"):
        (tmp_path / "cache" / "faces-v1-16px" / name).mkdir(parents=True, exist_ok=True)
    done = len(stored_keys(tmp_path))
    faces, opened = count_opened(table, size=16, cache=tmp_path / "cache")
    assert 0 < done < 200 and len(opened) == 200 - done
    assert all(np.array_equal(faces.gather(i).numpy()[0], pixels(p, 16)) for i, p in enumerate(table["path"]))
    assert len(set(stored_keys(tmp_path))) == len(stored_keys(tmp_path)) == 200
    assert {f.name.split("-")[0] for f in (tmp_path / "cache" / "faces-v1-16px").iterdir()} == {"lock", "shard"}


def test_two_processes_share_the_work(tmp_path):
    table = write_images(tmp_path / "images", 60)
    table.to_csv(tmp_path / "table.csv", index=False)
    both = [start_loader(tmp_path, 0.002) for _ in range(2)]
    assert [p.wait(timeout=60) for p in both] == [0, 0]
    assert len(stored_keys(tmp_path)) == len(set(stored_keys(tmp_path))) == 60


# --- Faces --------------------------------------------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(st.data())
def test_faces_behave_like_arrays(draw):
    rng = np.random.default_rng(0)
    parts, arrays = [], []
    for _ in range(draw.draw(st.integers(1, 3))):
        n = draw.draw(st.integers(1, 6))
        images, target, protected = rng.integers(0, 256, (n, 3, 4, 4), np.uint8), rng.integers(0, 2, n), rng.integers(0, 2, n)
        known = draw.draw(st.booleans())
        pick = draw.draw(st.lists(st.integers(-n, n - 1), max_size=8))
        faces = Faces.from_arrays(images, target, protected if known else None).select(np.array(pick, int))
        parts.append(faces)
        arrays.append((images[pick], target[pick], protected[pick] if known else np.full(len(pick), -1), known))
    both = Faces.concat(parts + parts[:1])
    arrays = arrays + arrays[:1]
    images, target, protected = (np.concatenate([a[i] for a in arrays]) for i in range(3))
    assert np.array_equal(both.gather(slice(None)).numpy(), images) and np.array_equal(both.target, target)
    if any(a[3] for a in arrays):
        assert np.array_equal(both.protected, protected)
    else:
        assert both.protected is None
    mask = rng.random(len(both)) < 0.5
    assert np.array_equal(both.select(mask).gather(slice(None)).numpy(), images[mask])
    assert both.select(mask).ids.tolist() == both.ids[mask].tolist()
    assert len(both._sources) == len(parts)


def test_faces_copy_no_pixels_and_reject_nonsense(tmp_path):
    images = np.zeros((4, 3, 8, 8), np.uint8)
    faces = Faces.from_arrays(images, [0, 1, 0, 1], [0, 0, 1, 1], ids=list("abcd"))
    assert Faces.concat([faces, faces.select([1])])._sources[0] is images
    assert faces.without_groups().protected is None and faces.protected is not None
    assert torch.equal(faces.gather(torch.tensor([1, 2])), faces.gather([1, 2]))
    assert faces.gather(2).shape == (1, 3, 8, 8) and faces.size == (8, 8)
    assert faces.gather([0]).numpy().flags.writeable
    for bad in (images.astype(np.float32), images[0], images.transpose(0, 2, 3, 1)):
        with pytest.raises(DataError, match="expected uint8"):
            Faces.from_arrays(bad, [0] * 4)
    with pytest.raises(DataError, match="target has 3 values for 4"):
        Faces.from_arrays(images, [0] * 3)
    with pytest.raises(DataError, match="sizes differ"):
        Faces.concat([faces, Faces.from_arrays(images[:, :, :4], [0] * 4)])
    with pytest.raises(DataError):
        Faces.concat([])
    assert group_counts(faces).to_numpy().tolist() == [[1, 1], [1, 1]]
    empty = load_faces(pd.DataFrame({"id": [], "path": [], "target": []}), cache=tmp_path)
    assert len(empty) == 0 and list(batches(empty)) == []


# --- augmentation -------------------------------------------------------------------------------------------------------------

def generator(seed=0): return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("given, wrong", [
    (["cat", "dog"], "'cat'"), ([0, 0.5], "0.5"), ([1, np.nan], "nan"), ([np.inf, 0], "inf"), ([None, 1], "None"),
    (np.array(["1", "x"]), "'x'"), (pd.Series([1, pd.NA], dtype="Int64"), "nan"),
])
def test_labels_are_whole_numbers(given, wrong):
    images = np.zeros((2, 3, 8, 8), np.uint8)
    for name, how in (("target", {"target": given}), ("protected", {"target": [0, 1], "protected": given})):
        with pytest.raises(DataError, match=re.escape(f"{name} holds {wrong}; expected whole numbers")):
            Faces.from_arrays(images, **how)


@pytest.mark.parametrize("given", [[1, 0], (True, False), np.array([1.0, 0.0]), np.array([1, 0], np.uint8), ["1", "0"],
                                   pd.Series([1, 0], index=[5, 6]), pd.Series([1, 0], dtype="Int64"), torch.tensor([1, 0])])
def test_whole_numbers_come_in_many_kinds(given):
    faces = Faces.from_arrays(np.zeros((2, 3, 8, 8), np.uint8), given, given)
    assert faces.target.dtype == np.int64 and faces.target.tolist() == faces.protected.tolist() == [1, 0]


@settings(max_examples=40, deadline=None)
@given(height=st.integers(2, 80), width=st.integers(2, 80), seed=st.integers(0, 1000), low=st.floats(0.01, 1), thin=st.floats(0.2, 3))
def test_crops_lie_inside(height, width, seed, low, thin):
    top, left, h, w = crop_boxes(16, height, width, (low, 1.0), (thin, thin * 1.5), generator(seed))
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()


@pytest.mark.parametrize(("scale", "ratio", "size"), [((0.08, 1.0), (3 / 4, 4 / 3), (64, 64)), ((0.5, 1.0), (0.5, 2.0), (40, 60)),
                                                      ((0.9, 1.0), (1.5, 2.0), (64, 64)), ((0.9, 1.0), (0.3, 0.5), (64, 64))])
def test_crops_have_torchvisions_distribution(scale, ratio, size):
    from scipy.stats import ks_2samp
    from torchvision.transforms import RandomResizedCrop
    n, image = 3000, torch.zeros(3, *size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)], float)
    ours = np.stack([v.numpy() for v in crop_boxes(n, *size, scale, ratio, generator())], 1).astype(float)
    for describe in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert ks_2samp(describe(ours), describe(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("size", [(64, 64), (33, 50)])
def test_crops_have_torchvisions_pixels(size):
    from torchvision.transforms.v2.functional import resized_crop
    batch = torch.randint(0, 256, (40, 3, *size), dtype=torch.uint8, generator=generator(1))
    got = Augment(flip=0)(batch, generator(5))
    boxes = crop_boxes(40, *size, (0.08, 1.0), (3 / 4, 4 / 3), generator(5))
    for i, (top, left, h, w) in enumerate(torch.stack(boxes, 1).tolist()):
        expected = resized_crop(normalize(batch[i:i + 1]), top, left, h, w, list(size), antialias=False)
        assert torch.allclose(got[i:i + 1], expected, atol=2e-4)
    mirrored = Augment(flip=1)(batch, generator(5))
    assert torch.allclose(mirrored, got.flip(3), atol=1e-6)


@pytest.mark.parametrize("size", [64, 224, 50])
def test_the_identity_crop_is_exact(size):
    batch = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=generator())
    still = Augment(scale=(1, 1), ratio=(1, 1), flip=0)(batch, generator())
    assert torch.equal(((still + 1) * 127.5).round().to(torch.uint8), batch)
    if size == 64:
        assert torch.equal(still, normalize(batch))


def test_flips_and_normalisation():
    batch = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2000, 3, 16, 16)
    flipped = (Augment(scale=(1, 1), ratio=(1, 1))(batch, generator()) != normalize(batch)).flatten(1).any(1)
    assert abs(flipped.float().mean() - 0.5) < 0.05
    x = normalize(batch[:2])
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1 and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(x, (batch[:2].float() / 255 - 0.5) / 0.5, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"scale": (0, 1)}, {"scale": (0.5, 0.2)}, {"scale": (0.5, 1.5)}, {"ratio": (0, 1)}, {"flip": 1.5}])
def test_augment_rejects(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augment(**wrong)


def test_batches():
    faces = Faces.from_arrays(np.random.default_rng(0).integers(0, 256, (37, 3, 16, 16), np.uint8), np.arange(37) % 2, np.arange(37) % 3)

    def epoch(seed): return list(batches(faces, 8, shuffle=True, augment=Augment(), generator=generator(seed)))

    for (x, y, p, rows), again in zip(epoch(0), epoch(0), strict=True):
        assert all(torch.equal(a, b) for a, b in zip((x, y, p, rows), again, strict=True))
        assert torch.equal(y, torch.from_numpy(faces.target)[rows]) and torch.equal(p, torch.from_numpy(faces.protected)[rows])
        assert x.is_contiguous(memory_format=torch.channels_last) and x.dtype == torch.float32
        assert y.dtype == p.dtype == rows.dtype == torch.int64 and rows.device.type == "cpu"
    assert any(not torch.equal(a[1], b[1]) for a, b in zip(epoch(0), epoch(1), strict=True))
    one = generator(0)
    first, second = ([y.tolist() for _, y, *_ in batches(faces, 8, shuffle=True, generator=one)] for _ in range(2))
    assert first != second and sorted(sum(first, [])) == sorted(sum(second, []))
    plain = list(batches(faces, 8))
    assert [len(y) for _, y, *_ in plain] == [8, 8, 8, 8, 5]
    assert torch.equal(torch.cat([b.images for b in plain]), normalize(faces.gather(slice(None))))
    assert [b.rows.tolist() for b in plain] == [list(range(i, min(i + 8, 37))) for i in range(0, 37, 8)]
    assert [len(y) for _, y, *_ in batches(faces, 8, drop_last=True)] == [8] * 4
    shuffled = batches(faces, 8, shuffle=True, generator=generator())
    assert sorted(torch.cat([b.rows for b in shuffled]).tolist()) == list(range(37))
    assert next(batches(faces.without_groups(), 8)).protected.tolist() == [-1] * 8
    assert [x.shape[0] for x, *_ in batches(faces.select([3]), 8, augment=Augment(), generator=generator())] == [1]
    for wrong in ({"shuffle": True}, {"augment": Augment()}, {"batch_size": 0}):
        with pytest.raises(ValueError):
            batches(faces, **wrong)


def test_augmentation_does_not_depend_on_threads():
    batch = torch.randint(0, 256, (50, 3, 64, 64), dtype=torch.uint8, generator=generator())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = Augment()(batch, generator())
        torch.set_num_threads(2)
        assert torch.equal(Augment()(batch, generator()), one)
    finally:
        torch.set_num_threads(threads)


def test_augmentation_is_fast():
    batch = torch.zeros(128, 3, 64, 64, dtype=torch.uint8)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        Augment()(batch, generator())
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05 * slowness()  # about 4 ms on a free core


# ---------------------------------------------------------------- tables as spreadsheet programs write them

@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding, end", [("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("utf-16", "\r\n"), ("cp1252", "\n")])
def test_tables_of_any_spreadsheet_program(tmp_path, separator, encoding, end):
    rows = [("image", "target", "Größe"), *((f"{i:03d}ä.png", str(i % 2), "1,5" if separator == ";" else "2") for i in range(6))]
    (tmp_path / "labels.csv").write_bytes(end.join([separator.join(row) for row in rows] + [""]).encode(encoding))
    table = faces_table(tmp_path / "labels.csv", groups=False)
    assert table.id.tolist() == [row[0] for row in rows[1:]] and table.target.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("ending", ["png", "JPG", "JPEG", "bmp", "tif", "jfif", "gif", "webp"])
def test_pictures_of_every_usual_format(tmp_path, ending):
    for group in ("0_0", "0_1", "1_0", "1_1"):
        (tmp_path / group).mkdir()
        for i in range(2):
            kind = {"jpg": "JPEG", "jpeg": "JPEG", "jfif": "JPEG", "tif": "TIFF"}.get(ending.lower(), ending.upper())
            Image.new("RGB", (8, 8), (40 * i, 90, 200)).save(tmp_path / group / f"{i}.{ending}", format=kind)
    faces = load_faces(image_groups(tmp_path), size=8)
    assert len(faces) == 8 and abs(faces.gather(1)[0, 2].float().mean() - 200) < 8


def test_what_is_no_picture_is_named(tmp_path):
    for group in ("0_0", "0_1", "1_0", "1_1"):
        (tmp_path / group / "more").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / group / "a.png")
        (tmp_path / group / "a.txt").write_text("a caption")
    (tmp_path / "1_1" / "raw.heic").write_bytes(b"x")
    with pytest.warns(DataWarning, match=r"1_1: left out, as their names .* \(1\): raw.heic") as told:
        assert len(image_groups(tmp_path)) == 4
    assert len(told) == 1


@pytest.mark.parametrize("total, bad, fails", [(50, 1, False), (50, 2, True), (9, 1, True), (1, 1, True), (300, 3, False), (300, 4, True)])
def test_one_bad_file_does_not_spoil_a_small_set(tmp_path, total, bad, fails):
    for i in range(total):
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(tmp_path / f"{i}.png")
    for i in range(bad):
        (tmp_path / f"{i}.png").write_bytes(b"")
    names = [f"{i}.png" for i in range(total)]
    table = pd.DataFrame({"id": names, "path": [str(tmp_path / name) for name in names], "target": 0})
    if fails:
        with pytest.raises(DataError, match=f"{bad} of {total} images cannot be decoded"):
            load_faces(table, size=8, cache=tmp_path / "cache")
    else:
        with pytest.warns(DataWarning, match=f"{bad} of {total}"):
            assert len(load_faces(table, size=8, cache=tmp_path / "cache")) == total - bad


@pytest.mark.parametrize("kind, scale, ending", [
    (np.uint16, 257, "png"), (np.uint16, 257, "tif"), (np.int32, 1, "tif"), (np.int32, 257, "tif"), (np.float32, 1, "tif"),
    (np.float32, 1 / 255, "tif"), (np.float32, 257, "tif")])
def test_deep_pixels_keep_their_picture(tmp_path, kind, scale, ending):
    ramp = np.tile(np.arange(0, 256, 8), (32, 1))
    Image.fromarray((ramp * scale).astype(kind)).save(tmp_path / f"deep.{ending}")
    faces = load_faces(pd.DataFrame({"id": ["deep"], "path": [str(tmp_path / f"deep.{ending}")], "target": [0]}), size=32)
    assert np.abs(faces.gather(0)[0].numpy().astype(int) - ramp).max() <= 8  # the last of the ramp is 248: the white of floats lies above
