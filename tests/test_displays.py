"What objects show of themselves in a notebook: pictures with words, escaped text, the theme's colours, little to send and little to do."

import os
import re
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from IPython.core.formatters import DisplayFormatter
from IPython.core.pylabtools import print_figure
from jupyter_client.manager import start_new_kernel
from pace import slowness
from PIL import Image

from aimfair.core import html_bar, html_curve, html_strip, html_table, shown_figure
from aimfair.data import Faces
from aimfair.experiments import Reproduction
from aimfair.fix import Plan as FixPlan
from aimfair.fix import Step
from aimfair.groups import Names
from aimfair.metrics import fairness_report
from aimfair.models import create_model, narrow_resnet18
from aimfair.pipeline import AIMFair
from aimfair.prompts import PromptSet, load_prompts, report
from aimfair.report import PlainTable
from aimfair.repro import Diagnosis, load_profile, make_plan
from aimfair.sensitivity import Ranking
from aimfair.toyfaces import draw, sample_factors
from aimfair.training import Fitted, TrainConfig, network_stages, stages_html

EVIL = "<script>alert('&')</script>"
BOUND = 150_000  # characters of HTML
pytestmark = pytest.mark.filterwarnings("ignore:The model handed in gets", "ignore:no sample with", "ignore:only one", "ignore:set")


def faces(n, seed=1, **names):
    "Drawn faces of four groups."
    return Faces.from_arrays(draw(sample_factors(n, seed=seed), 32), np.arange(n) % 2, np.arange(n) // 2 % 2, names=Names(**names))


def noise(n, classes, groups, size):
    "What compresses worst."
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    return Faces.from_arrays(pixels, np.arange(n) % classes, np.arange(n) // classes % groups)


@pytest.fixture(scope="module")
def debiased():
    "A tiny network, debiased with a choice of k; the words of its groups are hostile."
    parts = [faces(240, seed, target=("no", EVIL), protected=("a", "b")) for seed in range(3)]
    aim = AIMFair(narrow_resnet18(4), k="auto", config=TrainConfig(epochs=1, batch_size=32, precision="float32"), gradient_batch_size=32,
                  device="cpu", progress=False)
    return aim.fit(real=parts[0], synthetic=parts[1], val=parts[2])


@pytest.fixture(scope="module")
def shown(debiased):
    "Who displays what: by name, an object and a word that has to be in its display."
    plan = make_plan("toy", ["layer_sensitivity", "tradeoff"], seeds=1, store="nowhere")[0]
    names = [n for n, _ in create_model("toy_resnet18").named_parameters()]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)) + 1
    prompts = load_prompts("toy-smiling-male")
    outcome = {"y_true": [0, 1, 0, 1], "y_pred": [0, 1, 1, 1], "sensitive_features": ["a", "a", EVIL, EVIL]}
    steps = [Step("images", EVIL, "to do", 65, 6 * 10**5), Step("report", "pages", "done", 1, 1)]
    rows = pd.DataFrame([{"what": "faces", "state": "missing", "found": EVIL, "needed": "x"}])
    history, layer = pd.DataFrame({"lr": [0.1] * 300, "loss": np.linspace(1, 0, 300), EVIL: 0.5}), torch.nn.Linear(1, 1)
    return {
        "faces": (faces(40, target=("no", EVIL), protected=("a", "b")), EVIL),
        "faces of classes": (faces(40, target=("no", "yes")).without_groups(), "groups unknown"),
        "faces of many groups": (noise(600, 6, 7, 200), "and 26 more"),
        "faces, few": (noise(3, 2, 2, 5), "3 images of 5 x 5 pixels"),
        "no faces": (noise(4, 2, 2, 8).select([]), "0 images"),
        "fitted": (Fitted(layer, history, 299, 0.5), EVIL),
        "not fitted": (Fitted(layer, pd.DataFrame(), 0, 0.5), "not trained"),
        "debiased": (debiased, "tensors updated"),
        "before and after": (debiased.report, EVIL),
        "choice of k": (debiased.report.choice, "real validation accuracy"),
        "prompts": (PromptSet(prompts.task, prompts.style, prompts.groups, {"model": EVIL}), EVIL),
        "report on prompts": (report(prompts), "correlation"),
        "plan": (plan, "layer_sensitivity"),
        "plan of fix": (FixPlan(steps, [EVIL], 10**6, 10**10), EVIL),
        "fairness": (fairness_report(**outcome), EVIL),
        "reproduction": (Reproduction(plan, failed={"tradeoff": EVIL}, shown=["layer_sensitivity"], report=Path("out/report.html")), EVIL),
        "ranking": (Ranking("tensor", dict.fromkeys(names, ()), order, order.flip(0)), "layer3"),
        "diagnosis": (Diagnosis(load_profile("toy"), rows), EVIL),
        "table": (PlainTable(pd.DataFrame({"word": [EVIL]})), EVIL),
    }


