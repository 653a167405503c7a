"Profiles, plans and the reproduction: faults, kills, and the same numbers twice."
import dataclasses
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from faults import interrupt_at, kill_when
from hypothesis import given
from hypothesis import strategies as st
from pace import slowness
from safetensors.torch import load_file

from aimfair.core import read_settings
from aimfair.data import celeba
from aimfair.experiments import EXPERIMENTS, METHODS, STRATEGIES, from_notebook, make_plan, reproduce, results, run
from aimfair.groups import group_sizes
from aimfair.repro import (
    Edit,
    Executor,
    FineTune,
    Forecast,
    Images,
    ImageSets,
    InProcess,
    Processes,
    Profile,
    Protocol,
    Store,
    Train,
    WorkBar,
    about_synthetic,
    balanced_synthetic,
    biased_synthetic,
    edited_faces,
    fingerprint,
    kept,
    load_profile,
    mask_of,
    n_models,
    n_rows,
    new_model,
    profiles,
    prompts_of,
    run_jobs,
    settings_of,
    status,
    why,
)
from aimfair.repro.catalogue import cases_of, find_method
from aimfair.repro.results import note_choices
from aimfair.toyfaces import write_celeba

TINY = {"data.n": 80, "data.n_train": 200, "data.n_val": 40, "data.n_test": 80, "synthetic.kind": "studio", "synthetic.pool": 44,
        "synthetic.per_group": 20, "train.epochs": 2, "finetune.epochs": 1, "train.batch_size": 16, "finetune.batch_size": 16,
        "train.steps": None, "finetune.steps": None, "mask.batch_size": 16, "synthetic.held_out": 4, "edits.images": 4,
        "baselines.maple.outer_steps": 1, "baselines.eiil.inference_steps": 50, "baselines.dfr.draws": 1,
        "baselines.dfr_synthetic.draws": 1, "run.tune": False, "run.resample": False}
GENERATED = TINY | {"synthetic.kind": "generated", "synthetic.steps": 2}


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
        sets = tiny[0].sets()
        ids = [set(part.ids) for part in (sets.train, sets.val, sets.test)]
        assert sum(map(len, ids)) == len(set.union(*ids))

    def test_the_biased_set_and_its_synthetic_twin_have_the_same_bias(self, tiny):
        sets, protocol = tiny[0].sets(), tiny[0].profile.protocol
        real, twin, balanced = map(group_sizes, (sets.train, biased_synthetic(sets, protocol), balanced_synthetic(sets)))
        assert real == twin == {(0, 0): 4, (0, 1): 36, (1, 0): 36, (1, 1): 4}
        assert list(balanced.values()) == [20] * 4

    def test_again_computes_nothing(self, tiny):
        results, store = tiny
        again = run("toy", seeds=2, settings=TINY, store=store, workers=1, progress=False)
        assert again.made == 0 and again.predictions.equals(results.predictions)

    def test_another_k_reuses_all_but_what_depends_on_it(self, tiny):
        _, store = tiny
        before = status(store).stage.value_counts()
        run("toy", seeds=1, settings=TINY | {"mask.k": 45}, store=store, workers=1, progress=False)
        grown = status(store).stage.value_counts() - before
        assert grown.to_dict() == {"faces": 0, "finetune": 1, "gradients": 0, "predictions": 1, "train": 0}

    def test_another_generator_set_reuses_the_biased_model(self, tiny):
        results, store = tiny
        other = load_profile("toy", TINY | {"synthetic.seed": 9}).protocol
        assert Train(other, "real", 100).artifact.hash == Train(results.profile.protocol, "real", 100).artifact.hash
        assert Store(store).has(Train(other, "real", 100).artifact)

    def test_selective_fine_tuning_moved_its_mask_only(self, tiny):
        results, store = tiny
        protocol, store = results.profile.protocol, Store(store)
        jobs = Train(protocol, "real", 100), FineTune(protocol, "selective", 100, "absolute")
        biased, tuned = (job.model(store).state_dict() for job in jobs)
        names = {n for n, _ in new_model(protocol, 0).named_parameters()}
        assert {n for n in names if not (biased[n] == tuned[n]).all()} == mask_of(protocol, 100, store)

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
    names = [m for m in METHODS if m not in STRATEGIES and m != "DiGA-style"]  # which edits with a generator
    names += ["Only layer1", "All but head"]
    done = run("toy", names, seeds=1, settings=TINY, store=store, workers=1, progress=False)
    shown = [f"{m} †" if find_method(m).reads_labels else m for m in names]
    assert sorted(done.predictions.method.unique()) == sorted(shown) and done.predictions.logit.notna().all()
    trained = [about for about in status(store).itertuples() if about.stage == "train"]
    assert sum("real, seed 100" in about.what for about in trained) == 1, "all share one biased model"
    with pytest.raises(ValueError, match="DiGA-style: edits faces with a generator"):
        run("toy", ["DiGA-style"], seeds=1, settings=TINY, store=store, workers=1, progress=False)
    with pytest.raises(ValueError, match="Only layer9: no block 'layer9'; did you mean layer"):
        run("toy", ["Only layer9"], seeds=1, settings=TINY, store=store, workers=1, progress=False)


@pytest.mark.parametrize("name,stages", [
    ("toy_resnet18", ["layer1", "layer2", "layer3", "layer4"]),
    ("timm/tf_efficientnet_lite0", ["blocks.0", "blocks.2", "blocks.4", "blocks.6"]),
    ("mobilenet_v3_small", ["features.0", "features.4", "features.8", "features.12"]),
    ("timm/vit_tiny_patch16_224", ["blocks.0", "blocks.4", "blocks.7", "blocks.11"]),
    ("timm/convnext_atto", ["stages.0", "stages.1", "stages.2", "stages.3"]),
    ("densenet121", [f"features.denseblock{i}" for i in (1, 2, 3, 4)]),
])
def test_partial_fine_tuning_is_of_the_network_that_is_there(name, stages):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    cases, lacking = cases_of(load_profile("toy", {"model.name": name, "model.weights": None}), "partial_finetuning")
    assert [c.method for c in cases if c.method.startswith(("Only", "All"))] == [f"{w} {s}" for w in ("Only", "All but") for s in stages]
    assert not lacking


def test_a_part_of_a_network_that_is_no_resnet_is_what_moves(tmp_path):
    settings = TINY | {"model.name": "mobilenet_v3_small", "model.weights": None}
    methods = ["ERM, start", "Only features.4", "All but features.4"]
    done = run("toy", methods, seeds=1, settings=settings, store=tmp_path, workers=1, progress=False)
    before, *after = (load_file(done.plan.end(case, 100).of.run(done.plan.store) / "model.safetensors") for case in done.cases)
    for inside, tensors in zip((True, False), after, strict=True):
        moved = [n for n, v in tensors.items() if not torch.equal(v, before[n]) and "running_" not in n and "num_batches" not in n]
        assert moved and all(n.startswith("features.4.") == inside for n in moved)


