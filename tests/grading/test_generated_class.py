"""The class that `benchmarks/generated_class.py` makes up fits the chapters as they are."""

import json
import random
import sys
from pathlib import Path

from course_utils.exercises import course_exercises
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from generated_class import MISTAKES, every_chapter, notebooks, write, wrong


def test_each_known_mistake_is_one_that_the_solution_can_make() -> None:
    _, _, answers = notebooks("02")
    for exercise, mistakes in MISTAKES.items():
        assert all(before in answers[exercise] for before, _ in mistakes), exercise


def test_there_is_a_notebook_of_every_chapter(tmp_path: Path) -> None:
    chapters = every_chapter()
    assert chapters == sorted(course_exercises())
    write(tmp_path, 2 * len(chapters), chapters=chapters)
    paths = sorted(tmp_path.iterdir())
    assert sorted(path.name[:2] for path in paths) == sorted(2 * chapters)
    assert all(json.loads(path.read_text(encoding="utf-8"))["cells"] for path in paths)


def test_a_careless_answer_is_another_one() -> None:
    answer = notebooks("02")[2]["causal_mask"]
    assert wrong("causal_mask", answer, random.Random(0)) != answer
    assert wrong("x", "return a + b", random.Random(0)) == "return a - b"
