"""Checks of chapter 05, edges, against a forward in which every receiver reads for itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks.by_loops import rotated
from course_utils.checks.ch05.case import compare, counted, gradients_stay, hooks_stay
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.standins.transformer import SmallModel
from course_utils.checks.translating import during
from course_utils.config import TransformerConfig
from course_utils.hooks import run_with_cache

Fn = Callable[..., Any]
Version = Callable[[str, Tensor, list[Tensor]], Tensor]  # a receiver, the stream, what was written -> what it reads
EDGES, LOGITS = "sender receiver", "batch pos d_vocab"

# Layers, heads, batch and positions all differ; with and without MLPs and LayerNorms.
USUAL = TransformerConfig(d_vocab=13, n_ctx=9, n_layers=2, n_heads=3, d_model=7, d_head=4, d_mlp=11)
ATTENTION_ONLY = TransformerConfig(
    d_vocab=11, n_ctx=10, n_layers=3, n_heads=2, d_model=5, d_head=3, attn_only=True, normalization="none"
)
# More than ten layers, and more than ten heads: names that do not sort as text. The deep one has rotary positions.
DEEP = replace(ATTENTION_ONLY, n_layers=11, n_heads=1, positions="rotary", rotary_dim=2)
WIDE = replace(USUAL, n_layers=1, n_heads=11)


def nodes(cfg: TransformerConfig) -> tuple[list[str], list[str]]:
    """The names of senders and receivers, in order."""
    senders, receivers = ["embed"], []
    for layer in range(cfg.n_layers):
        receivers += [f"{layer}.{head} {letter}" for letter in "qkv" for head in range(cfg.n_heads)]
        senders += [f"{layer}.{head}" for head in range(cfg.n_heads)]
        if not cfg.attn_only:
            receivers.append(f"mlp {layer}")
            senders.append(f"mlp {layer}")
    return senders, [*receivers, "final"]


def walk(
    model: Any,
    tokens: Tensor,
    version: Version = lambda name, resid, written: resid,
    moved: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The logits and what each sender wrote; `version` says what each receiver reads in place of the stream.

    It is told what was written before the layer's part at work. With `moved` the embeddings are elsewhere.
    """
    cfg = model.cfg
    resid = model.embed.W_E[tokens] + moved + model.pos_embed(tokens)
    outputs = [resid]
    future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    for layer, block in enumerate(model.blocks):
        attn, heads = block.attn, []
        for head in range(cfg.n_heads):
            q, k, v = (
                normal(block.ln1, version(f"{layer}.{head} {letter}", resid, outputs))
                @ getattr(attn, f"W_{letter.upper()}")[head]
                + getattr(attn, f"b_{letter.upper()}")[head]
                for letter in "qkv"
            )
            if cfg.positions == "rotary":
                q, k = (
                    rotated(x[:, :, None], range(x.shape[1]), cfg.rotary_dim, cfg.rotary_base)[:, :, 0] for x in (q, k)
                )
            scores = (q @ k.mT / cfg.d_head**0.5).masked_fill(future, -torch.inf)
            heads.append(scores.softmax(-1) @ v @ attn.W_O[head])
        outputs += heads
        resid = sum(heads, resid + attn.b_O)
        if not cfg.attn_only:
            pre = normal(block.ln2, version(f"mlp {layer}", resid, outputs)) @ block.mlp.W_in + block.mlp.b_in
            outputs.append(F.gelu(pre, approximate="tanh") @ block.mlp.W_out + block.mlp.b_out)
            resid = resid + outputs[-1]
    final = normal(model.ln_final, version("final", resid, outputs))
    return final @ model.unembed.W_U + model.unembed.b_U, torch.stack(outputs).detach()


def normal(norm: Any, resid: Tensor) -> Tensor:
    cfg = norm.cfg
    if cfg.normalization == "none":
        return resid
    return F.layer_norm(resid, (cfg.d_model,), norm.w, norm.b, cfg.layer_norm_eps)


