"""Chapter 02, from GPT-2 to Pythia: its checks against mistakes that learners make, and other right answers.

Each mistake returns the right type, shape and dtype, and must be refused with its promised words. Those marked
`surprise` are absent from the check's own list of known mistakes.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import einops
import other_transformer as other
import pytest
import torch
from mistakes import Mistake, assert_known_and_unknown, assert_quick, assert_refused
from mutation import survivors
from torch.nn import functional as F

import solutions.ch02_transformer as ref
from course_utils.checks import CheckFailed, NotWritten, by_loops, find_checks, run_check
from course_utils.checks.ch02_3_variants import CFG
from course_utils.checks.modules import ToyCache, randomise
from course_utils.checks.transformer_interface import transformer_hooks, transformer_parameters
from course_utils.config import TransformerConfig
from course_utils.hooks import hook_points, run_with_cache
from solutions.ch02_transformer import apply_rotary, attention_scores, causal_mask, project_heads

CHECKS = {name: fn for name, fn in find_checks()["02"].items() if fn.__module__.endswith(".ch02_3_variants")}
MODULES = pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
MISTAKES: list[Mistake] = []


def mistake(exercise: str, words: str, answer: Any, surprise: bool = False) -> None:
    """Note a wrong answer; for exercises that are classes, a wrong `forward`."""
    original = getattr(ref, exercise)
    if isinstance(original, type):
        answer = type(exercise, (original,), {"forward": answer})
    MISTAKES.append(Mistake(exercise, words, answer, surprise))


# ------------------------------------------------------------------------------------------------------ apply_rotary


def turn(
    x: Any,
    positions: Any,
    rotary_dim: int,
    base: float,
    *,
    frequency: Callable[[Any, int, float], Any] = lambda i, n, base: base ** (-2 * i / n),
    sign: float = 1.0,
    layout: str = "pair half -> pair half",
) -> Any:
    """Rotary with switches for what people get wrong; `layout` "half" is right: pairs are (i, i + half)."""
    half = rotary_dim // 2
    angles = sign * positions[:, None, None] * frequency(torch.arange(half), rotary_dim, base)
    cos, sin = angles.cos(), angles.sin()
    turning, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if layout == "neighbours":
        a, b = turning[..., 0::2], turning[..., 1::2]
        return torch.cat([torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2), rest], -1)
    a, b = turning[..., :half], turning[..., half:]
    if layout == "split":  # reads halves, writes neighbours
        return torch.cat([torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2), rest], -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


def rotary(words: str, surprise: bool = False, **wrong: Any) -> None:
    mistake("apply_rotary", words, lambda x, p, n, base: turn(x, p, n, base, **wrong), surprise)


rotary("neighbours (2 i, 2 i + 1) are taken for pairs", layout="neighbours")
rotary("turned the other way, by minus the angle", sign=-1.0)
rotary("the exponent is i / rotary_dim", frequency=lambda i, n, base: base ** (-i / n))
rotary("the exponent is 2 i / d_head", frequency=lambda i, n, base: base ** (-2 * i / 10))
rotary("are multiplied by base^(2 i / rotary_dim)", frequency=lambda i, n, base: base ** (2 * i / n))
rotary("the pairs are counted from 1", frequency=lambda i, n, base: base ** (-2 * (i + 1) / n))
rotary("`base` is ignored", frequency=lambda i, n, base: 10000.0 ** (-2 * i / n))
rotary("all pairs turn by the same angle", frequency=lambda i, n, base: torch.ones(len(i)))
rotary("values are wrong", surprise=True, layout="split")
rotary("values are wrong", surprise=True, sign=torch.pi / 180)  # degrees
rotary("values are wrong", surprise=True, frequency=lambda i, n, base: base ** (-2 * i / n).float().round(decimals=1))
rotary("values are wrong", surprise=True, frequency=lambda i, n, base: 1 / (base * 2 * i / n).clamp(min=1))
for words, wrong_call, unforeseen in [
    ("all coordinates are turned; only the first", lambda x, p, n, b: turn(x, p, x.shape[-1], b), False),
    ("`positions` is ignored", lambda x, p, n, b: turn(x, torch.arange(len(p)), n, b), False),
    ("every position is one too large", lambda x, p, n, b: turn(x, p + 1, n, b), False),
    (
        "the last `rotary_dim` coordinates",
        lambda x, p, n, b: torch.cat([x[..., : x.shape[-1] - n], turn(x[..., x.shape[-1] - n :], p, n, b)], -1),
        False,
    ),
    ("only the turned coordinates are returned", lambda x, p, n, b: turn(x, p, n, b)[..., :n], False),
    (
        "set to 0; they stay as they are",
        lambda x, p, n, b: turn(x, p, n, b) * (torch.arange(x.shape[-1]) < n),
        False,
    ),
    ("nothing is turned", lambda x, p, n, b: x.clone(), False),
    ("one value per position", lambda x, p, n, b: turn(x, p.flip(0), n, b), True),
    ("All of the wrong values are at head=", lambda x, p, n, b: _first_heads(x, p, n, b), True),
    ("values are wrong", lambda x, p, n, b: turn(x.flip(-1), p, n, b).flip(-1), True),
    ("values are wrong", lambda x, p, n, b: turn(x, p % 8, n, b), True),
    ("it changed `x` in place", lambda x, p, n, b: x.copy_(turn(x, p, n, b)), False),
]:
    mistake("apply_rotary", words if words != "one value per position" else "are wrong", wrong_call, unforeseen)


def _first_heads(x: Any, positions: Any, rotary_dim: int, base: float) -> Any:
    return torch.cat([turn(x[:, :, :2], positions, rotary_dim, base), x[:, :, 2:]], dim=2)


# --------------------------------------------------------------------------------------------------- RotaryAttention


def attend(self: Any, resid: Any, cache: Any = None, **wrong: Any) -> Any:
    """Attention with switches for what people get wrong."""
    q = self.hook_q(project_heads(resid, self.W_Q, self.b_Q))
    k = self.hook_k(project_heads(resid, self.W_K, self.b_K))
    v = self.hook_v(project_heads(resid, self.W_V, self.b_V))
    start = 0 if cache is None or wrong.get("no_offset") else cache.length
    if wrong.get("late") and cache is not None:
        cache.append(self.layer, k, v)
        start = cache.length
    positions = torch.arange(resid.shape[1]) + start + wrong.get("shift", 0)
    if wrong.get("cached_shift") and start:
        positions = positions + wrong["cached_shift"]
    turning = wrong.get("turn", apply_rotary)

    def rotate(x: Any, name: str) -> Any:
        n_turned = wrong.get("rotary_dim", self.rotary_dim)
        return turning(x, positions, n_turned, self.rotary_base) if name in wrong.get("of", "qk") else x

    unturned_k = k
    if wrong.get("unhooked"):
        q, k = rotate(q, "q"), rotate(k, "k")
    elif wrong.get("hooks_first"):
        q, k = rotate(self.hook_rot_q(q), "q"), rotate(self.hook_rot_k(k), "k")
    else:
        q, k = self.hook_rot_q(rotate(q, "q")), self.hook_rot_k(rotate(k, "k"))
    v = rotate(v, "v")
    if cache is not None and not wrong.get("no_cache"):
        if wrong.get("cache_unturned"):
            all_k, v = cache.append(self.layer, unturned_k, v)
            k = torch.cat([all_k[:, : -k.shape[1]], k], dim=1)
        else:
            k, v = cache.append(self.layer, k, v)
    scores = self.hook_attn_scores(causal_mask(attention_scores(q, k)))
    pattern = self.hook_pattern(scores.softmax(-1))
    z = self.hook_z(einops.einsum(pattern, v, "b h query key, b key h d_head -> b query h d_head"))
    result = einops.einsum(z, self.W_O, "b p h d_head, h d_head d_model -> b p h d_model")
    if self.hook_result.is_watched:
        result = self.hook_result(result)
    return result.sum(2) + self.b_O


def attention(words: str, surprise: bool = False, **wrong: Any) -> None:
    mistake("RotaryAttention", words, lambda self, resid, cache=None: attend(self, resid, cache, **wrong), surprise)


attention("nothing is turned", of="")
attention("the values are turned too", of="qkv")
attention("the keys are not", of="q")
attention("the queries are not", of="k")
attention("keys and values are turned, queries are not", of="kv")
attention("all coordinates are turned", rotary_dim=6)
attention("positions are counted from 1; the scores do not notice", shift=1)
attention("positions are counted from 0 again", no_offset=True)
attention("the new positions begin one too late", cached_shift=1)
attention("the new positions begin one too early", cached_shift=-1)
attention("it sees the vectors before they are turned", hooks_first=True)
attention("`hook_rot_q` saw nothing", surprise=True, unhooked=True)
attention("`hook_rot_q` (`hook_v` is right)", surprise=True, turn=lambda x, p, n, base: turn(x, p, n, 2 * base))
attention(
    "`hook_rot_q` (`hook_v` is right)",
    surprise=True,
    turn=lambda x, p, n, base: turn(x, p, n, base, layout="neighbours"),
)
attention("what `hook_rot_q` sees", surprise=True, turn=lambda x, p, n, base: turn(x, p + 40, n, base))
attention("what is in the cache is not turned", cache_unturned=True)
attention("with a key-value cache of length 2", surprise=True, no_cache=True)
attention("with a key-value cache", surprise=True, late=True)
mistake(
    "RotaryAttention",
    "`resid` is added to the output",
    lambda self, resid, cache=None: attend(self, resid, cache) + resid,
)
mistake("RotaryAttention", "nothing is turned", ref.Attention.forward)


def _reads_late(self: Any, resid: Any, cache: Any = None) -> Any:
    """Looks at the cache's length after it has grown."""
    if cache is None:
        return attend(self, resid)

    class Late:
        @property
        def length(self) -> int:
            return cache.length + resid.shape[1]

        def append(self, layer: int, k: Any, v: Any) -> Any:
            return cache.append(layer, k, v)

    return attend(self, resid, Late())


