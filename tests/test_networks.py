"Networks of other people: of any library, hard to copy or to train, with ends of their own; debiased, saved and loaded again."

import json
import os
import subprocess
import sys
import threading
import warnings
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from aimfair.data import Faces, normalize
from aimfair.device import seeded
from aimfair.models import (
    Pixels,
    WeightsError,
    class_names_of,
    heads_of,
    image_size,
    logits_of,
    model_from,
    narrow_resnet18,
    pixels_of,
    read_weights,
)
from aimfair.pipeline import AIMFair
from aimfair.training import TrainConfig

os.environ["HF_HUB_OFFLINE"] = "1"
pytestmark = pytest.mark.filterwarnings("ignore:The model handed in gets", "ignore:no sample with", "ignore:The model gets",
                                        "ignore:.*torch.jit", "ignore:.*weight_norm", "ignore:.*lazy modules")
RUN = {"config": TrainConfig(epochs=1, batch_size=16, lr=0.05), "gradient_batch_size": 16, "device": "cpu", "progress": False}
SIZE = 32


def faces(n, seed, classes=2, contrast=60):
    "Noise, lighter for each of target and group."
    rng = np.random.default_rng(seed)
    t, p = np.arange(n) % classes, np.arange(n) // classes % 2
    pixels = rng.integers(0, 60, (n, 3, SIZE, SIZE)) + (contrast * t + 20 * p)[:, None, None, None]
    return Faces.from_arrays(pixels.astype(np.uint8), t, p, [f"{seed}-{i}" for i in range(n)])


def fit(model, classes=2, **options):
    images = {"real": faces(32, 0, classes), "synthetic": faces(64 * classes // 2, 1, classes), "val": faces(32, 2, classes)}
    return AIMFair(model, **{**RUN, **options}).fit(**images)


def batch(n=8):
    return normalize(faces(n, 3).gather(slice(None))).contiguous()


def state(model):
    return {n: v.detach().clone() for n, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[n]) for n, v in a.items())


# --- of other libraries


def tiny(kind):
    "A tiny classifier of two classes for images of 32 x 32, and its image processor."
    import transformers as hf
    words = {"id2label": {0: "woman", 1: "man"}, "label2id": {"woman": 0, "man": 1}}
    size = {"image_size": SIZE, "patch_size": 8}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}
    with seeded(0):
        if kind == "vit":
            return hf.ViTForImageClassification(hf.ViTConfig(**small, **size, **words)), hf.ViTImageProcessor(
                size={"height": SIZE, "width": SIZE}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])
        if kind == "clip":
            config = hf.CLIPConfig(vision_config={**small, **size}, text_config={**small, "vocab_size": 99}, projection_dim=16, **words)
            return hf.CLIPForImageClassification(config), hf.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=SIZE)
        config = hf.DeiTConfig(**small, **size, **words)
        return hf.DeiTForImageClassificationWithTeacher(config), None


@pytest.fixture
def folder(tmp_path):
    "A Hugging Face model as somebody saved it."
    def saved(kind="vit", **changes):
        model, processor = tiny(kind)
        model.save_pretrained(tmp_path / kind)
        if processor is not None:
            for name, value in changes.items():
                setattr(processor, name, value)
            processor.save_pretrained(tmp_path / kind)
        return tmp_path / kind
    return saved


@pytest.mark.parametrize("kind", ["vit", "clip", "deit"])
def test_hugging_face_models_from_end_to_end(folder, tmp_path, kind):
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    source = folder(kind)
    model = AutoModelForImageClassification.from_pretrained(source)  # in Python, as its user would
    before = state(model)
    done = fit(model)
    assert same(before, state(model)) and not same(before, state(done.model)) and type(done.model) is type(model)
    assert class_names_of(done.model) == ["woman", "man"]
    place = done.save(tmp_path / "fairer")
    again = AutoModelForImageClassification.from_pretrained(place)
    with torch.no_grad():
        assert torch.equal(again(batch()).logits, done.model(batch()).logits)
    if kind == "deit":  # came without a processor
        assert done.report.setup["normalisation"]["source"] == "assumed" and any("No image processor" in n for n in done.report.notes)
        return
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3)).astype(np.uint8))
    one, two = (AutoImageProcessor.from_pretrained(p)(images=picture, return_tensors="np")["pixel_values"] for p in (source, place))
    assert np.array_equal(one, two) and one.shape == (1, 3, SIZE, SIZE)
    assert done.report.setup["normalisation"]["source"] == "image processor"


