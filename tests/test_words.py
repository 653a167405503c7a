"Words for classes and groups, from somebody's files to the result: the same as with numbers, and said in their words."

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from aimfair.core import DataError
from aimfair.data import Faces, faces_table, fairface, folder, load_faces
from aimfair.debias import debias
from aimfair.device import seeded
from aimfair.groups import Names, biased_split, in_order, names_of, recoded, shared_names
from aimfair.metrics import fairness_report
from aimfair.models import narrow_resnet18
from aimfair.pipeline import AIMFair, compare_predictions
from aimfair.training import TrainConfig, predict

GENDERS, RACES = ("Female", "Male"), ("Black", "East Asian", "White")
GROUPS = [(t, p) for t in range(2) for p in range(3)]
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in ("The model handed in gets", "The model gets", "no sample with")]
RUN = {"epochs": 1, "batch_size": 8, "size": 24, "device": "cpu", "progress": False}


def noise(counts, seed):
    rng = np.random.default_rng(seed)
    t, p = np.repeat(np.array(list(counts)), list(counts.values()), axis=0).T
    return Faces.from_arrays((rng.integers(0, 90, (len(t), 3, 24, 24)) + (60 * t + 40 * p)[:, None, None, None]).astype(np.uint8), t, p)


def write(faces, name_of, root):
    "PNG files, each where `name_of` its labels and number says; their table."
    rows = []
    for i in range(len(faces)):
        name = name_of(int(faces.target[i]), int(faces.protected[i]), i)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(faces.gather(i)[0].numpy().transpose(1, 2, 0)).save(root / name)
        rows.append({"file": name, "gender": GENDERS[faces.target[i]], "race": RACES[faces.protected[i]], "age": 10 + 15 * (i % 5)})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    "One person's files in words, and the same in numbers."
    root = tmp_path_factory.mktemp("user")
    sizes = {"real": 6, "val": 5, "test": 7, "synthetic": 14}
    sets = {name: noise(dict.fromkeys(GROUPS, n), seed) for seed, (name, n) in enumerate(sizes.items())}
    for name, faces in sets.items():
        write(faces, lambda t, p, i: f"{t}_{p}/{i:04d}.png", root / "numbers" / name)
    for name in ("real", "val"):
        write(sets[name], lambda t, p, i: f"{GENDERS[t]}/some where/{i:04d}.png", root / name)
    write(sets["synthetic"], lambda t, p, i: f"{GENDERS[t].lower()}/{RACES[p].replace(' ', '_')}/{i:04d}.png", root / "synthetic")
    table = write(sets["test"], lambda t, p, i: f"{i:04d}.png", root / "test")
    table.to_csv(root / "test" / "people.csv", index=False, sep=";", encoding="utf-16")
    with seeded(0):
        torch.save(narrow_resnet18(8).state_dict(), root / "weights.pth")
    (root / "net.py").write_text("from aimfair.models import narrow_resnet18\n\ndef build():\n    return narrow_resnet18(8)\n")
    return root


