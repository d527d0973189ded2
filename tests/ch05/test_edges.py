"""Chapter 05, edges and directions: its checks against mistakes that learners make, and other right answers."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import solutions.ch02_transformer as ch02
import solutions.ch05_patching as ref
from course_utils.checks import find_checks, run_check
from course_utils.checks.ch05.edges import case_of
from course_utils.config import TransformerConfig
from course_utils.hooks import hook_points, hooks, reset_hooks, run_with_cache, run_with_hooks
from tests.ch02 import other_transformer
from tests.ch05 import other_edges as other
from tests.support.mistakes import Mistake, assert_known_and_unknown, assert_quick, assert_refused
from tests.support.mutation import survivors

EXERCISES = (
    "sender_outputs",
    "edge_attribution",
    "run_with_edges",
    "interchange_intervention",
    "align_direction",
)
CHECKS = {name: find_checks()["05"][name] for name in EXERCISES}
MISTAKES: list[Mistake] = []


def mistake(exercise: str, words: str, answer: Callable[..., Any], surprise: bool = False) -> None:
    """Note a wrong answer."""
    MISTAKES.append(Mistake(exercise, words, answer, surprise))


# -------------------------------------------------------------------------------------------------------------- senders


def sending(words: str, change: Callable[..., Any], surprise: bool = False) -> None:
    """The right outputs, spoiled; `change` gets them by name, the model, and the cache."""

    def sender_outputs(model: Any, cache: Any) -> Any:
        rows = dict(zip(ref.edge_nodes(model.cfg)[0], ref.sender_outputs(model, cache), strict=True))
        return torch.stack(list(change(rows, model, cache).values()))

    mistake("sender_outputs", words, sender_outputs, surprise)


def with_bias(share: Callable[[Any], float]) -> Callable[..., Any]:
    return lambda rows, model, cache: {
        name: row + (model.blocks[int(name[0])].attn.b_O * share(model) if "." in name else 0)
        for name, row in rows.items()
    }


def reordered(key: Callable[[str], Any]) -> Callable[..., Any]:
    return lambda rows, model, cache: dict(sorted(rows.items(), key=lambda item: key(item[0])))


sending("added to every head", with_bias(lambda model: 1.0))
sending("divided among the heads", with_bias(lambda model: 1 / model.cfg.n_heads))
sending("`hook_embed` alone", lambda rows, model, cache: rows | {"embed": cache["embed"]})
sending("all MLPs come after all heads", reordered(lambda name: ("mlp" in name, 0 if name == "embed" else 1, name)))
sending("values are wrong", lambda rows, model, cache: rows | {"embed": cache["pos_embed"]}, True)
sending("values are wrong", lambda rows, model, cache: rows | {"1.0": rows["1.1"], "1.1": rows["1.0"]}, True)
sending(
    "values are wrong",
    lambda rows, model, cache: (
        {name: cache["ln1.scale", 0] * row for name, row in rows.items()} if model.cfg.normalization == "LN" else rows
    ),
    True,
)


def in_place(model: Any, cache: Any) -> Any:
    """Takes the embedding's share out of the cached stream, for good."""
    rows = ref.sender_outputs(model, cache)
    cache["resid_post", -1].sub_(rows[0])
    return rows


mistake("sender_outputs", "in place", in_place, True)

# ---------------------------------------------------------------------------------------------------------- attribution


