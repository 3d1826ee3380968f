"""Mean pool: stretches of each segment become the means of their keys and values. A control: what learning must beat.

As compressive memories without training do, Rae et al., Compressive Transformers, https://arxiv.org/abs/1911.05507
Ours differs: keys are averaged as they are scored, after their rotation; each segment is pooled once.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvfold.memory.request import Pass, Row, Segment
from kvfold.select.base import ByPass, stretches


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanPool(ByPass):
    """Slots that are means of neighbouring tokens."""

    paper: ClassVar[str | None] = "https://arxiv.org/abs/1911.05507"

    def request(self, segment: Segment) -> Pass:
        """Stretches of equal length, each with a slot at its last token; a segment that fits stays as it is."""
        kept = segment.nothing_kept()
        placed: list[list[Row]] = []
        for row, slots in enumerate(segment.slots):
            tokens = segment.tokens(row)
            if slots >= len(tokens):
                kept[row] = segment.real[row]
                placed.append([])
                continue
            ends = stretches(len(tokens), slots)
            begins = [0, *(end + 1 for end in ends)]
            placed.append([(0, tokens[start], tokens[end] + 1, tokens[end])
                           for start, end in zip(begins, ends, strict=False)])  # fmt: skip
        return Pass.of(segment, kept, placed, pooled=True)
