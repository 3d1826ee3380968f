"""Far: where slots lie that are not attended at every step, and how they are written and read there.

A tier (the device, host memory, disk) gives regions; a store is the regions of one layer, a lane for each row and
head, slots in order. Stores grow by an eighth and are written behind what is there, so an older part of the same
store stays valid; a part that is not the newest writes into a copy. It knows no sentences and no attention.
"""

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

_COPIED_SLOTS = 8192  # slots moved at a time when a store grows


class Region(ABC):
    """One tensor in a tier, [lanes, capacity, ...], zeros at first."""

    tensor: Tensor  # to be read

    @abstractmethod
    def write(self, lane: int, start: int, values: Tensor) -> None:
        """Put these slots into a lane, from slot `start` on. Raises FileError where that fails."""


class Tier(ABC):
    """A kind of memory."""

    name: ClassVar[str]  # as ledgers call it

    @abstractmethod
    def region(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Region:
        """Room for a tensor. Raises FileError where there is none left."""

    def __deepcopy__(self, memo: dict) -> "Tier":
        return self  # a copy of a cache uses the same memory, in regions of its own


class Store:
    """The far slots of one layer. It changes: slots are written behind those that are there."""

    def __init__(self, tier: Tier, device: torch.device) -> None:
        self.tier, self.device = tier, device
        self.regions: dict[str, Region] = {}
        self.capacity = 0
        self.filled: tuple[int, ...] = ()  # slots of each lane that somebody has written
        self.lineage = object()  # the same for stores whose common slots are the same
        self._lock = threading.Lock()

    def append(self, counts: tuple[int, ...], payload: Mapping[str, Tensor], sizes: Sequence[int]) -> "Store":
        """The store after `sizes[lane]` more slots behind `counts[lane]` of each lane; it, or a copy where others
        have written there already. The payload's slots stand lane after lane."""
        stops = [held + more for held, more in zip(counts, sizes, strict=True)]
        with self._lock:
            mine = counts == self.filled or not any(self.filled)
            if mine and self.regions and max(stops) <= self.capacity:
                self._put(counts, payload, sizes)
                self.filled = tuple(stops)
                return self
        most = max(*stops, 1)
        grown = self._copy(counts, payload, most + most // 8 if any(counts) else most)
        grown._put(counts, payload, sizes)
        grown.filled = tuple(stops)
        if mine:
            grown.lineage = self.lineage
        return grown

    def gather(self, flat: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """What these regions hold of slots, by lane x capacity + slot, on the device."""
        where = flat.to(next(iter(self.regions.values())).tensor.device)
        return {
            name: self.regions[name].tensor.flatten(0, 1).index_select(0, where).to(self.device, non_blocking=True)
            for name in names
        }

    def block(self, start: int, stop: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Slots start to stop of every lane, [lanes, stop - start, ...], on the device."""
        return {name: self.regions[name].tensor[:, start:stop].to(self.device, non_blocking=True) for name in names}

    def flat(self, counts: tuple[int, ...]) -> dict[str, Tensor]:
        """All slots, lane after lane, in memory of their own on the device."""
        return {
            name: torch.cat([region.tensor[lane, :count] for lane, count in enumerate(counts)]).to(self.device)
            for name, region in self.regions.items()
        }

    def __deepcopy__(self, memo: dict) -> "Store":
        twin = self._copy(self.filled, {name: one.tensor for name, one in self.regions.items()}, self.capacity)
        twin.filled, twin.lineage = self.filled, copy.deepcopy(self.lineage, memo)
        return twin

    def _copy(self, counts: tuple[int, ...], like: Mapping[str, Tensor], capacity: int) -> "Store":
        """A store of its own with the first slots of this one, shaped for payloads like this."""
        twin = Store(self.tier, self.device)
        twin.capacity = capacity
        inner = {name: tensor.shape[1:] if not self.regions else self.regions[name].tensor.shape[2:]
                 for name, tensor in like.items()}  # fmt: skip
        for name, tensor in like.items():
            twin.regions[name] = self.tier.region((len(counts), capacity, *inner[name]), tensor.dtype, self.device)
            if self.regions:
                _move(self.regions[name].tensor, twin.regions[name], counts)
        return twin

    def _put(self, counts: tuple[int, ...], payload: Mapping[str, Tensor], sizes: Sequence[int]) -> None:
        for name, tensor in payload.items():
            region = self.regions[name]
            for lane, piece in enumerate(tensor.split(list(sizes))):
                if sizes[lane]:
                    region.write(lane, counts[lane], piece)


def _move(source: Tensor, target: Region, counts: Sequence[int]) -> None:
    for lane, count in enumerate(counts):
        for start in range(0, count, _COPIED_SLOTS):
            target.write(lane, start, source[lane, start : min(start + _COPIED_SLOTS, count)])