def test_k_is_chosen_as_one_would_by_hand(tiny):
    "From the candidates' models, by validation accuracy and held-out synthetic images alone."
    from aimfair.training import accuracy, predict_logits
    results, store = tiny
    done = run("toy", ["AIM-Fair, k chosen"], seeds=1, settings=TINY, store=store, workers=1, progress=False)
    (choice,) = (job for job in done.plan.jobs.values() if job.stage == "choice")
    table = pd.read_csv(choice.run(Store(store)) / "candidates.csv", index_col="k")
    sets, models = done.sets(), {k: job.model(Store(store)) for k, job in choice.candidates.items()}
    held_out = sets.held_out
    assert len(held_out) == 16 and not set(held_out.ids) & set(sets.pool.ids)
    losses = {}
    for k, row in table.iterrows():
        assert row.val_accuracy == pytest.approx(accuracy(models[k], sets.val))
        z = predict_logits(models[k], held_out)[:, 0].astype(float)
        loss = pd.Series(np.logaddexp(0, np.where(held_out.target == 1, -z, z)))
        losses[k] = loss.groupby([held_out.target, held_out.protected]).mean().max()
        assert row.worst_group_loss == pytest.approx(losses[k], rel=1e-4)
    (k,) = table.index[table.chosen]
    right = {k: (predict_logits(models[k], sets.val)[:, 0] > 0) == sets.val.target for k in models}
    change = {k: right[k].astype(float) - right[0] for k in models}  # against the unchanged model, image by image
    acceptable = [k for k, d in change.items() if d.mean() >= -2 * d.std() / len(d) ** 0.5 - 1e-9]
    assert k in acceptable and losses[k] == min(losses[k] for k in acceptable)
    mine, chosen = models[k].state_dict(), choice.model(Store(store)).state_dict()
    assert all((mine[n] == chosen[n]).all() for n in mine)


SEARCHED = TINY | {"run.tune": True, "run.candidates": 2, "train.steps": 8, "finetune.steps": 4, "run.resample": True}


class TestFairness:
    "Equal budgets, samples by seed, and settings chosen by one rule."

    def test_what_does_not_fine_tune_has_the_steps_of_both_trainings(self):
        p = load_profile("toy", SEARCHED).protocol
        steps = {m: METHODS[m].model(p, 100).configuration.steps for m in METHODS if m != "AIM-Fair, k chosen"}
        tuned = {m for m in steps if isinstance(METHODS[m].model(p, 100), FineTune)}
        assert {steps[m] for m in tuned} == {4} and steps["ERM, start"] == 8
        assert {n for m, n in steps.items() if m not in tuned and m != "ERM, start"} == {12}
        assert FineTune(p, "full", 100).biased_model.configuration.steps == 8
        small = load_profile("toy", SEARCHED | {"data.n": 20}).protocol
        assert METHODS["JTT"].model(small, 100).configuration.steps == 12, "steps are held, not epochs"

    def test_without_steps_the_start_is_erm(self):
        p = load_profile("toy", TINY).protocol
        assert METHODS["ERM"].model(p, 100).artifact.hash == METHODS["ERM, start"].model(p, 100).artifact.hash

    def test_seeds_draw_their_images_and_leave_the_others_alone(self, tmp_path):
        p = load_profile("toy", SEARCHED).protocol
        one, two, fixed = (ImageSets(images, Store(tmp_path)) for images in (
            Images.of(p, 100), Images.of(p, 200), Images.of(load_profile("toy", TINY).protocol, 100)))
        for sets in (one, two):
            assert group_sizes(sets.train) == group_sizes(fixed.train) and group_sizes(balanced_synthetic(sets)) == {g: 20 for g in GROUPS}
            assert set(sets.train.ids) <= real_ids(fixed) and set(sets.pool.ids) == set(fixed.pool.ids)
            for name in ("val", "test", "held out"):
                assert list(sets.faces(name).ids) == list(fixed.faces(name).ids)
        assert set(one.train.ids) != set(two.train.ids) and set(balanced_synthetic(one).ids) != set(balanced_synthetic(two).ids)
        again = ImageSets(Images.of(p, 100), Store(tmp_path))
        assert list(again.train.ids) == list(one.train.ids) and list(balanced_synthetic(again).ids) == list(balanced_synthetic(one).ids)
        smaller = ImageSets(Images.of(load_profile("toy", SEARCHED | {"data.n": 40}).protocol, 100), Store(tmp_path))
        assert set(smaller.train.ids) < set(one.train.ids), "a smaller set is a part of a larger one"

    def test_seeds_tell_artifacts_apart_where_they_resample(self):
        def hashes(settings, *sets):
            p = load_profile("toy", settings).protocol
            return [[Images.of(p, seed).artifact(name).hash for seed in (100, 200)] for name in sets]

        assert [len(set(h)) for h in hashes(SEARCHED, "train", "pool", "val", "test", "held out")] == [2, 2, 1, 1, 1]
        assert [len(set(h)) for h in hashes(TINY, "train", "pool")] == [1, 1]


GROUPS = ((0, 0), (0, 1), (1, 0), (1, 1))


def real_ids(sets):
    "Of all images that a training set may be drawn from."
    from aimfair.repro import real_table
    table = real_table(sets.images, sets.store)
    return set(table.id[table.split == "train"])


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    store = tmp_path_factory.mktemp("searched")
    names = ["ERM", "ERM, start", "Full fine-tuning", "AIM-Fair", "Random 55 %"]
    return run("toy", names, seeds=2, settings=SEARCHED, store=store, workers=1, progress=False), Store(store)


