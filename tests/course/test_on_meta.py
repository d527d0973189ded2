"""Every function and class of the solutions, driven once on a device that is not the CPU.

Tensors on "meta" have shapes and no values, and torch refuses to mix them with tensors of the CPU, as it refuses to mix
those of a GPU. So a tensor that is made on the CPU half-way fails here, where there is no GPU.
"""

import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import solutions
from course_utils.config import TransformerConfig
from course_utils.data.ioi import IOIDataset
from course_utils.hooks import ActivationCache, hook_points, run_with_cache
from course_utils.pretrained import shipped_tokenizer
from solutions import (
    ch00_tensors,
    ch02_transformer,
    ch03_training,
    ch04_induction,
    ch05_patching,
    ch06_superposition,
    ch07_probes,
    ch08_function_vectors,
    ch09_dictionaries,
    ch10_circuits,
    ch11_oracles,
)

CFG = TransformerConfig(d_vocab=1100, n_ctx=40, n_layers=2, n_heads=3, d_model=12, d_head=4, d_mlp=16)
PYTHIA = TransformerConfig(
    d_vocab=1100, n_ctx=40, n_layers=2, n_heads=3, d_model=12, d_head=4, d_mlp=16, positions="rotary", rotary_dim=2,
    parallel=True,
)  # fmt: skip
LLAMA = TransformerConfig(
    d_vocab=1100, n_ctx=40, n_layers=2, n_heads=4, n_kv_heads=2, d_model=12, d_head=4, d_mlp=16, positions="rotary",
    rotary_dim=4, normalization="RMS", gated=True,
)  # fmt: skip
ADDER = TransformerConfig(
    d_vocab=8, n_ctx=3, n_layers=1, n_heads=3, d_model=12, d_head=4, d_mlp=16, act="relu", normalization="none"
)
HEADS = [(layer, head) for layer in range(2) for head in range(3)]
Z = "blocks.0.attn.hook_z"

WITHOUT = {  # what cannot be driven here, and why
    "relative_positions": "is given a number, so there is no device to follow",
    "reverse_increment_dataset": "is given nothing",
    "pack_documents": "is given lists",
    "cosine_schedule": "works on numbers",
    "flops_per_token": "works on numbers",
    "memory_bytes": "works on numbers",
    "save_checkpoint": "writes values to a file; its check reads them back on the CPU",
    "load_checkpoint": "reads on the CPU, as its statement says",
    "what_squares_write": "how many positions there are depends on values",
    "masked_lm_loss": "how many targets there are depends on the values of the mask",
    "fit": "needs masked_lm_loss, and draws its batches from data on the CPU",
    "ban_repeated_ngrams": "which tokens are banned depends on values",
    "beam_search": "which beams live on depends on values",
    "repeated_tokens": "is given a generator, and there are none on meta",
    "sample": "is given a generator, and there are none on meta",
    "random_rotation": "is given a generator of the CPU, and whoever calls it moves the result",
    "top_predictions": "makes a list out of values",
    "skip_trigrams": "gives token numbers",
    "top1_accuracy": "counts hits, a number",
    "template_means": "how many templates there are depends on values",
    "greedy_circuit": "which head goes depends on values",
    "head_roles": "makes lists out of values",
    "sample_features": "is given a generator, and there are none on meta",
    "sample_pairs": "is given a generator, and there are none on meta",
    "train_on_fixed_data": "is given a generator, and there are none on meta",
    "worst_case_gain": "is given a generator, and the search goes on with what it draws",
    "pick_worst": "is given a generator of the CPU, where it draws",
    "best_assignment": "looks for the best way among values",
    "match_features": "which latent is whose depends on values",
    "recovery": "counts features, a number",
    "is_balanced": "is given a text",
    "bracket_dataset": "is given a generator, and there are none on meta",
    "fit_brackets": "draws its batches on the CPU",
    "scores_with_patch": "how many positions are patched depends on the values of the mask",
    "corrupted_pairs": "is given a generator, and there are none on meta",
    "hill_climb": "is given a generator, and the search goes on with what it draws",
    "every_head": "makes a list out of a model's config",
    "random_circuits": "makes lists",
    "edge_nodes": "makes dictionaries out of a config",
    "possible_edges": "makes a mask out of a config; those who use it move it",
    "stream_name": "gives a name",
    "class_means": "which rows are of a class depends on values",
    "mean_difference_probe": "needs class_means",
    "mass_mean_probe": "needs class_means",
    "logistic_probe": "needs class_means",
    "softmax_probe": "is fitted by LBFGS, which asks for numbers",
    "auroc": "which rows are of a class depends on values",
    "hold_out": "is given a generator of the CPU, and how many types there are depends on values",
    "control_task": "is given a generator of the CPU, and how many types there are depends on values",
    "selectivity": "needs control_task",
    "generalisation_matrix": "which rows are fitted depends on values",
    "erase": "how many classes there are depends on values",
    "first_layer": "works on texts and numbers",
    "refuse_unknown": "works on texts and numbers",
    "modular_addition_dataset": "is given a generator, and there are none on meta",
    "fit_modular": "how many pairs are for training depends on the values of the mask",
    "fourier_basis": "is given a number, so there is no device to follow",
    "fourier_2d_basis_term": "is given numbers, so there is no device to follow",
    "sum_waves": "is given numbers, so there is no device to follow",
    "excluded_loss": "how many pairs are for training depends on the values of the mask",
    "loss_with_frequencies": "how many waves are kept depends on values",
    "flips": "walks over the board's values",
    "legal_moves": "needs flips",
    "board_states": "needs flips",
    "train_probe": "draws its batches on the CPU",
    "probe_accuracy": "how many squares hold a disc depends on values",
    "intervention_cases": "is given a generator, and there are none on meta",
    "one_move_apart": "how many pairs there are depends on values",
    "primitive_powers": "is given a number, so there is no device to follow",
    "shuffle_windows": "is given a generator, and there are none on meta",
    "shuffle_alike": "is given a generator of the CPU, and the order of the rows depends on values",
    "inject": "how many places there are depends on the values of a mask",
    "run_oracle": "needs inject",
    "oracle_examples": "makes tensors out of lists, on the CPU",
    "oracle_loss": "how many answers there are depends on the values of a mask",
    "fit_oracle": "needs oracle_loss",
    "answer_probabilities": "needs inject",
    "accuracy_by_type": "counts hits, numbers",
    "contradiction_rate": "which rows count depends on values",
    "icl_text": "works on texts",
    "ICLDataset": "is made of texts, on the CPU",
    "bootstrap_interval": "is given a generator, and there are none on meta",
    "encode_texts": "is given texts",
    "token_activations": "how many tokens there are depends on the values of the mask",
    "norm_scale": "gives a number",
    "ActivationBuffer": "needs token_activations",
    "fit_dictionary": "notes the loss of every step, a number",
    "shuffle_weights": "is given a generator, and there are none on meta",
    "load_dictionary": "reads a file",
    "loss_recovered": "gives numbers",
    "explain": "gives numbers",
    "detection_score": "gives a number",
    "balanced_accuracy": "gives a number",
    "fuzzing_score": "gives a number",
    "sparse_probe": "which rows are of a class depends on values",
    "save_for_saelens": "writes values to a file",
    "load_saelens": "reads a file",
    "Pass": "only holds what it is given",
    "Fit": "only holds what it is given",
    "transcoder_loss": "how many tokens count depends on the values of the mask",
    "active_latents": "which latents fire depends on values",
    "attribution_graph": "needs active_latents",
    "largest_part": "how many are kept depends on values",
    "prune": "needs largest_part",
    "ablate_latents": "which latents belong to a layer depends on values",
    "swap_latents": "which latents belong to a layer depends on values",
    "random_head_vector": "is given a generator, and there are none on meta",
}


