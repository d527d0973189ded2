"""Right answers of chapter 08 in another style: loops for tensors, tensors for loops, other places to hook."""

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from course_utils.hooks import HookPoint, hooks, run_with_cache, run_with_hooks


def icl_text(examples: Sequence[tuple[str, str]], query: str) -> str:
    return "".join(f" {word} -> {answer}," for word, answer in examples) + f" {query} ->"


class ICLDataset:
    """Keeps the prompts as a list, and works everything else out from it."""

    def __init__(
        self,
        task: Mapping[str, str],
        n_shots: int,
        n: int,
        tokenizer: Any,
        seed: int = 0,
        asked: Mapping[str, str] | None = None,
    ) -> None:
        self.n_shots, self.tokenizer = n_shots, tokenizer
        generator, asked = random.Random(seed), asked or task
        self.examples, self.queries, self.right = [], [], []
        while len(self.queries) < n:
            if len(self.queries) % len(asked) == 0:
                order = list(asked)
                generator.shuffle(order)
            query = order[len(self.queries) % len(asked)]
            words = [word for word in task if word != query]
            generator.shuffle(words)
            self.examples.append([(word, task[word]) for word in words[:n_shots]])
            self.queries.append(query)
            self.right.append(asked[query])
        self.finish()

    def finish(self) -> None:
        self.texts = [icl_text(examples, query) for examples, query in zip(self.examples, self.queries, strict=True)]
        rows = [[self.tokenizer.bos_token_id, *ids] for ids in self.tokenizer(self.texts)["input_ids"]]
        if len(set(map(len, rows))) > 1:
            short, long = min(rows, key=len), max(rows, key=len)
            raise ValueError(f"{self.texts[rows.index(short)]} {self.texts[rows.index(long)]}")
        self.tokens = torch.tensor(rows)
        self.answers = torch.tensor([self.tokenizer.encode(" " + right)[0] for right in self.right])

    def changed(self, examples: list[list[tuple[str, str]]]) -> "ICLDataset":
        new = ICLDataset.__new__(ICLDataset)
        new.__dict__.update(self.__dict__, examples=examples)
        new.finish()
        return new

    def shuffled(self, seed: int) -> "ICLDataset":
        if self.n_shots == 1 or not self.n_shots:
            raise ValueError("there is nothing to shuffle")
        generator, examples = random.Random(seed), []
        for pairs in self.examples:
            words, answers = map(list, zip(*pairs, strict=True))
            mixed = answers
            while any(a == b for a, b in zip(mixed, answers, strict=True)):
                mixed = generator.sample(answers, len(answers))
            examples.append(list(zip(words, mixed, strict=True)))
        return self.changed(examples)

    def with_examples_of(self, other: Mapping[str, str], seed: int) -> "ICLDataset":
        generator = random.Random(seed)
        examples = []
        for query in self.queries:
            pairs = [pair for pair in other.items() if pair[0] != query]
            examples.append(generator.sample(pairs, self.n_shots))
        return self.changed(examples)


@torch.no_grad()
def is_right(model: nn.Module, dataset: Any) -> Tensor:
    first = [int(model(row[None])[0, -1].topk(1).indices) for row in dataset.tokens]
    return torch.tensor(first) == dataset.answers


def bootstrap_interval(
    values: Tensor, n_resamples: int, generator: torch.Generator, level: float = 0.95
) -> tuple[float, float]:
    n = len(values)
    drawn = (torch.rand(n_resamples, n, generator=generator) * n).long()
    means = values[drawn.flatten()].view(n_resamples, n).mean(-1).double().numpy()
    low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


@torch.no_grad()
def mean_last_residual(model: nn.Module, tokens: Tensor) -> Tensor:
    found: dict[str, Tensor] = {}
    with hooks(model, {"*hook_resid_post": lambda resid, hook: found.update({hook.name: resid[:, -1].mean(0)})}):
        model(tokens)
    return torch.stack([found[f"blocks.{layer}.hook_resid_post"] for layer in range(model.cfg.n_layers)])


@torch.no_grad()
def mean_head_outputs(model: nn.Module, tokens: Tensor) -> Tensor:
    _, cache = run_with_cache(model, tokens, names="*hook_result")
    return torch.stack([cache["result", layer] for layer in range(model.cfg.n_layers)])[:, :, -1].mean(1)


