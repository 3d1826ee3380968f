"""StaticPast: the past of a cache as a captured step sees it, with everything at places that never change.

Sinks, folded parts and older raw columns are read as they lie. Behind each tail there is room for new tokens: one is
written into the column that a number on the device says, and attention reads the room under a mask that follows from
the same number. So nothing in here may ask the host how long a tail is. It knows no graph, and commits nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache

from kvfold.attention.merge import merge
from kvfold.attention.partial import Partial, partial, softmax_sinks
from kvfold.hf.cache import FoldedCache
from kvfold.hf.handle import CapturedRows, FoldedLength
from kvfold.memory.dense import DensePart
from kvfold.memory.layer import NewTokens
from kvfold.memory.part import Part
from kvfold.memory.state import LayerState
from kvfold.memory.step import AttentionStep

_NEAR = 256  # raw columns that are read under the mask too: quicker than one more merge
_SEEN = -1  # the number of a column that every token sees


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """What one layer did in a captured step; each replay writes over it."""

    queries: Float[Tensor, "B G 1 D"]
    whole: Partial
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """What a captured step reads in one layer, and the room into which it writes."""

    sinks: Part | None
    folded: Part | None
    keys: Float[Tensor, "B H capacity D"]  # of the tail
    values: Float[Tensor, "B H capacity E"]
    start: int  # columns that left the tail before
    length: int  # columns of the tail when it was captured
    first: int  # from this column on the tail is read under the mask
    stop: int  # the room ends

    @classmethod
    def of(cls, state: LayerState, room: int) -> "_Place":
        """Behind a tail that has the room."""
        tail = state.tail
        assert tail is not None, "a prompt was fed"
        return cls(
            sinks=state.sinks,
            folded=state.folded,
            keys=tail.keys,
            values=tail.values,
            start=tail.start,
            length=tail.length,
            first=0 if tail.length < _NEAR else tail.length,
            stop=tail.length + room,
        )

    def serves(self, state: LayerState) -> bool:
        """Tell whether a layer still holds this, and has room for one token more."""
        tail = state.tail
        if tail is None or tail.keys is not self.keys or tail.start != self.start:
            return False
        is_inside = self.length <= tail.length < self.stop
        return is_inside and state.sinks is self.sinks and state.folded is self.folded

    @property
    def prefix(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of sinks that lie as they came: they are read with the newest columns."""
        sinks = self.sinks
        if not isinstance(sinks, DensePart) or sinks.rectangles is None or len(sinks.rectangles) != 1:
            return None
        return sinks.rectangles[0]

    @property
    def parts(self) -> list[Part]:
        """What attends by itself: the folded part, and sinks that are not read with the newest columns."""
        sinks = None if self.prefix is not None else self.sinks
        return [part for part in (sinks, self.folded) if part is not None and part.slots]