class Case:
    """A small model with two batches of prompts, and a metric."""

    def __init__(self, cfg: TransformerConfig, n_batch: int, n_pos: int, dtype: torch.dtype) -> None:
        self.model = SmallModel(cfg).to(dtype)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.6)  # softmaxes that leave something to other keys
        self.clean, self.corrupted = (
            torch.randint(cfg.d_vocab, (n_batch, n_pos), generator=torch.Generator().manual_seed(seed))
            for seed in (1, 2)
        )
        self.weights = noise(n_batch, cfg.d_vocab, seed=3).to(dtype)
        self.words = (
            f"on {counted(n_batch, 'prompt')}, {counted(cfg.n_layers, 'layer')} of {counted(cfg.n_heads, 'head')}"
            f"{', no MLPs' * cfg.attn_only}{', rotary positions' * (cfg.positions == 'rotary')}"
        )

    def metric(self, logits: Tensor) -> Tensor:
        """One number per prompt, not linear, which asks for several positions."""
        last, second = ((logits[:, pos] * self.weights).sum(-1) for pos in (-1, 1))
        return torch.sin(last) + second.tanh() + self.weights[:, 0]

    @contextmanager
    def leaves_no_trace(self, name: str) -> Iterator[None]:
        """Hooks, and the parameters' gradients, are what they were."""
        with gradients_stay(name, self.model), hooks_stay(name, self.model), during(self.words):
            yield


@cache
def case_of(number: int) -> Case:
    """The four cases; whoever spoils one makes it anew."""
    cfg, n_batch, n_pos, dtype = [
        (USUAL, 4, 5, torch.float32),
        (ATTENTION_ONLY, 3, 4, torch.float64),
        (DEEP, 1, 2, torch.float64),
        (WIDE, 1, 2, torch.float32),
    ][number]
    return Case(cfg, n_batch, n_pos, dtype)


@contextmanager
def case(number: int) -> Iterator[Case]:
    """One of the cases, for one answer."""
    try:
        yield case_of(number)
    except BaseException:
        case_of.cache_clear()
        raise


# -------------------------------------------------------------------------------------------------------------- senders

Rows = dict[str, Tensor]  # what each sender writes


def sending(change: Callable[[Rows, Any, Any], Rows]) -> Fn:
    """A sender_outputs whose rows were changed; `change` gets them by name, the model, and the cache."""

    def sender_outputs(model: Any, cache: Any) -> Any:
        rows = {"embed": cache["resid_pre", 0]}
        for layer, block in enumerate(model.blocks):
            for head, z in enumerate(cache["z", layer].unbind(2)):
                rows[f"{layer}.{head}"] = z @ block.attn.W_O[head]
            if not model.cfg.attn_only:
                rows[f"mlp {layer}"] = cache["mlp_out", layer]
        return torch.stack(list(change(rows, model, cache).values()))

    return sender_outputs


def with_bias(share: Callable[[Any], float]) -> Fn:
    """A sender_outputs in which every head has a share of `b_O`."""
    return sending(
        lambda rows, model, cache: {
            name: row + (model.blocks[int(name[0])].attn.b_O * share(model.cfg) if "." in name else 0)
            for name, row in rows.items()
        }
    )


def reordered(key: Callable[[str], Any]) -> Fn:
    """A sender_outputs whose rows are sorted, all but the first."""

    def resorted(rows: Rows, model: Any, cache: Any) -> Rows:
        first, *others = rows
        return {name: rows[name] for name in [first, *sorted(others, key=key)]}

    return sending(resorted)


