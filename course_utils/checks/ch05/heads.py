"""Checks of chapter 05, what heads do: where they look, what they copy, what they tell others, and their roles."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from numbers import Integral
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from course_utils.checks import comparing
from course_utils.checks.by_loops import layer_norm, part
from course_utils.checks.ch05.case import Case, case_of, compare, leaves_no_trace, worked_out
from course_utils.checks.ch05.patching import no_graph
from course_utils.checks.ch05.path_loops import FINAL, Head, Prompts, Receiver, path_scores
from course_utils.checks.ch05.paths import SIZES, Fn, Q, V, by_every_way
from course_utils.checks.ch05.task import differences
from course_utils.checks.comparing import follows_input, unchanged
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.modules import noise, weights_of
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree, call_of, must_raise
from course_utils.checks.standins.transformer import SmallModel
from course_utils.checks.translating import during
from course_utils.config import TransformerConfig
from course_utils.hooks import ActivationCache, run_with_cache


def attention_by_loop(patterns: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Visit every layer, head and prompt."""
    n_layers, n_batch, n_heads = patterns.shape[:3]
    out = patterns.new_empty(n_layers, n_heads, n_batch)
    for layer, head, row in product(range(n_layers), range(n_heads), range(n_batch)):
        out[layer, head, row] = patterns[layer, row, head, int(queries[row]), int(keys[row])]
    return out


def looking(
    places: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda queries, keys: (queries, keys),
    then: Callable[[Tensor], Tensor] = lambda attention: attention,
) -> Fn:
    """An attention_between other places, or changed afterwards."""
    return lambda cache, queries, keys: then(attention_by_loop(cache.stack("pattern"), *places(queries, keys)))


@known_mistakes(
    {
        "query and key are swapped: a pattern is [batch head query key].": looking(lambda q, k: (k, q)),
        "every prompt is read at the first one's query.": looking(lambda q, k: (q[:1].expand_as(q), k)),
        "every prompt is read at the first one's key.": looking(lambda q, k: (q, k[:1].expand_as(k))),
        "it looks from the last position; each prompt has a query of its own.": looking(
            lambda q, k: (torch.full_like(q, -1), k)
        ),
        "it is the mean over the prompts; give one number for each.": looking(then=lambda found: found.mean(-1)),
        "the layers are in reverse order.": looking(then=lambda found: found.flip(0)),
    }
)
def check_attention_between(fn: Fn) -> None:
    """Places that differ from prompt to prompt; few layers, many, and one of everything. The cache holds more."""
    name, axes = "attention_between", "layer head batch"
    for n_layers, n_batch, n_heads, n_pos in [(11, 2, 1, 5), (1, 1, 1, 3), (2, 4, 3, 6), (3, 5, 2, 7)]:
        patterns = noise(n_layers, n_batch, n_heads, n_pos, n_pos, seed=n_pos, scale=2.0).softmax(-1)
        places = {"scores": -patterns, "pattern": patterns}
        cache = ActivationCache(
            {f"blocks.{i}.attn.hook_{place}": p[i] for i in range(n_layers) for place, p in places.items()}
        )
        rows = torch.arange(n_batch)
        queries, keys = n_pos - 2 + rows % 2, (rows * rows + 1) % (n_pos - 2)
        right = attention_by_loop(patterns, queries, keys)
        compare(f"{name} in {n_layers} layers of {n_heads} heads", fn(cache, queries, keys), right, axes)
    follows_input(
        name,
        lambda moved: fn(ActivationCache({"blocks.0.attn.hook_pattern": moved}), queries, keys),
        (patterns[0],),
        axes,
    )


def named_prompts(d_vocab: int, n_batch: int, n_pos: int) -> Any:
    """Tokens and places, as in an `IOIDataset`, at other positions in every prompt."""
    generator = torch.Generator().manual_seed(n_pos)
    rows = torch.arange(n_batch)
    tokens = torch.randint(d_vocab, (n_batch, n_pos), generator=generator)
    io, s1 = 1 + rows % 2, 2 - rows % 2
    places = {"IO": io, "S1": s1, "S1+1": s1 + 1, "S2": 3 + rows % 2, "END": torch.full((n_batch,), n_pos - 1)}
    return SimpleNamespace(tokens=tokens, positions=places)


