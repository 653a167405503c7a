"""Scores against oracles, tables that parse, figures whose bytes and labels can be relied on."""
import base64
import csv
import io
import json
import os
import re
import subprocess
import sys
import textwrap
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fairlearn.metrics import MetricFrame
from scipy import stats
from sklearn.metrics import accuracy_score

import aimfair
from aimfair import report
from aimfair.groups import Names
from aimfair.report import (
    Claim,
    DifferenceTable,
    GroupTable,
    PairedRuns,
    PlainTable,
    ResultTable,
    Section,
    VariantTable,
    best_sentence,
    check_claims,
    compare,
    distinct_best,
    few_note,
    group_images,
    hardware,
    images_needed,
    package_versions,
    per_seed,
    plot_curve,
    plot_groups,
    plot_layers,
    plot_lines,
    plot_rows,
    plot_samples,
    plot_strategies,
    plot_tradeoff,
    plot_variants,
    sentence,
    summarize,
    table_note,
    visible_difference,
    write_csv,
    write_figure,
    write_html_report,
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
        assert np.isclose(published.loc[method, "STD"], np.std([scores.loc[method, c].mean() for c in cells]))
    others = [c for c in summary if c not in ("WST", "STD") and not c.endswith("_sd")]
    assert published[others].equals(summary[others])


def test_published_aggregation_from_the_predictions_alone(predictions):
    method, worst = "Linear probing", []
    rows = predictions[predictions.method == method]
    seeds = sorted(set(rows.seed))
    for t in (0, 1):
        for p in (0, 1):
            of_seed = []
            for seed in seeds:
                keep = (rows.seed == seed).to_numpy() & (rows.target == t).to_numpy() & (rows.protected == p).to_numpy()
                of_seed.append(np.mean((rows.logit.to_numpy()[keep] > 0) == t))
            worst.append(np.mean(of_seed))
    published = summarize(per_seed(predictions), aggregation="published")
    assert np.isclose(published.loc[method, "WST"], 100 * min(worst)) and np.isnan(published.loc[method, "WST_sd"])
    text = ResultTable(published, note=table_note(seeds=seeds, aggregation="published"))._repr_markdown_()
    assert "±" not in text and "worst, STD the deviation, of the group accuracies averaged over seeds 100, 200, 300" in text


def test_one_seed_has_no_spread():
    scores = per_seed(simulate(seeds=[100]))
    summary = summarize(scores)
    assert summary.filter(like="_sd").isna().all(axis=None)
    assert "±" not in ResultTable(summary)._repr_markdown_()
    assert "[" not in DifferenceTable(compare(scores)).rows()[0][1][0].spread
    assert sentence(compare(scores), "AIM-Fair").startswith("Over 1 seed, ")


def test_comparison_is_paired_and_covers_the_truth():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        base = rng.normal(70, 10, 12)
        frame = pd.DataFrame({"ACC": np.concatenate([base, base + rng.normal(3, 1, 12)])}).assign(WST=0.0, EO=0.0, STD=0.0)
        frame.index = pd.MultiIndex.from_product([["ERM", "ours"], range(12)], names=["method", "seed"])
        row = compare(frame).loc[("ours", "ACC")]
        by_scipy = stats.ttest_1samp(frame.ACC.loc["ours"] - frame.ACC.loc["ERM"], 0)
        assert np.allclose([row.low, row.high, row.p], [*by_scipy.confidence_interval(0.95), by_scipy.pvalue])
        hits += row.low <= 3 <= row.high
    assert 183 <= hits <= 199


def test_p_values_are_corrected_over_the_table(scores):
    table = compare(scores)
    p, n = np.sort(table.p.to_numpy()), len(table)
    stepped = [min(1, max(p[j] * (n - j) for j in range(i + 1))) for i in range(n)]  # the definition, in loops
    assert np.allclose(np.sort(table.p_holm.to_numpy()), stepped)
    marked = [bool(cell.rank) for _, cells in DifferenceTable(table).rows() for cell in cells]
    assert marked == (table.p_holm < 0.05).tolist()


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


def test_marks(predictions, scores):
    best, summary = distinct_best(predictions), summarize(scores)
    rows = ResultTable(summary, best=best).rows()
    for place, column in enumerate(("ACC", "WST", "EO", "STD")):
        marked = [name for name, cells in rows if cells[place].rank]
        assert marked == ([best[column]] if column in best else [])
        if marked:
            value = summary[column] if column in ("ACC", "WST") else -summary[column]
            assert value.idxmax() == marked[0]
    assert not any(cell.rank for _, cells in ResultTable(summary).rows() for cell in cells)


def test_the_best_is_marked_where_it_is_far_from_all_others():
    far = simulate(["a", "b", "c"], n=2000)
    far = far.assign(prediction=np.where((far.method == "c") & (far.index % 7 > 0), far.target, (far.logit > 0) * 1))
    assert set(distinct_best(far).values()) == {"c"} and "ACC" in distinct_best(far)
    twins = pd.concat([far, far[far.method == "c"].assign(method="d")])
    assert distinct_best(twins) == {} and distinct_best(far[far.method == "a"]) == {}


@pytest.mark.parametrize("seeds", [(100,), (100, 200, 300)])
def test_claims_are_supported_refuted_or_open(predictions, seeds):
    some = predictions[predictions.seed.isin(seeds)]
    gap = (per_seed(some).loc["AIM-Fair"] - per_seed(some).loc["ERM"]).mean()
    claims = [Claim("far", "AIM-Fair", "WST", margin=-60), Claim("too far", "AIM-Fair", "WST", margin=90),
              Claim("near", "AIM-Fair", "WST", margin=gap.WST), Claim("less", "AIM-Fair", "EO", margin=60, at_least=False),
              Claim("not less", "AIM-Fair", "EO", margin=-90, at_least=False), Claim("a group", "AIM-Fair", "1_1", margin=-90)]
    found = check_claims(some, claims)
    assert found.verdict.tolist() == ["supported", "refuted", "open", "supported", "refuted", "supported"]
    assert np.isclose(found.difference["near"], gap.WST) and (found.seeds == len(seeds)).all()
    assert ((found.low < found.difference) & (found.difference < found.high)).all()
    with pytest.raises(ValueError, match="no method 'JTT'"):
        check_claims(some, [Claim("x", "JTT", "ACC")])


def test_verdicts_are_corrected_as_holm_corrects_p_values(predictions):
    "By hand: the smallest of m p values has to be below alpha / m, the next below alpha / (m - 1), and so on."
    runs, middle = PairedRuns(predictions), PairedRuns(predictions).difference("AIM-Fair", "ERM", "ACC")
    reach = [middle.difference - runs.difference("AIM-Fair", "ERM", "ACC", confidence=level).low for level in (0.95, 0.975, 1 - 0.05 / 3)]
    assert reach == sorted(reach)
    between = [(a + b) / 2 for a, b in zip(reach, reach[1:], strict=False)]  # decided alone, not among two; among two, not among three

    def verdicts(*away):
        claims = [Claim(str(i), "AIM-Fair", "ACC", margin=middle.difference - m) for i, m in enumerate(away)]
        return check_claims(predictions, claims).verdict.tolist()

    alone, of_two = between
    assert verdicts(alone) == ["supported"] and verdicts(alone, 0) == ["open", "open"] and verdicts(of_two, 0) == ["supported", "open"]
    assert verdicts(of_two, 0, 0) == ["open"] * 3 and verdicts(alone, of_two, 90) == ["supported"] * 3
    assert verdicts(alone, 0, 90) == ["open", "open", "supported"]
    places = check_claims({"a": predictions, "b": predictions}, [Claim("x", "AIM-Fair", "ACC", margin=middle.difference - alone)])
    assert places.verdict.tolist() == ["open", "open"] and places.index.tolist() == [("a", "x"), ("b", "x")]


def test_an_interval_over_seeds_and_images_is_wider_than_either(predictions, scores):
    both = PairedRuns(predictions).difference("AIM-Fair", "ERM", "ACC")
    paired = (scores.ACC.loc["AIM-Fair"] - scores.ACC.loc["ERM"])
    right = predictions.assign(right=1.0 * ((predictions.logit > 0) == predictions.target))
    wide = right.pivot(index="id", columns=["method", "seed"], values="right")
    per_image = 100 * (wide["AIM-Fair"].mean(axis=1) - wide["ERM"].mean(axis=1))
    variance = paired.var() / 3 + per_image.var(ddof=0) / len(wide)
    df = 2 * (variance / (paired.var() / 3)) ** 2
    assert np.isclose(both.high - both.difference, stats.t.ppf(0.975, df) * np.sqrt(variance), rtol=1e-6)
    shuffled = predictions.sample(frac=1, random_state=1).sort_values("method", kind="stable")
    assert np.allclose(PairedRuns(shuffled).difference("AIM-Fair", "ERM", "ACC"), both)


def test_how_much_can_be_seen():
    seen = [visible_difference(n, 10) for n in (60, 400, 4000)]
    assert seen[0] > seen[1] > seen[2] and visible_difference(400, 5) > visible_difference(400, 20)
    n = images_needed(6, 10)
    assert visible_difference(n, 10) <= 6 < visible_difference(n - 1, 10) and images_needed(1, 3) is None
    rng, hits = np.random.default_rng(0), 0  # a difference as large as that is seen four times of five
    d = visible_difference(400, 10)
    for _ in range(2000):
        images = rng.choice([-1, 0, 1], p=[(0.15 - d / 100) / 2, 0.85, (0.15 + d / 100) / 2], size=400)
        seeds = 100 * images.mean() + rng.normal(0, 3, 10)
        error, ratio = np.sqrt(seeds.var(ddof=1) / 10 + 1e4 * images.var() / 400), 1e4 * images.var() / 400 / (seeds.var(ddof=1) / 10)
        hits += seeds.mean() > stats.t.ppf(0.975, 9 * (1 + ratio) ** 2) * error
    assert 0.76 < hits / 2000 < 0.87


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

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_csv(scores * 2, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_difference_table(scores, tmp_path):
    table = DifferenceTable(compare(scores), caption="d")
    assert [name for name, _ in table.rows()] == NAMES[1:]
    text = table.to_latex()
    assert "{[}" in text and "−" not in text
    assert len(table.write(tmp_path / "d")) == 3


SEVEN = Names(("Female", "Male"), ("Black", "East Asian", "Indian", "Latino_Hispanic", "Middle Eastern", "Southeast Asian", "White"))


@pytest.mark.parametrize("seeds", [(100,), (100, 200)])
def test_a_table_of_many_groups_has_them_as_rows_and_counts_few_images(seeds, tmp_path):
    predictions = simulate(["ERM", "AIM-Fair"], seeds=seeds, n=700, n_groups=7)
    few = predictions.id.isin(predictions.id[(predictions.target == 1) & (predictions.protected == 4)].unique()[11:])
    predictions = predictions[~few]
    images = group_images(predictions)
    assert images["1_4"] == 11 and sum(images.values()) == predictions.id.nunique()
    table = GroupTable(summarize(per_seed(predictions)), images, names=SEVEN, caption="c", note="Profile x.")
    assert table.header() == ["Group", "Images", "ERM", "AIM-Fair"] and len(table.rows()) == 14
    right = predictions.assign(right=(predictions.logit > 0) == predictions.target)
    for (name, cells), (group, n) in zip(table.rows(), images.items(), strict=True):
        t, p = map(int, group.split("_"))
        assert name == f"{SEVEN.target[t]}, {SEVEN.protected[p]}".replace("_", " ") and cells[0].value == str(n)
        for method, cell in zip(["ERM", "AIM-Fair"], cells[1:], strict=True):
            share = right[(right.method == method) & (right.target == t) & (right.protected == p)].groupby("seed").right.mean().mean()
            assert cell.value == (f"{100 * share:.1f}" if n >= 30 else f"{round(11 * share, 1):g} of 11")
    for place in (1, 2):
        assert sum(cells[place].spread == "(worst)" for _, cells in table.rows()) >= 1
    assert table.note == f"Profile x; {few_note(images, SEVEN)}." and "Male, Middle Eastern (11)" in table.note
    assert "%" not in few_note(images, SEVEN) and len(table.write(tmp_path / "t")) == 3


def test_many_groups_are_a_sheet_that_fits_its_figure():
    "Every number and every name lies inside the figure; names do not overlap."
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = [*NAMES, "CVaR DRO", "MAPLE-style", "JTT + synthetic", "DFR, synthetic groups †"]
    predictions = simulate(names, seeds=(100,), n=900, n_groups=7)
    scores, images = per_seed(predictions), group_images(predictions) | {"0_3": 11}
    figure = plot_groups(scores, names=SEVEN, images=images)
    figure.draw_without_rendering()
    ax, renderer = figure.axes[0], FigureCanvasAgg(figure).get_renderer()
    rows = ax.get_yticklabels()
    assert [t.get_text() for t in rows][3:5] == ["Female, Latino Hispanic (11 images)", "Female, Middle Eastern"]
    boxes = [t.get_window_extent(renderer) for t in rows]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1:])
    for text in [*rows, *ax.get_xticklabels(), *ax.texts]:
        box = text.get_window_extent(renderer)
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
    shown = np.reshape([t.get_text() for t in ax.texts], (14, 11))
    assert all(cell.endswith(" of 11") for cell in shown[3])
    assert shown[4].tolist() == [f"{v:.0f}" for v in scores["0_4"]]
    assert plot_groups(per_seed(simulate())).legends and not figure.legends


