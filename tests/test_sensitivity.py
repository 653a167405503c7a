"Selective mask generation against re-derivations in plain torch and pandas."
import copy
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from aimfair.data import Augment, Faces, batches, normalize
from aimfair.groups import biased_counts, take_groups
from aimfair.models import classification_loss, head_of, narrow_resnet18
from aimfair.sensitivity import (
    block_parameters,
    blocks,
    cosine_distance,
    gradient_pass,
    group_gradients,
    make_mask,
    mask_shares,
    mask_size,
    mean_gradients,
    plot_masks,
    plot_sensitivity,
    random_parameters,
    rank_units,
    select_parameters,
    sensitivity_table,
)


def faces(n=64, seed=0):
    rng = np.random.default_rng(seed)
    return Faces.from_arrays(rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), rng.integers(0, 2, n), protected=rng.integers(0, 2, n))


def test_mean_gradients_in_train_mode_are_autograds_averaged():
    model, data = narrow_resnet18(8), faces()
    ours = mean_gradients(model, batches(data, 16), device="cpu")
    other, total = copy.deepcopy(model).train(), None
    for i in range(0, 64, 16):
        x, y = normalize(data.gather(slice(i, i + 16))), torch.tensor(data.target[i : i + 16]).float()
        g = torch.autograd.grad(F.binary_cross_entropy_with_logits(other(x.contiguous()).squeeze(1), y), list(other.parameters()))
        total = g if total is None else [a + b for a, b in zip(total, g, strict=True)]
    for (name, _), g in zip(model.named_parameters(), total, strict=True):
        assert torch.allclose(ours[name], g / 4, atol=1e-6, rtol=1e-4)


def test_the_model_is_left_as_it_was():
    model = narrow_resnet18(8).eval()
    model.conv1.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    gradients = mean_gradients(model, batches(faces(), 16), device="cpu")
    group_gradients(model, faces(), batch_size=16, device="cpu")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training and not model.conv1.weight.requires_grad and all(p.grad is None for p in model.parameters())
    assert gradients["conv1.weight"].abs().sum() > 0


@pytest.mark.parametrize("bias", [1 / 9, 2 / 8, 4 / 6, 1.0])
def test_one_pass_answers_for_every_ratio(bias):
    "The weighted sum equals separate passes over sets of that ratio, in the mode with fixed batch statistics."
    rng = np.random.default_rng(1)
    t, p = np.repeat([0, 0, 1, 1], 90), np.tile(np.repeat([0, 1], 90), 2)
    pool = Faces.from_arrays(rng.integers(0, 256, (360, 3, 32, 32), dtype=np.uint8), t, protected=p)
    model = narrow_resnet18(8)
    counts = biased_counts(180, bias)
    subset = take_groups(pool, counts)
    separate = mean_gradients(model, batches(subset, 180), train_mode=False, device="cpu")
    groups = group_gradients(model, subset, batch_size=37, device="cpu")
    mixed = groups.mix(counts)
    error = sum((mixed[n] - separate[n]).double().square().sum() for n in separate).sqrt()
    assert error <= 1e-5 * sum(g.double().square().sum() for g in separate.values()).sqrt()
    for n in separate:  # and tensor by tensor, measured against the terms of the sum, which may cancel
        terms = sum(counts[g] / 180 * groups.mean[g][n].norm() for g in counts)
        assert (mixed[n] - separate[n]).norm() <= 1e-5 * terms + 1e-9


