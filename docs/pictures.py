"""Draw the README's picture of chapter 04 anew: `python docs/pictures.py` writes docs/induction.png.

It is the chapter's main figure, from the shipped weights, photographed by Debian's chromium. The weights decide what it
shows, so draw it again whenever they change.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from course_utils.hooks import run_with_cache
from course_utils.plots import Figure, heatmaps
from course_utils.pretrained import load_pretrained
from solutions.ch02_transformer import Transformer
from solutions.ch04_induction import (
    duplicate_token_scores,
    induction_scores,
    previous_token_scores,
    repeated_tokens,
)

N_HALF = 40
WIDTH, HEIGHT = 1000, 330


def two_steps() -> Figure:
    """The heads behind in-context copying in `attn-only-2l`, on random tokens that repeat: as in the chapter."""
    model = load_pretrained(Transformer, "attn-only-2l")
    generator = torch.Generator().manual_seed(0)
    tokens = repeated_tokens(64, N_HALF, model.cfg.d_vocab, generator, bos=model.tokenizer.bos_token_id)
    with torch.no_grad():
        _, cache = run_with_cache(model, tokens, names="*hook_pattern")
    tables = {
        "previous token": previous_token_scores(cache),
        "duplicate token": duplicate_token_scores(cache, N_HALF),
        "induction": induction_scores(cache, N_HALF),
    }
    return heatmaps(tables, x="head", y="layer", title="Mean attention, on random tokens that repeat", signed=False)


def photograph(figure: Figure, path: Path) -> None:
    """The figure as chromium draws it, without network."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("There is no chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        figure.update_layout(width=WIDTH - 20, height=HEIGHT - 10)
        figure.write_html(page, config={"displayModeBar": False})
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
        options += [f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={path}"]
        subprocess.run([chromium, *options, page.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    photograph(two_steps(), Path(__file__).parent / "induction.png")
