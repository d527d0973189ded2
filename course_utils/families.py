"""Parts that a model may have and `TransformerConfig` cannot name: a function that would be wrong about them says so.

RMSNorm and GatedMLP are written at the end of chapter 02, and one of its further exercises shares keys and values among
heads. Put them into a model, and chapters 04 and 05 give the right answer or one of these sentences.
"""

from typing import Any


def _scales_only(norm: Any) -> bool:
    return hasattr(norm, "w") and not hasattr(norm, "b")


def refuse_rms_norm(name: str, model: Any) -> None:
    """Raise ValueError for a model with an RMSNorm, for a function that subtracts means as LayerNorm does."""
    norms = [model.ln_final]
    norms += [getattr(block, norm, None) for block in getattr(model, "blocks", ()) for norm in ("ln1", "ln2")]
    if any(map(_scales_only, norms)):
        raise ValueError(f"{name}: this model has an RMSNorm, which subtracts no mean; {name} is about LayerNorm.")


def refuse_shared_heads(name: str, model: Any) -> None:
    """Raise ValueError for a model in which several heads share keys and values, where each must have its own."""
    for block in model.blocks:
        heads, shared = len(block.attn.W_O), len(block.attn.W_K)
        if shared != heads:
            few = f"{heads} heads share {shared} W_K and W_V"
            raise ValueError(
                f"{name}: in this model {few}; {name} is about heads that have keys and values of their own."
            )


def refuse_gated_mlp(name: str, model: Any) -> None:
    """Raise ValueError for a model whose MLPs have a gate: a second matrix that reads the stream."""
    if any(hasattr(getattr(block, "mlp", None), "W_gate") for block in model.blocks):
        raise ValueError(f"{name}: the MLPs of this model have a gate; {name} is about MLPs that read with W_in alone.")
