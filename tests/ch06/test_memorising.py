"""What the checks of memorising cannot know: see tests/test_checks.py."""

from typing import Any

import pytest
import torch

import solutions.ch06_superposition as ref
from course_utils.checks import CheckFailed, run_check
from course_utils.checks.ch06.memorising import check_train_on_fixed_data, fixed_data, pushing
from tests.ch06 import other_toys as other

SECRETS = ("autograd.grad(change", "normalize(sample_features")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "300 -> 299",  # rows that are drawn
    "300 -> 301",
    "length > 0 -> length != 0",  # it is never negative
    "torch.ones(n_features, device=generator.device) -> n_features",  # Adam divides by the size of the gradient
    # the sum with x has the dtype of x
    "torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype) -> "
    "torch.randn(x.shape, generator=generator, device=x.device)",
    # the gradients of the steps before are there for nobody
    "torch.where(length > 0, epsilon * gradient / length, push).detach() -> "
    "torch.where(length > 0, epsilon * gradient / length, push)",
}


def backwards(model: Any, x: Any, epsilon: Any, n_steps: Any, generator: Any) -> Any:
    """With backward(), which also adds to the gradients of the model."""
    push = torch.randn(x.shape, generator=generator)
    push = epsilon * push / push.norm(dim=-1, keepdim=True)
    for _ in range(n_steps):
        push = push.detach().requires_grad_()
        (model(x + push) - model(x).detach()).square().sum().backward()
        push = epsilon * torch.nn.functional.normalize(push.grad, dim=-1)
    return (model(x + push) - model(x)).detach().norm(dim=-1).mean(0) / epsilon


def drawn_again(*given: Any) -> Any:
    """The samples that are returned are not those that were used."""
    model, samples = ref.train_on_fixed_data(*given)
    return model, samples.flip(0).roll(1, 2)


def model_first(**options: Any) -> Any:
    """The model is drawn before the samples, and something about its training is wrong."""

    def train(n_samples: Any, n_instances: Any, n: Any, d: Any, p: Any, steps: Any, generator: Any) -> Any:
        model = ref.ToyModel(n_instances, n, d, generator)
        samples = ref.sample_features(n_samples, torch.full((n_instances, n), p), generator)
        samples = torch.nn.functional.normalize(samples, dim=-1)

        def loss_of(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return ref.importance_weighted_loss(out, x, torch.ones(n))

        ref.train_toy(model, lambda: samples, loss_of, steps, **{"peak": 0.02, "weight_decay": 0.01} | options)
        return model, samples

    return train


def in_one_direction(push: torch.Tensor, epsilon: float) -> torch.Tensor:
    """All samples of a batch are pushed alike."""
    return epsilon * torch.nn.functional.normalize(push[:1], dim=-1).expand_as(push)


def one_draw_for_all_steps(n_samples: Any, n_instances: Any, n: Any, d: Any, p: Any, steps: Any, generator: Any) -> Any:
    """The 300 rows are drawn once."""
    samples = ref.sample_features(n_samples, torch.full((n_instances, n), p), generator)
    samples = torch.nn.functional.normalize(samples, dim=-1)
    model = ref.ToyModel(n_instances, n, d, generator)
    rows = torch.randint(n_samples, (300,), generator=generator) if n_samples > 300 else slice(None)

    def loss_of(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return ref.importance_weighted_loss(out, x, torch.ones(n))

    ref.train_toy(model, lambda: samples[rows], loss_of, steps, 0.02, 0.01)
    return model, samples


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "train_on_fixed_data": [
        ("expected the model and the samples", lambda *given: ref.train_on_fixed_data(*given)[0]),
        ("[sample, instance, feature]", lambda *given: (ref.train_on_fixed_data(*given)[0], torch.zeros(2, 6))),
        ("every step saw all", fixed_data(most=1000)),
        ("every step saw the first 300", fixed_data(rows=lambda drawn: torch.arange(300).expand_as(drawn))),
        ("a step more draws no more random numbers", one_draw_for_all_steps),
        ("values are wrong", fixed_data(most=3)),
        ("values are wrong", drawn_again),
        ("values are wrong", fixed_data(peak=0.03)),
        ("it was not trained", lambda *given: _untrained(*given)),
    ],
    "worst_case_gain": [
        ("it changed `model.", backwards),
        ("wrong", lambda model, x, *rest: ref.worst_case_gain(model, x.abs() + 1, *rest)),
        ("wrong shape", pushing(gain=lambda change, epsilon: change.norm(dim=-1).mean() / epsilon)),
        ("wrong shape", pushing(gain=lambda change, epsilon: change.norm(dim=-1) / epsilon)),
        ("the mean gain of random pushes", pushing(in_one_direction)),
        ("wrong", pushing(gain=lambda change, epsilon: change.square().sum(-1).mean(0).sqrt() / epsilon)),
        ("it drew from torch's global random numbers", lambda *given: pushing()(*given[:-1], torch.default_generator)),
    ],
}


def _untrained(n_samples: int, *rest: Any) -> Any:
    """Small data sets are trained on, large ones are not."""
    *sizes, steps, generator = rest
    return ref.train_on_fixed_data(n_samples, *sizes, steps if n_samples < 301 else 0, generator)


ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


@pytest.mark.parametrize(
    ("sentence", "wrong"),
    [("there is no weight decay.", {"weight_decay": 0.0}), ("the peak of the learning rate is 0.01;", {"peak": 0.01})],
)
def test_wrong_training_is_named_whatever_is_drawn_first(sentence: str, wrong: dict[str, float]) -> None:
    with pytest.raises(CheckFailed, match=f"This is what you get if {sentence}"):
        run_check(check_train_on_fixed_data, model_first(**wrong))


def test_five_samples_are_memorised_as_a_pentagon() -> None:
    model, samples = ref.train_on_fixed_data(5, 6, 60, 2, 0.1, 600, torch.Generator().manual_seed(2))
    with torch.no_grad():
        hidden = torch.einsum("sif,ihf->ihs", samples, model.W)
        assert (model(samples) - samples).square().sum(-1).mean() < 0.1
    assert abs(ref.feature_dimensionality(hidden).median() - 0.4) < 0.03
