"""Checks of chapter 05, edges and directions, against a forward in which every receiver reads for itself."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_utils.checks.ch04.causes import nothing_left_behind, some_tokens
from course_utils.checks.comparing import compare, unchanged
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import must_raise
from course_utils.checks.standins.transformer import SmallModel
from course_utils.checks.translating import during
from course_utils.config import TransformerConfig
from course_utils.hooks import ActivationCache, HookPoint, hooks, run_with_cache

Fn = Callable[..., Any]
Version = Callable[[str, Tensor], Tensor]  # what a receiver reads, given its name and the stream
Wrong = dict[str, Callable[[], Tensor]]
EDGES, LOGITS = "sender receiver", "batch pos d_vocab"

# Layers, heads, batch and positions all differ; with and without MLPs and LayerNorms.
USUAL = TransformerConfig(d_vocab=13, n_ctx=9, n_layers=2, n_heads=3, d_model=7, d_head=4, d_mlp=11)
ATTENTION_ONLY = TransformerConfig(
    d_vocab=11, n_ctx=10, n_layers=3, n_heads=2, d_model=5, d_head=3, attn_only=True, normalization="none"
)


class Case:
    """A small model with two batches of prompts, a metric, and the same computation receiver by receiver."""

    def __init__(self, cfg: TransformerConfig, n_batch: int, n_pos: int, dtype: torch.dtype) -> None:
        self.model = SmallModel(cfg).to(dtype)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.6)  # softmaxes that leave something to other keys
        self.clean, self.corrupted = (some_tokens(cfg, n_batch, n_pos, seed=seed) for seed in (1, 2))
        self.weights = noise(n_batch, cfg.d_vocab, seed=3).to(dtype)
        self.words = f"on {n_batch} prompts, {cfg.n_layers} layers of {cfg.n_heads} heads" + (
            ", no MLPs" if cfg.attn_only else ""
        )
        self.senders, self.receivers = ["embed"], []
        for layer in range(cfg.n_layers):
            self.receivers += [f"{layer}.{head} {letter}" for letter in "qkv" for head in range(cfg.n_heads)]
            self.senders += [f"{layer}.{head}" for head in range(cfg.n_heads)]
            if not cfg.attn_only:
                self.receivers.append(f"mlp {layer}")
                self.senders.append(f"mlp {layer}")
        self.receivers.append("final")
        self.own, self.other = (self.walk(tokens)[1] for tokens in (self.clean, self.corrupted))

    def metric(self, logits: Tensor) -> Tensor:
        """One number per prompt, not linear, which asks for several positions."""
        last, second = ((logits[:, pos] * self.weights).sum(-1) for pos in (-1, 1))
        return torch.sin(last) + second.tanh() + self.weights[:, 0]

    def walk(
        self, tokens: Tensor, version: Version = lambda name, resid: resid, moved: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """The logits and what each sender wrote; `version` says what each receiver reads in place of the stream.

        `self.written` holds, while the run goes on, what was written before the layer's part at work.
        """
        model, cfg = self.model, self.model.cfg
        resid = model.embed.W_E[tokens] + moved + model.pos_embed.W_pos[: tokens.shape[1]]
        outputs = [resid]
        future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        for layer, block in enumerate(model.blocks):
            self.written = list(outputs)
            attn, heads = block.attn, []
            for head in range(cfg.n_heads):
                q, k, v = (
                    self.normal(block.ln1, version(f"{layer}.{head} {letter}", resid))
                    @ getattr(attn, f"W_{letter.upper()}")[head]
                    + getattr(attn, f"b_{letter.upper()}")[head]
                    for letter in "qkv"
                )
                scores = (q @ k.mT / cfg.d_head**0.5).masked_fill(future, -torch.inf)
                heads.append(scores.softmax(-1) @ v @ attn.W_O[head])
            outputs += heads
            resid = sum(heads, resid + attn.b_O)
            if not cfg.attn_only:
                self.written = list(outputs)
                pre = self.normal(block.ln2, version(f"mlp {layer}", resid)) @ block.mlp.W_in + block.mlp.b_in
                outputs.append(F.gelu(pre, approximate="tanh") @ block.mlp.W_out + block.mlp.b_out)
                resid = resid + outputs[-1]
        self.written = list(outputs)
        final = self.normal(model.ln_final, version("final", resid))
        return final @ model.unembed.W_U + model.unembed.b_U, torch.stack(outputs).detach()

    def normal(self, norm: Any, resid: Tensor) -> Tensor:
        cfg = self.model.cfg
        if cfg.normalization == "none":
            return resid
        return F.layer_norm(resid, (cfg.d_model,), norm.w, norm.b, cfg.layer_norm_eps)

    def gradient(self, moved: Tensor) -> Tensor:
        """How the metric's mean changes with what each receiver reads; one row for each."""
        added = {name: torch.zeros_like(self.own[0], requires_grad=True) for name in self.receivers}
        logits, _ = self.walk(self.clean, lambda name, resid: resid + added[name], moved)
        return torch.stack(torch.autograd.grad(self.metric(logits).mean(), list(added.values())))

    def there(self) -> Tensor:
        """Which edges there are, by asking who can see whom."""
        table = torch.zeros(len(self.senders), len(self.receivers), dtype=torch.bool)

        def look(name: str, resid: Tensor) -> Tensor:
            table[: len(self.written), self.receivers.index(name)] = True
            return resid

        self.walk(self.clean, look)
        return table

    def scores(self, gradient: Tensor, difference: Tensor | None = None) -> Tensor:
        """Gradient times difference for every pair, whether there is an edge or not."""
        difference = self.other - self.own if difference is None else difference
        return torch.einsum("sbpd,rbpd->sr", difference, gradient)

    def with_edges(self, edges: Tensor, backwards: bool = False, clean: bool = False, rest: str = "other") -> Tensor:
        """The logits with only these edges, receiver by receiver and sender by sender.

        `clean`: kept edges carry what the senders wrote on the clean prompts, not what they write now; `rest` says
        what the others carry.
        """
        tokens, other = (self.corrupted, self.own) if backwards else (self.clean, self.other)

        def version(name: str, resid: Tensor) -> Tensor:
            column = self.receivers.index(name)
            for row, wrote in enumerate(self.written):
                if not edges[row, column]:
                    carried = other[row] if rest == "other" else torch.zeros_like(wrote)
                    resid = resid + carried - wrote
                elif clean:
                    resid = resid + self.own[row] - wrote
            return resid

        with torch.no_grad():
            return self.walk(tokens, version)[0]

    @contextmanager
    def leaves_no_trace(self, name: str, **inputs: Tensor) -> Iterator[None]:
        """Tokens, weights, hooks, and the parameters' gradients are what they were."""
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)  # somebody else's
        tokens = {"clean": self.clean, "corrupted": self.corrupted}
        with unchanged(name, **tokens, **inputs), nothing_left_behind(name, self.model), during(self.words):
            yield
        for place, parameter in self.model.named_parameters():
            if parameter.grad is None or not (parameter.grad == 1).all() or not parameter.requires_grad:
                raise CheckFailed(
                    f"{name}: it touched the gradients of the model's parameters, as at `{place}`.\n"
                    "  Next: torch.autograd.grad(output, inputs) returns gradients and stores none."
                )

    @contextmanager
    def streams_stay(self, name: str) -> Iterator[None]:
        """What others saw of the stream before a hook of the learner's must still be what they saw."""
        seen: list[tuple[Tensor, Tensor]] = []

        def note(resid: Tensor, hook: HookPoint) -> None:
            seen.append((resid.detach(), resid.detach().clone()))

        with hooks(self.model, {"blocks.*.hook_resid_p*": note}):
            yield
        if not all(torch.equal(now, before) for now, before in seen):
            raise CheckFailed(
                f"{name}: it writes into the activation itself, which others may hold.\n"
                "  Next: `clone()` the activation in the hook, write into the clone, and return that."
            )


