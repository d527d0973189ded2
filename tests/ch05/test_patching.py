"""Chapter 05's checks of its first half, against mistakes that learners make, and right answers in another style.

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
from course_utils.checks.ch05.patching import MIXED
from course_utils.config import TransformerConfig
from course_utils.hooks import ActivationCache, hook_points, hooks, run_with_cache, run_with_hooks
from tests.ch02 import other_transformer
from tests.ch05 import other_patching as other
from tests.support.mistakes import Mistake, assert_known_and_unknown, assert_quick, assert_refused
from tests.support.mutation import survivors

OURS = (".ch05.task", ".ch05.patching")
CHECKS = {name: check for name, check in find_checks()["05"].items() if check.__module__.endswith(OURS)}
ALL = slice(None)
MISTAKES: list[Mistake] = []


def mistake(exercise: str, words: str, answer: Any, surprise: bool = False) -> None:
    """Note a wrong answer."""
    MISTAKES.append(Mistake(exercise, words, answer, surprise))


# ------------------------------------------------------------------------------------------------------------ the task


def difference(logits: Any, dataset: Any, place: Any = None, scores: Any = None) -> Any:
    rows = torch.arange(len(logits))
    last = (logits if scores is None else scores)[rows, dataset.positions["END"] if place is None else place]
    return last[rows, dataset.io] - last[rows, dataset.s]


def differing(words: str, answer: Any, surprise: bool = False) -> None:
    mistake("logit_difference", words, answer, surprise)


differing("the sign is wrong", lambda lo, d: -difference(lo, d))
differing("it looks at the last position", lambda lo, d: difference(lo, d, -1))
differing("it looks at S2", lambda lo, d: difference(lo, d, d.positions["S2"]))
differing("differences of probabilities", lambda lo, d: difference(lo, d, scores=lo.softmax(-1)))
differing("it is the mean over the prompts", lambda lo, d: difference(lo, d).mean())
differing("every prompt is read at the first one's END", lambda lo, d: difference(lo, d, d.positions["END"][:1]))
differing("values are wrong", lambda lo, d: difference(lo, d, d.positions["IO"]), True)
differing("values are wrong", lambda lo, d: difference(lo, d).abs(), True)
differing("wrong shape", lambda lo, d: lo[:, -1][:, d.io] - lo[:, -1][:, d.s], True)


def normalising(words: str, value: Callable[[Any, float, float], Any], surprise: bool = False) -> None:
    def normalised_metric(logits: Any, dataset: Any, clean: float, corrupted: float) -> Any:
        if clean == corrupted:
            raise ValueError
        return value(difference(logits, dataset), clean, corrupted)

    mistake("normalised_metric", words, normalised_metric, surprise)


normalising("the metric is not normalised", lambda x, a, b: x)
normalising("clean and corrupted are swapped", lambda x, a, b: (x - a) / (b - a))
normalising("the sign is wrong", lambda x, a, b: (x - b) / (b - a))
normalising("value is not subtracted", lambda x, a, b: x / (a - b))
normalising("it is divided by clean", lambda x, a, b: (x - b) / a)
normalising("the scale is cut off", lambda x, a, b: ((x - b) / (a - b)).clamp(0, 1))
normalising("without its sign", lambda x, a, b: (x - b) / abs(a - b))
normalising("values are wrong", lambda x, a, b: (x - x.min()) / (x.max() - x.min() + 1e-6), True)
normalising("values are wrong", lambda x, a, b: (x - b) / (a + b), True)
mistake(
    "normalised_metric",
    "should raise ValueError",
    lambda lo, d, a, b: (difference(lo, d) - b) / (a - b if a != b else 1.0),
    True,
)


def table(exercise: str, words: str, change: Callable[..., Any], surprise: bool = False) -> None:
    """The reference's answer, spoiled afterwards."""

    def answer(*arguments: Any) -> Any:
        return change(getattr(ref, exercise)(*arguments), *arguments)

    mistake(exercise, words, answer, surprise)


