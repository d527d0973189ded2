"""Chapter 05's checks of path patching and of what heads do, against mistakes, and right answers in another style.

Each mistake returns the right type, shape and dtype, and must be refused with its promised words. Those marked
`surprise` are absent from the check's own list of known mistakes.
"""

from collections.abc import Callable
from pathlib import Path
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
from tests.ch05 import other_paths as other
from tests.support.mistakes import Mistake, assert_known_and_unknown, assert_quick, assert_refused
from tests.support.mutation import survivors

CHECKS = {name: check for name, check in find_checks()["05"].items() if check.__module__.endswith(".ch05.paths")}
ALL = slice(None)
MISTAKES: list[Mistake] = []


def mistake(exercise: str, words: str, answer: Any, surprise: bool = False) -> None:
    """Note a wrong answer."""
    MISTAKES.append(Mistake(exercise, words, answer, surprise))


def swap_letters(receivers: Any, letters: dict[str, str]) -> Any:
    return [
        (name[:-1] + letters.get(name[-1], name[-1]) if "hook_" in name else name, head) for name, head in receivers
    ]


# -------------------------------------------------------------------------------------------------- runs over paths


def over_paths(model: Any, tokens: Any, fixed: Any, receivers: Any, **wrong: Any) -> Any:
    """A run_over_direct_paths with switches for what people get wrong."""
    last = wrong.get("last", f"blocks.{model.cfg.n_layers - 1}.hook_resid_post")
    receivers = wrong.get("change", lambda r: r)(receivers)
    places = [(last if name == "final" else name, head) for name, head in receivers]
    names = {name for name, _ in places}

    def first(activation: Any, hook: Any) -> Any:
        if wrong.get("zero"):
            return torch.zeros_like(activation)
        return activation if wrong.get("loose") else fixed[hook.name]

    def deliver(activation: Any, hook: Any) -> Any:
        patched = received[hook.name] if wrong.get("in_place") else activation.clone()
        for name, head in places:
            if name == hook.name:
                part: Any = (ALL, wrong.get("pos", ALL))
                if head is not None and wrong.get("by_position"):
                    part = (ALL, head)
                elif head is not None and not wrong.get("all_heads"):
                    part = (*part, head)
                value = received[name].mean(0, keepdim=True) if wrong.get("mean") else received[name]
                value = value.expand_as(activation)[part]
                patched[part] = patched[part] + value if wrong.get("add") else value
        return patched

    with torch.set_grad_enabled(bool(wrong.get("graph"))):
        with hooks(model, dict.fromkeys(fixed, first)):
            logits, received = run_with_cache(model, tokens, names=names)
            if wrong.get("once"):
                return logits
        if wrong.get("stays"):
            for name in names:
                hook_points(model)[name].add(deliver)
            return model(tokens)
        held = [(name, first) for name in fixed] if wrong.get("still") else []
        return run_with_hooks(model, tokens, hooks=[*held, *((name, deliver) for name in names)])


def runs(words: str, surprise: bool = False, **wrong: Any) -> None:
    mistake("run_over_direct_paths", words, lambda *arguments: over_paths(*arguments, **wrong), surprise)


runs("nothing is fixed in the first run", loose=True)
runs("still fixed in the second run", still=True)
runs("still fixed in the second run", once=True)
runs("all heads of a receiver's layer", all_heads=True)
runs("only the last position", pos=-1)
runs("used as a position", by_position=True)
runs("only the first receiver", change=lambda r: r[:1])
runs("only the last receiver", change=lambda r: r[-1:])
runs("at the receivers' k, not at their q", change=lambda r: swap_letters(r, {"q": "k"}))
runs("at the receivers' v, not at their q", change=lambda r: swap_letters(r, {"q": "v"}))
runs("it is what that leaves", last="blocks.2.hook_resid_pre")
runs("values are wrong", zero=True, surprise=True)
runs("values are wrong", mean=True, surprise=True)
runs("values are wrong", add=True, surprise=True)
runs("a hook is left behind", stays=True, surprise=True)
runs("gradients are recorded", graph=True, surprise=True)


def empties_fixed(model: Any, tokens: Any, fixed: Any, receivers: Any) -> Any:
    logits = ref.run_over_direct_paths(model, tokens, fixed, receivers)
    fixed.clear()
    return logits


