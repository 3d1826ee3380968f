"""BatchedCache: several folded caches that one forward of one-token rows goes through, each with its own past.

The model sees a batch: embeddings, projections and feed-forward layers run on all rows together. Attention goes row by
row through each cache, so that rows may differ in plan, length and history. Nothing is padded and nothing is copied.
Rows join and leave between any two forwards. A forward that fails is undone in every row.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvfold.errors import CacheError
from kvfold.hf import stock_layers
from kvfold.hf.argument import given
from kvfold.hf.cache import FoldedCache
from kvfold.hf.handle import FoldedLength


class BatchedCache(Cache):
    """Folded caches of one model, one row each, for decoding. It changes: rows join and leave.

    >>> batch = BatchedCache([chat.cache for chat in chats])
    >>> logits = batch.decode(model, [5, 17, 9])  # the next token of each chat

    Each row's cache holds one conversation. It may be used alone between two forwards of the batch.
    """

    def __init__(self, rows: Sequence[FoldedCache] = ()) -> None:
        super().__init__(layers=[])
        self.rows: tuple[FoldedCache, ...] = ()
        self._reached = -1  # the newest layer of the running forward; layers come in order
        for row in rows:
            self.join(row)

    def join(self, row: FoldedCache) -> None:
        """Add a row behind the others. Raises CacheError for a cache of another model, of several rows, or a twin."""
        if row.batch_size not in (-1, 1):
            _refuse(f"a cache of {row.batch_size} rows was to join", "each row is one conversation", "give one row")
        if row.stock.has_recurrent:
            _refuse(f"a cache of {row.lease.name} was to join", "recurrent layers go row by row", "decode it by itself")
        if row.lease.gives_positions:
            _refuse('a cache with positions="compact" was to join', "its folds move its place", "decode it by itself")
        if row in self.rows:
            _refuse("a cache was to join twice", "a past goes one way only", "join cache.fork() instead")
        if self.rows and row.lease.binding is not self.rows[0].lease.binding:
            _refuse(f"a cache of {row.lease.name} was to join", "the batch is another model's", "make another batch")
        self.rows = (*self.rows, row)
        self.layers = self.rows[0].layers  # only their kinds are read

    def leave(self, row: FoldedCache) -> None:
        """Take a row out; its cache stays as it is. Raises CacheError for one that is not in the batch."""
        if row not in self.rows:
            _refuse("a cache was to leave a batch", "it is not in it", "join it first")
        self.rows = tuple(other for other in self.rows if other is not row)

    @property
    def positions(self) -> Int[Tensor, "B 1"]:
        """Where the next token of each row stands in its text; to be given as `position_ids`."""
        return torch.tensor([[_seen(row)] for row in self.rows])

    def decode(self, model: PreTrainedModel, tokens: Sequence[int]) -> Float[Tensor, "B vocabulary"]:
        """Feed one token to each row; return the logits of the tokens after them."""
        if len(tokens) != len(self.rows):
            truth = f"the batch has {len(self.rows)} rows"
            _refuse(f"{len(tokens)} tokens were fed", truth, "give one token a row")
        ids = torch.tensor(tokens, device=model.device)[:, None]
        with torch.no_grad():
            answer: Any = model(
                input_ids=ids,
                position_ids=self.positions.to(model.device),
                use_cache=True,
                **given(model, self),
            )
        return answer.logits[:, -1]

    # What transformers calls ------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Take one layer's new rows: their attention goes cache by cache."""
        if self._reached < 0 or layer_idx <= self._reached:
            self._begin(key_states)
        self._reached = layer_idx
        for row in self.rows:
            row.running.reached = layer_idx
        stock = None
        if layer_idx not in self.rows[0].memory.layers:
            stock = self._stock_rows(key_states, value_states, layer_idx)
        rows = BatchedRows(self, layer_idx, key_states, value_states, stock)
        return rows, rows

    def end_layer(self, index: int) -> None:
        """Note that every row is through a layer: after the last one the forward may be kept."""
        for row in self.rows:
            row.running.is_complete = index == row.running.last

    def commit(self) -> None:
        """Keep the tokens of all rows: the decoder is done."""
        for row in self.rows:
            row.running.commit()
        self._reached = -1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Never known: each row has a length of its own. Raises CacheError."""
        _refuse(
            "one length was asked of a batch of caches", "each row has its own", "give position_ids=batch.positions"
        )

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Columns fed to the longest row; only masks read it, and a batch has none."""
        return max((row.memory.fed for row in self.rows), default=0)

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """As long as the longest row: no mask is ever written out over it."""
        return FoldedLength(self.get_query_offset() + 1), 0

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: what is done with one past is done through its own cache."""
        _refuse("a batch of caches was to be cropped or picked from", "its rows differ", "use each row's own cache")

    reset = reorder_cache = batch_repeat_interleave = batch_select_indices = crop

    # Inside -----------------------------------------------------------------------------------------------------

    def _begin(self, keys: Float[Tensor, "B H Q D"]) -> None:
        """Begin a forward in every row."""
        rows, _, new, _ = keys.shape
        if rows != len(self.rows) or new != 1:
            truth = f"the batch has {len(self.rows)} rows, and decodes one token of each"
            _refuse(f"{rows} rows of {new} tokens were fed", truth, "read longer text through the row's own cache")
        self._reached = -1
        reader = next((row.lease for row in self.rows if row.lease.records_token_ids), None)
        ids = None if reader is None else reader.take_token_ids(rows, 1)
        given_ids = self.rows[0].lease.given_ids
        all_given = given_ids.take(rows, 1)
        for number, row in enumerate(self.rows):
            row.lease.note_token_ids(None if ids is None else ids[number : number + 1])
            given_ids.note(None if all_given is None else all_given[number : number + 1])
            row.begin(1, 1)
        self.rows[0].lease.forward_end.note(self)  # the last row noted itself alone

    def _stock_rows(self, keys: Tensor, values: Tensor, index: int) -> list[tuple[Tensor, Tensor]]:
        """Let each row's stock layer take its token; give what that layer holds then."""
        held = []
        for number, row in enumerate(self.rows):
            layer: Any = row.layers[index]
            held.append(layer.update(keys[number : number + 1], values[number : number + 1]))
            stock_layers.release_long_storage(layer)
        return held


class BatchedRows:
    """Keys and values of a batch on their way from `update` to kvfold's attention function."""

    __slots__ = ("cache", "index", "keys", "stock", "values")

    def __init__(
        self,
        cache: BatchedCache,
        index: int,
        keys: Float[Tensor, "B H 1 D"],
        values: Float[Tensor, "B H 1 E"],
        stock: list[tuple[Tensor, Tensor]] | None,
    ) -> None:
        self.cache, self.index, self.keys, self.values = cache, index, keys, values
        self.stock = stock  # of a layer that never folds: what each row holds there, the new token included

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # a compiler looks at an object before it leaves it alone
            raise AttributeError(name)
        raise CacheError(
            "a batch of folded caches was given to a model that they were not made for, or whose attention was set "
            f"after them (asked for {name!r}); make new ones by kvfold.cache(model, ...)"
        )


def _seen(row: FoldedCache) -> int:
    return next(iter(row.memory.seen), 0)


def _refuse(asked: str, truth: str, remedy: str) -> NoReturn:
    raise CacheError(f"{asked}; {truth}; {remedy}")
