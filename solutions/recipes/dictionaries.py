"""The dictionaries of `tales` that ship: what each is trained on, and what it reaches; and a sweep over kinds.

`--ship` trains them, or the one that `--only` names, and writes `course_utils/dictionaries/NAME`, each in less than a
minute of CPU. `--sweep` trains small dictionaries of every kind at several sparsities and learning rates, and writes
what they reach beside the first one: chapter 09 draws it.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from course_utils import saved_dictionaries
from course_utils.data import tales
from course_utils.data.facts import GROUPS, fact_labels
from course_utils.pretrained import load_pretrained, rounded_to
from solutions.ch02_transformer import Transformer
from solutions.ch06_superposition import SparseAutoencoder
from solutions.ch09_dictionaries import (
    ActivationBuffer,
    Batch,
    Dictionary,
    best_f1,
    encode_texts,
    explained_variance,
    firing_rates,
    fit_dictionary,
    loss_recovered,
    shuffle_weights,
    token_activations,
)

TRAINING, HELD_OUT = 1, 777  # seeds of the stories
N_TOKENS, N_HELD_OUT = 130_000, 600
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)  # of a latent's maximum: the thresholds that F1 tries
SWEEP = "sweep"
PROSE = """
A dictionary (a TopK sparse autoencoder, chapter 06) of what `{hook_name}` holds in {model}, at all tokens of stories
but the begin token. It was trained on {n_tokens} tokens, several times over, by `fit_dictionary` of chapter 09.

- `l0`: latents that fire on a token, on average; `explained_variance`; `dead`: the share of latents that never fire;
- `loss_recovered`: between the loss with the mean in its place (0) and the loss of the model (1);
- `names_f1`: for each of the 80 first names, the F1 of the best latent as a detector of that name; the mean over names.

All figures are of {n_held_out} stories that no training saw.
"""


@dataclass(frozen=True)
class DictionaryRecipe:
    """What one dictionary is made of."""

    name: str
    hook_name: str
    d_sae: int
    k: int
    steps: int
    shuffled: bool = False  # whether the model's weights are shuffled first
    seed: int = 0

    @property
    def model(self) -> str:
        return "`tales`, each of its weights shuffled: a random model" if self.shuffled else "`tales`"


RECIPES = {
    recipe.name: recipe
    for recipe in (
        DictionaryRecipe("tales-1-resid", "blocks.1.hook_resid_post", d_sae=1024, k=6, steps=1000),
        DictionaryRecipe("shuffled-1-resid", "blocks.1.hook_resid_post", d_sae=1024, k=6, steps=1000, shuffled=True),
        DictionaryRecipe("tales-1-attn", "blocks.1.hook_attn_out", d_sae=512, k=6, steps=700),
        DictionaryRecipe("tales-1-mlp", "blocks.1.hook_mlp_out", d_sae=256, k=6, steps=700),
    )
}


def model_of(recipe: DictionaryRecipe) -> Any:
    model = load_pretrained(Transformer, "tales")
    return shuffle_weights(model, torch.Generator().manual_seed(0)) if recipe.shuffled else model


def batches(model: Any, seed: int, n_texts: int = 64) -> Any:
    """Tokens and masks of fresh stories, without end."""
    stories = tales.stream(seed)
    while True:
        yield encode_texts(model.tokenizer, [story.text for story in islice(stories, n_texts)])


def drawing(rows: Tensor, n: int, seed: int) -> Callable[[], Tensor]:
    """Random rows, n at a time."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: rows[torch.randint(len(rows), (n,), generator=generator)]


@dataclass
class HeldOut:
    """Stories that no training saw, what is true of their tokens, and a hook point's activations there."""

    text: list[Batch]
    labels: Tensor
    activations: Tensor


def held_out(model: Any, hook_name: str) -> HeldOut:
    stories = list(islice(tales.stream(HELD_OUT), N_HELD_OUT))
    text = [
        encode_texts(model.tokenizer, [story.text for story in stories[start : start + 100]])
        for start in range(0, N_HELD_OUT, 100)
    ]
    rows = torch.cat([token_activations(model, *batch, hook_name) for batch in text])
    return HeldOut(text, fact_labels(stories, model.tokenizer), rows)


@torch.no_grad()
def judged(model: Any, dictionary: Dictionary, test: HeldOut) -> dict[str, float]:
    """The figures of a card."""
    latents = torch.cat([dictionary.encode(rows) for rows in test.activations.split(4096)])
    rates = firing_rates([latents])
    f1 = best_f1(latents, test.labels[:, : len(GROUPS["single names"])], SHARES).amax(dim=1)
    return {
        "l0": round(rates.sum().item(), 2),
        "explained_variance": round(explained_variance(test.activations, dictionary.decode(latents)).item(), 4),
        "loss_recovered": round(loss_recovered(model, dictionary, *test.text[0])["recovered"], 4),
        "dead": round((rates == 0).float().mean().item(), 3),
        "names_f1": round(f1.mean().item(), 3),
    }


