# ruff: noqa: E741 (O stands for W_O)
"""Chapter 04, reading weights: its checks against mistakes that learners make, and other right answers."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import other_weights as other
import pytest
import torch
from mistakes import Mistake, assert_known_and_unknown, assert_quick, assert_refused
from mutation import survivors

import solutions.ch04_induction as ref
from course_utils.checks import by_loops, find_checks, run_check
from course_utils.checks import ch04_5_weights as module_of_checks
from course_utils.checks.ch04_4_causes import some_tokens
from course_utils.checks.ch04_5_weights import CFG, NO_NORM, WITH_MLP
from course_utils.checks.modules import weights_of
from course_utils.checks.small_model import SmallModel
from course_utils.checks.transformer_interface import transformer_hooks, transformer_parameters
from course_utils.hooks import hook_points, run_with_cache
from solutions.ch04_induction import FactoredMatrix

CHECKS = {name: check for name, check in find_checks()["04"].items() if check.__module__ == module_of_checks.__name__}
MISTAKES: list[Mistake] = []


def mistake(exercise: str, words: str, answer: Any, surprise: bool = False) -> None:
    MISTAKES.append(Mistake(exercise, words, answer, surprise))


# ----------------------------------------------------------------------------------------------------- FactoredMatrix


def matrix(words: str, surprise: bool = True, **methods: Any) -> None:
    """A FactoredMatrix with some methods written otherwise."""
    mistake("FactoredMatrix", words, type("FactoredMatrix", (FactoredMatrix,), methods), surprise)


def whole(M: Any) -> torch.Tensor:
    return M.A @ M.B


matrix("spectral norm", surprise=False, norm=lambda self: torch.linalg.matrix_norm(whole(self), 2))
matrix("nuclear norm", surprise=False, norm=lambda self: self.svd()[1].sum(-1))
matrix("the root is left out", surprise=False, norm=lambda self: FactoredMatrix.norm(self).square())
matrix("of the absolute values", surprise=False, norm=lambda self: whole(self).abs().sum((-2, -1)))
matrix("norm(): wrong shape", norm=lambda self: whole(self).norm())
matrix("norm() of a 2001 x 2001 matrix", norm=lambda self: torch.linalg.matrix_norm(whole(self)))
matrix("values is wrong", norm=lambda self: torch.linalg.matrix_norm(self.A) * torch.linalg.matrix_norm(self.B))
matrix("expected only the inner size, 3", eigenvalues=lambda self: square(self, torch.linalg.eigvals(whole(self))))
matrix(
    "eigenvalues() are of dtype float32",
    eigenvalues=lambda self: square(self, torch.linalg.eigvalsh(self.B @ self.A)),
)
matrix(
    "eigenvalues(): 3 of 6 values are wrong",
    eigenvalues=lambda self: square(self, torch.linalg.eigvals(self.A.mT @ self.A)),
)
matrix("should raise ValueError", eigenvalues=lambda self: torch.linalg.eigvals(self.B @ self.A))
matrix(
    "this @ vector should raise ValueError",
    __matmul__=lambda self, other: (
        FactoredMatrix(self.A, self.B @ other)
        if isinstance(other, torch.Tensor)
        else FactoredMatrix.__matmul__(self, other)
    ),
)
matrix("vector @ this should raise ValueError", __rmatmul__=lambda self, other: FactoredMatrix(other @ self.A, self.B))
matrix("T, multiplied out", T=property(lambda self: FactoredMatrix(self.B.mT, self.A.mT * 2)))
matrix("T: expected a FactoredMatrix, got a Tensor", T=property(lambda self: whole(self).mT))
matrix(
    "this @ tensor: expected a FactoredMatrix, got a Tensor",
    __matmul__=lambda self, X: whole(self) @ X if isinstance(X, torch.Tensor) else self,
)
matrix(
    "this @ factored, multiplied out",
    __matmul__=lambda self, X: type(self)(
        self.A, self.B @ (X if isinstance(X, torch.Tensor) else X.A @ X.A.mT @ X.A @ X.B)
    ),
)
matrix("the last factor is lost", False, __matmul__=lambda self, X: type(self)(self.A, self.B @ getattr(X, "A", X)))
matrix("tensor @ this", __rmatmul__=lambda self, X: type(self)(X @ self.A, 2 * self.B))
matrix("the singular values: wrong shape", svd=lambda self: torch.linalg.svd(whole(self), full_matrices=False))
matrix("they are those of A alone", False, svd=lambda self: torch.linalg.svd(self.A, full_matrices=False))


def squared(self: Any) -> Any:
    U, S, Vh = FactoredMatrix.svd(self)
    return U, S.square(), Vh


def untransposed(self: Any) -> Any:
    U, S, Vh = FactoredMatrix.svd(self)
    return U, S, Vh.mT


def ascending(self: Any) -> Any:
    U, S, Vh = FactoredMatrix.svd(self)
    return U.flip(-1), S.flip(-1), Vh.flip(-2)


def not_orthonormal(self: Any) -> Any:
    U, S, Vh = FactoredMatrix.svd(self)
    return U * 2, S, Vh / 2


def square(self: Any, values: Any) -> Any:
    if self.shape[-1] != self.shape[-2]:
        raise ValueError("not square")
    return values


matrix("they are squared", False, svd=squared)
matrix("in ascending order", False, svd=ascending)
matrix("is it V, not transposed?", svd=untransposed)
matrix("U transposed times U", svd=not_orthonormal)


def formed_svd(self: Any) -> Any:
    U, S, Vh = torch.linalg.svd(whole(self), full_matrices=False)
    rank = min(self.A.shape[-1], *self.shape[-2:])
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :]


# --------------------------------------------------------------------------------------------------------- circuits


def parts(model: Any, layer: int, head: int) -> tuple[Any, ...]:
    attn = model.blocks[layer].attn
    return model.embed.W_E, model.unembed.W_U, attn.W_Q[head], attn.W_K[head], attn.W_V[head], attn.W_O[head]


def circuit(exercise: str, words: str, factors: Callable[..., Any], surprise: bool = False) -> None:
    """`factors(W_E, W_U, W_Q, W_K, W_V, W_O)` are the two of a FactoredMatrix."""
    mistake(exercise, words, lambda model, layer, head: FactoredMatrix(*factors(*parts(model, layer, head))), surprise)


circuit("ov_circuit", "it is transposed", lambda E, U, Q, K, V, O: ((O @ U).T, (E @ V).T))
circuit("ov_circuit", "W_V and W_O are swapped", lambda E, U, Q, K, V, O: (E @ O.T, V.T @ U))
circuit("ov_circuit", "it ends in the embeddings", lambda E, U, Q, K, V, O: (E @ V, O @ E.T))
circuit("ov_circuit", "it begins with W_U", lambda E, U, Q, K, V, O: (U.T @ V, O @ U))
circuit("ov_circuit", "it is the QK circuit", lambda E, U, Q, K, V, O: (E @ Q, K.T @ E.T))
circuit("ov_circuit", "W_K is used instead of W_V", lambda E, U, Q, K, V, O: (E @ K, O @ U))
circuit(
    "ov_circuit",
    "the inner size need not be more than 7",
    lambda E, U, Q, K, V, O: (E @ V @ O @ U, torch.eye(13)),
    True,
)
circuit(
    "ov_circuit",
    "values are wrong",  # right in a corner only
    lambda E, U, Q, K, V, O: (E @ V * (torch.arange(13) < 5)[:, None], O @ U),
    True,
)
circuit("ov_circuit", "values are wrong", lambda E, U, Q, K, V, O: (E @ V, O @ U - (O @ U).mean(1, keepdim=True)), True)
mistake("ov_circuit", "got a Tensor", lambda model, layer, head: whole(ref.ov_circuit(model, layer, head)), True)
mistake("ov_circuit", "instead of layer", lambda model, layer, head: ref.ov_circuit(model, layer, (head + 1) % 3))
mistake("ov_circuit", "instead of layer", lambda model, layer, head: ref.ov_circuit(model, 1 - layer, head))


@lambda answer: mistake("ov_circuit", "ln1.w is multiplied in", answer)
def _(model: Any, layer: int, head: int) -> Any:
    E, U, _, _, V, O = parts(model, layer, head)
    return FactoredMatrix((E * model.blocks[layer].ln1.w) @ V, O @ U)


circuit("qk_circuit", "it is transposed", lambda E, U, Q, K, V, O: (E @ K, Q.T @ E.T))
circuit("qk_circuit", "it is divided by sqrt(d_head)", lambda E, U, Q, K, V, O: (E @ Q / 2, K.T @ E.T))
circuit("qk_circuit", "the keys come through W_U", lambda E, U, Q, K, V, O: (E @ Q, K.T @ U))
circuit("qk_circuit", "it is the OV circuit", lambda E, U, Q, K, V, O: (E @ V, O @ U))
circuit("qk_circuit", "W_Q is used for the keys too", lambda E, U, Q, K, V, O: (E @ Q, Q.T @ E.T))
circuit("qk_circuit", "W_K is used for the queries too", lambda E, U, Q, K, V, O: (E @ K, K.T @ E.T))
circuit(
    "qk_circuit",
    "All of the wrong values are at query_token=12",
    lambda E, U, Q, K, V, O: (torch.cat([E[:-1] @ Q, E[:1] @ Q]), K.T @ E.T),
    True,
)
circuit("qk_circuit", "Every value is 0.25 times", lambda E, U, Q, K, V, O: (E @ Q / 4, K.T @ E.T), True)
mistake("qk_circuit", "instead of layer", lambda model, layer, head: ref.qk_circuit(model, 0, head))


# ------------------------------------------------------------------------------------------------------------ copying


def copying(words: str, score: Callable[..., Any], surprise: bool = False) -> None:
    mistake("copying_score", words, lambda ov: score(ov.eigenvalues(), ov), surprise)


copying("divided by the sizes of the real parts", lambda e, ov: e.real.sum() / e.real.abs().sum())
copying("it is not divided by anything", lambda e, ov: e.real.sum())
copying("divided by how many there are", lambda e, ov: e.real.mean())
copying("the share of eigenvalues that are positive", lambda e, ov: (e.real > 0).float().mean())
copying("taken by their size", lambda e, ov: e.real.abs().sum() / e.abs().sum())
copying("divided by the singular values", lambda e, ov: e.real.sum() / ov.svd()[1].sum())
copying("the mean of the cosines", lambda e, ov: (e.real / e.abs()).mean())
copying("turned round", lambda e, ov: -e.real.sum() / e.abs().sum())
copying("made a tensor of", lambda e, ov: torch.linalg.eigvals(ov.A @ ov.B).real.sum() / e.abs().sum(), True)
copying("expected dtype float32", lambda e, ov: e.sum() / e.abs().sum(), True)
copying("is wrong", lambda e, ov: e.real.sum() / e.abs().square().sum().sqrt(), True)
copying("is wrong", lambda e, ov: e.real.sum() / e.abs().max(), True)


def top1(words: str, surprise: bool = False, **wrong: Any) -> None:
    """top1_accuracy with switches for what people get wrong."""

    def top1_accuracy(ov: Any, rows_at_once: int = 1024) -> Any:
        n, shares, hits = ov.shape[0], [], 0
        for start in range(
            0, n - n % rows_at_once if wrong.get("drops_last") and rows_at_once < n else n, rows_at_once
        ):
            block = ov.A[start : start + rows_at_once] @ ov.B
            best = block.argmax(1)
            own = torch.arange(len(block)) + (0 if wrong.get("from_zero") else start)
            shares.append((best == own).float().mean().item())
            hits += int((best == own).sum())
            if wrong.get("first"):
                break
        if wrong.get("first"):
            return shares[0]
        return sum(shares) / len(shares) if wrong.get("mean_of_means") else wrong.get("scale", 1 / n) * hits

    mistake("top1_accuracy", words, top1_accuracy, surprise)


top1("the mean of the blocks' shares", mean_of_means=True)
top1("rows are counted from 0", from_zero=True)
top1("only the first block is looked at", first=True)
top1("shorter block is left out, but counted", drops_last=True)
top1("not divided by the number of rows", scale=1.0)
mistake(
    "top1_accuracy",
    "largest entry of each column",
    lambda ov, rows_at_once=1024: (whole(ov).argmax(0) == torch.arange(ov.shape[0])).float().mean().item(),
)
mistake(
    "top1_accuracy",
    "in blocks of 16 rows: it made a tensor of",
    lambda ov, rows_at_once=1024: (whole(ov).argmax(1) == torch.arange(ov.shape[0])).double().mean().item(),
    True,
)
mistake(
    "top1_accuracy", "wrong answer", lambda ov, rows_at_once=1024: ref.top1_accuracy(ov.T, rows_at_once) + 0.001, True
)


# ------------------------------------------------------------------------------------------------- where a head looks


def positions(words: str, surprise: bool = False, **wrong: Any) -> None:
    """position_pattern with switches for what people get wrong."""

    def position_pattern(model: Any, layer: int, head: int) -> Any:
        block = model.blocks[0 if wrong.get("first_layer") else layer]
        head = (head + wrong.get("shift", 0)) % model.cfg.n_heads
        resid = model.pos_embed.W_pos
        if wrong.get("plus_token"):
            resid = resid + model.embed.W_E[0]
        resid = wrong.get("norm", lambda block, x: block.ln1(x))(block, resid)
        biases = wrong.get("biases", 1)
        q = resid @ block.attn.W_Q[head] + biases * block.attn.b_Q[head]
        k = resid @ block.attn.W_K[head] + biases * block.attn.b_K[head]
        if wrong.get("swapped"):
            q, k = k, q
        scores = q @ k.T / wrong.get("divisor", model.cfg.d_head**0.5)
        n = len(scores)
        if wrong.get("masked", True):
            scores = scores.masked_fill(torch.ones(n, n).triu(wrong.get("diagonal", 1)).bool(), -torch.inf)
        return wrong.get("end", lambda scores: scores.softmax(-1))(scores)

    mistake("position_pattern", words, position_pattern, surprise)


positions("W_pos does not go through the layer's ln1", norm=lambda block, x: x)
positions(
    "`w` and `b` of ln1 are left out",
    norm=lambda block, x: torch.nn.functional.layer_norm(x, x.shape[-1:]) if hasattr(block.ln1, "w") else x,
)
positions("b_Q is left out", biases=0)
positions("nothing is masked", masked=False)
positions("not divided by sqrt(d_head)", divisor=1.0)
positions("queries and keys are swapped", swapped=True)
positions("it is transposed", end=lambda scores: scores.softmax(-1).T)
positions("the softmax is missing", end=lambda scores: scores)
positions("the pattern of another head", shift=1)
positions("the pattern of the first layer", first_layer=True)
positions("got nan", surprise=True, diagonal=0)
positions("values are wrong", surprise=True, plus_token=True)
positions("values are wrong", surprise=True, norm=lambda block, x: torch.nn.functional.normalize(x, dim=-1))
positions("expected (query=9, key=9)", surprise=True, end=lambda scores: scores.softmax(-1)[None])


def terms(words: str, surprise: bool = False, **wrong: Any) -> None:
    """decompose_qk with switches for what people get wrong."""

    def decompose_qk(cache: Any, model: Any, layer: int, head: int) -> Any:
        labels, right = ref.decompose_qk(cache, model, layer, head)
        block, attn = model.blocks[layer], model.blocks[layer].attn
        head = (head + wrong.get("shift", 0)) % model.cfg.n_heads
        vectors = [cache["embed"], cache["pos_embed"]]
        for earlier in range(layer):
            vectors += cache["result", earlier].unbind(2)
            vectors.append(model.blocks[earlier].attn.b_O.expand_as(vectors[0]) * wrong.get("b_O", 1))
            if not model.cfg.attn_only:
                vectors.append(cache["mlp_out", earlier])
        x, shift = torch.stack(vectors), torch.zeros(model.cfg.d_model)
        if model.cfg.normalization == "LN":
            mean = x.mean(-1, keepdim=True) * wrong.get("centred", 1)
            scale = cache["ln1.scale", layer] if wrong.get("scaled", True) else 1.0
            scale = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() if wrong.get("own_scale") else scale
            x = (x - mean) / scale * (block.ln1.w if wrong.get("w", True) else 1)
            shift = block.ln1.b * wrong.get("b", 1)
        sides = []
        for W, b in ((attn.W_Q[head], attn.b_Q[head]), (attn.W_K[head], attn.b_K[head])):
            constant = (shift @ W + b * wrong.get("biases", 1)).expand_as((x @ W)[:1])
            sides.append(torch.cat([x @ W, constant]))
        q, k = sides[::-1] if wrong.get("swapped") else sides
        answer = torch.einsum("cbqd,sbkd->bcsqk", q, k) / wrong.get("divisor", model.cfg.d_head**0.5)
        assert wrong or torch.allclose(answer, right)
        return wrong.get("labels", lambda labels: labels)(labels), wrong.get("end", lambda answer: answer)(answer)

    mistake("decompose_qk", words, decompose_qk, surprise)


terms("not divided by the scale of ln1", scaled=False)
terms("a scale of its own", own_scale=True)
terms("not centred", centred=0)
terms("`ln1.w` is left out", w=False)
terms("`ln1.b` is left out", b=0)
terms("b_Q and b_K are left out", biases=0)
terms("not divided by sqrt(d_head)", divisor=1.0)
terms("W_Q and W_K are swapped", swapped=True)
terms("the two axes of sources are swapped", end=lambda answer: answer.transpose(1, 2))
terms("queries and keys are transposed", end=lambda answer: answer.mT)
terms("it is another head", shift=1)
terms("values are wrong", surprise=True, b_O=0)
terms("wrong answer", surprise=True, labels=lambda labels: labels[::-1])
terms("wrong shape", surprise=True, end=lambda answer: answer.sum(2))
terms("values are wrong", surprise=True, end=lambda answer: answer[:1].expand_as(answer) + 0.01)
terms(
    "values are wrong",  # right in its sums only
    surprise=True,
    end=lambda answer: answer.mean((1, 2), keepdim=True).expand_as(answer),
)


# -------------------------------------------------------------------------------------------------------- composition


def norm(M: Any) -> Any:
    return torch.linalg.matrix_norm(M if isinstance(M, torch.Tensor) else whole(M))


def composition(words: str, score: Callable[[Any, Any], Any], surprise: bool = False) -> None:
    def composition_score(W_A: Any, W_B: Any) -> Any:
        A, B = (W if isinstance(W, torch.Tensor) else whole(W) for W in (W_A, W_B))
        return score(A, B)

    mistake("composition_score", words, composition_score, surprise)


def square_only(change: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A mistake that has a shape only where the matrices are square."""
    return lambda A, B: (change(A, B) if A.shape == B.shape else norm(A @ B)) / norm(A) / norm(B)


