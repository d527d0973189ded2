"""The command `course`: what it prints, what it leaves alone, and its exit codes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import nbformat
import pytest
import torch

from course_utils import checks, cli, places, retraining
from course_utils.build import build
from course_utils.cells import read_notebook
from course_utils.cli import main
from course_utils.exercises import course_exercises
from course_utils.guesses import FILE, guess, reveal
from course_utils.pretrained import shipped_models
from course_utils.solution import solution
from tests.conftest import ROOT
from tests.support.environments import lab_address

SOLVED = {path.stem[:2]: read_notebook(path).cells for path in sorted((ROOT / "solutions").glob("*.ipynb"))}


@pytest.fixture
def course(small_course: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small course, built, that is the current folder and has checks."""
    build(small_course)

    def check_double(fn: object) -> None:
        checks.compare("double", fn(torch.arange(3.0)), torch.tensor([0.0, 2.0, 4.0]), "pos")

    def check_shift(cls: type) -> None:
        checks.compare("Shift", cls()(torch.ones(1)), torch.full((1,), 4.0), "pos")

    check_shift.__name__ = "check_Shift"
    found = {"07": {"double": check_double, "Shift": check_shift}}
    monkeypatch.setattr(checks, "find_checks", lambda: found)
    monkeypatch.setattr(checks.running, "find_checks", lambda: found)
    for module in (cli, places):
        monkeypatch.setattr(module, "chapters_folder", lambda: small_course / "chapters")
    monkeypatch.chdir(small_course)
    return small_course


