"""The model `modular-addition`, which first memorises sums and then groks them, and what its recipe shares with
`modular-multiplication`."""

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from course_utils.config import TransformerConfig
from course_utils.pretrained import rounded_to, save_shipped
from solutions.ch02_transformer import Transformer, init_weights
from solutions.ch13_grokking import (
    answer_loss,
    excluded_loss,
    fit_modular,
    frequency_norms,
    gini,
    key_frequencies,
    logit_fit,
    modular_addition_dataset,
    primitive_powers,
    restricted_loss,
    tabulated_logits,
)

P = 59
CFG = TransformerConfig(
    d_vocab=P + 1, n_ctx=3, n_layers=1, n_heads=4, d_model=128, d_head=32, d_mlp=512, act="relu", normalization="none"
)  # fmt: skip
N_KEYS = 5  # frequencies that the card counts
GROKKED = 0.01  # nats on held-out pairs
SNAPSHOTS = (400, 1000, 1600, 2200, 3000)
PROSE = """
One layer of four heads and 512 ReLU neurons, without normalisation, reads two numbers and "=", and gives the
{operation} modulo 59 at "=". It was trained on a part of all pairs, all of them in every step, with weight decay. It
first memorises them, and much later gets the others right.

- `grokked_at_step`: the first step, of those recorded, at which the loss on the held-out pairs was below 0.01.
- `held_out_right`: the share of right answers on the held-out pairs, by the weights as they ship.
- `held_out_loss`, `train_loss`: mean cross-entropy in nats, computed in float64.
- `key_frequencies`: the five largest frequencies of the embeddings, largest first{order}.
- `logit_share`: the share of the logits' variance that cos(w(a + b - c)) at these five frequencies explains.
- `history.json`: every 100 steps the losses, the measures of progress of chapter 13, and the sum of all squared
  weights.
"""