table("accumulated_residual", "the last row is missing", lambda rows, cache: rows[:-1])
table("accumulated_residual", "the first row is missing", lambda rows, cache: rows[1:])
table("accumulated_residual", "in reverse order", lambda rows, cache: rows.flip(0))
table(
    "accumulated_residual",
    "`resid_mid` is taken",
    lambda rows, cache: torch.cat([cache.stack("resid_mid"), rows[-1:]]) if ("resid_mid", 0) in cache else rows,
)
table("accumulated_residual", "what each layer adds", lambda rows, cache: torch.cat([rows[:1], rows.diff(dim=0)]))
table("accumulated_residual", "values are wrong", lambda rows, cache: rows.cumsum(0), True)
table("accumulated_residual", "values are wrong", lambda rows, cache: rows.roll(1, 0), True)


def lens(words: str, surprise: bool = False, **wrong: Any) -> None:
    def logit_lens(cache: Any, model: Any, directions: Any) -> Any:
        rows = ref.accumulated_residual(cache)
        if wrong.get("reverse"):
            rows = rows.flip(0)
        normal = wrong.get("norm", lambda rows, cache, model: model.ln_final(rows))(rows, cache, model)
        return wrong.get("then", lambda values: values)(
            torch.einsum("lbpd,bd->lbp", normal, wrong.get("direction", lambda d: d)(directions))
        )

    mistake("logit_lens", words, logit_lens, surprise)


def _last_scale(rows: Any, cache: Any, model: Any) -> Any:
    centred = rows - rows.mean(-1, keepdim=True)
    return centred / cache["ln_final.scale"] * model.ln_final.w + model.ln_final.b


lens("LayerNorm is left out", norm=lambda rows, cache, model: rows)
lens("divided by the scale of the last", norm=_last_scale)
lens("only the last position", then=lambda values: values[..., -1])
lens("the last row is missing", then=lambda values: values[:-1])
lens("in reverse order", reverse=True)
lens("the first one's direction", direction=lambda d: d[:1].expand_as(d))
lens("values are wrong", then=lambda values: values - values[:1], surprise=True)
lens("values are wrong", direction=lambda d: d / d.norm(dim=-1, keepdim=True), surprise=True)


def attributing(words: str, surprise: bool = False, **wrong: Any) -> None:
    def head_attribution(cache: Any, model: Any, directions: Any) -> Any:
        rows = []
        for layer, block in enumerate(model.blocks):
            part = torch.einsum("bphd,hdm->hbpm", cache["z", layer], block.attn.W_O)
            if wrong.get("bias"):
                part = part + block.attn.b_O / len(part)
            if wrong.get("module"):
                rows.append(model.ln_final(part))
                continue
            centred = part if wrong.get("uncentred") else part - part.mean(-1, keepdim=True)
            scale = cache["ln_final.scale"][:, wrong.get("at", ALL)]
            if wrong.get("own"):
                scale = (centred.square().mean(-1, keepdim=True) + 0.1).sqrt()
            scaled = centred / (1 if wrong.get("unscaled") else scale) * (1 if wrong.get("no_w") else model.ln_final.w)
            rows.append(scaled + (model.ln_final.b if wrong.get("constant") else 0))
        values = torch.einsum("lhbpm,bm->lhbp", torch.stack(rows), directions)
        return wrong.get("then", lambda values: values)(values)

    mistake("head_attribution", words, head_attribution, surprise)


attributing("scale is left out", unscaled=True)
attributing("`w` is left out", no_w=True)
attributing("own mean is not subtracted", uncentred=True)
attributing("a scale of its own", own=True)
attributing("applied to each head alone", module=True)
attributing("`ln_final.b` is added", constant=True)
attributing("`b_O` is spread", bias=True)
attributing("the scale of the last", at=slice(-1, None))
attributing("only the last position", then=lambda values: values[..., -1])
attributing("in reverse order", then=lambda values: values.flip(0))
attributing("values are wrong", then=lambda values: values.flip(1), surprise=True)
attributing("values are wrong", then=lambda values: values.sum(-1, keepdim=True).expand_as(values), surprise=True)
attributing("values are wrong", then=lambda values: values / values.sum((0, 1)), surprise=True)

# ------------------------------------------------------------------------------------------------------------- patches

