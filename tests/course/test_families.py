"""Every function of chapters 04 and 05 on every kind of model: an identity that holds, or a refusal by name.

The kinds are those that `TransformerConfig` can describe; a Llama also as `ungrouped` gives it.
"""

import copy
import inspect
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from course_utils.checks.ch05.path_loops import Prompts
from course_utils.config import TransformerConfig
from course_utils.families import ungrouped
from course_utils.hooks import ActivationCache, hook_points, run_with_cache
from solutions import ch02_transformer as ch02
from solutions import ch04_induction as ch04
from solutions import ch05_patching as ch05

SIZES: dict[str, Any] = {"d_vocab": 11, "n_ctx": 9, "n_layers": 2, "n_heads": 4, "d_model": 12, "d_head": 6}
ROTARY: dict[str, Any] = {"positions": "rotary", "rotary_dim": 4}
LLAMA: dict[str, Any] = {"normalization": "RMS", "gated": True, "n_kv_heads": 2, **ROTARY}
KINDS: dict[str, dict[str, Any]] = {
    "GPT-2": {"d_mlp": 16},
    "Pythia": {"d_mlp": 16, "parallel": True, **ROTARY},
    "attention only": {"attn_only": True},
    "no norm": {"attn_only": True, "normalization": "none"},
    "rotary, no norm": {"d_mlp": 16, "normalization": "none", **ROTARY},
    "RMSNorm": {"d_mlp": 16, "normalization": "RMS"},
    "LayerNorm and shared keys": {"d_mlp": 16, "n_kv_heads": 2, **ROTARY},
    "attention only, Llama": {"attn_only": True, **LLAMA, "gated": False},
    "Llama": {"d_mlp": 16, **LLAMA, "tied": True},
    "Llama, no sharing": {"d_mlp": 16, **LLAMA, "n_kv_heads": 4},
    "Llama, ungrouped": {"d_mlp": 16, **LLAMA, "tied": True},
}
OF_GATES = {"run_with_own_inputs", "run_with_edges", "edge_attribution"}
OF_HEADS = {
    "ov_circuit", "qk_circuit", "read_by", "composition_scores", "random_composition_baseline", "decompose_qk",
    "bigram_logits", "name_copying_scores", "patch_head_inputs", "refuse_unknown", *OF_GATES,
}  # fmt: skip
REFUSED = {
    "Pythia": {"position_pattern"},
    "rotary, no norm": {"position_pattern"},
    "LayerNorm and shared keys": OF_HEADS | {"position_pattern", "fold_layer_norm"},
    "attention only, Llama": OF_HEADS | {"position_pattern"},
    "Llama": OF_HEADS | {"position_pattern"},
    "Llama, no sharing": OF_HEADS | {"position_pattern"},
    "Llama, ungrouped": OF_GATES | {"position_pattern"},
}
NOT_ABOUT_MODELS = {
    "MyHookPoint", "my_run_with_hooks", "my_run_with_cache", "repeated_tokens", "per_token_losses", "top_predictions",
    "FactoredMatrix", "skip_trigrams", "copying_score", "top1_accuracy", "composition_score", "random_rotation",
    "logit_difference", "normalised_metric", "head_roles",
}  # fmt: skip
N_HALF = 3
LAST = "blocks.1.hook_resid_post"


