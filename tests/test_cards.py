"Cards, and folders that go to a hub on this machine: byte for byte, in one commit, with a token that is seen nowhere."
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from fairlearn.metrics import MetricFrame, equalized_odds_difference
from huggingface_hub import DatasetCard, ModelCard, constants
from local_hub import READER, TOKEN, LocalHub
from safetensors.torch import load
from sklearn.metrics import accuracy_score

import aimfair
from aimfair import cli
from aimfair.data import Faces, HubError, image_groups, push_folder, write_card
from aimfair.device import seeded
from aimfair.models import narrow_resnet18
from aimfair.pipeline import AIMFair
from aimfair.synthesis import NearDuplicate, SynthesisError, image_set_card, push_images, synthesize
from aimfair.t2i import GENERATOR, T2IConfig, bundled, drawn_faces, generator_card, push_generator, train_t2i
from aimfair.training import TrainConfig

ROOT = Path(aimfair.__file__).parents[1]
GROUPS = ((0, 0), (0, 1), (1, 0), (1, 1))
PROMPTS = {f"{t}_{p}": [f"a photo of a {s} {g}", f"a {s} {g} with glasses"] for t, s in enumerate(["non-smiling", "smiling"])
           for p, g in enumerate(["female", "male"])}
pytestmark = pytest.mark.filterwarnings("ignore:The model handed in gets", "ignore:no sample with", "ignore:Gradients were taken")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    "No token but the test's own, and the part of the hub's protocol that the local hub speaks."
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-such-login"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub():
    server = LocalHub()
    yield server
    server.shutdown()
    server.server_close()


def noise(counts, seed):
    "Noise whose brightness shows the target a little: {(target, protected): images} -> Faces."
    rng = np.random.default_rng(seed)
    t, p = np.repeat(np.array(list(counts)), list(counts.values()), axis=0).T
    return Faces.from_arrays((rng.integers(0, 200, (len(t), 3, 32, 32)) + 55 * t[:, None, None, None]).astype(np.uint8), t, p)


@pytest.fixture(scope="module")
def fairer():
    "A fairer classifier, and its test images."
    sets = {"real": {(0, 1): 18, (1, 0): 18, (0, 0): 4, (1, 1): 4}, "val": dict.fromkeys(GROUPS, 8), "synthetic": dict.fromkeys(GROUPS, 12),
            "test": {(0, 0): 40, (0, 1): 31, (1, 0): 36, (1, 1): 33}}
    images = {name: noise(counts, seed) for seed, (name, counts) in enumerate(sets.items())}
    config = TrainConfig(epochs=2, batch_size=16, lr=0.02, scale=(0.9, 1), flip=0, milestones=())
    with seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        aim = AIMFair(narrow_resnet18(8), config=config, gradient_batch_size=12, majority="0_1,1_0", device="cpu", progress=False)
        return aim.fit(**images), images["test"]


@pytest.fixture(scope="module")
def image_set(tmp_path_factory):
    out = tmp_path_factory.mktemp("images") / "set"
    synthesize(PROMPTS, per_group=3, out=out, seed=1, filters=[NearDuplicate(0.1)], max_attempts=40, device="cpu", progress=False)
    return out


def passed_on(folder):
    "What may leave this machine: names of photos with labels and answers stay."
    assert (folder / "predictions.parquet").is_file()
    return {name: data for name, data in contents(folder).items() if name != "predictions.parquet"}


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def in_a_line(error):
    "The message of a HubError; it has one line, and no token is in it."
    text = str(error.value)
    assert "\n" not in text and TOKEN not in text and READER not in text
    return text


# ---------------------------------------------------------------- what a card says


