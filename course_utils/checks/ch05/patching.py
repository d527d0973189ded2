"""Checks of chapter 05, activation and attribution patching, on a toy transformer whose patches are known."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_utils.checks.ch05.case import Case, case_of, leaves_no_trace, worked_out
from course_utils.checks.comparing import compare
from course_utils.checks.outcomes import CheckFailed
from course_utils.checks.plain import must_raise
from course_utils.checks.translating import during

Fn = Callable[..., Any]
Patch = tuple[str, tuple[Any, ...]]
ALL = slice(None)
SIZES = [(2, 3, 4, 5), (3, 2, 5, 4, True, True)]  # layers, heads, batch, pos; the second without MLPs, in float64


def no_graph(name: str, actual: object) -> None:
    """Sweeps run a model many times: with a graph for each the memory would fill up."""
    if isinstance(actual, Tensor) and actual.requires_grad:
        raise CheckFailed(f"{name}: gradients are recorded.\n  Next: run the model under `torch.no_grad()`.")


def means(case: Case, patches: Sequence[Patch], shape: tuple[int, ...]) -> Tensor:
    """The definition: for each patch a run of its own, and the mean of the metric."""
    return torch.stack([case.scores({name: [index]}).mean() for name, index in patches]).reshape(shape)


def reshaped_means(case: Case, shape: tuple[int, ...], patches: list[Patch]) -> Tensor:
    """The same, with what is most often known first."""
    return means(case, patches, shape)


def known_means(case: Case, patches: Sequence[Patch], shape: tuple[int, ...]) -> Tensor:
    """The same, worked out once for a case."""
    return worked_out(str(patches), case.sizes, Work(lambda case: means(case, patches, shape))).clone()


Wrong = dict[str, Callable[[], Tensor]]


def sweep_mistakes(case: Case, patches: Sequence[Patch], shape: tuple[int, ...]) -> Wrong:
    """What common mistakes give, for any sweep; worked out only when an answer is wrong."""

    def each(score: Callable[[str, tuple[Any, ...]], Tensor]) -> Tensor:
        return torch.stack([score(name, index) for name, index in patches]).reshape(shape)

    def piled_up() -> Tensor:
        edits: dict[str, list[tuple[Any, ...]]] = {}
        values = []
        for name, index in patches:
            edits.setdefault(name, []).append(index)
            values.append(case.scores(edits).mean())
        return torch.stack(values).reshape(shape)

    def base() -> Tensor:
        return case.scores({}).mean()

    return {
        "nothing is patched: every entry is the run's own.": lambda: base().expand(shape),
        "clean and corrupted are swapped: it runs on the source's text and patches from the other.": lambda: each(
            lambda name, index: case.scores({name: [index]}, backwards=True).mean()
        ),
        "everything is patched at once, not only the part that the entry is about.": lambda: each(
            lambda name, index: case.scores({name: [(...,)]}).mean()
        ),
        "earlier patches are still there: each run has its own patch only.": piled_up,
        "the metric is summed over the prompts; take its mean.": lambda: means(case, patches, shape) * case.n_batch,
        "it is the first prompt's metric; take the mean over all.": lambda: each(
            lambda name, index: case.scores({name: [index]})[0]
        ),
        "it is how much the patch changed the metric; the statement asks for the metric itself.": lambda: (
            means(case, patches, shape) - base()
        ),
        "the first prompt's activation is patched into all prompts.": lambda: each(
            lambda name, index: first_into_all(case, name, index)
        ),
    }


def first_into_all(case: Case, name: str, index: tuple[Any, ...]) -> Tensor:
    """A patch whose values are those of the first prompt."""
    kept = case.source
    case.source = {key: value[:1].expand_as(value) for key, value in kept.items()}
    try:
        return case.scores({name: [index]}).mean()
    finally:
        case.source = kept


def assert_sweep(
    name: str,
    fn: Fn,
    axes: str,
    entries: Callable[[Case], tuple[list[Patch], tuple[int, ...]]],
    more: Callable[[Case, Callable[[list[Patch]], Tensor]], Wrong],
    arguments: tuple[Any, ...] = (),
    words: str = "",
) -> None:
    """A table of patches: values, and that nothing else happens."""
    for sizes in SIZES:
        case = case_of(*sizes)
        patches, shape = entries(case)
        label = f"{name} {words}{case.words}"
        source_cache = case.cache()
        with leaves_no_trace(name, case, source_cache), during(f"{words}{case.words}"):
            actual = fn(case.model, case.tokens, source_cache, case.metric, *arguments)
        right = known_means(case, patches, shape)
        mistakes = sweep_mistakes(case, patches, shape) | more(case, partial(reshaped_means, case, shape))
        compare(label, actual, right, axes, mistakes)
        no_graph(name, actual)


def renamed(patches: Sequence[Patch], old: str, new: str) -> list[Patch]:
    """The same patches at another hook point."""
    return [(name.replace(old, new), index) for name, index in patches]


def in_layers(patches: Sequence[Patch], order: Callable[[int], int]) -> list[Patch]:
    """The same patches in other layers."""
    moved = []
    for name, index in patches:
        blocks, layer, rest = name.split(".", 2)
        moved.append((f"{blocks}.{order(int(layer))}.{rest}", index))
    return moved


# ----------------------------------------------------------------------------------------------------------- one patch


def check_run_patched(fn: Fn) -> None:
    """Streams, heads, and patterns, one patch each."""
    name = "run_patched"
    for sizes in SIZES:
        case = case_of(*sizes)
        last = case.n_pos - 1
        patches: list[Patch] = [
            ("blocks.1.hook_resid_pre", (2,)),
            ("blocks.0.attn.hook_z", (ALL, 1)),
            ("blocks.1.attn.hook_z", (last, 0)),
            ("blocks.1.attn.hook_pattern", (1,)),
            ("hook_embed", (ALL,)),
        ]
        for place, index in patches:
            assert_one_patch(name, fn, case, place, index)


def assert_one_patch(name: str, fn: Fn, case: Case, place: str, index: tuple[Any, ...]) -> None:
    """One patch: the logits, and that nothing else happens."""
    axes = "batch pos d_vocab"
    call = f"{place}, {index}".replace("slice(None, None, None)", "slice(None)")
    source_cache = case.cache()
    with leaves_no_trace(name, case, source_cache), during(f"patching {call}"):
        actual = fn(case.model, case.tokens, source_cache, place, index)
    right = worked_out(call, case.sizes, Work(lambda case: case.logits({place: [index]})))
    mistakes: Wrong = {
        "nothing is patched.": lambda: case.logits({}),
        "clean and corrupted are swapped: it runs on the source's text.": (lambda: case.logits({place: [index]}, True)),
    }
    if index != (ALL,):
        mistakes["the whole activation is patched, not only the part that `index` names."] = lambda: case.logits(
            {place: [(...,)]}
        )
    if isinstance(index[0], int):
        mistakes["`index` is off by one."] = lambda: case.logits({place: [(index[0] - 1, *index[1:])]})
        mistakes["`index` is taken for the prompt: the batch axis comes before it."] = lambda: prompt_patched(
            case, place, index
        )
    compare(f"{name}({call})", actual, right, axes, mistakes)
    no_graph(name, actual)


def prompt_patched(case: Case, place: str, index: tuple[Any, ...]) -> Tensor:
    """What comes out where `activation[index]` is patched, without the batch axis in front."""

    def see(name: str, activation: Tensor) -> Tensor:
        if name == place:
            activation = activation.clone()
            if index[0] < len(activation):
                activation[index] = case.source[name][index]
        return activation

    with torch.no_grad():
        return case.model.compute(case.tokens, see)


# -------------------------------------------------------------------------------------------------------------- sweeps


def streams(case: Case) -> tuple[list[Patch], tuple[int, ...]]:
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(case.n_layers)]
    names.append(f"blocks.{case.n_layers - 1}.hook_resid_post")
    return [(name, (pos,)) for name in names for pos in range(case.n_pos)], (case.n_layers + 1, case.n_pos)


def check_patch_residual_stream(fn: Fn) -> None:
    """Every depth and position."""

    def more(case: Case, of: Callable[[list[Patch]], Tensor]) -> Wrong:
        n = case.n_layers
        posts = [("blocks.0.hook_resid_pre", (pos,)) for pos in range(case.n_pos)]
        shifted = [f"blocks.{min(depth, n - 1)}.hook_resid_post" for depth in range(n + 1)]
        mistakes: Wrong = {
            "`resid_post` or `resid_mid` is patched (which comes to the same), not `resid_pre`.": lambda: of(
                [(name, (pos,)) for name in shifted for pos in range(case.n_pos)]
            ),
            "every row is that of depth 0.": lambda: of(posts * (n + 1)),
            "the rows are in reverse order.": lambda: of(streams(case)[0]).flip(0),
            "the positions are off by one.": lambda: of(streams(case)[0]).roll(1, 1),
            "depth and position are mixed up: a transpose became a reshape.": lambda: of(streams(case)[0]).T.reshape(
                n + 1, case.n_pos
            ),
        }
        return mistakes

    assert_sweep("patch_residual_stream", fn, "depth pos", streams, more)


def outputs(case: Case) -> tuple[list[Patch], tuple[int, ...]]:
    # in a model without MLPs a patch of nothing: a part of the source's text that is not there
    n_components = 1 if case.model.cfg.attn_only else 2
    patches: list[Patch] = [
        (f"blocks.{layer}.hook_{place}", (pos,))
        for place in ("attn_out", "mlp_out")[:n_components]
        for layer in range(case.n_layers)
        for pos in range(case.n_pos)
    ]
    if n_components == 1:
        patches += [("nowhere", ())] * len(patches)
    return patches, (2, case.n_layers, case.n_pos)


def check_patch_components(fn: Fn) -> None:
    """Attention and MLP at every layer and position; and a model without MLPs."""

    def more(case: Case, of: Callable[[list[Patch]], Tensor]) -> Wrong:
        patches, _ = outputs(case)
        mistakes: Wrong = {
            "the streams are patched, not what the components write.": lambda: of(
                renamed(renamed(patches, "attn_out", "resid_pre"), "mlp_out", "resid_mid")
            ),
            "the positions are off by one.": lambda: of(patches).roll(1, 2),
            "the layers are in reverse order.": lambda: of(patches).flip(1),
        }
        if case.model.cfg.attn_only:
            mistakes["a model without MLPs gets zeros; nothing exchanged is the run as it is."] = lambda: torch.stack(
                [of(patches)[0], torch.zeros_like(of(patches)[0])]
            )
        else:
            mistakes["attention and MLPs are swapped: component 0 is attention."] = lambda: of(patches).flip(0)
        return mistakes

    assert_sweep("patch_components", fn, "component layer pos", outputs, more)


def heads(case: Case, place: str = "z") -> tuple[list[Patch], tuple[int, ...]]:
    patches: list[Patch] = [
        (f"blocks.{layer}.attn.hook_{place}", (head,) if place == "pattern" else (ALL, head))
        for layer in range(case.n_layers)
        for head in range(case.n_heads)
    ]
    return patches, (case.n_layers, case.n_heads)


def head_mistakes(case: Case, of: Callable[[list[Patch]], Tensor], place: str) -> Wrong:
    patches, shape = heads(case, place)
    positions = [(name, (index[-1],) if place != "pattern" else (ALL, index[-1])) for name, index in patches]
    mistakes: Wrong = {
        "layers and heads are mixed up: a transpose became a reshape.": lambda: of(patches).T.reshape(shape),
        "the layers are in reverse order.": lambda: of(patches).flip(0),
        "every layer has the numbers of the first.": lambda: of(in_layers(patches, lambda layer: 0)),
    }
    if place == "pattern":
        mistakes["the head is looked for on the wrong axis: a pattern is [batch head query key]."] = lambda: of(
            positions
        )
        mistakes["the pattern is transposed: queries and keys are swapped."] = lambda: transposed(case, patches, shape)
    else:
        mistakes["position and head are mixed up: a head's number is used as a position."] = lambda: of(positions)
        mistakes["only the last position is patched; take all of them."] = lambda: of(
            [(name, (-1, index[-1])) for name, index in patches]
        )
    return mistakes


def transposed(case: Case, patches: Sequence[Patch], shape: tuple[int, ...]) -> Tensor:
    """What comes out where the source's patterns are patched in with query and key exchanged."""
    kept = case.source
    case.source = {key: value.mT if "pattern" in key else value for key, value in kept.items()}
    try:
        return means(case, patches, shape)
    finally:
        case.source = kept


