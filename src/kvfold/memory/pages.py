"""Pages: the slots of a part as they lie in a tier, so that any few of them can be fetched and read.

Each layout of parts has its pages: `part.pages(tier)` opens an empty one. What is fetched comes back as keys and
values, so whoever attends does not know how a slot was written. Pages are a value over stores that change (store.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.memory.part import Part
from kvfold.memory.ragged import Counts, flat
from kvfold.memory.store import Tier, TierStore

Fetched = tuple[Tensor, Tensor, int]  # keys [S, D] and values [S, E] on the device, and the bytes that were moved


class Pages(ABC):
    """Slots of N heads (rows x heads), oldest first."""

    @property
    @abstractmethod
    def lineage(self) -> object:
        """Identify the history: an object that pages share whose common slots are the same."""

    @abstractmethod
    def append(self, counts: Counts, fresh: Part) -> "Pages":
        """Write a part's slots behind the first `counts` of each head. Raises FileError where that fails."""

    @abstractmethod
    def fetch(self, heads: Int[Tensor, " S"], slots: Int[Tensor, " S"]) -> Fetched:
        """Fetch keys and values of any slots to the device: of slot `slots[i]` of head `heads[i]`, of N."""

    @abstractmethod
    def window(
        self,
        start: int,
        stop: int,
    ) -> tuple[Float[Tensor, "N S D"], Float[Tensor, "N S E"]]:
        """Fetch keys and values of slots start to stop of every head; anything where a head has fewer."""

    @abstractmethod
    def keys(self, head: int, start: int, stop: int) -> Float[Tensor, "S D"]:
        """Fetch keys of some slots of one head."""

    @abstractmethod
    def positions(self, head: int, start: int, stop: int) -> Int[Tensor, " S"]:
        """Read where some slots of one head stood in the text."""

    @abstractmethod
    def whole(self, counts: Counts) -> Part:
        """Fetch all slots as a part on the device."""

    @abstractmethod
    def slack(self, counts: Counts) -> dict[str, int]:
        """Count the bytes of room for slots to come, by tensor."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor held, by a name without a dot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DensePages(Pages):
    """Slots as a codec wrote them."""

    like: Any  # a DensePart without slots: it says how they are written
    store: TierStore

    @classmethod
    def empty(cls, like: Any, tier: Tier, device: torch.device) -> "DensePages":
        """Open pages without slots."""
        return cls(like=like, store=TierStore(tier, device))

    @property
    def lineage(self) -> object:
        """Identify the history by the store."""
        return self.store.lineage

    def append(self, counts: Counts, fresh: Any) -> "DensePages":
        """Write the payload and the positions of a part, head after head."""
        payload = dict(fresh.without_room().tensors())
        return replace(self, store=self.store.append(flat(counts), payload, flat(fresh.counts)))

    def fetch(self, heads: Int[Tensor, " S"], slots: Int[Tensor, " S"]) -> Fetched:
        """Gather payloads by head and slot, then decode them on the device."""
        payload = self.store.gather(heads * self.store.capacity + slots, list(self.like.payload))  # no positions
        return *self._decode(payload), sum(tensor.nbytes for tensor in payload.values())

    def window(
        self,
        start: int,
        stop: int,
    ) -> tuple[Float[Tensor, "N S D"], Float[Tensor, "N S E"]]:
        """Decode a window of every head."""
        return self._decode(self.store.window(start, stop, list(self.like.payload)))

    def keys(self, head: int, start: int, stop: int) -> Float[Tensor, "S D"]:
        """Decode some slots of one head."""
        payload = {name: self.store.buffers[name].read(head, start, stop) for name in self.like.payload}
        return self._decode(payload)[0].to(self.store.device)  # read where it lies, moved decoded

    def positions(self, head: int, start: int, stop: int) -> Int[Tensor, " S"]:
        """Read positions as they are stored."""
        return self.store.buffers["positions"].read(head, start, stop)

    def whole(self, counts: Counts) -> Part:
        """Fetch the first `counts` slots of each head, one head after the other, as a part."""
        return self.like.made_of(self.store.flat(flat(counts)), counts)

    def slack(self, counts: Counts) -> dict[str, int]:
        """Count what the store has behind the slots of each head."""
        return self.store.slack(flat(counts))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the codec's buffers, and the positions."""
        return self.store.tensors()

    def _decode(self, payload: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.like.codec.decode(payload, self.like.dtype)