def test_the_head_of_a_models_card_says_what_its_weights_do(hub, fairer):
    "Figures from predictions of the weights that the hub got, by scikit-learn and fairlearn."
    done, test = fairer
    sent = done.push_to_hub("me/fairer", token=TOKEN, endpoint=hub.url)
    files = hub.files("me/fairer")
    net = narrow_resnet18(8)
    net.load_state_dict(load(files["model.safetensors"]))
    net.eval()
    with torch.no_grad():
        guesses = (net(test.gather(slice(None)).float() / 127.5 - 1)[:, 0] > 0).int().numpy()
    y, p = np.asarray(test.target), np.asarray(test.protected)
    groups = MetricFrame(metrics=accuracy_score, y_true=y, y_pred=guesses, sensitive_features=pd.DataFrame({"y": y, "p": p}))
    expected = {"accuracy": accuracy_score(y, guesses), "worst_group_accuracy": groups.by_group.min(),
                "equalized_odds": equalized_odds_difference(y, guesses, sensitive_features=p, agg="mean")}
    head = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    [entry] = head["model-index"][0]["results"]
    assert entry["task"]["type"] == head["pipeline_tag"] == "image-classification" and entry["dataset"]["split"] == "test"
    told = {m["type"]: m for m in entry["metrics"]}
    assert {name: m["value"] for name, m in told.items()} == pytest.approx(expected, abs=6e-5)
    for name, m in told.items():
        assert m["args"]["n"] == 140 and m["args"]["low"] <= m["value"] <= m["args"]["high"]
        assert m["args"]["before"] == pytest.approx(done.report.value("test", name)[0], abs=6e-5)
    assert sent.card == files["README.md"].decode() == str(done.card())
    assert f"| {(y == 0)[p == 1].sum()} |" in sent.card and "[" in sent.card and "not who a person is" in sent.card


def test_a_card_is_read_back_as_it_was_written(fairer, image_set, tmp_path):
    done, _ = fairer
    named = done.card(license="mit", language="en", base_model="somebody/faces")
    for card, kind in ((named, ModelCard), (generator_card(bundled()), ModelCard), (image_set_card(image_set), DatasetCard)):
        again = kind(str(card))
        assert isinstance(card, kind) and str(again) == str(card) and again.data.to_dict() == card.data.to_dict()
        text = str(card)
        assert "What was not measured" in text and ("not who a person is" in text or "not facts about the people" in text)
        assert not re.search(r"\b20[2-9]\d-\d\d|None|nan\b", text) and str(tmp_path.parent.parent) not in text
    assert (named.data.license, named.data.language, named.data.base_model) == ("mit", "en", "somebody/faces")
    assert done.card().data.base_model is None  # it was made here


def test_without_test_images_a_card_says_that_nothing_was_measured_there(fairer):
    done, _ = fairer
    some = done.report.figures.loc[["validation"]].query("figure == 'accuracy'")
    bare = type(done)(done.model, done.mask, None, done.history, type(done.report)(some, done.report.setup))
    card = bare.card()
    assert [r.metric_type for r in card.data.eval_results] == ["accuracy"] and card.data.eval_results[0].dataset_split == "validation"
    assert "There were no test images" in card.text and "no groups were known" in card.text


def test_the_card_of_a_set_counts_what_is_there(image_set):
    "Counts from the files and the journal alone."
    card = DatasetCard.load(image_set / "README.md")
    kept = {g: len(list((image_set / g).glob("*.png"))) for g in PROMPTS}
    turned_down = {g: len(list((image_set / "rejected" / g).glob("*.png"))) for g in PROMPTS}
    assert sum(turned_down.values()) > 0
    lines = [json.loads(line) for line in (image_set / "journal/shard-0-of-1.jsonl").read_text().split("\n") if line]
    for g in PROMPTS:
        made = sum(record["group"] == g for record in lines)
        assert f"| {g} | 2 | {kept[g]} | {made} | {turned_down[g]} |" in card.text
    assert "bundled" in card.text and "distinct (kept: above 0.1;" in card.text and "“a photo of a smiling male”" in card.text
    assert card.data.size_categories == "n<1K" and card.data.task_categories == ["image-classification"]
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(str(image_set), cache_dir=str(image_set.parent / "cache"), split="train")
    assert len(found) == 12 and found.features["label"].names == list(PROMPTS)  # none of those that were turned down


