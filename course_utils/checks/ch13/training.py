"""Checks of chapter 13, training: all sums and the split, the loss in enough digits, and logits by tables."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch13.small import Fn, small_model, sums
from course_utils.checks.comparing import carries_gradient, compare, follows_input, unchanged
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise
from course_utils.checks.outcomes import CheckFailed, Evidence
from course_utils.checks.plain import must_raise

# ------------------------------------------------------------------------------------------------------------ the sums

Draw = Callable[[int, int, torch.Generator, bool], list[tuple[int, int]]]


def drawn(p: int, n: int, generator: torch.Generator, together: bool) -> list[tuple[int, int]]:
    """Training pairs, one after the other, until there are enough."""
    chosen: list[tuple[int, int]] = []
    for place in torch.randperm(p * p, generator=generator).tolist():
        a, b = divmod(place, p)
        if len(chosen) < n and not (together and a > b):
            chosen += [(a, b), (b, a)] if together and a != b else [(a, b)]
    return chosen


def dataset(
    draw: Draw = drawn,
    row: Callable[[int, int, int], list[int]] = lambda a, b, p: [a, b, p],
    answer: Callable[[int, int, int], int] = lambda a, b, p: (a + b) % p,
    count: Callable[[float], int] = math.floor,
    flip: bool = False,
    place: Callable[[int, int, int], int] = lambda a, b, p: a * p + b,
) -> Fn:
    """A modular_addition_dataset by loops, with switches for what people get wrong."""

    def modular_addition_dataset(p: int, share: float, generator: torch.Generator, together: bool = False) -> Any:
        if not 0 < math.floor(share * p * p) < p * p:
            raise ValueError(share)
        pairs = sorted(((a, b) for a in range(p) for b in range(p)), key=lambda pair: place(pair[0], pair[1], p))
        chosen = set(draw(p, count(share * p * p), generator, together))
        return (
            torch.tensor([row(a, b, p) for a, b in pairs]),
            torch.tensor([answer(a, b, p) for a, b in pairs]),
            torch.tensor([(pair in chosen) != flip for pair in pairs]),
        )

    return modular_addition_dataset


def with_replacement(p: int, n: int, generator: torch.Generator, together: bool) -> list[tuple[int, int]]:
    return [divmod(place, p) for place in torch.randint(p * p, (n,), generator=generator).tolist()]


def the_first(p: int, n: int, generator: torch.Generator, together: bool) -> list[tuple[int, int]]:
    return [divmod(place, p) for place in range(n)]


def row_by_row(p: int, n: int, generator: torch.Generator, together: bool) -> list[tuple[int, int]]:
    """As many for every a; mirror images as they are meant."""
    if together:
        return drawn(p, n, generator, together)
    counts = [n // p + (a < n % p) for a in range(p)]
    return [(a, b) for a in range(p) for b in torch.randperm(p, generator=generator)[: counts[a]].tolist()]


@known_mistakes(
    {
        "the answers are plain sums; they are taken modulo p.": dataset(answer=lambda a, b, p: a + b),
        "the answers are taken modulo p + 1, the number of tokens.": dataset(answer=lambda a, b, p: (a + b) % (p + 1)),
        "the token for `=` is missing: a row is a, b, p.": dataset(row=lambda a, b, p: [a, b]),
        "the token for `=` is p - 1, which is a number; it is p.": dataset(row=lambda a, b, p: [a, b, p - 1]),
        "`=` stands between the numbers; it comes last, where the answer is read.": dataset(
            row=lambda a, b, p: [a, p, b]
        ),
        "the rows run through a first; b runs fastest.": dataset(place=lambda a, b, p: b * p + a),
        "is_train marks the held-out pairs.": dataset(flip=True),
        "pairs are drawn with replacement: some come twice, and there are too few.": dataset(draw=with_replacement),
        "the training pairs are the first ones; draw them at random.": dataset(draw=the_first),
        "every number a has as many training pairs; draw among all pairs at once.": dataset(draw=row_by_row),
        "share * p² is rounded up.": dataset(count=math.ceil),
        "`together` has no effect: a + b is on one side and b + a on the other.": dataset(
            draw=lambda p, n, generator, together: drawn(p, n, generator, False)
        ),
        "mirror images are always kept together; only `together` asks for it.": dataset(
            draw=lambda p, n, generator, together: drawn(p, n, generator, True)
        ),
    }
)
def check_modular_addition_dataset(fn: Fn) -> None:
    """The sums by loops, the number of training pairs, mirror images, and that every pair has its chance."""
    name = "modular_addition_dataset"
    for p, share in ((7, 0.3), (5, 0.5), (4, 0.9), (3, 0.12)):
        for together in (False, True):
            _one_data_set(name, fn, p, share, together)
    for together in (False, True):
        _chances(name, fn, together)
    one, again = (_mask(fn, torch.Generator().manual_seed(3)) for _ in range(2))
    if not torch.equal(one, again):
        raise CheckFailed(f"{name}: one seed gave two splits.\n  Next: take every random number from `generator`.")
    for share in (0.01, 1.0):
        call = f"{name}(5, {share}, generator)"
        must_raise(name, ValueError, call, partial(fn, 5, share, torch.Generator()), "one side would be empty.")


def _mask(fn: Fn, generator: torch.Generator, p: int = 5, share: float = 0.4, together: bool = False) -> Tensor:
    mask: Tensor = fn(p, share, generator, together)[2]
    return mask


def _one_data_set(name: str, fn: Fn, p: int, share: float, together: bool) -> None:
    words = f"p={p}, share={share}, together={together}"
    before, generator = torch.get_rng_state(), torch.Generator().manual_seed(1)
    answer = fn(p, share, generator, together)
    if not torch.equal(torch.get_rng_state(), before):
        raise CheckFailed(f"{name}: it drew from torch's global generator.\n  Next: pass generator=generator.")
    if torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state()):
        raise CheckFailed(
            f"{name}: it left `generator` as it was.\n  {words}",
            evidence=Evidence("the generator", answer),
            advice="  Next: draw the training pairs, and draw them from `generator` itself.",
        )
    if not isinstance(answer, tuple) or len(answer) != 3:
        what = "None" if answer is None else f"a {type(answer).__name__}"
        raise CheckFailed(f"{name}: expected tokens, answers and is_train, got {what}.\n  Next: return all three.")
    tokens, answers, is_train = answer
    right = sums(p)
    compare(f"{name}: tokens with p={p}", tokens, right.contiguous(), "pair 3")
    compare(f"{name}: answers with p={p}", answers, torch.tensor([sum(row[:2]) % p for row in right.tolist()]), "pair")
    if not isinstance(is_train, Tensor) or is_train.shape != (p * p,) or is_train.dtype != torch.bool:
        compare(f"{name}: is_train with {words}", is_train, torch.zeros(p * p, dtype=torch.bool), "pair")
    n, grid, found = math.floor(share * p * p), is_train.reshape(p, p), int(is_train.sum())
    apart = int((grid & ~grid.T).sum())
    if found not in ((n, n + 1) if together else (n,)):
        raise CheckFailed(
            f"{name}: {found} of {p * p} pairs are for training.\n  {words}\n  expected {n}",
            evidence=Evidence(f"how many, {words}", (found, apart == 0)),
            advice="  Next: multiply share and p², round down, and draw so many different pairs.",
        )
    if together and apart:
        raise CheckFailed(
            f"{name}: {apart} training pairs have their mirror image on the other side.\n  {words}",
            evidence=Evidence(f"mirror images, {words}", True),
            advice="  Next: decide about a + b and b + a at once.",
        )


def _chances(name: str, fn: Fn, together: bool) -> None:
    """How often each pair is for training in many splits of 25 pairs, by five standard errors."""
    generator, n = torch.Generator().manual_seed(5), 120
    splits = torch.stack([_mask(fn, generator, together=together) for _ in range(n)]).double()
    often, slack = splits.mean(dim=0), 5 * (0.4 * 0.6 / n) ** 0.5
    wrong = (often - 0.4).abs() > slack
    if wrong.any():
        a, b = divmod(int(wrong.double().argmax()), 5)
        raise CheckFailed(
            f"{name}: the pair ({a}, {b}) is for training in {often[5 * a + b]:.0%} of {n} splits.\n"
            f"  together={together}; expected about 40%",
            evidence=Evidence(f"how often a pair is drawn, together={together}", often),
            advice="  Next: give every pair the same chance.",
        )
    doubles = often.reshape(5, 5).diagonal().mean()
    if (doubles - 0.4).abs() > slack / 5**0.5:
        raise CheckFailed(
            f"{name}: the pairs (a, a) are for training in {doubles:.0%} of {n} splits.\n"
            f"  together={together}; expected about 40%",
            evidence=Evidence(f"how often (a, a) is drawn, together={together}", often),
            advice="  Next: give every pair the same chance; (a, a) is its own mirror image.",
        )
    if together:
        return
    grids = splits.reshape(n, 5, 5)
    rows = grids.sum(dim=2)
    if torch.equal(rows, rows[:1].expand_as(rows)):
        raise CheckFailed(
            f"{name}: in {n} splits every number a has the same number of training pairs.",
            evidence=Evidence("training pairs of every a", True),
            advice="  Next: draw among all pairs at once.",
        )
    mirrored = (grids * grids.mT).sum(dim=(1, 2)) - grids.diagonal(dim1=1, dim2=2).sum(dim=1)
    if float(mirrored.mean()) > 5:  # of eight training pairs off the diagonal, a third has its mirror image by chance
        raise CheckFailed(
            f"{name}: {mirrored.mean():.1f} of 10 training pairs have their mirror image beside them.\n"
            "  without `together`; expected about 3",
            evidence=Evidence("mirror images by chance", True),
            advice="  Next: without `together`, draw a + b and b + a separately.",
        )


# ------------------------------------------------------------------------------------------------------------ the loss


def plain_loss(row: list[float], right: int) -> float:
    return math.log(sum(math.exp(value - max(row)) for value in row)) - (row[right] - max(row))


def losses(
    one: Callable[[list[float], int], float] = plain_loss,
    over: Callable[[list[float]], float] = lambda found: sum(found) / len(found),
) -> Fn:
    """answer_loss pair by pair, in Python's floats."""

    def answer_loss(logits: Tensor, answers: Tensor) -> Tensor:
        rows, right = logits.flatten(0, -2).tolist(), answers.flatten().tolist()
        value = over([one(row, answer) for row, answer in zip(rows, right, strict=True)])
        return torch.tensor(value, dtype=logits.dtype, device=logits.device)

    return answer_loss


