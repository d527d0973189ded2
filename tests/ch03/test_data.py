"""Chapter 03's rows and loss: wrong answers that their checks do not know, and right ones written another way."""

from typing import Any

import torch
from torch.nn import functional as F

import solutions.ch03_training as ref
from course_utils.checks.ch03.circuit import chance, next_nats
from tests.ch03 import other_training_loop as other

SECRETS = (".flatten(0, 1)", "reshape(n_rows")


def repacked(change: Any) -> Any:
    return lambda documents, n_ctx, bos: change(ref.pack_documents(documents, n_ctx, bos))


def one_hot(logits: Any, tokens: Any) -> Any:
    """0 times the log of 0."""
    return -(F.one_hot(tokens[:, 1:], logits.shape[2]) * logits[:, :-1].log_softmax(-1)).sum(-1).mean()


def through_uint16(documents: Any, n_ctx: int, bos: int) -> Any:
    return ref.pack_documents([[token % 2**16 for token in document] for document in documents], n_ctx, bos)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "pack_documents": [
        ("wrong shape", repacked(lambda rows: rows if len(rows) else rows.flatten())),
        ("values are wrong", lambda documents, *rest: ref.pack_documents([d for d in documents if d], *rest)),
        ("expected dtype int64, got int32", repacked(torch.Tensor.int)),
        ("values is wrong", through_uint16),
        (
            "it changed `documents[0]`",
            lambda documents, n_ctx, bos: ref.pack_documents(
                [d for d in documents if not d.insert(0, bos)], n_ctx, bos
            ),
        ),
    ],
    "lm_loss": [
        ("no gradient gets through", lambda logits, tokens: next_nats(logits.detach(), tokens).mean()),
        ("lm_loss with large logits", lambda logits, tokens: -chance(logits, tokens).log().mean()),
        ("1 values is wrong", lambda logits, tokens: next_nats(logits[:1], tokens[:1]).mean()),
        ("wrong shape", next_nats),
        ("where a token is impossible", one_hot),
        ("fewer digits", lambda logits, tokens: next_nats(logits.float(), tokens).mean().to(logits.dtype)),
        ("RuntimeError on inputs that are not contiguous", lambda x, t: next_nats(x.view(-1).view_as(x), t).mean()),
        ("expected a Tensor", lambda logits, tokens: next_nats(logits, tokens).mean().item()),
        (
            "the gradient that it sends",
            lambda logits, tokens: next_nats(logits.detach(), tokens).mean() + 0 * logits.sum(),
        ),
    ],
}


def by_transposing(logits: Any, tokens: Any) -> Any:
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:])


ALSO_RIGHT = {"pack_documents": [other.pack_documents], "lm_loss": [other.lm_loss, by_transposing]}

# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = set()
