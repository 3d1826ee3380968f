"""The cache that transformers sees: a Cache whose full-attention layers are kvfold's memory.

`update` hands a new-rows object to the attention function instead of tensors; the rows are stored there, where
queries are known. One counter, `fed`, is the sequence length for transformers; sliding layers stay stock. A forward
that never reached its last layer is undone by the next one. What a forward calls stays outside compiled graphs.
"""

import copy
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvfold.budget.ledger import Ledger
from kvfold.errors import CacheError
from kvfold.hf import stock_layers
from kvfold.hf.argument import given_to_generate
from kvfold.hf.beams import Beams
from kvfold.hf.binding import ModelLease
from kvfold.hf.budgets import NewBudget, rebudgeted
from kvfold.hf.forward import RunningForward
from kvfold.hf.handle import FoldingLayer, NewRows
from kvfold.hf.passes import ModelPasses
from kvfold.hf.recurrent import RecurrentSeams, folding_layer, unfolded_layer
from kvfold.hf.saving import Saving
from kvfold.hf.snapshot import CacheMark
from kvfold.hf.stock_layers import StockLayers
from kvfold.integers import MOST, integer
from kvfold.memory.accounting import account, device_of
from kvfold.memory.context import RowAdapter
from kvfold.memory.memory import Memory
from kvfold.memory.rules import Positions
from kvfold.plan import Plan