NAMES = ["faces", "faces of classes", "faces of many groups", "faces, few", "no faces", "fitted", "not fitted", "debiased",
         "before and after", "choice of k", "prompts", "report on prompts", "plan", "plan of fix", "fairness", "reproduction", "ranking",
         "diagnosis", "table"]


def test_the_list_is_whole(shown):
    assert sorted(NAMES) == sorted(shown)


@pytest.mark.parametrize("name", NAMES)
class TestDisplay:
    def test_text_is_escaped_and_pictures_have_words(self, shown, name):
        thing, word = shown[name]
        page = BeautifulSoup(thing._repr_html_(), "html.parser")
        assert not page.find_all(["script", "iframe", "link"]) and " ".join(word.split()) in " ".join(page.get_text(" ").split())
        assert all(image.get("alt", "").strip() and image["src"].startswith("data:image/") for image in page.find_all("img"))
        assert all(drawing.get("aria-label") and drawing.get("role") == "img" for drawing in page.find_all("svg"))
        assert not any(attribute.startswith("on") for tag in page.find_all(True) for attribute in tag.attrs)

    def test_it_is_small_and_quick(self, shown, name):
        thing, _ = shown[name]
        thing._repr_html_()  # libraries are loaded once
        start = time.perf_counter()
        page = thing._repr_html_()
        assert time.perf_counter() - start < slowness() and len(page) < BOUND  # a tenth of it on a machine that does nothing else
        assert len(repr(thing)) < 6000

    def test_colours_are_those_of_the_theme(self, shown, name):
        page = re.sub(r"data:image/[^\"]*", "", shown[name][0]._repr_html_())
        assert not re.search(r"(?:color|background|fill|stroke)\s*[:=]\s*[\"']?\s*(?:black|white|#0{3,6}\b|#f{3,6}\b)", page, re.I)


def test_groups_are_shown_in_their_words_with_their_counts():
    some = faces(30, target=("not smiling", "smiling"), protected=("female", "male"))
    page = BeautifulSoup(some._repr_html_(), "html.parser")
    rows = [[cell.get_text() for cell in row.find_all("td")][:2] for row in page.find_all("tr")[1:]]
    assert rows == [["not smiling, female", "8"], ["not smiling, male", "7"], ["smiling, female", "8"], ["smiling, male", "7"]]
    assert [image["alt"] for image in page.find_all("img")][1] == "7 of 7 images: not smiling, male"
    mixed = Faces.concat([some, faces(6, target=("not smiling", "smiling")).without_groups()])
    assert "smiling, group unknown" in mixed._repr_html_()


def test_a_display_reads_no_more_images_than_it_shows():
    class Counting(Faces):
        def gather(self, index):
            read.append(len(index))
            return super().gather(index)

    read, base = [], np.zeros((10, 3, 8, 8), np.uint8)
    many = Counting([base], np.zeros(500_000), np.arange(500_000) % 10, np.arange(500_000) % 2, np.arange(500_000) % 3)
    page = many._repr_html_()
    assert 0 < sum(read) <= 60 and "500,000 images" in page


def test_strips_show_the_pixels():
    import base64
    import io

    from PIL import Image

    red, green = (np.broadcast_to(np.uint8(colour)[:, None, None], (3, 20, 10)) for colour in ((250, 5, 5), (5, 250, 5)))
    strip = BeautifulSoup(html_strip(np.stack([red, green]), "two"), "html.parser").img
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(strip["src"].partition(",")[2]))).convert("RGB")).astype(int)
    assert picture.shape == (56, 56, 3) and strip["width"] == strip["height"] == "56"
    assert abs(picture[28, 10] - (250, 5, 5)).max() < 25 and abs(picture[28, 45] - (5, 250, 5)).max() < 25


