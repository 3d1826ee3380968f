"""DensePart: slots of every row and head one after the other, as a codec writes them, with no padding between.

The storage is flat, [all slots, ...] in order of row, head, slot. Where all rows and heads hold the same number it is
seen as [B, H, S, ...] and attention is one call; where rows differ, one call a row; where heads differ, one call a
head. So counts may differ per row and per head and bytes are exact. It does not know who chose its slots.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.attention.merge import merge
from kvfold.attention.partial import Partial, nothing, partial
from kvfold.attention.scores import attention_sums as attention_mass
from kvfold.memory.kv import KV, Codec, Payload
from kvfold.memory.part import Counts, Part, uniform

_DECODED_SLOTS = 4096  # slots decoded at a time when a codec is not lossless


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A rectangle of slots: some rows, some heads, the same number of slots for each."""

    rows: slice
    heads: slice
    span: slice  # where it lies in the flat storage
    shape: tuple[int, int, int]  # rows, heads, slots


@dataclass(frozen=True, slots=True, kw_only=True)
class DensePart(Part):
    """Flat slots and how many of them each row and head has. See the file's docstring for the order."""

    codec: Codec
    dtype: torch.dtype  # of keys and values as the model hands them
    counts: Counts
    payload: Payload  # each tensor [slots, ...]
    positions: Int[Tensor, " slots"]
    mass: Float[Tensor, " slots"] | None = None  # attention received, where the method asked for it
    blocks: tuple[Block, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(_blocks(self.counts)))

    @classmethod
    def of(cls, kv: KV, codec: Codec, *, kept: Bool[Tensor, "B H S"] | None = None,
           mass: Float[Tensor, "B H S"] | None = None) -> "DensePart":  # fmt: skip
        """The slots of a rectangle, or those that are True."""
        rows, heads, stored, _ = kv.keys.shape
        some = slice(None) if kept is None else kept.flatten().nonzero().flatten()
        payload = codec.encode(kv.keys.flatten(0, 2)[some], kv.values.flatten(0, 2)[some])
        counts = ((stored,) * heads,) * rows
        if kept is not None:
            counts = tuple(tuple(int(count) for count in row) for row in kept.sum(dim=2).tolist())
        return cls(
            codec=codec,
            dtype=kv.keys.dtype,
            counts=counts,
            payload={name: _fitting(tensor) for name, tensor in payload.items()},
            positions=_fitting(kv.positions.flatten()[some].to(torch.int32)),
            mass=None if mass is None else _fitting(mass.flatten()[some]),
        )

    @classmethod
    def restored(cls, plain: Mapping[str, Any], tensors: Mapping[str, Tensor], codec: Codec) -> "DensePart":
        """The part that `plain` and `tensors` describe."""
        counts = tuple(tuple(row) for row in plain["counts"])
        slots = sum(sum(row) for row in counts)
        wrong = [name for name, tensor in tensors.items() if tensor.shape[0] != slots]
        if wrong:
            raise ValueError(f"{slots} slots are promised, and {wrong[0]} holds {tensors[wrong[0]].shape[0]}")
        return cls(
            codec=codec,
            dtype=getattr(torch, plain["dtype"]),
            counts=counts,
            payload={name: tensor for name, tensor in tensors.items() if name not in ("positions", "mass")},
            positions=tensors["positions"],
            mass=tensors.get("mass"),
        )

    def plain(self) -> dict[str, Any]:
        """Counts and the dtype of what comes back."""
        return {"counts": [list(row) for row in self.counts], "dtype": str(self.dtype).removeprefix("torch.")}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The codec's tensors, the positions, and the observed mass if there is one."""
        yield from self.payload.items()
        yield "positions", self.positions
        if self.mass is not None:
            yield "mass", self.mass

    def attend(self, queries: Float[Tensor, "B G Q D"], *, scale: float) -> Partial:
        """Attention of every query over every slot of its row and head."""
        answers = [(block, self._attend_block(block, queries, scale)) for block in self.blocks]
        if len(answers) == 1:
            return answers[0][1]
        whole = nothing(queries)
        for block, answer in answers:
            where = (block.rows, _query_heads(block, self.counts, queries.shape[1]))
            whole.output[where] = answer.output
            whole.log_sum_exp[where] = answer.log_sum_exp
        return whole

    def whole(self) -> tuple[Float[Tensor, "B H S D"], Float[Tensor, "B H S D"]] | None:
        """Keys and values as they lie there, where nothing is encoded and every row and head holds as many."""
        if len(self.blocks) != 1 or not self.codec.lossless or not self.slots:
            return None
        return self.codec.decode(self._views(self.blocks[0]), self.dtype)

    def with_mass(self, queries: Float[Tensor, "B G Q D"], log_sum_exp: Float[Tensor, "B G Q"], *, scale: float,
                  counted: Bool[Tensor, "B Q"] | None) -> "DensePart":  # fmt: skip
        """The part after these queries: each slot's mass grown by the attention it received."""
        assert self.mass is not None, "this part does not count attention"
        grown = self.mass.clone()
        for block in self.blocks:
            heads = _query_heads(block, self.counts, queries.shape[1])
            keys, _ = self.codec.decode(self._views(block), self.dtype)
            some = None if counted is None else counted[block.rows]
            received = attention_mass(
                queries[block.rows, heads], keys, log_sum_exp[block.rows, heads], scale=scale, counted=some
            )
            grown[block.span] += received.flatten()
        return replace(self, mass=grown)

    def read(self, heads: slice = slice(None)) -> tuple[KV, Float[Tensor, "B H S"] | None]:
        """The slots of some heads, decoded, and their mass if it is counted. Each row and head holds as many."""
        wanted = range(len(self.counts[0]))[heads]
        pieces, masses = [], []
        for block in self.blocks:
            inside = [head for head in range(block.heads.start, block.heads.stop) if head in wanted]
            if not inside:
                continue
            some = slice(inside[0] - block.heads.start, inside[-1] + 1 - block.heads.start)
            keys, values = self.codec.decode(self._views(block), self.dtype)
            positions = self.positions[block.span].view(block.shape)
            pieces.append((keys[:, some], values[:, some], positions[:, some]))
            if self.mass is not None:
                masses.append(self.mass[block.span].view(block.shape)[:, some])
        whole = KV(*(torch.cat(tensors) for tensors in zip(*pieces, strict=True)))
        return whole, torch.cat(masses) if masses else None

    def keep(self, kept: Bool[Tensor, " slots"]) -> "DensePart":
        """The part with only the slots that are True, in fresh storages that fit exactly."""
        sizes = [count for row in self.counts for count in row]
        held = iter([int(piece.sum()) for piece in kept.split(sizes)])
        counts = tuple(tuple(next(held) for _ in row) for row in self.counts)
        return self._picked(kept.nonzero().flatten(), counts)

    def extend(self, other: "DensePart") -> "DensePart":
        """The part with another's slots after its own, row by row and head by head."""
        both = {name: torch.cat([tensor, dict(other.tensors())[name]]) for name, tensor in self.tensors()}
        order, counts = _interleave(self.counts, other.counts, self.positions.device)
        return self.made_of({name: tensor[order] for name, tensor in both.items()}, counts)

    def places(self, row: int, head: int) -> Int[Tensor, " S"]:
        """Positions of the slots of one row and head, oldest first."""
        start = sum(sum(held) for held in self.counts[:row]) + sum(self.counts[row][:head])
        return self.positions[start : start + self.counts[row][head]]

    def beside(self, others: "Sequence[DensePart]") -> "DensePart":
        """The part with the others' rows after its own."""
        every = [dict(part.tensors()) for part in (self, *others)]
        tensors = {name: torch.cat([own[name] for own in every]) for name in every[0]}
        return self.made_of(tensors, tuple(row for part in (self, *others) for row in part.counts))

    def rows(self, indices: Sequence[int]) -> "DensePart":
        """The part with these rows, in this order, repeats allowed."""
        ends = torch.tensor([sum(row) for row in self.counts]).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        order = torch.cat([torch.arange(starts[row], ends[row]) for row in indices])
        return self._picked(order.to(self.positions.device), tuple(self.counts[row] for row in indices))

    def _picked(self, order: Tensor, counts: Counts) -> "DensePart":
        return self.made_of({name: tensor[order] for name, tensor in self.tensors()}, counts)

    def made_of(self, tensors: dict[str, Tensor], counts: Counts) -> "DensePart":
        """A part of the same codec with other tensors, named as `tensors()` names them."""
        payload = {name: tensors[name] for name in self.payload}
        return replace(self, counts=counts, payload=payload, positions=tensors["positions"], mass=tensors.get("mass"))

    def _views(self, block: Block, slots: slice = slice(None)) -> Payload:
        return {
            name: tensor[block.span].view(*block.shape, *tensor.shape[1:])[:, :, slots]
            for name, tensor in self.payload.items()
        }

    def _attend_block(self, block: Block, queries: Tensor, scale: float) -> Partial:
        asked = queries[block.rows, _query_heads(block, self.counts, queries.shape[1])]
        step = max(block.shape[2], 1) if self.codec.lossless else _DECODED_SLOTS
        answers = [nothing(asked)] if block.shape[2] == 0 else []
        for first in range(0, block.shape[2], step):
            keys, values = self.codec.decode(self._views(block, slice(first, first + step)), self.dtype)
            answers.append(partial(asked, keys, values, scale=scale))
        return merge(answers)


