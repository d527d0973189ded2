"""A small model, whoever wrote it, and two texts for it: what the tests of several sections share."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import solutions.ch02_transformer as ch02
from course_utils.config import TransformerConfig
from course_utils.hooks import ActivationCache, run_with_cache
from tests.ch02 import other_transformer

TINY = TransformerConfig(d_vocab=31, n_ctx=17, n_layers=2, n_heads=3, d_model=20, d_head=5, d_mlp=24)
TOKENS = torch.randint(31, (2, 2, 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=[ch02.Transformer, other_transformer.Transformer], ids=["reference", "other"])
def make(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    """A `Transformer`, whoever wrote it."""
    return request.param


def with_random_parameters(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return model


@pytest.fixture
def model(make: Callable[..., nn.Module]) -> nn.Module:
    """A small transformer in which every parameter is random."""
    return with_random_parameters(make(TINY))


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def source_run(model: nn.Module) -> tuple[torch.Tensor, ActivationCache]:
    with torch.no_grad():
        return run_with_cache(model, TOKENS[1])
