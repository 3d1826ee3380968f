"""Moments: sums over tokens of what a layer remembers, from which means and covariances follow.

They are added up in float64, text by text. Keys are taken as attention scores them and, where the model's rotations
are known, before rotation too. Knows nothing of models.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.attention.rotary import Rotary, unrotate


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRows:
    """One text in one layer: keys, values and the gradients of its loss to both, sinks left out."""

    keys: Float[Tensor, "S H D"]
    values: Float[Tensor, "S H D"]
    keys_gradient: Float[Tensor, "S H D"]
    values_gradient: Float[Tensor, "S H D"]
    positions: Int[Tensor, " S"]


@dataclass(slots=True, kw_only=True)
class Moments:
    """Sums over tokens of one kind of rows of a layer. It changes as text is read."""

    count: int = 0
    total: Tensor | None = None  # X
    square: Tensor | None = None  # X X

    def add(self, rows: Float[Tensor, "N X"]) -> None:
        """Add rows to the sums."""
        rows = rows.double()
        self.count += len(rows)
        total = rows.sum(dim=0)
        square = rows.T @ rows
        self.total = total if self.total is None else total + self.total
        self.square = square if self.square is None else square + self.square

    @property
    def mean(self) -> Float[Tensor, " X"]:
        """The mean row."""
        assert self.total is not None, "rows were added"
        return self.total / self.count

    @property
    def second(self) -> Float[Tensor, "X X"]:
        """The second moments about zero."""
        assert self.square is not None, "rows were added"
        return self.square / self.count

    @property
    def covariance(self) -> Float[Tensor, "X X"]:
        """The second moments about the mean."""
        return self.second - self.mean[:, None] * self.mean


@dataclass(slots=True, kw_only=True)
class LayerMoments:
    """The moments of one layer. It changes as text is read."""

    rotated: Moments = field(default_factory=Moments)  # keys as they are scored
    unrotated: Moments = field(default_factory=Moments)  # keys before rotation
    values: Moments = field(default_factory=Moments)

    def add(self, rows: LayerRows, rotary: Rotary | None) -> None:
        """Add one text."""
        self.rotated.add(rows.keys.flatten(1))
        self.values.add(rows.values.flatten(1))
        if rotary is not None:
            cosines, sines = rotary.at(rows.positions)
            plain = unrotate(rows.keys, cosines[:, None], sines[:, None])
            self.unrotated.add(plain.flatten(1))


def blocks(square: Float[Tensor, "X X"], parts: int) -> Float[Tensor, "P part_size part_size"]:
    """The blocks on the diagonal: of each part of the dimensions with itself."""
    split = square.unflatten(1, (parts, -1))
    split = split.unflatten(0, (parts, -1))  # P x P x
    return torch.stack([split[part, :, part] for part in range(parts)])
