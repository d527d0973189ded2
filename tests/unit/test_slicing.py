"""What a notebook read as a module makes of its names is what IPython makes of them, and nothing else is run."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from course_utils import checks
from course_utils.notebook import load_notebook
from course_utils.verdict import verdict

# A notebook's cells before that which defines `answer`; `stop()` must never run when the notebook is read.
BEFORE: dict[str, list[str]] = {
    "%%time": ["%%time\ndef f():\n    return 3\nX = f()"],
    "%%capture with a name": ["\n%%capture out --no-stderr\nX = 3"],
    "%%prun": ["%%prun -q -l 3\nX = 3"],
    "magics in magics": ["%%capture\n%%time\nX = 3\n%time Y = X + 1\nX += Y"],
    "%%timeit keeps nothing": ["X = 1", "%%timeit -n1 -r1\nX = 2"],
    "%time before an assignment": ["%time X = 3"],
    "%time behind an assignment": ["def f():\n    return 3\nX = %time f()"],
    "%prun before an assignment": ["%prun -q X = 3"],
    "magic in a branch": ["if True:\n    %time X = 3"],
    "one's own helper": ["def f(n):\n    return [n] * n", "X = f(3)"],
    "helpers of helpers": [
        "def f():\n    return BASE + 1\ndef g():\n    return f()",
        "BASE = 3",
        "X = g()",
        "BASE = 4",
    ],
    "item": ["X = {}", "X['a'] = 1\nX['b'], X['c'] = 2, 3", "del X['a']"],
    "augmented": ["X = [1]", "X += [2]", "Y = X\nY += [3]"],
    "attribute": ["class C:\n    pass", "X = C()", "X.value = 3", "X = vars(X)"],
    "deleted": ["X = 1\nY = 2", "del Y", "X = 'Y' in globals()"],
    "with": ["import contextlib", "with contextlib.nullcontext(3) as X:\n    stop()"],
    "inside with": ["import contextlib", "with contextlib.nullcontext():\n    X = 3\n    print(stop())"],
    "suppressed": ["import contextlib", "with contextlib.suppress(ValueError):\n    X = 1\n    int('x')\n    X = 2"],
    "for": ["X = []\nfor i in range(3):\n    print(i)\n    X.append(i)"],
    "for and its last": ["for X in 'abc':\n    pass"],
    "for, while, break": [
        "X, n = [], 0",
        "for i in range(9):\n    if i % 2:\n        continue\n    n += i\n    if n > 9: break\n    X.append(n)",
        "while True:\n    X.append(n)\n    n -= 1\n    if n < 5:\n        break\nelse:\n    X = []",
    ],
    "from a later round": ["X = []\nlast = 0\nfor i in range(3):\n    X.append(last)\n    last = i"],
    "walrus": ["if (X := 3) > 2:\n    stop()"],
    "walrus in a comprehension": ["[X := i for i in range(4)]"],
    "try": ["try:\n    int('x')\n    X = 1\nexcept ValueError as error:\n    X = str(error)\nfinally:\n    stop()"],
    "if": ["X = 1", "if X == 1:\n    X = 2\nelif X == 2:\n    X = 3\nelse:\n    X = 4"],
    "if main": ["X = 1", "if __name__ == '__main__':\n    X = 2"],
    "unpacking": ["(X, *Y), Z = [1, 2, 3], 4", "X = [X, Y, Z]"],
    "match": [
        "match {'a': [1, 2, 3], 'b': 4}:\n    case {'a': [first, *X], **Y}:\n        Z = 1\nX = [first, X, Y, Z]"
    ],
    "method called": ["X = {3, 1}", "X.add(2)", "X = sorted(X)"],
    "method that also gives": ["X = [1, 2, 3]", "last = X.pop()"],
    "iterator": ["it = iter('abc')", "first = next(it)", "X = list(it)"],
    "helper that changes its argument": [
        "X = []",
        "def fill(n, into):\n    into.append(n)",
        "fill(3, X)\nfill(into=X, n=4)",
    ],
    "helper that sets a global": ["def setup():\n    global X\n    X = 3", "setup()"],
    "helper that fills a global": ["X = []\ndef register(f):\n    X.append(f.__name__)\n    return f", "register(len)"],
    "decorator that registers": [
        "X = []\ndef reg(f):\n    X.append(f.__name__)\n    return f",
        "@reg\ndef g():\n    pass",
    ],
    "library function in place": ["import heapq\nX = [3, 1, 2]", "heapq.heapify(X)"],
    "alias": ["X = [[1], [2]]", "row = X[0]", "other = row", "other.append(3)\nrow = []\nrow.append(4)"],
    "two names": ["X = Y = [1]", "Y.append(2)"],
    "another name that is changed later": ["Y = [1]", "X = Y", "Y.append(2)", "Y = [0]", "Y.append(3)"],
    "counter": [
        "def counter():\n    n = 0\n    def up():\n        nonlocal n\n        n += 1\n        return n\n    return up",
        "up = counter()",
        "up()",
        "X = up()",
    ],
    "singledispatch": [
        "import functools\n@functools.singledispatch\ndef f(x):\n    return 1",
        "@f.register\ndef _(x: int):\n    return 2",
        "@f.register(str)\ndef _(x):\n    return 3",
        "X = [f(1), f('a'), f(None)]",
    ],
    "class decorator": [
        "X = {}\ndef named(name):\n    def keep(cls):\n        X[name] = 1\n        return cls\n    return keep",
        "@named('a')\nclass A:\n    pass",
    ],
    "constructor that registers": [
        "X = []\nclass A:\n    def __init__(self, n):\n        X.append(n)",
        "A(1)",
    ],
    "method that counts": [
        "class A:\n    n = 0\n    def up(self):\n        self.n += 1\n        A.n += 1",
        "a = A()",
        "a.up()\na.up()",
        "X = a.n",
    ],
    "tensor in place": [
        "import torch\nX = torch.zeros(2)",
        "X[0] = 1\nX.add_(1)\ntorch.nn.init.ones_(X[1:])\nwith torch.no_grad():\n    X.data.mul_(2)",
    ],
    "parts in a loop": ["X = {'a': [1], 'b': [2]}", "for k, v in X.items():\n    v.append(k)"],
    "globals()": ["globals()['X'] = 3"],
    "exec": ["exec('X = 3')"],
    "made anew": ["X = []", "X.append(1)", "X = []", "X.append(2)"],
    "at the time": ["n = 1", "X = [n]", "n = 2\nX.append(n)", "n = stop"],
    "class reads its own name outside": ["n = 2", "class C:\n    n = n + 1\nX = C.n"],
    "default, decorator": ["n = 2\ndef d(f):\n    return f() + n", "@d\ndef X(m=n):\n    return m"],
    "display": ["def f():\n    display(1)\n    return 2", "X = f()"],
    "lambda": ["n = 2", "f = lambda: [n + m for m in range(2)]", "X = f()"],
    "350 terms": ["n = 1", "X = " + " + ".join(["n"] * 350)],
    "200 calls": ["X = ''" + ".strip()" * 200],
}
# The same for methods that come to a class `K` after it was made; the answer is `K().f()`.
ATTACHED = {
    "forward": ["def f(self):\n    return 3\nK.f = f", "def f():\n    stop()"],
    "setattr": ["setattr(K, 'f', lambda self: 3)"],
    "in a loop": ["for name, n in [('f', 3), ('g', 4)]:\n    setattr(K, name, lambda self, n=n: n)"],
    "to several classes": ["class L:\n    pass\nfor cls in (K, L):\n    cls.f = lambda self: 3"],
    "by a helper": ["def attach(cls):\n    cls.f = lambda self: 3", "attach(K)"],
    "by a decorator": [
        "def method(f):\n    setattr(K, f.__name__, f)\n    return f",
        "@method\ndef f(self):\n    return 3",
    ],
    "under %%time": ["%%time\nK.f = lambda self: 3"],
}
CASES = {name: [*cells, "def answer():\n    return X"] for name, cells in BEFORE.items()}
CASES |= {
    f"attached: {name}": ["class K:\n    pass", *cells, "def answer():\n    return K().f()"]
    for name, cells in ATTACHED.items()
}

IN_IPYTHON = """
import contextlib, json, os, sys
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

