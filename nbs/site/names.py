"""The package as the site tells of it: notebooks in their order, the modules that they write, and every public name once."""

import importlib
import json
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "nbs"
TUTORIALS = ["debias_your_model", "your_own_words", "text_to_faces", "explore_a_result"]  # in the order of reading; others follow


def prose(notebook: dict) -> str:
    return "\n\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")


def notebook_title(notebook: dict) -> str:
    "The first heading."
    return re.search(r"^# +(.+)$", prose(notebook), re.M)[1].strip()


def notebook_about(notebook: dict) -> str:
    "What stands below the heading as `> ...`, in one line; empty where there is none."
    found = re.match(r"\s*# .+\n+((?:> ?.*\n?)+)", prose(notebook))
    return " ".join(found[1].replace("\n>", " ").lstrip("> ").split()).rstrip(".") if found else ""


@dataclass
class Chapter:
    "A notebook, and the module that it writes, if any."
    path: str  # below nbs, without its ending: 04_data/01_reading
    title: str
    about: str
    module: str | None  # aimfair.data.reading; of a room's first chapter aimfair.data

    @property
    def room(self) -> str | None:
        "Folder of a room with several chapters."
        return self.path.split("/")[0] if re.match(r"\d+_\w+/", self.path) else None

    @property
    def opens_room(self) -> bool:
        return self.room is not None and self.path.split("/")[1].startswith("00_")


def read_chapter(file: Path) -> Chapter:
    notebook = json.loads(file.read_text(encoding="utf-8"))
    code = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    found = re.search(r"^#\| *default_exp +(\S+)", code, re.M)
    module = f"aimfair.{found[1]}".removesuffix(".__init__") if found else None
    return Chapter(file.relative_to(NOTEBOOKS).with_suffix("").as_posix(), notebook_title(notebook), notebook_about(notebook), module)


@dataclass
class Name:
    "A public name, where it is defined."
    module: str
    name: str
    value: object
    also: list[str] = field(default_factory=list)  # full names under which rooms offer it, too

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}"


class Package:
    "Chapters, modules and names."

    @cached_property
    def chapters(self) -> list[Chapter]:
        return [read_chapter(f) for f in sorted(NOTEBOOKS.glob("[0-9]*/*.ipynb")) + sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))]

    @cached_property
    def in_order(self) -> list[Chapter]:
        return sorted(self.chapters, key=lambda c: c.path)

    @cached_property
    def of_module(self) -> dict[str, Chapter]:
        return {c.module: c for c in self.in_order if c.module}

    @cached_property
    def names(self) -> list[Name]:
        "Each once: a package that only hands on what its modules define is an alias."
        modules = {m: importlib.import_module(m) for m in self.of_module}
        found: dict[tuple[str, int], Name] = {}
        packages = [m for m in modules if self.of_module[m].opens_room]
        handed_on = []
        for module in [m for m in modules if m not in packages] + packages:
            for name in getattr(modules[module], "__all__", []):
                value = getattr(modules[module], name)
                home = getattr(value, "__module__", module)
                same = found.get((name, id(value)))
                if same is not None:
                    same.also.append(f"{module}.{name}")
                elif home != module and name in getattr(modules.get(home), "__all__", []) and getattr(modules[home], name) is value:
                    handed_on.append((module, name, value))
                else:
                    found[name, id(value)] = Name(module, name, value)
        for module, name, value in handed_on:
            found[name, id(value)].also.append(f"{module}.{name}")
        return list(found.values())

    @cached_property
    def by_module(self) -> dict[str, list[Name]]:
        modules: dict[str, list[Name]] = {m: [] for m in self.of_module}
        for name in self.names:
            modules[name.module].append(name)
        return modules

    @cached_property
    def by_word(self) -> dict[str, list[Name]]:
        words: dict[str, list[Name]] = {}
        for name in self.names:
            words.setdefault(name.name, []).append(name)
        return words

    @cached_property
    def by_full(self) -> dict[str, Name]:
        return {full: name for name in self.names for full in (name.full, *name.also)}

    def page(self, module: str) -> str:
        "The document that tells of a module."
        return "reference/" + module.removeprefix("aimfair.").replace(".", "/") + ("/index" if self.of_module[module].opens_room else "")


@cache
def package() -> Package:
    return Package()
