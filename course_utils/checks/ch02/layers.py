# ruff: noqa: N802 (check_LayerNorm is named after its exercise)
"""Chapter 02: is the transformer that the learner wrote a GPT-2?

Oracles are loops that spell the definition out (`by_loops`), torch's own functions, and invariants. Sizes are odd and
all different; every parameter is random, biases included.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_utils.checks import by_loops
from course_utils.checks.ch02.attending import attend, from_first_key, judge_large_scores, later
from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import (
    always,
    check_half_precision,
    check_module,
    construct,
    noise,
    weights_of,
    with_forwards,
    with_methods,
)
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.standins import transformer as standins
from course_utils.checks.standins.cache import make_cache
from course_utils.checks.standins.parts import Toy, ToyEmbed, ToyPosEmbed, ToyWithCache, wave
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
from course_utils.checks.translating import during
from course_utils.config import TransformerConfig

# d_model is not n_heads * d_head, so that no answer can mix the two up; d_head is not 4, where root and half agree.
CFG = TransformerConfig(d_vocab=13, n_ctx=9, n_layers=2, n_heads=3, d_model=7, d_head=6, d_mlp=11)
RESID = "batch pos d_model"
INF = torch.inf
ROOT = math.sqrt(2 / math.pi)


# ------------------------------------------------------------------------------------- LayerNorm and the embeddings


def layer_norm(norm: Any, resid: Tensor, *, correction: int = 0, root: float = 0.5, **wrong: Any) -> Tensor:
    """LayerNorm's forward in one place, with switches for what people get wrong."""
    axes = wrong.get("axes", -1)
    variance = resid.var(axes, correction=correction, keepdim=True)
    eps = norm.cfg.layer_norm_eps
    scale = variance**root + eps if wrong.get("outside") else (variance + wrong.get("eps", eps)) ** root
    mean = 0 if wrong.get("uncentred") else resid.mean(axes, keepdim=True)
    # What hook points see has one scale for each position; a wrong axis has not.
    watched = scale.shape[:2] == resid.shape[:2]
    normalized = (resid - mean) / (norm.hook_scale(scale) if watched else scale)
    normalized = norm.hook_normalized(normalized)
    return normalized * wrong.get("w", norm.w) + wrong.get("b", norm.b)


def wrong_norm(**wrong: Any) -> type:
    """A LayerNorm that makes this mistake."""
    return with_methods(standins.Norm, "LayerNorm", forward=lambda self, resid: layer_norm(self, resid, **wrong))


@known_mistakes(
    {
        "eps is added outside the root; it belongs under it.": wrong_norm(outside=True),
        "the variance divides by d_model - 1 (torch's default); divide by d_model.": wrong_norm(correction=1),
        "eps is left out, or another one is used than self.eps.": wrong_norm(eps=0.0),
        "the root is missing: divide by the deviation, not by the variance.": wrong_norm(root=1.0),
        "the mean is not subtracted.": wrong_norm(uncentred=True),
        "`w` and `b` are left out.": wrong_norm(w=1, b=0),
        "`b` is left out.": wrong_norm(b=0),
        "`w` is left out.": wrong_norm(w=1),
        "mean and variance are taken over the positions; take them over d_model.": wrong_norm(axes=1),
        "mean and variance are taken over positions and d_model; each position has its own.": wrong_norm(axes=(1, 2)),
        "mean and variance are taken over the batch and d_model; each row has its own.": wrong_norm(axes=(0, 2)),
        "mean and variance are taken over batch and positions; take them over d_model.": wrong_norm(axes=(0, 1)),
        "mean and variance are taken over the rows of the batch; take them over d_model.": wrong_norm(axes=0),
        "mean and variance are taken over the whole tensor; each position has its own.": wrong_norm(axes=(0, 1, 2)),
        "the squares are taken in float16, where they are inf; compute in float32.": wrong_norm(),
    }
)
def check_LayerNorm(cls: Any) -> None:
    """A large epsilon shows where it stands; the input varies around a mean that is not 0."""
    cfg = replace(CFG, layer_norm_eps=0.3)
    module = construct("LayerNorm", cls, cfg, norm_parameters(cfg), NORM_HOOKS)
    weights = weights_of(module)
    for n_batch, n_pos in [(2, 5), (1, 3)]:
        resid = noise(n_batch, n_pos, 7) + 0.5
        oracle = partial(by_loops.layer_norm, weights, resid, cfg.layer_norm_eps)
        check_module("LayerNorm", module, (resid,), oracle, RESID, NORM_HOOKS)
    check_half_precision("LayerNorm", module, 3000 * resid, NORM_HOOKS, RESID)


