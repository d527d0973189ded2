"""Checks of chapter 05, the task and where its answer is written: metrics, and the stream read out as logits."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks.ch05.case import DEEP, ONE, Case, compare
from course_utils.checks.comparing import follows_input, unchanged
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.plain import must_raise
from course_utils.checks.standins.transformer import SmallModel, some_tokens
from course_utils.checks.translating import during
from course_utils.config import TransformerConfig
from course_utils.hooks import ActivationCache, run_with_cache

Fn = Callable[..., Any]

# ------------------------------------------------------------------------------------------------------------ metrics


def prompts(n_batch: int, n_pos: int) -> SimpleNamespace:
    """What the metrics need of an `IOIDataset`; the prompts end at different positions."""
    rows = torch.arange(n_batch)
    io, s = (3 * rows + 2) % 13, (5 * rows + 7) % 13
    end = n_pos - 1 - (rows + 1) % 3
    names = {"IO": rows % 2, "S1": rows % 2 + 1, "S1+1": rows % 2 + 2, "S2": end - 1, "END": end}
    return SimpleNamespace(io=io, s=s, positions=names, tokens=torch.zeros(n_batch, n_pos, dtype=torch.long))


def logits_for(n_batch: int, n_pos: int, scale: float = 3.0) -> Tensor:
    """All different, and not contiguous."""
    return noise(n_pos, n_batch, 13, seed=n_batch + 6, scale=scale).transpose(0, 1)


def extreme_logits(dataset: Any) -> Tensor:
    """Far apart, in double precision; and nobody's names are impossible."""
    n_batch, n_pos = dataset.tokens.shape
    logits = logits_for(n_batch, n_pos, scale=500.0).double()
    for row, token in enumerate(((dataset.io + 1) % 13).tolist()):
        if token not in (int(dataset.io[row]), int(dataset.s[row])):
            logits[row, :, token] = -torch.inf
    return logits


def differences(logits: Tensor, dataset: Any) -> Tensor:
    """The definition, prompt by prompt."""
    values = []
    for row in range(len(logits)):
        last = logits[row, int(dataset.positions["END"][row])]
        values.append(last[int(dataset.io[row])] - last[int(dataset.s[row])])
    return torch.stack(values)


SHAPES = [(4, 7), (3, 6), (1, 5)]


def logit_of(tokens: Tensor, logits: Tensor, dataset: Any, place: Any = "END") -> Tensor:
    """The logits of these tokens, at a named place or at these positions."""
    rows = torch.arange(len(logits))
    return logits[rows, dataset.positions[place] if isinstance(place, str) else place, tokens]


def difference(logits: Tensor, dataset: Any, place: Any = "END") -> Tensor:
    """All at once, and at any place."""
    return logit_of(dataset.io, logits, dataset, place) - logit_of(dataset.s, logits, dataset, place)


@known_mistakes(
    {
        "the sign is wrong: it is the receiver minus the giver.": lambda lo, data: -difference(lo, data),
        "they are differences of probabilities; take the logits.": lambda lo, data: difference(lo.softmax(-1), data),
        "it is the logit of `io` alone.": lambda lo, data: logit_of(data.io, lo, data),
        "it looks at the last position; a prompt ends at its own END.": lambda lo, data: difference(lo, data, -1),
        "it looks at S2, the giver's second mention; the answer comes after END.": lambda lo, data: difference(
            lo, data, "S2"
        ),
        "every prompt is read at the first one's END.": lambda lo, data: difference(
            lo, data, data.positions["END"][:1]
        ),
        "it is the mean over the prompts; give one number for each.": lambda lo, data: difference(lo, data).mean(),
    }
)
def check_logit_difference(fn: Fn) -> None:
    """Three sizes of batch; every prompt has its own end. Then logits far apart, some of them -inf."""
    name = "logit_difference"
    for n_batch, n_pos in SHAPES:
        dataset, logits = prompts(n_batch, n_pos), logits_for(n_batch, n_pos)
        with unchanged(name, io=dataset.io, s=dataset.s, end=dataset.positions["END"]):
            actual = fn(logits, dataset)
        compare(f"{name} of {n_batch} prompts", actual, differences(logits, dataset), "batch")
        extreme = extreme_logits(dataset)
        words = f"{name} where other tokens' logits are -inf, and those of the names far apart"
        compare(words, fn(extreme, dataset), differences(extreme, dataset), "batch")
    follows_input(name, lambda moved: fn(moved, dataset), (logits,), "batch", gradient=True)


