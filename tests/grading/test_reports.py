"""Reports: every form of them says the same, in its own rules, and nothing that a learner wrote can break one."""

import csv
import dataclasses
import io
import json
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from course_utils.exercises import course_exercises
from course_utils.grading.feedback import escaped, feedback, fenced
from course_utils.grading.gradebook import gradebook, harmless
from course_utils.grading.gradescope import gradescope
from course_utils.grading.junit import junit
from course_utils.grading.page import CELLS, commonest, failures, overview, page
from course_utils.grading.reports import write_reports
from course_utils.grading.results import STATES, Result, Settings, from_json
from course_utils.grading.text import clean, clean_name, clean_result, file_name
from course_utils.grading.weights import difficulty_weights, number, points, read_weights
from course_utils.places import CourseError
from tests.conftest import ROOT
from tests.support.made_up_results import MISTAKES, NASTY, a_class, all_of, made_up

WEIGHTS = difficulty_weights()
SETTINGS = Settings()
EXERCISES = [e.name for e in course_exercises()["02"]]
FOR_EACH = [("feedback", "md"), ("junit", "xml"), ("gradescope", "json")]


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"))))


@pytest.fixture(scope="module")
def nasty() -> list[Result]:
    """Learners, messages and problems that try to break out of every format at once."""
    text = f"causal_mask: {NASTY}\x00\x1b[31m\ud800]]>```\n````\n=1+1"
    wrong = made_up("causal_mask", "wrong", f"{NASTY}\x08", text)
    own = all_of("02", f"=cmd|{NASTY}\x07", causal_mask=wrong)
    return [
        dataclasses.replace(own, problems=(f"-problem {NASTY}\ud800\nsecond line",)),
        all_of("02", "../../etc/passwd"),
    ]


# --- weights --------------------------------------------------------------------------------------------------------


def test_a_right_answer_is_worth_its_difficulty() -> None:
    result = all_of("02", "ada", "wrong", causal_mask=made_up("causal_mask", "correct"))
    difficulty = {e.name: e.difficulty for e in course_exercises()["02"]}
    assert points(result, WEIGHTS) == (difficulty["causal_mask"], sum(difficulty.values()))


@pytest.mark.parametrize("state", [state for state in STATES if state != "correct"])
def test_nothing_but_a_right_answer_counts(state: str) -> None:
    assert points(all_of("02", "ada", state), WEIGHTS).got == 0


def test_a_file_overrides_the_weights_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "weights.toml").write_text("causal_mask = 2.5  # much discussed\nLayerNorm = 0\n")
    weights = read_weights(tmp_path / "weights.toml")
    assert weights == WEIGHTS | {"causal_mask": 2.5, "LayerNorm": 0.0}
    result = all_of("02", "ada", "wrong", causal_mask=made_up("causal_mask", "correct"))
    assert points(result, weights).got == 2.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("causal_mast = 2", "there is no exercise 'causal_mast'; the nearest are causal_mask"),
        ("causal_mask = -1", "causal_mask = -1 is no weight"),
        ("causal_mask = nan", "causal_mask = nan is no weight"),
        ("causal_mask = inf", "causal_mask = inf is no weight"),
        ("causal_mask = true", "causal_mask = True is no weight"),
        ('causal_mask = "2"', "causal_mask = '2' is no weight"),
        ("causal_mask: 2", "cannot be read"),
        ("causal_mask = 1\ncausal_mask = 2", "cannot be read"),
    ],
)
def test_weights_that_make_no_sense_are_refused_by_name(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "weights.toml").write_text(text)
    with pytest.raises(CourseError, match=re.escape(words)):
        read_weights(tmp_path / "weights.toml")


def test_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CourseError, match=r"none\.toml cannot be read"):
        read_weights(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("value", "text"), [(3.0, "3"), (2.5, "2.5"), (0.1 + 0.2, "0.3"), (0.0, "0"), (1e6, "1000000")]
)
def test_points_are_written_as_people_do(value: float, text: str) -> None:
    assert number(value) == text


# --- texts and file names -------------------------------------------------------------------------------------------


def test_control_characters_become_visible() -> None:
    assert clean("a\x00b\x1b[1m\r\n\tc\ud800\u202e") == "a\\x00b\\x1b[1m\n    c\\ud800\\u202e"
    assert clean_name("a\tb\nc\x00") == "a\\tb\\nc\\x00"


@pytest.mark.parametrize("name", ["ada", "ada.lovelace", "group_7-b", "42"])
def test_a_plain_name_is_its_own_file_name(name: str) -> None:
    assert file_name(name) == name


