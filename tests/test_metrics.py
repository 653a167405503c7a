"""aimfair.metrics against a brute-force oracle, against fairlearn and scipy, and against simulated test sets."""

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
from pace import slowness

from aimfair.metrics import (
    MEASURES,
    cell_counts,
    equalized_odds,
    fairness_change,
    fairness_report,
    group_accuracy,
    influences,
    interval_coverage,
)

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
        report = fairness_report([1, 1, 0, 1], [1, 1, 0, 1], sensitive_features=list("fmfm"))
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
        repr(fairness_report(y, yhat, sensitive_features=p))


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


# Intervals.


def bounds(report, name):
    return tuple(report.intervals.loc[name])


@pytest.mark.parametrize("n", [3, 60, 940])
def test_proportions_have_the_interval_of_scipy(n):
    from scipy.stats import binomtest
    right = np.arange(n) < round(0.9 * n)
    y, p = np.tile([0, 1], n), np.repeat([0, 1], n)
    cell = {(t, g): (y == t) & (p == g) for t in (0, 1) for g in (0, 1)}
    yhat = np.where(np.concatenate([right, right]), y, 1 - y)
    report = fairness_report(y, yhat, sensitive_features=p, confidence=0.9)
    for (t, g), rows in cell.items():
        expected = binomtest(int((yhat == y)[rows].sum()), int(rows.sum())).proportion_ci(0.9, method="wilson")
        assert np.allclose(bounds(report, f"{t}_{g}"), (expected.low, expected.high), atol=1e-9)
    expected = binomtest(int((yhat == y).sum()), 2 * n).proportion_ci(0.9, method="wilson")
    assert np.allclose(bounds(report, "accuracy"), (expected.low, expected.high), atol=1e-9)


def test_the_gap_has_newcombes_interval_where_its_sign_is_clear():
    from scipy.stats import binomtest
    one, other = (binomtest(k, 100).proportion_ci(0.95, method="wilson") for k in (95, 60))
    low, high = 0.35 - math.hypot(0.95 - one.low, other.high - 0.6), 0.35 + math.hypot(one.high - 0.95, 0.6 - other.low)
    y, p = np.repeat([0, 1], 200), np.tile(np.repeat([0, 1], 100), 2)
    right = np.concatenate([np.arange(100) < 95, np.arange(100) < 60] * 2)
    report = fairness_report(y, np.where(right, y, 1 - y), sensitive_features=p)
    half = 0.35 - (0.35 - low) / math.sqrt(2), 0.35 + (high - 0.35) / math.sqrt(2)  # the mean of two such gaps
    assert np.allclose(bounds(report, "equalized_odds"), half, atol=1e-9)


@pytest.mark.parametrize("accuracy", [[[0.83, 0.9], [0.8, 0.66]], [[0.9, 0.7, 0.8], [0.6, 0.95, 0.8], [0.5, 0.9, 0.9]]])
def test_intervals_hold_the_truth_as_often_as_they_say(accuracy):
    "By test sets drawn row by row, through the front door."
    accuracy = np.array(accuracy)
    gaps = np.ptp(accuracy, axis=1)
    truth = pd.Series({"accuracy": accuracy.mean(), "worst_group_accuracy": accuracy.min(), "equalized_odds": gaps.mean(),
                       "equalized_odds_max": gaps.max(), "group_accuracy_std": accuracy.std(),
                       "0_0": accuracy[0, 0], "1_1": accuracy[1, 1]})
    hits = pd.Series(0, index=truth.index)
    for seed in range(300):
        y, yhat, p = biased(1500, 1000 + seed, accuracy)
        found = fairness_report(y, yhat, sensitive_features=p, confidence=0.9).intervals.loc[hits.index]
        hits += (found["low"] <= truth) & (truth <= found["high"])
    assert (hits / 300).between(0.84, 0.99).all(), hits / 300


SIZES = [[[60, 60], [60, 60]], [[500, 700], [820, 940]], [[1000, 110], [110, 1000]], [[1000, 600], [300, 40]], [[40, 1000], [1000, 110]]]
TRUTHS = [[[0.8, 0.8], [0.8, 0.8]], [[0.95, 0.95], [0.95, 0.95]], [[0.99, 0.99], [0.99, 0.99]], [[0.83, 0.97], [0.95, 0.65]],
          [[0.95, 0.8], [0.95, 0.8]], [[0.84, 0.86], [0.9, 0.82]], [[0.8, 0.83], [0.83, 0.83]], [[0.99, 0.97], [0.995, 0.98]]]


