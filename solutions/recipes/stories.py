"""Train a transformer on tales: what the recipes have in common.

Every batch is drawn from the seed and its own number, so a run that was killed goes on from its last checkpoint as if
nothing had happened, and the same seed on the same kind of machine gives the same weights. Under torchrun several
processes share each batch, see `solutions.recipes.processes`; the gradients are those of one process but for rounding.
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from course_utils.config import TransformerConfig
from course_utils.data import tales
from course_utils.device import device as default_device
from course_utils.pretrained import rounded_to, save_shipped, shipped_tokenizer
from solutions.ch02_transformer import Transformer, init_weights
from solutions.recipes import processes
from solutions.recipes.evaluation import (
    accepted_share,
    behaviour,
    behaviour_by_template,
    copying,
    grammar_nats_per_story,
    logit_differences,
    nats_per_story,
    writing_heads,
)
from solutions.recipes.tokenizer import train_tokenizer

HELD_OUT_SEED = 1_000_003  # of the stories for evaluation; those of training are made of the recipe's seed and the step
N_HELD_OUT = 400


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the data and the code."""

    name: str
    cfg: TransformerConfig
    steps: int
    batch: int = 16
    repeated_share: float = 0.0  # of a batch's rows: random tokens, again and again, instead of stories
    early_repeated: tuple[int, float] = (0, 0.0)  # another share for so many steps at the beginning
    peak_lr: float = 2e-3
    warmup: int = 300
    weight_decay: float = 0.01
    init_std: float = 0.05
    position_scale: float = 1.0  # how many times larger position embeddings begin
    clip: float = 1.0
    seed: int = 0
    snapshots: tuple[int, ...] = ()  # after these steps the weights are kept, to show how the model came about; 0 too


