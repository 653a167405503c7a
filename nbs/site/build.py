"""Build the site: lay out a source tree in _docs/source from notebooks and pages, then have Sphinx make _docs/html of it."""

import argparse
import enum
import inspect
import json
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from names import NOTEBOOKS, ROOT, TUTORIALS, Chapter, Name, package, read_chapter  # noqa: E402

DIRECTIVE = re.compile(r"^#\| *([\w-]+):? *(.*)$")


# notebooks

def directives(source: str) -> tuple[dict[str, str], str]:
    "The `#|` lines of a cell, and what a reader sees of it."
    found, shown = {}, []
    for line in source.split("\n"):
        match = DIRECTIVE.match(line)
        if match:
            found[match[1]] = match[2].strip()
        else:
            shown.append(line)
    return found, "\n".join(shown).strip("\n")


def with_alt(html: str, alt: str) -> str:
    "HTML whose images all have a text."
    escaped = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    html = re.sub(r"(<img\b[^>]*?)\s+alt=(?:\"\"|'')", r"\1", html)
    return re.sub(r"<img\b(?![^>]*\balt=)", f'<img alt="{escaped}"', html)


def plain_heading(text: str) -> str:
    return re.sub(r"[`*_\\$]|\[|\]\([^)]*\)", "", text).strip()


def shown_outputs(outputs: list[dict], alt: str) -> list[dict]:
    "Outputs whose images have a text."
    shown = json.loads(json.dumps(outputs))
    for output in shown:
        data = output.get("data", {})
        for kind in [k for k in data if k.startswith("application/vnd.")]:  # for programs; what people see stands beside it
            del data[kind]
        if "text/html" in data:
            data["text/html"] = with_alt("".join(data["text/html"]), alt)
        if "text/markdown" in data:  # its headings are parts of an output, not of the chapter
            data["text/markdown"] = re.sub(r"^#+ +(.+)$", r"**\1**", "".join(data["text/markdown"]).strip("\n"), flags=re.M)
    return shown


def shown_cells(cells: list[dict]) -> list[dict]:
    "The cells of a notebook that a reader sees, as a reader sees them."
    shown, heading = [], ""
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            heading = ([heading] + re.findall(r"^#+ +(.+)$", source, re.M))[-1]
            shown.append(cell)
            continue
        said, source = directives(source)
        if "hide" in said or not source.strip():
            continue
        alt = said.get("fig-alt") or f"What the cell shows: {plain_heading(heading)}"
        metadata = {**cell["metadata"], "mystnb": {"image": {"alt": alt}}}
        if "code-fold" in said:
            metadata["tags"] = [*metadata.get("tags", []), "hide-input"]
        shown.append({**cell, "source": source, "metadata": metadata, "outputs": shown_outputs(cell["outputs"], alt)})
    return shown


def text_cell(text: str) -> dict:
    return {"cell_type": "markdown", "id": f"site{zlib.crc32(text.encode()):08x}", "metadata": {}, "source": text}


def toctree(entries: list[str], hidden: bool = True, depth: int = 1) -> str:
    options = (":hidden:\n" if hidden else "") + f":maxdepth: {depth}\n"
    return "```{toctree}\n" + options + "\n" + "\n".join(entries) + "\n```\n"


def relative(target: str, page: str) -> str:
    return os.path.relpath(target, Path(page).parent).replace(os.sep, "/")


def stage_notebook(file: Path, source: Path, children: list[str] = ()) -> None:
    "Copy a notebook into the tree, with the link to its reference and the chapters below it."
    notebook = json.loads(file.read_text(encoding="utf-8"))
    cells = shown_cells(notebook["cells"])
    path = file.relative_to(ROOT).as_posix()
    chapter = next((c for c in package().in_order if f"nbs/{c.path}.ipynb" == path), None)
    if chapter and chapter.module:
        link = f"Reference: [`{chapter.module}`]({relative(package().page(chapter.module) + '.md', path)})"
        cells.insert(1, text_cell(link))
    if children:
        cells.append(text_cell(toctree(children)))
    notebook["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "python", "file_extension": ".py"}
    target = source / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**notebook, "cells": cells}, ensure_ascii=False), encoding="utf-8")


