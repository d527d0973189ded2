"""Draw the pictures in README.md and docs/ anew: `python docs/pictures.py`, with Debian's chromium.

induction.png is the main figure of chapter 04, attention.png a single head at work. Both are of the shipped weights,
which decide what they show, so draw them again whenever these change. heat_map.png is the teacher's page for a class
that `benchmarks/generated_class.py` makes up.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from course_utils.hooks import run_with_cache
from course_utils.plots import Figure, heatmap, heatmaps
from course_utils.pretrained import load_pretrained
from solutions.ch02_transformer import Transformer
from solutions.ch04_induction import (
    duplicate_token_scores,
    induction_scores,
    previous_token_scores,
    repeated_tokens,
)

N_HALF = 24
WORDS = " apple river stone table cloud candle garden"


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


def one_head() -> Figure:
    """The pattern of the head of `attn-only-2l` that does induction best on a list of words that is read out twice."""
    model = load_pretrained(Transformer, "attn-only-2l")
    ids = [model.tokenizer.bos_token_id, *model.tokenizer.encode(f"List:{WORDS} ;{WORDS}")]
    with torch.no_grad():
        _, cache = run_with_cache(model, torch.tensor([ids]), names="*hook_pattern")
    patterns = cache.stack("pattern")[:, 0]
    n = len(WORDS.split())
    looks = patterns.diagonal(-n, -2, -1)[..., -n:-1].mean(dim=-1)  # from a word to what followed it, n tokens before
    layer, head = divmod(int(looks.argmax()), model.cfg.n_heads)
    ticks = [model.tokenizer.decode([token]) for token in ids]
    title = f"Head {layer}.{head}: each word of the second reading looks at what followed the first"
    axes = {"x": "key: the token that is looked at", "y": "query: the token that looks"}
    return heatmap(patterns[layer, head], **axes, title=title, x_ticks=ticks, y_ticks=ticks, signed=False)


def teachers_page(folder: Path) -> Path:
    """The report on a class that never was."""
    script = Path(__file__).parent.parent / "benchmarks" / "generated_class.py"
    subprocess.run([sys.executable, script, folder / "class", "--learners", "48"], check=True)
    command = [sys.executable, "-m", "course_utils.cli", "grade", folder / "class", "--out", folder / "report"]
    subprocess.run(command, check=True)
    return folder / "report" / "report.html"


def draw(figure: Figure, path: Path, width: int, height: int) -> None:
    """A picture of the figure."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        figure.update_layout(width=width - 20, height=height - 10)
        figure.write_html(page, config={"displayModeBar": False})
        photograph(page, path, width, height)


def photograph(page: Path, path: Path, width: int, height: int) -> None:
    """The page as chromium shows it, without network."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("There is no chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
        options += [f"--user-data-dir={folder}/profile", f"--window-size={width},{height}", f"--screenshot={path}"]
        subprocess.run([chromium, *options, page.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    here = Path(__file__).parent
    draw(two_steps(), here / "induction.png", 1000, 330)
    draw(one_head(), here / "attention.png", 900, 790)
    with tempfile.TemporaryDirectory() as folder:
        photograph(teachers_page(Path(folder)), here / "heat_map.png", 1180, 1900)
