"""aimfair.metrics against a brute-force oracle, against fairlearn, and against a bootstrap of rows."""

import json
import math
import random
import subprocess
import sys
import time
import warnings
from statistics import pstdev

import fairlearn.metrics as fl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aimfair.metrics import MEASURES, cell_counts, equalized_odds, fairness_report, group_accuracy

LABELS = [[0, 1], [False, True], ["no", "yes"], [0, 1, 2], ["a", "b", "c", "d"]]
GROUPS = [[0, 1], ["f", "m"], [False, True], [-1, 0, 7], [("f", 1), ("m", 2)], ["a", 1, (2, 3)]]


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def same(a, b):
    return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, abs_tol=1e-12)


def biased(n, seed, accuracy=((0.83, 0.97), (0.95, 0.66))):
    rng = np.random.default_rng(seed)
    accuracy = np.array(accuracy)
    y, p = rng.integers(accuracy.shape[0], size=n), rng.integers(accuracy.shape[1], size=n)
    right = rng.random(n) < accuracy[y, p]
    return y, np.where(right, y, (y + 1) % accuracy.shape[0]), p


# The oracle: loops, and the words of the definitions.


def oracle(y_true, y_pred, group):
    cells, gaps = {}, []
    for t in set(y_true) | set(y_pred):
        for g in set(group):
            hits = [a == b for a, b, c in zip(y_true, y_pred, group, strict=True) if a == t and c == g]
            cells[t, g] = sum(hits) / len(hits) if hits else math.nan
        recalls = [cells[t, g] for g in set(group)]
        gaps.append(math.nan if len(recalls) < 2 or any(map(math.isnan, recalls)) else max(recalls) - min(recalls))
    undefined = any(map(math.isnan, cells.values()))
    no_gap = len(gaps) < 2 or any(map(math.isnan, gaps))
    return cells, {
        "accuracy": sum(a == b for a, b in zip(y_true, y_pred, strict=True)) / len(y_true),
        "worst_group_accuracy": math.nan if undefined else min(cells.values()),
        "equalized_odds": math.nan if no_gap else sum(gaps) / len(gaps),
        "equalized_odds_max": math.nan if no_gap else max(gaps),
        "group_accuracy_std": math.nan if undefined else pstdev(cells.values()),
    }


@st.composite
def predictions(draw):
    labels, groups = draw(st.sampled_from(LABELS)), draw(st.sampled_from(GROUPS))
    row = st.tuples(st.sampled_from(labels), st.sampled_from(labels), st.sampled_from(groups))
    return [list(column) for column in zip(*draw(st.lists(row, min_size=1, max_size=60)), strict=True)]


@settings(max_examples=300, deadline=None)
@given(predictions())
def test_every_figure_equals_the_oracle(data):
    y_true, y_pred, group = data
    cells, figures = oracle(y_true, y_pred, group)
    report = quiet(fairness_report, y_true, y_pred, sensitive_features=group)
    assert {name: same(getattr(report, name), figures[name]) for name in MEASURES} == dict.fromkeys(MEASURES, True)
    found = dict(zip(report.group_accuracy.index.tolist(), report.group_accuracy, strict=True))
    assert found.keys() == cells.keys() and all(same(found[cell], cells[cell]) for cell in cells)
    assert report.counts.sum() == len(y_true)
    assert all(n == sum((t, g) == cell for t, g in zip(y_true, group, strict=True)) for cell, n in report.counts.items())
    assert same(quiet(equalized_odds, y_true, y_pred, sensitive_features=group), figures["equalized_odds"])
    assert same(quiet(equalized_odds, y_true, y_pred, sensitive_features=group, agg="worst_case"), figures["equalized_odds_max"])
    assert quiet(group_accuracy, y_true, y_pred, sensitive_features=group).equals(report.group_accuracy)


