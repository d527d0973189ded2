"""Chapter 03, first part: the data and the loss of the first circuit, and switching a weight matrix off for a while.

Oracles: itertools for the data, sums of single terms for the loss, copies of all weights for the ablation.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.translating import during

# ------------------------------------------------------------------------------------------------------- the dataset


def _digits() -> Tensor:
    """The eight digits of every input, in counting order."""
    rows = b"".join(map(bytes, itertools.product(range(4), repeat=8)))
    return torch.frombuffer(bytearray(rows), dtype=torch.uint8).view(-1, 8).long()


def check_reverse_increment_dataset(fn: Callable[..., Any]) -> None:
    """All 65,536 rows, one beside the other."""
    name = "reverse_increment_dataset"
    digits = _digits()
    expected = _rows(digits, (digits.flip(1) + 1) % 4)
    little = digits.flip(1)  # the first digit counts fastest
    mistakes = {
        "the answer is reversed only; each of its digits is also incremented.": lambda: _rows(digits, digits.flip(1)),
        "the answer is incremented only; it also runs backwards.": lambda: _rows(digits, (digits + 1) % 4),
        "a 3 becomes 4, which is BOS; it becomes 0, as in counting modulo 4.": lambda: _rows(
            digits, digits.flip(1) + 1
        ),
        "a 3 stays a 3; it becomes 0.": lambda: _rows(digits, (digits.flip(1) + 1).clamp(max=3)),
        "the answer is decremented; each digit grows by one.": lambda: _rows(digits, (digits.flip(1) - 1) % 4),
        "the answer stands before the digits.": lambda: _rows((digits.flip(1) + 1) % 4, digits),
        "the first digit changes fastest; in counting order it is the last.": lambda: _rows(little, (digits + 1) % 4),
        "BOS is 0; it is token 4.": lambda: torch.cat([expected[:, :1] * 0, expected[:, 1:]], dim=1),
        "BOS is 5; it is token 4.": lambda: torch.cat([expected[:, :1] * 0 + 5, expected[:, 1:]], dim=1),
        "BOS is left out.": lambda: expected[:, 1:],
        "BOS stands at the end.": lambda: expected.roll(-1, dims=1),
    }
    actual = fn()
    same_rows = isinstance(actual, Tensor) and actual.shape == expected.shape and actual.dtype == expected.dtype
    if same_rows and not torch.equal(actual, expected) and _is_permutation(actual, expected):
        hint = "the first digit changes fastest; in counting order it is the last."
        if not torch.equal(actual, mistakes[hint]()):
            row = int((actual != expected).any(dim=1).nonzero()[0])
            raise CheckFailed(
                f"{name}: all 65,536 rows are right, but they are in another order.\n"
                f"  first at row {row}: expected the digits {_word(expected[row])}, got {_word(actual[row])}\n"
                "  Next: put them into counting order."
            )
    compare(name, actual, expected, "batch pos", mistakes)


def _rows(digits: Tensor, answers: Tensor) -> Tensor:
    return torch.cat([torch.full((len(digits), 1), 4), digits, answers], dim=1)


def _is_permutation(actual: Tensor, expected: Tensor) -> bool:
    """Whether the rows are the same ones; each is read as a number in base 7."""
    powers = 7 ** torch.arange(17)
    return torch.equal((actual.clamp(0, 6) * powers).sum(1).sort().values, (expected * powers).sum(1).sort().values)


def _word(row: Tensor) -> str:
    return "".join(map(str, row[1:9].tolist()))


# ---------------------------------------------------------------------------------------------------------- the loss


def _nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p of every token but the first, term by term; 0 at the first: [batch pos], on the tokens' positions."""
    out = torch.zeros(tokens.shape, dtype=torch.float64)
    for row, ids in enumerate(tokens.tolist()):
        for pos in range(1, len(ids)):
            scores = logits[row, pos - 1].tolist()
            highest = max(scores)
            log_total = highest + math.log(math.fsum(math.exp(score - highest) for score in scores))
            out[row, pos] = log_total - scores[ids[pos]]
    return out


