"""Training a dictionary, against SAELens and `dictionary_learning` where they are installed: activations per second.

All train a TopK autoencoder of 1024 latents on batches of 512 random activations of width 128, in float32, with Adam
and a loss that revives latents after 5 silent batches. On such data hardly any latent is ever that silent; where none
is, `dictionary_learning` and the course leave this loss out. The data cost nothing, so that only the training is
measured.

SAELens is in the extra `peers`. `dictionary_learning` cannot be: its release (PyPI: dictionary-learning 0.1.0) wants
nnsight below 0.4, and chapter 08 needs a later one. Its trainer runs all the same, beside the extra:
`pip install --no-deps dictionary-learning`, then `datasets` and `zstandard`, which it imports.

For 30 steps on one core of an AMD EPYC with AVX2, the other one busy, the course took 591 ms, `dictionary_learning` 599
and SAELens 828: the aim, at least as fast, is met. Most of the time are matrix products and room for [512, 1024]
numbers that are made anew in each step.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from solutions.ch06_superposition import SparseAutoencoder
from solutions.ch09_dictionaries import fit_dictionary

D_IN, D_SAE, K, BATCH, STEPS = 128, 1024, 6, 512, 30


def batches() -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8 * BATCH, D_IN, generator=generator)
    return lambda: rows[torch.randint(len(rows), (BATCH,), generator=generator)]


def test_ours(benchmark: Any) -> None:
    def train() -> None:
        sae = SparseAutoencoder(D_IN, D_SAE, "topk", k=K, generator=torch.Generator().manual_seed(0))
        fit_dictionary(sae, batches(), STEPS, window=5, auxiliary=1 / 32)

    benchmark.extra_info["activations"] = STEPS * BATCH
    benchmark.pedantic(train, rounds=3, warmup_rounds=1)


@pytest.mark.skipif(find_spec("sae_lens") is None, reason="SAELens is not installed (extra `peers`)")
def test_saelens(benchmark: Any) -> None:
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    def train() -> None:
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
        batch, silent = batches(), torch.zeros(D_SAE)
        for step in range(STEPS):
            found = sae.training_forward_pass(
                TrainStepInput(
                    sae_in=batch(),
                    coefficients={},
                    dead_neuron_mask=silent > 5,
                    n_training_steps=step,
                    is_logging_step=False,
                )
            )
            fired = found.feature_acts.to_dense() if found.feature_acts.is_sparse else found.feature_acts
            silent = torch.where((fired > 0).any(dim=0), 0.0, silent + 1)
            optimizer.zero_grad()
            found.loss.backward()
            optimizer.step()

    benchmark.extra_info["activations"] = STEPS * BATCH
    benchmark.pedantic(train, rounds=3, warmup_rounds=1)


@pytest.mark.skipif(find_spec("dictionary_learning") is None, reason="dictionary_learning is not installed (see above)")
def test_dictionary_learning(benchmark: Any) -> None:
    from dictionary_learning.trainers.top_k import TopKTrainer

    def train() -> None:
        named = {"layer": 0, "lm_name": "random", "device": "cpu", "seed": 0}
        trainer = TopKTrainer(STEPS, D_IN, D_SAE, K, lr=1e-3, warmup_steps=5, threshold_start_step=0, **named)
        trainer.dead_feature_threshold = 5 * BATCH  # counted in tokens there
        batch = batches()
        for step in range(STEPS):
            trainer.update(step, batch())

    benchmark.extra_info["activations"] = STEPS * BATCH
    benchmark.pedantic(train, rounds=3, warmup_rounds=1)
