"""The experiments of chapter 08 in nnsight give what ours do. Skipped where it is not installed.

`pip install 'circuits-from-scratch[peers]'` installs it.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import solutions.ch08_function_vectors as ours
from course_utils.checks.ch08.small import small_model, tokens_of
from course_utils.checks.modules import noise

peer = pytest.importorskip("nnsight", reason="nnsight is not installed (extra `peers`)")


def seen(model: Any, tokens: Tensor) -> list[Tensor]:
    """What every head mixes at the last position, on average."""
    watched = peer.NNsight(model)
    with torch.no_grad(), watched.trace(tokens):
        mixtures = peer.save([block.attn.hook_z.output[:, -1].mean(dim=0) for block in watched.blocks])
    return list(mixtures)


def test_mean_head_outputs_are_theirs() -> None:
    model, tokens = small_model(), tokens_of(4, 6)
    outputs = [
        torch.einsum("hd,hdm->hm", z, block.attn.W_O.detach())
        for z, block in zip(seen(model, tokens), model.blocks, strict=True)
    ]
    torch.testing.assert_close(ours.mean_head_outputs(model, tokens), torch.stack(outputs))


def test_adding_a_vector_does_what_theirs_does() -> None:
    model, tokens = small_model(), tokens_of(4, 6)
    vector = noise(model.cfg.d_model, seed=1)
    watched = peer.NNsight(model)
    with torch.no_grad():
        with watched.trace(tokens):
            watched.blocks[1].output[:, -1] += vector
            theirs = peer.save(watched.output)
        with ours.add_vector(model, 1, vector):
            torch.testing.assert_close(model(tokens), theirs)
        assert not torch.allclose(model(tokens), theirs)
