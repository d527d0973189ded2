# ruff: noqa: N802 (check_FactoredMatrix is named after its exercise; T is what torch calls it)
"""Checks of chapter 04, reading weights: matrices of low rank, the circuits of heads, and where a head looks.

Oracles form the whole matrix, which at these sizes costs nothing, or visit every token and every source.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks import by_loops
from course_utils.checks.ch04.counting import Watched
from course_utils.checks.ch04.looking import DOUBLE, OVERFLOW, exp_over_sum
from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.leftovers import nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise, weights_of, with_methods
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree, must_raise
from course_utils.checks.standins.factored_matrix import Factored
from course_utils.checks.standins.transformer import SmallModel, some_tokens
from course_utils.checks.translating import during
from course_utils.checks.whose import beside
from course_utils.config import TransformerConfig
from course_utils.hooks import ActivationCache, run_with_cache

Fn = Callable[..., Any]

CFG = TransformerConfig(d_vocab=13, n_ctx=9, n_layers=2, n_heads=3, d_model=7, d_head=4, attn_only=True)
WITH_MLP = TransformerConfig(d_vocab=11, n_ctx=6, n_layers=3, n_heads=2, d_model=5, d_head=3, d_mlp=8)
NO_NORM = TransformerConfig(
    d_vocab=11, n_ctx=6, n_layers=2, n_heads=2, d_model=5, d_head=3, attn_only=True, normalization="none"
)
RMS = TransformerConfig(
    d_vocab=11, n_ctx=6, n_layers=2, n_heads=2, d_model=5, d_head=3, attn_only=True, normalization="RMS"
)
ROTARY = TransformerConfig(
    d_vocab=11, n_ctx=6, n_layers=2, n_heads=2, d_model=5, d_head=5, d_mlp=8, positions="rotary", rotary_dim=4,
    rotary_base=30.0, parallel=True,
)  # fmt: skip


def factored(fn: Fn, A: Tensor, B: Tensor) -> Any:
    """A matrix in factors, of the class that stands beside the learner's function if there is one."""
    theirs = beside(fn, "FactoredMatrix")
    return (theirs if isinstance(theirs, type) else Factored)(A, B)


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


# ----------------------------------------------------------------------------------------------------- FactoredMatrix


def frobenius(M: Tensor) -> Tensor:
    return M.square().sum((-2, -1)).sqrt()


def spectral(M: Tensor) -> Tensor:
    return torch.linalg.svdvals(M)[..., 0]


def nuclear(M: Tensor) -> Tensor:
    return torch.linalg.svdvals(M).sum(-1)


def absolute(M: Tensor) -> Tensor:
    return M.abs().sum((-2, -1))


def with_norm(norm: Callable[[Tensor], Tensor]) -> type:
    return with_methods(Factored, "FactoredMatrix", norm=lambda self: norm(self.A @ self.B))


def with_singular_values(values: Callable[[Any, Tensor], Tensor]) -> type:
    """A FactoredMatrix that returns other singular values, given itself and the right ones."""

    def svd(self: Any) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = Factored.svd(self)
        return U, values(self, S), Vh

    return with_methods(Factored, "FactoredMatrix", svd=svd)


