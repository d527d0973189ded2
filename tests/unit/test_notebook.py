"""Reading a notebook as a module, carrying one's own class on, and "not written yet" in a running notebook."""

import dataclasses
import inspect
import json
import os
import sys
import textwrap
import traceback
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from course_utils import checks, places
from course_utils.cells import names, plain_python
from course_utils.mine import mine
from course_utils.notebook import exercise, load_notebook
from course_utils.places import CourseError, verify_solutions


def write_notebook(path: Path, *cells: str) -> Path:
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), path)
    return path


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "read", "bound"),
    [
        ("a = b + 1", {"b"}, {"a"}),
        ("a += b", {"a", "b"}, {"a"}),
        ("def f(x=d):\n    y = g\n    return x + y + z", {"d", "g", "z"}, {"f"}),
        ("class A(B):\n    c = D\n    def e(self):\n        return self.g + h", {"B", "D", "h"}, {"A"}),
        ("import a.b, c as d\nfrom e import f as g", set(), {"a", "d", "g"}),
        ("x = [i * j for i in k]", {"j", "k"}, {"x"}),
        ("for i in n:\n    pass", {"n"}, {"i"}),
        ("a, (b, *c) = d", {"d"}, {"a", "b", "c"}),
        ("%timeit f(x)", {"get_ipython", "f", "x"}, set()),
        ("%%time\na = f(x)", {"get_ipython", "f", "x"}, {"a"}),
        ("x.y = 1\nx[0] = 2", {"x"}, set()),
        ("f = lambda q: q + r", {"r"}, {"f"}),
        ("x = {i: [i + j for j in i] for i in k if i > m}", {"k", "m"}, {"x"}),
        ("x = [(y := i) for i in k]", {"k"}, {"x", "y"}),
        ("def f():\n    return [(y := i) for i in k] + [y]", {"k"}, {"f"}),
        ("def f(n):\n    total: int = 0\n    total += n\n    return total", {"int"}, {"f"}),
        ("class A:\n    f = f\n    g = f", {"f"}, {"A"}),
        ("def f():\n    global g\n    g = h", {"h"}, {"f", "g"}),
        (
            "match a:\n    case {'x': x, **rest} if b:\n        pass\n    case [u, *v]:\n        pass",
            {"a", "b"},
            {*"xuv", "rest"},
        ),
        ("try:\n    a\nexcept E as e:\n    b = 1", {"a", "E"}, {"e", "b"}),
        ("y = " + " + ".join(["x"] * 350), {"x"}, {"y"}),
    ],
)
def test_names(code: str, read: set[str], bound: set[str]) -> None:
    assert names(plain_python(code)) == (read, bound)


# --- load_notebook ---------------------------------------------------------------------------------------------------


def test_definitions_are_kept_and_demos_are_not(tmp_path: Path) -> None:
    path = write_notebook(
        tmp_path / "03_x.ipynb",
        "%load_ext nothing_of_that_name\nimport math\nfrom pathlib import Path as P",
        "size = base + 1\nunused = 1 / 0",
        "base = 3",
        "cfg = {'n': base + 1}\ndef f(x):\n    return x * cfg['n']\nprint(f(1)); raise SystemExit",
        "class A:\n    factor = SIZE if False else 2\n    def g(self):\n        return f(self.factor)",
        "# after all\nhistory = f(10)\ncurve = f(11)\ndef show():\n    return history if True else size",
        "!ls\nresult = %timeit -o f(2)",
    )
    module = load_notebook(path)
    assert module.math.pi > 3 and module.P is Path
    assert module.A().g() == 8
    assert not hasattr(module, "unused") and not hasattr(module, "curve") and not hasattr(module, "result")
    assert module.show() == 40, "what a definition reads is made, also by a function of the notebook"
    assert module.__cell_errors__ == {2: "code cell 2 of 03_x.ipynb, line 1: NameError: name 'base' is not defined"}
    assert exercise(module, "A") is module.A and module.A.__module__ == "notebook_03_x"


