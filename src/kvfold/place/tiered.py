"""TieredPart: slots that lie in a far tier, an index of their sentences on the device, and the few that are fetched.

Forwards of one token read the fetched slots only; a selection made now and then says which these are. Forwards of
several tokens read everything, streamed through the device in blocks, unless the policy has them choose as well. What
is selected, and when, is the policy's business (place/); how a slot is written is its codec's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NoReturn, Protocol

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from kvfold.attention.merge import merge
from kvfold.attention.partial import Partial, partial
from kvfold.attention.scores import max_attention_scores as attention_peak
from kvfold.errors import CacheError
from kvfold.memory.asking import Asking
from kvfold.memory.kv import KV
from kvfold.memory.pages import Shelf, shelf_of
from kvfold.memory.part import Counts, Part, Placer
from kvfold.memory.store import Tier
from kvfold.memory.votes import POOL, stretched
from kvfold.place.index import Index, Summary, favoured, take
from kvfold.place.working_set import Spent, Working

_BLOCK_SLOTS = 4096  # slots of each lane on the device at a time when everything is read


class Policy(Placer, Protocol):
    """What is selected, when, and where the rest lies; a member of the place axis, opened for one cache."""

    tier: Tier
    reads_all: bool  # forwards of several tokens read everything
    rest: bool  # what is not selected is read as one mean slot
    reuse: bool  # only what is not there is fetched
    stay: float  # what a sentence that is there has ahead of others
    choosing: int  # newest queries that choose by the index, beside the one that asks
    votes: float  # share of the free budget that goes to what a forward of several tokens looked at in any layer
    around: int  # tokens that are wanted on either side of one that was looked at

    def budget(self, stored: int) -> int:
        """Slots that a head may read of `stored`."""
        ...

    def newest(self, stored: int, closed: int) -> int:
        """Newest slots that are always read, when sentences cover the first `closed`."""
        ...

    def cut(self, marks: bytes) -> list[int]:
        """Lengths of the finished sentences of a text that begins with one."""
        ...

    def summarise(self, keys: Float[Tensor, "S D"], lengths: Int[Tensor, " M"]) -> Summary:
        """What the keys of each sentence are like."""
        ...

    def rank(self, index: Index, queries: Float[Tensor, "L K D"], real: Bool[Tensor, "L K"] | None, *,
             scale: float) -> Float[Tensor, "L M"]:  # fmt: skip
        """How much each sentence is wanted by some queries, pads apart."""
        ...

    def due(self, since: Sequence[int], asking: Asking, before: Tensor | None) -> list[bool]:
        """Which rows select anew, `since` tokens after they last did; `before` are their queries of then."""
        ...

    def reach(self, since: Sequence[int]) -> int:
        """New tokens that may be read before the next selection can be due."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """Sums over all slots, float32: what is not selected is their difference to what is."""

    keys: Float[Tensor, "L D"]
    values: Float[Tensor, "L E"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TieredPart(Part):
    """Slots of some rows and heads in a far tier. The store and the working set are shared and change; the rest is a
    value."""

    policy: Policy
    counts: Counts
    shelf: Shelf
    index: Index
    working: Working
    selected: Int[Tensor, "L budget"] | None = None  # None: everything is read
    since: tuple[int, ...] = ()  # of each row, tokens since it selected
    before: Float[Tensor, "L D"] | None = None  # mean query of the last selection
    rest: Rest | None = None
    text: UInt8[Tensor, "B P"] | None = None  # marks by position, of rows whose text is known
    firm: Bool[Tensor, "L M"] | None = None  # sentences that stay selected until the next forward of several tokens

    @classmethod
    def of(cls, fresh: Part, policy: Policy, *, text: Tensor | None = None, spent: Spent | None = None,
           usual: Tensor | None = None) -> "TieredPart":  # fmt: skip
        """A part of these slots, which goes on counting, and indexing, where another left off."""
        lanes = sum(map(len, fresh.counts))
        shelf = shelf_of(fresh, policy.tier)
        device = next(iter(fresh.tensors()))[1].device
        part = cls(
            policy=policy,
            counts=tuple(tuple(0 for _ in row) for row in fresh.counts),
            shelf=shelf,
            index=Index.empty(lanes, device, usual),
            working=Working(spent),
            since=(0,) * len(fresh.counts),
            text=text,
        )
        return part.extend(fresh)

    # What it holds ----------------------------------------------------------------------------------------------

    @property
    def lanes(self) -> tuple[int, ...]:
        """Slots of every row and head."""
        return tuple(count for row in self.counts for count in row)

    def places(self, row: int, head: int) -> Int[Tensor, " S"]:
        """Positions of the slots of one row and head, oldest first."""
        return self.shelf.positions(row * len(self.counts[0]) + head, 0, self.counts[row][head])

    @property
    def traffic(self) -> Mapping[str, float]:
        """The counters of its working set."""
        return self.working.spent.counts()

    @property
    def attended_slots(self) -> int:
        """Slots that a new token reads."""
        return sum(self._budgets())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The far slots, and on the device the index, the working set and what selections leave behind."""
        yield from self.shelf.tensors()
        yield from ((f"index.{name}", tensor) for name, tensor in self.index.tensors())
        yield from ((f"working.{name}", tensor) for name, tensor in self.working.tensors())
        own = {"selected": self.selected, "before": self.before, "firm": self.firm, "text": self.text}
        own |= {} if self.rest is None else {"rest_keys": self.rest.keys, "rest_values": self.rest.values}
        yield from ((f"index.{name}", tensor) for name, tensor in own.items() if tensor is not None)

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """The slots themselves, their text, and what was selected: the index follows from them."""
        yield from self.shelf.whole(self.counts).saved()
        own = {"selected": self.selected, "before": self.before, "firm": self.firm, "text": self.text,
               "usual": self.index.usual}  # fmt: skip
        yield from ((f"tiered_{name}", tensor) for name, tensor in own.items() if tensor is not None)

    def plain(self) -> dict[str, Any]:
        """What the slots' own layout says, and how long ago rows selected."""
        return {**self.shelf.whole(self.counts).plain(), "since": list(self.since)}

    def tier_of(self, name: str) -> str | None:
        """The tier that a tensor lies in, by its name; None for the device."""
        return None if "." in name or self.policy.tier.name == "device" else self.policy.tier.name

    def resumed(
        self, *, since: Sequence[int], selected: Tensor | None = None, before: Tensor | None = None,
        firm: Tensor | None = None,
    ) -> "TieredPart":  # fmt: skip
        """The part with a selection that was made earlier."""
        return replace(self, since=tuple(since), selected=selected, before=before, firm=firm)

    def apart(self) -> "TieredPart":
        """The part with a working set of its own."""
        return replace(self, working=Working(replace(self.working.spent)))

    # Attention --------------------------------------------------------------------------------------------------

    def asked(self, asking: Asking) -> "TieredPart":
        """The part as new tokens will read it: with a new selection where one is due."""
        new = asking.queries.shape[2]
        if new > 1 and self.policy.reads_all:
            return replace(self, selected=None, before=None, firm=None)
        since = tuple(tokens + new for tokens in self.since)
        due = [True] * len(since) if self.selected is None else self.policy.due(self.since, asking, self.before)
        if not any(due):
            return replace(self, since=since)
        began = perf_counter()
        selected, before = self._select(asking), asking.mean(len(self.counts[0]))
        if not all(due):
            assert self.selected is not None
            assert self.before is not None
            rows = torch.tensor(due, device=selected.device).repeat_interleave(len(self.counts[0]))[:, None]
            selected, before = torch.where(rows, selected, self.selected), torch.where(rows, before, self.before)
        self.working.spent.select_seconds += perf_counter() - began
        since = tuple(new if now else tokens for now, tokens in zip(due, since, strict=True))
        return replace(self, selected=selected, before=before, since=since)

    def votes(self, asking: Asking) -> Float[Tensor, "B S"] | None:
        """The most attention of the newest queries to each slot, in stretches, before the first token that chooses."""
        window, heads = asking.window, len(self.counts[0])
        chooses = self.policy.reads_all and self.selected is None and asking.queries.shape[2] == 1
        alike = all(len({*row}) == 1 for row in self.counts)
        if not (chooses and alike and self.policy.votes and self.index.closed[0]) or window is None:
            return None
        began, found = perf_counter(), []
        for start in range(0, max(self.lanes), _BLOCK_SLOTS):
            stop = min(start + _BLOCK_SLOTS, max(self.lanes))
            keys = self.shelf.block(start, stop)[0].unflatten(0, (-1, heads))
            at = torch.stack([self.shelf.positions(lane, start, stop) for lane in range(0, len(self.lanes), heads)])
            seen = window.positions[..., None] >= at[:, None].to(keys.device)
            found.append(attention_peak(window.queries, keys, window.log_sum_exp, scale=asking.scale, seen=seen))
        votes = torch.cat(found, dim=2)
        held = torch.tensor(self.lanes[::heads], device=votes.device)[:, None, None]
        votes.masked_fill_(torch.arange(votes.shape[2], device=votes.device) >= held, 0.0)
        self.working.spent.select_seconds += perf_counter() - began
        return stretched(votes, pool=POOL, reach=self.policy.around)

    def heeding(self, votes: Float[Tensor, "B S"]) -> "TieredPart":
        """The part that keeps the sentences with the best votes selected, as far as their share of the budget goes."""
        heads = len(self.counts[0])
        free = zip(self._budgets()[::heads], self._newest()[::heads], strict=True)
        one = 2 * self.policy.around  # a budget that a stretch or two would take is better spent by the index
        slots = [max(int(self.policy.votes * (budget - newest)) - one, 0) for budget, newest in free]
        return replace(self, firm=favoured(self.index, votes, slots=slots))

    def reach(self, new: int) -> int:
        """How many of `new` tokens may attend before the part must be asked again."""
        if self.policy.reads_all:
            return new
        return min(new, self.policy.reach(self.since if self.selected is not None else (0,) * len(self.since)))

    def attend(self, queries: Float[Tensor, "B G Q D"], *, scale: float) -> Partial:
        """Attention over what is selected, or over everything."""
        heads = len(self.counts[0])
        rows, query_heads, new, size = queries.shape
        lanes = queries.reshape(rows * heads, query_heads // heads, new, size)
        everything = self.selected is None or (new > 1 and self.policy.reads_all)
        answer = (self._all if everything else self._chosen)(lanes, scale)
        return Partial(
            answer.output.reshape(rows, query_heads, new, -1), answer.log_sum_exp.reshape(rows, query_heads, new)
        )

    def _chosen(self, queries: Tensor, scale: float) -> Partial:
        working, lanes = self.working, self.lanes
        assert self.selected is not None
        if not self.policy.reuse and not working.holds(self.selected):
            working.forget()
        working.bring(
            self.selected,
            self.shelf.fetch,
            stored=max(lanes),
            heads=len(self.counts[0]),
            lineage=self.shelf.lineage,
        )
        assert working.keys is not None
        assert working.values is not None
        began = perf_counter()
        mask = None if working.valid is None else working.valid[:, None, None]
        answer = partial(queries, working.keys[:, None], working.values[:, None], scale=scale, mask=mask)
        if self.rest is not None and sum(lanes) > sum(self._budgets()):
            answer = merge([answer, self._rest_of(queries, self.rest, scale)])
        working.spent.attend_seconds += perf_counter() - began
        return answer

    def _rest_of(self, queries: Tensor, rest: Rest, scale: float) -> Partial:
        """The mean of what is not selected, as heavy as its slots together would be with the mean key."""
        keys, values = self.working.keys, self.working.values
        assert keys is not None
        assert values is not None
        if self.working.valid is not None:
            keys, values = (one * self.working.valid[..., None] for one in (keys, values))
        left = torch.tensor(self.lanes, device=keys.device) - torch.tensor(self._budgets(), device=keys.device)
        number = left.clamp(min=1)[:, None]
        key, value = (rest.keys - keys.float().sum(dim=1)) / number, (rest.values - values.float().sum(dim=1)) / number
        scores = (queries.float() @ key[:, None, :, None])[..., 0] * scale + left.log()[:, None, None]
        return Partial(value.to(queries.dtype)[:, None, None].expand(*queries.shape[:3], -1), scores)

    def _all(self, queries: Tensor, scale: float) -> Partial:
        """Everything, a block at a time."""
        lanes, answers = self.lanes, []
        held = torch.tensor(lanes, device=queries.device)[:, None, None, None]
        for start in range(0, max(lanes), _BLOCK_SLOTS):
            stop = min(start + _BLOCK_SLOTS, max(lanes))
            keys, values = self.shelf.block(start, stop)
            mask = torch.arange(start, stop, device=queries.device) < held if stop > min(lanes) else None
            answers.append(partial(queries, keys[:, None], values[:, None], scale=scale, mask=mask))
        return merge(answers)

    def _select(self, asking: Asking) -> Tensor:
        heads, lanes, budgets = len(self.counts[0]), self.lanes, self._budgets()
        scores = None
        if self.index.centres is not None and any(b < held for b, held in zip(budgets, lanes, strict=True)):
            scores = self.policy.rank(self.index, *asking.newest(self.policy.choosing, heads), scale=asking.scale)
            if self.policy.stay and self.selected is not None:
                scores = scores + self.policy.stay * self.index.begun(self.selected, stored=max(lanes))
            if self.firm is not None:
                scores = scores.masked_fill(self.firm, torch.inf)
        return take(self.index, scores, counts=lanes, budgets=budgets, newest=self._newest())

    def _budgets(self) -> list[int]:
        return [min(self.policy.budget(held), held) for held in self.lanes]

    def _newest(self) -> list[int]:
        return [self.policy.newest(held, closed) for held, closed in zip(self.lanes, self.index.closed, strict=True)]

    # Folding ----------------------------------------------------------------------------------------------------

    def told(self, positions: Int[Tensor, "B S"], marks: UInt8[Tensor, "B S"]) -> "TieredPart":
        """The part that knows the marks of more of its text; pads have position -1."""
        return replace(self, text=marks_by_position(self.text, positions, marks))

    def extend(self, other: Part) -> "TieredPart":
        """The part with fresh slots behind its own: moved away, cut into sentences, summarised."""
        began = perf_counter()
        shelf = self.shelf.append(self.counts, other)
        moved = perf_counter()
        counts = tuple(tuple(a + b for a, b in zip(*pair, strict=True))
                       for pair in zip(self.counts, other.counts, strict=True))  # fmt: skip
        grown = replace(self, shelf=shelf, counts=counts, selected=None, before=None, firm=None)
        grown = replace(grown, index=grown._indexed(), rest=grown._more_rest(self.lanes) if self.policy.rest else None)
        spent = self.working.spent
        spent.write_seconds += moved - began
        spent.index_seconds += perf_counter() - moved
        return grown

    def _indexed(self) -> Index:
        """The index of all slots: from each lane's last cut on, text is cut anew."""
        opened = list(zip(range(len(self.lanes)), self.index.closed, self.lanes, strict=True))
        lengths = [self.policy.cut(self._marks(*span)) for span in opened]
        if not any(lengths):
            return self.index
        pieces = [self.shelf.keys(lane, first, first + sum(own))
                  for (lane, first, _), own in zip(opened, lengths, strict=True) if own]  # fmt: skip
        keys = torch.cat(pieces)
        flat = torch.tensor([length for own in lengths for length in own], device=keys.device)
        return self.index.extend(lengths, self.policy.summarise(keys, flat))

    def _marks(self, lane: int, start: int, stop: int) -> bytes:
        """What the text says at some slots of a lane; nothing where it is not known."""
        if self.text is None:
            return bytes(stop - start)
        row = self.text[lane // len(self.counts[0])].to("cpu")
        where = self.shelf.positions(lane, start, stop).to("cpu").long()
        return bytes(row[where.clamp(max=len(row) - 1)].numpy()) if len(row) else bytes(stop - start)

    def _more_rest(self, before: Sequence[int]) -> Rest:
        """The sums with the slots that came after `before` of each lane."""
        sums = []
        for lane, (start, stop) in enumerate(zip(before, self.lanes, strict=True)):
            slots = torch.arange(start, stop, device=self.index.starts.device)
            keys, values, _ = self.shelf.fetch(torch.full_like(slots, lane), slots)
            sums.append((keys.float().sum(dim=0), values.float().sum(dim=0)))
        keys, values = (torch.stack(side) for side in zip(*sums, strict=True))
        if self.rest is None:
            return Rest(keys=keys, values=values)
        return Rest(keys=self.rest.keys + keys, values=self.rest.values + values)

    def keep(self, kept: Bool[Tensor, " slots"]) -> "TieredPart":
        """Some of the slots in a store of their own, cut anew; what the others' store costs is freed."""
        some = self.shelf.whole(self.counts).keep(kept)
        return TieredPart.of(some, self.policy, text=self.text, spent=self.working.spent, usual=self.index.usual)

    def read(self, heads: slice = slice(None)) -> tuple[KV, Float[Tensor, "B H S"] | None]:
        """The slots of some heads, fetched and decoded."""
        return self.shelf.whole(self.counts).read(heads)

    def rows(self, indices: Sequence[int]) -> "TieredPart":
        """These rows in a store of their own, with what they had selected."""
        heads, device = len(self.counts[0]), self.index.starts.device
        some = self.shelf.whole(self.counts).rows(indices)
        text = None if self.text is None else self.text[torch.tensor(list(indices), device=device)]
        lanes = torch.tensor([row * heads + head for row in indices for head in range(heads)], device=device)
        usual = None if self.index.usual is None else self.index.usual[lanes]
        part = TieredPart.of(some, self.policy, text=text, spent=self.working.spent, usual=usual)
        return part.resumed(
            since=tuple(self.since[row] for row in indices),
            selected=None if self.selected is None else self.selected[lanes],
            before=None if self.before is None else self.before[lanes],
            firm=None if self.firm is None else self.firm[lanes],
        )

    def beside(self, others: Sequence[Part]) -> NoReturn:
        """Never asked for: rows are put together before they are moved away."""
        raise AssertionError("fresh slots are put side by side, not those that were moved away")

    def with_mass(self, queries: Tensor, log_sum_exp: Tensor, *, scale: float, counted: Tensor | None) -> NoReturn:
        """Refused: most slots are not read."""
        raise CacheError(
            "the attention that every slot receives was to be added up; slots in a far tier are not all read; use a "
            "method that needs no such sums, snapkv for one"
        )


def marks_by_position(text: Tensor | None, positions: Tensor, marks: Tensor) -> Tensor:
    """Marks of each row by position, [B, P]: those that were known, and more."""
    held = 0 if text is None else text.shape[1]
    known = max(held, int(positions.max()) + 1 if positions.numel() else 0)
    whole = torch.zeros(marks.shape[0], known + 1, dtype=torch.uint8, device=marks.device)
    if text is not None:
        whole[:, :held] = text
    where = positions.long().masked_fill(positions < 0, known)  # pads go behind everything
    return whole.scatter_(1, where, marks)[:, :known].clone()