def scaled(value: Callable[[Tensor, float, float], Tensor]) -> Fn:
    """A normalised_metric of the logit difference, clean and corrupted."""
    return lambda logits, dataset, clean, corrupted: value(difference(logits, dataset), clean, corrupted)


@known_mistakes(
    {
        "the metric is not normalised: it is the logit difference.": scaled(lambda x, a, b: x),
        "clean and corrupted are swapped: this is 0 on the clean run and 1 on the corrupted one.": scaled(
            lambda x, a, b: (x - a) / (b - a)
        ),
        "the sign is wrong: the denominator is clean minus corrupted.": scaled(lambda x, a, b: (x - b) / (b - a)),
        "the corrupted run's value is not subtracted.": scaled(lambda x, a, b: x / (a - b)),
        "it is not divided by clean minus corrupted.": scaled(lambda x, a, b: x - b),
        "it is divided by clean, not by clean minus corrupted.": scaled(lambda x, a, b: (x - b) / a),
        "the scale is cut off at 0 and 1; it goes on.": scaled(lambda x, a, b: ((x - b) / (a - b)).clamp(0, 1)),
        "the size of the gap is taken, without its sign.": scaled(lambda x, a, b: (x - b) / abs(a - b)),
        "it is the mean over the prompts; give one number for each.": scaled(
            lambda x, a, b: ((x - b) / (a - b)).mean()
        ),
    }
)
def check_normalised_metric(fn: Fn) -> None:
    """Values; then the two ends of the scale; then a scale without length."""
    name = "normalised_metric"
    scales = [(3.25, -1.5), (-2.0, 4.5), (0.0, 1.5), (1.5, 0.0), (0.003, 0.002)]  # the last two for the last shape
    for (n_batch, n_pos), (clean, corrupted) in zip([*SHAPES, SHAPES[2], SHAPES[2]], scales, strict=True):
        dataset, logits = prompts(n_batch, n_pos), logits_for(n_batch, n_pos)
        right = (differences(logits, dataset) - corrupted) / (clean - corrupted)
        with during(f"with clean={clean}, corrupted={corrupted}"):
            actual = fn(logits, dataset, clean, corrupted)
        compare(f"{name} with clean={clean}, corrupted={corrupted}", actual, right, "batch")
    for same in (1.5, 0.0):
        must_raise(name, ValueError, f"clean={same}, corrupted={same}", partial(fn, logits, dataset, same, same))
    follows_input(name, lambda moved: fn(moved, dataset, 1.5, 0.0), (logits,), "batch", gradient=True)


# ----------------------------------------------------------------------------------------- where the answer is written

# layers, heads, batch, pos; the second without MLPs, in float64
SIZES: list[tuple[Any, ...]] = [(2, 3, 4, 5), (3, 2, 1, 4, True, True), ONE, DEEP]


def run(sizes: tuple[Any, ...]) -> tuple[Case, ActivationCache, Tensor]:
    """A toy model, what its places saw as a cache (in the source's run), and directions."""
    case = Case(*sizes)
    W_U = case.model.unembed.W_U.detach()
    answers = torch.arange(case.n_batch)
    directions = (W_U[:, (3 * answers + 1) % 11] - W_U[:, (2 * answers + 5) % 11]).T.contiguous()
    return case, case.cache(), directions


def depths(cache: ActivationCache) -> Tensor:
    """Row by row."""
    rows = [cache[f"blocks.{layer}.hook_resid_pre"] for layer in range(cache.n_layers)]
    return torch.stack([*rows, cache[f"blocks.{cache.n_layers - 1}.hook_resid_post"]])


def stacked(change: Callable[[Tensor], Tensor]) -> Fn:
    """An accumulated_residual whose rows were changed afterwards."""
    return lambda cache: change(depths(cache))