answers = {}
for name, cells in json.load(sys.stdin).items():
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    shell.user_ns["stop"] = lambda: None
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for cell in cells:
            shell.run_cell(cell)
        result = shell.run_cell("answer()")
    answers[name] = repr(result.result) if result.success else repr(result.error_in_exec)
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def jupyters() -> dict[str, str]:
    """What IPython itself makes of each case."""
    command = [sys.executable, "-c", IN_IPYTHON]
    return json.loads(
        subprocess.run(command, input=json.dumps(CASES), capture_output=True, text=True, check=True).stdout
    )


def write(path: Path, *cells: str) -> Path:
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), path)
    return path


@pytest.mark.parametrize("case", CASES)
def test_the_answer_is_that_of_jupyter(case: str, jupyters: dict[str, str], tmp_path: Path) -> None:
    module = load_notebook(write(tmp_path / "03_x.ipynb", *CASES[case]), ["answer"])
    assert module.__cell_errors__ == {}
    assert repr(module.answer()) == jupyters[case]


# --- what is not run, and what is said of it -------------------------------------------------------------------------


def test_demos_are_not_run(tmp_path: Path) -> None:
    demos = [
        "while True:\n    pass",
        "name = input('who? ')",
        "for step in range(10**12):\n    loss = answer()\n    losses.append(loss)",
        "losses = []\nfor losses in stop():\n    pass",
        "check(answer)\nanswer()\nprint(SIZE)\nstop(answer)",
        "model = stop(SIZE)",
        "import math\nmath.stop()",
        "for helper in range(3):\n    stop(helper)",
        "for answer in range(3):\n    stop(answer)",
    ]
    cells = [
        "SIZE = 3\nlosses = []",
        "def helper():\n    return SIZE",
        "def answer():\n    return helper()",
        *demos,
    ]
    module = load_notebook(write(tmp_path / "03_x.ipynb", *cells), ["answer"])
    assert module.__cell_errors__ == {} and module.answer() == 3


