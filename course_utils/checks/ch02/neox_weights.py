"""Pythia's weights under Hugging Face's names, and where each row belongs: the oracle of `convert_neox_weights`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from course_utils.checks.modules import noise
from course_utils.checks.transformer_interface import transformer_parameters
from course_utils.config import TransformerConfig


def neox_state_dict(cfg: TransformerConfig, unembed: str = "lm_head") -> dict[str, Tensor]:
    """Names and shapes of Hugging Face's GPTNeoXForCausalLM, with masks and tables as older files have them."""
    d_model, d_mlp = cfg.d_model, cfg.d_mlp
    shapes: dict[str, tuple[int, ...]] = {"gpt_neox.embed_in.weight": (cfg.d_vocab, d_model)}
    for layer in range(cfg.n_layers):
        inner: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d_model,),
            "input_layernorm.bias": (d_model,),
            "post_attention_layernorm.weight": (d_model,),
            "post_attention_layernorm.bias": (d_model,),
            "attention.query_key_value.weight": (3 * d_model, d_model),
            "attention.query_key_value.bias": (3 * d_model,),
            "attention.dense.weight": (d_model, d_model),
            "attention.dense.bias": (d_model,),
            "mlp.dense_h_to_4h.weight": (d_mlp, d_model),
            "mlp.dense_h_to_4h.bias": (d_mlp,),
            "mlp.dense_4h_to_h.weight": (d_model, d_mlp),
            "mlp.dense_4h_to_h.bias": (d_model,),
            "attention.bias": (1, 1, cfg.n_ctx, cfg.n_ctx),
            "attention.masked_bias": (),
            "attention.rotary_emb.inv_freq": (cfg.rotary_dim // 2,),
        }
        shapes |= {f"gpt_neox.layers.{layer}.{name}": shape for name, shape in inner.items()}
    shapes |= {"gpt_neox.final_layer_norm.weight": (d_model,), "gpt_neox.final_layer_norm.bias": (d_model,)}
    shapes[f"{unembed}.weight"] = (cfg.d_vocab, d_model)
    return {name: noise(*shape, seed=300 + seed) for seed, (name, shape) in enumerate(shapes.items())}


def converted_by_rows(theirs: Mapping[str, Tensor], cfg: TransformerConfig) -> dict[str, Tensor]:
    """The definition: head h has rows 3 h d_head onwards, d_head each for its queries, its keys, its values."""
    d_head = cfg.d_head
    ours = {name: torch.zeros(shape) for name, shape in transformer_parameters(cfg).items()}
    for layer in range(cfg.n_layers):
        h, block = f"gpt_neox.layers.{layer}", f"blocks.{layer}"
        for head in range(cfg.n_heads):
            for place in range(d_head):
                for part, letter in enumerate("QKV"):
                    row = (3 * head + part) * d_head + place
                    ours[f"{block}.attn.W_{letter}"][head, :, place] = theirs[f"{h}.attention.query_key_value.weight"][
                        row
                    ]
                    ours[f"{block}.attn.b_{letter}"][head, place] = theirs[f"{h}.attention.query_key_value.bias"][row]
                column = head * d_head + place
                ours[f"{block}.attn.W_O"][head, place] = theirs[f"{h}.attention.dense.weight"][:, column]
        for mine, name in {
            "ln1.w": "input_layernorm.weight",
            "ln1.b": "input_layernorm.bias",
            "ln2.w": "post_attention_layernorm.weight",
            "ln2.b": "post_attention_layernorm.bias",
            "attn.b_O": "attention.dense.bias",
            "mlp.b_in": "mlp.dense_h_to_4h.bias",
            "mlp.b_out": "mlp.dense_4h_to_h.bias",
        }.items():
            ours[f"{block}.{mine}"] = theirs[f"{h}.{name}"]
        for neuron in range(cfg.d_mlp):
            ours[f"{block}.mlp.W_in"][:, neuron] = theirs[f"{h}.mlp.dense_h_to_4h.weight"][neuron]
            ours[f"{block}.mlp.W_out"][neuron] = theirs[f"{h}.mlp.dense_4h_to_h.weight"][:, neuron]
    ours["embed.W_E"] = theirs["gpt_neox.embed_in.weight"]
    ours["ln_final.w"] = theirs["gpt_neox.final_layer_norm.weight"]
    ours["ln_final.b"] = theirs["gpt_neox.final_layer_norm.bias"]
    unembed = next(name for name in ("lm_head.weight", "embed_out.weight") if name in theirs)
    for token in range(cfg.d_vocab):
        ours["unembed.W_U"][:, token] = theirs[unembed][token]
    return ours
