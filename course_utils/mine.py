"""A learner's own class in a later chapter: `Transformer = mine("02", ReferenceTransformer)`."""

import contextlib
import io

from course_utils import checks
from course_utils.checks import CheckFailed, NotWritten
from course_utils.notebook import exercise, explained, load_notebook, used_by
from course_utils.places import CourseError, choice, own_notebooks, verify_solutions, work_folder


class Refused(CourseError):
    """One's own class does not pass its checks, or needs an exercise that is not written."""


def mine(chapter: str, reference: type) -> type:
    """The learner's own class of that name if its checks pass, otherwise the reference; prints which, and what helps.

    The class is looked for in the chapter's notebook in `work/`. Its checks are that of the class itself and those of
    every exercise of the chapter that its code uses. A part that is not written yet may be missing where the class
    passes without it: a GPT-2 needs no `RotaryAttention`.
    """
    verify_solutions()
    name = reference.__name__
    try:
        own, unwritten = checked(chapter, name)
    except CourseError as error:
        print(f"{name}: the reference ({error})")
        if isinstance(error, Refused):
            print(f"  `check({name})` there says more. “The interface, written down” lists what later chapters need.")
        return reference
    read = choice(own_notebooks(chapter))
    without = f"; not written yet: {', '.join(unwritten)}" if unwritten else ""
    print(f"{name}: yours, from chapter {chapter}{f' ({read})' if read else ''}{without}")
    return own


def checked(chapter: str, name: str) -> tuple[type, list[str]]:
    """The learner's object, and which of the exercises that its code names are not written and were not missed.

    Raises Refused, with the reason, where it or an exercise that it uses is wrong, or one that it needs unwritten;
    CourseError where it is not there at all.
    """
    paths = own_notebooks(chapter)
    if not paths:
        raise CourseError(f"there is no notebook of chapter {chapter} in {work_folder().name}/")
    symbols = checks.find_checks()[chapter]
    module = load_notebook(paths[0], symbols)
    used = used_by(module, name)
    unwritten: list[str] = []
    for symbol in [*(s for s in symbols if s in used and s != name), name]:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                checks.check(exercise(module, symbol), symbol)
        except NotWritten as error:
            unwritten.append(symbol)
            if symbol == name:
                needed = [s for s in unwritten if f"`{s}`" in str(error)] or unwritten
                raise Refused(f"yours needs {needed[0]}, which is not written yet") from None
        except CheckFailed as error:
            why = explained(module, symbol, str(error)).splitlines()[0]
            raise Refused(f"yours does not pass: {why}") from None
    return getattr(module, name), unwritten
