"""Chapter 03: a training loop written line by line, a circuit read in full, and what training costs."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

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
    written into in place: during the block and after it the model holds the same Parameter, in the same memory, so
    that an optimizer or a view which also holds it is not left behind. When the block ends its weights are what they
    were, bit for bit, also when the block raises an exception, which is passed on. The `with` statement hands over the
    model. Raises ValueError for a name that no parameter has; its message holds the nearest ones.
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

# ------------------------------------------------------------------------------------------------------ what it costs

# ---------------------------------------------------------------------------------------------- more than one machine