@pytest.mark.parametrize(("n", "size", "passes"), [(64, 16, 1), (70, 16, 1), (40, 64, 1), (64, 24, 3)])
def test_the_methods_pass_is_shuffled_augmented_and_in_whole_batches(n, size, passes):
    "One stream of chance goes through all passes; written out with `batches` and autograd."
    model, data, augment = narrow_resnet18(8), faces(n), Augment(scale=(0.5, 1.0))
    ours = gradient_pass(model, data, batch_size=size, augment=augment, passes=passes, seed=5, device="cpu")
    generator, probe, seen = torch.Generator().manual_seed(5), copy.deepcopy(model).train(), []
    for _ in range(passes):
        for x, y, *_ in batches(data, min(size, n), shuffle=True, drop_last=True, augment=augment, generator=generator):
            assert len(x) == min(size, n)
            loss = F.binary_cross_entropy_with_logits(probe(x.contiguous())[:, 0], y.float())
            seen.append(torch.autograd.grad(loss, list(probe.parameters())))
    assert len(seen) == passes * max(1, n // size)
    for name, *gradients in zip(ours, *seen, strict=True):
        assert torch.allclose(ours[name], sum(gradients) / len(seen), atol=1e-6, rtol=1e-4)
    again = gradient_pass(model, data, batch_size=size, augment=augment, passes=passes, seed=5, device="cpu")
    other = gradient_pass(model, data, batch_size=size, augment=augment, passes=passes, seed=6, device="cpu")
    assert all(torch.equal(ours[k], again[k]) for k in ours) and not torch.equal(ours["conv1.weight"], other["conv1.weight"])


def test_a_pass_shows_a_bar_where_it_is_asked_to(capsys, monkeypatch):
    "On a terminal; a log is told nothing of work that takes seconds."
    gradient_pass(narrow_resnet18(8), faces(32), batch_size=8, device="cpu", progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    gradient_pass(narrow_resnet18(8), faces(32), batch_size=8, passes=2, device="cpu", progress=True, name="real")
    shown = capsys.readouterr().err
    assert "gradients, real" in shown and "8/8" in shown
    gradient_pass(narrow_resnet18(8), faces(32), batch_size=8, device="cpu")
    assert capsys.readouterr().err == ""


def test_losses_of_gradients_are_told_rows_where_batches_know_them():
    model, data, told = narrow_resnet18(8), faces(32), []

    def loss_fn(logits, y, rows):
        told.append(rows)
        return 2 * classification_loss(logits, y)

    plain = mean_gradients(model, batches(data, 16), device="cpu")
    double = mean_gradients(model, batches(data, 16), loss_fn=loss_fn, device="cpu")
    assert torch.cat(told).tolist() == list(range(32)) and torch.allclose(double["fc.bias"], 2 * plain["fc.bias"])
    pairs = [(x, y) for x, y, *_ in batches(data, 16)]
    told.clear()
    assert torch.equal(mean_gradients(model, pairs, loss_fn=loss_fn, device="cpu")["fc.bias"], double["fc.bias"]) and told == [None, None]


def test_augmented_passes_repeat_with_their_seed():
    model, data = narrow_resnet18(8), faces()
    a, b, c = (group_gradients(model, data, augment=Augment(), seed=s, device="cpu").mix() for s in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(a["conv1.weight"], c["conv1.weight"])


tensors = st.lists(st.tuples(*[st.floats(-10, 10, width=32)] * 3), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(values=tensors, k=st.integers(1, 12))
def test_selection_is_the_intersection_of_two_sorted_lists(values, k):
    names = [f"t{i}" for i in range(len(values))]
    real, biased, balanced = ({n: torch.tensor([v[j]]) for n, v in zip(names, values, strict=True)} for j in range(3))
    sets = dict(real=real, synthetic_biased=biased, synthetic_balanced=balanced)
    if k > len(names):
        with pytest.raises(ValueError, match=f"k={k}"):
            select_parameters(**sets, k=k)
        return
    domain = sorted(range(len(names)), key=lambda i: abs(float(real[names[i]].double() - biased[names[i]].double())))
    bias = sorted(range(len(names)), key=lambda i: -abs(float(biased[names[i]].double() - balanced[names[i]].double())))
    expected = {names[i] for i in set(domain[:k]) & set(bias[:k])}
    if expected:
        assert select_parameters(**sets, k=k) == expected
    else:
        with pytest.raises(ValueError, match="first meet at k=") as e:
            select_parameters(**sets, k=k)
        smallest = int(str(e.value).split("first meet at k=")[1].split()[0])
        assert select_parameters(**sets, k=smallest)
        assert smallest == 1 or not set(domain[: smallest - 1]) & set(bias[: smallest - 1])


@pytest.mark.parametrize("k", [0, -1, 63, 2.5, True])
def test_k_out_of_range(k):
    g = {n: p.detach() for n, p in narrow_resnet18(8).named_parameters()}
    with pytest.raises(ValueError, match="from 1 to 62"):
        sensitivity_table(real=g, synthetic_biased=g, synthetic_balanced=g, k=k)


def test_the_default_k_is_the_papers():
    g = {n: p.detach() for n, p in narrow_resnet18(8).named_parameters()}
    zeros = {n: torch.zeros_like(v) for n, v in g.items()}
    table = sensitivity_table(real=g, synthetic_biased=zeros, synthetic_balanced=g)
    assert (table.domain_rank <= 55).sum() == 55 and table.selected.sum() >= 2 * 55 - 62


def test_nan_gradients_are_named():
    a, b = {"w": torch.zeros(3)}, {"w": torch.tensor([0, float("nan"), 0])}
    with pytest.raises(ValueError, match="gradient of w is not finite"):
        select_parameters(real=a, synthetic_biased=b, synthetic_balanced=a, k=1)


def some_gradients(seed=0, shapes=None):
    "Random whole numbers (so that there are ties) as gradients; a channel has a power of two elements (so that means are exact)."
    shapes = shapes or {"conv.weight": (4, 2, 2, 2), "conv.bias": (4,), "scale": (), "head.weight": (2, 4), "head.bias": (2,)}
    rng = np.random.default_rng(seed)

    def one():
        return {n: torch.tensor(rng.integers(-9, 10, s), dtype=torch.float32) for n, s in shapes.items()}

    return dict(real=one(), synthetic_biased=one(), synthetic_balanced=one())


def units_by_hand(sets, grain):
    "[(name, position)], and two lists of sensitivities, by plain loops."
    where, domain, bias = [], [], []
    for name in sets["real"]:
        r, s, b = (sets[k][name].double().numpy() for k in ("real", "synthetic_biased", "synthetic_balanced"))
        positions = [()] if r.ndim == 0 else [(c,) for c in range(len(r))] if grain == "channel" else list(np.ndindex(r.shape))
        for at in positions:
            where.append((name, at))
            domain.append(np.mean(np.abs(r[at] - s[at])))
            bias.append(np.mean(np.abs(s[at] - b[at])))
    return where, domain, bias


@settings(max_examples=40)
@given(seed=st.integers(0, 1000), share=st.floats(0.01, 1), grain=st.sampled_from(["channel", "element"]))
def test_fine_masks_are_the_intersection_of_two_sorted_lists(seed, share, grain):
    sets = some_gradients(seed)
    where, domain, bias = units_by_hand(sets, grain)
    n = max(1, round(share * len(where)))
    first, second = sorted(range(len(where)), key=lambda i: domain[i])[:n], sorted(range(len(where)), key=lambda i: -bias[i])[:n]
    expected = {where[i] for i in set(first) & set(second)}
    ranking = rank_units(**sets, grain=grain)
    if not expected:
        with pytest.raises(ValueError, match=f"selects no {grain}: the two rankings first meet at k=") as e:
            ranking.mask(share)
        assert ranking.mask(float(str(e.value).split("meet at k=")[1].split()[0]))
        return
    mask = ranking.mask(share)
    found = {(name, at[: 1 if grain == "channel" else None]) for name, m in mask.items() for at in np.argwhere(m.numpy()).tolist()
             for at in [tuple(at)]}
    assert found == expected
    assert all(m.dtype == torch.bool and torch.broadcast_shapes(m.shape, sets["real"][n].shape) == sets["real"][n].shape
               for n, m in mask.items())


def chosen_elements(sets, mask):
    return {n: torch.broadcast_to(mask[n], g.shape) if isinstance(mask, dict) and n in mask else torch.full(g.shape, n in mask)
            for n, g in sets["real"].items()}


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), grain=st.sampled_from(["tensor", "channel", "element"]), ks=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_masks_grow_with_k_until_they_hold_everything(seed, grain, ks):
    sets = some_gradients(seed)
    ranking = rank_units(**sets, grain=grain)
    low, high = sorted(k * (1 - ranking.smallest_k) + ranking.smallest_k if grain != "tensor"
                       else ranking.smallest_k + round(k * (len(ranking) - ranking.smallest_k)) for k in ks)
    small, large = (chosen_elements(sets, ranking.mask(k)) for k in (low, high))
    assert all((large[n] | ~small[n]).all() for n in small)
    everything = chosen_elements(sets, ranking.mask(len(ranking) if grain == "tensor" else 1))
    assert all(m.all() for m in everything.values())
    n = high if grain == "tensor" else max(1, round(high * len(ranking)))
    assert 2 * n - len(ranking) <= int(ranking.chosen(high).sum()) <= n


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), k=st.integers(1, 6), grain=st.sampled_from(["channel", "element"]))
def test_fine_masks_of_single_units_agree_with_masks_of_tensors(seed, k, grain):
    "Where every tensor is one channel (or one element), ranking channels is ranking tensors."
    sets = some_gradients(seed, {f"t{i}": (1, 4, 2) if grain == "channel" else (1,) for i in range(6)})
    tensors, fine = rank_units(**sets), rank_units(**sets, grain=grain)
    assert torch.equal(tensors.domain, fine.domain) and torch.equal(tensors.bias, fine.bias)
    if k >= tensors.smallest_k:
        mask = fine.mask(k / 6)
        assert mask.keys() == tensors.mask(k) and all(m.all() for m in mask.values())


@pytest.mark.parametrize("grain", ["channel", "element"])
@pytest.mark.parametrize("k", [0, -0.1, 1.01, 5, True, "0.5"])
def test_a_share_out_of_range(grain, k):
    with pytest.raises(ValueError, match=r"not a share in \(0, 1\]"):
        rank_units(**some_gradients(), grain=grain).mask(k)


def test_errors_of_rankings_name_the_choices():
    sets = some_gradients()
    with pytest.raises(ValueError, match="there are tensor, channel, element"):
        rank_units(**sets, grain="layer")
    with pytest.raises(ValueError, match="there are absolute, cosine"):
        select_parameters(**sets, measure="euclid")
    with pytest.raises(ValueError, match="from 1 to 5"):
        rank_units(**sets).mask("3")
    sets["synthetic_biased"]["head.weight"][1, 2] = float("inf")
    for grain in ("tensor", "channel", "element"):
        with pytest.raises(ValueError, match=r"gradient of head.weight is not finite"):
            rank_units(**sets, grain=grain)
    del sets["real"]["scale"]
    with pytest.raises(ValueError, match="'scale' is in one only"):
        rank_units(**sets, grain="channel")


@settings(max_examples=60)
@given(u=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6), v=st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6))
def test_the_cosine_distance_is_numpys(u, v):
    a, b = np.array(u, np.float64), np.array(v[: len(u)], np.float64)
    ours = cosine_distance({"w": torch.tensor(a, dtype=torch.float32)}, {"w": torch.tensor(b, dtype=torch.float32)})["w"]
    if not a.any() or not b.any():
        assert ours == (a.any() != b.any())
    else:
        scaled = a / np.abs(a).max(), b / np.abs(b).max()
        assert ours == pytest.approx(1 - scaled[0] @ scaled[1] / np.sqrt((scaled[0] ** 2).sum() * (scaled[1] ** 2).sum()), abs=1e-9)
        assert 0 <= ours <= 2 + 1e-9


