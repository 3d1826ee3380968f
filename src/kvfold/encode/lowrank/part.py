"""LowRankPart: slots whose keys and values lie in as many latent dimensions as each slot is worth.

A slot has a level, and a level is a number of key dimensions and of value dimensions; both grow with it. The storage
is flat, in order of row, level, slot: the slots of one row and level are one dense block of keys and one of values,
so nothing is padded and no slot needs a rank of its own beside it. Where heads are written apart, a block lies
dimension by dimension, as their products want it. All heads of a layer share their slots. Within a level slots are in
order of age. It does not know who gave the levels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from kvfold.attention.basis import Bases, LatentBlock
from kvfold.attention.int8 import to_int8
from kvfold.attention.kernels.low_rank import attend_rows, fits
from kvfold.attention.low_rank import LatentView, attend_latents
from kvfold.attention.partial import Partial, nothing
from kvfold.encode.lowrank.pages import LatentPages
from kvfold.memory.kv import KV
from kvfold.memory.part import Part, State, Usage
from kvfold.memory.ragged import Counts
from kvfold.memory.step import AttentionStep
from kvfold.memory.store import Tier
from kvfold.memory.transcript import Transcript

Levels: TypeAlias = tuple[tuple[int, int], ...]  # dimensions of keys and of values, growing
Deal: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # latents of keys and values, positions -> levels


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How one layer's slots are written: its bases, and how many dimensions each level has."""

    bases: Bases
    levels: Levels
    codes: bool = False  # whether latents are stored as bytes and scales

    @property
    def size(self) -> int:
        """Numbers of a slot in full, keys and values of all heads."""
        return self.bases.keys.mean.shape[0] + self.bases.values.mean.shape[0]

    @property
    def parts(self) -> list[int]:
        """In how many parts keys and values are written."""
        return [self.bases.keys.parts, self.bases.values.parts]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the maps, which belong to the model and not to a cache."""
        sides = (self.bases.keys, self.bases.values)
        return sum(tensor.nbytes for side in sides for tensor in (side.encode, side.decode, side.mean))


class _Block(NamedTuple):
    """The slots of one row and level."""

    keys: Tensor  # S rk, side by side by slot, or by dimension where heads are written apart
    values: Tensor  # S rv
    each: Mapping[str, Tensor]  # of each slot: positions, and scales and mass where there are

    @property
    def positions(self) -> Tensor:
        """Where the slots sat in the text."""
        return self.each["positions"]

    @property
    def latents(self) -> LatentBlock:
        """What is attended."""
        return LatentBlock(keys=self.keys, values=self.values, positions=self.positions, scales=self.each.get("scales"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankPart(Part):
    """Flat latents, and how many slots each row has of each level. See the file's docstring for the order."""

    form: Form
    dtype: torch.dtype  # of keys and values as the model hands them, and of latents that are not bytes
    held: Int[Tensor, "B levels"]
    keys: Num[Tensor, " key_numbers"]
    values: Num[Tensor, " value_numbers"]
    positions: Int[Tensor, " tokens"]
    scales: Float[Tensor, "tokens 2"] | None = None  # where latents are bytes: of keys and of values
    counts: Counts = field(init=False, compare=False)
    blocks: tuple[tuple[_Block, ...], ...] = field(init=False, compare=False)  # views, by row and level
    views: tuple[tuple[LatentView, ...], ...] = field(init=False, compare=False)  # of each row, what is attended

    def __post_init__(self) -> None:
        held, heads = self.held.tolist(), self.form.bases.heads
        object.__setattr__(self, "counts", tuple((sum(row),) * heads for row in held))
        object.__setattr__(self, "blocks", tuple(self._views(held)))
        laid = (
            [LatentView.of(own.latents, self.form.bases) for own in row if len(own.positions)] for row in self.blocks
        )
        object.__setattr__(self, "views", tuple(map(tuple, laid)))

    @classmethod
    def of(cls, kv: KV, kept: Bool[Tensor, "B H S"], deal: Deal, form: Form) -> "LowRankPart":
        """The slots that are True, the same for all heads, in the levels that are dealt to a row's together."""
        rows = []
        for row in range(kept.shape[0]):
            some = kept[row, 0]
            keys, values = (tensor[row][:, some].transpose(0, 1) for tensor in (kv.keys, kv.values))
            each = {"positions": kv.positions[row, 0, some].to(torch.int32)}
            whole = _Block(*form.bases.write(keys, values, each["positions"]), each)
            dealt = deal(*whole[:2], whole.positions)
            cut = (_cut(whole, dealt == level, dims) for level, dims in enumerate(form.levels))
            rows.append([_stored(block, form, kv.keys.dtype) for block in cut])
        return _built(rows, form, kv.keys.dtype)

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
            empty = not views or queries.shape[2] == 0
            answers.append(nothing(of_row) if empty else attend_latents(of_row[0], views, self.form.bases, scale=scale))
        if len(answers) == 1:
            return answers[0], self
        output = torch.cat([answer.output for answer in answers])
        return Partial(output, torch.cat([answer.log_sum_exp for answer in answers])), self

    def read(self, heads: slice = slice(None)) -> KV:
        """Reconstruct the slots of some heads, oldest first."""
        rows = [self._read_row(blocks) for blocks in self.blocks]
        keys, values, positions = (torch.stack([row[side] for row in rows])[:, heads] for side in range(3))
        return KV(keys, values, positions)

    def keep(self, kept: Bool[Tensor, " slots"]) -> "LowRankPart":
        """The part with only the slots that are True, in fresh storages that fit exactly."""
        heads = self.form.bases.heads
        rows = []
        for blocks, own in zip(self.blocks, kept.split([sum(row) for row in self.counts]), strict=True):
            by_head = own.view(heads, -1)
            assert bool((by_head == by_head[:1]).all()), "all heads of a layer share their slots"
            some = torch.empty_like(by_head[0])
            some[_oldest_first(blocks)] = by_head[0]
            pieces = some.split([len(block.positions) for block in blocks])
            rows.append([_cut(block, piece, None) for block, piece in zip(blocks, pieces, strict=True)])
        return self._of(rows)

    def extend(self, other: Part, transcript: Transcript) -> "LowRankPart":
        """Append another part's slots, row by row and level by level."""
        assert isinstance(other, LowRankPart), "parts of one layer have one layout"
        rows = []
        for mine, theirs in zip(self.blocks, other.blocks, strict=True):
            rows.append([_joined(pair, self.form) for pair in zip(mine, theirs, strict=True)])
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
        shares = []
        dims = torch.tensor([sum(level) / self.form.size for level in self.form.levels])
        for blocks in self.blocks:
            share = dims.repeat_interleave(torch.tensor([len(block.positions) for block in blocks]))
            shares.append(share[_oldest_first(blocks).cpu()])
        return Usage(attended_slots=self.slots, shares=tuple(shares))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield slots of each level, latents of keys and values, positions, and scales where there are."""
        yield from (("held", self.held), ("keys", self.keys), ("values", self.values))
        yield from self._each().items()

    def state(self) -> State:
        """Give the levels, in which parts latents are written, the dtype of what comes back, and every tensor."""
        plain = {
            "levels": [list(level) for level in self.form.levels],
            "parts": self.form.parts,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        return plain, dict(self.tensors())

    @classmethod
    def from_state(cls, plain: Mapping[str, Any], tensors: Mapping[str, Tensor], form: Form) -> "LowRankPart":
        """Build the part that was saved. Raises ValueError where plain values, tensors and format do not fit."""
        levels = tuple(tuple(level) for level in plain["levels"])
        if levels != form.levels:
            raise ValueError(f"latents of {levels} dimensions are there, and the adapter's have {form.levels}")
        if plain["parts"] != form.parts:
            raise ValueError(
                f"keys and values of {plain['parts']} parts are there, and the adapter's have {form.parts}"
            )
        if ("scales" in tensors) != form.codes:
            ways = ("numbers", "bytes")
            raise ValueError(f"latents as {ways[not form.codes]} are there, and the plan's are {ways[form.codes]}")
        held = tensors["held"]
        numbers = [int((held.sum(dim=0) * torch.tensor([level[side] for level in levels])).sum()) for side in (0, 1)]
        promised = {"keys": numbers[0], "values": numbers[1], "positions": int(held.sum())}
        promised |= {name: int(held.sum()) for name in ("scales",) if name in tensors}
        for name, count in promised.items():
            if tensors[name].shape[0] != count:
                raise ValueError(f"{count} {name} are promised, and {tensors[name].shape[0]} are there")
        return cls(form=form, dtype=getattr(torch, plain["dtype"]), **tensors)

    def _of(self, rows: Sequence[Sequence[_Block]]) -> "LowRankPart":
        return _built(rows, self.form, self.dtype)

    def _each(self) -> dict[str, Tensor]:
        """What there is of each slot beside its latents."""
        return {"positions": self.positions} | ({} if self.scales is None else {"scales": self.scales})

    def _read(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Keys and values [S, H, D] of a block."""
        return self.form.bases.read_keys(block.latents), self.form.bases.read_values(block.latents)

    def _read_row(self, blocks: Sequence[_Block]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values [H, S, D] and positions [H, S] of one row, oldest first."""
        order = _oldest_first(blocks)
        pairs = [self._read(block) for block in blocks]
        keys, values = (torch.cat(side)[order].to(self.dtype).transpose(0, 1) for side in zip(*pairs, strict=True))
        positions = torch.cat([block.positions for block in blocks])[order]
        return keys, values, positions.expand(self.form.bases.heads, -1)

    def _views(self, held: Sequence[Sequence[int]]) -> Iterator[tuple[_Block, ...]]:
        keys = values = slots = 0
        bases, each = self.form.bases, self._each()
        for row in held:
            blocks = []
            for count, (rank_keys, rank_values) in zip(row, self.form.levels, strict=True):
                blocks.append(
                    _Block(
                        bases.keys.unflattened(self.keys[keys : keys + count * rank_keys], count, rank_keys),
                        bases.values.unflattened(
                            self.values[values : values + count * rank_values], count, rank_values
                        ),
                        {name: tensor[slots : slots + count] for name, tensor in each.items()},
                    )
                )
                keys, values, slots = keys + count * rank_keys, values + count * rank_values, slots + count
            yield tuple(blocks)


@cache
def _dims(levels: Levels, device: torch.device) -> Int[Tensor, "levels 2"]:
    """Dimensions of each level, where the kernel reads them."""
    return torch.tensor(levels, dtype=torch.int32, device=device)


def _stored(block: _Block, form: Form, dtype: torch.dtype) -> _Block:
    """A block's latents as they are stored: in the model's dtype, or as bytes and scales."""
    if not form.codes:
        return block._replace(keys=block.keys.to(dtype), values=block.values.to(dtype))
    (keys, of_keys), (values, of_values) = to_int8(block.keys), to_int8(block.values)
    return _Block(keys, values, {**block.each, "scales": torch.stack([of_keys, of_values], dim=-1)})


def _built(rows: Sequence[Sequence[_Block]], form: Form, dtype: torch.dtype) -> LowRankPart:
    """A part of these blocks, a row each, in storages of its own that fit exactly."""
    every = [block for blocks in rows for block in blocks]
    held = [[len(block.positions) for block in blocks] for blocks in rows]
    return LowRankPart(
        form=form,
        dtype=dtype,
        held=torch.tensor(held, dtype=torch.int32, device=every[0].keys.device),
        keys=torch.cat([form.bases.keys.flattened(block.keys) for block in every]),
        values=torch.cat([form.bases.values.flattened(block.values) for block in every]),
        **{name: torch.cat([block.each[name] for block in every]) for name in every[0].each},
    )


def _cut(block: _Block, some: Tensor, dims: tuple[int, int] | None) -> _Block:
    """Some slots of a block, and of each its leading dimensions."""
    keys, values = block.keys[some], block.values[some]
    if dims is not None:
        keys, values = keys[:, : dims[0]], values[:, : dims[1]]
    return _Block(keys, values, {name: tensor[some] for name, tensor in block.each.items()})


def _joined(blocks: Sequence[_Block], form: Form) -> _Block:
    return _Block(
        form.bases.keys.joined([block.keys for block in blocks]),
        form.bases.values.joined([block.values for block in blocks]),
        {name: torch.cat([block.each[name] for block in blocks]) for name in blocks[0].each},
    )


def _oldest_first(blocks: Sequence[_Block]) -> Int[Tensor, " S"]:
    """The order of a row's stored slots that sorts them by position."""
    return torch.cat([block.positions for block in blocks]).argsort(stable=True)
