"""GPT-2's weights under Hugging Face's names, and where each column belongs: the oracle of `convert_gpt2_weights`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.comparing import Mistakes, compare, unchanged
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.transformer_interface import transformer_parameters
from course_utils.config import TransformerConfig

CONVERTED_AXES = {
    "W_E": "d_vocab d_model",
    "W_pos": "pos d_model",
    "w": "d_model",
    "b": "d_model",
    **{f"W_{letter}": "head d_model d_head" for letter in "QKV"},
    **{f"b_{letter}": "head d_head" for letter in "QKV"},
    "W_O": "head d_head d_model",
    "b_O": "d_model",
    "W_in": "d_model d_mlp",
    "b_in": "d_mlp",
    "W_out": "d_mlp d_model",
    "b_out": "d_model",
    "W_U": "d_model d_vocab",
    "b_U": "d_vocab",
}


def judge_converted(
    name: str,
    fn: Callable[..., Any],
    cfg: TransformerConfig,
    theirs: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    mistakes: Callable[[str], Mistakes],
) -> None:
    """The converter returns the expected entries, no more and no fewer, and changes nothing; `mistakes(entry)`."""
    with unchanged(name, **theirs):
        n_entries = len(theirs)
        ours = fn(theirs, cfg)
        if len(theirs) != n_entries:
            raise CheckFailed(
                f"{name}: it added or removed entries of the dict that it was given.\n"
                "  Next: put what you return into a new dict."
            )
    if not isinstance(ours, Mapping):
        got = "None" if ours is None else f"a {type(ours).__name__}"
        raise CheckFailed(f"{name}: expected a dict, got {got}.\n  Next: return the new dict.")
    for what, names in (
        ("has no entry", [n for n in expected if n not in ours]),
        ("has an entry that our Transformer does not know,", [n for n in ours if n not in expected]),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckFailed(
                f"{name}: the result {what} `{names[0]}`{more}.\n"
                "  Next: compare with the names in Transformer(cfg).state_dict()."
            )
    for entry, weight in expected.items():
        axes = CONVERTED_AXES[entry.split(".")[-1]]
        compare(f"{name}: `{entry}`", ours[entry], weight, axes, mistakes(entry))
    doubled = fn({entry: tensor.double() for entry, tensor in theirs.items()}, cfg)
    for entry, weight in expected.items():
        axes = CONVERTED_AXES[entry.split(".")[-1]]
        compare(f"{name}: `{entry}` from float64", doubled[entry], weight.double(), axes)


def gpt2_state_dict(cfg: TransformerConfig) -> dict[str, Tensor]:
    """Names and shapes of Hugging Face's GPT2LMHeadModel, with masks as older files have them; embeddings not tied."""
    d_model, d_mlp = cfg.d_model, cfg.d_mlp
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (cfg.d_vocab, d_model),
        "transformer.wpe.weight": (cfg.n_ctx, d_model),
    }
    for layer in range(cfg.n_layers):
        inner: dict[str, tuple[int, ...]] = {
            "ln_1.weight": (d_model,),
            "ln_1.bias": (d_model,),
            "attn.c_attn.weight": (d_model, 3 * d_model),
            "attn.c_attn.bias": (3 * d_model,),
            "attn.c_proj.weight": (d_model, d_model),
            "attn.c_proj.bias": (d_model,),
            "ln_2.weight": (d_model,),
            "ln_2.bias": (d_model,),
            "mlp.c_fc.weight": (d_model, d_mlp),
            "mlp.c_fc.bias": (d_mlp,),
            "mlp.c_proj.weight": (d_mlp, d_model),
            "mlp.c_proj.bias": (d_model,),
            "attn.bias": (1, 1, cfg.n_ctx, cfg.n_ctx),
            "attn.masked_bias": (),
        }
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in inner.items()}
    shapes |= {"transformer.ln_f.weight": (d_model,), "transformer.ln_f.bias": (d_model,)}
    shapes["lm_head.weight"] = (cfg.d_vocab, d_model)
    return {name: noise(*shape, seed=200 + seed) for seed, (name, shape) in enumerate(shapes.items())}


