"""The model `oracle`, which reads activations of `tales` and answers questions about the story in words."""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from course_utils.data.questions import (
    BLANK,
    D_VOCAB,
    HELD_OUT_TYPES,
    IDS,
    N_TALES,
    TYPES,
    UNKNOWN,
    WIDTH,
    Cut,
    Question,
    Wording,
    asked_when_shuffled,
    cut_stories,
    held_out_wording,
    oracle_row,
    token_rows,
    trained_wordings,
)
from course_utils.pretrained import MODELS, load_pretrained, rounded_to, save_shipped, shipped_models, write_card
from solutions.ch02_transformer import Transformer, init_weights
from solutions.ch03_training import cosine_schedule
from solutions.ch11_oracles import (
    accuracy_by_type,
    answer_probabilities,
    contradiction_rate,
    expected_calibration_error,
    fit_oracle,
    harvest_windows,
    oracle_examples,
    oracle_from,
    shuffle_alike,
    shuffle_windows,
)
from solutions.recipes.stories import save_atomically

TRAIN_SEED, TEST_SEED = 31_000_000, 32_000_000
LAYER = 2  # of `tales`: the stream after two blocks
CHUNK = 100  # steps for which questions are drawn, and windows shuffled, at once
N_TEST = 600  # stories, each cut twice
N_PROBED = 3000  # stories of the training on whose windows probes are fitted
TRAINED = tuple(kind for kind in TYPES if kind not in HELD_OUT_TYPES)
PROSE = """
A copy of `tales` with {n_new} new tokens, trained to answer questions about a story from four activations: the stream
of `tales` after two blocks, at the last four tokens before a cut. They are standardised coordinate by coordinate
(`statistics.json`) and added to the oracle's stream after its first block, at four placeholder tokens, each scaled to
the length of what is there. Behind them comes a question of at most three words, and the answer is one token. Of the
story it sees nothing else. A seventh of its training has the answer "unknown": questions that make no sense for the
kind of story, and windows whose four activations come from four different stories, half of them from nearly the same
position.

All figures are about {n_test} stories of another seed than those of the training, each cut twice, and, but for
`held_out_types`, about types of question that were trained. Short texts come up again whatever the seed:
`test_texts_in_training` is the share of cut texts that the training has, too.

- `right_by_type`: the share of right answers, of all tokens that the oracle could say. `right`: the mean over types.
- `softmax_probe_by_type`, `mass_mean_probe_by_type`: linear probes on all four activations, fitted to the windows of
  {n_probed} stories of the training that answer the question. The one is a softmax (30 steps of LBFGS on up to 4000
  windows), the other chapter 07's mass-mean probe for many classes, with the best of three strengths of shrinkage on
  the test itself, which flatters it.
- `majority_by_type`: the most frequent answer, always.
- `ten_points_over_...`: how many of the trained types are that much better than the probe, or than both; of those that
  have probes, which are all but `mentioned`.
- `held_out_wordings`: the same questions in a wording that was never trained. Its words were, in others.
- `held_out_types`: types that were never trained, though their words were, in others; plainly worded.
- `contradicting`: how often "woman?" and "man?" get the same answer about the same person, where both are answered.
- `unknown_*`: how often it says "unknown" where there is nothing to know. It was trained on the first three;
  `noise`, `zeros` and `random_weights` (activations of a `tales` that was never trained) it never saw.
- `unknown_wrongly`: how often it says "unknown" where there is an answer; `cost_of_unknown`: by how much it would be
  right more often if it could not.
- `calibration_error`: the expected calibration error of all answers, in ten bins.
- `reader_...`: another copy of `tales`, which is given no activations but the story's text up to the cut, and behind it
  the question. All its weights were trained, on the same stories, with questions drawn in the same way, but
  `reader_questions` of them only, for a text is longer than four placeholders; none about shuffled windows. It says
  roughly what the text tells, and with longer training it would get closer to that. Its weights are not kept:
  `python -m solutions.recipes.oracle --reader` trains them again.
- `history.json`: the loss of every tenth step, averaged over ten.
"""


