"""The cache that transformers sees: a Cache whose full-attention layers are kvfold's memory.

`update` hands a new-rows object to the attention function instead of tensors; the rows are stored there, where
queries are known. One counter, `fed`, is the sequence length for transformers; sliding layers stay stock. A forward
that never reached its last layer is undone by the next one.
"""

import copy
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from kvfold.budget.ledger import Ledger
from kvfold.errors import CacheError
from kvfold.hf import stock_layers
from kvfold.hf.binding import ModelLease
from kvfold.hf.passes import ModelPasses
from kvfold.hf.stock_layers import StockState
from kvfold.memory.accounting import account
from kvfold.memory.context import RowAdapter
from kvfold.memory.forward import Forward, Mark, Text
from kvfold.memory.memory import Memory
from kvfold.plan import Plan


class NewRows:
    """Keys and values on their way from `update` to kvfold's attention function. Any other use is an error."""

    __slots__ = ("cache", "index", "keys", "values")

    def __init__(self, cache: "FoldedCache", index: int, keys: Tensor, values: Tensor) -> None:
        self.cache, self.index, self.keys, self.values = cache, index, keys, values

    def __getattr__(self, name: str) -> NoReturn:
        raise CacheError(
            f"another attention function asked a folded cache for {name!r}; only kvfold's can read it; "
            'call model.set_attn_implementation("kvfold") before the forward'
        )


class FoldingLayer(CacheLayerMixin):
    """How transformers sees one folding layer: as long as everything that was fed."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether tokens can be taken back without a trace."""
        return self.memory.rules.allows_crop

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the memory allocates when it sees the first rows."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Never called: FoldedCache.update hands rows over itself."""
        raise AssertionError("a folding layer is updated through its cache")

    def get_seq_length(self) -> int:
        """Columns fed so far."""
        return self.memory.fed

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Every column, from the first: our mask is never written out over them."""
        return self.memory.fed + _count(query_length), 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same, as earlier transformers call it."""
        return -1