def run(user, out, real="real", val="val", synthetic="synthetic", test="test/people.csv", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sources = {n: user / p for n, p in {"real": real, "val": val, "synthetic": synthetic, "test": test}.items()}
        return debias(model=f"{user}/net.py:build", weights=user / "weights.pth", out=out, cache=user / "cache", **sources, **RUN | options)


def test_words_give_the_same_result_as_numbers_and_are_in_every_file(user, tmp_path):
    words = run(user, tmp_path / "words", target="gender", protected="race")
    numbers = run(user, tmp_path / "numbers", **{n: f"numbers/{n}" for n in ("real", "val", "synthetic", "test")})
    one, other = (load_file(r.folder / "model.safetensors") for r in (words, numbers))
    assert all(torch.equal(v, other[n]) for n, v in one.items())
    told, plain = (json.loads((r.folder / "report.json").read_text()) for r in (words, numbers))
    for t, p in GROUPS:
        assert told["figures"]["test"][f"{GENDERS[t]}_{RACES[p]}"] == plain["figures"]["test"][f"{t}_{p}"]
    assert told["setup"]["classes"] == list(GENDERS)
    mask = json.loads((words.folder / "mask.json").read_text())
    assert mask["classes"] == list(GENDERS) and "Male_East Asian" in mask["groups"] and mask["tensors"]
    for name in ("report.md", "README.md"):
        text = (words.folder / name).read_text()
        assert "group Male, East Asian" in text and "Female, Male" in text and "1_1" not in text, name
    assert words.summary.count("7 of 7") + words.summary.count(" of 7 [") >= 6, "seven images are a count, not a percentage"
    assert "fewer than 30 images" in words.summary
    assert "nothing to do" in str(run(user, tmp_path / "words", target="gender", protected="race"))


def test_the_order_of_classes_can_be_the_models_own(user, tmp_path):
    "A model whose output 0 is Male: with the order given, its accuracy is that of the same model with both outputs exchanged."
    straight = run(user, tmp_path / "a", target="gender", protected="race")
    turned = run(user, tmp_path / "b", target="gender", protected="race", classes="Male,Female")
    accuracy = [json.loads((r.folder / "report.json").read_text())["figures"]["test"]["accuracy"]["before"] for r in (straight, turned)]
    assert accuracy[0] + accuracy[1] == pytest.approx(1)
    assert json.loads((turned.folder / "mask.json").read_text())["classes"] == ["Male", "Female"]
    with pytest.raises(DataError, match="real: no class 'Female'; did you mean Fem"):
        run(user, tmp_path / "c", target="gender", protected="race", classes="Male,Femal")
    with pytest.raises(ValueError, match="with other options"):
        run(user, tmp_path / "b", target="gender", protected="race")


def test_several_attributes_are_reported_together_and_alone(user, tmp_path):
    table = faces_table(user / "test" / "people.csv", groups=True, target="gender", protected=["race", "age"], bins={"age": "0-39, 40+"})
    assert names_of(table).protected[0] == "Black & 0-39" and names_of(table).attributes == ("race", "age")
    faces = load_faces(table, size=24, cache=tmp_path)
    with seeded(0):
        pair = tuple(predict(narrow_resnet18(8), faces, device="cpu") for _ in "ab")
    frame = compare_predictions({"test": pair}, faces.names)
    people = pd.read_csv(user / "test" / "people.csv", sep=";", encoding="utf-16")
    ages = np.where(people["age"] < 40, "0-39", "40+")
    guessed = np.array(GENDERS)[pair[0]["prediction"]]
    for images, groups in (("test by race", people["race"]), ("test by age", ages), ("test", people["race"] + " & " + ages)):
        theirs = fairness_report(people["gender"], guessed, sensitive_features=groups).to_frame()["value"]
        ours = frame.loc[images]["before"]
        for figure in theirs.index.drop(["accuracy"] if images != "test" else []):
            assert ours[figure] == pytest.approx(theirs[figure], nan_ok=True), (images, figure)


def test_sources_that_contradict_each_other_are_named(user, tmp_path):
    for options, message in (
            ({"synthetic": "numbers/synthetic"}, "synthetic has numbers for its classes, real has the words Female, Male"),
            ({"target": "race"}, "test has the classes Black, East Asian, White, real has Female, Male: is it the right column"),
            ({"protected": "rase"}, "did you mean race")):
        with pytest.raises(DataError, match=message):
            run(user, tmp_path / "x", **{"target": "gender", "protected": "race"} | options)
    assert not (tmp_path / "x").exists()
    few = shutil.copytree(user / "synthetic", tmp_path / "few")
    shutil.rmtree(few / "male" / "White")
    with pytest.raises(DataError, match="in every class's folder the same folders of groups"):
        run(user, tmp_path / "x", target="gender", protected="race", synthetic=few)


def test_the_command_speaks_in_words(user, tmp_path):
    command = [sys.executable, "-m", "aimfair.cli", "debias", "--model", f"{user}/net.py:build", "--weights", user / "weights.pth",
               "--real", user / "real", "--val", user / "val", "--synthetic", user / "synthetic", "--test", user / "test" / "people.csv",
               "--size", 24, "--epochs", 1, "--batch-size", 8, "--device", "cpu", "--target", "gender", "--protected", "race,age",
               "--bins", "age: 0-39, 40+", "--majority", "Female_Black,male_white", "--out", tmp_path / "out"]
    told = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, "AIMFAIR_CACHE": str(tmp_path)})
    assert told.returncode == 0 and "Female, Black; Male, White (given by the user)" in told.stdout, told.stderr
    assert {"test", "test by race", "test by age"} <= set(json.loads((tmp_path / "out" / "report.json").read_text())["figures"])
    assert "group Male, East Asian & 40+" in told.stdout and "group Male, East Asian |" in told.stdout  # finer than the synthetic groups


WORDS = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=2, max_size=6, unique=True)


@given(WORDS, st.data())
def test_recoding_keeps_everybodys_word(words, data):
    "Whatever order sources have, after `recoded` the number of each image stands for the word that it had."
    sources = {}
    for name in ("a", "b", "c"):
        mine = [w for w in data.draw(st.permutations(words)) if w == words[0] or data.draw(st.booleans())]
        codes = np.array(data.draw(st.lists(st.integers(0, len(mine) - 1), min_size=1, max_size=8)))
        table = pd.DataFrame({"target": codes})
        table.attrs["names"] = {"target": list(mine)}
        sources[name] = (table, [mine[c] for c in codes])
    names = shared_names({name: names_of(table) for name, (table, _) in sources.items()})
    for table, said in sources.values():
        again = recoded(table, names)
        assert [names.target[c] for c in again["target"]] == said and names_of(again) == names


