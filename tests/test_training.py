"The training loop against PyTorch itself, and its faults: kills, masks, checkpoints, odd models."
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import kill_when
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from aimfair.data import Faces, normalize
from aimfair.device import pick_device
from aimfair.models import classification_loss, narrow_resnet18
from aimfair.training import TrainConfig, accuracy, create_model, fit, layer_depths, predict, tensorboard_callback, trackio_callback


def faces(n=48, seed=0, size=32, classes=2):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    return Faces.from_arrays(x, rng.integers(0, classes, n), protected=rng.integers(0, 2, n))


PLAIN = TrainConfig(epochs=3, batch_size=16, lr=0.1, momentum=0.9, weight_decay=1e-2, milestones=(2,), scale=(1.0, 1.0), flip=0.0)


class Line(nn.Module):
    "Mean colour to one logit."

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        return self.out(x.mean((2, 3)))


def test_fit_is_sgd_with_momentum_decay_and_steps():
    "Full batches of the whole set make the order irrelevant, so ten lines of torch must give the same weights."
    data = faces(64)
    config = PLAIN.model_copy(update={"batch_size": 64, "epochs": 4})
    ours = fit(Line(), data, None, config=config, device="cpu", progress=False).model
    x, y = normalize(data.gather(slice(None))).mean((2, 3)), torch.tensor(data.target).float()
    w, velocity = torch.zeros(4), torch.zeros(4)
    for epoch in range(4):
        w = w.detach().requires_grad_(True)
        F.binary_cross_entropy_with_logits(x @ w[:3] + w[3], y).backward()
        g = w.grad + 1e-2 * w.detach()
        velocity = g if epoch == 0 else 0.9 * velocity + g
        w = w.detach() - (0.1 if epoch < 2 else 0.01) * velocity
    assert torch.allclose(torch.cat([ours.out.weight[0], ours.out.bias]), w, atol=1e-6)


def test_the_best_validation_epoch_is_kept():
    data, val = faces(48), faces(31, seed=1)
    fitted = fit(create_model("toy_resnet18"), data, val, config=PLAIN, device="cpu", progress=False)
    assert fitted.val_accuracy == pytest.approx(fitted.history.val_accuracy.max())
    assert fitted.best_epoch == fitted.history.val_accuracy.idxmax()
    assert accuracy(fitted.model, val, device="cpu") == pytest.approx(fitted.val_accuracy)


def test_the_same_seed_gives_the_same_bits_and_leaves_global_state_alone():
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    models = [create_model("toy_resnet18", seed=s) for s in (1, 1, 2)]
    states = [fit(m, faces(), None, config=PLAIN, seed=s, device="cpu", progress=False).model.state_dict()
              for m, s in zip(models, (1, 1, 2), strict=True)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n", [1, 17, 16])
def test_a_last_batch_of_one_is_no_trouble(n):
    model = narrow_resnet18(8) if n > 1 else Line()
    assert len(fit(model, faces(n), faces(1), config=PLAIN, device="cpu", progress=False).history) == 3
    assert len(predict(model, faces(1), device="cpu")) == 1


@pytest.mark.parametrize("outputs,classes", [(1, 2), (2, 2), (3, 3)])
def test_one_logit_or_several(outputs, classes):
    model = create_model("toy_resnet18", n_outputs=outputs)
    fit(model, faces(classes=classes), None, config=PLAIN, device="cpu", progress=False)
    table = predict(model, faces(9), device="cpu")
    assert set(table.prediction) <= set(range(classes))
    assert [c for c in table if c.startswith("logit")] == (["logit"] if outputs == 1 else [f"logit_{i}" for i in range(outputs)])


def test_models_that_return_objects_or_tuples():
    class Wrapped(Line):
        def forward(self, x):
            return type("Output", (), {"logits": Line.forward(self, x)})()

    class Tupled(Line):
        def forward(self, x):
            return super().forward(x), None

    tables = [predict(fit(m(), faces(), None, config=PLAIN, device="cpu", progress=False).model, faces(5), device="cpu")
              for m in (Line, Wrapped, Tupled)]
    assert np.array_equal(tables[0].logit, tables[1].logit) and np.array_equal(tables[0].logit, tables[2].logit)


def test_a_diverging_run_says_so():
    with pytest.raises(FloatingPointError, match="smaller learning rate"):
        fit(Line(), faces(), None, config=PLAIN.model_copy(update={"lr": 1e38, "epochs": 5}), device="cpu", progress=False)


def test_predict_leaves_the_mode_and_the_gradients_alone():
    model = narrow_resnet18(8).train()
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    predict(model, faces(5), device="cpu")
    assert model.training and all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())


KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_training import PLAIN, faces
from aimfair.training import create_model, fit
torch.set_num_threads(1)
config = PLAIN.model_copy(update=dict(epochs=12, scale=(0.5, 1.0), flip=0.5))
fitted = fit(create_model('toy_resnet18', seed=5), faces(200), faces(50, seed=1), config=config, seed=5, checkpoint={checkpoint!r},
             device='cpu', progress=False)
