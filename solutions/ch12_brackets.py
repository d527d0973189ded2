"""Chapter 12: a model that tells balanced brackets from others, read in full, and then fooled."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from course_utils.data.brackets import (
    BALANCED,
    CLOSE,
    END,
    KINDS,
    OPEN,
    PAD,
    SHARES,
    START,
    UNBALANCED,
    random_balanced,
)
from course_utils.hooks import ActivationCache, HookPoint, run_with_cache, run_with_hooks
from solutions.ch03_training import cosine_schedule

# ----------------------------------------------------------------------------------------------------------- the task


def is_balanced(text: str) -> bool:
    """Whether every bracket of a text of "(" and ")" has its partner: each ")" closes a "(" that came before it.

    So "(())()" is balanced; "(()" and ")(" are not. The empty text is. Raises ValueError for any other character,
    wherever it stands.
    """
    height = 0
    if set(text) - {"(", ")"}:
        raise ValueError(f"is_balanced: {text!r} holds something that is no bracket.")
    for bracket in text:
        height += 1 if bracket == "(" else -1
        if height < 0:
            return False
    return height == 0


def elevation(tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """How many brackets are open after each position: the OPENs so far, this one included, minus the CLOSEs so far.

    START, END and PAD are no brackets, and leave the elevation as it is. It is negative after a CLOSE too many.
    """
    steps = (tokens == OPEN).long() - (tokens == CLOSE).long()
    return steps.cumsum(dim=1)


def failures(tokens: Int[Tensor, "batch pos"]) -> tuple[Bool[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """The two ways in which a text can fail: (its total is wrong, its elevation is negative somewhere).

    The total is wrong if there are not as many OPENs as CLOSEs. A text can fail in one way, in both, or in neither.
    """
    height = elevation(tokens)
    return height[:, -1] != 0, (height < 0).any(dim=1)


def is_balanced_batch(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, " batch"]:
    """Whether the text in each row, which stands between START and END, is balanced: `is_balanced` without a loop."""
    wrong_total, negative = failures(tokens)
    return ~(wrong_total | negative)


def bracket_dataset(
    n: int, n_ctx: int, generator: torch.Generator, shares: Sequence[float] = SHARES
) -> tuple[Int[Tensor, "batch n_ctx"], Int[Tensor, " batch"]]:
    """Draw `n` different texts: their rows, and how each was made, as a number into KINDS.

    A row is START, the brackets, END, and PAD up to `n_ctx`. The number of pairs is drawn evenly from 1 to the most
    that fit, and the kind with the chances `shares`. The text then has twice as many brackets as pairs, and is

    - "random": each bracket opens or closes with the same chance;
    - "balanced": `random_balanced(1, n_pairs, generator)`, in which all balanced texts are equally likely;
    - "swapped": a balanced text in which one random OPEN and one random CLOSE have changed places;
    - "flipped": a balanced text in which one random bracket is turned round;
    - "shuffled": as many OPENs as CLOSEs, in a random order.

    No row comes twice, so any split of the rows keeps training and held-out texts apart: a text that was drawn before
    is dropped, and more are drawn until there are `n`. The order is that of the drawing. All random numbers come from
    `generator`. A kind says how a text was made: chance can balance a shuffled one. Raises ValueError if there are no
    `n` different texts of even length that fit.
    """
    if n > sum(4**pairs for pairs in range(1, (n_ctx - 2) // 2 + 1)):
        raise ValueError(f"bracket_dataset: there are no {n} different texts of even length in rows of {n_ctx}.")
    device = generator.device
    found: dict[tuple[int, ...], int] = {}  # the kind of each row; a dict keeps its order
    while len(found) < n:
        kinds = torch.multinomial(torch.tensor(shares, device=device), n, replacement=True, generator=generator)
        n_pairs = torch.randint(1, (n_ctx - 2) // 2 + 1, (n,), generator=generator, device=device)
        rows = torch.full((n, n_ctx), PAD, device=device)
        rows[:, 0] = START
        for pairs in n_pairs.unique().tolist():  # the texts of one length are made together, in every kind
            here = (n_pairs == pairs).nonzero().flatten()
            every = torch.arange(len(here), device=device)
            balanced = random_balanced(len(here), pairs, generator)
            first, second = torch.rand(2, *balanced.shape, generator=generator, device=device)
            swapped, flipped = balanced.clone(), balanced.clone()
            swapped[every, (first * (balanced == OPEN)).argmax(dim=1)] = CLOSE
            swapped[every, (second * (balanced == CLOSE)).argmax(dim=1)] = OPEN
            turned = first.argmax(dim=1)
            flipped[every, turned] = OPEN + CLOSE - balanced[every, turned]
            options = {
                "random": torch.randint(2, balanced.shape, generator=generator, device=device),
                "balanced": balanced,
                "swapped": swapped,
                "flipped": flipped,
                "shuffled": balanced.gather(1, first.argsort(dim=1)),
            }
            rows[here, 1 : 2 * pairs + 1] = torch.stack([options[kind] for kind in KINDS])[kinds[here], every]
            rows[here, 2 * pairs + 1] = END
        for row, kind in zip(rows.tolist(), kinds.tolist(), strict=True):
            found.setdefault(tuple(row), kind)
    tokens, made = (torch.tensor(list(part)[:n], device=device) for part in (found, found.values()))
    return tokens, made


# ---------------------------------------------------------------------------------------------------------- the model


def unbalanced_scores(model: nn.Module, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
    """How sure the model is that each text is unbalanced: at END, the logit UNBALANCED minus the logit BALANCED.

    Texts end at different positions, and PAD follows END. A positive score means "unbalanced". Gradients pass.
    """
    logits = model(tokens)
    every, end = torch.arange(len(tokens), device=tokens.device), (tokens == END).long().argmax(dim=1)
    return logits[every, end, UNBALANCED] - logits[every, end, BALANCED]


def fit_brackets(model: nn.Module, tokens: Int[Tensor, "batch pos"], steps: int, seed: int) -> list[float]:
    """Train a model on random batches of 64 rows, in place, and return the loss of every step."""
    generator = torch.Generator().manual_seed(seed)
    labels = (~is_balanced_batch(tokens)).float()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    losses = []
    for step in tqdm(range(steps), mininterval=1):
        rate = cosine_schedule(step, warmup=100, total=steps, peak=2e-3, floor=2e-5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = torch.randint(len(tokens), (64,), generator=generator)
        scores = unbalanced_scores(model, tokens[batch])
        loss = nn.functional.binary_cross_entropy_with_logits(scores, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


# --------------------------------------------------------------------------------------------------- who says it: parts


def layer_norm_fit(
    x: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"]
) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, ""]]:
    """The linear map that comes closest to what a layer did to these vectors: (matrix, r2).

    y is fitted by x @ matrix + intercept, with least squares. The intercept is part of the fit; it is not returned.
    r2 is the share of y's variance that the fit explains: 1 minus the sum of all squared errors over the sum of all
    squared distances of y from its mean over the batch.
    """
    x_centred, y_centred = x - x.mean(dim=0), y - y.mean(dim=0)
    matrix = torch.linalg.pinv(x_centred) @ y_centred
    errors = y_centred - x_centred @ matrix
    return matrix, 1 - errors.square().sum() / y_centred.square().sum()


@torch.no_grad()
def pre_norm_direction(model: Any, resid: Float[Tensor, "batch d_model"]) -> Float[Tensor, " d_model"]:
    """The direction in the final residual stream that says "unbalanced": what the score reads, back through LayerNorm.

    `resid` is the stream at END, after the last block and before `model.ln_final`. The final LayerNorm is replaced by
    the matrix of `layer_norm_fit` on these vectors; the direction d is such that resid @ d is what the fitted map
    gives to logit UNBALANCED minus logit BALANCED, up to a constant.
    """
    matrix, _ = layer_norm_fit(resid, model.ln_final(resid[:, None])[:, 0])
    return matrix @ (model.unembed.W_U[:, UNBALANCED] - model.unembed.W_U[:, BALANCED])


def component_contributions(
    cache: ActivationCache, tokens: Int[Tensor, "batch pos"], direction: Float[Tensor, " d_model"]
) -> tuple[list[str], Float[Tensor, "component batch"]]:
    """How far each part of the model moves the stream at END along `direction`: (labels, dot products).

    The parts are those of chapter 04: "embed", "pos_embed" (not where positions are rotary), then for each layer its
    heads ("head 0.0" is layer 0, head 0), what attention adds on top of them ("bias 0"), and "mlp 0", if it has one.
    But each text is read at its own END. The sum over the parts is the dot product of the final stream there. The cache
    holds each head's `result`.
    """
    every, end = torch.arange(len(tokens), device=tokens.device), (tokens == END).long().argmax(dim=1)
    labels = ["embed", "pos_embed"] if "pos_embed" in cache else ["embed"]
    vectors = [cache[label][every, end] for label in labels]
    for layer in range(cache.n_layers):
        heads = cache["result", layer][every, end]
        labels += [*(f"head {layer}.{head}" for head in range(heads.shape[1])), f"bias {layer}"]
        vectors += [*heads.unbind(dim=1), cache["attn_out", layer][every, end] - heads.sum(dim=1)]
        if ("mlp_out", layer) in cache:
            labels.append(f"mlp {layer}")
            vectors.append(cache["mlp_out", layer][every, end])
    return labels, torch.stack(vectors) @ direction


def attention_by_position(
    pattern: Float[Tensor, "batch head query key"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "head key"]:
    """How much each head of a layer attends to each position from END: the mean over the texts, each at its own END."""
    every, end = torch.arange(len(tokens), device=tokens.device), (tokens == END).long().argmax(dim=1)
    return pattern[every, :, end].mean(dim=0)


def neuron_contributions(
    model: Any,
    cache: ActivationCache,
    tokens: Int[Tensor, "batch pos"],
    direction: Float[Tensor, " d_model"],
    layer: int,
) -> Float[Tensor, "batch neuron"]:
    """How far each neuron of a layer's MLP moves the stream at END along `direction`.

    A neuron adds its activation times its row of W_out. The vectors themselves, [batch neuron d_model], need not be
    made: one number for each neuron says how far its row goes along the direction. b_out belongs to no neuron.
    """
    every, end = torch.arange(len(tokens), device=tokens.device), (tokens == END).long().argmax(dim=1)
    return cache["post", layer][every, end] * (model.blocks[layer].mlp.W_out @ direction)


def probe_r2(
    x_train: Float[Tensor, "train d_model"],
    y_train: Float[Tensor, " train"],
    x_test: Float[Tensor, "test d_model"],
    y_test: Float[Tensor, " test"],
) -> Float[Tensor, ""]:
    """How well a number can be read off vectors by a linear map with an intercept, on vectors it was not fitted to.

    The map is fitted to the training vectors by least squares. r2 is 1 minus the sum of the squared errors on the test
    vectors over the sum of the squared distances of y_test from its own mean. It can be negative.
    """
    mean_x, mean_y = x_train.mean(dim=0), y_train.mean()
    slope = torch.linalg.pinv(x_train - mean_x) @ (y_train - mean_y)
    errors = y_test - (mean_y + (x_test - mean_x) @ slope)
    return 1 - errors.square().sum() / (y_test - y_test.mean()).square().sum()


# ------------------------------------------------------------------------------------------------------------- causes


def corrupted_pairs(
    tokens: Int[Tensor, "batch pos"], kind: str, generator: torch.Generator
) -> Int[Tensor, "batch pos"]:
    """Spoil balanced texts in one way only, by as small a change as there is.

    - "total": one random CLOSE becomes an OPEN. The total is then wrong, and the elevation is never negative.
    - "order": one random OPEN before which no bracket is open, and one random CLOSE after it, change places. The
      elevation is then negative somewhere, and the total stays right.

    All rows of `tokens` are balanced and not empty. Each candidate is equally likely; for "order" the OPEN is drawn
    first, then one of the CLOSEs after it. Random numbers come from `generator`. Raises ValueError for another `kind`.
    """
    if kind not in ("total", "order"):
        raise ValueError(f'corrupted_pairs: kind must be "total" or "order", got {kind!r}.')
    every, places = (torch.arange(size, device=tokens.device) for size in tokens.shape)
    corrupted = tokens.clone()
    opens = torch.zeros_like(every)
    if kind == "order":
        grounded = (tokens == OPEN) & (elevation(tokens) == 1)
        opens = torch.multinomial(grounded.float(), 1, generator=generator)[:, 0]
        corrupted[every, opens] = CLOSE
    later = (tokens == CLOSE) & (places > opens[:, None])
    corrupted[every, torch.multinomial(later.float(), 1, generator=generator)[:, 0]] = OPEN
    return corrupted


@torch.no_grad()
def scores_with_patch(
    model: Any,
    clean: Int[Tensor, "batch pos"],
    corrupted: Int[Tensor, "batch pos"],
    component: str,
    mask: Bool[Tensor, "batch pos"],
) -> Float[Tensor, " batch"]:
    """`unbalanced_scores` on the clean texts, when one component writes what it wrote in the run on the corrupted ones.

    `component` is "mlp 0" or "head 1.0" (layer 1, head 0), as `component_contributions` labels them. It is replaced at
    the positions of `mask` only; there its output, a head's `result` or a layer's `mlp_out`, is that of the corrupted
    text in the same row. What comes after it follows. No hook is left behind, and no gradients are recorded.
    """
    kind, _, number = component.partition(" ")
    layer, _, head = number.partition(".")
    name = f"blocks.{layer}.hook_mlp_out" if kind == "mlp" else f"blocks.{layer}.attn.hook_result"
    _, cache = run_with_cache(model, corrupted, names=name)

    def patch(activation: Tensor, hook: HookPoint) -> Tensor:
        patched = activation.clone()
        if kind == "mlp":
            patched[mask] = cache[name][mask]
        else:
            patched[:, :, int(head)][mask] = cache[name][:, :, int(head)][mask]
        return patched

    logits = run_with_hooks(model, clean, hooks={name: patch})
    every, end = torch.arange(len(clean), device=clean.device), (clean == END).long().argmax(dim=1)
    return logits[every, end, UNBALANCED] - logits[every, end, BALANCED]


# ----------------------------------------------------------------------------------------------------------- break it


def flip_effects(model: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """What turning each bracket round would do to its text's score, to first order: one backward pass for all flips.

    The gradient of `unbalanced_scores` at the token embeddings (`hook_embed`), times what the embedding would change
    by: W_E of the other bracket minus W_E of this one. Where there is no bracket it is 0. The weights' `.grad` stay
    as they are.
    """
    _, cache = run_with_cache(model, tokens, names="hook_embed")
    embedded = cache["embed"].detach().requires_grad_()
    logits = run_with_hooks(model, tokens, hooks={"hook_embed": lambda activation, hook: embedded})
    every, end = torch.arange(len(tokens), device=tokens.device), (tokens == END).long().argmax(dim=1)
    scores = logits[every, end, UNBALANCED] - logits[every, end, BALANCED]
    (gradient,) = torch.autograd.grad(scores.sum(), embedded)
    to_close = gradient @ (model.embed.W_E[CLOSE] - model.embed.W_E[OPEN])
    return ((tokens == OPEN) * to_close - (tokens == CLOSE) * to_close).detach()


@torch.no_grad()
def hill_climb(
    model: nn.Module, tokens: Int[Tensor, "batch pos"], generator: torch.Generator, steps: int
) -> Int[Tensor, "batch pos"]:
    """Look for unbalanced texts that the model calls balanced: change two brackets at random, keep what helps, repeat.

    All rows are unbalanced. In each step two different brackets of each text, chosen at random, are turned round. The
    text keeps the change if it is still unbalanced and its score (`unbalanced_scores`) is lower than before; otherwise
    it stays as it was. Its length never changes. Random numbers come from `generator`. Texts have two brackets or more.
    """
    best, scores = tokens.clone(), unbalanced_scores(model, tokens)
    every = torch.arange(len(tokens), device=tokens.device)
    for _ in range(steps):
        brackets = (best == OPEN) | (best == CLOSE)
        chosen = torch.multinomial(brackets.float(), 2, generator=generator)
        tried = best.clone()
        tried[every[:, None], chosen] = OPEN + CLOSE - best[every[:, None], chosen]
        tried_scores = unbalanced_scores(model, tried)
        better = ~is_balanced_batch(tried) & (tried_scores < scores)
        best, scores = torch.where(better[:, None], tried, best), torch.where(better, tried_scores, scores)
    return best
