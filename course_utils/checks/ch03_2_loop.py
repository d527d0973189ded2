# ruff: noqa: N802 (check_AdamW is named after its exercise)
"""Chapter 03, the loop: data, loss, schedule, optimizer, the step, its variants, and what lets a run go on.

Oracles are loops that spell the definition out, `torch.optim`, autograd, and what the file system says.
"""

import contextlib
import io
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_utils.checks.core import CheckFailed, Mistakes, compare, during, follows_input, unchanged
from course_utils.checks.modules import noise
from course_utils.checks.plain import must_raise, untouched
from course_utils.checks.training import (
    Grads,
    ToyLM,
    adamw_mistakes,
    bare_transformer,
    first_difference,
    loss_by_loop,
    number,
    side_by_side,
    toy_gradient,
    toy_tokens,
)
from course_utils.config import TransformerConfig

# ------------------------------------------------------------------------------------------------- data, loss, schedule


def check_pack_documents(fn: Callable[..., Any]) -> None:
    """Documents of all lengths, an empty one too; a stream that fills its rows exactly, and one that fills none."""
    documents = [[3, 1, 4], [], [15, 9], [2, 6, 5, 35, 8, 9, 7, 32], [93, 2], [38]]
    for n_ctx, bos, texts in [(4, 0, documents), (11, 50, documents), (5, 0, documents), (30, 0, documents)]:
        with untouched("pack_documents", documents=texts), during(f"with n_ctx={n_ctx}"):
            actual = fn(texts, n_ctx, bos)
        stream: list[int] = []
        for text in texts:
            stream.append(bos)
            stream.extend(text)
        before, after = stream, [token for text in texts for token in (*text, bos)]
        both = [token for text in texts for token in (bos, *text, bos)]
        single = [token for text in texts for token in [[bos, *text][i : i + n_ctx] for i in range(0, 9, n_ctx)]]
        padded = torch.tensor([row + [bos] * (n_ctx - len(row)) for row in single if row])
        per_text = [row for row in single if len(row) == n_ctx]
        mistakes = {
            "`bos` comes after each document; it begins one.": _rows(after, n_ctx),
            "`bos` stands on both sides of each document.": _rows(both, n_ctx),
            "there is no `bos`.": _rows([token for text in texts for token in text], n_ctx),
            "only the first document is begun by `bos`.": _rows([bos, *(x for text in texts for x in text)], n_ctx),
            "the last row, which is not full, is filled up with `bos`; drop it.": _rows(
                stream + [bos] * (-len(stream) % n_ctx), n_ctx
            ),
            "every document is cut, and filled up, by itself; they should follow each other.": padded,
            "every document is cut by itself, and its rest dropped.": _rows([x for r in per_text for x in r], n_ctx),
            "the rest is dropped at the beginning; drop it at the end.": _rows(stream[len(stream) % n_ctx :], n_ctx),
            "the last full row is dropped too.": _rows(stream, n_ctx)[:-1],
            "rows go down the columns; the stream runs along a row.": _rows(stream, n_ctx).flatten().view(n_ctx, -1).T,
        }
        right = _rows(before, n_ctx)
        mistakes = {hint: answer for hint, answer in mistakes.items() if not _equal(answer, right)}
        compare(f"pack_documents with n_ctx={n_ctx}", actual, right, "row pos", mistakes)


def _rows(stream: Sequence[int], n_ctx: int) -> Tensor:
    """Full rows only."""
    starts = range(0, len(stream) - n_ctx + 1, n_ctx)
    return torch.tensor([list(stream[start : start + n_ctx]) for start in starts], dtype=torch.long).view(-1, n_ctx)


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def check_lm_loss(fn: Callable[..., Any]) -> None:
    """The loop over predictions; then logits so far apart that exp overflows; then the gradient."""
    for n_batch, n_pos, scale in [(3, 5, 1.0), (1, 2, 1.0), (2, 4, 300.0)]:
        logits, tokens = scale * noise(n_batch, n_pos, 7, seed=1), toy_tokens(n_batch, n_pos, seed=2)
        right = loss_by_loop(logits, tokens)
        nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        late = F.cross_entropy(logits[:, 1:].transpose(1, 2), tokens[:, :-1], reduction="none")
        flat, ids = logits.flatten(0, 1), tokens.flatten()
        mistakes = {
            "the labels are not shifted: the logits at a position predict the token after it.": F.cross_entropy(
                flat, ids
            ),
            "the shift goes the wrong way: position 1 is made to predict token 0.": late.mean(),
            "the sum is taken; take the mean.": nats.sum(),
            "the sum over each row is taken, and the mean over rows.": nats.sum(1).mean(),
            "the sum is divided by batch * pos; there are only batch * (pos - 1) predictions.": nats.sum()
            / ids.numel(),
            "rows run into each other: the end of one predicts the beginning of the next.": F.cross_entropy(
                flat[:-1], ids[1:]
            ),
            "the labels are rolled, so that the last position predicts the first token.": F.cross_entropy(
                flat, tokens.roll(-1, 1).flatten()
            ),
            "only the last prediction of each row counts.": nats[:, -1].mean(),
            "the last prediction of each row is left out.": nats[:, :-1].mean(),
            "the minus sign is missing.": -nats.mean(),
            "it is in bits (logarithm to base 2); nats are asked for.": nats.mean() / math.log(2),
            "softmax is taken before cross_entropy, which does that itself.": F.cross_entropy(
                flat.softmax(-1).view_as(logits)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            ),
            "the logits themselves are averaged; a log_softmax is missing.": F.nll_loss(
                logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
            ),
            "the probabilities are averaged, not their logarithms.": -logits[:, :-1]
            .softmax(-1)
            .gather(2, tokens[:, 1:, None])
            .mean(),
            "it is the exponential of the mean, the perplexity.": nats.mean().exp(),
        }
        mistakes = {
            hint: answer for hint, answer in mistakes.items() if answer.isfinite() and not torch.allclose(answer, right)
        }
        with unchanged("lm_loss", logits=logits, tokens=tokens):
            actual = fn(logits, tokens)
        name = "lm_loss" if scale == 1 else "lm_loss with large logits"
        compare(name, actual, right, "", mistakes)
    _check_loss_gradient(fn)
    follows_input("lm_loss", fn, (noise(3, 5, 7), toy_tokens(3, 5)), "")