Run = Callable[..., Any]


def patched(model: Any, tokens: Any, source_cache: Any, name: str, index: Any, **wrong: Any) -> Any:
    """A run_patched with switches for what people get wrong."""
    place = index if wrong.get("no_batch") else (ALL, *index)

    def fn(activation: Any, hook: Any) -> Any:
        source = source_cache[name]
        if wrong.get("into_cache"):
            source[place] = activation[place]
            return source
        out = activation.clone()
        if wrong.get("whole"):
            return source.clone()
        if wrong.get("transposed") and "pattern" in name:
            source = source.mT
        if wrong.get("first"):
            source = source[:1].expand_as(source)
        if wrong.get("mean"):
            source = source.mean(0, keepdim=True).expand_as(source)
        if wrong.get("add"):
            out[place] = out[place] + source[place]
        elif wrong.get("zero"):
            out[place] = 0
        elif not wrong.get("nothing"):
            out[place] = source[place]
        return out

    if wrong.get("stays"):
        for point_name, point in hook_points(model).items():
            if point_name == name:
                point.add(fn)
        with torch.no_grad():
            return model(tokens)
    if wrong.get("clears"):
        point = hook_points(model)[name]
        point.add(fn)
        with torch.no_grad():
            logits = model(tokens)
        point.clear()
        return logits
    if wrong.get("graph"):
        return run_with_hooks(model, tokens, hooks={name: fn})
    with torch.no_grad():
        return run_with_hooks(model, tokens, hooks={name: fn})


def swapped_roles(model: Any, tokens: Any, source_cache: Any, name: str, index: Any) -> Any:
    """Runs on the source's text (told from its embeddings), and patches from the other run."""
    with torch.no_grad():
        _, own = run_with_cache(model, tokens)
    return patched(model, source_tokens(model, source_cache), own, name, index)


def one(words: str, answer: Run, surprise: bool = False) -> None:
    mistake("run_patched", words, answer, surprise)


def with_wrong(**wrong: Any) -> Run:
    return lambda model, tokens, cache, name, index: patched(model, tokens, cache, name, index, **wrong)


one("nothing is patched", with_wrong(nothing=True))
one("clean and corrupted are swapped", swapped_roles)
one("the whole activation is patched", with_wrong(whole=True))
one("the batch axis comes before it", with_wrong(no_batch=True))
one("in the cache", with_wrong(into_cache=True))
one("a hook is left behind", with_wrong(stays=True), True)
one("hooks of others", with_wrong(clears=True), True)
one("gradients are recorded", with_wrong(graph=True), True)
one("values are wrong", with_wrong(add=True), True)
one("values are wrong", with_wrong(zero=True), True)
one("values are wrong", with_wrong(mean=True), True)
one("values are wrong", with_wrong(transposed=True), True)


Grid = Callable[[Any, Any], tuple[list[Any], tuple[int, ...]]]


def stream_grid(model: Any, tokens: Any, place: str = "resid_pre", last: str = "resid_post") -> Any:
    n, n_pos = model.cfg.n_layers, tokens.shape[1]
    names = [*(f"blocks.{layer}.hook_{place}" for layer in range(n)), f"blocks.{n - 1}.hook_{last}"]
    return [(name, (pos,)) for name in names for pos in range(n_pos)], (n + 1, n_pos)


def component_grid(model: Any, tokens: Any) -> Any:
    n, n_pos = model.cfg.n_layers, tokens.shape[1]
    names = [f"blocks.{layer}.hook_{part}" for part in ("attn_out", "mlp_out") for layer in range(n)]
    return [(name, (pos,)) for name in names for pos in range(n_pos)], (2, n, n_pos)


def head_grid(model: Any, tokens: Any, which: str = "z") -> Any:
    n, n_heads = model.cfg.n_layers, model.cfg.n_heads
    index = (lambda head: (head,)) if which == "pattern" else (lambda head: (ALL, head))
    names = [(f"blocks.{layer}.attn.hook_{which}", index(head)) for layer in range(n) for head in range(n_heads)]
    return names, (n, n_heads)


