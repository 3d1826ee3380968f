"""Index: what the device knows of far slots: where each sentence begins, how long it is, and what its keys are like.

A lane is a row and head. Sentences are entries [lanes, M]; entries of size 0 fill up lanes that have fewer. A summary
is one or two centres and, in some forms, a spread; a query's score for a sentence is q . centre + |q| . spread. They
are kept in bfloat16 as differences to a lane's usual ones, which moves all scores of a query alike. Also here: which
tokens a budget takes, whole sentences in order of score. It does not know where the slots lie.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the keys of some sentences are like, sentence after sentence."""

    centres: Float[Tensor, "M C D"]
    spreads: Float[Tensor, "M C D"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Sentences of every lane that are finished; a value, like the part that it belongs to."""

    starts: Int[Tensor, "L M"]  # int32
    sizes: Int[Tensor, "L M"]  # int32; 0 where there is no sentence
    centres: Float[Tensor, "L M C D"] | None  # bfloat16, less the lane's usual one
    spreads: Float[Tensor, "L M C D"] | None
    usual: Float[Tensor, "L 2 D"] | None  # float32: the mean centre and spread of a lane's first sentences
    closed: tuple[int, ...]  # slots of each lane that are in finished sentences
    ragged: bool = False  # whether there are entries of size 0

    @classmethod
    def empty(cls, lanes: int, device: torch.device, usual: Tensor | None = None) -> "Index":
        """No sentences; `usual` where those that come are to be kept as they were in another index."""
        none = torch.zeros(lanes, 0, dtype=torch.int32, device=device)
        return cls(starts=none, sizes=none.clone(), centres=None, spreads=None, usual=usual, closed=(0,) * lanes)

    def extend(self, lengths: Sequence[Sequence[int]], summary: Summary) -> "Index":
        """The index with sentences of these lengths behind each lane's, summarised lane after lane."""
        most = max(map(len, lengths))
        if most == 0:
            return self
        device = self.starts.device
        sizes = torch.tensor([[*own, *[0] * (most - len(own))] for own in lengths], dtype=torch.int32, device=device)
        closed = torch.tensor(self.closed, dtype=torch.int32, device=device)[:, None]
        starts = closed + sizes.cumsum(dim=1, dtype=torch.int32) - sizes
        there = None if all(len(own) == most for own in lengths) else sizes > 0
        centres = _by_lane(summary.centres, there, len(lengths))
        spreads = None if summary.spreads is None else _by_lane(summary.spreads, there, len(lengths))
        usual = self.usual
        if usual is None:
            number = (sizes > 0).sum(dim=1).clamp(min=1)[:, None]
            sides = (centres, centres.new_zeros(()).expand_as(centres) if spreads is None else spreads)
            usual = torch.stack([side.mean(dim=2).sum(dim=1) / number for side in sides], dim=1)
        return Index(
            starts=torch.cat([self.starts, starts], dim=1),
            sizes=torch.cat([self.sizes, sizes], dim=1),
            centres=_behind(self.centres, centres, usual[:, 0]),
            spreads=None if spreads is None else _behind(self.spreads, spreads, usual[:, 1]),
            usual=usual,
            closed=tuple(held + sum(own) for held, own in zip(self.closed, lengths, strict=True)),
            ragged=self.ragged or there is not None,
        )

    def scores(self, queries: Float[Tensor, "L K D"], *, scale: float) -> Float[Tensor, "L K M"]:
        """Each query's score for each sentence, the better of its centres; float32, up to a number a query."""
        assert self.centres is not None, "an index without sentences has no scores"
        lanes, sentences, centres, size = self.centres.shape
        wide = queries.to(self.centres.dtype)
        scores = wide @ self.centres.reshape(lanes, -1, size).mT
        if self.spreads is not None:
            scores = torch.baddbmm(scores, wide.abs(), self.spreads.reshape(lanes, -1, size).mT)
        best = scores.unflatten(2, (sentences, centres)).amax(dim=3) if centres > 1 else scores
        return best.float() * scale

    def begun(self, selected: Int[Tensor, "L budget"], *, stored: int) -> Bool[Tensor, "L M"]:
        """Which sentences have their first slot among the selected ones; -1 is no slot."""
        table = torch.zeros(selected.shape[0], stored + 1, dtype=torch.bool, device=selected.device)
        table.scatter_(1, selected.masked_fill(selected < 0, stored).long().clamp(max=stored), True)
        return table[:, :stored].gather(1, self.starts.long().clamp(max=stored - 1))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor held, by name."""
        yield from (("starts", self.starts), ("sizes", self.sizes))
        if self.centres is not None:
            yield "centres", self.centres
        if self.spreads is not None:
            yield "spreads", self.spreads
        if self.usual is not None:
            yield "usual", self.usual

    def lanes(self, chosen: Sequence[int]) -> "Index":
        """The index with these lanes, in this order."""
        where = torch.tensor(list(chosen), device=self.starts.device)
        cut = {name: tensor[where] for name, tensor in self.tensors()}
        return replace(self, **cut, closed=tuple(self.closed[lane] for lane in chosen))


def take(index: Index, scores: Float[Tensor, "L M"] | None, *, counts: Sequence[int], budgets: Sequence[int],
         newest: Sequence[int]) -> Int[Tensor, "L budget"]:  # fmt: skip
    """Exactly `budgets[lane]` slots of each lane: its `newest`, then whole sentences in order of score, the last one
    as far as it fits. -1 fills up lanes with smaller budgets. Without scores the newest sentences come first."""
    device = index.starts.device
    first, free = [], []
    for count, budget, fresh in zip(counts, budgets, newest, strict=True):
        first.append([count - min(fresh, budget), min(fresh, budget)])
        free.append(budget - min(fresh, budget))
    forced = torch.tensor(first, dtype=torch.int32, device=device)
    sizes = (forced[:, :1] - index.starts).clamp(min=0).minimum(index.sizes)  # what is not among the newest anyway
    ranks = index.starts.float() if scores is None else scores
    order = ranks.masked_fill(sizes == 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
    sizes, starts = sizes.gather(1, order), index.starts.gather(1, order)
    before = sizes.cumsum(dim=1) - sizes
    fitting = (torch.tensor(free, device=device)[:, None] - before).clamp(min=0).minimum(sizes)
    begins = torch.cat([forced[:, :1], starts], dim=1).flatten()
    lengths = torch.cat([forced[:, 1:], fitting.to(torch.int32)], dim=1).flatten().long()
    total = sum(budgets)
    offsets = begins - (lengths.cumsum(dim=0) - lengths).to(torch.int32)
    flat = torch.arange(total, dtype=torch.int32, device=device)
    flat = flat + offsets.repeat_interleave(lengths, output_size=total)
    most = max(budgets)
    if min(budgets) == most:
        return flat.view(len(budgets), most)
    room = torch.arange(most, device=device) < torch.tensor(list(budgets), device=device)[:, None]
    return torch.full(room.shape, -1, dtype=torch.int32, device=device).masked_scatter_(room, flat)


def favoured(index: Index, votes: Float[Tensor, "B S"], *, slots: Sequence[int]) -> Bool[Tensor, "L M"]:
    """Sentences with the best votes of any of their slots, until `slots` of each row are taken, the last one whole.

    All heads of a row have the same sentences.
    """
    heads = len(index.starts) // len(votes)
    starts, sizes = (one[::heads].long() for one in (index.starts, index.sizes))
    at = torch.arange(votes.shape[1], device=votes.device).expand_as(votes)
    own = torch.searchsorted((starts + sizes).contiguous(), at.contiguous(), right=True)  # M: in none that is finished
    most = votes.new_full((len(votes), sizes.shape[1] + 1), -1.0).scatter_reduce_(1, own, votes, "amax")[:, :-1]
    order = most.masked_fill(sizes == 0, -1.0).argsort(dim=1, descending=True, stable=True)
    sorted_sizes = sizes.gather(1, order)
    fits = sorted_sizes.cumsum(dim=1) - sorted_sizes < torch.tensor(list(slots), device=votes.device)[:, None]
    chosen = torch.zeros_like(sizes, dtype=torch.bool).scatter_(1, order, fits) & (sizes > 0)
    return chosen.repeat_interleave(heads, dim=0)


def _by_lane(flat: Tensor, there: Tensor | None, lanes: int) -> Tensor:
    """Entries [lanes, M, ...] in float32, given lane after lane; 0 where a lane has fewer."""
    if there is None:
        return flat.float().view(lanes, -1, *flat.shape[1:])
    new = flat.new_zeros(*there.shape, *flat.shape[1:], dtype=torch.float32)
    new[there] = flat.float()
    return new


def _behind(held: Tensor | None, new: Tensor, usual: Tensor) -> Tensor:
    """Entries with new ones behind them, less the usual one of each lane."""
    less = (new - usual[:, None, None]).to(torch.bfloat16)
    return less if held is None else torch.cat([held, less], dim=1)
