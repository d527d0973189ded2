# ruff: noqa: N802 (check_RotaryAttention is named after its exercise)
"""Chapter 02, from GPT-2 to Pythia: rotary positions, parallel blocks, NeoX weights, RMSNorm and gated MLPs.

Oracles are loops that spell the definition out (`by_loops`, `neox_weights`) and torch's own functions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks import by_loops
from course_utils.checks.core import CheckFailed, compare, during, follows_input, unchanged
from course_utils.checks.gpt2_weights import check_converted
from course_utils.checks.modules import (
    Toy,
    ToyWithCache,
    check_half_precision,
    check_module,
    construct,
    make_cache,
    noise,
    wave,
    weights_of,
)
from course_utils.checks.neox_weights import converted_by_rows, neox_mistakes, neox_state_dict
from course_utils.checks.transformer_interface import (
    NORM_HOOKS,
    attention_hooks,
    attention_parameters,
    block_hooks,
    block_parameters,
)
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

Angle = Callable[[int, int], float]


# ---------------------------------------------------------------------------------------------------------- rotary


def _turned(x: Tensor, positions: Iterable[int], pairs: Iterable[tuple[int, int]], angle: Angle) -> Tensor:
    """Turn any pairs of coordinates by any angles: `angle(position, number of the pair)`."""
    out = x.clone()
    for number, (first, second) in enumerate(pairs):
        angles = torch.tensor([[angle(position, number)] for position in positions])
        a, b, cos, sin = x[..., first], x[..., second], angles.cos(), angles.sin()
        out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


def _halves(rotary_dim: int, start: int = 0) -> list[tuple[int, int]]:
    return [(start + i, start + i + rotary_dim // 2) for i in range(rotary_dim // 2)]


def _rotary_mistakes(
    x: Tensor, positions: Sequence[int], rotary_dim: int, base: float
) -> dict[str, Callable[[], Tensor]]:
    d_head, half = x.shape[-1], rotary_dim // 2
    halves = _halves(rotary_dim)
    neighbours = [(2 * i, 2 * i + 1) for i in range(half)]

    def right(p: int, i: int) -> float:
        return p / base ** (2 * i / rotary_dim)

    def turned(pairs: list[tuple[int, int]] = halves, angle: Angle = right) -> Callable[[], Tensor]:
        return lambda: _turned(x, positions, pairs, angle)

    def turn_wrongly(signs: tuple[int, int, int, int], swapped: bool = False) -> Callable[[], Tensor]:
        def build() -> Tensor:
            out = x.clone()
            for i, (first, second) in enumerate(halves):
                angles = torch.tensor([[right(p, i)] for p in positions])
                cos, sin = (angles.sin(), angles.cos()) if swapped else (angles.cos(), angles.sin())
                a, b = x[..., first], x[..., second]
                out[..., first] = signs[0] * a * cos + signs[1] * b * sin
                out[..., second] = signs[2] * a * sin + signs[3] * b * cos
            return out

        return build

    return {
        "all coordinates are turned; only the first `rotary_dim` are.": turned(
            _halves(d_head), lambda p, i: p / base ** (2 * i / d_head)
        ),
        "all coordinates are turned, with angles for `rotary_dim`.": turned(_halves(d_head)),
        "neighbours (2 i, 2 i + 1) are taken for pairs; i goes with i + rotary_dim / 2.": turned(neighbours),
        "`positions` is ignored: they are counted from 0.": lambda: _turned(x, range(len(positions)), halves, right),
        "every position is one too large: counting begins at 0.": turned(angle=lambda p, i: right(p + 1, i)),
        "the vectors are turned the other way, by minus the angle.": turned(angle=lambda p, i: -right(p, i)),
        "the exponent is i / rotary_dim; it is 2 i / rotary_dim.": turned(
            angle=lambda p, i: p / base ** (i / rotary_dim)
        ),
        "the exponent is 2 i / d_head; divide by rotary_dim.": turned(angle=lambda p, i: p / base ** (2 * i / d_head)),
        "the angles are multiplied by base^(2 i / rotary_dim); divide.": turned(
            angle=lambda p, i: p * base ** (2 * i / rotary_dim)
        ),
        "the pairs are counted from 1; the first turns by p itself.": turned(angle=lambda p, i: right(p, i + 1)),
        "`base` is ignored: the angles are those for 10000.": turned(
            angle=lambda p, i: p / 10000.0 ** (2 * i / rotary_dim)
        ),
        "all pairs turn by the same angle.": turned(angle=lambda p, i: p),
        "the last `rotary_dim` coordinates are turned; the first are.": turned(
            _halves(rotary_dim, start=d_head - rotary_dim)
        ),
        "sine and cosine are swapped.": turn_wrongly((1, -1, 1, 1), swapped=True),
        "the second of a pair is b cos - a sin; it is a sin + b cos.": turn_wrongly((1, -1, -1, 1)),
        "the first of a pair is a cos + b sin; it is a cos - b sin.": turn_wrongly((1, 1, 1, 1)),
        "only the turned coordinates are returned; put the others behind them.": lambda: turned()()[..., :rotary_dim],
        "the coordinates that are not turned are set to 0; they stay as they are.": lambda: F.pad(
            turned()()[..., :rotary_dim], (0, d_head - rotary_dim)
        ),
        "nothing is turned.": lambda: x,
    }


def check_apply_rotary(fn: Callable[..., Any]) -> None:
    """Positions with gaps, some of the coordinates; then all of them; then a single position far on."""
    for n_batch, places, rotary_dim, base in [
        (2, [2, 3, 5, 9, 14], 6, 8.0),
        (1, [0, 1, 2], 10, 10000.0),
        (2, [700], 4, 500.0),
    ]:
        x, positions = noise(n_batch, len(places), 3, 10, seed=20), torch.tensor(places)
        mistakes = _rotary_mistakes(x, places, rotary_dim, base)
        with unchanged("apply_rotary", x=x, positions=positions):
            actual = fn(x, positions, rotary_dim, base)
        expected = by_loops.rotated(x, places, rotary_dim, base)
        name = f"apply_rotary with positions {places}, rotary_dim {rotary_dim} and base {base:g}"
        compare(name, actual, expected, HEADS, mistakes, atol=1e-4, inputs={"x": x})
        follows_input("apply_rotary", fn, (x, positions, rotary_dim, base), HEADS)
    dtype = fn(x.bfloat16(), positions, rotary_dim, base).dtype
    if dtype != torch.bfloat16:
        raise CheckFailed(
            f"apply_rotary: for x in bfloat16, expected an answer in bfloat16, got {str(dtype).removeprefix('torch.')}."
            "\n  Next: bring cosine and sine to the dtype of x."
        )


def _attend(weights: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """From queries, keys and values to the output, in a few lines of einsum."""
    n_pos, d_head = q.shape[1], q.shape[-1]
    future = torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / d_head**0.5
    z = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -INF).softmax(-1), v)
    return torch.einsum("bqhd,hdm->bqm", z, weights["W_O"]) + weights["b_O"]


def _views(weights: Mapping[str, Tensor], resid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        torch.einsum("bpm,hmd->bphd", resid, weights[f"W_{letter}"]) + weights[f"b_{letter}"] for letter in "QKV"
    )
    return q, k, v


def check_RotaryAttention(cls: Any) -> None:
    """The loop's numbers, watched or not; and the same with a key-value cache that grows in three steps."""
    name, wanted = "RotaryAttention", attention_hooks(CFG)
    rotary = (CFG.rotary_dim, CFG.rotary_base)
    module = construct(name, cls, CFG, attention_parameters(CFG), wanted)
    weights = weights_of(module)
    resid = noise(2, 5, 7, seed=21)
    q, k, v = _views(weights, resid)

    def turn(x: Tensor, positions: Sequence[int] = range(5), rotary_dim: int = CFG.rotary_dim) -> Tensor:
        pairs = _halves(rotary_dim)
        return _turned(x, positions, pairs, lambda p, i: p / CFG.rotary_base ** (2 * i / rotary_dim))

    right = _attend(weights, turn(q), turn(k), v)
    mistakes = {
        "nothing is turned.": lambda: _attend(weights, q, k, v),
        "the values are turned too; only queries and keys are.": lambda: _attend(weights, turn(q), turn(k), turn(v)),
        "the queries are turned and the keys are not.": lambda: _attend(weights, turn(q), k, v),
        "the keys are turned and the queries are not.": lambda: _attend(weights, q, turn(k), v),
        "all coordinates are turned; only the first cfg.rotary_dim are.": lambda: _attend(
            weights, turn(q, rotary_dim=6), turn(k, rotary_dim=6), v
        ),
        "keys and values are turned, queries are not.": lambda: _attend(weights, q, turn(k), turn(v)),
        "the queries are turned twice, the keys once.": lambda: _attend(weights, turn(turn(q)), turn(k), v),
        "both are turned twice.": lambda: _attend(weights, turn(turn(q)), turn(turn(k)), v),
        "`resid` is added to the output; the block will do that.": lambda: right + resid,
        "`b_O` is left out.": lambda: right - weights["b_O"],
    }
    hook_mistakes = {
        f"hook_rot_{letter}": {
            "it sees the vectors before they are turned.": x,
            "positions are counted from 1; the scores do not notice, because they only know distances.": turn(
                x, range(1, 6)
            ),
        }
        for letter, x in (("q", q), ("k", k))
    } | {
        f"hook_{letter}": {f"it sees the turned vectors; those belong to `hook_rot_{letter}`.": turn(x)}
        for letter, x in (("q", q), ("k", k))
    }
    oracle = partial(by_loops.attention, weights, resid, rotary=rotary)
    check_module(name, module, (resid,), oracle, RESID, wanted, mistakes, hook_mistakes)
    alone = resid[:, :1]
    check_module(
        name,
        module,
        (alone,),
        partial(by_loops.attention, weights, alone, rotary=rotary),
        RESID,
        wanted,
        replace=False,
    )
    _check_rotary_cache(cls, module, weights, turn)


