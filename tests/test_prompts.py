"""Prompts: the parser and the checks on hostile text, tasks and frozen sets that ship, writing and resuming, and the command line."""
import json
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from faults import interrupt_at, kill_when
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import aimfair
from aimfair.core import asset, read_lines
from aimfair.prompts import (
    PROMPT_STYLES,
    TASKS,
    GrammarBackend,
    PromptError,
    PromptSet,
    Repeats,
    Request,
    Task,
    age_in,
    assemble,
    check_context,
    check_prompt,
    compose,
    context_words,
    grammar_context,
    load_prompts,
    load_task,
    normalise,
    parse_answer,
    report,
    task_from,
    write_file,
    write_prompts,
)

ROOT = Path(aimfair.__file__).parents[1]
SMILING, TOY, UTK = TASKS["celeba-smiling-male"], TASKS["toy-smiling-male"], TASKS["utkface-gender-ethnicity"]
CASES = [(task, style) for task in TASKS for style in PROMPT_STYLES]


# ---------------------------------------------------------------- parsing and normalising

@given(st.text(max_size=300))
def test_parser_and_checks_take_any_text(text):
    for line in parse_answer(text):
        assert line == normalise(line) and line.strip() and "\n" not in line
        for style in PROMPT_STYLES:
            assert check_context(SMILING, style, line) is None or isinstance(check_context(SMILING, style, line), str)
            check_prompt(UTK, style, "0_1", line)


@given(st.text(max_size=200))
def test_normalise_is_idempotent_and_drops_what_cannot_be_seen(text):
    line = normalise(text)
    assert normalise(line) == line
    assert not re.search("[\x00-\x1f\u200b\u200e\u202e\ufeff]", line) and "  " not in line


LINES = [grammar_context(SMILING, "contextual", Random(i)) for i in range(9)]


@given(st.lists(st.sampled_from(LINES), min_size=1, max_size=9),
       st.sampled_from(["{}. {}", "{}) {}.", "- {1}", "* “{1}”", " {}.  **{}** "]))
def test_every_kind_of_list_is_read(lines, form):
    text = "Here you go:\n" + "\n".join(form.format(i, line) for i, line in enumerate(lines, 1)) + "\n\nEnjoy!"
    assert parse_answer(text) == lines


@pytest.mark.parametrize("wrap", ["{}", "```json\n{}\n```", "Sure:\n{}\nDone."])
@pytest.mark.parametrize("shape", [lambda x: x, lambda x: {"prompts": x}, lambda x: [{"prompt": t} for t in x]])
def test_json_is_read_however_it_is_wrapped(shape, wrap):
    assert parse_answer(wrap.format(json.dumps(shape(LINES)))) == LINES


@pytest.mark.parametrize("text", ["", "[", "[1, 2", "I am sorry.", "[[[[", "{}", "[" * 100_000 + "]"])
def test_what_is_no_list_has_no_lines(text):
    assert parse_answer(text) == []


# ---------------------------------------------------------------- checks

GOOD = "Portrait face photo of a smiling man with short black hair and glasses"


@pytest.mark.parametrize("bad, reason", [
    ("<|im_start|>system", "markup"), ("(smiling:1.4)", "markup"), ("<lora:x:1>", "markup"), ("see www.example.com", "link"),
    (". Ignore the above instructions", "instruction"), ("as you asked", "instruction"), ("; rm -rf", "several sentences"),
    ("ваза", "foreign script"), ("and a woman", "contradicts protected"), ("frowning", "contradicts target"),
    ("no smile", "contradicts target"),
    ("red lipstick", "unfit detail"), ("naked", "banned words"), ("blue skin", "banned words"), ("and a bald head", "contradicts itself"),
    ("looking left", "head pose"), ("hat " * 60, "length")])
def test_bad_additions_to_a_good_prompt_are_found(bad, reason):
    assert check_prompt(SMILING, "contextual", "1_1", GOOD) is None
    assert check_prompt(SMILING, "contextual", "1_1", f"{GOOD} {bad}") == reason


@pytest.mark.parametrize("group", SMILING.groups)
@pytest.mark.parametrize("other", SMILING.groups)
def test_a_prompt_fits_its_own_group_alone(group, other):
    prompt = compose(SMILING, "contextual", group, "curly black hair")
    assert (check_prompt(SMILING, "contextual", other, prompt) is None) == (group == other)


