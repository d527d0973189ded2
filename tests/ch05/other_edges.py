"""Chapter 05's edges and directions in another style: vector-Jacobian products, parameters, PyTorch's own hooks.

Every check must accept it.
"""

import math

import torch

from course_utils.hooks import hooks, run_with_cache, run_with_hooks
from tests.ch02.other_transformer import apply_rotary


def sender_outputs(model, cache):
    rows = [cache["blocks.0.hook_resid_pre"]]
    for layer, block in enumerate(model.blocks):
        for head in range(model.cfg.n_heads):
            rows.append(cache[f"blocks.{layer}.attn.hook_z"][:, :, head] @ block.attn.W_O[head])
        if hasattr(block, "mlp"):
            rows.append(cache[f"blocks.{layer}.hook_mlp_out"])
    return torch.stack(rows)


def back_through(norm, resid, slope):
    """The gradient before a LayerNorm, given that after it."""
    _, back = torch.func.vjp(norm, resid.detach())
    return back(slope)[0]


def slopes(model, tokens, metric, embed):
    """The gradient with respect to what each receiver reads, from the gradients at q, k, v and in the MLPs."""
    cfg = model.cfg
    with hooks(model, {"hook_embed": lambda own, hook: embed}):
        logits, cache = run_with_cache(model, tokens)
    wanted = []
    for layer in range(cfg.n_layers):
        wanted += [cache[letter, layer] for letter in "qkv"] + ([] if cfg.attn_only else [cache["mlp.pre", layer]])
    found = iter(torch.autograd.grad(metric(logits).sum() / len(tokens), [*wanted, cache["resid_post", -1]]))
    rows = []
    for layer, block in enumerate(model.blocks):
        for letter in "QKV":
            at = next(found)
            for head in range(cfg.n_heads):
                slope = at[:, :, head] @ getattr(block.attn, f"W_{letter}")[head].detach().T
                rows.append(back_through(block.ln1, cache["resid_pre", layer], slope))
        if not cfg.attn_only:
            slope = next(found) @ block.mlp.W_in.detach().T
            rows.append(back_through(block.ln2, cache["resid_mid", layer], slope))
    return torch.stack([*rows, next(found)]).detach()


def edge_attribution(model, clean, corrupted, metric, steps=1):
    with torch.no_grad():
        _, here = run_with_cache(model, clean)
        _, there = run_with_cache(model, corrupted)
    difference = sender_outputs(model, there).detach() - sender_outputs(model, here).detach()
    gradients = []
    for step in range(steps):
        embed = torch.lerp(here["hook_embed"], there["hook_embed"], step / steps)
        gradients.append(slopes(model, clean, metric, embed))
    gradient = torch.stack(gradients).mean(0)
    table = difference.flatten(1) @ gradient.flatten(1).T
    return table * seen_by(model.cfg).to(table)


def seen_by(cfg):
    """How many senders each receiver can read, as a table."""
    step = cfg.n_heads + (not cfg.attn_only)
    counts = []
    for layer in range(cfg.n_layers):
        counts += [1 + layer * step] * 3 * cfg.n_heads + ([] if cfg.attn_only else [1 + layer * step + cfg.n_heads])
    n_senders = 1 + cfg.n_layers * step
    return torch.arange(n_senders)[:, None] < torch.tensor([*counts, n_senders])


def run_with_edges(model, clean, corrupted, edges):
    """Without hooks: a forward from the parameters."""
    with torch.no_grad():
        cfg = model.cfg
        _, there = run_with_cache(model, corrupted)
        other = sender_outputs(model, there)
        now = [model.embed.W_E[clean] + model.pos_embed(clean)]
        bias, column = torch.zeros(()), 0

        def read():
            nonlocal column
            parts = [now[i] if edges[i, column] else other[i] for i in range(len(now))]
            column += 1
            return sum(parts) + bias

        for block in model.blocks:
            attn = block.attn
            inputs = [[block.ln1(read()) for _ in range(cfg.n_heads)] for _ in "QKV"]
            written = []
            for head in range(cfg.n_heads):
                q, k, v = (
                    versions[head] @ getattr(attn, f"W_{letter}")[head] + getattr(attn, f"b_{letter}")[head]
                    for versions, letter in zip(inputs, "QKV", strict=True)
                )
                if cfg.positions == "rotary":
                    options = torch.arange(clean.shape[1]), cfg.rotary_dim, cfg.rotary_base
                    q, k = (apply_rotary(vectors[:, :, None], *options).squeeze(2) for vectors in (q, k))
                scores = q @ k.transpose(1, 2) / math.sqrt(cfg.d_head)
                past = torch.ones_like(scores, dtype=torch.bool).tril()
                written.append(scores.where(past, -torch.inf).softmax(-1) @ v @ attn.W_O[head])
            now += written
            bias = bias + attn.b_O
            if not cfg.attn_only:
                now.append(block.mlp(block.ln2(read())))
        return model.ln_final(read()) @ model.unembed.W_U + model.unembed.b_U


def interchange_intervention(model, base, source, name, positions, directions):
    if (directions @ directions.T - torch.eye(len(directions)).to(directions)).abs().max() > 1e-4:
        raise ValueError("crooked")
    kept = []
    with torch.no_grad():
        run_with_hooks(model, source, hooks={name: lambda activation, hook: kept.append(activation)})
    here = torch.arange(base.shape[1]) == positions[:, None]

    def fn(activation, hook):
        other = activation - (activation - kept[0]) @ (directions.T @ directions)
        return torch.where(here[..., None], other, activation)

    return run_with_hooks(model, base, hooks={name: fn})


def gram_schmidt(rows):
    basis = []
    for row in rows:
        row = row - sum((row @ other) * other for other in basis)
        basis.append(row / row.square().sum().sqrt())
    return torch.stack(basis)


def align_direction(model, base, source, name, positions, metric, generator, steps=40, lr=0.05, n_directions=1):
    raw = torch.randn(n_directions, model.cfg.d_model, generator=generator)
    raw = raw.to(model.unembed.W_U.dtype).requires_grad_()
    first, second = torch.zeros_like(raw), torch.zeros_like(raw)
    for step in range(1, steps + 1):
        values = metric(interchange_intervention(model, base, source, name, positions, gram_schmidt(raw)))
        (slope,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(-values).mean(), raw)
        with torch.no_grad():  # Adam
            first = 0.9 * first + 0.1 * slope
            second = 0.999 * second + 0.001 * slope**2
            raw = raw - lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        raw.requires_grad_()
    return gram_schmidt(raw).detach()
