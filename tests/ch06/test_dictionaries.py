"""What the checks of dictionaries cannot know: see tests/test_checks.py."""

import ast
import inspect
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor

import solutions.ch06_superposition as ref
from course_utils.checks.ch06 import dictionaries as known
from tests.ch06 import other_dictionaries as other
from tests.support.mutation import variants

SECRETS = ("einsum(", ".topk(", "scatter(", "rearrange(", "torch.where(", "keepdim=True")


def changes_of(method: Any) -> set[str]:
    """The small changes of a method that is given: no check sees them, since the kinds come later as exercises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.expr)]
    return {f"{ast.unparse(node)} -> {ast.unparse(variant)}" for node in nodes for variant in variants(node)}


# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "flat.topk(n_kept, dim=-1) -> flat.topk(n_kept)",  # the last axis is where it looks by itself
    "pre.topk(min(k, pre.shape[-1]), dim=-1) -> pre.topk(min(k, pre.shape[-1]))",
    "1.0 -> 2.0",  # a row of zeros divided by anything is zero
    "norm > 0 -> norm != 0",  # no norm is negative
    # torch sums what backward returns to the shape of the argument; no sample is exactly at the edge of the window
    "(-grad * is_near / ctx.bandwidth).sum(dim=0) -> -grad * is_near / ctx.bandwidth",
    "(-grad * is_near * threshold / ctx.bandwidth).sum(dim=0) -> -grad * is_near * threshold / ctx.bandwidth",
    "(pre - threshold).abs() < ctx.bandwidth / 2 -> (pre - threshold).abs() <= ctx.bandwidth / 2",
    *changes_of(ref.SparseAutoencoder.activate),  # tested below
}


def with_parts(change: Any, fn: Any) -> Any:
    """An answer in parts, changed."""
    return lambda *given: change(*fn(*given))


class Changed(ref.SparseAutoencoder):
    """The base of surprises."""


def changed(**methods: Any) -> type:
    return type("SparseAutoencoder", (Changed,), methods)


def shared_by_instances(self: Any, latents: Tensor) -> Tensor:
    """The first instance's decoder for all."""
    W_dec = self.W_dec if self.W_dec.dim() == 2 else self.W_dec[:1].expand_as(self.W_dec)
    return torch.einsum("...l,...ld->...d", latents, W_dec) + self.b_dec


