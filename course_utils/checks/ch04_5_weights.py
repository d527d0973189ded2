# ruff: noqa: N802 (check_FactoredMatrix is named after its exercise; T is what torch calls it)
"""Checks of chapter 04, reading weights: matrices of low rank, the circuits of heads, and what composes with what.

Oracles form the whole matrix, which at these sizes costs nothing, or visit every token, source or pair of heads.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.checks import by_loops
from course_utils.checks.ch04_4_causes import nothing_left_behind, some_tokens
from course_utils.checks.core import CheckFailed, Mistakes, compare, during, follows_input, unchanged
from course_utils.checks.counting import Watched
from course_utils.checks.modules import noise, weights_of
from course_utils.checks.plain import agree, must_raise
from course_utils.checks.small_model import SmallModel
from course_utils.config import TransformerConfig
from course_utils.hooks import ActivationCache, run_with_cache

Fn = Callable[..., Any]
Answers = dict[str, Tensor | Callable[[], Tensor]]

CFG = TransformerConfig(d_vocab=13, n_ctx=9, n_layers=2, n_heads=3, d_model=7, d_head=4, attn_only=True)
WITH_MLP = TransformerConfig(d_vocab=11, n_ctx=6, n_layers=3, n_heads=2, d_model=5, d_head=3, d_mlp=8)
NO_NORM = TransformerConfig(
    d_vocab=11, n_ctx=6, n_layers=2, n_heads=2, d_model=5, d_head=3, attn_only=True, normalization="none"
)
KINDS = ("Q", "K", "V")


class Factored:
    """A FactoredMatrix to hand to those who have not written theirs."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = A, B

    @property
    def shape(self) -> tuple[int, ...]:
        return (*torch.broadcast_shapes(self.A.shape[:-2], self.B.shape[:-2]), self.A.shape[-2], self.B.shape[-1])

    @property
    def T(self) -> "Factored":
        return Factored(self.B.mT, self.A.mT)

    def __matmul__(self, other: Any) -> "Factored":
        return (
            (self @ other.A) @ Factored(other.B, torch.eye(other.B.shape[-1]))
            if hasattr(other, "A")
            else Factored(self.A, self.B @ other)
        )

    def __rmatmul__(self, other: Tensor) -> "Factored":
        return Factored(other @ self.A, self.B)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(self.A @ self.B, full_matrices=False)
        rank = min(*self.shape[-2:], self.A.shape[-1])
        return U[..., :rank], S[..., :rank], Vh[..., :rank, :]

    def eigenvalues(self) -> Tensor:
        return torch.linalg.eigvals(self.B @ self.A)

    def norm(self) -> Tensor:
        return torch.linalg.matrix_norm(self.A @ self.B)


def factored(fn: Fn, A: Tensor, B: Tensor) -> Any:
    """A matrix in factors, of the class that stands beside the learner's function if there is one."""
    beside = getattr(inspect.unwrap(fn), "__globals__", {}).get("FactoredMatrix")
    return (beside if isinstance(beside, type) else Factored)(A, B)


def dense(name: str, result: Any, largest_inner: int | None = None) -> Tensor:
    """The whole matrix behind a result that must be factored."""
    A, B = (getattr(result, factor, None) for factor in "AB")
    if not isinstance(A, Tensor) or not isinstance(B, Tensor):
        raise CheckFailed(
            f"{name}: expected a FactoredMatrix, got a {type(result).__name__}.\n"
            "  Next: return FactoredMatrix(A, B) with the two thin factors."
        )
    if largest_inner is not None and A.shape[-1] > largest_inner:
        raise CheckFailed(
            f"{name}: its factors are {tuple(A.shape)} and {tuple(B.shape)}, but the inner size need not be more than "
            f"{largest_inner}.\n  Next: multiply first what makes the factors thin."
        )
    return A @ B


def _apart(mistakes: Answers, expected: Tensor) -> Answers:
    """The same, but for those which at these sizes give the right answer: only neighbours, in a model of two layers."""

    def lazily(answer: Tensor | Callable[[], Tensor]) -> Callable[[], Tensor]:
        def unless_right() -> Tensor:
            value = answer if isinstance(answer, Tensor) else answer()
            same = value.shape == expected.shape and torch.allclose(value, expected, rtol=1e-4, atol=1e-5)
            return torch.full_like(expected, torch.nan) if same else value

        return unless_right

    return {hint: lazily(answer) for hint, answer in mistakes.items()}


# ----------------------------------------------------------------------------------------------------- FactoredMatrix


def check_FactoredMatrix(cls: Any) -> None:
    """Each method against the whole matrix, alone and in batches; then at a size at which the whole would be seen."""
    name = "FactoredMatrix"
    for batch_A, batch_B in [((), ()), ((2,), (2,)), ((2, 1), (3,))]:
        A, B = noise(*batch_A, 5, 3, seed=1), noise(*batch_B, 3, 7, seed=2)
        C, D = noise(7, 4, seed=3), noise(4, 6, seed=4)
        batch = "a b "[: 2 * max(len(batch_A), len(batch_B))]
        case = name if not batch else f"{name} with batch axes {tuple(torch.broadcast_shapes(batch_A, batch_B))}"
        M = A @ B
        with unchanged(name, A=A, B=B, C=C, D=D), during(case.removeprefix(name).strip()):
            one = cls(A, B)
            _products(case, cls, one, M, C, D, batch)
            _decomposition(case, one, M, batch)
            compare(f"{case}: norm()", one.norm(), M.square().sum((-2, -1)).sqrt(), batch, _norm_mistakes(M))
    _eigenvalues(name, cls)
    must_raise(name, ValueError, "eigenvalues() of a 5 x 7 matrix", lambda: cls(A, B).eigenvalues())
    must_raise(name, ValueError, "eigenvalues() of a 7 x 5 matrix", lambda: cls(B.mT, A.mT).eigenvalues())
    wide = cls(noise(2, 5, seed=5), noise(5, 4, seed=6))  # more inner than outer
    _decomposition(f"{name} whose inner size is the largest", wide, wide.A @ wide.B, "")
    follows_input(name, lambda A, B: cls(A, B).norm(), (noise(5, 3), noise(3, 7)), "")
    _never_formed(name, cls)


