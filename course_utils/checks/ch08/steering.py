"""Checks of chapter 08, using vectors: added in a context, read, made of contrasts, and taken out of the weights."""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.ch08.small import (
    D_MODEL,
    ROTARY,
    Fn,
    adding,
    before_blocks,
    logits_with,
    opened,
    small_model,
    streams,
    tokens_of,
    without_graph,
)
from course_utils.checks.comparing import carries_gradient, compare, follows_input, unchanged
from course_utils.checks.leftovers import assert_stops, nothing_left_behind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Stop
from course_utils.checks.plain import must_raise
from course_utils.checks.translating import during
from course_utils.hooks import add_hook, reset_hooks

# ---------------------------------------------------------------------------------------------------------- add_vector

Change = Callable[[Tensor, Tensor, float, Any], Tensor]  # (a copy of the stream, vector, scale, position) -> stream


def put(resid: Tensor, vector: Tensor, scale: float, position: Any) -> Tensor:
    """Row by row."""
    for row in resid:
        row[position] = row[position] + scale * vector
    return resid


def adder(change: Change = put, layer: Callable[[int], int] = lambda layer: layer, place: str = "resid_post") -> Fn:
    def add_vector(model: Any, at: int, vector: Tensor, scale: float = 1.0, position: Any = -1) -> Any:
        return adding(model, layer(at), lambda resid: change(resid, vector, scale, position), place)

    def named(model: Any, layer: int, vector: Tensor, scale: float = 1.0, position: Any = -1) -> Any:
        return add_vector(model, layer, vector, scale, position)

    return named


@contextmanager
def resets_all(model: Any, layer: int, vector: Tensor, scale: float = 1.0, position: Any = -1) -> Iterator[None]:
    """Takes the hooks of others away as well."""
    add_hook(model, f"blocks.{layer}.hook_resid_post", lambda resid, hook: put(resid.clone(), vector, scale, position))
    yield
    reset_hooks(model)


@known_mistakes(
    {
        "the vector is added at every position; `position` says where.": adder(
            lambda resid, vector, scale, position: resid + scale * vector
        ),
        "the vector takes the place of the stream; add it.": adder(
            lambda resid, vector, scale, position: put(resid * 0, vector, scale, position)
        ),
        "the stream at that position is replaced by the vector; add it.": adder(
            lambda resid, vector, scale, position: replaced(resid, scale * vector, position)
        ),
        "`scale` is ignored.": adder(lambda resid, vector, scale, position: put(resid, vector, 1.0, position)),
        "`position` is ignored: it is always the last.": adder(
            lambda resid, vector, scale, position: put(resid, vector, scale, -1)
        ),
        "the vector is added in the first row only.": adder(
            lambda resid, vector, scale, position: torch.cat([put(resid[:1], vector, scale, position), resid[1:]])
        ),
        "the vector is added before the block; add it after.": adder(place="resid_pre"),
        "the vector is scaled to length 1 first.": adder(
            lambda resid, vector, scale, position: put(resid, vector / vector.norm(), scale, position)
        ),
        "the vector is subtracted.": adder(lambda resid, vector, scale, position: put(resid, -vector, scale, position)),
    }
)
def check_add_vector(fn: Fn) -> None:
    """Layers, positions, slices and scales; run after run; hooks before, within and after; an exception within."""
    name, axes = "add_vector", "batch pos d_vocab"
    model, vector = small_model(), noise(D_MODEL, seed=8) * 3
    cases: list[tuple[int, dict[str, Any]]] = [
        (1, {}),
        (0, {"scale": -2.5}),
        (1, {"position": 2, "scale": 0.5}),
        (2, {"position": slice(1, 4)}),
        (0, {"position": slice(None)}),
        (2, {"position": 0}),
        (1, {"scale": 0.0}),
        (0, {"position": -2}),
    ]
    for (layer, options), n_batch in zip(cases, itertools.cycle((4, 1, 3)), strict=False):
        tokens = tokens_of(n_batch, 5, layer)
        call = f"{name}(model, {layer}, vector{''.join(f', {key}={value}' for key, value in options.items())})"
        scale, position = options.get("scale", 1.0), options.get("position", -1)

        def then(
            here: int, resid: Tensor, layer: int = layer, scale: float = scale, position: Any = position
        ) -> Tensor:
            return put(resid.clone(), vector, scale, position) if here == layer else resid

        right = logits_with(model, tokens, then)
        with unchanged(name, vector=vector), nothing_left_behind(name, model):
            actual = _inside(name, call, model, tokens, partial(fn, model, layer, vector, **options))
        compare(call, actual, right, axes)
    several = [tokens_of(2, n_pos, 9) for n_pos in (5, 3)]
    expected = [logits_with(model, tokens, _at(1, vector)) for tokens in several]
    with opened(name, fn(model, 1, vector)), torch.no_grad():
        for tokens, right in zip(several, expected, strict=True):
            compare(f"{name}: one of several runs while the context lasts", model(tokens), right, axes)
    _leaves_gradients_alone(name, lambda: fn(model, 1, vector))
    _leaves_the_stream_alone(name, model, lambda: fn(model, 1, vector))
    _stops(name, model, lambda: fn(model, 1, vector))
    double = copy.deepcopy(model).double()
    right = logits_with(double, tokens, _at(0, vector.double()))
    with opened(name, fn(double, 0, vector.double())), torch.no_grad():
        compare(f"{name} in float64", double(tokens), right, axes)