def test_of_a_loop_only_what_is_needed_is_run(tmp_path: Path) -> None:
    body = "X.append(i)\n        stop(i)\n        loss = stop(X)"
    loop = f"import contextlib\nwith contextlib.nullcontext():\n    for i in range(3):\n        {body}"
    module = load_notebook(write(tmp_path / "03_x.ipynb", "X = []", loop, "def answer():\n    return X"), ["answer"])
    assert module.__cell_errors__ == {} and module.answer() == [0, 1, 2]


@pytest.fixture
def check_is_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """One exercise, `answer`, which must give 3."""

    def check_answer(fn: object) -> None:
        if fn() != 3:
            raise checks.CheckFailed("answer: wrong.\n  This is what you get if it is wrong.")

    monkeypatch.setattr(checks.running, "find_checks", lambda: {"03": {"answer": check_answer}})


READS_X = "def answer():\n    return X"
LEFT_OUT = {
    "failed": (
        ["def f():\n    return 1 / 0", "# no\nX = f()", READS_X],
        "`X`",
        "code cell 2 of 03_x.ipynb, line 2: ZeroDivisionError: ",
    ),
    "failed further back": (
        ["Y = 1 / 0", "X = Y + 1", READS_X],
        "`Y`",
        "code cell 1 of 03_x.ipynb, line 1: ZeroDivisionError: ",
    ),
    "failed, and the old value is there": (
        ["X = 1", "X = X + Y", READS_X],
        "`X`",
        "code cell 2 of 03_x.ipynb, line 1: NameError: name 'Y' is not defined",
    ),
    "changed half": (
        ["X = [0]", "for i in (1, 0):\n    X[0] = 1 / i", READS_X],
        "`X`",
        "code cell 2 of 03_x.ipynb, line 1: ZeroDivisionError: ",
    ),
    "in what another reads": (
        ["X = 1 / 0", "def f():\n    return X", "def answer():\n    return f()"],
        "`X`",
        "code cell 1 of",
    ),
    "a helper's cell is broken": (
        ["def f(:\n    return 3", "def answer():\n    return f()"],
        "`f`",
        "code cell 1 of 03_x.ipynb, line 1: SyntaxError: ",
    ),
    "takes too long": (
        ["X = 0\nwhile X < 3 or True:\n    X += 1", READS_X],
        "`X`",
        "code cell 1 of 03_x.ipynb, line 2: not finished after 0.2 s, so it was stopped",
    ),
    "asks": (
        ["X = int(input('how many? '))", READS_X],
        "`X`",
        "code cell 1 of 03_x.ipynb, line 1: nobody can answer `input` here",
    ),
    "shell": (
        ["X = !echo 3", READS_X],
        "`X`",
        "code cell 1 of 03_x.ipynb, line 1: IPython's own commands are not run here",
    ),
    "%run": (["import math\n%run helpers.py", READS_X], "`X`", "code cell 1 of 03_x.ipynb: `%run` is not run here"),
    "%%timeit": (["%%timeit\nX = 3", READS_X], "`X`", "code cell 1 of 03_x.ipynb: `%%timeit` keeps no names"),
    "nested too deeply": (["X = " + "-" * 50_000 + "3", READS_X], "`X`", "code cell 1 of 03_x.ipynb, line 1: "),
}