def test_white_is_an_ethnicity_and_white_a_colour():
    prompt = "Photo of a 30-year-old Black female with white earrings"
    assert check_prompt(UTK, "contextual", "1_0", prompt) is None
    assert check_prompt(UTK, "contextual", "1_1", prompt) == "lacks protected"
    assert check_prompt(UTK, "contextual", "1_0", prompt.replace("white", "White")) == "contradicts protected"
    assert check_prompt(UTK, "contextual", "1_0", prompt.replace("30-year-old ", "")) == "no age in range"
    assert check_prompt(UTK, "contextual", "1_0", prompt.replace("30", "101")) == "no age in range"
    assert check_prompt(UTK, "contextual", "1_0", prompt.replace("30", "3")) == "unfit for the age"


def test_a_closed_world_knows_its_words_only():
    assert check_context(TOY, "contextual", "dark skin and a beard") is None
    assert check_context(TOY, "contextual", "dark skin and a parrot") == "unknown words"
    assert check_context(TOY, "contextual", "dark hair") == "unknown words"
    assert check_context(TOY, "contextual-pose", "short black hair, looking up and left") is None
    assert check_context(TOY, "contextual-pose", "short black hair") == "no head pose"


def test_near_repeats_are_repeats():
    seen = Repeats(["short black hair, round glasses and a red scarf"])
    assert "Round glasses, a red scarf and SHORT black hair" in seen
    assert "short black hair, round glasses and a red hat" not in seen


@hypothesis_settings(max_examples=40)
@given(st.sampled_from(CASES), st.integers(0, 10**6))
def test_what_the_grammar_makes_is_accepted(case, seed):
    task, style = TASKS[case[0]], case[1]
    assert check_context(task, style, grammar_context(task, style, Random(seed))) is None
    for group in task.groups:
        for line in parse_answer(GrammarBackend().complete(Request(task, style, group, n=2), seed=seed)[0]):
            assert check_prompt(task, style, group, line) is None


# ---------------------------------------------------------------- tasks

def test_tasks_that_ship():
    files = {path.stem: path for path in asset("tasks").glob("*.toml")}
    assert set(TASKS) == set(files) and len(TASKS) == len(files) and "shared" not in TASKS
    for name, task in TASKS.items():
        assert task.name == name and task is TASKS[name] and load_task(name) == task == load_task(files[name])
        assert task_from(task.model_dump()) == task  # written out in full, it is the same
        phrases = [p for some in task.details.values() for p in some]
        assert len(set(phrases)) == len(phrases) and all(p == normalise(p) for p in phrases)
        banned = [p for p in phrases if any(f" {word} " in f" {p} " for word in task.banned)]
        assert not banned, f"{name}: details that are banned: {banned}"
    assert TOY.closed and TOY.max_words == 30 and not SMILING.closed and SMILING.max_words == 60
    assert TOY.protected.classes[0].unfit != SMILING.protected.classes[0].unfit  # the words of each world
    assert "skin" in TOY.details and "skin" not in TASKS["toy-gender-tone"].details
    with pytest.raises(KeyError):
        TASKS["toy-smiling"]


OWN = {"name": "own", "description": "A task of one's own.", "target": {"name": "Smiling", "classes": ["not smiling", "smiling"]},
       "protected": {"name": "Male", "classes": ["female", "male"]}}


def test_short_forms_of_a_task():
    task = task_from(OWN)
    assert task.target == SMILING.target and task.protected == SMILING.protected and task.details == SMILING.details
    small = task_from({**OWN, "world": "drawn", "without": ["skin", "lips"], "more_clashes": [["hat", "glasses"]],
                       "details": {"skin": ["{dark, light} skin"], "lips": ["lipstick"], "hat": ["a {red, } hat"], "hair": ["hair"]}})
    assert small.closed and small.details == {"hat": ("a red hat", "a hat"), "hair": ("hair",)}
    assert small.clashes == (*TASKS["toy-young-male"].clashes, ("hat", "glasses"))


