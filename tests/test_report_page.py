"The report in a browser: tables that sort, narrow screens, dark ground and paper."
import re

import pytest

from aimfair.report import Cell, Section, TableText, write_html_report

ROWS = [("ERM", "90.10", "± 0.30", "−1.5", "[0.2, 0.4]", "1,600", "smiling", "–"),
        ("aim", "9.80", "± 2.00", "0.25", "[−0.1, 0.4]", "400", "Young", "7"),
        ("JTT", "100.00", "", "−12", "[10.5, 11]", "20,000", "layer10", "7"),
        ("LfF", "90.10", "± 0.10", "3e-3", "[0.3, 0.4]", "12", "layer2", "–"),
        ("DFR", "9.80", "± 0.10", "+2 %", "[0, 1]", "1,599", "blond <b>", "6.5")]
NUMBERS = {1: [90.1, 9.8, 100, 90.1, 9.8], 2: [-1.5, 0.25, -12, 0.003, 2], 3: [0.2, -0.1, 10.5, 0.3, 0], 4: [1600, 400, 20000, 12, 1599]}


def table_of(rows):
    "As the report's tables are: the second value carries the third as its deviation."
    header = ["Method", "ACC ↑", "change", "interval", "images", "words", "sparse"]
    cells = [(name, [Cell(value, spread), *map(Cell, rest)]) for name, value, spread, *rest in rows]
    return TableText(header=header, rows=cells, words=[5], name="alpha", caption="Invented")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    from aimfair.core import shown_figure
    from aimfair.report.drawing import write_figure

    folder = tmp_path_factory.mktemp("report")
    figure = shown_figure(figsize=(9, 3))
    figure.subplots().plot([1, 600])
    write_figure(figure, folder / "alpha")
    (folder / "alpha-tensors.csv").write_text("tensor," + ",".join(f"figure {i}" for i in range(14)) + "\n" + "".join(
        f"layer{i}.weight," + ",".join(f"{i * j / 7:.6f}" for j in range(14)) + "\n" for i in range(40)))
    sections = [Section("alpha", "A long title of an experiment that says much", "What is asked?", tables=(table_of(ROWS),)),
                Section("beta", error="no folder")]
    return write_html_report(folder / "report.html", experiments=sections, about={"profile": "toy", "seeds": list(range(100, 120))},
                             configuration={"data.averyveryverylongsetting": "x" * 90})


@pytest.fixture
def page(browser, report):
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(report.as_uri())
    yield page
    page.close()
    assert said == []


def column(page, place):
    return page.eval_on_selector_all("table:first-of-type tbody tr", f"rows => rows.filter(r => r.closest('#experiment-alpha > .scroll'))"
                                     f".map(r => r.cells[{place}].textContent.trim())")


def heading(page, place):
    return page.locator("#experiment-alpha > .scroll thead th").nth(place)


@pytest.mark.parametrize("place", NUMBERS)
def test_numbers_sort_as_numbers_and_equal_ones_keep_their_order(page, place):
    names, button = [row[0] for row in ROWS], heading(page, place).get_by_role("button")
    places = range(len(ROWS))
    for state, order in (("ascending", sorted(places, key=NUMBERS[place].__getitem__)),
                         ("descending", sorted(places, key=lambda i: -NUMBERS[place][i])), (None, places)):
        button.click()
        assert column(page, 0) == [names[i] for i in order]
        assert heading(page, place).get_attribute("aria-sort") == state


def test_words_sort_as_words(page):
    def natural(word): return [int(part) if part.isdigit() else part.casefold() for part in re.split(r"(\d+)", word)]

    for place, words in ((0, [row[0] for row in ROWS]), (5, [row[6] for row in ROWS])):
        heading(page, place).get_by_role("button").click()
        assert column(page, place) == sorted(words, key=natural)


def test_what_is_missing_comes_last_either_way(page):
    button = heading(page, 6).get_by_role("button")
    button.click()
    assert column(page, 0) == ["DFR", "aim", "JTT", "ERM", "LfF"]
    button.click()
    assert column(page, 0) == ["aim", "JTT", "DFR", "ERM", "LfF"]


def test_one_column_is_marked_and_keys_do_it_too(page):
    heading(page, 1).get_by_role("button").click()
    heading(page, 0).get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert page.locator("#experiment-alpha > .scroll [aria-sort]").count() == 1
    assert heading(page, 0).get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Space")
    assert column(page, 0) == ["LfF", "JTT", "ERM", "DFR", "aim"]


def test_without_scripts_the_page_reads_the_same(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("button").count() == 0 and page.locator("#experiment-alpha > .scroll tbody tr").count() == len(ROWS)
    assert page.locator("details").count() == 1 and not page.get_by_text("layer39.weight").is_visible()
    page.emulate_media(media="print")
    assert page.get_by_text("layer39.weight").is_visible()
    context.close()


def test_other_scripts_do_not_run(browser, report, tmp_path):
    text = report.read_text(encoding="utf-8")
    (tmp_path / "r.html").write_text(text.replace("</main>", "<script>document.title = 'taken'</script></main>"), encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "r.html").as_uri())
    assert page.title() != "taken" and page.locator("button").count() > 0
    page.close()


@pytest.mark.parametrize("width", [400, 1000])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_and_its_ground(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground, ink = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (ground, ink)]
    assert (light[0] > 200 > 60 > light[1]) if scheme == "light" else (light[0] < 60 < 200 < light[1])


def test_paper_is_white_and_nothing_is_folded_or_cut(page):
    page.emulate_media(media="print", color_scheme="dark")
    page.set_viewport_size({"width": 680, "height": 900})  # about A4 within its margins
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0 and page.get_by_text("layer39.weight").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 680
    assert page.evaluate("getComputedStyle(document.body).backgroundColor + getComputedStyle(document.body).color") == (
        "rgb(255, 255, 255)rgb(0, 0, 0)")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