@known_mistakes(
    {
        "`b_O` is added to every head; it belongs to none.": with_bias(lambda cfg: 1.0),
        "`b_O` is divided among the heads; it belongs to none.": with_bias(lambda cfg: 1 / cfg.n_heads),
        "the first row is `hook_embed` alone, without the positions.": sending(
            lambda rows, model, cache: rows | {"embed": cache["embed"]}
        ),
        "layers and heads are mixed up: layer by layer come all heads of that layer.": reordered(
            lambda name: (name.partition(".")[2] or "mlp", name)
        ),
        "a layer's MLP comes before its heads.": reordered(lambda name: (name.removeprefix("mlp ")[0], "." in name)),
        "all MLPs come after all heads; go layer by layer.": reordered(lambda name: "mlp" in name),
    }
)
def check_sender_outputs(fn: Fn) -> None:
    """Every part, and what they sum to."""
    name = "sender_outputs"
    for number in range(4):
        with case(number) as known:
            with torch.no_grad(), known.leaves_no_trace(name):
                actual = fn(known.model, run_with_cache(known.model, known.clean)[1])
            right = walk(known.model, known.clean)[1]
            compare(f"{name} {known.words}", actual, right, "sender batch pos d_model")


# ---------------------------------------------------------------------------------------------------------- attribution


def there(model: Any) -> Tensor:
    """Which edges there are, by asking who can see whom."""
    senders, receivers = nodes(model.cfg)
    table = torch.zeros(len(senders), len(receivers), dtype=torch.bool)

    def look(name: str, resid: Tensor, written: list[Tensor]) -> Tensor:
        table[: len(written), receivers.index(name)] = True
        return resid

    walk(model, torch.zeros(1, 1, dtype=torch.long), look)
    return table


def slopes(model: Any, tokens: Tensor, metric: Callable[[Tensor], Tensor], moved: Tensor) -> Tensor:
    """How the metric's mean changes with what each receiver reads; one row for each."""
    shape = (*tokens.shape, model.cfg.d_model)
    added = {name: moved.new_zeros(shape, requires_grad=True) for name in nodes(model.cfg)[1]}
    logits, _ = walk(model, tokens, lambda name, resid, written: resid + added[name], moved)
    return torch.stack(torch.autograd.grad(metric(logits).mean(), list(added.values())))


def from_the_start(steps: int) -> list[float]:
    """How far on the way to the corrupted embeddings the gradient is taken."""
    return [step / steps for step in range(steps)]


def table_of_edges(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Any,
    steps: int = 1,
    *,
    shares: Callable[[int], list[float]] = from_the_start,
    difference: Callable[[Tensor, Tensor], Tensor] = lambda own, other: other - own,
    then: Callable[[Tensor, Any, int], Tensor] = lambda table, model, steps: table,
    masked: bool = True,
) -> Tensor:
    """Gradient times difference for every pair; the switches are for what people get wrong."""
    (_, own), (_, other) = (walk(model, tokens) for tokens in (clean, corrupted))
    W_E = model.embed.W_E.detach()
    far = W_E[corrupted] - W_E[clean]
    gradient = torch.stack([slopes(model, clean, metric, share * far) for share in shares(steps)]).mean(0)
    table = torch.einsum("sbpd,rbpd->sr", difference(own, other), gradient)
    return then(table * there(model) if masked else table, model, steps)


def attributing(**wrong: Any) -> Fn:
    """An edge_attribution with a switch of `table_of_edges` turned."""
    return partial(table_of_edges, **wrong)


def columns(rename: Callable[[str], str]) -> Fn:
    """An edge_attribution in which another receiver's column stands in the place of each."""

    def moved(table: Tensor, model: Any, steps: int) -> Tensor:
        receivers = nodes(model.cfg)[1]
        return table[:, [receivers.index(rename(name)) for name in receivers]]

    return attributing(then=moved)


def exchanged(first: str, second: str) -> Fn:
    """An edge_attribution in which the columns of two letters have changed places."""
    swap = {first: second, second: first}
    return columns(lambda name: name[:-1] + swap.get(name[-1], name[-1]) if "." in name else name)