def test_sample_sheets_name_many_groups(tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    table = pd.DataFrame([{"path": tmp_path / "a.png", "target": t, "protected": p} for t in (0, 1) for p in range(7)])
    figure = plot_samples(table, per_group=2, names=SEVEN)
    assert [t.get_text() for ax in figure.axes for t in labels_of(ax)][-1] == "Male,\nWhite"


@pytest.fixture(scope="module")
def settings(scores):
    "Two settings, one of which lacks methods and has a name that needs escapes."
    return {"Smiling, Male": scores, "50 % | R&D_{x}": per_seed(simulate(["ERM", "MAPLE", "AIM-Fair"], seeds=(100, 200)))}


def test_blocks_are_the_tables_of_the_settings(settings):
    summaries = {name: summarize(s) for name, s in settings.items()}
    table = VariantTable(summaries, caption="c", note="n", digits=1)
    rows = dict(table.rows())
    assert list(rows) == [*NAMES, "MAPLE"] and table.header() == ["Method", *2 * ResultTable(summaries["Smiling, Male"]).header()[1:]]
    for place, summary in enumerate(summaries.values()):
        for name, cells in ResultTable(summary, digits=1).rows():
            assert rows[name][4 * place:4 * place + 4] == cells
    assert [c.value for c in rows["MAPLE"][:4]] == ["–"] * 4
    for (variant, method), row in table.frame.iterrows():
        assert row.equals(summaries[variant].loc[method].rename(row.name))


def test_blocks_in_every_format(settings, tmp_path):
    table = VariantTable({name: summarize(s) for name, s in settings.items()}, caption="C", note="N")
    files = {p.suffix: p.read_text(encoding="utf-8") for p in table.write(tmp_path / "t")}
    long = list(csv.DictReader(io.StringIO(files[".csv"])))
    expected = [(v, m) for v, s in settings.items() for m in dict.fromkeys(i[0] for i in s.index)]
    assert [(r["variant"], r["method"]) for r in long] == expected
    assert float(long[-1]["WST"]) == pytest.approx(table.frame["WST"].iloc[-1], abs=1e-4)
    body = files[".tex"].split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert {len(re.findall(r"(?<!\\)&", row)) for row in body} == {8} and len(body) == 8
    assert files[".tex"].count(r"\multicolumn{4}{c}") == 2 and r"\cmidrule(lr){2-5} \cmidrule(lr){6-9}" in files[".tex"]
    assert r"50 \% \textbar{} R\&D\_\{x\}" in files[".tex"] and files[".tex"].count("{") == files[".tex"].count("}")
    blocks = files[".md"].split("\n\n")
    assert blocks[0] == "**C**" and blocks[1] == "**Smiling, Male**" and blocks[-1] == "N\n"
    assert [sum(line.startswith("|") for line in block.splitlines()) - 2 for block in (blocks[2], blocks[4])] == [7, 3]
    html = table._repr_html_()
    assert html.count('colspan="4"') == 2 and html.count("<tr>") == 2 + 8 and "R&amp;D" in html


def test_page_shows_every_block(settings, tmp_path):
    table = VariantTable({name: summarize(s) for name, s in settings.items()}, caption="C", note="N")
    table.write(tmp_path / "e")
    path = write_html_report(tmp_path / "r.html", experiments=[Section("e", tables=(table.text(),))], configuration={}, about={})
    page = Page(path.read_text(encoding="utf-8"))
    assert page.tags.count("caption") == 2 and {"C: Smiling, Male", "50 % | R&D_{x}", "N"} <= set(page.words)
    assert [row[0] for row in page.rows if len(row) == 5] == ["Method", *NAMES, "Method", "ERM", "AIM-Fair", "MAPLE"]


def test_blocks_of_differences(settings):
    table = VariantTable({name: compare(s) for name, s in settings.items()}, of=DifferenceTable, digits=1)
    assert table.header()[0] == "Difference to ERM" and list(dict(table.rows())) == [*NAMES[1:], "MAPLE"]
    assert table.frame.index.names == ["variant", "method", "metric"]


def test_plain_table_shows_every_kind_of_cell(tmp_path):
    frame = pd.DataFrame({"n": [12345, 2], "share": [-0.125, np.nan], "ok": [True, False], "name": ["a|b", None]},
                         index=pd.Index(["x", "<y>"], name="set"))
    table = PlainTable(frame, labels={"n": "Images", "set": "Set"}, digits=1)
    assert table.header() == ["Set", "Images", "share", "ok", "name"]
    assert [[c.value for c in cells] for _, cells in table.rows()] == [["12,345", "−0.1", "yes", "a|b"], ["2", "–", "no", "–"]]
    assert r"a\|b" in table._repr_markdown_() and "&lt;y&gt;" in table._repr_html_() and len(table.write(tmp_path / "t")) == 3
    assert PlainTable(frame.iloc[:0]).rows() == []
    assert "|:--|--:|--:|--:|:--|" in table._repr_markdown_() and "{lrrrl}" in table.to_latex()


def test_best_sentence_is_of_the_table(scores):
    summary = summarize(scores)
    text = best_sentence(summary, metrics=("WST", "EO"))
    assert text.startswith("By the mean over 3 seeds, ")
    assert f"{summary.WST.idxmax()} ({summary.WST.max():.2f})" in text and f"{summary.EO.idxmin()} ({summary.EO.min():.2f})" in text
    assert "no accuracy" in best_sentence(summary.assign(ACC=np.nan))


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


@pytest.mark.parametrize("x, y", [("EO", "ACC"), ("WST", "ACC"), ("STD", "EO")])
def test_tradeoff_labels_and_axes(x, y):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = ["ERM", "CVaR DRO", "EIIL", "LfF", "JTT", "MAPLE", "DiGA", "AIM-Fair"]
    scores = per_seed(simulate(names))
    figure = plot_tradeoff(scores, x=x, y=y)
    ax, renderer = figure.axes[0], FigureCanvasAgg(figure).get_renderer()
    boxes = [t.get_window_extent(renderer) for t in labels_of(ax)]
    assert sorted(t.get_text() for t in labels_of(ax)) == sorted(names)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1:])
    assert all(figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 for b in boxes)
    assert (ax.get_xlim()[0] > ax.get_xlim()[1]) == (x in ("EO", "STD")) and (ax.get_ylim()[0] > ax.get_ylim()[1]) == (y in ("EO", "STD"))
    drawn = {tuple(np.round(c.get_offsets()[0], 6)) for c in ax.collections if hasattr(c, "get_offsets") and len(c.get_offsets()) == 1}
    assert {tuple(np.round(scores.loc[n, [x, y]].to_numpy().mean(axis=0), 6)) for n in names} <= drawn


