# ruff: noqa: N802 (check_FactoredMatrix is named after its exercise; T is what torch calls it)
"""Checks of chapter 04, reading weights: matrices of low rank, the circuits of heads, and what composes with what.

Oracles form the whole matrix, which at these sizes costs nothing, or visit every token, source or pair of heads.
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
from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.leftovers import nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise, weights_of, with_methods
from course_utils.checks.outcomes import CheckFailed, Evidence
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
KINDS = ("Q", "K", "V")


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


def _frobenius(M: Tensor) -> Tensor:
    return M.square().sum((-2, -1)).sqrt()


def _spectral(M: Tensor) -> Tensor:
    return torch.linalg.svdvals(M)[..., 0]


def _nuclear(M: Tensor) -> Tensor:
    return torch.linalg.svdvals(M).sum(-1)


def _absolute(M: Tensor) -> Tensor:
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
            _spectral
        ),
        "it is the nuclear norm, the sum of the singular values.": with_norm(_nuclear),
        "the root is left out.": with_norm(lambda M: M.square().sum((-2, -1))),
        "it is the sum of the absolute values.": with_norm(_absolute),
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
            compare(f"{case}: norm()", one.norm(), _frobenius(M), batch)
    _eigenvalues(name, cls)
    must_raise(name, ValueError, "eigenvalues() of a 5 x 7 matrix", lambda: cls(A, B).eigenvalues())
    must_raise(name, ValueError, "eigenvalues() of a 7 x 5 matrix", lambda: cls(B.mT, A.mT).eigenvalues())
    wide = cls(noise(2, 5, seed=5), noise(5, 4, seed=6))  # more inner than outer
    _decomposition(f"{name} whose inner size is the largest", wide, wide.A @ wide.B, "")
    follows_input(name, lambda A, B: cls(A, B).norm(), (noise(5, 3), noise(3, 7)), "")
    _never_formed(name, cls)


def _products(case: str, cls: Any, one: Any, M: Tensor, C: Tensor, D: Tensor, batch: str) -> None:
    def whole(what: str, result: Any, expected: Tensor, axes: str) -> None:
        product = dense(f"{case}: {what}", result, 4 if "factored" in what else 3)
        compare(f"{case}: {what}, multiplied out", product, expected, batch + axes)

    whole("T", one.T, M.mT, "columns rows")
    whole("this @ tensor", one @ C, M @ C, "rows other")
    whole("this @ factored", one @ cls(C, D), M @ (C @ D), "rows other")
    E = noise(6, 5, seed=8)
    whole("tensor @ this", E @ one, E @ M, "other columns")


def _decomposition(case: str, one: Any, M: Tensor, batch: str) -> None:
    answer = one.svd()
    if not isinstance(answer, tuple) or len(answer) != 3:
        raise CheckFailed(f"{case}: svd() should return three tensors, U, S and Vh.\n  Next: see the docstring.")
    U, S, Vh = answer
    rank = min(*M.shape[-2:], one.A.shape[-1])
    compare(f"{case}: the singular values", S, torch.linalg.svdvals(M)[..., :rank], f"{batch}rank")
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


def _check_circuit(name: str, fn: Fn, axes: str, right: Callable[..., Tensor]) -> None:
    """For some heads of a model: the whole matrix, as factors that are thin."""
    model = SmallModel(CFG)
    for layer, head in [(0, 1), (1, 2), (1, 0)]:
        expected = right(_parts(model, layer, head))
        with torch.no_grad():
            product = dense(name, fn(model, layer, head), CFG.d_model)
        compare(f"{name} of head {layer}.{head}, multiplied out", product, expected, axes)
    result = fn(SmallModel(CFG).double(), 1, 2)
    if result.A.dtype != torch.float64 or result.B.dtype != torch.float64:
        raise CheckFailed(f"{name} in float64: it is of another dtype.\n  Next: the dtype should follow the model's.")


def _parts(model: Any, layer: int, head: int) -> SimpleNamespace:
    """The weights that a circuit may use, by their letters; `w` is that of the layer's ln1."""
    weights = weights_of(model)
    block = by_loops.part(weights, f"blocks.{layer}")
    own = {letter: block[f"attn.W_{letter}"][head] for letter in "QKVO"}
    ends = {"E": weights["embed.W_E"], "U": weights["unembed.W_U"], "b_U": weights["unembed.b_U"]}
    return SimpleNamespace(**own, **ends, w=block.get("ln1.w"))