def causal_head_scores(model: nn.Module, clean: Any, corrupted: Any) -> Tensor:
    """Exchanges the head's z, times W_O, in what attention writes."""
    means = mean_head_outputs(model, clean.tokens)
    with torch.no_grad():
        logits, cache = run_with_cache(model, corrupted.tokens, names="*hook_z")
        right = [(row, answer) for row, answer in enumerate(corrupted.answers.tolist())]

        def mean(logits: Tensor) -> Tensor:
            return torch.stack([logits[row, -1].softmax(0)[answer] for row, answer in right]).mean()

        rows = []
        for layer, block in enumerate(model.blocks):
            for head in range(model.cfg.n_heads):
                difference = means[layer, head] - cache["z", layer][:, -1, head] @ block.attn.W_O[head]

                def add(out: Tensor, hook: HookPoint, difference: Tensor = difference) -> Tensor:
                    return torch.cat([out[:, :-1], out[:, -1:] + difference[:, None]], dim=1)

                patched = run_with_hooks(model, corrupted.tokens, hooks={f"blocks.{layer}.hook_attn_out": add})
                rows.append(mean(patched) - mean(logits))
    return torch.stack(rows).view(len(model.blocks), -1)


def function_vector(head_outputs: Tensor, scores: Tensor, n_heads: int) -> Tensor:
    n_per_layer = scores.shape[1]
    order = sorted(range(scores.numel()), key=lambda i: scores[i // n_per_layer, i % n_per_layer].item())
    return sum(head_outputs[i // n_per_layer, i % n_per_layer] for i in order[-n_heads:])  # type: ignore[return-value]


def random_head_vector(head_outputs: Tensor, scores: Tensor, n_heads: int, generator: torch.Generator) -> Tensor:
    best = scores >= scores.flatten().topk(n_heads).values[-1]
    chance = torch.rand(scores.shape, generator=generator, device=generator.device).masked_fill(best, -1)
    chosen = torch.zeros_like(best).flatten().index_fill(0, chance.flatten().topk(n_heads).indices, True)
    total = head_outputs.flatten(0, 1)[chosen].sum(0)
    return torch.nn.functional.normalize(total, dim=0) * head_outputs[best].sum(0).norm()


@contextmanager
def add_vector(model: Any, layer: int, vector: Tensor, scale: float = 1.0, position: Any = -1) -> Iterator[None]:
    def add(resid: Tensor, hook: HookPoint) -> Tensor:
        where = torch.zeros(resid.shape[1], 1, dtype=resid.dtype)
        where[position] = 1
        return resid + scale * where * vector

    handle = model.blocks[layer].hook_resid_post.add(add)
    try:
        yield
    finally:
        handle.remove()


def vector_logits(model: Any, vector: Tensor) -> Tensor:
    resid = vector.reshape(1, 1, -1)
    return model.unembed(model.ln_final(resid)).reshape(-1)


@torch.no_grad()
def contrastive_vector(model: Any, positive: Tensor, negative: Tensor, layer: int) -> Tensor:
    name = f"blocks.{layer}.hook_resid_post"
    _, cache = run_with_cache(model, torch.cat([positive, negative]), names=name)
    both = cache[name][:, -1]
    return (both[: len(positive)] - both[len(positive) :]).mean(0)


@contextmanager
def activation_addition(model: Any, layer: int, plus: Tensor, minus: Tensor, scale: float = 1.0) -> Iterator[None]:
    if plus.shape != minus.shape:
        raise ValueError("two texts of one length, please")
    name = f"blocks.{layer}.hook_resid_post"
    with torch.no_grad():
        first, second = (run_with_cache(model, text[None], names=name)[1][name] for text in (plus, minus))

    def add(resid: Tensor, hook: HookPoint) -> Tensor:
        n_pos, n_text = resid.shape[1], len(plus)
        change = torch.nn.functional.pad(first - second, (0, 0, 0, max(0, n_pos - n_text)))[:, :n_pos]
        return resid + scale * change

    with hooks(model, {name: add}):
        yield


def without_direction(activation: Tensor, direction: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(direction, dim=0)
    keeps = torch.eye(len(unit), dtype=unit.dtype, device=unit.device) - torch.outer(unit, unit)
    return activation @ keeps


@torch.no_grad()
def ablate_direction(model: Any, direction: Tensor) -> Any:
    if model.cfg.tied:
        raise ValueError("tied")
    edited = copy.deepcopy(model)
    parts = [edited.embed, edited.pos_embed]
    for block in edited.blocks:
        parts += [block.attn] + ([block.mlp] if hasattr(block, "mlp") else [])
    for part in parts:
        for name in ("W_E", "W_pos", "W_O", "b_O", "W_out", "b_out"):
            if hasattr(part, name):
                weight = getattr(part, name)
                weight -= (weight @ direction)[..., None] * direction / direction.square().sum()
    return edited