STRANGE = [
    "Ada",
    "ADA",
    "a da",
    "a/da",
    "../../etc/passwd",
    "..",
    ".",
    "",
    ".hidden",
    "con",
    "nul.txt",
    "a.",
    "-rf",
    "Zoë",
]
STRANGE += ["李雷", "韩梅梅", "x" * 300, "a\\b", "a:b", "a\x00b", "🦉", "ada~0123456789ab", "a\ud800", NASTY]


def test_strange_names_become_file_names_that_nobody_shares() -> None:
    names = [file_name(name) for name in STRANGE]
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,80}", name) for name in names), names
    assert len({name.casefold() for name in [*names, "ada", "learner"]}) == len(STRANGE) + 2


# --- each report ----------------------------------------------------------------------------------------------------


def test_the_gradebook_has_a_row_for_each_learner_and_chapter() -> None:
    text = gradebook([all_of("02", "ada"), all_of("04", "ada", "wrong"), all_of("02", "Zoë", "timed out")], WEIGHTS)
    assert text.startswith("\ufefflearner,chapter,points,of,correct,wrong,not written yet,timed out,cheated,error")
    assert text.count("\r\n") == 4 and text.count("\n") == 4
    ada, later, zoe = rows(text)
    n = len(course_exercises()["02"])
    assert (ada["learner"], ada["chapter"], ada["correct"], ada["causal_mask"]) == ("ada", "02", str(n), "correct")
    assert ada["points"] == ada["of"] == str(sum(e.difficulty for e in course_exercises()["02"]))
    assert (later["chapter"], later["points"], later["causal_mask"]) == ("04", "0", "")
    assert (zoe["learner"], zoe["timed out"], zoe["causal_mask"]) == ("Zoë", str(n), "timed out")


def test_the_gradebook_counts_the_core_path_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    course = dict(course_exercises())
    course["02"] = tuple(dataclasses.replace(e, optional=e.name != "causal_mask") for e in course["02"])
    monkeypatch.setattr("course_utils.grading.gradebook.course_exercises", lambda: course)
    ada, bob = rows(gradebook([all_of("02", "ada"), all_of("02", "bob", "wrong")], WEIGHTS))
    [difficulty] = [e.difficulty for e in course["02"] if e.name == "causal_mask"]
    assert (ada["core points"], ada["of core"]) == (str(difficulty), str(difficulty))
    assert (bob["core points"], bob["of core"]) == ("0", str(difficulty))


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_is_a_formula(start: str) -> None:
    assert harmless(f"{start}1+1") == f"'{start}1+1"
    assert harmless(f"1{start}") == f"1{start}"
    assert rows(gradebook([all_of("02", f"{start}SUM(A1)")], WEIGHTS))[0]["learner"].startswith("'")


