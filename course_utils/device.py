"""Where computing happens, in one place.

The chapters run on the CPU, also where there is a GPU: their models are small, and the numbers that the prose speaks of
come out the same for everybody. What takes long, the recipes, runs where `device()` says.
"""

import torch


def device() -> str:
    """The GPU if PyTorch can use one, otherwise the CPU, as the `device=` of anything in torch."""
    return "cuda" if torch.cuda.is_available() else "cpu"
