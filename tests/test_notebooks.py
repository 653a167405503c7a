"Notebooks, modules and README agree, and nothing is in them that does not belong there."

import ast
import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
EXPERIMENTS = [path for path in NOTEBOOKS if path.parent.name == "experiments"]
MODULES = sorted(path for path in (ROOT / "aimfair").rglob("*.py") if path.name != "_modidx.py" and path.parent.name != "assets")

MACHINE_PATH = re.compile(r"(?<![\w.:/<-])/(?:home|root|tmp|work|Users|private|opt|mnt|srv|var)/[\w.]|\b[A-Z]:\\\\?Users\b")
SECRET = re.compile(
    r"\b(?:sk-[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{20,}|gh[opsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[A-Z0-9]{16}|xox[abp]-[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|[Bb]earer [A-Za-z0-9_\-.]{20,}"
    r"|(?i:api_?key|secret|token|password)\"?'? *[=:] *[\"'][A-Za-z0-9_\-]{16,}[\"']"
)


def notebook_id(path):
    return path.relative_to(ROOT / "nbs").as_posix()


def each_notebook(function):
    return pytest.mark.parametrize("path", NOTEBOOKS, ids=notebook_id)(function)


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def output_texts(cell):
    "Every text an output shows; pictures are left out, as their base64 may spell anything."
    for output in cell.get("outputs", []):
        yield "".join(output.get("text", ""))
        yield "\n".join(output.get("traceback", []))
        for mime, data in output.get("data", {}).items():
            if not mime.startswith(("image/", "application/pdf")):
                yield re.sub(r"data:image/[^\"')]*", "", "".join(data) if isinstance(data, list) else str(data))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of settings and notebooks, with an empty package; tests may change it."
    folder = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (folder / "aimfair").mkdir()
    return folder


