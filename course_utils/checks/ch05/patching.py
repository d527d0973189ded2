"""Checks of chapter 05, activation patching, on a toy transformer whose patches are known."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch05.case import DEEP, ONE, Case, case_of, compare, leaves_no_trace, worked_out
from course_utils.checks.ch05.task import depths
from course_utils.checks.mistakes import known_mistakes
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import must_raise
from course_utils.checks.translating import during
from course_utils.hooks import hook_points, hooks, run_with_cache, run_with_hooks

Fn = Callable[..., Any]
Patch = tuple[str, tuple[Any, ...]]
ALL = slice(None)
SIZES = [(2, 3, 4, 5), (3, 2, 5, 4, True, True)]  # layers, heads, batch, pos; the second without MLPs, in float64


def no_graph(name: str, actual: object) -> None:
    """Sweeps run a model many times: with a graph for each the memory would fill up."""
    if isinstance(actual, Tensor) and actual.requires_grad:
        raise CheckFailed(f"{name}: gradients are recorded.\n  Next: run the model under `torch.no_grad()`.")


# -------------------------------------------------------------------------------------------- patches as people do them


def put(activation: Tensor, source: Tensor, index: tuple[Any, ...]) -> Tensor:
    """The activation with one part taken from the source."""
    out, place = activation.clone(), (ALL, *index)
    out[place] = source[place]
    return out


def patched(
    model: Any, tokens: Tensor, source_cache: Any, patches: Sequence[Patch], put: Callable[..., Tensor] = put
) -> Tensor:
    """The logits with these patches; what a model does not have is passed by."""

    def at(index: tuple[Any, ...]) -> Callable[..., Tensor]:
        return lambda activation, hook: put(activation, source_cache[hook.name], index)

    points = hook_points(model)
    with torch.no_grad():
        return run_with_hooks(model, tokens, hooks=[(name, at(index)) for name, index in patches if name in points])


def patching(put: Callable[..., Tensor] = put, index: Callable[[Any], Any] = lambda index: index) -> Fn:
    """A run_patched in which something else is put there, or elsewhere."""
    return lambda model, tokens, cache, name, place: patched(model, tokens, cache, [(name, index(place))], put)


def source_tokens(model: Any, source_cache: Any) -> Tensor:
    """The source's text, told from its embeddings."""
    return (source_cache["hook_embed"][:, :, None] - model.embed.W_E).abs().sum(-1).argmin(-1)


def other_way(answer: Fn) -> Fn:
    """The answer with clean and corrupted swapped: on the source's text, patched from the other run."""

    def swapped(model: Any, tokens: Any, source_cache: Any, *rest: Any) -> Any:
        with torch.no_grad():
            _, own = run_with_cache(model, tokens)
        return answer(model, source_tokens(model, source_cache), own, *rest)

    return swapped


def nothing(activation: Tensor, source: Tensor, index: Any) -> Tensor:
    return activation


def everything(activation: Tensor, source: Tensor, index: Any) -> Tensor:
    return source.clone()


def of_first_prompt(activation: Tensor, source: Tensor, index: Any) -> Tensor:
    return put(activation, source[:1].expand_as(source), index)


def without_batch_axis(activation: Tensor, source: Tensor, index: Any) -> Tensor:
    out = activation.clone()
    out[index] = source[index]
    return out


Runs = Callable[[Sequence[Patch]], Sequence[Sequence[Patch]]]


def alone(patches: Sequence[Patch]) -> list[list[Patch]]:
    """A run for each patch."""
    return [[patch] for patch in patches]


def each(change: Callable[[str, tuple[Any, ...]], tuple[str, Any]]) -> Runs:
    """A run for each patch, but for another one than was asked for."""
    return lambda patches: [[change(name, index)] for name, index in patches]


def tried(
    model: Any,
    tokens: Any,
    source_cache: Any,
    metric: Any,
    patches: Sequence[Patch],
    runs: Runs = alone,
    put: Callable[..., Tensor] = put,
    reduce: Callable[[Tensor], Tensor] = torch.mean,
) -> Tensor:
    """What the metric says of each run, one after the other."""
    scores = [metric(patched(model, tokens, source_cache, edits, put)) for edits in runs(patches)]
    return torch.stack([reduce(score) for score in scores])


