"The drawn world: every image a function of its row, true to its factors, visible on every skin tone, and readable from disk."

import time

import numpy as np
import pandas as pd
import pytest
import torch
from faults import interrupt_at
from PIL import Image

from aimfair import data
from aimfair.models import create_model
from aimfair.toyfaces import TONES, annotations, caption, draw, judged, sample_factors, worlds, write_celeba, write_groups, write_utkface


@pytest.fixture(scope="module")
def faces():
    "A few of each style, shuffled together."
    both = pd.concat([sample_factors(40, seed=5), sample_factors(40, seed=5, style="studio")], ignore_index=True)
    return both.sample(frac=1, random_state=0).reset_index(drop=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_celeba(tmp_path_factory.mktemp("world"), n_train=60, n_val=20, n_test=30, seed=11)


def snapshot(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# purity


@pytest.mark.parametrize("style", ["photo", "studio"])
def test_factors_are_a_function_of_seed_and_index(style):
    whole = sample_factors(50, seed=9, style=style)
    part = sample_factors(7, seed=9, start=23, style=style)
    pd.testing.assert_frame_equal(part, whole.iloc[23:30].reset_index(drop=True), check_exact=True)
    other = sample_factors(50, seed=10, style=style)
    assert not (other["smile"] == whole["smile"]).any()


def test_image_does_not_depend_on_its_batch(faces):
    together = draw(faces)
    alone = np.concatenate([draw(faces.iloc[[i]]) for i in range(0, 80, 7)])
    assert np.array_equal(alone, together[::7])
    for cut in (3, 16, 17, 33):
        assert np.array_equal(np.concatenate([draw(faces.iloc[:cut]), draw(faces.iloc[cut:])]), together)
    assert np.array_equal(draw(faces.iloc[::-1]), together[::-1])


def test_image_does_not_depend_on_threads():
    "Ten faces are enough pixels for torch to share them out."
    few = sample_factors(10, seed=5)
    before, one = torch.get_num_threads(), draw(few)
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        assert np.array_equal(draw(few), one)
    finally:
        torch.set_num_threads(before)


def test_drawing_leaves_the_global_generators_alone(faces):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    draw(faces.iloc[:4])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_drawing_leaves_the_factors_alone(faces):
    kept = faces.copy()
    draw(faces)
    pd.testing.assert_frame_equal(faces, kept)


@pytest.mark.parametrize("size", [16, 32, 96])
def test_other_sizes(size):
    f = sample_factors(5, seed=2)
    x = draw(f, size)
    assert x.shape == (5, 3, size, size) and x.dtype == np.uint8 and x.std() > 20
    assert np.array_equal(draw(f.iloc[[3]], size), x[[3]])


def test_no_faces():
    nobody = sample_factors(0, seed=1)
    assert draw(nobody).shape == (0, 3, 64, 64) and caption(nobody) == [] and len(annotations(nobody)) == 0


def test_large_seed_and_index():
    assert draw(sample_factors(2, seed=2**40, start=2**40)).shape == (2, 3, 64, 64)


# factors and annotations


def test_natural_distribution_is_like_celebas():
    tags = annotations(sample_factors(8000, seed=1))
    smile = tags.groupby("Male")["Smiling"].mean()
    assert abs(tags["Male"].mean() - 0.42) < 0.02 and abs(tags["Smiling"].mean() - 0.48) < 0.02
    assert 0.05 < smile[0] - smile[1] < 0.25
    assert abs(tags["Male"].corr(tags["Smiling"])) < 0.25


def test_biased_split_fits_the_default_train_split():
    tags = annotations(sample_factors(7500, seed=0, start=1))
    cells = tags.groupby(["Smiling", "Male"]).size()
    assert cells[0, 1] >= 1800 and cells[1, 0] >= 1800 and cells[0, 0] >= 200 and cells[1, 1] >= 200


def test_annotations_are_thresholds_on_factors():
    f = sample_factors(2000, seed=3)
    tags = annotations(f, "sure")
    assert set(np.unique(tags)) == {0, 1} and tags.index.equals(f.index)
    halves = {"Smiling": f.smile, "Male": f.gender, "Eyeglasses": f.glasses, "Mustache": f.moustache, "Wearing_Hat": f.hat}
    for tag, factor in halves.items():
        assert (tags[tag] == (factor > 0.5)).all(), tag
    assert (tags["Young"] == (f.age < 42)).all() and (tags["No_Beard"] == (f.beard <= 0.5)).all()
    assert (tags[["Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair", "Bald"]].sum(axis=1) <= 1).all()


def test_some_smiles_are_hard():
    "Faint ones are rare, and annotators disagree about them far more often than about clear ones."
    f = sample_factors(4000, seed=4)
    distance = (f.smile - 0.5).abs()
    wrong = annotations(f).Smiling != annotations(f, "sure").Smiling
    assert f.smile.between(0, 1).all() and 0.02 < (distance < 0.1).mean() < 0.15
    assert wrong[distance < 0.1].mean() > 0.25 and wrong[distance > 0.3].mean() < 0.05


@pytest.mark.parametrize("name", ["Smiling", "Male", "Young"])
def test_conditions_hold(name):
    for value in (0, 1):
        assert (annotations(sample_factors(200, seed=6, **{name: value}), "sure")[name] == value).all()
    wanted = np.arange(50) % 2
    assert (annotations(sample_factors(50, seed=6, **{name: wanted}), "sure")[name] == wanted).all()


def test_a_factor_can_be_set():
    f = sample_factors(3, seed=6, yaw=[-0.5, 0, 0.5], beard=1.0)
    assert f["yaw"].tolist() == [-0.5, 0, 0.5] and (f["beard"] == 1).all()


@pytest.mark.parametrize("wrong, named", [
    ({"style": "oil"}, "photo, studio"), ({"Smilling": 1}, "Smiling"), ({"seed": -1}, "seed=-1"), ({"n": -2}, "n=-2"),
])
def test_wrong_requests_name_the_choices(wrong, named):
    with pytest.raises(ValueError, match=named):
        sample_factors(**{"n": 2, "seed": 1, **wrong})


def test_captions_say_what_the_tags_say():
    f = sample_factors(300, seed=8)
    tags = annotations(f, "sure")
    for words, (_, tag), face in zip(caption(f), tags.iterrows(), f.itertuples(), strict=True):
        terms = words.replace(",", "").split()
        assert words.startswith("Portrait face photo of a ")
        assert ("non-smiling" in terms) != bool(tag["Smiling"]) and ("smiling" in terms) == bool(tag["Smiling"])
        assert ("male" in terms) == bool(tag["Male"]) and ("female" in terms) != bool(tag["Male"])
        assert ("young" in terms) == bool(tag["Young"]) and ("older" in terms) != bool(tag["Young"])
        assert ("glasses" in terms) == bool(tag["Eyeglasses"]) and ("beard" in terms) != bool(tag["No_Beard"])
        assert ("left" in terms) == (face.yaw < -0.25) and ("right" in terms) == (face.yaw > 0.25)


# pictures


def test_styles_differ_in_the_way_they_should():
    "Neighbouring pixels differ more in a photo's background than in the studio's, and its light varies more over the same faces."
    photo, studio = (draw(sample_factors(60, seed=7, style=style)).astype(float) for style in ("photo", "studio"))
    corner = (slice(None), slice(None), slice(0, 8), slice(0, 6))
    grain = [np.abs(np.diff(x[corner], axis=-1)).mean() for x in (photo, studio)]
    assert grain[0] > 4 * grain[1]
    assert (photo - studio).mean((1, 2, 3)).std() > 10


def upright(n, style, **conditions):
    "Faces that look ahead, with nothing in front of their features."
    zero = dict.fromkeys(("yaw", "pitch", "roll", "beard", "moustache", "glasses", "bangs"), 0.0)
    return sample_factors(n, seed=12, style=style, **zero, **conditions)


@pytest.mark.parametrize("style", ["photo", "studio"])
@pytest.mark.parametrize("band", range(len(TONES)), ids=TONES)
def test_features_show_on_every_skin_tone(style, band):
    "Mouth and eyes stand out, and a smile changes the picture, relative to how bright the skin is."
    f = upright(80, style, tone=(band + 0.5) / len(TONES))
    grey = draw(f).astype(float).mean(1)
    for region in (grey[:, 40:56, 20:44], grey[:, 24:36, 10:54]):
        assert np.median(region.std((1, 2)) / region.mean((1, 2))) > 0.14
    skin = np.median(grey[:, 34:40, 14:20])
    change = draw(f.assign(smile=1.0)).astype(float) - draw(f.assign(smile=0.0)).astype(float)
    assert np.abs(change[:, :, 38:58, 16:48]).mean() / skin > 0.07


def test_skin_tones_run_from_light_to_dark():
    skin = [np.median(draw(upright(40, "studio", tone=(k + 0.5) / 5)).mean(1)[:, 34:40, 14:20]) for k in range(5)]
    assert all(a > b + 10 for a, b in zip(skin, skin[1:], strict=False))


def test_each_factor_changes_the_picture():
    f = sample_factors(24, seed=13, style="photo", Male=1, hat=0.0, bald=0.0)
    plain = draw(f).astype(float)
    ends = {"smile": (0, 1), "age": (20, 78), "tone": (0, 1), "hair": (0, 1), "hair_length": (0, 1), "beard": (0, 1), "moustache": (0, 1),
            "glasses": (0, 1), "hat": (0, 1), "lipstick": (0, 1), "jaw": (0, 1), "brow": (0, 1), "yaw": (-1, 1), "pitch": (-1, 1),
            "roll": (-1, 1), "light_x": (-1, 1), "exposure": (-0.3, 0.3), "warmth": (-1, 1), "blur": (0, 1), "noise": (0, 1)}
    for factor, (low, high) in ends.items():
        change = np.abs(draw(f.assign(**{factor: low})).astype(float) - draw(f.assign(**{factor: high}))).mean()
        assert change > 0.5, factor
    assert np.array_equal(draw(f), plain)


def test_yaw_turns_the_head_to_the_side_it_names():
    "Whoever looks right has the eyes further right in the picture; their dark pupils tell."
    f = upright(60, "studio", tone=0.1, gaze=0.0, hair=1.0, grey=0.0).assign(eye_colour=0.0, smile=0.2)
    def place(yaw):
        dark = 255 - draw(f.assign(yaw=yaw)).astype(float).mean(1)[:, 26:35, 12:52]
        dark = np.clip(dark - 120, 0, None)
        return (dark.sum(1) * np.arange(40)).sum() / dark.sum()
    assert place(-0.8) + 1 < place(0.0) < place(0.8) - 1


def test_speed():
    "At least 300 images a second on one thread; on a slow processor a fifth of what the default network learns from in that time."
    before, factors, model = torch.get_num_threads(), sample_factors(192, seed=14), create_model("toy_resnet18")
    photos = torch.rand(192, 3, 48, 48).contiguous(memory_format=torch.channels_last)

    def seconds(work):
        start = time.process_time()
        work()
        return time.process_time() - start

    torch.set_num_threads(1)
    try:
        draw(factors.iloc[:16])
        times = [(seconds(lambda: draw(factors)), seconds(lambda: model(photos).sum().backward())) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert any(len(factors) / drawing >= min(300, len(photos) / learning / 5) for drawing, learning in times), times  # of one moment each


# files


def test_celeba_layout(world):
    lines = (world / "list_attr_celeba.txt").read_text().splitlines()
    names = lines[1].split()
    assert lines[0] == "110" and len(lines) == 112 and names == sorted(names) and {"Smiling", "Male", "Young"} <= set(names)
    table = pd.read_csv(world / "list_attr_celeba.txt", sep=r"\s+", skiprows=1)
    assert list(table.index[:2]) == ["000001.jpg", "000002.jpg"] and set(np.unique(table)) == {-1, 1}
    tags = annotations(sample_factors(110, seed=11, start=1))
    assert np.array_equal((table.to_numpy() + 1) // 2, tags.to_numpy())
    split = pd.read_csv(world / "list_eval_partition.txt", sep=" ", header=None, index_col=0)[1]
    assert split.index.equals(table.index) and split.tolist() == [0] * 60 + [1] * 20 + [2] * 30


def test_celeba_images_are_the_drawn_faces(world):
    drawn = draw(sample_factors(110, seed=11, start=1)).transpose(0, 2, 3, 1).astype(float)
    for i in (1, 57, 110):
        with Image.open(world / "img_align_celeba" / f"{i:06d}.jpg") as image:
            assert image.size == (64, 64) and image.mode == "RGB"
            assert np.abs(np.asarray(image, dtype=float) - drawn[i - 1]).mean() < 12


def test_data_module_reads_celeba(world):
    table = data.celeba(world, target="Smiling", protected="Male")
    tags = annotations(sample_factors(110, seed=11, start=1))
    assert np.array_equal(table["target"], tags["Smiling"]) and np.array_equal(table["protected"], tags["Male"])
    assert table["split"].value_counts().to_dict() == {"train": 60, "val": 20, "test": 30}


def test_utkface_layout(tmp_path):
    write_utkface(tmp_path, n=40, seed=3)
    f = sample_factors(40, seed=3, start=1)
    names = sorted(path.stem.split("_") for path in tmp_path.glob("*.jpg"))
    assert len(names) == 40 and all(len(fields) == 4 for fields in names)
    wanted = [[int(a), int(g <= 0.5), min(int(t * 5), 4)] for a, g, t in zip(f.age, judged(f, "gender", "utkface"), f.tone, strict=True)]
    assert sorted([int(x) for x in fields[:3]] for fields in names) == sorted(wanted)
    assert len(data.utkface(tmp_path)) == 40


def test_groups_pool_is_balanced_and_true(tmp_path):
    manifest = write_groups(tmp_path, per_group=12, seed=4)
    pd.testing.assert_frame_equal(manifest, pd.read_parquet(tmp_path / "manifest.parquet"))
    assert list(manifest.columns[:3]) == ["file", "target", "protected"]
    assert manifest.groupby(["target", "protected"]).size().tolist() == [12] * 4 and manifest["index"].is_unique
    for t, p in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert sorted(path.name for path in (tmp_path / f"{t}_{p}").iterdir()) == [f"{i:06d}.png" for i in range(1, 13)]
        rows = manifest[(manifest["target"] == t) & (manifest["protected"] == p)]
        assert all(("non-smiling" in prompt) == (not t) and ((" male " in prompt) == bool(p)) for prompt in rows["prompt"])
    row = manifest.iloc[30]
    again = draw(sample_factors(1, seed=row["seed"], start=row["index"], style="studio", Smiling=row["target"], Male=row["protected"]))[0]
    with Image.open(tmp_path / row["file"]) as image:
        assert np.array_equal(np.asarray(image).transpose(2, 0, 1), again)


def test_data_module_reads_groups(tmp_path):
    write_groups(tmp_path, per_group=3, seed=4, target="Young", protected="Male")
    table = data.image_groups(tmp_path)
    assert table.groupby(["target", "protected"]).size().tolist() == [3] * 4


def test_groups_need_two_different_attributes(tmp_path):
    with pytest.raises(ValueError, match="two of Smiling, Male, Young"):
        write_groups(tmp_path, per_group=1, target="Male", protected="Male")


WRITERS = pytest.mark.parametrize("write", [
    lambda root: write_celeba(root, n_train=6, n_val=2, n_test=2, seed=5),
    lambda root: write_utkface(root, n=10, seed=5),
    lambda root: write_groups(root, per_group=3, seed=5),
], ids=["celeba", "utkface", "groups"])


@WRITERS
@pytest.mark.parametrize("call", [1, 2, 7])
def test_interrupted_write_leaves_whole_files(write, call, tmp_path, monkeypatch):
    write(tmp_path / "whole")
    interrupt_at(monkeypatch, worlds, "write_whole", call)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut")
    monkeypatch.undo()
    whole, cut = snapshot(tmp_path / "whole"), snapshot(tmp_path / "cut")
    assert len(cut) == call - 1 and cut.items() <= whole.items()
    write(tmp_path / "cut")
    assert snapshot(tmp_path / "cut") == whole


@WRITERS
def test_what_was_removed_is_written_again(write, tmp_path):
    write(tmp_path / "whole")
    whole = snapshot(tmp_path / "whole")
    write(tmp_path / "cut")
    for name in list(whole)[1::2]:
        (tmp_path / "cut" / name).unlink()
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").rglob("0*.??g")}
    write(tmp_path / "cut")
    assert snapshot(tmp_path / "cut") == whole
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())


def test_a_larger_world_keeps_the_faces_of_the_smaller(tmp_path):
    write_utkface(tmp_path, n=4, seed=5)
    before = snapshot(tmp_path)
    write_utkface(tmp_path, n=6, seed=5)
    after = snapshot(tmp_path)
    assert len(after) == len(before) + 2 and before.items() <= after.items()


def test_two_worlds_do_not_mix(tmp_path):
    write_utkface(tmp_path, n=2, seed=5)
    with pytest.raises(ValueError, match="other drawn faces"):
        write_utkface(tmp_path, n=2, seed=6)