def attributing(words: str, surprise: bool = False, **wrong: Any) -> None:
    """edge_attribution with switches for what people get wrong."""

    def edge_attribution(model: Any, clean: Any, corrupted: Any, metric: Any, steps: int = 1) -> Any:
        if wrong.get("swapped"):
            clean, corrupted = corrupted, clean
        with torch.no_grad():
            caches = [run_with_cache(model, tokens)[1] for tokens in (clean, corrupted)]
        own, source = (ref.sender_outputs(model, cache).detach() for cache in caches)
        embeds = [cache["embed"] for cache in caches]
        possible = ref.possible_edges(model.cfg)
        shares = wrong.get("shares", lambda steps: [step / steps for step in range(steps)])(steps)
        rows = []
        for share in shares:
            added = own.new_zeros(possible.shape[1], *own.shape[1:]).requires_grad_()
            moved = torch.lerp(*embeds, share)
            with hooks(model, {"hook_embed": lambda embed, hook, moved=moved: moved}):
                logits = ref.run_with_own_inputs(model, clean, added.__getitem__)
            total = metric(logits).sum() if wrong.get("sum") else metric(logits).mean()
            if wrong.get("backward"):
                total.backward()
                rows.append(added.grad)
            else:
                rows.append(torch.autograd.grad(total, added)[0])
        gradient = torch.stack(rows).mean(0)
        if wrong.get("shared"):  # one gradient for all receivers of a layer
            gradient = gradient.clone()
            for stage in range(1, 2 * model.cfg.n_layers + 1):
                here = [i for i, at in enumerate(ref.edge_nodes(model.cfg)[1].values()) if at == stage]
                gradient[here] = gradient[here].sum(0, keepdim=True) if here else gradient[here]
        difference = wrong.get("difference", lambda own, source: source - own)(own, source)
        if wrong.get("last"):
            difference, gradient = difference[:, :, -1:], gradient[:, :, -1:]
        table = torch.einsum("sbpd,rbpd->sr", difference, gradient)
        table = table if wrong.get("all") else table * possible
        return wrong.get("then", lambda table, model: table)(table, model)

    mistake("edge_attribution", words, edge_attribution, surprise)


def exchanged(first: str, second: str) -> Callable[..., Any]:
    def columns(table: Any, model: Any) -> Any:
        names = list(ref.edge_nodes(model.cfg)[1])
        swap = {first: second, second: first}
        return table[:, [names.index(n[:-1] + swap.get(n[-1], n[-1]) if "." in n else n) for n in names]]

    return columns


attributing("the sign is wrong", difference=lambda own, source: own - source)
attributing("without their sign", then=lambda table, model: table.abs())
attributing("clean and corrupted are swapped", swapped=True)
attributing("the gradient is that of the corrupted run", shares=lambda steps: [1.0])
attributing("that read before they write", all=True)
attributing("summed over the prompts", sum=True)
attributing("queries and keys are swapped", then=exchanged("q", "k"))
attributing("queries and values are swapped", then=exchanged("q", "v"))
attributing("keys and values are swapped", then=exchanged("k", "v"))
attributing("wrote on the clean prompts", difference=lambda own, source: own)
attributing("wrote on the corrupted ones", difference=lambda own, source: source)
attributing("the steps are left out", shares=lambda steps: [0.0])
attributing(
    "they begin at 0",
    shares=lambda steps: [0.0] if steps == 1 else [(step + 1) / steps for step in range(steps)],
)
attributing(
    "the middles of the parts",
    shares=lambda steps: [0.0] if steps == 1 else [(step + 0.5) / steps for step in range(steps)],
)
attributing("gradients of the model's parameters", backward=True, surprise=True)
attributing("values are wrong", shared=True, surprise=True)
attributing("values are wrong", last=True, surprise=True)
attributing("values are wrong", then=lambda table, model: table - table.mean(), surprise=True)
attributing("values are wrong", difference=lambda own, source: (source - own).roll(1, 1), surprise=True)


def after_the_norm(model: Any, clean: Any, corrupted: Any, metric: Any, steps: int = 1) -> Any:
    """The gradient behind each LayerNorm, taken for the one in front of it."""
    kept = other.back_through
    other.back_through = lambda norm, resid, slope: slope
    try:
        return other.edge_attribution(model, clean, corrupted, metric, steps)
    finally:
        other.back_through = kept


mistake("edge_attribution", "values are wrong", after_the_norm, True)


