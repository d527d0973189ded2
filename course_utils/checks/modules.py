"""What the checks of modules share: building a learner's class, and watching its hook points."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.comparing import compare, follows_input, identical
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.mistakes import same
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.transformer_interface import HOOK_AXES
from course_utils.config import TransformerConfig
from course_utils.hooks import HookPoint, hook_points, hooks

Oracle = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def noise(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random numbers, all different, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def construct(
    name: str, cls: Any, cfg: TransformerConfig, parameters: Mapping[str, tuple[int, ...]], hook_names: Sequence[str]
) -> Any:
    """An object of the learner's class with the promised parameters, all random, and the promised hook points."""
    keep = "Next: keep the `__init__` that was given (the statement holds it)."
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise CheckFailed(f"{name}: expected a class that inherits from nn.Module.\n  {keep}")
    module = cls(cfg)
    found = {entry: tuple(tensor.shape) for entry, tensor in module.state_dict().items()}
    for entry, shape in parameters.items():
        if entry not in found:
            raise CheckFailed(f"{name}: it has no parameter `{entry}`.\n  {keep}")
        if found[entry] != shape:
            raise CheckFailed(f"{name}: `{entry}` has shape {found[entry]}, expected {shape}.\n  {keep}")
    extra = [entry for entry in found if entry not in parameters]
    if extra:
        raise CheckFailed(
            f"{name}: `{extra[0]}` is among its weights, but saved weights have no such entry.\n"
            "  Next: compute it in forward, or use register_buffer(..., persistent=False)."
        )
    missing = sorted(set(hook_names) - set(hook_points(module)), key=list(hook_names).index)
    if missing:
        raise CheckFailed(f"{name}: it has no hook point `{missing[0]}`.\n  {keep}")
    randomise(module)
    return module


def with_methods(base: type, name: str, **methods: Callable[..., Any]) -> type:
    """A class like `base` under another name, with these methods of its own: how a mistake in a class is written."""
    return type(name, (base,), methods)


def with_forwards(base: type, forwards: Mapping[str, Callable[..., Any]]) -> dict[str, type]:
    """A table of mistakes in a class: for each sentence, one like `base` with that `forward`."""
    return {sentence: with_methods(base, base.__name__, forward=forward) for sentence, forward in forwards.items()}


def randomise(module: nn.Module) -> None:
    """Random numbers for every parameter: what is 0 or 1 in a fresh model cannot show that it was forgotten."""
    with torch.no_grad():
        # By name, so that a class which makes its parameters in another order has the same ones.
        for seed, (_, parameter) in enumerate(sorted(module.named_parameters()), start=100):
            parameter.copy_(noise(*parameter.shape, seed=seed, scale=0.5))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters, for the oracle."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def always(answer: dict[str, Tensor]) -> Oracle:
    """An oracle for modules in which nothing is replaced."""
    return lambda replaced: answer


def watch(
    name: str, module: nn.Module, inputs: tuple[Any, ...], wanted: Sequence[str]
) -> tuple[Any, dict[str, Tensor]]:
    """Run the module while all of `wanted` are watched: its output, and what each hook point saw."""
    seen: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}

    def record(activation: Any, hook: HookPoint) -> None:
        if not isinstance(activation, Tensor):
            raise CheckFailed(f"{name}: `{hook.name}` was given a {type(activation).__name__}, not a Tensor.")
        if hook.name in seen:
            raise CheckFailed(
                f"{name}: `{hook.name}` saw more than one tensor in one run.\n"
                "  Next: call it once, with the whole tensor (all heads, all positions)."
            )
        seen[hook.name], before[hook.name] = activation, activation.detach().clone()

    with hooks(module, dict.fromkeys(wanted, record)):
        output = module(*inputs)
    for hook in wanted:
        if hook not in seen:
            attribute = hook.split(".")[-1]
            raise CheckFailed(
                f"{name}: `{hook}` saw nothing, although it was watched.\n"
                f"  Next: pass the tensor through it, and use what comes back: `tensor = self.{attribute}(tensor)`."
            )
        if not identical(seen[hook], before[hook]):
            raise CheckFailed(
                f"{name}: what `{hook}` saw was changed in place afterwards, so a cache would hold wrong values.\n"
                "  Next: make a new tensor instead of writing into that one, as `old += ...` and ..._() methods do."
            )
    return output, seen