mistake("RotaryAttention", "`cache.length` is read after `append`", _reads_late)


# ----------------------------------------------------------------------------------------------------- ParallelBlock


def block(words: str, parts: Callable[..., Any], surprise: bool = False) -> None:
    """`parts(self, pre, attn)` returns what attention and the MLP write, and what they are added to."""

    def forward(self: Any, resid: Any, cache: Any = None) -> Any:
        pre = self.hook_resid_pre(resid)
        attn_out, mlp_out, stream = parts(
            self,
            pre,
            lambda read: self.hook_attn_out(self.attn(read, cache)),
            lambda read: self.hook_mlp_out(self.mlp(read)),
        )
        return self.hook_resid_post(stream + attn_out + mlp_out)

    mistake("ParallelBlock", words, forward, surprise)


def _sequential(self: Any, pre: Any, attn: Any, mlp: Any) -> Any:
    attn_out = attn(self.ln1(pre))
    return attn_out, mlp(self.ln2(pre + attn_out)), pre


def _mlp_of_attention(self: Any, pre: Any, attn: Any, mlp: Any) -> Any:
    attn_out = attn(self.ln1(pre))
    return attn_out, mlp(self.ln2(attn_out)), pre


def _normed_after(self: Any, pre: Any, attn: Any, mlp: Any) -> Any:
    attn_out = attn(self.ln1(pre))
    return attn_out, mlp(self.ln2(self.ln1(pre) + attn_out)), pre


