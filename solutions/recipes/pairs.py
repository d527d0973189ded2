"""The model `pairs`: `tales`, trained on with lists of word pairs until it learns from the context which task is meant.

It starts from the weights of `tales`, has a tokenizer of its own in which every word of the pairs is one token, and
still sees stories in a part of its documents. A run that was killed goes on from its last checkpoint.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.config import TransformerConfig
from course_utils.data import pairs, tales
from course_utils.pretrained import load_pretrained, rounded_to, save_shipped, shipped_tokenizer
from solutions.ch02_transformer import Transformer, init_weights
from solutions.ch03_training import cosine_schedule
from solutions.ch08_function_vectors import (
    ICLDataset,
    add_vector,
    causal_head_scores,
    function_vector,
    is_right,
    mean_head_outputs,
    random_head_vector,
)
from solutions.recipes.evaluation import behaviour, grammar_nats_per_story, nats_per_story
from solutions.recipes.stories import HELD_OUT_SEED, N_HELD_OUT, optimizer_for, save_atomically, training_loss
from solutions.recipes.tokenizer import tokenizer_for

VOCABULARY = 1856  # each of the 285 words is one token; with 1808, WIDE was not
N_HEADS, LAYER = 4, 1  # of the function vectors on the card: how many heads, after which block they are added
ABOUT = "tales, trained on until it learns tasks on word pairs in context; of the size of tales"
PROSE = """
# pairs

`tales` with a larger vocabulary, trained on with documents of `course_utils.data.pairs`: seven tasks on word pairs,
in which every word stands in several tasks, so the context must say which task is meant. 15 % of its documents are
still stories. The pairs come in three kinds: `listed` ones occur everywhere; `held_out` ones never in a list without a
title, in which they are asked for here; `told` ones in sentences only.

- `five_shots_KIND`: the share of right first choices after five listed examples, on average over the tasks, 200 prompts
  each; `five_shots_held_out_by_task` has every task's own.
- `no_shots_KIND`: the same where only the asked word is there, each once: the model must guess which task is meant.
- `vector_KIND`: no shots, and the task's function vector added once after block 1, at the last position: the sum of the
  mean outputs of four heads. `random_KIND` is its control: other heads, as many, with the same norm, over three draws.
