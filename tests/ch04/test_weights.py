"""What the checks of reading weights cannot know: see tests/test_checks.py."""

import copy
from functools import partial
from typing import Any

import pytest
import torch

import solutions.ch04_induction as ref
from course_utils.checks import by_loops
from course_utils.checks.ch04.weights import CFG, NO_NORM, RMS, ROTARY, WITH_MLP, circuit, copying, positions, terms
from course_utils.checks.modules import weights_of
from course_utils.checks.standins.transformer import SmallModel, some_tokens
from course_utils.checks.transformer_interface import transformer_hooks, transformer_parameters
from course_utils.hooks import hook_points, run_with_cache
from solutions.ch04_induction import FactoredMatrix
from tests.ch04 import other_weights as other

SECRETS = ("linalg.qr", "eigvals(B", "argmax", "masked_fill(")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "list(self.shape) -> self.shape",
    "-1 -> 1",  # of two axes, the last
    "1 -> 2",
    "1 -> 0",
    "wanted.topk(k).indices.tolist() -> wanted.topk(k).indices",  # a tensor of them is as good
    "written.topk(k).indices.tolist() -> written.topk(k).indices",
    "0 -> 1",  # of a vector's first entry, or of a batch in which all rows are alike
    "0 -> -1",
    "(self.A.mT @ self.A * (self.B @ self.B.mT)).sum(dim=(-2, -1)).clamp(min=0) -> "
    "(self.A.mT @ self.A * (self.B @ self.B.mT)).sum(dim=(-2, -1))",
    "int((largest == tokens).sum()) -> (largest == tokens).sum()",
    # the same is added to all scores of a query
    "resid @ block.attn.W_K[head] + block.attn.b_K[head] -> resid @ block.attn.W_K[head] - block.attn.b_K[head]",
    "resid @ block.attn.W_K[head] + block.attn.b_K[head] -> resid @ block.attn.W_K[head]",
    "model.cfg.normalization == 'LN' -> model.cfg.normalization <= 'LN'",
    "model.cfg.normalization != 'none' -> model.cfg.normalization < 'none'",  # none is the largest
    "model.cfg.positions == 'rotary' -> model.cfg.positions >= 'rotary'",  # there are two choices
}


def matrix(**methods: Any) -> type:
    """A FactoredMatrix with some methods written otherwise."""
    return type("FactoredMatrix", (FactoredMatrix,), methods)


def whole(M: Any) -> torch.Tensor:
    return M if isinstance(M, torch.Tensor) else M.A @ M.B


def values(find: Any) -> type:
    """A FactoredMatrix with other eigenvalues, which knows that they need a square."""

    def eigenvalues(self: Any) -> Any:
        FactoredMatrix.eigenvalues(self)
        return find(self)

    return matrix(eigenvalues=eigenvalues)


def svd(change: Any) -> type:
    return matrix(svd=lambda self: change(*FactoredMatrix.svd(self)))


def here(layer: int, head: int) -> tuple[int, int]:
    return layer, head


def with_the_others_inner_size(self: Any, other: Any) -> Any:
    if isinstance(other, torch.Tensor):
        return FactoredMatrix.__matmul__(self, other)
    return type(self)(self.A @ (self.B @ other.A), other.B)


def square_times(self: Any, other: Any) -> Any:
    """Right for tensors, and for factors that are orthogonal."""
    return type(self)(
        self.A, self.B @ (other if isinstance(other, torch.Tensor) else other.A @ other.A.mT @ whole(other))
    )


def norm(M: Any) -> Any:
    return torch.linalg.matrix_norm(M)


def with_a_token(model: Any) -> Any:
    """A model whose positions hold the embedding of token 0, too."""
    changed = copy.deepcopy(model)
    changed.pos_embed.W_pos.data += model.embed.W_E[0].data
    return changed