class StaticPast(Cache):
    """The past as a captured step sees it: everything at fixed places. Its numbers change, never their places."""

    def __init__(self, cache: FoldedCache, ids: Int[Tensor, "B 1"], *, room: int) -> None:
        super().__init__(layers=list(cache.layers))
        self.cache = cache
        for layer in cache.memory.layers.values():
            tail = layer.state.tail
            assert tail is not None, "a prompt was fed"
            layer.state = replace(layer.state, tail=tail.ahead(room))
        self.places = {index: _Place.of(layer.state, room) for index, layer in cache.memory.layers.items()}
        self.ids = ids.clone()
        self.where = torch.full((1,), cache.memory.fed, device=ids.device)  # position of the token
        self.positions = self.where.expand(len(ids))[:, None]
        self.attended: dict[int, Attended] = {}
        self._length = cache.memory.fed + 1  # of a mask that is never written out
        self._numbers = _numbers(self.places, ids.device)
        self._shared: dict[Any, Tensor] = {}  # of one run: layers whose tails are alike share columns and masks

    def serves(self, cache: FoldedCache) -> bool:
        """Tell whether every layer of the cache still holds what was captured, and has room."""
        layers = cache.memory.layers
        return all(place.serves(layers[index].state) for index, place in self.places.items())

    def begin(self) -> None:
        """Begin a run: nothing of an earlier one may be read."""
        self.attended, self._shared = {}, {}

    def token(self, index: int, read: Attended, *, copied: bool) -> tuple[NewTokens, Partial]:
        """Give the token of the last replay as a layer takes it; copied where somebody keeps it."""
        tail = self.cache.memory.layers[index].state.tail
        assert tail is not None, "the token was written into a tail"
        column = slice(tail.length, tail.length + 1)
        queries, whole = read.queries, read.whole
        if copied:
            queries = queries.clone()
            whole = Partial(whole.output, whole.log_sum_exp.clone())
        new = NewTokens(
            queries=queries,
            keys=tail.keys[:, :, column],
            values=tail.values[:, :, column],
            positions=tail.positions[:, column],
            valid=None,
        )
        return new, whole

    # What a model calls -----------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Hand one layer's new rows on to the attention function."""
        rows = CapturedRows(self, layer_idx, key_states, value_states)
        return rows, rows

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Columns fed so far: a number on the device, for one on the host would be captured as it is."""
        return self.where[0]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """The same number."""
        return self.where[0]

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """A length that says whose mask it is."""
        return FoldedLength(self._length), 0

    def attend(
        self,
        rows: CapturedRows,
        queries: Float[Tensor, "B G 1 D"],
        *,
        scale: float,
        sink_logits: Float[Tensor, " G"] | None,
    ) -> Float[Tensor, "B G 1 D"]:
        """Write one layer's new token into the room, and attend over all that it sees."""
        place = self.places[rows.index]
        column = self._column(place.start)
        place.keys.index_copy_(2, column, rows.keys)
        place.values.index_copy_(2, column, rows.values)
        step = AttentionStep(queries=queries, scale=scale)
        answers = []
        for part in place.parts:
            answer, after = part.attend(step)
            assert after is part, "a part that changes by attending lies in a tier"
            answers.append(answer)
        if place.first:
            older = slice(0, place.first)
            keys, values = place.keys[:, :, older], place.values[:, :, older]
            answers.append(partial(queries, keys, values, scale=scale))
        answers.append(self._over_newest(place, queries, scale))
        if sink_logits is not None:
            answers.append(softmax_sinks(queries, sink_logits))
        whole = merge(answers)
        self.attended[rows.index] = Attended(queries=queries, whole=whole, scale=scale)
        return whole.output

    # Inside -----------------------------------------------------------------------------------------------------

    def _over_newest(self, place: _Place, queries: Float[Tensor, "B G 1 D"], scale: float) -> Partial:
        """Attend over sinks and the columns of the room that are written."""
        newest = slice(place.first, place.stop)
        keys, values = place.keys[:, :, newest], place.values[:, :, newest]
        prefix = place.prefix
        if prefix is not None:
            keys = torch.cat([prefix[0], keys], dim=2)
            values = torch.cat([prefix[1], values], dim=2)
        mask = self._mask(place)
        return partial(queries, keys, values, scale=scale, mask=mask, sighted=True)

    def _column(self, start: int) -> Int[Tensor, "1"]:
        """The column of the token in tails that begin at `start`."""
        key = ("column", start)
        if key not in self._shared:
            self._shared[key] = self.where - start
        return self._shared[key]

    def _mask(self, place: _Place) -> Bool[Tensor, "1 1 1 S"]:
        """Columns under the mask that are written, the new one included."""
        key = _kind(place)
        if key not in self._shared:
            column = self._column(place.start)
            visible = self._numbers[key] <= column
            self._shared[key] = visible[None, None, None]
        return self._shared[key]


def _kind(place: _Place) -> tuple[int, int, int, int]:
    """What a mask depends on."""
    prefix = place.prefix
    return place.start, place.first, place.stop, 0 if prefix is None else prefix[0].shape[2]


def _numbers(places: Mapping[int, _Place], device: torch.device) -> dict[Any, Int[Tensor, " S"]]:
    """Number the columns that are read under a mask, for each kind of place: sinks are seen by every token."""
    found = {}
    for place in places.values():
        key = _kind(place)
        if key not in found:
            columns = torch.arange(place.first, place.stop, device=device)
            sinks = torch.full((key[-1],), _SEEN, device=device)
            found[key] = torch.cat([sinks, columns])
    return found