block("the MLP reads the stream after attention was added, as in GPT-2", _sequential)
block("the MLP reads what attention returns", _mlp_of_attention)
block("(`hook_attn_out` is right)", _normed_after, surprise=True)
block("ln1 stands in front of both", lambda s, pre, attn, mlp: (attn(s.ln1(pre)), mlp(s.ln1(pre)), pre))
block("ln2 stands in front of both", lambda s, pre, attn, mlp: (attn(s.ln2(pre)), mlp(s.ln2(pre)), pre))
block("ln1 and ln2 are swapped", lambda s, pre, attn, mlp: (attn(s.ln2(pre)), mlp(s.ln1(pre)), pre))
block("the MLP reads the stream itself", lambda s, pre, attn, mlp: (attn(s.ln1(pre)), mlp(pre), pre))
block("attention reads the stream itself", lambda s, pre, attn, mlp: (attn(pre), mlp(s.ln2(pre)), pre))
block("the stream is not added", lambda s, pre, attn, mlp: (attn(s.ln1(pre)), mlp(s.ln2(pre)), 0 * pre))
block("the stream is added twice", lambda s, pre, attn, mlp: (attn(s.ln1(pre)), mlp(s.ln2(pre)), 2 * pre))
block("ln2 reads what ln1 returns", lambda s, pre, attn, mlp: (attn(s.ln1(pre)), mlp(s.ln2(s.ln1(pre))), pre))
block(
    "values are wrong",
    lambda s, pre, attn, mlp: (attn(s.ln1(pre)), mlp(s.ln2(pre)), s.ln1(pre)),
    surprise=True,
)
block("values are wrong", lambda s, pre, attn, mlp: (attn(s.ln1(pre)), 2 * mlp(s.ln2(pre)), pre), surprise=True)
mistake(
    "ParallelBlock",
    "your code raised AttributeError",
    ref.TransformerBlock.forward,  # hook_resid_mid is gone
    surprise=True,
)
mistake(
    "ParallelBlock",
    "attention was not given the key-value cache",
    lambda self, resid, cache=None: ref.ParallelBlock.forward(self, resid),
)
mistake(
    "ParallelBlock",
    "`hook_mlp_out` saw nothing",
    lambda self, resid, cache=None: self.hook_resid_post(
        self.hook_resid_pre(resid) + self.hook_attn_out(self.attn(self.ln1(resid), cache)) + self.mlp(self.ln2(resid))
    ),
    surprise=True,
)


