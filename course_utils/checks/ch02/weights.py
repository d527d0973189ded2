"""Chapter 02: do weights start as small as they should, and do GPT-2's find their places?

Deviations are measured, with the tolerance that chance asks for; converted weights are put together column by column.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.ch02.chance import Measured
from course_utils.checks.ch02.converting import judge_converted, wrong_entries
from course_utils.checks.ch02.gpt2_weights import converted_by_columns, gpt2_state_dict
from course_utils.checks.comparing import compare
from course_utils.checks.guarding import may_change
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.transformer_interface import transformer_parameters
from course_utils.config import TransformerConfig

# --------------------------------------------------------------------------------------------------- where they begin

INTO_STREAM = ("W_O", "W_out")


@torch.no_grad()
def initialise(model: Any, std: float, generator: torch.Generator, **wrong: Any) -> None:
    """Every parameter in its turn, with switches for what people get wrong."""
    n_layers = model.cfg.n_layers
    for name, parameter in model.named_parameters():
        symbol = name.split(".")[-1]
        if symbol in wrong.get("forgotten", ()):
            continue
        if symbol.startswith("W_"):
            scaled = wrong.get("scaled", lambda std, n: std / math.sqrt(2 * n))(std, n_layers)
            drawn = wrong.get("draw", torch.randn)(parameter.shape, generator=generator)
            parameter.copy_(drawn * (scaled if symbol in wrong.get("into_stream", INTO_STREAM) else std))
        else:
            parameter.fill_(float(symbol == "w"))


@known_mistakes(
    {
        f"`{symbol}` is left as it was; biases start at 0.": partial(initialise, forgotten=(symbol,))
        for symbol in ("b_Q", "b_K", "b_V", "b_O", "b_in", "b_out", "b_U", "b")
    },
    {
        f"`{symbol}` is drawn like the others; what writes into the residual stream gets std / sqrt(2 n_layers).": (
            partial(initialise, into_stream={*INTO_STREAM} - {symbol})
        )
        for symbol in INTO_STREAM
    },
    {
        f"`{symbol}` is scaled down too; only `W_O` and `W_out` are.": (
            partial(initialise, into_stream=(*INTO_STREAM, symbol))
        )
        for symbol in ("W_E", "W_pos", "W_Q", "W_K", "W_V", "W_in", "W_U")
    },
    {
        "`w` is left as it was; a LayerNorm starts with `w` 1.": partial(initialise, forgotten=("w",)),
        "only the blocks are counted; each adds to the stream twice, so 2 n_layers.": partial(
            initialise, scaled=lambda std, n: std / math.sqrt(n)
        ),
        "it is divided by 2 n_layers; divide by the root of that.": partial(
            initialise, scaled=lambda std, n: std / (2 * n)
        ),
        "`std` is taken for the variance; or the deviation is squared.": lambda model, std, generator: initialise(
            model, std**2, generator
        ),
        "`std` is taken for a variance; it is the deviation itself.": lambda model, std, generator: initialise(
            model, math.sqrt(std), generator
        ),
        "`std` is not used.": lambda model, std, generator: initialise(model, 1.0, generator),
        "it holds one number everywhere; it should be drawn at random.": partial(
            initialise, draw=lambda shape, generator: torch.ones(shape)
        ),
    },
)
@may_change("model")
def check_init_weights(fn: Callable[..., Any]) -> None:
    """Deviations measured on matrices of a thousand numbers or more; six standard errors of tolerance."""
    cfg = TransformerConfig(d_vocab=80, n_ctx=60, n_layers=3, n_heads=4, d_model=32, d_head=9, d_mlp=50)
    std = 0.03
    model = _fresh_model(fn, cfg)
    objects = dict(model.named_parameters())
    global_state = torch.get_rng_state()
    fn(model, std, torch.Generator().manual_seed(1))
    if not torch.equal(torch.get_rng_state(), global_state):
        raise CheckFailed(
            "init_weights: it drew from torch's global random numbers, so `generator` does not decide the weights.\n"
            "  Next: hand `generator=generator` to every draw."
        )
    # By name, whatever the order in the learner's own class; matrices last.
    parameters = dict(sorted(model.named_parameters(), key=lambda entry: ("W_" in entry[0], entry[0])))
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        if parameter is not objects.get(name) or not parameter.requires_grad:
            raise CheckFailed(
                f"init_weights: `{name}` is no longer the parameter that it was, so an optimizer may lose it.\n"
                "  Next: write into it, under torch.no_grad(): parameter.normal_(...), parameter.copy_(...)."
            )
        symbol = name.split(".")[-1]
        if symbol.startswith("W_"):
            deviations = (std, std / math.sqrt(2 * cfg.n_layers))
            _check_normal(name, values[name], deviations[symbol in INTO_STREAM], deviations)
        else:
            target = torch.ones_like if symbol == "w" else torch.zeros_like
            actual = values[name].flatten()
            compare(f"init_weights: `{name}`", actual, target(actual), "element")
    _check_draws(fn, cfg, std, values)


UNTOUCHED = 5.0


def _fresh_model(fn: Callable[..., Any], cfg: TransformerConfig) -> nn.Module:
    """The learner's own Transformer where there is one beside the function; else bare parameters of the same names."""
    own = getattr(inspect.unwrap(fn), "__globals__", {}).get("Transformer")
    model = own(cfg) if isinstance(own, type) else _bare_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(UNTOUCHED)
    return model


