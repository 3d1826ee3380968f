"""A folded conversation as one parallel pass: its tokens, then the Nexus rows of all segments, and who sees whom.

What a turn-by-turn run does with a cache is done here in one forward by a mask: a token sees the sinks, its own
segment, what earlier segments kept word for word, and their Nexus rows; a Nexus row sees what its pass would show it.
Places of rows come from the method itself (select/sonic.py), so training and use cannot differ.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.select.sonic import spread

NONE = -1  # no segment: a pad


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """One conversation: its tokens, how much each counts in the loss, and where its segments end."""

    ids: Sequence[int]
    weights: Sequence[float]
    ends: Sequence[int]  # after the last one comes the open segment, which is never folded


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Rows of a parallel pass, padded on the right. Queries and keys are N tokens, then K Nexus rows."""

    ids: Int[Tensor, "B N"]
    weights: Float[Tensor, "B N"]
    positions: Int[Tensor, "B NK"]
    nexus: Int[Tensor, "B K"]  # which of the adapter's rows
    segment: Int[Tensor, "B NK"]  # NONE for pads
    column: Int[Tensor, "B NK"]  # of a Nexus row: the token that it stands at
    stays: Bool[Tensor, "B NK"]  # tokens that later segments see as they are
    source: str = "talk"
    rung: int = 0

    @property
    def tokens(self) -> int:
        """Rows of the pass, padding counted."""
        return self.segment.numel()

    @property
    def gate(self) -> Float[Tensor, "B NK"]:
        """1 where the adapter acts."""
        gate = torch.zeros(self.segment.shape)
        gate[:, self.ids.shape[1] :] = 1.0
        return gate

    @property
    def folded(self) -> Bool[Tensor, "B N"]:
        """Tokens that are gone once their segment is folded."""
        tokens = self.ids.shape[1]
        last = self.segment[:, :tokens].amax(dim=1, keepdim=True)
        own = self.segment[:, :tokens]
        return (own != NONE) & (own < last) & ~self.stays[:, :tokens]

    def mask(self) -> Bool[Tensor, "B 1 NK NK"]:
        """True where a query (second last dimension) sees a key."""
        tokens, rows = self.ids.shape[1], self.segment.shape[1]
        is_nexus = torch.arange(rows) >= tokens
        asks, seen = self.segment[:, :, None], self.segment[:, None]
        before = self.column[:, None] <= self.column[:, :, None]
        text = before & ((asks == seen) | self.stays[:, None]) & ~is_nexus
        order = torch.arange(rows)
        beside = (asks == seen) & is_nexus[:, None] & (order <= order[:, None])
        learned = ((seen < asks) | beside) & is_nexus
        itself = torch.eye(rows, dtype=torch.bool)
        return ((text | learned) & (seen != NONE) & (asks != NONE) | itself)[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How a conversation's segments are folded in one training step: the budget is drawn anew for each."""

    least: float = 0.05
    most: float = 0.5
    raw: float = 0.03  # chance that a segment stays as it is
    gone: float = 0.03  # chance that nothing stays of it
    sinks: int = 4
    gaps: int = 2000  # longest jump in positions between segments, in a third of the conversations

    def keep(self, rng: random.Random) -> float:
        """A kept fraction, drawn evenly on a log scale."""
        return self.least * (self.most / self.least) ** rng.random()

    def slots(self, rng: random.Random, keep: float, tokens: int) -> int:
        """Slots of one segment of so many tokens: about `keep`, now and then none or all."""
        draw = rng.random()
        if draw < self.gone:
            return 0
        if draw < self.gone + self.raw:
            return tokens
        return min(tokens, max(1, int(keep * rng.uniform(0.5, 1.5) * tokens)))


def lay_out(
    talks: Sequence[Talk], *, draw: Draw, rng: random.Random, pad: int, source: str = "talk",
    slots_of: Callable[[int], int] | None = None,
) -> Layout:  # fmt: skip
    """Conversations side by side, each folded by a budget of its own.

    `slots_of` says instead how many slots a segment of so many tokens has; then positions do not jump either.
    """
    rows = [_row(talk, draw, rng, slots_of) for talk in talks]
    tokens = _round(max(len(talk.ids) for talk in talks))
    slots = _round(max(len(row.nexus) for row in rows))
    wide = (len(talks), tokens + slots)
    ids, weights = torch.full((len(talks), tokens), pad), torch.zeros(len(talks), tokens)
    positions, column = torch.zeros(wide, dtype=torch.long), torch.zeros(wide, dtype=torch.long)
    segment, stays = torch.full(wide, NONE), torch.zeros(wide, dtype=torch.bool)
    nexus = torch.zeros(len(talks), slots, dtype=torch.long)
    for index, (talk, row) in enumerate(zip(talks, rows, strict=True)):
        count, more = len(talk.ids), len(row.nexus)
        ids[index, :count], weights[index, :count] = torch.tensor(talk.ids), torch.tensor(talk.weights)
        at = torch.tensor(row.at, dtype=torch.long)
        nexus[index, :more] = torch.tensor(row.nexus, dtype=torch.long)
        for table, own, of_slots in ((positions, row.positions, row.positions[at]), (segment, row.segment, row.of)):
            table[index, :count], table[index, tokens : tokens + more] = own, of_slots
        column[index, :count], column[index, tokens : tokens + more] = torch.arange(count), at
        stays[index, :count] = row.stays
    return Layout(ids=ids, weights=weights, positions=positions, nexus=nexus, segment=segment, column=column,
                  stays=stays, source=source)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    positions: Tensor
    segment: Tensor
    stays: Tensor
    nexus: Sequence[int]
    at: Sequence[int]
    of: Tensor  # segments of the Nexus rows


def _row(talk: Talk, draw: Draw, rng: random.Random, slots_of: Callable[[int], int] | None) -> _Row:
    count = len(talk.ids)
    positions, segment = torch.arange(count), torch.zeros(count, dtype=torch.long)
    stays = torch.arange(count) < draw.sinks
    jumps = slots_of is None and rng.random() < 1 / 3
    nexus, at, of = [], [], []
    usual = draw.keep(rng)
    begun = min(draw.sinks, count)
    for number, end in enumerate(talk.ends):
        segment[end:] = number + 1
        length = max(end - begun, 0)
        slots = draw.slots(rng, usual, length) if slots_of is None else slots_of(length)
        if slots >= length:
            stays[begun:end] = True
        else:
            for own, token in spread(length, slots):
                nexus.append(own)
                at.append(begun + token)
                of.append(number)
        if jumps and rng.random() < 0.15:
            positions[end:] += int(draw.gaps ** rng.random())
        begun = max(end, begun)
    return _Row(positions=positions, segment=segment, stays=stays, nexus=nexus, at=at, of=torch.tensor(of).long())


def _round(count: int) -> int:
    """Up to a multiple of 32, so that buffers are used again."""
    return max(32, (count + 31) // 32 * 32)
