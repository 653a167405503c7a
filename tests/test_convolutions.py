"""Convolutions on a CPU: whatever the network and the processor, the gradients are PyTorch's own"""
import copy
from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aimfair.convolutions import quick_convolutions
from aimfair.data import Faces, normalize
from aimfair.device import seeded
from aimfair.models import create_model
from aimfair.sensitivity import mean_gradients
from aimfair.training import TrainConfig, fit


class Filter(nn.Module):
    "One convolution, called as PyTorch's functions are."

    def __init__(self, weight, bias=None, **how):
        super().__init__()
        self.weight, self.how = nn.Parameter(weight), how
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x):
        how = {"stride": 1, "padding": 0, "dilation": 1, "groups": len(self.weight)} | self.how
        return F.conv2d(x, self.weight, self.bias, how["stride"], how["padding"], how["dilation"], how["groups"])


def gradients(module, x, within):
    "Of the image and of the parameters, for a loss that weighs every value differently; and what comes out."
    x = x.clone().requires_grad_()
    module.zero_grad()
    with within:
        y = module(x)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


def processor(capability):
    "Inside the block, this machine is taken for one with AVX2 alone, or with AVX-512."
    return patch("torch.backends.cpu.get_cpu_capability", lambda: capability)


def same(module, x, tolerance):
    "Against PyTorch's own in double precision: in bfloat16 PyTorch itself is wrong where a tap meets no pixel of a narrow map."
    exact = gradients(copy.deepcopy(module).double(), x.double(), nullcontext())
    for capability in ("AVX2", "AVX512"):
        with processor(capability):
            found = gradients(module, x, quick_convolutions("cpu"))
        for usual, ours in zip(exact, found, strict=True):
            assert ours.shape == usual.shape and ours.dtype == x.dtype
            assert (ours - usual).abs().max() <= tolerance * max(usual.abs().max(), 1e-3), capability


