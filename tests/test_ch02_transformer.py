"""Chapter 02's checks against mistakes that learners make, and right answers written another way.

Each mistake returns the right type, shape and dtype, and must be refused with its promised words. Those marked
`surprise` are absent from the check's own list of known mistakes.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import einops
import other_transformer as other
import pytest
import torch
from mistakes import Mistake, assert_known_and_unknown, assert_quick, assert_refused
from mutation import survivors
from torch import nn
from torch.nn import functional as F

import solutions.ch02_transformer as ref
from course_utils.checks import find_checks, run_check
from course_utils.checks.by_loops import transformer
from course_utils.checks.ch02_1_transformer import CFG
from course_utils.checks.transformer_interface import transformer_hooks, transformer_parameters
from course_utils.config import TransformerConfig
from course_utils.hooks import hook_points, run_with_cache
from solutions.ch02_transformer import attention_scores, causal_mask, project_heads

CHECKS = {name: fn for name, fn in find_checks()["02"].items() if fn.__module__.endswith(".ch02_1_transformer")}
INF = torch.inf


MISTAKES: list[Mistake] = []


def mistake(exercise: str, words: str, answer: Any = None, surprise: bool = False) -> Any:
    """Note a wrong answer; as a decorator, of a function `forward`, for exercises that are classes."""
    if answer is not None:
        MISTAKES.append(Mistake(exercise, words, answer, surprise))
        return None

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        original = getattr(ref, exercise)
        wrong = type(exercise, (original,), {"forward": function}) if isinstance(original, type) else function
        MISTAKES.append(Mistake(exercise, words, wrong, surprise))
        return function

    return note


# ---------------------------------------------------------------------------------------------------------- LayerNorm


def normalise(
    self: Any,
    resid: Any,
    *,
    correction: int = 0,
    inside: bool = True,
    eps: float | None = None,
    axes: Any = -1,
    w: bool = True,
    b: bool = True,
    hooked: bool = True,
) -> Any:
    """LayerNorm with switches for what people get wrong."""
    eps = self.eps if eps is None else eps
    variance = resid.var(axes, correction=correction, keepdim=True)
    scale = (variance + eps).sqrt() if inside else variance.sqrt() + eps
    if hooked and scale.shape[1] == resid.shape[1]:
        scale = self.hook_scale(scale)
    normalized = (resid - resid.mean(axes, keepdim=True)) / scale
    normalized = self.hook_normalized(normalized) if hooked else normalized
    return normalized * (self.w if w else 1) + (self.b if b else 0)


mistake("LayerNorm", "eps is added outside the root")(lambda self, resid: normalise(self, resid, inside=False))
mistake("LayerNorm", "divides by d_model - 1")(lambda self, resid: normalise(self, resid, correction=1))
mistake("LayerNorm", "another one is used than self.eps")(lambda self, resid: normalise(self, resid, eps=1e-5))
mistake("LayerNorm", "eps is left out")(lambda self, resid: normalise(self, resid, eps=0.0))
mistake("LayerNorm", "over the positions")(lambda self, resid: normalise(self, resid, axes=1))
mistake("LayerNorm", "over the whole tensor")(lambda self, resid: normalise(self, resid, axes=(0, 1, 2)))
mistake("LayerNorm", "`b` is left out")(lambda self, resid: normalise(self, resid, b=False))
mistake("LayerNorm", "`w` and `b` are left out")(lambda self, resid: normalise(self, resid, w=False, b=False))
mistake("LayerNorm", "the squares are taken in float16, where they are inf")(normalise)
mistake("LayerNorm", "the first wrong tensor is at `hook_scale`", surprise=True)(
    lambda self, resid: normalise(self, resid, axes=(0, 2))
)
mistake("LayerNorm", "`hook_scale` saw nothing", surprise=True)(
    lambda self, resid: normalise(self, resid, hooked=False)
)


@mistake("LayerNorm", "what `hook_scale` returns is thrown away")
def _(self: Any, resid: Any) -> Any:
    centred = resid - resid.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
    self.hook_scale(scale)
    return self.hook_normalized(centred / scale) * self.w + self.b


@mistake("LayerNorm", "what `hook_normalized` sees: 70 of 70 values are wrong", surprise=True)
def _(self: Any, resid: Any) -> Any:
    centred = resid - resid.mean(-1, keepdim=True)
    scale = self.hook_scale((centred.square().mean(-1, keepdim=True) + self.eps).sqrt())
    return self.hook_normalized(centred / scale * self.w + self.b)


@mistake("LayerNorm", "no gradient reaches `w`", surprise=True)
def _(self: Any, resid: Any) -> Any:
    centred = resid - resid.mean(-1, keepdim=True)
    scale = self.hook_scale((centred.square().mean(-1, keepdim=True) + self.eps).sqrt())
    return self.hook_normalized(centred / scale) * self.w.data + self.b


# ------------------------------------------------------------------------------------------------- Embed and PosEmbed

mistake("Embed", "embeddings of the first row's tokens")(
    lambda self, tokens: self.W_E[tokens[0]].expand(len(tokens), -1, -1)
)
mistake("Embed", "scaled by sqrt(d_model)")(lambda self, tokens: self.W_E[tokens] * self.W_E.shape[1] ** 0.5)
mistake("Embed", "row t + 1 is read")(lambda self, tokens: self.W_E[(tokens + 1) % len(self.W_E)])
mistake("Embed", "None of them is at pos=0", surprise=True)(
    lambda self, tokens: self.W_E[torch.cat([tokens[:, :1], tokens[:, 1:] * 0 + 9], dim=1)]
)
mistake("Embed", "values are wrong", surprise=True)(lambda self, tokens: self.W_E[tokens.flip(1)])
mistake("Embed", "values are wrong", surprise=True)(lambda self, tokens: F.normalize(self.W_E[tokens], dim=-1))
mistake("Embed", "no gradient reaches `W_E`", surprise=True)(lambda self, tokens: self.W_E.data[tokens])

mistake("PosEmbed", "the token ids choose the rows")(lambda self, tokens, offset=0: self.W_pos[tokens])
mistake("PosEmbed", "`offset` is ignored")(
    lambda self, tokens, offset=0: self.W_pos[: tokens.shape[1]].expand(len(tokens), -1, -1)
)
mistake("PosEmbed", "the last positions of the table")(
    lambda self, tokens, offset=0: self.W_pos[-tokens.shape[1] :].expand(len(tokens), -1, -1)
)
mistake("PosEmbed", "positions are counted from 1")(
    lambda self, tokens, offset=0: self.W_pos.roll(-1, 0)[offset : offset + tokens.shape[1]].expand(len(tokens), -1, -1)
)
mistake("PosEmbed", "first at [batch=0, pos=1, d_model=0]", surprise=True)(
    lambda self, tokens, offset=0: self.W_pos[offset].expand(len(tokens), tokens.shape[1], -1)
)
mistake("PosEmbed", "first at [batch=0, pos=0, d_model=0]", surprise=True)(
    lambda self, tokens, offset=0: self.W_pos[offset : offset + tokens.shape[1]].flip(0).expand(len(tokens), -1, -1)
)


# --------------------------------------------------------------------------------- attention_scores and causal_mask


def dots(q: Any, k: Any) -> Any:
    return einops.einsum(q, k, "batch query head d_head, batch key head d_head -> batch head query key")


mistake("attention_scores", "division by sqrt(d_head) is left out", dots)
mistake("attention_scores", "divided by d_head; divide by its root", lambda q, k: dots(q, k) / q.shape[-1])
mistake("attention_scores", "root of the number of heads", lambda q, k: dots(q, k) / q.shape[-2] ** 0.5)
mistake("attention_scores", "the softmax is taken already", lambda q, k: attention_scores(q, k).softmax(-1))
mistake("attention_scores", "masked already", lambda q, k: causal_mask(attention_scores(q, k)))
mistake(
    "attention_scores",
    "Every value is 1.095 times the right one",
    lambda q, k: dots(q, k) / q.shape[1] ** 0.5,
    surprise=True,
)
mistake(
    "attention_scores",
    "first at [batch=0, head=0, query=0, key=0]",
    lambda q, k: einops.einsum(q, k, "b q h d, b k g d -> b h q k") / 2,  # sums over the keys' heads
    surprise=True,
)
mistake(
    "attention_scores",
    "All of the wrong values are at batch=1",
    lambda q, k: attention_scores(q, k[:1].expand_as(k)),
    surprise=True,
)
mistake(
    "attention_scores",
    "it changed `q` in place",
    lambda q, k: dots(q.div_(2), k),
)


def later(scores: Any, shift: int) -> Any:
    n_query, n_key = scores.shape[-2:]
    return torch.ones(n_query, n_key, dtype=torch.bool).triu(n_key - n_query + shift)


mistake("causal_mask", "the diagonal is masked too", lambda scores: scores.masked_fill(later(scores, 0), -INF))
mistake("causal_mask", "future scores are 0", lambda scores: scores.masked_fill(later(scores, 1), 0.0))
mistake("causal_mask", "future scores are 0", lambda scores: scores.tril(scores.shape[-1] - scores.shape[-2]))
mistake(
    "causal_mask",
    "the mask starts at the first key",
    lambda scores: scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -INF),
)
mistake("causal_mask", "it changed `scores` in place", lambda scores: scores.masked_fill_(later(scores, 1), -INF))
mistake(
    "causal_mask", "past and future are swapped", lambda scores: scores.masked_fill(later(scores, 1).flip(0, 1), -INF)
)
mistake("causal_mask", "are -1e+09, a finite number", lambda scores: scores.masked_fill(later(scores, 1), -1e9))
mistake("causal_mask", "values are wrong", lambda scores: scores.masked_fill(later(scores, 1), -123.0), surprise=True)
mistake("causal_mask", "got nan", lambda scores: scores + later(scores, 1) * -INF, surprise=True)
mistake(
    "causal_mask",
    "expected -inf",
    lambda scores: scores.masked_fill(later(scores, 2), -INF),  # a query sees one position ahead
    surprise=True,
)
mistake(
    "causal_mask",
    "All of the wrong values are at batch=1",
    lambda scores: torch.cat([causal_mask(scores[:1]), scores[1:]]),
    surprise=True,
)


# ---------------------------------------------------------------------------------------------------------- Attention


def attend(self: Any, resid: Any, cache: Any = None, **wrong: Any) -> Any:
    """Attention with switches for what people get wrong."""
    b_Q, b_K, b_V, b_O = (0 * getattr(self, b) if b in wrong.get("without", ()) else getattr(self, b) for b in BIASES)
    q = self.hook_q(project_heads(resid, self.W_Q, b_Q))
    k = self.hook_k(project_heads(resid, wrong.get("W_K", self.W_K), b_K))
    v = self.hook_v(project_heads(resid, self.W_V, b_V))
    if cache is not None and not wrong.get("ignores_cache"):
        k, v = cache.append(wrong.get("layer", self.layer), k, v)
    scores = self.hook_attn_scores(wrong.get("mask", causal_mask)(wrong.get("score", attention_scores)(q, k)))
    pattern = scores.softmax(wrong.get("axis", -1))
    if wrong.get("pattern_thrown_away"):
        self.hook_pattern(pattern)
    else:
        pattern = self.hook_pattern(pattern)
    z = self.hook_z(einops.einsum(pattern, v, "b h query key, b key h d_head -> b query h d_head"))
    result = einops.einsum(z, self.W_O, "b p h d_head, h d_head d_model -> b p h d_model")
    if wrong.get("always_result") or self.hook_result.is_watched:
        result = self.hook_result(result + b_O if wrong.get("bias_in_result") else result)
    if wrong.get("bias_per_head"):
        return (result + b_O).sum(2)
    return result.sum(2) + (0 if wrong.get("bias_in_result") and self.hook_result.is_watched else b_O)


BIASES = ("b_Q", "b_K", "b_V", "b_O")


def attention(**wrong: Any) -> Callable[..., Any]:
    return lambda self, resid, cache=None: attend(self, resid, cache, **wrong)


for bias in BIASES:
    mistake("Attention", f"the bias `{bias}` is left out")(attention(without=(bias,)))
mistake("Attention", "all four biases are left out")(attention(without=BIASES))
mistake("Attention", "`b_O` is added once per head")(attention(bias_per_head=True))
mistake("Attention", "not divided by sqrt(d_head)")(attention(score=dots))
mistake("Attention", "divided by sqrt(d_model)")(attention(score=lambda q, k: dots(q, k) / 7**0.5))
mistake("Attention", "nothing is masked")(attention(mask=lambda scores: scores))
mistake("Attention", "`resid` is added to the output")(
    lambda self, resid, cache=None: attend(self, resid, cache) + resid
)
mistake("Attention", "`hook_result` was computed although nobody watches")(attention(always_result=True))
mistake("Attention", "what `hook_pattern` returns is thrown away")(attention(pattern_thrown_away=True))
mistake("Attention", "the cache is not used")(attention(ignores_cache=True))
mistake("Attention", "the mask starts at the first key")(
    attention(mask=lambda scores: scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -INF))
)
mistake("Attention", "expected one append per call (layer 1: 3 positions")(attention(layer=0))
mistake("Attention", "what `hook_result` sees", surprise=True)(attention(bias_in_result=True))
mistake("Attention", "the first wrong tensor is at `hook_attn_scores` (`hook_v` is right)", surprise=True)(
    attention(mask=lambda scores: scores.masked_fill(torch.ones(scores.shape[-2:]).triu(2).bool(), -INF))
)
mistake("Attention", "the first wrong tensor is at `hook_attn_scores` (`hook_v` is right)", surprise=True)(
    attention(score=lambda q, k: attention_scores(k, q).mT * 0.9)
)
mistake("Attention", "the diagonal is masked too, which leaves the first query nothing")(
    attention(mask=lambda scores: scores.masked_fill(later(scores, 0), -INF))
)


@mistake("Attention", "up to `hook_result`; look at what comes after it", surprise=True)
def _(self: Any, resid: Any, cache: Any = None) -> Any:
    return attend(self, resid, cache) - self.b_O + self.b_O.flip(0)


@mistake("Attention", "`hook_q` saw more than one tensor", surprise=True)
def _(self: Any, resid: Any, cache: Any = None) -> Any:
    for head in range(3):
        self.hook_q(resid @ self.W_Q[head])
    return attend(self, resid, cache)


@mistake("Attention", "no gradient reaches `W_Q`", surprise=True)
def _(self: Any, resid: Any, cache: Any = None) -> Any:
    return attend(self, resid, cache, score=lambda q, k: attention_scores(q, k).detach())


# -------------------------------------------------------------------------------------------------- gelu_new and MLP


def gelu(x: Any, cubic: float = 0.044715, root: float = math.sqrt(2 / math.pi), half: float = 0.5) -> Any:
    return half * x * (1 + torch.tanh(root * (x + cubic * x**3)))


mistake("gelu_new", "it is the exact GELU", lambda x: F.gelu(x))
mistake("gelu_new", "x sigmoid(1.702 x)", lambda x: x * torch.sigmoid(1.702 * x))
mistake("gelu_new", "the factor 0.5 is left out", lambda x: gelu(x, half=1.0))
mistake("gelu_new", "the cubic term is left out", lambda x: gelu(x, cubic=0.0))
mistake("gelu_new", "lacks its factor 0.044715", lambda x: gelu(x, cubic=1.0))
mistake("gelu_new", "lacks its root", lambda x: gelu(x, root=2 / math.pi))
mistake("gelu_new", "the root is that of 2 pi", lambda x: gelu(x, root=math.sqrt(2 * math.pi)))
mistake("gelu_new", "values are wrong", lambda x: gelu(x, cubic=0.44715), surprise=True)
mistake("gelu_new", "values are wrong", lambda x: gelu(x, cubic=0.0044715), surprise=True)
mistake("gelu_new", "values are wrong", lambda x: gelu(x).round(decimals=2), surprise=True)
mistake(
    "gelu_new",
    "far from 0",  # exp overflows
    lambda x: (
        0.5 * x * (1 + 1 - 2 / (1 + torch.exp(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
        if x.abs().max() < 50
        else x * torch.exp(x) / (1 + torch.exp(x))
    ),
    surprise=True,
)


def up_and_down(self: Any, resid: Any, act: Any = None, b_in: bool = True, b_out: bool = True) -> Any:
    pre = self.hook_pre(resid @ self.W_in + (self.b_in if b_in else 0))
    return self.hook_post((act or self.act)(pre)) @ self.W_out + (self.b_out if b_out else 0)


mistake("MLP", "`b_in` is left out")(lambda self, resid: up_and_down(self, resid, b_in=False))
mistake("MLP", "`b_out` is left out")(lambda self, resid: up_and_down(self, resid, b_out=False))
mistake("MLP", "there is no non-linearity")(lambda self, resid: up_and_down(self, resid, act=lambda pre: pre))
mistake("MLP", "another non-linearity is used than cfg.act = 'relu'")(
    lambda self, resid: up_and_down(self, resid, act=ref.gelu_new)
)
mistake("MLP", "another non-linearity is used than cfg.act = 'gelu_new'")(
    lambda self, resid: up_and_down(self, resid, act=torch.relu)
)
mistake("MLP", "`resid` is added to the output")(lambda self, resid: up_and_down(self, resid) + resid)
mistake("MLP", "applied to the output too")(lambda self, resid: self.act(up_and_down(self, resid)))
mistake("MLP", "what `hook_post` sees", surprise=True)(
    lambda self, resid: self.act(self.hook_post(self.hook_pre(resid @ self.W_in + self.b_in))) @ self.W_out + self.b_out
)
mistake("MLP", "the first wrong tensor is at `hook_post` (`hook_pre` is right)", surprise=True)(
    lambda self, resid: up_and_down(self, resid, act=torch.tanh)
)
mistake("MLP", "changed in place afterwards", surprise=True)(
    lambda self, resid: up_and_down(self, resid, act=torch.relu_ if self.act is torch.relu else self.act)
)


# --------------------------------------------------------------------------- TransformerBlock, Unembed, Transformer


def block_of(attn_part: Callable[..., Any], mlp_part: Callable[..., Any]) -> Callable[..., Any]:
    """A block whose two halves map (self, stream, cache) to (what is added or returned)."""

    def forward(self: Any, resid: Any, cache: Any = None) -> Any:
        pre = self.hook_resid_pre(resid)
        mid = attn_part(self, pre, cache)
        if self.cfg.attn_only:
            return self.hook_resid_post(mid)
        return self.hook_resid_post(mlp_part(self, pre, self.hook_resid_mid(mid)))

    return forward


def right_attn(self: Any, pre: Any, cache: Any) -> Any:
    return pre + self.hook_attn_out(self.attn(self.ln1(pre), cache))


def right_mlp(self: Any, pre: Any, mid: Any) -> Any:
    return mid + self.hook_mlp_out(self.mlp(self.ln2(mid)))


mistake("TransformerBlock", "attention reads the stream itself")(
    block_of(lambda self, pre, cache: pre + self.hook_attn_out(self.attn(pre, cache)), right_mlp)
)
mistake("TransformerBlock", "the MLP reads the stream itself")(
    block_of(right_attn, lambda self, pre, mid: mid + self.hook_mlp_out(self.mlp(mid)))
)
mistake("TransformerBlock", "the MLP's output replaces the stream")(
    block_of(right_attn, lambda self, pre, mid: self.hook_mlp_out(self.mlp(self.ln2(mid))))
)
mistake("TransformerBlock", "reads the stream from before attention")(
    block_of(right_attn, lambda self, pre, mid: mid + self.hook_mlp_out(self.mlp(self.ln2(pre))))
)
mistake("TransformerBlock", "what attention adds is lost")(
    block_of(right_attn, lambda self, pre, mid: pre + self.hook_mlp_out(self.mlp(self.ln2(mid))))
)
mistake("TransformerBlock", "ln1 stands in front of both")(
    block_of(right_attn, lambda self, pre, mid: mid + self.hook_mlp_out(self.mlp(self.ln1(mid))))
)
mistake("TransformerBlock", "attention was not given the key-value cache")(
    block_of(lambda self, pre, cache: pre + self.hook_attn_out(self.attn(self.ln1(pre))), right_mlp)
)
mistake("TransformerBlock", "`hook_attn_out` saw nothing", surprise=True)(
    block_of(lambda self, pre, cache: pre + self.attn(self.ln1(pre), cache), right_mlp)
)
mistake("TransformerBlock", "(`hook_resid_mid` is right)", surprise=True)(
    block_of(right_attn, lambda self, pre, mid: mid + self.hook_mlp_out(self.mlp(self.ln1(self.ln2(mid)))))
)
mistake("TransformerBlock", "values are wrong", surprise=True)(
    block_of(right_attn, lambda self, pre, mid: pre + mid + self.hook_mlp_out(self.mlp(self.ln2(mid))))
)
mistake("TransformerBlock", "what `hook_resid_mid` returns is thrown away", surprise=True)(
    lambda self, resid, cache=None: (
        ref.TransformerBlock.forward(self, resid, cache) if self.cfg.attn_only else _mid_thrown_away(self, resid, cache)
    )
)


def _mid_thrown_away(self: Any, resid: Any, cache: Any) -> Any:
    mid = right_attn(self, self.hook_resid_pre(resid), cache)
    self.hook_resid_mid(mid)
    return self.hook_resid_post(right_mlp(self, None, mid))


@mistake("TransformerBlock", "it changed `resid` in place")
def _(self: Any, resid: Any, cache: Any = None) -> Any:
    self.hook_resid_pre(resid)
    resid += self.hook_attn_out(self.attn(self.ln1(resid), cache))
    return self.hook_resid_post(right_mlp(self, resid, self.hook_resid_mid(resid)))


@mistake("TransformerBlock", "what `hook_resid_mid` saw was changed in place", surprise=True)
def _(self: Any, resid: Any, cache: Any = None) -> Any:
    stream = right_attn(self, self.hook_resid_pre(resid), cache)
    if not self.cfg.attn_only:
        stream = self.hook_resid_mid(stream)
        stream += self.hook_mlp_out(self.mlp(self.ln2(stream)))
    return self.hook_resid_post(stream)


@mistake("TransformerBlock", "your code raised AttributeError with cfg.attn_only", surprise=True)
def _(self: Any, resid: Any, cache: Any = None) -> Any:
    return self.hook_resid_post(
        right_mlp(self, None, self.hook_resid_mid(right_attn(self, self.hook_resid_pre(resid), cache)))
    )


mistake("Unembed", "the bias `b_U` is left out")(lambda self, resid: resid @ self.W_U)
mistake("Unembed", "the softmax is taken")(lambda self, resid: (resid @ self.W_U + self.b_U).softmax(-1))
mistake("Unembed", "normalised first")(lambda self, resid: F.layer_norm(resid, (7,)) @ self.W_U + self.b_U)
mistake("Unembed", "values are wrong", surprise=True)(lambda self, resid: resid @ self.W_U - self.b_U)
mistake("Unembed", "first at [batch=0, pos=0, d_vocab=0]", surprise=True)(
    lambda self, resid: (resid / 7**0.5) @ self.W_U + self.b_U
)
mistake("Unembed", "All of the wrong values are at batch=1", surprise=True)(
    lambda self, resid: resid[:1].expand_as(resid) @ self.W_U + self.b_U
)


def model(**wrong: Any) -> Callable[..., Any]:
    """The model with switches for what people get wrong."""

    def forward(self: Any, tokens: Any, cache: Any = None) -> Any:
        offset = 0 if cache is None or wrong.get("no_offset") else cache.length
        tokens_in = self.hook_embed(self.embed(tokens))
        positions = self.hook_pos_embed(self.pos_embed(tokens, offset))
        resid = tokens_in if wrong.get("no_positions") else tokens_in + positions
        blocks = list(self.blocks)
        for block in blocks[:: wrong.get("direction", 1)][: wrong.get("n_blocks")]:
            passed_on = None if wrong.get("no_cache") else cache
            resid = resid + block(resid, passed_on) if wrong.get("adds") else block(resid, passed_on)
        resid = resid if wrong.get("no_final") else self.ln_final(resid)
        logits = self.unembed(resid)
        return logits.log_softmax(-1) if wrong.get("softmax") else logits

    return forward


mistake("Transformer", "the position embeddings are left out")(model(no_positions=True))
mistake("Transformer", "ln_final is left out")(model(no_final=True))
mistake("Transformer", "the blocks run in the opposite order")(model(direction=-1))
mistake("Transformer", "only the first block runs")(model(n_blocks=1))
mistake("Transformer", "a block returns the whole stream")(model(adds=True))
mistake("Transformer", "positions are counted from 0")(model(no_offset=True))
mistake("Transformer", "block 0 was not given the cache")(model(no_cache=True))
mistake("Transformer", "values are wrong", surprise=True)(model(softmax=True))
mistake("Transformer", "reads `embed.W_E` by itself", surprise=True)(
    lambda self, tokens, cache=None: self.unembed(self.embed.W_E[tokens])
)


@mistake("Transformer", "values are wrong", surprise=True)
def _(self: Any, tokens: Any, cache: Any = None) -> Any:
    resid = self.hook_embed(self.embed(tokens)) - self.hook_pos_embed(self.pos_embed(tokens))
    for block in self.blocks:
        resid = block(resid, cache)
    return self.unembed(self.ln_final(resid))


# ------------------------------------------------------------------------------------------------------ init_weights


def initialise(
    model: Any,
    std: float,
    generator: Any,
    shrink: Callable[[float, int], float] = lambda std, n: std / (2 * n) ** 0.5,
    draw: Callable[..., Any] | None = None,
    w: float = 1.0,
    b: float = 0.0,
    into_stream: tuple[str, ...] = ("W_O", "W_out"),
) -> None:
    draw = draw or (lambda shape, generator: torch.randn(shape, generator=generator))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            symbol = name.split(".")[-1]
            if symbol.startswith("W_"):
                deviation = shrink(std, model.cfg.n_layers) if symbol in into_stream else std
                parameter.copy_(draw(parameter.shape, generator) * deviation)
            else:
                parameter.fill_(w if symbol == "w" else b)


def init(words: str, surprise: bool = False, **wrong: Any) -> None:
    mistake("init_weights", words, lambda model, std, generator: initialise(model, std, generator, **wrong), surprise)


init("is drawn like the others", shrink=lambda std, n: std)
init("only the blocks are counted", shrink=lambda std, n: std / n**0.5)
init("divided by 2 n_layers; divide by the root", shrink=lambda std, n: std / (2 * n))
init("it drew from torch's global random numbers", draw=lambda shape, generator: torch.randn(shape))
init("draw from a normal distribution", draw=lambda s, g: (torch.rand(s, generator=g) * 2 - 1) * 3**0.5)
init("hold the same random numbers", draw=lambda s, g: torch.randn(s, generator=g.manual_seed(g.initial_seed())))
init("two different seeds gave the same", surprise=True, draw=lambda s, g: _seeded_by_size(s))
init("`blocks.0.ln1.w`: 32 of 32 values are wrong", surprise=True, w=0.0)
init("values are wrong", surprise=True, b=0.01)
init("has standard deviation 0.0122, expected 0.03", surprise=True, into_stream=("W_O", "W_out", "W_U"))
init("is drawn like the others; what writes", into_stream=("W_O",))
init("has mean", surprise=True, draw=lambda s, g: torch.randn(s, generator=g) + 1)
init("it holds one number everywhere", draw=lambda s, g: torch.full(s, 0.02))
mistake("init_weights", "it is left as it was", lambda model, std, generator: None)


def _seeded_by_size(shape: Any) -> Any:
    _seeded_by_size.calls = getattr(_seeded_by_size, "calls", 0) % 21 + 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(_seeded_by_size.calls))


@mistake("init_weights", "it is left as it was")
def _(model: Any, std: float, generator: Any) -> None:
    biases = {n: p.detach().clone() for n, p in model.named_parameters() if n.split(".")[-1] == "b_V"}
    ref.init_weights(model, std, generator)
    for name, value in biases.items():
        model.get_parameter(name).data.copy_(value)


@mistake("init_weights", "is no longer the parameter that it was", surprise=True)
def _(model: Any, std: float, generator: Any) -> None:
    ref.init_weights(model, std, generator)
    model.get_submodule("embed").W_E = nn.Parameter(model.get_parameter("embed.W_E").detach().clone())


# -------------------------------------------------------------------------------------------- convert_gpt2_weights


def converted(words: str, change: Callable[[dict[str, Any], dict[str, Any], Any], Any], surprise: bool = False) -> None:
    """The right dict, then changed: `change(ours, theirs, cfg)`."""

    def convert(state_dict: Any, cfg: Any) -> Any:
        ours = ref.convert_gpt2_weights(state_dict, cfg)
        change(ours, state_dict, cfg)
        return ours

    mistake("convert_gpt2_weights", words, convert, surprise)


converted(
    "the heads' columns are taken to alternate",
    lambda ours, theirs, cfg: ours.update(
        {"blocks.0.attn.W_Q": theirs["transformer.h.0.attn.c_attn.weight"][:, :12].reshape(12, 4, 3).permute(2, 0, 1)}
    ),
)
converted(
    "without moving the head axis to the front",
    lambda ours, theirs, cfg: ours.update(
        {"blocks.0.attn.W_Q": theirs["transformer.h.0.attn.c_attn.weight"][:, :12].reshape(3, 12, 4)}
    ),
)
converted(
    "c_proj is transposed",
    lambda ours, theirs, cfg: ours.update(
        {"blocks.1.attn.W_O": theirs["transformer.h.1.attn.c_proj.weight"].T.reshape(3, 4, 12)}
    ),
)
converted(
    "it holds what belongs into `blocks.0.attn.W_K`",
    lambda ours, theirs, cfg: ours.update({"blocks.0.attn.W_V": ours["blocks.0.attn.W_K"]}),
)
converted(
    "it holds what belongs into `blocks.0.ln1.w`",
    lambda ours, theirs, cfg: ours.update({"blocks.1.ln1.w": ours["blocks.0.ln1.w"]}),
)
converted(
    "the token embeddings are used",
    lambda ours, theirs, cfg: ours.update({"unembed.W_U": ours["embed.W_E"].T}),
)
converted(
    "lm_head is reshaped; it needs transposing",
    lambda ours, theirs, cfg: ours.update({"unembed.W_U": theirs["lm_head.weight"].reshape(12, 13)}),
)
converted("has no entry `unembed.b_U`", lambda ours, theirs, cfg: ours.__delitem__("unembed.b_U"), surprise=False)
converted(
    "our Transformer does not know, `blocks.0.attn.mask`",
    lambda ours, theirs, cfg: ours.update({"blocks.0.attn.mask": theirs["transformer.h.0.attn.bias"]}),
)
converted(
    "`unembed.b_U`: 13 of 13", lambda ours, theirs, cfg: ours.update({"unembed.b_U": torch.ones(13)}), surprise=True
)
converted(
    "`blocks.1.attn.W_V`: ",
    lambda ours, theirs, cfg: ours.update({"blocks.1.attn.W_V": ours["blocks.1.attn.W_V"].flip(0)}),  # heads reversed
    surprise=True,
)
converted(
    "`blocks.0.attn.b_K`: ",
    lambda ours, theirs, cfg: ours.update(
        {"blocks.0.attn.b_K": ours["blocks.0.attn.b_K"].reshape(4, 3).T}  # heads taken to alternate, in the bias
    ),
    surprise=True,
)
converted("added or removed entries", lambda ours, theirs, cfg: theirs.pop("transformer.ln_f.bias"), surprise=True)
converted("`transformer.wte.weight` in place", lambda ours, theirs, cfg: theirs["transformer.wte.weight"].zero_())


# --------------------------------------------------------------------------------------------------- drawing tokens

mistake("greedy", "the smallest logit", lambda logits: logits.argmin(-1))
mistake("greedy", "the first row's token", lambda logits: logits[0].argmax().expand(len(logits)))
mistake("greedy", "the largest absolute value", lambda logits: logits.abs().argmax(-1))
mistake("greedy", "in the whole tensor", lambda logits: logits.argmax().expand(len(logits)))
mistake("greedy", "values are wrong", lambda logits: logits.sort(-1).indices[:, -2], surprise=True)
mistake("greedy", "first at [batch=1]", lambda logits: logits.relu().argmax(-1), surprise=True)
mistake(
    "greedy", "first at [batch=0]", lambda logits: logits.sort(-1, descending=True).indices.argmin(-1), surprise=True
)

TEMPERATURE = "apply_temperature"
mistake(TEMPERATURE, "multiplied by the temperature", lambda logits, t: _positive(t) * logits)
mistake(TEMPERATURE, "the softmax is taken", lambda logits, t: (logits / _positive(t)).softmax(-1))
mistake(TEMPERATURE, "the temperature is ignored", lambda logits, t: logits * 1.0)
mistake(TEMPERATURE, "temperature 0.0 should raise ValueError", lambda logits, t: logits / t)
mistake(TEMPERATURE, "temperature -0.5 should raise ValueError", lambda logits, t: logits / (t if t else _positive(t)))
mistake(TEMPERATURE, "Every value is 0.6325 times", lambda logits, t: logits / _positive(t) ** 0.5 / 1.0, surprise=True)
mistake(
    TEMPERATURE, "values are wrong", lambda logits, t: (logits - logits.mean(-1, True)) / _positive(t), surprise=True
)
mistake(TEMPERATURE, "it changed `logits` in place", lambda logits, t: logits.div_(_positive(t)))


def _positive(temperature: float) -> float:
    if temperature <= 0:
        raise ValueError("not positive")
    return temperature


def counts(logits: Any, tokens: Any) -> Any:
    return F.one_hot(tokens, logits.shape[-1]).sum(1).to(logits)


PENALTY = "apply_frequency_penalty"
mistake(PENALTY, "a token pays once", lambda logits, tokens, p: logits - p * (counts(logits, tokens) > 0))
mistake(PENALTY, "a token pays once", lambda logits, tokens, p: logits.scatter(1, tokens, logits.gather(1, tokens) - p))
mistake(PENALTY, "the penalty is added", lambda logits, tokens, p: logits + p * counts(logits, tokens))
mistake(PENALTY, "the logits are lost", lambda logits, tokens, p: -p * counts(logits, tokens))
mistake(PENALTY, "of the whole batch", lambda logits, tokens, p: logits - p * counts(logits, tokens).sum(0))
mistake(PENALTY, "for the first row's tokens", lambda logits, tokens, p: logits - p * counts(logits, tokens)[:1])
mistake(PENALTY, "values are wrong", lambda logits, tokens, p: logits - p * counts(logits, tokens) ** 2, surprise=True)
mistake(
    PENALTY, "values are wrong", lambda logits, tokens, p: logits - p * counts(logits, tokens[:, 1:]), surprise=True
)
mistake(PENALTY, "values are wrong", lambda logits, tokens, p: logits * (1 - p * counts(logits, tokens)), surprise=True)
mistake(PENALTY, "it changed `logits` in place", lambda logits, tokens, p: logits.sub_(p * counts(logits, tokens)))


def top_k(
    change: Callable[[Any, int], Any] | None = None, fill: float = -INF, test: bool = True
) -> Callable[[Any, int], Any]:
    """Keep what is not below a threshold, `change(logits, k)`."""

    def keep(logits: Any, k: int) -> Any:
        if test and k < 1:
            raise ValueError("k")
        k = min(k, logits.shape[-1])
        threshold = (change or (lambda logits, k: logits.topk(k).values[:, -1:]))(logits, k)
        return logits.masked_fill(logits < threshold, fill)

    return keep


mistake("keep_top_k", "the others are set to 0", top_k(fill=0.0))
mistake("keep_top_k", "the first row's threshold", top_k(lambda logits, k: logits[0].topk(k).values[-1]))
mistake("keep_top_k", "of the whole tensor", top_k(lambda logits, k: logits.flatten().topk(k).values[-1]))
mistake("keep_top_k", "one token too few", top_k(lambda logits, k: logits.topk(k).values[:, -1:] + 1e-4))
mistake("keep_top_k", "one token too many", top_k(lambda logits, k: logits.topk(min(k + 1, 13)).values[:, -1:]))
mistake(
    "keep_top_k",
    "the smallest logits are kept",
    lambda logits, k: -top_k(fill=INF)(-logits, k),
)
mistake("keep_top_k", "k = 0 should raise ValueError", lambda logits, k: top_k()(logits, max(k, 1)))
mistake("keep_top_k", "expected -inf", top_k(lambda logits, k: logits.mean(-1, True)), surprise=True)
mistake("keep_top_k", "expected -inf, got -1e+04", top_k(fill=-1e4), surprise=True)
mistake("keep_top_k", "values are wrong", lambda logits, k: top_k()(logits, k).log_softmax(-1), surprise=True)
mistake("keep_top_k", "out of range", lambda logits, k: _top_k_no_clamp(logits, k), surprise=True)


def _top_k_no_clamp(logits: Any, k: int) -> Any:
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -INF)


def top_p(
    logits: Any,
    p: float,
    at_least: int = 1,
    drop: Callable[[Any, Any, float], Any] = lambda total, own, p: total - own >= p,
    fill: float = -INF,
    back: bool = True,
    test: bool = True,
) -> Any:
    """Nucleus with switches for what people get wrong."""
    if test and not 0 < p <= 1:
        raise ValueError("p")
    ranked, order = logits.sort(-1, descending=True)
    own = ranked.softmax(-1)
    dropped = drop(own.cumsum(-1), own, p)
    dropped[:, :at_least] = False
    if not back:
        return logits.masked_fill(dropped, fill)
    return logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), fill)


def nucleus(words: str, surprise: bool = False, **wrong: Any) -> None:
    mistake(
        "keep_top_p",
        words,
        lambda logits, p, min_tokens_to_keep=1: top_p(logits, p, min_tokens_to_keep, **wrong),
        surprise,
    )


nucleus("the token that crosses p is dropped", drop=lambda total, own, p: total > p)
nucleus("put on the unsorted ones", back=False)
nucleus("the others are set to 0", fill=0.0)
nucleus("single tokens with a probability above p", drop=lambda total, own, p: own < p)
nucleus(
    "every row keeps as many tokens as the first",
    drop=lambda total, own, p: (total - own >= p)[:1].expand_as(own).clone(),
)
nucleus("p = 0.0 should raise ValueError", test=False)
nucleus("the sum before them is rounded to 1")
nucleus("values are wrong", surprise=True, drop=lambda total, own, p: total - own >= p / 2)
nucleus(
    "values are wrong",
    surprise=True,
    drop=lambda total, own, p: total - own >= p**0.5,
)
mistake("keep_top_p", "min_tokens_to_keep is ignored", lambda logits, p, min_tokens_to_keep=1: top_p(logits, p))
mistake(
    "keep_top_p",
    "with p = 0.3 and min_tokens_to_keep = 4",
    lambda logits, p, min_tokens_to_keep=1: top_p(logits, p, max(min_tokens_to_keep - 1, 1)),
    surprise=True,
)
mistake(
    "keep_top_p",
    "the first row's tokens are kept in all rows",
    lambda logits, p, min_tokens_to_keep=1: torch.where(
        top_p(logits, p, min_tokens_to_keep)[:1].isfinite(), logits, -INF
    ),
)
mistake(
    "keep_top_p",
    "the logits come back sorted",
    lambda logits, p, min_tokens_to_keep=1: top_p(logits.sort(-1, descending=True).values, p, min_tokens_to_keep),
)

mistake("sample", "the softmax is taken twice", lambda logits, g: _draw(logits.softmax(-1).softmax(-1), g))
mistake("sample", "all tokens are equally likely", lambda logits, g: _draw(torch.ones_like(logits), g))
mistake(
    "sample", "it drew from torch's global", lambda logits, g: torch.distributions.Categorical(logits=logits).sample()
)
mistake(
    "sample",
    "the most likely token is always taken",
    lambda logits, g: logits.argmax(-1) + 0 * _draw(logits.exp().clamp(0, 1) + 1e-9, g),
)
mistake("sample", "whose logit is -inf", lambda logits, g: _draw(logits.clamp(min=-3).softmax(-1), g), surprise=True)
mistake(
    "sample", "it left `generator` as it was", lambda logits, g: ref.sample(logits, torch.Generator().manual_seed(3))
)
mistake("sample", "two seeds gave the same", lambda logits, g: ref.sample(logits, g.manual_seed(3)), surprise=True)
mistake("sample", "should be drawn with probability", lambda logits, g: ref.sample(logits / 2, g), surprise=True)
mistake("sample", "another row's probabilities", lambda logits, g: ref.sample(logits.roll(1, 0), g))
mistake("sample", "should be drawn with probability", lambda logits, g: _inverse(logits, g, rows=1), surprise=True)
mistake("sample", "rows depend on each other", lambda logits, g: _inverse(logits, g, rows=2), surprise=True)
mistake(
    "sample", "your code raised RuntimeError", lambda logits, g: _draw(logits.exp() / logits.exp().sum(-1, True), g)
)
mistake(
    "sample", "should be drawn", lambda logits, g: _draw((logits - logits.amax(-1, True)).exp() ** 2, g), surprise=True
)


def _draw(weights: Any, generator: Any) -> Any:
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


def _inverse(logits: Any, generator: Any, rows: int) -> Any:
    """Draw by the inverse of the distribution function, with one random number for several rows."""
    n_draws = -(-len(logits) // rows) if rows == 2 else 1
    uniform = torch.rand(n_draws, 1, generator=generator)
    uniform = uniform.repeat_interleave(rows, 0)[: len(logits)] if rows == 2 else uniform
    return (logits.softmax(-1).cumsum(-1) < uniform).sum(-1).clamp(max=4)


def generation(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A generate with switches for what people get wrong."""

    def generate(model: Any, tokens: Any, n_new: int, pick: Any, eos: int | None = None) -> Any:
        prompt, start = tokens, tokens.shape[1]
        running = torch.ones(len(tokens)).bool()
        if eos is not None and wrong.get("prompt_counts"):
            running = ~(tokens == eos).any(1)
        if wrong.get("eval"):
            model.eval()
        with torch.set_grad_enabled(bool(wrong.get("gradients"))):
            for _ in range(n_new if wrong.get("too_long") else min(n_new, model.cfg.n_ctx - start)):
                logits = model(prompt if wrong.get("stale") else tokens)[:, wrong.get("position", -1)]
                new = pick(logits.softmax(-1) if wrong.get("softmax") else logits)
                if eos if wrong.get("falsy") else eos is not None:
                    if not wrong.get("forgetful"):
                        new = torch.where(running, new, wrong.get("fill", eos))
                    running = running & (new != eos)
                tokens = torch.cat(
                    [tokens, new[:1].expand(len(tokens))[:, None] if wrong.get("first_row") else new[:, None]], 1
                )
                finished = ~running
                if finished.any() if wrong.get("any_row") else finished.all() and not wrong.get("never_stops"):
                    break
        return tokens[:, start:] if wrong.get("new_only") else tokens

    mistake("generate", words, generate, surprise)