def curve_frame(seeds=(1, 2, 3)):
    rng = np.random.default_rng(3)
    return pd.DataFrame([{"k": k, "seed": s, "ACC": 90 + rng.normal(), "WST": 70 + rng.normal(), "EO": 9 + rng.normal()}
                         for k in (50, 10, 30) for s in seeds])


def test_curve_is_mean_and_sample_deviation():
    frame = curve_frame()
    for given in (frame, frame.set_index(["k", "seed"]), frame.sample(frac=1, random_state=0)):
        figure = plot_curve(given, "k", baseline={"ACC": 88.0}, mark=30)
        for ax, metric in zip(figure.axes, ("ACC", "WST", "EO"), strict=True):
            values = {k: frame.loc[frame.k == k, metric].to_numpy() for k in (10, 30, 50)}
            line = ax.lines[0].get_xydata()
            assert np.allclose(line, [(k, v.mean()) for k, v in values.items()])
            band = ax.collections[0].get_paths()[0].vertices
            for k, v in values.items():
                edge = band[np.isclose(band[:, 0], k), 1]
                sd = np.sqrt(((v - v.mean()) ** 2).sum() / (len(v) - 1))
                assert np.isclose(edge.min(), v.mean() - sd) and np.isclose(edge.max(), v.mean() + sd)
    assert len(figure.axes[0].lines) == 3 and len(figure.axes[1].lines) == 2