def _check_rotary_cache(cls: type, module: Any, weights: Mapping[str, Tensor], turn: Callable[..., Tensor]) -> None:
    """Two positions, then five, then one, in the last layer of a model: the other layers append first."""
    name, steps = "RotaryAttention with a key-value cache", [(0, 2), (2, 7), (7, 8)]
    resid = noise(2, 8, 7, seed=25)
    last = module.layer = CFG.n_layers - 1
    expected = by_loops.attention(weights, resid, rotary=(CFG.rotary_dim, CFG.rotary_base))["output"]
    q, k, v = _views(weights, resid)

    def at(*positions: int) -> Callable[[], Tensor]:
        return lambda: _attend(weights, turn(q, positions), turn(k, positions), v)

    whole = {
        "positions are counted from 0 again; the first new one stands at `cache.length`.": at(0, 1, 0, 1, 2, 3, 4, 0),
        "`cache.length` is read after `append`; read it before.": at(2, 3, 7, 8, 9, 10, 11, 8),
        "the new positions begin one too late.": at(0, 1, 3, 4, 5, 6, 7, 8),
        "the new positions begin one too early.": at(0, 1, 1, 2, 3, 4, 5, 6),
        "all new positions of a step are taken for the first of them.": at(0, 0, 2, 2, 2, 2, 2, 7),
        "what is in the cache is not turned.": at(0, 0, 2, 3, 4, 5, 6, 7),
    }
    for watched in ((), ("hook_attn_scores", "hook_pattern")):
        handles = [getattr(module, hook).add(lambda activation, hook: None) for hook in watched]
        cache = make_cache(cls, CFG, batch=2)
        with torch.no_grad(), during("with a key-value cache"):
            for start, end in steps:
                zeros = torch.zeros(2, end - start, 3, 6)
                for layer in range(last):
                    cache.append(layer, zeros, zeros)
                actual = module(resid[:, start:end], cache)
                mistakes = {hint: partial(_part, wrong, start, end) for hint, wrong in whole.items()}
                label = f"{name} of length {start}"
                compare(label, actual, expected[:, start:end], RESID, mistakes)
        for handle in handles:
            handle.remove()
        own = [size for layer, size in cache.appended if layer == last]
        if own != [2, 5, 1] or len(cache.appended) != 3 * len(steps):
            raise CheckFailed(
                f"{name}: expected one append per call, for layer {last} and with the new positions only.\n"
                "  Next: call cache.append(self.layer, k, v) once, after the keys are turned."
            )


