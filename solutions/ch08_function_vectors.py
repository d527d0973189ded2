"""Chapter 08: a task as a vector: taken from contexts that show it, added where none does; and steering."""

import copy
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import einops
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from course_utils.hooks import hooks, run_with_cache, run_with_hooks

# ------------------------------------------------------------------------------------------------- learning in context


def icl_text(examples: Sequence[tuple[str, str]], query: str) -> str:
    """The text that shows some pairs and asks for one more: " hot -> cold, wet -> dry, big ->".

    A pair is "word -> answer", and ", " stands between pairs. The text begins with a space, so that a word is the same
    token wherever it stands, and ends with "->": the answer brings a space of its own. Without examples only the
    question is left: " big ->".
    """
    return " " + ", ".join([*(f"{word} -> {answer}" for word, answer in examples), f"{query} ->"])


class ICLDataset:
    """`n` prompts that show `n_shots` pairs of a task and ask for one more, in the format of `icl_text`.

    `task` gives the answer to each word, and its pairs are the examples. The pairs asked for are those of `asked`, or
    of the task itself if there is none: each of its words once, in a random order, then each once more in another
    order, and so on until there are `n`. A prompt never shows the word that it asks for, and shows no word twice; each
    other word is as likely as any. All choices come from one `random.Random(seed)`.

    Attributes: `examples` (for each prompt its pairs, in order), `queries` (the words asked for), `texts`, `tokens`
    (a row for each text, `tokenizer.bos_token_id` first) and `answers` (the first token of " " + answer, for each
    prompt). Raises ValueError, with two texts, if the texts have different numbers of tokens: then "the last position"
    would not be the same for all.
    """

    tokens: Int[Tensor, "batch pos"]
    answers: Int[Tensor, " batch"]

    def __init__(
        self,
        task: Mapping[str, str],
        n_shots: int,
        n: int,
        tokenizer: Any,
        seed: int = 0,
        asked: Mapping[str, str] | None = None,
    ) -> None:
        rng, asked = random.Random(seed), task if asked is None else asked
        rounds = [rng.sample(list(asked), len(asked)) for _ in range(0, n, len(asked))]
        queries = list(itertools.chain(*rounds))[:n]
        shown = [rng.sample([word for word in task if word != query], n_shots) for query in queries]
        examples = [[(word, task[word]) for word in words] for words in shown]
        self._fill(examples, queries, [asked[query] for query in queries], tokenizer)

    def _fill(
        self, examples: list[list[tuple[str, str]]], queries: list[str], right: list[str], tokenizer: Any
    ) -> None:
        """Set all attributes from the words of the prompts."""
        self.examples, self.queries, self._right, self._tokenizer = examples, queries, right, tokenizer
        self.texts = [icl_text(shown, query) for shown, query in zip(examples, queries, strict=True)]
        rows = [[tokenizer.bos_token_id, *tokenizer.encode(text)] for text in self.texts]
        for row, text in zip(rows, self.texts, strict=True):
            if len(row) != len(rows[0]):
                raise ValueError(f"ICLDataset: {self.texts[0]!r} and {text!r} have different numbers of tokens.")
        self.tokens = torch.tensor(rows)
        self.answers = torch.tensor([tokenizer.encode(f" {answer}")[0] for answer in right])

    def shuffled(self, seed: int) -> "ICLDataset":
        """The same prompts, but in each one every example has the answer of another example; no answer keeps its place.

        The words, their order, the questions and the right answers stay. All choices come from `random.Random(seed)`.
        Raises ValueError with fewer than two examples.
        """
        rng, n_shots = random.Random(seed), len(self.examples[0])
        if n_shots < 2:
            raise ValueError(f"shuffled: {n_shots} examples have no answers that could change places.")
        corrupted = []
        for pairs in self.examples:
            order = rng.sample(range(n_shots), n_shots)
            answer_from = dict(zip(order, order[1:] + order[:1], strict=True))
            corrupted.append([(word, pairs[answer_from[place]][1]) for place, (word, _) in enumerate(pairs)])
        return self._with(corrupted)

    def with_examples_of(self, other: Mapping[str, str], seed: int) -> "ICLDataset":
        """The same questions and right answers after as many examples of another task.

        No prompt shows the word that it asks for, or a word twice. All choices come from `random.Random(seed)`.
        """
        rng, n_shots = random.Random(seed), len(self.examples[0])
        shown = [rng.sample([word for word in other if word != query], n_shots) for query in self.queries]
        return self._with([[(word, other[word]) for word in words] for words in shown])

    def _with(self, examples: list[list[tuple[str, str]]]) -> "ICLDataset":
        """A new data set with other examples before the same questions."""
        dataset = copy.copy(self)
        dataset._fill(examples, self.queries, self._right, self._tokenizer)
        return dataset


