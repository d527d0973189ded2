"""What the course does on a GPU, in one run of some minutes: `make gpu`.

All checks over the reference solutions (each tries tensors of the GPU by itself), the first hundred steps of every
recipe with its speed and memory, and every solution notebook. The table goes into docs/running.md, between its marks.
"""

import argparse
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from course_utils.checks import find_checks, run_check
from course_utils.pretrained import shipped_tokenizer
from solutions.ch02_transformer import Transformer, init_weights
from solutions.ch03_training import fit
from solutions.recipes import attn_only_2l, attn_only_2l_late, attn_only_4l, reverse_increment, stories, tales

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "running.md"
BEGIN, END = "<!-- gpu: written by `make gpu` -->", "<!-- end of gpu -->"
RECIPES = (attn_only_2l.RECIPE, attn_only_2l_late.RECIPE, attn_only_4l.RECIPE, tales.RECIPE)
PARTS = ("checks", "recipes", "notebooks")
AT_ONCE = 4  # notebooks: they compute on the CPU, and one alone would leave most of its cores idle


class Row(NamedTuple):
    """One line of the table."""

    what: str
    result: str
    seconds: float
    is_right: bool


class Wrong(Exception):
    """A job came to its end, and its result is not what it should be."""


def row(what: str, job: Callable[[], str]) -> Row:
    """Do one job, which says what came out; whatever goes wrong in it, the others still have their turn."""
    start, is_right = time.perf_counter(), True
    try:
        result = job()
    except Exception as error:
        if not isinstance(error, Wrong):
            traceback.print_exception(error)
        result, is_right = f"**{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}**", False
    found = Row(what, result, time.perf_counter() - start, is_right)
    print(f"{found.what}: {found.result}, {found.seconds:.1f} s", flush=True)
    return found


def checks_of(chapter: str) -> str:
    """Every check of a chapter, given the reference solution."""
    (path,) = (ROOT / "solutions").glob(f"ch{chapter}_*.py")
    solutions = import_module(f"solutions.{path.stem}")
    checks, wrong = find_checks()[chapter], []
    for name, check in checks.items():
        try:
            run_check(check, getattr(solutions, name))
        except Exception as failure:
            print(failure, file=sys.stderr)
            wrong.append(name)
    if wrong:
        raise Wrong(f"{len(wrong)} of {len(checks)}: {', '.join(wrong)}")
    return f"{len(checks)} right"


def speed(n_tokens: int, seconds: float, loss: float, device: str) -> str:
    memory = f", at most {torch.cuda.max_memory_allocated() / 1e6:,.0f} MB" if device == "cuda" else ""
    return f"{n_tokens / seconds:,.0f} tokens/s{memory}, loss {loss:.2f}"


def finish(device: str) -> float:
    """The time, once the GPU has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def begin(device: str) -> float:
    """The time, from which on the peak of memory is measured as well."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return finish(device)


def first_steps(recipe: stories.Recipe, device: str, steps: int) -> str:
    """The recipe's first steps on its own batches, which were made beforehand."""
    tokenizer: Any = shipped_tokenizer("tales")
    batches = [stories.training_batch(tokenizer, recipe, step) for step in range(steps)]
    model = Transformer(recipe.cfg)
    init_weights(model, recipe.init_std, torch.Generator().manual_seed(recipe.seed))
    model.to(device)
    optimizer = stories.optimizer_for(model, recipe)
    start = begin(device)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = stories.learning_rate(recipe, step)
        loss = stories.training_loss(model, batch.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
    seconds = finish(device) - start
    return speed(steps * recipe.batch * recipe.cfg.n_ctx, seconds, loss.item(), device)


def first_steps_of_reverse_increment(device: str, steps: int) -> str:
    """The small task, with chapter 03's own loop."""
    train, _ = reverse_increment.split(reverse_increment.SEED)
    model = reverse_increment.fresh(reverse_increment.Setup(), reverse_increment.SEED).to(device)
    sequences, answers = train.to(device), reverse_increment.ANSWERS.to(device)
    start = begin(device)
    losses = fit(model, sequences, answers, steps, reverse_increment.SEED)
    seconds = finish(device) - start
    return speed(steps * 128 * train.shape[1], seconds, losses[-1], device)


def notebook_of(chapter: str) -> str:
    """`course run`, in a process of its own."""
    command = [sys.executable, "-m", "course_utils.cli", "run", chapter]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise Wrong("a cell failed")
    return "all cells ran"


def rows_of(part: str, chapters: Sequence[str], device: str, steps: int) -> Iterator[Row]:
    if part == "checks":
        for chapter in chapters:
            yield row(f"checks of chapter {chapter}", partial(checks_of, chapter))
    elif part == "recipes":
        yield row("recipe reverse-increment", partial(first_steps_of_reverse_increment, device, steps))
        for recipe in RECIPES:
            yield row(f"recipe {recipe.name}", partial(first_steps, recipe, device, steps))
    else:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from pool.map(
                lambda chapter: row(f"notebook of chapter {chapter}", partial(notebook_of, chapter)), chapters
            )


def table(rows: Sequence[Row], device: str) -> str:
    """The rows in Markdown, under a line that says on what they were measured."""
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    python = platform.python_version()
    lines = [f"On {where}, with PyTorch {torch.__version__} and Python {python}:", "", "| what | result | seconds |"]
    lines += ["|---|---|---|", *(f"| {what} | {result} | {seconds:.1f} |" for what, result, seconds, _ in rows)]
    return "\n".join(lines)


def write(text: str, page: Path) -> None:
    """Put the table between the marks of the page, in the place of what is there."""
    old = page.read_text(encoding="utf-8")
    new = re.sub(f"(?s)({re.escape(BEGIN)}\n).*(?=\n{re.escape(END)})", lambda found: found[1] + text, old)
    page.write_text(new, encoding="utf-8", newline="\n")


def main(argv: Sequence[str] | None = None) -> int:
    chapters = sorted(find_checks())
    parser = argparse.ArgumentParser(description="Try the course on this machine's GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only to try this script")
    parser.add_argument("--steps", type=int, default=100, help="of each recipe")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--chapters", choices=chapters, nargs="+", default=chapters)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "PyTorch finds no GPU here: this needs a machine with CUDA, and a build of torch for it.", file=sys.stderr
        )
        return 1
    rows = [
        found
        for part in PARTS
        if part in options.only
        for found in rows_of(part, options.chapters, options.device, options.steps)
    ]
    print("\n" + table(rows, options.device))
    if options.device == "cuda" and tuple(options.only) == PARTS:
        write(table(rows, options.device), PAGE)
    return 0 if all(found.is_right for found in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
