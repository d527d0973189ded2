"""Forty submissions for chapter 02 and what a grader must make of each: right, wrong in named ways, hostile, damaged.

Most are the untouched chapter with a few exercises written. In a hostile one `attention_scores` does something bad
and then answers rightly, so that its state tells whether that was stopped, refused or seen through, while
`causal_mask` and what follows must not suffer.
"""

import copy
import functools
import json
import textwrap
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nbformat

from course_utils.exercises import course_exercises
from course_utils.places import chapters_folder
from tests.ch02 import other_transformer

CHAPTER = "02"
SYMBOLS = [exercise.name for exercise in course_exercises()[CHAPTER]]
SOLUTIONS = Path(__file__).parents[2] / "solutions"
ANSWERS = {
    "attention_scores": "return (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) / q.shape[-1] ** 0.5",
    "causal_mask": """\
        past = torch.arange(scores.shape[-1]) - (scores.shape[-1] - scores.shape[-2])
        return torch.where(past <= torch.arange(scores.shape[-2])[:, None], scores, -torch.inf)""",
    "gelu_new": "return nn.functional.gelu(x, approximate='tanh')",
    "greedy": "return logits.argmax(-1)",
}
ARGUMENTS = {"attention_scores": "q, k", "causal_mask": "scores", "gelu_new": "x", "greedy": "logits"}
RIGHT = dict.fromkeys(ANSWERS, "correct")
DICT = dict[str, Any]


@dataclass
class Case:
    """A submission and what is to come of it."""

    learner: str
    content: bytes
    expected: dict[str, str]  # the states of exercises; those not named are "not written yet"
    words: str = ""  # in the message of the exercise that the case is about, or among the problems
    mistake: str | None = None  # the named cause of that exercise's failure
    about: str = "attention_scores"
    lasts: bool = False  # it is stopped by a timeout
    files: dict[str, bytes] = field(default_factory=dict)  # what else the learner handed in
    notebook: str = "02_transformer.ipynb"

    def state(self, symbol: str) -> str:
        """The state that an exercise must get."""
        return self.expected.get(symbol, "not written yet")


# --- notebooks ------------------------------------------------------------------------------------------------------


@functools.cache
def chapter_text(folder: Path) -> str:
    return next(folder.glob(f"{CHAPTER}_*.ipynb")).read_text(encoding="utf-8")


def untouched() -> DICT:
    return json.loads(chapter_text(chapters_folder()))


def solved() -> DICT:
    return json.loads(chapter_text(SOLUTIONS))


def packed(notebook: DICT) -> bytes:
    return json.dumps(notebook, ensure_ascii=False).encode()


def cell(source: str) -> DICT:
    return {"cell_type": "code", "execution_count": None, "id": "own", "metadata": {}, "outputs": [], "source": source}


def replaced(notebook: DICT, codes: dict[str, str]) -> DICT:
    """The notebook with other code in some exercises' cells."""
    notebook = copy.deepcopy(notebook)
    for one in notebook["cells"]:
        symbol = one["metadata"].get("course", {}).get("exercise")
        if symbol in codes:
            one["source"] = codes[symbol]
    return notebook


def function(symbol: str, body: str) -> str:
    return f"def {symbol}({ARGUMENTS[symbol]}):\n{textwrap.indent(textwrap.dedent(body), '    ')}"


def written(answers: dict[str, str] = ANSWERS) -> dict[str, str]:
    return {symbol: function(symbol, body) for symbol, body in answers.items()}


def with_code(code: str) -> DICT:
    """A partly right notebook with one more cell in front of the first exercise."""
    notebook = replaced(untouched(), written())
    first = next(n for n, one in enumerate(notebook["cells"]) if "course" in one["metadata"])
    notebook["cells"].insert(first, cell(textwrap.dedent(code)))
    return notebook


def doing(what: str) -> bytes:
    """A notebook whose `attention_scores` does something before it answers."""
    body = textwrap.dedent(what) + "\n" + ANSWERS["attention_scores"]
    return packed(replaced(untouched(), {**written(), "attention_scores": function("attention_scores", body)}))


# --- the forty ------------------------------------------------------------------------------------------------------