def _products(case: str, cls: Any, one: Any, M: Tensor, C: Tensor, D: Tensor, batch: str) -> None:
    def whole(what: str, result: Any, expected: Tensor, axes: str, mistakes: Mistakes | None = None) -> None:
        product = dense(f"{case}: {what}", result, 4 if "factored" in what else 3)
        compare(f"{case}: {what}, multiplied out", product, expected, batch + axes, mistakes)

    swapped: Mistakes = {
        "the factors are transposed, but not their order: (A B) transposed is B transposed times A transposed.": (
            lambda: one.A.mT @ one.B.mT
        )
    }
    whole("T", one.T, M.mT, "columns rows", swapped if M.shape[-2] == M.shape[-1] else None)
    whole("this @ tensor", one @ C, M @ C, "rows other")
    whole("this @ factored", one @ cls(C, D), M @ (C @ D), "rows other", {"the last factor is lost.": lambda: M @ C})
    E = noise(6, 5, seed=8)
    whole("tensor @ this", E @ one, E @ M, "other columns")
    must_raise(case, ValueError, "this @ vector", lambda: one @ C[:, 0])
    must_raise(case, ValueError, "vector @ this", lambda: E[0] @ one)


def _decomposition(case: str, one: Any, M: Tensor, batch: str) -> None:
    answer = one.svd()
    if not isinstance(answer, tuple) or len(answer) != 3:
        raise CheckFailed(f"{case}: svd() should return three tensors, U, S and Vh.\n  Next: see the docstring.")
    U, S, Vh = answer
    rank = min(*M.shape[-2:], one.A.shape[-1])
    expected = torch.linalg.svdvals(M)[..., :rank]
    compare(
        f"{case}: the singular values",
        S,
        expected,
        f"{batch}rank",
        {
            "they are in ascending order.": expected.flip(-1),
            "they are those of A alone.": lambda: torch.linalg.svdvals(one.A),
            "they are those of B alone.": lambda: torch.linalg.svdvals(one.B),
            "they are squared.": expected.square(),
            "they are the products of the singular values of A and of B; those of a product are others.": lambda: (
                torch.linalg.svdvals(one.A) * torch.linalg.svdvals(one.B)
            ),
        },
    )
    for what, vectors, shape in [("U", U, (M.shape[-2], rank)), ("Vh", Vh, (rank, M.shape[-1]))]:
        if tuple(vectors.shape[-2:]) != shape:
            hint = " (is it V, not transposed?)" if tuple(vectors.shape[-2:]) == shape[::-1] else ""
            raise CheckFailed(
                f"{case}: {what} has shape {tuple(vectors.shape)}, expected {(*M.shape[:-2], *shape)}{hint}.\n"
                "  Next: print the shape of each factor on the way."
            )
    if S[..., -1].min() < 1e-3:  # directions that belong to singular values of 0 are arbitrary
        raise AssertionError("the matrices of this check have full rank")
    compare(f"{case}: U diag(S) Vh", (U * S[..., None, :]) @ Vh, M, f"{batch}rows columns")
    identity = torch.eye(rank).expand(*M.shape[:-2], rank, rank)
    compare(f"{case}: U transposed times U", U.mT @ U, identity, f"{batch}rank rank")
    compare(f"{case}: Vh times Vh transposed", Vh @ Vh.mT, identity, f"{batch}rank rank")


def _norm_mistakes(M: Tensor) -> Mistakes:
    singular = torch.linalg.svdvals(M)
    return {
        "it is the spectral norm, the largest singular value; the Frobenius norm counts every entry.": singular[..., 0],
        "it is the nuclear norm, the sum of the singular values.": singular.sum(-1),
        "the root is left out.": M.square().sum((-2, -1)),
        "it is the sum of the absolute values.": M.abs().sum((-2, -1)),
        "one norm is taken over the whole batch.": M.norm().expand(M.shape[:-2]),
    }


def _eigenvalues(name: str, cls: Any) -> None:
    """Matched to those of the whole matrix, the largest of which are the ones that are not 0."""
    for batch in [(), (2,)]:
        A, B = noise(*batch, 6, 3, seed=11), noise(*batch, 3, 6, seed=12)
        every = torch.linalg.eigvals(A.double() @ B.double())
        order = every.abs().argsort(dim=-1, descending=True)[..., :3]
        expected = every.gather(-1, order).to(torch.complex64)
        actual = cls(A, B).eigenvalues()
        if isinstance(actual, Tensor) and not actual.is_complex():
            kind = str(actual.dtype).removeprefix("torch.")
            raise CheckFailed(
                f"{name}: eigenvalues() are of dtype {kind}; those of a matrix that is not symmetric are complex.\n"
                "  Next: torch.linalg.eigvals, not eigvalsh and not singular values."
            )
        if isinstance(actual, Tensor) and actual.shape[-1:] == (6,):
            raise CheckFailed(
                f"{name}: eigenvalues() are {actual.shape[-1]}, expected only the inner size, 3: the others are 0.\n"
                "  Next: which small product of A and B has the same eigenvalues, but for zeros?"
            )
        if isinstance(actual, Tensor) and actual.shape == expected.shape:
            expected = _matched(expected, actual)
        axes = "batch number"[0 if batch else 6 :] + " part"
        compare(
            f"{name}: eigenvalues()",
            torch.view_as_real(actual) if isinstance(actual, Tensor) else actual,
            torch.view_as_real(expected),
            axes,
        )