def writes_into_fixed(model: Any, tokens: Any, fixed: Any, receivers: Any) -> Any:
    logits = ref.run_over_direct_paths(model, tokens, fixed, receivers)
    next(iter(fixed.values()))[0, 0] = 0
    return logits


mistake("run_over_direct_paths", "it changed `fixed`", empties_fixed, True)
mistake("run_over_direct_paths", "in the cache", writes_into_fixed, True)

# ------------------------------------------------------------------------------------------------------ path patching


def fixed_for(model: Any, clean: Any, corrupted: Any, senders: Any, freeze_mlps: bool, **wrong: Any) -> Any:
    """What stands still, with switches for what people get wrong."""
    with torch.no_grad():
        _, own = run_with_cache(model, clean)
        _, source = run_with_cache(model, corrupted)
    fixed = {}
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.attn.hook_z"
        numbers = [head for at, head in senders if at == layer]
        if numbers or not wrong.get("loose"):
            fixed[name] = (source if wrong.get("others") else own)[name].clone()
            for head in range(model.cfg.n_heads) if numbers and wrong.get("whole_layers") else numbers:
                part = (ALL, wrong.get("pos", ALL), head)
                value = source[name][part]
                fixed[name][part] = value.mean(0, keepdim=True) if wrong.get("mean") else value
                if wrong.get("zero"):
                    fixed[name][part] = 0
        if freeze_mlps and not model.cfg.attn_only:
            base = source if wrong.get("corrupted_mlps") else own
            fixed[f"blocks.{layer}.hook_mlp_out"] = base[f"blocks.{layer}.hook_mlp_out"]
    return fixed


