"""RunningForward: the forward that a model runs over a folded cache, from its first layer to its last.

The memory and the stock layers begin it together, keep it together when the last layer is done, and are put back
together when it never got there: the next one finds everything as it was. Forwards whose tokens may be taken back are
remembered until the next one begins.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.errors import CacheError
from kvfold.hf.binding import ModelLease
from kvfold.hf.generate_call import ANY, GenerateCall, GivenText
from kvfold.hf.stock_layers import StockLayers, StockState
from kvfold.hf.tuned_layers import Active, refuse_switched
from kvfold.memory.forward import WHOLE, Forward, Reading, Text
from kvfold.memory.memory import Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class NewColumns:
    """What a forward's mask and positions say of its new columns, the same for all layers."""

    past: Bool[Tensor, "B fed"] | None  # earlier columns that are tokens; None: all
    valid: Bool[Tensor, "B Q"] | None  # new ones; None: all
    positions: Int[Tensor, "#B Q"]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A forward that was kept, and may be taken back from its newest column on."""

    forward: Forward
    stock: dict[int, StockState]  # stock layers after it


class RunningForward:
    """At most one forward of one cache. It changes with every layer."""

    def __init__(self, memory: Memory, stock: StockLayers, lease: ModelLease, *, last: int) -> None:
        self.may_roll_back = False  # nobody says which tokens may be taken back: folds wait for the forward after
        self.call: GenerateCall | None = None  # while `generate` runs on the cache
        self._any_may_go = False  # as it was before
        self.adapters: Active | None = None  # of the model, when the text was fed; None: not known
        self.last = last  # index of the model's last layer
        self.reached = -1  # the newest layer of the running forward; layers come in order
        self.attended = -1  # the newest attention layer; a layer may be recurrent and attend
        self.is_complete = False  # the last layer is done
        self.columns: NewColumns | None = None  # read by the first folding layer
        self._memory, self._stock, self._lease = memory, stock, lease
        self.forward: Any = None  # the memory's, through which folding layers attend; None between forwards
        self._before: dict[int, StockState] | None = None  # stock layers as they were when it began
        self._kept: list[_Kept] = []  # pieces of the newest forward, where tokens may be taken back
        self._continues = False  # the next forward is another piece of the same
        self._held = contextlib.ExitStack()  # what is on the model while `generate` speculates

    def begin(self, rows: int, new: int, *, plan: str) -> None:
        """Begin a forward of `new` columns. Raises ModelError where transformers would drop the cache on its way."""
        if self._lease.drop_watch is not None:
            self._lease.drop_watch.refuse_recomputing(self._memory.fed, new)
        if new > 1:  # a turn; single tokens do not pay for a walk over the model
            self._lease.tuned_layers.look()
        if self._lease.tuned_layers.found or self.adapters:
            self._note_adapters()
        elif not self._memory.fed:
            self.adapters = ()
        if self._before is None:  # recurrent layers before the first attention layer may have been reached
            self._before = self._stock.states()
        text = self._text(rows, new, plan)  # before a fold that runs text itself
        self._lease.forward_end.note(None)  # a fold may run the decoder, whose end is not this forward's
        reading = self._reading(new)
        if not self._continues:
            self._kept.clear()
        self.forward = self._memory.begin(new, text=text, reading=reading)
        self._lease.forward_end.note(self)

    def fold_waiting(self, new: int) -> None:
        """Fold what waits for the next forward, of `new` columns, before it is known where these stand."""
        self.undo()
        self._lease.forward_end.note(None)  # a fold may run the decoder
        self._memory.fold(before=self._reading(new))

    def _reading(self, new: int) -> Reading:
        """Say what is known of a forward of `new` columns before it begins."""
        if self.call is not None:
            return self.call.reading(self._memory.fed, new)
        return ANY if self.may_roll_back else WHOLE

    def reach_recurrent(self, index: int) -> None:
        """Note that a recurrent layer is reached, in a hybrid model often before the first attention layer."""
        if index < self.reached:  # an earlier forward never ended
            self.undo()
        if self._before is None:
            self._before = self._stock.states()
        self.reached = index

    @property
    def awaits_attention(self) -> bool:
        """Whether recurrent layers were reached, and no attention layer yet."""
        return self.forward is None and self.reached >= 0

    @property
    def stock_before(self) -> dict[int, StockState]:
        """Stock layers as they were before the running forward, or as they are."""
        return self._stock.states() if self._before is None else self._before

    def commit(self) -> None:
        """Keep the forward's tokens: the decoder is done."""
        if self.forward is not None:
            self._memory.commit()
            if self.forward.scope.trail is not None:
                self._kept.append(_Kept(self.forward, self._stock.states()))
            self._end()

    def undo(self) -> None:
        """Take back a forward that never reached its end."""
        if self.reached < 0:
            return
        if self.is_complete:  # every layer is done, and the decoder's end was not seen
            self.commit()
            return
        if self.forward is not None:
            self._memory.restore(self.forward.before)
        if self._before is not None:
            self._stock.put_back(self._before)
        self._end()

    def crop(self, columns: int) -> None:
        """Take back the newest columns of every layer, or of none.

        Raises CacheError where they are folded already, or where a sliding layer cannot go back.
        """
        self.undo()
        before = self._stock.states()
        to = self._memory.fed - columns
        kept = next((one for one in reversed(self._kept) if one.forward.before.fed < to), next(iter(self._kept), None))
        try:
            if kept is None or columns == 0 or to < kept.forward.before.fed:
                self._stock.crop(-columns)
                self._memory.crop(columns)
            else:
                self._stock.put_back(kept.stock)  # later pieces of the forward go as a whole
                self._stock.crop(to - kept.forward.stop)
                self._memory.restore(kept.forward.mark_at(to))
        except Exception as error:
            self._stock.put_back(before)
            if isinstance(error, CacheError):
                raise
            raise CacheError(
                f"asked to remove {columns} tokens; a sliding layer has dropped what they pushed out of its window, or "
                "a recurrent one has no way back; call activate_past_recording() before they are fed, or use marks"
            ) from error

    def begin_call(self, given: GivenText, ids: Int[Tensor, "B S"] | None) -> None:
        """Know from now on what `generate` was given. Raises CacheError where it cannot go on."""
        self.undo()
        self._end_call()
        self._lease.tuned_layers.look()
        self._note_adapters()
        self._any_may_go = self.may_roll_back
        self.call = GenerateCall.of(given, self._memory, ids if given.is_whole else None)

    def end_call(self, given: GivenText) -> None:
        """Forget it: that `generate` is done."""
        if self.call is not None and self.call.given is given:
            self._end_call()

    def _end_call(self) -> None:
        if self.call is None:
            return
        self.call, self.may_roll_back = None, self._any_may_go
        self._held.close()
        self._kept.clear()
        if not self.may_roll_back:
            self._stock.stop_recording()

    def speculate(self) -> None:
        """Know that from now on the newest tokens may be taken back."""
        self.may_roll_back = True
        binding = self._lease.binding
        if self.call is None or self.call.speculates or binding is None:
            return
        self.call = replace(self.call, speculates=True)
        self._held.enter_context(binding.forward_pieces.held())

    def next_piece(self, new: int) -> tuple[int, int]:
        """Give the columns of a forward that the model runs next, out of `new`: first and stop."""
        if self.call is None or not self.call.speculates:
            return 0, new
        self.undo()
        start = self.call.skipped(self._memory.fed, new)
        return start, start + self.call.piece(self._memory, new - start)

    @contextlib.contextmanager
    def continuing(self) -> Iterator[None]:
        """Take the next forward for another piece of the one before."""
        before, self._continues = self._continues, True
        try:
            yield
        finally:
            self._continues = before

    def _note_adapters(self) -> None:
        """Note the adapters that act in the model. Raises CacheError where others did when the text was fed."""
        now = self._lease.tuned_layers.active()
        if self._memory.fed and self.adapters is not None:
            refuse_switched(self.adapters, now)
        self.adapters = now

    def _end(self) -> None:
        self.forward, self.columns, self._before = None, None, None
        self.reached, self.attended, self.is_complete = -1, -1, False

    def _text(self, rows: int, new: int, plan: str) -> Text:
        """Read the new tokens as text, as far as the plan wants them.

        Raises CacheError where a method reads ids and there are none.
        """
        lease, rules = self._lease, self._memory.rules
        ids = lease.take_token_ids(rows, new) if lease.records_token_ids else None
        if ids is None and rules.reads_ids:
            raise CacheError(
                f"{plan} was to read embeddings; it goes by the text when it folds, and needs ids; feed input_ids"
            )
        classes = None if rules.delimiters is None else lease.delimiter_classes(ids)
        digested = lease.given_ids.take(rows, new)
        if digested is not None and self.call is None and new == 1 and digested.device.type != "cpu":
            digested = None  # a caller's loop shall not wait for its newest token; `generate` does by itself
        if digested is not None and self.call is not None and self._memory.fed < self.call.text.stop:
            self.call.refuse_out_of_turn(self._memory.fed, digested)
        return Text(ids=ids if rules.reads_ids else None, classes=classes, digested=digested)
