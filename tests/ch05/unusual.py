"""Right answers by other means than most people's; `OF` has them by exercise, for `ALSO_RIGHT` of every section."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import solutions.ch05_patching as ref
from course_utils.hooks import hooks, run_with_cache, run_with_hooks


def of_log_probabilities(logits: Any, dataset: Any) -> Any:
    """Their difference is the same."""
    return ref.logit_difference(logits.log_softmax(-1), dataset)


def all_depths_at_once(cache: Any, model: Any, directions: Any) -> Any:
    return torch.einsum("lbpd,bd->lbp", model.ln_final(ref.accumulated_residual(cache)), directions)


class Patch:
    """A hook that is an object."""

    def __init__(self, source: Any, index: Any) -> None:
        self.source, self.place = source, (slice(None), *index)

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        patched = activation.clone()
        patched[self.place] = self.source[hook.name][self.place]
        return patched


def with_an_object_as_hook(model: Any, tokens: Any, source_cache: Any, name: str, index: Any) -> Any:
    with torch.inference_mode():
        return run_with_hooks(model, tokens, hooks={name: Patch(source_cache, index)})


class PatchHeads:
    """An answer that is an object."""

    def __call__(self, model: Any, tokens: Any, source_cache: Any, metric: Any) -> Any:
        return ref.patch_heads(model, tokens, source_cache, metric)


def backward_to_activations(model: Any, tokens: Any, source_cache: Any, metric: Any, names: Any) -> Any:
    """`backward` stores nothing in parameters if it is told where to go."""
    logits, cache = run_with_cache(model, tokens, names=names)
    metric(logits).sum().backward(inputs=[cache[name] for name in names])
    return {name: cache[name].grad * (source_cache[name] - cache[name]).detach() for name in names}


def putting_gradients_back(model: Any, tokens: Any, source_cache: Any, metric: Any, names: Any) -> Any:
    kept = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    logits, cache = run_with_cache(model, tokens, names=names)
    metric(logits).sum().backward()
    for parameter, gradient in zip(model.parameters(), kept, strict=True):
        parameter.grad = gradient
    return {name: cache.grad(name) * (source_cache[name] - cache[name]).detach() for name in names}


def functional(
    model: Any, tokens: Any, source_cache: Any, metric: Any, names: Any, steps: int = 8, start: float = 0.5
) -> Any:
    """An integrated_attribution by torch.func.grad; from the start in one step it is attribution_patching."""
    with torch.no_grad():
        _, own = run_with_cache(model, tokens)
    far = source_cache["hook_embed"].detach() - own["hook_embed"]

    def total(added: dict[str, Tensor], share: float) -> Tensor:
        moved: list[Any] = [("hook_embed", lambda embed, hook: embed + share * far)]
        adding = [(name, lambda activation, hook: activation + added[hook.name]) for name in names]
        return metric(run_with_hooks(model, tokens, hooks=moved + adding)).sum()

    zeros = {name: torch.zeros_like(own[name]) for name in names}
    slopes = [torch.func.grad(total)(zeros, (step + start) / steps) for step in range(steps)]
    return {
        name: (sum(slope[name] for slope in slopes) / steps * (source_cache[name] - own[name])).detach()
        for name in names
    }


def from_sets_and_tuples(
    model: Any, clean: Any, corrupted: Any, senders: Any, receivers: Any, metric: Any, freeze_mlps: bool = True
) -> Any:
    return ref.path_patch(model, clean, corrupted, sorted(set(senders)), tuple(receivers), metric, freeze_mlps)


def roles_in_numpy(tables: Any, rules: Any) -> Any:
    roles: dict[str, Any] = defaultdict(list)
    for role, heads in ref.head_roles(tables, rules).items():
        roles[role] = [(np.int64(layer), np.int64(head)) for layer, head in heads]
    return roles


def by_numbers_of_heads(model: Any, dataset: Any, circuit: Any, means: Any) -> Any:
    """The heads that stay, of every layer; the hooks are partials."""

    def silence(kept: list[int], z: Tensor, hook: Any) -> Tensor:
        silent = means[hook.name].clone()
        silent[:, :, kept] = z[:, :, kept]
        return silent

    kept = {layer: [head for at, head in circuit if at == layer] for layer in range(model.cfg.n_layers)}
    fns = {f"blocks.{layer}.attn.hook_z": partial(silence, numbers) for layer, numbers in kept.items()}
    with torch.inference_mode():
        return run_with_hooks(model, dataset.tokens, hooks=fns)


def rounds_in_sets(model: Any, dataset: Any, means: Any, share: float = 0.25, max_rows: int = 64) -> Any:
    return tuple(map(frozenset, ref.greedy_circuit(model, dataset, means, share, max_rows)))


def rounds_in_numpy(model: Any, dataset: Any, means: Any, share: float = 0.25, max_rows: int = 64) -> Any:
    return [np.array(circuit).reshape(-1, 2) for circuit in ref.greedy_circuit(model, dataset, means, share, max_rows)]


def by_vjp(model: Any, clean: Any, corrupted: Any, metric: Any, steps: int = 1) -> Any:
    """Edges by a vector-Jacobian product."""
    with torch.no_grad():
        caches = [run_with_cache(model, tokens)[1] for tokens in (clean, corrupted)]
        own, other = (ref.sender_outputs(model, cache) for cache in caches)
    far, possible = caches[1]["hook_embed"] - caches[0]["hook_embed"], ref.possible_edges(model.cfg)

    def value(added: Tensor, share: float) -> Tensor:
        with hooks(model, {"hook_embed": lambda embed, hook: embed + share * far}):
            return metric(ref.run_with_own_inputs(model, clean, added.__getitem__)).mean()

    zeros = own.new_zeros(possible.shape[1], *own.shape[1:])
    slopes = [
        torch.func.vjp(partial(value, share=step / steps), zeros)[1](own.new_ones(()))[0] for step in range(steps)
    ]
    return (torch.einsum("sbpd,rbpd->sr", other - own, sum(slopes) / steps) * possible).detach()  # type: ignore[operator]


def onto_the_span(model: Any, base: Any, source: Any, name: str, positions: Any, directions: Any) -> Any:
    """The projection for any directions; for those that are orthonormal it is the one that is asked for."""
    products = directions @ directions.T
    if (products - torch.eye(len(directions)).to(directions)).abs().max() > 1e-4:
        raise ValueError
    inside = directions.T @ torch.linalg.inv(products) @ directions
    with torch.no_grad():
        _, cache = run_with_cache(model, source)

    def swap(activation: Tensor, hook: Any) -> Tensor:
        here = nn.functional.one_hot(positions, activation.shape[1])[..., None]
        return activation + here * ((cache[name] - activation) @ inside)

    return run_with_hooks(model, base, hooks={name: swap})


def by_cholesky(
    model: Any,
    base: Any,
    source: Any,
    name: str,
    positions: Any,
    metric: Any,
    generator: Any,
    steps: int = 40,
    lr: float = 0.05,
    n_directions: int = 1,
) -> Any:
    """With AdamW that decays nothing, and `backward` to the one tensor that is learned."""

    def basis(rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(torch.linalg.cholesky(rows @ rows.T), rows, upper=False)

    raw = nn.Parameter(torch.randn(n_directions, model.cfg.d_model, generator=generator).to(model.embed.W_E))
    optimiser = torch.optim.AdamW([raw], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        values = metric(onto_the_span(model, base, source, name, positions, basis(raw)))
        torch.logaddexp(values, torch.zeros_like(values)).mean().backward(inputs=[raw])
        optimiser.step()
    return basis(raw).detach()


OF: dict[str, list[Callable[..., Any]]] = {
    "logit_difference": [of_log_probabilities],
    "logit_lens": [all_depths_at_once],
    "run_patched": [with_an_object_as_hook],
    "patch_heads": [PatchHeads()],
    "attribution_patching": [backward_to_activations, putting_gradients_back, partial(functional, steps=1, start=0.0)],
    "integrated_attribution": [functional],
    "path_patch": [from_sets_and_tuples],
    "head_roles": [roles_in_numpy],
    "mean_ablate_except": [by_numbers_of_heads],
    "greedy_circuit": [rounds_in_sets, rounds_in_numpy],
    "edge_attribution": [by_vjp],
    "interchange_intervention": [onto_the_span],
    "align_direction": [by_cholesky],
}
