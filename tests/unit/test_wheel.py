"""The wheel carries all that a learner needs, and works from any folder."""

import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.environments import new_environment, run

MODELS = sorted(card.parent.name for card in (ROOT / "course_utils" / "models").glob("*/card.md"))

pytestmark = [pytest.mark.wheel, pytest.mark.slow]


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a new environment with the wheel and nothing else of ours."""
    home = tmp_path_factory.mktemp("environment")
    folder = new_environment(home)
    pip = [sys.executable, "-m", "pip", "--python", folder / "python"]
    installed = run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=home)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return folder


def test_wheel_ships_the_course_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"course_utils", "solutions"}
    for folder, home in (("chapters", "course_utils/chapters"), ("solutions", "solutions")):
        for notebook in (ROOT / folder).glob("*.ipynb"):
            assert f"{home}/{notebook.name}" in names
    for path in (ROOT / "course_utils" / "models").rglob("*"):
        assert path.is_dir() or path.relative_to(ROOT).as_posix() in names
    assert MODELS, "no model ships"


def test_wheel_is_small(wheel: Path) -> None:
    """Fifteen chapters and their models fit into 45 MB; the message says what takes how much."""
    parts: dict[str, int] = {}
    for entry in zipfile.ZipFile(wheel).infolist():
        part = "/".join(entry.filename.split("/")[: 3 if "/models/" in entry.filename else 1])
        parts[part] = parts.get(part, 0) + entry.compress_size
    table = "\n".join(f"{size / 1e6:6.1f} MB  {part}" for part, size in sorted(parts.items()))
    assert wheel.stat().st_size < 45e6, f"the wheel is larger than 45 MB:\n{table}"


def test_packages_come_from_the_new_environment(environment: Path, tmp_path: Path) -> None:
    code = "import course_utils, solutions; print(course_utils.__file__, solutions.__file__, sep='\\n')"
    answer = run(environment / "python", "-c", code, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    for line in answer.stdout.splitlines():
        assert Path(line).is_relative_to(environment.parent)


@pytest.mark.parametrize("name", MODELS)
def test_shipped_model_loads_and_speaks_from_any_folder(name: str, environment: Path, tmp_path: Path) -> None:
    code = f"""
import torch
from course_utils.pretrained import load_pretrained
from solutions.ch02_transformer import Transformer
model = load_pretrained(Transformer, {name!r})
print(model(torch.tensor([[1, 2, 3]])).isfinite().all().item())
"""
    answer = run(environment / "python", "-c", code, cwd=tmp_path)
    assert answer.stdout.strip() == "True", answer.stderr


def test_command_works_from_any_folder(environment: Path, tmp_path: Path) -> None:
    models = run(environment / "course", "models", cwd=tmp_path)
    assert models.returncode == 0, models.stderr
    assert all(name in models.stdout for name in MODELS)
    status = run(environment / "course", "status", cwd=tmp_path)
    assert status.returncode == 0, status.stderr
    assert "02" in status.stdout


def test_learners_copies_come_out_of_the_wheel(environment: Path, tmp_path: Path) -> None:
    code = "from course_utils.cli import fill_work_folder; print(fill_work_folder())"
    answer = run(environment / "python", "-c", code, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    copies = {path.name: path.read_bytes() for path in (tmp_path / "work").iterdir()}
    assert copies == {path.name: path.read_bytes() for path in (ROOT / "chapters").glob("*.ipynb")}


def test_a_solution_comes_out_of_the_wheel(environment: Path, tmp_path: Path) -> None:
    answer = run(environment / "course", "solution", "causal_mask", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "def causal_mask(" in answer.stdout and "solutions/ch02_transformer.py:" in answer.stdout


FOREIGN = "print('somebody else')\n"


def test_command_is_not_misled_by_a_folder_named_solutions(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / "__init__.py").write_text(FOREIGN, encoding="utf-8")
    answer = run(environment / "course", "status", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "somebody else" not in answer.stdout


def test_foreign_solutions_that_hides_ours_is_named_in_one_sentence(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / "__init__.py").write_text(FOREIGN, encoding="utf-8")
    answer = run(environment / "course", "run", "02", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert answer.returncode == 2, answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr
    assert str(tmp_path / "solutions") in answer.stdout + answer.stderr