def place_grid(model: Any, tokens: Any) -> Any:
    n, n_heads, n_pos = model.cfg.n_layers, model.cfg.n_heads, tokens.shape[1]
    return [
        (f"blocks.{layer}.attn.hook_z", (pos, head))
        for layer in range(n)
        for head in range(n_heads)
        for pos in range(n_pos)
    ], (n, n_heads, n_pos)


GRIDS: dict[str, Grid] = {
    "patch_residual_stream": stream_grid,
    "patch_components": component_grid,
    "patch_heads": head_grid,
    "patch_heads_by_position": place_grid,
    "patch_head_inputs": head_grid,
}


def sweep(exercise: str, words: str, surprise: bool = False, **wrong: Any) -> None:
    """A sweep with switches for what people get wrong."""

    def fn(model: Any, tokens: Any, source_cache: Any, metric: Any, *which: str) -> Any:
        if which and which[0] not in ("q", "k", "v", "pattern", "z"):
            raise ValueError
        patches, shape = wrong.get("grid", GRIDS[exercise])(model, tokens, *which)
        patches = wrong.get("patches", lambda patches: patches)(patches)
        run = wrong.get("run", patched)
        values, pile = [], []
        for name, index in patches:
            if name not in hook_points(model):  # a model without MLPs
                with torch.no_grad():
                    logits = model(tokens)
            elif wrong.get("piling"):
                pile.append((name, lambda a, hook, i=index: put(a, source_cache[hook.name], i)))
                with torch.no_grad():
                    logits = run_with_hooks(model, tokens, hooks=pile)
            else:
                logits = run(model, tokens, source_cache, name, index, **wrong.get("how", {}))
            values.append(wrong.get("reduce", torch.mean)(metric(logits)))
        answer = torch.stack(values).reshape(shape)
        return wrong.get("then", lambda answer, *_: answer)(answer, model, tokens, metric)

    mistake(exercise, words, fn, surprise)


def put(activation: Any, source: Any, index: Any) -> Any:
    out = activation.clone()
    out[(ALL, *index)] = source[(ALL, *index)]
    return out


def anywhere(patches: Any) -> Any:
    return [(name, (ALL, *index[1:])) for name, index in patches]


def change(answer: Any, model: Any, tokens: Any, metric: Any) -> Any:
    with torch.no_grad():
        return answer - metric(model(tokens)).mean()


for exercise in GRIDS:
    sweep(exercise, "clean and corrupted are swapped", run=swapped_roles)
    sweep(exercise, "nothing is patched", how={"nothing": True})
    sweep(exercise, "earlier patches are still there", piling=True)
    sweep(exercise, "it is how much the patch changed the metric", then=change)
    sweep(exercise, "is summed over the prompts", reduce=torch.sum)
    sweep(exercise, "it is the first prompt's metric", reduce=lambda values: values[0])
    sweep(exercise, "activation is patched into all prompts", how={"first": True})
    sweep(exercise, "in the cache", how={"into_cache": True}, surprise=True)
    sweep(exercise, "a hook is left behind", how={"stays": True}, surprise=True)
    sweep(exercise, "wrong", how={"zero": True}, surprise=True)
    sweep(exercise, "wrong", reduce=lambda values: values.median(), surprise=True)
    sweep(exercise, "gradients are recorded", how={"graph": True}, surprise=True)

for exercise in ("patch_residual_stream", "patch_components"):
    sweep(exercise, "everything is patched at once" if "res" in exercise else "at once", how={"whole": True})
    sweep(exercise, "the positions are off by one", then=lambda answer, *_: answer.roll(1, -1))
