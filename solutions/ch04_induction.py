"""Chapter 04: hooks, heads that copy from context, and three ways to prove what they do."""

from collections.abc import Callable
from typing import Any

import einops
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from course_utils.hooks import ActivationCache, HookPoint, run_with_hooks

# ------------------------------------------------------------------------------------------------------ seeing inside


class MyHookPoint(nn.Module):
    """A place in a model through which an activation passes, and where it can be read and replaced.

    `fns` holds hook functions. Each is called with the activation; a tensor that it returns takes the activation's
    place, both for the next function and for the model. None leaves things as they are. The functions run in the order
    of the list, and without any the activation itself comes out.
    """

    def __init__(self) -> None:  # given
        super().__init__()
        self.fns: list[Callable[[Tensor], Tensor | None]] = []

    @property
    def is_watched(self) -> bool:  # given
        """Whether there is any hook function: a model may spare itself what nobody looks at."""
        return len(self.fns) > 0

    def forward(self, activation: Tensor) -> Tensor:
        """Show the activation to each hook function in turn, and return what they have left."""
        for fn in self.fns:
            replacement = fn(activation)
            if replacement is not None:
                activation = replacement
        return activation


def my_run_with_hooks(
    model: nn.Module, tokens: Tensor, hooks: list[tuple[str, Callable[[Tensor], Tensor | None]]]
) -> Any:
    """Run `model(tokens)` with these hook functions attached, and return what the model returns.

    `hooks` are pairs: the path of a `MyHookPoint` in the model, as `model.named_modules()` has it, and a function to
    append to its `fns`. Several may be for one place; they run in the order in which they stand. After the run, also
    one that ended in an exception, exactly these functions are gone: those that others had attached are still there.
    Raises KeyError, before anything is attached, for a name that no `MyHookPoint` has.
    """
    points = {name: module for name, module in model.named_modules() if isinstance(module, MyHookPoint)}
    pairs = [(points[name], fn) for name, fn in hooks]
    before = {point: list(point.fns) for point, _ in pairs}
    try:
        for point, fn in pairs:
            point.fns.append(fn)
        return model(tokens)
    finally:
        for point, fns in before.items():
            point.fns = fns


def my_run_with_cache(
    model: nn.Module, tokens: Tensor, names: list[str] | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """Run `model(tokens)`; return what it returns, and what each `MyHookPoint` saw, by its path in the model.

    With `names` only those places are kept. Hook functions that are there already run first, so that the cache holds
    what they have left. Afterwards, also after an exception, nothing of ours is left in the model.
    Raises KeyError for a name that no `MyHookPoint` has.
    """
    if names is None:
        names = [name for name, module in model.named_modules() if isinstance(module, MyHookPoint)]
    cache: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        def fn(activation: Tensor) -> None:
            cache[name] = activation

        return fn

    output = my_run_with_hooks(model, tokens, [(name, keep(name)) for name in names])
    return output, cache


def pattern_from_qk(
    q: Float[Tensor, "batch pos head d_head"], k: Float[Tensor, "batch pos head d_head"]
) -> Float[Tensor, "batch head query key"]:
    """Compute the attention pattern from the queries and keys of a cache.

    Scores are dot products divided by sqrt(d_head); a query sees its own position and earlier ones; the weights of
    each query sum to 1.
    Source: Vaswani et al. 2017, section 3.2.
    """
    scores = einops.einsum(q, k, "batch query head d_head, batch key head d_head -> batch head query key")
    future = torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1)
    return (scores / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf).softmax(dim=-1)


def z_from_pattern(
    pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch key head d_head"]
) -> Float[Tensor, "batch query head d_head"]:
    """Average the values with the weights of the pattern: what each head brings to each query, before `W_O`."""
    return einops.einsum(pattern, v, "batch head query key, batch key head d_head -> batch query head d_head")


# ------------------------------------------------------------------------------------------------------------ looking


