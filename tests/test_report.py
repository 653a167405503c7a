"""Scores against oracles, tables that parse, figures whose bytes and labels can be relied on."""
import csv
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fairlearn.metrics import MetricFrame
from sklearn.metrics import accuracy_score

import aimfair
from aimfair import report
from aimfair.report import (
    DifferenceTable,
    ResultTable,
    compare,
    per_seed,
    plot_groups,
    plot_strategies,
    sentence,
    summarize,
    table_note,
    write_csv,
    write_figure,
)

ROOT = Path(aimfair.__file__).parents[1]
NAMES = ["ERM", "Synthetic only", "Real + synthetic", "Data repairing", "Linear probing", "Full fine-tuning", "AIM-Fair"]


def simulate(methods=tuple(NAMES), seeds=(100, 200, 300), n=800, n_groups=2, spread=1.0):
    "Invented predictions: a random share of each group is right."
    world = np.random.default_rng(1)
    target, protected = world.integers(2, size=n), world.integers(n_groups, size=n)
    frames = []
    for m, method in enumerate(methods):
        for seed in seeds:
            rng = np.random.default_rng([m, seed])
            right = rng.random(n) < (0.8 + 0.02 * m - spread * (0.15 - 0.02 * m) * (target == protected))
            logit = np.where(right == (target == 1), 1, -1) * (0.01 + rng.random(n))
            frames.append(pd.DataFrame({"method": method, "seed": seed, "id": [f"{i}.jpg" for i in range(n)], "target": target,
                                        "protected": protected, "logit": logit}))
    return pd.concat(frames, ignore_index=True)


@pytest.fixture(scope="module")
def predictions():
    return simulate()


@pytest.fixture(scope="module")
def scores(predictions):
    return per_seed(predictions)


# ---------------------------------------------------------------- numbers

def test_scores_agree_with_fairlearn(predictions, scores):
    for (method, seed), part in predictions.groupby(["method", "seed"]):
        row, predicted = scores.loc[(method, seed)], (part.logit > 0).astype(int)
        cells = MetricFrame(metrics=accuracy_score, y_true=part.target, y_pred=predicted, sensitive_features=part[["target", "protected"]])
        assert np.allclose(row[["0_0", "0_1", "1_0", "1_1"]].to_numpy(float), 100 * cells.by_group.to_numpy(float))
        assert np.isclose(row.ACC, 100 * cells.overall) and np.isclose(row.WST, 100 * cells.group_min())
        rate = {c: predicted[(part.target == c[0]) & (part.protected == c[1])].mean() for c in [(0, 0), (0, 1), (1, 0), (1, 1)]}
        assert np.isclose(row.EO, 50 * (abs(rate[1, 0] - rate[1, 1]) + abs(rate[0, 0] - rate[0, 1])))
        assert np.isclose(row.STD, 100 * np.std(cells.by_group.to_numpy(float)))


def test_order_is_that_of_the_frame(predictions):
    shuffled = predictions.sample(frac=1, random_state=0)
    order = shuffled[["method", "seed"]].drop_duplicates().itertuples(index=False, name=None)
    scores = per_seed(shuffled)
    assert list(scores.index) == list(order)
    assert list(summarize(scores).index) == list(dict.fromkeys(shuffled.method))


def test_categories_and_unused_ones_do_not_matter(predictions, scores):
    typed = predictions.assign(method=pd.Categorical(predictions.method, categories=sorted([*NAMES, "unused"])))
    assert np.allclose(per_seed(typed), scores)


def test_three_groups():
    scores = per_seed(simulate(["ERM"], n_groups=3))
    assert list(scores.columns[4:]) == ["0_0", "0_1", "0_2", "1_0", "1_1", "1_2"]
    plot_groups(scores)


def test_an_empty_cell_is_no_perfect_score(predictions):
    part = predictions[(predictions.target == 0) | (predictions.protected == 0)]
    with pytest.warns(UserWarning):
        scores = per_seed(part)
    assert scores[["WST", "EO", "STD"]].isna().all(axis=None) and scores.ACC.notna().all()
    table = ResultTable(summarize(scores))
    assert "–" in table._repr_markdown_() and r"--" in table.to_latex()
    plot_strategies(scores), plot_groups(scores)


