"The documentation site: built once, then read as a visitor and a browser would."

import base64
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("myst_nb")
bs4 = pytest.importorskip("bs4")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "nbs/site"))
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PHONE_PAGES = [
    "index.html", "start.html", "chapters.html", "reference.html", "limits.html", "CHANGELOG.html",
    "how_to/cluster.html", "nbs/03_metrics.html", "nbs/18_experiments.html", "nbs/experiments/tradeoff.html",
    "nbs/tutorials/your_own_words.html", "reference/groups.html", "reference/baselines/methods.html",
    "reference/data/index.html", "nbs/13_baselines/02_methods.html", "nbs/05_toyfaces/01_factors.html",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "What the build said, and the folder of the pages."
    out = tmp_path_factory.mktemp("docs")
    command = [sys.executable, str(ROOT / "nbs/site/build.py"), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done, out / "html"


@pytest.fixture(scope="module")
def pages(built):
    "{path below the site: parsed page}"
    html = built[1]
    return {p.relative_to(html).as_posix(): bs4.BeautifulSoup(p.read_text(encoding="utf-8"), "html.parser")
            for p in sorted(html.rglob("*.html"))
            if "_static" not in p.parts}


def test_builds_without_a_warning(built):
    done, html = built
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr and "ERROR" not in done.stderr
    assert (html / "index.html").is_file()


def test_links_images_and_anchors_lead_somewhere(built, pages):
    html, broken = built[1], []
    ids = {path: {t.get("id") for t in page.find_all(id=True)} | {t.get("name") for t in page.find_all("a", attrs={"name": True})}
           for path, page in pages.items()}
    checked = 0
    for path, page in pages.items():
        for tag in page.find_all(["a", "img", "link", "script"]):
            address = tag.get("href") or tag.get("src")
            if not address or urlsplit(address).scheme:
                continue
            parts = urlsplit(address)
            file = (html / path).parent.joinpath(unquote(parts.path)).resolve() if parts.path else html / path
            checked += 1
            if not file.is_file():
                broken.append((path, address))
                continue
            name = file.relative_to(html.resolve()).as_posix() if parts.path else path
            if parts.fragment and name in ids and unquote(parts.fragment) not in ids[name]:
                broken.append((path, address))
    assert checked > 10_000
    assert not broken, broken[:10]


def test_nothing_is_fetched_from_elsewhere(pages):
    for path, page in pages.items():
        loaded = [t.get("src") or t.get("href") for t in page.find_all(["img", "script", "link", "iframe"])]
        away = [a for a in loaded if a and urlsplit(a).scheme in ("http", "https")]
        assert not away, (path, away)


def modules():
    "Modules that notebooks write."
    for file in NOTEBOOKS:
        found = re.search(r'"#\| *default_exp +([\w.]+)', file.read_text(encoding="utf-8"))
        if found:
            yield f"aimfair.{found[1]}".removesuffix(".__init__")


def test_every_public_name_has_an_anchor(pages):
    anchors = {t["id"] for path, page in pages.items() if path.startswith("reference/") for t in page.find_all(id=True)}
    missing = [f"{m}.{n}" for m in modules() for n in getattr(importlib.import_module(m), "__all__", []) if f"{m}.{n}" not in anchors]
    assert not missing, missing[:20]


def field_names(page, anchor):
    "Arguments that the reference describes, with what it says of them."
    body = page.find(id=anchor).parent
    items = body.select("dl.field-list > dd li") or body.select("dl.field-list > dd p")
    return {i.find("strong").get_text(): i.get_text(" ", strip=True) for i in items if i.find("strong")}


@pytest.mark.parametrize(("page", "anchor", "argument", "says"), [
    ("reference/groups.html", "aimfair.groups.biased_split", "majority", "frequent group of each class"),
    ("reference/metrics.html", "aimfair.metrics.fairness_report", "sensitive_features", ""),
    ("reference/data/images.html", "aimfair.data.images.load_faces", "size", ""),
    ("reference/groups.html", "aimfair.groups.Names", "attributes", "where several make a group"),  # a field of a dataclass
    ("reference/training/protocol.html", "aimfair.training.protocol.TrainConfig", "epochs", "passes over the training set"),
    ("reference/pipeline/method.html", "aimfair.pipeline.method.AIMFair", "model", ""),
    ("reference/experiments.html", "aimfair.experiments.reproduce", "shareable", "show no faces"),
])
def test_arguments_are_documented(pages, page, anchor, argument, says):
    named = field_names(pages[page], anchor)
    assert argument in named, named
    assert says in named[argument] and len(named[argument]) > len(argument) + 3


def test_most_arguments_are_documented(pages):
    "Independently of the extension: comments in the source of functions, and what the page says."
    compared = 0
    for module in ("aimfair.groups", "aimfair.metrics", "aimfair.finetuning"):
        page = pages["reference/" + module.removeprefix("aimfair.") + ".html"]
        for name in importlib.import_module(module).__all__:
            function = getattr(importlib.import_module(module), name)
            if not inspect.isfunction(function) or function.__module__ != module:
                continue
            head = inspect.getsource(function).split("):")[0].split(") ->")[0]
            comments = dict(re.findall(r"^    \*?,? ?(\w+)(?:: [^#\n]*)?(?: = [^#\n]*)?,  # (\w[^\n`]*)$", head, re.M))
            named = field_names(page, f"{module}.{name}")
            for argument, comment in comments.items():
                first = re.match(r"[\w ]+", comment)[0].strip()
                assert first in named.get(argument, ""), (module, name, argument, comment)
                compared += 1
    assert compared > 40


# notebooks

def shown(notebook):
    "Code cells that a reader sees: their text and their outputs."
    for cell in notebook["cells"]:
        lines = "".join(cell["source"]).split("\n")
        if cell["cell_type"] != "code" or any(re.match(r"#\| *hide\b", line) for line in lines):
            continue
        text = "\n".join(line for line in lines if not line.startswith("#|")).strip()
        if text:
            yield text, cell["outputs"]


def images_of(outputs):
    "Bytes of the images among outputs."
    for output in outputs:
        data = output.get("data", {})
        kind = next((k for k in ("image/png", "image/jpeg") if k in data and "text/html" not in data), None)
        if kind:
            yield base64.b64decode("".join(data[kind]))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda f: f.relative_to(ROOT / "nbs").as_posix())
def test_notebook_is_on_the_site_as_committed(built, pages, file):
    path = file.relative_to(ROOT).with_suffix(".html").as_posix()
    assert path in pages, "not on the site"
    notebook = json.loads(file.read_text(encoding="utf-8"))
    cells = list(shown(notebook))
    article = pages[path].select_one("article")
    code = [c.get_text().strip("\n") for c in article.select("div.cell div.cell_input pre")]
    assert [c.rstrip() for c in code] == [text.rstrip() for text, _ in cells]
    sources = [i["src"] for i in article.select("div.cell div.cell_output img")]
    files = [(built[1] / path).parent / source for source in sources if not source.startswith("data:")]
    assert [f.read_bytes() for f in files] == [image for _, outputs in cells for image in images_of(outputs)]
    words = article.get_text()
    for _, outputs in cells:
        for output in outputs:
            if output["output_type"] == "stream":
                first = next((line for line in "".join(output["text"]).split("\n") if line.strip() and "\x1b" not in line), "")
                assert first.strip() in words


def test_directives_are_not_shown(pages):
    for path, page in pages.items():
        if path.startswith("nbs/"):
            assert not [c for c in page.select("div.cell_input pre") if re.search(r"^#\|", c.get_text(), re.M)], path


def test_every_image_has_a_text(pages):
    images = [(path, i) for path, page in pages.items() for i in page.select("article img")]
    without = [(path, i.get("src", "")[:60]) for path, i in images if not (i.get("alt") or "").strip()]
    assert not without, without[:10]
    assert len(images) > 100


def test_a_written_text_becomes_the_alternative():
    from build import shown_cells

    picture = {"output_type": "display_data", "data": {"image/png": "", "text/plain": "<Figure>"}, "metadata": {}}
    code = {"cell_type": "code", "metadata": {}, "outputs": [picture]}
    cells = [{"cell_type": "markdown", "source": "## A `curve`", "metadata": {}},
             {**code, "source": "#| fig-alt: A line that rises\nplot()"}, {**code, "source": "plot()"},
             {**code, "source": "#| hide\nplot()"}, {**code, "source": "#| default_exp metrics"}]
    _, said, unsaid = shown_cells(cells)
    assert said["source"] == "plot()" and said["metadata"]["mystnb"]["image"]["alt"] == "A line that rises"
    assert "A curve" in unsaid["metadata"]["mystnb"]["image"]["alt"]


def test_names_in_text_lead_to_the_reference(pages):
    link = pages["limits.html"].find("a", href=re.compile(r"reference/metrics\.html#aimfair\.metrics\.fairness_report$"))
    assert link is not None and link.find("code") is not None
    chapter = pages["nbs/02_groups.html"]
    assert chapter.find("a", href="../reference/groups.html") is not None
    assert pages["reference/groups.html"].find("a", href="../nbs/02_groups.html") is not None


def test_types_lead_to_other_projects(pages):
    away = {a["href"] for a in pages["reference/groups.html"].select("article a.reference.external")}
    assert any(a.startswith("https://pandas.pydata.org/docs/reference/api/pandas.DataFrame.html") for a in away)
    assert any(a.startswith("https://docs.python.org/3/library/collections.abc.html#") for a in away)


def test_addresses_elsewhere_are_well_formed():
    from build import read_elsewhere

    projects = read_elsewhere()
    assert {"python", "numpy", "pandas", "torch", "torchvision", "diffusers", "transformers", "matplotlib"} <= set(projects)
    for address, entries in projects.values():
        assert address.startswith("https://") and address.endswith("/") and entries
        for name, role, page in entries:
            parts = urlsplit(address + page.replace("$", name))
            assert re.fullmatch(r"py:\w+", role) and parts.netloc and parts.fragment and " " not in page


# formulas

def formulas():
    "(notebook, TeX, whether it stands alone) of all formulas, as the parser of the site finds them."
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    reader = MarkdownIt("gfm-like", {"linkify": False}).use(dollarmath_plugin)
    for file in NOTEBOOKS:
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
            for token in reader.parse("".join(cell["source"])) if cell["cell_type"] == "markdown" else ():
                for part in (token, *(token.children or ())):
                    if part.type.startswith("math"):
                        yield file.stem, part.content, part.type.startswith("math_block") or part.type == "math_inline_double"


def test_formulas_are_read_as_a_whole():
    "No command and no bracket of TeX is left in any, and what TeX does not know is not passed over."
    from docutils.utils.math import MathError
    from formulas import mathml

    found = list(formulas())
    assert len(found) > 150 and sum(block for *_, block in found) > 10
    for name, text, block in found:
        written = bs4.BeautifulSoup(mathml(text, block), "html.parser")
        assert not re.search(r"[\\${}]", written.get_text()), (name, text)
        letters = set(re.sub(r"\\mathcal\{\w\}|\\[a-zA-Z]+|[^a-zA-Z]", "", text))
        assert letters <= set(re.sub(r"[^\x00-\x7f]", "", written.get_text())), (name, text)
    with pytest.raises(MathError, match="nosuch"):
        mathml(r"\nosuch{x}", False)


@pytest.fixture
def drawn(browser):
    "Formulas on a page with the style of the site: a function from TeX to the element in the browser."
    from formulas import mathml

    page = browser.new_page()
    style = (ROOT / "nbs/site/_static/aimfair.css").read_text(encoding="utf-8")

    def draw(*texts, block=False):
        shown = "<p>".join(mathml(text, block) for text in texts)
        page.set_content(f"<!doctype html><meta charset=utf-8><style>{style} body {{ font-size: 20px }}</style>{shown}")
        return page

    yield draw
    page.close()


BOXES = """(math, selectors) => selectors.map(selector => {
  const box = math.querySelector(selector).getBoundingClientRect();
  return {left: box.left, right: box.right, top: box.top, bottom: box.bottom, width: box.width, height: box.height};
})"""


def boxes(page, *selectors):
    return page.locator("math").evaluate(BOXES, list(selectors))


def test_a_long_bar_is_as_wide_as_what_is_below_it(drawn):
    texts = [text for _, text, _ in formulas() if "overline" in text]
    page = drawn(*texts, r"\overline{x}", r"\overline{\frac{a + b}{c} - d}", block=True)
    bars = page.locator("math .overline").evaluate_all("""bars => bars.map(bar => {
      const below = [...bar.children].map(child => child.getBoundingClientRect()), box = bar.getBoundingClientRect();
      const width = Math.max(...below.map(b => b.right)) - Math.min(...below.map(b => b.left));
      return [box.width, width, parseFloat(getComputedStyle(bar).borderTopWidth), Math.min(...below.map(b => b.top)) - box.top];
    })""")
    assert len(bars) >= 4
    for width, below, line, gap in bars:
        assert width >= below - 0.5 and width > 5 and line >= 1 and gap >= line, bars


@pytest.mark.parametrize("text, left, right, space", [
    (r"\ln 9", "mi", "mn", "thin"), (r"s \ln 9", "mi:first-child", "mi:nth-child(3)", "thin"), (r"\ln(x)", "mi", "mo:nth-child(3)", "no"),
    (r"\cos\pi", "mi:first-child", "mi:last-child", "thin"), (r"\log_2 x", "msub", "mi:last-child", "thin"),
    (r"\max x", "mo", "mi", "thin"), (r"\max(x)", "mo", "mo:nth-child(2)", "no"), (r"2\min(x)", "mn", "mo", "thin"),
    (r"x = -y", "mo:nth-child(3)", "mi:last-child", "no"), (r"1/9", "mn", "mo", "no"), (r"1/9", "mo", "mn:last-child", "no"),
])
def test_functions_and_signs_have_the_spaces_of_tex(drawn, text, left, right, space):
    "A thin one is a sixth of an em."
    first, second = boxes(drawn(text), f":scope > {left}", f":scope > {right}")
    assert (second["left"] - first["right"]) / (20 * 1.08) == pytest.approx({"thin": 1 / 6, "no": 0}[space], abs=0.06)


def test_an_index_stands_beside_an_accent_and_bars_are_alike(drawn):
    root, bar, base, index = boxes(drawn(r"\sqrt{\bar\alpha_t}"), "msqrt", "mover > mo", "mover > mi", "msub > mi")
    assert base["left"] - 2 <= (bar["left"] + bar["right"]) / 2 <= base["right"] + 2 and bar["top"] <= base["top"] + 1
    assert index["left"] >= base["right"] - 2 and index["bottom"] > base["bottom"] and root["width"] >= index["right"] - base["left"]
    page = drawn(r"1 + \lvert a_{10} - b \rvert + 2")
    (left, right), row = boxes(page, "mrow > mo:first-child", "mrow > mo:last-child"), boxes(page, "mrow")[0]
    assert left["height"] == right["height"] and right["right"] - left["left"] == pytest.approx(row["width"], abs=1)
    inside = boxes(page, "mrow > msub", "mrow > mi")
    assert inside[0]["left"] - left["right"] < 4 and right["left"] - inside[1]["right"] < 4


# in a browser

@pytest.fixture
def visit(browser, built):
    "Opens a page from its file; what the console said is checked at the end."
    contexts, said = [], []

    def open_page(path, width=1300, mode="light"):
        if not contexts or contexts[-1][1:] != (width, mode):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=mode)
            contexts.append((context, width, mode))
        page = contexts[-1][0].new_page()
        page.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("request", lambda r: said.append(r.url) if r.url.startswith("http") else None)
        page.goto(f"file://{built[1]}/{path}")
        return page

    yield open_page
    for context, *_ in contexts:
        context.close()
    assert not said, said[:5]


