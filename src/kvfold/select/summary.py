"""Summary: each segment becomes its most informative tokens, read anew as text. A control: what learning must beat.

Li et al., Compressing Context to Enhance Inference Efficiency of Large Language Models (Selective Context),
https://arxiv.org/abs/2310.06201. The chosen tokens run through the model once more, without the segment in sight, so
nothing of it is left but what they say.
Ours differs: rarity in the tokenizer's order stands for self-information, so that no second model is needed.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvfold.memory.kv import Needs
from kvfold.memory.request import Pass, Row, Segment
from kvfold.select.base import ByPass


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary(ByPass):
    """Slots of the rarest tokens, in their order."""

    paper: ClassVar[str | None] = "https://arxiv.org/abs/2310.06201"

    @property
    def needs(self) -> Needs:
        """The text itself."""
        return Needs(text=True)

    def request(self, segment: Segment) -> Pass:
        """Tokens of the highest ids: a tokenizer learns frequent pieces first. A segment that fits stays as it is."""
        kept = segment.nothing_kept()
        assert segment.ids is not None, "a method that needs text is given it"
        placed: list[list[Row]] = []
        for row, slots in enumerate(segment.slots):
            tokens, ids = segment.tokens(row), segment.ids[row].tolist()
            if slots >= len(tokens):
                kept[row] = segment.real[row]
                placed.append([])
                continue
            rarest = sorted(tokens, key=lambda column: -ids[column])[:slots]
            placed.append([(0, 0, 0, column) for column in sorted(rarest)])
        return Pass.of(segment, kept, placed, of_text=True)
