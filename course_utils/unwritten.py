"""What `%load_ext course_utils` switches on: a cell that needs an exercise not yet written says so in one line.

It stays an error for Jupyter, so "Run All" goes on only over cells that carry the tag `raises-exception`, as all
cells do that wait for an exercise. Any other error keeps its traceback.
"""

import contextlib
import types
from typing import Any

from course_utils.cells import names, plain_python
from course_utils.places import verify_solutions


def stub_name(error: BaseException, traceback: types.TracebackType | None) -> str | None:
    """The exercise whose stub raised this error: the innermost frame is the function that the message names."""
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    if not isinstance(error, NotImplementedError) or traceback is None:
        return None
    return str(error) if traceback.tb_frame.f_code.co_qualname == str(error) else None


class Unwritten:
    """Turns the errors that follow from unwritten exercises into one line, and remembers what they left undefined."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.cell = ""
        self.missing: dict[str, str] = {}  # a name that no cell could bind -> the exercise it waits for

    def start(self, info: Any) -> None:
        self.cell = info.raw_cell

    def explain(self, error: BaseException, traceback: types.TracebackType | None) -> str | None:
        """One line, or None for an error that has nothing to do with an unwritten exercise."""
        stub = stub_name(error, traceback)
        if stub:
            exercise, line = stub.split(".")[0], f"{stub}: not written yet."
        elif isinstance(error, NameError) and error.name in self.missing and error.name not in self.shell.user_ns:
            exercise = self.missing[error.name]
            line = f"not written yet: this cell needs `{error.name}`, which needs `{exercise}`."
        else:
            return None
        with contextlib.suppress(SyntaxError):
            unmade = names(plain_python(self.cell)).bound - self.shell.user_ns.keys()
            self.missing.update(dict.fromkeys(unmade, exercise))
        return line

    def show(self, shell: Any, kind: type, error: BaseException, traceback: Any, tb_offset: int | None = None) -> None:
        """IPython calls this for the two kinds of error; it must display them itself."""
        line = self.explain(error, traceback)
        if line is None:
            shell.showtraceback((kind, error, traceback), tb_offset=tb_offset)
        else:
            from course_utils.checks import NotWritten

            shell._showtraceback(NotWritten, NotWritten(line), [line])


def show_unwritten_kindly(shell: Any) -> None:
    """Install the display in this IPython shell, and find out somebody else's `solutions` before a cell imports it."""
    unwritten = Unwritten(shell)
    shell.events.register("pre_run_cell", unwritten.start)
    shell.set_custom_exc((NotImplementedError, NameError), unwritten.show)
    verify_solutions()
