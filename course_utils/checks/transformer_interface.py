"""The interface of the course's `Transformer`: what its parameters and hook points are called, and their shapes.

Whoever writes the class in another way keeps to this; checks, saved weights and later chapters rely on nothing else.

So that a run can begin half-way, the parts are modules that can be called, too: `embed(tokens)`; every block in
`blocks`, which maps the residual stream to the stream after it; `ln_final(resid)`, also where there is no
normalisation; and `unembed(resid)`, which gives logits. `check_Transformer` puts toys in their places.
"""

from course_utils.config import TransformerConfig

Shapes = dict[str, tuple[int, ...]]

# The axes that each hook point's tensor has; `hook_scale` keeps its last axis, of size 1.
HOOK_AXES = {
    "hook_embed": "batch pos d_model",
    "hook_pos_embed": "batch pos d_model",
    "hook_scale": "batch pos one",
    "hook_normalized": "batch pos d_model",
    "hook_q": "batch pos head d_head",
    "hook_k": "batch pos head d_head",
    "hook_v": "batch pos head d_head",
    "hook_rot_q": "batch pos head d_head",
    "hook_rot_k": "batch pos head d_head",
    "hook_attn_scores": "batch head query key",
    "hook_pattern": "batch head query key",
    "hook_z": "batch pos head d_head",
    "hook_result": "batch pos head d_model",
    "hook_pre": "batch pos d_mlp",
    "hook_pre_linear": "batch pos d_mlp",
    "hook_post": "batch pos d_mlp",
    "hook_resid_pre": "batch pos d_model",
    "hook_attn_out": "batch pos d_model",
    "hook_resid_mid": "batch pos d_model",
    "hook_mlp_out": "batch pos d_model",
    "hook_resid_post": "batch pos d_model",
}

NORM_HOOKS = ("hook_scale", "hook_normalized")
ATTENTION_HOOKS = (
    "hook_q",
    "hook_k",
    "hook_v",
    "hook_attn_scores",
    "hook_pattern",
    "hook_z",
    "hook_result",  # on request: seen only by those who ask for it by name
)
ROTARY_HOOKS = ("hook_rot_q", "hook_rot_k")  # with rotary positions; these see what the scores are computed from
MLP_HOOKS = ("hook_pre", "hook_post")
GATED_MLP_HOOKS = ("hook_pre", "hook_pre_linear", "hook_post")


def _inside(owner: str, shapes: Shapes) -> Shapes:
    return {f"{owner}.{name}": shape for name, shape in shapes.items()}


def norm_parameters(cfg: TransformerConfig) -> Shapes:
    """`w` and `b` of a LayerNorm, `w` of an RMSNorm; nothing where the model does without."""
    return dict.fromkeys({"LN": "wb", "RMS": "w", "none": ""}[cfg.normalization], (cfg.d_model,))


def attention_parameters(cfg: TransformerConfig) -> Shapes:
    """One matrix and one bias per head, for queries, keys and values; `W_O` per head, and one `b_O`.

    With `n_kv_heads` there are only so many matrices for keys and values, and no biases.
    """
    n_heads, d_model, d_head = cfg.n_heads, cfg.d_model, cfg.d_head
    if cfg.n_kv_heads is not None:
        few = (cfg.n_kv_heads, d_model, d_head)
        return {"W_Q": (n_heads, d_model, d_head), "W_K": few, "W_V": few, "W_O": (n_heads, d_head, d_model)}
    shapes: Shapes = {f"W_{letter}": (n_heads, d_model, d_head) for letter in "QKV"}
    shapes |= {f"b_{letter}": (n_heads, d_head) for letter in "QKV"}
    return shapes | {"W_O": (n_heads, d_head, d_model), "b_O": (d_model,)}


