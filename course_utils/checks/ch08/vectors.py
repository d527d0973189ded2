"""Checks of chapter 08, extracting: means at the last position, heads by their effect, and vectors from the best."""

import copy
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch08.small import (
    ROTARY,
    Fn,
    before_blocks,
    beginning,
    dataset,
    small_model,
    streams,
    tokens_of,
    without_graph,
)
from course_utils.checks.comparing import compare, compare_kind, follows_input, unchanged
from course_utils.checks.leftovers import nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence

Reduce = Callable[[Tensor], Tensor]  # of [batch pos d_model] -> [d_model]


def last_mean(activation: Tensor) -> Tensor:
    """Prompt by prompt."""
    return torch.stack([activation[row, -1] for row in range(len(activation))]).sum(0) / len(activation)


REDUCTIONS: dict[str, Reduce] = {  # how people bring [batch pos d_model] down to [d_model] instead
    "it is the mean over all positions; take the last.": lambda activation: activation.mean((0, 1)),
    "it is the first position; take the last.": lambda activation: activation[:, 0].mean(0),
    "it is the sum over the prompts; take the mean.": lambda activation: activation[:, -1].sum(0),
    "it is the first prompt alone; take the mean over all.": lambda activation: activation[0, -1],
    "it is the position before the last.": lambda activation: activation[:, -2].mean(0),
}


# ------------------------------------------------------------------------------------------------------------ residuals


def residuals(reduce: Reduce = last_mean, which: Callable[[Any, Tensor], list[Tensor]] = streams) -> Fn:
    @torch.no_grad()
    def mean_last_residual(model: Any, tokens: Tensor) -> Tensor:
        return torch.stack([reduce(resid) for resid in which(model, tokens)])

    return mean_last_residual


@torch.no_grad()
def only_added(model: Any, tokens: Tensor) -> list[Tensor]:
    return [after - before for after, before in zip(streams(model, tokens), before_blocks(model, tokens), strict=True)]


@known_mistakes(
    {words: residuals(reduce) for words, reduce in REDUCTIONS.items()},
    {
        "it is the stream before each block; take it after.": residuals(which=before_blocks),
        "it is what each block adds; take the whole stream after it.": residuals(which=only_added),
    },
)
def check_mean_last_residual(fn: Fn) -> None:
    """Three layers and one; a model of Llama's family."""
    name, axes = "mean_last_residual", "layer d_model"
    for model, n_batch in ((small_model(), 4), (small_model(1, attn_only=True), 1), (small_model(2, **ROTARY), 3)):
        tokens = tokens_of(n_batch, 5)
        with unchanged(name, tokens=tokens):
            actual = fn(model, tokens)
        without_graph(name, actual)
        compare(f"{name} of {n_batch} prompts", actual, residuals()(model, tokens), axes)
    with nothing_left_behind(name, model):
        fn(model, tokens)
    follows_input(name, fn, (model, tokens), axes)


# ---------------------------------------------------------------------------------------------------------------- heads


@torch.no_grad()
def head_results(model: Any, tokens: Tensor) -> Tensor:
    """[layer head batch pos d_model]: each head's output is what attention says if the other heads and b_O are zero."""
    before = before_blocks(model, tokens)
    layers = []
    for resid, block in zip(before, model.blocks, strict=True):
        heads = []
        for head in range(model.cfg.n_heads):
            alone = copy.deepcopy(block.attn)
            alone.W_O.zero_()
            alone.W_O[head] = block.attn.W_O[head]
            if hasattr(alone, "b_O"):
                alone.b_O.zero_()
            heads.append(alone(block.ln1(resid)))
        layers.append(torch.stack(heads))
    return torch.stack(layers)


def outputs(reduce: Reduce = last_mean, end: Callable[[Any, Tensor], Tensor] = lambda model, means: means) -> Fn:
    @torch.no_grad()
    def mean_head_outputs(model: Any, tokens: Tensor) -> Tensor:
        results = head_results(model, tokens)
        return end(model, torch.stack([torch.stack([reduce(head) for head in layer]) for layer in results]))

    return mean_head_outputs


