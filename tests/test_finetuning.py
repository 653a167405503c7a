"Fine-tuning strategies: what may move, what may not; and the choice of k."
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from faults import interrupt_at
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import TinyViT, ramps

from aimfair.core import DataError
from aimfair.data import Faces
from aimfair.finetuning import (
    FINETUNE,
    accuracy_change,
    average_weights,
    candidate_table,
    choose_k,
    distinct_masks,
    eligible_candidates,
    finetune,
    judge,
    k_grid,
    pick_candidate,
    real_and_synthetic,
    repair,
    right_answers,
    trainable_parameters,
)
from aimfair.groups import biased_counts, group_indices, take_groups
from aimfair.metrics import fairness_report
from aimfair.models import narrow_resnet18
from aimfair.pipeline import AIMFair
from aimfair.sensitivity import Ranking, blocks, gradient_pass, make_mask, mask_shares, random_parameters, rank_units
from aimfair.training import TrainConfig, fit, layer_depths, movable_tensors, predict

SHORT = TrainConfig(epochs=1, batch_size=16, lr=0.1, weight_decay=0.1)
NAMES = [n for n, _ in narrow_resnet18(8).named_parameters()]


def faces(per_group=8, seed=0, size=32):
    rng = np.random.default_rng(seed)
    t, p = np.repeat([0, 0, 1, 1], per_group), np.tile(np.repeat([0, 1], per_group), 2)
    return Faces.from_arrays(rng.integers(0, 256, (len(t), 3, size, size), dtype=np.uint8), t, protected=p)


def test_the_defaults_are_the_papers():
    assert (FINETUNE.epochs, FINETUNE.lr, FINETUNE.batch_size, FINETUNE.momentum, FINETUNE.weight_decay) == (10, 0.06, 128, 0.9, 1e-4)


@settings(deadline=None, max_examples=10)
@given(mask=st.sets(st.sampled_from(NAMES), min_size=1), freeze=st.booleans())
def test_only_the_mask_moves_and_not_by_one_bit_more(mask, freeze):
    model = narrow_resnet18(8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuned = finetune(model, faces(), None, mask=mask, config=SHORT, freeze_batchnorm=freeze, device="cpu", progress=False).model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for name, p in tuned.named_parameters():
        assert torch.equal(p, before[name]) == (name not in mask)
        assert p.grad is None
    drifted = any(not torch.equal(v, before[k]) for k, v in tuned.named_buffers() if "running" in k)
    assert drifted != freeze


def test_frozen_tensors_get_no_gradient():
    seen = []

    class Watched(type(narrow_resnet18(8))):
        def forward(self, x):
            seen.append([n for n, p in self.named_parameters() if p.requires_grad])
            return super().forward(x)

    model = narrow_resnet18(8)
    model.__class__ = Watched
    finetune(model, faces(), None, mask={"fc.weight"}, config=SHORT, device="cpu", progress=False)
    assert ["fc.weight"] in seen and {n for names in seen[1:] for n in names} == {"fc.weight"}


@settings(deadline=None, max_examples=20)
@given(n=st.integers(10, 60).map(lambda i: 2 * i), bias=st.sampled_from([1 / 9, 0.25, 0.5, 1.0]))
def test_repaired_data_is_balanced_and_keeps_every_real_face(n, bias):
    real, pool = take_groups(faces(120, size=4), biased_counts(n, bias)), faces(60, seed=1, size=4)
    repaired = repair(real, pool)
    counts = [len(i) for i in group_indices(repaired).values()]
    assert len(set(counts)) == 1 and counts[0] == max(len(i) for i in group_indices(real).values())
    assert torch.equal(repaired.gather(slice(0, len(real))), real.gather(slice(None)))


def test_mixing_carries_no_group_labels():
    assert real_and_synthetic(faces(), faces()).protected is None


def test_an_unknown_tensor_in_the_mask_is_named():
    with pytest.raises(ValueError, match="layer9"):
        finetune(narrow_resnet18(8), faces(), None, mask={"layer9.weight"}, config=SHORT, device="cpu", progress=False)


SHAPES = {n: tuple(p.shape) for n, p in narrow_resnet18(8).named_parameters()}
PLAIN = dict(device="cpu", progress=False)


def random_booleans(seed, names, share=0.5, shapes=SHAPES):
    "A mask of elements, with at least one True."
    rng = np.random.default_rng(seed)
    mask = {n: torch.from_numpy(np.asarray(rng.random(shapes[n]) < share)) for n in names}
    mask[names[0]].view(-1)[0] = True
    return mask


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=20, unique=True), share=st.floats(0, 1))
def test_masked_out_elements_keep_every_bit_under_decay_and_momentum(seed, names, share):
    model, mask = narrow_resnet18(8), random_booleans(seed, names, share)
    config = TrainConfig(epochs=2, batch_size=16, lr=0.1, weight_decay=0.1, momentum=0.9)
    tuned = finetune(model, faces(), None, mask=mask, config=config, **PLAIN).model
    assert list(tuned.state_dict()) == list(model.state_dict())
    for (name, p), q in zip(model.named_parameters(), tuned.parameters(), strict=True):
        chosen = mask.get(name, torch.zeros(p.shape, dtype=torch.bool))
        assert torch.equal(p[~chosen].view(torch.int32), q[~chosen].view(torch.int32))
        assert not chosen.any() or not torch.equal(p[chosen], q[chosen])


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (1, 3, 1, 1), (8, 3, 3, 3), (1,)])
def test_booleans_that_hold_everything_are_the_names(shape):
    model, names = narrow_resnet18(8), {"conv1.weight", "layer2.0.bn1.bias"}
    mask = {"conv1.weight": torch.ones(shape, dtype=torch.bool), "layer2.0.bn1.bias": torch.tensor(True),
            "fc.weight": torch.zeros(1, 64, dtype=torch.bool)}
    assert trainable_parameters(model, "selective", mask) == names
    whole, fine = (finetune(model, faces(), None, mask=m, config=SHORT, **PLAIN).model for m in (names, mask))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), fine.state_dict().values(), strict=True))


