"""Chapter 05's checks of "Is that the circuit?", against mistakes that learners make, and right answers otherwise.

Each mistake returns the right type, shape and dtype, and must be refused with its promised words. Those marked
`surprise` are absent from the check's own list of known mistakes. Then a model built so that its circuit is known.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import solutions.ch02_transformer as ch02
import solutions.ch05_patching as ref
from course_utils.checks import find_checks, run_check
from course_utils.config import TransformerConfig
from course_utils.hooks import hook_points, hooks, run_with_cache, run_with_hooks
from tests.ch02 import other_transformer
from tests.ch05 import other_circuit as other
from tests.support.mistakes import Mistake, assert_known_and_unknown, assert_quick, assert_refused
from tests.support.mutation import survivors

CHECKS = {name: check for name, check in find_checks()["05"].items() if check.__module__.endswith(".ch05.circuit")}
MISTAKES: list[Mistake] = []


def mistake(exercise: str, words: str, answer: Any, surprise: bool = False) -> None:
    """Note a wrong answer."""
    MISTAKES.append(Mistake(exercise, words, answer, surprise))


# ----------------------------------------------------------------------------------------------------------- the means


def averaging(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A template_means with switches for what people get wrong."""

    def template_means(model: Any, tokens: Any, templates: Any, max_rows: int = 256) -> Any:
        n = int(templates.max()) + 1
        if "unguarded" not in wrong and len(templates.unique()) < n:
            raise ValueError
        names = wrong.get("names", "*.attn.hook_z")
        with torch.no_grad():
            caches = [
                run_with_cache(model, piece, names=names)[1] for piece in tokens.split(wrong.get("rows", max_rows))
            ]
        if wrong.get("last_piece"):
            caches, templates = caches[-1:], templates[-len(caches[-1][next(iter(caches[-1]))]) :]
        z = {name: torch.cat([cache[name] for cache in caches]) for name in caches[0]}
        templates = wrong.get("labels", lambda labels, n: labels)(templates, n)
        reduce = wrong.get("reduce", lambda rows, every: rows.mean(0))
        means = {name: torch.stack([reduce(v[templates == t], v) for t in range(n)]) for name, v in z.items()}
        return {wrong.get("key", str)(name): wrong.get("then", lambda m: m)(mean) for name, mean in means.items()}

    mistake("template_means", words, template_means, surprise)


averaging("over all rows", reduce=lambda rows, every: every.mean(0))
averaging("over the positions too", then=lambda m: m.mean(1, keepdim=True).expand_as(m))
averaging("over the heads too", then=lambda m: m.mean(2, keepdim=True).expand_as(m))
averaging("they are sums", reduce=lambda rows, every: rows.sum(0))
averaging("by the number of all rows", reduce=lambda rows, every: rows.sum(0) / len(every))
averaging("in reverse order", then=lambda m: m.flip(0))
averaging("one of its rows, not the mean", reduce=lambda rows, every: rows[-1])
averaging("in turns", labels=lambda labels, n: torch.arange(len(labels)) % n)
averaging("taken to stand together", labels=lambda labels, n: labels.sort().values)
averaging("expected a dictionary with", names="*.attn.hook_v", surprise=True)
averaging("hook_v is averaged", names="*.attn.hook_v", key=lambda name: name.replace("hook_v", "hook_z"))
averaging("expected a dictionary with", key=lambda name: int(name.split(".")[1]), surprise=True)
averaging("values are wrong", reduce=lambda rows, every: rows.median(0).values, surprise=True)
averaging("values are wrong", reduce=lambda rows, every: rows.sum(0) / (len(rows) + 1), surprise=True)
averaging("one forward had", rows=256, surprise=True)
averaging("should raise ValueError", unguarded=True, surprise=True)


# ------------------------------------------------------------------------------------------------------------ silencing


