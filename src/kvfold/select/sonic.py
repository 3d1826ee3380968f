"""SONIC: keep the slots of a finished segment that later replies would miss most, and learned ones (Nexus rows).

Chen et al., SONIC: Segmented Optimized Nexus for Information Compression in Key-Value Caching,
https://arxiv.org/abs/2601.21927
Ours differs: no code is public, so this is our design from what the paper tells. A Nexus row stands at a salient token
and begins as that token. Where the adapter has learned rows, it updates them, and gates let them see later tokens of
their segment; rows and the tokens' slots compete for one budget, layer by layer and head by head, by one learned score.
Where it has none, the slots that stay become rows in closed form (memory/matched_rows.py).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.budget.budget import Budget
from kvfold.errors import BudgetError, PlanError
from kvfold.memory.context import FoldContext, Row, Rows, Segment, Selection
from kvfold.memory.matched_rows import matched
from kvfold.memory.recorders import Recorder, TokenIds
from kvfold.memory.spread_queries import SpreadQueries
from kvfold.select.base import JointSelect, top_slots

LEAST = 0.6  # share of its part of the budget that a segment spends, however quiet it is
QUERIES = 128  # of a segment, by which rows are matched
SAVED = 48  # tokens whose share of the budget quiet segments may save for later ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Sonic(JointSelect):
    """The most salient slots of each segment, as they are or as Nexus rows. Give a budget, or `slots` of a segment."""

    slots: int | None = None  # of each segment, whatever its length; in place of a budget
    verbatim: float | None = None  # share of the slots kept word for word; 1.0: no rows
    adapter: str = "shipped"  # the adapter of this package for the model, or a folder, or a name on the Hub

    names_files: ClassVar[tuple[str, ...]] = ("adapter",)
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2601.21927"

    def __post_init__(self) -> None:
        if self.verbatim is not None and not 0 <= self.verbatim <= 1:
            raise PlanError(f"verbatim={self.verbatim} was asked for; it is a share of the slots; give 0 to 1")
        if self.slots is None:
            JointSelect.__post_init__(self)
            return
        self.refuse_budget("slots= says already how much each segment keeps")
        if self.slots < 1:
            raise BudgetError(f"slots={self.slots} was asked for; a folded segment has at least one; give 1 or more")

    @property
    def records(self) -> tuple[Recorder, ...]:
        """Record the ids of the text, which rows begin as, and queries that say what is read of it."""
        return () if self.verbatim == 1 else (TokenIds(), SpreadQueries(QUERIES))

    @property
    def budget(self) -> Budget | None:
        """Give what may be kept; None where every segment has the same number of slots."""
        if self.slots is not None:
            return None
        return Budget(fraction=self.keep, tokens=self.tokens, size_bytes=self.max_bytes)

    @property
    def adapter_source(self) -> str | None:
        """Say where scores, rows and their updates come from."""
        return self.adapter

    def choose(self, context: FoldContext) -> Selection:
        """Keep the slots and rows with the best scores; a segment that fits stays as it is."""
        segment = context.segment
        kept = segment.nothing_kept()
        made = segment.nothing_kept()  # columns at which a row wins
        if not bool(segment.real.any()):
            return Selection.of_layers(context.layers, kept)
        scores, row_scores = context.learned_scores()
        for row in range(len(kept)):
            real = segment.real[row]
            tokens = segment.tokens(row)
            slots = max(self._spent(segment, row, len(tokens), scores), segment.least[row])
            if slots >= len(tokens):
                kept[row] = real
                continue
            of_rows = None if row_scores is None else row_scores[row].masked_fill(~real, -1.0)
            kept[row], made[row] = compete(
                scores[row].masked_fill(~real, -1.0),
                of_rows,
                slots,
                verbatim=self.verbatim,
                shared_heads=segment.shared_heads,
            )
        if bool(made.any()):
            return _with_rows(context, kept, made)
        chosen = Selection.of_layers(context.layers, kept)
        if row_scores is not None or self.verbatim == 1:
            return chosen
        return replace(chosen, rewrite=partial(matched, context, segment, chosen.kept))

    def _spent(self, segment: Segment, row: int, tokens: int, scores: Float[Tensor, "B L H S"]) -> int:
        """Count the slots of one segment: a quiet one leaves some of its share to later ones, a rich one takes them."""
        if self.slots is not None:
            return min(self.slots, tokens)
        most = segment.slots[row]
        if self.keep is None:
            return most
        of_row = scores[row][..., segment.real[row]]
        # A score is a rank among all slots of training: the slots above 1 - keep are its best share.
        salient = -(-int((of_row >= 1 - self.keep).sum()) // (segment.layers * segment.heads))
        return min(most, max(salient, int(self.keep * tokens * LEAST), most - int(self.keep * SAVED)))


def compete(
    slot_scores: Float[Tensor, "L H S"],
    row_scores: Float[Tensor, "L H S"] | None,
    slots: int,
    *,
    verbatim: float | None = None,
    shared_heads: bool = False,
) -> tuple[Bool[Tensor, "L H S"], Bool[Tensor, "L H S"]]:
    """Choose the best `slots` a head on average among tokens' slots and rows at tokens; mark both kinds.

    Rows run at `slots` tokens at most: those where a row scores best in any head. At a token a head keeps its slot or
    its row, whichever scores more: an untrained row is that slot again, and a second copy would push out another token.
    A share `verbatim` settles how many slots each kind has, and may keep both.
    """
    nothing = torch.zeros_like(slot_scores, dtype=torch.bool)
    if not slots:
        return nothing, nothing
    words = slots if row_scores is None else _words(slots, verbatim)
    if words == slots or row_scores is None:
        return top_slots(slot_scores, slots, shared_heads=shared_heads), nothing
    runs = row_places(row_scores, slots)
    row_scores = row_scores.masked_fill(~runs, -torch.inf)
    if words is None:
        wins = row_scores > slot_scores
        best = top_slots(torch.maximum(slot_scores, row_scores), slots, shared_heads=shared_heads)
        return best & ~wins, best & wins
    kept = top_slots(slot_scores, words, shared_heads=shared_heads) if words else nothing
    return kept, top_slots(row_scores, slots - words, shared_heads=shared_heads)


def row_places(row_scores: Float[Tensor, "L H S"], slots: int) -> Bool[Tensor, " S"]:
    """Mark the `slots` tokens at which rows run: those where a row scores best in any layer and head."""
    best = row_scores.amax(dim=(0, 1))
    runs = torch.zeros_like(best, dtype=torch.bool)
    runs[best.topk(min(slots, len(best))).indices] = True
    return runs


def _words(slots: int, verbatim: float | None) -> int | None:
    """Count the slots that a fixed share keeps word for word; None: there is no fixed share."""
    return None if verbatim is None else round(slots * verbatim)


def _with_rows(
    context: FoldContext,
    kept: Bool[Tensor, "B L H S"],
    made: Bool[Tensor, "B L H S"],
) -> Selection:
    """Run the rows that won in some head, and keep each where it did."""
    placed: list[list[Row]] = []
    for of_row in made.any(dim=1).any(dim=1):
        columns = of_row.nonzero().flatten().tolist()
        placed.append([(0, 0, column + 1, column) for column in columns])
    by_layer = Selection.of_layers(context.layers, kept).kept
    if not any(placed):
        return Selection(kept=by_layer)
    rows = Rows.at(context.segment, placed, ids=context.token_ids(), ahead=True)
    slots = context.run(rows)
    columns = (rows.stop - 1).clamp(min=0)  # B K: where each row stands
    won = {}
    for at, layer in enumerate(context.layers):
        of_layer = made[:, at]  # B H S
        index = columns[:, None].expand(-1, of_layer.shape[1], -1)
        won[layer] = of_layer.gather(2, index) & rows.real[:, None]
    return Selection(kept=by_layer, made=slots, made_kept=won)