def check_masked_lm_loss(fn: Callable[..., Any]) -> None:
    """Rows with different numbers of targets; first positions marked too; large logits; everything marked."""
    name = "masked_lm_loss"
    first = torch.tensor([[0, 0, 1, 0, 1], [0, 1, 0, 1, 1], [0, 0, 0, 1, 0]]).bool()
    with_start = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]]).bool()
    cases = [
        ("", first, 1.0),
        (" with position 0 marked as well", with_start, 1.0),
        (" with every token marked", torch.ones(2, 4, dtype=torch.bool), 1.0),
        (" with logits in the hundreds", first, 200.0),
    ]
    for seed, (case, mask, scale) in enumerate(cases):
        logits = noise(*mask.shape, 7, seed=seed, scale=scale)
        tokens = torch.randint(7, mask.shape, generator=torch.Generator().manual_seed(seed))
        nats = _nats(logits, tokens)
        expected = nats[:, 1:][mask[:, 1:]].mean().float()
        with unchanged(name, logits=logits, tokens=tokens, mask=mask), during(case.strip()):
            actual = fn(logits, tokens, mask)
        compare(f"{name}{case}", actual, expected, "", _loss_mistakes(logits, tokens, mask, nats))
    logits = noise(*first.shape, 7, seed=9)
    tokens = torch.randint(7, first.shape, generator=torch.Generator().manual_seed(9))
    _check_loss_gradient(fn, logits, tokens, first)
    follows_input(name, fn, (logits, tokens, first), "")
    for nothing in (torch.zeros_like(first), torch.zeros_like(first).index_fill(1, torch.tensor(0), True)):
        _must_refuse_mask(fn, logits, tokens, nothing)


def _loss_mistakes(logits: Tensor, tokens: Tensor, mask: Tensor, nats: Tensor) -> dict[str, Tensor]:
    """What known mistakes give; `nats` holds -log p on the tokens' own positions."""
    here = -logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    inner, counts = nats[:, 1:], mask[:, 1:]
    total = (inner * counts).sum()
    reversed_time = -logits[:, 1:].log_softmax(-1).gather(-1, tokens[:, :-1, None]).squeeze(-1)
    rows = [row[marked].mean() for row, marked in zip(inner, counts, strict=True) if marked.any()]
    probabilities = logits[:, :-1].softmax(-1)
    chance = probabilities.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    twice = -probabilities.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    answers = {
        "the labels are not shifted: the logits at a position are compared with the token at the same position.": here[
            mask
        ].mean(),
        "the labels are shifted the wrong way: logits predict the token after them, not the one before.": reversed_time[
            mask[:, :-1]
        ].mean(),
        "the mask is read at the position of the logits; it marks the targets, one later.": inner[mask[:, :-1]].mean(),
        "the mask is shifted the wrong way, by one.": inner[:, :-1][mask[:, 2:]].mean(),
        "the mask is not used: all positions count.": inner.mean(),
        "the sum over the targets is divided by the number of all positions.": total / inner.numel(),
        "the sum over the targets is divided by the number of all tokens, the first ones included.": total
        / mask.numel(),
        "the sum is taken; it should be the mean.": total,
        "the sum is divided by the number of rows; divide by the number of marked targets.": total / len(mask),
        "the sum is divided by all that the mask marks; position 0 has no prediction.": total / mask.sum(),
        "each row's mean is taken first; every target counts the same, whichever row it is in.": torch.stack(
            rows
        ).mean(),
        "the sign is missing.": -total / counts.sum(),
        "p is averaged; take its logarithm first.": chance[counts].mean(),
        "the softmax is taken before a function that takes it again.": twice[counts].mean(),
        "the unmarked targets are counted, instead of the marked ones.": inner[~counts].mean(),
        "the logarithm has base 2; nats have base e.": total / counts.sum() / math.log(2),
        "log 0 came up: take log_softmax (or cross_entropy), which never rounds p to 0.": -chance.log()[counts].mean(),
    }
    right = total / counts.sum()
    return {
        hint: answer.float()
        for hint, answer in answers.items()
        if not torch.allclose(answer.double(), right, rtol=1e-3, atol=1e-4)
    }


