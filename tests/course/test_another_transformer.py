"""Later chapters run with a `Transformer` that is written differently: nothing depends on how ours is.

`other_transformer` has the same interface (parameters, hook points, forward) and other internals. What chapter 04
measures comes out the same on both; and each solution notebook runs with it in the place of the learner's own class.
"""

from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

import solutions.ch02_transformer as reference
import solutions.ch04_induction as ch04
from course_utils.build import build_chapter
from course_utils.checks.ch04.weights import CFG, NO_NORM, ROTARY, WITH_MLP
from course_utils.checks.modules import noise
from course_utils.cli import execute
from course_utils.fetching import FOLDER
from course_utils.hooks import run_with_cache
from tests.ch02 import other_transformer
from tests.conftest import ROOT
from tests.support.depends import chapter_parts, fingerprint

N_HALF = 2
LESSONS = [path for path in sorted((ROOT / "chapters/src").glob("[0-9][0-9]_*.md")) if path.stem >= "03"]


def all_of(model: Any, tokens: torch.Tensor, other: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything in chapter 04 that is handed a model or a cache."""
    _, cache = run_with_cache(model, tokens, names="*")
    results = {
        "previous": ch04.previous_token_scores(cache),
        "induction": ch04.induction_scores(cache, N_HALF),
        "by hook": ch04.induction_scores_by_hook(model, tokens, N_HALF),
        "components": ch04.residual_components(cache, -1)[1],
        "attribution": ch04.logit_attribution(cache, model, tokens),
        "folded": ch04.fold_layer_norm(model)(tokens),
        "terms": ch04.decompose_qk(cache, model, 1, 0)[1],
        "ov": ch04.ov_circuit(model, 1, 1).norm(),
        "qk": ch04.qk_circuit(model, 0, 1).norm(),
        "baseline": ch04.random_composition_baseline(model, "K", 3, torch.Generator().manual_seed(0)),
    }
    results |= {kind: ch04.composition_scores(model, kind) for kind in "QKV"}
    if model.cfg.positions == "learned":
        results["positions"] = ch04.position_pattern(model, 1, 1)
    for kind in ("zero", "mean", "resample"):
        results[f"{kind} ablation"] = ch04.ablation_scores(model, tokens, N_HALF, kind, other)
    return results


KINDS = {"attention only": CFG, "with MLPs": WITH_MLP, "no normalisation": NO_NORM, "rotary and parallel": ROTARY}


@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS.keys())
def test_measurements_are_the_same(cfg: Any) -> None:
    models = [module.Transformer(cfg) for module in (reference, other_transformer)]
    weights = {
        name: noise(*tensor.shape, seed=seed, scale=0.4)
        for seed, (name, tensor) in enumerate(models[0].state_dict().items())
    }
    tokens, other = (
        ch04.repeated_tokens(3, N_HALF, cfg.d_vocab, torch.Generator().manual_seed(seed), bos=0) for seed in (1, 2)
    )
    results = []
    for model in models:
        model.load_state_dict(weights)
        with torch.no_grad():
            results.append(all_of(model.eval(), tokens, other))
    for name, ours in results[0].items():
        torch.testing.assert_close(results[1][name], ours, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


SUBSTITUTE = """
import sys
sys.path.append({tests!r})
import course_utils.mine
from tests.ch02.other_transformer import Transformer as _other
course_utils.mine.mine = lambda chapter, reference: _other if reference.__name__ == "Transformer" else reference
"""


SHORTER = {  # what is trained in a notebook need not become good here
    "N_STEPS, BATCH, N_CTX = 1000,": "N_STEPS, BATCH, N_CTX = 100,",  # chapter 03's language model
    "N_EXAMPLES, BATCH = 12_800, 64": "N_EXAMPLES, BATCH = 1_280, 64",  # chapter 11's small oracles
    "odd: bool, steps: int = 70, batch": "odd: bool, steps: int = 7, batch",  # and the models that it teaches a secret
}


def test_what_is_shortened_stands_in_a_lesson() -> None:
    """Otherwise a notebook would silently train for as long as ever."""
    texts = "".join(path.read_text(encoding="utf-8") for path in LESSONS)
    assert [long for long in SHORTER if texts.count(long) != 1] == []


@pytest.mark.slow
@pytest.mark.unless_unchanged(
    "chapters",
    lambda lesson: fingerprint(*chapter_parts(lesson.stem[:2]), other_transformer.Transformer, SUBSTITUTE, execute),
)
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_solution_notebook_runs_with_it(lesson: Path, tmp_path: Path) -> None:
    """A cell in front makes `mine` hand over the other class. The real model is not there, fetched or not."""
    _, solution = build_chapter(lesson, ROOT)
    notebook = nbformat.reads(solution, as_version=4)
    if not any("mine(" in cell.source for cell in notebook.cells if cell.cell_type == "code"):
        pytest.skip("this chapter takes no class from the learner")
    for cell in notebook.cells:
        for long, short in SHORTER.items():
            cell.source = cell.source.replace(long, short)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SUBSTITUTE.format(tests=str(ROOT / "tests"))))
    notebook.cells.append(nbformat.v4.new_code_cell("print(Transformer.__module__)"))
    execute(notebook, {FOLDER: str(tmp_path)})
    assert notebook.cells[-1].outputs[0].text.strip() == other_transformer.__name__