def outcome(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def write(path: Path, old: str, new: str) -> None:
    """Put another answer into a learner's notebook."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = cell.source.replace(old, new)
    nbformat.write(notebook, path)


def test_check_and_status(course: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "status") == (
        0,
        "chapter                   correct    wrong  not written  core path\n"
        "II · What is represented?\n"
        "07 toy                   no notebook yet\n\n"
        f"`course lab` puts the notebooks that are missing into {course}/work.\n",
    )
    cli.fill_work_folder()
    capsys.readouterr()
    path = course / "work/07_toy.ipynb"
    code, text = outcome(capsys, "check", "7")
    assert code == 1
    assert text.splitlines() == [
        "double: not written yet.",
        "Shift: not written yet.",
        "",
        "07_toy.ipynb: 0 correct, 0 wrong, 2 not written yet, of 2.",
    ]
    write(path, 'raise NotImplementedError("double")', "return x")
    code, text = outcome(capsys, "check", "07")
    assert code == 1 and text.startswith("double: 2 of 3 values are wrong.\n  first at [pos=1]: expected 2, got 1\n")
    assert outcome(capsys, "status")[1].splitlines()[2].split() == "07 toy 0/2 1 1 0/2".split()
    write(path, "return x", "return 2 * x")
    write(path, 'raise NotImplementedError("Shift.forward")', "return double(x + self.by)")
    assert outcome(capsys, "check", "07_toy") == (
        0,
        "double: correct\nShift: correct\n\n07_toy.ipynb: 2 correct, 0 wrong, 0 not written yet, of 2.\n",
    )
    untouched = str(course / "chapters/07_toy.ipynb")
    assert outcome(capsys, "check", "07", "--notebook", untouched)[0] == 1
    assert outcome(capsys, "status", "--notebook", untouched)[1].splitlines()[2].split() == "07 toy 0/2 0 2 0/2".split()
    write(path, "return 2 * x", "return 2 * ")
    code, text = outcome(capsys, "check", "07")
    assert code == 1 and re.match(
        r"double: code cell 4 of 07_toy\.ipynb, line \d+: SyntaxError: invalid syntax\n", text
    )


def test_status_counts_the_core_path_by_itself(course: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lesson = course / "chapters/src/07_toy.md"
    lesson.write_text(lesson.read_text().replace("## Shifting\n", "## Shifting\n\n<!-- optional -->\n"))
    build(course)
    cli.fill_work_folder()
    path = course / "work/07_toy.ipynb"
    write(path, 'raise NotImplementedError("Shift.forward")', "return 2 * (x + self.by)")
    capsys.readouterr()
    assert outcome(capsys, "status")[1].splitlines()[2].split() == "07 toy 1/2 0 1 0/1".split()
    write(path, 'raise NotImplementedError("double")', "return 2 * x")
    assert outcome(capsys, "status")[1].splitlines()[2].split() == "07 toy 2/2 0 0 1/1".split()


def test_a_copy_is_not_taken_for_the_chapter(course: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.fill_work_folder()
    capsys.readouterr()
    copy = course / "work/07_toy-Copy1.ipynb"
    copy.write_bytes((course / "work/07_toy.ipynb").read_bytes())
    write(copy, 'raise NotImplementedError("double")', "return x")
    lines = outcome(capsys, "check", "07")[1].splitlines()
    assert lines[:2] == ["Read: 07_toy.ipynb, not 07_toy-Copy1.ipynb.", "double: not written yet."]
    assert outcome(capsys, "status")[1].splitlines()[2:] == [
        "07 toy                        0/2        0            2        0/2",
        "   read: 07_toy.ipynb, not 07_toy-Copy1.ipynb",
    ]


def test_status_sums_up_guesses(
    course: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.fill_work_folder()
    monkeypatch.chdir(course / "work")
    for name, answer in {"07.a": 10, "07.b": 8, "07.c": 1, "08.a": 10}.items():
        guess(name, answer)
        reveal(name, 10)
    guess("07.d", 10)
    monkeypatch.chdir(course)
    capsys.readouterr()
    counted = ["07 toy                        0/2        0            2        0/2", "   guesses: 4, 1 right, 1 close"]
    assert outcome(capsys, "status")[1].splitlines()[2:] == counted
    assert outcome(capsys, "status", "--notebook", "work/07_toy.ipynb")[1].splitlines()[2:] == counted
    kept = course / "work" / FILE
    kept.write_text("{")
    code, text = outcome(capsys, "status")
    assert code == 0 and text.splitlines()[0] == f"{kept} cannot be read: delete it, and your guesses begin anew."
    assert text.splitlines()[3:] == counted[:1] and kept.read_text() == "{"


def test_what_was_left_out_is_said(course: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.fill_work_folder()
    write(course / "work/07_toy.ipynb", 'raise NotImplementedError("double")', "return FACTOR * x")
    write(course / "work/07_toy.ipynb", "from torch import Tensor, nn", "from torch import Tensor, nn\nFACTOR = 4 / 0")
    first = outcome(capsys, "check", "07")[1].split("\n  ")[0].removeprefix("new in work/: 07_toy.ipynb\n")
    assert re.match(
        r"double: it needs `FACTOR`, which could not be made .*: code cell \d of 07_toy\.ipynb, line", first
    )


def test_work_is_never_overwritten(course: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.fill_work_folder()
    assert capsys.readouterr().out == "new in work/: 07_toy.ipynb\n"
    (course / "work/07_toy.ipynb").write_text("mine")
    cli.fill_work_folder()
    assert capsys.readouterr().out == "" and (course / "work/07_toy.ipynb").read_text() == "mine"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["check", "08"], "There is no chapter 08; there are: 07."),
        (["check", "x"], "There is no chapter x; there are: 07."),
        (["check", "07"], "There is no notebook of chapter 07 in .*work"),
        (["check", "07", "--notebook", "nowhere.ipynb"], "There is no file nowhere.ipynb"),
        (["check", "07", "--notebook", "broken.ipynb"], "broken.ipynb cannot be read as a notebook"),
        (["check", "07", "--notebook", "list.ipynb"], "list.ipynb is JSON but not a Jupyter notebook"),
        (["check", "07", "--notebook", "other.ipynb"], "other.ipynb holds no exercise of chapter 07"),
        (["status", "--notebook", "broken.ipynb"], "There is no chapter broken.ipynb"),
        (["status", "--notebook", "07_broken.ipynb"], "07_broken.ipynb cannot be read as a notebook"),
        (["run", "99"], "There is no chapter 99"),
        (["run", "02", "--html", "no/such/folder.html"], "The folder of no/such/folder.html does not exist"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    course: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    for name in ("broken.ipynb", "07_broken.ipynb"):
        (course / name).write_text('{"cells": [')
    (course / "list.ipynb").write_text("[]")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x = 1")]), course / "other.ipynb")
    before = {path: path.read_bytes() for path in course.rglob("*") if path.is_file()}
    code, text = outcome(capsys, *argv)
    assert code == 2 and re.match(words, text), text
    assert text.count("\n") == 1 and "Traceback" not in text
    assert before == {path: path.read_bytes() for path in course.rglob("*") if path.is_file()}


def test_unknown_arguments_are_refused_by_all_but_lab(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["status", "--fast"])
    assert error.value.code == 2 and "unknown arguments: --fast" in capsys.readouterr().err
    assert cli.parse(["lab", "--port", "1", "--LabApp.x=2"])[1] == ["--LabApp.x=2"]


def test_build(course: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome(capsys, "build") == (0, "Everything is up to date.\n")
    source = course / "chapters/src/07_toy.md"
    source.write_text(source.read_text().replace("Prose", "Other prose"))
    assert outcome(capsys, "build") == (0, "built chapters/07_toy.ipynb\nbuilt solutions/07_toy.ipynb\n")
    source.write_text(source.read_text().replace("## Doubling", "#### Doubling"))
    code, text = outcome(capsys, "build")
    assert code == 1 and "chapters/src/07_toy.md:20: heading" in text
    monkeypatch.chdir("/")
    assert outcome(capsys, "build")[0] == 2


def test_run(course: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A line per cell, in an empty folder, beside somebody else's `solutions`; a failing cell is exit code 1."""
    path = course / "solutions/02_small.ipynb"
    cells = [
        "# nothing here\nimport os; os.listdir('.')",
        "import solutions; print(solutions.__course__)",
        "import plotly.graph_objects as go\ngo.Figure(go.Scatter(y=[1, 2]))",
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), path)
    before = path.read_bytes()
    (course / "solutions/__init__.py").write_text("__course__ = 'circuits-from-scratch'")
    monkeypatch.setattr(
        cli, "find_spec", lambda name: type("Spec", (), {"origin": str(course / "solutions/__init__.py")})
    )
    code, text = outcome(capsys, "run", "2", "--html", "out.html")
    assert code == 0, text
    assert re.match(r"\[  1/3\] import os; os\.listdir\('\.'\) +\d+\.\d s\n\[  2/3\]", text)
    assert "02_small.ipynb: all cells ran in" in text and path.read_bytes() == before
    html = (course / "out.html").read_text()
    assert "circuits-from-scratch" in html and "[]" in html
    assert "Plotly.newPlot" in html and len(html) > 4_000_000, "plotly itself is inside, for a page without network"

    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path)
    code, text = outcome(capsys, "run", "2")
    assert code == 1 and "02_small.ipynb: a cell failed." in text and "division by zero" in text