sweep("patch_residual_stream", "`resid_post` or `resid_mid`", grid=lambda m, t: stream_grid(m, t, *mid(m)))
sweep("patch_residual_stream", "`resid_post` or `resid_mid`", grid=lambda m, t: stream_grid(m, t, "resid_post"))
sweep("patch_residual_stream", "in reverse order", then=lambda answer, *_: answer.flip(0))
sweep("patch_residual_stream", "became a reshape", then=lambda answer, *_: answer.T.reshape(answer.shape))
sweep("patch_components", "attention and MLPs are swapped", then=lambda answer, *_: answer.flip(0))
sweep("patch_components", "the streams are patched", patches=lambda patches: [(to_stream(n), i) for n, i in patches])
sweep("patch_heads", "hook_v is patched", grid=lambda m, t: head_grid(m, t, "v"))
sweep("patch_heads", "hook_pattern is patched", grid=lambda m, t: head_grid(m, t, "pattern"))
for exercise in ("patch_heads", "patch_head_inputs"):
    sweep(exercise, "became a reshape", then=lambda answer, *_: answer.T.reshape(answer.shape))
    sweep(exercise, "in reverse order", then=lambda answer, *_: answer.flip(0))
    sweep(exercise, "at once", how={"whole": True})
    sweep(exercise, "a head's number is used as a position", patches=lambda p: [(n, i[-1:]) for n, i in p])
    sweep(exercise, "only the last position", patches=lambda p: [(n, (-1, *i[1:]) if len(i) > 1 else i) for n, i in p])
sweep("patch_head_inputs", "the pattern is transposed", how={"transposed": True})
sweep("patch_head_inputs", 'it patches "z" here', grid=lambda m, t, which: head_grid(m, t, "z"))
sweep("patch_head_inputs", 'it patches "v" here', grid=lambda m, t, w: head_grid(m, t, {"v": "k", "k": "v"}.get(w, w)))
sweep(
    "patch_head_inputs",
    "on the wrong axis",
    patches=lambda p: [(n, (ALL, i[-1]) if "pattern" in n else i) for n, i in p],
)
sweep("patch_heads_by_position", "all positions are patched", patches=anywhere)
sweep("patch_heads_by_position", "all heads of a layer", patches=lambda p: [(n, i[:1]) for n, i in p])
sweep("patch_heads_by_position", "became a reshape", then=lambda answer, *_: answer.mT.reshape(answer.shape))


def mid(model: Any) -> tuple[str, str]:
    return ("resid_pre" if model.cfg.attn_only else "resid_mid"), "resid_post"


def to_stream(name: str) -> str:
    return name.replace("attn_out", "resid_pre").replace("mlp_out", "resid_mid")


