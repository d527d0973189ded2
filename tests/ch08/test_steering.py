"""What the checks of using vectors cannot know: see tests/test_checks.py."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

import solutions.ch08_function_vectors as ref
from course_utils.checks.ch08.small import D_MODEL, small_model, tokens_of
from course_utils.checks.ch08.steering import added_in_front, adder, contrast, edit, in_front, put
from course_utils.checks.modules import noise
from course_utils.hooks import add_hook, hook_points, reset_hooks, run_with_cache
from tests.ch08 import other_function_vectors as other

SECRETS = ("deepcopy(", ".clone()", "[:, position]", "[..., None]")
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "0 -> -1",  # of one row and one position
    # more is kept than is read
    "run_with_cache(model, torch.stack([plus, minus]), names=place) -> "
    "run_with_cache(model, torch.stack([plus, minus]))",
    "len(plus) -> plus",  # in the message
    "len(minus) -> minus",
}


@contextmanager
def in_place(model: Any, layer: int, vector: Any, scale: float = 1.0, position: Any = -1) -> Iterator[None]:
    handle = model.blocks[layer].hook_resid_post.add(lambda resid, hook: put(resid, vector, scale, position))
    yield
    handle.remove()


@contextmanager
def resets_all(model: Any, layer: int, vector: Any, scale: float = 1.0, position: Any = -1) -> Iterator[None]:
    add_hook(model, f"blocks.{layer}.hook_resid_post", lambda resid, hook: put(resid.clone(), vector, scale, position))
    yield
    reset_hooks(model)


@contextmanager
def stays_after_an_error(model: Any, layer: int, vector: Any, scale: float = 1.0, position: Any = -1) -> Iterator[None]:
    def add(resid: Any, hook: Any) -> Any:
        return put(resid.clone(), vector, scale, position)

    handle = model.blocks[layer].hook_resid_post.add(add)
    yield
    handle.remove()


def once(manager: Any) -> Any:
    """What it does in the first run only."""

    @contextmanager
    def context(model: Any, *given: Any, **more: Any) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(manager(model, *given, **more))
            stack.callback(model.register_forward_hook(lambda *_: stack.close()).remove)
            yield

    return context


def without_gradients(manager: Any) -> Any:
    @contextmanager
    def context(*given: Any, **more: Any) -> Iterator[None]:
        with torch.no_grad(), manager(*given, **more):
            yield

    return context


def any_lengths(model: Any, layer: int, plus: Any, minus: Any, scale: float = 1.0) -> Any:
    n = min(len(plus), len(minus))
    return added_in_front()(model, layer, plus[:n], minus[:n], scale)


def hooked_copy(model: Any, direction: Any) -> Any:
    edited = ref.ablate_direction(model, direction)
    add_hook(edited, "*hook_resid_post", lambda resid, hook: resid * 1.01)
    return edited


def only_hooked(model: Any, direction: Any) -> Any:
    """The logits of an edited model, by hooks on what is written."""
    if model.cfg.tied:
        raise ValueError("tied")
    hooked = copy.deepcopy(model)
    for place, point in hook_points(hooked).items():
        if place.endswith(("embed", "attn_out", "mlp_out")):
            point.add(lambda written, hook: ref.without_direction(written, direction))
    return hooked


def shares_the_rest(model: Any, direction: Any) -> Any:
    own = {
        id(parameter): parameter for entry, parameter in model.named_parameters() if entry.endswith(("ln1.w", "W_U"))
    }
    return edit(copied=lambda model: copy.deepcopy(model, own))(model, direction)


def in_the_model(model: Any, direction: Any) -> Any:
    return edit(copied=lambda model: model)(model, direction)


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "add_vector": [
        ("it writes into the stream that the model computed", in_place),
        ("hooks that others had attached", resets_all),
        ("a hook is left behind", stays_after_an_error),
        ("expected something that `with` can open", lambda *args, **kwargs: None),
        ("values are wrong", adder(layer=lambda layer: 1)),
        ("position=0", adder(lambda resid, vector, scale, position: put(resid, vector, scale, position or -1))),
        ("scale=0.0", adder(lambda resid, vector, scale, position: put(resid, vector, scale or 1.0, position))),
        ("one of several runs", once(ref.add_vector)),
        ("gradients are not recorded", without_gradients(ref.add_vector)),
    ],
    "vector_logits": [
        ("values are wrong", lambda model, vector: ref.vector_logits(model, 2 * vector) + 1),
        ("wrong shape", lambda model, vector: ref.vector_logits(model, vector)[None]),
        (  # without the norm's eps
            "values are wrong",
            lambda model, v: ref.vector_logits(model, v if model.cfg.normalization == "none" else 1000 * v),
        ),
    ],
    "contrastive_vector": [
        ("values are wrong", contrast(lambda a, b: (a[:, 0] - b[:, 0]).mean(0))),
        ("wrong shape", contrast(lambda a, b: a[:, -1] - b[:, -1])),
    ],
    "activation_addition": [
        ("should raise ValueError", any_lengths),
        ("values are wrong", added_in_front(lambda resid, d, scale: resid + scale * d.sum(0))),
        ("scale=0.0", added_in_front(lambda resid, d, scale: in_front(resid, d, scale or 1.0))),
        ("a second run", once(ref.activation_addition)),
        ("gradients are not recorded", without_gradients(ref.activation_addition)),
    ],
    "without_direction": [
        ("values are wrong", lambda activation, direction: activation - activation.mean(-1, keepdim=True)),
        ("wrong shape", lambda activation, direction: ref.without_direction(activation, direction)[None]),
    ],
    "ablate_direction": [
        ("values are wrong", hooked_copy),
        ("in place", in_the_model),
        ("should raise ValueError", edit(refuses=False)),
        ("expected a model", lambda model, direction: ref.ablate_direction(model, direction) and None),
        ("still has a part along the direction", only_hooked),
        ("is the model's own", shares_the_rest),
        ("in another mode", lambda model, direction: ref.ablate_direction(model, direction).eval()),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


def test_the_stream_of_an_edited_model_is_at_right_angles_to_the_direction() -> None:
    model, direction = small_model(), 3 * noise(D_MODEL, seed=1)
    with torch.no_grad():
        _, cache = run_with_cache(ref.ablate_direction(model, direction), tokens_of(2, 5), names="*hook_resid*")
    for resid in cache.values():
        assert (resid @ direction).abs().max() < 1e-4


def test_two_vectors_add_up() -> None:
    model, tokens = small_model(), tokens_of(2, 5)
    first, second = noise(D_MODEL, seed=1), noise(D_MODEL, seed=2)
    with torch.no_grad():
        with ref.add_vector(model, 0, first), ref.add_vector(model, 0, second, scale=2.0):
            both = model(tokens)
        with ref.add_vector(model, 0, first + 2 * second):
            torch.testing.assert_close(model(tokens), both)
