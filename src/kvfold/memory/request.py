"""Pass: a request to run rows of a method's own through the model, over what each layer remembers.

A method that makes new slots (SONIC's Nexus rows), or shares its budget out over all layers, cannot do so from one
layer's tensors: it asks for a pass, and hf/ carries it out. Nothing of a pass is text: it feeds no token, moves no
counter and leaves sliding layers as they were.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NO_ROW = -1
Row = tuple[int, int, int, int]  # of an adapter (any number where there is none); first and stop column; its own column


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """What is to be folded of each row: the real tokens of its raw tail, its sinks taken off."""

    real: Bool[Tensor, "B S"]  # True where a column is a token of the row's segment
    positions: Int[Tensor, "B S"]  # where it sits in the text
    slots: tuple[int, ...]  # new slots that each row may have; it may be more than it has tokens
    layers: int  # that fold
    heads: int  # key/value heads of each of them
    together: bool = False  # all heads of a layer must keep the same slots
    worth: Float[Tensor, "B L H S"] | None = None  # the more, the more a slot matters; where one can tell
    ids: Int[Tensor, "B S"] | None = None  # the tokens themselves, for methods that need text

    def tokens(self, row: int) -> list[int]:
        """Columns of one row's tokens, in order."""
        return self.real[row].nonzero().flatten().tolist()

    def nothing_kept(self) -> Bool[Tensor, "B L H S"]:
        """False for every slot."""
        return self.real.new_zeros(len(self.real), self.layers, self.heads, self.real.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """Text to run once more, behind everything that is held, to see which slots that takes."""

    ids: Int[Tensor, "B S"]  # of the tail's oldest columns
    real: Bool[Tensor, "B S"]
    first_position: Int[Tensor, " B"]  # where the repeated text begins


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Rows to run, and what each may see of the segment; sinks and folded slots are seen by all, rows causally."""

    rows: Int[Tensor, "B K"]  # which of the adapter's rows; NO_ROW where a row of the batch has fewer
    positions: Int[Tensor, "B K"]  # where it stands in the text, inside its segment
    first: Int[Tensor, "B K"]  # it sees columns first <= column < stop of the tail
    stop: Int[Tensor, "B K"]
    kept: Bool[Tensor, "B L H S"]  # slots of the segment that stay word for word, beside the new ones
    ids: Int[Tensor, "B K"] | None = None  # rows are these tokens of the model, not rows of an adapter
    pooled: bool = False  # nothing runs: a row is the mean of what it sees of the segment

    @classmethod
    def of(cls, segment: Segment, kept: Bool[Tensor, "B L H S"], placed: "Sequence[Sequence[Row]]" = (), *,
           pooled: bool = False, of_text: bool = False) -> "Pass":  # fmt: skip
        """What stays, and the rows of each row of the batch; `of_text`: they are the tokens that they stand at."""
        device, batch = segment.positions.device, len(segment.real)
        rows = torch.full((batch, max(map(len, placed), default=0)), NO_ROW)
        first, stop, at = (torch.zeros_like(rows) for _ in range(3))
        for index, own in enumerate(placed):
            for column, row in enumerate(own):
                rows[index, column], first[index, column], stop[index, column], at[index, column] = row
        rows, first, stop, at = (tensor.to(device) for tensor in (rows, first, stop, at))
        positions = segment.positions.long().gather(1, at).clamp(min=0)
        ids = None
        if of_text:
            assert segment.ids is not None, "a method that needs text is given it"
            ids = segment.ids.gather(1, at)
        return cls(rows=rows, positions=positions, first=first, stop=stop, kept=kept, ids=ids, pooled=pooled)

    @property
    def real(self) -> Bool[Tensor, "B K"]:
        """True where there is a row."""
        return self.rows != NO_ROW
