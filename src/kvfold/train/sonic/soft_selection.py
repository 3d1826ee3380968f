"""Selection in a parallel pass: how much of each slot and Nexus row later segments see, soft to learn, hard to check.

In use the best slots and rows of a budget stay and the rest goes, which has no gradient. Soft, one of an earlier
segment is attended as if less of it were there: its attention score is lowered by the logarithm of a logistic of how
far its score is above the budget's threshold, with noise, sharper as training goes on. Maddison et al., The Concrete
Distribution, https://arxiv.org/abs/1611.00712
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from kvfold.select.sonic import compete, row_places
from kvfold.train.sonic.budgets import Budgets
from kvfold.train.sonic.parallel_masks import Layout
from kvfold.train.sonic.talk_batch import TalkBatch

GONE = -14.0  # logarithm of the least weight
_WIDE, _SHARP = 0.1, 0.025  # width of the logistic at the start and at the end, in units of the score
_NOISE = 0.5  # of standard logistic noise, in widths
_EDGE = 1e-4  # of the even numbers that the noise is made of, whose logit is infinite at 0 and 1

# Scores of a segment's slots [L H S] and of rows at its tokens [L H S], -inf where none runs, and how many stay ->
# logarithms of the weights of both.
Choice: TypeAlias = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class FoldedSegment:
    """A segment of a talk, from one token up to another, and the slots that its budget leaves."""

    begun: int
    end: int
    slots: int

    @property
    def shrinks(self) -> bool:
        """Tell whether anything is chosen: it may stay as it is."""
        return self.slots < self.end - self.begun


def folded_segments(batch: TalkBatch, budgets: Budgets, rng: random.Random) -> list[list[FoldedSegment]]:
    """Draw a budget for each talk, and say what it leaves of every segment."""
    found = []
    for talk in batch.talks:
        slots_of = budgets.of_talk(rng).slots_of
        segments = []
        begun = batch.sinks
        for end in talk.ends:
            if end > begun:
                segments.append(FoldedSegment(begun, end, min(slots_of(end - begun), end - begun)))
            begun = max(end, begun)
        found.append(segments)
    return found


def places_of_rows(
    row_scores: Float[Tensor, "B L H N"],
    folded: Sequence[Sequence[FoldedSegment]],
) -> list[list[int]]:
    """List the tokens of each talk at which rows run, as a fold would choose them."""
    found = []
    for scores, segments in zip(row_scores.detach(), folded, strict=True):
        places: list[int] = []
        for one in segments:
            if one.shrinks and one.slots:
                runs = row_places(scores[..., one.begun : one.end], one.slots)
                places += (runs.nonzero().flatten() + one.begun).tolist()
        found.append(places)
    return found


def log_weights(
    layout: Layout,
    scores: Float[Tensor, "kinds B L H N"],
    folded: Sequence[Sequence[FoldedSegment]],
    choice: Choice,
) -> Float[Tensor, "B L H all_rows"]:
    """Logarithms of the weights of all slots and rows. Tokens of the open segment and the sinks weigh 1."""
    slot_scores, row_scores = scores
    size = layout.segment.shape[1]
    logs = slot_scores.new_zeros(*slot_scores.shape[:-1], size)
    for row, segments in enumerate(folded):
        columns = layout.column[row, layout.count :]
        for one in segments:
            if not one.shrinks:
                continue
            span = slice(one.begun, one.end)
            of_segment = (columns >= one.begun) & (columns < one.end)
            rows = of_segment.nonzero().flatten()  # pads stand at column 0, which is a sink
            places = columns[rows] - one.begun
            of_rows = torch.full_like(slot_scores[row, ..., span], -torch.inf)
            of_rows = of_rows.index_copy(-1, places, row_scores[row, ..., columns[rows]])
            of_slots, weights = choice(slot_scores[row, ..., span], of_rows, one.slots)
            logs[row, ..., span] = of_slots
            logs[row, ..., rows + layout.count] = weights[..., places]
    return logs


class SoftChoice:
    """A choice with a gradient; `done` is the share of the training that is done, 0 to 1.

    `as_used` passes on the choice of use, with the gradient of the soft one: what is trained is what will be kept.
    Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, https://arxiv.org/abs/1308.3432
    """

    def __init__(self, rng: random.Random, *, done: float, as_used: bool = False) -> None:
        self.as_used = as_used
        self.width = _WIDE * (_SHARP / _WIDE) ** done
        self.source = torch.Generator().manual_seed(rng.getrandbits(48))

    def __call__(
        self,
        slot_scores: Float[Tensor, "L H S"],
        row_scores: Float[Tensor, "L H S"],
        slots: int,
    ) -> tuple[Float[Tensor, "L H S"], Float[Tensor, "L H S"]]:
        """Weigh slots and rows of one segment, which share one budget over layers and heads.

        A token stays by the better one of its two scores, and its slot and its row share the weight that it has.
        """
        if not slots:
            gone = torch.full_like(slot_scores, GONE)
            return gone, gone
        heads = slot_scores.shape[0] * slot_scores.shape[1]
        above = self._above(torch.maximum(slot_scores, row_scores), slots * heads)
        ahead = (row_scores - slot_scores) / self.width
        stays = logsigmoid(above)
        weights = ((stays + logsigmoid(one)).clamp(min=GONE) for one in (-ahead, ahead))
        of_slots, of_rows = weights
        if self.as_used:
            of_slots = _as_used(of_slots, (above >= 0) & (ahead <= 0))
            of_rows = _as_used(of_rows, (above >= 0) & (ahead > 0))
        return of_slots, of_rows

    def _above(self, scores: Tensor, stay: int) -> Tensor:
        """Measure how far scores are above the threshold of a budget, in widths, with noise."""
        every = scores.detach().flatten()
        gone = len(every) - stay
        below = every.kthvalue(gone).values
        above = every.kthvalue(gone + 1).values
        threshold = (below + above) / 2
        even = torch.rand(scores.shape, generator=self.source).clamp(_EDGE, 1 - _EDGE)
        noise = _NOISE * even.to(scores.device).logit()
        return (scores - threshold) / self.width + noise


def _as_used(soft: Tensor, kept: Tensor) -> Tensor:
    """Give the logarithms of the choice of use, with the gradient of soft weights."""
    used = torch.full_like(soft, GONE).masked_fill(kept, 0.0).detach()
    weight = soft.exp()
    # A logarithm has next to no gradient where the weight is next to nothing: what is gone must be able to return.
    return used + (weight - weight.detach()) / used.exp()


class HardChoice:
    """The choice of use: what does not stay is gone. It counts how many of what stayed were rows."""

    def __init__(self, *, verbatim: float | None = None) -> None:
        self.verbatim = verbatim
        self.kept = self.rows = 0

    def __call__(
        self,
        slot_scores: Float[Tensor, "L H S"],
        row_scores: Float[Tensor, "L H S"],
        slots: int,
    ) -> tuple[Float[Tensor, "L H S"], Float[Tensor, "L H S"]]:
        """Keep the best slots and rows of one segment."""
        kept, made = compete(slot_scores, row_scores, slots, verbatim=self.verbatim)
        self.kept += int(kept.sum()) + int(made.sum())
        self.rows += int(made.sum())
        return _logs(kept, slot_scores), _logs(made, row_scores)


def _logs(kept: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(like.shape, device=like.device).masked_fill(~kept, -torch.inf)