torch.save(fitted.model.state_dict(), {out!r})
"""


def _train(tmp_path, name, checkpoint):
    code = KILLED.format(tests=str(Path(__file__).parent), checkpoint=checkpoint and str(checkpoint), out=str(tmp_path / name))
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_kill_nine_in_the_middle_changes_no_bit(tmp_path):
    assert _train(tmp_path, "whole.pt", None).wait() == 0
    checkpoint = tmp_path / "run.pt"
    for _ in range(2):
        stamp = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        assert kill_when(_train(tmp_path, "resumed.pt", checkpoint), lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns != stamp)  # noqa: B023
    assert _train(tmp_path, "resumed.pt", checkpoint).wait() == 0
    whole, resumed = (torch.load(tmp_path / n, weights_only=True) for n in ("whole.pt", "resumed.pt"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_the_bundled_backbone_learns_faster_than_from_nothing():
    from aimfair import toyfaces
    factors = toyfaces.sample_factors(700, seed=3)
    y = toyfaces.annotations(factors)["Eyeglasses"].to_numpy()
    data = Faces.from_arrays(toyfaces.draw(factors), y)
    config = TrainConfig(epochs=3, batch_size=32, lr=0.02, milestones=(2,), scale=(0.7, 1.0))
    score = {w: fit(create_model("toy_resnet18", weights=w), data.select(slice(0, 500)), data.select(slice(500, 700)), config=config,
                    device="cpu", progress=False).val_accuracy for w in ("bundled", None)}
    assert score["bundled"] > 0.85 and score["bundled"] > score[None]


def test_a_timm_model_trains():
    pytest.importorskip("timm")
    model = create_model("timm/resnet10t", n_outputs=1)
    assert len(fit(model, faces(), None, config=PLAIN.model_copy(update={"epochs": 1}), device="cpu", progress=False).history) == 1


def test_a_network_that_needs_channels_first_trains():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.out = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(4 * 64, 1)

        def forward(self, x):
            x = self.features(x)
            return self.out(x.view(len(x), -1))  # refused by PyTorch where channels come last

    model = Flat()
    fit(model, faces(), faces(9, seed=1), config=PLAIN, device="cpu", progress=False)
    assert len(predict(model, faces(5), device="cpu")) == 5


def test_a_checkpoint_of_other_weights_or_images_is_refused(tmp_path):
    def start(seed=0, data=0):
        model = create_model("toy_resnet18", seed=seed)
        fit(model, faces(seed=data), None, config=PLAIN, checkpoint=tmp_path / "c.pt", device="cpu", progress=False)

    start()
    start()
    for other in ({"seed": 1}, {"data": 1}):
        with pytest.raises(ValueError, match="other settings"):
            start(**other)
    (tmp_path / "c.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="not a checkpoint"):
        start()


def test_a_caller_may_say_what_else_makes_a_run_the_same(tmp_path):
    def start(**about):
        fit(Line(), faces(), None, config=PLAIN, checkpoint=tmp_path / "c.pt", device="cpu", progress=False, **about)

    start(identity={"method": "mine", "settings": {"alpha": 0.5}})
    start(identity={"settings": {"alpha": 0.5}, "method": "mine"})
    for other in ({}, {"identity": {"method": "mine", "settings": {"alpha": 0.25}}}, {"identity": {"method": "mine"}}):
        with pytest.raises(ValueError, match="other settings"):
            start(**other)


# steps, optimisers, sampling, criteria

HELD = PLAIN.model_copy(update={"scale": (0.5, 1.0), "flip": 0.5, "steps": 10})


def watched(n, **more):
    "The rows of every batch of a run, epoch by epoch, and what was fitted."
    rows, epochs = [], []
    fitted = fit(Line(), faces(n), faces(9, seed=1), device="cpu", progress=False,
                 loss_fn=lambda z, y, r: (rows.append(r.tolist()), classification_loss(z, y))[1],
                 criteria={"end": lambda z: (epochs.append(rows[:]), rows.clear(), 0)[2]}, **more)
    return epochs, fitted


@pytest.mark.parametrize("n", [7, 40, 48, 49, 300])
def test_steps_are_held_whatever_the_number_of_images(n):
    epochs, _ = watched(n, config=HELD)
    assert [len(e) for e in epochs] == [3, 3, 4]
    size = (n - (n % 16 == 1)) // 16 + (n % 16 > 1)  # batches of a pass
    flat = sum(epochs, [])
    for start in range(0, 10 - size + 1, size):
        seen = sum(flat[start:start + size], [])
        assert len(seen) == len(set(seen)) == n - (n % 16 == 1)


def test_passes_strung_together_are_passes():
    plain, a = watched(70, config=HELD.model_copy(update={"steps": None}))
    held, b = watched(70, config=HELD.model_copy(update={"steps": 15}))
    other, _ = watched(70, config=HELD.model_copy(update={"steps": 15, "epochs": 4}))
    assert plain == held and a.history.equals(b.history) and torch.equal(a.model.out.weight, b.model.out.weight)
    assert sum(other, []) == sum(plain, []), "the order of images does not depend on where an epoch begins"


def test_epochs_are_slices_for_the_learning_rate_and_too_few_steps_are_refused():
    _, fitted = watched(40, config=HELD)
    assert fitted.history.lr.tolist() == pytest.approx([0.1, 0.1, 0.01])
    with pytest.raises(ValueError, match="steps = 2 are too few for 3 epochs"):
        fit(Line(), faces(), None, config=HELD.model_copy(update={"steps": 2}), device="cpu", progress=False)


def test_adam_is_pytorchs():
    data = faces(64)
    config = PLAIN.model_copy(update={"batch_size": 64, "epochs": 4, "optimizer": "adam"})
    ours = fit(Line(), data, None, config=config, device="cpu", progress=False).model
    x, y, model = normalize(data.gather(slice(None))), torch.tensor(data.target).float(), Line()
    adam = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=1e-2)
    for epoch in range(4):
        adam.param_groups[0]["lr"] = 0.1 if epoch < 2 else 0.01
        adam.zero_grad()
        F.binary_cross_entropy_with_logits(model(x)[:, 0], y).backward()
        adam.step()
    assert torch.allclose(ours.out.weight, model.out.weight, atol=1e-5)


def test_images_are_drawn_with_the_probabilities_given():
    p = np.r_[np.zeros(10), np.ones(20), np.full(10, 3.0)]
    drawn = np.array(sum(sum(watched(40, config=HELD.model_copy(update={"steps": 600}), sampling=p)[0], []), []))
    share, n = np.bincount(drawn, minlength=40) / len(drawn), len(drawn)
    expected = p / p.sum()
    assert (share[:10] == 0).all() and np.abs(share - expected).max() < 5 * np.sqrt(expected.max() / n)
    first, second = (watched(40, config=HELD, sampling=p * scale)[0] for scale in (1, 2))
    assert first == second
    for wrong in (np.ones(39), -p, np.zeros(40), np.full(40, np.nan)):
        with pytest.raises(ValueError, match="each of the 40 training images"):
            fit(Line(), faces(40), None, config=HELD, sampling=wrong, device="cpu", progress=False)


def test_each_criterion_keeps_its_own_epoch():
    data, val, told = faces(48), faces(31, seed=1), []
    criteria = {"last": lambda z: (told.append(z), len(told))[1], "first": lambda z: -len(told), "second": lambda z: -abs(len(told) - 2),
                "unknown": lambda z: float("nan")}
    fitted = fit(Line(), data, val, config=PLAIN, criteria=criteria, device="cpu", progress=False)
    expected = {"val_accuracy": fitted.best_epoch, "last": 2, "first": 0, "second": 1, "unknown": 2}
    assert {n: b.epoch for n, b in fitted.best.items()} == expected
    assert fitted.best["val_accuracy"].value == fitted.val_accuracy
    for best in (fitted.best[n] for n in ("last", "first", "second")):
        model = Line()
        model.load_state_dict(best.state)
        assert np.allclose(predict(model, val, device="cpu").logit, told[best.epoch][:, 0], atol=1e-6)
    plain = fit(Line(), data, val, config=PLAIN, device="cpu", progress=False)
    assert torch.equal(plain.model.out.weight, fitted.model.out.weight) and list(plain.best) == ["val_accuracy"]
    with pytest.raises(ValueError, match="last, first, second, unknown are figures of validation faces"):
        fit(Line(), data, None, config=PLAIN, criteria=criteria, device="cpu", progress=False)


def test_a_killed_run_with_steps_sampling_and_criteria_goes_on_to_the_same_bits(tmp_path):
    def run(left=None, **more):
        def loss_fn(logits, y, rows):
            if left is not None and next(left, None) is None:
                raise KeyboardInterrupt
            return classification_loss(logits, y)

        return fit(narrow_resnet18(8), faces(40), faces(30, seed=1), config=HELD.model_copy(update={"optimizer": "adam", "lr": 0.01}),
                   sampling=np.arange(40), criteria={"mean": lambda z: z.mean(), **more}, loss_fn=loss_fn, device="cpu", progress=False,
                   checkpoint=tmp_path / "c.pt" if left is not None else None)

    torch.manual_seed(0)
    whole = run()
    for batches in (5, 5, 100):
        torch.manual_seed(0)
        if batches == 100:
            resumed = run(iter(range(batches)))
        else:
            with pytest.raises(KeyboardInterrupt):
                run(iter(range(batches)))
    assert whole.history.equals(resumed.history)
    for name, best in whole.best.items():
        assert best[:2] == resumed.best[name][:2]
        assert all(torch.equal(v, resumed.best[name].state[k]) for k, v in best.state.items())
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="other settings"):
        run(iter(range(100)), another=lambda z: 0.0)


# what a loss is told

def test_a_loss_is_told_the_rows_of_its_batch():
    data, epochs = faces(90), []

    def loss_fn(logits, y, rows):
        assert rows.dtype == torch.int64 and rows.device.type == "cpu"
        assert torch.equal(torch.from_numpy(data.target)[rows], y)
        epochs[-1:] = [epochs[-1] + rows.tolist()] if epochs and len(epochs[-1]) < 90 else [*epochs[-1:], rows.tolist()]
        return classification_loss(logits, y)

    plain = fit(Line(), data, faces(40, seed=1), config=PLAIN, device="cpu", progress=False)
    told = fit(Line(), data, faces(40, seed=1), config=PLAIN, loss_fn=loss_fn, device="cpu", progress=False)
    assert len(epochs) == 3 and all(sorted(e) == list(range(90)) for e in epochs) and epochs[0] != epochs[1]
    assert plain.history.equals(told.history) and torch.equal(plain.model.out.weight, told.model.out.weight)


def test_memory_of_a_loss_survives_a_kill(tmp_path):
    "What a loss remembers lives in buffers of the module; an interrupted run ends as an undisturbed one."
    class Remembering(Line):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(48))

        def loss(self, logits, y, rows):
            self.seen[rows] += 1
            return (classification_loss(logits, y) * self.seen[rows].mean()).sqrt()

    def run(left=None, **more):
        model = Remembering()

        def loss_fn(logits, y, rows):
            if left is not None and next(left, None) is None:
                raise KeyboardInterrupt
            return model.loss(logits, y, rows)

        return fit(model, faces(), None, config=PLAIN, loss_fn=loss_fn, device="cpu", progress=False, **more)

    whole = run()
    assert whole.model.seen.tolist() == [3] * 48
    with pytest.raises(KeyboardInterrupt):
        run(iter(range(4)), checkpoint=tmp_path / "c.pt")  # in the second of three epochs of three batches
    resumed = run(checkpoint=tmp_path / "c.pt")
    assert torch.equal(whole.model.seen, resumed.model.seen) and torch.equal(whole.model.out.weight, resumed.model.out.weight)


# masks

def test_chosen_elements_move_as_in_numpy():
    "SGD with momentum and decay, written out; what is left out keeps every bit."
    data, mask = faces(64), {"out.weight": torch.tensor([[True, False, True]])}
    config = PLAIN.model_copy(update={"batch_size": 64, "epochs": 4, "weight_decay": 0.3})
    model = Line()
    nn.init.constant_(model.out.weight, 0.7)
    model = fit(model, data, None, config=config, trainable=mask, device="cpu", progress=False).model
    x, y = normalize(data.gather(slice(None))).mean((2, 3)).double().numpy(), data.target
    w, v = np.full(3, 0.7), np.zeros(3)
    for epoch in range(4):
        p = 1 / (1 + np.exp(-x @ w))
        v = 0.9 * v + (p - y) @ x / 64 + 0.3 * w
        w -= np.array([1, 0, 1]) * (0.1 if epoch < 2 else 0.01) * v
    assert model.out.weight[0].detach().numpy() == pytest.approx(w, abs=1e-6)
    assert model.out.weight[0, 1].item() == np.float32(0.7) and model.out.bias.item() == 0


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_with_a_mask_leaves_nothing_behind(interrupted):
    "Afterwards the model and every other model train freely, and its state has no other names."
    model, names = Line(), list(Line().state_dict())
    model.out.bias.requires_grad_(False)

    def loss_fn(logits, y, rows):
        if interrupted:
            raise KeyboardInterrupt
        return classification_loss(logits, y)

    def run():
        mask = {"out.weight": torch.tensor([[True, False, False]])}
        fit(model, faces(), None, config=PLAIN, trainable=mask, loss_fn=loss_fn, device="cpu", progress=False)

    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert list(model.state_dict()) == names and [p.requires_grad for p in model.parameters()] == [True, False]
    assert all(p.grad is None for p in model.parameters())
    start = model.out.weight.detach().clone()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    model(torch.ones(1, 3, 4, 4)).sum().backward()
    sgd.step()
    assert (model.out.weight != start).all()


def test_masks_that_do_not_fit_are_told_before_training():
    def run(mask):
        fit(Line(), faces(), None, config=PLAIN, trainable=mask, device="cpu", progress=False)

    for mask, message in ((set(), "trains nothing"), ({}, "trains nothing"), ({"out.bias": torch.tensor([False])}, "trains nothing"),
                          ({"out.bais"}, "Line has no parameter 'out.bais'"), ({"out.bias": torch.tensor([1])}, "is int64"),
                          ({"out.weight": torch.ones(2, 3, dtype=torch.bool)}, r"broadcast to \(1, 3\)")):
        with pytest.raises(ValueError, match=message):
            run(mask)


def test_checkpoints_of_other_masks_are_refused(tmp_path):
    part = {"out.weight": torch.tensor([[True, False, True]])}

    def run(mask):
        fit(Line(), faces(), None, config=PLAIN, trainable=mask, checkpoint=tmp_path / "c.pt", device="cpu", progress=False)

    run(part)
    run({n: m.clone() for n, m in part.items()})
    for other in ({"out.weight"}, {"out.weight": ~part["out.weight"]}, None):
        with pytest.raises(ValueError, match="other settings"):
            run(other)


@pytest.mark.parametrize("word", ["gpu", "0", 0, "cuda:7", "mps"])
def test_a_device_that_is_not_there_is_told_in_a_line(monkeypatch, word):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"^device is '{word}', which this machine has not .*cpu is always there$"):
        pick_device(word)
    assert pick_device().type == pick_device(" CPU").type == "cpu"


def test_the_usual_words_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = {word: str(pick_device(word)) for word in (None, "gpu", "1", 1, "CUDA", "cuda:0")}
    assert list(found.values()) == ["cuda", "cuda", "cuda:1", "cuda:1", "cuda", "cuda:0"]
    with pytest.raises(ValueError, match="which this machine has not"):
        pick_device(2)


# what transformers need

class TinyViT(nn.Module):
    "A vision transformer of three blocks on 16 x 16 pixels, without dropout."

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

        def forward(self, x):
            q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
            x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
            return x + self.mlp(self.norm2(x))

    def __init__(self, width=24, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.embed = nn.Conv2d(3, width, 4, stride=4)
        self.place = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.ModuleList([self.Block(width) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def ramps(n, seed, size=16):
    "Pixels that grow brighter from left to right, or from top to bottom: the target."
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    base = np.linspace(40, 200, size)[None].repeat(size, 0)
    x = np.stack([base if t else base.T for t in y])[:, None] + rng.normal(0, 30, (n, 3, size, size))
    return Faces.from_arrays(x.clip(0, 255).astype(np.uint8), y, protected=rng.integers(0, 2, n))


MODERN = TrainConfig(epochs=4, batch_size=16, lr=3e-3, optimizer="adamw", weight_decay=0.05, schedule="cosine", warmup=0.1, layer_decay=0.8,
                     clip=1.0, scale=(0.8, 1.0), flip=0.0)


def trained(config=MODERN, n=120, **more):
    return fit(TinyViT(), ramps(n, 0), ramps(60, 1), config=config, **{"device": "cpu", "progress": False, **more})


def test_a_small_transformer_learns_by_adamw_warm_up_cosine_and_layer_decay():
    fitted = trained(MODERN.model_copy(update={"epochs": 8}))
    assert fitted.history.loss.iloc[-1] < 0.5 * fitted.history.loss.iloc[0] and fitted.val_accuracy > 0.9


def test_what_is_held_does_not_move_by_a_bit_under_any_optimiser():
    start = TinyViT().state_dict()
    part = torch.arange(72).reshape(72, 1) % 5 == 0
    mask = {"blocks.1.qkv.weight": part, "head.weight": torch.tensor(True), "blocks.0.norm1.bias": torch.arange(24) < 3}
    for optimizer in ("sgd", "adam", "adamw"):
        model = trained(MODERN.model_copy(update={"optimizer": optimizer, "weight_decay": 0.3, "accumulate": 2}), trainable=mask).model
        for name, value in model.state_dict().items():
            if name not in mask:
                assert torch.equal(value, start[name]), (optimizer, name)
        for name, chosen in mask.items():
            moved = model.state_dict()[name] != start[name]
            assert not (moved & ~chosen).any() and (moved | ~chosen).float().mean() > 0.9, (optimizer, name)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_interrupted_modern_run_goes_on_to_the_same_bits(tmp_path, optimizer):
    config, left = MODERN.model_copy(update={"optimizer": optimizer, "accumulate": 3, "steps": 21}), []

    def loss_fn(logits, y, rows):
        if left:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return classification_loss(logits, y)

    whole = trained(config)
    for calls in (25, 30):  # pieces; an epoch has fifteen or eighteen
        left[:] = [calls]
        with pytest.raises(KeyboardInterrupt):
            trained(config, loss_fn=loss_fn, checkpoint=tmp_path / "c.pt")
    left.clear()
    resumed = trained(config, loss_fn=loss_fn, checkpoint=tmp_path / "c.pt")
    assert whole.history.equals(resumed.history)
    assert all(torch.equal(v, resumed.model.state_dict()[k]) for k, v in whole.model.state_dict().items())
    with pytest.raises(ValueError, match="other settings"):
        trained(config.model_copy(update={"warmup": 0.2}), checkpoint=tmp_path / "c.pt")


def rates_by_hand(lr, total, warm, cosine=False, milestones=(), epochs=1):
    "The learning rate of every step, in plain arithmetic."
    found = []
    for s in range(total):
        epoch = max(e for e in range(epochs) if e * total // epochs <= s)
        rate = lr * math.prod(0.1 for m in milestones if epoch >= m)
        if cosine:
            rate = lr * 0.5 * (1 + math.cos(math.pi * max(0, s - warm) / (total - warm)))
        found.append(rate * ((s + 1) / (warm + 1) if s < warm else 1))
    return found


@pytest.mark.parametrize("changes,expected", [
    ({}, dict(total=24, warm=2, cosine=True)),
    ({"warmup": 0.0}, dict(total=24, warm=0, cosine=True)),
    ({"steps": 50, "warmup": 0.3}, dict(total=50, warm=15, cosine=True)),
    ({"schedule": "milestones", "milestones": (1, 3)}, dict(total=24, warm=2, milestones=(1, 3), epochs=4)),
    ({"schedule": "milestones", "milestones": (1,), "warmup": 0.0, "steps": 23}, dict(total=23, warm=0, milestones=(1,), epochs=4)),
])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_step_has_the_learning_rate_of_its_schedule(changes, expected, accumulate):
    config = MODERN.model_copy(update={**changes, "optimizer": "sgd", "layer_decay": None, "accumulate": accumulate})
    used = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: used.append([g["lr"] for g in optimizer.param_groups]))
    try:
        history = fit(Line(), ramps(88, 0), None, config=config, device="cpu", progress=False).history
    finally:
        hook.remove()
    by_hand = rates_by_hand(config.lr, **expected)
    assert [rates for rates, in used] == pytest.approx(by_hand) and config.rates(88) == pytest.approx(by_hand)
    ends = [(e + 1) * len(by_hand) // 4 - 1 for e in range(4)]
    assert history.lr.tolist() == pytest.approx([by_hand[i] for i in ends])


def test_layers_are_counted_from_the_image_to_the_answer():
    depth = layer_depths(TinyViT())
    assert {n: d for n, d in depth.items() if "blocks" not in n} == {
        "cls": 0, "place": 0, "embed.weight": 1, "embed.bias": 1, "norm.weight": 5, "norm.bias": 5, "head.weight": 6, "head.bias": 6}
    assert all(depth[n] == 2 + int(n.split(".")[1]) for n in depth if n.startswith("blocks."))
    nested = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), nn.Flatten(), nn.Linear(4, 1))
    assert list(layer_depths(nested).values()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_wrapper_is_no_layer():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.out = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 1)

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.scale, self.model = nn.Identity(), model

    for model in (Plain(), TinyViT()):
        assert list(layer_depths(Wrapper(Wrapper(model))).values()) == list(layer_depths(model).values())
    assert list(layer_depths(Plain()).values()) == [0, 0, 1, 1, 2, 2]


def test_layers_of_networks_that_people_have():
    from transformers import ViTConfig, ViTForImageClassification
    small = ViTConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8)
    depth = layer_depths(ViTForImageClassification(small))
    of = [{d for n, d in depth.items() if f".{i}." in n} for i in range(3)]
    assert all(len(d) == 1 for d in of) and [d.pop() for d in of] == [1, 2, 3] and depth["classifier.weight"] == max(depth.values()) == 5
    pytest.importorskip("timm")
    depth = layer_depths(create_model("timm/vit_tiny_patch16_224"))
    assert [depth[n] for n in ("cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.11.mlp.fc2.bias", "head.bias")] == [
        0, 1, 2, 13, 15]
    depth = layer_depths(create_model("resnet18"))
    assert len(set(depth.values())) == 11 and depth["layer2.0.downsample.0.weight"] == depth["layer2.0.conv1.weight"] == 4


def test_adamw_with_layer_decay_and_clipping_is_pytorchs():
    "The whole set in one batch; every tensor a group of its own, with a learning rate and a decay worked out by hand."
    data, config = ramps(40, 0), MODERN.model_copy(update={"batch_size": 40, "epochs": 6, "scale": (1.0, 1.0), "clip": 0.5})
    ours = fit(TinyViT(), data, None, config=config, device="cpu", progress=False).model
    model, x, y = TinyViT(), normalize(data.gather(slice(None))), torch.tensor(data.target).float()
    depth = {"cls": 0, "place": 0, "embed": 1, "norm": 5, "head": 6}
    groups = []
    for name, p in model.named_parameters():
        first, second = (name.split(".") + [""])[:2]
        d = 2 + int(second) if first == "blocks" else depth[first]
        groups.append({"params": [p], "share": 0.8 ** (6 - d), "weight_decay": 0.05 if p.ndim > 1 else 0.0})
    adamw = torch.optim.AdamW(groups, lr=1.0)
    for rate in rates_by_hand(3e-3, 6, 1, True):
        for group in adamw.param_groups:
            group["lr"] = rate * group["share"]
        adamw.zero_grad()
        F.binary_cross_entropy_with_logits(model(x)[:, 0], y).backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1.0, 0.5 / norm.item())
        adamw.step()
    for (name, a), b in zip(ours.named_parameters(), model.parameters(), strict=True):
        keys = slice(24, 48) if name.endswith("qkv.bias") else slice(0)  # their gradient is zero but for rounding, which Adam makes large
        a.data[keys], b.data[keys] = 0, 0
        assert torch.allclose(a, b, atol=2e-5), name


def test_the_norm_that_is_clipped_is_that_of_what_may_move():
    data, config = faces(64), PLAIN.model_copy(update={"batch_size": 64, "epochs": 1, "momentum": 0.0, "weight_decay": 0.0, "lr": 1.0})
    mask = {"out.weight": torch.tensor([[True, False, False]])}
    model = fit(Line(), data, None, config=config.model_copy(update={"clip": 1e-4}), trainable=mask, device="cpu", progress=False).model
    assert model.out.weight.abs().detach().numpy() == pytest.approx(np.array([[1e-4, 0, 0]]), rel=1e-2)


# accumulation

def seen_by(config, n):
    "Pixels and rows that a network and its loss are given, batch by batch, and the network when it is trained."
    pixels, rows = [], []

    class Watched(TinyViT):
        def forward(self, x):
            if self.training:
                pixels.append(x.detach().clone())
            return super().forward(x)

    def loss_fn(logits, y, of):
        rows.append(of)
        assert len(of) == len(y) == len(logits) > 1
        return classification_loss(logits, y)

    fitted = fit(Watched(), ramps(n, 0), ramps(30, 1), config=config, loss_fn=loss_fn, device="cpu", progress=False)
    return torch.cat(pixels), torch.cat(rows), max(map(len, rows)), fitted


@pytest.mark.parametrize("n", [64, 67, 70])
def test_pieces_are_the_batch(n):
    "The same images, crops and order, and the same weights but for the order of summation."
    config = MODERN.model_copy(update={"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "layer_decay": None})
    x, rows, most, whole = seen_by(config, n)
    for pieces, expected in ((2, 8), (5, 4), (8, 2 + n % 2)):  # three images that are left over are one piece
        x_pieces, rows_pieces, most_pieces, parts = seen_by(config.model_copy(update={"accumulate": pieces}), n)
        assert torch.equal(x, x_pieces) and torch.equal(rows, rows_pieces) and (most, most_pieces) == (16, expected)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True))
        assert np.allclose(whole.history, parts.history, atol=1e-4)


def test_the_gradient_of_pieces_is_that_of_the_batch():
    "One step of plain descent moves every weight by the gradient of the mean loss, in pieces of unequal size too."
    data = ramps(23, 0)
    config = TrainConfig(epochs=1, batch_size=23, lr=1.0, momentum=0, weight_decay=0, scale=(1.0, 1.0), flip=0.0, accumulate=5)
    model, x, y = TinyViT(), normalize(data.gather(slice(None))), torch.tensor(data.target).float()
    moved = fit(TinyViT(), data, None, config=config, device="cpu", progress=False).model
    gradient = torch.autograd.grad(F.binary_cross_entropy_with_logits(model(x)[:, 0], y), model.parameters())
    for before, after, g in zip(model.parameters(), moved.parameters(), gradient, strict=True):
        assert torch.allclose(before - after, g, atol=1e-5)


def test_pieces_of_a_batch_norm_network_hold_two_images():
    "Seventeen images in batches of five: the last batch holds two."
    config = PLAIN.model_copy(update={"batch_size": 5, "accumulate": 2})
    assert np.isfinite(fit(narrow_resnet18(8), faces(17), faces(9), config=config, device="cpu", progress=False).history.loss).all()


# settings and what is kept of them

def test_settings_that_came_later_do_not_change_what_older_results_are_known_by():
    "Results and checkpoints are found by the dump of their settings, in this order."
    old = {"epochs": 15, "steps": None, "optimizer": "sgd", "batch_size": 128, "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0001,
           "milestones": (10,), "gamma": 0.1, "scale": (0.08, 1.0), "flip": 0.5, "precision": "auto"}
    assert list(TrainConfig().model_dump().items()) == list(old.items())
    assert TrainConfig(**old).model_dump_json() == ('{"epochs":15,"steps":null,"optimizer":"sgd","batch_size":128,"lr":0.01,"momentum":0.9,'
                                                    '"weight_decay":0.0001,"milestones":[10],"gamma":0.1,"scale":[0.08,1.0],"flip":0.5,'
                                                    '"precision":"auto"}')
    later = {"schedule": "cosine", "warmup": 0.1, "layer_decay": 0.75, "clip": 1.0, "accumulate": 4}
    for name, value in later.items():
        config = TrainConfig(**{name: value})
        assert config.model_dump() == {**old, name: value} and TrainConfig(**config.model_dump()) == config
        assert config.model_copy(update={name: TrainConfig.model_fields[name].default}).model_dump() == old


def test_a_checkpoint_of_an_older_release_is_continued(tmp_path):
    "Its groups of tensors knew of no share of the learning rate."
    config, file = PLAIN.model_copy(update={"scale": (0.5, 1.0)}), tmp_path / "c.pt"

    def stop(steps, epoch, figures):
        raise KeyboardInterrupt

    whole = fit(Line(), faces(), None, config=config, device="cpu", progress=False).model
    with pytest.raises(KeyboardInterrupt):
        fit(Line(), faces(), None, config=config, device="cpu", progress=False, checkpoint=file, callback=stop)
    kept = torch.load(file, weights_only=True)
    for group in kept["optimizer"]["param_groups"]:
        del group["scale"]
    torch.save(kept, file)
    resumed = fit(Line(), faces(), None, config=config, device="cpu", progress=False, checkpoint=file).model
    assert torch.equal(resumed.out.weight, whole.out.weight)


@pytest.mark.parametrize("wrong,message", [
    ({"optimizer": "lamb"}, "optimizer = 'lamb': input should be 'sgd', 'adam' or 'adamw'"),
    ({"schedule": "linear"}, "schedule = 'linear': input should be 'milestones' or 'cosine'"),
    ({"warmup": 1.0}, "warmup = 1.0: input should be less than 1"),
    ({"warmup": -0.1}, "warmup = -0.1: input should be greater than or equal to 0"),
    ({"layer_decay": 1.5}, "layer_decay = 1.5: input should be less than or equal to 1"),
    ({"clip": 0}, "clip = 0: input should be greater than 0"),
    ({"accumulate": 0}, "accumulate = 0: input should be greater than or equal to 1"),
    ({"accumulate": 9, "batch_size": 16}, "accumulate = 9 pieces of a mini-batch of 16 images hold fewer than two each; 8 is the most"),
])
def test_settings_that_cannot_be_are_told_in_a_line(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)) as told:
        TrainConfig(**wrong)
    assert "\n" not in str(told.value)


# callbacks

def test_a_callback_is_told_steps_epoch_and_figures():
    told = []
    config = HELD.model_copy(update={"steps": 11})
    fitted = fit(Line(), faces(48), faces(9, seed=1), config=config, device="cpu", progress=False, criteria={"mean": np.mean},
                 callback=lambda *what: told.append(what))
    assert [(steps, epoch) for steps, epoch, _ in told] == [(3, 0), (7, 1), (11, 2)]
    assert [figures for *_, figures in told] == fitted.history.to_dict("records") and set(told[0][2]) == {
        "lr", "loss", "train_accuracy", "val_accuracy", "mean"}


def test_a_callback_that_raises_ends_the_run_with_its_own_error_and_leaves_the_checkpoint(tmp_path):
    class Full(Exception):
        pass

    told = []

    def callback(steps, epoch, figures):
        told.append(epoch)
        figures.clear()  # which is nobody else's
        if epoch == 1:
            raise Full("no space left")

    with pytest.raises(Full, match="^no space left$"):
        trained(callback=callback, checkpoint=tmp_path / "c.pt")
    assert len(torch.load(tmp_path / "c.pt", weights_only=True)["history"]) == 2
    resumed, whole = trained(checkpoint=tmp_path / "c.pt", callback=lambda s, e, f: told.append(e)), trained()
    assert told == [0, 1, 2, 3] and resumed.history.equals(whole.history)
    assert all(torch.equal(v, resumed.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


def test_tensorboard_reads_what_its_callback_writes(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    history = trained(callback=tensorboard_callback(tmp_path / "run")).history
    found = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [e.value for e in found.Scalars("loss")] == pytest.approx(history.loss.tolist(), rel=1e-6)
    assert [e.step for e in found.Scalars("val_accuracy")] == [8, 16, 24, 32]
    fit(Line(), faces(), None, config=PLAIN, device="cpu", progress=False, callback=tensorboard_callback(tmp_path / "blind"))
    assert "val_accuracy" not in EventAccumulator(str(tmp_path / "blind")).Reload().Tags()["scalars"]


def test_trackio_keeps_what_its_callback_logs(tmp_path):
    pytest.importorskip("trackio")
    code = ("from test_training import trained; import trackio; from trackio.sqlite_storage import SQLiteStorage\n"
            "from aimfair.training import trackio_callback\n"
            "history = trained(callback=trackio_callback('faces', name='first')).history; trackio.finish()\n"
            "kept = SQLiteStorage.get_logs('faces', 'first')\n"
            "print([round(row['loss'], 5) for row in kept] == [round(x, 5) for x in history.loss], [row['step'] for row in kept])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent, env={
        **os.environ, "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "True [8, 16, 24, 32]"


@pytest.mark.parametrize("make,module,name", [(tensorboard_callback, "torch.utils.tensorboard", "tensorboard"),
                                              (trackio_callback, "trackio", "trackio")])
def test_a_missing_extra_is_named(monkeypatch, make, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"^{name}_callback needs the extra: pip install 'aimfair\[{name}\]'") as told:
        make("runs")
    assert "\n" not in str(told.value)


PAGES = """
import resource, sys
import numpy as np, torch
from aimfair.data import Faces
from aimfair.models import create_model
from aimfair.training import predict_logits

