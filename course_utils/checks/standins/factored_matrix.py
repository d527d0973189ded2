# ruff: noqa: N802 (T is what torch calls it)
"""A FactoredMatrix to hand to those who have not written theirs."""

from typing import Any

import torch
from torch import Tensor


def refuse_vector(other: Tensor) -> None:
    if other.dim() < 2:
        raise ValueError("a vector is no matrix")


class Factored:
    """The matrix `A @ B`, which is formed wherever that is the shortest way."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = A, B

    @property
    def shape(self) -> tuple[int, ...]:
        return (*torch.broadcast_shapes(self.A.shape[:-2], self.B.shape[:-2]), self.A.shape[-2], self.B.shape[-1])

    @property
    def T(self) -> "Factored":
        return Factored(self.B.mT, self.A.mT)

    def __matmul__(self, other: Any) -> "Factored":
        if isinstance(other, Factored):
            return Factored(self.A, self.B @ other.A @ other.B)
        refuse_vector(other)
        return Factored(self.A, self.B @ other)

    def __rmatmul__(self, other: Tensor) -> "Factored":
        refuse_vector(other)
        return Factored(other @ self.A, self.B)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(self.A @ self.B, full_matrices=False)
        rank = min(*self.shape[-2:], self.A.shape[-1])
        return U[..., :rank], S[..., :rank], Vh[..., :rank, :]

    def eigenvalues(self) -> Tensor:
        return torch.linalg.eigvals(self.B @ self.A)

    def norm(self) -> Tensor:
        return torch.linalg.matrix_norm(self.A @ self.B)