def test_junit_tells_failures_errors_and_what_is_not_written() -> None:
    others = {name: made_up(name, state) for name, state in zip(EXERCISES, STATES, strict=False)}
    mixed = dataclasses.replace(all_of("02", "ada", **others), problems=("one", "two"))
    (suite,) = ElementTree.fromstring(junit([mixed]))
    n = len(course_exercises()["02"])
    counts = {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped", "time")}
    assert counts == {"tests": str(n), "failures": "1", "errors": "3", "skipped": "1", "time": "1.500"}
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert list(cases) == EXERCISES
    outcomes = [[child.tag for child in cases[name]] for name in EXERCISES[: len(STATES)]]
    assert outcomes == [[], ["failure"], ["skipped"], ["error"], ["error"], ["error"]]
    failure = cases[EXERCISES[1]][0]
    assert failure.text == others[EXERCISES[1]].message
    assert failure.get("message") == failure.text.partition("\n")[0]
    assert suite[-1].tag == "system-err" and suite[-1].text == "one\ntwo"


def test_gradescope_gets_a_test_for_each_exercise() -> None:
    result = all_of("02", "ada", "not written yet", causal_mask=made_up("causal_mask", "correct"))
    content = json.loads(gradescope([dataclasses.replace(result, problems=("one",))], WEIGHTS))
    assert [test["name"] for test in content["tests"]] == EXERCISES
    by_name = {test["name"]: test for test in content["tests"]}
    right, other = by_name["causal_mask"], by_name[EXERCISES[0]]
    assert right["score"] == right["max_score"] == WEIGHTS["causal_mask"] and right["status"] == "passed"
    assert other["score"] == 0 and other["max_score"] == WEIGHTS[EXERCISES[0]] and other["status"] == "failed"
    assert other["output"] == f"{EXERCISES[0]}: not written yet."
    assert {test["visibility"] for test in content["tests"]} == {"visible"}
    assert content["output"] == "one" and content["execution_time"] == 1.5
    assert len({test["number"] for test in content["tests"]}) == len(EXERCISES)


def test_feedback_shows_the_lines_of_the_check() -> None:
    wrong = made_up("causal_mask", "wrong", MISTAKES[0])
    text = feedback(
        [all_of("02", "ada", causal_mask=wrong, LayerNorm=made_up("LayerNorm", "not written yet"))], WEIGHTS
    )
    assert f"### `causal_mask`: wrong\n\n```text\n{wrong.message}\n```" in text
    assert "Not written yet: `LayerNorm`." in text
    assert f"{len(EXERCISES) - 2} of {len(EXERCISES)} exercises are correct" in text


def test_markdown_cannot_be_broken_out_of() -> None:
    assert fenced("a ```` b").splitlines()[::2] == ["`````text", "`````"]
    assert escaped("<b>*a*</b> & `c`") == r"\<b\>\*a\*\<\/b\> \& \`c\`"


# --- the page -------------------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """The tags and the texts of a page, as a browser would understand them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_every_learner_and_exercise() -> None:
    results = a_class(12)
    seen = Seen(page(results, WEIGHTS))
    cells = [attrs["class"] for tag, attrs in seen.tags if tag == "td" and attrs.get("class") in dict(CELLS.values())]
    order = [CELLS[e.state][0] for result in results for e in result.exercises]
    assert cells == order and len(set(order)) > 3
    assert all(result.learner in seen.text for result in results)
    assert [name for name in EXERCISES if name not in seen.text] == []


def test_the_page_leads_nowhere_but_to_the_feedback() -> None:
    text = page(a_class(3), WEIGHTS)
    addresses = [
        v for _, attrs in Seen(text).tags for k, v in attrs.items() if k in ("href", "src", "action", "srcset")
    ]
    assert addresses == [f"feedback/learner-00{n}.md" for n in range(3)]
    assert "url(" not in text and "@import" not in text and "http://" not in text and "https://" not in text


def test_many_chapters_are_found_part_by_part() -> None:
    results = [*a_class(3), *a_class(2, "04"), *a_class(2, "12"), all_of("12", "learner-002", "wrong")]
    seen = Seen(page(results, WEIGHTS))
    headings = re.findall(r"<h[23][^>]*>([^<]*)</h", page(results, WEIGHTS))
    fails = ": what people fail"
    assert headings[:7] == [
        *("All chapters", "I · From text to circuits", "Chapter 02 A transformer from scratch", f"Chapter 02{fails}"),
        "Chapter 04 Induction heads",
        *(f"Chapter 04{fails}", "IV · Whole algorithms"),
    ]
    links = [attrs["href"] for tag, attrs in seen.tags if tag == "a" and (attrs["href"] or "").startswith("#")]
    assert links == ["#chapter-02", "#chapter-04", "#chapter-12", "#problems", "#times"]
    assert {link.removeprefix("#") for link in links if link} <= {attrs.get("id") for _, attrs in seen.tags}
    assert "12 Balanced brackets" in seen.text


def test_the_overview_has_the_points_of_all_chapters() -> None:
    own = {"02": [all_of("02", "ada"), all_of("02", "bob", "wrong")], "12": [all_of("12", "ada", "wrong")]}
    text = "".join(overview(own, WEIGHTS))
    rows = [re.findall(r'data-value="([^"]*)">([^<]*)', row) for row in text.split('<th scope="row">')[1:]]
    full = {chapter: points(results[0], WEIGHTS).of for chapter, results in own.items()}
    got, of = number(full["02"]), number(full["02"] + full["12"])
    assert rows == [
        [(got, f"{got} of {of}"), ("100.0", "100%"), ("0.0", "0%")],
        [("0", f"0 of {got}"), ("0.0", "0%"), ("-1", "")],
    ]


def test_the_exercises_that_people_fail_stand_first_with_their_commonest_mistake() -> None:
    one, two = EXERCISES[3], EXERCISES[1]
    learners = [
        {one: made_up(one, "wrong", MISTAKES[0]), two: made_up(two, "timed out")},
        {one: made_up(one, "wrong", MISTAKES[1]), two: made_up(two, "not written yet")},
        {one: made_up(one, "wrong", MISTAKES[1])},
    ]
    text = "".join(failures("02", [all_of("02", str(n), **own) for n, own in enumerate(learners)]))
    found = re.findall(
        r'<th scope="row">(\w+)</th><td class="number">(\d+)</td>.*?> (\d+)</td><td class="words">(.*?)<', text
    )
    assert found == [(one, "3", "3", f"2 × {MISTAKES[1]}"), (two, "1", "2", "none has a known cause")]
    assert commonest([made_up(one, "wrong", m) for m in ("b", "a", "b", "a")]) == "2 × a"


def test_problems_are_named_once_with_all_who_have_them() -> None:
    cheat = made_up("causal_mask", "cheated")
    learners = [
        dataclasses.replace(all_of("02", n, causal_mask=cheat), problems=("no kernel",)) for n in ("ada", "bob")
    ]
    text = Seen(page(learners, WEIGHTS)).text
    assert text.count("no kernel") == 1 and "no kernelada (02), bob (02)" in text


# --- all together ---------------------------------------------------------------------------------------------------


def test_the_folder_of_reports(tmp_path: Path) -> None:
    results = [all_of("04", "Zoë"), all_of("02", "ada"), all_of("02", "Zoë")]
    assert write_reports(tmp_path, results, WEIGHTS, SETTINGS) == tmp_path / "report.html"
    zoe = file_name("Zoë")
    expected = ["gradebook.csv", "report.html", "results.json"]
    expected += [f"{kind}/{name}.{end}" for kind, end in FOR_EACH for name in (zoe, "ada")]
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == sorted(expected)
    assert "Chapter 02" in (tmp_path / f"feedback/{zoe}.md").read_text(encoding="utf-8")
    assert "Chapter 04" in (tmp_path / f"feedback/{zoe}.md").read_text(encoding="utf-8")


def test_the_order_of_the_results_makes_no_difference(tmp_path: Path) -> None:
    results = a_class(9)
    write_reports(tmp_path / "one", results, WEIGHTS, SETTINGS)
    random.Random(1).shuffle(results)
    write_reports(tmp_path / "two", results, WEIGHTS, SETTINGS)
    for path in (p for p in (tmp_path / "one").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path.name


def test_results_are_what_their_documentation_says(tmp_path: Path, nasty: list[Result]) -> None:
    schema = json.loads((ROOT / "docs/grading/results.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    results = [*a_class(4), *nasty]
    write_reports(tmp_path, results, WEIGHTS, SETTINGS)
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    jsonschema.validate(content, schema)
    assert from_json(content) == sorted(map(clean_result, results), key=lambda r: (r.learner, r.chapter))
    described = schema["properties"]["results"]["items"]["properties"]
    assert list(described) == [field.name for field in dataclasses.fields(Result)]
    assert described["exercises"]["items"]["properties"]["state"]["enum"] == list(STATES)
    assert all(f"`{name}`" in (ROOT / "docs/grading/results.md").read_text(encoding="utf-8") for name in described)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.update(schema=2),
        lambda content: content["results"][0].pop("learner"),
        lambda content: content["results"][0].update(chapter="2"),
        lambda content: content["results"][0]["exercises"][0].update(state="fine"),
        lambda content: content["results"][0]["exercises"][0].update(seconds=-1),
        lambda content: content["results"][0].update(surprise=1),
    ],
)
def test_the_schema_refuses_what_is_not_so(damage: Callable[[Any], Any], tmp_path: Path) -> None:
    schema = json.loads((ROOT / "docs/grading/results.schema.json").read_text(encoding="utf-8"))
    write_reports(tmp_path, a_class(1), WEIGHTS, SETTINGS)
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    damage(content)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)


def test_nothing_that_a_learner_wrote_breaks_a_report(tmp_path: Path, nasty: list[Result]) -> None:
    out = tmp_path / "out"
    write_reports(out, nasty, WEIGHTS, SETTINGS)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.is_relative_to(out) for path in files) and len(files) == 3 + 2 * 3
    for path in files:
        text = path.read_text(encoding="utf-8")  # no lone surrogate was written
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f]", text), path
    tags = Seen((out / "report.html").read_text(encoding="utf-8")).tags
    assert [tag for tag, _ in tags].count("script") == 1 and "img" not in [tag for tag, _ in tags]
    assert not any(name.startswith("on") for _, attrs in tags for name in attrs)
    for path in (out / "junit").iterdir():
        ElementTree.parse(path)
    for path in (out / "gradescope").iterdir():
        json.loads(path.read_text(encoding="utf-8"))
    (table,) = [row for row in rows((out / "gradebook.csv").read_text(encoding="utf-8")) if "cmd" in row["learner"]]
    assert table["learner"].startswith("'=") and table["problems"].startswith("'-")
    (markdown,) = [text for path in (out / "feedback").iterdir() if "cmd" in (text := path.read_text(encoding="utf-8"))]
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert "<script>" in markdown and not re.search(r"(?<!\\)<", outside)


def test_a_report_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reports(tmp_path, a_class(2), WEIGHTS, SETTINGS)
    before = (tmp_path / "gradebook.csv").read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_reports(tmp_path, a_class(5), WEIGHTS, SETTINGS)
    assert (tmp_path / "gradebook.csv").read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))


def test_the_page_of_a_big_class_is_not_too_large() -> None:
    text = page(a_class(300), WEIGHTS)
    assert text.count("<tr>") > 300 and len(text.encode()) < 4_000_000