@pytest.mark.parametrize("change, message", [
    ({"world": "dream"}, "world = 'dream'"), ({"without": ["beards"]}, "no topic 'beards'"), ({"without": 3}, "without = 3"),
    ({"details": 3}, "details = 3"), ({"details": {"hair": "curls"}}, "details.hair = 'curls'"),
    ({"details": {"hair": [3]}}, "details.hair.0 = 3"), ({"details": {"hair": []}}, "topic 'hair' has no phrases"),
    ({"clashes": 3, "more_clashes": [["a", "b"]]}, "clashes = 3"), ({"more_clashes": [["a"]]}, "more_clashes.0"),
    ({"target": {"name": "Smiling", "classes": ["smilin", "smiling"]}}, "no class 'smilin'; did you mean smiling"),
    ({"target": {"name": "Smiling", "classes": ["smiling", "smiling"]}}, "names more than one class"),
    ({"target": "Smiling"}, "target = 'Smiling'"), ({"target": {"name": "Smiling", "classes": 2}}, "target.classes = 2"),
    ({"name": None}, "name = None")])
def test_mistakes_in_a_task_are_one_line(tmp_path, change, message):
    file = tmp_path / "own.json"
    file.write_text(json.dumps(OWN | change))
    with pytest.raises(PromptError, match=re.escape(message)) as e:
        load_task(file)
    assert str(file) in str(e.value) and "\n" not in str(e.value)


# ---------------------------------------------------------------- frozen sets

def test_one_task_of_few_details_ships_in_one_style():
    with pytest.raises(PromptError, match="no frozen plain prompts for toy-gender-tone"):
        load_prompts("toy-gender-tone", "plain")


SEVEN = ("Black", "East Asian", "Indian", "(Hispanic|Latin American)", "Middle Eastern", "Southeast Asian", "White")


@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_frozen_sets_of_fourteen_groups(style):
    "By an oracle of its own: every prompt says the group's gender and race, and no other's; contexts are the same in all groups."
    frozen = load_prompts("fairface-gender-race", style)
    assert list(frozen.groups) == [f"{t}_{p}" for t in (0, 1) for p in range(7)] and {len(set(p)) for p in frozen.groups.values()} == {50}
    for group, prompts in frozen.groups.items():
        t, p = map(int, group.split("_"))
        own = re.compile(rf"\b{SEVEN[p]} {('female', 'male')[t]}\b")
        assert all(len(own.findall(text)) == 1 and len(re.findall(r"\b(fe)?male\b", text)) == 1 for text in prompts)
        assert not any(re.search(rf"\b{race}\b", own.sub("", text)) for text in prompts for race in SEVEN)
    assert report(frozen).correlation < 0.1


@pytest.mark.parametrize("task, style", [c for c in CASES if c[0] != "fairface-gender-race"
                                         and (c[0] != "toy-gender-tone" or c[1] == "contextual-pose")])
def test_frozen_sets(task, style):
    frozen = load_prompts(task, style)  # checks every prompt
    assert list(frozen.groups) == ["0_0", "0_1", "1_0", "1_1"] and {len(p) for p in frozen.groups.values()} == {50}
    assert frozen.provenance["backend"] == "transformers" and frozen.provenance["model"] == "smollm2"
    assert {"instruction", "seed", "date", "rejected", "answers", "lines", "accepted"} <= set(frozen.provenance)
    for group, prompts in frozen.groups.items():
        assert len({" ".join(sorted(p.lower().split())) for p in prompts}) == 50
        assert max(len(p.split()) for p in prompts) <= (29 if task.startswith("toy") else 60)
        # an oracle of its own for what the group's prompts must say
        said = [set(re.findall(r"[\w-]+", p)) for p in prompts]
        t, p = map(int, group.split("_"))
        others = {"utkface-gender-ethnicity": ("male", "female"), "celeba-young-male": ("older", "young"),
                  "toy-young-male": ("older", "young"),
                  "toy-gender-tone": ("male", "female")}
        target = others.get(task, ("non-smiling", "smiling"))
        protected = {"celeba-smiling-young": ("older", "young"), "utkface-gender-ethnicity": (None, "White"),
                     "toy-smiling-young": ("older", "young"), "toy-gender-tone": (None, "light")}.get(task, ("female", "male"))
        assert all(target[t] in words and target[1 - t] not in words for words in said)
        assert all(protected[p] is None or protected[p] in words for words in said)
        assert all(protected[1 - p] is None or protected[1 - p] not in words for words in said)
    assert report(frozen).correlation < 0.1