def patched_at(of: Callable[[list[Patch]], Tensor], case: Case, place: str) -> Tensor:
    """The table of heads with another of their activations patched."""
    return of(heads(case, place)[0])


def check_patch_heads(fn: Fn) -> None:
    """Every head."""

    def more(case: Case, of: Callable[[list[Patch]], Tensor]) -> Wrong:
        others: Wrong = {
            f"hook_{place} is patched; the statement asks for z.": partial(patched_at, of, case, place)
            for place in ("v", "q", "pattern")
        }
        return head_mistakes(case, of, "z") | others

    assert_sweep("patch_heads", fn, "layer head", heads, more)


def places(case: Case) -> tuple[list[Patch], tuple[int, ...]]:
    patches: list[Patch] = [
        (f"blocks.{layer}.attn.hook_z", (pos, head))
        for layer in range(case.n_layers)
        for head in range(case.n_heads)
        for pos in range(case.n_pos)
    ]
    return patches, (case.n_layers, case.n_heads, case.n_pos)


def check_patch_heads_by_position(fn: Fn) -> None:
    """Every head at every position."""

    def more(case: Case, of: Callable[[list[Patch]], Tensor]) -> Wrong:
        patches, shape = places(case)
        return {
            "all positions are patched at once.": lambda: of([(name, (ALL, index[1])) for name, index in patches]),
            "all heads of a layer are patched at once.": lambda: of([(name, (index[0],)) for name, index in patches]),
            "heads and positions are mixed up: a transpose became a reshape.": lambda: of(patches).mT.reshape(shape),
            "the positions are off by one.": lambda: of(patches).roll(1, 2),
            "the layers are in reverse order.": lambda: of(patches).flip(0),
        }

    assert_sweep("patch_heads_by_position", fn, "layer head pos", places, more)