torch.set_num_threads(1)
faces = Faces.from_arrays(np.random.default_rng(0).integers(0, 256, (576, 3, 64, 64), dtype=np.uint8), np.arange(576) % 2)
model = create_model("timm/tf_efficientnet_lite0")
made = {}
for batch_size in (192, None, 192, None):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    logits = predict_logits(model, faces, batch_size=batch_size, device="cpu")
    made[batch_size] = logits, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
assert np.abs(made[192][0] - made[None][0]).max() < 1e-4 * np.abs(made[192][0]).max()
print(made[192][1], made[None][1])
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", ()), reason="the C library is not glibc")
def test_predictions_do_not_ask_for_memory_batch_after_batch():
    out = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True).stdout
    large, usual = map(int, out.split())
    assert usual < large / 2, out


GIVEN_BACK = """
import time
import torch
from aimfair.device import reused_memory

def held():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / 2**20

for _ in range(2):
    with reused_memory():
        blocks = [torch.ones(2**22) for _ in range(16)]
        full = held()
        del blocks
        with reused_memory():
            pass
        kept = held()
        time.sleep(2.1)
    print(full, kept, held())
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", ()), reason="the C library is not glibc")
def test_the_system_gets_memory_back_at_the_end():
    out = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True).stdout
    for line in out.splitlines():
        full, kept, after = map(float, line.split())
        assert kept > full - 64 and after < full - 200, out
