"""Layer: what one attention layer remembers, and the three things it does: attend, append, fold.

A layer is its sinks (the first real tokens, raw), its folded part and its raw tail. New tokens attend over all of
them, merged exactly, and join the tail; at a boundary the tail's tokens are folded by fold.py. The state is a value,
so a forward is undone by putting the old one back. It knows no model, and methods only by what they need.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from kvfold.attention.merge import merge
from kvfold.attention.partial import Partial, partial
from kvfold.attention.scores import attention_sums as attention_mass
from kvfold.errors import CacheError
from kvfold.memory.asking import Asking
from kvfold.memory.fold import Rules, State, fold
from kvfold.memory.part import Part
from kvfold.memory.tail import PAD, Tail
from kvfold.memory.transcript import ends
from kvfold.memory.window import remember

_NEAR = 256  # columns of a tail that are copied beside the sinks for one new token: quicker than a part more to merge
_PADDED_PIECE = 512  # new columns at a time when rows are padded: masks are written out, so they must stay small


@dataclass(frozen=True, slots=True, kw_only=True)
class New:
    """New tokens of one forward, as one layer gets them."""

    queries: Float[Tensor, "B G Q D"]
    keys: Float[Tensor, "B H Q D"]
    values: Float[Tensor, "B H Q E"]
    positions: Int[Tensor, "#B Q"]
    valid: Bool[Tensor, "B Q"] | None  # None: no pads
    marks: UInt8[Tensor, "B Q"] | None = None  # uint8, what the text says about ends (place/sentences.py)

    def piece(self, start: int, stop: int) -> "New":
        """Some of the columns."""
        some = slice(start, stop)
        return New(
            queries=self.queries[:, :, some],
            keys=self.keys[:, :, some],
            values=self.values[:, :, some],
            positions=self.positions[:, some],
            valid=None if self.valid is None else self.valid[:, some],
            marks=None if self.marks is None else self.marks[:, some],
        )


class Layer:
    """One layer's memory. It changes: `state` is replaced by every append and fold, never edited."""

    def __init__(self, rules: Rules, *, start: int = 0) -> None:
        self.rules = rules
        self.state = State(start=start)
        self.scale: float | None = None

    def attend(self, new: New, *, scale: float, boundaries: Sequence[int] = ()) -> Float[Tensor, "B G Q D"]:
        """Output for new tokens, which join the tail. `boundaries` are counts of new columns after which to fold."""
        self.scale = scale
        count = new.queries.shape[2]
        outputs, begun = [], 0
        for stop in _stops(count, boundaries, padded=new.valid is not None):
            while begun < stop:
                end = begun + self._reach(stop - begun)
                outputs.append(self._attend_piece(new.piece(begun, end) if (begun, end) != (0, count) else new, scale))
                begun = end
            if stop in boundaries:
                self.fold()
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def fold(self, columns: int | None = None) -> None:
        """Fold the oldest columns of the tail (all of it by default), and evict what the budget no longer allows."""
        if self.state.tail is None or self.scale is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            self.state = fold(self.state, self.rules, columns=columns, scale=self.scale)

    def invalidate(self, valid: Bool[Tensor, "B length"]) -> None:
        """Turn columns of the tail into pads where a later mask says that they are none of the row's tokens."""
        tail = self.state.tail
        if tail is None:
            return
        gone = tail.valid & ~valid
        if gone.any():
            lost = gone.sum(dim=1).tolist()
            seen = tuple(seen - int(count) for seen, count in zip(self.state.seen, lost, strict=True))
            window = self.state.window
            with torch.inference_mode(False):
                if window is not None:
                    window = window.without(tail.positions[:, : tail.length].masked_fill(~gone, PAD))
                self.state = replace(self.state, tail=tail.without(gone), window=window, seen=seen)

    def crop(self, columns: int) -> None:
        """Forget the newest columns; they must still be in the raw tail and unobserved."""
        tail = self.state.tail
        if columns == 0:
            return
        if tail is None or columns > tail.length:
            held = 0 if tail is None else tail.length
            raise CacheError(
                f"asked to remove {columns} tokens, but only the newest {held} are still raw; fold later or crop less"
            )
        if self.rules.chooser.needs.mass:
            raise CacheError(
                "asked to remove tokens whose attention was already added up; use a plan that keeps no such sums"
            )
        removed = tail.valid[:, tail.length - columns :].sum(dim=1).tolist()
        seen = tuple(seen - int(count) for seen, count in zip(self.state.seen, removed, strict=True))
        window = self.state.window
        if window is not None:
            with torch.inference_mode(False):
                window = window.before(torch.tensor(seen, device=window.positions.device))
        self.state = replace(self.state, tail=tail.cropped(tail.length - columns), window=window, seen=seen)

    def own_tail(self) -> None:
        """Copy the tail into buffers of its own, so that what others see in the old ones is not written over."""
        if self.state.tail is not None:
            with torch.inference_mode(False):
                self.state = replace(self.state, tail=self.state.tail.after(0))

    def take_rows(self, indices: Sequence[int]) -> None:
        """Keep these rows, in this order, repeats allowed."""
        with torch.inference_mode(False):
            self.state = self.state.rows(indices)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor held, as `part.name`."""
        return self.state.tensors()

    def _attend_piece(self, new: New, scale: float) -> Tensor:
        tail = self.state.tail
        if tail is None:
            counts_mass = self.rules.chooser.needs.mass
            marked = self.rules.placer is not None and self.rules.placer.reads_text
            tail = Tail.empty(new.keys, new.values, start=self.state.start, counts_mass=counts_mass, marked=marked)
        before, count = tail.length, new.queries.shape[2]
        positions = new.positions.expand(new.queries.shape[0], -1)
        folded = self._asked(new, tail, scale)
        tail = tail.append(new.keys, new.values, positions=positions, valid=new.valid, marks=new.marks)
        sinks = self.state.sinks
        near = sinks.whole() if sinks is not None and count == 1 and before < _NEAR else None
        parts = [part for part in (None if near else sinks, folded) if part is not None and part.slots]
        answers = [part.attend(new.queries, scale=scale) for part in parts]
        if count == 1:
            answers.append(_over_tail(new.queries, tail, slice(0, before + 1), scale, behind=near))
        else:
            if before:
                answers.append(_over_tail(new.queries, tail, slice(0, before), scale))
            answers.append(_over_tail(new.queries, tail, slice(before, before + count), scale, causal=True))
        whole = merge(answers)
        seen = self.state.seen or (0,) * new.queries.shape[0]
        added = [count] * len(seen) if new.valid is None else new.valid.sum(dim=1).tolist()
        seen = tuple(old + int(more) for old, more in zip(seen, added, strict=True))
        self.state = replace(self.state, tail=tail, folded=folded, seen=seen)
        self._observe(new, whole, before, scale)
        return whole.output

    def spill(self) -> None:
        """Let the older raw columns move away, where there are too many and nothing is lost by it."""
        tail, limit = self.state.tail, self.rules.spill
        if tail is not None and limit is not None and tail.length > limit:
            self.fold(columns=tail.length - limit // 2)

    def _reach(self, new: int) -> int:
        """How many new tokens attend together: all, unless a part wants to be asked in between."""
        folded = self.state.folded
        return new if folded is None or not folded.slots else folded.reach(new)

    def _asked(self, new: New, tail: Tail, scale: float) -> Part | None:
        """The folded part as the new tokens will read it."""
        folded = self.state.folded
        if folded is None or not folded.slots:
            return folded
        with torch.no_grad(), torch.inference_mode(False):
            return folded.asked(self.asking(new, tail, scale))

    def asking(self, new: New, tail: Tail, scale: float) -> Asking:
        """What a part is told of new tokens."""
        ended = None
        if tail.marks is not None and new.marks is not None and tail.length:
            ended = ends(tail.marks[:, tail.length - 1], new.marks[:, 0])
        return Asking(queries=new.queries, scale=scale, valid=new.valid, window=self.state.window, ended=ended)

    def _observe(self, new: New, whole: Partial, before: int, scale: float) -> None:
        """Keep what the method needs of these queries: a window of them, or the attention that they gave."""
        needs = self.rules.needs
        if not needs.queries and not needs.mass:
            return
        tail, folded, window = self.state.tail, self.state.folded, self.state.window
        assert tail is not None
        with torch.inference_mode(False), torch.no_grad():
            queries, weights = new.queries.detach(), whole.log_sum_exp.detach()
            if needs.queries:
                window = remember(
                    window, queries, weights, positions=new.positions, valid=new.valid, width=needs.queries
                )
            if needs.mass:
                if folded is not None and folded.slots:
                    folded = folded.with_mass(queries, weights, scale=scale, counted=new.valid)
                tail = replace(tail, mass=_tail_mass(tail, new, weights, before, scale))
        self.state = replace(self.state, tail=tail, folded=folded, window=window)


def _stops(count: int, boundaries: Sequence[int], *, padded: bool) -> list[int]:
    """Where the pieces of `count` new columns end: at boundaries, and often enough when masks are written out."""
    steps = range(_PADDED_PIECE, count, _PADDED_PIECE) if padded else ()
    return sorted({*boundaries, *steps, count})


def _over_tail(queries: Tensor, tail: Tail, span: slice, scale: float, *, causal: bool = False,
               behind: tuple[Tensor, Tensor] | None = None) -> Partial:  # fmt: skip
    """Attention over some columns of the tail, and over keys and values that stand before them."""
    keys, values = tail.keys[:, :, span], tail.values[:, :, span]
    mask = tail.valid[:, None, None, span] if tail.padded else None
    if behind is not None:
        keys, values = torch.cat([behind[0], keys], dim=2), torch.cat([behind[1], values], dim=2)
        mask = None if mask is None else torch.nn.functional.pad(mask, (behind[0].shape[2], 0), value=True)
    return partial(queries, keys, values, scale=scale, causal=causal, mask=mask)


def _tail_mass(tail: Tail, new: New, log_sum_exp: Tensor, before: int, scale: float) -> Tensor:
    """The tail's sums after these queries: earlier columns were seen by all of them, new ones causally."""
    assert tail.mass is not None
    mass = tail.mass.clone()
    queries, counted = new.queries.detach(), new.valid
    old, own = tail.keys[:, :, :before], tail.keys[:, :, before : tail.length]
    mass[:, :, :before] += attention_mass(queries, old, log_sum_exp, scale=scale, counted=counted)
    mass[:, :, before:] += attention_mass(queries, own, log_sum_exp, scale=scale, causal=True, counted=counted)
    return mass.masked_fill(~tail.valid[:, None], 0.0) if tail.padded else mass