Grid = Callable[..., tuple[list[Patch], tuple[int, ...]]]  # (cfg, n_pos, which) -> the patches of a table, its shape
INPUTS = ("q", "k", "v", "pattern", "z")
# In models of which sizes each is tried: the five differ in one name, a pattern in its axes as well.
SIZES_OF_INPUTS = {"q": SIZES[:1], "k": SIZES[:1], "v": SIZES, "pattern": [*SIZES, ONE], "z": SIZES[:1]}


def sweep(grid: Grid, then: Callable[..., Tensor] = lambda table, base: table, **wrong: Any) -> Fn:
    """A sweep over a grid; `then` gets the table and the run's own score."""

    def table_of_patches(model: Any, tokens: Any, source_cache: Any, metric: Any, *which: str) -> Any:
        patches, shape = grid(model.cfg, tokens.shape[1], *which)
        table = tried(model, tokens, source_cache, metric, patches, **wrong).reshape(shape)
        return then(table, tried(model, tokens, source_cache, metric, [("nowhere", ())]))

    return table_of_patches


def sweep_mistakes(swept: Callable[..., Fn]) -> dict[str, Fn]:
    """What people get wrong in any sweep; `swept` makes one with a switch turned."""
    return {
        "nothing is patched: every entry is the run's own.": swept(put=nothing),
        "clean and corrupted are swapped: it runs on the source's text and patches from the other.": other_way(swept()),
        "everything is patched at once, not only the part that the entry is about.": swept(put=everything),
        "earlier patches are still there: each run has its own patch only.": swept(
            runs=lambda patches: [patches[: i + 1] for i in range(len(patches))]
        ),
        "the metric is summed over the prompts; take its mean.": swept(reduce=torch.sum),
        "it is the first prompt's metric; take the mean over all.": swept(reduce=lambda scores: scores[0]),
        "it is how much the patch changed the metric; the statement asks for the metric itself.": swept(
            then=lambda table, base: table - base
        ),
        "the first prompt's activation is patched into all prompts.": swept(put=of_first_prompt),
    }


def flipped(axis: int) -> Callable[..., Tensor]:
    return lambda table, base: table.flip(axis)


def one_on(table: Tensor, base: Tensor) -> Tensor:
    """Moved by one position."""
    return table.roll(1, -1)


def mixed_up(table: Tensor, base: Tensor) -> Tensor:
    """The last two axes exchanged, and then given their old sizes."""
    return table.mT.reshape(table.shape)


# ----------------------------------------------------------------------------------------------------------- one patch


def means(case: Case, patches: Sequence[Patch], shape: tuple[int, ...]) -> Tensor:
    """The definition: for each patch a run of its own, and the mean of the metric; worked out once for a case."""

    def work(case: Case) -> Tensor:
        return torch.stack([case.metric(case.logits(name, index)).mean() for name, index in patches])

    return worked_out(str(patches), case, work).reshape(shape)


@known_mistakes(
    {
        "nothing is patched.": patching(nothing),
        "clean and corrupted are swapped: it runs on the source's text.": other_way(patching()),
        "the whole activation is patched, not only the part that `index` names.": patching(everything),
        "`index` is off by one.": patching(
            index=lambda index: (index[0] - 1, *index[1:]) if isinstance(index[0], int) else index
        ),
        "`index` is taken for the prompt: the batch axis comes before it.": patching(without_batch_axis),
    }
)
def check_run_patched(fn: Fn) -> None:
    """Streams, heads, and patterns, one patch each; then a layer whose number is how that of another begins."""
    name = "run_patched"
    for sizes in SIZES:
        case = case_of(*sizes)
        last = case.n_pos - 1
        for place, index in [
            ("blocks.1.hook_resid_pre", (2,)),
            ("blocks.0.attn.hook_z", (ALL, 1)),
            ("blocks.1.attn.hook_z", (last, 0)),
            ("blocks.1.attn.hook_pattern", (1,)),
            ("blocks.1.attn.hook_pattern", (1, last, slice(1, 3))),
            ("hook_embed", (ALL,)),
        ]:
            assert_one_patch(name, fn, case, place, index)
    assert_one_patch(name, fn, case_of(*DEEP), "blocks.1.attn.hook_z", (ALL, 0))
    assert_parameters_stay(name, fn, case_of(2, 3, 1, 5))