def current_token_scores(cache: ActivationCache) -> Float[Tensor, "layer head"]:
    """How much each head attends to the position that it stands at: the mean over the batch and all queries."""
    diagonal = cache.stack("pattern").diagonal(dim1=-2, dim2=-1)
    return einops.reduce(diagonal, "layer batch head query -> layer head", "mean")


def previous_token_scores(cache: ActivationCache) -> Float[Tensor, "layer head"]:
    """How much each head attends to the position just before: the mean over the batch and all queries that have one.

    Query 0 has none, and does not count.
    """
    diagonal = cache.stack("pattern").diagonal(offset=-1, dim1=-2, dim2=-1)
    return einops.reduce(diagonal, "layer batch head query -> layer head", "mean")


def first_token_scores(cache: ActivationCache) -> Float[Tensor, "layer head"]:
    """How much each head attends to position 0: the mean over the batch and all queries, query 0 included."""
    column = cache.stack("pattern")[..., 0]
    return einops.reduce(column, "layer batch head query -> layer head", "mean")


# ---------------------------------------------------------------------------------------------------------- induction


def repeated_tokens(
    n_batch: int, n_half: int, d_vocab: int, generator: torch.Generator, bos: int
) -> Int[Tensor, "batch pos"]:
    """Write texts that nobody can predict, until they repeat: `bos`, `n_half` random tokens, and the same once more.

    Each token is drawn from the whole vocabulary, all equally likely, each row for itself, and every random number
    comes from `generator`; the result is on its device. The shape is [n_batch, 1 + 2 n_half].
    """
    half = torch.randint(d_vocab, (n_batch, n_half), generator=generator, device=generator.device)
    start = half.new_full((n_batch, 1), bos)
    return torch.cat([start, half, half], dim=1)


def per_token_losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch next"]:
    """How much each token surprised the model, in nats: -log of the probability that it had given to it.

    The logits at position p are about token p + 1. So there are pos - 1 losses: the first is that of token 1, and the
    last logits are not needed.
    """
    log_probabilities = logits[:, :-1].log_softmax(dim=-1)
    return -log_probabilities.gather(dim=-1, index=tokens[:, 1:, None]).squeeze(-1)


def induction_scores(cache: ActivationCache, n_half: int) -> Float[Tensor, "layer head"]:
    """How much each head attends to the token that came next last time, on the texts of `repeated_tokens`.

    A query in the second half (positions n_half + 1 to 2 n_half) has its token's first occurrence n_half positions
    before it; what came next then stands one position later. The score is the attention from the former to the latter,
    averaged over the batch and over the queries of the second half, all n_half of them.
    Source: Olsson et al. 2022, "prefix matching".
    """
    diagonal = cache.stack("pattern").diagonal(offset=1 - n_half, dim1=-2, dim2=-1)
    second_half = diagonal[..., -n_half:]
    return einops.reduce(second_half, "layer batch head query -> layer head", "mean")


def duplicate_token_scores(cache: ActivationCache, n_half: int) -> Float[Tensor, "layer head"]:
    """How much each head attends to the first occurrence of the current token, on the texts of `repeated_tokens`.

    The mean over the batch and over the queries of the second half, all n_half of them.
    """
    diagonal = cache.stack("pattern").diagonal(offset=-n_half, dim1=-2, dim2=-1)
    second_half = diagonal[..., -n_half:]
    return einops.reduce(second_half, "layer batch head query -> layer head", "mean")


@torch.no_grad()
def induction_scores_by_hook(
    model: nn.Module, tokens: Int[Tensor, "batch pos"], n_half: int
) -> Float[Tensor, "layer head"]:
    """Compute `induction_scores` in one run that keeps no pattern: a hook reduces each to one number per head.

    `model` is a `Transformer`; the patterns pass through its `blocks.0.attn.hook_pattern`, and so on. A pattern must
    not outlive the hook that sees it, nor the hooks the run. No gradients are recorded.
    """
    rows: list[Tensor] = []

    def reduce(pattern: Float[Tensor, "batch head query key"], hook: HookPoint) -> None:
        second_half = pattern.diagonal(offset=1 - n_half, dim1=-2, dim2=-1)[..., -n_half:]
        rows.append(einops.reduce(second_half, "batch head query -> head", "mean"))

    run_with_hooks(model, tokens, hooks={"blocks.*.attn.hook_pattern": reduce})
    return torch.stack(rows)