def head_by_head(table: Tensor, model: Any, steps: int) -> Tensor:
    receivers = nodes(model.cfg)[1]
    stages = [name.partition(".")[0] for name in receivers]  # a layer's heads, its MLP, the end
    order = sorted(range(len(receivers)), key=lambda i: (stages.index(stages[i]), receivers[i].partition(" ")[0]))
    return table[:, order]


def several(shares: Callable[[int], list[float]]) -> Fn:
    """An edge_attribution that goes wrong where there are several steps."""
    return attributing(shares=lambda steps: [0.0] if steps == 1 else shares(steps))


@known_mistakes(
    {
        "the sign is wrong: the difference is the corrupted run minus the clean one.": attributing(
            difference=lambda own, other: own - other
        ),
        "scores without their sign are returned.": attributing(then=lambda table, model, steps: table.abs()),
        "clean and corrupted are swapped, in the gradient and in the difference.": (
            lambda model, clean, corrupted, metric, steps=1: table_of_edges(model, corrupted, clean, metric, steps)
        ),
        "the gradient comes from the corrupted run.": attributing(shares=lambda steps: [1.0]),
        "senders have scores for receivers that read before they write.": attributing(masked=False),
        "the metric is summed over the prompts; take its mean.": (
            lambda model, clean, corrupted, metric, steps=1: (
                table_of_edges(model, clean, corrupted, metric, steps) * len(clean)
            )
        ),
    },
    {
        f"{words[first]} and {words[second]} are swapped.": exchanged(first, second)
        for words in [{"q": "queries", "k": "keys", "v": "values"}]
        for first, second in combinations("qkv", 2)
    },
    {
        "the receivers of a layer are ordered head by head; all queries come first, then the keys.": attributing(
            then=head_by_head
        ),
        "the gradient is multiplied by what the sender wrote on the clean prompts; that is no difference.": attributing(
            difference=lambda own, other: own
        ),
        "the gradient is multiplied by what the sender wrote on the corrupted ones; that is no difference.": (
            attributing(difference=lambda own, other: other)
        ),
        "the steps are left out: the gradient is the clean run's alone.": attributing(shares=lambda steps: [0.0]),
        "the shares begin at 1/steps and end at 1; they begin at 0.": several(
            lambda steps: [(step + 1) / steps for step in range(steps)]
        ),
        "the shares are the middles of the parts; they begin at 0.": attributing(
            shares=lambda steps: [(step + 0.5) / steps for step in range(steps)]
        ),
        "the shares go from 0 to 1, both included; 1 is not reached.": several(
            lambda steps: [step / (steps - 1) for step in range(steps)]
        ),
        "the gradients are summed; take their mean.": attributing(then=lambda table, model, steps: table * steps),
        "only the last step's gradient is kept.": attributing(shares=lambda steps: [(steps - 1) / steps]),
    },
)
def check_edge_attribution(fn: Fn) -> None:
    """Every edge, with the gradient of the clean run (by default, too), and with several on the way."""
    name = "edge_attribution"
    for number, steps in ((0, 1), (0, 3), (1, 1), (1, 2), (3, 1)):
        with case(number) as known:
            with known.leaves_no_trace(name):
                options = {} if number == 3 else {"steps": steps}
                actual = fn(known.model, known.clean, known.corrupted, known.metric, **options)
            words = f"{name} {known.words}, steps={steps}"
            compare(words, actual, known_table(number, steps), EDGES, rtol=1e-3, atol=1e-6)
            if actual.requires_grad:
                raise CheckFailed(f"{words}: what it returns has a graph.\n  Next: differences need no gradients.")


@cache
def known_table(number: int, steps: int) -> Tensor:
    """The expected scores, worked out once."""
    known = case_of(number)
    return table_of_edges(known.model, known.clean, known.corrupted, known.metric, steps)


# ----------------------------------------------------------------------------------------------------------- kept edges


