"""A page for each shipped model: its card in words and figures, and how its training went, as a curve."""

import json
from collections.abc import Mapping
from typing import NamedTuple

import torch
from figures import plotly_html

from course_utils.plots import Figure, line
from course_utils.pretrained import MODELS, load_history

CHECKSUM = "sha256"


class Curves(NamedTuple):
    """A figure of the measures that a history has of these: what it shows, its y axis, and its lines by key."""

    what: str
    y: str
    lines: Mapping[str, str]  # a key of the history, and what its line is called
    y_log: bool = False


DRAWN = (
    Curves("training loss", "loss (nats)", {"train_loss": "training"}),
    Curves("loss", "loss (nats)", {"train": "training pairs", "held_out": "held-out pairs"}, y_log=True),
    Curves(
        "surprise on new stories",
        "nats per story",
        {"held_out_nats_per_story": "the model", "grammar_nats_on_the_same_stories": "the grammar"},
    ),
    Curves(
        "share of right answers",
        "right (chance is 0.5)",
        {"ioi_right": "IOI", "full_name_right": "full names", "agreement_right": "agreement"},
    ),
    Curves("share of right sums", "right", {"held_out_right": "held-out pairs"}),
    Curves(
        "share of right answers after five examples",
        "right",
        {"five_shots_listed": "listed", "five_shots_held_out": "held out", "five_shots_told": "told"},
    ),
)


def curves(card: Mapping[str, str]) -> list[Figure]:
    """How training went: the loss, and what else the model's history has of it, a figure for each kind of measure."""
    name, history = card["name"], load_history(card["name"])
    if isinstance(history, dict):  # one run, perhaps with a survey of others beside it
        losses = torch.tensor(history.get("run", history)["loss"])
        steps = torch.arange(1, len(losses) + 1) * (int(card["steps"]) / len(losses))
        return [line(losses, x="step", y="loss (nats)", title=f"{name}: training loss", x_values=steps)]
    columns = {key: torch.tensor([float(entry[key]) for entry in history]) for key in history[0]}
    figures = []
    for what, y, labels, y_log in DRAWN:
        found = {label: columns[key] for key, label in labels.items() if key in columns}
        values = found if len(found) > 1 else next(iter(found.values()), None)  # a single line needs no name
        if values is not None:
            title = f"{name}: {what}"
            figures.append(line(values, x="step", y=y, title=title, x_values=columns["step"], y_log=y_log))
    return figures


def model_page(card: Mapping[str, str]) -> str:
    """The card as Markdown: prose, curves, every figure, and the checksums folded."""
    text = (MODELS / card["name"] / "card.md").read_text(encoding="utf-8")
    prose = text.split("---\n", 2)[2].strip()
    facts = [f"| `{key}` | {value} |" for key, value in card.items() if CHECKSUM not in key]
    sums = [f"| {key} | `{value}` |" for key, value in card.items() if CHECKSUM in key]
    drawn = [plotly_html(json.loads(figure.to_json())) for figure in curves(card)]
    folded = "\n".join(["| file | SHA-256 |", "|---|---|", *sums])
    parts = [prose, "## Training", *drawn, "## In figures", "\n".join(["| what | |", "|---|---|", *facts])]
    parts.append(f"<details><summary>Checksums of the weights</summary>\n\n{folded}\n\n</details>")
    return "\n\n".join(parts) + "\n"