def top_predictions(logits: Float[Tensor, " d_vocab"], tokenizer: Any, k: int) -> list[tuple[int, str, float, float]]:
    """List the `k` most likely next tokens, the likeliest first, as rows (rank, token, logit, probability).

    `logits` are those of one position. Ranks count from 1; the token is its text, as `tokenizer.decode([id])` gives it;
    the probabilities are those of the softmax over the whole vocabulary, so that they sum to less than 1.
    """
    probabilities = logits.softmax(dim=-1)
    best = logits.topk(k).indices.tolist()
    return [
        (rank, tokenizer.decode([token]), logits[token].item(), probabilities[token].item())
        for rank, token in enumerate(best, start=1)
    ]


# ------------------------------------------------------------------------------------------- direct logit attribution


def residual_components(cache: ActivationCache, pos: int) -> tuple[list[str], Float[Tensor, "component batch d_model"]]:
    """Take the final residual stream at one position apart, into all that was ever added to it.

    Returns labels and vectors in the same order: "embed", "pos_embed"; then for each layer its heads ("head 0.0" is
    layer 0, head 0), what attention adds besides its heads ("bias 0"), and, where the layer has an MLP, "mlp 0" (with
    the MLP's own bias). The vectors sum to the last layer's `resid_post` at `pos`, which may be negative, to count from
    the end. The cache must hold each head's `result`, which is kept only where `names=` asks for it. The bias is in no
    cache: it is what `attn_out` has over the sum of the heads.
    Source: Elhage et al. 2021, "Residual stream".
    """
    labels, vectors = ["embed", "pos_embed"], [cache["embed"][:, pos], cache["pos_embed"][:, pos]]
    for layer in range(cache.n_layers):
        heads = cache["result", layer][:, pos]
        labels += [f"head {layer}.{head}" for head in range(heads.shape[1])]
        vectors += heads.unbind(dim=1)
        labels.append(f"bias {layer}")
        vectors.append(cache["attn_out", layer][:, pos] - heads.sum(dim=1))
        if ("mlp_out", layer) in cache:
            labels.append(f"mlp {layer}")
            vectors.append(cache["mlp_out", layer][:, pos])
    return labels, torch.stack(vectors)


def logit_attribution(
    cache: ActivationCache, model: Any, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "component batch next"]:
    """Say how much each component adds, directly, to the logit of the token that really comes next.

    `cache` is of a run of `model` on `tokens`. Entry [component, batch, p] is about the logits at position p and the
    token at p + 1, for every p but the last; the components are those of `residual_components`, in its order. Each
    goes through the final LayerNorm as a part of the whole: its own mean is subtracted, it is divided by the scale that
    the whole stream had (`ln_final.hook_scale`), and multiplied by `ln_final.w`; then through the column of `W_U` that
    belongs to the token. What no component causes, `ln_final.b` and `b_U`, is left out: with it, the entries of a
    position sum to the logit.
    Source: Elhage et al. 2021, "Logit attribution"; Wang et al. 2022, section 3.1.
    """
    columns = []
    for pos in range(tokens.shape[1] - 1):
        _, components = residual_components(cache, pos)
        centred = components - components.mean(dim=-1, keepdim=True)
        scaled = centred / cache["ln_final.scale"][:, pos] * model.ln_final.w
        direction = model.unembed.W_U[:, tokens[:, pos + 1]]
        columns.append(einops.einsum(scaled, direction, "component batch d_model, d_model batch -> component batch"))
    return torch.stack(columns, dim=-1)


# ---------------------------------------------------------------------------------------------------- causal evidence

# ---------------------------------------------------------------------------------------------------- reading weights

# ------------------------------------------------------------------------------------------------------------- beyond