def _inside(name: str, call: str, model: Any, tokens: Tensor, manager: Callable[[], Any]) -> Tensor:
    """What the model says while the context lasts."""
    with during(call), opened(name, manager()), torch.no_grad():
        return model(tokens)


def _at(layer: int, vector: Tensor) -> Callable[[int, Tensor], Tensor]:
    return lambda here, resid: put(resid.clone(), vector, 1.0, -1) if here == layer else resid


def replaced(resid: Tensor, vector: Tensor, position: Any) -> Tensor:
    resid[:, position] = vector
    return resid


def _leaves_the_stream_alone(name: str, model: Any, manager: Callable[[], Any]) -> None:
    """What an earlier hook saw, and kept, is still what it was."""
    kept: list[tuple[Tensor, Tensor]] = []
    handles = [
        block.hook_resid_post.add(lambda resid, hook: kept.append((resid, resid.detach().clone())))
        for block in model.blocks
    ]
    with opened(name, manager()), torch.no_grad():
        model(tokens_of(2, 5))
    for handle in handles:
        handle.remove()
    if not all(torch.equal(now, before) for now, before in kept):
        raise CheckFailed(
            f"{name}: it writes into the stream that the model computed, which a cache may hold.\n"
            "  Next: clone the activation in your hook, change the clone, and return it."
        )


def _leaves_gradients_alone(name: str, manager: Callable[[], Any]) -> None:
    """Whether they are recorded is for the code in the `with` block to say."""
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded), opened(name, manager()):
            now = torch.is_grad_enabled()
        if now != recorded:
            raise CheckFailed(
                f"{name}: while the context lasts, gradients are {'' if now else 'not '}recorded.\n"
                "  Next: no `torch.no_grad()` or `torch.enable_grad()` around the `yield`."
            )


def _stops(name: str, model: Any, manager: Callable[[], Any]) -> None:
    def run() -> None:
        with manager():
            raise Stop

    with nothing_left_behind(name, model):
        assert_stops(name, run, "the block")


# -------------------------------------------------------------------------------------------------------- vector_logits


def read(
    normalised: Callable[[Any, Tensor], Tensor] = lambda model, vector: by_hand(model, vector),
    matrix: Callable[[Any], Tensor] = lambda model: model.unembed.W_U,
    end: Callable[[Any, Tensor], Tensor] = lambda model, logits: logits + getattr(model.unembed, "b_U", 0),
) -> Fn:
    def vector_logits(model: Any, vector: Tensor) -> Tensor:
        return end(model, normalised(model, vector) @ matrix(model))

    return vector_logits


def by_hand(model: Any, vector: Tensor, with_b: bool = True, centre: bool = True) -> Tensor:
    """The final norm, from its definition."""
    norm, kind = model.ln_final, model.cfg.normalization
    if kind == "none":
        return vector
    centred = vector - vector.mean() if kind == "LN" and centre else vector
    scaled = centred / (centred.square().mean() + model.cfg.layer_norm_eps).sqrt() * norm.w
    return scaled + norm.b if kind == "LN" and with_b else scaled


