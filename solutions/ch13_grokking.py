"""Chapter 13: modular addition, from memorised sums to an algorithm made of waves."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from course_utils.hooks import run_with_hooks

# ----------------------------------------------------------------------------------------------------------- training


def modular_addition_dataset(
    p: int, share: float, generator: torch.Generator, together: bool = False
) -> tuple[Int[Tensor, "pair 3"], Int[Tensor, " pair"], Bool[Tensor, " pair"]]:
    """All p² sums modulo p, and which of them are for training: (tokens, answers, is_train).

    Row a * p + b of `tokens` holds a, b and the token p, which stands for "="; its answer is (a + b) % p. The training
    pairs are drawn at random, share * p² of them, rounded down. With `together`, a + b and b + a are drawn as one, so
    that no held-out sum has its mirror image in the training set; there can then be one training pair more. Random
    numbers come from `generator`. Raises ValueError if one of the two sides would be empty.
    """
    n_train, device = int(share * p**2), generator.device
    if not 0 < n_train < p**2:
        raise ValueError(f"modular_addition_dataset: with a share of {share} one side is empty.")
    first, second = torch.meshgrid(torch.arange(p, device=device), torch.arange(p, device=device), indexing="ij")
    tokens = torch.stack([first, second, torch.full_like(first, p)], dim=-1).flatten(0, 1)
    order = torch.randperm(p**2, generator=generator, device=device)
    rank = order.argsort().reshape(p, p)  # when each pair is drawn
    if together:
        rank = rank.triu() + rank.triu(1).T  # b + a comes when a + b does
    is_train = rank <= rank.flatten().kthvalue(n_train).values
    return tokens, (tokens[:, 0] + tokens[:, 1]) % p, is_train.flatten()


def answer_loss(logits: Float[Tensor, "*pair number"], answers: Int[Tensor, "*pair"]) -> Float[Tensor, ""]:
    """The mean cross-entropy of the right answers, in nats, computed in float64 and returned in the logits' dtype.

    Float32 has seven digits: log-probabilities nearer to 0 than about 1e-7 come out as 0 there, and a training loss
    gets that small. Gradients pass.
    """
    logprobs = logits.double().log_softmax(dim=-1)
    return -logprobs.gather(-1, answers[..., None]).mean().to(logits.dtype)


def tabulated_logits(model: Any, tokens: Int[Tensor, "pair 3"]) -> Float[Tensor, "pair number"]:
    """The logits of all numbers at "=", by tables: what `model(tokens)[:, -1, :-1]` gives, several times faster.

    The model has one layer with ReLU neurons and no normalisation, and reads a, b, "=". So a key or a value depends on
    nothing but the token and its position. p numbers at each of two positions and one "=" make 2p + 1 of them,
    whatever the number of pairs. And only "=", the last position, asks a query and has neurons that count. The model's
    `forward` is not called. Gradients pass to the parameters.
    """
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    W_E, W_pos = model.embed.W_E, model.pos_embed.W_pos
    streams = [W_E[:-1] + W_pos[0], W_E[:-1] + W_pos[1], W_E[-1:] + W_pos[2]]
    a, b = tokens[:, 0], tokens[:, 1]
    rows = [a, b, torch.zeros_like(a)]

    def heads(stream: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return einops.einsum(stream, W, "row d_model, head d_model d_head -> row head d_head") + b

    query = heads(streams[2], attn.W_Q, attn.b_Q) / attn.W_Q.shape[-1] ** 0.5
    scores = [(heads(stream, attn.W_K, attn.b_K) * query).sum(dim=-1) for stream in streams]
    values = [heads(stream, attn.W_V, attn.b_V) for stream in streams]
    pattern = torch.stack([table[row] for table, row in zip(scores, rows, strict=True)], dim=-1).softmax(dim=-1)
    z = sum(pattern[..., key, None] * table[row] for key, (table, row) in enumerate(zip(values, rows, strict=True)))
    resid = streams[2] + einops.einsum(z, attn.W_O, "pair head d_head, head d_head d_model -> pair d_model") + attn.b_O
    resid = resid + torch.relu(resid @ mlp.W_in + mlp.b_in) @ mlp.W_out + mlp.b_out
    return resid @ model.unembed.W_U[:, :-1] + model.unembed.b_U[:-1]


def fit_modular(
    model: Any,
    tokens: Int[Tensor, "pair 3"],
    answers: Int[Tensor, " pair"],
    is_train: Bool[Tensor, " pair"],
    steps: int,
    weight_decay: float = 1.0,
    every: int = 100,
    watch: Callable[[int], dict[str, float]] = lambda step: {},
) -> list[dict[str, Any]]:
    """Train on all training pairs at once in every step, in place; return the losses of every so many steps.

    Each entry holds `step`, the losses `train` and `held_out`, the share of right answers `held_out_right`, and what
    `watch(step)` returns, before the step was taken.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=weight_decay, betas=(0.9, 0.98))
    history = []
    progress = tqdm(range(steps + 1), mininterval=1)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 10)
        loss = answer_loss(tabulated_logits(model, tokens[is_train]), answers[is_train])
        if step % every == 0:
            with torch.no_grad():
                logits, right = tabulated_logits(model, tokens[~is_train]), answers[~is_train]
            seen = {"train": loss.item(), "held_out": answer_loss(logits, right).item()}
            accuracy = (logits.argmax(dim=-1) == right).double().mean().item()
            history.append({"step": step, **seen, "held_out_right": accuracy, **watch(step)})
            progress.set_postfix(seen, refresh=False)
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return history