def test_curve_with_one_seed_and_with_text_values(tmp_path):
    one = plot_curve(curve_frame(seeds=(1,)), "k", ("EO",))
    band = one.axes[0].collections[0].get_paths()[0].vertices
    assert np.isclose(np.ptp(band[np.isclose(band[:, 0], 30), 1]), 0)
    text = curve_frame().assign(k=lambda f: f.k.astype(str))
    assert [t.get_text() for t in plot_curve(text, "k").axes[0].get_xticklabels()] == ["50", "10", "30"]
    assert [p.suffix for p in write_figure(one, tmp_path / "c")] == [".png", ".pdf"]


@pytest.mark.parametrize("call, says", [
    (lambda f: plot_curve(f, "ratio"), "ratio"),
    (lambda f: plot_curve(f, "k", ("F1",)), "choose from ACC, WST, EO"),
    (lambda f: plot_curve(f, "k", mark=55), "55"),
    (lambda f: plot_curve(pd.concat([f, f]), "k"), "more than once"),
])
def test_curves_that_would_mislead_are_errors(call, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        call(curve_frame())


def points(ax):
    "Large marks of a panel: the places where one marker is drawn alone."
    return [tuple(np.round(c.get_offsets()[0], 6)) for c in ax.collections if hasattr(c, "get_sizes") and len(c.get_offsets()) == 1]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_panels_of_settings(settings, n):
    chosen = {f"{name} {i}": s for i, (name, s) in enumerate([*settings.items()] * 3) if i < n}
    figure = plot_variants(chosen, share=n > 2)
    visible = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title(loc="left") for ax in visible] == list(chosen) and all(ax.xaxis.get_inverted() for ax in visible)
    for ax, scores in zip(visible, chosen.values(), strict=True):
        means = scores.groupby(level="method")[["EO", "ACC"]].mean()
        assert {tuple(np.round(row, 6)) for row in means.to_numpy()} <= set(points(ax))
    assert [t.get_text() for t in figure.legends[0].get_texts()] == list(dict.fromkeys([*NAMES, "MAPLE"][:7 + (n > 1)]))