def seen_z(model: Any, tokens: Tensor) -> Tensor:
    """The heads' z at the last position, before W_O: [layer batch head d_head]."""
    found: list[Tensor] = []
    handles = [block.attn.hook_z.add(lambda z, hook: found.append(z.detach()[:, -1].clone())) for block in model.blocks]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def in_first_layer_s_terms(model: Any, tokens: Tensor) -> Tensor:
    return torch.einsum("lhd,hdm->lhm", seen_z(model, tokens).mean(1), model.blocks[0].attn.W_O.detach())


def with_bias(model: Any, means: Tensor) -> Tensor:
    biases = torch.stack([block.attn.b_O for block in model.blocks])
    return means + biases[:, None] / means.shape[1]


@known_mistakes(
    {words: outputs(reduce) for words, reduce in REDUCTIONS.items()},
    {
        "it is the mean of `z`; a head writes z times its W_O.": lambda model, tokens: seen_z(model, tokens).mean(1),
        "`b_O` is shared out among the heads; it belongs to none.": outputs(end=with_bias),
        "every layer uses the W_O of layer 0.": in_first_layer_s_terms,
    },
)
def check_mean_head_outputs(fn: Fn) -> None:
    """Heads one at a time, three layers and one; a model of Llama's family."""
    name, axes = "mean_head_outputs", "layer head d_model"
    for model, n_batch in ((small_model(), 4), (small_model(1, 3), 1), (small_model(2, 3, **ROTARY), 5)):
        tokens = tokens_of(n_batch, 6)
        with unchanged(name, tokens=tokens):
            actual = fn(model, tokens)
        without_graph(name, actual)
        compare(f"{name} of {n_batch} prompts", actual, outputs()(model, tokens), axes)
    with nothing_left_behind(name, model):
        fn(model, tokens)
    follows_input(name, fn, (small_model(), tokens), axes)


# ------------------------------------------------------------------------------------------------------------- effects


def effects(
    means: Callable[[Any, Any, Any], Tensor] = lambda model, clean, corrupted: outputs()(model, clean.tokens),
    run_on: Callable[[Any, Any], Any] = lambda clean, corrupted: corrupted,
    positions: slice = slice(-1, None),
    heads: Callable[[int, int], list[int]] = lambda head, n_heads: [head],
    change: Callable[[Tensor, Tensor], Tensor] = lambda own, mean: mean - own,
    measure: Callable[[Tensor, Tensor], Tensor] = lambda logits, answers: (
        logits.softmax(-1).gather(1, answers[:, None]).mean()
    ),
    end: Callable[[Tensor, Tensor], Tensor] = lambda after, before: after - before,
) -> Fn:
    """A walk through the blocks, in which a head's output is exchanged by adding the difference."""

    @torch.no_grad()
    def causal_head_scores(model: Any, clean: Any, corrupted: Any) -> Tensor:
        mean, data = means(model, clean, corrupted), run_on(clean, corrupted)
        own, rows = head_results(model, data.tokens), []
        before = measure(model(data.tokens)[:, -1], data.answers)
        for layer in range(model.cfg.n_layers):
            for head in range(model.cfg.n_heads):
                rows.append(end(_exchanged(model, data, layer, heads(head, model.cfg.n_heads), own, mean), before))
        return torch.stack(rows).reshape(model.cfg.n_layers, model.cfg.n_heads)

    def _exchanged(model: Any, data: Any, layer: int, chosen: list[int], own: Tensor, mean: Tensor) -> Tensor:
        resid = beginning(model, data.tokens)
        for here, block in enumerate(model.blocks):
            if here != layer:
                resid = block(resid)
                continue
            moved = resid + block.attn(block.ln1(resid))
            for head in chosen:
                moved[:, positions] += change(own[layer, head][:, positions], mean[layer, head])
            resid = moved + block.mlp(block.ln2(moved)) if hasattr(block, "mlp") else moved
        return measure(model.unembed(model.ln_final(resid))[:, -1], data.answers)

    return causal_head_scores


