"""SONIC: a finished segment becomes a few learned Nexus slots.

Chen et al., SONIC: Segmented Optimized Nexus for Information Compression in Key-Value Caching,
https://arxiv.org/abs/2601.21927
Ours differs: no code is public, so this is our own design from what the paper tells. Nexus rows see one another
causally (all-to-all could not be cached), stand at evenly spread tokens of their segment and see what lies before
them; a share of the budget may keep slots word for word, each layer and head its own, more where more is looked at;
adapters act on Nexus rows only, so the base is untouched.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from kvfold.budget.budget import Budget
from kvfold.errors import BudgetError, PlanError
from kvfold.memory.context import FoldContext, Row, Rows, Segment, Selection
from kvfold.select.base import JointSelect, stretches, top_slots

ROWS = 64  # rows that an adapter knows: of a block of tokens, no more become Nexus slots
BLOCK = 128  # tokens of a segment that share a set of rows
LEAST = 0.6  # share of its part of the budget that a segment spends, however quiet it is
VERBATIM = 1.0  # the share that won (docs/log/sonic.md)
SAVED = 48  # tokens whose share of the budget quiet segments may save for later ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Sonic(JointSelect):
    """Nexus slots in place of each segment, once. Give a budget, or `slots` of every segment."""

    slots: int | None = None  # of each segment, whatever its length
    verbatim: float = VERBATIM  # share of a segment's slots that goes to the most salient ones, word for word
    adapter: str = "shipped"  # or a folder, or a name on the Hub

    names_files: ClassVar[tuple[str, ...]] = ("adapter",)
    paper: ClassVar[str | None] = "https://arxiv.org/abs/2601.21927"

    def __post_init__(self) -> None:
        if not 0 <= self.verbatim <= 1:
            raise PlanError(f"verbatim={self.verbatim} was asked for; it is a share of the slots; give 0 to 1")
        if self.slots is None:
            JointSelect.__post_init__(self)
            return
        self.refuse_budget("slots= says already how much each segment keeps")
        if self.slots < 1:
            raise BudgetError(f"slots={self.slots} was asked for; a folded segment has at least one; give 1 or more")

    @property
    def budget(self) -> Budget | None:
        """What may be kept; None where every segment has the same number of slots."""
        return None if self.slots is not None else Budget(
            fraction=self.keep, tokens=self.tokens, size_bytes=self.max_bytes
        )  # fmt: skip

    @property
    def adapter_source(self) -> str | None:
        """Where the Nexus rows and their updates come from."""
        return self.adapter

    def choose(self, context: FoldContext) -> Selection:
        """Keep the most salient slots, and run evenly spread Nexus rows; a segment that fits stays as it is."""
        segment = context.segment
        scores = context.learned_scores() if bool(segment.real.any()) else None
        kept = segment.nothing_kept()
        placed: list[list[Row]] = []
        for row in range(len(kept)):
            tokens = segment.tokens(row)
            slots = max(self._spent(segment, row, len(tokens), scores), segment.least[row])
            if slots >= len(tokens):
                kept[row] = segment.real[row]
                placed.append([])
                continue
            words = 0 if scores is None else round(slots * self.verbatim)
            if words and scores is not None:
                of_row = scores[row].masked_fill(~segment.real[row], -1.0)
                kept[row] = top_slots(of_row, words, shared_heads=segment.shared_heads)
            places = spread(len(tokens), slots - words)
            placed.append([(number, 0, tokens[at] + 1, tokens[at]) for number, at in places])
        rows = Rows.at(segment, placed)
        made = context.run(rows)
        return Selection(kept=Selection.of_layers(context.layers, kept).kept, made=made, made_real=rows.real)

    def _spent(self, segment: Segment, row: int, tokens: int, scores: Float[Tensor, "B L H S"] | None) -> int:
        """Count the slots of one segment: a quiet one leaves some of its share to later ones, a rich one takes them."""
        if self.slots is not None:
            return min(self.slots, tokens)
        most = segment.slots[row]
        if self.keep is None or scores is None:
            return most
        of_row = scores[row][..., segment.real[row]]
        # A score is a rank among all slots of training: the slots above 1 - keep are its best share.
        salient = -(-int((of_row >= 1 - self.keep).sum()) // (segment.layers * segment.heads))
        return min(most, max(salient, int(self.keep * tokens * LEAST), most - int(self.keep * SAVED)))


def spread(tokens: int, slots: int) -> list[tuple[int, int]]:
    """(adapter row, token) of each Nexus slot of a segment, in order: blocks share it out, the last token has one.

    A slot stands at the last token of the stretch that is its own. Rows are counted anew in every block, so a smaller
    budget uses the first rows. More slots than rows: a block has no more than ROWS, so blocks get shorter.

    >>> spread(6, 2)
    [(0, 2), (1, 5)]
    """
    blocks = max(1, -(-tokens // BLOCK), -(-slots // ROWS)) if slots else 1
    rows = [at - slots * block // blocks for block in range(blocks)
            for at in range(slots * block // blocks, slots * (block + 1) // blocks)]  # fmt: skip
    return list(zip(rows, stretches(tokens, slots), strict=True))
