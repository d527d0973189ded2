"""Chapter 02's layers: mistakes that their checks do not know, right answers in another style, and GPT-2's numbers."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import einops
import pytest
import torch
from torch.nn import functional as F

import solutions.ch02_transformer as ref
from course_utils.build import read_lesson
from course_utils.checks import CheckFailed, check
from course_utils.checks.ch02.attending import later
from course_utils.checks.ch02.layers import CFG, gelu
from course_utils.checks.transformer_interface import transformer_hooks, transformer_parameters
from course_utils.config import TransformerConfig
from course_utils.hooks import hook_points, run_with_cache
from solutions.ch02_transformer import attention_scores, causal_mask, project_heads
from tests.ch02 import other_transformer as other
from tests.conftest import ROOT

INF = torch.inf
SECRETS = ("einsum(", "masked_fill(", ".triu(")
ONLY_ON_GPU = "device="

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "len(self.W_pos) -> self.W_pos",  # in a message
    "len(rows) < n_pos -> len(rows) > n_pos",  # what happens beyond n_ctx is left open
    "len(rows) < n_pos -> len(rows) != n_pos",
    "ValueError(problem) -> problem",
    "-2 -> 2",  # of four axes, [-2:] is [2:]
}


def wrong(base: type, **methods: Any) -> type:
    """A class of the reference with something done differently."""
    return type(base.__name__, (base,), methods)


def scales_over_batch(self: Any, resid: Any) -> Any:
    scale = self.hook_scale((resid.var((0, 2), correction=0, keepdim=True) + self.eps).sqrt().expand(len(resid), -1, 1))
    return self.hook_normalized((resid - resid.mean(-1, keepdim=True)) / scale) * self.w + self.b


def unwatched(self: Any, resid: Any) -> Any:
    return F.layer_norm(resid, resid.shape[-1:], self.w, self.b, self.eps)


def hook_thrown_away(self: Any, resid: Any) -> Any:
    centred = resid - resid.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
    self.hook_scale(scale)
    return self.hook_normalized(centred / scale) * self.w + self.b


def hook_too_late(self: Any, resid: Any) -> Any:
    centred = resid - resid.mean(-1, keepdim=True)
    scale = self.hook_scale((centred.square().mean(-1, keepdim=True) + self.eps).sqrt())
    return self.hook_normalized(centred / scale * self.w + self.b)


def without_gradient(self: Any, resid: Any) -> Any:
    centred = resid - resid.mean(-1, keepdim=True)
    scale = self.hook_scale((centred.square().mean(-1, keepdim=True) + self.eps).sqrt())
    return self.hook_normalized(centred / scale) * self.w.data + self.b


def float32_inside(self: Any, resid: Any) -> Any:
    narrow = resid.float()
    centred = narrow - narrow.mean(-1, keepdim=True)
    scale = self.hook_scale((centred.square().mean(-1, keepdim=True) + self.eps).sqrt().to(resid.dtype))
    return self.hook_normalized(centred.to(resid.dtype) / scale) * self.w + self.b


def by_exponentials(scores: Any, dim: int) -> Any:
    return scores.exp() / scores.exp().sum(dim, keepdim=True)


def one_row_of_text(self: Any, resid: Any) -> Any:
    pre = resid.view(-1, resid.shape[-1]) @ self.W_in + self.b_in
    return self.hook_post(self.act(self.hook_pre(pre.view(*resid.shape[:2], -1)))) @ self.W_out + self.b_out


def layers_as_text(self: Any, tokens: Any, cache: Any = None) -> Any:
    resid = self.hook_embed(self.embed(tokens)) + self.hook_pos_embed(
        self.pos_embed(tokens, 0 if cache is None else cache.length)
    )
    for name in sorted(name for name, _ in self.blocks.named_children()):
        resid = self.blocks[int(name)](resid, cache)
    return self.unembed(self.ln_final(resid))


def mask_by_length(self: Any, resid: Any, cache: Any = None) -> Any:
    """Right: how many positions came before is asked of the cache, before it gets the new ones."""
    start = 0 if cache is None else cache.length
    q = self.hook_q(project_heads(resid, self.W_Q, self.b_Q))
    k = self.hook_k(project_heads(resid, self.W_K, self.b_K))
    v = self.hook_v(project_heads(resid, self.W_V, self.b_V))
    if cache is not None:
        k, v = cache.append(self.layer, k, v)
    query = torch.arange(start, start + q.shape[1], device=resid.device)
    past = torch.arange(k.shape[1], device=resid.device) <= query[:, None]
    scores = self.hook_attn_scores(attention_scores(q, k).masked_fill(~past, -INF))
    z = self.hook_z(torch.einsum("bhqk,bkhd->bqhd", self.hook_pattern(scores.softmax(-1)), v))
    if self.hook_result.is_watched:
        return self.hook_result(torch.einsum("bqhd,hdm->bqhm", z, self.W_O)).sum(2) + self.b_O
    return torch.einsum("bqhd,hdm->bqm", z, self.W_O) + self.b_O


def attention(**different: Any) -> type:
    """An Attention in the reference's steps, some of them done differently."""

    def forward(self: Any, resid: Any, cache: Any = None) -> Any:
        q = self.hook_q(project_heads(resid, self.W_Q, self.b_Q))
        k = self.hook_k(project_heads(resid, self.W_K, self.b_K))
        v = self.hook_v(project_heads(resid, self.W_V, self.b_V))
        if cache is not None:
            k, v = cache.append(different.get("layer", self.layer), k, v)
        scores = different.get("mask", causal_mask)(different.get("score", attention_scores)(q, k))
        pattern = different.get("softmax", torch.softmax)(self.hook_attn_scores(scores), -1)
        watched = self.hook_pattern(pattern)
        pattern = pattern if different.get("pattern_thrown_away") else watched
        z = self.hook_z(einops.einsum(pattern, v, "b h query key, b key h d_head -> b query h d_head"))
        result = einops.einsum(z, self.W_O, "b p h d_head, h d_head d_model -> b p h d_model")
        b_O = self.b_O.flip(0) if different.get("flipped_bias") else self.b_O
        if different.get("always_result") or self.hook_result.is_watched:
            if different.get("bias_in_result"):
                return self.hook_result(result + b_O).sum(2)
            result = self.hook_result(result)
        return result.sum(2) + b_O

    return wrong(ref.Attention, forward=forward)


