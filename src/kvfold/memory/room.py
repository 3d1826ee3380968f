"""Room: buffers that have places for slots to come, so that appending a turn costs what the turn is long.

A part is a value over buffers that later parts share: these write behind its slots and read further. Only the part
that ends where the buffers are written may do so; one that was left behind (a fork, a step back) goes on in a copy.
With a sixteenth more at each copy, all copies of a growing text together move at most 17 times its bytes.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kvfold.memory.ragged import Counts, flat

UNLIMITED = 1 << 40  # slots or tokens: more than any text has
_SHARE = 16  # of what is held: one slot in so many is room for those to come


class WrittenEnd:
    """How many slots of each row and head are written in shared buffers, by any part over them. It changes."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._lock = threading.Lock()

    def claim(
        self,
        counts: Counts,
        after: Counts,
    ) -> bool:
        """Take the places between two counts for one writer; False where another part has written behind `counts`."""
        # Forks may live in threads: two of them must not both find that they end where the buffers do.
        with self._lock:
            if counts != self._counts:
                return False
            self._counts = after
            return True

    def __deepcopy__(self, memo: dict) -> "WrittenEnd":
        return WrittenEnd(self._counts)  # of buffers that are copied too; a lock cannot be


def has_room(counts: Counts, room: Counts) -> bool:
    """Tell whether so many slots of each row and head have a place."""
    return all(count <= space for count, space in zip(flat(counts), flat(room), strict=True))


def with_spare(counts: Counts, left: int) -> Counts:
    """Add room for slots to come to each row and head: a sixteenth, at most `left`.

    Heads with few slots get a sixteenth of the mean, for one that fills up moves them all: each copy then follows
    after a sixteenth of an average head at least, whichever head that went to.
    """
    every = flat(counts)
    mean = -(-sum(every) // max(len(every), 1))  # rounded up

    def grown(count: int) -> int:
        spare = -(-max(count, mean) // _SHARE)
        return count + min(spare, max(left, 0))

    rows = [[grown(count) for count in row] for row in counts]
    return tuple(map(tuple, rows))


def copy_slots(
    source: Tensor,
    source_room: Counts,
    target: Tensor,
    target_room: Counts,
    *,
    counts: Counts,
    behind: Counts | None = None,
) -> None:
    """Copy the first `counts` slots of each row and head, of storage with room for each into another one's.

    They go behind as many slots as `behind` says, or to the beginning.
    """
    sizes, spaces, others = flat(counts), flat(source_room), flat(target_room)
    firsts = (0,) * len(sizes) if behind is None else flat(behind)
    heads = len(sizes)
    if all(len(set(numbers)) == 1 for numbers in (sizes, spaces, others, firsts)):
        # All alike: one strided copy.
        size, first = sizes[0], firsts[0]
        by_head = source.view(heads, spaces[0], *source.shape[1:])
        into = target.view(heads, others[0], *target.shape[1:])
        into[:, first : first + size] = by_head[:, :size]
        return
    start, end = 0, 0  # where the room of a head begins in either
    for size, space, other, first in zip(sizes, spaces, others, firsts, strict=True):
        place = end + first
        target[place : place + size] = source[start : start + size]
        start += space
        end += other


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Tensors [N, columns, ...] that grow side by side: the first `held` columns of some buffers, by name."""

    held: int = 0
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    end: WrittenEnd | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.buffers

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[name][:, : self.held]

    def append(self, new: Mapping[str, Tensor]) -> "Columns":
        """Append columns: tensors [N, more, ...] of the same names."""
        more = next(iter(new.values())).shape[1]
        buffers, end = self._with_room(new, more)
        for name, entries in new.items():
            buffers[name][:, self.held : self.held + more] = entries
        return Columns(held=self.held + more, buffers=buffers, end=end)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor by name."""
        yield from ((name, self[name]) for name in self.buffers)

    @property
    def slack(self) -> dict[str, int]:
        """Count the bytes of room for columns to come, by tensor."""
        room = self._capacity - self.held
        return {name: buffer[:, :1].numel() * buffer.element_size() * room for name, buffer in self.buffers.items()}

    @property
    def _capacity(self) -> int:
        return next(iter(self.buffers.values())).shape[1] if self.buffers else 0

    def _with_room(self, new: Mapping[str, Tensor], more: int) -> tuple[Mapping[str, Tensor], WrittenEnd]:
        """Give buffers with room for entries behind those held: these, or copies where that is not free."""
        before, after = ((self.held,),), ((self.held + more,),)
        if self.end is not None and after[0][0] <= self._capacity and self.end.claim(before, after):
            return self.buffers, self.end
        capacity = with_spare(after, UNLIMITED)[0][0] if self.held else more  # many never grow
        buffers = {}
        for name, entries in new.items():
            buffers[name] = entries.new_zeros(len(entries), capacity, *entries.shape[2:])
            if self.held:
                buffers[name][:, : self.held] = self.buffers[name][:, : self.held]
        return buffers, WrittenEnd(after)
