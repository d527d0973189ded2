"""What a test depends on, and which tests are left out because nothing of that has changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import solutions.ch00_tensors as ch00
from course_utils.checks import find_checks
from tests.conftest import ROOT
from tests.support import depends
from tests.support.passed import read

# --- what a definition depends on -------------------------------------------------------------------------------------

MODULES = {
    "solutions/one.py": '''
"""A module."""
from solutions.two import helper, unused
import math

SIZE = 3
OTHER = 4


def answer(x):
    """Doc."""
    return helper(x) + SIZE  # a comment


def stranger(x):
    return unused(x) + OTHER


class Late:
    def method(self):
        from solutions.two import deep

        return deep
''',
    "solutions/two.py": """
from solutions.three import further


def helper(x):
    return further(x)


def unused(x):
    return x


deep = 5
seen = []
""",
    "solutions/three.py": "def further(x):\n    return x + 1\n",
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of three modules."""
    monkeypatch.setattr(depends, "ROOT", tmp_path)
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    forget()
    return tmp_path


def forget() -> None:
    for cached in (depends.read, depends.locate, depends.file_digest):
        cached.cache_clear()


def of(name: str) -> str:
    return depends.fingerprint(type(name, (), {"__module__": "solutions.one", "__qualname__": name}))


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("one", "+ SIZE", "- SIZE", {"answer"}),
        ("one", "SIZE = 3", "SIZE = 4", {"answer"}),
        ("one", '"""Doc."""', '"""Words."""', set()),
        ("one", '"""A module."""', '"""Words."""', set()),
        ("one", "# a comment", "# words", set()),
        ("one", "return helper(x) + SIZE", "return (helper(x)\n            + SIZE)", set()),
        ("one", "import math", "import math\nprint(1)", {"answer", "stranger", "Late"}),  # runs whoever asks
        ("one", "import math", "import math\nSIZE += 1", {"answer"}),
        ("two", "return further(x)", "return further(2 * x)", {"answer"}),
        ("two", "return x\n", "return -x\n", {"stranger"}),
        ("two", "deep = 5", "deep = 6", {"Late"}),  # an import inside a method
        ("two", "seen = []", "seen = []\nhelper.cache = {}", {"answer", "stranger", "Late"}),
        ("three", "x + 1", "x + 2", {"answer"}),
    ],
)
def test_a_definition_depends_on_what_it_reaches(small: Path, file: str, old: str, new: str, changed: set[str]) -> None:
    names = ("answer", "stranger", "Late")
    before = {name: of(name) for name in names}
    path = small / f"solutions/{file}.py"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    forget()
    assert {name for name in names if of(name) != before[name]} == changed


def test_moving_a_definition_changes_nothing(small: Path) -> None:
    before = of("answer")
    (small / "solutions/four.py").write_text(MODULES["solutions/three.py"])
    (small / "solutions/three.py").unlink()
    (small / "solutions/two.py").write_text(MODULES["solutions/two.py"].replace("three", "four"))
    forget()
    assert of("answer") == before


def test_files_values_and_whole_modules(small: Path) -> None:
    path = small / "solutions/two.py"
    whole, content = depends.fingerprint(path), depends.fingerprint(path.rename(path.with_suffix(".txt")))
    assert whole != content
    assert depends.fingerprint({"a", "b"}) == depends.fingerprint(["b", "a"]) != depends.fingerprint({"a"})
    with pytest.raises(LookupError, match=r"builtins\.len is defined nowhere"):
        depends.fingerprint(len)


def test_a_notebook_depends_on_its_code() -> None:
    [notebook, *_] = depends.chapter_parts("00")
    assert isinstance(notebook, Path) and "log_softmax" in depends.read(notebook).binding
    assert depends.fingerprint(*depends.chapter_parts("00")) != depends.fingerprint(*depends.chapter_parts("01"))


def test_a_chapter_depends_on_the_models_that_it_names_and_on_no_others() -> None:
    files = {part for part in depends.chapter_parts("09") if isinstance(part, Path)}
    assert {"tales", "tales-1-resid"} <= {path.parent.name for path in files}
    assert not any("othello-6" in path.parts for path in files)


def test_an_exercise_does_not_depend_on_its_neighbours() -> None:
    """The point of it: a change to one exercise leaves the mutants of the others out."""
    hashes = depends.reached(depends.imported("solutions.ch00_tensors", "log_softmax"))
    assert depends.digest(depends.read(ROOT / "solutions/ch00_tensors.py").binding["log_softmax"][0]) in hashes
    assert len(hashes) < 10
    checks = find_checks()["00"]
    prints = {name: depends.fingerprint(getattr(ch00, name), check) for name, check in checks.items()}
    assert len(set(prints.values())) == len(prints)