def _check_loss_gradient(fn: Callable[..., Any], logits: Tensor, tokens: Tensor, mask: Tensor) -> None:
    """The gradient reaches the logits before marked targets, and there only: (p - one hot) / the number of targets."""
    leaf = logits.clone().requires_grad_()
    loss = fn(leaf, tokens, mask)
    if not loss.requires_grad:
        raise CheckFailed(
            "masked_lm_loss: no gradient flows from the loss to the logits, so that nothing could be trained.\n"
            "  Next: look for torch.no_grad, .detach(), .item() or torch.tensor(...) on the way."
        )
    loss.backward()
    expected = torch.zeros_like(logits)
    for row, pos in mask[:, 1:].nonzero().tolist():
        expected[row, pos] = logits[row, pos].softmax(-1)
        expected[row, pos, tokens[row, pos + 1]] -= 1
    gradient = torch.zeros_like(logits) if leaf.grad is None else leaf.grad
    compare("masked_lm_loss: its gradient", gradient, expected / mask[:, 1:].sum(), "batch pos d_vocab")


def _must_refuse_mask(fn: Callable[..., Any], logits: Tensor, tokens: Tensor, mask: Tensor) -> None:
    try:
        answer = fn(logits, tokens, mask)
    except ValueError:
        return
    what = "marks position 0 only" if mask.any() else "marks nothing"
    raise CheckFailed(
        f"masked_lm_loss: with a mask that {what} it should raise ValueError, but it returned {answer}.\n"
        "  Next: count the targets first; a mean over none of them has no value."
    )


# ------------------------------------------------------------------------------------------------------ the ablation


