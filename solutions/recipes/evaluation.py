"""What a model of tales can do, measured on stories that it has not seen."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from course_utils.data import tales
from course_utils.data.tales import Prompt
from solutions.ch02_transformer import generate, sample


def padded(tokenizer: Any, texts: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token rows that begin with the end-of-text token, padded on the right with the same; and their true lengths."""
    bos = tokenizer.bos_token_id
    rows = [[bos, *ids] for ids in tokenizer(texts)["input_ids"]]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = int(lengths.max())
    return torch.tensor([row + [bos] * (longest - len(row)) for row in rows], device=device), lengths


@torch.no_grad()
def nats_per_story(model: nn.Module, tokenizer: Any, seed: int, n: int) -> float:
    """The mean negative log-probability of whole stories, their end included. The grammar's entropy is the floor."""
    device = next(model.parameters()).device
    texts = [story.text for story in islice(tales.stream(seed), n)]
    total = 0.0
    for start in range(0, n, 200):
        tokens, lengths = padded(tokenizer, texts[start : start + 200], device)
        targets = torch.cat([tokens[:, 1:], tokens.new_full((len(tokens), 1), tokenizer.bos_token_id)], dim=1)
        logprobs = model(tokens).log_softmax(dim=-1).gather(-1, targets[..., None]).squeeze(-1)
        inside = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        total -= float((logprobs * inside).sum())
    return total / n


@torch.no_grad()
def logit_differences(model: nn.Module, tokenizer: Any, prompts: list[Prompt]) -> Tensor:
    """For each prompt, the logit of the answer minus that of the wrong answer (their first tokens), at its end."""
    device = next(model.parameters()).device
    tokens, lengths = padded(tokenizer, [prompt.text for prompt in prompts], device)
    last = model(tokens)[torch.arange(len(prompts), device=device), lengths - 1]
    answers, wrongs = (
        torch.tensor([ids[0] for ids in tokenizer(words)["input_ids"]], device=device)[:, None]
        for words in ([prompt.answer for prompt in prompts], [prompt.wrong for prompt in prompts])
    )
    return (last.gather(1, answers) - last.gather(1, wrongs)).squeeze(1)


def behaviour(model: nn.Module, tokenizer: Any, seed: int, n: int) -> dict[str, float]:
    """Accuracy (logit of the answer above the wrong one's) and mean logit difference on `n` fresh prompts per task."""
    result = {}
    for task, prompts in (
        ("ioi", tales.gift_prompts),
        ("full_name", tales.full_name_prompts),
        ("agreement", tales.agreement_prompts),
    ):
        difference = logit_differences(model, tokenizer, list(islice(prompts(seed), n)))
        result[f"{task}_right"] = float((difference > 0).float().mean())
        result[f"{task}_logit_difference"] = float(difference.mean())
    return result
