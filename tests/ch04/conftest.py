"""What the tests of chapter 04 share: a small transformer, repeated tokens, and whose functions look at them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import solutions.ch02_transformer as ch02
import solutions.ch04_induction as ref
from course_utils.checks.modules import randomise
from course_utils.config import TransformerConfig
from tests.ch02 import other_transformer
from tests.ch04 import other_induction

TINY = TransformerConfig(d_vocab=31, n_ctx=17, n_layers=3, n_heads=4, d_model=20, d_head=5, d_mlp=24)


@pytest.fixture(params=[ref, other_induction], ids=["reference", "other"])
def module(request: pytest.FixtureRequest) -> Any:
    """Solutions of the chapter's first half, in two styles."""
    return request.param


@pytest.fixture(params=[ch02.Transformer, other_transformer.Transformer], ids=["our model", "another model"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A small transformer in which every parameter is random, whoever wrote it."""
    made = request.param(TINY)
    randomise(made)
    return made


@pytest.fixture
def tokens() -> Tensor:
    return ref.repeated_tokens(2, 6, 31, torch.Generator().manual_seed(1), bos=0)
