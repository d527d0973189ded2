"""A small transformer for the checks of patching, and the same computation spelled out without hooks: the oracle.

The oracle knows nothing of hook points: `forward` walks through the model and asks, at each named place, a plain
function what to go on with. So a patch there is a replacement in a computation that stands on the page.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.config import TransformerConfig
from course_utils.hooks import ActivationCache, HookPoint, hook_points

See = Callable[[str, Tensor], Tensor]
Edits = Mapping[str, Sequence[tuple[Any, ...]]]  # which parts of which activations


class ToyNorm(nn.Module):
    """Mean 0, size 1, then scaled and shifted."""

    def __init__(self, d_model: int, seed: int) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(1 + noise(d_model, seed=seed, scale=0.3)), nn.Parameter(noise(d_model, seed=9))
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()

    def scale(self, resid: Tensor) -> Tensor:
        return (resid.var(-1, correction=0, keepdim=True) + 0.1).sqrt()

    def forward(self, resid: Tensor) -> Tensor:
        scale = self.hook_scale(self.scale(resid))
        return self.hook_normalized((resid - resid.mean(-1, keepdim=True)) / scale) * self.w + self.b


class ToyBlock(nn.Module):
    """Attention, and an MLP where there is one; both read the stream as it is."""

    def forward(self, resid: Tensor) -> Tensor:
        return self.compute(resid, lambda place, activation: self.get_submodule(place)(activation))

    def compute(self, resid: Tensor, see: See) -> Tensor:
        """The stream after this block; `see(place, activation)` is asked at every place in it."""
        attn, n_pos = self.attn, resid.shape[1]
        resid = see("hook_resid_pre", resid)
        read = torch.tanh(resid)[:, :, None, None]
        q, k, v = (
            see(f"attn.hook_{letter.lower()}", (read @ getattr(attn, f"W_{letter}")).squeeze(3)) for letter in "QKV"
        )
        future = torch.ones(n_pos, n_pos, dtype=torch.bool, device=resid.device).triu(1)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).masked_fill(future, -torch.inf)
        pattern = see("attn.hook_pattern", scores.softmax(-1))
        z = see("attn.hook_z", torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        resid = resid + see("hook_attn_out", torch.einsum("bqhd,hdm->bqm", z, attn.W_O) + attn.b_O)
        if hasattr(self, "mlp"):
            resid = see("hook_resid_mid", resid)
            resid = resid + see("hook_mlp_out", torch.sin(resid @ self.mlp.W))
        return see("hook_resid_post", resid)


class ToyUnembed(nn.Module):
    """From the stream to logits."""

    def forward(self, resid: Tensor) -> Tensor:
        return resid @ self.W_U + self.b_U


class ToyTransformer(nn.Module):
    """Small, causal and smooth; its hook points, parameters and parts have the names of a `Transformer`'s.

    It counts how often it comes to logits (`runs`), and the rows that go through its blocks (`rows`, a row once for
    each block); and it notes the largest number of rows in one block (`most_rows`).
    """

    def __init__(self, n_layers: int, n_heads: int, attn_only: bool = False, seed: int = 0) -> None:
        super().__init__()
        d_model, d_head, d_vocab = 8, 3, 11
        self.cfg = TransformerConfig(
            d_vocab=d_vocab, n_ctx=9, n_layers=n_layers, n_heads=n_heads, d_model=d_model, d_head=d_head, d_mlp=6,
            attn_only=attn_only,
        )  # fmt: skip
        self.embed, self.pos_embed, self.unembed = nn.Module(), nn.Module(), ToyUnembed()
        self.embed.W_E = nn.Parameter(noise(d_vocab, d_model, seed=seed + 1))
        self.pos_embed.W_pos = nn.Parameter(noise(9, d_model, seed=seed + 2, scale=0.5))
        self.unembed.W_U = nn.Parameter(noise(d_model, d_vocab, seed=seed + 3))
        self.unembed.b_U = nn.Parameter(noise(d_vocab, seed=seed + 4))
        self.hook_embed, self.hook_pos_embed = HookPoint(), HookPoint()
        self.blocks = nn.ModuleList()
        for layer in range(n_layers):
            block, at = ToyBlock(), seed + 10 * layer
            block.attn = nn.Module()
            for i, letter in enumerate("QKV"):
                setattr(block.attn, f"W_{letter}", nn.Parameter(noise(n_heads, d_model, d_head, seed=at + 20 + i)))
            block.attn.W_O = nn.Parameter(noise(n_heads, d_head, d_model, seed=at + 23))
            block.attn.b_O = nn.Parameter(noise(d_model, seed=at + 24))
            for letter in ("q", "k", "v", "pattern", "z"):
                setattr(block.attn, f"hook_{letter}", HookPoint())
            block.hook_resid_pre, block.hook_attn_out, block.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
            if not attn_only:
                block.mlp = nn.Module()
                block.mlp.W = nn.Parameter(noise(d_model, d_model, seed=at + 25, scale=0.5))
                block.hook_resid_mid, block.hook_mlp_out = HookPoint(), HookPoint()
            block.register_forward_pre_hook(self._count_rows)
            self.blocks.append(block)
        self.ln_final = ToyNorm(d_model, seed + 5)
        self.runs, self.rows, self.most_rows = 0, 0, 0
        self.unembed.register_forward_pre_hook(self._count_run)

    def _count_rows(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.rows, self.most_rows = self.rows + len(inputs[0]), max(self.most_rows, len(inputs[0]))

    def _count_run(self, unembed: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.runs += 1

    def forward(self, tokens: Tensor) -> Tensor:
        embed = self.hook_embed(self.embed.W_E[tokens])
        resid = embed + self.hook_pos_embed(self.pos_embed.W_pos[: tokens.shape[1]].expand_as(embed))
        for block in self.blocks:
            resid = block(resid)
        return self.unembed(self.ln_final(resid))

    def compute(self, tokens: Tensor, see: See) -> Tensor:
        """The logits; `see(name, activation)` is asked at every place, and what it returns is used from there on."""
        embed = see("hook_embed", self.embed.W_E[tokens])
        resid = embed + see("hook_pos_embed", self.pos_embed.W_pos[: tokens.shape[1]].expand_as(embed))
        for layer, block in enumerate(self.blocks):
            resid = block.compute(resid, lambda place, part, layer=layer: see(f"blocks.{layer}.{place}", part))
        final = self.ln_final
        centred = (resid - resid.mean(-1, keepdim=True)) / see("ln_final.hook_scale", final.scale(resid))
        resid = see("ln_final.hook_normalized", centred) * final.w + final.b
        return resid @ self.unembed.W_U + self.unembed.b_U

    def seen(self, tokens: Tensor) -> dict[str, Tensor]:
        """What every place sees in a run on these tokens."""
        found: dict[str, Tensor] = {}

        def keep(name: str, activation: Tensor) -> Tensor:
            found[name] = activation
            return activation

        with torch.no_grad():
            self.compute(tokens, keep)
        return {name: activation.clone() for name, activation in found.items()}


class Case:
    """Two batches of prompts for a toy model, a metric, and what patches from one into the other really do.

    With `moved` all of it is in double precision, and on a GPU where there is one: answers have to follow.
    """

    def __init__(
        self, n_layers: int, n_heads: int, n_batch: int, n_pos: int, attn_only: bool = False, moved: bool = False
    ) -> None:
        seed = n_layers
        target: dict[str, Any] = {"dtype": torch.float64 if moved else torch.float32}
        target["device"] = "cuda" if moved and torch.cuda.is_available() else "cpu"
        self.model = ToyTransformer(n_layers, n_heads, attn_only, seed).to(**target)
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randint(11, (2, n_batch, n_pos), generator=generator).to(target["device"])
        self.tokens, self.source_tokens = draw[0], (draw[0] + 1 + draw[1] % 10) % 11  # no token is the same
        self.seen, self.source = self.model.seen(self.tokens), self.model.seen(self.source_tokens)
        self.weights = noise(n_batch, 11, seed=seed + 77).to(**target)
        self.n_batch, self.n_pos, self.n_layers, self.n_heads = n_batch, n_pos, n_layers, n_heads
        self.asking = ""  # which exercise is being checked
        self.sizes = (n_layers, n_heads, n_batch, n_pos, attn_only, moved)
        self.words = f"on {n_batch} prompts of {n_pos} tokens, {n_layers} layers of {n_heads} heads" + (
            ", no MLPs" if attn_only else ""
        )

    def cache(self) -> ActivationCache:
        """The source run, as a learner gets it."""
        return ActivationCache(self.source, self.n_layers)

    def metric(self, logits: Tensor) -> Tensor:
        """One number per prompt, with weights of its own for each, and not linear."""
        if not isinstance(logits, Tensor) or logits.shape != (self.n_batch, self.n_pos, 11):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else f"of type {type(logits).__name__}"
            raise CheckFailed(
                f"{self.asking}: the metric was given logits {got}, "
                f"expected (batch={self.n_batch}, pos={self.n_pos}, d_vocab=11).\n"
                "  Next: it compares prompt by prompt: hand it the logits of all prompts, once for each patch."
            )
        last, first = ((logits[:, pos] * self.weights).sum(-1) for pos in (-1, 0))
        return torch.sin(last) + first.tanh() + self.weights[:, 0]

    def logits(self, edits: Edits, backwards: bool = False) -> Tensor:
        """The logits with these parts of these activations taken from the source run; or the other way round."""
        tokens, source = (self.source_tokens, self.seen) if backwards else (self.tokens, self.source)

        def see(name: str, activation: Tensor) -> Tensor:
            if name in edits:
                activation = activation.clone()
                for index in edits[name]:
                    place = (slice(None), *index)
                    activation[place] = source[name][place]
            return activation

        with torch.no_grad():
            return self.model.compute(tokens, see)

    def scores(self, edits: Edits, backwards: bool = False) -> Tensor:
        """The metric of each prompt."""
        return self.metric(self.logits(edits, backwards))


@cache
def case_of(*sizes: Any) -> Case:
    """A case, made once: it is the same at each call, unless somebody spoils it."""
    return Case(*sizes)


@cache
def worked_out(key: str, sizes: tuple[Any, ...], work: "Work") -> Any:
    """An expected answer, worked out once for a case: the loop behind it is slow."""
    return work.fn(case_of(*sizes))


class Work:
    """A function that does not count as part of a cache's key."""

    def __init__(self, fn: Callable[[Case], Any]) -> None:
        self.fn = fn

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Work)

    def __hash__(self) -> int:
        return 0