def going_on(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A run_from with switches for what people get wrong."""

    def run_from(model: Any, resid: Any, layer: int) -> Any:
        for block in wrong.get("blocks", lambda blocks, layer: blocks[layer:])(list(model.blocks), layer):
            resid = block(resid) + (resid if wrong.get("adds") else 0)
        resid = resid if wrong.get("bare") else model.ln_final(resid)
        return wrong.get("then", lambda logits: logits)(model.unembed(resid))

    mistake("run_from", words, run_from, surprise)


going_on("the final LayerNorm is left out", bare=True)
going_on("all layers are run", blocks=lambda blocks, layer: blocks)
going_on("the layer itself is left out", blocks=lambda blocks, layer: blocks[layer + 1 :])
going_on("only that one layer is run", blocks=lambda blocks, layer: blocks[layer : layer + 1])
going_on("in reverse order", blocks=lambda blocks, layer: blocks[layer:][::-1])
going_on("values are wrong", adds=True, surprise=True)
going_on("all layers are run", blocks=lambda blocks, layer: blocks[layer - len(blocks) :])  # at n_layers
going_on("wrong", then=lambda logits: logits.log_softmax(-1), surprise=True)


def batched(words: str, surprise: bool = False, **wrong: Any) -> None:
    """A batched_sweep with switches for what people get wrong."""

    def batched_sweep(model: Any, tokens: Any, source_cache: Any, metric: Any, patches: Any, max_rows: int = 64) -> Any:
        n, depth = len(tokens), model.cfg.n_layers
        fit = wrong.get("fit", lambda max_rows, n: max(1, max_rows // n))(max_rows, n)
        with torch.no_grad():
            _, own = run_with_cache(model, source_tokens(model, source_cache) if wrong.get("from_source") else tokens)
        streams = ref.accumulated_residual(source_cache if wrong.get("source_streams") else own)
        order = list(range(len(patches)))
        order.sort(key=wrong.get("sort", lambda i: ref.first_layer(patches[i][0], depth)))
        values = []
        for start in range(0, len(order), fit):
            group = [patches[i] for i in order[start : start + fit]]
            layer = min(wrong.get("layer", ref.first_layer)(name, depth) for name, _ in group)

            def fn(activation: Any, hook: Any, group: Any = group) -> Any:
                out = activation.clone()
                for copy, (name, index) in enumerate(group):
                    if name == hook.name:
                        rows = ALL if wrong.get("all_rows") else slice(copy * n, copy * n + n)
                        source = source_cache[name]
                        source = (
                            source.repeat(len(group), *[1] * (source.ndim - 1)) if wrong.get("all_rows") else source
                        )
                        out[rows][(ALL, *index)] = source[(ALL, *index)]
                return out

            def repeat(tensor: Any, times: int = len(group)) -> Any:
                if wrong.get("interleaved"):
                    return tensor.repeat_interleave(times, 0)
                return torch.cat([tensor] * times)

            names = dict.fromkeys(name for name, _ in group)
            with torch.no_grad(), hooks(model, dict.fromkeys(names, fn)):
                logits = model(repeat(tokens)) if layer < 0 else ref.run_from(model, repeat(streams[layer]), layer)
            copies = logits[None] if wrong.get("all_logits") else logits.split(n)
            values += [wrong.get("reduce", torch.mean)(metric(copy)) for copy in copies]
        if not wrong.get("as_sorted"):
            values = [values[order.index(i)] for i in range(len(order))]
        return torch.stack(values)

    mistake("batched_sweep", words, batched_sweep, surprise)


def source_tokens(model: Any, source_cache: Any) -> Any:
    """The source's text, told from its embeddings."""
    return (source_cache["hook_embed"][:, :, None] - model.embed.W_E).abs().sum(-1).argmin(-1)


def alphabetical(i: int) -> str:
    return MIXED[i][0]


batched("in the order of the layers", as_sorted=True)
batched("in the order of the hook points", sort=alphabetical, as_sorted=True)
batched("each patch acts on all copies", all_rows=True)
batched("values are wrong", interleaved=True, surprise=True)
batched("the metric was given logits", all_logits=True, surprise=True)
batched("one forward had", fit=lambda max_rows, n: max(1, max_rows), surprise=True)
batched("are enough, and one without a patch", fit=lambda max_rows, n: 1, surprise=True)
batched("times through a layer", layer=lambda name, n_layers: -1, surprise=True)
batched("times through a layer", sort=lambda i: i, surprise=True)
batched("nothing is patched", layer=lambda name, n: min(ref.first_layer(name, n) + 1, n))
batched("values are wrong", source_streams=True, surprise=True)
batched("values are wrong", from_source=True, surprise=True)
batched("summed over the prompts", reduce=torch.sum)
batched("it is the first prompt's metric", reduce=lambda values: values[0])

# --------------------------------------------------------------------------------------------------------- attribution


def estimating(words: str, surprise: bool = False, **wrong: Any) -> None:
    """An attribution_patching with switches for what people get wrong."""

    def attribution_patching(model: Any, tokens: Any, source_cache: Any, metric: Any, names: Any) -> Any:
        logits, cache = run_with_cache(model, tokens, names=names)
        total = wrong.get("reduce", torch.sum)(metric(logits))
        if wrong.get("backward"):
            total.backward()
            grads = [cache.grad(name) for name in names]
        else:
            grads = torch.autograd.grad(total, [cache[name] for name in names])
        step = wrong.get("step", lambda source, own: source - own)
        answers = {n: g * step(source_cache[n], cache[n].detach()) for n, g in zip(names, grads, strict=True)}
        if wrong.get("gradient"):
            answers = dict(zip(names, grads, strict=True))
        if wrong.get("difference"):
            answers = {n: source_cache[n] - cache[n].detach() for n in names}
        if wrong.get("attached"):
            answers = {n: g * (source_cache[n] - cache[n]) for n, g in zip(names, grads, strict=True)}
        return wrong.get("then", lambda answers: answers)(answers)

    mistake("attribution_patching", words, attribution_patching, surprise)


estimating("the sign is wrong", step=lambda source, own: own - source)
estimating("by the source's activation", step=lambda source, own: source)
estimating("by the run's own activation", step=lambda source, own: own)
estimating("it is the gradient alone", gradient=True)
estimating("it is the difference alone", difference=True)
estimating("averaged before the backward", reduce=torch.mean)
estimating("it left a gradient in the model's", backward=True, surprise=True)
estimating("still has its graph", attached=True, surprise=True)
estimating("values are wrong", step=lambda source, own: (source - own).abs(), surprise=True)
estimating("wrong shape", then=lambda answers: {n: a.sum(-1) for n, a in answers.items()}, surprise=True)
estimating("expected a dictionary", then=lambda answers: dict(list(answers.items())[:2]), surprise=True)


def stepping(words: str, surprise: bool = False, **wrong: Any) -> None:
    """An integrated_attribution with switches for what people get wrong."""

    def integrated_attribution(
        model: Any, tokens: Any, source_cache: Any, metric: Any, names: Any, steps: int = 8
    ) -> Any:
        with torch.no_grad():
            _, own = run_with_cache(model, tokens)
        far = source_cache["hook_embed"] - own["hook_embed"]
        sums = dict.fromkeys(names, 0.0)
        for step in range(steps):
            share = wrong.get("share", lambda step, steps: (step + 0.5) / steps)(step, steps)
            with hooks(model, {"hook_embed": lambda embed, hook, share=share: embed + share * far}):
                logits, cache = run_with_cache(model, tokens, names=names)
            grads = torch.autograd.grad(metric(logits).sum(), [cache[name] for name in names])
            for name, grad in zip(names, grads, strict=True):
                here = cache[name].detach() if wrong.get("here") else own[name]
                way = (source_cache[name] - here).detach()
                sums[name] = sums[name] + wrong.get("sign", 1) * grad * way / (1 if wrong.get("sum") else steps)
        return sums

    mistake("integrated_attribution", words, integrated_attribution, surprise)


stepping("only the gradient at the start", share=lambda step, steps: 0.0)
stepping("at their beginnings", share=lambda step, steps: step / steps)
stepping("at their ends", share=lambda step, steps: (step + 1) / steps)
stepping("the sign is wrong", sign=-1)
stepping("summed over the steps", sum=True)
stepping("values are wrong", here=True, surprise=True)
stepping("values are wrong", share=lambda step, steps: 0.5 if steps > 1 else 0.4, surprise=True)

# ------------------------------------------------------------------------------------------------------ the tests


@pytest.mark.parametrize("mistake", [pytest.param(m, id=f"{m.exercise}: {m.words[:50]}") for m in MISTAKES])
def test_mistake_is_refused_with_its_words(mistake: Mistake) -> None:
    assert_refused(CHECKS[mistake.exercise], mistake, secrets=("einsum(", ".repeat(", "slice(None), *index"))


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
    "activation.clone() -> activation",  # the run's own activation may be changed, the cache's may not
    "True -> False",  # strict=
    "zip(names, gradients, activations, strict=True) -> zip(names, gradients, activations)",
    "zip(names, gradients, strict=True) -> zip(names, gradients)",
    "layer == -1 -> layer <= -1",  # there is nothing below -1
    "zip(group, logits.split(n_batch), strict=True) -> zip(group, logits.split(n_batch))",
    "run_with_cache(model, tokens, names='*.hook_resid_*') -> run_with_cache(model, tokens)",  # keeps more
    "run_with_cache(model, tokens, names=names) -> run_with_cache(model, tokens)",  # keeps more
    "run_with_cache(model, tokens, names=[*names, 'hook_embed']) -> run_with_cache(model, tokens)",
    "(source_cache[name] - own[name]).detach() -> source_cache[name] - own[name]",  # the source may have a graph
}


