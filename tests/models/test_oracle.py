"""What the shipped model `oracle` promises, on stories of another seed, and its recipe on a small scale."""

from pathlib import Path
from typing import Any

import pytest
import torch

from course_utils import pretrained
from course_utils.data.questions import (
    ABOUT,
    BLANK,
    D_VOCAB,
    HELD_OUT_TYPES,
    MARK,
    TYPES,
    UNKNOWN,
    WIDTH,
    held_out_wording,
    question_ids,
)
from course_utils.pretrained import load_history, load_pretrained, shipped_models, shipped_tokenizer
from solutions.ch02_transformer import Transformer
from solutions.ch11_oracles import accuracy_by_type, answer_probabilities, shuffle_windows
from solutions.recipes import oracle as recipe

SEED = 424_242
(CARD,) = (card for card in shipped_models() if card["name"] == "oracle")


@pytest.fixture(scope="module")
def oracle() -> Transformer:
    return load_pretrained(Transformer, "oracle")


@pytest.fixture(scope="module")
def test_pool() -> recipe.Pool:
    statistics = load_history("oracle", "statistics")
    mean, scale = torch.tensor(statistics["mean"]), torch.tensor(statistics["scale"])
    return recipe.pool(load_pretrained(Transformer, "tales"), 200, SEED, 2).scaled(mean, scale)


def figures(key: str) -> dict[str, float]:
    return {kind: float(number) for kind, number in (entry.rsplit(" ", 1) for entry in CARD[key].split(", "))}


def test_the_card_is_that_of_the_recipe(oracle: Transformer) -> None:
    assert (int(CARD["seed"]), int(CARD["steps"])) == (recipe.RECIPE.seed, recipe.RECIPE.steps)
    assert int(CARD["questions"]) == recipe.RECIPE.steps * recipe.RECIPE.batch
    assert int(CARD["parameters"]) == sum(parameter.numel() for parameter in oracle.parameters())
    assert oracle.cfg.d_vocab == D_VOCAB
    assert len(shipped_tokenizer("oracle")) == len(shipped_tokenizer("tales"))
    assert len(load_history("oracle")["loss"]) == recipe.RECIPE.steps // 10
    for key in ("right_by_type", "held_out_wordings_by_type"):
        assert figures(key).keys() == set(recipe.TRAINED)
    assert figures("held_out_types_by_type").keys() == set(HELD_OUT_TYPES)
    assert int(CARD["reader_steps"]) == recipe.READER.steps
    assert int(CARD["reader_questions"]) == recipe.READER.steps * recipe.READER.batch
    assert figures("reader_right_by_type").keys() == set(recipe.TRAINED)
    assert figures("reader_held_out_types_by_type").keys() == set(HELD_OUT_TYPES)
    assert (pretrained.MODELS / "oracle" / "card.md").read_text(encoding="utf-8").endswith(recipe.prose())


def test_five_types_are_ten_points_better_than_a_linear_softmax_probe() -> None:
    assert int(CARD["ten_points_over_softmax_probe"].split()[0]) >= 5


@pytest.mark.parametrize("worded", [recipe.plainest, held_out_wording])
def test_questions_about_fresh_stories_are_answered_as_the_card_says(
    oracle: Transformer, test_pool: recipe.Pool, worded: Any
) -> None:
    types, which, rows, answers = recipe.all_questions([cut.known for cut in test_pool.cuts], recipe.TRAINED, worded)
    said = answer_probabilities(oracle, test_pool.windows[which].float(), rows).argmax(dim=-1)
    table = accuracy_by_type(types, said, answers)
    right = sum(entry[0] for entry in table.values()) / len(table)
    key = "right" if worded is recipe.plainest else "held_out_wordings_right"
    assert right == pytest.approx(float(CARD[key]), abs=0.05)
    assert (said == UNKNOWN).float().mean() < 0.02


def test_it_says_so_where_there_is_nothing_to_know(oracle: Transformer, test_pool: recipe.Pool) -> None:
    windows = test_pool.windows.float()
    _, which, rows, _ = recipe.all_questions([cut.unknown for cut in test_pool.cuts], recipe.TRAINED, recipe.plainest)
    assert recipe.says_unknown(oracle, windows[which], rows) >= 0.9
    shuffled = shuffle_windows(windows, torch.Generator().manual_seed(SEED))
    _, which, rows, _ = recipe.all_questions([cut.known for cut in test_pool.cuts], recipe.TRAINED, recipe.plainest)
    assert recipe.says_unknown(oracle, shuffled[which], rows) >= 0.8


def test_mass_mean_probes_of_many_classes_find_what_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    means = 4 * torch.randn(5, 7, generator=generator)
    y = torch.randint(5, (400,), generator=generator)
    x = means[y] + torch.randn(400, 7, generator=generator)
    softmax, mass_mean = recipe.probe_accuracies(x[:300], y[:300] + 20, x[300:], y[300:] + 20)
    assert softmax > 0.9 and mass_mean > 0.9


