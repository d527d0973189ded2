"""What a Llama has otherwise than the models that chapters 04 and 05 are about, and a copy of it that has it their way.

Several of its heads share keys and values, nothing has a bias, and MLPs have a gate. A function that would be wrong
about one of these says so.
"""

import copy
from dataclasses import replace
from typing import Any

import torch

from course_utils.pretrained import build


def refuse_shared_heads(name: str, model: Any) -> None:
    """Raise ValueError for a Llama, whose heads share keys and values, or have no biases, where each needs its own."""
    cfg = getattr(model, "cfg", None)  # a model without layers has no heads, and may have no config
    n_heads, n_shared = (cfg.n_heads, cfg.n_kv_heads) if cfg is not None else (0, None)
    if n_shared is not None:
        what = "heads have no biases" if n_shared == n_heads else f"{n_heads} heads share {n_shared} W_K and W_V"
        raise ValueError(
            f"{name}: in this model {what}; {name} is about heads with keys, values and biases of their own: "
            "hand in ungrouped(model), of course_utils.families, which computes the same and has them."
        )


def refuse_gated_mlp(name: str, model: Any) -> None:
    """Raise ValueError for a model whose MLPs have a gate: a second matrix that reads the stream."""
    if model.cfg.gated:
        raise ValueError(f"{name}: the MLPs of this model have a gate; {name} is about MLPs that read with W_in alone.")


def refuse_without_mlp_norm(name: str, model: Any) -> None:
    """Raise ValueError for a model that has no MLPs, or no norm before them: a transcoder reads what the norm gives."""
    if model.cfg.attn_only or model.cfg.normalization == "none":
        what = "no MLPs" if model.cfg.attn_only else "no norm before its MLPs"
        raise ValueError(
            f"{name}: this model has {what}; {name} is about transcoders, which read what that norm gives."
        )


def untied_copy(model: Any) -> Any:
    """A copy whose unembedding can be changed without its embedding."""
    return _copy(model, replace(model.cfg, tied=False)) if model.cfg.tied else copy.deepcopy(model)


def ungrouped(model: Any) -> Any:
    """A copy that computes the same, in which each head has keys, values and biases of its own.

    What heads share is repeated for each of them, biases are zeros, and the unembedding is no longer tied. So a head
    can be read and patched as in GPT-2. But a patch of the keys or values of one head alone is one that the model
    itself cannot do. A model without shared heads is returned as it is.
    """
    return model if model.cfg.n_kv_heads is None else _copy(model, replace(model.cfg, n_kv_heads=None, tied=False))


def _copy(model: Any, cfg: Any) -> Any:
    """The same weights in a model of another configuration, where heads may be repeated, and biases come in as 0."""
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    with torch.device("meta"):
        places = type(model)(cfg).state_dict()
    if model.cfg.tied:
        weights["unembed.W_U"] = model.unembed.W_U.detach().clone()
    for name, place in places.items():
        if name not in weights:
            weights[name] = weights["embed.W_E"].new_zeros(place.shape)
        elif name.endswith((".W_K", ".W_V")):
            weights[name] = weights[name].repeat_interleave(len(place) // len(weights[name]), dim=0)
    copied = build(type(model), cfg, weights, type(model).__name__)
    copied.cfg = cfg
    if hasattr(model, "tokenizer"):
        copied.tokenizer = model.tokenizer
    return copied.to(model.embed.W_E).train(model.training)