def test_run_mine(course: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One's own notebook runs beside one's other files, over what is not written yet, and is left as it was."""
    assert outcome(capsys, "run", "07", "--mine") == (
        2,
        f"There is no notebook of chapter 07 in {course}/work: `course lab` puts it there, `--notebook PATH` names "
        "another.\n",
    )
    assert outcome(capsys, "lab", "--copy-only") == (
        0,
        f"new in work/: 07_toy.ipynb\nYour chapters are in {course}/work\n",
    )
    path = course / "work/07_toy.ipynb"
    write(path, 'print(Note("an end").text)', "import os; assert '07_toy.ipynb' in os.listdir('.')")
    before = path.read_bytes()
    code, text = outcome(capsys, "run", "07", "--mine")
    assert code == 0 and "07_toy.ipynb: all cells ran in" in text and path.read_bytes() == before, text
    write(path, "assert '07_toy.ipynb'", "assert 'nothing'")
    code, text = outcome(capsys, "run", "7", "--mine")
    assert code == 1 and "07_toy.ipynb: a cell failed." in text


def test_solution_prints_what_the_solution_notebook_shows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    code, text = outcome(capsys, "solution", "causal_mask")
    source, _, where = text.rpartition("\n\n")
    [cell] = [c for c in SOLVED["02"] if c.metadata.get("course", {}).get("exercise") == "causal_mask"]
    assert code == 0 and source == cell.source.partition("\n")[2]
    path, line = re.match(r"It stands in (solutions/ch02_transformer\.py):(\d+), and in its place in", where).groups()
    assert (ROOT / path).read_text().splitlines()[int(line) - 1] == source.splitlines()[0]
    assert where.endswith(" solutions/02_transformer.ipynb\n")
    monkeypatch.chdir(tmp_path)
    assert f"It stands in {ROOT}/solutions/ch02_transformer.py:{line}" in outcome(capsys, "solution", "causal_mask")[1]


def test_solution_of_every_exercise(capsys: pytest.CaptureFixture[str]) -> None:
    for number, exercises in course_exercises().items():
        shown = {c.metadata.course.exercise: c.source for c in SOLVED[number] if "course" in c.metadata}
        for exercise in exercises:
            found = solution(exercise.name)
            assert shown[exercise.name].partition("\n")[2] == found.source and found.notebook.is_file()


def test_an_unknown_exercise_has_no_solution(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = outcome(capsys, "solution", "causalmask")
    assert code == 2 and text.startswith("There is no exercise named causalmask; the nearest are causal_mask, ")


def test_models(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [
        {"name": "tales", "parameters": "1100000", "about": "tells stories", "sha256": "abc"},
        {"name": "attn-only-4l", "parameters": "600000", "about": "has no MLPs", "tokenizer": "tales"},
    ]
    monkeypatch.setattr("course_utils.pretrained.shipped_models", lambda: cards)
    code, text = outcome(capsys, "models")
    assert code == 0
    assert [line.split(maxsplit=2) for line in text.splitlines()[:3]] == [
        ["name", "parameters", "about"],
        ["tales", "1,100,000", "tells stories"],
        ["attn-only-4l", "600,000", "has no MLPs"],
    ]
    assert "card.md" in text


CARD = {
    "name": "toy",
    "recipe": "python -m solutions.recipes.toy",
    "seed": "0",
    "steps": "600",
    "minutes": "21",
    "held_out_nats_per_story": "31.1",
    "ioi_right": "0.99",
    "head_that_writes_most": "1.0, direct 3.35",
    "sha256": "abc",
}


def retrain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], changes: dict[str, str]
) -> tuple[int, str, list[str]]:
    """The outcome of `course models train toy` whose recipe prints these figures, and the arguments the recipe got."""
    got: list[str] = []

    def run_recipe(module: str, arguments: list[str]) -> tuple[int, dict[str, str]]:
        got.extend([module, *arguments])
        return 0, {key: value for key, value in CARD.items() if key != "sha256"} | changes

    monkeypatch.setattr(retraining, "_known", lambda name: name)
    monkeypatch.setattr(retraining, "_card", lambda name: CARD)
    monkeypatch.setattr(retraining, "run_recipe", run_recipe)
    code, text = outcome(capsys, "models", "train", "toy", *argv)
    return code, text, got


@pytest.mark.parametrize("name", [card["name"] for card in shipped_models()])
def test_every_figure_of_a_card_has_a_rule(name: str) -> None:
    """Where it has none, `models train` would let it be anything and not say why."""
    (card,) = (card for card in shipped_models() if card["name"] == name)
    figures = [key for key in card if key not in (*retraining.WORDS, "precision") and not key.startswith("sha256")]
    patterns = [pattern for pattern, _, _ in retraining.RULES]
    assert [key for key in figures if not any(re.fullmatch(pattern, key) for pattern in patterns)] == []


def test_models_train_compares_with_the_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    close = {"ioi_right": "0.97", "minutes": "50", "head_that_writes_most": "2.3, direct 2.1"}
    code, text, got = retrain(capsys, monkeypatch, ["--out", "there", "--device", "cpu"], close)
    assert code == 0 and got == ["solutions.recipes.toy", "--out", "there", "--device", "cpu"]
    lines = text.splitlines()
    rows = {line.split()[0]: line for line in lines[3:-2]}
    assert lines[2].split() == ["card", "now"] and "sha256" not in rows
    assert rows["seed"].split() == ["seed", "0", "0", "same"]
    assert re.fullmatch(r"ioi_right +0.99 +0.97 +close +within 0.05: seeds differ by hundredths", rows["ioi_right"])
    assert rows["minutes"].split()[:3] == ["minutes", "21", "50"] and "machine" in rows["minutes"]
    assert "up to chance" in rows["head_that_writes_most"] and lines[-1] == "As close as can be expected."
    code, text, _ = retrain(capsys, monkeypatch, [], {"held_out_nats_per_story": "36.2", "ioi_right": "0.5"})
    assert code == 1 and text.endswith("Farther from the card than expected: held_out_nats_per_story, ioi_right.\n")
    code, text, got = retrain(capsys, monkeypatch, ["--steps", "6"], {"steps": "6", "ioi_right": "0.5"})
    assert code == 0 and "Trained for 6 steps instead of 600" in text and got[1:] == ["--steps", "6"]


@pytest.mark.parametrize(
    ("argv", "words"), [(["nosuch"], "There is no model 'nosuch'"), (["tales", "--steps", "0"], "--steps must be")]
)
def test_models_train_refuses_in_one_sentence(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    code, text = outcome(capsys, "models", "train", *argv)
    assert code == 2 and text.startswith(words) and text.count("\n") == 1


def test_the_figures_of_a_recipe_are_read_from_what_it_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "toy_recipe.py").write_text(
        "import sys\nprint('{\"step\": 1}')\nprint('steps: 7')\nprint('head: 0.1, io 0.4')\nsys.exit(len(sys.argv) - 1)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert retraining.run_recipe("toy_recipe", []) == (0, {"steps": "7", "head": "0.1, io 0.4"})
    assert retraining.run_recipe("toy_recipe", ["--ship"])[0] == 1
    assert capsys.readouterr().out == '{"step": 1}\n' * 2


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(notebook: Path | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "status", interrupted)
    assert outcome(capsys, "status") == (130, "\nStopped.\n")


@pytest.mark.parametrize("argv", [["models"], ["check", "00", "--notebook", str(ROOT / "chapters/00_tensors.ipynb")]])
def test_a_closed_pipe_is_no_traceback(argv: list[str], tmp_path: Path) -> None:
    """`course ... | head -1`, where head has gone before the command says its first word."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "course_utils.cli", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            PermissionError(13, "Permission denied", "/there/report"),
            "/there/report: Permission denied; work in a folder",
        ),
        (OSError(30, "Read-only file system", "/there"), "/there: Read-only file system; work in a folder of your own"),
        (
            FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"),
            "No usable temporary directory found in ['/tmp']: make room, or name another with TMPDIR.",
        ),
    ],
)
def test_what_cannot_be_written_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: OSError, said: str
) -> None:
    def refused(notebook: Path | None) -> None:
        raise error

    monkeypatch.setattr(cli, "status", refused)
    code, text = outcome(capsys, "status")
    assert code == 2 and text.startswith(said) and text.count("\n") == 1


