"""Checks of chapter 09, training: the loop that fits a dictionary, against one with every step written out."""

import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch09.small import Fn
from course_utils.checks.comparing import compare
from course_utils.checks.guarding import may_change
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree
from course_utils.checks.standins.small_dictionary import SmallSAE

D_IN, D_LATENT, BATCH = 5, 9, 7


def rate(step: int, steps: int, peak: float, warm_up: int) -> float:
    value = peak
    if step + 1 < warm_up:
        value *= (step + 1) / warm_up
    if (steps - step) < 0.2 * steps:
        value *= (steps - step) / (0.2 * steps)
    return min(value, peak)


def lowest_of_both(step: int, steps: int, peak: float, warm_up: int) -> float:
    return peak * min(1.0, (step + 1) / warm_up, (steps - step) / (0.2 * steps))


def product_of_both(step: int, steps: int, peak: float, warm_up: int) -> float:
    return peak * min(1.0, (step + 1) / warm_up) * min(1.0, (steps - step) / (0.2 * steps))


def loss_of(sae: Any, x: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, pre-activations, latents, reconstruction) of a "gated" or a "topk"."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    latents = sae.activate(pre)
    reconstruction = latents @ sae.W_dec + sae.b_dec
    error = (x - reconstruction).pow(2).sum() / len(x)
    counted = pre.clamp(min=0) if sae.kind == "gated" else latents
    penalty = (counted * sae.W_dec.norm(dim=1)).sum() / len(x)
    if sae.kind == "gated":
        error = error + (x - counted @ sae.W_dec.detach() - sae.b_dec.detach()).pow(2).sum() / len(x)
    return error + weight * penalty, pre, latents, reconstruction


def revived(x: Tensor, pre: Tensor, reconstruction: Tensor, dead: Tensor, W_dec: Tensor, k: int) -> Tensor:
    """What the dead latents leave over of the error."""
    alive = torch.where(dead, pre, torch.full_like(pre, -math.inf))
    order = alive.argsort(dim=1, descending=True).argsort(dim=1)
    guess = (alive.clamp(min=0) * (order < k)) @ W_dec
    return ((x - reconstruction).detach() - guess).pow(2).sum() / len(x)


def loop(
    schedule: Callable[[int, int, float, int], float] = lowest_of_both,
    grows: Callable[[int, int], float] = lambda step, steps: min(1.0, (step + 1) / (0.2 * steps)),
    is_dead: Callable[[Tensor, int], Tensor] = lambda silent, window: silent > window,
    counts: Callable[[Tensor], Tensor] = lambda latents: (latents > 0).any(dim=0),
    parallel: bool = True,
    unit: bool = True,
    starts: bool = True,
    k: int = 32,
    adds: Callable[[float, Tensor], Any] = lambda auxiliary, extra: auxiliary * extra,
    both: bool = False,
    ends: str = "eval",
    starts_training: bool = True,
    early: int = 0,
    copies: bool = True,
) -> Fn:
    """fit_dictionary, and the ways in which it may go wrong."""

    def fit_dictionary(
        sae: Any,
        batch: Callable[[], Tensor],
        steps: int,
        peak: float = 1e-3,
        sparsity: float = 0.0,
        warm_up: int = 50,
        window: int = 50,
        auxiliary: float = 0.0,
        keep: Sequence[int] = (),
    ) -> Any:
        parameters = list(sae.parameters())
        m = v = torch.zeros(sum(p.numel() for p in parameters))
        silent = torch.zeros(sae.b_enc.shape[0])
        losses, deads, snapshots = [], [], {}
        if starts_training:
            sae.train()
        for step in range(steps):
            x = batch()
            if step == 0 and starts:
                sae.b_dec.data = x.mean(dim=0)
            loss, pre, latents, reconstruction = loss_of(sae, x, sparsity * grows(step, steps))
            silent = torch.where(counts(latents), torch.zeros_like(silent), silent + 1)
            dead = is_dead(silent, window)
            total = loss
            if auxiliary and dead.any():
                total = loss + adds(auxiliary, revived(x, pre, reconstruction, dead, sae.W_dec, k))
            gradients = torch.autograd.grad(total, parameters)
            with torch.no_grad():
                lr = schedule(step, steps, peak, warm_up)
                grads = dict(zip(map(id, parameters), gradients, strict=True))
                if parallel:
                    rows, g = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True), grads[id(sae.W_dec)]
                    grads[id(sae.W_dec)] = g - (g * rows).sum(dim=1, keepdim=True) * rows
                g = torch.cat([grads[id(p)].flatten() for p in parameters])
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                change = lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                for p, part in zip(parameters, change.split([p.numel() for p in parameters]), strict=True):
                    p -= part.view_as(p)
                if unit:
                    sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
            losses.append((total if both else loss).item())
            deads.append(int(dead.sum()))
            if step + 1 - early in keep:
                state = sae.state_dict()
                snapshots[step + 1 - early] = {n: w.clone() if copies else w for n, w in state.items()}
        sae.train(ends == "train")
        return SimpleNamespace(losses=losses, dead=deads, snapshots=snapshots)

    return fit_dictionary