def _fitting(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own size: a small or empty view would keep the tail's buffers alive."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _query_heads(block: Block, counts: Counts, query_heads: int) -> slice:
    group = query_heads // len(counts[0])
    return slice(block.heads.start * group, block.heads.stop * group)


def _blocks(counts: Counts) -> Iterator[Block]:
    """The fewest rectangles that cover flat storage: everything, or a row each, or a head each."""
    heads = len(counts[0])
    if uniform(counts):
        stored = counts[0][0]
        yield _block(slice(0, len(counts)), slice(0, heads), 0, (len(counts), heads, stored))
        return
    start = 0
    for row, of_heads in enumerate(counts):
        rows = slice(row, row + 1)
        if uniform((of_heads,)):
            yield _block(rows, slice(0, heads), start, (1, heads, of_heads[0]))
        else:
            begun = start
            for head, stored in enumerate(of_heads):
                yield _block(rows, slice(head, head + 1), begun, (1, 1, stored))
                begun += stored
        start += sum(of_heads)


def _block(rows: slice, heads: slice, start: int, shape: tuple[int, int, int]) -> Block:
    return Block(rows=rows, heads=heads, span=slice(start, start + shape[0] * shape[1] * shape[2]), shape=shape)


def _interleave(first: Counts, second: Counts, device: torch.device) -> tuple[Tensor, Counts]:
    """The order that turns [all of first, all of second] into row by row, head by head, first before second."""
    pieces, counts, at, after = [], [], 0, sum(sum(row) for row in first)
    for mine, theirs in zip(first, second, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            pieces += [torch.arange(at, at + a), torch.arange(after, after + b)]
            at, after = at + a, after + b
        counts.append(tuple(a + b for a, b in zip(mine, theirs, strict=True)))
    return torch.cat(pieces).to(device), tuple(counts)