@known_mistakes(
    {
        "the final norm is left out.": read(normalised=lambda model, vector: vector),
        "the norm's `b` is left out.": read(normalised=partial(by_hand, with_b=False)),
        "the norm does not subtract the mean.": read(normalised=partial(by_hand, centre=False)),
        "`b_U` is left out.": read(end=lambda model, logits: logits),
        "they are probabilities; give the logits.": lambda model, vector: read()(model, vector).softmax(-1),
        "the vector is compared with the embedding; the unembedding has a matrix of its own.": read(
            matrix=lambda model: model.embed.W_E.T
        ),
    }
)
def check_vector_logits(fn: Fn) -> None:
    """With a LayerNorm, an RMSNorm, and none; vectors short enough to show the norm's eps; one with a graph."""
    name = "vector_logits"
    for changes, length in (({}, 1.0), (ROTARY, 1.0), ({"normalization": "none"}, 1.0), ({}, 0.01), (ROTARY, 0.01)):
        model, vector = small_model(1, **changes), length * (noise(D_MODEL, seed=3) + 0.7)
        with unchanged(name, vector=vector), nothing_left_behind(name, model):
            actual = fn(model, vector)
        words = f"{name} with normalization {model.cfg.normalization!r}"
        compare(words, actual, read()(model, vector).detach(), "d_vocab")
    model = small_model(1)
    vector = 100 * vector
    follows_input(name, lambda *inputs: fn(*inputs).detach(), (model, vector), "d_vocab")
    carries_gradient(name, fn, (model, vector))


# --------------------------------------------------------------------------------------------------- contrastive_vector


def contrast(
    of: Callable[[Tensor, Tensor], Tensor] = lambda positive, negative: (positive[:, -1] - negative[:, -1]).mean(0),
    which: Callable[[Any, Tensor], list[Tensor]] = streams,
    layer: Callable[[int], int] = lambda layer: layer,
) -> Fn:
    @torch.no_grad()
    def contrastive_vector(model: Any, positive: Tensor, negative: Tensor, at: int) -> Tensor:
        return of(*(which(model, tokens)[layer(at)] for tokens in (positive, negative)))

    return lambda model, positive, negative, layer: contrastive_vector(model, positive, negative, layer)


@known_mistakes(
    {
        "the sign is wrong: it is positive minus negative.": contrast(
            lambda positive, negative: (negative[:, -1] - positive[:, -1]).mean(0)
        ),
        "it is the mean over all positions; take the last.": contrast(
            lambda positive, negative: (positive - negative).mean((0, 1))
        ),
        "it is the sum over the pairs; take the mean.": contrast(
            lambda positive, negative: (positive[:, -1] - negative[:, -1]).sum(0)
        ),
        "it is the first pair alone.": contrast(lambda positive, negative: positive[0, -1] - negative[0, -1]),
        "it is the stream before the block; take it after.": contrast(which=before_blocks),
        "`layer` is ignored: it is always the last.": contrast(layer=lambda layer: -1),
        "it is scaled to length 1.": contrast(
            lambda positive, negative: torch.nn.functional.normalize((positive[:, -1] - negative[:, -1]).mean(0), dim=0)
        ),
        "it is the mean of the positive texts alone; subtract that of the negative ones.": contrast(
            lambda positive, negative: positive[:, -1].mean(0)
        ),
    }
)
def check_contrastive_vector(fn: Fn) -> None:
    """Each layer; one pair and several; a model of Llama's family."""
    name = "contrastive_vector"
    for model, n_batch in ((small_model(), 4), (small_model(2, **ROTARY), 1)):
        positive, negative = tokens_of(n_batch, 6, 1), tokens_of(n_batch, 6, 2)
        for layer in range(len(model.blocks)):
            with unchanged(name, positive=positive, negative=negative), nothing_left_behind(name, model):
                actual = fn(model, positive, negative, layer)
            without_graph(name, actual)
            words = f"{name} of {n_batch} pairs after layer {layer}"
            compare(words, actual, contrast()(model, positive, negative, layer), "d_model")
    follows_input(name, fn, (model, positive, negative, 1), "d_model")


# -------------------------------------------------------------------------------------------------- activation_addition


def in_front(resid: Tensor, difference: Tensor, scale: float) -> Tensor:
    """Position by position, as far as there is room."""
    for pos in range(min(resid.shape[1], len(difference))):
        resid[:, pos] = resid[:, pos] + scale * difference[pos]
    return resid


