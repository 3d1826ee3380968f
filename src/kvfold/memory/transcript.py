"""Transcript: what is known of the text that one cache was fed, once for all its layers.

Ids are kept for the columns that are still raw, where a method reads them. Delimiter classes are kept for every
position, where a place cuts text into sentences. A class is one byte: the lowest bits are a level, how good an end the
token is; the others say what the token does to its neighbours. Who cuts text, and where, is place/sentences.py.
Of all ids a digest is kept, which tells whether another text is the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from kvfold.memory.text_digest import TextDigest

LEVEL = 0b111  # bits of a class: how good an end
SOFT = 0b1000  # an end only where what follows stands apart
APART = 0b10000  # begins with a space, a new line, or something that is no letter or digit
CLOSER = 0b100000  # quotes and brackets that belong to the token before them
STEM = 0b1000000  # a dot after it is no end: Dr, e.g, a single letter
_STRONG = 5  # the least level that ends a sentence by itself


def ends(classes: Any, after: Any) -> Any:
    """Tell whether a sentence ends at a token, from its class and its successor's; of numbers or arrays of them."""
    strong = (classes & LEVEL) >= _STRONG
    inside = ((classes & SOFT) != 0) & ((after & APART) == 0)  # as the dot of 3.5
    return strong & ~inside


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """The text of one cache. A value: buffers may be shared with an older one, which reads less of them."""

    ids: Int[Tensor, "B columns"] | None = None  # int32, of the columns that are still raw in any layer
    first_column: int = 0  # of the ids, among all that were fed
    classes: UInt8[Tensor, "B capacity"] | None = None  # by position, pads left out
    length: int = 0  # positions that have a class
    digest: TextDigest = field(default_factory=TextDigest)  # of the ids of all columns; no part of the cache's bytes

    def with_ids(self, ids: Int[Tensor, "B Q"]) -> "Transcript":
        """Append the ids of new columns."""
        new = ids.to(torch.int32)
        return replace(self, ids=new if self.ids is None else torch.cat([self.ids, new], dim=1))

    def with_classes(
        self,
        positions: Int[Tensor, "B Q"],
        classes: UInt8[Tensor, "B Q"] | None,
        valid: Bool[Tensor, "B Q"] | None,
    ) -> "Transcript":
        """Write the classes of new tokens at their positions; None writes that nothing is known of them."""
        if classes is None and self.classes is None:
            return self
        stop = max(self.length, int(positions.max()) + 1)  # positions from 0 to here have a class
        held = self._with_room(len(positions), stop, positions.device)
        fresh = torch.zeros(positions.shape, dtype=torch.uint8, device=held.device) if classes is None else classes
        where = positions.long()
        if valid is not None:
            where = where.masked_fill(~valid, held.shape[1] - 1)  # the last place is never read: pads go there
        held.scatter_(1, where, fresh)
        return replace(self, classes=held, length=stop)

    def from_column(self, column: int) -> "Transcript":
        """Drop the ids of fed columns before this one, which were folded."""
        gone = column - self.first_column
        if self.ids is None or gone <= 0:
            return self
        return replace(self, ids=self.ids[:, gone:].clone(), first_column=column)

    def without_ids(self) -> "Transcript":
        """Keep the classes only, over the same buffer."""
        return self if self.ids is None else replace(self, ids=None)

    def cropped(self, columns: int, *, fed: int) -> "Transcript":
        """Drop the ids of the newest columns of `fed`. Classes stay: they are written again when their columns come."""
        ids = None if self.ids is None else self.ids[:, : self.ids.shape[1] - columns].clone()
        return replace(self, ids=ids, digest=self.digest.cropped(fed - columns))

    def with_fresh_buffers(self) -> "Transcript":
        """Copy the classes, so that what others read in the old buffer is not written over."""
        if self.classes is None:
            return self
        with torch.inference_mode(False):  # as in _with_room
            classes = self.classes.clone()
        return replace(self, classes=classes)

    def take_rows(self, rows: Sequence[int]) -> "Transcript":
        """Pick these rows, in this order, repeats allowed, into fresh buffers."""
        picked = list(rows)
        with torch.inference_mode(False):  # as in _with_room
            ids = None if self.ids is None else self.ids[picked]
            classes = None if self.classes is None else self.classes[picked]
        return replace(self, ids=ids, classes=classes, digest=self.digest.take_rows(picked))

    def classes_at(self, row: int, positions: Int[Tensor, " S"]) -> bytes:
        """Read the classes of one row at some positions; zeros where nothing is known."""
        if self.classes is None or self.length == 0:
            return bytes(len(positions))
        known = self.classes[row].to("cpu")  # text is cut on the host
        where = positions.to("cpu").long()
        return bytes(known[where.clamp(max=self.length - 1)].numpy())

    def sentence_ended(self, positions: Int[Tensor, " B"]) -> Bool[Tensor, " B"] | None:
        """Tell of each row whether a sentence ended just before a position; None where no classes are known."""
        if self.classes is None:
            return None
        where = positions.long().clamp(min=1, max=max(self.length - 1, 1))[:, None]  # B 1
        before, after = self.classes.gather(1, where - 1), self.classes.gather(1, where)
        return ends(before, after)[:, 0] & (positions > 0)  # before the first token nothing ended

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor held, by name."""
        if self.ids is not None:
            yield "ids", self.ids
        if self.classes is not None:
            yield "classes", self.classes

    def _with_room(self, rows: int, positions: int, device: torch.device) -> Tensor:
        """Give a buffer for so many positions and one place more; it grows by an eighth."""
        held = self.classes
        if held is not None and positions < held.shape[1]:  # the last place is for pads
            return held
        with torch.inference_mode(False):  # later forwards write into it, in any mode
            grown = torch.zeros(
                rows,
                positions + positions // 8 + 1,
                dtype=torch.uint8,
                device=device,
            )
        if held is not None:
            grown[:, : self.length] = held[:, : self.length]
        return grown
