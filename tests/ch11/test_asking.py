"""What the checks of asking in chapter 11 cannot know: see tests/test_checks.py."""

from typing import Any

import torch

import solutions.ch11_oracles as ref
from course_utils.checks.ch11.asking import injecting, length, running, unit
from course_utils.checks.ch11.small import small_model
from course_utils.data.questions import D_VOCAB, N_TALES, PLACEHOLDER
from course_utils.hooks import add_hook
from tests.ch11 import other_oracles as other

SECRETS = (".norm(dim=-1", "torch.where(lengths")
ONLY_ON_GPU = "device="
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "-1 -> 1",  # of two axes
    "lengths > 0 -> lengths != 0",  # no length is negative
}


def leaves_its_hook(oracle: Any, tokens: Any, vectors: Any, layer: int = 1) -> Any:
    add_hook(oracle, "hook_embed", lambda activation, hook: None)
    return other.run_oracle(oracle, tokens, vectors, layer)


def in_place(stream: Any, vectors: Any, places: Any) -> Any:
    stream.copy_(other.inject(stream, vectors, places))
    return stream


def no_number_backwards(stream: Any, vectors: Any, places: Any) -> Any:
    """Right, but what is thrown away afterwards was divided by zero."""
    units = (vectors / vectors.norm(dim=-1, keepdim=True)).nan_to_num()
    return stream + stream.norm(dim=-1, keepdim=True) * torch.zeros_like(stream).masked_scatter(
        places[..., None], units
    )


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "inject": [
        ("it changed `stream`", in_place),
        ("values are wrong", injecting(lambda there, vector: there - length(there) * unit(vector))),
        ("no gradient gets through", lambda *arguments: other.inject(*arguments).detach()),
        ("its gradient is NaN", no_number_backwards),
    ],
    "run_oracle": [
        ("a hook is left behind", leaves_its_hook),
        ("no gradient gets to the vectors", lambda o, t, v, layer=1: other.run_oracle(o, t, v.detach(), layer)),
        ("wrong shape", lambda o, t, v, layer=1: other.run_oracle(o, t, v, layer)[:, -1]),
        ("values are wrong", lambda o, t, v, layer=1: other.run_oracle(o, t, v.flip(1), layer)),
    ],
}

ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}
ALSO_RIGHT["run_oracle"].append(running())


def test_an_oracle_begins_as_a_copy() -> None:
    """It says of the old tokens what the model says, up to the share that new ones take."""
    model = small_model(N_TALES)
    model.tokenizer = None
    oracle = ref.oracle_from(model, type(model), torch.Generator().manual_seed(0))
    tokens = torch.arange(5)[None]
    assert oracle.cfg.d_vocab == D_VOCAB == oracle.embed.W_E.shape[0] == oracle.unembed.W_U.shape[1]
    with torch.no_grad():
        torch.testing.assert_close(oracle(tokens)[..., :N_TALES], model(tokens))
    assert oracle.embed.W_E[PLACEHOLDER].any()