def _part(wrong: Callable[[], Tensor], start: int, end: int) -> Tensor:
    return wrong()[:, start:end]


# --------------------------------------------------------------------------------------------------- parallel blocks


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

    mid = resid + attn(ln1(resid))
    mistakes = {
        "the MLP reads the stream after attention was added, as in GPT-2; here it reads what attention read.": mid
        + mlp(ln2(mid)),
        "the MLP reads what attention returns.": mid + mlp(ln2(attn(ln1(resid)))),
        "attention reads the stream after the MLP was added.": (late := resid + mlp(ln2(resid))) + attn(ln1(late)),
        "ln1 stands in front of both; the MLP has its own, ln2.": mid + mlp(ln1(resid)),
        "ln2 stands in front of both; attention has its own, ln1.": resid + attn(ln2(resid)) + mlp(ln2(resid)),
        "ln1 and ln2 are swapped.": resid + attn(ln2(resid)) + mlp(ln1(resid)),
        "ln2 reads what ln1 returns; both read the stream.": mid + mlp(ln2(ln1(resid))),
        "the MLP reads the stream itself; it should read ln2's copy.": mid + mlp(resid),
        "attention reads the stream itself; it should read ln1's copy.": resid + attn(resid) + mlp(ln2(resid)),
        "neither reads a normalised copy.": resid + attn(resid) + mlp(resid),
        "the stream is not added.": attn(ln1(resid)) + mlp(ln2(resid)),
        "the stream is added twice.": mid + resid + mlp(ln2(resid)),
        "the MLP is left out.": mid,
        "attention is left out.": resid + mlp(ln2(resid)),
    }
    check_module(name, module, (resid,), oracle, RESID, wanted, mistakes, toys=True)
    cache = make_cache(cls, CFG, batch=2)
    module(resid, cache)
    if module.attn.caches[-1] is not cache:
        raise CheckFailed(
            f"{name}: attention was not given the key-value cache.\n  Next: hand it on, as the second argument."
        )
    for cfg in (replace(CFG, positions="learned", rotary_dim=0), CFG, replace(CFG, normalization="none", act="relu")):
        wanted = block_hooks(cfg)
        module = construct(name, cls, cfg, block_parameters(cfg), wanted)
        expected = by_loops.block(weights_of(module), cfg, resid)
        label = f"{name} with its real parts"
        with during(f"with cfg.positions = {cfg.positions!r}"):
            check_module(label, module, (resid,), partial(_always, expected), RESID, wanted, replace=False)


