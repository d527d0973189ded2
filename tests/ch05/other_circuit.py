"""Chapter 05, "Is that the circuit?", solved in another style: PyTorch's own hooks, loops, sets; no batching tricks.

Every check must accept it.
"""

import torch

from course_utils.hooks import hook_points
from tests.ch05.other_patching import logit_difference


def every_head(model):
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    return [divmod(number, n_heads) for number in range(n_layers * n_heads)]


def z_names(model):
    return [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]


def template_means(model, tokens, templates, max_rows=256):
    n_templates = max(templates.tolist()) + 1
    means = {}
    for template in range(n_templates):
        own = tokens[templates == template]
        if not len(own):
            raise ValueError(f"nobody is of template {template}")
        pieces = {name: [] for name in z_names(model)}
        points = hook_points(model)
        handles = [
            points[name].add(lambda z, hook, pieces=pieces: pieces[hook.name].append(z.detach())) for name in pieces
        ]
        try:
            with torch.no_grad():
                for start in range(0, len(own), max_rows):
                    model(own[start : start + max_rows])
        finally:
            for handle in handles:
                handle.remove()
        for name in pieces:
            means.setdefault(name, []).append(torch.cat(pieces[name]).mean(0))
    return {name: torch.stack(rows) for name, rows in means.items()}


def ablated(model, tokens, circuits, means):
    """One run in which each circuit has a copy of the prompts."""
    n = len(tokens)
    handles = []
    for layer, name in enumerate(z_names(model)):

        def swap(module, inputs, output, layer=layer, name=name):
            output = output.clone()
            for copy, circuit in enumerate(circuits):
                for head in {head for head in range(output.shape[2]) if (layer, head) not in circuit}:
                    output[copy * n : (copy + 1) * n, :, head] = means[name][:, :, head]
            return output

        handles.append(model.get_submodule(name).register_forward_hook(swap))
    try:
        with torch.no_grad():
            return model(torch.cat([tokens] * len(circuits)))
    finally:
        for handle in handles:
            handle.remove()


def mean_ablate_except(model, dataset, circuit, means):
    return ablated(model, dataset.tokens, [circuit], means)


def circuit_scores(model, dataset, circuits, means, max_rows=64):
    waiting, scores = list(circuits), []
    n_fit = max(max_rows // len(dataset.tokens), 1)
    while waiting:
        group, waiting = waiting[:n_fit], waiting[n_fit:]
        logits = ablated(model, dataset.tokens, group, means).unflatten(0, (len(group), -1))
        scores.extend(logit_difference(copy, dataset).mean() for copy in logits)
    return torch.stack(scores)


def faithfulness(model, dataset, circuits, means):
    with torch.no_grad():
        whole = logit_difference(model(dataset.tokens), dataset).mean()
    return circuit_scores(model, dataset, circuits, means) / whole


def completeness(model, dataset, circuit, removed, means):
    pairs = []
    for heads in map(set, removed):
        if heads - set(circuit):
            raise ValueError("not of the circuit")
        pairs.append(circuit_scores(model, dataset, [set(circuit) - heads, set(every_head(model)) - heads], means))
    return torch.stack(pairs, dim=1)


def minimality(model, dataset, circuit, removed, means):
    with torch.no_grad():
        whole = logit_difference(model(dataset.tokens), dataset).mean().abs()
    values = []
    for head, others in removed.items():
        left = set(circuit) - set(others)
        if head not in left or not set(others) <= set(circuit):
            raise ValueError("not different heads of the circuit")
        with_it, without_it = circuit_scores(model, dataset, [left, left - {head}], means)
        values.append((with_it - without_it).abs() / whole)
    return torch.stack(values)


def greedy_circuit(model, dataset, means, share=0.25, max_rows=64):
    kept = set(every_head(model))
    (whole,) = circuit_scores(model, dataset, [kept], means).tolist()
    rounds = [set(kept)]
    while kept:
        now, *rest = circuit_scores(model, dataset, [kept, *(kept - {head} for head in sorted(kept))], means, max_rows)
        changes = {head: float(score - now) for head, score in zip(sorted(kept), rest, strict=True)}
        gone = set()
        while len(gone) < max(1, int(share * len(kept))):
            surplus = float(now) + sum(changes[head] for head in gone) - whole
            _, next_one = min((abs(surplus + changes[head]), head) for head in kept - gone)
            gone.add(next_one)
        kept = kept - gone
        rounds.append(kept)
    return rounds