def test_the_cosine_mask_ranks_by_angle():
    "Gradients of two numbers at known angles; the largest differences in length must not matter."
    def at(degrees, length):
        return torch.tensor([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], dtype=torch.float32) * length

    turn_domain, turn_bias = [5, 20, 40, 80], [90, 10, 60, 30]
    real, biased, balanced = ({f"t{i}": at(a[i], 10.0 ** (i * s)) for i in range(4)}
                              for a, s in ((turn_domain, 2), ([0] * 4, -1), (turn_bias, 1)))
    sets = dict(real=real, synthetic_biased=biased, synthetic_balanced=balanced)
    table = sensitivity_table(**sets, k=3, measure="cosine")
    assert table.domain.to_numpy() == pytest.approx(1 - np.cos(np.radians(turn_domain)), abs=1e-6)
    assert set(table.index[table.selected]) == select_parameters(**sets, k=3, measure="cosine") == {"t0", "t2"}
    assert select_parameters(**sets, k=3) != {"t0", "t2"}


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), shares=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)))
def test_random_masks_are_nested_and_repeat_with_their_seed(seed, shares):
    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(10)))
    low, high = (random_parameters(model, s, seed=seed) for s in sorted(shares))
    assert low <= high <= {n for n, _ in model.named_parameters()}
    assert [len(low), len(high)] == [max(1, round(20 * s)) for s in sorted(shares)]
    assert high == random_parameters(model, max(shares), seed=seed)


