"""Chapter 05's path patching and what heads do, in another style: PyTorch's own hooks, indexing, loops; no einops.

Every check must accept it.
"""

import torch

from course_utils.hooks import hook_points, run_with_cache


def attach(model, name, change):
    """A forward hook, and one of the course's that does nothing: a model may look whether a place is watched."""
    module = model.get_submodule(name)
    handles = [module.register_forward_hook(lambda module, inputs, output: change(output))]
    return [*handles, hook_points(model)[name].add(lambda activation, hook: None)]


def run(model, tokens, changes):
    """The logits with these functions at these places."""
    handles = []
    for name, change in changes.items():
        handles += attach(model, name, change)
    try:
        with torch.no_grad():
            return model(tokens)
    finally:
        for handle in handles:
            handle.remove()


def place(model, name):
    return f"blocks.{model.cfg.n_layers - 1}.hook_resid_post" if name == "final" else name


def run_over_direct_paths(model, tokens, fixed, receivers):
    noted, wanted = {}, {place(model, name) for name, _ in receivers}
    changes = {name: (lambda output, held=held: held) for name, held in fixed.items()}
    for name in wanted:

        def note(output, name=name):
            noted[name] = fixed.get(name, output)
            return noted[name]

        changes[name] = note
    run(model, tokens, changes)
    changes = {}
    for target in wanted:
        heads = [head for name, head in receivers if place(model, name) == target]

        def deliver(output, target=target, heads=heads):
            if heads[0] is None:
                return noted[target]
            columns = [noted[target][:, :, h] if h in heads else output[:, :, h] for h in range(output.shape[2])]
            return torch.stack(columns, 2)

        changes[target] = deliver
    return run(model, tokens, changes)


def look_first(model, senders, receivers):
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    for layer, head in senders:
        if layer not in range(n_layers) or head not in range(n_heads):
            raise ValueError((layer, head))
    for name, head in receivers:
        known = {f"blocks.{layer}.attn.hook_{letter}" for layer in range(n_layers) for letter in "qkv"}
        if (name == "final") != (head is None) or (
            name != "final" and (name not in known or head not in range(n_heads))
        ):
            raise ValueError((name, head))


def zs(model):
    return [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]


def hold(model, clean, freeze_mlps):
    names = zs(model)
    if freeze_mlps:
        names += [name for name in hook_points(model) if name.endswith("hook_mlp_out")]
    with torch.no_grad():
        return dict(run_with_cache(model, clean, names=names)[1])


def path_patch(model, clean, corrupted, senders, receivers, metric, freeze_mlps=True):
    look_first(model, senders, receivers)
    fixed = hold(model, clean, freeze_mlps)
    with torch.no_grad():
        _, source = run_with_cache(model, corrupted, names=zs(model))
    for layer, name in enumerate(zs(model)):
        sends = torch.tensor([(layer, head) in senders for head in range(model.cfg.n_heads)], device=clean.device)
        fixed[name] = torch.where(sends[:, None], source[name], fixed[name])
    return metric(run_over_direct_paths(model, clean, fixed, receivers))


def path_patch_heads(model, clean, corrupted, receivers, metric, freeze_mlps=True, max_rows=64):
    look_first(model, [], receivers)
    held = hold(model, clean, freeze_mlps)
    with torch.no_grad():
        _, source = run_with_cache(model, corrupted, names=zs(model))
    n, n_fit = len(clean), max(1, max_rows // len(clean))
    waiting = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    rows = []
    while waiting:
        group, waiting = waiting[:n_fit], waiting[n_fit:]
        copies = []
        for layer, head in group:
            own = dict(held)
            own[zs(model)[layer]] = held[zs(model)[layer]].clone()
            own[zs(model)[layer]][:, :, head] = source[zs(model)[layer]][:, :, head]
            copies.append(own)
        fixed = {name: torch.cat([own[name] for own in copies]) for name in held}
        logits = run_over_direct_paths(model, torch.cat([clean] * len(group)), fixed, receivers)
        rows += [metric(logits[start : start + n]).mean() for start in range(0, len(logits), n)]
    return torch.stack(rows).view(model.cfg.n_layers, model.cfg.n_heads)


def attention_between(cache, queries, keys):
    layers = []
    for pattern in cache.stack("pattern").unbind():
        layers.append(torch.stack([row[:, q, k] for row, q, k in zip(pattern, queries, keys, strict=True)], dim=1))
    return torch.stack(layers)


def name_copying_scores(model, dataset, sign=1, k=5):
    with torch.no_grad():
        _, cache = run_with_cache(model, dataset.tokens)
        stream = cache["resid_pre", 0] if model.cfg.attn_only else cache["resid_post", 0]
        table = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, dtype=stream.dtype, device=stream.device)
        batch = range(len(dataset.tokens))
        for place_ in ("IO", "S1"):
            at = dataset.positions[place_]
            vectors, names = stream[batch, at][:, None], dataset.tokens[batch, at]
            for layer, block in enumerate(model.blocks):
                for head in range(model.cfg.n_heads):
                    W_V, b_V, W_O = (getattr(block.attn, name)[head] for name in ("W_V", "b_V", "W_O"))
                    logits = model.unembed(model.ln_final(block.ln1(vectors) @ W_V @ W_O * sign + b_V @ W_O * sign))
                    logits = logits[:, 0]
                    rank = (logits > logits.gather(1, names[:, None])).sum(1)
                    table[layer, head] += (rank < k).sum() / (2 * len(names))
    return table


def signal_effects(model, dataset, senders, receivers):
    rows = torch.arange(len(dataset.tokens))

    def difference(logits):
        last = logits[rows, dataset.positions["END"]]
        return last[rows, dataset.io] - last[rows, dataset.s]

    others = [dataset.flipped("names"), dataset.flipped("order"), dataset.flipped("order").flipped("names")]
    answers = [path_patch(model, dataset.tokens, o.tokens, senders, receivers, difference) for o in others]
    nothing = path_patch(model, dataset.tokens, dataset.tokens, senders, receivers, difference)
    return dict(zip(("token", "position", "both"), [answer - nothing for answer in answers], strict=True))


def head_roles(tables, rules):
    roles = {}
    for role, conditions in rules.items():
        missing = [name for name in conditions if name not in tables]
        if missing:
            raise ValueError(role, missing)
        strength = tables[next(iter(conditions))].abs()
        order = strength.flatten().argsort(descending=True, stable=True).tolist()
        roles[role] = []
        for index in order:
            at = divmod(index, strength.shape[1])
            values = [(tables[name][at].item(), least) for name, least in conditions.items()]
            if all(value <= least if least < 0 else value >= least for value, least in values):
                roles[role].append(at)
    return roles
