"""What `pairs` promises, on prompts of another seed than its recipe's."""

import pytest
import torch

from course_utils.data import pairs, tales
from course_utils.pretrained import load_history, load_pretrained, shipped_models
from solutions.ch02_transformer import Transformer
from solutions.ch08_function_vectors import is_right
from solutions.recipes.pairs import RECIPE, VOCABULARY, prompts

SEED = 424_242


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_pretrained(Transformer, "pairs")


def test_the_model_is_that_of_the_recipe(model: Transformer) -> None:
    (card,) = (card for card in shipped_models() if card["name"] == "pairs")
    assert int(card["steps"]) == RECIPE.steps == load_history("pairs")[-1]["step"]
    assert int(card["parameters"]) == sum(parameter.numel() for parameter in model.parameters())
    assert model.cfg.d_vocab == VOCABULARY == len(model.tokenizer)


def test_every_word_and_name_is_one_token(model: Transformer) -> None:
    words = {word for answers in pairs.TASKS.values() for pair in answers.items() for word in pair}
    for word in [*words, *tales.NAMES, *tales.LAST_NAMES]:
        assert len(model.tokenizer.encode(" " + word)) == 1, word


def test_five_tasks_are_learned_in_context_on_pairs_held_out_of_lists(model: Transformer) -> None:
    right = {}
    for task in pairs.TASKS:
        with torch.no_grad():
            right[task] = float(is_right(model, prompts(model.tokenizer, task, "held_out", 5, 40, SEED)).float().mean())
    assert sum(share >= 0.8 for share in right.values()) >= 5, right
