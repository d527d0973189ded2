"""Lessons become notebooks: what is cut, what is kept, and what is found wrong with a lesson."""

import ast
import json
import textwrap
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_utils.build import BuildError, build, full_source, render, stub_source, waiting_cells


def built(root: Path) -> tuple[nbformat.NotebookNode, nbformat.NotebookNode]:
    build(root)
    learner, solution = (nbformat.read(root / f / "07_toy.ipynb", as_version=4) for f in ("chapters", "solutions"))
    nbformat.validate(learner)
    return learner, solution


def code_of(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def edit(root: Path, old: str, new: str, file: str = "chapters/src/07_toy.md") -> Path:
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new))
    return root


# --- cutting ---------------------------------------------------------------------------------------------------------


def test_stub_of_a_function() -> None:
    text = textwrap.dedent('''
        @decorated(
            "with", arguments=1)
        def f(x: Float[Tensor, "batch pos"],
              y: int = 0) -> int:  # noqa: X
            """One line.

            And more, with a \\backslash.
            """
            # A comment that gives it away.
            return x + y
            # Another one.

        other = 1
    ''')
    assert stub_source(text, "f") == textwrap.dedent('''\
        @decorated(
            "with", arguments=1)
        def f(x: Float[Tensor, "batch pos"],
              y: int = 0) -> int:  # noqa: X
            """One line.

            And more, with a \\backslash.
            """
            # YOUR CODE HERE
            raise NotImplementedError("f")''')
    assert full_source(text, "f").endswith("return x + y\n    # Another one.")


def test_stub_of_a_class_keeps_what_is_given() -> None:
    text = textwrap.dedent('''
        class A(B):
            """What it is."""

            size: int = 3

            def __init__(self) -> None:  # given
                self.a = 1

            @property
            def early(self) -> int:
                """Soon."""
                return 1
                # leaked

            @staticmethod
            def middle(
                self,
            ) -> int:  # given
                """Kept."""
                return 2

            def late(self) -> int:
                """Later."""
                def inner():
                    return 3
                return inner()
    ''')
    assert stub_source(text, "A") == textwrap.dedent('''\
        class A(B):
            """What it is."""

            size: int = 3

            def __init__(self) -> None:  # given
                self.a = 1

            @property
            def early(self) -> int:
                """Soon."""
                # YOUR CODE HERE
                raise NotImplementedError("A.early")

            @staticmethod
            def middle(
                self,
            ) -> int:  # given
                """Kept."""
                return 2

            def late(self) -> int:
                """Later."""
                # YOUR CODE HERE
                raise NotImplementedError("A.late")''')


def test_a_constructor_is_stated_by_its_class() -> None:
    stub = stub_source('class A:\n    """Doc."""\n    def __init__(self):\n        self.a = 1\n', "A")
    assert stub.endswith(
        'def __init__(self):\n        # YOUR CODE HERE\n        raise NotImplementedError("A.__init__")'
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(x):\n    return x", "f has no docstring"),
        ('class f:\n    """D."""\n    def g(self):\n        return 1', "f.g has no docstring"),
        ('class f:\n    def g(self):\n        """D."""\n        return 1', "f has no docstring"),
        ('class f:\n    """D."""\n    def g(self):  # given\n        return 1', "nothing to write"),
        ('class f:\n    """D."""\n    a = 1', "nothing to write"),
        ('def f(x):\n    """D."""; return x', "line of its own"),
        ('def f(x): """D."""', "line of its own"),
        ("f = 1", "neither a function nor a class"),
        ("from a import f", "defines no f"),
        ("g = 1", "defines no f"),
    ],
)
def test_what_cannot_be_an_exercise(text: str, words: str) -> None:
    with pytest.raises((ValueError, LookupError), match=words):
        stub_source(text, "f")


texts = st.text(
    st.characters(codec="utf-8", exclude_characters='"\\\r\n\x00\x0c', exclude_categories=("C", "Zl", "Zp"))
)