def silencing(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A mean_ablate_except with switches for what people get wrong."""

    def mean_ablate_except(model: Any, dataset: Any, circuit: Any, means: Any) -> Any:
        with torch.no_grad():
            _, usual = run_with_cache(model, dataset.tokens)
        is_kept = wrong.get("kept", lambda circuit, layer, head: (layer, head) in circuit)

        def silence(z: Any, hook: Any) -> Any:
            layer = int(hook.name.split(".")[1])
            mean = wrong.get("mean", lambda means, name, z: means[name])(means, hook.name, z)
            out = mean.clone() if not wrong.get("spoil") else mean
            for head in range(z.shape[2]):
                if is_kept(circuit, layer, head):
                    out[:, :, head] = (usual[hook.name] if wrong.get("frozen") else z)[:, :, head]
            return out

        def leave(activation: Any, hook: Any) -> Any:
            return usual[hook.name]

        edits: dict[str, Any] = {"*.attn.hook_z": silence}
        if wrong.get("mlps") and not model.cfg.attn_only:
            edits["*.hook_mlp_out"] = leave
        if wrong.get("left"):
            for name, point in hook_points(model).items():
                if name.endswith("hook_z"):
                    point.add(silence)
            return model(dataset.tokens).detach()
        if wrong.get("graph"):
            return run_with_hooks(model, dataset.tokens, hooks=edits)
        with torch.no_grad():
            return run_with_hooks(model, dataset.tokens, hooks=edits)

    mistake("mean_ablate_except", words, mean_ablate_except, surprise)


silencing("the circuit itself is silenced", kept=lambda circuit, layer, head: (layer, head) not in circuit)
silencing("nothing is silenced", kept=lambda circuit, layer, head: True)
silencing("zeros instead of their means", mean=lambda means, name, z: torch.zeros_like(z))
silencing("their mean over the prompts of this run", mean=lambda means, name, z: z.mean(0, keepdim=True).expand_as(z))
silencing("the means of the first one", mean=lambda means, name, z: means[name][:1].expand_as(z))
silencing("mean over all prompts' means", mean=lambda means, name, z: means[name].mean(0).expand_as(z))
silencing("averaged over positions", mean=lambda means, name, z: means[name].mean(1, keepdim=True).expand_as(z))
silencing("the means of the first", mean=lambda means, name, z: means["blocks.0.attn.hook_z"])
silencing("only the last position", mean=lambda means, name, z: torch.cat([z[:, :-1], means[name][:, -1:]], 1))
silencing("layer and head are swapped", kept=lambda circuit, layer, head: (head, layer) in circuit)
silencing("kept in every layer", kept=lambda circuit, layer, head: head in {h for _, h in circuit})
silencing(
    "left as they are; there all",
    kept=lambda circuit, layer, head: (layer, head) in circuit or layer not in {at for at, _ in circuit},
)
silencing("in the usual run", frozen=True)
silencing("values are wrong", mlps=True, surprise=True)
silencing("values are wrong", mean=lambda means, name, z: means[name].roll(1, 0), surprise=True)
silencing("values are wrong", mean=lambda means, name, z: (means[name] + z) / 2, surprise=True)
silencing("it changed `means[", spoil=True, surprise=True)
silencing("gradients are recorded", graph=True, surprise=True)
silencing("a hook is left behind", left=True, surprise=True)


def scoring(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A circuit_scores with switches for what people get wrong."""

    def circuit_scores(model: Any, dataset: Any, circuits: Any, means: Any, max_rows: int = 64) -> Any:
        n = len(dataset.tokens)
        fit = wrong.get("fit", lambda max_rows, n: max(1, max_rows // n))(max_rows, n)
        scores = []
        for start in range(0, len(circuits), fit):
            group = list(circuits[start : start + fit])
            group = wrong.get("group", lambda group: group)(group)

            def silence(z: Any, hook: Any, group: Any = group) -> Any:
                layer, out = int(hook.name.split(".")[1]), z.clone()
                for copy, circuit in enumerate(group):
                    for head in range(z.shape[2]):
                        if ((layer, head) in circuit) == bool(wrong.get("complement")):
                            out[copy * n : copy * n + n, :, head] = means[hook.name][:, :, head]
                return z if wrong.get("idle") else out

            tokens = dataset.tokens.repeat(len(group), 1)
            if wrong.get("interleaved"):
                tokens = dataset.tokens.repeat_interleave(len(group), 0)
            with torch.no_grad():
                logits = run_with_hooks(model, tokens, hooks={"*.attn.hook_z": silence})
            reduce = wrong.get("reduce", torch.mean)
            scores += [reduce(ref.logit_difference(copy, dataset)) for copy in logits.split(n)]
        return wrong.get("then", lambda scores: scores)(torch.stack(scores))

    mistake("circuit_scores", words, circuit_scores, surprise)


scoring("the circuits themselves are silenced", complement=True)
scoring("nothing is silenced", idle=True)
scoring("summed over the prompts", reduce=torch.sum)
scoring("it is the first prompt's", reduce=lambda values: values[0])
scoring("the sign is wrong", then=lambda scores: -scores)
scoring("divided by the whole model's", then=lambda scores: scores / scores[-1])
scoring("in reverse order", then=lambda scores: scores.flip(0))
scoring("the first circuit of their forward", group=lambda group: group[:1] * len(group))
scoring("the last circuit of their forward", group=lambda group: group[-1:] * len(group))
scoring("values are wrong", interleaved=True, surprise=True)
scoring("values are wrong", reduce=lambda values: values.median(), surprise=True)
scoring("one forward had", fit=lambda max_rows, n: max_rows, surprise=True)
scoring("forwards for 5 circuits", fit=lambda max_rows, n: 1, surprise=True)

# --------------------------------------------------------------------------------------------------- the three criteria


def ratio(words: str, value: Callable[..., Any], surprise: bool = False) -> None:
    """A faithfulness made of F(C), F(M), F(empty) and F(the rest)."""

    def faithfulness(model: Any, dataset: Any, circuits: Any, means: Any) -> Any:
        heads = ref.every_head(model)
        rest = [[head for head in heads if head not in circuit] for circuit in circuits]
        scores = ref.circuit_scores(model, dataset, [*circuits, *rest, heads, []], means)
        n = len(circuits)
        return value(scores[:n], scores[-2], scores[-1], scores[n : 2 * n])

    mistake("faithfulness", words, faithfulness, surprise)


ratio("not divided by F(M)", lambda c, m, e, r: c)
ratio("upside down", lambda c, m, e, r: m / c)
ratio("it is the difference", lambda c, m, e, r: m - c)
ratio("the distance from 1", lambda c, m, e, r: (1 - c / m).abs())
ratio("F(empty) is subtracted", lambda c, m, e, r: (c - e) / (m - e))
ratio("the circuit is silenced, not the rest", lambda c, m, e, r: r / m)
ratio("F(C) / F(empty)", lambda c, m, e, r: c / e)
ratio("values are wrong", lambda c, m, e, r: 1 - (m - c).abs() / m, True)
ratio("values are wrong", lambda c, m, e, r: (c / m).clamp(0, 1), True)
ratio("wrong.", lambda c, m, e, r: c / c.max(), True)


def mean_of_ratios(model: Any, dataset: Any, circuits: Any, means: Any) -> Any:
    def each(circuit: Any) -> Any:
        return ref.logit_difference(ref.mean_ablate_except(model, dataset, circuit, means), dataset)

    whole = each(ref.every_head(model))
    return torch.stack([(each(circuit) / whole).mean() for circuit in circuits])


mistake("faithfulness", "the mean of every prompt's ratio", mean_of_ratios)


def two_sides(words: str, sides: Callable[..., Any], surprise: bool = False, **wrong: Any) -> None:
    """A completeness whose two lists of circuits come from `sides(circuit, every head, K)`."""

    def completeness(model: Any, dataset: Any, circuit: Any, removed: Any, means: Any) -> Any:
        heads = ref.every_head(model)
        if "unguarded" not in wrong and any(head not in circuit for k in removed for head in k):
            raise ValueError
        pairs = [sides(set(circuit), set(heads), set(k)) for k in removed]
        runs = [first for first, _ in pairs] + [second for _, second in pairs]
        scores = ref.circuit_scores(model, dataset, runs, means).reshape(2, -1)
        whole = ref.circuit_scores(model, dataset, [heads], means)
        return wrong.get("then", lambda scores, whole: scores)(scores, whole)

    mistake("completeness", words, completeness, surprise)


two_sides("the sides are swapped", lambda c, m, k: (m - k, c - k))
two_sides("out of the circuit only", lambda c, m, k: (c - k, m))
two_sides("out of the model only", lambda c, m, k: (c, m - k))
two_sides("K is what is kept", lambda c, m, k: (k, k))
two_sides("what is left of the circuit", lambda c, m, k: (c - k, m - (c - k)))
two_sides("the circuit is gone too", lambda c, m, k: (c - k, m - c))
two_sides("in reverse order", lambda c, m, k: (c - k, m - k), then=lambda s, w: s.flip(1))
two_sides("difference of the two sides", lambda c, m, k: (c - k, m - k), then=lambda s, w: (s[0] - s[1]).abs())
two_sides("divided by F(M)", lambda c, m, k: (c - k, m - k), then=lambda s, w: s / w)
two_sides("a transpose became a reshape", lambda c, m, k: (c - k, m - k), then=lambda s, w: s.T.reshape(s.shape))
two_sides("values are wrong", lambda c, m, k: (c - k, c), True)
two_sides("values are wrong", lambda c, m, k: (m - k, m - k), True)
two_sides("should raise ValueError", lambda c, m, k: (c - k, m - k), True, unguarded=True)


def minimal(words: str, sets: Callable[..., Any], surprise: bool = False, **wrong: Any) -> None:
    """A minimality that compares the two circuits of `sets(circuit, every head, K, v)`."""

    def minimality(model: Any, dataset: Any, circuit: Any, removed: Any, means: Any) -> Any:
        circuit, heads = set(circuit), set(ref.every_head(model))
        values = []
        order = [head for head in sorted(circuit) if head in removed] if wrong.get("sorted") else list(removed)
        refuse = wrong.get("refuse", lambda v, k, c: v in k or not {v, *k} <= c)
        for v in wrong.get("order", lambda order, circuit: order)(order, list(circuit)):
            k = set(removed[v])
            if refuse(v, k, circuit):
                raise ValueError
            first, second = sets(circuit, heads, k, {v})
            a, b, m, c = ref.circuit_scores(model, dataset, [first, second, heads, circuit], means)
            values.append(wrong.get("value", lambda a, b, m, c: (a - b).abs() / m)(a, b, m, c))
        return torch.stack(values)

    mistake("minimality", words, minimality, surprise)


def right_sets(c: Any, m: Any, k: Any, v: Any) -> Any:
    return c - k - v, c - k


minimal("K stays in", lambda c, m, k, v: (c - v, c))
minimal("v is not taken out", lambda c, m, k, v: (c - k, c))
minimal("what v and K add together", lambda c, m, k, v: (c - k - v, c))
minimal("v alone is compared with K alone", lambda c, m, k, v: (c - v, c - k))
minimal("measured in the whole model", lambda c, m, k, v: (m - k - v, m - k))
minimal("it has a sign; take", right_sets, value=lambda a, b, m, c: (a - b) / m)
minimal("and the other one at that", right_sets, value=lambda a, b, m, c: (b - a) / m)
minimal("it is not a share of F(M)", right_sets, value=lambda a, b, m, c: (a - b).abs())
minimal("a share of F(C); take", right_sets, value=lambda a, b, m, c: ((a - b) / c).abs())
minimal("a share of F(C without K)", right_sets, value=lambda a, b, m, c: ((a - b) / b).abs())
minimal("upside down", right_sets, value=lambda a, b, m, c: m / (a - b).abs())
minimal("values are wrong", lambda c, m, k, v: (k | v, k), True)
minimal("values are wrong", lambda c, m, k, v: (m - v, c - k), True)
minimal("values are wrong", right_sets, True, sorted=True)
minimal("a K that is not of the circuit", right_sets, True, refuse=lambda v, k, c: v in k or v not in c)
minimal("a v that is not of the circuit", right_sets, True, refuse=lambda v, k, c: v in k or not k <= c)
minimal("a v in its own K", right_sets, True, refuse=lambda v, k, c: not {v, *k} <= c)

# -------------------------------------------------------------------------------------------------------------- greedy


def searching(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A greedy_circuit with switches for what people get wrong."""

    def greedy_circuit(model: Any, dataset: Any, means: Any, share: float = 0.25, max_rows: int = 64) -> Any:
        circuit = ref.every_head(model)
        whole = ref.circuit_scores(model, dataset, [circuit], means)[0]
        rounds, changes, expected = [list(circuit)], {}, whole
        badness = wrong.get("badness", lambda scores, whole, now: (scores - whole).abs())
        while circuit:
            runs = [circuit, *([kept for kept in circuit if kept != head] for head in circuit)]
            scores = ref.circuit_scores(model, dataset, runs, means, wrong.get("rows", max_rows))
            if not changes or not wrong.get("once"):
                changes = dict(zip(circuit, scores[1:] - scores[0], strict=True))
            if not wrong.get("carried"):
                expected = scores[0]
            left = list(circuit)
            for _ in range(max(wrong.get("least", 1), wrong.get("count", int)(share * len(wrong.get("of", left))))):
                values = {head: float(badness(expected + changes[head], whole, expected)) for head in left}
                gone = min(left, key=values.__getitem__)
                left.remove(gone)
                if not wrong.get("alone"):
                    expected = expected + changes[gone]
            circuit = left
            rounds.append(list(circuit))
        return wrong.get("then", lambda rounds: rounds)(rounds)

    mistake("greedy_circuit", words, greedy_circuit, surprise)


searching("missed most go first", badness=lambda f, m, now: -(f - m).abs())
searching("leaves the highest score", badness=lambda f, m, now: -f)
searching("leaves the lowest score", badness=lambda f, m, now: f)
searching("compared with the one before", badness=lambda f, m, now: (f - now).abs())
searching("measured once", once=True)
searching("do not add up", alone=True)
searching("rounded up", count=lambda n: -int(-n // 1))
searching("one at a time", count=lambda n: 1)
searching("the first circuit, with every head, is missing", then=lambda rounds: rounds[1:])
searching("the last circuit, the empty one, is missing", then=lambda rounds: rounds[:-1])
searching("in reverse order", then=lambda rounds: rounds[::-1])
searching("the heads that went", then=lambda rounds: [[h for h in rounds[0] if h not in kept] for kept in rounds])
searching("wrong answer", badness=lambda f, m, now: f.abs(), surprise=True)
searching("wrong answer", carried=True, surprise=True)
searching("it goes on and on", least=0, surprise=True)
searching("one forward had", rows=64, surprise=True)
searching("expected a list of circuits", then=lambda rounds: rounds[-2], surprise=True)

# -------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("mistake", [pytest.param(m, id=f"{m.exercise}: {m.words[:50]}") for m in MISTAKES])
def test_mistake_is_refused_with_its_words(mistake: Mistake) -> None:
    assert_refused(CHECKS[mistake.exercise], mistake, secrets=("torch.where(", "bincount", "argsort", "einsum("))


@pytest.mark.parametrize("exercise", CHECKS)
def test_every_exercise_has_mistakes_known_and_unknown(exercise: str) -> None:
    assert_known_and_unknown(MISTAKES, exercise)


@pytest.mark.parametrize("exercise", CHECKS)
def test_another_right_answer_passes(exercise: str) -> None:
    run_check(CHECKS[exercise], getattr(other, exercise))


@pytest.mark.parametrize("exercise", CHECKS)
def test_check_is_quick(exercise: str) -> None:
    assert_quick(CHECKS[exercise], getattr(ref, exercise), seconds=0.3, rounds=3)


# Changes after which the reference still does what its statement says.
CHUNKS = "zip(tokens.split(max_rows), templates.to(tokens.device).split(max_rows), strict=True)"
STILL_RIGHT = {
    "counts == 0 -> counts <= 0",  # there are no negative ones
    "counts.tolist() -> counts",  # the words of an error
    "True -> False",  # strict=
    f"{CHUNKS} -> {CHUNKS.replace(', strict=True', '')}",
    "int((expected + changes[left] - whole).abs().argmin()) -> (expected + changes[left] - whole).abs().argmin()",
}


@pytest.mark.slow
@pytest.mark.parametrize("exercise", CHECKS)
def test_small_changes_of_the_reference_are_refused(exercise: str) -> None:
    """One operator, number, comparison or argument at a time. Only what needs a GPU to be seen is let off."""
    assert survivors(Path(ref.__file__), exercise, CHECKS[exercise], only_on_gpu="device") <= STILL_RIGHT


# ------------------------------------------------------------ a model built so that its circuit is known

SOLUTIONS = pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
N_NAMES, BOS, POS = 6, 6, 5  # five positions: BOS, two names, the second of them again, and a place for the answer
BUILT = TransformerConfig(
    d_vocab=7, n_ctx=POS, n_layers=2, n_heads=3, d_model=POS + 3 * N_NAMES, d_head=N_NAMES + POS, d_mlp=1,
    attn_only=True, normalization="none",
)  # fmt: skip
READ, RELAYED, SAID = (slice(POS + i * N_NAMES, POS + (i + 1) * N_NAMES) for i in range(3))  # parts of the stream


def attend(attn: Any, head: int, query: int, key: int) -> None:
    """Position `query` looks at `key` (and all others at BOS, which holds no name)."""
    place = torch.arange(POS)
    attn.W_Q[head, place, N_NAMES + place] = 30.0
    attn.W_K[head, 0, N_NAMES + place] = 10.0
    attn.W_K[head, 0, N_NAMES + query] = 0.0
    attn.W_K[head, key, N_NAMES + query] = 20.0


def carry(attn: Any, head: int, source: slice, target: slice, size: float) -> None:
    """What is found in one part of the stream is written into another."""
    name = torch.arange(N_NAMES)
    attn.W_V[head, source, name] = torch.eye(N_NAMES)
    attn.W_O[head, name, target] = size * torch.eye(N_NAMES)


@pytest.fixture(params=[ch02.Transformer, other_transformer.Transformer], ids=["reference", "other"])
def built(request: pytest.FixtureRequest) -> nn.Module:
    """Names are read at position 1, relayed to 3 by 0.1, and said at 4 by 1.2 (as 4) and, its spare, by 1.0 (as 2).

    The other three heads do nothing to the answer: 0.0 writes where nobody reads, 0.2 and 1.1 write nothing.
    """
    model = request.param(BUILT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        name = torch.arange(N_NAMES)
        model.embed.W_E[name, READ] = torch.eye(N_NAMES)
        model.pos_embed.W_pos[:, :POS] = torch.eye(POS)
        model.unembed.W_U[SAID, name] = torch.eye(N_NAMES)
        first, second = (block.attn for block in model.blocks)
        attend(first, 1, query=3, key=1)
        carry(first, 1, READ, RELAYED, 1.0)
        attend(first, 0, query=2, key=1)
        carry(first, 0, READ, RELAYED, 1.0)
        for head, size in ((2, 4.0), (0, 2.0)):
            attend(second, head, query=4, key=3)
            carry(second, head, RELAYED, SAID, size)
    return model


class Prompts(SimpleNamespace):
    """Every ordered pair of two names: IO, S, S, and the end."""

    def __init__(self) -> None:
        pairs = [(io, s) for io in range(N_NAMES) for s in range(N_NAMES) if io != s]
        io, s = torch.tensor(pairs).T
        tokens = torch.stack([torch.full_like(io, BOS), io, s, s, torch.full_like(io, BOS)], dim=1)
        super().__init__(tokens=tokens, io=io, s=s, positions={"END": torch.full_like(io, POS - 1)})


PROMPTS = Prompts()
TRUE, SPARE = [(0, 1), (1, 2)], (1, 0)


def built_means(module: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    """One template for all prompts: the mean of all, which holds no name more than another."""
    tokens = PROMPTS.tokens
    (means,) = [module.template_means(model, tokens, torch.zeros(len(tokens), dtype=torch.long))]
    return {name: mean.expand(len(tokens), *mean.shape[1:]) for name, mean in means.items()}


@SOLUTIONS
def test_a_known_circuit_scores_what_it_was_built_to_score(module: Any, built: nn.Module) -> None:
    means = built_means(module, built)
    circuits = [TRUE, [*TRUE, SPARE], [(0, 1), SPARE], [(0, 1)], [(1, 2), SPARE], [(0, 0), (0, 2), (1, 1)], []]
    scores = module.circuit_scores(built, PROMPTS, circuits, means)
    torch.testing.assert_close(scores, torch.tensor([4.0, 6, 2, 0, 0, 0, 0]), rtol=1e-4, atol=1e-4)
    faithful = module.faithfulness(built, PROMPTS, circuits[:3], means)
    torch.testing.assert_close(faithful, torch.tensor([2 / 3, 1, 1 / 3]), rtol=1e-4, atol=1e-4)


@SOLUTIONS
def test_the_spare_shows_in_completeness_and_in_minimality(module: Any, built: nn.Module) -> None:
    """Without the spare the circuit is incomplete by 2, but for a K that takes away what both writers need."""
    means = built_means(module, built)
    sides = module.completeness(built, PROMPTS, TRUE, [[], [(1, 2)], [(0, 1)]], means)
    torch.testing.assert_close(sides, torch.tensor([[4.0, 0, 0], [6, 2, 0]]), rtol=1e-4, atol=1e-4)
    circuit = [*TRUE, SPARE, (0, 0)]
    removed = {(0, 1): [], (1, 2): [(0, 1)], SPARE: [(1, 2)], (0, 0): [SPARE]}
    shares = module.minimality(built, PROMPTS, circuit, removed, means)
    torch.testing.assert_close(shares, torch.tensor([1.0, 0, 1 / 3, 0]), rtol=1e-4, atol=1e-4)


@SOLUTIONS
def test_the_search_keeps_what_was_built_in_to_the_end(module: Any, built: nn.Module) -> None:
    rounds = module.greedy_circuit(built, PROMPTS, built_means(module, built), share=0.0)
    assert [len(circuit) for circuit in rounds] == [6, 5, 4, 3, 2, 1, 0]
    assert set(rounds[3]) == {*TRUE, SPARE}
    assert set(rounds[4]) == set(TRUE)


# ------------------------------------------------------------ identities, on a random model

TINY = TransformerConfig(d_vocab=31, n_ctx=17, n_layers=2, n_heads=3, d_model=20, d_head=5, d_mlp=24)


@pytest.fixture(params=[ch02.Transformer, other_transformer.Transformer], ids=["reference", "other"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A small transformer in which every parameter is random, whoever wrote it."""
    made = request.param(TINY)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return made


@SOLUTIONS
def test_every_head_is_the_model_and_no_head_leaves_each_position_to_itself(module: Any, model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(31, (4, 6), generator=generator)
    tokens[1::2, 5] = tokens[::2, 5]  # prompts 0 and 1 end in the same token, and so do 2 and 3
    means = module.template_means(model, tokens, torch.tensor([0, 0, 1, 1]))
    dataset = SimpleNamespace(tokens=tokens)
    each = {name: mean[[0, 0, 1, 1]] for name, mean in means.items()}
    with torch.no_grad():
        usual = model(tokens)
    whole = module.mean_ablate_except(model, dataset, module.every_head(model), each)
    torch.testing.assert_close(whole, usual, rtol=1e-4, atol=1e-4)
    empty = module.mean_ablate_except(model, dataset, [], each)[:, -1]
    torch.testing.assert_close(empty[::2], empty[1::2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(empty[0], empty[2], atol=0.1)


def test_random_circuits_are_of_their_size_and_without_repetition(model: nn.Module) -> None:
    drawn = [ref.random_circuits(model, 4, 9, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(circuit)) == 4 and set(circuit) <= set(ref.every_head(model)) for circuit in drawn[0])
    assert len({frozenset(circuit) for circuit in drawn[0]}) > 1


def test_hooks_of_others_see_the_silenced_model(model: nn.Module) -> None:
    """A hook put on before acts first, and stays: an ablation can be combined with another intervention."""
    dataset = SimpleNamespace(tokens=torch.randint(31, (2, 6), generator=torch.Generator().manual_seed(4)))
    means = ref.template_means(model, dataset.tokens, torch.tensor([0, 1]))
    seen: list[str] = []
    with hooks(model, {"*.hook_resid_post": lambda resid, hook: seen.append(hook.name)}):
        ref.mean_ablate_except(model, dataset, [(0, 1)], means)
    assert seen == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
