# ruff: noqa: N802 (check_LayerNorm is named after its exercise)
"""Chapter 02: is the transformer that the learner wrote a GPT-2, and does it draw text as it should?

Oracles are loops that spell the definition out (`by_loops`), torch's own functions, and invariants. Sizes are odd and
all different; every parameter is random, biases included.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_utils.checks import by_loops
from course_utils.checks.caching import judge_cached_generation
from course_utils.checks.core import CheckFailed, compare, during, follows_input, unchanged
from course_utils.checks.drawing import (
    ToyModel,
    eos_mistakes,
    judge_frequencies,
    kept,
    nucleus,
    ranked,
    scripted,
    sorted_nucleus,
    with_first,
)
from course_utils.checks.gpt2_weights import (
    check_converted,
    conversion_mistakes,
    converted_by_columns,
    gpt2_state_dict,
)
from course_utils.checks.modules import (
    Oracle,
    Toy,
    ToyEmbed,
    ToyPosEmbed,
    ToyWithCache,
    check_half_precision,
    check_module,
    construct,
    make_cache,
    noise,
    wave,
    weights_of,
)
from course_utils.checks.transformer_interface import (
    ATTENTION_HOOKS,
    MLP_HOOKS,
    NORM_HOOKS,
    attention_parameters,
    block_hooks,
    block_parameters,
    mlp_parameters,
    norm_parameters,
    transformer_hooks,
    transformer_parameters,
)
from course_utils.config import TransformerConfig

# d_model is not n_heads * d_head, so that no answer can mix the two up; d_head is not 4, where root and half agree.
CFG = TransformerConfig(d_vocab=13, n_ctx=9, n_layers=2, n_heads=3, d_model=7, d_head=6, d_mlp=11)
RESID = "batch pos d_model"
LOGITS = "batch d_vocab"
INF = torch.inf


def _always(answer: dict[str, Tensor]) -> Oracle:
    """An oracle for modules in which nothing is replaced."""
    return lambda replaced: answer


# ------------------------------------------------------------------------------------------------------- the layers


def check_LayerNorm(cls: Any) -> None:
    """A large epsilon shows where it stands; the input varies around a mean that is not 0."""
    cfg = replace(CFG, layer_norm_eps=0.3)
    module = construct("LayerNorm", cls, cfg, norm_parameters(cfg), NORM_HOOKS)
    weights = weights_of(module)
    w, b, eps = weights["w"], weights["b"], cfg.layer_norm_eps
    for n_batch, n_pos in [(2, 5), (1, 3)]:
        resid = noise(n_batch, n_pos, 7) + 0.5
        centred = resid - resid.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)

        def over(*axes: int, resid: Tensor = resid) -> Tensor:
            return (resid - resid.mean(axes, keepdim=True)) / (resid.var(axes, correction=0, keepdim=True) + eps).sqrt()

        mistakes = {
            "eps is added outside the root; it belongs under it.": centred / (variance.sqrt() + eps) * w + b,
            "the variance divides by d_model - 1 (torch's default); divide by d_model.": centred
            / (variance * 7 / 6 + eps).sqrt()
            * w
            + b,
            "eps is left out, or another one is used than self.eps.": centred / variance.sqrt() * w + b,
            "the root is missing: divide by the deviation, not by the variance.": centred / (variance + eps) * w + b,
            "the mean is not subtracted.": resid / (variance + eps).sqrt() * w + b,
            "`w` and `b` are left out.": over(-1),
            "`b` is left out.": over(-1) * w,
            "`w` is left out.": over(-1) + b,
            "mean and variance are taken over the positions; take them over d_model.": over(1) * w + b,
            "mean and variance are taken over the whole tensor; each position has its own.": over(0, 1, 2) * w + b,
        }
        check_module(
            "LayerNorm",
            module,
            (resid,),
            partial(by_loops.layer_norm, weights, resid, eps),
            RESID,
            NORM_HOOKS,
            mistakes,
        )
    check_half_precision("LayerNorm", module, 3000 * resid, NORM_HOOKS, b.expand_as(resid), RESID)


def check_Embed(cls: Any) -> None:
    """Rows with different tokens, one of them twice."""
    module = construct("Embed", cls, CFG, {"W_E": (13, 7)}, ())
    table = weights_of(module)["W_E"]
    for tokens in (torch.tensor([[3, 0, 12, 3, 7], [8, 1, 5, 11, 2]]), torch.tensor([[4, 12, 6]])):
        expected = torch.stack([torch.stack([table[t] for t in row]) for row in tokens])
        mistakes = {
            "every row of the batch gets the embeddings of the first row's tokens.": expected[:1].expand_as(expected),
            "the embeddings are scaled by sqrt(d_model); GPT-2 does not.": expected * 7**0.5,
            "row t + 1 is read for token t.": table.roll(-1, 0)[tokens],
        }
        check_module("Embed", module, (tokens,), _always({"output": expected}), RESID, (), mistakes)


def check_PosEmbed(cls: Any) -> None:
    """The same vectors for each row, beginning at `offset`, up to the end of the table."""
    module = construct("PosEmbed", cls, CFG, {"W_pos": (9, 7)}, ())
    table = weights_of(module)["W_pos"]
    tokens = torch.tensor([[3, 0, 8, 3, 7], [8, 1, 5, 6, 2]])
    for offset in (0, 1, 4):
        expected = torch.stack([torch.stack([table[offset + p] for p in range(5)]) for _ in tokens])
        mistakes = {
            "the token ids choose the rows; the positions should.": table[tokens],
            "`offset` is ignored.": table[:5].expand(2, 5, 7),
            "the last positions of the table are used.": table[-5:].expand(2, 5, 7),
            "positions are counted from 1.": table.roll(-1, 0)[offset : offset + 5].expand(2, 5, 7),
        }
        inputs = (tokens, offset) if offset else (tokens,)  # 0 is what it should be without being told
        name = f"PosEmbed with offset {offset}" if offset else "PosEmbed"
        check_module(name, module, inputs, _always({"output": expected}), RESID, (), mistakes)
    expected = table.expand(1, 9, 7)
    check_module("PosEmbed", module, (tokens.new_zeros(1, 9),), _always({"output": expected}), RESID)


def check_attention_scores(fn: Callable[..., Any]) -> None:
    """Every pair of vectors, one by one; fewer queries than keys."""
    axes = "batch head query key"
    for n_batch, n_query, n_key in [(2, 5, 8), (1, 4, 4)]:
        q, k = noise(n_batch, n_query, 3, 6, seed=1), noise(n_batch, n_key, 3, 6, seed=2)
        dots = torch.empty(n_batch, 3, n_query, n_key)
        for row in range(n_batch):
            for head in range(3):
                for query in range(n_query):
                    for key in range(n_key):
                        dots[row, head, query, key] = torch.dot(q[row, query, head], k[row, key, head])
        right = dots / 6**0.5
        future = torch.ones(n_query, n_key, dtype=torch.bool).triu(n_key - n_query + 1)
        mistakes = {
            "the division by sqrt(d_head) is left out.": dots,
            "the dot product is divided by d_head; divide by its root.": dots / 6,
            "the dot product is multiplied by sqrt(d_head); divide by it.": dots * 6**0.5,
            "the division is by the root of the number of heads; d_head is the last axis.": dots / 3**0.5,
            "the division is by the root of the number of keys.": dots / n_key**0.5,
            "the division is by sqrt(n_heads d_head); each head has vectors of size d_head.": dots / 18**0.5,
            "the future is masked already; that is the next exercise.": right.masked_fill(future, -INF),
            "the softmax is taken already; that comes after the mask.": right.softmax(-1),
        }
        with unchanged("attention_scores", q=q, k=k):
            actual = fn(q, k)
        compare("attention_scores", actual, right, axes, mistakes, inputs={"q·k": dots})
        follows_input("attention_scores", fn, (q, k), axes)


def _masked_by_loop(scores: Tensor) -> Tensor:
    """The definition: visit every query and key, and forbid the keys that come later."""
    out = scores.clone()
    n_query, n_key = scores.shape[-2:]
    for query in range(n_query):
        for key in range(n_key):
            if key > query + n_key - n_query:
                out[..., query, key] = -INF
    return out


def check_causal_mask(fn: Callable[..., Any]) -> None:
    """Square scores, as many queries as keys; and fewer queries, as with a key-value cache."""
    axes = "batch head query key"
    for n_query, n_key in [(5, 5), (4, 6), (1, 5)]:
        scores = torch.arange(2.0 * 3 * n_query * n_key).reshape(2, 3, n_query, n_key) / 10 - 3.05
        original = scores.clone()
        ones, shift = torch.ones(n_query, n_key, dtype=torch.bool), n_key - n_query
        future = ones.triu(shift + 1)
        mistakes = {
            "the diagonal is masked too; a query may look at itself.": original.masked_fill(ones.triu(shift), -INF),
            "past and future are swapped.": original.masked_fill(ones.tril(shift - 1), -INF),
            "past and future are swapped, and the diagonal is masked too.": original.masked_fill(
                ones.tril(shift), -INF
            ),
            "future scores are 0; softmax gives them exp(0) = 1, not nothing.": original.masked_fill(future, 0.0),
            "nothing is masked.": original,
            "future scores are +inf; softmax would look nowhere else.": original.masked_fill(future, INF),
            "-inf stands where it should, but the other scores were lost.": torch.zeros_like(original).masked_fill(
                future, -INF
            ),
        }
        if n_query != n_key:
            mistakes["the mask starts at the first key; the last query stands at the last key."] = original.masked_fill(
                ones.triu(1), -INF
            )
        for finite in (-1e4, -1e5, -1e6, -1e9, -1e10, float(torch.finfo(scores.dtype).min)):
            hint = f"future scores are {finite:.3g}, a finite number; the statement asks for -inf."
            mistakes[hint] = original.masked_fill(future, finite)
        with unchanged("causal_mask", scores=scores):
            actual = fn(scores)
        compare("causal_mask", actual, _masked_by_loop(original), axes, mistakes)
    follows_input("causal_mask", fn, (scores,), axes)


def check_Attention(cls: Any) -> None:
    """Fused or step by step, watched or not, with a key-value cache or without: the loop's numbers."""
    module = construct("Attention", cls, CFG, attention_parameters(CFG), ATTENTION_HOOKS)
    weights = weights_of(module)
    _check_unasked_result(module)
    for n_batch, n_pos in [(2, 5), (1, 1)]:
        resid = noise(n_batch, n_pos, 7, seed=3)
        check_module(
            "Attention",
            module,
            (resid,),
            partial(by_loops.attention, weights, resid),
            RESID,
            ATTENTION_HOOKS,
            _attention_mistakes(weights, resid),
            {
                # b_K adds the same number to all scores of a query, so that the output does not show it
                f"hook_{letter.lower()}": {
                    f"the bias `b_{letter}` is left out.": torch.einsum("bpm,hmd->bphd", resid, weights[f"W_{letter}"])
                }
                for letter in "QKV"
            },
        )
    _check_attention_cache(cls, module, weights)


