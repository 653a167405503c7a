"The recipe of the small text-to-image model: captions, words, the exact encoder, and training that survives."
import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DiffusionPipeline
from faults import interrupt_at, kill_when
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aimfair import t2i, toyfaces
from aimfair.core import only_worker
from aimfair.data import DataError, DataWarning
from aimfair.t2i import distillation

TINY = {"decoder_steps": 6, "decoder_batch": 4, "decoder_width": 8, "channels": (16, 32), "head_dim": 16, "text_width": 32,
        "text_layers": 1, "tokens": 24, "vocabulary": 640, "steps": 8, "batch_size": 4,
        "warmup": 2, "checkpoint_every": 2, "sheet_every": 8, "sampling_steps": 2, "latent_channels": 8}


@pytest.fixture(scope="module")
def faces():
    return t2i.drawn_faces(24, seed=7, per_face=2)


@pytest.fixture(scope="module")
def trained(faces, tmp_path_factory):
    out = tmp_path_factory.mktemp("t2i") / "tiny"
    t2i.train_t2i(*faces, out=out, config=t2i.T2IConfig(**TINY), progress=False)
    return out


# ---------------------------------------------------------------- captions

WORDS = {"male": r"\b(male|man)\b", "female": r"\b(female|woman)\b", "smile": r"smil|cheer", 
         "none": r"non-smiling|not smiling|unsmiling|without|neutral|serious"}


@given(seed=st.integers(0, 10_000), smiling=st.sampled_from([0, 1]), male=st.sampled_from([0, 1]), young=st.sampled_from([0, 1, None]))
@settings(max_examples=200, deadline=None)
def test_a_caption_says_what_is_known_and_nothing_else(seed, smiling, male, young):
    text = t2i.compose_caption(np.random.default_rng(seed), smiling=smiling, male=male, young=young, details=["glasses"], pose="left")
    assert bool(re.search(WORDS["male"], text)) == bool(male) and bool(re.search(WORDS["female"], text)) == (not male)
    if smiling:
        assert not re.search(WORDS["none"], text)
    elif re.search("smil", text):
        assert re.search(WORDS["none"], text)
    if young is None:
        assert not re.search(r"\b(young|youthful|old|older|senior|elderly)\b", text)
    assert not re.search(r"\bright\b", text) and text == text.strip() and "  " not in text


def test_captions_of_a_face_differ_and_repeat_with_the_seed():
    table = pd.DataFrame({"Smiling": [1] * 20, "Male": [0] * 20, "Young": [1] * 20, "Eyeglasses": [1] * 20, "Black_Hair": [1] * 20})
    first, again, other = (t2i.attribute_captions(table, per_face=5, seed=s) for s in (0, 0, 1))
    assert first == again != other
    assert len({c for some in first for c in some}) > 60


def test_drawn_faces_are_balanced_and_described():
    images, captions = t2i.drawn_faces(400, seed=3, per_face=1)
    assert images.shape == (400, 3, 64, 64) and images.dtype == np.uint8
    smile = [bool(re.search("smil|cheer", c[0])) and not re.search(WORDS["none"], c[0]) for c in captions]
    male = [bool(re.search(WORDS["male"], c[0])) for c in captions]
    assert 0.38 < np.mean(smile) < 0.58 and 0.42 < np.mean(male) < 0.58
    assert abs(np.corrcoef(smile, male)[0, 1]) < 0.15


# ---------------------------------------------------------------- the autoencoder


def test_the_encoder_is_the_principal_components(faces):
    "Against numpy's own decomposition of patches cut by hand."
    images = faces[0]
    vae = t2i.create_autoencoder(images, t2i.T2IConfig(**TINY | {"latent_channels": 48}))
    x = images.astype(np.float64) / 127.5 - 1
    rows = x.reshape(len(x), 3, 16, 2, 2, 16, 2, 2).transpose(0, 2, 5, 3, 6, 4, 7, 1).reshape(-1, 48)  # order of pixels is free
    with torch.no_grad():
        z = vae.encoder(torch.from_numpy(x).float()).permute(0, 2, 3, 1).reshape(-1, 48).double().numpy()
    assert abs(z.mean(0)).max() < 1e-4
    back, *_ = np.linalg.lstsq(np.c_[z, np.ones(len(z))], rows, rcond=None)
    assert abs(np.c_[z, np.ones(len(z))] @ back - rows).max() < 1e-3, "48 components of 48 numbers must hold everything"
    assert np.isclose(np.sqrt(np.mean((z * vae.config.scaling_factor) ** 2)), 1, atol=0.05)


def test_components_keep_contrast_not_brightness():
    "Stripes of 50 % on a dark ground are kept before stripes of 10 % on a light one, although these differ by more in pixels."
    def striped(ground, contrast, phase, along):
        stripes = np.where(np.arange(16) % 4 < 2, phase, -phase) * contrast * ground
        return np.broadcast_to((ground + stripes)[:, None] if along else ground + stripes, (3, 16, 16))
    dark, light = ([striped(*kind, phase, along) for phase in (1, -1)] for kind, along in (((0.1, 0.5), True), ((0.9, 0.1), False)))
    assert np.abs(dark[0] - dark[1]).max() < np.abs(light[0] - light[1]).max()
    images = (np.stack([*dark, *light] * 8) * 255).round().astype(np.uint8)
    vae = t2i.create_autoencoder(images, t2i.T2IConfig(**TINY | {"latent_channels": 2}))  # one goes to light and dark, one is left
    with torch.no_grad():
        z = vae.encoder(torch.from_numpy(images[:4] / 127.5 - 1).float())
    assert (z[0] - z[1]).norm() > 10 * (z[2] - z[3]).norm()


def test_the_loss_weighs_contrast_not_brightness():
    def loss(skin):
        image = torch.full((1, 3, 32, 32), skin)
        marked = image * torch.where(torch.arange(32) % 16 < 3, 0.7, 1.0)
        return t2i.contrast_loss(image * 2 - 1, marked * 2 - 1, floor=0.0).item()
    assert np.isclose(loss(0.15), loss(0.9), rtol=1e-3)
    plain = [((1 - torch.where(torch.arange(32) % 16 < 3, 0.7, 1.0)) * skin).abs().mean().item() for skin in (0.15, 0.9)]
    assert plain[1] / plain[0] > 5, "the plain difference of pixels hardly sees dark faces"


# ---------------------------------------------------------------- the words


def test_words_of_the_captions_are_single_tokens(faces):
    tokenizer = t2i.train_tokenizer([c for some in faces[1] for c in some] * 3, vocabulary=900, length=24)
    ids = tokenizer("a smiling male with brown skin").input_ids
    assert len(ids) == 8 and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    strange = tokenizer("Zürich, 東京 & <b>!").input_ids
    assert len(strange) > 8 and strange.count(tokenizer.eos_token_id) == 1, "unknown text has tokens, and none is taken for the end"


# ---------------------------------------------------------------- training


def test_the_folder_is_a_standard_pipeline(trained, faces):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(trained, local_files_only=True)
    assert type(pipe) is StableDiffusionPipeline
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a smiling woman", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (64, 64)
    about = json.loads((trained / "aimfair.json").read_text())
    assert about["num_inference_steps"] == 2 and about["images"] == 24
    assert (trained / "training" / "000008.png").is_file() and not list(trained.glob(".*"))


