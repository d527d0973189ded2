"""Chapter 11: activation oracles, models that read another model's activations and answer questions about them."""

import copy
import random
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from course_utils.data.questions import BALANCED, D_VOCAB, PLACEHOLDER, Question, Wording, oracle_row
from course_utils.hooks import HookPoint, run_with_cache, run_with_hooks
from solutions.ch03_training import cosine_schedule
from solutions.ch07_probes import stream_name

# ------------------------------------------------------------------------------------------------------- activations


@torch.no_grad()
def harvest_windows(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    ends: Int[Tensor, " batch"],
    layer: int,
    width: int,
    batch_size: int = 256,
) -> Float[Tensor, "batch slot d_model"]:
    """Collect the last `width` vectors of the residual stream up to position `ends` of each text, `ends` included.

    Slots are in the order of the text, so the last one is the vector at `ends`. Layers are numbered as in chapter 07:
    `layer` is after so many blocks. The model runs on `batch_size` texts at a time and keeps only this stream.
    """
    name = stream_name(model, layer)
    places = ends[:, None] + torch.arange(1 - width, 1, device=ends.device)
    found = []
    for rows, wanted in zip(tokens.split(batch_size), places.split(batch_size), strict=True):
        _, cache = run_with_cache(model, rows, names=name)
        found.append(cache[name][torch.arange(len(rows), device=rows.device)[:, None], wanted])
    return torch.cat(found)


def shuffle_windows(
    windows: Float[Tensor, "batch slot d_model"], generator: torch.Generator
) -> Float[Tensor, "batch slot d_model"]:
    """Make windows that belong to no text: every slot keeps its place, but comes from another row.

    No slot of a row comes from that row, and no two of them from the same one. For each slot, every row of `windows`
    is used once. Which row goes where depends on `generator` alone. There are more rows than slots.
    """
    n, width = windows.shape[:2]
    order = torch.randperm(n, generator=generator).to(windows.device)
    shuffled = torch.empty_like(windows)
    for slot in range(width):
        shuffled[order, slot] = windows[order.roll(slot + 1), slot]
    return shuffled


# --------------------------------------------------------------------------------------------------------- the oracle