def assert_parameters_stay(name: str, fn: Fn, case: Case) -> None:
    """With one prompt `hook_pos_embed` sees `W_pos` itself; the guard refuses a hook that writes into it."""
    cache = dict(case.cache())
    cache["hook_pos_embed"] = cache["hook_pos_embed"] + 1.0
    try:
        with during("patching hook_pos_embed, (2,) with one prompt"):
            fn(case.model, case.tokens, cache, "hook_pos_embed", (2,))
    except CheckFailed as failed:
        if "pos_embed.W_pos` in place" not in str(failed):
            raise
        raise CheckFailed(
            f"{name}: your hook writes into the activation that it was given.\n"
            "  At hook_pos_embed, with one prompt, that is a parameter: it changed `model.pos_embed.W_pos` in place.\n"
            "  Next: begin the hook with `patched = activation.clone()`, write into `patched`, and return it."
        ) from None


def assert_one_patch(name: str, fn: Fn, case: Case, place: str, index: tuple[Any, ...]) -> None:
    """One patch: the logits, and that nothing else happens."""
    call = f"{place}, {index}".replace("slice(None, None, None)", "slice(None)")
    with leaves_no_trace(name, case), during(f"patching {call}"):
        actual = fn(case.model, case.tokens, case.cache(), place, index)
    right = worked_out(call, case, lambda case: case.logits(place, index))
    compare(f"{name}({call}) {case.words}", actual, right, "batch pos d_vocab")
    no_graph(name, actual)


# -------------------------------------------------------------------------------------------------------------- sweeps


def assert_sweep(name: str, fn: Fn, axes: str, grid: Grid, *which: str, deep: tuple[Any, ...] = DEEP) -> None:
    """A table of patches, in models of all sizes: values, and that nothing else happens."""
    words = "".join(f'with which="{value}" ' for value in which)
    for sizes in SIZES_OF_INPUTS[which[0]] if which else [*SIZES, ONE, deep]:
        case = case_of(*sizes)
        with leaves_no_trace(name, case), during(f"{words}{case.words}"):
            actual = fn(case.model, case.tokens, case.cache(), case.metric, *which)
        right = means(case, *grid(case.model.cfg, case.n_pos, *which))
        compare(f"{name} {words}{case.words}", actual, right, axes)
        no_graph(name, actual)


def streams(cfg: Any, n_pos: int, place: str = "resid_pre") -> tuple[list[Patch], tuple[int, ...]]:
    names = [f"blocks.{layer}.hook_{place}" for layer in range(cfg.n_layers)]
    names.append(f"blocks.{cfg.n_layers - 1}.hook_resid_post")
    return [(name, (pos,)) for name in names for pos in range(n_pos)], (cfg.n_layers + 1, n_pos)


def first_row_for_all(patches: Sequence[Patch]) -> list[list[Patch]]:
    return [[(patches[0][0], index)] for _, index in patches]


@known_mistakes(
    sweep_mistakes(partial(sweep, streams)),
    {
        "`resid_post` or `resid_mid` is patched (which comes to the same), not `resid_pre`.": sweep(
            partial(streams, place="resid_post")
        ),
        "every row is that of depth 0.": sweep(streams, runs=first_row_for_all),
        "the rows are in reverse order.": sweep(streams, flipped(0)),
        "the positions are off by one.": sweep(streams, one_on),
        "depth and position are mixed up: a transpose became a reshape.": sweep(streams, mixed_up),
    },
)
def check_patch_residual_stream(fn: Fn) -> None:
    """Every depth and position."""
    assert_sweep("patch_residual_stream", fn, "depth pos", streams, deep=(*DEEP, True))  # no MLPs: a shorter way


