"""What the checks of a training loop compare with: a toy language model, Adam spelled out, plain data in a file."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_utils.checks.comparing import Mistakes, compare
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.transformer_interface import transformer_parameters
from course_utils.config import TransformerConfig

Grads = Sequence[Tensor | None]


def number(name: str, what: str, actual: object, expected: float, mistakes: Mapping[str, float] | None = None) -> None:
    """Raise CheckFailed unless `actual` is a plain number with this value, up to the rounding of float32."""
    if actual is None:
        raise CheckFailed(f"{name}: returned None.\n  Next: end the function with `return ...`.")
    if isinstance(actual, Tensor):
        raise CheckFailed(
            f"{name}: expected {what} as a plain number, got a Tensor.\n"
            "  Next: `.item()` makes a number of it, and lets go of the graph behind it."
        )
    if isinstance(actual, bool) or not isinstance(actual, int | float):
        raise CheckFailed(f"{name}: expected {what} as a number, got a {type(actual).__name__}.\n  Next: return that.")
    known = {hint: torch.tensor(value, dtype=torch.float64) for hint, value in (mistakes or {}).items()}
    right = torch.tensor(float(expected), dtype=torch.float64)
    compare(f"{name}: {what}", torch.tensor(float(actual), dtype=torch.float64), right, "", known)


def side_by_side(tensors: Iterable[Tensor]) -> Tensor:
    """All numbers in one row."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


# ------------------------------------------------------------------------------------------------ a toy language model


class ToyLM(nn.Module):
    """Logits that depend on this token and the one before it; it notes who calls it, when, and how.

    `seen` holds, for each forward pass, the rows and the mode; `events` holds what happened, in order.
    """

    def __init__(self, d_vocab: int = 7) -> None:
        super().__init__()
        self.here = nn.Parameter(noise(d_vocab, d_vocab, seed=11))
        self.before = nn.Parameter(noise(d_vocab, d_vocab, seed=12))
        self.events: list[str] = []
        self.seen: list[dict[str, Any]] = []
        self.here.register_hook(lambda grad: self.events.append("backward"))

    def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
        self.events.append("forward")
        grad = None if self.here.grad is None else self.here.grad.clone()
        self.seen.append(
            {"rows": len(tokens), "training": self.training, "graph": torch.is_grad_enabled(), "grad": grad}
        )
        return self.logits(tokens) * (0.5 if self.training else 1.0)

    def logits(self, tokens: Tensor) -> Tensor:
        earlier = torch.cat([tokens[:, :1], tokens[:, :-1]], dim=1)
        return self.here[tokens] + self.before[earlier]


def toy_tokens(n_rows: int, n_pos: int, seed: int = 0) -> Tensor:
    return torch.randint(7, (n_rows, n_pos), generator=torch.Generator().manual_seed(seed))


def loss_by_loop(logits: Tensor, tokens: Tensor) -> Tensor:
    """Visit every prediction: row by row, the token after this one."""
    nats = []
    for row, ids in zip(logits, tokens.tolist(), strict=True):
        for position in range(len(ids) - 1):
            scores = row[position] - row[position].max()
            nats.append(scores.exp().sum().log() - scores[ids[position + 1]])
    return torch.stack(nats).mean()


def toy_gradient(model: ToyLM, tokens: Tensor) -> tuple[float, list[Tensor]]:
    """The loss on these tokens in the model's mode and its gradient, without a trace in the model."""
    n_events = len(model.events)
    logits = model.logits(tokens) * (0.5 if model.training else 1.0)
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:])
    pieces = torch.autograd.grad(loss, list(model.parameters()))
    del model.events[n_events:]
    return loss.item(), list(pieces)


# ------------------------------------------------------------------------------------------------- Adam, spelled out


