"""Hook points: named places in a model where activations can be read and replaced.

A model calls a `HookPoint` wherever something is worth looking at; everything here then works on that model, whoever
wrote it. A hook is a function `fn(activation, hook)` that returns a replacement, or None to leave things as they are.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from difflib import get_close_matches
from fnmatch import fnmatchcase
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

HookFn = Callable[[Tensor, "HookPoint"], Tensor | None]
Names = str | Iterable[str] | Callable[[str], bool]

WRAPPER = "_orig_mod."  # in the path of everything inside a module that torch.compile has wrapped
LARGE = 1e9  # bytes: a cache beyond this is announced
WORTH_A_LOOK = 5e8  # bytes: from here on, what is still to come is estimated


class HookPoint(nn.Module):
    """An identity layer that marks a place where an activation can be read or replaced.

    `name` is the path in the model, set by `hook_points`. With `on_request=True` a bare `run_with_cache` passes it by,
    and caches it only when asked for: a model can then compute an expensive value only if somebody watches.
    """

    def __init__(self, on_request: bool = False) -> None:
        super().__init__()
        self.name = ""
        self.on_request = on_request
        self._fns: OrderedDict[int, HookFn] = OrderedDict()

    @property
    def is_watched(self) -> bool:
        """Whether any hook function is attached."""
        return bool(self._fns)

    def add(self, fn: HookFn) -> RemovableHandle:
        """Attach `fn` after those already there; the handle's `remove()` takes away this one only."""
        if not callable(fn):
            raise TypeError(
                f"A hook is a function fn(activation, hook), but {self.name or 'this hook point'} was given {fn!r}."
            )
        handle = RemovableHandle(self._fns)
        self._fns[handle.id] = fn
        return handle

    def clear(self) -> None:
        """Take all hook functions away."""
        self._fns.clear()

    def forward(self, activation: Tensor) -> Tensor:
        """Show the activation to each hook function in order; a returned tensor replaces it.

        Raises TypeError or ValueError, with the hook's name, for a replacement that cannot stand in for the activation.
        """
        if not self._fns:
            return activation
        for fn in list(self._fns.values()):  # a copy: a hook may remove itself
            replacement = fn(activation, self)
            if replacement is not None:
                self._refuse_misfit(replacement, activation)
                activation = replacement
        return activation

    def _refuse_misfit(self, replacement: object, activation: Tensor) -> None:
        if not isinstance(replacement, Tensor):
            raise TypeError(
                f"The hook at {self.name} returned a {type(replacement).__name__}; "
                "return a tensor like the activation, or None to keep it."
            )
        for what in ("shape", "dtype", "device"):
            got, want = getattr(replacement, what), getattr(activation, what)
            if got != want:
                got, want = (tuple(got), tuple(want)) if what == "shape" else (got, want)
                raise ValueError(
                    f"The hook at {self.name} returned {what} {got}, but the activation has {what} {want}; "
                    "return a tensor like the activation, or None to keep it."
                )

    def extra_repr(self) -> str:
        return "on_request=True" if self.on_request else ""


class UnknownName(KeyError):
    """A name that no hook point or cached activation has; the message holds the nearest ones."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0])


def _nearest(name: str, names: Iterable[str]) -> str:
    return ", ".join(get_close_matches(name, list(names), n=3, cutoff=0.0))


def hook_points(model: nn.Module) -> dict[str, HookPoint]:
    """All hook points of a model by their path in it, such as `blocks.0.attn.hook_pattern`; also sets their `name`.

    What `torch.compile` wraps around a model, or a part of it, is left out of the path.
    """
    named = model.named_modules()
    points = {name.replace(WRAPPER, ""): module for name, module in named if isinstance(module, HookPoint)}
    for name, point in points.items():
        if point.name != name:  # a module's attributes are slow to set
            point.name = name
    return points


def _some_hook_points(model: nn.Module) -> dict[str, HookPoint]:
    """All hook points of a model that has any."""
    points = hook_points(model)
    if not points:
        raise ValueError(f"This {type(model).__name__} has no hook points; give it some, as self.hook_z = HookPoint().")
    return points


def _select(points: Mapping[str, HookPoint], names: Names) -> dict[str, HookPoint]:
    """Those that a name, a glob, several of these, or a predicate stands for, in the model's order."""
    if callable(names):
        chosen = {name for name in points if names(name)}
        if not chosen:
            raise UnknownName("The predicate given as names chose no hook point; list(hook_points(model)) shows them.")
    else:
        chosen = set()
        for pattern in [names] if isinstance(names, str) else names:
            found = [name for name in points if fnmatchcase(name, pattern)]
            if not found:
                raise UnknownName(f"No hook point matches {pattern!r}. The nearest are: {_nearest(pattern, points)}.")
            chosen.update(found)
    return {name: point for name, point in points.items() if name in chosen}