@known_mistakes(
    with_forwards(
        standins.Embed,
        {
            "every row of the batch gets the embeddings of the first row's tokens.": lambda m, tokens: m.W_E[
                tokens[:1].expand_as(tokens)
            ],
            "the embeddings are scaled by sqrt(d_model); GPT-2 does not.": lambda m, tokens: m.W_E[tokens] * 7**0.5,
            "row t + 1 is read for token t.": lambda m, tokens: m.W_E.roll(-1, 0)[tokens],
        },
    )
)
def check_Embed(cls: Any) -> None:
    """Rows with different tokens, one of them twice."""
    module = construct("Embed", cls, CFG, {"W_E": (13, 7)}, ())
    table = weights_of(module)["W_E"]
    for tokens in (torch.tensor([[3, 0, 12, 3, 7], [8, 1, 5, 11, 2]]), torch.tensor([[4, 12, 6]])):
        expected = torch.stack([torch.stack([table[t] for t in row]) for row in tokens])
        check_module("Embed", module, (tokens,), always({"output": expected}), RESID)


def for_each_row(vectors: Tensor, tokens: Tensor) -> Tensor:
    """The same vectors in every row of the batch."""
    return vectors.expand(*tokens.shape, -1)


@known_mistakes(
    with_forwards(
        standins.PosEmbed,
        {
            "the token ids choose the rows; the positions should.": lambda m, tokens, offset=0: m.W_pos[tokens],
            "`offset` is ignored.": lambda m, tokens, offset=0: for_each_row(m.W_pos[: tokens.shape[1]], tokens),
            "the last positions of the table are used.": lambda m, tokens, offset=0: for_each_row(
                m.W_pos[-tokens.shape[1] :], tokens
            ),
            "positions are counted from 1.": lambda m, tokens, offset=0: for_each_row(
                m.W_pos.roll(-1, 0)[offset:][: tokens.shape[1]], tokens
            ),
        },
    )
)
def check_PosEmbed(cls: Any) -> None:
    """The same vectors for each row, beginning at `offset`, up to the end of the table."""
    module = construct("PosEmbed", cls, CFG, {"W_pos": (9, 7)}, ())
    table = weights_of(module)["W_pos"]
    tokens = torch.tensor([[3, 0, 8, 3, 7], [8, 1, 5, 6, 2]])
    for offset in (0, 1, 4):
        expected = torch.stack([torch.stack([table[offset + p] for p in range(5)]) for _ in tokens])
        inputs = (tokens, offset) if offset else (tokens,)  # 0 is what it should be without being told
        name = f"PosEmbed with offset {offset}" if offset else "PosEmbed"
        check_module(name, module, inputs, always({"output": expected}), RESID)
    expected = table.expand(1, 9, 7)
    check_module("PosEmbed", module, (tokens.new_zeros(1, 9),), always({"output": expected}), RESID)


# -------------------------------------------------------------------------------------------------------- attention


def dots(q: Tensor, k: Tensor) -> Tensor:
    """Scores that are not divided."""
    return torch.einsum("bqhd,bkhd->bhqk", q, k)


def right_scores(q: Tensor, k: Tensor) -> Tensor:
    return dots(q, k) / q.shape[3] ** 0.5


def masked_with(value: float) -> Callable[[Tensor], Tensor]:
    return lambda scores: scores.masked_fill(later(scores), value)


@known_mistakes(
    {
        "the division by sqrt(d_head) is left out.": dots,
        "the dot product is divided by d_head; divide by its root.": lambda q, k: dots(q, k) / q.shape[3],
        "the dot product is multiplied by sqrt(d_head); divide by it.": lambda q, k: dots(q, k) * q.shape[3] ** 0.5,
        "the division is by the root of the number of heads; d_head is the last axis.": lambda q, k: (
            dots(q, k) / q.shape[2] ** 0.5
        ),
        "the division is by the root of the number of keys.": lambda q, k: dots(q, k) / k.shape[1] ** 0.5,
        "the division is by sqrt(n_heads d_head); each head has vectors of size d_head.": lambda q, k: (
            dots(q, k) / (q.shape[2] * q.shape[3]) ** 0.5
        ),
        "the future is masked already; that is the next exercise.": lambda q, k: masked_with(-INF)(right_scores(q, k)),
        "the softmax is taken already; that comes after the mask.": lambda q, k: right_scores(q, k).softmax(-1),
    }
)
def check_attention_scores(fn: Callable[..., Any]) -> None:
    """Every pair of vectors, one by one; fewer queries than keys."""
    axes = "batch head query key"
    for n_batch, n_heads, n_query, n_key in [(2, 3, 5, 8), (1, 3, 4, 4), (2, 1, 1, 3)]:
        q, k = noise(n_batch, n_query, n_heads, 6, seed=1), noise(n_batch, n_key, n_heads, 6, seed=2)
        products = torch.empty(n_batch, n_heads, n_query, n_key)
        for row in range(n_batch):
            for head in range(n_heads):
                for query in range(n_query):
                    for key in range(n_key):
                        products[row, head, query, key] = torch.dot(q[row, query, head], k[row, key, head])
        compare("attention_scores", fn(q, k), products / 6**0.5, axes, inputs={"q·k": products})
        follows_input("attention_scores", fn, (q, k), axes, gradient=True)
    follows_every_kind("attention_scores", fn, (q, k), axes)