@cache
def case_of(number: int) -> Case:
    """The two cases; whoever spoils one makes it anew."""
    if number == 0:
        return Case(USUAL, n_batch=4, n_pos=5, dtype=torch.float32)
    return Case(ATTENTION_ONLY, n_batch=3, n_pos=4, dtype=torch.float64)


@contextmanager
def case(number: int) -> Iterator[Case]:
    """One of the cases, for one answer."""
    try:
        yield case_of(number)
    except BaseException:
        case_of.cache_clear()
        raise


# ---------------------------------------------------------------------------------------------------------------- edges


def check_sender_outputs(fn: Fn) -> None:
    """Every part, and what they sum to."""
    name = "sender_outputs"
    for number in (0, 1):
        with case(number) as known:
            model = known.model
            with torch.no_grad():
                _, seen = run_with_cache(model, known.clean)
            activations = {key: seen[key].clone() for key in seen}
            with torch.no_grad(), known.leaves_no_trace(name, **{key: seen[key] for key in seen}):
                actual = fn(model, ActivationCache(seen, model.cfg.n_layers))
            mistakes = sender_mistakes(known, activations)
            compare(f"{name} {known.words}", actual, known.own, "sender batch pos d_model", mistakes)


def sender_mistakes(known: Case, seen: dict[str, Tensor]) -> Wrong:
    """What common mistakes give."""
    cfg, blocks = known.model.cfg, known.model.blocks
    heads = [i for i, name in enumerate(known.senders) if "." in name]

    def with_bias(share: float) -> Tensor:
        out = known.own.clone()
        for i in heads:
            out[i] += blocks[int(known.senders[i][0])].attn.b_O.detach() * share
        return out

    def other_order(order: Callable[[str], Any]) -> Tensor:
        rows = sorted(range(len(known.senders)), key=lambda i: order(known.senders[i]))
        return known.own[rows]

    def in_layer(sender: str) -> tuple[int, int]:
        return (-1, 0) if sender == "embed" else (int(sender.replace("mlp ", "")[0]), 0 if "mlp" in sender else 1)

    def head_first(sender: str) -> tuple[int, int, int]:
        if "." not in sender:
            return (-1 if sender == "embed" else 99, int(sender[-1]) if "mlp" in sender else 0, 0)
        layer, head = sender.split(".")
        return (0, int(head), int(layer))

    mistakes: Wrong = {
        "`b_O` is added to every head; it belongs to none.": lambda: with_bias(1.0),
        "`b_O` is divided among the heads; it belongs to none.": lambda: with_bias(1 / cfg.n_heads),
        "the first row is `hook_embed` alone, without the positions.": lambda: torch.cat(
            [seen["hook_embed"][None], known.own[1:]]
        ),
        "layers and heads are mixed up: layer by layer come all heads of that layer.": lambda: other_order(head_first),
    }
    if not cfg.attn_only:
        mistakes["a layer's MLP comes before its heads."] = lambda: other_order(in_layer)
        mistakes["all MLPs come after all heads; go layer by layer."] = lambda: other_order(
            lambda sender: ("mlp" in sender, in_layer(sender))
        )
    return mistakes


