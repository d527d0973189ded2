"""Values as they were: told whether somebody changed them, and put back if so."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.comparing import identical

IN_PLACE = "  Next: make a new tensor; `{0}[...] = `, `{0} += ` and methods named ..._() write into it."
READ_ONLY = "which it was only given to read.\n  Next: make a new one."


class Kept:
    """A value as it was when this was made; `put_back` says in words what was changed since, and undoes it."""

    def __init__(self, label: str) -> None:
        self.label = label

    def put_back(self) -> str | None:
        raise NotImplementedError


class KeptTensor(Kept):
    def __init__(self, tensor: Tensor, label: str, with_grad: bool = True) -> None:
        super().__init__(label)
        self.tensor, self.before, self.needs = tensor, tensor.detach().clone(), tensor.requires_grad
        self.with_grad = with_grad and tensor.is_leaf
        self.grad = tensor.grad if self.with_grad else None
        self.grad_before = None if self.grad is None else self.grad.detach().clone()

    def put_back(self) -> str | None:
        tensor, label = self.tensor, self.label
        if tensor.requires_grad != self.needs and tensor.is_leaf:
            tensor.requires_grad_(self.needs)
            changed = f"it changed `{label}.requires_grad` to {not self.needs}."
            return f"{changed}\n  Next: leave it, or work on `{label}.detach()`."
        if tensor.dtype != self.before.dtype or not identical(tensor.detach(), self.before):
            tensor.data = self.before.clone()
            return f"it changed `{label}` in place.\n" + IN_PLACE.format(label)
        grad = tensor.grad if self.with_grad else None
        if grad is self.grad and (grad is None or self.grad_before is None or identical(grad, self.grad_before)):
            return None
        tensor.grad = self.grad_before
        return (
            f"it changed `{label}.grad`.\n  Next: torch.autograd.grad(...) returns gradients and leaves `.grad` alone."
        )


class KeptEntries(Kept):
    """The entries of a list, a dictionary, a dataclass or a module, each kept itself."""

    def __init__(
        self, entries: Mapping[str, Any], label: str, undo: Callable[[], str | None], grads: bool = True
    ) -> None:
        super().__init__(label)
        self.undo = undo  # of what happened to the container: entries more, fewer, others
        self.kept = [kept for name, entry in entries.items() if (kept := keep(entry, name, grads))]

    def put_back(self) -> str | None:
        changes = [self.undo(), *(kept.put_back() for kept in self.kept)]
        return next(filter(None, changes), None)


class KeptWorld(Kept):
    """What every call of torch depends on: whether gradients are recorded, the default dtype and device."""

    def __init__(self) -> None:
        super().__init__("the world")
        self.before = self.now()

    @staticmethod
    def now() -> dict[str, Any]:
        return {
            "gradient recording (torch.is_grad_enabled)": torch.is_grad_enabled(),
            "torch's default dtype": torch.get_default_dtype(),
            "torch's default device": torch.get_default_device(),
        }

    def put_back(self) -> str | None:
        now = self.now()
        changed = [what for what in now if now[what] != self.before[what]]
        if not changed:
            return None
        grad, dtype, device = self.before.values()
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        what = changed[0]
        return (
            f"it left {what} as {now[what]}; it was {self.before[what]} before.\n"
            "  Next: put back what you change, or use a `with` block, which does it for you."
        )


def keep(value: Any, label: str, grads: bool = True) -> Kept | None:
    """Remember a value, with the `.grad` of its tensors if `grads`; None for one that nobody can change."""
    if isinstance(value, Tensor):
        return KeptTensor(value, label, grads)
    if isinstance(value, nn.Module):
        entries = {f"{label}.{name}": tensor for name, tensor in [*value.named_parameters(), *value.named_buffers()]}
        undo_modes, undo_hooks = _undo_modes(value, label), _undo_hooks(value, label)
        return KeptEntries(entries, label, lambda: next(filter(None, [undo_modes(), undo_hooks()]), None), grads)
    if isinstance(value, list):
        return KeptEntries(
            {f"{label}[{i}]": entry for i, entry in enumerate(value)}, label, _undo_list(value, label), grads
        )
    if isinstance(value, tuple):
        return KeptEntries({f"{label}[{i}]": entry for i, entry in enumerate(value)}, label, lambda: None, grads)
    if isinstance(value, Mapping):
        entries = {f"{label}[{key!r}]": entry for key, entry in value.items()}
        return KeptEntries(entries, label, _undo_dict(value, label) if type(value) is dict else lambda: None, grads)
    if type(value) is set:
        return KeptEntries({}, label, _undo_set(value, label))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {f"{label}.{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}
        return KeptEntries(entries, label, lambda: None, grads)
    return None


def _undo_list(value: list[Any], label: str) -> Callable[[], str | None]:
    before = list(value)

    def undo() -> str | None:
        if len(value) == len(before) and all(old is new for old, new in zip(before, value, strict=True)):
            return None
        value[:] = before
        return f"it changed `{label}`, {READ_ONLY}"

    return undo


def _undo_dict(value: dict[Any, Any], label: str) -> Callable[[], str | None]:
    before = dict(value)

    def undo() -> str | None:
        if list(value) == list(before) and all(value[key] is before[key] for key in before):
            return None
        value.clear()
        value.update(before)
        return f"it changed `{label}`, {READ_ONLY}"

    return undo


def _undo_set(value: set[Any], label: str) -> Callable[[], str | None]:
    before = set(value)

    def undo() -> str | None:
        if value == before:
            return None
        value.clear()
        value.update(before)
        return f"it changed `{label}`, {READ_ONLY}"

    return undo


def _undo_modes(module: nn.Module, label: str) -> Callable[[], str | None]:
    before = {name: part.training for name, part in module.named_modules()}

    def undo() -> str | None:
        changed = [name for name, part in module.named_modules() if before.get(name, part.training) != part.training]
        for name in changed:
            module.get_submodule(name).training = before[name]
        if not changed:
            return None
        now = "evaluation" if before[changed[0]] else "training"
        return f"it left `{label}` in {now} mode.\n  Next: put it back, also where an error comes up."

    return undo


def _undo_hooks(module: nn.Module, label: str) -> Callable[[], str | None]:
    places = {name: _hooks_of(part) for name, part in module.named_modules()}
    before = {name: [dict(hooks) for hooks in found] for name, found in places.items()}

    def undo() -> str | None:
        told = None
        for name, found in places.items():
            for hooks, was in zip(found, before[name], strict=True):
                if dict(hooks) != was:
                    at = f"at `{name or label}`"
                    left = len(hooks) > len(was)
                    told = told or (
                        f"a hook is left behind {at}" if left else f"hooks that others had attached {at} are gone"
                    )
                    hooks.clear()
                    hooks.update(was)
        return (
            told
            and f"{told}.\n  Next: use run_with_hooks, or `with hooks(model, ...):`; they take away just their own."
        )

    return undo


def _hooks_of(part: nn.Module) -> list[dict[int, Any]]:
    """Where a module keeps its hooks: torch's three kinds, and those of a hook point."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_fns")
    return [vars(part)[name] for name in names if name in vars(part)]
