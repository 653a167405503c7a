"What is explored is what was measured; widgets follow; a page serves them to who knows the token."

import json
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pace import slowness
from test_debias import files, options  # noqa: F401 (a fixture, and how it is used)

from aimfair.cli import main
from aimfair.debias import debias
from aimfair.experiments import CALLS, Reproduction, run, write_calls
from aimfair.explore import OUTCOMES, Explorable, Pair, explore, matching, open_result, outcomes, serving
from aimfair.explore.explorer import PAGE
from aimfair.groups import Names
from aimfair.metrics import fairness_report
from aimfair.report import THRESHOLDS, log_odds, threshold_curves
from aimfair.synthesis import synthesize

pytestmark = pytest.mark.filterwarnings("ignore:The model handed in gets", "ignore:no sample with", "ignore:only one")


def predictions(n, methods=("ERM", "AIM-Fair"), seeds=(1,), classes=2, groups=2, rng=0):
    "Simulated predictions of some models."
    rng = np.random.default_rng(rng)
    target, protected = rng.integers(classes, size=n), rng.integers(groups, size=n)
    parts = []
    for i, method in enumerate(methods):
        for seed in seeds:
            logits = rng.normal(0, 1, (n, classes)) + 1.5 * np.eye(classes)[target] + (0.8 / (i + 1)) * (protected[:, None] == 0)
            columns = {"logit": logits[:, 1] - logits[:, 0]} if classes == 2 else {f"logit_{c}": logits[:, c] for c in range(classes)}
            parts.append(pd.DataFrame({"method": method, "seed": seed, "id": np.arange(n).astype(str), "target": target,
                                       "protected": protected, **columns, "prediction": logits.argmax(1)}))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def debiased(files):  # noqa: F811
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        debias(**options(files, out="seen"))
    return files / "seen"


class TestCurves:
    @given(st.integers(0, 10**6), st.floats(0.01, 0.99), st.sampled_from([2, 3]), st.sampled_from([2, 3]))
    def test_a_threshold_is_a_cut_of_the_probability(self, seed, at, classes, groups):
        "By hand: cut the softmax, and count."
        frame = predictions(60, ("one",), classes=classes, groups=groups, rng=seed)
        z = np.stack([np.zeros(60), frame.logit], 1) if classes == 2 else frame.filter(regex="logit_").to_numpy()
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        for c in range(classes):
            said, true = p[:, c] > at, frame.target == c
            row = threshold_curves(frame, positive=c, thresholds=[at]).loc[at]
            assert np.isclose(row.accuracy, (said == true).mean())
            for t in (0, 1):
                for g in range(groups):
                    cell = (true == t) & (frame.protected == g)
                    assert np.isclose(row[f"{t}_{g}"], (said == true)[cell].mean(), equal_nan=True)

    def test_one_half_is_what_the_model_answers(self):
        frame = predictions(500, ("one",)).assign(logit=lambda f: f.logit.where(f.index % 7 > 0, 0.0))  # some exactly between
        frame["prediction"] = (frame.logit > 0) * 1
        row, report = threshold_curves(frame).loc[0.5], fairness_report(frame.target, frame.prediction, sensitive_features=frame.protected)
        assert row.accuracy == report.accuracy and np.isclose(row.equalized_odds, report.equalized_odds)

    def test_ends_of_the_axis_say_no_and_yes_to_all(self):
        curves = threshold_curves(predictions(100, ("one",)))
        assert len(curves) == len(THRESHOLDS) and curves.loc[1, ["0_0", "0_1"]].eq(1).all() and curves.loc[0, ["1_0", "1_1"]].eq(1).all()

    def test_log_odds_keep_what_probabilities_lose(self):
        far = pd.DataFrame({"logit_0": [0.0, 0.0], "logit_1": [60.0, 61.0]})
        assert np.allclose(log_odds(far), [60, 61]) and np.allclose(log_odds(far, 0), [-60, -61])