@known_mistakes(
    {
        "the last row is missing: what the last layer leaves.": stacked(lambda rows: rows[:-1]),
        "the first row is missing: what the first layer finds.": stacked(lambda rows: rows[1:]),
        "the rows are in reverse order.": stacked(lambda rows: rows.flip(0)),
        "`resid_post` stands in the row of its layer's `resid_pre`.": stacked(
            lambda rows: torch.cat([rows[1:], rows[-1:]])
        ),
        "the rows are what each layer adds, not what has come together.": stacked(
            lambda rows: torch.cat([rows[:1], rows.diff(dim=0)])
        ),
        "the last row is the one before, once more.": stacked(lambda rows: torch.cat([rows[:-1], rows[-2:-1]])),
        "`resid_mid` is taken; the statement asks for `resid_pre`.": lambda cache: torch.cat(
            [cache.stack("resid_mid"), depths(cache)[-1:]]
        ),
    }
)
def check_accumulated_residual(fn: Fn) -> None:
    """With MLPs and without; one layer, a few, and more than ten. The cache holds the streams alone."""
    name = "accumulated_residual"
    for sizes in SIZES:
        case, cache, _ = run(sizes)
        cache = ActivationCache({place: resid for place, resid in cache.items() if "resid" in place})
        compare(f"{name} {case.words}", fn(cache), depths(cache), "depth batch pos d_model")


def onto(vectors: Tensor, directions: Tensor) -> Tensor:
    """The dot product with each prompt's direction, prompt by prompt, on the axes [... batch pos d_model]."""
    return torch.stack([vectors[..., row, :, :] @ directions[row] for row in range(len(directions))], dim=-2)


def unchanging(value: Tensor) -> Tensor:
    return value


def first_of(directions: Tensor) -> Tensor:
    """The first prompt's for all."""
    return directions[:1].expand_as(directions)


def lens(
    norm: Callable[[Tensor, Any, Any], Tensor] = lambda rows, cache, model: model.ln_final(rows),
    along: Callable[[Tensor], Tensor] = unchanging,
    then: Callable[[Tensor], Tensor] = unchanging,
) -> Fn:
    """A logit_lens with another LayerNorm, along other directions, or changed afterwards."""
    return lambda cache, model, directions: then(onto(norm(depths(cache), cache, model), along(directions)))


def norm_with_the_last_scale(rows: Tensor, cache: Any, model: Any) -> Tensor:
    centred = rows - rows.mean(-1, keepdim=True)
    return centred / cache["ln_final.hook_scale"] * model.ln_final.w + model.ln_final.b


def run_with_norm(normalization: Any) -> tuple[Any, ActivationCache, Tensor]:
    """A model that normalises in another way and turns its queries and keys, what its places saw, and directions."""
    cfg = TransformerConfig(
        d_vocab=11, n_ctx=6, n_layers=2, n_heads=3, d_model=8, d_head=4, d_mlp=6, normalization=normalization,
        positions="rotary", rotary_dim=2,
    )  # fmt: skip
    model = SmallModel(cfg)
    with torch.no_grad():
        _, cache = run_with_cache(model, some_tokens(cfg, 2, 4, seed=1))
    return model, cache, noise(2, 8, seed=2)


@known_mistakes(
    {
        "the final LayerNorm is left out.": lens(norm=lambda rows, cache, model: rows),
        "every depth is divided by the scale of the last; each has its own.": lens(norm=norm_with_the_last_scale),
        "the LayerNorm's `w` and `b` are left out.": lens(
            norm=lambda rows, cache, model: F.layer_norm(rows, rows.shape[-1:], eps=0.1)
        ),
        "the LayerNorm's `b` is left out.": lens(
            norm=lambda rows, cache, model: model.ln_final(rows) - model.ln_final.b
        ),
        "the last row is missing: what the last layer leaves.": lens(then=lambda values: values[:-1]),
        "the rows are in reverse order.": lens(then=lambda values: values.flip(0)),
        "only the last position is read; give all of them.": lens(then=lambda values: values[..., -1]),
        "it is the mean over the prompts; give one number for each.": lens(then=lambda values: values.mean(1)),
        "every prompt is read along the first one's direction.": lens(along=first_of),
    }
)
def check_logit_lens(fn: Fn) -> None:
    """Each depth through its own LayerNorm, by PyTorch; and that the last row is what the model says."""
    name = "logit_lens"
    for sizes in SIZES:
        case, cache, directions = run(sizes)
        final = case.model.ln_final
        right = onto(F.layer_norm(depths(cache), (8,), final.w, final.b, eps=0.1), directions)
        compare(f"{name} {case.words}", fn(cache, case.model, directions), right, "depth batch pos")
    model, cache, directions = run_with_norm("none")
    with during("without normalisation"), torch.no_grad():
        actual = fn(cache, model, directions)
    compare(f"{name} without normalisation", actual, onto(depths(cache), directions), "depth batch pos")


