"""Dictionaries that ship: small enough, and what their cards say, measured anew."""

import pytest

from course_utils import saved_dictionaries
from solutions.ch09_dictionaries import load_dictionary
from solutions.recipes import dictionaries as recipe

LARGEST = 12 * 2**20  # bytes of all dictionaries and transcoders together


def test_what_ships_is_small() -> None:
    sizes = [path.stat().st_size for path in saved_dictionaries.FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) < LARGEST
    own = [path.stat().st_size for name in recipe.RECIPES for path in (saved_dictionaries.FOLDER / name).iterdir()]
    assert sum(own) < 1.6 * 2**20


@pytest.mark.parametrize("name", recipe.RECIPES)
def test_the_card_is_about_the_recipe(name: str) -> None:
    card, own = saved_dictionaries.card(name), recipe.RECIPES[name]
    assert (int(card["d_sae"]), int(card["k"]), int(card["steps"])) == (own.d_sae, own.k, own.steps)
    config, weights = saved_dictionaries.read(name)
    assert config["hook_name"] == own.hook_name and weights["W_dec"].shape == (own.d_sae, 128)


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe.RECIPES)
def test_figures_of_the_card(name: str) -> None:
    own, card = recipe.RECIPES[name], saved_dictionaries.card(name)
    model = recipe.model_of(own)
    figures = recipe.judged(model, load_dictionary(name), recipe.held_out(model, own.hook_name))
    for key, value in figures.items():
        assert value == pytest.approx(float(card[key]), abs=0.006), key


def test_what_the_chapter_promises() -> None:
    real, shuffled = (saved_dictionaries.card(name) for name in ("tales-1-resid", "shuffled-1-resid"))
    assert float(real["loss_recovered"]) > 0.98
    assert float(real["names_f1"]) > 0.5
    assert float(shuffled["names_f1"]) > float(real["names_f1"])  # which is why single names prove little


def test_a_short_training_makes_a_dictionary() -> None:
    own = recipe.DictionaryRecipe("try", "blocks.1.hook_mlp_out", d_sae=32, k=3, steps=20)
    n_tokens, recipe.N_TOKENS = recipe.N_TOKENS, 2000
    try:
        dictionary, losses = recipe.trained(own, recipe.model_of(own), steps=20)
    finally:
        recipe.N_TOKENS = n_tokens
    assert losses[-1] < losses[0] and dictionary.sae.W_dec.shape == (32, 128)


def test_the_sweep_has_every_kind_and_as_many_tries_for_each() -> None:
    tries = saved_dictionaries.record("tales-1-resid", recipe.SWEEP)
    by_kind = {kind: [one for one in tries if one["kind"] == kind] for kind in recipe.SETTINGS}
    assert {len(found) for found in by_kind.values()} == {5 * len(recipe.PEAKS)}
    assert all(
        min(one["l0"] for one in found) < 3 and max(one["l0"] for one in found) > 14 for found in by_kind.values()
    )
