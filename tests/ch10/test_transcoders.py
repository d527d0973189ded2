"""What the checks of transcoders in chapter 10 cannot know: see tests/test_checks.py."""

from typing import Any

import pytest
import torch

import solutions.ch10_circuits as ref
from course_utils.checks.ch10.small import KINDS, model_of, tokens_of, transcoders_of
from course_utils.checks.ch10.transcoders import losses, missed, spliced, wrong
from course_utils.hooks import add_hook
from tests.ch10 import other_circuits as other

SECRETS = ("topk_latents(", "W_dec +", "transcoder(reads", "ln2.normalized")
# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    # more is kept than is needed
    "run_with_cache(model, tokens, names=['*ln2.hook_normalized', '*hook_mlp_out']) -> run_with_cache(model, tokens)",
}


def leaves_its_hook(model: Any, transcoders: Any, tokens: Any, errors: Any = None) -> Any:
    answer = other.run_replaced(model, transcoders, tokens, errors)
    add_hook(model, "hook_embed", lambda activation, hook: None)
    return answer


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "Transcoder": [
        ("values", wrong(pre=lambda self, x: x @ self.W_enc - self.b_enc)),
        ("values", wrong(forward=lambda self, x: 2 * self.decode(self.encode(x)))),
        ("no gradient", wrong(forward=lambda self, x: self.decode(self.encode(x)).detach())),
        ("wrong shape", wrong(encode=lambda self, x: self.pre(x)[..., :2])),
    ],
    "transcoder_loss": [
        ("wrong", losses(share=lambda error, around: error.pow(2).sum() / (around.pow(2).sum() + 1))),
        ("wrong", losses(share=lambda error, around: error.pow(2).mean() / around.var(0).mean())),
        ("no gradient", lambda *args: other.transcoder_loss(*args).detach()),
        ("wrong shape", lambda *args: other.transcoder_loss(*args)[None]),
        ("Tensor, got a float", lambda *args: other.transcoder_loss(*args).item()),
    ],
    "mlp_errors": [
        ("values are wrong", missed(layer_of=lambda layer: -1)),
        ("wrong shape", lambda *args: other.mlp_errors(*args)[1:]),
        ("values are wrong", lambda *args: other.mlp_errors(*args).abs()),
    ],
    "run_replaced": [
        ("a hook is left behind", leaves_its_hook),
        ("values are wrong", spliced(error_of=lambda errors, layer: errors[-1 - layer])),
        ("should raise ValueError", lambda *args: spliced()(*args) if args[0].cfg.d_mlp else args[0](args[2])),
        ("no gradient", lambda *args: other.run_replaced(*args).detach()),
        ("the gradient at W_dec", spliced(write=lambda transcoder, x, own, error: transcoder(x.detach()) + error)),
    ],
}
ALSO_RIGHT: dict[str, list[Any]] = {name: [getattr(other, name)] for name in SURPRISES}


@pytest.mark.parametrize("kind", KINDS)
def test_the_replacement_model_with_its_errors_is_the_model(kind: str) -> None:
    model, tokens, transcoders = model_of(kind), tokens_of(2), transcoders_of()
    errors = ref.mlp_errors(model, transcoders, tokens)
    torch.testing.assert_close(
        ref.run_replaced(model, transcoders, tokens, errors), model(tokens), rtol=1e-4, atol=1e-4
    )