def at_the_end(resid: Tensor, difference: Tensor, scale: float) -> Tensor:
    n = min(resid.shape[1], len(difference))
    resid[:, -n:] += scale * difference[-n:]
    return resid


def last_everywhere(resid: Tensor, difference: Tensor, scale: float) -> Tensor:
    return resid + scale * difference[-1]


def mean_in_front(resid: Tensor, difference: Tensor, scale: float) -> Tensor:
    return in_front(resid, difference.mean(0).expand_as(difference), scale)


def added_in_front(
    change: Callable[[Tensor, Tensor, float], Tensor] = in_front,
    which: Callable[[Any, Tensor], list[Tensor]] = streams,
    of: Callable[[Tensor, Tensor], Tensor] = lambda plus, minus: plus - minus,
) -> Fn:
    def activation_addition(model: Any, layer: int, plus: Tensor, minus: Tensor, scale: float = 1.0) -> Any:
        if len(plus) != len(minus):
            raise ValueError("lengths")
        difference = of(*(which(model, tokens[None])[layer][0] for tokens in (plus, minus)))
        return adding(model, layer, lambda resid: change(resid, difference, scale))

    return activation_addition


@known_mistakes(
    {
        "the sign is wrong: it is plus minus minus.": added_in_front(of=lambda plus, minus: minus - plus),
        "only `plus` is added; the difference from `minus` is meant.": added_in_front(of=lambda plus, minus: plus),
        "the difference is added at the last positions; it belongs to the first.": added_in_front(at_the_end),
        "the difference at the last position is added everywhere.": added_in_front(last_everywhere),
        "the mean of the difference is added to each position; every position has its own.": added_in_front(
            mean_in_front
        ),
        "`scale` is ignored.": added_in_front(lambda resid, difference, scale: in_front(resid, difference, 1.0)),
        "the difference is from before the block; take it after.": added_in_front(which=before_blocks),
        "the first positions are replaced; add to them.": added_in_front(
            lambda resid, difference, scale: in_front(
                torch.cat([0 * resid[:, : len(difference)], resid[:, len(difference) :]], 1), difference, scale
            )
        ),
    }
)
def check_activation_addition(fn: Fn) -> None:
    """Layers, scales and lengths; rows shorter than the texts; run after run; hooks before, within and after."""
    name, axes = "activation_addition", "batch pos d_vocab"
    model = small_model()
    for layer, n_text, n_batch, n_pos, scale in (
        (0, 3, 4, 6, 1.0),
        (1, 2, 1, 7, -3.0),
        (2, 5, 2, 3, 2.0),
        (0, 3, 2, 4, 0.0),
        (1, 4, 3, 4, 1.0),
    ):
        plus, minus = tokens_of(1, n_text, 5)[0], tokens_of(1, n_text, 6)[0]
        tokens = tokens_of(n_batch, n_pos, 7)
        call = f"{name}(model, {layer}, plus, minus, scale={scale}) with {n_text} tokens, on rows of {n_pos}"
        difference = streams(model, plus[None])[layer][0] - streams(model, minus[None])[layer][0]

        def then(here: int, resid: Tensor, layer: int = layer, d: Tensor = difference, scale: float = scale) -> Tensor:
            return in_front(resid.clone(), d, scale) if here == layer else resid

        right = logits_with(model, tokens, then)
        with unchanged(name, plus=plus, minus=minus), nothing_left_behind(name, model):
            actual = _inside(name, call, model, tokens, partial(fn, model, layer, plus, minus, scale))
        compare(call, actual, right, axes)
    with opened(name, fn(model, 1, plus, minus)), torch.no_grad():
        compare(f"{name} without a scale", model(tokens), right, axes)
        compare(f"{name}: a second run while the context lasts", model(tokens), right, axes)
    _leaves_gradients_alone(name, lambda: fn(model, 1, plus, minus))
    _leaves_the_stream_alone(name, model, lambda: fn(model, 1, plus, minus))
    _stops(name, model, lambda: fn(model, 1, plus, minus))

    def enter(plus: Tensor, minus: Tensor) -> None:
        with fn(model, 1, plus, minus):
            pass

    for texts in ((plus, minus[1:]), (plus[1:], minus)):
        call = f"{name} with {len(texts[0])} and {len(texts[1])} tokens"
        must_raise(name, ValueError, call, partial(enter, *texts), "compare the lengths of the two texts.")


