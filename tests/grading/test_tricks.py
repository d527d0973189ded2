"""Tricks are found, and what is none is not taken for one."""

import builtins
import functools
import sys
import types
from pathlib import Path

import pytest
import torch
import torch._dynamo  # which replaces torch.manual_seed
from torch import nn

import solutions.ch02_transformer as theirs
from course_utils import verdict
from course_utils.checks import comparing, find_checks, outcomes
from course_utils.grading.tricks import Watch, reference_behind

find_checks()
torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # of each class the first one makes torch wrap a method


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


REPLACED = [
    (torch, "isclose", "torch.isclose"),
    (torch.Tensor, "__eq__", "torch.Tensor.__eq__"),
    (nn.functional, "gelu", "torch.nn.functional.gelu"),
    (nn.Module, "__call__", "torch.nn.modules.module.Module.__call__"),
    (builtins, "isinstance", "builtins.isinstance"),
    (comparing, "compare", "course_utils.checks.comparing.compare"),
    (outcomes.CheckFailed, "_render_traceback_", "course_utils.checks.outcomes.CheckFailed._render_traceback_"),
    (sys.modules["course_utils.checks.ch02.layers"], "check_MLP", "check_MLP"),
    (verdict, "check", "course_utils.verdict.check"),
]


@pytest.mark.parametrize("owner, name, words", REPLACED, ids=[words for _, _, words in REPLACED])
def test_what_is_replaced_is_found(watch: Watch, monkeypatch: pytest.MonkeyPatch, owner, name: str, words: str):
    assert watch.changes() == []
    with monkeypatch.context() as patch:
        was = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **others: was(*args, **others))
        changes = watch.changes()
    assert any(words in change for change in changes)
    assert watch.changes() == []


@pytest.mark.parametrize("part", ["__code__", "__defaults__", "__kwdefaults__"])
def test_what_is_changed_inside_is_found(watch: Watch, monkeypatch: pytest.MonkeyPatch, part: str):
    def other(input, dim=0, *, more=1): ...

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional.softmax, part, getattr(other, part))
        assert "torch.nn.functional.softmax" in watch.changes()
    assert watch.changes() == []


def test_what_hides_a_builtin_from_the_checks_is_found(watch: Watch, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(comparing, "isinstance", lambda *args: True, raising=False)
        assert watch.changes() == ["course_utils.checks.comparing.isinstance"]


def test_what_is_added_elsewhere_is_none_of_it(watch: Watch, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "my_own", lambda: None, raising=False)
    monkeypatch.setattr(nn.Module, "my_own", lambda self: None, raising=False)
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).step()
    assert watch.changes() == []


# --- the reference solution -----------------------------------------------------------------------------------------

SPACE = """\
import functools
import inspect
import types
import torch
import solutions.ch02_transformer as theirs
from solutions.ch02_transformer import Attention as Reference, gelu_new as theirs_too

class Inherits(Reference):
    pass

class Holds(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.inner = Reference(cfg)

class Static:
    forward = staticmethod(theirs_too)

def delegates(x):
    return theirs.gelu_new(x)

def helper(x):
    return theirs_too(x)

def through_a_helper(x):
    return [helper(one) for one in x]

def by_default(x, how=theirs_too):
    return how(x)

def made(how):
    return lambda x: how(x)

def imports(x):
    from solutions.ch02_transformer import gelu_new
    return gelu_new(x)

def imports_by_name(x):
    import importlib
    return importlib.import_module("solutions.ch02_transformer").gelu_new(x)

closure = made(theirs_too)
partly = functools.partial(theirs_too)
copied = types.FunctionType(inspect.unwrap(theirs_too).__code__, {"math": __import__("math"), "torch": torch})
dressed = functools.wraps(theirs_too)(lambda x: x)
gelu_new = theirs_too

def own(x):
    return torch.tanh(x)

def uses_another_exercise(x):
    return gelu_new(x)

class Own(torch.nn.Module):
    def forward(self, x):
        return own(x)
"""


@pytest.fixture(scope="module")
def notebook() -> types.ModuleType:
    module = types.ModuleType("notebook_02")
    exec(compile(SPACE, "02.ipynb code cell 1", "exec"), module.__dict__)
    return module


BORROWED = """Reference gelu_new Inherits Holds Static delegates through_a_helper by_default closure partly copied
dressed imports imports_by_name""".split()


@pytest.mark.parametrize("name", BORROWED)
def test_what_is_made_of_the_reference_is_found(notebook: types.ModuleType, name: str):
    found = reference_behind(getattr(notebook, name), "02", ())
    assert found is not None and found.startswith("solutions.ch02_transformer")


@pytest.mark.parametrize("name", ["own", "Own", "uses_another_exercise"])
def test_own_work_is_not(notebook: types.ModuleType, name: str):
    assert reference_behind(getattr(notebook, name), "02", ["gelu_new"]) is None


@pytest.mark.parametrize("name", BORROWED)
def test_an_earlier_chapters_solutions_may_be_used(notebook: types.ModuleType, name: str):
    assert reference_behind(getattr(notebook, name), "04", ()) is None


def test_every_solution_is_its_own_reference():
    for name in ("Attention", "generate", "KVCache"):
        assert reference_behind(getattr(theirs, name), "02", ()) == f"solutions.ch02_transformer.{name}"
    assert reference_behind(functools.partial(torch.softmax, dim=-1), "02", ()) is None
    assert reference_behind(Path, "02", ()) is None
