"""The model `othello-6`: it reads the moves of random Othello games on 6 x 6, and was never told the rules.

Its games come from the seed and the number of the batch, so a run that was killed goes on from its last checkpoint as
if nothing had happened. The learning rate is constant up to its decline, so a run may be given fewer `--steps` as long
as its checkpoint is older than the new decline.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from course_utils.config import TransformerConfig
from course_utils.data.othello import D_VOCAB, N_CTX, SIZE, random_games, replay, with_bos
from course_utils.device import device as default_device
from course_utils.hooks import run_with_cache
from course_utils.pretrained import rounded_to, save_shipped
from solutions.ch02_transformer import Transformer, init_weights
from solutions.ch14_othello import (
    intervene_on_square,
    intervention_cases,
    intervention_errors,
    probe_accuracy,
    push_until_read,
    relative_labels,
    run_with_edits,
    square_readers,
    state_means,
    train_probe,
    what_squares_write,
)
from solutions.recipes.stories import save_atomically

CFG = TransformerConfig(d_vocab=D_VOCAB, n_ctx=N_CTX, n_layers=4, n_heads=4, d_model=128, d_head=32, d_mlp=512)
SEED, STEPS, BATCH = 0, 54_000, 32
PEAK_LR, WARMUP, DECLINE = 1.5e-3, 200, 0.3  # the last 30% of the steps bring the learning rate down
CHUNK = 128  # so many batches are drawn at once: small draws would take longer than training on them
HELD_OUT_SEED, N_HELD_OUT = 1_000_003, 400
FROM, UP_TO = 4, 28  # the positions of probes and interventions: before, boards are alike; at the end, nearly full
PROBED, EDITED = 2, (0, 1)  # after which layers
PROSE = """
# othello-6

Four layers of four heads and MLPs of 512 neurons read the moves of a game of Othello on 6 x 6, one token each, and
predict the next one. Every game is new and each of its moves is drawn from the legal ones, all equally likely. The
model learns from the move that was played, not from the set of legal moves; it is told neither rules nor colours.

- `held_out_loss`, `floor`: the mean cross-entropy of the next move on 400 fresh games in nats, and that of a player
  who knows which moves are legal.
- `illegal`, `illegal_probability`: how often the likeliest move is illegal, and the probability on illegal moves.
- `probe_mine_theirs`, `probe_black_white`: how many squares a linear probe after layer 2 gets right, with and without
  the player's own view; `_on_discs`: of the squares that hold a disc. Fitted on 1500 games, measured on 400 others,
  at positions 4 to 27.
- `errors_...`: false and missing moves among as many as there are legal ones, on 1000 cases in which one disc is given
  the other colour: on the board as it is; then, against the edited board, of the model as it is (`none`), with the
  difference of the class means added after layers 0 and 1 (`means`), pushed there along what a square writes until a
  probe reads the new colour, both by least squares (`pushed`), and with random vectors as long as `means` (`random`).
  `where_known`: only where the model has no error on the board as it is, which is the case in a share `share_known`.
- Published for 8 x 8, of a model with 25 million parameters: 0.01% illegal (Li et al. 2023, section 2.3); at the best
  layer, linear probes right on 99.6% of the squares for mine and theirs, and on 75.0% for black and white; 2.72 errors
  against the edited board, 0.12 after an edit by a nonlinear probe and 0.10 after a linear one (Nanda et al. 2023,
  tables 1 and 2). This model is thirty times smaller, saw some tens of millions of moves, and falls short of all.
- `cpu_seconds` is what the run counted, with two threads for a part of it, so it is no time of one core. Measured
  apart, on one core of a busy machine, the recipe reads 14,000 tokens per second: it takes about 4000 seconds there.
- The first 3000 steps were computed in float32, the others with products in bfloat16. `history.json` has the loss and
  the illegal moves every 1000 steps.
