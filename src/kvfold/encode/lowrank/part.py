"""LowRankPart: slots whose keys and values lie in latents, in as many dimensions as each slot's level has.

The storage is flat, in order of row, level, slot: the slots of one row and level are one dense block of keys and one of
values, so nothing is padded and no slot needs a rank of its own beside it. Where heads are written apart, a block lies
dimension by dimension, as their products want it. All heads of a layer share their slots. Within a level slots are in
order of age. A part that grew has room behind each block (memory/room.py). It does not know who allocates levels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from kvfold.attention.basis import Bases, LatentBlock
from kvfold.attention.kernels.compiled import decode
from kvfold.attention.kernels.latents import StoredLatents
from kvfold.attention.kernels.low_rank import attend_rows, fits
from kvfold.attention.low_rank import LatentView, attend_latents
from kvfold.attention.partial import Partial, nothing
from kvfold.encode.lowrank.format import (
    Blocks,
    Levels,
    LowRankFormat,
    RankAllocation,
    cut,
    flattened,
    oldest_first,
    positions_of,
    promised,
    stored,
)
from kvfold.encode.lowrank.pages import LatentPages
from kvfold.memory.kv import KV
from kvfold.memory.part import Part, State, Usage
from kvfold.memory.ragged import Counts, added
from kvfold.memory.room import WrittenEnd, has_room, with_spare
from kvfold.memory.step import AttentionStep
from kvfold.memory.store import Tier
from kvfold.memory.transcript import Transcript


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankPart(Part):
    """Flat latents, and how many slots each row has of each level. The file's docstring has the order."""

    form: LowRankFormat
    dtype: torch.dtype  # of keys and values as the model hands them, and of latents that are not int8
    held: Int[Tensor, "B levels"]  # slots of each row and level
    keys: Num[Tensor, " key_numbers"]  # blocks [slots, key dimensions of the level], one after the other
    values: Num[Tensor, " value_numbers"]
    positions: Int[Tensor, " tokens"]  # int32, in order of row, level, age: not in order of age alone
    scales: Float[Tensor, "tokens 2"] | None = None  # where latents are int8: of keys and of values
    room: Int[Tensor, "B levels"] | None = None  # slots that each block has room for; None: those it has
    end: WrittenEnd | None = field(default=None, compare=False)  # of the blocks, where there is room
    counts: Counts = field(init=False, compare=False)
    sizes: Counts = field(init=False, compare=False)  # slots of each row and level: `held` as numbers
    places: tuple[Blocks, ...] = field(init=False, compare=False)  # views of the blocks and their room
    blocks: tuple[Blocks, ...] = field(init=False, compare=False)  # views, by row and level
    views: tuple[tuple[LatentView, ...], ...] = field(init=False, compare=False)  # of each row's blocks with slots
    pointers: list[StoredLatents | None] = field(init=False, compare=False)  # to the blocks, once they are asked for

    def __post_init__(self) -> None:
        sizes = _numbers_of(self.held)
        bases = self.form.bases
        counts = tuple((sum(row),) * bases.heads for row in sizes)  # heads share their slots, so their counts are equal
        room = sizes if self.room is None else _numbers_of(self.room)
        places = tuple(_blocks(self, room))
        blocks = places
        if self.room is not None:
            pairs = zip(places, sizes, strict=True)
            blocks = tuple(_first_slots(of_row, counts) for of_row, counts in pairs)
        # Frozen: fields that follow from the others are set here and never again.
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "places", places)
        object.__setattr__(self, "blocks", blocks)
        views = []
        for of_row in blocks:
            filled = [block for block in of_row if len(block.positions)]
            of_filled = [LatentView.of(block, bases) for block in filled]
            views.append(tuple(of_filled))
        object.__setattr__(self, "views", tuple(views))
        object.__setattr__(self, "pointers", [])

    @property
    def stored(self) -> StoredLatents | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where the blocks lie, for the compiled kernel; made by the first step that reads them, not by every fold."""
        if not self.pointers:
            self.pointers.append(StoredLatents.of(self.blocks, self.form.bases))
        return self.pointers[0]

    @classmethod
    def of(
        cls,
        kv: KV,
        kept: Bool[Tensor, "B H S"],
        allocate: RankAllocation,
        form: LowRankFormat,
    ) -> "LowRankPart":
        """Encode the slots that are True, the same for all heads; a row's slots get their levels together."""
        rows = []
        for row in range(kept.shape[0]):
            chosen = kept[row, 0]  # S, the same in every head
            row_keys, row_values = kv.keys[row], kv.values[row]
            keys = row_keys[:, chosen].transpose(0, 1)  # S H D
            values = row_values[:, chosen].transpose(0, 1)  # S H E
            positions = kv.positions[row, 0, chosen]
            positions = positions.to(torch.int32)
            key_latents, value_latents = form.bases.write(keys, values, positions)
            whole = LatentBlock(
                keys=key_latents,
                values=value_latents,
                positions=positions,
            )
            levels = allocate(key_latents, value_latents, positions)  # S, in full precision: before rounding
            blocks = []
            for level in range(len(form.levels)):
                block = cut(whole, levels == level, form.cut_of(level))
                blocks.append(stored(block, form, kv.keys.dtype))
            rows.append(blocks)
        return cls(form=form, dtype=kv.keys.dtype, **flattened(rows, form))

    def attend(self, step: AttentionStep) -> tuple[Partial, "LowRankPart"]:
        """Attend every query to every slot of its row."""
        queries, scale = step.queries, step.scale
        if self.form.planes is None and fits(queries, self.form.bases, scale) and self.slots:
            answer = attend_rows(
                queries,
                self.form.bases,
                keys=self.keys,
                values=self.values,
                scales=self.scales,
                held=self.held,
                room=self.held if self.room is None else self.room,
                dims=_dims(self.form.levels, queries.device),
                slots=max(row[0] for row in self.counts),  # of the longest row
                scale=scale,
            )
            return answer, self
        single = queries.shape[2] == 1
        if single and (stored := self.stored) is not None:
            read = decode(queries, [stored], heads=self.form.bases.heads, scale=scale)
            if read is not None:
                return Partial(*read), self
        return _by_torch(self, queries, scale), self

    def read(self, heads: slice = slice(None)) -> KV:
        """Reconstruct the slots of some heads, oldest first."""
        rows = [_read_row(blocks, self.form.bases, self.dtype) for blocks in self.blocks]
        sides = [torch.stack(side) for side in zip(*rows, strict=True)]  # B H S and on
        keys, values, positions = (side[:, heads] for side in sides)
        return KV(keys, values, positions)

    def keep(self, kept: Bool[Tensor, " slots"]) -> "LowRankPart":
        """Keep the slots that are True, in fresh storages that fit exactly."""
        return self._of(_kept_rows(self, kept))

    def extend(self, other: Part, transcript: Transcript, most: int = 0) -> "LowRankPart":
        """Append another part's slots, row by row and level by level: into the room of its blocks, or of a copy."""
        assert isinstance(other, LowRankPart), "parts of one layer have one layout"
        after = added(self.sizes, other.sizes)
        room = self.sizes if self.room is None else _numbers_of(self.room)
        is_newest = False  # an older part must not write behind its slots
        if self.end is not None and has_room(after, room):
            is_newest = self.end.claim(self.sizes, after)
        if is_newest:
            grown = replace(self, held=self.held + other.held)
        else:
            grown = _copied(self, after, most)
        # Their slots are later ones, so a level stays in order of age.
        for of_row in zip(grown.places, self.sizes, other.blocks, strict=True):
            for place, first, block in zip(*of_row, strict=True):
                place.write(first, block)
        return grown

    def take_rows(self, rows: Sequence[int]) -> "LowRankPart":
        """Pick these rows, in this order, repeats allowed."""
        return self._of([self.blocks[row] for row in rows])

    def pages(self, tier: Tier) -> LatentPages:
        """Open an empty page store for latents of these levels."""
        tensors = dict(self.without_room().tensors())
        counts = tensors.pop("held")
        # Cloned, so that the empty part does not keep these storages alive.
        none = {name: tensor[:0].clone() for name, tensor in tensors.items()}
        empty = replace(self, held=torch.zeros_like(counts), room=None, end=None, **none)
        return LatentPages.empty(empty, tier, self.positions.device)

    def usage(self) -> Usage:
        """Say that everything is attended, and which share of each slot's numbers is kept."""
        of_level = torch.tensor(self.form.dims) / self.form.size  # levels
        shares = []
        for blocks in self.blocks:
            counts = torch.tensor([len(block.positions) for block in blocks])
            share = of_level.repeat_interleave(counts)  # of each slot, level by level
            order = oldest_first(blocks).cpu()
            shares.append(share[order])
        return Usage(attended_slots=self.slots, slack=_slack(self), shares=tuple(shares))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the slots of each level, latents of keys and values, positions, and scales where latents are int8."""
        yield "held", self.held
        yield "keys", self.keys
        yield "values", self.values
        yield "positions", self.positions
        if self.scales is not None:
            yield "scales", self.scales
        if self.room is not None:
            yield "room", self.room

    def without_room(self) -> "LowRankPart":
        """Give the same slots in storages that fit exactly; itself where there is no room."""
        return self if self.room is None else self._of(self.blocks)

    def state(self) -> State:
        """Give levels, in which parts latents are written, the dtype of what comes back, and every tensor, tight."""
        plain = {
            "levels": [list(level) for level in self.form.levels],
            "parts": self.form.parts,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        return plain, dict(self.without_room().tensors())

    @classmethod
    def from_state(
        cls,
        plain: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        form: LowRankFormat,
    ) -> "LowRankPart":
        """Build the part that was saved. Raises ValueError where plain values, tensors and format do not fit."""
        _check_format(plain, tensors, form)
        for name, count in promised(_numbers_of(tensors["held"]), form).items():
            there = tensors[name].shape[0]
            if there != count:
                raise ValueError(f"{count} {name} are promised, and {there} are there")
        dtype = getattr(torch, plain["dtype"])
        named: Any = tensors
        return cls(form=form, dtype=dtype, **named)

    def _of(self, rows: Sequence[Blocks]) -> "LowRankPart":
        return LowRankPart(form=self.form, dtype=self.dtype, **flattened(rows, self.form))


def _by_torch(part: LowRankPart, queries: Tensor, scale: float) -> Partial:
    """Attend row by row: rows hold different numbers of slots of each level."""
    answers = []
    for row, views in enumerate(part.views):
        of_row = queries[row : row + 1]  # 1 G Q D
        if views and queries.shape[2]:
            answers.append(attend_latents(of_row[0], views, part.form.bases, scale=scale))
        else:
            answers.append(nothing(of_row))
    if len(answers) == 1:
        return answers[0]
    output = torch.cat([answer.output for answer in answers])  # B G Q E
    log_sum_exp = torch.cat([answer.log_sum_exp for answer in answers])
    return Partial(output, log_sum_exp)


def _kept_rows(part: LowRankPart, kept: Bool[Tensor, " slots"]) -> list[Blocks]:
    """Cut the blocks of each row to the slots that are True."""
    rows = []
    sizes = [sum(row) for row in part.counts]
    for blocks, of_row in zip(part.blocks, kept.split(sizes), strict=True):
        by_head = of_row.view(part.form.bases.heads, -1)  # H S
        first = by_head[0]
        assert bool((by_head == first).all()), "all heads of a layer share their slots"
        # `kept` is oldest first; blocks are level by level. Slot i in order of age is stored at order[i].
        by_level = torch.empty_like(first)
        by_level[oldest_first(blocks)] = first
        pieces = by_level.split([len(block.positions) for block in blocks])
        pairs = zip(blocks, pieces, strict=True)
        rows.append([cut(block, piece) for block, piece in pairs])
    return rows


def _copied(
    part: LowRankPart,
    after: Counts,
    most: int,
) -> LowRankPart:
    """Copy a part into buffers with room for so many slots, and a little more; the new ones are not written yet."""
    left = most - max(map(sum, after))  # of the longest row
    # A level that fills up moves all levels: they lie in one piece, so that a kernel takes them by one pointer.
    room = with_spare(after, left // len(part.form.levels))
    tensors = {}
    for name, count in promised(room, part.form).items():
        like = getattr(part, name)
        tensors[name] = like.new_empty(count, *like.shape[1:])
    held = part.held.new_tensor(after)
    grown = replace(part, held=held, room=None, end=None, **tensors)
    if room != after:
        of_blocks = part.held.new_tensor(room)
        grown = replace(grown, room=of_blocks, end=WrittenEnd(after))
    for places, blocks in zip(grown.places, part.blocks, strict=True):
        for place, block in zip(places, blocks, strict=True):
            place.write(0, block)
    return grown


def _slack(part: LowRankPart) -> dict[str, int]:
    """Count the bytes of room for slots to come, by tensor."""
    used = promised(part.sizes, part.form)
    slack = {}
    for name, count in used.items():
        tensor = getattr(part, name)
        slack[name] = tensor[:1].nbytes * (len(tensor) - count)
    return slack


def _read_row(
    blocks: Blocks,
    bases: Bases,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruct keys and values [H, S, D] of one row, oldest first, and give their positions [H, S]."""
    order = oldest_first(blocks)
    by_level = torch.cat([bases.read_keys(block) for block in blocks])
    keys = by_level[order].to(dtype)  # S H D
    by_level = torch.cat([bases.read_values(block) for block in blocks])
    values = by_level[order].to(dtype)  # S H E
    positions = positions_of(blocks)[order]
    return (
        keys.transpose(0, 1),
        values.transpose(0, 1),
        positions.expand(bases.heads, -1),
    )