def stage_notebooks(source: Path) -> None:
    chapters = package().in_order
    for chapter in chapters:
        children = [c.path.split("/")[1] for c in chapters if c.room == chapter.room and c is not chapter] if chapter.opens_room else []
        if chapter.path == "18_experiments":
            children = [f"experiments/{f.stem}" for f in sorted((NOTEBOOKS / "experiments").glob("*.ipynb"))]
        stage_notebook(NOTEBOOKS / f"{chapter.path}.ipynb", source, children)
    for file in [NOTEBOOKS / "index.ipynb", *sorted(NOTEBOOKS.glob("tutorials/*.ipynb")), *sorted(NOTEBOOKS.glob("experiments/*.ipynb"))]:
        stage_notebook(file, source)


def stage_figures(source: Path) -> None:
    "The figures that pages link to; a table that a page links to becomes a page of its own, below no heading of the navigation."
    texts = [f.read_text(encoding="utf-8") for f in [*source.rglob("*.ipynb"), *source.rglob("*.md")]]
    linked = {name for text in texts for name in re.findall(r"figures/((?:[\w-]+/)*[\w.-]+\.(?:png|md|json|csv))\b", text)}
    for name in sorted(linked):
        file = ROOT / "figures" / name
        if not file.is_file():
            continue
        (source / "figures" / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".md"):
            text = f"---\norphan: true\n---\n# Table {name.removesuffix('.md')}\n\n" + file.read_text(encoding="utf-8")
            (source / "figures" / name).write_text(text, encoding="utf-8")
        else:
            shutil.copy(file, source / "figures" / name)


# pages

def line_of(chapter: Chapter, level: int = 0) -> str:
    "A chapter in a list: its title, as a link, and what it is about."
    about = f": {chapter.about}" if chapter.about else ""
    return f"{'  ' * level}- [{chapter.title}](nbs/{chapter.path}.ipynb){about}"


def list_of_chapters(rooms: list[Chapter]) -> str:
    "All chapters by room, and the navigation."
    lines = []
    for room in rooms:
        inside = [c for c in package().in_order if room.opens_room and c.room == room.room and c is not room]
        lines += [line_of(room), *(line_of(c, 1) for c in inside)]
    return "\n".join(lines) + "\n\n" + toctree([f"nbs/{c.path}" for c in rooms])


def stage_pages(source: Path) -> None:
    "Pages of the site, the lists that follow from the notebooks, and the files of the repository that it shows."
    for file in HERE.rglob("*.md"):
        target = source / file.relative_to(HERE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    shutil.copytree(HERE / "_static", source / "_static")
    shutil.copytree(HERE / "how_to/cluster", source / "how_to/cluster")
    there = [f.stem for f in sorted((NOTEBOOKS / "tutorials").glob("*.ipynb"))]
    tutorials = sorted(there, key=lambda n: (TUTORIALS.index(n) if n in TUTORIALS else len(TUTORIALS), n))
    lines = [line_of(read_chapter(NOTEBOOKS / f"{path}.ipynb")) for path in ("index", *(f"tutorials/{n}" for n in tutorials))]
    lines[0] = "- [Overview](nbs/index.ipynb): all of it on one page"
    tree = toctree(["Overview <nbs/index>", *(f"nbs/tutorials/{n}" for n in tutorials), "CONTRIBUTING"])
    fill(source / "start.md", "\n".join(lines) + "\n\n" + tree)
    rooms = [c for c in package().in_order if (c.room is None or c.opens_room) and c.path != "18_experiments"]
    fill(source / "chapters.md", list_of_chapters(rooms))
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)


def fill(file: Path, text: str) -> None:
    "Put a generated list where a page asks for one."
    file.write_text(file.read_text(encoding="utf-8").replace("<!-- list -->", text), encoding="utf-8")


# reference

def methods_of(cls: type) -> list[str]:
    "Public methods and properties that the class itself defines."
    kinds = (classmethod, staticmethod, property)
    return [n for n, v in vars(cls).items() if not n.startswith("_") and (inspect.isfunction(v) or isinstance(v, kinds))]


def value_line(value: object) -> str | None:
    "A constant in one line, where it is short and the same on every machine."
    text = repr(value)
    of_this_machine = any(part in text for part in (" at 0x", str(Path.home()), str(ROOT)))
    return text if len(text) <= 160 and "\n" not in text and not of_this_machine else None


