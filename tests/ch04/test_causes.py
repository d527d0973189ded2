"""Chapter 04, causal evidence: its checks against mistakes that learners make, and other right answers."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import solutions.ch04_induction as ref
from course_utils.checks import find_checks, run_check
from course_utils.checks.ch04.causes import CFG, some_tokens
from course_utils.checks.standins.transformer import SmallModel
from course_utils.hooks import add_hook, hooks, reset_hooks, run_with_cache, run_with_hooks
from tests.ch04 import other_weights as other
from tests.support.mistakes import Mistake, assert_known_and_unknown, assert_quick, assert_refused
from tests.support.mutation import survivors

EXERCISES = ("ablate_heads", "ablation_scores")
CHECKS = {name: find_checks()["04"][name] for name in EXERCISES}
MISTAKES: list[Mistake] = []


def name_of(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def ablate(model: Any, tokens: Any, heads: Any, kind: str, reference: Any = None, **wrong: Any) -> Any:
    """ablate_heads with switches for what people get wrong."""
    if not wrong.get("lenient"):
        if kind not in ("zero", "mean", "resample") or (kind != "zero" and reference is None):
            raise ValueError(kind)
        same_pos = kind == "zero" or reference.shape[1] == tokens.shape[1]
        same_rows = kind != "resample" or len(reference) == len(tokens) or wrong.get("any_rows")
        if not same_pos or not same_rows:
            raise ValueError(kind)
    heads = wrong.get("choose", lambda model, heads: heads)(model, heads)
    others = {}
    if kind != "zero":
        source = tokens if wrong.get("of_tokens") and kind == "mean" else reference
        if wrong.get("reference_ablated"):
            zero = {name_of(layer): lambda z, hook: put(z, hook, torch.zeros_like(z)) for layer, _ in heads}

            def put(z: Any, hook: Any, other: Any) -> Any:
                z = z.clone()
                for layer, head in heads:
                    if name_of(layer) == hook.name:
                        z[:, :, head] = other[:, :, head]
                return z

            with hooks(model, zero):
                _, others = run_with_cache(model, source)
        else:
            _, others = run_with_cache(model, source)

    def stand_in(name: str, z: Any) -> Any:
        if kind == "zero":
            return torch.zeros_like(z)
        if kind == "resample":
            return wrong.get("rows", lambda other: other)(others[name])
        if "mean" in wrong:
            return wrong["mean"](others[name])
        return others[name].mean(0, keepdim=True)

    def replace(z: Any, hook: Any) -> Any:
        changed = z if wrong.get("in_place") else z.clone()
        other = stand_in(hook.name, z).expand_as(z)
        if wrong.get("last"):
            other = torch.cat([z[:, :-1], other[:, -1:]], 1)
        for layer, head in heads:
            if name_of(layer) == hook.name:
                changed[:, :, head] = other[:, :, head]
        return None if wrong.get("forgets") else changed

    names = {name_of(layer) for layer, _ in heads}
    if wrong.get("leaves_hooks"):
        for name in names:
            add_hook(model, name, replace)
        return model(tokens)
    if wrong.get("resets_hooks"):
        reset_hooks(model)
    return run_with_hooks(model, tokens, hooks=dict.fromkeys(names, replace))


def mistake(words: str, surprise: bool = False, **wrong: Any) -> None:
    def answer(model: Any, tokens: Any, heads: Any, kind: str, reference: Any = None) -> Any:
        return ablate(model, tokens, heads, kind, reference, **wrong)

    MISTAKES.append(Mistake("ablate_heads", words, answer, surprise))


def layer_of(model: Any, heads: Any) -> list[tuple[int, int]]:
    return [(layer, head) for layer in {layer for layer, _ in heads} for head in range(model.cfg.n_heads)]


mistake("all heads of the layer are ablated", choose=layer_of)
mistake(
    "ablated in another layer",
    choose=lambda model, heads: [((layer + 1) % model.cfg.n_layers, head) for layer, head in heads],
)
mistake("in every layer", choose=lambda model, heads: [(layer, head) for layer in range(2) for _, head in heads])
mistake("only the first pair in `heads` is ablated", choose=lambda model, heads: heads[:1])
mistake("only the last pair in `heads` is ablated", choose=lambda model, heads: heads[-1:])
mistake("layer and head are swapped", choose=lambda model, heads: [(head % 2, layer) for layer, head in heads])
mistake("over batch and positions", mean=lambda z: z.mean((0, 1), keepdim=True))
mistake("over the heads", mean=lambda z: z.mean((0, 2), keepdim=True))
mistake("the mean is that of `tokens`", of_tokens=True)
mistake("are summed", mean=lambda z: z.sum(0, keepdim=True))
mistake("only the first row of the reference", mean=lambda z: z[:1])
mistake("every row gets the first row", rows=lambda z: z[:1])
mistake("row i gets row i", rows=lambda z: z.flip(0))
mistake("shifted by one", rows=lambda z: z.roll(1, 1))
mistake("only the last position is ablated", last=True)
mistake("replaced as in zero ablation", reference_ablated=True)
mistake("nothing is ablated", forgets=True)
mistake("a hook is left behind", leaves_hooks=True)
mistake("hooks that others had attached", resets_hooks=True)
mistake("should raise ValueError", lenient=True, surprise=True)
mistake("should raise ValueError", any_rows=True, rows=lambda z: z[:2], surprise=True)
mistake("values are wrong", mean=lambda z: z.median(0, keepdim=True).values, surprise=True)
mistake("values are wrong", mean=lambda z: z.mean((0, 3), keepdim=True), surprise=True)
mistake("values are wrong", rows=lambda z: z.mean(1, keepdim=True), surprise=True)
mistake(
    "values are wrong", choose=lambda model, heads: [(layer, (head + 1) % 3) for layer, head in heads], surprise=True
)
# right wherever as many rows are means as are asked for
MISTAKES.append(
    Mistake(
        "ablate_heads",
        "over the positions",
        lambda model, tokens, heads, kind, reference=None: ablate(
            model,
            tokens,
            heads,
            kind,
            reference,
            **({"mean": lambda z: z.mean(1, keepdim=True)} if reference is not None and len(reference) == 2 else {}),
        ),
    )
)


def weights_zeroed(model: Any, tokens: Any, heads: Any, kind: str, reference: Any = None) -> Any:
    """Ablates by writing into W_O, for good."""
    if kind != "zero":
        return ablate(model, tokens, heads, kind, reference)
    with torch.no_grad():
        for layer, head in heads:
            model.blocks[layer].attn.W_O[head] = 0
    return model(tokens)


MISTAKES.append(Mistake("ablate_heads", "in place", weights_zeroed, True))


def score(words: str, surprise: bool = False, **wrong: Any) -> None:
    """ablation_scores with switches for what people get wrong."""

    def ablation_scores(model: Any, tokens: Any, n_half: int, kind: str, reference: Any = None) -> Any:
        reduce = wrong.get("reduce", lambda losses, n: losses[:, -n:].mean())

        def loss(logits: Any) -> Any:
            return reduce(ref.per_token_losses(logits, tokens), n_half)

        with torch.set_grad_enabled(bool(wrong.get("gradients"))):
            usual = loss(model(tokens))
            table, gone = [], []
            for layer in range(model.cfg.n_layers):
                for head in range(model.cfg.n_heads):
                    gone.append((layer, head))
                    heads = gone if wrong.get("together") else gone[-1:]
                    used = reference.flip(0) if wrong.get("flips") and reference is not None else reference
                    used = tokens if wrong.get("own") and kind != "zero" else used
                    table.append(loss(ablate(model, tokens, heads, wrong.get("kind", kind), used)))
            scores = torch.stack(table).reshape(model.cfg.n_layers, model.cfg.n_heads)
            return wrong.get("combine", lambda after, before: after - before)(scores, usual)

    MISTAKES.append(Mistake("ablation_scores", words, ablation_scores, surprise))


score("the sign is turned round", combine=lambda after, before: before - after)
score("it is the loss without the head", combine=lambda after, before: after)
score("over the whole text", reduce=lambda losses, n: losses.mean())
score("that of the first half", reduce=lambda losses, n: losses[:, :n].mean())
score("the losses are summed", reduce=lambda losses, n: losses[:, -n:].sum())
score("the texts of the batch are summed", reduce=lambda losses, n: losses[:, -n:].mean(1).sum())
score("only the first text of the batch", reduce=lambda losses, n: losses[:1, -n:].mean())
score("the last loss is left out", reduce=lambda losses, n: losses[:, -n:-1].mean())
score("the first loss of the second half is left out", reduce=lambda losses, n: losses[:, 1 - n :].mean())
score("the loss before the second half", reduce=lambda losses, n: losses[:, -n - 1 :].mean())
score("only the last loss counts", reduce=lambda losses, n: losses[:, -1].mean())
score("a transpose became a reshape", combine=lambda a, b: (a - b).T.reshape(a.shape))
score("expected (layer=2, head=3)", combine=lambda after, before: (after - before).T, surprise=True)
score("gradients are recorded", gradients=True, surprise=True)
score("values are wrong", together=True, surprise=True)
score("values are wrong", kind="zero", surprise=True)
score("values are wrong", flips=True, reduce=lambda losses, n: losses[:, -n:].median(), surprise=True)
score("values are wrong", own=True, surprise=True)
score("values are wrong", combine=lambda after, before: (after - before) / before, surprise=True)
score("values are wrong", combine=lambda after, before: (after - before).abs(), surprise=True)


@pytest.mark.parametrize("mistake", [pytest.param(m, id=f"{m.exercise}: {m.words[:50]}") for m in MISTAKES])
def test_mistake_is_refused_with_its_words(mistake: Mistake) -> None:
    assert_refused(CHECKS[mistake.exercise], mistake, secrets=("expand_as", "mean(dim", "[:, :, head]"))


@pytest.mark.parametrize("exercise", EXERCISES)
def test_every_exercise_has_mistakes_known_and_unknown(exercise: str) -> None:
    assert_known_and_unknown(MISTAKES, exercise)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_right_answers_pass(exercise: str) -> None:
    run_check(CHECKS[exercise], getattr(ref, exercise))
    run_check(CHECKS[exercise], getattr(other, exercise))


@pytest.mark.parametrize("exercise", EXERCISES)
def test_check_is_quick(exercise: str) -> None:
    assert_quick(CHECKS[exercise], getattr(other, exercise))


def test_zero_ablation_is_what_zeros_in_w_o_give() -> None:
    """An identity that needs no hooks."""
    model, tokens = SmallModel(CFG), some_tokens(CFG, 2, 6, seed=11)
    ablated = ref.ablate_heads(model, tokens, [(0, 2), (1, 0)], "zero")
    with torch.no_grad():
        model.blocks[0].attn.W_O[2] = 0
        model.blocks[1].attn.W_O[0] = 0
    torch.testing.assert_close(ablated, model(tokens))


def test_resampling_from_itself_changes_nothing() -> None:
    model, tokens = SmallModel(CFG), some_tokens(CFG, 2, 6, seed=11)
    torch.testing.assert_close(ref.ablate_heads(model, tokens, [(0, 2), (1, 0)], "resample", tokens), model(tokens))


# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "kind != 'zero' -> kind < 'zero'",  # of the three words, in the order of the alphabet
    "kind == 'resample' -> kind >= 'resample'",
    "kind == 'mean' -> kind <= 'mean'",
    "run_with_cache(model, reference, names=names) -> run_with_cache(model, reference)",
    "tuple(reference.shape) -> reference.shape",
    "tuple(tokens.shape) -> tokens.shape",
    "z.clone() -> z",  # nobody else reads that tensor
    "-n_half -> n_half",  # there are 2 n_half losses
}


@pytest.mark.slow
@pytest.mark.parametrize("exercise", EXERCISES)
def test_small_changes_of_the_reference_are_refused(exercise: str) -> None:
    assert survivors(Path(inspect.getfile(ref)), exercise, CHECKS[exercise]) <= STILL_RIGHT
