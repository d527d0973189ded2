"""Chapter 03's schedule and optimizer: wrong answers that their checks do not know, and right ones in another style."""

import subprocess
import sys
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import solutions.ch03_training as ref
from course_utils.checks.ch03 import optimizer
from tests.ch03 import other_training_loop as other

SECRETS = ("addcdiv", "lerp", "math.cos", 'startswith("W_")')


def rounded(*case: Any) -> int:
    return int(ref.cosine_schedule(*case))


def slow(step: int, warmup: int, *rest: Any) -> float:
    rate = ref.cosine_schedule(step, warmup, *rest)
    return rate * warmup / (warmup + 1) if step < warmup else rate


def without_steps(step: int, warmup: int, *rest: Any) -> float:
    return (step + 1) / warmup and ref.cosine_schedule(step, warmup, *rest)


# -------------------------------------------------------------------------------------------------------------- AdamW


def zeroing(forget: Callable[[nn.Parameter], None], last: int | None = None) -> type:
    """AdamW with another way to forget the gradients of its first groups, or of all."""

    class AdamW(ref.AdamW):
        def zero_grad(self) -> None:
            for group in self.param_groups[:last]:
                for p in group["params"]:
                    forget(p)

    return AdamW


def set_to_none(p: nn.Parameter) -> None:
    p.grad = None


def fill_with_zeros(p: nn.Parameter) -> None:
    if p.grad is not None:
        p.grad.zero_()


class WritesIntoGradients(ref.AdamW):
    def step(self) -> None:
        for p in self.state:
            if p.grad is not None:
                p.grad.add_(0.001)
        super().step()


class FirstGroupOnly(ref.AdamW):
    def step(self) -> None:
        groups, self.param_groups = self.param_groups, self.param_groups[:1]
        super().step()
        self.param_groups = groups


class StopsWhereAGradientIsMissing(ref.AdamW):
    def step(self) -> None:
        groups = self.param_groups
        self.param_groups = [
            {**group, "params": list(takewhile(lambda p: p.grad is not None, group["params"]))} for group in groups
        ]
        super().step()
        self.param_groups = groups


class AMSGrad(torch.optim.AdamW):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, amsgrad=True, **options)


class ForgetfulState(ref.AdamW):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict({**state_dict, "state": list(self.state.values())})


class MovesMemory(ref.AdamW):
    """Parameters get new memory in every step."""

    def step(self) -> None:
        for p in self.state:
            p.data = p.data.clone()
        super().step()


class MovesMoments(ref.AdamW):
    def step(self) -> None:
        super().step()
        for own in self.state.values():
            own["m"] = own["m"].clone()


class RoundsMoments(ref.AdamW):
    def step(self) -> None:
        super().step()
        for own in self.state.values():
            own["v"].copy_(own["v"].float())


class ReadsDecayOnce(ref.AdamW):
    def step(self) -> None:
        self.first = getattr(self, "first", [group["weight_decay"] for group in self.param_groups])
        now = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, self.first, strict=True):
            group["weight_decay"] = decay
        super().step()
        for group, decay in zip(self.param_groups, now, strict=True):
            group["weight_decay"] = decay


