"""What the checks of this section cannot know: see tests/test_checks.py. Then the reference, on a real model."""

from typing import Any

import pytest
import torch
from torch import nn

import solutions.ch05_patching as ref
from course_utils.checks.ch05.task import attributing, difference, lens, scaled, stacked
from tests.ch05 import other_patching as other
from tests.ch05 import subtle, unusual
from tests.ch05.conftest import source_run

SECRETS = ("einsum(",)


def spoils_the_dataset(logits: Any, dataset: Any) -> Any:
    answer = difference(logits, dataset)
    dataset.io.add_(1)
    return answer


def writes_into_the_cache(cache: Any) -> Any:
    answer = ref.accumulated_residual(cache)
    cache["resid_post", -1].zero_()
    return answer


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "logit_difference": [
        ("values are wrong", lambda lo, data: difference(lo, data, "IO")),
        ("of 4 values is wrong", lambda lo, data: difference(lo, data).abs()),
        ("wrong shape", lambda lo, data: lo[:, -1][:, data.io] - lo[:, -1][:, data.s]),
        ("it changed `io` in place", spoils_the_dataset),
    ],
    "normalised_metric": [
        ("values are wrong", scaled(lambda x, a, b: (x - x.min()) / (x.max() - x.min() + 1e-6))),
        ("values are wrong", scaled(lambda x, a, b: (x - b) / (a + b))),
        ("should raise ValueError", scaled(lambda x, a, b: (x - b) / (a - b if a != b else 1.0))),
    ],
    "accumulated_residual": [
        ("values are wrong", stacked(lambda rows: rows.cumsum(0))),
        ("values are wrong", stacked(lambda rows: rows.roll(1, 0))),
        ("it changed `cache[", writes_into_the_cache),
    ],
    "logit_lens": [
        ("values are wrong", lens(then=lambda values: values - values[:1])),
        ("values are wrong", lens(along=lambda d: d / d.norm(dim=-1, keepdim=True))),
    ],
    "head_attribution": [
        ("values are wrong", attributing(then=lambda values: values.flip(1))),
        ("values are wrong", attributing(then=lambda values: values.sum(-1, keepdim=True).expand_as(values))),
        ("values are wrong", attributing(then=lambda values: values / values.sum((0, 1)))),
    ],
}

SURPRISES = {name: [*listed, *subtle.OF.get(name, ())] for name, listed in SURPRISES.items()}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name), *unusual.OF.get(name, ())] for name in SURPRISES}

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "model.cfg.normalization == 'LN' -> model.cfg.normalization <= 'LN'",  # LN is the least
    "model.cfg.normalization != 'none' -> model.cfg.normalization < 'none'",  # none is the largest
}
ONLY_ON_GPU = "device"


@pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
def test_shares_of_the_heads_and_the_rest_sum_to_the_lens(module: Any, model: nn.Module) -> None:
    _, cache = source_run(model)
    directions = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        heads = module.head_attribution(cache, model, directions).sum((0, 1))
        rest = cache["embed"] + cache["pos_embed"] + cache.stack("mlp_out").sum(0)
        rest = rest + sum(block.attn.b_O for block in model.blocks)
        rest = (rest - rest.mean(-1, keepdim=True)) / cache["ln_final.scale"] * model.ln_final.w + model.ln_final.b
        lens = module.logit_lens(cache, model, directions)[-1]
    torch.testing.assert_close(heads + (rest * directions[:, None]).sum(-1), lens, rtol=1e-3, atol=1e-3)
