"""A folded conversation as one parallel pass: its tokens, then the Nexus rows of all segments, and who sees whom.

First talks are lined up side by side (Lined: what the teacher reads); then, knowing what each token is worth, they
are folded (Layout: what the student reads).

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

from kvfold.select.base import top_slots
from kvfold.select.sonic import spread

NONE = -1  # no segment: a pad


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """One conversation: its tokens, how much each counts in the loss, and where its segments end."""

    ids: Sequence[int]
    weights: Sequence[float]
    ends: Sequence[int]  # after the last one comes the open segment, which is never folded


@dataclass(frozen=True, slots=True, kw_only=True)
class Lined:
    """Talks side by side, padded on the right; N tokens."""

    talks: Sequence[Talk]
    ids: Int[Tensor, "B N"]
    weights: Float[Tensor, "B N"]
    positions: Int[Tensor, "B N"]
    segment: Int[Tensor, "B N"]  # NONE for pads
    sinks: int
    source: str = "talk"
    rung: int = 0

    @property
    def tokens(self) -> int:
        """Tokens, padding counted."""
        return self.ids.numel()

    @property
    def pinned(self) -> Bool[Tensor, "B N"]:
        """The first tokens, which are never folded."""
        return (torch.arange(self.ids.shape[1]) < self.sinks) & (self.segment != NONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Rows of a parallel pass, padded on the right. Queries and keys are N tokens, then K Nexus rows."""

    count: int  # N
    positions: Int[Tensor, "B NK"]
    nexus: Int[Tensor, "B K"]  # which of the adapter's rows
    segment: Int[Tensor, "B NK"]  # NONE for pads
    column: Int[Tensor, "B NK"]  # of a Nexus row: the token that it stands at
    stays: Bool[Tensor, "B L H N"]  # slots that later segments see as they are, by folding layer and head

    @property
    def folded(self) -> Bool[Tensor, "B L H N"]:
        """Slots that are gone once their segment is folded."""
        own = self.segment[:, : self.count]
        last = own.amax(dim=1, keepdim=True)
        return ((own != NONE) & (own < last))[:, None, None] & ~self.stays

    def masks(self, layers: Sequence[int]) -> dict[int, Bool[Tensor, "B H NK NK"]]:
        """For each folding layer, True where a query (second last dimension) sees a key."""
        tokens, is_nexus = self.count, self._is_nexus
        asks, seen = self.segment[:, :, None], self.segment[:, None]
        before, real = self.column[:, None] <= self.column[:, :, None], (seen != NONE) & (asks != NONE)
        always = ((before & (asks == seen) & ~is_nexus) | (self._beside | (seen < asks)) & is_nexus) & real
        always = (always | torch.eye(len(is_nexus), dtype=torch.bool))[:, None]
        later = (before & real)[:, None, :, :tokens]
        masks = []
        for stays in self.stays.unbind(dim=1):
            mask = always.repeat(1, stays.shape[1], 1, 1)
            mask[..., :tokens] |= later & stays[:, :, None]
            masks.append(mask)
        return dict(zip(layers, masks * (1 if len(masks) == len(layers) else len(layers)), strict=True))

    def window_mask(self, window: int) -> Bool[Tensor, "B 1 NK NK"]:
        """The same for a sliding layer, where all is raw: a Nexus row sees the window as its segment's end left it."""
        is_nexus, asks, seen = self._is_nexus, self.segment[:, :, None], self.segment[:, None]
        own = self.column[:, :, None]
        said = (seen <= asks) & (seen != NONE) & ~is_nexus
        ends = torch.where(said, self.column[:, None], NONE).amax(dim=2)[..., None]
        last = torch.where(is_nexus[:, None], ends, own)
        room = torch.where(is_nexus, window - 1, window)[:, None]
        text = (self.column[:, None] <= last) & (self.column[:, None] > last - room) & ~is_nexus
        mask = (text | self._beside) & (seen != NONE) & (asks != NONE)
        return (mask | torch.eye(len(is_nexus), dtype=torch.bool))[:, None]

    @property
    def _is_nexus(self) -> Bool[Tensor, " NK"]:
        return torch.arange(self.segment.shape[1]) >= self.count

    @property
    def _beside(self) -> Bool[Tensor, "B NK NK"]:
        """Nexus rows and those of the same segment that stand before them."""
        order = torch.arange(self.segment.shape[1])
        both = self._is_nexus & self._is_nexus[:, None] & (order <= order[:, None])
        return both & (self.segment[:, :, None] == self.segment[:, None])


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How a conversation's segments are folded in one training step: the budget is drawn anew for each."""

    least: float = 0.05
    most: float = 0.5
    raw: float = 0.03  # chance that a segment stays as it is
    gone: float = 0.03  # chance that nothing stays of it
    verbatim: tuple[float, ...] = (0.0, 0.5, 0.5, 0.75)  # shares of word-for-word tokens, one a conversation
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """How every segment is folded alike, for checks."""

    slots_of: Callable[[int], int]  # tokens of a segment -> its slots
    verbatim: float = 0.0


