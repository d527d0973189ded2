"""The recipes on a small scale: the same seed gives the same weights, also after a run was stopped half-way."""

import json
import os
import subprocess
import sys
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
from solutions.recipes import processes, stories
from solutions.recipes.evaluation import behaviour, nats_per_story
from solutions.recipes.tokenizer import END_OF_TEXT, train_tokenizer
from tests.models.recipe_in_processes import gradients, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]


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
    recipe = replace(recipe, batch=8, repeated_share=0.5)
    rows = stories.training_batch(tokenizer, recipe, step=3)
    assert rows.shape == (8, recipe.cfg.n_ctx + 1)
    periods = {next(p for p in range(8, len(row)) if torch.equal(row[p:], row[:-p])) for row in rows[4:, 1:]}
    assert len(periods) > 1 and max(periods) <= recipe.cfg.n_ctx // 2
    assert (rows[:, 0] == tokenizer.bos_token_id).all() and (rows[4:, 1:] != tokenizer.bos_token_id).all()


def test_a_recipe_may_begin_with_another_share_of_repeated_rows(recipe) -> None:
    recipe = replace(recipe, batch=8, repeated_share=0.5, early_repeated=(2, 0.25))
    assert [len(stories.repeated_rows(recipe, step)) for step in range(4)] == [2, 2, 4, 4]


def test_every_name_is_one_token_of_the_recipe_s_tokenizer() -> None:
    full = train_tokenizer()
    for name in [*tales.NAMES, *tales.LAST_NAMES]:
        assert len(full.encode(" " + name)) == 1, name


# --- several processes --------------------------------------------------------------------------------------------


def torchrun(n: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=1800, cwd=ROOT
    )


@pytest.mark.slow
def test_two_processes_train_like_one(tokenizer, tmp_path: Path) -> None:
    run = torchrun(2, ROOT / "tests/models/recipe_in_processes.py", tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    recipe = tiny_recipe(len(tokenizer))
    for averaged, alone in zip(result["gradients"], gradients(recipe, tokenizer), strict=True):
        torch.testing.assert_close(averaged, alone, rtol=0, atol=1e-6)
    assert max(gradient.abs().max() for gradient in result["gradients"]) > 0.01  # otherwise agreement would say nothing

    first, second = result["weights"]
    assert torch.equal(first, second)
    assert torch.equal(first, result["uninterrupted"])  # the run was stopped and resumed
    assert {path.name for path in (tmp_path / "process_0").iterdir()} == {
        "checkpoint.pt",
        "snapshot_0.pt",
        "snapshot_3.pt",
    }
    assert not (tmp_path / "process_1").exists()

    _, alone, _ = stories.train(recipe, tokenizer, tmp_path / "alone", log_every=2)
    history = json.loads((tmp_path / "history.json").read_text())
    assert [entry["step"] for entry in history] == [2, 4, 6]
    for ours, theirs in zip(history, alone, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=2e-3)
        assert ours["held_out_nats_per_story"] == pytest.approx(theirs["held_out_nats_per_story"], rel=1e-3)


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_done(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(sys, "argv", ["tiny", "--device", "cpu", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="A batch of 2 rows cannot be shared evenly by 3 processes"):
        stories.main(recipe, "about", "prose")
    assert not (tmp_path / "run").exists()


def test_one_process_is_not_disturbed() -> None:
    batch, model = torch.arange(6).reshape(3, 2), torch.nn.Linear(2, 2)
    assert torch.equal(processes.share(batch), batch) and processes.averaging(model) is model
    assert processes.from_first("state") == "state" and processes.mean_over_processes(1.5, "cpu") == 1.5
    with processes.joined("somewhere") as device:
        assert device == "somewhere" and processes.rank() == 0 and processes.count() == 1


def test_shares_make_up_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.arange(12).reshape(6, 2)
    monkeypatch.setattr(processes, "count", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(processes.share(batch))
    assert [len(share) for share in shares] == [2, 2, 2] and torch.equal(torch.cat(shares), batch)
    with pytest.raises(SystemExit, match="batch of 5 rows cannot be shared evenly by 3 processes"):
        processes.share(batch[:5])
