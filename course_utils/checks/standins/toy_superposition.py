"""Small models of superposition that stand in for a learner's, with the `__init__` that the lesson gives."""

import torch
from torch import Tensor, nn


class SmallToy(nn.Module):
    """A toy model, one instance after the other."""

    def __init__(self, n_instances: int, n_features: int, d_hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        scale = (2 / (n_features + d_hidden)) ** 0.5
        self.W = nn.Parameter(scale * torch.randn(n_instances, d_hidden, n_features, generator=generator))
        self.b = nn.Parameter(torch.zeros(n_instances, n_features))

    def forward(self, x: Tensor) -> Tensor:
        each = [(x[:, i] @ W.T @ W + b).clamp(min=0) for i, (W, b) in enumerate(zip(self.W, self.b, strict=True))]
        return torch.stack(each, dim=1)


class SmallNeurons(SmallToy):
    """The same with a relu on the hidden layer."""

    def forward(self, x: Tensor) -> Tensor:
        each = [
            ((x[:, i] @ W.T).clamp(min=0) @ W + b).clamp(min=0)
            for i, (W, b) in enumerate(zip(self.W, self.b, strict=True))
        ]
        return torch.stack(each, dim=1)


class SmallAbs(nn.Module):
    """A layer of neurons between two matrices."""

    def __init__(self, n_instances: int, n_features: int, n_neurons: int, generator: torch.Generator) -> None:
        super().__init__()
        scale = (2 / (n_features + n_neurons)) ** 0.5
        self.W_in = nn.Parameter(scale * torch.randn(n_instances, n_neurons, n_features, generator=generator))
        self.W_out = nn.Parameter(scale * torch.randn(n_instances, n_features, n_neurons, generator=generator))
        self.b = nn.Parameter(torch.zeros(n_instances, n_features))

    def forward(self, x: Tensor) -> Tensor:
        each = [
            ((x[:, i] @ self.W_in[i].T).clamp(min=0) @ self.W_out[i].T + self.b[i]).clamp(min=0)
            for i in range(len(self.b))
        ]
        return torch.stack(each, dim=1)