def _matched(expected: Tensor, actual: Tensor) -> Tensor:
    """The expected numbers, each at the place of the nearest actual one."""
    rows = []
    for ours, theirs in zip(
        expected.reshape(-1, expected.shape[-1]), actual.reshape(-1, actual.shape[-1]), strict=True
    ):
        left, row = ours, []
        for value in theirs:
            nearest = int((left - value).abs().argmin())
            row.append(left[nearest])
            left = torch.cat([left[:nearest], left[nearest + 1 :]])
        rows.append(torch.stack(row))
    return torch.stack(rows).reshape(expected.shape)


def _never_formed(name: str, cls: Any) -> None:
    """A size at which the whole matrix would be a thousand times as large as its factors."""
    n = 2001
    big = cls(noise(n, 2, seed=21), noise(2, n, seed=22))
    thin, other = noise(n, 3, seed=23), cls(noise(n, 2, seed=24), noise(2, n, seed=25))
    uses: dict[str, Callable[[], Any]] = {
        "T": lambda: big.T,
        "this @ tensor": lambda: big @ thin,
        "this @ factored": lambda: big @ other,
        "tensor @ this": lambda: thin.T @ big,
        "norm()": lambda: big.norm(),
        "eigenvalues()": lambda: big.eigenvalues(),
        "svd()": lambda: big.svd(),
    }
    for what, use in uses.items():
        with Watched() as watched:
            use()
        if watched.largest >= n * n // 4:
            raise CheckFailed(
                f"{name}: {what} of a {n} x {n} matrix of inner size 2 made a tensor of {watched.largest:,} numbers.\n"
                "  Next: multiply small things first; nothing need be larger than the factors."
            )


# --------------------------------------------------------------------------------------------------- OV and QK circuit


def _circuit(W_in: Tensor, first: Tensor, second: Tensor, W_out: Tensor) -> Tensor:
    """One token after another: what goes in, through the head, to every token that comes out."""
    rows = []
    for vector in W_in:
        through = (vector @ first) @ second
        rows.append(torch.stack([through @ column for column in W_out.T]))
    return torch.stack(rows)


def _check_circuit(
    name: str, fn: Fn, axes: str, right: Callable[..., Tensor], mistakes: Callable[..., Answers]
) -> None:
    """For some heads of a model: the whole matrix, as factors that are thin."""
    model = SmallModel(CFG)
    weights = weights_of(model)
    for layer, head in [(0, 1), (1, 2), (1, 0)]:
        with torch.no_grad(), unchanged(name, **dict(model.named_parameters())):
            product = dense(name, fn(model, layer, head), CFG.d_model)
        known = mistakes(weights, layer, head)
        for other_layer, other_head in [(layer, (head + 1) % 3), (layer, 0), (1 - layer, head), (0, head)]:
            if (other_layer, other_head) != (layer, head):
                hint = f"it is layer {other_layer}, head {other_head} instead of layer {layer}, head {head}."
                known[hint] = partial(right, weights, other_layer, other_head)
        compare(f"{name} of head {layer}.{head}, multiplied out", product, right(weights, layer, head), axes, known)
    _gradients_flow(name, model, fn)


def _gradients_flow(name: str, model: SmallModel, fn: Fn) -> None:
    moved = SmallModel(CFG).double()
    result = fn(moved, 1, 2)
    if result.A.dtype != torch.float64 or result.B.dtype != torch.float64:
        raise CheckFailed(f"{name} in float64: it is of another dtype.\n  Next: the dtype should follow the model's.")


def _parts(weights: dict[str, Tensor], layer: int, head: int) -> tuple[Tensor, ...]:
    W_Q, W_K, W_V, W_O = (weights[f"blocks.{layer}.attn.W_{letter}"][head] for letter in "QKVO")
    return weights["embed.W_E"], weights["unembed.W_U"], W_Q, W_K, W_V, W_O


def _ov(weights: dict[str, Tensor], layer: int, head: int) -> Tensor:
    W_E, W_U, _, _, W_V, W_O = _parts(weights, layer, head)
    return _circuit(W_E, W_V, W_O, W_U)


def _qk(weights: dict[str, Tensor], layer: int, head: int) -> Tensor:
    W_E, _, W_Q, W_K, _, _ = _parts(weights, layer, head)
    return _circuit(W_E, W_Q, W_K.T, W_E.T)


def _ov_mistakes(weights: dict[str, Tensor], layer: int, head: int) -> Answers:
    W_E, W_U, W_Q, W_K, W_V, W_O = _parts(weights, layer, head)
    w = weights[f"blocks.{layer}.ln1.w"]
    return {
        "it is transposed: rows are the tokens attended to, columns those that come out.": _ov(weights, layer, head).T,
        "W_V and W_O are swapped.": W_E @ W_O.T @ W_V.T @ W_U,
        "it ends in the embeddings; what comes out goes through W_U.": W_E @ W_V @ W_O @ W_E.T,
        "it begins with W_U; what goes in is embedded with W_E.": W_U.T @ W_V @ W_O @ W_U,
        "it is the QK circuit.": W_E @ W_Q @ W_K.T @ W_E.T,
        "W_K is used instead of W_V.": W_E @ W_K @ W_O @ W_U,
        "ln1.w is multiplied in; the statement leaves LayerNorm out.": (W_E * w) @ W_V @ W_O @ W_U,
        "b_U is added; biases are left out.": W_E @ W_V @ W_O @ W_U + weights["unembed.b_U"],
    }