def test_lab_in_a_folder_that_cannot_be_written(
    course: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (course / "work").write_text("a file")
    code, text = outcome(capsys, "lab")
    assert code == 2 and text.startswith(f"Nothing can be written into {course / 'work'} (") and text.count("\n") == 1
    (course / "work").unlink()

    def refuse(dir: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    reason = f"Nothing can be written into {course / 'work'} (Read-only file system): go to a folder of your own.\n"
    assert outcome(capsys, "lab") == (2, reason)


def test_lab_serves_another_root_only_where_one_is_named(tmp_path: Path) -> None:
    for rest in ([], ["--LabApp.x=2"]):
        command = cli.lab_command(tmp_path, rest)
        assert f"--ServerApp.root_dir={tmp_path}" in command and command[len(command) - len(rest) :] == rest
    for named in ("--ServerApp.root_dir=/there", "--notebook-dir=/there"):
        assert [word for word in cli.lab_command(tmp_path, [named]) if "dir" in word] == [named]


@pytest.mark.slow
def test_lab_serves_and_stops(tmp_path: Path) -> None:
    """JupyterLab answers at the printed address, shows the chapter, and Ctrl-C ends it quietly.

    Files of the learner's own do not stop it, and another root in the learner's configuration does not count.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for folder in ("work", "configuration", "elsewhere"):
        (tmp_path / folder).mkdir()
    for name in ("random", "tokenize", "queue", "types"):
        (tmp_path / "work" / f"{name}.py").write_text("raise SystemExit('not the one that was meant')")
    configured = f"c.ServerApp.root_dir = c.ServerApp.preferred_dir = {str(tmp_path / 'elsewhere')!r}"
    (tmp_path / "configuration/jupyter_server_config.py").write_text(configured)
    command = [sys.executable, "-m", "course_utils.cli", "lab", "--no-browser", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    environment["JUPYTER_CONFIG_DIR"] = str(tmp_path / "configuration")
    server = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    try:
        said: list[str] = []
        address = lab_address(server, said)
        assert f"{tmp_path / 'work/tokenize.py'} has the name of a module" in "".join(said)
        assert b"JupyterLab" in urllib.request.urlopen(address, timeout=600).read()
        (running,) = (tmp_path / "runtime").glob("jpserver-*.json")
        assert json.loads(running.read_text())["root_dir"] == str(tmp_path / "work")
        chapters = {path.name for path in (ROOT / "chapters").glob("*.ipynb")}
        assert {path.name for path in (tmp_path / "work").iterdir()} >= chapters
        os.killpg(server.pid, signal.SIGINT)
        rest = server.communicate(timeout=600)[0]
        assert server.returncode == 0 and "Traceback" not in rest, rest
    finally:
        server.kill()