def adamw_by_hand(start: Sequence[Tensor], gradients: Sequence[Grads], options: Any, **wrong: Any) -> list[Tensor]:
    """Where the parameters are after a step per entry of `gradients`; `wrong` switches on what people get wrong.

    `options(step, i)` gives lr, beta1, beta2, eps and weight decay of parameter `i` in that step; for an `i` of None
    those of the first group.
    """
    p = [tensor.detach().clone() for tensor in start]
    m, v, t = [torch.zeros_like(x) for x in p], [torch.zeros_like(x) for x in p], [0] * len(p)
    calls = 0
    for step, grads in enumerate(gradients):
        for i, grad in enumerate(grads):
            lr, beta1, beta2, eps, decay = options(0 if wrong.get("fixed_options") else step, i)
            if wrong.get("group_0_for_all"):
                lr, beta1, beta2, eps, decay = options(step, None)
            if wrong.get("swapped_betas"):
                beta1, beta2 = beta2, beta1
            if grad is None and not wrong.get("none_is_zero"):
                continue
            g = torch.zeros_like(p[i]) if grad is None else grad
            calls += 1
            t[i] = calls if wrong.get("one_count") else step + 1 if wrong.get("steps_of_all") else t[i] + 1
            if wrong.get("coupled"):
                g = g + decay * p[i]
            elif not wrong.get("no_decay") and not wrong.get("decay_last"):
                p[i] = p[i] - (1 if wrong.get("decay_without_lr") else lr) * decay * p[i]
            if wrong.get("forgets"):
                m[i], v[i] = torch.zeros_like(m[i]), torch.zeros_like(v[i])
            m[i] = beta1 * m[i] + (1 if wrong.get("sum_m") else 1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * (g if wrong.get("v_of_g") else g * g)
            m_hat = m[i] if wrong.get("no_correction") or wrong.get("raw_m") else m[i] / (1 - beta1 ** t[i])
            v_hat = v[i] if wrong.get("no_correction") or wrong.get("raw_v") else v[i] / (1 - beta2 ** t[i])
            if wrong.get("eps_inside"):
                scale = (v_hat + eps).sqrt()
            elif wrong.get("eps_early"):
                scale = (v[i].sqrt() + eps) / math.sqrt(1 - beta2 ** t[i])
            else:
                scale = (v_hat if wrong.get("no_root") else v_hat.sqrt()) + (0 if wrong.get("no_eps") else eps)
            p[i] = p[i] - (-1 if wrong.get("uphill") else 1) * lr * m_hat / scale
            if wrong.get("decay_last"):
                p[i] = p[i] - lr * decay * p[i]
    return p


ADAMW_MISTAKES: dict[str, dict[str, bool]] = {
    "the decay goes into the gradient, and so through the moments (Adam with L2); it should act on p alone.": {
        "coupled": True
    },
    "there is no weight decay.": {"no_decay": True},
    "the decay is not multiplied by lr.": {"decay_without_lr": True},
    "the decay comes after the update; it comes first.": {"decay_last": True},
    "the bias correction of m and v is left out.": {"no_correction": True},
    "the bias correction of m is left out.": {"raw_m": True},
    "the bias correction of v is left out.": {"raw_v": True},
    "eps is added inside the root; it is added to the root.": {"eps_inside": True},
    "eps is added before the bias correction; it is added to sqrt(v_hat).": {"eps_early": True},
    "eps is left out.": {"no_eps": True},
    "the root of v_hat is not taken.": {"no_root": True},
    "v averages g instead of its square.": {"v_of_g": True},
    "beta1 and beta2 are swapped.": {"swapped_betas": True},
    "m adds up g instead of (1 - beta1) g.": {"sum_m": True},
    "m and v begin at zero in every step; they are kept between steps.": {"forgets": True},
    "t counts the parameters that were visited; it counts steps.": {"one_count": True},
    "the update is added; the loss falls in the other direction.": {"uphill": True},
    "the options of the first group are used for every group.": {"group_0_for_all": True},
    "options are read once; those in param_groups may change between steps.": {"fixed_options": True},
    "a `.grad` of None counts as zero; such a parameter should be passed over.": {"none_is_zero": True},
    "one t counts for all; each parameter counts the steps in which it had a gradient.": {"steps_of_all": True},
}


def adamw_mistakes(start: Sequence[Tensor], gradients: Sequence[Grads], options: Any) -> Mistakes:
    """Each known mistake's answer, worked out only when it is needed; those that change nothing here are left out."""
    right = side_by_side(adamw_by_hand(start, gradients, options))

    def answer(wrong: dict[str, bool]) -> Tensor:
        found = side_by_side(adamw_by_hand(start, gradients, options, **wrong))
        same = torch.allclose(found, right, rtol=1e-4, atol=1e-5, equal_nan=True)
        return torch.full_like(found, torch.inf) if same else found

    return {hint: partial(answer, wrong) for hint, wrong in ADAMW_MISTAKES.items()}


# ---------------------------------------------------------------------------------------------------- bare parameters


def bare_transformer(cfg: TransformerConfig) -> Any:
    """The parameters of a Transformer under their names, without anything that computes."""
    model: Any = nn.Module()
    model.cfg = cfg
    for name, shape in transformer_parameters(cfg).items():
        *path, symbol = name.split(".")
        owner = model
        for step in path:
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        owner.register_parameter(symbol, nn.Parameter(torch.zeros(shape)))
    return model


# --------------------------------------------------------------------------------------------------- what a file holds


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