def with_edges(
    model: Any, clean: Any, corrupted: Any, edges: Any, *, from_clean_run: bool = False, to_nothing: bool = False
) -> Tensor:
    """The logits with only these edges, receiver by receiver and sender by sender.

    The switches: `from_clean_run`, kept edges carry what the senders wrote on the clean prompts, not what they write
    now; `to_nothing`, the others carry nothing.
    """
    receivers = nodes(model.cfg)[1]

    def version(name: str, resid: Tensor, written: list[Tensor]) -> Tensor:
        column = receivers.index(name)
        for row, wrote in enumerate(written):
            if not edges[row, column]:
                resid = resid + (0 if to_nothing else other[row]) - wrote
            elif from_clean_run:
                resid = resid + own[row] - wrote
        return resid

    with torch.no_grad():
        (_, own), (_, other) = (walk(model, tokens) for tokens in (clean, corrupted))
        return walk(model, clean, version)[0]


def keeping(change: Callable[[Tensor, list[str], list[str]], Tensor]) -> Fn:
    """A run_with_edges that keeps other edges; `change` gets them, the senders' and the receivers' names."""
    return lambda model, clean, corrupted, edges: with_edges(model, clean, corrupted, change(edges, *nodes(model.cfg)))


def never_cut(kept: Callable[[str, str], bool]) -> Fn:
    """A run_with_edges in which some edges stay, whatever is asked for."""
    return keeping(
        lambda edges, senders, receivers: edges | torch.tensor([[kept(s, r) for r in receivers] for s in senders])
    )


def of_letter(letter: str, edges: Tensor, senders: list[str], receivers: list[str]) -> Tensor:
    """For each head the edges of one letter, whatever the input."""
    return edges[:, [receivers.index(name[:-1] + letter if "." in name else name) for name in receivers]]


@known_mistakes(
    {
        "everything is kept.": keeping(lambda edges, senders, receivers: torch.ones_like(edges)),
        "nothing is kept.": keeping(lambda edges, senders, receivers: torch.zeros_like(edges)),
        "kept and cut are exchanged.": keeping(lambda edges, senders, receivers: ~edges),
        "clean and corrupted are swapped.": (
            lambda model, clean, corrupted, edges: with_edges(model, corrupted, clean, edges)
        ),
        "kept edges carry what the senders write on the clean prompts, not what they write in this run.": partial(
            with_edges, from_clean_run=True
        ),
        "the other edges carry nothing; they carry what the senders write on the corrupted prompts.": partial(
            with_edges, to_nothing=True
        ),
        "edges into the last LayerNorm are never cut.": never_cut(lambda sender, receiver: receiver == "final"),
        "edges from the embedding are never cut.": never_cut(lambda sender, receiver: sender == "embed"),
        "edges from the MLPs are never cut.": never_cut(lambda sender, receiver: "mlp" in sender),
        "edges into the MLPs are never cut.": never_cut(lambda sender, receiver: "mlp" in receiver),
    },
    {
        f"the edges into a head's {letter} decide about all three of its inputs.": keeping(partial(of_letter, letter))
        for letter in "qkv"
    },
)
def check_run_with_edges(fn: Fn) -> None:
    """Some edges, all, and none; entries where there is no edge are set at random. In a deep model some."""
    name = "run_with_edges"
    for number in (0, 1, 2):
        with case(number) as known:
            possible = there(known.model)
            draws = torch.rand(possible.shape, generator=torch.Generator().manual_seed(5))
            tries = {"some edges": draws > 0.4, "all edges": possible, "no edges": draws.gt(0.5) & ~possible}
            for words, edges in list(tries.items())[: 1 if number == 2 else 3]:
                with known.leaves_no_trace(name):
                    actual = fn(known.model, known.clean, known.corrupted, edges)
                right = with_edges(known.model, known.clean, known.corrupted, edges)
                compare(f"{name} with {words} {known.words}", actual, right, LOGITS, rtol=1e-3, atol=5e-5)
                if actual.requires_grad:
                    raise CheckFailed(f"{name}: gradients are recorded.\n  Next: put `@torch.no_grad()` above it.")