def frozen(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    latents = self.encode(x)
    return self.decode(latents.detach()), latents


def seen_from_a_constant(self: Any, x: Tensor) -> Tensor:
    return torch.einsum("...d,...dl->...l", x - self.b_dec.detach(), self.W_enc) + self.b_enc


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "relu_latents": [
        ("values are wrong", lambda pre: torch.nn.functional.gelu(pre)),
        ("no gradient gets through", lambda pre: pre.detach().relu()),
        ("in float64", lambda pre: pre.float().relu().to(pre.dtype)),
    ],
    "topk_latents": [
        ("wrong shape", lambda pre, k: pre.topk(min(k, pre.shape[-1])).values.relu()),
        ("raised RuntimeError", lambda pre, k: ref.topk_latents(pre, k) + 0 * pre.topk(k).values.sum()),
        ("the gradient of `pre`", lambda pre, k: pre.relu() - (pre.relu() - ref.topk_latents(pre, k)).detach()),
        ("with k=1", lambda pre, k: ref.topk_latents(pre, max(k, 3))),
    ],
    "batch_topk_latents": [
        ("expected a tuple (latents, threshold)", lambda pre, k: ref.batch_topk_latents(pre, k)[0]),
        (
            "a gradient flows through the threshold",
            lambda pre, k: (
                (kept := ref.batch_topk_latents(pre, k)[0]),
                ref.batch_topk_latents(pre, k)[1] + 0 * kept.sum(),
            ),
        ),
        ("the threshold: wrong shape", with_parts(lambda a, b: (a, b.mean()), ref.batch_topk_latents)),
        ("the threshold: 1 of 1", with_parts(lambda a, b: (a, b * 1.01), ref.batch_topk_latents)),
    ],
    "gated_latents": [
        ("the latents", with_parts(lambda a, b: (a.clamp(max=1), b), ref.gated_latents)),
        ("the gate", with_parts(lambda a, b: (a, b.abs()), ref.gated_latents)),
        ("expected a tuple (latents, gate), got a Tensor", with_parts(lambda a, b: a, ref.gated_latents)),
        ("no gradient gets through", with_parts(lambda a, b: (a, b.detach()), ref.gated_latents)),
        (
            "the gate: the gradient of `b_gate`",
            lambda p, b_gate, *rest: (ref.gated_latents(p, b_gate, *rest)[0], p + b_gate.detach()),
        ),
        (
            "the gate: the gradient of `projected`",
            lambda p, b_gate, *rest: (ref.gated_latents(p, b_gate, *rest)[0], p.detach() + b_gate),
        ),
    ],
    "gated_auxiliary_loss": [
        ("wrong shape", lambda *given: ref.gated_auxiliary_loss(*given).sum()[None, None]),
        ("values is wrong", lambda *given: ref.gated_auxiliary_loss(*given) / 2),
        (
            "the gradient of `gate`",
            lambda x, gate, *rest: (
                ref.gated_auxiliary_loss(x, gate.relu() + 0 * gate, *rest) + 0.1 * (gate - gate.detach()).sum((0, -1))
            ),
        ),
    ],
    "Heaviside": [
        ("expected a class that inherits from torch.autograd.Function", lambda pre, threshold, bandwidth: pre),
        (
            "the gradient of `threshold`",
            known.heaviside(window=lambda pre, threshold, bandwidth: torch.exp(-((pre - threshold) ** 2))),
        ),
        ("expected dtype", known.step_with(lambda pre, threshold: (pre > threshold).float())),
        ("values are wrong", known.step_with(lambda pre, threshold: (pre > threshold.mean()).to(pre))),
    ],
    "JumpReLU": [
        ("values are wrong", known.jumping(value=lambda pre, threshold: pre.clamp(min=threshold))),
        ("the gradient of `threshold`", known.jumping(reduce=lambda slopes: slopes.amin(0))),
        ("the gradient of `pre`", known.jumping(to_pre=lambda grad, pre, threshold: grad * pre)),
        ("torch refuses what backward returns", known.jumping(reduce=lambda slopes: slopes.sum())),
    ],
    "SparseAutoencoder": [
        ("expected a class that inherits from nn.Module", lambda *given, **options: None),
        ("decode", changed(decode=shared_by_instances)),
        ("no gradient reaches", changed(forward=frozen)),
        ("the gradient of `b_dec`", changed(pre_activations=seen_from_a_constant)),
        (
            "forward, the latents: the gradient of",
            changed(forward=lambda self, x: (self.decode(self.encode(x)), self.encode(x).detach())),
        ),
        ("expected a tuple (reconstruction, latents)", changed(forward=lambda self, x: self.decode(self.encode(x)))),
        ("encode", changed(encode=lambda self, x: self.pre_activations(x).relu())),
    ],
    "sae_loss": [
        ("expected a dict, got a Tensor", lambda *given: ref.sae_loss(*given)["total"]),
        ("expected the keys", lambda *given: {**ref.sae_loss(*given), "loss": torch.zeros(())}),
        ("got a float", lambda *given: ref.sae_loss(*given) | {"total": ref.sae_loss(*given)["total"].item()}),
        ("the gradient of `W_dec`", lambda x, r, latents, W, *rest: ref.sae_loss(x, r, latents, W.detach(), *rest)),
        (
            "the gradient of `active`",
            lambda x, r, latents, W, s, active=None: ref.sae_loss(
                x, r, latents, W, s, None if active is None else (active > 0).to(x)
            ),
        ),
    ],
    "normalise_decoder": [
        ("values are wrong", lambda W: W / W.norm(dim=-1, keepdim=True).clamp(min=0.1)),
        ("with a row of zeros", lambda W: ref.normalise_decoder(W) + (W == 0).all(-1, keepdim=True)),
        ("wrong shape", lambda W: ref.normalise_decoder(W)[..., 0]),
    ],
    "remove_parallel_gradient": [
        ("values are wrong", lambda W, grad: ref.remove_parallel_gradient(W, grad) * 2),
        ("values are wrong", lambda W, grad: ref.remove_parallel_gradient(grad, W)),
        ("with a row of zeros", lambda W, grad: ref.remove_parallel_gradient(W, grad) * (W != 0)),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


@pytest.mark.parametrize("kind", ["relu", "topk", "batch_topk", "gated", "jumprelu"])
@pytest.mark.parametrize("n_instances", [None, 3])
def test_every_kind_learns(kind: str, n_instances: int | None) -> None:
    """Every parameter but one gets a gradient from the loss that belongs to the kind."""
    sae = ref.SparseAutoencoder(5, 7, kind, n_instances, k=2, generator=torch.Generator().manual_seed(0))
    lead = () if n_instances is None else (n_instances,)
    x = torch.randn(11, *lead, 5, generator=torch.Generator().manual_seed(1))
    pre = sae.pre_activations(x)
    latents = sae.activate(pre)
    loss = ref.sae_loss(x, sae.decode(latents), pre.relu() if kind == "gated" else latents, sae.W_dec, 0.1)["total"]
    if kind == "gated":
        loss = loss + ref.gated_auxiliary_loss(x, pre, sae.W_dec, sae.b_dec).sum()
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in sae.parameters())
    assert latents.shape == (11, *lead, 7) and (latents >= 0).all()


def test_instances_learn_as_if_alone() -> None:
    several = ref.SparseAutoencoder(5, 7, "relu", 3)
    x = torch.randn(11, 3, 5)
    reconstruction, latents = several(x)
    ref.sae_loss(x, reconstruction, latents, several.W_dec, torch.tensor([0.1, 0.2, 0.3]))["total"].backward()
    for number, weight in enumerate((0.1, 0.2, 0.3)):
        alone = ref.SparseAutoencoder(5, 7, "relu")
        alone.load_state_dict({name: value[number] for name, value in several.state_dict().items()})
        reconstruction, latents = alone(x[:, number])
        ref.sae_loss(x[:, number], reconstruction, latents, alone.W_dec, weight)["total"].backward()
        torch.testing.assert_close(alone.W_enc.grad, several.W_enc.grad[number])
        torch.testing.assert_close(alone.W_dec.grad, several.W_dec.grad[number])


def test_alone_a_sample_gets_the_latents_that_it_has_in_a_batch() -> None:
    sae = ref.SparseAutoencoder(6, 20, "batch_topk", k=2, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for _ in range(300):
            together = sae(x)[1]
        alone = sae.eval()(x[:1])[1]
    torch.testing.assert_close(alone, together[:1])
    assert abs((together > 0).sum().item() / len(x) - 2) < 0.01


def test_the_gradient_that_is_left_is_perpendicular() -> None:
    W_dec, grad = torch.randn(3, 6, 5), torch.randn(3, 6, 5)
    left = ref.remove_parallel_gradient(W_dec, grad)
    assert (left * W_dec).sum(-1).abs().max() < 1e-5


def given_sae(kind: str, n_instances: int | None) -> tuple[Any, Tensor]:
    """An autoencoder whose parameters all differ, and pre-activations for it."""
    sae = ref.SparseAutoencoder(5, 7, kind, n_instances, k=2)
    with torch.no_grad():
        for seed, parameter in enumerate(sae.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.5)
    lead = () if n_instances is None else (n_instances,)
    return sae, torch.randn(11, *lead, 7, generator=torch.Generator().manual_seed(50))


@pytest.mark.parametrize("n_instances", [None, 3])
def test_each_kind_activates_in_its_own_way(n_instances: int | None) -> None:
    right = {
        "relu": lambda sae, pre: other.relu_latents(pre),
        "topk": lambda sae, pre: other.topk_latents(pre, 2),
        "batch_topk": lambda sae, pre: other.batch_topk_latents(pre, 2)[0],
        "gated": lambda sae, pre: other.gated_latents(pre - sae.b_enc, sae.b_enc, sae.r_mag, sae.b_mag)[0],
        "jumprelu": lambda sae, pre: pre * (pre > sae.log_threshold.exp()),
    }
    for kind, expected in right.items():
        sae, pre = given_sae(kind, n_instances)
        torch.testing.assert_close(sae.activate(pre), expected(sae, pre))


@pytest.mark.parametrize("n_instances", [None, 3])
def test_in_evaluation_batch_topk_uses_the_mean_threshold(n_instances: int | None) -> None:
    sae, pre = given_sae("batch_topk", n_instances)
    sae.activate(pre)
    threshold = 0.02 * other.batch_topk_latents(pre, 2)[1]
    torch.testing.assert_close(sae.threshold, threshold)
    sae.eval()
    torch.testing.assert_close(sae.activate(pre), pre * (pre > threshold[..., None]))
    torch.testing.assert_close(sae.threshold, threshold)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no kind 'l1'; choose one of relu, topk"):
        ref.SparseAutoencoder(5, 7, "l1")
