"""Checks of chapter 05, path patching and what heads do, on small models whose paths are worked out by hand."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.by_loops import layer_norm
from course_utils.checks.ch05.case import Case, case_of, leaves_no_trace, worked_out
from course_utils.checks.ch05.patching import no_graph
from course_utils.checks.ch05.path_loops import Head, Prompts, Receiver, fix, over_paths, path_scores, z
from course_utils.checks.comparing import compare, follows_input, unchanged
from course_utils.checks.modules import noise, weights_of
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import agree, call_of, must_raise, untouched
from course_utils.checks.standins.transformer import SmallModel
from course_utils.checks.translating import during
from course_utils.config import TransformerConfig
from course_utils.hooks import ActivationCache, run_with_cache

Fn = Callable[..., Any]
Wrong = dict[str, Callable[[], Tensor]]
SIZES = [(3, 2, 4, 5), (3, 4, 2, 5, True, True)]  # layers, heads, batch, pos; the second without MLPs, in float64
Q, K, V = ("blocks.2.attn.hook_q", 1), ("blocks.1.attn.hook_k", 1), ("blocks.2.attn.hook_v", 0)
FINAL: Receiver = ("final", None)


def renamed(receivers: Sequence[Receiver], old: str, new: str) -> list[Receiver]:
    """The same receivers with another of their inputs."""
    return [(name.replace(f"hook_{old}", f"hook_{new}"), head) for name, head in receivers]


def other_inputs(receivers: Sequence[Receiver], score: Callable[[list[Receiver]], Tensor]) -> Wrong:
    """What comes out where the news arrives at another input of the receivers."""
    return {
        f"it arrives at the receivers' {new}, not at their {old}.": partial(score, renamed(receivers, old, new))
        for old, new in product("qkv", "qkv")
        if old != new and any(name.endswith(f"hook_{old}") for name, _ in receivers)
    }


# ------------------------------------------------------------------------------------------------------ path patching


def check_run_over_direct_paths(fn: Fn) -> None:
    """Everything fixed, or one layer; one receiver, several, and the final stream."""
    name = "run_over_direct_paths"
    for sizes in SIZES:
        case = case_of(*sizes)
        everything = fix(case, [(0, 1), (1, 0)], True)
        for fixed, receivers in [
            (everything, [Q]),
            (everything, [V, K]),
            ({z(0): everything[z(0)]}, [V]),
            (everything, [FINAL]),
        ]:
            assert_runs(name, fn, case, fixed, receivers)


def assert_runs(name: str, fn: Fn, case: Case, fixed: dict[str, Tensor], receivers: list[Receiver]) -> None:
    """One set of fixed activations, one of receivers."""
    words = f"to {', '.join(map(str, receivers))}, {len(fixed)} places fixed,"
    given = dict(fixed)
    with leaves_no_trace(name, case, ActivationCache(fixed, case.n_layers)), during(words):
        actual = fn(case.model, case.tokens, given, receivers)
    if set(given) != set(fixed) or any(given[place] is not fixed[place] for place in fixed):
        raise CheckFailed(f"{name}: it changed `fixed`, which it was only given to read.\n  Next: make a new one.")
    run = partial(over_paths, case, fixed, receivers)
    last = case.n_layers - 1
    mistakes: Wrong = {
        "nothing is fixed in the first run, so the receivers get what they always get.": lambda: case.logits({}),
        "the activations are still fixed in the second run, or there is none: the receivers do nothing.": partial(
            run, still=fixed
        ),
        "all heads of a receiver's layer receive, not only the one named.": partial(run, all_heads=True),
        "only the last position receives; take all of them.": partial(run, pos=-1),
        "a head's number is used as a position: a q is [batch pos head d_head].": partial(run, by_position=True),
        "only the first receiver receives.": lambda: over_paths(case, fixed, receivers[:1]),
        "only the last receiver receives.": lambda: over_paths(case, fixed, receivers[-1:]),
        **other_inputs(receivers, partial(over_paths, case, fixed)),
        "the final stream is what the last layer reads; it is what that leaves, its resid_post.": partial(
            run, final=f"blocks.{last}.hook_resid_pre"
        ),
    }
    compare(f"{name} {words} {case.words}", actual, run(), "batch pos d_vocab", mistakes)
    no_graph(name, actual)


SCENES: list[tuple[list[Head], list[Receiver], bool]] = [
    ([(0, 1)], [Q], True),
    ([(0, 0), (1, 1)], [V, K], True),
    ([(0, 0)], [FINAL], False),
    ([(1, 1)], [FINAL], True),
    ([(2, 0), (1, 0)], [K], True),  # no path: they come too late
]


def check_path_patch(fn: Fn) -> None:
    """Paths to q, k, v and the end, with MLPs frozen or not; senders that come too late; what is refused."""
    name = "path_patch"
    for sizes, scenes in zip(SIZES, (SCENES, SCENES[1:4:2]), strict=True):
        for senders, receivers, freeze_mlps in scenes:
            assert_path(name, fn, case_of(*sizes), senders, receivers, freeze_mlps)
    assert_default(name, fn, ([(0, 0)], [FINAL]))
    refuses(name, lambda case, senders, receivers: fn(case.model, *texts(case), senders, receivers, case.metric))


def texts(case: Case) -> tuple[Tensor, Tensor]:
    return case.tokens, case.source_tokens


def assert_path(
    name: str, fn: Fn, case: Case, senders: list[Head], receivers: list[Receiver], freeze_mlps: bool
) -> None:
    """One set of paths."""
    words = f"from {senders} to {', '.join(map(str, receivers))} with freeze_mlps={freeze_mlps}"
    with (
        leaves_no_trace(name, case, case.cache()),
        unchanged(name, corrupted=case.source_tokens),
        untouched(name, senders=senders, receivers=receivers),
        during(words),
    ):
        actual = fn(case.model, *texts(case), senders, receivers, case.metric, freeze_mlps=freeze_mlps)
    score = partial(path_scores, case, senders, receivers, freeze_mlps)
    right = worked_out(words, case, lambda case: path_scores(case, senders, receivers, freeze_mlps))
    mistakes: Wrong = {
        "nothing is sent: it is the clean run's metric.": lambda: case.scores({}),
        "clean and corrupted are swapped.": lambda: score(fix={"backwards": True}, tokens=case.source_tokens),
        "it is the whole effect of the senders, by every way: the heads in between are not held.": lambda: case.scores(
            {z(layer): [(slice(None), head) for at, head in senders if at == layer] for layer, _ in senders}
        ),
        "the heads in between are not held, so that news comes by way of them.": lambda: score(fix={"loose": True}),
        "the other heads are held at their corrupted values; hold the clean ones.": lambda: score(fix={"others": True}),
        "all heads of a sender's layer send.": lambda: score(fix={"whole_layers": True}),
        "only the last position is sent, or receives; take all of them.": lambda: score(pos=-1),
        "all heads of a receiver's layer receive.": lambda: score(all_heads=True),
        "everything is held in the last run too, so the receivers can do nothing.": lambda: score(
            still=fix(case, senders, freeze_mlps)
        ),
        "it is the mean over the prompts; give one number for each.": lambda: score().mean(),
        **other_inputs(receivers, lambda others: path_scores(case, senders, others, freeze_mlps)),
    }
    if not case.model.cfg.attn_only:
        said = "frozen, and should not be" if not freeze_mlps else "not frozen, and should be"
        mistakes[f"the MLPs are {said}."] = lambda: path_scores(case, senders, receivers, not freeze_mlps)
    compare(f"{name} {words} {case.words}", actual, right, "batch", mistakes)
    no_graph(name, actual)


def assert_default(name: str, fn: Fn, path: tuple[list[Head], list[Receiver]]) -> None:
    """The MLPs are frozen unless somebody says otherwise."""
    case = case_of(*SIZES[0])
    case.asking = name
    right = path_scores(case, *path)
    mistakes = {
        "the MLPs are not frozen unless asked for; freeze_mlps=True is the default.": path_scores(case, *path, False)
    }
    compare(f"{name} without freeze_mlps", fn(case.model, *texts(case), *path, case.metric), right, "batch", mistakes)


def refuses(name: str, run: Callable[[Case, list[Head], list[Receiver]], Any]) -> None:
    """What does not exist is refused before anything runs."""
    case = case_of(*SIZES[0])
    bad: list[tuple[list[Head], list[Receiver]]] = [
        ([(0, 0)], [("blocks.1.attn.hook_z", 0)]),
        ([(0, 0)], [Q, ("blocks.3.attn.hook_q", 0)]),
        ([(0, 0)], [("blocks.1.attn.hook_k", 2)]),
        ([(0, 0)], [("final", 1)]),
    ]
    if name == "path_patch":
        bad += [([(3, 0)], [FINAL]), ([(0, 0), (1, 2)], [FINAL]), ([(-1, 0)], [FINAL])]
    for senders, receivers in bad:
        case.model.runs = 0
        call = f"senders={senders}, receivers={receivers}"
        must_raise(name, ValueError, call, partial(run, case, senders, receivers))
        if case.model.runs:
            raise CheckFailed(
                f"{name}: with {call} it ran the model before it raised ValueError.\n"
                "  Next: look at senders and receivers first."
            )


def check_path_patch_heads(fn: Fn) -> None:
    """Every head as a sender; few and many rows in a forward; MLPs frozen or not."""
    name = "path_patch_heads"
    first, second = (case_of(*sizes) for sizes in SIZES)
    assert_table(name, fn, first, [V, K], True, 64)
    assert_table(name, fn, first, [FINAL], False, 2 * first.n_batch + 1)
    assert_table(name, fn, first, [Q], True, 1)  # not even room for the prompts
    assert_table(name, fn, second, [V, Q], True, 5 * second.n_batch)
    refuses(name, lambda case, senders, receivers: fn(case.model, *texts(case), receivers, case.metric))


def assert_table(name: str, fn: Fn, case: Case, receivers: list[Receiver], freeze_mlps: bool, max_rows: int) -> None:
    """One table of senders."""
    words = f"to {', '.join(map(str, receivers))} with freeze_mlps={freeze_mlps}, max_rows={max_rows}"
    heads = list(product(range(case.n_layers), range(case.n_heads)))
    shape = (case.n_layers, case.n_heads)

    def table(case: Case, groups: Sequence[list[Head]], frozen: bool = freeze_mlps, **wrong: Any) -> Tensor:
        scores = [path_scores(case, group, receivers, frozen, **wrong).mean() for group in groups]
        return torch.stack(scores).reshape(shape)

    alone = [[head] for head in heads]
    with (
        leaves_no_trace(name, case, case.cache()),
        unchanged(name, corrupted=case.source_tokens),
        during(words),
    ):
        actual = fn(case.model, *texts(case), receivers, case.metric, freeze_mlps=freeze_mlps, max_rows=max_rows)
    right = worked_out(words, case, lambda case: table(case, alone))
    per_run = max(1, max_rows // case.n_batch)
    chunks = [heads[start : start + per_run] for start in range(0, len(heads), per_run)]
    base = case.scores({}).mean()
    mistakes: Wrong = {
        "earlier senders are still sending: each entry has its own one only.": lambda: table(
            case, [heads[: i + 1] for i in range(len(heads))]
        ),
        "all senders of a forward send to every copy of the prompts.": lambda: table(
            case, [chunk for chunk in chunks for _ in chunk]
        ),
        "clean and corrupted are swapped.": lambda: table(
            case, alone, fix={"backwards": True}, tokens=case.source_tokens
        ),
        "the heads in between are not held, so that news comes by way of them.": lambda: table(
            case, alone, fix={"loose": True}
        ),
        "the metric is summed over the prompts; take its mean.": lambda: right * case.n_batch,
        "it is how much the metric changed; the statement asks for the metric itself.": lambda: right - base,
        "senders without a path have 0; they leave the metric at what it is without them.": lambda: torch.where(
            right == base, 0.0, right
        ),
        "layers and heads are mixed up: a transpose became a reshape.": lambda: right.T.reshape(shape),
        "nothing is sent: every entry is the clean run's.": lambda: base.expand(shape),
    }
    if not case.model.cfg.attn_only:
        said = "frozen, and should not be" if not freeze_mlps else "not frozen, and should be"
        mistakes[f"the MLPs are {said}."] = lambda: table(case, alone, not freeze_mlps)
    compare(f"{name} {words} {case.words}", actual, right, "layer head", mistakes)
    no_graph(name, actual)
    if case.model.most_rows > max(max_rows, case.n_batch):
        raise CheckFailed(
            f"{name} {words}: one forward had {case.model.most_rows} rows.\n"
            "  Next: cut the senders into groups whose copies of the prompts fit into max_rows."
        )
    enough = 2 * len(chunks) + 3  # both texts, two runs for a group, and one more to look at the run as it is
    if case.model.runs > enough:
        raise CheckFailed(
            f"{name} {words}: it took {case.model.runs} forwards for {len(heads)} senders; {enough - 1} are enough.\n"
            "  Next: run both texts once for all, and put as many senders into a forward as max_rows allows."
        )


# ------------------------------------------------------------------------------------------------------ what heads do


def check_attention_between(fn: Fn) -> None:
    """Places that differ from prompt to prompt; two sizes."""
    name, axes = "attention_between", "layer head batch"
    for n_layers, n_batch, n_heads, n_pos in [(2, 4, 3, 6), (3, 5, 2, 7)]:
        patterns = noise(n_layers, n_batch, n_heads, n_pos, n_pos, seed=n_pos, scale=2.0).softmax(-1)
        cache = ActivationCache({f"blocks.{layer}.attn.hook_pattern": p for layer, p in enumerate(patterns)})
        rows = torch.arange(n_batch)
        queries, keys = n_pos - 2 + rows % 2, (rows * rows + 1) % (n_pos - 2)
        right = attention_by_loop(patterns, queries, keys)
        mistakes: Wrong = {
            "query and key are swapped: a pattern is [batch head query key].": partial(
                attention_by_loop, patterns, keys, queries
            ),
            "every prompt is read at the first one's query.": partial(
                attention_by_loop, patterns, queries[:1].expand(n_batch), keys
            ),
            "every prompt is read at the first one's key.": partial(
                attention_by_loop, patterns, queries, keys[:1].expand(n_batch)
            ),
            "it looks from the last position; each prompt has a query of its own.": partial(
                attention_by_loop, patterns, torch.full_like(queries, n_pos - 1), keys
            ),
            "it is the mean over the prompts; give one number for each.": partial(torch.mean, right, -1),
            "the layers are in reverse order.": partial(torch.flip, right, (0,)),
        }
        with unchanged(name, patterns=patterns, queries=queries, keys=keys):
            actual = fn(cache, queries, keys)
        compare(f"{name} in {n_layers} layers of {n_heads} heads", actual, right, axes, mistakes)
    follows_input(
        name,
        lambda moved: fn(ActivationCache({"blocks.0.attn.hook_pattern": moved}), queries, keys),
        (patterns[0],),
        axes,
    )


def attention_by_loop(patterns: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Visit every layer, head and prompt."""
    n_layers, n_batch, n_heads = patterns.shape[:3]
    out = patterns.new_empty(n_layers, n_heads, n_batch)
    for layer, head, row in product(range(n_layers), range(n_heads), range(n_batch)):
        out[layer, head, row] = patterns[layer, row, head, int(queries[row]), int(keys[row])]
    return out


