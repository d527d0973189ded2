"""Chapter 03's checkpoints: wrong answers that their checks do not know, and right ones written another way.

At the end: a training run that is killed, again and again.
"""

import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import solutions.ch03_training as ref
from course_utils.checks.ch03.checkpoints import plain_data, saving
from course_utils.config import TransformerConfig
from solutions.ch02_transformer import Transformer, init_weights
from tests.ch03 import other_training_loop as other
from tests.conftest import ROOT

SECRETS = ("fsync", "hasattr(", "map_location")
ONLY_ON_GPU = "map_location="


def in_half_precision(data: dict[str, Any], objects: Any) -> dict[str, Any]:
    return data | {"model": {name: values.half() for name, values in data["model"].items()}}


def only_of_torch(state: dict[str, Any]) -> dict[str, Any]:
    """What has a state_dict is told by its class; others are stored as they are, which cannot be."""
    kinds = (torch.nn.Module, torch.optim.Optimizer)
    return {
        name: vars(type(value)) if hasattr(value, "state_dict") and not isinstance(value, kinds) else value
        for name, value in state.items()
    }


SURPRISES: dict[str, list[tuple[str, Any]]] = {
    "save_checkpoint": [
        (
            "stored['optimizer']['state']",
            saving(lambda data, _: data | {"optimizer": data["optimizer"] | {"state": {}}}),
        ),
        ("got 2.0", saving(lambda data, _: data | {"step": float(data["step"])})),
        ("your code raised", lambda path, **state: ref.save_checkpoint(path, **only_of_torch(state))),
        ("that nobody stored", saving(lambda data, _: data | {"version": 1})),
        (
            "at `stored['best']` expected a Tensor",
            saving(lambda data, _: data | {"best": data["best"].tolist()}),
        ),
        ("torch.float16 of shape", saving(in_half_precision)),
        ("cannot read the file", saving(lambda data, objects: data | {"model": objects["model"]})),
    ],
    "load_checkpoint": [
        ("made it run", lambda path: torch.load(path, weights_only=False)),
        ("written on another machine's GPU", lambda path: torch.load(path, weights_only=True)),
        (
            "has no entry 'generator'",
            lambda path: {k: v for k, v in ref.load_checkpoint(path).items() if k != "generator"},
        ),
        ("should raise FileNotFoundError", lambda path: ref.load_checkpoint(path) if path.exists() else {}),
        ("it changed the file", lambda path: (ref.load_checkpoint(path), path.unlink())[0]),
        ("returned None", lambda path: None if ref.load_checkpoint(path) else {}),
        ("your code raised UnpicklingError", lambda path: pickle.loads(path.read_bytes())),
    ],
}


def written(words: str) -> Callable[..., Any]:
    """Note a way of writing that loses a checkpoint."""

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        SURPRISES["save_checkpoint"].append((words, function))
        return function

    return note


