# ruff: noqa: N802 (check_AdamW is named after its exercise)
"""Chapter 03, the loop: the learning rate, AdamW, and which parameters decay.

Oracles are the schedule in another form, Adam spelled out, and the names of the parameters. Adam is not torch's, whose
first optimizer in a process takes seconds to import what it compiles with; a test compares the two.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.ch03.training import side_by_side
from course_utils.checks.comparing import compare, unchanged
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.standins.transformer import SmallModel
from course_utils.checks.translating import during
from course_utils.config import TransformerConfig

Grads = Sequence[Tensor | None]

# ------------------------------------------------------------------------------------------------------ the schedule


def half_cosine(along: float) -> float:
    """The share of the height that is left: cos^2 of half the angle, which is (1 + cos) / 2."""
    return math.cos(math.pi * along / 2) ** 2


def line(step: int, warmup: int, peak: float, floor: float) -> float:
    return peak / warmup * (step + 1)


def scheduling(
    up: Callable[[int, int, float, float], float] = line,
    down: Callable[[float], float] = half_cosine,
    levels: Callable[[float, float], tuple[float, float, float]] = lambda peak, floor: (peak, floor, floor),
    **wrong: Any,
) -> Callable[..., float]:
    """A schedule with switches; `levels` are where the cosine begins, where it ends, and the rate after it."""

    def cosine_schedule(step: int, warmup: int, total: int, peak: float, floor: float) -> float:
        if step < warmup and not wrong.get("at_once"):
            return up(step, warmup, peak, floor)
        begin = 0 if wrong.get("from_0") else warmup + wrong.get("begin", 0)
        end = total + wrong.get("end", 0) + (warmup if wrong.get("whole_length") else 0)
        top, bottom, after = levels(peak, floor)
        if step >= end and not wrong.get("rises"):
            return after
        return bottom + (top - bottom) * down((step - begin) / (end - begin))

    return cosine_schedule


@known_mistakes(
    {
        "the rate rises again after step `total`; it should stay at `floor`.": scheduling(rises=True),
        "the rate is 0 after the end; it should be `floor`.": scheduling(levels=lambda peak, floor: (peak, floor, 0.0)),
        "the cosine is a step early: it reaches `floor` at step total - 1.": scheduling(end=-1),
        "the cosine is a step ahead: it begins at warmup - 1 and reaches `floor` at step total - 1.": scheduling(
            begin=-1, end=-1
        ),
        "the cosine begins at step warmup - 1; it begins at `warmup`.": scheduling(begin=-1),
        "the warm-up is not subtracted: when it ends, the cosine is already part of the way down.": scheduling(
            from_0=True
        ),
        "the cosine takes `total` steps from the end of the warm-up; it ends at step `total`.": scheduling(
            whole_length=True
        ),
        "it falls in a straight line.": scheduling(down=lambda along: 1 - along),
        "it is a whole cosine: down in the middle and up again.": scheduling(
            down=lambda along: math.cos(math.pi * along) ** 2
        ),
        "the factor 1/2 is missing.": scheduling(down=lambda along: 2 * half_cosine(along)),
        "`floor` is left out: the cosine goes down to 0.": scheduling(levels=lambda peak, floor: (peak, 0.0, 0.0)),
        "`floor` is left out of the cosine, and the rate jumps to it at the end.": scheduling(
            levels=lambda peak, floor: (peak, 0.0, floor)
        ),
        "the cosine swings by `peak` above `floor`; it should swing by peak - floor.": scheduling(
            levels=lambda peak, floor: (peak + floor, floor, floor)
        ),
        "`floor` is taken for a share of `peak`; it is a learning rate.": scheduling(
            levels=lambda peak, floor: (peak, floor * peak, floor * peak)
        ),
        "the warm-up is a step late: it begins at 0 and reaches `peak` at step `warmup`.": scheduling(
            up=lambda step, warmup, peak, floor: peak * step / warmup
        ),
        "there is no warm-up.": scheduling(up=lambda step, warmup, peak, floor: peak),
        "there is no warm-up: the cosine begins at step 0.": scheduling(at_once=True, from_0=True),
        "the warm-up begins at `floor`; it begins at peak / warmup.": scheduling(
            up=lambda step, warmup, peak, floor: floor + (peak - floor) * step / warmup
        ),
    }
)
def check_cosine_schedule(fn: Callable[..., Any]) -> None:
    """Whole curves, three steps beyond their end: a warm-up of four, of one, and none at all."""
    for case in [(4, 13, 0.9, 0.2), (0, 5, 0.5, 0.0), (1, 8, 2.0, 0.5), (7, 10, 1.0, 0.1)]:
        steps = range(case[1] + 4)
        name = f"cosine_schedule(step, {', '.join(map(str, case))})"
        values = []
        with during(f"in {name}"):
            for step in steps:
                value = fn(step, *case)
                if isinstance(value, bool) or not isinstance(value, Real):
                    kind = "None" if value is None else f"a {type(value).__name__}"
                    raise CheckFailed(
                        f"cosine_schedule: expected a plain number at step {step}, got {kind}.\n"
                        "  Next: Python's own numbers and the module `math` are enough here."
                    )
                values.append(float(value))
        expected = [scheduling()(step, *case) for step in steps]
        compare(name, torch.tensor(values, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), "step")


# -------------------------------------------------------------------------------------------------------------- AdamW

SHAPES = ((3, 5), (4,), (), (2, 3, 2))
SIZES = (1.0, 0.01, 30.0, 0.3)  # of the gradients: Adam should not care


def _start(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(noise(*shape, seed=20 + i).to(dtype)) for i, shape in enumerate(SHAPES)]


def _gradients(n_steps: int, dtype: torch.dtype = torch.float32, gaps: bool = True) -> list[list[Tensor | None]]:
    """One for each parameter and step; parameter 1 sometimes has none."""
    return [
        [
            None if gaps and i == 1 and step % 3 == 0 else size * (noise(*shape, seed=100 * step + i) + 0.4).to(dtype)
            for i, (shape, size) in enumerate(zip(SHAPES, SIZES, strict=True))
        ]
        for step in range(n_steps)
    ]


def usual_deviation(v: Tensor, share: float, eps: float) -> Tensor:
    """What m_hat is divided by; v is this `share` of v_hat."""
    return (v / share).sqrt() + eps


def adam(**wrong: Any) -> type:
    """Adam spelled out, with switches for what people get wrong; it cannot be saved, which is asked for last."""

    class AdamW:
        def __init__(self, params: Any, **options: Any) -> None:
            entries = list(params)
            groups = entries if isinstance(entries[0], dict) else [{"params": entries}]
            self.param_groups = [{**options, **group, "params": list(group["params"])} for group in groups]
            self.at_first = [dict(group) for group in self.param_groups]
            self.moments: dict[nn.Parameter, tuple[int, Any, Any]] = {}
            self.calls = self.visits = 0

        @torch.no_grad()
        def step(self) -> None:
            self.calls += 1
            for group, at_first in zip(self.param_groups, self.at_first, strict=True):
                options = at_first if wrong.get("options_read_once") else group
                options = self.param_groups[0] if wrong.get("options_of_first_group") else options
                for p in group["params"]:
                    if p.grad is not None or wrong.get("none_is_zero"):
                        p.copy_(self.moved(p, torch.zeros_like(p) if p.grad is None else p.grad, options))

        def moved(self, parameter: Any, g: Tensor, options: dict[str, Any]) -> Tensor:
            """Where the parameter goes; its moments are noted."""
            lr, eps, decay = options["lr"], options["eps"], options["weight_decay"]
            beta1, beta2 = reversed(options["betas"]) if wrong.get("swapped_betas") else options["betas"]
            t, m, v = self.moments.get(parameter, (0, 0.0, 0.0))
            if wrong.get("forgets"):
                m = v = 0.0
            self.visits += 1
            t = self.visits if wrong.get("counts_visits") else self.calls if wrong.get("counts_calls") else t + 1
            p, lost = parameter, (1 if wrong.get("decay_without_lr") else lr) * decay
            if wrong.get("coupled"):
                g = g + decay * p
            elif not wrong.get("no_decay") and not wrong.get("decay_last"):
                p = p - lost * p
            m = beta1 * m + (1 if wrong.get("sum_m") else 1 - beta1) * g
            v = beta2 * v + (1 - beta2) * wrong.get("square", torch.square)(g)
            self.moments[parameter] = t, m, v
            m_hat = m / (1.0 if wrong.get("raw_m") else 1 - beta1**t)
            deviation = wrong.get("deviation", usual_deviation)(v, 1.0 if wrong.get("raw_v") else 1 - beta2**t, eps)
            p = p - wrong.get("sign", 1) * lr * m_hat / deviation
            return p - lost * p if wrong.get("decay_last") else p

    return AdamW


@known_mistakes(
    {
        "the decay goes into the gradient, and so through the moments (Adam with L2); it should act on p alone.": adam(
            coupled=True
        ),
        "there is no weight decay.": adam(no_decay=True),
        "the decay is not multiplied by lr.": adam(decay_without_lr=True),
        "the decay comes after the update; it comes first.": adam(decay_last=True),
        "the bias correction of m and v is left out.": adam(raw_m=True, raw_v=True),
        "the bias correction of m is left out.": adam(raw_m=True),
        "the bias correction of v is left out.": adam(raw_v=True),
        "eps is added inside the root; it is added to the root.": adam(
            deviation=lambda v, share, eps: (v / share + eps).sqrt()
        ),
        "eps is added before the bias correction; it is added to sqrt(v_hat).": adam(
            deviation=lambda v, share, eps: (v.sqrt() + eps) / share**0.5
        ),
        "eps is left out.": adam(deviation=lambda v, share, eps: (v / share).sqrt()),
        "the root of v_hat is not taken.": adam(deviation=lambda v, share, eps: v / share + eps),
        "v averages g instead of its square.": adam(square=lambda g: g),
        "beta1 and beta2 are swapped.": adam(swapped_betas=True),
        "m adds up g instead of (1 - beta1) g.": adam(sum_m=True),
        "m and v begin at zero in every step; they are kept between steps.": adam(forgets=True),
        "t counts the parameters that were visited; it counts steps.": adam(counts_visits=True),
        "the update is added; the loss falls in the other direction.": adam(sign=-1),
        "the options of the first group are used for every group.": adam(options_of_first_group=True),
        "options are read once; those in param_groups may change between steps.": adam(options_read_once=True),
        "a `.grad` of None counts as zero; such a parameter should be passed over.": adam(none_is_zero=True),
        "one t counts for all; each parameter counts the steps in which it had a gradient.": adam(counts_calls=True),
    }
)
def check_AdamW(cls: Any) -> None:
    """Against Adam spelled out: one group, then three whose learning rate changes, over fifty steps."""
    _check_construction(cls)
    plain = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.02, "weight_decay": 0.4}
    _race(cls, "AdamW with one group, no gradient missing", lambda ps: (p for p in ps), plain, 4, gaps=False)
    _race(cls, "AdamW with one group", list, plain, 5)

    def three(ps: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        first = {"params": [ps[2]], "lr": 0.2, "weight_decay": 0.0, "betas": (0.5, 0.7)}
        return [first, {"params": [ps[0], ps[3]], "eps": 0.3}, {"params": [ps[1]], "weight_decay": 0.9, "lr": 0.01}]

    _race(
        cls,
        "AdamW with three groups, whose options change between steps",
        three,
        plain,
        50,
        dtype=torch.float64,
        anneal=True,
    )
    _check_zero_grad(cls)
    _check_state(cls, plain)
    _check_in_place(cls, plain)


def _check_construction(cls: Any) -> None:
    keep = "Next: keep the methods that were given (the statement holds them)."
    if not isinstance(cls, type):
        raise CheckFailed(f"AdamW: expected a class.\n  {keep}")
    groups = getattr(cls(_start()), "param_groups", None)
    if not isinstance(groups, list) or not all(isinstance(group, dict) and "params" in group for group in groups):
        raise CheckFailed(f"AdamW: `param_groups` should be a list of dicts.\n  {keep}")


def _race(
    cls: Any,
    name: str,
    grouped: Callable[[Sequence[nn.Parameter]], Any],
    options: dict[str, Any],
    n_steps: int,
    dtype: torch.dtype = torch.float32,
    gaps: bool = True,
    anneal: bool = False,
) -> None:
    ours, theirs = _start(dtype), _start(dtype)
    optimizer, oracle = cls(grouped(ours), **options), adam()(grouped(theirs), **options)
    gradients = _gradients(n_steps, dtype, gaps)
    first = [dict(group) for group in oracle.param_groups]
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {}
    for step, grads in enumerate(gradients):
        for group, same, options in zip(optimizer.param_groups, oracle.param_groups, first, strict=True):
            changed = {name: options[name] * 0.93**step for name in ("lr", "eps", "weight_decay")}
            changed["betas"] = tuple(beta * 0.99**step for beta in options["betas"])
            for each in (group, same) if anneal else ():
                each.update(changed)
        for mine, other, grad in zip(ours, theirs, grads, strict=True):
            mine.grad, other.grad = (None, None) if grad is None else (grad.clone(), grad.clone())
        with unchanged(name, **{f"gradient {i}": p.grad for i, p in enumerate(ours) if p.grad is not None}):
            optimizer.step()
        oracle.step()
        if step in (0, 1, n_steps - 1):
            place = f"{name}: all parameters, side by side, after {step + 1} step{'s' * (step > 0)}"
            compare(place, side_by_side(ours), side_by_side(theirs), "number", **tolerance)


def _check_zero_grad(cls: Any) -> None:
    parameters = _start()
    optimizer = cls([{"params": parameters[:1]}, {"params": parameters[1:]}])
    for parameter in parameters[1:]:
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for p in parameters]
    optimizer.zero_grad()
    for number_of, parameter in enumerate(parameters):
        if parameter.grad is not None:
            all_zero = not parameter.grad.any()
            raise CheckFailed(
                f"AdamW.zero_grad: the `.grad` of parameter {number_of} should be None afterwards, but is "
                + (
                    "full of zeros.\n  Next: with zeros, `step` would go on moving and decaying it."
                    if all_zero
                    else "still there.\n  Next: visit the parameters of every group."
                )
            )
    if not torch.equal(side_by_side(before), side_by_side(parameters)):
        raise CheckFailed("AdamW.zero_grad: it changed the parameters.\n  Next: change their `.grad` alone.")


def _check_state(cls: Any, options: dict[str, Any]) -> None:
    """A fresh optimizer that gets the state of a used one goes on as that would have."""
    gradients = _gradients(6)
    first, second = _start(), _start()
    used = cls(first, **options)

    def go(optimizer: Any, parameters: Sequence[nn.Parameter], part: Sequence[Grads]) -> None:
        for grads in part:
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            optimizer.step()

    go(used, first, gradients[:3])
    with torch.no_grad():
        for p, source in zip(second, first, strict=True):
            p.copy_(source)
    fresh = cls(second)
    with during("in state_dict and load_state_dict"):
        fresh.load_state_dict(_through_a_file(used.state_dict()))
        go(fresh, second, gradients[3:])
    go(used, first, gradients[3:])
    compare(
        "AdamW after load_state_dict: all parameters, side by side",
        side_by_side(second),
        side_by_side(first),
        "number",
    )


def _check_in_place(cls: Any, options: dict[str, Any]) -> None:
    """Parameters, gradients and moments stay the tensors that they were, and `state` tells what it should."""
    ours, theirs = _start(), _start()
    optimizer, oracle = cls(ours, **options), adam()(theirs, **options)
    state = getattr(optimizer, "state", None)
    if not isinstance(state, Mapping) or not all({"step", "m", "v"} <= {*state.get(p, {})} for p in ours):
        raise CheckFailed(
            "AdamW: `state[p]` should hold 'step', 'm' and 'v' of every parameter p.\n"
            "  Next: keep the `__init__` that was given (it is in the statement)."
        )

    def places() -> dict[str, Tensor]:
        """Second names for the same memory: while it is held, nothing new can lie there."""
        own = {f"parameter {i}": p.detach() for i, p in enumerate(ours)}
        return own | {f"`{m}` of parameter {i}": state[p][m].detach() for m in "mv" for i, p in enumerate(ours)}

    before = places()
    for grads in _gradients(3):
        for mine, other, grad in zip(ours, theirs, grads, strict=True):
            mine.grad, other.grad = grad, grad
        optimizer.step()
        oracle.step()
        if any(p.grad is not grad for p, grad in zip(ours, grads, strict=True)):
            raise CheckFailed("AdamW: after `step` a `.grad` is another one than before.\n  Next: only read it.")
    for what, place in places().items():
        if place.data_ptr() != before[what].data_ptr():
            raise CheckFailed(
                f"AdamW: {what} lies in other memory after `step`, so whatever else holds it keeps the old values.\n"
                "  Next: write into the tensor itself, in place."
            )
    for i, (p, other) in enumerate(zip(ours, theirs, strict=True)):
        steps, *moments = oracle.moments[other]
        if state[p]["step"] != steps:
            got = state[p]["step"]
            raise CheckFailed(
                f"AdamW: state[p]['step'] of parameter {i} should be {steps} after as many steps, got {got}.\n"
                "  Next: count there the steps in which the parameter had a gradient."
            )
        for moment, right in zip("mv", moments, strict=True):
            compare(
                f"AdamW: state[p]['{moment}'] of parameter {i}",
                state[p][moment].flatten(),
                right.flatten(),
                "number",
            )


def _through_a_file(state: Any) -> Any:
    """What torch.save and torch.load make of it, plain data alone."""
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise CheckFailed(
            f"AdamW.state_dict: it cannot be saved and loaded as plain data ({type(error).__name__}: {reason}).\n"
            "  Next: make it of dicts, lists, numbers and tensors only."
        ) from None


# --------------------------------------------------------------------------------------------------- parameter_groups

TABLES = ("W_E", "W_pos", "W_U")
BIASES = ("b_Q", "b_K", "b_V", "b_O", "b_in", "b_out", "b_U")


def symbol(name: str) -> str:
    return name.split(".")[-1]


def decays_by_the_book(name: str) -> bool:
    return symbol(name).startswith("W_") and symbol(name) not in TABLES


def grouping(decays: Callable[[str, Tensor], bool]) -> Callable[..., list[dict[str, Any]]]:
    """Two groups, of the parameters that this rule lets decay and of the others."""

    def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        named = list(model.named_parameters())
        return [
            {"params": [p for name, p in named if decays(name, p) == chosen], "weight_decay": decay}
            for chosen, decay in ((True, weight_decay), (False, 0.0))
        ]

    return parameter_groups


def with_these_too(*symbols: str) -> Callable[..., list[dict[str, Any]]]:
    return grouping(lambda name, p: decays_by_the_book(name) or symbol(name) in symbols)


@known_mistakes(
    {
        "everything decays.": grouping(lambda name, p: True),
        "nothing decays.": grouping(lambda name, p: False),
        "the two groups are swapped.": grouping(lambda name, p: not decays_by_the_book(name)),
        "every tensor with two axes or more decays; `b_Q`, `b_K` and `b_V` have two, one per head.": grouping(
            lambda name, p: p.dim() >= 2
        ),
        "every tensor with two axes or more decays but the tables; `b_Q`, `b_K` and `b_V` have two.": grouping(
            lambda name, p: p.dim() >= 2 and symbol(name) not in TABLES
        ),
        "the tables at both ends decay too (W_E, W_pos, W_U).": with_these_too(*TABLES),
        "the embeddings decay too (W_E, W_pos).": with_these_too("W_E", "W_pos"),
        "the token embeddings decay too (W_E).": with_these_too("W_E"),
        "the unembedding decays too (W_U), a table like W_E.": with_these_too("W_U"),
        "biases decay too.": with_these_too(*BIASES),
        "LayerNorm's `w` and `b` decay too.": with_these_too("w", "b"),
        "everything inside the blocks decays, biases and LayerNorm too.": grouping(
            lambda name, p: name.startswith("blocks")
        ),
    }
)
def check_parameter_groups(fn: Callable[..., Any]) -> None:
    """By name, for a model with MLPs and one without; in this course's model, biases may have two axes."""
    for decay, attn_only in [(0.3, False), (0.07, True)]:
        cfg = TransformerConfig(
            d_vocab=13, n_ctx=9, n_layers=12, n_heads=3, d_model=7, d_head=6, d_mlp=11, attn_only=attn_only
        )
        model = SmallModel(cfg)
        groups = fn(model, decay)
        _check_groups_shape(groups)
        names = {parameter: name for name, parameter in model.named_parameters()}
        found: dict[str, float] = {}
        for group in groups:
            for parameter in group["params"]:
                if parameter not in names:
                    raise CheckFailed(
                        "parameter_groups: it returned a tensor that is not a parameter of the model.\n"
                        "  Next: hand on the parameters themselves, not copies, names or `.data`."
                    )
                if names[parameter] in found:
                    raise CheckFailed(
                        f"parameter_groups: `{names[parameter]}` comes twice, so it would be updated twice.\n"
                        "  Next: every parameter belongs to one group."
                    )
                found[names[parameter]] = group["weight_decay"]
        _compare_decays(found, model, decay)
        for group in groups:
            own = [names[parameter] for parameter in group["params"]]
            if own != [name for name in names.values() if name in set(own)]:
                raise CheckFailed(
                    "parameter_groups: the parameters are not in the order of model.named_parameters().\n"
                    "  Next: keep it; a saved optimizer finds its parameters by their place."
                )
        if len(groups) != 2:
            raise CheckFailed(
                f"parameter_groups: expected two groups, got {len(groups)}.\n"
                "  Next: one for what decays, one for what does not."
            )


