"""What test_recipes.py starts under torchrun: a tiny recipe, stopped half-way and resumed; `... FOLDER`.

Process 0 leaves in the folder the gradients of one batch, the run's history, and who wrote which file.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from course_utils.config import TransformerConfig
from solutions.ch02_transformer import Transformer, init_weights
from solutions.recipes import processes, stories
from solutions.recipes.evaluation import behaviour, nats_per_story
from solutions.recipes.tokenizer import train_tokenizer


def few(measure, model, tokenizer, seed: int, n: int):
    return measure(model, tokenizer, seed, n=4)


class Stopped(Exception):
    """What a kill looks like from inside."""


def tiny_recipe(d_vocab: int) -> stories.Recipe:
    cfg = TransformerConfig(d_vocab, n_ctx=160, n_layers=1, n_heads=2, d_model=8, d_head=4, d_mlp=16)
    return stories.Recipe("tiny", cfg, steps=6, batch=4, warmup=2, repeated_share=0.5, snapshots=(0, 3))


def gradients(recipe: stories.Recipe, tokenizer) -> list[torch.Tensor]:
    """Those of one batch, averaged over the processes that there are."""
    model = Transformer(recipe.cfg)
    init_weights(model, 0.3, torch.Generator().manual_seed(5))
    batch = processes.share(stories.training_batch(tokenizer, recipe, step=7))
    averaging = processes.averaging(model)  # it must live until backward, which it watches
    stories.training_loss(averaging, batch).backward()
    return [parameter.grad for parameter in model.parameters()]


def stopped_and_resumed(recipe: stories.Recipe, tokenizer, out: Path):
    batch = stories.training_batch

    def stopped_at_step_5(tokenizer, recipe, step):
        if step == 5:
            raise Stopped
        return batch(tokenizer, recipe, step)

    stories.training_batch = stopped_at_step_5
    try:
        stories.train(recipe, tokenizer, out, log_every=2)
    except Stopped:
        stories.training_batch = batch
    return stories.train(recipe, tokenizer, out, log_every=2)


def main(folder: Path) -> None:
    stories.nats_per_story, stories.behaviour = partial(few, nats_per_story), partial(few, behaviour)
    tokenizer = train_tokenizer(vocabulary=400, n_stories=500)
    recipe = tiny_recipe(len(tokenizer))
    with processes.joined("cpu"):
        averaged = gradients(recipe, tokenizer)
        # each process is given a folder of its own, to see who writes
        out = folder / f"process_{processes.rank()}"
        model, history, _ = stopped_and_resumed(recipe, tokenizer, out)
        whole, _, _ = stories.train(
            replace(recipe, snapshots=()), tokenizer, folder / f"whole_{processes.rank()}", log_every=2
        )
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        uninterrupted = torch.cat([parameter.detach().flatten() for parameter in whole.parameters()])
        everybody_s = [torch.empty_like(weights) for _ in range(processes.count())]
        if processes.count() > 1:
            torch.distributed.all_gather(everybody_s, weights)
        if processes.rank() == 0:
            torch.save(
                {"gradients": averaged, "weights": everybody_s, "uninterrupted": uninterrupted}, folder / "result.pt"
            )
            (folder / "history.json").write_text(json.dumps(history))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
