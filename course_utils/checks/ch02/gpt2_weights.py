"""GPT-2's weights under Hugging Face's names, and where each column belongs: the oracle of `convert_gpt2_weights`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from course_utils.checks.modules import noise
from course_utils.checks.transformer_interface import transformer_parameters
from course_utils.config import TransformerConfig


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