def _attention_variant(weights: Mapping[str, Tensor], resid: Tensor, **wrong: Any) -> Tensor:
    """Attention in a few lines of einsum, with one thing done differently."""
    q, k, v = (
        torch.einsum("bpm,hmd->bhpd", resid, weights[f"W_{letter}"]) + weights[f"b_{letter}"][:, None]
        for letter in "QKV"
    )
    n_pos = resid.shape[1]
    visible = wrong.get("visible", torch.ones(n_pos, n_pos, dtype=torch.bool).tril())
    scores = q @ k.transpose(2, 3) / wrong.get("divisor", 6**0.5)
    if wrong.get("mask_after_softmax"):
        pattern = scores.softmax(-1) * visible
    else:
        pattern = scores.masked_fill(~visible, -INF).softmax(wrong.get("axis", -1))
    return torch.einsum("bhpd,hdm->bpm", pattern @ v, weights["W_O"]) + wrong.get("n_biases", 1) * weights["b_O"]


def _attention_mistakes(weights: Mapping[str, Tensor], resid: Tensor) -> dict[str, Callable[[], Tensor]]:
    n_pos = resid.shape[1]
    ones = torch.ones(n_pos, n_pos, dtype=torch.bool)

    def variant(**wrong: Any) -> Callable[[], Tensor]:
        return lambda: _attention_variant(weights, resid, **wrong)

    def without(*names: str) -> Callable[[], Tensor]:
        zeros = {name: torch.zeros_like(weights[name]) for name in names}
        return lambda: _attention_variant({**weights, **zeros}, resid)

    return {
        **{f"the bias `b_{letter}` is left out.": without(f"b_{letter}") for letter in "QVO"},
        "all four biases are left out.": without("b_Q", "b_K", "b_V", "b_O"),
        "`b_O` is added once per head; it belongs to the sum of the heads.": variant(n_biases=3),
        "the scores are not divided by sqrt(d_head).": variant(divisor=1.0),
        "the scores are divided by sqrt(d_model); use d_head.": variant(divisor=7**0.5),
        "nothing is masked: positions look into the future.": variant(visible=ones),
        "past and future are swapped.": variant(visible=ones.triu()),
        "the diagonal is masked too, which leaves the first query nothing to look at.": variant(visible=ones.tril(-1)),
        "the mask comes after the softmax: the weights of a query no longer sum to 1.": variant(
            mask_after_softmax=True
        ),
        "the softmax runs over the queries; for each query the weights of the keys sum to 1.": variant(axis=-2),
        "`resid` is added to the output; the block will do that.": lambda: _attention_variant(weights, resid) + resid,
        "W_K is used for the queries too.": lambda: _attention_variant({**weights, "W_Q": weights["W_K"]}, resid),
        "W_K is used for the values too.": lambda: _attention_variant({**weights, "W_V": weights["W_K"]}, resid),
    }