def floats(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.long, device="meta")


def flags(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device="meta")


def made(cls: Any, cfg: TransformerConfig = CFG) -> Any:
    """A module that was made on the CPU, as always, and then moved."""
    return cls(cfg).to("meta")


model = cache(lambda cfg=CFG: made(ch02_transformer.Transformer, cfg))
TOKENS, OTHER, RESID = ids(2, 5), ids(2, 5), floats(2, 5, 12)
RECEIVERS = [("blocks.1.attn.hook_q", 0), ("final", None)]


@cache
def seen() -> ActivationCache:
    return run_with_cache(model(), TOKENS, names="*")[1]


@cache
def transcoders() -> list[Any]:
    return [ch10_circuits.Transcoder(12, 7, 3).to("meta") for _ in range(2)]


def graph() -> ch10_circuits.Graph:
    return ch10_circuits.Graph(floats(10, 10), ids(3, 3), floats(3), n_layers=2, n_pos=2)


@cache
def prompts() -> IOIDataset:
    return IOIDataset(4, shipped_tokenizer("tales"), seed=0).to("meta")


@cache
def means() -> dict[str, Tensor]:
    shape = prompts().tokens.shape
    return {f"blocks.{layer}.attn.hook_z": floats(*shape, CFG.n_heads, CFG.d_head) for layer in range(CFG.n_layers)}


@cache
def prompts_seen() -> ActivationCache:
    return run_with_cache(model(), prompts().tokens, names="*")[1]


def mean_logit(logits: Tensor) -> Tensor:
    return logits.mean(dim=(1, 2))


def everything(cls: Any, *inputs: Any, cfg: TransformerConfig = CFG) -> list[Any]:
    """What a module gives, by itself and while all of its hook points are watched, and what these see."""
    module = made(cls, cfg)
    looked_at = run_with_cache(module, *inputs, names="*") if hook_points(module) else ()
    return [module(*inputs), looked_at]


def with_cache(cfg: TransformerConfig) -> list[Tensor]:
    """The model reads in two parts, watched and not; rows of the cache are chosen in between."""
    memory = ch02_transformer.KVCache(cfg, batch=2)
    first = model(cfg)(TOKENS[:, :2], memory)
    memory.select(ids(2))
    second, _ = run_with_cache(model(cfg), TOKENS[:, 2:], memory)
    return [first, second, model(cfg)(TOKENS[:, :2], memory)]


