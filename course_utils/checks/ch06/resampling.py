"""Checks of chapter 06, dead latents: a loss of their own, and a new start."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.ch06.dictionaries import SQUARED_ERRORS, largest_of_rows
from course_utils.checks.ch06.sizes import (
    BATCH,
    D_IN,
    LATENT,
    LEADS,
    WORDS,
    Fn,
    batch_of,
    compare_slopes,
    every_kind,
)
from course_utils.checks.comparing import compare, compare_kind
from course_utils.checks.guarding import may_change
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.translating import during

# ---------------------------------------------------------------------------------------------------- a task for them


def shares(pre: Tensor, dead: Tensor, k: int) -> Tensor:
    """Which latents a row of pre-activations [latent] may use for the error, each as 1 or 0."""
    allowed = [place for place, is_dead in enumerate(dead.tolist()) if is_dead]
    best = sorted(allowed, key=lambda place: -pre[place].item())[:k]
    return torch.tensor([float(place in best and pre[place] > 0) for place in range(len(pre))]).to(pre)


def error_of_dead(x: Tensor, reconstruction: Tensor, pre: Tensor, dead: Tensor, W_dec: Tensor, k: int) -> Tensor:
    """The definition, for one instance: sample by sample."""
    total = (0.0 * pre).sum()
    if not dead.any():
        return total
    for sample, made, row in zip(x, reconstruction, pre, strict=True):
        target = (sample - made).detach()
        guess = (row * shares(row, dead, k)) @ W_dec
        total = total + ((target - guess) ** 2).sum()
    return total / len(x)


def expected_of_dead(x: Tensor, reconstruction: Tensor, pre: Tensor, dead: Tensor, W_dec: Tensor, k: int) -> Tensor:
    if x.dim() == 2:
        return error_of_dead(x, reconstruction, pre, dead, W_dec, k)
    each = [error_of_dead(x[:, i], reconstruction[:, i], pre[:, i], dead[i], W_dec[i], k) for i in range(len(dead))]
    return torch.stack(each)


def explaining(
    latents: Callable[[Tensor, Tensor, int], Tensor] = lambda pre, dead, k: largest_masked(pre, dead, k),
    target: Callable[[Tensor, Tensor], Tensor] = lambda x, reconstruction: (x - reconstruction).detach(),
    end: Callable[[Tensor], Tensor] = lambda error: error.square().sum(-1).mean(0),
    when: Callable[[Tensor], Tensor | float] = lambda dead: dead.any(-1),
    weights: Callable[[Tensor], Tensor] = lambda W_dec: W_dec,
) -> Fn:
    """auxiliary_topk_loss with something else in one of its steps."""

    def auxiliary_topk_loss(
        x: Tensor, reconstruction: Tensor, pre: Tensor, dead: Tensor, W_dec: Tensor, k: int
    ) -> Tensor:
        guess = (latents(pre, dead, k)[..., None] * weights(W_dec)).sum(-2)
        return end(target(x, reconstruction) - guess) * when(dead)

    return auxiliary_topk_loss


def largest_masked(pre: Tensor, dead: Tensor, k: int) -> Tensor:
    """The k largest of the dead, at their places; none is negative."""
    masked = pre.masked_fill(~dead, -torch.inf)
    return torch.where(largest_of_rows(masked.detach(), k) > 0, pre, 0.0)


def unmasked(pre: Tensor, k: int) -> Tensor:
    return torch.where(largest_of_rows(pre.detach(), k) > 0, pre, 0.0)


def signed(pre: Tensor, dead: Tensor, k: int) -> Tensor:
    """The k largest of the dead, negative ones too."""
    masked = pre.masked_fill(~dead, -torch.inf)
    lowest = masked.topk(min(k, pre.shape[-1]), dim=-1).values[..., -1:]
    return torch.where((masked >= lowest) & dead, pre, 0.0)


@known_mistakes(
    {
        "living latents take part; only the dead ones should.": explaining(lambda pre, dead, k: unmasked(pre, k)),
        "the living latents take part, and the dead ones do not: the mask is the wrong way round.": explaining(
            lambda pre, dead, k: largest_masked(pre, ~dead, k)
        ),
        "the dead are chosen among the k largest of all, where they hardly ever are.": explaining(
            lambda pre, dead, k: unmasked(pre, k) * dead
        ),
        "all dead latents take part; only the k largest of each row should.": explaining(
            lambda pre, dead, k: pre.relu() * dead
        ),
        "negative pre-activations pass; they should become 0.": explaining(signed),
        "the target is x itself; it should be the error that is left.": explaining(target=lambda x, reconstruction: x),
        "the target has the wrong sign: it should be x - reconstruction.": explaining(
            target=lambda x, reconstruction: (reconstruction - x).detach()
        ),
        "the target is not detached: the gradient reaches the living latents.": explaining(
            target=lambda x, reconstruction: x - reconstruction
        ),
        "it is the size of the error where no latent is dead; it should be 0.": explaining(when=lambda dead: 1.0),
        "it is 0 for all instances as soon as one has no dead latents.": explaining(
            when=lambda dead: dead.any(-1).all()
        ),
        "no gradient reaches W_dec.": explaining(weights=lambda W_dec: W_dec.detach()),
    },
    {sentence: explaining(end=end) for sentence, end in SQUARED_ERRORS.items()},
)
def check_auxiliary_topk_loss(fn: Fn) -> None:
    """Several dead, all, one, none; then whom the gradient reaches."""
    name = "auxiliary_topk_loss"
    some = torch.tensor([[True, False, True, True, False, True], [False] * 6, [False, True] * 3])
    for lead in LEADS:
        x, reconstruction, pre = batch_of(lead, D_IN, 30), batch_of(lead, D_IN, 31), batch_of(lead, LATENT, 32)
        W_dec = noise(*lead, LATENT, D_IN, seed=33)
        axes = WORDS[lead].strip()
        masks = {"some latents dead": some, "all latents dead": ~(some & False), "no latent dead": some & False}
        for words, mask in masks.items():
            dead = mask if lead else mask[0]
            for k in (2, 1, LATENT + 2):
                label = f"{name} with {words}, k={k}"
                with during(f"with {words}, k={k}"):
                    actual = fn(x, reconstruction, pre, dead, W_dec, k)
                compare(label, actual, expected_of_dead(x, reconstruction, pre, dead, W_dec, k), axes)
        dead = some if lead else some[0]
        compare_slopes(
            name,
            lambda x=x, dead=dead, **given: fn(x, given["reconstruction"], given["pre"], dead, given["W_dec"], 2),
            lambda x=x, dead=dead, **given: expected_of_dead(
                x, given["reconstruction"], given["pre"], dead, given["W_dec"], 2
            ),
            {"reconstruction": reconstruction, "pre": pre, "W_dec": W_dec},
            {"pre": f"batch {WORDS[lead]}latent", "W_dec": f"{WORDS[lead]}latent d_in"},
        )
        every_kind(name, fn, (x, reconstruction, pre, dead, W_dec, 2), axes)


# ------------------------------------------------------------------------------------------------------ where to start

N_DRAWS = 4000


def drawing(
    weigh: Callable[[Tensor], Tensor] = lambda error: error.square().sum(-1).square(),
    draw: Callable[[Tensor, int, torch.Generator], Tensor] = lambda weights, n, generator: torch.multinomial(
        weights, n, replacement=True, generator=generator
    ),
) -> Fn:
    """pick_worst with other weights, or drawn otherwise."""
    return lambda x, reconstruction, n, generator: draw(weigh(x - reconstruction), n, generator)


@known_mistakes(
    {
        "the chance is in proportion to the loss; it should be to its square.": drawing(
            lambda error: error.square().sum(-1)
        ),
        "the chance is in proportion to the length of the error; it should be to the square of the loss.": drawing(
            lambda error: error.norm(dim=-1)
        ),
        "the chance is in proportion to the loss to the power of 4.": drawing(
            lambda error: error.square().sum(-1) ** 4
        ),
        "every row is equally likely.": drawing(lambda error: torch.ones(len(error)).to(error)),
        "rows with a small error are preferred.": drawing(lambda error: 1 / error.square().sum(-1).square()),
        "the chance is a softmax of the loss; it should be in proportion to its square.": drawing(
            lambda error: error.square().sum(-1).softmax(-1)
        ),
        "the worst row is always taken; the draw should be random.": drawing(
            draw=lambda weights, n, generator: weights.argmax().repeat(n)
        ),
    }
)
def check_pick_worst(fn: Fn) -> None:
    """The form of one draw; where its numbers come from; then shares over many draws."""
    name = "pick_worst"
    x, reconstruction = noise(BATCH, D_IN, seed=34), noise(BATCH, D_IN, seed=35)
    # Losses of 1, 2, 3 and 4: chances of 1, 4, 9 and 16 of 30.
    error = x - reconstruction
    reconstruction = x - error / error.norm(dim=-1, keepdim=True) * torch.tensor([2.0, 4.0, 1.0, 3.0]).sqrt()[:, None]
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    actual = fn(x, reconstruction, 7, generator)
    if not isinstance(actual, Tensor) or actual.shape != (7,):
        compare(name, actual, torch.zeros(7, dtype=torch.long), "draw")
    compare_kind(name, actual, torch.zeros(7, dtype=torch.long))
    again = fn(x, reconstruction, 7, torch.Generator().manual_seed(5))
    many = fn(x, reconstruction, N_DRAWS, torch.Generator().manual_seed(6))
    if many.min() < 0 or many.max() >= BATCH:
        raise CheckFailed(f"{name}: an index is not that of a row.\n  Next: draw from the {BATCH} rows of the batch.")
    found = torch.bincount(many, minlength=BATCH) / N_DRAWS
    right = torch.tensor([4.0, 16.0, 1.0, 9.0]) / 30
    if (found - right).abs().max() > 0.04:  # five standard errors of a share near 1/2
        row = int((found - right).abs().argmax())
        raise CheckFailed(
            f"{name}: rows are not drawn in proportion to the square of their loss.\n"
            f"  of {N_DRAWS} draws, row {row} has a share of {found[row]:.3f}, expected {right[row]:.3f} "
            f"(losses 2, 4, 1, 3)",
            evidence=Evidence("shares", (found * 20).round()),
            advice="  Next: work out the loss of each row, and square it.",
        )
    repeats = (many[1:] == many[:-1]).float().mean()
    if (repeats - right.square().sum()).abs() > 0.04:
        raise CheckFailed(
            f"{name}: the draws are not independent of each other.\n  one draw is the same row as the one before in "
            f"{repeats:.0%}, expected {right.square().sum():.0%}\n  Next: draw with replacement, all at once."
        )
    if torch.equal(generator.get_state(), before) or not torch.equal(actual, again):
        raise CheckFailed(
            f"{name}: its random numbers do not come from `generator`.\n  Next: pass generator=generator."
        )
    if torch.equal(fn(x, reconstruction, 60, generator), fn(x, reconstruction, 60, generator)):
        raise CheckFailed(f"{name}: two draws from one generator are the same.\n  Next: do not seed it yourself.")


# -------------------------------------------------------------------------------------------------------- a new start


class Dictionary(nn.Module):
    """As much of an autoencoder as is needed, and one parameter of another kind."""

    def __init__(self, lead: tuple[int, ...]) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(noise(*lead, D_IN, LATENT, seed=36))
        self.W_dec = nn.Parameter(noise(*lead, LATENT, D_IN, seed=37))
        self.b_enc = nn.Parameter(noise(*lead, LATENT, seed=38))
        self.b_dec = nn.Parameter(noise(*lead, D_IN, seed=39))
        self.log_threshold = nn.Parameter(noise(*lead, LATENT, seed=40))


class Optimizer:
    """What an optimizer remembers after some steps, under the names of torch's Adam or of chapter 03's."""

    def __init__(self, module: nn.Module, names: tuple[str, str], step: Any) -> None:
        self.param_groups = [{"params": list(module.parameters()), "lr": 0.1}]
        self.state = {
            parameter: {
                "step": step,
                names[0]: noise(*parameter.shape, seed=41),
                names[1]: noise(*parameter.shape, seed=42).square(),
            }
            for parameter in module.parameters()
        }


OPTIMIZERS: list[tuple[str, tuple[str, str], Any]] = [
    ("torch's Adam", ("exp_avg", "exp_avg_sq"), torch.tensor(7.0)),
    ("chapter 03's AdamW", ("m", "v"), 7),
]

AXES = {"W_dec": "latent d_in", "W_enc": "d_in latent", "b_enc": "latent", "b_dec": "d_in", "log_threshold": "latent"}


def anew(sae: Any, optimizer: Any, dead: Tensor, directions: Tensor, share: float = 0.2, **wrong: Any) -> None:
    """Latent by latent, with switches for what people get wrong."""
    lead = dead.shape[:-1]
    with torch.no_grad():
        for instance in range(lead[0]) if lead else [...]:
            alive = ~dead[instance]
            norms = sae.W_enc[instance].norm(dim=0).clone()
            over = wrong.get("over", lambda norms, alive: norms[alive].mean() if alive.any() else norms.new_ones(()))
            mean = over(norms, alive)
            for latent in dead[instance].nonzero().flatten().tolist():
                direction = directions[instance][latent]
                unit = direction / direction.norm()
                made = wrong.get("row", lambda unit, direction: unit)(unit, direction)
                sae.W_dec[instance][latent] = made
                column = wrong.get("column", lambda unit, direction, mean: share * mean * unit)
                if not wrong.get("keeps_encoder"):
                    sae.W_enc[instance][:, latent] = column(unit, direction, mean)
                if not wrong.get("keeps_bias"):
                    sae.b_enc[instance][latent] = 0.0
                for name in wrong.get("forgets", ("W_enc", "W_dec", "b_enc")):
                    for label, kept in optimizer.state[getattr(sae, name)].items():
                        if isinstance(kept, Tensor) and kept.dim() and label not in wrong.get("labels", ()):
                            own = kept[instance]
                            if name == "W_enc":
                                own[:, latent] = 0.0
                            else:
                                own[latent] = 0.0


def restarting(**wrong: Any) -> Fn:
    def resample_dead(sae: Any, optimizer: Any, dead: Tensor, directions: Tensor) -> None:
        anew(sae, optimizer, dead, directions, **wrong)

    return resample_dead


def the_living(sae: Any, optimizer: Any, dead: Tensor, directions: Tensor) -> None:
    anew(sae, optimizer, ~dead, directions)


def all_of_them(sae: Any, optimizer: Any, dead: Tensor, directions: Tensor) -> None:
    mean = (sae.W_enc.norm(dim=-2) * ~dead).sum(-1) / (~dead).sum(-1)
    anew(sae, optimizer, torch.ones_like(dead), directions)
    with torch.no_grad():
        sae.W_enc.mul_(mean.where((~dead).any(-1), 1.0)[..., None, None])


def wholly_forgotten(sae: Any, optimizer: Any, dead: Tensor, directions: Tensor) -> None:
    anew(sae, optimizer, dead, directions)
    for kept in optimizer.state.values():
        for value in kept.values():
            if isinstance(value, Tensor) and value.dim():
                value.zero_()


@known_mistakes(
    {
        "the living latents are resampled, and the dead ones are not.": the_living,
        "all latents are resampled, the living too.": all_of_them,
        "the decoder rows keep the length of `directions`; their norm should be 1.": restarting(
            row=lambda unit, direction: direction
        ),
        "the encoder is forgotten: its columns still look for the old direction.": restarting(keeps_encoder=True),
        "the encoder's columns have a norm of 1; it should be 0.2 times the mean norm of the living.": restarting(
            column=lambda unit, direction, mean: unit
        ),
        "the encoder's columns have a norm of 0.2; it should be 0.2 times the mean norm of the living.": restarting(
            column=lambda unit, direction, mean: 0.2 * unit
        ),
        "the encoder's columns have the mean norm of the living; it should be 0.2 times that.": restarting(
            column=lambda unit, direction, mean: mean * unit
        ),
        "the encoder's columns have the length of `directions`; they need a norm of their own.": restarting(
            column=lambda unit, direction, mean: 0.2 * mean * direction
        ),
        "the mean norm is that of all columns; only the living should count.": restarting(
            over=lambda norms, alive: norms.mean()
        ),
        "the mean norm is that of the dead columns; only the living should count.": restarting(
            over=lambda norms, alive: norms[~alive].mean()
        ),
        "the mean over no living latents is NaN; it should count as 1.": restarting(
            over=lambda norms, alive: norms[alive].mean()
        ),
        "the biases are forgotten: `b_enc` should become 0.": restarting(keeps_bias=True),
        "the optimizer's memory is forgotten: Adam goes on with the old latent's moments.": restarting(forgets=()),
        "only the first moments become 0; the second ones should too.": restarting(labels=("exp_avg_sq", "v")),
        "only the decoder's moments become 0; the encoder's should too.": restarting(forgets=("W_dec",)),
        "the bias' moments stay; they should become 0.": restarting(forgets=("W_dec", "W_enc")),
        "the optimizer forgets everything, about the living too.": wholly_forgotten,
    }
)
@may_change("sae", "optimizer")
def check_resample_dead(fn: Fn) -> None:
    """Some dead, all but one, all, and none; with both optimizers."""
    name = "resample_dead"
    some = torch.tensor([[True, False, True, True, False, False], [True] * 4 + [False, True], [True] * 6])
    for lead in LEADS:
        masks = {"": some, " with all latents dead": some | True, " with no latent dead": some & False}
        for words, mask in masks.items():
            dead = mask if lead else mask[0]
            for kind, names, step in OPTIMIZERS:
                sae, right = Dictionary(lead), Dictionary(lead)
                optimizer, other = Optimizer(sae, names, step), Optimizer(right, names, step)
                lengths = torch.tensor([0.1, 3.0, 1.5, 0.5, 2.0, 7.0])[:, None]
                directions = noise(*lead, LATENT, D_IN, seed=43) * lengths
                where = f"{name}{words}, {kind}"
                with during(f"{words or ' with some latents dead'}, {kind}".strip()), _stays_itself(name, sae):
                    fn(sae, optimizer, dead, directions)
                anew(right, other, dead, directions)
                _compare_all(where, sae, optimizer, right, other, WORDS[lead])
    _in_double(name, fn)


@contextmanager
def _stays_itself(name: str, sae: nn.Module) -> Iterator[None]:
    """Parameters must be changed in place: an optimizer knows them by identity."""
    before = dict(sae.named_parameters())
    yield
    for label, parameter in before.items():
        if getattr(sae, label) is not parameter:
            raise CheckFailed(
                f"{name}: `{label}` is another parameter than before, which the optimizer does not know.\n"
                "  Next: write into it, under torch.no_grad(), with `copy_` or an index."
            )


def _compare_all(where: str, sae: Any, optimizer: Any, right: Any, other: Any, lead: str) -> None:
    for label, axes in AXES.items():
        compare(f"{where}: `{label}`", getattr(sae, label), getattr(right, label), lead + axes)
    for label, axes in AXES.items():
        kept, wanted = optimizer.state[getattr(sae, label)], other.state[getattr(right, label)]
        for entry, value in wanted.items():
            if not isinstance(value, Tensor) or not value.dim():
                if kept.get(entry) != value:
                    raise CheckFailed(
                        f'{where}: "{entry}" of `{label}` should stay {value}, got {kept.get(entry)}.\n'
                        "  Next: change only tensors of the parameter's shape."
                    )
                continue
            compare(f'{where}: "{entry}" of `{label}`', kept.get(entry), value, lead + axes)


def _in_double(name: str, fn: Fn) -> None:
    sae, right = Dictionary(()).double(), Dictionary(()).double()
    optimizer, other = (Optimizer(each, ("m", "v"), 7) for each in (sae, right))
    dead = torch.tensor([True, False, True, True, False, False])
    directions = noise(LATENT, D_IN, seed=44).double()
    fn(sae, optimizer, dead, directions)
    anew(right, other, dead, directions)
    for label, axes in AXES.items():
        compare(f"{name} in float64: `{label}`", getattr(sae, label), getattr(right, label), axes, rtol=1e-9, atol=1e-9)
