"""Summary: keep the rarest tokens of each segment, read once more as a short text. A control: learning must beat it.

Li et al., Compressing Context to Enhance Inference Efficiency of Large Language Models (Selective Context),
https://arxiv.org/abs/2310.06201. The chosen tokens run through the model once more, without the segment in sight, so
nothing of it is left but what they say.
Ours differs: rarity in the tokenizer's order stands for self-information, so that no second model is needed.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvfold.memory.context import FoldContext, Row, Rows, Selection, in_all_heads
from kvfold.memory.recorders import Recorder, TokenIds
from kvfold.select.base import JointSelect


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary(JointSelect):
    """Slots of the rarest tokens, in their order."""

    paper: ClassVar[str | None] = "https://arxiv.org/abs/2310.06201"

    @property
    def records(self) -> tuple[Recorder, ...]:
        """Record the ids of the text."""
        return (TokenIds(),)

    def choose(self, context: FoldContext) -> Selection:
        """Read the tokens of the highest ids anew: a tokenizer learns frequent pieces first.

        A segment that fits stays as it is.
        """
        segment, ids = context.segment, context.token_ids()
        kept = segment.nothing_kept()
        placed: list[list[Row]] = []
        for row, slots in enumerate(segment.slots):
            tokens, of_row = segment.tokens(row), ids[row].tolist()
            if slots >= len(tokens):
                kept[row] = segment.real[row]
                placed.append([])
                continue
            rarest = sorted(tokens, key=lambda column: -of_row[column])[:slots]
            placed.append([(0, 0, 0, column) for column in sorted(rarest)])
        rows = Rows.at(segment, placed, ids=ids)
        made = context.run(rows)
        return Selection(
            kept=Selection.of_layers(context.layers, kept).kept, made=made, made_kept=in_all_heads(made, rows.real)
        )
