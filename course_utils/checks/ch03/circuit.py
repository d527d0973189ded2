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

from course_utils.checks.comparing import compare, follows_input
from course_utils.checks.kinds import follows_every_kind
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.standins.lookalikes import Lookalikes
from course_utils.checks.translating import during

# ------------------------------------------------------------------------------------------------------- the dataset


def _digits() -> Tensor:
    """The eight digits of every input, in counting order."""
    rows = b"".join(map(bytes, itertools.product(range(4), repeat=8)))
    return torch.frombuffer(bytearray(rows), dtype=torch.uint8).view(-1, 8).long()


def dataset(step: int = 1, modulus: int | None = 4, **wrong: Any) -> Callable[[], Tensor]:
    """A dataset with switches for what people get wrong."""

    def reverse_increment_dataset() -> Tensor:
        digits = _digits().flip(1) if wrong.get("little") else _digits()
        answer = (digits if wrong.get("forwards") else digits.flip(1)) + step
        answer = answer % modulus if modulus else answer.clamp(max=wrong.get("top", 9))
        bos = torch.full((len(digits), wrong.get("n_bos", 1)), wrong.get("bos", 4))
        parts = [bos, answer, digits] if wrong.get("answer_first") else [bos, digits, answer]
        return torch.cat([*parts[1:], bos] if wrong.get("bos_last") else parts, dim=1)

    return reverse_increment_dataset


@known_mistakes(
    {
        "the answer is reversed only; each of its digits is also incremented.": dataset(step=0),
        "the answer is incremented only; it also runs backwards.": dataset(forwards=True),
        "a 3 becomes 4, which is BOS; it becomes 0, as in counting modulo 4.": dataset(modulus=None),
        "a 3 stays a 3; it becomes 0.": dataset(modulus=None, top=3),
        "the answer is decremented; each digit grows by one.": dataset(step=-1),
        "the answer stands before the digits.": dataset(answer_first=True),
        "the first digit changes fastest; in counting order it is the last.": dataset(little=True),
        "BOS is 0; it is token 4.": dataset(bos=0),
        "BOS is 5; it is token 4.": dataset(bos=5),
        "BOS is left out.": dataset(n_bos=0),
        "BOS stands at the end.": dataset(bos_last=True),
    }
)
def check_reverse_increment_dataset(fn: Callable[..., Any]) -> None:
    """All 65,536 rows, one beside the other."""
    name = "reverse_increment_dataset"
    expected = dataset()()
    actual = fn()
    same_rows = isinstance(actual, Tensor) and actual.shape == expected.shape and actual.dtype == expected.dtype
    if same_rows and not torch.equal(actual, expected) and _is_permutation(actual, expected):
        row = int((actual != expected).any(dim=1).nonzero()[0])
        raise CheckFailed(
            f"{name}: all 65,536 rows are right, but they are in another order.\n"
            f"  first at row {row}: expected the digits {_word(expected[row])}, got {_word(actual[row])}",
            evidence=Evidence(name, actual),
            advice="  Next: put them into counting order.",
        )
    compare(name, actual, expected, "batch pos")


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


def nats_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p of each token under the logits at the same place."""
    return -logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def next_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p of every token but the first, under the logits before it."""
    return nats_of(logits[:, :-1], tokens[:, 1:])