def head_by_head(self: Any, resid: Any, cache: Any = None) -> Any:
    for head in range(3):
        self.hook_q(resid @ self.W_Q[head])
    return ref.Attention.forward(self, resid, cache)


def up_and_down(act: Callable[..., Any]) -> type:
    """An MLP with another non-linearity."""

    def forward(self: Any, resid: Any) -> Any:
        return self.hook_post(act(self)(self.hook_pre(resid @ self.W_in + self.b_in))) @ self.W_out + self.b_out

    return wrong(ref.MLP, forward=forward)


def act_twice(self: Any, resid: Any) -> Any:
    return self.act(self.hook_post(self.hook_pre(resid @ self.W_in + self.b_in))) @ self.W_out + self.b_out


def block_of(attn_part: Callable[..., Any], mlp_part: Callable[..., Any]) -> type:
    """A block whose halves return the stream: `attn_part(self, pre, cache)` and `mlp_part(self, pre, mid)`."""

    def forward(self: Any, resid: Any, cache: Any = None) -> Any:
        pre = self.hook_resid_pre(resid)
        mid = attn_part(self, pre, cache)
        if self.cfg.attn_only:
            return self.hook_resid_post(mid)
        return self.hook_resid_post(mlp_part(self, pre, self.hook_resid_mid(mid)))

    return wrong(ref.TransformerBlock, forward=forward)


