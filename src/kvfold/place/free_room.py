"""FreeRoom: the places of a file that were given back, so that they are used again.

Neighbours that are free are one place. The smallest place that is large enough is used first. It writes nothing.
"""

from bisect import bisect


class FreeRoom:
    """Free places, in order of their offsets. It changes: places are added and taken."""

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []  # offset and end; no two touch
        self.size_bytes = 0

    def add(self, offset: int, size: int) -> None:
        """Add a place, joined with its neighbours."""
        end = offset + size
        self.size_bytes += size
        at = bisect(self._places, (offset, end))
        first, last = at, at  # places that become one with it
        if at and self._places[at - 1][1] == offset:
            first, offset = at - 1, self._places[at - 1][0]
        if at < len(self._places) and self._places[at][0] == end:
            last, end = at + 1, self._places[at][1]
        self._places[first:last] = [(offset, end)]

    def take(self, size: int) -> int | None:
        """Take room out of the smallest place that has it, and give its offset; None where no place has it."""
        fitting = [(end - offset, offset) for offset, end in self._places if end - offset >= size]
        if not fitting:
            return None
        room, offset = min(fitting)
        self._cut(offset, offset + room, size)
        return offset

    def take_before(self, stop: int, size: int) -> int | None:
        """Take room out of the first place that has it and begins before `stop`; None where no such place has it."""
        for offset, end in self._places:
            if offset >= stop:
                return None
            if end - offset >= size:
                self._cut(offset, end, size)
                return offset
        return None

    def ends(self) -> list[int]:
        """List where the places end, in order."""
        return [end for _, end in self._places]

    def take_end(self, end: int) -> int:
        """Take the place that ends where the file does, and give where the file ends without it."""
        if not self._places or self._places[-1][1] != end:
            return end
        offset, _ = self._places.pop()
        self.size_bytes -= end - offset
        return offset

    def _cut(self, offset: int, end: int, size: int) -> None:
        """Take the beginning of a place."""
        self.size_bytes -= size
        self._places.remove((offset, end))
        if end - offset > size:
            self._places.insert(bisect(self._places, (offset, 0)), (offset + size, end))