def copied(
    model: Any, dataset: Any, sign: int = 1, k: int = 5, *, at: Sequence[str] = ("IO", "S1"), **wrong: Any
) -> Tensor:
    """Visit every head, and count names.

    `wrong` may hold: `other_depth`, `at_own_layer` or `embedding`, another stream is read; `without`, LayerNorms that
    are left out; `ln1`, the layer whose LayerNorm reads; `no_b_V`, `no_b_U`.
    """
    cfg, weights = model.cfg, weights_of(model)
    with torch.no_grad():
        _, cache = run_with_cache(model, dataset.tokens)
    early = cfg.attn_only != bool(wrong.get("other_depth"))
    stream = cache["blocks.0.hook_resid_pre" if early else "blocks.0.hook_resid_post"]
    if wrong.get("embedding"):
        stream = cache["hook_embed"]
    scores = torch.zeros(cfg.n_layers, cfg.n_heads, dtype=stream.dtype)

    def norm(owner: str, vector: Tensor) -> Tensor:
        parts = part(weights, owner)
        return vector if owner in wrong.get("without", ()) else layer_norm(parts, vector, cfg.layer_norm_eps)["output"]

    for layer, head in product(range(cfg.n_layers), range(cfg.n_heads)):
        attn = {letter: weights[f"blocks.{layer}.attn.{letter}"] for letter in ("W_V", "b_V", "W_O")}
        if wrong.get("at_own_layer"):
            stream = cache[f"blocks.{layer}.hook_resid_pre"]
        hits = []
        for place in at:
            pos, rows = dataset.positions[place], torch.arange(len(dataset.tokens))
            read = norm(f"blocks.{wrong.get('ln1', layer)}.ln1", stream[rows, pos])
            v = read @ attn["W_V"][head] + (0 if wrong.get("no_b_V") else attn["b_V"][head])
            logits = norm("ln_final", sign * (v @ attn["W_O"][head])) @ weights["unembed.W_U"]
            logits = logits + (0 if wrong.get("no_b_U") else weights["unembed.b_U"])
            best = logits.argsort(descending=True)[:, :k].tolist()
            names = dataset.tokens[rows, pos].tolist()
            hits += [float(name in row) for name, row in zip(names, best, strict=True)]
        scores[layer, head] = sum(hits) / len(hits)
    return scores


@known_mistakes(
    {
        "the stream is taken before the first layer's MLP, or after a layer that has none.": partial(
            copied, other_depth=True
        ),
        "the stream comes from the head's own layer; take the early one.": partial(copied, at_own_layer=True),
        "it is the token's embedding alone, without the position.": partial(copied, embedding=True),
        "the head's `ln1` is left out.": partial(copied, without=("blocks.0.ln1", "blocks.1.ln1")),
        "every head reads through the first layer's `ln1`; take its own.": partial(copied, ln1=0),
        "`b_V` is left out.": partial(copied, no_b_V=True),
        "`ln_final` is left out.": partial(copied, without=("ln_final",)),
        "the unembedding's `b_U` is left out.": partial(copied, no_b_U=True),
        "`sign` is the wrong way round, or ignored.": lambda model, dataset, sign=1, k=5: copied(
            model, dataset, -sign, k
        ),
        "`k` is ignored: it is the first only.": lambda model, dataset, sign=1, k=5: copied(model, dataset, sign, 1),
        "`k` is off by one.": lambda model, dataset, sign=1, k=5: copied(model, dataset, sign, k + 1),
        "S2 is taken for S1.": partial(copied, at=("IO", "S2")),
        "only IO counts; S1 is a name as well.": partial(copied, at=("IO",)),
        "only S1 counts; IO is a name as well.": partial(copied, at=("S1",)),
        "it is the share of names that are not copied.": lambda *given: 1 - copied(*given),
    }
)
def check_name_copying_scores(fn: Fn) -> None:
    """With MLPs and without; both signs, two values of k; rotary positions, no normalisation."""
    name, axes = "name_copying_scores", "layer head"
    rotary = {"positions": "rotary", "rotary_dim": 2}
    cases: list[tuple[bool, int, int, int, dict[str, Any]]] = [
        (False, 1, 5, 2, {}),
        (True, 1, 3, 2, {}),
        (False, -1, 3, 2, rotary),
        (False, 1, 3, 1, {}),
        (True, -1, 5, 2, {"normalization": "none"}),
    ]
    for attn_only, sign, k, n, kind in cases:
        sizes: dict[str, Any] = {
            "n_layers": n,
            "n_heads": 2 * n - 1,
            "d_model": 8,
            "d_head": 4,
            "n_ctx": 7,
            "d_vocab": 13,
            **kind,
        }
        model = SmallModel(TransformerConfig(**sizes, d_mlp=0 if attn_only else 6, attn_only=attn_only))
        dataset = named_prompts(13, 10 if n > 1 else 1, 6)
        words = f"with sign={sign}, k={k}, {'no MLPs' if attn_only else 'MLPs'}, {n} layer{'s' * (n > 1)}"
        words += "".join(f", {field}={choice!r}" for field, choice in kind.items())
        with unchanged(name, tokens=dataset.tokens), during(words):
            actual = fn(model, dataset, sign, k)
        compare(f"{name} {words}", actual, copied(model, dataset, sign, k), axes)
        no_graph(name, actual)
    compare(f"{name} as called by default", fn(model, dataset), copied(model, dataset, 1, 5), axes)
    double = model.double()
    with during("in float64"):
        actual = fn(double, dataset, 1, 3)
    comparing.compare(f"{name} in float64", actual, copied(double, dataset, 1, 3), axes)  # shares may be rounded


