"""From GPT-2 to Pythia: mistakes that the checks do not know, right answers in another style, and NeoX's numbers."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import solutions.ch02_transformer as ref
from course_utils.checks import by_loops
from course_utils.checks.ch02.attending import attend
from course_utils.checks.ch02.variants import CFG, turned, turning
from course_utils.checks.modules import randomise
from course_utils.checks.standins.cache import ToyCache
from course_utils.checks.transformer_interface import transformer_hooks, transformer_parameters
from course_utils.config import TransformerConfig
from course_utils.hooks import hook_points, run_with_cache
from solutions.ch02_transformer import apply_rotary, attention_scores
from tests.ch02 import other_transformer as other
from tests.ch02.test_weights import layer_by_its_first_digit

MODULES = pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
SECRETS = ("einsum(", "torch.cat(", ".chunk(", "rearrange(")
ONLY_ON_GPU = "device="

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "True -> False",  # zip(strict=True) of equal lengths
    "zip('QKV', weights, biases, strict=True) -> zip('QKV', weights, biases)",
}


def wrong(base: type, forward: Callable[..., Any]) -> type:
    """A class of the reference whose `forward` is this one."""
    return type(base.__name__, (base,), {"forward": forward})


def written_to_neighbours(x: Any, positions: Any, rotary_dim: int, base: float) -> Any:
    """Reads halves, writes neighbours."""
    right = apply_rotary(x, positions, rotary_dim, base)
    pairs = right[..., :rotary_dim].unflatten(-1, (2, -1)).mT.flatten(-2)
    return torch.cat([pairs, right[..., rotary_dim:]], dim=-1)


def in_float32(x: Any, positions: Any, rotary_dim: int, base: float) -> Any:
    """As many libraries do it, whatever the dtype of `x` is."""
    return apply_rotary(x.float(), positions, rotary_dim, base).to(x.dtype)


def first_heads(x: Any, positions: Any, rotary_dim: int, base: float) -> Any:
    return torch.cat([apply_rotary(x[:, :, :2], positions, rotary_dim, base), x[:, :, 2:]], dim=2)


def attention(
    turn: Callable[..., Any] = apply_rotary, hooked: bool = True, cached: bool = True, twice: bool = False
) -> type:
    """A RotaryAttention that turns in another way, passes by its hook points or its cache, or fills it twice."""

    def remember(self: Any, q: Any, k: Any, v: Any, cache: Any) -> Any:
        if cache is not None and twice:
            cache.append(self.layer, k, v)
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + q.shape[1])
        q, k = (turn(heads, positions, self.rotary_dim, self.rotary_base) for heads in (q, k))
        if hooked:
            q, k = self.hook_rot_q(q), self.hook_rot_k(k)
        return (q, *cache.append(self.layer, k, v)) if cache is not None and cached else (q, k, v)

    return wrong(ref.RotaryAttention, lambda self, resid, cache=None: attend(self, resid, cache, remember=remember))


def block(parts: Callable[..., Any]) -> type:
    """`parts(self, pre, attn, mlp)` returns what attention and the MLP write, and what they are added to."""

    def forward(self: Any, resid: Any, cache: Any = None) -> Any:
        pre = self.hook_resid_pre(resid)
        attn_out, mlp_out, stream = parts(
            self,
            pre,
            lambda read: self.hook_attn_out(self.attn(read, cache)),
            lambda read: self.hook_mlp_out(self.mlp(read)),
        )
        return self.hook_resid_post(stream + attn_out + mlp_out)

    return wrong(ref.ParallelBlock, forward)


def normed_after(self: Any, pre: Any, attn: Any, mlp: Any) -> Any:
    attn_out = attn(self.ln1(pre))
    return attn_out, mlp(self.ln2(self.ln1(pre) + attn_out)), pre


def mlp_unhooked(self: Any, resid: Any, cache: Any = None) -> Any:
    attn_out = self.hook_attn_out(self.attn(self.ln1(self.hook_resid_pre(resid)), cache))
    return self.hook_resid_post(resid + attn_out + self.mlp(self.ln2(resid)))


class MiddleHook(ref.TransformerBlock):
    """A parallel block that keeps `hook_resid_mid`."""

    forward = ref.ParallelBlock.forward


def changed(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Callable[..., Any]:
    """The right dict, then changed: `change(ours, theirs)`."""

    def convert(state_dict: Any, cfg: Any) -> Any:
        ours = ref.convert_neox_weights(state_dict, cfg)
        change(ours, state_dict)
        return ours

    return convert


def twice_the_scale(self: Any, resid: Any) -> Any:
    scale = self.hook_scale(2 * (resid.square().mean(-1, keepdim=True) + self.eps).sqrt())
    return self.hook_normalized(resid / scale) * self.w


def gated(post: Callable[[Any, Any], Any], read: Callable[[Any], Any] = lambda resid: resid) -> type:
    """`post(gate, linear)` gives the neurons; the gate reads `read(resid)`."""

    def forward(self: Any, resid: Any) -> Any:
        gate, linear = self.hook_pre(read(resid) @ self.W_gate), self.hook_pre_linear(resid @ self.W_in)
        return self.hook_post(post(gate, linear)) @ self.W_out

    return wrong(ref.GatedMLP, forward)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "apply_rotary": [
        ("values are wrong", written_to_neighbours),
        ("values are wrong", lambda x, p, n, base: turned(x, p * torch.pi / 180, n, base)),  # degrees
        # with the first base that is tried, 8: frequencies that are rounded, and 1 / (8 * 2 i / n)
        ("values are wrong", turning(exponent=lambda i, n: -math.log(round(8 ** (-2 * i / n), 1), 8))),
        ("values are wrong", turning(exponent=lambda i, n: math.log(max(8 * 2 * i / n, 1), 8))),
        ("are wrong", lambda x, p, n, base: apply_rotary(x, p.flip(0), n, base)),
        ("All of the wrong values are at head=", first_heads),
        ("in float64: it computes with fewer digits", in_float32),
        ("values are wrong", lambda x, p, n, base: apply_rotary(x.flip(-1), p, n, base).flip(-1)),
        ("values are wrong", lambda x, p, n, base: apply_rotary(x, p % 8, n, base)),
        ("it changed `x` in place", lambda x, p, n, base: x.copy_(apply_rotary(x, p, n, base))),
    ],
    "RotaryAttention": [
        ("`hook_rot_q` saw nothing", attention(hooked=False)),
        ("`hook_rot_q` (`hook_v` is right)", attention(lambda x, p, n, base: apply_rotary(x, p, n, 2 * base))),
        ("`hook_rot_q` (`hook_v` is right)", attention(partial(turned, pairs=lambda n: [(0, 1), (2, 3)]))),
        ("what `hook_rot_q` sees", attention(lambda x, p, n, base: apply_rotary(x, p + 40, n, base))),
        ("with a key-value cache of length 2", attention(cached=False)),
        ("with a key-value cache", attention(twice=True)),
    ],
    "ParallelBlock": [
        ("(`hook_attn_out` is right)", block(normed_after)),
        (
            "values are wrong",
            block(lambda s, pre, attn, mlp: (attn(s.ln1(pre)), mlp(s.ln2(pre)), s.ln1(pre))),
        ),
        ("values are wrong", block(lambda s, pre, attn, mlp: (attn(s.ln1(pre)), 2 * mlp(s.ln2(pre)), pre))),
        (
            "your code raised AttributeError",  # hook_resid_mid is gone
            wrong(ref.ParallelBlock, ref.TransformerBlock.forward),
        ),
        (
            "attention was not given the key-value cache",
            wrong(ref.ParallelBlock, lambda self, resid, cache=None: ref.ParallelBlock.forward(self, resid)),
        ),
        ("`hook_mlp_out` saw nothing", wrong(ref.ParallelBlock, mlp_unhooked)),
        ("there is no stream between attention and MLP", MiddleHook),
    ],
    "convert_neox_weights": [
        (
            "It holds what belongs in `blocks.0.attn.W_K`",
            changed(lambda ours, theirs: ours.update({"blocks.0.attn.W_V": ours["blocks.0.attn.W_K"]})),
        ),
        ("has no entry `unembed.b_U`", changed(lambda ours, theirs: ours.pop("unembed.b_U"))),
        ("belongs in `blocks.1.", changed(lambda ours, theirs: ours.update(layer_by_its_first_digit(ours)))),
        (
            "does not know, `pos_embed.W_pos`",
            changed(lambda ours, theirs: ours.update({"pos_embed.W_pos": torch.zeros(9, 12)})),
        ),
        (
            "`blocks.0.attn.b_Q`: ",
            changed(lambda ours, theirs: ours.update({"blocks.0.attn.b_Q": ours["blocks.0.attn.b_Q"].flip(0)})),
        ),
        (
            "`blocks.1.attn.b_K`: ",  # right in the first layer
            changed(
                lambda ours, theirs: ours.update(
                    {
                        "blocks.1.attn.b_K": theirs["gpt_neox.layers.1.attention.query_key_value.bias"][12:24].reshape(
                            3, 4
                        )
                    }
                )
            ),
        ),
        ("`unembed.b_U`: 13 of 13", changed(lambda ours, theirs: ours.update({"unembed.b_U": torch.ones(13)}))),
        (
            "`state_dict['gpt_neox.embed_in.weight']` in place",
            changed(lambda ours, theirs: theirs["gpt_neox.embed_in.weight"].zero_()),
        ),
        (
            "raised KeyError where the unembedding is named embed_out.weight",
            lambda state_dict, cfg: (
                state_dict["lm_head.weight"] is not None and ref.convert_neox_weights(state_dict, cfg)
            ),
        ),
    ],
    "RMSNorm": [
        ("Every value is 0.5 times the right one", wrong(ref.RMSNorm, twice_the_scale)),
        ("values are wrong", wrong(ref.RMSNorm, lambda self, x: F.rms_norm(x, (7,), self.w, self.eps) + self.w)),
        ("values are wrong", wrong(ref.RMSNorm, lambda self, x: F.normalize(x, dim=-1) * self.w)),
        ("`hook_scale` saw nothing", wrong(ref.RMSNorm, lambda self, x: F.rms_norm(x, (7,), self.w, self.eps))),
    ],
    "GatedMLP": [
        ("(`hook_pre_linear` is right)", gated(lambda gate, linear: torch.tanh(gate) * linear)),
        ("(`hook_pre_linear` is right)", gated(lambda gate, linear: F.silu(gate) * linear.abs())),
        (
            "the first wrong tensor is at `hook_pre`",
            gated(lambda gate, linear: F.silu(gate) * linear, read=lambda resid: F.layer_norm(resid, (7,))),
        ),
    ],
}

ALSO_RIGHT = {name: [getattr(other, name)] for name in SURPRISES}


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