def _masked_by_loop(scores: Tensor) -> Tensor:
    """The definition: visit every query and key, and forbid the keys that come later."""
    out = scores.clone()
    n_query, n_key = scores.shape[-2:]
    for query in range(n_query):
        for key in range(n_key):
            if key > query + n_key - n_query:
                out[..., query, key] = -INF
    return out


@known_mistakes(
    {
        "the diagonal is masked too; a query may look at itself.": lambda s: s.masked_fill(later(s, 0), -INF),
        "past and future are swapped.": lambda s: s.masked_fill(~later(s, 0), -INF),
        "past and future are swapped, and the diagonal is masked too.": lambda s: s.masked_fill(~later(s), -INF),
        "future scores are 0; softmax gives them exp(0) = 1, not nothing.": masked_with(0.0),
        "nothing is masked.": lambda s: s.clone(),
        "future scores are +inf; softmax would look nowhere else.": masked_with(INF),
        "-inf stands where it should, but the other scores were lost.": lambda s: torch.zeros_like(s).masked_fill(
            later(s), -INF
        ),
        "the mask starts at the first key; the last query stands at the last key.": lambda s: s.masked_fill(
            from_first_key(s), -INF
        ),
    },
    {
        f"future scores are {value:.3g}, a finite number; the statement asks for -inf.": masked_with(value)
        for value in (-1e4, -1e5, -1e6, -1e9, -1e10, torch.finfo(torch.float32).min)
    },
)
def check_causal_mask(fn: Callable[..., Any]) -> None:
    """Square scores, and fewer queries, as with a key-value cache; large ones, and a head with nothing but zeros."""
    axes = "batch head query key"
    for n_query, n_key in [(5, 5), (4, 6), (1, 5)]:
        scores = torch.arange(2.0 * 3 * n_query * n_key).reshape(2, 3, n_query, n_key) / 10 - 3.05
        scores[1, 1] *= 100
        scores[1, 2] = 0.0
        compare("causal_mask", fn(scores), _masked_by_loop(scores), axes)
    one = scores[:1, :1]
    compare("causal_mask of one row and head", fn(one), _masked_by_loop(one), axes)
    follows_input("causal_mask", fn, (scores,), axes, gradient=True)
    follows_every_kind("causal_mask", fn, (scores,), axes)


def wrong_attention(while_watched: str | None = None, **wrong: Any) -> type:
    """An Attention that makes this mistake, always or only while the hook point of this name is watched."""

    def forward(self: Any, resid: Tensor, cache: Any = None) -> Tensor:
        makes_it = while_watched is None or getattr(self, while_watched).is_watched
        return attend(self, resid, cache, **(wrong if makes_it else {}))

    return with_methods(standins.Attention, "Attention", forward=forward)


