"""The model `oracle`, which reads activations of `tales` and answers questions about the story in words."""

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.data import questions
from course_utils.data.questions import Cut, cut_stories
from course_utils.pretrained import load_pretrained
from solutions.ch02_transformer import Transformer
from solutions.ch11_oracles import (
    fit_oracle,
    harvest_windows,
    oracle_examples,
    oracle_from,
    shuffle_alike,
    shuffle_windows,
)
from solutions.recipes.stories import save_atomically

TRAIN_SEED, TEST_SEED = 31_000_000, 32_000_000
LAYER = 2  # of `tales`: the stream after two blocks
CHUNK = 100  # steps for which questions are drawn, and windows shuffled, at once


@dataclass(frozen=True)
class OracleRecipe:
    """What the oracle is made of."""

    seed: int = 0
    steps: int = 2400
    n_stories: int = 9000
    per_story: int = 3
    batch: int = 256
    peak_lr: float = 1.5e-3
    unanswerable: float = 0.07  # share of questions that make no sense for the story
    shuffled: float = 0.07  # share of questions about windows that belong to no text


RECIPE = OracleRecipe()


def rows_of(cuts: list[Cut]) -> tuple[Tensor, Tensor]:
    """The tokens of all stories, padded on the right, and the positions at which they are cut."""
    longest = max(len(cut.tokens) for cut in cuts)
    bos = cuts[0].tokens[0]
    tokens = torch.tensor([[*cut.tokens, *[bos] * (longest - len(cut.tokens))] for cut in cuts])
    return tokens, torch.tensor([cut.end for cut in cuts])


def pool(model: Any, n_stories: int, seed: int, per_story: int) -> tuple[list[Cut], Tensor, Tensor]:
    """Cut stories, their windows as they come (float16), and where they are cut."""
    cuts = cut_stories(model.tokenizer, n_stories, seed, per_story)
    tokens, ends = rows_of(cuts)
    windows = [
        harvest_windows(model, rows, at, LAYER, questions.WIDTH).half()
        for rows, at in zip(tokens.split(2048), ends.split(2048), strict=True)
    ]
    return cuts, torch.cat(windows), ends


def examples_of_chunk(
    cuts: list[Cut], windows: Tensor, ends: Tensor, recipe: OracleRecipe, chunk: int
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Windows, real and shuffled in two ways, and examples for `CHUNK` steps of training."""
    rng = random.Random(f"{recipe.seed} {chunk}")
    generator = torch.Generator().manual_seed(1000 * recipe.seed + chunk)
    types = [kind for kind in questions.TYPES if kind not in questions.HELD_OUT_TYPES]
    wordings = {kind: questions.trained_wordings(kind) for kind in types}
    mixed = rng.sample(range(len(cuts)), min(4096, len(cuts)))
    shuffled = [shuffle_windows(windows[mixed], generator), shuffle_alike(windows[mixed], ends[mixed], generator)]
    nonsense = [questions.asked_when_shuffled(rng, TOKENIZER, types) for _ in range(2 * len(mixed))]
    n = CHUNK * recipe.batch
    n_unanswerable, n_shuffled = int(n * recipe.unanswerable), int(n * recipe.shuffled)
    parts = [
        oracle_examples([cut.known for cut in cuts], wordings, n - n_unanswerable - n_shuffled, rng),
        oracle_examples([cut.unknown for cut in cuts], wordings, n_unanswerable, rng),
        oracle_examples(nonsense, wordings, n_shuffled, rng),
    ]
    parts[2] = (parts[2][0] + len(windows), *parts[2][1:])
    order = torch.randperm(n, generator=generator)
    which, rows, answers = (torch.cat(part)[order] for part in zip(*parts, strict=True))
    return torch.cat([windows, *shuffled]), (which, rows, answers)


TOKENIZER: Any = None


def train(recipe: OracleRecipe, out: Path) -> None:
    global TOKENIZER
    began = time.process_time()
    tales = load_pretrained(Transformer, "tales")
    TOKENIZER = tales.tokenizer
    cuts, windows, ends = pool(tales, recipe.n_stories, TRAIN_SEED, recipe.per_story)
    mean = windows.float().mean(dim=(0, 1))
    scale = windows.float().std(dim=(0, 1))
    windows = ((windows - mean) / scale).half()
    print("pool", len(cuts), round(time.process_time() - began), flush=True)
    oracle = oracle_from(tales, Transformer, torch.Generator().manual_seed(recipe.seed))
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=recipe.peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    oracle.train()
    for chunk in range(recipe.steps // CHUNK):
        everything, examples = examples_of_chunk(cuts, windows, ends, recipe, chunk)
        losses += fit_oracle(
            oracle, everything, examples, recipe.batch, recipe.peak_lr, (chunk * CHUNK, recipe.steps), optimizer
        )
        print(len(losses), "loss", round(sum(losses[-50:]) / 50, 4), "cpu", round(time.process_time() - began), flush=True)
        out.mkdir(parents=True, exist_ok=True)
        state = {"model": oracle.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
        save_atomically(out / "checkpoint.pt", {**state, "mean": mean, "scale": scale, "seconds": time.process_time() - began})


if __name__ == "__main__":
    train(RECIPE, Path("runs/oracle"))
