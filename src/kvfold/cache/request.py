"""Pass: a request to run rows of a method's own through the model, over what each layer remembers.

A method that makes new slots (SONIC's Nexus rows), or shares its budget out over all layers, cannot do so from one
layer's tensors: it asks for a pass, and hf/ carries it out. Nothing of a pass is text: it feeds no token, moves no
counter and leaves sliding layers as they were.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NO_ROW = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """What is to be folded of each row: the real tokens of its raw tail, its sinks taken off."""

    real: Bool[Tensor, "B S"]  # True where a column is a token of the row's segment
    positions: Int[Tensor, "B S"]  # where it sits in the text
    slots: tuple[int, ...]  # new slots that each row may have; it may be more than it has tokens
    layers: int  # that fold
    heads: int  # key/value heads of each of them
    together: bool = False  # all heads of a layer must keep the same slots
    worth: Float[Tensor, "B L H S"] | None = None  # 0 to 1: the share of all slots that matter less, where one can tell

    def tokens(self, row: int) -> list[int]:
        """Columns of one row's tokens, in order."""
        return self.real[row].nonzero().flatten().tolist()


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

    @classmethod
    def without_rows(cls, kept: Bool[Tensor, "B L H S"]) -> "Pass":
        """A pass that only says what stays."""
        none = torch.zeros(len(kept), 0, dtype=torch.long, device=kept.device)
        return cls(rows=none, positions=none, first=none, stop=none, kept=kept)

    @property
    def real(self) -> Bool[Tensor, "B K"]:
        """True where there is a row."""
        return self.rows != NO_ROW