@dataclass(frozen=True)
class OracleRecipe:
    """What the oracle is made of."""

    seed: int = 0
    steps: int = 2400
    n_stories: int = 9000
    per_story: int = 3
    batch: int = 256
    peak_lr: float = 1.5e-3
    unanswerable: float = 0.07  # share of questions that make no sense for the story
    shuffled: float = 0.07  # share of questions about windows that belong to no text


RECIPE = OracleRecipe()
READER = OracleRecipe(steps=4800, batch=64, peak_lr=1e-3, shuffled=0.0)  # one that is given the text, to compare with


@dataclass(frozen=True)
class Pool:
    """Cut stories, what can be asked about them, and their windows: as they come, or standardised."""

    cuts: list[Cut]
    windows: Tensor
    ends: Tensor

    def first(self, n: int) -> "Pool":
        return Pool(self.cuts[:n], self.windows[:n], self.ends[:n])

    def scaled(self, mean: Tensor, scale: Tensor) -> "Pool":
        return Pool(self.cuts, ((self.windows - mean) / scale).to(self.windows.dtype), self.ends)


def pool(model: Any, n_stories: int, seed: int, per_story: int) -> Pool:
    """Windows of stories from a seed, kept in float16."""
    cuts = cut_stories(model.tokenizer, n_stories, seed, per_story)
    tokens, ends = token_rows(cuts)
    windows = [
        harvest_windows(model, rows, at, LAYER, WIDTH).half()
        for rows, at in zip(tokens.split(2048), ends.split(2048), strict=True)
    ]
    return Pool(cuts, torch.cat(windows), ends)


