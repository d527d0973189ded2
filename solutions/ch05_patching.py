"""Chapter 05: patching. Which activations carry a behaviour, found by exchanging them between two runs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from course_utils.families import refuse_gated_mlp, refuse_shared_heads
from course_utils.hooks import HookPoint, hooks, run_with_cache, run_with_hooks

Metric = Callable[[Tensor], Tensor]  # from logits [batch pos d_vocab] to one number for each prompt, [batch]
Patch = tuple[str, tuple[Any, ...]]  # a hook point, and which part of its activation, the batch axis left out

# ----------------------------------------------------------------------------------------------------------- the task


def logit_difference(logits: Float[Tensor, "batch pos d_vocab"], dataset: Any) -> Float[Tensor, " batch"]:
    """Say how much the model prefers the receiver to the giver: logit of `io` minus logit of `s`, for each prompt.

    `dataset` is an `IOIDataset`: `dataset.io` and `dataset.s` are token ids [batch], and the logits that count are
    those at `dataset.positions["END"]` [batch].
    Source: Wang et al. 2022, section 2.
    """
    rows, end = torch.arange(len(logits), device=logits.device), dataset.positions["END"].to(logits.device)
    last = logits[rows, end]
    return last[rows, dataset.io.to(logits.device)] - last[rows, dataset.s.to(logits.device)]


def normalised_metric(
    logits: Float[Tensor, "batch pos d_vocab"], dataset: Any, clean: float, corrupted: float
) -> Float[Tensor, " batch"]:
    """Put the logit difference of each prompt on a scale on which 1 is the clean run and 0 the corrupted one.

    `clean` and `corrupted` are the mean logit differences of the two runs, both with the labels of `dataset`. A patch
    that brings everything back thus scores 1 on average, one that does nothing scores 0; both may be surpassed.
    Raises ValueError where `clean` equals `corrupted`: there is nothing to restore.
    """
    if clean == corrupted:
        raise ValueError(f"normalised_metric: clean and corrupted are both {clean}; the corruption changes nothing.")
    return (logit_difference(logits, dataset) - corrupted) / (clean - corrupted)


# -------------------------------------------------------------------------------------- where is the answer written?


def accumulated_residual(cache: Any) -> Float[Tensor, "depth batch pos d_model"]:
    """Stack the residual stream as it stands before each layer and after the last: n_layers + 1 tensors.

    Row `layer` is that layer's `resid_pre`; the last row is the last layer's `resid_post`. The cache may hold no more.
    """
    return torch.cat([cache.stack("resid_pre"), cache["resid_post", -1][None]])


def logit_lens(cache: Any, model: Any, directions: Float[Tensor, "batch d_model"]) -> Float[Tensor, "depth batch pos"]:
    """Read a direction out of the stream at every depth, as if the model ended there.

    Each vector of `accumulated_residual` goes through the model's own final LayerNorm (with the scale that it has
    itself, not that of the last row), and then onto its prompt's direction: a dot product. With the column of `W_U`
    for `io` minus that for `s` the last row is the logit difference, but for the two tokens' `b_U`.
    Source: nostalgebraist 2020.
    """
    normalised = torch.stack([model.ln_final(resid) for resid in accumulated_residual(cache)])
    return einops.einsum(normalised, directions, "depth batch pos d_model, batch d_model -> depth batch pos")


def head_attribution(
    cache: Any, model: Any, directions: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "layer head batch pos"]:
    """Say how much each head writes, directly, along a direction of the output, at every position.

    What a head adds to the stream is its `z` (in the cache) times its `W_O`. It goes through the final LayerNorm as a
    part of the whole: its own mean is subtracted, it is divided by the scale of the whole stream (`ln_final.scale` in
    the cache) and multiplied by `ln_final.w`; then the dot product with the prompt's direction. `b_O` and `ln_final.b`
    belong to no head and are left out. Where `model.cfg.normalization` is "RMS" no mean is subtracted; where it is
    "none" only the dot product is there.
    Source: Elhage et al. 2021; Wang et al. 2022, section 3.1.
    """
    rows = []
    for layer, block in enumerate(model.blocks):
        result = einops.einsum(
            cache["z", layer], block.attn.W_O, "batch pos head d_head, head d_head d_model -> head batch pos d_model"
        )
        if model.cfg.normalization == "LN":
            result = result - result.mean(dim=-1, keepdim=True)
        if model.cfg.normalization != "none":
            result = result / cache["ln_final.scale"] * model.ln_final.w
        rows.append(einops.einsum(result, directions, "head batch pos d_model, batch d_model -> head batch pos"))
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------ activation patching


@torch.no_grad()
def run_patched(
    model: Any, tokens: Int[Tensor, "batch pos"], source_cache: Any, name: str, index: tuple[Any, ...]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run the model on `tokens` with one part of one activation taken from another run; return the logits.

    `name` is a hook point, and `index` says which part of its activation, the batch axis left out: `(3,)` is position
    3 of a residual stream, `(slice(None), 2)` is head 2 of a `z` at all positions, `(3, 2)` is that head at position
    3, and `(2,)` is head 2 of a pattern. That part is what `source_cache[name]` has there, prompt by prompt; all the
    rest is computed as usual. Neither the cache nor the model is changed, nor are hooks left behind, and no gradients
    are recorded.
    Source: Vig et al. 2020; Meng et al. 2022, section 2.1.
    """
    place = (slice(None), *index)

    def patch(activation: Tensor, hook: HookPoint) -> Tensor:
        patched = activation.clone()
        patched[place] = source_cache[name][place]
        return patched

    return run_with_hooks(model, tokens, hooks={name: patch})