def frozen(model: Any, clean: Any, corrupted: Any, metric: Any, steps: int = 1) -> Any:
    """Right, but the parameters no longer want gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return ref.edge_attribution(model, clean, corrupted, metric, steps)


mistake("edge_attribution", "gradients of the model's parameters", frozen, True)

# ----------------------------------------------------------------------------------------------------------- kept edges


def keeping(words: str, change: Callable[..., Any], surprise: bool = False, swap: bool = False) -> None:
    """run_with_edges on other edges."""

    def run_with_edges(model: Any, clean: Any, corrupted: Any, edges: Any) -> Any:
        names = [list(nodes) for nodes in ref.edge_nodes(model.cfg)]
        runs = (corrupted, clean) if swap else (clean, corrupted)
        return other.run_with_edges(model, *runs, change(edges, *names))

    mistake("run_with_edges", words, run_with_edges, surprise)


def kept_where(keep: Callable[[str, str], bool]) -> Callable[..., Any]:
    return lambda edges, senders, receivers: (
        edges | torch.tensor([[keep(sender, receiver) for receiver in receivers] for sender in senders])
    )


def same_letter(letter: str) -> Callable[..., Any]:
    return lambda edges, senders, receivers: edges[
        :, [receivers.index(name[:-1] + letter if "." in name else name) for name in receivers]
    ]


keeping("everything is kept", lambda edges, senders, receivers: torch.ones_like(edges))
keeping("nothing is kept", lambda edges, senders, receivers: torch.zeros_like(edges))
keeping("kept and cut are exchanged", lambda edges, senders, receivers: ~edges)
keeping("clean and corrupted are swapped", lambda edges, senders, receivers: edges, swap=True)
# with all else clean: what they carry is then clean as well
keeping("kept edges carry what the senders write on the clean prompts", kept_where(lambda s, r: r != "final"))
keeping("into the last LayerNorm are never cut", kept_where(lambda s, r: r == "final"))
keeping("from the embedding are never cut", kept_where(lambda s, r: s == "embed"))
keeping("from the MLPs are never cut", kept_where(lambda s, r: "mlp" in s))
keeping("into the MLPs are never cut", kept_where(lambda s, r: "mlp" in r))
keeping("head's q decide", same_letter("q"))
keeping("head's v decide", same_letter("v"))
keeping("values are wrong", lambda edges, s, r: edges[:, [1, 0, *range(2, len(r))]], True)
keeping("values are wrong", lambda edges, s, r: edges[[0, 2, 1, *range(3, len(s))]], True)
keeping("values are wrong", kept_where(lambda s, r: "." in s and r.endswith("k")), True)


def carried(words: str, surprise: bool = False, **wrong: Any) -> None:
    """run_with_edges with something else on the edges."""

    def run_with_edges(model: Any, clean: Any, corrupted: Any, edges: Any) -> Any:
        with torch.set_grad_enabled(bool(wrong.get("graph"))):
            caches = [run_with_cache(model, tokens)[1] for tokens in (clean, corrupted)]
            own, source = (ref.sender_outputs(model, cache) for cache in caches)
            if wrong.get("mean"):
                source = source.mean(1, keepdim=True).expand_as(source)
            cut = (ref.possible_edges(model.cfg) & ~edges).to(own)

            def added(rows: slice) -> Any:
                return torch.einsum("sr,sbpd->rbpd", cut[:, rows], source - own)

            if wrong.get("leaves"):
                for point in hook_points(model).values():
                    point.add(lambda activation, hook: None)
            if wrong.get("resets"):
                reset_hooks(model)
            if wrong.get("right"):
                with torch.no_grad():
                    return other.run_with_edges(model, clean, corrupted, edges)
            return ref.run_with_own_inputs(model, clean, added)

    mistake("run_with_edges", words, run_with_edges, surprise)


carried("values are wrong", mean=True, surprise=True)
carried("values are wrong", surprise=True)  # the difference of the two runs, not that from this very run
carried("a hook is left behind", leaves=True, right=True, surprise=True)
carried("hooks that others had attached", resets=True, right=True, surprise=True)
mistake(
    "run_with_edges",
    "gradients are recorded",
    lambda *arguments: ref.run_with_edges(*arguments) * torch.ones((), requires_grad=True),
    True,
)

# ----------------------------------------------------------------------------------------------------------- directions


def interchanged(model: Any, base: Any, source: Any, name: str, positions: Any, directions: Any, **wrong: Any) -> Any:
    """interchange_intervention with switches for what people get wrong."""
    errors = directions @ directions.T - torch.eye(len(directions)).to(directions)
    if wrong.get("lengths"):
        errors = errors.diagonal()
    if errors.abs().max() > 1e-4 and not wrong.get("lenient"):
        raise ValueError("crooked")
    if wrong.get("roles"):
        base, source = source, base
    with torch.no_grad():
        _, cache = run_with_cache(model, source)
    rows = torch.arange(len(base))
    positions = wrong.get("at", lambda positions, base: positions)(positions, base)
    used = wrong.get("using", lambda directions: directions)(directions)
    inside = used.T @ used
    exchange = wrong.get("exchange", lambda own, other, inside: own + (other - own) @ inside)

    def fn(activation: Any, hook: Any) -> Any:
        other_vectors = cache[name]
        if wrong.get("everywhere"):
            return exchange(activation, other_vectors, inside)
        out = activation if wrong.get("in_place") else activation.clone()
        source_rows = wrong.get("rows", lambda rows: rows)(rows)
        out[rows, positions] = exchange(activation[rows, positions], other_vectors[source_rows, positions], inside)
        return out

    if wrong.get("leaves"):
        hook_points(model)[name].add(fn)
        return model(base)
    return run_with_hooks(model, base, hooks={name: fn})


def swapping(words: str, surprise: bool = False, **wrong: Any) -> None:
    def answer(*arguments: Any) -> Any:
        return wrong.get("then", lambda logits: logits)(interchanged(*arguments, **wrong))

    mistake("interchange_intervention", words, answer, surprise)


swapping("nothing is exchanged", exchange=lambda own, other, inside: own + 0 * own @ inside)
swapping("base and source are swapped", roles=True)
swapping("the whole vector is exchanged", exchange=lambda own, other, inside: other + 0 * own @ inside)
swapping("all the rest is exchanged", exchange=lambda own, other, inside: other + (own - other) @ inside)
swapping("the base's own is not taken away", exchange=lambda own, other, inside: own + other @ inside)
swapping("nothing comes in its place", exchange=lambda own, other, inside: own - own @ inside)
swapping("orthogonal to the directions is lost", exchange=lambda own, other, inside: other @ inside)
swapping("at all positions", everywhere=True)
swapping("at the last position", at=lambda p, base: torch.full_like(p, base.shape[1] - 1))
swapping("the first one's position", at=lambda p, base: p[:1].expand_as(p))
swapping("off by one", at=lambda p, base: p + 1)
swapping("only the first direction", using=lambda directions: directions[:1])
swapping("should raise ValueError", lenient=True, surprise=True)
swapping("should raise ValueError", lengths=True, surprise=True)
swapping("no gradient flows", then=lambda logits: logits.detach(), surprise=True)
swapping("values are wrong", rows=lambda rows: rows.roll(1), surprise=True)
swapping("values are wrong", exchange=lambda own, other, inside: own - (other - own) @ inside, surprise=True)
swapping("values are wrong", exchange=lambda own, other, inside: (own + other) / 2 + 0 * own @ inside, surprise=True)
swapping("a hook is left behind", leaves=True, surprise=True)
swapping("others may hold", in_place=True, surprise=True)


def searching(words: str, surprise: bool = False, **wrong: Any) -> None:
    """align_direction with switches for what people get wrong."""

    def align_direction(
        model: Any, base: Any, source: Any, name: str, positions: Any, metric: Any, generator: Any,
        steps: int = 40, lr: float = 0.05, n_directions: int = 1,
    ) -> Any:  # fmt: skip
        if wrong.get("roles"):
            base, source = source, base
        shape = n_directions, model.cfg.d_model
        raw = torch.randn(*shape) if wrong.get("own_draws") else torch.randn(*shape, generator=generator)
        raw = raw.to(model.embed.W_E.dtype).requires_grad_()
        lr = wrong.get("lr", lr)
        optimiser = wrong.get("optimiser", torch.optim.Adam)([raw], lr=lr)
        loss = wrong.get("loss", lambda values: torch.nn.functional.softplus(values).mean())
        for _ in range(wrong.get("steps", lambda steps: steps)(steps)):
            directions = torch.linalg.qr(raw.T).Q.T
            value = loss(metric(interchanged(model, base, source, name, positions, directions)))
            if wrong.get("backward"):
                optimiser.zero_grad()
                value.backward()
            else:
                (raw.grad,) = torch.autograd.grad(value, [raw])
            optimiser.step()
        return wrong.get("then", lambda raw: torch.linalg.qr(raw.detach().T).Q.T)(raw)

    mistake("align_direction", words, align_direction, surprise)


softplus = torch.nn.functional.softplus
searching("as large as possible", loss=lambda values: softplus(-values).mean())
searching("the metric itself is minimised", loss=torch.mean)
searching("through a sigmoid", loss=lambda values: values.sigmoid().mean())
searching("nothing is learned", steps=lambda steps: 0)
searching("one step too few", steps=lambda steps: steps - 1)
searching("`lr` is not used", lr=0.05)
searching("base and source are swapped", roles=True)
searching("gradients of the model's parameters", backward=True, surprise=True)
searching("dot products", then=lambda raw: raw.detach(), surprise=True)
searching("has a graph", then=lambda raw: torch.linalg.qr(raw.T).Q.T, surprise=True)
searching("values are wrong", own_draws=True, surprise=True)
searching("values are wrong", optimiser=torch.optim.SGD, surprise=True)
searching("values are wrong", loss=lambda values: values.relu().mean(), surprise=True)


@pytest.mark.parametrize("mistake", [pytest.param(m, id=f"{m.exercise}: {m.words[:50]}") for m in MISTAKES])
def test_mistake_is_refused_with_its_words(mistake: Mistake) -> None:
    assert_refused(CHECKS[mistake.exercise], mistake, secrets=("einsum", "qr(", "possible_edges"))


@pytest.mark.parametrize("exercise", EXERCISES)
def test_every_exercise_has_mistakes_known_and_unknown(exercise: str) -> None:
    assert_known_and_unknown(MISTAKES, exercise)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_right_answers_pass(exercise: str) -> None:
    run_check(CHECKS[exercise], getattr(ref, exercise))
    run_check(CHECKS[exercise], getattr(other, exercise))


@pytest.mark.parametrize("exercise", EXERCISES)
def test_check_is_quick(exercise: str) -> None:
    assert_quick(CHECKS[exercise], getattr(other, exercise))


# ----------------------------------------------------------------------------------------------------------- identities

LN = {"d_vocab": 13, "n_ctx": 9, "n_layers": 2, "n_heads": 3, "d_model": 8, "d_head": 4, "d_mlp": 11}
CONFIGS = {
    "usual": TransformerConfig(**LN),
    "attention only, no LayerNorm": TransformerConfig(
        **{**LN, "d_mlp": 0, "n_layers": 3}, attn_only=True, normalization="none"
    ),
    "rotary and parallel": TransformerConfig(**LN, positions="rotary", rotary_dim=4, parallel=True),
}


def model_of(name: str, scale: float = 0.5) -> Any:
    """A Transformer of chapter 02 with random weights, biases included, in double precision."""
    model = ch02.Transformer(CONFIGS[name]).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    return model


def two_texts() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(13, (2, 5), generator=generator), torch.randint(13, (2, 5), generator=generator)


def metric(logits: Any) -> Any:
    return logits[:, -1, 3] - logits[:, -1, 5]


@pytest.mark.parametrize("name", CONFIGS)
def test_all_edges_are_the_clean_run_and_none_the_corrupted_one(name: str) -> None:
    model, (clean, corrupted) = model_of(name), two_texts()
    there = ref.possible_edges(model.cfg)
    with torch.no_grad():
        torch.testing.assert_close(ref.run_with_edges(model, clean, corrupted, there), model(clean))
        torch.testing.assert_close(ref.run_with_edges(model, clean, corrupted, ~there), model(corrupted))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_senders_write_is_the_stream(name: str) -> None:
    model, (clean, _) = model_of(name), two_texts()
    with torch.no_grad():
        _, cache = run_with_cache(model, clean)
        biases = sum(block.attn.b_O for block in model.blocks)
        torch.testing.assert_close(ref.sender_outputs(model, cache).sum(0) + biases, cache["resid_post", -1])


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_into_a_receiver_sum_to_the_slope_times_its_inputs_difference(name: str) -> None:
    """For the last LayerNorm that is what attribution patching says of the last stream."""
    model, (clean, corrupted) = model_of(name), two_texts()
    scores = ref.edge_attribution(model, clean, corrupted, metric)
    _, source = run_with_cache(model, corrupted)
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    estimate = ref.attribution_patching(model, clean, source, metric, [last])[last]
    torch.testing.assert_close(scores[:, -1].sum(), estimate.sum(dim=(1, 2)).mean())


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_what_a_small_part_of_the_corrupted_value_does(name: str) -> None:
    """Finite differences, through another function: one edge at a time, to a small share."""
    model, (clean, corrupted) = model_of(name), two_texts()
    scores = ref.edge_attribution(model, clean, corrupted, metric)
    there = ref.possible_edges(model.cfg)
    share = 1e-5
    with torch.no_grad():
        own, source = (ref.sender_outputs(model, run_with_cache(model, text)[1]) for text in (clean, corrupted))

        def moved(sender: int, receiver: int, share: float) -> Any:
            def added(rows: slice) -> Any:
                out = torch.zeros(rows.stop - rows.start, *own.shape[1:], dtype=own.dtype)
                if rows.start <= receiver < rows.stop:
                    out[receiver - rows.start] = share * (source[sender] - own[sender])
                return out

            return metric(ref.run_with_own_inputs(model, clean, added)).mean()

        for sender, receiver in there.nonzero()[::7].tolist():
            slope = (moved(sender, receiver, share) - moved(sender, receiver, -share)) / (2 * share)
            torch.testing.assert_close(scores[sender, receiver], slope, rtol=1e-4, atol=1e-7)


def test_on_a_linear_model_the_scores_are_exact() -> None:
    """Without LayerNorms and with queries of zero, patterns are even and values are read linearly."""
    model, (clean, corrupted) = model_of("attention only, no LayerNorm"), two_texts()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q.zero_()
            block.attn.b_Q.zero_()
    scores = ref.edge_attribution(model, clean, corrupted, metric)
    there = ref.possible_edges(model.cfg)
    with torch.no_grad():
        before = metric(model(clean)).mean()
    for sender, receiver in there.nonzero()[::5].tolist():
        edges = there.clone()
        edges[sender, receiver] = False
        change = metric(ref.run_with_edges(model, clean, corrupted, edges)).mean() - before
        torch.testing.assert_close(scores[sender, receiver], change)
    assert (scores != 0).sum() > 10


def test_a_differently_written_transformer_gives_the_same() -> None:
    ours = model_of("usual")
    theirs = other_transformer.Transformer(ours.cfg).double()
    theirs.load_state_dict(ours.state_dict())
    clean, corrupted = two_texts()
    edges = torch.rand(ref.possible_edges(ours.cfg).shape, generator=torch.Generator().manual_seed(6)) > 0.5
    scores = [ref.edge_attribution(model, clean, corrupted, metric, steps=2) for model in (ours, theirs)]
    torch.testing.assert_close(*scores)
    torch.testing.assert_close(*(ref.run_with_edges(model, clean, corrupted, edges) for model in (ours, theirs)))


def test_the_whole_space_is_a_patch_of_the_whole_vector() -> None:
    model, (clean, corrupted) = model_of("usual"), two_texts()
    name, positions = "blocks.1.hook_resid_pre", torch.tensor([3, 3])
    _, source = run_with_cache(model, corrupted)
    whole = ref.interchange_intervention(
        model, clean, corrupted, name, positions, torch.eye(model.cfg.d_model, dtype=torch.float64)
    )
    torch.testing.assert_close(whole.detach(), ref.run_patched(model, clean, source, name, (3,)))


def test_a_planted_direction_is_found() -> None:
    """What decides is one coordinate of the last stream; the search starts elsewhere and comes to it."""
    model, (clean, corrupted) = model_of("attention only, no LayerNorm"), two_texts()
    planted = torch.zeros(1, model.cfg.d_model, dtype=torch.float64)
    planted[0, 2] = 1.0
    with torch.no_grad():
        model.unembed.W_U.zero_()
        model.unembed.W_U[2, 3] = 1.0
        _, base = run_with_cache(model, clean, names="blocks.2.hook_resid_post")
        _, source = run_with_cache(model, corrupted, names="blocks.2.hook_resid_post")
        gap = (base["resid_post", 2] - source["resid_post", 2])[:, -1, 2]
        assert gap.abs().min() > 0.1
    signs = gap.sign()
    found = ref.align_direction(
        model, clean, corrupted, "blocks.2.hook_resid_post", torch.tensor([4, 4]),
        lambda logits: 5 * signs * logits[:, -1, 3], torch.Generator().manual_seed(0), steps=150, lr=0.1,
    )  # fmt: skip
    start = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).double()
    assert abs(float(torch.cosine_similarity(start, planted))) < 0.8

    def left(directions: Any) -> Any:
        logits = ref.interchange_intervention(
            model, clean, corrupted, "blocks.2.hook_resid_post", torch.tensor([4, 4]), directions
        )
        return (signs * logits[:, -1, 3]).mean()

    assert left(found) <= left(planted) + 1e-6


def test_cases_are_telling() -> None:
    """The check of edge_attribution tells numbers apart to 1e-6: scores are far above that."""
    for number in (0, 1):
        known = case_of(number)
        scores = ref.edge_attribution(known.model, known.clean, known.corrupted, known.metric)
        assert scores[ref.possible_edges(known.model.cfg)].abs().median() > 1e-4


# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "0 -> -1",  # of the one gradient that torch.autograd.grad returns; of a layer that the embedding has not
    "0 -> 1",  # the latter
    "possible_edges(model.cfg).to(edges.device) & ~edges -> ~edges",  # unless attention and MLP are parallel: see above
    "torch.zeros_like(other) -> other",  # each row is read once, before it is written
    "run_with_cache(model, source, names=name) -> run_with_cache(model, source)",
    "tqdm(range(steps), mininterval=1, desc=name) -> range(steps)",  # progress
    "tqdm(range(steps), mininterval=1, desc=name) -> tqdm(range(steps), mininterval=1)",
    "tqdm(range(steps), mininterval=1, desc=name) -> tqdm(range(steps), desc=name)",
    "1 -> 0",  # seconds
    "1 -> 2",
}
ON_A_GPU = {
    "possible_edges(model.cfg).to(own.device) -> possible_edges(model.cfg)",
    "possible_edges(model.cfg).to(edges.device) -> possible_edges(model.cfg)",
    "torch.eye(len(directions), dtype=directions.dtype, device=directions.device)"
    " -> torch.eye(len(directions), dtype=directions.dtype)",
    "torch.arange(len(base), device=base.device) -> torch.arange(len(base))",
}


@pytest.mark.slow
@pytest.mark.parametrize("exercise", EXERCISES)
def test_small_changes_of_the_reference_are_refused(exercise: str) -> None:
    passed = survivors(Path(inspect.getfile(ref)), exercise, CHECKS[exercise])
    assert passed <= STILL_RIGHT | ON_A_GPU
