"""Checks of chapter 04, composition: which heads read what which others write, and what chance would give."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch04.counting import Watched
from course_utils.checks.ch04.looking import DOUBLE
from course_utils.checks.ch04.weights import CFG, WITH_MLP, absolute, factored, frobenius, nuclear, parts, spectral
from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.plain import must_raise
from course_utils.checks.standins.transformer import SmallModel
from course_utils.checks.translating import during
from course_utils.config import TransformerConfig

Fn = Callable[..., Any]
KINDS = ("Q", "K", "V")


def composed(
    W_A: Tensor,
    W_B: Tensor,
    norm: Callable[[Tensor], Tensor] = frobenius,
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
            composed, norm=spectral
        ),
        "the norms are nuclear ones, sums of singular values; take the Frobenius norm.": partial(
            composed, norm=nuclear
        ),
        "it is not divided by the norms of W_A and W_B.": partial(composed, end=lambda both, A, B: both),
        "it is divided by one of the two norms only.": partial(composed, end=lambda both, A, B: both / A),
        "it is divided by the sum of the norms; take their product.": partial(
            composed, end=lambda both, A, B: both / (A + B)
        ),
        "the norms are squared.": partial(composed, end=lambda both, A, B: (both / (A * B)).square()),
        "the absolute values are summed.": partial(composed, norm=absolute),
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
    doubles = [factor.double() for factor in (noise(3, 5, 2, seed=61), noise(3, 2, 7, seed=62), *factors[2:])]
    W_A, W_B = doubles[0] @ doubles[1], doubles[2] @ doubles[3]
    A_factored, B_factored = factored(fn, *doubles[:2]), factored(fn, *doubles[2:])
    for case, first, second in [
        ("a batch of factored matrices", A_factored, B_factored),
        ("factored matrices and a tensor", A_factored, W_B),
        ("tensors and a factored matrix", W_A, B_factored),
    ]:
        with during(f"with {case}"):
            actual = fn(first, second)
        compare(f"{name} of {case}, in float64", actual, composed(W_A, W_B), "batch", **DOUBLE)
    follows_input(name, fn, (noise(5, 7), noise(7, 6)), "")


def _reads(model: Any, kind: str, layer: int, head: int, transposed: bool = False) -> Tensor:
    """What a head does with what it reads, as one matrix."""
    p = parts(model, layer, head)
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
        f"it is {got}-composition, not {asked}-composition.": another_kind(asked, got)
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
            all_pairs, score=partial(composed, norm=spectral)
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
            f"{name}: the same generator, seeded alike, does not give the same scores, or some "
            "random numbers come from elsewhere.\n"
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
        _check_spread(name, draw(kind, 60, 3), model, kind)
    must_raise(name, ValueError, 'random_composition_baseline(model, "O", ...)', lambda: draw("O", 2, 1))
    single = SmallModel(
        TransformerConfig(d_vocab=5, n_ctx=4, n_layers=1, n_heads=3, d_model=6, d_head=2, attn_only=True)
    )
    generator = torch.Generator().manual_seed(0)
    must_raise(name, ValueError, "for a model of one layer it", lambda: fn(single, "K", 2, generator))
    _check_layers(name, fn)


def _check_layers(name: str, fn: Fn) -> None:
    """Where a pair is of layers that are zero it has no score, 0 / 0: so it shows which layers are drawn, how often."""
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
    model = SmallModel(WITH_MLP)  # three layers; the middle one neither writes nor reads
    with torch.no_grad():
        model.blocks[1].attn.W_Q.zero_()
        model.blocks[1].attn.W_V.zero_()
        share = fn(model, "K", 150, torch.Generator().manual_seed(5)).isfinite().float().mean().item()
    if abs(share - 1 / 4) > 0.16:  # four and a half standard errors
        raise CheckFailed(
            f"{name}: of 150 pairs in three layers, {share:.0%} were in the first and the last, expected about 25%.\n"
            "  Next: draw a layer but the last, then any later one, both with equal chances."
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
            "  Next: is what rotates a rotation (orthogonal), and the score made of Frobenius norms?"
        )
    if not 0.7 < scores.std() / expected.std() < 1.4:
        raise CheckFailed(
            f'{name} for "{kind}": the deviation of {len(scores)} scores is {scores.std():.3f}, expected about '
            f"{expected.std():.3f}.\n"
            f'  Next: use the heads\' own weights, those that "{kind}" reads with, and nothing random but the rotation '
            "and the choice of heads."
        )
