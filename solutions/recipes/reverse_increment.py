"""The model `reverse-increment`: four dimensions and one head solve a task completely, and can be read in full.

Besides the model that ships, the recipe trains four seeds of each of several set-ups and records which of them got
stuck.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from course_utils.config import TransformerConfig
from course_utils.hooks import run_with_cache
from course_utils.pretrained import save_shipped
from solutions.ch02_transformer import Transformer, init_weights
from solutions.ch03_training import fit, reverse_increment_dataset, zero_ablated

N_TRAIN = 60_000
STEPS = 1500
SEED = 3  # of the model that ships: every seed solves the task, and this one's attention is the easiest to read
SEEDS = range(4)  # of the survey
ANSWERS = torch.arange(17) >= 9  # the positions of the eight answer digits
ABOUT = "four dimensions, one head: reverses eight digits and increments each, and can be read in full"
PROSE = """
# reverse-increment

One layer of one head and an MLP of 16 neurons on a residual stream of four dimensions, without normalisation. A
sequence is BOS, eight digits from 0 to 3, and the same digits reversed and incremented (3 becomes 0); the loss counts
the answer only. There are 65,536 sequences: 60,000 were for training, and `held_out` is measured on the others.

- `anti_diagonal`: for how many of the eight outputs the largest mean attention weight is on the digit that the output
  is made of.
- `without_W_out`, `without_W_O`: the share of all answer digits that is right when that matrix is zero, on all 65,536
  sequences. Whoever guesses a digit has 0.25. Without `W_O` each answer depends on its position and on the token that
  stands there, which says something about the first answer only: hence at most (7/4 + 1)/8 = 0.344.
- `history.json`: the loss of this run, and for four seeds of each of several set-ups what was learned and what was not.
"""


@dataclass(frozen=True)
class Setup:
    """What is varied: how large the weights begin, and whether there is LayerNorm."""

    init_std: float = 0.3
    normalization: Any = "none"

    @property
    def cfg(self) -> TransformerConfig:
        return TransformerConfig(
            d_vocab=5,
            n_ctx=17,
            n_layers=1,
            n_heads=1,
            d_model=4,
            d_head=4,
            d_mlp=16,
            normalization=self.normalization,
        )


SETUPS = {
    "as shipped": Setup(),
    "smaller initial weights": Setup(init_std=0.05),
    "larger initial weights": Setup(init_std=1.0),
    "with LayerNorm": Setup(normalization="LN"),
}


def split(seed: int) -> tuple[Tensor, Tensor]:
    """The sequences for training, and those held out: the seed deals them out."""
    order = torch.randperm(65_536, generator=torch.Generator().manual_seed(seed))
    sequences = reverse_increment_dataset()[order]
    return sequences[:N_TRAIN], sequences[N_TRAIN:]


def fresh(setup: Setup, seed: int) -> Transformer:
    model = Transformer(setup.cfg)
    init_weights(model, setup.init_std, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def right(model: nn.Module, sequences: Tensor) -> Tensor:
    """Whether each answer digit is the model's first choice: [batch output]."""
    return model(sequences)[:, 8:-1].argmax(dim=-1) == sequences[:, 9:]


@torch.no_grad()
def mean_pattern(model: nn.Module, sequences: Tensor) -> Tensor:
    """What the head looks at from the positions at which the answers are predicted, on average: [output key]."""
    _, cache = run_with_cache(model, sequences, names="*hook_pattern")
    return cache["pattern", 0][:, 0, 8:16].mean(dim=0)


def anti_diagonal(pattern: Tensor) -> int:
    """For how many outputs the largest weight is on the digit that the output is made of."""
    return int((pattern.argmax(dim=-1) == torch.arange(8, 0, -1)).sum())


def run(name: str, setup: Setup, seed: int, steps: int) -> tuple[Transformer, dict[str, Any]]:
    """Train one model with one seed, and say what became of it."""
    train, held_out = split(seed)
    model = fresh(setup, seed)
    losses = fit(model, train, ANSWERS, steps, seed)
    correct = right(model.eval(), held_out)
    return model, {
        "setup": name,
        "seed": seed,
        "held_out": float(correct.all(dim=1).float().mean()),
        "by_output": [round(share, 4) for share in correct.float().mean(dim=0).tolist()],
        "anti_diagonal": anti_diagonal(mean_pattern(model, held_out)),
        "loss": [round(sum(losses[end - 10 : end]) / 10, 4) for end in range(10, steps + 1, 10)],
    }


def card(model: Transformer, setup: Setup, seed: int, steps: int, seconds: float) -> dict[str, object]:
    """What the model card says: how the model was made, and what it can do with and without its parts."""
    _, held_out = split(seed)
    everything = reverse_increment_dataset()
    without = {}
    for symbol, parameter in (("W_out", "blocks.0.mlp.W_out"), ("W_O", "blocks.0.attn.W_O")):
        with zero_ablated(model, parameter):
            without[f"without_{symbol}"] = round(float(right(model, everything).float().mean()), 4)
    return {
        "about": ABOUT,
        "data": "all 65,536 sequences of solutions.ch03_training.reverse_increment_dataset, 60,000 for training",
        "recipe": "python -m solutions.recipes.reverse_increment",
        "seed": seed,
        "init_std": setup.init_std,
        "steps": steps,
        "tokens": steps * 128 * 17,
        "cpu_seconds": round(seconds),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out": float(right(model, held_out).all(dim=1).float().mean()),
        "anti_diagonal": f"{anti_diagonal(mean_pattern(model, held_out))} of 8",
        **without,
        "licence": "MIT",
    }


def main(argv: list[str] | None = None) -> None:
    """Train the model, say what it can do, and keep its weights; `--ship` runs the survey as well."""
    parser = argparse.ArgumentParser(description="Train reverse-increment.")
    parser.add_argument("--seed", type=int, default=SEED, help="of the split, the initial weights and the batches")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("runs/reverse-increment"), help="where the weights are kept")
    parser.add_argument("--ship", action="store_true", help="replace the model that ships with the course by this one")
    options = parser.parse_args(argv)
    setup = SETUPS["as shipped"]
    start = time.process_time()
    model, shipped = run("as shipped", setup, options.seed, options.steps)
    front = card(model, setup, options.seed, options.steps, time.process_time() - start)
    for key, value in front.items():
        print(f"{key}: {value}")
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), options.out / "model.safetensors")
    if options.ship:
        runs = [run(name, each, seed, options.steps)[1] for name, each in SETUPS.items() for seed in SEEDS]
        history = {"run": shipped, "survey": runs}
        # in full: a lesson reads its 341 numbers one by one, and rounding moves the figures of its card
        folder = save_shipped(model, None, "reverse-increment", front, PROSE, history, precision=torch.float32)
        print("written to", folder)


if __name__ == "__main__":
    main()
