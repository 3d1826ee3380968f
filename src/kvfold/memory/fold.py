"""Folding one layer: the oldest columns of its tail leave, and what the method keeps of them joins the folded part.

Rows that hold equally many slots are folded together in one call of the method. The sinks, the first real tokens of
a row, are set apart first and no method ever sees them. With scope "history" a method chooses among everything held,
again and again; with "turn" among the new tokens only, once, unless the budget was lowered below what is held.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.errors import CacheError
from kvfold.memory.kv import KV, Chooser, Needs, Observed
from kvfold.memory.part import Layout, Part, Placer, positions_of_rows
from kvfold.memory.tail import Tail
from kvfold.memory.window import QueryWindow

POSITION_BYTES = 4
MASS_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a layer folds by: the plan's members, and what is pinned."""

    chooser: Chooser
    codec: Layout
    raw: Layout  # how sinks are stored: as they came
    pinned: int  # first real tokens of each row that stay raw
    layers: int  # layers that fold: a budget in bytes is split over them
    placer: Placer | None = None  # None: parts lie where they are made

    @property
    def folds(self) -> bool:
        """Whether a fold changes anything: keeping everything as it is leaves it in the tail."""
        moves = self.chooser.budget is not None or self.chooser.by_pass or self.placer is not None
        return moves or not self.codec.lossless

    @property
    def needs(self) -> Needs:
        """What must be observed, for the method and for the place."""
        own = self.chooser.needs
        return own if self.placer is None else replace(own, queries=max(own.queries, self.placer.queries))

    @property
    def spill(self) -> int | None:
        """Raw tokens beyond which older ones move away by themselves: where folding loses nothing."""
        free = self.chooser.budget is None and self.codec.lossless and not self.chooser.by_pass
        return self.placer.spill if self.placer is not None and free else None

    @property
    def reads_text(self) -> bool:
        """Whether the ids of what is fed matter."""
        return self.chooser.needs.text or (self.placer is not None and self.placer.reads_text)

    @property
    def ends(self) -> Mapping[str, int] | None:
        """How good an end each mark of the text is; None: as usual."""
        return None if self.placer is None else self.placer.ends

    def of_layer(self, index: int) -> "Rules":
        """What one layer of the model folds by."""
        return replace(self, codec=self.codec.of_layer(index))


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a layer holds at one moment."""

    sinks: Part | None = None
    folded: Part | None = None
    tail: Tail | None = None
    window: QueryWindow | None = None
    seen: tuple[int, ...] = ()  # real tokens of each row so far, the tail's included
    start: int = 0  # columns fed before the first one here

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor held, as `part.name`."""
        parts = (("sinks", self.sinks), ("folded", self.folded), ("tail", self.tail), ("window", self.window))
        for name, part in parts:
            if part is not None:
                yield from ((f"{name}.{own}", tensor) for own, tensor in part.tensors())

    def tier_of(self, name: str) -> str | None:
        """Where a tensor that `tensors` names lies, if that is not the device that it is on."""
        part, _, own = name.partition(".")
        return self.folded.tier_of(own) if part == "folded" and self.folded is not None else None

    def rows(self, indices: Sequence[int]) -> "State":
        """The state with these rows, in this order, repeats allowed."""
        return replace(
            self,
            sinks=None if self.sinks is None else self.sinks.rows(indices),
            folded=None if self.folded is None else self.folded.rows(indices),
            tail=None if self.tail is None else self.tail.rows(indices),
            window=None if self.window is None else self.window.rows(indices),
            seen=tuple(self.seen[row] for row in indices),
        )

    @property
    def pinned_of_rows(self) -> list[int]:
        """Sinks held by each row."""
        return [0] * len(self.seen) if self.sinks is None else self.sinks.slots_of_rows

    @property
    def folded_of_rows(self) -> list[tuple[int, ...]]:
        """Folded slots of each row's heads; an empty tuple where nothing was folded yet."""
        return [()] * len(self.seen) if self.folded is None else list(self.folded.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Rows that fold alike, and the columns of the tail that they fold."""

    rows: tuple[int, ...]
    segment: KV  # sinks already taken off
    mass: Float[Tensor, "B H S"] | None
    sinks: KV
    held: tuple[int, ...]  # folded slots of each head
    allowed: int | None  # folded slots a head may hold afterwards; None: all of them


def fold(state: State, rules: Rules, *, columns: int | None, scale: float) -> State:
    """The state after its tail's oldest `columns` (all by default) were folded."""
    tail = state.tail
    assert tail is not None
    columns = tail.length if columns is None else columns
    if not (rules.folds or tail.padded):
        return state if tail.slack_bytes == 0 else replace(state, tail=tail.after(0))
    if columns == 0 and not _can_judge(state, rules):
        return state
    groups = list(_groups(state, rules, columns))
    order = [row for group in groups for row in group.rows]
    back = [order.index(row) for row in range(len(order))]
    sinks = _stacked([_packed(group.sinks, rules.raw) for group in groups], back)
    held = 0 if state.folded is None else state.folded.slots
    fresh, kept = [], torch.ones(held, dtype=torch.bool, device=tail.keys.device)
    for group in groups:
        old, new = _choose(group, state, rules, scale)
        fresh.append(rules.codec.pack(group.segment, new, mass=group.mass if rules.chooser.needs.mass else None))
        _mark(kept, old, group, state)
    folded = _stacked(fresh, back)
    if state.folded is not None:
        told = told_part(state.folded, tail, columns)
        survivors = told if kept.all() else told.keep(kept)
        folded = survivors.extend(folded) if folded.slots else survivors
    elif rules.placer is not None:
        folded = placed_part(folded, rules.placer, tail, columns)
    pinned = sinks if state.sinks is None else state.sinks.extend(sinks) if sinks.slots else state.sinks
    rest = tail.after(columns)
    return replace(state, sinks=pinned, folded=folded, tail=rest, window=rest_of_window(state, rest, rules))


def told_part(part: Part, tail: Tail, columns: int) -> Part:
    """The part after it was told what the text says in the columns that are folded."""
    return part if tail.marks is None else part.told(tail.positions[:, :columns], tail.marks[:, :columns])


def placed_part(fresh: Part, placer: Placer, tail: Tail, columns: int) -> Part:
    """The first folded part, where it will lie."""
    text = None if tail.marks is None else (tail.positions[:, :columns], tail.marks[:, :columns])
    return placer.place(fresh, text)


def rest_of_window(state: State, rest: Tail, rules: Rules) -> QueryWindow | None:
    """The queries of the tokens that are still raw: the others have had their say, unless only the place asks."""
    if rules.placer is not None and not rules.chooser.needs.queries:
        return state.window
    if state.window is None or rest.length == 0:
        return None
    raw = rest.valid.sum(dim=1).tolist()
    first = [seen - int(count) for seen, count in zip(state.seen, raw, strict=True)]
    return state.window.since(torch.tensor(first, device=state.window.positions.device))


def _can_judge(state: State, rules: Rules) -> bool:
    """Whether an eviction without new tokens makes sense: something is folded, and the method has what it judges by."""
    return state.folded is not None and (not rules.chooser.needs.queries or state.window is not None)


def _groups(state: State, rules: Rules, columns: int) -> Iterator[_Group]:
    tail = state.tail
    assert tail is not None
    valid = tail.valid[:, :columns]
    real = [columns] * len(state.seen) if not tail.padded else [int(count) for count in valid.sum(dim=1)]
    rest = tail.valid[:, columns:].sum(dim=1).tolist()
    alike: dict[tuple, list[int]] = {}
    for row, count in enumerate(real):
        taken = min(rules.pinned - state.pinned_of_rows[row], count)
        seen = state.seen[row] - int(rest[row])
        key = (count, taken, seen, state.pinned_of_rows[row], state.folded_of_rows[row])
        alike.setdefault(key, []).append(row)
    for (count, taken, seen, pinned, held), rows in alike.items():
        whole, mass = _columns(tail, rows, columns, count)
        yield _Group(
            rows=tuple(rows),
            sinks=_cut(whole, slice(0, taken)),
            segment=_cut(whole, slice(taken, None)),
            mass=None if mass is None else mass[:, :, taken:],
            held=held,
            allowed=allowed_slots(state, rules, seen=seen, pinned=pinned + taken),
        )


def allowed_slots(state: State, rules: Rules, *, seen: int, pinned: int) -> int | None:
    """Folded slots a head of one row may hold after `seen` tokens, its sinks taken off; None keeps everything."""
    tail = state.tail
    assert tail is not None
    budget = rules.chooser.budget
    if budget is None:
        return None
    heads = tail.keys.shape[1]
    token_bytes = heads * sum(tensor.shape[-1] * tensor.element_size() for tensor in (tail.keys, tail.values))
    slot_bytes = token_bytes + heads * (POSITION_BYTES + (MASS_BYTES if rules.chooser.needs.mass else 0))
    slots = budget.slots(
        seen=seen,
        pinned=rules.pinned,
        slot_bytes=slot_bytes,
        token_bytes=token_bytes,
        shares=rules.layers * len(state.seen),
    )
    return max(slots - pinned, 0)


def _columns(tail: Tail, rows: list[int], columns: int, count: int) -> tuple[KV, Tensor | None]:
    """The real tokens of some rows among the first columns: `count` for each of them."""
    heads = tail.keys.shape[1]
    if len(rows) == tail.keys.shape[0] and count == columns:
        head = slice(0, columns)
        positions = positions_of_rows(tail.positions[:, head], heads)
        mass = None if tail.mass is None else tail.mass[:, :, head]
        return KV(tail.keys[:, :, head], tail.values[:, :, head], positions), mass
    chosen = torch.tensor(rows, device=tail.keys.device)
    order = tail.valid[chosen, :columns].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
    wide = order[:, None, :, None].expand(-1, heads, -1, -1)
    keys = tail.keys[chosen].gather(2, wide.expand(-1, -1, -1, tail.keys.shape[-1]))
    values = tail.values[chosen].gather(2, wide.expand(-1, -1, -1, tail.values.shape[-1]))
    positions = positions_of_rows(tail.positions[chosen].gather(1, order), heads)
    mass = None if tail.mass is None else tail.mass[chosen].gather(2, wide[..., 0])
    return KV(keys, values, positions), mass


def _cut(kv: KV, span: slice) -> KV:
    return KV(kv.keys[:, :, span], kv.values[:, :, span], kv.positions[:, :, span])


def _choose(group: _Group, state: State, rules: Rules, scale: float) -> tuple[Tensor | None, Tensor]:
    """Which folded slots stay (None: all; else one flat mask a row) and which of the segment's, [B, H, S]."""
    new, held = len(group.segment), max(group.held, default=0)
    everything = group.segment.positions.new_ones(group.segment.positions.shape, dtype=torch.bool)
    if group.allowed is None or held + new <= group.allowed:
        return None, everything
    if rules.chooser.scope == "turn" and held <= group.allowed:
        return None, _chosen(group.segment, group, rules, group.allowed - held, group.mass, slice(None), state, scale)
    heads = len(group.held)
    if len(set(group.held)) <= 1:
        spans = [slice(0, group.segment.keys.shape[1])]
    else:
        spans = [slice(head, head + 1) for head in range(heads)]
    old, kept = [], []
    for span in spans:
        past, past_mass = _past(group, span, state)
        among = _joined(past, _of_heads(group.segment, span))
        mass = _joined_mass(past_mass, group.mass, span)
        chosen = _chosen(among, group, rules, group.allowed, mass, span, state, scale)
        before = 0 if past is None else len(past)
        old.append(chosen[:, :, :before].flatten(1))
        kept.append(chosen[:, :, before:])
    return torch.cat(old, dim=1), torch.cat(kept, dim=1)


def _chosen(kv: KV, group: _Group, rules: Rules, slots: int, mass: Tensor | None, heads: slice, state: State,
            scale: float) -> Bool[Tensor, "B H S"]:  # fmt: skip
    """What the method keeps, held to its budget."""
    if slots >= len(kv):
        return torch.ones(kv.positions.shape, dtype=torch.bool, device=kv.positions.device)
    if slots == 0:
        return torch.zeros(kv.positions.shape, dtype=torch.bool, device=kv.positions.device)
    kept = rules.chooser.choose(kv, slots, _observed(group, rules, mass, heads, state, scale))
    if kept.shape != kv.positions.shape or int(kept.sum(dim=2).max()) > slots:
        raise CacheError(
            f"{type(rules.chooser).__name__} was asked to keep {slots} of {len(kv)} slots; it answered with a mask of "
            f"{tuple(kept.shape)} and up to {int(kept.sum(dim=-1).max())} slots; mend its `choose`"
        )
    if rules.codec.together and bool((kept != kept[:, :1]).any()):
        raise CacheError(
            f"{type(rules.chooser).__name__} was asked to keep the same slots for all heads; it kept others for some; "
            "use a method that adds its scores up over the heads, or store slots in a way that does not share them"
        )
    return kept


def _observed(group: _Group, rules: Rules, mass: Tensor | None, heads: slice, state: State, scale: float) -> Observed:
    device = group.segment.keys.device
    seen = torch.tensor([state.seen[row] for row in group.rows], device=device)
    if state.window is None:
        return Observed(scale=scale, seen=seen, mass=mass, together=rules.codec.together)
    window = state.window.rows(group.rows)
    newest = slice(-rules.chooser.needs.queries or None, None)  # the place may have asked for more
    queries, weights = window.queries[:, :, newest], window.log_sum_exp[:, :, newest]
    if heads != slice(None):
        per_head = queries.shape[1] // group.segment.keys.shape[1]
        of_heads = slice(heads.start * per_head, heads.stop * per_head)
        queries, weights = queries[:, of_heads], weights[:, of_heads]
    return Observed(scale=scale, seen=seen, mass=mass, queries=queries, query_positions=window.positions[:, newest],
                    log_sum_exp=weights, together=rules.codec.together)  # fmt: skip


def _past(group: _Group, heads: slice, state: State) -> tuple[KV | None, Tensor | None]:
    """The folded slots of a group's rows and of some heads, decoded."""
    if state.folded is None:
        return None, None
    part = state.folded if list(group.rows) == list(range(len(state.seen))) else state.folded.rows(group.rows)
    return part.read(heads)


def _of_heads(kv: KV, heads: slice) -> KV:
    return KV(kv.keys[:, heads], kv.values[:, heads], kv.positions[:, heads])


def _joined(past: KV | None, new: KV) -> KV:
    if past is None:
        return new
    return KV(
        torch.cat([past.keys, new.keys], dim=2),
        torch.cat([past.values, new.values], dim=2),
        torch.cat([past.positions, new.positions], dim=2),
    )


def _joined_mass(past: Tensor | None, new: Tensor | None, heads: slice) -> Tensor | None:
    if new is None:
        return None
    return new[:, heads] if past is None else torch.cat([past, new[:, heads]], dim=2)


def _mark(kept: Tensor, old: Tensor | None, group: _Group, state: State) -> None:
    """Write a group's choice among the folded slots into the flat mask of all rows."""
    if old is None or state.folded is None:
        return
    starts = torch.tensor([0, *(sum(row) for row in state.folded.counts)]).cumsum(0).tolist()
    for own, row in enumerate(group.rows):
        kept[starts[row] : starts[row + 1]] = old[own]


def _packed(kv: KV, raw: Layout) -> Part:
    """All slots of a rectangle."""
    return raw.pack(kv, torch.ones(kv.positions.shape, dtype=torch.bool, device=kv.positions.device))


def _stacked(parts: list[Part], order: list[int]) -> Part:
    """Groups of rows as one part, with the rows back in their order."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].beside(parts[1:])
    return whole if order == sorted(order) else whole.rows(order)