def test_coverage_where_the_bootstrap_fails():
    found = interval_coverage([[0.8, 0.8], [0.8, 0.8]], SIZES[1], draws=1500)
    assert found.coverage.between(0.93, 0.985).all()
    assert found.loc["equalized_odds", "bias"] > 0.015 and found.loc["worst_group_accuracy", "bias"] < -0.01  # which is why
    assert found.loc["equalized_odds", "too_low"] == 0 and found.loc["worst_group_accuracy", "width"] < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("truth", TRUTHS)
def test_coverage_over_the_grid(sizes, truth):
    """Never two points less than 95 %, but for the noise of 10,000 draws. More than two points above it only where groups are
    nearly tied, or nearly always right; where one is clearly worst, the intervals are no wider than they need be."""
    found = interval_coverage(truth, sizes, draws=10_000)
    slack = 4 * math.sqrt(0.05 * 0.95 / 10_000)
    assert (found.coverage > 0.93 - slack).all(), found
    if truth == TRUTHS[3]:
        assert (found.coverage[list(MEASURES)] < 0.97 + slack).all(), found
    assert (found.coverage.iloc[[0, *range(5, 9)]] < 0.97 + slack).mean() > 0.7, found


def test_coverage_of_other_confidences_and_shapes():
    found = interval_coverage([[0.9, 0.7, 0.8], [0.6, 0.95, 0.8]], np.full((2, 3), 200), confidence=0.8, draws=1500)
    assert found.coverage.between(0.77, 0.93).all(), found


def test_intervals_are_fast():
    y, yhat, p = biased(20_000, 0)
    table = cell_counts(y, yhat, sensitive_features=p)
    from aimfair.metrics import _intervals
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        _intervals(table["correct"].to_numpy(), table["count"].to_numpy(), 2, 0.95)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02 * slowness(), seconds


def test_nothing_is_drawn():
    y, yhat, p = biased(300, 0)
    before = np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()
    first, again = (fairness_report(y, yhat, sensitive_features=p).intervals for _ in range(2))
    assert (np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()) == before
    assert first.equals(again)


@settings(max_examples=200, deadline=None)
@given(predictions())
def test_intervals_hold_the_figure_and_stay_in_range(data):
    report = quiet(fairness_report, data[0], data[1], sensitive_features=data[2])
    frame = report.to_frame()
    assert frame[["low", "high"]].isna().all(axis=1).equals(frame["value"].isna())
    known = frame.dropna()
    assert ((known.low <= known.value) & (known.value <= known.high) & (known.low >= 0) & (known.high <= 1)).all()


def test_interval_rows_and_confidence():
    y, yhat, p = biased(2000, 0)
    wide, narrow = (fairness_report(y, yhat, sensitive_features=p, confidence=c) for c in (0.99, 0.5))
    assert wide.intervals.index.tolist() == [*MEASURES, "0_0", "0_1", "1_0", "1_1"]
    assert wide.intervals.columns.tolist() == ["low", "high"]
    assert (wide.intervals["low"] < narrow.intervals["low"]).all() and (wide.intervals["high"] > narrow.intervals["high"]).all()
    assert fairness_report(y, yhat, sensitive_features=p, confidence=None).intervals is None


# Before and after.


def test_influences_add_up_to_the_variance_over_test_sets():
    y, yhat, p = biased(1500, 0)
    predicted = (influences(y, yhat, sensitive_features=p) ** 2).sum().pow(0.5)
    sets = (biased(1500, s) for s in range(300))
    drawn = pd.DataFrame([fairness_report(y, yhat, sensitive_features=p).to_frame()["value"] for y, yhat, p in sets])
    assert np.allclose(predicted, drawn.std(), rtol=0.2)


def test_influences_are_the_derivative():
    "One more right answer in a cell moves every measure by its influence, to first order."
    y, yhat, p = biased(3000, 1)
    rows = np.flatnonzero((y == 1) & (p == 1) & (yhat != y))[:20]
    mended = yhat.copy()
    mended[rows] = y[rows]
    steps = [influences(y, v, sensitive_features=p) for v in (yhat, mended)]
    values = [fairness_report(y, v, sensitive_features=p).to_frame()["value"] for v in (yhat, mended)]
    per_row = (steps[1].iloc[rows[0]] - steps[0].iloc[rows[0]])  # right less wrong
    assert np.allclose(20 * per_row, values[1] - values[0], rtol=0.05, atol=2e-4)


def test_change_is_the_difference_and_no_change_is_held():
    (y, yhat, p), other = biased(800, 0), np.random.default_rng(9)
    after = np.where(other.random(800) < 0.05, 1 - yhat, yhat)
    found = fairness_change(y, yhat, after, sensitive_features=p)
    one, two = (fairness_report(y, v, sensitive_features=p).to_frame() for v in (yhat, after))
    assert np.allclose(found.change, two.value - one.value) and found.n.equals(one.n.rename_axis("metric"))
    assert ((found.low <= found.change) & (found.change <= found.high)).all()
    same = fairness_change(y, yhat, yhat, sensitive_features=p)
    assert (same.change == 0).all() and ((same.low <= 0) & (same.high >= 0)).all()
    back = fairness_change(y, after, yhat, sensitive_features=p)
    exact = ["accuracy", "0_0", "0_1", "1_0", "1_1"]
    assert np.allclose(back.loc[exact, "low"], -found.loc[exact, "high"])