def test_an_exercise_may_be_an_assignment(tmp_path: Path) -> None:
    cells = [
        "from functools import partial",
        "def power(a, b):\n    return a**b",
        "square = partial(power, b=2)",
        "x = power(1, 2)",
    ]
    path = write_notebook(tmp_path / "03_x.ipynb", *cells)
    assert load_notebook(path, ["square"]).square(3) == 9
    assert not hasattr(load_notebook(path), "square")


def test_choices_made_at_import_are_kept(tmp_path: Path) -> None:
    path = write_notebook(
        tmp_path / "03_x.ipynb",
        "try:\n    import no_such_module\nexcept ImportError:\n    no_such_module = None",
        "if 1 > 0:\n    device = 'cpu'\nelse:\n    device = 'gpu'",
        "if True:\n    raise_if_run()\n    device = 'changed'",
        "def where():\n    return device, no_such_module",
    )
    assert load_notebook(path).where() == ("changed", None)


def test_a_broken_cell_costs_only_what_it_defines(tmp_path: Path) -> None:
    path = write_notebook(
        tmp_path / "03_x.ipynb",
        "def good():\n    return 1",
        "def bad(:\n    return 1\nalso = 2",
        "import no_such_module_at_all\ndef fine():\n    return 2",
        "def twice():\n    return 1",
        "def twice()\n    return 2",
        "def again(:",
        "def again():\n    return 3",
        "def same(a, a):\n    return a",
        "def before():\n    return 1\nreturn before()",
        "import asyncio\nawait asyncio.sleep(0)",
    )
    module = load_notebook(path)
    assert (module.good(), module.fine(), module.again()) == (1, 2, 3)
    assert list(module.__cell_errors__) == [2, 3, 5, 6, 8, 9]
    assert module.__cell_errors__[8].endswith("SyntaxError: duplicate argument 'a' in function definition")
    with pytest.raises(CourseError, match=r"^bad: code cell 2 of 03_x.ipynb, line 1: SyntaxError: "):
        exercise(module, "bad")
    with pytest.raises(CourseError, match="twice: code cell 5"):
        exercise(module, "twice")
    with pytest.raises(CourseError, match=r"nowhere: not found in 03_x\.ipynb"):
        exercise(module, "nowhere")
    with pytest.raises(CourseError, match=r"no_such_module_at_all: code cell 3 .* No module named"):
        exercise(module, "no_such_module_at_all")


def test_the_learners_lines_can_be_shown(tmp_path: Path) -> None:
    source = "def fail():\n    x = 1\n    return x / 0  # here"
    module = load_notebook(write_notebook(tmp_path / "03_x.ipynb", "", "\n" + source))
    assert inspect.getsource(module.fail) == source + "\n"
    with pytest.raises(ZeroDivisionError) as error:
        module.fail()
    frame = traceback.extract_tb(error.value.__traceback__)[-1]
    assert (frame.filename, frame.lineno, frame.line) == ("03_x.ipynb code cell 2", 3, "return x / 0  # here")


def test_dataclasses_work(tmp_path: Path) -> None:
    cell = "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: 'int' = 1"
    assert dataclasses.asdict(load_notebook(write_notebook(tmp_path / "03_x.ipynb", cell)).Point()) == {"x": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "There is no file .*x.ipynb"),
        ("{'no json", "cannot be read as a notebook"),
        (b"\xff\xfe\x00", "cannot be read as a notebook"),
        ("[1, 2]", "not a Jupyter notebook"),
        ('{"a": 1}', "not a Jupyter notebook"),
        ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": 3}', "not a Jupyter notebook"),
    ],
)
def test_what_is_no_notebook(tmp_path: Path, content: str | bytes | None, words: str) -> None:
    path = tmp_path / "x.ipynb"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CourseError, match=words):
        load_notebook(path)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = write_notebook(tmp_path / "x.ipynb", "def f():\n    return 'Zoë'")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_notebook(path).f() == "Zoë"


