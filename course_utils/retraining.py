"""Train a shipped model again and compare what came out with its card: `course models train NAME`.

Every recipe is a program, `python -m solutions.recipes.NAME [--out] [--device] [--steps]`, that prints the front matter
of the model's card, a `key: value` per line. On the same kind of machine the same seed gives the same numbers; on
another one sums are rounded otherwise, and then training goes its own way, as if the seed were another.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from course_utils.places import CourseError
from course_utils.pretrained import PretrainedError, _card, _known

# What may differ, by the first pattern that a key matches: how far (None: as it likes), and why.
RULES: tuple[tuple[str, float | None, str], ...] = (
    (r"seed|parameters|grammar_.*|init_std", 0.0, "decided before training begins"),
    (r"steps|tokens|texts", 0.0, "decided before training begins"),
    (r"reader_.*", None, "of another training: `python -m solutions.recipes.oracle --reader`"),
    (r"minutes|cpu_seconds", None, "says something about the machine"),
    (r".*_by_task", None, "the tasks' mean, in a line of its own, is what can be compared"),
    (r".*_by_type|ten_points_over_.*", None, "the mean over types, in a line of its own, is what can be compared"),
    (r"questions|windows", 0.0, "decided before training begins"),
    (r"unknown_(zeros|noise|random_weights)", None, "what is said about the never trained is up to chance"),
    (r"unknown_.*|cost_of_unknown|calibration_error", 0.05, "seeds differ by hundredths"),
    (r"test_texts_in_training", 0.0, "decided before training begins"),
    (r"head_.*|anti_diagonal", None, "which head does what is up to chance"),
    (r"loss_on_random_tokens.*", None, "no model was trained on random tokens"),
    (r"floor", 0.0, "decided before training begins"),
    (r"illegal.*|probe_.*", 0.03, "seeds differ by hundredths"),
    (r"errors_.*|share_known", 0.3, "seeds differ by tenths"),
    (r"train_loss", 0.01, "as good as nothing once every pair is learned"),
    (r"without_.*", None, "what is left of an ablated model is up to chance"),
    (r"near_miss_.*|fooled_.*", None, "which rare texts a model gets wrong is up to chance"),
    (r"grokked_at_step", 2500.0, "seeds differ by a thousand steps and more"),
    (r"key_frequencies", None, "which frequencies a model uses is up to chance"),
    (r"logit_share", 0.1, "seeds differ by hundredths"),
    (r"accepted_.*", 0.08, "one word can spoil a story; seeds differ"),
    (r"five_shots_told", None, "what passes from sentences into lists is up to chance"),
    (r"five_shots_.*|no_shots_.*|vector_.*|random_.*", 0.15, "a mean over seven tasks of few words; seeds differ"),
    (r".*_worst_.*", 0.05, "a minimum over many templates"),
    (r".*_logit_difference", 4.0, "seeds differ by units"),
    (r".*nats_per_story", 0.5, "seeds differ by tenths"),
    (r".*(right|held_out|accuracy|attention|induction|previous).*", 0.05, "seeds differ by hundredths"),
)
WORDS = ("name", "about", "data", "recipe", "starts_from", "licence", "tokenizer")  # texts: they say nothing of the run


class Row(NamedTuple):
    """One line of the comparison."""

    key: str
    shipped: str
    now: str
    verdict: str  # "same", "close", "off", or "" where anything goes
    remark: str


def train_again(name: str, out: Path | None, device: str | None, steps: int | None) -> int:
    """Run a model's recipe and print its figures beside the card's; 0 if they are as close as can be expected."""
    try:
        shipped = _card(_known(name))
    except PretrainedError as error:
        raise CourseError(str(error)) from None
    if steps is not None and steps < 1:
        raise CourseError(f"--steps must be at least 1, got {steps}.")
    recipe = shipped.get("recipe", "").split()[-1:]
    if not recipe or not recipe[0].startswith("solutions.recipes."):
        raise CourseError(f"The card of {name} names no recipe of this course; it cannot be trained again.")
    options = {"--out": out, "--device": device, "--steps": steps}
    arguments = [str(part) for option, value in options.items() if value is not None for part in (option, value)]
    print(f"Training {name}: {' '.join([*shipped['recipe'].split(), *arguments])}", flush=True)
    code, now = run_recipe(recipe[0], arguments)
    if code:
        print(f"The recipe stopped with exit code {code}.", file=sys.stderr)
        return 1
    rows = compare(shipped, now)
    print("\n" + table(rows))
    shortened = steps is not None and str(steps) != shipped.get("steps")
    if shortened:
        print(f"\nTrained for {steps} steps instead of {shipped.get('steps')}: no wonder where it falls behind.")
        return 0
    off = [row.key for row in rows if row.verdict == "off"]
    print(f"\nFarther from the card than expected: {', '.join(off)}." if off else "\nAs close as can be expected.")
    return int(bool(off))


def run_recipe(module: str, arguments: list[str]) -> tuple[int, dict[str, str]]:
    """Run a recipe, showing what it prints: its exit code, and its `key: value` lines."""
    front: dict[str, str] = {}
    here = str(Path(__file__).resolve().parent.parent)  # with -P: this course's recipes, whatever lies in this folder
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", module, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None  # a pipe was asked for
        for text in process.stdout:
            pair = re.fullmatch(r"(\w[\w.]*): (.*)\n", text)
            if pair:
                front[pair[1]] = pair[2]
            else:
                print(text, end="", flush=True)
    return process.returncode, front


def compare(shipped: Mapping[str, str], now: Mapping[str, str]) -> list[Row]:
    """A row for each figure that both have, in the card's order."""
    rows = []
    for key, before in shipped.items():
        if key in WORDS or key not in now:
            continue
        tolerance, remark = next(
            ((tolerance, remark) for pattern, tolerance, remark in RULES if re.fullmatch(pattern, key)), (None, "")
        )
        if before == now[key]:
            verdict = "same"
        elif tolerance is None:
            verdict = ""
        else:
            try:
                verdict = "close" if abs(float(before) - float(now[key])) <= tolerance else "off"
            except ValueError:  # no numbers
                verdict = "off"
        allowed = f"within {tolerance:g}: {remark}" if tolerance else remark
        rows.append(Row(key, before, now[key], verdict, "" if verdict == "same" else allowed))
    return rows


def table(rows: list[Row]) -> str:
    """The rows under each other, with a header."""
    lines = [Row("", "card", "now", "", ""), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join([f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)] + [line.remark]).rstrip()
        for line in lines
    )
