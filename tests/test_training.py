"The training loop against PyTorch itself, and its faults: kills, wrong weights, odd models."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from aimfair.data import Faces, normalize
from aimfair.training import (
    TrainConfig,
    WeightsError,
    accuracy,
    create_model,
    fit,
    head_of,
    load_weights,
    narrow_resnet18,
    predict,
    read_weights,
)


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
    checkpoint, kills = tmp_path / "run.pt", 0
    for _ in range(2):
        process = _train(tmp_path, "resumed.pt", checkpoint)
        stamp = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == stamp):
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    assert _train(tmp_path, "resumed.pt", checkpoint).wait() == 0
    whole, resumed = (torch.load(tmp_path / n, weights_only=True) for n in ("whole.pt", "resumed.pt"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


class TestWeights:
    def test_files_of_both_kinds(self, tmp_path):
        from safetensors.torch import save_file
        model = narrow_resnet18(n_outputs=3)
        save_file(model.state_dict(), tmp_path / "a.safetensors")
        torch.save(model.state_dict(), tmp_path / "a.pth")
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "b.pth")
        for name in ("a.safetensors", "a.pth", "b.pth"):
            got = create_model("toy_resnet18", weights=tmp_path / name, n_outputs=3)
            assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), got.state_dict().values(), strict=True))

    def test_a_pickle_with_code_is_refused(self, tmp_path):
        import pickle

        class Evil:
            def __reduce__(self):
                return (Path(tmp_path / "ran").write_text, ("x",))

        (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
        torch.save(Evil(), tmp_path / "evil2.pth")
        for name in ("evil.pth", "evil2.pth"):
            with pytest.raises(WeightsError, match="state dict"):
                read_weights(tmp_path / name)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x02}q\x00."])
    def test_files_that_are_no_weights(self, tmp_path, content):
        for suffix in (".safetensors", ".pth"):
            path = tmp_path / f"x{suffix}"
            path.write_bytes(content)
            with pytest.raises((WeightsError, RuntimeError)) as e:
                load_weights(narrow_resnet18(8), read_weights(path))
            assert "\n" not in str(e.value)

    def test_no_network_is_one_line(self, monkeypatch):
        def unreachable(*args, **kwargs):
            raise OSError("unreachable")

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
        with pytest.raises(WeightsError, match="weights=PATH") as e:
            create_model("resnet18", weights="IMAGENET1K_V1")
        assert "\n" not in str(e.value)

    def test_the_bundled_backbone_loads_and_learns_faster_than_from_nothing(self):
        from aimfair import toyfaces
        factors = toyfaces.sample_factors(700, seed=3)
        y = toyfaces.annotations(factors)["Eyeglasses"].to_numpy()
        data = Faces.from_arrays(toyfaces.draw(factors), y)
        config = TrainConfig(epochs=3, batch_size=32, lr=0.02, milestones=(2,), scale=(0.7, 1.0))
        score = {w: fit(create_model("toy_resnet18", weights=w), data.select(slice(0, 500)), data.select(slice(500, 700)), config=config,
                        device="cpu", progress=False).val_accuracy for w in ("bundled", None)}
        assert score["bundled"] > 0.85 and score["bundled"] > score[None]


HEADS = [("resnet18", 64), ("efficientnet_b0", 64), ("vit_b_16", 224), ("squeezenet1_1", 64), ("densenet121", 64)]


@pytest.mark.parametrize("name,size", HEADS)
def test_torchvision_models_get_the_right_head(name, size):
    if name == "squeezenet1_1":  # its head is a convolution
        assert create_model(name).eval()(torch.zeros(2, 3, size, size)).shape == (2, 1)
        return
    model = create_model(name, n_outputs=1)
    assert isinstance(model.get_submodule(head_of(model)), nn.Linear)
    assert model.eval()(torch.zeros(1, 3, size, size)).shape == (1, 1)


def test_a_timm_model_trains():
    pytest.importorskip("timm")
    model = create_model("timm/resnet10t", n_outputs=1)
    assert head_of(model) == "fc"
    assert len(fit(model, faces(), None, config=PLAIN.model_copy(update={"epochs": 1}), device="cpu", progress=False).history) == 1
    with pytest.raises(ValueError, match="timm has no model"):
        create_model("timm/resnet10000")


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