# ---------------------------------------------------------------------------------------------------- without_direction


def left(amount: Callable[[float, float], float] = lambda dot, square: dot / square) -> Fn:
    """Vector by vector; `amount` says how much of the direction is subtracted, from its dot product and square."""

    def without_direction(activation: Tensor, direction: Tensor) -> Tensor:
        rows = activation.reshape(-1, activation.shape[-1])
        square = float(direction.double() @ direction.double())
        return torch.stack(
            [row - amount(float(row.double() @ direction.double()), square) * direction for row in rows]
        ).reshape(activation.shape)

    return without_direction


@known_mistakes(
    {
        "the direction was not normalised.": left(lambda dot, square: dot),
        "the dot product is with the direction of length 1, and what is subtracted is not.": left(
            lambda dot, square: dot / square**0.5
        ),
        "the part along the direction is turned round; take it away once.": left(lambda dot, square: 2 * dot / square),
        "it is the part along the direction; keep the rest.": lambda activation, direction: (
            activation - left()(activation, direction)
        ),
        "the direction itself is subtracted, not the part along it.": left(lambda dot, square: 1.0),
        "the dot product is divided by the length of the activation as well: that is a cosine.": lambda a, direction: (
            a
            - torch.nn.functional.cosine_similarity(a, direction.expand_as(a), dim=-1)[..., None]
            * direction
            / direction.norm()
        ),
    }
)
def check_without_direction(fn: Fn) -> None:
    """Vectors, matrices and streams; directions of any length."""
    name = "without_direction"
    for shape, axes, length in (
        ((3, 4, 6), "batch pos d_model", 5.0),
        ((6,), "d_model", 0.01),
        ((2, 6), "batch d_model", 1.0),
    ):
        activation = noise(*shape, seed=1)
        direction = noise(6, seed=2)
        direction = direction / direction.norm() * length
        with unchanged(name, activation=activation, direction=direction):
            actual = fn(activation, direction)
        words = f"{name} of shape {shape}, a direction of length {length}"
        compare(words, actual, left()(activation, direction), axes)
    follows_input(name, fn, (noise(3, 4, 6, seed=1), direction), "batch pos d_model", gradient=True)


# ----------------------------------------------------------------------------------------------------- ablate_direction

WRITERS = ("W_E", "W_pos", "W_O", "b_O", "W_out", "b_out")
TAKEN = left()


def edit(
    names: tuple[str, ...] = WRITERS,
    take: Fn = TAKEN,
    copied: Callable[[Any], Any] = copy.deepcopy,
    refuses: bool = True,
) -> Fn:
    @torch.no_grad()
    def ablate_direction(model: Any, direction: Tensor) -> Any:
        if model.cfg.tied and refuses:
            raise ValueError("tied")
        edited = copied(model)
        for name, parameter in edited.named_parameters():
            if name.rpartition(".")[2] in names:
                fits = parameter if parameter.shape[-1] == len(direction) else parameter.movedim(-2, -1)
                fits.copy_(take(fits.clone(), direction))
        return edited

    return ablate_direction


def all_but(*names: str) -> tuple[str, ...]:
    return tuple(name for name in WRITERS if name not in names)


@torch.no_grad()
def ablated_logits(model: Any, tokens: Tensor, direction: Tensor) -> Tensor:
    """The same without an edit: the part along the direction is taken away after each write."""
    take = left()
    resid = take(model.embed(tokens), direction)
    if model.cfg.positions == "learned":
        resid = resid + take(model.pos_embed(tokens), direction)
    for block in model.blocks:
        found, resid = resid, resid + take(block.attn(block.ln1(resid)), direction)
        if hasattr(block, "mlp"):
            resid = resid + take(block.mlp(block.ln2(found if model.cfg.parallel else resid)), direction)
    return model.unembed(model.ln_final(resid))


