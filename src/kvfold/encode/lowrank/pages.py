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

from kvfold.attention.basis import LatentBlock
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
    held: tuple[tuple[int, ...], ...]  # of each level, slots of each row

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
        sizes = [tuple(int(count) for count in column) for column in fresh.held.T.tolist()]
        names = ("keys", "values", "scales") if self.like.form.int8 else ("keys", "values")
        stores = []
        for level, (store, of_rows) in enumerate(zip(self.levels, sizes, strict=True)):
            blocks = [row[level] for row in fresh.blocks]
            payload = {name: torch.cat([getattr(block, name) for block in blocks]) for name in names}
            stores.append(store.append(self.held[level], payload, of_rows))
        rows = [self._places(blocks, row) for row, blocks in enumerate(fresh.blocks)]
        payload = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        table = self.table.append(
            tuple(row[0] for row in counts),
            payload,
            [of_heads[0] for of_heads in fresh.counts],
        )
        return replace(
            self,
            levels=tuple(stores),
            table=table,
            held=added(self.held, tuple(sizes)),
        )

    def fetch(self, heads: Int[Tensor, " S"], slots: Int[Tensor, " S"]) -> Fetched:
        """Reconstruct each slot for all heads, of which one is wanted."""
        number = self.like.form.bases.heads
        keys, values, moved = self._read(heads // number, slots)
        wanted = torch.arange(len(slots), device=keys.device), heads % number
        return keys[wanted], values[wanted], moved

    def window(
        self,
        start: int,
        stop: int,
    ) -> tuple[Float[Tensor, "N S D"], Float[Tensor, "N S E"]]:
        """Reconstruct a window of every row, for all heads."""
        rows, device = len(self.held[0]), self.table.device
        row = torch.arange(rows, device=device).repeat_interleave(stop - start)
        keys, values, _ = self._read(
            row,
            torch.arange(
                start,
                stop,
                device=device,
            ).repeat(rows),
        )
        by_row = [side.unflatten(0, (rows, -1)) for side in (keys, values)]  # B S H D
        keys, values = (side.transpose(1, 2).flatten(0, 1) for side in by_row)
        return keys, values

    def keys(self, head: int, start: int, stop: int) -> Float[Tensor, "S D"]:
        """Reconstruct the keys of some slots of one head."""
        slots = torch.arange(start, stop, device=self.table.device)
        return self.fetch(torch.full_like(slots, head), slots)[0]

    def positions(self, head: int, start: int, stop: int) -> Int[Tensor, " S"]:
        """Read positions as the table has them."""
        return self.table.buffers["positions"].read(
            head // self.like.form.bases.heads,
            start,
            stop,
        )

    def whole(self, counts: Counts) -> Part:
        """Put latents row by row, level by level, as such a part lies."""
        blocks = [self._latents(level, row) for row in range(len(counts)) for level in range(len(self.levels))]
        bases = self.like.form.bases
        scales = [block.scales for block in blocks if block.scales is not None]
        return replace(
            self.like,
            held=torch.tensor(
                self.held,
                dtype=torch.int32,
                device=self.table.device,
            ).T.contiguous(),
            keys=torch.cat([bases.keys.flattened(block.keys) for block in blocks]),
            values=torch.cat([bases.values.flattened(block.values) for block in blocks]),
            positions=torch.cat([block.positions for block in blocks]),
            scales=torch.cat(scales) if scales else None,
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the latents of each level, and the table."""
        for level, store in enumerate(self.levels):
            yield from ((f"{name}_{level}", tensor) for name, tensor in store.tensors())
        yield from self.table.tensors()
        yield "held", self.like.held

    def _places(self, blocks: Sequence[Any], row: int) -> dict[str, Tensor]:
        """Give level, place in it and position of a row's fresh slots, oldest first."""
        device = self.table.device
        levels, places = [], []
        for level, block in enumerate(blocks):
            count = len(block.positions)
            levels.append(torch.full((count,), level, dtype=torch.uint8, device=device))
            places.append(
                torch.arange(
                    count,
                    dtype=torch.int32,
                    device=device,
                )
                + self.held[level][row]
            )
        positions = torch.cat([block.positions for block in blocks])
        order = positions.argsort(stable=True)
        return {"level": torch.cat(levels)[order], "place": torch.cat(places)[order], "positions": positions[order]}

    def _read(
        self,
        rows: Int[Tensor, " S"],
        slots: Int[Tensor, " S"],
    ) -> tuple[Tensor, Tensor, int]:
        """Fetch some slots, level by level, and reconstruct keys and values [S, H, D]; and the bytes that moved."""
        spots = self.table.gather(rows * self.table.capacity + slots, ["level", "place", "positions"])
        bases = self.like.form.bases
        sizes = [basis.mean.shape[0] // bases.heads for basis in (bases.keys, bases.values)]
        shapes = [(len(slots), bases.heads, size) for size in sizes]
        keys, values = (
            torch.zeros(
                shape,
                dtype=self.like.dtype,
                device=self.table.device,
            )
            for shape in shapes
        )
        moved = 0
        for level, store in enumerate(self.levels):
            some = (spots["level"] == level).nonzero().flatten()
            if not len(some):
                continue
            found = store.gather(rows[some] * store.capacity + spots["place"][some], list(store.buffers))
            block = LatentBlock(positions=spots["positions"][some], **found)
            keys[some] = bases.read_keys(block).to(keys.dtype)
            values[some] = bases.read_values(block).to(values.dtype)
            moved += sum(tensor.nbytes for tensor in found.values())
        return keys, values, moved

    def _latents(self, level: int, row: int) -> LatentBlock:
        """Fetch a row's slots of one level, oldest first."""
        count, total = self.held[level][row], sum(of_rows[row] for of_rows in self.held)
        device = self.table.device
        of_level = self.table.buffers["level"].read(row, 0, total) == level
        latents = {
            name: buffer.read(
                row,
                0,
                count,
            ).to(device)
            for name, buffer in self.levels[level].buffers.items()
        }
        positions = (
            self.table.buffers["positions"]
            .read(
                row,
                0,
                total,
            )[of_level]
            .to(device)
        )
        return LatentBlock(positions=positions, **latents)