def killed_after(epochs, monkeypatch, run):
    "Run until a number of epochs are over: an epoch ends with one look at the validation images."
    import aimfair.training.loop as training
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        interrupt_at(m, training, "judge", epochs + 1)
        run()


def test_a_killed_run_with_booleans_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    model, mask = narrow_resnet18(8), random_booleans(0, ["conv1.weight", "layer3.0.conv1.weight", "fc.weight"])
    config = TrainConfig(epochs=3, batch_size=16, lr=0.1, weight_decay=0.1)

    def run(mask=mask, checkpoint=tmp_path / "c.pt"):
        return finetune(model, faces(), faces(4, seed=1), mask=mask, config=config, checkpoint=checkpoint, **PLAIN)

    whole = run(checkpoint=None)
    killed_after(2, monkeypatch, run)
    other = mask | {"fc.weight": ~mask["fc.weight"]}
    for wrong in (other, set(mask)):  # the same tensors, but not the same elements
        with pytest.raises(ValueError, match="other settings"):
            run(wrong)
    resumed = run()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True))
    pd.testing.assert_frame_equal(whole.history, resumed.history)


def test_wrong_booleans_are_told_before_training():
    def run(mask):
        return finetune(narrow_resnet18(8), faces(), None, mask=mask, config=SHORT, **PLAIN)

    for mask, message in (({"fc.bias": torch.tensor([False])}, "at least one tensor"), ({}, "at least one tensor"),
                          ({"fc.bias": torch.tensor([1])}, "is int64"), ({"layer9.weight": torch.tensor([True])}, "layer9"),
                          ({"fc.weight": torch.ones(2, 64, dtype=torch.bool)}, r"broadcast to \(1, 64\)")):
        with pytest.raises(ValueError, match=message):
            run(mask)


# choosing k

def a_ranking(seed, n=12):
    rng = np.random.default_rng(seed)
    return Ranking("tensor", {f"t{i}": () for i in range(n)}, *(torch.from_numpy(rng.permutation(n) + 1) for _ in range(2)))


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), ks=st.sets(st.integers(1, 12), min_size=1))
def test_every_k_leads_to_its_mask_and_no_mask_comes_twice(seed, ks):
    ranking = a_ranking(seed)
    by_hand = {k: {f"t{i}" for i in range(12) if ranking.domain[i] <= k and ranking.bias[i] <= k} for k in ks}
    if not any(by_hand.values()):
        with pytest.raises(ValueError, match=f"first meet at k={ranking.smallest_k}"):
            distinct_masks(ranking, ks)
        return
    found = distinct_masks(ranking, ks)
    assert {k: mask for same, mask in found.items() for k in same} == {k: m for k, m in by_hand.items() if m}
    assert len({frozenset(m) for m in found.values()}) == len(found)
    assert [same[0] for same in found] == sorted(same[0] for same in found)


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), tensors=st.integers(1, 70), n=st.integers(2, 12))
def test_the_grid_holds_the_papers_k_and_nothing_empty(seed, tensors, n):
    ranking = a_ranking(seed, tensors)
    grid = k_grid(ranking, n)
    assert grid == sorted(set(grid)) and len(grid) <= n + 1
    assert all(ranking.mask(k) for k in grid) and grid[0] == ranking.smallest_k and grid[-1] == tensors
    assert max(ranking.smallest_k, max(1, round(tensors * 55 / 62))) in grid


