"""Llama's weights under Hugging Face's names, and where each row belongs: the oracle of `convert_llama_weights`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from course_utils.checks.modules import noise
from course_utils.checks.transformer_interface import transformer_parameters
from course_utils.config import TransformerConfig


def llama_state_dict(cfg: TransformerConfig) -> dict[str, Tensor]:
    """Names and shapes of Hugging Face's LlamaForCausalLM, with a table of angles as older files have it."""
    d_model, d_mlp, n_kv_heads = cfg.d_model, cfg.d_mlp, cfg.n_kv_heads or cfg.n_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (cfg.d_vocab, d_model)}
    for layer in range(cfg.n_layers):
        inner: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (cfg.n_heads * cfg.d_head, d_model),
            "self_attn.k_proj.weight": (n_kv_heads * cfg.d_head, d_model),
            "self_attn.v_proj.weight": (n_kv_heads * cfg.d_head, d_model),
            "self_attn.o_proj.weight": (d_model, cfg.n_heads * cfg.d_head),
            "self_attn.rotary_emb.inv_freq": (cfg.rotary_dim // 2,),
            "mlp.gate_proj.weight": (d_mlp, d_model),
            "mlp.up_proj.weight": (d_mlp, d_model),
            "mlp.down_proj.weight": (d_model, d_mlp),
            "input_layernorm.weight": (d_model,),
            "post_attention_layernorm.weight": (d_model,),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inner.items()}
    shapes |= {"model.norm.weight": (d_model,), "lm_head.weight": (cfg.d_vocab, d_model)}
    return {name: noise(*shape, seed=700 + seed) for seed, (name, shape) in enumerate(shapes.items())}


def converted_by_rows(theirs: Mapping[str, Tensor], cfg: TransformerConfig) -> dict[str, Tensor]:
    """The definition: head h has rows h d_head to (h + 1) d_head of its projection."""
    d_head = cfg.d_head
    ours = {name: torch.zeros(shape) for name, shape in transformer_parameters(cfg).items()}
    for layer in range(cfg.n_layers):
        h, block = f"model.layers.{layer}", f"blocks.{layer}"
        for letter in "QKV":
            rows = theirs[f"{h}.self_attn.{letter.lower()}_proj.weight"]
            for row, weights in enumerate(rows):
                ours[f"{block}.attn.W_{letter}"][row // d_head, :, row % d_head] = weights
        for column, weights in enumerate(theirs[f"{h}.self_attn.o_proj.weight"].T):
            ours[f"{block}.attn.W_O"][column // d_head, column % d_head] = weights
        for neuron in range(cfg.d_mlp):
            ours[f"{block}.mlp.W_gate"][:, neuron] = theirs[f"{h}.mlp.gate_proj.weight"][neuron]
            ours[f"{block}.mlp.W_in"][:, neuron] = theirs[f"{h}.mlp.up_proj.weight"][neuron]
            ours[f"{block}.mlp.W_out"][neuron] = theirs[f"{h}.mlp.down_proj.weight"][:, neuron]
        ours[f"{block}.ln1.w"] = theirs[f"{h}.input_layernorm.weight"]
        ours[f"{block}.ln2.w"] = theirs[f"{h}.post_attention_layernorm.weight"]
    ours["embed.W_E"], ours["ln_final.w"] = theirs["model.embed_tokens.weight"], theirs["model.norm.weight"]
    if not cfg.tied:
        for token in range(cfg.d_vocab):
            ours["unembed.W_U"][:, token] = theirs["lm_head.weight"][token]
    return ours