def named_prompts(d_vocab: int, n_batch: int, n_pos: int) -> Any:
    """Tokens and places, as in an `IOIDataset`, at other positions in every prompt."""
    generator = torch.Generator().manual_seed(n_pos)
    rows = torch.arange(n_batch)
    tokens = torch.randint(d_vocab, (n_batch, n_pos), generator=generator)
    io, s1 = 1 + rows % 2, 2 - rows % 2
    places = {"IO": io, "S1": s1, "S1+1": s1 + 1, "S2": 3 + rows % 2, "END": torch.full((n_batch,), n_pos - 1)}
    return SimpleNamespace(tokens=tokens, positions=places)


def copied(
    model: SmallModel, dataset: Any, sign: int, k: int, at: Sequence[str] = ("IO", "S1"), **wrong: Any
) -> Tensor:
    """Visit every head, and count names; `wrong` holds switches for what people get wrong."""
    cfg, weights = model.cfg, weights_of(model)
    early = wrong.get("early", cfg.attn_only)
    with torch.no_grad():
        _, cache = run_with_cache(model, dataset.tokens)
    stream = cache["blocks.0.hook_resid_pre" if early else "blocks.0.hook_resid_post"]
    if wrong.get("embedding"):
        stream = cache["hook_embed"]
    scores = torch.zeros(cfg.n_layers, cfg.n_heads, dtype=stream.dtype)

    def norm(owner: str, vector: Tensor) -> Tensor:
        parts = {letter: weights[f"{owner}.{letter}"] for letter in "wb"}
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
    return 1 - scores if wrong.get("missed") else scores