composition(
    "spectral ones",
    lambda A, B: torch.linalg.matrix_norm(A @ B, 2) / torch.linalg.matrix_norm(A, 2) / torch.linalg.matrix_norm(B, 2),
)
composition("not divided by the norms", lambda A, B: norm(A @ B))
composition("one of the two norms only", lambda A, B: norm(A @ B) / norm(A))
composition("the sum of the norms", lambda A, B: norm(A @ B) / (norm(A) + norm(B)))
composition("the norms are squared", lambda A, B: (norm(A @ B) / norm(A) / norm(B)).square())
composition("the order is turned round", square_only(lambda A, B: norm(B @ A)))
composition("W_B is transposed", square_only(lambda A, B: norm(A @ B.mT)))
composition("W_A is transposed", square_only(lambda A, B: norm(A.mT @ B)))
composition("entry by entry", square_only(lambda A, B: norm(A * B)))
composition("of a batch: wrong shape", lambda A, B: (A @ B).norm() / (A.norm() * B.norm()), True)
composition("is wrong", lambda A, B: norm(A @ B) / torch.linalg.matrix_norm(A, 2) / norm(B), True)
composition("is wrong", lambda A, B: norm(A @ B) / norm(A) / norm(B) / A.shape[-1] ** 0.5, True)
composition("is wrong", lambda A, B: norm(A @ B).log() - norm(A).log() - norm(B).log(), True)


