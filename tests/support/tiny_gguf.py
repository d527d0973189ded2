"""A tiny Llama in a GGUF file, written as llama.cpp would: quantised, the rows of queries and keys in its order."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from course_utils.gguf_models import NAMES
from solutions.ch01_tokenization import bytes_to_unicode

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "Ġ t", "Ġt he", "1 2"]
LEFT_OUT = b"\x04\xf1"  # bytes that have no token, as in SmolLM2
TOKENS = [
    *SPECIAL,
    *(character for byte, character in bytes_to_unicode().items() if byte not in LEFT_OUT),
    *(merge.replace(" ", "") for merge in MERGES),
]
SIZES = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 40}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def write_tiny_gguf(path: Path, tied: bool = True) -> Any:
    """Write the file, and return a LlamaForCausalLM of transformers with exactly the weights that are in it."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = SIZES | HEADS | {"rope_theta": 500.0, "rms_norm_eps": 1e-3, "tie_word_embeddings": tied}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENS), **settings)).eval()
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_head_count(HEADS["num_attention_heads"])
    writer.add_head_count_kv(HEADS["num_key_value_heads"])
    writer.add_rope_dimension_count(HEADS["head_dim"])
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-3)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    for role, number in {"bos": 1, "eos": 2, "pad": 2, "unk": 0}.items():
        getattr(writer, f"add_{role}_token_id")(number)

    theirs = {name: short for short, name in NAMES.items()}
    for name, parameter in model.named_parameters():
        place = name.removesuffix(".weight").removeprefix("model.layers.")
        block, _, part = place.partition(".") if place[0].isdigit() else ("", "", place)
        short = (f"blk.{block}." if block else "") + theirs[part]
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.2)
            matrix = parameter.ndim == 2
            kind = GGMLQuantizationType.Q8_0 if "embed" in name else GGMLQuantizationType.Q4_1
            kind = kind if matrix else GGMLQuantizationType.F32
            packed = quants.quantize(parameter.numpy(), kind)
            parameter.copy_(torch.from_numpy(quants.dequantize(packed, kind)))
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            packed = quants.quantize(pairs_side_by_side(parameter.detach(), HEADS["head_dim"]).numpy(), kind)
        writer.add_tensor(f"{short}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def pairs_side_by_side(weight: Tensor, d_head: int) -> Tensor:
    """Rows in the order of GGUF: coordinate 0 of each head, then coordinate d_head / 2, then 1, and so on."""
    starts = range(0, len(weight), d_head)
    return weight[[start + pair + half for start in starts for pair in range(d_head // 2) for half in (0, d_head // 2)]]
