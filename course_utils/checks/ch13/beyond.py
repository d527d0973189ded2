"""Checks of chapter 13, beyond: how alike two slopes are, and multiplication as addition of exponents."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from course_utils.checks.ch13.small import Fn
from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.plain import must_raise

Logits = Callable[[Tensor, Tensor], Tensor]


def toy(d_model: int, n: int) -> Logits:
    """Logits tanh(first @ A) * (second @ B) + first @ C, whose slopes can be written down."""
    A, B, C = weights(d_model, n)
    return lambda first, second: torch.tanh(first @ A.to(first)) * (second @ B.to(second)) + first @ C.to(first)


def weights(d_model: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    found = [noise(d_model, n, seed=seed + n) for seed in (1, 2, 3)]
    return found[0], found[1], found[2]


def slopes(first: Tensor, second: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """[pair answer d_model], by hand."""
    A, B, C = (weight.to(first) for weight in weights(first.shape[1], n))
    bent = torch.tanh(first @ A)
    by_first = ((1 - bent**2) * (second @ B))[..., None] * A.T + C.T
    by_second = bent[..., None] * B.T
    return by_first, by_second


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def compared(
    of: Callable[[Tensor, Tensor], Tensor] = lambda x, y: cosine(x, y).mean(),
    choose: Callable[[Tensor, Tensor], Tensor] = lambda found, answers: found[torch.arange(len(found)), answers],
) -> Fn:
    """gradient_symmetry of the toy by its slopes as written down; it knows the toy, not the function it is given."""

    def gradient_symmetry(logits_of: Logits, first: Tensor, second: Tensor, answers: Tensor) -> Tensor:
        n = logits_of(first[:1], second[:1]).shape[1]
        found = slopes(first.double(), second.double(), n)
        return of(*(choose(part, answers) for part in found)).to(first.dtype)

    return gradient_symmetry


def of_logprobs(logits_of: Logits, first: Tensor, second: Tensor, answers: Tensor) -> Tensor:
    """Slopes of log-probabilities."""
    n = logits_of(first[:1], second[:1]).shape[1]
    probabilities = logits_of(first, second).double().softmax(-1)
    found = [
        part[torch.arange(len(part)), answers] - torch.einsum("pc,pcd->pd", probabilities, part)
        for part in slopes(first.double(), second.double(), n)
    ]
    return cosine(*found).mean().to(first.dtype)


def by_backward(logits_of: Logits, first: Tensor, second: Tensor, answers: Tensor) -> Tensor:
    """Right, and it leaves gradients in whatever logits_of has parameters of."""
    leaves = [embedded.detach().clone().requires_grad_() for embedded in (first, second)]
    logits_of(*leaves).gather(-1, answers[:, None]).sum().backward()
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return cosine(found[0], found[1]).mean()


@known_mistakes(
    {
        "it is the dot product; divide by both lengths.": compared(lambda x, y: (x * y).sum(-1).mean()),
        "the gradients are averaged first; take each pair's cosine, and then the mean.": compared(
            lambda x, y: cosine(x.mean(0), y.mean(0))
        ),
        "it is one cosine of all pairs' gradients in a row; each pair has its own.": compared(
            lambda x, y: cosine(x.flatten(), y.flatten())
        ),
        "all logits are differentiated together; take the one in `answers`.": compared(
            choose=lambda found, answers: found.sum(1)
        ),
        "the log-probability is differentiated; take the logit.": of_logprobs,
        "the cosines lose their signs.": compared(lambda x, y: cosine(x, y).abs().mean()),
        "the embeddings themselves are compared; take the gradients.": (
            lambda logits_of, first, second, answers: cosine(first, second).mean()
        ),
        "it is one number for each pair; take the mean.": compared(cosine),
        "it is the sum over the pairs; take the mean.": compared(lambda x, y: cosine(x, y).sum()),
        "`backward()` also fills the parameters' `.grad`; torch.autograd.grad gives only what you ask for.": (
            by_backward
        ),
    }
)
def check_gradient_symmetry(fn: Fn) -> None:
    """A toy whose slopes can be written down; several pairs and one."""
    name = "gradient_symmetry"
    for n_pairs, d_model, n in ((6, 4, 5), (1, 3, 4), (9, 2, 7)):
        logits_of = toy(d_model, n)
        first, second = noise(n_pairs, d_model, seed=n), noise(n_pairs, d_model, seed=n + 20)
        answers = torch.arange(n_pairs) * 2 % n
        with unchanged(name, first=first, second=second, answers=answers):
            actual = fn(logits_of, first, second, answers)
        right = compared()(logits_of, first, second, answers)
        compare(f"{name} of {n_pairs} pairs", actual, right, "", rtol=1e-3, atol=1e-4)
    given = toy(3, 4), noise(4, 3, seed=8), noise(4, 3, seed=9), torch.tensor([2, 0, 3, 3])
    follows_input(name, fn, given, "")
    size = torch.nn.Parameter(torch.ones(()))
    fn(lambda x, y: size * given[0](x, y), *given[1:])
    if size.grad is not None:
        raise CheckFailed(
            f"{name}: a parameter of the model has a `.grad` now.",
            evidence=Evidence("the `.grad` of a parameter", True),
            advice="  Next: ask torch.autograd.grad for the gradients of the two inputs only.",
        )


def powers(
    choose: Callable[[list[int], int], int] = lambda roots, p: roots[0],
    first: int = 0,
    shape: Callable[[list[int]], list[int]] = lambda found: found,
) -> Fn:
    """primitive_powers by trying out the orders of all numbers."""

    def primitive_powers(p: int) -> Tensor:
        reached = {g: {pow(g, k, p) for k in range(p - 1)} for g in range(1, p)}
        roots = [g for g, found in reached.items() if found == set(range(1, p))]
        if not roots:
            raise ValueError(p)
        return torch.tensor(shape([pow(choose(roots, p), k, p) for k in range(first, first + p - 1)]))

    return primitive_powers


@known_mistakes(
    {
        "g is always 2; for some p its powers come round too early.": powers(lambda roots, p: min(2, p - 1)),
        "it is the largest such g; the smallest is asked for.": powers(lambda roots, p: roots[-1]),
        "the powers begin with g¹; begin with g⁰ = 1.": powers(first=1),
        "they are sorted; the order of the powers is the point.": powers(shape=sorted),
        "1 comes again at the end; there are p - 1 powers.": powers(shape=lambda found: [*found, 1]),
        "they are the exponents of 1, 2, 3, ...; place k holds g to the k.": powers(
            shape=lambda found: [found.index(number) for number in sorted(found)]
        ),
    }
)
def check_primitive_powers(fn: Fn) -> None:
    """Primes with several roots, and without a small one; and numbers that are not prime."""
    name = "primitive_powers"
    for p in (7, 11, 23, 41, 3, 2):
        compare(f"{name}({p})", fn(p), powers()(p), "power")
    for p in (12, 9, 4):
        must_raise(name, ValueError, f"{name}({p})", partial(fn, p), f"{p} is not prime.")