mistake(
    "generate",
    "with a cache that holds 3 positions, a prompt of 3 should raise ValueError",
    lambda model, tokens, n_new, pick, eos=None, cache=None: ref.generate(
        model, tokens, n_new, pick, eos, cache if cache and cache.length < tokens.shape[1] else None
    ),
    surprise=True,
)
generation("the logits at the first position", position=0)
generation("hand the longer sequence to the model", stale=True)
generation("the softmax is taken", softmax=True)
generation("gradients are recorded", gradients=True)
generation("stop when n_ctx is reached", too_long=True)
generation("a finished row goes on with what `pick` says", forgetful=True)
generation("generation does not stop when all rows are finished", never_stops=True)
generation("stops as soon as one row is finished", any_row=True)
generation("generate with eos = 0", falsy=True)
generation("filled with 0 instead of eos", fill=0)
generation("only the new tokens are returned", new_only=True)
generation("an eos in the prompt finishes the row", prompt_counts=True)
generation("All of the wrong values are at batch=1", surprise=True, first_row=True)
generation("it left the model in evaluation mode", eval=True)
generation("expected 6, got 11", surprise=True, fill=11)
generation("what `pick` gets in step 0", surprise=True, position=1)


# ------------------------------------------------------------------------------------------------------ the tests


@pytest.mark.parametrize(
    "mistake",
    [pytest.param(m, id=f"{m.exercise}: {m.words[:50]}") for m in MISTAKES],
)
def test_mistake_is_refused_with_its_words(mistake: Mistake) -> None:
    assert_refused(
        CHECKS[mistake.exercise],
        mistake,
        secrets=("einsum(", "masked_fill(", "scatter_add", ".triu("),
        not_a_cause="thrown away",
    )