# ----------------------------------------------------------------------------------------------- convert_neox_weights


def converted(words: str, change: Callable[[dict[str, Any], dict[str, Any]], Any], surprise: bool = False) -> None:
    """The right dict, then changed: `change(ours, theirs)`. There are 3 heads of 4 columns each."""

    def convert(state_dict: Any, cfg: Any) -> Any:
        ours = ref.convert_neox_weights(state_dict, cfg)
        change(ours, state_dict)
        return ours

    mistake("convert_neox_weights", words, convert, surprise)


QKV = "gpt_neox.layers.{}.attention.query_key_value.{}"


def _as_in_gpt2(state_dict: Any, cfg: Any) -> Any:
    ours = ref.convert_neox_weights(state_dict, cfg)
    for layer in range(cfg.n_layers):
        weights = state_dict[QKV.format(layer, "weight")].chunk(3)
        biases = state_dict[QKV.format(layer, "bias")].chunk(3)
        for letter, weight, bias in zip("QKV", weights, biases, strict=True):
            ours[f"blocks.{layer}.attn.W_{letter}"] = weight.reshape(3, 4, 12).transpose(1, 2)
            ours[f"blocks.{layer}.attn.b_{letter}"] = bias.reshape(3, 4)
    return ours


mistake("convert_neox_weights", "split into all queries, all keys, all values, as in GPT-2", _as_in_gpt2)
converted(
    "split into all queries, all keys, all values, as in GPT-2",
    lambda ours, theirs: ours.update(
        {"blocks.1.attn.b_K": theirs[QKV.format(1, "bias")][12:24].reshape(3, 4)},
    ),
)
converted(
    "the heads' rows are taken to alternate",
    lambda ours, theirs: ours.update(
        {"blocks.0.attn.W_V": theirs[QKV.format(0, "weight")].reshape(3, 4, 3, 12)[2].permute(1, 2, 0)}
    ),
)
converted(
    "their matrix is reshaped",
    lambda ours, theirs: ours.update(
        {"blocks.0.attn.W_Q": theirs[QKV.format(0, "weight")].reshape(3, 3, 4, 12)[:, 0].reshape(3, 12, 4)}
    ),
)
converted(
    "it holds what belongs into `blocks.0.attn.W_K`",
    lambda ours, theirs: ours.update({"blocks.0.attn.W_V": ours["blocks.0.attn.W_K"]}),
)
converted(
    "dense is not transposed",
    lambda ours, theirs: ours.update(
        {"blocks.1.attn.W_O": theirs["gpt_neox.layers.1.attention.dense.weight"].reshape(3, 4, 12)}
    ),
)
converted(
    "their matrix is taken as it is",
    lambda ours, theirs: ours.update(
        {"blocks.0.mlp.W_in": theirs["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"].clone()}
    ),
)
converted(
    "the token embeddings are used", lambda ours, theirs: ours.update({"unembed.W_U": ours["embed.W_E"].T.clone()})
)
converted("has no entry `unembed.b_U`", lambda ours, theirs: ours.__delitem__("unembed.b_U"))
converted(
    "does not know, `pos_embed.W_pos`",
    lambda ours, theirs: ours.update({"pos_embed.W_pos": torch.zeros(9, 12)}),
)
converted(
    "`blocks.0.attn.b_Q`: ",
    lambda ours, theirs: ours.update({"blocks.0.attn.b_Q": ours["blocks.0.attn.b_Q"].flip(0)}),
    surprise=True,
)
converted("`unembed.b_U`: 13 of 13", lambda ours, theirs: ours.update({"unembed.b_U": torch.ones(13)}), surprise=True)
converted("`gpt_neox.embed_in.weight` in place", lambda ours, theirs: theirs["gpt_neox.embed_in.weight"].zero_())
mistake(
    "convert_neox_weights",
    "raised KeyError where the unembedding is named embed_out.weight",
    lambda state_dict, cfg: state_dict["lm_head.weight"] is not None and ref.convert_neox_weights(state_dict, cfg),
    surprise=True,
)