def outputs(cfg: Any, n_pos: int) -> tuple[list[Patch], tuple[int, ...]]:
    # in a model without MLPs a patch of nothing: a part of the source's text that is not there
    names = [
        "nowhere" if cfg.attn_only and place == "mlp_out" else f"blocks.{layer}.hook_{place}"
        for place in ("attn_out", "mlp_out")
        for layer in range(cfg.n_layers)
    ]
    patches: list[Patch] = [(name, (pos,)) for name in names for pos in range(n_pos)]
    return patches, (2, cfg.n_layers, n_pos)


def to_stream(name: str, index: Any) -> Patch:
    return name.replace("attn_out", "resid_pre").replace("mlp_out", "resid_mid"), index


def zeros_for_missing_mlps(model: Any, *arguments: Any) -> Tensor:
    table = sweep(outputs)(model, *arguments)
    if model.cfg.attn_only:
        table[1] = 0
    return table


@known_mistakes(
    sweep_mistakes(partial(sweep, outputs)),
    {
        "the streams are patched, not what the components write.": sweep(outputs, runs=each(to_stream)),
        "the positions are off by one.": sweep(outputs, one_on),
        "the layers are in reverse order.": sweep(outputs, flipped(1)),
        "attention and MLPs are swapped: component 0 is attention.": sweep(outputs, flipped(0)),
        "a model without MLPs gets zeros; nothing exchanged is the run as it is.": zeros_for_missing_mlps,
    },
)
def check_patch_components(fn: Fn) -> None:
    """Attention and MLP at every layer and position; and a model without MLPs."""
    assert_sweep("patch_components", fn, "component layer pos", outputs, deep=(*DEEP, True))  # no MLPs: half the runs


def heads(cfg: Any, n_pos: int, place: str = "z") -> tuple[list[Patch], tuple[int, ...]]:
    patches: list[Patch] = [
        (f"blocks.{layer}.attn.hook_{place}", (head,) if place == "pattern" else (ALL, head))
        for layer in range(cfg.n_layers)
        for head in range(cfg.n_heads)
    ]
    return patches, (cfg.n_layers, cfg.n_heads)


def number_as_position(name: str, index: Any) -> Patch:
    return name, index[-1:]


def at_last_position(name: str, index: Any) -> Patch:
    return name, (-1, index[-1])


def in_first_layer(name: str, index: Any) -> Patch:
    return ".".join(["blocks", "0", *name.split(".")[2:]]), index


HEAD_MISTAKES: dict[str, Fn] = {
    "layers and heads are mixed up: a transpose became a reshape.": sweep(heads, mixed_up),
    "the layers are in reverse order.": sweep(heads, flipped(0)),
    "every layer has the numbers of the first.": sweep(heads, runs=each(in_first_layer)),
    "position and head are mixed up: a head's number is used as a position.": sweep(
        heads, runs=each(number_as_position)
    ),
    "only the last position is patched; take all of them.": sweep(heads, runs=each(at_last_position)),
}


@known_mistakes(
    sweep_mistakes(partial(sweep, heads)),
    HEAD_MISTAKES,
    {
        f"hook_{place} is patched; the statement asks for z.": sweep(partial(heads, place=place))
        for place in ("v", "q", "pattern")
    },
)
def check_patch_heads(fn: Fn) -> None:
    """Every head."""
    assert_sweep("patch_heads", fn, "layer head", heads)


def places(cfg: Any, n_pos: int) -> tuple[list[Patch], tuple[int, ...]]:
    patches: list[Patch] = [
        (f"blocks.{layer}.attn.hook_z", (pos, head))
        for layer in range(cfg.n_layers)
        for head in range(cfg.n_heads)
        for pos in range(n_pos)
    ]
    return patches, (cfg.n_layers, cfg.n_heads, n_pos)