@dataclass(frozen=True)
class GrokkingRecipe:
    """What one of the two models is made of."""

    name: str
    operation: str  # "sum" or "product"
    about: str
    seed: int = 0  # of the initial weights, and of the pairs for training
    share: float = 0.4
    steps: int = 7000
    snapshots: tuple[int, ...] = ()

    @property
    def elements(self) -> Tensor:
        """The numbers in the order in which the operation adds their places."""
        return torch.arange(P) if self.operation == "sum" else primitive_powers(P)

    def data(self, seed: int, share: float, together: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, answers, and which pairs are for training. A product has no zero among its factors."""
        generator = torch.Generator().manual_seed(seed)
        if self.operation == "sum":
            return modular_addition_dataset(P, share, generator, together)
        pairs, _, is_train = modular_addition_dataset(P - 1, share, generator, together)
        tokens = pairs + 1
        return tokens, tokens[:, 0] * tokens[:, 1] % P, is_train

    def fresh(self, seed: int) -> Transformer:
        """The model before its first step."""
        model = Transformer(CFG)
        init_weights(model, CFG.d_model**-0.5, torch.Generator().manual_seed(seed))
        return model


@torch.no_grad()
def logit_grid(model: Any, elements: Tensor) -> Tensor:
    """The logits of all elements to all pairs of elements, [a b answer], in the order given."""
    n = len(elements)
    tokens = torch.cartesian_prod(elements, elements)
    tokens = torch.cat([tokens, torch.full((n * n, 1), P)], dim=1)
    return tabulated_logits(model, tokens)[:, elements].reshape(n, n, n)


@torch.no_grad()
def measures(recipe: GrokkingRecipe, model: Any, keys: list[int], is_train: Tensor) -> dict[str, float]:
    """How far the algorithm is: the measures of progress of chapter 13. `is_train` is a grid in the elements' order."""
    logits, n = logit_grid(model, recipe.elements), len(recipe.elements)
    answers = (torch.arange(n)[:, None] + torch.arange(n)) % n
    return {
        "restricted": float(restricted_loss(logits, keys, answers)),
        "excluded": float(excluded_loss(logits, keys, answers, is_train)),
        "gini": float(gini(frequency_norms(model.embed.W_E[recipe.elements])[1:])),
        "squares": float(sum(weight.square().sum() for weight in model.parameters())),
    }


def in_order(recipe: GrokkingRecipe, tokens: Tensor, flags: Tensor) -> Tensor:
    """A flag for each pair as a grid over the elements, in their order."""
    grid = torch.zeros(P, P, dtype=torch.bool)
    grid[tokens[:, 0], tokens[:, 1]] = flags
    return grid[recipe.elements][:, recipe.elements]


def train(
    recipe: GrokkingRecipe, seed: int, steps: int
) -> tuple[Transformer, dict[str, object], list[dict[str, Any]], dict[int, dict[str, Tensor]]]:
    """A trained model with its weights rounded as they ship, the front matter of its card, its history, snapshots."""
    start = time.process_time()
    tokens, answers, is_train = recipe.data(seed, recipe.share)
    model, states = recipe.fresh(seed), {}

    def watch(step: int) -> dict[str, float]:
        states[step] = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        return {}

    history = fit_modular(model, tokens, answers, is_train, steps, watch=watch)
    seconds = time.process_time() - start
    rounded_to(model.eval())
    keys = key_frequencies(model.embed.W_E[recipe.elements], N_KEYS).tolist()
    grid, seen = in_order(recipe, tokens, is_train), Transformer(CFG)
    for entry in history:
        seen.load_state_dict(states[int(entry["step"])])
        entry |= measures(recipe, seen, keys, grid)
    with torch.no_grad():
        logits = tabulated_logits(model, tokens)
    right = (logits.argmax(dim=-1) == answers)[~is_train].double().mean()
    front = {
        "about": recipe.about,
        "data": f"all pairs whose {recipe.operation} modulo {P} is asked for, {recipe.share:.0%} of them for training",
        "recipe": f"python -m solutions.recipes.{recipe.name.replace('-', '_')}",
        "seed": seed,
        "init_std": round(CFG.d_model**-0.5, 4),
        "steps": steps,
        "cpu_seconds": round(seconds),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "grokked_at_step": next((entry["step"] for entry in history if entry["held_out"] < GROKKED), "never"),
        "held_out_right": round(float(right), 4),
        "held_out_loss": f"{float(answer_loss(logits[~is_train], answers[~is_train])):.2e}",
        "train_loss": f"{float(answer_loss(logits[is_train], answers[is_train])):.2e}",
        "key_frequencies": " ".join(map(str, keys)),
        "logit_share": round(float(logit_fit(logit_grid(model, recipe.elements), keys)[1].sum()), 3),
        "licence": "MIT",
    }
    return model, front, history, {step: states[step] for step in recipe.snapshots if step in states}


def short(value: int | float) -> float:
    """Four digits are enough for a figure."""
    return float(f"{value:.4g}")


def run(recipe: GrokkingRecipe, argv: list[str] | None = None) -> None:
    """Train the model, say what it can do, and keep its weights."""
    parser = argparse.ArgumentParser(description=f"Train {recipe.name}.")
    parser.add_argument("--seed", type=int, default=recipe.seed, help="of the initial weights and of the split")
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--out", type=Path, default=Path("runs") / recipe.name, help="where the weights are kept")
    parser.add_argument("--ship", action="store_true", help="replace the model that ships with the course by this one")
    options = parser.parse_args(argv)
    model, front, history, snapshots = train(recipe, options.seed, options.steps)
    for key, value in front.items():
        print(f"{key}: {value}")
    options.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), options.out / "model.safetensors")
    if options.ship:
        print("written to", ship(recipe, model, front, history, snapshots))


def ship(
    recipe: GrokkingRecipe,
    model: Transformer,
    front: Mapping[str, object],
    history: list[dict[str, Any]],
    snapshots: Mapping[int, Mapping[str, Tensor]],
) -> Path:
    """Write the model that ships."""
    order = "" if recipe.operation == "sum" else ", over the numbers in the order of the powers of 2"
    prose = f"# {recipe.name}\n" + PROSE.format(operation=recipe.operation, order=order)
    rows = [{key: short(value) for key, value in entry.items()} for entry in history]
    return save_shipped(model, None, recipe.name, front, prose, rows, snapshots)


RECIPE = GrokkingRecipe(
    name="modular-addition",
    operation="sum",
    about="one layer that groks addition modulo 59, with snapshots of how it does",
    snapshots=SNAPSHOTS,
)


if __name__ == "__main__":
    run(RECIPE)
