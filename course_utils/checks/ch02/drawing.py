"""Drawing tokens, spelled out: which tokens a filter keeps, what frequencies tell, and a model with known logits."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_utils.checks.outcomes import CheckFailed
from course_utils.config import TransformerConfig

INF = torch.inf


def kept(logits: Tensor, chosen: Sequence[Sequence[int]]) -> Tensor:
    """The logits of the chosen tokens of each row; -inf elsewhere."""
    kept = torch.full_like(logits, -INF)
    for row, tokens in enumerate(chosen):
        for token in tokens:
            kept[row, token] = logits[row, token]
    return kept


def ranked(logits: Tensor) -> list[list[int]]:
    """Each row's tokens, the likeliest first."""
    return [sorted(range(len(row)), key=row.__getitem__, reverse=True) for row in logits.tolist()]


def nucleus(probabilities: Sequence[float], ranked: Sequence[int], p: float, at_least: int = 1) -> Sequence[int]:
    """The definition: add the likeliest token until there are enough."""
    total, size = 0.0, 0
    while size < len(ranked) and (total < p or size < at_least):
        total += probabilities[ranked[size]]
        size += 1
    return ranked[:size]


def with_first(ranked: Sequence[int], n: int, wanted: Sequence[bool]) -> list[int]:
    """The wanted tokens, and the first `n` in any case."""
    return [token for place, token in enumerate(ranked) if place < n or wanted[token]]


def sorted_nucleus(logits: Tensor, sizes: Sequence[int]) -> Tensor:
    ranked = logits.sort(-1, descending=True).values
    return torch.stack(
        [row.masked_fill(torch.arange(13) >= size, -INF) for row, size in zip(ranked, sizes, strict=True)]
    )


def judge_frequencies(drawn: Tensor, chances: Tensor) -> None:
    """Each kind of row against its probabilities; five standard errors of tolerance."""
    n_each, n_tokens = len(drawn), chances.shape[1]
    for kind in range(2):
        counts = torch.stack([(drawn[:, kind] == token).sum() for token in range(n_tokens)]) / n_each
        if counts.sum() < 0.999:
            raise CheckFailed(f"sample: it drew {drawn[:, kind].max()}, but tokens go from 0 to {n_tokens - 1}.")
        impossible = (counts > 0) & (chances[kind] == 0)
        if impossible.any():
            token = int(impossible.int().argmax())
            hint = _distribution_hint(counts, chances, kind, n_each) or (
                "\n  Next: softmax gives a logit of -inf the probability 0; look for what changes that."
            )
            raise CheckFailed(
                f"sample: it drew token {token}, whose logit is -inf (in {counts[token]:.0%} of the draws).{hint}"
            )
        if not _fits(counts, chances[kind], n_each):
            worst = int((counts - chances[kind]).abs().argmax())
            hint = _distribution_hint(counts, chances, kind, n_each)
            raise CheckFailed(
                f"sample: token {worst} should be drawn with probability {chances[kind, worst]:.2f}, but it came in "
                f"{counts[worst]:.0%} of {n_each} draws.{hint}"
            )
    together = torch.corrcoef(drawn.T.double())[0, 1].item()
    if abs(together) > 6 / math.sqrt(n_each):
        raise CheckFailed("sample: rows depend on each other.\n  Next: draw another random number for each row.")


def _fits(counts: Tensor, chances: Tensor, n: int) -> bool:
    return bool(((counts - chances).abs() <= 5 * (chances * (1 - chances) / n).sqrt() + 1e-6).all())


def _distribution_hint(counts: Tensor, chances: Tensor, kind: int, n: int) -> str:
    own = chances[kind]
    known = {
        "the most likely token is always taken.": F.one_hot(own.argmax(), len(own)).float(),
        "all tokens are equally likely; the logits are ignored.": torch.full_like(own, 1 / len(own)),
        "the softmax is taken twice.": own.softmax(-1),
        "every row is drawn with another row's probabilities.": chances[1 - kind],
        "the tokens with a finite logit are all equally likely.": (own > 0) / (own > 0).sum(),
    }
    hints = [f"\n  That fits if {hint}" for hint, distribution in known.items() if _fits(counts, distribution, n)]
    return "".join(hints) or "\n  Next: the probabilities are the softmax of the row's logits, along d_vocab."


