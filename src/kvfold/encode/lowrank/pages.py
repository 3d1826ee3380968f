"""Low-rank pages: latents of a part as they lie in a tier, a store for each level, so that any few can be fetched.

The rows of a store are batch rows: heads share their slots. A table says of each slot which level it has and which
place there. Only what is fetched is written out as keys and values.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvfold.attention.basis import LatentBlock
from kvfold.encode.lowrank.part import LowRankPart
from kvfold.memory.pages import Fetched, Shelf, shelf_of
from kvfold.memory.part import Counts, Part
from kvfold.memory.store import Store, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShelf(Shelf):
    """Latents, a store for each level with a lane for each row, and where each slot of a row lies: level and place.

    Only what is fetched is written out as keys and values; heads share their slots."""

    like: LowRankPart  # without slots
    levels: tuple[Store, ...]
    where: Store
    held: tuple[tuple[int, ...], ...]  # of each level, slots of each row

    @property
    def lineage(self) -> object:
        """Its table's."""
        return self.where.lineage

    def append(self, counts: Counts, fresh: Part) -> "LatentShelf":
        """Level by level; a slot's place is how many of its level came before."""
        assert isinstance(fresh, LowRankPart), "parts of one layer have one layout"
        sizes = [tuple(int(count) for count in column) for column in fresh.held.T.tolist()]
        stores = []
        for level, (store, own) in enumerate(zip(self.levels, sizes, strict=True)):
            blocks = [row[level].latents for row in fresh.blocks]
            names = ("keys", "values", "scales") if self.like.form.codes else ("keys", "values")
            payload = {name: torch.cat([getattr(one, name) for one in blocks]) for name in names}
            stores.append(store.append(self.held[level], payload, own))
        rows = [self._places(row, number) for number, row in enumerate(fresh.blocks)]
        table = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return replace(
            self,
            levels=tuple(stores),
            where=self.where.append(tuple(row[0] for row in counts), table, [row[0] for row in fresh.counts]),
            held=tuple(tuple(a + b for a, b in zip(*pair, strict=True)) for pair in zip(self.held, sizes, strict=True)),
        )

    def fetch(self, lanes: Tensor, slots: Tensor) -> Fetched:
        """Each slot written out for all heads, of which one is wanted."""
        heads = self.like.form.bases.heads
        keys, values, moved = self._read(lanes // heads, slots)
        one = torch.arange(len(slots), device=keys.device), lanes % heads
        return keys[one], values[one], moved

    def block(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A window of every row, for all heads."""
        rows, device = len(self.held[0]), self.where.device
        row = torch.arange(rows, device=device).repeat_interleave(stop - start)
        keys, values, _ = self._read(row, torch.arange(start, stop, device=device).repeat(rows))
        return tuple(one.unflatten(0, (rows, -1)).transpose(1, 2).flatten(0, 1) for one in (keys, values))  # pyright: ignore[reportReturnType]

    def keys(self, lane: int, start: int, stop: int) -> Tensor:
        """Written out."""
        slots = torch.arange(start, stop, device=self.where.device)
        return self.fetch(torch.full_like(slots, lane), slots)[0]

    def positions(self, lane: int, start: int, stop: int) -> Tensor:
        """As they are stored."""
        return self.where.regions["positions"].tensor[lane // self.like.form.bases.heads, start:stop]

    def whole(self, counts: Counts) -> LowRankPart:
        """Row by row, level by level, as such a part lies."""
        rows = range(len(counts))
        latents = [[self._latents(level, row) for level in range(len(self.levels))] for row in rows]
        pieces, bases = [piece for row in latents for piece in row], self.like.form.bases
        scales = [piece.scales for piece in pieces if piece.scales is not None]
        return replace(
            self.like,
            held=torch.tensor(self.held, dtype=torch.int32, device=self.where.device).T.contiguous(),
            keys=torch.cat([bases.keys.flattened(piece.keys) for piece in pieces]),
            values=torch.cat([bases.values.flattened(piece.values) for piece in pieces]),
            positions=torch.cat([piece.positions for piece in pieces]),
            scales=torch.cat(scales) if scales else None,
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The latents of each level, and the table."""
        for level, store in enumerate(self.levels):
            yield from ((f"{name}_{level}", region.tensor) for name, region in store.regions.items())
        yield from ((name, region.tensor) for name, region in self.where.regions.items())
        yield "held", self.like.held

    def _places(self, blocks: tuple, row: int) -> dict[str, Tensor]:
        """Of a row's fresh slots, oldest first: level, place in it, position."""
        device = self.where.device
        order = torch.cat([block.positions for block in blocks]).argsort(stable=True)
        level = [torch.full((len(block.positions),), number, dtype=torch.uint8, device=device)
                 for number, block in enumerate(blocks)]  # fmt: skip
        place = [torch.arange(len(block.positions), dtype=torch.int32, device=device) + self.held[number][row]
                 for number, block in enumerate(blocks)]  # fmt: skip
        return {
            "level": torch.cat(level)[order],
            "place": torch.cat(place)[order],
            "positions": torch.cat([block.positions for block in blocks])[order],
        }

    def _read(self, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values [S, H, D] of some slots, level by level."""
        spots = self.where.gather(rows * self.where.capacity + slots, ["level", "place", "positions"])
        bases = self.like.form.bases
        shapes = [(len(slots), bases.heads, basis.mean.shape[0] // bases.heads) for basis in (bases.keys, bases.values)]
        keys, values = (torch.zeros(shape, dtype=self.like.dtype, device=self.where.device) for shape in shapes)
        moved = 0
        for level, store in enumerate(self.levels):
            some = (spots["level"] == level).nonzero().flatten()
            if len(some):
                found = store.gather(rows[some] * store.capacity + spots["place"][some], list(store.regions))
                block = LatentBlock(positions=spots["positions"][some], **found)
                keys[some] = bases.read_keys(block).to(keys.dtype)
                values[some] = bases.read_values(block).to(values.dtype)
                moved += sum(one.nbytes for one in found.values())
        return keys, values, moved

    def _latents(self, level: int, row: int) -> LatentBlock:
        """A row's slots of one level, oldest first."""
        count, total = self.held[level][row], sum(own[row] for own in self.held)
        mine = self.where.regions["level"].tensor[row, :total] == level
        own = {
            name: region.tensor[row, :count].to(self.where.device)
            for name, region in self.levels[level].regions.items()
        }
        positions = self.where.regions["positions"].tensor[row, :total][mine].to(self.where.device)
        return LatentBlock(positions=positions, **own)


@shelf_of.register
def _(part: LowRankPart, tier: Tier) -> Shelf:
    device, rows, levels = part.positions.device, len(part.counts), len(part.form.levels)
    none = {name: tensor[:0].clone() for name, tensor in part.tensors() if name not in ("held", "mass")}
    return LatentShelf(
        like=replace(part, held=torch.zeros_like(part.held), mass=None, **none),
        levels=tuple(Store(tier, device) for _ in range(levels)),
        where=Store(tier, device),
        held=((0,) * rows,) * levels,
    )
