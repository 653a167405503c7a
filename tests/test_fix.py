"One file and one command: what is written to start from, what is found before anything begins, what lies there afterwards, and kills."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from faults import kill_when
from PIL import Image
from safetensors.torch import load_file

from aimfair import toyfaces
from aimfair.cli import main
from aimfair.core import DataError
from aimfair.data import faces_table, image_groups, load_faces
from aimfair.device import seeded
from aimfair.fix import fix, new_task, plan_fix, read_task
from aimfair.models import create_model, model_from, narrow_resnet18
from aimfair.prompts import PromptError, load_prompts
from aimfair.training import TrainConfig
from aimfair.training import fit as train

pytestmark = pytest.mark.filterwarnings("ignore:The model handed in gets", "ignore:no sample with", "ignore:The model gets")

CLASSES, GROUPS = ["not smiling", "smiling"], ["female", "male"]


def draw_photos(folder, n, p_male_smiling, start, csv=False):
    "Drawn photos: in folders by class in words, or with a spreadsheet of words for class and group."
    rng = np.random.default_rng(start)
    smiling = rng.permutation(n) % 2
    male = (rng.random(n) < np.where(smiling, p_male_smiling, 1 - p_male_smiling)) * 1
    factors = toyfaces.sample_factors(n, seed=0, start=start, style="photo", Smiling=smiling, Male=male)
    names = [f"{i:05d}.png" if csv else f"{CLASSES[s]}/{i:05d}.png" for i, s in enumerate(smiling)]
    for name, image in zip(names, toyfaces.draw(factors), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / name)
    if csv:
        words = {"file": names, "expression": [CLASSES[i] for i in smiling], "gender": [GROUPS[i] for i in male]}
        pd.DataFrame(words).to_csv(folder / "labels.csv", index=False)


NET = "from aimfair.models import narrow_resnet18\n\ndef build():\n    return narrow_resnet18(8)\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A user's folder: photos in words, a network in a file, and its weights."
    root = tmp_path_factory.mktemp("user")
    draw_photos(root / "train", 60, 0.1, 1)
    draw_photos(root / "val", 24, 0.1, 100_001)
    draw_photos(root / "test", 40, 0.5, 200_001, csv=True)
    (root / "net.py").write_text(NET)
    with seeded(0):
        torch.save(narrow_resnet18(8).state_dict(), root / "biased.pt")
    return root


def begin(home, name, changes=(), **options):
    "A task file as `new_task` writes it, quick, with some lines changed."
    given = {"val": home / "val", "test": home / "test", "model": f"{home}/net.py:build", "weights": home / "biased.pt",
             "generator": "bundled"}
    file = new_task(home / name, real=home / "train", **given | options)
    text = file.read_text()
    quick = [('per_group = 200', 'per_group = 12'), ('per_group = 50', 'per_group = 6'), ('# size = 224', 'size = 32'),
             ('# epochs = 10', 'epochs = 2'), ('# lr = 0.06', 'lr = 0.01'), ('# batch_size = 128', 'batch_size = 16')]
    for old, new in (*quick, *changes):
        assert old in text, old
        text = text.replace(old, new)
    file.write_text(text)
    return file


def quiet(home):
    return {"device": "cpu", "cache": home / "cache"}


# --- a file to start from


def test_new_says_what_is_there_and_reads_as_it_is(home):
    file = begin(home, "looked", model=None, weights=None, val=None)
    text = file.read_text()
    for told in ("60 images, 64 x 64 pixels: 30 not smiling, 30 smiling", "40 images", '# name = "net.py:build"', '# val = "photos/val"',
                 'target = "expression"', 'protected = "gender"', 'real = "train"'):
        assert told in text, told
    with pytest.raises(DataError, match="'model.name' is missing; setting 'photos.val' is missing"):
        read_task(file)
    complete = begin(home, "complete")
    settings, base = read_task(complete)
    assert base == home and settings.model.name == "net.py:build" and settings.model.weights == "biased.pt"
    assert settings.task["target"]["classes"] == CLASSES and settings.task["protected"]["classes"] == GROUPS
    with pytest.raises(FileExistsError, match="exists already"):
        new_task(complete, real=home / "train")