def test_the_processors_pixels_are_what_the_model_sees(folder):
    "Ours and the processor's own arithmetic, on an image that needs no resizing."
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    for changes in ({}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}, {"do_rescale": False, "image_mean": [120, 110, 100]}):
        place = folder("vit", **changes)
        image = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
        expected = AutoImageProcessor.from_pretrained(place)(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
        x = normalize(torch.from_numpy(image.transpose(2, 0, 1))[None])
        pixels = pixels_of(AutoModelForImageClassification.from_pretrained(place))
        torch.testing.assert_close(pixels(x), expected, rtol=1e-4, atol=1e-4)
    assert pixels_of(model_from(str(place)), (0, 0, 0), (1, 1, 1)).source == "given"


@pytest.mark.parametrize(("options", "size"), [
    ({"size": {"shortest_edge": 40}, "do_center_crop": False}, 40), ({"size": {"shortest_edge": 40}, "crop_size": 24}, 24),
    ({"size": {"height": 48, "width": 48}, "do_center_crop": False}, 48), ({"do_resize": False, "do_center_crop": False}, SIZE),
])
def test_sizes_are_the_processors(folder, options, size):
    from transformers import CLIPImageProcessor
    place = folder("vit")
    CLIPImageProcessor(**options).save_pretrained(place)
    assert image_size(model_from(f"hf/{place}")) == size


def test_what_is_no_classifier_of_hugging_face_is_refused_in_a_line(folder, tmp_path, monkeypatch):
    from transformers import BertConfig, BertModel, ViTModel
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # without a network the hub would be asked for a minute
    place = folder("vit")
    ViTModel(tiny("vit")[0].config).save_pretrained(tmp_path / "body")
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)).save_pretrained(
        tmp_path / "text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_bytes((place / "config.json").read_bytes())
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    config = json.loads((place / "config.json").read_text())
    three = {**config, "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(three))
    (tmp_path / "other" / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes())
    for spec, message in (("hf/nobody/no-such-model", "give a local folder"), (f"hf/{tmp_path}/body", "holds no trained classifier"),
                          (f"hf/{tmp_path}/text", "not an image classifier"), (f"{tmp_path}/empty", "holds no config.json"),
                          (f"hf/{tmp_path}/gone", "no such folder"), (f"hf/{tmp_path}/broken", "not an image classifier"),
                          (f"hf/{tmp_path}/other", "classifier")):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            model_from(spec)
        assert "\n" not in str(caught.value), spec
    with pytest.raises(ValueError, match=r"has 2 outputs \(woman, man\) for 3 classes; expected 3"):
        fit(model_from(str(place)), classes=3)


def test_convnext_of_timm_with_its_own_pixels():
    timm = pytest.importorskip("timm")
    with seeded(0):
        model = timm.create_model("convnext_atto", pretrained=False, num_classes=2, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    done = fit(model)
    found = done.report.setup["normalisation"]
    assert found["source"] == "timm" and found["mean"] == [0.485, 0.456, 0.406] and "timm/convnext_atto" in done.report.setup["network"]
    given = fit(model, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert given.report.setup["normalisation"]["source"] == "given"
    assert not same(state(given.model), state(done.model))


def test_both_heads_of_distilled_transformers_move():
    timm = pytest.importorskip("timm")
    with seeded(0):
        model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2, img_size=SIZE, patch_size=8, depth=1, embed_dim=48)
    model.set_distilled_training(True)
    for net, heads in ((model, ["head", "head_dist"]), (tiny("deit")[0], ["cls_classifier", "distillation_classifier"])):
        assert heads_of(net) == heads
        before, done = state(net), fit(net, strategy="linear_probe")
        moved = {n for n, v in state(done.model).items() if not torch.equal(v, before[n])}
        assert moved == set(done.mask) == {f"{head}.{part}" for head in heads for part in ("weight", "bias")}
    assert model.distilled_training


def test_heads_that_stand_in_parts_of_their_own():
    import transformers as hf
    assert heads_of(hf.LevitForImageClassificationWithTeacher(hf.LevitConfig(num_labels=2))) == ["classifier", "classifier_distill"]
    ordinary = nn.Sequential(*(nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(8, 4)}) for _ in range(3)))
    assert heads_of(ordinary) == ["2.b"]


def test_a_folder_of_timms(tmp_path):
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf
    with seeded(0):
        model = timm.create_model("resnet10t", num_classes=2)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "input_size": (3, 96, 96)}
    save_for_hf(model, tmp_path / "own", model_config={"label_names": ["no", "yes"]})
    found = model_from(f"hf/{tmp_path}/own")
    assert same(state(found), state(model)) and class_names_of(found) == ["no", "yes"]
    assert pixels_of(found).mean == (0.1, 0.2, 0.3) and image_size(found) == 96