def entry(name: Name) -> str:
    "The directive that documents a name."
    if inspect.isclass(name.value):
        members = methods_of(name.value)
        if issubclass(name.value, enum.Enum):
            members += list(name.value.__members__)
        options = f"   :members: {', '.join(members)}\n   :undoc-members:\n" if members else ""
        return f".. autoclass:: {name.full}\n{options}"
    if inspect.isfunction(name.value):
        return f".. autofunction:: {name.full}\n"
    value = value_line(name.value)
    return f".. py:data:: {name.name}\n" + (f"   :value: {value}\n" if value else f"   :type: {type(name.value).__name__}\n")


def module_page(chapter: Chapter, children: list[Chapter]) -> str:
    pages, module = package(), chapter.module
    page, names = pages.page(module), pages.by_module[module]
    doc = inspect.getdoc(sys.modules[module]) or ""
    lines = [f"# `{module}`\n", f"{doc.strip().rstrip('.')}.\n" if doc else "",
             f"Chapter: [{chapter.title}]({relative(f'nbs/{chapter.path}.ipynb', page)})\n"]
    if children:
        rows = [f"| [`{c.module}`]({relative(pages.page(c.module) + '.md', page)}) | "
                + (", ".join(f"`~{n.full}`" for n in pages.by_module[c.module]) or "no public names") + " |" for c in children]
        lines += ["| module | names |\n|---|---|\n" + "\n".join(rows) + "\n",
                  toctree([c.module.split(".")[-1] for c in children])]
    if names:
        lines.append("```{eval-rst}\n" + f".. py:currentmodule:: {module}\n\n" + "\n".join(map(entry, names)) + "\n```\n")
    elif not children:
        lines.append("It has no public names.\n")
    return "\n".join(lines)


def stage_reference(source: Path) -> None:
    pages, tops = package(), []
    for module, chapter in pages.of_module.items():
        children = [c for c in pages.in_order if chapter.opens_room and c.room == chapter.room and c.module and c is not chapter]
        target = source / (pages.page(module) + ".md")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(module_page(chapter, children), encoding="utf-8")
        if chapter.room is None or chapter.opens_room:
            tops.append(chapter)
    lines = [f"- [`{c.module}`]({pages.page(c.module)}.md): {c.about}" for c in tops]
    fill(source / "reference.md", "\n".join(lines) + "\n\n" + toctree([pages.page(c.module) for c in tops]))


# other projects

def read_elsewhere() -> dict[str, tuple[str, list[tuple[str, str, str]]]]:
    "Projects of elsewhere.txt: {name: (address, [(name, role, page)])}."
    projects, current = {}, None
    for line in (HERE / "elsewhere.txt").read_text(encoding="utf-8").splitlines():
        parts = line.split()
        if not parts or parts[0] == "#":
            continue
        if len(parts) == 2 and parts[1].startswith("https://"):
            current = projects[parts[0]] = (parts[1], [])
        else:
            name, role, page = parts
            current[1].append((name, role, page))
    return projects


def write_inventories(folder: Path) -> None:
    "What intersphinx would fetch, from our own short table."
    folder.mkdir(parents=True, exist_ok=True)
    for project, (_, entries) in read_elsewhere().items():
        head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n# The remainder of this file is compressed using zlib.\n"
        body = "".join(f"{name} {role} 1 {page} -\n" for name, role, page in entries)
        (folder / f"{project}.inv").write_bytes(head.encode() + zlib.compress(body.encode(), 9))


# all of it

def stage(source: Path) -> None:
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    stage_pages(source)
    stage_notebooks(source)
    stage_reference(source)
    stage_figures(source)
    write_inventories(source.parent / "inventories")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder of source and html")
    out = parser.parse_args().out.resolve()
    from sphinx.cmd.build import main as sphinx

    stage(out / "source")
    shutil.rmtree(out / "html", ignore_errors=True)
    options = ["-W", "--keep-going", "-q", "-b", "html", "-c", str(HERE), "-d", str(out / "doctrees")]
    return sphinx([*options, str(out / "source"), str(out / "html")])


if __name__ == "__main__":
    sys.exit(main())
