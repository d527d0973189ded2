"""How a check speaks: finding it, running it on a learner's object, comparing tensors, wording what went wrong.

A message names the thing, gives one concrete place, claims a cause only on evidence, and says the next move. It never
holds the solution or a traceback.
"""

import copy
import functools
import importlib
import inspect
import linecache
import pkgutil
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

Mistakes = Mapping[str, Tensor | Callable[[], Tensor]]
CheckFn = Callable[[Any], None]

COURSE = Path(__file__).resolve().parent.parent
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"]).resolve()


class CheckFailed(AssertionError):
    """A learner's answer is wrong; the message is the lesson, so notebooks show no traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython calls this instead of printing frames
        return str(self).splitlines()


class NotWritten(NotImplementedError):
    """An exercise, or one that it needs, still raises NotImplementedError: unsolved, which is not the same as wrong."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


# ---------------------------------------------------------------------------------------------- finding and running


def find_checks() -> dict[str, dict[str, CheckFn]]:
    """All checks, as {"02": {"LayerNorm": check_LayerNorm, ...}}, module after module (`chNN_*`)."""
    import course_utils.checks as package

    found: dict[str, dict[str, CheckFn]] = {}
    for module_info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        chapter = re.fullmatch(r"ch(\d\d)_\w+", module_info.name)
        if chapter:
            module = importlib.import_module(f"{package.__name__}.{module_info.name}")
            found.setdefault(chapter[1], {}).update(
                (name.removeprefix("check_"), value)
                for name, value in vars(module).items()
                if name.startswith("check_") and callable(value) and value.__module__ == module.__name__
            )
    return found


def check(obj: object, name: str | None = None) -> None:
    """Check what you wrote, and print one line when it is right: `check(causal_mask)`.

    The exercise is found by the object's own name, or by `name`. Raises NotWritten for an exercise that still holds
    `raise NotImplementedError`, and CheckFailed for a wrong answer, and for anything that is not yours to check.
    """
    checks = {symbol: fn for chapter in find_checks().values() for symbol, fn in chapter.items()}
    name = _exercise_name(obj, name, list(checks))
    refuse_foreign(name, obj)
    run_check(checks[name], obj)
    print(f"{name}: correct")


def run_check(check_fn: CheckFn, obj: object) -> None:
    """Run one check on an object; nothing is printed, and random numbers elsewhere stay what they were.

    Raises NotWritten for a stub (or where the object needs another exercise that still is one) and CheckFailed for a
    wrong answer; an exception in the learner's code becomes a CheckFailed that names the learner's own line.
    """
    name = check_fn.__name__.removeprefix("check_")
    try:
        _run(check_fn, obj, name)
    except CheckFailed as failure:
        part = _failing_part(check_fn, obj)
        if part is None:
            raise
        raise CheckFailed(
            f"{failure}\n  {name} uses `{part}`, which does not pass its own check: begin there."
        ) from None


def _run(check_fn: CheckFn, obj: object, name: str) -> None:
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(0)  # not torch.manual_seed, which would reach into every GPU
            check_fn(obj)
    except (CheckFailed, NotWritten):
        raise
    except Exception as error:
        translated = _translated(name, error, obj)
        if translated is None:
            error.add_note(f"This is a fault in the check of {name}, not in your code. Please report it.")
            raise
        raise translated from None


def refuse_foreign(name: str, obj: object) -> None:
    """Raise CheckFailed for an object that somebody else wrote: the reference solution, this package, a library."""
    obj = obj.func if isinstance(obj, functools.partial) else obj
    module = getattr(obj, "__module__", None) or ""
    package = module.split(".")[0]
    if package == "solutions":
        raise CheckFailed(
            f"{name}: this is the reference solution, imported from {module}.\n"
            "  Next: run the cell in which you wrote your own, and check that."
        )
    if inspect.isbuiltin(obj) or _is_library_module(module):
        source = package or type(obj).__module__
        own = getattr(obj, "__name__", type(obj).__name__)
        where = f" of {source}" if source != "builtins" else ""
        raise CheckFailed(
            f"{name}: this is `{own}`{where}, not something you wrote.\n  Next: write your own; it may call it."
        )