@given(doc=texts, comment=texts, indent=st.integers(1, 6), before=texts)
def test_slicing_keeps_every_character(doc: str, comment: str, indent: int, before: str) -> None:
    space = " " * indent
    head = f'@d(1)  # {comment}\ndef f(  x,y = "{comment}" ):\n{space}"""x{doc}\n\n{doc}  x"""'
    body = f"{space}if x :   # {comment}\n{space * 2}return   x\n\n{space}return '{comment.replace(chr(39), '')}'"
    text = f"# {before}\nbefore = '''{before.replace(chr(39), '')} '''\n\n{head}\n{body}\n\n\nafter=1"
    try:
        ast.parse(text)
    except SyntaxError:  # hypothesis can find text that no source may hold
        return
    assert full_source(text, "f") == f"{head}\n{body}"
    assert stub_source(text, "f") == f'{head}\n{space}# YOUR CODE HERE\n{space}raise NotImplementedError("f")'


# --- both notebooks --------------------------------------------------------------------------------------------------


def test_learner_and_solution(small_course: Path) -> None:
    learner, solution = built(small_course)
    assert len(learner.cells) == len(solution.cells)
    assert [cell.id for cell in learner.cells] == [cell.id for cell in solution.cells]
    first = code_of(learner)[0]
    assert '%pip install -q "circuits-from-scratch==1.2.3" "torch=={importlib.' in first
    assert first.endswith("%load_ext course_utils") and first == code_of(solution)[0]
    at_tag = "github.com/somebody/something/raw/v1.2.3/chapters/07_toy.ipynb"
    in_colab = "colab.research.google.com/github/somebody/something/blob/v1.2.3/chapters/07_toy.ipynb"
    links = f"[Open in Colab](https://{in_colab}) · [Download this notebook](https://{at_tag})"
    links += " · [Glossary](https://github.com/somebody/something/blob/v1.2.3/docs/glossary.md)"
    assert learner.cells[0].source == f"# A small chapter\n\n{links}\n\nProse with $x^2$."
    stub = next(source for source in code_of(learner) if "def double" in source)
    assert stub.splitlines() == [
        "# Exercise · difficulty ●●○○○ · about 10 minutes",
        "def double(x: Tensor) -> Tensor:",
        '    """Twice x."""',
        "    # YOUR CODE HERE",
        '    raise NotImplementedError("double")',
    ]
    full = next(source for source in code_of(solution) if "def double" in source)
    assert full.endswith("    # The secret is here.\n    return SCALE * x")
    assert "secret" not in "".join(code_of(learner))
    assert "from solutions" not in "".join(code_of(learner) + code_of(solution))
    assert "self.text = text" in "".join(code_of(learner)), "a given definition is shown"
    cell = next(cell for cell in learner.cells if "def double" in cell.source)
    assert cell.metadata.course == {"exercise": "double", "difficulty": 2, "minutes": 10}
    assert learner.metadata.kernelspec.name == "python3"
    assert set(learner.metadata) == {"kernelspec", "language_info"}


def test_cells_that_wait_for_an_exercise_may_raise(small_course: Path) -> None:
    learner, solution = built(small_course)
    tagged = [c.source for c in learner.cells if "raises-exception" in c.metadata.get("tags", [])]
    assert tagged == [
        "check(double)",
        "doubled = double(x)\ndoubled",
        "check(Shift)",
        'shift = Shift()\nnote = Note("made")',
        "shifted = shift(x)",
        "print(shifted.shape, doubled.shape)",
    ]
    assert not any("raises-exception" in c.metadata.get("tags", []) for c in solution.cells)