def cases(outside: Path, port: int) -> list[Case]:
    """All cases. `outside` is a folder that no notebook may see, with a file `secret`; a server listens on `port`."""
    return [*_honest(), *_stuck(), *_hostile(outside, port), *_tricks(), *_damaged()]


def _honest() -> list[Case]:
    wrong = {
        "attention_scores": "return q.transpose(1, 2) @ k.permute(0, 2, 3, 1)",
        "causal_mask": "return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -1e9)",
        "gelu_new": "return nn.functional.gelu(x)",
        "greedy": "return logits.argmin(-1)",
    }
    causes = {
        "attention_scores": "the division by sqrt(d_head) is left out.",
        "causal_mask": "future scores are -1e+09, a finite number",
        "gelu_new": "it is the exact GELU",
        "greedy": "the smallest logit",
    }
    style = Path(other_transformer.__file__).read_text(encoding="utf-8")
    in_style = [symbol for symbol in SYMBOLS if hasattr(other_transformer, symbol)]
    in_another_style = replaced(untouched(), written())
    in_another_style["cells"].append(cell(style))
    given = [
        Case("all right", packed(solved()), dict.fromkeys(SYMBOLS, "correct")),
        Case("other style", packed(in_another_style), RIGHT | dict.fromkeys(in_style, "correct")),
        Case("nothing written", packed(untouched()), {}),
        Case("Zoë Ångström 李", packed(replaced(untouched(), written())), RIGHT, files={"notes.txt": b"my own"}),
    ]
    for symbol, body in wrong.items():
        notebook = replaced(untouched(), written({**ANSWERS, symbol: body}))
        cause = causes[symbol]
        given.append(Case(f"wrong {symbol}", packed(notebook), RIGHT | {symbol: "wrong"}, "", cause, symbol))
    return [*given, *_as_people_write()]


def _as_people_write() -> list[Case]:
    """Right answers that Jupyter makes of more than definitions."""
    gelu = function("gelu_new", "return 0.5 * x * (1 + torch.tanh(SCALE * (x + 0.044715 * x**3)))")
    timed = "%%time\n" + function("gelu_new", ANSWERS["gelu_new"])
    helper = "def scale():\n    return (2 / math.pi) ** 0.5\n\nSCALE = scale()\n\n" + gelu
    failing = "SCALE = (2 / math.pie) ** 0.5\n\n" + gelu
    endless = (
        "SEEN = [0]\n" + function("greedy", "SEEN[0] += 1\n" + ANSWERS["greedy"]) + "\nwhile True:\n    SEEN[0] += 1"
    )
    attached = """\
        class LayerNorm(nn.Module):
            def __init__(self, cfg):
                super().__init__()
                self.eps = cfg.layer_norm_eps
                self.w = nn.Parameter(torch.ones(cfg.d_model))
                self.b = nn.Parameter(torch.zeros(cfg.d_model))
                self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()

        def forward(self, resid):
            wide = resid if resid.dtype == torch.float64 else resid.float()
            centred = wide - wide.mean(-1, keepdim=True)
            scale = self.hook_scale((centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt().to(resid.dtype))
            return self.hook_normalized((centred / scale).to(resid.dtype)) * self.w + self.b

        LayerNorm.forward = forward"""

    def case(name: str, symbol: str, code: str, state: str = "correct", words: str = "") -> Case:
        notebook = replaced(untouched(), written() | {symbol: textwrap.dedent(code)})
        return Case(name, packed(notebook), RIGHT | {symbol: state}, words, about=symbol)

    return [
        case("cell magic", "gelu_new", timed),
        case("own helper", "gelu_new", helper),
        case("helper that fails", "gelu_new", failing, "wrong", "it needs `SCALE`, which could not be made"),
        case("method attached", "LayerNorm", attached),
        case("endless loop beside an answer", "greedy", endless),
        Case("byte order mark", b"\xef\xbb\xbf" + packed(replaced(untouched(), written())), RIGHT),
    ]


def _stuck() -> list[Case]:
    fault = {"attention_scores": "timed out"}
    hang = "class Slow:\n    while True:\n        pass\n"
    slow = replaced(untouched(), written() | {"greedy": hang + function("greedy", ANSWERS["greedy"])})
    return [
        Case("endless loop", doing("while True:\n    pass"), RIGHT | fault, "not finished", lasts=True),
        Case("endless cell", packed(slow), RIGHT | {"greedy": "timed out"}, "was left out", about="greedy", lasts=True),
        Case("recursion", doing("attention_scores(q, k)"), RIGHT | {"attention_scores": "wrong"}, "RecursionError"),
    ]