def _exercise_name(obj: object, name: str | None, known: list[str]) -> str:
    """The exercise that `obj` is meant to solve; raises CheckFailed where that cannot be told."""
    if isinstance(obj, str | Tensor | None) or not callable(obj):
        shown = repr(obj) if isinstance(obj, str | int | float | bool | None) else f"a {type(obj).__name__}"
        raise CheckFailed(
            f"check: expected the function or class that you wrote, got {shown}.\n"
            "  Next: write check(causal_mask), without quotes, and without calling it."
        )
    if isinstance(obj, nn.Module):
        kind = type(obj).__name__
        raise CheckFailed(f"check: this is one {kind} object.\n  Next: check the class itself: check({kind}).")
    own_name = getattr(obj, "__name__", None)
    wanted = name if name is not None else own_name
    if wanted in known:
        return wanted
    if name is None and (own_name is None or own_name == "<lambda>"):
        raise CheckFailed(
            'check: this has no name of its own.\n  Next: say which exercise it is, as check(..., name="causal_mask").'
        )
    nearest = ", ".join(get_close_matches(str(wanted), known, n=3, cutoff=0.0))
    raise CheckFailed(
        f"check: there is no exercise named {wanted!r}; the nearest are {nearest}.\n"
        f'  Next: give it that name, or say which you mean: check({own_name or "..."}, name="{nearest.split(",")[0]}").'
    )


# --------------------------------------------------------------------------------- errors inside the learner's code


def _is_library(filename: str | None) -> bool:
    """Whether a file belongs to this package, to an installed one, or to Python itself."""
    if filename is None:
        return False
    if filename.startswith("<"):
        # Notebook cells may be named like this too, but then their text is known; beartype registers its wrappers.
        return filename.startswith("<@beartype") or not linecache.getlines(filename)
    path = Path(filename).resolve()
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(installed) or path.is_relative_to(COURSE) or path.is_relative_to(STANDARD_LIBRARY)


def _is_library_module(name: str) -> bool:
    if name == "__main__":  # its file is whatever was started: a kernel, pytest, ...
        return False
    return name in sys.builtin_module_names or _is_library(getattr(sys.modules.get(name), "__file__", None))


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    return [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]


def _learner_frames(error: BaseException) -> list[tuple[FrameType, int]]:
    return [(frame, line) for frame, line in _frames(error) if not _is_library(frame.f_code.co_filename)]


def _own_name(code: CodeType) -> str:
    """`LayerNorm.forward` is part of LayerNorm; what stands inside another function goes by its own name."""
    return code.co_qualname.split("<locals>.")[-1].split(".")[0]


@contextmanager
def during(what: str) -> Iterator[None]:
    """Say in which case, such as "with cfg.attn_only", an exception in the learner's code came up."""
    try:
        yield
    except (CheckFailed, NotWritten, NotImplementedError):
        raise
    except Exception as error:
        error.add_note(what)
        raise


def _translated(name: str, error: Exception, obj: object) -> CheckFailed | NotWritten | None:
    """The exception in the words of a learner; None where it is none of theirs."""
    theirs = _learner_frames(error)
    if isinstance(error, NotImplementedError) and theirs and theirs[-1][0] is _frames(error)[-1][0]:
        frame, line = theirs[-1]
        # Torch raises NotImplementedError too, for an operation without a kernel: only a `raise` marks a stub.
        if "NotImplementedError" in linecache.getline(frame.f_code.co_filename, line) or str(error).isidentifier():
            stub = _own_name(frame.f_code)
            return NotWritten(f"{name}: not written yet" + ("." if stub == name else f": it needs `{stub}`."))
    case = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    what = f"{type(error).__name__}{case}: {error}".strip().replace("\n", "\n    ").rstrip(": ")
    if not theirs:
        cannot_call = isinstance(error, TypeError) and re.search(r"\(\) (missing|takes|got) ", str(error))
        if not cannot_call and not isinstance(error, NotImplementedError) and isinstance(obj, FunctionType | type):
            return None
        return CheckFailed(
            f"{name}: calling your code raised {what}\n"
            "  Next: compare the names and the order of its arguments with those in the exercise."
        )
    where = "".join(f"\n  at {_place(frame, line)}" for frame, line in theirs[-2:])
    if isinstance(error, NameError) and error.name:
        where += f"\n  Next: run the cell that defines `{error.name}`, or look at its spelling."
    return CheckFailed(f"{name}: your code raised {what}{where}")


def _place(frame: FrameType, line: int) -> str:
    filename = frame.f_code.co_filename
    in_kernel = filename.startswith("<ipython") or "ipykernel_" in filename or not linecache.getlines(filename)
    source = "your cell" if in_kernel else Path(filename).name
    return f"line {line} of {source}: {linecache.getline(filename, line).strip()}".rstrip(": ")


