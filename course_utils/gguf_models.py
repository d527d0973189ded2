"""A Llama in a GGUF file, which the package `gguf` reads: its config, weights under transformers' names, tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from course_utils.config import TransformerConfig

BEGIN = "<|endoftext|>"  # what texts were put together with in training, and so what one begins with
SPECIAL = 3  # the type of tokens that no text is cut into, in a file's `token_type`
NAMES = {
    "token_embd": "model.embed_tokens",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def read_gguf(path: Path) -> tuple[TransformerConfig, dict[str, Tensor], Any]:
    """The config, the weights as float32 under the names of LlamaForCausalLM, and the tokenizer."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """It takes a slice of `data` for each of 100,000 tokens and merges, three times as fast from a plain array."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    file = Reader(path)
    facts = {name: field.contents() for name, field in file.fields.items()}
    cfg = _config(facts, tied=all(tensor.name != "output.weight" for tensor in file.tensors))
    return cfg, dict(_weight(tensor, cfg) for tensor in file.tensors), _tokenizer(facts)


def _config(facts: dict[str, Any], tied: bool) -> TransformerConfig:
    return TransformerConfig(
        d_vocab=len(facts["tokenizer.ggml.tokens"]),
        n_ctx=facts["llama.context_length"],
        n_layers=facts["llama.block_count"],
        n_heads=facts["llama.attention.head_count"],
        n_kv_heads=facts["llama.attention.head_count_kv"],
        d_model=facts["llama.embedding_length"],
        d_head=facts["llama.rope.dimension_count"],
        d_mlp=facts["llama.feed_forward_length"],
        gated=True,
        normalization="RMS",
        layer_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        positions="rotary",
        rotary_dim=facts["llama.rope.dimension_count"],
        rotary_base=facts["llama.rope.freq_base"],
        tied=tied,
    )


def _weight(tensor: Any, cfg: TransformerConfig) -> tuple[str, Tensor]:
    """A tensor's name and values in transformers.

    GGUF turns neighbours into a pair of rotary coordinates, transformers those that are half a head apart; so in GGUF
    the rows of queries and keys stand in another order, which has the same shape.
    """
    from gguf.quants import dequantize

    weight = torch.from_numpy(np.require(dequantize(tensor.data, tensor.tensor_type), requirements="W"))
    *block, part = tensor.name.removesuffix(".weight").split(".")
    if part in ("attn_q", "attn_k"):
        weight = weight.reshape(-1, cfg.d_head // 2, 2, cfg.d_model).transpose(1, 2).reshape(weight.shape)
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{NAMES[part]}.weight", weight


def _tokenizer(facts: dict[str, Any]) -> Any:
    """The byte-level BPE of SmolLM2, in which every digit stands alone.

    A byte without a token is left out, as SmolLM2's own tokenizer does: six control characters have none, nor have the
    first bytes of U+40000 to U+BFFFF, where Unicode has no characters.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = facts["tokenizer.ggml.tokens"]
    left_and_right = (merge.split(" ") for merge in facts["tokenizer.ggml.merges"])
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [(left, right) for left, right in left_and_right]))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, facts["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind in kinds if kind == SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=tokens[facts["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[facts["tokenizer.ggml.padding_token_id"]],
        chat_template=facts.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )
