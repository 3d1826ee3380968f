"""What an adapter's JSON may say: checked before anything is built from it, or room is made for it.

Whether it agrees with its tensors and with a model is checked where these are known (files.py, ranks.py).
"""

from itertools import pairwise
from typing import Annotated

from pydantic import Field, model_validator

from kvfold.schema import Count, Finite, Index, Name, Positive, Strict, Version

_MOST_LAYERS = 10_000
_MOST_LINEAR = 100_000  # linear layers of a model


class AdapterWords(Strict):
    """What every adapter says."""

    kind: Name
    version: Version
    base: Name
    fingerprint: Name
    shape: Name | None = None  # a digest of the base model's shape; None in adapters that fit only the very model
    seal: Name | None = None  # none before version 2


class Reads(Strict):
    """Which features of a token a scorer reads."""

    layers: Annotated[int, Field(ge=1, le=_MOST_LAYERS)]
    heads: Positive
    size: Positive
    keys: bool
    by_layer: bool = False  # adapters before larger models had gates of their own do not say


class UpdateWords(AdapterWords):
    """An adapter with updates of a model's layers and a scorer."""

    layers: Annotated[list[tuple[Name, Positive, Positive]], Field(max_length=_MOST_LINEAR)]
    rank: Positive
    scale: Finite
    rows: Count
    width: Positive
    reads: Reads


class LayerRankWords(Strict):
    """Ranks of one layer."""

    levels: Annotated[list[tuple[Count, Count]], Field(min_length=1, max_length=4096)]
    rates: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    heads: Positive

    @model_validator(mode="after")
    def levels_grow(self) -> "LayerRankWords":
        """Refuse levels that keep fewer dimensions than those before them."""
        for less, more in pairwise(self.levels):
            if less[0] > more[0] or less[1] > more[1]:
                raise ValueError(f"a level of {more} dimensions follows one of {less}")
        return self


class BasisWords(Strict):
    """Ranks under one basis."""

    trained: bool
    grid: Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)]
    layers: Annotated[dict[Index, LayerRankWords], Field(max_length=_MOST_LAYERS)]

    @model_validator(mode="after")
    def every_rate_is_there(self) -> "BasisWords":
        """Refuse a grid that does not grow, and layers without a rate for each of its points."""
        if any(more <= less for less, more in pairwise(self.grid)):
            raise ValueError("its grid does not grow")
        if any(len(layer.rates) != len(self.grid) for layer in self.layers.values()):
            raise ValueError(f"a layer has not one rate for each of {len(self.grid)}")
        return self


class MeasuredWords(Strict):
    """Measured ranks under one basis."""

    layers: Annotated[list[Count], Field(max_length=_MOST_LAYERS)]
    heads: Positive


class RankWords(AdapterWords):
    """An adapter of ranks."""

    bases: dict[Name, BasisWords]
    measured: dict[Name, MeasuredWords] = Field(default_factory=dict)
    default: Name | None = None
