"""The transcoders of `tales`: one for each MLP, trained singly and then together, each on what the others leave."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from course_utils.hooks import HookPoint, hooks, run_with_cache
from course_utils.pretrained import load_pretrained, rounded_to
from course_utils.shipped_transcoders import save_transcoders
from solutions.ch02_transformer import Transformer
from solutions.ch06_superposition import auxiliary_topk_loss, normalise_decoder
from solutions.ch10_circuits import Transcoder
from solutions.recipes import stories, tales

N_LATENTS, K = 1024, 16
SINGLY, TOGETHER = 800, 220  # steps
PEAK, PEAK_TOGETHER = 2e-3, 5e-4
SILENT = 60  # steps without firing after which a latent counts as dead
HELD_OUT = 999_999  # the number of the first batch that no training saw
NAMES = ["*ln2.hook_normalized", "*hook_mlp_out"]
PROSE = """
# Transcoders of tales

One for each of the four MLPs: 1024 latents, of which the 16 largest of each position are kept. They read
`ln2.hook_normalized` and write what `mlp_out` holds. First each was trained by itself, on the inputs and outputs of its
MLP in the stories that `tales` learned from (other ones of the same grammar). Then all four took the places of the
MLPs, and were trained together: so each reads what the ones below leave, and is to write what its MLP would write
there; and the logits were to stay the model's own (KL divergence).

- `unexplained`: for each layer, the share of the variance of `mlp_out` that its transcoder misses, on held-out stories.
- `dead`: for each layer, the share of latents that never fired on them.
- `loss`: nats per token on 32 held-out rows of 97 tokens: of the model, with each MLP alone replaced by its transcoder,
  with all four replaced, and with all four held at their mean output. `recovered`: 1 where the loss with all replaced
  is the model's, 0 where it is that of the means.
