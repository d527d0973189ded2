"""The gradebook does not depend on the order in which exercises are checked, whatever answers do to what they get."""

import json
import random
from pathlib import Path

import pytest

from course_utils.exercises import course_exercises
from course_utils.grading.grade import Attempt, Server
from course_utils.grading.results import Settings, Submission
from tests.conftest import ROOT
from tests.grading.submissions import packed
from tests.support.depends import chapter_parts, fingerprint

pytestmark = pytest.mark.slow

PROCESSES = [ROOT / "course_utils" / "grading" / name for name in ("server.py", "worker.py")]  # started by name

# Answers rightly, then spoils what it can: arguments emptied, gradients off, another dtype, other random numbers.
SPOILING = """

right_{symbol} = {symbol}


def {symbol}(*args, **others):
    answer = right_{symbol}(*args, **others)
    for given in [*args, *others.values()]:
        if isinstance(given, torch.Tensor):
            given.detach().zero_()
        elif isinstance(given, torch.nn.Module):
            given.train(not given.training).requires_grad_(False)
            for parameter in given.parameters():
                parameter.data.zero_()
        elif isinstance(given, list | dict | set):
            given.clear()
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    return answer
"""


def spoilt(chapter: str) -> bytes:
    """The solution notebook with every third of its functions spoiling what it gets."""
    path = next((ROOT / "solutions").glob(f"{chapter}_*.ipynb"))
    notebook = json.loads(path.read_text(encoding="utf-8"))
    functions = 0
    for cell in notebook["cells"]:
        symbol = cell["metadata"].get("course", {}).get("exercise")
        source = "".join(cell["source"])
        if symbol and f"\ndef {symbol}(" in f"\n{source}":
            functions += 1
            if functions % 3 == 1:
                cell["source"] = "import torch\n\n" + source + SPOILING.format(symbol=symbol)
    return packed(notebook)


@pytest.mark.unless_unchanged(
    "chapters", lambda chapter: fingerprint(*chapter_parts(chapter), *PROCESSES, Path(__file__))
)
@pytest.mark.parametrize("chapter", sorted(course_exercises()))
def test_no_answer_costs_another_exercise(box: str, chapter: str, tmp_path: Path):
    submission = Submission("ada", chapter, tmp_path / f"{chapter}.ipynb", content=spoilt(chapter))
    lesson = [exercise.name for exercise in course_exercises()[chapter]]
    shuffled = random.Random(0).sample(lesson, len(lesson))
    server = Server(box)
    books = []
    for order in (lesson, lesson[::-1], shuffled):
        attempt = Attempt(submission, Settings(sandbox=box))
        attempt.symbols = order
        result = attempt.grade(server)
        assert not result.problems
        books.append({one.exercise: (one.state, one.message) for one in result.exercises})
    server.close()
    assert books[0] == books[1] == books[2]
    states = [state for state, _ in books[0].values()]
    assert states.count("wrong") >= 3 and states.count("correct") >= 3