def run(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": "", "XDG_CONFIG_HOME": str(cwd)}  # nobody's own nbdev settings
    result = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def exported(copy):
    run("-c", "from nbdev.doclinks import nbdev_export; nbdev_export()", cwd=copy)
    return copy / "aimfair"


def test_modules_in_sync_with_notebooks(exported):
    "What the notebooks export is what is committed, byte for byte; no module is without a notebook."
    fresh, committed = ({path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.py")}
                        for root in (exported, ROOT / "aimfair"))
    # __init__.py: nbdev writes the version into it, and keeps the rest
    fresh.pop("__init__.py")
    committed.pop("__init__.py")
    differ = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    assert not differ, f"notebooks and modules differ in {', '.join(differ)}: run `make export`"


def test_version_in_sync_with_settings():
    version = re.search(r"^version = (\S+)$", (ROOT / "settings.ini").read_text(), re.M)[1]
    assert re.search(r'^__version__ = "(.*)"$', (ROOT / "aimfair" / "__init__.py").read_text(), re.M)[1] == version


def test_readme_in_sync_with_index(tmp_path):
    result = subprocess.run(
        ["make", "--silent", "readme", f"README={tmp_path / 'README.md'}", f"BIN={Path(sys.executable).parent}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )
    assert result.returncode == 0, result.stderr
    same = (tmp_path / "README.md").read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8")
    assert same, "README.md is not what nbs/index.ipynb says: run `make export`"


@pytest.fixture(scope="module")
def cleaned(copy):
    run("-c", "from nbdev.clean import nbdev_clean; nbdev_clean()", cwd=copy)
    return copy / "nbs"


@each_notebook
def test_notebook_is_clean(path, cleaned):
    same = (cleaned / notebook_id(path)).read_bytes() == path.read_bytes()  # outside of assert: no one wants to read a diff of pictures
    assert same, "cleaning would change this notebook: run `nbdev_clean`"


@each_notebook
def test_notebook_opens_as_a_chapter(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown"
    opening = source(first)[:200]
    assert re.match(r"# .+\n+> .+", opening), f"the first cell is '# title' and '> one-line description', but starts with {opening!r}"


@each_notebook
def test_notebook_was_run_without_an_error(path):
    failed = [output["ename"] for cell in cells(path) for output in cell.get("outputs", []) if output["output_type"] == "error"]
    assert not failed


@each_notebook
def test_notebook_has_no_machine_paths(path):
    for number, cell in enumerate(cells(path)):
        found = [match[0] for text in (source(cell), *output_texts(cell)) for match in MACHINE_PATH.finditer(text)]
        assert not found, f"cell {number} names {found[0]}..."


@each_notebook
def test_notebook_has_no_secrets(path):
    for number, cell in enumerate(cells(path)):
        assert not any(SECRET.search(text) for text in (source(cell), *output_texts(cell))), f"cell {number}: looks like a secret"


@each_notebook
def test_notebook_is_small(path):
    assert path.stat().st_size < 1_500_000


def shows_pictures(cell):
    return any(mime.startswith("image/") for output in cell.get("outputs", []) for mime in output.get("data", {}))


def pictures(cell):
    "The pictures that a cell shows, as files: those of matplotlib and Pillow, and those inside of HTML."
    for output in cell.get("outputs", []):
        data = {mime: "".join(text) for mime, text in output.get("data", {}).items() if mime in ("image/png", "image/jpeg", "text/html")}
        inside = re.findall(r"data:image/(?:png|jpeg|webp);base64,([\w+/=]+)", data.pop("text/html", ""))
        yield from (BytesIO(base64.b64decode(text)) for text in [*data.values(), *inside])


@each_notebook
def test_pictures_are_no_wider_than_a_column(path):
    for number, cell in enumerate(cells(path)):
        for picture in pictures(cell):
            with Image.open(picture) as opened:
                assert opened.width <= 900, f"cell {number}: {opened.width} pixels"


def fig_alt(cell):
    "What the directive `fig-alt` says at the top of a cell, read as the YAML that it is; None where it is missing or says nothing."
    directives = itertools.takewhile(lambda line: line.startswith("#|"), source(cell).splitlines())
    found = [line.removeprefix("#|") for line in directives if re.match(r"#\|\s*fig-alt:", line)]
    try:
        return yaml.safe_load(found[0])["fig-alt"] if found else None
    except yaml.YAMLError:  # a colon, say
        return None


@each_notebook
def test_pictures_are_told_in_words(path):
    "Who cannot see a picture that a cell shows is told what is in it, in a text of its own."
    told = {number: fig_alt(cell) for number, cell in enumerate(cells(path)) if shows_pictures(cell)}
    for number, text in told.items():
        assert isinstance(text, str) and 20 <= len(text) <= 140, f"cell {number}: `#| fig-alt: ...`, read as YAML, says {text!r}"
    assert len(set(told.values())) == len(told), "two cells say the same of their pictures"


def pictures_without_words(markdown):
    "Of the pictures in a Markdown text, those without an alternative text."
    prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", markdown, flags=re.M | re.S)
    marks = [alt for alt in re.findall(r"!\[([^]]*)\]", prose) if not alt.strip()]
    return marks + [tag for tag in re.findall(r"<img\b[^>]*>", prose) if not re.search(r"\balt=([\"'])\s*\w", tag)]


@pytest.mark.parametrize("text, missing", [
    ("![A curve that falls](a.png)", 0), ("![](a.png)", 1), ("![ ](a.png)", 1), ("`![](a.png)`", 0), ("a [link](b.md)", 0),
    ('<img src="a.png" alt="A curve that falls">', 0), ('<img alt="" src="a.png">', 1), ("text <img src='a.png'> text", 1),
])
def test_missing_words_are_found(text, missing):
    assert len(pictures_without_words(text)) == missing


@each_notebook
def test_pictures_in_prose_have_an_alt(path):
    assert not [found for cell in cells(path) if cell["cell_type"] == "markdown" for found in pictures_without_words(source(cell))]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=notebook_id)
def test_experiment_keeps_its_parameters_cell(path, cleaned):
    for notebook in (path, cleaned / notebook_id(path)):
        tagged = [cell for cell in cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]
        assert len(tagged) == 1 and tagged[0]["cell_type"] == "code"


def test_links_lead_somewhere():
    for path in NOTEBOOKS:
        for cell in cells(path):
            if cell["cell_type"] != "markdown":
                continue
            for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", source(cell)):
                assert ":" in target or (path.parent / target).exists(), f"{notebook_id(path)} links to {target}, which is not there"


def module_of(path):
    "The module that a notebook is exported to, or None."
    names = [match[1] for cell in cells(path) if (match := re.match(r"#\s*\|\s*default_exp (\S+)", source(cell)))]
    return f"aimfair.{names[0]}".removesuffix(".__init__") if names else None


def reading_order():
    "Modules in the order of their chapters. The face of a room, its `__init__`, is read first, but it knows all that is in the room."
    chapters = [path for path in NOTEBOOKS if module_of(path)]
    last = {path.parent: max(p for p in chapters if p.parent == path.parent) for path in chapters if path.parent.name != "nbs"}

    def place(path):
        entry = str(module_of(path)).endswith("__main__")  # what `python -m` runs knows the whole room, too
        face = path.name.startswith("00_") and path.parent in last
        return last[path.parent].with_suffix(".y" if entry else ".x") if entry or face else path

    return [module_of(path) for path in sorted(chapters, key=place)]


ORDER = reading_order()


def name_of(path):
    "The dotted name of a module's file."
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path):
    "Names of our modules that are imported anywhere in a module, inside functions too."
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [name if (name := f"{base}.{alias.name}") in ORDER else base for alias in node.names]
        else:
            continue
        yield from (name for name in names if name in ORDER)


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name != "aimfair" or path.stem != "__init__"], ids=name_of)
def test_module_imports_only_modules_above_it(path):
    assert name_of(path) in ORDER, f"{name_of(path)} has no chapter"
    above = ORDER[: ORDER.index(name_of(path))]
    below = sorted(set(imported_modules(path)) - {*above, name_of(path)})
    assert not below, f"{name_of(path)} imports {', '.join(below)}, which it must not know"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_has_a_size_that_one_can_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 600


def exported_cells(path):
    "Positions, among the code cells, and lines of the cells that a notebook exports; and all code cells."
    code = [source(cell) for cell in cells(path) if cell["cell_type"] == "code"]
    return [(n, text.strip().count("\n")) for n, text in enumerate(code) if re.match(r"\s*#\s*\|\s*export", text)], code


def test_exported_cells_are_short():
    lengths = [(lines, notebook_id(path)) for path in NOTEBOOKS for _, lines in exported_cells(path)[0]]
    assert max(lengths)[0] <= 60, f"a cell of {max(lengths)[0]} lines in {max(lengths)[1]}"
    assert sum(lines > 30 for lines, _ in lengths) <= len(lengths) / 10, "nine exported cells in ten have at most 30 lines"


@each_notebook
def test_every_exported_idea_is_shown(path):
    "Below each exported function or class, and above the next, stands an example or a test."
    exported, code = exported_cells(path)
    places = [n for n, _ in exported]
    for n, end in zip(places, [*places[1:], len(code)], strict=False):
        names = re.findall(r"^(?:def|class) (\w+)", code[n], re.M)
        assert not names or any(text.strip() for text in code[n + 1 : end]), f"nothing shows {', '.join(names)}"


def python_examples(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_readme_examples_name_what_exists():
    for example in python_examples((ROOT / "README.md").read_text()):
        imports = [node for node in ast.parse(example).body if isinstance(node, ast.ImportFrom) and node.module.startswith("aimfair")]
        exec(compile(ast.Module(imports, []), "README.md", "exec"), {})


def what_came_out():
    "Where results are told: of README and of the chapter on experiments."
    cells = json.loads((ROOT / "nbs" / "18_experiments.ipynb").read_text(encoding="utf-8"))["cells"]
    chapter = next(text for cell in cells if (text := "".join(cell["source"])).startswith("## What came out"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("results: begin -->")[2].partition("<!-- results: end")[0]
    return {"README.md": readme, "18_experiments": chapter}


@pytest.mark.parametrize("place", ["README.md", "18_experiments"])
def test_results_are_quoted_not_typed(place):
    "Tables and sentences are those of figures/, line by line, and outside of them stands no number with a decimal."
    text = what_came_out()[place]
    quoted = re.findall(r"<!-- quote: (\S+) -->\n(.*?)\n<!-- end of quote -->", text, re.S)
    assert quoted
    for name, lines in quoted:
        file = (ROOT / "figures" / f"{name}.md").read_text(encoding="utf-8").strip()
        assert lines and file.removeprefix(file.split("\n\n")[0] if file.startswith("**") else "").strip() == lines, (
            f"{place} does not quote figures/{name}.md as it is: run `make readme`")
    rest = re.sub(r"<!-- quote.*?<!-- end of quote -->", "", text, flags=re.S)
    assert not re.findall(r"\d\.\d", rest)