def of_first(data: Any) -> Any:
    return SimpleNamespace(tokens=data.tokens[:1], answers=data.answers[:1])


@known_mistakes(
    {
        "the heads are scored on the clean prompts, where the task is shown already.": effects(
            run_on=lambda clean, corrupted: clean
        ),
        "the means come from the corrupted prompts; take them from the clean ones.": effects(
            means=lambda model, clean, corrupted: outputs()(model, corrupted.tokens)
        ),
        "clean and corrupted are swapped.": effects(
            means=lambda model, clean, corrupted: outputs()(model, corrupted.tokens),
            run_on=lambda clean, corrupted: clean,
        ),
        "the head is replaced at every position; only the last is meant.": effects(positions=slice(None)),
        "the mean is added to what the head writes; it takes its place.": effects(change=lambda own, mean: mean),
        "the head is taken out, and nothing comes in its place.": effects(change=lambda own, mean: -own),
        "all heads of the layer are replaced; it is one at a time.": effects(
            heads=lambda head, n_heads: list(range(n_heads))
        ),
        "it is the probability after the exchange; subtract the one before.": effects(end=lambda after, before: after),
        "the sign is wrong: it is after minus before.": effects(end=lambda after, before: before - after),
        "it is the change of the logit; take the probability.": effects(
            measure=lambda logits, answers: logits.gather(1, answers[:, None]).mean()
        ),
        "it is the change of the log-probability; take the probability.": effects(
            measure=lambda logits, answers: logits.log_softmax(-1).gather(1, answers[:, None]).mean()
        ),
        "it is the sum over the prompts; take the mean.": effects(
            measure=lambda logits, answers: logits.softmax(-1).gather(1, answers[:, None]).sum()
        ),
        "it is the first prompt alone; take the mean over all.": effects(
            run_on=lambda clean, corrupted: of_first(corrupted)
        ),
    }
)
def check_causal_head_scores(fn: Fn) -> None:
    """Against an exchange without hooks; more clean prompts than corrupted ones; no trace in the model."""
    name, axes = "causal_head_scores", "layer head"
    for model, n_clean, n_corrupted in ((small_model(2, 3), 5, 4), (small_model(1, 2, **ROTARY), 2, 3)):
        clean, corrupted = dataset(n_clean, 6, 1), dataset(n_corrupted, 6, 2)
        with nothing_left_behind(name, model), unchanged(name, clean=clean.tokens, corrupted=corrupted.tokens):
            actual = fn(model, clean, corrupted)
        without_graph(name, actual)
        right = effects()(model, clean, corrupted)
        compare(name, 100 * actual if isinstance(actual, Tensor) else actual, 100 * right, axes, rtol=1e-3)
    follows_input(name, lambda moved: fn(moved, clean, corrupted), (model,), axes)


# ----------------------------------------------------------------------------------------------------- the two vectors

Choose = Callable[[list[tuple[float, int]], int, int], list[int]]  # ((score, head), ...), n_heads, n_layers -> heads


def the_best(ranked: list[tuple[float, int]], n_heads: int, n_layers: int) -> list[int]:
    return [head for _, head in ranked[:n_heads]]


def summing(
    choose: Choose = the_best,
    end: Callable[[Tensor, int], Tensor] = lambda total, n_heads: total,
    rank: Callable[[float], float] = lambda score: score,
) -> Fn:
    """Sort the scores, and add up one head after the other."""

    def function_vector(head_outputs: Tensor, scores: Tensor, n_heads: int) -> Tensor:
        flat = head_outputs.reshape(-1, head_outputs.shape[-1])
        ranked = sorted(
            ((score, head) for head, score in enumerate(scores.flatten().tolist())), key=lambda pair: rank(pair[0])
        )
        total = torch.zeros_like(flat[0])
        for head in choose(ranked[::-1], n_heads, len(scores)):
            total = total + flat[head]
        return end(total, n_heads)

    return function_vector


