"""The transcoders of `tales`: what their card says, and that they fit the class that an exercise asks for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from course_utils.pretrained import PretrainedError, load_pretrained
from course_utils.shipped_transcoders import TRANSCODERS, load_transcoders, transcoder_card
from solutions.ch02_transformer import Transformer
from solutions.ch10_circuits import Transcoder
from solutions.recipes import transcoders as recipe


def test_what_the_card_of_the_shipped_transcoders_says_is_measured_again() -> None:
    model = load_pretrained(Transformer, "tales", device="cpu").requires_grad_(False)
    card, found = transcoder_card("tales"), recipe.figures(model, load_transcoders(Transcoder, "tales"))
    for key, value in found.items():
        for now, before in zip(str(value).split(", "), card[key].split(", "), strict=True):
            assert float(now) == pytest.approx(float(before), abs=2e-3), key
    assert float(card["recovered"]) > 0.998
    assert max(float(share) for share in card["unexplained"].split(", ")) < 0.06


def test_a_short_training_of_transcoders_learns_something(tmp_path: Path, capsys: Any) -> None:
    recipe.main(["--steps", "9", "--out", str(tmp_path)])
    assert "recovered: " in capsys.readouterr().out
    assert (tmp_path / "transcoders.safetensors").exists()


def test_transcoders_that_are_not_there_or_do_not_fit() -> None:
    with pytest.raises(PretrainedError, match="those of: tales"):
        load_transcoders(Transcoder, "brackets")

    class Another(Transcoder):
        def __init__(self, *sizes: Any) -> None:
            super().__init__(*sizes)
            self.W_skip = torch.nn.Parameter(torch.zeros(1))

    with pytest.raises(PretrainedError, match="do not fit"):
        load_transcoders(Another, "tales")


def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tales"
    folder.mkdir()
    for file in (TRANSCODERS / "tales").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with (folder / "transcoders.safetensors").open("ab") as file:
        file.write(b"x")
    monkeypatch.setattr("course_utils.shipped_transcoders.TRANSCODERS", tmp_path)
    with pytest.raises(PretrainedError, match="SHA-256"):
        load_transcoders(Transcoder, "tales")


def test_they_are_small() -> None:
    assert sum(file.stat().st_size for file in TRANSCODERS.rglob("*") if file.is_file()) < 3e6
