"aimfair.groups: sizes of biased and balanced sets, and which images they take, against brute force and pandas."

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from aimfair.core import DataError
from aimfair.data import Faces
from aimfair.groups import (
    PAPER_GROUPS,
    PAPER_MAJORITY,
    balanced_counts,
    biased_counts,
    biased_split,
    group_counts,
    group_indices,
    group_name,
    group_sizes,
    hold_out,
    largest_biased_counts,
    parse_group,
    parse_majority,
    take_groups,
)

BIASES = st.sampled_from([0, 1 / 9, 0.25, 1 / 3, 0.5, 2 / 3, 1])
PAIRS = st.tuples(st.integers(0, 1), st.integers(0, 1))
LABELS = st.tuples(st.integers(0, 2), st.integers(0, 2))  # three classes, three groups


def face_rows(cells):
    return pd.DataFrame(cells, columns=["target", "protected"]).assign(id=[f"{i:03d}" for i in range(len(cells))])


def as_faces(table):
    "The same samples as `Faces`, whose one pixel tells which they are."
    pixels = np.broadcast_to(np.arange(len(table), dtype=np.uint8)[:, None, None, None], (len(table), 3, 2, 2))
    return Faces.from_arrays(np.ascontiguousarray(pixels), table["target"], table["protected"], table["id"])


def worlds(draw, most=40):
    "Groups of up to three classes, each class with its frequent group, and how many images there are."
    n_targets, n_protected = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    groups = [(t, p) for t in range(n_targets) for p in range(n_protected)]
    majority = {t: draw(st.integers(0, n_protected - 1)) for t in range(n_targets)}
    return groups, majority, {g: draw(st.integers(0, most)) for g in groups}


# --- names ---------------------------------------------------------------------------------------------------------------------

@given(LABELS)
def test_a_group_has_one_name(group):
    assert parse_group(group_name(group)) == parse_group(f" {group_name(group)} ") == group


@given(st.lists(LABELS, min_size=1, max_size=30))
def test_groups_are_counted_as_pandas_counts(cells):
    table = face_rows(cells)
    expected = table.groupby(["target", "protected"])["id"].apply(list).to_dict()
    for samples in (table, table.set_index(np.zeros(len(table), int)), as_faces(table)):
        assert {g: [table["id"][i] for i in index] for g, index in group_indices(samples).items()} == expected
        assert list(group_indices(samples)) == sorted(expected) and group_sizes(samples) == {g: len(ids) for g, ids in expected.items()}
        counts = group_counts(samples)
        assert all(counts.loc[g] == len(ids) for g, ids in expected.items()) and counts.to_numpy().sum() == len(table)


def test_unknown_groups_are_told():
    table = face_rows([(0, 1)])
    for samples in (table.drop(columns="protected"), as_faces(table).without_groups()):
        with pytest.raises(ValueError, match="no protected attribute"):
            group_sizes(samples)


# --- sizes ---------------------------------------------------------------------------------------------------------------------