def _check_loss_gradient(fn: Callable[..., Any]) -> None:
    tokens = toy_tokens(3, 5, seed=3)
    logits, same = (noise(3, 5, 7, seed=4).requires_grad_() for _ in "ab")
    loss = fn(logits, tokens)
    if not loss.requires_grad:
        raise CheckFailed(
            "lm_loss: no gradient gets through it, so nothing could be learned from it.\n"
            "  Next: look for .item(), .detach(), torch.tensor(...) or torch.no_grad on the way."
        )
    loss.backward()
    loss_by_loop(same, tokens).backward()
    compare("lm_loss: the gradient that it sends into the logits", logits.grad, same.grad, "batch pos d_vocab")


def check_cosine_schedule(fn: Callable[..., Any]) -> None:
    """Whole curves, three steps beyond their end: a warm-up of four, of one, and none at all."""
    for warmup, total, peak, floor in [(4, 13, 0.9, 0.2), (0, 5, 0.5, 0.0), (1, 8, 2.0, 0.5), (7, 10, 1.0, 0.1)]:
        steps = range(total + 4)
        name = f"cosine_schedule(step, {warmup}, {total}, {peak}, {floor})"
        values = []
        with during(f"in {name}"):
            for step in steps:
                value = fn(step, warmup, total, peak, floor)
                if isinstance(value, bool) or not isinstance(value, int | float):
                    kind = "None" if value is None else f"a {type(value).__name__}"
                    raise CheckFailed(
                        f"cosine_schedule: expected a plain number at step {step}, got {kind}.\n"
                        "  Next: Python's own numbers and the module `math` are enough here."
                    )
                values.append(float(value))

        right, mistakes = _schedules(warmup, total, peak, floor, steps)
        compare(name, torch.tensor(values, dtype=torch.float64), right, "step", mistakes)