def _check_unasked_result(module: Any) -> None:
    calls: list[int] = []
    handle = module.hook_result.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        module(noise(2, 5, 7))
    handle.remove()
    if calls:
        raise CheckFailed(
            "Attention: `hook_result` was computed although nobody watches it; that costs much memory.\n"
            "  Next: go that way only `if self.hook_result.is_watched`."
        )


def _check_attention_cache(cls: type, module: Any, weights: Mapping[str, Tensor]) -> None:
    """Read positions 0 to 2, then 3 and 4: what comes out is what all five give at once."""
    name = "Attention with a key-value cache"
    layer = module.layer = 1
    resid = noise(2, 5, 7, seed=4)
    expected = by_loops.attention(weights, resid)
    first_keys = torch.ones(2, 5, dtype=torch.bool).tril()
    mistakes = {
        "the cache is not used: the new positions see only each other.": lambda: _attention_variant(
            weights, resid[:, 3:]
        ),
        "the mask starts at the first key; the last query stands at the last key.": lambda: _cached_variant(
            weights, resid, first_keys
        ),
        "nothing is masked: new positions look at those after them.": lambda: _cached_variant(
            weights, resid, torch.ones(2, 5, dtype=torch.bool)
        ),
    }
    for watched in ((), ("hook_attn_scores", "hook_pattern")):
        handles = [getattr(module, hook).add(lambda activation, hook: None) for hook in watched]
        cache = make_cache(cls, CFG, batch=2)
        with torch.no_grad(), during("with a key-value cache"):
            start = module(resid[:, :3], cache)
            compare(f"{name} that is empty", start, expected["output"][:, :3], RESID)
            actual = module(resid[:, 3:], cache)
            compare(name, actual, expected["output"][:, 3:], RESID, mistakes)
        for handle in handles:
            handle.remove()
        if cache.appended != [(layer, 3), (layer, 2)]:
            notes = ", ".join(f"layer {index}: {size} positions" for index, size in cache.appended) or "nothing"
            raise CheckFailed(
                f"{name}: expected one append per call (layer {layer}: 3 positions, then layer {layer}: "
                f"2 positions), got {notes}.\n"
                "  Next: call cache.append(self.layer, k, v) once, with the new positions only."
            )


def _cached_variant(weights: Mapping[str, Tensor], resid: Tensor, visible: Tensor) -> Tensor:
    """The last two of five positions, with their own idea of what is visible."""
    return _attention_variant(weights, resid, visible=torch.cat([torch.ones(3, 5, dtype=torch.bool), visible]))[:, 3:]


def check_gelu_new(fn: Callable[..., Any]) -> None:
    """Against torch's own, in one and three dimensions; then far from 0, where careless formulas overflow."""
    for inputs, axes in [
        (torch.linspace(-4, 4, 110).roll(26).reshape(2, 5, 11), "batch pos d_mlp"),
        (noise(13), "element"),
    ]:
        cube = 0.044715 * inputs**3
        root = math.sqrt(2 / math.pi)
        mistakes = {
            "it is the exact GELU (with erf); GPT-2 uses the formula with tanh.": F.gelu(inputs),
            "it is x sigmoid(1.702 x), a rougher approximation.": inputs * torch.sigmoid(1.702 * inputs),
            "it is x sigmoid(x), another function (SiLU).": F.silu(inputs),
            "it is the ReLU.": F.relu(inputs),
            "the factor 0.5 is left out.": inputs * (1 + torch.tanh(root * (inputs + cube))),
            "the 1 + is left out.": 0.5 * inputs * torch.tanh(root * (inputs + cube)),
            "the factor x in front is left out.": 0.5 * (1 + torch.tanh(root * (inputs + cube))),
            "the cubic term is left out.": 0.5 * inputs * (1 + torch.tanh(root * inputs)),
            "the cubic term lacks its factor 0.044715.": 0.5 * inputs * (1 + torch.tanh(root * (inputs + inputs**3))),
            "x is squared where it should be cubed.": 0.5
            * inputs
            * (1 + torch.tanh(root * (inputs + 0.044715 * inputs**2))),
            "sqrt(2 / pi) applies to x alone; it multiplies the whole bracket.": 0.5
            * inputs
            * (1 + torch.tanh(root * inputs + cube)),
            "sqrt(2 / pi) is left out.": 0.5 * inputs * (1 + torch.tanh(inputs + cube)),
            "2 / pi lacks its root.": 0.5 * inputs * (1 + torch.tanh(2 / math.pi * (inputs + cube))),
            "the root is that of 2 pi; it should be that of 2 / pi.": 0.5
            * inputs
            * (1 + torch.tanh(math.sqrt(2 * math.pi) * (inputs + cube))),
        }
        with unchanged("gelu_new", x=inputs):
            actual = fn(inputs)
        compare("gelu_new", actual, F.gelu(inputs, approximate="tanh"), axes, mistakes, rtol=1e-5, inputs={"x": inputs})
        follows_input("gelu_new", fn, (inputs,), axes)
    far = torch.tensor([-1000.0, -100.0, 0.0, 100.0, 1000.0])
    compare("gelu_new far from 0", fn(far), F.relu(far), "element")


def check_MLP(cls: Any) -> None:
    """With ReLU, which torch has, and then with the learner's gelu_new."""
    for act in ("relu", "gelu_new"):
        cfg = replace(CFG, act=act)
        module = construct("MLP", cls, cfg, mlp_parameters(cfg), MLP_HOOKS)
        weights = weights_of(module)
        W_in, b_in, W_out, b_out = (weights[name] for name in ("W_in", "b_in", "W_out", "b_out"))
        function, other = (F.relu, F.gelu) if act == "relu" else (_gelu, F.relu)
        for n_batch, n_pos in [(2, 5), (1, 3)]:
            resid = noise(n_batch, n_pos, 7, seed=5)
            pre = resid @ W_in + b_in
            right = function(pre) @ W_out + b_out
            mistakes = {
                "`b_in` is left out.": function(resid @ W_in) @ W_out + b_out,
                "`b_out` is left out.": right - b_out,
                "both biases are left out.": function(resid @ W_in) @ W_out,
                "there is no non-linearity between the two maps.": pre @ W_out + b_out,
                "the non-linearity comes before `b_in` is added.": (function(resid @ W_in) + b_in) @ W_out + b_out,
                "the non-linearity is applied to the output too.": function(right),
                "the non-linearity comes after both maps.": function(pre @ W_out + b_out),
                "`resid` is added to the output; the block will do that.": right + resid,
                f"another non-linearity is used than cfg.act = {act!r}; self.act holds the right one.": (
                    _gelu(pre) if act == "relu" else other(pre)
                )
                @ W_out
                + b_out,
            }
            check_module(
                "MLP",
                module,
                (resid,),
                partial(by_loops.mlp, weights, resid, act),
                RESID,
                MLP_HOOKS,
                mistakes,
            )