figure = st.integers(0, 20).map(lambda i: i / 20)
FIGURES = ["val_accuracy", "val_change", "val_change_se", "worst_group_loss", "equalized_odds", "elements"]


def fairer(a, b):
    "Whether a beats b: surer of its worst synthetic group, or fairer, or as fair and more accurate on real images, or as good and smaller."
    if a["worst_group_loss"] != b["worst_group_loss"]:
        return a["worst_group_loss"] < b["worst_group_loss"]
    if a["equalized_odds"] != b["equalized_odds"]:
        return a["equalized_odds"] < b["equalized_odds"]
    if a["val_accuracy"] != b["val_accuracy"]:
        return a["val_accuracy"] > b["val_accuracy"]
    return a["elements"] < b["elements"]


@settings(max_examples=100)
@given(rows=st.lists(st.tuples(figure, st.integers(-4, 4), st.integers(0, 3), figure, figure, st.integers(1, 3)), min_size=1, max_size=8),
       tolerance=st.sampled_from([0, 1, 2]))
def test_the_pick_loses_to_no_candidate_that_is_accurate_enough(rows, tolerance):
    figures = {10 * (i + 1): dict(zip(FIGURES, row, strict=True)) for i, row in enumerate(rows)}
    accurate = {k for k, row in figures.items() if row["val_change"] + tolerance * row["val_change_se"] >= 0}
    table = candidate_table(figures)
    assert set(table.index[eligible_candidates(table, tolerance)]) == accurate
    if not accurate:
        with pytest.raises(ValueError, match=f"by more than {tolerance} standard errors"):
            pick_candidate(table, tolerance)
        return
    picked = pick_candidate(table, tolerance)
    assert picked in accurate
    for k in accurate - {picked}:
        assert not fairer(figures[k], figures[picked])
        assert fairer(figures[picked], figures[k]) or picked < k, "of equals the first"


@pytest.mark.parametrize(("rows", "picked"), [
    ({0: (0.93, 0, 0, 0.7, 0.2, 0), 50: (0.91, -0.02, 0.01, 0.4, 0.1, 20), 60: (0.9, -0.03, 0.01, 0.2, 0.05, 30)}, 50),  # the last is worse
    ({0: (0.93, 0, 0, 0.7, 0.2, 0), 60: (0.9, -0.03, 0.01, 0.2, 0.05, 30)}, 0),  # nothing beats the model as it is
    ({0: (0.93, 0, 0, 0.3, 0.2, 0), 60: (0.95, 0.02, 0.01, 0.4, 0.05, 30)}, 0),
    ({40: (0.93, 0, 0, 0.5, 0.2, 10), 50: (0.93, 0, 0, 0.5, 0.1, 20)}, 50),  # equalized odds decide
    ({40: (0.925, 0, 0, 0.5, 0.1, 10), 50: (0.93, 0, 0, 0.5, 0.1, 20)}, 50),  # then accuracy
    ({40: (0.93, 0, 0, 0.5, 0.1, 20), 50: (0.93, 0, 0, 0.5, 0.1, 10)}, 50),  # then what moves less
    ({40: (0.93, 0, 0, 0.5, 0.1, 10), 50: (0.93, 0, 0, 0.5, 0.1, 10)}, 40)])
def test_picks_by_hand(rows, picked):
    assert pick_candidate(candidate_table({k: dict(zip(FIGURES, row, strict=True)) for k, row in rows.items()})) == picked


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_a_change_is_paired_by_image(answers):
    right, before = np.array(answers).T
    n, won, lost = len(answers), sum(a and not b for a, b in answers), sum(b and not a for a, b in answers)
    found = accuracy_change(right, before)
    assert found["val_change"] == pytest.approx((won - lost) / n) == pytest.approx(right.mean() - before.mean())
    assert found["val_accuracy"] == right.mean()
    assert found["val_change_se"] ** 2 == pytest.approx((won + lost - (won - lost) ** 2 / n) / n**2)  # McNemar's


def by_hand(model, images):
    "Worst-group loss and accuracy and equalized odds, from the logits of every image."
    p = predict(model, images, device="cpu")
    cells, signed = [p.target, p.protected], p.logit * (2 * p.target - 1)
    right = (p.prediction == p.target).groupby(cells).mean()
    return {"worst_group_loss": pytest.approx(np.logaddexp(0, -signed.astype(float)).groupby(cells).mean().max(), abs=1e-6),
            "worst_group_accuracy": pytest.approx(right.min()),
            "equalized_odds": pytest.approx(sum(abs(right[t, 0] - right[t, 1]) for t in (0, 1)) / 2)}