def _check_groups_shape(groups: object) -> None:
    keys = "Next: return a list of two dicts, each with the keys 'params' (a list) and 'weight_decay' (a number)."
    if not isinstance(groups, list | tuple) or not all(isinstance(group, dict) for group in groups):
        raise CheckFailed(f"parameter_groups: expected a list of dicts, got a {type(groups).__name__}.\n  {keys}")
    for group in groups:
        for key in ("params", "weight_decay"):
            if key not in group:
                raise CheckFailed(f"parameter_groups: a group has no {key!r}.\n  {keys}")
        if not isinstance(group["params"], list | tuple):
            kind = type(group["params"]).__name__
            raise CheckFailed(f"parameter_groups: 'params' should be a list, got a {kind}.\n  {keys}")


def _compare_decays(found: dict[str, float], model: nn.Module, decay: float) -> None:
    named = dict(model.named_parameters())
    missing = [name for name in named if name not in found]
    if missing:
        raise CheckFailed(
            f"parameter_groups: `{missing[0]}` is in no group, so it would never be trained"
            + (f" (and {len(missing) - 1} more)." if len(missing) > 1 else ".")
            + "\n  Next: what does not decay belongs into the second group."
        )

    expected = {name: decay if decays_by_the_book(name) else 0.0 for name in named}
    wrong = [name for name in named if found[name] != expected[name]]
    if wrong:
        shape = tuple(named[wrong[0]].shape)
        raise CheckFailed(
            f"parameter_groups: wrong decay for {len(wrong)} of {len(named)} parameters.\n"
            f"  first at `{wrong[0]}`, of shape {shape}: expected {expected[wrong[0]]}, got {found[wrong[0]]}",
            evidence=Evidence("parameter_groups", found),
            advice="  Next: the last part of a name tells what it is; print names and decay.",
        )