def _blocks(part: LowRankPart, held: Sequence[Sequence[int]]) -> Iterator[Blocks]:
    """View the flat storage as a block for each row and level."""
    bases = part.form.bases
    key, value, slot = 0, 0, 0  # where the next block begins in keys, values and positions
    for of_levels in held:
        blocks = []
        for count, (key_rank, value_rank) in zip(of_levels, part.form.levels, strict=True):
            key_end = key + count * key_rank
            value_end = value + count * value_rank
            slots = slice(slot, slot + count)
            keys = part.keys[key:key_end]
            values = part.values[value:value_end]
            block = LatentBlock(
                keys=bases.keys.unflattened(keys, count, key_rank),
                values=bases.values.unflattened(values, count, value_rank),
                positions=part.positions[slots],
                scales=None if part.scales is None else part.scales[slots],
                planes=part.form.planes,
            )
            blocks.append(block)
            key, value, slot = key_end, value_end, slots.stop
        yield tuple(blocks)


def _check_format(
    plain: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    form: LowRankFormat,
) -> None:
    """Refuse latents that were written in another format. Raises ValueError."""
    levels = tuple(tuple(level) for level in plain["levels"])  # JSON gives lists
    if levels != form.levels:
        raise ValueError(f"latents of {levels} dimensions are there, and the adapter's have {form.levels}")
    if plain["parts"] != form.parts:
        raise ValueError(f"keys and values of {plain['parts']} parts are there, and the adapter's have {form.parts}")
    scaled = "scales" in tensors
    if scaled != form.scaled:
        ways = ("numbers", "bytes")
        raise ValueError(f"latents as {ways[scaled]} are there, and the plan's are {ways[form.scaled]}")


def _numbers_of(held: Int[Tensor, "B levels"]) -> Counts:
    """Read slots of each row and level."""
    rows = held.tolist()
    return tuple(tuple(row) for row in rows)


def _first_slots(blocks: Blocks, sizes: Sequence[int]) -> Blocks:
    """Cut the room off the blocks of a row."""
    first = []
    for block, size in zip(blocks, sizes, strict=True):
        first.append(block.tile(0, size))
    return first


@cache
def _dims(levels: Levels, device: torch.device) -> Int[Tensor, "levels 2"]:
    """Put the dimensions of each level onto the device, where the kernel reads them: once, for they never change."""
    return torch.tensor(levels, dtype=torch.int32, device=device)