class _Part(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.W_O = nn.Parameter(noise(3, 2, 5, seed=seed))
        self.b_O = nn.Parameter(noise(5, seed=seed + 1))


class _Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.attn, self.mlp = _Part(seed), nn.Module()
        self.mlp.W_out = nn.Parameter(noise(7, 5, seed=seed + 2))


class _Model(nn.Module):
    """Something with parameters whose names resemble each other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(10 * layer) for layer in range(2))
        self.W_O = nn.Parameter(noise(4, 5, seed=30))
        self.register_buffer("seen", noise(3, seed=31))
        with torch.no_grad():  # values that arithmetic does not bring back: W - W + W, or W * 0 / 0
            self.blocks[1].attn.W_O[0, 0] = torch.tensor([1 / 3, -0.0, 1e30, torch.inf, 1e-30])


class _Interrupted(Exception):
    """What a cell raises inside of the block."""


def check_zero_ablated(fn: Callable[..., Any]) -> None:
    """Names that resemble each other; nested blocks; a block that raises; bits, memory and flags."""
    name = "zero_ablated"
    model = _Model().eval()
    model.blocks[0].attn.W_O.requires_grad_(False)
    model.blocks[1].attn.W_O.grad = noise(3, 2, 5, seed=40)
    for wanted in ("blocks.1.attn.W_O", "blocks.0.mlp.W_out", "W_O", "blocks.0.attn.W_O"):
        with _restored(model, wanted), _manager(fn, model, wanted) as handed_over:
            _judge_inside(model, wanted)
        if handed_over is not model:
            raise CheckFailed(
                f"{name}: `with {name}(model, ...) as m` should hand over the model, but m is a "
                f"{type(handed_over).__name__}.\n  Next: yield the model."
            )
    with _restored(model, "blocks.1.attn.W_O"), torch.no_grad(), _manager(fn, model, "blocks.1.attn.W_O"):
        _judge_inside(model, "blocks.1.attn.W_O")
    if not torch.is_grad_enabled():
        raise CheckFailed(f"{name}: after the block gradients are switched off.\n  Next: use torch.no_grad as `with`.")
    _check_gradients_inside(fn, model)
    _check_exception(fn, model)
    _check_nested(fn, model)
    _check_unknown(fn, model)


def _manager(fn: Callable[..., Any], model: nn.Module, wanted: str) -> Any:
    manager = fn(model, wanted)
    if not (hasattr(type(manager), "__enter__") and hasattr(type(manager), "__exit__")):
        raise CheckFailed(
            f"zero_ablated: expected something that `with` can open, got a {type(manager).__name__}.\n"
            "  Next: keep the line @contextmanager above the function, and `yield` once in it."
        )
    return manager


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().view(torch.int32)


@contextmanager
def _restored(model: nn.Module, wanted: str, when: str = "after the block") -> Iterator[None]:
    """Everything about the model is afterwards what it was: the Parameter objects, their memory, bits, gradients."""
    name = f"zero_ablated(model, {wanted!r})"
    before = {entry: (p, p.data_ptr(), _bits(p), p.requires_grad, p.grad) for entry, p in model.named_parameters()}
    buffer, mode = _bits(model.seen), model.training
    yield
    now = dict(model.named_parameters())
    if list(now) != list(before):
        raise CheckFailed(
            f"{name}: {when} the model has other parameters than before.\n  Next: write into the old one."
        )
    for entry, (parameter, memory, bits, flag, grad) in before.items():
        same = now[entry] is parameter
        if not same or parameter.data_ptr() != memory:
            what = "is another Parameter" if not same else "lies in other memory"
            raise CheckFailed(
                f"{name}: {when} `{entry}` {what} than before.\n"
                "  An optimizer, or a view, that holds the old one is left behind.\n"
                "  Next: write the values back into the parameter, in place, under torch.no_grad()."
            )
        if not torch.equal(_bits(parameter), bits):
            raise CheckFailed(_not_restored(name, when, entry, wanted, parameter, bits))
        if parameter.requires_grad != flag or parameter.grad is not grad:
            what = "requires_grad" if parameter.requires_grad != flag else "grad"
            raise CheckFailed(f"{name}: {when} `{entry}.{what}` is not what it was.\n  Next: leave it alone.")
    if not torch.equal(_bits(model.seen), buffer) or model.training != mode:
        raise CheckFailed(f"{name}: {when} the model's mode or a buffer is not what it was.\n  Next: leave them alone.")


def _not_restored(name: str, when: str, entry: str, wanted: str, parameter: Tensor, bits: Tensor) -> str:
    index = tuple((_bits(parameter) != bits).nonzero()[0].tolist())
    got, want = parameter[index].item(), bits.view(torch.float32)[index].item()
    place = ", ".join(map(str, index))
    lines = [f"{name}: {when} `{entry}` is not what it was.", f"  at [{place}]: expected {want!r}, got {got!r}"]
    if not parameter.detach().any():
        lines.append("  It is still zero: the values were not written back.")
        if "raised" in when:
            lines.append("  Next: what stands after `yield` is skipped when the block raises; try: ... finally: ...")
            return "\n".join(lines)
    elif entry != wanted:
        lines.append("  It is not the parameter that was named.")
    lines.append("  Next: keep a copy (clone) of the values before you change them, and write it back.")
    return "\n".join(lines)


def _judge_inside(model: nn.Module, *wanted: str, originals: nn.Module | None = None) -> None:
    """In the block the named parameters are zero and all the others are themselves."""
    name = f"zero_ablated(model, {wanted[-1]!r})"
    fresh = dict(_Model().named_parameters())
    for entry, parameter in model.named_parameters():
        if entry in wanted:
            if parameter.detach().any():
                index = tuple(parameter.detach().nonzero()[0].tolist())
                place = ", ".join(map(str, index))
                raise CheckFailed(
                    f"{name}: in the block `{entry}` is not zero.\n"
                    f"  at [{place}]: expected 0.0, got {parameter[index].item():.4g}\n"
                    "  Next: fill the parameter of just this name with zeros before you yield."
                )
        elif not torch.equal(_bits(parameter), _bits(fresh[entry])):
            raise CheckFailed(
                f"{name}: in the block `{entry}` is another one than before.\n"
                "  Next: find the parameter by its whole name; others end in the same letters."
            )


def _check_gradients_inside(fn: Callable[..., Any], model: Any) -> None:
    """Whoever computes a loss in the block gets gradients, and the view of a parameter sees the zeros."""
    weight = model.blocks[0].mlp.W_out
    view = weight.detach()[1:]
    with _manager(fn, model, "blocks.0.mlp.W_out"):
        if view.any():
            raise CheckFailed(
                "zero_ablated: in the block a view of the parameter still shows the old weights.\n"
                "  The parameter was given other memory, and what else looks at it is left behind.\n"
                "  Next: write zeros into the parameter itself, in place, under torch.no_grad()."
            )
        if not (torch.is_grad_enabled() and weight.requires_grad):
            raise CheckFailed(
                "zero_ablated: in the block gradients are switched off.\n"
                "  Next: use torch.no_grad() only around the lines that write, not around `yield`."
            )


def _check_exception(fn: Callable[..., Any], model: nn.Module) -> None:
    """An exception in the block is passed on, and the weights are back all the same."""
    wanted = "blocks.1.attn.W_O"
    passed_on = False
    with _restored(model, wanted, "when the block raised an exception,"):
        try:
            with _manager(fn, model, wanted):
                raise _Interrupted
        except _Interrupted:
            passed_on = True
    if not passed_on:
        raise CheckFailed(
            "zero_ablated: an exception that the block raised was swallowed.\n"
            "  Next: use finally, which passes it on, instead of except (or a `return` inside of finally)."
        )


def _check_nested(fn: Callable[..., Any], model: nn.Module) -> None:
    """Two at once: each block undoes its own."""
    outer, inner = "blocks.0.attn.W_O", "blocks.1.attn.W_O"
    with _restored(model, outer, "after two blocks, one in the other,"), _manager(fn, model, outer):
        with _manager(fn, model, inner):
            _judge_inside(model, outer, inner)
        _judge_inside(model, outer)
    with _restored(model, inner, "after two blocks for the same parameter"), _manager(fn, model, inner):
        with _manager(fn, model, inner):
            pass
        _judge_inside(model, inner)


def _check_unknown(fn: Callable[..., Any], model: nn.Module) -> None:
    """A name that no parameter has: a slip, the end of a name, a module's name, a buffer's."""
    for wrong, near in (
        ("blocks.0.atn.W_O", "blocks.0.attn.W_O"),
        ("blocks.1.mlp.W_ou", "blocks.1.mlp.W_out"),
        ("blocks.0.attn", "blocks.0.attn.b_O"),
        ("seen", ""),
    ):
        call = f"zero_ablated(model, {wrong!r})"
        with _restored(model, wrong):
            try:
                with _manager(fn, model, wrong):
                    pass
            except ValueError as error:
                if near not in str(error):
                    raise CheckFailed(
                        f"zero_ablated: the message of {call} should name the nearest parameters.\n"
                        f"  expected `{near}` in it, got: {error}\n  Next: difflib.get_close_matches finds them."
                    ) from None
            else:
                raise CheckFailed(
                    f"zero_ablated: {call} should raise ValueError, for no parameter has that name.\n"
                    "  Next: look the name up among all of `model.named_parameters()` first."
                )