@settings(max_examples=100, deadline=None)
@given(predictions(), st.randoms(use_true_random=False))
def test_order_of_samples_does_not_matter_and_figures_stay_in_range(data, shuffle):
    first = quiet(fairness_report, data[0], data[1], sensitive_features=data[2])
    rows = list(zip(*data, strict=True))
    shuffle.shuffle(rows)
    y_true, y_pred, group = map(list, zip(*rows, strict=True))
    again = quiet(fairness_report, y_true, y_pred, sensitive_features=group)
    values = first.to_frame()["value"]
    pd.testing.assert_frame_equal(first.to_frame(), again.to_frame(), check_exact=True)
    assert ((values >= 0) & (values <= 1) | values.isna()).all()
    assert not first.equalized_odds > first.equalized_odds_max


# Fairlearn, where no cell is empty.


@pytest.mark.parametrize("shape", [(2, 2), (2, 5)])
@pytest.mark.parametrize("seed", range(5))
def test_binary_equals_fairlearn(shape, seed):
    y, yhat, p = biased(400, seed, np.random.default_rng(seed).uniform(0.3, 1, size=shape))
    report = fairness_report(y, yhat, sensitive_features=p)
    assert same(report.equalized_odds_max, fl.equalized_odds_difference(y, yhat, sensitive_features=p))
    assert same(report.equalized_odds_max, fl.equalized_odds_difference(y, yhat, sensitive_features=p, agg="worst_case"))
    assert same(report.equalized_odds, fl.equalized_odds_difference(y, yhat, sensitive_features=p, agg="mean"))
    frame = fl.MetricFrame(metrics={"tpr": fl.true_positive_rate, "fpr": fl.false_positive_rate},
                           y_true=y, y_pred=yhat, sensitive_features=p)
    assert same(report.equalized_odds, frame.difference().mean())