def check_patch_head_inputs(fn: Fn) -> None:
    """Each of the five, and a sixth that there is not."""
    name = "patch_head_inputs"
    for which in ("q", "k", "v", "pattern", "z"):

        def more(case: Case, of: Callable[[list[Patch]], Tensor], which: str = which) -> Wrong:
            others: Wrong = {
                f'it patches "{place}" here.': partial(patched_at, of, case, place)
                for place in ("q", "k", "v", "pattern", "z")
                if place != which
            }
            return head_mistakes(case, of, which) | others

        def entries(case: Case, which: str = which) -> tuple[list[Patch], tuple[int, ...]]:
            return heads(case, which)

        assert_sweep(name, fn, "layer head", entries, more, (which,), f'with which="{which}" ')
    case = case_of(*SIZES[1])
    for wrong in ("x", "attn_scores"):
        must_raise(
            name,
            ValueError,
            f'which="{wrong}"',
            partial(fn, case.model, case.tokens, case.cache(), case.metric, wrong),
        )


def check_run_from(fn: Fn) -> None:
    """From every depth, with and without a patch further on."""
    name = "run_from"
    for sizes in SIZES:
        case = case_of(*sizes)
        last = f"blocks.{case.n_layers - 1}.hook_resid_post"
        streams = [case.source[f"blocks.{layer}.hook_resid_pre"] for layer in range(case.n_layers)] + [
            case.source[last]
        ]
        for layer, stream in enumerate(streams):
            resid, label = stream.clone(), f"{name} with layer={layer} {case.words}"
            with leaves_no_trace(name, case, case.cache()), torch.no_grad(), during(f"with layer={layer}"):
                actual = fn(case.model, resid, layer)
            if not torch.equal(resid, stream):
                raise CheckFailed(f"{label}: it changed `resid` in place.\n  Next: make a new tensor.")
            right = case.logits({}, backwards=True)
            compare(label, actual, right, "batch pos d_vocab", from_mistakes(case, stream, layer))