def pairs(words: str, surprise: bool = False, **wrong: Any) -> None:
    """composition_scores with switches for what people get wrong."""

    def composition_scores(model: Any, kind: str) -> Any:
        if kind not in ("Q", "K", "V") and not wrong.get("lenient"):
            raise ValueError(kind)
        kind = wrong.get("kinds", {}).get(kind, kind)
        reads, writes = other.whole(model, kind if kind in "QKV" else "V"), other.whole(model, "V")
        reads = reads.mT if wrong.get("transposed") == kind else reads
        n_layers, n_heads = reads.shape[:2]
        table = torch.zeros(n_layers, n_heads, n_layers, n_heads)
        size = wrong.get("norm", norm)
        for layer in range(n_layers):
            for later in range(n_layers):
                if not wrong.get("which", int.__lt__)(layer, later):
                    continue
                A, B = writes[layer][:, None], reads[later][None]
                product = B @ A if wrong.get("backwards") else A @ B
                table[layer, :, later] = size(product) / size(A) / size(B)
        return wrong.get("end", lambda table: table)(table)

    mistake("composition_scores", words, composition_scores, surprise)


pairs("it is Q-composition", kinds={"K": "Q"})
pairs("it is K-composition", kinds={"Q": "K", "K": "Q"})
pairs("it is V-composition", kinds={"Q": "V"})
pairs("what the later head reads is transposed", transposed="V")
pairs("the order is turned round", backwards=True)
pairs("the earlier and the later head are swapped", end=lambda table: table.permute(2, 3, 0, 1))
pairs("spectral ones", norm=lambda M: torch.linalg.matrix_norm(M, 2))
pairs("every pair has a score", which=lambda layer, later: True)
pairs("heads of one layer are paired", which=int.__le__)
pairs("only neighbouring layers", which=lambda layer, later: later == layer + 1)
pairs("only what the first layer writes", which=lambda layer, later: layer == 0 < later)
pairs("heads are mixed up", end=lambda table: table.transpose(1, 3))
pairs("should raise ValueError", surprise=True, lenient=True)
pairs("values are wrong", surprise=True, end=lambda table: table / table.max())
pairs("values are wrong", surprise=True, end=torch.square)
pairs("wrong shape", surprise=True, end=lambda table: table[:-1])