@pytest.mark.parametrize("seed", range(3))
def test_cells_equal_fairlearn_with_crossed_features_and_three_classes(seed):
    y, yhat, p = biased(2000, seed, np.random.default_rng(seed).uniform(0.3, 1, size=(3, 4)))
    people = pd.DataFrame({"sex": np.array(["f", "m"])[p // 2], "old": p % 2 == 1})
    report = fairness_report(y, yhat, sensitive_features=people)
    frame = fl.MetricFrame(metrics=lambda t, q: np.mean(t == q), y_true=y, y_pred=yhat,
                           sensitive_features=people.assign(target=y)[["target", "sex", "old"]])
    assert report.group_accuracy.index.names == ["target", "sex", "old"]
    expected = frame.by_group.to_dict()
    assert all(same(value, expected[cell]) for cell, value in report.group_accuracy.items())
    assert same(report.accuracy, frame.overall) and same(report.worst_group_accuracy, frame.group_min())


# Labels of every kind.


@pytest.mark.parametrize("kind", [
    list, tuple, np.array, pd.Series, pd.Categorical, lambda v: pd.Series(v, index=range(10, 10 + len(v))),
    lambda v: pd.Series(v).astype(object), lambda v: np.array(v, dtype=np.float32), lambda v: np.array(v, dtype=bool),
    lambda v: pd.Series(v, dtype="Int64"), lambda v: pd.Series(v, dtype="boolean"), lambda v: np.array(v, dtype=np.uint8), iter,
])
def test_same_figures_for_any_container(kind):
    y, yhat, p = (column.tolist() for column in biased(60, 0))
    expected = fairness_report(y, yhat, sensitive_features=p).to_dict()
    report = fairness_report(kind(y), kind(yhat), sensitive_features=kind(p))
    assert [getattr(report, name) for name in MEASURES] == [expected[name] for name in MEASURES]
    assert report.group_accuracy.tolist() == list(expected["group_accuracy"].values())
    one = report.group_accuracy.index.levels[0].tolist()[1]  # 1, or True
    assert report.group_accuracy.loc[(one, one)] == expected["group_accuracy"]["1_1"]


def test_tensors_and_lists_of_their_scalars():
    torch = pytest.importorskip("torch")
    y, yhat, p = biased(60, 0)
    expected = fairness_report(y, yhat, sensitive_features=p).to_dict()
    tensors = [torch.from_numpy(v) for v in (y, yhat, p)]
    assert fairness_report(*tensors[:2], sensitive_features=tensors[2]).to_dict() == expected
    assert fairness_report(*map(list, tensors[:2]), sensitive_features=list(tensors[2])).to_dict() == expected
    both = quiet(fairness_report, *tensors[:2], sensitive_features=torch.stack([tensors[2]] * 2, 1).float())
    assert both.group_accuracy.index.names == ["target", "group_0", "group_1"]


def test_booleans_against_integers_are_the_same_labels():
    y, yhat, p = biased(60, 0)
    mixed = fairness_report(y.astype(bool), yhat, sensitive_features=p)
    assert mixed.equalized_odds == fairness_report(y, yhat, sensitive_features=p).equalized_odds
    assert mixed.group_accuracy.index.levels[0].tolist() == [False, True]


def test_samples_are_matched_by_position_not_by_index():
    y, yhat, p = biased(60, 0)
    shuffled = pd.Series(p, index=np.random.default_rng(0).permutation(60))
    assert fairness_report(pd.Series(y), yhat, sensitive_features=shuffled).to_dict() == fairness_report(
        y, yhat, sensitive_features=p).to_dict()


def test_groups_by_interval_and_categorical_order():
    y, yhat, _ = biased(200, 0)
    age = pd.cut(np.random.default_rng(9).integers(1, 100, size=200), [0, 30, 60, 100])
    report = fairness_report(y, yhat, sensitive_features=age)
    assert report.group_accuracy.index.get_level_values("group").unique().tolist() == list(age.categories)
    size = pd.Categorical(["small", "large"] * 100, categories=["small", "large"])
    assert fairness_report(y, yhat, sensitive_features=size).counts.index.levels[1].tolist() == ["small", "large"]


def test_tuples_are_one_label_and_columns_are_crossed():
    y, yhat, p = biased(200, 0)
    sex, old = np.where(p, "m", "f"), np.arange(200) % 2
    joined = fairness_report(y, yhat, sensitive_features=list(zip(sex, old, strict=True)))
    for columns in (pd.DataFrame({"sex": sex, "old": old}), {"sex": sex, "old": old}, np.stack([sex, old.astype(str)], 1)):
        crossed = fairness_report(y, yhat, sensitive_features=columns)
        assert crossed.group_accuracy.index.nlevels == 3
        assert crossed.group_accuracy.tolist() == joined.group_accuracy.tolist()
        assert crossed.equalized_odds == joined.equalized_odds
    alone = fairness_report(y, yhat, sensitive_features=pd.DataFrame({"sex": sex}))
    assert alone.group_accuracy.index.names == ["target", "group"]


# Nothing is perfect that was not seen.


def test_an_empty_cell_is_nan_and_named():
    with pytest.warns(UserWarning, match=r"no sample with \(target=0, group='m'\):") as caught:
        report = fairness_report([1, 1, 0, 1], [1, 1, 0, 1], sensitive_features=list("fmfm"), n_boot=200)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert report.accuracy == 1 and report.counts.loc[(0, "m")] == 0 and report.worst_group is None
    undefined = [*MEASURES[1:], "0_m"]
    assert report.to_frame().loc[undefined, ["value", "low", "high"]].isna().all(axis=None)
    assert report.to_frame().drop(undefined).notna().all(axis=None)
    assert fl.equalized_odds_difference([1, 1, 0, 1], [1, 1, 0, 1], sensitive_features=list("fmfm")) == 0  # why this test exists


def test_a_class_that_is_only_predicted_has_empty_cells():
    with pytest.warns(UserWarning, match=r"\(target=0, group=0\), \(target=0, group=1\)"):
        report = fairness_report([1, 1, 1], [1, 0, 1], sensitive_features=[0, 1, 1])
    assert math.isnan(report.equalized_odds) and math.isnan(report.worst_group_accuracy)


def test_a_declared_group_without_samples_is_an_empty_cell():
    group = pd.Categorical(list("abab"), categories=list("abc"))
    with pytest.warns(UserWarning, match=r"\(target=1, group='c'\)"):
        assert math.isnan(equalized_odds([0, 0, 1, 1], [0, 0, 1, 1], sensitive_features=group))
    with pytest.warns(UserWarning, match=r"\(target=1, group='c'\)"):
        assert group_accuracy([0, 0, 1, 1], [0, 0, 1, 1], sensitive_features=group).isna().sum() == 2


def test_many_empty_cells_make_one_short_warning():
    with pytest.warns(UserWarning, match="and 85 more") as caught:
        fairness_report(range(10), range(10), sensitive_features=range(10))
    assert len(caught) == 1


@pytest.mark.parametrize("y, group, kind", [([0, 1, 1], [5, 5, 5], "group"), ([1, 1, 1], [0, 1, 1], "target class")])
def test_nothing_to_compare_is_not_fair(y, group, kind):
    with pytest.warns(UserWarning, match=f"only one {kind}"):
        report = fairness_report(y, y, sensitive_features=group)
    assert math.isnan(report.equalized_odds) and math.isnan(report.equalized_odds_max)
    assert report.worst_group_accuracy == 1  # a minimum needs no second group


def test_no_warning_when_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, yhat, p = biased(400, 0)
        repr(fairness_report(y, yhat, sensitive_features=p, n_boot=100))


# Bad input: one line that says what was found.

GOOD = dict(y_true=[0, 1, 0], y_pred=[0, 1, 1], sensitive_features=[0, 1, 1])


@pytest.mark.parametrize("change, message", [
    (dict(y_pred=[0, 1]), "y_true has 3 labels, y_pred 2 and sensitive_features 3"),
    (dict(sensitive_features=pd.DataFrame({"a": [0, 1], "b": [0, 1]})), "y_pred 3 and sensitive_features 2 and 2"),
    (dict(y_true=[], y_pred=[], sensitive_features=[]), "y_true is empty"),
    (dict(y_true=[0, math.nan, 1]), r"y_true has a missing label \(NaN\) at position 1"),
    (dict(y_pred=[0, 1, None]), r"y_pred has a missing label \(NaN\) at position 2"),
    (dict(sensitive_features=["f", None, "m"]), r"sensitive_features has a missing label \(NaN\) at position 1"),
    (dict(sensitive_features=pd.Series([1, pd.NA, 2], dtype="Int64")), "missing label"),
    (dict(sensitive_features=pd.Categorical(["f", None, "m"])), "missing label"),
    (dict(y_pred=[0.2, 0.8, 1.0]), "y_pred holds 0.2: labels are needed, not probabilities"),
    (dict(y_pred=np.array([-3.5, 2, 1], dtype=np.float32)), "y_pred holds -3.5"),
    (dict(y_pred=[0, 1, math.inf]), "y_pred holds inf"),
    (dict(y_true=[0.5, 1, 0]), "y_true holds 0.5"),
    (dict(y_pred=[[0.2, 0.8]] * 3), "y_pred must hold hashable labels"),
    (dict(y_pred=np.zeros((3, 2))), r"y_pred has shape \(3, 2\), but one label a sample"),
    (dict(y_true=np.zeros((3, 1))), r"y_true has shape \(3, 1\), but one label a sample"),
    (dict(y_pred=[np.zeros(2)] * 3), "y_pred must hold"),
    (dict(y_true=1), "y_true must be a sequence"),
    (dict(y_true=np.array(1)), r"y_true has shape \(\)"),
    (dict(y_pred="101"), "y_pred must be a sequence"),
    (dict(y_pred=None), "y_pred must be a sequence"),
    (dict(y_pred={0, 1}), "y_pred must be a sequence"),
    (dict(y_pred=["0", "1", "1"]), "y_true holds labels like 0, y_pred labels like '0'"),
    (dict(sensitive_features=None), "sensitive_features must be a sequence"),
    (dict(sensitive_features=pd.DataFrame(index=range(3))), "sensitive_features has no column"),
    (dict(sensitive_features=np.zeros((3, 2, 2))), r"sensitive_features has shape \(3, 2, 2\)"),
    (dict(n_boot=-1), "n_boot must be 0"),
    (dict(n_boot=2.5), "n_boot must be a whole number, found 2.5"),
    (dict(confidence=95), "confidence must lie between 0 and 1"),
    (dict(confidence=math.nan), "confidence must lie between 0 and 1"),
])
def test_bad_input_is_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        fairness_report(**{**GOOD, **change})
    assert "\n" not in str(error.value)


def test_continuous_features_are_refused_when_crossed():
    rng = np.random.default_rng(0)
    y, yhat, _ = biased(2000, 0)
    with pytest.raises(ValueError, match="2 x 2000 x 2000 combinations .* pandas.cut"):
        cell_counts(y, yhat, sensitive_features=rng.random((2000, 2)))


def test_sensitive_features_is_a_keyword():
    with pytest.raises(TypeError):
        fairness_report([0, 1], [0, 1], [0, 1])
    with pytest.raises(ValueError, match="agg must be"):
        equalized_odds([0, 1], [0, 1], sensitive_features=[0, 1], agg="max")


# The bootstrap.


def row_bootstrap(y, yhat, p, n_boot, seed):
    "The long way: draw rows, then compute every figure anew with loops over cells."
    rng, n, out = np.random.default_rng(seed), len(y), []
    for _ in range(n_boot):
        i = rng.integers(n, size=n)
        a, b, g = y[i], yhat[i], p[i]
        cells = np.array([[(b[(a == t) & (g == q)] == t).mean() for q in np.unique(p)] for t in np.unique(y)])
        gaps = np.ptp(cells, axis=1)
        out.append([(a == b).mean(), cells.min(), gaps.mean(), gaps.max(), cells.std(), *cells.ravel()])
    return np.array(out)


@pytest.mark.parametrize("accuracy", [((0.83, 0.97), (0.95, 0.66)), ((0.9, 0.7, 0.8), (0.6, 0.95, 0.8), (0.5, 0.9, 0.9))])
def test_intervals_equal_those_of_a_row_bootstrap(accuracy):
    y, yhat, p = biased(500, 4, accuracy)
    rows = row_bootstrap(y, yhat, p, 1500, seed=1)
    for confidence in (0.5, 0.9):
        report = fairness_report(y, yhat, sensitive_features=p, n_boot=20_000, confidence=confidence, seed=2)
        below_low = (rows < report.intervals["low"].to_numpy() - 1e-12).mean(0)
        below_high = (rows <= report.intervals["high"].to_numpy() + 1e-12).mean(0)
        tail = (1 - confidence) / 2
        # shares of 1,500 row resamples on either side: 4 standard errors, and a step of the discrete distribution
        assert np.all(below_low < tail + 0.06) and np.all(below_high > 1 - tail - 0.06)
        assert np.all(np.abs(below_high - below_low - confidence) < 0.08)


def test_resampled_tables_have_the_exact_distribution_of_row_resamples():
    from itertools import product
    from math import factorial, prod

    from aimfair.metrics import _resampled_counts
    correct, count = np.array([1, 0]), np.array([2, 2])  # four rows: right, wrong, wrong, wrong in cells 0, 0, 1, 1
    outcome_of_row = [(0, 0), (1, 0), (1, 1), (1, 1)]
    exact = pd.Series([tuple(sorted(outcome_of_row[i] for i in rows)) for rows in product(range(4), repeat=4)]).value_counts() / 4**4
    for rows, share in exact.items():  # the multinomial's own formula, over (0, 0), (1, 0) and (1, 1)
        k = [rows.count(outcome) for outcome in ((0, 0), (1, 0), (1, 1))]
        assert math.isclose(share, factorial(4) / prod(map(factorial, k)) * 0.25 ** (k[0] + k[1]) * 0.5 ** k[2])
    drawn_correct, drawn_count = _resampled_counts(correct, count, 40_000, np.random.default_rng(0))
    tables = pd.Series([(a, b, c) for a, b, c in zip(drawn_correct[:, 0], drawn_count[:, 0] - drawn_correct[:, 0], drawn_count[:, 1],
                                                     strict=True)]).value_counts() / 40_000
    assert (drawn_correct[:, 1] == 0).all() and (drawn_count.sum(1) == 4).all()
    for rows, share in exact.items():
        table = tuple(rows.count(outcome) for outcome in ((0, 0), (1, 0), (1, 1)))
        assert abs(tables[table] - share) < 5 * math.sqrt(share / 40_000)


def test_intervals_cover_the_truth_as_often_as_they_say():
    accuracy = np.array([(0.83, 0.9), (0.8, 0.66)])
    truth = {"accuracy": accuracy.mean(), "equalized_odds": 0.105, "0_0": 0.83, "0_1": 0.9, "1_0": 0.8, "1_1": 0.66}
    hits = pd.Series(0, index=list(truth))
    for seed in range(300):
        y, yhat, p = biased(1200, 1000 + seed, accuracy)
        bounds = fairness_report(y, yhat, sensitive_features=p, n_boot=400, confidence=0.9, seed=seed).intervals.loc[hits.index]
        hits += (bounds["low"] <= pd.Series(truth)) & (pd.Series(truth) <= bounds["high"])
    assert (hits / 300).between(0.83, 0.96).all(), hits / 300


def test_bootstrap_is_fast():
    y, yhat, p = biased(20_000, 0)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        fairness_report(y, yhat, sensitive_features=p, n_boot=10_000)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1, seconds


def test_seed_decides_and_global_state_is_left_alone():
    y, yhat, p = biased(300, 0)
    before = np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()
    first, again, other = (fairness_report(y, yhat, sensitive_features=p, n_boot=500, seed=s).intervals for s in (7, 7, 8))
    assert (np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()) == before
    assert first.equals(again) and not first.equals(other)
    generator = np.random.default_rng(7)
    assert fairness_report(y, yhat, sensitive_features=p, n_boot=500, seed=generator).intervals.equals(first)


def test_interval_rows_and_confidence():
    y, yhat, p = biased(2000, 0)
    wide = fairness_report(y, yhat, sensitive_features=p, n_boot=2000, confidence=0.99)
    narrow = fairness_report(y, yhat, sensitive_features=p, n_boot=2000, confidence=0.5)
    assert wide.intervals.index.tolist() == [*MEASURES, "0_0", "0_1", "1_0", "1_1"]
    assert wide.intervals.columns.tolist() == ["low", "high"]
    assert (wide.intervals["low"] < narrow.intervals["low"]).all() and (wide.intervals["high"] > narrow.intervals["high"]).all()
    assert wide.intervals["low"].lt(wide.to_frame()["value"]).all()
    assert fairness_report(y, yhat, sensitive_features=p).intervals is None


def test_a_cell_of_one_sample_has_an_interval_although_resamples_miss_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fairness_report([0, 0, 1, 1, 1], [0, 0, 1, 0, 1], sensitive_features=[0, 1, 0, 1, 1], n_boot=500)
    assert report.intervals.notna().all(axis=None)


# Display and hand-over.


def test_the_table_shows_percent_counts_and_the_worst_group():
    y, yhat, p = biased(20_000, 0)
    report = fairness_report(y, yhat, sensitive_features=np.where(p, "<m>", "f"), n_boot=100, confidence=0.9)
    text, markup = repr(report), report._repr_html_()
    assert "20,000 predictions" in text and "90 % interval" in text and "worst group (1, '<m>')" in text
    assert f"{100 * report.equalized_odds:.2f}" in text and f"{report.counts.loc[(1, 'f')]:,}" in text
    assert "<m>" not in markup and "&lt;m&gt;" in markup and markup.count("<tr") == 1 + 5 + 4
    assert "interval" not in repr(fairness_report(y, yhat, sensitive_features=p))


def test_to_dict_is_plain_and_complete():
    y, yhat, p = biased(500, 0)
    report = fairness_report(y, yhat, sensitive_features=p, n_boot=50)
    read = json.loads(json.dumps(report.to_dict()))
    assert read == report.to_dict() and set(read) == {*MEASURES, "group_accuracy", "counts", "intervals", "confidence", "n_boot"}
    assert list(read["counts"]) == ["0_0", "0_1", "1_0", "1_1"] and len(read["intervals"]["1_1"]) == 2


def test_cells_whose_short_names_collide_are_spelled_out():
    report = quiet(fairness_report, ["a", "a_b", "a"], ["a", "a_b", "a_b"], sensitive_features=["b_c", "c", "c"], n_boot=20)
    assert len(report.to_dict()["counts"]) == 4 and report.intervals.index.is_unique and report.to_frame().index.is_unique


def test_import_is_light():
    code = "import sys, aimfair.metrics; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'fairlearn', 'fastcore')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