@pytest.mark.parametrize(
    ("cell", "waits", "later", "later_waits"),
    [
        ("y = f(1)", True, "print(y)", True),
        ("y = 1", False, "print(y)", False),
        ("def g():\n    return f(1)", False, "g()", True),
        ("def g(f):\n    return f(1)", False, "g(abs)", False),
        ("results.append(f(1))", True, "results[0]", True),
        ("seen['a'].b = f(1)", True, "seen", True),
        ("total += f(1)", True, "print(total)", True),
        ("torch.manual_seed(0)\nf(1)", True, "torch.ones(1)", False),
        ("%timeit f(1)", True, "1", False),
        ("[f(i) for i in range(3)]", True, "i = 1", False),
        ("for i in range(3):\n    last = f(i)", True, "print(last)", True),
        ("lengths = [g for g in 'abc']", False, "lengths", False),
        ("obj.f(1)", False, "obj", False),
        ("f = abs", False, "f(1)", False),
        ("class G:\n    def h(self):\n        return f(1)", False, "G().h()", True),
        ("y: int = f(1)", True, "print(f'{y}')", True),
    ],
)
def test_which_cells_wait(cell: str, waits: bool, later: str, later_waits: bool) -> None:
    setup = "import torch\nresults, seen, total = [], {}, 0"
    stub = "def f(x):\n    raise NotImplementedError('f')"
    assert waiting_cells([setup, stub, cell, later], {"f"}) == [False, False, waits, later_waits]


# --- the core path, and the way out -----------------------------------------------------------------------------------

MARK = "\n\n<!-- optional -->\n\n"


def test_an_optional_section_says_so_and_where_to_go_on(small_course: Path) -> None:
    edit(small_course, "## Shifting\n", f"## Shifting{MARK}By something.\n")
    edit(small_course, 'print(Note("an end").text)', 'print("an end")\n```\n\n## Summary\n\n```{code-cell} python\n1')
    for notebook in built(small_course):
        prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        assert "## Shifting (optional)\n\n*Optional. The core path goes on at “Summary”.*\n\nBy something." in prose
        assert "<!--" not in prose and prose.count("ptional") == 2
        optional = {cell.metadata.course.exercise: cell for cell in notebook.cells if "course" in cell.metadata}
        assert optional["Shift"].source.startswith("# Exercise · difficulty ●●●○○ · about 15 minutes · optional\n")
        assert optional["Shift"].metadata.course.optional is True
        assert "optional" not in optional["double"].metadata.course
        assert optional["double"].source.splitlines()[0].endswith("about 10 minutes")


def test_an_optional_section_ends_with_the_next_heading_of_its_level(small_course: Path) -> None:
    edit(
        small_course, "## Shifting\n", f"### Exercise: `Shift`{MARK}Hi.\n\n```text\n# no heading\n```\n\n#### Deeper\n"
    )
    edit(
        small_course,
        'print(Note("an end").text)',
        "1\n```\n\n### Aside\n\n<!-- optional -->\n\n## Summary\n\nEnd.\n\n```text\n",
    )
    prose = "\n".join(cell.source for cell in built(small_course)[0].cells if cell.cell_type == "markdown")
    assert "### Exercise: `Shift` (optional)\n\n*Optional. The core path goes on at “Summary”.*" in prose
    assert (
        "#### Deeper\n" in prose and "### Aside (optional)\n\n*Optional. The core path goes on at “Summary”.*" in prose
    )


def test_a_whole_chapter_can_be_optional(small_course: Path) -> None:
    edit(small_course, "# A small chapter\n", f"# A small chapter{MARK}")
    learner, _ = built(small_course)
    assert "*This chapter is optional: the core path goes without it.*" in learner.cells[0].source
    assert all(cell.metadata.course.optional for cell in learner.cells if "course" in cell.metadata)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Prose with", "Prose.\n\n<!-- optional -->\n\nMore with", r"toy\.md:\d+: .* right below the heading"),
        ("# A small chapter\n", f"# A small chapter{MARK}## In it{MARK}", "around “In it” is optional already"),
        (
            "```{code-cell} python\nx = torch.ones(3)",
            f"## Aside{MARK}```{{code-cell}} python\nx = torch.ones(3)",
            r"toy\.md:\d+: this cell is on the core path, but `x` comes from an optional section",
        ),
        (
            "```{code-cell} python\n:tags: [exercise]\n:difficulty: 2",
            f"## Doubling{MARK}```{{code-cell}} python\n:tags: [exercise]\n:difficulty: 2",
            r"toy\.md:\d+: this cell is on the core path, but `double` comes from",
        ),
    ],
)
def test_marks_out_of_place_and_what_the_core_path_would_lack(
    small_course: Path, old: str, new: str, words: str
) -> None:
    edit(small_course, old, new)
    with pytest.raises(BuildError, match=words):
        build(small_course)