# -------------------------------------------------------------------------------------------------------------- waves


def fourier_basis(n: int) -> Float[Tensor, "wave number"]:
    """The n waves on the numbers 0 to n - 1, as orthonormal rows.

    The first is constant. Then come, for the frequencies k = 1, 2, ..., cos(2πkx/n) and sin(2πkx/n), in this order. If
    n is even, the last row is the cosine of k = n/2, which goes up and down with every number; its sine would be 0
    everywhere, and is no wave. Every row is divided by its own length.
    """
    frequencies, numbers = torch.arange(n // 2 + 1), torch.arange(n)
    angles = 2 * math.pi * (torch.outer(frequencies, numbers) % n).double() / n
    waves = torch.stack([angles.cos(), angles.sin()], dim=1).flatten(0, 1)[[0, *range(2, n + 1)]]
    return (waves / waves.norm(dim=1, keepdim=True)).float()


def fft1d(values: Float[Tensor, "*rest number"]) -> Float[Tensor, "*rest wave"]:
    """How much of each wave of `fourier_basis` is in the values: the coefficients along the last axis.

    The sum over the waves of coefficient times wave gives the values back.
    """
    return values @ fourier_basis(values.shape[-1]).to(values).T


def fourier_2d_basis_term(i: int, j: int, n: int) -> Float[Tensor, "n n"]:
    """The wave i in a times the wave j in b, for all pairs (a, b): entry [a, b] is basis[i, a] * basis[j, b]."""
    waves = fourier_basis(n)
    return torch.outer(waves[i], waves[j])


def fft2d(grid: Float[Tensor, "n n *rest"]) -> Float[Tensor, "n n *rest"]:
    """How much of each product of two waves is in a grid over (a, b): entry [i, j] belongs to wave i in a and j in b.

    Further axes, such as neurons, stay as they are: each has a grid of its own.
    """
    waves = fourier_basis(len(grid)).to(grid)
    return einops.einsum(waves, waves, grid, "i a, j b, a b ... -> i j ...")


def frequency_norms(vectors: Float[Tensor, "number d_model"]) -> Float[Tensor, " frequency"]:
    """How large each frequency is in a table with one vector for each number: from frequency 0 up to n // 2.

    The norm of all of a frequency's coefficients, over d_model, cosine and sine together. Frequency 0 is the constant.
    """
    n = len(vectors)
    squares = fft1d(vectors.T).square().sum(dim=0)
    pooled = squares.new_zeros(n // 2 + 1).index_add(0, (torch.arange(n, device=squares.device) + 1) // 2, squares)
    return pooled.sqrt()


def key_frequencies(W_E: Float[Tensor, "number d_model"], n: int) -> Int[Tensor, " n"]:
    """The n largest frequencies of the numbers' embeddings, the largest first; the constant is none of them."""
    return frequency_norms(W_E)[1:].topk(n).indices + 1


# ---------------------------------------------------------------------------------------------------------- algorithm


def neuron_frequencies(
    activations: Float[Tensor, "n n neuron"],
) -> tuple[Int[Tensor, " neuron"], Float[Tensor, " neuron"]]:
    """The frequency that explains most of each neuron over all pairs (a, b), and its share of the neuron's variance.

    To frequency k belong all products of two waves of which each has frequency k or is the constant, but not both the
    constant. The variance is the sum of the squares of all coefficients but the constant's. A neuron that is 0 for all
    pairs has frequency 0 and share 0.
    """
    n = len(activations)
    squares = fft2d(activations).square()
    frequency = (torch.arange(n, device=activations.device) + 1) // 2
    member = nn.functional.one_hot(frequency, n // 2 + 1).T.to(squares)
    pooled = einops.einsum(member, member, squares, "f i, g j, i j neuron -> f g neuron")
    powers = pooled[1:, 0] + pooled[0, 1:] + pooled.diagonal().T[1:]
    total = pooled.sum(dim=(0, 1)) - pooled[0, 0]
    best = powers.max(dim=0)
    alive = total > 0
    return torch.where(alive, best.indices + 1, 0), torch.where(alive, best.values / total, 0.0)


def effective_unembedding(model: Any) -> Float[Tensor, "neuron number"]:
    """What each neuron of the last MLP adds to the logit of each number, for one unit of activation.

    The direct path: out of the MLP by `W_out`, into the logits by `W_U`. There is no normalisation between them. The
    column of "=" is left out.
    """
    return model.blocks[-1].mlp.W_out @ model.unembed.W_U[:, :-1]


def sum_waves(n: int, frequency: int) -> Float[Tensor, "2 n n"]:
    """cos(w(a + b)) and sin(w(a + b)) for all pairs (a, b), with w = 2π frequency / n; each divided by its length.

    If n is even and the frequency n/2, the sine is 0 everywhere, and stays so.
    """
    numbers = torch.arange(n)
    angles = 2 * math.pi * ((numbers[:, None] + numbers) * frequency % n).double() / n
    waves = torch.stack([angles.cos(), angles.sin() if 2 * frequency != n else torch.zeros_like(angles)])
    return (waves / waves.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)).float()


def trig_directions(W_L: Float[Tensor, "neuron number"], frequency: int) -> Float[Tensor, "2 neuron"]:
    """The two directions in the neurons that become the logits' cosine and sine of a frequency: (cosine, sine).

    `W_L` is an effective unembedding. Along the numbers each of its rows is a sum of the waves of `fourier_basis`, so
    for each wave there is one coefficient for each neuron: the direction. Raises ValueError unless the frequency is at
    least 1 and less than half the number of answers.
    """
    n = W_L.shape[1]
    if not 1 <= frequency < n / 2:
        raise ValueError(f"trig_directions: with {n} answers there is no pair of waves {frequency}.")
    return fft1d(W_L)[:, 2 * frequency - 1 : 2 * frequency + 1].T


def logit_fit(
    logits: Float[Tensor, "n n n"], frequencies: Sequence[int]
) -> tuple[Float[Tensor, " frequency"], Float[Tensor, " frequency"]]:
    """The logits of all answers c to all pairs (a, b) as a sum of cos(w(a + b - c)): (coefficients, shares).

    w is 2π times the frequency / n, one term for each frequency, by least squares. The softmax does not care about the
    mean over the answers, so it is first taken off each pair's logits. A share is the part of the variance of what is
    left that one term explains; the terms are orthogonal, so shares add up.
    """
    n = len(logits)
    centred = logits - logits.mean(dim=-1, keepdim=True)
    x = torch.arange(n, device=logits.device)
    distance = x[:, None, None] + x[:, None] - x
    coefficients, shares = [], []
    for frequency in frequencies:
        wave = (2 * math.pi * (distance * frequency % n).double() / n).cos().to(logits)
        size = wave.square().sum()
        coefficients.append((centred * wave).sum() / size)
        shares.append(coefficients[-1].square() * size / centred.square().sum())
    return torch.stack(coefficients), torch.stack(shares)


# ----------------------------------------------------------------------------------------------------------- progress


def sum_part(grid: Float[Tensor, "n n *rest"], frequencies: Sequence[int]) -> Float[Tensor, "n n *rest"]:
    """What a grid over (a, b) says about a + b at these frequencies: its mean over all pairs, and its `sum_waves`.

    Each entry of the further axes, such as a logit, is a grid of its own: the part of it along the waves cos(w(a + b))
    and sin(w(a + b)) of each frequency, plus its mean. All else is left out.
    """
    kept = grid.mean(dim=(0, 1)).expand_as(grid)
    for frequency in frequencies:
        waves = sum_waves(len(grid), frequency).to(grid)
        coefficients = einops.einsum(waves, grid, "wave a b, a b ... -> wave ...")
        kept = kept + einops.einsum(waves, coefficients, "wave a b, wave ... -> a b ...")
    return kept


def restricted_loss(
    logits: Float[Tensor, "n n n"], frequencies: Sequence[int], answers: Int[Tensor, "n n"]
) -> Float[Tensor, ""]:
    """The loss over all pairs if the logits keep nothing but their `sum_part` at these frequencies.

    It is low as soon as the algorithm is there, whatever else the model has memorised. Source: Nanda et al. 2023,
    section 5.1.
    """
    return answer_loss(sum_part(logits, frequencies), answers)


def excluded_loss(
    logits: Float[Tensor, "n n n"],
    frequencies: Sequence[int],
    answers: Int[Tensor, "n n"],
    is_train: Bool[Tensor, "n n"],
) -> Float[Tensor, ""]:
    """The loss over the training pairs if the logits lose their waves in a + b at these frequencies.

    Their means over all pairs stay. It is low as long as memory alone answers the training pairs. Source: Nanda et al.
    2023, section 5.1.
    """
    without = logits - sum_part(logits, frequencies) + logits.mean(dim=(0, 1))
    return answer_loss(without[is_train], answers[is_train])


def gini(values: Float[Tensor, " value"]) -> Float[Tensor, ""]:
    """The Gini coefficient of numbers that are not negative: 0 if all are equal, near 1 if one has nearly everything.

    The mean difference between two of them, over all n² ordered pairs (also of one with itself), divided by twice
    their mean.
    """
    n = len(values)
    weights = 2 * torch.arange(1, n + 1, device=values.device) - n - 1
    return (weights * values.sort().values).sum() / (n * values.sum())


@torch.no_grad()
def loss_with_frequencies(
    model: Any, tokens: Int[Tensor, "pair 3"], answers: Int[Tensor, " pair"], frequencies: Sequence[int]
) -> Float[Tensor, ""]:
    """The model's loss if its embeddings of the numbers hold these frequencies and the constant, and no others.

    The model runs with `hook_embed` replaced, so all that follows from it follows; "=" keeps its embedding. The answer
    is read at "=", among the numbers. The model stays as it is, no hook is left behind, and no gradients are recorded.
    """
    W_E = model.embed.W_E
    n = len(W_E) - 1
    frequency = (torch.arange(n, device=W_E.device) + 1) // 2
    wanted = torch.tensor([0, *frequencies], device=W_E.device)
    waves = fourier_basis(n).to(W_E)[torch.isin(frequency, wanted)]
    table = torch.cat([waves.T @ (waves @ W_E[:-1]), W_E[-1:]])
    logits = run_with_hooks(model, tokens, hooks={"hook_embed": lambda activation, hook: table[tokens]})
    return answer_loss(logits[:, -1, :-1], answers)


# ------------------------------------------------------------------------------------------------------------- beyond


def gradient_symmetry(
    logits_of: Callable[[Tensor, Tensor], Tensor],
    first: Float[Tensor, "pair d_model"],
    second: Float[Tensor, "pair d_model"],
    answers: Int[Tensor, " pair"],
) -> Float[Tensor, ""]:
    """How alike the slopes of a logit along the two inputs' embeddings are: the mean cosine of the two gradients.

    `logits_of(first, second)` gives each pair's logits [pair number] from its two embeddings, and pairs do not mix. For
    each pair the logit of its entry in `answers` is differentiated by its first and by its second embedding. Model
    parameters keep their `.grad`. Source: Zhong et al. 2023, section 4.
    """
    x, y = first.detach().requires_grad_(), second.detach().requires_grad_()
    chosen = logits_of(x, y).gather(-1, answers[:, None])
    by_x, by_y = torch.autograd.grad(chosen.sum(), [x, y])
    return nn.functional.cosine_similarity(by_x, by_y, dim=-1).mean()


def primitive_powers(p: int) -> Int[Tensor, " power"]:
    """The powers g⁰, g¹, ..., g^(p - 2) modulo a prime p of the smallest g whose powers are all of 1 to p - 1.

    So multiplying two entries is adding their places. Raises ValueError if there is no such g, as for p = 12.
    """
    for g in range(1, p):
        powers = [1]
        while len(powers) < p - 1:
            powers.append(powers[-1] * g % p)
        if sorted(powers) == list(range(1, p)):
            return torch.tensor(powers)
    raise ValueError(f"primitive_powers: {p} is not prime, so no number has all the others as its powers.")
