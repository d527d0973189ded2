"""Checks of chapter 09, collecting: activations of tokens, one scale for all, and a buffer that mixes them."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch09.small import D_MODEL, MLP_OUT, RESID, Fn, held, number, padded, rows_of, small_model
from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.leftovers import nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.plain import agree

# -------------------------------------------------------------------------------------------------- token_activations


def by_mask(which: Callable[[Tensor], Tensor], end: Callable[[Tensor], Tensor] = lambda rows: rows) -> Fn:
    """Rows of a padded batch that `which` makes of the mask."""

    def token_activations(model: Any, tokens: Tensor, mask: Tensor, hook_name: str) -> Tensor:
        return end(held(model, tokens, hook_name)[which(mask)])

    return token_activations


def but_first(mask: Tensor) -> Tensor:
    return mask & (torch.arange(mask.shape[1]) > 0)


def but_last(mask: Tensor) -> Tensor:
    return mask & mask.roll(-1, 1) & (torch.arange(mask.shape[1]) < mask.shape[1] - 1)


def by_position(model: Any, tokens: Tensor, mask: Tensor, hook_name: str) -> Tensor:
    return held(model, tokens, hook_name).transpose(0, 1)[but_first(mask).T]


@known_mistakes(
    {
        "the begin token has a row; leave it out.": by_mask(lambda mask: mask),
        "padding has rows.": by_mask(lambda mask: but_first(torch.ones_like(mask))),
        "padding and the begin token have rows.": by_mask(torch.ones_like),
        "the last token of each text is left out; leave out the first, the begin token.": by_mask(but_last),
        "the mask's True and False are swapped.": by_mask(lambda mask: ~mask),
        "the rows come position by position; they come text after text.": by_position,
        "each row is scaled to length 1; the scale comes later, and is one number.": by_mask(
            but_first, lambda rows: rows / rows.norm(dim=-1, keepdim=True)
        ),
    }
)
def check_token_activations(fn: Fn) -> None:
    """Against each text run alone, without padding; two hook points."""
    name, model = "token_activations", small_model()
    for hook_name, lengths in ((RESID, (3, 6, 1, 4)), (MLP_OUT, (5, 2)), ("blocks.0.hook_resid_pre", (2,))):
        tokens, mask = padded(lengths)
        tokens = torch.where(mask, tokens, 5)
        tokens[0, 1] = 0  # the begin token's number within a text: the mask alone says what is padding
        right = rows_of(model, tokens, mask, hook_name)
        runs: list[int] = []
        handle = model.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        with unchanged(name, tokens=tokens, mask=mask), nothing_left_behind(name, model):
            actual = fn(model, tokens, mask, hook_name)
        handle.remove()
        compare(f"{name} at {hook_name}, texts of {lengths} tokens", actual, right, "token d_in")
        if actual.requires_grad:
            raise CheckFailed(f"{name}: gradients are recorded.\n  Next: run the model under `torch.no_grad()`.")
        if len(runs) > 1:
            raise CheckFailed(f"{name}: the model ran {len(runs)} times.\n  Next: run it once, on all texts together.")
    follows_input(name, fn, (model, *padded((3, 4)), RESID), "token d_in")


# --------------------------------------------------------------------------------------------------------- norm_scale


def scaled_by(of: Callable[[Tensor], Tensor]) -> Fn:
    return lambda activations: float(of(activations.double()))


@known_mistakes(
    {
        "it is the root of the mean square of the norms; take their mean.": scaled_by(
            lambda x: (x.shape[1] / x.square().sum(1).mean()).sqrt()
        ),
        "the mean norm becomes 1; it is to become sqrt(d_in).": scaled_by(lambda x: 1 / x.norm(dim=1).mean()),
        "the mean norm becomes d_in; it is to become sqrt(d_in).": scaled_by(
            lambda x: len(x[0]) / x.norm(dim=1).mean()
        ),
        "it is the mean of the scales of the rows; one scale, from the mean norm.": scaled_by(
            lambda x: (x.shape[1] ** 0.5 / x.norm(dim=1)).mean()
        ),
        "it is upside down: multiply by sqrt(d_in), divide by the mean norm.": scaled_by(
            lambda x: x.norm(dim=1).mean() / x.shape[1] ** 0.5
        ),
        "the mean activation was subtracted first.": scaled_by(
            lambda x: x.shape[1] ** 0.5 / (x - x.mean(0)).norm(dim=1).mean()
        ),
        "sqrt of the number of tokens was taken, not of d_in.": scaled_by(
            lambda x: (len(x) / 1) ** 0.5 / x.norm(dim=1).mean()
        ),
    }
)
def check_norm_scale(fn: Fn) -> None:
    """By loops; sizes that differ."""
    name = "norm_scale"
    for n, d in ((5, 3), (2, 7), (1, 4)):
        activations = noise(n, d, seed=n) * torch.arange(1.0, n + 1)[:, None] + 0.5
        norms = [math.sqrt(sum(value**2 for value in row)) for row in activations.tolist()]
        with unchanged(name, activations=activations):
            actual = fn(activations)
        number(name, f"{n} activations with d_in={d}", actual, math.sqrt(d) * n / sum(norms))


# --------------------------------------------------------------------------------------------------- ActivationBuffer


class SlowBuffer:
    """A buffer as a list of rows, with places at which it may go wrong."""

    def __init__(
        self,
        model: Any,
        batches: Iterable[Any],
        hook_name: str,
        n_tokens: int,
        generator: torch.Generator,
        scale: float | None = None,
    ) -> None:
        self.model, self.stream, self.hook_name = model, iter(batches), hook_name
        self.n_tokens, self.generator, self.n_read = n_tokens, generator, 0
        self.rows: list[Tensor] = []
        self.scale: Any = None
        self.fill(n_tokens)
        self.scale = self.measure() if scale is None else scale

    def measure(self) -> float:
        return math.sqrt(len(self.rows[0])) * len(self.rows) / sum(float(row.norm()) for row in self.rows)

    def of_batch(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return held(self.model, tokens, self.hook_name)[but_first(mask)]

    def is_low(self, n: int) -> bool:
        return len(self.rows) < n or 2 * len(self.rows) < self.n_tokens

    def fill(self, n: int) -> None:
        while len(self.rows) < n:
            batch = next(self.stream, None)
            if batch is None:
                break
            self.n_read += 1
            self.rows += list(self.of_batch(*batch))
        self.mix()

    def mix(self) -> None:
        order = torch.randperm(len(self.rows), generator=self.generator).tolist()
        self.rows = [self.rows[place] for place in order]

    def next(self, n: int) -> Tensor:
        if self.is_low(n):
            self.fill(max(n, self.n_tokens))
        if not self.rows:
            raise StopIteration
        batch, self.rows = torch.stack(self.rows[:n]), self.rows[n:]
        return self.scaled(batch)

    def scaled(self, batch: Tensor) -> Tensor:
        return batch * self.scale

    def state_dict(self) -> dict[str, Any]:
        state = {"rows": list(self.rows), "scale": self.scale, "n_read": self.n_read}
        return state | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for _ in range(state["n_read"] - self.n_read):
            next(self.stream)
        self.rows, self.scale, self.n_read = list(state["rows"]), state["scale"], state["n_read"]
        self.generator.set_state(state["generator"])


def buffer(**methods: Callable[..., Any]) -> type:
    return type("ActivationBuffer", (SlowBuffer,), methods)


def replaces_what_is_left(self: Any, n: int) -> None:
    self.rows = []
    SlowBuffer.fill(self, n)


def measures_again(self: Any, n: int) -> None:
    SlowBuffer.fill(self, n)
    if self.scale is not None and self.rows:
        self.scale = self.measure()


def draws_again_and_again(self: Any, n: int) -> Tensor:
    kept = list(self.rows)
    batch = SlowBuffer.next(self, n)
    chosen = torch.randint(len(kept), (len(batch),), generator=self.generator).tolist()
    return self.scaled(torch.stack([kept[place] for place in chosen]))


def forgets_generator(self: Any, state: dict[str, Any]) -> None:
    SlowBuffer.load_state_dict(self, state | {"generator": self.generator.get_state()})


def starts_texts_again(self: Any, state: dict[str, Any]) -> None:
    SlowBuffer.load_state_dict(self, state | {"n_read": self.n_read})


def keeps_own_rows(self: Any, state: dict[str, Any]) -> None:
    SlowBuffer.load_state_dict(self, state | {"rows": self.rows})


def keeps_own_scale(self: Any, state: dict[str, Any]) -> None:
    SlowBuffer.load_state_dict(self, state | {"scale": self.scale})


def ends_early(self: Any, n: int) -> Tensor:
    if self.is_low(n):
        self.fill(max(n, self.n_tokens))
    if len(self.rows) < n:
        raise StopIteration
    return SlowBuffer.next(self, n)


LENGTHS = ((4, 2, 6), (5, 3), (2, 2, 3, 4), (6, 5), (3, 6), (7,), (4, 5, 2))


class Watched:
    """Batches of small texts, and how many were read."""

    def __init__(self) -> None:
        self.n = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for seed, lengths in enumerate(LENGTHS):
            self.n += 1
            yield padded(lengths, seed)


@known_mistakes(
    {
        "the begin token is among the rows.": buffer(
            of_batch=lambda self, tokens, mask: held(self.model, tokens, self.hook_name)[mask]
        ),
        "padding is among the rows.": buffer(
            of_batch=lambda self, tokens, mask: held(self.model, tokens, self.hook_name)[:, 1:].flatten(0, 1)
        ),
        "each row has a scale of its own; one number serves all.": buffer(
            scaled=lambda self, batch: batch * D_MODEL**0.5 / batch.norm(dim=1, keepdim=True)
        ),
        "the rows come as the model computed them, not scaled.": buffer(scaled=lambda self, batch: batch),
        "the scale is measured again at every filling; it stays.": buffer(fill=measures_again),
        "what was left is thrown away when the buffer is filled again.": buffer(fill=replaces_what_is_left),
        "a row may come twice: they are drawn with replacement.": buffer(next=draws_again_and_again),
        "the rows are not mixed.": buffer(mix=lambda self: None),
        "the buffer is filled again only when it is empty.": buffer(is_low=lambda self, n: not self.rows),
        "it is filled again before every portion.": buffer(is_low=lambda self, n: len(self.rows) < self.n_tokens),
        "the rest is not handed out when the texts are at an end.": buffer(next=ends_early),
        "the generator's state is not restored.": buffer(load_state_dict=forgets_generator),
        "the texts begin again after `load_state_dict`.": buffer(load_state_dict=starts_texts_again),
        "the rows that were left are not restored.": buffer(load_state_dict=keeps_own_rows),
        "the scale is not restored.": buffer(load_state_dict=keeps_own_scale),
    }
)
def check_ActivationBuffer(cls: Any) -> None:  # noqa: N802 (named after the class)
    """What is handed out, when batches are read, whether it is mixed, and whether it can be resumed."""
    name, model = "ActivationBuffer", small_model(n_layers=1)
    every = [rows_of(model, *padded(lengths, seed), RESID) for seed, lengths in enumerate(LENGTHS)]

    def made(n_tokens: int, seed: int = 0, **options: Any) -> tuple[Any, Watched]:
        batches = Watched()
        return cls(model, batches, RESID, n_tokens, torch.Generator().manual_seed(seed), **options), batches

    for n_tokens, n in ((12, 3), (3, 8), (15, 4)):
        own, batches = made(n_tokens)
        words = f"n_tokens={n_tokens}, next({n})"
        first = torch.cat(every[: _needed(n_tokens, every)])
        right = D_MODEL**0.5 * len(first) / sum(row.norm().item() for row in first)
        number(name, f"`scale`, {words}", own.scale, right)
        portions, read, should = [], [batches.n], _reads(n_tokens, n, every)
        while (portion := _portion(name, own, n)) is not None:
            portions.append(portion)
            read.append(batches.n)
            if len(portions) > sum(map(len, every)):
                raise CheckFailed(f"{name}: it never ends.\n  Next: raise StopIteration when no rows are left.")
        handed = torch.cat(portions) if portions else torch.zeros(0, D_MODEL)
        pool = torch.cat(every) * right
        compare(f"{name}: all rows together, sorted, {words}", _sorted(handed), _sorted(pool), "token d_model")
        agree(name, f"{words}: the number of batches read, at first and after each portion", read, should)
        if torch.allclose(handed[:n], first[:n] * right):
            raise CheckFailed(
                f"{name}: the rows come in the order of the texts.",
                evidence=Evidence(f"{name} order", handed),
                advice="  Next: put all rows of the buffer in a random order.",
            )
    _check_mixing(name, made, every)
    _check_resuming(name, made)
    own, _ = made(12, scale=2.5)
    number(name, "`scale`, given as 2.5", own.scale, 2.5)
    compare(
        f"{name} with scale=2.5: norms", own.next(99).norm(dim=1).sort().values, _first_norms(every, 99) * 2.5, "token"
    )


def _first_norms(every: list[Tensor], n: int) -> Tensor:
    return torch.cat(every[: _needed(n, every)]).norm(dim=1).sort().values


def _portion(name: str, own: Any, n: int) -> Tensor | None:
    try:
        portion = own.next(n)
    except StopIteration:
        return None
    if not isinstance(portion, Tensor) or portion.dim() != 2 or len(portion) > n:
        raise CheckFailed(f"{name}: next({n}) is to return {n} rows, or fewer at the end.\n  Next: print its shape.")
    return portion


def _needed(n: int, every: list[Tensor], n_before: int = 0) -> int:
    """How many batches have been read when there are n rows, of those that follow the first `n_before` batches."""
    total, read = 0, n_before
    while total < n and read < len(every):
        total += len(every[read])
        read += 1
    return read


def _reads(n_tokens: int, n: int, every: list[Tensor]) -> list[int]:
    """How many batches should have been read, at first and after each portion."""
    sizes = [len(rows) for rows in every]
    read = _needed(n_tokens, every)
    left, found = sum(sizes[:read]), [read]
    while True:
        if left < n or 2 * left < n_tokens:
            while left < max(n, n_tokens) and read < len(sizes):
                left += sizes[read]
                read += 1
        if not left:
            return found
        left -= min(n, left)
        found.append(read)


def _sorted(rows: Tensor) -> Tensor:
    """In the order of a random projection."""
    return rows[(rows @ noise(D_MODEL, seed=9)).argsort()]


def _check_mixing(name: str, made: Fn, every: list[Tensor]) -> None:
    """Old and new rows are in one portion, and another seed gives another order."""
    own, _ = made(20)
    other, _ = made(20, 1)
    again, _ = made(20)
    first = own.next(15)
    if torch.equal(first, other.next(15)) or not torch.equal(first, again.next(15)):
        raise CheckFailed(f"{name}: the order does not depend on `generator`, or not on it alone.\n  Next: use it.")
    known = torch.cat(every[: _needed(20, every)]) * own.scale
    portion = own.next(14)
    is_old = (portion[:, None] - known).abs().amax(-1).amin(-1) < 1e-5
    if is_old[:6].all() or not is_old.any() or len(portion) != 14:
        raise CheckFailed(
            f"{name}: rows that were left, and new ones, are not mixed.\n"
            "  Next: after reading, put all rows in a new random order, old and new together."
        )


def _check_resuming(name: str, made: Fn) -> None:
    old, _ = made(12)
    for _ in range(8):
        old.next(4)
    state = old.state_dict()
    expected = [old.next(4) for _ in range(4)]
    new, _ = made(12, 3, scale=9.0)
    new.load_state_dict(state)
    for number_of, portion in enumerate(expected):
        actual = _portion(name, new, 4)
        if actual is None:
            raise CheckFailed(f"{name}: after load_state_dict, it ends too early.\n  Next: how many batches were read?")
        compare(f"{name} after load_state_dict, portion {number_of}", actual, portion, "token d_model")