def check_name_copying_scores(fn: Fn) -> None:
    """With MLPs and without; both signs, two values of k."""
    name, axes = "name_copying_scores", "layer head"
    for attn_only, sign, k in [(False, 1, 5), (True, 1, 3), (False, -1, 3), (True, -1, 5)]:
        sizes: dict[str, Any] = {"n_layers": 2, "n_heads": 3, "d_model": 8, "d_head": 4, "n_ctx": 7, "d_vocab": 13}
        model = SmallModel(TransformerConfig(**sizes, d_mlp=0 if attn_only else 6, attn_only=attn_only))
        dataset = named_prompts(13, 10, 6)
        words = f"with sign={sign}, k={k}, {'no MLPs' if attn_only else 'MLPs'}"
        weights = {key.replace(".", "_"): tensor for key, tensor in weights_of(model).items()}
        with unchanged(name, tokens=dataset.tokens, **weights), during(words):
            actual = fn(model, dataset, sign, k)
        score = partial(copied, model, dataset, sign, k)
        mistakes: Wrong = {
            "the stream is taken before the first layer's MLP, or after a layer that has none.": partial(
                score, early=not attn_only
            ),
            "the stream is that of the head's own layer; take the early one.": partial(score, at_own_layer=True),
            "it is the token's embedding alone, without the position.": partial(score, embedding=True),
            "the head's `ln1` is left out.": partial(score, without=("blocks.0.ln1", "blocks.1.ln1")),
            "every head reads through the first layer's `ln1`; take its own.": partial(score, ln1=0),
            "`b_V` is left out.": partial(score, no_b_V=True),
            "`ln_final` is left out.": partial(score, without=("ln_final",)),
            "the unembedding's `b_U` is left out.": partial(score, no_b_U=True),
            "`sign` is the wrong way round, or ignored.": partial(copied, model, dataset, -sign, k),
            "`k` is ignored: it is the first only.": partial(copied, model, dataset, sign, 1),
            "`k` is off by one.": partial(copied, model, dataset, sign, k + 1),
            "S2 is taken for S1.": partial(score, ("IO", "S2")),
            "only IO counts; S1 is a name as well.": partial(score, ("IO",)),
            "only S1 counts; IO is a name as well.": partial(score, ("S1",)),
            "it is the share of names that are not copied.": partial(score, missed=True),
        }
        compare(f"{name} {words}", actual, score(), axes, mistakes)
        no_graph(name, actual)
    compare(f"{name} as called by default", fn(model, dataset), copied(model, dataset, 1, 5), axes)
    double = model.double()
    with during("in float64"):
        actual = fn(double, dataset, 1, 3)
    compare(f"{name} in float64", actual, copied(double, dataset, 1, 3), axes)