def test_search_finds_a_name(visit):
    page = visit("search.html?q=biased_split")
    page.wait_for_selector("ul.search li a", timeout=20_000)
    assert any("aimfair.groups.biased_split" in (a.get_attribute("href") or "") for a in page.query_selector_all("ul.search li a"))


def test_theme_can_be_switched(visit):
    page, seen = visit("index.html"), {}
    for mode in ("light", "dark"):
        page.locator(".theme-switch-button:visible").click()
        page.locator(f".theme-change-button[data-mode={mode}]:visible").click()
        assert page.evaluate("document.documentElement.dataset.theme") == mode
        seen[mode] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert seen["light"] != seen["dark"]


@pytest.mark.parametrize("path", PHONE_PAGES)
def test_fits_on_a_phone(visit, path):
    page = visit(path, width=400)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


CONTRAST = """() => {  // of all text that is seen: its contrast with the ground below it, after WCAG 2
  const parse = c => {
    const m = c.match(/[\\d.]+/g).map(Number), scale = c.startsWith('color(srgb') ? 255 : 1;
    return [m[0] * scale, m[1] * scale, m[2] * scale, m[3] ?? 1];
  };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const linear = v => v <= .03928 * 255 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const luminance = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
  const above = e => e ? [...above(e.parentElement), e] : [];
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    if (style.visibility === 'hidden' || style.display === 'none' || box.width < 2 || box.height < 2) continue;
    if (e.closest('svg, script, style, .visually-hidden')) continue;
    const alpha = above(e).reduce((a, p) => a * Number(getComputedStyle(p).opacity), 1);
    if (alpha < .05) continue;
    const under = above(e).map(p => parse(getComputedStyle(p).backgroundColor)).reduce((below, c) => over(c, below), [255, 255, 255, 1]);
    const colour = parse(style.color);
    colour[3] *= alpha;
    const [a, b] = [luminance(over(colour, under)), luminance(under)];
    const what = [e.tagName, e.className, e.textContent.trim().slice(0, 30), style.color, under.join()];
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), ...what]);
  }
  return found;
}"""


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("path", PHONE_PAGES)
def test_text_stands_out(visit, path, mode):
    measured = visit(path, mode=mode).evaluate(CONTRAST)
    assert len(measured) > 15
    pale = [m for m in measured if m[0] < 4.5]
    assert not pale, (len(pale), pale[:5])
