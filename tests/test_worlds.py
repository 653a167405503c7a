"What spans profiles, from folders of results alone; and folders of results that may be passed on."
import base64
import io
import re
import runpy
import shutil
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import spearmanr, t
from test_experiments import MANY, RACES, as_fairface

from aimfair.experiments import reproduce
from aimfair.report import (
    World,
    group_intervals,
    group_runs,
    mean_difference,
    photo_differences,
    photo_folders,
    rank_agreement,
    write_worlds,
)
from aimfair.report.worlds import resampled


def world_of(rng, n=9, seeds=5, noise=2.0, true=None):
    "An invented world with scores of every seed."
    true = rng.normal(70, 6, (n, 3)) if true is None else true
    methods = [f"m{i}" for i in range(n)]
    index = pd.MultiIndex.from_product([methods, range(seeds)], names=["method", "seed"])
    runs = pd.DataFrame(np.repeat(true, seeds, 0) + rng.normal(0, noise, (n * seeds, 3)), index, ["ACC", "WST", "EO"])
    by_method = runs.groupby(level="method", sort=False)
    return World(by_method.mean(), by_method.std(), seeds, runs)


class TestRankAgreement:
    @given(st.integers(0, 10_000), st.integers(5, 20), st.integers(1, 6))
    def test_it_is_spearmans_whatever_the_order_and_the_others(self, seed, n, seeds):
        rng = np.random.default_rng(seed)
        one, two = world_of(rng, n, seeds), world_of(rng, n, seeds)
        mean = pd.concat([two.mean, two.mean.rename(index=lambda m: f"other {m}")]).sample(frac=1, random_state=seed)
        more = World(mean, mean * 0 + 1, seeds)
        found, mixed = rank_agreement(one, two, n=200), rank_agreement(one, more, n=200)
        for score, row in found.iterrows():
            theirs = spearmanr(one.mean[score], two.mean[score]).statistic
            assert (row.rho, mixed.rho[score]) == pytest.approx((theirs, theirs)) and row.methods == mixed.methods[score] == n
            assert -1 - 1e-9 <= row.low <= row.high <= 1 + 1e-9 and np.isnan(row["itself"]) == (seeds == 1)

    def test_its_draws_by_hand(self):
        "The interval, once more, by ten lines that share nothing but the law: seeds and methods drawn anew."
        rng = np.random.default_rng(3)
        true = rng.normal(70, 6, (14, 3))
        one, two = world_of(rng, 14, true=true), world_of(rng, 14, true=true + rng.normal(0, 4, true.shape))
        drawn = []
        for _ in range(1500):
            which, ours, theirs = rng.integers(14, size=14), rng.integers(5, size=5), rng.integers(5, size=5)
            a, b = (np.array([w.runs.WST[f"m{i}"].to_numpy()[s].mean() for i in which]) for w, s in ((one, ours), (two, theirs)))
            drawn.append(spearmanr(a, b).statistic)
        low, high = np.quantile(drawn, [0.025, 0.975])
        row = rank_agreement(one, two).loc["WST"]
        assert (row.low, row.high) == (pytest.approx(low, abs=0.08), pytest.approx(high, abs=0.03))

    def test_seeds_are_drawn_for_all_methods_together(self):
        "What a seed does to all methods alike moves no rank."
        rng = np.random.default_rng(0)
        world = world_of(rng, 8, noise=0.01)
        luck = pd.Series(rng.normal(0, 50, 5), range(5))
        shaken = world.runs.add(luck.loc[world.runs.index.get_level_values("seed")].to_numpy(), axis=0)
        other = World(shaken.groupby(level="method", sort=False).mean(), world.sd, 5, shaken)
        assert rank_agreement(world, other).loc["ACC", "itself"] > 0.99
        drawn = resampled(other, list(other.mean.index), "ACC", 500, rng)
        assert drawn.std(0).min() > 10 and (drawn - drawn.mean(1, keepdims=True)).std(0).max() < 0.1

    def test_too_little_is_no_number(self):
        rng = np.random.default_rng(0)
        one = world_of(rng, 9)
        for n, known, interval in ((0, False, False), (2, False, False), (4, True, False), (5, True, True)):
            row = rank_agreement(one, World(one.mean.head(n), one.sd.head(n), 5), n=300).loc["ACC"]
            assert row.methods == n and np.isfinite(row.rho) == known and np.isfinite(row.low) == np.isfinite(row.high) == interval
        level = World(one.mean * 0 + 50, one.sd * 0, 5)
        assert np.isnan(rank_agreement(one, level, n=100).rho).all(), "a world that tells no methods apart has no order"
        apart = one.runs.drop(index=[("m0", 0), ("m0", 1), *(("m1", s) for s in (2, 3, 4))])
        with pytest.raises(ValueError, match="no seed that all of m0, m1"):
            resampled(World(one.mean, one.sd, 2, apart), ["m0", "m1"], "ACC", 9, rng)