def line_up(talks: Sequence[Talk], *, draw: Draw, rng: random.Random, pad: int, source: str = "talk",
            jump: bool = True) -> Lined:  # fmt: skip
    """Talks side by side; in a third of them positions jump between segments."""
    tokens = _round(max(len(talk.ids) for talk in talks))
    ids, weights = torch.full((len(talks), tokens), pad), torch.zeros(len(talks), tokens)
    positions, segment = torch.zeros_like(ids), torch.full_like(ids, NONE)
    for index, talk in enumerate(talks):
        count = len(talk.ids)
        ids[index, :count], weights[index, :count] = torch.tensor(talk.ids), torch.tensor(talk.weights)
        positions[index, :count], segment[index, :count] = torch.arange(count), 0
        jumps = jump and rng.random() < 1 / 3
        for number, end in enumerate(talk.ends):
            segment[index, end:count] = number + 1
            if jumps and rng.random() < 0.15:
                positions[index, end:count] += int(draw.gaps ** rng.random())
    return Lined(talks=talks, ids=ids, weights=weights, positions=positions, segment=segment, sinks=draw.sinks,
                 source=source)  # fmt: skip


def fold_up(lined: Lined, worth: Float[Tensor, "B L H N"] | None, *, how: Draw | Fixed, rng: random.Random) -> Layout:
    """The parallel pass of lined-up talks, folded by budgets that are drawn, or that are given."""
    layers, heads = (1, 1) if worth is None else worth.shape[1:3]
    stays = lined.pinned[:, None, None].repeat(1, layers, heads, 1)
    rows = [_fold_row(lined, row, worth, how, rng, stays[row]) for row in range(len(lined.talks))]
    tokens, slots = lined.ids.shape[1], _round(max(len(row) for row in rows))
    wide = (len(rows), tokens + slots)
    positions, column, segment = torch.zeros(wide).long(), torch.zeros(wide).long(), torch.full(wide, NONE)
    nexus = torch.zeros(len(rows), slots).long()
    positions[:, :tokens], segment[:, :tokens] = lined.positions, lined.segment
    column[:, :tokens] = torch.arange(tokens)
    for index, row in enumerate(rows):
        own = slice(tokens, tokens + len(row))
        nexus[index, : len(row)] = torch.tensor([adapter_row for adapter_row, _ in row]).long()
        at = torch.tensor([token for _, token in row]).long()
        positions[index, own], column[index, own] = lined.positions[index, at], at
        segment[index, own] = lined.segment[index, at]
    return Layout(count=tokens, positions=positions, nexus=nexus, segment=segment, column=column, stays=stays)


def _fold_row(lined: Lined, row: int, worth: Tensor | None, how: Draw | Fixed, rng: random.Random,
              stays: Tensor) -> list[tuple[int, int]]:  # fmt: skip
    """(adapter row, token) of a talk's Nexus rows; marks in `stays` what is kept word for word."""
    drawn = isinstance(how, Draw)
    usual, share = (how.keep(rng), rng.choice(how.verbatim)) if drawn else (0.0, how.verbatim)
    places, begun = [], lined.sinks
    for end in lined.talks[row].ends:
        length = max(end - begun, 0)
        slots = how.slots(rng, usual, length) if drawn else how.slots_of(length)
        if slots >= length:
            stays[..., begun:end] = True
        else:
            words = 0 if worth is None else round(slots * share)
            if words and worth is not None:
                stays[..., begun:end] = top_slots(worth[row, ..., begun:end], words)
            places += [(own, begun + token) for own, token in spread(length, slots - words)]
        begun = max(end, begun)
    return places


def _round(count: int) -> int:
    """Up to a multiple of 32, so that buffers are used again."""
    return max(32, (count + 31) // 32 * 32)
