"""Attention of a few queries over flat slots in one launch for all rows and heads: a Triton kernel, for CUDA.

Heads may hold differently many slots, and slots may be codes: int8 and int4 are read as they lie and widened in
registers, so no head waits for another and nothing is decoded in memory. Each head's slots are shared out over programs
(flash decoding, Dao et al., https://pytorch.org/blog/flash-decoding), whose answers are merged. It knows no codec: a
Form says how numbers are written. What it must agree with is ../reference.py; it was never timed.
"""

# pyright: reportInvalidTypeForm=false

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.attention.kernels.compiled import Form, Kind, Spans
from kvfold.attention.kernels.programs import (
    MOST_ROWS,
    PROGRAMS,
    SMALLEST,
    constexpr,
    jit,
    launches,
    merged,
    padded,
    power_of_two,
    room_for_answers,
    softmax_step,
    store,
    tl,
)
from kvfold.attention.partial import Partial
from kvfold.attention.soft_cap import CappedScale

DEVICES = ("cuda",)  # types of devices; under Triton's interpreter a processor is one too
_PLAIN = {Kind.FLOAT32: torch.float32, Kind.BFLOAT16: torch.bfloat16, Kind.FLOAT16: torch.float16}
_BITS = {Kind.INT8: 8, Kind.INT4: 4}  # of codes
_LARGEST_HEAD = 256
_SPLIT_SLOTS = 128  # slots of a head for each program, at least; chosen, not measured
_MOST_PROGRAMS = 4 * PROGRAMS  # most of them may find no slots, where one head has many and the others few
_WIDE_ROWS = 16  # query rows in float32, of which more would not fit into registers
_TILE = 64  # most slots of a tile
_TILE_BYTES = 1 << 15  # of its keys and values: two tiles fit into the shared memory of any card of today
_NARROW = 1 << 12  # numbers summed up by a program, up to which four warps hold them


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatSlots:
    """Slots of all rows and heads, head after head, and where those of each head lie."""

    form: Form
    spans: Int[Tensor, "N 2"]  # of each row and head, on the device: its first slot, and where they end
    splits: int  # programs of each head

    @classmethod
    def of(cls, form: Form, spans: Spans) -> "FlatSlots | None":
        """Find where each head's slots lie; None where the kernel does not read such numbers, or not here."""
        device = form.keys[0].device
        if device.type not in DEVICES or not launches() or not _is_readable(form):
            return None
        with torch.inference_mode(False):  # it is kept, and later forwards may have gradients
            on_device = torch.tensor(spans, dtype=torch.int64, device=device)
        counts = [stop - start for start, stop in spans]
        return cls(form=form, spans=on_device, splits=_splits(counts))

    def fits(self, queries: Float[Tensor, "B G Q D"], scale: float) -> bool:
        """Tell whether the kernel takes these queries: few, of the type of the slots, without gradients or a cap."""
        types = _PLAIN.values()
        if self.form.kind in _PLAIN:
            types = (_PLAIN[self.form.kind],)
        if queries.dtype not in types or type(scale) is CappedScale:
            return False
        query_rows = queries.numel() // (len(self.spans) * self.form.size)  # of each key/value head
        most = _WIDE_ROWS if queries.dtype is torch.float32 else MOST_ROWS
        if not 0 < query_rows <= most or queries.device != self.spans.device:
            return False
        tensors = (queries, *self.form.keys, *self.form.values)
        return not torch.is_grad_enabled() or not any(one.requires_grad for one in tensors)

    def attend(self, queries: Float[Tensor, "B G Q D"], scale: float) -> Partial:
        """Attend every query to every slot of its row and head."""
        # Queries of a group lie side by side under their key/value head, so that each slot is read once for them.
        packed = queries.reshape(len(self.spans), -1, self.form.size)
        outputs, weights = _launch(packed.contiguous(), self, scale)
        output, log_sum_exp = merged(outputs, weights)
        output = output.to(queries.dtype)
        return Partial(output.reshape(queries.shape), log_sum_exp.reshape(queries.shape[:-1]))


