"""Checks of chapter 05, path patching and what heads do, on small models whose paths are worked out by hand."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch05.case import Case, case_of, compare, leaves_no_trace, worked_out
from course_utils.checks.ch05.circuit import every_head
from course_utils.checks.ch05.patching import no_graph, patched
from course_utils.checks.ch05.path_loops import ALL, FINAL, Head, Receiver, fix, over_paths, path_scores, z
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import must_raise
from course_utils.checks.translating import during

Fn = Callable[..., Any]
SIZES = [(3, 2, 4, 5), (3, 4, 2, 5, True, True)]  # layers, heads, batch, pos; the second without MLPs, in float64
Q, K, V = ("blocks.2.attn.hook_q", 1), ("blocks.1.attn.hook_k", 1), ("blocks.2.attn.hook_v", 0)


BOTH: list[Receiver] = [("blocks.2.attn.hook_v", head) for head in (1, 0)]


def other_inputs(to: Callable[[Callable[..., Any]], Fn]) -> dict[str, Fn]:
    """Mistakes in which the information arrives at another input; `to` makes an answer whose receivers are changed."""

    def renamed(receivers: Sequence[Receiver], old: str, new: str) -> list[Receiver]:
        return [(name.replace(f"hook_{old}", f"hook_{new}"), head) for name, head in receivers]

    return {
        f"it arrives at the receivers' {new}, not at their {old}.": to(partial(renamed, old=old, new=new))
        for old, new in permutations("qkv", 2)
    }


# What a head's part of a q, k or v is taken for.
WHOLE_LAYER: dict[str, Any] = {"part": lambda head: (ALL,)}
LAST_POSITION: dict[str, Any] = {"part": lambda head: (-1,) if head is None else (-1, head)}
POSITION: dict[str, Any] = {"part": lambda head: (ALL,) if head is None else (head,)}


# ------------------------------------------------------------------------------------------------------ path patching


def running(receivers: Callable[[Any], Any] = lambda receivers: receivers, **wrong: Any) -> Fn:
    """A run_over_direct_paths to other receivers, or with a switch of `over_paths` turned."""
    return lambda model, tokens, fixed, to: over_paths(model, tokens, fixed, receivers(to), **wrong)


@known_mistakes(
    {
        "nothing is fixed in the first run, so the receivers get what they always get.": (
            lambda model, tokens, fixed, receivers: over_paths(model, tokens, {}, receivers)
        ),
        "the activations are still fixed in the second run, or there is none: the receivers do nothing.": running(
            held=True
        ),
        "all heads of a receiver's layer receive, not only the one named.": running(**WHOLE_LAYER),
        "only the last position receives; take all of them.": running(**LAST_POSITION),
        "a head's number is used as a position: a q is [batch pos head d_head].": running(**POSITION),
        "only the first receiver receives.": running(lambda receivers: receivers[:1]),
        "only the last receiver receives.": running(lambda receivers: receivers[-1:]),
        "only the last receiver of each hook point receives, as with a dict that has one hook for each.": running(
            lambda receivers: list(dict(receivers).items())
        ),
        "the final stream is what the last layer reads; take what it leaves, its resid_post.": running(
            final="hook_resid_pre"
        ),
    },
    other_inputs(running),
)
def check_run_over_direct_paths(fn: Fn) -> None:
    """Everything fixed, or one layer; one receiver, several (at one place, too), and the final stream."""
    name = "run_over_direct_paths"
    for sizes in SIZES:
        case = case_of(*sizes)
        everything = worked_out("fixed", case, lambda case: fix(case.model, *texts(case), [(0, 1), (1, 0)], True))
        one_layer = {z(0): everything[z(0)]}
        ends: list[list[Receiver]] = [[Q], [V, K], [V], [FINAL], [Q, FINAL], BOTH]
        for receivers in ends:
            fixed = one_layer if receivers == [V] else everything
            words = f"to {', '.join(map(str, receivers))}, {len(fixed)} places fixed,"
            with leaves_no_trace(name, case), during(words):
                actual = fn(case.model, case.tokens, fixed, receivers)
            right = worked_out(words, case, partial(over_paths_in, fixed=fixed, receivers=receivers))
            compare(f"{name} {words} {case.words}", actual, right, "batch pos d_vocab")
            no_graph(name, actual)


def over_paths_in(case: Case, fixed: dict[str, Tensor], receivers: list[Receiver]) -> Tensor:
    """The expected logits."""
    return over_paths(case.model, case.tokens, fixed, receivers)


def texts(case: Case) -> tuple[Tensor, Tensor]:
    return case.tokens, case.source_tokens


def path_patching(
    receivers: Callable[[Any], Any] = lambda receivers: receivers,
    senders: Callable[[Any], Any] = lambda senders: senders,
    freeze: Callable[[bool], bool] = lambda freeze_mlps: freeze_mlps,
    swapped: bool = False,
    then: Callable[[Tensor], Tensor] = lambda score: score,
    **wrong: Any,
) -> Fn:
    """A path_patch between other heads or texts, changed afterwards, or with a switch of `path_scores` turned."""

    def path_patch(
        model: Any, clean: Any, corrupted: Any, start: Any, end: Any, metric: Any, freeze_mlps: bool = True
    ) -> Any:
        runs = (corrupted, clean) if swapped else (clean, corrupted)
        return then(path_scores(model, *runs, senders(start), receivers(end), metric, freeze(freeze_mlps), **wrong))

    return path_patch


def by_every_way(model: Any, clean: Any, corrupted: Any, senders: Any, *rest: Any, freeze_mlps: bool = True) -> Any:
    """What the senders do, whoever passes it on."""
    metric = rest[1]
    return metric(patched(model, clean, model.seen(corrupted), [(z(layer), (ALL, head)) for layer, head in senders]))


@known_mistakes(
    {
        "nothing is sent: it is the clean run's metric.": path_patching(senders=lambda senders: []),
        "clean and corrupted are swapped.": path_patching(swapped=True),
        "it is the whole effect of the senders, by every path: the heads in between are not held.": by_every_way,
        "the heads in between are not held, so information passes through them.": path_patching(fixing={"loose": True}),
        "only the senders are fixed; hold all other heads and the MLPs at their clean values as well.": path_patching(
            fixing={"loose": True}, freeze=lambda freeze_mlps: False
        ),
        "the other heads are held at their corrupted values; hold the clean ones.": path_patching(
            fixing={"others": True}
        ),
        "all heads of a sender's layer send.": path_patching(fixing={"whole_layers": True}),
        "only the last position is sent, or receives; take all of them.": path_patching(**LAST_POSITION),
        "all heads of a receiver's layer receive.": path_patching(**WHOLE_LAYER),
        "everything is held in the last run too, so the receivers can do nothing.": path_patching(held=True),
        "it is the mean over the prompts; give one number for each.": path_patching(then=torch.mean),
        "the MLPs are not frozen, and should be.": path_patching(freeze=lambda freeze_mlps: False),
        "the MLPs are frozen, and should not be.": path_patching(freeze=lambda freeze_mlps: True),
        "the MLPs are not frozen by default; the default is freeze_mlps=True.": partial(path_scores, freeze_mlps=False),
    },
    other_inputs(path_patching),
)
def check_path_patch(fn: Fn) -> None:
    """Paths to q, k, v and the end, with MLPs frozen or not; senders that come too late; what is refused."""
    name = "path_patch"
    for sizes, scenes in zip(SIZES, (SCENES, SCENES[1:4:2]), strict=True):
        for senders, receivers, freeze_mlps in scenes:
            assert_path(name, fn, case_of(*sizes), senders, receivers, freeze_mlps)
    refuses(name, lambda case, senders, receivers: fn(case.model, *texts(case), senders, receivers, case.metric))


SCENES: list[tuple[list[Head], list[Receiver], bool | None]] = [  # freeze_mlps is None: it is not named
    ([(0, 1)], [Q], True),
    ([(0, 0), (1, 1)], [V, K], True),
    ([(0, 0)], [FINAL], False),
    ([(1, 1)], [FINAL], None),
    ([(0, 1), (0, 0)], BOTH, True),
    ([(2, 0), (1, 0)], [K], True),  # no path: they come too late
]


def assert_path(
    name: str, fn: Fn, case: Case, senders: list[Head], receivers: list[Receiver], freeze_mlps: bool | None
) -> None:
    """One set of paths."""
    option: dict[str, Any] = {} if freeze_mlps is None else {"freeze_mlps": freeze_mlps}
    words = f"from {senders} to {', '.join(map(str, receivers))} "
    words += f"with freeze_mlps={freeze_mlps}" if option else "without freeze_mlps"
    with leaves_no_trace(name, case), during(words):
        actual = fn(case.model, *texts(case), senders, receivers, case.metric, **option)
    right = worked_out(
        words,
        case,
        lambda case: path_scores(case.model, *texts(case), senders, receivers, case.metric, **option),
    )
    compare(f"{name} {words} {case.words}", actual, right, "batch")
    no_graph(name, actual)


def refuses(name: str, run: Callable[[Case, list[Head], list[Receiver]], Any]) -> None:
    """What does not exist is refused before anything runs."""
    case = case_of(*SIZES[0])
    bad: list[tuple[list[Head], list[Receiver]]] = [
        ([(0, 0)], [("blocks.1.attn.hook_z", 0)]),
        ([(0, 0)], [Q, ("blocks.3.attn.hook_q", 0)]),
        *(([(0, 0)], [("blocks.1.attn.hook_k", head)]) for head in (2, -1, None)),
        ([(0, 0)], [("final", 1)]),
    ]
    if name == "path_patch":
        bad += [([(3, 0)], [FINAL]), ([(0, 0), (1, 2)], [FINAL]), ([(-1, 0)], [FINAL])]
    looked_at = "senders" if name == "path_patch" else "[]"
    advice = f"call `refuse_unknown(model, {looked_at}, receivers)` first."
    for senders, receivers in bad:
        case.model.runs = 0
        call = f"senders={senders}, receivers={receivers}"
        must_raise(name, ValueError, call, partial(run, case, senders, receivers), advice)
        if case.model.runs:
            raise CheckFailed(f"{name}: with {call} it ran the model before it raised ValueError.\n  Next: {advice}")


def one_by_one(heads: list[Head], fit: int) -> list[list[Head]]:
    return [[head] for head in heads]


def sending(
    groups: Callable[[list[Head], int], list[list[Head]]] = one_by_one,
    then: Callable[[Tensor, Tensor], Tensor] = lambda table, base: table,
    reduce: Callable[[Tensor], Tensor] = torch.mean,
    **wrong: Any,
) -> Fn:
    """A path_patch_heads with other senders for each entry, or whose table was changed afterwards."""

    def path_patch_heads(
        model: Any,
        clean: Any,
        corrupted: Any,
        receivers: Any,
        metric: Any,
        freeze_mlps: bool = True,
        max_rows: int = 64,
    ) -> Any:
        run = path_patching(**wrong)
        heads = every_head(model)
        nobody, *scores = (
            run(model, clean, corrupted, senders, receivers, metric, freeze_mlps)
            for senders in [[], *groups(heads, max(1, max_rows // len(clean)))]
        )
        table = torch.stack([reduce(score) for score in scores]).reshape(len(model.blocks), -1)
        return then(table, nobody.mean())

    return path_patch_heads


def chunks(heads: list[Head], fit: int) -> list[list[Head]]:
    """The heads that have a copy in the same forward, forward by forward."""
    return [heads[start : start + fit] for start in range(0, len(heads), fit)]


def forwards(heads: list[Head], fit: int) -> list[list[Head]]:
    """For each head all that have a copy in the same forward."""
    return [chunk for chunk in chunks(heads, fit) for _ in chunk]


def all_so_far(heads: list[Head], fit: int) -> list[list[Head]]:
    return [heads[: i + 1] for i in range(len(heads))]


def all_so_far_if_alone(heads: list[Head], fit: int) -> list[list[Head]]:
    """A tensor repeated once may be the cache's own: what is written there stays."""
    return (all_so_far if fit == 1 else one_by_one)(heads, fit)


