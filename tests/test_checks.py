"""Every exercise of the course, held to the same promises; what a section adds stands in `tests/chNN/test_SECTION.py`.

The reference passes its check and the stub counts as unsolved. Each known mistake (the table beside the check) is
refused with its own sentence, each surprise (a mistake that the check does not know) with the words beside it, and
right answers in another style pass. Small changes of the reference are refused. `--notebook PATH` checks a learner:
an exercise that is not written yet is skipped, and a wrong answer fails.
"""

import contextlib
import functools
import importlib
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from course_utils.checks import CheckFailed, NotWritten, find_checks, refuse_foreign, run_check
from course_utils.checks.mistakes import mistakes_of
from course_utils.checks.running import run_once
from course_utils.lint import read_lesson
from course_utils.notebook import exercise, explained, load_notebook
from course_utils.places import CourseError
from tests.conftest import ROOT
from tests.support import strangers
from tests.support.depends import fingerprint
from tests.support.mutation import survivors

CHECKS = find_checks()
EXERCISES = [(chapter, symbol) for chapter, checks in CHECKS.items() for symbol in checks]
IDS = [f"{chapter}-{symbol}" for chapter, symbol in EXERCISES]
KNOWN = ROOT / "tests" / "known_mistakes.json"  # how many each check knew, when last recorded
FEWEST = 4  # mistakes for an exercise, known and surprising together

every_exercise = pytest.mark.parametrize(("chapter", "symbol"), EXERCISES, ids=IDS)


def file_of(chapter: str, folder: str, pattern: str) -> Path:
    (path,) = (ROOT / folder).glob(pattern.format(chapter))
    return path


def reference(chapter: str, symbol: str) -> Any:
    """The solution, from the chapter's module."""
    return getattr(importlib.import_module(f"solutions.{file_of(chapter, 'solutions', 'ch{}_*.py').stem}"), symbol)


def section(chapter: str, symbol: str) -> ModuleType:
    """What the tests of the exercise's section add: `course_utils.checks.ch02.layers` has `tests.ch02.test_layers`."""
    return importlib.import_module(f"tests.ch{chapter}.test_{CHECKS[chapter][symbol].__module__.rpartition('.')[2]}")


def answers(kind: str) -> Any:
    """Parametrize over the entries of `SURPRISES` or `ALSO_RIGHT` of every exercise."""
    found = [
        pytest.param(chapter, symbol, number, id=f"{chapter}-{symbol}-{number}")
        for chapter, symbol in EXERCISES
        for number in range(len(getattr(section(chapter, symbol), kind, {}).get(symbol, ())))
    ]
    return pytest.mark.parametrize(("chapter", "symbol", "number"), found)


@functools.cache
def loaded(path: Path, chapter: str) -> ModuleType:
    return load_notebook(path, CHECKS[chapter])


def from_notebook(path: Path, chapter: str, symbol: str) -> Any:
    """What stands in a notebook under that name."""
    found = exercise(loaded(path, chapter), symbol)
    refuse_foreign(symbol, found)
    return found


@every_exercise
def test_exercise(chapter: str, symbol: str, request: pytest.FixtureRequest) -> None:
    path: Path | None = request.config.getoption("--notebook")
    if path is not None and path.name[:2] != chapter:
        pytest.skip(f"{path.name} is not of chapter {chapter}")
    try:
        found = from_notebook(path, chapter, symbol) if path else reference(chapter, symbol)
        run_check(CHECKS[chapter][symbol], found)
    except NotWritten as error:
        if path is None:
            raise
        pytest.skip(str(error))
    except (CheckFailed, CourseError) as error:
        wrong_answer = path is not None and isinstance(error, CheckFailed)
        message = explained(loaded(path, chapter), symbol, str(error)) if wrong_answer else str(error)
        raise pytest.fail.Exception(message, pytrace=False) from None


@every_exercise
def test_stub_is_unsolved(chapter: str, symbol: str) -> None:
    stub = from_notebook(file_of(chapter, "chapters", "{}_*.ipynb"), chapter, symbol)
    with pytest.raises(NotWritten):
        run_check(CHECKS[chapter][symbol], stub)


def refusal(chapter: str, symbol: str, answer: Any) -> str:
    """What a learner reads about this answer: never a traceback or the solution, and always more than "wrong"."""
    with pytest.raises(CheckFailed) as caught:
        run_check(CHECKS[chapter][symbol], answer)
    message = str(caught.value)
    ours = "\n".join(line for line in message.splitlines() if not line.startswith("  at line"))
    assert message.startswith(symbol)
    assert len(message.splitlines()) > 1
    assert "Traceback" not in message
    assert not [secret for secret in section(chapter, symbol).SECRETS if secret in ours], message
    return message