class KeepsStateElsewhere(ref.AdamW):
    """`state` holds what it held at first."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.own, self.state = self.state, {p: {"step": 0, "m": p * 0, "v": p * 0} for p in self.state}

    def step(self) -> None:
        self.own, self.state = self.state, self.own
        super().step()
        self.own, self.state = self.state, self.own

    def state_dict(self) -> Any:
        return {**super().state_dict(), "state": list(self.own.values())}

    def load_state_dict(self, state_dict: Any) -> None:
        self.own, self.state = self.state, self.own
        super().load_state_dict(state_dict)
        self.own, self.state = self.state, self.own


class NotPlain(ref.AdamW):
    def state_dict(self) -> Any:
        return {**super().state_dict(), "owner": self.zero_grad}


# --------------------------------------------------------------------------------------------------- parameter_groups

by_the_book = optimizer.decays_by_the_book


def regrouped(change: Callable[[list[Any], list[Any], float], Any]) -> Any:
    """Another list of groups, made of the parameters that decay and of the others."""

    def parameter_groups(model: Any, weight_decay: float) -> Any:
        yes, no = (group["params"] for group in ref.parameter_groups(model, weight_decay))
        return [{"params": params, "weight_decay": decay} for params, decay in change(yes, no, weight_decay)]

    return parameter_groups


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "cosine_schedule": [
        ("got a Tensor", lambda *case: torch.tensor(ref.cosine_schedule(*case))),
        ("values are wrong", slow),
        ("values are wrong", rounded),
        ("first at [step=5]", optimizer.scheduling(end=1)),
        ("raised ZeroDivisionError in cosine_schedule(step, 0", without_steps),
    ],
    "AdamW": [
        ("AdamW.zero_grad: the `.grad` of parameter 1 should be None", zeroing(lambda p: None)),
        ("full of zeros", zeroing(fill_with_zeros)),
        ("visit the parameters of every group", zeroing(set_to_none, last=1)),
        ("it changed `gradient 0` in place", WritesIntoGradients),
        ("three groups", FirstGroupOnly),
        ("first at [number=19]", StopsWhereAGradientIsMissing),
        ("values are wrong", AMSGrad),
        ("values are wrong", optimizer.adam(square=torch.abs)),
        ("AdamW after load_state_dict", ForgetfulState),
        ("cannot be saved and loaded as plain data", NotPlain),
        ("parameter 0 lies in other memory", MovesMemory),
        ("`m` of parameter 0 lies in other memory", MovesMoments),
        ("three groups, whose options change", RoundsMoments),
        ("three groups, whose options change", ReadsDecayOnce),
        ("state[p]['step'] of parameter 0 should be 3", KeepsStateElsewhere),
    ],
    "parameter_groups": [
        ("first at `blocks.0.attn.W_O`", optimizer.grouping(lambda name, p: by_the_book(name) and "W_O" not in name)),
        ("expected 0.3, got 0.1", regrouped(lambda yes, no, decay: [(yes, 0.1), (no, 0.0)])),
        ("is in no group", regrouped(lambda yes, no, decay: [(yes, decay)])),
        ("comes twice", regrouped(lambda yes, no, decay: [(yes, decay), (no, 0.0), (no[:1], 0.0)])),
        (
            "not a parameter of the model",
            regrouped(lambda yes, no, decay: [([p.detach().clone() for p in yes], decay), (no, 0.0)]),
        ),
        ("expected two groups, got 3", regrouped(lambda yes, no, decay: [(yes, decay), (no[:4], 0.0), (no[4:], 0.0)])),
        ("first at `blocks.10.attn.W_Q`", optimizer.grouping(lambda name, p: by_the_book(name) and name[8] == ".")),
        ("not in the order", regrouped(lambda yes, no, decay: [(yes, decay), (no[::-1], 0.0)])),
    ],
}

ALSO_RIGHT = {
    "cosine_schedule": [other.cosine_schedule, lambda *case: np.float32(other.cosine_schedule(*case))],
    "AdamW": [other.AdamW],
    "parameter_groups": [other.parameter_groups],
}

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "step >= total -> step > total",  # there the cosine has reached the floor by itself
    *(
        f"zip({pair}, strict=True) -> zip({pair})"
        for pair in (
            "self.param_groups, state_dict['param_groups']",
            "self.state.values(), state_dict['state']",
        )
    ),
    "True -> False",  # the same zip(strict=True), of equal lengths
}


def test_adam_spelled_out_is_that_of_torch() -> None:
    """The check's oracle: torch's own is not used there, since its first use takes seconds of imports."""
    ours, theirs = optimizer._start(torch.float64), optimizer._start(torch.float64)
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.02, "weight_decay": 0.4}
    spelled_out, builtin = optimizer.adam()(ours, **options), torch.optim.AdamW(theirs, **options)
    for grads in optimizer._gradients(20, torch.float64):
        for p, same, grad in zip(ours, theirs, grads, strict=True):
            p.grad, same.grad = grad, grad
        spelled_out.step()
        builtin.step()
    for p, same in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, same)
        steps, m, v = spelled_out.moments[p]
        assert steps == builtin.state[same]["step"]
        torch.testing.assert_close(m, builtin.state[same]["exp_avg"])
        torch.testing.assert_close(v, builtin.state[same]["exp_avg_sq"])


@pytest.mark.parametrize(("part", "symbol"), [("optimizer", "AdamW"), ("checkpoints", "save_checkpoint")])
def test_a_check_does_not_load_the_compiler(part: str, symbol: str) -> None:
    """In a process of its own, as a learner's first check is."""
    code = f"import sys; from course_utils.checks.ch03.{part} import check_{symbol} as check"
    code += f"; from solutions.ch03_training import {symbol}"
    code += f"; check({symbol}); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
