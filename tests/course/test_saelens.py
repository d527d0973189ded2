"""SAELens reads the files of chapter 09 and computes the same from them. Skipped where it is not installed.

`pip install 'circuits-from-scratch[peers]'` installs it.
"""

from pathlib import Path

import pytest
import torch

from solutions.ch06_superposition import SparseAutoencoder
from solutions.ch09_dictionaries import Dictionary, load_dictionary, load_saelens, save_for_saelens

peer = pytest.importorskip("sae_lens", reason="SAELens is not installed (extra `peers`)")
HOOK = "blocks.1.hook_resid_post"


def some_dictionary(kind: str) -> Dictionary:
    """Every parameter random, biases and thresholds included."""
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(12, 31, kind, k=4, generator=generator)
    with torch.no_grad():
        for name, weight in [*sae.named_parameters(), *sae.named_buffers()]:
            if name != "W_dec":
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
        if kind == "batch_topk":
            sae.threshold.fill_(0.3)
    return Dictionary(sae.eval(), HOOK, 1.7)


@pytest.mark.parametrize("kind", ["relu", "topk", "batch_topk", "gated", "jumprelu"])
def test_what_we_write_is_read_there(kind: str, tmp_path: Path) -> None:
    ours = some_dictionary(kind)
    save_for_saelens(ours, tmp_path, "tales")
    theirs = peer.SAE.load_from_disk(str(tmp_path), device="cpu")
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), ours.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.decode(theirs.encode(x)), ours.decode(ours.encode(x)), rtol=1e-5, atol=1e-5)
    assert theirs.cfg.metadata.hook_name == HOOK


@pytest.mark.parametrize("kind", ["relu", "topk", "gated", "jumprelu"])
def test_what_is_written_there_we_read(kind: str, tmp_path: Path) -> None:
    save_for_saelens(some_dictionary(kind), tmp_path / "ours", "tales")
    theirs = peer.SAE.load_from_disk(str(tmp_path / "ours"), device="cpu")
    theirs.save_model(tmp_path / "theirs")
    again = load_saelens(tmp_path / "theirs")
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(again.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-5)


def test_a_dictionary_that_ships(tmp_path: Path) -> None:
    ours = load_dictionary("tales-1-resid")
    save_for_saelens(ours, tmp_path, "tales")
    theirs = peer.SAE.load_from_disk(str(tmp_path), device="cpu")
    x = 6 * torch.randn(50, 128, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), ours.encode(x), rtol=1e-5, atol=1e-5)
