"""FoldContext: one finished segment in the folding layers, and everything a method may ask of it before it chooses.

A method of the select axis has one verb, `choose(context) -> Selection`, and pulls what it needs: keys and values,
recent queries, attention sums, hidden states, token ids, scores from a replay of the text or from an adapter, and a
pass of rows through the model. Nothing is computed that is not asked for. It knows no method and no model.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.attention.scores import max_attention_scores
from kvfold.memory.attention_sums import AttentionSums, ReceivedAttention
from kvfold.memory.hidden_states import HiddenRows, HiddenStates
from kvfold.memory.kv import KV, positions_of_rows
from kvfold.memory.recent_queries import QueryWindow
from kvfold.memory.room import UNLIMITED
from kvfold.memory.rules import Rules
from kvfold.memory.spread_queries import SpreadQueries, SpreadWindow
from kvfold.memory.state import LayerState
from kvfold.memory.tail import Tail
from kvfold.memory.transcript import Transcript

NO_ROW = -1  # stands where a row of the batch has fewer rows to run than another
Row = tuple[int, int, int, int]  # adapter row (any number where there is none), first and stop column, its column


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The tokens to be folded of each row: the oldest columns of its raw tail, sinks taken off."""

    real: Bool[Tensor, "B S"]  # columns that are tokens of the row's segment
    positions: Int[Tensor, "B S"]  # where they stand in the text
    slots: tuple[int, ...]  # slots of a head that each row's budget has for them; may be more than it has tokens
    least: tuple[int, ...]  # of those, slots that stay in any case: what the floor of a short text leaves
    layers: int  # that fold
    heads: int  # key/value heads of each of them
    shared_heads: bool = False  # all heads of a layer must keep the same slots

    def tokens(self, row: int) -> list[int]:
        """List the columns of one row's tokens, in order."""
        return self.real[row].nonzero().flatten().tolist()

    def nothing_kept(self) -> Bool[Tensor, "B L H S"]:
        """Make a mask that keeps no slot."""
        return self.real.new_zeros(len(self.real), self.layers, self.heads, self.real.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows to run through the model, and the columns of the segment that each may see.

    Sinks and folded slots are seen by all rows, and rows see one another causally.
    """

    rows: Int[Tensor, "B K"]  # numbers of the adapter's rows, or NO_ROW
    positions: Int[Tensor, "B K"]  # where they stand in the text, inside their segment
    first: Int[Tensor, "B K"]  # columns first <= column < stop are seen
    stop: Int[Tensor, "B K"]
    ids: Int[Tensor, "B K"] | None = None  # rows are these tokens of the model, not rows of an adapter
    # Rows are tokens that an adapter updates. They also see the columns from `stop` to this one, as far as the
    # adapter's gates let them, and do not see one another.
    ahead: int | None = None

    @classmethod
    def at(
        cls,
        segment: Segment,
        placed: Sequence[Sequence[Row]],
        *,
        ids: Int[Tensor, "B S"] | None = None,
        ahead: bool = False,
    ) -> "Rows":
        """Place rows in the segment of each row of the batch; with `ids` they are the tokens that they stand at.

        With `ahead` an adapter updates these, and lets them see the rest of the segment.
        """
        device, batch = segment.positions.device, len(segment.real)
        rows = torch.full((batch, max(map(len, placed), default=0)), NO_ROW)  # B K
        first, stop, column = (torch.zeros_like(rows) for _ in range(3))  # NO_ROW sees no column
        for index, of_row in enumerate(placed):
            for at, row in enumerate(of_row):
                rows[index, at], first[index, at], stop[index, at], column[index, at] = row
        rows, first, stop, column = (tensor.to(device) for tensor in (rows, first, stop, column))
        return cls(
            rows=rows,
            positions=segment.positions.long().gather(1, column).clamp(min=0),  # a pad's -1 is no position
            first=first,
            stop=stop,
            ids=None if ids is None else ids.gather(1, column),
            ahead=segment.real.shape[1] if ahead else None,
        )

    @property
    def real(self) -> Bool[Tensor, "B K"]:
        """Mark where there is a row."""
        return self.rows != NO_ROW


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayText:
    """Text to run once more, behind everything that is held, to see which slots that attends to."""

    ids: Int[Tensor, "B S"]  # of the tail's oldest columns
    real: Bool[Tensor, "B S"]
    first_position: Int[Tensor, " B"]  # where the repeated text begins


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What stays of a segment, and of what was folded before; and the slots that a method made of it."""

    kept: Mapping[int, Bool[Tensor, "B H S"]]  # by layer: columns of the segment
    history: Mapping[int, Bool[Tensor, " slots"]] = field(default_factory=dict)  # by layer: folded slots; absent: all
    made: Mapping[int, KV] = field(default_factory=dict)  # by layer: new slots [B, H, K]
    made_kept: Mapping[int, Bool[Tensor, "B H K"]] = field(default_factory=dict)  # by layer: which of them are there
    rewrite: Callable[[int, KV], KV] | None = None  # a layer's segment as its kept slots are stored; None: as it is

    @classmethod
    def of_layers(cls, layers: Sequence[int], kept: Bool[Tensor, "B L H S"]) -> "Selection":
        """Select slots of all layers by one mask."""
        return cls(kept={layer: kept[:, at] for at, layer in enumerate(layers)})


def in_all_heads(made: Mapping[int, KV], real: Bool[Tensor, "B K"]) -> dict[int, Bool[Tensor, "B H K"]]:
    """Say that all heads of a row have the same new slots."""
    return {layer: real[:, None].expand(kv.positions.shape) for layer, kv in made.items()}


@runtime_checkable
class RowAdapter(Protocol):
    """Weights that a method has learned for a model: rows to run, updates of layers, and scores of slots."""

    @property
    def size_bytes(self) -> int:
        """Count the bytes of all weights."""
        ...

    def embed(self, rows: Int[Tensor, "B K"]) -> Float[Tensor, "B K width"]:
        """Give what is added to the embeddings of some rows' tokens."""
        ...

    def gate(self, layer: int) -> Float[Tensor, " G"]:
        """Say how far each query head of a row in one layer sees later tokens of its segment."""
        ...

    def score(self, keys: Tensor, values: Tensor, positions: Tensor, real: Tensor) -> tuple[Tensor, Tensor | None]:
        """Score the slots of a segment, [B, L, H, S], from keys and values [B, S, L, H, D], and rows at its tokens."""
        ...

    def moved(
        self, queries: Float[Tensor, "B G W D"], positions: Int[Tensor, "B W"], to: Int[Tensor, "B W"]
    ) -> Float[Tensor, "B G W D"] | None:
        """Turn queries from their positions to others; None where the model's rotation is not known."""
        ...

    def active(self) -> AbstractContextManager[None]:
        """Update the model's linear layers while inside."""
        ...


@runtime_checkable
class ModelAccess(Protocol):
    """The model, as a fold may use it. Nothing that runs here is text: no counter moves."""

    adapter: RowAdapter | None

    def run(
        self,
        states: Mapping[int, LayerState],
        rows: Rows,
    ) -> Mapping[int, tuple[Tensor, Tensor]]:
        """Run rows over what the layers hold; give their keys [B, H, K, D] and values by layer."""
        ...

    def replay(self, states: Mapping[int, LayerState], text: ReplayText) -> Mapping[int, Tensor]:
        """Run text over what the layers hold; give by layer the maximum attention [B, H, columns] to the tail."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldContext:
    """The oldest `columns` of the tail of one layer or more, as a method sees them."""

    states: Mapping[int, LayerState]  # sinks are set apart already
    rules: Rules
    columns: int
    scales: Mapping[int, float]  # of the attention scores
    transcript: Transcript = field(default_factory=Transcript)
    access: ModelAccess | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """List the layers that are folded."""
        return tuple(self.states)

    @property
    def segment(self) -> Segment:
        """Describe the segment: its columns, positions, and the slots that the budget has for it."""
        tail = self.tail_of(self.layers[0])
        return Segment(
            real=tail.valid[:, : self.columns],
            positions=tail.positions[:, : self.columns],
            slots=self._slots(),
            least=self._least(),
            layers=len(self.states),
            heads=tail.keys.shape[1],
            shared_heads=self.rules.layout.shared_heads,
        )

    def keys_values(self, layer: int) -> KV:
        """Give keys and values of the segment's columns in one layer, pads included."""
        tail = self.tail_of(layer)
        oldest = slice(0, self.columns)
        positions = positions_of_rows(tail.positions[:, oldest], tail.keys.shape[1])
        return KV(tail.keys[:, :, oldest], tail.values[:, :, oldest], positions)

    def recent_queries(self, layer: int) -> QueryWindow:
        """Give the recent queries of one layer, with their log-sum-exp."""
        window = self.states[layer].recent
        assert window is not None, "a method that reads recent queries records them"
        return window.last(self.rules.recent_queries)

    def spread_queries(self, layer: int) -> QueryWindow | None:
        """Give queries of one layer that are spread over the raw tail; None: none were recorded.

        Caches that were saved before they were recorded have none.
        """
        record = self.states[layer].records.get(SpreadQueries.name)
        return record if isinstance(record, SpreadWindow) else None

    def moved(
        self,
        queries: Float[Tensor, "B G W D"],
        positions: Int[Tensor, "B W"],
        to: Int[Tensor, "B W"],
    ) -> Float[Tensor, "B G W D"] | None:
        """Turn queries from their positions to others; None where the model's rotation is not known."""
        adapter = None if self.access is None else self.access.adapter
        if adapter is None:
            return None
        return adapter.moved(queries, positions, to)

    def attention_sums(self, layer: int) -> Float[Tensor, "B H S"]:
        """Give the attention that each column has received so far."""
        sums = self.states[layer].records[AttentionSums.name]
        assert isinstance(sums, ReceivedAttention)
        return sums.raw[:, :, : self.columns]

    def hidden_states(self, layer: int) -> Float[Tensor, "B S width"]:
        """Give the hidden states that entered one layer's attention at each column."""
        rows = self.states[layer].records[HiddenStates.name]
        assert isinstance(rows, HiddenRows)
        return rows.states[:, : self.columns]

    def token_ids(self) -> Int[Tensor, "B S"]:
        """Give the ids of the segment's columns."""
        assert self.transcript.ids is not None, "a method that reads token ids records them"
        # Layers fold one after the other inside a forward, so the ids may begin before this layer's tail.
        start = self.tail_of(self.layers[0]).start - self.transcript.first_column
        return self.transcript.ids[:, start : start + self.columns].long()

    def query_scores(self) -> Float[Tensor, "B L H S"]:
        """Score each column by the maximum attention that any recent query of a layer gives to it."""
        scores = []
        for layer in self.layers:
            tail, window, kv = self.tail_of(layer), self.recent_queries(layer), self.keys_values(layer)
            # B W S: a query sees the tokens at or before it, and no pads. A place in the window without a query has
            # position -1 and sees nothing.
            visible = tail.valid[:, None, : self.columns] & (window.positions[..., None] >= kv.positions[:, :1])
            scores.append(
                max_attention_scores(
                    window.queries, kv.keys, window.log_sum_exp, scale=self.scales[layer], seen=visible
                )
            )
        return torch.stack(scores, dim=1)  # B L H S

    def replay(self) -> Float[Tensor, "B L H S"]:
        """Score each column by the maximum attention it gets while the model reads the segment once more (KVzip)."""
        assert self.access is not None, "a memory that replays text has access to a model"
        # Layers share their columns, so the text is that of any of them.
        first = self.tail_of(self.layers[0])
        behind = torch.tensor(self.states[self.layers[0]].next_positions, device=first.keys.device)
        text = ReplayText(ids=self.token_ids(), real=first.valid[:, : self.columns], first_position=behind)
        found = self.access.replay(self.states, text)
        return torch.stack([found[layer][..., : self.columns] for layer in self.layers], dim=1)  # B L H S

    def learned_scores(self) -> tuple[Float[Tensor, "B L H S"], Float[Tensor, "B L H S"] | None]:
        """Score each column, and a row at each column, by the adapter that the method names.

        The second are None where the adapter knows no rows, and where ids of tokens are not recorded.
        """
        assert self.access is not None, "a method with an adapter has access to a model"
        assert self.access.adapter is not None, "a method that asks for learned scores names an adapter"
        segment = self.segment
        pads = ~segment.real  # B S
        sides: list[Tensor] = []
        for side in ("keys", "values"):
            every = [getattr(self.keys_values(layer), side).transpose(1, 2) for layer in self.layers]
            numbers = torch.stack(every, dim=2)  # B S L H D, fresh
            numbers[pads] = 0.0  # few: to look at every number would take as long as to stack them
            sides.append(numbers)
        slots, rows = self.access.adapter.score(sides[0], sides[1], segment.positions, segment.real)
        return slots, rows if self.transcript.ids is not None else None

    def run(self, rows: Rows) -> Mapping[int, KV]:
        """Run rows through the model, over what every layer holds; give their slots by layer."""
        if not bool(rows.real.any()):  # NO_ROW everywhere: a pass would make nothing
            return {}
        assert self.access is not None, "a memory that runs rows has access to a model"
        found = self.access.run(self.states, rows)
        heads = next(iter(found.values()))[0].shape[1]  # keys are B H K D
        positions = positions_of_rows(rows.positions, heads)
        return {layer: KV(keys, values, positions) for layer, (keys, values) in found.items()}

    def tail_of(self, layer: int) -> Tail:
        """Give the raw tail of one layer, whose oldest columns are the segment."""
        tail = self.states[layer].tail
        assert tail is not None
        return tail

    def allowed_slots(self, layer: int, *, seen: int, pinned: int) -> int | None:
        """Count the folded slots that a head of one row may hold, its sinks taken off; None: no limit."""
        tail = self.tail_of(layer)
        heads = tail.keys.shape[1]
        # A raw token of one layer and row: a key and a value of each head.
        token_bytes = heads * sum(side.shape[-1] * side.element_size() for side in (tail.keys, tail.values))
        slots = self.rules.slots(seen=seen, rows=len(self.states[layer].seen), heads=heads, token_bytes=token_bytes)
        return None if slots is None else max(slots - pinned, 0)  # a budget counts the sinks too

    def most_slots(self, layer: int) -> int:
        """Count the folded slots that a head may ever hold, however long the text grows."""
        # A fraction of a text without end has no end; a budget in tokens or bytes is what it is.
        pinned = self.states[layer].pinned_of_rows
        every = [self.allowed_slots(layer, seen=UNLIMITED, pinned=count) for count in pinned]
        return min([UNLIMITED if allowed is None else allowed for allowed in every], default=UNLIMITED)

    def _slots(self) -> tuple[int, ...]:
        """Count the slots that the budget has for each row's segment, on average over layers and heads."""
        # Rows, pads and budget are the same in every layer; only the folded slots differ.
        layer = self.layers[0]
        pinned = self.states[layer].pinned_of_rows
        real = self.tail_of(layer).valid[:, : self.columns].sum(dim=1).tolist()
        held = mean_held_of_rows(list(self.states.values()))
        slots = []
        for row, seen in enumerate(self._seen()):
            allowed = self.allowed_slots(layer, seen=seen, pinned=pinned[row])
            slots.append(int(real[row]) if allowed is None else max(allowed - held[row], 0))
        return tuple(slots)

    def _least(self) -> tuple[int, ...]:
        """Count the slots of each row's segment that the floor leaves in any case, on average as `_slots`."""
        pinned = self.states[self.layers[0]].pinned_of_rows
        held = mean_held_of_rows(list(self.states.values()))
        return tuple(max(self.rules.floor(seen) - pinned[row] - held[row], 0) for row, seen in enumerate(self._seen()))

    def _seen(self) -> list[int]:
        """Count the real tokens of each row up to the segment's end."""
        layer = self.layers[0]
        rest = self.tail_of(layer).valid[:, self.columns :].sum(dim=1).tolist()
        return [seen - int(count) for seen, count in zip(self.states[layer].seen, rest, strict=True)]


def mean_held_of_rows(states: Sequence[LayerState]) -> list[int]:
    """Count the folded slots of each row, a mean over the heads of all layers, rounded up."""
    held = []
    for counts in zip(*(state.folded_of_rows for state in states), strict=True):  # by row: its counts in each layer
        of_heads = [count for of_layer in counts for count in of_layer]
        held.append(-(-sum(of_heads) // max(len(of_heads), 1)))  # divided and rounded up
    return held
