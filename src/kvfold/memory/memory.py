"""Memory: the folding layers of one model together, with the counters and the boundaries that they share.

It counts the columns that were fed, decides after which of them to fold, commits a forward when its last layer is
done and undoes one that was interrupted. It knows no model and no transformers: hf/cache.py puts it there.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.budget.ledger import Ledger
from kvfold.errors import CacheError
from kvfold.memory.absorb import Made, absorb, looked_at, pin, pooled, refuse_excess, remembered, segment_of
from kvfold.memory.accounting import account
from kvfold.memory.fold import Rules, State
from kvfold.memory.layer import Layer, New, Timer
from kvfold.memory.request import Pass, Repetition, Segment

Runner = Callable[[Pass], Mapping[int, Made]]  # keys and values of a pass's rows, by folding layer
Repeater = Callable[[Repetition], Mapping[int, Tensor]]  # the most attention to each column of the tail, by layer
Judge = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # keys, values [B, S, L, H, D], positions, real -> worth


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundaries:
    """After which fed columns the cache folds by itself: at the end of the prompt, and every `stride` after it."""

    prompt: int | None = None  # None: the first forward is the prompt; 0: never, the caller folds
    stride: int | None = None

    def within(self, fed: int, new: int) -> list[int]:
        """Counts of new columns, out of `new` that follow `fed`, after which to fold."""
        marks = []
        if self.prompt is not None and fed < self.prompt <= fed + new:
            marks.append(self.prompt)
        if self.stride is not None and self.prompt is not None:
            first = max(fed - self.prompt, 0) // self.stride + 1
            marks += range(self.prompt + first * self.stride, fed + new + 1, self.stride)
        return [mark - fed for mark in marks]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A moment to go back to: the states of all layers and the counters. It keeps what it refers to alive."""

    states: Mapping[int, State]
    fed: int
    boundaries: Boundaries
    folding: int | None = None  # a fold that was interrupted and still has to end
    text: Tensor | None = None


