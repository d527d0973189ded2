"""What the shipped models `brackets` and `brackets-fooled` promise, and their recipe on a small scale."""

import pytest
import torch

from course_utils.data.brackets import END, N_CTX, START, random_balanced
from course_utils.pretrained import load_history, load_pretrained, shipped_models, shipped_tokenizer
from solutions.ch02_transformer import Transformer
from solutions.ch12_brackets import (
    bracket_dataset,
    corrupted_pairs,
    failures,
    hill_climb,
    is_balanced_batch,
    scores_with_patch,
    unbalanced_scores,
)
from solutions.recipes import brackets as recipe
from solutions.recipes import brackets_fooled

RECIPES = {"brackets": recipe.RECIPE, "brackets-fooled": brackets_fooled.RECIPE}
CARDS = {card["name"]: card for card in shipped_models()}
SEED = 424_242  # of no training batch and no evaluation in a recipe


@pytest.fixture(scope="module", params=RECIPES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> Transformer:
    return load_pretrained(Transformer, name)


def fresh(n: int) -> torch.Tensor:
    return bracket_dataset(n, N_CTX, torch.Generator().manual_seed(SEED))[0]


def test_the_card_is_that_of_the_recipe(name: str, model: Transformer) -> None:
    card = CARDS[name]
    assert model.cfg == recipe.CFG
    assert (int(card["seed"]), int(card["steps"])) == (RECIPES[name].seed, RECIPES[name].steps)
    assert int(card["texts"]) == RECIPES[name].n_texts
    assert int(card["parameters"]) == sum(parameter.numel() for parameter in model.parameters())
    assert shipped_tokenizer(name) is None
    assert len(load_history(name)["loss"]) == RECIPES[name].steps // 10


def test_fresh_texts_are_judged_right(name: str, model: Transformer) -> None:
    assert float(CARDS[name]["held_out"]) >= 0.998
    assert recipe.right(model, fresh(5000)) >= (0.999 if name == "brackets" else 0.98)


def test_the_card_says_how_near_misses_are_judged(name: str, model: Transformer) -> None:
    for kind, rows in recipe.near_misses(3000).items():
        assert recipe.right(model, rows) == pytest.approx(float(CARDS[name][f"near_miss_right_{kind}"]), abs=2e-3)


def test_one_can_be_fooled_and_the_other_was_not() -> None:
    """Fresh near misses, and a search from them: the one judges them all right."""
    near = torch.cat([rows[-200:] for rows in recipe.near_misses(3000).values()])
    wrong = {name: 1 - recipe.right(load_pretrained(Transformer, name), near) for name in RECIPES}
    assert wrong["brackets"] == 0 and wrong["brackets-fooled"] > 0.2
    assert CARDS["brackets"]["fooled_by_climbing"] == "0 of 150"
    found = {}
    for name in RECIPES:
        searched = load_pretrained(Transformer, name)
        texts = hill_climb(searched, near[::15], torch.Generator().manual_seed(SEED), 100)
        assert not is_balanced_batch(texts).any()
        with torch.no_grad():
            found[name] = int((unbalanced_scores(searched, texts) < 0).sum())
    assert found["brackets"] == 0 and found["brackets-fooled"] > 0


def test_two_components_detect_two_failures(model: Transformer) -> None:
    """Each turns the verdict for its failure, and does not for the other: what the lesson shows causally."""
    generator = torch.Generator().manual_seed(SEED)
    clean = torch.full((200, N_CTX), START)
    clean[:, 1:-1], clean[:, -1] = random_balanced(200, 20, generator), END
    components = [f"head {layer}.{head}" for layer in range(2) for head in range(2)] + ["mlp 0"]
    turned = {}
    for kind in ("total", "order"):
        corrupted = corrupted_pairs(clean, kind, generator)
        assert failures(corrupted)[kind == "order"].all() and not failures(corrupted)[kind == "total"].any()
        for component in components:
            scores = scores_with_patch(model, clean, corrupted, component, clean == END)
            turned[kind, component] = float((scores > 0).float().mean())
    total, order = (
        max(components, key=lambda component, kind=kind: turned[kind, component]) for kind in ("total", "order")
    )
    assert total == "mlp 0" and order.startswith("head 1.")
    assert turned["total", total] > 0.5 and turned["order", total] < 0.05
    assert turned["order", order] > 0.75 and turned["total", order] < 0.05


def test_the_recipe_writes_what_it_trained(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(recipe, "save_shipped", lambda *args, **options: pytest.fail("nobody asked for it"))
    monkeypatch.setattr(recipe, "fooled", lambda *args: [])
    small = recipe.BracketRecipe("brackets", 1, 0, 2000, 300, recipe.SHARES, "about", "trained", "fooled")
    recipe.run(small, ["--steps", "3", "--out", str(tmp_path)])
    assert "steps: 3" in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").exists()