def test_no_code_of_a_folder_is_run(folder, tmp_path):
    place = folder("vit")
    config = json.loads((place / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForImageClassification": "own.Own"}
    (place / "config.json").write_text(json.dumps({**config, "model_type": "its-own", "auto_map": names}))
    (place / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(WeightsError, match="not an image classifier that transformers can load") as caught:
        model_from(str(place))
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_a_folder_that_is_called_like_a_network_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy_resnet18").mkdir()
    torch.save(narrow_resnet18().state_dict(), "toy_resnet18/last.pt")
    assert type(model_from("toy_resnet18", "toy_resnet18/last.pt")).__name__ == "NarrowResNet18"


# --- hard to copy or to train


class Net(nn.Module):
    "A small network whose parts a test replaces."

    def __init__(self, n=2, end=lambda z: z):
        super().__init__()
        self.stem, self.norm, self.fc, self.end = nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.Linear(6, n), end

    def body(self, x):
        return self.norm(self.stem(x)).relu().mean((2, 3))

    def forward(self, x):
        return self.end(self.fc(self.body(x)))


def net(n=2, end=lambda z: z, kind=Net):
    with seeded(0):
        return kind(n, end)


class Keeps(Net):
    "Keeps activations wherever one can."

    def forward(self, x):
        self.features = self.body(x)
        self.things, self.note = [{"deep": (self.features,)}], SimpleNamespace(last=self.features)
        return self.fc(self.features)


class Caches(Net):
    "Makes a table and a buffer when it is called first, and again for batches of another size."

    def forward(self, x):
        if getattr(self, "table", torch.zeros(0)).shape[:1] != x.shape[:1]:
            self.table = torch.ones(len(x), 6)
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.ones(6))
        return self.fc(self.body(x) * self.table * self.scale)


def frozen():
    return net().requires_grad_(False)


def whole_numbers():
    model = net()
    model.steps = nn.Parameter(torch.tensor([7, 8]), requires_grad=False)
    return model


def normed(norm, **how):
    model = net()
    model.fc = norm(model.fc, **how)
    return model


def kept():
    model = net(kind=Keeps)
    model(batch())
    return model


def seen(mode):
    model = net(kind=Caches)
    with mode():
        model(batch())
    return model


def inner_compiled():
    model = net()
    model.fc = torch.compile(model.fc)
    return model


def compiled_in_place():
    model = net()
    model.compile()
    return model


def tied():
    model = net()
    model.twin = model.fc
    return model


HARD = {
    "activations kept": kept, "cache to be filled": lambda: net(kind=Caches), "cache filled": lambda: seen(torch.no_grad),
    "cache filled in inference mode": lambda: seen(torch.inference_mode),
    "synchronised batch norm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(net()), "frozen": frozen, "whole numbers": whole_numbers,
    "old weight norm": lambda: normed(nn.utils.weight_norm), "weight norm": lambda: normed(nn.utils.parametrizations.weight_norm),
    "old spectral norm": lambda: normed(nn.utils.spectral_norm), "half": lambda: net().half(), "bfloat16": lambda: net().bfloat16(),
    "double": lambda: net().double(), "tied": tied, "compiled": lambda: torch.compile(net()), "compiled inside": inner_compiled,
    "compiled in place": compiled_in_place, "parallel": lambda: nn.DataParallel(net()),
    "compiled and parallel": lambda: nn.DataParallel(torch.compile(net())),
}


@pytest.mark.parametrize("case", HARD)
def test_networks_that_are_hard_to_copy_or_to_train(case, tmp_path):
    model = HARD[case]()
    before, wrapped = state(model), case.startswith(("compiled", "parallel"))
    done = fit(model, strategy="full")
    assert same(before, state(model)), "the model handed in was touched"
    plain = {n.replace("module.", "").replace("_orig_mod.", ""): v for n, v in before.items()} if wrapped else before
    after = state(done.model)
    assert after.keys() == plain.keys() and {n: v.dtype for n, v in after.items()} == {n: v.dtype for n, v in plain.items()}
    assert any(not torch.equal(v, plain[n]) for n, v in after.items() if v.is_floating_point())
    assert [p.requires_grad for p in done.model.parameters()] == [p.requires_grad for p in model.parameters()]
    assert read_weights(done.save(tmp_path / "out") / "model.safetensors").keys() == plain.keys()
    x = batch().to(done.model.stem.weight.dtype)
    assert done.model(x).shape == (8, 2) and done.model(x).dtype == x.dtype
    done.model(x).sum().backward() if case != "frozen" else None  # and it can be trained on


def test_the_layers_come_back_as_they_were():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net())
    assert type(fit(model).model.norm) is nn.SyncBatchNorm is type(model.norm)


class Detached(Net):
    def forward(self, x):
        return super().forward(x).detach()


class Builds(Net):
    def forward(self, x):
        if not hasattr(self, "late"):
            self.late = nn.Linear(2, 2)
        return self.late(super().forward(x))


class Locked(Net):
    def __init__(self, *args):
        super().__init__(*args)
        self.lock = threading.Lock()


def lazy():
    model = net()
    model.fc = nn.LazyLinear(2)
    return model


def not_finite():
    model = net()
    nn.init.constant_(model.fc.bias, float("inf"))
    return model


def fixed_half():
    return net(kind=type("Fixed", (Net,), {"forward": lambda self, x: Net.forward(self, x.half())})).half()


REFUSED = {
    "TorchScript": (lambda: torch.jit.trace(net().eval(), batch()), "is TorchScript"),
    "TorchScript inside": (lambda: normed(torch.jit.script), "is TorchScript"),
    "lazy": (lazy, "fc.weight has no values yet"), "detached": (lambda: net(kind=Detached), "no gradient leads"),
    "late": (lambda: net(kind=Builds), "makes late.weight in its first pass"), "lock": (lambda: net(kind=Locked), "cannot be copied"),
    "infinite": (not_finite, "not finite"), "labels": (lambda: net(end=lambda z: z.argmax(1)), "returns int64, such as labels"),
    "half in forward": (fixed_half, "must not fix a type"), "meta": (lambda: net().to("meta"), "holds no values"),
    "two tensors": (lambda: net(end=lambda z: {"a": z, "b": z * 2}), "nothing called logits or out"),
    "words": (lambda: net(end=lambda z: "cat"), "it returns a str"),
    "pixelwise": (lambda: nn.Conv2d(3, 2, 3), "has 1800 outputs for 2 classes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_networks_that_cannot_be_trained_are_refused_in_a_line(case):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        fit(build())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["compiled", "compiled inside", "parallel", "compiled and parallel"])
def test_weights_of_plain_and_wrapped_networks_fit_either(case, tmp_path, monkeypatch):
    for name, model in (("plain", net()), ("wrapped", HARD[case]())):
        torch.save({n: v + 1 for n, v in model.state_dict().items()}, tmp_path / f"{name}.pt")  # not as they are made
    expected = [v + 1 for v in net().state_dict().values()]
    code = ["from test_networks import HARD, net", f"def wrapped(): return HARD[{case!r}]()", "def plain(): return net()", ""]
    (tmp_path / "nets.py").write_text("\n".join(code))
    monkeypatch.syspath_prepend(Path(__file__).parent)
    for spec in ("wrapped", "plain"):
        for weights in ("plain", "wrapped"):
            found = model_from(f"{tmp_path}/nets.py:{spec}", tmp_path / f"{weights}.pt")
            assert all(map(torch.equal, found.state_dict().values(), expected))


def test_lazy_layers_are_trained_once_they_have_weights(tmp_path):
    torch.save(net().state_dict(), tmp_path / "w.pt")
    (tmp_path / "lazy_net.py").write_text("from test_networks import lazy\n")
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        done = fit(model_from(f"{tmp_path}/lazy_net.py:lazy", tmp_path / "w.pt"))
    finally:
        sys.path.pop(0)
    assert done.model.fc.weight.shape == (2, 6)


# --- what they return


Pair = namedtuple("Pair", "features logits")
Unnamed = namedtuple("Unnamed", "main other")


@pytest.mark.parametrize("end", [
    lambda z: {"logits": z, "features": z.new_zeros(len(z), 9)}, lambda z: {"out": z, "aux": z}, lambda z: {"classes": z},
    lambda z: (z, z.new_zeros(len(z), 9)), lambda z: [z], lambda z: Pair(z.new_zeros(len(z), 9), z), lambda z: Unnamed(z, None),
    lambda z: SimpleNamespace(logits=z, hidden=z * 0), lambda z: z[..., None, None], lambda z: {"logits": (z, z)},
])
def test_answers_of_any_form(end):
    done, plain = fit(net(end=end)), fit(net())
    assert same(state(done.model), state(plain.model))
    assert type(done.model(batch())) is type(end(torch.zeros(8, 2)))


def by_brightness(end, n=1):
    "A network that is right for every image: bright ones are of class 1."
    model = net(n, end)
    model.norm = nn.Identity()
    with torch.no_grad():
        model.stem.weight.fill_(0.1)
        model.stem.bias.fill_(2.7)
        model.fc.weight.copy_(torch.tensor([[-5.0], [5.0]])[-n:].expand(n, 6))
        model.fc.bias.copy_(torch.tensor([39.0, -39.0])[-n:])
    return model


ENDS = {
    "torch.sigmoid": (torch.sigmoid, 1), "Tensor.sigmoid": (lambda z: z.sigmoid(), 1), "module": (nn.Sigmoid(), 1),
    "in place": (lambda z: z.sigmoid_(), 1), "expit": (torch.special.expit, 1), "squeezed": (lambda z: z.sigmoid().squeeze(1), 1),
    "in a dict": (lambda z: {"out": z.sigmoid()}, 1), "by hand": (lambda z: 1 / (1 + torch.exp(-z)), 1),
    "clamped": (lambda z: z.sigmoid().clamp(1e-7, 1 - 1e-7), 1), "softmax": (lambda z: z.softmax(1), 2), "Softmax": (nn.Softmax(dim=1), 2),
    "F.softmax": (lambda z: nn.functional.softmax(z, dim=-1), 2), "softmax of class 1": (lambda z: z.softmax(1)[:, 1], 2),
    "both": (lambda z: torch.cat([1 - z.sigmoid(), z.sigmoid()], 1), 1), "two sigmoids": (torch.sigmoid, 2),
    "exp of log_softmax": (lambda z: z.log_softmax(1).exp(), 2), "log_softmax": (lambda z: z.log_softmax(1), 2), "none": (lambda z: z, 1),
    "log sigmoid": (nn.functional.logsigmoid, 1),
}


@pytest.mark.parametrize("case", ENDS)
def test_probabilities_are_taken_for_what_they_are(case):
    "A perfect model is perfect before, moves as its twin that returns logits, and answers as it did."
    end, n = ENDS[case]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        done = fit(by_brightness(end, n))
    assert done.report.value("validation", "accuracy")[0] == 1
    assert any("probabilities" in str(w.message) for w in told) == (case not in ("log_softmax", "none"))
    before, after = (m(batch()) for m in (by_brightness(end, n), done.model))
    assert type(before) is type(after)
    if case not in ("by hand", "clamped", "softmax of class 1", "both", "exp of log_softmax", "log_softmax"):  # exactly the logits
        assert same(state(done.model), state(fit(by_brightness(lambda z: z, n)).model))


def test_logits_that_lie_between_nought_and_one_by_chance_stay():
    for end in (lambda z: z * 0.01 + 0.5, lambda z: (z * 0.01).relu()):
        assert not any("probabilities" in note for note in fit(net(1, end)).report.notes)


def test_probabilities_that_come_only_after_training():
    "Logits in training mode, probabilities in evaluation: as some libraries do."
    class Modal(Net):
        def forward(self, x):
            z = super().forward(x)
            return z if self.training else z.softmax(1)

    done, plain = fit(net(kind=Modal)), fit(net())
    assert same(state(done.model), state(plain.model))
    torch.testing.assert_close(done.model(batch()).sum(1), torch.ones(8))


def test_wrong_pixels_are_noticed():
    "A network that was trained on other pixels does clearly better with them, and says so; the user's word is not questioned."
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x):
            return (x * self.gain).mean((1, 2, 3))[:, None] + 1.1

    note = "If it was trained with the former"
    assert any(note in n and "0.485, 0.456, 0.406" in n for n in fit(Trained()).report.notes)
    assert not any(note in n for n in fit(Trained(), mean=mean, std=std).report.notes)


# --- weights


@pytest.mark.parametrize("wrap", [
    lambda s: {"state_dict": s, "state_dict_ema": {n: v * 0 for n, v in s.items()}},
    lambda s: {"ema": {"n_averaged": torch.ones(1)} | {f"module.{n}": v * 0 for n, v in s.items()}, "model": s},
    lambda s: {f"ema_model.module.{n}": v * 0 for n, v in s.items()} | {f"net.{n}": v for n, v in s.items()},
    lambda s: {f"student.{n}": v for n, v in s.items()} | {f"teacher.{n}": v * 0 for n, v in s.items()},
    lambda s: {**s, "epoch": 3, "args": "--lr 0.1"},
    lambda s: {"model": {f"module._orig_mod.{n}": v for n, v in s.items()}, "optimizer": torch.optim.Adam([s["fc.bias"]]).state_dict()},
    lambda s: {f"_forward_module.model.{n}": v for n, v in s.items()},
])
def test_the_trained_weights_among_others(tmp_path, wrap):
    expected = narrow_resnet18(8).state_dict()
    torch.save(wrap(expected), tmp_path / "a.pt")
    (tmp_path / "net.py").write_text("from aimfair.models import narrow_resnet18\ndef build(): return narrow_resnet18(8)\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in (tmp_path / "a.pt", tmp_path / "only"):
            place.mkdir(exist_ok=True) if place.suffix == "" else None
            (tmp_path / "only").is_dir() and os.replace(tmp_path / "a.pt", tmp_path / "only" / "a.pt")
            assert same(state(model_from(f"{tmp_path}/net.py:build", place)), expected)


def test_weights_that_nobody_can_tell_apart_or_that_are_none(tmp_path):
    own = narrow_resnet18(8).state_dict()
    (tmp_path / "net.py").write_text("from aimfair.models import narrow_resnet18\ndef build(): return narrow_resnet18(8)\n")
    torch.save({f"{part}.{n}": v for part in ("left", "right") for n, v in own.items()}, tmp_path / "two.pt")
    torch.jit.script(nn.Linear(1, 1)).save(tmp_path / "script.pt")
    (tmp_path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "none").mkdir()
    for name, message in (("two.pt", "the weights of 2 networks are there, left., right."), ("script.pt", "is TorchScript"),
                          ("lfs.pt", "git lfs pull"), ("none", "holds no file of weights"), (".", "files of weights; name one")):
        with pytest.raises(WeightsError, match=message) as caught:
            model_from(f"{tmp_path}/net.py:build", tmp_path / name)
        assert "\n" not in str(caught.value)


def test_weights_in_parts_of_the_older_kind(tmp_path):
    own = narrow_resnet18(8).state_dict()
    halves = {f"pytorch_model-{i}.bin": dict(list(own.items())[i::2]) for i in (0, 1)}
    for name, part in halves.items():
        torch.save(part, tmp_path / name)
    names = {n: file for file, part in halves.items() for n in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert same(dict(read_weights(tmp_path)), dict(own))
    (tmp_path / "pytorch_model-1.bin").unlink()
    with pytest.raises(WeightsError, match="pytorch_model-1.bin is missing"):
        read_weights(tmp_path)


# --- from files to files


def test_interrupted_and_continued_it_is_saved_in_its_form(folder, tmp_path, monkeypatch):
    from transformers import AutoModelForImageClassification

    from aimfair.pipeline import method
    source = folder("clip")
    images = {"real": faces(32, 0), "synthetic": faces(64, 1), "val": faces(32, 2)}
    whole = fit(model_from(str(source))).save(tmp_path / "whole")

    def interrupt(*args, **how):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(method, "finetune", interrupt)
        AIMFair(model_from(str(source)), **RUN).fit(**images, checkpoint=tmp_path / "kept")
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 3
    other = model_from(str(source))
    with pytest.raises(ValueError, match="unfinished work of another run"):
        AIMFair(other, **RUN, mean=(0, 0, 0), std=(1, 1, 1)).fit(**images, checkpoint=tmp_path / "kept")
    again = AIMFair(other, **RUN).fit(**images, checkpoint=tmp_path / "kept").save(tmp_path / "again")
    one, two = (AutoModelForImageClassification.from_pretrained(place) for place in (whole, again))
    assert same(state(one), state(two))
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in again.iterdir())


def test_the_command_with_a_hugging_face_folder(folder, tmp_path):
    "In the form it came in, with a card; done again it has nothing to do, and of a changed model it wants another folder."
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    source = folder("vit")
    for name, seed, groups in (("real", 0, False), ("val", 1, False), ("synthetic", 2, True)):
        images = faces(64 if groups else 24, seed)
        for i, (t, p) in enumerate(zip(images.target, images.protected, strict=True)):
            place = tmp_path / name / (f"{t}_{p}" if groups else str(t)) / f"{i:03d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.gather(i)[0].numpy().transpose(1, 2, 0)).save(place)
    words = ["--model", f"hf/{source}", "--real", "real", "--val", "val", "--synthetic", "synthetic", "--out", "out", "--epochs", "1",
             "--batch-size", "16", "--device", "cpu"]
    environment = {**os.environ, "AIMFAIR_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parent.parent)}

    def run():
        command = [sys.executable, "-m", "aimfair.cli", "debias", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    first = run()
    assert first.returncode == 0, first.stderr
    out = tmp_path / "out"
    report, card = json.loads((out / "report.json").read_text()), (out / "README.md").read_text()
    assert report["setup"]["image_size"] == [SIZE, SIZE]
    assert report["setup"]["normalisation"]["mean"] == pytest.approx([0.4, 0.5, 0.6], abs=1e-5)
    assert not any(str(tmp_path) in (out / name).read_text() for name in ("README.md", "report.json", "run.json", "config.json"))
    for text in ("library_name: transformers", "ViTForImageClassification (vit)", "woman, man", "annotations of a data set", "worst group"):
        assert text in card
    again, processor = AutoModelForImageClassification.from_pretrained(out), AutoImageProcessor.from_pretrained(out)
    assert again.config.id2label == {0: "woman", 1: "man"} and list(processor.image_mean) == [0.4, 0.5, 0.6]
    old = AutoModelForImageClassification.from_pretrained(source)
    moved = {n for n, v in state(again).items() if not torch.equal(v, old.state_dict()[n])}
    assert moved and moved <= set(json.loads((out / "mask.json").read_text())["tensors"])
    assert "nothing to do" in run().stdout
    again.save_pretrained(source)
    assert "was a folder" in run().stderr
    assert Pixels((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), size=(SIZE, SIZE), source="image processor") == pixels_of(model_from(str(out)))
    assert logits_of(model_from(str(out)), batch()).shape == (8, 2)