@pytest.mark.slow
@pytest.mark.parametrize("exercise", CHECKS)
def test_small_changes_of_the_reference_are_refused(exercise: str) -> None:
    """One operator, number, comparison or argument at a time. Only what needs a GPU to be seen is let off."""
    assert survivors(Path(ref.__file__), exercise, CHECKS[exercise], only_on_gpu="device") <= STILL_RIGHT


# ---------------------------------------------------------------------------------- the reference, on a real model

TINY = TransformerConfig(d_vocab=31, n_ctx=17, n_layers=2, n_heads=3, d_model=20, d_head=5, d_mlp=24)
SOLUTIONS = pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
TOKENS = torch.randint(31, (2, 2, 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=[ch02.Transformer, other_transformer.Transformer], ids=["reference", "other"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A small transformer in which every parameter is random, whoever wrote it."""
    made = request.param(TINY)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return made


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def source_run(model: nn.Module) -> tuple[torch.Tensor, ActivationCache]:
    with torch.no_grad():
        return run_with_cache(model, TOKENS[1])


@SOLUTIONS
def test_everything_patched_is_the_source_run(module: Any, model: nn.Module) -> None:
    """At depth 0 the whole stream decides, and at the end the last position alone does."""
    logits, cache = source_run(model)
    patched_logits = module.run_patched(model, TOKENS[0], cache, "blocks.0.hook_resid_pre", (ALL,))
    torch.testing.assert_close(patched_logits, logits, rtol=1e-4, atol=1e-4)
    streams = module.patch_residual_stream(model, TOKENS[0], cache, metric)
    torch.testing.assert_close(streams[-1, -1], metric(logits).mean(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        base = metric(model(TOKENS[0])).mean()
    torch.testing.assert_close(streams[-1, :-1], base.expand(5), rtol=1e-4, atol=1e-4)


@SOLUTIONS
def test_one_by_one_and_together_agree(module: Any, model: nn.Module) -> None:
    _, cache = source_run(model)
    patches = [(f"blocks.{layer}.attn.hook_z", (ALL, head)) for layer in range(2) for head in range(3)]
    one_by_one = module.patch_heads(model, TOKENS[0], cache, metric)
    for max_rows in (1, 7, 64):
        together = module.batched_sweep(model, TOKENS[0], cache, metric, patches, max_rows)
        torch.testing.assert_close(together, one_by_one.flatten(), rtol=1e-5, atol=1e-5)


@SOLUTIONS
def test_the_rest_of_a_run_is_that_of_the_run(module: Any, model: nn.Module) -> None:
    with torch.no_grad():
        logits, cache = run_with_cache(model, TOKENS[0])
        for layer, resid in enumerate(ref.accumulated_residual(cache)):
            torch.testing.assert_close(module.run_from(model, resid, layer), logits, rtol=1e-5, atol=1e-5)


@SOLUTIONS
def test_attribution_is_exact_for_a_small_step(module: Any, model: nn.Module) -> None:
    with torch.no_grad():
        _, own = run_with_cache(model, TOKENS[0])
    name = "blocks.1.attn.hook_z"
    nearby = ActivationCache({**dict(own), name: own[name] + 1e-3})
    estimate = module.attribution_patching(model, TOKENS[0], nearby, metric, [name])[name].sum((1, 3)).mean(0)
    with torch.no_grad():
        base = metric(model(TOKENS[0])).mean()
    real = module.patch_heads(model, TOKENS[0], nearby, metric)[1] - base
    torch.testing.assert_close(estimate, real, rtol=0.05, atol=2e-5)


@SOLUTIONS
def test_shares_of_the_heads_and_the_rest_sum_to_the_lens(module: Any, model: nn.Module) -> None:
    _, cache = source_run(model)
    directions = torch.randn(2, 20, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        heads = module.head_attribution(cache, model, directions).sum((0, 1))
        rest = cache["embed"] + cache["pos_embed"] + cache.stack("mlp_out").sum(0)
        rest = rest + sum(block.attn.b_O for block in model.blocks)
        rest = (rest - rest.mean(-1, keepdim=True)) / cache["ln_final.scale"] * model.ln_final.w + model.ln_final.b
        lens = module.logit_lens(cache, model, directions)[-1]
    torch.testing.assert_close(heads + (rest * directions[:, None]).sum(-1), lens, rtol=1e-3, atol=1e-3)
