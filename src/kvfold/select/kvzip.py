"""KVzip: keep what the model looks at while it repeats the text.

Kim et al., KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, https://arxiv.org/abs/2505.23416
As in the paper, all layers and heads share one budget: a head that is looked at more keeps more.
Ours differs: the segment is repeated without a sentence that asks for it, so that no tokenizer is needed; each segment
is scored once, when it is folded, from what is held then, and the newest token stays.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfold.memory.kv import Needs
from kvfold.memory.request import Pass, Segment
from kvfold.select.base import ByPass, most_worth


@dataclass(frozen=True, slots=True, kw_only=True)
class KVzip(ByPass):
    """The slots with the most attention from any token of the repetition. Costs about a second prefill."""

    paper: ClassVar[str | None] = "https://arxiv.org/abs/2505.23416"

    @property
    def needs(self) -> Needs:
        """The most attention that each slot gets while its segment is repeated."""
        return Needs(text=True, repetition=True)

    def request(self, segment: Segment) -> Pass:
        """The newest slots, then those that the repetition looked at most; a segment that fits stays as it is."""
        kept = segment.nothing_kept()
        for row, slots in enumerate(segment.slots):
            tokens = segment.tokens(row)
            if slots >= len(tokens):
                kept[row] = segment.real[row]
            elif slots:
                assert segment.worth is not None, "a segment is repeated before it is judged"
                worth = segment.worth[row].masked_fill(~segment.real[row], -1.0)
                worth[..., tokens[-1]] = torch.inf
                kept[row] = most_worth(worth, slots, together=segment.together)
        return Pass.of(segment, kept)