@known_mistakes(
    {f"the bias `b_{letter}` is left out.": wrong_attention(without=(f"b_{letter}",)) for letter in "QVO"},
    {
        # the same number for all scores of a query, so that the output does not show it
        "the bias `b_K` is left out.": wrong_attention(without=("b_K",)),
        "`hook_q` sees the queries before `b_Q` is added.": wrong_attention(after_hook=("b_Q",)),
        "`hook_v` sees the values before `b_V` is added.": wrong_attention(after_hook=("b_V",)),
        "all four biases are left out.": wrong_attention(without=("b_Q", "b_K", "b_V", "b_O")),
        "`b_O` is added once per head; it belongs to the sum of the heads.": wrong_attention(n_biases=3),
        "`b_O` is added once per head where `hook_result` is watched; add it after the sum there too.": wrong_attention(
            "hook_result", n_biases=3
        ),
        "`b_O` is left out where `hook_result` is watched; add it after the sum there too.": wrong_attention(
            "hook_result", without=("b_O",)
        ),
        "the scores are not divided by sqrt(d_head).": wrong_attention(divisor=1.0),
        "the scores are divided by sqrt(d_model); use d_head.": wrong_attention(divisor=7**0.5),
        "nothing is masked: positions look into the future.": wrong_attention(hidden=lambda s: later(s, s.shape[3])),
        "past and future are swapped.": wrong_attention(hidden=lambda scores: ~later(scores, 0)),
        "the scores pass `hook_attn_scores` before the mask; it should see them masked.": wrong_attention(
            mask_after_hook=True
        ),
        "the diagonal is masked too, which leaves the first query nothing to look at.": wrong_attention(
            hidden=lambda scores: later(scores, 0)
        ),
        "the mask comes after the softmax: the weights of a query no longer sum to 1.": wrong_attention(
            mask_after_softmax=True
        ),
        "the softmax runs over the queries; for each query the weights of the keys sum to 1.": wrong_attention(axis=-2),
        "`resid` is added to the output; the block will do that.": wrong_attention(adds_resid=True),
        "W_K is used for the queries too.": wrong_attention(reads={"Q": "K"}),
        "W_K is used for the values too.": wrong_attention(reads={"V": "K"}),
        "the cache is not used: the new positions see only each other.": wrong_attention(
            remember=lambda module, q, k, v, cache: (q, k, v)
        ),
        "the mask starts at the first key; the last query stands at the last key.": wrong_attention(
            hidden=from_first_key
        ),
        "nothing is masked: new positions look at those after them.": wrong_attention(
            hidden=lambda scores: later(scores, 1 if scores.shape[2] == scores.shape[3] else scores.shape[3])
        ),
    },
)
def check_Attention(cls: Any) -> None:
    """Fused or step by step, watched or not, with a key-value cache or without: the loop's numbers."""
    module = construct("Attention", cls, CFG, attention_parameters(CFG), ATTENTION_HOOKS)
    weights = weights_of(module)
    _check_unasked_result(module)
    for n_batch, n_pos in [(2, 5), (1, 1)]:
        resid = noise(n_batch, n_pos, 7, seed=3)
        oracle = partial(by_loops.attention, weights, resid)
        check_module("Attention", module, (resid,), oracle, RESID, ATTENTION_HOOKS)
    _check_attention_cache(cls, module, weights)
    judge_large_scores("Attention", module, partial(by_loops.attention, weights))
    _check_one_head(cls)


def _check_one_head(cls: Any) -> None:
    cfg = replace(CFG, n_heads=1)
    module = construct("Attention", cls, cfg, attention_parameters(cfg), ATTENTION_HOOKS)
    resid = noise(1, 2, 7, seed=26)
    expected = by_loops.attention(weights_of(module), resid)["output"]
    with during("with one head"):
        compare("Attention with one head", module(resid), expected, RESID)


def _check_unasked_result(module: Any) -> None:
    calls: list[int] = []
    handle = module.hook_result.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        module(noise(2, 5, 7))
    handle.remove()
    if calls:
        raise CheckFailed(
            "Attention: `hook_result` was computed although nobody watches it; that costs a lot of memory.\n"
            "  Next: go that way only `if self.hook_result.is_watched`."
        )


def _check_attention_cache(cls: type, module: Any, weights: Mapping[str, Tensor]) -> None:
    """Read positions 0 to 2, then 3 and 4, after the layer below: what comes out is what all five give at once."""
    name = "Attention with a key-value cache"
    layer = module.layer = 1
    resid = noise(2, 5, 7, seed=4)
    expected = by_loops.attention(weights, resid)
    for watched in ((), ("hook_attn_scores", "hook_pattern")):
        handles = [getattr(module, hook).add(lambda activation, hook: None) for hook in watched]
        cache = make_cache(cls, CFG, batch=2)
        with torch.no_grad(), during("with a key-value cache"):
            for start, end, case in ((0, 3, f"{name} that is empty"), (3, 5, name)):
                cache.append(0, *torch.zeros(2, 2, end - start, 3, 6))  # as the layer below does in a model
                cache.appended.pop()
                actual = module(resid[:, start:end], cache)
                if all(index == layer for index, _ in cache.appended):
                    compare(case, actual, expected["output"][:, start:end], RESID)
        for handle in handles:
            handle.remove()
        if cache.appended != [(layer, 3), (layer, 2)]:
            notes = ", ".join(f"layer {index}: {size} positions" for index, size in cache.appended) or "nothing"
            raise CheckFailed(
                f"{name}: expected one append per call (layer {layer}: 3 positions, then layer {layer}: "
                f"2 positions), got {notes}.\n"
                "  Next: call cache.append(self.layer, k, v) once, with the new positions only."
            )


# ---------------------------------------------------------------------------------------------------------- the MLP