def test_random_masks_favour_no_tensor():
    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(10)))
    drawn = [n for seed in range(400) for n in random_parameters(model, 0.4, seed=seed)]
    counts = np.array([drawn.count(n) for n, _ in model.named_parameters()])
    assert counts.sum() == 400 * 8 and (np.abs(counts - 160) < 5 * np.sqrt(400 * 0.4 * 0.6)).all()


MODELS = ["resnet18", "resnet152", "vgg11", "mobilenet_v3_small", "vit_b_16", "densenet121", "convnext_base", "swin_t", "squeezenet1_1"]


@pytest.mark.parametrize("name", MODELS)
def test_blocks_part_the_tensors_of_any_model(name):
    from torchvision import models
    with torch.device("meta"):
        model = models.get_model(name)
    names = [n for n, _ in model.named_parameters()]
    found = blocks(model)
    assert sorted(n for inside in found.values() for n in inside) == sorted(names)
    assert len(found) >= 6 and {n for n in names if n.startswith(head_of(model) + ".")} <= set(found["head"])
    assert name.startswith("resnet") or max(len(inside) for inside in found.values()) <= len(names) / 2
    for block in found:
        inside, outside = block_parameters(model, block), block_parameters(model, block, others=True)
        assert inside and not inside & outside and inside | outside == set(names)


