"""Muon in float32: momentum, then the nearest orthogonal matrix, for every weight matrix of a model.

Jordan et al., Muon: an optimizer for hidden layers, https://kellerjordan.github.io/posts/muon/
Ours differs: the Newton-Schulz steps run in float32, because bfloat16 products are emulated, and slow, on processors
without them (torch.optim.Muon uses bfloat16).
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum; the step of a matrix has the scale of sqrt(max(1, rows / columns))."""

    def __init__(self, parameters: Iterable[Any], *, lr: float = 0.01, momentum: float = 0.95, steps: int = 5) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "steps": steps})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Apply one step from the gradients that are there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None, "a parameter without a gradient is left out before"
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(state["momentum"], group["momentum"])
        rows, columns = parameter.shape
        scale = max(1.0, rows / columns) ** 0.5
        parameter.add_(orthogonal(direction, steps=group["steps"]), alpha=-group["lr"] * scale)


def orthogonal(matrix: Float[Tensor, "rows columns"], *, steps: int) -> Float[Tensor, "rows columns"]:
    """The matrix with its singular values moved towards one, by Newton-Schulz iteration."""
    rows, columns = matrix.shape
    is_tall = rows > columns
    x = matrix.mT if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x