def test_training_again_finds_everything_done(trained, faces):
    before = (trained / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    start = time.perf_counter()
    t2i.train_t2i(*faces, out=trained, config=t2i.T2IConfig(**TINY), progress=False)
    assert (trained / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert time.perf_counter() - start < 60


def test_a_folder_has_one_trainer_who_takes_away_what_killed_ones_left(trained, faces):
    left = trained / "training" / ".denoiser.pt.0123456789ab.tmp", trained / "..whole.0123456789ab.tmp" / "unet"
    with only_worker(trained / "training", trained), pytest.raises(ValueError, match=f"another process is at work on {trained};"):
        t2i.train_t2i(*faces, out=trained, config=t2i.T2IConfig(**TINY), progress=False)
    left[0].touch()
    left[1].mkdir(parents=True)
    t2i.train_t2i(*faces, out=trained, config=t2i.T2IConfig(**TINY), progress=False)
    assert not list(trained.rglob(".*")) and not (trained / "training" / "lock").exists()


def test_a_folder_of_another_run_is_refused(trained, faces):
    with pytest.raises(ValueError, match="another model or data"):
        t2i.train_t2i(*faces, out=trained, config=t2i.T2IConfig(**TINY | {"lr": 1e-3}), progress=False)


@pytest.mark.parametrize(("change", "message"), [
    (lambda im, c: (im[:, :, :32, :32], c), "takes"), (lambda im, c: (im, c[:-1]), "lists of"),
    (lambda im, c: (im, [["a"]] + c[1:]), "equally long")])
def test_unfit_images_and_captions_are_told(faces, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        t2i.train_t2i(*change(*faces), out=tmp_path, config=t2i.T2IConfig(**TINY), progress=False)


@pytest.mark.parametrize("call", [4, 6 + 6])  # in the decoder's training, and in the denoiser's
def test_an_interrupted_run_ends_as_a_whole_one(trained, faces, tmp_path, monkeypatch, call):
    interrupt_at(monkeypatch, torch.Tensor, "backward", call)
    with pytest.raises(KeyboardInterrupt):
        t2i.train_t2i(*faces, out=tmp_path, config=t2i.T2IConfig(**TINY), progress=False)
    assert not (tmp_path / "model_index.json").exists()
    monkeypatch.undo()
    t2i.train_t2i(*faces, out=tmp_path, config=t2i.T2IConfig(**TINY), progress=False)
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        assert (trained / f"{name}.safetensors").read_bytes() == (tmp_path / f"{name}.safetensors").read_bytes(), name


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    script = (f"from aimfair import t2i; t2i.train_t2i(*t2i.drawn_faces(24, seed=7, per_face=2), out={str(tmp_path / 'x')!r}, "
              f"config=t2i.T2IConfig(**{TINY | {'steps': 40}!r}), progress=False)")
    work = tmp_path / "x/training"
    for ready in (lambda: (work / "decoder.pt").exists(), lambda: (work / "denoiser.pt").exists()):
        assert kill_when(subprocess.Popen([sys.executable, "-c", script]), ready)
    assert not (tmp_path / "x/model_index.json").exists()
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    assert (tmp_path / "x" / "model_index.json").is_file()
    assert len((work / "log.jsonl").read_text().splitlines()) >= 5


# ---------------------------------------------------------------- a student

def test_saved_over_another_it_is_whole_or_none(trained, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(trained, out)
    pipeline = DiffusionPipeline.from_pretrained(trained, local_files_only=True)
    interrupt_at(monkeypatch, shutil, "rmtree", 3)  # the one before has made room for the first part
    with pytest.raises(KeyboardInterrupt):
        t2i.save_pipeline(pipeline, out)
    assert not (out / "model_index.json").exists(), "parts of two pipelines are not one"
    monkeypatch.undo()
    t2i.save_pipeline(pipeline, out)
    assert {p.name for p in out.iterdir()} == {p.name for p in trained.iterdir()}
    ours, theirs = (folder / "unet/diffusion_pytorch_model.safetensors" for folder in (out, trained))
    assert ours.read_bytes() == theirs.read_bytes()


STUDENT = {"distillation_steps": 6, "distillation_lessons": 12, "distillation_from": 3, "distillation_lr": 1e-3}


def test_a_student_ends_as_a_whole_one_where_it_was_interrupted(faces, tmp_path, monkeypatch):
    "Killed while the teacher draws its lessons, and again while the student learns."
    config = t2i.T2IConfig(**TINY | STUDENT)
    whole = t2i.train_t2i(*faces, out=tmp_path / "whole", config=config, progress=False)
    with monkeypatch.context() as patch:
        interrupt_at(patch, distillation, "save_file", 2)
        with pytest.raises(KeyboardInterrupt):
            t2i.train_t2i(*faces, out=tmp_path / "broken", config=config, progress=False)
    assert len(list((tmp_path / "broken/training/lessons-3-steps-guidance-2").glob("*.safetensors"))) == 1
    with monkeypatch.context() as patch:
        interrupt_at(patch, distillation, "jump_loss", 4)
        with pytest.raises(KeyboardInterrupt):
            t2i.train_t2i(*faces, out=tmp_path / "broken", config=config, progress=False)
    mended = t2i.train_t2i(*faces, out=tmp_path / "broken", config=config, progress=False)
    assert all((a == b).all() for a, b in zip(whole.unet.parameters(), mended.unet.parameters(), strict=True))


@pytest.mark.slow
def test_a_student_learns_where_its_teacher_ends_up(faces, tmp_path):
    "After some hundred steps it is nearer to the teacher's three guided steps than the teacher is in one."
    out = tmp_path / "taught"
    teacher = t2i.train_t2i(*faces, out=out, config=t2i.T2IConfig(**TINY | {"steps": 120}), progress=False)
    student = t2i.train_t2i(*faces, out=out, progress=False, config=t2i.T2IConfig(
        **TINY | STUDENT | {"steps": 120, "distillation_lessons": 64, "distillation_steps": 200, "sheet_every": 200}))
    about = json.loads((out / "aimfair.json").read_text())
    assert (about["num_inference_steps"], about["guidance_scale"]) == (1, 1.0)

    def latents(pipe, steps, scale):
        noise = [torch.Generator().manual_seed(10_000 + i) for i in range(8)]
        words = [c for some in faces[1][:4] for c in some]
        return pipe(words, num_inference_steps=steps, guidance_scale=scale, generator=noise, output_type="latent").images
    aim = latents(teacher, 3, t2i.T2IConfig().guidance_scale)
    ours, before = ((latents(pipe, 1, 1.0) - aim).square().mean().item() for pipe in (student, teacher))
    assert ours < 0.6 * before, f"{ours:.4f} of {before:.4f}"


# ---------------------------------------------------------------- faces of one's own


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        Image.new("RGB", (20, 30), (40 * i, 90, 10)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_captions_beside_the_images(folder):
    for i in range(5):
        (folder / f"{i}.txt").write_text(f"face {i}\n")
    images, captions = t2i.captioned_faces(folder, size=16, cache=folder / "cache")
    assert images.shape == (5, 3, 16, 16) and captions == [[f"face {i}"] for i in range(5)]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "captions.csv"])
def test_captions_in_a_table(folder, name):
    rows = pd.DataFrame({"file_name": ["0.png", "1.png", "1.png"], "text": ["a", "b", "c"]})
    rows.to_json(folder / name, orient="records", lines=True) if name.endswith("l") else rows.to_csv(folder / name, index=False)
    images, captions = t2i.captioned_faces(folder, size=16, cache=folder / "cache")
    assert captions == [["a", "a"], ["b", "c"]], "images have equally many captions"


@pytest.fixture
def nested(tmp_path):
    "Data with captions in subfolders, some names twice, and a folder of test images that are copies of some."
    for i, name in enumerate(["train/0.png", "train/1.png", "test/1.png", "test/2.png"]):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (60 * i, 90, 10)).save(tmp_path / "data" / name)
        (tmp_path / "data" / name).with_suffix(".txt").write_text(name)
    (tmp_path / "aside/deep").mkdir(parents=True)
    shutil.copy(tmp_path / "data/train/0.png", tmp_path / "aside/deep/0.png")
    shutil.copy(tmp_path / "data/test/2.png", tmp_path / "aside/2.png")
    return tmp_path


@pytest.mark.parametrize(("exclude", "left"), [
    (["0.png"], ["test/1.png", "test/2.png", "train/1.png"]),  # a name, wherever it lies
    (["1.png", "2.png"], ["train/0.png"]),
    (["test/1.png"], ["test/2.png", "train/0.png", "train/1.png"])])  # a path means one image
def test_images_stay_out_by_name_and_by_path(nested, exclude, left):
    _, captions = t2i.captioned_faces(nested / "data", size=16, exclude=exclude, cache=nested / "cache")
    assert captions == [[name] for name in left]


@pytest.mark.parametrize(("exclude", "images"), [("aside", 2), ("data/test", 2)])
def test_the_command_leaves_out_images_in_subfolders(nested, exclude, images):
    settings = TINY | {"size": 16, "decoder_steps": 1, "steps": 1, "batch_size": 2, "decoder_batch": 2}
    t2i.train_command(str(nested / "data"), out=nested / "out", settings=settings, exclude=nested / exclude, device="cpu", progress=False)
    assert json.loads((nested / "out/aimfair.json").read_text())["images"] == images


def test_names_to_exclude_that_none_has_are_told(nested):
    with pytest.warns(DataWarning, match="none of its 4 images is left out: 1 names names none of them"):
        t2i.captioned_faces(nested / "data", size=16, exclude=["9.png"], cache=nested / "cache")
    with pytest.raises(DataError, match="no images are left"):
        t2i.captioned_faces(nested / "data", size=16, exclude=["0.png", "1.png", "2.png"], cache=nested / "cache")
    with pytest.raises(FileNotFoundError, match="no folder or file"):
        t2i.train_command(str(nested / "data"), out=nested / "out", exclude=nested / "nowhere")


def paint(file, i, size=(16, 16)):
    "A picture of noise, another for every number."
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)).save(file)
    return file


