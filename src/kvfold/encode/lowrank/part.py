"""LowRankPart: slots whose keys and values lie in latents, in as many dimensions as each slot's level has.

The storage is flat, in order of row, level, slot: the slots of one row and level are one dense block of keys and one of
values, so nothing is padded and no slot needs a rank of its own beside it. Where heads are written apart, a block lies
dimension by dimension, as their products want it. All heads of a layer share their slots. Within a level slots are in
order of age. It does not know who allocates levels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from kvfold.attention.basis import LatentBlock
from kvfold.attention.kernels.low_rank import attend_rows, fits
from kvfold.attention.low_rank import LatentView, attend_latents
from kvfold.attention.partial import Partial, nothing
from kvfold.encode.lowrank.blocks import Blocks, cut, flattened, joined, oldest_first, positions_of, stored
from kvfold.encode.lowrank.format import Levels, LowRankFormat, RankAllocation
from kvfold.encode.lowrank.pages import LatentPages
from kvfold.memory.kv import KV
from kvfold.memory.part import Part, State, Usage
from kvfold.memory.ragged import Counts
from kvfold.memory.step import AttentionStep
from kvfold.memory.store import Tier
from kvfold.memory.transcript import Transcript


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankPart(Part):
    """Flat latents, and how many slots each row has of each level. The file's docstring has the order."""

    form: LowRankFormat
    dtype: torch.dtype  # of keys and values as the model hands them, and of latents that are not int8
    held: Int[Tensor, "B levels"]
    keys: Num[Tensor, " key_numbers"]
    values: Num[Tensor, " value_numbers"]
    positions: Int[Tensor, " tokens"]
    scales: Float[Tensor, "tokens 2"] | None = None  # where latents are int8: of keys and of values
    counts: Counts = field(init=False, compare=False)
    blocks: tuple[Blocks, ...] = field(init=False, compare=False)  # views, by row and level
    views: tuple[tuple[LatentView, ...], ...] = field(init=False, compare=False)  # of each row's blocks with slots

    def __post_init__(self) -> None:
        held, heads = self.held.tolist(), self.form.bases.heads
        object.__setattr__(self, "counts", tuple((sum(row),) * heads for row in held))
        object.__setattr__(self, "blocks", tuple(self._blocks(held)))
        views = []
        for blocks in self.blocks:
            filled = [block for block in blocks if len(block.positions)]
            views.append(tuple(LatentView.of(block, self.form.bases) for block in filled))
        object.__setattr__(self, "views", tuple(views))

    @classmethod
    def of(cls, kv: KV, kept: Bool[Tensor, "B H S"], allocate: RankAllocation, form: LowRankFormat) -> "LowRankPart":
        """Encode the slots that are True, the same for all heads; a row's slots get their levels together."""
        rows = []
        for row in range(kept.shape[0]):
            some = kept[row, 0]
            keys = kv.keys[row][:, some].transpose(0, 1)  # S H D
            values = kv.values[row][:, some].transpose(0, 1)
            positions = kv.positions[row, 0, some].to(torch.int32)
            key_latents, value_latents = form.bases.write(keys, values, positions)
            whole = LatentBlock(keys=key_latents, values=value_latents, positions=positions)
            levels = allocate(key_latents, value_latents, positions)
            blocks = [cut(whole, levels == level, dims) for level, dims in enumerate(form.levels)]
            rows.append([stored(block, form, kv.keys.dtype) for block in blocks])
        return cls(form=form, dtype=kv.keys.dtype, **flattened(rows, form))

    def attend(self, step: AttentionStep) -> tuple[Partial, "LowRankPart"]:
        """Attend every query to every slot of its row."""
        queries, scale = step.queries, step.scale
        if fits(queries, self.form.bases) and self.slots:
            answer = attend_rows(
                queries,
                self.form.bases,
                keys=self.keys,
                values=self.values,
                scales=self.scales,
                held=self.held,
                dims=_dims(self.form.levels, queries.device),
                slots=max(row[0] for row in self.counts),
                scale=scale,
            )
            return answer, self
        answers = []
        for row, views in enumerate(self.views):
            of_row = queries[row : row + 1]
            if views and queries.shape[2]:
                answers.append(attend_latents(of_row[0], views, self.form.bases, scale=scale))
            else:
                answers.append(nothing(of_row))
        if len(answers) == 1:
            return answers[0], self
        output = torch.cat([answer.output for answer in answers])
        return Partial(output, torch.cat([answer.log_sum_exp for answer in answers])), self

    def read(self, heads: slice = slice(None)) -> KV:
        """Reconstruct the slots of some heads, oldest first."""
        rows = [self._read_row(blocks) for blocks in self.blocks]
        keys, values, positions = (torch.stack(side)[:, heads] for side in zip(*rows, strict=True))
        return KV(keys, values, positions)

    def keep(self, kept: Bool[Tensor, " slots"]) -> "LowRankPart":
        """Keep the slots that are True, in fresh storages that fit exactly."""
        rows = []
        sizes = [sum(row) for row in self.counts]
        for blocks, of_row in zip(self.blocks, kept.split(sizes), strict=True):
            by_head = of_row.view(self.form.bases.heads, -1)
            assert bool((by_head == by_head[:1]).all()), "all heads of a layer share their slots"
            # `kept` is oldest first; blocks are level by level.
            some = torch.empty_like(by_head[0])
            some[oldest_first(blocks)] = by_head[0]
            pieces = some.split([len(block.positions) for block in blocks])
            rows.append([cut(block, piece) for block, piece in zip(blocks, pieces, strict=True)])
        return self._of(rows)

    def extend(self, other: Part, transcript: Transcript) -> "LowRankPart":
        """Append another part's slots, row by row and level by level."""
        assert isinstance(other, LowRankPart), "parts of one layer have one layout"
        rows = []
        for mine, theirs in zip(self.blocks, other.blocks, strict=True):
            rows.append([joined(pair, self.form) for pair in zip(mine, theirs, strict=True)])
        return self._of(rows)

    def take_rows(self, rows: Sequence[int]) -> "LowRankPart":
        """Pick these rows, in this order, repeats allowed."""
        return self._of([self.blocks[row] for row in rows])

    def pages(self, tier: Tier) -> LatentPages:
        """Open an empty page store for latents of these levels."""
        none = {name: tensor[:0].clone() for name, tensor in self.tensors() if name != "held"}
        empty = replace(self, held=torch.zeros_like(self.held), **none)
        return LatentPages.empty(empty, tier, self.positions.device)

    def usage(self) -> Usage:
        """Say that everything is attended, and which share of each slot's numbers is kept."""
        of_level = torch.tensor(self.form.dims) / self.form.size
        shares = []
        for blocks in self.blocks:
            counts = torch.tensor([len(block.positions) for block in blocks])
            share = of_level.repeat_interleave(counts)
            shares.append(share[oldest_first(blocks).cpu()])
        return Usage(attended_slots=self.slots, shares=tuple(shares))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield slots of each level, latents of keys and values, positions, and scales where there are."""
        yield from (("held", self.held), ("keys", self.keys), ("values", self.values))
        yield "positions", self.positions
        if self.scales is not None:
            yield "scales", self.scales

    def state(self) -> State:
        """Give the levels, in which parts latents are written, the dtype of what comes back, and every tensor."""
        plain = {
            "levels": [list(level) for level in self.form.levels],
            "parts": self.form.parts,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        return plain, dict(self.tensors())

    @classmethod
    def from_state(cls, plain: Mapping[str, Any], tensors: Mapping[str, Tensor], form: LowRankFormat) -> "LowRankPart":
        """Build the part that was saved. Raises ValueError where plain values, tensors and format do not fit."""
        levels = tuple(tuple(level) for level in plain["levels"])
        if levels != form.levels:
            raise ValueError(f"latents of {levels} dimensions are there, and the adapter's have {form.levels}")
        if plain["parts"] != form.parts:
            raise ValueError(
                f"keys and values of {plain['parts']} parts are there, and the adapter's have {form.parts}"
            )
        if ("scales" in tensors) != form.int8:
            ways = ("numbers", "bytes")
            raise ValueError(f"latents as {ways[not form.int8]} are there, and the plan's are {ways[form.int8]}")
        slots = tensors["held"].sum(dim=0)  # of each level
        promised = {"positions": int(slots.sum())}
        promised |= {"scales": int(slots.sum())} if form.int8 else {}
        for side, name in enumerate(("keys", "values")):
            promised[name] = int((slots * torch.tensor([level[side] for level in levels])).sum())
        for name, count in promised.items():
            if tensors[name].shape[0] != count:
                raise ValueError(f"{count} {name} are promised, and {tensors[name].shape[0]} are there")
        return cls(form=form, dtype=getattr(torch, plain["dtype"]), **tensors)

    def _of(self, rows: Sequence[Blocks]) -> "LowRankPart":
        return LowRankPart(form=self.form, dtype=self.dtype, **flattened(rows, self.form))

    def _read_row(self, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct keys and values [H, S, D] of one row, oldest first, and give their positions [H, S]."""
        order, bases = oldest_first(blocks), self.form.bases
        keys = torch.cat([bases.read_keys(block) for block in blocks])[order]  # S H D
        values = torch.cat([bases.read_values(block) for block in blocks])[order]
        positions = positions_of(blocks)[order].expand(bases.heads, -1)
        return keys.to(self.dtype).transpose(0, 1), values.to(self.dtype).transpose(0, 1), positions

    def _blocks(self, held: Sequence[Sequence[int]]) -> Iterator[Blocks]:
        """View the flat storage as a block for each row and level."""
        bases = self.form.bases
        key, value, slot = 0, 0, 0  # where the next block begins in keys, values and positions
        for row in held:
            blocks = []
            for count, (key_rank, value_rank) in zip(row, self.form.levels, strict=True):
                keys = self.keys[key : key + count * key_rank]
                values = self.values[value : value + count * value_rank]
                slots = slice(slot, slot + count)
                block = LatentBlock(
                    keys=bases.keys.unflattened(keys, count, key_rank),
                    values=bases.values.unflattened(values, count, value_rank),
                    positions=self.positions[slots],
                    scales=None if self.scales is None else self.scales[slots],
                )
                blocks.append(block)
                key, value, slot = key + len(keys), value + len(values), slot + count
            yield tuple(blocks)


@cache
def _dims(levels: Levels, device: torch.device) -> Int[Tensor, "levels 2"]:
    """Put the dimensions of each level where the kernel reads them."""
    return torch.tensor(levels, dtype=torch.int32, device=device)