def test_the_recipe_trains_and_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks at once, or one after the other: the same weights."""
    monkeypatch.setattr(recipe, "CHUNK", 2)
    tales = load_pretrained(Transformer, "tales")
    train = recipe.pool(tales, 12, SEED, 2)
    small = recipe.OracleRecipe(steps=4, n_stories=12, per_story=2, batch=14)
    whole, losses, _ = recipe.train_oracle(tales, train, small, tmp_path / "whole")
    examples = recipe.examples_of_chunk

    def stopped(*arguments: Any) -> Any:
        if arguments[-1] == 1:
            raise KeyboardInterrupt
        return examples(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "examples_of_chunk", stopped)
        with pytest.raises(KeyboardInterrupt):
            recipe.train_oracle(tales, train, small, tmp_path / "halves")
    resumed, again, _ = recipe.train_oracle(tales, train, small, tmp_path / "halves")
    assert losses == again and len(losses) == 4
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    with pytest.raises(SystemExit, match="belongs to another recipe"):
        recipe.train_oracle(tales, train, recipe.OracleRecipe(steps=4, batch=14), tmp_path / "whole")


@pytest.fixture(scope="module")
def asked_of_text(test_pool: recipe.Pool) -> tuple[list[recipe.Cut], torch.Tensor, torch.Tensor, torch.Tensor]:
    cuts = test_pool.cuts[:20]
    _, which, rows, answers = recipe.all_questions([cut.known for cut in cuts], recipe.TRAINED, recipe.plainest)
    return cuts, which, rows, answers


def test_a_reader_is_given_the_text_up_to_the_cut_and_the_question(asked_of_text: Any) -> None:
    cuts, which, rows, _ = asked_of_text
    texts = recipe.text_rows(cuts, which, rows)
    for tokens, mark, window, row in zip(texts.tokens.tolist(), texts.marks, which, rows.tolist(), strict=True):
        text = list(cuts[window].tokens[: cuts[window].end + 1])
        assert tokens[: mark + 1] == text + row[WIDTH:]
        assert tokens[mark] == MARK
        assert set(tokens[mark + 1 :]) <= {BLANK}
    assert len(set(texts.marks.tolist())) > 5, "texts of different lengths"
    assert texts.tokens.shape[1] <= load_pretrained(Transformer, "tales").cfg.n_ctx


def test_blanks_behind_a_question_change_no_answer(oracle: Transformer, asked_of_text: Any) -> None:
    texts = recipe.text_rows(*asked_of_text[:3])
    together = recipe.read_text(oracle, texts)
    for number in range(0, len(texts.marks), 29):
        alone = texts.tokens[number, : texts.marks[number] + 1]
        torch.testing.assert_close(together[number], oracle(alone[None])[0, -1], rtol=1e-4, atol=1e-4)


def test_a_reader_trains_on_whole_batches_though_it_reads_quarters(
    test_pool: recipe.Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "CHUNK", 4)
    tales = load_pretrained(Transformer, "tales")
    small = recipe.OracleRecipe(steps=8, batch=14, shuffled=0.0)
    texts, answers = recipe.text_examples_of_chunk(test_pool.cuts, small, 0)
    assert len(answers) == 56 and (answers == UNKNOWN).sum() == 3
    untrained = recipe.oracle_from(tales, Transformer, torch.Generator().manual_seed(0))
    first = torch.nn.functional.cross_entropy(recipe.read_text(untrained, texts)[:14], answers[:14])
    reader, losses, _ = recipe.train_reader(tales, test_pool.cuts, small, tmp_path)
    assert losses[0] == pytest.approx(first.item(), rel=1e-3)
    assert len(losses) == 8 and losses[-1] < losses[0]
    figures = recipe.reader_card(reader, test_pool.cuts)
    assert all(key.startswith("reader_") for key in figures)


def test_a_readers_figures_change_no_others_of_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (pretrained.MODELS / "oracle" / "card.md").read_text(encoding="utf-8")
    (tmp_path / "oracle").mkdir()
    (tmp_path / "oracle" / "card.md").write_text(card, encoding="utf-8")
    for module in (pretrained, recipe):
        monkeypatch.setattr(module, "MODELS", tmp_path)
    recipe.ship_reader({key: value for key, value in CARD.items() if key.startswith("reader_")})
    assert (tmp_path / "oracle" / "card.md").read_text(encoding="utf-8") == card
    recipe.ship_reader({"reader_right": 0.5})
    changed = (tmp_path / "oracle" / "card.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in changed if line.startswith("reader_")] == ["reader_right: 0.5"]
    assert [line for line in changed if not line.startswith("reader_")] == [
        line for line in card.splitlines() if not line.startswith("reader_")
    ]


def test_examples_for_training_hold_nothing_that_is_held_out() -> None:
    tales = load_pretrained(Transformer, "tales")
    train = recipe.pool(tales, 40, SEED, 2)
    small = recipe.OracleRecipe(steps=1, n_stories=40, per_story=2, batch=20)
    windows, (which, rows, answers) = recipe.examples_of_chunk(train, tales.tokenizer, small, 0)
    wordings = [held_out_wording(kind) for kind in TYPES]
    wordings += [wording for kind in HELD_OUT_TYPES for wording in recipe.trained_wordings(kind)]
    asked = {tuple(row[4:7]) for row in rows.tolist()}
    for wording in wordings:
        if wording[-1] != ABOUT:
            assert tuple(question_ids(wording)) not in asked
    named = question_ids(held_out_wording("mentioned"), about=0)[:2]
    assert not any(list(question[:2]) == named for question in asked)
    assert len(windows) == 3 * len(train.windows)
    assert int(which.max()) < len(windows)
    unknown = answers == UNKNOWN
    assert unknown.float().mean() == pytest.approx(0.14, abs=0.01)
    assert (which >= len(train.windows))[~unknown].sum() == 0
