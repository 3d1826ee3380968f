"""A folded conversation as one parallel pass: its tokens, then the Nexus rows of all segments, and who sees whom.

What a turn-by-turn run does with a cache is done here in one forward by a mask: a token sees the sinks, its segment,
what earlier segments kept word for word, and their Nexus rows; a Nexus row sees what its pass would show it. Places
of rows come from the method (select/sonic.py), so training and use cannot differ. Knows nothing of losses.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from kvfold.select.base import top_slots
from kvfold.select.sonic import spread
from kvfold.train.sonic.budgets import Budgets, TalkBudget
from kvfold.train.sonic.talk_batch import NONE, TalkBatch, padded_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Rows of a parallel pass, padded on the right. Queries and keys are N tokens, then K Nexus rows."""

    count: int  # N
    positions: Int[Tensor, "B all_rows"]
    nexus: Int[Tensor, "B K"]  # index of each Nexus row among the adapter's rows
    segment: Int[Tensor, "B all_rows"]  # number of each row's segment; NONE for pads
    column: Int[Tensor, "B all_rows"]  # of a Nexus row: the token that it stands at
    stays: Bool[Tensor, "B L H N"]  # slots that later segments see as they are, by folding layer and head

    @property
    def folded(self) -> Bool[Tensor, "B L H N"]:
        """True for slots that are gone once their segment is folded."""
        segment = self.segment[:, : self.count]
        open_segment = segment.amax(dim=1, keepdim=True)
        closed = (segment < open_segment) & (segment != NONE)
        return closed[:, None, None] & ~self.stays

    def masks(self, layers: Sequence[int]) -> dict[int, Bool[Tensor, "B H all_rows all_rows"]]:
        """Make the mask of each folding layer, True where a query (second last dimension) sees a key."""
        of_query, of_key = self._segments
        is_nexus = self._is_nexus
        is_past = self.column[:, None] <= self.column[:, :, None]
        is_past = is_past & self._is_real
        # Tokens of the same segment, and Nexus rows of earlier segments, are seen in every layer and head.
        same = of_query == of_key
        raw = is_past & same & ~is_nexus
        earlier = of_key < of_query
        rows = (self._is_earlier_row | earlier) & is_nexus
        rows = rows & self._is_real
        always = _with_diagonal(raw | rows)[:, None]  # B 1 NK NK
        past_tokens = is_past[:, None, :, : self.count]  # B 1 NK N
        masks = []
        for stays in self.stays.unbind(dim=1):
            mask = always.repeat(1, stays.shape[1], 1, 1)
            mask[..., : self.count] |= past_tokens & stays[:, :, None]
            masks.append(mask)
        if len(masks) == 1:
            masks = masks * len(layers)
        return dict(zip(layers, masks, strict=True))

    def window_mask(self, window: int) -> Bool[Tensor, "B 1 all_rows all_rows"]:
        """Make the mask of a sliding layer, where all is raw: a Nexus row sees the window of its segment's end."""
        of_query, of_key = self._segments
        column = self.column[:, None]
        is_nexus = self._is_nexus
        # The last token that was read when a Nexus row is made: its pass comes at the end of its segment.
        is_read = (of_key <= of_query) & (of_key != NONE)
        is_read = is_read & ~is_nexus
        ends = torch.where(is_read, column, NONE).amax(dim=2)
        last = torch.where(is_nexus, ends, self.column)[..., None]  # B NK 1
        # A Nexus row takes one place of the window itself.
        room = torch.where(is_nexus, window - 1, window)[:, None]
        in_window = (column <= last) & (column > last - room)
        in_window = in_window & ~is_nexus
        seen = in_window | self._is_earlier_row
        return _with_diagonal(seen & self._is_real)[:, None]

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
    def _is_nexus(self) -> Bool[Tensor, " all_rows"]:
        return torch.arange(self.segment.shape[1]) >= self.count

    @property
    def _is_earlier_row(self) -> Bool[Tensor, "B all_rows all_rows"]:
        """True where a Nexus row sees one of the same segment that stands before it, or itself."""
        of_query, of_key = self._segments
        is_nexus = self._is_nexus
        order = torch.arange(len(is_nexus))
        both = is_nexus & is_nexus[:, None]
        not_later = order <= order[:, None]
        return both & not_later & (of_query == of_key)


def _with_diagonal(mask: Bool[Tensor, "B all_rows all_rows"]) -> Bool[Tensor, "B all_rows all_rows"]:
    """Every row sees itself too, pads as well: a softmax over nothing would be no number."""
    return mask | torch.eye(mask.shape[-1], dtype=torch.bool)


def fold_batch(
    batch: TalkBatch,
    scores: Float[Tensor, "B L H N"] | None,
    *,
    budgets: Budgets,
    rng: random.Random,
) -> Layout:
    """Lay out the parallel pass of a batch whose segments are folded by these budgets.

    `scores` say which tokens stay word for word, by folding layer and head; without them only Nexus rows stay.
    """
    layers, heads = (1, 1) if scores is None else scores.shape[1:3]
    stays = batch.pinned[:, None, None].repeat(1, layers, heads, 1)
    folded = []
    for row in range(len(batch.talks)):
        talk_scores = None if scores is None else scores[row]
        folded.append(_fold_talk(batch, row, talk_scores, budgets.of_talk(rng), stays[row]))
    return _layout(batch, folded, stays)


def _fold_talk(
    batch: TalkBatch,
    row: int,
    scores: Tensor | None,
    budget: TalkBudget,
    stays: Tensor,
) -> list[tuple[int, int]]:
    """(adapter row, token) of a talk's Nexus rows; marks in `stays` what is kept word for word."""
    places = []
    begun = batch.sinks
    for end in batch.talks[row].ends:
        length = max(end - begun, 0)
        slots = budget.slots_of(length)
        if slots >= length:
            stays[..., begun:end] = True
        else:
            verbatim = 0 if scores is None else round(slots * budget.verbatim)
            if scores is not None and verbatim:
                stays[..., begun:end] = top_slots(scores[..., begun:end], verbatim)
            for adapter_row, token in spread(length, slots - verbatim):
                places.append((adapter_row, begun + token))
        begun = max(end, begun)
    return places


def _layout(batch: TalkBatch, folded: Sequence[Sequence[tuple[int, int]]], stays: Tensor) -> Layout:
    """The batch's tokens followed by the Nexus rows of each talk; rows stand where their tokens stand."""
    tokens = batch.ids.shape[1]
    slots = padded_length(max(len(places) for places in folded))
    nexus = torch.zeros(len(folded), slots, dtype=torch.long)
    columns = torch.arange(tokens).expand(len(folded), -1)
    positions = pad(batch.positions, (0, slots))
    segment = pad(batch.segment, (0, slots), value=NONE)
    column = pad(columns, (0, slots))
    for row, places in enumerate(folded):
        count = len(places)
        made = slice(tokens, tokens + count)
        at = torch.tensor([token for _, token in places], dtype=torch.long)
        nexus[row, :count] = torch.tensor([adapter_row for adapter_row, _ in places], dtype=torch.long)
        positions[row, made] = batch.positions[row, at]
        segment[row, made] = batch.segment[row, at]
        column[row, made] = at
    return Layout(
        count=tokens,
        positions=positions,
        nexus=nexus,
        segment=segment,
        column=column,
        stays=stays,
    )