class TestGroups:
    def test_the_interval_holds_what_it_says(self):
        "Of a thousand invented studies: seeds differ, the test images are the same ones, some of them hard for every seed."
        rng, held, n, true = np.random.default_rng(0), 0, 120, 0.8
        for _ in range(1000):
            hard = rng.beta(8, 2, n)  # how often an image is right: 0.8 on average
            runs = [100 * (rng.random(n) < np.clip(hard + rng.normal(0, 0.03), 0, 1)).mean() for _ in range(5)]
            frame = pd.DataFrame({"method": "ERM", "seed": range(5), "group": "0_0", "name": "a", "images": n, "accuracy": runs})
            row = group_intervals(frame).iloc[0]
            held += row.low <= 100 * true <= row.high
        assert held / 1000 > 0.93

    @given(st.lists(st.floats(0, 100), min_size=1, max_size=6), st.integers(1, 500))
    def test_it_lies_within_percent_around_the_mean(self, accuracies, n):
        scores = pd.DataFrame({"1_0": accuracies, "ACC": 1.0}, pd.MultiIndex.from_product([["ERM"], range(len(accuracies))],
                                                                                         names=["method", "seed"]))
        row = group_intervals(group_runs(scores, {"1_0": n})).iloc[0]
        assert row.accuracy == pytest.approx(np.mean(accuracies)) and 0 <= row.low <= row.accuracy + 1e-9
        assert row.accuracy - 1e-9 <= row.high <= 100 and row.high - row.low > 0 and (row.images, row.seeds) == (n, len(accuracies))

    def test_a_group_without_test_images_is_left_out(self):
        scores = pd.DataFrame({"0_0": [90.0], "0_1": [np.nan]}, pd.MultiIndex.from_tuples([("ERM", 1)], names=["method", "seed"]))
        assert group_runs(scores, {"0_0": 10}).group.tolist() == ["0_0"]


def test_the_mean_of_differences_holds_the_true_mean_as_often_as_each_interval():
    "A thousand worlds of three data sets, each with five seeds of another spread and its own t interval."
    rng, true, held = np.random.default_rng(1), np.array([2.0, -1.0, 6.0]), 0
    reach = t.ppf(0.975, 4) / np.sqrt(5)
    for _ in range(1000):
        runs = true + rng.normal(size=(5, 3)) * [1.0, 4.0, 2.0]
        mean, half = runs.mean(0), reach * runs.std(0, ddof=1)
        row = mean_difference(pd.DataFrame({"difference": mean, "low": mean - half, "high": mean + half}))
        held += row.low <= true.mean() <= row.high
    assert 0.94 < held / 1000 < 0.995


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(0.1, 20)), min_size=1, max_size=5))
def test_known_deviations_give_the_interval_of_a_mean(found):
    "Where the deviation of each difference is known, the interval is the textbook's for a mean of independent values."
    value, error = np.array(found).T
    row = mean_difference(pd.DataFrame({"difference": value, "low": value - 1.96 * error, "high": value + 1.96 * error}))
    half = 1.96 * np.sqrt((error**2).sum()) / len(found)
    assert (row.difference, row.low, row.high) == pytest.approx((value.mean(), value.mean() - half, value.mean() + half))


def _points(row):
    "The differences in a row of text, without their intervals."
    return [float(told.split()[0].replace("−", "-")) for told in row]


def test_the_claims_that_are_quoted_are_those_of_the_notebook(repository, tmp_path):
    "Every cell of the table of differences is found among what the notebook of fine-tuning strategies claims."
    (tmp_path / "celeba64").mkdir()
    for name in ("finetuning_strategies.csv", "finetuning_strategies-claims.csv"):
        shutil.copy(repository / "figures" / name, tmp_path / "celeba64")
    claims = pd.read_csv(repository / "figures/finetuning_strategies-claims.csv", index_col="Claim")
    told = photo_differences(photo_folders(tmp_path))
    assert told.index.tolist() == ["CelebA: ERM", "CelebA: full fine-tuning"] and not (told == "–").to_numpy().any()
    means = pd.read_csv(repository / "figures/finetuning_strategies.csv", index_col="method")
    for row, other in (("CelebA: ERM", "ERM"), ("CelebA: full fine-tuning", "Full fine-tuning")):
        assert _points(told.loc[row]) == pytest.approx([means[s]["AIM-Fair"] - means[s][other] for s in ("ACC", "WST", "EO")], abs=0.06)
    assert claims.difference.notna().all()