def mean_of_rows(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    rows = zip(next_nats(logits, tokens), mask[:, 1:], strict=True)
    return torch.stack([nats[marked].mean() for nats, marked in rows if marked.any()]).mean()


def chance(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits[:, :-1].softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


@known_mistakes(
    {
        "the labels are not shifted: the logits at a position are compared with the token at the same position.": (
            lambda logits, tokens, mask: nats_of(logits, tokens)[mask].mean()
        ),
        "the labels are shifted the wrong way: logits predict the token after them, not the one before.": (
            lambda logits, tokens, mask: nats_of(logits[:, 1:], tokens[:, :-1])[mask[:, :-1]].mean()
        ),
        "the mask is read at the position of the logits; it marks the targets, one later.": (
            lambda logits, tokens, mask: next_nats(logits, tokens)[mask[:, :-1]].mean()
        ),
        "the mask is shifted the wrong way, by one.": (
            lambda logits, tokens, mask: next_nats(logits, tokens)[:, :-1][mask[:, 2:]].mean()
        ),
        "the mask is not used: all positions count.": (lambda logits, tokens, mask: next_nats(logits, tokens).mean()),
        "the sum over the targets is divided by the number of all positions.": (
            lambda logits, tokens, mask: (next_nats(logits, tokens) * mask[:, 1:]).mean()
        ),
        "the sum over the targets is divided by the number of all tokens, the first ones included.": (
            lambda logits, tokens, mask: (next_nats(logits, tokens) * mask[:, 1:]).sum() / mask.numel()
        ),
        "the sum is taken; it should be the mean.": (
            lambda logits, tokens, mask: next_nats(logits, tokens)[mask[:, 1:]].sum()
        ),
        "the sum is divided by the number of rows; divide by the number of marked targets.": (
            lambda logits, tokens, mask: next_nats(logits, tokens)[mask[:, 1:]].sum() / len(mask)
        ),
        "the sum is divided by all that the mask marks; position 0 has no prediction.": (
            lambda logits, tokens, mask: next_nats(logits, tokens)[mask[:, 1:]].sum() / mask.sum()
        ),
        "each row's mean is taken first; every target counts the same, whichever row it is in.": mean_of_rows,
        "the sign is missing.": (lambda logits, tokens, mask: -next_nats(logits, tokens)[mask[:, 1:]].mean()),
        "p is averaged; take its logarithm first.": (
            lambda logits, tokens, mask: chance(logits, tokens)[mask[:, 1:]].mean()
        ),
        "the softmax is taken before a function that takes it again.": (
            lambda logits, tokens, mask: next_nats(logits.softmax(-1), tokens)[mask[:, 1:]].mean()
        ),
        "the unmarked targets are counted, instead of the marked ones.": (
            lambda logits, tokens, mask: next_nats(logits, tokens)[~mask[:, 1:]].mean()
        ),
        "the logarithm has base 2; nats have base e.": (
            lambda logits, tokens, mask: next_nats(logits, tokens)[mask[:, 1:]].mean() / math.log(2)
        ),
        "log 0 came up: take log_softmax (or cross_entropy), which never rounds p to 0.": (
            lambda logits, tokens, mask: -chance(logits, tokens).log()[mask[:, 1:]].mean()
        ),
    }
)
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
        expected = _nats(logits, tokens)[:, 1:][mask[:, 1:]].mean().float()
        with during(case.strip()):
            actual = fn(logits, tokens, mask)
        compare(f"{name}{case}", actual, expected, "")
    logits = noise(*first.shape, 7, seed=9)
    tokens = torch.randint(7, first.shape, generator=torch.Generator().manual_seed(9))
    _check_loss_gradient(fn, logits, tokens, first)
    follows_input(name, fn, (logits, tokens, first), "")
    follows_every_kind(name, fn, (logits, tokens, first), "")
    impossible = (tokens.roll(-1, 1) + 1) % 7  # not what comes next
    logits = logits.scatter(2, impossible[..., None], -torch.inf)
    expected = _nats(logits, tokens)[:, 1:][first[:, 1:]].mean().float()
    compare(f"{name} where a token is impossible", fn(logits, tokens, first), expected, "")
    for nothing in (torch.zeros_like(first), torch.zeros_like(first).index_fill(1, torch.tensor(0), True)):
        _must_refuse_mask(fn, logits, tokens, nothing)


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


class _Interrupted(Exception):
    """What a cell raises inside of the block."""


def ablating(choose: Callable[[str, str], bool], fill: Callable[[Tensor], Tensor] = torch.zeros_like) -> Any:
    """An ablation of the parameters that `choose(entry, name)` picks, which puts everything back."""

    @contextmanager
    def zero_ablated(model: nn.Module, parameter_name: str) -> Iterator[nn.Module]:
        chosen = [parameter for entry, parameter in model.named_parameters() if choose(entry, parameter_name)]
        kept = [parameter.detach().clone() for parameter in chosen]
        try:
            for parameter, values in zip(chosen, kept, strict=True):
                parameter.data.copy_(fill(values))
            yield model
        finally:
            for parameter, values in zip(chosen, kept, strict=True):
                parameter.data.copy_(values)

    return zero_ablated


def last_part(name: str) -> str:
    return name.split(".")[-1]


@known_mistakes(
    {
        "every parameter whose name ends like this one is zero.": ablating(lambda entry, name: entry.endswith(name)),
        "every parameter of this kind is zero, in all layers.": ablating(
            lambda entry, name: last_part(entry) == last_part(name)
        ),
        "the first head alone is zero; it is the whole parameter.": ablating(
            lambda entry, name: entry == name,
            lambda values: torch.cat([torch.zeros_like(values[:1]), values[1:]]),
        ),
        "the parameter is filled with its mean; fill it with zeros.": ablating(
            lambda entry, name: entry == name, lambda values: values.nan_to_num(posinf=0).mean().expand_as(values)
        ),
    }
)
def check_zero_ablated(fn: Callable[..., Any]) -> None:
    """Names that resemble each other; nested blocks; a block that raises; bits, memory and flags."""
    name = "zero_ablated"
    model = Lookalikes().eval()
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
    # `detach` holds the memory, so that nothing new can lie there
    before = {entry: (p, p.detach(), _bits(p), p.requires_grad, p.grad) for entry, p in model.named_parameters()}
    buffer, mode = _bits(model.seen), model.training
    yield
    now = dict(model.named_parameters())
    if list(now) != list(before):
        raise CheckFailed(
            f"{name}: {when} the model has other parameters than before.\n  Next: write into the old one."
        )
    for entry, (parameter, memory, bits, flag, grad) in before.items():
        same = now[entry] is parameter
        if not same or parameter.data_ptr() != memory.data_ptr():
            what = "is another Parameter" if not same else "lies in other memory"
            raise CheckFailed(
                f"{name}: {when} `{entry}` {what} than before.\n"
                "  An optimizer or a view that holds the old one does not see the change.\n"
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


def _judge_inside(model: nn.Module, *wanted: str) -> None:
    """In the block the named parameters are zero and all the others are themselves."""
    name = f"zero_ablated(model, {wanted[-1]!r})"
    evidence = Evidence(name, {entry: parameter.detach().clone() for entry, parameter in model.named_parameters()})
    fresh = dict(Lookalikes().named_parameters())
    for entry, parameter in model.named_parameters():
        if entry in wanted:
            if parameter.detach().any():
                index = tuple(parameter.detach().nonzero()[0].tolist())
                place = ", ".join(map(str, index))
                raise CheckFailed(
                    f"{name}: in the block `{entry}` is not zero.\n"
                    f"  at [{place}]: expected 0.0, got {parameter[index].item():.4g}",
                    evidence=evidence,
                    advice="  Next: fill the parameter of just this name with zeros before you yield.",
                )
        elif not torch.equal(_bits(parameter), _bits(fresh[entry])):
            raise CheckFailed(
                f"{name}: in the block `{entry}` is another one than before.",
                evidence=evidence,
                advice="  Next: find the parameter by its whole name; others end in the same letters.",
            )


def _check_gradients_inside(fn: Callable[..., Any], model: Any) -> None:
    """Whoever computes a loss in the block gets gradients, and the view of a parameter sees the zeros."""
    weight = model.blocks[0].mlp.W_out
    view = weight.detach()[1:]
    with _manager(fn, model, "blocks.0.mlp.W_out"):
        if view.any():
            raise CheckFailed(
                "zero_ablated: in the block a view of the parameter still shows the old weights.\n"
                "  The parameter was given other memory, so whatever else looks at it keeps the old values.\n"
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
                    f"zero_ablated: {call} should raise ValueError, because no parameter has that name.\n"
                    "  Next: look the name up among all of `model.named_parameters()` first."
                )