def is_right(model: nn.Module, dataset: Any) -> Bool[Tensor, " batch"]:
    """For each prompt, whether the answer is the model's first choice of all tokens after the last position.

    `dataset` has `tokens` and `answers`. No gradients are recorded.
    """
    with torch.no_grad():
        return model(dataset.tokens)[:, -1].argmax(dim=-1) == dataset.answers


def bootstrap_interval(
    values: Float[Tensor, " batch"], n_resamples: int, generator: torch.Generator, level: float = 0.95
) -> tuple[float, float]:
    """Between which two numbers the mean lies, as far as these prompts can tell: a percentile bootstrap.

    Draw as many prompts as there are, with replacement, and take their mean; do so `n_resamples` times. The interval
    holds the middle `level` of these means: half of what is left is below it, half above (`torch.quantile`). All random
    numbers come from `generator`.
    """
    drawn = torch.randint(len(values), (n_resamples, len(values)), generator=generator, device=generator.device)
    means = values[drawn].mean(dim=1)
    outside = (1 - level) / 2
    return torch.quantile(means, outside).item(), torch.quantile(means, 1 - outside).item()


# ------------------------------------------------------------------------------------------------- extracting a vector


def mean_last_residual(model: nn.Module, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "layer d_model"]:
    """The residual stream after each block, at the last position, averaged over the prompts; no gradients."""
    with torch.no_grad():
        _, cache = run_with_cache(model, tokens, names="*hook_resid_post")
    return torch.stack([cache["resid_post", layer][:, -1].mean(dim=0) for layer in range(len(model.blocks))])


def mean_head_outputs(model: nn.Module, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "layer head d_model"]:
    """What each head writes into the stream at the last position, averaged over the prompts; no gradients.

    A head writes its `z` times its `W_O`; the bias `b_O` belongs to no head. Source: Todd et al. 2024, section 2.3.
    """
    with torch.no_grad():
        _, cache = run_with_cache(model, tokens, names="*hook_z")
        return torch.stack(
            [
                einops.einsum(
                    cache["z", layer][:, -1].mean(dim=0),
                    block.attn.W_O,
                    "head d_head, head d_head d_model -> head d_model",
                )
                for layer, block in enumerate(model.blocks)
            ]
        )


def causal_head_scores(model: nn.Module, clean: Any, corrupted: Any) -> Float[Tensor, "layer head"]:
    """The average indirect effect of each head: how much it helps in a context that does not show the task.

    Both are datasets with `tokens` and `answers`. In a run on `corrupted`, what one head writes at the last position is
    replaced by what it writes there on average over the prompts of `clean`, which may be more or fewer. The head's
    score is by how much that raises the probability of the answer, averaged over the prompts of `corrupted`. All other
    heads and positions stay as they are, and no gradients are recorded. Source: Todd et al. 2024, section 2.3.
    """
    outputs = mean_head_outputs(model, clean.tokens)
    every = torch.arange(len(corrupted.tokens), device=corrupted.tokens.device)

    def probability(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, ""]:
        return logits[:, -1].softmax(dim=-1)[every, corrupted.answers].mean()

    scores = torch.zeros_like(outputs[..., 0])
    with torch.no_grad():
        before = probability(model(corrupted.tokens))
        for layer, head in itertools.product(range(len(scores)), range(scores.shape[1])):

            def put(result: Tensor, hook: Any, layer: int = layer, head: int = head) -> Tensor:
                result = result.clone()
                result[:, -1, head] = outputs[layer, head]
                return result

            logits = run_with_hooks(model, corrupted.tokens, hooks={f"blocks.{layer}.attn.hook_result": put})
            scores[layer, head] = probability(logits) - before
    return scores


def function_vector(
    head_outputs: Float[Tensor, "layer head d_model"], scores: Float[Tensor, "layer head"], n_heads: int
) -> Float[Tensor, " d_model"]:
    """The sum of what the `n_heads` heads of highest score write on average. Source: Todd et al. 2024, section 2.3."""
    best = scores.flatten().topk(n_heads).indices
    return head_outputs.flatten(0, 1)[best].sum(dim=0)