def test_the_way_out_stands_below_the_last_hint(small_course: Path) -> None:
    hints = "".join(f"<details><summary>Hint{n}</summary>\n\nSay.\n\n</details>\n\n" for n in ("", " 2"))
    edit(small_course, "check(double)\n```\n", f"check(double)\n```\n\n{hints}What follows.\n")
    for notebook in built(small_course):
        cells = {number: cell.source for number, cell in enumerate(notebook.cells)}
        [first] = [number for number, source in cells.items() if source == "check(double)"]
        text = cells[first + 1]
        parts = [
            text.index(words) for words in ("Hint", "Hint 2", "Stuck?", "`!course solution double`", "What follows.")
        ]
        assert parts == sorted(parts) and text.count("<details>") == text.count("</details>") == 3
        [second] = [number for number, source in cells.items() if source == "check(Shift)"]
        assert "`!course solution Shift`" in cells[second + 1], "without hints it has a cell of its own"
        assert sum("course solution" in source for source in cells.values()) == 2


def test_building_again_changes_no_byte(small_course: Path) -> None:
    first = build(small_course)
    assert [path.name for path in first] == ["07_toy.ipynb"] * 2
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first}
    assert build(small_course) == []
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in first}


def test_same_cells_have_different_ids_which_survive_other_edits(small_course: Path) -> None:
    edit(
        small_course,
        "```{code-cell} python\ncheck(Shift)",
        "```{code-cell} python\ncheck(double)\n```\n\n```{code-cell} python\ncheck(Shift)",
    )
    with pytest.raises(BuildError, match=r"must hold `check\(Shift\)`"):
        build(small_course)
    edit(
        small_course,
        "check(double)\n```\n\n```{code-cell} python\ncheck(Shift)\n",
        "check(Shift)\n```\n\n```{code-cell} python\ncheck(double)\n",
    )
    before = [cell.id for cell in built(small_course)[0].cells]
    assert len(set(before)) == len(before)
    edit(small_course, "Prose with", "More prose with")
    after = [cell.id for cell in built(small_course)[0].cells]
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_files_are_written_with_unix_line_ends(small_course: Path) -> None:
    build(small_course)
    raw = (small_course / "chapters/07_toy.ipynb").read_bytes()
    assert b"\r" not in raw and raw.endswith(b"}\n") and "●" in raw.decode()
    assert json.loads(raw)["nbformat_minor"] == 5


# --- what is wrong with a lesson -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Prose with", "```{note}\nHi.\n```\nProse with", "a directive of MyST"),
        ("Prose with", ":::{note}\nHi.\n:::\nProse with", "a directive of MyST"),
        ("Prose with", "See {ref}`there`. Prose with", "a role of MyST"),
        ("Prose with", "(here)=\nProse with", "a target of MyST"),
        ("## Doubling", "### Doubling", "out of order"),
        ("## Doubling", "# Doubling", "one title"),
        ("check(double)\n", "print(1)\n", r"must hold `check\(double\)`"),
        (":difficulty: 2\n", "", "double needs `:difficulty:`"),
        (":difficulty: 2\n", ":difficulty: 6\n", "double needs `:difficulty:`"),
        (":minutes: 10\n", "", "double needs"),
        ("import double", "import double, SCALE", "holds one line"),
        ("import double", "import triple", r"07_toy.md:31: solutions.ch07_toy: it defines no triple"),
        ("ch07_toy import double", "ch08_toy import double", "no module solutions.ch08_toy"),
        ("ch07_toy import Shift", "ch07_toy import double", "been an exercise before"),
        (":tags: [setup]\n", "", "must carry the tag `setup`"),
        ("x = torch.ones(3)", "%%time\nx = torch.ones(3)", "cell magic"),
        ("x = torch.ones(3)", "x = torch.ones(3", "was never closed"),
        ("x = torch.ones(3)", "x = torch.ones(n)", "chapters/07_toy.ipynb: code cell 6: undefined name 'n'"),
        (
            "import torch\n",
            "import math\nimport torch\n",
            "solutions/07_toy.ipynb: code cell 2: 'math' imported but unused",
        ),
        ("from torch import Tensor, nn\n", "from torch import nn\n", "undefined name 'Tensor'"),
    ],
)
def test_problems_are_named(small_course: Path, old: str, new: str, words: str) -> None:
    with pytest.raises(BuildError, match=words):
        build(edit(small_course, old, new))
    assert not list(small_course.glob("*/*.ipynb")), "nothing is written"