class ToyModel(nn.Module):
    """A model whose logits are known: a hash of all tokens so far.

    With a key-value cache it remembers the tokens there, as keys, and nowhere else. `widths` notes how many positions
    each call was given.
    """

    def __init__(self, cfg: TransformerConfig, name: str = "generate", scale: float = 1.0) -> None:
        super().__init__()
        self.cfg, self.name = cfg, name
        self.scale = nn.Parameter(torch.tensor(scale))
        self.widths: list[int] = []
        self.recorded = False  # whether a call came with gradients switched on

    def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
        n_new = tokens.shape[1]
        self.widths.append(n_new)
        self.recorded |= torch.is_grad_enabled()
        if cache is not None:
            tokens = self._remembered(tokens, cache)
        elif n_new > self.cfg.n_ctx:
            raise CheckFailed(
                f"{self.name}: the model was given {n_new} positions, but n_ctx is {self.cfg.n_ctx}.\n"
                "  Next: stop when the sequence is n_ctx long."
            )
        return (self.logits(tokens) * self.scale)[:, -n_new:]

    def _remembered(self, tokens: Tensor, cache: Any) -> Tensor:
        """All tokens so far, by the cache."""
        marks = tokens.to(self.scale.dtype)[:, :, None, None].expand(-1, -1, self.cfg.n_heads, self.cfg.d_head)
        known = next(iter(cache.contents.values()))[0] if getattr(cache, "contents", None) else marks
        if len(known) != len(marks):
            raise CheckFailed(
                f"{self.name} with a key-value cache: the model was given {len(marks)} rows while the cache holds "
                f"{len(known)}.\n  Next: `cache.select` makes its rows follow the beams; call it in every step."
            )
        for layer in range(self.cfg.n_layers):
            keys, _ = cache.append(layer, marks, marks)
        return keys[:, :, 0, 0].round().long()

    def logits(self, tokens: Tensor) -> Tensor:
        """Different at every position, for every history."""
        position = torch.arange(1, tokens.shape[1] + 1)
        history = ((tokens + 1) * position).cumsum(1)[..., None]
        return torch.sin(history * torch.arange(1, self.cfg.d_vocab + 1) * 0.37)


def scripted(prompt: Tensor, script: Tensor, eos: int | None, finished: Sequence[bool]) -> Tensor:
    """The definition, row by row: what the script says until eos, then eos, until all rows are finished."""
    rows, done = [list(row) for row in prompt.tolist()], list(finished)
    for choices in script.T.tolist():
        if all(done):
            break
        for index, token in enumerate(choices):
            rows[index].append(eos if done[index] else token)
            done[index] = rows[index][-1] == eos
    return torch.tensor(rows)


def eos_mistakes(prompt: Tensor, script: Tensor, eos: int | None, expected: Tensor) -> dict[str, Tensor]:
    if eos is None:
        return {}
    forgetful, width, start = torch.cat([prompt, script], dim=1), expected.shape[1], prompt.shape[1]
    ends = [int((row == eos).int().argmax()) + 1 if (row == eos).any() else len(row) for row in script]
    filled = expected.clone()
    for row, end in enumerate(ends):
        filled[row, start + end :] = 0
    mistakes = {
        "a finished row goes on with what `pick` says; it should go on with eos.": forgetful[:, :width],
        "generation does not stop when all rows are finished.": F.pad(
            expected, (0, forgetful.shape[1] - width), value=eos
        ),
        "eos is not looked at.": forgetful,
        "generation stops as soon as one row is finished.": expected[:, : start + min(ends)],
        "the last eos is cut off.": expected[:, :-1],
        "finished rows are filled with 0 instead of eos.": filled,
        "an eos in the prompt finishes the row; only what the row produces counts.": scripted(
            prompt, script, eos, (prompt == eos).any(1).tolist()
        ),
    }
    return {hint: answer for hint, answer in mistakes.items() if not _equal(answer, expected)}


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)
