"""Chapter 03, the loop: the rows that a language model reads, and its loss.

Oracles are loops that spell the definitions out, and autograd.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch03.circuit import chance, nats_of, next_nats
from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.standins.toy_lm import toy_tokens
from course_utils.checks.translating import during

# ------------------------------------------------------------------------------------------------------- packed rows


def dropped(stream: list[int], n_ctx: int, bos: int) -> list[int]:
    """The stream without what does not fill a row."""
    return stream[: len(stream) // n_ctx * n_ctx]


def filled(stream: list[int], n_ctx: int, bos: int) -> list[int]:
    return stream + [bos] * (-len(stream) % n_ctx)


def begun(text: list[int], bos: int) -> list[int]:
    return [bos, *text]


def packing(
    written: Callable[[list[int], int], list[int]] = begun,
    ending: Callable[[list[int], int, int], list[int]] = dropped,
    **wrong: Any,
) -> Callable[..., Tensor]:
    """Packing with switches: how a document is written down, what the stream's end becomes, and so on."""

    def pack_documents(documents: Any, n_ctx: int, bos: int) -> Tensor:
        texts = [written(list(document), bos) for document in documents]
        if "each" in wrong:
            texts = [wrong["each"](text, n_ctx, bos) for text in texts]
        stream = [bos] * wrong.get("once", 0) + [token for text in texts for token in text]
        rows = torch.tensor(ending(stream, n_ctx, bos), dtype=torch.long)
        return rows.view(n_ctx, -1).T if wrong.get("down") else rows.view(-1, n_ctx)

    return pack_documents


@known_mistakes(
    {
        "`bos` comes after each document; it should come before.": packing(lambda text, bos: [*text, bos]),
        "`bos` stands on both sides of each document.": packing(lambda text, bos: [bos, *text, bos]),
        "there is no `bos`.": packing(lambda text, bos: text),
        "only the first document gets a `bos`.": packing(lambda text, bos: text, once=1),
        "the last row, which is not full, is filled up with `bos`; drop it.": packing(ending=filled),
        "every document is cut, and filled up, by itself; they should follow each other.": packing(each=filled),
        "every document is cut by itself, and its rest dropped.": packing(each=dropped),
        "the rest is dropped at the beginning; drop it at the end.": packing(
            ending=lambda stream, n_ctx, bos: stream[len(stream) % n_ctx :]
        ),
        "the last full row is dropped too.": packing(
            ending=lambda stream, n_ctx, bos: dropped(stream, n_ctx, bos)[:-n_ctx]
        ),
        "rows go down the columns; the stream runs along a row.": packing(down=True),
    }
)
def check_pack_documents(fn: Callable[..., Any]) -> None:
    """Documents of all lengths, an empty one too; a stream that fills its rows exactly, and one that fills none."""
    documents = [[3, 1, 4], [], [15, 9], [2, 6, 5, 35, 8, 9, 7, 32], [100_257, 2], [38]]
    for n_ctx, bos in [(4, 0), (11, 50), (5, 0), (30, 0)]:
        with during(f"with n_ctx={n_ctx}"):
            actual = fn(documents, n_ctx, bos)
        stream: list[int] = []
        for text in documents:
            stream.append(bos)
            stream.extend(text)
        rows = [stream[start : start + n_ctx] for start in range(0, len(stream) - n_ctx + 1, n_ctx)]
        expected = torch.tensor(rows, dtype=torch.long).view(-1, n_ctx)
        compare(f"pack_documents with n_ctx={n_ctx}", actual, expected, "row pos")


# ---------------------------------------------------------------------------------------------------------- the loss


def reducing(reduce: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The terms are right, [batch pos]; what is made of them may not be."""
    return lambda logits, tokens: reduce(next_nats(logits, tokens))


@known_mistakes(
    {
        "the labels are not shifted: the logits at a position predict the token after it.": (
            lambda logits, tokens: nats_of(logits, tokens).mean()
        ),
        "the shift goes the wrong way: position 1 is made to predict token 0.": (
            lambda logits, tokens: nats_of(logits[:, 1:], tokens[:, :-1]).mean()
        ),
        "the sum is taken; take the mean.": reducing(torch.sum),
        "the sum over each row is taken, and the mean over rows.": reducing(lambda nats: nats.sum(1).mean()),
        "the sum is divided by batch * pos; there are only batch * (pos - 1) predictions.": reducing(
            lambda nats: nats.sum() / (nats.numel() + len(nats))
        ),
        "rows run into each other: the end of one predicts the beginning of the next.": (
            lambda logits, tokens: nats_of(logits.flatten(0, 1)[:-1], tokens.flatten()[1:]).mean()
        ),
        "the labels are rolled, so that the last position predicts the first token.": (
            lambda logits, tokens: nats_of(logits, tokens.roll(-1, 1)).mean()
        ),
        "only the last prediction of each row counts.": reducing(lambda nats: nats[:, -1].mean()),
        "the last prediction of each row is left out.": reducing(lambda nats: nats[:, :-1].mean()),
        "the minus sign is missing.": reducing(lambda nats: -nats.mean()),
        "it is in bits (logarithm to base 2); it should be in nats.": reducing(lambda nats: nats.mean() / math.log(2)),
        "softmax is taken before cross_entropy, which does that itself.": (
            lambda logits, tokens: next_nats(logits.softmax(-1), tokens).mean()
        ),
        "the logits themselves are averaged; a log_softmax is missing.": (
            lambda logits, tokens: -logits[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
        ),
        "the probabilities are averaged, not their logarithms.": lambda logits, tokens: -chance(logits, tokens).mean(),
        "it is the exponential of the mean, the perplexity.": reducing(lambda nats: nats.mean().exp()),
    }
)
def check_lm_loss(fn: Callable[..., Any]) -> None:
    """The loop over predictions; then logits so far apart that exp overflows; then the gradient."""
    for n_batch, n_pos, scale, case in [
        (3, 5, 1.0, ""),
        (1, 2, 1.0, " of a single prediction"),
        (2, 4, 300.0, " with large logits"),
    ]:
        logits, tokens = noise(n_batch, n_pos, 7, seed=1, scale=scale), toy_tokens(n_batch, n_pos, seed=2)
        compare(f"lm_loss{case}", fn(logits, tokens), loss_by_loop(logits, tokens), "")
    _check_loss_gradient(fn)
    follows_input("lm_loss", fn, (noise(3, 5, 7), toy_tokens(3, 5)), "")
    follows_every_kind("lm_loss", fn, (noise(3, 5, 7), toy_tokens(3, 5)), "")
    tokens = toy_tokens(3, 5)
    impossible = (tokens.roll(-1, 1) + 1) % 7  # not what comes next
    logits = noise(3, 5, 7).scatter(2, impossible[..., None], -torch.inf)
    compare("lm_loss where a token is impossible", fn(logits, tokens), loss_by_loop(logits, tokens), "")


def loss_by_loop(logits: Tensor, tokens: Tensor) -> Tensor:
    """Visit every prediction: row by row, the token after this one."""
    nats = []
    for row, ids in zip(logits, tokens.tolist(), strict=True):
        for position in range(len(ids) - 1):
            scores = row[position] - row[position].max()
            nats.append(scores.exp().sum().log() - scores[ids[position + 1]])
    return torch.stack(nats).mean()


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