def examples_of_chunk(
    train: Pool, tokenizer: Any, recipe: OracleRecipe, chunk: int
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Windows, real and shuffled in two ways, and examples for `CHUNK` steps of training."""
    rng = random.Random(f"{recipe.seed} {chunk}")
    generator = torch.Generator().manual_seed(1000 * recipe.seed + chunk)
    wordings = {kind: trained_wordings(kind) for kind in TRAINED}
    mixed = rng.sample(range(len(train.cuts)), min(4096, len(train.cuts)))
    shuffled = [
        shuffle_windows(train.windows[mixed], generator),
        shuffle_alike(train.windows[mixed], train.ends[mixed], generator),
    ]
    nonsense = [asked_when_shuffled(rng, tokenizer, TRAINED) for _ in range(2 * len(mixed))]
    n = CHUNK * recipe.batch
    n_unanswerable, n_shuffled = int(n * recipe.unanswerable), int(n * recipe.shuffled)
    parts = [
        oracle_examples([cut.known for cut in train.cuts], wordings, n - n_unanswerable - n_shuffled, rng),
        oracle_examples([cut.unknown for cut in train.cuts], wordings, n_unanswerable, rng),
        oracle_examples(nonsense, wordings, n_shuffled, rng),
    ]
    parts[2] = (parts[2][0] + len(train.windows), *parts[2][1:])
    order = torch.randperm(n, generator=generator)
    which, rows, answers = (torch.cat(part)[order] for part in zip(*parts, strict=True))
    return torch.cat([train.windows, *shuffled]), (which, rows, answers)


def train_oracle(tales: Any, train: Pool, recipe: OracleRecipe, out: Path) -> tuple[Transformer, list[float], float]:
    """Train, a chunk at a time, or go on where a run was stopped: the oracle, its losses, and CPU seconds."""

    def fit(oracle: Transformer, chunk: int, optimizer: torch.optim.Optimizer) -> list[float]:
        windows, examples = examples_of_chunk(train, tales.tokenizer, recipe, chunk)
        schedule = (chunk * CHUNK, recipe.steps)
        return fit_oracle(oracle, windows, examples, recipe.batch, recipe.peak_lr, schedule, optimizer)

    return train_in_chunks(tales, fit, recipe, out)


Fit = Callable[[Transformer, int, torch.optim.Optimizer], list[float]]  # trains for one chunk: the losses


def train_in_chunks(tales: Any, fit: Fit, recipe: OracleRecipe, out: Path) -> tuple[Transformer, list[float], float]:
    """Train a copy of `tales` with room for new tokens; a checkpoint after each chunk says where to go on."""
    oracle = oracle_from(tales, Transformer, torch.Generator().manual_seed(recipe.seed)).train()
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=recipe.peak_lr, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    seconds = 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != repr(recipe):
            raise SystemExit(f"{checkpoint} belongs to another recipe: remove it, or name another folder with --out.")
        oracle.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses, seconds = state["losses"], state["seconds"]
    out.mkdir(parents=True, exist_ok=True)
    began = time.process_time() - seconds
    for chunk in range(len(losses) // CHUNK, recipe.steps // CHUNK):
        losses += fit(oracle, chunk, optimizer)
        seconds = time.process_time() - began
        print(json.dumps({"step": len(losses), "loss": round(sum(losses[-CHUNK:]) / CHUNK, 4)}), flush=True)
        state = {"model": oracle.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
        save_atomically(checkpoint, {**state, "seconds": seconds, "recipe": repr(recipe)})
    return oracle.eval(), losses, seconds


# --- a reader of the text -----------------------------------------------------------------------------------------


class TextRows(NamedTuple):
    """Texts of different lengths, each with a question and the mark behind it, then blanks that nobody looks at."""

    tokens: Tensor
    marks: Tensor  # where the answer is read

    def split(self, n: int) -> Iterator["TextRows"]:
        return map(TextRows, self.tokens.split(n), self.marks.split(n))


def text_rows(cuts: Sequence[Cut], which: Tensor, rows: Tensor) -> TextRows:
    """The rows of an oracle with the story up to the cut in place of the placeholders.

    The text stands first, at the positions where `tales` would read it. The blanks come last: attention looks back
    only, so they change nothing before them.
    """
    texts = [torch.tensor(cut.tokens[: cut.end + 1]) for cut in cuts]
    whole = [torch.cat([texts[window], row[WIDTH:]]) for window, row in zip(which.tolist(), rows, strict=True)]
    marks = torch.tensor([len(row) - 1 for row in whole])
    return TextRows(nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=BLANK), marks)


def read_text(reader: Any, texts: TextRows) -> Tensor:
    """The logits at each row's mark."""
    logits: Tensor = reader(texts.tokens[:, : int(texts.marks.max()) + 1])
    return logits[torch.arange(len(logits)), texts.marks]


def text_examples_of_chunk(cuts: Sequence[Cut], recipe: OracleRecipe, chunk: int) -> tuple[TextRows, Tensor]:
    """Texts with questions, and the answers, for `CHUNK` steps of training."""
    rng = random.Random(f"{recipe.seed} {chunk}")
    wordings = {kind: trained_wordings(kind) for kind in TRAINED}
    n = CHUNK * recipe.batch
    n_unanswerable = int(n * recipe.unanswerable)
    parts = [
        oracle_examples([cut.known for cut in cuts], wordings, n - n_unanswerable, rng),
        oracle_examples([cut.unknown for cut in cuts], wordings, n_unanswerable, rng),
    ]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1000 * recipe.seed + chunk))
    which, rows, answers = (torch.cat(part)[order] for part in zip(*parts, strict=True))
    return text_rows(cuts, which, rows), answers


