"""Working set: the slots that a layer attends now, fetched from its store, and what fetching has cost.

A slot table says which far slot lies where. On a new selection only those that are not there are fetched, into places
that are no longer wanted; their order does not matter to attention. It is a copy of what lies far away, so nothing
is lost with it. It does not know why slots were selected.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.attention.kernels.compiled import Form, StoredSlots
from kvfold.memory.pages import Fetched

Fetch = Callable[[Tensor, Tensor], Fetched]  # of heads and slots


@dataclass(slots=True, kw_only=True)
class FetchStats:
    """Counters of one layer's selections, which change with every one of them; budget/ledger.py says what they are."""

    selections: int = 0
    wanted: int = 0
    reused: int = 0
    reused_evenly: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    index_seconds: float = 0.0
    write_seconds: float = 0.0
    select_seconds: float = 0.0
    fetch_seconds: float = 0.0
    attend_seconds: float = 0.0

    def counts(self) -> dict[str, float]:
        """Give the counters by their names."""
        return {name: getattr(self, name) for name in self.__slots__}


class WorkingSet:
    """Fetched slots of every head. It changes with every selection."""

    def __init__(self, stats: FetchStats | None = None) -> None:
        self.stats = stats or FetchStats()
        self.keys: Tensor | None = None  # N budget D
        self.values: Tensor | None = None
        self.slots: Tensor | None = None  # N budget, int32: which stored slot, -1 none
        self.valid: Tensor | None = None  # where a head has fewer; None: everywhere
        self._stored: StoredSlots | None = None  # the buffers, for the compiled kernel, once they were asked for
        self._current: Tensor | None = None  # the selection as it was given
        self._lineage: object = None  # of the slots that are here

    def fetch(
        self,
        wanted: Int[Tensor, "N budget"],
        read: Fetch,
        *,
        stored: int,
        heads: int,
        lineage: object = None,
    ) -> None:
        """Fetch the wanted slots that are not here, into places that are free; -1 is no slot.

        `stored` is the most slots that a head has; `heads` those of a row.

        Slots of another lineage may be others by the same number: none of them stays.
        """
        if self._lineage is not lineage:
            self.forget()
            self._lineage = lineage
        if self._current is wanted:  # the same tensor, so no comparison of numbers
            return
        began = perf_counter()
        is_first, self._current = self._current is None, None  # an interrupt leaves no selection that is half fetched
        self._make_room(wanted)
        assert self.slots is not None
        there, stays = _overlap(self.slots, wanted, stored)
        missing = (wanted >= 0) & ~there  # N budget
        self._count(wanted, missing, heads, is_first=is_first)
        places = _first(~stays, missing.sum(dim=1, keepdim=True))  # N budget: as many as are missing
        of_heads, columns = missing.nonzero(as_tuple=True)  # head by head, as places are
        slots = wanted[of_heads, columns]
        if len(slots):
            keys, values, moved = read(of_heads, slots)
            self._put(places, slots, keys, values)
            self.stats.fetched_bytes += moved
        short = (wanted < 0).any(dim=1)  # heads with smaller budgets
        self.valid = stays | places if bool(short.any()) else None  # places that hold a wanted slot
        self._current = wanted
        self.stats.fetch_seconds += perf_counter() - began

    def forget(self) -> None:
        """Forget all slots; the buffers stay."""
        self._current = None
        if self.slots is not None:
            self.slots.fill_(-1)

    def is_current(self, wanted: Tensor) -> bool:
        """Tell whether the slots are those of this very selection."""
        return self._current is wanted

    @property
    def stored(self) -> StoredSlots | None:
        """Say where the slots lie, for the compiled kernel; None where some places hold no slot."""
        if self.keys is None or self.values is None or self.valid is not None:
            return None
        if self._stored is None:
            form = Form.plain(self.keys, self.values)
            if form is None or not form.is_readable:
                return None
            heads, budget = self.keys.shape[:2]
            self._stored = StoredSlots(form, stride=budget, count=budget, heads=heads)
        return self._stored

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor held, by name."""
        named = {
            "keys": self.keys,
            "values": self.values,
            "slots": self.slots,
            "valid": self.valid,
            "holds": self._current,
        }
        yield from ((name, tensor) for name, tensor in named.items() if tensor is not None)

    def _put(
        self,
        places: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        assert self.slots is not None
        if self.keys is None or self.values is None:
            room = self.slots.shape
            self.keys = keys.new_zeros(*room, keys.shape[-1])
            self.values = values.new_zeros(*room, values.shape[-1])
            self._stored = None
        flat = places.flatten().nonzero().flatten()  # numbers among N x budget
        held = self.slots.view(-1)
        held[flat] = -1  # what is written over is gone, also where an interrupt comes before the new slots are noted
        self.keys.flatten(0, 1).index_copy_(0, flat, keys)
        self.values.flatten(0, 1).index_copy_(0, flat, values)
        held.index_copy_(0, flat, slots)

    def _make_room(self, wanted: Tensor) -> None:
        """Make buffers for as many slots; fetched slots stay when buffers grow, and go when they shrink."""
        if self.slots is not None and self.slots.shape == wanted.shape:
            return
        self._stored = None
        more = -1 if self.slots is None else wanted.shape[1] - self.slots.shape[1]
        if self.slots is None or more < 0 or self.slots.shape[0] != wanted.shape[0]:
            self.slots, self.keys, self.values = torch.full_like(wanted, -1), None, None
            return
        slots, keys, values = torch.nn.functional.pad(self.slots, (0, more), value=-1), self.keys, self.values
        if keys is not None and values is not None:
            keys = torch.nn.functional.pad(keys, (0, 0, 0, more))
            values = torch.nn.functional.pad(values, (0, 0, 0, more))
        self.slots, self.keys, self.values = slots, keys, values  # together: an interrupt leaves them of one size

    def _count(self, wanted: Tensor, missing: Tensor, heads: int, *, is_first: bool) -> None:
        lost = missing.sum(dim=1)  # N
        fetched = int(lost.sum())
        self.stats.fetched += fetched
        if not is_first:
            asked = (wanted >= 0).sum(dim=1)
            self.stats.selections += 1
            self.stats.wanted += int(asked.sum())
            self.stats.reused += int(asked.sum()) - fetched
            self.stats.reused_evenly += int((asked - lost).view(-1, heads).amin(dim=1).sum()) * heads


def _overlap(held: Tensor, wanted: Tensor, stored: int) -> tuple[Tensor, Tensor]:
    """Find which wanted slots are held, and which held ones are wanted.

    The entry behind the last slot stands for no slot.
    """
    nowhere = stored
    gone = (held < 0) | (held >= stored)  # after a step back there may be slots of what is no more
    held, wanted = held.masked_fill(gone, nowhere).long(), wanted.masked_fill(wanted < 0, nowhere).long()
    table = torch.zeros(
        held.shape[0],
        stored + 1,
        dtype=torch.bool,
        device=held.device,
    )
    table.scatter_(1, held, True)[:, nowhere] = False
    there = table.gather(1, wanted)
    table.zero_().scatter_(1, wanted, True)[:, nowhere] = False
    return there, table.gather(1, held)


def _first(free: Tensor, needed: Tensor) -> Tensor:
    """Mark the first `needed` places of each head that are free."""
    return free & (free.cumsum(dim=1) <= needed)