def from_mistakes(case: Case, stream: Tensor, layer: int) -> Wrong:
    """What common mistakes give from this stream on."""
    model = case.model

    def through(layers: Sequence[int], norm: bool = True) -> Tensor:
        with torch.no_grad():
            resid = stream
            for number in layers:
                resid = model.blocks[number].compute(resid, lambda place, activation: activation)
            return (model.ln_final(resid) if norm else resid) @ model.unembed.W_U + model.unembed.b_U

    rest = range(layer, case.n_layers)
    mistakes: Wrong = {"the final LayerNorm is left out.": lambda: through(rest, norm=False)}
    if layer > 0:
        mistakes["all layers are run: those before `layer` are in `resid` already."] = lambda: through(
            range(case.n_layers)
        )
    if layer < case.n_layers:
        mistakes["the layer itself is left out: `resid` is the stream *before* it."] = lambda: through(rest[1:])
    if len(rest) > 1:
        mistakes["only that one layer is run, not those after it."] = lambda: through(rest[:1])
        mistakes["the layers are run in reverse order."] = lambda: through(rest[::-1])
    return mistakes


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
WITH_EMBEDDINGS: list[Patch] = [MIXED[1], ("hook_embed", (1,)), MIXED[4], ("hook_embed", (ALL,)), MIXED[2]]