def one_by_one(model: Any, kind: str) -> Any:
    table = torch.zeros((model.cfg.n_layers, model.cfg.n_heads) * 2)
    reads, writes = other.whole(model, kind), other.whole(model, "V")
    for layer, head, later, later_head in torch.cartesian_prod(*(torch.arange(n) for n in table.shape)).tolist():
        if layer < later:
            A, B = writes[layer, head], reads[later, later_head]
            table[layer, head, later, later_head] = norm(A @ B) / norm(A) / norm(B)
    return table


mistake("composition_scores", "several for each pair", one_by_one, True)


def baseline(words: str, surprise: bool = True, **wrong: Any) -> None:
    """random_composition_baseline with switches for what people get wrong."""

    def random_composition_baseline(model: Any, kind: str, n: int, generator: Any) -> Any:
        other.whole(model, kind)  # raises for another kind
        reads, writes = other.whole(model, wrong.get("kind", kind)), other.whole(model, "V")
        if len(reads) == 1 and not wrong.get("lenient"):
            raise ValueError("one layer")
        generator = wrong.get("generator", lambda generator: generator)(generator)
        scores = []
        for _ in range(n):
            head, later = torch.randint(writes.shape[1], (2,), generator=generator).tolist()
            noise = torch.randn(writes.shape[-1], writes.shape[-1], generator=generator)
            first, second = wrong.get("layers", (0, -1))
            A, B = writes[first, head], reads[second, later]
            A, B = wrong.get("pair", lambda A, B, noise: (A @ torch.linalg.qr(noise).Q, B))(A, B, noise)
            scores.append(wrong.get("score", lambda A, B: norm(A @ B) / norm(A) / norm(B))(A, B))
        return wrong.get("end", lambda scores: scores)(torch.stack(scores))

    mistake("random_composition_baseline", words, random_composition_baseline, surprise)


