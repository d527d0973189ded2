"""Wrong answers that are right on one friendly input: another size, dtype, order or default shows them.

`OF` has them by exercise, each with words of its refusal; every section adds its own to `SURPRISES`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import solutions.ch05_patching as ref
from course_utils.hooks import run_with_cache, run_with_hooks
from tests.ch05 import other_edges

Answer = Callable[..., Any]


def squeezed(exercise: str) -> Answer:
    """Gives up axes of size 1."""
    return lambda *given, **options: getattr(ref, exercise)(*given, **options).squeeze()


def by_letter(name: str) -> int:
    """The layer of a hook point's name, where it has one digit."""
    return int(name[7])


def softmax_then_log(logits: Any, dataset: Any) -> Any:
    return ref.logit_difference(logits.softmax(-1).log(), dataset)


def by_one_hot(logits: Any, dataset: Any) -> Any:
    """Zero times -inf is no number."""
    last = logits[torch.arange(len(logits)), dataset.positions["END"]]
    io, s = (nn.functional.one_hot(token, logits.shape[-1]) for token in (dataset.io, dataset.s))
    return (last * (io - s)).sum(-1)


def by_view(logits: Any, dataset: Any) -> Any:
    """Wants contiguous logits."""
    n_batch, n_pos, d_vocab = logits.shape
    rows = torch.arange(n_batch)
    last = logits.view(-1, d_vocab)[rows * n_pos + dataset.positions["END"]]
    return last[rows, dataset.io] - last[rows, dataset.s]


def in_single_precision(logits: Any, dataset: Any) -> Any:
    return ref.logit_difference(logits.float(), dataset).to(logits.dtype)


def normalised(refuses: Callable[[float, float], bool], epsilon: float = 0.0) -> Answer:
    """A normalised_metric that refuses other gaps, or adds something to them."""

    def normalised_metric(logits: Any, dataset: Any, clean: float, corrupted: float) -> Any:
        if refuses(clean, corrupted):
            raise ValueError
        return (ref.logit_difference(logits, dataset) - corrupted) / (clean - corrupted + epsilon)

    return normalised_metric


def by_sorted_names(cache: Any) -> Any:
    """As texts, 10 comes before 2."""
    names = sorted(name for name in cache if name.endswith("hook_resid_pre"))
    return torch.stack([*(cache[name] for name in names), cache["resid_post", -1]])


def through_numpy(cache: Any) -> Any:
    return torch.from_numpy(torch.cat([cache.stack("resid_pre"), cache["resid_post", -1][None]]).numpy())


def component_by_component(cache: Any) -> Any:
    """Asks for more than the streams."""
    rows = [cache["embed"] + cache["pos_embed"]]
    for layer in range(cache.n_layers):
        mlp = cache["mlp_out", layer] if f"blocks.{layer}.hook_mlp_out" in cache else 0
        rows.append(rows[-1] + cache["attn_out", layer] + mlp)
    return torch.stack(rows)


def rounded_lens(cache: Any, model: Any, directions: Any) -> Any:
    return ref.logit_lens(cache, model, directions).float().to(directions.dtype)


def by_results(cache: Any, model: Any, directions: Any) -> Any:
    """What each head adds is not in an ordinary cache."""
    result = cache.stack("result")
    centred = (result - result.mean(-1, keepdim=True)) / cache["ln_final.scale"][:, :, None] * model.ln_final.w
    return torch.einsum("lbphd,bd->lhbp", centred, directions)


def heads_by_sorted_layers(cache: Any, model: Any, directions: Any) -> Any:
    rows = ref.head_attribution(cache, model, directions)
    return rows[sorted(range(len(rows)), key=str)]


def with_one_or_two_indices(model: Any, tokens: Any, source_cache: Any, name: str, index: Any) -> Any:
    place = (slice(None), index[0]) if len(index) == 1 else (slice(None), index[0], index[1])
    return ref.run_patched(model, tokens, source_cache, name, place[1:])


def with_a_glob(model: Any, tokens: Any, source_cache: Any, name: str, index: Any) -> Any:
    """`blocks.1*` is layer 10, too."""

    def patch(activation: Tensor, hook: Any) -> Tensor:
        patched = activation.clone()
        patched[(slice(None), *index)] = source_cache[hook.name][(slice(None), *index)]
        return patched

    owner, _, rest = name.partition(".")
    glob = f"{owner}.{rest.replace('.', '*.', 1)}" if owner == "blocks" else name
    with torch.no_grad():
        return run_with_hooks(model, tokens, hooks={glob: patch})


def heads_with_a_glob(model: Any, tokens: Any, source_cache: Any, metric: Any) -> Any:
    rows = [
        metric(with_a_glob(model, tokens, source_cache, f"blocks.{layer}.attn.hook_z", (slice(None), head))).mean()
        for layer, head in ref.every_head(model)
    ]
    return torch.stack(rows).reshape(model.cfg.n_layers, -1)