def test_older_notebook_formats_are_read(tmp_path: Path) -> None:
    cell = {
        "cell_type": "code",
        "language": "python",
        "metadata": {},
        "outputs": [],
        "input": ["def f():\n", " return 1"],
    }
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": [{"metadata": {}, "cells": [cell]}]}
    (tmp_path / "x.ipynb").write_text(json.dumps(old))
    assert load_notebook(tmp_path / "x.ipynb").f() == 1


# --- mine ------------------------------------------------------------------------------------------------------------


class Adder:
    """Stands for a reference solution."""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty work folder, and a chapter 07 of two exercises, of which Adder needs add."""

    def check_add(fn: object) -> None:
        checks.compare("add", fn(torch.ones(2)), torch.full((2,), 2.0), "pos")

    def check_adder_class(cls: type) -> None:
        checks.compare("Adder", cls().result, torch.full((2,), 2.0), "pos")

    found = {"07": {"add": check_add, "Adder": check_adder_class}}
    monkeypatch.setattr(checks, "find_checks", lambda: found)
    monkeypatch.setattr(checks.running, "find_checks", lambda: found)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


RIGHT = [
    "import torch",
    "def add(x):\n    return x + 1",
    "class Adder:\n    result = torch.full((2,), 2.0)\n    def use(self):\n        add",
]


@pytest.mark.parametrize(
    ("cells", "line"),
    [
        (RIGHT, "Adder: yours, from chapter 07"),
        (
            [*RIGHT, "def add(x):\n    return x"],
            "Adder: the reference (yours does not pass: add: 2 of 2 values are wrong.)",
        ),
        (
            [*RIGHT, "def add(x):\n    raise NotImplementedError('add')"],
            "Adder: yours, from chapter 07; not written yet: add",  # its check passes without it
        ),
        (
            [
                "import torch",
                "def add(x):\n    raise NotImplementedError('add')",
                "class Adder:\n    @property\n    def result(self):\n        return add(torch.ones(2))",
            ],
            "Adder: the reference (yours needs add, which is not written yet)",
        ),
        (
            [*RIGHT, "class Adder:\n    result = torch.zeros(2)"],
            "Adder: the reference (yours does not pass: Adder: 2 of 2 values are wrong.)",
        ),
        (
            RIGHT[:2],
            "Adder: the reference (Adder: not found in 07_toy.ipynb; was its cell deleted or the name changed?)",
        ),
        (None, "Adder: the reference (there is no notebook of chapter 07 in work/)"),
    ],
)
def test_mine(work: Path, capsys: pytest.CaptureFixture[str], cells: list[str] | None, line: str) -> None:
    if cells is not None:
        write_notebook(work / "07_toy.ipynb", *cells)
    chosen = mine("07", Adder)
    first, *then = capsys.readouterr().out.splitlines()
    assert first == line
    words = "  `check(Adder)` there says more. “The interface, written down” lists what later chapters need."
    assert then == [words] * ("yours does not pass" in line or "yours needs" in line)
    assert (chosen is Adder) == ("the reference" in line)


def test_the_chapters_own_name_comes_before_copies(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "chapters").mkdir()
    write_notebook(tmp_path / "chapters/07_toy.ipynb")
    monkeypatch.setattr(places, "chapters_folder", lambda: tmp_path / "chapters")
    older = write_notebook(work / "07_toy-Copy1.ipynb", *RIGHT[:2])
    os.utime(older, (1, 1))
    write_notebook(work / "07_toy-Copy2.ipynb", *RIGHT)
    assert mine("07", Adder) is not Adder
    assert capsys.readouterr().out == "Adder: yours, from chapter 07 (07_toy-Copy2.ipynb, not 07_toy-Copy1.ipynb)\n"
    write_notebook(work / "07_toy.ipynb", *RIGHT)
    os.utime(work / "07_toy.ipynb", (0, 0))
    mine("07", Adder)
    read = "07_toy.ipynb, not 07_toy-Copy2.ipynb, 07_toy-Copy1.ipynb"
    assert capsys.readouterr().out == f"Adder: yours, from chapter 07 ({read})\n"
    write_notebook(work / "07_toy.ipynb", *RIGHT[:2])
    assert mine("07", Adder) is Adder
    assert "(Adder: not found in 07_toy.ipynb;" in capsys.readouterr().out


def test_mine_says_what_was_left_out(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_notebook(work / "07_toy.ipynb", *RIGHT[:1], "ONE = 1 / 0", "def add(x):\n    return x + ONE", RIGHT[2])
    assert mine("07", Adder) is Adder
    assert "add: it needs `ONE`, which could not be made as in Jupyter: code cell 2 of" in capsys.readouterr().out


def test_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repo/chapters/src").mkdir(parents=True)
    (tmp_path / "repo/course_utils").mkdir()
    (tmp_path / "repo/work").mkdir()
    (tmp_path / "else/work").mkdir(parents=True)
    for here, there in {
        "repo": "repo",
        "repo/work": "repo",
        "repo/chapters": "repo",
        "else": "else",
        "else/work": "else",
    }.items():
        monkeypatch.chdir(tmp_path / here)
        assert places.work_folder() == tmp_path / there / "work"


def test_somebody_elses_solutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify_solutions()
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions/__init__.py").write_text("raise RuntimeError('must not be run')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "solutions"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        CourseError, match=rf"`import solutions` finds {tmp_path}/solutions, which is not this course's"
    ):
        verify_solutions()


# --- in a running notebook -------------------------------------------------------------------------------------------


STUBS = textwrap.dedent('''
    def add(x):
        """One more."""
        raise NotImplementedError("add")

    class Adder:
        def __init__(self, n):
            self.n = n
        def forward(self, x):
            raise NotImplementedError("Adder.forward")
''')


def executed(*cells: str) -> list[dict | None]:
    """Run the cells after `%load_ext course_utils`; the error output of each, or None."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in ("%load_ext course_utils", *cells)]
    )
    NotebookClient(notebook, timeout=None, startup_timeout=600, kernel_name="python3", allow_errors=True).execute()
    first, *rest = ([o for o in cell.outputs if o.output_type == "error"] for cell in notebook.cells)
    assert first == []
    return [errors[0] if errors else None for errors in rest]