@known_mistakes(
    {
        "the last factor is lost.": with_methods(
            Factored,
            "FactoredMatrix",
            __matmul__=lambda self, other: Factored(self.A, self.B @ getattr(other, "A", other)),
        ),
        "they are in ascending order.": with_singular_values(lambda self, S: S.flip(-1)),
        "they are those of A alone.": with_singular_values(lambda self, S: torch.linalg.svdvals(self.A)),
        "they are those of B alone.": with_singular_values(lambda self, S: torch.linalg.svdvals(self.B)),
        "they are squared.": with_singular_values(lambda self, S: S.square()),
        "they are the products of the singular values of A and of B; those of a product are others.": (
            with_singular_values(lambda self, S: torch.linalg.svdvals(self.A) * torch.linalg.svdvals(self.B))
        ),
        "it is the spectral norm, the largest singular value; the Frobenius norm counts every entry.": with_norm(
            spectral
        ),
        "it is the nuclear norm, the sum of the singular values.": with_norm(nuclear),
        "the root is left out.": with_norm(lambda M: M.square().sum((-2, -1))),
        "it is the sum of the absolute values.": with_norm(absolute),
        "one norm is taken over the whole batch.": with_norm(lambda M: M.norm().expand(M.shape[:-2])),
    }
)
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
            compare(f"{case}: norm()", one.norm(), frobenius(M), batch)
    _eigenvalues(name, cls)
    must_raise(name, ValueError, "eigenvalues() of a 5 x 7 matrix", lambda: cls(A, B).eigenvalues())
    must_raise(name, ValueError, "eigenvalues() of a 7 x 5 matrix", lambda: cls(B.mT, A.mT).eigenvalues())
    wide = cls(noise(2, 5, seed=5), noise(5, 4, seed=6))  # more inner than outer
    _decomposition(f"{name} whose inner size is the largest", wide, wide.A @ wide.B, "")
    double = cls(noise(5, 3, seed=1).double(), noise(3, 7, seed=2).double())
    _decomposition(f"{name} in float64", double, double.A @ double.B, "", **DOUBLE)
    follows_input(name, lambda A, B: cls(A, B).norm(), (noise(5, 3), noise(3, 7)), "")
    compare(f"{name} in float64: norm()", double.norm(), frobenius(double.A @ double.B), "", **DOUBLE)
    _never_formed(name, cls)


def _products(case: str, cls: Any, one: Any, M: Tensor, C: Tensor, D: Tensor, batch: str) -> None:
    def whole(what: str, result: Any, expected: Tensor, axes: str) -> None:
        product = dense(f"{case}: {what}", result, 3)
        compare(f"{case}: {what}, multiplied out", product, expected, batch + axes)

    whole("T", one.T, M.mT, "columns rows")
    whole("this @ tensor", one @ C, M @ C, "rows other")
    whole("this @ factored", one @ cls(C, D), M @ (C @ D), "rows other")
    E = noise(6, 5, seed=8)
    whole("tensor @ this", E @ one, E @ M, "other columns")
    must_raise(case, ValueError, "this @ vector", lambda: one @ C[:, 0])
    must_raise(case, ValueError, "vector @ this", lambda: E[0] @ one)


def _decomposition(case: str, one: Any, M: Tensor, batch: str, **tolerance: float) -> None:
    answer = one.svd()
    if not isinstance(answer, tuple) or len(answer) != 3:
        raise CheckFailed(f"{case}: svd() should return three tensors, U, S and Vh.\n  Next: see the docstring.")
    U, S, Vh = answer
    rank = min(*M.shape[-2:], one.A.shape[-1])
    compare(f"{case}: the singular values", S, torch.linalg.svdvals(M)[..., :rank], f"{batch}rank", **tolerance)
    for what, vectors, shape in [("U", U, (M.shape[-2], rank)), ("Vh", Vh, (rank, M.shape[-1]))]:
        if tuple(vectors.shape[-2:]) != shape:
            hint = " (is it V, not transposed?)" if tuple(vectors.shape[-2:]) == shape[::-1] else ""
            raise CheckFailed(
                f"{case}: {what} has shape {tuple(vectors.shape)}, expected {(*M.shape[:-2], *shape)}{hint}.\n"
                "  Next: print the shape of each factor on the way."
            )
    if S[..., -1].min() < 1e-3:  # directions that belong to singular values of 0 are arbitrary
        raise AssertionError("the matrices of this check have full rank")
    compare(f"{case}: U diag(S) Vh", (U * S[..., None, :]) @ Vh, M, f"{batch}rows columns", **tolerance)
    identity = torch.eye(rank, dtype=M.dtype).expand(*M.shape[:-2], rank, rank)
    compare(f"{case}: U transposed times U", U.mT @ U, identity, f"{batch}rank rank", **tolerance)
    compare(f"{case}: Vh times Vh transposed", Vh @ Vh.mT, identity, f"{batch}rank rank", **tolerance)


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


def direct(table: Callable[[Any], Tensor]) -> Fn:
    """A table of tokens by tokens, made of the embeddings and the unembedding."""
    return lambda model: table(parts(model, 0, 0))


