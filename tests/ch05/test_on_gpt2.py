"""Chapter 05's last part with GPT-2: each of its cells runs on a random one that has the real one's layers and heads.

A folder `gpt2` in the current one is what `load_pretrained(Transformer, "gpt2")` finds first.
"""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

import solutions.ch02_transformer as ch02
from course_utils.build import read_lesson
from course_utils.pretrained import PretrainedError, shipped_tokenizer
from tests.ch02 import other_transformer
from tests.conftest import ROOT

DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
CLASSES = [pytest.param(module.Transformer, id=module.__name__) for module in (ch02, other_transformer)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a GPT-2 of 12 layers and 12 heads with the tokenizer of `tales`: byte-level, and names are one token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = shipped_tokenizer("tales")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_layer=12,
        n_head=12,
        n_embd=48,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path_factory.mktemp("hub")
    model.save_pretrained(path / "gpt2")
    tokenizer.save_pretrained(path / "gpt2")
    return path


def parts() -> tuple[list[str], list[str]]:
    """The lesson's code cells: those before the part about GPT-2, and those of it."""
    before: list[str] = []
    there: list[str] = []
    inside = False
    for cell in read_lesson(ROOT / "chapters/src/05_patching.md"):
        if cell.kind == "code":
            (there if inside else before).append(cell.source)
        elif any(line.startswith("## ") for line in cell.source.splitlines()):
            inside = "## On GPT-2 small" in cell.source.splitlines()
    return before, there


def namespace(Transformer: Any) -> dict[str, Any]:
    """What the cells before define and import; nothing of it is run."""
    names: dict[str, Any] = {}
    before, _ = parts()
    for source in before:
        tree = ast.parse(source)
        tree.body = [node for node in tree.body if isinstance(node, DEFINITIONS)]
        exec(compile(tree, "lesson", "exec"), names)
    return names | {"Transformer": Transformer}


def run_cells(names: dict[str, Any]) -> None:
    for number, source in enumerate(parts()[1], start=1):
        exec(compile(source, f"cell {number} about GPT-2", "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("Transformer", CLASSES)
def test_every_cell_runs_on_a_gpt2(Transformer: Any, folder: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(folder)
    names = namespace(Transformer)
    run_cells(names)
    assert isinstance(names["gpt2"], Transformer) and names["gpt2"].cfg.n_layers == names["gpt2"].cfg.n_heads == 12
    for table in ("gpt2_shares", "gpt2_lost", "steering"):
        assert names[table].shape == (12, 12) and names[table].isfinite().all() and names[table].std() > 0
    assert len(names["published_circuit"]) == len(set(names["published_circuit"])) == 26
    assert names["kept"].shape == (6,) and names["kept"].isfinite().all()
    assert names["gpt2_movers"] == [divmod(i, 12) for i in names["gpt2_shares"].flatten().topk(3).indices.tolist()]
    said = capsys.readouterr().out
    for words in (
        "published difference: 3.56",
        "S-inhibition: published 7.3, 7.9, 8.6, 8.10; here {",
        "in the paper 0.87",
    ):
        assert words in said


def test_heads_in_common_are_counted(capsys: Any) -> None:
    names = namespace(ch02.Transformer)
    parts_with_definitions = [source for source in parts()[1] if "def beside" in source or "published =" in source]
    for source in parts_with_definitions:
        exec(source, names)
    table = torch.zeros(12, 12)
    for value, (layer, head) in enumerate([(9, 9), (10, 0), (3, 4)], start=1):
        table[layer, head] = value
    assert names["beside"](table, "name movers") == [(3, 4), (10, 0), (9, 9)]
    assert names["beside"](-table, "negative name movers", -1) == [(3, 4), (10, 0)]
    said = capsys.readouterr().out
    assert "2 in common" in said and "0 in common" in said


def test_without_gpt2_it_says_so_once_and_goes_on(monkeypatch: Any, capsys: Any) -> None:
    names = namespace(ch02.Transformer)

    def out_of_reach(*arguments: Any) -> Any:
        raise PretrainedError("gpt2 is not in the local cache.")

    names["load_pretrained"] = out_of_reach
    run_cells(names)
    said = capsys.readouterr().out
    assert said.count("not in the local cache") == 1
    assert said.splitlines() == [
        "gpt2 is not in the local cache. ",
        "The cells of this part have nothing to do.",
        "26 heads of 144",
    ]