class TestOutcomes:
    @given(st.integers(0, 10**6), st.sampled_from([2, 3]))
    def test_every_image_has_one_outcome(self, seed, classes):
        frame = predictions(80, classes=classes, rng=seed)
        pair = Pair.of(frame, "ERM", "AIM-Fair", 1)
        found = outcomes(pair).set_index("id").loc[pair.before.id]
        was, now = (p.prediction.to_numpy() == p.target.to_numpy() for p in (pair.before, pair.after))
        by_hand = np.array([["wrong in both", "mended"], ["broken", "right in both"]])[was * 1, now * 1]
        assert (found.outcome.to_numpy() == by_hand).all()
        parts = [matching(found, outcome=o) for o in OUTCOMES]
        assert sum(map(len, parts)) == 80

    def test_unknown_groups_are_kept_apart(self):
        frame = predictions(40).assign(protected=lambda f: f.protected.where(f.id.astype(int) > 9, -1))
        found = outcomes(Pair.of(frame, "ERM", "AIM-Fair", 1))
        assert found.group.str.endswith("_?").sum() == 10 and set(found[found.protected < 0].group) <= {"0_?", "1_?"}


class TestDebiased:
    def test_what_is_shown_is_what_the_report_says(self, debiased):
        source, report = open_result(debiased), json.loads((debiased / "report.json").read_text())
        assert list(source.sets) == ["test", "validation", "synthetic"]
        for name in source.sets:
            figures = Pair.of(source.predictions(name), "before", "after", 0).figures
            for figure, row in report["figures"][name].items():
                for when in ("before", "after"):
                    assert figures.loc[figure, when] == pytest.approx(row[when], nan_ok=True) or row[when] is None

    def test_every_picture_is_the_photo_that_was_measured(self, debiased, files):  # noqa: F811
        source = open_result(debiased)
        for name, folder in (("test", "test"), ("synthetic", "synthetic")):
            rows = source.predictions(name).head(5)
            for row, picture in zip(rows.itertuples(), source.pictures(name, rows), strict=True):
                assert (debiased / row.file).resolve() == (files / folder / row.id).resolve() and picture.shape == (96, 96, 3)

    def test_result_and_photos_move_together_and_lost_photos_are_no_error(self, debiased, files, tmp_path):  # noqa: F811
        for name in ("seen", "test", "val", "synthetic"):
            shutil.copytree(files / name, tmp_path / "elsewhere" / name)
        source = open_result(tmp_path / "elsewhere" / "seen")
        assert all(p is not None for p in source.pictures("test", source.predictions("test")))
        shutil.rmtree(tmp_path / "elsewhere" / "test")
        gone = open_result(tmp_path / "elsewhere" / "seen")
        assert all(p is None for p in gone.pictures("test", gone.predictions("test")))
        assert "no picture" in explorer_at(gone, "Errors").faces.value or not len(explorer_at(gone, "Errors").rows())

    def test_the_same_in_memory(self, debiased):
        "A frame of predictions is enough."
        source = open_result(debiased)
        own = source.predictions("test").drop(columns="file")
        assert len(explore(own).state.scores) == 2 and explore(own).state.source.pictures("predictions", own) == [None] * len(own)


def explorer_at(source, title):
    "The tab of that name, drawn."
    shown = explore(source)
    shown.pages.selected_index = [tab.title for tab in shown.tabs].index(title)
    return shown.tabs[shown.pages.selected_index]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A tiny reproduction, its settings, and the folder that holds its store."
    from test_experiments import TINY
    home = tmp_path_factory.mktemp("reproduced")
    return run("toy", ["ERM", "AIM-Fair"], seeds=2, settings=TINY, store=home / "runs", workers=1, progress=False), TINY, home