def gelu(
    x: Tensor, half: float = 0.5, one: float = 1.0, root: float = ROOT, cubic: float = 0.044715, power: int = 3
) -> Tensor:
    """GPT-2's formula, with switches for what people get wrong."""
    return half * x * (one + torch.tanh(root * (x + cubic * x**power)))


@known_mistakes(
    {
        "it is the exact GELU (with erf); GPT-2 uses the formula with tanh.": F.gelu,
        "it is x sigmoid(1.702 x), a rougher approximation.": lambda x: x * torch.sigmoid(1.702 * x),
        "it is x sigmoid(x), another function (SiLU).": F.silu,
        "it is the ReLU.": F.relu,
        "the factor 0.5 is left out.": partial(gelu, half=1.0),
        "the 1 + is left out.": partial(gelu, one=0.0),
        "the factor x in front is left out.": lambda x: gelu(x) / x,
        "the cubic term is left out.": partial(gelu, cubic=0.0),
        "the cubic term lacks its factor 0.044715.": partial(gelu, cubic=1.0),
        "x is squared where it should be cubed.": partial(gelu, power=2),
        "0.044715 is cubed too; the cube applies to x alone.": partial(gelu, cubic=0.044715**3),
        "sqrt(2 / pi) applies to x alone; it multiplies the whole bracket.": lambda x: (
            0.5 * x * (1 + torch.tanh(ROOT * x + 0.044715 * x**3))
        ),
        "sqrt(2 / pi) is left out.": partial(gelu, root=1.0),
        "2 / pi lacks its root.": partial(gelu, root=2 / math.pi),
        "the root is taken of 2 pi; take it of 2 / pi.": partial(gelu, root=math.sqrt(2 * math.pi)),
    }
)
def check_gelu_new(fn: Callable[..., Any]) -> None:
    """Against torch's own, in one and three dimensions; then far from 0, where careless formulas overflow."""
    for x, axes in [(torch.linspace(-4, 4, 110).roll(26).reshape(2, 5, 11), "batch pos d_mlp"), (noise(13), "element")]:
        compare("gelu_new", fn(x), F.gelu(x, approximate="tanh"), axes, rtol=1e-5, inputs={"x": x})
        follows_input("gelu_new", fn, (x,), axes, gradient=True)
    far = torch.tensor([-1000.0, -100.0, 0.0, 100.0, 1000.0])
    compare("gelu_new far from 0", fn(far), F.relu(far), "element")
    follows_every_kind("gelu_new", fn, (noise(2, 3, 5),), "batch pos d_mlp")


def up(mlp: Any, resid: Tensor) -> Tensor:
    return resid @ mlp.W_in + mlp.b_in


def down(mlp: Any, neurons: Tensor) -> Tensor:
    return neurons @ mlp.W_out + mlp.b_out


@known_mistakes(
    with_forwards(
        standins.MLP,
        {
            "`b_in` is left out.": lambda m, resid: down(m, m.act(resid @ m.W_in)),
            "`b_out` is left out.": lambda m, resid: m.act(up(m, resid)) @ m.W_out,
            "both biases are left out.": lambda m, resid: m.act(resid @ m.W_in) @ m.W_out,
            "there is no non-linearity between the two maps.": lambda m, resid: down(m, up(m, resid)),
            "the non-linearity comes before `b_in` is added.": lambda m, resid: down(m, m.act(resid @ m.W_in) + m.b_in),
            "the non-linearity is applied to the output too.": lambda m, resid: m.act(down(m, m.act(up(m, resid)))),
            "the non-linearity comes after both maps.": lambda m, resid: m.act(down(m, up(m, resid))),
            "`resid` is added to the output; the block will do that.": lambda m, resid: (
                down(m, m.act(up(m, resid))) + resid
            ),
            "another non-linearity is used than cfg.act = 'relu'; self.act holds the right one.": lambda m, resid: down(
                m, gelu(up(m, resid))
            ),
            "another non-linearity is used than cfg.act = 'gelu_new'; self.act holds the right one.": lambda m, resid: (
                down(m, m.hook_post(F.relu(m.hook_pre(up(m, resid)))))
            ),
        },
    )
)
def check_MLP(cls: Any) -> None:
    """With ReLU, which torch has, and then with the learner's gelu_new."""
    for act in ("relu", "gelu_new"):
        cfg = replace(CFG, act=act)
        module = construct("MLP", cls, cfg, mlp_parameters(cfg), MLP_HOOKS)
        weights = weights_of(module)
        for n_batch, n_pos in [(2, 5), (1, 3)]:
            resid = noise(n_batch, n_pos, 7, seed=5)
            check_module("MLP", module, (resid,), partial(by_loops.mlp, weights, resid, act), RESID, MLP_HOOKS)