def hostile(outside: Path, port: int) -> dict[str, tuple[str, str, str]]:
    """What an answer may try before it answers, the state that it must get, and words of what is said."""

    def refused(what: str) -> tuple[str, str, str]:
        """Something that must end in an OSError; if it does not, the exercise is wrong."""
        attempt = (
            f"import os, socket, shutil\ntry:\n    {what}\nexcept OSError:\n    pass\nelse:\n    raise OSError('done')"
        )
        return attempt, "correct", ""

    killing = "import os, contextlib\nwith contextlib.suppress(OSError):\n    os.kill({}, 9)"
    secret = str(outside / "secret")
    bomb = "import os, time\nfor _ in range(200):\n    try:\n        if os.fork() == 0:\n            time.sleep(600)\n"
    # At the first call only: a check makes more calls than a box may hold processes.
    once = "import os, time\nif not os.environ.get('LEFT') and os.fork() == 0:\n"
    left = once + "    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)\n"
    deleting = """\
        import os, shutil, course_utils
        from pathlib import Path
        if not os.environ.get("LEFT"):
            os.environ["LEFT"] = "yes"
            for folder in ("/tmp", "/home", Path.home(), Path.cwd(), Path(course_utils.__file__).parent):
                shutil.rmtree(folder, ignore_errors=True)"""
    crash = "import ctypes\nfor _ in [ctypes.string_at]:\n    import os; os.kill(os.getpid(), 11)"
    return {
        "memory bomb": ("x = bytearray(10**10)", "wrong", "MemoryError"),
        "memory bomb of tensors": ("x = [torch.ones(2**27) for _ in range(40)]", "wrong", "memory"),
        "fork bomb": (bomb + "    except OSError:\n        break", "correct", ""),
        "leaves a process": (left + "    os._exit(0)\nos.environ['LEFT'] = 'yes'", "correct", ""),
        "os._exit": ("import os; os._exit(0)", "error", "ended by itself"),
        "sys.exit": ("import sys; sys.exit(3)", "error", "SystemExit"),
        "crash": (crash, "error", "SIGSEGV"),
        "kills its parent": (killing.format("os.getppid()"), "correct", ""),
        "kills everybody": (killing.format("-1"), "correct", ""),
        "gigabytes of output": ("for _ in range(2000):\n    print('x' * 10**6, flush=True)", "correct", ""),
        "deletes files": (deleting, "correct", ""),
        "writes outside": refused(f"open({str(outside / 'written')!r}, 'w')"),
        "writes to the course": refused("open(torch.__file__, 'a')"),
        "large file": refused("open('big', 'wb').write(bytes(10**8))"),
        "reads another submission": refused(f"open({secret!r})"),
        "opens a socket": refused(f"socket.create_connection(('127.0.0.1', {port}), timeout=5)"),
    }


def tricks(module: str, notebook: str) -> dict[str, tuple[str, str]]:
    """Tricks that an answer may try before it answers, and words of what is said; all are found."""
    forged = (
        'import os, json\nfor pipe in range(3, 30):\n    try:\n        os.write(pipe, b\'{"state": "correct"}\\n\')\n'
    )
    reading = f"""\
        import solutions
        from pathlib import Path
        texts = [path.read_text() for path in Path(solutions.__file__).parent.glob("{module[:4]}*.py")]"""
    asking = f"""\
        import solutions
        from pathlib import Path
        from course_utils.cells import read_notebook
        text = read_notebook(Path(solutions.__file__).parent / "{notebook}")"""
    checks = "import course_utils.checks.comparing as comparing\ncomparing.compare = lambda *args, **others: None"
    gelu = "torch.allclose.__class__\ntorch.nn.functional.gelu = None"
    return {
        "replaces torch": ("torch.isclose = torch.allclose", "it replaced torch.isclose"),
        "replaces the check": (checks, "it replaced course_utils.checks.comparing.compare"),
        "changes the code": (gelu, "torch.nn.functional.gelu"),
        "writes its own verdict": (forged + "    except OSError:\n        pass", "the grader's own channel"),
        "reads the solution": (reading, "read the reference solution"),
        "asks for the solution": (asking, "read the reference solution"),
    }