def fit_reader(
    reader: Transformer,
    examples: tuple[TextRows, Tensor],
    recipe: OracleRecipe,
    first: int,
    optimizer: torch.optim.Optimizer,
) -> list[float]:
    """Train all weights, once through all examples, as `fit_oracle` does: the losses.

    Each batch is read in quarters of similar length, so that there are few blanks; their gradients are added up.
    """
    warmup, losses = min(60, recipe.steps // 4 + 1), []
    batches = zip(examples[0].split(recipe.batch), examples[1].split(recipe.batch), strict=True)
    for step, (texts, answers) in enumerate(batches, start=first):
        for group in optimizer.param_groups:
            group["lr"] = cosine_schedule(step, warmup, recipe.steps, recipe.peak_lr, recipe.peak_lr / 50)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for some in texts.marks.argsort().chunk(4):
            logits = read_text(reader, TextRows(texts.tokens[some], texts.marks[some]))
            loss = nn.functional.cross_entropy(logits, answers[some], reduction="sum") / len(answers)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        losses.append(total)
    return losses


def train_reader(
    tales: Any, cuts: Sequence[Cut], recipe: OracleRecipe, out: Path
) -> tuple[Transformer, list[float], float]:
    """Train a reader of the texts up to the cuts, or go on where a run was stopped: it, its losses, and CPU seconds."""

    def fit(reader: Transformer, chunk: int, optimizer: torch.optim.Optimizer) -> list[float]:
        return fit_reader(reader, text_examples_of_chunk(cuts, recipe, chunk), recipe, chunk * CHUNK, optimizer)

    return train_in_chunks(tales, fit, recipe, out)


@torch.no_grad()
def reader_card(reader: Any, test: Sequence[Cut]) -> dict[str, object]:
    """How often a reader of the text is right about stories that training never showed."""

    def measure(types: Sequence[str]) -> tuple[dict[str, float], Tensor]:
        asked, which, rows, answers = all_questions([cut.known for cut in test], types, plainest)
        texts = text_rows(test, which, rows)
        said = torch.empty_like(answers)
        for some in texts.marks.argsort().split(512):
            said[some] = read_text(reader, TextRows(texts.tokens[some], texts.marks[some])).argmax(dim=-1)
        table = accuracy_by_type(asked, said, answers)
        return {kind: table[kind][0] for kind in types}, said

    right, said = measure(TRAINED)
    held_out, _ = measure(HELD_OUT_TYPES)
    return {
        "reader_right": round(sum(right.values()) / len(right), 4),
        "reader_right_by_type": by_type(right),
        "reader_held_out_types_by_type": by_type(held_out),
        "reader_unknown_wrongly": round(float((said == UNKNOWN).float().mean()), 4),
    }


def front_with_reader(front: Mapping[str, object], figures: Mapping[str, object]) -> dict[str, object]:
    """The front matter of a card with a reader's figures in place of those it had, before the licence."""
    items = [(key, value) for key, value in front.items() if not key.startswith("reader_")]
    place = [key for key, _ in items].index("licence")
    return dict([*items[:place], *figures.items(), *items[place:]])


def ship_reader(figures: Mapping[str, object]) -> None:
    """Add a reader's figures to the card of the oracle that ships, and change no other."""
    write_card("oracle", front_with_reader(shipped_card(), figures), prose())


# --- what it can do -----------------------------------------------------------------------------------------------

Asked = tuple[list[str], Tensor, Tensor, Tensor]  # types, which windows, rows, answers


def all_questions(
    questions: Sequence[Sequence[Question]], types: Sequence[str], word: Callable[[str], Wording]
) -> Asked:
    """Every question of these types once, in the wording that `word` gives its type."""
    found = [
        (question, window) for window, its in enumerate(questions) for question in its if question.type in set(types)
    ]
    return (
        [question.type for question, _ in found],
        torch.tensor([window for _, window in found]),
        torch.tensor([oracle_row(word(question.type), question.about) for question, _ in found]),
        torch.tensor([question.answer for question, _ in found]),
    )


def plainest(kind: str) -> Wording:
    return trained_wordings(kind)[0]


def softmax_accuracy(x: Tensor, labels: Tensor, x_test: Tensor, y_test: Tensor, l2: float = 1e-3) -> Tensor:
    """A softmax on standardised activations, by LBFGS, on up to 4000 windows."""
    x, labels = x[:4000], labels[:4000]
    W = torch.zeros(x.shape[1], int(labels.max()) + 1, requires_grad=True)
    b = torch.zeros(W.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([W, b], max_iter=30, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        value = nn.functional.cross_entropy(x @ W + b, labels) + l2 / 2 * W.square().sum()
        W.grad, b.grad = torch.autograd.grad(value, [W, b])
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return ((x_test @ W + b).argmax(dim=-1) == y_test).float().mean()


def mass_mean_accuracy(x: Tensor, labels: Tensor, x_test: Tensor, y_test: Tensor, shrinkage: float) -> Tensor:
    """Chapter 07's mass-mean probe, for many classes: each class's mean, corrected by the covariance within classes."""
    members = nn.functional.one_hot(labels).to(x)
    counts = members.sum(dim=0)
    means = members.T @ x / counts[:, None]
    within = x - means[labels]
    covariance = within.T @ within / len(x)
    covariance += shrinkage * covariance.diagonal().mean() * torch.eye(x.shape[1])
    W = torch.linalg.solve(covariance, means.T)
    b = (counts / counts.sum()).log() - (means * W.T).sum(dim=1) / 2
    return ((x_test @ W + b).argmax(dim=-1) == y_test).float().mean()


def probe_accuracies(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> tuple[float, float]:
    """Of a softmax, and of the best mass-mean probe on the test, which flatters it."""
    classes, labels = y.unique(return_inverse=True)
    places = torch.full((D_VOCAB,), -1)
    places[classes] = torch.arange(len(classes))
    target = places[y_test]
    mass_mean = max(mass_mean_accuracy(x, labels, x_test, target, shrinkage) for shrinkage in (1e-2, 1e-1, 1.0))
    return float(softmax_accuracy(x, labels, x_test, target)), float(mass_mean)


def probes(train: Pool, test: Pool, types: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The accuracies of two linear probes for each type but "mentioned", for which each name would need one."""
    found = {}
    for kind in types:
        sets = []
        for part in (train, test):
            _, which, _, answers = all_questions([cut.known for cut in part.cuts], [kind], plainest)
            sets += [part.windows[which].float().flatten(1), answers]
        if kind != "mentioned":
            found[kind] = probe_accuracies(*sets)
    return found


def says_unknown(oracle: Any, windows: Tensor, rows: Tensor) -> float:
    """How often "unknown" is the answer."""
    return float((answer_probabilities(oracle, windows, rows).argmax(dim=-1) == UNKNOWN).float().mean())


def strange_windows(tales: Any, test: Pool) -> dict[str, Tensor]:
    """Windows in which there is nothing to know."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    windows = test.windows.float()
    untrained = Transformer(tales.cfg)
    init_weights(untrained, 0.02, generator)
    tokens, ends = token_rows(test.cuts)
    random_weights = harvest_windows(untrained, tokens, ends, LAYER, WIDTH)
    spread = random_weights.std(dim=(0, 1))
    return {
        "shuffled": shuffle_windows(windows, generator),
        "shuffled_alike": shuffle_alike(windows, test.ends, generator),
        "noise": torch.randn(windows.shape, generator=generator),
        "zeros": torch.zeros_like(windows),
        "random_weights": (random_weights - random_weights.mean(dim=(0, 1))) / spread,
    }


def by_type(values: dict[str, float]) -> str:
    return ", ".join(f"{kind} {value:.2f}" for kind, value in values.items())


def card(oracle: Any, tales: Any, train: Pool, test: Pool, trained_on: set[str]) -> dict[str, object]:
    """What the oracle can do with stories that training never showed."""
    known, windows = [cut.known for cut in test.cuts], test.windows.float()

    def measure(types: Sequence[str], word: Callable[[str], Wording]) -> tuple[dict[str, Any], Asked, Tensor]:
        asked = all_questions(known, types, word)
        probabilities = answer_probabilities(oracle, windows[asked[1]], asked[2])
        return accuracy_by_type(asked[0], probabilities.argmax(dim=-1), asked[3]), asked, probabilities

    def mean(table: dict[str, Any]) -> float:
        return round(sum(entry[0] for entry in table.values()) / len(table), 4)

    table, (_, which, rows, answers), probabilities = measure(TRAINED, plainest)
    table = {kind: table[kind] for kind in TRAINED}
    held_out_words, _, _ = measure(TRAINED, held_out_wording)
    held_out, _, _ = measure(HELD_OUT_TYPES, plainest)
    probe = probes(train, test, TYPES)
    predicted = probabilities.argmax(dim=-1)
    without = probabilities.clone()
    without[:, UNKNOWN] = 0.0
    gained = (without.argmax(dim=-1) == answers).float().mean() - (predicted == answers).float().mean()
    _, nowhere, senseless, _ = all_questions([cut.unknown for cut in test.cuts], TRAINED, plainest)
    strange = strange_windows(tales, test)
    asked_again = torch.arange(0, len(rows), 7)
    contradicting = {}
    for role in ("first", "latest", "giver", "receiver"):
        both = [
            answer_probabilities(oracle, windows[asked[1]], asked[2]).argmax(dim=-1)
            for asked in (all_questions(known, [f"{what} {role}"], plainest) for what in ("woman", "man"))
        ]
        contradicting[role] = float(contradiction_rate(both[0], both[1], IDS["yes"], IDS["no"]))
    n_probed = sum(kind in probe for kind in TRAINED)
    over = [
        [kind for kind in TRAINED if kind in probe and table[kind][0] >= limit(probe[kind]) + 0.1]
        for limit in (lambda both: both[0], max)
    ]
    return {
        "right": mean(table),
        "right_by_type": by_type({kind: entry[0] for kind, entry in table.items()}),
        "softmax_probe_by_type": by_type({kind: both[0] for kind, both in probe.items()}),
        "mass_mean_probe_by_type": by_type({kind: both[1] for kind, both in probe.items()}),
        "majority_by_type": by_type({kind: entry[1] for kind, entry in (table | held_out).items()}),
        "ten_points_over_softmax_probe": f"{len(over[0])} of {n_probed}: {', '.join(over[0])}",
        "ten_points_over_both_probes": f"{len(over[1])} of {n_probed}: {', '.join(over[1])}",
        "held_out_wordings_right": mean(held_out_words),
        "held_out_wordings_by_type": by_type({kind: held_out_words[kind][0] for kind in TRAINED}),
        "held_out_types_by_type": by_type({kind: entry[0] for kind, entry in held_out.items()}),
        "contradicting_by_type": by_type(contradicting),
        "unknown_senseless": round(says_unknown(oracle, windows[nowhere], senseless), 4),
        **{
            f"unknown_{what}": round(says_unknown(oracle, found[which[asked_again]], rows[asked_again]), 4)
            for what, found in strange.items()
        },
        "unknown_wrongly": round(float((predicted == UNKNOWN).float().mean()), 4),
        "cost_of_unknown": round(float(gained), 4),
        "calibration_error": round(float(expected_calibration_error(probabilities, answers, 10)), 4),
        "test_texts_in_training": round(sum(cut.text in trained_on for cut in test.cuts) / len(test.cuts), 4),
    }


def prose() -> str:
    """What the card says below its figures."""
    return "# oracle\n" + PROSE.format(n_new=D_VOCAB - N_TALES, n_test=N_TEST, n_probed=N_PROBED)


def shipped_card() -> dict[str, str]:
    """The figures of the oracle that ships; none if there is none."""
    return next((card for card in shipped_models() if card["name"] == "oracle"), {})


def make_reader(recipe: OracleRecipe, out: Path, ship: bool) -> None:
    """Train a reader of the text and say how often it is right; its weights stay in the checkpoint."""
    tales = load_pretrained(Transformer, "tales")
    began = time.process_time()
    train = cut_stories(tales.tokenizer, recipe.n_stories, TRAIN_SEED, recipe.per_story)
    gathering = time.process_time() - began
    reader, _, seconds = train_reader(tales, train, recipe, out)
    figures = {
        "reader_steps": recipe.steps,
        "reader_questions": recipe.steps * recipe.batch,
        "reader_cpu_seconds": round(gathering + seconds),
        **reader_card(reader, cut_stories(tales.tokenizer, N_TEST, TEST_SEED, 2)),
    }
    for key, value in figures.items():
        print(f"{key}: {value}")
    if ship:
        ship_reader(figures)
        print("added to", MODELS / "oracle" / "card.md")


def main(argv: list[str] | None = None, recipe: OracleRecipe = RECIPE) -> None:
    """Train the oracle, say what it can do, and keep its weights."""
    parser = argparse.ArgumentParser(description="Train the oracle; a run that was stopped goes on where it was.")
    parser.add_argument("--reader", action="store_true", help="train a reader of the text, to compare with, instead")
    parser.add_argument("--out", type=Path, help="where the checkpoint is kept: runs/oracle, or runs/oracle-reader")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--steps", type=int, help="in hundreds; fewer make a worse oracle sooner")
    parser.add_argument(
        "--ship",
        action="store_true",
        help="replace the model that ships with the course by this one; with --reader, add its figures to the card",
    )
    options = parser.parse_args(argv)
    if options.reader:
        recipe = READER
    recipe = replace(recipe, seed=options.seed, steps=options.steps or recipe.steps)
    out = options.out or Path("runs") / ("oracle-reader" if options.reader else "oracle")
    if options.reader:
        return make_reader(recipe, out, options.ship)
    tales = load_pretrained(Transformer, "tales")
    began = time.process_time()
    raw = pool(tales, recipe.n_stories, TRAIN_SEED, recipe.per_story)
    mean, scale = raw.windows.float().mean(dim=(0, 1)), raw.windows.float().std(dim=(0, 1))
    train, test = raw.scaled(mean, scale), pool(tales, N_TEST, TEST_SEED, 2).scaled(mean, scale)
    gathering = time.process_time() - began
    oracle, losses, seconds = train_oracle(tales, train, recipe, out)
    rounded_to(oracle)
    front = {
        "about": "a copy of tales that reads four of its activations and answers questions about the story in words",
        "data": "course_utils.data.questions, about seeded stories of course_utils.data.tales",
        "recipe": "python -m solutions.recipes.oracle",
        "starts_from": "tales",
        "tokenizer": "tales",
        "seed": recipe.seed,
        "steps": recipe.steps,
        "questions": recipe.steps * recipe.batch,
        "windows": len(train.cuts),
        "cpu_seconds": round(gathering + seconds),
        "parameters": sum(parameter.numel() for parameter in oracle.parameters()),
        **card(oracle, tales, train.first(N_PROBED * recipe.per_story), test, {cut.text for cut in train.cuts}),
        "licence": "MIT",
    }
    for key, value in front.items():
        print(f"{key}: {value}")
    if options.ship:
        tens = [round(sum(losses[end - 10 : end]) / 10, 4) for end in range(10, len(losses) + 1, 10)]
        of_reader = {key: value for key, value in shipped_card().items() if key.startswith("reader_")}
        folder = save_shipped(oracle, None, "oracle", front_with_reader(front, of_reader), prose(), {"loss": tens})
        statistics = {"mean": mean.tolist(), "scale": scale.tolist()}
        (MODELS / "oracle" / "statistics.json").write_text(json.dumps(statistics) + "\n", encoding="utf-8")
        print("written to", folder)


if __name__ == "__main__":
    main()
