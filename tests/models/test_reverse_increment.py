"""What the shipped model `reverse-increment` promises, and the recipe on a small scale."""

import pytest
import torch

from course_utils.pretrained import load_history, load_pretrained, shipped_models, shipped_tokenizer
from solutions.ch02_transformer import Transformer
from solutions.ch03_training import reverse_increment_dataset, zero_ablated
from solutions.recipes import reverse_increment as recipe

NAME = "reverse-increment"
(CARD,) = (card for card in shipped_models() if card["name"] == NAME)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_pretrained(Transformer, NAME)


def test_the_card_is_that_of_the_recipe(model: Transformer) -> None:
    assert model.cfg == recipe.SETUPS["as shipped"].cfg
    assert int(CARD["seed"]) == recipe.SEED and int(CARD["steps"]) == recipe.STEPS
    assert int(CARD["parameters"]) == sum(parameter.numel() for parameter in model.parameters())
    assert shipped_tokenizer(NAME) is None


def test_every_held_out_sequence_is_right(model: Transformer) -> None:
    train, held_out = recipe.split(recipe.SEED)
    assert (len(train), len(held_out)) == (60_000, 5_536)
    assert recipe.right(model, held_out).all()
    assert float(CARD["held_out"]) == 1.0


def test_the_split_deals_out_every_sequence_once() -> None:
    rows = torch.cat(recipe.split(5))
    assert not torch.equal(rows, torch.cat(recipe.split(6)))
    assert torch.equal(torch.unique(rows, dim=0), reverse_increment_dataset())


def test_attention_is_on_the_anti_diagonal(model: Transformer) -> None:
    """The largest mean weight is on the digit that the output is made of."""
    _, held_out = recipe.split(recipe.SEED)
    right = recipe.anti_diagonal(recipe.mean_pattern(model, held_out))
    assert right >= 6
    assert CARD["anti_diagonal"] == f"{right} of 8"


@pytest.mark.parametrize(
    ("parameter", "entry"), [("blocks.0.mlp.W_out", "without_W_out"), ("blocks.0.attn.W_O", "without_W_O")]
)
def test_ablations_cost_what_the_card_says(model: Transformer, parameter: str, entry: str) -> None:
    everything = reverse_increment_dataset()
    with zero_ablated(model, parameter):
        share = float(recipe.right(model, everything).float().mean())
    assert share == pytest.approx(float(CARD[entry]), abs=2e-3)
    assert share < 0.6
    assert recipe.right(model, everything).all()  # the weights are back


def test_without_the_head_chance_decides(model: Transformer) -> None:
    """What the lesson derives: an answer then depends on one token, which tells nothing of outputs 2 to 8."""
    with zero_ablated(model, "blocks.0.attn.W_O"):
        by_output = recipe.right(model, reverse_increment_dataset()).float().mean(dim=0)
    assert (by_output[1:] <= 0.25 + 1e-6).all()
    assert float(by_output[0] * 4) == pytest.approx(round(float(by_output[0] * 4)))


def test_the_history_shows_runs_that_got_stuck() -> None:
    history = load_history(NAME)
    runs = history["survey"]
    assert [(run["setup"], run["seed"]) for run in runs] == [(n, s) for n in recipe.SETUPS for s in recipe.SEEDS]
    solved = {name: sum(run["held_out"] == 1 for run in runs if run["setup"] == name) for name in recipe.SETUPS}
    assert solved["as shipped"] == len(recipe.SEEDS)
    assert all(solved[name] < len(recipe.SEEDS) for name in recipe.SETUPS if name != "as shipped")
    assert history["run"] in runs
    assert all(len(run["loss"]) == recipe.STEPS // 10 for run in runs)


def test_the_recipe_writes_what_it_trained(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(recipe, "save_shipped", lambda *args, **options: pytest.fail("nobody asked for it"))
    recipe.main(["--seed", "1", "--steps", "20", "--out", str(tmp_path)])
    assert "steps: 20" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").exists()


def test_the_same_seed_gives_the_same_model() -> None:
    first, again, other = (recipe.run("tiny", recipe.Setup(), seed, steps=20)[1] for seed in (0, 0, 1))
    assert first == again
    assert first["loss"] != other["loss"]