Effects = dict[str, Tensor]


def signals(
    model: Any,
    dataset: Any,
    senders: Any,
    receivers: Any,
    *,
    score: Fn = path_scores,
    own_labels: bool = True,
    **kinds: tuple[str, ...],
) -> Effects:
    """For each signal a run with information from prompts flipped in its way, minus the plain run.

    `kinds` says how they are flipped, if not as the statement says; `score` may replace direct paths.
    """
    effects = {}
    for signal, turns in ({"token": ("names",), "position": ("order",), "both": ("names", "order")} | kinds).items():
        other = dataset
        for kind in turns:
            other = other.flipped(kind)
        metric = partial(differences, dataset=dataset if own_labels else other)
        after, before = (
            score(model, dataset.tokens, tokens, senders, receivers, metric)
            for tokens in (other.tokens, dataset.tokens)
        )
        effects[signal] = after - before
    return effects


def afterwards(change: Callable[[Effects], Mapping[str, Tensor]]) -> Fn:
    """A signal_effects whose answer was changed."""
    return lambda *given: change(signals(*given))


def not_from_the_run(model: Any, dataset: Any, *heads: Any) -> Any:
    with torch.no_grad():
        base = differences(model(dataset.tokens), dataset)
    return {signal: effect + base for signal, effect in signals(model, dataset, *heads).items()}


@known_mistakes(
    {
        "token and position are swapped: exchanging names changes the token.": partial(
            signals, token=("order",), position=("names",)
        ),
        '"both" exchanges the names only.': partial(signals, both=("names",)),
        '"both" exchanges the order only.': partial(signals, both=("order",)),
        '"both" is the sum of the other two; it is a run of its own.': afterwards(
            lambda effects: effects | {"both": effects["token"] + effects["position"]}
        ),
        "the labels are those of the flipped prompts; always take the dataset's own.": partial(
            signals, own_labels=False
        ),
        "the sign is wrong: take the difference after, minus the difference before.": afterwards(
            lambda effects: {signal: -effect for signal, effect in effects.items()}
        ),
        "it is the logit difference itself; give how much it changes.": not_from_the_run,
        "it is the whole effect of the senders, by every path; take the direct paths to the receivers.": partial(
            signals, score=by_every_way
        ),
        "it is the mean over the prompts; give one number for each.": afterwards(
            lambda effects: {signal: effect.mean() for signal, effect in effects.items()}
        ),
    }
)
def check_signal_effects(fn: Fn) -> None:
    """Two models; prompts whose labels change with the corruption."""
    assert_signals(fn, case_of(*SIZES[0]), [(0, 1), (1, 0)], [V, Q])
    assert_signals(fn, case_of(*SIZES[1]), [(1, 3)], [FINAL])


def labelled_prompts(case: Case) -> Prompts:
    rows = torch.arange(case.n_batch, device=case.tokens.device)
    return Prompts(case.tokens, (3 * rows + 2) % 11, (2 * rows + 5) % 11)


def assert_signals(fn: Fn, case: Case, senders: list[Head], receivers: list[Receiver]) -> None:
    """One model."""
    name, dataset = "signal_effects", labelled_prompts(case)
    words = f"from {senders} to {', '.join(map(str, receivers))} {case.words}"
    with leaves_no_trace(name, case), during(words):
        actual = fn(case.model, dataset, senders, receivers)
    if not isinstance(actual, dict) or set(actual) != {"token", "position", "both"}:
        got = sorted(map(str, actual)) if isinstance(actual, dict) else type(actual).__name__
        raise CheckFailed(
            f'{name}: expected a dictionary with "token", "position" and "both", got {got}.\n'
            "  Next: one entry for each of the three signals."
        )
    right = worked_out(words, case, lambda case: signals(case.model, labelled_prompts(case), senders, receivers))
    for signal in right:
        compare(f'{name}, "{signal}", {words}', actual[signal], right[signal], "batch")
        no_graph(name, actual[signal])


