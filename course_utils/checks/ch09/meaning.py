"""Checks of chapter 09, meaning: the tokens on which latents are largest, histograms, effects on logits, and heads."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch09.small import ATTN_OUT, D_MODEL, Counted, Fn, held, padded, small_model
from course_utils.checks.comparing import compare, follows_input, parts, unchanged
from course_utils.checks.leftovers import nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.standins.small_dictionary import SmallDictionary

# ------------------------------------------------------------------------------------------------------- top_examples


def sorting(
    key: Callable[[Tensor], Tensor] = lambda values: values,
    number: Callable[[int, int, int], int] = lambda chunk, row, before: before + row,
    which: Callable[[list[Tensor]], list[Tensor]] = lambda chunks: chunks,
    pack: Callable[[Tensor, Tensor], Any] = lambda values, places: (values, places),
) -> Fn:
    """Everything at once, latent by latent."""

    def top_examples(chunks: Iterable[Tensor], k: int) -> Any:
        kept, before, names = which(list(chunks)), 0, []
        for i, chunk in enumerate(kept):
            names += [number(i, row, before) for row in range(len(chunk))]
            before += len(chunk)
        every = torch.cat(kept)
        values, places = [], []
        for column in every.unbind(1):
            order = sorted(range(len(column)), key=lambda row, column=column: -float(key(column)[row]))[:k]  # type: ignore[misc]
            values.append(column[order])
            places.append(torch.tensor([names[row] for row in order]))
        return pack(torch.stack(values, 1), torch.stack(places, 1))

    return top_examples


@known_mistakes(
    {
        "places are counted in each chunk from 0; count in the whole stream.": sorting(
            number=lambda chunk, row, before: row
        ),
        "only the last chunk is looked at.": sorting(which=lambda chunks: chunks[-1:]),
        "only the first chunk is looked at.": sorting(which=lambda chunks: chunks[:1]),
        "the smallest come first.": sorting(lambda values: -values),
        "it goes by the absolute value.": sorting(lambda values: values.abs()),
        "places are the numbers of the chunks.": sorting(number=lambda chunk, row, before: chunk),
        "the axes are swapped: ranks come first, then latents.": sorting(
            pack=lambda values, places: (values.T.contiguous(), places.T.contiguous())
        ),
    }
)
def check_top_examples(fn: Fn) -> None:
    """Chunks of several sizes, fewer tokens than k, and how many chunks are held at a time."""
    name = "top_examples"
    for sizes, n_latents, k in (((4, 1, 6), 5, 3), ((2, 7), 3, 5), ((2, 1), 4, 6), ((5,), 2, 2)):
        chunks = [noise(n, n_latents, seed=seed + k) for seed, n in enumerate(sizes)]
        words = f"{name} of chunks of {sizes} tokens, k={k}"
        with unchanged(name, **{f"chunk {i}": chunk for i, chunk in enumerate(chunks)}):
            answer = parts(words, fn(iter(chunks), k), "values", "places")
        for label, actual, right in zip(("values", "places"), answer, sorting()(chunks, k), strict=True):
            compare(f"{words}: {label}", actual, right, "rank latent")
    follows_input(name, lambda chunk: fn([chunk, -chunk], 4)[0], (noise(3, 2),), "rank latent")
    fn(Counted(name, "chunks", limit=3), 2)


# ------------------------------------------------------------------------------------------------- activation_histogram

Bin = Callable[[float, list[float]], int | None]


def bin_of(value: float, edges: list[float]) -> int | None:
    return min(max(sum(value >= edge for edge in edges) - 1, 0), len(edges) - 2)


def counting(find: Bin = bin_of, only: Callable[[float], bool] = lambda value: True, whole: bool = True) -> Fn:
    """Value by value."""

    def activation_histogram(chunks: Iterable[Tensor], edges: Tensor) -> Tensor:
        every = torch.cat(list(chunks) if whole else list(chunks)[-1:])
        counts = torch.zeros(every.shape[1], len(edges) - 1, dtype=torch.int64)
        for latent, column in enumerate(every.unbind(1)):
            for value in filter(only, column.tolist()):
                place = find(value, edges.tolist())
                if place is not None:
                    counts[latent, place] += 1
        return counts

    return activation_histogram


def within(value: float, edges: list[float]) -> int | None:
    return bin_of(value, edges) if edges[0] <= value <= edges[-1] else None


def not_above(value: float, edges: list[float]) -> int | None:
    return bin_of(value, edges) if value < edges[-1] else None


def upper(value: float, edges: list[float]) -> int | None:
    return min(max(sum(value > edge for edge in edges) - 1, 0), len(edges) - 2)


@known_mistakes(
    {
        "only tokens on which the latent fires count; all do.": counting(only=lambda value: value > 0),
        "what lies outside the edges is left out; it belongs to the first or to the last bin.": counting(within),
        "what lies at the last edge or above is left out; it belongs to the last bin.": counting(not_above),
        "a value on an edge counts in the bin before; it belongs to the next.": counting(upper),
        "only the last chunk is counted.": counting(whole=False),
    }
)
def check_activation_histogram(fn: Fn) -> None:
    """Values on the edges, outside them, and many at 0."""
    name = "activation_histogram"
    for sizes, n_latents, edges in (
        ((4, 1, 6), 3, [0.0, 0.5, 2.0, 2.5]),
        ((5,), 2, [-1.0, 0.0, 1.5]),
        ((2, 2), 5, [0.0, 1.0]),
    ):
        chunks = [(2 * noise(n, n_latents, seed=seed + n)).round() / 2 for seed, n in enumerate(sizes)]
        chunks = [chunk * (noise(*chunk.shape, seed=9) > -0.5) for chunk in chunks]
        given = torch.tensor(edges)
        with unchanged(name, edges=given, **{f"chunk {i}": chunk for i, chunk in enumerate(chunks)}):
            actual = fn(iter(chunks), given)
        compare(f"{name} of chunks of {sizes} tokens, edges {edges}", actual, counting()(chunks, given), "latent bin")
    fn(Counted(name, "chunks", limit=3), torch.tensor([0.0, 1.0, 2.0]))


# -------------------------------------------------------------------------------------------------------- logit_effect


def straight(
    centre: Callable[[Any], bool] = lambda model: model.cfg.normalization == "LN",
    weight: Callable[[Any], bool] = lambda model: model.cfg.normalization != "none",
    mean: bool = True,
    unit: bool = False,
    bias: bool = False,
    matrix: Callable[[Any], Tensor] = lambda model: model.unembed.W_U,
) -> Fn:
    """Direction by direction."""

    def logit_effect(model: Any, directions: Tensor) -> Tensor:
        rows = []
        for direction in directions:
            if centre(model):
                direction = direction - direction.sum() / len(direction)
            if unit:
                direction = direction / direction.square().mean().sqrt()
            if weight(model):
                direction = direction * model.ln_final.w
            row = torch.stack([direction @ column for column in matrix(model).unbind(1)])
            row = row + (model.unembed.b_U if bias else 0)
            rows.append(row - (row.sum() / len(row) if mean else 0))
        return torch.stack(rows)

    return logit_effect


@known_mistakes(
    {
        "the final norm's `w` is left out.": straight(weight=lambda model: False),
        "the mean over d_model is not subtracted; LayerNorm does it.": straight(centre=lambda model: False),
        "the mean over d_model is subtracted whatever the normalisation; only LayerNorm does it.": straight(
            centre=lambda model: True
        ),
        "the mean over the vocabulary is not subtracted.": straight(mean=False),
        "the direction is normalised; twice the direction has twice the effect.": straight(unit=True),
        "`b_U` is added.": straight(bias=True, mean=False),
        "the embedding is used; the unembedding has a matrix of its own.": straight(
            matrix=lambda model: model.embed.W_E.T
        ),
    }
)
def check_logit_effect(fn: Fn) -> None:
    """With a LayerNorm, an RMSNorm, and none."""
    name = "logit_effect"
    rotary = {"positions": "rotary", "rotary_dim": 2, "normalization": "RMS", "n_kv_heads": 1, "gated": True}
    for changes in ({}, rotary, {"normalization": "none"}):
        model, directions = small_model(**changes), noise(4, D_MODEL, seed=3) + 0.7
        with unchanged(name, directions=directions), nothing_left_behind(name, model):
            actual = fn(model, directions)
        words = f"{name} with normalization {model.cfg.normalization!r}"
        compare(words, actual, straight()(model, directions), "latent d_vocab")
    follows_input(name, lambda *inputs: fn(*inputs).detach(), (small_model(), directions), "latent d_vocab")


# ------------------------------------------------------------------------------------------- direct_feature_attribution


DEEP_ATTN_OUT = "blocks.10.hook_attn_out"


def without_each(
    direction: Callable[[Any, int], Tensor] = lambda dictionary, latent: dictionary.sae.W_enc[:, latent],
    scaled: bool = True,
    pattern: Callable[[Tensor, int], Tensor] = lambda pattern, query: pattern[0, :, query],
    layer: Callable[[int], int] = lambda layer: layer,
    turned: bool = False,
) -> Fn:
    """Every head's result at every key, by loops."""

    def direct_feature_attribution(model: Any, dictionary: Any, tokens: Tensor, latent: int, query: int) -> Tensor:
        number = layer(int(dictionary.hook_name.split(".")[1]))
        weights = pattern(held(model, tokens[None], f"blocks.{number}.attn.hook_pattern"), query)
        v = held(model, tokens[None], f"blocks.{number}.attn.hook_v")[0]
        reads = direction(dictionary, latent).detach() * (dictionary.scale if scaled else 1)
        W_O = model.blocks[number].attn.W_O.detach()
        out = torch.zeros(len(W_O), len(tokens), dtype=v.dtype)
        for head in range(len(W_O)):
            for key in range(len(tokens)):
                out[head, key] = weights[head, key] * (v[key, head] @ W_O[head]) @ reads
        return out.T.contiguous() if turned else out

    return direct_feature_attribution