def without_b_O(cache: Any, model: Any, layer: int, head: int) -> Any:  # noqa: N802
    changed = copy.deepcopy(model)
    for block in changed.blocks:
        block.attn.b_O.data.zero_()
    return terms(cache, changed, layer, head)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "FactoredMatrix": [
        ("norm(): wrong shape", matrix(norm=lambda self: whole(self).norm())),
        ("norm() of a 2001 x 2001 matrix", matrix(norm=lambda self: norm(whole(self)))),
        ("values is wrong", matrix(norm=lambda self: norm(self.A) * norm(self.B))),
        ("expected only the inner size, 3", values(lambda self: torch.linalg.eigvals(whole(self)))),
        ("eigenvalues() are of dtype float32", values(lambda self: torch.linalg.eigvalsh(self.B @ self.A))),
        (
            "eigenvalues(): 3 of 6 values are wrong",
            values(lambda self: torch.linalg.eigvals(self.A.mT @ self.A)),
        ),
        ("should raise ValueError", matrix(eigenvalues=lambda self: torch.linalg.eigvals(self.B @ self.A))),
        (
            "this @ vector should raise ValueError",
            matrix(
                __matmul__=lambda self, other: (
                    FactoredMatrix(self.A, self.B @ other)
                    if isinstance(other, torch.Tensor)
                    else FactoredMatrix.__matmul__(self, other)
                )
            ),
        ),
        (
            "vector @ this should raise ValueError",
            matrix(__rmatmul__=lambda self, other: FactoredMatrix(other @ self.A, self.B)),
        ),
        ("T, multiplied out", matrix(T=property(lambda self: FactoredMatrix(self.B.mT, self.A.mT * 2)))),
        ("T: expected a FactoredMatrix, got a Tensor", matrix(T=property(lambda self: whole(self).mT))),
        (
            "this @ tensor: expected a FactoredMatrix, got a Tensor",
            matrix(__matmul__=lambda self, other: whole(self) @ whole(other)),
        ),
        ("this @ factored, multiplied out", matrix(__matmul__=square_times)),
        ("tensor @ this", matrix(__rmatmul__=lambda self, other: type(self)(other @ self.A, 2 * self.B))),
        (
            "the singular values: wrong shape",
            matrix(svd=lambda self: torch.linalg.svd(whole(self), full_matrices=False)),
        ),
        ("is it V, not transposed?", svd(lambda U, S, Vh: (U, S, Vh.mT))),
        ("this @ factored: its factors are", matrix(__matmul__=with_the_others_inner_size)),
        ("in float64: the singular values", svd(lambda U, S, Vh: (U.float(), S.float(), Vh.float()))),
        ("in float64: the singular values", svd(lambda U, S, Vh: (U, S.float().to(S.dtype), Vh))),
        ("U transposed times U", svd(lambda U, S, Vh: (U * 2, S, Vh / 2))),
    ],
    "bigram_logits": [
        ("values are wrong", lambda model: ref.bigram_logits(with_a_token(model)) + model.pos_embed.W_pos[0].sum()),
        ("expected (token=13, next_token=13)", lambda model: ref.bigram_logits(model)[None]),
        ("values are wrong", lambda model: 2 * ref.bigram_logits(model)),
    ],
    "skip_trigrams": [
        (
            "made a tensor of",
            lambda qk, ov, source, k: (
                (whole(qk) - whole(qk).mean(1, keepdim=True))[:, source].topk(k).indices.tolist(),
                ref.skip_trigrams(qk, ov, source, k)[1],
            ),
        ),
        ("expected two lists", lambda qk, ov, source, k: ref.skip_trigrams(qk, ov, source, k)[0]),
        ("the queries", lambda qk, ov, source, k: ref.skip_trigrams(qk, ov, (source + 1) % len(qk.A), k)),
        ("the outputs", lambda qk, ov, source, k: (ref.skip_trigrams(qk, ov, source, k)[0], [source])),
    ],
    "ov_circuit": [
        ("the inner size need not be more than 7", circuit(lambda p: (p.E @ p.V @ p.O @ p.U, torch.eye(13)), here)),
        (
            "values are wrong",  # right for the first tokens only
            circuit(lambda p: (p.E @ p.V * (torch.arange(13) < 5)[:, None], p.O @ p.U), here),
        ),
        (
            "values are wrong",
            circuit(lambda p: (p.E @ p.V, p.O @ p.U - (p.O @ p.U).mean(1, keepdim=True)), here),
        ),
        ("got a Tensor", lambda model, layer, head: whole(ref.ov_circuit(model, layer, head))),
    ],
    "qk_circuit": [
        (
            "All of the wrong values are at query_token=12",
            circuit(lambda p: (torch.cat([p.E[:-1] @ p.Q, p.E[:1] @ p.Q]), p.K.T @ p.E.T), here),
        ),
        ("Every value is 0.25 times", circuit(lambda p: (p.E @ p.Q / 4, p.K.T @ p.E.T), here)),
    ],
    "copying_score": [
        (
            "made a tensor of",
            lambda ov: torch.linalg.eigvals(whole(ov)).real.sum() / torch.linalg.eigvals(ov.B @ ov.A).abs().sum(),
        ),
        (
            "in float64",
            lambda ov: copying(lambda real, size, _: real.float().sum() / size.float().sum())(ov).to(ov.A.dtype),
        ),
        ("expected dtype float32", copying(lambda real, size, values: values.sum() / size.sum())),
        ("is wrong", copying(lambda real, size, values: real.sum() / size.square().sum().sqrt())),
        ("is wrong", copying(lambda real, size, values: real.sum() / size.max())),
    ],
    "top1_accuracy": [
        (
            "in blocks of 16 rows: it made a tensor of",
            lambda ov, rows_at_once=1024: other.top1_accuracy(ov, len(ov.A)),
        ),
        ("wrong answer", lambda ov, rows_at_once=1024: ref.top1_accuracy(ov.T, rows_at_once) + 0.001),
    ],
    "position_pattern": [
        ("got nan", partial(positions, hidden=0)),
        ("values are wrong", lambda model, layer, head: positions(with_a_token(model), layer, head)),
        ("values are wrong", partial(positions, norm=lambda ln1, resid: torch.nn.functional.normalize(resid, dim=-1))),
        ("expected (query=9, key=9)", partial(positions, end=lambda scores: scores.softmax(-1)[None])),
    ],
    "decompose_qk": [
        ("values are wrong", without_b_O),
        ("wrong answer", lambda *arguments: (terms(*arguments)[0][::-1], terms(*arguments)[1])),
        ("wrong shape", partial(terms, end=lambda split: split.sum(2))),
        ("values are wrong", partial(terms, end=lambda split: split[:1].expand_as(split) + 0.01)),
        (
            "values are wrong",  # right in its sums only
            partial(terms, end=lambda split: split.mean((1, 2), keepdim=True).expand_as(split)),
        ),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


# --------------------------------------------------------------------- the oracles and the reference, from other sides

KINDS = {
    "attention only": CFG,
    "with MLPs": WITH_MLP,
    "no normalisation": NO_NORM,
    "RMSNorm": RMS,
    "rotary and parallel": ROTARY,
}


@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS.keys())
def test_the_checks_model_is_the_courses(cfg: Any) -> None:
    model, tokens = SmallModel(cfg), some_tokens(cfg, 2, 5, seed=1)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == transformer_parameters(cfg)
    assert set(hook_points(model)) == set(transformer_hooks(cfg))
    logits, cache = run_with_cache(model, tokens, names="*")
    expected = by_loops.transformer(weights_of(model), cfg, tokens)
    torch.testing.assert_close(logits, expected.pop("output"), rtol=1e-4, atol=1e-4)
    for name, tensor in expected.items():
        torch.testing.assert_close(cache[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS.keys())
def test_terms_sum_to_the_scores(cfg: Any) -> None:
    model, tokens = SmallModel(cfg), some_tokens(cfg, 2, 5, seed=1)
    _, cache = run_with_cache(model, tokens, names="*")
    for layer in range(cfg.n_layers):
        scores = cache["attn_scores", layer][:, 1]
        visible = scores.isfinite()
        _, split = ref.decompose_qk(cache, model, layer, 1)
        torch.testing.assert_close(split.sum((1, 2))[visible], scores[visible], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS.keys())
def test_folding_changes_no_logit_and_leaves_the_model_alone(cfg: Any) -> None:
    model, tokens = SmallModel(cfg), some_tokens(cfg, 2, 5, seed=1)
    before = weights_of(model)
    folded = ref.fold_layer_norm(model)
    torch.testing.assert_close(folded(tokens), model(tokens), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    if cfg.normalization == "LN":
        assert all((norm.w == 1).all() and (norm.b == 0).all() for norm in [folded.ln_final, folded.blocks[0].ln1])


def test_a_factored_matrix_that_could_not_be_formed() -> None:
    """10^12 entries: four terabytes."""
    n = 1_000_000
    rng = torch.Generator().manual_seed(0)
    big = FactoredMatrix(torch.randn(n, 2, generator=rng), torch.randn(2, n, generator=rng))
    _, S, _ = big.svd()
    torch.testing.assert_close(S.square().sum().sqrt(), big.norm(), rtol=1e-3, atol=0)
    assert (big @ big).shape == (n, n) and big.T.shape == (n, n) and len(big.eigenvalues()) == 2