"""


def learning_rate(step: int, steps: int) -> float:
    """Rise in a line during the warm-up, stay, and fall in a line to a fiftieth of the peak."""
    left = (steps - step) / (DECLINE * steps)
    return PEAK_LR * min(1.0, (step + 1) / WARMUP) * min(1.0, max(0.02, left))


def games_of_chunk(seed: int, chunk: int) -> Tensor:
    """The games of `CHUNK` batches, in order."""
    return random_games(CHUNK * BATCH, SIZE, torch.Generator().manual_seed(seed * 1_000_000 + chunk), N_CTX)


def logits_in_bfloat16(model: Any, tokens: Tensor) -> Tensor:
    """What the model computes, in half the time on a CPU: products in bfloat16, heads side by side in one product, and
    attention spelled out, since PyTorch's own takes long for the gradients of rows as short as these."""
    half, (batch, pos), cfg = torch.bfloat16, tokens.shape, model.cfg

    def linear(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return nn.functional.linear(x, W.T.to(half), b.to(half))

    def normal(x: Tensor, norm: Any) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], norm.w, norm.b, norm.eps).to(half)

    future = torch.full((pos, pos), -torch.inf, device=tokens.device).triu(1)
    resid = model.embed.W_E[tokens] + model.pos_embed.W_pos[:pos]
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        W = torch.cat([attn.W_Q, attn.W_K, attn.W_V]).transpose(0, 1).flatten(1)
        b = torch.cat([attn.b_Q, attn.b_K, attn.b_V]).flatten()
        heads = linear(normal(resid, block.ln1), W, b).view(batch, pos, 3, cfg.n_heads, cfg.d_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-1, -2)).float() * cfg.d_head**-0.5 + future
        z = (scores.softmax(dim=-1).to(half) @ v).transpose(1, 2).flatten(2)
        resid = resid + linear(z, attn.W_O.flatten(0, 1), attn.b_O)
        pre = linear(normal(resid, block.ln2), mlp.W_in, mlp.b_in)
        resid = resid + linear(nn.functional.gelu(pre, approximate="tanh"), mlp.W_out, mlp.b_out)
    return linear(normal(resid, model.ln_final), model.unembed.W_U, model.unembed.b_U).float()


def next_move_loss(model: Transformer, games: Tensor) -> Tensor:
    """The mean cross-entropy of each move that was played, in nats."""
    logits = logits_in_bfloat16(model, with_bos(games)[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), games.flatten())


@torch.no_grad()
def behaviour(model: nn.Module, games: Tensor) -> dict[str, float]:
    """On games with all their moves: the loss, its floor (the moves are drawn from the legal ones, all equally likely),
    and the share of positions where the likeliest move is illegal, and of probability on illegal moves. Positions
    after the end of a game do not count in the last two."""
    _, legal, over = replay(games)
    legal, going_on = legal[:, :-1], ~over[:, :-1]
    device = next(model.parameters()).device
    logprobs = model(with_bos(games)[:, :-1].to(device)).log_softmax(dim=-1).cpu()[..., : legal.shape[-1]]
    is_legal = legal.gather(-1, logprobs.argmax(dim=-1, keepdim=True)).squeeze(-1)
    outside = (logprobs.exp() * ~legal).sum(dim=-1)
    return {
        "held_out_loss": round(-float(logprobs.gather(-1, games[..., None]).mean()), 4),
        "floor": round(float(legal.sum(dim=-1).log().mean()), 4),
        "illegal": round(1 - float(is_legal[going_on].float().mean()), 4),
        "illegal_probability": round(float(outside[going_on].mean()), 4),
    }


def held_out_games(n: int = N_HELD_OUT) -> Tensor:
    """Games that no training saw, unless by chance."""
    return random_games(n, SIZE, torch.Generator().manual_seed(HELD_OUT_SEED), N_CTX)


def train(seed: int, steps: int, out: Path, device: str, every: int = 1000) -> tuple[Transformer, list[dict], float]:
    """Train, or go on with training: the model, its history, and the CPU seconds that it took."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, first, seconds = out / "checkpoint.pt", 0, 0.0
    model = Transformer(CFG)
    init_weights(model, 0.02, torch.Generator().manual_seed(seed))
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    history: list[dict[str, Any]] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state["seed"] != seed or learning_rate(state["step"], steps) != learning_rate(state["step"], state["steps"]):
            raise SystemExit(f"{checkpoint} belongs to another run; choose another --out or delete it.")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, first, seconds = state["history"], state["step"], state["seconds"]
    held_out = held_out_games()
    began, losses, games = time.process_time() - seconds, [], torch.empty(0)
    for step in range(first, steps):
        if step % CHUNK == 0 or step == first:
            games = games_of_chunk(seed, step // CHUNK)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = next_move_loss(model, games[step % CHUNK * BATCH :][:BATCH].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % every == 0 or step + 1 == steps:
            entry: dict[str, Any] = {"step": step + 1, "moves": (step + 1) * BATCH * N_CTX}
            entry |= {"train_loss": round(float(torch.stack(losses).mean()), 4), **behaviour(model, held_out)}
            history.append(entry)
            losses, seconds = [], time.process_time() - began
            print(json.dumps(entry), f"{seconds:.0f} CPU s", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
            save_atomically(checkpoint, {**state, "step": step + 1, "steps": steps, "seed": seed, "seconds": seconds})
    return model.cpu().eval(), history, seconds


def streams(model: nn.Module, games: Tensor) -> Tensor:
    """[layer game pos d_model]: what each block leaves, at the positions after each token but the last."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(CFG.n_layers)]
    _, cache = run_with_cache(model, with_bos(games)[:, :-1], names=names)
    return torch.stack([cache[name] for name in names])