def test_new_of_a_spreadsheet_guesses_columns_and_offers_phrases(tmp_path):
    rows = pd.DataFrame({"nr": range(12), "picture": [f"{i}.png" for i in range(12)], "mood": ["gloomy", "merry"] * 6,
                         "origin": ["north", "south", "east"] * 4})
    for name in rows.picture:
        Image.new("RGB", (20, 30)).save(tmp_path / name)
    rows.to_csv(tmp_path / "all.csv", index=False)
    text = new_task(tmp_path / "t", real=tmp_path / "all.csv").read_text()
    assert 'image = "picture"' in text and 'target = "mood"' in text and 'protected = "origin"' in text
    assert '{name = "gloomy", phrases = ["gloomy"]}' in text and "20 x 30 pixels" in text
    swapped = new_task(tmp_path / "u", real=tmp_path / "all.csv", target="origin", protected="mood").read_text()
    assert 'target = "origin"' in swapped and 'protected = "mood"' in swapped
    with pytest.raises(DataError, match="no column holds names of images"):
        (tmp_path / "none.csv").write_text("a,b\n1,2\n")
        new_task(tmp_path / "v", real=tmp_path / "none.csv")


def test_new_of_folders_of_numbers_takes_words(tmp_path):
    for name in "0011":
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / f"{len(list(folder.iterdir()))}.png")
    file = new_task(tmp_path / "t", real=tmp_path / "photos", classes=["closed", "open"], groups=["female", "male"])
    text = file.read_text()
    assert '{name = "closed", phrases = ["closed"]}' in text and '"female",  # said as: female' in text


# --- found before anything begins


def test_plan_tells_steps_and_writes_nothing(home):
    file = begin(home, "planned")
    told = str(plan_fix(file, home / "planned-out", **quiet(home)))
    found = re.findall(r"^(\w+) .* (to do|done|begun) ", told.partition("\n\n")[0], re.M)
    assert found == [(s, "to do") for s in ("prompts", "images", "model", "report")]
    assert "12 images for each of 4 groups, by bundled" in told and "rough" in told and "free" in told
    assert not (home / "planned-out").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ([("[generator]", "[generator]\nstep = 3")], r"wrong.toml: no setting 'generator.step'; did you mean steps"),
    ([('real = "train"', 'real = "trian"')], r"\[photos\] real: .*trian: no such file or folder"),
    ([('"biased.pt"', '"biassed.pt"')], r"\[model\]: weights: no such file .*biassed.pt"),
    ([('net.py:build', 'net.py:built')], r"\[model\]: .* has no function 'built'"),
    ([('  "smiling",  # said', '  "laughing",  # said')], r"\[photos\] real: no class 'smiling'.*the classes of \[task.target\]"),
    ([('  "male",  # said', '  "man",  # said')], r"\[photos\] test: no group 'male'.*\[task.protected\]"),
    ([('world = "drawn"', '')], r"bundled generator draws toy faces"),
    ([('per_group = 12', 'per_group = 9')], r"\[generator\] per_group = 9; at least 10"),
    ([('# k = "auto"', 'k = "auto"')], r"at least 50 images"),
    ([('# bias = "1:9"', 'bias = "1:400"')], r"\[generator\] per_group: the pool is too small for bias"),
    ([('# majority = "..."', 'majority = "smiling_male"')], r"\[method\]: majority is smiling_male; expected exactly one"),
    ([('epochs = 2', 'epochs = 0')], r"\[method\]: setting epochs = 0"),
    ([('name = "bundled"', 'name = "openai:draw"\nbudget = 40')], r"\[generator\]: budget = 40 images do not suffice for 12"),
    ([('# model = "smollm2"', 'model = "smollm2"')], r"\[prompts\]: the grammar needs no model"),
    ([('# protected = {model = "hf/FOLDER"', 'protected = {model = "hf/./FOLDER"')], r"\[filters.protected\]: "),
    ([('  "female",  # said', '  {name = "female", phrases = ["damsel"]},  # said')], r"has never read 'damsel'"),
], ids=range(16))
def test_mistakes_are_found_first_in_one_line(home, changes, message):
    file = begin(home, "wrong", changes)
    try:
        for run in (plan_fix, fix):
            with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
                run(file, home / "never", **quiet(home))
            assert "\n" not in str(caught.value) and not (home / "never").exists()
    finally:
        file.unlink()


