"""Arguments documented from signatures, names in running text as links, formulas without a script."""

import ast
import inspect
import re
import textwrap
import warnings
from typing import get_type_hints

import numpy.typing as npt
from docutils import nodes
from fastcore.docments import docments
from formulas import mathml
from names import package
from sphinx.ext.intersphinx import InventoryAdapter
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.inspect import stringify_signature
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import stringify_annotation

# docstrings and the comments in signatures

def as_rst(text: str) -> str:
    "Words of a docstring or a comment, in which `code` stands between single backticks, for Sphinx."
    parts = re.split(r"(``?)(.+?)\1", text)
    done = []
    for place in range(0, len(parts), 3):
        done.append(re.sub(r"([\\*|`]|_(?!\w)|(?<!\w)_)", r"\\\1", parts[place]))
        if place + 2 < len(parts):
            done.append(f"``{parts[place + 2].strip()}``\\ ")
    return "".join(done).replace("\\  ", " ").removesuffix("\\ ")


def field_comments(cls: type) -> dict[str, str]:
    "Comments of the annotated fields of a dataclass or a settings model: beside a field, or in the lines above it."
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    lines, found = source.split("\n"), {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_"):
            beside = re.search(r"#\s*(.*)$", lines[node.end_lineno - 1][node.end_col_offset:])
            found[node.target.id] = beside[1] if beside else ""
    return found


def has_fields(cls: type) -> bool:
    return hasattr(cls, "__dataclass_fields__") or hasattr(cls, "model_fields") or issubclass(cls, tuple) and hasattr(cls, "_fields")


def argument_lines(thing: object, indent: str = "") -> list[str]:
    "`:param x:` and `:returns:` of a function or a class, as its comments say; a field without a comment is named all the same."
    if inspect.isclass(thing):
        if has_fields(thing):
            said = {}
            for base in reversed(thing.__mro__):
                if base.__module__.startswith("aimfair"):
                    said.update(field_comments(base))
            said.update({n: f.description for n, f in getattr(thing, "model_fields", {}).items() if f.description and n in said})
            return [f":param {name}: {as_rst(text or '')}".rstrip() for name, text in said.items()]
        if "__init__" not in vars(thing):
            return []
        thing = thing.__init__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = docments(inspect.unwrap(thing), full=True)
    except (OSError, TypeError, ValueError, SyntaxError, IndexError):
        return []
    lines = []
    for name, about in said.items():
        text = " ".join(str(about["docment"]).split()) if about["docment"] else ""
        if text and name == "return":
            lines.append(f":returns: {as_rst(text)}")
        elif text and name != "self":
            lines.append(f":param {name}: {as_rst(text)}")
    return lines


def generated(thing: object) -> bool:
    "Whether a class has no docstring but the one that Python makes up, or one that it inherits."
    own = vars(thing).get("__doc__") if inspect.isclass(thing) else "own"
    return not own or str(own).startswith(f"{thing.__name__}(") if inspect.isclass(thing) else False


def document_arguments(app, what, name, thing, options, lines):
    if what not in ("function", "class", "method", "exception"):
        lines[:] = [as_rst(line) for line in lines]
        return
    text = [] if inspect.isclass(thing) and generated(thing) else [as_rst(line) if not line.startswith("    ") else line for line in lines]
    if inspect.isclass(thing):  # a description that is one string in the line below, else nothing that a base class says of itself
        text = text if vars(thing).get("__doc__") else []
    arguments = argument_lines(thing)
    while text and not text[-1].strip():
        text.pop()
    lines[:] = [*text, "", *arguments, ""]


class Written:
    "A default value as somebody wrote it."

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def written_defaults(function) -> dict[str, str]:
    "Default values of a function in the words of its source; none where the source is somebody else's."
    if hasattr(function, "__wrapped__"):  # its signature was put together
        return {}
    try:
        arguments = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].args
    except (OSError, TypeError, SyntaxError, AttributeError):
        return {}
    plain = [*arguments.posonlyargs, *arguments.args]
    pairs = [*zip(plain[len(plain) - len(arguments.defaults):], arguments.defaults, strict=True),
             *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return {argument.arg: ast.unparse(default) for argument, default in pairs if default is not None}


def bare(annotation: object) -> object:
    "A type without the bounds that a settings model hangs on it; what numpy takes for an array by its name."
    if annotation is npt.ArrayLike:
        return "~numpy.typing.ArrayLike"
    if "Annotated" not in repr(annotation) or isinstance(annotation, str):
        return annotation
    def holder(): ...
    holder.__annotations__ = {"x": annotation}
    try:
        return get_type_hints(holder)["x"]
    except (NameError, TypeError):
        return annotation


def write_signature(app, what, name, thing, options, arguments, returns):
    "Defaults as they were written, those that only have a long form by their type; annotations without bounds."
    if what not in ("function", "class", "method", "exception") or arguments is None:
        return None
    try:
        signature, written = inspect.signature(thing), written_defaults(thing.__init__ if inspect.isclass(thing) else thing)
    except (TypeError, ValueError):
        return None
    shown, hints = [], {}
    if any(isinstance(p.annotation, str) and "Annotated" in p.annotation for p in signature.parameters.values()):
        hints = get_type_hints(inspect.unwrap(thing))
    for place, parameter in enumerate(signature.parameters.values()):
        if place == 0 and what == "method" and parameter.name in ("self", "cls"):
            continue
        value = parameter.default
        if value is not parameter.empty:
            text = written.get(parameter.name, repr(value))
            value = Written(text if len(text) <= 60 and " at 0x" not in text else f"{type(value).__name__}(...)")
        shown.append(parameter.replace(default=value, annotation=hints.get(parameter.name, bare(parameter.annotation))))
    answer = signature.empty if inspect.isclass(thing) else bare(signature.return_annotation)
    text = stringify_signature(signature.replace(parameters=shown, return_annotation=answer), unqualified_typehints=True)
    return text.split(" -> ")[0] if " -> " in text and answer is not signature.empty else text, \
        None if answer is signature.empty else stringify_annotation(answer, "smart")


# anchors of the names under which rooms offer what their modules define

def add_aliases(app, doctree):
    for signature in doctree.findall(lambda n: isinstance(n, nodes.Element) and n.tagname == "desc_signature"):
        for own in list(signature["ids"]):
            name = package().by_full.get(own)
            if name is not None and name.full == own:
                signature["ids"] += [full for full in name.also if full not in signature["ids"]]


# names in running text

def room_of(docname: str) -> str:
    "The package or module that a page is about, or nothing."
    for module, chapter in package().of_module.items():
        if docname in (f"nbs/{chapter.path}", package().page(module)):
            return ".".join(module.split(".")[:2])
    return ""


def meant(text: str, docname: str):
    "The public name that inline code is, and its anchor; None where it is none, or may be several."
    word = text.removesuffix("()")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", word):
        return None
    names = package()
    for full in (word, f"aimfair.{word}"):
        if full in names.by_full:
            return names.by_full[full]
    room = room_of(docname)
    candidates = names.by_word.get(word, [])
    own = [n for n in candidates if room and (n.module == room or n.module.startswith(f"{room}."))]
    here = [n for n in own if docname in (names.page(n.module), f"nbs/{names.of_module[n.module].path}")]
    if len(here) == 1 or len(own) == 1:
        return (here if len(here) == 1 else own)[0]
    if len(candidates) != 1 or own:
        return None
    # elsewhere a plain word such as `status` or `folder` is more often a command, a setting or a column
    return candidates[0] if text.endswith("()") or "_" in word or not word.islower() else None


class LinkNames(SphinxPostTransform):
    "Inline code that is exactly a public name leads to its reference, and a name of another project to that project's pages."
    default_priority = 700
    formats = ("html",)

    def run(self):
        here = self.env.current_document.docname
        for literal in list(self.document.findall(nodes.literal)):
            if self.inside_link(literal):
                continue
            text, link, short = literal.astext(), None, literal.deepcopy()
            if text.startswith("~aimfair."):  # as elsewhere in Sphinx: shown by its last part
                text = text.removeprefix("~")
                short = nodes.literal(text, text.rsplit(".", 1)[1], classes=literal["classes"])
            name = meant(text, here)
            if name is not None:
                target = package().page(name.module)
                link = make_refnode(self.app.builder, here, target, name.full, short, name.full)
            elif "." in text:
                link = self.elsewhere(text.removesuffix("()"), literal)
            if link is not None:
                literal.replace_self(link)

    def inside_link(self, node):
        while node is not None:
            if isinstance(node, (nodes.reference, nodes.title)) or node.tagname.startswith("desc_"):
                return node.tagname != "desc_content"
            node = node.parent
        return False

    def elsewhere(self, text, literal):
        for kind, entries in InventoryAdapter(self.env).main_inventory.items():
            if kind.startswith("py:") and text in entries:
                return nodes.reference("", "", literal.deepcopy(), refuri=entries[text].uri, internal=False, reftitle=text)
        return None


# formulas as MathML, which browsers draw themselves

def visit_math(self, node):
    self.body.append(mathml(node.astext(), False))
    raise nodes.SkipNode


def visit_math_block(self, node):
    self.body.append(f'<div class="formula" role="group" tabindex="0" aria-label="formula">{mathml(node.astext(), True)}</div>')
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("autodoc-process-signature", write_signature)
    app.connect("autodoc-process-docstring", document_arguments)
    app.connect("doctree-read", add_aliases)
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
