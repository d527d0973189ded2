"""Transcoders that ship with the course: one for every MLP of a shipped model.

They lie in `course_utils/transcoders/NAME`, named after the model that they belong to: `transcoders.safetensors`, in
float16, and `card.md`, which says what they are worth.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.pretrained import PretrainedError

TRANSCODERS = Path(__file__).parent / "transcoders"
WEIGHTS = "transcoders.safetensors"


def load_transcoders(TranscoderClass: Callable[..., Any], name: str, device: torch.device | str | None = None) -> Any:
    """The transcoders of a shipped model, one for each layer, as a list of `TranscoderClass(d_model, n_latents, k)`.

    Their parameters want no gradients. Raises PretrainedError for a model without transcoders, a damaged file, and
    a class whose parameters have other names or shapes.
    """
    from safetensors.torch import load

    folder = TRANSCODERS / name
    if not (folder / "card.md").exists():
        known = ", ".join(sorted(card.parent.name for card in TRANSCODERS.glob("*/card.md")))
        raise PretrainedError(f"There are no transcoders of {name!r}; there are those of: {known}.")
    card = transcoder_card(name)
    content = (folder / WEIGHTS).read_bytes()
    if hashlib.sha256(content).hexdigest() != card["sha256"]:
        raise PretrainedError(
            f"The transcoders of {name} are damaged or were changed: their SHA-256 is not the card's."
        )
    weights = load(content)
    transcoders = []
    for layer in range(1 + max(int(key.split(".")[0]) for key in weights)):
        own = {key.split(".", 1)[1]: weights[key].float() for key in weights if key.startswith(f"{layer}.")}
        transcoder = TranscoderClass(*own["W_enc"].shape, int(card["k"]))
        places = {key: place.shape for key, place in transcoder.state_dict().items()}
        if places != {key: weight.shape for key, weight in own.items()}:
            raise PretrainedError(
                f"The weights of {name}'s transcoders do not fit this {type(transcoder).__name__}: "
                "it needs W_enc, b_enc, W_dec and b_dec, and nothing else."
            )
        transcoder.load_state_dict(own)
        transcoders.append(transcoder.to(device).requires_grad_(False).eval())
    return transcoders


def transcoder_card(name: str) -> dict[str, str]:
    """The `key: value` lines at the top of the card of a model's transcoders."""
    _, front, _ = (TRANSCODERS / name / "card.md").read_text(encoding="utf-8").split("---\n", 2)
    pairs = (line.split(":", 1) for line in front.splitlines() if line.strip())
    return {key.strip(): value.strip() for key, value in pairs}


def save_transcoders(transcoders: Sequence[nn.Module], name: str, card: Mapping[str, object], prose: str) -> Path:
    """Write the transcoders of a model as those that ship, in float16, and return their folder.

    `card` becomes the front matter: one short value per key, among them `k`; the file's SHA-256 is added.
    """
    from safetensors.torch import save_file

    folder = TRANSCODERS / name
    folder.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Tensor] = {
        f"{layer}.{key}": value.detach().half().cpu().clone()
        for layer, transcoder in enumerate(transcoders)
        for key, value in transcoder.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS)
    sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    lines = [
        f"{key}: {value}" for key, value in {"name": name, **card, "precision": "float16", "sha256": sha256}.items()
    ]
    text = "\n".join(["---", *lines, "---", "", prose.strip()]) + "\n"
    (folder / "card.md").write_text(text, encoding="utf-8", newline="\n")
    return folder