def _is_compiled(model: nn.Module) -> bool:
    return any(f"{name}.".endswith(WRAPPER) or part._compiled_call_impl for name, part in model.named_modules())


def _eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Where something is compiled, its code as it was written runs for now: what was compiled calls no new hooks."""
    return torch.compiler.set_stance("force_eager") if _is_compiled(model) else nullcontext()


@contextmanager
def _attached(model: nn.Module, wanted: Mapping[Any, Any] | Iterable[tuple[Any, Any]]) -> Iterator[None]:
    pairs = list(wanted.items() if isinstance(wanted, Mapping) else wanted)
    found = _some_hook_points(model) if pairs else {}
    chosen = [(_select(found, names).values(), fns) for names, fns in pairs]  # all names first: nothing half attached
    with ExitStack() as stack:
        stack.enter_context(_eager(model))
        for points, fns in chosen:
            for point in points:
                for fn in fns if isinstance(fns, list | tuple) else [fns]:
                    stack.callback(point.add(fn).remove)
        yield


def hooks(model: nn.Module, hooks: Mapping[Any, Any] | Iterable[tuple[Any, Any]]) -> AbstractContextManager[None]:
    """Context manager: attach hook functions, and take exactly these away at the end, also after an exception.

    `hooks` maps a name, a glob (`*` also spans dots) or a predicate to a function or a list of functions; pairs in a
    list do as well. Functions at one place run in the order in which they were attached, each on what the one before
    left. A function may change the activation in place, but returning a new tensor is safer: see `ActivationCache`.
    A model of `torch.compile` runs uncompiled meanwhile.
    Raises UnknownName, before anything is attached, for a name or glob that fits nothing.
    """
    return _attached(model, hooks)


def run_with_hooks(
    model: nn.Module, *inputs: Any, hooks: Mapping[Any, Any] | Iterable[tuple[Any, Any]], **kwargs: Any
) -> Any:
    """The model's output while these hooks are attached; `hooks` as in `hooks(model, ...)`."""
    with _attached(model, hooks):
        return model(*inputs, **kwargs)


def add_hook(model: nn.Module, name: Names, fn: HookFn) -> None:
    """Attach a hook function to a name, glob or predicate until `reset_hooks`."""
    if _is_compiled(model):
        raise ValueError(
            "add_hook: what torch.compile has made of a model calls no hooks that come later; "
            "add them before you compile, or use run_with_hooks."
        )
    for point in _select(_some_hook_points(model), name).values():
        point.add(fn)


def reset_hooks(model: nn.Module) -> None:
    """Take all hook functions away from all hook points of the model."""
    for point in hook_points(model).values():
        point.clear()


def _layer_and_place(name: str) -> tuple[int | None, str]:
    """Split `blocks.2.attn.hook_z` into (2, "attn.z"), and `hook_embed` into (None, "embed")."""
    parts = name.removeprefix("hook_").replace(".hook_", ".").split(".")
    for position, part in enumerate(parts):
        if part.isdecimal():
            return int(part), ".".join(parts[position + 1 :])
    return None, ".".join(parts)


def _megabytes(tensors: Iterable[Tensor]) -> float:
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values()) / 1e6  # by id: one tensor, several names