def test_test_photos_without_groups_are_noted(home, tmp_path):
    told = str(plan_fix(begin(home, "ungrouped", test=None, groups=GROUPS), tmp_path / "out", **quiet(home)))
    assert "Note: No test photo has a group" in told
    doubled = begin(home, "doubled", [('val = "val"', 'val = "train"')])
    assert "60 of 60 photos of val are among those of real" in str(plan_fix(doubled, tmp_path / "out", **quiet(home)))


# --- what lies there afterwards


@pytest.fixture(scope="module")
def fixed(home):
    file = begin(home, "smiles")
    return file, fix(file, home / "fairer", **quiet(home), progress=False)


def test_the_folder_holds_everything_in_words(home, fixed):
    file, done = fixed
    names = {"model", "images", "figures", "prompts.json", "report.html", "README.md", "fix.json"}
    assert done.computed and {p.name for p in done.folder.iterdir()} == names
    prompts = load_prompts(done.folder / "prompts.json")
    assert [c.name for c in prompts.task.target.classes] == CLASSES and {len(p) for p in prompts.groups.values()} == {6}
    images = image_groups(done.folder / "images")
    assert images.groupby(["target", "protected"]).size().to_list() == [12] * 4
    assert set(images.prompt) <= {t for g in prompts.groups.values() for t in g}
    page = (done.folder / "report.html").read_text()
    for words in ("not smiling, female", "Before and after: test photos", "by layer", "not who a person is", "data:image/png;base64,"):
        assert words in page, words
    assert not re.search(r"<link|src=\"(?!data:)", page) and page.count("<script>") == 1 and str(home) not in page  # to sort tables
    card = (done.folder / "README.md").read_text()
    assert "48 by bundled" in card and "smiling, male" in card and str(home) not in card
    model = model_from(f"{home}/net.py:build", done.folder / "model" / "model.safetensors")
    before, after = torch.load(home / "biased.pt"), load_file(done.folder / "model" / "model.safetensors")
    assert model is not None and any(not torch.equal(before[name], after[name]) for name in before)


def test_done_twice_does_nothing_and_other_settings_are_turned_down(home, fixed):
    file, done = fixed
    stamps = {p: p.stat().st_mtime_ns for p in done.folder.rglob("*") if p.is_file()}
    again = fix(file, done.folder, **quiet(home), progress=False)
    assert not again.computed and "was done already" in str(again) and again.summary == done.summary
    changed = [p for p in done.folder.rglob("*") if p.is_file() and stamps.get(p) != p.stat().st_mtime_ns]
    assert {p.name for p in changed} <= {"fix.json"}
    assert str(plan_fix(file, done.folder, **quiet(home))).count("done") >= 4
    other = begin(home, "other", [("lr = 0.01", "lr = 0.02")])
    for run in (fix, plan_fix):
        with pytest.raises(ValueError, match=r"begun with other settings \(method.lr was 0.01, is 0.02\)"):
            run(other, done.folder, **quiet(home))
    with pytest.raises(FileExistsError, match="is not a result of fix"):
        fix(file, home / "train", **quiet(home))


def test_a_lost_report_is_made_again_and_a_folder_may_move(home, fixed, tmp_path):
    file, done = fixed
    shutil.copytree(home, tmp_path / "moved", ignore=shutil.ignore_patterns("cache"))
    there = tmp_path / "moved"
    (there / "fairer" / "report.html").unlink()
    assert fix(there / "smiles.toml", there / "fairer", device="cpu", cache=there / "cache", progress=False).computed
    assert (there / "fairer" / "report.html").is_file()


def test_the_order_of_the_outputs_may_be_the_other_one(home, tmp_path):
    "A network whose first output means smiling: the same figures, if the file says so."
    weights = torch.load(home / "biased.pt")
    head = [name for name in weights if name.startswith("fc.")]
    flipped = {name: -v if name in head and len(v) == 1 else v.flip(0) if name in head else v for name, v in weights.items()}
    torch.save(flipped, home / "flipped.pt")
    order = ('# classes = [...]', 'classes = ["smiling", "not smiling"]')
    one = begin(home, "one-epoch")
    two = begin(home, "flipped", [order, ("biased.pt", "flipped.pt")])
    folders = [fix(file, tmp_path / file.stem, **quiet(home), progress=False).folder for file in (one, two)]
    first, second = (json.loads((folder / "model" / "report.json").read_text()) for folder in folders)
    assert second["setup"]["classes"] == ["smiling", "not smiling"] and first["setup"]["classes"] == CLASSES
    ours, theirs = ({f: row["before"] for f, row in r["figures"]["test"].items()} for r in (first, second))
    assert ours.keys() == theirs.keys() and all(abs(ours[f] - theirs[f]) < 1e-6 for f in ours)


