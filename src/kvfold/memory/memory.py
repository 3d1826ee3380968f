"""Memory: the folding layers of one model together, with the counters, boundaries and text that they share.

It counts the columns that were fed, decides after which of them to fold, and keeps or undoes a forward as a whole. It
knows no model: hf/cache.py puts it into one, and gives it access to one where methods run rows or text (context.py).
"""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from kvfold.memory.context import ModelAccess
from kvfold.memory.fold_layers import close_gaps, evict_excess, fold_each, fold_jointly, invalidate, raw_text
from kvfold.memory.forward import WHOLE, Boundaries, Forward, Mark, Reading, Text
from kvfold.memory.layer import Layer
from kvfold.memory.rules import Rules
from kvfold.memory.transcript import Transcript


class Memory:
    """Everything that the folding layers hold. It changes with every forward and fold."""

    def __init__(self, rules: Rules, *, layers: Sequence[int], boundaries: Boundaries) -> None:
        self.rules = rules
        self.layers = {index: Layer(index, rules.of_layer(index)) for index in layers}
        self.access: ModelAccess | None = None  # set by whoever knows the model
        self.transcript = Transcript()
        self.fed = 0  # columns, pads included
        self._boundaries = boundaries
        self._open: Forward | None = None  # the forward that is running
        self._folding: int | None = None  # columns that a running fold folds; after an interrupt it goes on
        self._fold_mask: Tensor | None = None  # the mask of that fold
        self._has_waited = False  # folds may be overdue
        self._frozen_columns = 0  # that marks refer to: buffers are copied before these are written over

    @property
    def seen(self) -> tuple[int, ...]:
        """Count the real tokens of each row; empty before the first forward."""
        return next((layer.state.seen for layer in self.layers.values()), ())

    # Forwards ---------------------------------------------------------------------------------------------------

    def begin(self, new: int, *, text: Text | None = None, reading: Reading = WHOLE) -> Forward:
        """Open a forward of `new` columns; one that never ended is undone first.

        Where any of its tokens may be taken back, and where a fold runs a forward itself, folds wait for the next
        forward, or for the text to end that it reads a piece of; where gaps are closed too, for positions are given
        before a forward begins.
        """
        self._settle()
        is_open = reading.candidates is None
        waits = is_open or self.rules.select.chooses_jointly or self.rules.closes_gaps
        if waits or self._has_waited:
            self._fold_what_is_due(reading)
        self._has_waited = is_open
        before = self._mark()
        if self._boundaries.prompt is None and not is_open:
            self._boundaries = replace(self._boundaries, prompt=reading.prompt(self.fed, new))
        stops = self._boundaries.within(self.fed, new) if self.rules.folds and not waits else ()
        self._open = Forward(
            self.layers,
            before,
            new=new,
            stops=stops,
            text=(text or Text()).wanted_by(self.rules),
            offloads=not waits and self.rules.offload_above is not None,
            boundaries=self._boundaries,
            reading=reading,
        )
        return self._open

    def commit(self) -> None:
        """Keep the tokens of the running forward: its last layer is done."""
        assert self._open is not None, "no forward has begun"
        self.transcript = raw_text(self._open.scope.transcript, self.layers)
        self.fed += self._open.new
        self._open = None

    def mark(self) -> Mark:
        """Remember this moment, to come back to it by `restore`."""
        self._settle()
        self._frozen_columns = max(self._frozen_columns, self.fed)
        return self._mark()

    def restore(self, mark: Mark) -> None:
        """Put everything back as it was at the mark."""
        self.fed, self._boundaries, self.transcript = mark.fed, mark.boundaries, mark.transcript
        for index, layer in self.layers.items():
            layer.state = mark.states[index]
        if mark.fed < self._frozen_columns:  # another mark reads the columns that come next
            self._leave_buffers()
        self._frozen_columns = max(self._frozen_columns, mark.fed)
        self._open, self._folding, self._fold_mask = None, mark.folding, None

    # Folds ------------------------------------------------------------------------------------------------------

    def fold(
        self, valid: Bool[Tensor, "B fed"] | None = None, *, until: int | None = None, before: Reading | None = None
    ) -> None:
        """Fold the raw tail of every layer: all of it, the columns before `until`, or what waits `before` a forward.

        An interrupted fold goes on at the next forward or fold. One that fails leaves layers folded or as they were.
        """
        if before is not None:
            self._settle()
            self._fold_what_is_due(before)
            return
        self._undo()
        valid = self._fold_mask if valid is None else valid
        self._folding, self._fold_mask = self.fed if until is None else until, valid  # set first, for interrupts
        invalidate(self.layers, valid)
        try:
            if self.rules.select.chooses_jointly:
                fold_jointly(self.layers, self._folding, self.transcript, self.access)
            else:
                fold_each(self.layers, self._folding, self.transcript, everything=until is None)
            close_gaps(self.layers, self.rules)
        except Exception:  # no interrupt: what it has not folded waits, raw, for the next fold
            self._folding, self._fold_mask = None, None
            raise
        self.transcript = raw_text(self.transcript, self.layers)
        self._folding, self._fold_mask = None, None  # an interrupt does not get here
        self.rules.tidy_place()

    def set_rules(self, rules: Rules) -> None:
        """Fold by other rules of the same records from now on.

        What they no longer allow is dropped at once, where the method has what it chooses by. If that fails, nothing
        has changed.
        """
        self._settle()
        before, old = self._mark(), self.rules  # states are values: a mark is enough to undo all
        try:
            self._put_rules(rules)
            evict_excess(self.layers, rules, self.transcript)
        except BaseException:  # interrupts too
            self._put_rules(old)
            self.restore(before)
            raise

    # Rows and columns -------------------------------------------------------------------------------------------

    def crop(self, columns: int) -> None:
        """Forget the newest columns of every layer, or of none."""
        self._settle()
        before = self._mark()
        try:
            for layer in self.layers.values():
                layer.state = layer.state.cropped(columns, allowed=self.rules.allows_crop)
        except BaseException:
            self.restore(before)
            raise
        self.transcript = self.transcript.cropped(columns, fed=self.fed)
        self.fed -= columns  # only when every layer has agreed
        if self.fed < self._frozen_columns:
            self._leave_buffers()

    def take_rows(self, rows: Sequence[int]) -> None:
        """Pick these rows, in this order, repeats allowed."""
        self._settle()
        with torch.inference_mode(False):  # buffers are written by later forwards, in any mode
            self.transcript = self.transcript.take_rows(rows)
            for layer in self.layers.values():
                if layer.state.seen:
                    layer.state = layer.state.take_rows(rows)

    def fork(self) -> "Memory":
        """Copy the memory for a second way on: folded parts are shared (they never change), raw buffers copied."""
        self._settle()
        twin = copy.copy(self)  # rules, access and counters; the rest is copied below
        twin._frozen_columns = 0
        twin.transcript = self.transcript.with_fresh_buffers()
        twin.layers = {index: layer.fork() for index, layer in self.layers.items()}
        return twin

    # Inside -----------------------------------------------------------------------------------------------------

    def _mark(self) -> Mark:
        return Mark(
            states={index: layer.state for index, layer in self.layers.items()},
            fed=self.fed,
            boundaries=self._boundaries,
            transcript=self.transcript,
            folding=self._folding,
        )

    def _leave_buffers(self) -> None:
        """Go on in fresh buffers, so that what a mark refers to is not written over."""
        self.transcript = self.transcript.with_fresh_buffers()
        for layer in self.layers.values():
            layer.state = layer.state.with_fresh_tail()

    def _undo(self) -> None:
        """Forget a forward that began and never ended."""
        if self._open is not None:
            self.restore(self._open.before)

    def _settle(self) -> None:
        """Undo a forward that never ended, and end a fold that was interrupted; if it fails, the next one will say."""
        self._undo()
        if self._folding is not None:
            with suppress(Exception):  # what waits to be folded stands in nobody's way
                self.fold(until=self._folding)

    def _put_rules(self, rules: Rules) -> None:
        self.rules = rules
        for index, layer in self.layers.items():
            layer.rules = rules.of_layer(index)

    def _fold_what_is_due(self, reading: Reading) -> None:
        """Fold at the boundaries that earlier forwards passed: none of their columns will be taken back now."""
        if self.fed == 0 or not self.rules.folds or reading.is_inside(self.fed):
            return
        if self._boundaries.prompt is None:
            self._boundaries = replace(self._boundaries, prompt=self.fed)
        tails = [layer.state.tail for layer in self.layers.values()]
        start = min((tail.start for tail in tails if tail is not None), default=self.fed)  # the oldest raw column
        for mark in self._boundaries.within(start, self.fed - start):
            self.fold(until=start + mark)