# ----------------------------------------------------------------------------------------------- RMSNorm and GatedMLP


def rms(words: str, answer: Callable[..., Any] | None = None, surprise: bool = False, **wrong: Any) -> None:
    def forward(self: Any, resid: Any) -> Any:
        square = resid.square().mean(wrong.get("axis", -1), keepdim=True)
        scale = (square + wrong.get("eps", self.eps)).sqrt() if not wrong.get("outside") else square.sqrt() + self.eps
        scale = self.hook_scale(scale * wrong.get("factor", 1.0)) if scale.shape[-1] == 1 else scale
        centred = resid - resid.mean(-1, keepdim=True) if wrong.get("centred") else resid
        return self.hook_normalized(centred / scale) * (self.w if wrong.get("w", True) else 1)

    mistake("RMSNorm", words, answer or forward, surprise)


rms("the mean is subtracted, as in LayerNorm", lambda self, x: F.layer_norm(x, (7,), self.w, eps=self.eps))
rms("the mean is subtracted from the vector, but not in the root", centred=True)
rms("eps is added outside the root", outside=True)
rms("eps is left out", eps=0.0)
rms("another one is used than self.eps", eps=1e-6)
rms("`w` is left out", w=False)
rms("the squares are summed", lambda self, x: x / (x.square().sum(-1, keepdim=True) + self.eps).sqrt() * self.w)
rms("the root is missing", lambda self, x: x / (x.square().mean(-1, keepdim=True) + self.eps) * self.w)
rms("the scale is `1 + w`", lambda self, x: F.rms_norm(x, (7,), 1 + self.w, self.eps))
rms("taken over the positions", lambda self, x: x / (x.square().mean(1, keepdim=True) + self.eps).sqrt() * self.w)
rms("Every value is 0.5 times the right one", factor=2.0, surprise=True)
rms("values are wrong", lambda self, x: F.rms_norm(x, (7,), self.w, self.eps) + self.w, surprise=True)
rms("values are wrong", lambda self, x: F.normalize(x, dim=-1) * self.w, surprise=True)
rms("the squares are taken in float16, where they are inf")
rms("`hook_scale` saw nothing", lambda self, x: F.rms_norm(x, (7,), self.w, self.eps), surprise=True)


def gated(words: str, post: Callable[[Any, Any], Any], surprise: bool = False, residual: bool = False) -> None:
    """`post(gate, linear)` gives the neurons."""

    def forward(self: Any, resid: Any) -> Any:
        gate, linear = self.hook_pre(resid @ self.W_gate), self.hook_pre_linear(resid @ self.W_in)
        return self.hook_post(post(gate, linear)) @ self.W_out + (resid if residual else 0)

    mistake("GatedMLP", words, forward, surprise)


gated("W_gate and W_in are swapped", lambda gate, linear: F.silu(linear) * gate)
gated("the gate is left out", lambda gate, linear: F.silu(linear))
gated("the gate alone goes on", lambda gate, linear: F.silu(gate))
gated("the two are added", lambda gate, linear: F.silu(gate) + linear)
gated("the SiLU is left out", lambda gate, linear: gate * linear)
gated("both go through the SiLU", lambda gate, linear: F.silu(gate) * F.silu(linear))
gated("through the sigmoid alone", lambda gate, linear: gate.sigmoid() * linear)
gated("through the GELU; here", lambda gate, linear: F.gelu(gate) * linear)
gated("through GPT-2's GELU", lambda gate, linear: ref.gelu_new(gate) * linear)
gated("through the ReLU", lambda gate, linear: F.relu(gate) * linear)
gated("`resid` is added to the output", lambda gate, linear: F.silu(gate) * linear, residual=True)
gated("(`hook_pre_linear` is right)", lambda gate, linear: torch.tanh(gate) * linear, surprise=True)
gated("(`hook_pre_linear` is right)", lambda gate, linear: F.silu(gate) * linear.abs(), surprise=True)
mistake(
    "GatedMLP",
    "the first wrong tensor is at `hook_pre`",
    lambda self, resid: (
        self.hook_post(
            F.silu(self.hook_pre(F.layer_norm(resid, (7,)) @ self.W_gate)) * self.hook_pre_linear(resid @ self.W_in)
        )
        @ self.W_out
    ),
    surprise=True,
)