def table_of_heads(cache: ActivationCache, model: Any, through: Callable[[Tensor], Tensor]) -> Tensor:
    """What every head writes, on the axes [layer head batch pos d_model], after `through`."""
    rows = []
    for layer, block in enumerate(model.blocks):
        zs = cache[f"blocks.{layer}.attn.hook_z"].unbind(2)
        rows.append(torch.stack([through(z @ W) for z, W in zip(zs, block.attn.W_O, strict=True)]))
    return torch.stack(rows)


def centred(part: Tensor) -> Tensor:
    return part - part.mean(-1, keepdim=True)


def attributing(
    through: Callable[[Tensor, Tensor, Any], Tensor] = lambda part, scale, norm: centred(part) / scale * norm.w,
    rms: Callable[[Tensor, Tensor, Any], Tensor] = lambda part, scale, norm: part / scale * norm.w,
    along: Callable[[Tensor], Tensor] = unchanging,
    then: Callable[[Tensor], Tensor] = unchanging,
) -> Fn:
    """A head_attribution in which `through(part, scale, norm)` is made of what a head writes; `rms` with an RMSNorm."""

    def head_attribution(cache: Any, model: Any, directions: Any) -> Any:
        norm = {"LN": through, "RMS": rms}.get(model.cfg.normalization)

        def normed(part: Tensor) -> Tensor:
            return norm(part, cache["ln_final.hook_scale"], model.ln_final) if norm else part

        return then(onto(table_of_heads(cache, model, normed), along(directions)))

    return head_attribution


def with_shares_of_biases(cache: Any, model: Any, directions: Any) -> Any:
    """A head_attribution in which each head has its part of `b_O`."""
    biases = torch.stack([block.attn.b_O for block in model.blocks])[:, None, None, None]
    spread = table_of_heads(cache, model, unchanging) + biases / len(model.blocks[0].attn.W_O)
    return onto(centred(spread) / cache["ln_final.hook_scale"] * model.ln_final.w, directions)


@known_mistakes(
    {
        "the final LayerNorm's scale is left out.": attributing(lambda part, scale, norm: centred(part) * norm.w),
        "the final LayerNorm's `w` is left out.": attributing(lambda part, scale, norm: centred(part) / scale),
        "a head's own mean is not subtracted.": attributing(lambda part, scale, norm: part / scale * norm.w),
        "the mean is subtracted where normalization is 'RMS'; an RMSNorm subtracts none.": attributing(
            rms=lambda part, scale, norm: centred(part) / scale * norm.w
        ),
        "the scale and `w` are left out where normalization is 'RMS'; only the mean is.": attributing(
            rms=lambda part, scale, norm: part
        ),
        "the final LayerNorm is left out.": attributing(lambda part, scale, norm: part),
        "each head gets a scale of its own; divide by that of the whole stream.": attributing(
            lambda part, scale, norm: F.layer_norm(part, part.shape[-1:], norm.w, eps=0.1)
        ),
        "the model's LayerNorm is applied to each head alone; divide by the scale of the whole stream.": attributing(
            lambda part, scale, norm: norm(part)
        ),
        "`ln_final.b` is added to every head.": attributing(
            lambda part, scale, norm: centred(part) / scale * norm.w + norm.b
        ),
        "`b_O` is spread over the heads.": with_shares_of_biases,
        "every position is divided by the scale of the last.": attributing(
            lambda part, scale, norm: centred(part) / scale[:, -1:] * norm.w
        ),
        "the layers are in reverse order.": attributing(then=lambda values: values.flip(0)),
        "only the last position is read; give all of them.": attributing(then=lambda values: values[..., -1]),
        "it is the mean over the prompts; give one number for each.": attributing(then=lambda values: values.mean(2)),
        "every prompt is read along the first one's direction.": attributing(along=first_of),
    }
)
def check_head_attribution(fn: Fn) -> None:
    """Every head by a loop; one layer, a few, and more than ten."""
    name = "head_attribution"
    for sizes in SIZES:
        case, cache, directions = run(sizes)
        right = attributing()(cache, case.model, directions)
        compare(f"{name} {case.words}", fn(cache, case.model, directions), right, "layer head batch pos")
    for normalization in ("none", "RMS"):
        model, cache, directions = run_with_norm(normalization)
        words = "without normalisation" if normalization == "none" else "with RMSNorm"
        with during(words), torch.no_grad():
            actual = fn(cache, model, directions)
            right = attributing()(cache, model, directions)
        compare(f"{name} {words}", actual, right, "layer head batch pos")