@pytest.mark.parametrize("seeds", [(100,), (100, 200)])
def test_rows_are_methods(seeds):
    scores = per_seed(simulate(seeds=seeds))
    figure = plot_rows(scores, metrics=("WST", "EO"))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == NAMES
    for ax, metric in zip(figure.axes, ("WST", "EO"), strict=True):
        mean = scores[metric].groupby(level="method", sort=False).mean()
        assert points(ax) == [(round(v, 6), len(NAMES) - 1 - i) for i, v in enumerate(mean)]
        assert ax.lines[-1].get_xdata()[0] == pytest.approx(mean["ERM"])
    assert len(plot_rows(scores, baseline="none").axes[0].lines) < len(figure.axes[0].lines)


def test_a_line_a_method_with_gaps(settings):
    frame = pd.concat({"100 %": settings["Smiling, Male"], "50 %": settings["Smiling, Male"]}, names=["size"])
    frame = frame.drop(index=[i for i in frame.index if i[:2] == ("50 %", "AIM-Fair")])
    figure = plot_lines(frame, "size", ("WST",))
    lines = {t.get_text(): line.get_ydata() for t, line in zip(figure.legends[0].get_texts(), figure.axes[0].lines, strict=True)}
    assert list(lines) == NAMES and np.isnan(lines["AIM-Fair"]).tolist() == [False, True]
    assert lines["ERM"][1] == pytest.approx(frame.loc["50 %"].loc["ERM", "WST"].mean())
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["100 %", "50 %"]


