"Fine-tuning strategies: what may move, what may not; and the choice of k."
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aimfair.data import DataError, Faces
from aimfair.finetuning import (
    FINETUNE,
    choose_k,
    distinct_masks,
    finetune,
    k_grid,
    only_elements,
    pick_candidate,
    real_and_synthetic,
    repair,
    trainable_parameters,
)
from aimfair.metrics import fairness_report
from aimfair.sensitivity import Ranking, biased_counts, group_indices, rank_units, take_groups
from aimfair.training import TrainConfig, narrow_resnet18, predict

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


def test_frozen_tensors_get_no_gradient(monkeypatch):
    import aimfair.training as training
    seen = []
    original = training._train_mode

    def spy(model, freeze):
        seen.append([n for n, p in model.named_parameters() if p.requires_grad])
        return original(model, freeze)

    monkeypatch.setattr(training, "_train_mode", spy)
    finetune(narrow_resnet18(8), faces(), None, mask={"fc.weight"}, config=SHORT, device="cpu", progress=False)
    assert seen == [["fc.weight"]]


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


def test_chosen_elements_move_as_in_numpy():
    "SGD with momentum and decay, written out; a channel's booleans broadcast."
    rng = np.random.default_rng(0)
    w, x, y = rng.normal(size=(3, 4)), rng.normal(size=(10, 4)), rng.normal(size=(10, 3))
    layer, mask = torch.nn.Linear(4, 3, bias=False).double(), {"weight": torch.tensor([[True], [False], [True]])}
    layer.weight.data.copy_(torch.from_numpy(w))
    with only_elements(layer, mask):
        sgd = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9, weight_decay=0.3)
        for _ in range(5):
            sgd.zero_grad()
            ((layer(torch.from_numpy(x)) - torch.from_numpy(y)) ** 2).mean().backward()
            sgd.step()
    chosen, v, start = np.array([True, False, True]), np.zeros((3, 4)), w.copy()
    for _ in range(5):
        v = 0.9 * v + 2 * (x @ w.T - y).T @ x / y.size + 0.3 * w
        w[chosen] -= 0.05 * v[chosen]
    assert layer.weight.detach().numpy() == pytest.approx(w, abs=1e-12)
    assert (layer.weight.detach().numpy()[1] == start[1]).all()


def step(layer):
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5)
    layer(torch.ones(1, 3)).sum().backward()
    sgd.step()


def test_other_models_are_not_held_and_nothing_stays_behind():
    held, other = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    start, keys = [p.detach().clone() for p in (held.weight, other.weight)], list(held.state_dict())
    with pytest.raises(KeyboardInterrupt), only_elements(held, {"weight": torch.tensor([[True, False, False]])}):
        step(other)
        step(held)
        raise KeyboardInterrupt
    assert (other.weight != start[1]).all() and (held.weight != start[0]).tolist() == [[True, False, False]]
    assert list(held.state_dict()) == keys
    step(held)
    assert (held.weight != start[0]).all()


def killed_after(epochs, monkeypatch, run):
    "Run until a number of epochs are over."
    import aimfair.training as training
    original, done = training._train_epoch, []

    def epoch(*args, **kwargs):
        if len(done) == epochs:
            raise KeyboardInterrupt
        done.append(1)
        return original(*args, **kwargs)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(training, "_train_epoch", epoch)
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


@settings(max_examples=100)
@given(rows=st.lists(st.tuples(figure, figure, figure, st.integers(1, 3)), min_size=1, max_size=8),
       tolerance=st.sampled_from([0, 0.01, 0.1, 1]))
def test_the_rule_is_what_it_says(rows, tolerance):
    table = pd.DataFrame(rows, columns=["val_accuracy", "worst_group_accuracy", "equalized_odds", "elements"])
    best = max(r[0] for r in rows)
    allowed = [i for i, r in enumerate(rows) if best - r[0] <= tolerance + 1e-9]
    fairest = min(allowed, key=lambda i: (-rows[i][1], rows[i][2], -rows[i][0], rows[i][3], i))
    assert pick_candidate(table, tolerance) == fairest


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
        for k, row in chosen.table.iterrows():
            tuned = finetune(world["model"], world["synthetic"], world["val"], mask=ranking.mask(k), config=CHOOSING, **PLAIN).model
            real, known = predict(tuned, world["val"], device="cpu"), predict(tuned, world["held_out"], device="cpu")
            assert row.val_accuracy == (real.prediction == real.target).mean()
            right = (known.prediction == known.target).groupby([known.target, known.protected]).mean()
            assert row.worst_group_accuracy == pytest.approx(right.min())
            assert row.equalized_odds == pytest.approx(sum(abs(right[t, 0] - right[t, 1]) for t in (0, 1)) / 2)
            assert row.tensors == len(ranking.mask(k)) and row.elements == sum(int(np.prod(SHAPES[n])) for n in ranking.mask(k))
        assert chosen.k == pick_candidate(chosen.table, 0.01) and chosen.table.chosen.sum() == 1
        assert chosen.mask == ranking.mask(chosen.k) and chosen.table.chosen[chosen.k]
        best = chosen.candidates[chosen.k].model.state_dict()
        assert all(torch.equal(a, b) for a, b in zip(chosen.fitted.model.state_dict().values(), best.values(), strict=True))

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
        assert len(list(tmp_path.glob("*.pt"))) == len(again.table) == len(chosen.table)
        pd.testing.assert_frame_equal(again.table, chosen.table)

    def test_a_short_search_ends_with_the_whole_training(self, world):
        short = choose(world, epochs=1, ks=[40, 50])
        assert {len(c.history) for c in short.candidates.values()} == {1} and len(short.fitted.history) == 2
        whole = finetune(world["model"], world["synthetic"], world["val"], mask=short.mask, config=CHOOSING, **PLAIN).model
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), short.fitted.model.parameters(), strict=True))

    def test_channels(self, world):
        ranking = rank_units(**world["gradients"], grain="channel")
        found = choose(world, gradients=ranking, ks=[0.6, 0.9])
        assert found.k in (0.6, 0.9) and isinstance(found.mask, dict)
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
        assert len(shown) == len(chosen.table) + 1 and (shown[""] == "chosen").sum() == 1 and shown.k.iloc[0] == "none"
        assert "synthetic worst group" in repr(chosen) and "<table" in chosen._repr_html_()
        assert len(chosen.plot().axes[0].lines[0].get_xdata()) == len(chosen.table)

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