def check_batched_sweep(fn: Fn) -> None:
    """Patches of all kinds in no order, in few and in many forwards; then memory, forwards, and layers."""
    for sizes in SIZES:
        for max_rows in (2, 9, 64):  # the first has not even room for the prompts of one patch
            assert_batched(fn, case_of(*sizes), MIXED, max_rows)
    assert_batched(fn, case_of(*SIZES[0]), WITH_EMBEDDINGS, 9)


def assert_batched(fn: Fn, case: Case, patches: list[Patch], max_rows: int) -> None:
    """One list of patches, cut into groups of so many rows."""
    name, n_batch, n_layers, n_patches = "batched_sweep", case.n_batch, case.n_layers, len(patches)
    per_run = max(1, max_rows // n_batch)
    label = f"{name} with max_rows={max_rows} {case.words}"
    source_cache = case.cache()
    with leaves_no_trace(name, case, source_cache), during(f"with max_rows={max_rows}"):
        actual = fn(case.model, case.tokens, source_cache, case.metric, patches, max_rows)
    right = known_means(case, patches, (n_patches,))
    firsts = [first(place, n_layers) for place, _ in patches]
    in_order = sorted(range(n_patches), key=firsts.__getitem__)
    starts = range(0, n_patches, per_run)

    def together(order: Sequence[int]) -> Tensor:
        """Every patch of a group acts on all copies; the answers go where their patches stood."""
        values = torch.empty_like(right)
        for start in starts:
            edits: dict[str, list[tuple[Any, ...]]] = {}
            for place, index in (patches[i] for i in order[start : start + per_run]):
                edits.setdefault(place, []).append(index)
            values[list(order[start : start + per_run])] = case.scores(edits).mean()
        return values

    mistakes: Wrong = {
        "the answers come in the order of the layers, not in that of the patches.": lambda: right[in_order],
        "the answers come in the order of the hook points, not in that of the patches.": lambda: right[
            sorted(range(n_patches), key=lambda i: patches[i][0])
        ],
    }
    if per_run > 1:
        hint = "each patch acts on all copies of the prompts, not only on its own"
        mistakes[f"{hint}."] = lambda: together(in_order)
        mistakes[f"{hint}; nor are the patches sorted."] = lambda: together(range(n_patches))
    mistakes |= sweep_mistakes(case, patches, (n_patches,))
    compare(label, actual, right, "patch", mistakes, rtol=1e-5, atol=1e-5)
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


# ------------------------------------------------------------------------------------------------ attribution patching

WATCHED = ["blocks.0.attn.hook_z", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_pattern", "blocks.0.hook_attn_out"]
AXES = {
    "hook_z": "batch pos head d_head",
    "hook_resid_pre": "batch pos d_model",
    "hook_pattern": "batch head query key",
    "hook_attn_out": "batch pos d_model",
}


def gradients(case: Case, tokens: Tensor, embed: Tensor | None = None) -> dict[str, Tensor]:
    """How the metric, summed over the prompts, changes with something added at each of these places."""
    added: dict[str, Tensor] = {}

    def see(name: str, activation: Tensor) -> Tensor:
        if name == "hook_embed" and embed is not None:
            return embed
        if name in WATCHED:
            added[name] = torch.zeros_like(activation, requires_grad=True)
            return activation + added[name]
        return activation

    total = case.metric(case.model.compute(tokens, see)).sum()
    return dict(zip(added, torch.autograd.grad(total, list(added.values())), strict=True))


Named = dict[str, Tensor]


def compare_by_name(label: str, actual: Any, right: Named, wrong: dict[str, Callable[[], Named]]) -> None:
    """A dictionary of tensors, one for each hook point asked for."""
    if not isinstance(actual, dict) or set(actual) != set(right):
        got = f"one with {', '.join(map(str, actual)) or 'nothing'}" if isinstance(actual, dict) else repr(actual)[:40]
        raise CheckFailed(
            f"{label}: expected a dictionary with a tensor for each name, got {got}.\n"
            "  Next: return {name: ..., for each of `names`}."
        )
    for place in right:
        mistakes: Wrong = {
            hint: partial(lambda place, answers: answers()[place], place, answers) for hint, answers in wrong.items()
        }
        axes = AXES[place.split(".")[-1]]
        compare(f"{label}, at {place}", actual[place], right[place], axes, mistakes, rtol=1e-3, atol=5e-5)
        if actual[place].requires_grad:
            raise CheckFailed(
                f"{label}: what it returns still has its graph.\n  Next: detach it; nobody differentiates it again."
            )


def check_attribution_patching(fn: Fn) -> None:
    """Gradient times difference at four kinds of places; parameters and cache stay as they are."""
    name = "attribution_patching"
    for sizes in SIZES:
        case = case_of(*sizes)
        assert_estimates(name, fn, case)


def assert_estimates(name: str, fn: Fn, case: Case) -> None:
    """One case of attribution patching."""
    source_cache = case.cache()
    with leaves_no_trace(name, case, source_cache), during(case.words):
        actual = fn(case.model, case.tokens, source_cache, case.metric, WATCHED)
    slopes = worked_out("slopes", case.sizes, Work(lambda case: gradients(case, case.tokens)))
    ways = {place: case.source[place] - case.seen[place] for place in WATCHED}
    right = {place: slopes[place] * ways[place] for place in WATCHED}

    def for_all(answer: Callable[[str], Tensor]) -> Callable[[], Named]:
        return lambda: {place: answer(place) for place in WATCHED}

    def there(place: str) -> Tensor:
        return gradients(case, case.source_tokens)[place]

    wrong = {
        "the sign is wrong: the difference is the source minus the run's own.": for_all(lambda p: -right[p]),
        "the gradient is multiplied by the source's activation, not by the difference.": for_all(
            lambda p: slopes[p] * case.source[p]
        ),
        "the gradient is multiplied by the run's own activation: that is not a patch.": for_all(
            lambda p: slopes[p] * case.seen[p]
        ),
        "it is the gradient alone.": for_all(lambda p: slopes[p]),
        "it is the difference alone.": for_all(lambda p: ways[p]),
        "the gradient is that of the source's run; take it in the run on `tokens`.": for_all(
            lambda p: there(p) * ways[p]
        ),
        "the roles are swapped: a run on the source's text, patched from the other.": for_all(
            lambda p: -there(p) * ways[p]
        ),
    }
    if case.n_batch > 1:
        wrong["the metric was averaged before the backward: each prompt has its own."] = for_all(
            lambda p: right[p] / case.n_batch
        )
    compare_by_name(f"{name} {case.words}", actual, right, wrong)
    if case.model.runs > 2:
        raise CheckFailed(
            f"{name}: it ran the model {case.model.runs} times.\n"
            "  Next: one forward, one backward; the cache holds the source."
        )


def check_integrated_attribution(fn: Fn) -> None:
    """One, two and five steps on the way from one run's embeddings to the other's."""
    name = "integrated_attribution"
    for sizes, steps in [(SIZES[0], 2), (SIZES[1], 1), (SIZES[0], 5)]:
        case = case_of(*sizes)
        assert_integrated(name, fn, case, steps)


def assert_integrated(name: str, fn: Fn, case: Case, steps: int) -> None:
    """One case of attribution along the way."""
    label = f"{name} with steps={steps} {case.words}"
    source_cache = case.cache()
    with leaves_no_trace(name, case, source_cache), during(f"with steps={steps}"):
        actual = fn(case.model, case.tokens, source_cache, case.metric, WATCHED, steps)
    ways = {place: case.source[place] - case.seen[place] for place in WATCHED}
    start, far = case.seen["hook_embed"], case.source["hook_embed"] - case.seen["hook_embed"]

    def along(shares: Sequence[float]) -> Named:
        found = [gradients(case, case.tokens, start + share * far) for share in shares]
        return {p: sum(g[p] for g in found) / len(found) * ways[p] for p in WATCHED}

    middles = [(step + 0.5) / steps for step in range(steps)]
    right = worked_out(f"along {steps}", case.sizes, Work(lambda case: along(middles)))
    wrong: dict[str, Callable[[], Named]] = {
        "there is only the gradient at the start: that is attribution_patching.": lambda: along([0.0]),
        "the steps are taken at their beginnings; take their middles.": lambda: along(
            [step / steps for step in range(steps)]
        ),
        "the steps are taken at their ends; take their middles.": lambda: along(
            [(step + 1) / steps for step in range(steps)]
        ),
        "the sign is wrong: the difference is the source minus the run's own.": lambda: {
            place: -right[place] for place in WATCHED
        },
    }
    if steps > 1:
        wrong["the gradients are summed over the steps; take their mean."] = lambda: {
            place: right[place] * steps for place in WATCHED
        }
    compare_by_name(label, actual, right, wrong)