def check_edge_attribution(fn: Fn) -> None:
    """Every edge, with the gradient of the clean run, and with several on the way."""
    name = "edge_attribution"
    for number, steps in ((0, 1), (0, 3), (1, 1), (1, 2)):
        with case(number) as known:
            with known.leaves_no_trace(name):
                actual = fn(known.model, known.clean, known.corrupted, known.metric, steps=steps)
            gradient = on_the_way(number, tuple(step / steps for step in range(steps)))
            right = known.scores(gradient) * known.there()
            mistakes = edge_mistakes(number, known, steps, gradient, right) | step_mistakes(number, known, steps)
            words = f"{name} {known.words}, steps={steps}"
            compare(words, actual, right, EDGES, mistakes, rtol=1e-3, atol=1e-6)
            if actual.requires_grad:
                raise CheckFailed(f"{words}: what it returns has a graph.\n  Next: differences need no gradients.")


@cache
def on_the_way(number: int, shares: tuple[float, ...]) -> Tensor:
    """The mean gradient over clean runs whose embeddings are so far on the way to the corrupted ones."""
    known = case_of(number)
    W_E = known.model.embed.W_E.detach()
    far = W_E[known.corrupted] - W_E[known.clean]
    return torch.stack([known.gradient(share * far) for share in shares]).mean(0)