def test_a_repetition_counts_with_its_data_set(repository, tmp_path):
    "Another generator with the same claims adds rows and moves no mean; one with other claims moves it by its share."
    file = "finetuning_strategies-claims.csv"
    for name in ("celeba64", "utkface64"):
        (tmp_path / name).mkdir()
        shutil.copy(repository / "figures" / name / file, tmp_path / name)
        shutil.copy(repository / "figures" / name / "finetuning_strategies.csv", tmp_path / name)
    before = photo_differences(photo_folders(tmp_path))
    again = tmp_path / "celeba64" / "generator-2"
    again.mkdir()
    shutil.copy(tmp_path / "celeba64" / file, again)
    after = photo_differences(photo_folders(tmp_path))
    assert after.drop(index=["CelebA, generator 2: ERM", "CelebA, generator 2: full fine-tuning"]).equals(before)
    assert after.loc["CelebA, generator 2: ERM"].equals(before.loc["CelebA: ERM"].rename("CelebA, generator 2: ERM"))
    claims = pd.read_csv(again / file, index_col="Claim")
    claims[["difference", "low", "high"]] += 4
    claims.to_csv(again / file)
    first, moved = (_points(told.loc["Mean of 2: ERM"]) for told in (before, photo_differences(photo_folders(tmp_path))))
    assert moved == pytest.approx([value + 1 for value in first], abs=0.11)  # half of half of four


def test_results_of_photos_are_quoted_where_they_are(repository, tmp_path):
    "The place in the README stays empty without them, is filled with them, and is emptied again."
    quote = runpy.run_path(str(repository / "nbs/quote_results.py"))["with_quotes"]
    empty = "before\n<!-- quote if there: photos -->\n<!-- end of quote -->\nafter\n"
    assert quote(empty, tmp_path) == empty
    (tmp_path / "photos.md").write_text("### Photos\n\n| a |\n|:--|\n| 1 |\n")
    filled = quote(empty, tmp_path)
    assert "photos -->\n### Photos\n\n| a |\n|:--|\n| 1 |\n<!-- end of quote -->" in filled and quote(filled, tmp_path) == filled
    (tmp_path / "photos.md").unlink()
    assert quote(filled, tmp_path) == empty
    with pytest.raises(FileNotFoundError):
        quote(empty.replace(" if there", ""), tmp_path)
    assert "<!-- quote if there: photos -->" in (repository / "README.md").read_text(encoding="utf-8")


LOUD = (255, 0, 255)  # of every photo and generated image below; no figure of ours has it


def loud_photos(root):
    "Pictures of one loud colour, labelled as FairFace's are."
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    rows = []
    for i in range(1300):
        Image.new("RGB", (24, 24), LOUD).save(root / "images" / f"{i}.png")
        rows.append((f"images/{i}.png", "20-29", ("Female", "Male")[rng.integers(2)], RACES[rng.integers(7)]))
    pd.DataFrame(rows, columns=["file", "age", "gender", "race"]).to_csv(root / "labels.csv", index=False)
    return root