@pytest.mark.parametrize("exercise", CHECKS)
def test_every_exercise_has_mistakes_known_and_unknown(exercise: str) -> None:
    assert_known_and_unknown(MISTAKES, exercise)


@pytest.mark.parametrize("exercise", CHECKS)
def test_another_right_answer_passes(exercise: str) -> None:
    run_check(CHECKS[exercise], getattr(other, exercise))


@pytest.mark.parametrize("exercise", CHECKS)
def test_check_is_quick(exercise: str) -> None:
    assert_quick(CHECKS[exercise], getattr(other, exercise), rounds=3)


# ------------------------------------------------------------------------------- the reference, from other sides


TINY = TransformerConfig(d_vocab=31, n_ctx=17, n_layers=3, n_heads=4, d_model=20, d_head=5, d_mlp=80)


@pytest.fixture(scope="module")
def hugging_face() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A tiny GPT-2 in which every parameter is random: the model, tokens, its logits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=31,
        n_positions=17,
        n_embd=20,
        n_layer=3,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    theirs = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        tokens = torch.randint(31, (2, 11), generator=generator)
        return theirs, tokens, theirs(tokens).logits


@pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
def test_logits_are_those_of_hugging_face(module: Any, hugging_face: Any) -> None:
    theirs, tokens, logits = hugging_face
    ours = module.Transformer(TINY)
    ours.load_state_dict(module.convert_gpt2_weights(theirs.state_dict(), TINY))
    torch.testing.assert_close(ours(tokens), logits, rtol=1e-4, atol=1e-4)


