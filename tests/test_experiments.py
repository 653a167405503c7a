"The store, the profiles and the reproduction: faults, kills, and the same numbers twice."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from aimfair.experiments import (
    METHODS,
    STRATEGIES,
    Profile,
    Stage,
    Store,
    about_synthetic,
    fingerprint,
    load_images,
    load_profile,
    profiles,
    prompts_of,
    reproduce,
    run,
    settings_of,
    status,
)
from aimfair.sensitivity import group_indices

TINY = {"data.n": 80, "data.n_train": 200, "data.n_val": 40, "data.n_test": 80, "synthetic.kind": "studio", "synthetic.pool": 40,
        "synthetic.per_group": 20, "train.epochs": 2, "finetune.epochs": 1, "train.batch_size": 16, "finetune.batch_size": 16,
        "mask.batch_size": 16}
GENERATED = TINY | {"synthetic.kind": "generated", "synthetic.steps": 2}


class TestStore:
    def test_threads_that_ask_at_once_make_it_once(self, tmp_path):
        made = []

        def make(path):
            made.append(1)
            time.sleep(0.2)
            (path / "x").write_text("1")

        threads = [threading.Thread(target=Store(tmp_path).get, args=(Stage("s"), make)) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(made) == 1 and (Store(tmp_path).path(Stage("s")) / "x").read_text() == "1"

    def test_a_failed_stage_leaves_no_artifact(self, tmp_path):
        store = Store(tmp_path)
        with pytest.raises(ZeroDivisionError):
            store.get(Stage("s"), lambda path: 1 / 0)
        assert not store.has(Stage("s")) and status(store).state.tolist() == ["unfinished"]

    def test_the_hash_does_not_depend_on_the_order_of_settings(self):
        assert Stage("s", {"a": 1, "b": 2}).hash == Stage("s", {"b": 2, "a": 1}).hash
        assert len({Stage("s", {"a": v}).hash for v in (1, 2, "1", None, [1])}) == 5

    def test_no_store_is_one_line(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no artifact store"):
            status(tmp_path / "gone")


class TestProfiles:
    @pytest.mark.parametrize("name", sorted(profiles()))
    def test_every_bundled_profile_is_valid_and_described(self, name):
        assert load_profile(name).name == name and load_profile(name).description

    def test_a_file_is_a_profile_too(self, tmp_path):
        path = tmp_path / "mine.toml"
        path.write_text("[data]\nn = 12\n")
        assert load_profile(path).data.n == 12 and load_profile(path).name == "mine"

    @pytest.mark.parametrize("settings,words", [
        ({"data.taget": "Young"}, "did you mean data.target"),
        ({"epochs": 3}, "train.epochs or finetune.epochs"),
        ({"train.epochs": "many"}, "train.epochs"),
        ({"train.epochs": 0}, "greater than or equal to 1"),
        ({"data.bias": "one ninth"}, "is not a ratio"),
        ({"data.kind": "faces"}, "toy"),
    ])
    def test_wrong_settings_are_named(self, settings, words):
        with pytest.raises(ValueError, match=words.replace(".", r"\.")):
            load_profile("toy", settings)

    @pytest.mark.parametrize("content,words", [("[data]\nsise = 64\n", "sise"), ("data = [", "mine.toml"), ("[dta]\n", "dta")])
    def test_wrong_files_are_named(self, tmp_path, content, words):
        path = tmp_path / "mine.toml"
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            load_profile(path)

    def test_strings_from_a_command_line_become_values(self):
        profile = load_profile("toy", {"train.lr": "0.5", "train.scale": "[0.5, 1]", "mask.k": "none", "freeze_batchnorm": "true",
                                       "seeds": "2"})
        assert (profile.train.lr, profile.train.scale, profile.mask.k) == (0.5, (0.5, 1.0), None)
        assert profile.run.freeze_batchnorm is True and profile.run.seeds == 2

    def test_a_profile_survives_json(self):
        profile = load_profile("toy")
        assert Profile.model_validate_json(profile.model_dump_json()) == profile
        assert settings_of(profile)["data.bias"] == pytest.approx(1 / 9)

    def test_missing_folders_are_one_line(self, tmp_path, monkeypatch):
        monkeypatch.delenv("AIMFAIR_DATA", raising=False)
        with pytest.raises(FileNotFoundError, match="--set data.root=FOLDER"):
            run("celeba64", store=tmp_path)
        with pytest.raises(FileNotFoundError, match="no folder"):
            run("celeba64", store=tmp_path, settings={"data.root": tmp_path / "gone"})

    def test_too_few_synthetic_images_are_noticed_before_training(self, tmp_path):
        with pytest.raises(ValueError, match="set it to at most 40"):
            run("toy", store=tmp_path, settings=TINY | {"synthetic.per_group": 41}, progress=False, workers=1)
        assert not (tmp_path / "train").exists()

    def test_unknown_methods_and_experiments(self, tmp_path):
        with pytest.raises(ValueError, match="AIM-Fair"):
            run("toy", ["AIMFair"], store=tmp_path)
        with pytest.raises(ValueError, match="finetuning_strategies"):
            reproduce("toy", only=["finetune"], store=tmp_path)
        with pytest.raises(ValueError, match="workers"):
            run("toy", store=tmp_path, workers=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A whole experiment at tiny size, in this process."
    store = tmp_path_factory.mktemp("tiny")
    return run("toy", seeds=2, settings=TINY, store=store, workers=1, progress=False), store


class TestRun:
    def test_every_method_predicts_the_whole_test_set(self, tiny):
        results, _ = tiny
        sizes = results.predictions.groupby(["method", "seed"]).id.nunique()
        assert len(sizes) == 2 * len(STRATEGIES) and (sizes == 80).all()

    def test_training_never_sees_validation_or_test_images(self, tiny):
        images = tiny[0].bench.images
        ids = [set(part.ids) for part in (images.train, images.val, images.test)]
        assert sum(map(len, ids)) == len(set.union(*ids))

    def test_the_biased_set_and_its_synthetic_twin_have_the_same_bias(self, tiny):
        images = tiny[0].bench.images
        sizes = [{g: len(i) for g, i in group_indices(f).items()} for f in (images.train, images.biased(), images.balanced())]
        assert sizes[0] == sizes[1] == {(0, 0): 4, (0, 1): 36, (1, 0): 36, (1, 1): 4}
        assert list(sizes[2].values()) == [20] * 4

    def test_again_computes_nothing(self, tiny):
        results, store = tiny
        again = run("toy", seeds=2, settings=TINY, store=store, workers=1, progress=False)
        assert again.made == 0 and again.predictions.equals(results.predictions)

    def test_another_k_reuses_all_but_what_depends_on_it(self, tiny):
        _, store = tiny
        before = status(store).stage.value_counts()
        run("toy", seeds=1, settings=TINY | {"mask.k": 50}, store=store, workers=1, progress=False)
        grown = status(store).stage.value_counts() - before
        assert grown.to_dict() == {"faces": 0, "finetune": 1, "gradients": 0, "predictions": 1, "train": 0}

    def test_another_generator_set_reuses_the_biased_model(self, tiny):
        results, store = tiny
        other = load_profile("toy", TINY | {"synthetic.seed": 9})
        again = run(other, ["ERM"], seeds=1, store=store, workers=1, progress=False)
        assert again.bench.model("ERM", 100).stage.hash == results.bench.model("ERM", 100).stage.hash

    def test_selective_fine_tuning_moved_its_mask_only(self, tiny):
        from safetensors.torch import load_file
        results, store = tiny
        biased, tuned = (load_file(results.bench.model(m, 100).run(Store(store)) / "model.safetensors")
                         for m in ("ERM", "AIM-Fair"))
        names = {n for n, _ in results.bench.new_model(0).named_parameters()}
        moved = {n for n in names if not (biased[n] == tuned[n]).all()}
        assert moved == results.bench.mask(100)

    def test_the_note_says_what_stands_in_for_the_generator(self, tiny):
        assert "standing in for a text-to-image model" in tiny[0].about()["generator"]

    def test_fingerprints_change_with_labels_and_files(self, tmp_path):
        (tmp_path / "a").write_bytes(b"1")
        table = pd.DataFrame({"id": ["a"], "path": [str(tmp_path / "a")], "target": [0], "protected": [1]})
        first = fingerprint(table)
        assert fingerprint(table.assign(target=1)) != first
        (tmp_path / "a").write_bytes(b"12")
        assert fingerprint(table) != first


def test_every_method_of_every_table_runs(tiny):
    "The comparison, and all partial strategies, on the store of the tiny experiment: what they share is there already."
    results, store = tiny
    names = [m for m in METHODS if m not in STRATEGIES]
    done = run("toy", names, seeds=1, settings=TINY, store=store, workers=1, progress=False)
    assert sorted(done.predictions.method.unique()) == sorted(names) and done.predictions.logit.notna().all()
    trained = [about for about in status(store).itertuples() if about.stage == "train"]
    assert sum("real, seed 100" in about.what for about in trained) == 1, "all share one biased model"


class TestGenerated:
    "The bundled generator and frozen prompts in the place of drawn studio faces."

    def test_images_come_from_the_frozen_prompts_of_the_task(self, tmp_path):
        small = GENERATED | {"synthetic.pool": 3, "synthetic.per_group": 2, "data.protected": "Male", "synthetic.shards": 3}
        profile = load_profile("toy", small)
        prompts = prompts_of(profile)
        assert (prompts.task.name, prompts.style) == ("toy-smiling-male", "contextual-pose")
        images = load_images(profile, Store(tmp_path))
        assert {g: len(i) for g, i in group_indices(images.pool).items()} == {g: 3 for g in ((0, 0), (0, 1), (1, 0), (1, 1))}
        manifests = [pd.read_parquet(p) for p in tmp_path.glob("synthesis/*/manifest.parquet")]
        rows = pd.concat(manifests)
        assert len(manifests) == 3 and all(r.prompt in prompts.groups[r.group] for r in rows.itertuples())
        alone = load_images(load_profile("toy", small | {"synthetic.shards": 1}), Store(tmp_path / "one"))
        difference = images.pool.gather(slice(None)).int() - alone.pool.gather(slice(None)).int()
        assert alone.pool.ids.tolist() == images.pool.ids.tolist() and difference.abs().max() <= 2

    def test_naming_a_generator_is_enough(self, tmp_path):
        profile = load_profile("celeba64", {"generator": "bundled"})
        assert profile.synthetic.kind == "generated" and prompts_of(profile).task.name == "celeba-smiling-male"
        assert load_profile("celeba64").synthetic.kind == "celeba"
        assert "contextual-pose prompts, rendered by the bundled generator" in about_synthetic(profile)

    @pytest.mark.parametrize("settings,words", [
        ({"generator": "no/such/folder"}, "no such folder"), ({"synthetic.prompts": "toy-smiling-mail"}, "toy-smiling-male"),
        ({"synthetic.style": "plane"}, "plain"), ({"data.protected": "Young"}, "toy-smiling-young")])
    def test_what_is_not_there_is_told_before_anything_is_trained(self, tmp_path, settings, words):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            run("toy", store=tmp_path, settings=GENERATED | settings, workers=1, progress=False)
        assert not (tmp_path / "train").exists()


def _reproduce(folder, *more):
    sets = [x for k, v in GENERATED.items() for x in ("--set", f"{k}={v}")]
    places = ["--store", folder / "runs", "--out", folder / "out"]
    command = [sys.executable, "-m", "aimfair.cli", "reproduce", "--seeds", "1", *places, *sets, *more]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _tables(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "out").glob("*.*")) if p.suffix in (".csv", ".md", ".tex")}


@pytest.mark.slow
def test_kill_nine_at_five_random_moments_changes_no_byte(tmp_path):
    "Five moments spread over the run: a random while after so many artifacts are there."
    whole, broken, chance = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    process = _reproduce(whole)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    for artifacts in (0, 2, 6, 10, 15):
        process = _reproduce(broken)
        while process.poll() is None and len(list(broken.glob("runs/*/*/artifact.json"))) < artifacts:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1))
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = _reproduce(broken)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert _tables(broken) == _tables(whole) and len(_tables(whole)) == 6