@pytest.mark.parametrize(
    ("chapter", "symbol", "sentence"),
    [
        pytest.param(chapter, symbol, sentence, id=f"{chapter}-{symbol}-{sentence[:50]}")
        for chapter, symbol in EXERCISES
        for sentence in mistakes_of(CHECKS[chapter][symbol])
    ],
)
def test_known_mistake_meets_its_own_sentence(chapter: str, symbol: str, sentence: str) -> None:
    message = refusal(chapter, symbol, mistakes_of(CHECKS[chapter][symbol])[sentence])
    assert f"This is what you get if {sentence}" in message, message


@answers("SURPRISES")
def test_surprise_is_refused_without_a_cause(chapter: str, symbol: str, number: int) -> None:
    words, answer = section(chapter, symbol).SURPRISES[symbol][number]
    message = refusal(chapter, symbol, answer)
    assert words in message, message
    assert "This is what you get if" not in message


@answers("ALSO_RIGHT")
def test_another_right_answer_passes(chapter: str, symbol: str, number: int) -> None:
    run_check(CHECKS[chapter][symbol], section(chapter, symbol).ALSO_RIGHT[symbol][number])


# What lies on the way of training or of attribution; modules do too. Elsewhere a result may come without a graph.
PROMISE_A_GRADIENT = set(
    "cross_entropy attention_scores causal_mask gelu_new apply_rotary masked_lm_loss lm_loss"
    " logit_difference normalised_metric unbalanced_scores answer_loss tabulated_logits"
    " transcoder_loss run_replaced".split()
)

# Exercises for which a transformation of tests/support/strangers.py turns a right answer into a wrong one, and why.
NOT_RIGHT = {
    "a batch of one, row by row": {
        "logits_at_end": "one row's end is given for all rows",
        "cross_entropy_gradient": "the loss is a mean over the batch",
        "generate": "`pick` is to see all rows at once",
        "ablate_heads": "the reference has as many rows as the batch",
        "logit_difference": "the dataset has as many rows as the batch",
        "normalised_metric": "the dataset has as many rows as the batch",
        "run_patched": "the cache has as many rows as the batch",
        "run_over_direct_paths": "the cache has as many rows as the batch",
        "path_patch": "the metric is to see all rows at once",
        "interchange_intervention": "the cache has as many rows as the batch",
        "neuron_contributions": "the cache has as many rows as the batch",
        "run_steered": "there is a position for each text",
        "harvest_windows": "there is an end for each text",
        "shuffle_windows": "what a row gets comes from other rows",
        "patchscope": "there is a position for each text",
        "run_replaced": "the errors have as many rows as the batch",
    },
    "in double precision inside": {
        "run_oracle": "the oracle's own weights stay in single precision",
        "transcoder_loss": "the transcoder has a dtype of its own",
    },
    "inputs that are not contiguous": {"MyHookPoint": "without functions the activation itself is to come out"},
    "results that are views": {
        "MyHookPoint": "without functions the activation itself is to come out",
        "parameter_groups": "the parameters themselves are to be handed on",
        "add_adapters": "the parameters themselves are to be handed on",
    },
}

# Exercises for which a transformation spoils nothing that was promised, and why.
NOT_WRONG = {
    "`optimizer` changed in place": {"train_step": "it is to step"},
    "`model` changed in place": {"add_adapters": "it is to add to it"},
}


@every_exercise
def test_right_answers_from_a_stranger_pass(chapter: str, symbol: str) -> None:
    """All transformations at once; where that is refused, one at a time, to say which."""
    run, answer = functools.partial(run_check, CHECKS[chapter][symbol]), reference(chapter, symbol)
    fitting = {what: change for what, change in strangers.RIGHT.items() if symbol not in NOT_RIGHT.get(what, {})}
    altogether = answer
    for change in fitting.values():
        altogether = change(altogether) or altogether
    try:
        run(altogether)
    except CheckFailed:
        for what, change in fitting.items():
            try:
                run(change(answer) or answer)
            except CheckFailed as refusal:
                pytest.fail(f"{what}: {refusal}", pytrace=False)
        raise