@torch.no_grad()
def figures(model: nn.Module) -> dict[str, object]:
    """What probes find after layer `PROBED`, and what interventions do, on held-out games: see the card."""
    games = {name: random_games(n, SIZE, torch.Generator().manual_seed(HELD_OUT_SEED + i), N_CTX)
             for i, (name, n) in enumerate((("fit", 1500), ("test", 400)), start=1)}  # fmt: skip
    states = {name: replay(each)[0][:, :-1] for name, each in games.items()}
    seen = {name: streams(model, each) for name, each in games.items()}
    here = slice(FROM, UP_TO)
    x = {name: each[:, :, here].flatten(1, 2) for name, each in seen.items()}
    labels = {name: relative_labels(each) for name, each in states.items()}
    colours = {name: (each % 3).flatten(2) for name, each in states.items()}
    result: dict[str, object] = {}
    for words, truth in (("mine_theirs", labels), ("black_white", colours)):
        y = {name: each[:, here].flatten(0, 1) for name, each in truth.items()}
        W, b = train_probe(x["fit"][PROBED], y["fit"], 800, 1e-2, torch.Generator().manual_seed(0))
        right = probe_accuracy(W, b, x["test"][PROBED], y["test"])
        for where, share in zip(("", "_on_discs"), right, strict=True):
            result[f"probe_{words}{where}"] = round(float(share), 3)
    cases = intervention_cases(states["test"], 1000, torch.Generator().manual_seed(0), -1, FROM, UP_TO)
    tokens, every = with_bos(games["test"])[cases["game"], :-1], torch.arange(len(cases["game"]))
    fitted = labels["fit"][:, here].flatten(0, 1)
    means = torch.stack([state_means(x["fit"][layer], fitted) for layer in EDITED])
    vectors = means[:, cases["after"], cases["square"]] - means[:, cases["before"], cases["square"]]
    chance = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
    chance *= vectors.norm(dim=-1, keepdim=True) / chance.norm(dim=-1, keepdim=True)
    number = torch.arange(FROM, UP_TO).repeat(len(games["fit"]))
    pushes = {
        layer: push_until_read(
            what_squares_write(x["fit"][layer], fitted, number), *square_readers(x["fit"][layer], fitted), cases
        )
        for layer in EDITED
    }
    plain = model(tokens)[every, cases["pos"]]
    known = intervention_errors(plain, cases["legal"]) == 0
    after = {
        "none": intervention_errors(plain, cases["legal_after"]),
        "means": intervention_errors(
            intervene_on_square(model, tokens, cases["pos"], EDITED, vectors), cases["legal_after"]
        ),
        "pushed": intervention_errors(run_with_edits(model, tokens, cases["pos"], pushes), cases["legal_after"]),
        "random": intervention_errors(
            intervene_on_square(model, tokens, cases["pos"], EDITED, chance), cases["legal_after"]
        ),
    }
    result["errors_on_its_own_board"] = round(float(intervention_errors(plain, cases["legal"]).double().mean()), 2)
    for words, errors in after.items():
        result[f"errors_edited_{words}"] = round(float(errors.double().mean()), 2)
        result[f"errors_edited_{words}_where_known"] = round(float(errors[known].double().mean()), 2)
    return result | {"share_known": round(float(known.double().mean()), 2)}


def main(argv: list[str] | None = None) -> None:
    """Train the model, or go on with it, say what it can do, and keep its weights."""
    parser = argparse.ArgumentParser(description="Train othello-6; a run that was stopped goes on where it was.")
    parser.add_argument("--out", type=Path, default=Path("runs/othello-6"), help="where the checkpoint is kept")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer make a worse model sooner")
    parser.add_argument("--ship", action="store_true", help="replace the model that ships with the course by this one")
    options = parser.parse_args(argv)
    model, history, seconds = train(options.seed, options.steps, options.out, options.device)
    rounded_to(model)  # as it ships
    front = {
        "about": "four layers that read moves of random Othello games on 6 x 6, and were never shown a board",
        "data": "random legal games of course_utils.data.othello, single moves only",
        "recipe": "python -m solutions.recipes.othello_6",
        "seed": options.seed,
        "init_std": 0.02,
        "steps": options.steps,
        "tokens": options.steps * BATCH * N_CTX,
        "cpu_seconds": round(seconds),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **behaviour(model, held_out_games()),
        **figures(model),
        "licence": "MIT",
    }
    for key, value in front.items():
        print(f"{key}: {value}")
    save_file(model.state_dict(), options.out / "model.safetensors")
    if options.ship:
        print("written to", save_shipped(model, None, "othello-6", front, PROSE, history))


if __name__ == "__main__":
    main()