def test_blocks_of_residual_networks_are_the_papers():
    from torchvision import models
    with torch.device("meta"):
        deep, wrapped = models.resnet152(), torch.nn.ModuleDict({"backbone": models.resnet18()})
    wrapped["backbone"].fc = torch.nn.Identity()
    wrapped["out"] = torch.nn.Linear(512, 1)
    assert list(blocks(deep)) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert list(blocks(wrapped)) == ["stem", "backbone.layer1", "backbone.layer2", "backbone.layer3", "backbone.layer4", "head"]
    assert blocks(wrapped)["stem"] == ["backbone.conv1.weight", "backbone.bn1.weight", "backbone.bn1.bias"]


def test_a_model_of_one_block():
    one = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 1))
    assert blocks(one) == {"head": ["1.weight", "1.bias"]}
    with pytest.raises(ValueError, match="head is the only block"):
        block_parameters(one, "head", others=True)
    with pytest.raises(ValueError, match="head is the only block"):
        make_mask(one, "but-head")


def test_gradients_are_asked_for_only_where_a_mask_needs_them():
    model, asked = narrow_resnet18(8), []

    def gradients():
        asked.append(1)
        rng = np.random.default_rng(0)
        one = lambda: {n: torch.from_numpy(rng.normal(size=tuple(p.shape)).astype(np.float32)) for n, p in model.named_parameters()}  # noqa: E731
        return dict(real=one(), synthetic_biased=one(), synthetic_balanced=one())

    for name in (*(f"random-{s}" for s in (40, 55, 70, 85)), *(f"{kind}-{b}" for b in blocks(model) for kind in ("only", "but")),
                 "cosine", "absolute", "channel", "element"):
        before = len(asked)
        mask = make_mask(model, name, gradients=gradients)
        assert len(asked) - before == (name in ("cosine", "absolute", "channel", "element"))
        assert (mask_shares(model, mask) > 0).sum() == len(mask)
    assert make_mask(model, "absolute", gradients=gradients(), k=40) == select_parameters(**gradients(), k=40)
    for wrong in ("random-", "random-x", "only-", "only-layer9", "but-fc", "absolut", ""):
        with pytest.raises(ValueError, match="there are "):
            make_mask(model, wrong)
    for wrong in ("random-0", "random-101"):
        with pytest.raises(ValueError, match="not in"):
            make_mask(model, wrong)


