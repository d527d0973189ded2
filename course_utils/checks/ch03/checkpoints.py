"""Chapter 03, the loop: what lets a run go on after a kill.

The oracle is what the file system says, moment by moment, and what torch.load finds in the file.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.plain import must_raise

# --------------------------------------------------------------------------------------------------- save_checkpoint


class _CutOff(BaseException):
    """Ends a save half-way, as a kill would."""


class _Bomb:
    def __reduce__(self) -> Any:
        raise _CutOff


class _Schedule:
    """Something else with a state_dict: what counts is the method, not the class."""

    def state_dict(self) -> dict[str, Any]:
        return {"warmup": 3, "rates": noise(2, seed=8)}


class _Optimizer:
    """What torch's AdamW says of itself after two steps; torch's own would first load torch._dynamo, for a second."""

    def state_dict(self) -> dict[str, Any]:
        state = {
            number: {
                "step": torch.tensor(2.0),
                "exp_avg": noise(*shape, seed=5 + number),
                "exp_avg_sq": noise(*shape, seed=7 + number).square(),
            }
            for number, shape in enumerate([(2, 3), (2,)])
        }
        return {"state": state, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}]}


def _training_state() -> tuple[dict[str, Any], dict[str, Any]]:
    """Objects as a training loop has them, and the plain data that a checkpoint should hold."""
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=seed))
    generator = torch.Generator().manual_seed(3)
    torch.randn(5, generator=generator)
    others = {"step": 2, "history": [{"step": 1, "loss": 0.5}], "recipe": "tiny", "best": noise(3, seed=9)}
    objects = {"model": model, "optimizer": _Optimizer(), "generator": generator, "schedule": _Schedule(), **others}
    return objects, plain_data(objects)


def plain_data(objects: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint should hold of these objects."""
    data = dict(objects)
    return data | {
        "model": data["model"].state_dict(),
        "optimizer": data["optimizer"].state_dict(),
        "schedule": data["schedule"].state_dict(),
        "generator": data["generator"].get_state(),
    }


def saving(change: Callable[[dict[str, Any], Mapping[str, Any]], Any]) -> Callable[..., None]:
    """Stores what `change` makes of the right data and the objects; how it writes matters only later."""

    def save_checkpoint(path: Path, **state: Any) -> None:
        torch.save(change(plain_data(state), state), path)

    return save_checkpoint


def without(name: str) -> Callable[..., None]:
    return saving(lambda data, objects: {key: value for key, value in data.items() if key != name})


def with_generator(state: Callable[[torch.Generator], Any]) -> Callable[..., None]:
    return saving(lambda data, objects: data | {"generator": state(objects["generator"])})


@known_mistakes(
    {
        "the generator's seed is stored: it would begin again. Its state says how far it has come.": with_generator(
            torch.Generator.initial_seed
        ),
        "the state of torch's global generator is stored instead of that of this one.": with_generator(
            lambda generator: torch.get_rng_state()
        ),
        "the generator is stored as it was at the start; its state says how far it has come.": with_generator(
            lambda generator: torch.Generator().manual_seed(generator.initial_seed()).get_state()
        ),
        "only the model's weights are stored.": saving(lambda data, objects: data["model"]),
    },
    {
        f"`{name}` is forgotten; a run that goes on without it becomes another run.": without(name)
        for name in ("model", "optimizer", "generator", "step", "history", "recipe", "best")
    },
)
def check_save_checkpoint(fn: Callable[..., Any]) -> None:
    """What the file holds; then that an old checkpoint stays whole, whenever the writing breaks off."""
    objects, plain = _training_state()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "run.pt"
        state = objects["generator"].get_state()
        fn(path, **objects)
        if not torch.equal(state, objects["generator"].get_state()):
            raise CheckFailed("save_checkpoint: it drew from the generator.\n  Next: only read its state.")
        _check_stored(path, plain)
        _check_only(folder, path)
        older = dict(plain, step=1)
        fn(path, **dict(objects, step=1))
        _check_stored(path, older)
        with contextlib.suppress(_CutOff):
            fn(path, **dict(objects, step=3, later=_Bomb()))
        broken_off = "when the writing broke off half-way, the good checkpoint at this path was lost"
        _check_survivor(path, older, broken_off)
        for left in folder.iterdir():
            if left != path:
                left.unlink()
        _check_swap(fn, path, objects, older)
        _check_stored(path, plain)
        _check_only(folder, path)
        for what, value in (
            ("a Path", folder),
            ("a NumPy number", np.float64(0.5)),
            ("an object of your own class", _own_object()),
        ):
            refused = dict(objects, where=value)
            call = f"{what} among the values"
            must_raise("save_checkpoint", ValueError, call, lambda refused=refused: fn(path, **refused))  # type: ignore[misc]
        _check_survivor(path, plain, "when it had to refuse a value, the good checkpoint at this path was lost")
        _check_only(folder, path)


