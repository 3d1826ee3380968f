"""Candidates: the slots among which a method chooses layer by layer, as plain rectangles.

Rows that hold equally many slots are asked for together, heads that hold equally many too. With scope "history" a
method chooses among everything held, again and again; with "turn" among the new tokens only, once, unless the budget
was lowered below what is held. Methods that choose for all layers at once do not come here.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.errors import CacheError
from kvfold.memory.attention_sums import AttentionSums, ReceivedAttention
from kvfold.memory.context import FoldContext, Selection
from kvfold.memory.hidden_states import HiddenStates
from kvfold.memory.kv import KV
from kvfold.memory.ragged import row_starts
from kvfold.memory.recent_queries import QueryWindow


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Slots of some rows and heads, oldest first, and what was recorded of them."""

    kv: KV
    slots: int  # of each row and head that may stay, 0 < slots < len(kv)
    scale: float  # of the attention scores
    seen: Int[Tensor, " B"]  # the position that comes next in each row: its real tokens so far, less closed gaps
    shared_heads: bool  # all heads must keep the same slots: add scores up over the heads
    recent: QueryWindow | None = None  # recent queries of these heads, where the method records them
    attention_sums: Float[Tensor, "B H S"] | None = None  # attention received, averaged over the query group
    hidden_states: Float[Tensor, "B new width"] | None = None  # of the last `new` candidates, which are raw tokens


ChooseSlots = Callable[[Candidates], Bool[Tensor, "B H S"]]


