"""What "Is that the circuit?" promises of the shipped models: a small circuit, found on some prompts, kept on more."""

import pytest
import torch

from course_utils.data.ioi import IOIDataset
from course_utils.pretrained import load_pretrained
from solutions.ch02_transformer import Transformer
from solutions.ch05_patching import every_head, faithfulness, greedy_circuit, random_circuits, template_means

Prompts = tuple[IOIDataset, dict[str, torch.Tensor]]


def prompts(model: Transformer, n: int, seed: int) -> Prompts:
    """Prompts, and the means over eight ABC versions of each."""
    dataset = IOIDataset(n, model.tokenizer, seed)
    of = torch.arange(n).repeat_interleave(8)
    return dataset, template_means(model, dataset.select(of.tolist()).flipped("abc").tokens, of)


@pytest.mark.parametrize("name", ["attn-only-4l", "tales"])
def test_half_of_the_heads_or_fewer_are_enough_and_random_ones_are_not(name: str) -> None:
    """|1 - faithfulness| at most 0.2 on held-out prompts; the median random circuit of that size at most 0.4."""
    model = load_pretrained(Transformer, name)
    search_set, search_means = prompts(model, 32, seed=11)
    rounds = greedy_circuit(model, search_set, search_means)
    shares = faithfulness(model, search_set, rounds, search_means).tolist()
    found = [circuit for circuit, share in zip(rounds, shares, strict=True) if abs(1 - share) <= 0.1][-1]
    assert len(found) <= len(every_head(model)) / 2
    held_out, held_means = prompts(model, 128, seed=424_242)
    random = random_circuits(model, len(found), 25, torch.Generator().manual_seed(0))
    kept, empty, *by_chance = faithfulness(model, held_out, [found, [], *random], held_means).tolist()
    assert abs(1 - kept) <= 0.2
    assert torch.tensor(by_chance).median() <= 0.4
    assert abs(empty) <= 0.15  # the means do not know the answer
