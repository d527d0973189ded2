"""Checks of chapter 12, causes: texts spoiled in one way only, and one component at a time from the run on them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.ch12.small import Fn, ends, is_bracket, small_model, texts
from course_utils.checks.comparing import compare, compare_kind, unchanged
from course_utils.checks.leftovers import assert_stops, nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.outcomes import CheckFailed, Evidence, Stop
from course_utils.checks.plain import must_raise
from course_utils.data.brackets import BALANCED, END, START, UNBALANCED, decode, encode
from course_utils.hooks import HookPoint

# ------------------------------------------------------------------------------------------------------ spoiled texts

BALANCED_TEXTS = ("(())()", "()", "((()))()", "()()()", "(()())")


def lowest(text: str) -> int:
    return min(text[:end].count("(") - text[:end].count(")") for end in range(1, len(text) + 1))


def grounded(text: str) -> list[int]:
    """Where an opening bracket stands on elevation 0."""
    return [place for place in range(len(text)) if text[:place].count("(") == text[:place].count(")")]


def can_become(text: str, kind: str) -> set[str]:
    """All the texts that the statement allows."""
    closes = [place for place, bracket in enumerate(text) if bracket == ")"]
    if kind == "total":
        return {text[:place] + "(" + text[place + 1 :] for place in closes}
    return {
        text[:first] + ")" + text[first + 1 : second] + "(" + text[second + 1 :]
        for first in grounded(text)
        for second in closes
        if second > first
    }


Spoil = Callable[[str, Callable[[list[int]], int]], str]  # text, how to choose a place -> spoiled text


def turn(text: str, *places: int) -> str:
    """The text with these brackets turned round."""
    return "".join({"(": ")", ")": "("}[b] if place in places else b for place, b in enumerate(text))


def places_of(text: str, bracket: str) -> list[int]:
    return [place for place, found in enumerate(text) if found == bracket]


def total(text: str, choose: Callable[[list[int]], int]) -> str:
    return turn(text, choose(places_of(text, ")")))


def order(text: str, choose: Callable[[list[int]], int]) -> str:
    first = choose(grounded(text))
    return turn(text, first, choose([place for place in places_of(text, ")") if place > first]))


def spoiling(total: Spoil = total, order: Spoil = order, pick: Callable[[list[int], int], int] | None = None) -> Fn:
    """corrupted_pairs, text by text; `pick` chooses otherwise than by chance."""

    def corrupted_pairs(tokens: Tensor, kind: str, generator: torch.Generator) -> Tensor:
        if kind not in ("total", "order"):
            raise ValueError(kind)

        def choose(places: list[int]) -> int:
            drawn = int(torch.randint(len(places), (1,), generator=generator))
            return places[pick(places, drawn) if pick else drawn]

        spoil = total if kind == "total" else order
        return encode([spoil(text, choose) for text in decode(tokens)], tokens.shape[1])

    return corrupted_pairs


@known_mistakes(
    {
        "an OPEN is turned for the total; the elevation then falls below zero, and both failures come.": spoiling(
            total=lambda text, choose: turn(text, choose(places_of(text, "(")))
        ),
        "only one bracket is turned for the order; that spoils the total, and two must change places.": spoiling(
            order=lambda text, choose: turn(text, choose(grounded(text)))
        ),
        "any OPEN may be moved for the order; inside a deep pair, the elevation need not fall below zero.": spoiling(
            order=lambda text, choose: turn(text, first := choose(places_of(text, "(")),
                                            choose([place for place in places_of(text, ")") if place > first]))
        ),
        "any CLOSE may be moved for the order; one that stands before the OPEN lifts the elevation.": spoiling(
            order=lambda text, choose: turn(text, choose(grounded(text)), choose(places_of(text, ")")))
        ),
        "nothing is changed.": spoiling(total=lambda text, choose: text, order=lambda text, choose: text),
        "it is always the first candidate; each is equally likely.": spoiling(pick=lambda places, drawn: 0),
        "it is always the last candidate; each is equally likely.": spoiling(
            pick=lambda places, drawn: len(places) - 1
        ),
        "the two kinds are swapped.": spoiling(total=order, order=total),
        "the whole text is turned round for the order.": spoiling(order=lambda text, choose: text[::-1]),
    }
)  # fmt: skip
def check_corrupted_pairs(fn: Fn) -> None:
    """Many copies of each text: what comes out, whether all of it can, and how often."""
    name = "corrupted_pairs"
    n = 200
    for text in BALANCED_TEXTS:
        tokens = encode([text] * n, 11)
        for kind in ("total", "order"):
            call = f"{name} of {text!r}, {kind!r}"
            generator = torch.Generator().manual_seed(2)
            before = torch.get_rng_state()
            with unchanged(name, tokens=tokens):
                actual = fn(tokens, kind, generator)
            if not torch.equal(torch.get_rng_state(), before):
                raise CheckFailed(
                    f"{name}: it drew from torch's global generator.\n  Next: give `generator` to what draws."
                )
            if not isinstance(actual, Tensor) or actual.shape != tokens.shape:
                compare(call, actual, tokens, "batch pos")
            compare_kind(call, actual, tokens)
            _what_came(name, call, text, kind, actual)
            again = fn(tokens, kind, torch.Generator().manual_seed(2))
            if not torch.equal(again, actual):
                raise CheckFailed(
                    f"{name}: one seed gave two results.\n  Next: take every random number from `generator`."
                )
    tokens = encode(["(())()"] * 20, 11)
    generator = torch.Generator().manual_seed(3)
    if torch.equal(fn(tokens, "total", generator), fn(tokens, "total", generator)):
        raise CheckFailed(f"{name}: the second result is the first again.\n  Next: do not seed `generator` yourself.")
    mixed = fn(encode(BALANCED_TEXTS, 11), "order", generator)  # lengths of all kinds together
    for text, spoiled in zip(BALANCED_TEXTS, decode(mixed), strict=True):
        if spoiled not in can_become(text, "order"):
            raise CheckFailed(
                f"{name}: among texts of several lengths {text!r} became {spoiled!r}.\n"
                "  Next: choose the places in each row by itself."
            )
    tokens = encode(["()"], 11)
    call = f'{name}(tokens, "swap", generator)'
    must_raise(name, ValueError, call, partial(fn, tokens, "swap", torch.Generator()), 'there are "total" and "order".')


def _what_came(name: str, call: str, text: str, kind: str, actual: Tensor) -> None:
    outside = (actual[:, 0] != START).any() or (actual[:, len(text) + 1] != END).any()
    if outside or not is_bracket(actual[:, 1 : len(text) + 1]).all():
        raise CheckFailed(
            f"{name}: a row is no longer START, brackets, END, PAD.\n  {call}\n  Next: change brackets only."
        )
    came, allowed = decode(actual), can_become(text, kind)
    evidence = Evidence(f"what comes of {text} for {kind}", sorted(set(came)))
    for spoiled in came:
        if spoiled not in allowed:
            sum_, low = spoiled.count("(") - spoiled.count(")"), lowest(spoiled)
            raise CheckFailed(
                f"{name}: {text!r} became {spoiled!r}.\n  {call}\n"
                f"  its total is {sum_}, its lowest elevation {low}, and it differs in "
                f"{sum(a != b for a, b in zip(text, spoiled, strict=True))} brackets",
                evidence=evidence,
                advice="  Next: write down which brackets may be chosen in this text.",
            )
    if set(came) != allowed:
        raise CheckFailed(
            f"{name}: of {len(came)} copies of {text!r} none became {sorted(allowed - set(came))[0]!r}.\n  {call}",
            evidence=evidence,
            advice="  Next: every candidate must have its chance.",
        )
    counts = _expected(text, kind, len(came))
    for spoiled, expected in counts.items():
        if abs(came.count(spoiled) - expected) > 5 * expected**0.5:
            raise CheckFailed(
                f"{name}: {came.count(spoiled)} of {len(came)} copies of {text!r} became {spoiled!r}.\n  {call}\n"
                f"  expected about {expected:.0f}\n  Next: every candidate must have the same chance."
            )


def _expected(text: str, kind: str, n: int) -> dict[str, float]:
    """How often each text comes, on average."""
    if kind == "total":
        closes = places_of(text, ")")
        return {turn(text, place): n / len(closes) for place in closes}
    counts: dict[str, float] = {}
    for first in grounded(text):
        later = [place for place in places_of(text, ")") if place > first]
        for second in later:
            spoiled = turn(text, first, second)
            counts[spoiled] = counts.get(spoiled, 0) + n / len(grounded(text)) / len(later)
    return counts


# ------------------------------------------------------------------------------------------------------------- patching


def module_of(component: str) -> tuple[str, int | None]:
    """The hook point behind a label, and which head of it."""
    kind, number = component.split(" ")
    if kind == "mlp":
        return f"blocks.{number}.hook_mlp_out", None
    layer, head = number.split(".")
    return f"blocks.{layer}.attn.hook_result", int(head)


def patching(
    runs: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda clean, corrupted: (clean, corrupted),
    where: Callable[[Tensor], Tensor] = lambda mask: mask,
    head_of: Callable[[int | None], int | None] = lambda head: head,
    at: Callable[[Tensor], list[int]] = ends,
    sign: float = 1.0,
    component_of: Callable[[str], str] = lambda component: component,
    write: Callable[[Tensor, Tensor], Tensor] = lambda own, other: other,
) -> Fn:
    """scores_with_patch by PyTorch's own hooks, position by position."""

    @torch.no_grad()
    def scores_with_patch(model: Any, clean: Tensor, corrupted: Tensor, component: str, mask: Tensor) -> Tensor:
        base, source = runs(clean, corrupted)
        name, head = module_of(component_of(component))
        module, seen = model.get_submodule(name), []
        handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        model(source)
        handle.remove()

        def exchange(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            out = output.clone()
            for row, pos in where(mask).nonzero().tolist():
                place = (row, pos) if head is None or head_of(head) is None else (row, pos, head_of(head))
                out[place] = write(output[place], seen[0][place])
            return out

        handle = module.register_forward_hook(exchange)
        logits = model(base)
        handle.remove()
        return sign * torch.stack(
            [logits[row, place, UNBALANCED] - logits[row, place, BALANCED] for row, place in enumerate(at(base))]
        )

    return scores_with_patch


@known_mistakes(
    {
        "clean and corrupted are swapped: the run is on the clean texts.": patching(
            runs=lambda clean, corrupted: (corrupted, clean)
        ),
        "nothing is patched.": patching(where=torch.zeros_like),
        "the mask is ignored: the component is replaced everywhere.": patching(where=torch.ones_like),
        "the mask is turned round: it is replaced where the mask is False.": patching(where=torch.logical_not),
        "all heads of the layer are replaced, not only the one that was asked for.": patching(
            head_of=lambda head: None
        ),
        "the component is set to zero there; it is to write what it wrote in the corrupted run.": patching(
            write=lambda own, other: torch.zeros_like(own)
        ),
        "what it wrote in the corrupted run is added; it takes the place of what is there.": patching(
            write=lambda own, other: own + other
        ),
        "the sign is wrong: it is UNBALANCED minus BALANCED.": patching(sign=-1.0),
        "it reads the last position; a text is read at its own END.": patching(
            at=lambda tokens: [tokens.shape[1] - 1] * len(tokens)
        ),
        "it is the run on the corrupted texts, with nothing patched.": patching(
            runs=lambda clean, corrupted: (corrupted, corrupted)
        ),
        "the layer is ignored: it is always a component of layer 0.": patching(
            component_of=lambda component: component.replace(" 1", " 0")
        ),
    }
)
def check_scores_with_patch(fn: Fn) -> None:
    """Heads and MLPs of both layers, three masks, eleven heads; and that no hook stays, even after an exception."""
    name, model = "scores_with_patch", small_model(2, 2)
    clean, corrupted = texts(5), texts(5, others=True)
    end = clean == END
    masks = {"END": end, "all but END": ~end, "the first half": torch.arange(11).expand(5, 11) < 5}
    for component, places in {
        "head 0.1": ("the first half",),
        "mlp 0": ("END", "all but END"),
        "head 1.0": ("END",),
        "mlp 1": ("END",),
    }.items():
        for where in places:
            mask = masks[where]
            with unchanged(name, clean=clean, corrupted=corrupted, mask=mask):
                actual = fn(model, clean, corrupted, component, mask)
            right = patching()(model, clean, corrupted, component, mask)
            compare(f"{name} of {component!r} at {where}", actual, right, "batch")
            if actual.requires_grad:
                raise CheckFailed(f"{name}: gradients are recorded.\n  Next: run the model under `torch.no_grad()`.")
    many = small_model(1, 11)
    right = patching()(many, clean, corrupted, "head 0.10", end)
    compare(f"{name} of 'head 0.10'", fn(many, clean, corrupted, "head 0.10", end), right, "batch")
    arguments = (clean, corrupted, "head 1.0", end)
    double = small_model(2, 2).double()
    right = patching()(double, *arguments)
    compare(f"{name} in float64", fn(double, *arguments), right, "batch")
    with nothing_left_behind(name, model):
        fn(model, *arguments)
    _fails(model)
    with nothing_left_behind(f"{name} after a run that ended in an exception", model):
        assert_stops(name, lambda: fn(model, *arguments), "the model")


def _fails(model: Any) -> None:
    """Let the next run end in an exception, behind all blocks."""

    def stop(activation: Tensor, hook: HookPoint) -> None:
        raise Stop

    model.ln_final.hook_normalized.add(stop)