class TestTuning:
    def test_each_rule_chooses_epoch_and_candidate_by_its_figure(self, searched):
        "Figures by hand, from the weights that are kept for each rule."
        from aimfair.repro import Main, load_model
        from aimfair.training import predict_logits
        results, store = searched
        main, sets = Main(results.profile.protocol, 100), results.sets()
        val, bias = sets.val, results.profile.data.bias
        where = {g: (val.target == g[0]) & (val.protected == g[1]) for g in GROUPS}
        share = {g: (1 if g in ((0, 1), (1, 0)) else bias) for g in GROUPS}

        def figures(model):
            right = (predict_logits(model, val)[:, 0] > 0) == val.target
            by_group = {g: right[w].mean() for g, w in where.items() if w.any()}
            biased = sum(share[g] * a for g, a in by_group.items()) / sum(share[g] for g in by_group)
            return {"natural": right.mean(), "biased": biased, "labels": min(by_group.values())}

        for rule in ("natural", "biased", "labels"):
            tune = main.tune("ERM", rule)
            found = [figures(load_model(job, store, rule))[rule] for job in tune.candidates]
            table = tune.table(store)
            assert table.score.tolist() == pytest.approx(found) and found[int(table.chosen.to_numpy().argmax())] == max(found)
            for job, best in zip(tune.candidates, found, strict=True):  # no other epoch that was kept is better by this rule
                assert best >= max(figures(load_model(job, store, other))[rule] for other in ("natural", "labels"))

    def test_the_choice_of_the_first_seed_holds_for_the_second(self, searched):
        from aimfair.repro import Main, Tuned
        results, store = searched
        main = Main(results.profile.protocol, 100)
        tune = main.tune("Full fine-tuning", "natural")
        jobs = [main.chosen(METHODS["Full fine-tuning"].model(results.profile.protocol, seed), "Full fine-tuning") for seed in (100, 200)]
        assert all(isinstance(job, Tuned) and dict(job.resolved(store).changes) == tune.chosen(store) for job in jobs)
        assert jobs[0].resolved(store) in tune.candidates
        ours, theirs = (job.model(store).state_dict() for job in (jobs[1], jobs[1].resolved(store)))
        assert all((ours[n] == w).all() for n, w in theirs.items())

    def test_another_mask_takes_the_choice_of_what_it_is_compared_with(self, searched):
        from aimfair.repro import Main
        main = Main(searched[0].profile.protocol, 100)
        assert main.tune("ERM, start", "natural") is None
        assert {name: find_method(name).tuned_as for name in ("Random 55 %", "Random 85 %", "Only layer1")} == {
            "Random 55 %": "Random 85 %", "Random 85 %": "Random 85 %", "Only layer1": "AIM-Fair"}

    def test_what_a_choice_led_to_is_not_called_unused(self, searched):
        from aimfair.repro import Main
        results, store = searched
        main, method = Main(results.profile.protocol, 100), METHODS["AIM-Fair"]
        made = main.chosen(method.model(main.protocol, 200), "AIM-Fair").resolved(store).artifact.hash
        frame = why(results.profile, ["layer_sensitivity"], seeds=2, store=store.root)
        assert store.has(main.tune("AIM-Fair", "natural").artifact) and made not in set(frame.hash[frame.state == "unused"])

    def test_again_nothing_is_computed(self, searched):
        results, store = searched
        names = results.predictions.method.unique().tolist()
        assert run("toy", names, seeds=2, settings=SEARCHED, store=store.root, workers=1, progress=False).made == 0

    @pytest.mark.parametrize("there", ['[choices]\n"Data repairing" = 1\nERM = 7\n', "[choi", None])
    def test_choices_of_other_methods_stay_in_the_file(self, searched, tmp_path, there):
        results, store = searched
        file = tmp_path / "choices.toml"
        if there:
            file.write_text(there)
        note_choices(results.plan, file)
        noted, chosen = read_settings(file)["choices"], results.plan.main.tune("ERM", "natural").chosen(store)
        assert noted.get("Data repairing", 0) == (1 if there and "ERM" in there else 0)
        assert noted.get("ERM", 0) == (1 if chosen else 0)  # of two candidates the first changes nothing


def test_anyones_model_and_the_experiments_are_debiased_alike(tiny):
    "The model that `AIMFair` makes from a profile's images is the one in the store, bit for bit."
    from aimfair.pipeline import AIMFair
    results, store = tiny
    protocol, sets, store = results.profile.protocol, results.sets(), Store(store)
    for seed in results.seeds:
        aim = AIMFair(Train(protocol, "real", seed).model(store), k=kept(protocol), bias=protocol.data.bias, majority="0_1,1_0",
                      config=protocol.finetune, gradient_batch_size=protocol.mask.batch_size, per_group=protocol.synthetic.per_group,
                      seed=seed, progress=False)
        ours = aim.fit(real=sets.train, synthetic=sets.pool, val=sets.val, held_out=sets.held_out)
        theirs = FineTune(protocol, "selective", seed, "absolute")
        assert set(ours.mask) == mask_of(protocol, seed, store)
        weights = ours.model.state_dict()
        assert all((weights[n] == w).all() for n, w in theirs.model(store).state_dict().items())


class TestJobs:
    "Plain values that can be sent anywhere."

    def test_every_job_of_a_plan_survives_pickling_with_its_artifact(self, tmp_path):
        plan, _ = make_plan("toy", seeds=1, settings={"run.tune": True}, store=tmp_path)
        for h, job in plan.jobs.items():
            other = pickle.loads(pickle.dumps(job))
            assert other == job and other.artifact.hash == h and hash(other) == hash(job)
        assert {type(job).__name__ for job in plan.jobs.values()} == {
            "DrawCelebA", "DrawUTKFace", "Synthesize", "Train", "TrainBaseline", "Edit", "Gradients", "FineTune", "Tune", "Tuned",
            "ChooseK", "Predict"}

    def test_names_and_variants_of_a_profile_change_no_artifact(self):
        one = load_profile("toy")
        other = Profile(**one.model_dump() | {"name": "other", "description": "x", "variants": {}})
        assert Train(one.protocol, "real", 100).artifact.hash == Train(other.protocol, "real", 100).artifact.hash

    def test_artifacts_depend_on_what_their_stage_reads(self):
        base = load_profile("toy").protocol

        def hashes(settings):
            p = load_profile("toy", settings).protocol
            jobs = Train(p, "real", 100), FineTune(p, "full", 100), FineTune(p, "selective", 100, "absolute")
            return [job.artifact.hash for job in jobs]

        before = hashes({})
        changes = {"train.lr": [1, 1, 1], "finetune.lr": [0, 1, 1], "mask.k": [0, 0, 1], "synthetic.per_group": [0, 1, 1],
                   "baselines.maple.outer_steps": [0, 0, 0], "data.n_test": [1, 1, 1]}
        values = {"train.lr": 0.02, "finetune.lr": 0.02, "mask.k": 33, "synthetic.per_group": 500, "baselines.maple.outer_steps": 2,
                  "data.n_test": 2000}
        for name, expected in changes.items():
            assert [int(a != b) for a, b in zip(before, hashes({name: values[name]}), strict=True)] == expected, name
        assert isinstance(base, Protocol)