def test_change_is_paired():
    y, yhat, p = biased(2000, 3)
    after = yhat.copy()
    after[np.flatnonzero(after != y)[:40]] ^= 1  # forty errors mended, none made
    found = fairness_change(y, yhat, after, sensitive_features=p)
    assert found.low["accuracy"] > 0.012 and found.high["accuracy"] < 0.03


def test_changes_of_what_is_undefined_are_nan():
    found = quiet(fairness_change, [1, 1, 0, 1], [1, 1, 0, 1], [1, 0, 0, 1], sensitive_features=list("fmfm"))
    assert found.loc["worst_group_accuracy", ["before", "change", "low", "high"]].isna().all() and found.loc["accuracy", "change"] == -0.25
    with pytest.raises(ValueError, match="different classes"):
        fairness_change([1, 0], [1, 0], [1, 2], sensitive_features=[0, 1])
    with pytest.raises(ValueError, match="confidence"):
        fairness_change([1, 0], [1, 0], [1, 0], sensitive_features=[0, 1], confidence=95)


@pytest.mark.slow
@pytest.mark.parametrize("after", [[0.86, 0.9, 0.9, 0.84], [0.88] * 4, [0.85, 0.97, 0.95, 0.72], [0.83, 0.97, 0.95, 0.65]])
@pytest.mark.parametrize("sizes", [(110, 60, 60, 110), (700, 600, 500, 940)])
def test_changes_are_held_as_often_as_they_say(after, sizes):
    from scipy.special import ndtr
    before, cell, rng = [0.83, 0.97, 0.95, 0.65], np.repeat(np.arange(4), sizes), np.random.default_rng(0)

    def figures(p):
        p, gaps = np.array(p), [abs(p[0] - p[1]), abs(p[2] - p[3])]
        return np.array([(p * sizes).sum() / sum(sizes), p.min(), np.mean(gaps), max(gaps), p.std(), *p])

    truth, hits, y = figures(after) - figures(before), 0, cell // 2
    for _ in range(400):
        hard = rng.normal(size=len(cell)) * math.sqrt(0.7)  # an image that is hard for one is hard for the other
        right = [ndtr(hard + math.sqrt(0.3) * rng.normal(size=len(cell))) < np.array(p)[cell] for p in (before, after)]
        found = fairness_change(y, *(np.where(r, y, 1 - y) for r in right), sensitive_features=cell % 2)
        hits = hits + ((found.low - 1e-12 <= truth) & (truth <= found.high + 1e-12)).to_numpy()
    assert (hits / 400 > 0.93 - 3 * math.sqrt(0.05 * 0.95 / 400)).all(), hits / 400


# Display and hand-over.


def test_the_table_shows_percent_counts_and_the_worst_group():
    y, yhat, p = biased(20_000, 0)
    report = fairness_report(y, yhat, sensitive_features=np.where(p, "<m>", "f"), confidence=0.9)
    text, markup = repr(report), report._repr_html_()
    assert "20,000 predictions" in text and "90 % interval" in text and "worst group (1, '<m>')" in text
    assert f"{100 * report.equalized_odds:.2f}" in text and f"{report.counts.loc[(1, 'f')]:,}" in text
    assert "<m>" not in markup and "&lt;m&gt;" in markup and markup.count("<tr") == 1 + 5 + 4
    assert "interval" not in repr(fairness_report(y, yhat, sensitive_features=p, confidence=None))


def test_to_dict_is_plain_and_complete():
    y, yhat, p = biased(500, 0)
    report = fairness_report(y, yhat, sensitive_features=p)
    read = json.loads(json.dumps(report.to_dict()))
    assert read == report.to_dict() and set(read) == {*MEASURES, "group_accuracy", "counts", "intervals", "confidence"}
    assert list(read["counts"]) == ["0_0", "0_1", "1_0", "1_1"] and len(read["intervals"]["1_1"]) == 2


def test_cells_whose_short_names_collide_are_spelled_out():
    report = quiet(fairness_report, ["a", "a_b", "a"], ["a", "a_b", "a_b"], sensitive_features=["b_c", "c", "c"])
    assert len(report.to_dict()["counts"]) == 4 and report.intervals.index.is_unique and report.to_frame().index.is_unique


def test_import_is_light():
    code = "import sys, aimfair.metrics; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib', 'fairlearn', 'fastcore')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
