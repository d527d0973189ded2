"""Checks of chapter 09, quality: how often latents fire, variance explained, a dictionary spliced in, and its price."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch09.small import (
    D_MODEL,
    MLP_OUT,
    RESID,
    Counted,
    Fn,
    held,
    hooked,
    number,
    opened,
    padded,
    replacing,
    rows_of,
    small_model,
)
from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.leftovers import assert_stops, nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Stop
from course_utils.checks.plain import must_raise
from course_utils.checks.standins.small_dictionary import SmallDictionary

# ------------------------------------------------------------------------------------------------------- firing_rates


def rates(of: Callable[[list[Tensor]], Tensor]) -> Fn:
    return lambda chunks: of(list(chunks))


def fires(chunks: list[Tensor], level: float = 0.0) -> Tensor:
    return (torch.cat(chunks) > level).to(chunks[0])


@known_mistakes(
    {
        "it is the mean over the latents of each token; take it over the tokens, for each latent.": rates(
            lambda chunks: fires(chunks).mean(1)
        ),
        "it is the mean value; count the tokens on which it fires.": rates(lambda chunks: torch.cat(chunks).mean(0)),
        "it is the number of tokens; take the share.": rates(lambda chunks: fires(chunks).sum(0)),
        "every chunk counts the same; count tokens, as chunks differ in size.": rates(
            lambda chunks: torch.stack([fires([chunk]).mean(0) for chunk in chunks]).mean(0)
        ),
        "only the last chunk counts.": rates(lambda chunks: fires(chunks[-1:]).mean(0)),
        "a latent at 0 counts as firing.": rates(lambda chunks: (torch.cat(chunks) >= 0).to(chunks[0]).mean(0)),
        "only tokens on which some latent fires count.": rates(
            lambda chunks: fires(chunks).sum(0) / fires(chunks).amax(1).sum()
        ),
    }
)
def check_firing_rates(fn: Fn) -> None:
    """Chunks of several sizes, with silent tokens and latents."""
    name = "firing_rates"
    for sizes, n_latents in (((4, 1, 6), 5), ((2, 7), 3), ((3,), 4)):
        chunks = [small_values(n, n_latents, seed) for seed, n in enumerate(sizes)]
        counted = [sum(float(value > 0) for chunk in chunks for value in chunk[:, j]) for j in range(n_latents)]
        right = torch.tensor(counted) / sum(sizes)
        with unchanged(name, **{f"chunk {i}": chunk for i, chunk in enumerate(chunks)}):
            actual = fn(one_at_a_time(name, chunks))
        compare(f"{name} of chunks of {sizes} tokens", actual, right, "latent")
    follows_input(name, lambda chunk: fn([chunk, chunk[:1]]), (small_values(5, 3, 1),), "latent")
    fn(Counted(name, "chunks", limit=3))


def small_values(n_tokens: int, n_latents: int, seed: int) -> Tensor:
    """Some are 0, one of them always; some are negative."""
    values = noise(n_tokens, n_latents, seed=seed)
    values[0] = 0
    values[:, -1] = 0
    return values


def one_at_a_time(name: str, chunks: list[Tensor]) -> Iterator[Tensor]:
    """Each chunk once."""
    yield from chunks


# -------------------------------------------------------------------------------------------------- explained_variance


def left_over(of: Callable[[Tensor, Tensor], Tensor]) -> Fn:
    return lambda x, reconstruction: of(x, reconstruction)


@known_mistakes(
    {
        "the mean was not subtracted: it is a share of the squares, not of the variance.": left_over(
            lambda x, r: 1 - (x - r).square().sum() / x.square().sum()
        ),
        "the mean of all numbers was subtracted; each coordinate has a mean of its own.": left_over(
            lambda x, r: 1 - (x - r).square().sum() / (x - x.mean()).square().sum()
        ),
        "it is the mean over coordinates of each one's share.": left_over(
            lambda x, r: (1 - (x - r).square().sum(0) / (x - x.mean(0)).square().sum(0)).mean()
        ),
        "it is the share that is not explained.": left_over(
            lambda x, r: (x - r).square().sum() / (x - x.mean(0)).square().sum()
        ),
        "it is the variance of the reconstruction over that of x.": left_over(
            lambda x, r: (r - r.mean(0)).square().sum() / (x - x.mean(0)).square().sum()
        ),
        "the error's mean was subtracted; a constant error is an error.": left_over(
            lambda x, r: 1 - (x - r - (x - r).mean(0)).square().sum() / (x - x.mean(0)).square().sum()
        ),
        "lengths were divided, not squares.": left_over(lambda x, r: 1 - (x - r).norm() / (x - x.mean(0)).norm()),
        "the mean of each token was subtracted; subtract that of each coordinate.": left_over(
            lambda x, r: 1 - (x - r).square().sum() / (x - x.mean(1, keepdim=True)).square().sum()
        ),
        "the error was divided by the spread token by token, and then averaged.": left_over(
            lambda x, r: (1 - (x - r).square().sum(1) / (x - x.mean(0)).square().sum(1)).mean()
        ),
    }
)
def check_explained_variance(fn: Fn) -> None:
    """By loops."""
    name = "explained_variance"
    for n, d, share in ((6, 4, 0.8), (3, 5, 0.8), (4, 2, -0.9)):  # the last is worse than the mean
        x = noise(n, d, seed=n) * torch.arange(1.0, d + 1) + 2
        reconstruction = share * x + noise(n, d, seed=n + 1, scale=0.4)
        error = spread = 0.0
        for j in range(d):
            column = x[:, j].tolist()
            mean = sum(column) / n
            spread += sum((value - mean) ** 2 for value in column)
            error += sum((a - b) ** 2 for a, b in zip(column, reconstruction[:, j].tolist(), strict=True))
        with unchanged(name, x=x, reconstruction=reconstruction):
            actual = fn(x, reconstruction)
        compare(f"{name} of {n} tokens, d_in={d}", actual, torch.tensor(1 - error / spread), "")
    follows_input(name, fn, (x, reconstruction), "")


# --------------------------------------------------------------------------------------------------------------- splice

New = Callable[[Any, Tensor, Any, bool], Tensor]  # (dictionary, activation, edit, with_error) -> what takes its place


def by_definition(dictionary: Any, x: Tensor, edit: Any, with_error: bool) -> Tensor:
    latents = dictionary.encode(x)
    error = x - dictionary.decode(latents)
    return dictionary.decode(edit(latents) if edit else latents) + with_error * error


def splicing(new: New = by_definition, where: slice = slice(1, None)) -> Fn:
    def splice(model: Any, dictionary: Any, edit: Any = None, with_error: bool = False) -> Any:
        def change(activation: Tensor) -> Tensor:
            out = activation.clone()
            out[:, where] = new(dictionary, activation[:, where], edit, with_error)
            return out

        return replacing(model, dictionary.hook_name, change)

    return splice


def error_after_edit(dictionary: Any, x: Tensor, edit: Any, with_error: bool) -> Tensor:
    latents = dictionary.encode(x)
    latents = edit(latents) if edit else latents
    new = dictionary.decode(latents)
    return new + with_error * (x - new)


@contextmanager
def stays_spliced(model: Any, dictionary: Any, edit: Any = None, with_error: bool = False) -> Iterator[None]:
    with splicing()(model, dictionary, edit, with_error):
        yield
    model.get_submodule(dictionary.hook_name).add(lambda activation, hook: None)


def doubled(latents: Tensor) -> Tensor:
    """An edit."""
    return latents * torch.arange(latents.shape[-1]) / 2


@known_mistakes(
    {
        "the begin token's activation is replaced as well; it stays.": splicing(where=slice(None)),
        "it is done at the last position only.": splicing(where=slice(-1, None)),
        "it is done at the first of the text's positions only.": splicing(where=slice(1, 2)),
        "the edit is left out.": splicing(lambda d, x, edit, error: by_definition(d, x, None, error)),
        "the error is left out.": splicing(lambda d, x, edit, error: by_definition(d, x, edit, False)),
        "the error is always added.": splicing(lambda d, x, edit, error: by_definition(d, x, edit, True)),
        "the error is that of the edited latents, so it takes the edit back.": splicing(error_after_edit),
        "the reconstruction is added to the activation; it takes its place.": splicing(
            lambda d, x, edit, error: x + by_definition(d, x, edit, error)
        ),
        "the error's sign is wrong: it is the activation less the reconstruction.": splicing(
            lambda d, x, edit, error: by_definition(d, x, edit, False) - error * (x - d.decode(d.encode(x)))
        ),
    }
)
def check_splice(fn: Fn) -> None:
    """With and without an edit and the error, at two hook points; nothing stays behind."""
    name, model = "splice", small_model()
    for hook_name, n_pos in ((RESID, 5), (MLP_OUT, 3)):
        dictionary = SmallDictionary(hook_name, D_MODEL)
        tokens, _ = padded((n_pos, n_pos), n_pos)
        for options in ({}, {"edit": doubled}, {"with_error": True}, {"edit": doubled, "with_error": True}):
            words = f"{name} at {hook_name}, {', '.join(options) or 'no options'}"
            with splicing()(model, dictionary, **options), torch.no_grad():
                right = model(tokens)
            with (
                nothing_left_behind(name, model),
                hooked(words),
                opened(name, fn(model, dictionary, **options)),
                torch.no_grad(),
            ):
                actual = model(tokens)
            compare(words, actual, right, "batch pos d_vocab")
    with fn(model, dictionary):
        total = model(tokens).sum()
    if torch.autograd.grad(total, dictionary.sae.b_dec, allow_unused=True)[0] is None:
        raise CheckFailed(f"{name}: no gradient gets through it.\n  Next: look for .detach(), .data or torch.no_grad.")
    kept: list[Tensor] = []
    handle = model.blocks[1].hook_mlp_out.add(lambda activation, hook: kept.append(activation))
    before = held(model, tokens, MLP_OUT)
    with hooked(name), fn(model, dictionary, doubled), torch.no_grad():
        model(tokens)
    handle.remove()
    if not torch.equal(kept[1], before):
        raise CheckFailed(
            f"{name}: it writes into what the model computed, which a cache may hold.\n  Next: make a new tensor."
        )

    def run() -> None:
        with fn(model, dictionary):
            raise Stop

    with nothing_left_behind(name, model):
        assert_stops(name, run, "the block")


# ------------------------------------------------------------------------------------------------------ loss_recovered


def text_loss(model: Any, tokens: Tensor, mask: Tensor) -> float:
    """Token by token, in nats, over all but the begin token."""
    logprobs = model(tokens).double().log_softmax(-1)
    values = [
        -float(logprobs[row, place - 1, tokens[row, place]])
        for row in range(len(tokens))
        for place in range(1, int(mask[row].sum()))
    ]
    return sum(values) / len(values)


def recovering(
    loss: Callable[[Any, Tensor, Tensor], float] = text_loss,
    mean: Callable[[Any, Tensor, Tensor, str], Tensor] = lambda model, tokens, mask, hook: rows_of(
        model, tokens, mask, hook
    ).mean(0),
    first: int = 1,
    of: Callable[[float, float, float], float] = lambda clean, spliced, ablated: (
        (ablated - spliced) / (ablated - clean)
    ),
    which: Callable[[str], str] = lambda baseline: baseline,
    refuses: bool = True,
) -> Fn:
    @torch.no_grad()
    def loss_recovered(model: Any, dictionary: Any, tokens: Tensor, mask: Tensor, baseline: str = "mean") -> Any:
        if refuses and baseline not in ("mean", "zero"):
            raise ValueError(baseline)
        hook = dictionary.hook_name
        stays = mean(model, tokens, mask, hook) * (which(baseline) == "mean")

        def ablate(activation: Tensor) -> Tensor:
            out = stays.expand_as(activation).clone()
            out[:, :first] = activation[:, :first]
            return out

        losses = {"clean": loss(model, tokens, mask)}
        with splicing()(model, dictionary):
            losses["spliced"] = loss(model, tokens, mask)
        with replacing(model, hook, ablate):
            losses["ablated"] = loss(model, tokens, mask)
        return losses | {"recovered": of(losses["clean"], losses["spliced"], losses["ablated"])}

    return loss_recovered


def of_every_place(model: Any, tokens: Tensor, mask: Tensor) -> float:
    return text_loss(model, tokens, torch.ones_like(mask))


def of_texts(model: Any, tokens: Tensor, mask: Tensor) -> float:
    texts = [text_loss(model, tokens[i : i + 1], mask[i : i + 1]) for i in range(len(tokens)) if mask[i].sum() > 1]
    return sum(texts) / len(texts)


@known_mistakes(
    {
        "the baseline is at the wrong end: 0 is the model itself, 1 is the ablated one.": recovering(
            of=lambda clean, spliced, ablated: (spliced - clean) / (ablated - clean)
        ),
        "it is the ratio of the two losses.": recovering(of=lambda clean, spliced, ablated: clean / spliced),
        "the gap is not subtracted from the ablated loss: it is a share of that loss.": recovering(
            of=lambda clean, spliced, ablated: (ablated - spliced) / ablated
        ),
        "zero and mean are swapped.": recovering(which=lambda baseline: "zero" if baseline == "mean" else "mean"),
        "`baseline` is ignored: the mean is taken always.": recovering(which=lambda baseline: "mean"),
        "the begin token is in the mean.": recovering(
            mean=lambda model, tokens, mask, hook: held(model, tokens, hook)[mask].mean(0)
        ),
        "padding is in the mean.": recovering(
            mean=lambda model, tokens, mask, hook: held(model, tokens, hook)[:, 1:].mean((0, 1))
        ),
        "the begin token is ablated, too.": recovering(first=0),
        "padding counts in the losses.": recovering(of_every_place),
        "every text counts the same; every token should.": recovering(of_texts),
    }
)
def check_loss_recovered(fn: Fn) -> None:
    """Losses token by token; both baselines at one hook point, zero at another."""
    name, model = "loss_recovered", small_model()
    for hook_name, lengths in ((RESID, (3, 5, 2)), (MLP_OUT, (4, 2))):
        dictionary = SmallDictionary(hook_name, D_MODEL)
        tokens, mask = padded(lengths, 3)
        for options in ({}, {"baseline": "zero"})[hook_name == MLP_OUT :]:
            right = recovering()(model, dictionary, tokens, mask, **options)
            with unchanged(name, tokens=tokens, mask=mask), nothing_left_behind(name, model):
                actual = fn(model, dictionary, tokens, mask, **options)
            if not isinstance(actual, dict) or actual.keys() != right.keys():
                raise CheckFailed(f"{name}: expected a dict with {list(right)}.\n  Next: return the four by name.")
            for key, value in right.items():
                number(name, f'"{key}" at {hook_name}, {options or "as it is"}', actual[key], value)
    must_raise(
        name,
        ValueError,
        'baseline="median"',
        partial(fn, model, dictionary, tokens, mask, "median"),
        "see the docstring.",
    )