def worked_roles(
    tables: Any,
    rules: Any,
    *,
    strict: bool = False,
    enough: Callable[[Any], bool] = all,
    negative: bool = True,
    size: bool = False,
    order: Callable[[float], float] = lambda value: -abs(value),
) -> dict[str, list[Head]]:
    """Ask every head about every condition; the smallest value of `order` comes first."""

    def meets(value: float, least: float) -> bool:
        if size:
            value, least = abs(value), abs(least)
        below = negative and least < 0
        return (value < least if below else value > least) or (value == least and not strict)

    roles = {}
    for role, conditions in rules.items():
        first = tables[next(iter(conditions))]
        heads = [
            at
            for at in product(range(len(first)), range(first.shape[1]))
            if enough(meets(tables[name][at].item(), least) for name, least in conditions.items())
        ]
        places = {at: order(first[at].item()) for at in heads}
        roles[role] = sorted(heads, key=places.__getitem__)
    return roles


@known_mistakes(
    {
        "a value at the threshold does not count; it does.": partial(worked_roles, strict=True),
        "one condition is enough; all of them must be met.": partial(worked_roles, enough=any),
        "a negative condition is met by values above it; it is met by those at or below it.": partial(
            worked_roles, negative=False
        ),
        "sizes count without their signs.": partial(worked_roles, size=True),
        "roles that nobody has are left out; absent is a finding.": lambda tables, rules: {
            role: heads for role, heads in worked_roles(tables, rules).items() if heads
        },
        "the heads stand in the model's order, not the strongest first.": partial(
            worked_roles, order=lambda value: 0.0
        ),
        "the heads come with the largest value first; it is the largest absolute value.": partial(
            worked_roles, order=lambda value: -value
        ),
        "a head is (layer, head), not (head, layer).": lambda tables, rules: {
            role: [(head, layer) for layer, head in heads] for role, heads in worked_roles(tables, rules).items()
        },
    }
)
def check_head_roles(fn: Fn) -> None:
    """Several conditions, both signs, values at the threshold; roles that nobody has; what was not measured."""
    name = "head_roles"
    direct = torch.tensor([[0.5, -0.25, 0.125], [-0.75, 0.25, 1.0]])
    looks = torch.tensor([[0.5, 0.75, 0.25], [0.0, 0.5, 1.0]])
    tables = {"direct": direct, "looks": looks}
    rules = {
        "writer": {"direct": 0.25},
        "reader": {"looks": 0.5, "direct": 0.25},
        "against": {"direct": -0.25},
        "nobody": {"looks": 0.75, "direct": -0.5},
        "any": {"looks": 0.0},
    }
    call = call_of(name, {key: value.tolist() for key, value in tables.items()}, rules)
    actual = fn(tables, rules)
    agree(name, call, actual, worked_roles(tables, rules))
    kinds = {type(n).__name__ for heads in actual.values() for at in heads for n in at if not isinstance(n, Integral)}
    if kinds:
        raise CheckFailed(
            f"{name}: a head is a pair of ints, but there are some of type {', '.join(sorted(kinds))}.\n"
            "  Next: `.tolist()` makes numbers of a tensor's entries."
        )
    if list(actual) != list(rules):
        raise CheckFailed(
            f"{name}: the roles come as {', '.join(actual)}, but the rules as {', '.join(rules)}.\n"
            "  Next: a dictionary keeps the order in which it is filled: go through `rules`."
        )
    one = {"one": tables["direct"][:1, :1]}
    agree(name, call_of(name, {"one": [[0.5]]}, {"x": {"one": 0.5}}), fn(one, {"x": {"one": 0.5}}), {"x": [(0, 0)]})
    refuses_unmeasured(name, fn, tables)


def refuses_unmeasured(name: str, fn: Fn, tables: dict[str, Tensor]) -> None:
    """The error names what is missing, and who asks for it."""
    said: list[str] = []

    def run() -> Any:
        try:
            return fn(tables, {"scribe": {"weight": 0.5}})
        except ValueError as error:
            said.append(str(error))
            raise

    rule = 'a rule of "scribe" about "weight", which is in no table,'
    must_raise(name, ValueError, rule, run)
    if not all(word in said[0] for word in ("scribe", "weight")):
        raise CheckFailed(
            f"{name}: for {rule} the error says only {said[0]!r}.\n"
            "  Next: put role and measurement into the message, so that people find the rule."
        )
