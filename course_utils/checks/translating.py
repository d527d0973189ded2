"""An exception in a learner's code, in words for the learner: what was raised, and at which of their own lines."""

import linecache
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType, FunctionType

from course_utils.checks.outcomes import CheckFailed, NotWritten
from course_utils.checks.whose import is_library


@contextmanager
def during(what: str) -> Iterator[None]:
    """Say in which case, such as "with cfg.attn_only", an exception in the learner's code came up."""
    try:
        yield
    except (CheckFailed, NotWritten, NotImplementedError):
        raise
    except Exception as error:
        error.add_note(what)
        raise


def translated(name: str, error: Exception, obj: object) -> CheckFailed | NotWritten | None:
    """The exception in the words of a learner; None where it is none of theirs."""
    theirs = _learner_frames(error)
    if isinstance(error, NotImplementedError) and theirs and theirs[-1][0] is _frames(error)[-1][0]:
        frame, line = theirs[-1]
        # Torch raises NotImplementedError too, for an operation without a kernel: only a `raise` marks a stub.
        if "NotImplementedError" in linecache.getline(frame.f_code.co_filename, line) or str(error).isidentifier():
            stub = _own_name(frame.f_code)
            return NotWritten(f"{name}: not written yet" + ("." if stub == name else f": it needs `{stub}`."))
    case = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    what = f"{type(error).__name__}{case}: {error}".strip().replace("\n", "\n    ").rstrip(": ")
    if not theirs:
        cannot_call = isinstance(error, TypeError) and re.search(r"\(\) (missing|takes|got) ", str(error))
        if not cannot_call and not isinstance(error, NotImplementedError) and isinstance(obj, FunctionType | type):
            return None
        return CheckFailed(
            f"{name}: calling your code raised {what}\n"
            "  Next: compare the names and the order of its arguments with those in the exercise."
        )
    # The exercise's own line comes first: helpers below it may all have been given.
    own = [(frame, line) for frame, line in theirs[:-1] if _own_name(frame.f_code) == name.split(".")[0]]
    shown = [own[-1], theirs[-1]] if own else theirs[-2:]
    where = "".join(f"\n  at {_place(frame, line)}" for frame, line in shown)
    if isinstance(error, NameError) and error.name:
        where += f"\n  Next: run the cell that defines `{error.name}`, or look at its spelling."
    return CheckFailed(f"{name}: your code raised {what}{where}")


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    return [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]


def _learner_frames(error: BaseException) -> list[tuple[FrameType, int]]:
    return [(frame, line) for frame, line in _frames(error) if not is_library(frame.f_code.co_filename)]


def _own_name(code: CodeType) -> str:
    """`LayerNorm.forward` is part of LayerNorm; what stands inside another function goes by its own name."""
    return code.co_qualname.split("<locals>.")[-1].split(".")[0]


def _place(frame: FrameType, line: int) -> str:
    filename = frame.f_code.co_filename
    in_kernel = filename.startswith("<ipython") or "ipykernel_" in filename or not linecache.getlines(filename)
    source = "your cell" if in_kernel else Path(filename).name
    return f"line {line} of {source}: {linecache.getline(filename, line).strip()}".rstrip(": ")