def interleaving(of_forward: Callable[[Callable[[Tensor, Head], Tensor], Tensor, list[Head]], Sequence[Tensor]]) -> Fn:
    """A path_patch_heads whose copies of a prompt stand in a row; `of_forward` makes the logits for some heads."""

    def path_patch_heads(
        model: Any,
        clean: Any,
        corrupted: Any,
        receivers: Any,
        metric: Any,
        freeze_mlps: bool = True,
        max_rows: int = 64,
    ) -> Tensor:
        def run(texts: Tensor, head: Head) -> Tensor:
            return over_paths(model, texts, fix(model, texts, corrupted, [head], freeze_mlps), receivers)

        groups = chunks(every_head(model), max(1, max_rows // len(clean)))
        values = [metric(logits).mean() for group in groups for logits in of_forward(run, clean, group)]
        return torch.stack(values).reshape(model.cfg.n_layers, -1)

    return path_patch_heads


def read_in_blocks(run: Callable[[Tensor, Head], Tensor], clean: Tensor, group: list[Head]) -> Sequence[Tensor]:
    """Each prompt is run with one sender after the other, and the logits are cut into blocks."""
    return torch.stack([run(clean, head) for head in group], 1).flatten(0, 1).split(len(clean))


def sent_to_blocks(run: Callable[[Tensor, Head], Tensor], clean: Tensor, group: list[Head]) -> Sequence[Tensor]:
    """Each sender writes to a block of rows, which hold the wrong prompts."""
    blocks = clean.repeat_interleave(len(group), 0).split(len(clean))
    return [run(block, head) for head, block in zip(group, blocks, strict=True)]


INTERLEAVED = "the copies are interleaved (each prompt several times in a row)"


@known_mistakes(
    {
        "earlier senders are still sending: each entry has only its own sender; clone before you write.": sending(
            all_so_far
        ),
        "earlier senders are still sending where a forward has one: its z is the cache's own; clone it.": sending(
            all_so_far_if_alone
        ),
        "all senders of a forward send to every copy of the prompts, as they do if one z stands for all.": sending(
            forwards
        ),
        f"{INTERLEAVED}, but the logits are read in blocks.": interleaving(read_in_blocks),
        f"{INTERLEAVED}, but senders write to blocks of rows.": interleaving(sent_to_blocks),
        "clean and corrupted are swapped.": sending(swapped=True),
        "the heads in between are not held, so information passes through them.": sending(fixing={"loose": True}),
        "the metric is summed over the prompts; take its mean.": sending(reduce=torch.sum),
        "it is how much the metric changed; the statement asks for the metric itself.": sending(
            then=lambda table, base: table - base
        ),
        "senders without a path get 0; their entry is the metric of the clean run.": sending(
            then=lambda table, base: torch.where(table == base, 0.0, table)
        ),
        "layers and heads are mixed up: a transpose became a reshape.": sending(
            then=lambda table, base: table.T.reshape(table.shape)
        ),
        "nothing is sent: every entry is the clean run's.": sending(then=lambda table, base: base.expand_as(table)),
        "the MLPs are not frozen, and should be.": sending(freeze=lambda freeze_mlps: False),
        "the MLPs are frozen, and should not be.": sending(freeze=lambda freeze_mlps: True),
    }
)
def check_path_patch_heads(fn: Fn) -> None:
    """Every head as a sender; few and many rows in a forward; MLPs frozen or not."""
    name = "path_patch_heads"
    first, second = (case_of(*sizes) for sizes in SIZES)
    assert_table(name, fn, first, [V, K], True, 64, by_default=True)
    assert_table(name, fn, first, [FINAL], False, 2 * first.n_batch + 1)
    assert_table(name, fn, first, [Q], True, 1)  # not even room for the prompts
    assert_table(name, fn, second, [*BOTH, Q], True, 5 * second.n_batch)
    refuses(name, lambda case, senders, receivers: fn(case.model, *texts(case), receivers, case.metric))


def assert_table(
    name: str,
    fn: Fn,
    case: Case,
    receivers: list[Receiver],
    freeze_mlps: bool,
    max_rows: int,
    by_default: bool = False,
) -> None:
    """One table of senders; with `by_default` the options are what they are when nobody names them."""
    words = f"to {', '.join(map(str, receivers))} with freeze_mlps={freeze_mlps}, max_rows={max_rows}"
    options: dict[str, Any] = {} if by_default else {"freeze_mlps": freeze_mlps, "max_rows": max_rows}
    if by_default:
        words += " (the defaults)"
    with leaves_no_trace(name, case), during(words):
        actual = fn(case.model, *texts(case), receivers, case.metric, **options)
    right = worked_out(
        words, case, lambda case: sending()(case.model, *texts(case), receivers, case.metric, freeze_mlps)
    )
    compare(f"{name} {words} {case.words}", actual, right, "layer head")
    no_graph(name, actual)
    if case.model.most_rows > max(max_rows, case.n_batch):
        raise CheckFailed(
            f"{name} {words}: one forward had {case.model.most_rows} rows.\n"
            "  Next: cut the senders into groups whose copies of the prompts fit into max_rows."
        )
    n_senders, per_run = case.n_layers * case.n_heads, max(1, max_rows // case.n_batch)
    enough = 2 * -(-n_senders // per_run) + 3  # both texts, two runs for a group, and one more to look at the run as is
    if case.model.runs > enough:
        raise CheckFailed(
            f"{name} {words}: it took {case.model.runs} forwards for {n_senders} senders; {enough - 1} are enough.\n"
            "  Next: run both texts once for all, and put as many senders into a forward as max_rows allows: "
            "`torch.cat([clean] * n)` has a copy of the prompts for each of n senders."
        )
