"""What stands in `submissions.py` for chapter 02, once more for one chapter of each other part: odd, hostile, damaged.

Each is the untouched chapter with a few exercises answered as the solution notebook does, one of which does something
first. A chapter needs an exercise that no other of the chapter uses, and three beside it that must not suffer.
"""

import copy
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

from course_utils.exercises import course_exercises
from course_utils.places import chapters_folder
from tests.grading.submissions import AT_ONCE, DICT, SOLUTIONS, Case, borrowed, cell, hostile, packed, replaced, tricks

DOING = """\
right_{symbol} = {symbol}


def {symbol}(*given, **named):
{what}
    return right_{symbol}(*given, **named)
"""
# Those that take longest, or that no chapter can make differ.
LEFT_OUT = {"memory bomb of tensors", "fork bomb", "gigabytes of output", "large file", "kills everybody", "crash"}


@dataclass(frozen=True)
class Sibling:
    """A chapter to be tried."""

    chapter: str
    symbol: str  # the exercise in which something happens
    beside: tuple[str, ...]  # answered rightly

    @property
    def notebook(self) -> str:
        return next(chapters_folder().glob(f"{self.chapter}_*.ipynb")).name

    @property
    def module(self) -> str:
        return f"ch{self.notebook.removesuffix('.ipynb')}"

    @property
    def symbols(self) -> list[str]:
        return [exercise.name for exercise in course_exercises()[self.chapter]]

    @property
    def right(self) -> dict[str, str]:
        return dict.fromkeys([self.symbol, *self.beside], "correct")

    def read(self, folder: Path) -> DICT:
        notebook: DICT = json.loads((folder / self.notebook).read_text(encoding="utf-8"))
        return notebook

    def answers(self) -> dict[str, str]:
        """The cells of the solution notebook for the exercises that are answered."""
        cells = {one["metadata"].get("course", {}).get("exercise"): one for one in self.read(SOLUTIONS)["cells"]}
        return {symbol: "".join(cells[symbol]["source"]) for symbol in self.right}

    def partly(self, **others: str) -> DICT:
        """The chapter with these exercises answered, some of them otherwise."""
        return replaced(self.read(chapters_folder()), self.answers() | others)

    def doing(self, what: str) -> DICT:
        """The same; the exercise does something before it answers."""
        body = textwrap.indent(textwrap.dedent(what), "    ")
        answer = self.answers()[self.symbol]
        return self.partly(**{self.symbol: f"{answer}\n\n\n{DOING.format(symbol=self.symbol, what=body)}"})


# One for each part but the first, which chapter 02 stands for.
SIBLINGS = (
    Sibling("07", "pca", ("standardise", "mean_difference_probe", "auroc")),
    Sibling("10", "transcoder_loss", ("feature_connections", "normalised_adjacency", "total_effects")),
    Sibling("12", "is_balanced_batch", ("is_balanced", "elevation", "failures")),
)


def cases(sibling: Sibling, outside: Path, port: int) -> list[Case]:
    """All of one chapter."""
    own = [*_odd(sibling), *_hostile(sibling, outside, port), *_tricks(sibling), *_damaged(sibling)]
    for case in own:
        case.learner, case.notebook = f"{case.learner} {sibling.chapter}", sibling.notebook
        case.about = sibling.symbol
    return own


def _odd(sibling: Sibling) -> list[Case]:
    symbol, right = sibling.symbol, sibling.right
    answer = sibling.answers()[symbol]
    timed = sibling.partly(**{symbol: f"%%time\n{answer}"})
    magics = copy.deepcopy(sibling.partly())
    magics["cells"].insert(1, cell("%matplotlib inline\n!rm -rf ~\nfiles = !ls\n%%time\n"))
    endless = sibling.partly(**{symbol: f"{answer}\nSEEN = [0]\nwhile True:\n    SEEN[0] += 1"})
    later = copy.deepcopy(sibling.partly(**{symbol: f"def {symbol}(*given):\n    return None"}))
    later["cells"].append(cell(answer))
    return [
        Case("all right", packed(sibling.read(SOLUTIONS)), dict.fromkeys(sibling.symbols, "correct")),
        Case("nothing written", packed(sibling.read(chapters_folder())), {}),
        Case("cell magic", packed(timed), right),
        Case("magics", packed(magics), right),
        Case("endless loop beside an answer", packed(endless), right),
        Case("written again at the end", packed(later), right),
        Case("byte order mark", b"\xef\xbb\xbf" + packed(sibling.partly()), right),
        Case("no kernel", packed(sibling.partly() | {"metadata": {}}), right),
    ]


def _hostile(sibling: Sibling, outside: Path, port: int) -> list[Case]:
    endless = packed(sibling.doing("while True:\n    pass"))
    stuck = Case("endless loop", endless, sibling.right | {sibling.symbol: "timed out"}, "not finished", lasts=True)
    return [
        stuck,
        *(
            Case(name, packed(sibling.doing(what)), sibling.right | {sibling.symbol: state}, words)
            for name, (what, state, words) in hostile(outside, port).items()
            if name not in LEFT_OUT
        ),
    ]


def _tricks(sibling: Sibling) -> list[Case]:
    cheated = sibling.right | {sibling.symbol: "cheated"}
    own = [
        Case(name, packed(sibling.doing(what)), cheated, words)
        for name, (what, words) in tricks(sibling.module, sibling.notebook).items()
    ]
    own += [
        Case(name, packed(sibling.partly(**{sibling.symbol: textwrap.dedent(code)})), cheated, words)
        for name, (code, words) in borrowed(sibling.module, sibling.symbol).items()
    ]
    at_once = copy.deepcopy(sibling.partly())
    first = next(n for n, one in enumerate(at_once["cells"]) if "course" in one["metadata"])
    at_once["cells"].insert(first, cell(AT_ONCE))
    everywhere = dict.fromkeys(sibling.symbols, "cheated")
    return [*own, Case("replaces torch at once", packed(at_once), everywhere, "torch.isclose")]


def _damaged(sibling: Sibling) -> list[Case]:
    broken, partly = dict.fromkeys(sibling.symbols, "error"), packed(sibling.partly())
    syntax = sibling.partly(**{sibling.symbol: f"def {sibling.symbol}(given):\n    return (given"})
    return [
        Case("no JSON", partly[:-2000], broken, "cannot be read as a notebook"),
        Case("empty file", b"", broken, "cannot be read as a notebook"),
        Case("no notebook", b'{"a": [1, 2]}', broken, "not a Jupyter notebook"),
        Case("broken cell", packed(syntax), sibling.right | {sibling.symbol: "wrong"}, "SyntaxError"),
    ]