def test_unwritten_exercises_say_so_in_one_line() -> None:
    errors = executed(
        STUBS,
        "y = add(1)",
        "z = y + 1",
        "model = Adder(1)",
        "out = model.forward(1)",
        "print(out)",
        "nowhere",
        "raise NotImplementedError('of my own')",
        "{}['a']",
        "def add(x):\n    return x + 1",
        "y = add(1)",
        "print(y)",
        "%%time\nw = model.forward(1)",
        "w",
        "y / 0",
    )
    assert [error and error["evalue"] for error in errors] == [
        None,
        "add: not written yet.",
        "not written yet: this cell needs `y`, which needs `add`.",
        None,
        "Adder.forward: not written yet.",
        "not written yet: this cell needs `out`, which needs `Adder`.",
        "name 'nowhere' is not defined",
        "of my own",
        "'a'",
        None,
        None,
        None,
        "Adder.forward: not written yet.",
        "not written yet: this cell needs `w`, which needs `Adder`.",
        "division by zero",
    ]
    assert errors[1]["ename"] == "NotWritten" and errors[1]["traceback"] == ["add: not written yet."]
    assert [errors[i]["ename"] for i in (6, 7, 8, 14)] == [
        "NameError",
        "NotImplementedError",
        "KeyError",
        "ZeroDivisionError",
    ]
    assert all(len(errors[i]["traceback"]) > 1 for i in (6, 7, 8, 14)), "other errors keep their traceback"


def test_importing_the_package_alone_is_cheap() -> None:
    import subprocess

    code = "import sys, course_utils; print(sorted({'torch', 'IPython', 'plotly', 'nbformat'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