class TestReproduction:
    def test_results_in_memory_show_themselves(self, done):
        results, _, _ = done
        source = open_result(results)
        (name,) = source.sets
        frame = source.predictions(name)
        assert set(frame.method) == {"ERM", "AIM-Fair"} and set(frame.seed) == {100, 200}
        rows = frame.head(3)
        faces = results.sets().test
        for picture, i in zip(source.pictures(name, rows), rows.id, strict=True):
            assert (picture == faces.gather(int(np.flatnonzero(faces.ids == i)[0]))[0].permute(1, 2, 0).numpy()).all()
        assert source.sensitivity().selected.sum() > 0

    def test_a_folder_knows_where_its_predictions_are(self, done, tmp_path):
        results, settings, home = done
        out = home / "out"
        out.mkdir(exist_ok=True)
        results.plan.cases["layer_sensitivity"] = results.plan.cases.pop("")  # a name that a plan can be made of
        write_calls(Reproduction(results.plan), out, profile="toy", settings=settings, seeds=2)
        call = json.loads((out / CALLS).read_text())["layer_sensitivity"]
        assert call == {"profile": "toy", "settings": settings, "seeds": 2, "store": "../runs"}
        results.plan.cases[""] = results.plan.cases.pop("layer_sensitivity")
        shutil.copytree(out, tmp_path / "alone")
        with pytest.raises(FileNotFoundError, match="predictions behind alone"):
            open_result(tmp_path / "alone")


class TestExplorer:
    def test_twenty_thousand_predictions_answer_in_a_tenth_of_a_second(self):
        "The median of each interaction: busy machines have their moments."
        source = Explorable("many", {"test": lambda: predictions(20_000)}, Names(("no", "yes"), ("a", "b")))
        shown = explore(source)
        for i in range(4):
            shown.pages.selected_index = i
        thresholds, errors = shown.tabs[2], shown.tabs[3]

        def median(act):
            times = []
            for i in range(9):
                start = time.perf_counter()
                act(i)
                times.append(time.perf_counter() - start)
            return sorted(times)[4]

        def slide(i):
            thresholds.slider.value = 0.3 + 0.05 * i

        def choose(i):
            errors.outcome.value = OUTCOMES[i % 3]

        assert max(median(slide), median(choose), median(lambda i: errors.turn(1))) < 0.1 * slowness()

    def test_the_threshold_moves_figures_and_errors(self):
        source = Explorable("", {"test": lambda: predictions(400)}, Names(("no", "yes"), ("a", "b")))
        shown = explore(source)
        shown.pages.selected_index = 2
        tab = shown.tabs[2]
        tab.slider.value = 0.8
        row = threshold_curves(source.predictions("test").query("method == 'AIM-Fair'")).loc[0.8]
        assert f">{100 * row.worst_group_accuracy:.1f}<" in tab.numbers.value
        bars = tab.figures[1].data[1].x
        assert np.allclose(bars, 100 * row[["0_0", "0_1", "1_0", "1_1"]].astype(float))
        shown.pages.selected_index = 3
        expected = outcomes(shown.state.pair, 0.8).outcome.value_counts()
        assert dict((v, k) for k, v in shown.tabs[3].outcome.options)["mended"] == f"mended ({expected.get('mended', 0):,})"

    @pytest.mark.parametrize("classes, groups", [(2, 7), (3, 2), (4, 3)])
    def test_any_number_of_classes_and_groups(self, classes, groups, tmp_path):
        shown = explore(predictions(300, classes=classes, groups=groups), out=tmp_path)
        for i, tab in enumerate(shown.tabs):
            shown.pages.selected_index = i
            tab.button.click()
            assert "alert" not in tab.told.value, tab.told.value
        assert {f.name for f in tmp_path.iterdir()} >= {"runs.csv", "groups.pdf", "thresholds.png", "errors.csv"}
        if classes > 2:
            shown.tabs[2].kind.value = 2
            assert shown.state.positive == 2 and "any other" in str(shown.tabs[2].figures[1].data[0].y)

    def test_what_is_saved_is_what_is_shown(self, tmp_path):
        shown = explore(predictions(300), out=tmp_path)
        shown.pages.selected_index = 3
        tab = shown.tabs[3]
        tab.outcome.value, tab.group.value, tab.confidence.value = "broken", "1_0", (0.6, 0.9)
        tab.button.click()
        saved = pd.read_csv(tmp_path / "errors.csv")
        assert len(saved) and set(saved.outcome) == {"broken"} and set(saved.group) == {"1_0"} and saved.confidence.between(0.6, 0.9).all()
        assert tab.faces.value.count("<figure") == min(PAGE, len(saved))

    def test_models_that_saw_other_images_are_told_apart_from_a_fault(self):
        frame = predictions(50)
        shown = explore(frame.drop(index=frame.index[-1]))
        shown.pages.selected_index = 1
        assert "did not see the same images" in shown.tabs[1].told.value

    def test_unknown_groups_have_no_thresholds(self):
        shown = explore(Explorable("", {"val": lambda: predictions(50).assign(protected=-1)}))
        shown.pages.selected_index = 2
        assert "No group" in shown.tabs[2].body.children[0].value

    def test_prompts_and_reasons_of_images(self, tmp_path):
        prompts = {"0_0": ["a <b>smiling</b> woman"], "1_1": ["a man"]}
        synthesize(prompts, generator="bundled", per_group=3, out=tmp_path / "set", progress=False)
        tab = explorer_at(open_result(tmp_path / "set"), "Synthetic images")
        tab.prompt.value = "MAN smiling"
        assert set(tab.rows().group) == {"0_0"} and "<b>" not in tab.faces.value and tab.faces.value.count("<img") == 3
        tab.status.value = "turned down"
        assert tab.count.value == "none"


