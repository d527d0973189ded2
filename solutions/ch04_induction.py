"""Chapter 04: hooks, heads that copy from context, and three ways to find out what they do."""

from collections.abc import Callable, Sequence
from typing import Any

import einops
import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from course_utils.families import refuse_gated_mlp, refuse_shared_heads, untied_copy
from course_utils.hooks import ActivationCache, HookPoint, run_with_cache, run_with_hooks
from solutions.ch00_tensors import diagonal_mean
from solutions.ch02_transformer import apply_rotary

# ------------------------------------------------------------------------------------------------------ seeing inside


class MyHookPoint(nn.Module):
    """A place in a model through which an activation passes, and where it can be read and replaced.

    `fns` holds hook functions. Each is called with the activation; a tensor that it returns takes the activation's
    place, both for the next function and for the model. None leaves things as they are. The functions run in the order
    of the list; without functions, the activation itself comes out.
    """

    def __init__(self) -> None:  # given
        super().__init__()
        self.fns: list[Callable[[Tensor], Tensor | None]] = []

    @property
    def is_watched(self) -> bool:  # given
        """Whether there is any hook function: a model may skip what nobody looks at."""
        return len(self.fns) > 0

    def forward(self, activation: Tensor) -> Tensor:
        """Show the activation to each hook function in turn, and return the result."""
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
    append to its `fns`. Several may be for one place; they run in the order of the list. After the run, even one that
    ended in an exception, exactly these functions are gone; those that others had attached are still there.
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

    With `names` only those places are kept. Hook functions that are already there run first, so the cache holds their
    result. Afterwards, even after an exception, no function of yours is left in the model.
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


# ------------------------------------------------------------------------------------------------------------ looking


def current_token_scores(cache: ActivationCache) -> Float[Tensor, "layer head"]:
    """How much each head attends to its own position: the mean over the batch and all queries."""
    return diagonal_mean(cache.stack("pattern"), 0).mean(dim=1)  # over the batch


def previous_token_scores(cache: ActivationCache) -> Float[Tensor, "layer head"]:
    """How much each head attends to the position just before: the mean over the batch and all queries that have one.

    Query 0 has none, and does not count.
    """
    return diagonal_mean(cache.stack("pattern"), -1).mean(dim=1)


def first_token_scores(cache: ActivationCache) -> Float[Tensor, "layer head"]:
    """How much each head attends to position 0: the mean over the batch and all queries, query 0 included."""
    return cache.stack("pattern")[..., 0].mean(dim=(1, -1))


# ---------------------------------------------------------------------------------------------------------- induction


def repeated_tokens(
    n_batch: int, n_half: int, d_vocab: int, generator: torch.Generator, bos: int
) -> Int[Tensor, "batch pos"]:
    """Write texts that nobody can predict, until they repeat: `bos`, `n_half` random tokens, and the same once more.

    Each token is drawn from the whole vocabulary, all equally likely, independently in each row, and every random
    number comes from `generator`; the result is on its device. The shape is [n_batch, 1 + 2 n_half].
    """
    half = torch.randint(d_vocab, (n_batch, n_half), generator=generator, device=generator.device)
    start = half.new_full((n_batch, 1), bos)
    return torch.cat([start, half, half], dim=1)