def test_a_judge_counts_right_answers_and_leaves_the_model_alone():
    model, held_out = narrow_resnet18(8).train(), faces(6, seed=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert judge(model, held_out, device="cpu") == by_hand(model, held_out)
    p = predict(model, held_out, device="cpu")
    assert right_answers(model, held_out, device="cpu").tolist() == (p.prediction == p.target).tolist()
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_judge_of_several_classes_takes_the_loss_of_the_right_one():
    rng, model = np.random.default_rng(0), narrow_resnet18(8, n_outputs=3)
    images = Faces.from_arrays(rng.integers(0, 256, (18, 3, 32, 32), dtype=np.uint8), np.arange(18) % 3, protected=np.arange(18) // 9)
    z = predict(model, images, device="cpu").filter(like="logit_").to_numpy(float)
    losses = pd.Series(np.log(np.exp(z).sum(1)) - z[np.arange(18), images.target])
    found = judge(model, images, device="cpu")["worst_group_loss"]
    assert found == pytest.approx(losses.groupby([images.target, images.protected]).mean().max(), abs=1e-6)


# averages

@settings(deadline=None, max_examples=5)
@given(share=st.floats(0, 1), freeze=st.booleans())
def test_an_average_lies_between_and_leaves_what_was_held(share, freeze):
    start, mask = narrow_resnet18(8), {"conv1.weight", "layer2.0.bn1.bias", "fc.weight"}
    how = dict(mask=mask, config=SHORT, freeze_batchnorm=freeze, **PLAIN)
    tuned, mixed = (finetune(start, faces(), faces(4, seed=1), **how, **more) for more in ({}, {"average": share}))
    before, after = start.state_dict(), tuned.model.state_dict()
    for name, value in mixed.model.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, (1 - share) * before[name] + share * after[name], atol=1e-5), name
    assert all(torch.equal(p, before[n]) for n, p in mixed.model.named_parameters() if n not in mask)
    right = right_answers(mixed.model, faces(4, seed=1), device="cpu")
    assert mixed.val_accuracy == right.mean() and mixed.best_epoch == tuned.best_epoch
    pd.testing.assert_frame_equal(mixed.history, tuned.history)


def test_further_criteria_choose_among_averages():
    "Each criterion keeps the average of its own epoch, and says what that is worth."
    start, val, criteria = narrow_resnet18(8), faces(4, seed=1), {"first": lambda z: -float(z[0, 0])}
    how = dict(mask={"fc.weight", "fc.bias"}, config=TrainConfig(epochs=3, batch_size=16, lr=0.1), criteria=criteria, **PLAIN)
    tuned, mixed = (finetune(start, faces(), val, **how, **more) for more in ({}, {"average": 0.5}))
    assert tuned.best["first"].epoch == mixed.best["first"].epoch == tuned.history["first"].argmax()
    assert torch.allclose(mixed.best["first"].state["fc.weight"], (start.fc.weight + tuned.best["first"].state["fc.weight"]) / 2)
    again = narrow_resnet18(8)
    again.load_state_dict(mixed.best["first"].state)
    assert mixed.best["first"].value == pytest.approx(-predict(again, val, device="cpu").logit[0])
    assert mixed.best["val_accuracy"].value == mixed.val_accuracy


# batches that mix real and synthetic images

def test_real_images_have_their_share_of_the_batches_and_no_step_is_added(monkeypatch):
    import aimfair.finetuning as finetuning
    seen, real_fit = {}, finetuning.fit
    def spied(model, train, val, **how):
        seen.update(train=train, **how)
        return real_fit(model, train, val, **how)

    monkeypatch.setattr(finetuning, "fit", spied)
    synthetic, real = faces(8), faces(20, seed=5)
    finetune(narrow_resnet18(8), synthetic, None, strategy="linear_probe", mix=real, share=0.25, config=SHORT, **PLAIN)
    assert len(seen["train"]) == 112 and seen["train"].protected is None and seen["config"].steps == 2
    chances = seen["sampling"] / seen["sampling"].sum()
    is_real = [bool((image == real.gather(slice(None))).flatten(1).all(1).any()) for image in seen["train"].gather(slice(None))]
    assert chances[is_real].sum() == pytest.approx(0.25) and len(set(chances[is_real])) == 1 and sum(is_real) == 80


def test_a_mix_of_the_same_images_is_as_good_as_none():
    "Half of what is drawn is told apart by nothing, so that only the order differs: the mask holds, and the model learns."
    start, mask, images = narrow_resnet18(8), {"fc.weight"}, faces(8)
    tuned = finetune(start, images, None, mask=mask, mix=images, config=SHORT, **PLAIN).model
    moved = [n for (n, a), b in zip(start.named_parameters(), tuned.parameters(), strict=True) if not torch.equal(a, b)]
    assert moved == ["fc.weight"]
    for share in (0, 1):
        with pytest.raises(ValueError, match=f"share is {share}"):
            finetune(start, images, None, mask=mask, mix=images, share=share, config=SHORT, **PLAIN)


def test_the_ends_of_an_average_and_what_has_none():
    a, b = narrow_resnet18(8), narrow_resnet18(8)
    for share, end in ((0, a), (1, b)):
        assert all(torch.equal(x, y) for x, y in zip(average_weights(a, b, share).parameters(), end.parameters(), strict=True))
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="expected the share of the later weights"):
            average_weights(a, b, wrong)
    with pytest.raises(ValueError, match="different tensors"):
        average_weights(a, narrow_resnet18(16))


