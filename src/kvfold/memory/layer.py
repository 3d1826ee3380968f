"""Layer: what one attention layer remembers, and the two things it does: attend and fold.

A layer is its sinks (the first real tokens, raw), its folded part and its raw tail. New tokens attend over all of them,
merged exactly, and join the tail; records note what a method will read. The state is a value, so a forward is undone by
putting the old one back. It knows no model, and no method.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.attention.kernels.compiled import Stored, decode
from kvfold.attention.merge import merge
from kvfold.attention.partial import Partial, partial, softmax_sinks
from kvfold.errors import FileError
from kvfold.memory.dense import DensePart
from kvfold.memory.fold import fold_layer
from kvfold.memory.part import Part
from kvfold.memory.pending import PendingTokens
from kvfold.memory.recorders import Observation, Record
from kvfold.memory.rules import Rules
from kvfold.memory.state import LayerState
from kvfold.memory.step import AttentionStep, ForwardScope
from kvfold.memory.tail import Tail
from kvfold.memory.transcript import Transcript

Timer = Callable[[str], AbstractContextManager]  # times a stage by its name: "attend", "fold", "append"

_NEAR = 256  # columns of a tail that are copied behind the sinks for one new token: quicker than one more merge
_PADDED_PIECE = 512  # new columns at a time when rows are padded: masks are written out, so they must stay small


UNTIMED = nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTokens:
    """New tokens of one forward, as one layer gets them."""

    queries: Float[Tensor, "B G Q D"]
    keys: Float[Tensor, "B H Q D"]
    values: Float[Tensor, "B H Q E"]
    positions: Int[Tensor, "#B Q"]
    valid: Bool[Tensor, "B Q"] | None  # None: no pads
    hidden_states: Float[Tensor, "B Q width"] | None = None  # what entered the layer, where a method records it
    sink_logits: Float[Tensor, " G"] | None = None  # of models whose softmax has one more term that is no slot

    def piece(self, start: int, stop: int) -> "NewTokens":
        """Cut out some of the columns."""
        span = slice(start, stop)
        return NewTokens(
            queries=self.queries[:, :, span],
            keys=self.keys[:, :, span],
            values=self.values[:, :, span],
            positions=self.positions[:, span],
            valid=None if self.valid is None else self.valid[:, span],
            hidden_states=None if self.hidden_states is None else self.hidden_states[:, span],
            sink_logits=self.sink_logits,
        )


class Layer:
    """One layer's memory. It changes: `state` is replaced by every append and fold, never edited."""

    def __init__(self, index: int, rules: Rules) -> None:
        self.index = index
        self.rules = rules
        self.state = LayerState()
        self.scale: float | None = None  # of the attention scores; the first forward says it
        self.timer: Timer | None = None

    def attend(
        self,
        new: NewTokens,
        *,
        scale: float,
        forward: ForwardScope,
        stops: Sequence[int] = (),
    ) -> Float[Tensor, "B G Q D"]:
        """Attend with new tokens, which join the tail. `stops` are counts of new columns after which to fold."""
        self.scale = scale
        count, trail = new.queries.shape[2], forward.trail
        if not stops and trail is None and (new.valid is None or count <= _PADDED_PIECE):
            return self._attend_piece(new, scale, forward)
        # A token that may be taken back goes by itself where more than the tail would have to forget it.
        singly = count if trail is None or not self._remembers else trail.first
        outputs = []
        start = 0
        for stop in _pieces(count, stops, padded=new.valid is not None, singly=singly):
            outputs.append(self._attend_piece(new.piece(start, stop), scale, forward))  # B G Q D of the piece
            start, before_fold = stop, self.state
            # Tokens of a later piece see what the fold has left.
            if stop in stops:
                self.fold(forward.transcript)
            if trail is not None:
                trail.note(self.index, stop, before_fold, self.state)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def follow(self, new: NewTokens, whole: Partial, *, scale: float, transcript: Transcript, folds: bool) -> None:
        """Take one token of each row that has attended already, and is written behind the tail (Tail.ahead).

        `whole` is what it read. Afterwards everything is as if it had attended here.
        """
        self.scale = scale
        state = self.state
        assert state.tail is not None, "the token was written into a tail"
        tail = state.tail.written()
        recorded, pending = state.recorded, None
        if self.rules.recorders:
            recorded, pending = self._recorded(new, whole, tail, state.folded, scale)
        self.state = replace(
            state,
            tail=tail,
            recorded=recorded,
            pending=pending,
            seen=tuple([old + 1 for old in state.seen]),
        )
        if folds:
            self.fold(transcript)

    def fold(self, transcript: Transcript, columns: int | None = None) -> None:
        """Fold the oldest columns of the tail (all by default), and evict what the budget no longer allows."""
        if self.state.tail is None or self.scale is None:
            return
        with UNTIMED if self.timer is None else self.timer("fold"), torch.inference_mode(False), torch.no_grad():
            self.state = fold_layer(
                self.state, self.rules, self.index, columns=columns, scale=self.scale, transcript=transcript
            )

    def load(
        self,
        keys: Float[Tensor, "B H S D"],
        values: Float[Tensor, "B H S E"],
        *,
        start: int,
    ) -> None:
        """Append keys and values whose attention is not wanted, at positions from `start` on; records see nothing."""
        tail = Tail.empty(keys, values) if self.state.tail is None else self.state.tail
        rows, _, count, _ = keys.shape
        positions = torch.arange(start, start + count, device=keys.device).expand(rows, -1)
        tail = tail.append(keys, values, positions=positions, valid=None)
        # Pending tokens are the newest ones of a tail.
        self.state = replace(self.state.settled, tail=tail, seen=(start + count,) * rows)  # no pads: rows are alike

    def fork(self) -> "Layer":
        """Copy the layer for a second way on: the folded part is shared, the raw tail copied."""
        twin = Layer(self.index, self.rules)
        twin.scale, twin.state = self.scale, self.state.with_fresh_tail()
        if twin.state.folded is not None:
            twin.state = replace(twin.state, folded=twin.state.folded.fork())
        return twin

    def offload(self, transcript: Transcript) -> None:
        """Fold the older raw columns into the tier where there are more than `offload_above`; nothing is lost by it."""
        tail, limit = self.state.tail, self.rules.offload_above
        if tail is not None and limit is not None and tail.length > limit:
            # A tier without room is no reason to lose the forward: the next fold says so.
            with suppress(FileError):
                self.fold(transcript, columns=tail.length - limit // 2)  # half stays: not every forward offloads

    @property
    def _remembers(self) -> bool:
        """Whether a token leaves more behind than itself: records, or what is selected."""
        return bool(self.rules.recorders) or self.rules.placement is not None

    def _attend_piece(self, new: NewTokens, scale: float, forward: ForwardScope) -> Tensor:
        state = self.state
        tail = Tail.empty(new.keys, new.values) if state.tail is None else state.tail
        before = tail.length  # columns that all new tokens see
        with UNTIMED if self.timer is None else self.timer("append"):
            # The new tokens join the tail before they attend, for they see one another.
            positions = new.positions.expand(new.queries.shape[0], -1)
            tail = tail.append(new.keys, new.values, positions=positions, valid=new.valid)
        step = AttentionStep(
            queries=new.queries,
            scale=scale,
            positions=new.positions,
            valid=new.valid,
            recent=lambda: state.recent,
            forward=forward,
        )
        answers, folded = self._over_parts(step, tail, before)
        if new.sink_logits is not None:
            answers.append(softmax_sinks(new.queries, new.sink_logits))
        # Always in the same order, so that sums are rounded alike.
        whole = answers[0] if len(answers) == 1 else merge(answers)
        seen = state.seen or (0,) * new.queries.shape[0]  # empty before the first forward
        count = new.queries.shape[2]
        seen = tuple([old + count for old in seen]) if new.valid is None else _seen_after(seen, new.valid)
        recorded, pending = state.recorded, None
        if self.rules.recorders:
            recorded, pending = self._recorded(new, whole, tail, folded, scale)
        # Written out: `replace` takes three times as long, in every layer of every step.
        self.state = LayerState(
            sinks=state.sinks,
            folded=folded,
            tail=tail,
            recorded=recorded,
            pending=pending,
            seen=seen,
            closed=state.closed,
        )
        return whole.output

    def _over_parts(self, step: AttentionStep, tail: Tail, before: int) -> tuple[list[Partial], Part | None]:
        """Attend over sinks, folded part and tail, `before` columns of it all seen; give also the part afterwards."""
        state = self.state
        held = (state.sinks, state.folded)
        parts = [part for part in held if part is not None and part.slots]
        single = step.queries.shape[2] == 1
        answers, afterwards = _over_stored(step, parts, tail) if single else ([], [])
        is_done = bool(answers)
        near = None
        if single and not is_done and before < _NEAR:
            near = _before_tail(state.sinks)
        folded = state.folded
        for part, after in zip_longest(parts, afterwards):
            if after is None:
                if part is state.sinks and near is not None:  # they stand before the tail, and are attended with it
                    continue
                answer, after = part.attend(step)
                answers.append(answer)
            folded = after if part is state.folded else folded
        if not is_done:
            answers += _over_tail(step, tail, before, near)
        return answers, folded

    def _recorded(
        self, new: NewTokens, whole: Partial, tail: Tail, folded: Part | None, scale: float
    ) -> tuple[Mapping[str, Record], PendingTokens | None]:
        """Record the new tokens: each record observes them, and is opened at the first ones. One token may wait."""
        recorded, pending = self.state.recorded, self.state.pending
        waits = new.queries.shape[2] == 1 and new.hidden_states is None
        if waits and recorded and not tail.padded:
            pending = PendingTokens.after(pending, new.queries, whole.log_sum_exp, scale=scale)
            if not pending.is_full:
                return recorded, pending
            return pending.seen_by(recorded, tail, folded), None
        # Tensors made in inference mode could not be written by a later forward outside of it.
        with torch.inference_mode(False), torch.no_grad():
            held = self.state.records
            seen = Observation(
                queries=new.queries,
                log_sum_exp=whole.log_sum_exp,
                scale=scale,
                positions=new.positions,
                valid=new.valid,
                tail=tail,
                before=tail.length - new.queries.shape[2],
                folded=folded,
                hidden_states=new.hidden_states,
            )
            records = dict(held)  # a copy: states are values
            for recorder in self.rules.recorders:
                record = held.get(recorder.name)
                records[recorder.name] = (recorder.open(new.keys) if record is None else record).observe(seen)
            return records, None


def _over_stored(step: AttentionStep, parts: Sequence[Part], tail: Tail) -> tuple[list[Partial], list[Part | None]]:
    """Attend with one new token, in one pass, over all that the compiled kernel reads; nothing where there is none.

    Gives also the parts afterwards: None for those that attend themselves.
    """
    if tail.stored is None or tail.padded:
        return [], []
    stored: list[Stored] = []
    afterwards: list[Part | None] = []
    for part in parts:
        found, after = part.stored, part
        if found is None:
            found, after = part.stored_for(step)
        if found is not None:
            stored.append(found)
        afterwards.append(None if found is None else after)
    stored.append(tail.stored)
    read = decode(
        step.queries,
        stored,
        heads=tail.keys.shape[1],
        scale=step.scale,
        newest=tail.length,
    )
    return ([], []) if read is None else ([Partial(*read)], afterwards)


def _before_tail(sinks: Part | None) -> tuple[Tensor, Tensor] | None:
    """Give keys and values of sinks that lie as they came: copied before a short tail, they save a merge."""
    if not isinstance(sinks, DensePart) or sinks.rectangles is None or len(sinks.rectangles) != 1:
        return None
    return sinks.rectangles[0]


def _seen_after(before: tuple[int, ...], valid: Bool[Tensor, "B Q"]) -> tuple[int, ...]:
    """Count the real tokens of each row after new ones, of which some are pads."""
    added = valid.sum(dim=1).tolist()
    return tuple(old + int(more) for old, more in zip(before, added, strict=True))


def _over_tail(step: AttentionStep, tail: Tail, before: int, prefix: tuple[Tensor, Tensor] | None) -> list[Partial]:
    """Attend over earlier raw columns, and causally over the new ones."""
    queries = step.queries
    stop = before + queries.shape[2]
    if stop == before + 1:
        return [over_tail(queries, tail, slice(0, stop), step.scale, prefix=prefix)]
    causal = over_tail(queries, tail, slice(before, stop), step.scale, causal=True)
    return [over_tail(queries, tail, slice(0, before), step.scale), causal] if before else [causal]


def over_tail(
    queries: Float[Tensor, "B G Q D"],
    tail: Tail,
    span: slice,
    scale: float,
    *,
    causal: bool = False,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Partial:
    """Attend over some columns of the tail, and over keys and values that stand before them."""
    keys, values = tail.keys[:, :, span], tail.values[:, :, span]
    mask = tail.valid[:, None, None, span] if tail.padded else None  # B 1 1 S
    if prefix is not None:
        keys, values = torch.cat([prefix[0], keys], dim=2), torch.cat([prefix[1], values], dim=2)
        # Prefix slots are real for every row.
        mask = None if mask is None else torch.nn.functional.pad(mask, (prefix[0].shape[2], 0), value=True)
    return partial(queries, keys, values, scale=scale, causal=causal, mask=mask)


def _pieces(count: int, stops: Sequence[int], *, padded: bool, singly: int) -> list[int]:
    """List where pieces of `count` new columns end: at folds, and often enough when masks are written out.

    Behind the first `singly` of them each column is a piece.
    """
    steps = range(_PADDED_PIECE, count, _PADDED_PIECE) if padded else ()
    return sorted({*stops, *steps, *range(max(singly, 1), count), count})