@known_mistakes(
    {
        "the decoder's row is used; what makes a latent fire is the encoder's column.": without_each(
            lambda dictionary, latent: dictionary.sae.W_dec[latent]
        ),
        "the dictionary's scale is left out.": without_each(scaled=False),
        "the pattern is left out: it is what each value would contribute if it were looked at alone.": without_each(
            pattern=lambda pattern, query: torch.ones_like(pattern[0, :, query])
        ),
        "query and key are swapped in the pattern.": without_each(
            pattern=lambda pattern, query: pattern[0, :, :, query]
        ),
        "it is always the last position that looks.": without_each(pattern=lambda pattern, query: pattern[0, :, -1]),
        "it is another layer's attention.": without_each(layer=lambda layer: 1 - layer),
        "the layer is one character of the hook point's name; layers from 10 on have two digits.": without_each(
            layer=lambda layer: int(str(layer)[0])
        ),
        "the axes are swapped: heads come first, then keys.": without_each(turned=True),
    }
)
def check_direct_feature_attribution(fn: Fn) -> None:
    """Against every head's result at every key; and all together against the pre-activation."""
    name, shallow = "direct_feature_attribution", small_model()
    for model, hook_name, n_pos, latent, query in (
        (shallow, ATTN_OUT, 5, 2, 3),
        (shallow, "blocks.0.hook_attn_out", 4, 0, 3),
        (deep_model(), DEEP_ATTN_OUT, 6, 5, 1),
    ):
        dictionary, tokens = SmallDictionary(hook_name, D_MODEL), padded((n_pos,), n_pos)[0][0]
        right = deep_answer() if model is deep_model() else without_each()(model, dictionary, tokens, latent, query)
        with unchanged(name, tokens=tokens), nothing_left_behind(name, model):
            actual = fn(model, dictionary, tokens, latent, query)
        compare(f"{name} at {hook_name}, latent {latent}, query {query}", actual, right, "head key")
        if actual.requires_grad:
            raise CheckFailed(f"{name}: gradients are recorded.\n  Next: run the model under `torch.no_grad()`.")
    dictionary, tokens = SmallDictionary(ATTN_OUT, D_MODEL), padded((6,), 6)[0][0]
    doubled = (shallow.double(), dictionary.double(), tokens, 5, 1)
    compare(f"{name} in float64", fn(*doubled), without_each()(*doubled), "head key")


@cache
def deep_model() -> Any:
    """Eleven layers: the last has a number of two digits. The smallest that its dictionary fits."""
    return small_model(n_layers=11, n_heads=1, d_head=2, d_mlp=1)


@cache
def deep_answer() -> Tensor:
    """The right answer in the deep model, whose runs are long: worked out once."""
    return without_each()(deep_model(), SmallDictionary(DEEP_ATTN_OUT, D_MODEL), padded((6,), 6)[0][0], 5, 1)
