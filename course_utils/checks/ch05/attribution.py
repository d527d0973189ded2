"""Checks of chapter 05, attribution patching: every patch estimated at once, and along the way between two runs."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch05.case import Case, case_of, compare, leaves_no_trace, worked_out
from course_utils.checks.ch05.patching import SIZES, Fn, other_way, source_tokens
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.translating import during
from course_utils.hooks import hooks, run_with_cache

WATCHED = [
    "hook_embed",
    "blocks.0.attn.hook_z",
    "blocks.1.hook_resid_pre",
    "blocks.1.attn.hook_pattern",
    "blocks.0.hook_attn_out",
]
AXES = {
    "hook_embed": "batch pos d_model",
    "hook_z": "batch pos head d_head",
    "hook_resid_pre": "batch pos d_model",
    "hook_pattern": "batch head query key",
    "hook_attn_out": "batch pos d_model",
}


def gradients(case: Case, tokens: Tensor, embed: Tensor | None = None) -> dict[str, Tensor]:
    """How the metric, summed over the prompts, changes with something added at each of these places."""
    added: dict[str, Tensor] = {}

    def see(name: str, activation: Tensor) -> Tensor:
        if name == "hook_embed" and embed is not None:
            activation = embed
        if name in WATCHED:
            added[name] = torch.zeros_like(activation, requires_grad=True)
            return activation + added[name]
        return activation

    total = case.metric(case.model.compute(tokens, see)).sum()
    return dict(zip(added, torch.autograd.grad(total, list(added.values())), strict=True))


def compare_by_name(label: str, actual: Any, right: dict[str, Tensor]) -> None:
    """A dictionary of tensors, one for each hook point asked for."""
    if not isinstance(actual, dict) or set(actual) != set(right):
        got = f"one with {', '.join(map(str, actual)) or 'nothing'}" if isinstance(actual, dict) else repr(actual)[:40]
        raise CheckFailed(
            f"{label}: expected a dictionary with a tensor for each name, got {got}.\n"
            "  Next: return {name: ..., for each of `names`}."
        )
    for place in right:
        compare(f"{label}, at {place}", actual[place], right[place], AXES[place.split(".")[-1]], rtol=1e-3, atol=5e-5)
        if actual[place].requires_grad:
            raise CheckFailed(
                f"{label}: what it returns still has its graph.\n  Next: detach it; nobody differentiates it again."
            )


def slopes_and_sizes(
    model: Any, tokens: Any, metric: Any, names: Any, reduce: Callable[[Tensor], Tensor] = torch.sum
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, gradient and activation, of each place."""
    logits, cache = run_with_cache(model, tokens, names=names)
    found = torch.autograd.grad(reduce(metric(logits)), [cache[name] for name in names])
    return ((name, slope, cache[name].detach()) for name, slope in zip(names, found, strict=True))


def estimating(
    estimate: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda slope, source, own: slope * (source - own),
    reduce: Callable[[Tensor], Tensor] = torch.sum,
) -> Fn:
    """An attribution_patching with another estimate, or whose metric is reduced otherwise."""

    def attribution_patching(model: Any, tokens: Any, source_cache: Any, metric: Any, names: Any) -> Any:
        found = slopes_and_sizes(model, tokens, metric, names, reduce)
        return {name: estimate(slope, source_cache[name], own) for name, slope, own in found}

    return attribution_patching


def with_slopes_of_the_source(model: Any, tokens: Any, source_cache: Any, metric: Any, names: Any) -> Any:
    """An attribution_patching with the gradient of the other run."""
    _, own = run_with_cache(model, tokens, names=names)
    found = slopes_and_sizes(model, source_tokens(model, source_cache), metric, names)
    return {name: slope * (source - own[name]).detach() for name, slope, source in found}


