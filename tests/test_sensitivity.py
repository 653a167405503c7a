"Selective mask generation against re-derivations in plain torch and pandas."
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from aimfair.data import Augment, Faces, batches, normalize
from aimfair.sensitivity import (
    biased_counts,
    group_gradients,
    group_indices,
    mean_gradients,
    select_parameters,
    sensitivity_table,
    take_groups,
)
from aimfair.training import narrow_resnet18


def faces(n=64, seed=0):
    rng = np.random.default_rng(seed)
    return Faces.from_arrays(rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), rng.integers(0, 2, n), protected=rng.integers(0, 2, n))


def test_mean_gradients_in_train_mode_are_autograds_averaged():
    model, data = narrow_resnet18(8), faces()
    ours = mean_gradients(model, batches(data, 16), device="cpu")
    other, total = copy.deepcopy(model).train(), None
    for i in range(0, 64, 16):
        x, y = normalize(data.gather(slice(i, i + 16))), torch.tensor(data.target[i : i + 16]).float()
        g = torch.autograd.grad(F.binary_cross_entropy_with_logits(other(x).squeeze(1), y), list(other.parameters()))
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


def test_groups_are_taken_in_order_and_exactly():
    data = faces(500)
    counts = biased_counts(200)
    where = group_indices(data)
    taken = take_groups(data, counts)
    expected = sorted(i for g, n in counts.items() for i in where[g][:n])
    assert taken.ids.tolist() == [str(i) for i in expected]
