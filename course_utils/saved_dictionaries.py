"""Dictionaries and transcoders of shipped models, stored: a folder for each, in `course_utils/dictionaries`.

A folder holds `weights.safetensors` (float16; float32 again when they are read), `config.json` and `card.md`: front
matter in the form of a model's card, with the SHA-256 of the weights, then prose. Nothing here unpickles a file.
"""

import hashlib
import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "dictionaries"
WEIGHTS = "weights.safetensors"


class DictionaryError(RuntimeError):
    """A stored dictionary that cannot be read; the message says why, so notebooks show no traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython calls this instead of printing frames
        return [str(self)]


def shipped() -> list[str]:
    """The names of all stored dictionaries, sorted."""
    return sorted(card.parent.name for card in FOLDER.glob("*/card.md"))


def card(name: str) -> dict[str, str]:
    """The front matter of a stored dictionary's card. Raises DictionaryError for an unknown name."""
    _, front, _ = (_folder(name) / "card.md").read_text(encoding="utf-8").split("---\n", 2)
    pairs = (line.split(":", 1) for line in front.splitlines() if line.strip())
    return {key.strip(): value.strip() for key, value in pairs}


def record(name: str, what: str) -> Any:
    """A record beside a dictionary, `what`.json: figures that its recipe measured."""
    return json.loads((_folder(name) / f"{what}.json").read_text(encoding="utf-8"))


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `config.json` says, and the weights in float32.

    Raises DictionaryError for an unknown name, and for weights whose SHA-256 is not the card's.
    """
    from safetensors.torch import load

    content = (_folder(name) / WEIGHTS).read_bytes()
    if hashlib.sha256(content).hexdigest() != card(name)["sha256"]:
        raise DictionaryError(f"{name}: {WEIGHTS} is damaged or was changed, its SHA-256 is not the card's.")
    config = json.loads((_folder(name) / "config.json").read_text(encoding="utf-8"))
    return config, {key: value.float() for key, value in load(content).items()}


def save(
    name: str,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    front: Mapping[str, object],
    prose: str,
    records: Mapping[str, object] | None = None,
) -> Path:
    """Write a trained dictionary as a stored one, and return its folder: what the recipes end with.

    `front` becomes the card's front matter, one short value per key; `records` are written as JSON beside it.
    """
    from safetensors.torch import save_file

    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    halves = {key: value.detach().cpu().to(torch.float16).clone().contiguous() for key, value in weights.items()}
    save_file(halves, folder / WEIGHTS)
    sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    lines = [f"{key}: {value}" for key, value in {"name": name, **front, "sha256": sha256}.items()]
    _write(folder / "card.md", "\n".join(["---", *lines, "---", "", prose.strip()]))
    for what, content in {"config": dict(config), **(records or {})}.items():
        _write(folder / f"{what}.json", json.dumps(content))
    return folder


def add_record(name: str, what: str, content: object) -> None:
    """Write a record beside a dictionary that is there already."""
    _write(_folder(name) / f"{what}.json", json.dumps(content, indent=1))


def _folder(name: str) -> Path:
    if name not in shipped():
        nearest = ", ".join(get_close_matches(name, shipped(), n=3, cutoff=0.0))
        raise DictionaryError(f"There is no dictionary {name!r}. The nearest are: {nearest}.")
    return FOLDER / name


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