"""


def rows(tokenizer: Any, seed: int, step: int) -> Tensor:
    """Sixteen rows of stories as `tales` was trained on, cut to its context."""
    return stories.training_batch(tokenizer, replace(tales.RECIPE, seed=seed), step)[:, :96]


class Scaled:
    """A transcoder in training, between inputs with mean 0 and outputs with mean 0, both of norm sqrt(d_model)."""

    def __init__(self, transcoder: Transcoder, x: Tensor, y: Tensor) -> None:
        self.transcoder = transcoder
        self.x_mean, self.y_mean = x.mean(0), y.mean(0)
        self.x_size, self.y_size = ((part - part.mean(0)).square().mean().sqrt() for part in (x, y))
        self.silent = torch.zeros(transcoder.W_enc.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        return self.transcoder((x - self.x_mean) / self.x_size) * self.y_size + self.y_mean

    def loss(self, x: Tensor, y: Tensor, revive: bool) -> Tensor:
        """The squared error per coordinate where the outputs have variance 1, and what brings dead latents back."""
        x, y = (x - self.x_mean) / self.x_size, (y - self.y_mean) / self.y_size
        pre = x @ self.transcoder.W_enc + self.transcoder.b_enc
        latents = self.transcoder.encode(x)
        output = self.transcoder.decode(latents)
        loss = (output - y).square().sum(-1).mean()
        self.silent = (self.silent + 1) * ~(latents > 0).any(0)
        dead = self.silent > SILENT
        if revive and dead.any():
            loss = loss + auxiliary_topk_loss(y, output, pre, dead, self.transcoder.W_dec, 32) / 16
        return loss / y.shape[-1]

    @torch.no_grad()
    def folded(self) -> Transcoder:
        """The transcoder on inputs and outputs as they are: means and sizes have become part of the weights."""
        inner = self.transcoder
        d_model, n_latents = inner.W_enc.shape
        outer = Transcoder(d_model, n_latents, inner.k)
        outer.W_enc.copy_(inner.W_enc / self.x_size)
        outer.b_enc.copy_(inner.b_enc - self.x_mean @ outer.W_enc)
        # outputs in units of the model's, latents as large as what they write
        outer.W_dec.copy_(inner.W_dec)
        outer.W_enc.mul_(self.y_size)
        outer.b_enc.mul_(self.y_size)
        outer.b_dec.copy_(inner.b_dec * self.y_size + self.y_mean)
        return outer


def replacing(transcoders: Sequence[Any], seen: dict[int, tuple[Tensor, Tensor]] | None = None) -> dict[str, Any]:
    """Hooks with which transcoders write in the place of MLPs; None among them leaves an MLP as it is.

    In `seen` they note, for each layer, what its MLP reads, and what it writes there.
    """
    reads: dict[int, Tensor] = {}

    def note(x: Tensor, hook: HookPoint, layer: int) -> None:
        reads[layer] = x

    def write(mlp_out: Tensor, hook: HookPoint, layer: int) -> Tensor:
        if seen is not None:
            seen[layer] = (reads[layer], mlp_out)
        written: Tensor = transcoders[layer](reads[layer])
        return written

    fns: dict[str, Any] = {}
    for layer, transcoder in enumerate(transcoders):
        if transcoder is not None:
            fns[f"blocks.{layer}.ln2.hook_normalized"] = partial(note, layer=layer)
            fns[f"blocks.{layer}.hook_mlp_out"] = partial(write, layer=layer)
    return fns


def rate(step: int, steps: int, peak: float) -> float:
    """A short warm-up, and a decay over the last quarter."""
    return peak * min(1.0, (step + 1) / 50, (steps - step) / (steps / 4))


def fit(model: Any, seed: int, singly: int, together: int) -> list[Transcoder]:
    """Train one transcoder for each MLP."""
    generator = torch.Generator().manual_seed(seed)
    n_layers, d_model = model.cfg.n_layers, model.cfg.d_model
    with torch.no_grad():
        first = torch.cat([rows(model.tokenizer, seed + 1, 10**6 + i) for i in range(8)])
        _, cache = run_with_cache(model, first, names=NAMES)
    scaled = [
        Scaled(
            Transcoder(d_model, N_LATENTS, K, generator),
            cache["ln2.normalized", layer].flatten(0, 1),
            cache["mlp_out", layer].flatten(0, 1),
        )
        for layer in range(n_layers)
    ]
    parameters = [parameter for each in scaled for parameter in each.transcoder.parameters()]
    optimizer = torch.optim.Adam(parameters)
    bar = tqdm(range(singly + together), mininterval=10)
    for step in bar:
        in_turn = step < singly
        tokens = rows(model.tokenizer, seed + 1, step)
        now = rate(step, singly, PEAK) if in_turn else rate(step - singly, together, PEAK_TOGETHER)
        for group in optimizer.param_groups:
            group["lr"] = now
        with torch.no_grad():
            logits, cache = run_with_cache(model, tokens, names=NAMES)
        pairs = [(cache["ln2.normalized", layer], cache["mlp_out", layer]) for layer in range(n_layers)]
        losses = [
            each.loss(x.flatten(0, 1), y.flatten(0, 1), revive=step % 3 == 0)
            for each, (x, y) in zip(scaled, pairs, strict=True)
        ]
        if not in_turn:
            seen: dict[int, tuple[Tensor, Tensor]] = {}
            with hooks(model, replacing(scaled, seen)):
                own = model(tokens)
            losses += [scaled[at].loss(x.flatten(0, 1), y.flatten(0, 1), revive=False) for at, (x, y) in seen.items()]
            apart = nn.functional.kl_div(own.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none")
            losses.append(apart.sum(-1).mean())
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        with torch.no_grad():
            for each in scaled:
                each.transcoder.W_dec.copy_(normalise_decoder(each.transcoder.W_dec))
        if step % 50 == 0 or step in (singly - 1, singly + together - 1):
            bar.write(f"{step} " + " ".join(f"{loss.item():.4f}" for loss in losses))
    return [each.folded() for each in scaled]


def nats(model: Any, tokens: Tensor, fns: dict[str, Any]) -> float:
    """The mean loss of each next token under hooks."""
    with torch.no_grad(), hooks(model, fns):
        logits = model(tokens)[:, :-1]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def figures(model: Any, transcoders: Sequence[Transcoder]) -> dict[str, object]:
    """What the card says that they are worth."""
    tokens = torch.cat([rows(model.tokenizer, HELD_OUT, step) for step in range(2)])
    many = torch.cat([rows(model.tokenizer, HELD_OUT, step) for step in range(2, 10)])
    unexplained, dead, means = [], [], []
    with torch.no_grad():
        for layer, transcoder in enumerate(transcoders):
            _, cache = run_with_cache(model, many, names=NAMES)
            x, y = cache["ln2.normalized", layer].flatten(0, 1), cache["mlp_out", layer].flatten(0, 1)
            unexplained.append(float((transcoder(x) - y).square().sum() / (y - y.mean(0)).square().sum()))
            dead.append(float((transcoder.encode(x) == 0).all(0).float().mean()))
            means.append(y.mean(0))
    layers = range(len(transcoders))
    whole, all_replaced = nats(model, tokens, {}), nats(model, tokens, replacing(transcoders))
    ablated = nats(model, tokens, replacing([lambda x, mean=mean: mean.expand_as(x) for mean in means]))
    singly = [
        nats(model, tokens, replacing([transcoders[at] if at == layer else None for at in layers])) for layer in layers
    ]
    return {
        "unexplained": ", ".join(f"{share:.4f}" for share in unexplained),
        "dead": ", ".join(f"{share:.3f}" for share in dead),
        "loss": f"{whole:.4f}",
        "loss_with_one_replaced": ", ".join(f"{loss:.4f}" for loss in singly),
        "loss_with_all_replaced": f"{all_replaced:.4f}",
        "loss_with_all_at_their_mean": f"{ablated:.3f}",
        "recovered": f"{(ablated - all_replaced) / (ablated - whole):.4f}",
    }


def main(argv: list[str] | None = None) -> None:
    """Train the transcoders, say what they are worth, and keep them."""
    parser = argparse.ArgumentParser(description="Train the transcoders of tales.")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the stories")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=SINGLY + TOGETHER, help="fewer make worse transcoders sooner")
    parser.add_argument("--out", type=Path, default=Path("runs") / "transcoders", help="where the weights are kept")
    parser.add_argument("--ship", action="store_true", help="replace the transcoders that ship with the course")
    options = parser.parse_args(argv)
    start = time.process_time()
    model = load_pretrained(Transformer, "tales", device="cpu").requires_grad_(False)
    together = round(options.steps * TOGETHER / (SINGLY + TOGETHER))
    transcoders = fit(model, options.seed, options.steps - together, together)
    seconds = time.process_time() - start
    for transcoder in transcoders:
        rounded_to(transcoder)
    front = {
        "about": "a transcoder for each of the four MLPs of tales",
        "recipe": "python -m solutions.recipes.transcoders",
        "seed": options.seed,
        "steps": options.steps,
        "cpu_seconds": round(seconds),
        "latents": N_LATENTS,
        "k": K,
        **figures(model, transcoders),
        "licence": "MIT",
    }
    for key, value in front.items():
        print(f"{key}: {value}")
    options.out.mkdir(parents=True, exist_ok=True)
    weights = {f"{i}.{key}": value for i, part in enumerate(transcoders) for key, value in part.state_dict().items()}
    save_file(weights, options.out / "transcoders.safetensors")
    if options.ship:
        print("written to", save_transcoders(transcoders, "tales", front, PROSE))


if __name__ == "__main__":
    main()