def _qk_mistakes(weights: dict[str, Tensor], layer: int, head: int) -> Answers:
    W_E, W_U, W_Q, W_K, W_V, W_O = _parts(weights, layer, head)
    right = W_E @ W_Q @ W_K.T @ W_E.T
    w = weights[f"blocks.{layer}.ln1.w"]
    return {
        "it is transposed: rows are the tokens that look (queries), columns those looked at.": right.T,
        "it is divided by sqrt(d_head); the statement leaves that out.": right / CFG.d_head**0.5,
        "the keys come through W_U; they are made of embeddings.": W_E @ W_Q @ W_K.T @ W_U,
        "it is the OV circuit.": W_E @ W_V @ W_O @ W_U,
        "W_Q is used for the keys too.": W_E @ W_Q @ W_Q.T @ W_E.T,
        "W_K is used for the queries too.": W_E @ W_K @ W_K.T @ W_E.T,
        "ln1.w is multiplied in; the statement leaves LayerNorm out.": (W_E * w) @ W_Q @ W_K.T @ (W_E * w).T,
    }


def check_ov_circuit(fn: Fn) -> None:
    """Token by token, for three heads."""
    _check_circuit("ov_circuit", fn, "token_in token_out", _ov, _ov_mistakes)


def check_qk_circuit(fn: Fn) -> None:
    """Token by token, for three heads."""
    _check_circuit("qk_circuit", fn, "query_token key_token", _qk, _qk_mistakes)


# ------------------------------------------------------------------------------------------------------- copying