def _is_readable(form: Form) -> bool:
    """Whether the kernel reads numbers that are written so, in heads of such a size."""
    if form.kind is Kind.INT4 and form.group % 2:  # a byte would belong to two groups
        return False
    if form.kind not in _PLAIN and form.kind not in _BITS:
        return False
    is_power = form.group == 0 or form.group == power_of_two(form.group)
    if not is_power and form.group != form.size:  # groups and their number would both be padded
        return False
    tensors = (*form.keys, *form.values)
    in_one_piece = all(one.is_contiguous() for one in tensors)
    return in_one_piece and 0 < form.size <= _LARGEST_HEAD


def _splits(counts: Sequence[int]) -> int:
    """Programs of each head, so that none reads much more than its share of all slots."""
    share = -(-sum(counts) // PROGRAMS)  # rounded up
    wanted = -(-max(counts) // max(share, _SPLIT_SLOTS))
    room = -(-_MOST_PROGRAMS // len(counts))
    return max(min(wanted, room), 1)


def _launch(
    queries: Float[Tensor, "N query_rows D"],
    slots: FlatSlots,
    scale: float,
) -> tuple[Float[Tensor, "N splits query_rows D"], Float[Tensor, "N splits query_rows"]]:
    """Run the kernel: mean values and log-sum-exp of each query row, from every split of a head's slots."""
    heads, query_rows, size = queries.shape
    form, splits = slots.form, slots.splits
    outputs, weights = room_for_answers(queries, splits, size)
    group = form.group or size  # plain numbers are one group without a step
    groups = power_of_two(size // group)
    columns = max(power_of_two(group), SMALLEST // groups)  # of a group
    with torch.cuda.device_of(queries):  # triton launches on the current card, not on that of its tensors
        _attend[(splits, heads)](
            queries,
            *_pointers(form.keys),
            *_pointers(form.values),
            slots.spans,
            outputs,
            weights,
            scale,
            query_rows,
            splits,
            SIZE=size,
            GROUP_SIZE=group,
            BITS=_BITS.get(form.kind, 0),
            ROWS=padded(query_rows),
            GROUPS=groups,
            GROUP=columns,
            **_tuned(queries, groups * columns),
        )
    return outputs, weights


def _pointers(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Numbers, steps and lows; numbers in the place of those that there are not, for they are not read."""
    missing = 3 - len(tensors)
    return tensors + tensors[:1] * missing


def _tuned(queries: Float[Tensor, "N query_rows D"], columns: int) -> dict[str, int]:
    """Slots of a tile, warps and pipeline stages by which programs of so many padded dimensions fit a card.

    Chosen by registers and shared memory that the compiler reports for compute capability 8.0 and 9.0, not by time.
    """
    if queries.dtype is torch.float32:  # its products are no matrix instructions, and want many registers
        return {"TILE": SMALLEST, "num_warps": 8, "num_stages": 1}
    slot_bytes = 2 * columns * queries.element_size()
    tile = min(_TILE_BYTES // slot_bytes, _TILE)
    summed = padded(queries.shape[1]) * columns
    return {"TILE": tile, "num_warps": 4 if summed <= _NARROW else 8, "num_stages": 2}


@jit
def _attend(queries, keys, key_steps, key_lows, values, value_steps, value_lows, spans, outputs, weights, scale,
            query_rows, splits, SIZE: constexpr, GROUP_SIZE: constexpr, BITS: constexpr, ROWS: constexpr,
            GROUPS: constexpr, GROUP: constexpr, TILE: constexpr):  # fmt: skip
    """One program: its share of one head's slots. Queries are padded to ROWS, each of the groups to GROUP columns."""
    split = tl.program_id(0)
    head = tl.program_id(1)  # of all rows
    start = tl.load(spans + head * 2)
    count = tl.load(spans + head * 2 + 1) - start
    query_row = tl.arange(0, ROWS)
    column = tl.arange(0, GROUPS * GROUP)
    dim = column // GROUP * GROUP_SIZE + column % GROUP
    stored = column % GROUP < GROUP_SIZE
    stored &= dim < SIZE
    real = query_row < query_rows
    place = (head * query_rows + query_row[:, None]) * SIZE
    place += dim[None]
    mask = real[:, None] & stored[None]
    query = tl.load(queries + place, mask=mask, other=0.0)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, GROUPS * GROUP), tl.float32)
    for first in range(split * TILE, count, splits * TILE):
        within = first + tl.arange(0, TILE).to(tl.int64)  # places are int64: many slots hold more than 2^31 numbers
        exists = within < count
        slot = start + within
        tile = _tile(keys, key_steps, key_lows, slot, exists, dim, stored, query.dtype,
                     SIZE, GROUP_SIZE, BITS, GROUPS, GROUP, TILE)  # fmt: skip
        # In float32 not rounded to TF32, whose scores would be as coarse as those of float16.
        products = tl.dot(query, tl.trans(tile), input_precision="ieee")
        scores = products * scale
        scores = tl.where(exists[None], scores, float("-inf"))
        weight, fade, highest, total = softmax_step(scores, highest, total)
        tile = _tile(values, value_steps, value_lows, slot, exists, dim, stored, query.dtype,
                     SIZE, GROUP_SIZE, BITS, GROUPS, GROUP, TILE)  # fmt: skip
        gained = tl.dot(weight.to(query.dtype), tile, input_precision="ieee")
        summed = summed * fade[:, None] + gained
    answer = (head * splits + split) * query_rows + query_row
    store(outputs, weights, answer, real, dim, SIZE, stored, highest, total, summed)


@jit
def _tile(numbers, steps, lows, slot, exists, dim, stored, DTYPE: constexpr, SIZE: constexpr, GROUP_SIZE: constexpr,
          BITS: constexpr, GROUPS: constexpr, GROUP: constexpr, TILE: constexpr):  # fmt: skip
    """Keys or values of a tile of slots [TILE, GROUPS x GROUP], in the queries' type; zeros in the padding."""
    if BITS == 0:
        place = slot[:, None] * SIZE + dim[None]
        mask = exists[:, None] & stored[None]
        tile = tl.load(numbers + place, mask=mask, other=0.0)
    else:
        group = tl.arange(0, GROUPS)
        of_head = group < SIZE // GROUP_SIZE
        there = exists[:, None] & of_head[None]
        codes = _codes(numbers, slot, there, group, SIZE, GROUP_SIZE, BITS, GROUPS, GROUP, TILE)
        # A step is read once for its group, and meets the group's codes in registers.
        place = slot[:, None] * (SIZE // GROUP_SIZE) + group[None]
        step = tl.load(steps + place, mask=there, other=0.0)
        step = step.to(tl.float32)
        wide = codes.to(tl.float32) * step[:, :, None]
        if BITS == 4:
            low = tl.load(lows + place, mask=there, other=0.0)
            low = low.to(tl.float32)
            wide += low[:, :, None]
        tile = tl.reshape(wide.to(DTYPE), (TILE, GROUPS * GROUP))
    return tile


@jit
def _codes(numbers, slot, there, group, SIZE: constexpr, GROUP_SIZE: constexpr, BITS: constexpr, GROUPS: constexpr,
           GROUP: constexpr, TILE: constexpr):  # fmt: skip
    """Codes of a tile of slots [TILE, GROUPS, GROUP]; of 4 bits two lie in a byte, the first one below."""
    SHARE: constexpr = 8 // BITS
    byte = tl.arange(0, GROUP // SHARE)
    place = slot[:, None] * (SIZE // SHARE)
    place += group[None] * (GROUP_SIZE // SHARE)
    place = place[:, :, None] + byte[None, None]
    of_group = byte < GROUP_SIZE // SHARE
    mask = there[:, :, None] & of_group[None, None]
    codes = tl.load(numbers + place, mask=mask, other=0)
    if BITS == 4:
        both = tl.join(codes & 15, codes >> 4)
        codes = tl.reshape(both, (TILE, GROUPS, GROUP))
    return codes
