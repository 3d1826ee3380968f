"""Conversations as one padded batch: token ids, loss weights, positions, and the segment of every token.

In a third of the conversations positions jump between segments, so that distances longer than the text are learnt.
Knows nothing of folding.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int

NONE = -1  # no segment: a pad
REPEATED = "repeat"  # the source of talks that are read twice
_JUMPING_SHARE = 1 / 3  # of the conversations
_JUMP_CHANCE = 0.15  # at the end of each segment of such a conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """One conversation: its tokens, how much each counts in the loss, and where its segments end."""

    ids: Sequence[int]
    weights: Sequence[float]
    ends: Sequence[int]  # after the last one comes the open segment, which is never folded


@dataclass(frozen=True, slots=True, kw_only=True)
class TalkBatch:
    """Conversations padded on the right to N tokens. The teacher reads them like this."""

    talks: Sequence[Talk]
    ids: Int[torch.Tensor, "B N"]
    weights: Float[torch.Tensor, "B N"]
    positions: Int[torch.Tensor, "B N"]
    segment: Int[torch.Tensor, "B N"]  # number of each token's segment; NONE for pads
    sinks: int
    source: str = "talk"
    rung: int = 0

    @property
    def tokens(self) -> int:
        """Tokens, padding counted."""
        return self.ids.numel()

    @property
    def pinned(self) -> Bool[torch.Tensor, "B N"]:
        """True for the first tokens, which are never folded."""
        first = torch.arange(self.ids.shape[1]) < self.sinks
        return first & (self.segment != NONE)


def batch_talks(
    talks: Sequence[Talk],
    *,
    sinks: int,
    longest_jump: int,
    rng: random.Random,
    pad: int,
    source: str = "talk",
) -> TalkBatch:
    """Pad conversations to one length; `longest_jump` bounds the jumps in positions, and 0 means none."""
    width = padded_length(max(len(talk.ids) for talk in talks))
    ids = torch.full((len(talks), width), pad)
    weights = torch.zeros(len(talks), width)
    positions = torch.zeros_like(ids)
    segment = torch.full_like(ids, NONE)
    for row, talk in enumerate(talks):
        count = len(talk.ids)
        ids[row, :count] = torch.tensor(talk.ids)
        weights[row, :count] = torch.tensor(talk.weights)
        positions[row, :count] = torch.arange(count)
        segment[row, :count] = 0
        jumps = longest_jump > 0 and rng.random() < _JUMPING_SHARE
        for number, end in enumerate(talk.ends):
            segment[row, end:count] = number + 1
            if jumps and rng.random() < _JUMP_CHANCE:
                # The exponent is drawn evenly, so short jumps are as frequent as long ones on a log scale.
                positions[row, end:count] += int(longest_jump ** rng.random())
    return TalkBatch(
        talks=talks,
        ids=ids,
        weights=weights,
        positions=positions,
        segment=segment,
        sinks=sinks,
        source=source,
    )


def padded_length(count: int) -> int:
    """Round a length up to a multiple of 32, so that buffers are used again."""
    return max(32, (count + 31) // 32 * 32)