def check_signal_effects(fn: Fn) -> None:
    """Two models; prompts whose labels change with the corruption."""
    assert_signals(fn, case_of(*SIZES[0]), [(0, 1), (1, 0)], [V, Q])
    assert_signals(fn, case_of(*SIZES[1]), [(1, 3)], [FINAL])


def assert_signals(fn: Fn, case: Case, senders: list[Head], receivers: list[Receiver]) -> None:
    """One model."""
    name = "signal_effects"
    rows = torch.arange(case.n_batch, device=case.tokens.device)
    dataset = Prompts(case.tokens, (3 * rows + 2) % 11, (2 * rows + 5) % 11)
    words = f"from {senders} to {', '.join(map(str, receivers))} {case.words}"
    with (
        leaves_no_trace(name, case, case.cache()),
        untouched(name, senders=senders, receivers=receivers),
        during(words),
    ):
        actual = fn(case.model, dataset, senders, receivers)
    names, order, both = ("names",), ("order",), ("names", "order")
    if not isinstance(actual, dict) or set(actual) != {"token", "position", "both"}:
        got = sorted(map(str, actual)) if isinstance(actual, dict) else type(actual).__name__
        raise CheckFailed(
            f'{name}: expected a dictionary with "token", "position" and "both", got {got}.\n'
            "  Next: one entry for each of the three signals."
        )
    expected = partial(signals, case, dataset, senders, receivers)
    right = worked_out(words, case, lambda case: expected(names, order, both))
    base = signal_metric(dataset, case.logits({}))
    wrong: dict[str, Callable[[], dict[str, Tensor]]] = {
        "token and position are swapped: exchanging names changes the token.": partial(expected, order, names, both),
        '"both" exchanges the names only.': partial(expected, names, order, names),
        '"both" exchanges the order only.': partial(expected, names, order, order),
        '"both" is the sum of the other two; it is a run of its own.': lambda: (
            right | {"both": right["token"] + right["position"]}
        ),
        "the labels are those of the flipped prompts; always take the dataset's own.": partial(
            expected, names, order, both, own_labels=False
        ),
        "the sign is wrong: it is the difference after, minus that before.": lambda: {s: -right[s] for s in right},
        "it is the logit difference itself; give how much it changes.": lambda: {s: right[s] + base for s in right},
        "it is the whole effect of the senders, by every way; take the paths to the receivers.": partial(
            expected, names, order, both, whole=True
        ),
        "it is the mean over the prompts; give one number for each.": lambda: {s: right[s].mean() for s in right},
    }
    for signal in right:
        mistakes: Wrong = {
            hint: partial(lambda signal, answers: answers()[signal], signal, answers) for hint, answers in wrong.items()
        }
        compare(f'{name}, "{signal}", {words}', actual[signal], right[signal], "batch", mistakes)
        no_graph(name, actual[signal])


