"""KVzip: keep what the model looks at while it repeats the text.

Kim et al., KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, https://arxiv.org/abs/2505.23416
As in the paper, all layers and heads share one budget: a head that is looked at more keeps more.
Ours differs: the segment is repeated without a sentence that asks for it, so that no tokenizer is needed; each segment
is scored once, when it is folded, from what is held then, and the newest token stays.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvfold.memory.context import FoldContext, Selection
from kvfold.memory.recorders import Recorder, TokenIds
from kvfold.select.base import JointSelect, top_slots_of_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class KVzip(JointSelect):
    """The slots with the most attention from any token of the repetition. Costs about a second prefill."""

    paper: ClassVar[str | None] = "https://arxiv.org/abs/2505.23416"

    @property
    def records(self) -> tuple[Recorder, ...]:
        """Record the ids of the text, which is replayed."""
        return (TokenIds(),)

    def choose(self, context: FoldContext) -> Selection:
        """Keep the newest slots, then those that the replay attended to most; a segment that fits stays as it is."""
        segment = context.segment
        fits = all(slots >= len(segment.tokens(row)) for row, slots in enumerate(segment.slots))
        scores = segment.nothing_kept().float() if fits else context.replay()  # what fits need not be read again
        return Selection.of_layers(context.layers, top_slots_of_rows(segment, scores))
