"""Chapter 04's first half solved in another style: loops, indexing and matmul; PyTorch's own hooks; no einops.

Every check must accept it.
"""

import functools
from contextlib import ExitStack

import torch
from torch import nn

from course_utils.hooks import hooks as attached


class MyHookPoint(nn.Identity):
    def __init__(self):
        super().__init__()
        self.fns = []

    @property
    def is_watched(self):
        return bool(self.fns)

    def forward(self, activation):
        def step(current, fn):
            new = fn(current)
            return current if new is None else new

        return functools.reduce(step, self.fns, activation)


def my_run_with_hooks(model, tokens, hooks):
    wanted = []
    for name, fn in hooks:
        try:
            point = model.get_submodule(name)
        except AttributeError:
            raise KeyError(name) from None
        if not isinstance(point, MyHookPoint):
            raise KeyError(name)
        wanted.append((point, fn))
    with ExitStack() as stack:
        for point, fn in wanted:
            # PyTorch's forward hooks run after the module: so after all that is in `fns`
            handle = point.register_forward_hook(lambda module, inputs, output, fn=fn: fn(output))
            stack.callback(handle.remove)
        return model(tokens)


def my_run_with_cache(model, tokens, names=None):
    points = {name: module for name, module in model.named_modules() if type(module) is MyHookPoint}
    names = list(points) if names is None else names
    for name in names:
        points[name]
    cache, handles = {}, []
    for name in names:
        handles.append(
            points[name].register_forward_hook(functools.partial(lambda n, m, i, o: cache.update({n: o}), name))
        )
    try:
        output = model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return output, cache


def by_place(cache, weights_of):
    rows = []
    for layer in range(cache.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        rows.append([weights_of(pattern[:, head]).mean().item() for head in range(pattern.shape[1])])
    return torch.tensor(rows, dtype=pattern.dtype, device=pattern.device)


def previous_token_scores(cache):
    return by_place(cache, lambda pattern: pattern[:, range(1, pattern.shape[1]), range(pattern.shape[1] - 1)])


def repeated_tokens(n_batch, n_half, d_vocab, generator, bos):
    out = torch.empty(n_batch, 1 + 2 * n_half, dtype=torch.int64, device=generator.device).fill_(bos)
    uniform = torch.rand(n_batch, n_half, generator=generator, device=generator.device, dtype=torch.float64)
    out[:, 1 : 1 + n_half] = (uniform * d_vocab).long()
    out[:, 1 + n_half :] = out[:, 1 : 1 + n_half]
    return out


def induction_scores(cache, n_half):
    queries = torch.arange(n_half + 1, 2 * n_half + 1)
    return by_place(cache, lambda pattern: pattern[:, queries, queries - n_half + 1])


def duplicate_token_scores(cache, n_half):
    def first_occurrence(pattern):
        block = pattern[:, n_half + 1 :, 1 : n_half + 1]
        return (block * torch.eye(n_half, dtype=block.dtype, device=block.device)).sum(-1)

    return by_place(cache, first_occurrence)


def induction_scores_by_hook(model, tokens, n_half):
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    table = torch.zeros(n_layers, n_heads)
    mask = torch.zeros(2 * n_half + 1, 2 * n_half + 1)
    for query in range(n_half + 1, 2 * n_half + 1):
        mask[query, query - n_half + 1] = 1 / (n_half * len(tokens))

    def note(pattern, hook):
        layer = int(hook.name.split(".")[1])
        for head in range(n_heads):
            table[layer, head] = (pattern[:, head].detach() * mask).sum()

    with attached(model, [(f"blocks.{layer}.attn.hook_pattern", note) for layer in range(n_layers)]), torch.no_grad():
        model(tokens)
    return table


def top_predictions(logits, tokenizer, k):
    rows = []
    values, ids = logits.sort(descending=True)
    chances = (values - values[0]).exp() / (values - values[0]).exp().sum()
    for place in range(k):
        rows.append((place + 1, tokenizer.decode(ids[place]), float(values[place]), float(chances[place])))
    return rows


def residual_components(cache, pos):
    found = {name.removeprefix("hook_"): cache[name] for name in cache.names() if name.endswith("embed")}
    for layer in range(cache.n_layers):
        result = cache[f"blocks.{layer}.attn.hook_result"]
        for head in range(result.shape[2]):
            found[f"head {layer}.{head}"] = result[:, :, head]
        found[f"bias {layer}"] = cache[f"blocks.{layer}.hook_attn_out"] - result.sum(2)
        if f"blocks.{layer}.hook_mlp_out" in cache.names():
            found[f"mlp {layer}"] = cache[f"blocks.{layer}.hook_mlp_out"]
    return list(found), torch.stack([activation.select(1, pos) for activation in found.values()])


def logit_attribution(cache, model, tokens):
    """By the gradient: with the scale held fixed, the logit is linear in the stream."""
    with torch.no_grad():
        n_pos = tokens.shape[1] - 1
        parts = torch.stack([residual_components(cache, pos)[1] for pos in range(n_pos)], dim=2)
        columns = model.unembed.W_U.T[tokens[:, 1:]]
        if model.cfg.normalization == "none":
            return (parts * columns).sum(-1)
        read = columns * model.ln_final.w
        mean = read.mean(-1, keepdim=True) if model.cfg.normalization == "LN" else 0
        read = (read - mean) / cache["ln_final.hook_scale"][:, :-1]
        return (parts * read).sum(-1)
