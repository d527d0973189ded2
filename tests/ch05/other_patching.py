"""Chapter 05's first half solved in another style: PyTorch's own hooks, loops, indexing, `backward`; no einops.

Every check must accept it.
"""

import copy

import torch

from course_utils.hooks import hook_points


def logit_difference(logits, dataset):
    values = []
    for row, end in enumerate(dataset.positions["END"].tolist()):
        scores = logits[row, end]
        values.append(scores[dataset.io[row]] - scores[dataset.s[row]])
    return torch.stack(values)


def normalised_metric(logits, dataset, clean, corrupted):
    gap = clean - corrupted
    if not gap:
        raise ValueError("nothing to restore")
    return logit_difference(logits, dataset) / gap - corrupted / gap


def accumulated_residual(cache):
    rows = [cache["blocks.0.hook_resid_pre"]]
    for layer in range(cache.n_layers):
        rows.append(cache[f"blocks.{layer}.hook_resid_post"])
    return torch.stack(rows)


def logit_lens(cache, model, directions):
    normal = [model.ln_final(resid) for resid in accumulated_residual(cache).unbind()]
    return torch.cat([(resid @ directions[:, :, None])[None, ..., 0] for resid in normal])


def head_attribution(cache, model, directions):
    weighted, scale = directions, 1
    if model.cfg.normalization != "none":
        weighted, scale = directions * model.ln_final.w, cache["ln_final.scale"][..., 0]
    if model.cfg.normalization == "LN":
        weighted = weighted - weighted.mean(-1, keepdim=True)  # centring is symmetric: do it to the direction instead
    n_heads = model.blocks[0].attn.W_O.shape[0]
    rows = []
    for layer in range(cache.n_layers):
        for head in range(n_heads):
            result = cache["z", layer][:, :, head] @ model.blocks[layer].attn.W_O[head]
            rows.append((result * weighted[:, None]).sum(-1) / scale)
    return torch.stack(rows).reshape(cache.n_layers, n_heads, *rows[0].shape)


def run_patched(model, tokens, source_cache, name, index):
    def swap(module, inputs, output):
        mask = torch.zeros_like(output, dtype=torch.bool)
        mask[(slice(None), *index)] = True
        return torch.where(mask, source_cache[name], output)

    handle = model.get_submodule(name).register_forward_hook(swap)
    # a model may look whether its pattern is watched before it builds one
    watched = hook_points(model)[name].add(lambda activation, hook: None)
    try:
        with torch.no_grad():
            return model(tokens)
    finally:
        handle.remove()
        watched.remove()


def patch_residual_stream(model, tokens, source_cache, metric):
    rows = []
    for depth in range(model.cfg.n_layers + 1):
        last = depth == model.cfg.n_layers
        name = f"blocks.{depth - 1}.hook_resid_post" if last else f"blocks.{depth}.hook_resid_pre"
        runs = [metric(run_patched(model, tokens, source_cache, name, (p,))) for p in range(tokens.shape[1])]
        rows.append(torch.stack(runs).mean(1))
    return torch.stack(rows)


def patch_components(model, tokens, source_cache, metric):
    points = hook_points(model)
    with torch.no_grad():
        base = metric(model(tokens)).mean()
    table = base.repeat(2, model.cfg.n_layers, tokens.shape[1])
    for layer in range(model.cfg.n_layers):
        for pos in range(tokens.shape[1]):
            for i, part in enumerate(("attn", "mlp")):
                name = f"blocks.{layer}.hook_{part}_out"
                if name in points:
                    table[i, layer, pos] = metric(run_patched(model, tokens, source_cache, name, (pos,))).mean()
    return table


def patch_heads(model, tokens, source_cache, metric):
    return patch_head_inputs(model, tokens, source_cache, metric, "z")


def run_from(model, resid, layer):
    rest = torch.nn.Sequential(*list(model.blocks)[layer:], model.ln_final, model.unembed)
    return rest(resid)