def loud_generator(folder):
    "The bundled generator, but whatever is dark in its images comes out in the loud colour, and the rest white."
    import torch
    from safetensors.torch import load_file, save_file

    from aimfair.t2i import bundled
    shutil.copytree(bundled(), folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    (last,) = [name for name, w in weights.items() if name.endswith("bias") and tuple(w.shape) == (3,)]
    for name, add in ((last, [50.0, -1.5, 50.0]), (last.replace("bias", "weight"), 0.0)):
        change = torch.tensor([0.0, 3.0, 0.0], dtype=torch.float16)  # red and blue are full, green stands out more
        weights[name] = weights[name] * change.reshape(-1, *[1] * (weights[name].ndim - 1)) + torch.tensor(add, dtype=torch.float16)
    save_file(weights, file, {"format": "pt"})
    return folder


def has_loud_colour(data):
    "Whether a PNG or JPEG file has a patch of it."
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return (np.abs(pixels - LOUD).max(-1) < 24).sum() > 30


def pictures_in(text):
    "Pictures that a page or a notebook embeds."
    for found in re.finditer(r"[A-Za-z0-9+/\n]{80,}={0,2}", text.replace("\\n", "\n")):
        coded = found[0].replace("\n", "")
        data = base64.b64decode(coded + "=" * (-len(coded) % 4))
        if data.startswith((b"\x89PNG", b"\xff\xd8\xff")):
            yield data


_IN_PDF = re.compile(rb"obj\n<<((?:(?!endobj).)*?/Subtype /Image(?:(?!endobj).)*?)>>\nstream\r?\n(.*?)\nendstream", re.S)
_PALETTE = re.compile(rb"/Indexed /DeviceRGB \d+\s*\((.*?[^\\])\)\s*\]", re.S)


def pictures_of_pdf(data):
    "Pictures of a PDF that matplotlib wrote, as PNG files: their streams are those of PNG, without its header."
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for about, stream in _IN_PDF.findall(data):
        width, height, bits = (int(re.search(rb"/%b (\d+)" % name, about)[1]) for name in (b"Width", b"Height", b"BitsPerComponent"))
        palette = _PALETTE.search(about)
        colours = re.sub(rb"\\(.)", lambda m: {b"n": b"\n", b"r": b"\r"}.get(m[1], m[1]), palette[1], flags=re.S) if palette else b""
        header = struct.pack(">IIBBBBB", width, height, bits, 3 if palette else 2 if b"/DeviceRGB" in about else 0, 0, 0, 0)
        chunks = chunk(b"IHDR", header), chunk(b"PLTE", colours) * bool(palette), chunk(b"IDAT", stream), chunk(b"IEND", b"")
        yield b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def is_loud(path):
    "Whether a file shows a loud image."
    data = path.read_bytes()
    if path.suffix == ".png":
        return has_loud_colour(data)
    if path.suffix == ".pdf":
        return any(map(has_loud_colour, pictures_of_pdf(data)))
    return any(has_loud_colour(picture) for picture in pictures_in(data.decode("utf-8")))


@pytest.mark.slow
def test_results_that_may_be_passed_on_show_no_face_and_no_folder(tmp_path):
    "With every photo and every generated image in a loud colour: it is found wherever pictures may be, and after a shareable run nowhere."
    given = {k: v for k, v in MANY.items() if not k.startswith("synthetic")} | {
        "data.root": str(loud_photos(tmp_path / "photos")), "generator": str(loud_generator(tmp_path / "generator")), "synthetic.steps": 1,
        "synthetic.pool": 5, "synthetic.per_group": 2, "synthetic.held_out": 1, "synthetic.shards": 1}
    out = tmp_path / "out"

    def made(**options):
        done = reproduce("fairface64", only=["layer_sensitivity", "synthetic_gallery"], seeds=1, settings=given, out=out, workers=1,
                         store=tmp_path / "runs", progress=False, **options)
        assert not done.failed
        return {p.relative_to(out).as_posix() for p in out.rglob("*") if p.suffix in (".png", ".pdf", ".ipynb", ".html") and is_loud(p)}

    shown = made()
    assert shown >= {"synthetic_gallery.png", "synthetic_gallery.pdf", "synthetic_gallery-plain.png", "notebooks/synthetic_gallery.ipynb",
                     "report.html"} and not any("layer" in name for name in shown)
    assert made(shareable=True) == set(), "what the run before has left is gone, too"
    assert not (out / "synthetic_gallery.png").exists() and (out / "synthetic_gallery.md").is_file()
    assert "are not shown" in (out / "report.html").read_text(encoding="utf-8")
    for path in out.rglob("*.*"):
        assert str(tmp_path) not in path.read_bytes().decode("utf-8", "ignore"), path.name


@pytest.mark.slow
def test_from_reproductions_to_what_spans_them(repository, tmp_path):
    "Photos at tiny size beside the committed results of the drawn world, of which means and deviations are known; without the store."
    figures, runs, photos = tmp_path / "figures", tmp_path / "runs", as_fairface(tmp_path / "photos")
    done = reproduce("fairface64", only=["tradeoff", "finetuning_strategies"], seeds=1, settings=MANY | {"data.root": str(photos)},
                     store=runs, out=figures / "fairface64", workers=1, progress=False, shareable=True)
    assert not done.failed
    shutil.copy(repository / "figures/tradeoff.csv", figures)
    shutil.rmtree(runs)
    written = {p.name for p in write_worlds(figures)}
    assert written == {"photos.md", *(f"photos-groups.{s}" for s in ("png", "pdf")),
                       *(f"{stem}.{s}" for stem in ("photos-differences", "worlds") for s in ("csv", "md", "tex"))}
    groups = pd.read_csv(figures / "fairface64/finetuning_strategies-groups.csv")
    assert groups.groupby(["method", "seed"]).size().eq(14).all() and "Female, Middle Eastern" in set(groups.name)
    means = pd.read_csv(figures / "fairface64/finetuning_strategies.csv", index_col="method")
    for row in group_intervals(groups).reset_index().itertuples():
        assert row.accuracy == pytest.approx(means.loc[row.method, row.group], abs=1e-3)
    ours, theirs = (pd.read_csv(f / "tradeoff.csv", index_col="method") for f in (figures, figures / "fairface64"))
    shared = [m for m in ours.index if m in theirs.index]
    told = pd.read_csv(figures / "worlds.csv", index_col="score")
    assert told.methods.eq(len(shared)).all() and len(shared) > 10
    for score, row in told.iterrows():
        rho = spearmanr(ours[score].loc[shared], theirs[score].loc[shared]).statistic
        assert row.rho == pytest.approx(rho, abs=2e-2, nan_ok=True)