def patch_residual_stream(
    model: Any, tokens: Int[Tensor, "batch pos"], source_cache: Any, metric: Metric
) -> Float[Tensor, "depth pos"]:
    """Exchange the residual stream at one depth and position for that of another run; return the metric's mean.

    Entry [layer, pos] is about a run on `tokens` in which that layer's `resid_pre` at `pos` comes from `source_cache`,
    in all prompts at once. The last row, depth n_layers, is about the last layer's `resid_post`. Each entry is a run
    of its own with that one patch and no other, and the mean over the prompts of what `metric(logits)` says, in the
    metric's dtype (as in all sweeps below).
    Source: Meng et al. 2022, section 2.1.
    """
    n_layers, n_pos = model.cfg.n_layers, tokens.shape[1]
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
    values = []
    for name in [*names, f"blocks.{n_layers - 1}.hook_resid_post"]:
        for pos in range(n_pos):
            values.append(metric(run_patched(model, tokens, source_cache, name, (pos,))).mean())
    return torch.stack(values).reshape(n_layers + 1, n_pos)


@torch.no_grad()
def patch_components(
    model: Any, tokens: Int[Tensor, "batch pos"], source_cache: Any, metric: Metric
) -> Float[Tensor, "component layer pos"]:
    """Exchange what one attention layer (component 0) or one MLP (component 1) writes at one position.

    The activations are `attn_out` and `mlp_out`; entries are as in `patch_residual_stream`. In a model without MLPs
    there is nothing to exchange: component 1 then holds the metric's mean of the run without a patch.
    """
    n_layers, n_pos = model.cfg.n_layers, tokens.shape[1]
    values = []
    for place in ["attn_out"] if model.cfg.attn_only else ["attn_out", "mlp_out"]:
        for layer in range(n_layers):
            for pos in range(n_pos):
                logits = run_patched(model, tokens, source_cache, f"blocks.{layer}.hook_{place}", (pos,))
                values.append(metric(logits).mean())
    table = torch.stack(values).reshape(-1, n_layers, n_pos)
    if model.cfg.attn_only:
        unpatched = metric(model(tokens)).mean()
        table = torch.cat([table, unpatched.expand_as(table)])
    return table


def patch_heads(
    model: Any, tokens: Int[Tensor, "batch pos"], source_cache: Any, metric: Metric
) -> Float[Tensor, "layer head"]:
    """Exchange what one head found (its `z`), at all positions at once; return the metric's mean for each head."""
    values = []
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            logits = run_patched(model, tokens, source_cache, f"blocks.{layer}.attn.hook_z", (slice(None), head))
            values.append(metric(logits).mean())
    return torch.stack(values).reshape(model.cfg.n_layers, model.cfg.n_heads)


def run_from(model: Any, resid: Float[Tensor, "batch pos d_model"], layer: int) -> Float[Tensor, "batch pos d_vocab"]:
    """Run the rest of the model, from the residual stream as it stands before a layer; return the logits.

    `resid` is what that layer's `resid_pre` would see. With `layer` n_layers it is the stream after the last layer, and
    only the final LayerNorm and the unembedding are left.
    """
    for block in model.blocks[layer:]:
        resid = block(resid)
    return model.unembed(model.ln_final(resid))


def first_layer(name: str, n_layers: int) -> int:
    """The layer before which a run with a patch at this hook point is like any other: n_layers for those of `ln_final`.

    It is -1 for what comes ahead of the blocks, the embeddings: there is no stream yet.
    """
    if name.startswith("blocks."):
        return int(name.split(".")[1])
    return n_layers if name.startswith("ln_final.") else -1