def per_token_losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch next"]:
    """How much each token surprised the model, in nats: -log of the probability that the model gave it.

    The logits at position p are about token p + 1. So there are pos - 1 losses: the first is about token 1, and the
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
    layer 0, head 0), what attention adds on top of its heads ("bias 0"), and, where the layer has an MLP, "mlp 0" (with
    the MLP's own bias). Where positions are rotary the cache has no "pos_embed", and neither has the list. The vectors
    sum to the last layer's `resid_post` at `pos`, which may be negative, to count from the end. The cache must hold
    each head's `result`, which is kept only where `names=` asks for it. The bias is in no cache: it is what `attn_out`
    has over the sum of the heads.
    Source: Elhage et al. 2021, "Residual stream".
    """
    labels = ["embed", "pos_embed"] if "pos_embed" in cache else ["embed"]
    vectors = [cache[label][:, pos] for label in labels]
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
    position sum to the logit. `model.cfg.normalization` tells: with "RMS" no mean is subtracted; with "none" only
    `W_U` and `b_U` are there.
    Source: Elhage et al. 2021, "Logit attribution"; Wang et al. 2022, section 3.1.
    """
    columns = []
    for pos in range(tokens.shape[1] - 1):
        _, components = residual_components(cache, pos)
        if model.cfg.normalization == "LN":
            components = components - components.mean(dim=-1, keepdim=True)
        if model.cfg.normalization != "none":
            components = components / cache["ln_final.scale"][:, pos] * model.ln_final.w
        direction = model.unembed.W_U[:, tokens[:, pos + 1]]
        columns.append(
            einops.einsum(components, direction, "component batch d_model, d_model batch -> component batch")
        )
    return torch.stack(columns, dim=-1)


# ---------------------------------------------------------------------------------------------------- causal evidence


def ablate_heads(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    heads: Sequence[tuple[int, int]],
    kind: str,
    reference: Int[Tensor, "reference_batch reference_pos"] | None = None,
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits of a run in which some heads, given as (layer, head), no longer say anything about their own text.

    What is replaced is `hook_z`: a head's mixture of values, before `W_O`, at every position. All the heads are
    replaced in the same run. What stands there instead depends on `kind`:

    - "zero": zeros.
    - "mean": at each position, the mean over the rows of `reference`, which must have as many positions as `tokens`,
      and any number of rows. Positions are not averaged: what a head does at the first token, in a text that is still
      new and in its repetition are different jobs, and the mean over all of them is a vector that it never writes.
    - "resample": row i gets what the head computed for row i of `reference`, which has the shape of `tokens`.

    What comes from `reference` is computed with nothing replaced; for "zero" it is not needed, and ignored. Raises
    ValueError for another `kind`, and for a `reference` that is missing or has another shape than said above. The
    model's weights stay as they are, its other hooks keep working, and nothing stays attached.
    """
    if kind not in ("zero", "mean", "resample"):
        raise ValueError(f'ablate_heads: kind must be "zero", "mean" or "resample", got {kind!r}.')
    stand_ins: dict[str, Tensor] = {}
    names = {f"blocks.{layer}.attn.hook_z" for layer, _ in heads}
    if kind != "zero":
        if reference is None:
            raise ValueError(f"ablate_heads: {kind} ablation needs a reference batch.")
        if reference.shape[1] != tokens.shape[1] or (kind == "resample" and reference.shape != tokens.shape):
            shapes = f"{tuple(reference.shape)} does not go with tokens of shape {tuple(tokens.shape)}"
            raise ValueError(f"ablate_heads: a reference of shape {shapes}.")
        _, cache = run_with_cache(model, reference, names=names)
        stand_ins = {name: z.mean(dim=0, keepdim=True) if kind == "mean" else z for name, z in cache.items()}

    def replace(z: Tensor, hook: HookPoint) -> Tensor:
        z = z.clone()
        stand_in = stand_ins.get(hook.name, torch.zeros_like(z))
        for layer, head in heads:
            if hook.name == f"blocks.{layer}.attn.hook_z":
                z[:, :, head] = stand_in[:, :, head]
        return z

    return run_with_hooks(model, tokens, hooks=dict.fromkeys(names, replace))