def _failing_part(check_fn: CheckFn, obj: object) -> str | None:
    """The first exercise among those that `obj` uses, directly or not, which fails its own check."""
    checks = next((c for c in find_checks().values() if check_fn in c.values()), {})
    used = _used_definitions(obj)
    for symbol, part_check in checks.items():
        part = used.get(symbol)
        if part is not None and part is not obj and part_check is not check_fn:
            try:
                _run(part_check, part, symbol)
            except NotWritten:
                continue
            except CheckFailed:
                return symbol
    return None


def _used_definitions(obj: object) -> dict[str, Any]:
    """Functions and classes, other than a library's, which the code of `obj` refers to, directly or through others."""
    found: dict[str, Any] = {}
    waiting = [obj]
    while waiting:
        for function in _functions_of(waiting.pop()):
            for name in _names_in(function.__code__):
                value = function.__globals__.get(name)
                theirs = isinstance(value, FunctionType | type) and not _is_library_module(value.__module__)
                if theirs and name not in found:
                    found[name] = value
                    waiting.append(value)
    return found


def _functions_of(obj: object) -> list[FunctionType]:
    members = [m for base in obj.__mro__ for m in vars(base).values()] if isinstance(obj, type) else [obj]
    unwrapped = [inspect.unwrap(member) for member in members if callable(member)]
    return [
        member
        for member in unwrapped
        if isinstance(member, FunctionType) and not _is_library(member.__code__.co_filename)
    ]


def _names_in(code: CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]  # lambdas, comprehensions
    return set(code.co_names).union(*map(_names_in, inner))


# ------------------------------------------------------------------------------------------------ comparing tensors


def compare(
    name: str,
    actual: object,
    expected: Tensor,
    axes: str,
    mistakes: Mistakes | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    inputs: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise CheckFailed unless `actual` is the tensor `expected`, in shape, dtype, device and values.

    `axes` names the axes, such as "batch pos d_model". `mistakes` maps a hint, the rest of the sentence "This is what
    you get if ...", to the answer which that mistake gives, or to a function that works it out: it is printed only
    where the whole answer equals it. `inputs` are tensors of the same shape whose value at the wrong place is worth
    knowing, by name.
    """
    words = axes.split()
    if actual is None:
        raise CheckFailed(f"{name}: returned None.\n  Next: end the function with `return ...`.")
    if not isinstance(actual, Tensor):
        raise CheckFailed(
            f"{name}: expected a Tensor, got a {type(actual).__name__}.\n  Next: return the tensor itself."
        )
    if actual.shape != expected.shape:
        raise CheckFailed(_shape_message(name, actual, expected, words, _causes(actual, mistakes)))
    for what in ("dtype", "device"):
        want, got = (str(getattr(tensor, what)).removeprefix("torch.") for tensor in (expected, actual))
        if getattr(actual, what) != getattr(expected, what):
            raise CheckFailed(
                f"{name}: expected {what} {want}, got {got}.\n"
                f"  Next: look for a tensor or a conversion with a {what} of its own; it should follow the input's."
            )
    actual, expected = actual.detach(), expected.detach()
    if not expected.is_floating_point():
        rtol = atol = 0.0
    wrong = ~torch.isclose(actual.double(), expected.double(), rtol=rtol, atol=atol)
    if wrong.any():
        raise CheckFailed(_value_message(name, actual, expected, wrong, words, mistakes, inputs or {}))


def _causes(actual: Tensor, mistakes: Mistakes | None) -> list[str]:
    """A line for each known mistake whose whole answer this is."""
    answers = {hint: answer if isinstance(answer, Tensor) else answer() for hint, answer in (mistakes or {}).items()}
    return [f"  This is what you get if {hint}" for hint, answer in answers.items() if _same(actual, answer)]


def _same(actual: Tensor, other: Tensor) -> bool:
    return actual.shape == other.shape and torch.allclose(
        actual.double(), other.detach().double(), rtol=1e-4, atol=1e-5, equal_nan=True
    )


def _shape_message(name: str, actual: Tensor, expected: Tensor, words: list[str], causes: list[str]) -> str:
    sizes = list(expected.shape)
    want = ", ".join(f"{word}={size}" for word, size in zip(words, sizes, strict=True))
    lines = [f"{name}: wrong shape.", f"  expected ({want})", f"  got      {tuple(actual.shape)}"]
    if causes:
        return "\n".join(lines + causes)
    got = list(actual.shape)
    if len(set(sizes)) == len(sizes) and sorted(got) == sorted(sizes):
        order = ", ".join(words[sizes.index(size)] for size in got)
        lines.append(f"  The axes are all there, in another order: ({order}).")
    elif len(got) < len(sizes):
        lines.append("  Next: find the step after which an axis is missing; print shapes along the way.")
    else:
        lines.append("  Next: print the shape after each step, and compare with the signature.")
    return "\n".join(lines)


def _shown(value: Tensor) -> str:
    number = value.item()
    return f"{number:.4g}" if isinstance(number, float) else str(number)


def _value_message(
    name: str,
    actual: Tensor,
    expected: Tensor,
    wrong: Tensor,
    words: list[str],
    mistakes: Mistakes | None,
    inputs: Mapping[str, Tensor],
) -> str:
    index = tuple(wrong.nonzero()[0].tolist())
    place = ", ".join(f"{word}={i}" for word, i in zip(words, index, strict=True))
    count = int(wrong.sum())
    lines = [f"{name}: {count} of {wrong.numel()} {'values is' if count == 1 else 'values are'} wrong."]
    at = f"first at [{place}]: " if words else ""
    given = ", ".join(f"{label} {_shown(tensor[index])}" for label, tensor in inputs.items())
    lines.append(
        f"  {at}expected {_shown(expected[index])}, got {_shown(actual[index])}"
        + (f" (there: {given})" if given else "")
    )
    causes = _causes(actual, mistakes)
    if causes:
        return "\n".join(lines + causes)
    pattern = _pattern_of_wrong(actual, expected, wrong, words)
    if pattern:
        lines.append(f"  {pattern}")
    if actual.is_floating_point() and actual.isnan().any() and not expected.isnan().any():
        lines.append("  Next: find the step that gives NaN (not a number), such as 0/0 or inf - inf.")
    else:
        lines.append(
            "  Next: make a small input of your own, work out one value by hand, and print what each step gives."
        )
    return "\n".join(lines)


def _pattern_of_wrong(actual: Tensor, expected: Tensor, wrong: Tensor, words: list[str]) -> str | None:
    """A fact about all wrong values at once, where there is a simple one."""
    for axis, word in enumerate(words):
        others = [other for other in range(wrong.dim()) if other != axis]
        hit = wrong.sum(dim=others).bool() if others else wrong
        if len(hit) > 1 and int(hit.sum()) == 1:
            return f"All of the wrong values are at {word}={hit.int().argmax()}."
        if len(hit) > 2 and hit[1:].all() and not hit[0]:
            return f"None of them is at {word}=0."
    if wrong.all() and wrong.numel() > 2 and actual.is_floating_point() and actual.isfinite().all():
        if not actual.any():
            return "Every value is 0."
        ratio, shift = actual / expected, actual - expected
        if expected.isfinite().all() and expected.all() and torch.allclose(ratio, ratio.flatten()[0], rtol=1e-3):
            return f"Every value is {_shown(ratio.flatten()[0])} times the right one."
        if expected.isfinite().all() and torch.allclose(shift, shift.flatten()[0], rtol=1e-3):
            return f"Every value is off by the same {_shown(shift.flatten()[0])}."
    return None


def identical(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the very same values; NaN is the same as NaN."""
    return first.shape == second.shape and torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)


