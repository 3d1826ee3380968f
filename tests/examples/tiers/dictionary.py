"""The dictionary tier: every slot is a tensor in a dict. An example of a tier: this file is all that it takes."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.memory.store import Buffer, Tier


class DictionaryTier(Tier):
    """In the memory of the process, slot by slot."""

    name: ClassVar[str] = "dictionary"

    def buffer(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> "DictionaryBuffer":
        """Make room, which a dict has as long as the process has."""
        return DictionaryBuffer(shape, dtype)


class DictionaryBuffer(Buffer):
    """Slots by head and number."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.heads, self.capacity = shape[:2]
        self.blank = torch.zeros(tuple(shape[2:]), dtype=dtype)  # what is read where nothing was written
        self.slots: dict[tuple[int, int], Tensor] = {}

    def write(self, head: int, start: int, values: Tensor) -> None:
        """Copy slots into tensors of their size: a view would keep the whole payload alive."""
        self.slots |= {(head, start + at): value.to(self.blank.dtype).cpu().clone() for at, value in enumerate(values)}

    def read(self, head: int, start: int, stop: int) -> Tensor:
        """Stack slots of one head."""
        return self._stacked([(head, slot) for slot in range(start, stop)])

    def window(self, start: int, stop: int) -> Tensor:
        """Stack slots of every head."""
        keys = [(head, slot) for head in range(self.heads) for slot in range(start, stop)]
        return self._stacked(keys).view(self.heads, stop - start, *self.blank.shape)

    def gather(self, flat: Int[Tensor, " S"]) -> Tensor:
        """Stack any slots."""
        return self._stacked([divmod(number, self.capacity) for number in flat.tolist()])

    def tensors(self) -> Iterator[Tensor]:
        """Yield the slots, and the blank."""
        yield from (self.blank, *self.slots.values())

    def _stacked(self, keys: Sequence[tuple[int, int]]) -> Tensor:
        found = [self.slots.get(key, self.blank) for key in keys]
        return torch.stack(found) if found else self.blank.new_empty(0, *self.blank.shape)
