"""Formulas as MathML, which browsers draw themselves: docutils reads the TeX, and here come the spaces and shapes that TeX has."""

import re
from xml.etree import ElementTree

from docutils.utils.math.latex2mathml import functions, movablelimits, operators, tex2mathml

SCRIPTS = ("msub", "msup", "msubsup", "munder", "mover", "munderover")
APPLY = "\u2061"  # stands between a function and its argument, and has no width
NAMED = {name for name in functions.values() if name} | {operators[name] for name in movablelimits} | {"…"}
CLOSE = ")]}⟩⌉⌋|‖"
BIG = re.compile(r"\\([bB]igg?)[lrm]? *(\\[a-zA-Z]+|\\?.)")


def sized(match: re.Match) -> str:
    "A bracket of `\\big` and the like, with its side; any other sign as it is."
    side = "l" if match[2][-1] in "([{" or match[2][:2] == "\\l" else "r" if match[2][-1] in ")]}" or match[2][:2] == "\\r" else ""
    return f"\\{match[1]}{side}{match[2]}" if side else match[2]


def written_out(text: str) -> str:
    "TeX in the forms that docutils reads."
    text = re.sub(r"(?<!left)(?<!right)\\([lr])([vV]ert)(?![a-zA-Z])", lambda m: f"\\{'left' if m[1] == 'l' else 'right'}{m[0]}", text)
    text = re.sub(r"\\! *(?=\\left)", "", BIG.sub(sized, text))  # it takes away a space that is not there
    text = re.sub(r"\\dots(?![a-zA-Z])", r"\\ldots", text)
    text = re.sub(r"\\(t?frac) *(\d) *(\d)", r"\\\1{\2}{\3}", text)
    return re.sub(r"(?<=\d)\{,\}(?=\d)", ",", text)


def core(node: ElementTree.Element) -> ElementTree.Element:
    "What a node is without its indices and limits."
    while node.tag in SCRIPTS and len(node):
        node = node[0]
    return node


def is_named(row: list, place: int) -> bool:
    "Whether a function, a big operator or dots stand there, which keep a thin space from their neighbours."
    following = row[place + 1] if place + 1 < len(row) else None
    return core(row[place]).text in NAMED or following is not None and following.text == APPLY


def shaped(node: ElementTree.Element) -> ElementTree.Element:
    "A node whose accents, bars and primes are where TeX has them."
    for place, child in enumerate(node):
        node[place] = shaped(child)
    if node.tag == "munderover" and node[2].get("stretchy") == "false":  # docutils puts an index below what has an accent
        accent = ElementTree.Element("mover", accent="true")
        accent.extend([node[0], node[2]])
        node.tag, node[:] = "msub", [accent, node[1]]
    elif node.tag == "msup" and node[0].tag == "msub":
        node.tag, node[:] = "msubsup", [*node[0], node[1]]
    elif node.tag == "mover" and node[1].text == "_":  # no sign is stretched over its base by all browsers: it gets a border
        node.tag, node[:] = "mrow", [node[0]]
        node.attrib = {"class": "overline"}
    if node.text == "ˉ":  # as wide as the hat
        node.text = "¯"
    if node.get("class") == "capital-greek" or node.text == "∇":
        node.set("mathvariant", "normal")
    if node.tag == "mo" and node.text == "*":
        node.text = "∗"
    for place in reversed(range(1, len(node))):
        if node.tag not in SCRIPTS and node[place].text == "'":
            base = node[place - 1]
            raised = ElementTree.Element("msubsup" if base.tag == "msub" else "msup")
            raised.extend([*(base if base.tag == "msub" else [base]), prime := ElementTree.Element("mo")])
            prime.text = "′"
            node[place - 1:place + 1] = [raised]
    return node


def narrow(sign: ElementTree.Element) -> None:
    "No space around it."
    sign.attrib.update(lspace="0", rspace="0")


def starts(row: list, place: int) -> bool:
    "Whether a term starts there: at the beginning, or after a sign such as =, ( or a comma."
    before = next((n for n in reversed(row[:place]) if n.tag != "mspace" and n.text != APPLY), None)
    return before is None or before.tag == "mo" and before.text not in CLOSE and before.text not in NAMED


def is_sign(node: ElementTree.Element) -> bool:
    "Whether a bracket, a space or a sign is there, which has its own distance or none."
    first = core(node)
    while first.tag == "mrow" and len(first):
        first = core(first[0])
    return first.tag == "mspace" or first.tag == "mo" and first.text not in NAMED


def spaced(node: ElementTree.Element) -> None:
    "TeX's spaces: thin ones beside functions, none around a slash or a bar, none around signs in an index."
    for child in node:
        spaced(child)
    if node.tag in SCRIPTS:
        for sign in (sign for index in node[1:] for sign in index.iter("mo")):
            narrow(sign)
        return
    row, done = list(node), []
    for place, child in enumerate(row):
        if child.tag == "mo" and (child.text in "/." or child.text in "|‖" and 0 < place < len(row) - 1):
            narrow(child)
        elif child.tag == "mo" and child.text in "−±+" and starts(row, place):
            child.set("form", "prefix")
        if is_named(row, place) and core(child).tag == "mo":
            narrow(core(child))
        beside = is_named(row, place) or place and (row[place - 1].text == APPLY or is_named(row, place - 1))
        if beside and not starts(row, place) and not is_sign(child) and row[place - 1].tag != "mspace":
            done.append(ElementTree.Element("mspace", width="0.1667em"))
        done.append(child)
    node[:] = done


def mathml(text: str, block: bool) -> str:
    "TeX as MathML."
    written = tex2mathml(written_out(text), as_block=block)
    for old, new in ((' xmlns="http://www.w3.org/1998/Math/MathML"', ""), ("&ApplyFunction;", APPLY)):
        written = written.replace(old, new)
    tree = ElementTree.fromstring(written)
    for node in tree.iter():
        node.tail = None
        if len(node):
            node.text = None
    spaced(shaped(tree))
    return ElementTree.tostring(tree, encoding="unicode")