CHOOSING = TrainConfig(epochs=2, batch_size=16, lr=0.05, scale=(0.7, 1.0))


def choose(world, **changes):
    return choose_k(**{**world, "ks": [3, 30, 31, 45, 62], "config": CHOOSING, **PLAIN, **changes})


@pytest.fixture(scope="module")
def world():
    model = narrow_resnet18(8)
    rng = np.random.default_rng(3)
    gradients = {name: {n: torch.from_numpy(np.asarray(rng.normal(size=s), np.float32)) for n, s in SHAPES.items()}
                 for name in ("real", "synthetic_biased", "synthetic_balanced")}
    return dict(model=model, synthetic=faces(8), val=faces(6, seed=1), held_out=faces(6, seed=2), gradients=gradients)


@pytest.fixture(scope="module")
def chosen(world):
    return choose(world)


class TestChooseK:
    def test_the_figures_are_those_of_finetuning_each_mask_alone(self, world, chosen):
        ranking = rank_units(**world["gradients"])
        assert chosen.table.index[0] == 0 and chosen.start == {name: chosen.table.loc[0, name] for name in chosen.start}
        for k, row in chosen.table.iloc[1:].iterrows():
            tuned = finetune(world["model"], world["synthetic"], world["val"], mask=ranking.mask(k), config=CHOOSING, **PLAIN).model
            real, was = predict(tuned, world["val"], device="cpu"), predict(world["model"], world["val"], device="cpu")
            right, before = ((p.prediction == p.target).to_numpy() for p in (real, was))
            assert {name: row[name] for name in accuracy_change(right, before)} == accuracy_change(right, before)
            found = by_hand(tuned, world["held_out"])
            assert {name: row[name] for name in found} == found
            assert row.tensors == len(ranking.mask(k)) and row.elements == sum(int(np.prod(SHAPES[n])) for n in ranking.mask(k))
        accurate = chosen.table[chosen.table.val_change + 2 * chosen.table.val_change_se > -1e-9]
        assert chosen.table.worst_group_loss[chosen.k] == accurate.worst_group_loss.min() and chosen.table.chosen.sum() == 1
        assert chosen.table.index[chosen.table.eligible].tolist() == accurate.index.tolist()
        assert chosen.mask == (ranking.mask(chosen.k) if chosen.k else set()) and chosen.table.chosen[chosen.k]
        best = chosen.candidates[chosen.k].model.state_dict()
        assert all(torch.equal(a, b) for a, b in zip(chosen.fitted.model.state_dict().values(), best.values(), strict=True))

    def test_the_unchanged_model_is_chosen_where_nothing_is_fairer(self, world):
        "A model that knows every held-out image, and candidates that learn images like those with the wrong labels."
        target, protected = np.repeat([0, 1], 16), np.tile([0, 1], 16)
        light = np.where(target, 160, 60)[:, None, None, None] + np.random.default_rng(4).integers(0, 40, (2, 32, 3, 32, 32))
        held_out, wrong = (Faces.from_arrays(x.astype(np.uint8), t, protected=protected)
                           for x, t in zip(light, (target, 1 - target), strict=True))
        learn = TrainConfig(epochs=25, batch_size=16, lr=0.05, scale=(1, 1), flip=0, milestones=())
        sure = finetune(world["model"], held_out, held_out, strategy="full", config=learn, **PLAIN).model
        assert (predict(sure, held_out, device="cpu").prediction == target).all()
        found = choose(world, model=sure, synthetic=wrong, val=wrong, held_out=held_out, ks=[45, 62], config=learn)
        assert (found.table.worst_group_loss[1:] > found.table.worst_group_loss[0]).all()
        assert found.k == 0 and found.mask == set() and found.table.chosen[0] and len(found.fitted.history) == 0
        same = zip(found.fitted.model.state_dict().values(), sure.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in same)
        row = found.table.loc[0]
        assert (row.val_change, row.val_change_se, row.tensors, row.elements) == (0, 0, 0, 0)
        assert (found.shown()[""] == "unchanged").sum() == 1 and found.plot()

    def test_every_candidate_is_tuned_as_one_asks(self, world):
        found = choose(world, ks=[45], average=0.25, freeze_batchnorm=True)
        how = dict(mask=rank_units(**world["gradients"]).mask(45), config=CHOOSING, average=0.25, freeze_batchnorm=True)
        alone = finetune(world["model"], world["synthetic"], world["val"], **how, **PLAIN).model
        same = zip(found.candidates[45].model.state_dict().values(), alone.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in same)

    def test_no_group_of_a_real_image_is_looked_at(self, world, chosen):
        shuffled = Faces.from_arrays(world["val"].gather(slice(None)).numpy(), world["val"].target, protected=np.arange(24) % 3)
        for val in (world["val"].without_groups(), shuffled):
            again = choose(world, val=val)
            pd.testing.assert_frame_equal(again.table, chosen.table)
            assert again.k == chosen.k

    def test_a_killed_search_goes_on_and_a_mask_is_tuned_once(self, world, chosen, tmp_path, monkeypatch):
        killed_after(3, monkeypatch, lambda: choose(world, checkpoint=tmp_path))
        assert len(list(tmp_path.glob("candidate-*.pt"))) == 2
        again = choose(world, checkpoint=tmp_path)
        assert len(list(tmp_path.glob("*.pt"))) == len(again.table) - 1 == len(chosen.table) - 1
        pd.testing.assert_frame_equal(again.table, chosen.table)

    def test_a_short_search_ends_with_the_whole_training(self, world):
        short = choose(world, epochs=1, ks=[40, 50])
        assert {len(c.history) for k, c in short.candidates.items() if k} == {1} and len(short.fitted.history) in (0, 2)
        short = short if short.k else choose(world, epochs=1, ks=[40, 50], tolerance=float("inf"))
        whole = finetune(world["model"], world["synthetic"], world["val"], mask=short.mask, config=CHOOSING, **PLAIN).model
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), short.fitted.model.parameters(), strict=True))

    def test_channels(self, world):
        ranking = rank_units(**world["gradients"], grain="channel")
        found = choose(world, gradients=ranking, ks=[0.6, 0.9])
        assert found.table.index.tolist() == [0, 0.6, 0.9] and (isinstance(found.mask, dict) or found.k == 0)
        by_hand = {n: torch.broadcast_to(m, SHAPES[n]).sum() for n, m in ranking.mask(0.6).items()}
        assert found.table.elements[0.6] == sum(by_hand.values()) and found.table.tensors[0.6] == len(by_hand)

    def test_hindsight_is_the_report_of_each_candidate(self, chosen):
        test = faces(5, seed=7)
        found = chosen.hindsight(test, device="cpu")
        for k, fitted in chosen.candidates.items():
            p = predict(fitted.model, test, device="cpu")
            report = fairness_report(p.target, p.prediction, sensitive_features=p.protected)
            assert found.worst_group_accuracy[k] == report.worst_group_accuracy and found.accuracy[k] == report.accuracy
        assert found.index[found.chosen].tolist() == [chosen.k]

    def test_it_shows_itself(self, chosen):
        shown = chosen.shown()
        assert len(shown) == len(chosen.table) and shown[""].isin(["chosen", "unchanged"]).sum() == 1 and shown["k"].iloc[0] == "none"
        assert "2 standard errors" in chosen.rule and "worst-group loss" in chosen.rule
        assert "synthetic worst group" in repr(chosen) and "<table" in chosen._repr_html_()
        assert [len(ax.lines[0].get_xdata()) for ax in chosen.plot().axes] == [len(chosen.table) - 1] * 2

    def test_held_out_images_that_are_trained_on_are_refused(self, world):
        own = world["synthetic"]
        with pytest.raises(DataError, match="1 images of held_out are trained on, 5 among them"):
            choose(world, held_out=Faces.concat([world["held_out"].select(slice(6, None)), own.select([5])]))
        with pytest.raises(DataError, match="no image of group 1_1"):
            choose(world, held_out=world["held_out"].select(slice(0, 18)))
        with pytest.raises(ValueError, match="no protected attribute"):
            choose(world, held_out=world["held_out"].without_groups())

    def test_wrong_ks(self, world):
        first = rank_units(**world["gradients"]).smallest_k
        with pytest.raises(ValueError, match=f"first meet at k={first}"):
            choose(world, ks=[1, first - 1])
        with pytest.raises(ValueError, match="k=63 is not a whole number from 1 to 62"):
            choose(world, ks=[63])


