"""In a process of its own, made for one notebook: load the learner's definitions and check one exercise after another.

Everything it finds out it writes to a pipe, a JSON object a line, each with the word that the server gave it: a
learner's code that writes there without knowing that word is found out.
"""

import json
import os
import random
import re
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from course_utils.cells import cell_name
from course_utils.grading.tricks import Watch, guard, reference_behind
from course_utils.notebook import exercise, load_notebook
from course_utils.places import CourseError
from course_utils.verdict import Verdict, verdict

LONGEST = 10_000  # characters of a message; an exception's own text may have millions
TELLING = re.compile(r", line \w+: (\w*SyntaxError|IndentationError|TabError|ImportError|ModuleNotFoundError): ")


class Broken(Exception):
    """Stands in for a cell which an earlier process did not get through."""


class Worker:
    """Checks a notebook, reporting on the way, so that whoever listens knows at any moment what it is at."""

    def __init__(self, chapter: str, symbols: list[str], broken: Mapping[int, str], watch: Watch, pipe: int, word: str):
        self.chapter = chapter
        self.symbols = symbols
        self.broken = broken
        self.watch = watch
        self.pipe = pipe
        self.word = word
        self.tricks: list[str] = []
        self.dirty = False  # after a trick in a check, for the checks to come
        # By the time it is needed, a learner's code may have replaced these.
        self.write, self.dumps, self.clock = os.write, json.JSONEncoder().encode, time.perf_counter
        self.who, self.leave, self.process = os.getpid, os._exit, os.getpid()

    def tell(self, kind: str, **what: Any) -> None:
        """Write one line; a copy of this process, which a learner's code made by `os.fork`, ends here instead."""
        if self.who() != self.process:
            self.leave(0)
        rest = (self.dumps({"word": self.word, "kind": kind, **what}) + "\n").encode()
        while rest:
            rest = rest[self.write(self.pipe, rest) :]

    def run(self, path: Path, todo: list[str], seconds: float) -> None:
        """Load the notebook and check the exercises in `todo`; ends early where a trick has spoilt the process.

        What answers need beside their definitions gets so many seconds of processor time.
        """
        self.prepare(path)
        try:
            module = load_notebook(path, self.symbols, seconds)
        except CourseError as error:
            self.tell("unreadable", message=str(error).replace(str(path), path.name))
            return
        spoilt = self.found()
        # Other errors there are in every notebook: statements that read what a demo, which is not run, would bind.
        telling = [error for error in module.__cell_errors__.values() if TELLING.search(error)]
        self.tell("loaded", warnings=[error[:LONGEST] for error in telling[:10]])
        for symbol in todo:
            self.tell("start", symbol=symbol)
            start = self.clock()
            state, message = self.judge(module, symbol, spoilt)
            seconds = self.clock() - start
            self.tell("verdict", symbol=symbol, state=state, message=message[:LONGEST], seconds=seconds)
            if self.dirty:
                return

    def prepare(self, path: Path) -> None:
        """Watch what the notebook does from now on; random numbers are the same in every run."""
        cells = re.compile(re.escape(cell_name(path, 0)[:-1]) + r"(\d+)")

        def is_cell(filename: str) -> bool:
            return cells.fullmatch(filename) is not None

        def begin(event: str, args: tuple[Any, ...]) -> None:
            if event == "exec" and isinstance(args[0], types.CodeType) and args[0].co_name == "<module>":
                match = cells.fullmatch(args[0].co_filename)
                if match:
                    number = int(match[1])
                    self.tell("cell", number=number)
                    if number in self.broken:
                        raise Broken(self.broken[number])

        sys.addaudithook(begin)
        guard(self.chapter, is_cell, self.tricks.append)

    def found(self) -> str | None:
        """The tricks that were found since this was asked last, in one sentence."""
        tricks = [f"it replaced {name}" for name in self.watch.changes()[:3]] + self.tricks
        self.tricks.clear()
        return "; ".join(dict.fromkeys(tricks)) or None

    def judge(self, module: types.ModuleType, symbol: str, spoilt: str | None) -> Verdict:
        """The verdict on one exercise, after looking for tricks."""
        random.seed(0)
        np.random.seed(0)
        if spoilt:
            return Verdict("cheated", _cheated(symbol, spoilt))
        try:
            answer = exercise(module, symbol)
        except CourseError as error:
            return Verdict("wrong", str(error))
        others = [other for other in self.symbols if other != symbol]
        reference = reference_behind(answer, self.chapter, others)
        if reference:
            return Verdict("cheated", _cheated(symbol, f"it is made of the reference solution ({reference})"))
        try:
            given = verdict(module, symbol)
        except MemoryError:
            given = Verdict("error", f"{symbol}: needed more memory than there is")
        except BaseException as error:  # SystemExit in the learner's code, or a fault in the check
            given = Verdict("error", f"{symbol}: the check ended with {type(error).__name__}: {error}")
        trick = self.found()
        self.dirty = trick is not None
        return Verdict("cheated", _cheated(symbol, trick)) if trick else given


def _cheated(symbol: str, trick: str) -> str:
    return f"{symbol}: not counted: {trick}.\n  Next: write your own, and leave what checks it as it is."