class FoldedCache(Cache):
    """The past of one model, folded by a plan. It changes with every forward."""

    def __init__(
        self,
        *,
        memory: Memory,
        plan: Plan,
        stock: Sequence[CacheLayerMixin],
        lease: ModelLease,
        adapter: RowAdapter | None,
    ) -> None:
        layers = [FoldingLayer(memory) if stock_layers.folds(layer) else layer for layer in stock]
        super().__init__(layers=layers)
        self.memory = memory
        self.plan = plan
        self.lease = lease
        self.adapter = adapter
        memory.access = ModelPasses(self, adapter)
        self._empty = memory.mark()
        self._forward: Forward | None = None  # the one that is running
        self._may_roll_back = False  # the newest tokens may be taken back: folds wait for the forward after
        self._branched = False
        self._last_index = -1  # the newest layer of the running forward
        self._before: dict[int, StockState] = {}  # stock layers as they were when it began

    # What transformers asks -------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Take one layer's new rows: stock layers store them at once, folding ones when their queries are known."""
        if layer_idx <= self._last_index or self._last_index < 0:
            self._begin(key_states.shape[0], key_states.shape[2])
        self._last_index = layer_idx
        if layer_idx in self.memory.layers:
            rows = NewRows(self, layer_idx, key_states, value_states)
            return rows, rows
        layer: Any = self.layers[layer_idx]
        answer = layer.update(key_states, value_states, *args, **kwargs)
        stock_layers.release_long_storage(layer)
        self.finish(layer_idx)
        return answer

    @property
    def forward(self) -> Forward:
        """Give the running forward, through which the attention function attends."""
        assert self._forward is not None, "no forward has begun"
        return self._forward

    def finish(self, index: int) -> None:
        """One layer is done; after the last one the forward's tokens stay."""
        if index == len(self.layers) - 1:
            self.memory.commit()
            self._forward = None
            self._last_index = -1
            self._before = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, whichever layer is asked."""
        if self.lease.drop_watch is not None:
            self.lease.drop_watch.note_asked(self)
        return self.memory.fed

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Columns fed so far: where the next query stands."""
        return self.memory.fed

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a layer's mask must cover."""
        self._undo()
        layer: Any = self.layers[layer_idx]
        return layer.get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take back the newest columns; a negative number, as transformers gives it.

        Raises CacheError where they are folded already, or where their attention was added up.
        """
        tokens_to_remove = int(tokens_to_remove)  # earlier transformers gives a tensor
        if tokens_to_remove > 0:
            raise CacheError(
                f"crop({tokens_to_remove}) was asked for; it takes the number of tokens to remove, negative; "
                f"give crop({-tokens_to_remove}) to remove that many"
            )
        self._undo()
        self._before = self._stock_states()
        try:
            for layer in self._stock():
                layer.crop(tokens_to_remove)
            self.memory.crop(-tokens_to_remove)
        except Exception as error:
            self._put_stock_back()
            if isinstance(error, CacheError):
                raise
            raise CacheError(
                f"asked to remove {-tokens_to_remove} tokens; a sliding layer has dropped what they pushed out of its "
                "window; call activate_past_recording() before they are fed"
            ) from error
        self._before = {}

    def activate_past_recording(self) -> None:
        """Called before the newest tokens may be taken back (prompt lookup): folds wait for the forward after."""
        super().activate_past_recording()
        self._may_roll_back = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows as a beam search wants them. Afterwards the cache is branched until one row is kept."""
        self._take_rows(beam_idx.tolist())
        self._branched = True

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._take_rows([row for row in range(len(self.memory.seen)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some rows. Keeping one row ends a branch."""
        rows = torch.arange(len(self.memory.seen))[indices.cpu()].flatten().tolist()
        self._take_rows(rows)
        self._branched = self._branched and len(rows) > 1

    def reset(self) -> None:
        """Forget everything; plan and model stay."""
        self.memory.restore(self._empty)
        for layer in self._stock():
            layer.reset()
        self._forward, self._may_roll_back = None, False
        self._branched, self._last_index, self._before = False, -1, {}

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before the first forward."""
        return len(self.memory.seen) or -1

    # What users ask ---------------------------------------------------------------------------------------------

    def fold(self, valid: Bool[Tensor, "B fed"] | None = None, *, until: int | None = None) -> None:
        """Fold what is still raw, all or only columns before `until`. `valid` marks tokens, False for pads.

        Give it when rows ended at different times: `generate()` appends pads that its own mask calls real.
        """
        self._undo()
        if valid is not None and valid.shape[1] != self.memory.fed:
            raise CacheError(
                f"a mask of {valid.shape[1]} columns was given; {self.memory.fed} were fed; "
                "give one entry for each of them"
            )
        self.memory.fold(valid, until=until)

    def rebudget(self, *, keep: float | None = None, tokens: int | None = None, max_bytes: int | None = None) -> None:
        """Another budget from now on. A lower one evicts at once, or at the next fold where the method needs queries.

        Raises PlanError where the plan has no budget and BudgetError where the new one holds nothing.
        """
        plan = self.plan.with_budget(keep=keep, tokens=tokens, max_bytes=max_bytes)
        old = self.memory.rules
        rules = plan.rules(pinned=old.pinned, layers=len(self.memory.layers), layout=old.layout, opened=old.placement)
        self._undo()
        self.memory.set_rules(rules)
        self.plan = plan

    def ledger(self) -> Ledger:
        """What is held now, in bytes and slots."""
        self._undo()
        device = next(
            (tensor.device.type for layer in self.memory.layers.values() for _, tensor in layer.state.tensors()), "cpu"
        )
        return account(
            self.memory,
            plan=str(self.plan),
            device=device,
            other_bytes=sum(stock_layers.bytes_of(layer) for layer in self._stock()),
            adapter_bytes=0 if self.adapter is None else self.adapter.size_bytes,
        )

    def fork(self) -> "FoldedCache":
        """A second cache with the same past that goes its own way; folded parts are shared until one changes them."""
        self._undo()
        stock: list[Any] = [
            DynamicLayer() if index in self.memory.layers else copy.deepcopy(layer)
            for index, layer in enumerate(self.layers)
        ]
        twin = FoldedCache(
            memory=self.memory.fork(),
            plan=self.plan,
            stock=stock,
            lease=self.lease.again(),
            adapter=self.adapter,
        )
        twin._branched = self._branched
        return twin

    def mark(self) -> tuple[Mark, dict[int, StockState]]:
        """A moment to come back to by `restore`, over several forwards."""
        self._undo()
        return self.memory.mark(), self._stock_states()

    def restore(self, mark: tuple[Mark, dict[int, StockState]]) -> None:
        """Everything as it was at the mark."""
        self.memory.restore(mark[0])
        self._before, self._last_index = mark[1], -1
        self._put_stock_back()

    # A forward's life -------------------------------------------------------------------------------------------

    def _begin(self, rows: int, new: int) -> None:
        self._undo()
        held = len(self.memory.seen)
        if self._branched and new > 1:
            raise CacheError(
                f"a turn was fed to a cache of {held} beams; they are branches of one past; "
                "keep one of them by batch_select_indices first"
            )
        if held and rows != held:
            if rows % held:
                raise CacheError(
                    f"{rows} rows were fed; the cache holds {held}; feed as many, or keep some by batch_select_indices"
                )
            self.batch_repeat_interleave(rows // held)
            self._branched = True
        if self.lease.drop_watch is not None:
            self.lease.drop_watch.refuse_recomputing(self.memory.fed, new)
        self._before = self._stock_states()
        text = self._text_of(rows, new)  # before a fold that runs text itself
        self._forward = self.memory.begin(new, text=text, may_roll_back=self._may_roll_back)

    def _text_of(self, rows: int, new: int) -> Text:
        """Read the running forward's tokens as text, as far as the plan wants them.

        Raises CacheError where a method reads ids and there are none.
        """
        ids, rules = self.lease.take_token_ids(rows, new), self.memory.rules
        if ids is None and rules.reads_ids:
            raise CacheError(
                f"{self.plan} was to read embeddings; it goes by the text when it folds, and needs ids; feed input_ids"
            )
        classes = None if rules.delimiters is None else self.lease.delimiter_classes(ids)
        return Text(ids=ids if rules.reads_ids else None, classes=classes)

    def _undo(self) -> None:
        """Take back a forward that never reached its last layer."""
        if self._last_index >= 0:
            if self._forward is not None:
                self.memory.restore(self._forward.before)
            self._forward = None
            self._put_stock_back()
            self._last_index = -1

    def _stock(self) -> list[Any]:
        return [layer for index, layer in enumerate(self.layers) if index not in self.memory.layers]

    def _stock_states(self) -> dict[int, StockState]:
        return {
            index: StockState.of(layer)
            for index, layer in enumerate(self.layers)
            if isinstance(layer, DynamicSlidingWindowLayer)
        }

    def _put_stock_back(self) -> None:
        for index, state in self._before.items():
            state.put_back(self.layers[index])
        self._before = {}

    def _take_rows(self, rows: Sequence[int]) -> None:
        self._undo()
        self.memory.take_rows(rows)
        for layer in self._stock():
            layer.batch_select_indices(torch.tensor(list(rows)))


def _count(query_length: Any) -> int:
    """Columns asked for: transformers before 5.3 gives the new positions, later ones their number."""
    return query_length.shape[0] if isinstance(query_length, Tensor) else query_length