def circuit(factors: Callable[[Any], tuple[Tensor, Tensor]], of: Callable[[int, int], tuple[int, int]]) -> Fn:
    """The circuit with these factors, made of the weights of head `of(layer, head)`."""
    return lambda model, layer, head: Factored(*factors(_parts(model, *of(layer, head))))


def circuit_mistakes(
    right: Callable[[Any], tuple[Tensor, Tensor]], wrong: dict[str, Callable[[Any], tuple[Tensor, Tensor]]]
) -> dict[str, Fn]:
    """Wrong factors, and the right ones of other heads."""
    others: dict[str, Callable[[int, int], tuple[int, int]]] = {
        "it is the next head.": lambda layer, head: (layer, (head + 1) % CFG.n_heads),
        "it is head 0, whichever is asked for.": lambda layer, head: (layer, 0),
        "it is a head of the next layer.": lambda layer, head: ((layer + 1) % CFG.n_layers, head),
        "it is a head of layer 0, whichever is asked for.": lambda layer, head: (0, head),
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
            torch.linalg.eigvals(ov.B @ ov.A).real.sum() / _nuclear(ov.A @ ov.B)
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
        "the largest entry of each column is looked for; take that of each row.": lambda ov, rows_at_once=1024: (
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
        "it is the pattern of another head.": lambda model, layer, head: positions(
            model, layer, (head + 1) % model.cfg.n_heads
        ),
        "it is the pattern of the first head.": lambda model, layer, head: positions(model, layer, 0),
        "it is the pattern of the first layer.": lambda model, layer, head: positions(model, 0, head),
    }
)
def check_position_pattern(fn: Fn) -> None:
    """The attention that loops give, when the residual stream is W_pos alone; a model without normalisation, too."""
    name = "position_pattern"
    for cfg, layer, head in [(CFG, 1, 1), (WITH_MLP, 0, 1), (NO_NORM, 1, 0)]:
        model = SmallModel(cfg)
        block = by_loops.part(weights_of(model), f"blocks.{layer}")
        norm, attn = by_loops.part(block, "ln1"), by_loops.part(block, "attn")
        resid = by_loops.layer_norm(norm, model.pos_embed.W_pos.detach()[None], cfg.layer_norm_eps)["output"]
        expected = by_loops.attention(attn, resid)["hook_pattern"][0, head]
        with torch.no_grad(), nothing_left_behind(name, model), during(f"for normalization {cfg.normalization!r}"):
            actual = fn(model, layer, head)
        compare(f"{name} of head {layer}.{head}", actual, expected, "query key")
    follows_input(name, lambda moved: fn(moved, 0, 1), (model,), "query key")


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