def right_attn(self: Any, pre: Any, cache: Any) -> Any:
    return pre + self.hook_attn_out(self.attn(self.ln1(pre), cache))


def right_mlp(self: Any, pre: Any, mid: Any) -> Any:
    return mid + self.hook_mlp_out(self.mlp(self.ln2(mid)))


def mid_thrown_away(self: Any, resid: Any, cache: Any = None) -> Any:
    if self.cfg.attn_only:
        return ref.TransformerBlock.forward(self, resid, cache)
    mid = right_attn(self, self.hook_resid_pre(resid), cache)
    self.hook_resid_mid(mid)
    return self.hook_resid_post(right_mlp(self, None, mid))


def resid_in_place(self: Any, resid: Any, cache: Any = None) -> Any:
    self.hook_resid_pre(resid)
    resid += self.hook_attn_out(self.attn(self.ln1(resid), cache))
    return self.hook_resid_post(right_mlp(self, resid, self.hook_resid_mid(resid)))


def mid_in_place(self: Any, resid: Any, cache: Any = None) -> Any:
    stream = right_attn(self, self.hook_resid_pre(resid), cache)
    if not self.cfg.attn_only:
        stream = self.hook_resid_mid(stream)
        stream += self.hook_mlp_out(self.mlp(self.ln2(stream)))
    return self.hook_resid_post(stream)


def always_mlp(self: Any, resid: Any, cache: Any = None) -> Any:
    mid = self.hook_resid_mid(right_attn(self, self.hook_resid_pre(resid), cache))
    return self.hook_resid_post(right_mlp(self, None, mid))