@known_mistakes(
    {
        "the direction was not normalised.": edit(take=left(lambda dot, square: dot)),
        "the embedding keeps its part.": edit(all_but("W_E")),
        "the position embedding keeps its part.": edit(all_but("W_pos")),
        "`W_O` keeps its part: the heads still write along the direction.": edit(all_but("W_O")),
        "`W_out` keeps its part: the MLPs still write along the direction.": edit(all_but("W_out")),
        "`b_O` keeps its part; a bias writes into the stream as well.": edit(all_but("b_O")),
        "`b_out` keeps its part; a bias writes into the stream as well.": edit(all_but("b_out")),
        "the biases keep their part; they write into the stream as well.": edit(all_but("b_O", "b_out")),
        "only the embeddings are edited; every block writes along the direction again.": edit(("W_E", "W_pos")),
        "the part along the direction is turned round, not taken out.": edit(
            take=left(lambda dot, square: 2 * dot / square)
        ),
        "the unembedding is edited as well.": edit((*WRITERS, "W_U")),
        "nothing is edited.": edit(()),
    }
)
def check_ablate_direction(fn: Fn) -> None:
    """Against a run in which every write loses its part; three families of models; the model itself stays."""
    name, axes = "ablate_direction", "batch pos d_vocab"
    direction, tokens = 4 * noise(D_MODEL, seed=12), tokens_of(3, 5)
    untied = {**ROTARY, "tied": False}
    for model in (
        small_model(2),
        small_model(1, 3, attn_only=True),
        small_model(2, **untied),
        small_model(2, parallel=True),
    ):
        before = {entry: parameter.detach().clone() for entry, parameter in model.named_parameters()}
        right = ablated_logits(model, tokens, direction)
        with unchanged(name, direction=direction), nothing_left_behind(name, model):
            edited = fn(model, direction)
        if not isinstance(edited, nn.Module):
            what = "None" if edited is None else f"a {type(edited).__name__}"
            raise CheckFailed(f"{name}: expected a model, got {what}.\n  Next: return the edited copy.")
        if {entry for entry, _ in edited.named_parameters()} != set(before):
            raise CheckFailed(
                f"{name}: the copy has other parameters than the model.\n  Next: write into the old ones."
            )
        with torch.no_grad():
            actual = edited(tokens)
        words = f"{name}: logits with {model.cfg.positions} positions" + (", no MLPs" if model.cfg.attn_only else "")
        compare(words, actual, right, axes, rtol=1e-3, atol=1e-4)
        _keeps_the_rest(name, edited, before)
        _is_a_copy_that_was_edited(name, edited, model, direction)
    tied = small_model(1, **ROTARY, tied=True)
    must_raise(name, ValueError, f"{name} of a model with cfg.tied", partial(fn, tied, direction), "see the docstring.")
    double = small_model(1).double()
    with torch.no_grad():
        actual = fn(double, direction.double())(tokens)
    compare(f"{name} in float64", actual, ablated_logits(double, tokens, direction.double()), axes)


def _is_a_copy_that_was_edited(name: str, edited: Any, model: Any, direction: Tensor) -> None:
    """It shares nothing with the model, does by its weights what it does, and is in the same mode."""
    own = dict(model.named_parameters())
    for entry, parameter in edited.named_parameters():
        if parameter.data_ptr() == own[entry].data_ptr():
            raise CheckFailed(
                f"{name}: `{entry}` of the copy is the model's own: training one would change the other.\n"
                "  Next: copy the whole model, as copy.deepcopy does."
            )
        if entry.rpartition(".")[2] in WRITERS and (parameter @ direction).abs().max() > 1e-3 * direction.norm():
            raise CheckFailed(
                f"{name}: `{entry}` still has a part along the direction, although the logits are right.\n"
                "  Next: edit the weights; hooks are lost when the model is saved."
            )
    if edited.training != model.training:
        raise CheckFailed(f"{name}: the copy is in another mode than the model.\n  Next: leave `.training` as it is.")


def _keeps_the_rest(name: str, edited: Any, before: dict[str, Tensor]) -> None:
    """An edit of the weights, no hooks; and only of those that write."""
    for entry, parameter in edited.named_parameters():
        if entry.rpartition(".")[2] not in WRITERS and not torch.equal(parameter, before[entry]):
            raise CheckFailed(
                f"{name}: `{entry}` changed, which does not write into the stream.\n"
                "  Next: edit what writes: the embeddings, W_O, b_O, W_out, b_out."
            )
        if not isinstance(parameter, nn.Parameter) or not parameter.requires_grad:
            raise CheckFailed(
                f"{name}: `{entry}` takes no gradients any more.\n"
                "  Next: write into the parameter, under torch.no_grad()."
            )
