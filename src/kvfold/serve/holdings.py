"""Holdings: the bytes that all conversations of a server hold, each storage counted once, beside what is promised.

A turn that begins is promised the bytes that it may come to need; when it ends, what it really holds is counted. It
knows no conversation.
"""

import ctypes
from collections.abc import Mapping


class Holdings:
    """Bytes held and promised under one limit. They change with every turn."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.promised_bytes = 0
        self._holders: dict[int, int] = {}  # by the address of a storage: who counts it

    @property
    def free_bytes(self) -> int:
        """Bytes that nobody holds and nobody was promised; negative where there are too many."""
        return self.limit_bytes - self.held_bytes - self.promised_bytes

    def add(self, storages: Mapping[int, int]) -> None:
        """Count storages; those that are shared with others cost nothing more."""
        for address, size in storages.items():
            holders = self._holders.get(address, 0)
            self._holders[address] = holders + 1
            self.held_bytes += 0 if holders else size

    def remove(self, storages: Mapping[int, int]) -> None:
        """Count storages no more, once for each time that they were added."""
        for address, size in storages.items():
            self._holders[address] -= 1
            if not self._holders[address]:
                del self._holders[address]
                self.held_bytes -= size


def give_back_freed() -> None:
    """Give freed memory back to the system, where the allocator is one that keeps it otherwise (glibc's)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