def mlp_parameters(cfg: TransformerConfig) -> Shapes:
    """Up to d_mlp and back; a gated MLP goes up twice, and has no biases."""
    d_model, d_mlp = cfg.d_model, cfg.d_mlp
    if cfg.gated:
        return {"W_gate": (d_model, d_mlp), "W_in": (d_model, d_mlp), "W_out": (d_mlp, d_model)}
    return {"W_in": (d_model, d_mlp), "b_in": (d_mlp,), "W_out": (d_mlp, d_model), "b_out": (d_model,)}


def block_parameters(cfg: TransformerConfig) -> Shapes:
    """Attention and MLP, each with the normalisation in front of it; with `attn_only` the first pair alone."""
    shapes = _inside("ln1", norm_parameters(cfg)) | _inside("attn", attention_parameters(cfg))
    if not cfg.attn_only:
        shapes |= _inside("ln2", norm_parameters(cfg)) | _inside("mlp", mlp_parameters(cfg))
    return shapes


def transformer_parameters(cfg: TransformerConfig) -> Shapes:
    """Every entry of the state dict, such as `blocks.0.attn.W_Q`, with its shape; rotary positions have none."""
    shapes: Shapes = {"embed.W_E": (cfg.d_vocab, cfg.d_model)}
    if cfg.positions == "learned":
        shapes["pos_embed.W_pos"] = (cfg.n_ctx, cfg.d_model)
    for layer in range(cfg.n_layers):
        shapes |= _inside(f"blocks.{layer}", block_parameters(cfg))
    shapes |= _inside("ln_final", norm_parameters(cfg))
    return shapes | _inside("unembed", unembed_parameters(cfg))


def unembed_parameters(cfg: TransformerConfig) -> Shapes:
    """`W_U` and `b_U`; no bias with `n_kv_heads`, nothing at all where the embedding serves for both."""
    if cfg.tied:
        return {}
    W_U: Shapes = {"W_U": (cfg.d_model, cfg.d_vocab)}
    return W_U if cfg.n_kv_heads is not None else W_U | {"b_U": (cfg.d_vocab,)}


def norm_hooks(cfg: TransformerConfig) -> tuple[str, ...]:
    """The hook points of each norm; a model that does without has none."""
    return () if cfg.normalization == "none" else NORM_HOOKS


def mlp_hooks(cfg: TransformerConfig) -> tuple[str, ...]:
    """The hook points of an MLP; the gate has one more."""
    return GATED_MLP_HOOKS if cfg.gated else MLP_HOOKS


def attention_hooks(cfg: TransformerConfig) -> list[str]:
    """The hook points of attention, in the order in which they see their tensors."""
    after_v = ATTENTION_HOOKS.index("hook_v") + 1
    rotary = ROTARY_HOOKS if cfg.positions == "rotary" else ()
    return [*ATTENTION_HOOKS[:after_v], *rotary, *ATTENTION_HOOKS[after_v:]]


def block_hooks(cfg: TransformerConfig) -> list[str]:
    """The hook points of one block, in the order in which they see their tensors; a parallel one has no "mid"."""
    norm = norm_hooks(cfg)
    names = ["hook_resid_pre", *(f"ln1.{hook}" for hook in norm), *(f"attn.{hook}" for hook in attention_hooks(cfg))]
    names += ["hook_attn_out"]
    if not cfg.attn_only:
        names += [] if cfg.parallel else ["hook_resid_mid"]
        names += [*(f"ln2.{hook}" for hook in norm), *(f"mlp.{hook}" for hook in mlp_hooks(cfg)), "hook_mlp_out"]
    return [*names, "hook_resid_post"]


def transformer_hooks(cfg: TransformerConfig) -> list[str]:
    """The hook points of the whole model by full name, in the order in which they see their tensors."""
    names = ["hook_embed"] + ["hook_pos_embed"] * (cfg.positions == "learned")
    for layer in range(cfg.n_layers):
        names += [f"blocks.{layer}.{hook}" for hook in block_hooks(cfg)]
    return names + [f"ln_final.{hook}" for hook in norm_hooks(cfg)]