@contextmanager
def unchanged(name: str, **inputs: Tensor) -> Iterator[None]:
    """Raise CheckFailed if one of these tensors is another one after the block than before it."""
    before = {label: tensor.detach().clone() for label, tensor in inputs.items()}
    yield
    for label, tensor in inputs.items():
        if tensor.dtype != before[label].dtype or not identical(tensor.detach(), before[label]):
            raise CheckFailed(
                f"{name}: it changed `{label}` in place.\n"
                f"  Next: make a new tensor; `{label}[...] = `, `{label} += ` and methods named ..._() write into it."
            )


def follows_input(name: str, fn: Callable[..., Any], inputs: tuple[Any, ...], axes: str) -> None:
    """Call `fn` again in float64, and on a GPU where there is one: values as before, dtype and device the input's.

    Modules among the inputs are copied and moved along; inputs that are neither stay as they are.
    """
    usual = fn(*inputs)
    moves: dict[str, dict[str, Any]] = {"in float64": {"dtype": torch.float64}}
    if torch.cuda.is_available():
        moves["on the GPU"] = {"device": torch.device("cuda", torch.cuda.current_device())}
    for where, target in moves.items():
        moved = [_moved(value, target) for value in inputs]
        compare(f"{name} {where}", fn(*moved), _moved(usual, target), axes, rtol=1e-3, atol=1e-4)


def _moved(value: Any, target: dict[str, Any]) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(**target)
    if isinstance(value, Tensor) and (value.is_floating_point() or "device" in target):
        return value.to(**target)
    return value