@pytest.mark.slow
def test_reproduce_writes_everything_and_the_workers_do_not_change_a_number(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    first = _reproduce(one, "--workers", "1")
    second_errors = _reproduce(two, "--workers", "2").communicate()[1]
    assert first.wait() == 0 and not second_errors.count("Traceback")
    assert _tables(one) == _tables(two)
    names = {p.name for p in (one / "out").glob("*.*")}
    for suffix in ("csv", "md", "tex", "png", "pdf"):
        assert f"finetuning_strategies.{suffix}" in names
    notebook = json.loads((one / "out" / "notebooks" / "finetuning_strategies.ipynb").read_text())
    assert not [o for c in notebook["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    start = time.perf_counter()
    assert _reproduce(one).wait() == 0
    assert time.perf_counter() - start < 60


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_leaves_no_process(tmp_path):
    process = _reproduce(tmp_path)
    deadline = time.time() + 120
    while not list(tmp_path.glob("runs/synthesis/*.partial/0_0/*.png")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors and "run the same command" in errors
    if shutil.which("pgrep"):
        time.sleep(1)
        assert subprocess.run(["pgrep", "-f", str(tmp_path / "runs")], capture_output=True).returncode == 1


@pytest.mark.slow
@pytest.mark.real_data
def test_real_faces_end_to_end_at_tiny_size(real_data, tmp_path):
    small = {k: v for k, v in TINY.items() if not k.startswith(("data.n_", "synthetic.pool", "synthetic.kind"))} | {"data.size": 32}
    results = run("celeba64", settings=small | {"data.root": str(real_data / "celeba-10k"), "synthetic.root": str(real_data / "celeba-6k")},
                  store=tmp_path, workers=1, progress=False)
    images = results.bench.images
    assert not set(images.pool.ids) & (set(images.train.ids) | set(images.val.ids) | set(images.test.ids))
    assert (len(images.train), len(images.val), len(images.test)) == (80, 1000, 3000)
    assert "standing in" in results.about()["generator"]
    assert os.path.isdir(Path(tmp_path) / "cache")
