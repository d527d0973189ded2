"""A page for each shipped model: its card in words and figures, and how its training went, as a curve."""

import json
from collections.abc import Mapping

import torch
from figures import plotly_html
from torch import Tensor

from course_utils.plots import Figure, line
from course_utils.pretrained import MODELS, load_history

CHECKSUM = "sha256"
NATS = {"the model": "held_out_nats_per_story", "the grammar": "grammar_nats_on_the_same_stories"}
SHARES = {"IOI": "ioi_right", "full names": "full_name_right", "agreement": "agreement_right"}


def curves(card: Mapping[str, str]) -> list[Figure]:
    """How training went: the loss, and for a model of stories its surprise beside the grammar's, and what it can do."""
    name, history = card["name"], load_history(card["name"])

    def draw(values: Tensor | Mapping[str, Tensor], steps: Tensor, y: str, what: str) -> Figure:
        return line(values, x="step", y=y, title=f"{name}: {what}", x_values=steps)

    if isinstance(history, dict):  # one run, perhaps with a survey of others beside it
        losses = torch.tensor(history.get("run", history)["loss"])
        steps = torch.arange(1, len(losses) + 1) * (int(card["steps"]) / len(losses))
        return [draw(losses, steps, "loss (nats)", "training loss")]
    columns = {key: torch.tensor([float(entry[key]) for entry in history]) for key in history[0]}
    nats, shares = ({label: columns[key] for label, key in keys.items()} for keys in (NATS, SHARES))
    return [
        draw(columns["train_loss"], columns["step"], "loss (nats)", "training loss"),
        draw(nats, columns["step"], "nats per story", "surprise on new stories"),
        draw(shares, columns["step"], "right (chance is 0.5)", "share of right answers"),
    ]


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