def test_layers_are_the_mean_of_the_seeds(tmp_path):
    names = ["conv1.weight", "bn1.weight", *(f"layer1.{i}.weight" for i in range(8)), "fc.weight"]
    def table(seed):
        rng = np.random.default_rng(seed)
        domain, bias = rng.permutation(11) + 1, rng.permutation(11) + 1
        return pd.DataFrame({"domain_rank": domain, "bias_rank": bias, "selected": (domain < 9) & (bias < 9)}, index=names)
    tables = {seed: table(seed) for seed in (1, 2, 3)}
    figure = plot_layers(tables)
    loud, updated = (ax.collections[0].get_array() for ax in figure.axes[:2])
    domain, bias = np.reshape(loud, (2, 11))
    assert np.allclose(domain, np.mean([t.domain_rank - 1 for t in tables.values()], axis=0) / 10)
    assert np.allclose(bias, 1 - np.mean([t.bias_rank - 1 for t in tables.values()], axis=0) / 10)
    assert np.allclose(np.ravel(updated), np.mean([t.selected for t in tables.values()], axis=0))
    assert "3 seeds" in figure.axes[1].get_xlabel() and "1 seed)" in plot_layers({1: tables[1]}).axes[1].get_xlabel()
    assert write_figure(figure, tmp_path / "a")[0].read_bytes() == write_figure(plot_layers(tables), tmp_path / "b")[0].read_bytes()


