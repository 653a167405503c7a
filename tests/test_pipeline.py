"The method as one object: unknown models, no group labels, the experiments' numbers, mistakes, and runs that are interrupted."

import copy
import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from faults import interrupt_at
from torch import nn

from aimfair import finetuning
from aimfair.data import DataError, Faces, batches
from aimfair.device import seeded
from aimfair.finetuning import choose_k
from aimfair.groups import group_indices, take_groups
from aimfair.models import image_size, narrow_resnet18, read_weights
from aimfair.pipeline import AIMFair, method
from aimfair.repro import FineTune, Store, load_profile, mask_of, sensitivity
from aimfair.sensitivity import mean_gradients
from aimfair.training import TrainConfig, fit, predict

FOUR = [(0, 0), (0, 1), (1, 0), (1, 1)]
BIASED = {(0, 1): 9, (1, 0): 9, (0, 0): 1, (1, 1): 1}
MILD = {"scale": (0.7, 1), "flip": 0, "milestones": ()}
QUICK = TrainConfig(epochs=1, batch_size=32, lr=0.01, **MILD)
RUN = {"config": QUICK, "gradient_batch_size": 16, "device": "cpu", "progress": False}
AUTO = {**RUN, "k": "auto", "majority": "0_1,1_0"}

# pool and real sets of a few images only: what they show is checked elsewhere
pytestmark = pytest.mark.filterwarnings("ignore:The model handed in gets", "ignore:no sample with")


def times(counts, n):
    return {g: n * c for g, c in counts.items()}


def ramps(counts, seed, photo=True, size=32):
    "Faint ramps (the target: their direction) with a colour cast (the protected attribute): {(target, protected): images} -> Faces."
    rng = np.random.default_rng(seed)
    t, p = np.repeat(np.array(list(counts)), list(counts.values()), axis=0)[rng.permutation(sum(counts.values()))].T
    n, u = len(t), np.linspace(-1, 1, size)
    angle = np.pi * (1 - t[:, None, None]) if t.max() < 2 else 2 * np.pi * t[:, None, None] / 3
    ramp = rng.uniform(0, 0.4, (n, 1, 1)) * (np.cos(angle) * u + np.sin(angle) * u[:, None])
    ramp = ramp + rng.uniform(-0.3, 0.3, (n, 1, 1)) * u[:, None]
    cast = rng.normal(30, 12, (n, 1, 1)) * (2 * p[:, None, None] - 1)
    x = np.stack([128 + 45 * ramp + cast, 128 + 45 * ramp, 128 + 45 * ramp - cast], 1)
    x = x * rng.uniform(0.7, 1.1, (n, 1, 1, 1)) + rng.normal(0, 28, x.shape) if photo else x + rng.normal(0, 8, x.shape)
    return Faces.from_arrays(x.clip(0, 255).astype(np.uint8), t, p)


class PoisonedFaces(Faces):
    "Faces whose groups nobody may look at."
    @property
    def protected(self):
        raise AssertionError("the groups of real images were read")

    @protected.setter
    def protected(self, value):
        pass


def poisoned(faces):
    return PoisonedFaces(faces._sources, faces._source, faces._row, faces.target, faces.protected, faces.ids)


def sets(size=32, n=4, groups=BIASED):
    return {"real": ramps(times(groups, n), 0, size=size), "val": ramps(times(groups, 2), 1, size=size),
            "synthetic": ramps({g: 22 for g in groups}, 2, photo=False, size=size)}


@pytest.fixture(scope="module")
def small():
    return sets()


@pytest.fixture(scope="module")
def network():
    with seeded(0):
        return narrow_resnet18(8)


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def moved(before, after):
    return [n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(a, b)]


class Answer(SimpleNamespace):
    "An output as model libraries return it."