class FoldedCache(Saving, Beams, RecurrentSeams):
    """The past of one model, folded by a plan. It changes with every forward."""

    def __init__(
        self,
        *,
        memory: Memory,
        plan: Plan,
        stock: Sequence[Any],
        lease: ModelLease,
        adapter: RowAdapter | None,
    ) -> None:
        layers: list[Any] = [folding_layer(one, memory) if stock_layers.folds(one) else one for one in stock]
        super().__init__(layers=layers)
        self.memory = memory
        self.plan = plan
        self.lease = lease
        self.adapter = adapter
        memory.access = ModelPasses(self, adapter)
        self._empty = memory.mark()
        self.stock = StockLayers({at: layer for at, layer in enumerate(layers) if type(layer) is not FoldingLayer})
        self.running = RunningForward(memory, self.stock, lease, last=len(layers) - 1)
        self.is_branched = False

    @property
    def positions(self) -> Positions:
        """Whether slots keep the positions of their tokens, or are moved together at every fold."""
        return "kept" if self.memory.rules.rotary is None else "compact"

    @property
    def next_position(self) -> int:
        """Where the next token stands, in the row that is furthest: what the model's positions must reach."""
        if not self.memory.rules.closes_gaps:
            return self.memory.fed
        return max(next(iter(self.memory.layers.values())).state.next_positions, default=0)

    @property
    def keyword(self) -> dict[str, Any]:
        """The cache as the keyword that `generate` of this release of transformers takes."""
        return given_to_generate(self)

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Take one layer's new rows: stock layers store them at once, folding ones when their queries are known."""
        running = self.running
        if running.forward is None or layer_idx <= running.attended:
            self.begin(key_states.shape[0], key_states.shape[2])
        running.reached = running.attended = layer_idx
        if layer_idx in self.memory.layers:
            rows = NewRows(self, layer_idx, key_states, value_states)
            return rows, rows
        layer: Any = self.layers[layer_idx]
        answer = layer.update(key_states, value_states, *args, **kwargs)
        stock_layers.release_long_storage(layer)
        running.is_complete = layer_idx == running.last
        return answer

    @torch.compiler.disable
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, whichever layer is asked."""
        if self.lease.drop_watch is not None:
            self.lease.drop_watch.note_asked(self)
        if self.running.is_complete:
            self.running.commit()
        return self.memory.fed

    @torch.compiler.disable
    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Columns fed so far: where the next query stands."""
        return self.memory.fed

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a layer's mask must cover."""
        self.running.undo()
        if isinstance(query_length, int) and query_length == 0:
            raise CacheError("a forward of no tokens was asked for; there is nothing to attend with; feed at least one")
        layer: Any = self.layers[layer_idx]
        if not isinstance(layer, CacheLayerMixin):  # a recurrent layer is asked for the mask of all
            layer = self.layers[next(iter(self.memory.layers))]
        return layer.get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take back the newest columns; a negative number, as transformers gives it.

        Raises CacheError where they are folded already, or where their attention was added up.
        """
        # Earlier transformers gives a tensor.
        removed = integer("tokens_to_remove", tokens_to_remove, least=-MOST, error=CacheError)
        if removed > 0:
            raise CacheError(
                f"crop({removed}) was asked for; it takes the number of tokens to remove, negative; "
                f"give crop({-removed}) to remove that many"
            )
        self.running.crop(-removed)

    def activate_past_recording(self) -> None:
        """Called before the newest tokens may be taken back (prompt lookup): they leave no trace then."""
        super().activate_past_recording()
        self.running.speculate()

    def reset(self) -> None:
        """Forget everything; plan and model stay."""
        self.running.undo()
        self.memory.restore(self._empty)
        self.stock.reset()
        self.running.may_roll_back = False
        self.is_branched = False

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before the first forward."""
        return len(self.memory.seen) or -1

    def fold(self, valid: Bool[Tensor, "B fed"] | None = None, *, until: int | None = None) -> None:
        """Fold what is still raw, all or only columns before `until`. `valid` marks tokens, False for pads.

        Give it when rows ended at different times: `generate()` appends pads that its own mask calls real.
        """
        self.running.undo()
        if until is not None and not (type(until) is int and 0 <= until <= self.memory.fed):
            until = integer("until", until, least=0, most=self.memory.fed, error=CacheError)
        if valid is not None and valid.shape[1] != self.memory.fed:
            raise CacheError(
                f"a mask of {valid.shape[1]} columns was given; {self.memory.fed} were fed; "
                "give one entry for each of them"
            )
        self.memory.fold(valid, until=until)

    def rebudget(self, **budget: Unpack[NewBudget]) -> None:
        """Another budget from now on (keep=, tokens= or max_bytes=), or limit_bytes= of the file of a disk tier.

        A lower budget evicts at once, or at the next fold where the method needs queries. Raises BudgetError where the
        plan has none to change, and where the new one holds nothing; nothing has changed then.
        """
        self.running.undo()
        self.plan = rebudgeted(self.plan, self.memory, self.lease.binding, **budget)

    def ledger(self) -> Ledger:
        """What is held now, in bytes and slots."""
        self.running.undo()
        return self._account()

    def __repr__(self) -> str:
        held = "in the middle of a forward" if self.running.reached >= 0 else self._account().short
        return f"<{type(self).__name__} {self.plan}: {held}>"

    def _account(self) -> Ledger:
        adapter_bytes = 0 if self.adapter is None else self.adapter.size_bytes
        sizes = {"other_bytes": self.stock.size_bytes, "adapter_bytes": adapter_bytes}
        return account(self.memory, plan=str(self.plan), device=device_of(self.memory), **sizes)

    def fork(self) -> "FoldedCache":
        """A second cache with the same past that goes its own way; folded parts are shared until one changes them."""
        self.running.undo()
        stock: list[Any] = [
            unfolded_layer(layer) if index in self.memory.layers else copy.copy(layer)  # filled below
            for index, layer in enumerate(self.layers)
        ]
        twin = FoldedCache(
            memory=self.memory.fork(),
            plan=self.plan,
            stock=stock,
            lease=self.lease.again(),
            adapter=self.adapter,
        )
        twin._empty = self._empty  # not what it begins with, which would be kept in memory for good
        twin.stock.follow(self.stock)
        twin.running.adapters = self.running.adapters
        twin.is_branched = self.is_branched
        return twin

    def mark(self) -> CacheMark:
        """A moment to come back to by `restore`, over several forwards."""
        self.running.undo()
        return CacheMark(self.memory.mark(), self.stock.states(), self.is_branched)

    def restore(self, mark: CacheMark) -> None:
        """Everything as it was at the mark."""
        self.running.undo()
        self.memory.restore(mark.memory)
        self.stock.put_back(mark.stock)
        self.is_branched = mark.is_branched

    def begin(self, rows: int, new: int) -> None:
        """Begin a forward of some rows; more rows than are held repeat the past, as beam search wants it."""
        if not self.running.awaits_attention:
            self.running.undo()
        held = len(self.memory.seen)
        if held and (rows != held or (self.is_branched and new > 1)):
            self.branch(rows, new)
        self.running.begin(rows, new, plan=str(self.plan))