def test_a_set_has_its_card_when_it_is_whole(tmp_path):
    "Of two shards the last writes it; a larger set another one; the same bytes as in one go; and one's own words stay."
    options = {"seed": 4, "device": "cpu", "progress": False}
    synthesize(PROMPTS, per_group=2, out=tmp_path / "set", shard=(0, 2), **options)
    assert not (tmp_path / "set/README.md").exists()
    synthesize(PROMPTS, per_group=2, out=tmp_path / "set", shard=(1, 2), **options)
    synthesize(PROMPTS, per_group=2, out=tmp_path / "other", **options)
    first = (tmp_path / "set/README.md").read_bytes()
    assert first == (tmp_path / "other/README.md").read_bytes() and b"8 of 4 groups" in first
    table = image_groups(tmp_path / "set")
    stamp = (tmp_path / "set/README.md").stat().st_mtime_ns
    synthesize(PROMPTS, per_group=2, out=tmp_path / "set", **options)
    assert (tmp_path / "set/README.md").stat().st_mtime_ns == stamp and image_groups(tmp_path / "set").equals(table)
    synthesize(PROMPTS, per_group=3, out=tmp_path / "set", **options)
    assert b"12 of 4 groups" in (tmp_path / "set/README.md").read_bytes()
    (tmp_path / "set/README.md").write_text("mine")
    synthesize(PROMPTS, per_group=4, out=tmp_path / "set", **options)
    assert (tmp_path / "set/README.md").read_text() == "mine"
    with pytest.raises(SynthesisError):  # no card of a set that cannot be filled
        synthesize(PROMPTS, per_group=4, out=tmp_path / "short", filters=[NearDuplicate(9.0)], max_attempts=1, **options)
    assert not (tmp_path / "short/README.md").exists()


def test_a_trained_generator_has_its_card(tmp_path, hub):
    few = T2IConfig(size=16, decoder_width=16, decoder_blocks=(1, 0, 0), decoder_steps=3, decoder_batch=4, channels=(16,), head_dim=16,
                    text_width=32, text_layers=1, steps=3, batch_size=4, warmup=1, vocabulary=600)
    images, captions = drawn_faces(12, seed=3, per_face=2, size=16)
    pipe = train_t2i(images, captions, out=tmp_path, config=few, names=[f"{i}.png" for i in range(12)], data="drawn faces", device="cpu",
                     progress=False)
    card = ModelCard.load(tmp_path / "README.md")
    numbers = sum(p.numel() for part in (pipe.unet, pipe.text_encoder, pipe.vae) for p in part.parameters())
    assert f"Parameters: {numbers:,}\n" in card.text and "12 images with captions (drawn faces)" in card.text and "images.txt" in card.text
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == ("diffusers", "text-to-image", None)
    push_generator(tmp_path, "me/tiny", token=TOKEN, endpoint=hub.url)
    sent = {name: data for name, data in contents(tmp_path).items() if not name.startswith("training/")}
    assert hub.files("me/tiny") == sent and (tmp_path / "training").is_dir() and "images.txt" in sent


def test_a_card_that_somebody_changed_is_kept(tmp_path):
    file = write_card(tmp_path, "---\na: 1\n---\n\nfirst\n")
    assert write_card(tmp_path, "---\na: 1\n---\n\nsecond\n") == file and "second" in file.read_text()
    mine = "\n".join(file.read_text().splitlines()[:-1])
    file.write_text(mine)
    write_card(tmp_path, "third")
    assert file.read_text() == mine and [p.name for p in tmp_path.iterdir()] == ["README.md"]


# ---------------------------------------------------------------- what arrives


def test_what_arrives_is_what_was_saved(hub, fairer, image_set, tmp_path):
    done, _ = fairer
    saved = done.save(tmp_path / "saved")
    before = contents(image_set)
    done.push_to_hub("me/fairer", token=TOKEN, endpoint=hub.url, private=True)
    assert hub.files("me/fairer") == passed_on(saved) and hub.private["me/fairer"]
    upload = push_images(image_set, "me/faces", token=TOKEN, endpoint=hub.url)
    assert contents(image_set) == before  # nothing in the folder is touched
    sent = {n: d for n, d in before.items() if not n.startswith(("journal/", "rejected/", "aside/"))}
    assert hub.files("me/faces", "dataset") == sent and set(sent) >= {"README.md", "manifest.parquet", "synthesis.json", "1_1/000003.png"}
    assert upload.files == {n: len(d) for n, d in sent.items()} and upload.repo_type == "dataset" and not hub.private["me/faces"]
    assert upload.url.startswith(hub.url) and upload.url in str(upload)
    assert [summary for summary, _ in hub.commits] == ["Upload a fairer classifier", "Upload a set of synthetic images"]