def test_every_supported_python_gives_the_same_shape() -> None:
    """3.12 puts empty parts into f-strings, and `ast.dump` leaves out more from 3.13 on: neither may show."""
    code = depends.Code("def f(x: int = 0, *, y=None) -> None:\n    return f'{x:>{y}} {x!r}', u'a', [], None\n")
    [node] = code.binding["f"]
    assert depends.digest(node).startswith("a616be3bc3d12249")


# --- what is left out -------------------------------------------------------------------------------------------------

SUITE = """
import pytest

@pytest.mark.unless_unchanged("mutants", lambda n: PRINTS[n])
@pytest.mark.parametrize("n", ["one", "two"])
def test_slow(n):
    assert n not in FAIL

def test_other():
    pass
"""


def run(folder: Path, *options: str, prints: str = "one=1 two=2", fail: str = "", code: int = 0) -> str:
    """What pytest says of the suite in a folder."""
    pairs = dict(pair.split("=") for pair in prints.split())
    (folder / "test_it.py").write_text(f"PRINTS = {pairs!r}\nFAIL = {fail.split()!r}\n{SUITE}")
    (folder / "conftest.py").write_text(
        f"from tests.support import passed\npassed.PASSED = passed.Path({str(folder / 'passed.json')!r})\n"
    )
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = .\nmarkers =\n    unless_unchanged: see there\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.passed", "-p", "no:cacheprovider", *options]
    if "-n" in options:
        command += ["-p", "xdist.plugin"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_what_has_not_changed_since_it_passed_is_left_out(tmp_path: Path) -> None:
    said = run(tmp_path)
    assert "3 passed" in said and "Passed with something new that they depend on: 2" in said
    assert not (tmp_path / "passed.json").exists(), "nobody asked for it"
    assert "3 passed" in run(tmp_path, "--record")
    assert (tmp_path / "passed.json").read_text() == '{\n"test_slow[one]": "1",\n"test_slow[two]": "2"\n}\n'
    said = run(tmp_path)
    assert "1 passed, 2 deselected" in said
    assert "Left out: small changes of the reference solutions (2)" in said and "--all-mutants" in said
    assert "2 passed, 1 deselected" in run(tmp_path, prints="one=1 two=3")
    assert "3 passed" in run(tmp_path, "--all-mutants")
    assert "1 passed, 2 deselected" in run(tmp_path, "--all-chapters"), "another kind"
    assert "3 deselected" in run(tmp_path, "-k", "slow"), "all is well when nothing is left to run"


def test_what_fails_is_not_noted_and_what_is_gone_is_forgotten(tmp_path: Path) -> None:
    run(tmp_path, "--record")
    run(tmp_path, "--record", prints="one=1 two=3", fail="two", code=1)
    assert (tmp_path / "passed.json").read_text() == '{\n"test_slow[one]": "1"\n}\n'
    run(tmp_path, "--record", "--all-mutants", fail="one", code=1)
    assert (tmp_path / "passed.json").read_text() == '{\n"test_slow[two]": "2"\n}\n'
    (tmp_path / "passed.json").write_text('{"test_gone[x]": "1"}')
    run(tmp_path, "--record", "test_it.py")
    assert "gone" in (tmp_path / "passed.json").read_text(), "a part of the suite knows nothing of the rest"
    run(tmp_path, "--record")
    assert "gone" not in (tmp_path / "passed.json").read_text()


def test_a_conflict_in_the_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "passed.json").write_text('{\n<<<<<<< ours\n"a": "1"\n}\n')
    with pytest.raises(pytest.UsageError, match=r"Take either side of a conflict, then run pytest --record\."):
        read(tmp_path / "passed.json")


def test_several_processes_note_the_same_as_one(tmp_path: Path) -> None:
    assert "3 passed" in run(tmp_path, "--record", "-n", "2")
    assert (tmp_path / "passed.json").read_text() == '{\n"test_slow[one]": "1",\n"test_slow[two]": "2"\n}\n'
    said = run(tmp_path, "-n", "2")
    assert "1 passed" in said and "Left out: small changes of the reference solutions (2)" in said
    run(tmp_path, "--record", "-n", "2", prints="one=1 two=3", fail="two", code=1)
    assert (tmp_path / "passed.json").read_text() == '{\n"test_slow[one]": "1"\n}\n'
    run(tmp_path, "-n", "2", "-k", "one")
