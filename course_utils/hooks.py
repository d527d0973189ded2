"""Hook points: named places in a model where activations can be read and replaced."""

from torch import Tensor, nn


class HookPoint(nn.Module):
    """An identity layer that marks a place where an activation can be read or replaced."""

    def __init__(self, on_request: bool = False) -> None:
        super().__init__()
        self.name = ""
        self.on_request = on_request
        self.fns: list = []

    @property
    def is_watched(self) -> bool:
        """Whether any hook function is attached."""
        return bool(self.fns)

    def forward(self, activation: Tensor) -> Tensor:
        """Show the activation to each hook function in order; a returned tensor replaces it."""
        for fn in self.fns:
            replacement = fn(activation, self)
            if replacement is not None:
                activation = replacement
        return activation