def terms(
    cache: ActivationCache,
    model: Any,
    layer: int,
    head: int,
    centred: bool = True,
    scale: Callable[[Tensor, Tensor], Tensor] = lambda scale, vector: scale,
    w: bool = True,
    b: float = 1.0,
    biases: float = 1.0,
    divisor: float | None = None,
    end: Callable[[Tensor], Tensor] = lambda terms: terms,
) -> tuple[list[str], Tensor]:
    """The labels, and a term for each pair of sources, one pair after the other; with switches."""
    cfg, weights = model.cfg, weights_of(model)
    labels, vectors = _sources(cache, weights, cfg, layer)
    attn = by_loops.part(weights, f"blocks.{layer}.attn")
    shift = torch.zeros(cfg.d_model)
    if cfg.normalization == "LN":
        norm = by_loops.part(weights, f"blocks.{layer}.ln1")
        shift = b * norm["b"]
        vectors = [vector - vector.mean(-1, keepdim=True) if centred else vector for vector in vectors]
        whole = cache[f"blocks.{layer}.ln1.hook_scale"]
        vectors = [vector / scale(whole, vector) * (norm["w"] if w else 1) for vector in vectors]
    sides = []
    for letter in "QK":
        W, bias = attn[f"W_{letter}"][head], biases * attn[f"b_{letter}"][head]
        sides.append([vector @ W for vector in vectors] + [(shift @ W + bias).expand(*vectors[0].shape[:2], -1)])
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
        "each source is divided by a scale of its own; the scale is that of their sum.": partial(
            terms, scale=lambda scale, vector: (vector.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        ),
        "the sources are not centred: LayerNorm subtracts the mean.": partial(terms, centred=False),
        "`ln1.w` is left out.": partial(terms, w=False),
        "`ln1.b` is left out; it belongs to the constant source.": partial(terms, b=0.0),
        "b_Q and b_K are left out; they belong to the constant source.": partial(terms, biases=0.0),
        "the terms are not divided by sqrt(d_head).": partial(terms, divisor=1.0),
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


# -------------------------------------------------------------------------------------------------------- composition


def composed(
    W_A: Tensor,
    W_B: Tensor,
    norm: Callable[[Tensor], Tensor] = _frobenius,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
    end: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda both, A, B: both / (A * B),
) -> Tensor:
    """The score with another norm, product or division."""
    return end(norm(product(W_A, W_B)), norm(W_A), norm(W_B))


def if_square(product: Callable[[Tensor, Tensor], Tensor]) -> Fn:
    """A product that has a shape only where the matrices are square."""
    return partial(composed, product=lambda W_A, W_B: (product if W_A.shape == W_B.shape else torch.matmul)(W_A, W_B))


@known_mistakes(
    {
        "the norms are spectral ones, the largest singular values; take the Frobenius norm.": partial(
            composed, norm=_spectral
        ),
        "the norms are nuclear ones, sums of singular values; take the Frobenius norm.": partial(
            composed, norm=_nuclear
        ),
        "it is not divided by the norms of W_A and W_B.": partial(composed, end=lambda both, A, B: both),
        "it is divided by one of the two norms only.": partial(composed, end=lambda both, A, B: both / A),
        "it is divided by the sum of the norms; take their product.": partial(
            composed, end=lambda both, A, B: both / (A + B)
        ),
        "the norms are squared.": partial(composed, end=lambda both, A, B: (both / (A * B)).square()),
        "the sum is that of the absolute values.": partial(composed, norm=_absolute),
        "the order is turned round: W_A comes first, then W_B.": if_square(lambda W_A, W_B: W_B @ W_A),
        "W_B is transposed.": if_square(lambda W_A, W_B: W_A @ W_B.mT),
        "W_A is transposed.": if_square(lambda W_A, W_B: W_A.mT @ W_B),
        "the matrices are multiplied entry by entry.": if_square(torch.mul),
    }
)
def check_composition_score(fn: Fn) -> None:
    """Tensors, square ones too, where order and transposes can be mixed up; then factored ones, and a batch."""
    name = "composition_score"
    for W_A, W_B in [
        (noise(5, 7, seed=51), noise(7, 6, seed=52)),
        (noise(6, 6, seed=53), noise(6, 6, seed=54)),
        (noise(2, 5, 7, seed=55), noise(2, 7, 4, seed=56)),
    ]:
        axes = "batch" if W_A.dim() == 3 else ""
        compare(f"{name} of a batch" if axes else name, fn(W_A, W_B), composed(W_A, W_B), axes)
    factors = [noise(5, 2, seed=57), noise(2, 7, seed=58), noise(7, 3, seed=59), noise(3, 6, seed=60)]
    first, second = factored(fn, *factors[:2]), factored(fn, *factors[2:])
    with during("with factored matrices"):
        actual = fn(first, second)
    expected = composed(factors[0] @ factors[1], factors[2] @ factors[3])
    compare(f"{name} of factored matrices", actual, expected, "")
    follows_input(name, fn, (noise(5, 7), noise(7, 6)), "")


def _reads(model: Any, kind: str, layer: int, head: int, transposed: bool = False) -> Tensor:
    """What a head does with what it reads, as one matrix."""
    p = _parts(model, layer, head)
    W = {"Q": p.Q @ p.K.T, "K": p.K @ p.Q.T, "V": p.V @ p.O}[kind]
    return W.T if transposed else W


def all_pairs(
    model: Any,
    kind: str,
    which: Callable[[int, int], bool] = int.__lt__,
    transposed: str = "",
    score: Callable[[Tensor, Tensor], Tensor] = composed,
    end: Callable[[Tensor], Tensor] = lambda table: table,
) -> Tensor:
    """One pair of heads after another, of the layers `which` go together; what `transposed` kinds read is that."""
    heads = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    writes = {at: _reads(model, "V", *at) for at in heads}
    reads = {at: _reads(model, kind, *at, kind in transposed.split()) for at in heads}
    table = torch.zeros((model.cfg.n_layers, model.cfg.n_heads) * 2)
    for first in heads:
        for second in heads:
            if which(first[0], second[0]):
                table[(*first, *second)] = score(writes[first], reads[second])
    return end(table)


def another_kind(asked: str, got: str) -> Fn:
    return lambda model, kind: all_pairs(model, got if kind == asked else kind)


@known_mistakes(
    {
        f'it is {got}-composition; "{asked}" was asked for.': another_kind(asked, got)
        for asked in KINDS
        for got in KINDS
        if asked != got
    },
    {
        "what the later head reads is transposed.": partial(all_pairs, transposed="V"),  # so Q and K are each other
        "the order is turned round: the earlier head writes first.": partial(
            all_pairs, score=partial(composed, product=lambda W_A, W_B: W_B @ W_A)
        ),
        "the earlier and the later head are swapped.": partial(all_pairs, end=lambda table: table.permute(2, 3, 0, 1)),
        "the norms are spectral ones; take the Frobenius norm.": partial(
            all_pairs, score=partial(composed, norm=_spectral)
        ),
        "every pair has a score; those in which the second head is not in a later layer should be 0.": partial(
            all_pairs, which=lambda layer, later: True
        ),
        "heads of one layer are paired; neither reads what the other writes.": partial(all_pairs, which=int.__le__),
        "only neighbouring layers are paired.": partial(all_pairs, which=lambda layer, later: later == layer + 1),
        "only what the first layer writes is looked at.": partial(
            all_pairs, which=lambda layer, later: layer == 0 < later
        ),
        "heads are mixed up: the two axes of heads are swapped.": partial(
            all_pairs, end=lambda table: table.transpose(1, 3)
        ),
    },
)
def check_composition_scores(fn: Fn) -> None:
    """All pairs, one by one, in models of three layers and of two; then how many operations a larger one takes."""
    name = "composition_scores"
    axes = "layer head later_layer later_head"
    for cfg in (WITH_MLP, CFG):
        model = SmallModel(cfg)
        for kind in KINDS:
            with torch.no_grad():
                actual = fn(model, kind)
            compare(f'{name} for "{kind}"', actual, all_pairs(model, kind), axes)
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


def baseline(
    model: Any,
    kind: str,
    n: int,
    generator: torch.Generator,
    pair: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda W_A, R, W_B: (W_A @ R, W_B),
    layers: tuple[int, int] = (0, 1),
    end: Callable[[Tensor], Tensor] = lambda scores: scores,
    score: Callable[[Tensor, Tensor], Tensor] = composed,
) -> Tensor:
    """Scores of what `pair` makes of two heads and of noise, for models of two layers."""
    scores = []
    for _ in range(n):
        heads = torch.randint(model.cfg.n_heads, (2,), generator=generator).tolist()
        W_A, W_B = (_reads(model, read, *at) for read, *at in zip(("V", kind), layers, heads, strict=True))
        rotation = torch.linalg.qr(torch.randn(len(W_B), len(W_B), generator=generator)).Q
        scores.append(score(*pair(W_A, rotation, W_B)))
    return end(torch.stack(scores))


@known_mistakes(
    {
        "their mean is returned; return all `n` of them.": partial(baseline, end=lambda scores: scores.mean()),
        "nothing rotates the residual stream between what is written and what is read.": partial(
            baseline, pair=lambda W_A, R, W_B: (W_A, W_B)
        ),
        "one score is drawn, and repeated.": partial(baseline, end=lambda scores: scores[:1].expand(len(scores))),
    }
)
def check_random_composition_baseline(fn: Fn) -> None:
    """Its size and its spread, which rotations decide; and where the random numbers come from."""
    name = "random_composition_baseline"
    model = SmallModel(CFG)
    with torch.no_grad():  # QK nearly of rank one, OV with equal singular values: their scores spread differently
        for block in model.blocks:
            block.attn.W_Q[:, :, 1:] *= 0.02
            block.attn.W_O.copy_(torch.linalg.qr(block.attn.W_O.mT).Q.mT)
            block.attn.W_V.copy_(block.attn.W_O.mT)

    def draw(kind: str, n: int, seed: int) -> Any:
        with torch.no_grad():
            return fn(model, kind, n, torch.Generator().manual_seed(seed))

    before = torch.random.get_rng_state()
    first, again, other = draw("Q", 5, 1), draw("Q", 5, 1), draw("Q", 5, 2)
    if not isinstance(first, Tensor) or tuple(first.shape) != (5,):
        got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise CheckFailed(
            f"{name}: expected a Tensor of n = 5 scores, got {got}.",
            evidence=Evidence("the shape", got),
            advice="  Next: return all of them.",
        )
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
    _refuse_own_pairs(name, first, model, "Q")
    if len(first.unique()) < 5:
        raise CheckFailed(
            f"{name}: some of the 5 scores are the same.",
            evidence=Evidence("how many are different", len(first.unique())),
            advice="  Next: draw a new rotation for each.",
        )
    for kind in KINDS:
        _check_spread(name, draw(kind, 100, 3), model, kind)
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


def _refuse_own_pairs(name: str, scores: Tensor, model: SmallModel, kind: str) -> None:
    """Without a rotation only the model's own scores come out, again and again."""
    table = all_pairs(model, kind)[0, :, 1].flatten()
    if (scores[:, None] - table).abs().amin(1).max() < 1e-4:
        raise CheckFailed(
            f'{name} for "{kind}": these are the scores of the model\'s own pairs.',
            evidence=Evidence(f'for "{kind}"', "own pairs"),
            advice="  Next: rotate the residual stream between what is written and what is read.",
        )


def _check_spread(name: str, scores: Tensor, model: SmallModel, kind: str) -> None:
    """The mean square of the score is 1 / d_model, exactly; the spread depends on the heads' singular values."""
    _refuse_own_pairs(name, scores, model, kind)
    d_model = CFG.d_model
    mean_square = scores.square().mean().item()
    rng = torch.Generator().manual_seed(9)
    rotations = torch.linalg.qr(torch.randn(300, d_model, d_model, generator=rng)).Q
    heads, later_heads = torch.randint(3, (2, 300), generator=rng)
    W_A = torch.stack([_reads(model, "V", 0, head) for head in range(3)])[heads]
    W_B = torch.stack([_reads(model, kind, 1, head) for head in range(3)])[later_heads]
    expected = composed(W_A @ rotations, W_B)
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