def signal_metric(dataset: Prompts, logits: Tensor) -> Tensor:
    rows = torch.arange(len(logits))
    last = logits[rows, dataset.positions["END"]]
    return last[rows, dataset.io] - last[rows, dataset.s]


def signals(
    case: Case,
    dataset: Prompts,
    senders: Sequence[Head],
    receivers: Sequence[Receiver],
    *kinds: tuple[str, ...],
    own_labels: bool = True,
    whole: bool = False,
) -> dict[str, Tensor]:
    """For each signal a run with news from prompts that were flipped in its way, minus the run as it is."""
    effects, kept = {}, case.source
    for signal, turns in zip(("token", "position", "both"), kinds, strict=True):
        other = dataset
        for kind in turns:
            other = other.flipped(kind)
        labels = dataset if own_labels else other
        case.source = case.model.seen(other.tokens)
        try:
            fixed = fix(case, senders, True)
            edits = {z(layer): [(slice(None), head) for at, head in senders if at == layer] for layer, _ in senders}
            logits = case.logits(edits) if whole else over_paths(case, fixed, receivers)
        finally:
            case.source = kept
        effects[signal] = signal_metric(labels, logits) - signal_metric(labels, case.logits({}))
    return effects


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
    expected = worked_roles(tables, rules)
    call = call_of(name, {key: value.tolist() for key, value in tables.items()}, rules)
    with unchanged(name, **tables), untouched(name, rules=rules):
        actual = fn(tables, rules)
    agree(
        name,
        call,
        actual,
        expected,
        {
            "a value at the threshold does not count; it does.": lambda: worked_roles(tables, rules, strict=True),
            "one condition is enough; all of them must be met.": lambda: worked_roles(tables, rules, enough=any),
            "a negative condition is met by values above it; it is met by those at or below it.": lambda: worked_roles(
                tables, rules, negative=False
            ),
            "sizes count without their signs.": lambda: worked_roles(tables, rules, size=True),
            "roles that nobody has are left out; absent is a finding.": lambda: {
                k: v for k, v in expected.items() if v
            },
            "the heads stand in the model's order, not the strongest first.": lambda: {
                role: sorted(heads) for role, heads in expected.items()
            },
            "the heads come with the largest value first; it is the largest absolute value.": lambda: {
                role: strongest(heads, -tables[next(iter(rules[role]))]) for role, heads in expected.items()
            },
            "a head is (layer, head), not (head, layer).": lambda: {
                role: [(head, layer) for layer, head in heads] for role, heads in expected.items()
            },
        },
    )
    kinds = {type(number).__name__ for heads in actual.values() for at in heads for number in at}
    if kinds != {"int"}:
        raise CheckFailed(
            f"{name}: a head is a pair of ints, but there are some of type {', '.join(sorted(kinds - {'int'}))}.\n"
            "  Next: `.tolist()` makes numbers of a tensor's entries."
        )
    must_raise(
        name, ValueError, 'a rule about "weight", which is in no table,', partial(fn, tables, {"x": {"weight": 0.5}})
    )


def worked_roles(
    tables: dict[str, Tensor],
    rules: dict[str, dict[str, float]],
    strict: bool = False,
    enough: Callable[[Any], bool] = all,
    negative: bool = True,
    size: bool = False,
) -> dict[str, list[Head]]:
    """Ask every head about every condition."""

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
        roles[role] = strongest(heads, -first.abs())
    return roles


def strongest(heads: list[Head], order: Tensor) -> list[Head]:
    """Sorted, the smallest value of `order` first."""
    return sorted(heads, key=lambda at: order[at].item())