GUESSES = """\
from course_utils.guesses import guess, my_guesses, reveal

guess("07.sum", ..., unit="cm")
```

```{code-cell} python
reveal("07.sum", 3)
my_guesses("07")
"""


def test_guesses_of_a_lesson(small_course: Path) -> None:
    edit(small_course, "x = torch.ones(3)\n", f"{GUESSES}x = torch.ones(3)\n")
    learner, solution = built(small_course)
    asks = GUESSES.partition("\n```")[0]
    assert asks in code_of(solution)
    [cell] = [cell for cell in learner.cells if cell.source == asks]
    assert cell.metadata["tags"] == ["raises-exception"], "a guess that is refused stops nothing"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('guess("07.sum"', 'guess("08.sum"', r"07_toy\.md:39: a guess needs a name of this chapter, such as '07.loss'"),
        ('guess("07.sum"', 'guess("sum"', "a guess needs a name of this chapter"),
        ("...", "3", r"07_toy\.md:39: the guess '07.sum' is the learner's to make"),
        ('"cm")\n', '"cm")\nguess("07.sum", ...)\n', "two guesses have the name '07.sum'"),
        ('"cm")\n', '"cm")\nguess("07.more", ...)\n', r"07_toy\.md:39: nothing reveals the guess '07.more'"),
        (
            'reveal("07.sum"',
            'reveal("07.more"',
            r"07_toy\.md:45: `reveal` comes before any guess of the name '07.more'",
        ),
        ('my_guesses("07")\n', "", "`my_guesses` has to come after the last guess"),
    ],
)
def test_problems_of_guesses_are_named(small_course: Path, old: str, new: str, words: str) -> None:
    assert old in GUESSES
    edit(small_course, "x = torch.ones(3)\n", f"{GUESSES.replace(old, new)}x = torch.ones(3)\n")
    with pytest.raises(BuildError, match=words):
        build(small_course)


def test_imports_that_only_the_solution_needs_are_fine(small_course: Path) -> None:
    edit(small_course, "import torch\n", "import math\nimport torch\n")
    edit(small_course, "return SCALE * x", "return math.exp(0) * SCALE * x", "solutions/ch07_toy.py")
    edit(small_course, "import torch\n", "import math\nimport torch\n", "solutions/ch07_toy.py")
    built(small_course)


def test_shapes_are_no_names(small_course: Path) -> None:
    edit(small_course, "import torch\n", "import torch\nfrom jaxtyping import Float\n")
    edit(
        small_course,
        "double(x: Tensor) -> Tensor",
        'double(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape a+1"]',
        "solutions/ch07_toy.py",
    )
    built(small_course)


def test_code_in_prose_is_no_directive(small_course: Path) -> None:
    edit(
        small_course,
        "Prose with",
        "```text\n{ref}`x` and # no heading\n```\n\n<details>\n\nHi.\n\n</details>\n\nProse with",
    )
    built(small_course)


def test_a_notebook_without_a_lesson(small_course: Path) -> None:
    build(small_course)
    (small_course / "chapters/src/07_toy.md").unlink()
    with pytest.raises(BuildError, match=r"chapters/07_toy\.ipynb: generated from no lesson"):
        render(small_course)