def _own_object() -> Any:
    """Of a class that is defined in a function: pickle itself cannot store it, with an AttributeError of its own."""

    class Settings:
        pass

    return Settings()


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_stored(path: Path, plain: dict[str, Any]) -> None:
    if not path.is_file():
        raise CheckFailed("save_checkpoint: afterwards there is no file at `path`.\n  Next: write to just this path.")
    try:
        stored = _load(path)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise CheckFailed(
            f"save_checkpoint: torch.load(path, weights_only=True) cannot read the file ({type(error).__name__}: "
            f"{reason}).\n  Next: store plain data with torch.save: state_dict() and get_state(), not the objects."
        ) from None
    difference = first_difference(stored, plain, "stored")
    if difference is not None:
        raise CheckFailed(
            f"save_checkpoint: the file does not hold what it should.\n  {difference}",
            evidence=Evidence("save_checkpoint", stored),
            advice="  Next: load the file and print what it holds.",
        )


def _check_only(folder: Path, path: Path) -> None:
    others = sorted(entry.name for entry in folder.iterdir() if entry != path)
    if others:
        raise CheckFailed(
            f"save_checkpoint: it leaves a file `{others[0]}` behind.\n"
            "  Next: os.replace moves the new file into its place; a copy does not."
        )


def _check_survivor(path: Path, older: dict[str, Any], what: str) -> None:
    try:
        whole = first_difference(_load(path), older, "stored") is None
    except Exception:
        whole = False
    if not whole:
        raise CheckFailed(
            f"save_checkpoint: {what}.\n"
            "  Next: write all of the new one into another file of the same folder first; then exchange them."
        )


@contextlib.contextmanager
def _watched_moves(path: Path, older: dict[str, Any]) -> Iterator[list[str]]:
    """Note what is wrong at the moment in which a file is moved, or removed: a kill could come just then."""
    faults: list[str] = []
    originals = {name: getattr(os, name) for name in ("replace", "rename", "remove", "unlink")}

    def watch(name: str) -> Callable[..., Any]:
        def act(source: Any, *others: Any, **options: Any) -> Any:
            target = Path(others[0]) if others else None
            if target == path:
                if Path(source).parent.resolve() != path.parent.resolve():
                    faults.append(
                        "the new file is written in another folder; a move from another disk is not a single step"
                    )
                try:
                    _load(Path(source))
                except Exception:
                    faults.append("the file that was moved to `path` was not complete at that moment")
            elif Path(source) == path and not faults:
                faults.append("the old checkpoint was removed before the new one was in its place")
            return originals[name](source, *others, **options)

        return act

    for name in originals:
        setattr(os, name, watch(name))
    try:
        yield faults
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def _check_swap(fn: Callable[..., Any], path: Path, objects: dict[str, Any], older: dict[str, Any]) -> None:
    """A second name for the old file shows whether it was written into."""
    second = path.with_name("second_name_of_the_old_file")
    with contextlib.suppress(OSError, NotImplementedError):  # a file system without such names
        os.link(path, second)
    with _watched_moves(path, older) as faults:
        fn(path, **objects)
    if second.exists():
        _check_survivor(second, older, "it writes into the file that stands at `path`: a kill would leave half of it")
        second.unlink()
    if faults:
        raise CheckFailed(
            f"save_checkpoint: {faults[0]}.\n"
            "  Next: write to another file of the same folder, close it, and then os.replace it onto `path`."
        )


# --------------------------------------------------------------------------------------------------- load_checkpoint

_CODE_THAT_RAN: list[str] = []


def _note_that_code_ran(what: str) -> dict[str, str]:
    _CODE_THAT_RAN.append(what)
    return {"step": what}