def _gelu(pre: Tensor) -> Tensor:
    return F.gelu(pre, approximate="tanh")


def check_TransformerBlock(cls: Any) -> None:
    """First the wiring, with toy parts whose answers are known; then whole blocks with their real parts."""
    _check_block_wiring(cls, CFG)
    with during("with cfg.attn_only"):
        _check_block_wiring(cls, replace(CFG, attn_only=True))
    for cfg in (CFG, replace(CFG, attn_only=True), replace(CFG, normalization="none", act="relu")):
        wanted = block_hooks(cfg)
        module = construct("TransformerBlock", cls, cfg, block_parameters(cfg), wanted)
        weights = weights_of(module)
        resid = noise(2, 5, 7, seed=6)
        check_module(
            "TransformerBlock with its real parts",
            module,
            (resid,),
            _always(by_loops.block(weights, cfg, resid)),
            RESID,
            wanted,
            replace=False,
        )


def _check_block_wiring(cls: Any, cfg: TransformerConfig) -> None:
    name = "TransformerBlock" + (" with attn_only" if cfg.attn_only else "")
    wanted = [hook for hook in block_hooks(cfg) if "." not in hook]
    module = construct(name, cls, cfg, block_parameters(cfg), wanted)
    ln1, attn, ln2, mlp = wave(1.1, 0.2), wave(0.9, 0.5), wave(1.3, -0.4), wave(-0.8, 0.7)
    module.ln1 = Toy(name, "ln1", ln1)
    module.attn = ToyWithCache(name, "attn", attn)
    if not cfg.attn_only:
        module.ln2, module.mlp = Toy(name, "ln2", ln2), Toy(name, "mlp", mlp)
    resid = noise(2, 5, 7, seed=7)

    def oracle(replaced: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def at(hook: str, tensor: Tensor) -> Tensor:
            seen[hook] = replaced.get(hook, tensor)
            return seen[hook]

        stream = at("hook_resid_pre", resid)
        stream = stream + at("hook_attn_out", attn(ln1(stream)))
        if not cfg.attn_only:
            stream = at("hook_resid_mid", stream)
            stream = stream + at("hook_mlp_out", mlp(ln2(stream)))
        return {**seen, "hook_resid_post": (post := at("hook_resid_post", stream)), "output": post}

    mid = resid + attn(ln1(resid))
    mistakes = {
        "attention reads the stream itself; it should read ln1's copy.": resid + attn(resid),
        "the stream is not added to what attention returns.": attn(ln1(resid)),
        "what ln1 returns goes on as the stream; only attention should read it.": ln1(resid) + attn(ln1(resid)),
        "the norm comes after attention; it belongs before.": ln1(resid + attn(resid)),
        "attention's output is normalised; normalise what it reads.": resid + ln1(attn(resid)),
    }
    if not cfg.attn_only:
        mistakes = {
            "nothing is added back: each part's output replaces the stream.": mlp(ln2(attn(ln1(resid)))),
            "the MLP's output replaces the stream; add it.": mlp(ln2(mid)),
            "attention's output replaces the stream; add it.": attn(ln1(resid)) + mlp(ln2(attn(ln1(resid)))),
            "the MLP reads the stream from before attention; it should read the sum.": mid + mlp(ln2(resid)),
            "what attention adds is lost after the MLP: add the MLP's output to the sum.": resid + mlp(ln2(mid)),
            "ln1 stands in front of both; the MLP has its own, ln2.": mid + mlp(ln1(mid)),
            "ln1 and ln2 are swapped.": (swapped := resid + attn(ln2(resid))) + mlp(ln1(swapped)),
            "attention reads the stream itself; it should read ln1's copy.": (bare := resid + attn(resid))
            + mlp(ln2(bare)),
            "the MLP reads the stream itself; it should read ln2's copy.": mid + mlp(mid),
            "the norms come after the sums; they belong in front of each part.": ln2(
                (post_norm := ln1(resid + attn(resid))) + mlp(post_norm)
            ),
            "the normalised vectors go on as the stream; only the parts should read them.": (
                normed := ln2(ln1(resid) + attn(ln1(resid)))
            )
            + mlp(normed),
            "attention's output is added twice.": mid + attn(ln1(resid)) + mlp(ln2(mid)),
            "the MLP comes first, attention second.": (early := resid + mlp(ln2(resid))) + attn(ln1(early)),
            "the block ends after attention.": mid,
        }
    check_module(name, module, (resid,), oracle, RESID, wanted, mistakes, toys=True)

    cache = make_cache(cls, cfg, batch=2)
    module(resid, cache)
    if module.attn.caches[-1] is not cache:
        raise CheckFailed(
            f"{name}: attention was not given the key-value cache.\n  Next: hand it on, as the second argument."
        )


def check_Unembed(cls: Any) -> None:
    """Against torch's linear map."""
    module = construct("Unembed", cls, CFG, {"W_U": (7, 13), "b_U": (13,)}, ())
    weights = weights_of(module)
    W_U, b_U = weights["W_U"], weights["b_U"]
    for n_batch, n_pos in [(2, 5), (1, 3)]:
        resid = noise(n_batch, n_pos, 7, seed=8)
        logits = F.linear(resid, W_U.T, b_U)
        mistakes = {
            "the bias `b_U` is left out.": resid @ W_U,
            "the softmax is taken; logits come before it.": logits.softmax(-1),
            "the log-softmax is taken; logits come before it.": logits.log_softmax(-1),
            "the vectors are normalised first; `ln_final` does that.": F.layer_norm(resid, (7,)) @ W_U + b_U,
        }
        check_module("Unembed", module, (resid,), _always({"output": logits}), "batch pos d_vocab", (), mistakes)


def check_Transformer(cls: Any) -> None:
    """First the wiring, with toy parts whose answers are known; then whole models with their real parts."""
    _check_transformer_wiring(cls)
    bare = replace(CFG, attn_only=True, normalization="none")
    for cfg in (CFG, bare):
        wanted = transformer_hooks(cfg)
        module = construct("Transformer", cls, cfg, transformer_parameters(cfg), wanted)
        weights = weights_of(module)
        for tokens in (torch.tensor([[3, 0, 12, 3, 7], [8, 1, 5, 11, 2]]), torch.tensor([[4, 12, 6]])):
            check_module(
                "Transformer with its real parts",
                module,
                (tokens,),
                _always(by_loops.transformer(weights, cfg, tokens)),
                "batch pos d_vocab",
                wanted,
                replace=False,
            )
        tokens = torch.tensor([[3, 0, 12, 3, 7], [8, 1, 5, 11, 2]])
        expected = by_loops.transformer(weights, cfg, tokens)["output"]
        cache = make_cache(cls, cfg, batch=2)
        with torch.no_grad(), during("with a key-value cache"):
            steps = [module(tokens[:, :3], cache), module(tokens[:, 3:4], cache), module(tokens[:, 4:], cache)]
        name = "Transformer with its real parts and a key-value cache"
        compare(name, torch.cat(steps, dim=1), expected, "batch pos d_vocab")


def _check_transformer_wiring(cls: Any) -> None:
    name = "Transformer"
    module = construct(name, cls, CFG, transformer_parameters(CFG), transformer_hooks(CFG))
    E, P, U = noise(13, 7, seed=9), noise(9, 7, seed=10), noise(7, 13, seed=11)
    first, second, final = wave(1.2, 0.3), wave(0.7, -0.6), wave(-1.1, 0.4)
    module.embed = ToyEmbed(name, "embed", lambda tokens: E[tokens])
    module.pos_embed = ToyPosEmbed(
        name, "pos_embed", lambda tokens, offset: P[offset : offset + tokens.shape[1]].expand(*tokens.shape, 7)
    )
    module.blocks = nn.ModuleList([ToyWithCache(name, "blocks[0]", first), ToyWithCache(name, "blocks[1]", second)])
    module.ln_final = Toy(name, "ln_final", final)
    module.unembed = Toy(name, "unembed", lambda resid: resid @ U)
    tokens = torch.tensor([[3, 0, 8, 3, 7], [8, 1, 5, 6, 2]])
    embedded = E[tokens]

    def rest(resid: Tensor) -> Tensor:
        return final(second(first(resid))) @ U

    def oracle(replaced: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen = {"hook_embed": embedded, "hook_pos_embed": P[:5].expand(2, 5, 7), **replaced}
        return {**seen, "output": rest(seen["hook_embed"] + seen["hook_pos_embed"])}

    resid = embedded + P[:5]
    mistakes = {
        "the position embeddings are left out.": rest(embedded),
        "the token embeddings are left out.": rest(P[:5].expand(2, 5, 7)),
        "ln_final is left out.": second(first(resid)) @ U,
        "only the first block runs.": final(first(resid)) @ U,
        "only the last block runs: each should read what the one before returned.": final(second(resid)) @ U,
        "the blocks run in the opposite order.": final(first(second(resid))) @ U,
        "the blocks are skipped.": final(resid) @ U,
        "each block's output is added to the stream; a block returns the whole stream.": final(
            (stream := resid + first(resid)) + second(stream)
        )
        @ U,
        "ln_final runs before the blocks.": second(first(final(resid))) @ U,
        "ln_final runs after every block.": final(second(final(first(resid)))) @ U,
        "the position embeddings are added again in front of each block.": final(second(first(resid) + P[:5])) @ U,
        "the softmax is taken; the model returns logits.": rest(resid).softmax(-1),
    }
    wanted = ("hook_embed", "hook_pos_embed")
    check_module(name, module, (tokens,), oracle, "batch pos d_vocab", wanted, mistakes, toys=True)
    _check_transformer_offset(cls, module, tokens, early=rest(resid), expected=rest(embedded + P[3:8]))


def _check_transformer_offset(cls: Any, module: Any, tokens: Tensor, early: Tensor, expected: Tensor) -> None:
    """With three positions in a cache the next token stands at position 3, and every block is given the cache."""
    cache = make_cache(cls, CFG, batch=2)
    for layer in range(CFG.n_layers):
        cache.append(layer, torch.zeros(2, 3, 3, 6), torch.zeros(2, 3, 3, 6))
    with during("with a key-value cache"):
        actual = module(tokens, cache)
    mistakes = {"positions are counted from 0; the first new token stands at `cache.length`.": early}
    name = "Transformer with 3 positions in a key-value cache"
    compare(name, actual, expected, "batch pos d_vocab", mistakes)
    for index, toy in enumerate(module.blocks):
        if toy.caches[-1] is not cache:
            raise CheckFailed(f"{name}: block {index} was not given the cache.\n  Next: hand it on to each block.")


# ---------------------------------------------------------------------------------------------------------- weights


def check_init_weights(fn: Callable[..., Any]) -> None:
    """Deviations measured on matrices of a thousand numbers or more; six standard errors of tolerance."""
    cfg = TransformerConfig(d_vocab=80, n_ctx=60, n_layers=3, n_heads=4, d_model=32, d_head=9, d_mlp=50)
    std = 0.03
    model = _fresh_model(fn, cfg)
    objects = dict(model.named_parameters())
    global_state = torch.get_rng_state()
    fn(model, std, torch.Generator().manual_seed(1))
    if not torch.equal(torch.get_rng_state(), global_state):
        raise CheckFailed(
            "init_weights: it drew from torch's global random numbers, so `generator` does not decide the weights.\n"
            "  Next: hand `generator=generator` to every draw."
        )
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter is not objects.get(name) or not parameter.requires_grad:
            raise CheckFailed(
                f"init_weights: `{name}` is no longer the parameter that it was, so an optimizer may lose it.\n"
                "  Next: write into it, under torch.no_grad(): parameter.normal_(...), parameter.copy_(...)."
            )
        symbol = name.split(".")[-1]
        if symbol.startswith("W_"):
            deeper = symbol in ("W_O", "W_out")
            _check_normal(name, values[name], std / math.sqrt(2 * cfg.n_layers) if deeper else std, std, cfg.n_layers)
        else:
            target = torch.ones_like if symbol == "w" else torch.zeros_like
            what = "a LayerNorm starts with `w` 1" if symbol == "w" else "biases start at 0"
            actual = values[name].flatten()
            other = {f"it is left as it was; {what}.": torch.full_like(actual, UNTOUCHED)}
            compare(f"init_weights: `{name}`", actual, target(actual), "element", other)
    _check_draws(fn, cfg, std, values)


UNTOUCHED = 5.0


def _fresh_model(fn: Callable[..., Any], cfg: TransformerConfig) -> nn.Module:
    """The learner's own Transformer where there is one beside the function; else bare parameters of the same names."""
    own = getattr(fn, "__globals__", {}).get("Transformer")
    model = own(cfg) if isinstance(own, type) else _bare_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(UNTOUCHED)
    return model


def _bare_model(cfg: TransformerConfig) -> Any:
    model: Any = nn.Module()
    model.cfg = cfg
    model.blocks = nn.ModuleList(nn.Module() for _ in range(cfg.n_layers))
    for name, shape in transformer_parameters(cfg).items():
        *path, symbol = name.split(".")
        owner = model
        for step in path:
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        owner.register_parameter(symbol, nn.Parameter(torch.empty(shape)))
    return model


def _check_normal(name: str, values: Tensor, want: float, std: float, n_layers: int) -> None:
    """Mean 0, the right deviation, and the tails of a normal distribution."""
    error = want / math.sqrt(2 * values.numel())
    got, mean = values.std().item(), values.mean().item()
    if abs(got - want) > 6 * error:
        lines = [f"init_weights: `{name}` has standard deviation {got:.3g}, expected {want:.3g}."]
        causes = {
            std: "it is drawn like the others; what writes into the residual stream gets std / sqrt(2 n_layers).",
            std / math.sqrt(n_layers): "only the blocks are counted; each adds to the stream twice, so 2 n_layers.",
            std / (2 * n_layers): "it is divided by 2 n_layers; divide by the root of that.",
            std / math.sqrt(2 * n_layers): "it is scaled down too; only `W_O` and `W_out` are.",
            std**2: "`std` is taken for the variance; or the deviation is squared.",
            math.sqrt(std): "`std` is taken for a variance; it is the deviation itself.",
            1.0: "`std` is not used.",
        }
        if values.unique().numel() == 1:
            causes = {got: "it holds one number everywhere; it should be drawn at random."}
        lines += [f"  That fits if {cause}" for level, cause in causes.items() if abs(got - level) < 6 * error]
        raise CheckFailed("\n".join(lines))
    if abs(mean) > 6 * want / math.sqrt(values.numel()):
        raise CheckFailed(f"init_weights: `{name}` has mean {mean:.3g}, expected 0.\n  Next: draw around 0.")
    within = (values.abs() < want).double().mean().item()  # normal: 0.683; uniform: 0.577
    if abs(within - 0.683) > 6 * 0.465 / math.sqrt(values.numel()) or values.abs().max() < 2.2 * want:
        raise CheckFailed(
            f"init_weights: mean and deviation of `{name}` are right, but {within:.0%} of its numbers are within one "
            f"deviation of 0 (of a normal distribution 68% are), the largest is {values.abs().max() / want:.2g} away.\n"
            "  Next: draw from a normal distribution."
        )


def _check_draws(fn: Callable[..., Any], cfg: TransformerConfig, std: float, values: Mapping[str, Tensor]) -> None:
    """The seed decides everything, and no two matrices hold the same numbers."""
    again, other = _fresh_model(fn, cfg), _fresh_model(fn, cfg)
    fn(again, std, torch.Generator().manual_seed(1))
    fn(other, std, torch.Generator().manual_seed(2))
    drawn = [name for name in values if name.split(".")[-1].startswith("W_")]
    for name in drawn:
        if not torch.equal(again.get_parameter(name), values[name]):
            raise CheckFailed(
                f"init_weights: the same seed gave two different `{name}`.\n"
                "  Next: hand `generator=generator` to every draw."
            )
        if torch.equal(other.get_parameter(name), values[name]):
            raise CheckFailed(
                f"init_weights: two different seeds gave the same `{name}`.\n"
                "  Next: draw from `generator` as it comes, without seeding it."
            )
    for position, name in enumerate(drawn):
        for earlier in drawn[:position]:
            a, b = values[name].flatten(), values[earlier].flatten()
            size = min(len(a), len(b), 50)
            if torch.allclose(a[:size] / a[:size].norm(), b[:size] / b[:size].norm(), atol=1e-4):
                raise CheckFailed(
                    f"init_weights: `{earlier}` and `{name}` hold the same random numbers.\n"
                    "  Next: let one generator run through all draws, without seeding it again."
                )


def check_convert_gpt2_weights(fn: Callable[..., Any]) -> None:
    """Every entry, put together column by column from a state dict with GPT-2's names."""
    cfg = TransformerConfig(d_vocab=13, n_ctx=9, n_layers=2, n_heads=3, d_model=12, d_head=4, d_mlp=11)
    theirs = gpt2_state_dict(cfg)
    expected = converted_by_columns(theirs, cfg)
    check_converted(
        "convert_gpt2_weights",
        fn,
        cfg,
        theirs,
        expected,
        lambda entry: conversion_mistakes(entry, theirs, expected, cfg),
    )


# --------------------------------------------------------------------------------------------------- drawing tokens


def check_greedy(fn: Callable[..., Any]) -> None:
    """Rows whose largest logits stand at both ends and in between, one of them with no positive logit."""
    logits = noise(3, 13, seed=12)
    logits[0, 12], logits[2, 0] = 4.0, 5.0
    logits[1] -= 9.0
    for rows in (logits, logits[1:2]):
        expected = torch.tensor([max(range(13), key=row.tolist().__getitem__) for row in rows])
        mistakes = {
            "the smallest logit is taken.": rows.argmin(-1),
            "every row gets the first row's token.": expected[:1].expand_as(expected),
            "the largest absolute value is taken.": rows.abs().argmax(-1),
            "the largest logit is sought in the whole tensor, not in each row.": rows.argmax().expand_as(expected),
        }
        with unchanged("greedy", logits=rows):
            actual = fn(rows)
        compare("greedy", actual, expected, "batch", mistakes)
    follows_input("greedy", fn, (logits,), "batch")


def _expect_value_error(name: str, given: str, fn: Callable[..., Any], *arguments: Any) -> None:
    """The statement promises a ValueError for this."""
    try:
        returned = fn(*arguments)
    except ValueError:
        return
    what = "None" if returned is None else f"a {type(returned).__name__}"
    raise CheckFailed(f"{name}: {given} should raise ValueError, but it returned {what}.\n  Next: test for it first.")


def check_apply_temperature(fn: Callable[..., Any]) -> None:
    """Below 1, above 1, exactly 1."""
    logits = noise(2, 13, seed=13, scale=2.0)
    for temperature in (0.4, 1.0, 2.5):
        expected = torch.tensor([[logit / temperature for logit in row] for row in logits.tolist()])
        mistakes = {
            "the logits are multiplied by the temperature.": logits * temperature,
            "the temperature is ignored.": logits,
            "the softmax is taken; return logits.": expected.softmax(-1),
            "the log-softmax is taken; return the logits themselves.": expected.log_softmax(-1),
            "probabilities are divided, not logits.": logits.softmax(-1) / temperature,
            "the division is by the square of the temperature.": logits / temperature**2,
            "the temperature is added.": logits + temperature,
        }
        with unchanged("apply_temperature", logits=logits):
            actual = fn(logits, temperature)
        compare(
            f"apply_temperature with temperature {temperature}",
            actual,
            expected,
            LOGITS,
            mistakes,
            inputs={"logit": logits},
        )
    follows_input("apply_temperature", fn, (logits, 0.4), LOGITS)
    for bad in (0.0, -0.5):
        _expect_value_error("apply_temperature", f"temperature {bad}", fn, logits, bad)


def check_apply_frequency_penalty(fn: Callable[..., Any]) -> None:
    """Rows with different histories: a token three times, one twice, token 0 once, one that both rows have."""
    name = "apply_frequency_penalty"
    history = torch.tensor([[3, 3, 3, 1, 7], [12, 0, 12, 5, 3]])
    logits = noise(2, 13, seed=14, scale=2.0)
    for n_rows, n_pos, penalty in [(2, 5, 0.7), (2, 5, -0.4), (1, 4, 1.3), (2, 5, 0.0)]:
        rows, tokens = logits[:n_rows], history[:n_rows, :n_pos]
        counts = torch.tensor([[float(row.count(token)) for token in range(13)] for row in tokens.tolist()])
        seen = (counts > 0).float()
        expected = rows - penalty * counts
        mistakes = {
            "a token pays once, however often it occurs.": rows - penalty * seen,
            "the penalty is added; subtract it.": rows + penalty * counts,
            "the logits are lost: the penalties alone are returned.": -penalty * counts,
            "all rows pay for the tokens of the whole batch.": rows - penalty * counts.sum(0),
            "every row pays for the first row's tokens.": rows - penalty * counts[:1],
            "the logits of seen tokens are divided by the penalty.": rows / torch.where(seen > 0, penalty, 1.0),
            "the count is used alone, without the penalty.": rows - counts,
            "every token pays, seen or not.": rows - penalty,
            "counts are divided by the number of positions.": rows - penalty * counts / n_pos,
            "the last token alone pays.": rows
            - penalty * torch.zeros_like(rows).scatter(1, tokens[:, -1:], torch.ones(n_rows, 1)),
            "nothing is subtracted.": rows,
        }
        with unchanged(name, logits=rows, tokens=tokens):
            actual = fn(rows, tokens, penalty)
        given = {"logit": rows, "count": counts}
        compare(f"{name} with penalty {penalty}", actual, expected, LOGITS, mistakes, inputs=given)
    follows_input(name, fn, (logits, history, 0.7), LOGITS)


def check_keep_top_k(fn: Callable[..., Any]) -> None:
    """Rows on different levels, so that one row's threshold is wrong for the others."""
    logits = noise(3, 13, seed=15, scale=2.0) + torch.tensor([[0.0], [-8.0], [5.0]])
    order = ranked(logits)
    for k in (4, 1, 2, 13, 20):
        expected = kept(logits, [row[:k] for row in order])
        size = min(k, 13)
        mistakes = {
            "the smallest logits are kept.": kept(logits, [row[-size:] for row in order]),
            "the others are set to 0, which softmax turns into exp(0) = 1; use -inf.": logits.where(
                expected.isfinite(), 0.0
            ),
            "the first row's threshold is used for all rows.": logits.masked_fill(
                logits < logits[0, order[0][size - 1]], -INF
            ),
            "the first row's tokens are kept in all rows.": kept(logits, [order[0][:k]] * 3),
            "the k largest of the whole tensor are kept, not of each row.": logits.masked_fill(
                logits < logits.flatten().topk(k).values[-1], -INF
            ),
            "one token too few is kept.": kept(logits, [row[: k - 1] for row in order]),
            "one token too many is kept.": kept(logits, [row[: k + 1] for row in order]),
            "the first k tokens of the vocabulary are kept.": kept(logits, [range(size)] * 3),
            "probabilities are returned; return logits.": expected.softmax(-1),
        }
        with unchanged("keep_top_k", logits=logits):
            actual = fn(logits, k)
        compare(f"keep_top_k with k = {k}", actual, expected, LOGITS, mistakes, inputs={"logit": logits})
    follows_input("keep_top_k", fn, (logits, 4), LOGITS)
    for bad in (0, -2):
        _expect_value_error("keep_top_k", f"k = {bad}", fn, logits, bad)


def check_keep_top_p(fn: Callable[..., Any]) -> None:
    """Rows of different sharpness, in no order, so that each keeps another number of tokens."""
    logits = noise(3, 13, seed=16) * torch.tensor([[1.0], [3.0], [0.4]]) + torch.tensor([[0.0], [6.0], [-4.0]])
    chances, order = logits.double().softmax(-1), ranked(logits)
    table = chances.tolist()
    for rows, p, at_least in [
        (3, 0.6, 1),
        (3, 0.9, 1),
        (3, 0.01, 1),
        (3, 0.3, 4),
        (3, 0.01, 20),
        (1, 0.7, 1),
        (3, 1.0, 1),
    ]:
        some = logits[:rows]
        inside = [nucleus(table[row], order[row], p, at_least) for row in range(rows)]
        free = [nucleus(table[row], order[row], p) for row in range(rows)]
        expected = kept(some, inside)
        sizes = [len(tokens) for tokens in inside]
        upward = [nucleus(table[row], order[row][::-1], p, at_least) for row in range(rows)]
        mistakes = {
            "the token that crosses p is dropped; it is the last one kept.": kept(
                some, [order[row][: max(len(free[row]) - 1, at_least)] for row in range(rows)]
            ),
            "the token that crosses p is dropped, and sometimes nothing is left.": kept(
                some, [order[row][: len(free[row]) - 1] for row in range(rows)]
            ),
            "one token too many is kept after p is reached.": kept(
                some, [order[row][: sizes[row] + 1] for row in range(rows)]
            ),
            "the least likely tokens are kept.": kept(some, upward),
            "the mask of the sorted logits is put on the unsorted ones: bring it back into the tokens' order.": kept(
                some, [range(size) for size in sizes]
            ),
            "the logits come back sorted.": sorted_nucleus(some, sizes),
            "the first row's tokens are kept in all rows.": kept(some, [inside[0]] * rows),
            "every row keeps as many tokens as the first.": kept(some, [order[row][: sizes[0]] for row in range(rows)]),
            "min_tokens_to_keep is ignored.": kept(some, free),
            "the others are set to 0, which softmax turns into exp(0) = 1; use -inf.": some.where(
                expected.isfinite(), 0.0
            ),
            "single tokens with a probability above p are kept; it is the sum that counts.": kept(
                some, [with_first(order[row], at_least, [chance >= p for chance in table[row]]) for row in range(rows)]
            ),
            "probabilities are returned; return logits.": expected.softmax(-1),
            "nothing is dropped.": some,
        }
        arguments = (some, p) if at_least == 1 else (some, p, at_least)
        with unchanged("keep_top_p", logits=some):
            actual = fn(*arguments)
        at = f" and min_tokens_to_keep = {at_least}" if at_least > 1 else ""
        given = {"logit": some, "probability": chances[:rows]}
        compare(f"keep_top_p with p = {p}{at}", actual, expected, LOGITS, mistakes, inputs=given)
    follows_input("keep_top_p", fn, (logits, 0.6), LOGITS)
    for bad in (0.0, -0.1, 1.5):
        _expect_value_error("keep_top_p", f"p = {bad}", fn, logits, bad)
    sharp = torch.tensor([[40.0, 0.0, 3.0, -1.0], [0.5, 40.0, -2.0, 1.0]])
    rounded = {
        "tokens are dropped because the sum before them is rounded to 1; with p = 1 all of them stay.": kept(
            sharp, [[0], [1]]
        )
    }
    compare("keep_top_p with p = 1, for one token that is nearly certain", fn(sharp, 1.0), sharp, LOGITS, rounded)


def check_sample(fn: Callable[..., Any]) -> None:
    """Seeded frequencies over two thousand rows of two kinds, and where the random numbers come from."""
    chances = torch.tensor([[0.06, 0.5, 0.0, 0.15, 0.29], [0.45, 0.0, 0.3, 0.05, 0.2]])
    n_each = 1000
    # softmax does not mind an added constant, but exp alone overflows at this one
    logits = (chances.log() + torch.tensor([[0.0], [200.0]])).repeat(n_each, 1)

    def draw(seed: int) -> tuple[Any, torch.Generator]:
        generator = torch.Generator().manual_seed(seed)
        return fn(logits, generator), generator

    before = torch.get_rng_state()
    with unchanged("sample", logits=logits):
        drawn, generator = draw(1)
    if not torch.equal(torch.get_rng_state(), before):
        raise CheckFailed(
            "sample: it drew from torch's global random numbers.\n  Next: hand `generator=generator` to what draws."
        )
    if isinstance(drawn, Tensor) and drawn.shape == (2 * n_each,) and drawn.dtype == torch.int64:
        judge_frequencies(drawn.reshape(n_each, 2), chances)
    else:
        compare("sample", drawn, torch.zeros(2 * n_each, dtype=torch.int64), "batch")
    if torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state()):
        raise CheckFailed(
            "sample: it left `generator` as it was, so the next call would draw the same again.\n"
            "  Next: draw from `generator` itself, not from a copy or another one."
        )
    if not torch.equal(draw(1)[0], drawn):
        raise CheckFailed(
            "sample: the same seed gave two different draws.\n  Next: draw from `generator` and nothing else."
        )
    if torch.equal(draw(2)[0], drawn):
        raise CheckFailed(
            "sample: two seeds gave the same 2000 draws.\n  Next: draw from `generator`, without seeding it."
        )
    compare("sample from one row", fn(torch.tensor([[-INF, 3.0, -INF]]), generator), torch.tensor([1]), "batch")


def check_generate(fn: Callable[..., Any]) -> None:
    """A toy model with known logits, and picks that follow a script."""
    prompt = torch.tensor([[3, 0, 12], [8, 1, 5]])
    _check_greedy_run(fn, prompt, n_new=4)
    _check_greedy_run(fn, prompt[:1, :2], n_new=3)
    _check_greedy_run(fn, prompt, n_new=0)
    _check_greedy_run(fn, prompt, n_new=20)  # n_ctx is 9
    _check_greedy_run(fn, torch.arange(9)[None] + torch.tensor([[0], [2]]), n_new=2)
    script = torch.tensor([[4, 6, 7, 2, 9, 3], [7, 8, 1, 6, 5, 4]])
    _check_eos(fn, prompt, script, eos=6)
    _check_eos(fn, prompt + 1, torch.where(script == 6, 0, script), eos=0)
    _check_eos(fn, torch.tensor([[6, 1, 6], [8, 1, 5]]), script, eos=6)
    _check_eos(fn, prompt, torch.tensor([[4, 7, 7, 2, 9, 3], [7, 8, 6, 1, 5, 4]]), eos=6)
    _check_eos(fn, prompt, torch.where(script == 6, 0, script), eos=None)
    judge_cached_generation(fn, CFG, prompt)


def _check_greedy_run(fn: Callable[..., Any], prompt: Tensor, n_new: int) -> None:
    """The most likely token, again and again."""
    model = ToyModel(CFG)
    model.train()
    n_steps = min(n_new, CFG.n_ctx - prompt.shape[1])
    tokens, wanted = prompt, []
    for _ in range(n_steps):
        wanted.append(model.logits(tokens))
        tokens = torch.cat([tokens, wanted[-1][:, -1].argmax(-1)[:, None]], dim=1)
    given: list[Tensor] = []

    def pick(logits: Tensor) -> Tensor:
        step = len(given)
        if step == n_steps:
            raise CheckFailed(
                f"generate: `pick` was called more than {n_steps} times (n_new = {n_new}, n_ctx = {CFG.n_ctx}, and a "
                f"prompt of {prompt.shape[1]} positions).\n  Next: count the steps, and stop when n_ctx is reached."
            )
        mistakes = {
            "it gets the logits at the first position; take the last.": wanted[step][:, 0],
            "it gets the logits after the prompt again and again; hand the longer sequence to the model.": wanted[0][
                :, -1
            ],
            "the softmax is taken; `pick` wants logits.": wanted[step][:, -1].softmax(-1),
        }
        compare(f"generate: what `pick` gets in step {step}", logits, wanted[step][:, -1].detach(), LOGITS, mistakes)
        if logits.requires_grad:
            raise CheckFailed(
                "generate: gradients are recorded, which fills the memory step by step.\n"
                "  Next: run the loop under torch.no_grad()."
            )
        given.append(logits)
        return logits.argmax(-1)

    with unchanged("generate", tokens=prompt):
        actual = fn(model, prompt, n_new, pick)
    mistakes = {"only the new tokens are returned; put the prompt in front.": tokens[:, prompt.shape[1] :]}
    label = f"generate with n_new = {n_new}, n_ctx = {CFG.n_ctx} and a prompt of {prompt.shape[1]} positions"
    compare(label, actual, tokens, "batch pos", mistakes)
    if not torch.is_grad_enabled():
        raise CheckFailed("generate: gradients stay switched off afterwards.\n  Next: use `with torch.no_grad():`.")
    if not model.training:
        raise CheckFailed(
            "generate: it left the model in evaluation mode, although it came in training mode.\n"
            "  Next: leave the mode alone, or put it back."
        )


def _check_eos(fn: Callable[..., Any], prompt: Tensor, script: Tensor, eos: int | None) -> None:
    """Picks from a script, row by row; the loop in plain Python says what should come out."""
    n_steps = script.shape[1]
    expected = scripted(prompt, script, eos, [False] * len(prompt))
    n_used = expected.shape[1] - prompt.shape[1]
    step = 0

    def pick(logits: Tensor) -> Tensor:
        nonlocal step
        if step == n_steps:
            raise CheckFailed(
                f"generate: `pick` was called more than n_new = {n_steps} times.\n  Next: count the steps."
            )
        step += 1
        return script[:, step - 1].clone()

    with unchanged("generate", tokens=prompt):
        actual = fn(ToyModel(CFG), prompt, n_steps, pick, *([] if eos is None else [eos]))
    label = f"generate with eos = {eos}"
    compare(label, actual, expected, "batch pos", eos_mistakes(prompt, script, eos, expected))
    if step > n_used:
        raise CheckFailed(
            f"{label}: all rows were finished after {n_used} steps, but it went on for {step}.\n  Next: stop there."
        )