class Memory:
    """Everything the folding layers hold. It changes with every forward and fold."""

    def __init__(self, rules: Rules, *, layers: Sequence[int], boundaries: Boundaries, plan: str) -> None:
        self.rules = rules
        self.plan = plan
        self.layers = {index: Layer(rules.of_layer(index)) for index in layers}
        self.boundaries = boundaries
        self.fed = 0
        self.tentative = False  # whether the newest columns may be taken back: folds then wait for the next forward
        self._as_given = boundaries
        self._open: Mark | None = None  # the forward that is running
        self._new = 0
        self.marks: Tensor | None = None  # of the running forward's tokens, uint8; set by whoever reads the text
        self._folding: int | None = None  # columns that a running fold folds; after an interrupt it goes on
        self._valid: Tensor | None = None  # the mask of that fold
        self.runner: Runner | None = None  # runs a pass through the model; set by whoever knows it
        self.repeater: Repeater | None = None  # repeats text through the model; set likewise
        self.text: Tensor | None = None  # ids of the tail's columns [B, columns], where a method needs them
        self.judge: Judge | None = None  # says what each token of a segment is worth; set likewise, where one can tell
        self.timer: Timer | None = None  # entered around the stages `attend`, `fold` and `append`; set to measure them
        self._guarded = 0  # columns that a mark refers to: buffers are copied before others are written there

    @property
    def rows(self) -> int:
        """Batch rows, 0 before the first forward."""
        return max((len(layer.state.seen) for layer in self.layers.values()), default=0)

    @property
    def seen(self) -> tuple[int, ...]:
        """Real tokens of each row."""
        return next((layer.state.seen for layer in self.layers.values()), ())

    def begin(self, new: int) -> None:
        """A forward of `new` columns starts; one that never ended is undone first."""
        self._settle()
        if self._waits:
            self._fold_what_is_due()
        self._open = self._mark()
        self._new = new
        if self.boundaries.prompt is None and not self.tentative:
            self.boundaries = replace(self.boundaries, prompt=self.fed + new)

    def attend(self, index: int, new: New, *, scale: float, valid: Bool[Tensor, "B fed"] | None = None) -> Float[
        Tensor, "B G Q D"
    ]:  # fmt: skip
        """Output of one layer for new tokens. `valid` may take back earlier columns that turned out to be pads."""
        assert self._open is not None, "no forward has begun"
        with nullcontext() if self.timer is None else self.timer("attend"):
            return self._attend(index, new, scale, valid)

    def _attend(
        self, index: int, new: New, scale: float, valid: Bool[Tensor, "B fed"] | None
    ) -> Float[Tensor, "B G Q D"]:
        layer = self.layers[index]
        layer.timer = self.timer
        tail = layer.state.tail
        if valid is not None and tail is not None and tail.length:
            layer.invalidate(valid[:, tail.start : tail.start + tail.length])
        if index == next(iter(self.layers)):
            self._check_pads(layer.state.seen, valid)
            self._vote(new)
        stops = self.boundaries.within(self.fed, self._new) if self.rules.folds and not self._waits else []
        output = layer.attend(new, scale=scale, boundaries=stops)
        if not self._waits:
            layer.spill()
        return output

    def _vote(self, new: New) -> None:
        """Let all layers say together what new tokens should read, where parts choose and it is time to."""
        votes = []
        for layer in self.layers.values():
            state = layer.state
            if state.folded is None or state.tail is None or not state.folded.slots:
                return
            with torch.no_grad(), torch.inference_mode(False):
                votes.append(state.folded.votes(layer.asking(new, state.tail, layer.scale or 1.0)))
            if votes[-1] is None or votes[-1].shape != votes[0].shape:
                return
        most = torch.stack(votes).amax(dim=0)
        for layer in self.layers.values():
            assert layer.state.folded is not None
            layer.state = replace(layer.state, folded=layer.state.folded.heeding(most))

    def read(self, ids: Int[Tensor, "B Q"] | None) -> None:
        """Note the running forward's ids, where a method needs text. Raises CacheError where there are none."""
        if not self.rules.chooser.needs.text:
            return
        if ids is None:
            raise CacheError(
                f"{self.plan} was to read embeddings; it goes by the text when it folds, and needs ids; feed input_ids"
            )
        ids = ids.to(torch.int32)
        self.text = ids if self.text is None else torch.cat([self.text, ids], dim=1)

    def commit(self) -> None:
        """The forward's last layer is done: its tokens stay."""
        self.marks = None
        self._open = None
        self.fed += self._new
        self._new = 0

    def undo(self) -> None:
        """Forget a forward that began and never ended."""
        if self._open is not None:
            self.restore(self._open)

    def mark(self) -> Mark:
        """A moment to come back to by `restore`."""
        self._settle()
        self._guarded = max(self._guarded, self.fed)
        return self._mark()

    def _mark(self) -> Mark:
        states = {index: layer.state for index, layer in self.layers.items()}
        return Mark(states=states, fed=self.fed, boundaries=self.boundaries, folding=self._folding, text=self.text)

    def restore(self, mark: Mark) -> None:
        """Everything as it was at the mark."""
        for index, layer in self.layers.items():
            layer.state = mark.states[index]
            if mark.fed < self._guarded:
                layer.own_tail()
        self.fed, self.boundaries, self._guarded = mark.fed, mark.boundaries, max(self._guarded, mark.fed)
        self._open, self._new, self.text = None, 0, mark.text
        self._folding, self._valid = mark.folding, None

    def fold(self, valid: Bool[Tensor, "B fed"] | None = None, *, until: int | None = None) -> None:
        """Fold the raw tail of every layer, all of it or only the columns before `until`.

        An interrupted fold goes on at the next forward or fold.
        """
        with nullcontext() if self.timer is None else self.timer("fold"):
            self._fold(valid, until)

    def _fold(self, valid: Bool[Tensor, "B fed"] | None, until: int | None) -> None:
        self.undo()
        valid = self._valid if valid is None else valid
        self._folding, self._valid = self.fed if until is None else until, valid
        tails = [(layer, layer.state.tail) for layer in self.layers.values()]
        if valid is not None:
            for layer, tail in tails:
                if tail is not None:
                    layer.invalidate(valid[:, tail.start : tail.start + tail.length])
        if self.rules.chooser.by_pass:
            self._fold_by_pass(self._folding)
        for layer, tail in tails if not self.rules.chooser.by_pass else ():
            columns = 0 if tail is None else min(self._folding - tail.start, tail.length)
            if until is None or columns > 0:
                layer.fold(columns=max(columns, 0))
        self._folding, self._valid = None, None

    def _fold_by_pass(self, until: int) -> None:
        """Fold the columns before `until` as the method's request says; all layers, or none."""
        layers = {index: layer for index, layer in self.layers.items() if layer.state.tail is not None}
        first = next(iter(layers.values()), None)
        columns = 0 if first is None or first.state.tail is None else until - first.state.tail.start
        if first is None or columns <= 0:
            return
        with torch.inference_mode(False), torch.no_grad():
            for layer in layers.values():
                layer.state = pin(layer.state, layer.rules)
            pinned = [layer.state for layer in layers.values()]
            segment = segment_of(pinned, first.rules, columns)
            if self.text is not None:
                segment = replace(segment, ids=self.text[:, :columns].long())
            if bool(segment.real.any()):
                segment = replace(segment, worth=self._worth(segment))
            made = self._made(request := self.rules.chooser.request(segment))
            states = {
                index: absorb(layer.state, layer.rules, columns=columns, request=request, kept=request.kept[:, place],
                              made=made.get(index))
                for place, (index, layer) in enumerate(layers.items())
            }  # fmt: skip
        for index, state in states.items():
            layers[index].state = state
        self.text = None if self.text is None else self.text[:, columns:].clone()

    def _made(self, request: Pass) -> Mapping[int, Made]:
        """Keys and values of a pass's rows, by layer."""
        if not bool(request.real.any()):
            return {}
        if request.pooled:
            return {index: pooled(layer.state, request) for index, layer in self.layers.items()}
        assert self.runner is not None, "a plan that folds by passes needs a model to run them"
        return self.runner(request)

    def _worth(self, segment: Segment) -> Float[Tensor, "B L H S"] | None:
        """What each slot of a segment is worth: to the newest queries, when its text is repeated, or as was learned."""
        if self.rules.chooser.needs.queries:
            every = [(layer.state, layer.scale) for layer in self.layers.values()]
            return torch.stack([looked_at(state, segment.real.shape[1], scale or 1.0) for state, scale in every], dim=1)
        states = [layer.state for layer in self.layers.values()]
        if not self.rules.chooser.needs.repetition:
            columns = segment.real.shape[1]
            if self.judge is None:
                return None
            return self.judge(*remembered(states, columns), segment.positions, segment.real)
        assert segment.ids is not None, "ids are noted when a method repeats them"
        assert self.repeater is not None, "a plan that repeats text needs a model to do so"
        seen = torch.tensor(self.seen, device=segment.real.device)
        found = self.repeater(Repetition(ids=segment.ids, real=segment.real, first_position=seen))
        return torch.stack([found[index][..., : segment.ids.shape[1]] for index in self.layers], dim=1)

    @property
    def _waits(self) -> bool:
        """Whether folds wait for the next forward: tokens may be taken back, or a fold needs a forward of its own."""
        return self.tentative or self.rules.chooser.by_pass

    def obey(self, rules: Rules, plan: str) -> None:
        """Fold by other rules of the same observed needs from now on.

        What they no longer allow is dropped at once, where the method has what it judges by. If that fails, nothing
        has changed.
        """
        self._settle()
        before, old = self._mark(), (self.rules, self.plan)
        try:
            self._put_rules(rules, plan)
            if rules.chooser.once:
                refuse_excess([layer.state for layer in self.layers.values()], rules)
            for layer in () if rules.chooser.once else self.layers.values():
                layer.fold(columns=0)
        except BaseException:
            self._put_rules(*old)
            self.restore(before)
            raise

    def crop(self, columns: int) -> None:
        """Forget the newest columns of every layer, or of none."""
        self._settle()
        before = self._mark()
        try:
            for layer in self.layers.values():
                layer.crop(columns)
                if self.fed - columns < self._guarded:
                    layer.own_tail()
        except BaseException:
            self.restore(before)
            raise
        self.fed -= columns
        self.text = None if self.text is None else self.text[:, : self.text.shape[1] - columns].clone()

    def take_rows(self, indices: Sequence[int]) -> None:
        """Keep these rows, in this order, repeats allowed."""
        self._settle()
        for layer in self.layers.values():
            if layer.state.seen:
                layer.take_rows(indices)
        self.text = None if self.text is None else self.text[list(indices)]

    def reset(self) -> None:
        """Forget everything; the rules stay."""
        self._open, self._new, self.fed, self._guarded = None, 0, 0, 0
        self._folding, self._valid, self.tentative, self.text = None, None, False, None
        self.boundaries = self._as_given
        for layer in self.layers.values():
            layer.state = State()

    def fork(self) -> "Memory":
        """A second memory that goes its own way: folded parts are shared (they never change), raw buffers copied."""
        self._settle()
        twin = copy.copy(self)
        twin.layers, twin._guarded = {}, 0
        for index, layer in self.layers.items():
            own = Layer(layer.rules)
            own.scale, own.state = layer.scale, layer.state
            own.own_tail()
            if own.state.folded is not None:
                own.state = replace(own.state, folded=own.state.folded.apart())
            twin.layers[index] = own
        return twin

    def _settle(self) -> None:
        """Undo a forward that never ended, and end a fold that was interrupted."""
        self.undo()
        if self._folding is not None:
            self.fold(until=self._folding)

    def _put_rules(self, rules: Rules, plan: str) -> None:
        self.rules, self.plan = rules, plan
        for index, layer in self.layers.items():
            layer.rules = rules.of_layer(index)

    def _fold_what_is_due(self) -> None:
        """Fold at the boundaries that earlier forwards passed: none of their columns will be taken back now."""
        if self.fed == 0 or not self.rules.folds:
            return
        if self.boundaries.prompt is None:
            self.boundaries = replace(self.boundaries, prompt=self.fed)
        tails = [layer.state.tail for layer in self.layers.values()]
        start = min((tail.start for tail in tails if tail is not None), default=self.fed)
        for mark in self.boundaries.within(start, self.fed - start):
            self.fold(until=start + mark)

    def _check_pads(self, seen: tuple[int, ...], valid: Bool[Tensor, "B fed"] | None) -> None:
        """Refuse a mask that takes for a pad what is folded as a token, or the other way round."""
        real = [self.fed] * len(seen) if valid is None else valid.sum(dim=1).tolist()
        if seen and list(seen) != real:
            raise CacheError(
                f"rows of {real} real tokens were given by the mask (no mask: all are real); the cache has seen "
                f"{list(seen)}; give the whole mask, pads 0, and fold rows that ended early by fold(valid=...)"
            )

    def ledger(self, *, device: str, other_bytes: int, adapter_bytes: int = 0) -> Ledger:
        """What is held now; `device` is the model's, `other_bytes` what layers that never fold hold.

        `adapter_bytes` are what a method has learned, held once a model.
        """
        return account(
            self.layers, self.text, plan=self.plan, fed=self.fed, seen=self.seen, device=device,
            other_bytes=other_bytes, weight_bytes=self.rules.codec.weight_bytes + adapter_bytes,
        )  # fmt: skip
