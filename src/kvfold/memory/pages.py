"""Shelf: the slots of a part as they lie in a tier, so that any few of them can be fetched and read.

One shelf per layout of parts; `shelf_of` gives the one for a part. What is fetched comes back as keys and values, so
whoever attends does not know how a slot was written. A shelf is a value over stores that change (far.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import singledispatch

from jaxtyping import Float, Int
from torch import Tensor

from kvfold.errors import CacheError
from kvfold.memory.dense import DensePart
from kvfold.memory.part import Counts, Part
from kvfold.memory.store import Store, Tier

Fetched = tuple[Tensor, Tensor, int]  # keys and values of some slots, and the bytes that were moved


class Shelf(ABC):
    """Slots of lanes (rows x heads), oldest first."""

    @property
    @abstractmethod
    def lineage(self) -> object:
        """The same for shelves whose common slots are the same; another where a past was written anew."""

    @abstractmethod
    def append(self, counts: Counts, fresh: Part) -> "Shelf":
        """The shelf with a part's slots behind the first `counts` of its lanes. Raises FileError where that fails."""

    @abstractmethod
    def fetch(self, lanes: Int[Tensor, " S"], slots: Int[Tensor, " S"]) -> Fetched:
        """Keys [S, D] and values of some slots, on the device."""

    @abstractmethod
    def block(self, start: int, stop: int) -> tuple[Float[Tensor, "L S D"], Float[Tensor, "L S E"]]:
        """Keys and values of slots start to stop of every lane; zeros, or leftovers, where a lane has fewer."""

    @abstractmethod
    def keys(self, lane: int, start: int, stop: int) -> Float[Tensor, "S D"]:
        """Keys of some slots of one lane."""

    @abstractmethod
    def positions(self, lane: int, start: int, stop: int) -> Int[Tensor, " S"]:
        """Where some slots of one lane sat in the text."""

    @abstractmethod
    def whole(self, counts: Counts) -> Part:
        """All slots as a part on the device again."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor held, by a name without a dot."""


@singledispatch
def shelf_of(part: Part, tier: Tier) -> Shelf:
    """An empty shelf for parts like this one."""
    raise CacheError(
        f"a {type(part).__name__} was to lie in {tier.name} memory; nothing knows how to fetch single slots of it; "
        "leave the place member away, or store slots in another way"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseShelf(Shelf):
    """Slots as a codec wrote them, a lane for each row and head."""

    like: DensePart  # without slots: it says how they are written
    store: Store

    @property
    def lineage(self) -> object:
        """Its store's."""
        return self.store.lineage

    def append(self, counts: Counts, fresh: Part) -> "DenseShelf":
        """Lane after lane."""
        assert isinstance(fresh, DensePart), "parts of one layer have one layout"
        payload = {**fresh.payload, "positions": fresh.positions}
        return replace(self, store=self.store.append(_flat(counts), payload, _flat(fresh.counts)))

    def fetch(self, lanes: Tensor, slots: Tensor) -> Fetched:
        """Gathered, then decoded."""
        payload = self.store.gather(lanes * self.store.capacity + slots, list(self.like.payload))
        return *self._decode(payload), sum(one.nbytes for one in payload.values())

    def block(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A window of every lane."""
        return self._decode(self.store.block(start, stop, list(self.like.payload)))

    def keys(self, lane: int, start: int, stop: int) -> Tensor:
        """Decoded."""
        own = {name: self.store.regions[name].tensor[lane, start:stop] for name in self.like.payload}
        return self._decode(own)[0].to(self.store.device)

    def positions(self, lane: int, start: int, stop: int) -> Tensor:
        """As they are stored."""
        return self.store.regions["positions"].tensor[lane, start:stop]

    def whole(self, counts: Counts) -> DensePart:
        """One after the other."""
        return self.like.made_of(self.store.flat(_flat(counts)), counts)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The codec's regions, and the positions."""
        yield from ((name, region.tensor) for name, region in self.store.regions.items())

    def _decode(self, payload: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.like.codec.decode(payload, self.like.dtype)


@shelf_of.register
def _(part: DensePart, tier: Tier) -> Shelf:
    empty = part.made_of({name: one[:0].clone() for name, one in part.tensors()}, _none(part.counts))
    return DenseShelf(like=empty, store=Store(tier, part.positions.device))


def _flat(counts: Counts) -> tuple[int, ...]:
    return tuple(count for row in counts for count in row)


def _none(counts: Counts) -> Counts:
    return tuple(tuple(0 for _ in row) for row in counts)
