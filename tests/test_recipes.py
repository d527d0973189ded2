"""The recipes on a small scale: the same seed gives the same weights, also after a run was stopped half-way."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from course_utils import pretrained
from course_utils.config import TransformerConfig
from course_utils.data import tales
from course_utils.pretrained import load_pretrained, save_shipped, shipped_steps
from solutions.recipes import stories
from solutions.recipes.evaluation import behaviour, nats_per_story
from solutions.recipes.tokenizer import END_OF_TEXT, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(vocabulary=400, n_stories=500)


@pytest.fixture
def recipe(tokenizer) -> stories.Recipe:
    cfg = TransformerConfig(len(tokenizer), n_ctx=160, n_layers=1, n_heads=2, d_model=8, d_head=4, d_mlp=16)
    return stories.Recipe("tiny", cfg, steps=6, batch=2, warmup=2)


def first_four(measure, model, tokenizer, seed: int, n: int):
    return measure(model, tokenizer, seed, n=4)


@pytest.fixture(autouse=True)
def short_evaluations(monkeypatch) -> None:
    monkeypatch.setattr(stories, "nats_per_story", partial(first_four, nats_per_story))
    monkeypatch.setattr(stories, "behaviour", partial(first_four, behaviour))


class Killed(BaseException):
    """What a kill looks like from inside."""


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_resumed_run_equals_an_uninterrupted_one(recipe, tokenizer, tmp_path: Path, monkeypatch) -> None:
    whole, history, _ = stories.train(recipe, tokenizer, tmp_path / "whole", log_every=2)
    batch = stories.training_batch

    def killed_at_step_5(tokenizer, recipe, step):
        if step == 5:
            raise Killed
        return batch(tokenizer, recipe, step)

    with monkeypatch.context() as patch:
        patch.setattr(stories, "training_batch", killed_at_step_5)
        with pytest.raises(Killed):
            stories.train(recipe, tokenizer, tmp_path / "halves", log_every=2)
    resumed, resumed_history, _ = stories.train(recipe, tokenizer, tmp_path / "halves", log_every=2)
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed_history == history
    assert [entry["step"] for entry in history] == [2, 4, 6]


def test_another_seed_gives_another_model(recipe, tokenizer, tmp_path: Path) -> None:
    first, _, _ = stories.train(recipe, tokenizer, tmp_path / "0", log_every=6)
    again, _, _ = stories.train(recipe, tokenizer, tmp_path / "again", log_every=6)
    other, _, _ = stories.train(replace(recipe, seed=1), tokenizer, tmp_path / "1", log_every=6)
    assert torch.equal(weights(first), weights(again))
    assert not torch.allclose(weights(first), weights(other))


def test_snapshots_are_the_weights_on_the_way(recipe, tokenizer, tmp_path: Path, monkeypatch) -> None:
    recipe = replace(recipe, snapshots=(0, 3, 6, 100))
    model, history, _ = stories.train(recipe, tokenizer, tmp_path / "run", log_every=6)
    snapshots = stories.load_snapshots(recipe, tmp_path / "run")
    assert list(snapshots) == [0, 3, 6]
    assert all(torch.equal(snapshots[6][name], weight) for name, weight in model.state_dict().items())
    assert not torch.equal(snapshots[0]["embed.W_E"], snapshots[3]["embed.W_E"])
    assert not list((tmp_path / "run").glob("*.partial"))
    monkeypatch.setattr(pretrained, "MODELS", tmp_path / "models")
    save_shipped(model, None, "tiny", {}, "", history, snapshots)
    shipped = load_pretrained(stories.Transformer, "tiny", step=3)
    assert shipped_steps("tiny") == [0, 3, 6]
    for name, weight in shipped.state_dict().items():
        torch.testing.assert_close(weight, snapshots[3][name], rtol=1e-3, atol=1e-6)
    (tmp_path / "run/snapshot_3.pt").unlink()
    with pytest.raises(SystemExit, match=r"lacks the snapshots of steps \[3\]"):
        stories.load_snapshots(recipe, tmp_path / "run")


def test_a_checkpoint_of_another_recipe_is_refused(recipe, tokenizer, tmp_path: Path) -> None:
    stories.train(recipe, tokenizer, tmp_path, log_every=6)
    with pytest.raises(SystemExit, match="belongs to another recipe"):
        stories.train(replace(recipe, peak_lr=1.0), tokenizer, tmp_path, log_every=6)


def test_a_batch_holds_whole_stories_one_after_another(recipe, tokenizer) -> None:
    rows = stories.training_batch(tokenizer, recipe, step=3)
    assert rows.shape == (recipe.batch, recipe.cfg.n_ctx + 1)
    for row in rows:
        assert row[0] == tokenizer.bos_token_id
        complete = tokenizer.decode(row.tolist()).split(END_OF_TEXT)[1:-1]
        assert all(tales.parse(text) for text in complete)
    assert not torch.equal(rows, stories.training_batch(tokenizer, recipe, step=4))


def test_learning_rate_rises_then_falls(recipe) -> None:
    recipe = replace(recipe, steps=100, warmup=10)
    rates = [stories.learning_rate(recipe, step) for step in range(100)]
    assert rates[0] == pytest.approx(recipe.peak_lr / 10)
    assert rates[9] == rates[10] == pytest.approx(recipe.peak_lr)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert rates[-1] < recipe.peak_lr / 40


def test_repeated_rows_repeat_what_they_hold(recipe, tokenizer) -> None:
    recipe = replace(recipe, batch=16, repeated_share=0.5)
    rows = stories.training_batch(tokenizer, recipe, step=3)
    assert rows.shape == (16, recipe.cfg.n_ctx + 1)
    assert (rows[:, 0] == tokenizer.bos_token_id).all() and (rows[8:, 1:] != tokenizer.bos_token_id).all()
    second_half = rows[8:, recipe.cfg.n_ctx // 2 + 1 :]
    periods = {next((p for p in range(8, 79) if torch.equal(row[p:], row[:-p])), 0) for row in second_half}
    assert len(periods) > 2 and max(periods) <= recipe.cfg.n_ctx // 2
    assert len({len(row.unique()) for row in rows[8:]}) > 4


def test_every_name_is_one_token_of_the_recipe_s_tokenizer() -> None:
    full = train_tokenizer()
    for name in [*tales.NAMES, *tales.LAST_NAMES]:
        assert len(full.encode(" " + name)) == 1, name