@contextmanager
def leaves_no_trace(name: str, case: Case, cache: ActivationCache) -> Iterator[None]:
    """The cache, the tokens, the parameters, their gradients and everybody's hooks must be there as before."""
    model = case.model
    model.runs, model.rows, model.most_rows, case.asking = 0, 0, 0, name
    handles = [point.add(lambda activation, hook: None) for point in hook_points(model).values()]
    hooks = {place: list(point._fns.values()) for place, point in hook_points(model).items()}
    tokens, activations = case.tokens.clone(), {key: cache[key].clone() for key in cache}
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        yield
        for key, before in activations.items():
            if not torch.equal(cache[key], before):
                raise CheckFailed(
                    f"{name}: it changed `{key}` in the cache, so the next patch takes wrong values from there.\n"
                    "  Next: write into a copy of the run's activation, `activation.clone()`, never into the cache."
                )
        if not torch.equal(case.tokens, tokens):
            raise CheckFailed(f"{name}: it changed `tokens` in place.\n  Next: make a new tensor.")
        for key, value in model.state_dict().items():
            if not torch.equal(value, weights[key]):
                raise CheckFailed(f"{name}: it changed the model's `{key}`.\n  Next: patch activations, not weights.")
        for key, parameter in model.named_parameters():
            if parameter.grad is not None:
                raise CheckFailed(
                    f"{name}: it left a gradient in the model's `{key}`.\n"
                    "  Next: torch.autograd.grad(output, inputs) returns gradients and stores none."
                )
        for place, point in hook_points(model).items():
            if list(point._fns.values()) != hooks[place]:
                more = len(point._fns) > len(hooks[place])
                what = (
                    f"a hook is left behind at `{place}`" if more else f"hooks of others, at `{place}`, are taken away"
                )
                raise CheckFailed(
                    f"{name}: {what}.\n"
                    "  Next: use run_with_hooks, or `with hooks(model, ...):`; they take away their own."
                )
    except BaseException:
        case_of.cache_clear()  # whatever was spoiled, nobody else shall see it
        raise
    finally:
        for handle in handles:
            handle.remove()