def test_bars_and_curves_keep_within_their_boxes():
    page = BeautifulSoup(html_curve([3, float("nan"), 1, float("inf"), 2], "a curve", mark=2), "html.parser")
    x, y = np.array([[float(v) for v in point.split(",")] for point in page.polyline["points"].split()]).T
    assert len(x) == 3 and (np.diff(x) > 0).all() and y.argmax() == 1 and y.argmin() == 0 and y.min() >= 0 and y.max() <= 36
    assert float(page.circle["cy"]) == y[1]
    assert html_bar(3, "x").count(" 100%") == html_bar(-1, "x").count(" 0%") == 2
    assert html_table(["a"], [[1]]).count("<tr>") == 2


def test_stages_of_a_transformer_are_its_blocks():
    names = [f"vit.encoder.layer.{i}.{part}.{kind}" for i in range(12) for part in ("query", "key", "out") for kind in ("weight", "bias")]
    stages = network_stages(["vit.embeddings.position", *names, "classifier.weight", "classifier.bias"])
    assert [len(stages[f"vit.encoder.layer.{i}"]) for i in range(12)] == [6] * 12 and len(stages["classifier"]) == 2
    page = BeautifulSoup(stages_html(names, {names[0], names[7]}), "html.parser")
    assert [row.get_text() for row in page.find_all("tr")[1:4]] == [f"vit.encoder.layer.{i}{n} of 6" for i, n in ((0, 1), (1, 1), (2, 0))]


@contextmanager
def running(**variables):
    "A kernel of its own, with these environment variables."
    manager, client = start_new_kernel(env={**os.environ, **variables})
    try:
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def outputs(kernel, code):
    "What a cell shows: (kind, content)."
    seen = []
    reply = kernel.execute_interactive(code, timeout=120, output_hook=lambda m: seen.append((m["msg_type"], m["content"])))
    assert reply["content"]["status"] == "ok", reply["content"]
    return [(kind, content) for kind, content in seen if kind in ("stream", "display_data")]


BAR = "from aimfair.core import progress_bar\nfor _ in progress_bar(range(3), desc='epochs'): pass"


def test_bars_in_a_notebook_are_widgets():
    jobs = "from aimfair.repro.progress import WorkBar\nwith WorkBar({'a': 1, 'b': 2}, True) as bar:\n    bar('a'); bar('b')"
    with running() as kernel:
        for code in (BAR, jobs):
            (kind, content), = outputs(kernel, code)
            assert kind == "display_data" and "application/vnd.jupyter.widget-view+json" in content["data"]
        assert not outputs(kernel, BAR.replace("desc=", "disable=True, desc="))


def test_bars_in_a_notebook_are_text_where_widgets_are_not_installed():
    with running() as kernel:
        seen = outputs(kernel, f"import sys; sys.modules['ipywidgets'] = None\n{BAR}")
    text = "".join(content.get("text", "") for _, content in seen)
    assert {kind for kind, _ in seen} == {"stream"} and "3/3" in text and "IProgress" not in text


def test_a_variable_turns_bars_off_in_a_notebook():
    with running(TQDM_DISABLE="1") as kernel:
        assert not outputs(kernel, BAR)


@pytest.mark.parametrize("inches", [3, 8, 11.6, 40])
def test_a_figure_is_shown_no_wider_than_a_column_and_saved_as_wide_as_it_is(inches):
    figure = shown_figure(figsize=(inches, 2))
    figure.subplots().plot([0, 1])
    plain, inline, file = DisplayFormatter().format(figure)[0]["image/png"], print_figure(figure), BytesIO()
    figure.savefig(file, dpi=100)
    by_itself, by_matplotlib, saved = (Image.open(BytesIO(png) if isinstance(png, bytes) else png).width for png in (plain, inline, file))
    assert saved == 100 * inches and min(60 * inches, 850) <= by_itself <= 900 and min(60 * inches, 850) <= by_matplotlib <= 900