@pytest.mark.usefixtures("check_is_three")
@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_was_left_out_is_named_instead_of_a_false_cause(case: str, tmp_path: Path) -> None:
    cells, part, why = LEFT_OUT[case]
    seconds = 0.2 if case == "takes too long" else 30.0
    module = load_notebook(write(tmp_path / "03_x.ipynb", *cells), ["answer"], seconds)
    state, message = verdict(module, "answer")
    assert state == "wrong"
    assert message.startswith(f"answer: it needs {part}, which could not be made as in Jupyter: {why}"), message
    assert "\n  Next: " in message and "if it is wrong" not in message


@pytest.mark.usefixtures("check_is_three")
def test_what_was_left_out_does_not_harm_who_needs_it_not(tmp_path: Path) -> None:
    cells = [
        "X = 1 / 0",
        "def other():\n    return X",
        "def f(:",
        "def answer():\n    return 3 if True else other() + f()",
    ]
    assert verdict(load_notebook(write(tmp_path / "03_x.ipynb", *cells), ["answer"]), "answer").state == "correct"
    cells[-1] = "def answer():\n    return 4 if True else other() + f()"
    assert verdict(load_notebook(write(tmp_path / "03_x.ipynb", *cells), ["answer"]), "answer").message.startswith(
        "answer: wrong.\n"
    )


@pytest.mark.usefixtures("check_is_three")
def test_a_call_left_aside_is_mentioned(tmp_path: Path) -> None:
    cells = ["X = [3]", "from somewhere import tidy", "print(X)", "tidy(X, 1)", "def answer():\n    return X"]
    message = verdict(load_notebook(write(tmp_path / "03_x.ipynb", *cells), ["answer"]), "answer").message
    assert message.startswith("answer: wrong.\n")
    assert message.endswith("\n  Not run here, though it may change `X`: code cell 4 of 03_x.ipynb, line 1: tidy(X, 1)")
    shown = ["print(X)", "guess('03.x', 3)", "reveal('03.x', X)", "my_guesses('03')"]
    cells = ["X = [3]", "from somewhere import guess, my_guesses, reveal", *shown, "def answer():\n    return X"]
    message = verdict(load_notebook(write(tmp_path / "03_x.ipynb", *cells), ["answer"]), "answer").message
    assert message.startswith("answer: wrong.\n") and "Not run here" not in message
    cells = ["X = []", "def keep(n):\n    X.append(n)\n    return n", "for n in range(3):\n    last = keep(n)", READS_X]
    message = verdict(load_notebook(write(tmp_path / "03_x.ipynb", *cells), ["answer"]), "answer").message
    assert message.endswith(
        "\n  Not run here, though it may change `X`: code cell 3 of 03_x.ipynb, line 2: last = keep(n)"
    )


@pytest.mark.usefixtures("check_is_three")
@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["%%timeit\ndef answer():\n    return 3"], "answer: code cell 1 of 03_x.ipynb: `%%timeit` keeps no names"),
        (
            ["def answer():\n    return 3", "\nanswer = answer()"],
            "answer: code cell 2 of 03_x.ipynb, line 1 gives this name to something else (int); rename that.",
        ),
        (["def answer(x=Y):\n    return 3", "Y = 3"], "answer: code cell 1 of 03_x.ipynb, line 1: NameError: name 'Y'"),
        (
            ["Y = 1 / 0", "def answer(x=Y):\n    return 3"],
            "answer: code cell 1 of 03_x.ipynb, line 1: ZeroDivisionError",
        ),
    ],
)
def test_an_answer_that_is_not_there(cells: list[str], words: str, tmp_path: Path) -> None:
    state, message = verdict(load_notebook(write(tmp_path / "03_x.ipynb", *cells), ["answer"]), "answer")
    assert state == "wrong" and message.startswith(words), message


def test_one_deep_expression_costs_nothing_else(tmp_path: Path) -> None:
    deep = ["x = " + "-" * 50_000 + "3", "y = " + "(" * 1000 + "3" + ")" * 1000, "z = f" + "(1)" * 20_000]
    module = load_notebook(
        write(tmp_path / "03_x.ipynb", *deep, "def answer():\n    return 3"), ["answer", "x", "y", "z"]
    )
    assert module.answer() == 3 and module.__broken__.keys() == {"x", "y", "z"}