def patching(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A path_patch with switches for what people get wrong."""

    def path_patch(
        model: Any, clean: Any, corrupted: Any, senders: Any, receivers: Any, metric: Any, freeze_mlps: bool = True
    ) -> Any:
        if not wrong.get("trusting"):
            ref.refuse_unknown(model, senders, receivers)
        if wrong.get("swapped"):
            clean, corrupted = corrupted, clean
        freeze_mlps = wrong.get("mlps", lambda frozen: frozen)(freeze_mlps)
        fixed = fixed_for(model, clean, corrupted, senders, freeze_mlps, **wrong.get("fixed", {}))
        if wrong.get("total"):
            names = [f"blocks.{layer}.attn.hook_z" for layer, _ in senders]
            put = {name: (lambda a, hook: put_heads(a, fixed[hook.name], senders, hook.name)) for name in names}
            with torch.no_grad():
                return metric(run_with_hooks(model, clean, hooks=put))
        if wrong.get("late"):
            with torch.no_grad():
                model(clean)
            ref.refuse_unknown(model, senders, receivers)
        answer = metric(over_paths(model, clean, fixed, receivers, **wrong.get("run", {})))
        return wrong.get("then", lambda answer: answer)(answer)

    mistake("path_patch", words, path_patch, surprise)


def put_heads(activation: Any, fixed: Any, senders: Any, name: str) -> Any:
    out = activation.clone()
    for layer, head in senders:
        if name == f"blocks.{layer}.attn.hook_z":
            out[:, :, head] = fixed[:, :, head]
    return out


patching("nothing is sent", run={"loose": True})
patching("clean and corrupted are swapped", swapped=True)
patching("the whole effect of the senders", total=True)
patching("news comes by way of them", fixed={"loose": True})
patching("held at their corrupted values", fixed={"others": True})
patching("all heads of a sender's layer", fixed={"whole_layers": True})
patching("only the last position is sent, or receives", fixed={"pos": -1})
patching("only the last position is sent, or receives", run={"pos": -1})
patching("all heads of a receiver's layer", run={"all_heads": True})
patching("everything is held in the last run", run={"still": True})
patching("it is the mean over the prompts", then=torch.mean)
patching("at the receivers' k, not at their q", run={"change": lambda r: swap_letters(r, {"q": "k"})})
patching("at the receivers' v, not at their q", run={"change": lambda r: swap_letters(r, {"q": "v"})})
patching("the MLPs are not frozen, and should be", mlps=lambda frozen: False)
patching("the MLPs are frozen, and should not be", mlps=lambda frozen: True)
patching("should raise ValueError", trusting=True, surprise=True)
patching("it ran the model before", trusting=True, late=True, surprise=True)
patching("a hook is left behind", run={"stays": True}, surprise=True)
patching("gradients are recorded", run={"graph": True}, surprise=True)
patching("values are wrong", fixed={"zero": True}, surprise=True)
patching("values are wrong", fixed={"mean": True}, surprise=True)
patching("wrong", fixed={"corrupted_mlps": True}, surprise=True)


def changes_senders(*arguments: Any, **options: Any) -> Any:
    answer = ref.path_patch(*arguments, **options)
    arguments[3].clear()
    return answer


def unfrozen_by_default(*arguments: Any, freeze_mlps: bool = False) -> Any:
    return ref.path_patch(*arguments, freeze_mlps=freeze_mlps)


mistake("path_patch", "it changed `senders`", changes_senders, True)
mistake("path_patch", "freeze_mlps=True is the default", unfrozen_by_default)


def table(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A path_patch_heads with switches for what people get wrong."""

    def path_patch_heads(
        model: Any,
        clean: Any,
        corrupted: Any,
        receivers: Any,
        metric: Any,
        freeze_mlps: bool = True,
        max_rows: int = 64,
    ) -> Any:
        if not wrong.get("trusting"):
            ref.refuse_unknown(model, [], receivers)
        if wrong.get("swapped"):
            clean, corrupted = corrupted, clean
        n, n_layers, n_heads = len(clean), model.cfg.n_layers, model.cfg.n_heads
        freeze_mlps = wrong.get("mlps", lambda frozen: frozen)(freeze_mlps)
        senders = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        fit = wrong.get("fit", lambda max_rows, n: max(1, max_rows // n))(max_rows, n)
        empty = fixed_for(model, clean, corrupted, [], freeze_mlps)
        with torch.no_grad():
            _, every = run_with_cache(model, corrupted)
        values, pile = [], {name: held.clone() for name, held in empty.items()}
        for start in range(0, len(senders), fit):
            chunk, parts = senders[start : start + fit], []
            for layer, head in chunk:
                name = f"blocks.{layer}.attn.hook_z"
                own = pile if wrong.get("piling") else {place: held.clone() for place, held in empty.items()}
                for at, number in chunk if wrong.get("together") else [(layer, head)]:
                    place = f"blocks.{at}.attn.hook_z"
                    own[place][:, :, number] = every[place][:, :, number]
                if wrong.get("loose"):
                    own = {name: own[name]} | {place: held for place, held in own.items() if "mlp" in place}
                parts.append({place: held.clone() for place, held in own.items()})
            if wrong.get("loose"):  # other places for each: one run after the other
                copies = [over_paths(model, clean, part, receivers) for part in parts]
            else:
                fixed = {place: torch.cat([part[place] for part in parts]) for place in empty}
                copies = list(over_paths(model, clean.repeat(len(chunk), 1), fixed, receivers).split(n))
            values += [wrong.get("reduce", torch.mean)(metric(copy)) for copy in copies]
        answer = torch.stack(values).reshape(n_layers, n_heads)
        if "then" in wrong:
            with torch.no_grad():
                return wrong["then"](answer, metric(model(clean)).mean())
        return answer

    mistake("path_patch_heads", words, path_patch_heads, surprise)


table("earlier senders are still sending", piling=True)
table("send to every copy", together=True)
table("clean and corrupted are swapped", swapped=True)
table("news comes by way of them", loose=True)
table("summed over the prompts", reduce=torch.sum)
table("it is how much the metric changed", then=lambda answer, base: answer - base)
table("senders without a path have 0", then=lambda answer, base: torch.where((answer - base).abs() < 1e-6, 0.0, answer))
table("became a reshape", then=lambda answer, base: answer.T.reshape(answer.shape))
table("nothing is sent", then=lambda answer, base: base.expand_as(answer))
table("the MLPs are not frozen, and should be", mlps=lambda frozen: False)
table("the MLPs are frozen, and should not be", mlps=lambda frozen: True)
table("should raise ValueError", trusting=True, surprise=True)
table("one forward had", fit=lambda max_rows, n: max(1, max_rows), surprise=True)
table("forwards for", fit=lambda max_rows, n: 1, surprise=True)
table("values are wrong", reduce=lambda values: values.max(), surprise=True)
table("values are wrong", then=lambda answer, base: answer.flip(0), surprise=True)

# ------------------------------------------------------------------------------------------------------ what heads do


def looking(words: str, change: Callable[..., Any], surprise: bool = False) -> None:
    """An attention_between whose rows, queries and keys were chosen wrongly."""

    def attention_between(cache: Any, queries: Any, keys: Any) -> Any:
        patterns, rows = cache.stack("pattern"), torch.arange(len(queries))
        return change(lambda q, k: patterns[:, rows, :, q, k].permute(1, 2, 0), queries, keys)

    mistake("attention_between", words, attention_between, surprise)


looking("query and key are swapped", lambda pick, q, k: pick(k, q))
looking("at the first one's query", lambda pick, q, k: pick(q[:1].expand_as(q), k))
looking("at the first one's key", lambda pick, q, k: pick(q, k[:1].expand_as(k)))
looking("it looks from the last position", lambda pick, q, k: pick(q * 0 - 1, k))
looking("it is the mean over the prompts", lambda pick, q, k: pick(q, k).mean(-1))
looking("the layers are in reverse order", lambda pick, q, k: pick(q, k).flip(0))
looking("values are wrong", lambda pick, q, k: pick(q, k + 1), True)
looking("values are wrong", lambda pick, q, k: pick(q, k).flip(1), True)
looking("values are wrong", lambda pick, q, k: pick(q, k) / pick(q, k).sum(0), True)
looking("in another order", lambda pick, q, k: pick(q, k).permute(2, 0, 1), True)


def copying(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A name_copying_scores with switches for what people get wrong."""

    def name_copying_scores(model: Any, dataset: Any, sign: int = 1, k: int = 5) -> Any:
        k, sign = wrong.get("k", lambda k: k)(k), wrong.get("sign", lambda sign: sign)(sign)
        early = model.cfg.attn_only != bool(wrong.get("other_depth"))
        with torch.no_grad():
            _, cache = run_with_cache(model, dataset.tokens)
            at = torch.stack([dataset.positions[place] for place in wrong.get("places", ("IO", "S1"))], 1)
            rows = torch.arange(len(at))[:, None]
            read_at = at + wrong.get("shift", 0)
            names = dataset.tokens[rows, at]
            scores = []
            for layer, block in enumerate(model.blocks):
                name = "hook_resid_pre" if early else "hook_resid_post"
                stream = cache[f"blocks.0.{name}"][rows, read_at]
                if wrong.get("own_layer"):
                    stream = cache[f"blocks.{layer}.hook_resid_pre"][rows, read_at]
                if wrong.get("embedding"):
                    stream = cache["hook_embed"][rows, read_at]
                norm = (lambda x: x) if wrong.get("no_ln1") else model.blocks[wrong.get("ln1", layer)].ln1
                for head in range(model.cfg.n_heads):
                    v = norm(stream) @ block.attn.W_V[head]
                    v = v if wrong.get("no_b_V") else v + block.attn.b_V[head]
                    out = sign * (v @ block.attn.W_O[head])
                    out = out + block.attn.b_O if wrong.get("b_O") else out
                    logits = (out if wrong.get("no_ln_final") else model.ln_final(out)) @ model.unembed.W_U
                    logits = logits if wrong.get("no_b_U") else logits + model.unembed.b_U
                    best = logits.topk(k, largest=not wrong.get("smallest")).indices
                    scores.append((best == names[..., None]).any(-1).to(logits.dtype).mean())
        answer = torch.stack(scores).reshape(model.cfg.n_layers, model.cfg.n_heads)
        return wrong.get("then", lambda answer: answer)(answer)

    mistake("name_copying_scores", words, name_copying_scores, surprise)


copying("before the first layer's MLP", other_depth=True)
copying("of the head's own layer", own_layer=True)
copying("the token's embedding alone", embedding=True)
copying("`ln1` is left out", no_ln1=True)
copying("through the first layer's `ln1`", ln1=0)
copying("`b_V` is left out", no_b_V=True)
copying("`ln_final` is left out", no_ln_final=True)
copying("`b_U` is left out", no_b_U=True)
copying("the wrong way round, or ignored", sign=lambda sign: -sign)
copying("`k` is ignored", k=lambda k: 1)
copying("`k` is off by one", k=lambda k: k + 1)
copying("S2 is taken for S1", places=("IO", "S2"))
copying("only IO counts", places=("IO",))
copying("only S1 counts", places=("S1",))
copying("names that are not copied", then=lambda answer: 1 - answer)
copying("wrong", smallest=True, surprise=True)
copying("wrong", b_O=True, surprise=True)
copying("wrong", shift=1, surprise=True)
copying("wrong", then=lambda answer: answer.flip(1), surprise=True)


def signalling(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A signal_effects with switches for what people get wrong."""
    kinds = wrong.get("kinds", {"token": ["names"], "position": ["order"], "both": ["names", "order"]})

    def signal_effects(model: Any, dataset: Any, senders: Any, receivers: Any) -> Any:
        with torch.no_grad():
            clean = model(dataset.tokens)
        effects = {}
        for signal, turns in kinds.items():
            flipped = dataset
            for kind in turns:
                flipped = flipped.flipped(kind)
            labels = flipped if wrong.get("flipped_labels") else dataset

            def metric(logits: Any, labels: Any = labels) -> Any:
                return ref.logit_difference(logits, labels)

            arguments = (dataset.tokens, flipped.tokens)
            if wrong.get("backwards"):
                arguments = arguments[::-1]
            if wrong.get("total"):
                fixed = fixed_for(model, *arguments, senders, True)
                names = {f"blocks.{layer}.attn.hook_z" for layer, _ in senders}
                put = dict.fromkeys(
                    names, lambda a, hook, fixed=fixed: put_heads(a, fixed[hook.name], senders, hook.name)
                )
                with torch.no_grad():
                    after = metric(run_with_hooks(model, dataset.tokens, hooks=put))
            else:
                after = ref.path_patch(model, *arguments, senders, receivers, metric)
            effects[signal] = after - (0 if wrong.get("no_base") else metric(clean))
        return wrong.get("then", lambda effects: effects)(effects)

    mistake("signal_effects", words, signal_effects, surprise)


signalling(
    "token and position are swapped", kinds={"token": ["order"], "position": ["names"], "both": ["names", "order"]}
)
signalling('"both" exchanges the names only', kinds={"token": ["names"], "position": ["order"], "both": ["names"]})
signalling('"both" exchanges the order only', kinds={"token": ["names"], "position": ["order"], "both": ["order"]})
signalling('"both" is the sum', then=lambda e: e | {"both": e["token"] + e["position"]})
signalling("those of the flipped prompts", flipped_labels=True)
signalling("the sign is wrong", then=lambda e: {signal: -value for signal, value in e.items()})
signalling("it is the logit difference itself", no_base=True)
signalling("the whole effect of the senders", total=True)
signalling("it is the mean over the prompts", then=lambda e: {signal: value.mean() for signal, value in e.items()})
signalling("values are wrong", backwards=True, surprise=True)
signalling("values are wrong", kinds={"token": ["abc"], "position": ["order"], "both": ["names"]}, surprise=True)
signalling("expected a dictionary", then=lambda e: {"names": e["token"], "order": e["position"]}, surprise=True)


def roles(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A head_roles with switches for what people get wrong."""

    def meets(value: float, least: float) -> bool:
        if wrong.get("size"):
            value, least = abs(value), abs(least)
        if least < 0 and not wrong.get("no_sign"):
            return value < least if wrong.get("strict") else value <= least
        return value > least if wrong.get("strict") else value >= least

    def head_roles(tables: Any, rules: Any) -> Any:
        found: dict[str, Any] = {}
        for role, conditions in rules.items():
            if not set(conditions) <= set(tables) and not wrong.get("trusting"):
                raise ValueError
            known = [name for name in conditions if name in tables]
            first = tables[known[0]] if known else torch.zeros(2, 3)
            heads = [(layer, head) for layer in range(len(first)) for head in range(first.shape[1])]
            rule = wrong.get("enough", all)
            fits = [at for at in heads if rule(meets(tables[n][at].item(), conditions[n]) for n in known)]
            key = wrong.get("key", lambda value: -abs(value))
            found[role] = sorted(fits, key=lambda at, first=first, key=key: key(first[at].item()))
        return wrong.get("then", lambda found: found)(found)

    mistake("head_roles", words, head_roles, surprise)


roles("a value at the threshold", strict=True)
roles("one condition is enough", enough=any)
roles("a negative condition is met by values above", no_sign=True)
roles("sizes count without their signs", size=True)
roles("roles that nobody has are left out", then=lambda found: {r: heads for r, heads in found.items() if heads})
roles("in the model's order", key=lambda value: 0)
roles("it is the largest absolute value", key=lambda value: -value)
roles("not (head, layer)", then=lambda found: {r: [at[::-1] for at in heads] for r, heads in found.items()})
roles("should raise ValueError", trusting=True, surprise=True)
roles("wrong", key=abs, surprise=True)
roles("wrong", then=lambda found: {r: heads[:1] for r, heads in found.items()}, surprise=True)
roles(
    "pair of ints",
    then=lambda found: {r: [tuple(torch.tensor(at)) for at in h] for r, h in found.items()},
    surprise=True,
)
roles("wrong", then=lambda found: {r: [list(at) for at in heads] for r, heads in found.items()}, surprise=True)

# ------------------------------------------------------------------------------------------------------ the tests


@pytest.mark.parametrize("mistake", [pytest.param(m, id=f"{m.exercise}: {m.words[:50]}") for m in MISTAKES])
def test_mistake_is_refused_with_its_words(mistake: Mistake) -> None:
    assert_refused(CHECKS[mistake.exercise], mistake, secrets=("einsum(", ".repeat(", "run_with_cache("))


@pytest.mark.parametrize("exercise", CHECKS)
def test_every_exercise_has_mistakes_known_and_unknown(exercise: str) -> None:
    assert_known_and_unknown(MISTAKES, exercise)


@pytest.mark.parametrize("exercise", CHECKS)
def test_another_right_answer_passes(exercise: str) -> None:
    run_check(CHECKS[exercise], getattr(other, exercise))


@pytest.mark.parametrize("exercise", CHECKS)
def test_check_is_quick(exercise: str) -> None:
    assert_quick(CHECKS[exercise], getattr(ref, exercise))


# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "activation.clone() -> activation",  # of this run, or of a cache that nobody else has
    "run_with_cache(model, tokens, names=names) -> run_with_cache(model, tokens)",  # keeps more
    "run_with_cache(model, dataset.tokens, names=place) -> run_with_cache(model, dataset.tokens)",
    "name == 'final' -> name >= 'final'",  # the others begin with "blocks"
    "... if head is None else (slice(None), slice(None), head) -> (slice(None), slice(None), head)",  # an axis of 1
    "first[at].item() -> first[at]",  # tensors can be sorted
}


@pytest.mark.slow
@pytest.mark.parametrize("exercise", CHECKS)
def test_small_changes_of_the_reference_are_refused(exercise: str) -> None:
    """One operator, number, comparison or argument at a time. Only what needs a GPU to be seen is let off."""
    assert survivors(Path(ref.__file__), exercise, CHECKS[exercise], only_on_gpu="device") <= STILL_RIGHT


# ---------------------------------------------------------------------------------- the reference, on a real model

SOLUTIONS = pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
CLEAN, CORRUPTED = torch.randint(31, (2, 3, 6), generator=torch.Generator().manual_seed(3))


def random_model(make: Callable[..., nn.Module], **sizes: Any) -> nn.Module:
    cfg = {"d_vocab": 31, "n_ctx": 17, "n_layers": 3, "n_heads": 4, "d_model": 20, "d_head": 5, "d_mlp": 24}
    model = make(TransformerConfig(**(cfg | sizes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return model


@pytest.fixture(params=[ch02.Transformer, other_transformer.Transformer], ids=["reference", "other"])
def make(request: pytest.FixtureRequest) -> Any:
    """A `Transformer`, whoever wrote it."""
    return request.param


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


@SOLUTIONS
@pytest.mark.parametrize("layer", [0, 2])
def test_direct_effect_is_what_the_head_writes(module: Any, make: Any, layer: int) -> None:
    """Without MLPs: the change of z, through W_O, added to the last stream; then LayerNorm and unembedding."""
    model = random_model(make, attn_only=True, d_mlp=0)
    with torch.no_grad():
        (_, own), (_, source) = (run_with_cache(model, tokens) for tokens in (CLEAN, CORRUPTED))
        written = (source["z", layer] - own["z", layer])[:, :, 1] @ model.blocks[layer].attn.W_O[1]
        expected = metric(model.unembed(model.ln_final(own["resid_post", -1] + written)))
    actual = module.path_patch(model, CLEAN, CORRUPTED, [(layer, 1)], [("final", None)], metric)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@SOLUTIONS
def test_all_heads_of_the_last_layer_have_direct_effects_only(module: Any, make: Any) -> None:
    """So path patching and activation patching agree there, but for the last MLP, which has to take part."""
    model = random_model(make)
    with torch.no_grad():
        _, source = run_with_cache(model, CORRUPTED)
    paths = module.path_patch_heads(model, CLEAN, CORRUPTED, [("final", None)], metric, freeze_mlps=False)
    whole = ref.patch_heads(model, CLEAN, source, metric)
    torch.testing.assert_close(paths[-1], whole[-1], rtol=1e-4, atol=1e-4)
    assert (paths[0] - whole[0]).abs().max() > 1e-3


@SOLUTIONS
def test_one_by_one_and_together_agree(module: Any, make: Any) -> None:
    model, receivers = random_model(make), [("blocks.2.attn.hook_v", 3), ("blocks.1.attn.hook_q", 0)]
    together = module.path_patch_heads(model, CLEAN, CORRUPTED, receivers, metric, max_rows=10)
    for layer, head in ((0, 2), (1, 1), (2, 0)):
        alone = module.path_patch(model, CLEAN, CORRUPTED, [(layer, head)], receivers, metric).mean()
        torch.testing.assert_close(together[layer, head], alone, rtol=1e-5, atol=1e-5)


def circuit(make: Callable[..., nn.Module]) -> nn.Module:
    """Head 0.0 copies tokens to places 3 to 5 of the stream; 1.1 reads there, and says it; 1.0 reads 0 to 2."""
    sizes: dict[str, Any] = {"d_vocab": 3, "n_layers": 2, "n_heads": 2, "d_model": 9, "d_head": 3}
    model: Any = random_model(make, attn_only=True, d_mlp=0, normalization="none", **sizes)
    eye = torch.eye(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[:, :3] = eye
        for layer, head, reads, writes in ((0, 0, 0, 3), (1, 1, 3, 6), (1, 0, 0, 6)):
            model.blocks[layer].attn.W_V[head, reads : reads + 3] = eye
            model.blocks[layer].attn.W_O[head, :, writes : writes + 3] = eye
        model.unembed.W_U[6:] = eye
    return model


@SOLUTIONS
def test_a_circuit_built_by_hand_is_found(module: Any, make: Any) -> None:
    model = circuit(make)
    clean, corrupted = torch.tensor([[0, 1, 1, 2]]), torch.tensor([[2, 2, 1, 2]])

    def zeroth(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 0]

    base = zeroth(model(clean)).mean().detach()
    found = {}
    for receiver in [*((f"blocks.1.attn.hook_{w}", h) for w in "qkv" for h in (0, 1)), ("final", None)]:
        table = module.path_patch_heads(model, clean, corrupted, [receiver], zeroth) - base
        found[receiver] = [tuple(at) for at in (table.abs() > 1e-6).nonzero().tolist()]
    expected: dict[Any, Any] = {receiver: [] for receiver in found}
    expected |= {("blocks.1.attn.hook_v", 1): [(0, 0)], ("final", None): [(1, 0), (1, 1)]}
    assert found == expected


@pytest.mark.parametrize(
    ("senders", "receivers", "words"),
    [
        ([(0, 0), (5, 1)], [("final", None)], "no head 5.1"),
        ([], [("blocks.1.attn.hook_z", 0)], "no path ends at 'blocks.1.attn.hook_z'"),
        ([], [("blocks.1.attn.hook_q", 4)], "blocks.1.attn.hook_q has no head 4"),
        ([], [("blocks.1.attn.hook_q", None)], "blocks.1.attn.hook_q has no head None"),
        ([], [("final", 2)], "the final stream belongs to no head"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(senders: Any, receivers: Any, words: str) -> None:
    model = random_model(ch02.Transformer)
    with pytest.raises(ValueError, match=words):
        ref.path_patch(model, CLEAN, CORRUPTED, senders, receivers, metric)


def test_a_copying_head_built_by_hand_scores_1(make: Any) -> None:
    """Head 1.0 says what it reads, 0.0 and 1.1 say something else, and 0.1 nothing at all."""
    dataset: Any = type("Prompts", (), {})()
    dataset.tokens = torch.tensor([[0, 1, 1, 2], [2, 1, 0, 0]])
    dataset.positions = {"IO": torch.tensor([0, 1]), "S1": torch.tensor([2, 0])}
    scores = ref.name_copying_scores(circuit(make), dataset, k=1)
    assert scores[1, 0] == 1.0 and scores[0, 0] < 1.0
    assert ref.name_copying_scores(circuit(make), dataset, sign=-1, k=1)[1, 0] == 0.0