def from_first_digit(model: Any, resid: Any, layer: int) -> Any:
    return ref.run_from(model, resid, int(str(layer)[0]))


def sweep_by_letter(model: Any, tokens: Any, cache: Any, metric: Any, patches: Any, max_rows: int = 64) -> Any:
    kept = ref.first_layer
    ref.first_layer = lambda name, n_layers: by_letter(name) if name[0] == "b" else kept(name, n_layers)
    try:
        return ref.batched_sweep(model, tokens, cache, metric, patches, max_rows)
    finally:
        ref.first_layer = kept


def sweep_of_many_rows(model: Any, tokens: Any, cache: Any, metric: Any, patches: Any, max_rows: int = 4096) -> Any:
    return ref.batched_sweep(model, tokens, cache, metric, patches, max_rows)


def wiping_gradients(model: Any, tokens: Any, source_cache: Any, metric: Any, names: Any) -> Any:
    """By `backward`; afterwards no parameter has a gradient, not even one that was there before."""
    logits, cache = run_with_cache(model, tokens, names=names)
    metric(logits).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return {name: cache.grad(name) * (source_cache[name] - cache[name]).detach() for name in names}


def with_the_sources_graph(answer: Answer) -> Answer:
    """The cache of a run without `torch.no_grad()` has one."""

    def attribution(model: Any, tokens: Any, source_cache: Any, *rest: Any) -> Any:
        found = answer(model, tokens, source_cache, *rest)
        return {name: value + 0 * source_cache[name] for name, value in found.items()}

    return attribution


def in_four_steps(model: Any, tokens: Any, source_cache: Any, metric: Any, names: Any, steps: int = 4) -> Any:
    return ref.integrated_attribution(model, tokens, source_cache, metric, names, steps)


def with_embeddings_held(*given: Any) -> Any:
    found = ref.integrated_attribution(*given)
    return {name: value * (name != "hook_embed") for name, value in found.items()}


def one_for_each_name(pairs: Any) -> Any:
    """A dictionary has one entry for each hook point, or layer: the last."""
    return list(dict(pairs).items())


def final_if_alone(model: Any, tokens: Any, fixed: Any, receivers: Any) -> Any:
    kept = [receiver for receiver in receivers if receiver[0] != "final"] or receivers
    return ref.run_over_direct_paths(model, tokens, fixed, kept)


def direct_paths_to_one_each(model: Any, tokens: Any, fixed: Any, receivers: Any) -> Any:
    return ref.run_over_direct_paths(model, tokens, fixed, one_for_each_name(receivers))


def path_patch_of(senders: Answer = list, receivers: Answer = list) -> Answer:
    """A path_patch that changes the lists that it is given, once it has looked at them."""

    def path_patch(
        model: Any, clean: Any, corrupted: Any, start: Any, end: Any, metric: Any, freeze_mlps: bool = True
    ) -> Any:
        ref.refuse_unknown(model, start, end)
        return ref.path_patch(model, clean, corrupted, senders(start), receivers(end), metric, freeze_mlps)

    return path_patch


def all_heads_for_none(
    model: Any, clean: Any, corrupted: Any, senders: Any, receivers: Any, metric: Any, freeze_mlps: bool = True
) -> Any:
    ends: list[Any] = []
    for name, head in receivers:
        heads = range(model.cfg.n_heads) if head is None and name != "final" else [head]
        ends += [(name, number) for number in heads]
    return ref.path_patch(model, clean, corrupted, senders, ends, metric, freeze_mlps)


def heads_one_receiver_each(model: Any, clean: Any, corrupted: Any, receivers: Any, *rest: Any, **options: Any) -> Any:
    ref.refuse_unknown(model, [], receivers)
    return ref.path_patch_heads(model, clean, corrupted, one_for_each_name(receivers), *rest, **options)


def heads_with_loose_mlps(
    model: Any,
    clean: Any,
    corrupted: Any,
    receivers: Any,
    metric: Any,
    freeze_mlps: bool = False,
    max_rows: int = 64,
) -> Any:
    return ref.path_patch_heads(model, clean, corrupted, receivers, metric, freeze_mlps, max_rows)


def attention_in(names: Callable[[Any], Any]) -> Answer:
    """An attention_between in other activations of the cache."""

    def attention_between(cache: Any, queries: Any, keys: Any) -> Any:
        patterns = torch.stack([cache[name] for name in names(cache)])
        return patterns[:, torch.arange(len(queries)), :, queries, keys].permute(1, 2, 0)

    return attention_between


def roles_by_name(tables: Any, rules: Any) -> Any:
    return dict(sorted(ref.head_roles(tables, rules).items()))