@given(st.lists(st.integers(0, 99), min_size=1, unique=True))
def test_words_with_numbers_are_in_the_order_of_the_numbers(ages):
    assert in_order(map(str, sorted(map(str, ages)))) == tuple(map(str, sorted(ages)))
    assert in_order([f"{a}-{a + 5}" for a in ages]) == tuple(f"{a}-{a + 5}" for a in sorted(ages))


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([",", ";", "\t", "|"]), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]), st.sampled_from(["\n", "\r\n"]),
       st.sampled_from(["plain", "windows", "absolute", "up", "doubled", "accent"]), st.booleans())
def test_a_spreadsheets_file_is_read_whatever_wrote_it(tmp_path_factory, separator, encoding, line_end, spelt, quoted):
    root = tmp_path_factory.mktemp("sheet")
    stem = "José" if spelt == "accent" else "face"
    for i in range(4):
        (root / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / "photos" / f"{stem} {i}.png")
    forms = {"windows": "photos\\{}", "absolute": f"{root}/photos/{{}}", "up": "../photos/{}", "doubled": "photos//{}"}
    name = forms.get(spelt, "photos/{}")
    base = root / "lists" if spelt == "up" else root
    base.mkdir(exist_ok=True)
    quote = '"' if quoted else ""
    rows = [separator.join([f"{quote}{name.format(f'{stem} {i}.png')}{quote}", GENDERS[i % 2], RACES[i % 3]]) for i in range(4)]
    (base / "list.csv").write_bytes(line_end.join([separator.join(["file", "gender", "race"]), *rows, ""]).encode(encoding))
    table = folder(base, "list.csv", image="file", target="gender", protected="race")
    assert table["target"].tolist() == [0, 1, 0, 1] and names_of(table) == Names(GENDERS, RACES)
    assert all(map(os.path.isfile, table["path"]))


def test_three_classes_and_words_through_python():
    "Classes of any number; the model has a logit for each."
    names = Names(("child", "adult", "old"), ("Black", "White"), fixed=True)
    rng = np.random.default_rng(0)

    def faces(n, seed):
        t, p = np.arange(n) % 3, np.arange(n) // 3 % 2
        x = rng.integers(0, 60, (n, 3, 24, 24)) + (60 * t + 20 * p)[:, None, None, None]
        return Faces.from_arrays(x.astype(np.uint8), t, p, [f"{seed}-{i}" for i in range(n)], names=names)

    with seeded(0):
        model = narrow_resnet18(8, n_outputs=3)
    aim = AIMFair(model, config=TrainConfig(epochs=1, batch_size=8), gradient_batch_size=8, device="cpu", progress=False,
                  majority="child_White,adult_Black,old_Black")
    done = aim.fit(real=faces(24, 0), synthetic=faces(72, 1), val=faces(24, 2), test=faces(60, 3))
    assert {"child_White", "old_Black"} <= set(done.report.figures.loc["test"].index)
    assert "Classes, in the order of the model's outputs: child, adult, old." in repr(done)


@pytest.mark.real_data
def test_fairface_by_race_on_real_photos(real_data, tmp_path):
    table = fairface(real_data / "fairface-27k")
    names = names_of(table)
    assert names.target == GENDERS and len(names.protected) == 7 and "Latino_Hispanic" in names.protected
    labels = pd.read_csv(Path(real_data) / "fairface-27k" / "labels.csv")
    assert (np.array(names.target)[table["target"]] == labels["gender"]).all()
    assert (np.array(names.protected)[table["protected"]] == labels["race"]).all()
    rows = biased_split(table, n=1000, majority="Female_Black,Male_White")
    sizes = rows.groupby([np.array(GENDERS)[rows["target"]], np.array(names.protected)[rows["protected"]]]).size()
    assert sizes["Female", "Black"] == sizes["Male", "White"] == 300 and sizes["Female", "Indian"] == 34
    ages = fairface(real_data / "fairface-27k", target="age", protected=["gender", "race"], bins="0-19, 20-39, 40+")
    assert (ages["target"].to_numpy() == labels["age"].map(lambda a: 0 if a in ("0-2", "3-9", "10-19") else 1 if a[0] in "23" else 2)).all()
    assert len(names_of(ages).protected) == 14
    assert len(load_faces(rows[:5], size=32, cache=tmp_path)) == 5