def converted(convert: Any, kind: str, config: str, **sizes: int) -> Any:
    import transformers

    theirs = getattr(transformers, kind)(getattr(transformers, config)(**sizes, vocab_size=CFG.d_vocab)).to("meta")
    return convert(theirs.state_dict(), LLAMA if kind.startswith("Llama") else CFG)


def trained(step: Callable[[Any, Any], Any]) -> list[Any]:
    """A model of its own and our AdamW after a step: parameters, gradients and moments."""
    own = made(ch02_transformer.Transformer)
    optimizer = ch03_training.AdamW(ch03_training.parameter_groups(own, 0.1), lr=0.1)
    ch03_training.lm_loss(own(TOKENS), TOKENS).backward()
    step(own, optimizer)
    return [list(own.parameters()), [p.grad for p in own.parameters()], [s["m"] for s in optimizer.state.values()]]


def zeroed() -> list[Tensor]:
    with ch03_training.zero_ablated(model(), "blocks.0.attn.W_O") as ablated:
        return [ablated(TOKENS)]


def my_model() -> Any:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.hook = nn.Linear(3, 4), ch04_induction.MyHookPoint()

        def forward(self, x: Tensor) -> Tensor:
            return self.hook(self.linear(x))

    return Mine().to("meta")


def factored(columns: int = 9) -> Any:
    return ch04_induction.FactoredMatrix(floats(9, 3), floats(3, columns))


def of_factored() -> list[Any]:
    M = factored()
    products = [M.T, M @ floats(9, 4), M @ factored(), floats(4, 9) @ M]
    return [[product.A, product.B] for product in products] + [M.svd(), M.eigenvalues(), M.norm()]


def both(matrix: Any) -> list[Tensor]:
    return [matrix.A, matrix.B]


def side_by_side(cls: Any) -> Any:
    """Two models of superposition, of five features."""
    return cls(2, 5, 3, torch.Generator()).to("meta")


def toy_trained() -> list[Tensor]:
    toy = side_by_side(ch06_superposition.ToyModel)

    def loss_of(out: Tensor, x: Tensor) -> Tensor:
        return (out - x).square().sum()

    ch06_superposition.train_toy(toy, lambda: floats(4, 2, 5), loss_of, steps=2, peak=0.1)
    return list(toy.parameters())


def dictionaries() -> list[Any]:
    """What comes out of every kind, alone and side by side."""
    kinds = itertools.product(("relu", "topk", "batch_topk", "gated", "jumprelu"), (None, 2))
    made = [(ch06_superposition.SparseAutoencoder(5, 7, kind, n).to("meta"), n) for kind, n in kinds]
    return [sae(floats(4, 5) if n is None else floats(4, n, 5)) for sae, n in made]


def new_start() -> list[Any]:
    sae = ch06_superposition.SparseAutoencoder(5, 7, "relu").to("meta")
    optimizer = ch03_training.AdamW(sae.parameters())
    sae(floats(4, 5))[0].sum().backward()
    optimizer.step()
    ch06_superposition.resample_dead(sae, optimizer, ids(7).bool(), floats(7, 5))
    return [list(sae.parameters()), [state["m"] for state in optimizer.state.values()]]


def edges() -> Tensor:
    senders, receivers = ch05_patching.edge_nodes(CFG)
    return torch.ones(len(senders), len(receivers), dtype=torch.bool, device="meta")


@cache
def pairs_shown() -> Any:
    """Two prompts with two examples each, made on the CPU and then moved."""
    task = {"dog": "key", "cup": "bird", "book": "tree"}
    dataset = ch08_function_vectors.ICLDataset(task, 2, 2, shipped_tokenizer("tales"))
    dataset.tokens, dataset.answers = dataset.tokens.to("meta"), dataset.answers.to("meta")
    return dataset


def adapted() -> list[Any]:
    """A linear map with an adapter, and merged."""
    adapter = ch11_oracles.LoRALinear(nn.Linear(5, 3, device="meta"), 2, 1.0, torch.Generator())
    return [adapter, adapter(floats(4, 5)), adapter.merged()]


def adapted_model() -> list[Any]:
    """A model with adapters and new tokens, and what it says."""
    own = made(ch02_transformer.Transformer)
    added = ch11_oracles.add_adapters(own, 2, 1.0, torch.Generator())
    return [*added, *ch11_oracles.train_new_tokens(own, 1000), own(TOKENS)]


def new_oracle() -> Any:
    """A copy with more tokens."""
    own = made(ch02_transformer.Transformer)
    own.tokenizer = None
    return ch11_oracles.oracle_from(own, ch02_transformer.Transformer, torch.Generator(), 1200)


def inside(context: Any) -> Tensor:
    """What the model says while a context lasts."""
    with context:
        logits: Tensor = model()(TOKENS)
    return logits