def _schedules(
    warmup: int, total: int, peak: float, floor: float, steps: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The right learning rates, and those of known mistakes that differ from them here."""

    def linear(step: int) -> float:
        return peak / warmup * (step + 1)

    def cosine(
        start: int = warmup, stop: int = total, top: float = peak, bottom: float = floor, turns: float = 0.5
    ) -> Callable[[int], float]:
        # cos^2 of half the angle, which is (1 + cos) / 2
        return lambda step: bottom + (top - bottom) * math.cos(math.pi * turns * (step - start) / (stop - start)) ** 2

    def curve(
        down: Callable[[int], float] = cosine(),  # noqa: B008 (a fixed function)
        up: Callable[[int], float] = linear,
        end: float | None = floor,
        last: int = total,
        first: int = warmup,
    ) -> Tensor:
        rates = [up(s) if s < first else end if s >= last and end is not None else down(s) for s in steps]
        return torch.tensor(rates, dtype=torch.float64)

    mistakes = {
        "the rate rises again after step `total`; it should stay at `floor`.": curve(end=None),
        "the rate is 0 after the end; it should be `floor`.": curve(end=0.0),
        "the cosine is a step early: it reaches `floor` at step total - 1.": curve(
            cosine(stop=max(total - 1, warmup + 1)), last=total - 1
        ),
        "the cosine is a step ahead: it begins at warmup - 1 and reaches `floor` at step total - 1.": curve(
            cosine(warmup - 1, total - 1), last=total - 1
        ),
        "the cosine begins at step warmup - 1; it begins at `warmup`.": curve(cosine(warmup - 1)),
        "the warm-up is not taken off: at its end the cosine has already come part of the way.": curve(cosine(0)),
        "the cosine takes `total` steps from the end of the warm-up; it ends at step `total`.": curve(
            cosine(stop=warmup + total), last=warmup + total
        ),
        "it falls in a straight line.": curve(lambda s: peak + (floor - peak) * (s - warmup) / (total - warmup)),
        "it is a whole cosine: down in the middle and up again.": curve(cosine(turns=1.0)),
        "the factor 1/2 is missing.": curve(lambda s: 2 * cosine()(s) - floor),
        "`floor` is left out: the cosine goes down to 0.": curve(cosine(bottom=0.0), end=0.0),
        "`floor` is left out of the cosine, and the rate jumps to it at the end.": curve(cosine(bottom=0.0)),
        "the cosine swings by `peak` above `floor`; it should swing by peak - floor.": curve(cosine(top=peak + floor)),
        "`floor` is taken for a share of `peak`; it is a learning rate.": curve(
            cosine(bottom=floor * peak), end=floor * peak
        ),
    }
    if warmup:
        mistakes |= {
            "the warm-up is a step late: it begins at 0 and reaches `peak` at step `warmup`.": curve(
                up=lambda s: peak * s / warmup
            ),
            "there is no warm-up.": curve(up=lambda s: peak),
            "there is no warm-up: the cosine begins at step 0.": curve(cosine(0), first=0),
            "the warm-up begins at `floor`; it begins at peak / warmup.": curve(
                up=lambda s: floor + (peak - floor) * s / warmup
            ),
        }
    right = curve()
    return right, {hint: answer for hint, answer in mistakes.items() if not torch.allclose(answer, right)}


# -------------------------------------------------------------------------------------------------------- the optimizer

SHAPES = ((3, 5), (4,), (), (2, 3, 2))
SIZES = (1.0, 0.01, 30.0, 0.3)  # of the gradients: Adam should not care


def _start(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(noise(*shape, seed=20 + i).to(dtype)) for i, shape in enumerate(SHAPES)]


def _gradients(n_steps: int, dtype: torch.dtype = torch.float32, gaps: bool = True) -> list[list[Tensor | None]]:
    """One for each parameter and step; parameter 1 sometimes has none."""
    return [
        [
            None if gaps and i == 1 and step % 3 == 0 else size * (noise(*shape, seed=100 * step + i) + 0.4).to(dtype)
            for i, (shape, size) in enumerate(zip(SHAPES, SIZES, strict=True))
        ]
        for step in range(n_steps)
    ]


def check_AdamW(cls: Any) -> None:
    """Against torch.optim.AdamW: one group, then three whose learning rate changes, over fifty steps."""
    _check_construction(cls)
    plain = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.02, "weight_decay": 0.4}
    _race(cls, "AdamW with one group, no gradient missing", lambda ps: (p for p in ps), plain, 4, gaps=False)
    _race(cls, "AdamW with one group", list, plain, 5)

    def three(ps: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        first = {"params": [ps[2]], "lr": 0.2, "weight_decay": 0.0, "betas": (0.5, 0.7)}
        return [first, {"params": [ps[0], ps[3]], "eps": 0.3}, {"params": [ps[1]], "weight_decay": 0.9, "lr": 0.01}]

    _race(
        cls,
        "AdamW with three groups, whose lr changes between steps",
        three,
        plain,
        50,
        dtype=torch.float64,
        anneal=True,
    )
    _check_zero_grad(cls)
    _check_state(cls, plain)


def _check_construction(cls: Any) -> None:
    keep = "Next: keep the methods that were given (the statement holds them)."
    if not isinstance(cls, type):
        raise CheckFailed(f"AdamW: expected a class.\n  {keep}")
    groups = getattr(cls(_start()), "param_groups", None)
    if not isinstance(groups, list) or not all(isinstance(group, dict) and "params" in group for group in groups):
        raise CheckFailed(f"AdamW: `param_groups` should be a list of dicts.\n  {keep}")


def _race(
    cls: Any,
    name: str,
    grouped: Callable[[Sequence[nn.Parameter]], Any],
    options: dict[str, Any],
    n_steps: int,
    dtype: torch.dtype = torch.float32,
    gaps: bool = True,
    anneal: bool = False,
) -> None:
    ours, theirs = _start(dtype), _start(dtype)
    optimizer, oracle = cls(grouped(ours), **options), torch.optim.AdamW(grouped(theirs), **options)
    gradients = _gradients(n_steps, dtype, gaps)
    rates = [[group["lr"] for group in oracle.param_groups]]
    for step, grads in enumerate(gradients):
        if anneal and step:
            rates.append([rate * 0.93**step for rate in rates[0]])
        for group, same, rate in zip(optimizer.param_groups, oracle.param_groups, rates[-1], strict=True):
            group["lr"] = same["lr"] = rate
        for mine, other, grad in zip(ours, theirs, grads, strict=True):
            mine.grad, other.grad = (None, None) if grad is None else (grad.clone(), grad.clone())
        with unchanged(name, **{f"gradient {i}": p.grad for i, p in enumerate(ours) if p.grad is not None}):
            optimizer.step()
        oracle.step()
        if step in (0, 1, n_steps - 1):
            where = oracle.param_groups

            def of(at: int, i: int | None, where: Any = where) -> tuple[float, ...]:
                owners = (
                    n for n, group in enumerate(where) if i is not None and any(p is theirs[i] for p in group["params"])
                )
                index = next(owners, 0)
                group = where[index]
                rate = rates[min(at, len(rates) - 1)][index]
                return (rate, *group["betas"], group["eps"], group["weight_decay"])

            compare(
                f"{name}: all parameters, side by side, after {step + 1} step{'s' * (step > 0)}",
                side_by_side(ours),
                side_by_side(theirs),
                "number",
                adamw_mistakes(_start(dtype), gradients[: step + 1], of),
            )


def _check_zero_grad(cls: Any) -> None:
    parameters = _start()
    optimizer = cls([{"params": parameters[:1]}, {"params": parameters[1:]}])
    for parameter in parameters[1:]:
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for p in parameters]
    optimizer.zero_grad()
    for number_of, parameter in enumerate(parameters):
        if parameter.grad is not None:
            all_zero = not parameter.grad.any()
            raise CheckFailed(
                f"AdamW.zero_grad: the `.grad` of parameter {number_of} should be None afterwards, but is "
                + (
                    "full of zeros.\n  Next: with zeros, `step` would go on moving and decaying it."
                    if all_zero
                    else "still there.\n  Next: visit the parameters of every group."
                )
            )
    if not torch.equal(side_by_side(before), side_by_side(parameters)):
        raise CheckFailed("AdamW.zero_grad: it changed the parameters.\n  Next: change their `.grad` alone.")


def _check_state(cls: Any, options: dict[str, Any]) -> None:
    """A fresh optimizer that gets the state of a used one goes on as that would have."""
    gradients = _gradients(6)
    first, second = _start(), _start()
    used = cls(first, **options)

    def go(optimizer: Any, parameters: Sequence[nn.Parameter], part: Sequence[Grads]) -> None:
        for grads in part:
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            optimizer.step()

    go(used, first, gradients[:3])
    with torch.no_grad():
        for p, source in zip(second, first, strict=True):
            p.copy_(source)
    fresh = cls(second)
    with during("in state_dict and load_state_dict"):
        fresh.load_state_dict(_through_a_file(used.state_dict()))
        go(fresh, second, gradients[3:])
    go(used, first, gradients[3:])
    compare(
        "AdamW after load_state_dict: all parameters, side by side",
        side_by_side(second),
        side_by_side(first),
        "number",
    )


def _through_a_file(state: Any) -> Any:
    """What torch.save and torch.load make of it, plain data alone."""
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise CheckFailed(
            f"AdamW.state_dict: it cannot be saved and loaded as plain data ({type(error).__name__}: {reason}).\n"
            "  Next: make it of dicts, lists, numbers and tensors only."
        ) from None


def check_parameter_groups(fn: Callable[..., Any]) -> None:
    """By name, for a model with MLPs and one without; in this course's model, biases may have two axes."""
    for decay, attn_only in [(0.3, False), (0.07, True)]:
        cfg = TransformerConfig(
            d_vocab=13, n_ctx=9, n_layers=2, n_heads=3, d_model=7, d_head=6, d_mlp=11, attn_only=attn_only
        )
        model = bare_transformer(cfg)
        groups = fn(model, decay)
        _check_groups_shape(groups)
        names = {parameter: name for name, parameter in model.named_parameters()}
        found: dict[str, float] = {}
        for group in groups:
            for parameter in group["params"]:
                if parameter not in names:
                    raise CheckFailed(
                        "parameter_groups: it returned a tensor that is no parameter of the model.\n"
                        "  Next: hand on the parameters themselves, not copies, names or `.data`."
                    )
                if names[parameter] in found:
                    raise CheckFailed(
                        f"parameter_groups: `{names[parameter]}` comes twice, so it would be updated twice.\n"
                        "  Next: every parameter belongs to one group."
                    )
                found[names[parameter]] = group["weight_decay"]
        _compare_decays(found, model, decay)
        for group in groups:
            own = [names[parameter] for parameter in group["params"]]
            if own != [name for name in names.values() if name in set(own)]:
                raise CheckFailed(
                    "parameter_groups: the parameters are not in the order of model.named_parameters().\n"
                    "  Next: keep it; a saved optimizer finds its parameters by their place."
                )


def _check_groups_shape(groups: object) -> None:
    keys = "Next: return a list of two dicts, each with the keys 'params' (a list) and 'weight_decay' (a number)."
    if not isinstance(groups, list | tuple) or not all(isinstance(group, dict) for group in groups):
        raise CheckFailed(f"parameter_groups: expected a list of dicts, got a {type(groups).__name__}.\n  {keys}")
    for group in groups:
        for key in ("params", "weight_decay"):
            if key not in group:
                raise CheckFailed(f"parameter_groups: a group has no {key!r}.\n  {keys}")
        if not isinstance(group["params"], list | tuple):
            kind = type(group["params"]).__name__
            raise CheckFailed(f"parameter_groups: 'params' should be a list, got a {kind}.\n  {keys}")


def _compare_decays(found: dict[str, float], model: nn.Module, decay: float) -> None:
    named = dict(model.named_parameters())
    missing = [name for name in named if name not in found]
    if missing:
        raise CheckFailed(
            f"parameter_groups: `{missing[0]}` is in no group, so it would never be trained"
            + (f" (and {len(missing) - 1} more)." if len(missing) > 1 else ".")
            + "\n  Next: what does not decay belongs into the second group."
        )

    def rule(decays: Callable[[str], bool]) -> dict[str, float]:
        return {name: decay if decays(name) else 0.0 for name in named}

    def symbol(name: str) -> str:
        return name.split(".")[-1]

    tables = ("W_E", "W_pos", "W_U")

    def right(name: str) -> bool:
        return symbol(name).startswith("W_") and symbol(name) not in tables

    expected = rule(right)
    if found == expected:
        return
    first = next(name for name in named if found[name] != expected[name])
    causes = {
        "everything decays.": rule(lambda name: True),
        "nothing decays.": rule(lambda name: False),
        "the two groups are swapped.": rule(lambda name: not right(name)),
        "every tensor with two axes or more decays; `b_Q`, `b_K` and `b_V` have two, one per head.": rule(
            lambda name: named[name].dim() >= 2
        ),
        "every tensor with two axes or more decays but the tables; `b_Q`, `b_K` and `b_V` have two.": rule(
            lambda name: named[name].dim() >= 2 and symbol(name) not in tables
        ),
        "the tables at both ends decay too (W_E, W_pos, W_U).": rule(lambda name: symbol(name).startswith("W_")),
        "the embeddings decay too (W_E, W_pos).": rule(lambda name: right(name) or symbol(name) in ("W_E", "W_pos")),
        "the token embeddings decay too (W_E).": rule(lambda name: right(name) or symbol(name) == "W_E"),
        "the unembedding decays too (W_U), a table like W_E.": rule(lambda name: right(name) or symbol(name) == "W_U"),
        "biases decay too.": rule(lambda name: right(name) or symbol(name).startswith("b_")),
        "LayerNorm's `w` and `b` decay too.": rule(lambda name: right(name) or symbol(name) in ("w", "b")),
        "everything inside the blocks decays, biases and LayerNorm too.": rule(lambda name: name.startswith("blocks")),
    }
    hints = [f"\n  This is what you get if {hint}" for hint, answer in causes.items() if answer == found]
    raise CheckFailed(
        f"parameter_groups: wrong decay for {sum(found[n] != expected[n] for n in named)} of {len(named)} parameters.\n"
        f"  first at `{first}`, of shape {tuple(named[first].shape)}: expected {expected[first]}, got {found[first]}"
        + (hints[0] if hints else "\n  Next: the last part of a name tells what it is; print names and decay.")
    )


# ------------------------------------------------------------------------------------------------------------- the step


def check_clip_grad_norm(fn: Callable[..., Any]) -> None:
    """A gradient that is too long, one that is not, and none at all; parameters come from a generator."""
    shapes = ((3, 5), (4,), (2,), ())
    for max_norm in (0.7, 2.0, 1000.0):
        parameters = [nn.Parameter(noise(*shape, seed=40 + i)) for i, shape in enumerate(shapes)]
        for i in (0, 1, 3):
            parameters[i].grad = noise(*shapes[i], seed=50 + i) * (1.5 if i else 0.5)
        grads = [p.grad.clone() for p in parameters if p.grad is not None]
        norm = side_by_side(grads).double().norm().item()
        case = f"clip_grad_norm with max_norm={max_norm}, a norm of {norm:.3g}"
        with unchanged("clip_grad_norm", **{f"parameter {i}": p for i, p in enumerate(parameters)}), during(case):
            actual = fn((parameter for parameter in parameters), max_norm)
        if parameters[2].grad is not None:
            raise CheckFailed(
                f"{case}: a parameter that had no gradient has one now.\n  Next: pass over those whose `.grad` is None."
            )
        lost = [i for i in (0, 1, 3) if parameters[i].grad is None]
        if lost:
            raise CheckFailed(f"{case}: the gradient of parameter {lost[0]} is gone.\n  Next: scale it, keep it.")
        got, factor = side_by_side(p.grad for p in parameters if p.grad is not None), min(1.0, max_norm / norm)
        whole, each = side_by_side(grads), [g.norm().item() for g in grads]
        own = side_by_side(g * min(1.0, max_norm / n) for g, n in zip(grads, each, strict=True))
        mistakes = {
            "each tensor is clipped by its own norm, which turns the gradient; one factor is for all.": own,
            "the gradient is always brought to `max_norm`: a short one is scaled up.": whole * (max_norm / norm),
            "every number is clamped to [-max_norm, max_norm].": whole.clamp(-max_norm, max_norm),
            "nothing is clipped (a generator can be run through only once).": whole,
            "the factor is 1 / norm; it is max_norm / norm.": whole / norm,
            "the factor is max_norm; it is max_norm / norm.": whole * max_norm,
            "the factor is max_norm / norm^2: the root is missing.": whole * min(1.0, max_norm / norm**2),
            "the norm is the sum of the tensors' norms; add their squares.": whole * min(1.0, max_norm / sum(each)),
            "the norm is that of the first tensor.": whole * min(1.0, max_norm / each[0]),
            "the norm is that of the last tensor.": whole * min(1.0, max_norm / each[-1]),
            "the largest number counts as the norm.": whole * min(1.0, max_norm / whole.abs().max().item()),
            "the absolute values are added up; the norm is the root of the sum of squares.": whole
            * min(1.0, max_norm / whole.abs().sum().item()),
        }
        right = whole * factor
        mistakes = {hint: answer for hint, answer in mistakes.items() if not torch.allclose(answer, right)}
        compare(f"{case}: all gradients, side by side", got, right, "number", mistakes)
        known = {
            "it is the norm after clipping.": min(norm, max_norm),
            "it is the square of the norm.": norm**2,
            "it is the factor.": factor,
            "the tensors' norms are added; add their squares.": sum(each),
        }
        known = {hint: value for hint, value in known.items() if not math.isclose(value, norm, rel_tol=1e-3)}
        number(case, "the norm before clipping", actual, norm, known)
    nobody = nn.Parameter(noise(3))
    with during("with no gradient at all"):
        number("clip_grad_norm with no gradient at all", "the norm", fn([nobody], 1.0), 0.0)


class _NotingSGD(torch.optim.SGD):
    """An optimizer that says when it is called."""

    def __init__(self, model: ToyLM, lr: float) -> None:
        super().__init__(model.parameters(), lr=lr)
        self.events = model.events

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.events.append("zero_grad")
        super().zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        self.events.append("step")
        return super().step(closure)


def check_train_step(fn: Callable[..., Any]) -> None:
    """Three steps of plain gradient descent, worked out apart; at first, there are gradients of something else."""
    lr = 0.7
    for max_norm, training in [(None, True), (0.2, False), (50.0, True)]:
        model = ToyLM().train(training)
        optimizer = _NotingSGD(model, lr)
        for parameter in model.parameters():
            parameter.grad = noise(*parameter.shape, seed=61)
        batches = [toy_tokens(3, 5, seed=70 + step) for step in range(3)]
        for step, batch in enumerate(batches):
            name = f"train_step with max_norm={max_norm}, step {step}"
            before = toy_gradient(model, batch)[0]
            start = len(model.events)
            extra = {} if max_norm is None else {"max_norm": max_norm}
            with unchanged("train_step", batch=batch), during(f"in step {step}, with max_norm={max_norm}"):
                actual = fn(model, optimizer, batch, **extra)
            if model.training is not training:
                raise CheckFailed(
                    "train_step: it changed the mode of the model (training or evaluation).\n"
                    "  Next: leave that to the caller."
                )
            _check_events(name, model.events[start:])
            right = _trained(batches[: step + 1], lr, max_norm, training)
            mistakes = _step_mistakes(batches[: step + 1], lr, max_norm, training, right)
            compare(
                f"{name}: all parameters, side by side", side_by_side(model.parameters()), right, "number", mistakes
            )
            after = toy_gradient(model, batch)[0]
            number(name, "the loss", actual, before, {"it is the loss after the step; return that before it.": after})


_STEP_MISTAKES = (
    "the gradients of the step before are still there and were added to: `zero_grad` is missing.",
    "the gradients are not clipped before the step.",
    "the gradients are always scaled to max_norm.",
    "the labels are not shifted.",
    "the optimizer steps twice.",
    "it steps first, with the gradients of the batch before.",
)


def _step_mistakes(
    batches: Sequence[Tensor], lr: float, max_norm: float | None, training: bool, right: Tensor
) -> Mistakes:
    """Each mistake's parameters, worked out only when they are needed; a mistake that changes nothing gives none."""

    def answer(wrong: str) -> Tensor:
        found = _trained(batches, lr, max_norm, training, wrong)
        return torch.full_like(found, torch.inf) if _close(found, right) else found

    return {wrong: partial(answer, wrong) for wrong in _STEP_MISTAKES}


def _trained(batches: Sequence[Tensor], lr: float, max_norm: float | None, training: bool, wrong: str = "") -> Tensor:
    """Where the toy model is after a step on each batch, by hand; `wrong` is one of the mistakes."""
    model = ToyLM().train(training)
    grads = [noise(*parameter.shape, seed=61) for parameter in model.parameters()]
    for batch in batches:
        fresh = toy_gradient(model, batch)[1]
        if "not shifted" in wrong:
            logits = model.logits(batch) * (0.5 if training else 1.0)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.flatten())
            fresh = list(torch.autograd.grad(loss, list(model.parameters())))
        if "zero_grad" in wrong:
            fresh = [new + old for new, old in zip(fresh, grads, strict=True)]
        norm = side_by_side(fresh).norm().item()
        if max_norm is not None and "not clipped" not in wrong and (norm > max_norm or "always scaled" in wrong):
            fresh = [grad * (max_norm / norm) for grad in fresh]
        with torch.no_grad():
            for parameter, new, old in zip(model.parameters(), fresh, grads, strict=True):
                parameter.sub_(lr * (old if "steps first" in wrong else new) * (2 if "twice" in wrong else 1))
        grads = fresh
    return side_by_side(model.parameters())