baseline("does not give the same scores", generator=lambda generator: None)
baseline("different seeds give the same scores", generator=lambda generator: torch.Generator().manual_seed(0))
baseline("these are the scores of the model's own pairs", pair=lambda A, B, noise: (A, B))
baseline("expected a Tensor of n = 5 scores, got ()", end=lambda scores: scores.mean())
baseline("some of the 5 scores are the same", end=lambda scores: scores[:1].expand(len(scores)))
baseline("the deviation of 100 scores", pair=lambda A, B, noise: (noise, torch.linalg.qr(noise).Q @ noise.flip(0)))
baseline("on average", score=lambda A, B: norm(A @ B))
baseline("on average", score=lambda A, B: torch.linalg.matrix_norm(A @ B, 2) / norm(B))
baseline('for "V": the deviation', kind="Q")
baseline("should raise ValueError", lenient=True)
baseline("the second in layer 0", layers=(0, 0))
baseline('for "Q": the deviation', kind="V")


# ------------------------------------------------------------------------------------------------------ the tests


@pytest.mark.parametrize("mistake", [pytest.param(m, id=f"{m.exercise}: {m.words[:50]}") for m in MISTAKES])
def test_mistake_is_refused_with_its_words(mistake: Mistake) -> None:
    assert_refused(CHECKS[mistake.exercise], mistake, secrets=("linalg.qr", "eigvals(B", "argmax", "masked_fill("))