def repeated_rows(recipe: Recipe, step: int) -> Tensor:
    """Rows of n_ctx + 1 tokens: the first of the vocabulary, which is end-of-text, then random ones over and over.

    What is repeated is from 8 to n_ctx / 2 tokens long, another length in each row: no distance gives the answer away.
    """
    cfg, generator = recipe.cfg, torch.Generator().manual_seed(recipe.seed * 100_000_000 + step)
    n_early, early_share = recipe.early_repeated
    share = early_share if step < n_early else recipe.repeated_share
    rows = torch.zeros(round(recipe.batch * share), cfg.n_ctx + 1, dtype=torch.long)
    for row in rows:
        period = int(torch.randint(8, cfg.n_ctx // 2 + 1, (), generator=generator))
        once = torch.randint(1, cfg.d_vocab, (period,), generator=generator)
        row[1:] = once.repeat(cfg.n_ctx // period + 1)[: cfg.n_ctx]
    return rows


def training_batch(tokenizer: Any, recipe: Recipe, step: int) -> Tensor:
    """Rows of n_ctx + 1 tokens: whole stories one after another, each begun by the end-of-text token, the last cut.

    With `recipe.repeated_share` the last rows are those of `repeated_rows`.
    """
    stories = tales.stream(seed=recipe.seed * 100_000_000 + step)
    length = recipe.cfg.n_ctx + 1
    repeated = repeated_rows(recipe, step)
    rows: list[list[int]] = []
    while len(rows) < recipe.batch - len(repeated):
        row: list[int] = []
        while len(row) < length:
            row += [tokenizer.bos_token_id, *tokenizer.encode(next(stories).text)]
        rows.append(row[:length])
    return torch.cat([torch.tensor(rows), repeated])


def learning_rate(recipe: Recipe, step: int) -> float:
    """Rise linearly for `warmup` steps, then fall along half a cosine to a fiftieth of the peak."""
    if step < recipe.warmup:
        return recipe.peak_lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.peak_lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def training_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of each next token, in nats."""
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def optimizer_for(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; only the matrices inside the blocks decay, as embeddings of rare tokens and biases would be forgotten."""
    inside = [p for name, p in model.named_parameters() if name.startswith("blocks") and ".W_" in name]
    outside = [p for name, p in model.named_parameters() if not (name.startswith("blocks") and ".W_" in name)]
    groups = [{"params": inside, "weight_decay": recipe.weight_decay}, {"params": outside, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.98))


def save_atomically(path: Path, state: dict[str, Any]) -> None:
    """Write beside the old checkpoint and swap: a kill in between leaves the old one whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def snapshot_path(out: Path, step: int) -> Path:
    """Where a run keeps the weights that it had after a step."""
    return out / f"snapshot_{step}.pt"


def load_snapshots(recipe: Recipe, out: Path) -> dict[int, dict[str, Tensor]]:
    """The weights that a finished run kept on its way, by step."""
    steps = [step for step in recipe.snapshots if step <= recipe.steps]
    missing = [step for step in steps if not snapshot_path(out, step).exists()]
    if missing:
        raise SystemExit(f"{out} lacks the snapshots of steps {missing}; delete its checkpoint and train again.")
    return {step: torch.load(snapshot_path(out, step), map_location="cpu", weights_only=True) for step in steps}


def train(
    recipe: Recipe, tokenizer: Any, out: Path, device: str = "cpu", log_every: int = 100
) -> tuple[Transformer, list[dict], float]:
    """Train, or go on with training, and return the model, its history (in the first process) and the seconds it took.

    The history holds, every `log_every` steps (and ten times as rarely after forty entries), the tokens seen, the
    training loss (nats per token) and the held-out loss in nats per story, beside the grammar's entropy (no model can
    be better on average) and the grammar's own score on the same held-out stories (which takes the luck of the draw
    out of the comparison).
    """
    is_first = processes.rank() == 0
    if is_first:
        out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    model = Transformer(recipe.cfg)
    init_weights(model, recipe.init_std, torch.Generator().manual_seed(recipe.seed))
    with torch.no_grad():
        model.pos_embed.W_pos.mul_(recipe.position_scale)
    model.to(device)
    optimizer = optimizer_for(model, recipe)
    history: list[dict] = []
    first, seconds = 0, 0.0
    state = None
    if is_first and checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state["recipe"] != repr(recipe):
            raise SystemExit(f"{checkpoint} belongs to another recipe; choose another --out or delete it.")
    state = processes.from_first(state)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, first, seconds = state["history"], state["step"], state["seconds"]
    averaging = processes.averaging(model)
    floor = {
        "grammar_nats_on_the_same_stories": round(grammar_nats_per_story(HELD_OUT_SEED, N_HELD_OUT), 3),
        "grammar_entropy_per_story": round(tales.GRAMMAR.entropy(), 3),
    }
    if is_first and first == 0 and 0 in recipe.snapshots:
        save_atomically(snapshot_path(out, 0), model.state_dict())
    began = time.perf_counter() - seconds
    recent: list[float] = []
    bar = tqdm(
        range(first, recipe.steps),
        initial=first,
        total=recipe.steps,
        desc=recipe.name,
        mininterval=5,
        disable=not is_first,
    )
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        batch = processes.share(training_batch(tokenizer, recipe, step)).to(device)
        loss = training_loss(averaging, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        recent.append(loss.item())
        if is_first and step + 1 in recipe.snapshots:
            save_atomically(snapshot_path(out, step + 1), model.state_dict())
        if (step + 1) % (log_every if step < 40 * log_every else 10 * log_every) == 0 or step + 1 == recipe.steps:
            train_loss = processes.mean_over_processes(sum(recent) / len(recent), device)
            recent = []
            if not is_first:
                continue
            held_out = nats_per_story(model, tokenizer, HELD_OUT_SEED, N_HELD_OUT)
            entry = {
                "step": step + 1,
                "tokens": (step + 1) * recipe.batch * recipe.cfg.n_ctx,
                "train_loss": round(train_loss, 4),
                "held_out_nats_per_story": round(held_out, 3),
                **floor,
                **{name: round(value, 4) for name, value in behaviour(model, tokenizer, HELD_OUT_SEED, n=200).items()},
            }
            history.append(entry)
            bar.write(json.dumps(entry))
            seconds = time.perf_counter() - began
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
            save_atomically(checkpoint, {**state, "step": step + 1, "seconds": seconds, "recipe": repr(recipe)})
    model.eval()
    return model, history, seconds


def card(
    model: Transformer, tokenizer: Any, recipe: Recipe, about: str, history: list[dict], seconds: float
) -> dict[str, object]:
    """What a model card says about a trained model: how it was made and what it can do, measured on unseen stories."""
    prompts = list(islice(tales.gift_prompts(HELD_OUT_SEED + 1), 500))
    difference = logit_differences(model, tokenizer, prompts)
    heads = writing_heads(model, tokenizer, prompts)
    writer = divmod(int(heads["direct"].argmax()), recipe.cfg.n_heads)
    seeker = divmod(int((heads["io"] - torch.maximum(heads["s1"], heads["s2"])).argmax()), recipe.cfg.n_heads)
    by_template = behaviour_by_template(model, tokenizer, HELD_OUT_SEED + 2, n=4000)
    measured = ("full_name_right", "agreement_right", "held_out_nats_per_story", "grammar_nats_on_the_same_stories")

    def head(place: tuple[int, int], *tables: str) -> str:
        return f"{place[0]}.{place[1]}, " + ", ".join(f"{name} {heads[name][place]:.2f}" for name in tables)

    return {
        "about": about,
        "data": "seeded stories of course_utils.data.tales",
        "recipe": f"python -m solutions.recipes.{recipe.name.replace('-', '_')}",
        "seed": recipe.seed,
        "steps": recipe.steps,
        "tokens": history[-1]["tokens"],
        "minutes": round(seconds / 60),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{key: history[-1][key] for key in measured},
        "grammar_entropy_per_story": history[-1]["grammar_entropy_per_story"],
        **{
            f"accepted_by_the_grammar_at_temperature_{temperature}": accepted_share(
                model, tokenizer, seed=0, n=200, temperature=temperature
            )
            for temperature in (1.0, 0.7, 0.4)
        },
        "ioi_right": round(float((difference > 0).float().mean()), 4),
        "ioi_right_in_the_worst_template_and_order": round(min(by_template.values()), 4),
        "ioi_logit_difference": round(float(difference.mean()), 3),
        "head_that_writes_most": head(writer, "direct", "io", "s1", "s2"),
        "head_that_looks_at_the_receiver_most": head(seeker, "direct", "io", "s1", "s2"),
        **copying(model, seed=HELD_OUT_SEED + 3),
        "licence": "MIT",
    }


def main(recipe: Recipe, about: str, prose: str, tokenizer_of: str | None = None) -> None:
    """The command line of a recipe; `about` (a line) and `prose` go into the model card.

    With `tokenizer_of` the model uses the tokenizer that ships with another one.
    """
    parser = argparse.ArgumentParser(description=f"Train {recipe.name}; a run that was stopped goes on where it was.")
    parser.add_argument("--out", type=Path, default=Path("runs") / recipe.name, help="where the checkpoint is kept")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--steps", type=int, default=recipe.steps, help="fewer make a worse model sooner")
    parser.add_argument("--ship", action="store_true", help="replace the model that ships with the course by this one")
    options = parser.parse_args()
    recipe = replace(recipe, seed=options.seed, steps=options.steps)
    with processes.joined(options.device) as device:
        processes.require_equal_shares(recipe.batch)
        tokenizer = shipped_tokenizer(tokenizer_of) if tokenizer_of else train_tokenizer()
        model, history, seconds = train(recipe, tokenizer, options.out, device)
        is_first = processes.rank() == 0
    if not is_first:
        return
    rounded_to(model)  # as it ships
    front = card(model, tokenizer, recipe, about, history, seconds)
    for key, value in front.items():
        print(f"{key}: {value}")
    if options.ship:
        extra = {"tokenizer": tokenizer_of} if tokenizer_of else {}
        own = None if tokenizer_of else tokenizer
        snapshots = load_snapshots(recipe, options.out)
        print("written to", save_shipped(model, own, recipe.name, {**front, **extra}, prose, history, snapshots))