def in_memory(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(plain_data(state), buffer)
    return buffer.getvalue()


@written("when the writing broke off half-way")
def _(path: Path, **state: Any) -> None:
    torch.save(plain_data(state), path)


@written("a Path among the values should raise ValueError")
def _(path: Path, **state: Any) -> None:
    torch.save(plain_data(state), path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


@written("it writes into the file that stands at `path`")
def _(path: Path, **state: Any) -> None:
    content = in_memory(state)
    path.write_bytes(content)


@written("it writes into the file that stands at `path`")
def _(path: Path, **state: Any) -> None:
    new = path.with_suffix(".new")
    torch.save(plain_data(state), new)
    shutil.copyfile(new, path)
    new.unlink()


@written("leaves a file `run.new` behind")
def _(path: Path, **state: Any) -> None:
    torch.save(plain_data(state), path.with_suffix(".new"))
    shutil.copyfile(path.with_suffix(".new"), path)


@written("when the writing broke off half-way")
def _(path: Path, **state: Any) -> None:
    if path.exists():
        path.unlink()
    torch.save(plain_data(state), path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


@written("removed before the new one was in its place")
def _(path: Path, **state: Any) -> None:
    torch.save(plain_data(state), path.with_suffix(".new"))
    path.unlink(missing_ok=True)
    path.with_suffix(".new").rename(path)


@written("written in another folder")
def _(path: Path, **state: Any) -> None:
    elsewhere = path.parent.parent / f"elsewhere_{os.getpid()}.pt"
    torch.save(plain_data(state), elsewhere)
    shutil.move(elsewhere, path)


@written("was not complete at that moment")
def _(path: Path, **state: Any) -> None:
    new = path.with_suffix(".new")
    content = in_memory(state)
    with new.open("wb") as file:
        file.write(content[:1000])
        file.flush()
        os.replace(new, path)
        file.write(content[1000:])


@written("there is no file at `path`")
def _(path: Path, **state: Any) -> None:
    torch.save(plain_data(state), path.with_suffix(".checkpoint"))


@written("it drew from the generator")
def _(path: Path, **state: Any) -> None:
    ref.save_checkpoint(path, **state)
    torch.randn(1, generator=state["generator"])


@written("it changed `model.weight` in place")
def _(path: Path, **state: Any) -> None:
    ref.save_checkpoint(path, **state)
    state["model"].weight.data.add_(1)


ALSO_RIGHT = {"save_checkpoint": [other.save_checkpoint], "load_checkpoint": [other.load_checkpoint]}

# Changes after which the reference still does what its statement says.
STILL_RIGHT = {
    "path.name + '.partial' -> '.partial'",
    "file.fileno() -> file",  # fsync takes both
}


# ---------------------------------------------------------------------------------------- the chapter's parts together

ROTARY: dict[str, Any] = {"positions": "rotary", "rotary_dim": 2, "parallel": True, "d_mlp": 12}


@pytest.mark.parametrize("module", [ref, other], ids=["reference", "other"])
@pytest.mark.parametrize("kind", [{"d_mlp": 12}, ROTARY, {"attn_only": True, "normalization": "none"}])
def test_our_own_optimizer_goes_on_from_a_checkpoint(module: Any, kind: dict[str, Any], tmp_path: Path) -> None:
    """Stopped after three steps and loaded into another model and optimizer: the rest is that of a run left alone."""
    cfg = TransformerConfig(d_vocab=17, n_ctx=9, n_layers=2, n_heads=2, d_model=8, d_head=4, **kind)
    batches = torch.randint(17, (5, 4, 9), generator=torch.Generator().manual_seed(1))

    def fresh(seed: int) -> tuple[Any, Any]:
        model = Transformer(cfg)
        init_weights(model, 0.3, torch.Generator().manual_seed(seed))
        groups = module.parameter_groups(model, weight_decay=0.1)
        return model, module.AdamW(groups, lr=0.05, betas=(0.8, 0.9))

    model, optimizer = fresh(0)
    for step, batch in enumerate(batches):
        if step == 3:
            optimizer.param_groups[1]["lr"] = 0.02
            module.save_checkpoint(tmp_path / "run.pt", model=model, optimizer=optimizer, step=step)
        module.train_step(model, optimizer, batch, max_norm=1.0)
    stored = module.load_checkpoint(tmp_path / "run.pt")
    again, restored = fresh(7)
    again.load_state_dict(stored["model"])
    restored.load_state_dict(stored["optimizer"])
    assert [group["lr"] for group in restored.param_groups] == [0.05, 0.02]
    for batch in batches[stored["step"] :]:
        module.train_step(again, restored, batch, max_norm=1.0)
    for (name, weights), alone in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(weights, alone), name
    for ours, theirs in zip(tree_leaves(restored.state_dict()), tree_leaves(optimizer.state_dict()), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


# ------------------------------------------------------------------------------------------------------- when killed

TRAINING = """
import sys
from pathlib import Path

import torch
from torch import nn

from solutions.ch03_training import AdamW, cosine_schedule, load_checkpoint, save_checkpoint, train_step

path, n_steps = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(50, 32), nn.Dropout(0.2), nn.Linear(32, 50))
optimizer = AdamW(model.parameters(), weight_decay=0.1)
data = torch.Generator().manual_seed(1)
first, ballast = 0, torch.zeros(1_000_000)  # a large file: a kill often finds it half-written
if path.exists():
    state = load_checkpoint(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    data.set_state(state["data"])
    torch.set_rng_state(state["dropout"])
    first = state["step"]
print("from", first, flush=True)
for step in range(first, n_steps):
    sys.stdin.readline()  # the go-ahead, so that a run that is to be killed is not over before
    for group in optimizer.param_groups:
        group["lr"] = cosine_schedule(step, 5, n_steps, 0.1, 0.01)
    train_step(model, optimizer, torch.randint(50, (8, 12), generator=data), max_norm=1.0)
    dropout = torch.get_rng_state()
    save_checkpoint(path, model=model, optimizer=optimizer, data=data, dropout=dropout, step=step + 1, ballast=ballast)
    print(step + 1, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """kill -9 at different moments of a step; the weights in the end are those of a run that was left alone."""
    n_steps = 40
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(path: Path, goes_on: int | None = None) -> subprocess.Popen:
        command = [sys.executable, "-c", TRAINING, str(path), str(n_steps)]
        told = subprocess.DEVNULL if goes_on is None else subprocess.PIPE
        run = subprocess.Popen(command, stdin=told, stdout=subprocess.PIPE, text=True, env=environment)
        if run.stdin is not None and goes_on is not None:
            run.stdin.write("\n" * goes_on)
            run.stdin.flush()
        return run

    whole, broken = tmp_path / "whole.pt", tmp_path / "broken.pt"
    left_alone = start(whole)
    begun = []
    for n_before_kill, wait in [(3, 0.0), (6, 0.004), (5, 0.011)]:
        run = start(broken, goes_on=n_before_kill + 1)
        assert run.stdin is not None and run.stdout is not None
        begun.append(int(run.stdout.readline().split()[1]))
        for _ in range(n_before_kill):
            run.stdout.readline()
        time.sleep(wait)
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdin.close()
        run.stdout.close()
        ref.load_checkpoint(broken)  # whatever the moment, it can be read
    assert begun[0] == 0 < begun[1] < begun[2]
    with start(broken) as run:
        run.communicate()
    left_alone.communicate()
    assert run.returncode == left_alone.returncode == 0
    ours, theirs = ref.load_checkpoint(broken), ref.load_checkpoint(whole)
    assert ours["step"] == theirs["step"] == n_steps
    for name, weights in theirs["model"].items():
        assert torch.equal(ours["model"][name], weights), name
    assert torch.equal(ours["data"], theirs["data"])