def test_samples_are_the_first_of_each_group(tmp_path):
    from PIL import Image

    rows = []
    for i in range(7):
        Image.new("RGB", (4, 4), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"path": tmp_path / f"{i}.png", "target": i % 2, "protected": 0})
    figure = plot_samples(pd.DataFrame(rows), per_group=3, names={"0_0": "zero"})
    shown = [int(ax.get_images()[0].get_array()[0, 0, 0]) // 30 for ax in figure.axes if ax.get_images()]
    assert shown == [0, 2, 4, 1, 3, 5] and [t.get_text() for t in labels_of(figure.axes[0])] == ["zero"]
    assert "target 1" in labels_of(figure.axes[3])[0].get_text()


# ---------------------------------------------------------------- the page

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    "Elements, words and pictures of a page; an unbalanced tag is an error."

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.rows, self.images, self.links, self.ids = [], [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.open += [tag] * (tag not in VOID)
        self.rows += [[]] * (tag == "tr")
        self.rows[-1:] = [[*self.rows[-1], ""]] if tag in ("td", "th") else self.rows[-1:]
        self.images += [attrs] * (tag == "img")
        self.links += [attrs[name] for name in ("href",) if name in attrs]
        self.ids += [attrs[name] for name in ("id",) if name in attrs]
        assert not any(name.startswith("on") or name == "style" for name in attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words += [data.strip()] * bool(data.strip())
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data


EVIL = "<script>alert('&')</script>"
FIXED = {"versions": {"Python": "3", "torch": "2"}, "machine": {"Processor": "a processor", "Cores": "2"},
         "date": datetime(2020, 1, 2, 3, 4, tzinfo=timezone.utc)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with the files of two experiments, one of which failed, and the page about them."
    folder = tmp_path_factory.mktemp("out")
    summary = summarize(per_seed(simulate(NASTY)))
    table = ResultTable(summary, best={"ACC": "ERM"}, caption=f"A {EVIL} | caption", note="Data in /srv/faces_of/somebody_x.")
    table.write(folder / "alpha")
    write_figure(plot_curve(curve_frame(), "k", ("EO",)), folder / "alpha")
    (folder / "alpha-raw.csv").write_text("name,value\n" + "".join(f'"{EVIL}",{i}\n' for i in range(400)))
    (folder / "alpha-broken.png").write_bytes(b"no picture")
    (folder / "alphabet.md").write_text("not of alpha")
    (folder / "beta.md").write_text("stale numbers of an earlier run")
    (folder / "notes.md").write_text("of nothing")
    findings = (f"ERM is `worse` by 3 points, **{EVIL}**.",)
    sections = [Section("alpha", f"Alpha {EVIL}", "What is **asked**?", findings, tables=(table.text(),)),
                Section("beta", error=f"FileNotFoundError: no folder '/home/somebody/my faces' {EVIL}\x1b[0m"), Section("gamma")]
    arguments = {"experiments": sections, "folder": folder, "changed": ["train.lr"], "differences": ["**Smaller** than /data/paper", EVIL],
                 "configuration": {"name": "toy", "data.root": f"{folder}/faces", "data.x": EVIL, "train.lr": 0.5, "train.steps": (3, 4)},
                 "about": {"profile": "toy", "seeds": [100, 200], "made": 3, "reused": 0, "seconds": 3725.2, "store": str(folder),
                           "extra": None}}
    path = write_html_report(folder / "report.html", **arguments, **FIXED)
    return folder, arguments, path.read_text(encoding="utf-8")


def test_page_is_balanced_and_self_contained(made):
    _, _, text = made
    page = Page(text)
    assert page.tags.count("h1") == 1 and page.tags.count("script") == 1
    assert not {"link", "iframe", "object", "form"} & set(page.tags)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links) and len(set(page.ids)) == len(page.ids)
    assert "url(" not in text and "@import" not in text and "src=\"http" not in text


def test_page_shows_pictures_as_they_are(made):
    from PIL import Image

    folder, _, text = made
    page = Page(text)
    assert len(page.images) == 1 and "damaged" in text
    head, _, data = page.images[0]["src"].partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(data, validate=True) == (folder / "alpha.png").read_bytes()
    Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert page.images[0]["alt"].startswith("Alpha <script>")


def test_page_shows_the_table_as_written(made):
    folder, _, text = made
    table = ResultTable(pd.read_csv(folder / "alpha.csv", index_col=0))
    wanted = [[" ".join(name.split()), *(f"{c.value} {c.spread}".strip() for c in cells)] for name, cells in table.rows()]
    shown = [[" ".join(cell.split()) for cell in row] for row in Page(text).rows]
    for row in wanted:
        assert row in shown
    assert f"<b>{table.rows()[0][1][0].value}</b>" in text and "<u>" not in text
    assert [EVIL, "199"] in shown and [EVIL, "200"] not in shown and "alpha-raw.csv, 400 rows, the first 200 shown" in text


def test_page_escapes_and_hides_paths(made):
    folder, _, text = made
    assert text.count("<script") == 1 and "&lt;script&gt;" in text  # the one that sorts
    for secret in (str(folder), str(folder.parent), "/srv", "/data/", "/home", "my faces/", "faces_of/"):
        assert secret not in text
    words = " ".join(Page(text).words)
    assert "…/somebody_x." in words and "'…/my faces'" in words and "…/faces" in words and "than …/paper" in words


def test_page_names_failures_and_leaves_out_what_they_left(made):
    _, _, text = made
    words = Page(text).words
    assert "1 of 3 experiments failed" in words and "stale numbers" not in text and "not of alpha" not in text and "of nothing" not in text
    assert "It wrote no table and no figure." in words


def test_page_tells_what_it_rests_on(made):
    _, _, text = made
    rows = Page(text).rows
    for row in (["Seeds", "100, 200"], ["Duration", "1.0 h"], ["Artifacts made", "3"], ["Artifacts reused", "0"],
                ["lr", "0.5 (changed)"], ["steps", "3, 4"], ["torch", "2"], ["Cores", "2"]):
        assert row in rows
    assert "2020-01-02 03:04 UTC; profile toy" in Page(text).words and not any(row[0] == "Note" for row in rows)


def test_page_is_the_same_bytes_again(made, tmp_path):
    _, arguments, text = made
    assert write_html_report(tmp_path / "new" / "r.html", **arguments, **FIXED).read_text(encoding="utf-8") == text
    later = {**FIXED, "date": datetime(2021, 1, 2, 3, 4, tzinfo=timezone.utc)}
    other = write_html_report(tmp_path / "later.html", **arguments, **later).read_text(encoding="utf-8")
    assert other != text and other.replace("2021-01-02", "2020-01-02") == text


def test_page_of_nothing(tmp_path):
    path = write_html_report(tmp_path / "r.html", experiments=[], configuration={}, about={})
    assert "aimfair" in " ".join(Page(path.read_text(encoding="utf-8")).words)


def notebook_of(path, *cells):
    "A notebook of Markdown cells (text) and code cells (lists of outputs)."
    made = [{"cell_type": "markdown", "metadata": {}, "source": c} if isinstance(c, str) else
            {"cell_type": "code", "metadata": {}, "source": "x", "execution_count": 1,
             "outputs": [{"output_type": "display_data", "metadata": {}, "data": data} for data in c]} for c in cells]
    path.write_text(json.dumps({"cells": made, "nbformat": 4, "nbformat_minor": 4, "metadata": {}}))
    return path


def test_section_from_a_notebook(tmp_path):
    path = notebook_of(tmp_path / "some_name.ipynb", "<span>An exception was encountered</span>",
                       "# A title\n> What it asks,\n> in two lines.",
                       [{"text/markdown": "| a |", "text/html": "<table>"}], [{"text/markdown": ["One.\n\n", "Two."]}])
    assert Section.from_notebook(path) == Section("some_name", "A title", "What it asks, in two lines.", ("One.", "Two."))
    assert Section.from_notebook(path, error="e") == Section("some_name", "A title", "What it asks, in two lines.", (), "e")
    missing = Section.from_notebook(tmp_path / "never_ran.ipynb", error="e")
    assert missing.heading == "Never ran" and missing.error == "e"


def test_tables_go_through_an_executed_notebook_to_the_page(tmp_path, settings, nasty):
    "IPython's own formatter stores them, and the notebook remains a valid one."
    import nbformat
    from IPython.core.formatters import DisplayFormatter

    several = VariantTable({name: summarize(s) for name, s in settings.items()}, caption="Several")
    only_shown = PlainTable(pd.DataFrame({"n": [31415]}))
    for table, stem in ((nasty, "e"), (several, "e-several")):
        table.write(tmp_path / stem)
    shown = [DisplayFormatter().format(table)[0] for table in (several, only_shown, nasty)]
    assert all({"text/html", "text/markdown", "text/plain"} < data.keys() for data in shown)
    path = notebook_of(tmp_path / "e.ipynb", *([data] for data in shown))
    nbformat.validate(nbformat.read(path, as_version=4))
    section = Section.from_notebook(path)
    assert section.tables == (several.text(), nasty.text())
    text = write_html_report(tmp_path / "r.html", experiments=[section], configuration={}, about={}).read_text(encoding="utf-8")
    names = [row[0] for row in Page(text).rows if len(row) == 5]
    assert names == ["Method", *NASTY, "Method", *NAMES, "Method", "ERM", "AIM-Fair", "MAPLE"]
    assert "31,415" not in text and "<b>bold" not in text


def test_numbers_without_a_table_come_from_their_csv(tmp_path):
    "As after a run whose notebook is not there."
    PlainTable(pd.DataFrame({"n": [31415], "by": ["a, b"]}, index=pd.Index(["x"], name="set"))).write(tmp_path / "e")
    text = write_html_report(tmp_path / "r.html", experiments=[Section("e")], configuration={}, about={}).read_text(encoding="utf-8")
    assert {("set", "n", "by"), ("x", "31415", "a, b")} <= set(map(tuple, Page(text).rows)) and "e.csv, e.md, e.tex" in text


def test_machine_and_versions_name_nobody():
    import getpass
    import platform

    facts = {**hardware(), **package_versions()}
    assert facts["Python"] == platform.python_version() and facts["numpy"] == np.__version__ and int(facts["Cores"]) >= 1
    assert platform.node() not in facts.values() and getpass.getuser() not in facts.values()