class TestPlan:
    "What is planned before anything is made."

    def test_counts_by_hand(self, tmp_path):
        plan, left_out = make_plan("toy", seeds=1, settings={"run.tune": False, "selection.gaps": "[1]", "selection.sizes": None},
                                  store=tmp_path)
        assert not left_out and list(plan.cases) == list(EXPERIMENTS) and list(tmp_path.iterdir()) == []
        # comparison: 13 rows and the start of AIM-Fair, the paper's 8 and a start x 2; less data: 9 x 3 more; UTKFace 9; strategies 5
        # more; partial 15; styles 6 (per_group 500 at all three); k 5 more; bias 3 more; ratio 2 more (1 : 4 is 250 a group, 1 : 2 500);
        # selection: 8 ways on 250, 500 and 1,000 a group, of which AIM-Fair is there each time, full fine-tuning on 500, and four others on
        # 1,000; another start and two ways to go on from it
        assert n_models(plan.jobs.values()) == (14 + 9 * 2) + 9 * 3 + 9 + 5 + 15 + 6 + 5 + 3 + 2 + (7 + 6 + 3) + 3
        assert n_rows(plan) == 8 + (13 + 8 * 2) + 8 * 4 + 8 + 18 + 7 + 10 + 5 + 4 + 2 + 18 + 9 * 3 + 7

    def test_a_search_adds_its_candidates_once(self, tmp_path):
        once, other = ({"run.tune": tune} for tune in (True, False))
        tuned, plain = (make_plan("toy", ["tradeoff"], seeds=1, settings=s, store=tmp_path)[0] for s in (once, other))
        tuned_twice = make_plan("toy", ["tradeoff"], seeds=2, settings=once, store=tmp_path)[0]
        tunes = [job for job in tuned.jobs.values() if type(job).__name__ == "Tune"]
        assert sorted(job.method for job in tunes) == sorted(c.method for c in tuned.cases["tradeoff"])
        # the candidates and the model that fine-tuning starts from; for another seed as many models as there are without a search
        assert n_models(tuned.jobs.values()) == sum(len(job.candidates) for job in tunes) + 1
        assert n_models(tuned_twice.jobs.values()) == n_models(tuned.jobs.values()) + n_models(plain.jobs.values())

    def test_it_is_what_is_made(self, tiny, tmp_path):
        _, store = tiny
        plan, _ = make_plan("toy", ["layer_sensitivity"], seeds=3, settings=TINY, store=store)
        missing = {h: job.stage for h, job in plan.missing.items()}
        assert sorted(missing.values()) == sorted(["train", "finetune", "predictions", "predictions", *["gradients"] * 3])
        done = results("layer_sensitivity", "toy", seeds=3, settings=TINY, store=store, workers=1, progress=False)
        assert done.made == len(missing) and not make_plan("toy", ["layer_sensitivity"], seeds=3, settings=TINY, store=store)[0].missing

    def test_what_a_profile_cannot_have_is_left_out_and_named_is_an_error(self, tmp_path):
        plan, left_out = make_plan("toy", settings=TINY, seeds=1, store=tmp_path)
        assert {"prompt_strategies", "synthetic_gallery", "utkface_comparison", "celeba_comparison: DiGA-style"} <= set(left_out)
        assert "prompt_strategies" not in plan.cases and "DiGA-style" not in {c.label for c in plan.cases["celeba_comparison"]}
        with pytest.raises(ValueError, match="prompt_strategies"):
            make_plan("toy", ["prompt_strategies"], settings=TINY, store=tmp_path)

    def test_too_few_synthetic_images_are_told_before_anything_is_made(self, tmp_path):
        with pytest.raises(ValueError, match="per_group is 1000, but group not Smiling, not Male of the synthetic images has 500"):
            make_plan("toy", settings={"synthetic.pool": 600, "synthetic.held_out": 100}, store=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_why(self, tiny):
        _, store = tiny
        frame = why("toy", ["layer_sensitivity"], seeds=2, settings=TINY | {"finetune.lr": 0.02}, store=store)
        missing = frame[frame.state == "missing"]
        assert sorted(missing.stage) == ["finetune", "finetune", "predictions", "predictions"]
        assert missing.why[missing.stage == "finetune"].str.contains("config.lr: 0.01 -> 0.02").all()
        assert missing.why[missing.stage == "predictions"].str.contains("first finetune").all()
        assert (frame.why[(frame.state == "done") & (frame.stage == "train")] == "layer_sensitivity").all()
        assert set(frame.what[frame.state == "unused"]) >= {"linear_probe, seed 100", "full, seed 100"}


RACES = ("Black", "East Asian", "Indian", "Latino_Hispanic", "Middle Eastern", "Southeast Asian", "White")


def as_fairface(root, n=1300, n_races=7, size=24):
    "Pictures labelled as FairFace's are: gender and age colour the left half, race the whole."
    from PIL import Image
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    rows = []
    for i in range(n):
        gender, race, age = rng.integers(2), rng.integers(n_races), rng.integers(3)
        pixels = rng.normal(110 + 20 * gender - 15 * (race % 3), 35, (size, size, 3))
        pixels[:, :size // 2, 0] += 25 * gender + 10 * age
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{i}.png")
        rows.append((f"images/{i}.png", ("3-9", "20-29", "50-59")[age], ("Female", "Male")[gender], RACES[race]))
    pd.DataFrame(rows, columns=["file", "age", "gender", "race"]).to_csv(root / "labels.csv", index=False)
    return root


MANY = {k: v for k, v in TINY.items() if not k.startswith("data.n_")} | {
    "data.size": 24, "data.n": 112, "data.bias": 1 / 4, "synthetic.kind": "rest", "synthetic.pool": 20, "synthetic.per_group": 8,
    "synthetic.held_out": 4, "model.name": "toy_resnet18", "train.epochs": 1}
AGES = {"data.target": "age", "data.protected": "race", "data.bins": "0-19, 20-39, 40+",
        "data.majority": "0-19_Black, 20-39_Indian, 40+_Latino_Hispanic", "data.n": 111}
ALL = tuple(m for m in METHODS if m != "DiGA-style" and not m.startswith(("Random 4", "Random 5", "Random 7")))


@pytest.fixture(scope="module")
def fourteen(tmp_path_factory):
    return as_fairface(tmp_path_factory.mktemp("fairface"))


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    return as_fairface(tmp_path_factory.mktemp("fairface"), n_races=4)


class TestManyGroups:
    "Two classes by seven groups, three by four, through every strategy and method."

    @pytest.mark.parametrize("faces, settings, names", [
        ("fourteen", {}, ("ERM", "AIM-Fair", "DFR")), ("twelve", AGES, ("ERM", "AIM-Fair", "Group DRO")),
        pytest.param("fourteen", {}, ALL, marks=pytest.mark.slow), pytest.param("twelve", AGES, ALL, marks=pytest.mark.slow)])
    def test_every_method_works_or_says_why_not(self, faces, settings, names, tmp_path, request):
        given = MANY | settings | {"data.root": str(request.getfixturevalue(faces))}
        n_classes, n_groups = {"fourteen": (2, 7), "twelve": (3, 4)}[faces]
        with pytest.raises(ValueError, match="DiGA-style: edits faces with a generator"):
            run("fairface64", ["DiGA-style"], seeds=1, settings=given, store=tmp_path, workers=1, progress=False)
        done = run("fairface64", names, seeds=1, settings=given, store=tmp_path, workers=1, progress=False)
        sets, shown = done.sets(), {f"{m} †" if METHODS[m].reads_labels else m for m in names}
        assert set(done.predictions.method) == shown and (len(done.names.target), len(done.names.protected)) == (n_classes, n_groups)
        logits = done.predictions.filter(regex="^logit")
        assert logits.shape[1] == (1 if n_classes == 2 else 3) and np.isfinite(logits.to_numpy()).all()
        assert set(done.predictions.prediction) <= set(range(n_classes))
        groups = {(t, p) for t in range(n_classes) for p in range(n_groups)}
        sizes, per_group = group_sizes(sets.train), given["synthetic.per_group"]
        assert set(sizes) == groups and given["data.n"] - n_groups * n_classes < sum(sizes.values()) <= given["data.n"]
        assert group_sizes(balanced_synthetic(sets)) == dict.fromkeys(sorted(groups), per_group)
        assert not set(sets.train.ids) & (set(sets.pool.ids) | set(sets.held_out.ids))
        frequent = {(0, 0), (1, 6)} if n_classes == 2 else {(0, 0), (1, 2), (2, 3)}
        biased = group_sizes(biased_synthetic(sets, done.profile.protocol))
        for counts in (sizes, biased):  # by an oracle of its own: the frequent group of each class, and the others at a quarter of it
            assert {g for g, n in counts.items() if n == max(counts.values())} == frequent
            assert all(abs(n - max(counts.values()) / 4) <= 1.5 for g, n in counts.items() if g not in frequent)
        told = done.about()["extra"]
        assert f"of {n_groups * n_classes} groups" in told and all(done.names.title(g) in told for g in frequent)

    def test_what_cannot_be_is_told_before_anything_is_made(self, fourteen, tmp_path):
        given = MANY | {"data.root": str(fourteen)}
        for settings, words in [
                ({"data.majority": "Female_Black"}, "exactly one group of each target"),
                ({"data.majority": "Female_Blue, Male_White"}, "Female_East Asian"),
                ({"data.target": "hair"}, "unknown attribute 'hair'|no attribute 'hair'"),
                ({"data.n": 4000}, "the largest n that fits"),
                ({"synthetic.per_group": 90}, "of the synthetic images has .* set it to at most"),
                ({"synthetic.kind": "studio"}, "studio, whose images have CelebA's attributes"),
                ({"synthetic.kind": "generated", "synthetic.prompts": "utkface-gender-ethnicity"}, "of 4 groups, the real ones of 14"),
                ({"data.bins": "0-19, 20-39", "data.target": "age"}, "lies in none of the bins")]:
            with pytest.raises((ValueError, FileNotFoundError), match=words):
                run("fairface64", settings=given | settings, store=tmp_path / "none", workers=1, progress=False)
        assert not (tmp_path / "none" / "train").exists()

    def test_synthetic_images_in_words_are_numbered_as_the_real_ones(self, fourteen, tmp_path):
        "A folder whose words stand in another order than those of the labels."
        from PIL import Image
        for gender in ("male", "female"):
            for i, race in enumerate(reversed(RACES)):
                (tmp_path / "made" / gender / race).mkdir(parents=True)
                for j in range(3):
                    Image.new("RGB", (24, 24), (30 * i, 100 * (gender == "male"), 80 * j)).save(tmp_path / f"made/{gender}/{race}/{j}.png")
        given = MANY | {"data.root": str(fourteen), "synthetic.kind": "groups", "synthetic.root": str(tmp_path / "made"),
                        "synthetic.per_group": 2, "synthetic.held_out": 1}
        sets = ImageSets(Images.of(load_profile("fairface64", given).protocol), Store(tmp_path / "runs"))
        for row in sets.synthetic.itertuples():
            gender, race, _ = row.id.split("/")
            assert (("Female", "Male")[row.target].lower(), RACES[row.protected]) == (gender, race)
        assert group_sizes(balanced_synthetic(sets)) == {(t, p): 2 for t in (0, 1) for p in range(7)}

    @pytest.mark.parametrize("folder, left", [("images/", 0), ("train/", 0), ("", 0), ("val/", 40)])
    def test_photos_that_the_generator_has_learnt_from_are_left_out(self, fourteen, tmp_path, folder, left):
        "By its own list, wherever the photos lie; the official validation photos bear the numbers of others."
        from aimfair.repro import real_table
        from aimfair.t2i import bundled
        shutil.copytree(bundled(), tmp_path / "generator")
        (tmp_path / "generator/images.txt").write_text("".join(f"{folder}{i}.png\n" for i in range(40)))
        given = MANY | {"data.root": str(fourteen), "synthetic.kind": "generated", "synthetic.generator": str(tmp_path / "generator")}
        table = real_table(Images.of(load_profile("fairface64", given).protocol), None)
        assert sum(int(Path(name).stem) < 40 for name in table["id"]) == left and len(table) == 1260 + left
        rest = given | {"synthetic.kind": "rest", "synthetic.generator": ""}
        assert len(real_table(Images.of(load_profile("fairface64", rest).protocol), None)) == 1300

    @given(st.integers(2, 4), st.integers(2, 8), st.floats(0.05, 1), st.integers(0, 10_000))
    def test_validation_by_the_bias_of_the_training_set(self, n_classes, n_groups, bias, seed):
        "The biased rule weighs groups as the training set does, whatever their number."
        from aimfair.data import Faces
        from aimfair.repro import validation_criteria
        rng = np.random.default_rng(seed)
        cells = [(t, p) for t in range(n_classes) for p in range(n_groups)]
        target, protected = np.array(cells * 3).T
        majority = {t: int(rng.integers(n_groups)) for t in range(n_classes)}
        logits = rng.normal(size=(len(target), 1 if n_classes == 2 else n_classes))
        faces = Faces.from_arrays(np.zeros((len(target), 3, 8, 8), np.uint8), target, protected=protected)
        rules = validation_criteria(faces, bias, majority)
        predicted = (logits[:, 0] > 0).astype(int) if n_classes == 2 else logits.argmax(1)
        right = {g: np.mean([p == g[0] for p, t, q in zip(predicted, target, protected, strict=True) if (t, q) == g]) for g in cells}
        weight = {(t, p): 1 if majority[t] == p else bias for t, p in cells}
        assert rules["labels"](logits) == pytest.approx(min(right.values()))
        assert rules["biased"](logits) == pytest.approx(sum(weight[g] * right[g] for g in cells) / sum(weight.values()))

    def test_classes_and_groups_are_planned_without_the_images(self, tmp_path):
        plan, left_out = make_plan("fairface64", ["celeba_training_size", "ablation_synthetic_ratio"], store=tmp_path, check=False,
                                   settings=AGES | {"data.root": "/nowhere", "data.majority": "", "data.n": 2997, "synthetic.kind": "rest",
                                                           "synthetic.pool": 550, "synthetic.per_group": 200})
        sizes = {case.settings.get("data.n", 2997) for case in plan.cases["celeba_training_size"]}
        assert len(sizes) == 4 and all(n % 3 == 0 for n in sizes)
        assert [c.settings["synthetic.per_group"] for c in plan.cases["ablation_synthetic_ratio"][1:]] == [36, 71, 143, 214]


class TestNotebookParameters:
    @pytest.mark.parametrize(("given", "words"), [
        ({"sedes": 3}, "no parameter 'sedes'; did you mean seeds"), ({"seeds": "three"}, "seeds"), ({"seeds": 0}, "seeds"),
        ({"seeds": 2.5}, "seeds"), ({"settings": "k=4"}, "settings"), ({"aggregation": "median"}, "'mean' or 'published'"),
        ({"settings": {"mask.kk": 4}}, "mask.k"), ({"profile": "toys"}, "no profile 'toys'")])
    def test_wrong_ones_stop_before_anything_is_made(self, given, words, tmp_path):
        with pytest.raises(ValueError, match=words):
            from_notebook("tradeoff", {"profile": "toy", "store": str(tmp_path / "runs"), "_ih": [], "In": [], **given})
        assert not (tmp_path / "runs").exists()

    def test_right_ones(self, tiny, tmp_path):
        _, store = tiny
        namespace = {"profile": "toy", "settings": TINY, "seeds": 1, "store": str(store), "out": str(tmp_path), "aggregation": "published"}
        done = from_notebook("layer_sensitivity", namespace)
        assert (done.stem, done.aggregation, done.seeds) == (tmp_path / "layer_sensitivity", "published", [100])
        assert from_notebook("layer_sensitivity", namespace | {"note": "a variable of a later cell"}).made == 0


def test_a_job_that_fails_takes_its_dependents_and_nothing_else(tiny, monkeypatch):
    "No training of EIIL can succeed; whatever does not need one goes on."
    from aimfair import baselines
    _, store = tiny
    broken = dataclasses.replace(baselines.BASELINES["EIIL"], train=lambda *a, **k: 1 / 0)
    monkeypatch.setitem(baselines.BASELINES, "EIIL", broken)
    plan, _ = make_plan("toy", ["tradeoff", "layer_sensitivity"], seeds=1, settings=TINY | {"train.epochs": 1}, store=store)
    passed = []
    errors = run_jobs(plan.missing, plan.seconds, plan.store.root, InProcess(), passed.append)
    lost = {plan.jobs[h].artifact.label for h in errors}
    assert lost == {"EIIL, seed 100"} and len(errors) == 2 and all(isinstance(e, ZeroDivisionError) for e in errors.values())
    assert len(passed) == len(plan.missing) - 1  # its predictions were never tried
    assert not make_plan("toy", ["layer_sensitivity"], seeds=1, settings=TINY | {"train.epochs": 1}, store=store)[0].missing


class Recorded(Executor):
    "An executor that keeps what it is given, and finishes it in the order asked for."

    def __init__(self, slots):
        self.slots, self.given, self.closed = slots, [], []

    def submit(self, job, root):
        self.given.append(job)
        future = Future()
        future.set_result(None)
        return future

    def close(self, at_once):
        self.closed.append(at_once)


class TestScheduler:
    def plan(self, tmp_path):
        return make_plan("toy", ["finetuning_strategies"], seeds=1, settings=TINY, store=tmp_path)[0]

    def test_no_job_starts_before_what_it_needs_is_done(self, tmp_path):
        plan = self.plan(tmp_path)
        executor, done = Recorded(1), []
        assert run_jobs(plan.missing, plan.seconds, tmp_path, executor, done.append) == {}
        order = [job.artifact.hash for job in executor.given]
        assert sorted(order) == sorted(plan.missing) and done == order and executor.closed == [False]
        for job in executor.given:
            assert all(order.index(need.artifact.hash) < order.index(job.artifact.hash) for need in job.needs)

    def test_what_much_depends_on_goes_before_what_nothing_does(self, tmp_path):
        plan = self.plan(tmp_path)
        executor = Recorded(1)
        run_jobs(plan.missing, plan.seconds, tmp_path, executor)
        labels = [f"{job.stage} {job.artifact.label}" for job in executor.given]
        assert labels.index("train real, seed 100") < labels.index("train synthetic, seed 100")
        assert labels.index("train real, seed 100") < min(i for i, x in enumerate(labels) if x.startswith("predictions"))

    def test_it_never_hands_out_more_than_there_are_slots_for(self, tmp_path):
        class Slow(Recorded):
            def submit(self, job, root):
                self.given.append(job)
                future = Future()
                open_ = [f for f in self.futures if not f.done()]
                assert len(open_) < self.slots
                self.futures.append(future)
                threading.Timer(0.001, future.set_result, [None]).start()
                return future

        plan, executor = self.plan(tmp_path), Slow(3)
        executor.futures = []
        run_jobs(plan.missing, plan.seconds, tmp_path, executor)
        assert len(executor.given) == len(plan.missing)

    def test_an_interruption_ends_what_runs(self, tmp_path):
        plan, executor = self.plan(tmp_path), Recorded(1)

        def interrupted(hash):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_jobs(plan.missing, plan.seconds, tmp_path, executor, interrupted)
        assert executor.closed == [True] and len(executor.given) == 1

    @pytest.mark.slow
    def test_a_worker_that_is_killed_is_told_in_one_line(self, tmp_path):
        plan = self.plan(tmp_path)
        with pytest.raises(ChildProcessError, match="a worker process was killed, perhaps for want of memory"):
            run_jobs({"x": Doomed()}, {"x": 1.0}, plan.store.root, Processes(1))


class Doomed:
    "A job whose worker is killed by somebody else."
    needs, threads = (), 1

    def run(self, store):
        os.kill(os.getpid(), signal.SIGKILL)


class TestGenerated:
    "The bundled generator and frozen prompts in the place of drawn studio faces."

    def test_images_come_from_the_frozen_prompts_of_the_task(self, tmp_path):
        small = GENERATED | {"synthetic.pool": 3, "synthetic.per_group": 2, "synthetic.held_out": 0, "data.protected": "Male",
                             "synthetic.shards": 3}
        profile = load_profile("toy", small)
        prompts = prompts_of(profile.data, profile.synthetic)
        assert (prompts.task.name, prompts.style) == ("toy-smiling-male", "contextual-pose")
        sets = ImageSets(Images.of(profile), Store(tmp_path))
        assert group_sizes(sets.pool) == dict.fromkeys(((0, 0), (0, 1), (1, 0), (1, 1)), 3)
        manifests = [pd.read_parquet(p) for p in tmp_path.glob("synthesis/*/manifest.parquet")]
        rows = pd.concat(manifests)
        assert len(manifests) == 3 and all(r.prompt in prompts.groups[r.group] for r in rows.itertuples())
        alone = ImageSets(Images.of(load_profile("toy", small | {"synthetic.shards": 1})), Store(tmp_path / "one"))
        difference = sets.pool.gather(slice(None)).int() - alone.pool.gather(slice(None)).int()
        assert alone.pool.ids.tolist() == sets.pool.ids.tolist() and difference.abs().max() <= 2

    def test_naming_a_generator_is_enough(self):
        profile = load_profile("celeba64", {"generator": "bundled"})
        assert profile.synthetic.kind == "generated"
        assert prompts_of(profile.data, profile.synthetic).task.name == "celeba-smiling-male"
        assert load_profile("celeba64").synthetic.kind == "celeba"
        assert "contextual-pose prompts, rendered by the bundled generator" in about_synthetic(profile.synthetic)

    def test_annotations_are_read_once_for_all_seeds(self, tmp_path, monkeypatch):
        "Those of the whole CelebA take seconds."
        for i, name in enumerate(("real", "synthetic")):
            write_celeba(tmp_path / name, n_train=150, n_val=20, n_test=20, size=32, seed=i)
        read = []
        monkeypatch.setattr("aimfair.repro.images.celeba", lambda root, **named: read.append(Path(root).name) or celeba(root, **named))
        plan, _ = make_plan("celeba64", ["finetuning_strategies"], seeds=4, store=tmp_path / "runs", settings={
            "data.root": tmp_path / "real", "synthetic.root": tmp_path / "synthetic", "data.n": 40, "model.name": "toy_resnet18",
            "model.weights": None, "synthetic.per_group": 4, "synthetic.held_out": 2})
        assert sorted(read) == ["real", "synthetic"] and len(plan.seeds) == 4 and len(plan.missing) > 100

    @pytest.mark.parametrize("settings,words", [
        ({"generator": "no/such/folder"}, "no such folder"), ({"synthetic.prompts": "toy-smiling-mail"}, "toy-smiling-male"),
        ({"synthetic.style": "plane"}, "plain")])
    def test_what_is_not_there_is_told_before_anything_is_trained(self, tmp_path, settings, words):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            run("toy", store=tmp_path, settings=GENERATED | settings, workers=1, progress=False)
        assert not (tmp_path / "train").exists()


def _reproduce(folder, *more):
    sets = [x for k, v in GENERATED.items() for x in ("--set", f"{k}={'none' if v is None else v}")]
    places = ["--store", folder / "runs", "--out", folder / "out"]
    words = ["reproduce", "--only", "finetuning_strategies", "--seeds", "1"]
    command = [sys.executable, "-m", "aimfair.cli", *words, *places, *sets, *more]
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
        process, n = _reproduce(broken), artifacts
        made = lambda n=n: len(list(broken.glob("runs/*/*/artifact.json"))) >= n  # noqa: E731
        assert kill_when(process, made, pause=chance.uniform(0, 1)), "it ended before it was killed"
    process = _reproduce(broken)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert _tables(broken) == _tables(whole) and len(_tables(whole)) == 13


@pytest.mark.slow
def test_reproduce_writes_everything_and_the_workers_do_not_change_a_number(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    first, second = _reproduce(one, "--workers", "1"), _reproduce(two, "--workers", "2")
    errors = [process.communicate()[1] for process in (first, second)]
    assert first.returncode == second.returncode == 0, errors
    for text in errors:  # a run that went well shows no error
        assert not any(word in text for word in ("Traceback", "ERROR", "KeyboardInterrupt", "WARNING")), text
    assert _tables(one) == _tables(two)
    names = {p.name for p in (one / "out").glob("*.*")}
    for suffix in ("csv", "md", "tex", "png", "pdf"):
        assert f"finetuning_strategies.{suffix}" in names
    notebook = json.loads((one / "out" / "notebooks" / "finetuning_strategies.ipynb").read_text())
    assert not [o for c in notebook["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    start = time.perf_counter()
    assert _reproduce(one).wait() == 0
    assert time.perf_counter() - start < 60 * slowness()


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
def test_results_come_one_by_one_and_survive_an_interruption(tmp_path):
    "The first table is there while other models are still to be trained; after an interruption it stays, and so does a report of it."
    command = [sys.executable, "-m", "aimfair.cli", "reproduce", "--profile", Path(__file__).with_name("tiny.toml"),
               "--store", tmp_path / "runs", "--out", tmp_path / "out"]
    for name in ("finetuning_strategies", "tradeoff", "celeba_comparison", "utkface_comparison"):
        command += ["--only", name]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 300
    while not (tmp_path / "out" / "report.html").exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "\r" not in told
    assert re.search(r"(s|min)  finetuning_strategies: .*finetuning_strategies.md, .*finetuning_strategies.png", told), told
    page = (tmp_path / "out" / "report.html").read_text()
    finished = re.search(r"(\d) of 4; the others were not finished", page)  # 1, or more: a notebook that runs is let finish
    assert "Fine-tuning strategies" in page and finished and told.count(".md, ") <= int(finished[1]) < 4
    there = {p.name: p.stat().st_mtime for p in (tmp_path / "out").glob("finetuning_strategies*")}
    assert {"finetuning_strategies.md", "finetuning_strategies.png"} <= set(there)
    again = subprocess.run([*map(str, command[:-6])], capture_output=True, text=True)  # the first experiment alone
    assert again.returncode == 0 and "nothing to compute" in again.stderr
    assert {p.name: p.stat().st_mtime for p in (tmp_path / "out").glob("finetuning_strategies*")} == there, "its notebook was run again"
    (tmp_path / "out" / "finetuning_strategies.md").unlink()
    assert subprocess.run([*map(str, command[:-6])], capture_output=True).returncode == 0
    assert (tmp_path / "out" / "finetuning_strategies.md").exists(), "a file that somebody deleted is written again"


def test_lines_go_on_where_the_first_forecast_was_far_too_short(capsys):
    "What is left grows for a while, so the share that is done stands still; the line says so nevertheless."
    with WorkBar({"a": 100.0, "b": 100.0, "c": 100.0}, progress=True, stages={"a": "draw", "b": "train", "c": "train"}) as bar:
        bar.bar.mininterval = bar.bar.delay = 0
        bar.shown = -1
        bar("a", took=0.001)
        first = capsys.readouterr().err
        bar.shown = -1
        bar("b", took=1e6)
        assert "%" in first and "2/3" in capsys.readouterr().err


class TestForecast:
    "How long the rest takes, whatever the guesses were."

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.5, 20)), min_size=20, max_size=60), st.floats(0.1, 10), st.randoms())
    def test_guesses_that_are_all_wrong_by_one_factor_are_right_from_the_first_job_on(self, jobs, factor, chance):
        guesses = {str(i): seconds for i, (_, seconds) in enumerate(jobs)}
        forecast = Forecast(guesses, {str(i): stage for i, (stage, _) in enumerate(jobs)})
        order, left = chance.sample(list(guesses), len(guesses)), factor * sum(guesses.values())
        for name in order:
            forecast.note(name, factor * guesses[name])
            left -= factor * guesses[name]
            assert forecast.left() == pytest.approx(left, rel=1e-6, abs=1e-6)

    @given(st.dictionaries(st.sampled_from("abcd"), st.floats(0.2, 5), min_size=4), st.integers(0, 1000))
    def test_stages_that_are_wrong_by_different_factors_are_known_when_some_of_each_are_done(self, factors, seed):
        "Jobs of all stages are mixed; from a tenth of the way on, the forecast is within 30 %."
        rng = np.random.default_rng(seed)
        names = [f"{stage}{i}" for i in range(40) for stage in factors]
        guesses = {n: float(rng.uniform(1, 3)) for n in names}
        took = {n: factors[n[0]] * s * float(rng.uniform(0.9, 1.1)) for n, s in guesses.items()}
        forecast, total, spent = Forecast(guesses, {n: n[0] for n in names}), sum(took.values()), 0.0
        for n in names:
            forecast.note(n, took[n])
            spent += took[n]
            if spent >= total / 10 and total - spent > total / 20:
                assert forecast.left() == pytest.approx(total - spent, rel=0.3)


@pytest.mark.slow
@pytest.mark.real_data
def test_real_faces_end_to_end_at_tiny_size(real_data, tmp_path):
    small = {k: v for k, v in TINY.items() if not k.startswith(("data.n_", "synthetic.pool", "synthetic.kind"))}
    small |= {"data.size": 32, "model.name": "toy_resnet18"}
    results = run("celeba64", settings=small | {"data.root": str(real_data / "celeba-10k"), "synthetic.root": str(real_data / "celeba-6k")},
                  store=tmp_path, workers=1, progress=False)
    sets = results.sets()
    assert not set(sets.pool.ids) & (set(sets.train.ids) | set(sets.val.ids) | set(sets.test.ids))
    assert (len(sets.train), len(sets.val), len(sets.test)) == (80, 1000, 3000)
    assert "standing in" in results.about()["generator"]
    assert os.path.isdir(Path(tmp_path) / "cache")


@pytest.mark.slow
def test_two_at_once_on_one_store_both_end_right(tmp_path):
    second = tmp_path / "second"
    both = [_reproduce(tmp_path), _reproduce(tmp_path, "--out", second / "out")]
    errors = [p.communicate()[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], errors
    assert _tables(tmp_path) == _tables(second) and len(_tables(second)) == 13
    assert not list(tmp_path.glob("runs/*/*.partial"))


@pytest.mark.slow
def test_one_failed_experiment_is_named_and_the_others_are_done(tmp_path):
    "With k = 1 the two rankings have no tensor in common, so the ablation over k cannot be run."
    places = {"store": tmp_path / "runs", "out": tmp_path / "out"}
    done = reproduce("toy", only=["ablation_top_k", "layer_sensitivity"], seeds=1, settings=TINY | {"mask.ks": "[1]"}, workers=1,
                     progress=False, **places)
    assert list(done.failed) == ["ablation_top_k"] and "k=1 selects no tensor" in done.failed["ablation_top_k"]
    assert (places["out"] / "layer_sensitivity.md").is_file() and not list(places["out"].glob("ablation_top_k*"))
    page = done.report.read_text(encoding="utf-8")
    assert "k=1 selects no tensor" in page and "layer_sensitivity" in page


@pytest.mark.slow
def test_edits_for_diga_keep_the_target_and_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    from aimfair import baselines
    edit = Edit(load_profile("toy", GENERATED | {"edits.images": 70, "edits.denoising_steps": 3}).protocol)
    whole, broken = (Store(tmp_path / name) for name in ("whole", "broken"))
    edited, train = edited_faces(edit, whole), edit.faces(whole).train
    assert len(edited) == 140 and np.bincount(edited.protected).tolist() == [70, 70]
    chosen = np.random.default_rng(edit.protocol.synthetic.seed).permutation(len(train))[:70]
    assert sorted(edited.target) == sorted([*train.target[chosen]] * 2)  # each face twice, its target as it was
    interrupt_at(monkeypatch, baselines, "edit_protected", 2)
    with pytest.raises(KeyboardInterrupt):
        edited_faces(edit, broken)
    monkeypatch.undo()
    (part,) = broken.path(edit.artifact).with_name(f"{edit.artifact.hash}.partial").glob("*.safetensors")
    before = part.stat().st_mtime_ns
    again = edited_faces(edit, broken)
    assert (broken.path(edit.artifact) / part.name).stat().st_mtime_ns == before, "what was edited is not edited again"
    assert (again.gather(slice(None)) == edited.gather(slice(None))).all()


@pytest.mark.slow
def test_every_experiment_by_one_command(tmp_path):
    "All notebooks on a tiny world, with the bundled generator: every file is there, nothing failed, and again nothing is computed."
    command = [sys.executable, "-m", "aimfair.cli", "reproduce", "--profile", Path(__file__).with_name("tiny.toml"),
               "--store", tmp_path / "runs", "--out", tmp_path / "out"]
    first = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "158 models for 225 table rows" in first.stderr and "left out" not in first.stdout
    assert "ERROR" not in first.stderr and "Interrupt" not in first.stderr  # a run that went well shows none
    out = tmp_path / "out"
    page = (out / "report.html").read_text(encoding="utf-8")
    for name, experiment in EXPERIMENTS.items():
        for suffix in ("csv", "md", "tex"):
            assert (out / f"{name}.{suffix}").stat().st_size, name
        assert list(out.glob(f"{name}*.png")) and list(out.glob(f"{name}*.pdf")), name
        notebook = json.loads((out / "notebooks" / f"{name}.ipynb").read_text())
        assert not [o for c in notebook["cells"] for o in c.get("outputs", []) if o["output_type"] in ("error", "stream")], name
        assert experiment.title.split()[0] in page
    before = _tables(tmp_path)
    again = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert again.returncode == 0 and "nothing to compute" in again.stderr and _tables(tmp_path) == before