@known_mistakes(
    {
        "b_U is left out.": direct(lambda p: p.E @ p.U),
        "it is transposed: rows are current tokens, columns the next ones.": direct(lambda p: (p.E @ p.U + p.b_U).T),
        "b_U is added to the rows; it belongs to the next token, the column.": direct(
            lambda p: p.E @ p.U + p.b_U[:, None]
        ),
        "it ends in the embeddings; the next token is read with W_U.": direct(lambda p: p.E @ p.E.T + p.b_U),
        "it holds probabilities; the softmax is too much.": direct(lambda p: (p.E @ p.U + p.b_U).softmax(-1)),
        "it holds log-probabilities; the statement asks for logits.": direct(
            lambda p: (p.E @ p.U + p.b_U).log_softmax(-1)
        ),
        "the embeddings go through ln_final; the statement leaves LayerNorm out.": lambda model: model.unembed(
            model.ln_final(model.embed.W_E[None])
        )[0].detach(),
    }
)
def check_bigram_logits(fn: Fn) -> None:
    """Token by token, for two models."""
    name = "bigram_logits"
    for cfg in (CFG, WITH_MLP):
        model = SmallModel(cfg)
        p = parts(model, 0, 0)
        expected = torch.stack([torch.stack([row @ column for column in p.U.T]) + p.b_U for row in p.E])
        with torch.no_grad(), nothing_left_behind(name, model):
            actual = fn(model)
        compare(name, actual, expected, "token next_token")
    follows_input(name, lambda moved: fn(moved), (model,), "token next_token")


def _circuit(W_in: Tensor, first: Tensor, second: Tensor, W_out: Tensor) -> Tensor:
    """One token after another: what goes in, through the head, to every token that comes out."""
    rows = []
    for vector in W_in:
        through = (vector @ first) @ second
        rows.append(torch.stack([through @ column for column in W_out.T]))
    return torch.stack(rows)


def _check_circuit(name: str, fn: Fn, axes: str, right: Callable[..., Tensor]) -> None:
    """For some heads of a model: the whole matrix, as factors that are thin."""
    model = SmallModel(CFG)
    for layer, head in [(0, 1), (1, 2), (1, 0)]:
        expected = right(parts(model, layer, head))
        with torch.no_grad():
            product = dense(name, fn(model, layer, head), CFG.d_model)
        compare(f"{name} of head {layer}.{head}, multiplied out", product, expected, axes)
    result = fn(SmallModel(CFG).double(), 1, 2)
    if result.A.dtype != torch.float64 or result.B.dtype != torch.float64:
        raise CheckFailed(f"{name} in float64: it is of another dtype.\n  Next: the dtype should follow the model's.")


def parts(model: Any, layer: int, head: int) -> SimpleNamespace:
    """The weights that a circuit may use, by their letters; `w` is the one of the layer's ln1, if it has one."""
    block = model.blocks[layer]
    own = {letter: getattr(block.attn, f"W_{letter}")[head].detach() for letter in "QKVO"}
    ends = {"E": model.embed.W_E.detach(), "U": model.unembed.W_U.detach(), "b_U": model.unembed.b_U.detach()}
    return SimpleNamespace(**own, **ends, w=getattr(block.ln1, "w", None))


def circuit(factors: Callable[[Any], tuple[Tensor, Tensor]], of: Callable[[int, int], tuple[int, int]]) -> Fn:
    """The circuit with these factors, made of the weights of head `of(layer, head)`."""
    return lambda model, layer, head: Factored(*factors(parts(model, *of(layer, head))))


def circuit_mistakes(
    right: Callable[[Any], tuple[Tensor, Tensor]], wrong: dict[str, Callable[[Any], tuple[Tensor, Tensor]]]
) -> dict[str, Fn]:
    """Wrong factors, and the right ones of other heads."""
    others: dict[str, Callable[[int, int], tuple[int, int]]] = {
        "it is the next head.": lambda layer, head: (layer, (head + 1) % CFG.n_heads),
        "it is always head 0.": lambda layer, head: (layer, 0),
        "it is the head of that number in the next layer.": lambda layer, head: ((layer + 1) % CFG.n_layers, head),
        "it is always a head of layer 0.": lambda layer, head: (0, head),
    }
    return {hint: circuit(factors, lambda layer, head: (layer, head)) for hint, factors in wrong.items()} | {
        hint: circuit(right, of) for hint, of in others.items()
    }