@known_mistakes(
    sweep_mistakes(partial(sweep, places)),
    {
        "all positions are patched at once.": sweep(places, runs=each(lambda name, index: (name, (ALL, index[1])))),
        "all heads of a layer are patched at once.": sweep(places, runs=each(lambda name, index: (name, index[:1]))),
        "heads and positions are mixed up: a transpose became a reshape.": sweep(places, mixed_up),
        "the positions are off by one.": sweep(places, one_on),
        "the layers are in reverse order.": sweep(places, flipped(0)),
    },
)
def check_patch_heads_by_position(fn: Fn) -> None:
    """Every head at every position."""
    assert_sweep("patch_heads_by_position", fn, "layer head pos", places)


def instead(asked: str, other: str) -> Fn:
    """A patch_head_inputs that takes one of the five for another."""

    def patch_head_inputs(model: Any, tokens: Any, source_cache: Any, metric: Any, which: str) -> Any:
        patches, shape = heads(model.cfg, tokens.shape[1], other if which == asked else which)
        return batched()(model, tokens, source_cache, metric, patches).reshape(shape)

    return patch_head_inputs


def with_patterns_transposed(model: Any, tokens: Any, source_cache: Any, metric: Any, which: str) -> Tensor:
    turned = {name: value.mT if "pattern" in name else value for name, value in source_cache.items()}
    return sweep(heads)(model, tokens, turned, metric, which)


def on_the_positions_axis(name: str, index: Any) -> Patch:
    return name, (ALL, index[-1]) if "pattern" in name else index


@known_mistakes(
    sweep_mistakes(partial(sweep, heads)),
    HEAD_MISTAKES,
    {
        "the head is looked for on the wrong axis: a pattern is [batch head query key].": sweep(
            heads, runs=each(on_the_positions_axis)
        ),
        "the pattern is transposed: queries and keys are swapped.": with_patterns_transposed,
    },
    {
        f'it patches "{other}" where `which` is "{asked}".': instead(asked, other)
        for asked, other in permutations(INPUTS, 2)
    },
)
def check_patch_head_inputs(fn: Fn) -> None:
    """Each of the five, and a sixth that there is not."""
    name = "patch_head_inputs"
    for which in INPUTS:
        assert_sweep(name, fn, "layer head", heads, which)
    case = case_of(*SIZES[1])
    for wrong in ("x", "attn_scores"):
        run = partial(fn, case.model, case.tokens, case.cache(), case.metric, wrong)
        must_raise(name, ValueError, f'which="{wrong}"', run)


def going_on(
    blocks: Callable[[list[Any], int], list[Any]] = lambda blocks, layer: blocks[layer:],
    norm: Callable[[Any, Tensor], Tensor] = lambda norm, resid: norm(resid),
) -> Fn:
    """A run_from through other blocks, or with another end."""

    def run_from(model: Any, resid: Any, layer: int) -> Any:
        for block in blocks(list(model.blocks), layer):
            resid = block(resid)
        return model.unembed(norm(model.ln_final, resid))

    return run_from


@known_mistakes(
    {
        "the final LayerNorm is left out.": going_on(norm=lambda norm, resid: resid),
        "all layers are run: those before `layer` are in `resid` already.": going_on(lambda blocks, layer: blocks),
        "all layers are run where `layer` is n_layers: there is none left to run.": going_on(
            lambda blocks, layer: blocks[layer - len(blocks) :]
        ),
        "the layer itself is left out: `resid` is the stream *before* it.": going_on(
            lambda blocks, layer: blocks[layer + 1 :]
        ),
        "only that one layer is run, not those after it.": going_on(lambda blocks, layer: blocks[layer : layer + 1]),
        "the layers are run in reverse order.": going_on(lambda blocks, layer: blocks[layer:][::-1]),
    }
)
def check_run_from(fn: Fn) -> None:
    """From every depth, or the last four where there are many."""
    name = "run_from"
    for sizes in [*SIZES, ONE, DEEP]:
        case = case_of(*sizes)
        right = case.model.compute(case.source_tokens, lambda place, activation: activation)
        for layer, stream in list(enumerate(depths(case.cache())))[-4:]:
            with leaves_no_trace(name, case), torch.no_grad(), during(f"with layer={layer}"):
                actual = fn(case.model, stream, layer)
            compare(f"{name} with layer={layer} {case.words}", actual, right, "batch pos d_vocab")