def converted_by_columns(theirs: Mapping[str, Tensor], cfg: TransformerConfig) -> dict[str, Tensor]:
    """The definition: head h has columns h d_head to (h + 1) d_head of its third of c_attn, those rows of c_proj."""
    d_head, d_model = cfg.d_head, cfg.d_model
    ours: dict[str, Tensor] = {}
    for name, shape in transformer_parameters(cfg).items():
        ours[name] = torch.zeros(shape)
    for layer in range(cfg.n_layers):
        h, block = f"transformer.h.{layer}", f"blocks.{layer}"
        for third, letter in enumerate("QKV"):
            for head in range(cfg.n_heads):
                for place in range(d_head):
                    column = third * d_model + head * d_head + place
                    ours[f"{block}.attn.W_{letter}"][head, :, place] = theirs[f"{h}.attn.c_attn.weight"][:, column]
                    ours[f"{block}.attn.b_{letter}"][head, place] = theirs[f"{h}.attn.c_attn.bias"][column]
                    row = head * d_head + place
                    ours[f"{block}.attn.W_O"][head, place] = theirs[f"{h}.attn.c_proj.weight"][row]
        for mine, name in {
            "ln1.w": "ln_1.weight",
            "ln1.b": "ln_1.bias",
            "ln2.w": "ln_2.weight",
            "ln2.b": "ln_2.bias",
            "attn.b_O": "attn.c_proj.bias",
            "mlp.W_in": "mlp.c_fc.weight",
            "mlp.b_in": "mlp.c_fc.bias",
            "mlp.W_out": "mlp.c_proj.weight",
            "mlp.b_out": "mlp.c_proj.bias",
        }.items():
            ours[f"{block}.{mine}"] = theirs[f"{h}.{name}"]
    ours["embed.W_E"] = theirs["transformer.wte.weight"]
    ours["pos_embed.W_pos"] = theirs["transformer.wpe.weight"]
    ours["ln_final.w"], ours["ln_final.b"] = theirs["transformer.ln_f.weight"], theirs["transformer.ln_f.bias"]
    for token in range(cfg.d_vocab):
        ours["unembed.W_U"][:, token] = theirs["lm_head.weight"][token]
    return ours


def conversion_mistakes(
    name: str, theirs: Mapping[str, Tensor], expected: Mapping[str, Tensor], cfg: TransformerConfig
) -> dict[str, Tensor]:
    """What people do to this one entry; anything that happens to be another entry is named as that."""
    n_heads, d_head, d_model = cfg.n_heads, cfg.d_head, cfg.d_model
    mistakes = {f"it holds what belongs into `{other}`.": weight for other, weight in expected.items() if other != name}
    layer, symbol = name.split(".")[1], name.split(".")[-1]
    if symbol in ("W_Q", "W_K", "W_V"):
        weight = theirs[f"transformer.h.{layer}.attn.c_attn.weight"]
        third = "QKV".index(symbol[-1])
        own = weight[:, third * d_model : (third + 1) * d_model]
        by_head = weight.reshape(d_model, n_heads, 3, d_head)[:, :, third].permute(1, 0, 2)
        mistakes |= {
            "the heads' columns are taken to alternate; each head has d_head columns side by side.": own.reshape(
                d_model, d_head, n_heads
            ).permute(2, 0, 1),
            "c_attn is read head by head; it holds all queries, then all keys, then all values.": by_head,
            "the columns are reshaped without moving the head axis to the front.": own.reshape(
                n_heads, d_model, d_head
            ),
            "their matrix is transposed; a Conv1D stores [in, out], as ours.": own.T.reshape(
                d_model, n_heads, d_head
            ).permute(1, 0, 2),
            "rows are taken for columns: split the last axis into heads.": own.reshape(
                n_heads, d_head, d_model
            ).permute(0, 2, 1),
        }
    if symbol == "W_O":
        weight = theirs[f"transformer.h.{layer}.attn.c_proj.weight"]
        mistakes |= {
            "c_proj is transposed; a Conv1D stores [in, out], so its rows belong to the heads.": weight.T.reshape(
                n_heads, d_head, d_model
            ),
            "the heads' rows are taken to alternate; each head has d_head rows one after the other.": weight.reshape(
                d_head, n_heads, d_model
            ).permute(1, 0, 2),
        }
    if symbol == "W_U":
        mistakes["the token embeddings are used; these weights have an lm_head of their own."] = expected["embed.W_E"].T
        mistakes["lm_head is reshaped; it needs transposing."] = theirs["lm_head.weight"].reshape(d_model, cfg.d_vocab)
    return mistakes