@cache
def some_dictionary(hook_name: str = "blocks.0.hook_resid_post") -> Any:
    """Of seven latents, moved."""
    sae = ch06_superposition.SparseAutoencoder(12, 7, "topk", k=2).to("meta")
    return ch09_dictionaries.Dictionary(sae, hook_name, 0.5)


# What a function is given, as a tuple; or, where it takes more than a call, what came out.
CALLS: dict[str, Callable[[], Any]] = {
    # 00
    "centre_vectors": lambda: (floats(2, 5, 7),),
    "batched_outer": lambda: (floats(2, 3), floats(2, 4)),
    "logits_at_end": lambda: (floats(2, 5, 7), ids(2)),
    "gather_logprobs": lambda: (floats(2, 5, 7), ids(2, 5)),
    "mean_where": lambda: (floats(2, 5), ids(2, 5).bool()),
    "add_at_position": lambda: (floats(2, 5, 7), floats(7), -1),
    "diagonal_mean": lambda: (floats(2, 3, 5, 5), -1),
    "split_heads": lambda: (floats(2, 5, 12), 3),
    "merge_heads": lambda: (floats(2, 5, 3, 4),),
    "repeat_prompts": lambda: (TOKENS, 3),
    "average_values": lambda: (floats(2, 3, 5, 5), floats(2, 5, 3, 4)),
    "cosine_similarity_matrix": lambda: (floats(5, 7),),
    "log_softmax": lambda: (floats(2, 5, 7),),
    "cross_entropy": lambda: (floats(2, 5, 7), ids(2, 5)),
    "cross_entropy_gradient": lambda: (floats(2, 5, 7), ids(2, 5)),
    "gradient_by_backward": lambda: (torch.sum, floats(2, 5)),
    "Bigram": lambda: ch00_tensors.Bigram(11).to("meta")(TOKENS),
    # 02
    "LayerNorm": lambda: everything(ch02_transformer.LayerNorm, RESID),
    "Embed": lambda: everything(ch02_transformer.Embed, TOKENS),
    "PosEmbed": lambda: everything(ch02_transformer.PosEmbed, TOKENS, 3),
    "attention_scores": lambda: (floats(2, 5, 3, 4), floats(2, 6, 3, 4)),
    "causal_mask": lambda: (floats(2, 3, 4, 6),),
    "project_heads": lambda: (RESID, floats(3, 12, 4), floats(3, 4)),
    "Attention": lambda: everything(ch02_transformer.Attention, RESID),
    "fused_attention": lambda: (floats(2, 4, 3, 4), floats(2, 6, 3, 4), floats(2, 6, 3, 4)),
    "gelu_new": lambda: (floats(2, 5),),
    "MLP": lambda: everything(ch02_transformer.MLP, RESID),
    "TransformerBlock": lambda: everything(ch02_transformer.TransformerBlock, RESID),
    "make_norm": lambda: everything(ch02_transformer.make_norm, RESID),
    "make_attention": lambda: everything(ch02_transformer.make_attention, RESID),
    "make_mlp": lambda: everything(ch02_transformer.make_mlp, RESID),
    "make_unembed": lambda: ch02_transformer.make_unembed(LLAMA, model().embed).to("meta")(RESID),
    "Unembed": lambda: everything(ch02_transformer.Unembed, RESID),
    "Transformer": lambda: [everything(ch02_transformer.Transformer, TOKENS, cfg=cfg) for cfg in (CFG, PYTHIA, LLAMA)],
    "init_weights": lambda: (model(), 0.02, torch.Generator()),
    "convert_gpt2_weights": lambda: converted(
        ch02_transformer.convert_gpt2_weights, "GPT2LMHeadModel", "GPT2Config", n_embd=12, n_layer=2, n_head=3
    ),
    "greedy": lambda: (floats(2, 7),),
    "apply_temperature": lambda: (floats(2, 7), 0.7),
    "apply_frequency_penalty": lambda: (floats(2, 7), ids(2, 5), 0.5),
    "keep_top_k": lambda: (floats(2, 7), 3),
    "keep_top_p": lambda: (floats(2, 7), 0.9, 2),
    "generate": lambda: (model(), TOKENS, 3, ch02_transformer.greedy, 0),
    "KVCache": lambda: [with_cache(cfg) for cfg in (CFG, PYTHIA, LLAMA)],
    "apply_rotary": lambda: (floats(2, 5, 3, 4), ids(5), 2, 10000.0),
    "RotaryAttention": lambda: everything(ch02_transformer.RotaryAttention, RESID, cfg=PYTHIA),
    "ParallelBlock": lambda: everything(ch02_transformer.ParallelBlock, RESID, cfg=PYTHIA),
    "NoPosEmbed": lambda: everything(ch02_transformer.NoPosEmbed, TOKENS),
    "convert_neox_weights": lambda: converted(
        ch02_transformer.convert_neox_weights, "GPTNeoXForCausalLM", "GPTNeoXConfig",
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16,
    ),
    "RMSNorm": lambda: everything(ch02_transformer.RMSNorm, RESID),
    "GatedMLP": lambda: everything(ch02_transformer.GatedMLP, RESID),
    "attend": lambda: (made(ch02_transformer.Attention), *(floats(2, 5, 3, 4) for _ in "qkv")),
    "GroupedQueryAttention": lambda: everything(ch02_transformer.GroupedQueryAttention, RESID, cfg=LLAMA),
    "UnbiasedUnembed": lambda: everything(ch02_transformer.UnbiasedUnembed, RESID),
    "TiedUnembed": lambda: ch02_transformer.TiedUnembed(model().embed)(RESID),
    "convert_llama_weights": lambda: converted(
        ch02_transformer.convert_llama_weights, "LlamaForCausalLM", "LlamaConfig",
        hidden_size=12, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        intermediate_size=16,
    ),
    # 03
    "zero_ablated": zeroed,
    "lm_loss": lambda: (floats(2, 5, 7), ids(2, 5)),
    "AdamW": lambda: trained(lambda own, optimizer: optimizer.step()),
    "parameter_groups": lambda: ch03_training.parameter_groups(model(), 0.1),
    "clip_grad_norm": lambda: trained(lambda own, optimizer: ch03_training.clip_grad_norm(own.parameters(), 0.5)),
    "train_step": lambda: trained(lambda own, optimizer: ch03_training.train_step(own, optimizer, TOKENS, 0.5)),
    "accumulate_gradients": lambda: trained(lambda own, _: ch03_training.accumulate_gradients(own, TOKENS, 2)),
    "evaluate": lambda: trained(lambda own, _: ch03_training.evaluate(own, [TOKENS, OTHER])),
    "average_gradients": lambda: ([{"W": floats(2, 3)}, {"W": floats(2, 3)}],),
    # 04
    "MyHookPoint": lambda: my_model()(floats(2, 3)),
    "my_run_with_hooks": lambda: (
        my_model(), floats(2, 3), [("hook", torch.zeros_like)]
    ),
    "my_run_with_cache": lambda: (my_model(), floats(2, 3)),
    "current_token_scores": lambda: (seen(),),
    "previous_token_scores": lambda: (seen(),),
    "first_token_scores": lambda: (seen(),),
    "per_token_losses": lambda: (floats(2, 5, 7), ids(2, 5)),
    "induction_scores": lambda: (seen(), 2),
    "duplicate_token_scores": lambda: (seen(), 2),
    "induction_scores_by_hook": lambda: (model(), TOKENS, 2),
    "residual_components": lambda: (seen(), -1),
    "logit_attribution": lambda: (seen(), model(), TOKENS),
    "ablate_heads": lambda: [
        ch04_induction.ablate_heads(model(), TOKENS, [(0, 1), (1, 2)], kind, OTHER)
        for kind in ("zero", "mean", "resample")
    ],
    "ablation_scores": lambda: (model(), TOKENS, 2, "mean", OTHER),
    "FactoredMatrix": of_factored,
    "fold_layer_norm": lambda: (model(),),
    "bigram_logits": lambda: (model(),),
    "ov_circuit": lambda: both(ch04_induction.ov_circuit(model(), 1, 2)),
    "qk_circuit": lambda: both(ch04_induction.qk_circuit(model(), 1, 2)),
    "copying_score": lambda: (factored(),),
    "position_pattern": lambda: (model(), 0, 1),
    "decompose_qk": lambda: (seen(), model(), 1, 2),
    "composition_score": lambda: (factored(), floats(9, 9)),
    "read_by": lambda: (model(), "Q"),
    "composition_scores": lambda: (model(), "K"),
    "random_composition_baseline": lambda: (model(), "K", 3, torch.Generator()),
    # 05
    "logit_difference": lambda: (model()(prompts().tokens), prompts()),
    "normalised_metric": lambda: (model()(prompts().tokens), prompts(), 3.0, 1.0),
    "accumulated_residual": lambda: (seen(),),
    "logit_lens": lambda: (seen(), model(), floats(2, 12)),
    "head_attribution": lambda: (seen(), model(), floats(2, 12)),
    "run_patched": lambda: (model(), TOKENS, seen(), Z, (3, 2)),
    "patch_residual_stream": lambda: (model(), TOKENS, seen(), mean_logit),
    "patch_components": lambda: (model(), TOKENS, seen(), mean_logit),
    "patch_heads": lambda: (model(), TOKENS, seen(), mean_logit),
    "run_from": lambda: (model(), RESID, 1),
    "batched_sweep": lambda: (model(), TOKENS, seen(), mean_logit, [(Z, (3, 2)), ("hook_embed", (1,))]),
    "patch_heads_by_position": lambda: (model(), TOKENS, seen(), mean_logit),
    "patch_head_inputs": lambda: [
        ch05_patching.patch_head_inputs(model(), TOKENS, seen(), mean_logit, which)
        for which in ("q", "k", "v", "pattern", "z")
    ],
    "attribution_patching": lambda: (model(), TOKENS, seen(), mean_logit, ["hook_embed", Z]),
    "integrated_attribution": lambda: (model(), TOKENS, seen(), mean_logit, ["hook_embed", Z], 2),
    "two_runs": lambda: (model(), TOKENS, OTHER, True),
    "run_over_direct_paths": lambda: (model(), TOKENS, {Z: floats(2, 5, 3, 4)}, RECEIVERS),
    "path_patch": lambda: (model(), TOKENS, OTHER, [(0, 1)], RECEIVERS, mean_logit),
    "path_patch_heads": lambda: (model(), TOKENS, OTHER, RECEIVERS, mean_logit),
    "attention_between": lambda: (seen(), ids(2), ids(2)),
    "name_copying_scores": lambda: (model(), prompts()),
    "signal_effects": lambda: (model(), prompts(), [(0, 1)], RECEIVERS),
    "mean_ablate_except": lambda: (model(), prompts(), HEADS[:2], means()),
    "circuit_scores": lambda: (model(), prompts(), [HEADS, HEADS[:2]], means()),
    "faithfulness": lambda: (model(), prompts(), [HEADS[:2]], means()),
    "completeness": lambda: (model(), prompts(), HEADS[:3], [HEADS[:1]], means()),
    "minimality": lambda: (model(), prompts(), HEADS[:3], {HEADS[0]: [HEADS[1]]}, means()),
    "run_with_own_inputs": lambda: (
        model(), TOKENS, floats(2 * 10 + 1, 2, 5, 12).__getitem__
    ),
    "sender_outputs": lambda: (model(), seen()),
    "edge_attribution": lambda: (model(), TOKENS, OTHER, mean_logit, 2),
    "run_with_edges": lambda: (model(), TOKENS, OTHER, edges()),
    "interchange_intervention": lambda: (model(), TOKENS, OTHER, "blocks.0.hook_resid_post", ids(2), floats(2, 12)),
    "align_direction": lambda: (
        model(), TOKENS, OTHER, "blocks.0.hook_resid_post", ids(2), mean_logit, torch.Generator(), 2,
    ),
    # 06
    "ToyModel": lambda: side_by_side(ch06_superposition.ToyModel)(floats(4, 2, 5)),
    "importance_weighted_loss": lambda: (floats(4, 2, 5), floats(4, 2, 5), floats(5)),
    "train_toy": toy_trained,
    "feature_norms": lambda: (floats(2, 3, 5),),
    "interference": lambda: (floats(2, 3, 5),),
    "feature_dimensionality": lambda: (floats(2, 3, 5),),
    "losses_by_hand": lambda: (floats(3), floats(4)),
    "phase_diagram": lambda: (floats(3, 4, 5, 1, 2), floats(3, 4, 5)),
    "NeuronModel": lambda: side_by_side(ch06_superposition.NeuronModel)(floats(4, 2, 5)),
    "AbsModel": lambda: side_by_side(ch06_superposition.AbsModel)(floats(4, 2, 5)),
    "relu_latents": lambda: (floats(4, 2, 7),),
    "topk_latents": lambda: (floats(4, 2, 7), 3),
    "batch_topk_latents": lambda: (floats(4, 2, 7), 1.5),
    "gated_latents": lambda: (floats(4, 2, 7), floats(2, 7), floats(2, 7), floats(2, 7)),
    "gated_auxiliary_loss": lambda: (floats(4, 2, 5), floats(4, 2, 7), floats(2, 7, 5), floats(2, 5)),
    "Heaviside": lambda: ch06_superposition.Heaviside.apply(floats(4, 2, 7), floats(2, 7), 0.1),
    "JumpReLU": lambda: ch06_superposition.JumpReLU.apply(floats(4, 2, 7), floats(2, 7), 0.1),
    "SparseAutoencoder": dictionaries,
    "sae_loss": lambda: (floats(4, 2, 5), floats(4, 2, 5), floats(4, 2, 7), floats(2, 7, 5), 0.1),
    "normalise_decoder": lambda: (floats(2, 7, 5),),
    "remove_parallel_gradient": lambda: (floats(2, 7, 5), floats(2, 7, 5)),
    "auxiliary_topk_loss": lambda: (
        floats(4, 2, 5), floats(4, 2, 5), floats(4, 2, 7), ids(2, 7).bool(), floats(2, 7, 5), 3
    ),
    "resample_dead": new_start,
    "firing_scores": lambda: (floats(4, 7), floats(4, 5), ids(5)),
    "shrinkage": lambda: (floats(4, 2, 5), floats(4, 2, 5)),
    "absorption_rate": lambda: (floats(4, 7), floats(4, 5), ids(5), ids(5)),
    "matryoshka_loss": lambda: (floats(4, 2, 5), floats(4, 2, 7), floats(2, 7, 5), floats(2, 5), [2, 7]),
    # 07
    "extract_activations": lambda: (model(), TOKENS, ids(2, 5).bool(), [0, 2], ids(2)),
    "standardise": lambda: (floats(8, 3), floats(6, 3)),
    "pca": lambda: (floats(8, 3), 2),
    "ridge_probe": lambda: (floats(8, 3), floats(8), 0.1),
    "accuracy": lambda: ((floats(3), floats()), floats(8, 3), ids(8).bool()),
    "run_steered": lambda: (model(), TOKENS, 1, ids(2), floats(12)),
    "normalised_effect": lambda: (floats(8), floats(8), floats(6)),
    "activation_pattern": lambda: (floats(8, 3), floats(3)),
    "AttentionProbe": lambda: ch07_probes.AttentionProbe(3, 4).to("meta")(floats(2, 5, 3), ids(2, 5).bool()),
    # 08
    "is_right": lambda: (model(), pairs_shown()),
    "mean_last_residual": lambda: (model(), TOKENS),
    "mean_head_outputs": lambda: (model(), TOKENS),
    "causal_head_scores": lambda: (model(), pairs_shown(), pairs_shown()),
    "function_vector": lambda: (floats(2, 3, 12), floats(2, 3), 2),
    "add_vector": lambda: inside(ch08_function_vectors.add_vector(model(), 0, floats(12), 2.0)),
    "vector_logits": lambda: (model(), floats(12)),
    "contrastive_vector": lambda: (model(), TOKENS, OTHER, 1),
    "activation_addition": lambda: inside(ch08_function_vectors.activation_addition(model(), 0, ids(3), ids(3), 2.0)),
    "without_direction": lambda: (floats(2, 5, 12), floats(12)),
    "ablate_direction": lambda: (model(), floats(12)),
    # 11
    "harvest_windows": lambda: (model(), TOKENS, ids(2), 1, 3),
    "oracle_from": lambda: new_oracle(),
    "LoRALinear": lambda: adapted(),
    "LowRank": lambda: adapted_model(),
    "NewTokens": lambda: adapted_model(),
    "add_adapters": lambda: adapted_model(),
    "train_new_tokens": lambda: adapted_model(),
    "reliability": lambda: (floats(5, 7), ids(5), 4),
    "expected_calibration_error": lambda: (floats(5, 7), ids(5), 4),
    "mirror": lambda: (floats(5, 7), floats(7), floats()),
    "patchscope": lambda: (model(), TOKENS, ids(2), 1, OTHER, ids(2), 2),
    # 09
    "dictionary_pass": lambda: list(ch09_dictionaries.dictionary_pass(some_dictionary().sae, floats(4, 12), 0.1)),
    "Dictionary": lambda: some_dictionary().decode(some_dictionary().encode(RESID)),
    "firing_rates": lambda: ([floats(5, 7), floats(3, 7)],),
    "explained_variance": lambda: (floats(8, 3), floats(8, 3)),
    "splice": lambda: inside(ch09_dictionaries.splice(model(), some_dictionary(), with_error=True)),
    "top_examples": lambda: ([floats(5, 7), floats(3, 7)], 4),
    "activation_histogram": lambda: ([floats(5, 7), floats(3, 7)], floats(4)),
    "logit_effect": lambda: (model(), floats(4, 12)),
    "direct_feature_attribution": lambda: (model(), some_dictionary("blocks.0.hook_attn_out"), ids(5), 2, 3),
    "best_f1": lambda: (floats(8, 7), ids(8, 3).bool(), (0.0, 0.5)),
    "follow_rule": lambda: ((1, 0.25, (0, 0.5, 1.0)), ids(8, 3).bool()),
    "steer_with_latent": lambda: inside(ch09_dictionaries.steer_with_latent(model(), some_dictionary(), [1, 2], 0.5)),
    # 10
    "Transcoder": lambda: transcoders()[0](RESID),
    "mlp_errors": lambda: (model(), transcoders(), TOKENS),
    "run_replaced": lambda: (model(), transcoders(), TOKENS, floats(2, 2, 5, 12)),
    "written_to_stream": lambda: (seen(),),
    "frozen_run": lambda: (model(), TOKENS, seen(), floats(3, 2, 5, 12)),
    "token_to_latent": lambda: (model(), transcoders(), TOKENS[:1], (1, 3, 2)),
    "latent_to_latent": lambda: (model(), transcoders(), TOKENS[:1], 0, (1, 3, 2)),
    "latent_to_logit": lambda: (model(), transcoders(), TOKENS[:1], 0, floats(1100)),
    "feature_connections": lambda: (model(), transcoders(), 0, 1),
    "Graph": lambda: graph().weights,
    "normalised_adjacency": lambda: (floats(4, 4),),
    "influence": lambda: (floats(4, 4), floats(4)),
    "replacement_score": lambda: (graph(),),
    "completeness_score": lambda: (graph(),),
    "total_effects": lambda: (graph(),),
    "supernode_edges": lambda: (graph(), [ids(2), ids(3)]),
    # 12
    "elevation": lambda: (TOKENS,),
    "failures": lambda: (TOKENS,),
    "is_balanced_batch": lambda: (TOKENS,),
    "unbalanced_scores": lambda: (model(), TOKENS),
    "layer_norm_fit": lambda: (floats(8, 3), floats(8, 2)),
    "pre_norm_direction": lambda: (model(), floats(8, 12)),
    "component_contributions": lambda: (seen(), TOKENS, floats(12)),
    "attention_by_position": lambda: (floats(2, 3, 5, 5), TOKENS),
    "neuron_contributions": lambda: (model(), seen(), TOKENS, floats(12), 1),
    "probe_r2": lambda: (floats(8, 3), floats(8), floats(4, 3), floats(4)),
    "flip_effects": lambda: (model(), TOKENS),
    # 13
    "answer_loss": lambda: (floats(5, 5, 7), ids(5, 5)),
    "tabulated_logits": lambda: (model(ADDER), ids(4, 3)),
    "fft1d": lambda: (floats(3, 7),),
    "fft2d": lambda: (floats(6, 6, 3),),
    "frequency_norms": lambda: (floats(8, 3),),
    "key_frequencies": lambda: (floats(7, 3), 2),
    "neuron_frequencies": lambda: (floats(6, 6, 3),),
    "effective_unembedding": lambda: (model(ADDER),),
    "trig_directions": lambda: (floats(3, 7), 2),
    "logit_fit": lambda: (floats(6, 6, 6), [1, 3]),
    "sum_part": lambda: (floats(6, 6, 3), [1, 3]),
    "restricted_loss": lambda: (floats(7, 7, 7), [1, 3], ids(7, 7)),
    "gini": lambda: (floats(5),),
    "gradient_symmetry": lambda: (lambda a, b: (a * b) @ floats(3, 7), floats(4, 3), floats(4, 3), ids(4)),
    # 14
    "relative_labels": lambda: (ids(2, 5, 3, 4),),
    "illegal_rate": lambda: (floats(3, 5, 7), flags(3, 5, 6), flags(3, 5)),
    "probe_loss": lambda: (floats(4, 12, 3), floats(4, 3), floats(8, 12), ids(8, 4)),
    "probe_directions": lambda: (floats(4, 12, 3),),
    "cosine_similarities": lambda: (floats(4, 12), floats(3, 12)),
    "state_means": lambda: (floats(8, 12), ids(8, 4)),
    "intervene_on_square": lambda: (model(), TOKENS, ids(2), [0, 1], floats(2, 2, 12)),
    "least_squares": lambda: (floats(8, 4), floats(8, 3)),
    "square_readers": lambda: (floats(8, 12), ids(8, 4)),
    "push_until_read": lambda: pushed(),
    "run_with_edits": lambda: (model(), TOKENS, ids(2), {0: lambda stream: 2 * stream}),
    "intervention_errors": lambda: (floats(3, 7), flags(3, 6)),
    "square_attribution": lambda: (seen(), floats(12), 1),
    "attention_by_side": lambda: (floats(2, 3, 5, 5),),
    "neuron_board_pattern": lambda: (model(), 1, floats(4, 12)),
    "share_in_space": lambda: (floats(6, 12), floats(4, 12)),
}  # fmt: skip