class ActivationCache(Mapping[Any, Tensor]):
    """What the hook points of a model saw in one run, by name.

    Four ways to ask: the full name, `cache["blocks.0.attn.hook_pattern"]`; the last part of it and the layer,
    `cache["pattern", 0]` or `cache["pattern", -1]`; as much of the path as makes it clear, `cache["ln1.scale", 0]`;
    and without a layer where there is none, `cache["embed"]`, `cache["ln_final.scale"]`.

    The tensors are those of the run, not copies: gradients flow through them, `grad` works after `backward()`, and two
    names may hold one tensor (a block's `hook_resid_post` is the next one's `hook_resid_pre`). Writing into one in
    place therefore changes others, and may make `backward()` fail: clone first. A hook point that the model calls
    several times keeps the last value. `n_layers` is taken from the names if not given.
    """

    def __init__(self, activations: Mapping[str, Tensor], n_layers: int | None = None) -> None:
        self._activations = dict(activations)
        layers = [layer for layer, _ in map(_layer_and_place, self._activations) if layer is not None]
        self.n_layers = n_layers if n_layers is not None else max(layers, default=-1) + 1

    def __getitem__(self, key: Any) -> Tensor:
        return self._activations[self._full_name(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def names(self) -> list[str]:
        """The full names, in the model's order."""
        return list(self._activations)

    def grad(self, key: Any) -> Tensor:
        """The gradient of a cached activation, once `backward()` was called on something computed from it.

        As for parameters, several calls of `backward()` add up. Raises RuntimeError where there is no gradient.
        """
        name = self._full_name(key)
        activation = self._activations[name]
        if not activation.requires_grad:
            raise RuntimeError(f"{name} has no gradient: run the model without torch.no_grad() and do not detach.")
        gradient = activation.grad if activation.is_leaf or activation.retains_grad else None
        if gradient is None:
            raise RuntimeError(
                f"{name} has no gradient yet: call backward() on something computed from it, "
                "and ask the cache that run_with_cache returned."
            )
        return gradient

    def stack(self, place: str) -> Tensor:
        """The activations of one place in all cached layers, along a new first axis: `stack("pattern")`."""
        layers = sorted({layer for layer, _ in map(_layer_and_place, self) if layer is not None})
        found = [self[place, layer] for layer in layers if self._matches(place, layer)]
        if not found:
            raise self._unknown(place)
        return torch.stack(found)

    def to(self, device: torch.device | str) -> "ActivationCache":
        """The same cache on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def detach(self) -> "ActivationCache":
        """The same values without their graph, which frees the memory that gradients would need."""
        return self._map(Tensor.detach)

    def size_mb(self) -> float:
        """Memory in millions of bytes; a tensor under several names counts once."""
        return _megabytes(self._activations.values())

    def __repr__(self) -> str:
        layers: dict[str, list[int]] = {}
        shapes: dict[str, list[int]] = {}
        for name, activation in self._activations.items():
            layer, _ = _layer_and_place(name)
            kind = name if layer is None else name.replace(f".{layer}.", ".LAYER.", 1)
            shapes[kind] = list(activation.shape)
            layers.setdefault(kind, []).extend([] if layer is None else [layer])
        labels = {}
        for kind, found in layers.items():
            span = "" if not found else str(found[0]) if len(found) == 1 else f"{{{found[0]}..{found[-1]}}}"
            labels[kind] = kind.replace("LAYER", span)
        width = max(map(len, labels.values()), default=0)
        head = f"ActivationCache: {len(self)} activations, {self.n_layers} layers, {self.size_mb():.1f} MB"
        return "\n".join([head, *(f"  {labels[kind]:{width}}  {shape}" for kind, shape in shapes.items())])

    def _map(self, fn: Callable[[Tensor], Tensor]) -> "ActivationCache":
        mapped = {id(tensor): fn(tensor) for tensor in self._activations.values()}  # one tensor, several names
        moved = {name: mapped[id(tensor)] for name, tensor in self._activations.items()}
        return ActivationCache(moved, self.n_layers)

    def _matches(self, place: str, layer: int | None) -> list[str]:
        """Full names in this layer whose path ends in `place`; an exact path beats a longer one."""
        _, place = _layer_and_place(place)
        here = {name: rest for name in self for at, rest in [_layer_and_place(name)] if at == layer}
        exact = [name for name, rest in here.items() if rest == place]
        return exact or [name for name, rest in here.items() if rest.endswith("." + place)]

    def _full_name(self, key: Any) -> str:
        if isinstance(key, str) and key in self._activations:
            return key
        if isinstance(key, str):
            layer, place = _layer_and_place(key)
        elif isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str) and hasattr(key[1], "__index__"):
            place, layer = key[0], index(key[1])
            if not -self.n_layers <= layer < self.n_layers:
                raise UnknownName(f"There is no layer {layer}: the layers are 0 to {self.n_layers - 1}.")
            layer %= self.n_layers
        else:
            raise UnknownName(f'{key!r} is no key of a cache: use a name, or ("pattern", layer).')
        found = self._matches(place, layer)
        if len(found) > 1:
            choices = " or ".join(repr(_layer_and_place(name)[1]) for name in found)
            raise UnknownName(f"{place!r} stands for several activations here: say {choices}.")
        if not found:
            raise self._unknown(place, layer)
        return found[0]

    def _unknown(self, place: str, layer: int | None = None) -> UnknownName:
        if layer is None and any(self._matches(place, at) for at in range(self.n_layers)):
            return UnknownName(
                f'Every layer has its own {place!r}: write cache["{place}", 0] or cache.stack("{place}").'
            )
        names = [name for name in self if layer is None or _layer_and_place(name)[0] == layer] or list(self)
        by_place = {_layer_and_place(name)[1]: name for name in names}
        nearest = [by_place[near] for near in get_close_matches(_layer_and_place(place)[1], by_place, n=3, cutoff=0.0)]
        where = "" if layer is None else f" in layer {layer}"
        return UnknownName(
            f"Nothing is cached under {place!r}{where}. The nearest are: {', '.join(nearest)}. "
            "run_with_cache(..., names=...) chooses what is cached."
        )


def run_with_cache(
    model: nn.Module, *inputs: Any, names: Names | None = None, **kwargs: Any
) -> tuple[Any, ActivationCache]:
    """Run the model and keep what its hook points see: (output, cache).

    `names` is a name, a glob, a list of these, or a predicate; without it everything is kept, except hook points made
    with `on_request=True`. Hooks attached before this call run first, so the cache holds what they left. Warns with an
    estimate of the size, before the cache is full, if it will take more than 1000 MB; raises UnknownName, before the
    model runs, for a name or glob that fits nothing.
    """
    points = _select(_some_hook_points(model), "*" if names is None else names)
    if names is None:
        points = {name: point for name, point in points.items() if not point.on_request}
    activations: dict[str, Tensor] = {}
    n_bytes, announced = 0, False

    def keep(activation: Tensor, hook: HookPoint) -> None:
        nonlocal n_bytes, announced
        if activation.requires_grad:
            activation.retain_grad()
        activations[hook.name] = activation
        n_bytes += activation.nbytes
        if n_bytes > WORTH_A_LOOK and not announced:
            announced = _announce_large(_megabytes(activations.values()) * len(points) / len(activations))

    with ExitStack() as stack:
        stack.enter_context(_eager(model))
        for point in points.values():
            stack.callback(point.add(keep).remove)
        output = model(*inputs, **kwargs)
    layers = [layer for layer, _ in map(_layer_and_place, hook_points(model)) if layer is not None]
    return output, ActivationCache(activations, n_layers=max(layers, default=-1) + 1)


def _announce_large(megabytes: float) -> bool:
    """Warn of a cache of about this size if it is large; whether it is."""
    if megabytes * 1e6 <= LARGE:
        return False
    warnings.warn(
        f"This cache will take about {megabytes:,.0f} MB; names=... keeps less, and so does a smaller batch.",
        stacklevel=2,
    )
    return True
