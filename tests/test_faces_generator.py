"The generator of photos: whole, attributed, quick; follows gender, race and age in every group; repeats no photo that it learnt from."
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from judge import cpu_rate, draw
from judge_faces import GENDERS, RACES, answers, asked, by_group, followed, memorised, photos, train_judge

from aimfair import cli, t2i
from aimfair.data import fairface, load_faces
from aimfair.synthesis import generator_source, load_generator, synthesize

if "faces" not in t2i.SHIPPED:
    pytest.skip("no generator of photos ships with this version", allow_module_level=True)
SHIPPED = t2i.bundled("faces")


def test_the_folder_is_small_and_complete():
    files = [f for f in SHIPPED.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 40 * 2**20
    assert {f.name for f in SHIPPED.iterdir()} >= {"tokenizer", "text_encoder", "vae", "unet", "scheduler", "aimfair.json", "README.md"}
    assert generator_source("faces") == (str(SHIPPED), True)


def test_the_card_says_where_the_photos_are_from():
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    head, _, text = card.removeprefix("---\n").partition("\n---\n")
    assert "license: cc-by-4.0" in head and "FairFace" in text and "Kärkkäinen" in text and "Joo" in text and "CC BY 4.0" in text
    assert all(word in text for word in ("annotat", "cannot", "train"))


def test_it_says_which_photos_it_has_seen():
    seen, about = t2i.learnt_from(SHIPPED), json.loads((SHIPPED / "aimfair.json").read_text(encoding="utf-8"))
    assert len(set(seen)) == len(seen) == about["images"]
    assert {int(Path(name).stem) % 20 for name in seen} == set(range(9, 20))  # the others are left to learn, and to judge, by


def test_what_its_copy_draws_is_attributed_too(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "copy")
    synthesize({"1_0": ["Face photo of a man."]}, generator=str(tmp_path / "copy"), per_group=1, out=tmp_path / "set", progress=False)
    card = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    assert "license: cc-by-4.0" in card and "Kärkkäinen" in card and str(tmp_path) not in card


@pytest.mark.parametrize("task, groups", [("utkface-gender-ethnicity", 4), ("fairface-gender-race", 14)])
def test_it_draws_the_tasks_of_photos_without_a_network(task, groups, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = ["synthesize", "--prompts", task, "--generator", "faces", "--per-group", "1", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    made = pd.read_parquet(tmp_path / "manifest.parquet")
    assert len(made) == groups and made.groupby(["target", "protected"]).size().eq(1).all()
    images = load_faces(pd.DataFrame({"id": made["file"], "path": [str(tmp_path / f) for f in made["file"]], "target": 0}), size=64,
                        cache=tmp_path / "cache").gather(slice(None)).numpy()
    assert (images.std((1, 2, 3)) > 15).all()  # pictures, no planes


@pytest.mark.slow
def test_it_draws_fast_enough():
    "At least 8 images a second on two cores, which is 4 on the thread that a test has."
    pipe, (texts, _) = load_generator("faces", device="cpu"), asked(1)
    rate = cpu_rate(pipe, texts[:32], repeats=2)
    assert rate >= 4, f"{rate:.1f} images a second of CPU on {os.cpu_count()} cores"


@pytest.fixture(scope="module")
def parts(real_data, tmp_path_factory):
    return photos(fairface(real_data / "fairface-27k"), t2i.learnt_from(SHIPPED), cache=tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def drawn():
    texts, wanted = asked(5)
    return draw(load_generator("faces", device="cpu"), texts), wanted


@pytest.mark.slow
@pytest.mark.real_data
def test_no_photo_is_repeated(real_data, parts, drawn, tmp_path):
    "Not more drawn faces than chance allows come as near to a photo that was learnt from as the nearest hundredth of other photos do."
    table, (other, _) = fairface(real_data / "fairface-27k"), parts["test"]
    learnt = load_faces(table[table["id"].isin(set(t2i.learnt_from(SHIPPED)))], size=64, cache=tmp_path, progress=False)
    near = memorised(drawn[0], learnt.gather(slice(None)).numpy(), other.gather(slice(None)).numpy())
    assert near["below"] <= near["by chance"], near


@pytest.mark.slow
@pytest.mark.real_data
def test_it_follows_gender_race_and_age_in_every_group(parts, drawn):
    "By a quick judge, measured by how well that judge does on photos."
    judge = train_judge(*parts["train"], epochs=2, size=64)
    (faces, annotated), (images, wanted) = parts["test"], drawn
    real = by_group(followed(answers(judge, faces), annotated), annotated)
    ours = by_group(followed(answers(judge, images), wanted), wanted)
    for name, share in {"gender": 0.95, "race": 0.75, "age": 0.8}.items():
        by = "race" if name == "race" else "group"
        shown, told = ours.loc[by, name], real.loc[by, name]
        assert (shown >= share * told).all(), (shown / told).round(2).to_string()
    assert len(RACES) * len(GENDERS) == len(ours.loc["group"]) == 14 and np.isfinite(ours.to_numpy()).all()
