"""What the shipped model `othello-6` promises, and its recipe on a small scale."""

import json

import pytest
import torch
from safetensors.torch import load_file

from course_utils.data.othello import random_games, with_bos
from course_utils.pretrained import load_history, load_pretrained, shipped_models, shipped_tokenizer
from solutions.ch02_transformer import Transformer
from solutions.recipes import othello_6 as recipe

(CARD,) = (card for card in shipped_models() if card["name"] == "othello-6")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_pretrained(Transformer, "othello-6").eval()


def test_the_card_is_that_of_the_recipe(model: Transformer) -> None:
    assert model.cfg == recipe.CFG
    assert (int(CARD["seed"]), int(CARD["steps"])) == (recipe.SEED, recipe.STEPS)
    assert int(CARD["tokens"]) == recipe.STEPS * recipe.BATCH * recipe.N_CTX
    assert int(CARD["parameters"]) == sum(parameter.numel() for parameter in model.parameters())
    assert shipped_tokenizer("othello-6") is None
    history = load_history("othello-6")
    assert [entry["step"] for entry in history] == list(range(1000, recipe.STEPS + 1, 1000))


def test_it_plays_as_its_card_says(model: Transformer) -> None:
    measured = recipe.behaviour(model, recipe.held_out_games())
    for key, value in measured.items():
        assert value == pytest.approx(float(CARD[key]), abs=0.002), key
    assert measured["illegal"] < 0.05
    assert measured["held_out_loss"] - measured["floor"] < 0.3


def test_its_board_is_mine_and_theirs(model: Transformer) -> None:
    """The figures of the card, and what the chapter says of them."""
    found = recipe.figures(model)
    for key, value in found.items():
        assert value == pytest.approx(float(CARD[key]), abs=0.05), key
    assert float(CARD["probe_mine_theirs"]) - float(CARD["probe_black_white"]) > 0.15
    assert float(CARD["errors_edited_means"]) < 0.8 * float(CARD["errors_edited_none"])
    assert float(CARD["errors_edited_pushed"]) < 0.5 * float(CARD["errors_edited_none"])
    assert abs(float(CARD["errors_edited_random"]) - float(CARD["errors_edited_none"])) < 0.15


def test_the_quick_forward_is_the_models_own(model: Transformer) -> None:
    tokens = with_bos(random_games(8, 6, torch.Generator().manual_seed(0), 31))
    with torch.no_grad():
        quick, own = recipe.logits_in_bfloat16(model, tokens), model(tokens)
    assert (quick.softmax(-1) - own.softmax(-1)).abs().max() < 0.05
    assert (quick.softmax(-1) - own.softmax(-1)).abs().mean() < 0.001


def test_a_run_goes_on_where_it_stopped(tmp_path, capsys) -> None:
    whole, _, _ = recipe.train(3, 6, tmp_path / "whole", "cpu", every=3)
    first = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    assert first["step"] == 6
    assert [json.loads(line.partition("}")[0] + "}")["step"] for line in capsys.readouterr().out.splitlines()] == [3, 6]
    again, _, _ = recipe.train(3, 6, tmp_path / "whole", "cpu", every=3)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    with pytest.raises(SystemExit, match="another run"):
        recipe.train(4, 6, tmp_path / "whole", "cpu", every=3)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    rates = [recipe.learning_rate(step, 10_000) for step in (0, 199, 5000, 6999, 8500, 9999)]
    assert rates[0] < rates[1] == rates[2] == rates[3] == recipe.PEAK_LR
    assert rates[4] == pytest.approx(recipe.PEAK_LR / 2)
    assert rates[5] == pytest.approx(recipe.PEAK_LR / 50)


def test_the_program_writes_weights(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(recipe, "figures", lambda model: {})
    monkeypatch.setattr(recipe, "held_out_games", lambda: random_games(4, 6, torch.Generator().manual_seed(0), 32))
    recipe.main(["--out", str(tmp_path), "--steps", "2", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "illegal: " in printed
    assert "steps: 2" in printed
    assert load_file(tmp_path / "model.safetensors").keys() == Transformer(recipe.CFG).state_dict().keys()