def edge_mistakes(number: int, known: Case, steps: int, gradient: Tensor, right: Tensor) -> Wrong:
    """What common mistakes give, however many steps."""
    n_heads, there = known.model.cfg.n_heads, known.there()

    def exchanged(first: str, second: str) -> Tensor:
        """Columns of two letters in each other's place."""
        swap = {first: second, second: first}
        names = [name[:-1] + swap.get(name[-1], name[-1]) if "." in name else name for name in known.receivers]
        return right[:, [known.receivers.index(name) for name in names]]

    def head_by_head() -> Tensor:
        names = [
            name
            for layer in range(known.model.cfg.n_layers)
            for name in (
                [f"{layer}.{head} {letter}" for head in range(n_heads) for letter in "qkv"]
                + [n for n in known.receivers if n == f"mlp {layer}"]
            )
        ]
        return right[:, [known.receivers.index(name) for name in [*names, "final"]]]

    return {
        "the sign is wrong: the difference is the corrupted run minus the clean one.": lambda: -right,
        "scores without their sign are returned.": right.abs,
        "clean and corrupted are swapped, in the gradient and in the difference.": lambda: (
            -known.scores(on_the_way(number, tuple(1 - step / steps for step in range(steps)))) * there
        ),
        "the gradient is that of the corrupted run.": lambda: known.scores(on_the_way(number, (1.0,))) * there,
        "senders have scores for receivers that read before they write.": lambda: known.scores(gradient),
        "the metric is summed over the prompts; take its mean.": lambda: right * len(known.clean),
        "queries and keys are swapped.": lambda: exchanged("q", "k"),
        "queries and values are swapped.": lambda: exchanged("q", "v"),
        "keys and values are swapped.": lambda: exchanged("k", "v"),
        "the receivers of a layer are ordered head by head; all queries come first, then the keys.": head_by_head,
        "the gradient is multiplied by what the sender wrote on the clean prompts; that is no difference.": lambda: (
            known.scores(gradient, known.own) * there
        ),
        "the gradient is multiplied by what the sender wrote on the corrupted ones; that is no difference.": lambda: (
            known.scores(gradient, known.other) * there
        ),
    }


def step_mistakes(number: int, known: Case, steps: int) -> Wrong:
    """What goes wrong with the steps."""
    if steps == 1:
        return {}

    def at(shares: list[float], times: int = 1) -> Callable[[], Tensor]:
        return lambda: known.scores(on_the_way(number, tuple(shares))) * known.there() * times

    return {
        "the steps are left out: the gradient is the clean run's alone.": at([0.0]),
        "the shares begin at 1/steps and end at 1; they begin at 0.": at([(i + 1) / steps for i in range(steps)]),
        "the shares are the middles of the parts; they begin at 0.": at([(i + 0.5) / steps for i in range(steps)]),
        "the shares go from 0 to 1, both included; 1 is not reached.": at([i / (steps - 1) for i in range(steps)]),
        "the gradients are summed; take their mean.": at([i / steps for i in range(steps)], steps),
        "only the last step's gradient is kept.": at([(steps - 1) / steps]),
    }


