"""Tail: the newest tokens of a layer, raw, in buffers that grow by an eighth, or by a few tokens.

Appending a token copies one token. A tail is a length over shared buffers: an older tail of the same buffers stays
valid while newer tokens are written behind it, which is how a forward is rolled back. Rows share columns; a column
is a pad for some rows (position -1). It does not know what happens to tokens once they leave it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.attention.kernels.compiled import Form, StoredSlots, append

_SHARE = 8  # of what is held: one column in so many is room for those to come
_LEAST_ROOM = 8  # columns behind a token that is said by itself: a short tail would be copied for nearly each of them
PAD = -1  # the position of a column that holds no token of this row


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """`length` columns of raw keys and values. The first of them is number `start` of the columns that were fed."""

    keys: Float[Tensor, "B H capacity D"]
    values: Float[Tensor, "B H capacity E"]
    positions: Int[Tensor, "B capacity"]  # int32, PAD where the column is no token of the row
    length: int  # columns that are read; older tails of the same buffers read fewer
    start: int  # columns that left before
    padded: bool  # whether any column is a pad for some row
    stored: StoredSlots | None = field(default=None, compare=False)  # the buffers, for the compiled kernel

    @classmethod
    def empty(cls, keys: Tensor, values: Tensor) -> "Tail":
        """Make a tail of no columns, shaped and typed like these keys and values."""
        rows, heads = keys.shape[:2]
        with torch.inference_mode(False):  # else later forwards could not write into the buffers
            return cls(
                keys=keys.new_empty(rows, heads, 0, keys.shape[-1]),
                values=values.new_empty(rows, heads, 0, values.shape[-1]),
                positions=torch.empty(rows, 0, dtype=torch.int32, device=keys.device),
                length=0,
                start=0,
                padded=False,
            )

    @property
    def valid(self) -> Bool[Tensor, "B length"]:
        """Mark the columns that are tokens of their row."""
        return self.positions[:, : self.length] != PAD

    def append(
        self,
        keys: Float[Tensor, "B H Q D"],
        values: Float[Tensor, "B H Q E"],
        *,
        positions: Int[Tensor, "B Q"],
        valid: Bool[Tensor, "B Q"] | None,
    ) -> "Tail":
        """Write tokens behind the others; new buffers only when they do not fit."""
        new = keys.shape[2]
        stop = self.length + new
        grown = self
        if stop > self.keys.shape[2]:
            grown = self._with_room(stop + max(stop // _SHARE, _LEAST_ROOM if new == 1 else 0))
        # Behind `length` nobody reads: tails that share the buffers end at or before it, or copied them (memory.py).
        stored = grown.stored if new == 1 and valid is None else None  # one call where it is one token
        if stored is None or not append(stored, self.length, keys, values, positions, into=grown.positions):
            grown.keys[:, :, self.length : stop] = keys
            grown.values[:, :, self.length : stop] = values
            grown.positions[:, self.length : stop] = positions if valid is None else positions.masked_fill(~valid, PAD)
        # Written out: `replace` takes three times as long, in every layer of every step.
        return Tail(
            keys=grown.keys,
            values=grown.values,
            positions=grown.positions,
            length=stop,
            start=grown.start,
            padded=self.padded or valid is not None,
            stored=grown.stored,
        )

    def ahead(self, columns: int) -> "Tail":
        """Make room for so many tokens that somebody else will write, one by one, and say where these will stand.

        There are no pads, and no gaps between positions.
        """
        assert not self.padded, "the next positions of padded rows differ"
        stop = self.length + columns
        tail = self
        if stop > self.keys.shape[2]:
            spare = stop // _SHARE
            tail = self._with_room(stop + spare)
        first = self.start + self.length
        numbers = torch.arange(
            first,
            first + columns,
            dtype=torch.int32,
            device=self.keys.device,
        )
        # Nobody asks for them before `written`; another token may be appended over them.
        tail.positions[:, self.length : stop] = numbers
        # They are read under a mask, and what has no weight must be a number all the same.
        tail.keys[:, :, self.length : stop] = 0
        tail.values[:, :, self.length : stop] = 0
        return tail

    def written(self) -> "Tail":
        """Read one column more, which somebody has written into the room that `ahead` made."""
        assert self.length < self.keys.shape[2], "a token is written into room that is there"
        return replace(self, length=self.length + 1)

    def without(self, invalid: Bool[Tensor, "B length"]) -> "Tail":
        """Turn some columns into pads for some rows."""
        positions = self.positions.clone()  # older tails read the old ones; keys and values stay shared
        positions[:, : self.length].masked_fill_(invalid, PAD)
        return replace(self, positions=positions, padded=True)

    def cropped(self, length: int) -> "Tail":
        """Cut to the first `length` columns, over the same buffers."""
        return replace(self, length=length)

    def after(self, columns: int) -> "Tail":
        """Drop the first `columns`, into buffers that fit exactly."""
        rest = slice(columns, self.length)
        return Tail(
            keys=self.keys[:, :, rest].clone(),
            values=self.values[:, :, rest].clone(),
            positions=self.positions[:, rest].clone(),  # cloned: a view would keep the whole buffer alive
            length=self.length - columns,
            start=self.start + columns,
            padded=self.padded and bool((self.positions[:, rest] == PAD).any()),  # masks are dropped with the last pad
        )

    def take_rows(self, rows: Sequence[int]) -> "Tail":
        """Pick these rows, in this order, repeats allowed, into new buffers."""
        chosen = torch.tensor(list(rows), device=self.keys.device)
        cut = {name: tensor[chosen] for name, tensor in self.tensors()}
        return replace(self, **cut, stored=_pointing_to(cut["keys"], cut["values"]))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor held, slack included, by name."""
        yield from (("keys", self.keys), ("values", self.values), ("positions", self.positions))

    @property
    def slack(self) -> dict[str, int]:
        """Count the bytes of each buffer behind the last column, by name."""
        columns = max(self.keys.shape[2], 1)
        behind = self.keys.shape[2] - self.length
        return {name: tensor.untyped_storage().nbytes() // columns * behind for name, tensor in self.tensors()}

    @property
    def slack_bytes(self) -> int:
        """Count the bytes of the buffers behind the last column."""
        return sum(self.slack.values())

    @property
    def is_loose(self) -> bool:
        """Tell whether the buffers have more room than they grow by, as after a crop."""
        return self.keys.shape[2] > self.length + max(self.length // _SHARE, _LEAST_ROOM)

    def _with_room(self, capacity: int) -> "Tail":
        rows, heads = self.keys.shape[:2]
        with torch.inference_mode(False):
            keys = self.keys.new_empty(rows, heads, capacity, self.keys.shape[-1])
            values = self.values.new_empty(rows, heads, capacity, self.values.shape[-1])
            positions = self.positions.new_full((rows, capacity), PAD)  # slack is no token
        keys[:, :, : self.length] = self.keys[:, :, : self.length]
        values[:, :, : self.length] = self.values[:, :, : self.length]
        positions[:, : self.length] = self.positions[:, : self.length]
        return replace(self, keys=keys, values=values, positions=positions, stored=_pointing_to(keys, values))


def _pointing_to(keys: Tensor, values: Tensor) -> StoredSlots | None:
    """Point the compiled kernel to buffers, where it reads such numbers."""
    form = Form.plain(keys, values)
    if form is None or not form.is_readable:
        return None
    return StoredSlots(form, stride=keys.shape[2])