MIXED: list[Patch] = [
    ("blocks.1.attn.hook_z", (ALL, 1)),
    ("blocks.1.hook_resid_pre", (2,)),
    ("blocks.0.attn.hook_pattern", (0,)),
    ("blocks.1.attn.hook_z", (1, 0)),
    ("ln_final.hook_scale", (2,)),
    ("blocks.0.hook_attn_out", (ALL,)),
    ("blocks.1.hook_resid_pre", (3,)),
    ("blocks.1.attn.hook_z", (ALL, 0)),
]
# not in the order of the layers' numbers, nor in that of their first digits
FAR_APART: list[Patch] = [(f"blocks.{layer}.hook_attn_out", (0,)) for layer in (10, 2, 1, 9)]
WITH_EMBEDDINGS: list[Patch] = [MIXED[1], ("hook_embed", (1,)), MIXED[4], ("hook_embed", (ALL,)), MIXED[2]]


def batched(**wrong: Any) -> Fn:
    """A batched_sweep as frugal as the check asks for, with switches for what people get wrong.

    `wrong` may hold: `sort`, what the patches are sorted by; `as_sorted`, the answers stay in that order; `together`,
    each patch acts on all copies; `layer`, where a run with a patch starts; `of_group`, which of these a group takes;
    `streams`, of which run; `repeat`, how the prompts are copied; `hooked`, whose hook points get a hook.
    """

    def batched_sweep(model: Any, tokens: Any, source_cache: Any, metric: Any, patches: Any, max_rows: int = 64) -> Any:
        n_batch, n_layers = len(tokens), model.cfg.n_layers
        fit = max(1, max_rows // n_batch)
        repeat = wrong.get("repeat", lambda tensor, times: torch.cat([tensor] * times))
        with torch.no_grad():
            own = run_with_cache(model, tokens)[1]
        resid = depths(wrong.get("streams", lambda own, source: own)(own, source_cache))
        sort = wrong.get("sort", lambda name, number: first(name, n_layers))
        order = sorted(range(len(patches)), key=lambda number: sort(patches[number][0], number))
        values: list[Tensor] = []
        for start in range(0, len(order), fit):
            group = [patches[number] for number in order[start : start + fit]]

            def act(activation: Any, hook: Any, group: Any = group) -> Any:
                copies = list(activation.clone().split(n_batch))
                for number, (name, index) in enumerate(group):
                    for at in range(len(group)) if wrong.get("together") else [number]:
                        if name == hook.name:
                            copies[at] = put(copies[at], source_cache[name], index)
                return torch.cat(copies)

            layer = wrong.get("of_group", min)(wrong.get("layer", first)(name, n_layers) for name, _ in group)
            hooked = wrong.get("hooked", lambda group: group)(group)
            with torch.no_grad(), hooks(model, {name: act for name, _ in hooked}):
                if layer < 0:
                    logits = model(repeat(tokens, len(group)))
                else:
                    logits = going_on()(model, repeat(resid[layer], len(group)), layer)
            values += [metric(copy).mean() for copy in logits.split(n_batch)]
        return torch.stack(values if wrong.get("as_sorted") else [values[order.index(i)] for i in range(len(order))])

    return batched_sweep


def listed(then: Callable[..., Tensor] = lambda table, base: table, **wrong: Any) -> Fn:
    """A sweep over the patches of a list, one run after the other."""

    def batched_sweep(model: Any, tokens: Any, source_cache: Any, metric: Any, patches: Any, max_rows: int = 64) -> Any:
        grid = (list(patches), (len(patches),))
        return sweep(lambda cfg, n_pos: grid, then, **wrong)(model, tokens, source_cache, metric)

    return batched_sweep


ON_ALL = "each patch acts on all copies of the prompts, not only on its own"


@known_mistakes(
    {
        "the answers come in the order of the layers, not in that of the patches.": batched(as_sorted=True),
        "the answers come in the order of the hook points, not in that of the patches.": batched(
            sort=lambda name, number: name, as_sorted=True
        ),
        "the copies are interleaved (each prompt several times), but a patch acts on a block of rows.": batched(
            repeat=lambda tensor, times: tensor.repeat_interleave(times, 0)
        ),
        "a group starts at the layer of its last patch; it starts at its first one.": batched(of_group=max),
        "only the hook point of a group's first patch has a hook.": batched(hooked=lambda group: group[:1]),
        f"{ON_ALL}.": batched(together=True),
        f"{ON_ALL}; nor are the patches sorted.": batched(together=True, sort=lambda name, number: number),
    },
    sweep_mistakes(listed),
)
def check_batched_sweep(fn: Fn) -> None:
    """Patches of all kinds in no order, in few and in many forwards; then memory, forwards, and layers."""
    for sizes, limits in zip(SIZES, [(2, 9, 64), (11, 64)], strict=True):
        for max_rows in limits:  # the first has not even room for the prompts of one patch
            assert_batched(fn, case_of(*sizes), MIXED, max_rows)
    assert_batched(fn, case_of(*SIZES[0]), WITH_EMBEDDINGS, 9)
    assert_batched(fn, case_of(*SIZES[0]), MIXED * 3, None)
    assert_batched(fn, case_of(*ONE), MIXED[2:3], 2)
    assert_batched(fn, case_of(*DEEP), FAR_APART, 2)


def assert_batched(fn: Fn, case: Case, patches: list[Patch], limit: int | None) -> None:
    """One list of patches, cut into groups of so many rows; without a limit, of as many as by default."""
    max_rows = 64 if limit is None else limit
    name, n_batch, n_layers, n_patches = "batched_sweep", case.n_batch, case.n_layers, len(patches)
    per_run = max(1, max_rows // n_batch)
    label = f"{name} with max_rows={max_rows} {case.words}"
    with leaves_no_trace(name, case), during(f"with max_rows={max_rows}"):
        given = () if limit is None else (limit,)
        actual = fn(case.model, case.tokens, case.cache(), case.metric, patches, *given)
    right = means(case, patches, (n_patches,))
    firsts = [first(place, n_layers) for place, _ in patches]
    in_order = sorted(range(n_patches), key=firsts.__getitem__)
    starts = range(0, n_patches, per_run)
    compare(label, actual, right, "patch", rtol=1e-5, atol=1e-5)
    no_graph(name, actual)
    model = case.model
    if model.most_rows > max(max_rows, n_batch):
        raise CheckFailed(
            f"{label}: one forward had {model.most_rows} rows.\n"
            "  Next: cut the patches into groups whose copies of the prompts fit into max_rows."
        )
    enough = len(starts)  # and one without a patch, and a smaller group at the end of every layer
    if model.runs > enough + 1 + n_layers:
        raise CheckFailed(
            f"{label}: it took {model.runs} forwards for {n_patches} patches; "
            f"{enough} are enough, and one without a patch.\n"
            "  Next: put as many patches into a forward as max_rows allows."
        )
    rows = n_layers  # of the run without a patch, counted in batches
    for start in starts:
        group = in_order[start : start + per_run]
        rows += len(group) * min(n_layers, n_layers - firsts[group[0]])
    if model.rows > rows * n_batch and per_run < n_patches:
        raise CheckFailed(
            f"{label}: the values are right, but the prompts went {model.rows // n_batch} times through a layer; "
            f"{rows} times are enough.\n"
            "  Next: sort the patches by layer, and let each group start at its first one, from the stream of the run "
            "without a patch."
        )


def first(place: str, n_layers: int) -> int:
    """The layer in which this hook point stands; -1 ahead of all, n_layers behind."""
    owner, _, rest = place.partition(".")
    return {"hook_embed": -1, "ln_final": n_layers}[owner] if owner != "blocks" else int(rest.partition(".")[0])