@given(n=st.integers(1, 3000).map(lambda k: 2 * k), bias=BIASES)
def test_the_papers_sizes_come_nearest_to_the_bias(n, bias):
    "Of all ways to divide a class in two, the one whose minority is nearest to bias times its majority."
    counts = biased_counts(n, bias)
    assert counts[0, 1] == counts[1, 0] and counts[0, 0] == counts[1, 1] and sum(counts.values()) == n
    exact = Fraction(bias).limit_denominator(100)

    def off(many): return abs((n // 2 - many) - exact * many)

    assert off(counts[0, 1]) <= min(off(many) for many in range(n // 2 + 1))


@given(st.data(), BIASES, st.integers(1, 60))
def test_classes_are_equal_and_biased(data, bias, per_class):
    groups, majority, _ = worlds(data.draw)
    counts = biased_counts(per_class * len(majority), bias, majority=majority, groups=groups)
    assert sorted(counts) == sorted(groups)
    for t, frequent in majority.items():
        rare = [n for g, n in counts.items() if g[0] == t and g[1] != frequent]
        assert len(set(rare)) == 1 and abs(rare[0] - bias * counts[t, frequent]) <= 1.5
        assert 0 <= per_class - counts[t, frequent] - sum(rare) < len(rare)


def brute_force(available, bias, majority, at_most=10**6):
    "Images of the largest set that fits and has some in every group, found by trying every size; 0 where there is none."
    largest, k = 0, len(majority)
    for n in range(k, min(k * len(available) * max(available.values()), at_most) + 1, k):
        counts = biased_counts(n, bias, majority=majority, groups=available)
        some = all(counts[t, p] for t, p in counts if bias or majority[t] == p)
        if some and all(counts[g] <= available[g] for g in counts):
            largest = max(largest, sum(counts.values()))
    return largest


@given(st.data(), BIASES)
def test_the_largest_biased_set_to_within_an_image_of_a_group(data, bias):
    groups, majority, available = worlds(data.draw)
    most = brute_force(available, bias, majority)
    least = brute_force({g: max(0, n - 1) for g, n in available.items()}, bias, majority)
    try:
        counts = largest_biased_counts(available, bias, majority=majority)
    except DataError:
        assert least == 0
        return
    assert least <= sum(counts.values()) <= most
    assert all(0 < n <= available[g] for g, n in counts.items())
    assert set(counts) == (set(groups) if bias else set(majority.items()))


@given(st.data(), BIASES, st.integers(1, 150))
def test_a_biased_set_no_larger_than_asked(data, bias, at_most):
    groups, majority, available = worlds(data.draw)
    plenty = dict.fromkeys(groups, 10 * at_most)
    counts = biased_counts(at_most // len(majority) * len(majority), bias, majority=majority, groups=groups)
    if all(counts[t, p] for t, p in groups if bias or majority[t] == p):
        assert largest_biased_counts(plenty, bias, majority=majority, at_most=at_most) == {g: n for g, n in counts.items() if n}
    else:
        with pytest.raises(DataError, match="too small"):
            largest_biased_counts(plenty, bias, majority=majority, at_most=at_most)
    with pytest.raises(DataError, match="too small"):
        largest_biased_counts(dict.fromkeys(groups, 0), bias, majority=majority, at_most=at_most)
    if brute_force({g: max(0, n - 1) for g, n in available.items()}, bias, majority):
        unlimited = largest_biased_counts(available, bias, majority=majority)
        assert largest_biased_counts(available, bias, majority=majority, at_most=10**6) == unlimited


def test_the_papers_twin_set():
    assert largest_biased_counts(dict.fromkeys(PAPER_GROUPS, 9000), at_most=20_000) == biased_counts(20_000)
    assert largest_biased_counts({(0, 0): 9, (0, 1): 9, (1, 0): 9, (1, 1): 2}, 1) == dict.fromkeys(PAPER_GROUPS, 2)


@given(st.lists(LABELS, min_size=1, max_size=40))
def test_a_balanced_set_has_the_smallest_groups_size(cells):
    table = face_rows(cells)
    smallest = int(table.groupby(["target", "protected"]).size().min())
    counts = balanced_counts(group_sizes(table))
    assert counts == dict.fromkeys(sorted(set(cells)), smallest)
    assert balanced_counts(group_sizes(table), 3) == dict.fromkeys(sorted(set(cells)), 3)
    assert group_sizes(take_groups(table, counts)) == counts


# --- which images --------------------------------------------------------------------------------------------------------------

@given(st.lists(LABELS, min_size=1, max_size=40), st.data())
def test_the_first_images_of_every_group_are_taken(cells, data):
    table = face_rows(cells)
    counts = {g: data.draw(st.integers(0, n)) for g, n in group_sizes(table).items()}
    wanted = [counts[g] for g in zip(table["target"], table["protected"], strict=True)]
    expected = table["id"][table.groupby(["target", "protected"]).cumcount() < wanted].tolist()
    assert take_groups(table, counts)["id"].tolist() == expected
    faces = take_groups(as_faces(table), counts)
    assert faces.ids.tolist() == expected and faces.gather(slice(None))[:, 0, 0, 0].tolist() == [int(i) for i in expected]
    group, n = next(iter(group_sizes(table).items()))
    for wrong in ({group: n + 1}, {(9, 9): 1}):
        with pytest.raises(DataError, match="are needed"):
            take_groups(table, wrong)


@given(st.lists(LABELS, min_size=1, max_size=40), st.integers(0, 12))
def test_the_last_images_of_every_group_are_put_aside(cells, n):
    table = face_rows(cells)
    expected = table.groupby(["target", "protected"]).tail(n)["id"].sort_values().tolist()
    for samples in (table, as_faces(table)):
        ids = [list(part["id"] if isinstance(part, pd.DataFrame) else part.ids) for part in hold_out(samples, n=n)]
        assert ids[1] == expected and sorted(ids[0] + ids[1]) == table["id"].tolist() and ids[0] == sorted(ids[0])


@given(st.lists(LABELS, min_size=1, max_size=60), st.sampled_from([0.05, 0.1, 0.25, 0.5]))
def test_a_share_of_every_group_is_put_aside(cells, share):
    table = face_rows(cells)
    kept, aside = hold_out(table, share=share)
    for group, n in group_sizes(table).items():
        there = group_sizes(aside)[group]
        assert there == 1 or n * share - 1 < there <= n * share
        assert (kept["target"].eq(group[0]) & kept["protected"].eq(group[1])).sum() == n - there


@given(st.lists(st.tuples(LABELS, st.integers(0, 5)), min_size=1, max_size=60), st.integers(0, 12))
def test_no_prompt_is_on_both_sides(images, n):
    table = face_rows([cell for cell, _ in images])
    prompts = [f"{cell} {i}" for cell, i in images]  # a prompt belongs to one group
    plain, prompted = hold_out(table, n=n), hold_out(table.assign(prompt=prompts), n=n)
    by_hand = hold_out(as_faces(table), n=n, prompts=prompts)
    assert by_hand[1].ids.tolist() == prompted[1]["id"].tolist() and by_hand[0].ids.tolist() == prompted[0]["id"].tolist()
    sizes = table.assign(prompt=prompts).groupby(["target", "protected", "prompt"]).size()
    if (sizes.groupby(level=[0, 1]).min() > n).any():  # some group has no prompt that would fit
        assert prompted[1]["id"].tolist() == plain[1]["id"].tolist()
        return
    assert not set(prompted[0]["prompt"]) & set(prompted[1]["prompt"])
    for group, there in group_sizes(prompted[1]).items():
        left = sizes[group].drop(prompted[1]["prompt"].unique(), errors="ignore")
        assert 0 < there <= n and (left > n - there).all(), "as many prompts as fit"


def test_prompts_that_are_unknown_change_nothing_and_too_few_are_an_error():
    table = face_rows([(0, 0), (0, 1), (1, 0), (1, 1)] * 6)
    prompts = [f"p{i // 4 // 2}" for i in range(24)]
    plain = hold_out(table, n=1)[1]["id"].tolist()
    for about in (dict(prompts=False), dict(prompts=None), dict(prompts=[None, *prompts[1:]])):
        assert hold_out(table.assign(prompt=prompts), n=1, **about)[1]["id"].tolist() == plain
    assert len(hold_out(table, n=2, prompts=prompts)[1]) == 8
    with pytest.raises(ValueError, match="23 prompts for 24 images"):
        hold_out(table, n=2, prompts=prompts[1:])


# --- the biased training set ---------------------------------------------------------------------------------------------------

def minority(n, bias):
    "Images of a minority cell, by trying every number; None where two are as near to the bias."
    exact = Fraction(bias).limit_denominator(100)
    off = [abs(few - exact * (n // 2 - few)) for few in range(n // 2 + 1)]
    return off.index(min(off)) if off.count(min(off)) == 1 else None


@given(cells=st.lists(PAIRS, min_size=8, max_size=200), n=st.integers(1, 60).map(lambda k: 2 * k), bias=BIASES)
def test_biased_split_is_the_papers_rule(cells, n, bias):
    table, few = face_rows(cells), minority(n, bias)
    assume(few is not None)
    left = {(0, 0): few, (1, 1): few, (0, 1): n // 2 - few, (1, 0): n // 2 - few}
    if any(cells.count(cell) < wanted for cell, wanted in left.items()) or (bias and not few):
        with pytest.raises(DataError):
            biased_split(table, n=n, bias=bias)
        return
    expected = []
    for i, cell in enumerate(cells):
        if left[cell]:
            left[cell] -= 1
            expected.append(f"{i:03d}")
    for samples in (table, table.set_index(np.zeros(len(table), int))):
        assert biased_split(samples, n=n, bias=bias)["id"].tolist() == expected


@given(cells=st.lists(PAIRS, min_size=8, max_size=120), bias=BIASES)
def test_the_n_that_an_error_names_is_the_largest(cells, bias):
    table = face_rows(cells)
    with pytest.raises(DataError, match="the largest n that fits is") as caught:
        biased_split(table, n=4 * len(cells), bias=bias)
    largest = int(str(caught.value).rsplit(" ", 1)[1])
    assert largest == 0 or len(biased_split(table, n=largest, bias=bias)) == largest
    for n in range(largest + 2, 4 * len(cells), 2):
        with pytest.raises(DataError):
            biased_split(table, n=n, bias=bias)


def real_table(cells, parts):
    table = face_rows(cells).assign(split=parts)
    table.attrs = {"file": "list_attr_celeba.txt", "target": "Smiling", "protected": "Male"}
    return table


def test_biased_split_errors():
    rng = np.random.default_rng(0)
    table = real_table(rng.integers(0, 2, (200, 2)).tolist(), ["train"] * 120 + ["val"] * 40 + ["test"] * 40)
    cell = int(((table.target == 0) & (table.protected == 0) & (table.split == "train")).sum())
    with pytest.raises(DataError) as caught:
        biased_split(table, n=2000)
    message = str(caught.value)
    assert "list_attr_celeba.txt" in message and f"cell Smiling=0, Male=0 has {cell} images in train" in message
    assert "100 are needed" in message and "\n" not in message
    for n in (0, -2, 7):
        with pytest.raises(DataError, match=f"n is {n}"):
            biased_split(table, n=n)
    with pytest.raises(DataError, match="minority image"):
        biased_split(table, n=8)
    for bias in (-0.1, 9, float("nan")):
        with pytest.raises(DataError, match="bias is"):
            biased_split(table, n=20, bias=bias)
    with pytest.raises(DataError, match="protected"):
        biased_split(table.drop(columns="protected"), n=20)
    rows = biased_split(table, n=20)
    assert (rows["split"] == "train").all() and rows.attrs == table.attrs


@given(st.integers(2, 4), st.integers(2, 7), st.sampled_from([0, 1 / 9, 1 / 2, 1]), st.integers(10, 60))
def test_biased_sets_of_any_number_of_classes_and_groups(n_classes, n_groups, bias, per_class):
    "Each class has its share; its frequent group is the one after its number, counted round, and the others share the rest evenly."
    cells = [(t, p) for t in range(n_classes) for p in range(n_groups)]
    table = pd.DataFrame([{"id": f"{t}{p}{i}.jpg", "target": t, "protected": p} for t, p in cells for i in range(80)])
    n = n_classes * per_class
    if bias and round(per_class / (1 + (n_groups - 1) * bias)) > per_class - (n_groups - 1):
        with pytest.raises(DataError, match="too few"):
            biased_split(table, n=n, bias=bias)
        return
    sizes = dict.fromkeys(cells, 0) | group_sizes(biased_split(table, n=n, bias=bias))
    for t in range(n_classes):
        of_class = {p: sizes[t, p] for p in range(n_groups)}
        frequent, rare = of_class.pop((t + 1) % n_groups), set(of_class.values())
        assert len(rare) == 1 and per_class - (n_groups - 1) < frequent + (n_groups - 1) * min(rare) <= per_class
        assert abs(min(rare) - bias * frequent) <= 1 + bias


def test_the_command_divides_by_race_too(tmp_path):
    races = "\n".join(f"{i:03d}.jpg,{i % 2},{['Black', 'East Asian', 'White', ''][i // 2 % 4]}" for i in range(120))
    (tmp_path / "labels.csv").write_text(f"file,gender,race\n{races}\n")
    command = [sys.executable, "-m", "aimfair.cli", "data", "split", "--dataset", "folder", "--root", tmp_path, "--csv", "labels.csv",
               "--image", "file", "--target", "gender", "--protected", "race", "--n", "24", "--bias", "1", "--out", tmp_path / "out.csv"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0 and "4 of (0, East Asian)" in result.stdout, result.stderr
    assert "96 of the 120 rows are left out, 30 of them as race is not known" in result.stdout
    rows = pd.read_csv(tmp_path / "out.csv")
    assert rows.groupby(["target", "protected"]).size().eq(4).all() and len(rows) == 24


# --- the frequent groups -------------------------------------------------------------------------------------------------------

@given(st.data())
def test_a_majority_is_said_in_three_ways(data):
    groups, majority, _ = worlds(data.draw)
    words = ", ".join(map(group_name, data.draw(st.permutations(list(majority.items())))))
    for said in (majority, list(majority.items()), words, words.split(",")):
        assert parse_majority(said, groups) == majority


@pytest.mark.parametrize("wrong", ["0_1", "0_1,0_0", "0_1,1_0,1_1", "0_1,2_0", "smiling", "", [(0,)], [0, 1], {0: 1}, 3])
def test_what_is_no_majority(wrong):
    with pytest.raises(ValueError, match="majority") as caught:
        parse_majority(wrong, PAPER_GROUPS)
    assert "\n" not in str(caught.value)
    assert parse_majority("0_1,1_0", PAPER_GROUPS) == PAPER_MAJORITY
