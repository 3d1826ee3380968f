"""Index: what the device knows of far slots: where each sentence begins, how long it is, and what its keys are like.

A lane is a row and head. Sentences are entries [lanes, M]; entries of size 0 fill up lanes that have fewer. A summary
is one or two centres and, in some forms, a spread; a query's score for a sentence is q . centre + |q| . spread. Also
here: which tokens a budget takes, whole sentences in order of score. It does not know where the slots lie.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
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
    centres: Float[Tensor, "L M C D"] | None
    spreads: Float[Tensor, "L M C D"] | None
    closed: tuple[int, ...]  # slots of each lane that are in finished sentences

    @classmethod
    def empty(cls, lanes: int, device: torch.device) -> "Index":
        """No sentences."""
        none = torch.zeros(lanes, 0, dtype=torch.int32, device=device)
        return cls(starts=none, sizes=none.clone(), centres=None, spreads=None, closed=(0,) * lanes)

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
        return Index(
            starts=torch.cat([self.starts, starts], dim=1),
            sizes=torch.cat([self.sizes, sizes], dim=1),
            centres=_behind(self.centres, summary.centres, there, len(lengths)),
            spreads=None if summary.spreads is None else _behind(self.spreads, summary.spreads, there, len(lengths)),
            closed=tuple(held + sum(own) for held, own in zip(self.closed, lengths, strict=True)),
        )

    def scores(self, queries: Float[Tensor, "L K D"], *, scale: float) -> Float[Tensor, "L K M"]:
        """Each query's score for each sentence, the better of its centres; float32."""
        assert self.centres is not None, "an index without sentences has no scores"
        lanes, sentences, centres, size = self.centres.shape
        wide = queries.to(self.centres.dtype)
        scores = wide @ self.centres.reshape(lanes, -1, size).mT
        if self.spreads is not None:
            scores = torch.baddbmm(scores, wide.abs(), self.spreads.reshape(lanes, -1, size).mT)
        best = scores.unflatten(2, (sentences, centres)).amax(dim=3) if centres > 1 else scores
        return best.float() * scale

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor held, by name."""
        yield from (("starts", self.starts), ("sizes", self.sizes))
        if self.centres is not None:
            yield "centres", self.centres
        if self.spreads is not None:
            yield "spreads", self.spreads

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


def _behind(held: Tensor | None, flat: Tensor, there: Tensor | None, lanes: int) -> Tensor:
    """Entries [lanes, M, ...] with new ones, given lane after lane, behind them."""
    if there is None:
        new = flat.view(lanes, -1, *flat.shape[1:])
    else:
        new = flat.new_zeros(*there.shape, *flat.shape[1:])
        new[there] = flat
    return new.clone() if held is None else torch.cat([held, new], dim=1)