def test_the_oracle_is_gpt2(hugging_face: Any) -> None:
    """The loops with which answers are compared have an oracle of their own."""
    theirs, tokens, logits = hugging_face
    weights = other.convert_gpt2_weights(theirs.state_dict(), TINY)
    torch.testing.assert_close(transformer(weights, TINY, tokens)["output"], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
@pytest.mark.parametrize("attn_only", [False, True])
@pytest.mark.parametrize("normalization", ["LN", "none"])
def test_interface(module: Any, attn_only: bool, normalization: Any) -> None:
    """The written-down interface is what the classes have, no more and no less."""
    cfg = replace(CFG, attn_only=attn_only, normalization=normalization)
    ours = module.Transformer(cfg)
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == transformer_parameters(cfg)
    assert set(hook_points(ours)) == set(transformer_hooks(cfg))
    _, cache = run_with_cache(ours, torch.zeros(1, 3, dtype=torch.long), names="*")
    assert set(cache) == set(transformer_hooks(cfg))
    if module is ref:
        assert list(cache) == transformer_hooks(cfg)


@pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
def test_fused_and_explicit_attention_agree(module: Any) -> None:
    ours = module.Transformer(TINY)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0, 0.3)
    tokens = torch.arange(22).reshape(2, 11)
    watched, _ = run_with_cache(ours, tokens)
    torch.testing.assert_close(ours(tokens), watched, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
def test_cache_gives_what_the_whole_sequence_gives(module: Any) -> None:
    ours, tokens = module.Transformer(TINY), torch.arange(22).reshape(2, 11)
    cache = ref.KVCache(TINY, batch=2)
    with torch.no_grad():
        steps = [ours(tokens[:, :4], cache), *(ours(tokens[:, p : p + 1], cache) for p in range(4, 11))]
        torch.testing.assert_close(torch.cat(steps, dim=1), ours(tokens), rtol=1e-4, atol=1e-4)
    assert cache.length == 11


def test_a_full_cache_says_so() -> None:
    ours, cache = ref.Transformer(TINY), ref.KVCache(TINY, batch=1)
    ours(torch.zeros(1, 17, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="18 positions do not fit into n_ctx = 17; start a new cache"):
        cache.append(0, torch.zeros(1, 1, 4, 5), torch.zeros(1, 1, 4, 5))


# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "len(self.W_pos) -> self.W_pos",  # in a message
    "len(rows) < n_pos -> len(rows) > n_pos",  # what happens beyond n_ctx is left open
    "len(rows) < n_pos -> len(rows) != n_pos",
    "ValueError(problem) -> problem",
    "-1 -> 1",  # of two axes, the last; of four, [-2:] is [2:]
    "-2 -> 2",
    "symbol == 'w' -> symbol >= 'w'",
    "True -> False",  # zip(strict=True) of equal lengths
    "zip('QKV', weights, biases, strict=True) -> zip('QKV', weights, biases)",
    "logits.topk(min(k, logits.shape[-1]), dim=-1) -> logits.topk(min(k, logits.shape[-1]))",
    "logits.sort(dim=-1, descending=True) -> logits.sort(descending=True)",
    "sum_before >= p -> sum_before > p",  # they differ where rounding decides
    "p < 1 -> p != 1",  # above 1 it has been refused
    "torch.zeros_like(dropped) -> dropped",  # all of it is overwritten
    "finished | (new == eos) -> new == eos",  # what is finished goes on with eos
}


@pytest.mark.slow
@pytest.mark.parametrize("exercise", CHECKS)
def test_small_changes_of_the_reference_are_refused(exercise: str) -> None:
    """One operator, number, comparison or argument at a time. Only what needs a GPU to be seen is let off."""
    assert survivors(Path(ref.__file__), exercise, CHECKS[exercise], only_on_gpu="device=") <= STILL_RIGHT