def model(join: Callable[[Any, Any], Any] = torch.add, cache_to_blocks: bool = True, late: int = 0) -> type:
    """A Transformer that joins its embeddings in another way, keeps the cache to itself, or begins `late`."""

    def forward(self: Any, tokens: Any, cache: Any = None) -> Any:
        offset = 0 if cache is None else max(cache.length + late, 0)
        resid = join(self.hook_embed(self.embed(tokens)), self.hook_pos_embed(self.pos_embed(tokens, offset)))
        for block in self.blocks:
            resid = block(resid, cache if cache_to_blocks else None)
        return self.unembed(self.ln_final(resid))

    return wrong(ref.Transformer, forward=forward)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "LayerNorm": [
        ("the first wrong tensor is at `hook_scale`", wrong(ref.LayerNorm, forward=scales_over_batch)),
        ("`hook_scale` saw nothing", wrong(ref.LayerNorm, forward=unwatched)),
        ("What `hook_scale` returns is thrown away", wrong(ref.LayerNorm, forward=hook_thrown_away)),
        ("what `hook_normalized` sees: 70 of 70 values are wrong", wrong(ref.LayerNorm, forward=hook_too_late)),
        ("no gradient reaches `w`", wrong(ref.LayerNorm, forward=without_gradient)),
        ("in float64: it computes with fewer digits", wrong(ref.LayerNorm, forward=float32_inside)),
    ],
    "Embed": [
        (
            "None of them is at pos=0",
            wrong(ref.Embed, forward=lambda self, t: self.W_E[torch.cat([t[:, :1], t[:, 1:] * 0 + 9], dim=1)]),
        ),
        ("values are wrong", wrong(ref.Embed, forward=lambda self, tokens: self.W_E[tokens.flip(1)])),
        ("values are wrong", wrong(ref.Embed, forward=lambda self, tokens: F.normalize(self.W_E[tokens], dim=-1))),
        ("no gradient reaches `W_E`", wrong(ref.Embed, forward=lambda self, tokens: self.W_E.data[tokens])),
    ],
    "PosEmbed": [
        (
            "first at [batch=0, pos=1, d_model=0]",
            wrong(ref.PosEmbed, forward=lambda self, t, offset=0: self.W_pos[offset].expand(*t.shape, -1)),
        ),
        (
            "first at [batch=0, pos=0, d_model=0]",
            wrong(
                ref.PosEmbed,
                forward=lambda self, t, offset=0: self.W_pos[offset : offset + t.shape[1]].flip(0).expand(*t.shape, -1),
            ),
        ),
    ],
    "attention_scores": [
        (
            "Every value is 1.095 times the right one",
            lambda q, k: attention_scores(q, k) * (q.shape[3] / q.shape[1]) ** 0.5,
        ),
        (
            "first at [batch=0, head=0, query=0, key=0]",  # sums over the keys' heads
            lambda q, k: einops.einsum(q, k, "b q h d, b k g d -> b h q k") / 2,
        ),
        ("All of the wrong values are at batch=1", lambda q, k: attention_scores(q, k[:1].expand_as(k))),
        ("it changed `q` in place", lambda q, k: attention_scores(q.div_(2), k)),
        ("fewer digits", lambda q, k: attention_scores(q.float(), k.float()).to(q.dtype)),
        ("wrong shape", lambda q, k: attention_scores(q, k).squeeze()),
    ],
    "causal_mask": [
        ("values are wrong", lambda s: s.masked_fill(later(s), -123.0)),
        ("got nan", lambda s: s + later(s) * -INF),
        ("expected -inf", lambda s: s.masked_fill(later(s, 2), -INF)),  # a query sees one position ahead
        ("All of the wrong values are at batch=1", lambda s: torch.cat([causal_mask(s[:1]), s[1:]])),
        ("it changed `scores` in place", lambda scores: scores.masked_fill_(later(scores), -INF)),
        (
            "values are wrong",  # a visible score of 0 is masked too
            lambda s: (low := s.tril(s.shape[3] - s.shape[2])).masked_fill(low == 0, -INF),
        ),
    ],
    "Attention": [
        ("`hook_result` was computed although nobody watches", attention(always_result=True)),
        ("What `hook_pattern` returns is thrown away", attention(pattern_thrown_away=True)),
        ("expected one append per call (layer 1: 3 positions", attention(layer=0)),
        ("what `hook_result` sees", attention(bias_in_result=True)),
        (
            "the first wrong tensor is at `hook_attn_scores` (`hook_v` is right)",
            attention(mask=lambda scores: scores.masked_fill(later(scores, 2), -INF)),
        ),
        (
            "the first wrong tensor is at `hook_attn_scores` (`hook_v` is right)",
            attention(score=lambda q, k: attention_scores(k, q).mT * 0.9),
        ),
        ("up to `hook_result`; look at what comes after it", attention(flipped_bias=True)),
        ("`hook_q` saw more than one tensor", wrong(ref.Attention, forward=head_by_head)),
        ("with large scores: 28 of 35 values are wrong", attention(softmax=by_exponentials)),
        ("no gradient reaches `W_Q`", attention(score=lambda q, k: attention_scores(q, k).detach())),
    ],
    "gelu_new": [
        ("values are wrong", lambda x: gelu(x, cubic=0.44715)),
        ("values are wrong", lambda x: gelu(x, cubic=0.0044715)),
        ("values are wrong", lambda x: gelu(x).round(decimals=2)),
        ("fewer digits", lambda x: F.gelu(x.float(), approximate="tanh").to(x.dtype)),
        (
            "far from 0",  # exp overflows
            lambda x: (
                0.5 * x * (1 + 1 - 2 / (1 + torch.exp(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
                if x.abs().max() < 50
                else x * torch.exp(x) / (1 + torch.exp(x))
            ),
        ),
    ],
    "MLP": [
        ("RuntimeError on inputs that are not contiguous", wrong(ref.MLP, forward=one_row_of_text)),
        ("what `hook_post` sees", wrong(ref.MLP, forward=act_twice)),
        ("the first wrong tensor is at `hook_post` (`hook_pre` is right)", up_and_down(lambda self: torch.tanh)),
        (
            "changed in place afterwards",
            up_and_down(lambda self: torch.relu_ if self.act is torch.relu else self.act),
        ),
    ],
    "TransformerBlock": [
        (
            "attention was not given the key-value cache",
            block_of(lambda self, pre, cache: right_attn(self, pre, None), right_mlp),
        ),
        (
            "`hook_attn_out` saw nothing",
            block_of(lambda self, pre, cache: pre + self.attn(self.ln1(pre), cache), right_mlp),
        ),
        (
            "(`hook_resid_mid` is right)",
            block_of(right_attn, lambda self, pre, mid: mid + self.hook_mlp_out(self.mlp(self.ln1(self.ln2(mid))))),
        ),
        ("values are wrong", block_of(right_attn, lambda self, pre, mid: pre + right_mlp(self, pre, mid))),
        ("What `hook_resid_mid` returns is thrown away", wrong(ref.TransformerBlock, forward=mid_thrown_away)),
        ("it changed `resid` in place", wrong(ref.TransformerBlock, forward=resid_in_place)),
        ("what `hook_resid_mid` saw was changed in place", wrong(ref.TransformerBlock, forward=mid_in_place)),
        ("your code raised AttributeError with cfg.attn_only", wrong(ref.TransformerBlock, forward=always_mlp)),
    ],
    "Unembed": [
        ("values are wrong", wrong(ref.Unembed, forward=lambda self, resid: resid @ self.W_U - self.b_U)),
        (
            "first at [batch=0, pos=0, d_vocab=0]",
            wrong(ref.Unembed, forward=lambda self, resid: (resid / 7**0.5) @ self.W_U + self.b_U),
        ),
        (
            "All of the wrong values are at batch=1",
            wrong(ref.Unembed, forward=lambda self, resid: resid[:1].expand_as(resid) @ self.W_U + self.b_U),
        ),
    ],
    "Transformer": [
        ("block 0 was not given the cache", model(cache_to_blocks=False)),
        ("Transformer with 12 layers", wrong(ref.Transformer, forward=layers_as_text)),
        ("values are wrong", model(join=torch.sub)),
        ("in a key-value cache: 130 of 130 values are wrong", model(late=-1)),
        ("in a key-value cache: 130 of 130 values are wrong", model(late=1)),
        (
            "reads `embed.W_E` directly",
            wrong(ref.Transformer, forward=lambda self, tokens, cache=None: self.unembed(self.embed.W_E[tokens])),
        ),
    ],
}

ALSO_RIGHT = {name: [getattr(other, name)] for name in SURPRISES}
ALSO_RIGHT["Attention"].append(wrong(ref.Attention, forward=mask_by_length))


# ------------------------------------------------------------------------------- the reference, from other sides


TINY = TransformerConfig(d_vocab=31, n_ctx=17, n_layers=3, n_heads=4, d_model=20, d_head=5, d_mlp=80)


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
    ref.init_weights(ours, 0.3, torch.Generator().manual_seed(0))  # as they are made, they differ from run to run
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


@pytest.mark.parametrize(
    "demo, cause",
    {
        "UnbiasedVariance": "the variance divides by d_model - 1 (torch's default); divide by d_model.",
        "NoShift": "`b` is left out.",
        "OverTheBatch": "mean and variance are taken over the whole tensor; each position has its own.",
        "EpsilonOutside": "eps is added outside the root; it belongs under it.",
    }.items(),
)
def test_the_demos_of_the_lesson_are_refused_with_their_cause(demo: str, cause: str) -> None:
    """The section on tests promises that the check names what each of its wrong norms got wrong."""
    sources = (cell.source for cell in read_lesson(ROOT / "chapters/src/02_transformer.md"))
    names: dict[str, Any] = {"LayerNorm": ref.LayerNorm, "__name__": "__main__"}  # as in a notebook
    exec(next(source for source in sources if source.startswith("class UnbiasedVariance")), names)
    with pytest.raises(CheckFailed) as refused:
        check(names[demo], name="LayerNorm")
    assert f"This is what you get if {cause}" in str(refused.value)