def test_a_folder_without_a_card_gets_one_on_its_way(hub):
    assert not (bundled() / "README.md").exists()
    push_generator(bundled(), "me/small", token=TOKEN, endpoint=hub.url)
    files = hub.files("me/small")
    assert files.pop("README.md").decode() == str(generator_card(bundled())) and files == contents(bundled())


def test_twice_is_once_and_a_change_is_one_file(hub, image_set, tmp_path):
    done = {"token": TOKEN, "endpoint": hub.url}
    first = push_images(image_set, "me/faces", **done)
    uploads = sum(method == "PUT" for method, _ in hub.requests)
    again = push_images(image_set, "me/faces", **done)
    assert again.files == first.files and sum(method == "PUT" for method, _ in hub.requests) == uploads > 0
    assert len(hub.files("me/faces", "dataset")) == len(first.files)


def test_a_branch_and_a_name_alone(hub, image_set):
    upload = push_images(image_set, "faces", token=TOKEN, endpoint=hub.url, revision="try-1", commit_message="for a try")
    assert upload.repo_id == "me/faces" and not hub.files("me/faces", "dataset")
    assert set(hub.files("me/faces", "dataset", "try-1")) == set(upload.files) and hub.commits[-1][0] == "for a try"


def test_a_dry_run_asks_nobody_and_needs_no_token(hub, fairer, image_set, capsys):
    done, _ = fairer
    upload = done.push_to_hub("me/fairer", dry_run=True, endpoint=hub.url)
    assert hub.requests == [] and upload.url is None and {"README.md", "model.safetensors", "mask.json"} <= set(upload.files)
    assert "nothing was sent" in str(upload) and "model.safetensors" in str(upload) and upload.card in f"{upload}\n"
    assert cli.main(["push", str(image_set), "me/faces", "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "the dataset repository me/faces would get 15 files" in told.out and "pretty_name:" in told.out and not told.err


# ---------------------------------------------------------------- what goes wrong


def test_no_token(hub, image_set):
    with pytest.raises(HubError) as error:
        push_images(image_set, "me/faces", endpoint=hub.url)
    assert "hf auth login" in in_a_line(error) and "HF_TOKEN" in str(error.value) and hub.requests == []


def test_the_token_of_the_environment_is_used(hub, image_set, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert push_images(image_set, "me/faces", endpoint=hub.url).url


@pytest.mark.parametrize("token, words", [(READER, r"may not write .*\(403\)"), ("hf_unknown", r"does not know this token.*\(401\)")])
def test_a_token_that_may_not_write(hub, image_set, token, words):
    with pytest.raises(HubError, match=words) as error:
        push_images(image_set, "me/faces", token=token, endpoint=hub.url)
    assert in_a_line(error).startswith("me/faces was not sent: ") and not hub.repositories


@pytest.mark.parametrize("token", [f"{TOKEN} x", f"{TOKEN}\nx", f"{TOKEN}é"])
def test_a_token_that_is_none_is_not_shown(hub, image_set, token):
    with pytest.raises(HubError, match="no token of the hub's") as error:
        push_images(image_set, "me/faces", token=token, endpoint=hub.url)
    assert in_a_line(error) and hub.requests == []


def test_an_answer_that_repeats_the_token_is_told_without_it(image_set):
    hub = LocalHub(fault=(418, f"cannot\nbrew with {TOKEN}"))
    with pytest.raises(HubError, match=r"brew with \*\*\*.*\(418\)") as error:
        push_images(image_set, "me/faces", token=TOKEN, endpoint=hub.url)
    in_a_line(error)
    hub.shutdown()


def test_no_network(image_set):
    hub = LocalHub()
    hub.shutdown()
    hub.server_close()
    with pytest.raises(HubError, match=f"no connection to {hub.url}") as error:
        push_images(image_set, "me/faces", token=TOKEN, endpoint=hub.url)
    in_a_line(error)


@pytest.mark.parametrize("name", ["a b/c", "a/b/c", "", "a--b/c", "me/faces.git"])
def test_a_name_that_no_repository_has(hub, image_set, name):
    with pytest.raises(HubError, match="OWNER/NAME") as error:
        push_images(image_set, name, token=TOKEN, endpoint=hub.url, dry_run=True)
    assert in_a_line(error) and hub.requests == []


def test_a_card_that_the_hub_cannot_read(hub, tmp_path):
    for name in GENERATOR.marks:
        (tmp_path / name).write_text("{}")
    (tmp_path / "README.md").write_text("no head at all")
    with pytest.raises(HubError, match="Invalid metadata in README.md") as error:
        push_folder(tmp_path, "me/x", kinds=[GENERATOR], token=TOKEN, endpoint=hub.url)
    in_a_line(error)
    assert not hub.commits


def test_after_a_kill_only_what_is_missing_is_uploaded(image_set):
    "Killed among its uploads, a push has committed nothing; the next one goes on from there, and sends it all in one commit."
    hub = LocalHub(slow=0.3)
    command = [sys.executable, "-m", "aimfair.cli", "push", str(image_set), "me/faces"]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
                   "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 60
    while not hub.large and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # what was on its way arrives, or does not
    arrived = set(hub.large)
    assert 0 < len(arrived) < 13 and not hub.commits and hub.files("me/faces", "dataset") == {}
    hub.slow, hub.requests = 0, []
    upload = push_images(image_set, "me/faces", token=TOKEN, endpoint=hub.url)
    uploaded = {path.rpartition("/")[2] for method, path in hub.requests if method == "PUT"}
    assert uploaded and not uploaded & arrived
    assert len(hub.commits) == 1 and hub.commits[0][1] == sorted(upload.files) == sorted(hub.files("me/faces", "dataset"))
    assert TOKEN.encode() not in process.stdout.read()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)  # all is there already
    assert done.returncode == 0 and "the dataset repository me/faces has 15 files" in done.stdout and len(hub.commits) == 1
    assert TOKEN not in done.stdout + done.stderr
    hub.shutdown()


# ---------------------------------------------------------------- the command


def test_the_command_knows_each_kind_of_folder(hub, fairer, image_set, tmp_path, monkeypatch, capfd):
    "The endpoint and the token of the environment, as the hub's library reads them; a result of fix sends its classifier."
    done, _ = fairer
    done.save(tmp_path / "fixed/model")
    (tmp_path / "fixed/fix.json").write_text("{}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    for place, kind in ((tmp_path / "fixed", "model"), (tmp_path / "fixed/model", "model"), (bundled(), "model"), (image_set, "dataset")):
        name = f"me/{place.name}-{kind}"
        assert cli.main(["push", str(place), name, "--private"]) == 0, place
        told = capfd.readouterr()
        assert f"the {kind} repository {name} has " in told.out and TOKEN not in told.out + told.err
        assert hub.private[name] and "README.md" in hub.files(name, kind)
    assert hub.files("me/fixed-model") == hub.files("me/model-model") == passed_on(tmp_path / "fixed/model")
    everything = contents(tmp_path) | contents(image_set)
    assert not any(TOKEN.encode() in data for data in everything.values())


@pytest.mark.parametrize("words, message", [
    (["nowhere", "me/x"], "nowhere: no such folder"), ([".", "me/x"], "expected a fairer classifier"),
    ([".", "me/x", "--privat"], "--private"), (["."], "Missing argument")])
def test_the_command_says_what_is_wrong_in_a_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["push", *words]) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and not told.out


def test_the_command_without_a_token(image_set, capsys):
    assert cli.main(["push", str(image_set), "me/x"]) == 2
    assert capsys.readouterr().err.startswith("aimfair: no token of the hub: log in")