@may_change("sae")
@known_mistakes(
    {
        "the learning rate does not rise at first.": loop(
            lambda step, steps, peak, warm_up: rate(step, steps, peak, 1)
        ),
        "the learning rate does not fall in the last fifth.": loop(
            lambda step, steps, peak, warm_up: peak * min(1.0, (step + 1) / warm_up)
        ),
        "the two factors of the learning rate are multiplied; the smaller one counts.": loop(product_of_both),
        "the learning rate is the same throughout.": loop(lambda step, steps, peak, warm_up: peak),
        "the penalty has its full weight from the beginning.": loop(grows=lambda step, steps: 1.0),
        "the penalty is left out.": loop(grows=lambda step, steps: 0.0),
        "rows of the decoder do not keep a norm of 1.": loop(unit=False),
        "the gradient's part along the rows of the decoder stays in it.": loop(parallel=False),
        "`b_dec` does not begin with the mean of the first batch.": loop(starts=False),
        "a latent that was silent in this batch alone counts as dead.": loop(is_dead=lambda silent, window: silent > 0),
        "a latent is dead one step too early.": loop(is_dead=lambda silent, window: silent >= window),
        "a latent is dead if it is silent on one token of the batch.": loop(
            counts=lambda latents: (latents > 0).all(dim=0)
        ),
        "the auxiliary loss is left out.": loop(adds=lambda auxiliary, extra: 0.0),
        "the auxiliary loss has its full weight; multiply by `auxiliary`.": loop(adds=lambda auxiliary, extra: extra),
        "`losses` includes the auxiliary loss.": loop(both=True),
        "snapshots are taken one step too late.": loop(early=1),
        "snapshots are the weights themselves, which training goes on to change; copy them.": loop(copies=False),
        "the autoencoder is left in training mode.": loop(ends="train"),
        "the autoencoder trains in evaluation mode if it was given in it; call `train()` first.": loop(
            starts_training=False
        ),
    }
)
def check_fit_dictionary(fn: Fn) -> None:
    """A "gated" with a penalty, a "topk" with an auxiliary loss: losses, dead latents, weights, and snapshots."""
    name = "fit_dictionary"
    cases: list[tuple[str, int, int, dict[str, Any]]] = [
        ("topk", D_LATENT, 11, {"peak": 0.05, "warm_up": 4, "window": 2, "auxiliary": 0.7, "keep": [2, 5]}),
        ("gated", D_LATENT, 6, {"peak": 0.02, "warm_up": 8, "sparsity": 0.8, "window": 1}),
        ("topk", 81, 3, {"auxiliary": 0.5, "window": 0, "peak": 0.02, "warm_up": 2}),
    ]
    for kind, n_latents, steps, options in cases:
        words = f"{kind}, {n_latents} latents, {steps} steps, " + ", ".join(f"{key}={options[key]}" for key in options)
        saes, fits = [], []
        for each in (loop(), fn):
            sae, n = SmallSAE(D_IN, n_latents, kind, k=1), iter(range(99))
            sae.train(kind == "topk")
            modes: list[bool] = []

            def batch(sae: SmallSAE = sae, n: Iterator[int] = n, modes: list[bool] = modes) -> Tensor:
                modes.append(sae.training)
                return batch_number(next(n))

            fits.append(each(sae, batch, steps, **options))
            saes.append(sae)
        right, actual = fits
        if actual is None:
            raise CheckFailed(f"{name}: returned None.\n  Next: return a Fit of losses, dead and snapshots.")
        for label, answer in (("losses", actual.losses), ("dead", actual.dead)):
            kind_of = float if label == "losses" else int
            if not isinstance(answer, list) or len(answer) != steps or not isinstance(answer[0], kind_of):
                raise CheckFailed(
                    f"{name}: `{label}` should be a list of {steps} plain numbers.\n  Next: append one a step."
                )
        compare(f"{name}: losses, {words}", torch.tensor(actual.losses), torch.tensor(right.losses), "step", 1e-3, 1e-4)
        agree(name, f"`dead`, {words}", actual.dead, right.dead)
        weights = [("at the end", saes[1].state_dict(), saes[0].state_dict())]
        if sorted(actual.snapshots) != sorted(right.snapshots):
            raise CheckFailed(
                f"{name}: expected snapshots after {sorted(right.snapshots)} steps, got {sorted(actual.snapshots)}.\n"
                "  Next: keep says after how many steps."
            )
        weights += [(f"after {at} steps", actual.snapshots[at], right.snapshots[at]) for at in right.snapshots]
        for when, got, want in weights:
            for label, weight in want.items():
                axes = {2: "d_in latent" if label == "W_enc" else "latent d_in", 1: label}[weight.dim()]
                compare(f"{name}: {label} {when}, {words}", got[label], weight, axes, 1e-3, 1e-4)
        if saes[1].training:
            compare(f"{name}: `training` afterwards", torch.tensor(1.0), torch.tensor(0.0), "")
        if not all(modes[1:]):
            compare(f"{name}: `training` while it trains", torch.tensor(0.0), torch.tensor(1.0), "")


def batch_number(number: int) -> Tensor:
    """A batch that is not centred, another at each step."""
    return noise(BATCH, D_IN, seed=30 + number) + torch.arange(float(D_IN)) / 3