class OddNet(nn.Module):
    "A network as people write them: names of its own, no batch norm, a `view`, an output object, the head not last."

    def __init__(self, n_outputs):
        super().__init__()
        self.Entscheidung = nn.Linear(8 * 16, n_outputs)
        self.stamm_1, self.ψ = nn.Conv2d(3, 8, 5, stride=4), nn.ModuleDict({"mitte": nn.Conv2d(8, 8, 3, padding=1)})
        self.schräg = nn.Parameter(torch.zeros(8, 1, 1))
        self.drop = nn.Dropout(0.2)

    def forward(self, bilder):
        x = self.stamm_1(bilder).relu()
        x = nn.functional.adaptive_avg_pool2d(x + self.ψ["mitte"](x).relu() + self.schräg, 4)
        return Answer(logits=self.Entscheidung(self.drop(x).view(x.shape[0], -1)), features=x)


def odd_net(n_outputs=1, seed=0):
    with seeded(seed):
        return OddNet(n_outputs)


# --- fairer


def test_a_biased_model_becomes_fairer():
    "The paper's claim at the size of a test: the worst group gains much, on synthetic images put aside and on real ones."
    real, val = ramps(times(BIASED, 50), 0), ramps(times(BIASED, 10), 1)
    pool, test = ramps(dict.fromkeys(FOUR, 250), 3, photo=False), ramps(dict.fromkeys(FOUR, 150), 2)
    with seeded(0):
        start = narrow_resnet18(8)
    biased = fit(start, real, val, config=TrainConfig(epochs=2, batch_size=64, lr=0.02, **MILD), device="cpu", progress=False).model
    before = copy.deepcopy(biased.state_dict())
    config = TrainConfig(epochs=4, batch_size=64, lr=0.03, **MILD)
    result = AIMFair(biased, **{**RUN, "config": config}).fit(real=poisoned(real), synthetic=pool, val=poisoned(val), test=test)
    report = result.report
    for images, least in (("synthetic", 0.3), ("test", 0.2)):
        worst_before, worst_after = report.value(images, "worst_group_accuracy")
        assert worst_after > worst_before + least, report
        assert report.value(images, "equalized_odds")[1] < report.value(images, "equalized_odds")[0] - 0.2, report
    assert report.setup["majority"] == ["0_1", "1_0"] and report.setup["majority_source"] == "model"
    assert report.setup["images"] == {"real": 1000, "validation": 200, "synthetic_biased": 500, "synthetic_balanced": 900,
                                      "synthetic_held_out": 100, "test": 600}
    assert same_state(before, biased.state_dict())
    assert sorted(moved(biased, result.model)) == sorted(result.mask)
    assert list(result.sensitivity.index[result.sensitivity.selected]) == result.mask


# --- models never seen


def vision_transformer():
    timm = pytest.importorskip("timm")
    with seeded(0):
        return timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, num_classes=2, depth=2)


def test_vision_transformer():
    model, images = vision_transformer(), sets(size=64, n=2)
    before, mode = copy.deepcopy(model.state_dict()), model.training
    result = AIMFair(model, **RUN).fit(**images)
    assert same_state(before, model.state_dict()) and model.training == mode
    assert moved(model, result.model) and set(moved(model, result.model)) <= set(result.mask)
    assert len(result.sensitivity) == len(list(model.parameters()))
    assert type(result.model) is type(model) and not result.model.training
    assert image_size(model) == 64


def test_odd_network_without_batch_norm(small):
    model = odd_net()
    model.ψ.requires_grad_(False)  # someone froze a layer; the mask decides
    before = copy.deepcopy(model.state_dict())
    result = AIMFair(model, **RUN).fit(**small)
    assert same_state(before, model.state_dict()) and model.training and not model._forward_pre_hooks
    assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in model.parameters()]
    assert type(result.model) is OddNet and not result.model._forward_pre_hooks
    assert set(moved(model, result.model)) == set(result.mask) < set(dict(model.named_parameters()))
    x = torch.zeros(1, 3, 32, 32)
    assert result.model(x).logits.shape == (1, 1)


