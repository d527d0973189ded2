"""What the checks of modules share: building a learner's class, watching its hook points, standing in for its parts."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.core import CheckFailed, Mistakes, compare, follows_input, identical, unchanged
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
    missing = [hook for hook in hook_names if hook not in hook_points(module)]
    if missing:
        raise CheckFailed(f"{name}: it has no hook point `{missing[0]}`.\n  {keep}")
    randomise(module)
    return module


def randomise(module: nn.Module) -> None:
    """Random numbers for every parameter: what is 0 or 1 in a fresh model cannot show that it was forgotten."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters(), start=100):
            parameter.copy_(noise(*parameter.shape, seed=seed, scale=0.5))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters, for the oracle."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


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
    mistakes: Mistakes | None = None,
    hook_mistakes: Mapping[str, Mistakes] | None = None,
    replace: bool = True,
    toys: bool = False,
) -> None:
    """Compare a module with an oracle: output, what hook points see and do; and that nothing is written into.

    `oracle(replaced)` returns what each hook point sees, in order, and the "output". With toys for parts, gradients,
    dtypes and devices tell nothing.
    """
    tensors = {f"input {number}": value for number, value in enumerate(inputs) if isinstance(value, Tensor)}
    if len(tensors) == 1:
        tensors = {next(iter(inspect.signature(module.forward).parameters), "input"): next(iter(tensors.values()))}
    with torch.no_grad():
        expected = oracle({})
        with unchanged(name, **tensors), unchanged(name, **dict(module.named_parameters())):
            actual = module(*inputs)
        try:
            compare(name, actual, expected["output"], axes, mistakes)
        except CheckFailed as failure:
            place = _first_wrong(name, module, inputs, expected, wanted)
            lines = str(failure).splitlines()
            before_advice = len(lines) - lines[-1].startswith("  Next:")
            raise CheckFailed("\n".join([*lines[:before_advice], *place, *lines[before_advice:]])) from None
        output, seen = watch(name, module, inputs, wanted)
        for hook in wanted:
            known = (hook_mistakes or {}).get(hook)
            compare(f"{name}: what `{hook}` sees", seen[hook], expected[hook], HOOK_AXES[hook.split(".")[-1]], known)
        compare(f"{name} while watched", output, expected["output"], axes)
        for seed, hook in enumerate(wanted if replace else ()):
            _check_replacement(name, module, inputs, oracle, axes, hook, seed, expected)
    if not toys:
        check_gradient(name, module, inputs)
        follows_input(name, lambda moved, *values: moved(*values), (module, *inputs), axes)


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
    thrown_away = f"what `{hook}` returns is thrown away: go on with `tensor = self.{hook.split('.')[-1]}(tensor)`."
    compare(
        f"{name} when a hook replaces `{hook}`",
        actual,
        oracle({hook: other})["output"],
        axes,
        {thrown_away: usual["output"]},
    )


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


def check_half_precision(
    name: str, module: nn.Module, resid: Tensor, wanted: Sequence[str], overflowed: Tensor, axes: str
) -> None:
    """In float16 and bfloat16, watched or not, it gives the numbers of float32, as far as half precision holds them.

    `resid` is so large that its squares are inf in float16, and `overflowed` is what then comes out.
    """
    mistakes = {"the squares are taken in float16, where they are inf; compute in float32.": overflowed.half()}
    for dtype, rtol in ((torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        half = copy.deepcopy(module).to(dtype)
        given = resid.to(dtype)
        where = f"{name} in {str(dtype).removeprefix('torch.')}"
        with torch.no_grad():
            right, seen_right = watch(name, copy.deepcopy(half).float(), (given.float(),), wanted)
            compare(where, half(given), right.to(dtype), axes, mistakes, rtol=rtol, atol=rtol)
            output, seen = watch(where, half, (given,), wanted)
            compare(f"{where} while watched", output, right.to(dtype), axes, mistakes, rtol=rtol, atol=rtol)
            for hook in wanted:
                expected, hook_axes = seen_right[hook].to(dtype), HOOK_AXES[hook]
                compare(f"{where}: what `{hook}` sees", seen[hook], expected, hook_axes, rtol=rtol, atol=rtol)


class ToyCache:
    """A key-value cache made of lists, which notes which layers wrote to it."""

    def __init__(self, cfg: TransformerConfig, batch: int) -> None:
        self.n_layers = cfg.n_layers
        self.contents: dict[int, tuple[Tensor, Tensor]] = {}
        self.appended: list[tuple[int, int]] = []  # layer, number of positions

    @property
    def length(self) -> int:
        lengths = [self.contents[layer][0].shape[1] for layer in range(self.n_layers) if layer in self.contents]
        return min(lengths) if len(lengths) == self.n_layers else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.appended.append((layer, k.shape[1]))
        if layer in self.contents:
            old_k, old_v = self.contents[layer]
            k, v = torch.cat([old_k, k], dim=1), torch.cat([old_v, v], dim=1)
        self.contents[layer] = (k, v)
        return k, v

    def select(self, rows: Tensor) -> None:
        self.contents = {layer: (k[rows], v[rows]) for layer, (k, v) in self.contents.items()}


def make_cache(owner: Any, cfg: TransformerConfig, batch: int) -> Any:
    """A `ToyCache` for a class or function: whether the learner's `KVCache` is right, or written, must not matter here.

    Where there is one beside the owner, the toy counts as one, since an annotation may ask for it.
    """
    bases = owner.__mro__ if isinstance(owner, type) else ()
    functions = [inspect.unwrap(vars(base)["forward"]) for base in bases if "forward" in vars(base)]
    spaces = [getattr(function, "__globals__", {}) for function in functions or [inspect.unwrap(owner)]]
    kinds = [space["KVCache"] for space in spaces if isinstance(space.get("KVCache"), type)]
    return type("NotingCache", (ToyCache, *kinds[:1]), {})(cfg, batch)


class Toy(nn.Module):
    """A part with a known answer, which stands in for a real one while the whole is checked."""

    def __init__(self, whole: str, part: str, answer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.whole, self.part, self.answer = whole, part, answer
        self.caches: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name in ("w", "b") or name.startswith(("W_", "b_", "hook_")):
            raise CheckFailed(
                f"{self.whole}: it reads `{self.part}.{name}` by itself.\n  Next: call the part, self.{self.part}(...)."
            )
        return super().__getattr__(name)

    def forward(self, resid: Tensor) -> Tensor:
        return self.answer(resid)


class ToyWithCache(Toy):
    """Stands in for attention, or for a block."""

    def forward(self, resid: Tensor, cache: Any = None) -> Tensor:
        self.caches.append(cache)
        return self.answer(resid)


class ToyEmbed(Toy):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.answer(tokens)


class ToyPosEmbed(Toy):
    def forward(self, tokens: Tensor, offset: int = 0) -> Tensor:
        return self.answer(tokens, offset)


def wave(slope: float, shift: float) -> Callable[[Tensor], Tensor]:
    """A function of a vector, element by element, unlike the others of its kind."""
    return lambda resid: torch.sin(slope * resid + shift)