def small_loss(row: list[float], right: int) -> float:
    """Right where the answer is nearly certain, too: log(1 + x) for a small x."""
    return math.log1p(sum(math.exp(value - row[right]) for place, value in enumerate(row) if place != right))


def in_float32(logits: Tensor, answers: Tensor) -> Tensor:
    return -logits.log_softmax(dim=-1).gather(-1, answers[..., None]).mean()


def chosen_logits(n_pairs: tuple[int, ...], n: int, seed: int) -> tuple[Tensor, Tensor]:
    answers = torch.randint(n, n_pairs, generator=torch.Generator().manual_seed(seed))
    return 3 * noise(*n_pairs, n, seed=seed), answers


@known_mistakes(
    {
        "it is the sum over the pairs; take the mean.": losses(small_loss, over=sum),
        "the sign is wrong: a loss is minus the log-probability.": losses(lambda row, right: -small_loss(row, right)),
        "it is in bits; take the natural logarithm.": losses(lambda row, right: small_loss(row, right) / math.log(2)),
        "it is one minus the probability, without a logarithm.": losses(
            lambda row, right: 1 - math.exp(-small_loss(row, right))
        ),
        "it is minus the logit of the answer; normalise by log_softmax first.": losses(lambda row, right: -row[right]),
        "the logarithm is taken of the mean probability; take the mean of the logarithms.": losses(
            small_loss,
            over=lambda found: -math.log(sum(math.exp(-value) for value in found) / len(found)),
        ),
        "it is computed in float32, where small losses come out as 0; use logits.double().": in_float32,
    }
)
def check_answer_loss(fn: Fn) -> None:
    """Pair by pair; then logits that are nearly certain, for which float32 has too few digits."""
    name = "answer_loss"
    for shape, n in (((6,), 4), ((2, 3), 5), ((1,), 2)):
        logits, answers = chosen_logits(shape, n, seed=n)
        with unchanged(name, logits=logits, answers=answers):
            actual = fn(logits, answers)
        compare(f"{name} of {math.prod(shape)} pairs", actual, losses(small_loss)(logits, answers), "")
    sure = torch.full((3, 4), -1.0)
    answers = torch.tensor([1, 3, 0])
    sure[torch.arange(3), answers] = torch.tensor([19.0, 21.0, 18.0])
    right = losses(small_loss)(sure, answers)
    compare(f"{name} of logits that are nearly certain, in 1e-9 nats", _billions(fn(sure, answers)), 1e9 * right, "")
    follows_input(name, fn, chosen_logits((4,), 3, seed=9), "")
    carries_gradient(name, fn, chosen_logits((4,), 3, seed=9))