# adapters

@pytest.fixture
def adapted():
    "A small transformer with LoRA on its attention and a head of its own, and its tensors that may move."
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(TinyViT(), peft.LoraConfig(r=2, target_modules=["qkv", "proj"], modules_to_save=["head"]))
    with torch.no_grad():  # as after some training; at its start one half of an adapter is zero
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    return model, [n for n, p in model.named_parameters() if p.requires_grad]


def test_of_a_network_with_adapters_they_and_the_saved_head_are_ranked(adapted):
    model, names = adapted
    assert len(names) == 3 * 2 * 2 + 2 and movable_tensors(model) == names
    sets = {"real": ramps(64, 0), "synthetic_biased": ramps(64, 1), "synthetic_balanced": ramps(64, 2)}
    gradients = {s: gradient_pass(model, data, batch_size=32, device="cpu") for s, data in sets.items()}
    assert all(list(g) == names and all(v.any() for v in g.values()) for g in gradients.values())
    mask = make_mask(model, "absolute", gradients=gradients)
    assert mask and mask <= set(names) and len(rank_units(**gradients)) == len(names)
    assert random_parameters(model, 1.0) == set(names) == set().union(*blocks(model).values())
    assert [p.requires_grad for p in model.parameters()] == [n in names for n, _ in model.named_parameters()]
    rows = mask_shares(model, mask)
    assert set(rows.index[rows > 0]) == mask