@known_mistakes(
    {
        "the sign is wrong: the difference is the source minus the run's own.": estimating(
            lambda slope, source, own: slope * (own - source)
        ),
        "the gradient is multiplied by the source's activation, not by the difference.": estimating(
            lambda slope, source, own: slope * source
        ),
        "the gradient is multiplied by the run's own activation: that is not a patch.": estimating(
            lambda slope, source, own: slope * own
        ),
        "it is the gradient alone.": estimating(lambda slope, source, own: slope),
        "it is the difference alone.": estimating(lambda slope, source, own: source - own),
        "the gradient is that of the source's run; take it in the run on `tokens`.": with_slopes_of_the_source,
        "the roles are swapped: a run on the source's text, patched from the other.": other_way(estimating()),
        "the metric was averaged before the backward: each prompt has its own.": estimating(reduce=torch.mean),
    }
)
def check_attribution_patching(fn: Fn) -> None:
    """Gradient times difference at four kinds of places; parameters and cache stay as they are."""
    name = "attribution_patching"
    for sizes in SIZES:
        case = case_of(*sizes)
        with leaves_no_trace(name, case), during(case.words):
            actual = fn(case.model, case.tokens, case.cache(), case.metric, WATCHED)
        slopes = worked_out("slopes", case, lambda case: gradients(case, case.tokens))
        right = {place: slopes[place] * (case.source[place] - case.seen[place]) for place in WATCHED}
        compare_by_name(f"{name} {case.words}", actual, right)
        if case.model.runs > 2:
            raise CheckFailed(
                f"{name}: it ran the model {case.model.runs} times.\n"
                "  Next: one forward, one backward; the cache holds the source."
            )


def stepping(share: Callable[[int, int], float] = lambda step, steps: (step + 0.5) / steps, **wrong: Any) -> Fn:
    """An integrated_attribution with other steps.

    `wrong` may hold: `summed`, no mean is taken; `sign`; `here`, the difference is that from each step's own run.
    """

    def integrated_attribution(
        model: Any, tokens: Any, source_cache: Any, metric: Any, names: Any, steps: int = 8
    ) -> Any:
        with torch.no_grad():
            _, own = run_with_cache(model, tokens)
        far = source_cache["hook_embed"] - own["hook_embed"]
        sums = dict.fromkeys(names, 0.0)
        for step in range(steps):
            with hooks(model, {"hook_embed": lambda embed, hook, step=step: embed + share(step, steps) * far}):
                found = slopes_and_sizes(model, tokens, metric, names)
            for name, slope, here in found:
                way = source_cache[name] - (here if wrong.get("here") else own[name])
                sums[name] = sums[name] + slope * way * wrong.get("sign", 1) / (1 if wrong.get("summed") else steps)
        return sums

    return integrated_attribution


@known_mistakes(
    {
        "there is only the gradient at the start: that is attribution_patching.": stepping(lambda step, steps: 0.0),
        "the steps are taken at their beginnings; take their middles.": stepping(lambda step, steps: step / steps),
        "the steps are taken at their ends; take their middles.": stepping(lambda step, steps: (step + 1) / steps),
        "the sign is wrong: the difference is the source minus the run's own.": stepping(sign=-1),
        "the gradients are summed over the steps; take their mean.": stepping(summed=True),
    }
)
def check_integrated_attribution(fn: Fn) -> None:
    """One, two, five, and as many steps as by default, on the way from one run's embeddings to the other's."""
    name = "integrated_attribution"
    for sizes, steps in [(SIZES[0], 2), (SIZES[1], 1), (SIZES[0], 5), (SIZES[1], 8)]:
        case = case_of(*sizes)
        with leaves_no_trace(name, case), during(f"with steps={steps}"):
            given = () if steps == 8 else (steps,)
            actual = fn(case.model, case.tokens, case.cache(), case.metric, WATCHED, *given)
        right = worked_out(f"along {steps}", case, partial(along_the_way, steps=steps))
        compare_by_name(f"{name} with steps={steps} {case.words}", actual, right)


def along_the_way(case: Case, steps: int) -> dict[str, Tensor]:
    """The definition: the mean gradient at the middles of the steps, times the difference."""
    start, far = case.seen["hook_embed"], case.source["hook_embed"] - case.seen["hook_embed"]
    found = [gradients(case, case.tokens, start + (step + 0.5) / steps * far) for step in range(steps)]
    return {p: sum(g[p] for g in found) / steps * (case.source[p] - case.seen[p]) for p in WATCHED}