def test_three_classes_and_three_groups():
    groups = {(t, p): 1 + 8 * (t == p) for t in range(3) for p in range(3)}
    images = sets(groups=groups)
    result = AIMFair(odd_net(3), bias=0.25, majority={0: 0, 1: 1, 2: 2}, **RUN).fit(**images, test=ramps(dict.fromkeys(groups, 3), 5))
    setup = result.report.setup
    # of 22 a group 2 are put aside; 20 + 2 * 5 a target
    assert setup["images"]["synthetic_biased"] == 3 * (20 + 5 + 5) and setup["images"]["synthetic_balanced"] == 9 * 20
    assert setup["majority"] == ["0_0", "1_1", "2_2"] and setup["majority_source"] == "given"
    assert len([1 for images, figure in result.report.figures.index if images == "test" and figure[0].isdigit()]) == 9
    assert "given by the user" in repr(result)


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_normalisation_of_the_model_is_respected(small, n_outputs):
    "A model that wants ImageNet's values, and one with that step inside, end up with the same bits."
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    class Inside(OddNet):
        def forward(self, x):
            x = (x * 0.5 + 0.5 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
            return super().forward(x)

    plain, inside = odd_net(n_outputs), Inside(n_outputs)
    inside.load_state_dict(plain.state_dict())
    told = AIMFair(plain, mean=mean, std=std, **RUN).fit(**small)
    assert same_state(told.model.state_dict(), AIMFair(inside, **RUN).fit(**small).model.state_dict())
    assert not same_state(told.model.state_dict(), AIMFair(plain, **RUN).fit(**small).model.state_dict())


@pytest.mark.parametrize(("strategy", "tensors"), [("full", 62), ("linear_probe", 2)])
def test_other_strategies(network, small, strategy, tensors):
    result = AIMFair(network, strategy=strategy, **RUN).fit(**small)
    assert len(result.mask) == tensors == result.report.setup["updated"] and result.sensitivity is None
    assert set(moved(network, result.model)) <= set(result.mask)


def test_batch_norm_statistics_stay_when_asked(network, small):
    still, drift = (AIMFair(network, freeze_batchnorm=f, **RUN).fit(**small).model for f in (True, False))
    mean = "layer1.0.bn1.running_mean"
    assert torch.equal(still.state_dict()[mean], network.state_dict()[mean])
    assert not torch.equal(drift.state_dict()[mean], network.state_dict()[mean])


# --- no group labels, and the same numbers


def test_groups_of_real_images_are_never_read(network, small):
    rng = np.random.default_rng(0)
    plain = AIMFair(network, **RUN).fit(**small)
    for hide in (poisoned, lambda f: f.without_groups(),
                 lambda f: Faces(f._sources, f._source, f._row, f.target, rng.permutation(f.protected), f.ids)):
        other = AIMFair(network, **RUN).fit(**{**small, "real": hide(small["real"]), "val": hide(small["val"])})
        assert same_state(plain.model.state_dict(), other.model.state_dict())
        assert plain.report.to_dict() == other.report.to_dict()


def test_test_images_without_groups_give_accuracy_alone(network, small):
    test = ramps(times(BIASED, 3), 9)
    known, unknown = (AIMFair(network, **RUN).fit(**small, test=f).report for f in (test, test.without_groups()))
    assert unknown.value("test", "accuracy") == known.value("test", "accuracy")
    assert [f for s, f in unknown.figures.index if s == "test"] == ["accuracy"]
    assert "worst_group_accuracy" in [f for s, f in known.figures.index if s == "test"]


def darkened(faces, which):
    "The same faces, those at some positions without light."
    pixels = faces.gather(slice(None)).numpy().copy()
    pixels[which] = 0
    return Faces.from_arrays(pixels, faces.target, faces.protected, faces.ids)


def test_held_out_images_are_not_learned_from(network, small):
    "Of 22 a group the last two are for the report alone: other pixels there change the report's figures, and no weight."
    pool = small["synthetic"]
    network = fit(copy.deepcopy(network), pool, None, config=QUICK.model_copy(update={"epochs": 4}), device="cpu", progress=False).model
    last, first = (np.concatenate([i[part] for i in group_indices(pool).values()]) for part in (slice(20, 22), slice(0, 2)))
    plain, measured, learned = (AIMFair(network, **AUTO | {"k": None}).fit(**{**small, "synthetic": faces})
                                for faces in (pool, darkened(pool, last), darkened(pool, first)))
    assert plain.report.figures.loc[("synthetic", "accuracy"), "n"] == 8
    assert same_state(plain.model.state_dict(), measured.model.state_dict())
    assert not same_state(plain.model.state_dict(), learned.model.state_dict())
    assert not plain.report.figures.loc["synthetic"].equals(measured.report.figures.loc["synthetic"])


def test_held_out_images_may_be_given(network, small):
    "Then nothing is put aside: the report measures by those images, and all others are learned from."
    held_out = ramps(dict.fromkeys(FOUR, 3), 8, photo=False)
    given = AIMFair(network, **RUN).fit(**small, held_out=held_out).report
    counts = given.setup["images"]
    assert (counts["synthetic_held_out"], counts["synthetic_balanced"]) == (12, 4 * 22)
    assert given.figures.loc[("synthetic", "accuracy"), "n"] == 12
    assert "were given for that alone" in repr(given) and "put aside" not in repr(given)


def test_groups_of_a_fixed_size(network, small):
    result = AIMFair(network, per_group=7, **RUN).fit(**small)
    assert result.report.setup["images"]["synthetic_balanced"] == 28 and result.report.setup["per_group"] == 7
    with pytest.raises(DataError, match="per_group is 21; of group 0_0 there are 20 synthetic images to learn from"):
        AIMFair(network, per_group=21, **RUN).fit(**small)


def test_the_biased_set_is_no_larger_than_the_real_one(network, small):
    photos = small["real"].select(np.arange(30))
    assert AIMFair(network, **RUN).fit(**{**small, "real": photos}).report.setup["images"]["synthetic_biased"] <= 30
    with pytest.raises(DataError, match="real has 6 images, too few for a synthetic set of that size with bias 0.111"):
        AIMFair(network, **RUN).fit(**{**small, "real": small["real"].select(np.arange(6))})


def test_a_seed_gives_one_result(network, small):
    one, two, other = (AIMFair(network, seed=s, **RUN).fit(**small) for s in (0, 0, 1))
    assert same_state(one.model.state_dict(), two.model.state_dict()) and one.report.to_dict() == two.report.to_dict()
    assert not same_state(one.model.state_dict(), other.model.state_dict())


def test_global_random_state_is_neither_read_nor_moved(network, small):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        state = torch.get_rng_state()
        results.append(AIMFair(network, **RUN).fit(**small).model.state_dict())
        assert torch.equal(state, torch.get_rng_state())
    assert same_state(*results)


# --- the experiments' numbers


@pytest.mark.parametrize("settings", [{}, {"data.bias": "1/4", "mask.batch_size": 300, "mask.k": 40, "run.freeze_batchnorm": True}])
def test_the_experiments_make_the_same_model(tmp_path, settings):
    "From the images of a profile AIMFair makes the very model that the paper's experiments make, and measures it alike."
    quick = {"synthetic.kind": "studio", "synthetic.pool": 45, "data.n_train": 600}
    protocol = load_profile(Path(__file__).with_name("tiny.toml"), quick | settings).protocol
    store, job = Store(tmp_path), FineTune(protocol, "selective", 3, "absolute")
    images, biased_model = job.faces(store), job.biased_model.model(store)
    aim = AIMFair(biased_model, k=protocol.mask.k, bias=protocol.data.bias, per_group=protocol.synthetic.per_group, majority="0_1,1_0",
                  config=protocol.finetune, gradient_batch_size=protocol.mask.batch_size, seed=3, progress=False,
                  freeze_batchnorm=protocol.run.freeze_batchnorm)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Gradients were taken in one batch")
        result = aim.fit(real=images.train, synthetic=images.pool, val=images.val, held_out=images.held_out, test=images.test)
    assert same_state(result.model.state_dict(), job.model(store).state_dict())
    assert set(result.mask) == mask_of(protocol, 3, store)
    pd.testing.assert_frame_equal(result.sensitivity, sensitivity(protocol, 3, store), check_exact=True)
    right = predict(job.model(store), images.test)
    assert result.report.value("test", "accuracy")[1] == (right.prediction == right.target).mean()


# --- k chosen by itself


@pytest.fixture(scope="module")
def larger(small):
    return {**small, "synthetic": ramps(dict.fromkeys(FOUR, 50), 2, photo=False)}


@pytest.fixture(scope="module")
def automatic(network, larger):
    return AIMFair(network, **AUTO).fit(**larger)


def gradients_by_hand(model, faces, batch_size, seed=0):
    order = torch.Generator().manual_seed(seed)
    one_pass = batches(faces, batch_size, shuffle=True, drop_last=True, augment=QUICK.augment(), generator=order, device="cpu")
    return mean_gradients(model, one_pass, seed=seed, device="cpu")


def same_result(a, b):
    assert same_state(a.model.state_dict(), b.model.state_dict()) and a.mask == b.mask
    assert a.report.to_dict() == b.report.to_dict()
    pd.testing.assert_frame_equal(a.sensitivity, b.sensitivity, check_exact=True)
    pd.testing.assert_frame_equal(a.report.choice.table, b.report.choice.table, check_exact=True)


def test_auto_is_choose_k_by_hand(network, larger, automatic):
    "Of 50 synthetic images a group, in order: 36 are learned from, 9 are for the choice, 5 for the report."
    pool, where = larger["synthetic"], group_indices(larger["synthetic"])
    rest, aside = (pool.select(np.sort(np.concatenate([i[part] for i in where.values()]))) for part in (slice(36), slice(36, 45)))
    balanced = take_groups(rest, dict.fromkeys(FOUR, 36))
    images = {"real": larger["real"], "synthetic_biased": take_groups(rest, times(BIASED, 4)), "synthetic_balanced": balanced}
    gradients = {name: gradients_by_hand(network, faces, 16) for name, faces in images.items()}
    chosen = choose_k(network, balanced, larger["val"], aside, gradients=gradients, config=QUICK, device="cpu", progress=False)
    pd.testing.assert_frame_equal(automatic.report.choice.table, chosen.table, check_exact=True)
    assert automatic.report.setup["k"] == chosen.k and set(automatic.mask) == chosen.mask
    assert same_state(automatic.model.state_dict(), chosen.fitted.model.state_dict())
    assert list(automatic.sensitivity.index[automatic.sensitivity.selected]) == automatic.mask
    counts = automatic.report.setup["images"]
    assert [counts[f"synthetic_{s}"] for s in ("biased", "balanced", "for_k", "held_out")] == [80, 144, 36, 20]


def test_prompts_are_put_aside_whole(network, larger, automatic):
    "From 25 prompts a group, two images each, two prompts are for the report and four to choose by."
    pool = larger["synthetic"]
    prompts = np.empty(len(pool), object)
    for group, index in group_indices(pool).items():
        prompts[index] = [f"{group} {i % 25}" for i in range(50)]
    result = AIMFair(network, **AUTO).fit(**larger, prompts=prompts)
    setup = result.report.setup
    assert [setup["images"][f"synthetic_{s}"] for s in ("for_k", "held_out", "balanced")] == [4 * 8, 4 * 4, 4 * 38]
    assert setup["held_out_prompts"] and not automatic.report.setup["held_out_prompts"]
    assert setup["rule"] == result.report.choice.rule and "2 standard errors" in setup["rule"]


def test_a_model_that_no_candidate_improves_is_handed_back_as_it_was(network, larger):
    "Steps that are too small to move anything: of equal candidates the one that moves nothing is taken."
    still = QUICK.model_copy(update={"lr": 1e-30})
    with pytest.warns(UserWarning, match="The model is unchanged"):
        result = AIMFair(network, **AUTO | {"config": still}, freeze_batchnorm=True).fit(**larger)
    assert result.report.setup["k"] == 0 and result.mask == [] and not result.sensitivity.selected.any()
    assert same_state(result.model.state_dict(), network.state_dict()) and len(result.history) == 0


def test_averages_and_mixes_are_those_of_finetuning(network, small):
    how = dict(strategy="full", majority="0_1,1_0", average=0.5, mix=0.25, freeze_batchnorm=True)
    result = AIMFair(network, **RUN, **how).fit(**small)
    pool = small["synthetic"]
    learn = pool.select(np.sort(np.concatenate([i[:20] for i in group_indices(pool).values()])))
    by_hand = finetuning.finetune(network, learn, small["val"], strategy="full", average=0.5, mix=small["real"], share=0.25,
                                  freeze_batchnorm=True, config=QUICK, device="cpu", progress=False)
    assert same_state(result.model.state_dict(), by_hand.model.state_dict())
    assert (result.report.setup["average"], result.report.setup["mix"]) == (0.5, 0.25)


def test_auto_reads_no_group_of_a_real_image(network, larger, automatic):
    same_result(AIMFair(network, **AUTO).fit(**{**larger, "real": poisoned(larger["real"]), "val": poisoned(larger["val"])}), automatic)


def test_auto_tells_what_it_chose_from(automatic, tmp_path):
    folder, table = automatic.save(tmp_path / "out"), automatic.report.choice.table
    report = json.loads((folder / "report.json").read_text())
    k = report["setup"]["k"]
    assert list(report["candidates"]) == ["0", *map(str, table.index[1:])]  # the unchanged model once, with the figures that count
    assert [name for name, row in report["candidates"].items() if row.get("chosen")] == [str(k)]
    assert report["candidates"][str(k)]["worst_group_accuracy"] == table.worst_group_accuracy[k]
    assert f"k = {k})" in repr(automatic) and (folder / "report.md").read_text().count("| chosen |") == 1
    assert automatic.report.choice.rule in repr(automatic)
    assert repr(automatic.report.choice) in repr(automatic) and automatic.report.choice._repr_html_() in automatic._repr_html_()


def test_auto_with_a_normalisation_keeps_candidates_that_can_be_judged(larger):
    result = AIMFair(odd_net(), mean=(0.5,) * 3, std=(0.25,) * 3, **AUTO).fit(**larger)
    choice = result.report.choice
    again = choice.hindsight(larger["val"], device="cpu")
    assert again.accuracy.tolist() == choice.table.val_accuracy.tolist() and not result.model._forward_pre_hooks


def test_auto_measures_and_chooses_by_the_images_that_were_given(network, larger):
    "Images that a choice was made by flatter it, and the report says so."
    held_out = ramps(dict.fromkeys(FOUR, 6), 8, photo=False)
    report = AIMFair(network, **AUTO).fit(**larger, held_out=held_out).report
    counts = report.setup["images"]
    assert (counts["synthetic_for_k"], counts["synthetic_held_out"], counts["synthetic_balanced"]) == (24, 24, 4 * 50)
    assert "the 24 synthetic images measured above, whose figures it flatters" in repr(report)
    chosen = report.choice.table.loc[report.setup["k"]]
    assert report.value("synthetic", "worst_group_accuracy")[1] == chosen.worst_group_accuracy


def test_auto_interrupted_goes_on(network, larger, automatic, tmp_path, monkeypatch):
    with monkeypatch.context() as interrupted:
        interrupt_at(interrupted, finetuning, "finetune", 3)
        with pytest.raises(KeyboardInterrupt):
            AIMFair(network, **AUTO).fit(**larger, checkpoint=tmp_path)
    finished = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file() and f.name != "run.json"}
    assert len([f for f in finished if f.parent != tmp_path]) == 2 and len(finished) == 5  # two candidates, three gradient passes
    same_result(AIMFair(network, **AUTO).fit(**larger, checkpoint=tmp_path), automatic)
    assert {f: f.stat().st_mtime_ns for f in finished} == finished  # nothing was computed again


