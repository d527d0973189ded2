"""A GPT-2, a Pythia, or a Llama, that spells everything out, slowly: what the checks of chapter 02 compare with.

Each function returns what every hook point sees, by name and in order, and last the "output". `replaced` gives the
tensors that hooks put in the place of what was computed. Written for reading, apart from the reference solution.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.config import TransformerConfig

Seen = dict[str, Tensor]
Weights = Mapping[str, Tensor]


def part(everything: Mapping[str, Tensor], owner: str) -> dict[str, Tensor]:
    """The entries of one module, without its name in front."""
    return {name.removeprefix(f"{owner}."): t for name, t in everything.items() if name.startswith(f"{owner}.")}


def layer_norm(weights: Weights, resid: Tensor, eps: float, replaced: Weights | None = None) -> Seen:
    """Scale, normalised vector, output.

    Without `b` it is RMSNorm. Without weights (a model with no normalisation) the output is the input.
    """
    if not weights:
        return {"output": resid}
    replaced = replaced or {}
    if "b" not in weights:
        mean_square = sum(x * x for x in resid.split(1, dim=-1)) / resid.shape[-1]
        seen = {"hook_scale": replaced.get("hook_scale", torch.sqrt(mean_square + eps))}
        seen["hook_normalized"] = replaced.get("hook_normalized", resid / seen["hook_scale"])
        return seen | {"output": seen["hook_normalized"] * weights["w"]}
    mean, variance = resid.mean(-1, keepdim=True), resid.var(-1, correction=0, keepdim=True)
    seen = {"hook_scale": replaced.get("hook_scale", torch.sqrt(variance + eps))}
    seen["hook_normalized"] = replaced.get("hook_normalized", (resid - mean) / seen["hook_scale"])
    seen["output"] = seen["hook_normalized"] * weights["w"] + weights["b"]
    return seen


def rotated(x: Tensor, positions: Sequence[int], rotary_dim: int, base: float) -> Tensor:
    """Visit every position and pair of coordinates, and turn the pair by its angle."""
    half = rotary_dim // 2
    out = x.clone()
    for place, position in enumerate(positions):
        for first in range(half):
            angle = position / base ** (2 * first / rotary_dim)
            a, b = x[:, place, :, first], x[:, place, :, first + half]
            out[:, place, :, first] = a * math.cos(angle) - b * math.sin(angle)
            out[:, place, :, first + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def attention(
    weights: Weights, resid: Tensor, replaced: Weights | None = None, rotary: tuple[int, float] | None = None
) -> Seen:
    """Visit every sequence, head and position; a query sees the keys up to its own position.

    `rotary` holds rotary_dim and base, for models that turn their queries and keys.
    """
    replaced = replaced or {}
    n_batch, n_pos, d_model = resid.shape
    n_heads, _, d_head = weights["W_Q"].shape
    n_kv_heads = len(weights["W_K"])  # fewer than n_heads in a Llama: the heads of queries share them, neighbours first
    rows, heads, positions = range(n_batch), range(n_heads), range(n_pos)
    seen: Seen = {}
    for letter in "QKV":
        vectors = resid.new_empty(n_batch, n_pos, len(weights[f"W_{letter}"]), d_head)
        for head in range(vectors.shape[2]):
            vectors[:, :, head] = resid @ weights[f"W_{letter}"][head]
            if f"b_{letter}" in weights:
                vectors[:, :, head] += weights[f"b_{letter}"][head]
        hook = f"hook_{letter.lower()}"
        seen[hook] = replaced.get(hook, vectors)
    q, k, v = seen["hook_q"], seen["hook_k"], seen["hook_v"]
    if rotary:
        q = seen["hook_rot_q"] = replaced.get("hook_rot_q", rotated(q, positions, *rotary))
        k = seen["hook_rot_k"] = replaced.get("hook_rot_k", rotated(k, positions, *rotary))

    scores = resid.new_full((n_batch, n_heads, n_pos, n_pos), -torch.inf)
    for row in rows:
        for head in heads:
            for query in positions:
                past = slice(query + 1)
                own = head * n_kv_heads // n_heads
                scores[row, head, query, past] = k[row, past, own] @ q[row, query, head] / d_head**0.5
    scores = seen["hook_attn_scores"] = replaced.get("hook_attn_scores", scores)

    weight = torch.exp(scores - scores.amax(dim=3, keepdim=True))
    pattern = seen["hook_pattern"] = replaced.get("hook_pattern", weight / weight.sum(dim=3, keepdim=True))

    z = torch.zeros_like(q)
    for row in rows:
        for head in heads:
            for query in positions:
                z[row, query, head] = pattern[row, head, query] @ v[row, :, head * n_kv_heads // n_heads]
    z = seen["hook_z"] = replaced.get("hook_z", z)

    result = resid.new_empty(n_batch, n_pos, n_heads, d_model)
    for head in heads:
        result[:, :, head] = z[:, :, head] @ weights["W_O"][head]
    result = seen["hook_result"] = replaced.get("hook_result", result)

    output = weights.get("b_O", resid.new_zeros(d_model)).expand(n_batch, n_pos, d_model)
    for head in heads:
        output = output + result[:, :, head]
    return seen | {"output": output}


def mlp(weights: Weights, resid: Tensor, act: str, replaced: Weights | None = None) -> Seen:
    """Up, through the non-linearity (torch's own), and down; with a gate there are two ways up."""
    replaced = replaced or {}
    if "W_gate" in weights:
        seen = {"hook_pre": replaced.get("hook_pre", F.linear(resid, weights["W_gate"].T))}
        seen["hook_pre_linear"] = replaced.get("hook_pre_linear", F.linear(resid, weights["W_in"].T))
        seen["hook_post"] = replaced.get("hook_post", F.silu(seen["hook_pre"]) * seen["hook_pre_linear"])
        return seen | {"output": F.linear(seen["hook_post"], weights["W_out"].T)}
    seen = {"hook_pre": replaced.get("hook_pre", F.linear(resid, weights["W_in"].T, weights["b_in"]))}
    pre = seen["hook_pre"]
    post = F.relu(pre) if act == "relu" else F.gelu(pre, approximate="tanh" if act == "gelu_new" else "none")
    seen["hook_post"] = replaced.get("hook_post", post)
    seen["output"] = F.linear(seen["hook_post"], weights["W_out"].T, weights["b_out"])
    return seen


def block(weights: Weights, cfg: TransformerConfig, resid: Tensor) -> Seen:
    """Attention adds to the stream, then the MLP does; in parallel, both read what came in."""
    seen: Seen = {"hook_resid_pre": resid}

    def run(owner: str, inner: Seen) -> Tensor:
        seen.update({f"{owner}.{name}": tensor for name, tensor in inner.items() if name != "output"})
        return inner["output"]

    rotary = (cfg.rotary_dim, cfg.rotary_base) if cfg.positions == "rotary" else None
    normed = run("ln1", layer_norm(part(weights, "ln1"), resid, cfg.layer_norm_eps))
    seen["hook_attn_out"] = run("attn", attention(part(weights, "attn"), normed, rotary=rotary))
    resid_pre, resid = resid, resid + seen["hook_attn_out"]
    if not cfg.attn_only:
        if not cfg.parallel:
            seen["hook_resid_mid"] = resid
        read = resid_pre if cfg.parallel else resid
        normed = run("ln2", layer_norm(part(weights, "ln2"), read, cfg.layer_norm_eps))
        seen["hook_mlp_out"] = run("mlp", mlp(part(weights, "mlp"), normed, cfg.act))
        resid = resid + seen["hook_mlp_out"]
    seen["hook_resid_post"] = resid
    return seen | {"output": resid}


def transformer(weights: Weights, cfg: TransformerConfig, tokens: Tensor) -> Seen:
    """The whole model on tokens that begin at position 0; "output" holds the logits."""
    embedded = torch.stack([torch.stack([weights["embed.W_E"][t] for t in row]) for row in tokens])
    seen: Seen = {"hook_embed": embedded}
    resid = embedded
    if cfg.positions == "learned":
        seen["hook_pos_embed"] = weights["pos_embed.W_pos"][: tokens.shape[1]].expand_as(embedded)
        resid = embedded + seen["hook_pos_embed"]
    for layer in range(cfg.n_layers):
        inner = block(part(weights, f"blocks.{layer}"), cfg, resid)
        resid = inner.pop("output")
        seen |= {f"blocks.{layer}.{name}": tensor for name, tensor in inner.items()}
    inner = layer_norm(part(weights, "ln_final"), resid, cfg.layer_norm_eps)
    resid = inner.pop("output")
    W_U = weights["embed.W_E"].T if cfg.tied else weights["unembed.W_U"]
    seen |= {f"ln_final.{name}": tensor for name, tensor in inner.items()}
    return seen | {"output": F.linear(resid, W_U.T, weights.get("unembed.b_U"))}