@pytest.mark.parametrize("strategy", ["selective", "full", "linear_probe"])
def test_what_adapters_hold_still_keeps_every_bit(adapted, strategy):
    model, names = adapted
    before = {n: v.clone() for n, v in model.state_dict().items()}
    part = {"selective": "blocks.1", "full": "", "linear_probe": "head"}[strategy]
    chosen = {n for n in names if part in n}
    config = TrainConfig(epochs=2, batch_size=16, lr=0.01, optimizer="adamw", weight_decay=0.1, warmup=0.1, schedule="cosine",
                         layer_decay=0.9)
    assert trainable_parameters(model, strategy, chosen) == chosen
    fitted = finetune(model, ramps(64, 0), ramps(30, 1), strategy=strategy, mask=chosen if strategy == "selective" else None, config=config,
                      **PLAIN)
    after = fitted.model.state_dict()
    assert {n for n, v in before.items() if not torch.equal(v, after[n])} == chosen
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items()), "the model handed in is left untouched"
    assert [n for n, p in fitted.model.named_parameters() if p.requires_grad] == names


def test_masks_of_what_adapters_hold_still_are_refused(adapted):
    model, names = adapted
    base = next(n for n, _ in model.named_parameters() if n not in names)
    with pytest.raises(ValueError, match=f"{base!r} of PeftModel cannot be updated: it is frozen beside adapters"):
        finetune(model, ramps(32, 0), None, mask={base}, config=SHORT, **PLAIN)
    import peft
    headless = peft.get_peft_model(TinyViT(), peft.LoraConfig(r=2, target_modules=["qkv"]))
    with pytest.raises(ValueError, match="the head of PeftModel is frozen beside its adapters"):
        trainable_parameters(headless, "linear_probe")


def test_adapters_that_were_loaded_frozen_are_told_in_a_line(adapted, tmp_path):
    import peft
    model, names = adapted
    model.save_pretrained(tmp_path)
    frozen = peft.PeftModel.from_pretrained(TinyViT(), tmp_path)
    for attempt in (lambda: fit(frozen, ramps(32, 0), None, config=SHORT, **PLAIN),
                    lambda: gradient_pass(frozen, ramps(32, 0), device="cpu"),
                    lambda: finetune(frozen, ramps(32, 0), None, strategy="full", config=SHORT, **PLAIN), lambda: AIMFair(frozen)):
        with pytest.raises(ValueError, match="^the adapters of PeftModel are frozen, .*is_trainable=True") as told:
            attempt()
        assert "\n" not in str(told.value)
    ready = peft.PeftModel.from_pretrained(TinyViT(), tmp_path, is_trainable=True)
    assert movable_tensors(ready) == names and len(gradient_pass(ready, ramps(32, 0), device="cpu")) == len(names)


def test_adapters_that_transformers_added_are_known_too():
    peft = pytest.importorskip("peft")
    model = hugging_face_vit()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.classifier.requires_grad_(True)
    names = movable_tensors(model)
    assert len(names) == 3 * 2 * 2 + 2 and all("lora_" in n or "classifier" in n for n in names)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    after = finetune(model, ramps(32, 0), None, strategy="full", config=SHORT, **PLAIN).model.state_dict()
    assert {n for n, v in before.items() if not torch.equal(v, after[n])} <= set(names)


def test_the_whole_method_with_adapters(adapted):
    model, names = adapted
    pool, config = ramps(240, 2), TrainConfig(epochs=1, batch_size=16, lr=0.01, optimizer="adamw", accumulate=2, scale=(0.8, 1), flip=0)
    aim = AIMFair(model, config=config, gradient_batch_size=16, majority="0_0,1_1", **PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        debiased = aim.fit(real=ramps(64, 0), synthetic=pool, val=ramps(40, 1))
    moved = {n for (n, a), b in zip(model.named_parameters(), debiased.model.parameters(), strict=True) if not torch.equal(a, b)}
    assert moved == set(debiased.mask) <= set(names) and list(debiased.sensitivity.index) == names


def test_tensors_that_a_plain_network_came_with_frozen_may_move():
    model = TinyViT()
    model.blocks.requires_grad_(False)
    assert movable_tensors(model) == [n for n, _ in model.named_parameters()]
    tuned = finetune(model, ramps(32, 0), None, strategy="full", config=SHORT, **PLAIN).model
    assert not torch.equal(tuned.blocks[0].qkv.weight, model.blocks[0].qkv.weight)


def test_integers_never_move():
    class Counting(TinyViT):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.arange(4), requires_grad=False)

    model = Counting()
    assert "table" not in movable_tensors(model) and "table" not in trainable_parameters(model, "full")
    assert "table" not in gradient_pass(model, ramps(32, 0), batch_size=16, device="cpu")
    tuned = finetune(model, ramps(32, 0), None, strategy="full", config=SHORT, **PLAIN).model
    assert tuned.table.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="'table' of Counting cannot be updated"):
        finetune(model, ramps(32, 0), None, mask={"table"}, config=SHORT, **PLAIN)


def test_finetuning_and_every_candidate_for_k_tell_a_callback():
    told, model, twice = [], TinyViT(), SHORT.model_copy(update={"epochs": 2})
    finetune(model, ramps(40, 0), None, strategy="full", config=twice, callback=lambda *w: told.append(w[:2]), **PLAIN)
    assert told == [(3, 0), (6, 1)]
    told.clear()
    sets = {"real": ramps(64, 0), "synthetic_biased": ramps(64, 1), "synthetic_balanced": ramps(64, 2)}
    gradients = {s: gradient_pass(model, data, batch_size=32, device="cpu") for s, data in sets.items()}
    found = choose_k(model, ramps(64, 3), ramps(40, 4), ramps(64, 5), gradients=gradients, ks=[30, 38], config=SHORT,
                     callback=lambda *w: told.append(w[:2]), **PLAIN)
    assert told == [(4, 0)] * (len(found.table) - 1)


def hugging_face_vit():
    from transformers import ViTConfig, ViTForImageClassification
    return ViTForImageClassification(ViTConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
                                               image_size=16, patch_size=4, num_labels=2))


def convnext():
    timm = pytest.importorskip("timm")
    return timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), patch_size=2, num_classes=1)


class Tower(torch.nn.Module):
    "A CLIP vision tower with a head."

    def __init__(self):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel
        self.tower = CLIPVisionModel(CLIPVisionConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
                                                      image_size=16, patch_size=4))
        self.head = torch.nn.Linear(24, 1)

    def forward(self, x):
        return self.head(self.tower(x).pooler_output)


@pytest.mark.parametrize("make,layers,size", [(hugging_face_vit, 6, 16), (convnext, 7, 32), (Tower, 7, 16)])
def test_the_whole_method_on_transformers_and_their_kin(make, layers, size):
    "Trained, ranked and fine-tuned in pieces with the optimiser that such networks want; what is not in the mask keeps every bit."
    torch.manual_seed(0)
    modern = TrainConfig(epochs=6, batch_size=16, lr=3e-3, optimizer="adamw", weight_decay=0.05, schedule="cosine", warmup=0.1,
                         layer_decay=0.8, clip=1.0, accumulate=2, scale=(0.8, 1), flip=0)
    model = make()
    assert len(set(layer_depths(model).values())) == layers
    history = fit(model, ramps(160, 0, size), None, config=modern, **PLAIN).history
    assert history.loss.iloc[-1] < 0.6 * history.loss.iloc[0]
    aim = AIMFair(model, config=modern.model_copy(update={"epochs": 1}), gradient_batch_size=16, majority="0_0,1_1", **PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        debiased = aim.fit(real=ramps(64, 0, size), synthetic=ramps(240, 2, size), val=ramps(40, 1, size))
    moved = {n for (n, a), b in zip(model.named_parameters(), debiased.model.parameters(), strict=True) if not torch.equal(a, b)}
    assert moved and moved <= set(debiased.mask) < set(movable_tensors(model))