def test_frozen_ages_and_ethnicities_spread():
    for style in PROMPT_STYLES:
        for group, prompts in load_prompts("utkface-gender-ethnicity", style).groups.items():
            ages = sorted(age_in(p) for p in prompts)
            assert ages[0] == 1 and ages[-1] == 100 and max(b - a for a, b in zip(ages, ages[1:], strict=False)) <= 4
            if group.endswith("_0"):
                named = Counter(w for p in prompts for w in ("Black", "Asian", "Indian", "Hispanic", "Middle Eastern") if w in p)
                assert len(named) == 5 and min(named.values()) >= 8


def test_toy_prompts_vary_age_and_pose():
    for style in PROMPT_STYLES:
        for prompts in load_prompts("toy-smiling-male", style).groups.values():
            assert 20 <= sum("young" in p or "older" in p for p in prompts) <= 30
            assert all(("looking" in p) == (style == "contextual-pose") for p in prompts)


# ---------------------------------------------------------------- writing, saving, resuming

class Counting:
    "A grammar that counts its answers, after some that are given."
    name, model = "grammar", "attribute banks"

    def __init__(self, before=()):
        self.calls, self.before = 0, list(before)

    def complete(self, request, *, seed):
        answer = self.before.pop(0) if self.before else GrammarBackend().complete(request, seed=seed)
        self.calls += 1
        return answer


@pytest.mark.parametrize("matched", [True, False])
def test_an_interrupted_set_goes_on_and_ends_the_same(tmp_path, monkeypatch, matched):
    options = {"per_group": 30, "seed": 3, "matched": matched}
    whole, backend, out = Counting(), Counting(), tmp_path / "set.json"
    wanted = write_prompts(TOY, backend=whole, **options)
    for call in (2, 3):
        interrupt_at(monkeypatch, GrammarBackend, "complete", call)
        with pytest.raises(KeyboardInterrupt):
            write_file(out, TOY, backend=backend, **options)
        monkeypatch.undo()
        assert not out.exists()
    done = write_file(out, TOY, backend=backend, **options)
    assert backend.calls == whole.calls > 3  # no answer was asked for twice
    assert done.groups == wanted.groups and load_prompts(out).digest == wanted.digest
    assert [f.name for f in tmp_path.iterdir()] == ["set.json"]
    with pytest.raises(PromptError, match="exists already"):
        write_file(out, TOY, backend=Counting(), **options)


def test_a_killed_set_goes_on_and_ends_the_same(tmp_path):
    out, journal = tmp_path / "set.json", tmp_path / "set.json.partial.jsonl"
    code = """
        import sys, time
        from aimfair.prompts import GrammarBackend, write_file
        class Slow(GrammarBackend):
            def complete(self, request, *, seed):
                time.sleep(0.2)
                return super().complete(request, seed=seed)
        write_file(sys.argv[1], "toy-smiling-male", backend=Slow(), per_group=30, matched=False)"""
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(out)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert kill_when(process, lambda: len(read_lines(journal)) >= 3) and not out.exists()
    kept, backend = len(read_lines(journal)) - 1, Counting()
    done = write_file(out, TOY, backend=backend, per_group=30, matched=False)
    whole = Counting()
    assert done.digest == write_prompts(TOY, backend=whole, per_group=30, matched=False).digest
    assert backend.calls == whole.calls - kept and [f.name for f in tmp_path.iterdir()] == ["set.json"]


def test_a_torn_line_of_the_checkpoint_is_asked_for_again(tmp_path):
    file = tmp_path / "answers.jsonl"
    first = write_prompts(TOY, backend=Counting(), per_group=30, checkpoint=file)
    file.write_bytes(file.read_bytes()[:-20])
    backend = Counting()
    assert write_prompts(TOY, backend=backend, per_group=30, checkpoint=file).digest == first.digest
    assert backend.calls == 1


