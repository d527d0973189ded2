"""`make gpu` as far as it can be tried without one: its parts on the CPU, its table, its one sentence."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from course_utils.exercises import course_exercises
from tests.conftest import ROOT

N = len(course_exercises()["00"])


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) != 0
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("PyTorch finds no GPU here") and err.count("\n") == 1


def test_checks_and_recipes_on_the_cpu(gpu: Any, capsys: pytest.CaptureFixture) -> None:
    assert gpu.main("--device cpu --steps 2 --only checks recipes --chapters 00".split()) == 0
    table = capsys.readouterr().out.partition("| what | result | seconds |")[2]
    assert f"| checks of chapter 00 | {N} right |" in table
    assert table.count("tokens/s, loss ") == len(gpu.RECIPES) + 1


def test_what_fails_stands_in_the_table(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def break_down(recipe: Any, device: str, steps: int) -> str:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(gpu, "first_steps", break_down)
    monkeypatch.setattr(gpu, "first_steps_of_reverse_increment", lambda device, steps: "quick")
    monkeypatch.setattr("solutions.ch00_tensors.merge_heads", lambda z: z)
    assert gpu.main("--device cpu --steps 2 --only checks recipes --chapters 00".split()) != 0
    out = capsys.readouterr().out
    assert f"| checks of chapter 00 | **Wrong: 1 of {N}: merge_heads** |" in out
    assert "| recipe tales | **RuntimeError: out of memory** |" in out and "| recipe reverse-increment | quick |" in out


def test_the_table_takes_its_place_between_the_marks(gpu: Any, tmp_path: Path) -> None:
    page = tmp_path / "running.md"
    page.write_text(gpu.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    before, _, rest = page.read_text(encoding="utf-8").partition(gpu.BEGIN)
    after = rest.partition(gpu.END)[2]
    for text in (r"one \1 table", "another table"):
        gpu.write(text, page)
        assert page.read_text(encoding="utf-8") == f"{before}{gpu.BEGIN}\n{text}\n{gpu.END}{after}"
