"JupyterLab as `make lab` starts it, with a browser as its reader: a chapter runs as a whole, bars are widgets, help tells of arguments."

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import nbformat.v4 as nbf
import pytest

pytest.importorskip("jupyterlab")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 180  # seconds: a busy machine is no failure

OWN = [
    "import numpy as np\nfrom aimfair.core import shown_figure\nfrom aimfair.data import Faces\n"
    "from aimfair.metrics import group_accuracy\nfrom aimfair.models import create_model\nfrom aimfair.training import TrainConfig, fit",
    "rng = np.random.default_rng(0)\nlabels = rng.integers(0, 2, (2, 64))\n"
    "faces = Faces.from_arrays(rng.integers(0, 256, (64, 3, 32, 32), dtype=np.uint8), labels[0], protected=labels[1])\n"
    "fit(create_model('toy_resnet18'), faces, faces, config=TrainConfig(epochs=2), device='cpu')",
    "wide = shown_figure(figsize=(20, 2))\nwide.subplots().plot([1, 2])\nwide",
]


def until(found, what):
    "What is found, as soon as it is."
    end = time.monotonic() + PATIENCE
    while not (answer := found()):
        assert time.monotonic() < end, f"still no {what}"
        time.sleep(0.2)
    return answer


def whole(path):
    "What a JSON file says; nothing while the lab writes it."
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return {}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A copy of what `make lab` shows, with a notebook of somebody's own in it."
    folder = tmp_path_factory.mktemp("lab") / "aimfair"
    for name in ("nbs", "figures"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("Makefile", "settings.ini"):
        shutil.copy(ROOT / name, folder)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    own = nbf.new_notebook(cells=[*map(nbf.new_code_cell, OWN), nbf.new_code_cell("")], metadata={"kernelspec": kernel})
    (folder / "nbs" / "own.ipynb").write_text(json.dumps(own), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def lab(home, tmp_path_factory):
    "Where the lab is, as its own note says: address, port, token."
    own = tmp_path_factory.mktemp("jupyter")  # nobody's settings, workspaces or history
    folders = ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **{name: str(own / name) for name in folders}}
    # the installation is there: it is the one that runs the tests
    command = ["make", "--silent", "--old-file=.venv/.installed", "lab", f"BIN={Path(sys.executable).parent}",
               "ARGS=--no-browser --allow-root --expose-app-in-browser"]
    with (own / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=said, stderr=said, start_new_session=True)
    try:
        def note():
            assert process.poll() is None, (own / "said").read_text()
            return next(map(whole, (own / "JUPYTER_RUNTIME_DIR").glob("jpserver-*.json")), None)

        found = until(note, "lab")
        until(lambda: answers(f"{found['url']}api/status?token={found['token']}"), "answer")
        yield found
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def answers(address):
    try:
        with urlopen(address, timeout=PATIENCE) as reply:
            return reply.status == 200
    except OSError:
        return False


@pytest.fixture
def visit(browser, lab):
    "Opens an address of the lab; what the console said, and what was asked of others, is checked at the end."
    context = browser.new_context(viewport={"width": 1300, "height": 1000})
    page, said, asked = context.new_page(), [], []
    page.set_default_timeout(1000 * PATIENCE)
    page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: said.append(str(e)) if "ResizeObserver" not in str(e) else None)  # a frame late, says Chromium
    own = (lab["url"], "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(own) else asked.append(r.url))

    def go(path):
        page.goto(f"{lab['url']}{path}{'&' if '?' in path else '?'}token={lab['token']}")
        return page

    yield go
    context.close()
    assert not said, said[:5]
    assert not asked, asked[:5]


READY = """() => {
  const front = window.jupyterapp?.shell.currentWidget;
  return front?.context?.isReady && front.sessionContext?.isReady && front.sessionContext.session?.kernel?.status === 'idle';
}"""


def idle(page):
    "Waits until the notebook in front is there, and its kernel has nothing to do; what is asked of it before is lost."
    page.wait_for_function(READY)


def opened(page, name):
    "The notebook that is in front, once its kernel is ready."
    page.locator(".lm-DockPanel .lm-mod-current .lm-TabBar-tabLabel", has_text=re.compile(f"^{re.escape(name)}$")).wait_for()
    idle(page)
    return page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")


def code(path):
    "The code cells of a notebook that are not empty."
    return [cell for cell in whole(path).get("cells", ()) if cell["cell_type"] == "code" and cell["source"]]


def run_all(page, path):
    "Run All Cells of the menu, and once each cell has its number, Ctrl+S: the notebook in the page, and its code cells in the file."
    panel, number = opened(page, path.name), len(code(path))
    page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    prompts = panel.locator(".jp-CodeCell .jp-InputPrompt")
    failed = panel.locator("[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type='application/vnd.jupyter.error']")

    def ran():
        said = [text for text in prompts.all_text_contents() if re.fullmatch(r"\[\d+\]:", text)]
        wrong = [text for text in failed.all_inner_texts() if "Traceback" in text]
        assert not wrong, f"after {len(said)} of {number} cells: {wrong[0]}"
        return len(said) == number and said

    assert until(ran, "end of Run All") == [f"[{i}]:" for i in range(1, number + 1)]
    idle(page)
    return panel, saved(page, path)


def saved(page, path):
    "The code cells of the notebook in front once Ctrl+S has written it."
    before = path.stat().st_mtime_ns
    page.keyboard.press("Control+s")
    until(lambda: path.stat().st_mtime_ns > before and whole(path), "saved notebook")
    return code(path)


def sound(cells):
    "No cell failed, and no output says that widgets are missing: all outputs."
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or "IProgress not found" in json.dumps(o)]
    return outputs


