"""A real language model in a notebook, where it was fetched; where it was not, what a run on it found.

    smol = real_model(Transformer)              None, and one line that says so, where it is not on this machine
    found = results("04.scores", smol, look)    what look(smol) returns, or what it returned when that was stored

Stored results lie in `stored/`, a file for each chapter. `python -m tests.support.real_parts 04` makes one anew, and
`pytest -m real` compares it with a new run.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from course_utils.fetching import HUB, fetched
from course_utils.gguf_models import read_gguf
from course_utils.pretrained import FETCHED, PretrainedError, load_pretrained

STORED = Path(__file__).parent / "stored"
RECORD = "COURSE_RECORD"  # the variable that names a file into which what a run finds is written
DIGITS = 4  # of each number that is kept

Results = dict[str, Any]  # tensors, numbers, texts and lists of texts, by name


def real_model(ModelClass: Any) -> Any:
    """SmolLM2-135M in this class, or None where it was not fetched, which is said in one line."""
    try:
        return load_pretrained(ModelClass, FETCHED)
    except PretrainedError as error:
        print(f"{error} Until then you see stored results: those of a run on another machine.")
        return None


def results(name: str, model: Any, find: Callable[[Any], Mapping[str, Any]]) -> Results:
    """What `find(model)` returns; without a model, what it returned when results were stored, which is said.

    Either way numbers have four digits. Tensors come back as float32, on the CPU.
    """
    if model is None:
        print("(stored results)")
        return _decoded(_stored(name.partition(".")[0])[name])
    with torch.no_grad():
        found = {key: _encoded(value) for key, value in find(model).items()}
    if RECORD in os.environ:
        path = Path(os.environ[RECORD])
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(written(earlier | {name: found}), encoding="utf-8")
    return _decoded(found)


def in_transformers() -> Any:
    """The fetched model as transformers has it, with the same weights: to compare with."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = fetched(FETCHED)
    if folder.name == HUB:
        return AutoModelForCausalLM.from_pretrained(folder).float().eval()
    cfg, weights, _ = read_gguf(next(folder.glob("*.gguf")))
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=cfg.d_vocab,
            hidden_size=cfg.d_model,
            intermediate_size=cfg.d_mlp,
            num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads,
            num_key_value_heads=cfg.n_kv_heads,
            max_position_embeddings=cfg.n_ctx,
            rms_norm_eps=cfg.layer_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rotary_base},
            tie_word_embeddings=cfg.tied,
        )
    )
    theirs.load_state_dict(weights, strict=False)  # what is tied stands there once
    return theirs.eval()


def written(stored: Mapping[str, Results]) -> str:
    """The text of a file of results: a line for each."""
    lines = [
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in found.items())
        + "\n}"
        for name, found in stored.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


@functools.cache
def _stored(chapter: str) -> dict[str, Results]:
    stored: dict[str, Results] = json.loads((STORED / f"{chapter}.json").read_text(encoding="utf-8"))
    return stored


def _encoded(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_encoded(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _decoded(found: Results) -> Results:
    """Lists of numbers are tensors."""
    return {key: value if _has_texts(value) else torch.tensor(value).float() for key, value in found.items()}


def _has_texts(value: Any) -> bool:
    return any(map(_has_texts, value)) if isinstance(value, list) else isinstance(value, str)