def geometry(draw, most_taps, largest):
    "Taps, stride and padding of a filter, and the size of a map that it fits on."
    taps, stride, padding = (draw(st.tuples(st.integers(a, b), st.integers(a, b)), name) for name, a, b in
                             (("taps", 1, most_taps), ("stride", 1, 3), ("padding", 0, 4)))
    return taps, stride, padding, [draw(st.integers(max(1, k - 2 * p), largest)) for k, p in zip(taps, padding, strict=True)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_filter_stride_and_border(data):
    draw = data.draw
    taps, stride, padding, size = geometry(draw, most_taps=7, largest=12)
    channels, dtype = draw(st.sampled_from([2, 5, 16])), draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    made = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x, w, b = (torch.randn(shape, generator=made).to(dtype) for shape in ((3, channels, *size), (channels, 1, *taps), (channels,)))
    if draw(st.booleans(), "channels last"):
        x = x.contiguous(memory_format=torch.channels_last)
    module = Filter(w, b if draw(st.booleans(), "bias") else None, stride=stride, padding=padding)
    same(module, x, {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_filter_of_all_channels(data):
    draw = data.draw
    taps, stride, padding, size = geometry(draw, most_taps=5, largest=6)
    inputs, outputs = (draw(st.sampled_from([1, 30, 64])) for _ in range(2))
    dtype, made = draw(st.sampled_from([torch.float64, torch.float32])), torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x, w, b = (torch.randn(shape, generator=made).to(dtype) for shape in ((3, inputs, *size), (outputs, inputs, *taps), (outputs,)))
    if draw(st.booleans(), "channels last"):
        x, w = (v.contiguous(memory_format=torch.channels_last) for v in (x, w))
    bias = outputs > 1 and draw(st.booleans(), "bias")  # of one filter, that of this loss sums up to nothing
    module = Filter(w, b if bias else None, stride=stride, padding=padding, groups=1)
    same(module, x, {torch.float64: 1e-9, torch.float32: 1e-4}[dtype])


@pytest.mark.parametrize("capability, channels, side, trained, ours", [
    ("AVX2", 64, 4, True, True), ("AVX512", 64, 4, True, False), ("AVX2", 64, 16, True, False), ("AVX2", 4, 4, True, False),
    ("AVX2", 64, 4, False, False),
])
def test_filters_of_all_channels_are_ours_where_that_is_quicker(capability, channels, side, trained, ours):
    x = torch.randn(2, channels, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=torch.channels_last).requires_grad_(trained)
    with processor(capability), quick_convolutions("cpu"):
        y = layer(x)
    usual = layer(x)
    assert (type(y.grad_fn) is not type(usual.grad_fn)) == ours and torch.equal(y, usual)


@pytest.mark.parametrize("taps, stride, padding, size", [
    ((1, 3), (1, 2), (0, 2), (2, 1)), ((6, 3), (3, 3), (3, 2), (10, 2)), ((5, 3), 3, (2, 1), (11, 1)), ((3, 2), (3, 3), (0, 1), (8, 2)),
    ((5, 6), 3, (1, 3), (11, 1)), ((1, 11), 1, (0, 5), (2, 2)), ((11, 1), 1, (5, 0), (2, 2)), ((11, 1), 1, (5, 0), (3, 8)),
])
def test_taps_that_meet_no_pixel_have_no_gradient(taps, stride, padding, size):
    x, w = torch.randn(3, 16, *size, dtype=torch.bfloat16), torch.randn(16, 1, *taps, dtype=torch.bfloat16)
    for _ in range(20):  # what lay in memory before is not always zero
        torch.full_like(w, torch.nan)
        same(Filter(w, stride=stride, padding=padding), x.contiguous(memory_format=torch.channels_last), 0.05)


@pytest.mark.parametrize("how", [
    {"groups": 1}, {"groups": 2}, {"padding": "same"}, {"padding": "valid"}, {"dilation": 2}, {"dilation": (1, 2)},
    {"stride": 2, "padding": 1}, {"stride": [2, 1]},
])
def test_other_convolutions_are_as_they_were(how):
    groups = how.get("groups", 4)
    x, w = torch.randn(2, 4, 9, 9, dtype=torch.float64), torch.randn(4, 4 // groups, 3, 3, dtype=torch.float64)
    same(Filter(w, torch.randn(4, dtype=torch.float64), **how), x, 1e-9)


def test_words_one_image_and_more_filters_than_channels():
    with quick_convolutions("cpu"):
        by_name = F.conv2d(torch.ones(1, 3, 5, 5), weight=torch.ones(3, 1, 3, 3), groups=3)
        assert by_name.shape == (1, 3, 3, 3) and (by_name == 9).all()
        assert F.conv2d(torch.ones(3, 5, 5), torch.ones(3, 1, 3, 3), None, 1, 1, 1, 3).shape == (3, 5, 5)  # no batch
        assert nn.Conv2d(3, 6, 3, groups=3)(torch.ones(1, 3, 5, 5)).shape == (1, 6, 3, 3)


def test_gradients_of_gradients():
    x, w = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6, 5), (3, 1, 5, 5)))

    def convolved(x, w):
        with quick_convolutions("cpu"):
            return F.conv2d(x, w, None, (2, 1), (2, 1), (1, 1), 3)

    for capability in ("AVX2", "AVX512"):
        with processor(capability):
            assert torch.autograd.gradcheck(convolved, (x, w)) and torch.autograd.gradgradcheck(convolved, (x, w))


def test_gradients_of_gradients_of_all_channels():
    x, w = (torch.randn(shape, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
            for shape in ((2, 12, 2, 1), (11, 12, 3, 3)))

    def convolved(x, w):
        with quick_convolutions("cpu"):
            return F.conv2d(x.contiguous(memory_format=torch.channels_last), w, None, (2, 1), (1, 1), (1, 1), 1)

    with processor("AVX2"):
        assert "Convolution" in type(convolved(x, w).grad_fn).__name__
        assert type(convolved(x, w).grad_fn) is not type(F.conv2d(x, w, None, (2, 1), (1, 1)).grad_fn)
        assert torch.autograd.gradcheck(convolved, (x, w)) and torch.autograd.gradgradcheck(convolved, (x, w))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto", "resnet10t"])
def test_networks_that_people_have(name):
    model = create_model(f"timm/{name}", n_outputs=2).double()
    batch = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same(model.train(), batch, 1e-7)


def faces(n=32, seed=0, size=32):
    rng = np.random.default_rng(seed)
    return Faces.from_arrays(rng.integers(0, 256, (n, 3, size, size), dtype=np.uint8), np.arange(n) % 2)


class Small(nn.Module):
    "Two depthwise filters, one of stride 2, and what the last of them saw."

    def __init__(self):
        super().__init__()
        with seeded(0):
            self.body = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                                      nn.Conv2d(8, 8, 5, 1, 2, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.out = nn.Linear(8, 1)
        self.seen = set()

    def forward(self, x):
        x = self.body(x)
        self.seen.add((self.training, x.dtype))
        return self.out(x.mean((2, 3)))


PLAIN = TrainConfig(epochs=2, batch_size=16, lr=0.1, momentum=0.0, weight_decay=0.0, milestones=(), scale=(1.0, 1.0), flip=0.0,
                    precision="float32")


def test_a_training_is_that_of_pytorch_alone():
    data, by_hand = faces(16), Small()
    ours = copy.deepcopy(by_hand)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for _ in range(2):  # one batch an epoch, and its mean does not depend on the order
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(by_hand(normalize(data.gather(slice(None))))[:, 0], torch.tensor(data.target).float()).backward()
        optimizer.step()
    fit(ours, data, None, config=PLAIN, device="cpu", progress=False)
    for (name, a), b in zip(ours.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert (a - b).abs().max() < 1e-5, (name, (a - b).abs().max())


def test_the_mean_gradient_of_batches_is_that_of_pytorch_alone():
    model, batch, y = Small(), torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 0, 1, 1, 1])
    found = mean_gradients(model, [(batch, y)], device="cpu")
    F.binary_cross_entropy_with_logits(model.train()(batch)[:, 0], y.float()).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(found[name], p.grad, atol=1e-6), name


def test_fast_is_bfloat16_where_the_processor_has_it_and_only_there(monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        model = Small()
        fitted = fit(model, faces(), faces(8, seed=1), config=PLAIN.model_copy(update={"precision": "fast"}), device="cpu", progress=False)
        assert {dtype for training, dtype in model.seen if training} == {torch.bfloat16 if has else torch.float32}
        assert ((False, torch.bfloat16) in model.seen) == has
        assert {p.dtype for p in fitted.model.parameters()} == {torch.float32} and np.isfinite(fitted.history.loss).all()


def test_an_unknown_precision_is_told():
    with pytest.raises(ValueError, match="precision"):
        TrainConfig(precision="quick")
