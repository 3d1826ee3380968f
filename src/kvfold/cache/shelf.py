"""Shelf: the slots of a part as they lie in a tier, so that any few of them can be fetched and read.

One shelf per layout of parts; `shelf_of` gives the one for a part. What is fetched comes back as keys and values, so
whoever attends does not know how a slot was written. A shelf is a value over stores that change (far.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import singledispatch

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.attention.latent import LatentBlock
from kvfold.cache.dense import DensePart
from kvfold.cache.far import Store, Tier
from kvfold.cache.lowrank import LowRankPart
from kvfold.cache.part import Counts, Part
from kvfold.errors import CacheError

Fetched = tuple[Tensor, Tensor, int]  # keys and values of some slots, and the bytes that were moved


class Shelf(ABC):
    """Slots of lanes (rows x heads), oldest first."""

    @property
    @abstractmethod
    def lineage(self) -> object:
        """The same for shelves whose common slots are the same; another where a past was written anew."""

    @abstractmethod
    def append(self, counts: Counts, fresh: Part) -> "Shelf":
        """The shelf with a part's slots behind the first `counts` of its lanes. Raises FileError where that fails."""

    @abstractmethod
    def fetch(self, lanes: Int[Tensor, " S"], slots: Int[Tensor, " S"]) -> Fetched:
        """Keys [S, D] and values of some slots, on the device."""

    @abstractmethod
    def block(self, start: int, stop: int) -> tuple[Float[Tensor, "L S D"], Float[Tensor, "L S E"]]:
        """Keys and values of slots start to stop of every lane; zeros, or leftovers, where a lane has fewer."""

    @abstractmethod
    def keys(self, lane: int, start: int, stop: int) -> Float[Tensor, "S D"]:
        """Keys of some slots of one lane."""

    @abstractmethod
    def positions(self, lane: int, start: int, stop: int) -> Int[Tensor, " S"]:
        """Where some slots of one lane sat in the text."""

    @abstractmethod
    def whole(self, counts: Counts) -> Part:
        """All slots as a part on the device again."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor held, by a name without a dot."""


@singledispatch
def shelf_of(part: Part, tier: Tier) -> Shelf:
    """An empty shelf for parts like this one."""
    raise CacheError(
        f"a {type(part).__name__} was to lie in {tier.name} memory; nothing knows how to fetch single slots of it; "
        "leave the place member away, or store slots in another way"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseShelf(Shelf):
    """Slots as a codec wrote them, a lane for each row and head."""

    like: DensePart  # without slots: it says how they are written
    store: Store

    @property
    def lineage(self) -> object:
        """Its store's."""
        return self.store.lineage

    def append(self, counts: Counts, fresh: Part) -> "DenseShelf":
        """Lane after lane."""
        assert isinstance(fresh, DensePart), "parts of one layer have one layout"
        payload = {**fresh.payload, "positions": fresh.positions}
        return replace(self, store=self.store.append(_flat(counts), payload, _flat(fresh.counts)))

    def fetch(self, lanes: Tensor, slots: Tensor) -> Fetched:
        """Gathered, then decoded."""
        payload = self.store.gather(lanes * self.store.capacity + slots, list(self.like.payload))
        return *self._decode(payload), sum(one.nbytes for one in payload.values())

    def block(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A window of every lane."""
        return self._decode(self.store.block(start, stop, list(self.like.payload)))

    def keys(self, lane: int, start: int, stop: int) -> Tensor:
        """Decoded."""
        own = {name: self.store.regions[name].tensor[lane, start:stop] for name in self.like.payload}
        return self._decode(own)[0].to(self.store.device)

    def positions(self, lane: int, start: int, stop: int) -> Tensor:
        """As they are stored."""
        return self.store.regions["positions"].tensor[lane, start:stop]

    def whole(self, counts: Counts) -> DensePart:
        """One after the other."""
        return self.like.made_of(self.store.flat(_flat(counts)), counts)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The codec's regions, and the positions."""
        yield from ((name, region.tensor) for name, region in self.store.regions.items())

    def _decode(self, payload: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.like.codec.decode(payload, self.like.dtype)


@shelf_of.register
def _(part: DensePart, tier: Tier) -> Shelf:
    empty = part.made_of({name: one[:0].clone() for name, one in part.tensors()}, _none(part.counts))
    return DenseShelf(like=empty, store=Store(tier, part.positions.device))


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


def _flat(counts: Counts) -> tuple[int, ...]:
    return tuple(count for row in counts for count in row)


def _none(counts: Counts) -> Counts:
    return tuple(tuple(0 for _ in row) for row in counts)