def batched_sweep(model, tokens, source_cache, metric, patches, max_rows=64):
    """By layers: those of one layer together, and a list of all embeddings' patches for the whole model."""
    n, n_fit = len(tokens), max(1, max_rows // len(tokens))
    points, streams, found = hook_points(model), [], {}
    handles = [block.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0])) for block in model.blocks]
    handles.append(model.ln_final.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0])))
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    waiting = {}
    for number, (name, _) in enumerate(patches):
        layer = next((i for i in range(len(streams) - 1) if name.startswith(f"blocks.{i}.")), None)
        waiting.setdefault(-1 if name.startswith("ln_final") else layer, []).append(number)
    for layer, numbers in waiting.items():
        for group in torch.tensor(numbers).split(n_fit):
            handles = []
            for copy_, number in enumerate(group.tolist()):
                name, index = patches[number]

                def swap(activation, hook, copy_=copy_, name=name, index=index):
                    copies = list(activation.split(n))
                    own = copies[copy_].clone()
                    own[(slice(None), *index)] = source_cache[name][(slice(None), *index)]
                    copies[copy_] = own
                    return torch.cat(copies)

                handles.append(points[name].add(swap))
            try:
                with torch.no_grad():
                    if layer is None:
                        logits = model(torch.cat([tokens] * len(group)))
                    else:
                        depth = len(streams) - 1 if layer < 0 else layer
                        logits = run_from(model, torch.cat([streams[depth]] * len(group)), depth)
            finally:
                for handle in handles:
                    handle.remove()
            for number, copy_ in zip(group.tolist(), logits.chunk(len(group)), strict=True):
                found[number] = metric(copy_).mean()
    return torch.stack([found[number] for number in range(len(patches))])


def patch_heads_by_position(model, tokens, source_cache, metric):
    n_pos = tokens.shape[1]
    layers = []
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            for pos in range(n_pos):
                logits = run_patched(model, tokens, source_cache, f"blocks.{layer}.attn.hook_z", (pos, head))
                layers.append(metric(logits).mean())
    return torch.stack(layers).view(model.cfg.n_layers, model.cfg.n_heads, n_pos)


def patch_head_inputs(model, tokens, source_cache, metric, which):
    if which not in {"q", "k", "v", "pattern", "z"}:
        raise ValueError(which)
    rows = []
    for layer in range(model.cfg.n_layers):
        name, row = f"blocks.{layer}.attn.hook_{which}", []
        for head in range(model.cfg.n_heads):
            index = (head,) if which == "pattern" else (slice(None), head)
            row.append(metric(run_patched(model, tokens, source_cache, name, index)).mean())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def slopes(model, tokens, metric, names, embed=None):
    """On a copy of the model, so that `backward` may store what it likes."""
    model = copy.deepcopy(model)
    points, seen = hook_points(model), {}
    for name in names:

        def keep(activation, hook, name=name):
            activation.retain_grad()
            seen[name] = activation

        points[name].add(keep)
    if embed is not None:
        model.get_submodule("hook_embed").register_forward_hook(
            lambda module, inputs, output: output + (embed - output).detach()
        )
    metric(model(tokens)).sum().backward()
    return {name: seen[name].detach() for name in names}, {name: seen[name].grad for name in names}


def attribution_patching(model, tokens, source_cache, metric, names):
    own, gradients = slopes(model, tokens, metric, names)
    return {name: (source_cache[name].detach() - own[name]) * gradients[name] for name in names}


def integrated_attribution(model, tokens, source_cache, metric, names, steps=8):
    own, _ = slopes(model, tokens, metric, [*names, "hook_embed"])
    sums = dict.fromkeys(names, 0.0)
    for share in torch.linspace(0.5 / steps, 1 - 0.5 / steps, steps, dtype=torch.float64).tolist():
        embed = torch.lerp(own["hook_embed"], source_cache["hook_embed"], share)
        _, gradients = slopes(model, tokens, metric, names, embed)
        sums = {name: sums[name] + gradients[name] / steps for name in names}
    return {name: sums[name] * (source_cache[name].detach() - own[name]) for name in names}