# --------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("mistake", [pytest.param(m, id=f"{m.exercise}: {m.words[:50]}") for m in MISTAKES])
def test_mistake_is_refused_with_its_words(mistake: Mistake) -> None:
    assert_refused(
        CHECKS[mistake.exercise],
        mistake,
        secrets=("einsum(", "torch.cat(", ".chunk(", "rearrange("),
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
    assert_quick(CHECKS[exercise], getattr(other, exercise), seconds=0.5)


def test_a_block_that_keeps_the_middle_hook_is_refused() -> None:
    class ParallelBlock(ref.TransformerBlock):
        forward = ref.ParallelBlock.forward

    with pytest.raises(CheckFailed, match="there is no stream between attention and MLP"):
        run_check(CHECKS["ParallelBlock"], ParallelBlock)


# ---------------------------------------------------------------------------------- the reference, from other sides

PYTHIA = TransformerConfig(
    d_vocab=31,
    n_ctx=17,
    n_layers=3,
    n_heads=4,
    d_model=32,
    d_head=8,
    d_mlp=40,
    act="gelu",
    positions="rotary",
    rotary_dim=2,
    parallel=True,
)


def hugging_face(**changes: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A tiny GPT-NeoX in which every parameter is random: the model, tokens, its logits."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 31,
        "max_position_embeddings": 17,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "rotary_pct": 0.25,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    theirs = GPTNeoXForCausalLM(GPTNeoXConfig(**(settings | changes))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        tokens = torch.randint(31, (2, 11), generator=generator)
        return theirs, tokens, theirs(tokens).logits


@pytest.mark.parametrize(
    ("cfg", "changes"),
    [
        (PYTHIA, {}),
        (replace(PYTHIA, parallel=False), {"use_parallel_residual": False}),
        (replace(PYTHIA, n_heads=2, d_head=16, rotary_dim=8), {"num_attention_heads": 2, "rotary_pct": 0.5}),
        (replace(PYTHIA, rotary_dim=8, rotary_base=300.0), {"rotary_pct": 1.0, "rotary_emb_base": 300}),
    ],
    ids=["a quarter turns", "one after the other", "half turns", "all turns, another base"],
)
def test_logits_are_those_of_hugging_face(cfg: TransformerConfig, changes: dict[str, Any]) -> None:
    """The reference's, another Transformer's, and those of the loops with which answers are compared."""
    theirs, tokens, logits = hugging_face(**changes)
    assert logits.std() > 0.5
    for module in (ref, other):
        ours = module.Transformer(cfg)
        ours.load_state_dict(module.convert_neox_weights(theirs.state_dict(), cfg))
        torch.testing.assert_close(ours(tokens), logits, rtol=1e-4, atol=1e-4)
    weights = other.convert_neox_weights(theirs.state_dict(), cfg)
    torch.testing.assert_close(by_loops.transformer(weights, cfg, tokens)["output"], logits, rtol=1e-4, atol=1e-4)


def test_gated_mlp_and_rms_norm_are_llamas() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    cfg = replace(PYTHIA, layer_norm_eps=0.1)
    llama = LlamaConfig(hidden_size=32, intermediate_size=40, num_attention_heads=4, num_hidden_layers=1, vocab_size=31)
    theirs, their_norm = LlamaMLP(llama), LlamaRMSNorm(32, eps=0.1)
    resid = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        their_norm.weight.normal_()
        for module in (ref, other):
            mlp, norm = module.GatedMLP(cfg), module.RMSNorm(cfg)
            mlp.W_gate.copy_(theirs.gate_proj.weight.T)
            mlp.W_in.copy_(theirs.up_proj.weight.T)
            mlp.W_out.copy_(theirs.down_proj.weight.T)
            norm.w.copy_(their_norm.weight)
            torch.testing.assert_close(mlp(resid), theirs(resid), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(norm(resid), their_norm(resid), rtol=1e-4, atol=1e-5)


@MODULES
@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("parallel", [False, True])
def test_interface(module: Any, positions: Any, parallel: bool) -> None:
    """The written-down interface is what the classes have, no more and no less."""
    cfg = replace(CFG, positions=positions, rotary_dim=4 * (positions == "rotary"), parallel=parallel)
    ours = module.Transformer(cfg)
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == transformer_parameters(cfg)
    assert set(hook_points(ours)) == set(transformer_hooks(cfg))
    _, cache = run_with_cache(ours, torch.zeros(1, 3, dtype=torch.long), names="*")
    assert set(cache) == set(transformer_hooks(cfg))
    if module is ref:
        assert list(cache) == transformer_hooks(cfg)


@MODULES
def test_fused_and_explicit_attention_agree(module: Any) -> None:
    ours = module.Transformer(PYTHIA)
    randomise(ours)
    tokens = torch.arange(22).reshape(2, 11)
    watched, _ = run_with_cache(ours, tokens)
    torch.testing.assert_close(ours(tokens), watched, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("module", "kind"), [(ref, ref.KVCache), (other, ref.KVCache), (other, ToyCache)])
def test_cache_gives_what_the_whole_sequence_gives(module: Any, kind: Any) -> None:
    """For every split of the text in two, and token by token."""
    ours, tokens = module.Transformer(PYTHIA).double(), torch.arange(22).reshape(2, 11)
    randomise(ours)
    with torch.no_grad():
        whole = ours(tokens)
        for cuts in [*([0, n, 11] for n in range(1, 11)), range(12)]:
            cache = kind(PYTHIA, 2)
            steps = [ours(tokens[:, start:end], cache) for start, end in pairwise(cuts)]
            torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-5)
            assert cache.length == 11


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 2, 8, generator=generator).expand(1, 9, 2, 8) for _ in range(2))
    near, far = torch.arange(9), torch.arange(9) + 500
    scores = [
        attention_scores(apply_rotary(q, positions, 6, 1000.0), apply_rotary(k, positions, 6, 1000.0))
        for positions in (near, far)
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)
    for distance in range(-8, 9):
        diagonal = scores[0][0, 0].diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert scores[0][0, 0].std() > 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rotary_dim": 0}, "rotary_dim must be even, above 0 and at most d_head = 8, got 0"),
        ({"rotary_dim": 3}, "rotary_dim must be even"),
        ({"rotary_dim": 10}, "rotary_dim must be even"),
        ({"rotary_base": 0.0}, "rotary_base must be positive"),
        ({"positions": "learned"}, 'rotary_dim 2 needs positions="rotary"'),
        ({"attn_only": True}, "parallel is about attention and MLP"),
    ],
)
def test_fields_that_do_not_go_together_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^TransformerConfig: ") as caught:
        replace(PYTHIA, **changes)
    assert words in str(caught.value)