@pytest.mark.parametrize("damage, says", [
    (lambda f: f.iloc[:0], "empty"),
    (lambda f: f.drop(columns="logit"), "logit"),
    (lambda f: f.drop(columns=["seed", "id"]), "seed, id"),
    (lambda f: pd.concat([f, f.iloc[[0]]]), "more than once"),
    (lambda f: f.drop(index=f.index[-1]), "one test set"),
    (lambda f: f.assign(id=np.where(f.method == "AIM-Fair", "x" + f.id, f.id)), "one test set"),
    (lambda f: f.assign(logit=f.logit.mask(f.index == 5)), "1 of 800 images have no finite logit"),
    (lambda f: f.assign(logit=f.logit.mask(f.index == 5), prediction=1), "no finite logit"),
    (lambda f: f.assign(protected=-1), "unknown (-1)"),
])
def test_frames_that_would_mislead_are_errors(predictions, damage, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        per_seed(damage(predictions))


def test_prediction_column_goes_before_logit(predictions):
    assert (per_seed(predictions.assign(prediction=predictions.target)).ACC == 100).all()
    several = predictions.assign(logit_0=0.0, logit_1=predictions.logit, prediction=(predictions.logit > 0) * 1).drop(columns="logit")
    assert per_seed(several).equals(per_seed(predictions))


def test_published_aggregation(scores):
    summary, published = summarize(scores), summarize(scores, aggregation="published")
    cells = ["0_0", "0_1", "1_0", "1_1"]
    for method in NAMES:
        assert np.isclose(published.loc[method, "WST"], min(scores.loc[method, c].mean() for c in cells))
    others = [c for c in summary if c not in ("WST",) and not c.endswith("_sd")]
    assert published[others].equals(summary[others])


def test_one_seed_has_no_spread():
    scores = per_seed(simulate(seeds=[100]))
    summary = summarize(scores)
    assert summary.filter(like="_sd").isna().all(axis=None)
    assert "±" not in ResultTable(summary)._repr_markdown_()
    assert "[" not in DifferenceTable(compare(scores)).rows()[0][1][0].spread
    assert sentence(compare(scores), "AIM-Fair").startswith("Over 1 seed, ")


def test_comparison_is_paired_and_covers_the_truth():
    rng, hits = np.random.default_rng(0), 0
    for trial in range(60):
        base = rng.normal(70, 10, 12)
        frame = pd.DataFrame({"ACC": np.concatenate([base, base + rng.normal(3, 1, 12)])}).assign(WST=0.0, EO=0.0, STD=0.0)
        frame.index = pd.MultiIndex.from_product([["ERM", "ours"], range(12)], names=["method", "seed"])
        row = compare(frame, n_boot=800, seed=trial).loc[("ours", "ACC")]
        assert row.high - row.low < 3  # the 10 points between seeds cancel
        hits += row.low <= 3 <= row.high
    assert 47 <= hits <= 60


def test_comparison_uses_shared_seeds(scores):
    without = scores.drop(index=("ERM", 200))
    expected = (scores.loc["AIM-Fair"] - scores.loc["ERM"]).loc[[100, 300]].mean()
    row = compare(without).loc[("AIM-Fair", "WST")]
    assert row.seeds == 2 and np.isclose(row.difference, expected.WST)
    with pytest.raises(ValueError, match="no seed in common"):
        compare(pd.concat([scores.loc[["ERM"]], scores.loc[["AIM-Fair"]].rename(index=lambda s: s + 1 if isinstance(s, int) else s)]))


# ---------------------------------------------------------------- tables

NASTY = ["ERM", "50% of R&D_{x} | #1 ~ \\a", "[bracket]", "<b>bold</b>", "Wörter − ±", "two\nlines", "*star*"]


@pytest.fixture(scope="module")
def nasty():
    summary = summarize(per_seed(simulate(NASTY)))
    return ResultTable(summary, caption="100 % of $x_1$ & more", note=table_note(profile="toy", seeds=[100, 200, 300], data="a_b | c"))


def test_latex_is_well_formed(nasty):
    text = nasty.to_latex()
    body = text[text.index(r"\midrule"):text.index(r"\bottomrule")].splitlines()[1:]
    assert len(body) == len(NASTY)
    for row in body:
        assert len(re.findall(r"(?<!\\)&", row)) == 4 and row.endswith(r" \\")
    depth = 0
    for token in re.findall(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(token, 0)
        assert depth >= 0
    assert depth == 0
    bare = re.sub(r"\$\\?[a-zA-Z-]+\$", "", "\n".join(text.splitlines()[1:]))
    assert not re.search(r"(?<!\\)[%#$_]|\^", bare)
    assert not any(line.startswith("[") for line in body)
    assert {line.count(r"\begin") for line in text.splitlines()} <= {0, 1} and text.count(r"\begin") == text.count(r"\end")


def test_markdown_has_the_same_cells_in_each_row(nasty):
    lines = [line for line in nasty._repr_markdown_().splitlines() if line.startswith("|")]
    assert len(lines) == len(NASTY) + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {6}
    assert "<b>" not in nasty._repr_markdown_()


def test_html_escapes(nasty):
    html = nasty._repr_html_()
    assert "&lt;b&gt;bold" in html and "R&amp;D" in html and html.count("<tr>") == len(NASTY) + 1


def test_marks(scores):
    summary = summarize(scores)
    for column, cells in zip(("ACC", "WST", "EO", "STD"), zip(*(c for _, c in ResultTable(summary).rows()), strict=True), strict=True):
        shown = summary[column].round(2)
        order = sorted(set(shown), reverse=column in ("ACC", "WST"))
        assert [c.rank for c in cells] == ["best" if v == order[0] else "second" if v == order[1] else "" for v in shown]


def test_written_files(scores, tmp_path):
    table = ResultTable(summarize(scores), caption="c", note="n")
    files = table.write(tmp_path / "new" / "folder" / "name.v1")
    assert [f.name for f in files] == ["name.v1.csv", "name.v1.md", "name.v1.tex"]
    assert sorted(p.name for p in files[0].parent.iterdir()) == sorted(f.name for f in files)
    assert not any(b"\r" in f.read_bytes() or not f.read_bytes().endswith(b"\n") for f in files)
    rows = list(csv.reader(files[0].open()))
    assert rows[0][:4] == ["method", "seeds", "ACC", "ACC_sd"] and rows[1][:2] == ["ERM", "3"]
    assert np.allclose(pd.read_csv(files[0], index_col=0), table.frame, atol=1e-4)


def test_an_interrupted_write_leaves_the_old_file(scores, tmp_path, monkeypatch):
    path = write_csv(scores, tmp_path / "a.csv")
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(OSError):
        write_csv(scores * 2, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_difference_table(scores, tmp_path):
    table = DifferenceTable(compare(scores), caption="d")
    assert [name for name, _ in table.rows()] == NAMES[1:]
    text = table.to_latex()
    assert "{[}" in text and "−" not in text
    assert len(table.write(tmp_path / "d")) == 3


# ---------------------------------------------------------------- figures

def labels_of(ax):
    return [t for t in ax.texts if t.get_text()]


@pytest.mark.parametrize("n_methods, spread", [(7, 1.0), (7, 0.2), (10, 1.0), (4, 0.0)])
def test_labels_do_not_overlap(n_methods, spread):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = [*NAMES, "CVaR DRO", "MAPLE", "JTT"][:n_methods]
    figure = plot_strategies(per_seed(simulate(names, spread=spread)))
    renderer = FigureCanvasAgg(figure).get_renderer()
    for ax in figure.axes:
        boxes = [t.get_window_extent(renderer) for t in labels_of(ax)]
        assert len(boxes) == n_methods
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[i + 1:])
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_markers_tell_methods_apart_without_colour():
    styles = report.method_styles(NAMES)
    assert len({s["marker"] for s in styles.values()}) == len({s["color"] for s in styles.values()}) == len(NAMES)


CODE = """
    import sys
    import pandas as pd
    from aimfair.report import *
    scores = pd.read_csv("../scores.csv", index_col=["method", "seed"])
    ResultTable(summarize(scores), caption="c", note="n").write("out/table")
    DifferenceTable(compare(scores)).write("out/difference")
    write_figure(plot_strategies(scores, title="t"), "out/strategies")
    write_figure(plot_groups(scores), "out/groups")
    assert "matplotlib.pyplot" not in sys.modules
"""


def test_files_are_the_same_bytes_in_every_process(tmp_path, scores):
    write_csv(scores, tmp_path / "scores.csv")
    made = []
    for i, hash_seed in enumerate(("0", "77")):
        folder = tmp_path / str(i)
        folder.mkdir()
        if i:  # a reader with settings of their own
            (folder / "matplotlibrc").write_text("font.size: 20\naxes.facecolor: yellow\nsavefig.dpi: 30\npdf.compression: 0\n")
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1", "TZ": ("UTC", "Asia/Tokyo")[i]}
        subprocess.run([sys.executable, "-c", textwrap.dedent(CODE)], cwd=folder, env=env, check=True, timeout=120)
        made.append({p.name: p.read_bytes() for p in sorted((folder / "out").iterdir())})
    assert len(made[0]) == 10 and made[0] == made[1]
    pdf = made[0]["strategies.pdf"]
    assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf and b"atplotlib" not in pdf
    assert made[0]["groups.png"].startswith(b"\x89PNG") and b"Software" not in made[0]["groups.png"]


def test_import_is_light_and_figures_leave_nothing_open():
    code = """
        import sys
        import aimfair.report
        assert not [m for m in ("matplotlib", "torch", "seaborn") if m in sys.modules]
        import pandas as pd
        index = pd.MultiIndex.from_tuples([("ERM", 1), ("AIM-Fair", 1)], names=["method", "seed"])
        scores = pd.DataFrame([[90.0, 60, 20, 9, 60, 90], [91.0, 70, 10, 5, 70, 91]], index, ["ACC", "WST", "EO", "STD", "0_0", "1_1"])
        import matplotlib
        before = dict(matplotlib.rcParams)
        figure = aimfair.report.plot_strategies(scores)
        aimfair.report.plot_groups(scores)
        assert figure._repr_png_().startswith(b"\\x89PNG")
        assert "matplotlib.pyplot" not in sys.modules and dict(matplotlib.rcParams) == before"""
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=120)


def test_picture_size(scores, tmp_path):
    from PIL import Image

    png, pdf = write_figure(plot_strategies(scores), tmp_path / "f")
    with Image.open(png) as image:
        assert image.size == (1230, 555)
    assert (png.name, pdf.name) == ("f.png", "f.pdf")