class Setting:
    """A random model of one kind, two texts for it, and what it does with them."""

    def __init__(self, kind: str) -> None:
        tokens = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1))
        self.dataset = Prompts(tokens, torch.tensor([2, 9, 4]), torch.tensor([5, 0, 7]))
        self.dataset.positions["END"] = torch.full((3,), 6)
        self.tokens, self.other = self.dataset.tokens, self.dataset.flipped("names").tokens
        self.cfg = TransformerConfig(**SIZES, **KINDS[kind])
        model = ch02.Transformer(self.cfg)
        generator = torch.Generator().manual_seed(3)
        for parameter in model.requires_grad_(False).parameters():
            parameter.normal_(0, 0.3, generator=generator)
        self.model = (ungrouped(model) if kind == "Llama, ungrouped" else model).double().requires_grad_(False)
        self.cfg = self.model.cfg
        self.logits, self.cache = run_with_cache(self.model, self.tokens, names="*")
        self.other_logits, self.source = run_with_cache(self.model, self.other, names="*")
        self.rows = torch.arange(len(self.tokens))
        self.means = {f"blocks.{layer}.attn.hook_z": self.source["z", layer] for layer in range(2)}
        self.directions = self.W_U[:, self.dataset.io].T - self.W_U[:, self.dataset.s].T

    @property
    def W_U(self) -> Tensor:  # noqa: N802
        return self.model.unembed.W_U

    @property
    def b_U(self) -> Tensor:  # noqa: N802
        return getattr(self.model.unembed, "b_U", torch.zeros(self.cfg.d_vocab))

    def metric(self, logits: Tensor) -> Tensor:
        return ch05.logit_difference(logits, self.dataset)

    def mean(self, logits: Tensor) -> Tensor:
        return self.metric(logits).mean()

    def everywhere(self, table: Tensor, logits: Tensor | None = None) -> None:
        """The table holds one number: the metric of these logits, or of the run as it is."""
        same(table, self.mean(self.logits if logits is None else logits).expand_as(table))

    def scores(self, offset: int, last: int | None = None) -> Tensor:
        """The mean of a diagonal of all patterns, head by head."""
        out = torch.zeros(2, 4, dtype=torch.float64)
        for layer in range(2):
            for head in range(4):
                pattern = self.cache["pattern", layer][:, head]
                found = [pattern[:, query, query - offset] for query in range(max(offset, 0), pattern.shape[1])]
                out[layer, head] = torch.stack(found[-last:] if last else found).mean()
        return out

    def turned(self, letter: str, layer: int) -> Tensor:
        """The queries or keys from which the scores came, one for each head of the queries."""
        vectors = self.cache[f"rot_{letter}" if self.cfg.positions == "rotary" else letter, layer]
        return vectors.repeat_interleave(4 // vectors.shape[2], dim=2)


@cache
def setting_of(kind: str) -> Setting:
    return Setting(kind)


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


HOLDS: dict[str, Callable[[Setting], None]] = {}


def holds(check: Callable[[Setting], None]) -> Callable[[Setting], None]:
    """Note what holds for the function of that name."""
    HOLDS[check.__name__] = check
    return check


# -------------------------------------------------------------------------------------------------- chapter 04, looking


@holds
def current_token_scores(s: Setting) -> None:
    same(ch04.current_token_scores(s.cache), s.scores(0))


@holds
def previous_token_scores(s: Setting) -> None:
    same(ch04.previous_token_scores(s.cache), s.scores(1))


@holds
def first_token_scores(s: Setting) -> None:
    same(ch04.first_token_scores(s.cache), s.cache.stack("pattern")[..., 0].mean((1, 3)))


@holds
def induction_scores(s: Setting) -> None:
    same(ch04.induction_scores(s.cache, N_HALF), s.scores(N_HALF - 1, N_HALF))


@holds
def duplicate_token_scores(s: Setting) -> None:
    same(ch04.duplicate_token_scores(s.cache, N_HALF), s.scores(N_HALF, N_HALF))


@holds
def induction_scores_by_hook(s: Setting) -> None:
    same(ch04.induction_scores_by_hook(s.model, s.tokens, N_HALF), s.scores(N_HALF - 1, N_HALF))


@holds
def residual_components(s: Setting) -> None:
    labels, vectors = ch04.residual_components(s.cache, -2)
    same(vectors.sum(0), s.cache["resid_post", -1][:, -2])
    assert len(labels) == len(vectors) and ("pos_embed" in labels) == (s.cfg.positions == "learned")


@holds
def logit_attribution(s: Setting) -> None:
    total = ch04.logit_attribution(s.cache, s.model, s.tokens).sum(0)
    constant = s.b_U
    if s.cfg.normalization == "LN":
        constant = constant + s.model.ln_final.b @ s.W_U
    next_token = s.tokens[:, 1:]
    same(total + constant[next_token], s.logits[:, :-1].gather(2, next_token[..., None])[..., 0])


@holds
def ablate_heads(s: Setting) -> None:
    heads = ch05.every_head(s.model)
    same(ch04.ablate_heads(s.model, s.tokens, heads, "resample", s.tokens), s.logits)
    silent = copy.deepcopy(s.model)
    for block in silent.blocks:
        block.attn.W_O.zero_()
    same(ch04.ablate_heads(s.model, s.tokens, heads, "zero"), silent(s.tokens))
    same(ch04.ablate_heads(s.model, s.tokens, heads, "mean", s.tokens[:1])[:1], s.logits[:1])


@holds
def ablation_scores(s: Setting) -> None:
    same(ch04.ablation_scores(s.model, s.tokens, N_HALF, "resample", s.tokens), torch.zeros(2, 4).double())


# ------------------------------------------------------------------------------------------------- chapter 04, weights


@holds
def fold_layer_norm(s: Setting) -> None:
    folded = ch04.fold_layer_norm(s.model)
    same(folded(s.tokens), s.logits)
    if s.cfg.normalization == "LN":
        assert folded.blocks[1].attn.W_K.mean(1).abs().max() < 1e-6


def whole(matrix: Any) -> Tensor:
    return matrix.A @ matrix.B


@holds
def bigram_logits(s: Setting) -> None:
    every_token = torch.arange(s.cfg.d_vocab)[None]
    same(ch04.bigram_logits(s.model), s.model.unembed(s.model.embed(every_token))[0])


@holds
def ov_circuit(s: Setting) -> None:
    """What the head writes for each token, through the unembedding, if the stream were its embedding alone."""
    found = whole(ch04.ov_circuit(s.model, 1, 3))
    attn, W_E = s.model.blocks[1].attn, s.model.embed.W_E
    z = ch02.project_heads(W_E[None], attn.W_V, torch.zeros_like(attn.b_V))[0, :, 3]
    same(found, z @ attn.W_O[3] @ s.W_U)


@holds
def qk_circuit(s: Setting) -> None:
    """Two embeddings at one position, however positions are told: that is the diagonal of the scores' first term."""
    W_E, attn = s.model.embed.W_E, s.model.blocks[0].attn
    table = whole(ch04.qk_circuit(s.model, 0, 3))
    same(table, (W_E @ attn.W_Q[3]) @ (W_E @ attn.W_K[3]).T)
    if s.cfg.normalization == "none":
        _, terms = ch04.decompose_qk(s.cache, s.model, 0, 3)
        same(table[s.tokens, s.tokens], terms[:, 0, 0].diagonal(dim1=-2, dim2=-1) * 6**0.5)


@holds
def position_pattern(s: Setting) -> None:
    """The pattern of a model whose tokens have no embedding."""
    tokens = torch.zeros(1, 9, dtype=torch.long)
    ablated = copy.deepcopy(s.model)
    ablated.embed.W_E.zero_()
    _, found = run_with_cache(ablated, tokens, names="blocks.0.attn.hook_pattern")
    same(ch04.position_pattern(s.model, 0, 3), found["pattern", 0][0, 3])


@holds
def decompose_qk(s: Setting) -> None:
    for layer, head in ((0, 3), (1, 2)):
        scores = s.cache["attn_scores", layer][:, head]
        labels, terms = ch04.decompose_qk(s.cache, s.model, layer, head)
        assert len(labels) == terms.shape[1] == terms.shape[2]
        same(terms.sum((1, 2))[scores.isfinite()], scores[scores.isfinite()])


@holds
def read_by(s: Setting) -> None:
    for kind in "QKV":
        first, second = ch04.read_by(s.model, kind)
        assert first.shape == (2, 4, 12, 6) and second.shape == (2, 4, 6, 12)


@holds
def composition_scores(s: Setting) -> None:
    table = ch04.composition_scores(s.model, "K")
    first, second = (block.attn for block in s.model.blocks)
    writes, reads = first.W_V[3] @ first.W_O[3], second.W_K[2] @ second.W_Q[2].T
    same(table[0, 3, 1, 2], (writes @ reads).norm() / writes.norm() / reads.norm())
    assert table[1].eq(0).all()


@holds
def random_composition_baseline(s: Setting) -> None:
    for kind in "QKV":
        scores = ch04.random_composition_baseline(s.model, kind, 4, torch.Generator().manual_seed(0))
        assert scores.shape == (4,) and (scores > 0).all() and (scores < 1).all()


# ------------------------------------------------------------------------------------------------ chapter 05, patching


@holds
def accumulated_residual(s: Setting) -> None:
    rows = ch05.accumulated_residual(s.cache)
    same(rows, torch.stack([s.cache["resid_pre", 0], s.cache["resid_pre", 1], s.cache["resid_post", 1]]))


@holds
def logit_lens(s: Setting) -> None:
    read = ch05.logit_lens(s.cache, s.model, s.directions)[-1][:, -1]
    same(read + s.b_U[s.dataset.io] - s.b_U[s.dataset.s], s.metric(s.logits))


@holds
def head_attribution(s: Setting) -> None:
    """As `logit_attribution` says of the token that comes next."""
    labels, _ = ch04.residual_components(s.cache, 0)
    heads = [row for row, label in enumerate(labels) if label.startswith("head")]
    directions = s.W_U[:, s.tokens[:, 5]].T
    ours = ch05.head_attribution(s.cache, s.model, directions)[..., 4]
    same(ours.flatten(0, 1), ch04.logit_attribution(s.cache, s.model, s.tokens)[heads, :, 4])


@holds
def run_patched(s: Setting) -> None:
    for name in hook_points(s.model):
        same(ch05.run_patched(s.model, s.tokens, s.cache, name, (slice(None),)), s.logits)
    same(ch05.run_patched(s.model, s.tokens, s.source, LAST, (slice(None),)), s.other_logits)


@holds
def patch_residual_stream(s: Setting) -> None:
    s.everywhere(ch05.patch_residual_stream(s.model, s.tokens, s.cache, s.metric))
    s.everywhere(ch05.patch_residual_stream(s.model, s.tokens, s.source, s.metric)[-1, -1:], s.other_logits)


@holds
def patch_components(s: Setting) -> None:
    s.everywhere(ch05.patch_components(s.model, s.tokens, s.cache, s.metric))


@holds
def patch_heads(s: Setting) -> None:
    s.everywhere(ch05.patch_heads(s.model, s.tokens, s.cache, s.metric))


@holds
def run_from(s: Setting) -> None:
    for layer, resid in enumerate(ch05.accumulated_residual(s.cache)):
        same(ch05.run_from(s.model, resid, layer), s.logits)


@holds
def first_layer(s: Setting) -> None:
    assert [ch05.first_layer(name, 2) for name in ("hook_embed", LAST, "ln_final.hook_scale")] == [-1, 1, 2]


@holds
def batched_sweep(s: Setting) -> None:
    """Each patch as if it were alone."""
    patches: list[Any] = [(LAST, (-1,)), ("hook_embed", (4,)), ("blocks.0.attn.hook_q", (slice(None), 1))]
    patches += [("blocks.1.hook_attn_out", (3,)), ("blocks.0.attn.hook_pattern", (2,))]
    found = ch05.batched_sweep(s.model, s.tokens, s.source, s.metric, patches, max_rows=6)
    same(found, torch.stack([s.mean(ch05.run_patched(s.model, s.tokens, s.source, *patch)) for patch in patches]))


@holds
def patch_heads_by_position(s: Setting) -> None:
    table = ch05.patch_heads_by_position(s.model, s.tokens, s.source, s.metric)
    alone = ch05.run_patched(s.model, s.tokens, s.source, "blocks.0.attn.hook_z", (-1, 2))
    same(table[0, 2, -1], s.mean(alone))


@holds
def patch_head_inputs(s: Setting) -> None:
    for which in ("q", "pattern", "z", "k", "v"):
        s.everywhere(ch05.patch_head_inputs(s.model, s.tokens, s.cache, s.metric, which))


@holds
def attribution_patching(s: Setting) -> None:
    """What a thousandth of the difference does to the metric, a thousandfold."""
    names = ["hook_embed", "blocks.0.attn.hook_z", "blocks.1.attn.hook_pattern"]
    model = copy.deepcopy(s.model).requires_grad_()
    found = ch05.attribution_patching(model, s.tokens, s.source, s.metric, names)
    for name in names:
        near = ActivationCache({name: torch.lerp(s.cache[name], s.source[name], 1e-5)}, 2)
        change = s.metric(ch05.run_patched(s.model, s.tokens, near, name, (slice(None),))) - s.metric(s.logits)
        torch.testing.assert_close(found[name].flatten(1).sum(1), change * 1e5, rtol=1e-2, atol=1e-4)


@holds
def integrated_attribution(s: Setting) -> None:
    """All that the embeddings change is shared out among them."""
    model = copy.deepcopy(s.model).requires_grad_()
    found = ch05.integrated_attribution(model, s.tokens, s.source, s.metric, ["hook_embed"], steps=40)["hook_embed"]
    change = s.metric(s.other_logits) - s.metric(s.logits)
    torch.testing.assert_close(found.sum((1, 2)), change, rtol=1e-2, atol=1e-3)


# --------------------------------------------------------------------------------------------------- chapter 05, paths


@holds
def refuse_unknown(s: Setting) -> None:
    with pytest.raises(ValueError, match=r"no head 0\.4"):
        ch05.refuse_unknown(s.model, [(0, 4)], [])
    ch05.refuse_unknown(s.model, [(0, 3)], [("blocks.1.attn.hook_v", 3), ("final", None)])


@holds
def two_runs(s: Setting) -> None:
    held, sent = ch05.two_runs(s.model, s.tokens, s.other, freeze_mlps=True)
    assert len(held) == (2 if s.cfg.attn_only else 4)
    same(sent["blocks.1.attn.hook_z"], s.source["z", 1])


@holds
def run_over_direct_paths(s: Setting) -> None:
    fixed = {f"blocks.{layer}.attn.hook_z": s.cache["z", layer] for layer in range(2)}
    receivers: list[Any] = [("blocks.1.attn.hook_q", 2), ("final", None)]
    same(ch05.run_over_direct_paths(s.model, s.tokens, fixed, receivers), s.logits)


@holds
def path_patch(s: Setting) -> None:
    """From all heads to the end, past frozen MLPs: what they write on the other text comes in place of their own."""
    heads, receivers = ch05.every_head(s.model), [("final", None)]
    found = ch05.path_patch(s.model, s.tokens, s.other, heads, receivers, s.metric)
    resid = s.cache["resid_post", -1] + sum(s.source["result", i].sum(2) - s.cache["result", i].sum(2) for i in (0, 1))
    same(found, s.metric(ch05.run_from(s.model, resid, 2)))


@holds
def path_patch_heads(s: Setting) -> None:
    receivers = [("blocks.1.attn.hook_q", 2)]
    table = ch05.path_patch_heads(s.model, s.tokens, s.other, receivers, s.metric, max_rows=6)
    one = ch05.path_patch(s.model, s.tokens, s.other, [(0, 3)], receivers, s.metric)
    same(table[0, 3], one.mean())
    s.everywhere(table[1])


@holds
def attention_between(s: Setting) -> None:
    places = s.dataset.positions
    found = ch05.attention_between(s.cache, places["END"], places["IO"])
    same(found[1, 3, 2], s.cache["pattern", 1][2, 3, places["END"][2], places["IO"][2]])


@holds
def name_copying_scores(s: Setting) -> None:
    """With every logit among the k all names are; and with one, those that come first."""
    assert ch05.name_copying_scores(s.model, s.dataset, k=s.cfg.d_vocab).eq(1).all()
    stream = s.cache["resid_pre" if s.cfg.attn_only else "resid_post", 0]
    at = torch.stack([s.dataset.positions[name] for name in ("IO", "S1")])
    block = s.model.blocks[1]
    v = block.ln1(stream[s.rows, at]) @ block.attn.W_V[3] + block.attn.b_V[3]
    logits = s.model.unembed(s.model.ln_final(v @ block.attn.W_O[3]))
    rank = (logits > logits.gather(2, s.tokens[s.rows, at][..., None])).sum(-1)
    for k in (1, 3, 6):
        same(ch05.name_copying_scores(s.model, s.dataset, k=k)[1, 3], (rank < k).double().mean())


@holds
def signal_effects(s: Setting) -> None:
    effects = ch05.signal_effects(s.model, s.dataset, [(0, 1)], [("final", None)])
    after = ch05.path_patch(s.model, s.tokens, s.other, [(0, 1)], [("final", None)], s.metric)
    same(effects["token"], after - s.metric(s.logits))


# ------------------------------------------------------------------------------------------------- chapter 05, circuits


@holds
def every_head(s: Setting) -> None:
    assert len(ch05.every_head(s.model)) == 8


@holds
def template_means(s: Setting) -> None:
    """A template of one row has that row's mean."""
    for name, means in ch05.template_means(s.model, s.tokens, s.rows, max_rows=2).items():
        same(means, s.cache[name])


@holds
def mean_ablate_except(s: Setting) -> None:
    same(ch05.mean_ablate_except(s.model, s.dataset, ch05.every_head(s.model), s.means), s.logits)
    own = {name: s.cache[name] for name in s.means}
    same(ch05.mean_ablate_except(s.model, s.dataset, [], own), s.logits)


@holds
def circuit_scores(s: Setting) -> None:
    circuits: list[list[Any]] = [[(0, 1)], [], [(0, 3), (1, 2)]]
    found = ch05.circuit_scores(s.model, s.dataset, circuits, s.means, max_rows=6)
    alone = [s.mean(ch05.mean_ablate_except(s.model, s.dataset, circuit, s.means)) for circuit in circuits]
    same(found, torch.stack(alone))


@holds
def faithfulness(s: Setting) -> None:
    same(ch05.faithfulness(s.model, s.dataset, [ch05.every_head(s.model)], s.means), torch.ones(1).double())


@holds
def completeness(s: Setting) -> None:
    sides = ch05.completeness(s.model, s.dataset, ch05.every_head(s.model), [[], [(1, 1)]], s.means)
    same(sides[0], sides[1])


@holds
def minimality(s: Setting) -> None:
    everything = ch05.every_head(s.model)
    found = ch05.minimality(s.model, s.dataset, everything, {(1, 1): []}, s.means)
    without = [head for head in everything if head != (1, 1)]
    same(found.abs(), (1 - ch05.faithfulness(s.model, s.dataset, [without], s.means)).abs())


@holds
def greedy_circuit(s: Setting) -> None:
    found = ch05.greedy_circuit(s.model, s.dataset, s.means, share=0.5)
    assert [len(circuit) for circuit in found] == [8, 4, 2, 1, 0]


@holds
def random_circuits(s: Setting) -> None:
    found = ch05.random_circuits(s.model, 3, 5, torch.Generator().manual_seed(0))
    assert [len(set(circuit)) for circuit in found] == [3] * 5


# ---------------------------------------------------------------------------------------------------- chapter 05, edges


@holds
def edge_nodes(s: Setting) -> None:
    senders, receivers = ch05.edge_nodes(s.cfg)
    n_mlps = 0 if s.cfg.attn_only else 2
    assert (len(senders), len(receivers)) == (9 + n_mlps, 25 + n_mlps)


@holds
def possible_edges(s: Setting) -> None:
    assert ch05.possible_edges(s.cfg)[:, -1].all() and ch05.possible_edges(s.cfg)[0].all()


@holds
def run_with_own_inputs(s: Setting) -> None:
    def nothing(rows: slice) -> Tensor:
        return torch.zeros(rows.stop - rows.start, *s.tokens.shape, 12).double()

    same(ch05.run_with_own_inputs(s.model, s.tokens, nothing), s.logits)


@holds
def sender_outputs(s: Setting) -> None:
    biases = sum(getattr(block.attn, "b_O", 0) for block in s.model.blocks)
    same(ch05.sender_outputs(s.model, s.cache).sum(0) + biases, s.cache["resid_post", -1])


@holds
def edge_attribution(s: Setting) -> None:
    """Into the last norm go all changes of the last stream."""
    model = copy.deepcopy(s.model).requires_grad_()
    scores = ch05.edge_attribution(model, s.tokens, s.other, s.metric)
    last = ch05.attribution_patching(model, s.tokens, s.source, s.metric, [LAST])[LAST]
    same(scores[:, -1].sum(), last.sum((1, 2)).mean())


@holds
def run_with_edges(s: Setting) -> None:
    there = ch05.possible_edges(s.cfg)
    same(ch05.run_with_edges(s.model, s.tokens, s.other, there), s.logits)
    same(ch05.run_with_edges(s.model, s.tokens, s.other, ~there), s.other_logits)


@holds
def interchange_intervention(s: Setting) -> None:
    """Along all directions it is a patch of the whole vector."""
    name, everything = "blocks.1.hook_resid_pre", torch.eye(12).double()
    at = torch.full((3,), 5)
    found = ch05.interchange_intervention(s.model, s.tokens, s.other, name, at, everything)
    same(found, ch05.run_patched(s.model, s.tokens, s.source, name, (5,)))


@holds
def align_direction(s: Setting) -> None:
    found = ch05.align_direction(
        s.model, s.tokens, s.other, LAST, torch.full((3,), -1), s.metric, torch.Generator().manual_seed(0), steps=2
    )
    same(found @ found.T, torch.ones(1, 1).double())


# ---------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", HOLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_or_is_refused_by_name(kind: str, name: str) -> None:
    s = setting_of(kind)
    if name in REFUSED.get(kind, ()):
        with pytest.raises(ValueError, match=r"this model|of this model"):
            HOLDS[name](s)
    else:
        HOLDS[name](s)


@pytest.mark.parametrize("module", [ch04, ch05])
def test_no_function_is_left_out(module: ModuleType) -> None:
    own = {name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__}
    functions = {name for name in own if inspect.isroutine(vars(module)[name]) or inspect.isclass(vars(module)[name])}
    assert functions <= HOLDS.keys() | NOT_ABOUT_MODELS


def test_unturned_queries_and_keys_are_not_those_of_the_scores() -> None:
    s = setting_of("Pythia")
    unturned = ch02.causal_mask(ch02.attention_scores(s.cache["q", 0], s.cache["k", 0])).softmax(dim=-1)
    off = unturned - s.cache["pattern", 0]
    assert off.abs().max() > 0.01


@pytest.mark.parametrize("kind", ["Llama", "Llama, no sharing", "LayerNorm and shared keys"])
def test_an_ungrouped_model_computes_the_same(kind: str) -> None:
    s = setting_of(kind)
    model = copy.deepcopy(s.model).float()
    copied = ungrouped(model)
    logits, own = run_with_cache(model, s.tokens, names="*")
    found, cache = run_with_cache(copied, s.tokens, names="*")
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    assert own.keys() == cache.keys()
    for layer in range(2):
        n_shared = own["k", layer].shape[2]
        torch.testing.assert_close(cache["k", layer][:, :, :: 4 // n_shared], own["k", layer])
    copied.unembed.W_U.data.zero_()
    assert model.unembed.W_U.any() and copied.embed.W_E.any(), "the copy shares nothing with the model"


def test_a_model_whose_heads_have_their_own_is_ungrouped_as_it_is() -> None:
    model = setting_of("Pythia").model
    assert ungrouped(model) is model
