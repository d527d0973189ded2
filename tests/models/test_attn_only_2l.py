"""What chapter 04 says about the circuit of `attn-only-2l` holds for the weights that ship."""

import pytest
import torch

import solutions.ch04_induction as ch04
from course_utils.hooks import run_with_cache
from course_utils.pretrained import load_pretrained
from solutions.ch02_transformer import Transformer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found() -> tuple:
    """The model, LayerNorm folded; previous-token and induction scores on repeated random tokens."""
    model = load_pretrained(Transformer, "attn-only-2l")
    tokens = ch04.repeated_tokens(16, 24, model.cfg.d_vocab, torch.Generator().manual_seed(1), bos=0)
    with torch.no_grad():
        _, cache = run_with_cache(model, tokens, names="*hook_pattern")
        return ch04.fold_layer_norm(model), ch04.previous_token_scores(cache), ch04.induction_scores(cache, 24)


def test_the_largest_k_composition_is_previous_token_head_with_an_induction_head(found: tuple) -> None:
    folded, previous, induction = found
    with torch.no_grad():
        table = ch04.composition_scores(folded, "K")[0, :, 1]
        chance = ch04.random_composition_baseline(folded, "K", 100, torch.Generator().manual_seed(0))
    head, later_head = divmod(table.argmax().item(), folded.cfg.n_heads)
    assert head == previous[0].argmax()
    assert induction[1, later_head] > 0.5
    assert table[head, later_head] > chance.mean() + 3 * chance.std()