def pictures_fit(panel):
    "How many pictures a notebook shows; each lies inside its output, and was not made wider than a column."
    panel.locator(".jp-OutputArea-output img").first.wait_for()
    boxes = panel.locator(".jp-OutputArea-output img").evaluate_all("""images => images.map(image => {
      const box = image.getBoundingClientRect(), around = image.closest('.jp-OutputArea-output');
      return [image.naturalWidth, box.width, box.right, around.getBoundingClientRect().right, around.scrollWidth - around.clientWidth];
    })""")
    for natural, width, right, edge, hidden in boxes:
        assert 0 < natural <= 900 and width > 20 and right <= edge + 1 and hidden <= 1, boxes
    return len(boxes)


def test_opens_on_the_index_for_who_knows_the_token(lab, visit):
    assert urlsplit(lab["url"]).hostname in ("localhost", "127.0.0.1") and len(lab["token"]) >= 24
    with urlopen(lab["url"] + "lab", timeout=PATIENCE) as stranger:
        assert "/login" in stranger.url
    page = visit("")
    opened(page, "index.ipynb").locator("h1", has_text="aimfair").wait_for()
    assert urlsplit(page.url).path == "/lab/tree/nbs/index.ipynb"


def test_a_chapter_that_is_saved_unchanged_is_unchanged(home, visit):
    page, path = visit("lab/tree/nbs/02_groups.ipynb?reset"), home / "nbs" / "02_groups.ipynb"
    opened(page, path.name)
    saved(page, path)
    assert path.read_bytes() == (ROOT / "nbs" / path.name).read_bytes()


def test_a_chapter_runs_as_a_whole(home, visit):
    page = visit("lab/tree/nbs/index.ipynb?reset")
    index = opened(page, "index.ipynb")
    index.locator(".jp-MarkdownOutput a[href*='03_metrics.ipynb']").last.click()
    panel, cells = run_all(page, home / "nbs" / "03_metrics.ipynb")
    drawn = sum("image/png" in o.get("data", {}) for o in sound(cells))
    assert pictures_fit(panel) == drawn > 0
    assert {cell["execution_count"] for cell in cells} == {None}  # as it is kept


def test_bars_are_widgets_and_help_tells_of_arguments(home, visit):
    page = visit("lab/tree/nbs/own.ipynb?reset")
    panel, cells = run_all(page, home / "nbs" / "own.ipynb")
    bar = panel.locator(".widget-hbox", has_text=re.compile(r"epochs:\s100%\s*2/2"))
    bar.wait_for()
    assert bar.locator(".progress-bar").bounding_box()["width"] > 50
    shown = [kind for output in sound(cells) for kind in output.get("data", {})]
    assert "application/vnd.jupyter.widget-view+json" in shown
    assert pictures_fit(panel)

    last = panel.locator(".jp-CodeCell .cm-content").last
    last.click()
    page.keyboard.type("group_accuracy(")
    page.keyboard.press("Shift+Tab")
    told = page.locator(".jp-Tooltip")
    told.wait_for()
    for words in ("Accuracy within every cell", "target labels, shape", "predicted labels, shape", "group of each sample, shape"):
        assert words in told.inner_text()
    last.click()
    page.keyboard.type("y_")
    names = page.locator(".jp-Completer-item .jp-Completer-match")

    def offered():  # the first time the kernel reads the sources, which takes longer than the lab waits
        page.keyboard.press("Tab")
        for _ in range(50):
            if names.count():
                break
            page.wait_for_timeout(100)
        return names.all_inner_texts()

    assert until(offered, "list") == ["y_pred=", "y_true="]
