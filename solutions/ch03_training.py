"""Chapter 03: a training loop written line by line, a circuit read in full, and what training costs."""

import math
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from course_utils.config import TransformerConfig

# ------------------------------------------------------------------------------------------- a first complete circuit


def reverse_increment_dataset() -> Int[Tensor, "batch pos"]:
    """Write down every sequence of the task: shape [65536, 17], dtype int64.

    A row is BOS, which is token 4; then eight digits from 0 to 3; then the answer: the eight digits in reverse order,
    each incremented by one, and 3 becomes 0. So the row of the digits 0 0 0 0 0 1 2 3 ends in 0 3 2 1 1 1 1 1. All
    4^8 inputs occur once, in counting order: row 0 has the digits 00000000, row 1 has 00000001, row 4 has 00000010,
    and the last row has 33333333.
    """
    place_values = 4 ** torch.arange(7, -1, -1)
    digits = torch.arange(4**8)[:, None] // place_values % 4
    bos = torch.full((len(digits), 1), 4)
    return torch.cat([bos, digits, (digits.flip(1) + 1) % 4], dim=1)


def masked_lm_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Measure how well the marked tokens were predicted: the mean of -log p over exactly these, in nats.

    The logits at position p predict the token at position p + 1. `mask` marks the *targets*, the tokens that have to be
    predicted and count; every one counts the same, whichever row it is in. Nothing predicts the token at position 0,
    so it does not count even where it is marked. Raises ValueError where no target is marked.
    """
    counts = mask[:, 1:]
    if not counts.any():
        raise ValueError("masked_lm_loss: the mask marks no target; the token at position 0 cannot be predicted.")
    return nn.functional.cross_entropy(logits[:, :-1][counts], tokens[:, 1:][counts])


def fit(
    model: nn.Module, sequences: Int[Tensor, "batch pos"], mask: Bool[Tensor, " pos"], steps: int, seed: int
) -> list[float]:
    """Train a model on random batches of 128 rows, in place, and return the loss of every step."""
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in tqdm(range(steps), mininterval=1):
        batch = sequences[torch.randint(len(sequences), (128,), generator=rng)]
        loss = masked_lm_loss(model(batch), batch, mask.expand_as(batch))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    return losses


@contextmanager
def zero_ablated(model: nn.Module, parameter_name: str) -> Iterator[nn.Module]:
    """Set one parameter to zero while a `with` block runs: `with zero_ablated(model, "blocks.0.attn.W_O"): ...`

    The parameter is the one that `model.named_parameters()` lists under this name, and no other is touched. It is
    changed in place: during the block and after it the model holds the same Parameter, in the same memory, so that an
    optimizer or a view that also holds it sees the change. When the block ends the weights are what they were, bit for
    bit, even if the block raises an exception, which is passed on. `with ... as m` gives the model as m. Raises
    ValueError for a name that no parameter has; the message names the nearest ones.
    """
    parameters = dict(model.named_parameters())
    if parameter_name not in parameters:
        nearest = ", ".join(get_close_matches(parameter_name, parameters, n=3, cutoff=0.0))
        raise ValueError(f"zero_ablated: there is no parameter {parameter_name!r}; the nearest are {nearest}.")
    parameter = parameters[parameter_name]
    kept = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.zero_()
        yield model
    finally:
        with torch.no_grad():
            parameter.copy_(kept)


# ----------------------------------------------------------------------------------------------------------- the loop


def pack_documents(documents: Sequence[Sequence[int]], n_ctx: int, bos: int) -> Int[Tensor, "row n_ctx"]:
    """Cut a stream of documents into rows that are all full: the shape in which language models read their data.

    A document is a list of token ids. Each gets `bos` in front; all follow one another, without padding, and the
    long sequence is cut into rows of `n_ctx` tokens. A document may run on into the next row, and a row may begin in
    the middle of one. The tokens at the end that do not fill a row are dropped; where there is not enough for a single
    row, there are 0 rows. Token ids are of dtype int64. The documents are left as they are.
    Source: Radford et al. 2018, section 4.1, and Brown et al. 2020, appendix B.
    """
    stream = [token for document in documents for token in (bos, *document)]
    n_rows = len(stream) // n_ctx
    return torch.tensor(stream[: n_rows * n_ctx], dtype=torch.long).reshape(n_rows, n_ctx)


def lm_loss(logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """The loss of a language model: the mean of -log p of each next token, in nats.

    The logits at a position predict the token *after* it. So those at the last position have no target, and nothing
    predicts the first token: batch * (pos - 1) predictions remain, which all weigh the same.
    """
    predictions, targets = logits[:, :-1], tokens[:, 1:]
    return nn.functional.cross_entropy(predictions.flatten(0, 1), targets.flatten())


def cosine_schedule(step: int, warmup: int, total: int, peak: float, floor: float) -> float:
    """The learning rate of step number `step`, the first of which is 0: up in a line, down along half a cosine.

    During the first `warmup` steps it rises by equal amounts, from peak / warmup at step 0 to `peak` at step
    warmup - 1. The cosine begins at step `warmup`, still with `peak`, is half-way down in the middle and reaches
    `floor` at step `total`, where it stays. With a warmup of 0 it begins with the cosine.
    Source: Loshchilov and Hutter 2017, section 3; the warm-up from Goyal et al. 2017, section 2.2.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if step >= total:
        return floor
    progress = (step - warmup) / (total - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class AdamW:
    """Adam with decoupled weight decay: each number moves by its mean gradient, measured in its own units.

    `step` updates every parameter that has a gradient g. Those whose `.grad` is None stay as they are, without decay,
    and their step is not counted. With lr, (beta1, beta2), eps and weight_decay of the parameter's group, and with t
    counting the parameter's own steps from 1:

    - decay:   p <- p - lr * weight_decay * p
    - moments: m <- beta1 m + (1 - beta1) g   and   v <- beta2 v + (1 - beta2) g^2
    - update:  p <- p - lr * m_hat / (sqrt(v_hat) + eps),   m_hat = m / (1 - beta1^t),   v_hat = v / (1 - beta2^t)

    `param_groups` holds the groups as dicts that may be written to between steps (`group["lr"] = ...`); `state[p]`
    holds "step", "m" and "v" of each parameter. Parameters and moments are changed in place, gradients are not.
    Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2.
    """

    def __init__(  # given
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        entries: list[Any] = list(params)  # of parameters, or of groups with options of their own
        groups = entries if isinstance(entries[0], dict) else [{"params": entries}]
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.param_groups = [{**options, **group, "params": list(group["params"])} for group in groups]
        self.state: dict[nn.Parameter, dict[str, Any]] = {
            p: {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            for group in self.param_groups
            for p in group["params"]
        }

    def zero_grad(self) -> None:
        """Forget the gradients: set the `.grad` of every parameter in every group to None."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter that has a gradient, once, as the class says."""
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                m, v, t = state["m"], state["v"], state["step"]
                p.mul_(1 - lr * group["weight_decay"])
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                deviation = v.sqrt().div_(math.sqrt(1 - beta2**t)).add_(group["eps"])
                p.addcdiv_(m, deviation, value=-lr / (1 - beta1**t))

    def state_dict(self) -> dict[str, Any]:  # given
        """The moments in the order of the parameters, and the options of each group: what a checkpoint needs."""
        options = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {"state": list(self.state.values()), "param_groups": options}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # given
        """Go on from a `state_dict`, for the same parameters in the same order."""
        for group, options in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(options)
        for own, saved in zip(self.state.values(), state_dict["state"], strict=True):
            own["step"] = saved["step"]
            own["m"].copy_(saved["m"])
            own["v"].copy_(saved["v"])


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer, {"params": [...], "weight_decay": ...}: those that decay, and those that do not.

    The matrices inside the blocks (`W_Q`, `W_K`, `W_V`, `W_O`, `W_in`, `W_out`) decay by `weight_decay`. Biases,
    LayerNorm's `w` and `b` and the tables at both ends (`W_E`, `W_pos`, `W_U`) have a weight decay of 0. Every
    parameter of the model is in one group, once, and each group keeps the order of `model.named_parameters()`.
    Source: Radford et al. 2018, section 4.1 (no decay on biases and gains).
    """
    inside: list[nn.Parameter] = []
    outside: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix_of_a_block = name.startswith("blocks.") and name.split(".")[-1].startswith("W_")
        (inside if is_matrix_of_a_block else outside).append(parameter)
    return [{"params": inside, "weight_decay": weight_decay}, {"params": outside, "weight_decay": 0.0}]


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Shorten the gradient where it is too long, without turning it; return its length before.

    All gradients together count as one long vector, and its norm is the root of the sum of all their squares. If it is
    above `max_norm`, every gradient is multiplied, in place, by the same factor, so that the norm becomes `max_norm`;
    otherwise they stay as they are. Parameters whose `.grad` is None are passed over; with no gradient at all the norm
    is 0. `parameters` may be a generator, such as `model.parameters()`, which can be run through only once.
    Source: Pascanu et al. 2013, section 3.2.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = math.sqrt(sum(grad.square().sum().item() for grad in grads))
    if norm > max_norm:
        for grad in grads:
            grad.mul_(max_norm / norm)
    return norm


def train_step(
    model: nn.Module, optimizer: Any, batch: Int[Tensor, "batch pos"], max_norm: float | None = None
) -> float:
    """Make the model a little better at one batch of tokens; return the loss that it had before, as a plain number.

    The step uses the gradient of `lm_loss` on this batch alone, whatever the parameters' `.grad` held before, clipped
    by `clip_grad_norm` if there is a `max_norm`. The optimizer (torch's or ours) makes one step. The mode of the model,
    training or evaluation, is left as it is.
    """
    optimizer.zero_grad()
    loss = lm_loss(model(batch), batch)
    loss.backward()
    if max_norm is not None:
        clip_grad_norm(model.parameters(), max_norm)
    optimizer.step()
    return loss.item()


def accumulate_gradients(model: nn.Module, batch: Int[Tensor, "batch pos"], n_micro: int) -> float:
    """Add to the parameters' `.grad` the gradient of `lm_loss` on the whole batch, without ever running all of it.

    The rows are cut into at most `n_micro` micro-batches, none of more than ceil(rows / n_micro) rows; the last may be
    smaller than the others. Each goes forward and backward before the next one begins, so that its activations can be
    forgotten. What is in `.grad` in the end is what one backward pass through the mean over the whole batch would have
    added to it. Returns that mean, as a plain number.
    """
    total = 0.0
    for micro in batch.chunk(n_micro):
        loss = lm_loss(model(micro), micro) * (len(micro) / len(batch))
        loss.backward()
        total += loss.item()
    return total


def evaluate(model: nn.Module, batches: Iterable[Int[Tensor, "batch pos"]]) -> float:
    """The mean loss of the model over all predictions in these batches, in nats per token; nothing is learned.

    Batches may differ in rows and in length: every predicted token weighs the same, wherever it stands. The model runs
    in evaluation mode, and afterwards, even after an exception, is in the mode in which it was before. No gradients
    are recorded.
    """
    was_training = model.training
    model.eval()
    total, n_predictions = 0.0, 0
    try:
        with torch.no_grad():
            for tokens in batches:
                n = tokens[:, 1:].numel()
                total += lm_loss(model(tokens), tokens).item() * n
                n_predictions += n
    finally:
        model.train(was_training)
    return total / n_predictions


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write all that training needs to go on, by name, as in `save_checkpoint(path, model=model, step=step)`.

    Whatever has a `state_dict()` (a model, an optimizer) is stored as that, a torch.Generator as its `get_state()`, and
    anything else (numbers, texts, tensors, lists and dicts of these) as it is, with `torch.save`. A file that
    already exists at `path` stays whole until the new one is complete: write to another file in the same folder, and
    move it into place in a single step (`os.replace`). No other file is left behind.
    Raises ValueError, and leaves the file at `path` as it was, where `load_checkpoint` would refuse to read the new
    one: for example with a Path in it, a NumPy number, or an object of your own class.
    """
    plain = {}
    for name, value in state.items():
        if isinstance(value, torch.Generator):
            plain[name] = value.get_state()
        else:
            plain[name] = value.state_dict() if hasattr(value, "state_dict") else value
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(plain, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk, so that a power cut after the exchange finds a whole file too
        torch.load(partial, map_location="cpu", weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError):  # all of which pickle raises for what it cannot store
        partial.unlink()
        kinds = {name: type(plain[name]).__name__ for name in plain}
        problem = f"load_checkpoint would refuse something in {kinds}"
        raise ValueError(f"save_checkpoint: {problem}; store numbers, texts, tensors, lists, dicts.") from None
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return what `save_checkpoint` stored under `path`, by name, with every tensor on the CPU.

    Only plain data is read (`weights_only=True`): an ordinary pickle may run any code, and a checkpoint may come from
    anywhere. Putting the states into objects is up to the caller, as in `model.load_state_dict(loaded["model"])` and
    `generator.set_state(loaded["generator"])`.
    """
    return torch.load(path, map_location="cpu", weights_only=True)


# ------------------------------------------------------------------------------------------------------ what it costs


def flops_per_token(cfg: TransformerConfig, n_ctx: int) -> int:
    """The arithmetic that one token costs in training, in sequences of `n_ctx` tokens.

    A product and the sum it goes into are two operations, so a vector times a matrix [rows columns] costs
    2 rows columns. Count every product with a weight matrix, the unembedding included, and attention's scores (query
    times key) and mixtures (pattern times value), over all `n_ctx` keys: the masked ones are computed too. Backward
    costs twice what forward does, since each product needs the gradients of both its factors. Looking up an embedding,
    adding a bias, LayerNorm, softmax and the non-linearity count as nothing.
    Source: Kaplan et al. 2020, section 2.1; its 6 N is the same count without attention.
    """
    width = cfg.n_heads * cfg.d_head
    per_layer = 4 * cfg.d_model * width + 2 * n_ctx * width
    if not cfg.attn_only:
        per_layer += 2 * cfg.d_model * cfg.d_mlp
    multiply_adds = cfg.n_layers * per_layer + cfg.d_model * cfg.d_vocab
    return 3 * 2 * multiply_adds


def memory_bytes(cfg: TransformerConfig, batch: int, n_ctx: int, dtype: torch.dtype) -> dict[str, int]:
    """What a step of training keeps in memory, in bytes: "weights", "gradients", "optimizer" and "activations".

    Every number has the size of `dtype` (`dtype.itemsize` bytes). Weights are all parameters of chapter 02's
    `Transformer`, `cfg.n_ctx` position embeddings among them. The optimizer is AdamW: two numbers per parameter.
    Activations are what forward must keep for backward, for `batch` rows of `n_ctx` tokens, with PyTorch's own
    LayerNorm, fused attention and GELU. Of each token: the input and the output of every LayerNorm (`ln_final` too;
    without normalisation there is one vector instead of two), q, k, v and z in each layer, the neurons of each
    MLP before and after the non-linearity, and the log-probabilities of the vocabulary. The pattern is not kept:
    fused attention works it out again. A few numbers per token, such as LayerNorm's scale, are left out.
    Source: Korthikanti et al. 2022, section 4.1, for other kernels.
    """
    width = cfg.n_heads * cfg.d_head
    is_normalised = cfg.normalization == "LN"
    norm = 2 * cfg.d_model if is_normalised else 0
    n_parameters = (cfg.d_vocab + cfg.n_ctx) * cfg.d_model + norm + (cfg.d_model + 1) * cfg.d_vocab
    n_parameters += cfg.n_layers * (norm + 4 * cfg.d_model * width + 3 * width + cfg.d_model)
    read = 2 * cfg.d_model if is_normalised else cfg.d_model
    per_layer = read + 4 * width
    if not cfg.attn_only:
        n_parameters += cfg.n_layers * (norm + 2 * cfg.d_model * cfg.d_mlp + cfg.d_mlp + cfg.d_model)
        per_layer += read + 2 * cfg.d_mlp
    per_token = cfg.n_layers * per_layer + read + cfg.d_vocab
    counts = {
        "weights": n_parameters,
        "gradients": n_parameters,
        "optimizer": 2 * n_parameters,
        "activations": batch * n_ctx * per_token,
    }
    return {what: count * dtype.itemsize for what, count in counts.items()}


# ---------------------------------------------------------------------------------------------- more than one machine


def average_gradients(grads_per_rank: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """What every process has after the exchange: the mean, over the processes, of each parameter's gradient.

    `grads_per_rank[r]` holds the gradients by parameter name that rank r worked out from its share of the batch; all
    shares are of one size. The result has the same form, in the same order. Each rank owns its tensors: writing into
    one changes no other rank's, and no input. Raises ValueError if there are no ranks, or if their parameter names
    differ.
    """
    if not grads_per_rank or any(grads.keys() != grads_per_rank[0].keys() for grads in grads_per_rank):
        raise ValueError("average_gradients: it needs at least one rank, and the same parameters in each.")
    means = {name: torch.stack([grads[name] for grads in grads_per_rank]).mean(dim=0) for name in grads_per_rank[0]}
    return [{name: mean.clone() for name, mean in means.items()} for _ in grads_per_rank]