# -------------------------------------------------------------------------------------------------- the whole model

Output = Callable[[Any, Tensor], Tensor]


def attn_added(block: Any, resid: Tensor) -> Tensor:
    """The stream between attention and the MLP."""
    return resid + block.attn(block.ln1(resid))


def with_attn_only(output: Output) -> Callable[..., Tensor]:
    """The forward of a block that is right with an MLP, and gives this output where there is none."""

    def forward(block: Any, resid: Tensor, cache: Any = None) -> Tensor:
        if block.cfg.attn_only:
            return output(block, resid)
        pre = block.hook_resid_pre(resid)
        mid = block.hook_resid_mid(pre + block.hook_attn_out(block.attn(block.ln1(pre), cache)))
        return block.hook_resid_post(mid + block.hook_mlp_out(block.mlp(block.ln2(mid))))

    return forward


@known_mistakes(
    with_forwards(
        standins.Block,
        {
            "nothing is added back: each part's output replaces the stream.": lambda m, resid: m.mlp(
                m.ln2(m.attn(m.ln1(resid)))
            ),
            "the MLP's output replaces the stream; add it.": lambda m, resid: m.mlp(m.ln2(attn_added(m, resid))),
            "attention's output replaces the stream; add it.": lambda m, resid: (
                (attn_out := m.attn(m.ln1(resid))) + m.mlp(m.ln2(attn_out))
            ),
            "the MLP reads the stream from before attention; it should read the sum.": lambda m, resid: (
                attn_added(m, resid) + m.mlp(m.ln2(resid))
            ),
            "what attention adds is lost after the MLP: add the MLP's output to the sum.": lambda m, resid: (
                resid + m.mlp(m.ln2(attn_added(m, resid)))
            ),
            "ln1 stands in front of both; the MLP has its own, ln2.": lambda m, resid: (
                (mid := attn_added(m, resid)) + m.mlp(m.ln1(mid))
            ),
            "ln1 and ln2 are swapped.": lambda m, resid: (mid := resid + m.attn(m.ln2(resid))) + m.mlp(m.ln1(mid)),
            "attention reads the stream itself; it should read ln1's copy.": lambda m, resid: (
                (mid := resid + m.attn(resid)) + m.mlp(m.ln2(mid))
            ),
            "the MLP reads the stream itself; it should read ln2's copy.": lambda m, resid: (
                (mid := attn_added(m, resid)) + m.mlp(mid)
            ),
            "the norms come after the sums; they belong in front of each part.": lambda m, resid: m.ln2(
                (mid := m.ln1(resid + m.attn(resid))) + m.mlp(mid)
            ),
            "the normalised vectors go on as the stream; only the parts should read them.": lambda m, resid: (
                (read := m.ln2((copy := m.ln1(resid)) + m.attn(copy))) + m.mlp(read)
            ),
            "what ln1 returns goes on as the stream; only attention reads it.": lambda m, resid: (
                (mid := (copy := m.ln1(resid)) + m.attn(copy)) + m.mlp(m.ln2(mid))
            ),
            "attention's output is added twice.": lambda m, resid: (
                (mid := attn_added(m, resid)) + m.attn(m.ln1(resid)) + m.mlp(m.ln2(mid))
            ),
            "the MLP comes first, attention second.": lambda m, resid: attn_added(m, resid + m.mlp(m.ln2(resid))),
            "the block ends after attention.": attn_added,
            "with cfg.attn_only, attention reads the stream itself; it should read ln1's copy.": with_attn_only(
                lambda m, resid: resid + m.attn(resid)
            ),
            "with cfg.attn_only, the stream is not added to what attention returns.": with_attn_only(
                lambda m, resid: m.attn(m.ln1(resid))
            ),
            "with cfg.attn_only, what ln1 returns goes on as the stream; only attention reads it.": with_attn_only(
                lambda m, resid: (copy := m.ln1(resid)) + m.attn(copy)
            ),
            "with cfg.attn_only, the norm comes after attention; it belongs before.": with_attn_only(
                lambda m, resid: m.ln1(resid + m.attn(resid))
            ),
            "with cfg.attn_only, attention's output is normalised; normalise what it reads.": with_attn_only(
                lambda m, resid: resid + m.ln1(m.attn(resid))
            ),
        },
    )
)
def check_TransformerBlock(cls: Any) -> None:
    """First the wiring, with toy parts whose answers are known; then whole blocks with their real parts."""
    _check_block_wiring(cls, CFG)
    with during("with cfg.attn_only"):
        _check_block_wiring(cls, replace(CFG, attn_only=True))
    for cfg in (CFG, replace(CFG, attn_only=True), replace(CFG, normalization="none", act="relu")):
        wanted = block_hooks(cfg)
        module = construct("TransformerBlock", cls, cfg, block_parameters(cfg), wanted)
        resid = noise(2, 5, 7, seed=6)
        oracle = always(by_loops.block(weights_of(module), cfg, resid))
        check_module("TransformerBlock with its real parts", module, (resid,), oracle, RESID, wanted, replace=False)


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

    check_module(name, module, (resid,), oracle, RESID, wanted, toys=True)

    cache = make_cache(cls, cfg, batch=2)
    module(resid, cache)
    if module.attn.caches[-1] is not cache:
        raise CheckFailed(
            f"{name}: attention was not given the key-value cache.\n  Next: pass it on, as the second argument."
        )