def _bare_model(cfg: TransformerConfig) -> Any:
    model: Any = nn.Module()
    model.cfg = cfg
    model.blocks = nn.ModuleList(nn.Module() for _ in range(cfg.n_layers))
    for name, shape in transformer_parameters(cfg).items():
        *path, symbol = name.split(".")
        owner = model
        for step in path:
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        owner.register_parameter(symbol, nn.Parameter(torch.empty(shape)))
    return model


def _check_normal(name: str, values: Tensor, want: float, deviations: tuple[float, float]) -> None:
    """Mean 0, the deviation wanted of the two that there are, and the tails of a normal distribution."""

    def fits(deviation: float) -> bool:
        return abs(got.item() - deviation) <= 6 * deviation / math.sqrt(2 * values.numel())

    got, mean = values.std(), values.mean().item()
    if not fits(want):
        step = "follow this name through your function: which of the two deviations does it get?"
        if not any(map(fits, deviations)):
            std, into_stream = deviations
            step = (
                f"it is neither std = {std:.3g} nor std / sqrt(2 n_layers) = {into_stream:.3g}; check the factor, "
                "and the number under the root."
            )
        raise CheckFailed(
            f"init_weights: `{name}` has standard deviation {got:.3g}, expected {want:.3g}.",
            evidence=Evidence(f"deviation of {name}", Measured(got, got.square() / (2 * values.numel()))),
            advice=f"  Next: {step}",
        )
    if abs(mean) > 6 * want / math.sqrt(values.numel()):
        raise CheckFailed(f"init_weights: `{name}` has mean {mean:.3g}, expected 0.\n  Next: draw around 0.")
    within = (values.abs() < want).double().mean().item()  # normal: 0.683; uniform: 0.577
    if abs(within - 0.683) > 6 * 0.465 / math.sqrt(values.numel()) or values.abs().max() < 2.2 * want:
        raise CheckFailed(
            f"init_weights: mean and deviation of `{name}` are right, but {within:.0%} of its numbers are within one "
            f"deviation of 0 (of a normal distribution 68% are), the largest is {values.abs().max() / want:.2g} away.\n"
            "  Next: draw from a normal distribution."
        )