def ov_factors(p: Any) -> tuple[Tensor, Tensor]:
    return p.E @ p.V, p.O @ p.U


def qk_factors(p: Any) -> tuple[Tensor, Tensor]:
    return p.E @ p.Q, p.K.T @ p.E.T


@known_mistakes(
    circuit_mistakes(
        ov_factors,
        {
            "it is transposed: rows are the tokens attended to, columns those that come out.": lambda p: (
                (p.O @ p.U).T,
                (p.E @ p.V).T,
            ),
            "W_V and W_O are swapped.": lambda p: (p.E @ p.O.T, p.V.T @ p.U),
            "it ends in the embeddings; what comes out goes through W_U.": lambda p: (p.E @ p.V, p.O @ p.E.T),
            "it begins with W_U; what goes in is embedded with W_E.": lambda p: (p.U.T @ p.V, p.O @ p.U),
            "it is the QK circuit.": qk_factors,
            "W_K is used instead of W_V.": lambda p: (p.E @ p.K, p.O @ p.U),
            "ln1.w is multiplied in; the statement leaves LayerNorm out.": lambda p: (p.E * p.w @ p.V, p.O @ p.U),
            "b_U is added; biases are left out.": lambda p: (
                torch.cat([p.E @ p.V, torch.ones(len(p.E), 1)], 1),
                torch.cat([p.O @ p.U, p.b_U[None]]),
            ),
        },
    )
)
def check_ov_circuit(fn: Fn) -> None:
    """Token by token, for three heads."""
    _check_circuit("ov_circuit", fn, "token_in token_out", lambda p: _circuit(p.E, p.V, p.O, p.U))


@known_mistakes(
    circuit_mistakes(
        qk_factors,
        {
            "it is transposed: rows are the tokens that look (queries), columns those looked at.": lambda p: (
                p.E @ p.K,
                p.Q.T @ p.E.T,
            ),
            "it is divided by sqrt(d_head); the statement leaves that out.": lambda p: (
                p.E @ p.Q / CFG.d_head**0.5,
                p.K.T @ p.E.T,
            ),
            "the keys come through W_U; they are made of embeddings.": lambda p: (p.E @ p.Q, p.K.T @ p.U),
            "it is the OV circuit.": ov_factors,
            "W_Q is used for the keys too.": lambda p: (p.E @ p.Q, p.Q.T @ p.E.T),
            "W_K is used for the queries too.": lambda p: (p.E @ p.K, p.K.T @ p.E.T),
            "ln1.w is multiplied in; the statement leaves LayerNorm out.": lambda p: (
                p.E * p.w @ p.Q,
                p.K.T @ (p.E * p.w).T,
            ),
        },
    )
)
def check_qk_circuit(fn: Fn) -> None:
    """Token by token, for three heads."""
    _check_circuit("qk_circuit", fn, "query_token key_token", lambda p: _circuit(p.E, p.Q, p.K.T, p.E.T))


def triples(
    column: Callable[[Tensor, int], Tensor] = lambda qk, source: (qk - qk.mean(1, keepdim=True))[:, source],
    row: Callable[[Tensor, int], Tensor] = lambda ov, source: ov[source],
    chosen: Callable[[list[int], int], list[int]] = lambda order, k: order[:k],
) -> Fn:
    """The lists from the whole tables, with switches."""

    def answer(qk: Any, ov: Any, source: int, k: int) -> tuple[list[int], list[int]]:
        wants, writes = column(qk.A @ qk.B, source), row(ov.A @ ov.B, source)
        lists = [sorted(range(len(side)), key=side.tolist().__getitem__, reverse=True) for side in (wants, writes)]
        return chosen(lists[0], k), chosen(lists[1], k)

    return answer