@known_mistakes(
    with_forwards(
        standins.Unembed,
        {
            "the bias `b_U` is left out.": lambda m, resid: resid @ m.W_U,
            "the softmax is taken; logits come before it.": lambda m, resid: (resid @ m.W_U + m.b_U).softmax(-1),
            "the log-softmax is taken; logits come before it.": lambda m, resid: (resid @ m.W_U + m.b_U).log_softmax(
                -1
            ),
            "the vectors are normalised first; `ln_final` does that.": lambda m, resid: (
                F.layer_norm(resid, resid.shape[-1:]) @ m.W_U + m.b_U
            ),
        },
    )
)
def check_Unembed(cls: Any) -> None:
    """Against torch's linear map."""
    module = construct("Unembed", cls, CFG, {"W_U": (7, 13), "b_U": (13,)}, ())
    weights = weights_of(module)
    for n_batch, n_pos in [(2, 5), (1, 3)]:
        resid = noise(n_batch, n_pos, 7, seed=8)
        logits = F.linear(resid, weights["W_U"].T, weights["b_U"])
        check_module("Unembed", module, (resid,), always({"output": logits}), "batch pos d_vocab")


def through(blocks: Iterable[Any], resid: Tensor) -> Tensor:
    """The stream after these blocks."""
    for block in blocks:
        resid = block(resid)
    return resid


def begin(model: Any, tokens: Tensor) -> Tensor:
    """The stream in front of the blocks, with positions counted from 0."""
    return model.hook_embed(model.embed(tokens)) + model.hook_pos_embed(model.pos_embed(tokens))


def finish(model: Any, resid: Tensor) -> Tensor:
    """Logits from the stream after the blocks."""
    return model.unembed(model.ln_final(resid))


def each_added(blocks: Iterable[Any], resid: Tensor) -> Tensor:
    """The stream where each block's output is added to it."""
    for block in blocks:
        resid = resid + block(resid)
    return resid