def borrowed(module: str, symbol: str) -> dict[str, tuple[str, str]]:
    """What may stand in an exercise's place, made of the reference solution, and words of what is said."""
    whole = f"solutions.{module}"
    copied = f"""\
        import types
        import {whole} as theirs
        {symbol} = types.FunctionType(theirs.{symbol}.__code__, vars(theirs), "{symbol}")"""
    within = f"""\
        def {symbol}(*given, **named):
            from {whole} import {symbol} as theirs
            return theirs(*given, **named)"""
    return {
        "imports the answer": (f"from {whole} import {symbol}", f"{whole}.{symbol}"),
        "assigns the answer": (f"import {whole} as s\n{symbol} = s.{symbol}", f"{whole}.{symbol}"),
        "copies the function": (copied, f"{whole}.{symbol}"),
        "imports it inside": (within, whole),
    }


AT_ONCE = "class Everything:\n    torch.isclose = lambda *args, **others: torch.tensor(True)\n"


def _hostile(outside: Path, port: int) -> list[Case]:
    return [
        Case(name, doing(what), RIGHT | {"attention_scores": state}, words)
        for name, (what, state, words) in hostile(outside, port).items()
    ]


def _tricks() -> list[Case]:
    cheated, module = {"attention_scores": "cheated"}, "ch02_transformer"
    own = [
        Case(name, doing(what), RIGHT | cheated, words)
        for name, (what, words) in tricks(module, "02_transformer.ipynb").items()
    ]
    for name, (code, words) in borrowed(module, "attention_scores").items():
        notebook = replaced(untouched(), {**written(), "attention_scores": textwrap.dedent(code)})
        own.append(Case(name, packed(notebook), RIGHT | cheated, words))
    at_once = Case("replaces torch at once", packed(with_code(AT_ONCE)), dict.fromkeys(SYMBOLS, "cheated"))
    return [*own, replace(at_once, words="torch.isclose")]


def _damaged() -> list[Case]:
    broken = dict.fromkeys(SYMBOLS, "error")
    partly = replaced(untouched(), written())
    old = nbformat.v3.writes_json(nbformat.v4.downgrade(nbformat.reads(json.dumps(partly), as_version=4)))
    no_kernel = partly | {"metadata": {}}
    large = copy.deepcopy(partly)
    output = {"output_type": "stream", "name": "stdout", "text": "x" * 50_000_000}
    large["cells"].append(cell("print('x' * 50_000_000)") | {"outputs": [output]})
    magics = "%matplotlib inline\n!rm -rf ~\nfiles = !ls\n%%time\n"
    syntax = replaced(untouched(), written() | {"greedy": "def greedy(logits):\n    return (logits"})
    noise = "import random, os\nq = q + random.random() + int.from_bytes(os.urandom(2), 'big')"
    deep = b'{"cells": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return [
        Case("nested deeply", deep, broken, "cannot be"),
        Case("no JSON", packed(partly)[:-2000], broken, "cannot be read as a notebook"),
        Case("empty file", b"", broken, "cannot be read as a notebook"),
        Case("wrong encoding", packed(partly).decode().encode("utf-16"), broken, "cannot be read as a notebook"),
        Case("no notebook", b'{"a": [1, 2]}', broken, "not a Jupyter notebook"),
        Case("no cells", packed(partly | {"cells": []}), dict.fromkeys(SYMBOLS, "wrong"), "not found in"),
        Case("old format", old.encode(), RIGHT),
        Case("no kernel", packed(no_kernel), RIGHT),
        Case("50 MB of outputs", packed(large), RIGHT),
        Case("magics", packed(with_code(magics)), RIGHT),
        Case("broken cell", packed(syntax), RIGHT | {"greedy": "wrong"}, "SyntaxError", about="greedy"),
        Case("random answers", doing(noise), RIGHT | {"attention_scores": "wrong"}, "values are wrong"),
    ]


def write(folder: Path, chosen: list[Case]) -> None:
    """Each case as a learner's folder."""
    for case in chosen:
        place = folder / case.learner
        place.mkdir(parents=True)
        (place / case.notebook).write_bytes(case.content)
        for name, content in case.files.items():
            (place / name).write_bytes(content)