def check_module(
    name: str,
    module: nn.Module,
    inputs: tuple[Any, ...],
    oracle: Oracle,
    axes: str,
    wanted: Sequence[str] = (),
    replace: bool = True,
    toys: bool = False,
) -> None:
    """Compare a module with an oracle: output, and what hook points see and do.

    `oracle(replaced)` returns what each hook point sees, in order, and the "output". With toys for parts, gradients,
    dtypes and devices tell nothing.
    """
    with torch.no_grad():
        expected = oracle({})
        try:
            compare(name, module(*inputs), expected["output"], axes)
        except CheckFailed as failure:
            raise failure.with_lines(*_first_wrong(name, module, inputs, expected, wanted)) from None
        output, seen = watch(name, module, inputs, wanted)
        for hook in wanted:
            compare(f"{name}: what `{hook}` sees", seen[hook], expected[hook], HOOK_AXES[hook.split(".")[-1]])
        compare(f"{name} while watched", output, expected["output"], axes)
        for seed, hook in enumerate(wanted if replace else ()):
            _check_replacement(name, module, inputs, oracle, axes, hook, seed, expected)
    if not toys:
        check_gradient(name, module, inputs)
        follows_input(name, lambda moved, *values: moved(*values), (module, *inputs), axes)
        if replace:  # what is made of parts has no arithmetic of its own
            follows_every_kind(name, lambda moved, *values: moved(*values), (module, *inputs), axes)


def _first_wrong(
    name: str, module: nn.Module, inputs: tuple[Any, ...], expected: Mapping[str, Tensor], wanted: Sequence[str]
) -> list[str]:
    """Where, on the way to a wrong output, the first wrong tensor is seen: one line, or none."""
    try:
        _, seen = watch(name, module, inputs, wanted)
        for position, hook in enumerate(wanted):
            try:
                compare(name, seen[hook], expected[hook], HOOK_AXES[hook.split(".")[-1]])
            except CheckFailed:
                before = f" (`{wanted[position - 1]}` is right)" if position else ""
                return [f"  On the way, the first wrong tensor is at `{hook}`{before}."]
    except Exception:  # the output is wrong all the same; this was only to say more about it
        return []
    if not wanted:
        return []
    return [f"  What the hook points see is right, up to `{wanted[-1]}`; look at what comes after it."]


def _check_replacement(
    name: str,
    module: nn.Module,
    inputs: tuple[Any, ...],
    oracle: Oracle,
    axes: str,
    hook: str,
    seed: int,
    usual: Mapping[str, Tensor],
) -> None:
    """A tensor that a hook returns must be the one that the module goes on with."""
    other = noise(*usual[hook].shape, seed=seed + 50).abs().add(0.5)  # positive: it may stand for a scale or a pattern
    with hooks(module, {hook: lambda activation, hook: other}):
        actual = module(*inputs)
    try:
        compare(f"{name} when a hook replaces `{hook}`", actual, oracle({hook: other})["output"], axes)
    except CheckFailed as failure:
        if not same(actual, usual["output"]):
            raise
        own = hook.split(".")[-1]
        raise CheckFailed(
            f"{failure.message}\n  What `{hook}` returns is thrown away: go on with `tensor = self.{own}(tensor)`."
        ) from None


def check_gradient(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Training must be able to reach every parameter."""
    module.zero_grad()
    output = module(*inputs)
    if output.requires_grad:
        output.square().sum().backward()
    for entry, parameter in module.named_parameters():
        if parameter.grad is None:
            raise CheckFailed(
                f"{name}: no gradient reaches `{entry}`, so it could not be trained.\n"
                "  Next: look for torch.no_grad, .detach(), .data or .item() on the way from it to the output."
            )
    module.zero_grad()


def check_half_precision(name: str, module: nn.Module, resid: Tensor, wanted: Sequence[str], axes: str) -> None:
    """In float16 and bfloat16, watched or not, it gives the numbers of float32, as far as half precision holds them.

    `resid` is so large that its squares are inf in float16.
    """
    for dtype, rtol in ((torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        half = copy.deepcopy(module).to(dtype)
        given = resid.to(dtype)
        where = f"{name} in {str(dtype).removeprefix('torch.')}"
        with torch.no_grad():
            right, seen_right = watch(name, copy.deepcopy(half).float(), (given.float(),), wanted)
            compare(where, half(given), right.to(dtype), axes, rtol=rtol, atol=rtol)
            output, seen = watch(where, half, (given,), wanted)
            compare(f"{where} while watched", output, right.to(dtype), axes, rtol=rtol, atol=rtol)
            for hook in wanted:
                expected, hook_axes = seen_right[hook].to(dtype), HOOK_AXES[hook]
                compare(f"{where}: what `{hook}` sees", seen[hook], expected, hook_axes, rtol=rtol, atol=rtol)