def _check_draws(fn: Callable[..., Any], cfg: TransformerConfig, std: float, values: Mapping[str, Tensor]) -> None:
    """The seed decides everything, and no two matrices hold the same numbers."""
    again, other = _fresh_model(fn, cfg), _fresh_model(fn, cfg)
    fn(again, std, torch.Generator().manual_seed(1))
    fn(other, std, torch.Generator().manual_seed(2))
    drawn = [name for name in values if name.split(".")[-1].startswith("W_")]
    for name in drawn:
        if not torch.equal(again.get_parameter(name), values[name]):
            raise CheckFailed(
                f"init_weights: the same seed gave two different `{name}`.\n"
                "  Next: hand `generator=generator` to every draw."
            )
        if torch.equal(other.get_parameter(name), values[name]):
            raise CheckFailed(
                f"init_weights: two different seeds gave the same `{name}`.\n"
                "  Next: draw from `generator` as it comes, without seeding it."
            )
    for position, name in enumerate(drawn):
        for earlier in drawn[:position]:
            a, b = values[name].flatten(), values[earlier].flatten()
            size = min(len(a), len(b), 50)
            if torch.allclose(a[:size] / a[:size].norm(), b[:size] / b[:size].norm(), atol=1e-4):
                raise CheckFailed(
                    f"init_weights: `{earlier}` and `{name}` hold the same random numbers.\n"
                    "  Next: let one generator run through all draws, without seeding it again."
                )


# ---------------------------------------------------------------------------------------------- weights of others


ATTENTION = ("attn.W_Q", "attn.W_K", "attn.W_V")
wrong_views = partial(wrong_entries, converted_by_columns, ATTENTION, "transformer.h.{}.attn.c_attn.weight")
wrong_output = partial(wrong_entries, converted_by_columns, ("attn.W_O",), "transformer.h.{}.attn.c_proj.weight")


@known_mistakes(
    wrong_views(
        "the heads' columns of {} are taken to alternate; each head has d_head columns side by side.",
        lambda c_attn, cfg, third: c_attn.chunk(3, 1)[third].unflatten(1, (cfg.d_head, cfg.n_heads)).permute(2, 0, 1),
    ),
    wrong_views(
        "c_attn is read head by head for {}; it holds all queries, then all keys, then all values.",
        lambda c_attn, cfg, third: c_attn.unflatten(1, (cfg.n_heads, 3, cfg.d_head))[:, :, third].transpose(0, 1),
    ),
    wrong_views(
        "the columns of {} are reshaped without moving the head axis to the front.",
        lambda c_attn, cfg, third: c_attn.chunk(3, 1)[third].reshape(cfg.n_heads, cfg.d_model, cfg.d_head),
    ),
    wrong_views(
        "their matrix is transposed for {}; a Conv1D stores [in, out], as ours.",
        lambda c_attn, cfg, third: c_attn.chunk(3, 1)[third].T.unflatten(1, (cfg.n_heads, cfg.d_head)).transpose(0, 1),
    ),
    wrong_output(
        "c_proj is transposed for {}; a Conv1D stores [in, out], so its rows belong to the heads.",
        lambda c_proj, cfg, _: c_proj.T.unflatten(0, (cfg.n_heads, cfg.d_head)),
    ),
    wrong_output(
        "the heads' rows are taken to alternate in {}; each head has d_head rows one after the other.",
        lambda c_proj, cfg, _: c_proj.unflatten(0, (cfg.d_head, cfg.n_heads)).transpose(0, 1),
    ),
    {
        "the token embeddings are used; these weights have an lm_head of their own.": lambda state_dict, cfg: (
            converted_by_columns(state_dict, cfg) | {"unembed.W_U": state_dict["transformer.wte.weight"].T}
        ),
        "lm_head is reshaped; it needs transposing.": lambda state_dict, cfg: (
            converted_by_columns(state_dict, cfg)
            | {"unembed.W_U": state_dict["lm_head.weight"].reshape(cfg.d_model, cfg.d_vocab)}
        ),
    },
)
def check_convert_gpt2_weights(fn: Callable[..., Any]) -> None:
    """Every entry, put together column by column from a state dict with GPT-2's names."""
    cfg = TransformerConfig(d_vocab=13, n_ctx=9, n_layers=12, n_heads=3, d_model=12, d_head=4, d_mlp=11)
    theirs = gpt2_state_dict(cfg)
    judge_converted("convert_gpt2_weights", fn, cfg, theirs, converted_by_columns(theirs, cfg))
