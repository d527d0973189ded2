"""What the shipped model `modular-addition` promises, and its recipe on a small scale."""

import json

import pytest
import torch

from course_utils.pretrained import load_history, load_pretrained, shipped_models, shipped_steps, shipped_tokenizer
from solutions.ch02_transformer import Transformer
from solutions.ch13_grokking import (
    answer_loss,
    frequency_norms,
    key_frequencies,
    logit_fit,
    loss_with_frequencies,
    tabulated_logits,
)
from solutions.recipes import modular_addition as recipe
from solutions.recipes import modular_multiplication, modular_others

RECIPES = {"modular-addition": recipe.RECIPE, "modular-multiplication": modular_multiplication.RECIPE}
CARDS = {card["name"]: card for card in shipped_models()}


@pytest.fixture(scope="module", params=RECIPES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> Transformer:
    return load_pretrained(Transformer, name)


def data(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return RECIPES[name].data(RECIPES[name].seed, RECIPES[name].share)


def first_below(entries: list[dict[str, float]], key: str, loss: float = 0.01) -> float:
    return next(entry["step"] for entry in entries if entry[key] < loss)


def test_the_card_is_that_of_the_recipe(name: str, model: Transformer) -> None:
    card, own = CARDS[name], RECIPES[name]
    assert model.cfg == recipe.CFG
    assert (int(card["seed"]), int(card["steps"])) == (own.seed, own.steps)
    assert int(card["parameters"]) == sum(parameter.numel() for parameter in model.parameters())
    assert shipped_tokenizer(name) is None
    assert shipped_steps(name) == list(own.snapshots)
    history = load_history(name)
    assert [entry["step"] for entry in history] == list(range(0, own.steps + 1, 100))
    assert int(card["grokked_at_step"]) == first_below(history, "held_out")


def test_held_out_answers_are_right(name: str, model: Transformer) -> None:
    tokens, answers, is_train = data(name)
    with torch.no_grad():
        logits = tabulated_logits(model, tokens)
    assert (logits.argmax(-1) == answers).float().mean() > 0.999
    held_out = float(answer_loss(logits[~is_train], answers[~is_train]))
    assert held_out == pytest.approx(float(CARDS[name]["held_out_loss"]), rel=0.02)
    assert held_out < 0.01


def test_the_logits_are_five_cosines(name: str, model: Transformer) -> None:
    elements = RECIPES[name].elements
    keys = key_frequencies(model.embed.W_E[elements], 5).tolist()
    assert " ".join(map(str, keys)) == CARDS[name]["key_frequencies"]
    share = float(logit_fit(recipe.logit_grid(model, elements), keys)[1].sum())
    assert share > 0.9 and share == pytest.approx(float(CARDS[name]["logit_share"]), abs=2e-3)


def test_products_are_sums_in_the_order_of_the_powers_only() -> None:
    model, own = load_pretrained(Transformer, "modular-multiplication"), RECIPES["modular-multiplication"]
    usual = torch.arange(1, recipe.P)
    at_random = usual[torch.randperm(len(usual), generator=torch.Generator().manual_seed(0))]
    for order in (usual, at_random):
        keys = key_frequencies(model.embed.W_E[order], 5).tolist()
        assert float(logit_fit(recipe.logit_grid(model, order), keys)[1].sum()) < 0.01
    norms = frequency_norms(model.embed.W_E[own.elements])
    keys = key_frequencies(model.embed.W_E[own.elements], 5)
    assert norms[keys].square().sum() / norms[1:].square().sum() > 0.9


def test_the_model_stands_and_falls_with_its_key_frequencies() -> None:
    model = load_pretrained(Transformer, "modular-addition")
    tokens, answers, _ = data("modular-addition")
    keys = key_frequencies(model.embed.W_E[:-1], 5).tolist()
    others = [k for k in range(1, 30) if k not in keys]
    assert loss_with_frequencies(model, tokens, answers, keys) < 0.01
    assert loss_with_frequencies(model, tokens, answers, others) > 4
    everything = range(1, 30)
    whole = loss_with_frequencies(model, tokens, answers, everything)
    for key in keys:  # the smallest matters least
        assert loss_with_frequencies(model, tokens, answers, [k for k in everything if k != key]) > 5 * whole


def test_restricted_loss_falls_long_before_held_out_loss(name: str) -> None:
    entries = load_history(name)
    memorised, restricted, grokked = (first_below(entries, key) for key in ("train", "restricted", "held_out"))
    assert memorised < restricted < grokked
    assert grokked - restricted >= 1000
    assert max(entry["held_out"] for entry in entries) > 10


@pytest.mark.parametrize("step", recipe.SNAPSHOTS)
def test_snapshots_are_those_of_the_history(step: int) -> None:
    """As float16, and so only nearly."""
    model = load_pretrained(Transformer, "modular-addition", step=step)
    tokens, answers, is_train = data("modular-addition")
    entry = load_history("modular-addition")[step // 100]
    with torch.no_grad():
        held_out = float(answer_loss(tabulated_logits(model, tokens[~is_train]), answers[~is_train]))
    assert held_out == pytest.approx(entry["held_out"], rel=0.02)
    keys = [int(key) for key in CARDS["modular-addition"]["key_frequencies"].split()]
    measured = recipe.measures(recipe.RECIPE, model, keys, is_train.reshape(recipe.P, recipe.P))
    for key in ("excluded", "gini", "squares"):
        assert measured[key] == pytest.approx(entry[key], rel=0.02)


def test_other_trainings_ship_with_their_losses() -> None:
    others = load_history("modular-addition", "others")
    assert others.keys() == modular_others.OTHERS.keys()
    for name, other in modular_others.OTHERS.items():
        assert others[name]["step"] == list(range(0, other.steps + 1, 100))
        first = modular_others.losses(other, steps=0)  # the weights and the split are the recipe's
        for key in ("train", "held_out"):
            assert others[name][key][0] == pytest.approx(first[key][0], rel=1e-3)


def test_the_recipe_of_the_others_writes_their_losses(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(modular_others, "OTHERS", {"slow": modular_others.Other(seed=1, share=0.1)})
    modular_others.run(["--steps", "1"], folder=tmp_path)
    assert capsys.readouterr().out.startswith("slow: not below 0.01 nats by step 0; held-out loss at the end 4.")
    assert not list(tmp_path.iterdir())
    modular_others.run(["--steps", "1", "--ship"], folder=tmp_path)
    assert json.loads((tmp_path / "others.json").read_text())["slow"]["step"] == [0.0]


def test_when_a_training_groks_is_said() -> None:
    found = {"step": [0.0, 100.0, 200.0], "train": [4.0, 0.1, 0.0], "held_out": [4.0, 0.009, 0.001]}
    assert modular_others.said("more", found) == "more: grokked at step 100; held-out loss at the end 0.001"


def test_a_product_has_no_zero() -> None:
    own = modular_multiplication.RECIPE
    tokens, answers, _ = own.data(own.seed, own.share)
    assert len(tokens) == 58**2 and tokens[:, :2].min() == 1
    assert torch.equal(answers, tokens[:, 0] * tokens[:, 1] % 59)
    flags = tokens[:, 0] == 2
    grid = recipe.in_order(own, tokens, flags)
    assert grid[1].all() and int(grid.sum()) == 58  # 2 is the first power of the smallest root, 2


def test_the_recipe_writes_what_it_trained(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(recipe, "save_shipped", lambda *args, **options: pytest.fail("nobody asked for it"))
    recipe.run(recipe.RECIPE, ["--steps", "2", "--out", str(tmp_path)])
    assert "steps: 2" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").exists()


def test_what_ships_says_what_it_is(tmp_path, monkeypatch) -> None:
    kept = {}

    def save(model, tokenizer, name, front, prose, history, snapshots):
        kept.update(front=front, prose=prose, history=history, snapshots=snapshots)
        return tmp_path

    monkeypatch.setattr(recipe, "save_shipped", save)
    small = recipe.GrokkingRecipe("modular-addition", "sum", "about", snapshots=(0,))
    recipe.run(small, ["--steps", "1", "--ship", "--out", str(tmp_path)])
    assert list(kept["snapshots"]) == [0]
    assert [entry["step"] for entry in kept["history"]] == [0]
    assert "sum" in kept["prose"] and "{" not in kept["prose"]