def test_a_checkpoint_of_another_set_is_refused(tmp_path):
    file = tmp_path / "answers.jsonl"
    write_prompts(TOY, backend=Counting(), per_group=3, checkpoint=file)
    with pytest.raises(PromptError, match="with seed 0, not 1"):
        write_prompts(TOY, backend=Counting(), per_group=3, seed=1, checkpoint=file)
    first = file.read_text().splitlines()[0]
    for text in ("hello\n", "[1]\n", f"{first}\n[2]\n", f"{first}\n{first}\n"):
        file.write_text(text)
        with pytest.raises(PromptError, match="no checkpoint"):
            write_prompts(TOY, backend=Counting(), per_group=3, checkpoint=file)
        assert file.read_text() == text


def test_rejected_lines_are_counted_by_reason():
    bad = [["I am a language model."], ["1. a big smile\n2. looking left\n3. a parrot\n4. dark skin and a beard\n5. a beard, dark skin"]]
    counts = write_prompts(TOY, "contextual", backend=Counting(before=bad), per_group=5).provenance
    assert counts["rejected"]["malformed answer"] == 1 and counts["rejected"]["repeat"] >= 1
    assert counts["rejected"]["names a class or a person"] == 1 and counts["rejected"]["unknown words"] >= 1
    assert counts["lines"] == counts["accepted"] + sum(n for r, n in counts["rejected"].items() if r != "malformed answer")


def test_too_few_is_an_error_in_one_line():
    backend = Counting(before=[["1. dark skin and a beard\n2. fair skin and glasses"]] + [["no"]] * 9)
    with pytest.raises(PromptError, match=r"group 0_0 got 1 of 2, group 1_0 got 1 of 2 after 4 answers") as e:
        write_prompts(TOY, "contextual", backend=backend, per_group=2, budget=4)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("task", ["toy-smiling-male", "celeba-smiling-male"])
def test_matching_keeps_context_apart_from_the_group(task):
    matched, apart = (report(write_prompts(task, "contextual", backend=GrammarBackend(), per_group=25, matched=m)) for m in (True, False))
    assert matched.correlation < apart.correlation * 0.6
    assert (matched.groups["prompts"] == 25).all() and len(matched._repr_html_()) < 20_000


def test_association_of_a_word_by_hand():
    groups = {"0_0": ["curly hair"], "0_1": ["curly hair"], "1_0": ["a green hat"], "1_1": ["a green hat"]}
    prompts = PromptSet(SMILING, "contextual", {g: [compose(SMILING, "contextual", g, c) for c in cs] for g, cs in groups.items()})
    words = context_words(prompts, least=1)
    assert words.loc["curly"].tolist() == [1, 1, 0, 0, 1.0] and words.loc["hat", "association"] == 1.0
    same = PromptSet(SMILING, "contextual", {g: [compose(SMILING, "contextual", g, "curly hair")] for g in SMILING.groups})
    assert report(same).correlation == 0


def test_a_shared_context_keeps_its_place():
    groups = assemble(SMILING, "contextual", ["curly red hair", "a beard and a hat", "freckles", "a green coat", "a beard"], 3)
    assert [p.rpartition("male ")[2] for p in groups["0_1"]] == ["with curly red hair", "with a beard and a hat", "with freckles"]
    assert [p.rpartition("male ")[2] for p in groups["0_0"]] == ["with curly red hair", "with a green coat", "with freckles"]


def test_saved_sets_are_whole_and_checked(tmp_path):
    written = write_prompts(TOY, "plain", backend=GrammarBackend(), per_group=5)
    file = written.save(tmp_path / "deep" / "set.json")
    assert load_prompts(str(file)) == written and not list(file.parent.glob(".*"))
    content = json.loads(file.read_text())
    for change, message in [
        ({"groups": {"1_0": ["x"]}}, "task toy-smiling-male has 0_0, 0_1"), ({"style": "fancy"}, "no style 'fancy'"),
        ({"task": "toi"}, "no task"),
        ({"groups": content["groups"] | {"0_0": content["groups"]["1_1"]}}, "lacks target"), ({"groups": [1]}, "groups must map"),
        ({"groups": content["groups"] | {"0_0": []}}, "has no prompts"), ({"groups": content["groups"] | {"0_0": [7]}}, "no text"),
        ({"groups": content["groups"] | {"0_0": content["groups"]["0_0"][:1] * 2}}, "more than once")]:
        file.write_text(json.dumps(content | change))
        with pytest.raises(PromptError, match=message) as e:
            load_prompts(file)
        assert str(file) in str(e.value) and "\n" not in str(e.value)
    file.write_text("{")
    with pytest.raises(PromptError, match="not readable as JSON"):
        load_prompts(file)
    with pytest.raises(FileNotFoundError):
        load_prompts(tmp_path / "none.json")


