"""Checks of chapter 05, the task and where its answer is written: metrics, and the stream read out as logits."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from course_utils.checks.ch05.case import Case, ToyTransformer
from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.modules import noise
from course_utils.checks.plain import must_raise
from course_utils.hooks import ActivationCache

Fn = Callable[..., Any]

# ------------------------------------------------------------------------------------------------------------ metrics


def prompts(n_batch: int, n_pos: int) -> SimpleNamespace:
    """What the metrics need of an `IOIDataset`; the prompts end at different positions."""
    rows = torch.arange(n_batch)
    io, s = (3 * rows + 2) % 13, (5 * rows + 7) % 13
    end = n_pos - 1 - (rows + 1) % 3
    names = {"IO": rows % 2, "S1": rows % 2 + 1, "S1+1": rows % 2 + 2, "S2": end - 1, "END": end}
    return SimpleNamespace(io=io, s=s, positions=names, tokens=torch.zeros(n_batch, n_pos, dtype=torch.long))


def differences(logits: Tensor, dataset: Any, place: Callable[[int], int] | None = None) -> Tensor:
    """The definition, prompt by prompt; `place` says at which position to look, END if not given."""
    values = []
    for row in range(len(logits)):
        pos = int(dataset.positions["END"][row]) if place is None else place(row)
        values.append(logits[row, pos, int(dataset.io[row])] - logits[row, pos, int(dataset.s[row])])
    return torch.stack(values)


SHAPES = [(4, 7), (3, 6), (1, 5)]


def check_logit_difference(fn: Fn) -> None:
    """Three sizes of batch; every prompt has its own end."""
    name = "logit_difference"
    for n_batch, n_pos in SHAPES:
        dataset, logits = prompts(n_batch, n_pos), noise(n_batch, n_pos, 13, seed=n_batch + 6, scale=3.0)
        right = differences(logits, dataset)
        chances = logits.log_softmax(-1).exp()
        mistakes = {
            "the sign is wrong: it is the receiver minus the giver.": -right,
            "they are differences of probabilities; take the logits.": differences(chances, dataset),
            "it is the logit of `io` alone.": differences(logits, dataset) + pick(logits, dataset, dataset.s),
        }
        if n_batch > 1:
            mistakes |= {
                "it looks at the last position; a prompt ends at its own END.": differences(
                    logits, dataset, lambda row: -1
                ),
                "it looks at S2, the giver's second mention; the answer comes after END.": differences(
                    logits, dataset, dataset.positions["S2"].tolist().__getitem__
                ),
                "every prompt is read at the first one's END.": differences(
                    logits, dataset, [int(dataset.positions["END"][0])].__mul__(n_batch).__getitem__
                ),
                "it is the mean over the prompts; give one number for each.": right.mean(),
            }
        with unchanged(name, logits=logits, io=dataset.io, s=dataset.s, end=dataset.positions["END"]):
            actual = fn(logits, dataset)
        compare(f"{name} of {n_batch} prompts", actual, right, "batch", mistakes)
    follows_input(name, lambda moved: fn(moved, dataset), (logits,), "batch")


def pick(logits: Tensor, dataset: Any, tokens: Tensor) -> Tensor:
    """The logit of a token for each prompt, at its end."""
    rows = range(len(logits))
    return torch.stack([logits[row, int(dataset.positions["END"][row]), int(tokens[row])] for row in rows])


def check_normalised_metric(fn: Fn) -> None:
    """Values; then the two ends of the scale; then a scale without length."""
    name = "normalised_metric"
    for (n_batch, n_pos), clean, corrupted in [(SHAPES[0], 3.25, -1.5), (SHAPES[1], -2.0, 4.5), (SHAPES[2], 1.5, 0.0)]:
        dataset, logits = prompts(n_batch, n_pos), noise(n_batch, n_pos, 13, seed=n_batch + 6, scale=3.0)
        difference = differences(logits, dataset)
        right = (difference - corrupted) / (clean - corrupted)
        mistakes = {
            "the metric is not normalised: it is the logit difference.": difference,
            "clean and corrupted are swapped: this is 0 on the clean run and 1 on the corrupted one.": 1 - right,
            "the sign is wrong: the denominator is clean minus corrupted.": -right,
            "the corrupted run's value is not subtracted.": difference / (clean - corrupted),
            "it is not divided by clean minus corrupted.": difference - corrupted,
            "it is divided by clean, not by clean minus corrupted.": (difference - corrupted) / clean,
            "the scale is cut off at 0 and 1; it goes on.": right.clamp(0, 1),
            "the size of the gap is taken, without its sign.": (difference - corrupted) / abs(clean - corrupted),
        }
        if n_batch > 1:
            mistakes["it is the mean over the prompts; give one number for each."] = right.mean()
        if clean < corrupted:  # there the two are the same; the sign was looked at before
            del mistakes["the sign is wrong: the denominator is clean minus corrupted."]
        known = [right]
        distinct = {}
        for hint, answer in mistakes.items():
            if not any(answer.shape == other.shape and torch.allclose(answer, other) for other in known):
                known.append(answer)
                distinct[hint] = answer
        with unchanged(name, logits=logits):
            actual = fn(logits, dataset, clean, corrupted)
        compare(f"{name} with clean={clean}, corrupted={corrupted}", actual, right, "batch", distinct)
    must_raise(name, ValueError, "clean=1.5, corrupted=1.5", lambda: fn(logits, dataset, 1.5, 1.5))
    follows_input(name, lambda moved: fn(moved, dataset, 1.5, 0.0), (logits,), "batch")


# ----------------------------------------------------------------------------------------- where the answer is written

SIZES = [(2, 3, 4, 5), (3, 2, 1, 4, True, True)]  # layers, heads, batch, pos; the second without MLPs, in float64


def run(sizes: tuple[Any, ...]) -> tuple[Case, dict[str, Tensor], ActivationCache, Tensor]:
    """A toy model, what its places saw (each head's `result` too), the same as a cache, and directions."""
    case = Case(*sizes)
    seen = dict(case.seen)
    for layer, block in enumerate(case.model.blocks):
        z, W_O = seen[f"blocks.{layer}.attn.hook_z"], block.attn.W_O.detach()
        seen[f"blocks.{layer}.attn.hook_result"] = torch.einsum("bphd,hdm->bphm", z, W_O)
    W_U = case.model.unembed.W_U.detach()
    answers = torch.arange(case.n_batch)
    directions = (W_U[:, (3 * answers + 1) % 11] - W_U[:, (2 * answers + 5) % 11]).T.contiguous()
    return case, seen, ActivationCache(seen, case.n_layers), directions


def depths(seen: dict[str, Tensor], n_layers: int) -> Tensor:
    """Row by row."""
    rows = [seen[f"blocks.{layer}.hook_resid_pre"] for layer in range(n_layers)]
    return torch.stack([*rows, seen[f"blocks.{n_layers - 1}.hook_resid_post"]])


def in_words(seen: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace(".", "_"): value for key, value in seen.items()}


def check_accumulated_residual(fn: Fn) -> None:
    """With MLPs and without; two numbers of layers."""
    name, axes = "accumulated_residual", "depth batch pos d_model"
    for sizes in SIZES:
        case, seen, cache, _ = run(sizes)
        right = depths(seen, case.n_layers)
        posts = torch.stack([seen[f"blocks.{layer}.hook_resid_post"] for layer in range(case.n_layers)])
        mistakes = {
            "the last row is missing: what the last layer leaves.": right[:-1],
            "the first row is missing: what the first layer finds.": posts,
            "the rows are in reverse order.": right.flip(0),
            "`resid_post` stands in the row of its layer's `resid_pre`.": torch.cat([posts, posts[-1:]]),
            "the rows are what each layer adds, not what has come together.": torch.cat(
                [right[:1], right[1:] - right[:-1]]
            ),
            "the last row is the one before, once more.": torch.cat([right[:-1], right[-2:-1]]),
        }
        if not case.model.cfg.attn_only:
            mids = torch.stack([seen[f"blocks.{layer}.hook_resid_mid"] for layer in range(case.n_layers)])
            mistakes["`resid_mid` is taken; the statement asks for `resid_pre`."] = torch.cat([mids, right[-1:]])
        with unchanged(name, **in_words(seen)):
            actual = fn(cache)
        compare(f"{name} {case.words}", actual, right, axes, mistakes)


def normed(model: ToyTransformer, resid: Tensor) -> Tensor:
    """The final LayerNorm, by PyTorch."""
    final = model.ln_final
    return F.layer_norm(resid, (8,), final.w, final.b, eps=0.1).detach()


def onto(vectors: Tensor, directions: Tensor) -> Tensor:
    """The dot product with each prompt's direction, prompt by prompt, on the axes [... batch pos d_model]."""
    return torch.stack([vectors[..., row, :, :] @ directions[row] for row in range(len(directions))], dim=-2)


def check_logit_lens(fn: Fn) -> None:
    """Each depth through its own LayerNorm; and that the last row is what the model says."""
    name, axes = "logit_lens", "depth batch pos"
    for sizes in SIZES:
        case, seen, cache, directions = run(sizes)
        stream, final = depths(seen, case.n_layers), case.model.ln_final
        right = onto(normed(case.model, stream), directions)
        centred = stream - stream.mean(-1, keepdim=True)
        one_scale = (centred / seen["ln_final.hook_scale"] * final.w + final.b).detach()
        mistakes = {
            "the final LayerNorm is left out.": onto(stream, directions),
            "every depth is divided by the scale of the last; each has its own.": onto(one_scale, directions),
            "the LayerNorm's `w` and `b` are left out.": onto(F.layer_norm(stream, (8,), eps=0.1), directions),
            "the last row is missing: what the last layer leaves.": right[:-1],
            "the rows are in reverse order.": right.flip(0),
            "only the last position is read; give all of them.": right[..., -1],
            "it is the mean over the prompts; give one number for each.": right.mean(1),
        }
        if case.n_batch > 1:
            first = directions[:1].expand_as(directions)
            mistakes["every prompt is read along the first one's direction."] = onto(normed(case.model, stream), first)
        with unchanged(name, **in_words(seen), directions=directions):
            actual = fn(cache, case.model, directions)
        compare(f"{name} {case.words}", actual, right, axes, mistakes)


def check_head_attribution(fn: Fn) -> None:
    """Every head by a loop; and that the parts sum to the whole."""
    name = "head_attribution"
    for sizes in SIZES:
        assert_attribution(name, fn, *run(sizes))


def assert_attribution(
    name: str, fn: Fn, case: Case, seen: dict[str, Tensor], cache: ActivationCache, directions: Tensor
) -> None:
    """One case of attribution to heads."""
    axes = "layer head batch pos"
    w, b, scale = case.model.ln_final.w.detach(), case.model.ln_final.b.detach(), seen["ln_final.hook_scale"]

    def table(through: Callable[[Tensor], Tensor]) -> Tensor:
        rows = []
        for layer in range(case.n_layers):
            result = seen[f"blocks.{layer}.attn.hook_result"]
            rows.append(torch.stack([through(result[:, :, head]) for head in range(case.n_heads)]))
        return torch.stack(rows)

    def centred(part: Tensor) -> Tensor:
        return part - part.mean(-1, keepdim=True)

    right = onto(table(lambda part: centred(part) / scale * w), directions)
    biases = torch.stack([block.attn.b_O.detach() for block in case.model.blocks])[:, None, None, None]
    spread = centred(biases).expand(-1, case.n_heads, -1, -1, -1) / case.n_heads / scale * w
    mistakes = {
        "the final LayerNorm's scale is left out.": onto(table(lambda part: centred(part) * w), directions),
        "the final LayerNorm's `w` is left out.": onto(table(lambda part: centred(part) / scale), directions),
        "a head's own mean is not subtracted.": onto(table(lambda part: part / scale * w), directions),
        "the final LayerNorm is left out.": onto(table(lambda part: part), directions),
        "each head gets a scale of its own; divide by that of the whole stream.": onto(
            table(lambda part: F.layer_norm(part, (8,), w, eps=0.1)), directions
        ),
        "the model's LayerNorm is applied to each head alone; divide by the scale of the whole stream.": onto(
            table(lambda part: normed(case.model, part)), directions
        ),
        "`ln_final.b` is added to every head.": onto(table(lambda part: centred(part) / scale * w + b), directions),
        "`b_O` is spread over the heads.": right + onto(spread.expand(-1, -1, case.n_batch, -1, -1), directions),
        "every position is divided by the scale of the last.": onto(
            table(lambda part: centred(part) / scale[:, -1:] * w), directions
        ),
        "the layers are in reverse order.": right.flip(0),
        "only the last position is read; give all of them.": right[..., -1],
        "it is the mean over the prompts; give one number for each.": right.mean(2),
    }
    if case.n_batch > 1:
        first = directions[:1].expand_as(directions)
        mistakes["every prompt is read along the first one's direction."] = onto(
            table(lambda part: centred(part) / scale * w), first
        )
    with unchanged(name, **in_words(seen), directions=directions):
        actual = fn(cache, case.model, directions)
    compare(f"{name} {case.words}", actual, right, axes, mistakes)