LOST = '{"tradeoff": {"profile": "toy", "settings": {}, "seeds": 1, "store": "runs"}}'


@pytest.mark.parametrize("make, message", [
    (lambda p: p / "gone", "no such folder"), (lambda p: p, "nothing to explore"),
    (lambda p: (p / "report.json").write_text('{"setup": {"seed": 0}}') and p, "debias again"),
    (lambda p: (p / "report.json").write_text("{") and p, "is it whole?"),
    (lambda p: (p / CALLS).write_text(LOST) and p, "runs: no such folder"),
])
def test_mistakes_of_the_command_are_told_in_a_line(make, message, tmp_path, capsys):
    assert main(["explore", str(make(tmp_path)), "--no-browser"]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.slow
def test_the_page_is_for_who_knows_the_token_and_ends_with_its_terminal(debiased, tmp_path):
    command = [sys.executable, "-m", "aimfair.cli", "explore", str(debiased), "--no-browser", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:") and len(url.partition("token=")[2]) >= 24
        assert "login" in urlopen(url.partition("?")[0], timeout=60).url
    finally:
        process.send_signal(2)
    assert process.wait(30) == 130
    with pytest.raises(OSError):
        urlopen(url, timeout=5)


@pytest.mark.slow
def test_in_a_browser_slider_filters_and_saving_work(debiased, browser, tmp_path):
    said, asked = [], []
    with serving(debiased, out=tmp_path / "out") as (url, _):
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(240_000)  # a busy machine is no failure
        page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: said.append(str(e)))
        ours = (url.split("?")[0], "data:", "blob:", "ws://127.0.0.1")
        page.on("request", lambda r: None if r.url.startswith(ours) else asked.append(r.url))
        page.goto(url)
        page.wait_for_selector(".js-plotly-plot .scatterlayer")

        def open_tab(title):
            page.locator(".lm-TabBar-tab, .p-TabBar-tab").get_by_text(title, exact=True).click()

        open_tab("Threshold")
        cells = page.locator(".aimfair-at td")
        cells.first.wait_for()
        before = cells.all_inner_texts()
        page.locator(".noUi-handle").first.focus()
        for _ in range(30):
            page.keyboard.press("ArrowRight")
        page.wait_for_function("before => [...document.querySelectorAll('.aimfair-at td')].map(c => c.innerText).join() != before",
                               arg=",".join(before))
        open_tab("Errors")
        page.locator(".aimfair-wall").wait_for(state="attached")
        page.get_by_role("button", name="wrong in both").click()
        page.wait_for_function("() => document.querySelectorAll('.aimfair-wall figure').length > 0")
        page.locator("button:visible", has_text="Save").click()
        page.get_by_text("errors.csv").wait_for()
        page.set_viewport_size({"width": 400, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.close()
    assert not said and not asked
    assert {f.name for f in Path(tmp_path / "out").iterdir()} == {"errors.csv", "errors.png"}