- `vector_over_random_held_out_by_task`: the difference of the two for every task.
- `history.json`: the loss, and the accuracy after five shots of the three kinds, on the way.
"""


@dataclass(frozen=True)
class PairsRecipe:
    """Everything that decides the weights, besides the data and the code."""

    steps: int = 1400
    batch: int = 16
    n_ctx: int = 96
    story_share: float = 0.15  # of the documents
    peak_lr: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.01
    init_std: float = 0.05  # of what `tales` has no weights for: new tokens
    clip: float = 1.0
    seed: int = 0


RECIPE = PairsRecipe()


def documents(seed: int, story_share: float) -> Any:
    """Pairs and stories, mixed, without end."""
    rng, stories, lists = random.Random(seed), tales.stream(seed), pairs.stream(seed)
    while True:
        yield next(stories).text if rng.random() < story_share else next(lists)


def training_batch(tokenizer: Any, recipe: PairsRecipe, step: int) -> Tensor:
    """Rows of n_ctx + 1 tokens: documents one after another, each begun by the end-of-text token, the last one cut."""
    source = documents(recipe.seed * 100_000_000 + step, recipe.story_share)
    rows = []
    for _ in range(recipe.batch):
        row: list[int] = []
        while len(row) <= recipe.n_ctx:
            row += [tokenizer.bos_token_id, *tokenizer.encode(next(source))]
        rows.append(row[: recipe.n_ctx + 1])
    return torch.tensor(rows)


def from_tales(tokenizer: Any, recipe: PairsRecipe) -> Transformer:
    """A model with the weights of `tales`; a token that `tales` lacks gets random ones."""
    source, known = load_pretrained(Transformer, "tales"), shipped_tokenizer("tales").get_vocab()
    cfg = TransformerConfig(**{**vars(source.cfg), "d_vocab": VOCABULARY})
    model = Transformer(cfg)
    init_weights(model, recipe.init_std, torch.Generator().manual_seed(recipe.seed))
    both = [(number, known[token]) for token, number in tokenizer.get_vocab().items() if token in known]
    ours, theirs = (torch.tensor(column) for column in zip(*both, strict=True))
    weights, old = model.state_dict(), source.state_dict()
    for name, weight in weights.items():
        if name == "embed.W_E":
            weight[ours] = old[name][theirs]
        elif name in ("unembed.W_U", "unembed.b_U"):
            weight[..., ours] = old[name][..., theirs]
        else:
            weight.copy_(old[name])
    model.load_state_dict(weights)
    return model


def prompts(tokenizer: Any, task: str, kind: str, n_shots: int, n: int, seed: int) -> ICLDataset:
    """Prompts that show listed pairs and ask for one of a kind."""
    return ICLDataset(
        pairs.pairs_of(task, ("listed",)), n_shots, n, tokenizer, seed, asked=pairs.pairs_of(task, (kind,))
    )


def accuracy(model: nn.Module, tokenizer: Any, kind: str, n_shots: int, n: int | None = None) -> dict[str, float]:
    """The share of right first choices for each task, in `n` prompts, or in one for each word."""
    found = {}
    for task in pairs.TASKS:
        asked = prompts(tokenizer, task, kind, n_shots, n or len(pairs.words(task, (kind,))), HELD_OUT_SEED)
        found[task] = float(is_right(model, asked).float().mean())
    return found


def mean(values: dict[str, float]) -> float:
    return round(sum(values.values()) / len(values), 4)


def train(
    recipe: PairsRecipe, tokenizer: Any, out: Path, device: str, log_every: int = 200
) -> tuple[Transformer, list[dict], float]:
    """Train, or go on with training: the model, its history and the CPU seconds it took."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    model = from_tales(tokenizer, recipe).to(device)
    optimizer = optimizer_for(model, recipe)
    history: list[dict] = []
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state["recipe"] != repr(recipe):
            raise SystemExit(f"{checkpoint} belongs to another recipe; choose another --out or delete it.")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, first, seconds = state["history"], state["step"], state["seconds"]
    began, recent = time.process_time() - seconds, []
    for step in range(first, recipe.steps):
        rate = cosine_schedule(step, recipe.warmup, recipe.steps, recipe.peak_lr, recipe.peak_lr / 50)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = training_loss(model, training_batch(tokenizer, recipe, step).to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % log_every == 0 or step + 1 == recipe.steps:
            entry: dict[str, float] = {"step": step + 1, "train_loss": round(sum(recent) / len(recent), 4)}
            entry |= {f"five_shots_{kind}": mean(accuracy(model.cpu(), tokenizer, kind, 5, 40)) for kind in pairs.KINDS}
            model.to(device)
            recent = []
            history.append(entry)
            print(json.dumps(entry), flush=True)
            seconds = time.process_time() - began
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
            save_atomically(checkpoint, {**state, "step": step + 1, "seconds": seconds, "recipe": repr(recipe)})
    return model.cpu().eval(), history, seconds


def vectors(model: nn.Module, tokenizer: Any) -> dict[str, dict[str, float]]:
    """For both kinds of vector and each kind of pair, the share of right first choices without shots, by task."""
    tasks = list(pairs.TASKS)
    outputs = {
        task: mean_head_outputs(model, prompts(tokenizer, task, "listed", 5, 60, HELD_OUT_SEED + 1).tokens)
        for task in tasks
    }
    scores = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for task, other in zip(tasks, tasks[1:] + tasks[:1], strict=True):
        clean = prompts(tokenizer, task, "listed", 5, 24, HELD_OUT_SEED + 2)
        corrupted = clean.with_examples_of(pairs.pairs_of(other, ("listed",)), HELD_OUT_SEED + 3)
        scores += causal_head_scores(model, clean, corrupted) / len(tasks)
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    found: dict[str, dict[str, float]] = {}
    for kind in ("listed", "held_out"):
        for name, draws in (("vector", 1), ("random", 3)):
            found[f"{name}_{kind}"] = {}
            for task in tasks:
                asked = prompts(tokenizer, task, kind, 0, len(pairs.words(task, (kind,))), HELD_OUT_SEED)
                right = 0.0
                for _ in range(draws):
                    vector = (
                        function_vector(outputs[task], scores, N_HEADS)
                        if name == "vector"
                        else random_head_vector(outputs[task], scores, N_HEADS, generator)
                    )
                    with add_vector(model, LAYER, vector):
                        right += float(is_right(model, asked).float().mean()) / draws
                found[f"{name}_{kind}"][task] = right
    found["scores"] = {
        f"{head // 8}.{head % 8}": float(scores.flatten()[head]) for head in scores.flatten().topk(6).indices
    }
    return found


def by_task(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def card(model: Transformer, tokenizer: Any, recipe: PairsRecipe, seconds: float) -> dict[str, object]:
    """The front matter: how the model was made, and what it can do with prompts that training never showed."""
    five = {kind: accuracy(model, tokenizer, kind, 5, 200) for kind in pairs.KINDS}
    found = vectors(model, tokenizer)
    gain = {task: found["vector_held_out"][task] - found["random_held_out"][task] for task in pairs.TASKS}
    stories = behaviour(model, tokenizer, HELD_OUT_SEED, n=200)
    return {
        "about": ABOUT,
        "data": "seeded documents of course_utils.data.pairs, and stories of course_utils.data.tales",
        "recipe": "python -m solutions.recipes.pairs",
        "starts_from": "tales",
        "seed": recipe.seed,
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.batch * recipe.n_ctx,
        "cpu_seconds": round(seconds),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{f"five_shots_{kind}": mean(values) for kind, values in five.items()},
        "five_shots_held_out_by_task": by_task(five["held_out"]),
        **{f"no_shots_{kind}": mean(accuracy(model, tokenizer, kind, 0)) for kind in ("listed", "held_out")},
        **{key: mean(values) for key, values in found.items() if key != "scores"},
        "vector_over_random_held_out_by_task": by_task(gain),
        "head_effects": by_task(found["scores"]),
        **{key: round(value, 4) for key, value in stories.items() if key.endswith("_right")},
        "held_out_nats_per_story": round(nats_per_story(model, tokenizer, HELD_OUT_SEED, N_HELD_OUT), 3),
        "grammar_nats_on_the_same_stories": round(grammar_nats_per_story(HELD_OUT_SEED, N_HELD_OUT), 3),
        "licence": "MIT",
    }


def main() -> None:
    """Train the model, say what it can do, and keep its weights."""
    parser = argparse.ArgumentParser(description="Train pairs; a run that was stopped goes on where it was.")
    parser.add_argument("--out", type=Path, default=Path("runs") / "pairs", help="where the checkpoint is kept")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=RECIPE.seed)
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="fewer make a worse model sooner")
    parser.add_argument("--ship", action="store_true", help="replace the model that ships with the course by this one")
    options = parser.parse_args()
    recipe = PairsRecipe(seed=options.seed, steps=options.steps)
    tokenizer = tokenizer_for(islice(documents(0, 0.4), 20_000), VOCABULARY)
    model, history, seconds = train(recipe, tokenizer, options.out, options.device)
    rounded_to(model)  # as it ships
    front = card(model, tokenizer, recipe, seconds)
    for key, value in front.items():
        print(f"{key}: {value}")
    if options.ship:
        print("written to", save_shipped(model, tokenizer, "pairs", front, PROSE, history))


if __name__ == "__main__":
    main()