@pytest.mark.parametrize(("changes", "message"), [
    ({"val": None}, "val is a NoneType; expected Faces"),
    ({"synthetic": ramps(dict.fromkeys(FOUR, 49), 2)}, 'the synthetic images have 49 of group 0_0; at least 50 are needed for k="auto"'),
])
def test_mistakes_with_auto(network, larger, changes, message):
    with pytest.raises(ValueError) as caught:
        AIMFair(network, **AUTO).fit(**{**larger, **changes})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_auto_puts_nothing_aside_where_there_is_no_mask(network, small):
    assert AIMFair(network, strategy="full", **AUTO).fit(**small).report.choice is None


# --- reports and folders


def test_report_is_strict_json_and_displays(network, small, tmp_path):
    test = ramps({(0, 0): 4, (0, 1): 4, (1, 0): 4}, 9)  # an empty cell: undefined, never perfect
    result = AIMFair(network, **RUN).fit(**small, test=test)
    folder = result.save(tmp_path / "out")
    report = json.loads((folder / "report.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    assert report["figures"]["test"]["worst_group_accuracy"]["after"] is None
    assert report["figures"]["synthetic"]["accuracy"]["n"] == 8
    assert json.loads((folder / "mask.json").read_text())["tensors"] == result.mask
    pd.testing.assert_frame_equal(pd.read_csv(folder / "sensitivity.csv", index_col=0), result.sensitivity, check_exact=False)
    assert "undefined" in result._repr_markdown_() and "Taken as frequent" in result._repr_html_()
    assert same_state(read_weights(folder / "model.safetensors"), result.model.state_dict())


def test_saving_overwrites_only_when_asked_and_leaves_nothing_half(network, small, tmp_path, monkeypatch):
    result = AIMFair(network, **RUN).fit(**small)
    folder = result.save(tmp_path / "out")
    with pytest.raises(FileExistsError, match="not empty"):
        result.save(folder)
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            result.save(target, overwrite=True)
    assert os.listdir(tmp_path) == ["out"] and (folder / "history.csv").is_file()


# --- mistakes, told in a line


def tail(faces, n=200, **changes):
    fields = {"target": faces.target[:n], "protected": faces.protected[:n]} | changes
    return Faces.from_arrays(faces.gather(slice(0, n)), **fields)


MISTAKES = {
    "one group": (lambda s: {"synthetic": tail(s["synthetic"], protected=0 * s["synthetic"].protected)}, "1 value of the protected"),
    "groups unknown": (lambda s: {"synthetic": s["synthetic"].without_groups()}, "no groups"),
    "a small pool": (lambda s: {"synthetic": tail(s["synthetic"], 30)}, "at least 10 are needed"),
    "other sizes": (lambda s: {"real": sets(size=16)["real"]}, "real has images of 16 x 16, the synthetic ones are 32 x 32"),
    "targets out of range": (lambda s: {"val": tail(s["val"], target=s["val"].target[:200] * 2)}, "val has the target 2"),
    "negative targets": (lambda s: {"real": tail(s["real"], target=s["real"].target[:200] - 1)}, "real has the target -1"),
    "one class": (lambda s: {"real": s["real"].select(s["real"].target == 1)}, "all of target 1"),
    "no validation image": (lambda s: {"val": s["val"].select([])}, "val is empty"),
    "no real image": (lambda s: {"real": s["real"].select([])}, "real is empty"),
    "no validation set": (lambda s: {"val": None}, "val is a NoneType; expected Faces"),
    "no such folder": (lambda s: {"synthetic": "nowhere"}, "nowhere: no such file or folder"),
    "a table": (lambda s: {"synthetic": pd.DataFrame()}, "synthetic is a DataFrame"),
    "nothing put aside of a group": (lambda s: {"held_out": s["synthetic"].select(s["synthetic"].protected == 0)},
                                     "held_out has no image of group 0_1"),
    "put aside without groups": (lambda s: {"held_out": s["synthetic"].without_groups()}, "no protected attribute"),
    "put aside in another size": (lambda s: {"held_out": sets(size=16)["synthetic"]}, "held_out has images of 16 x 16"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_images(network, small, mistake):
    change, message = MISTAKES[mistake]
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        AIMFair(network, **RUN).fit(**{**small, **change(small)})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("options", "message"), [
    ({"k": 0}, "k=0 is not a whole number from 1 to 62"), ({"k": 63}, "from 1 to 62"), ({"k": 2.5}, "k=2.5"),
    ({"k": "best"}, 'k=.best. is not .* nor "auto"'),
    ({"bias": 1}, "bias is 1"), ({"bias": -0.1}, "bias is -0.1"), ({"strategy": "some"}, "there are selective, full, linear_probe"),
    ({"per_group": 1}, "per_group is 1; expected a whole number of 2 or more"), ({"per_group": "all"}, "per_group is 'all'"),
    ({"average": 0}, "average is 0; expected the share"), ({"mix": 1}, "mix is 1"), ({"tolerance": -1}, "tolerance is -1"),
    ({"gradient_batch_size": 1}, "expected 2 or more"), ({"mean": (0, 0, 0)}, "three numbers each"),
    ({"mean": (0, 0, 0), "std": (1, 0, 1)}, "above 0"), ({"model": "resnet18"}, "model is a str"), ({"model": nn.ReLU()}, "no parameters"),
])
def test_mistakes_in_options(network, options, message):
    with pytest.raises(ValueError, match=message):
        AIMFair(**{"model": network, **RUN, **options})


def test_mistakes_met_on_the_way(network, small):
    with pytest.raises(ValueError, match="OddNet has 1 output for 3 classes; expected 3"):
        AIMFair(odd_net(1), **RUN).fit(**sets(groups={(t, p): 2 for t in range(3) for p in range(2)}))
    with pytest.raises(ValueError, match="has 1000 outputs for 2 classes; expected 1 or 2"):
        AIMFair(odd_net(1000), **RUN).fit(**small)
    with pytest.raises(ValueError, match="does not work on images of 32 x 32: "):
        AIMFair(vision_transformer(), **RUN).fit(**small)
    with pytest.raises(ValueError, match="a group that the images lack"):
        AIMFair(network, majority="0_1,1_2", **RUN).fit(**small)
    with pytest.raises(DataError, match="too small for bias 0.001"):
        AIMFair(network, bias=0.001, **RUN).fit(**small)


def test_a_k_that_selects_nothing_names_one_that_does(small):
    with pytest.raises(ValueError, match="k=1 selects no tensor: the two rankings first meet at k="):
        AIMFair(odd_net(), k=1, **RUN).fit(**small)


def test_a_set_smaller_than_a_batch_is_one_batch_and_says_so(network, small):
    with pytest.warns(UserWarning, match="one batch of 44 instead of batches of 60: the set synthetic_biased"):
        result = AIMFair(network, **{**RUN, "gradient_batch_size": 60}).fit(**small)
    assert result.report.setup["gradient_batch_size"] == 60 and result._repr_markdown_().count("instead of batches of 60") == 1


@pytest.mark.filterwarnings("default:The model handed in gets")
def test_a_model_no_better_than_chance_is_questioned(network, small):
    wrong = tail(small["val"], target=1 - small["val"].target)
    with pytest.warns(UserWarning, match="size and normalisation"):
        for val in (small["val"], wrong):  # a model can't be good at both
            AIMFair(network, **RUN).fit(**{**small, "val": val})


# --- killed and continued, in one process


def test_interrupted_run_ends_with_the_same_bits(network, small, tmp_path, monkeypatch):
    whole = AIMFair(network, **{**RUN, "config": QUICK.model_copy(update={"epochs": 2})})
    expected, real_pass, passes = whole.fit(**small), method.gradient_pass, []
    with monkeypatch.context() as interrupted:
        interrupt_at(interrupted, method, "gradient_pass", 3)
        with pytest.raises(KeyboardInterrupt):
            whole.fit(**small, checkpoint=tmp_path / "kept")
    monkeypatch.setattr(method, "gradient_pass", lambda model, faces, **how: passes.append(len(faces)) or real_pass(model, faces, **how))
    result = whole.fit(**small, checkpoint=tmp_path / "kept")
    assert passes == [80]  # the third set alone: D_S2
    assert same_state(result.model.state_dict(), expected.model.state_dict())
    assert result.report.to_dict() == expected.report.to_dict()
    pd.testing.assert_frame_equal(result.sensitivity, expected.sensitivity, check_exact=True)


@pytest.mark.parametrize("change", ["model", "images", "option", "held_out"])
def test_a_checkpoint_of_another_run_is_refused(network, small, tmp_path, change):
    AIMFair(network, **RUN).fit(**small, checkpoint=tmp_path)
    model = odd_net() if change == "model" else network
    images = {**small, "real": ramps(times(BIASED, 4), 7)} if change == "images" else small
    images = images | ({"held_out": ramps(dict.fromkeys(FOUR, 2), 8, photo=False)} if change == "held_out" else {})
    with pytest.raises(ValueError, match="unfinished work of another run"):
        AIMFair(model, **(RUN | {"seed": 1} if change == "option" else RUN)).fit(**images, checkpoint=tmp_path)