def refusing_without_words(tables: Any, rules: Any) -> Any:
    if any(name not in tables for conditions in rules.values() for name in conditions):
        raise ValueError
    return ref.head_roles(tables, rules)


def squeezed_means(*given: Any, **options: Any) -> Any:
    return {name: mean.squeeze() for name, mean in ref.template_means(*given, **options).items()}


def except_by_letter(model: Any, dataset: Any, circuit: Any, means: Any) -> Any:
    def silence(z: Tensor, hook: Any) -> Tensor:
        kept = torch.tensor([(by_letter(hook.name), head) in circuit for head in range(z.shape[2])])
        return torch.where(kept[:, None], z, means[hook.name])

    with torch.no_grad():
        return run_with_hooks(model, dataset.tokens, hooks={"*.attn.hook_z": silence})


def means_in_their_order(model: Any, dataset: Any, circuit: Any, means: Any) -> Any:
    """Takes it for granted that the first mean is that of the first layer."""
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    return ref.mean_ablate_except(model, dataset, circuit, dict(zip(names, means.values(), strict=True)))


def scores_by_letter(model: Any, dataset: Any, circuits: Any, means: Any, max_rows: int = 64) -> Any:
    """Heads of layer 10 are kept where those of layer 1 are."""
    deep = range(10, model.cfg.n_layers)
    wrong = [
        {at for at in circuit if at[0] < 10} | {(layer, head) for layer in deep for at, head in circuit if at == 1}
        for circuit in circuits
    ]
    return ref.circuit_scores(model, dataset, wrong, means, max_rows)


def scores_of_lists(model: Any, dataset: Any, circuits: Any, means: Any, max_rows: int = 64) -> Any:
    """Takes lists and nothing else."""
    return ref.circuit_scores(model, dataset, [list.copy(circuit) for circuit in circuits], means, max_rows)


def scores_in_many_rows(model: Any, dataset: Any, circuits: Any, means: Any, max_rows: int = 1000) -> Any:
    return ref.circuit_scores(model, dataset, circuits, means, max_rows)


def without_its_sign(model: Any, dataset: Any, circuits: Any, means: Any) -> Any:
    scores = ref.circuit_scores(model, dataset, [ref.every_head(model), *circuits], means)
    return scores[1:] / scores[0].abs()


def faithful_lists(model: Any, dataset: Any, circuits: Any, means: Any) -> Any:
    return ref.faithfulness(model, dataset, [list.copy(circuit) for circuit in circuits], means)


def complete_lists(model: Any, dataset: Any, circuit: Any, removed: Any, means: Any) -> Any:
    return ref.completeness(model, dataset, list.copy(circuit), [list.copy(heads) for heads in removed], means)


def complete_slices(model: Any, dataset: Any, circuit: Any, removed: Any, means: Any) -> Any:
    return ref.completeness(model, dataset, circuit[:], removed, means)


def minimal_lists(model: Any, dataset: Any, circuit: Any, removed: Any, means: Any) -> Any:
    return ref.minimality(model, dataset, circuit, {head: list.copy(others) for head, others in removed.items()}, means)


def sharing_a_tenth(model: Any, dataset: Any, means: Any, share: float = 0.1, max_rows: int = 64) -> Any:
    return ref.greedy_circuit(model, dataset, means, share, max_rows)


def senders_by(key: Callable[[str], Any]) -> Answer:
    """A sender_outputs in another order; the first row stays."""

    def sender_outputs(model: Any, cache: Any) -> Any:
        names = list(ref.edge_nodes(model.cfg)[0])
        return ref.sender_outputs(model, cache)[[0, *sorted(range(1, len(names)), key=lambda i: key(names[i]))]]

    return sender_outputs


def edges_in_steps(model: Any, clean: Any, corrupted: Any, metric: Any, steps: int = 3) -> Any:
    return ref.edge_attribution(model, clean, corrupted, metric, steps)


def refusing_beyond(tolerance: float) -> Answer:
    """An interchange_intervention that refuses less, or more, than it should."""

    def interchange_intervention(*given: Any) -> Any:
        *rest, directions = given
        crooked = directions @ directions.T - torch.eye(len(directions)).to(directions)
        if crooked.abs().max() > tolerance:
            raise ValueError
        kept = torch.allclose
        torch.allclose = lambda *values, **options: True
        try:
            return ref.interchange_intervention(*rest, directions)
        finally:
            torch.allclose = kept

    return interchange_intervention


