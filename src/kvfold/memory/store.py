"""Tier store: where slots lie that are not attended at every step, and how they are written and read there.

A tier (the device, host memory, disk) gives buffers. A store is the buffers of one layer, [N, capacity, ...], where N
counts rows x heads and slots are in order. Stores grow by an eighth and are written behind what is there, so an older
part of the same store stays valid; a part that is not the newest writes into a copy. It knows no pages, no attention.
"""

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.errors import BudgetError

_COPIED_SLOTS = 8192  # slots moved at a time when a store grows


class Buffer(ABC):
    """Slots [N, capacity, ...] of one kind in a tier."""

    @abstractmethod
    def write(self, head: int, start: int, values: Tensor) -> None:
        """Put slots behind `start` of one of the N heads. Raises FileError where that fails."""

    @abstractmethod
    def read(self, head: int, start: int, stop: int) -> Tensor:
        """Read slots start to stop of one head."""

    @abstractmethod
    def window(self, start: int, stop: int) -> Tensor:
        """Read slots start to stop of every head, [N, stop - start, ...]; anything where nothing was written."""

    @abstractmethod
    def gather(self, flat: Int[Tensor, " S"]) -> Tensor:
        """Read any slots [S, ...], each by its number: head x capacity + slot."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor held."""

    def spare_bytes(self, slots: int) -> int:
        """Count what slots take that were not written yet. Default: nothing."""
        return 0


class TensorBuffer(Buffer):
    """A buffer that is one tensor: what most tiers use."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def write(self, head: int, start: int, values: Tensor) -> None:
        """Copy slots into the tensor."""
        self.tensor[head, start : start + values.shape[0]] = values

    def read(self, head: int, start: int, stop: int) -> Tensor:
        """View slots of one head."""
        return self.tensor[head, start:stop]

    def window(self, start: int, stop: int) -> Tensor:
        """View slots of every head."""
        return self.tensor[:, start:stop]

    def gather(self, flat: Int[Tensor, " S"]) -> Tensor:
        """Copy slots out of the tensor."""
        return self.tensor.flatten(0, 1).index_select(0, flat.to(self.tensor.device))  # N x capacity, ...

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensor."""
        yield self.tensor

    def spare_bytes(self, slots: int) -> int:
        """Count their numbers: the tensor has room for them from the beginning."""
        return self.tensor[:1, :1].nbytes * slots