@known_mistakes(
    {
        "the mean of each query's scores is not subtracted.": triples(column=lambda qk, source: qk[:, source]),
        "`source` is taken for the query; it is the key, a column of the QK circuit.": triples(
            column=lambda qk, source: (qk - qk.mean(1, keepdim=True))[source]
        ),
        "`source` is taken for a column of the OV circuit; it is the row.": triples(
            row=lambda ov, source: ov[:, source]
        ),
        "the weakest come first.": triples(chosen=lambda order, k: order[::-1][:k]),
        "the strongest come last.": triples(chosen=lambda order, k: order[:k][::-1]),
        "the softmax over the keys is taken; compare the scores.": triples(
            column=lambda qk, source: qk.softmax(1)[:, source]
        ),
        "the largest scores are taken by their size, so that negative ones count.": triples(
            column=lambda qk, source: (qk - qk.mean(1, keepdim=True))[:, source].abs(),
            row=lambda ov, source: ov[source].abs(),
        ),
        "the two lists are swapped: the queries come first.": lambda qk, ov, source, k: triples()(qk, ov, source, k)[
            ::-1
        ],
    }
)
def check_skip_trigrams(fn: Fn) -> None:
    """The whole tables, sorted; then a size at which they would be seen."""
    name = "skip_trigrams"
    for n, inner, source, k, seed in [(17, 3, 4, 3, 51), (11, 2, 10, 1, 52), (13, 4, 0, 13, 53)]:
        A, B, C, D = (noise(*shape, seed=seed + number) for number, shape in enumerate([(n, inner), (inner, n)] * 2))
        B = B + 3 * noise(inner, 1, seed=seed)  # every key has it: each query wants all of them more, or less
        with unchanged(name, A=A, B=B, C=C, D=D):
            actual = fn(factored(fn, A, B), factored(fn, C, D), source, k)
        call = f"{name}(qk, ov, source={source}, k={k}) over {n} tokens"
        if not isinstance(actual, tuple | list) or len(actual) != 2:
            raise CheckFailed(f"{name}: expected two lists.\n  {call}\n  Next: return queries, outputs.")
        lists = [side.tolist() if isinstance(side, Tensor) else side for side in actual]
        queries, outputs = triples()(Factored(A, B), Factored(C, D), source, k)
        agree(f"{name}: the queries", call, lists[0], queries)
        agree(f"{name}: the outputs", call, lists[1], outputs)
    n = 1201
    tables = [factored(fn, noise(n, 2, seed=seed), noise(2, n, seed=seed + 1)) for seed in (54, 56)]
    with Watched() as watched:
        fn(*tables, 7, 2)
    _refuse_large(name, watched, n * n // 4, f"of a {n} x {n} matrix of inner size 2")


# ------------------------------------------------------------------------------------------------------- copying


def copying(score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Fn:
    """A score of the eigenvalues: their real parts, their sizes, and the numbers themselves."""

    def answer(ov: Any) -> Tensor:
        values = torch.linalg.eigvals(ov.B @ ov.A)
        return score(values.real, values.abs(), values)

    return answer


@known_mistakes(
    {
        "the sum is divided by the sizes of the real parts; take those of the whole numbers.": copying(
            lambda real, size, values: real.sum() / real.abs().sum()
        ),
        "it is not divided by anything.": copying(lambda real, size, values: real.sum()),
        "the sum is divided by how many there are.": copying(lambda real, size, values: real.mean()),
        "it is the share of eigenvalues that are positive.": copying(
            lambda real, size, values: (real > 0).float().mean()
        ),
        "the real parts are taken by their size, so that the negative ones count as copying.": copying(
            lambda real, size, values: real.abs().sum() / size.sum()
        ),
        "the sum is divided by the singular values.": lambda ov: (
            torch.linalg.eigvals(ov.B @ ov.A).real.sum() / nuclear(ov.A @ ov.B)
        ),
        "the mean of the cosines is taken; the sums should be divided.": copying(
            lambda real, size, values: (real / size).mean()
        ),
        "the sum is turned round: -1 is where all are negative.": copying(
            lambda real, size, values: -real.sum() / size.sum()
        ),
        "the imaginary parts are counted too.": copying(
            lambda real, size, values: (real + values.imag.abs()).sum() / size.sum()
        ),
    }
)
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
        expected = (eigenvalues.real.sum() / eigenvalues.abs().sum()).float()
        matrix = factored(fn, left, right)
        with unchanged(name, A=left, B=right):
            actual = fn(matrix)
        compare(name, actual, expected, "")
    left, right = (factor.double() for factor in cases[0])
    eigenvalues = torch.linalg.eigvals(left @ right)
    expected = eigenvalues.real.sum() / eigenvalues.abs().sum()
    compare(f"{name} in float64", fn(factored(fn, left, right)), expected, "", **DOUBLE)
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


def hits(M: Tensor, own: Tensor | None = None) -> Tensor:
    """1 for each row whose largest entry is its own, on the diagonal if nothing else is said."""
    return (M.argmax(1) == (torch.arange(len(M)) if own is None else own)).double()


def share(end: Callable[[Sequence[Tensor], int], Any]) -> Fn:
    """What `end` makes of the hits, block by block, and of the number of all rows."""
    return lambda ov, rows_at_once=1024: float(end(hits(ov.A @ ov.B).split(rows_at_once), len(ov.A)))


def of_whole_blocks(blocks: Sequence[Tensor]) -> Tensor:
    return torch.cat([block for block in blocks if len(block) == len(blocks[0])])


@known_mistakes(
    {
        "it takes the largest entry of each column; take the largest of each row.": lambda ov, rows_at_once=1024: (
            hits((ov.A @ ov.B).T).mean().item()
        ),
        "only the first block is looked at.": share(lambda blocks, n: blocks[0].mean()),
        "the last, shorter block is left out.": share(lambda blocks, n: of_whole_blocks(blocks).mean()),
        "the last, shorter block is left out, but counted.": share(lambda blocks, n: of_whole_blocks(blocks).sum() / n),
        "the hits are not divided by the number of rows.": share(lambda blocks, n: torch.cat(blocks).sum()),
        "the mean of the blocks' shares is taken; the last block is shorter.": share(
            lambda blocks, n: sum(block.mean() for block in blocks) / len(blocks)
        ),
        "in each block the rows are counted from 0; a block begins at its own row.": lambda ov, rows_at_once=1024: (
            hits(ov.A @ ov.B, torch.arange(len(ov.A)) % rows_at_once).mean().item()
        ),
        "it is the share of misses.": share(lambda blocks, n: 1 - torch.cat(blocks).mean()),
        "it is given in percent.": share(lambda blocks, n: 100 * torch.cat(blocks).mean()),
    }
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
        rows = (A @ B).tolist()
        right = sum(max(row) == row[number] for number, row in enumerate(rows)) / n
        actual = actual.item() if isinstance(actual, Tensor) and actual.numel() == 1 else actual
        call = f"of a {n} x {n} matrix, with rows_at_once = {block}"
        agree(name, call, actual, right)
    n, block = 401, 16
    big = factored(fn, noise(n, 2, seed=43), noise(2, n, seed=44))
    with Watched() as watched:
        fn(big, rows_at_once=block)
    _refuse_large(name, watched, block * n, f"of a {n} x {n} matrix in blocks of {block} rows")


# ------------------------------------------------------------------------------------------------- where a head looks


def positions(
    model: Any,
    layer: int,
    head: int,
    norm: Callable[[Any, Tensor], Tensor] = lambda ln1, resid: ln1(resid),
    biases: float = 1.0,
    divisor: Callable[[TransformerConfig], float] = lambda cfg: cfg.d_head**0.5,
    hidden: int = 1,
    end: Callable[[Tensor], Tensor] = lambda scores: scores.softmax(-1),
    swapped: bool = False,
) -> Tensor:
    """Where a head looks if it sees positions only, with switches; keys from `hidden` after a query are masked."""
    block = model.blocks[layer]
    resid = norm(block.ln1, model.pos_embed.W_pos)
    attn = block.attn
    q, k = (resid @ getattr(attn, f"W_{letter}")[head] + biases * getattr(attn, f"b_{letter}")[head] for letter in "QK")
    scores = (k @ q.T if swapped else q @ k.T) / divisor(model.cfg)
    future = torch.ones_like(scores, dtype=torch.bool).triu(hidden)
    return end(scores.masked_fill(future, -torch.inf)).detach()


@known_mistakes(
    {
        "W_pos does not go through the layer's ln1.": partial(positions, norm=lambda ln1, resid: resid),
        "W_pos is normalised, but `w` and `b` of ln1 are left out.": partial(
            positions, norm=lambda ln1, resid: F.layer_norm(resid, resid.shape[-1:], eps=ln1.cfg.layer_norm_eps)
        ),
        "b_Q is left out, or all biases are.": partial(positions, biases=0.0),
        "nothing is masked: positions look into the future.": partial(positions, hidden=99),
        "the scores are not divided by sqrt(d_head).": partial(positions, divisor=lambda cfg: 1.0),
        "the scores are divided by sqrt(d_model).": partial(positions, divisor=lambda cfg: cfg.d_model**0.5),
        "queries and keys are swapped.": partial(positions, swapped=True),
        "it is transposed: rows are queries, columns keys.": partial(
            positions, end=lambda scores: scores.softmax(-1).T
        ),
        "it holds the scores; the softmax is missing.": partial(positions, end=lambda scores: scores),
        OVERFLOW: partial(positions, end=exp_over_sum),
        "it is the pattern of another head.": lambda model, layer, head: positions(
            model, layer, (head + 1) % model.cfg.n_heads
        ),
        "it is the pattern of the first head.": lambda model, layer, head: positions(model, layer, 0),
        "it is the pattern of the first layer.": lambda model, layer, head: positions(model, 0, head),
    }
)
def check_position_pattern(fn: Fn) -> None:
    """The attention that loops give, when the residual stream is W_pos alone; no normalisation; scores beyond 88.

    Where there is no W_pos, it is refused.
    """
    name = "position_pattern"
    for cfg, layer, head, scale in [(CFG, 1, 1, 1.0), (WITH_MLP, 0, 1, 1.0), (NO_NORM, 1, 0, 1.0), (CFG, 0, 1, 100.0)]:
        model = SmallModel(cfg)
        model.blocks[layer].attn.W_Q.data *= scale
        block = by_loops.part(weights_of(model), f"blocks.{layer}")
        norm, attn = by_loops.part(block, "ln1"), by_loops.part(block, "attn")
        resid = by_loops.layer_norm(norm, model.pos_embed.W_pos.detach()[None], cfg.layer_norm_eps)["output"]
        expected = by_loops.attention(attn, resid)["hook_pattern"][0, head]
        with torch.no_grad(), nothing_left_behind(name, model), during(f"for normalization {cfg.normalization!r}"):
            actual = fn(model, layer, head)
        compare(f"{name} of head {layer}.{head}", actual, expected, "query key")
    follows_input(name, lambda moved: fn(moved, 0, 1), (model,), "query key")
    must_raise(name, ValueError, "for a model with rotary positions it", lambda: fn(SmallModel(ROTARY), 0, 1))


def _sources(
    cache: ActivationCache, weights: dict[str, Tensor], cfg: TransformerConfig, layer: int
) -> tuple[list[str], list[Tensor]]:
    """What was added to the residual stream before a layer, in order."""
    labels = [label for label in ("embed", "pos_embed") if f"hook_{label}" in cache]
    vectors = [cache[f"hook_{label}"] for label in labels]
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


def terms(
    cache: ActivationCache,
    model: Any,
    layer: int,
    head: int,
    centred: bool = True,
    rms_centred: bool = False,
    scale: Callable[[Tensor, Tensor], Tensor] = lambda scale, vector: scale,
    w: bool = True,
    b: float = 1.0,
    biases: float = 1.0,
    divisor: float | None = None,
    turn: bool = True,
    end: Callable[[Tensor], Tensor] = lambda terms: terms,
) -> tuple[list[str], Tensor]:
    """The labels, and a term for each pair of sources, one pair after the other; with switches."""
    cfg, weights = model.cfg, weights_of(model)
    labels, vectors = _sources(cache, weights, cfg, layer)
    attn = by_loops.part(weights, f"blocks.{layer}.attn")
    shift = torch.zeros(cfg.d_model)
    if cfg.normalization == "LN":
        shift = b * weights[f"blocks.{layer}.ln1.b"]
    if {"LN": centred, "RMS": rms_centred}.get(cfg.normalization):
        vectors = [vector - vector.mean(-1, keepdim=True) for vector in vectors]
    if cfg.normalization != "none":
        norm = by_loops.part(weights, f"blocks.{layer}.ln1")
        whole = cache[f"blocks.{layer}.ln1.hook_scale"]
        vectors = [vector / scale(whole, vector) * (norm["w"] if w else 1) for vector in vectors]
    sides = []
    for letter in "QK":
        W, bias = attn[f"W_{letter}"][head], biases * attn[f"b_{letter}"][head]
        side = [vector @ W for vector in vectors] + [(shift @ W + bias).expand(*vectors[0].shape[:2], -1)]
        if turn and cfg.positions == "rotary":
            places = range(vectors[0].shape[1])
            side = [by_loops.rotated(x[:, :, None], places, cfg.rotary_dim, cfg.rotary_base)[:, :, 0] for x in side]
        sides.append(side)
    pairs = [torch.stack([q @ k.mT for k in sides[1]], 1) for q in sides[0]]
    return [*labels, "constant"], end(torch.stack(pairs, 1) / (divisor or cfg.d_head**0.5))


def swapped_sides(split: Tensor) -> Tensor:
    """What comes of queries made with W_K and keys made with W_Q."""
    return split.transpose(1, 2).transpose(3, 4)


@known_mistakes(
    {
        "the sources are not divided by the scale of ln1.": partial(
            terms, scale=lambda scale, vector: torch.ones_like(scale)
        ),
        "each source is divided by a scale of its own; use the scale of their sum.": partial(
            terms, scale=lambda scale, vector: (vector.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        ),
        "the sources are not centred: LayerNorm subtracts the mean.": partial(terms, centred=False),
        "the sources are centred where normalization is 'RMS'; an RMSNorm subtracts no mean.": partial(
            terms, rms_centred=True
        ),
        "`ln1.w` is left out.": partial(terms, w=False),
        "`ln1.b` is left out; it belongs to the constant source.": partial(terms, b=0.0),
        "b_Q and b_K are left out; they belong to the constant source.": partial(terms, biases=0.0),
        "the terms are not divided by sqrt(d_head).": partial(terms, divisor=1.0),
        "with rotary positions, queries and keys are not turned.": partial(terms, turn=False),
        "W_Q and W_K are swapped.": partial(terms, end=swapped_sides),
        "the two axes of sources are swapped: the query's comes first.": partial(
            terms, end=lambda terms: terms.transpose(1, 2)
        ),
        "queries and keys are transposed.": partial(terms, end=lambda terms: terms.mT),
        "it is another head.": lambda cache, model, layer, head: terms(
            cache, model, layer, (head + 1) % model.cfg.n_heads
        ),
        "the keys in the future are masked; leave them in.": partial(
            terms,
            end=lambda terms: terms.masked_fill(torch.ones(terms.shape[-2:], dtype=torch.bool).triu(1), -torch.inf),
        ),
    }
)
def check_decompose_qk(fn: Fn) -> None:
    """Pair by pair, with the labels; with MLPs, without normalisation, turned, and in the first layer."""
    name = "decompose_qk"
    axes = "batch query_source key_source query key"
    for cfg, layer, head, n_batch, n_pos in [
        (CFG, 1, 2, 2, 5),
        (WITH_MLP, 1, 1, 1, 4),
        (NO_NORM, 1, 0, 2, 3),
        (RMS, 1, 0, 2, 3),
        (ROTARY, 1, 1, 1, 4),
        (CFG, 0, 1, 2, 5),
    ]:
        model, tokens = SmallModel(cfg), some_tokens(cfg, n_batch, n_pos, seed=7)
        with torch.no_grad():
            _, cache = run_with_cache(model, tokens, names="*")
            expected_labels, expected = terms(cache, model, layer, head)
            with nothing_left_behind(name, model), during(f"for layer {layer}"):
                answer = fn(cache, model, layer, head)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise CheckFailed(f"{name}: expected a pair, (labels, terms).\n  Next: see the docstring.")
        agree(name, f"the labels, for layer {layer}", list(answer[0]), expected_labels)
        compare(f"{name} of head {layer}.{head}", answer[1], expected, axes)
    # that the oracle's terms sum to the scores which the model had is tested in the suite
