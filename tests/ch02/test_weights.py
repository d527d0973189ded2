"""Where weights begin, and GPT-2's: mistakes that the checks do not know, right answers in another style, GPT-2."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import solutions.ch02_transformer as ref
from course_utils.checks import CheckFailed, run_check
from course_utils.checks.by_loops import transformer
from course_utils.checks.ch02.weights import check_init_weights, initialise
from course_utils.config import TransformerConfig
from tests.ch02 import other_transformer as other

SECRETS = ("einsum(", "rearrange(", ".chunk(", ".normal_(0")

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "symbol == 'w' -> symbol >= 'w'",
    "True -> False",  # zip(strict=True) of equal lengths
    "zip('QKV', weights, biases, strict=True) -> zip('QKV', weights, biases)",
}


def initialised(**wrong: Any) -> Callable[..., None]:
    return functools.partial(initialise, **wrong)


def another_constant(symbol: str, value: float) -> Callable[..., None]:
    """Every parameter of that name is filled with this number."""

    def init_weights(model: Any, std: float, generator: torch.Generator) -> None:
        ref.init_weights(model, std, generator)
        for name, parameter in model.named_parameters():
            if name.split(".")[-1] == symbol:
                parameter.data.fill_(value)

    return init_weights


def seeded_by_size(shape: Any, generator: torch.Generator) -> torch.Tensor:
    seeded_by_size.calls = getattr(seeded_by_size, "calls", 0) % 21 + 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seeded_by_size.calls))


def parameter_exchanged(model: Any, std: float, generator: torch.Generator) -> None:
    ref.init_weights(model, std, generator)
    model.get_submodule("embed").W_E = nn.Parameter(model.get_parameter("embed.W_E").detach().clone())


def changed(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Callable[..., Any]:
    """The right dict, then changed: `change(ours, theirs)`."""

    def convert(state_dict: Any, cfg: Any) -> Any:
        ours = ref.convert_gpt2_weights(state_dict, cfg)
        change(ours, state_dict)
        return ours

    return convert


def with_entry(
    entry: str, change: Callable[[Any], Any] = lambda weight: weight, from_ours: str | None = None
) -> Callable[..., Any]:
    """The right dict, but for one entry, which is made from itself or from another."""
    return changed(lambda ours, theirs: ours.update({entry: change(ours[from_ours or entry])}))


def layer_by_its_first_digit(ours: dict[str, Any]) -> dict[str, Any]:
    """Layer 10 becomes what layer 1 is."""
    return {name.replace("blocks.1.", "blocks.10."): weight for name, weight in ours.items() if "blocks.1." in name}


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "init_weights": [
        ("it drew from torch's global random numbers", initialised(draw=lambda shape, generator: torch.randn(shape))),
        (
            "draw from a normal distribution",
            initialised(draw=lambda shape, generator: (torch.rand(shape, generator=generator) * 2 - 1) * 3**0.5),
        ),
        (
            "hold the same random numbers",
            initialised(
                draw=lambda shape, generator: torch.randn(
                    shape, generator=generator.manual_seed(generator.initial_seed())
                )
            ),
        ),
        ("two different seeds gave the same", initialised(draw=seeded_by_size)),
        ("`blocks.0.ln1.w`: 32 of 32 values are wrong", another_constant("w", 0.0)),
        ("`blocks.0.attn.b_K`: 36 of 36 values are wrong", another_constant("b_K", 0.01)),
        (
            "has standard deviation 0.0",
            initialised(scaled=lambda std, n: std / (n * 2) ** 0.25),
        ),
        (
            "it is neither std = 0.03 nor std / sqrt(2 n_layers) = 0.0122; check the factor, and the number under the",
            initialised(scaled=lambda std, n: std / math.sqrt(2 * (n + 1))),
        ),
        ("has mean", initialised(draw=lambda shape, generator: torch.randn(shape, generator=generator) + 1)),
        ("is no longer the parameter that it was", parameter_exchanged),
    ],
    "convert_gpt2_weights": [
        (
            "It holds what belongs in `blocks.0.attn.W_K`",
            with_entry("blocks.0.attn.W_V", from_ours="blocks.0.attn.W_K"),
        ),
        ("It holds what belongs in `blocks.0.ln1.w`", with_entry("blocks.1.ln1.w", from_ours="blocks.0.ln1.w")),
        ("`unembed.b_U`: 13 of 13", with_entry("unembed.b_U", torch.ones_like)),
        ("with weights in float64, `unembed.b_U`: ", with_entry("unembed.b_U", torch.Tensor.float)),
        ("belongs in `blocks.1.", changed(lambda ours, theirs: ours.update(layer_by_its_first_digit(ours)))),
        ("`blocks.1.attn.W_V`: ", with_entry("blocks.1.attn.W_V", lambda weight: weight.flip(0))),  # heads reversed
        (
            "`blocks.0.attn.b_K`: ",  # heads taken to alternate, in the bias
            with_entry("blocks.0.attn.b_K", lambda bias: bias.reshape(4, 3).T),
        ),
        (
            "`blocks.1.attn.W_O`: ",  # right in the first layer
            with_entry("blocks.1.attn.W_O", lambda weight: weight.reshape(12, 12).T.reshape(3, 4, 12)),
        ),
        ("has no entry `unembed.b_U`", changed(lambda ours, theirs: ours.pop("unembed.b_U"))),
        (
            "our Transformer does not know, `blocks.0.attn.mask`",
            changed(lambda ours, theirs: ours.update({"blocks.0.attn.mask": theirs["transformer.h.0.attn.bias"]})),
        ),
        (
            "it changed `state_dict`, which it was only given to read",
            changed(lambda ours, theirs: theirs.pop("transformer.ln_f.bias")),
        ),
        (
            "`state_dict['transformer.wte.weight']` in place",
            changed(lambda ours, theirs: theirs["transformer.wte.weight"].zero_()),
        ),
    ],
}

ALSO_RIGHT = {name: [getattr(other, name)] for name in SURPRISES}


# ------------------------------------------------------------------------------- the reference, from other sides

TINY = TransformerConfig(d_vocab=31, n_ctx=17, n_layers=3, n_heads=4, d_model=20, d_head=5, d_mlp=80)


@pytest.fixture(scope="module")
def hugging_face() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A tiny GPT-2 in which every parameter is random: the model, tokens, its logits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=31,
        n_positions=17,
        n_embd=20,
        n_layer=3,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    theirs = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        tokens = torch.randint(31, (2, 11), generator=generator)
        return theirs, tokens, theirs(tokens).logits


@pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
def test_logits_are_those_of_hugging_face(module: Any, hugging_face: Any) -> None:
    theirs, tokens, logits = hugging_face
    ours = module.Transformer(TINY)
    ours.load_state_dict(module.convert_gpt2_weights(theirs.state_dict(), TINY))
    torch.testing.assert_close(ours(tokens), logits, rtol=1e-4, atol=1e-4)


def test_the_oracle_is_gpt2(hugging_face: Any) -> None:
    """The loops with which answers are compared have an oracle of their own."""
    theirs, tokens, logits = hugging_face
    weights = other.convert_gpt2_weights(theirs.state_dict(), TINY)
    torch.testing.assert_close(transformer(weights, TINY, tokens)["output"], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("class_beside_it", [ref.Transformer, other.Transformer], ids=["reference", "other"])
def test_weights_are_given_to_the_transformer_beside_the_function(class_beside_it: Any) -> None:
    """In a notebook the learner's own model is what counts."""
    made = []

    class Transformer(class_beside_it):
        def __init__(self, cfg: TransformerConfig) -> None:
            super().__init__(cfg)
            made.append(self)

    namespace = {"Transformer": Transformer, "init_weights": ref.init_weights}
    exec("def mine(model, std, generator):\n    init_weights(model, std, generator)", namespace)
    run_check(check_init_weights, namespace["mine"])
    assert len(made) == 3


def test_a_mistake_is_recognised_however_it_draws() -> None:
    """In another order than the known mistake, so with other random numbers in every matrix."""

    def not_scaled(model: Any, std: float, generator: torch.Generator) -> None:
        ref.init_weights(model, std, generator)
        for name, parameter in reversed(list(model.named_parameters())):
            if name.split(".")[-1].startswith("W_"):
                parameter.data.normal_(0.0, std, generator=generator)

    with pytest.raises(CheckFailed, match="This is what you get if `W_O` is drawn like the others"):
        run_check(check_init_weights, not_scaled)