@torch.no_grad()
def batched_sweep(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    source_cache: Any,
    metric: Metric,
    patches: Sequence[Patch],
    max_rows: int = 64,
) -> Float[Tensor, " patch"]:
    """Try many patches, several of them in one forward: the metric's mean for each, in the order given.

    A patch is a pair (name, index) as in `run_patched`. Sorted by the first layer that they touch, the patches are cut
    into groups. For each group the prompts are repeated along the batch axis, once for each patch, and each patch acts
    on its own copy only. `metric` gets the logits of one copy at a time, [batch pos d_vocab]. A forward has at most
    `max_rows` rows, which bounds the memory, but always room for one patch.
    Before the first layer that a group touches, all of its copies are the run without a patch. So that one is done
    once, ahead of all, and each group starts from its stream, with `run_from`; only a patch of the embeddings needs the
    whole model. The numbers are those of `run_patched`, to 1e-5; there too nothing is changed, left behind or recorded.
    """
    n_batch, n_layers = len(tokens), model.cfg.n_layers
    per_run = max(1, max_rows // n_batch)
    _, own = run_with_cache(model, tokens, names="*.hook_resid_*")
    streams = accumulated_residual(own)
    order = sorted(range(len(patches)), key=lambda number: first_layer(patches[number][0], n_layers))
    answers: dict[int, Tensor] = {}
    for start in range(0, len(order), per_run):
        group = order[start : start + per_run]
        chunk = [patches[number] for number in group]

        def patch(activation: Tensor, hook: HookPoint, chunk: Sequence[Patch] = chunk) -> Tensor:
            patched = activation.clone()
            for copy, (name, index) in enumerate(chunk):
                if name == hook.name:
                    rows = patched[copy * n_batch : (copy + 1) * n_batch]
                    rows[(slice(None), *index)] = source_cache[name][(slice(None), *index)]
            return patched

        layer = first_layer(chunk[0][0], n_layers)
        with hooks(model, dict.fromkeys((name for name, _ in chunk), patch)):
            if layer == -1:
                logits = model(tokens.repeat(len(chunk), 1))
            else:
                logits = run_from(model, streams[layer].repeat(len(chunk), 1, 1), layer)
        answers |= {number: metric(copy).mean() for number, copy in zip(group, logits.split(n_batch), strict=True)}
    return torch.stack([answers[number] for number in range(len(patches))])


def patch_heads_by_position(
    model: Any, tokens: Int[Tensor, "batch pos"], source_cache: Any, metric: Metric
) -> Float[Tensor, "layer head pos"]:
    """Exchange what one head found (its `z`) at one position; return the metric's mean for each head and position."""
    n_layers, n_heads, n_pos = model.cfg.n_layers, model.cfg.n_heads, tokens.shape[1]
    patches: list[Patch] = [
        (f"blocks.{layer}.attn.hook_z", (pos, head))
        for layer in range(n_layers)
        for head in range(n_heads)
        for pos in range(n_pos)
    ]
    return batched_sweep(model, tokens, source_cache, metric, patches).reshape(n_layers, n_heads, n_pos)


def patch_head_inputs(
    model: Any, tokens: Int[Tensor, "batch pos"], source_cache: Any, metric: Metric, which: str
) -> Float[Tensor, "layer head"]:
    """Exchange one of the things of which a head is made, at all positions; return the metric's mean for each head.

    `which` is "q", "k", "v", "pattern" or "z"; what follows from it in the head is computed as usual (with another
    "q" the pattern is another one, and so is z). Raises ValueError for anything else.
    """
    if which not in ("q", "k", "v", "pattern", "z"):
        raise ValueError(f'patch_head_inputs: which={which!r}; it is one of "q", "k", "v", "pattern", "z".')
    if which in ("k", "v"):
        refuse_shared_heads("patch_head_inputs", model)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    patches: list[Patch] = [
        (f"blocks.{layer}.attn.hook_{which}", (head,) if which == "pattern" else (slice(None), head))
        for layer in range(n_layers)
        for head in range(n_heads)
    ]
    return batched_sweep(model, tokens, source_cache, metric, patches).reshape(n_layers, n_heads)


# ----------------------------------------------------------------------------------------------- attribution patching


def attribution_patching(
    model: Any, tokens: Int[Tensor, "batch pos"], source_cache: Any, metric: Metric, names: Sequence[str]
) -> dict[str, Tensor]:
    """Estimate every patch at once, from one forward and one backward: gradient times difference.

    For each hook point in `names` return a tensor of its activation's shape, batch included: how `metric` of that
    prompt changes with the activation in the run on `tokens` (the gradient there), times what `source_cache` has over
    it. Summed over the entries of a patch this estimates by how much that patch changes the metric of each prompt, to
    first order. The parameters' own gradients stay as they are, and what is returned has no graph.
    Source: Nanda 2023; Syed et al. 2023.
    """
    logits, cache = run_with_cache(model, tokens, names=names)
    activations = [cache[name] for name in names]
    gradients = torch.autograd.grad(metric(logits).sum(), activations)
    return {
        name: gradient * (source_cache[name] - activation).detach()
        for name, gradient, activation in zip(names, gradients, activations, strict=True)
    }


def integrated_attribution(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    source_cache: Any,
    metric: Metric,
    names: Sequence[str],
    steps: int = 8,
) -> dict[str, Tensor]:
    """Repair `attribution_patching` where the metric is far from straight: average the gradient along the way.

    Run the model `steps` times on `tokens` with another `embed`: a step of the way from its own to that of
    `source_cache`, at the middle of each of `steps` equal parts (0.25 and 0.75 for two). The mean of the gradients at
    these points takes the place of the one gradient; the difference is that of the two runs, as before, and
    what is returned has no graph.
    Source: Sundararajan et al. 2017; Hanna et al. 2024.
    """
    with torch.no_grad():
        _, own = run_with_cache(model, tokens, names=[*names, "hook_embed"])
    far = source_cache["hook_embed"] - own["hook_embed"]
    totals = {name: torch.zeros_like(own[name]) for name in names}
    for step in range(steps):
        share = (step + 0.5) / steps
        with hooks(model, {"hook_embed": lambda embed, hook, share=share: embed + share * far}):
            logits, cache = run_with_cache(model, tokens, names=names)
        gradients = torch.autograd.grad(metric(logits).sum(), [cache[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            totals[name].add_(gradient)
    return {name: totals[name] / steps * (source_cache[name] - own[name]).detach() for name in names}


# ------------------------------------------------------------------------------------------------------ path patching

Head = tuple[int, int]  # layer and number
Receiver = tuple[str, int | None]  # where a path ends: a hook point of q, k or v, and the head; or ("final", None)


def refuse_unknown(model: Any, senders: Sequence[Head], receivers: Sequence[Receiver]) -> None:
    """Raise ValueError, naming it, for a head that the model does not have, or a place where no path can end."""
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    inputs = [f"blocks.{layer}.attn.hook_{which}" for layer in range(n_layers) for which in ("q", "k", "v")]
    for layer, head in senders:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(f"there is no head {layer}.{head}: {n_layers} layers have {n_heads} heads each.")
    for name, number in receivers:
        if name == "final" and number is not None:
            raise ValueError(f'the final stream belongs to no head: write ("final", None), not ("final", {number}).')
        if name != "final" and name not in inputs:
            raise ValueError(f'no path ends at {name!r}: a receiver is "final" or a hook_q, hook_k or hook_v.')
        if name != "final" and (number is None or not 0 <= number < n_heads):
            raise ValueError(f"{name} has no head {number}: {n_heads} heads are numbered from 0.")
    if any(name.endswith(("hook_k", "hook_v")) for name, _ in receivers):
        refuse_shared_heads("a path to keys or values", model)


def two_runs(
    model: Any, clean: Int[Tensor, "batch pos"], corrupted: Int[Tensor, "batch pos"], freeze_mlps: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What to hold, and what to send: activations of the clean run, and the z of all heads in the corrupted run.

    The z of all heads are held; with `freeze_mlps`, so is the `mlp_out` of any MLPs.
    """
    names = ["blocks.*.attn.hook_z"]
    held = [*names, "blocks.*.hook_mlp_out"] if freeze_mlps and not model.cfg.attn_only else names
    _, clean_cache = run_with_cache(model, clean, names=held)
    _, corrupted_cache = run_with_cache(model, corrupted, names=names)
    return dict(clean_cache), dict(corrupted_cache)


@torch.no_grad()
def run_over_direct_paths(
    model: Any, tokens: Int[Tensor, "batch pos"], fixed: dict[str, Tensor], receivers: Sequence[Receiver]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run on `tokens` with receivers that get what they would get if these activations were `fixed`; return logits.

    Two runs. In the first, each hook point in `fixed` gives the tensor that `fixed` has for it, whatever came in. Note
    what the receivers get. In the second, nothing is fixed, and each receiver gets what was noted for it: for q, k or
    v, the named head alone, at all positions; for "final", the whole of the last layer's `resid_post`. So what one
    receiver does reaches no other receiver, and if "final" is among them the others make no difference. Leave `fixed`
    and the model unchanged and no hooks behind, and record no gradients.
    Source: Wang et al. 2022, section 3.1 and appendix B.
    """
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    places = [(last if name == "final" else name, head) for name, head in receivers]
    names = {name for name, _ in places}
    with hooks(model, dict.fromkeys(fixed, lambda activation, hook: fixed[hook.name])):
        _, received = run_with_cache(model, tokens, names=names)

    def deliver(activation: Tensor, hook: HookPoint) -> Tensor:
        patched = activation.clone()
        for name, head in places:
            if name == hook.name:
                part = ... if head is None else (slice(None), slice(None), head)
                patched[part] = received[name][part]
        return patched

    return run_with_hooks(model, tokens, hooks=dict.fromkeys(names, deliver))


@torch.no_grad()
def path_patch(
    model: Any,
    clean: Int[Tensor, "batch pos"],
    corrupted: Int[Tensor, "batch pos"],
    senders: Sequence[Head],
    receivers: Sequence[Receiver],
    metric: Metric,
    freeze_mlps: bool = True,
) -> Float[Tensor, " batch"]:
    """Return the metric of each prompt when only direct paths from senders to receivers carry corrupted values.

    Run on `clean`. The senders' z are those of the run on `corrupted`, at all positions; all other heads keep their
    clean z, so that nothing passes through another head. What then arrives at the receivers is patched into a last
    run on `clean`. With `freeze_mlps` the MLPs keep their clean outputs as well: the path is the residual stream and
    nothing else. Without it they compute anew from what they get, and count as part of the direct path, as in the
    paper. A sender in a receiver's layer or after it has no path to it: it changes nothing.
    Raises ValueError, before any run, for heads that do not exist and for receivers at which no path ends.
    Source: Wang et al. 2022, section 3.1 and appendix B; Goldowsky-Dill et al. 2023.
    """
    refuse_unknown(model, senders, receivers)
    held, sent = two_runs(model, clean, corrupted, freeze_mlps)
    fixed = {name: activation.clone() for name, activation in held.items()}
    for layer, head in senders:
        name = f"blocks.{layer}.attn.hook_z"
        fixed[name][:, :, head] = sent[name][:, :, head]
    return metric(run_over_direct_paths(model, clean, fixed, receivers))


@torch.no_grad()
def path_patch_heads(
    model: Any,
    clean: Int[Tensor, "batch pos"],
    corrupted: Int[Tensor, "batch pos"],
    receivers: Sequence[Receiver],
    metric: Metric,
    freeze_mlps: bool = True,
    max_rows: int = 64,
) -> Float[Tensor, "layer head"]:
    """Take every head in turn as the only sender of `path_patch`; return the metric's mean for each.

    Run both texts only once. As described above, a forward holds a copy of the prompts for each of several senders,
    at most `max_rows` rows but always one copy, and `metric` gets the logits of one copy at a time.
    """
    refuse_unknown(model, [], receivers)
    held, sent = two_runs(model, clean, corrupted, freeze_mlps)
    n_layers, n_heads, n_batch = model.cfg.n_layers, model.cfg.n_heads, len(clean)
    senders = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    per_run = max(1, max_rows // n_batch)
    values = []
    for start in range(0, len(senders), per_run):
        chunk = senders[start : start + per_run]
        fixed = {n: einops.repeat(a, "batch ... -> (copy batch) ...", copy=len(chunk)).clone() for n, a in held.items()}
        for copy, (layer, head) in enumerate(chunk):
            name, rows = f"blocks.{layer}.attn.hook_z", slice(copy * n_batch, (copy + 1) * n_batch)
            fixed[name][rows, :, head] = sent[name][:, :, head]
        logits = run_over_direct_paths(model, clean.repeat(len(chunk), 1), fixed, receivers)
        values += [metric(part).mean() for part in logits.split(n_batch)]
    return torch.stack(values).reshape(n_layers, n_heads)


# ------------------------------------------------------------------------------------------------------ what heads do


def attention_between(
    cache: Any, queries: Int[Tensor, " batch"], keys: Int[Tensor, " batch"]
) -> Float[Tensor, "layer head batch"]:
    """Return how much each head attends from one place to another, for each prompt.

    `queries` and `keys` are positions, one of each for each prompt, such as `dataset.positions["END"]` and
    `dataset.positions["IO"]`. The cache holds the patterns of all layers.
    """
    patterns = cache.stack("pattern")
    rows = torch.arange(len(queries), device=patterns.device)
    picked = patterns[:, rows, :, queries.to(patterns.device), keys.to(patterns.device)]
    return einops.rearrange(picked, "batch layer head -> layer head batch")


@torch.no_grad()
def name_copying_scores(model: Any, dataset: Any, sign: int = 1, k: int = 5) -> Float[Tensor, "layer head"]:
    """Return how often a head that looked at a name, and at nothing else, would make the model say that name.

    The names are those at IO and at S1 of every prompt. What is known there comes from the stream after the first
    layer's MLP (`blocks.0.hook_resid_post`), as in the paper; in a model without MLPs it is the embeddings of
    the name and its position alone (`blocks.0.hook_resid_pre`). It goes through the head's own `ln1`, `W_V`, `b_V` and
    `W_O`, and what the head would write through `ln_final` and the unembedding, as if there were nothing else. The
    score is the share of names which are among the `k` largest logits, in the model's dtype. With `sign` -1 what the
    head would write is negated: this is the score of a head that pushes down the name that it looks at.
    Source: Wang et al. 2022, section 3.1.
    """
    refuse_shared_heads("name_copying_scores", model)
    place = "blocks.0.hook_resid_pre" if model.cfg.attn_only else "blocks.0.hook_resid_post"
    _, cache = run_with_cache(model, dataset.tokens, names=place)
    at = torch.stack([dataset.positions["IO"], dataset.positions["S1"]], dim=1)
    rows = torch.arange(len(at))[:, None]
    stream, names = cache[place][rows, at], dataset.tokens[rows, at]
    scores = []
    for block in model.blocks:
        read = block.ln1(stream)
        for head in range(model.cfg.n_heads):
            v = read @ block.attn.W_V[head] + block.attn.b_V[head]
            written = sign * (v @ block.attn.W_O[head])
            best = model.unembed(model.ln_final(written)).topk(k).indices
            scores.append((best == names[..., None]).any(dim=-1).to(stream.dtype).mean())
    return torch.stack(scores).reshape(model.cfg.n_layers, model.cfg.n_heads)


SIGNALS = {"token": ("names",), "position": ("order",), "both": ("names", "order")}  # what is flipped, in turn


def signal_effects(
    model: Any, dataset: Any, senders: Sequence[Head], receivers: Sequence[Receiver]
) -> dict[str, Float[Tensor, " batch"]]:
    """Measure what heads tell others: which name occurred twice, or where it stood the first time?

    Three corruptions of `dataset`, by `dataset.flipped`, each of which changes one signal or both: "token" exchanges
    the names (the other name occurs twice, and its first mention stands where the first one's did), "position" the
    order (the same name occurs twice, its first mention stands elsewhere), "both" does one after the other. For each,
    return how much `path_patch` from `senders` to `receivers`, run on the dataset's own tokens, changes the logit
    difference of each prompt, with the MLPs held (the default of `path_patch`). Labels are always those of `dataset`.
    Source: Wang et al. 2022, appendix A.
    """
    clean = dataset.tokens
    with torch.no_grad():
        before = logit_difference(model(clean), dataset)
    effects = {}
    for signal, kinds in SIGNALS.items():
        other = dataset
        for kind in kinds:
            other = other.flipped(kind)
        after = path_patch(
            model, clean, other.tokens, senders, receivers, lambda logits: logit_difference(logits, dataset)
        )
        effects[signal] = after - before
    return effects


def head_roles(
    tables: Mapping[str, Float[Tensor, "layer head"]], rules: Mapping[str, Mapping[str, float]]
) -> dict[str, list[Head]]:
    """Give each role to the heads whose measurements meet all of its conditions.

    `tables` holds what was measured, by name; `rules` says for each role which measurements must reach what. A
    condition of 0 or more is met by values not below it, a negative one by values not above it. The answer has every
    role, in the order of `rules`; its heads are sorted by the first condition's absolute value, the largest first. A
    role that no head has earned has an empty list: that is a finding, too.
    Raises ValueError, naming role and measurement, for a condition on something that was not measured.
    """
    roles = {}
    for role, conditions in rules.items():
        for name in conditions:
            if name not in tables:
                raise ValueError(f"head_roles: {role!r} is about {name!r}, which was not measured.")
        first = tables[next(iter(conditions))]
        fits = torch.ones_like(first, dtype=torch.bool)
        for name, least in conditions.items():
            fits &= tables[name] >= least if least >= 0 else tables[name] <= least
        heads = [(layer, head) for layer, head in fits.nonzero().tolist()]
        roles[role] = sorted(heads, key=lambda at: -abs(first[at].item()))
    return roles


# ----------------------------------------------------------------------------------------------- is that the circuit?


def every_head(model: Any) -> list[tuple[int, int]]:
    """All heads of a model as (layer, head), layer by layer."""
    return [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]


@torch.no_grad()
def template_means(
    model: Any, tokens: Int[Tensor, "row pos"], templates: Int[Tensor, " row"], max_rows: int = 256
) -> dict[str, Float[Tensor, "template pos head d_head"]]:
    """Average what each head finds (its `z`) over the rows of each template, position by position.

    Row `row` of `tokens` belongs to template `templates[row]`. Templates are numbered from 0 to the largest number
    there; their rows come in any order, and one may have more than another. The answer is keyed by hook points,
    `blocks.0.attn.hook_z` and so on, and its first axis is the template's number. The model runs on at most `max_rows`
    rows at a time, and no gradients are recorded. Raises ValueError for a template without rows: it has no mean.
    Source: Wang et al. 2022, section 2.2.
    """
    counts = torch.bincount(templates).to(tokens.device)
    if (counts == 0).any():
        raise ValueError(f"template_means: a template has no rows; the rows of each: {counts.tolist()}.")
    sums: dict[str, Tensor] = {}
    for chunk, of in zip(tokens.split(max_rows), templates.to(tokens.device).split(max_rows), strict=True):
        _, cache = run_with_cache(model, chunk, names="*.attn.hook_z")
        for name in cache:
            if name not in sums:
                sums[name] = cache[name].new_zeros(len(counts), *cache[name].shape[1:])
            sums[name].index_add_(0, of, cache[name])
    return {name: total / counts[:, None, None, None] for name, total in sums.items()}


@torch.no_grad()
def mean_ablate_except(
    model: Any, dataset: Any, circuit: Collection[tuple[int, int]], means: Mapping[str, Tensor]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run the model on `dataset.tokens` with every head outside `circuit` ablated; return the logits.

    `circuit` holds pairs (layer, head). The `z` of all other heads is replaced, at all positions, by what `means` has:
    `means[name][row]` stands in for prompt `row`. Embeddings, MLPs and biases are left alive, and so are the heads of
    the circuit: they are computed anew from the stream as it then is. No argument is changed, no hooks stay behind and
    no gradients are recorded.
    Source: Wang et al. 2022, section 2.2 (knockouts).
    """

    def ablate(z: Tensor, hook: HookPoint) -> Tensor:
        layer = int(hook.name.split(".")[1])
        kept = torch.tensor([(layer, head) in circuit for head in range(z.shape[2])], device=z.device)
        return torch.where(kept[:, None], z, means[hook.name])

    return run_with_hooks(model, dataset.tokens, hooks={"*.attn.hook_z": ablate})


@torch.no_grad()
def circuit_scores(
    model: Any,
    dataset: Any,
    circuits: Sequence[Collection[tuple[int, int]]],
    means: Mapping[str, Tensor],
    max_rows: int = 64,
) -> Float[Tensor, " circuit"]:
    """Score many circuits, several in one forward: F(C), the mean logit difference with all heads outside C ablated.

    The prompts are repeated along the batch axis, once for each circuit, and each copy has its own heads ablated. A
    forward has at most `max_rows` rows, but always room for one circuit. The numbers are those of `mean_ablate_except`.
    Source: Wang et al. 2022, section 4.
    """
    n_batch = len(dataset.tokens)
    per_run = max(1, max_rows // n_batch)
    scores = []
    for start in range(0, len(circuits), per_run):
        chunk = circuits[start : start + per_run]

        def ablate(z: Tensor, hook: HookPoint, chunk: Sequence[Collection[tuple[int, int]]] = chunk) -> Tensor:
            layer, heads = int(hook.name.split(".")[1]), range(z.shape[2])
            kept = torch.tensor([[(layer, head) in circuit for head in heads] for circuit in chunk], device=z.device)
            copies = z.unflatten(0, (len(chunk), n_batch))
            return torch.where(kept[:, None, None, :, None], copies, means[hook.name]).flatten(0, 1)

        logits = run_with_hooks(model, dataset.tokens.repeat(len(chunk), 1), hooks={"*.attn.hook_z": ablate})
        scores += [logit_difference(copy, dataset).mean() for copy in logits.split(n_batch)]
    return torch.stack(scores)


def faithfulness(
    model: Any, dataset: Any, circuits: Sequence[Collection[tuple[int, int]]], means: Mapping[str, Tensor]
) -> Float[Tensor, " circuit"]:
    """Return how much of the behaviour each circuit keeps: F(C) / F(M), a ratio of means over the prompts.

    F(M) is the score of the circuit that holds every head, which is the model. So 1 means that the circuit is as good
    as the model; it may be better (above 1), or prefer the wrong name (below 0).
    Source: Wang et al. 2022, section 4, where it is the difference F(M) - F(C).
    """
    scores = circuit_scores(model, dataset, [every_head(model), *circuits], means)
    return scores[1:] / scores[0]


def completeness(
    model: Any,
    dataset: Any,
    circuit: Collection[tuple[int, int]],
    removed: Sequence[Collection[tuple[int, int]]],
    means: Mapping[str, Tensor],
) -> Float[Tensor, "side removed"]:
    """Take the same heads out of the circuit and out of the model: F(C \\ K) and F(M \\ K) for every K in `removed`.

    Side 0 is the circuit, side 1 the model; their difference is the incompleteness with respect to K. A circuit is
    complete if the two sides agree for every K, not only for the empty K (that is faithfulness). Raises ValueError
    for a K with a head that is not of the circuit.
    Source: Wang et al. 2022, section 4.
    """
    for heads in removed:
        if not set(heads) <= set(circuit):
            raise ValueError(f"completeness: K={heads} has heads that are not of the circuit.")
    runs = [[head for head in side if head not in heads] for side in (circuit, every_head(model)) for heads in removed]
    return circuit_scores(model, dataset, runs, means).reshape(2, len(removed))


def minimality(
    model: Any,
    dataset: Any,
    circuit: Collection[tuple[int, int]],
    removed: Mapping[tuple[int, int], Collection[tuple[int, int]]],
    means: Mapping[str, Tensor],
) -> Float[Tensor, " head"]:
    """Return what each head v adds where the heads K are missing: |F(C \\ (K ∪ {v})) - F(C \\ K)| as a share of F(M).

    `removed` gives for every v that is asked about its K, and the answer comes in the same order. A head with a spare
    adds nothing while the spare is there (K empty), and a lot where K holds it. Raises ValueError for a v or a K that
    is not of the circuit, and for a v that is in its own K.
    Source: Wang et al. 2022, section 4.
    """
    runs = [every_head(model)]
    for head, others in removed.items():
        if head in others or not {head, *others} <= set(circuit):
            raise ValueError(f"minimality: v={head} and K={others} are not different heads of the circuit.")
        without = [kept for kept in circuit if kept not in others]
        runs += [without, [kept for kept in without if kept != head]]
    scores = circuit_scores(model, dataset, runs, means)
    return (scores[2::2] - scores[1::2]).abs() / scores[0]


def greedy_circuit(
    model: Any, dataset: Any, means: Mapping[str, Tensor], share: float = 0.25, max_rows: int = 64
) -> list[list[tuple[int, int]]]:
    """Search for small circuits from above: take out, again and again, the heads that are missed least.

    Begin with every head. A round first scores the circuit as it is, and without each one of its heads: that says by
    how much each would change the score. Then it takes heads out, `share` of those there are (rounded down, but at
    least one), one after the other. Keep a running estimate of the score: it begins at the circuit's own, and each head
    taken out adds its change. Always take the head that brings the estimate nearest to the whole model's score. The
    next round measures anew. Return the circuits before the first round and after each: every head first, the empty
    circuit last.
    With `share=0` heads go one at a time, which assumes nothing and takes a number of runs that grows with the square
    of the number of heads; with a share it grows in proportion.
    """
    circuit = every_head(model)
    found = [circuit]
    whole = circuit_scores(model, dataset, found, means, max_rows)
    while circuit:
        without = [[kept for kept in circuit if kept != head] for head in circuit]
        scores = circuit_scores(model, dataset, [circuit, *without], means, max_rows)
        expected, changes = scores[0], scores[1:] - scores[0]
        left = list(range(len(circuit)))
        for _ in range(max(1, int(share * len(circuit)))):
            gone = left.pop(int((expected + changes[left] - whole).abs().argmin()))
            expected = expected + changes[gone]
        circuit = [circuit[i] for i in left]
        found.append(circuit)
    return found


def random_circuits(model: Any, size: int, n: int, generator: torch.Generator) -> list[list[tuple[int, int]]]:
    """Draw `n` circuits of `size` heads, each without repetition: the scale for a circuit that was searched for."""
    heads = every_head(model)
    draws = [torch.randperm(len(heads), generator=generator)[:size].tolist() for _ in range(n)]
    return [[heads[i] for i in draw] for draw in draws]


# --------------------------------------------------------------------------------------- which edges, which direction


def edge_nodes(cfg: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Name all ends of edges: senders and receivers, in the order of rows and columns, each with its stage.

    Senders add to the stream: "embed" (tokens and positions), each head ("0.3" is head 3 of layer 0), each MLP ("mlp
    0"). Receivers read from it: the queries, keys and values of each head ("1.3 q"), each MLP, and "final", the last
    LayerNorm. In a layer come first the queries of all heads, then all keys, all values, then the MLP.
    The stages are numbers: there is an edge if the sender's stage is below the receiver's.
    """
    senders, receivers = {"embed": 0}, dict[str, int]()
    heads = range(cfg.n_heads)
    for layer in range(cfg.n_layers):
        stage = 2 * layer + 1
        receivers |= {f"{layer}.{head} {letter}": stage for letter in "qkv" for head in heads}
        senders |= {f"{layer}.{head}": stage for head in heads}
        if not cfg.attn_only:
            receivers[f"mlp {layer}"] = stage if cfg.parallel else stage + 1  # in parallel it does not see the heads
            senders[f"mlp {layer}"] = stage + 1
    return senders, receivers | {"final": 2 * cfg.n_layers + 1}


def possible_edges(cfg: Any) -> Bool[Tensor, "sender receiver"]:
    """Return which edges exist: no receiver reads what is written later."""
    senders, receivers = (torch.tensor(list(nodes.values())) for nodes in edge_nodes(cfg))
    return senders[:, None] < receivers


def run_with_own_inputs(
    model: Any, tokens: Int[Tensor, "batch pos"], added: Callable[[slice], Tensor]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run the model while every receiver reads its own version of the residual stream; return the logits.

    A receiver's version is the stream plus what `added` has for it. `added(rows)` gets a slice of the receivers (in the
    order of `edge_nodes`) and returns one tensor for each, [receiver batch pos d_model]; it is asked when the run
    arrives there. What is added reaches this receiver alone: the stream stays as it is. The LayerNorm in front of a
    receiver is computed anew for its version. With zeros this is the usual run.
    """
    refuse_shared_heads("run_with_own_inputs", model)
    refuse_gated_mlp("run_with_own_inputs", model)
    n_heads, n_layers = model.cfg.n_heads, model.cfg.n_layers
    n_own = 3 * n_heads + (0 if model.cfg.attn_only else 1)  # receivers of one layer
    stream: dict[str, Tensor] = {}

    def note(resid: Tensor, hook: HookPoint) -> None:
        stream["here"] = resid

    def heads_read(activation: Tensor, hook: HookPoint, block: Any, start: int, letter: str) -> Tensor:
        versions = stream["here"] + added(slice(start, start + n_heads))
        normalised = block.ln1(versions.flatten(0, 1)).unflatten(0, (n_heads, -1))
        W, b = getattr(block.attn, f"W_{letter}"), getattr(block.attn, f"b_{letter}")
        return einops.einsum(normalised, W, "head batch pos d_model, head d_model d_head -> batch pos head d_head") + b

    def mlp_reads(activation: Tensor, hook: HookPoint, block: Any, row: int) -> Tensor:
        return block.ln2(stream["here"] + added(slice(row, row + 1))[0]) @ block.mlp.W_in + block.mlp.b_in

    fns: dict[str, Callable[..., Any]] = {}
    for layer, block in enumerate(model.blocks):
        at, start = f"blocks.{layer}", n_own * layer
        fns[f"{at}.hook_resid_pre"] = note
        for i, letter in enumerate("QKV"):
            own = partial(heads_read, block=block, start=start + i * n_heads, letter=letter)
            fns[f"{at}.attn.hook_{letter.lower()}"] = own
        if not model.cfg.attn_only:
            if not model.cfg.parallel:
                fns[f"{at}.hook_resid_mid"] = note
            fns[f"{at}.mlp.hook_pre"] = partial(mlp_reads, block=block, row=start + n_own - 1)
    last = n_own * n_layers
    fns[f"blocks.{n_layers - 1}.hook_resid_post"] = lambda resid, hook: resid + added(slice(last, last + 1))[0]
    return run_with_hooks(model, tokens, hooks=fns)


def sender_outputs(model: Any, cache: Any) -> Float[Tensor, "sender batch pos d_model"]:
    """Stack what every sender adds to the stream, in the order of `edge_nodes`.

    The embedding's share is the stream before the first layer; a head's is its `z` times its `W_O`; an MLP's is its
    `mlp_out`. Together with the `b_O` of all layers, which belong to no head, these sum to the last residual stream.
    """
    outputs = [cache["resid_pre", 0][None]]
    for layer, block in enumerate(model.blocks):
        pattern = "batch pos head d_head, head d_head d_model -> head batch pos d_model"
        outputs.append(einops.einsum(cache["z", layer], block.attn.W_O, pattern))
        if not model.cfg.attn_only:
            outputs.append(cache["mlp_out", layer][None])
    return torch.cat(outputs)


def edge_attribution(
    model: Any,
    clean: Int[Tensor, "batch pos"],
    corrupted: Int[Tensor, "batch pos"],
    metric: Metric,
    steps: int = 1,
) -> Float[Tensor, "sender receiver"]:
    """Estimate, for each edge, by how much the metric's mean changes if this edge alone carries the corrupted value.

    That is, in the run on `clean`: how the mean over the prompts of `metric(logits)` changes with what the receiver
    reads (its own version of the stream, before its LayerNorm), times what the sender writes on `corrupted` minus what
    it writes on `clean`, summed over positions and d_model. Rows and columns are those of `edge_nodes`; where there is
    no edge the score is 0. A needed edge has a score below 0 if the metric is high on the clean run.

    With more `steps` the gradient is the mean over as many runs on `clean`, whose `embed` is moved towards that of
    `corrupted` by 0, 1/steps, 2/steps, ... of the way: the left ends of equal parts, where `integrated_attribution`
    takes the middles. So with one step it is the clean run's.
    The parameters' gradients stay as they are, and what is returned has no graph. In memory there is one gradient of
    the stream for each receiver: for a large model take few prompts at a time.
    Source: Syed et al. 2023; with steps, Hanna et al. 2024.
    """
    refuse_shared_heads("edge_attribution", model)
    refuse_gated_mlp("edge_attribution", model)
    with torch.no_grad():
        caches = [run_with_cache(model, tokens)[1] for tokens in (clean, corrupted)]
        own, other = (sender_outputs(model, cache) for cache in caches)
        far = caches[1]["hook_embed"] - caches[0]["hook_embed"]
    possible = possible_edges(model.cfg).to(own.device)
    gradient = own.new_zeros(possible.shape[1], *own.shape[1:])
    for step in range(steps):
        added = torch.zeros_like(gradient, requires_grad=True)
        with hooks(model, {"hook_embed": lambda embed, hook, share=step / steps: embed + share * far}):
            logits = run_with_own_inputs(model, clean, added.__getitem__)
        gradient += torch.autograd.grad(metric(logits).mean(), added)[0] / steps
    pattern = "sender batch pos d_model, receiver batch pos d_model -> sender receiver"
    return einops.einsum(other - own, gradient, pattern) * possible


@torch.no_grad()
def run_with_edges(
    model: Any,
    clean: Int[Tensor, "batch pos"],
    corrupted: Int[Tensor, "batch pos"],
    edges: Bool[Tensor, "sender receiver"],
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run the model on `clean` with only these edges; all others carry what they do in the run on `corrupted`.

    What a receiver reads is a sum over its senders: of those whose edge is kept, what they write in this very run
    (which may differ from the clean one, as they too read a mixture); of all others, what they write on `corrupted`.
    All positions alike. With all edges this is the clean run, with none the corrupted one. Entries of `edges` where
    there is no edge mean nothing. Hooks of others stay, none is left behind, and no gradients are recorded.
    Source: Conmy et al. 2023; Hanna et al. 2024.
    """
    refuse_shared_heads("run_with_edges", model)
    refuse_gated_mlp("run_with_edges", model)
    _, cache = run_with_cache(model, corrupted)
    other = sender_outputs(model, cache)
    gap = torch.zeros_like(other)  # what the corrupted run has over this one, sender by sender, as the run arrives
    n_heads, n_own = model.cfg.n_heads, model.cfg.n_heads + (0 if model.cfg.attn_only else 1)
    cut = (possible_edges(model.cfg).to(edges.device) & ~edges).to(other)

    def wrote(activation: Tensor, hook: HookPoint, layer: int = 0) -> None:
        first = 1 + n_own * layer
        if hook.name.endswith("hook_z"):
            pattern = "batch pos head d_head, head d_head d_model -> head batch pos d_model"
            result = einops.einsum(activation, model.blocks[layer].attn.W_O, pattern)
            gap[first : first + n_heads] = other[first : first + n_heads] - result
        else:
            row = first + n_heads if hook.name.endswith("hook_mlp_out") else 0
            gap[row] = other[row] - activation

    fns: list[tuple[str, Any]] = [("blocks.0.hook_resid_pre", wrote)]
    for layer in range(model.cfg.n_layers):
        for place in ["attn.hook_z"] if model.cfg.attn_only else ["attn.hook_z", "hook_mlp_out"]:
            fns.append((f"blocks.{layer}.{place}", partial(wrote, layer=layer)))
    pattern = "sender receiver, sender batch pos d_model -> receiver batch pos d_model"
    with hooks(model, fns):
        return run_with_own_inputs(model, clean, lambda rows: einops.einsum(cut[:, rows], gap, pattern))


def interchange_intervention(
    model: Any,
    base: Int[Tensor, "batch pos"],
    source: Int[Tensor, "batch pos"],
    name: str,
    positions: Int[Tensor, " batch"],
    directions: Float[Tensor, "direction d_model"],
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run on `base` while one vector per prompt takes from the run on `source` its part along some directions.

    The vector is the activation at hook point `name` (a residual stream, or anything else [batch pos d_model]) and at
    `positions[i]` in prompt i, of base and source alike. Its projection on the directions' span becomes the
    source's; what is orthogonal to them stays. No other position changes. Gradients flow to `directions`.
    Raises ValueError unless the directions are orthonormal (their dot products within 1e-4 of 1 and 0).
    Source: Geiger et al. 2021, 2023.
    """
    identity = torch.eye(len(directions), dtype=directions.dtype, device=directions.device)
    if not torch.allclose(directions @ directions.T, identity, atol=1e-4):
        raise ValueError("interchange_intervention: the directions must be orthonormal.")
    with torch.no_grad():
        _, cache = run_with_cache(model, source, names=name)
    rows = torch.arange(len(base), device=base.device)

    def swap(activation: Tensor, hook: HookPoint) -> Tensor:
        swapped = activation.clone()
        difference = cache[name][rows, positions] - activation[rows, positions]
        swapped[rows, positions] = activation[rows, positions] + difference @ directions.T @ directions
        return swapped

    return run_with_hooks(model, base, hooks={name: swap})


def align_direction(
    model: Any,
    base: Int[Tensor, "batch pos"],
    source: Int[Tensor, "batch pos"],
    name: str,
    positions: Int[Tensor, " batch"],
    metric: Metric,
    generator: torch.Generator,
    steps: int = 40,
    lr: float = 0.05,
    n_directions: int = 1,
) -> Float[Tensor, "direction d_model"]:
    """Learn directions along which an interchange turns the answer to `base` into the one that the metric is against.

    `metric(logits)` is above 0 for each prompt whose answer is still the base's, and below 0 where it has changed.
    Minimise the mean of softplus(metric) with Adam (PyTorch's defaults except `lr`), for `steps` steps on all prompts
    at once. Learn a matrix, drawn as `torch.randn(n_directions, d_model, generator=generator)` and then converted to
    the model's dtype; the directions are an orthonormal basis of its rows.
    The model stays as it is, gradients included; the result has no graph.
    A distributed alignment search (Geiger et al. 2023), in its smallest form.
    """
    raw = torch.randn(n_directions, model.cfg.d_model, generator=generator).to(model.embed.W_E).requires_grad_()
    optimiser = torch.optim.Adam([raw], lr=lr)
    for _ in tqdm(range(steps), mininterval=1, desc=name):
        directions = torch.linalg.qr(raw.T).Q.T  # learned freely, used orthonormal
        logits = interchange_intervention(model, base, source, name, positions, directions)
        (raw.grad,) = torch.autograd.grad(nn.functional.softplus(metric(logits)).mean(), [raw])
        optimiser.step()
    return torch.linalg.qr(raw.detach().T).Q.T
