# ruff: noqa: N802 (check_RotaryAttention is named after its exercise)
"""Chapter 02, from GPT-2 to Pythia: rotary positions, parallel blocks and NeoX weights.

Oracles are loops that spell the definition out (`by_loops`, `neox_weights`) and torch's own functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks import by_loops
from course_utils.checks.ch02.attending import attend, judge_large_scores
from course_utils.checks.ch02.converting import judge_converted, wrong_entries
from course_utils.checks.ch02.neox_weights import converted_by_rows, neox_state_dict
from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import (
    always,
    check_module,
    construct,
    noise,
    weights_of,
    with_forwards,
    with_methods,
)
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.standins import newer_parts as standins
from course_utils.checks.standins.cache import make_cache
from course_utils.checks.standins.parts import Toy, ToyWithCache, wave
from course_utils.checks.transformer_interface import (
    attention_hooks,
    attention_parameters,
    block_hooks,
    block_parameters,
)
from course_utils.checks.translating import during
from course_utils.config import TransformerConfig
from course_utils.hooks import hook_points

# As in chapter 02's other checks: odd sizes that all differ. Four of six coordinates turn, the second pair visibly.
CFG = TransformerConfig(
    d_vocab=13,
    n_ctx=9,
    n_layers=3,
    n_heads=3,
    d_model=7,
    d_head=6,
    d_mlp=11,
    act="gelu",
    positions="rotary",
    rotary_dim=4,
    rotary_base=20.0,
    parallel=True,
)
RESID = "batch pos d_model"
HEADS = "batch pos head d_head"
INF = torch.inf


# ---------------------------------------------------------------------------------------------------------- rotary

ROTARY_D_HEAD = 10  # of the vectors that apply_rotary is checked with


def halves(rotary_dim: int, start: int = 0) -> list[tuple[int, int]]:
    """The pairs (i, i + rotary_dim / 2), counted from `start`."""
    return [(start + i, start + i + rotary_dim // 2) for i in range(rotary_dim // 2)]


def turned(x: Tensor, positions: Tensor, rotary_dim: int, base: float, **wrong: Any) -> Tensor:
    """Pair after pair is turned, with switches for what people get wrong."""
    out = x.clone()
    for i, (first, second) in enumerate(wrong.get("pairs", halves)(rotary_dim)):
        exponent = wrong.get("exponent", lambda i, rotary_dim: 2 * i / rotary_dim)(i, rotary_dim)
        angles = (positions / base**exponent)[:, None]
        a, b = x[..., first], x[..., second]
        out[..., first], out[..., second] = wrong.get("mixed", mixed)(a, b, angles.cos(), angles.sin())
    return out


def mixed(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A pair after turning it."""
    return a * cos - b * sin, a * sin + b * cos


def turning(**wrong: Any) -> Callable[..., Tensor]:
    """An apply_rotary that makes this mistake."""
    return partial(turned, **wrong)