def pushed() -> Tensor:
    """What the function that `push_until_read` returns makes of a stream."""
    cases = {"square": ids(2), "before": ids(2), "after": ids(2)}
    return FUNCTIONS["push_until_read"](floats(3, 4, 12), floats(4, 12, 3), floats(4, 3), cases)(floats(2, 12))


def public() -> dict[str, Any]:
    """What the solutions define, by name; chapter 01 knows no tensors."""
    found = {}
    for info in pkgutil.iter_modules(solutions.__path__, "solutions."):
        module = importlib.import_module(info.name)
        if hasattr(module, "torch"):
            own = inspect.getmembers(module, lambda value: inspect.isfunction(value) or inspect.isclass(value))
            found |= {n: value for n, value in own if value.__module__ == module.__name__ and not n.startswith("_")}
    return found


FUNCTIONS = public()


def test_nothing_is_left_out() -> None:
    """A new function belongs into CALLS, or into WITHOUT with a reason."""
    assert FUNCTIONS.keys() - CALLS.keys() - WITHOUT.keys() == set()
    assert (CALLS.keys() | WITHOUT.keys()) - FUNCTIONS.keys() == set()
    assert CALLS.keys() & WITHOUT.keys() == set()


@pytest.mark.parametrize("name", CALLS)
def test_all_of_it_stays_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "item", lambda self: 1.0)  # where a number is asked for, any will do
    monkeypatch.setattr(Tensor, "__bool__", lambda self: False)
    monkeypatch.setattr(torch, "allclose", lambda a, b, **how: (a - b).device == a.device)
    given = CALLS[name]()
    answer = FUNCTIONS[name](*given) if isinstance(given, tuple) else given
    leaves = [list(leaf.parameters()) if isinstance(leaf, nn.Module) else leaf for leaf in tree_leaves(answer)]
    tensors = [leaf for leaf in tree_leaves(leaves) if isinstance(leaf, Tensor)]
    assert {tensor.device.type for tensor in tensors} <= {"meta"}


def test_a_tensor_of_the_cpu_half_way_is_found() -> None:
    with pytest.raises(RuntimeError, match="device"):
        floats(2, 3) + torch.arange(3)
