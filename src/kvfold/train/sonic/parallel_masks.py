"""A folded conversation as one parallel pass: its tokens, then the Nexus rows of all segments, and who sees whom.

What a turn-by-turn run does with a cache is done here in one forward by masks: a token sees the sinks, its segment, and
what earlier segments left: slots and rows, each with a weight. A row sees what its token sees, and, through gates, the
rest of its segment. Places of rows come from the method (select/sonic.py). Knows nothing of losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from kvfold.train.sonic.talk_batch import NONE, TalkBatch, padded_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Rows of a parallel pass, padded on the right. Queries and keys are N tokens, then K Nexus rows."""

    count: int  # N
    positions: Int[Tensor, "B all_rows"]
    segment: Int[Tensor, "B all_rows"]  # number of each row's segment; NONE for pads
    column: Int[Tensor, "B all_rows"]  # the token that each stands at

    @classmethod
    def of(cls, batch: TalkBatch, places: Sequence[Sequence[int]]) -> "Layout":
        """Put a Nexus row at these tokens of each talk, behind the batch's tokens."""
        tokens = batch.ids.shape[1]
        longest = max(map(len, places))
        rows = padded_length(longest) if longest else 0
        columns = torch.arange(tokens).expand(len(places), -1)
        positions = pad(batch.positions, (0, rows))
        segment = pad(batch.segment, (0, rows), value=NONE)
        column = pad(columns, (0, rows))
        for row, at in enumerate(places):
            where = torch.tensor(at, dtype=torch.long)
            made = slice(tokens, tokens + len(at))
            positions[row, made] = batch.positions[row, where]
            segment[row, made] = batch.segment[row, where]
            column[row, made] = where
        return cls(count=tokens, positions=positions, segment=segment, column=column)

    def to(self, device: torch.device) -> "Layout":
        """Give the layout with its tensors on a device."""
        return Layout(
            count=self.count,
            positions=self.positions.to(device),
            segment=self.segment.to(device),
            column=self.column.to(device),
        )

    def visible(self) -> Bool[Tensor, "B all_rows all_rows"]:
        """Mark what each query sees: the sinks, its segment up to itself, and what earlier segments left."""
        of_query, of_key = self._segments
        is_raw = (of_query == of_key) & self._is_past & ~self._is_row
        is_earlier = of_key < of_query
        return ((is_raw | is_earlier) & self._is_real) | self._is_blind

    def later(self) -> Bool[Tensor, "B K N"]:
        """Mark the later tokens of its segment for each Nexus row."""
        of_query, of_key = self._segments
        same = (of_query == of_key) & self._is_real & ~self._is_past
        return same[:, self.count :, : self.count]

    def window_mask(self, window: int) -> Bool[Tensor, "B 1 all_rows all_rows"]:
        """Make the mask of a sliding layer, where all is raw: a Nexus row sees the window of its segment's end."""
        of_query, of_key = self._segments
        column = self.column[:, None]
        is_row = self._is_row
        # The last token that was read when a Nexus row is made: its pass comes at the end of its segment.
        is_read = (of_key <= of_query) & (of_key != NONE) & ~is_row
        ends = torch.where(is_read, column, NONE).amax(dim=2)
        last = torch.where(is_row, ends, self.column)[..., None]  # B NK 1
        # A Nexus row takes one place of the window itself.
        room = torch.where(is_row, window - 1, window)[:, None]
        in_window = (column <= last) & (column > last - room) & ~is_row
        seen = (in_window & self._is_real) | self._is_blind
        return seen[:, None]

    @property
    def _segments(self) -> tuple[Int[Tensor, "B all_rows 1"], Int[Tensor, "B 1 all_rows"]]:
        """The segments of queries and of keys, to be compared."""
        return self.segment[:, :, None], self.segment[:, None]

    @property
    def _is_real(self) -> Bool[Tensor, "B all_rows all_rows"]:
        """True where neither query nor key is a pad."""
        of_query, of_key = self._segments
        return (of_key != NONE) & (of_query != NONE)

    @property
    def _is_past(self) -> Bool[Tensor, "B all_rows all_rows"]:
        """True where a key stands at or before a query's token."""
        return self.column[:, None] <= self.column[:, :, None]

    @property
    def _is_row(self) -> Bool[Tensor, " all_rows"]:
        return torch.arange(self.segment.shape[1], device=self.segment.device) >= self.count

    @property
    def _is_blind(self) -> Bool[Tensor, "B all_rows all_rows"]:
        """True where a pad meets itself: a softmax over nothing would be no number."""
        same = torch.eye(self.segment.shape[1], dtype=torch.bool, device=self.segment.device)
        return same & (self.segment == NONE)[:, :, None]