def _always(answer: dict[str, Tensor], replaced: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return answer


# ---------------------------------------------------------------------------------------------------------- weights


def check_convert_neox_weights(fn: Callable[..., Any]) -> None:
    """Every entry, put together row by row, from a state dict with NeoX's names, new and old."""
    cfg = replace(CFG, d_model=12, d_head=4, n_layers=2)
    for unembed in ("lm_head", "embed_out"):
        theirs = neox_state_dict(cfg, unembed)
        expected = converted_by_rows(theirs, cfg)
        with during(f"where the unembedding is named {unembed}.weight"):
            check_converted(
                "convert_neox_weights", fn, cfg, theirs, expected, partial(_neox_mistakes, theirs, expected, cfg)
            )


def _neox_mistakes(
    theirs: Mapping[str, Tensor], expected: Mapping[str, Tensor], cfg: TransformerConfig, entry: str
) -> dict[str, Tensor]:
    return neox_mistakes(entry, theirs, expected, cfg)


# ------------------------------------------------------------------------------------------------- towards Llama


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

        square = resid.square().mean(-1, keepdim=True)
        centred = resid - resid.mean(-1, keepdim=True)
        mistakes = {
            "the mean is subtracted, as in LayerNorm; here it is not.": F.layer_norm(resid, (7,), w, eps=eps),
            "the mean is subtracted from the vector, but not in the root.": centred / (square + eps).sqrt() * w,
            "the vector is divided by its deviation, from which the mean is subtracted.": resid
            / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
            * w,
            "eps is added outside the root; it belongs under it.": resid / (square.sqrt() + eps) * w,
            "eps is left out, or another one is used than self.eps.": resid / square.sqrt() * w,
            "`w` is left out.": F.rms_norm(resid, (7,), eps=eps),
            "the root is missing.": resid / (square + eps) * w,
            "the squares are summed; take their mean.": resid / (7 * square + eps).sqrt() * w,
            "the squares are not taken: it is the mean of the absolute values.": resid
            / (resid.abs().mean(-1, keepdim=True) + eps)
            * w,
            "the scale is `1 + w`; it is `w`.": F.rms_norm(resid, (7,), 1 + w, eps),
            "the mean of the squares is taken over the positions; take it over d_model.": resid
            / (resid.square().mean(1, keepdim=True) + eps).sqrt()
            * w,
            "the mean of the squares is taken over the whole tensor; each position has its own.": resid
            / (resid.square().mean() + eps).sqrt()
            * w,
        }
        check_module("RMSNorm", module, (resid,), oracle, RESID, NORM_HOOKS, mistakes)
    check_half_precision("RMSNorm", module, 3000 * resid, NORM_HOOKS, torch.zeros_like(resid), RESID)


def check_GatedMLP(cls: Any) -> None:
    """Against torch's linear maps and its SiLU."""
    hooks = ("hook_pre", "hook_pre_linear", "hook_post")
    module = construct("GatedMLP", cls, CFG, {"W_gate": (7, 11), "W_in": (7, 11), "W_out": (11, 7)}, hooks)
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

        gate, linear = F.linear(resid, W_gate), F.linear(resid, W_in)

        def back(post: Tensor) -> Tensor:
            return F.linear(post, W_out)

        mistakes = {
            "W_gate and W_in are swapped: the SiLU belongs to the gate.": back(F.silu(linear) * gate),
            "the gate is left out: that is the plain MLP.": back(F.silu(linear)),
            "the gate alone goes on; multiply it by what W_in gives.": back(F.silu(gate)),
            "the two are added; multiply them.": back(F.silu(gate) + linear),
            "the SiLU is left out.": back(gate * linear),
            "both go through the SiLU; only the gate does.": back(F.silu(gate) * F.silu(linear)),
            "the product goes through the SiLU; only the gate does.": back(F.silu(gate * linear)),
            "the gate goes through the sigmoid alone; the SiLU is x sigmoid(x).": back(gate.sigmoid() * linear),
            "the gate goes through the GELU; here it is the SiLU.": back(F.gelu(gate) * linear),
            "the gate goes through GPT-2's GELU; here it is the SiLU.": back(F.gelu(gate, approximate="tanh") * linear),
            "the gate goes through the ReLU; here it is the SiLU.": back(F.relu(gate) * linear),
            "`resid` is added to the output; the block will do that.": back(F.silu(gate) * linear) + resid,
        }
        check_module("GatedMLP", module, (resid,), oracle, RESID, hooks, mistakes)
