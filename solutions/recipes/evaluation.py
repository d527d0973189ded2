"""What a model of tales can do, measured on stories that it has not seen."""

from collections import defaultdict
from itertools import islice
from typing import Any

import einops
import torch
from torch import Tensor, nn

from course_utils.data import tales
from course_utils.data.tales import Prompt
from course_utils.hooks import run_with_cache
from solutions.ch02_transformer import Transformer, apply_temperature, generate, sample
from solutions.ch04_induction import induction_scores, per_token_losses, previous_token_scores, repeated_tokens

CHUNK = 200  # texts in one forward: the logits of more would fill gigabytes


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
    for start in range(0, n, CHUNK):
        tokens, lengths = padded(tokenizer, texts[start : start + CHUNK], device)
        targets = torch.cat([tokens[:, 1:], tokens.new_full((len(tokens), 1), tokenizer.bos_token_id)], dim=1)
        logprobs = model(tokens).log_softmax(dim=-1).gather(-1, targets[..., None]).squeeze(-1)
        inside = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        total -= float((logprobs * inside).sum())
    return total / n


def grammar_nats_per_story(seed: int, n: int) -> float:
    """The grammar's own mean of -log p on the same stories: what a perfect model would score on just these."""
    return -sum(story.log_probability for story in islice(tales.stream(seed), n)) / n


@torch.no_grad()
def logit_differences(model: nn.Module, tokenizer: Any, prompts: list[Prompt]) -> Tensor:
    """For each prompt, the logit of the answer minus that of the wrong answer (their first tokens), at its end."""
    device = next(model.parameters()).device
    differences = []
    for start in range(0, len(prompts), CHUNK):
        chunk = prompts[start : start + CHUNK]
        tokens, lengths = padded(tokenizer, [prompt.text for prompt in chunk], device)
        last = model(tokens)[torch.arange(len(chunk), device=device), lengths - 1]
        answer, wrong = (first_tokens(tokenizer, chunk, which, device)[:, None] for which in ("answer", "wrong"))
        differences.append((last.gather(1, answer) - last.gather(1, wrong)).squeeze(1))
    return torch.cat(differences)


def first_tokens(tokenizer: Any, prompts: list[Prompt], which: str, device: torch.device) -> Tensor:
    """The first token of every prompt's `answer` or `wrong` answer."""
    words = [getattr(prompt, which) for prompt in prompts]
    return torch.tensor([ids[0] for ids in tokenizer(words)["input_ids"]], device=device)


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


def behaviour_by_template(model: nn.Module, tokenizer: Any, seed: int, n: int) -> dict[tuple[str, str], float]:
    """IOI accuracy on `n` fresh prompts for every sentence template that occurs in them and every order of the names.

    Keys are (template, who of giver and receiver was named first).
    """
    prompts = list(islice(tales.gift_prompts(seed), n))
    right = (logit_differences(model, tokenizer, prompts) > 0).tolist()
    answers: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for prompt, correct in zip(prompts, right, strict=True):
        where = name_positions(tokenizer, prompt)
        order = "giver first" if where["s1"] < where["io"] else "receiver first"
        for template in tales.gift_templates(prompt.story):
            answers[template, order].append(correct)
    return {key: sum(outcomes) / len(outcomes) for key, outcomes in answers.items()}


def accepted_share(model: nn.Module, tokenizer: Any, seed: int, n: int, temperature: float = 1.0) -> float:
    """The share of stories sampled from the model that the grammar could have written; one wrong word spoils one."""
    device = next(model.parameters()).device
    bos, generator = tokenizer.bos_token_id, torch.Generator(device).manual_seed(seed)
    start = torch.full((n, 1), bos, device=device)

    def pick(logits: Tensor) -> Tensor:
        return sample(apply_temperature(logits, temperature), generator)

    rows = generate(model, start, model.cfg.n_ctx - 1, pick, eos=bos)
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return sum(tales.parse(text) is not None for text in texts) / n


@torch.no_grad()
def writing_heads(model: Transformer, tokenizer: Any, prompts: list[Prompt]) -> dict[str, Tensor]:
    """Who writes the answer of IOI prompts, and where that head looks: [layer head] tables, means over the prompts.

    `direct` is what a head adds by itself to the logit difference at the last position: its output through the final
    LayerNorm (with the scale it had) and the unembedding. `io`, `s1`, `s2` are its attention from the last position to
    the receiver's name and to the giver's first and second mention.
    """
    device = next(model.parameters()).device
    tokens, lengths = padded(tokenizer, [prompt.text for prompt in prompts], device)
    names = [f"*{hook}" for hook in ("hook_result", "hook_pattern", "ln_final.hook_scale")]
    _, cache = run_with_cache(model, tokens, names=names)
    rows, last = torch.arange(len(prompts), device=device), lengths - 1
    answer, wrong = (first_tokens(tokenizer, prompts, which, device) for which in ("answer", "wrong"))
    direction = (model.unembed.W_U[:, answer] - model.unembed.W_U[:, wrong]).T
    result = cache.stack("result")[:, rows, last]
    centred = result - result.mean(dim=-1, keepdim=True)
    scaled = centred / cache["ln_final.hook_scale"][rows, last][:, None] * model.ln_final.w
    tables = {
        "direct": einops.einsum(scaled, direction, "layer batch head d_model, batch d_model -> layer batch head").mean(
            dim=1
        )
    }
    pattern = cache.stack("pattern")
    positions = [name_positions(tokenizer, prompt) for prompt in prompts]
    for name in ("io", "s1", "s2"):
        key = torch.tensor([where[name] for where in positions], device=device)
        tables[name] = torch.stack([layer[rows, :, last, key].mean(dim=0) for layer in pattern])
    return tables


def name_positions(tokenizer: Any, prompt: Prompt) -> dict[str, int]:
    """The token positions, the first token of the row counted, of IO, S1 and S2 in an IOI prompt."""
    encoding = tokenizer(prompt.text)
    first_mention = {prompt.text[mark.start : mark.end]: mark for mark in prompt.story.marks if mark.label == "person"}
    places = {
        "io": first_mention[prompt.answer.strip()],
        "s1": first_mention[prompt.wrong.strip()],
        "s2": prompt.story.marked("s2"),
    }
    return {name: 1 + encoding.char_to_token(place.start) for name, place in places.items()}


@torch.no_grad()
def copying(model: Transformer, seed: int, n: int = 64, n_half: int = 24) -> dict[str, str | float]:
    """How well random tokens are continued when they come a second time, and which heads look as if they did it."""
    rng = torch.Generator().manual_seed(seed)
    tokens = repeated_tokens(n, n_half, model.cfg.d_vocab, rng, bos=0)
    logits, cache = run_with_cache(model, tokens, names="*hook_pattern")
    losses = per_token_losses(logits, tokens).mean(dim=0)

    def best(scores: Tensor) -> str:
        layer, head = divmod(int(scores.argmax()), model.cfg.n_heads)
        return f"{layer}.{head}, {float(scores.max()):.2f}"

    return {
        "best_previous_token_head": best(previous_token_scores(cache)),
        "best_induction_head": best(induction_scores(cache, n_half)),
        "loss_on_random_tokens": round(float(losses[:n_half].mean()), 3),
        "loss_on_random_tokens_again": round(float(losses[n_half + 1 :].mean()), 3),
    }
