"""On to Llama: mistakes that the checks do not know, right answers in another style, and Llama's own numbers."""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import solutions.ch02_transformer as ref
from course_utils.checks import by_loops
from course_utils.checks.ch02.attending import attend
from course_utils.checks.ch02.llama import repeated
from course_utils.checks.modules import randomise
from course_utils.checks.standins.cache import ToyCache
from course_utils.checks.standins.transformer import SmallModel
from course_utils.checks.transformer_interface import transformer_hooks, transformer_parameters
from course_utils.config import TransformerConfig
from course_utils.hooks import hook_points, run_with_cache
from tests.ch02 import other_transformer as other
from tests.ch02.test_weights import layer_by_its_first_digit

MODULES = pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
SECRETS = ("einsum(", "rearrange(", "einops.repeat(")
ONLY_ON_GPU = "device="

# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = set()


def wrong(base: type, forward: Callable[..., Any]) -> type:
    """A class of the reference whose `forward` is this one."""
    return type(base.__name__, (base,), {"forward": forward})


def twice_the_scale(self: Any, resid: Any) -> Any:
    scale = self.hook_scale(2 * (resid.square().mean(-1, keepdim=True) + self.eps).sqrt())
    return self.hook_normalized(resid / scale) * self.w


def gated(post: Callable[[Any, Any], Any], read: Callable[[Any], Any] = lambda resid: resid) -> type:
    """`post(gate, linear)` gives the neurons; the gate reads `read(resid)`."""

    def forward(self: Any, resid: Any) -> Any:
        gate, linear = self.hook_pre(read(resid) @ self.W_gate), self.hook_pre_linear(resid @ self.W_in)
        return self.hook_post(post(gate, linear)) @ self.W_out

    return wrong(ref.GatedMLP, forward)


def grouped(
    turn: Callable[..., Any] = ref.apply_rotary,
    early: bool = False,
    hooked: bool = True,
    cached: bool = True,
    twice: bool = False,
    **of_attend: Any,
) -> type:
    """A GroupedQueryAttention that repeats before the cache, passes by hook points or its cache, or fills it twice."""

    def remember(self: Any, q: Any, k: Any, v: Any, cache: Any) -> Any:
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + q.shape[1])
        q, k = (turn(heads, positions, self.rotary_dim, self.rotary_base) for heads in (q, k))
        if hooked:
            q, k = self.hook_rot_q(q), self.hook_rot_k(k)
        if early:
            k, v = repeated(k, q.shape[2]), repeated(v, q.shape[2])
        if cache is not None and cached:
            for _ in range(1 + twice):
                k, v = cache.append(self.layer, k, v)
        return q, repeated(k, q.shape[2]), repeated(v, q.shape[2])

    def forward(self: Any, resid: Any, cache: Any = None) -> Any:
        return attend(self, resid, cache, remember=remember, **of_attend)

    return wrong(ref.GroupedQueryAttention, forward)