def by_log_of_one_plus_exp(
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
    """Beyond 88 this is inf in float32, and its gradient no number."""
    raw = torch.randn(n_directions, model.cfg.d_model, generator=generator).to(model.embed.W_E).requires_grad_()
    optimiser = torch.optim.Adam([raw], lr=lr)
    for _ in range(steps):
        directions = other_edges.gram_schmidt(raw)
        values = metric(other_edges.interchange_intervention(model, base, source, name, positions, directions))
        (raw.grad,) = torch.autograd.grad((1 + values.exp()).log().mean(), [raw])
        optimiser.step()
    return other_edges.gram_schmidt(raw).detach()


def in_larger_steps(*given: Any, lr: float = 0.1, **options: Any) -> Any:
    return ref.align_direction(*given, lr=lr, **options)


WRONG, SHAPE, RAISED = "wrong.", "wrong shape", "your code raised"
OF: dict[str, list[tuple[str, Answer]]] = {
    "logit_difference": [
        ("not a number", softmax_then_log),
        ("not a number", by_one_hot),
        (RAISED, by_view),
        ("only as exact as float32", in_single_precision),
    ],
    "normalised_metric": [
        ("ValueError with clean=0.003", normalised(lambda clean, corrupted: abs(clean - corrupted) < 0.1)),
        ("ValueError with clean=0.0,", normalised(lambda clean, corrupted: not clean or clean == corrupted)),
        (WRONG, normalised(lambda clean, corrupted: clean == corrupted, epsilon=1e-6)),
    ],
    "accumulated_residual": [
        ("11 layers", by_sorted_names),
        (RAISED, through_numpy),
        ("Nothing is cached under 'embed'", component_by_component),
        (SHAPE, squeezed("accumulated_residual")),
    ],
    "logit_lens": [("only as exact as float32", rounded_lens), (SHAPE, squeezed("logit_lens"))],
    "head_attribution": [("Nothing is cached under 'result'", by_results), ("11 layers", heads_by_sorted_layers)],
    "run_patched": [("slice(1, 3, None)", with_one_or_two_indices), ("11 layers", with_a_glob)],
    "patch_heads": [("11 layers", heads_with_a_glob)],
    "run_from": [("with layer=10", from_first_digit)],
    "batched_sweep": [("times through a layer", sweep_by_letter), ("one forward had 96 rows", sweep_of_many_rows)],
    "attribution_patching": [
        ("it changed `model.embed.W_E.grad`", wiping_gradients),
        ("still has its graph", with_the_sources_graph(ref.attribution_patching)),
    ],
    "integrated_attribution": [
        ("with steps=8", in_four_steps),
        ("still has its graph", with_the_sources_graph(ref.integrated_attribution)),
        ("at hook_embed", with_embeddings_held),
    ],
    "run_over_direct_paths": [
        (WRONG, final_if_alone),
    ],
    "path_patch": [
        (WRONG, path_patch_of(senders=one_for_each_name)),
        (WRONG, path_patch_of(receivers=one_for_each_name)),
        ("should raise ValueError", all_heads_for_none),
    ],
    "path_patch_heads": [
        (WRONG, heads_one_receiver_each),
        ("without freeze_mlps", heads_with_loose_mlps),
    ],
    "attention_between": [
        (SHAPE, attention_in(list)),
        (WRONG, attention_in(lambda cache: sorted(name for name in cache if name.endswith("pattern")))),
        (SHAPE, squeezed("attention_between")),
    ],
    "name_copying_scores": [(SHAPE, squeezed("name_copying_scores"))],
    "head_roles": [("the roles come as", roles_by_name), ("the error says only", refusing_without_words)],
    "template_means": [(SHAPE, squeezed_means)],
    "mean_ablate_except": [("11 layers", except_by_letter), (WRONG, means_in_their_order)],
    "circuit_scores": [
        ("11 layers", scores_by_letter),
        (RAISED, scores_of_lists),
        ("one forward had 80 rows", scores_in_many_rows),
        (SHAPE, squeezed("circuit_scores")),
    ],
    "faithfulness": [("whose wrong name wins", without_its_sign), (RAISED, faithful_lists)],
    "completeness": [(RAISED, complete_lists), (RAISED, complete_slices)],
    "minimality": [(RAISED, minimal_lists)],
    "greedy_circuit": [("wrong answer", sharing_a_tenth)],
    "sender_outputs": [
        ("11 layers", senders_by(lambda name: name.removeprefix("mlp ").split(".")[0])),
        ("11 heads", senders_by(lambda name: (int(name.removeprefix("mlp ").split(".")[0]), "mlp" in name, name))),
    ],
    "edge_attribution": [("11 heads", edges_in_steps)],
    "interchange_intervention": [(RAISED, refusing_beyond(1e-9)), ("of length 1.0002", refusing_beyond(1e-2))],
    "align_direction": [(WRONG, by_log_of_one_plus_exp), ("hundreds", in_larger_steps)],
}
for exercise in "patch_residual_stream patch_components patch_heads_by_position patch_head_inputs".split():
    OF[exercise] = [(SHAPE, squeezed(exercise))]