def test_shares_of_a_mask_count_its_elements():
    model = narrow_resnet18(8)
    mask = {"conv1.weight": torch.arange(8).reshape(8, 1, 1, 1) < 2, "fc.weight": torch.arange(64).reshape(1, 64) < 16,
            "fc.bias": torch.tensor([False])}
    shares = mask_shares(model, mask)
    assert shares["conv1.weight"] == shares["fc.weight"] == 0.25 and shares.sum() == 0.5
    assert mask_shares(model, {"fc.bias"}).sum() == 1
    assert mask_size(model, mask) == (2, 2 * 3 * 3 * 3 + 16) and mask_size(model, {"conv1.weight", "fc.bias"}) == (2, 8 * 27 + 1)
    for wrong, message in (({"x": torch.tensor([True])}, "no parameter 'x'"), ({"fc.bias": torch.tensor([1.0])}, "is float32"),
                           ({"fc.bias": torch.ones(2, dtype=torch.bool)}, r"shape \(2,\); expected"),
                           ({"fc.bias": torch.ones(1, 1, 1, dtype=torch.bool)}, "expected booleans")):
        with pytest.raises(ValueError, match=message):
            mask_shares(model, wrong)


def test_the_picture_of_masks_has_a_row_each():
    model = narrow_resnet18(8)
    ax = plot_masks(model, {"head": {"fc.weight", "fc.bias"}, "all": {n for n, _ in model.named_parameters()}}).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["head (2; 0 %)", "all (62; 100 %)"]
    values = ax.collections[0].get_array().reshape(2, 62)
    assert values.sum(1).tolist() == [2, 62]


def test_the_picture_of_a_ranking_names_the_stages():
    names = [n for n, _ in narrow_resnet18(8).named_parameters()]
    g = {k: {n: torch.tensor([float(i * (j + 1) ** 2)]) for i, n in enumerate(names)} for j, k in enumerate(("a", "b", "c"))}
    ax = plot_sensitivity(sensitivity_table(real=g["a"], synthetic_biased=g["b"], synthetic_balanced=g["c"], k=40)).axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert "(18 of 62 updated)" in ax.get_xlabel()


# pieces

class Smooth(torch.nn.Module):
    "A small network without batch norm."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.out = torch.nn.Conv2d(3, 6, 4, stride=4), torch.nn.GroupNorm(2, 6), torch.nn.Linear(6, 1)

    def forward(self, x):
        return self.out(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("pieces", [1, 3, 7, 50])
def test_gradients_in_pieces_are_autograds_of_whole_batches(pieces):
    model, data = Smooth(), faces(46)
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for rows in (slice(0, 23), slice(23, 46)):
        x, y = normalize(data.gather(rows)), torch.tensor(data.target[rows]).float()
        loss = F.binary_cross_entropy_with_logits(model(x)[:, 0], y)
        for name, g in zip(expected, torch.autograd.grad(loss, model.parameters()), strict=True):
            expected[name] += g / 2
    found = mean_gradients(model, batches(data, 23), accumulate=pieces, device="cpu")
    assert list(found) == list(expected) and all(torch.allclose(found[n], expected[n], atol=1e-6) for n in expected)


def test_pieces_see_the_images_of_the_whole_pass():
    data, seen = faces(50), {}

    class Watched(Smooth):
        def forward(self, x):
            if self.training:
                seen.setdefault(self.pieces, []).append(x.detach().clone())
            return super().forward(x)

    found = {}
    for pieces in (1, 4):
        model = Watched()
        model.pieces = pieces
        found[pieces] = gradient_pass(model, data, batch_size=16, augment=Augment(), passes=2, accumulate=pieces, device="cpu")
    assert [max(map(len, seen[p])) for p in (1, 4)] == [16, 4] and torch.equal(torch.cat(seen[1]), torch.cat(seen[4]))
    assert all(torch.allclose(found[1][n], found[4][n], atol=1e-6) for n in found[1])


def test_batch_norm_sees_the_statistics_of_a_piece():
    model, data = narrow_resnet18(8), faces(32)
    whole, parts = (gradient_pass(model, data, batch_size=32, accumulate=pieces, device="cpu") for pieces in (1, 2))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).numpy()
    first, second = (mean_gradients(model, batches(data.select(rows), 16), device="cpu") for rows in (order[:16], order[16:]))
    assert all(torch.allclose(parts[n], (first[n] + second[n]) / 2, atol=1e-5) for n in parts)
    assert not torch.allclose(parts["conv1.weight"], whole["conv1.weight"], atol=1e-5)