def random_head_vector(
    head_outputs: Float[Tensor, "layer head d_model"],
    scores: Float[Tensor, "layer head"],
    n_heads: int,
    generator: torch.Generator,
) -> Float[Tensor, " d_model"]:
    """The control of `function_vector`: as many other heads, and a vector of the same norm.

    The `n_heads` different heads are drawn from all but the `n_heads` of highest score, each as likely as any other;
    the sum of what they write is scaled to the norm of the function vector. Random numbers come from `generator`.
    """
    order = scores.flatten().argsort(descending=True)
    others = order[n_heads:]
    drawn = others[torch.randperm(len(others), generator=generator, device=generator.device)[:n_heads]]
    total = head_outputs.flatten(0, 1)[drawn].sum(dim=0)
    return total * function_vector(head_outputs, scores, n_heads).norm() / total.norm()


# ------------------------------------------------------------------------------------------------------ using a vector


@contextmanager
def add_vector(
    model: nn.Module, layer: int, vector: Float[Tensor, " d_model"], scale: float = 1.0, position: Any = -1
) -> Iterator[None]:
    """While the context lasts, add `scale * vector` to the residual stream after block `layer`.

    It is added in every row, at `position` only: -1 is the last, and a slice stands for several positions. The stream
    that the model computed is not written into, and hooks of others stay when the context ends.
    """

    def add(resid: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
        moved = resid.clone()
        moved[:, position] += scale * vector
        return moved

    with hooks(model, {f"blocks.{layer}.hook_resid_post": add}):
        yield


def vector_logits(model: nn.Module, vector: Float[Tensor, " d_model"]) -> Float[Tensor, " d_vocab"]:
    """The logits if a vector is all there is in the stream: through the final norm and the unembedding, biases too."""
    return model.unembed(model.ln_final(vector[None, None]))[0, 0]


# ------------------------------------------------------------------------------------------------------------ steering


def contrastive_vector(
    model: nn.Module, positive: Int[Tensor, "batch pos"], negative: Int[Tensor, "batch pos"], layer: int
) -> Float[Tensor, " d_model"]:
    """From the negative to the positive: the mean difference over pairs of texts, at the last position after `layer`.

    `positive[i]` and `negative[i]` differ in one thing, so whatever else they say cancels. No gradients are recorded.
    Source: Rimsky et al. 2024, section 3.
    """
    return mean_last_residual(model, positive)[layer] - mean_last_residual(model, negative)[layer]


@contextmanager
def activation_addition(
    model: nn.Module, layer: int, plus: Int[Tensor, " pos"], minus: Int[Tensor, " other_pos"], scale: float = 1.0
) -> Iterator[None]:
    """While the context lasts, every text is read as if its beginning had more of `plus` and less of `minus`.

    Both are texts of the same length. The difference of their residual streams after block `layer`, position by
    position and times `scale`, is added there to the first positions of each row. A row that is shorter than they are
    gets as much of it as there is room for. Raises ValueError if the two texts have different lengths.
    Source: Turner et al. 2023, section 3.
    """
    if len(plus) != len(minus):
        raise ValueError(f"activation_addition: plus has {len(plus)} tokens and minus {len(minus)}.")
    place = f"blocks.{layer}.hook_resid_post"
    with torch.no_grad():
        _, cache = run_with_cache(model, torch.stack([plus, minus]), names=place)
    difference = scale * (cache[place][0] - cache[place][1])

    def add(resid: Float[Tensor, "batch pos d_model"], hook: Any) -> Float[Tensor, "batch pos d_model"]:
        moved, n = resid.clone(), min(resid.shape[1], len(difference))
        moved[:, :n] += difference[:n]
        return moved

    with hooks(model, {place: add}):
        yield


def without_direction(
    activation: Float[Tensor, "*batch d_model"], direction: Float[Tensor, " d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """The activation without its part along a direction: what is left is at right angles to it.

    The direction may have any length but 0; only where it points matters.
    """
    unit = direction / direction.norm()
    return activation - (activation @ unit)[..., None] * unit


def ablate_direction(model: nn.Module, direction: Float[Tensor, " d_model"]) -> nn.Module:
    """A copy of the model that can no longer write along a direction, by an edit of its weights.

    Whatever writes into the residual stream loses its part along the direction: both embeddings, and in each block
    `W_O`, `b_O`, `W_out` and `b_out`, as far as the model has them. Then the stream is at right angles to the direction
    everywhere, as if a hook took that part away after each write. The model itself stays as it is. Raises ValueError if
    the embeddings are tied (`model.cfg.tied`): the edit would change what the unembedding reads as well.
    Source: Arditi et al. 2024, section 4.1.
    """
    if model.cfg.tied:
        raise ValueError("ablate_direction: the embedding is tied to the unembedding, which must stay as it is.")
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in edited.named_parameters():
            if name.split(".")[-1] in ("W_E", "W_pos", "W_O", "b_O", "W_out", "b_out"):
                parameter.copy_(without_direction(parameter, direction))
    return edited
