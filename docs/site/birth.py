"""The picture that moves: an induction head of `attn-only-2l` coming about, drawn from the snapshots of its training.

A list of words is read out twice. The picture is one head's attention pattern at every snapshot, one after the other,
and beside it how surprised the model is by the second reading. SVG with its own animation: no script draws it.
"""

from html import escape

import torch
from torch import Tensor

from course_utils.hooks import run_with_cache
from course_utils.plots import visible
from course_utils.pretrained import load_pretrained, shipped_steps
from solutions.ch02_transformer import Transformer
from solutions.ch03_training import lm_loss

MODEL = "attn-only-2l"
WORDS = " apple river stone table cloud candle garden"
SECONDS = 1.0  # for each snapshot
CELL, LEFT, TOP, CURVE = 20, 66, 56, 108  # a square, the room for words, for the title, and for the curve below


def snapshots(card: dict[str, str]) -> tuple[list[str], list[int], Tensor, list[float]]:
    """Tokens, steps, the patterns [snapshot query key] of the head, and the loss on the second reading, in nats.

    The head is the one that looks most, at the end of training, at what followed each word the first time.
    """
    n_words = len(WORDS.split())
    steps = [*shipped_steps(MODEL), int(card["steps"])]
    patterns, losses = [], []
    for step in [*steps[:-1], None]:
        model = load_pretrained(Transformer, MODEL, step=step)
        ids = [model.tokenizer.bos_token_id, *model.tokenizer.encode(f"List:{WORDS} ;{WORDS}")]
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits, cache = run_with_cache(model, tokens, names="*hook_pattern")
            # from the second word on: the first cannot be foreseen
            losses.append(float(lm_loss(logits[:, -n_words:], tokens[:, -n_words:])))
        patterns.append(cache.stack("pattern")[:, 0])
    looks = patterns[-1].diagonal(-n_words, -2, -1)[..., -n_words:-1].mean(dim=-1)
    layer, head = divmod(int(looks.argmax()), looks.shape[1])
    names = [visible(model.tokenizer.decode([token])) for token in ids]
    return names, steps, torch.stack([pattern[layer, head] for pattern in patterns]), losses


def animated(values: list[float], attribute: str, digits: int = 2) -> str:
    """An animation of one attribute through these values, which stays for a while at the last."""
    shown = [*values, values[-1], values[-1]]
    text = ";".join(f"{value:.{digits}f}" for value in shown)
    return (
        f'<animate attributeName="{attribute}" values="{text}" dur="{SECONDS * len(shown)}s" repeatCount="indefinite"/>'
    )


def svg(card: dict[str, str]) -> str:
    """The picture, as the text of an SVG element that a page holds; its colours are those of the page."""
    names, steps, patterns, losses = snapshots(card)
    n, duration = len(names), SECONDS * (len(steps) + 2)
    width, height = LEFT + n * CELL + 14, TOP + n * CELL + LEFT + CURVE
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="birth-title" id="birth" '
        f'data-end="{duration - 1}" xmlns="http://www.w3.org/2000/svg">',
        f'<title id="birth-title">An induction head coming about in {steps[-1]} steps of training. At first it looks '
        "everywhere; from about the middle on, each word of the second reading looks at the word that followed it in "
        f"the first. The loss on the second reading falls from {losses[0]:.1f} to {losses[-1]:.2f} nats.</title>",
        f'<g transform="translate({LEFT} {TOP})">',
        f'<rect width="{n * CELL}" height="{n * CELL}" class="ground"/>',
    ]
    for query in range(n):
        for key in range(query + 1):
            weights = patterns[:, query, key].tolist()
            if max(weights) > 0.02:
                place = f'x="{key * CELL}" y="{query * CELL}" width="{CELL}" height="{CELL}"'
                last = f'fill-opacity="{weights[-1]:.2f}"'
                parts.append(f'<rect {place} class="weight" {last}>{animated(weights, "fill-opacity")}</rect>')
    for position, name in enumerate(names):
        middle = position * CELL + CELL // 2
        word = escape(name.replace("<|endoftext|>", "start"))
        parts.append(f'<text x="-5" y="{middle + 4}" text-anchor="end">{word}</text>')
        parts.append(f'<text transform="translate({middle - 4} {n * CELL + 6}) rotate(90)">{word}</text>')
    parts.append("</g>")
    for number, step in enumerate(steps):  # each shows for its time; where nothing moves, the last one stands
        start, end = number / (len(steps) + 2), (number + 1) / (len(steps) + 2) if number < len(steps) - 1 else 1
        times = f'keyTimes="0;{start:.4f};{min(end, 1):.4f}"' if end < 1 else f'keyTimes="0;{start:.4f}"'
        states = "hidden;visible;hidden" if end < 1 else "hidden;visible"
        show = (
            f'<animate attributeName="visibility" calcMode="discrete" values="{states}" {times} dur="{duration}s" '
            'repeatCount="indefinite"/>'
        )
        still = "visible" if step == steps[-1] else "hidden"
        parts.append(f'<text x="{LEFT}" y="42" class="step" visibility="{still}">step {step}{show}</text>')
    parts.append(f'<text x="{LEFT}" y="20" class="heading">One head, learning to copy</text>')
    parts += curve(steps, losses, LEFT, height - CURVE + 24, n * CELL, CURVE - 44)
    return "\n".join([*parts, "</svg>"])


def curve(steps: list[int], losses: list[float], left: float, top: float, width: float, height: float) -> list[str]:
    """The loss on the second reading against the snapshots, and a dot that runs along it."""
    across = [left + width * number / (len(steps) - 1) for number in range(len(steps))]
    down = [top + height * (1 - loss / max(losses)) for loss in losses]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
    dot = animated(across, "cx", 1) + animated(down, "cy", 1)
    return [
        f'<line x1="{left}" y1="{top + height}" x2="{left + width}" y2="{top + height}" class="axis"/>',
        f'<polyline points="{points}" class="curve"/>',
        f'<circle r="5" cx="{across[-1]:.1f}" cy="{down[-1]:.1f}" class="dot">{dot}</circle>',
        _right(left + width, top + 4, "surprise in the second reading, in nats"),
        f'<text x="{left + 8}" y="{top + 4}">{losses[0]:.1f}</text>',
        _right(left + width, top + height - 8, f"{losses[-1]:.2f}"),
        f'<text x="{left}" y="{top + height + 16}">step {steps[0]}</text>',
        _right(left + width, top + height + 16, f"step {steps[-1]}"),
    ]


def _right(x: float, y: float, words: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="end">{words}</text>'