# --- the commands, in processes of their own


def command(home, *words):
    environment = {**os.environ, "AIMFAIR_CACHE": f"{home}/cache", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen([sys.executable, "-m", "aimfair.cli", *map(str, words)], cwd=home, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def finished(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def contents(folder):
    "What must be the same however often a run was stopped."
    names = [p for p in sorted(folder.rglob("*")) if p.suffix in (".png", ".safetensors") or p.name in ("prompts.json", "mask.json")]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in names if "figures" not in p.parts}


def test_the_commands_write_look_and_refuse(home, capsys):
    assert main(["new", str(home / "cmd.toml"), "--real", str(home / "train"), "--val", str(home / "val"), "--groups", "female, male",
                 "--generator", "bundled"]) == 0
    assert '"female",' in (home / "cmd.toml").read_text()
    assert main(["fix", str(home / "cmd.toml"), "--out", str(home / "never"), "--plan"]) == 2
    assert "'model.name' is missing" in capsys.readouterr().err
    assert main(["fix", str(home / "cmd.toml")]) == 2 and "missing --out" in capsys.readouterr().err


def test_killed_while_drawing_it_goes_on(home, fixed, tmp_path):
    "kill -9 with some images there: the same command goes on, and ends with the same bytes as a run that nobody disturbed."
    file, done = fixed
    process = command(home, "fix", file, "--out", tmp_path / "killed", "--device", "cpu")
    assert kill_when(process, lambda: len(list((tmp_path / "killed" / "images").glob("*/*.png"))) > 8)
    assert not (tmp_path / "killed" / "model").exists()
    told = str(plan_fix(file, tmp_path / "killed", **quiet(home)))
    assert re.search(r"^prompts .* done", told, re.M) and re.search(r"^images .* (begun|done)", told, re.M)
    assert fix(file, tmp_path / "killed", **quiet(home), progress=False).computed
    assert contents(tmp_path / "killed") == contents(done.folder)


@pytest.mark.slow
def test_the_whole_way_from_a_biased_network_to_a_fairer_one(tmp_path):
    "A network learns a shortcut from drawn photos; one file and one command, killed while it learns, make its worst group better."
    draw_photos(tmp_path / "train", 1000, 0.1, 1)
    draw_photos(tmp_path / "val", 200, 0.1, 100_001)
    draw_photos(tmp_path / "test", 400, 0.5, 200_001, csv=True)
    photos = [load_faces(faces_table(tmp_path / name, groups=False), size=64, cache=tmp_path / "cache") for name in ("train", "val")]
    config = TrainConfig(epochs=4, lr=0.01, batch_size=64, scale=(0.7, 1), milestones=(3,))
    model = create_model("toy_resnet18", weights="bundled", seed=0)
    model = train(model, *photos, config=config, seed=0, device="cpu", progress=False).model
    torch.save(model.state_dict(), tmp_path / "biased.pt")
    code, out, err = finished(command(tmp_path, *"new smiles --real train --val val --test test --model toy_resnet18".split(),
                                      *"--weights biased.pt --generator bundled".split()))
    assert code == 0, err
    file = tmp_path / "smiles.toml"
    file.write_text(file.read_text().replace("# epochs = 10", "epochs = 4").replace("# lr = 0.06", "lr = 0.02")
                    .replace("# batch_size = 128", "batch_size = 64").replace("# crop = 0.08", "crop = 0.7"))
    words = ("fix", "smiles.toml", "--out", "fairer", "--device", "cpu")
    process = command(tmp_path, *words)
    assert kill_when(process, (tmp_path / "fairer" / "model.partial" / "checkpoint" / "finetuning.pt").exists)
    code, out, err = finished(command(tmp_path, *words))
    assert code == 0, err
    figures = json.loads((tmp_path / "fairer" / "model" / "report.json").read_text())["figures"]["test"]
    assert figures["worst_group_accuracy"]["after"] > figures["worst_group_accuracy"]["before"] + 0.1
    assert {"smiling_male", "not smiling_female"} <= figures.keys()
    assert finished(command(tmp_path, *words))[1].startswith("fairer was done already")


def test_the_choice_of_k_is_in_the_report(home, tmp_path):
    file = begin(home, "chosen", [('# k = "auto"', 'k = "auto"'), ("per_group = 12", "per_group = 50")])
    done = fix(file, tmp_path / "out", **quiet(home), progress=False)
    candidates = json.loads((done.folder / "model" / "report.json").read_text())["candidates"]
    page = (done.folder / "report.html").read_text()
    section = page[page.rindex("The choice of k"):page.rindex("The mask, by layer")]
    assert len(candidates) > 2 and section.count("<tr") == len(candidates) + 1
    assert "unchanged" in section or "chosen" in section


def test_images_may_come_from_a_server_within_a_budget(home, tmp_path, monkeypatch):
    "Too small a budget is told before the first image; the bill lies beside the images."
    from test_image_servers import Studio

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    studio = Studio()
    asks = f'base_url = "{studio.url}"\nbudget = BUDGET\nprice = 0.02'
    line = '# base_url = "http://localhost:8000/v1"  # of openai:MODEL, with budget = 4000 (images in all) and price = 0.02 (of one)'
    def served(name, budget):
        return begin(home, name, [('name = "bundled"', 'name = "openai:bundled"'), (line, asks.replace("BUDGET", str(budget)))])

    with pytest.raises(DataError, match="budget = 20 images do not suffice for 12 of each of 4 groups"):
        fix(served("poor", 20), tmp_path / "out", **quiet(home), progress=False)
    assert not studio.drawn
    done = fix(served("rich", 60), tmp_path / "out", **quiet(home), progress=False)
    assert len(studio.drawn) == 48 and image_groups(done.folder / "images").groupby(["target", "protected"]).size().to_list() == [12] * 4
    assert json.loads((done.folder / "images" / "cost.json").read_text())["cost"] == pytest.approx(0.96)
    assert "openai:bundled" in (done.folder / "README.md").read_text() and (done.folder / "model").is_dir()


def test_words_that_name_two_classes_are_turned_down(home):
    with pytest.raises(PromptError, match="names more than one class"):
        plan_fix({"model": {"name": "x"}, "photos": {"real": f"{home}/train", "val": f"{home}/val"},
                  "task": {"target": {"name": "a", "classes": ["smiling", {"name": "b", "phrases": ["smiling"]}]},
                           "protected": {"name": "g", "classes": GROUPS}}}, home / "never")


def test_a_hugging_face_model_comes_back_as_one(home, tmp_path):
    "Its own words give the order of the classes, and `from_pretrained` loads what came out."
    import transformers as hf
    config = hf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37, image_size=32, patch_size=8,
                          id2label={0: "Smiling", 1: "Not smiling"})
    with seeded(0):
        hf.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    file = begin(home, "vit", [("size = 32", "# size = 32")], model=f"hf/{tmp_path}/vit", weights=None)
    assert "its classes: Smiling, Not smiling" in file.read_text()
    done = fix(file, tmp_path / "fairer", **quiet(home), progress=False)
    model = hf.AutoModelForImageClassification.from_pretrained(done.folder / "model")
    assert model.config.id2label == {0: "Smiling", 1: "Not smiling"}
    assert [c.name for c in load_prompts(done.folder / "prompts.json").task.target.classes] == ["Smiling", "Not smiling"]


def test_groups_by_two_attributes(tmp_path):
    "A spreadsheet with gender and race: the file names the combinations, and prompts can say them."
    rows = [(f"{i}.png", CLASSES[i % 2], ["Female", "Male"][i // 2 % 2], ["Black", "White"][i // 4 % 2]) for i in range(24)]
    pd.DataFrame(rows, columns=["file", "expression", "gender", "race"]).to_csv(tmp_path / "photos.csv", index=False)
    for name, *_ in rows:
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    text = new_task(tmp_path / "t", real=tmp_path / "photos.csv", target="expression", protected="gender,race").read_text()
    assert 'protected = ["gender", "race"]' in text and '{name = "Female & Black", phrases = ["female Black"]}' in text
    assert 'name = "gender and race"' in text