@torch.no_grad()
def ablation_scores(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    n_half: int,
    kind: str,
    reference: Int[Tensor, "reference_batch reference_pos"] | None = None,
) -> Float[Tensor, "layer head"]:
    """How much worse the second half is predicted without each head: the mean loss with it ablated minus the usual one.

    `tokens` come from `repeated_tokens`. The first token of the second half is left out, because nobody can know yet
    that the text repeats: the loss is the mean over the last `n_half - 1` tokens of each row, and over the rows. One
    head at a time is ablated, with `ablate_heads`, which takes `kind` and `reference`. A positive score means that the
    head helps. No gradients are recorded.
    """

    def loss(logits: Tensor) -> Tensor:
        return per_token_losses(logits, tokens)[:, 1 - n_half :].mean()

    usual = loss(model(tokens))
    scores = usual.new_empty(model.cfg.n_layers, model.cfg.n_heads)
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            scores[layer, head] = loss(ablate_heads(model, tokens, [(layer, head)], kind, reference)) - usual
    return scores


# ---------------------------------------------------------------------------------------------------- reading weights


class FactoredMatrix:
    """The matrix `A @ B` of low rank, kept as its two thin factors: no method forms the whole matrix.

    `A` is [rows inner] and `B` [inner columns], and `inner` is small, while `rows x columns` may be far too large for
    memory. Factors may have the same axes in front, or ones that broadcast: these are batch axes, as with `@` itself,
    and then each method works on every matrix of the batch at once.
    Source: the identities are those of Elhage et al. 2021, "Working with weights that are low-rank".
    """

    def __init__(self, A: Tensor, B: Tensor) -> None:  # given
        self.refuse_vector(A)
        self.refuse_vector(B)
        if A.shape[-1] != B.shape[-2]:
            raise ValueError(f"FactoredMatrix: {tuple(A.shape)} and {tuple(B.shape)} have no inner size in common.")
        self.A, self.B = A, B

    @staticmethod
    def refuse_vector(factor: Tensor) -> None:  # given
        """Raise ValueError for a vector, which has no rows and columns."""
        if factor.ndim < 2:
            raise ValueError("FactoredMatrix: a vector has to be a matrix: v[:, None], a column, or v[None], a row.")

    @property
    def shape(self) -> tuple[int, ...]:  # given
        """The shape that `A @ B` would have."""
        batch = torch.broadcast_shapes(self.A.shape[:-2], self.B.shape[:-2])
        return (*batch, self.A.shape[-2], self.B.shape[-1])

    def __repr__(self) -> str:  # given
        return f"FactoredMatrix(shape={list(self.shape)}, inner={self.A.shape[-1]})"

    @property
    def T(self) -> "FactoredMatrix":
        """The transposed matrix (of the last two axes), factored too."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    def __matmul__(self, other: "Tensor | FactoredMatrix") -> "FactoredMatrix":
        """This matrix times another, factored or not: a FactoredMatrix, whose inner size is no larger than this one's.

        `other` may be a matrix, [columns anything], or factored, with as many rows as this one has columns. A vector
        is refused by `refuse_vector`.
        """
        if isinstance(other, FactoredMatrix):
            return FactoredMatrix(self.A, (self.B @ other.A) @ other.B)
        self.refuse_vector(other)  # with batch axes, B times a vector would look like a matrix
        return FactoredMatrix(self.A, self.B @ other)

    def __rmatmul__(self, other: Tensor) -> "FactoredMatrix":
        """`other @ self` for a matrix `other`, [anything rows]: a FactoredMatrix. A vector is refused, as there."""
        self.refuse_vector(other)
        return FactoredMatrix(other @ self.A, self.B)

    def svd(
        self,
    ) -> tuple[Float[Tensor, "*batch rows rank"], Float[Tensor, "*batch rank"], Float[Tensor, "*batch rank columns"]]:
        """U, S, Vh with A B = U diag(S) Vh, as torch.linalg.svd: S descending, columns of U and rows of Vh orthonormal.

        There are as many singular values as the inner size (fewer where rows or columns are fewer still).
        """
        Q_A, R_A = torch.linalg.qr(self.A)
        Q_B, R_B = torch.linalg.qr(self.B.mT)
        U, S, Vh = torch.linalg.svd(R_A @ R_B.mT, full_matrices=False)
        return Q_A @ U, S, Vh @ Q_B.mT

    def eigenvalues(self) -> Complex[Tensor, "*batch inner"]:
        """The eigenvalues, in any order: as many as the inner size; all the others are 0.

        Raises ValueError for a matrix that is not square.
        """
        if self.shape[-2] != self.shape[-1]:
            raise ValueError(f"FactoredMatrix: a matrix of shape {self.shape} has no eigenvalues; it must be square.")
        return torch.linalg.eigvals(self.B @ self.A)

    def norm(self) -> Float[Tensor, "*batch"]:
        """The Frobenius norm: the root of the sum of the squares of all entries."""
        return ((self.A.mT @ self.A) * (self.B @ self.B.mT)).sum(dim=(-2, -1)).clamp(min=0).sqrt()


def fold_layer_norm(model: nn.Module) -> nn.Module:
    """A copy that computes the same logits, in which each LayerNorm's `w`, `b` and centring are part of the weights.

    In every matrix that reads from the residual stream, the row of each direction is multiplied by `w`, and the mean of
    its rows subtracted (as LayerNorm subtracts the mean, nothing is lost); `b` times the matrix goes into the bias.
    What LayerNorm still does in the copy is to centre and to divide by its scale. An RMSNorm has `w` alone, and centres
    nothing. In a Llama the copy's unembedding is no longer the transpose of its embedding: only one of them is folded.
    """
    if model.cfg.normalization == "LN":
        refuse_shared_heads("fold_layer_norm", model)
        refuse_gated_mlp("fold_layer_norm", model)
    folded = untied_copy(model)
    if model.cfg.normalization == "none":
        return folded
    readers = [(folded.ln_final, folded.unembed, "U")]
    readers += [(block.ln1, block.attn, letter) for block in folded.blocks for letter in "QKV"]
    if not model.cfg.attn_only:
        names = ["gate", "in"] if model.cfg.gated else ["in"]
        readers += [(block.ln2, block.mlp, name) for block in folded.blocks for name in names]
    with torch.no_grad():
        for norm, part, letter in readers:
            W = getattr(part, f"W_{letter}")
            if model.cfg.normalization == "LN":
                b = getattr(part, f"b_{letter}")
                b.copy_(b + norm.b @ W)
            W.copy_(norm.w[:, None] * W)
            if model.cfg.normalization == "LN":
                W.copy_(W - W.mean(dim=-2, keepdim=True))
        for norm in {norm for norm, _, _ in readers}:
            norm.w.fill_(1)
            if model.cfg.normalization == "LN":
                norm.b.fill_(0)
    return folded


def bigram_logits(model: nn.Module) -> Float[Tensor, "d_vocab d_vocab"]:
    """What the current token alone says about the next one, with no layer in between: W_E W_U + b_U.

    Row: the current token. Column: the next token. For a model without layers, positions and LayerNorm this is all
    there is. In a deeper model it is the direct path: hand in a model from `fold_layer_norm`.
    Source: Elhage et al. 2021, "Zero-layer transformers".
    """
    refuse_shared_heads("bigram_logits", model)
    return model.embed.W_E @ model.unembed.W_U + model.unembed.b_U


def ov_circuit(model: nn.Module, layer: int, head: int) -> FactoredMatrix:
    """What a head writes for a token that it attends to: W_E W_V W_O W_U, [d_vocab d_vocab], by its thin factors.

    Row: the token that is attended to. Column: the token whose logit changes. LayerNorm and biases are left out: with
    a model from `fold_layer_norm`, only two positive factors per position and a constant are missing.
    Source: Elhage et al. 2021, "One-layer attention-only transformers".
    """
    refuse_shared_heads("ov_circuit", model)
    attn = model.blocks[layer].attn
    return FactoredMatrix(model.embed.W_E @ attn.W_V[head], attn.W_O[head] @ model.unembed.W_U)


def qk_circuit(model: nn.Module, layer: int, head: int) -> FactoredMatrix:
    """How much a token wants to look at a token, whatever their positions: W_E W_Q W_K^T W_E^T, [d_vocab d_vocab].

    Row: the token that looks (query). Column: the token that is looked at (key). Not divided by sqrt(d_head);
    LayerNorm and biases are left out, as in `ov_circuit`. With rotary positions this holds for two tokens at one place.
    Source: Elhage et al. 2021, "One-layer attention-only transformers".
    """
    refuse_shared_heads("qk_circuit", model)
    attn = model.blocks[layer].attn
    W_E = model.embed.W_E
    return FactoredMatrix(W_E @ attn.W_Q[head], (W_E @ attn.W_K[head]).T)


def skip_trigrams(qk: FactoredMatrix, ov: FactoredMatrix, source: int, k: int) -> tuple[list[int], list[int]]:
    """Read off what a head does with one token, `source`: which tokens look for it, and what they then say.

    `qk` and `ov` are circuits of one head. The first list holds the `k` query tokens that want `source` most, compared
    with what they want on average: its score minus the mean of that query's scores over all keys, since adding the same
    to all of a query's scores changes no attention. The second holds the `k` tokens whose logits the head raises most
    when it attends to `source`. Both lists are in descending order. Neither table is formed as a whole.
    Source: Elhage et al. 2021, "Interpretation as skip-trigrams".
    """
    wanted = qk.A @ (qk.B[:, source] - qk.B.mean(dim=-1))
    written = ov.A[source] @ ov.B
    return wanted.topk(k).indices.tolist(), written.topk(k).indices.tolist()


def copying_score(ov: FactoredMatrix) -> Float[Tensor, ""]:
    """How far a head's OV circuit copies: the sum of its eigenvalues' real parts over the sum of their sizes.

    1 if all eigenvalues are positive (what is attended to becomes likelier), -1 if all are negative, near 0 if they
    point in all directions. The size of a complex number is its absolute value.
    Source: Elhage et al. 2021, "Summarizing OV/QK matrices".
    """
    eigenvalues = ov.eigenvalues()
    return eigenvalues.real.sum() / eigenvalues.abs().sum()


def top1_accuracy(ov: FactoredMatrix, rows_at_once: int = 1024) -> float:
    """The share of tokens for which a head writes that same token most: rows with their largest entry on the diagonal.

    All rows count. The matrix is built in blocks of at most `rows_at_once` rows, each of which is thrown away before
    the next is built: over GPT-2's vocabulary the whole would take ten gigabytes.
    """
    hits = 0
    for start in range(0, ov.shape[0], rows_at_once):
        largest = (ov.A[start : start + rows_at_once] @ ov.B).argmax(dim=-1)
        tokens = torch.arange(start, start + len(largest), device=largest.device)
        hits += int((largest == tokens).sum())
    return hits / ov.shape[0]


def position_pattern(model: nn.Module, layer: int, head: int) -> Float[Tensor, "query key"]:
    """Where a head would look if it saw nothing but positions: its attention pattern over all n_ctx of them.

    The residual stream that enters the layer is taken to be `W_pos` alone. From there on all is as in the model: the
    layer's `ln1` (none where the model does without), queries and keys with their biases, the division by
    sqrt(d_head), the causal mask, the softmax. Raises ValueError where positions are rotary: then there is no `W_pos`.
    """
    refuse_shared_heads("position_pattern", model)
    if model.cfg.positions == "rotary":
        raise ValueError("position_pattern: this model turns its queries and keys; it has no W_pos to look at.")
    block = model.blocks[layer]
    resid = block.ln1(model.pos_embed.W_pos[None])[0]
    q = resid @ block.attn.W_Q[head] + block.attn.b_Q[head]
    k = resid @ block.attn.W_K[head] + block.attn.b_K[head]
    scores = q @ k.T / q.shape[-1] ** 0.5
    future = torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1)


def decompose_qk(
    cache: ActivationCache, model: nn.Module, layer: int, head: int
) -> tuple[list[str], Float[Tensor, "batch query_source key_source query key"]]:
    """Split a head's attention scores by where its queries and where its keys come from: (labels, scores).

    The residual stream that enters the layer is a sum of sources, and a score is a product of two such sums. So there
    is a term for every pair of sources, the query's first; over all pairs they sum to the scores that the head has
    before the mask (divided by sqrt(d_head); keys in the future are left in).

    Sources are in order, and called, as in `residual_components`: "embed", "pos_embed"; for each earlier layer its
    heads, as "head 0.3", then `b_O`, as "bias 0", then its MLP if there is one (with its bias), as "mlp 0". Last comes
    "constant", what does not depend on the text: `ln1.b` times W_Q (W_K), plus b_Q (b_K). Each other source is centred,
    divided by the scale that the cache holds for the layer's `ln1`, and multiplied by `ln1.w`, as the sum of them is in
    the model; with RMSNorm it is not centred, and there is no `ln1.b`; without normalisation, none of it. With rotary
    positions there is no "pos_embed", and what each source gives to queries and keys is turned by `apply_rotary` of
    chapter 02, as the queries and keys are.
    The cache must hold every head's `hook_result`: `run_with_cache(model, tokens, names="*")`.
    """
    refuse_shared_heads("decompose_qk", model)
    block, attn = model.blocks[layer], model.blocks[layer].attn
    rotary = model.cfg.positions == "rotary"
    labels = ["embed"] if rotary else ["embed", "pos_embed"]
    sources = [cache[label] for label in labels]
    for earlier in range(layer):
        result = cache["result", earlier]
        labels += [f"head {earlier}.{number}" for number in range(result.shape[2])] + [f"bias {earlier}"]
        sources += [*result.unbind(dim=2), model.blocks[earlier].attn.b_O.expand_as(sources[0])]
        if not model.cfg.attn_only:
            labels.append(f"mlp {earlier}")
            sources.append(cache["mlp_out", earlier])
    resid = torch.stack(sources)
    shift = torch.zeros_like(resid[0, 0, 0])
    if model.cfg.normalization == "LN":
        resid = resid - resid.mean(dim=-1, keepdim=True)
        shift = block.ln1.b
    if model.cfg.normalization != "none":
        resid = resid / cache["ln1.scale", layer] * block.ln1.w

    def vectors(W: Tensor, b: Tensor) -> Tensor:
        from_sources = resid @ W
        constant = (shift @ W + b).expand_as(from_sources[:1])
        return einops.rearrange(
            torch.cat([from_sources, constant]), "source batch pos d_head -> batch pos source d_head"
        )

    q, k = vectors(attn.W_Q[head], attn.b_Q[head]), vectors(attn.W_K[head], attn.b_K[head])
    if rotary:  # turning is linear: sources stand where heads stand, and each is turned for itself
        positions = torch.arange(q.shape[1], device=q.device)
        q, k = (apply_rotary(side, positions, model.cfg.rotary_dim, model.cfg.rotary_base) for side in (q, k))
    shape = "batch query query_source d_head, batch key key_source d_head -> batch query_source key_source query key"
    return [*labels, "constant"], einops.einsum(q, k, shape) / q.shape[-1] ** 0.5


def composition_score(W_A: Tensor | FactoredMatrix, W_B: Tensor | FactoredMatrix) -> Float[Tensor, "*batch"]:
    """How much of what A writes B reads: |W_A W_B| / (|W_A| |W_B|), with Frobenius norms.

    Rows are what goes in, as in `x @ W`: W_A is [... d_model], W_B is [d_model ...]. The score is at most 1; for two
    unrelated matrices it is about 1 / sqrt(d_model). Both may be factored, with batch axes too.
    Source: Elhage et al. 2021, "Two-layer attention-only transformers".
    """

    def norm(W: Tensor | FactoredMatrix) -> Tensor:
        return torch.linalg.matrix_norm(W) if isinstance(W, Tensor) else W.norm()  # W.norm() would sum over the batch

    return norm(W_A @ W_B) / (norm(W_A) * norm(W_B))


def read_by(model: nn.Module, kind: str) -> tuple[Float[Tensor, "layer head d_model d_head"], Tensor]:
    """The two factors of what a later head does with what it reads, for each way of reading: "Q", "K" or "V".

    An earlier head writes through W_OV = W_V W_O. A later one reads that for its queries (W_Q W_K^T), for its keys
    (the transpose of it, W_K W_Q^T), or for its values (W_V W_O).
    """
    if kind not in ("Q", "K", "V"):
        raise ValueError(f'kind must be "Q", "K" or "V", got {kind!r}.')
    refuse_shared_heads("read_by", model)
    W_Q, W_K, W_V, W_O = (torch.stack([getattr(b.attn, f"W_{name}") for b in model.blocks]) for name in "QKVO")
    return {"Q": (W_Q, W_K.mT), "K": (W_K, W_Q.mT), "V": (W_V, W_O)}[kind]


def composition_scores(model: nn.Module, kind: str) -> Float[Tensor, "layer head later_layer later_head"]:
    """The composition score of every pair of heads in which the second is in a later layer; 0 for all other pairs.

    What the first writes is W_OV = W_V W_O. What the second does with it depends on `kind`: with "Q" it reads it for
    its queries, W_QK = W_Q W_K^T; with "K" for its keys, the transpose of W_QK; with "V" for its values, W_OV again.
    Raises ValueError for another `kind`. Weights are taken as they are, LayerNorm left out (see `fold_layer_norm`).
    """
    first, second = read_by(model, kind)
    W_V, W_O = read_by(model, "V")
    n_layers, n_heads = W_V.shape[:2]
    scores = W_V.new_zeros(n_layers, n_heads, n_layers, n_heads)
    for layer in range(n_layers - 1):  # all heads of all later layers at once; all layers would not fit for GPT-2
        writes = FactoredMatrix(W_V[layer, :, None, None], W_O[layer, :, None, None])
        scores[layer, :, layer + 1 :] = composition_score(
            writes, FactoredMatrix(first[layer + 1 :], second[layer + 1 :])
        )
    return scores


def random_rotation(d_model: int, generator: torch.Generator) -> Float[Tensor, "d_model d_model"]:
    """A rotation, or a reflection, drawn with equal chances from all there are."""
    Q, R = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator))
    return Q * R.diagonal().sign()  # without the signs some rotations would be more frequent than others


def random_composition_baseline(model: nn.Module, kind: str, n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
    """`n` composition scores of pairs in which what is written and what is read are unrelated.

    For each score, draw a layer (any but the last), a later layer, and a head in each, all with equal chances. Then
    rotate the residual stream between the two by a new rotation R, drawn with equal chances from all rotations
    (reflections included): it is the score of W_OV R and what `kind` says is read. So the heads keep their own singular
    values, and only the directions are random. All random numbers come from `generator`. Raises ValueError for another
    `kind`, and for a model of one layer, which has no pairs.
    """
    first, second = read_by(model, kind)
    W_V, W_O = read_by(model, "V")
    n_layers, n_heads, d_model = W_V.shape[:3]
    if n_layers < 2:
        raise ValueError("random_composition_baseline: a model of one layer has no pairs of heads that compose.")
    scores = W_V.new_empty(n)
    for sample in range(n):
        layer = int(torch.randint(n_layers - 1, (), generator=generator))
        later = int(torch.randint(layer + 1, n_layers, (), generator=generator))
        head, later_head = torch.randint(n_heads, (2,), generator=generator).tolist()
        rotation = random_rotation(d_model, generator).to(W_V)
        writes = FactoredMatrix(W_V[layer, head], W_O[layer, head] @ rotation)
        scores[sample] = composition_score(writes, FactoredMatrix(first[later, later_head], second[later, later_head]))
    return scores


# ------------------------------------------------------------------------------------------------------------- beyond