@pytest.fixture
def painted(tmp_path):
    "Six pictures in data/train, and their captions as Hugging Face's imagefolder has them."
    for i in range(6):
        paint(tmp_path / f"data/train/{i}.png", i)
    rows = [{"file_name": f"{i}.png", "text": f"face {i}"} for i in range(6)]
    (tmp_path / "data/train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def kept_of(folder, **options):
    return [some[0] for some in t2i.captioned_faces(folder / "data", size=16, cache=folder / "cache", **options)[1]]


@pytest.mark.parametrize("kind", ["png", "tif", "bmp", "turned.png"])
def test_copies_stay_out_whatever_their_name_and_form(painted, kind):
    "The same pixels saved without loss, and upright only by what its EXIF block says."
    image = Image.open(painted / "data/train/3.png")
    if kind == "turned.png":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(paint(painted / "test/other.png", 0), exif=exif)
    else:
        image.save(paint(painted / f"test/other.{kind}", 0), **({"compress_level": 0} if kind == "png" else {}))
    paint(painted / "test/new.png", 77)
    paint(painted / "test/large.png", 3, (32, 32))
    assert kept_of(painted, exclude=painted / "test") == [f"face {i}" for i in (0, 1, 2, 4, 5)]


def test_a_copy_within_the_folder_goes_with_its_original(painted):
    shutil.copy(painted / "data/train/2.png", painted / "data/train/5.png")
    assert kept_of(painted, exclude=["train/2.png"]) == [f"face {i}" for i in (0, 1, 3, 4)]


@pytest.mark.parametrize(("name", "text"), [
    ("list.txt", "0.png\r\ntrain/4.png\r\n"), ("list", "0\n\n4\n"), ("test.csv", "image_id,target\n0.png,1\n4.png,0\n"),
    ("test.tsv", "label\tfile_name\n1\ttrain\\0.png\n0\t4.png\n"), ("odd.csv", "Bild;x\n0.png;1\n4;2\n"),
    ("test.jsonl", '{"file_name": "/once/train/0.png"}\n{"file_name": "data/train/4.png"}\n')])
def test_images_to_leave_out_are_listed_in_a_file(painted, name, text):
    (painted / name).write_bytes(text.encode("utf-16" if name == "odd.csv" else "utf-8"))
    assert kept_of(painted, exclude=painted / name) == [f"face {i}" for i in (1, 2, 3, 5)]


def test_what_is_left_out_is_said_in_a_line(painted, capsys):
    shutil.copy(painted / "data/train/5.png", painted / "copy.png")
    (painted / "out.txt").write_text("train/0.png\n1.png\ncopy.png\n")
    assert len(kept_of(painted, exclude=painted / "out.txt", progress=True)) == 3
    assert re.search(r"^\S*/data: 3 of 6 images are left out, as \S*out.txt says: 1 by path, 1 by name, 1 by content$",
                     capsys.readouterr().err, re.MULTILINE)


def test_captions_of_every_split_and_form_come_together(painted):
    "A table in a split, one of the whole folder, one in another split, and texts beside images."
    for name in ("val/a.png", "test/deep/b.png", "test/deep/c.png"):
        paint(painted / "data" / name, ord(name[-5]))
    (painted / "data/val/metadata.csv").write_text("Image;Prompt\na.png;a; b\n".replace("a; b", '"a; b"'), encoding="utf-8-sig")
    (painted / "data/test/deep/b.txt").write_text("beside")
    (painted / "data/test/deep/c.txt").write_bytes("Größe".encode("cp1252"))
    assert kept_of(painted) == ["beside", "Größe", *(f"face {i}" for i in range(6)), "a; b"]
    (painted / "data/metadata.csv").write_text("file_name,caption\ntrain/0.png,once more\n")
    captions = t2i.captioned_faces(painted / "data", size=16, cache=painted / "cache")[1]
    assert len(captions) == 7 and ["once more", "face 0"] in [sorted(c, reverse=True) for c in captions]


@pytest.mark.parametrize(("name", "content", "said"), [
    ("metadata.jsonl", '{"file_name": "0.png", "text": "a"}\n{"file_name"', r"metadata.jsonl, line 2: not readable as JSON"),
    ("metadata.jsonl", '["0.png", "a"]\n', r"metadata.jsonl, line 1: .* is not an object"),
    ("metadata.jsonl", '\n{"file_name": "9.png", "text": "a"}\n', r"metadata.jsonl, line 2: no image '9.png'"),
    ("metadata.csv", "file_name,text\n0.png,a\n8.png,b\n9.png,c\n", r"metadata.csv, line 3: no image '8.png' \(2 of 3 rows"),
    ("metadata.csv", "file_name,label\n0.png,a\n", r"metadata.csv: has the columns file_name, label; expected one of .*caption"),
    ("metadata.csv", "file_name,text\n0.png,a\n1.png,b,c,d\n", r"metadata.csv: cannot be read as a table: .*line 3")])
def test_a_mistake_in_a_table_is_told_by_file_and_line(painted, name, content, said):
    (painted / "data/train/metadata.jsonl").unlink()
    (painted / "data/train" / name).write_text(content)
    with pytest.raises(DataError, match=said):
        kept_of(painted)


def test_folders_without_captions_are_told(folder, tmp_path):
    with pytest.raises(DataError, match="no captions found"):
        t2i.captioned_faces(folder)
    pd.DataFrame({"a": [1]}).to_csv(folder / "captions.csv")
    with pytest.raises(DataError, match="expected one of file_name"):
        t2i.captioned_faces(folder)
    with pytest.raises(FileNotFoundError, match="no folder"):
        t2i.captioned_faces(tmp_path / "none")


def test_celebas_layout_becomes_captions(tmp_path):
    toyfaces.write_celeba(tmp_path, n_train=6, n_val=2, n_test=2, seed=0)
    images, captions = t2i.captioned_faces(tmp_path, per_face=3, exclude=["000001.jpg"], cache=tmp_path / "cache")
    assert len(images) == len(captions) == 9 and {len(c) for c in captions} == {3}
    facts = toyfaces.annotations(toyfaces.sample_factors(10, seed=0, start=1))
    assert [bool(re.search(WORDS["male"], c[0])) for c in captions] == facts.Male[1:].astype(bool).tolist()


PEOPLE = {"black": "black|african", "east asian": "asian", "latino_hispanic": "hispanic|latino|latin american", "white": "white"}


@given(seed=st.integers(0, 10_000), age=st.integers(1, 95), male=st.sampled_from([0, 1]), race=st.sampled_from(sorted(PEOPLE)))
@settings(max_examples=200, deadline=None)
def test_a_caption_says_age_and_race_as_annotated(seed, age, male, race):
    text = t2i.compose_caption(np.random.default_rng(seed), age=age, male=male, race=race)
    said = re.search(r"(\d+)-year-old", text)
    assert not said or int(said[1]) == age
    assert bool(re.search(r"\b(male|man|boy)\b", text)) == bool(male)
    assert not re.search(r"\b(boy|girl)\b", text) or age < 18
    assert not re.search(r"\b((?<!-)old|older|senior|elderly)\b", text) or age >= 60
    assert not re.search(r"\b(baby|infant)\b", text) or age < 3
    assert not any(re.search(rf"\b({words})\b", text) for other, words in PEOPLE.items() if other != race)


@pytest.fixture(scope="module")
def fairface_folder(tmp_path_factory):
    "Ten painted photos, eight of young women and two of old men, in the official layout and with what the official file has besides."
    root = tmp_path_factory.mktemp("fairface")
    rows = [(f"train/{i + 1}.jpg", "20-29", "Female", "East Asian") if i < 8 else (f"train/{i + 1}.jpg", "more than 70", "Male", "Black")
            for i in range(10)]
    for i, (file, *_) in enumerate(rows):
        paint(root / file, i, (24, 24))
    labels = pd.DataFrame(rows, columns=["file", "age", "gender", "race"]).assign(service_test=True)
    labels.to_csv(root / "fairface_label_train.csv", index=False)
    return root


def test_fairfaces_layout_becomes_captions(fairface_folder, tmp_path):
    faces = t2i.read_captioned(fairface_folder, size=16, per_face=40, exclude=["train/1.jpg"], cache=tmp_path)
    assert faces.ids == [f"train/{i}.jpg" for i in range(2, 11)] and faces.images.shape == (9, 3, 16, 16)
    women, men = (" ".join(sum(some, [])) for some in (faces.captions[:7], faces.captions[7:]))
    assert re.search("asian (woman|female)", women) and not re.search(r"\b(man|male|black)\b", women)
    assert re.search("(black|african) (man|male)", men)
    ages = [{int(n) for n in re.findall(r"(\d+)-year-old", text)} for text in (women, men)]
    assert ages[0] == set(range(20, 30)) and min(ages[1]) > 70 and len(ages[1]) > 10  # every year of a range
    assert list(faces.cells) == ["20-29 Female East Asian"] * 7 + ["more than 70 Male Black"] * 2


def test_a_generator_says_what_it_has_seen(fairface_folder, tmp_path):
    settings = TINY | {"size": 16, "decoder_steps": 1, "steps": 1, "batch_size": 2, "decoder_batch": 2}
    t2i.train_command(str(fairface_folder), out=tmp_path / "out", settings=settings, exclude=["train/3.jpg"], device="cpu", progress=False)
    assert t2i.learnt_from(tmp_path / "out") == [f"train/{i}.jpg" for i in (1, 2, *range(4, 11))]
    assert t2i.learnt_from(t2i.bundled()) == []


@given(counts=st.lists(st.integers(1, 40), min_size=2, max_size=6), balance=st.floats(0.05, 1))
def test_rare_people_are_shown_more_often(counts, balance):
    cells = np.repeat([f"cell {i}" for i in range(len(counts))], counts)
    weights = t2i.show_weights(cells, balance).numpy()
    shares = pd.Series(weights).groupby(cells).sum()
    wanted = np.array(counts) ** (1 - balance)  # n images, each n to the power of -balance
    np.testing.assert_allclose(shares, wanted / wanted.sum())
    assert np.isclose(weights.sum(), 1) and t2i.show_weights(cells, 0) is None


# ---------------------------------------------------------------- what photos show


@given(text=st.lists(st.sampled_from(["left", "right", "left,", "right,", "light", "up", "and"]), max_size=8).map(" ".join))
def test_a_mirror_turns_left_into_right_and_back(text):
    mirrored = t2i.mirrored_words(text)
    assert t2i.mirrored_words(mirrored) == text
    assert (text.count("left"), text.count("right")) == (mirrored.count("right"), mirrored.count("left"))


def test_the_measured_tilt_follows_the_drawn_one():
    "Drawn heads are tilted by a known angle; so are copies that another library has turned."
    images = toyfaces.draw(toyfaces.sample_factors(500, seed=3))
    upright = t2i.tilts(images)
    turned = np.stack([np.asarray(Image.fromarray(x.transpose(1, 2, 0)).rotate(12, Image.BILINEAR)) for x in images]).transpose(0, 3, 1, 2)
    both = t2i.tilts(np.concatenate([images, turned]))
    assert 4 < np.median(both[500:] - both[:500]) < 20  # counterclockwise: to the left
    np.testing.assert_allclose(t2i.tilts(np.ascontiguousarray(images[..., ::-1])), -upright, atol=0.05)


def test_looks_of_a_mirror_image_are_mirrored():
    images = toyfaces.draw(toyfaces.sample_factors(300, seed=4))
    details, poses = t2i.looks(images)
    theirs, others = t2i.looks(np.ascontiguousarray(images[..., ::-1]))
    same = [t2i.mirrored_words(", ".join(a)) == ", ".join(b) for a, b in zip(details, theirs, strict=True)]
    assert np.mean(same) > 0.98  # a half has one pixel column more than the other where a side is odd
    assert [p and t2i.mirrored_words(p) for p in poses] == others


def test_the_command_tells_mistakes_in_a_line(tmp_path, capsys):
    from aimfair.cli import main
    assert main(["t2i", "train", "--out", str(tmp_path / "x"), "--set", "stepz=3"]) == 2
    assert "did you mean steps" in capsys.readouterr().err
    assert main(["t2i", "train", "--out", str(tmp_path / "x"), "--data", str(tmp_path / "none")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_the_command_trains(tmp_path, capsys):
    from aimfair.cli import main
    sets = [f"--set={k}={json.dumps(v)}" for k, v in TINY.items()]
    assert main(["t2i", "train", "--out", str(tmp_path / "x"), "--n", "16", *sets]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "x")
    assert main(["t2i", "sheet", "--generator", str(tmp_path / "x"), "--prompt", "a man", "--out", str(tmp_path / "s.png")]) == 0
    assert Image.open(tmp_path / "s.png").size == (64, 64)
    shutil.rmtree(tmp_path / "x" / "training")
    assert main(["t2i", "sheet", "--generator", str(tmp_path / "x"), "--out", str(tmp_path / "s.png")]) == 0