def _billions(value: Any) -> Any:
    return 1e9 * value if isinstance(value, Tensor) else value


# ---------------------------------------------------------------------------------------------------------- by tables


def from_parameters(
    position: Callable[[Tensor], Tensor] = lambda W_pos: W_pos,
    seen: Callable[[Tensor], Tensor] = lambda scores: scores.softmax(-1),
    scale: bool = True,
    bias: frozenset[str] = frozenset(),  # those left out
    columns: Callable[[Tensor], Tensor] = lambda logits: logits[:, :-1],
    stream: bool = True,
    act: Callable[[Tensor], Tensor] = torch.relu,
    order: tuple[int, int] = (0, 1),
    late: bool = True,
    tables: Callable[[Tensor], Tensor] = lambda table: table,
) -> Fn:
    """The logits pair by pair, from the parameters, with switches for what people forget."""

    def tabulated_logits(model: Any, tokens: Tensor) -> Tensor:
        weights = {f"{path}": value for path, value in model.named_parameters()}
        layer = {path.rpartition(".")[2]: value for path, value in weights.items() if path.startswith("blocks.0")}
        b = {name: 0 * value if name in bias else value for name, value in layer.items() if name.startswith("b_")}
        swapped = tokens[:, [*order, 2]]
        resid = weights["embed.W_E"][swapped] + position(weights["pos_embed.W_pos"])
        q = torch.einsum("nm,hmd->nhd", resid[:, -1], layer["W_Q"]) + b["b_Q"]
        k, v = (torch.einsum("npm,hmd->nphd", resid, layer[f"W_{letter}"]) + b[f"b_{letter}"] for letter in ("K", "V"))
        q, k, v = tables(q), tables(k), tables(v)
        scores = torch.einsum("nhd,nphd->nhp", q, k) / (q.shape[-1] ** 0.5 if scale else 1)
        z = torch.einsum("nhp,nphd->nhd", seen(scores), v)
        mid = torch.einsum("nhd,hdm->nm", z, layer["W_O"]) + b["b_O"] + stream * resid[:, -1]
        out = act(mid @ layer["W_in"] + b["b_in"]) @ layer["W_out"] + b["b_out"] + late * mid
        b_U = 0 if "b_U" in bias else weights["unembed.b_U"]
        return columns(out @ weights["unembed.W_U"] + b_U)

    return tabulated_logits