def trained(recipe: DictionaryRecipe, model: Any, steps: int) -> tuple[Dictionary, list[float]]:
    start = ActivationBuffer(
        model, batches(model, TRAINING), recipe.hook_name, N_TOKENS, torch.Generator().manual_seed(recipe.seed)
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    sae = SparseAutoencoder(model.cfg.d_model, recipe.d_sae, "topk", k=recipe.k, generator=generator)
    fit = fit_dictionary(sae, drawing(start.next(N_TOKENS), 512, recipe.seed), steps, peak=2e-3, auxiliary=1 / 32)
    rounded_to(sae)
    return Dictionary(sae, recipe.hook_name, round(start.scale, 4)), fit.losses


def run(recipe: DictionaryRecipe, out: Path | None, steps: int | None, ship: bool) -> dict[str, object]:
    """Train one, judge it, print its figures, and ship it."""
    start = time.process_time()
    model = model_of(recipe)
    steps = recipe.steps if steps is None else steps
    dictionary, losses = trained(recipe, model, steps)
    figures = judged(model, dictionary, held_out(model, recipe.hook_name))
    front: dict[str, object] = {
        "about": f"a dictionary of {recipe.hook_name} of {recipe.model}",
        "recipe": "solutions.recipes.dictionaries",
    }
    front |= {"d_sae": recipe.d_sae, "k": recipe.k, "seed": recipe.seed, "steps": steps}
    card = {**front, **figures, "cpu_seconds": round(time.process_time() - start)}
    for key, value in card.items():
        print(f"{key}: {value}", flush=True)
    config = {"kind": "topk", "d_in": model.cfg.d_model, "d_sae": recipe.d_sae, "k": recipe.k}
    config |= {"hook_name": recipe.hook_name, "scale": dictionary.scale}
    weights = dictionary.sae.state_dict()
    if ship:
        prose = PROSE.format(hook_name=recipe.hook_name, model=recipe.model, n_tokens=N_TOKENS, n_held_out=N_HELD_OUT)
        history = {"history": [round(loss, 3) for loss in losses[9::10]]}
        saved_dictionaries.save(recipe.name, weights, config, card, f"# {recipe.name}\n{prose}", history)
    elif out is not None:
        out.mkdir(parents=True, exist_ok=True)
        torch.save(weights, out / f"{recipe.name}.pt")
    return card


# kind -> k, or penalty and first threshold: found by trying, so that the L0 of every kind reach from about 2 to 20
SETTINGS: dict[str, list[dict[str, float]]] = {
    "topk": [{"k": k} for k in (2, 3, 6, 10, 16)],
    "batch_topk": [{"k": k} for k in (2, 3, 6, 10, 16)],
    "relu": [{"sparsity": weight} for weight in (0.8, 1.3, 2.0, 3.0, 5.0)],
    "gated": [{"sparsity": weight} for weight in (1.0, 1.8, 3.0, 5.0, 8.0)],
    "jumprelu": [
        {"sparsity": weight, "threshold": start}
        for weight, start in ((0.1, 0.5), (0.3, 0.5), (0.8, 0.5), (1.5, 0.9), (3.0, 0.9))
    ],
}
PEAKS = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)  # learning rates, tried at every setting
SWEEP_STEPS = 400


def sweep(steps: int = SWEEP_STEPS, d_sae: int = 256) -> list[dict[str, Any]]:
    """Every kind at five sparsities and five learning rates: the same number of tries for each kind."""
    hook_name = RECIPES["tales-1-resid"].hook_name
    model = load_pretrained(Transformer, "tales")
    test = held_out(model, hook_name)
    generator = torch.Generator().manual_seed(0)
    source = ActivationBuffer(model, batches(model, TRAINING), hook_name, N_TOKENS // 3, generator)
    rows = source.next(N_TOKENS // 3)
    found = []
    tries = [(kind, setting) for kind, settings in SETTINGS.items() for setting in settings]
    for peak, (kind, setting) in product(PEAKS, tries):
        sae = SparseAutoencoder(
            model.cfg.d_model,
            d_sae,
            kind,
            k=int(setting.get("k", 1)),
            threshold=setting.get("threshold", 0.3),
            bandwidth=0.5,
            generator=torch.Generator().manual_seed(0),
        )
        auxiliary = 1 / 32 if "k" in setting else 0.0
        penalty = setting.get("sparsity", 0.0)
        fit_dictionary(sae, drawing(rows, 256, 0), steps, peak, penalty, auxiliary=auxiliary)
        figures = judged(model, Dictionary(sae, hook_name, source.scale), test)
        found.append({"kind": kind, **setting, "peak": peak, **figures})
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(RECIPES), help="this dictionary alone")
    parser.add_argument("--ship", action="store_true", help="write into course_utils/dictionaries")
    parser.add_argument("--sweep", action="store_true", help="the sweep over kinds, instead")
    parser.add_argument("--steps", type=int, help="fewer steps, to try it")
    parser.add_argument("--out", type=Path, help="a folder for the weights, where they do not ship")
    args = parser.parse_args()
    if args.sweep:
        found = sweep(args.steps or SWEEP_STEPS)
        if args.ship:
            saved_dictionaries.add_record("tales-1-resid", SWEEP, found)
        return
    for name in [args.only] if args.only else RECIPES:
        run(RECIPES[name], args.out, args.steps, args.ship)


if __name__ == "__main__":
    main()
