# ruff: noqa: N802 (check_RMSNorm is named after its exercise)
"""Chapter 02, on to Llama: RMSNorm, gated MLPs, heads that share keys and values, and Llama's weights.

Oracles are torch's own functions, and loops that spell the definition out (`by_loops`, `llama_weights`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks import by_loops
from course_utils.checks.ch02.attending import attend, judge_large_scores
from course_utils.checks.ch02.converting import judge_converted, wrong_entries
from course_utils.checks.ch02.llama_weights import converted_by_rows, llama_state_dict
from course_utils.checks.ch02.variants import turned
from course_utils.checks.comparing import compare
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import (
    check_half_precision,
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
from course_utils.checks.transformer_interface import (
    GATED_MLP_HOOKS,
    NORM_HOOKS,
    attention_hooks,
    attention_parameters,
    mlp_parameters,
)
from course_utils.checks.translating import during
from course_utils.config import TransformerConfig

# Odd sizes that all differ, as in chapter 02's other checks; three heads of queries for each head of keys and values.
CFG = TransformerConfig(
    d_vocab=13,
    n_ctx=9,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    d_model=7,
    d_head=4,
    d_mlp=11,
    normalization="RMS",
    positions="rotary",
    rotary_dim=4,
    rotary_base=20.0,
    gated=True,
)
RESID = "batch pos d_model"


# ------------------------------------------------------------------------------------------------- norm and MLP


def rms(norm: Any, resid: Tensor, axes: Any = -1) -> Tensor:
    """What the vectors are divided by."""
    return (resid.square().mean(axes, keepdim=True) + norm.eps).sqrt()


def deviation(norm: Any, resid: Tensor) -> Tensor:
    """What LayerNorm divides by."""
    return (resid.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()


@known_mistakes(
    with_forwards(
        standins.RMSNorm,
        {
            "the mean is subtracted, as in LayerNorm; here it is not.": lambda m, resid: F.layer_norm(
                resid, m.w.shape, m.w, eps=m.eps
            ),
            "the mean is subtracted from the vector, but not in the root.": lambda m, resid: (
                (resid - resid.mean(-1, keepdim=True)) / rms(m, resid) * m.w
            ),
            "the vector is divided by its deviation, from which the mean is subtracted.": lambda m, resid: (
                resid / deviation(m, resid) * m.w
            ),
            "eps is added outside the root; it belongs under it.": lambda m, resid: (
                resid / (resid.square().mean(-1, keepdim=True).sqrt() + m.eps) * m.w
            ),
            "eps is left out, or another one is used than self.eps.": lambda m, resid: (
                resid / resid.square().mean(-1, keepdim=True).sqrt() * m.w
            ),
            "`w` is left out.": lambda m, resid: resid / rms(m, resid),
            "the root is missing.": lambda m, resid: resid / rms(m, resid) ** 2 * m.w,
            "the squares are summed; take their mean.": lambda m, resid: (
                resid / (resid.square().sum(-1, keepdim=True) + m.eps).sqrt() * m.w
            ),
            "the squares are not taken: it is the mean of the absolute values.": lambda m, resid: (
                resid / (resid.abs().mean(-1, keepdim=True) + m.eps) * m.w
            ),
            "the scale is `1 + w`; it is `w`.": lambda m, resid: resid / rms(m, resid) * (1 + m.w),
            "the mean of the squares is taken over the positions; take it over d_model.": lambda m, resid: (
                resid / rms(m, resid, 1) * m.w
            ),
            "the mean of the squares is taken over the whole tensor; each position has its own.": lambda m, resid: (
                resid / rms(m, resid, (0, 1, 2)) * m.w
            ),
            "the squares are taken in float16, where they are inf; compute in float32.": lambda m, resid: (
                m.hook_normalized(resid / m.hook_scale(rms(m, resid))) * m.w
            ),
        },
    )
)
def check_RMSNorm(cls: Any) -> None:
    """A large epsilon shows where it stands; the input varies around a mean that is not 0."""
    cfg = replace(CFG, layer_norm_eps=0.3)
    module = construct("RMSNorm", cls, cfg, {"w": (7,)}, NORM_HOOKS)
    w, eps = weights_of(module)["w"], cfg.layer_norm_eps
    for n_batch, n_pos in [(2, 5), (1, 3)]:
        resid = noise(n_batch, n_pos, 7, seed=23) + 0.5

        def oracle(replaced: Mapping[str, Tensor], resid: Tensor = resid) -> dict[str, Tensor]:
            scale = replaced.get("hook_scale", (sum(x * x for x in resid.split(1, dim=-1)) / 7 + eps).sqrt())
            normalized = replaced.get("hook_normalized", resid / scale)
            output = normalized * w if replaced else F.rms_norm(resid, (7,), w, eps)
            return {"hook_scale": scale, "hook_normalized": normalized, "output": output}

        check_module("RMSNorm", module, (resid,), oracle, RESID, NORM_HOOKS)
    check_half_precision("RMSNorm", module, 3000 * resid, NORM_HOOKS, RESID)


def wrong_gate(neurons: Callable[[Tensor, Tensor], Tensor]) -> type:
    """A GatedMLP whose neurons are `neurons(g, h)`, of what W_gate and W_in give."""
    return with_methods(
        standins.GatedMLP,
        "GatedMLP",
        forward=lambda self, resid: neurons(resid @ self.W_gate, resid @ self.W_in) @ self.W_out,
    )


@known_mistakes(
    {
        "W_gate and W_in are swapped: the SiLU belongs to the gate.": wrong_gate(lambda g, h: F.silu(h) * g),
        "the gate is left out: that is the plain MLP.": wrong_gate(lambda g, h: F.silu(h)),
        "the gate alone goes on; multiply it by what W_in gives.": wrong_gate(lambda g, h: F.silu(g)),
        "the two are added; multiply them.": wrong_gate(lambda g, h: F.silu(g) + h),
        "the SiLU is left out.": wrong_gate(lambda g, h: g * h),
        "both go through the SiLU; only the gate does.": wrong_gate(lambda g, h: F.silu(g) * F.silu(h)),
        "the product goes through the SiLU; only the gate does.": wrong_gate(lambda g, h: F.silu(g * h)),
        "the gate goes through the sigmoid alone; the SiLU is x sigmoid(x).": wrong_gate(lambda g, h: g.sigmoid() * h),
        "the gate goes through the GELU; here it is the SiLU.": wrong_gate(lambda g, h: F.gelu(g) * h),
        "the gate goes through GPT-2's GELU; here it is the SiLU.": wrong_gate(
            lambda g, h: F.gelu(g, approximate="tanh") * h
        ),
        "the gate goes through the ReLU; here it is the SiLU.": wrong_gate(lambda g, h: F.relu(g) * h),
    },
    with_forwards(
        standins.GatedMLP,
        {
            "`resid` is added to the output; the block will do that.": lambda m, resid: (
                (F.silu(resid @ m.W_gate) * (resid @ m.W_in)) @ m.W_out + resid
            )
        },
    ),
)
def check_GatedMLP(cls: Any) -> None:
    """Against torch's linear maps and its SiLU."""
    hooks = GATED_MLP_HOOKS
    module = construct("GatedMLP", cls, CFG, mlp_parameters(CFG), hooks)
    weights = weights_of(module)
    W_gate, W_in, W_out = (weights[name].T for name in ("W_gate", "W_in", "W_out"))
    for n_batch, n_pos in [(2, 5), (1, 3)]:
        resid = noise(n_batch, n_pos, 7, seed=24)

        def oracle(replaced: Mapping[str, Tensor], resid: Tensor = resid) -> dict[str, Tensor]:
            pre = replaced.get("hook_pre", F.linear(resid, W_gate))
            linear = replaced.get("hook_pre_linear", F.linear(resid, W_in))
            post = replaced.get("hook_post", F.silu(pre) * linear)
            seen = {"hook_pre": pre, "hook_pre_linear": linear, "hook_post": post}
            return {**seen, "output": F.linear(post, W_out)}

        check_module("GatedMLP", module, (resid,), oracle, RESID, hooks)


