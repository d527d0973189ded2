"""Chapter 00's checks against surprises, right answers written another way, and the reference from other sides.

A surprise is a wrong answer that a check does not know, or whose refusal is written by hand.
"""

import warnings
from collections.abc import Callable
from typing import Any

import einops
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import solutions.ch00_tensors as ref
from course_utils.checks import CheckFailed, find_checks
from course_utils.checks.running import run_once

CHECKS = {name: check for name, check in find_checks()["00"].items() if check.__module__.endswith(".tensors")}
INF = torch.inf
SECRETS = ("your code raised", "einsum(", "rearrange(", "gather(")
ONLY_ON_GPU = "device="
STILL_RIGHT = {"-1 -> 1"}  # of two axes, the last

place = torch.arange


# ------------------------------------------------------------------------------------------- broadcasting and indexing


def gathered(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(-1, tokens[..., None])[..., 0]


def at_one(resid: Tensor, pos: int) -> Tensor:
    """[pos 1], 1 at the position."""
    return F.one_hot(torch.tensor(pos % resid.shape[1]), resid.shape[1])[:, None].to(resid)


def add_in_place(resid: Tensor, direction: Tensor, pos: int) -> Tensor:
    view = resid[:, pos]
    view += direction
    return resid


def on_diagonal(pattern: Tensor, offset: int) -> Tensor:
    n_query, n_key = pattern.shape[-2:]
    return place(n_key) == place(n_query)[:, None] + offset


def mean_of(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(-1) / mask.sum(-1)


def nonzero_mean(values: Tensor) -> Tensor:
    return values.sum((-2, -1)) / (values != 0).sum((-2, -1))


class Outer:
    """A right answer that is an object."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.vmap(torch.outer)(a, b)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "relative_positions": [
        ("values are wrong", lambda n: place(n)[:, None] - place(n) + 1),
        ("expected dtype int64, got float32", lambda n: (place(n)[:, None] - place(n)).float()),
        ("wrong shape", lambda n: place(n) - place(n)),
    ],
    "centre_vectors": [
        ("values are wrong", lambda resid: resid - resid.median(-1, keepdim=True).values),
        ("values are wrong", lambda resid: resid - resid.sum(-1, keepdim=True) / (resid.shape[-1] - 1)),
        ("fewer digits", lambda resid: resid - resid.float().mean(-1, keepdim=True).to(resid)),
    ],
    "batched_outer": [
        ("None of them is at batch=0", lambda a, b: a[:, :, None] * torch.cat([b[:1], b[1:].flip(1)])[:, None]),
        ("values are wrong", lambda a, b: a[:, :, None] * b[:, None].softmax(-1)),
        ("fewer digits", lambda a, b: (a.float()[:, :, None] * b.float()[:, None]).to(a)),
    ],
    "logits_at_end": [
        ("All of the wrong values are at batch=2", lambda x, n: x[place(len(n)), (n - 1).clamp(min=1)]),
        ("values are wrong", lambda x, n: torch.stack([row[:end].mean(0) for row, end in zip(x, n, strict=True)])),
        ("step that gives NaN", lambda x, n: (x * F.one_hot(n - 1, x.shape[1])[..., None]).sum(1)),  # 0 times -inf
    ],
    "gather_logprobs": [
        (
            "values are wrong",
            lambda lp, t: lp.gather(1, (t % t.shape[1])[..., None]).squeeze(-1),
        ),  # wrong axis
        ("All of the wrong values are at batch=1", lambda lp, t: gathered(lp[:1].expand_as(lp), t)),
        ("values are wrong", lambda lp, t: gathered(lp, t).nan_to_num(neginf=-1e4)),
    ],
    "mean_where": [
        (
            "mean_where: 2 of 2 values",
            lambda v, mask: v.where(mask, 0.0).sum(-1) / mask.sum() * len(mask),
        ),  # on average
        ("All of the wrong values are at batch=0", lambda v, mask: v.where(mask, -INF).amax(-1)),
        ("with inf among the values", lambda v, mask: mean_of(v.nan_to_num(0.0, 0.0, 0.0), mask)),  # as if all was well
        ("fewer digits", lambda v, mask: mean_of(v.float().where(mask, 0.0), mask).to(v)),
    ],
    "add_at_position": [
        ("it changed `resid` in place", add_in_place),
        ("values are wrong", lambda r, d, pos: r + at_one(r, pos).cumsum(0) * d),
        ("values are wrong", lambda r, d, pos: r + at_one(r, pos - 1) * d),
        ("wrong shape", lambda r, d, pos: (r + at_one(r, pos) * d).squeeze(1)),  # of one position
    ],
    "diagonal_mean": [
        ("values are wrong", lambda p, offset: ref.diagonal_mean(p, offset - 1)),
        ("values are wrong", lambda p, offset: ref.diagonal_mean(p.flip(-1), offset)),  # the anti-diagonal
        ("values are wrong", lambda p, offset: ref.diagonal_mean(p[..., :-1, :-1], offset)),  # without the last entry
        (
            "All of the wrong values are at head=2",
            lambda p, offset: nonzero_mean(p * on_diagonal(p, offset)),
        ),  # weights of 0 count too
        ("wrong shape", lambda p, offset: ref.diagonal_mean(p, offset).squeeze()),
        ("fewer digits", lambda p, offset: ref.diagonal_mean(p.float(), offset).to(p)),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {
    "relative_positions": [
        lambda n: torch.sub(*torch.meshgrid(place(n), place(n), indexing="ij")),
        lambda n: torch.stack([query - place(n) for query in range(n)]),
        lambda n: torch.from_numpy(np.subtract.outer(np.arange(n), np.arange(n))),
    ],
    "centre_vectors": [
        lambda resid: resid - einops.reduce(resid, "b p d -> b p 1", "mean"),
        lambda resid: resid @ (torch.eye(resid.shape[-1]) - 1 / resid.shape[-1]).to(resid),  # a projection
        lambda resid: (turned := resid.mT.contiguous()).sub(turned.mean(1, keepdim=True)).mT,  # not contiguous
    ],
    "batched_outer": [
        lambda a, b: torch.einsum("br,bc->brc", a, b),
        Outer(),
        lambda a, b: a.unsqueeze(-1) @ b.unsqueeze(-2),
        lambda a, b: torch.stack([torch.outer(x, y) for x, y in zip(a, b, strict=True)]),
    ],
    "logits_at_end": [
        lambda x, n: torch.stack([row[end - 1] for row, end in zip(x, n.tolist(), strict=True)]),
        lambda x, n: torch.take_along_dim(x, (n - 1)[:, None, None], dim=1)[:, 0],
        lambda x, n: x.gather(1, (n - 1)[:, None, None].expand(-1, 1, x.shape[-1])).squeeze(1),
    ],
    "gather_logprobs": [
        lambda lp, t: lp.where(F.one_hot(t, lp.shape[-1]) > 0, 0.0).sum(-1),
        lambda lp, t: -F.nll_loss(lp.transpose(1, 2), t, reduction="none"),
        lambda lp, t: lp[place(len(t))[:, None], place(t.shape[1]), t],
    ],
    "mean_where": [
        lambda values, mask: values.masked_fill(~mask, torch.nan).nanmean(-1),
        lambda values, mask: torch.stack([row[kept].mean() for row, kept in zip(values, mask, strict=True)]),
    ],
    "add_at_position": [
        lambda r, d, pos: r + at_one(r, pos) * d,
        lambda r, d, pos: r.index_add(1, torch.tensor([pos % r.shape[1]], device=r.device), d.expand(len(r), 1, -1)),
    ],
    "diagonal_mean": [
        lambda p, offset: p[..., (at := on_diagonal(p, offset).nonzero().T)[0], at[1]].mean(-1),
        lambda p, offset: (p * on_diagonal(p, offset)).sum((-1, -2)) / on_diagonal(p, offset).sum(),
        lambda p, offset: torch.stack(
            [p[..., q, q + offset] for q in range(p.shape[-2]) if 0 <= q + offset < p.shape[-1]]
        ).mean(0),
    ],
}

# ------------------------------------------------------------------------------------------------- einops and einsum


def mixed(pattern: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bkhd->bqhd", pattern, v)


def cosines(vectors: Tensor, **how: Any) -> Tensor:
    directions = F.normalize(vectors, dim=-1, **how)
    return directions @ directions.T


SURPRISES |= {
    "split_heads": [
        ("values are wrong", lambda r, n: ref.split_heads(r, n).flip(2)),
        ("values are wrong", lambda r, n: r.transpose(0, 1).reshape(*r.shape[:2], n, -1)),
        ("expected (batch=2, pos=5, head=3, d_head=4)", lambda r, n: r.unflatten(-1, (-1, n))),
        ("wrong shape", lambda r, n: ref.split_heads(r, n).squeeze(2)),  # of one head
    ],
    "merge_heads": [
        ("values are wrong", lambda z: z.flip(2).flatten(2)),
        ("All of the wrong values are at batch=1", lambda z: z[:1].expand_as(z).flatten(2)),
    ],
    "repeat_prompts": [
        ("values are wrong", lambda tokens, n: tokens.flip(0).repeat_interleave(n, dim=0)),
        ("values are wrong", lambda tokens, n: torch.cat([tokens, tokens[-1:].repeat((n - 1) * len(tokens), 1)])),
    ],
    "average_values": [
        ("in another order: (batch, head, query, d_head)", lambda pattern, v: pattern @ v.transpose(1, 2)),
        ("values are wrong", lambda pattern, v: mixed(pattern.flip(1), v)),
        ("values are wrong", lambda pattern, v: mixed(pattern.tril(), v)),
        ("fewer digits", lambda pattern, v: mixed(pattern.float(), v.float()).to(v)),
        ("wrong shape", lambda pattern, v: mixed(pattern, v).squeeze(2)),  # of one head
    ],
    "cosine_similarity_matrix": [
        ("values are wrong", lambda v: cosines(v, p=1)),  # lengths as sums of sizes
        ("1 of 16 values is wrong", lambda v: cosines(v).fill_diagonal_(1.0)),  # a vector of zeros is like itself
        ("values are wrong", lambda v: cosines(v, eps=1.0)),  # short vectors stay short
        ("9 of 25 values are wrong", lambda v: cosines(v, eps=1e-3)),
        ("1 of 25 values is wrong", lambda v: v @ v.T / (v.norm(dim=-1)[:, None] * v.norm(dim=-1) + 1e-8)),
        ("fewer digits", lambda v: cosines(v.float()).to(v)),
    ],
}

ALSO_RIGHT |= {
    "split_heads": [
        lambda r, n: r.view(*r.shape[:2], n, r.shape[-1] // n),
        lambda r, n: torch.stack(r.chunk(n, dim=-1), dim=-2),
    ],
    "merge_heads": [
        lambda z: z.reshape(*z.shape[:2], -1),
        lambda z: torch.cat(z.unbind(2), dim=-1),
    ],
    "repeat_prompts": [
        lambda tokens, n: tokens.repeat_interleave(n, dim=0),
        lambda tokens, n: tokens[:, None].expand(-1, n, -1).flatten(0, 1),
    ],
    "average_values": [
        lambda pattern, v: (pattern @ v.transpose(1, 2)).transpose(1, 2),
        lambda pattern, v: (pattern.permute(0, 2, 3, 1)[..., None] * v[:, None]).sum(2),
    ],
    "cosine_similarity_matrix": [
        lambda v: F.cosine_similarity(v[:, None], v[None], dim=-1),
        lambda v: (v @ v.T / (v.norm(dim=1) * v.norm(dim=1)[:, None])).nan_to_num(),
    ],
}

# --------------------------------------------------------------------------------- numbers that overflow, and gradients


def by_formula(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum(-1, keepdim=True).log()


def by_numpy(logits: Any) -> Any:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def losses(logits: Tensor, targets: Tensor) -> Tensor:
    return -gathered(logits.log_softmax(-1), targets)


def minus_target(chances: Tensor, targets: Tensor) -> Tensor:
    return chances - F.one_hot(targets, chances.shape[-1])


def on_itself(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at.requires_grad_()
    fn(at).backward()
    assert at.grad is not None
    return at.grad


def copied(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor | None:
    """A copy of what records gradients: no leaf, so that its `.grad` stays empty."""
    copy = at.clone().requires_grad_()
    fn(copy).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.grad


def put_back(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The right answer, and `.grad` thrown away."""
    answer = ref.gradient_by_backward(fn, at)
    at.grad = None
    return answer


def retained(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor | None:
    """What was computed keeps its gradient too; but backward goes on to what it was computed from."""
    if at.is_leaf:
        return ref.gradient_by_backward(fn, at)
    at.retain_grad()
    fn(at).backward()
    return at.grad


def caught(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Right: a hook of its own leaf catches the gradient."""
    got: list[Tensor] = []
    leaf = at.detach().clone().requires_grad_()
    leaf.register_hook(lambda gradient: got.append(gradient.clone()))
    fn(leaf).backward()
    return got[0]


def with_history(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(fn(leaf), leaf, create_graph=True)
    return gradient


def by_differences(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    step = 0.1 * torch.eye(at.numel()).to(at).reshape(-1, *at.shape)
    return torch.stack([(fn(at + s) - fn(at)) / 0.1 for s in step]).reshape(at.shape).detach()


SURPRISES |= {
    "log_softmax": [
        ("of logits up to 1000", lambda logits: by_formula(logits.clamp(-80, 80))),
        ("of logits 1000 apart", lambda logits: (logits.softmax(-1) + 1e-30).log()),
        ("with -inf among the logits", lambda logits: logits.nan_to_num(neginf=-1e4).log_softmax(-1)),
        ("fewer digits", lambda logits: logits.float().log_softmax(-1).to(logits)),
    ],
    "cross_entropy": [
        ("no gradient reaches `logits`", lambda x, t: losses(x.data, t).mean()),
        ("expected", lambda x, t: losses(x, t).median()),
        ("expected", lambda x, t: losses(x, t)[:, 1:].mean()),
        ("of logits up to 1000", lambda x, t: losses(x.clamp(-90, 90), t).mean()),
        ("fewer digits", lambda x, t: losses(x.float(), t).mean().to(x)),
        ("the gradient that reaches", lambda x, t: (x.logsumexp(-1).detach() - gathered(x, t)).mean()),
    ],
    "cross_entropy_gradient": [
        # exp overflows
        ("expected", lambda x, t: minus_target(x.exp() / x.exp().sum(-1, keepdim=True), t) / t.numel()),
        ("fewer digits", lambda x, t: (minus_target(x.float().softmax(-1), t) / t.numel()).to(x)),
        # nothing at the targets
        ("values are wrong", lambda x, t: x.softmax(-1) * (1 - F.one_hot(t, x.shape[-1])) / t.numel()),
    ],
    "gradient_by_backward": [
        ("it changed `at.requires_grad` to True", on_itself),
        ("it changed `at.grad`", put_back),
        ("it changed `at.grad`", copied),
        ("the answer records gradients itself", with_history),
        ("values are wrong", by_differences),
        ("the gradient went on", retained),
        ("in float64", lambda fn, at: ref.gradient_by_backward(lambda x: fn(x.float()).to(x), at)),
        ("values are wrong", lambda fn, at: F.normalize(ref.gradient_by_backward(fn, at), dim=-1)),
    ],
}

ALSO_RIGHT |= {
    "log_softmax": [
        lambda logits: logits - logits.logsumexp(-1, keepdim=True),
        lambda logits: torch.log_softmax(logits, dim=-1),
        lambda logits: torch.from_numpy(np.asarray(by_numpy(logits.numpy()), dtype=logits.numpy().dtype)),
        lambda logits: by_formula(logits.double() - logits.amax(-1, True)).to(logits),
    ],
    "cross_entropy": [
        lambda x, t: F.cross_entropy(x.flatten(0, 1), t.flatten()),
        lambda x, t: F.cross_entropy(x.transpose(1, 2), t),
        lambda x, t: (x.logsumexp(-1) - gathered(x, t)).mean(),
    ],
    "cross_entropy_gradient": [
        lambda x, t: torch.func.grad(lambda y: F.cross_entropy(y.flatten(0, 1), t.flatten()))(x),
        lambda x, t: x.softmax(-1).scatter_add(-1, t[..., None], -torch.ones_like(x[..., :1])) / t.numel(),
    ],
    "gradient_by_backward": [
        lambda fn, at: torch.func.grad(fn)(at.detach()),
        caught,
        lambda fn, at: torch.autograd.grad(fn(leaf := at.clone().detach().requires_grad_()), leaf)[0],
    ],
}


# ------------------------------------------------------------------------------------------ what no answer may do

# Wrong answers that raise an error on some inputs that people have; the refusal says which.
RAISING: dict[str, list[tuple[str, Any]]] = {
    "centre_vectors": [
        ("on inputs that are not contiguous", lambda r: r - r.view(-1, r.shape[-1]).mean(-1).view(*r.shape[:2], 1)),
    ],
    "gather_logprobs": [  # the last tokens are not asked for
        ("must match the size", lambda lp, t: lp.where(F.one_hot(t) > 0, 0.0).sum(-1)),
    ],
    "merge_heads": [("on inputs that are not contiguous", lambda z: z.view(*z.shape[:2], -1))],  # as attention's z is
    "repeat_prompts": [
        ("on inputs that are not contiguous", lambda t, n: t.view(-1).view(t.shape).repeat_interleave(n, dim=0)),
    ],
    "cross_entropy": [("does not match the shape", lambda x, t: -x.log_softmax(-1)[F.one_hot(t) > 0].mean())],
    "cross_entropy_gradient": [("must match the size", lambda x, t: (x.softmax(-1) - F.one_hot(t)) / t.numel())],
    "gradient_by_backward": [
        ("view size", lambda fn, at: ref.gradient_by_backward(lambda x: fn(x.view(at.shape)), at.view(-1)).view_as(at)),
    ],
}


@pytest.mark.parametrize(
    ("exercise", "number"), [(name, i) for name, some in RAISING.items() for i in range(len(some))]
)
def test_what_raises_on_some_inputs_is_refused(exercise: str, number: int) -> None:
    words, answer = RAISING[exercise][number]
    with pytest.raises(CheckFailed, match="your code raised") as caught:
        run_once(CHECKS[exercise], answer)
    assert words in str(caught.value)


def spoils(exercise: str) -> dict[str, Callable[..., Any]]:
    """The reference, with something wrong about what it returns or leaves behind; by the words of the refusal."""
    right = getattr(ref, exercise)

    def writes(*inputs: Any) -> Any:
        answer = right(*(value.clone() if isinstance(value, Tensor) else value for value in inputs)).clone()
        first = next(value for value in inputs if isinstance(value, Tensor))
        with torch.no_grad():
            first += 1
        return answer

    spoiled = {
        "returned None": lambda *inputs: None,
        "expected a Tensor, got a list": lambda *inputs: right(*inputs).tolist() or [],
        "wrong shape": lambda *inputs: right(*inputs)[None],
        "expected dtype": lambda *inputs: right(*inputs).to(torch.float16),
        "in place": writes,
    }
    if exercise == "relative_positions":
        del spoiled["in place"]
    if exercise == "cross_entropy":  # a bare number
        spoiled["expected a Tensor, got a float"] = spoiled.pop("expected a Tensor, got a list")
    return spoiled


@pytest.mark.parametrize("exercise", CHECKS)
def test_what_is_wrong_everywhere(exercise: str) -> None:
    for words, answer in spoils(exercise).items():
        with pytest.raises(CheckFailed, match=words):
            run_once(CHECKS[exercise], answer)


# ------------------------------------------------------------------------------- the reference, from other sides


@settings(max_examples=50, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 4)] * 4), seed=st.integers(0, 99))
def test_heads_are_merged_as_they_were_split(sizes: tuple[int, int, int, int], seed: int) -> None:
    z = torch.randn(sizes, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(ref.split_heads(ref.merge_heads(z), sizes[2]), z)


@settings(max_examples=50, deadline=None)
@given(shift=st.floats(-1e4, 1e4), seed=st.integers(0, 99))
def test_log_softmax_sums_to_one_and_does_not_mind_a_shift(shift: float, seed: int) -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logprobs = ref.log_softmax(logits + shift)
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(logprobs, ref.log_softmax(logits), rtol=1e-6, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 5)] * 3), seed=st.integers(0, 99))
def test_the_two_gradients_agree(sizes: tuple[int, int, int], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(sizes, generator=rng, dtype=torch.float64)
    targets = torch.randint(sizes[-1], sizes[:2], generator=rng)
    by_backward = ref.gradient_by_backward(lambda at: ref.cross_entropy(at, targets), logits)
    torch.testing.assert_close(ref.cross_entropy_gradient(logits, targets), by_backward)