@known_mistakes(
    {
        "all coordinates are turned; only the first `rotary_dim` are.": (
            lambda x, p, n, base: turned(x, p, ROTARY_D_HEAD, base)
        ),
        "all coordinates are turned, with angles for `rotary_dim`.": turning(pairs=lambda n: halves(ROTARY_D_HEAD)),
        "neighbours (2 i, 2 i + 1) are taken for pairs; i goes with i + rotary_dim / 2.": turning(
            pairs=lambda n: [(i, i + 1) for i in range(0, n, 2)]
        ),
        "`positions` is ignored: they are counted from 0.": (
            lambda x, p, n, base: turned(x, torch.arange(len(p)), n, base)
        ),
        "every position is one too large: counting begins at 0.": lambda x, p, n, base: turned(x, p + 1, n, base),
        "the vectors are turned the other way, by minus the angle.": lambda x, p, n, base: turned(x, -p, n, base),
        "the exponent is i / rotary_dim; it is 2 i / rotary_dim.": turning(exponent=lambda i, n: i / n),
        "the exponent is 2 i / d_head; divide by rotary_dim.": turning(exponent=lambda i, n: 2 * i / ROTARY_D_HEAD),
        "the angles are multiplied by base^(2 i / rotary_dim); divide.": turning(exponent=lambda i, n: -2 * i / n),
        "the pairs are counted from 1; the first turns by p itself.": turning(exponent=lambda i, n: 2 * (i + 1) / n),
        "`base` is ignored: the angles are those for 10000.": lambda x, p, n, base: turned(x, p, n, 10000.0),
        "all pairs turn by the same angle.": turning(exponent=lambda i, n: 0),
        "the last `rotary_dim` coordinates are turned; the first are.": turning(
            pairs=lambda n: halves(n, start=ROTARY_D_HEAD - n)
        ),
        "sine and cosine are swapped.": turning(mixed=lambda a, b, cos, sin: mixed(a, b, sin, cos)),
        "the second of a pair is b cos - a sin; it is a sin + b cos.": turning(
            mixed=lambda a, b, cos, sin: (a * cos - b * sin, b * cos - a * sin)
        ),
        "the first of a pair is a cos + b sin; it is a cos - b sin.": turning(
            mixed=lambda a, b, cos, sin: (a * cos + b * sin, a * sin + b * cos)
        ),
        "the second of a pair is made from the first as it is after the turn: a slice is a view, so a line that writes "
        "into it changes what the next line reads.": turning(
            mixed=lambda a, b, cos, sin: ((turned_a := a * cos - b * sin), turned_a * sin + b * cos)
        ),
        "the angles are computed in the dtype of `x`, and bfloat16 rounds them; compute them in float32.": (
            lambda x, p, n, base: turned(x, p.to(x.dtype), n, base)
        ),
        "only the turned coordinates are returned; put the others behind them.": (
            lambda x, p, n, base: turned(x, p, n, base)[..., :n]
        ),
        "the coordinates that are not turned are set to 0; they stay as they are.": (
            lambda x, p, n, base: F.pad(turned(x, p, n, base)[..., :n], (0, ROTARY_D_HEAD - n))
        ),
        "nothing is turned.": lambda x, p, n, base: x.clone(),
    }
)
def check_apply_rotary(fn: Callable[..., Any]) -> None:
    """Positions with gaps, some of the coordinates; then all of them; then a single position far on."""
    for n_batch, places, rotary_dim, base in [
        (2, [2, 3, 5, 9, 14], 6, 8.0),
        (1, [0, 1, 2], 10, 10000.0),
        (2, [700], 4, 500.0),
    ]:
        x, positions = noise(n_batch, len(places), 3, ROTARY_D_HEAD, seed=20), torch.tensor(places)
        actual = fn(x, positions, rotary_dim, base)
        expected = by_loops.rotated(x, places, rotary_dim, base)
        name = f"apply_rotary with positions {places}, rotary_dim {rotary_dim} and base {base:g}"
        compare(name, actual, expected, HEADS, atol=1e-4, inputs={"x": x})
        follows_input("apply_rotary", fn, (x, positions, rotary_dim, base), HEADS, gradient=True)
    follows_every_kind("apply_rotary", fn, (x, positions, rotary_dim, base), HEADS)
    for dtype in (torch.float16, torch.bfloat16):  # the angles would be rounded: 31.25 for 31.30
        half = x.to(dtype)
        expected = by_loops.rotated(half.float(), [700], rotary_dim, base).to(dtype)
        name = f"apply_rotary in {str(dtype).removeprefix('torch.')}"
        compare(name, fn(half, positions, rotary_dim, base), expected, HEADS, rtol=2e-2, atol=2e-2)