def inject(
    stream: Float[Tensor, "batch pos d_model"],
    vectors: Float[Tensor, "batch slot d_model"],
    places: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos d_model"]:
    """Add vectors to a stream where `places` is True, each scaled to the length of what is there: h + |h| v / |v|.

    Every row has as many True places as there are slots; the first slot goes to the first of them. All other places
    stay as they are, and so does a place whose vector is zero. Gradients flow to both, and none of them is NaN.
    Source: Karvonen et al. 2025, section 3.
    """
    there = stream[places]
    added = vectors.flatten(0, 1)
    lengths = added.norm(dim=-1, keepdim=True)
    added = added * there.norm(dim=-1, keepdim=True) / torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    changed = stream.clone()
    changed[places] = there + added
    return changed


def run_oracle(
    oracle: Any,
    tokens: Int[Tensor, "batch pos"],
    vectors: Float[Tensor, "batch slot d_model"],
    layer: int = 1,
) -> Float[Tensor, "batch pos d_vocab"]:
    """Let the oracle read `tokens`, with vectors injected at the placeholders after `layer` of its blocks: its logits.

    `inject` says how; a placeholder is a token `PLACEHOLDER`. Layers are numbered as in chapter 07. No hook stays
    behind, and gradients flow.
    """

    def put(stream: Tensor, hook: HookPoint) -> Tensor:
        return inject(stream, vectors, tokens == PLACEHOLDER)

    return run_with_hooks(oracle, tokens, hooks={stream_name(oracle, layer): put})


def oracle_examples(
    known: Sequence[Sequence[Question]],
    wordings: Mapping[str, Sequence[Wording]],
    n: int,
    rng: random.Random,
    balanced: Collection[str] = BALANCED,
) -> tuple[Int[Tensor, " n"], Int[Tensor, "n pos"], Int[Tensor, " n"]]:
    """Draw questions to train or test an oracle on: (which window, rows of tokens, answers).

    `known[i]` are the questions that window i answers. For each example draw a type, each equally likely, of those
    that have wordings in `wordings` *and* questions in `known`; then one of its questions in any window, each equally
    likely; and one of its wordings. Types in `balanced` have two answers: for them, draw the answer first, each of
    those that occur equally likely, and then a question with this answer. `oracle_row(wording, about)` is the row: it
    holds the question and nothing of the text. All draws come from `rng`.
    """
    pools: dict[str, dict[Any, list[tuple[int, Question]]]] = defaultdict(lambda: defaultdict(list))
    for window, questions in enumerate(known):
        for question in questions:
            if wordings.get(question.type):
                pools[question.type][question.answer if question.type in balanced else None].append((window, question))
    types = sorted(pools)
    which, rows, answers = [], [], []
    for _ in range(n):
        kind = rng.choice(types)
        window, question = rng.choice(pools[kind][rng.choice(list(pools[kind]))])
        which.append(window)
        rows.append(oracle_row(rng.choice(wordings[kind]), question.about))
        answers.append(question.answer)
    return torch.tensor(which), torch.tensor(rows), torch.tensor(answers)


def oracle_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], is_answer: Bool[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Return the mean of -log p over the tokens that belong to an answer, in nats; nothing else counts.

    `tokens` are the rows that the model read, answers included, and `is_answer` says which of them are answers. The
    logits at a position are about the *next* token. The mean is over all answer tokens of all rows.
    """
    wanted = is_answer[:, 1:]
    return nn.functional.cross_entropy(logits[:, :-1][wanted], tokens[:, 1:][wanted])


def fit_oracle(
    oracle: Any,
    windows: Float[Tensor, "window slot d_model"],
    examples: tuple[Int[Tensor, " n"], Int[Tensor, "n pos"], Int[Tensor, " n"]],
    batch: int = 256,
    peak_lr: float = 1.5e-3,
    schedule: tuple[int, int] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """Train what of the oracle needs gradients, once through all examples in their order; return the losses.

    The learning rate warms up over 60 steps and then falls along a cosine. `schedule` says (first step, all steps),
    with the `optimizer` of before, if this is one part of a longer training.
    """
    which, rows, answers = examples
    trained = [parameter for parameter in oracle.parameters() if parameter.requires_grad]
    if optimizer is None:
        optimizer = torch.optim.AdamW(trained, lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    n_steps = len(which) // batch
    first, total = schedule or (0, n_steps)
    losses = []
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine_schedule(first + step, min(60, total // 4 + 1), total, peak_lr, peak_lr / 50)
        chosen = slice(step * batch, (step + 1) * batch)
        tokens = torch.cat([rows[chosen], answers[chosen, None]], dim=1)
        is_answer = torch.zeros_like(tokens, dtype=torch.bool)
        is_answer[:, -1] = True
        logits = run_oracle(oracle, tokens, windows[which[chosen]].float())
        loss = oracle_loss(logits, tokens, is_answer)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def answer_probabilities(
    oracle: Any, windows: Float[Tensor, "n slot d_model"], rows: Int[Tensor, "n pos"], batch_size: int = 512
) -> Float[Tensor, "n d_vocab"]:
    """How likely the oracle thinks each token is as the answer: the softmax of its logits at the end of each row."""
    found = []
    for tokens, vectors in zip(rows.split(batch_size), windows.split(batch_size), strict=True):
        found.append(run_oracle(oracle, tokens, vectors)[:, -1].softmax(dim=-1))
    return torch.cat(found)


def shuffle_alike(
    windows: Float[Tensor, "batch slot d_model"],
    ends: Int[Tensor, " batch"],
    generator: torch.Generator,
    group: int = 64,
) -> Float[Tensor, "batch slot d_model"]:
    """Shuffle windows among those that end at nearly the same position, so that positions do not give them away."""
    order = ends.argsort(stable=True)
    shuffled = torch.empty_like(windows)
    for rows in order.split(group):
        alike = rows if len(rows) > windows.shape[1] else order[-group:]
        shuffled[rows] = shuffle_windows(windows[alike], generator)[-len(rows) :]
    return shuffled


def oracle_from(model: Any, ModelClass: Any, generator: torch.Generator, d_vocab: int = D_VOCAB) -> Any:
    """A copy of a model, as a `ModelClass`, with room for new tokens: what an oracle is before its training.

    The embeddings and unembeddings of the new tokens are drawn with the deviation of the old ones, divided by 10 for
    the unembeddings, so that at first no new token is likely.
    """
    cfg = replace(model.cfg, d_vocab=d_vocab)
    n_new = d_vocab - model.cfg.d_vocab
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    W_E, W_U = weights["embed.W_E"], weights["unembed.W_U"]
    new_E = torch.randn(n_new, cfg.d_model, generator=generator).to(W_E) * W_E.std()
    new_U = torch.randn(cfg.d_model, n_new, generator=generator).to(W_U) * W_U.std() / 10
    weights["embed.W_E"] = torch.cat([W_E, new_E])
    weights["unembed.W_U"] = torch.cat([W_U, new_U], dim=1)
    weights["unembed.b_U"] = torch.cat([weights["unembed.b_U"], W_U.new_zeros(n_new)])
    oracle = ModelClass(cfg)
    oracle.load_state_dict(weights, assign=True)
    oracle.cfg, oracle.tokenizer = cfg, model.tokenizer
    return oracle.to(W_E.device)


# ------------------------------------------------------------------------------------------------- two ways to train


class LoRALinear(nn.Module):
    """A linear map that is frozen, plus a change of low rank that is trained: x W^T + b + (alpha / rank) x A^T B^T.

    `linear` is kept as `self.linear`, and its parameters need no gradients any more. `A` [rank in_features] is drawn
    from a normal distribution with deviation 1 / sqrt(in_features), from `generator`; `B` [out_features rank] begins
    as zeros, so that at first nothing changes.
    `merged()` returns a new `nn.Linear` that computes the same without any adapter; it shares nothing with
    `self.linear`, which stays as it is.
    Source: Hu et al. 2021, section 4.1.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        A = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
        self.A = nn.Parameter(A.to(linear.weight))
        self.B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """Add what the adapter says to what the frozen map says."""
        return self.linear(x) + self.scale * (x @ self.A.T @ self.B.T)

    def merged(self) -> nn.Linear:
        """One linear map that does both."""
        plain = copy.deepcopy(self.linear)
        with torch.no_grad():
            plain.weight += self.scale * self.B @ self.A
        return plain


class LowRank(nn.Module):
    """A parametrization of a matrix [row col]: W + (alpha / rank) A B, with B zeros at first."""

    def __init__(self, W: Float[Tensor, "row col"], rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        n_rows, n_cols = W.shape
        self.scale = alpha / rank
        self.A = nn.Parameter((torch.randn(n_rows, rank, generator=generator) / n_rows**0.5).to(W))
        self.B = nn.Parameter(W.new_zeros(rank, n_cols))

    def forward(self, W: Float[Tensor, "row col"]) -> Float[Tensor, "row col"]:
        """The matrix that the model computes with."""
        return W + self.scale * self.A @ self.B


class NewTokens(nn.Module):
    """A parametrization that trains only what belongs to new tokens: the entries from `n_old` on along an axis."""

    def __init__(self, W: Float[Tensor, "..."], n_old: int, axis: int) -> None:
        super().__init__()
        self.n_old, self.axis = n_old, axis
        self.new = nn.Parameter(W.detach().narrow(axis, n_old, W.shape[axis] - n_old).clone())

    def forward(self, W: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The old entries as they are, and the new ones."""
        return torch.cat([W.narrow(self.axis, 0, self.n_old), self.new], dim=self.axis)


def add_adapters(model: Any, rank: int, alpha: float, generator: torch.Generator) -> list[nn.Parameter]:
    """Freeze a model and put a `LowRank` on `W_in` and `W_out` of each of its MLPs; return the adapters' parameters.

    `parametrize.register_parametrization` puts it there: nothing is replaced, so it works for anybody's `Transformer`.
    The parameters come layer by layer, `W_in` first, A before B, and draws from `generator` in this order. Before any
    training the model computes what it did before.
    """
    model.requires_grad_(False)
    added: list[nn.Parameter] = []
    for block in model.blocks:
        for name in ("W_in", "W_out"):
            adapter = LowRank(getattr(block.mlp, name), rank, alpha, generator)
            parametrize.register_parametrization(block.mlp, name, adapter)
            added += [adapter.A, adapter.B]
    return added


def train_new_tokens(oracle: Any, n_old: int) -> list[nn.Parameter]:
    """Let the new tokens' embeddings, unembeddings and their biases be trained, and return these parameters."""
    added: list[nn.Parameter] = []
    for part, name, axis in ((oracle.embed, "W_E", 0), (oracle.unembed, "W_U", 1), (oracle.unembed, "b_U", 0)):
        tokens = NewTokens(getattr(part, name), n_old, axis)
        parametrize.register_parametrization(part, name, tokens)
        added.append(tokens.new)
    return added


# ------------------------------------------------------------------------------------------------ can it be believed?


def accuracy_by_type(
    types: Sequence[str], predicted: Int[Tensor, " n"], answers: Int[Tensor, " n"]
) -> dict[str, tuple[float, float, int]]:
    """For each type of question: (share right, share of its most frequent answer, how many there are).

    The second is what somebody gets who knows the type, sees nothing, and always gives the same answer.
    """
    table = {}
    for kind in dict.fromkeys(types):
        rows = [row for row, its in enumerate(types) if its == kind]
        right = predicted[rows] == answers[rows]
        most = answers[rows].unique(return_counts=True)[1].max()
        table[kind] = (float(right.double().mean()), int(most) / len(rows), len(rows))
    return table


def reliability(
    probabilities: Float[Tensor, "n d_vocab"], answers: Int[Tensor, " n"], n_bins: int
) -> tuple[Float[Tensor, " bin"], Float[Tensor, " bin"], Int[Tensor, " bin"]]:
    """Compare how sure a model is with how often it is right: (mean confidence, share right, how many) of each bin.

    An example's answer is its most likely token, its confidence that token's probability. Bins are equally wide: bin b
    holds confidences from b / n_bins up to, but not including, (b + 1) / n_bins; the last one also 1. An empty bin has
    0 in all three.
    Source: Guo et al. 2017, section 2.
    """
    confidence, predicted = probabilities.max(dim=-1)
    right = (predicted == answers).to(confidence)
    bins = (confidence * n_bins).long().clamp(max=n_bins - 1)
    members = nn.functional.one_hot(bins, n_bins).to(confidence)
    counts = members.sum(dim=0)
    share = members / counts.clamp(min=1)
    return confidence @ share, right @ share, counts.long()


def expected_calibration_error(
    probabilities: Float[Tensor, "n d_vocab"], answers: Int[Tensor, " n"], n_bins: int
) -> Float[Tensor, ""]:
    """Return how far confidence and accuracy are apart, on average: the mean over examples of their bin's distance.

    Bins are those of `reliability`, and an empty one has no say. 0 is perfect.
    Source: Guo et al. 2017, section 2.
    """
    confidence, right, counts = reliability(probabilities, answers, n_bins)
    return (confidence - right).abs() @ counts.to(confidence) / len(answers)


def contradiction_rate(first: Int[Tensor, " n"], second: Int[Tensor, " n"], yes: int, no: int) -> Float[Tensor, ""]:
    """Two questions of which exactly one must be answered "yes": how often do their answers contradict each other?

    `first` and `second` are the answers about the same windows. Only rows in which both are `yes` or `no` count; it is
    the share of them in which both are the same. Raises ValueError if there are no such rows.
    """
    both = ((first == yes) | (first == no)) & ((second == yes) | (second == no))
    if not both.any():
        raise ValueError("contradiction_rate: no row in which both questions are answered with yes or no.")
    return (first == second)[both].float().mean()


# ------------------------------------------------------------------------------------------------- what does it use?


def mirror(
    x: Float[Tensor, "batch d"], direction: Float[Tensor, " d"], bias: Float[Tensor, ""]
) -> Float[Tensor, "batch d"]:
    """Carry each vector along a probe's direction to the other side of its boundary, equally far from it.

    The probe's score is `x @ direction + bias`; the mirrored vector has minus that score. Nothing changes at right
    angles to the direction, whatever the direction's length.
    """
    scores = x @ direction + bias
    return x - 2 * scores[:, None] * direction / (direction @ direction)


@torch.no_grad()
def patchscope(
    model: Any,
    source: Int[Tensor, "batch pos"],
    source_at: Int[Tensor, " batch"],
    source_layer: int,
    target: Int[Tensor, "batch target_pos"],
    target_at: Int[Tensor, " batch"],
    target_layer: int,
) -> Float[Tensor, "batch target_pos d_vocab"]:
    """Let a model put one of its own activations into words: logits on `target` with a vector of `source` in it.

    The vector is the stream on `source` at `source_layer` and the position `source_at`. In the run on `target` it
    takes the place of the stream at `target_layer` and `target_at`; nothing else is changed there, and all that comes
    later is computed from it. Layers are numbered as in chapter 07. No hook stays behind.
    Source: Ghandeharioun et al. 2024, section 3.
    """
    rows = torch.arange(len(source), device=source.device)
    name = stream_name(model, source_layer)
    _, cache = run_with_cache(model, source, names=name)

    def put(stream: Tensor, hook: HookPoint) -> Tensor:
        changed = stream.clone()
        changed[rows, target_at] = cache[name][rows, source_at]
        return changed

    return run_with_hooks(model, target, hooks={stream_name(model, target_layer): put})