def check_copying_score(fn: Fn) -> None:
    """Eigenvalues of the whole matrix: all positive, all negative, mixed, complex."""
    name = "copying_score"
    A = noise(7, 4, seed=31)
    cases = [
        (noise(6, 3, seed=32), noise(3, 6, seed=33)),
        (noise(9, 5, seed=34), noise(5, 9, seed=35)),
        (A, A.T),
        (A, -A.T),
    ]
    for left, right in cases:
        eigenvalues = torch.linalg.eigvals(left.double() @ right.double())
        real, size, imaginary = eigenvalues.real, eigenvalues.abs(), eigenvalues.imag
        singular = torch.linalg.svdvals(left @ right)
        n_inner = left.shape[1]
        expected = (real.sum() / size.sum()).float()
        mistakes: Answers = {
            "the sum is divided by the sizes of the real parts; take those of the whole numbers.": (
                real.sum() / real.abs().sum()
            ).float(),
            "it is not divided by anything.": real.sum().float(),
            "the sum is divided by how many there are.": (real.sum() / n_inner).float(),
            "it is the share of eigenvalues that are positive.": ((real > 1e-6).sum() / n_inner).float(),
            "the real parts are taken by their size, so that the negative ones count as copying.": (
                real.abs().sum() / size.sum()
            ).float(),
            "the sum is divided by the singular values.": real.sum().float() / singular.sum(),
            "the mean of the cosines is taken; the sums should be divided.": (
                (real[size > 1e-6] / size[size > 1e-6]).mean().float()
            ),
            "the sum is turned round: -1 is where all are negative.": -expected,
            "the imaginary parts are counted too.": ((real + imaginary.abs()).sum() / size.sum()).float(),
        }
        matrix = factored(fn, left, right)
        with unchanged(name, A=left, B=right):
            actual = fn(matrix)
        compare(name, actual, expected, "", _apart(mistakes, expected))
    n = 1501
    big = factored(fn, noise(n, 2, seed=36), noise(2, n, seed=37))
    with Watched() as watched:
        fn(big)
    _refuse_large(name, watched, n * n // 4, f"of a {n} x {n} matrix of inner size 2")


def _refuse_large(name: str, watched: Watched, limit: int, what: str) -> None:
    if watched.largest > limit:
        raise CheckFailed(
            f"{name} {what}: it made a tensor of {watched.largest:,} numbers, which must not be more than {limit:,}.\n"
            "  Next: the whole matrix need not exist at any moment."
        )


def check_top1_accuracy(fn: Fn) -> None:
    """A matrix of which we know where the largest entries are; the blocks do not divide its rows evenly."""
    name = "top1_accuracy"
    for n, block in [(23, 5), (11, 11), (11, 1024), (12, 7)]:
        A = noise(n, 3, seed=41)
        B = A.T + noise(3, n, seed=42, scale=0.6)
        options = {"rows_at_once": block} if block != 1024 else {}  # 1024 is what it should be without being told
        with unchanged(name, A=A, B=B):
            actual = fn(factored(fn, A, B), **options)
        right, mistakes = _hits(A @ B, block)
        actual = actual.item() if isinstance(actual, Tensor) and actual.numel() == 1 else actual
        call = f"of a {n} x {n} matrix, with rows_at_once = {block}"
        agree(name, call, actual, right, {hint: value for hint, value in mistakes.items() if value != right})
    n, block = 401, 16
    big = factored(fn, noise(n, 2, seed=43), noise(2, n, seed=44))
    with Watched() as watched:
        fn(big, rows_at_once=block)
    _refuse_large(name, watched, block * n, f"of a {n} x {n} matrix in blocks of {block} rows")


def _hits(whole: Tensor, block: int) -> tuple[float, dict[str, float]]:
    """The share of rows whose largest entry is on the diagonal, by looking at every entry; and what mistakes give."""
    n = len(whole)
    rows = whole.tolist()
    hits = [float(max(row) == row[number]) for number, row in enumerate(rows)]
    columns = whole.T.tolist()
    blocks = [hits[start : start + block] for start in range(0, n, block)]
    full = [hit for one in blocks if len(one) == block for hit in one]
    mistakes = {
        "the largest entry of each column is looked for; take that of each row.": sum(
            max(column) == column[number] for number, column in enumerate(columns)
        )
        / n,
        "only the first block is looked at.": sum(blocks[0]) / len(blocks[0]),
        "the last, shorter block is left out.": sum(full) / max(1, len(full)),
        "the last, shorter block is left out, but counted.": sum(full) / n,
        "the hits are not divided by the number of rows.": sum(hits),
        "the mean of the blocks' shares is taken; the last block is shorter.": sum(
            sum(one) / len(one) for one in blocks
        )
        / len(blocks),
        "in each block the rows are counted from 0; a block begins at its own row.": sum(
            max(row) == row[number % block] for number, row in enumerate(rows)
        )
        / n,
        "it is the share of misses.": 1 - sum(hits) / n,
        "it is given in percent.": 100 * sum(hits) / n,
    }
    return sum(hits) / n, mistakes


# ------------------------------------------------------------------------------------------------- where a head looks


def check_position_pattern(fn: Fn) -> None:
    """The attention that loops give, when the residual stream is W_pos alone; a model without normalisation, too."""
    name = "position_pattern"
    for cfg, layer, head in [(CFG, 1, 1), (WITH_MLP, 0, 1), (NO_NORM, 1, 0)]:
        model = SmallModel(cfg)
        weights = weights_of(model)
        with torch.no_grad(), nothing_left_behind(name, model), during(f"for normalization {cfg.normalization!r}"):
            actual = fn(model, layer, head)
        pattern = partial(_position_pattern, weights, cfg)
        mistakes = _position_mistakes(pattern, cfg, layer, head)
        expected = pattern(layer, head)
        compare(f"{name} of head {layer}.{head}", actual, expected, "query key", _apart(mistakes, expected))
    follows_input(name, lambda moved: fn(moved, 0, 1), (model,), "query key")


def _position_mistakes(pattern: Callable[..., Tensor], cfg: TransformerConfig, layer: int, head: int) -> Answers:
    return {
        "W_pos does not go through the layer's ln1.": lambda: pattern(layer, head, norm="none"),
        "W_pos is normalised, but `w` and `b` of ln1 are left out.": lambda: pattern(layer, head, norm="plain"),
        "b_Q is left out, or all biases are.": lambda: pattern(layer, head, biases=False),
        "nothing is masked: positions look into the future.": lambda: pattern(layer, head, masked=False),
        "the scores are not divided by sqrt(d_head).": lambda: pattern(layer, head, divisor=1.0),
        "the scores are divided by sqrt(d_model).": lambda: pattern(layer, head, divisor=cfg.d_model**0.5),
        "queries and keys are swapped.": lambda: pattern(layer, head, transposed=True),
        "it is transposed: rows are queries, columns keys.": lambda: pattern(layer, head).T,
        "it holds the scores; the softmax is missing.": lambda: pattern(layer, head, softmax=False),
        "it is the pattern of another head.": lambda: pattern(layer, (head + 1) % cfg.n_heads),
        "it is the pattern of the first head.": lambda: pattern(layer, 0),
        "it is the pattern of the first layer.": lambda: pattern(0, head),
    }


def _position_pattern(
    weights: dict[str, Tensor], cfg: TransformerConfig, layer: int, head: int, **wrong: Any
) -> Tensor:
    block = by_loops.part(weights, f"blocks.{layer}")
    norm, attn = by_loops.part(block, "ln1"), by_loops.part(block, "attn")
    if wrong.get("norm") == "plain" and norm:
        norm = {"w": torch.ones_like(norm["w"]), "b": torch.zeros_like(norm["b"])}
    if wrong.get("norm") == "none":
        norm = {}
    if not wrong.get("biases", True):
        attn = {name: tensor * (not name.startswith("b_")) for name, tensor in attn.items()}
    resid = by_loops.layer_norm(norm, weights["pos_embed.W_pos"][None], cfg.layer_norm_eps)["output"]
    if not wrong:
        one_head = {name: tensor if name == "b_O" else tensor[head : head + 1] for name, tensor in attn.items()}
        return by_loops.attention(one_head, resid)["hook_pattern"][0, 0]
    q, k = (resid[0] @ attn[f"W_{letter}"][head] + attn[f"b_{letter}"][head] for letter in "QK")
    scores = (k @ q.T if wrong.get("transposed") else q @ k.T) / wrong.get("divisor", cfg.d_head**0.5)
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(future, -torch.inf) if wrong.get("masked", True) else scores
    return scores.softmax(-1) if wrong.get("softmax", True) else scores


def _sources(
    cache: ActivationCache, weights: dict[str, Tensor], cfg: TransformerConfig, layer: int
) -> tuple[list[str], list[Tensor]]:
    """What was added to the residual stream before a layer, in order."""
    labels, vectors = ["embed", "pos_embed"], [cache["hook_embed"], cache["hook_pos_embed"]]
    for earlier in range(layer):
        block = f"blocks.{earlier}"
        for head in range(cfg.n_heads):
            labels.append(f"head {earlier}.{head}")
            vectors.append(cache[f"{block}.attn.hook_result"][:, :, head])
        labels.append(f"bias {earlier}")
        vectors.append(weights[f"{block}.attn.b_O"].expand_as(vectors[0]))
        if not cfg.attn_only:
            labels.append(f"mlp {earlier}")
            vectors.append(cache[f"{block}.hook_mlp_out"])
    return labels, vectors


def _terms(
    cache: ActivationCache, weights: dict[str, Tensor], cfg: TransformerConfig, layer: int, head: int, **wrong: Any
) -> Tensor:
    """A term for each pair of sources, one pair after the other."""
    _, vectors = _sources(cache, weights, cfg, layer)
    attn = by_loops.part(weights, f"blocks.{layer}.attn")
    shift = torch.zeros(cfg.d_model)
    if cfg.normalization == "LN":
        norm = by_loops.part(weights, f"blocks.{layer}.ln1")
        shift = norm["b"] * (wrong.get("without") != "ln1.b")
        w = norm["w"] if wrong.get("without") != "ln1.w" else torch.ones(cfg.d_model)
        if wrong.get("without") != "centring":
            vectors = [vector - vector.mean(-1, keepdim=True) for vector in vectors]
        if wrong.get("without") == "scale":
            scale = torch.ones(())
        elif wrong.get("own_scale"):
            scale = None
        else:
            scale = cache[f"blocks.{layer}.ln1.hook_scale"]
        vectors = [
            vector / (scale if scale is not None else (vector.square().mean(-1, keepdim=True) + 1e-5).sqrt()) * w
            for vector in vectors
        ]
    sides = {}
    for letter in "QK":
        W, b = attn[f"W_{letter}"][head], attn[f"b_{letter}"][head] * (wrong.get("without") != "b_Q")
        constant = (shift @ W + b).expand(*vectors[0].shape[:2], -1)
        sides[letter] = [*(vector @ W for vector in vectors), constant]
    first, second = (sides["K"], sides["Q"]) if wrong.get("swapped") else (sides["Q"], sides["K"])
    pairs = [[q @ k.transpose(1, 2) for k in second] for q in first]
    return torch.stack([torch.stack(row, 1) for row in pairs], 1) / wrong.get("divisor", cfg.d_head**0.5)


def check_decompose_qk(fn: Fn) -> None:
    """Pair by pair, with the labels; with MLPs, without normalisation, and in the first layer."""
    name = "decompose_qk"
    axes = "batch query_source key_source query key"
    for cfg, layer, head, n_batch, n_pos in [
        (CFG, 1, 2, 2, 5),
        (WITH_MLP, 1, 1, 1, 4),
        (NO_NORM, 1, 0, 2, 3),
        (CFG, 0, 1, 2, 5),
    ]:
        model, tokens = SmallModel(cfg), some_tokens(cfg, n_batch, n_pos, seed=7)
        weights = weights_of(model)
        with torch.no_grad():
            _, cache = run_with_cache(model, tokens, names="*")
            with unchanged(name, **dict(cache)), nothing_left_behind(name, model), during(f"for layer {layer}"):
                answer = fn(cache, model, layer, head)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise CheckFailed(f"{name}: expected a pair, (labels, terms).\n  Next: see the docstring.")
        labels, terms = answer
        of = partial(_terms, cache, weights, cfg, layer)
        expected_labels = [*_sources(cache, weights, cfg, layer)[0], "constant"]
        agree(name, f"the labels, for layer {layer}", list(labels), expected_labels)
        expected = of(head)
        mistakes = _apart(_decomposition_mistakes(of, cfg, head), expected)
        compare(f"{name} of head {layer}.{head}", terms, expected, axes, mistakes)
    # that the oracle's terms sum to the scores which the model had is tested in the suite


def _decomposition_mistakes(of: Callable[..., Tensor], cfg: TransformerConfig, head: int) -> Answers:
    def masked() -> Tensor:
        right = of(head)
        return right.masked_fill(torch.ones(right.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)

    return {
        "the sources are not divided by the scale of ln1.": lambda: of(head, without="scale"),
        "each source is divided by a scale of its own; the scale is that of their sum.": lambda: of(
            head, own_scale=True
        ),
        "the sources are not centred: LayerNorm subtracts the mean.": lambda: of(head, without="centring"),
        "`ln1.w` is left out.": lambda: of(head, without="ln1.w"),
        "`ln1.b` is left out; it belongs to the constant source.": lambda: of(head, without="ln1.b"),
        "b_Q and b_K are left out; they belong to the constant source.": lambda: of(head, without="b_Q"),
        "the terms are not divided by sqrt(d_head).": lambda: of(head, divisor=1.0),
        "W_Q and W_K are swapped.": lambda: of(head, swapped=True),
        "the two axes of sources are swapped: the query's comes first.": lambda: of(head).transpose(1, 2),
        "queries and keys are transposed.": lambda: of(head).transpose(3, 4),
        "it is another head.": lambda: of((head + 1) % cfg.n_heads),
        "the keys in the future are masked; leave them in.": masked,
    }


# -------------------------------------------------------------------------------------------------------- composition


def _frobenius(M: Tensor) -> Tensor:
    return M.square().sum((-2, -1)).sqrt()


def _spectral(M: Tensor) -> Tensor:
    return torch.linalg.svdvals(M)[..., 0]


def check_composition_score(fn: Fn) -> None:
    """Tensors, square ones too, where order and transposes can be mixed up; then factored ones, and a batch."""
    name = "composition_score"
    for W_A, W_B in [
        (noise(5, 7, seed=51), noise(7, 6, seed=52)),
        (noise(6, 6, seed=53), noise(6, 6, seed=54)),
        (noise(2, 5, 7, seed=55), noise(2, 7, 4, seed=56)),
    ]:
        product = W_A @ W_B
        expected = _frobenius(product) / (_frobenius(W_A) * _frobenius(W_B))
        nuclear = [torch.linalg.svdvals(M).sum(-1) for M in (product, W_A, W_B)]
        mistakes: Answers = {
            "the norms are spectral ones, the largest singular values; take the Frobenius norm.": _spectral(product)
            / (_spectral(W_A) * _spectral(W_B)),
            "the norms are nuclear ones, sums of singular values; take the Frobenius norm.": nuclear[0]
            / (nuclear[1] * nuclear[2]),
            "it is not divided by the norms of W_A and W_B.": _frobenius(product),
            "it is divided by one of the two norms only.": _frobenius(product) / _frobenius(W_A),
            "it is divided by the sum of the norms; take their product.": _frobenius(product)
            / (_frobenius(W_A) + _frobenius(W_B)),
            "the norms are squared.": expected.square(),
            "the sum is that of the absolute values.": product.abs().sum((-2, -1))
            / (W_A.abs().sum((-2, -1)) * W_B.abs().sum((-2, -1))),
        }
        if W_A.shape == W_B.shape:
            denominator = _frobenius(W_A) * _frobenius(W_B)
            mistakes |= {
                "the order is turned round: W_A comes first, then W_B.": _frobenius(W_B @ W_A) / denominator,
                "W_B is transposed.": _frobenius(W_A @ W_B.T) / denominator,
                "W_A is transposed.": _frobenius(W_A.T @ W_B) / denominator,
                "the matrices are multiplied entry by entry.": _frobenius(W_A * W_B) / denominator,
            }
        axes = "batch" if W_A.dim() == 3 else ""
        with unchanged(name, W_A=W_A, W_B=W_B):
            actual = fn(W_A, W_B)
        compare(f"{name} of a batch" if axes else name, actual, expected, axes, mistakes)
    factors = [noise(5, 2, seed=57), noise(2, 7, seed=58), noise(7, 3, seed=59), noise(3, 6, seed=60)]
    first, second = factored(fn, *factors[:2]), factored(fn, *factors[2:])
    with during("with factored matrices"):
        actual = fn(first, second)
    W_A, W_B = factors[0] @ factors[1], factors[2] @ factors[3]
    expected = _frobenius(W_A @ W_B) / (_frobenius(W_A) * _frobenius(W_B))
    compare(f"{name} of factored matrices", actual, expected, "")
    follows_input(name, fn, (noise(5, 7), noise(7, 6)), "")


def _reads(weights: dict[str, Tensor], kind: str, layer: int, head: int, transposed: bool = False) -> Tensor:
    """What a head does with what it reads, as one matrix."""
    _, _, W_Q, W_K, W_V, W_O = _parts(weights, layer, head)
    if kind == "V":
        return (W_V @ W_O).T if transposed else W_V @ W_O
    return W_Q @ W_K.T if (kind == "Q") != transposed else W_K @ W_Q.T


def _all_pairs(
    weights: dict[str, Tensor],
    cfg: TransformerConfig,
    kind: str,
    norm: Callable[[Tensor], Tensor] = _frobenius,
    which: Callable[[int, int], bool] = int.__lt__,
    transposed: bool = False,
    backwards: bool = False,
) -> Tensor:
    """One pair of heads after another."""
    table = torch.zeros(cfg.n_layers, cfg.n_heads, cfg.n_layers, cfg.n_heads)
    for layer in range(cfg.n_layers):
        for later in range(cfg.n_layers):
            if not which(layer, later):
                continue
            for head in range(cfg.n_heads):
                for later_head in range(cfg.n_heads):
                    W_A = _reads(weights, "V", layer, head)
                    W_B = _reads(weights, kind, later, later_head, transposed)
                    product = W_B @ W_A if backwards else W_A @ W_B
                    table[layer, head, later, later_head] = norm(product) / (norm(W_A) * norm(W_B))
    return table


def check_composition_scores(fn: Fn) -> None:
    """All pairs, one by one, in models of three layers and of two; then how many operations a larger one takes."""
    name = "composition_scores"
    axes = "layer head later_layer later_head"
    for cfg in (WITH_MLP, CFG):
        model = SmallModel(cfg)
        weights = weights_of(model)
        for kind in KINDS:
            with torch.no_grad(), unchanged(name, **dict(model.named_parameters())):
                actual = fn(model, kind)
            table = partial(_all_pairs, weights, cfg)
            expected = table(kind)
            known = _apart(_pair_mistakes(table, kind), expected)
            compare(f'{name} for "{kind}"', actual, expected, axes, known)
    must_raise(name, ValueError, 'composition_scores(model, "O")', lambda: fn(model, "O"))
    wide = SmallModel(
        TransformerConfig(d_vocab=5, n_ctx=4, n_layers=2, n_heads=12, d_model=6, d_head=2, attn_only=True)
    )
    with torch.no_grad(), Watched() as watched:
        fn(wide, "K")
    if watched.operations > 4 * 144:
        raise CheckFailed(
            f"{name}: for 144 pairs of heads it took {watched.operations} operations, several for each pair.\n"
            "  Next: let batch axes do it: all heads of one layer with all heads of a later one, in one product."
        )


def _pair_mistakes(table: Callable[..., Tensor], kind: str) -> Answers:
    mistakes: Answers = {
        f'it is {other}-composition; "{kind}" was asked for.': partial(table, other) for other in KINDS if other != kind
    }
    if kind == "V":  # transposed, Q and K are each other
        mistakes["what the later head reads is transposed."] = lambda: table(kind, transposed=True)
    return mistakes | {
        "the order is turned round: the earlier head writes first.": lambda: table(kind, backwards=True),
        "the earlier and the later head are swapped.": lambda: table(kind).permute(2, 3, 0, 1),
        "the norms are spectral ones; take the Frobenius norm.": lambda: table(kind, norm=_spectral),
        "every pair has a score; those in which the second head is not in a later layer should be 0.": lambda: table(
            kind, which=lambda layer, later: True
        ),
        "heads of one layer are paired; neither reads what the other writes.": lambda: table(kind, which=int.__le__),
        "only neighbouring layers are paired.": lambda: table(kind, which=lambda layer, later: later == layer + 1),
        "only what the first layer writes is looked at.": lambda: table(
            kind, which=lambda layer, later: layer == 0 < later
        ),
        "heads are mixed up: the two axes of heads are swapped.": lambda: table(kind).transpose(1, 3),
    }


def check_random_composition_baseline(fn: Fn) -> None:
    """Its size and its spread, which rotations decide; and where the random numbers come from."""
    name = "random_composition_baseline"
    model = SmallModel(CFG)
    with torch.no_grad():  # QK nearly of rank one, OV with equal singular values: their scores spread differently
        for block in model.blocks:
            block.attn.W_Q[:, :, 1:] *= 0.02
            block.attn.W_O.copy_(torch.linalg.qr(block.attn.W_O.mT).Q.mT)
            block.attn.W_V.copy_(block.attn.W_O.mT)
    weights = weights_of(model)

    def draw(kind: str, n: int, seed: int) -> Any:
        with torch.no_grad():
            return fn(model, kind, n, torch.Generator().manual_seed(seed))

    before = torch.random.get_rng_state()
    first, again, other = draw("Q", 5, 1), draw("Q", 5, 1), draw("Q", 5, 2)
    if not isinstance(first, Tensor) or tuple(first.shape) != (5,):
        got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise CheckFailed(f"{name}: expected a Tensor of n = 5 scores, got {got}.\n  Next: return all of them.")
    if first.dtype != torch.float32:
        raise CheckFailed(f"{name}: expected dtype float32, got {first.dtype}.\n  Next: it should follow the model's.")
    if not torch.equal(before, torch.random.get_rng_state()) or not torch.equal(first, again):
        raise CheckFailed(
            f"{name}: the same generator, seeded alike, does not give the same scores, or others are drawn besides.\n"
            "  Next: hand `generator=generator` to everything that draws."
        )
    if torch.equal(first, other):
        raise CheckFailed(
            f"{name}: two generators with different seeds give the same scores.\n  Next: draw from `generator`."
        )
    _refuse_own_pairs(name, first, weights, "Q")
    if len(first.unique()) < 5:
        raise CheckFailed(f"{name}: some of the 5 scores are the same.\n  Next: draw a new rotation for each.")
    for kind in KINDS:
        _check_spread(name, draw(kind, 100, 3), weights, kind)
    _check_layers(name, fn)
    must_raise(name, ValueError, 'random_composition_baseline(model, "O", ...)', lambda: draw("O", 2, 1))
    single = SmallModel(
        TransformerConfig(d_vocab=5, n_ctx=4, n_layers=1, n_heads=3, d_model=6, d_head=2, attn_only=True)
    )
    generator = torch.Generator().manual_seed(0)
    must_raise(name, ValueError, "for a model of one layer it", lambda: fn(single, "K", 2, generator))


def _check_layers(name: str, fn: Fn) -> None:
    """What the first layer reads and what the last one writes is zero: such a pair has no score, 0 / 0."""
    model = SmallModel(WITH_MLP)
    with torch.no_grad():
        model.blocks[0].attn.W_Q.zero_()
        model.blocks[-1].attn.W_V.zero_()
        scores = fn(model, "K", 40, torch.Generator().manual_seed(4))
    if scores.isnan().any():
        raise CheckFailed(
            f"{name}: it draws pairs in which the first head is in the last layer, or the second in layer 0.\n"
            "  Next: the second head is in a later layer than the first."
        )


def _refuse_own_pairs(name: str, scores: Tensor, weights: dict[str, Tensor], kind: str) -> None:
    """Without a rotation only the model's own scores come out, again and again."""
    table = _all_pairs(weights, CFG, kind)[0, :, 1].flatten()
    if (scores[:, None] - table).abs().amin(1).max() < 1e-4:
        raise CheckFailed(
            f'{name} for "{kind}": these are the scores of the model\'s own pairs.\n'
            "  Next: rotate the residual stream between what is written and what is read."
        )


def _check_spread(name: str, scores: Tensor, weights: dict[str, Tensor], kind: str) -> None:
    """The mean square of the score is 1 / d_model, exactly; the spread depends on the heads' singular values."""
    _refuse_own_pairs(name, scores, weights, kind)
    d_model = CFG.d_model
    mean_square = scores.square().mean().item()
    rng = torch.Generator().manual_seed(9)
    rotations = torch.linalg.qr(torch.randn(300, d_model, d_model, generator=rng)).Q
    heads, later_heads = torch.randint(3, (2, 300), generator=rng)
    W_A = torch.stack([_reads(weights, "V", 0, head) for head in range(3)])[heads]
    W_B = torch.stack([_reads(weights, kind, 1, head) for head in range(3)])[later_heads]
    expected = _frobenius(W_A @ rotations @ W_B) / (_frobenius(W_A) * _frobenius(W_B))
    squares = scores.square()
    error = squares.std().item() / len(scores) ** 0.5
    if abs(mean_square - 1 / d_model) > 5 * error + 0.005:
        raise CheckFailed(
            f'{name} for "{kind}": the squares of {len(scores)} scores are {mean_square:.3f} on average, '
            f"expected about 1 / d_model = {1 / d_model:.3f}.\n"
            "  Next: is what rotates a rotation (orthogonal), and the score that of Frobenius norms?"
        )
    if not 0.7 < scores.std() / expected.std() < 1.4:
        raise CheckFailed(
            f'{name} for "{kind}": the deviation of {len(scores)} scores is {scores.std():.3f}, expected about '
            f"{expected.std():.3f}.\n"
            f'  Next: use the heads\' own weights, those that "{kind}" reads with, and nothing random but the rotation '
            "and the choice of heads."
        )