class _Evil:
    """Unpickling it calls a function: here a harmless one."""

    def __reduce__(self) -> Any:
        return _note_that_code_ran, ("from a file",)


@known_mistakes(
    {
        "the values are returned without their names.": lambda path: tuple(_load(path).values()),
        "only the weights of the model are returned.": lambda path: _load(path)["model"],
        "the model's part alone is returned; the rest of the run is in the file too.": lambda path: {
            "model": _load(path)["model"]
        },
    }
)
def check_load_checkpoint(fn: Callable[..., Any]) -> None:
    """What was stored comes back, bit for bit; a file with code in it is refused, and a missing one is an error."""
    _, plain = _training_state()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run.pt"
        torch.save(plain, path)
        before = path.read_bytes()
        loaded = fn(path)
        if loaded is None:
            raise CheckFailed("load_checkpoint: returned None.\n  Next: end the function with `return ...`.")
        difference = first_difference(loaded, plain, "loaded")
        if difference:
            raise CheckFailed(
                f"load_checkpoint: it does not return what the file holds.\n  {difference}",
                evidence=Evidence("load_checkpoint", loaded),
                advice="  Next: return the whole dict, as torch.load gives it.",
            )
        if not path.is_file() or path.read_bytes() != before:
            raise CheckFailed("load_checkpoint: it changed the file.\n  Next: only read it.")
        torch.save({"step": _Evil()}, path)
        _CODE_THAT_RAN.clear()
        with contextlib.suppress(Exception):
            fn(path)
        if _CODE_THAT_RAN:
            _CODE_THAT_RAN.clear()
            raise CheckFailed(
                "load_checkpoint: a file that holds a function call made it run (here a harmless one).\n"
                "  Next: torch.load has an option that reads plain data only; see the statement."
            )
        must_raise("load_checkpoint", FileNotFoundError, "a path without a file", lambda: fn(Path(name) / "nothing.pt"))
        with mock.patch("torch.serialization.location_tag", lambda storage: "cuda:63"):
            torch.save(plain, path)  # as on a machine with many GPUs
        try:
            difference = first_difference(fn(path), plain, "loaded")
        except RuntimeError:
            difference = "it raised an error, since the GPU is not here"
        if difference:
            raise CheckFailed(
                f"load_checkpoint: it cannot read what was written on another machine's GPU.\n  {difference}\n"
                "  Next: say where the tensors belong; torch.load has an option for that."
            )


# ------------------------------------------------------------------------------------------------ what a file holds


def first_difference(actual: Any, expected: Any, where: str) -> str | None:
    """The first place at which nested plain data differ, in words; None where they agree bit for bit."""
    if isinstance(expected, Mapping):
        if not isinstance(actual, Mapping):
            return f"at `{where}` expected a dict, got a {type(actual).__name__}"
        for key in expected:
            if key not in actual:
                return f"`{where}` has no entry {key!r}"
            found = first_difference(actual[key], expected[key], f"{where}[{key!r}]")
            if found:
                return found
        extra = [key for key in actual if key not in expected]
        return f"`{where}` has an entry {extra[0]!r} that nobody stored" if extra else None
    if isinstance(expected, list | tuple):
        if not isinstance(actual, list | tuple) or len(actual) != len(expected):
            size = f"one of {len(actual)}" if isinstance(actual, list | tuple) else f"a {type(actual).__name__}"
            return f"at `{where}` expected a sequence of {len(expected)}, got {size}"
        places = (
            first_difference(a, e, f"{where}[{i}]") for i, (a, e) in enumerate(zip(actual, expected, strict=True))
        )
        return next((place for place in places if place), None)
    if isinstance(expected, Tensor):
        if not isinstance(actual, Tensor):
            return f"at `{where}` expected a Tensor, got a {type(actual).__name__}"
        if actual.dtype != expected.dtype or actual.shape != expected.shape:
            want, got = (f"{t.dtype} of shape {tuple(t.shape)}" for t in (expected, actual))
            return f"at `{where}` expected {want}, got {got}"
        wrong = int((actual != expected).sum())
        return f"at `{where}` {wrong} of {expected.numel()} values differ" if wrong else None
    if type(actual) is not type(expected) or actual != expected:
        return f"at `{where}` expected {expected!r}, got {type(actual).__name__ if callable(actual) else repr(actual)}"
    return None