def check_run_with_edges(fn: Fn) -> None:
    """Some edges, all, and none; entries where there is no edge are set at random."""
    name = "run_with_edges"
    for number in (0, 1):
        with case(number) as known:
            there = known.there()
            draws = torch.rand(there.shape, generator=torch.Generator().manual_seed(5))
            for words, edges in {
                "some edges": draws > 0.4,
                "all edges": there,
                "no edges": draws.gt(0.5) & ~there,
            }.items():
                with known.leaves_no_trace(name, edges=edges):
                    actual = fn(known.model, known.clean, known.corrupted, edges)
                right = known.with_edges(edges)
                label = f"{name} with {words} {known.words}"
                compare(label, actual, right, LOGITS, kept_mistakes(known, edges), rtol=1e-3, atol=5e-5)
                if actual.requires_grad:
                    raise CheckFailed(f"{name}: gradients are recorded.\n  Next: put `@torch.no_grad()` above it.")


def kept_mistakes(known: Case, edges: Tensor) -> Wrong:
    """What common mistakes give."""

    def of(keep: Callable[[str, str], bool]) -> Tensor:
        """The edges, with all others kept too for which `keep` is False."""
        rows = [[keep(sender, receiver) for receiver in known.receivers] for sender in known.senders]
        return edges | ~torch.tensor(rows)

    def letters(letter: str) -> Tensor:
        """For each head the edges of one letter, whatever the input."""
        names = [name[:-1] + letter if "." in name else name for name in known.receivers]
        return edges[:, [known.receivers.index(name) for name in names]]

    return {
        "everything is kept.": lambda: known.with_edges(torch.ones_like(edges)),
        "nothing is kept.": lambda: known.with_edges(torch.zeros_like(edges)),
        "kept and cut are exchanged.": lambda: known.with_edges(~edges),
        "clean and corrupted are swapped.": lambda: known.with_edges(edges, backwards=True),
        "kept edges carry what the senders write on the clean prompts, not what they write in this run.": lambda: (
            known.with_edges(edges, clean=True)
        ),
        "the other edges carry nothing; they carry what the senders write on the corrupted prompts.": lambda: (
            known.with_edges(edges, rest="nothing")
        ),
        "edges into the last LayerNorm are never cut.": lambda: known.with_edges(of(lambda s, r: r != "final")),
        "edges from the embedding are never cut.": lambda: known.with_edges(of(lambda s, r: s != "embed")),
        "edges from the MLPs are never cut.": lambda: known.with_edges(of(lambda s, r: "mlp" not in s)),
        "edges into the MLPs are never cut.": lambda: known.with_edges(of(lambda s, r: "mlp" not in r)),
        **{
            f"the edges into a head's {letter} decide about all three of its inputs.": partial(
                lambda letter: known.with_edges(letters(letter)), letter
            )
            for letter in "qkv"
        },
    }


# ----------------------------------------------------------------------------------------------------------- directions

Swap = Callable[[Tensor, Tensor], Tensor]  # (base's vector, source's vector) -> what stands there in the run on base