class Tier(ABC):
    """A kind of memory. A new tier is one new file in place/tiers/, found by its name."""

    name: ClassVar[str]  # in plans and ledgers
    needs_directory: ClassVar[bool] = False  # it keeps a file in a folder that the user names

    @classmethod
    def open(cls, *, directory: str | None, limit_bytes: int | None) -> "Tier":
        """Open the tier for one cache. Default: a tier without settings."""
        return cls()

    @abstractmethod
    def buffer(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Buffer:
        """Make room for slots. Raises FileError where there is none left."""

    @property
    def file_bytes(self) -> int:
        """Count the bytes that its file takes, of every cache that shares it. Default: there is no file."""
        return 0

    def set_limit(self, limit_bytes: int) -> None:
        """Set another limit of what may lie there. Raises BudgetError below what does. Default: there is no limit."""
        raise BudgetError(f"limit_bytes={limit_bytes} was asked for; {self.name} memory has no limit; leave it away")

    def tidy(self) -> None:
        """Close gaps between buffers, where there are any. Default: there are none."""
        return

    def __deepcopy__(self, memo: dict) -> "Tier":
        return self  # a copied cache uses the same tier, in other buffers


class TierStore:
    """The slots of one layer in a tier. It changes: slots are written behind those that are there."""

    def __init__(self, tier: Tier, device: torch.device) -> None:
        self.tier, self.device = tier, device
        self.buffers: dict[str, Buffer] = {}
        self.capacity = 0
        self.filled: tuple[int, ...] = ()  # slots of each head that are written, by any part of this store
        self.lineage = object()  # the same for stores whose common slots are the same
        self.outgrown = False  # whether a longer copy carries the lineage on
        self._lock = threading.Lock()

    def append(
        self,
        counts: tuple[int, ...],
        payload: Mapping[str, Tensor],
        sizes: Sequence[int],
    ) -> "TierStore":
        """Write `sizes[head]` slots behind the first `counts[head]` of each head; the payload is head after head.

        Gives this store, or a copy where another part has written there already.
        """
        stops = [held + more for held, more in zip(counts, sizes, strict=True)]  # slots of each head afterwards
        # Forks share a store: two of them must not both find that they are the newest.
        with self._lock:
            # No other part has written behind these slots, here or in a copy.
            newest = not self.outgrown and (counts == self.filled or not any(self.filled))
            if newest and self.buffers and max(stops) <= self.capacity:
                self._put(counts, payload, sizes)
                self.filled = tuple(stops)
                return self
            self.outgrown |= newest
        most = max(*stops, 1)  # of any head: buffers are rectangles
        try:
            # A store that is written for the first time fits exactly: many never grow.
            grown = self._copy(counts, payload, most + most // 8 if any(counts) else most)
            grown._put(counts, payload, sizes)
        except BaseException:
            if newest:
                self.outgrown = False  # there is no copy, so the next fold may write here
            raise
        grown.filled = tuple(stops)
        # A copy of all that was written continues the history; one that branches off begins another.
        if newest:
            grown.lineage = self.lineage
        return grown

    def gather(self, flat: Int[Tensor, " S"], names: Sequence[str]) -> dict[str, Tensor]:
        """Fetch slots, by head x capacity + slot, to the device."""
        return {name: self.buffers[name].gather(flat).to(self.device, non_blocking=True) for name in names}

    def window(self, start: int, stop: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Fetch slots start to stop of every head, [N, stop - start, ...], to the device."""
        return {name: self.buffers[name].window(start, stop).to(self.device, non_blocking=True) for name in names}

    def flat(self, counts: tuple[int, ...]) -> dict[str, Tensor]:
        """Fetch all slots, head after head, into fresh memory on the device."""
        return {
            name: torch.cat([buffer.read(head, 0, count) for head, count in enumerate(counts)]).to(self.device)
            for name, buffer in self.buffers.items()
        }

    def slack(self, counts: tuple[int, ...]) -> dict[str, int]:
        """Count the bytes behind the first `counts` slots of each head, by name."""
        room = self.capacity * len(counts) - sum(counts)
        return {name: buffer.spare_bytes(room) for name, buffer in self.buffers.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor held, by name; a number follows where a buffer is several tensors."""
        for name, buffer in self.buffers.items():
            held = list(buffer.tensors())
            if len(held) == 1:
                yield name, held[0]
            else:
                yield from ((f"{name}_{at}", tensor) for at, tensor in enumerate(held))

    def __deepcopy__(self, memo: dict) -> "TierStore":
        # A window without slots says dtype and shape.
        like = {name: buffer.window(0, 0) for name, buffer in self.buffers.items()}
        twin = self._copy(self.filled, like, self.capacity)
        twin.filled, twin.lineage = self.filled, copy.deepcopy(self.lineage, memo)
        twin.outgrown = self.outgrown  # the copy that carries the lineage on may be copied too
        return twin

    def _copy(
        self,
        counts: tuple[int, ...],
        like: Mapping[str, Tensor],
        capacity: int,
    ) -> "TierStore":
        """Copy the first `counts` slots of each head into a store of another capacity, for payloads like this."""
        twin = TierStore(self.tier, self.device)
        twin.capacity = capacity
        for name, tensor in like.items():
            source = self.buffers.get(name)
            # A payload is [slots, ...], what is read of a buffer [N, slots, ...].
            inner = tensor.shape[1:] if source is None else source.window(0, 0).shape[2:]
            target = self.tier.buffer((len(counts), capacity, *inner), tensor.dtype, self.device)
            if source is not None:
                _move(source, target, counts)
            twin.buffers[name] = target
        return twin

    def _put(
        self,
        counts: tuple[int, ...],
        payload: Mapping[str, Tensor],
        sizes: Sequence[int],
    ) -> None:
        for name, tensor in payload.items():
            buffer = self.buffers[name]
            for head, piece in enumerate(tensor.split(list(sizes))):
                if sizes[head]:  # a piece of no slots has no place to go
                    buffer.write(head, counts[head], piece)


def _move(source: Buffer, target: Buffer, counts: Sequence[int]) -> None:
    """Copy the first `counts[head]` slots of every head, some at a time."""
    for head, count in enumerate(counts):
        for start in range(0, count, _COPIED_SLOTS):
            target.write(head, start, source.read(head, start, min(start + _COPIED_SLOTS, count)))
