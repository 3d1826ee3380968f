"""Moments: sums over tokens of what a layer remembers, from which means and covariances follow.

They are added up in float64, text by text. Keys are taken as attention scores them and, where the model's rotations
are known, before rotation too. Knows nothing of models.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.attention.basis import Bases, Basis
from kvfold.attention.rotary import Rotary, unrotate
from kvfold.train.dynakv.readings import LayerRows


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


def energies(bases: Bases, moments: LayerMoments) -> Float[Tensor, " X"]:
    """Give the mean square of each latent dimension, those of keys before those of values."""
    keys = moments.rotated if bases.rotary is None else moments.unrotated
    return torch.cat([_energies(bases.keys, keys), _energies(bases.values, moments.values)])


def _energies(basis: Basis, moments: Moments) -> Float[Tensor, " R"]:
    encode = basis.encode.double()
    mean = basis.mean.double()
    # Second moments about the basis's mean, which need not be that of the rows.
    crossed = moments.mean[:, None] * mean
    rest = mean[:, None] * (moments.mean - mean)
    about = moments.second - crossed - rest
    squares = encode * (blocks(about, basis.parts) @ encode)
    by_part = squares.sum(dim=1)  # P r
    return by_part.T.flatten().clamp(min=0).float()