def without(*names: str) -> Fn:
    return from_parameters(bias=frozenset(names))


@known_mistakes(
    {
        "the position embeddings are missing from the tables.": from_parameters(position=lambda W_pos: 0 * W_pos),
        "both numbers have the first position's embedding; the second has its own.": from_parameters(
            position=lambda W_pos: W_pos[[0, 0, 2]]
        ),
        "a and b are swapped.": from_parameters(order=(1, 0)),
        "`=` does not attend to itself; a query may look at its own position.": from_parameters(
            seen=lambda scores: torch.cat([scores[..., :2].softmax(-1), 0 * scores[..., 2:]], -1)
        ),
        "the scores are not divided by sqrt(d_head).": from_parameters(scale=False),
        "the softmax runs over the heads; it runs over the three keys.": from_parameters(
            seen=lambda scores: scores.softmax(1)
        ),
        "`b_Q` is left out.": without("b_Q"),
        "`b_V` is left out.": without("b_V"),
        "`b_O` is left out.": without("b_O"),
        "`b_in` is left out.": without("b_in"),
        "`b_out` is left out.": without("b_out"),
        "`b_U` is left out.": without("b_U"),
        "attention's output replaces the stream of `=`; it is added to it.": from_parameters(stream=False),
        "the MLP's output replaces the stream; it is added to it.": from_parameters(late=False),
        "the ReLU is missing.": from_parameters(act=lambda pre: pre),
        "the logit of `=` is among them; it is no answer.": from_parameters(columns=lambda logits: logits),
        "no gradient gets through the tables; make them anew in every call, with gradients.": from_parameters(
            tables=Tensor.detach
        ),
        "the model itself runs, on three positions of every pair; the tables are to make that unnecessary.": (
            lambda model, tokens: model(tokens)[:, -1, :-1]
        ),
    }
)
def check_tabulated_logits(fn: Fn) -> None:
    """Against the model itself; with some of the pairs, in any order."""
    name = "tabulated_logits"
    for p, rows in ((7, slice(None)), (4, slice(14, 1, -3)), (5, slice(3, 4))):
        model, tokens = small_model(p), sums(p)[list(range(p * p)[rows])]
        right = model(tokens)[:, -1, :-1].detach()
        with unchanged(name, tokens=tokens):
            actual = _without_the_model(name, fn, model, tokens)
        compare(f"{name} of {len(tokens)} pairs, p={p}", actual, right, "pair number", rtol=1e-3, atol=1e-4)
    follows_input(name, lambda *inputs: fn(*inputs).detach(), (small_model(4), sums(4)), "pair number")
    carries_gradient(name, fn, (small_model(4), sums(4)))
    _every_gradient(name, fn)


def _every_gradient(name: str, fn: Fn) -> None:
    """Each parameter's gradient, since the training loop uses this in place of the model."""
    model, tokens, weights = small_model(4), sums(4), noise(16, 4, seed=3)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found, right = (
        torch.autograd.grad((logits_of(model, tokens) * weights).sum(), parameters, allow_unused=True)
        for logits_of in (fn, from_parameters())
    )
    for path, actual, expected in zip(names, found, right, strict=True):
        axes = " ".join(f"axis{number}" for number in range(expected.dim()))
        compare(
            f"{name}: the gradient of {path}", torch.zeros_like(expected) if actual is None else actual, expected, axes,
            rtol=1e-3, atol=1e-4,
        )  # fmt: skip


def _without_the_model(name: str, fn: Fn, model: Any, tokens: Tensor) -> Any:
    calls: list[Any] = []
    handle = model.register_forward_hook(lambda *seen: calls.append(None))
    try:
        actual = fn(model, tokens)
    finally:
        handle.remove()
    if calls:
        raise CheckFailed(
            f"{name}: the model's forward was called.\n  {len(tokens)} pairs",
            evidence=Evidence("the forward of the model", True),
            advice="  Next: work from `model.embed.W_E` and the other parameters.",
        )
    return actual
