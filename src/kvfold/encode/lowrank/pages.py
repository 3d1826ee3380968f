"""Low-rank pages: latents of a part as they lie in a tier, a store for each level, so that any few can be fetched.

The rows of a store are batch rows: heads share their slots. A table says of each slot which level it has and which
place there. Only what is fetched is written out as keys and values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.attention.basis import Basis, LatentBlock
from kvfold.encode.lowrank.format import flattened, oldest_first, positions_of
from kvfold.memory.pages import Fetched, Pages
from kvfold.memory.part import Part
from kvfold.memory.ragged import Counts, added
from kvfold.memory.store import Tier, TierStore


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentPages(Pages):
    """Latents of every level, and a table that says of each slot of a row which level it has and which place there."""

    like: Any  # a LowRankPart without slots: it says how they are written
    levels: tuple[TierStore, ...]
    table: TierStore
    held: tuple[tuple[int, ...], ...]  # levels B: slots of each level and row

    @classmethod
    def empty(cls, like: Any, tier: Tier, device: torch.device) -> "LatentPages":
        """Open pages without slots."""
        rows, levels = len(like.held), len(like.form.levels)
        return cls(
            like=like,
            levels=tuple(TierStore(tier, device) for _ in range(levels)),
            table=TierStore(tier, device),
            held=((0,) * rows,) * levels,
        )

    @property
    def lineage(self) -> object:
        """Identify the history by the table."""
        return self.table.lineage

    def append(self, counts: Counts, fresh: Any) -> "LatentPages":
        """Write level by level; a slot's place is how many of its level came before."""
        by_level = fresh.held.T.tolist()  # levels B
        sizes = [tuple(of_rows) for of_rows in by_level]
        names = ("keys", "values", "scales") if self.like.form.scaled else ("keys", "values")
        stores = []
        for level, (store, of_rows) in enumerate(zip(self.levels, sizes, strict=True)):
            blocks = [row[level] for row in fresh.blocks]
            payload = {}
            for name in names:
                payload[name] = torch.cat([getattr(block, name) for block in blocks])
            stores.append(store.append(self.held[level], payload, of_rows))
        rows = [self._places(blocks, row) for row, blocks in enumerate(fresh.blocks)]
        payload = {}
        for name in rows[0]:
            payload[name] = torch.cat([row[name] for row in rows])
        # Heads share their slots: the first head's count is that of the row.
        before = tuple(row[0] for row in counts)
        more = [of_heads[0] for of_heads in fresh.counts]
        table = self.table.append(before, payload, more)
        return replace(
            self,
            levels=tuple(stores),
            table=table,
            held=added(self.held, tuple(sizes)),
        )

    def fetch(
        self,
        heads: Int[Tensor, " S"],
        slots: Int[Tensor, " S"],
    ) -> Fetched:
        """Fetch the latent of each slot, reconstruct it for all heads, and pick the head that is asked for."""
        number = self.like.form.bases.heads
        # Entry n of N is head n % H of row n // H.
        rows = heads // number
        keys, values, moved = self._read(rows, slots)  # S H D
        each = torch.arange(len(slots), device=keys.device)
        of_row = heads % number
        keys = keys[each, of_row]  # S D
        values = values[each, of_row]  # S E
        return keys, values, moved

    def window(
        self,
        start: int,
        stop: int,
    ) -> tuple[Float[Tensor, "N S D"], Float[Tensor, "N S E"]]:
        """Reconstruct a window of every row, for all heads."""
        rows = len(self.held[0])
        device = self.table.device
        every_row = torch.arange(rows, device=device)
        every_slot = torch.arange(start, stop, device=device)
        keys, values, _ = self._read(
            every_row.repeat_interleave(stop - start),
            every_slot.repeat(rows),
        )  # B x S, H, D
        by_row = [side.unflatten(0, (rows, -1)) for side in (keys, values)]  # B S H D
        by_head = [side.transpose(1, 2) for side in by_row]  # B H S D
        keys, values = (side.flatten(0, 1) for side in by_head)
        return keys, values

    def keys(self, head: int, start: int, stop: int) -> Float[Tensor, "S D"]:
        """Reconstruct the keys of some slots of one head."""
        slots = torch.arange(start, stop, device=self.table.device)
        heads = torch.full_like(slots, head)
        keys, _, _ = self.fetch(heads, slots)
        return keys

    def positions(self, head: int, start: int, stop: int) -> Int[Tensor, " S"]:
        """Read positions as the table has them."""
        row = head // self.like.form.bases.heads
        return self.table.buffers["positions"].read(row, start, stop)

    def whole(self, counts: Counts) -> Part:
        """Fetch all latents as a part: row by row, level by level."""
        levels = range(len(self.levels))
        rows = []
        for row in range(len(counts)):
            rows.append([self._latents(level, row) for level in levels])
        tensors = flattened(rows, self.like.form)
        return replace(self.like, **tensors)

    def slack(self, counts: Counts) -> dict[str, int]:
        """Count what the stores have behind the slots of each row."""
        found = self.table.slack(tuple(row[0] for row in counts))
        for level, (store, held) in enumerate(zip(self.levels, self.held, strict=True)):
            found |= {f"{name}_{level}": size for name, size in store.slack(held).items()}
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the latents of each level, and the table."""
        for level, store in enumerate(self.levels):
            for name, tensor in store.tensors():
                yield f"{name}_{level}", tensor
        yield from self.table.tensors()
        yield "held", self.like.held

    def _places(self, blocks: Sequence[Any], row: int) -> dict[str, Tensor]:
        """List the level, the place in it and the position of a row's fresh slots, oldest first."""
        device = self.table.device
        levels, places = [], []
        for level, block in enumerate(blocks):
            count = len(block.positions)
            same = torch.full((count,), level, dtype=torch.uint8, device=device)
            levels.append(same)
            fresh = torch.arange(count, dtype=torch.int32, device=device)
            before = self.held[level][row]
            places.append(fresh + before)
        # A part lies level by level, a table in order of age.
        order = oldest_first(blocks)
        by_level = {
            "level": torch.cat(levels),
            "place": torch.cat(places),
            "positions": positions_of(blocks),
        }
        return {name: tensor[order] for name, tensor in by_level.items()}

    def _read(
        self,
        rows: Int[Tensor, " S"],
        slots: Int[Tensor, " S"],
    ) -> tuple[Tensor, Tensor, int]:
        """Fetch slots level by level; give keys [S, H, D], values [S, H, E] and the number of bytes that moved."""
        entries = rows * self.table.capacity + slots
        spots = self.table.gather(entries, ["level", "place", "positions"])
        bases = self.like.form.bases
        keys = self._room(bases.keys, len(slots))
        values = self._room(bases.values, len(slots))
        moved = 0
        for level, store in enumerate(self.levels):
            of_level = spots["level"] == level
            where = of_level.nonzero().flatten()  # which of the slots asked for have this level
            if not len(where):
                continue
            places = rows[where] * store.capacity + spots["place"][where]
            found = store.gather(places, list(store.buffers))
            positions = spots["positions"][where]
            block = LatentBlock(positions=positions, planes=self.like.form.planes, **found)
            # Levels come one by one; each slot goes back to where it was asked for.
            keys[where] = bases.read_keys(block).to(keys.dtype)
            values[where] = bases.read_values(block).to(values.dtype)
            moved += sum(tensor.nbytes for tensor in found.values())
        return keys, values, moved

    def _room(self, basis: Basis, slots: int) -> Float[Tensor, "S H D"]:
        """Make room for what one basis reconstructs of so many slots."""
        heads = self.like.form.bases.heads
        size = len(basis.mean) // heads  # a mean has a number for each number of a slot
        return torch.zeros(
            slots,
            heads,
            size,
            dtype=self.like.dtype,
            device=self.table.device,
        )

    def _latents(self, level: int, row: int) -> LatentBlock:
        """Fetch a row's slots of one level, oldest first."""
        count = self.held[level][row]
        total = sum(of_rows[row] for of_rows in self.held)
        device = self.table.device
        levels = self.table.buffers["level"].read(row, 0, total)
        positions = self.table.buffers["positions"].read(row, 0, total)
        # A level's places are in order of age, as the table is, so its slots are found in the order of its store.
        positions = positions[levels == level]
        latents = {}
        for name, buffer in self.levels[level].buffers.items():
            latents[name] = buffer.read(row, 0, count).to(device)
        return LatentBlock(positions=positions.to(device), planes=self.like.form.planes, **latents)