def _check_events(name: str, events: list[str]) -> None:
    """Order mistakes that leave the parameters where they were, or in a place that does not say why."""
    if "step" not in events:
        raise CheckFailed(
            f"{name}: the optimizer was not asked to step, so no parameter changed.\n"
            "  Next: after the gradients are there, call `optimizer.step()`."
        )
    if "backward" not in events:
        raise CheckFailed(f"{name}: no gradient was computed.\n  Next: `loss.backward()` sends it to every parameter.")
    backward, step = events.index("backward"), len(events) - 1 - events[::-1].index("step")
    if "zero_grad" in events[backward:step]:
        raise CheckFailed(
            f"{name}: `zero_grad` stands between `backward` and `step`: the gradients are forgotten before their use.\n"
            "  Next: forget the old gradients before new ones are computed."
        )


def check_accumulate_gradients(fn: Callable[..., Any]) -> None:
    """The gradient of the whole batch; seven rows cannot be cut evenly, and something is in `.grad` already."""
    for n_rows, n_micro in [(6, 3), (7, 3), (7, 2), (5, 1), (2, 3)]:
        model = ToyLM()
        batch = toy_tokens(n_rows, 4, seed=80)
        old = [noise(*parameter.shape, seed=81) for parameter in model.parameters()]
        for parameter, grad in zip(model.parameters(), old, strict=True):
            parameter.grad = grad.clone()
        whole, fresh = toy_gradient(model, batch)
        name = f"accumulate_gradients of {n_rows} rows in {n_micro}"
        with unchanged(name, batch=batch, **dict(model.named_parameters())), during(f"in {n_micro} of {n_rows} rows"):
            actual = fn(model, batch, n_micro)
        most = -(-n_rows // n_micro)
        largest = max((seen["rows"] for seen in model.seen), default=0)
        if largest > most:
            raise CheckFailed(
                f"{name}: the model was given {largest} rows at once; at most {most} was the point.\n"
                "  Next: cut the rows into micro-batches, and run one after the other."
            )
        if any(seen["rows"] == 0 for seen in model.seen):
            raise CheckFailed(
                f"{name}: the model was given a micro-batch without rows, whose mean is 0/0.\n"
                "  Next: make fewer micro-batches where there are fewer rows."
            )
        parts = list(batch.chunk(n_micro))
        pieces = [toy_gradient(model, part) for part in parts]
        shares = [len(part) / n_rows for part in parts]
        begun = side_by_side(old)
        flat = [side_by_side(grads) for _, grads in pieces]
        right = begun + side_by_side(fresh)
        n = len(parts)
        weighted = [share * piece for share, piece in zip(shares, flat, strict=True)]
        mistakes = {
            "the micro-batches' losses are added up, each a mean; weigh them by their share of the rows.": begun
            + sum(flat),
            "every micro-batch weighs the same; the last has fewer rows.": begun + sum(flat) / n,
            "the sum is divided by n_micro, but there are fewer micro-batches.": begun + sum(flat) / n_micro,
            "what was in `.grad` before is lost; add to it.": side_by_side(fresh),
            "only the last micro-batch is left in `.grad`.": weighted[-1],
            "only the last micro-batch is left in `.grad`, not weighed.": flat[-1],
            "the last micro-batch is left out.": begun + sum(weighted[:-1]),
        }
        if n_micro < n_rows:
            full = batch.split(n_rows // n_micro)[:n_micro]
            mistakes["the rows that do not fill a micro-batch are left out."] = (
                begun + sum(side_by_side(toy_gradient(model, part)[1]) for part in full) / n_micro
            )
        if n == n_micro:
            del mistakes["the sum is divided by n_micro, but there are fewer micro-batches."]
        mistakes = {hint: answer for hint, answer in mistakes.items() if not _close(answer, right)}
        got = side_by_side(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
        compare(f"{name}: all gradients, side by side", got, right, "number", mistakes)
        kept = [seen["grad"] for seen in model.seen]
        if n > 1 and any(_equal(before, after) for before, after in pairwise(kept)):
            raise CheckFailed(
                f"{name}: a micro-batch went forward before the one before it had gone backward, so that the "
                "activations of several are kept.\n  Next: call backward on each loss before the next forward."
            )
        losses = [loss for loss, _ in pieces]
        known = {
            "it is the sum of the micro-batches' losses.": sum(losses),
            "it is the loss of the last micro-batch.": losses[-1],
            "every micro-batch weighs the same, though the last has fewer rows.": sum(losses) / n,
            "it is divided by n_micro, but there are fewer micro-batches.": sum(losses) / n_micro,
        }
        if n == n_micro:
            del known["it is divided by n_micro, but there are fewer micro-batches."]
        known = {hint: value for hint, value in known.items() if not math.isclose(value, whole, rel_tol=1e-4)}
        number(name, "the mean loss over the batch", actual, whole, known)


def _close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------- judging and keeping


def check_evaluate(fn: Callable[..., Any]) -> None:
    """Batches of other rows and lengths; a model that is another one in training mode and notes how it is run."""
    batches = [toy_tokens(3, 6, seed=90), toy_tokens(1, 2, seed=91), toy_tokens(5, 3, seed=92)]
    for training in (True, False):
        model = ToyLM().train(training)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        mode = "training" if training else "evaluation"
        with unchanged(
            "evaluate", **{f"batch {i}": b for i, b in enumerate(batches)}, **dict(model.named_parameters())
        ):
            actual = fn(model, (batch for batch in batches))
        if any(seen["training"] for seen in model.seen):
            raise CheckFailed(
                "evaluate: the model ran in training mode, in which layers such as dropout add noise.\n"
                "  Next: `model.eval()` before the first batch."
            )
        if any(seen["graph"] for seen in model.seen):
            raise CheckFailed(
                "evaluate: gradients are recorded, which costs memory and time.\n"
                "  Next: run the model under torch.no_grad()."
            )
        if not torch.is_grad_enabled():
            raise CheckFailed(
                "evaluate: it leaves gradients switched off for all that comes after it.\n"
                "  Next: `with torch.no_grad():` puts them back."
            )
        if model.training is not training:
            raise CheckFailed(
                f"evaluate: the model was in {mode} mode before, and is not afterwards.\n"
                "  Next: keep `model.training` first, and hand it to `model.train(...)` in the end."
            )
        grads = [parameter.grad for parameter in model.parameters()]
        if any(grad is None or not torch.equal(grad, torch.ones_like(grad)) for grad in grads):
            raise CheckFailed("evaluate: it changed the parameters' `.grad`.\n  Next: it should only look.")
        model.eval()
        losses = [toy_gradient(model, batch)[0] for batch in batches]

        def weighed(*weights: int, losses: Sequence[float] = losses) -> float:
            return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)

        mistakes = {
            "every batch weighs the same; every predicted token should.": weighed(1, 1, 1),
            "batches weigh as their rows do; every predicted token should weigh the same.": weighed(3, 1, 5),
            "batches weigh as their lengths do; rows count too.": weighed(5, 1, 2),
            "batches weigh as their tokens do; the first of each row is not predicted.": weighed(18, 2, 15),
            "it is the sum over all predictions; take their mean.": 26 * weighed(15, 1, 10),
            "it is divided by all tokens; the first of each row is not predicted.": 26 / 35 * weighed(15, 1, 10),
            "it is the loss of the last batch.": losses[-1],
            "it is the loss of the first batch.": losses[0],
        }
        number("evaluate", "the mean loss", actual, weighed(15, 1, 10), mistakes)
    _check_broken_evaluation(fn)


class _Broken(ToyLM):
    def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
        raise ValueError("out of memory, say")


def _check_broken_evaluation(fn: Callable[..., Any]) -> None:
    model = _Broken().train()
    with contextlib.suppress(ValueError):
        fn(model, [toy_tokens(2, 3)])
    if not model.training:
        raise CheckFailed(
            "evaluate: after an exception in the model the training mode is not put back.\n"
            "  Next: `try: ... finally: ...` does something whatever happens."
        )


class _CutOff(BaseException):
    """Ends a save half-way, as a kill would."""


class _Bomb:
    def __reduce__(self) -> Any:
        raise _CutOff


def _training_state() -> tuple[dict[str, Any], dict[str, Any]]:
    """Objects as a training loop has them, and the plain data that a checkpoint should hold."""
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for seed in (5, 6):
        optimizer.zero_grad()
        model(noise(4, 3, seed=seed)).square().sum().backward()
        optimizer.step()
    generator = torch.Generator().manual_seed(3)
    torch.randn(5, generator=generator)
    others = {"step": 2, "history": [{"step": 1, "loss": 0.5}], "recipe": "tiny", "best": noise(3, seed=9)}
    objects = {"model": model, "optimizer": optimizer, "generator": generator, **others}
    plain = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        **others,
    }
    return objects, plain


def check_save_checkpoint(fn: Callable[..., Any]) -> None:
    """What the file holds; then that an old checkpoint stays whole, whenever the writing breaks off."""
    objects, plain = _training_state()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "run.pt"
        state = objects["generator"].get_state()
        with unchanged("save_checkpoint", **dict(objects["model"].named_parameters())):
            fn(path, **objects)
        if not torch.equal(state, objects["generator"].get_state()):
            raise CheckFailed("save_checkpoint: it drew from the generator.\n  Next: only read its state.")
        _check_stored(path, plain, objects)
        _check_only(folder, path)
        older = dict(plain, step=1)
        fn(path, **dict(objects, step=1))
        _check_stored(path, older, dict(objects, step=1))
        with contextlib.suppress(_CutOff):
            fn(path, **dict(objects, step=3, later=_Bomb()))
        broken_off = "when the writing broke off half-way, the good checkpoint at this path was lost"
        _check_survivor(path, older, broken_off)
        for left in folder.iterdir():
            if left != path:
                left.unlink()
        _check_swap(fn, path, objects, older)
        _check_stored(path, plain, objects)
        _check_only(folder, path)
        refused = dict(objects, where=folder)
        must_raise("save_checkpoint", ValueError, "a Path among the values", lambda: fn(path, **refused))
        _check_survivor(path, plain, "when it had to refuse a value, the good checkpoint at this path was lost")
        _check_only(folder, path)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_stored(path: Path, plain: dict[str, Any], objects: dict[str, Any]) -> None:
    if not path.is_file():
        raise CheckFailed("save_checkpoint: afterwards there is no file at `path`.\n  Next: write to just this path.")
    try:
        stored = _load(path)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise CheckFailed(
            f"save_checkpoint: torch.load(path, weights_only=True) cannot read the file ({type(error).__name__}: "
            f"{reason}).\n  Next: store plain data with torch.save: state_dict() and get_state(), not the objects."
        ) from None
    difference = first_difference(stored, plain, "stored")
    if difference is None:
        return
    causes = []
    if isinstance(stored, dict):
        generator = stored.get("generator")
        if isinstance(generator, int) and generator == objects["generator"].initial_seed():
            causes.append("the generator's seed is stored: it would begin again. Its state says how far it has come.")
        if isinstance(generator, Tensor) and _equal(generator, torch.get_rng_state()):
            causes.append("the state of torch's global generator is stored instead of that of this one.")
        fresh = torch.Generator().manual_seed(3).get_state()
        if isinstance(generator, Tensor) and _equal(generator, fresh):
            causes.append("the generator is stored as it was at the start; its state says how far it has come.")
        if set(stored) == set(plain["model"]):
            causes.append("only the model's weights are stored.")
        forgotten = [name for name in plain if name not in stored]
        if len(forgotten) == 1:
            causes.append(f"`{forgotten[0]}` is forgotten; a run that goes on without it becomes another run.")
    hint = f"\n  This is what you get if {causes[0]}" if causes else "\n  Next: load the file and print what it holds."
    raise CheckFailed(f"save_checkpoint: the file does not hold what it should.\n  {difference}{hint}")


def _check_only(folder: Path, path: Path) -> None:
    others = sorted(entry.name for entry in folder.iterdir() if entry != path)
    if others:
        raise CheckFailed(
            f"save_checkpoint: it leaves a file `{others[0]}` behind.\n"
            "  Next: os.replace moves the new file into its place; a copy does not."
        )


def _check_survivor(path: Path, older: dict[str, Any], what: str) -> None:
    try:
        whole = first_difference(_load(path), older, "stored") is None
    except Exception:
        whole = False
    if not whole:
        raise CheckFailed(
            f"save_checkpoint: {what}.\n"
            "  Next: write all of the new one into another file of the same folder first; then exchange them."
        )


@contextlib.contextmanager
def _watched_moves(path: Path, older: dict[str, Any]) -> Iterator[list[str]]:
    """Note what is wrong at the moment in which a file is moved, or removed: a kill could come just then."""
    faults: list[str] = []
    originals = {name: getattr(os, name) for name in ("replace", "rename", "remove", "unlink")}

    def watch(name: str) -> Callable[..., Any]:
        def act(source: Any, *others: Any, **options: Any) -> Any:
            target = Path(others[0]) if others else None
            if target == path:
                if Path(source).parent.resolve() != path.parent.resolve():
                    faults.append(
                        "the new file is written in another folder; a move from another disk is no single step"
                    )
                try:
                    _load(Path(source))
                except Exception:
                    faults.append("the file that was moved to `path` was not complete at that moment")
            elif Path(source) == path and not faults:
                faults.append("the old checkpoint was taken away before the new one was in its place")
            return originals[name](source, *others, **options)

        return act

    for name in originals:
        setattr(os, name, watch(name))
    try:
        yield faults
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def _check_swap(fn: Callable[..., Any], path: Path, objects: dict[str, Any], older: dict[str, Any]) -> None:
    """A second name for the old file shows whether it was written into."""
    second = path.with_name("second_name_of_the_old_file")
    with contextlib.suppress(OSError, NotImplementedError):  # a file system without such names
        os.link(path, second)
    with _watched_moves(path, older) as faults:
        fn(path, **objects)
    if second.exists():
        _check_survivor(second, older, "it writes into the file that stands at `path`: a kill would leave half of it")
        second.unlink()
    if faults:
        raise CheckFailed(
            f"save_checkpoint: {faults[0]}.\n"
            "  Next: write to another file of the same folder, close it, and then os.replace it onto `path`."
        )


_CODE_THAT_RAN: list[str] = []


def _note_that_code_ran(what: str) -> dict[str, str]:
    _CODE_THAT_RAN.append(what)
    return {"step": what}


class _Evil:
    """Unpickling it calls a function: here a harmless one."""

    def __reduce__(self) -> Any:
        return _note_that_code_ran, ("from a file",)


def check_load_checkpoint(fn: Callable[..., Any]) -> None:
    """What was stored comes back, bit for bit; a file with code in it is refused, and a missing one is an error."""
    _, plain = _training_state()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run.pt"
        torch.save(plain, path)
        before = path.read_bytes()
        loaded = fn(path)
        if loaded is None:
            raise CheckFailed("load_checkpoint: returned None.\n  Next: end the function with `return ...`.")
        difference = first_difference(loaded, plain, "loaded")
        if difference:
            raise CheckFailed(
                f"load_checkpoint: it does not return what the file holds.\n  {difference}\n"
                "  Next: return the whole dict, as torch.load gives it."
            )
        if not path.is_file() or path.read_bytes() != before:
            raise CheckFailed("load_checkpoint: it changed the file.\n  Next: only read it.")
        torch.save({"step": _Evil()}, path)
        _CODE_THAT_RAN.clear()
        with contextlib.suppress(Exception):
            fn(path)
        if _CODE_THAT_RAN:
            _CODE_THAT_RAN.clear()
            raise CheckFailed(
                "load_checkpoint: a file that holds a function call made it run (here a harmless one).\n"
                "  Next: torch.load has an option that reads plain data only; see the statement."
            )
        must_raise("load_checkpoint", FileNotFoundError, "a path without a file", lambda: fn(Path(name) / "nothing.pt"))