def test_gpt2_does_not_need_what_is_for_pythia() -> None:
    """A learner who stops before this part has a Transformer all the same; only a Pythia asks for the rest."""
    source = Path(ref.__file__).read_text(encoding="utf-8")
    for symbol, step in {"RotaryAttention": "", "ParallelBlock": "", "apply_rotary": ""}.items():
        source = source.replace(f"class {symbol}(", f"class Unwritten{symbol}(").replace(
            f"def {symbol}(", f"def unwritten_{symbol}({step}"
        )
    space: dict[str, Any] = {"__name__": "stopped_early"}
    exec(compile(source, "stopped_early.py", "exec"), space)
    space["Transformer"](replace(PYTHIA, positions="learned", rotary_dim=0, parallel=False))
    with pytest.raises(NameError, match=r"RotaryAttention|ParallelBlock"):
        space["Transformer"](PYTHIA)


# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "-1 -> 1",  # of two axes, the last
    "dim=-1",
    "True -> False",  # zip(strict=True) of equal lengths
    "zip('QKV', weights, biases, strict=True) -> zip('QKV', weights, biases)",
}


@pytest.mark.slow
@pytest.mark.parametrize("exercise", CHECKS)
def test_small_changes_of_the_reference_are_refused(exercise: str) -> None:
    """One operator, number, comparison or argument at a time. Only what needs a GPU to be seen is let off."""
    assert (
        survivors(
            Path(ref.__file__), exercise, CHECKS[exercise], only_on_gpu="device=", refusals=(CheckFailed, NotWritten)
        )
        <= STILL_RIGHT
    )
