"""DensePart: slots of every row and head one after the other, as a codec writes them, with no padding between.

The storage is flat, [all slots, ...] in order of row, head, slot. Where all rows and heads hold the same number it is
seen as [B, H, S, ...] and attention is one call; where rows differ, one call a row; where heads differ, one call a
head, and on CUDA one launch for all (kernels/ragged.py). So counts may differ per row and per head and bytes are exact.
A part that grew has room behind the slots of each head (room.py), so the next turn is written there. It does not know
who chose its slots.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.attention.hadamard import rotated
from kvfold.attention.kernels.compiled import Form, Spans, StoredSlots
from kvfold.attention.kernels.ragged import FlatSlots
from kvfold.attention.merge import merge
from kvfold.attention.partial import Partial, nothing, partial
from kvfold.memory import ragged
from kvfold.memory.kv import KV, Payload
from kvfold.memory.pages import DensePages
from kvfold.memory.part import Part, State, Usage
from kvfold.memory.ragged import Counts
from kvfold.memory.room import WrittenEnd, copy_slots, has_room, with_spare
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
    span: slice  # its slots in the flat storage, and the room behind those of each head
    shape: tuple[int, int, int]  # rows, heads, slots
    room: int  # slots that each head has room for


@dataclass(frozen=True, slots=True, kw_only=True)
class DensePart(Part):
    """Flat slots and how many of them each row and head has. The file's docstring has the order."""

    codec: Codec
    dtype: torch.dtype  # of keys and values as the model hands them
    counts: Counts
    payload: Payload  # each tensor [slots, ...], where there is room [places, ...]
    positions: Int[Tensor, " places"]
    room: Counts | None = field(default=None, compare=False)  # slots that each head has room for; None: those it has
    end: WrittenEnd | None = field(default=None, compare=False)  # of the buffers, where there is room
    blocks: tuple[Block, ...] = field(init=False, compare=False)
    # Keys and values [B, H, S, D] of each block as they lie, where nothing is encoded: views are made once.
    rectangles: tuple[tuple[Tensor, Tensor], ...] | None = field(init=False, compare=False)
    rotates: bool = field(init=False, compare=False)  # of the codec: a decode step asks for it in every layer
    stored: StoredSlots | None = field(init=False, compare=False)  # made once, and read in every step
    flat: FlatSlots | None = field(init=False, compare=False)  # the same on CUDA, where one launch reads all heads

    def __post_init__(self) -> None:
        blocks = tuple(_blocks(self.counts, self.room or self.counts))
        object.__setattr__(self, "blocks", blocks)
        object.__setattr__(self, "rotates", self.codec.rotates)
        rectangles = None
        if self.codec.lossless:
            rectangles = tuple(self.codec.decode(self.views(block), self.dtype) for block in blocks)
        object.__setattr__(self, "rectangles", rectangles)
        object.__setattr__(self, "stored", _pointer_to(self))
        object.__setattr__(self, "flat", _flat_slots(self))

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
        """Give counts, the dtype of what comes back, and every tensor, without the room."""
        plain = {"counts": [list(row) for row in self.counts], "dtype": str(self.dtype).removeprefix("torch.")}
        return plain, dict(self.without_room().tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the codec's tensors, and the positions; their room included."""
        yield from self.payload.items()
        yield "positions", self.positions

    def usage(self) -> Usage:
        """Say that everything is attended, and how much of each tensor is room."""
        slots, places = self.slots, ragged.total(self.places)
        slack = {name: tensor.nbytes // max(places, 1) * (places - slots) for name, tensor in self.tensors()}
        return Usage(attended_slots=slots, slack=slack)

    def attend(self, step: AttentionStep) -> tuple[Partial, "DensePart"]:
        """Attend every query to every slot of its row and head."""
        # A rotated slot costs a decode of its own, a rotated query one small product: scores are the same.
        queries = rotated(step.queries) if self.rotates else step.queries
        read = _attend_all(self, queries, step.scale)
        return Partial(rotated(read.output), read.log_sum_exp) if self.rotates else read, self

    def read(self, heads: slice = slice(None)) -> KV:
        """Decode the slots of some heads. Each row and head holds as many."""
        pieces = _pieces(self, heads)
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

    def extend(self, other: Part, transcript: Transcript, most: int = 0) -> "DensePart":
        """Append another part's slots behind those of each row and head: into its room, or into that of a copy."""
        assert isinstance(other, DensePart), "parts of one layer have one layout"
        after = ragged.added(self.counts, other.counts)
        is_newest = False  # an older part must not write behind its slots
        if self.end is not None and has_room(after, self.places):
            is_newest = self.end.claim(self.counts, after)
        grown = replace(self, counts=after) if is_newest else _copied(self, after, most)
        theirs = dict(other.tensors())
        for name, tensor in grown.tensors():
            copy_slots(
                theirs[name],
                other.places,
                tensor,
                grown.places,
                counts=other.counts,
                behind=self.counts,
            )
        return grown

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

    def made_of(
        self,
        tensors: Mapping[str, Tensor],
        counts: Counts,
        room: Counts | None = None,
    ) -> "DensePart":
        """Make a part of the same codec of other tensors, named as `tensors()` names them, with room or without."""
        payload = {name: tensors[name] for name in self.payload}
        end = None if room is None else WrittenEnd(counts)
        return replace(self, counts=counts, payload=payload, positions=tensors["positions"], room=room, end=end)

    def without_room(self) -> "DensePart":
        """Give the same slots in storages that fit exactly; itself where there is no room."""
        return self if self.room is None else self._picked(torch.arange(self.slots), self.counts)

    @property
    def places(self) -> Counts:
        """Give the slots that each row and head has room for, those that it has included."""
        return self.room or self.counts

    def _picked(self, order: Int[Tensor, " slots"], counts: Counts) -> "DensePart":
        """Pick slots by their numbers in flat order, into storages that fit exactly."""
        if self.room is not None:
            order = ragged.places(self.counts, self.room)[order.to("cpu")]
        order = order.to(self.positions.device)
        return self.made_of({name: tensor[order] for name, tensor in self.tensors()}, counts)

    def views(self, block: Block, slots: slice = slice(None)) -> Payload:
        """View one block's payload as [rows, heads, slots, ...]."""
        return {name: _rectangle(tensor, block)[:, :, slots] for name, tensor in self.payload.items()}


def _attend_all(part: DensePart, queries: Tensor, scale: float) -> Partial:
    """Attend over all slots: in one launch where there is such a kernel, else block by block."""
    if part.flat is not None and part.flat.fits(queries, scale):
        return part.flat.attend(queries, scale)
    if len(part.blocks) == 1:
        return _attend_block(part, 0, queries, scale)
    whole = nothing(queries)
    group = queries.shape[1] // len(part.counts[0])
    for at, block in enumerate(part.blocks):
        if block.shape[2] == 0:  # an empty head reads nothing
            continue
        of_group = slice(block.heads.start * group, block.heads.stop * group)
        answer = _attend_block(part, at, queries[block.rows, of_group], scale)
        whole.output[block.rows, of_group] = answer.output
        whole.log_sum_exp[block.rows, of_group] = answer.log_sum_exp
    return whole


def _attend_block(part: DensePart, at: int, queries: Tensor, scale: float) -> Partial:
    """Attend over one block; a lossy codec is decoded piece by piece, so that no widened copy of all is there."""
    if part.rectangles is not None:
        keys, values = part.rectangles[at]
        return partial(queries, keys, values, scale=scale)
    block = part.blocks[at]
    if block.shape[2] == 0:
        return nothing(queries)
    answers = []
    for first in range(0, block.shape[2], _DECODED_SLOTS):
        piece = slice(first, first + _DECODED_SLOTS)
        keys, values = part.codec.as_written(part.views(block, piece), part.dtype)
        answers.append(partial(queries, keys, values, scale=scale))
    return merge(answers)


def _pieces(part: DensePart, heads: slice) -> list[KV]:
    """Decode the slots of some heads, rectangle by rectangle."""
    wanted = range(len(part.counts[0]))[heads]  # numbers of heads
    pieces = []
    for block in part.blocks:
        # A block may hold all heads or one: what is asked for is cut out of each that has any of it.
        inside = [head for head in range(block.heads.start, block.heads.stop) if head in wanted]
        if not inside:
            continue
        of_block = slice(inside[0] - block.heads.start, inside[-1] + 1 - block.heads.start)
        keys, values = part.codec.decode(part.views(block), part.dtype)
        positions = _rectangle(part.positions, block)
        pieces.append(KV(keys[:, of_block], values[:, of_block], positions[:, of_block]))
    return pieces


def _copied(
    part: DensePart,
    after: Counts,
    most: int,
) -> DensePart:
    """Copy a part into buffers with room for so many slots, and a little more; the new ones are not written yet."""
    fullest = max(-(-sum(row) // len(row)) for row in after)  # mean slots of a head, rounded up
    room = with_spare(after, most - fullest)
    total = ragged.total(room)
    copies = {}
    for name, tensor in part.tensors():
        copy = tensor.new_empty(total, *tensor.shape[1:])
        copy_slots(tensor, part.places, copy, room, counts=part.counts)
        copies[name] = copy
    return part.made_of(copies, after, None if room == after else room)


def _pointer_to(part: DensePart) -> StoredSlots | None:
    """Point the compiled kernel to the slots of a part, where it reads such numbers."""
    form = part.codec.form(part.payload)
    if form is None or not form.is_readable:
        return None
    if ragged.uniform(part.counts) and ragged.uniform(part.places):
        heads = len(ragged.flat(part.counts))
        return StoredSlots(form, stride=part.places[0][0], count=part.counts[0][0], heads=heads)
    return StoredSlots(form, spans=_spans(part))


def _flat_slots(part: DensePart) -> FlatSlots | None:
    """Find the slots of a part for the kernel that reads all heads in one launch, where torch has none as quick."""
    is_rectangle = part.rectangles is not None and len(part.blocks) == 1
    if part.stored is not None or is_rectangle or not part.slots:
        return None
    form = part.codec.form(part.payload)
    return None if form is None else FlatSlots.of(form, _spans(part))


def _spans(part: DensePart) -> Spans:
    """List where each head's slots begin and end."""
    spans = []
    start = 0
    for count, space in zip(ragged.flat(part.counts), ragged.flat(part.places), strict=True):
        spans.append((start, start + count))
        start += space  # what is behind a head's slots is no slot
    return spans


def _fitting(tensor: Tensor) -> Tensor:
    """Copy a tensor into a storage of its size: a small or empty view would keep the tail's buffers alive."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _rectangle(tensor: Tensor, block: Block) -> Tensor:
    """View the slots of a block as [rows, heads, slots, ...]."""
    rows, heads, slots = block.shape
    return tensor[block.span].view(rows, heads, block.room, *tensor.shape[1:])[:, :, :slots]


def _blocks(counts: Counts, room: Counts) -> Iterator[Block]:
    """Cover flat storage by the fewest rectangles: everything, or a row each, or a head each."""
    heads = len(counts[0])
    if ragged.uniform(counts) and ragged.uniform(room):
        yield _block(slice(0, len(counts)), slice(0, heads), 0, counts[0][0], room[0][0])
        return
    start = 0
    for row, (of_heads, spaces) in enumerate(zip(counts, room, strict=True)):
        rows = slice(row, row + 1)
        if ragged.uniform((of_heads,)) and ragged.uniform((spaces,)):
            yield _block(rows, slice(0, heads), start, of_heads[0], spaces[0])
            start += sum(spaces)  # each block begins where the last one ended
            continue
        for head, (stored, space) in enumerate(zip(of_heads, spaces, strict=True)):
            yield _block(rows, slice(head, head + 1), start, stored, space)
            start += space


def _block(
    rows: slice,
    heads: slice,
    start: int,
    stored: int,
    room: int,
) -> Block:
    shape = (rows.stop - rows.start, heads.stop - heads.start, stored)
    return Block(
        rows=rows,
        heads=heads,
        span=slice(start, start + shape[0] * shape[1] * room),
        shape=shape,
        room=room,
    )