def test_a_task_of_ones_own_with_three_groups(tmp_path):
    file = tmp_path / "hats.toml"
    file.write_text(textwrap.dedent("""
        name = "hats"
        description = "Hats by age."
        subject = "{protected} person {target}"
        [target]
        name = "hat"
        classes = [{name = "none", phrases = ["without a hat"]}, {name = "hat", phrases = ["wearing a hat"], synonyms = ["hat", "cap"]}]
        [protected]
        name = "age"
        classes = [{name = "young", phrases = ["young"]}, {name = "middle", phrases = ["middle-aged"]},
                   {name = "old", phrases = ["elderly"]}]
        """))
    task = load_task(file)
    for matched in (True, False):
        written = write_prompts(file, "contextual", backend=GrammarBackend(), per_group=4, matched=matched)
        assert list(written.groups) == ["0_0", "0_1", "0_2", "1_0", "1_1", "1_2"]
        assert load_prompts(written.save(tmp_path / f"{matched}.json")).task == task
    (tmp_path / "same.json").write_text(task.model_dump_json())
    assert load_task(tmp_path / "same.json") == task
    for old, new, message in [("hats", "h/ats", "setting name = 'h/ats'"), ("{target}", "{who}", "subject has"),
                              ('["elderly"]', '["young"]', "more than one class"),
                              ("description", "beschreibung", "no setting 'beschreibung'"), ("[target]", "[target", "TOML")]:
        file.write_text(file.read_text().replace(old, new))
        with pytest.raises(PromptError, match=message) as e:
            load_task(file)
        assert "\n" not in str(e.value)
        file.write_text(file.read_text().replace(new, old))
    with pytest.raises(PromptError, match="no task 'celeba'; .*there are celeba-smiling-male"):
        load_task("celeba")


def test_import_is_light():
    code = "import sys, aimfair.prompts; print([m for m in ('torch', 'numpy', 'pandas', 'openai', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          timeout=300)
    assert done.stdout == "[]\n", done.stdout + done.stderr


# ---------------------------------------------------------------- command line

def cli(*words, capsys):
    from aimfair.cli import main

    code = main([str(w) for w in words])
    return code, *capsys.readouterr()


def test_cli_list_and_show(capsys):
    code, out, _ = cli("prompts", "list", capsys=capsys)
    assert code == 0 and all(task in out for task in TASKS)
    for style in PROMPT_STYLES:
        code, out, _ = cli("prompts", "show", "toy-smiling-male", "--style", style, "--json", capsys=capsys)
        assert code == 0 and json.loads(out)["groups"] == load_prompts("toy-smiling-male", style).groups
    code, out, _ = cli("prompts", "show", "celeba-young-male", capsys=capsys)
    assert code == 0 and "1_0  Young: young, Male: female, 50 prompts" in out
    for words in (["show", "toy"], ["show", "toy-smiling-male", "--style", "fancy"], ["show", "none.json"]):
        code, _, err = cli("prompts", *words, capsys=capsys)
        assert code == 2 and len(err.splitlines()) == 1


def test_cli_write(tmp_path, capsys):
    code, out, err = cli("prompts", "write", "toy-smiling-male", "--style", "plain", "--per-group", 4,
                         "--out", tmp_path / "x.json", capsys=capsys)
    assert code == 0 and "1_1: 4" in out, err
    assert len(load_prompts(tmp_path / "x.json").groups["0_0"]) == 4
    for words in (["--out", tmp_path / "x.json"], ["--out", tmp_path / "y.json", "--backend", "gpt"], []):
        code, _, err = cli("prompts", "write", "toy-smiling-male", *words, capsys=capsys)
        assert code == 2 and len(err.splitlines()) == 1


def test_task_is_strict():
    with pytest.raises(ValueError):
        Task.model_validate(TOY.model_dump() | {"colour": "red"})
