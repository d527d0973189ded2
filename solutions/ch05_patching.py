"""Chapter 05: patching. Which activations carry a behaviour, found by exchanging them between two runs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

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

    Row `layer` is that layer's `resid_pre`; the last row is the last layer's `resid_post`.
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
    belong to no head and are left out.
    Source: Elhage et al. 2021; Wang et al. 2022, section 3.1.
    """
    rows = []
    for layer, block in enumerate(model.blocks):
        result = einops.einsum(
            cache["z", layer], block.attn.W_O, "batch pos head d_head, head d_head d_model -> head batch pos d_model"
        )
        centred = result - result.mean(dim=-1, keepdim=True)
        scaled = centred / cache["ln_final.scale"] * model.ln_final.w
        rows.append(einops.einsum(scaled, directions, "head batch pos d_model, batch d_model -> head batch pos"))
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
    of its own with that one patch and no other, and the mean over the prompts of what `metric(logits)` says.
    Source: Meng et al. 2022, section 2.1.
    """
    n_layers, n_pos = model.cfg.n_layers, tokens.shape[1]
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(n_layers)]
    values = []
    for name in [*names, f"blocks.{n_layers - 1}.hook_resid_post"]:
        for pos in range(n_pos):
            values.append(metric(run_patched(model, tokens, source_cache, name, (pos,))).mean())
    return torch.stack(values).reshape(n_layers + 1, n_pos)


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
        with torch.no_grad():
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

    A patch is a pair (name, index) as in `run_patched`. The prompts are repeated along the batch axis, once for each
    patch, and each patch acts on its own copy only. `metric` gets the logits of one copy at a time, [batch pos
    d_vocab]. A forward has at most `max_rows` rows, which bounds the memory, but always room for one patch. The patches
    may be of different layers and hook points. The numbers are those of `run_patched`, to 1e-5; there too nothing is
    changed, left behind or recorded.
    """
    n_batch = len(tokens)
    per_run = max(1, max_rows // n_batch)
    answers = []
    for start in range(0, len(patches), per_run):
        chunk = patches[start : start + per_run]

        def patch(activation: Tensor, hook: HookPoint, chunk: Sequence[Patch] = chunk) -> Tensor:
            patched = activation.clone()
            for copy, (name, index) in enumerate(chunk):
                if name == hook.name:
                    rows = patched[copy * n_batch : (copy + 1) * n_batch]
                    rows[(slice(None), *index)] = source_cache[name][(slice(None), *index)]
            return patched

        logits = run_with_hooks(
            model, tokens.repeat(len(chunk), 1), hooks=dict.fromkeys((name for name, _ in chunk), patch)
        )
        answers += [metric(copy).mean() for copy in logits.split(n_batch)]
    return torch.stack(answers)


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
    these points takes the place of the one gradient; the difference is that of the two runs, as before.
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


# ------------------------------------------------------------------------------------------------------ what heads do


# ----------------------------------------------------------------------------------------------- is that the circuit?


# --------------------------------------------------------------------------------------- which edges, which direction


def edge_nodes(cfg: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Name all ends of edges: senders and receivers, in the order of rows and columns, each with its stage.

    Senders add to the stream: "embed" (tokens and positions), each head ("0.3" is head 3 of layer 0), each MLP ("mlp
    0"). Receivers read from it: the queries, keys and values of each head ("1.3 q"), each MLP, and "final", the last
    LayerNorm. In a layer come first the queries of all heads, then all keys, all values, then the MLP.
    The stages are numbers, and an edge is there where the sender's stage is below that of the receiver.
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
    """Say which edges there are: nobody reads what is written later."""
    senders, receivers = (torch.tensor(list(nodes.values())) for nodes in edge_nodes(cfg))
    return senders[:, None] < receivers


def run_with_own_inputs(
    model: Any, tokens: Int[Tensor, "batch pos"], added: Callable[[slice], Tensor]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Run the model while every receiver reads a version of the residual stream of its own; return the logits.

    A receiver's version is the stream plus what `added` has for it. `added(rows)` gets a slice of the receivers (in the
    order of `edge_nodes`) and returns one tensor for each, [receiver batch pos d_model]; it is asked when the run
    arrives there. What is added reaches this receiver alone: the stream stays as it is. The LayerNorm in front of a
    receiver is computed anew for its version. With zeros this is the usual run.
    """
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
    `mlp_out`. Together with the `b_O` of all layers, which belong to nobody, these sum to the last residual stream.
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
    `corrupted` by 0, 1/steps, 2/steps, ... of the way; with one it is the clean run's.
    The parameters' gradients stay as they are, and what is returned has no graph. In memory there is one gradient of
    the stream for each receiver: for a large model take few prompts at a time.
    Source: Syed et al. 2023; with steps, Hanna et al. 2024.
    """
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
    _, cache = run_with_cache(model, corrupted)
    other = sender_outputs(model, cache)
    gap = torch.zeros_like(other)  # what the corrupted run has over this one, sender by sender, as the run arrives
    n_heads, n_own = model.cfg.n_heads, model.cfg.n_heads + (0 if model.cfg.attn_only else 1)
    cut = (possible_edges(model.cfg) & ~edges.cpu()).to(other)

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
    `positions[i]` in prompt i, of base and source alike. Its projection on the directions' span becomes that of the
    source's vector; what is orthogonal to them stays. No other position changes. Gradients flow to `directions`.
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
    """Learn directions along which an interchange makes the answer to `base` that which the metric is against.

    `metric(logits)` is above 0 for each prompt whose answer is still that of `base`, and below 0 where it has changed.
    Minimised is the mean of softplus(metric), by Adam (PyTorch's defaults but for `lr`), for `steps` steps on all
    prompts at once. What is learned is a matrix that starts as `torch.randn(n_directions, d_model,
    generator=generator)`, in the model's dtype; the directions are an orthonormal basis of its rows. The model stays as
    it is, gradients included; the result has no graph.
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