def changed(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Callable[..., Any]:
    """The right dict, then changed: `change(ours, theirs)`."""

    def convert(state_dict: Any, cfg: Any) -> Any:
        ours = ref.convert_llama_weights(state_dict, cfg)
        change(ours, state_dict)
        return ours

    return convert


def swap_queries_and_keys(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """`q_proj` becomes `W_K`, and the other way round."""
    for W_Q in [name for name in ours if name.endswith("W_Q")]:
        W_K = W_Q.replace("W_Q", "W_K")
        ours[W_Q], ours[W_K] = ours[W_K], ours[W_Q]


SURPRISES: dict[str, list[tuple[str, Any]]] = {
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
    "GroupedQueryAttention": [
        ("`hook_rot_q` saw nothing", grouped(hooked=False)),
        ("6 heads of keys went into the cache, where cfg.n_kv_heads = 2", grouped(early=True)),
        ("with a key-value cache of length 2", grouped(cached=False)),
        ("with a key-value cache", grouped(twice=True)),
        ("`hook_rot_q` (", grouped(lambda x, p, n, base: ref.apply_rotary(x, p, n, 2 * base))),
        ("what `hook_rot_q` sees", grouped(lambda x, p, n, base: ref.apply_rotary(x, p + 40, n, base))),
        ("values are wrong", grouped(reads={"V": "K"})),
    ],
    "convert_llama_weights": [
        (
            "It holds what belongs in `blocks.0.attn.W_V`",
            changed(lambda ours, theirs: ours.update({"blocks.0.attn.W_K": ours["blocks.0.attn.W_V"]})),
        ),
        ("It holds what belongs in `blocks.0.attn.W_K`", changed(swap_queries_and_keys)),
        ("has no entry `ln_final.w`", changed(lambda ours, theirs: ours.pop("ln_final.w"))),
        ("belongs in `blocks.1.", changed(lambda ours, theirs: ours.update(layer_by_its_first_digit(ours)))),
        ("does not know, `unembed.b_U`", changed(lambda ours, theirs: ours.update({"unembed.b_U": torch.zeros(13)}))),
        (
            "does not know, `unembed.W_U`",
            changed(
                lambda ours, theirs: (
                    ours.update({"unembed.W_U": theirs["lm_head.weight"].T}) if "lm_head.weight" in theirs else None
                )
            ),
        ),
        (
            "`unembed.W_U`",
            changed(lambda ours, theirs: ours.update({"unembed.W_U": theirs["model.embed_tokens.weight"]})),
        ),
        (
            "`state_dict['model.norm.weight']` in place",
            changed(lambda ours, theirs: theirs["model.norm.weight"].zero_()),
        ),
        (
            "raised KeyError with a tied unembedding that is not stored",
            lambda state_dict, cfg: (
                state_dict["lm_head.weight"] is not None and ref.convert_llama_weights(state_dict, cfg)
            ),
        ),
    ],
}

ALSO_RIGHT = {name: [getattr(other, name)] for name in SURPRISES}


# ---------------------------------------------------------------------------------- the reference, from other sides

LLAMA = TransformerConfig(
    d_vocab=31,
    n_ctx=17,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    d_model=24,
    d_head=8,
    d_mlp=40,
    normalization="RMS",
    positions="rotary",
    rotary_dim=8,
    gated=True,
    tied=True,
)


def hugging_face(cfg: TransformerConfig) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A tiny Llama of this shape in which every parameter is random: the model, tokens, its logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": cfg.d_vocab,
        "max_position_embeddings": cfg.n_ctx,
        "hidden_size": cfg.d_model,
        "head_dim": cfg.d_head,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "intermediate_size": cfg.d_mlp,
        "rms_norm_eps": cfg.layer_norm_eps,
        "rope_theta": cfg.rotary_base,
        "tie_word_embeddings": cfg.tied,
    }
    theirs = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        tokens = torch.randint(cfg.d_vocab, (2, 11), generator=generator)
        return theirs, tokens, theirs(tokens).logits


CONFIGS = pytest.mark.parametrize(
    "cfg",
    [
        LLAMA,
        replace(LLAMA, tied=False),
        replace(LLAMA, n_kv_heads=6),
        replace(LLAMA, n_kv_heads=1, layer_norm_eps=0.1),
    ],
    ids=["tied", "an unembedding of its own", "no sharing", "all share one"],
)


@CONFIGS
def test_logits_are_those_of_hugging_face(cfg: TransformerConfig) -> None:
    """The reference's, another Transformer's, those of the loops, and of the model that checks borrow."""
    theirs, tokens, logits = hugging_face(cfg)
    assert logits.std() > 0.4
    for module in (ref, other):
        ours = module.Transformer(cfg)
        ours.load_state_dict(module.convert_llama_weights(theirs.state_dict(), cfg))
        watched, _ = run_with_cache(ours, tokens)
        for actual in (ours(tokens), watched):
            torch.testing.assert_close(actual, logits, rtol=1e-4, atol=1e-4)
    weights = other.convert_llama_weights(theirs.state_dict(), cfg)
    torch.testing.assert_close(by_loops.transformer(weights, cfg, tokens)["output"], logits, rtol=1e-4, atol=1e-4)
    small = SmallModel(cfg)
    small.load_state_dict(weights)
    torch.testing.assert_close(small(tokens), logits, rtol=1e-4, atol=1e-4)


def test_gated_mlp_and_rms_norm_are_llamas() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    cfg = replace(LLAMA, d_model=32, layer_norm_eps=0.1)
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
@CONFIGS
def test_interface(module: Any, cfg: TransformerConfig) -> None:
    """The written-down interface is what the classes have, no more and no less."""
    ours = module.Transformer(cfg)
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == transformer_parameters(cfg)
    assert set(hook_points(ours)) == set(transformer_hooks(cfg))
    _, cache = run_with_cache(ours, torch.zeros(1, 3, dtype=torch.long), names="*")
    assert set(cache) == set(transformer_hooks(cfg))
    assert cache["k", 0].shape[2] == cfg.n_kv_heads
    if module is ref:
        assert list(cache) == transformer_hooks(cfg)


@MODULES
def test_a_tied_unembedding_follows_the_embedding_into_copies(module: Any) -> None:
    ours = module.Transformer(LLAMA)
    randomise(ours)
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        copied.embed.W_E.zero_()
    assert copied.unembed.W_U.eq(0).all()
    assert ours.unembed.W_U.equal(ours.embed.W_E.T)
    assert ours.unembed.W_U.abs().sum() > 0


@pytest.mark.parametrize(("module", "kind"), [(ref, ref.KVCache), (other, other.KVCache), (other, ToyCache)])
def test_cache_gives_what_the_whole_sequence_gives(module: Any, kind: Any) -> None:
    """For every split of the text in two, and token by token."""
    ours, tokens = module.Transformer(LLAMA).double(), torch.arange(22).reshape(2, 11)
    randomise(ours)
    with torch.no_grad():
        whole = ours(tokens)
        for cuts in [*([0, n, 11] for n in range(1, 11)), range(12)]:
            cache = kind(LLAMA, 2)
            steps = [ours(tokens[:, start:end], cache) for start, end in pairwise(cuts)]
            torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-5)
            assert cache.length == 11


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_kv_heads": 4}, "n_kv_heads must divide n_heads = 6, got 4"),
        ({"n_kv_heads": 0}, "n_kv_heads must divide n_heads = 6, got 0"),
        ({"n_kv_heads": True}, "n_kv_heads must divide n_heads = 6, got True"),
        ({"positions": "learned", "rotary_dim": 0}, 'n_kv_heads needs positions="rotary"'),
        ({"n_kv_heads": None}, "tied needs n_kv_heads"),
        ({"attn_only": True}, "gated is about the MLP"),
    ],
)
def test_fields_that_do_not_go_together_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^TransformerConfig: ") as caught:
        replace(LLAMA, **changes)
    assert words in str(caught.value)


def test_gpt2_does_not_need_what_is_for_llama() -> None:
    """A learner who stops before this part has a Transformer all the same; only a Llama asks for the rest."""
    source = Path(ref.__file__).read_text(encoding="utf-8")
    for symbol in ("GroupedQueryAttention", "RMSNorm", "GatedMLP", "TiedUnembed", "UnbiasedUnembed"):
        source = source.replace(f"class {symbol}(", f"class Unwritten{symbol}(")
    space: dict[str, Any] = {"__name__": "stopped_early"}
    exec(compile(source, "stopped_early.py", "exec"), space)
    gpt2 = {"positions": "learned", "rotary_dim": 0, "n_kv_heads": None, "tied": False, "gated": False}
    space["Transformer"](replace(LLAMA, **gpt2, normalization="LN"))
    with pytest.raises(NameError, match=r"GroupedQueryAttention|RMSNorm|GatedMLP|TiedUnembed"):
        space["Transformer"](LLAMA)
