"""Put what figures/ say where index and experiments quote it: between `<!-- quote: NAME -->` and `<!-- end of quote -->` the text of NAME.md.

Where it says `quote if there`, a file that is not there leaves nothing between."""
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
QUOTED = re.compile(r"(<!-- quote(?P<perhaps> if there)?: (?P<name>\S+) -->\n)(?:(?!<!--).*?\n)*(?P<end><!-- end of quote -->)")


def with_quotes(text: str, figures: Path) -> str:
    "A text with the tables and sentences that it quotes, as they are in `figures`; a table's caption stays out."
    def quote(found):
        file = figures / f"{found['name']}.md"
        if found["perhaps"] and not file.is_file():
            return found[1] + found["end"]
        lines = file.read_text(encoding="utf-8").strip().splitlines()
        return found[1] + "\n".join(lines[2:] if lines[0].startswith("**") else lines) + "\n" + found["end"]
    return QUOTED.sub(quote, text)


def main(figures: Path = HERE.parent / "figures") -> None:
    for path in (HERE / "index.ipynb", HERE / "18_experiments.ipynb"):
        before = path.read_text(encoding="utf-8")
        book = json.loads(before)
        for cell in book["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = with_quotes("".join(cell["source"]), figures).splitlines(keepends=True)
        after = json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if json.loads(after) != json.loads(before):
            path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