@pytest.mark.parametrize("exercise", CHECKS)
def test_every_exercise_has_mistakes(exercise: str) -> None:
    if exercise != "random_composition_baseline":  # its answers are random: no mistake gives one answer
        assert_known_and_unknown(MISTAKES, exercise)


@pytest.mark.parametrize("exercise", CHECKS)
def test_right_answers_pass(exercise: str) -> None:
    run_check(CHECKS[exercise], getattr(ref, exercise))
    run_check(CHECKS[exercise], getattr(other, exercise))


@pytest.mark.parametrize("exercise", CHECKS)
def test_check_is_quick(exercise: str) -> None:
    assert_quick(CHECKS[exercise], getattr(other, exercise))


# --------------------------------------------------------------------- the oracles and the reference, from other sides


@pytest.mark.parametrize("cfg", [CFG, WITH_MLP, NO_NORM], ids=["attention only", "with MLPs", "no normalisation"])
def test_the_checks_model_is_the_courses(cfg: Any) -> None:
    model, tokens = SmallModel(cfg), some_tokens(cfg, 2, 5, seed=1)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == transformer_parameters(cfg)
    assert set(hook_points(model)) == set(transformer_hooks(cfg))
    logits, cache = run_with_cache(model, tokens, names="*")
    expected = by_loops.transformer(weights_of(model), cfg, tokens)
    torch.testing.assert_close(logits, expected.pop("output"), rtol=1e-4, atol=1e-4)
    for name, tensor in expected.items():
        torch.testing.assert_close(cache[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cfg", [CFG, WITH_MLP, NO_NORM], ids=["attention only", "with MLPs", "no normalisation"])
def test_terms_sum_to_the_scores(cfg: Any) -> None:
    model, tokens = SmallModel(cfg), some_tokens(cfg, 2, 5, seed=1)
    _, cache = run_with_cache(model, tokens, names="*")
    for layer in range(cfg.n_layers):
        scores = cache["attn_scores", layer][:, 1]
        visible = scores.isfinite()
        _, split = ref.decompose_qk(cache, model, layer, 1)
        torch.testing.assert_close(split.sum((1, 2))[visible], scores[visible], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cfg", [CFG, WITH_MLP, NO_NORM], ids=["attention only", "with MLPs", "no normalisation"])
def test_folding_changes_no_logit_and_leaves_the_model_alone(cfg: Any) -> None:
    model, tokens = SmallModel(cfg), some_tokens(cfg, 2, 5, seed=1)
    before = weights_of(model)
    folded = ref.fold_layer_norm(model)
    torch.testing.assert_close(folded(tokens), model(tokens), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    if cfg.normalization == "LN":
        assert all((norm.w == 1).all() and (norm.b == 0).all() for norm in [folded.ln_final, folded.blocks[0].ln1])


def test_rotations_are_orthogonal_and_turn_everywhere_alike() -> None:
    rng = torch.Generator().manual_seed(0)
    rotations = torch.stack([ref.random_rotation(5, rng) for _ in range(600)])
    torch.testing.assert_close(rotations.mT @ rotations, torch.eye(5).expand(600, 5, 5), rtol=0, atol=1e-5)
    assert rotations.mean(0).abs().max() < 0.1  # without the right signs the diagonal leans to one side
    assert (rotations.square().mean(0) - 1 / 5).abs().max() < 0.05


def test_a_factored_matrix_that_could_not_be_formed() -> None:
    """10^12 entries: four terabytes."""
    n = 1_000_000
    rng = torch.Generator().manual_seed(0)
    big = FactoredMatrix(torch.randn(n, 2, generator=rng), torch.randn(2, n, generator=rng))
    _, S, _ = big.svd()
    torch.testing.assert_close(S.square().sum().sqrt(), big.norm(), rtol=1e-3, atol=0)
    assert (big @ big).shape == (n, n) and big.T.shape == (n, n) and len(big.eigenvalues()) == 2


# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "2 -> 3",  # of __repr__ and of shapes that are only shown
    "list(self.shape) -> self.shape",
    "-1 -> 1",  # of two axes, the last
    "1 -> 2",
    "1 -> 0",
    "0 -> 1",  # of a vector's first entry, or of a batch in which all rows are alike
    "0 -> -1",
    "(self.A.mT @ self.A * (self.B @ self.B.mT)).sum(dim=(-2, -1)).clamp(min=0) -> "
    "(self.A.mT @ self.A * (self.B @ self.B.mT)).sum(dim=(-2, -1))",
    "int((largest == tokens).sum()) -> (largest == tokens).sum()",
    # the same is added to all scores of a query
    "resid @ block.attn.W_K[head] + block.attn.b_K[head] -> resid @ block.attn.W_K[head] - block.attn.b_K[head]",
    "resid @ block.attn.W_K[head] + block.attn.b_K[head] -> resid @ block.attn.W_K[head]",
    "model.cfg.normalization == 'LN' -> model.cfg.normalization <= 'LN'",
    "Tensor | FactoredMatrix -> Tensor",
    "Tensor | FactoredMatrix -> FactoredMatrix",
    "n_layers - 1 -> n_layers",  # the last layer has no later one
    "n_layers < 2 -> n_layers != 2",  # seen by a model of three layers only where it is asked for "K"
    "int(torch.randint(n_layers - 1, (), generator=generator)) -> torch.randint(n_layers - 1, (), generator=generator)",
    "int(torch.randint(layer + 1, n_layers, (), generator=generator)) -> "
    "torch.randint(layer + 1, n_layers, (), generator=generator)",
    "torch.randint(n_heads, (2,), generator=generator).tolist() -> torch.randint(n_heads, (2,), generator=generator)",
    "random_rotation(d_model, generator).to(W_V) -> random_rotation(d_model, generator)",
    "n_layers - 1 -> 1",  # which of the earlier layers is drawn how often is not measured
    "layer + 1 -> 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("exercise", CHECKS)
def test_small_changes_of_the_reference_are_refused(exercise: str) -> None:
    assert survivors(Path(inspect.getfile(ref)), exercise, CHECKS[exercise], only_on_gpu="device=") <= STILL_RIGHT
