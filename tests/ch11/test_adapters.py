"""What the checks of adapters in chapter 11 cannot know: see tests/test_checks.py."""

from typing import Any

import torch
from torch import nn

import solutions.ch11_oracles as ref
from course_utils.checks.ch11.adapters import Adapted, adapting, wrong
from course_utils.checks.ch11.small import small_model
from tests.ch11 import other_oracles as other

SECRETS = ("register_parametrization(block.mlp", "self.B @ self.A")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT: set[str] = set()


def merged_wrapped(self: Any) -> Any:
    return nn.Sequential(Adapted.merged(self))


def own_draws(self: Any, linear: Any, rank: int, generator: torch.Generator) -> Any:
    drawn = torch.randn(rank, linear.in_features, generator=torch.Generator().manual_seed(0))
    return (drawn / linear.in_features**0.5).to(linear.weight)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "LoRALinear": [
        ("merged() gives a Sequential", wrong(merged=merged_wrapped)),
        ("A does not depend on the generator", wrong(first=own_draws)),
        ("expected a class", lambda *arguments: None),
        ("values are wrong", wrong(change=lambda self: -self.scale * self.B @ self.A)),
    ],
    "add_adapters": [
        ("expected a list of parameters", lambda *arguments: tuple(adapting()(*arguments))),
        ("values are wrong", adapting(times=2.0)),
        ("returned have shapes", lambda *arguments: adapting()(*arguments)[::-1]),
        ("returned have shapes", lambda model, rank, alpha, generator: adapting()(model, rank + 1, alpha, generator)),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {"LoRALinear": [other.LoRALinear], "add_adapters": [other.add_adapters]}


def test_only_new_tokens_are_trained() -> None:
    model = small_model(13)
    before = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    added = ref.add_adapters(model, 2, 1.0, torch.Generator().manual_seed(0)) + ref.train_new_tokens(model, 10)
    assert [tuple(parameter.shape) for parameter in added[-3:]] == [(3, 7), (7, 3), (3,)]
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(map(id, added))
    with torch.no_grad():
        for parameter in added[-3:]:
            parameter.add_(1.0)
    torch.testing.assert_close(model.embed.W_E[:10], before["embed.W_E"][:10])
    torch.testing.assert_close(model.embed.W_E[10:], before["embed.W_E"][10:] + 1)
    torch.testing.assert_close(model.unembed.W_U[:, 10:], before["unembed.W_U"][:, 10:] + 1)