def swapped(known: Case, base: Tensor, source: Tensor, place: str, where: Tensor, swap: Swap) -> Tensor:
    """The logits with one vector of each prompt exchanged, by PyTorch's own hooks, prompt by prompt."""
    module = known.model.get_submodule(place)
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        known.model(source)
    handle.remove()

    def exchange(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        out = output.clone()
        for prompt, pos in enumerate(where.tolist()):
            out[prompt, pos] = swap(output[prompt, pos], seen[0][prompt, pos])
        return out

    handle = module.register_forward_hook(exchange)
    try:
        return known.model(base)
    finally:
        handle.remove()


def along(directions: Tensor) -> Swap:
    """The definition: direction by direction, the base's dot product is exchanged for the source's."""

    def swap(own: Tensor, other: Tensor) -> Tensor:
        out = own
        for direction in directions:
            out = out + ((other @ direction) - (own @ direction)) * direction
        return out

    return swap


def orthonormal(*rows: Tensor) -> Tensor:
    """Gram and Schmidt's basis of the rows' span."""
    found: list[Tensor] = []
    for row in rows:
        for other in found:
            row = row - (row @ other) * other
        found.append(row / row.norm())
    return torch.stack(found)


PLACES = [(0, "blocks.1.hook_resid_pre", 1), (0, "blocks.0.hook_mlp_out", 3), (1, "blocks.2.hook_resid_post", 2)]


def check_interchange_intervention(fn: Fn) -> None:
    """Three places, subspaces of one to three dimensions, positions that differ; then directions to refuse."""
    name = "interchange_intervention"
    for number, place, n_directions in PLACES:
        with case(number) as known:
            where = torch.tensor([2, 0, 3, 1][: len(known.clean)])
            rows = noise(n_directions, known.model.cfg.d_model, seed=7).to(known.weights.dtype)
            directions = orthonormal(*rows).requires_grad_()
            with (
                known.streams_stay(name),
                known.leaves_no_trace(name, positions=where, directions=directions),
                during(f"at {place}"),
            ):
                actual = fn(known.model, known.clean, known.corrupted, place, where, directions)
            run = partial(swapped, known, known.clean, known.corrupted, place)
            right = run(where, along(directions))
            label = f"{name} at {place}, {n_directions} direction{'s' * (n_directions > 1)}"
            mistakes = swap_mistakes(known, place, where, directions.detach())
            compare(label, actual, right, LOGITS, mistakes)
            if not actual.requires_grad:
                raise CheckFailed(
                    f"{name}: no gradient flows to `directions`.\n"
                    "  Next: only the run on `source` goes under torch.no_grad(); detach nothing in the other."
                )
            slopes = [torch.autograd.grad(known.metric(lo).sum(), directions)[0] for lo in (actual, right)]
            compare(f"{label}: the gradient of a metric", slopes[0], slopes[1], "direction d_model", None, 1e-3, 5e-5)
    refuses_crooked(name, fn)


def swap_mistakes(known: Case, place: str, where: Tensor, directions: Tensor) -> Wrong:
    """What common mistakes give."""
    run = partial(swapped, known, known.clean, known.corrupted, place)
    inside = directions.T @ directions

    def everywhere() -> Tensor:
        rolled = known.clean, known.corrupted
        module, seen = known.model.get_submodule(place), []
        handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        with torch.no_grad():
            known.model(rolled[1])
        handle.remove()
        handle = module.register_forward_hook(lambda module, inputs, own: own + (seen[0] - own) @ inside)
        try:
            return known.model(rolled[0])
        finally:
            handle.remove()

    return {
        "nothing is exchanged.": lambda: known.model(known.clean),
        "base and source are swapped.": lambda: swapped(
            known, known.corrupted, known.clean, place, where, along(directions)
        ),
        "the whole vector is exchanged, not only its part along the directions.": lambda: run(where, lambda a, b: b),
        "the part along the directions stays, and all the rest is exchanged.": lambda: run(
            where, lambda a, b: b + inside @ (a - b)
        ),
        "the source's part is added, and the base's own is not taken away.": lambda: run(
            where, lambda a, b: a + inside @ b
        ),
        "the base's part is taken away, and nothing comes in its place.": lambda: run(
            where, lambda a, b: a - inside @ a
        ),
        "it is the source's part alone: what is orthogonal to the directions is lost.": lambda: run(
            where, lambda a, b: inside @ b
        ),
        "the exchange is at all positions.": everywhere,
        "the exchange is at the last position.": lambda: run(
            torch.full_like(where, known.clean.shape[1] - 1), along(directions)
        ),
        "all prompts use the first one's position.": lambda: run(where[:1].expand_as(where), along(directions)),
        "the positions are off by one.": lambda: run(where + 1, along(directions)),
    } | (
        {"only the first direction is used.": lambda: run(where, along(directions[:1]))} if len(directions) > 1 else {}
    )


def refuses_crooked(name: str, fn: Fn) -> None:
    """Directions too long, too short, or not orthogonal."""
    with case(0) as known:
        first, second = orthonormal(*noise(2, known.model.cfg.d_model, seed=8))
        where = torch.tensor([2, 0, 3, 1])
        for words, rows in {
            "a direction of length 2": [2 * first],
            "a direction of length 0.9": [0.9 * first],
            "two directions that are not orthogonal": [first, (first + second) / 2**0.5],
        }.items():
            call = partial(fn, known.model, known.clean, known.corrupted, "blocks.1.hook_resid_pre", where)
            with nothing_left_behind(name, known.model):
                must_raise(name, ValueError, words, partial(call, torch.stack(rows)))


SEARCHES = [(0, "blocks.1.hook_resid_pre", 1, 3, 0.2), (1, "blocks.1.hook_resid_post", 2, 4, 0.1)]


def check_align_direction(fn: Fn) -> None:
    """The same search, step by step; what counts is the span of the directions."""
    name = "align_direction"
    for number, place, n_directions, steps, lr in SEARCHES:
        with case(number) as known:
            where = torch.tensor([2, 1, 3, 1][: len(known.clean)])
            generator = torch.Generator().manual_seed(11)
            quiet = redirect_stderr(io.StringIO())  # progress bars
            with known.leaves_no_trace(name, positions=where), quiet:
                actual = fn(
                    known.model, known.clean, known.corrupted, place, where, known.metric, generator, steps=steps,
                    lr=lr, n_directions=n_directions,
                )  # fmt: skip
            right = searched(number, place, n_directions, steps, lr)
            label = f"{name} at {place}, {steps} steps"
            compare(label, actual, right, "direction d_model", {}, rtol=1e9, atol=1e9)  # shape, dtype and device
            if actual.requires_grad:
                raise CheckFailed(f"{name}: what it returns has a graph.\n  Next: detach it.")
            products, identity = actual @ actual.T, torch.eye(n_directions).to(actual)
            compare(f"{label}: the directions' dot products", products, identity, "direction direction")
            searches: dict[str, tuple[Any, ...]] = {
                "the metric is made as large as possible.": (steps, lr, lambda values: F.softplus(-values).mean()),
                "the metric itself is minimised; its softplus stops where an answer has changed.": (
                    steps, lr, torch.mean,
                ),
                "the metric is minimised through a sigmoid.": (steps, lr, lambda values: values.sigmoid().mean()),
                "nothing is learned: these are the directions of the start.": (0, lr),
                "there is one step too few.": (steps - 1, lr),
                "`lr` is not used.": (steps, 0.05),
            }  # fmt: skip
            of = partial(span_of, number, place, n_directions)
            mistakes: Wrong = {hint: partial(of, *search) for hint, search in searches.items()}
            mistakes["base and source are swapped."] = partial(of, steps, lr, backwards=True)
            found = actual.T @ actual
            words = f"{label}: the projection on the directions"
            compare(words, found, right.T @ right, "d_model d_model", mistakes, rtol=1e-2, atol=2e-3)


def span_of(*search: Any, **wrong: Any) -> Tensor:
    """The projection on what a search finds."""
    directions = searched(*search, **wrong)
    return directions.T @ directions


def softplus_mean(values: Tensor) -> Tensor:
    """What is minimised."""
    return torch.log1p(values.exp()).mean()


@cache
def searched(
    number: int,
    place: str,
    n_directions: int,
    steps: int,
    lr: float,
    loss: Callable[[Tensor], Tensor] = softplus_mean,
    backwards: bool = False,
) -> Tensor:
    """The search, with Gram and Schmidt's directions."""
    known = case_of(number)
    where = torch.tensor([2, 1, 3, 1][: len(known.clean)])
    base, source = (known.corrupted, known.clean) if backwards else (known.clean, known.corrupted)
    raw = torch.randn(n_directions, known.model.cfg.d_model, generator=torch.Generator().manual_seed(11))
    raw = raw.to(known.weights.dtype).requires_grad_()
    optimiser = torch.optim.Adam([raw], lr=lr)
    for _ in range(steps):
        values = known.metric(swapped(known, base, source, place, where, along(orthonormal(*raw))))
        (raw.grad,) = torch.autograd.grad(loss(values), [raw])
        optimiser.step()
    return orthonormal(*raw.detach())