def choose_by_layer(context: FoldContext, choose: ChooseSlots) -> Selection:
    """Ask a method for every layer, and for every group of rows and heads that hold equally many slots."""
    kept: dict[int, Tensor] = {}
    history: dict[int, Tensor] = {}
    for layer in context.layers:
        choice = _LayerChoice(context, layer, choose)
        for group in choice.groups():
            choice.decide(group)
        kept[layer] = choice.kept
        if choice.history is not None:
            history[layer] = choice.history
    return Selection(kept=kept, history=history)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Rows that fold alike."""

    rows: list[int]
    columns: Int[Tensor, "B S"] | slice  # of the tail: the segment's real tokens; a slice where all rows agree
    new: int  # real tokens of the segment in each row
    held: tuple[int, ...]  # folded slots of each head
    allowed: int | None  # folded slots a head may hold afterwards; None: all of them


class _LayerChoice:
    """One layer's choice while it is made. It changes: masks are written group by group."""

    def __init__(self, context: FoldContext, layer: int, choose: ChooseSlots) -> None:
        self.context, self.layer, self.choose = context, layer, choose
        self.state, self.tail = context.states[layer], context.tail_of(layer)
        valid = self.tail.valid[:, None, : context.columns]  # B 1 columns
        self.kept = valid.expand(-1, self.tail.keys.shape[1], -1).clone()  # B H columns; masks are written into it
        self.history: Tensor | None = None  # flat mask of the folded slots; None: all stay

    def groups(self) -> Iterator[_Group]:
        """Group the rows by how much they hold and fold."""
        columns, state = self.context.columns, self.state
        valid = self.tail.valid
        real = valid[:, :columns].sum(dim=1).tolist()
        rest = valid[:, columns:].sum(dim=1).tolist()
        alike: dict[tuple, list[int]] = {}  # rows by what decides about their slots
        for row, count in enumerate(real):
            # A budget counts what was seen up to the segment's end, not the raw tokens behind it.
            seen = state.seen[row] - int(rest[row])
            # Rows with one key have one budget and one shape, so a method is asked for them in one call.
            key = (int(count), seen, state.pinned_of_rows[row], state.folded_of_rows[row])
            alike.setdefault(key, []).append(row)
        for (count, seen, pinned, held), rows in alike.items():
            yield _Group(
                rows=rows,
                columns=self._columns(rows, count),
                new=count,
                held=held,
                allowed=self.context.allowed_slots(self.layer, seen=seen, pinned=pinned),
            )

    def decide(self, group: _Group) -> None:
        """Choose what stays of one group of rows, and write it into the masks."""
        held, allowed = max(group.held, default=0), group.allowed
        if allowed is None or held + group.new <= allowed:
            return
        # With scope "turn" what was folded stays, and the new tokens share what is left.
        if self.context.rules.select.scope == "turn" and held <= allowed:
            chosen = self._asked(group, allowed - held, self._new(group), 0, slice(None))
            self._write(group, chosen)
            return
        masks = []
        for heads in self._spans(group):
            past = self._past(group, heads)
            new = self._new(group).heads(heads)
            before = 0 if past is None else len(past)
            masks.append(
                self._asked(
                    group,
                    allowed,
                    new if past is None else _joined(past, new),
                    before,
                    heads,
                )
            )
        # A mask runs over folded slots, then over the `new` tokens. Heads may differ in the folded ones only.
        self._write_history(group, [mask[:, :, : mask.shape[2] - group.new] for mask in masks])
        self._write(group, torch.cat([mask[:, :, mask.shape[2] - group.new :] for mask in masks], dim=1))

    def _asked(
        self,
        group: _Group,
        slots: int,
        kv: KV,
        past: int,
        heads: slice,
    ) -> Bool[Tensor, "B H S"]:
        """Ask the method, unless there is nothing to choose, and check what it says."""
        if slots >= len(kv):  # nothing has to go
            return torch.ones(kv.positions.shape, dtype=torch.bool, device=kv.positions.device)
        if slots == 0:
            return torch.zeros(kv.positions.shape, dtype=torch.bool, device=kv.positions.device)
        candidates = Candidates(
            kv=kv,
            slots=slots,
            scale=self.context.scales[self.layer],
            seen=torch.tensor([self.state.next_positions[row] for row in group.rows], device=kv.keys.device),
            shared_heads=self.context.rules.layout.shared_heads,
            recent=self._recent(group, heads),
            attention_sums=self._sums(group, past, heads),
            hidden_states=self._hidden(group),
        )
        return self._checked(self.choose(candidates), candidates)

    def _checked(
        self,
        kept: Bool[Tensor, "B H S"],
        candidates: Candidates,
    ) -> Bool[Tensor, "B H S"]:
        """Refuse a choice of too many slots, or of different ones for heads that share theirs."""
        method, kv = type(self.context.rules.select).__name__, candidates.kv
        if kept.shape != kv.positions.shape or int(kept.sum(dim=2).max()) > candidates.slots:
            raise CacheError(
                f"{method} was asked to keep {candidates.slots} of {len(kv)} slots; it answered with a mask of "
                f"{tuple(kept.shape)} and up to {int(kept.sum(dim=-1).max())} slots; mend its `choose_slots`"
            )
        if candidates.shared_heads and bool((kept != kept[:, :1]).any()):
            raise CacheError(
                f"{method} was asked to keep the same slots for all heads; it kept others for some; "
                "use a method that adds its scores up over the heads, or store slots in a way that does not share them"
            )
        return kept

    def _columns(self, rows: list[int], count: int) -> Tensor | slice:
        """Find the columns of the real tokens: a slice where all rows have the same last ones."""
        valid = self.tail.valid[:, : self.context.columns]
        first = self.context.columns - count  # where the tokens begin if all pads are in front
        if len(rows) == len(valid) and bool(valid[:, first:].all()):
            return slice(first, self.context.columns)
        chosen = valid[torch.tensor(rows, device=valid.device)]
        # A stable sort of the mask brings the real columns to the front and keeps their order.
        return chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]

    def _of_columns(self, group: _Group, numbers: Tensor) -> Tensor:
        """Pick a group's rows and real columns out of [B, H, columns] or [B, H, columns, size]."""
        if isinstance(group.columns, slice):
            return numbers[:, :, group.columns]
        where = group.columns[:, None].expand(-1, numbers.shape[1], -1)  # B H new
        picked = numbers[torch.tensor(group.rows, device=numbers.device)]
        if numbers.dim() == 3:  # positions and sums: one number a column
            return picked.gather(2, where)
        return picked.gather(2, where[..., None].expand(*where.shape, numbers.shape[3]))

    def _new(self, group: _Group) -> KV:
        """Give keys, values and positions [B, H, new, ...] of the segment's tokens of a group."""
        tail = self.tail
        heads = tail.keys.shape[1]
        positions = tail.positions[:, None, : tail.length].expand(-1, heads, -1)  # B H columns
        sides = (tail.keys, tail.values, positions)
        return KV(*(self._of_columns(group, side) for side in sides))

    def _spans(self, group: _Group) -> list[slice]:
        """List spans of heads that hold equally many folded slots: all, or each by itself."""
        if len(set(group.held)) <= 1:
            return [slice(0, self.tail.keys.shape[1])]
        return [slice(head, head + 1) for head in range(len(group.held))]

    def _past(self, group: _Group, heads: slice) -> KV | None:
        """Decode the folded slots of a group's rows and of some heads."""
        folded = self.state.folded
        if folded is None:
            return None
        every = group.rows == list(range(len(self.state.seen)))
        return (folded if every else folded.take_rows(group.rows)).read(heads)

    def _recent(self, group: _Group, heads: slice) -> QueryWindow | None:
        """Give the recent queries of a group's rows and heads, as many as the method reads."""
        if self.state.recent is None or not self.context.rules.recent_queries:
            return None
        window = self.state.recent.take_rows(group.rows).last(self.context.rules.recent_queries)
        if heads == slice(None):
            return window
        size = window.queries.shape[1] // self.tail.keys.shape[1]  # query heads of a key/value head
        return window.heads(slice(heads.start * size, heads.stop * size))

    def _sums(self, group: _Group, past: int, heads: slice) -> Float[Tensor, "B H S"] | None:
        """Give the attention sums of a group's candidates: of folded slots, then of new tokens."""
        sums = self.state.records.get(AttentionSums.name)
        if not isinstance(sums, ReceivedAttention):
            return None
        new = self._of_columns(group, sums.raw)[:, heads]
        return torch.cat([sums.of_folded(group.rows, heads), new], dim=2) if past else new

    def _hidden(self, group: _Group) -> Float[Tensor, "B new width"] | None:
        """Give the hidden states of a group's new tokens."""
        if HiddenStates.name not in self.state.records:
            return None
        return self._of_columns(group, self.context.hidden_states(self.layer)[:, None])[:, 0]  # as of one head

    def _write(self, group: _Group, chosen: Bool[Tensor, "B H S"]) -> None:
        """Write what stays of the segment into the mask over columns."""
        if isinstance(group.columns, slice):
            self.kept[:, :, group.columns] = chosen
            return
        # Rows have their tokens in other columns, so each is written by itself.
        for at, row in enumerate(group.rows):
            self.kept[row, :, group.columns[at]] = chosen[at]

    def _write_history(self, group: _Group, masks: list[Tensor]) -> None:
        """Write what stays of the folded slots into the flat mask of all rows."""
        folded = self.state.folded
        if folded is None:
            return
        # Rows of groups that drop nothing keep True.
        if self.history is None:
            self.history = torch.ones(folded.slots, dtype=torch.bool, device=self.tail.keys.device)
        starts = row_starts(folded.counts)
        # B, slots of a row: head by head, as flat parts lie.
        flat = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        for at, row in enumerate(group.rows):
            self.history[starts[row] : starts[row + 1]] = flat[at]


def _joined(past: KV, new: KV) -> KV:
    """Put folded slots before new tokens."""
    return KV(
        torch.cat([past.keys, new.keys], dim=2),
        torch.cat([past.values, new.values], dim=2),
        torch.cat([past.positions, new.positions], dim=2),
    )
