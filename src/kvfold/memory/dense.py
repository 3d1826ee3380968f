"""DensePart: slots of every row and head one after the other, as a codec writes them, with no padding between.

The storage is flat, [all slots, ...] in order of row, head, slot. Where all rows and heads hold the same number it is
seen as [B, H, S, ...] and attention is one call; where rows differ, one call a row; where heads differ, one call a
head. So counts may differ per row and per head and bytes are exact. It does not know who chose its slots.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.attention.hadamard import rotated
from kvfold.attention.kernels.compiled import Form, StoredSlots
from kvfold.attention.merge import merge
from kvfold.attention.partial import Partial, nothing, partial
from kvfold.memory import ragged
from kvfold.memory.kv import KV, Payload
from kvfold.memory.pages import DensePages
from kvfold.memory.part import Part, State
from kvfold.memory.ragged import Counts
from kvfold.memory.step import AttentionStep
from kvfold.memory.store import Tier
from kvfold.memory.transcript import Transcript

_DECODED_SLOTS = 4096  # slots decoded at a time when a codec is not lossless


@runtime_checkable
class Codec(Protocol):
    """A member of the encode axis that writes each slot by itself, so that slots can be dropped."""

    lossless: ClassVar[bool]

    def encode(
        self,
        keys: Float[Tensor, "*slots D"],
        values: Float[Tensor, "*slots E"],
    ) -> Payload:
        """Encode keys and values of slots into tensors [*slots, ...]."""
        ...

    @property
    def rotates(self) -> bool:
        """Tell whether slots are written rotated: queries are rotated to read them, and the output is turned back."""
        ...

    def form(self, payload: Payload) -> Form | None:
        """Describe written slots for the compiled kernel; None where it does not read them."""
        ...

    def decode(self, payload: Payload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Decode keys [*slots, D] and values [*slots, E] in `dtype`, from a payload of any leading dimensions."""
        ...

    def as_written(self, payload: Payload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Decode likewise, but leave the rotation in which they were written."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A rectangle of slots: some rows, some heads, the same number of slots for each."""

    rows: slice
    heads: slice
    span: slice  # its slots in the flat storage
    shape: tuple[int, int, int]  # rows, heads, slots


@dataclass(frozen=True, slots=True, kw_only=True)
class DensePart(Part):
    """Flat slots and how many of them each row and head has. The file's docstring has the order."""

    codec: Codec
    dtype: torch.dtype  # of keys and values as the model hands them
    counts: Counts
    payload: Payload  # each tensor [slots, ...]
    positions: Int[Tensor, " slots"]
    blocks: tuple[Block, ...] = field(init=False, compare=False)
    # Keys and values [B, H, S, D] of each block as they lie, where nothing is encoded: views are made once.
    rectangles: tuple[tuple[Tensor, Tensor], ...] | None = field(init=False, compare=False)
    rotates: bool = field(init=False, compare=False)  # of the codec: a decode step asks for it in every layer
    stored: StoredSlots | None = field(init=False, compare=False)  # made once, and read in every step

    def __post_init__(self) -> None:
        blocks = tuple(_blocks(self.counts))
        object.__setattr__(self, "blocks", blocks)
        object.__setattr__(self, "rotates", self.codec.rotates)
        rectangles = None
        if self.codec.lossless:
            rectangles = tuple(self.codec.decode(self._views(block), self.dtype) for block in blocks)
        object.__setattr__(self, "rectangles", rectangles)
        object.__setattr__(self, "stored", self._point())

    @classmethod
    def of(cls, kv: KV, codec: Codec, *, kept: Bool[Tensor, "B H S"] | None = None) -> "DensePart":
        """Encode the slots of a rectangle, or those that are True."""
        rows, heads, stored, _ = kv.keys.shape
        if kept is None:
            counts = ((stored,) * heads,) * rows  # every slot stays
            chosen = slice(None)
        else:
            counts = ragged.counted(kept)
            chosen = kept.flatten().nonzero().flatten()
        payload = codec.encode(kv.keys.flatten(0, 2)[chosen], kv.values.flatten(0, 2)[chosen])
        return cls(
            codec=codec,
            dtype=kv.keys.dtype,
            counts=counts,
            payload={name: _fitting(tensor) for name, tensor in payload.items()},  # a codec may give views of the tail
            positions=_fitting(kv.positions.flatten()[chosen].to(torch.int32)),
        )

    @classmethod
    def from_state(
        cls,
        plain: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        codec: Codec,
    ) -> "DensePart":
        """Build the part that was saved. Raises ValueError where counts and tensors do not fit each other."""
        counts = tuple(tuple(row) for row in plain["counts"])
        slots = ragged.total(counts)
        for name, tensor in tensors.items():
            if tensor.shape[0] != slots:
                raise ValueError(f"{slots} slots are promised, and {name} holds {tensor.shape[0]}")
        return cls(
            codec=codec,
            dtype=getattr(torch, plain["dtype"]),
            counts=counts,
            payload={name: tensor for name, tensor in tensors.items() if name != "positions"},
            positions=tensors["positions"],
        )

    def state(self) -> State:
        """Give counts, the dtype of what comes back, and every tensor."""
        plain = {"counts": [list(row) for row in self.counts], "dtype": str(self.dtype).removeprefix("torch.")}
        return plain, dict(self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the codec's tensors, and the positions."""
        yield from self.payload.items()
        yield "positions", self.positions

    def attend(self, step: AttentionStep) -> tuple[Partial, "DensePart"]:
        """Attend every query to every slot of its row and head."""
        # A rotated slot costs a decode of its own, a rotated query one small product: scores are the same.
        queries = rotated(step.queries) if self.rotates else step.queries
        read = self._attend_blocks(queries, step.scale)
        return Partial(rotated(read.output), read.log_sum_exp) if self.rotates else read, self

    def _attend_blocks(self, queries: Tensor, scale: float) -> Partial:
        """Attend over each block, and put the answers of rows and heads together."""
        if len(self.blocks) == 1:
            return self._attend_block(0, queries, scale)
        whole = nothing(queries)
        group = queries.shape[1] // len(self.counts[0])
        for at, block in enumerate(self.blocks):
            if block.shape[2] == 0:  # an empty head reads nothing
                continue
            of_group = slice(block.heads.start * group, block.heads.stop * group)
            answer = self._attend_block(at, queries[block.rows, of_group], scale)
            whole.output[block.rows, of_group] = answer.output
            whole.log_sum_exp[block.rows, of_group] = answer.log_sum_exp
        return whole

    def read(self, heads: slice = slice(None)) -> KV:
        """Decode the slots of some heads. Each row and head holds as many."""
        wanted = range(len(self.counts[0]))[heads]  # numbers of heads
        pieces = []
        for block in self.blocks:
            # A block may hold all heads or one: what is asked for is cut out of each that has any of it.
            inside = [head for head in range(block.heads.start, block.heads.stop) if head in wanted]
            if not inside:
                continue
            of_block = slice(inside[0] - block.heads.start, inside[-1] + 1 - block.heads.start)
            keys, values = self.codec.decode(self._views(block), self.dtype)
            positions = self.positions[block.span].view(block.shape)  # B H S of the block
            pieces.append(KV(keys[:, of_block], values[:, of_block], positions[:, of_block]))
        if len(pieces) == 1:
            return pieces[0]
        return KV(
            # Several pieces are rows one after the other.
            torch.cat([piece.keys for piece in pieces]),
            torch.cat([piece.values for piece in pieces]),
            torch.cat([piece.positions for piece in pieces]),
        )

    def keep(self, kept: Bool[Tensor, " slots"]) -> "DensePart":
        """Keep the slots that are True, in fresh storages that fit exactly."""
        return self._picked(kept.nonzero().flatten(), ragged.counts_after(self.counts, kept))

    def extend(self, other: Part, transcript: Transcript) -> "DensePart":
        """Append another part's slots, row by row and head by head."""
        theirs = dict(other.tensors())
        order = ragged.interleave(self.counts, other.counts).to(self.positions.device)
        # Behind one another heads would be apart: the order puts each head's slots together, older ones first.
        joined = {name: torch.cat([tensor, theirs[name]])[order] for name, tensor in self.tensors()}
        return self.made_of(joined, ragged.added(self.counts, other.counts))

    def take_rows(self, rows: Sequence[int]) -> "DensePart":
        """Pick these rows, in this order, repeats allowed."""
        order = ragged.order_of_rows(self.counts, rows).to(self.positions.device)
        return self._picked(order, tuple(self.counts[row] for row in rows))

    def pages(self, tier: Tier) -> DensePages:
        """Open an empty page store for slots as this codec writes them."""
        none = tuple(tuple(0 for _ in row) for row in self.counts)
        # Cloned, so that the empty part does not keep these storages alive.
        empty = self.made_of({name: tensor[:0].clone() for name, tensor in self.tensors()}, none)
        return DensePages.empty(empty, tier, self.positions.device)

    def made_of(self, tensors: dict[str, Tensor], counts: Counts) -> "DensePart":
        """Make a part of the same codec of other tensors, named as `tensors()` names them."""
        payload = {name: tensors[name] for name in self.payload}
        return replace(self, counts=counts, payload=payload, positions=tensors["positions"])

    def _point(self) -> StoredSlots | None:
        form = self.codec.form(self.payload)
        if form is None or not form.is_readable:
            return None
        counts = [count for row in self.counts for count in row]
        if ragged.uniform(self.counts):
            return StoredSlots(form, stride=counts[0], count=counts[0])
        return StoredSlots(form, ends=list(accumulate(counts)))

    def _picked(self, order: Tensor, counts: Counts) -> "DensePart":
        return self.made_of({name: tensor[order] for name, tensor in self.tensors()}, counts)

    def _views(self, block: Block, slots: slice = slice(None)) -> Payload:
        """View one block's payload as [rows, heads, slots, ...]."""
        return {
            name: tensor[block.span].view(*block.shape, *tensor.shape[1:])[:, :, slots]
            for name, tensor in self.payload.items()
        }

    def _attend_block(self, at: int, queries: Tensor, scale: float) -> Partial:
        """Attend over one block; a lossy codec is decoded piece by piece, so that no widened copy of all is there."""
        if self.rectangles is not None:
            keys, values = self.rectangles[at]
            return partial(queries, keys, values, scale=scale)
        block = self.blocks[at]
        if block.shape[2] == 0:
            return nothing(queries)
        answers = []
        for first in range(0, block.shape[2], _DECODED_SLOTS):
            piece = slice(first, first + _DECODED_SLOTS)
            keys, values = self.codec.as_written(self._views(block, piece), self.dtype)
            answers.append(partial(queries, keys, values, scale=scale))
        return merge(answers)


def _fitting(tensor: Tensor) -> Tensor:
    """Copy a tensor into a storage of its size: a small or empty view would keep the tail's buffers alive."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _blocks(counts: Counts) -> Iterator[Block]:
    """Cover flat storage by the fewest rectangles: everything, or a row each, or a head each."""
    heads = len(counts[0])
    if ragged.uniform(counts):
        yield _block(slice(0, len(counts)), slice(0, heads), 0, counts[0][0])
        return
    start = 0
    for row, of_heads in enumerate(counts):
        rows = slice(row, row + 1)
        if ragged.uniform((of_heads,)):
            yield _block(rows, slice(0, heads), start, of_heads[0])
            start += sum(of_heads)  # each block begins where the last one ended
            continue
        for head, stored in enumerate(of_heads):
            yield _block(rows, slice(head, head + 1), start, stored)
            start += stored


def _block(rows: slice, heads: slice, start: int, stored: int) -> Block:
    shape = (rows.stop - rows.start, heads.stop - heads.start, stored)
    return Block(
        rows=rows,
        heads=heads,
        span=slice(start, start + shape[0] * shape[1] * stored),
        shape=shape,
    )
