"""Trainings to compare `modular-addition` with: other seeds, more pairs, and no weight decay.

They ship as losses, in `others.json` beside the model; nobody needs their weights.

    python -m solutions.recipes.modular_others           trains them one after another and says when each groks
    python -m solutions.recipes.modular_others --ship    and writes the file
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from course_utils.pretrained import MODELS
from solutions.ch13_grokking import fit_modular
from solutions.recipes.modular_addition import GROKKED, RECIPE, short

KEPT = ("step", "train", "held_out")


@dataclass(frozen=True)
class Other:
    """What a training does otherwise than the recipe, if anything."""

    seed: int = RECIPE.seed
    share: float = RECIPE.share
    weight_decay: float = 1.0
    steps: int = 5000


OTHERS = {
    "another seed": Other(seed=1),
    "a third seed": Other(seed=2),
    "70% of the pairs": Other(share=0.7, steps=2000),
    "no weight decay": Other(weight_decay=0.0, steps=3000),
}


def losses(other: Other, steps: int | None = None) -> dict[str, list[float]]:
    """Both losses every 100 steps."""
    data = RECIPE.data(other.seed, other.share)
    steps = other.steps if steps is None else steps
    history = fit_modular(RECIPE.fresh(other.seed), *data, steps=steps, weight_decay=other.weight_decay)
    return {key: [short(entry[key]) for entry in history] for key in KEPT}


def said(name: str, found: Mapping[str, list[float]]) -> str:
    """When a training grokked, in one line."""
    below = [step for step, loss in zip(found["step"], found["held_out"], strict=True) if loss < GROKKED]
    when = f"grokked at step {below[0]:.0f}" if below else f"not below {GROKKED} nats by step {found['step'][-1]:.0f}"
    return f"{name}: {when}; held-out loss at the end {found['held_out'][-1]}"


def run(argv: list[str] | None = None, folder: Path = MODELS / RECIPE.name) -> None:
    """Train all of them and say how it went; write the losses if they are to ship."""
    parser = argparse.ArgumentParser(description="Train what modular-addition is compared with.")
    parser.add_argument("--steps", type=int, help="for each of them: a short try")
    parser.add_argument("--ship", action="store_true", help="replace the losses that ship with the course by these")
    options = parser.parse_args(argv)
    found = {}
    for name, other in OTHERS.items():
        found[name] = losses(other, options.steps)
        print(said(name, found[name]), flush=True)
    if options.ship:
        path = folder / "others.json"
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")
        print("written to", path)


if __name__ == "__main__":
    run()