# ------------------------------------------------------------------------------------ shared keys and values


def repeated(heads: Tensor, n_heads: int) -> Tensor:
    """Neighbours share: 0, 0, 0, 1, 1, 1."""
    return heads.repeat_interleave(n_heads // heads.shape[2], dim=2)


def tiled(heads: Tensor, n_heads: int) -> Tensor:
    """By turns: 0, 1, 0, 1, 0, 1."""
    return heads.repeat(1, 1, n_heads // heads.shape[2], 1)


def always_the(which: int) -> Callable[[Tensor, int], Tensor]:
    """One head of keys or values for all."""
    return lambda heads, n_heads: heads[:, :, [which]].expand(-1, -1, n_heads, -1)


def wrong_groups(
    keys: Callable[[Tensor, int], Tensor] = repeated,
    values: Callable[[Tensor, int], Tensor] = repeated,
    *,
    of: str = "qk",
    turn: Callable[..., Tensor] = turned,
    places: Callable[[int, int], Sequence[int]] = range,
    stored_as_is: bool = False,
    **wrong: Any,
) -> type:
    """A GroupedQueryAttention that repeats keys and values in another way, or turns other vectors."""

    def remember(module: Any, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> tuple[Tensor, Tensor, Tensor]:
        views, n_new, start = {"q": q, "k": k, "v": v}, q.shape[1], 0 if cache is None else cache.length
        positions = torch.tensor(list(places(start, start + n_new)), device=q.device)
        for letter in of:
            views[letter] = turn(views[letter], positions, module.rotary_dim, module.rotary_base)
        views["q"], views["k"] = module.hook_rot_q(views["q"]), module.hook_rot_k(views["k"])
        if cache is not None:
            stored, views["v"] = cache.append(module.layer, k if stored_as_is else views["k"], views["v"])
            views["k"] = torch.cat([stored[:, :-n_new], views["k"]], dim=1)
        n_heads = q.shape[2]
        return views["q"], keys(views["k"], n_heads), values(views["v"], n_heads)

    def forward(self: Any, resid: Tensor, cache: Any = None) -> Tensor:
        return attend(self, resid, cache, remember=remember, **wrong)

    return with_methods(standins.GroupedQueryAttention, "GroupedQueryAttention", forward=forward)


IN_TURNS = "are given to the queries by turns (0, 1, 0, 1, ...); neighbours share one (0, 0, ..., 1, 1)."


@known_mistakes(
    {
        f"keys and values {IN_TURNS}": wrong_groups(tiled, tiled),
        f"the keys {IN_TURNS}": wrong_groups(keys=tiled),
        f"the values {IN_TURNS}": wrong_groups(values=tiled),
        "all queries use the first head of keys and values; each group has its own.": wrong_groups(
            always_the(0), always_the(0)
        ),
        "all queries use the last head of keys and values; each group has its own.": wrong_groups(
            always_the(-1), always_the(-1)
        ),
        "keys and values are repeated before `hook_k` and `hook_v`, which see cfg.n_kv_heads of them.": wrong_groups(
            before_hook={letter: lambda heads: repeated(heads, CFG.n_heads) for letter in "kv"}
        ),
        "nothing is turned.": wrong_groups(of=""),
        "the values are turned too; only queries and keys are.": wrong_groups(of="qkv"),
        "the queries are turned and the keys are not.": wrong_groups(of="q"),
        "the keys are turned and the queries are not.": wrong_groups(of="k"),
        "neighbours (2 i, 2 i + 1) are turned as pairs; i goes with i + rotary_dim / 2.": wrong_groups(
            turn=partial(turned, pairs=lambda n: [(i, i + 1) for i in range(0, n, 2)])
        ),
        "`resid` is added to the output; the block will do that.": wrong_groups(adds_resid=True),
        "the scores are not divided by sqrt(d_head).": wrong_groups(divisor=1.0),
        "the future is not masked.": wrong_groups(hidden=lambda scores: torch.zeros_like(scores, dtype=torch.bool)),
        "positions are counted from 0 again; the first new one stands at `cache.length`.": wrong_groups(
            places=lambda start, end: range(end - start)
        ),
        "`cache.length` is read after `append`; read it before.": wrong_groups(
            places=lambda start, end: range(end, 2 * end - start) if start else range(end)
        ),
        "what is in the cache is not turned.": wrong_groups(stored_as_is=True),
    }
)
def check_GroupedQueryAttention(cls: Any) -> None:
    """The loop's numbers for two groups, one group, and a group for each head; two groups with a cache as well."""
    name, rotary = "GroupedQueryAttention", (CFG.rotary_dim, CFG.rotary_base)
    resid = noise(2, 5, 7, seed=61)
    for n_kv_heads in (2, 1, 6):
        cfg = replace(CFG, n_kv_heads=n_kv_heads)
        wanted = attention_hooks(cfg)
        module = construct(name, cls, cfg, attention_parameters(cfg), wanted)
        oracle = partial(by_loops.attention, weights_of(module), resid, rotary=rotary)
        with during(f"with cfg.n_kv_heads = {n_kv_heads}"):
            check_module(name, module, (resid,), oracle, RESID, wanted, replace=n_kv_heads == 2)
        if n_kv_heads == 2:
            _check_cache(cls, module)
            judge_large_scores(name, module, partial(by_loops.attention, weights_of(module), rotary=rotary))


def _check_cache(cls: type, module: Any) -> None:
    """Two positions, then four, then one, in the last layer of a model: the other layers append first."""
    name, steps = "GroupedQueryAttention with a key-value cache", [(0, 2), (2, 6), (6, 7)]
    resid = noise(2, 7, 7, seed=62)
    last = module.layer = CFG.n_layers - 1
    rotary = (CFG.rotary_dim, CFG.rotary_base)
    expected = by_loops.attention(weights_of(module), resid, rotary=rotary)["output"]
    for watched in ((), ("hook_attn_scores", "hook_pattern")):
        handles = [getattr(module, hook).add(lambda activation, hook: None) for hook in watched]
        cache = make_cache(cls, CFG, batch=2)
        with torch.no_grad(), during("with a key-value cache"):
            for start, end in steps:
                zeros = torch.zeros(2, end - start, 2, CFG.d_head)
                for layer in range(last):
                    cache.append(layer, zeros, zeros)
                actual = module(resid[:, start:end], cache)
                compare(f"{name} of length {start}", actual, expected[:, start:end], RESID)
        for handle in handles:
            handle.remove()
        own = [size for layer, size in cache.appended if layer == last]
        if own != [2, 4, 1] or len(cache.appended) != 3 * len(steps):
            raise CheckFailed(
                f"{name}: expected one append per call, for layer {last} and with the new positions only.\n"
                "  Next: call cache.append(self.layer, k, v) once, after the keys are turned."
            )
        n_stored = cache.contents[last][0].shape[2]
        if n_stored != CFG.n_kv_heads:
            raise CheckFailed(
                f"{name}: {n_stored} heads of keys went into the cache, where cfg.n_kv_heads = {CFG.n_kv_heads}.\n"
                "  Next: repeat keys and values after `append`; few of them to keep is what the groups are for."
            )


# ---------------------------------------------------------------------------------------------------------- weights

SELF = "model.layers.{}.self_attn."
MLP = "model.layers.{}.mlp."
TRANSPOSED = "the matrix for {} is taken as it is; theirs is stored [out, in], ours [in, out]."
RESHAPED = "the matrix for {} is reshaped; it is stored [out, in] and needs transposing."
BY_TURNS = "the heads' rows of {} are taken to alternate; each head has its rows one after the other."


def heads_of(view: Callable[[Tensor, TransformerConfig], Tensor], sentence: str) -> dict[str, Any]:
    """Converters that take the heads of queries, keys or values apart in this way."""
    of = partial(wrong_entries, converted_by_rows)
    tables = [
        of([f"attn.W_{letter}"], f"{SELF}{letter.lower()}_proj.weight", sentence, lambda w, cfg, _: view(w, cfg))
        for letter in "QKV"
    ]
    return {key: answer for table in tables for key, answer in table.items()}


wrong_output = partial(wrong_entries, converted_by_rows, ["attn.W_O"], f"{SELF}o_proj.weight")
wrong_gate_matrix = partial(wrong_entries, converted_by_rows, ["mlp.W_gate"], f"{MLP}gate_proj.weight")
wrong_up = partial(wrong_entries, converted_by_rows, ["mlp.W_in"], f"{MLP}up_proj.weight")
wrong_down = partial(wrong_entries, converted_by_rows, ["mlp.W_out"], f"{MLP}down_proj.weight")


def repeated_entries(letter: str) -> Callable[..., Any]:
    """A converter that repeats the keys, or the values, for their queries."""

    def convert(state_dict: dict[str, Tensor], cfg: TransformerConfig) -> dict[str, Tensor]:
        ours = converted_by_rows(state_dict, cfg)
        for layer in range(cfg.n_layers):
            heads = ours[f"blocks.{layer}.attn.W_{letter}"]
            ours[f"blocks.{layer}.attn.W_{letter}"] = heads.repeat_interleave(cfg.n_heads // len(heads), dim=0)
        return ours

    return convert


def unembedded(view: Callable[[dict[str, Tensor], TransformerConfig], Tensor]) -> Callable[..., Any]:
    """A converter that makes `unembed.W_U` in this way, where there is one."""
    return lambda state_dict, cfg: (
        converted_by_rows(state_dict, cfg) | ({} if cfg.tied else {"unembed.W_U": view(state_dict, cfg)})
    )


@known_mistakes(
    heads_of(lambda w, cfg: w.unflatten(0, (cfg.d_head, -1)).permute(1, 2, 0), BY_TURNS),
    heads_of(lambda w, cfg: w.unflatten(0, (-1, cfg.d_head)), TRANSPOSED),
    heads_of(lambda w, cfg: w.reshape(-1, cfg.d_model, cfg.d_head), RESHAPED),
    wrong_output(
        "o_proj is not transposed for {}; its columns belong to the heads.",
        lambda w, cfg, _: w.unflatten(0, (cfg.n_heads, cfg.d_head)),
    ),
    wrong_output(
        "the heads' columns of {} are taken to alternate; each head has d_head columns side by side.",
        lambda w, cfg, _: w.T.unflatten(0, (cfg.d_head, cfg.n_heads)).transpose(0, 1),
    ),
    wrong_gate_matrix(TRANSPOSED, lambda w, cfg, _: w),
    wrong_up(TRANSPOSED, lambda w, cfg, _: w),
    wrong_down(TRANSPOSED, lambda w, cfg, _: w),
    {
        "keys are repeated for their queries; `W_K` has cfg.n_kv_heads of them.": repeated_entries("K"),
        "values are repeated for their queries; `W_V` has cfg.n_kv_heads of them.": repeated_entries("V"),
        TRANSPOSED.format("`W_U`"): unembedded(lambda theirs, cfg: theirs["lm_head.weight"]),
        "the embedding's matrix is taken for `W_U`, where the unembedding has its own.": unembedded(
            lambda theirs, cfg: theirs["model.embed_tokens.weight"].T
        ),
    },
)
def check_convert_llama_weights(fn: Callable[..., Any]) -> None:
    """Every entry, put together row by row: with an unembedding of its own, and with a tied one, stored or not."""
    cfg = replace(CFG, n_layers=11, d_model=24)
    tied = replace(cfg, tied=True)
    stored = llama_state_dict(cfg)
    not_stored = {name: weight for name, weight in stored.items() if name != "lm_head.weight"}
    for config, theirs, case in (
        (cfg, stored, "with an unembedding of its own"),
        (tied, stored, "with a tied unembedding that is stored as well"),
        (tied, not_stored, "with a tied unembedding that is not stored"),
    ):
        with during(case):
            judge_converted("convert_llama_weights", fn, config, theirs, converted_by_rows(theirs, config))