@known_mistakes(
    with_forwards(
        standins.SmallModel,
        {
            "the position embeddings are left out.": lambda m, tokens: finish(m, through(m.blocks, m.embed(tokens))),
            "the token embeddings are left out.": lambda m, tokens: finish(m, through(m.blocks, m.pos_embed(tokens))),
            "ln_final is left out.": lambda m, tokens: m.unembed(through(m.blocks, begin(m, tokens))),
            "only the first block runs.": lambda m, tokens: finish(m, m.blocks[0](begin(m, tokens))),
            "only the last block runs: each should read what the one before returned.": lambda m, tokens: finish(
                m, m.blocks[-1](begin(m, tokens))
            ),
            "the blocks run in the opposite order.": lambda m, tokens: finish(
                m, through(m.blocks[::-1], begin(m, tokens))
            ),
            "the blocks are skipped.": lambda m, tokens: finish(m, begin(m, tokens)),
            "each block's output is added to the stream; a block returns the whole stream.": lambda m, tokens: finish(
                m, each_added(m.blocks, begin(m, tokens))
            ),
            "ln_final runs before the blocks.": lambda m, tokens: m.unembed(
                through(m.blocks, m.ln_final(begin(m, tokens)))
            ),
            "ln_final runs after every block.": lambda m, tokens: finish(
                m, m.blocks[1](m.ln_final(m.blocks[0](begin(m, tokens))))
            ),
            "the position embeddings are added again in front of each block.": lambda m, tokens: finish(
                m, m.blocks[1](m.blocks[0](begin(m, tokens)) + m.pos_embed(tokens))
            ),
            "the softmax is taken; the model returns logits.": lambda m, tokens: finish(
                m, through(m.blocks, begin(m, tokens))
            ).softmax(-1),
            "the log-softmax is taken; the model returns logits.": lambda m, tokens: finish(
                m, through(m.blocks, begin(m, tokens))
            ).log_softmax(-1),
            "positions are counted from 0; the first new token stands at `cache.length`.": (
                lambda m, tokens, cache=None: finish(m, through(m.blocks, begin(m, tokens)))
            ),
        },
    )
)
def check_Transformer(cls: Any) -> None:
    """First the wiring, with toy parts whose answers are known; then whole models with their real parts."""
    _check_transformer_wiring(cls, CFG)
    _check_transformer_wiring(
        cls, replace(CFG, n_layers=12, attn_only=True, normalization="none")
    )  # as text, layer 10 comes before layer 2
    bare = replace(CFG, attn_only=True, normalization="none")
    for cfg in (CFG, bare):
        wanted = transformer_hooks(cfg)
        module = construct("Transformer", cls, cfg, transformer_parameters(cfg), wanted)
        weights = weights_of(module)
        tokens, one_row = torch.tensor([[3, 0, 12, 3, 7], [8, 1, 5, 11, 2]]), torch.tensor([[4, 12, 6]])
        values, name = by_loops.transformer(weights, cfg, tokens), "Transformer with its real parts"
        check_module(name, module, (tokens,), always(values), "batch pos d_vocab", wanted, replace=False)
        expected = by_loops.transformer(weights, cfg, one_row)["output"]
        compare(f"{name}, one row of three tokens", module(one_row).detach(), expected, "batch pos d_vocab")
        cache = make_cache(cls, cfg, batch=2)
        with torch.no_grad(), during("with a key-value cache"):
            steps = [module(tokens[:, :3], cache), module(tokens[:, 3:4], cache), module(tokens[:, 4:], cache)]
        compare(f"{name} and a key-value cache", torch.cat(steps, dim=1), values["output"], "batch pos d_vocab")


def _check_transformer_wiring(cls: Any, cfg: TransformerConfig) -> None:
    name = f"Transformer with {cfg.n_layers} layers" if cfg is not CFG else "Transformer"
    module = construct(name, cls, cfg, transformer_parameters(cfg), transformer_hooks(cfg))
    E, P, U = noise(13, 7, seed=9), noise(9, 7, seed=10), noise(7, 13, seed=11)
    waves, final = [wave((1.2, 0.7)[layer % 2], 0.3 - 0.9 * layer) for layer in range(cfg.n_layers)], wave(-1.1, 0.4)
    module.embed = ToyEmbed(name, "embed", lambda tokens: E[tokens])
    module.pos_embed = ToyPosEmbed(
        name, "pos_embed", lambda tokens, offset: P[offset : offset + tokens.shape[1]].expand(*tokens.shape, 7)
    )
    module.blocks = nn.ModuleList(ToyWithCache(name, f"blocks[{layer}]", wave) for layer, wave in enumerate(waves))
    module.ln_final = Toy(name, "ln_final", final)
    module.unembed = Toy(name, "unembed", lambda resid: resid @ U)
    tokens = torch.tensor([[3, 0, 8, 3, 7], [8, 1, 5, 6, 2]])
    embedded = E[tokens]

    def rest(resid: Tensor) -> Tensor:
        for each in waves:
            resid = each(resid)
        return final(resid) @ U

    def oracle(replaced: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen = {"hook_embed": embedded, "hook_pos_embed": P[:5].expand(2, 5, 7), **replaced}
        return {**seen, "output": rest(seen["hook_embed"] + seen["hook_pos_embed"])}

    wanted = ("hook_embed", "hook_pos_embed")
    if cfg is CFG:
        check_module(name, module, (tokens,), oracle, "batch pos d_vocab", wanted, toys=True)
    _check_transformer_offset(cls, cfg, module, tokens, rest(embedded + P[3:8]), name)


def _check_transformer_offset(
    cls: Any, cfg: TransformerConfig, module: Any, tokens: Tensor, expected: Tensor, name: str
) -> None:
    """With three positions in a cache the next token stands at position 3, and every block is given the cache."""
    cache = make_cache(cls, cfg, batch=2)
    for layer in range(cfg.n_layers):
        cache.append(layer, torch.zeros(2, 3, 3, 6), torch.zeros(2, 3, 3, 6))
    with during("with a key-value cache"):
        actual = module(tokens, cache)
    name = f"{name} with 3 positions in a key-value cache"
    compare(name, actual, expected, "batch pos d_vocab")
    for index, toy in enumerate(module.blocks):
        if toy.caches[-1] is not cache:
            raise CheckFailed(f"{name}: block {index} was not given the cache.\n  Next: pass it on to each block.")
