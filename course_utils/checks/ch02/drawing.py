"""Drawing tokens, spelled out: which tokens a filter keeps, and what a row becomes that goes on by a script."""

from collections.abc import Sequence

import torch
from torch import Tensor

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