def wrong_attention(
    of: str = "qk",
    *,
    places: Callable[[int, int], Tensor] = torch.arange,
    first: int = 0,
    hooks_first: str = "",
    stored_as_is: bool = False,
    rotary_dim: int = CFG.rotary_dim,
    **wrong: Any,
) -> type:
    """A RotaryAttention that turns what `of` names, as often as it does.

    `places` gives the positions with a cache, from the first new one to the one after the last; without a cache they
    are counted from `first`.
    """

    def remember(module: Any, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> tuple[Tensor, Tensor, Tensor]:
        views, n_new, start = {"q": q, "k": k, "v": v}, q.shape[1], 0 if cache is None else cache.length
        positions = torch.arange(first, first + n_new) if cache is None else places(start, start + n_new)
        positions = positions.to(q.device)
        for letter in hooks_first:
            getattr(module, f"hook_rot_{letter}")(views[letter])
        for letter in of:
            views[letter] = turned(views[letter], positions, rotary_dim, CFG.rotary_base)
        for letter in [letter for letter in "qk" if letter not in hooks_first]:
            views[letter] = getattr(module, f"hook_rot_{letter}")(views[letter])
        if cache is not None:
            keys, views["v"] = cache.append(module.layer, k if stored_as_is else views["k"], v)
            views["k"] = torch.cat([keys[:, :-n_new], views["k"]], dim=1)
        return views["q"], views["k"], views["v"]

    def forward(self: Any, resid: Tensor, cache: Any = None) -> Tensor:
        return attend(self, resid, cache, remember=remember, **wrong)

    return with_methods(standins.RotaryAttention, "RotaryAttention", forward=forward)


def turned_early(vectors: Tensor) -> Tensor:
    """Turned by their positions in a text without a cache."""
    positions = torch.arange(vectors.shape[1], device=vectors.device)
    return turned(vectors, positions, CFG.rotary_dim, CFG.rotary_base)


@known_mistakes(
    {
        "nothing is turned.": wrong_attention(of=""),
        "the values are turned too; only queries and keys are.": wrong_attention(of="qkv"),
        "the queries are turned and the keys are not.": wrong_attention(of="q"),
        "the keys are turned and the queries are not.": wrong_attention(of="k"),
        "all coordinates are turned; only the first cfg.rotary_dim are.": wrong_attention(rotary_dim=CFG.d_head),
        "keys and values are turned, queries are not.": wrong_attention(of="kv"),
        "the queries are turned twice, the keys once.": wrong_attention(of="qqk"),
        "both are turned twice.": wrong_attention(of="qqkk"),
        "`resid` is added to the output; the block will do that.": wrong_attention(adds_resid=True),
        "`b_O` is left out.": wrong_attention(without=("b_O",)),
        "positions are counted from 1; the scores do not notice, because they only know distances.": wrong_attention(
            first=1
        ),
    },
    {
        f"`hook_rot_{letter}` sees the vectors before they are turned.": wrong_attention(hooks_first=letter)
        for letter in "qk"
    },
    {
        f"`hook_{letter}` sees the turned vectors; those belong to `hook_rot_{letter}`.": wrong_attention(
            of="qk".replace(letter, ""), before_hook={letter: turned_early}
        )
        for letter in "qk"
    },
    {
        "positions are counted from 0 again; the first new one stands at `cache.length`.": wrong_attention(
            places=lambda start, end: torch.arange(end - start)
        ),
        "`cache.length` is read after `append`; read it before.": wrong_attention(
            places=lambda start, end: torch.arange(end, 2 * end - start)
        ),
        "the new positions begin one too late.": wrong_attention(
            places=lambda start, end: torch.arange(start, end) + int(start > 0)
        ),
        "the new positions begin one too early.": wrong_attention(
            places=lambda start, end: torch.arange(start, end) - int(start > 0)
        ),
        "all new positions of a step are taken for the first of them.": wrong_attention(
            places=lambda start, end: torch.full((end - start,), start)
        ),
        "what is in the cache is not turned.": wrong_attention(stored_as_is=True),
    },
)
def check_RotaryAttention(cls: Any) -> None:
    """The loop's numbers, watched or not; and the same with a key-value cache that grows in three steps."""
    name, wanted = "RotaryAttention", attention_hooks(CFG)
    module = construct(name, cls, CFG, attention_parameters(CFG), wanted)
    weights = weights_of(module)
    resid = noise(2, 5, 7, seed=21)
    for read, replaced in ((resid, True), (resid[:, :1], False)):
        oracle = partial(by_loops.attention, weights, read, rotary=(CFG.rotary_dim, CFG.rotary_base))
        check_module(name, module, (read,), oracle, RESID, wanted, replace=replaced)
    _check_rotary_cache(cls, module, weights)
    rotary = (CFG.rotary_dim, CFG.rotary_base)
    judge_large_scores(name, module, partial(by_loops.attention, weights, rotary=rotary))


def _check_rotary_cache(cls: type, module: Any, weights: Mapping[str, Tensor]) -> None:
    """Two positions, then five, then one, in the last layer of a model: the other layers append first."""
    name, steps = "RotaryAttention with a key-value cache", [(0, 2), (2, 7), (7, 8)]
    resid = noise(2, 8, 7, seed=25)
    last = module.layer = CFG.n_layers - 1
    expected = by_loops.attention(weights, resid, rotary=(CFG.rotary_dim, CFG.rotary_base))["output"]
    for watched in ((), ("hook_attn_scores", "hook_pattern")):
        handles = [getattr(module, hook).add(lambda activation, hook: None) for hook in watched]
        cache = make_cache(cls, CFG, batch=2)
        with torch.no_grad(), during("with a key-value cache"):
            for start, end in steps:
                zeros = torch.zeros(2, end - start, 3, 6)
                for layer in range(last):
                    cache.append(layer, zeros, zeros)
                actual = module(resid[:, start:end], cache)
                compare(f"{name} of length {start}", actual, expected[:, start:end], RESID)
        for handle in handles:
            handle.remove()
        own = [size for layer, size in cache.appended if layer == last]
        if own != [2, 5, 1] or len(cache.appended) != 3 * len(steps):
            raise CheckFailed(
                f"{name}: expected one append per call, for layer {last} and with the new positions only.\n"
                "  Next: call cache.append(self.layer, k, v) once, after the keys are turned."
            )


# --------------------------------------------------------------------------------------------------- parallel blocks


@known_mistakes(
    with_forwards(
        standins.ParallelBlock,
        {
            "the MLP reads the stream after attention was added, as in GPT-2; here it reads what attention read.": (
                lambda m, resid: (mid := resid + m.attn(m.ln1(resid))) + m.mlp(m.ln2(mid))
            ),
            "the MLP reads what attention returns.": lambda m, resid: (
                resid + (attn_out := m.attn(m.ln1(resid))) + m.mlp(m.ln2(attn_out))
            ),
            "attention reads the stream after the MLP was added.": lambda m, resid: (
                (late := resid + m.mlp(m.ln2(resid))) + m.attn(m.ln1(late))
            ),
            "ln1 stands in front of both; the MLP has its own, ln2.": lambda m, resid: (
                resid + m.attn(m.ln1(resid)) + m.mlp(m.ln1(resid))
            ),
            "ln2 stands in front of both; attention has its own, ln1.": lambda m, resid: (
                resid + m.attn(m.ln2(resid)) + m.mlp(m.ln2(resid))
            ),
            "ln1 and ln2 are swapped.": lambda m, resid: resid + m.attn(m.ln2(resid)) + m.mlp(m.ln1(resid)),
            "ln2 reads what ln1 returns; both read the stream.": lambda m, resid: (
                resid + m.attn(m.ln1(resid)) + m.mlp(m.ln2(m.ln1(resid)))
            ),
            "the MLP reads the stream itself; it should read ln2's copy.": lambda m, resid: (
                resid + m.attn(m.ln1(resid)) + m.mlp(resid)
            ),
            "attention reads the stream itself; it should read ln1's copy.": lambda m, resid: (
                resid + m.attn(resid) + m.mlp(m.ln2(resid))
            ),
            "neither reads a normalised copy.": lambda m, resid: resid + m.attn(resid) + m.mlp(resid),
            "the stream is not added.": lambda m, resid: m.attn(m.ln1(resid)) + m.mlp(m.ln2(resid)),
            "the stream is added twice.": lambda m, resid: 2 * resid + m.attn(m.ln1(resid)) + m.mlp(m.ln2(resid)),
            "the MLP is left out.": lambda m, resid: resid + m.attn(m.ln1(resid)),
            "attention is left out.": lambda m, resid: resid + m.mlp(m.ln2(resid)),
        },
    )
)
def check_ParallelBlock(cls: Any) -> None:
    """First the wiring, with toy parts whose answers are known; then whole blocks with their real parts."""
    name = "ParallelBlock"
    wanted = [hook for hook in block_hooks(CFG) if "." not in hook]
    module = construct(name, cls, CFG, block_parameters(CFG), wanted)
    if "hook_resid_mid" in hook_points(module):
        raise CheckFailed(
            f"{name}: it has a hook point `hook_resid_mid`, but there is no stream between attention and MLP.\n"
            "  Next: keep the `__init__` that was given (the statement holds it)."
        )
    ln1, attn, ln2, mlp = wave(1.1, 0.2), wave(0.9, 0.5), wave(1.3, -0.4), wave(-0.8, 0.7)
    module.ln1, module.ln2 = Toy(name, "ln1", ln1), Toy(name, "ln2", ln2)
    module.attn, module.mlp = ToyWithCache(name, "attn", attn), Toy(name, "mlp", mlp)
    resid = noise(2, 5, 7, seed=22)

    def oracle(replaced: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pre = replaced.get("hook_resid_pre", resid)
        attn_out = replaced.get("hook_attn_out", attn(ln1(pre)))
        mlp_out = replaced.get("hook_mlp_out", mlp(ln2(pre)))
        post = replaced.get("hook_resid_post", pre + attn_out + mlp_out)
        seen = {"hook_resid_pre": pre, "hook_attn_out": attn_out, "hook_mlp_out": mlp_out, "hook_resid_post": post}
        return {**seen, "output": post}

    check_module(name, module, (resid,), oracle, RESID, wanted, toys=True)
    cache = make_cache(cls, CFG, batch=2)
    module(resid, cache)
    if module.attn.caches[-1] is not cache:
        raise CheckFailed(
            f"{name}: attention was not given the key-value cache.\n  Next: pass it on, as the second argument."
        )
    for cfg in (replace(CFG, positions="learned", rotary_dim=0), CFG, replace(CFG, normalization="none", act="relu")):
        wanted = block_hooks(cfg)
        module = construct(name, cls, cfg, block_parameters(cfg), wanted)
        right = always(by_loops.block(weights_of(module), cfg, resid))
        with during(f"with cfg.positions = {cfg.positions!r}"):
            check_module(f"{name} with its real parts", module, (resid,), right, RESID, wanted, replace=False)


# ---------------------------------------------------------------------------------------------------------- weights

QKV = "gpt_neox.layers.{}.attention.query_key_value."
wrong_views = partial(wrong_entries, converted_by_rows, [f"attn.W_{letter}" for letter in "QKV"], f"{QKV}weight")
wrong_biases = partial(wrong_entries, converted_by_rows, [f"attn.b_{letter}" for letter in "QKV"], f"{QKV}bias")
wrong_output = partial(wrong_entries, converted_by_rows, ["attn.W_O"], "gpt_neox.layers.{}.attention.dense.weight")
wrong_up = partial(wrong_entries, converted_by_rows, ["mlp.W_in"], "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight")
wrong_down = partial(wrong_entries, converted_by_rows, ["mlp.W_out"], "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight")
AS_IN_GPT2 = "{} is split into all queries, all keys, all values, as in GPT-2; here each head has its own three."
ALTERNATING = "the heads' rows of {} are taken to alternate; each head has its rows one after the other."
AS_IT_IS = "the matrix for {} is taken as it is; theirs is stored [out, in], ours [in, out]."
RESHAPED = "the matrix for {} is reshaped; it is stored [out, in] and needs transposing."


def as_in_gpt2(rows: Tensor, cfg: TransformerConfig, part: int) -> Tensor:
    """All queries, all keys, all values: [head d_head ...]."""
    return rows.chunk(3)[part].unflatten(0, (cfg.n_heads, cfg.d_head))


def alternating(rows: Tensor, cfg: TransformerConfig, part: int) -> Tensor:
    """All queries, all keys, all values, the heads' rows by turns: [head d_head ...]."""
    return rows.chunk(3)[part].unflatten(0, (cfg.d_head, cfg.n_heads)).transpose(0, 1)


def own_rows(rows: Tensor, cfg: TransformerConfig, part: int) -> Tensor:
    """Each head's own: [head d_head d_model]."""
    return rows.unflatten(0, (cfg.n_heads, 3, cfg.d_head))[:, part]


def unembedded(view: Callable[[dict[str, Tensor]], Tensor]) -> Callable[..., Any]:
    """A converter that makes `unembed.W_U` in this way."""
    return lambda state_dict, cfg: converted_by_rows(state_dict, cfg) | {"unembed.W_U": view(state_dict)}


@known_mistakes(
    wrong_views(AS_IN_GPT2, lambda rows, cfg, part: as_in_gpt2(rows, cfg, part).transpose(1, 2)),
    wrong_views(ALTERNATING, lambda rows, cfg, part: alternating(rows, cfg, part).transpose(1, 2)),
    wrong_views(AS_IT_IS, own_rows),
    wrong_views(RESHAPED, lambda rows, cfg, part: own_rows(rows, cfg, part).reshape(-1, cfg.d_model, cfg.d_head)),
    wrong_biases(AS_IN_GPT2, as_in_gpt2),
    wrong_biases(ALTERNATING, alternating),
    wrong_output(
        "dense is not transposed for {}; its columns belong to the heads.",
        lambda dense, cfg, _: dense.unflatten(0, (cfg.n_heads, cfg.d_head)),
    ),
    wrong_output(
        "the heads' columns of {} are taken to alternate; each head has d_head columns side by side.",
        lambda dense, cfg, _: dense.T.unflatten(0, (cfg.d_head, cfg.n_heads)).transpose(0, 1),
    ),
    wrong_up(AS_IT_IS, lambda weight, cfg, _: weight),
    wrong_up(RESHAPED, lambda weight, cfg, _: weight.reshape(cfg.d_model, cfg.d_mlp)),
    wrong_down(AS_IT_IS, lambda weight, cfg, _: weight),
    wrong_down(RESHAPED, lambda weight, cfg, _: weight.reshape(cfg.d_mlp, cfg.d_model)),
    {
        "the token embeddings are used; these weights have an unembedding of their own.": unembedded(
            lambda theirs: theirs["gpt_neox.embed_in.weight"].T
        ),
        AS_IT_IS.format("`W_U`"): unembedded(lambda theirs: theirs["lm_head.weight"]),
        RESHAPED.format("`W_U`"): unembedded(lambda theirs: theirs["lm_head.weight"].reshape(12, 13)),
    },
)
def check_convert_neox_weights(fn: Callable[..., Any]) -> None:
    """Every entry, put together row by row, from a state dict with NeoX's names, new and old."""
    cfg = replace(CFG, d_model=12, d_head=4, n_layers=12)
    for unembed in ("lm_head", "embed_out"):
        theirs = neox_state_dict(cfg, unembed)
        with during(f"where the unembedding is named {unembed}.weight"):
            judge_converted("convert_neox_weights", fn, cfg, theirs, converted_by_rows(theirs, cfg))