@every_exercise
def test_spoiled_answers_from_a_stranger_are_refused(chapter: str, symbol: str) -> None:
    check, answer = CHECKS[chapter][symbol], reference(chapter, symbol)
    passed = []
    for what, change in strangers.wrong_for(answer).items():
        spoiled = change(answer)
        promised = what != "a detached result" or isinstance(answer, type) or symbol in PROMISE_A_GRADIENT
        if spoiled is None or not promised or symbol in NOT_WRONG.get(what, {}):
            continue
        try:
            run_once(check, spoiled)
        except CheckFailed:
            continue
        if getattr(spoiled, "spoiled", True):
            passed.append(what)
    assert not passed


@every_exercise
def test_every_exercise_has_mistakes_surprises_and_another_right_answer(chapter: str, symbol: str) -> None:
    known, own = mistakes_of(CHECKS[chapter][symbol]), section(chapter, symbol)
    assert known, "its check knows no mistake: see known_mistakes"
    assert own.SURPRISES.get(symbol), f"{own.__name__}.SURPRISES has none"
    assert own.ALSO_RIGHT.get(symbol), f"{own.__name__}.ALSO_RIGHT has none"
    assert len(known) + len(own.SURPRISES[symbol]) >= FEWEST


def depends_on(chapter: str, symbol: str) -> str:
    """The exercise, its check, how it is changed, and what is let off: the mutants run again when one of these does."""
    let_off = section(chapter, symbol).STILL_RIGHT
    return fingerprint(reference(chapter, symbol), CHECKS[chapter][symbol], survivors, let_off)


@pytest.mark.slow
@pytest.mark.unless_unchanged("mutants", depends_on)
@every_exercise
def test_small_changes_of_the_reference_are_refused(
    chapter: str, symbol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One operator, number, comparison or argument at a time; `STILL_RIGHT` has the changes that do no harm."""
    monkeypatch.chdir(tmp_path)  # one that loses its folder writes here, and not into the checkout
    own = section(chapter, symbol)
    path = file_of(chapter, "solutions", "ch{}_*.py")
    let_off = getattr(own, "ONLY_ON_GPU", None)
    assert survivors(path, symbol, CHECKS[chapter][symbol], let_off) <= own.STILL_RIGHT


def test_wrong_answers_in_any_order_cost_no_right_one(request: pytest.FixtureRequest) -> None:
    """Whatever wrong answers spoil, one after the other in one process, right ones pass afterwards.

    An eighth of them, in a random order; with `--all-mutants` all.
    """
    wrong = [
        (CHECKS[chapter][symbol], answer)
        for chapter, symbol in EXERCISES
        for answer in [
            *mistakes_of(CHECKS[chapter][symbol]).values(),
            *(answer for _, answer in section(chapter, symbol).SURPRISES[symbol]),
        ]
    ]
    random.Random(0).shuffle(wrong)
    for check, answer in wrong[:: 1 if request.config.getoption("--all-mutants") else 8]:
        with contextlib.suppress(CheckFailed):  # a few are wrong once only
            run_once(check, answer)
    for chapter, symbol in EXERCISES:
        run_once(CHECKS[chapter][symbol], reference(chapter, symbol))


def test_no_known_mistake_is_lost(request: pytest.FixtureRequest) -> None:
    """A table may grow; `--record` notes by how much. To take an entry out on purpose, change its number by hand."""
    now = {symbol: len(mistakes_of(CHECKS[chapter][symbol])) for chapter, symbol in EXERCISES}
    before = json.loads(KNOWN.read_text(encoding="utf-8"))
    lost = {symbol: f"{now.get(symbol, 0)} of {n}" for symbol, n in before.items() if now.get(symbol, 0) < n}
    assert not lost, f"known mistakes that are gone from the tables: {lost}"
    if request.config.getoption("--record"):
        KNOWN.write_text(json.dumps(now, indent=0, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


def test_every_exercise_has_a_check_and_every_check_an_exercise() -> None:
    asked = {
        lesson.stem[:2]: [cell.source.split()[-1] for cell in read_lesson(lesson) if "exercise" in cell.tags]
        for lesson in (ROOT / "chapters/src").glob("[0-9][0-9]_*.md")
    }
    assert dict(sorted(asked.items())) == {chapter: list(symbols) for chapter, symbols in CHECKS.items()}


def test_names_of_exercises_are_unique_in_the_course() -> None:
    symbols = [symbol for _, symbol in EXERCISES]
    assert len(set(symbols)) == len(symbols)


def test_every_surprise_and_right_answer_belongs_to_an_exercise_of_its_section() -> None:
    for own in {section(chapter, symbol) for chapter, symbol in EXERCISES}:
        mine = {symbol for chapter, symbol in EXERCISES if section(chapter, symbol) is own}
        assert own.SURPRISES.keys() | own.ALSO_RIGHT.keys() <= mine, own.__name__