def best_per_layer(ranked: list[tuple[float, int]], n_heads: int, n_layers: int) -> list[int]:
    per_layer = len(ranked) // n_layers
    return [head for layer in range(n_layers) for head in [h for _, h in ranked if h // per_layer == layer][:n_heads]]


def scored(n_layers: int = 3, n_heads: int = 4, d_model: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Outputs and scores; the most negative score is the largest in size."""
    scores = noise(n_layers, n_heads, seed=seed + 1)
    scores[-1, 0] = -9.0
    return noise(n_layers, n_heads, d_model, seed=seed), scores


@known_mistakes(
    {
        "it is the mean of the heads; take their sum.": summing(end=lambda total, n_heads: total / n_heads),
        "it is the heads of lowest score.": summing(rank=lambda score: -score),
        "scores are compared by size; a head that hurts has a negative one.": summing(rank=abs),
        "it is all heads.": summing(choose=lambda ranked, n_heads, n_layers: [head for _, head in ranked]),
        "it is so many heads of each layer; take the best of all layers together.": summing(choose=best_per_layer),
        "it is one head fewer.": summing(
            choose=lambda ranked, n_heads, n_layers: [head for _, head in ranked[: n_heads - 1]]
        ),
        "the sum is scaled to length 1.": summing(end=lambda total, n_heads: total / total.norm()),
    }
)
def check_function_vector(fn: Fn) -> None:
    """Several numbers of heads; scores of both signs."""
    name = "function_vector"
    for n_heads in (3, 1, 5, 12):
        head_outputs, scores = scored(seed=n_heads)
        with unchanged(name, head_outputs=head_outputs, scores=scores):
            actual = fn(head_outputs, scores, n_heads)
        compare(f"{name} of {n_heads} heads", actual, summing()(head_outputs, scores, n_heads), "d_model")
    follows_input(name, lambda *inputs: fn(*inputs, 3), scored(), "d_model")


def different_ones(pool: list[int], n: int, generator: torch.Generator) -> list[int]:
    return [pool[i] for i in torch.randperm(len(pool), generator=generator)[:n].tolist()]


def drawing(
    among: Callable[[list[int], int], list[int]] = lambda ranked, n_heads: ranked[n_heads:],
    draw: Callable[[list[int], int, torch.Generator], list[int]] = different_ones,
    end: Callable[[Tensor, Tensor], Tensor] = lambda total, like: total * like.norm() / total.norm(),
) -> Fn:
    """A random_head_vector that draws other heads, or ends otherwise."""

    def random_head_vector(head_outputs: Tensor, scores: Tensor, n_heads: int, generator: torch.Generator) -> Tensor:
        flat = head_outputs.reshape(-1, head_outputs.shape[-1])
        ranked = sorted(range(scores.numel()), key=lambda head: -scores.flatten().tolist()[head])
        total = torch.zeros_like(flat[0])
        for head in draw(among(ranked, n_heads), n_heads, generator):
            total = total + flat[head]
        return end(total, summing()(head_outputs, scores, n_heads))

    return random_head_vector


def twice_the_same(pool: list[int], n: int, generator: torch.Generator) -> list[int]:
    return [pool[i] for i in torch.randint(len(pool), (n,), generator=generator).tolist()]


@known_mistakes(
    {
        "the best heads can be among the random ones.": drawing(among=lambda ranked, n_heads: ranked),
        "a head can be drawn twice.": drawing(draw=twice_the_same),
        "the vector keeps its own norm; scale it to that of the function vector.": drawing(
            end=lambda total, like: total
        ),
        "the vector is scaled to length 1.": drawing(end=lambda total, like: total / total.norm()),
        "the heads are always the same ones; draw them.": drawing(draw=lambda pool, n, generator: pool[:n]),
        "one head is drawn; take as many as the function vector has.": drawing(
            draw=lambda pool, n, generator: [pool[int(torch.randint(len(pool), (1,), generator=generator))]]
        ),
        "it is a random direction, not the outputs of heads.": lambda head_outputs, scores, n_heads, generator: (
            drawing()(torch.randn(head_outputs.shape, generator=generator), scores, n_heads, generator)
        ),
    }
)
def check_random_head_vector(fn: Fn) -> None:
    """Each head writes into a coordinate of its own, so that a vector tells of which heads it is made."""
    name, n_layers, n_heads, n_drawn = "random_head_vector", 3, 4, 3
    size = n_layers * n_heads
    head_outputs = (torch.arange(1.0, size + 1)[:, None] * torch.eye(size)).reshape(n_layers, n_heads, size)
    scores = scored(seed=4)[1]
    best = set(scores.flatten().topk(n_drawn).indices.tolist())
    norm = float(summing()(head_outputs, scores, n_drawn).norm())
    seen: Counter[int] = Counter()
    together: set[tuple[int, ...]] = set()
    generator = torch.Generator().manual_seed(2)
    for number in range(120):
        with unchanged(name, head_outputs=head_outputs, scores=scores):
            actual = fn(head_outputs, scores, n_drawn, generator)
        like = torch.zeros(size)
        if not isinstance(actual, Tensor) or actual.shape != like.shape:
            compare(name, actual, like, "d_model")
        compare_kind(name, actual, like)
        share = actual / torch.arange(1.0, size + 1)
        drawn = [head for head in range(size) if share[head].abs() > 1e-6]
        count = "all" if len(drawn) == size else "one" if len(drawn) == 1 else f"{len(drawn)} heads"
        _told(
            name,
            len(drawn) > n_drawn or not set(drawn) & best,
            "best",
            f"draw {number} used heads {drawn}; the best are {sorted(best)}",
        )
        parts = share[drawn] / share[drawn].min() if drawn else share
        _told(
            name,
            len(drawn) == n_drawn and bool((parts - 1).abs().max() < 1e-4),
            count,
            f"draw {number} is not the sum of {n_drawn} different heads: "
            f"in it are {dict(zip(drawn, parts.tolist(), strict=False))}",
        )
        _told(
            name,
            bool((share[drawn] > 0).all()),
            "negative",
            f"draw {number} is the sum of {drawn}, times a negative number",
        )
        length = float(actual.norm())
        own = float(head_outputs.flatten(0, 1)[drawn].sum(0).norm())
        kind = next(
            (words for words, is_it in (("length 1", 1.0), ("own length", own)) if abs(length - is_it) < 1e-3), "length"
        )
        _told(
            name, abs(length - norm) < 1e-3 * norm, kind, f"its norm is {length:.4g}, the function vector's {norm:.4g}"
        )
        seen.update(drawn)
        together.add(tuple(drawn))
    for head in set(range(size)) - best:
        expected = 120 * n_drawn / (size - n_drawn)
        _told(
            name,
            expected / 2 < seen[head] < 2 * expected,
            "always" if max(seen.values()) == 120 else "even",
            f"in 120 draws head {head} came {seen[head]} times, expected about {expected:.0f}",
        )
    different = len(together)  # of 84; about 64 are to be expected
    _told(
        name, different > 40, "together", f"in 120 draws there were only {different} different sets of {n_drawn} heads"
    )
    first, again = (fn(head_outputs, scores, n_drawn, torch.Generator().manual_seed(5)) for _ in range(2))
    compare(f"{name} with the same seed", again, first, "d_model")
    others = scored(d_model=5)

    def seeded(*inputs: Tensor) -> Tensor:
        return fn(*inputs, 2, torch.Generator(inputs[0].device).manual_seed(1))

    follows_input(name, seeded, others, "d_model")


def _told(name: str, holds: bool, what: str, words: str) -> None:
    if not holds:
        raise CheckFailed(
            f"{name}: {words}.",
            evidence=Evidence(what, True),
            advice="  Next: draw different heads from all but the best, add them up, and scale the sum.",
        )
