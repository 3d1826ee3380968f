"""Forward: one running forward of a memory, from its first layer to its commit. A transaction.

`memory.begin(new)` opens it. Every folding layer attends through it; `commit` keeps its tokens, `undo` puts every layer
back. It knows after which of its columns to fold, and what its layers share. It knows no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from kvfold.attention.partial import Partial
from kvfold.errors import CacheError
from kvfold.memory.layer import UNTIMED, Layer, NewTokens
from kvfold.memory.part import Part
from kvfold.memory.recent_queries import QueryWindow
from kvfold.memory.rules import Rules
from kvfold.memory.state import LayerState
from kvfold.memory.step import ForwardScope
from kvfold.memory.trail import Trail
from kvfold.memory.transcript import Transcript


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundaries:
    """After which fed columns the cache folds by itself: at the end of the prompt, and every `stride` after it."""

    prompt: int | None = None  # None: the first forward is the prompt; 0: never, the caller folds
    stride: int | None = None

    def within(self, fed: int, new: int) -> list[int]:
        """List counts of new columns, out of `new` that follow `fed`, after which to fold."""
        marks = []
        if self.prompt is not None and fed < self.prompt <= fed + new:  # the prompt ends inside, or at the end
            marks.append(self.prompt)
        if self.stride is not None and self.prompt is not None:
            # The first boundary behind `fed`, counted in strides behind the prompt.
            first = max(fed - self.prompt, 0) // self.stride + 1
            marks += range(self.prompt + first * self.stride, fed + new + 1, self.stride)
        return [mark - fed for mark in marks]  # as counts of new columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A moment to go back to: the states of all layers and the counters. It keeps what it refers to alive."""

    states: Mapping[int, LayerState]
    fed: int
    boundaries: Boundaries
    transcript: Transcript
    folding: int | None = None  # a fold that was interrupted and still has to end


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Ids and delimiter classes of a forward's new tokens, where these are read."""

    ids: Int[Tensor, "B Q"] | None = None  # where a method reads token ids
    classes: UInt8[Tensor, "B Q"] | None = None  # delimiter classes, where the place reads them
    digested: Int[Tensor, "B Q"] | None = None  # ids of which only the digest is kept

    def wanted_by(self, rules: Rules) -> "Text":
        """Keep what the plan's members read; nothing else is held."""
        return Text(
            ids=self.ids if rules.reads_ids else None,
            classes=None if rules.delimiters is None else self.classes,
            digested=self.digested,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is known of a forward before it begins. By default: it reads a text, all of it, to stay."""

    text: range | None = None  # columns of the text of which it reads a piece, or behind which it goes on
    candidates: int | None = 0  # of its newest columns, those that may be taken back; None: any of them may

    def is_text(self, fed: int) -> bool | None:
        """Tell whether what follows `fed` columns is read as a text; None: where several tokens come together."""
        return None if self.text is None else fed < self.text.stop and len(self.text) > 1

    def is_inside(self, fed: int) -> bool:
        """Tell whether a piece of the text was read before."""
        return self.text is not None and self.text.start < fed < self.text.stop

    def prompt(self, fed: int, new: int) -> int:
        """Count the columns at which the text ends."""
        return fed + new - (self.candidates or 0) if self.text is None else self.text.stop


WHOLE = Reading()


class Forward:
    """One running forward. It changes: the first layer reads its text, and every layer takes its tokens."""

    def __init__(
        self,
        layers: Mapping[int, Layer],
        before: Mark,
        *,
        new: int,
        stops: Sequence[int],
        text: Text,
        offloads: bool,
        boundaries: Boundaries,
        reading: Reading = WHOLE,
    ) -> None:
        self.before = before
        self.new = new
        self._layers, self._stops, self._text, self._offloads = layers, stops, text, offloads
        self._boundaries = boundaries
        self._first = next(iter(layers))
        transcript = before.transcript if text.ids is None else before.transcript.with_ids(text.ids)
        if text.digested is not None and transcript.digest.columns == before.fed:  # it covers everything before
            transcript = replace(transcript, digest=transcript.digest.extended(text.digested))
        # Of the layers, not of this forward: one that refers to itself keeps old states until it is collected.
        self.scope = ForwardScope(
            transcript=transcript,
            folded_parts=partial(_folded_parts, layers),
            is_text=reading.is_text(before.fed),
            trail=Trail(new - reading.candidates) if reading.candidates else None,
        )

    def attend(
        self,
        index: int,
        new: NewTokens,
        *,
        scale: float,
        valid: Bool[Tensor, "B fed"] | None = None,
    ) -> Float[Tensor, "B G Q D"]:
        """Attend in one layer. `valid` may take back earlier columns that turned out to be pads."""
        layer = self._layers[index]
        tail = layer.state.tail
        if valid is not None and tail is not None and tail.length:
            # The mask runs over all fed columns; the tail holds those from `start` on.
            layer.state = layer.state.invalidated(valid[:, tail.start : tail.start + tail.length])
        # The text is shared, so one layer reads it for all.
        if index == self._first:
            self._read(layer.state.seen, new, valid)
        with UNTIMED if layer.timer is None else layer.timer("attend"):
            output = layer.attend(new, scale=scale, forward=self.scope, stops=self._stops)
        if self._offloads:  # raw tokens beyond the limit leave between folds too
            before = layer.state
            layer.offload(self.scope.transcript)
            if self.scope.trail is not None:
                self.scope.trail.note(index, self.new, before, layer.state)
        return output

    def follow(
        self,
        index: int,
        new: NewTokens,
        whole: Partial,
        *,
        scale: float,
    ) -> None:
        """Take one token of each row that attended elsewhere, in one layer, without pads and without a tier."""
        layer = self._layers[index]
        if index == self._first:
            self._read(layer.state.seen, new, None)
        transcript = self.scope.transcript
        layer.follow(
            new,
            whole,
            scale=scale,
            transcript=transcript,
            folds=bool(self._stops),
        )

    @property
    def stop(self) -> int:
        """Count the columns that are fed after it."""
        return self.before.fed + self.new

    def mark_at(self, fed: int) -> Mark:
        """Give the moment after some of its columns, of a forward that was kept; the others are taken back."""
        trail, transcript = self.scope.trail, self.scope.transcript
        assert trail is not None, "only what may be taken back leaves a trail"
        if fed == self.before.fed:
            return replace(self.before, boundaries=self._boundaries)
        if fed < self.stop:
            digest, covered = transcript.digest, self.before.transcript.digest
            transcript = transcript.cropped(self.stop - fed, fed=self.stop)
            if self._text.digested is not None and digest.columns == self.stop:
                digest = covered.extended(self._text.digested[:, : fed - self.before.fed])
                transcript = replace(transcript, digest=digest)
        return Mark(
            states={index: trail.state_after(index, fed - self.before.fed) for index in self._layers},
            fed=fed,
            boundaries=self._boundaries,
            transcript=transcript,
        )

    def _read(
        self,
        seen: tuple[int, ...],
        new: NewTokens,
        valid: Bool[Tensor, "B fed"] | None,
    ) -> None:
        """Check the mask, and write the delimiter classes of the new tokens into the transcript."""
        fed = self.before.fed
        # Real tokens of each row before this forward, by the mask.
        real = [fed] * len(seen) if valid is None else valid.sum(dim=1).tolist()
        if seen and list(seen) != real:
            raise CacheError(
                f"rows of {real} real tokens were given by the mask (no mask: all are real); the cache has seen "
                f"{list(seen)}; give the whole mask, pads 0, and fold rows that ended early by fold(valid=...)"
            )
        transcript = self.scope.transcript
        if self._text.classes is not None or transcript.classes is not None:
            positions = new.positions.expand(new.queries.shape[0], -1)  # B Q; rows may share one line of positions
            transcript = transcript.with_classes(positions, self._text.classes, new.valid)
            self.scope = replace(self.scope, transcript=transcript)


def _folded_parts(layers: Mapping[int, Layer]) -> list[tuple[Part, QueryWindow | None]]:
    """List the folded part and the recent queries of every layer; nothing where a layer has folded nothing."""
    states = [layer.state for layer in layers.values()]
    parts = [(state.folded, state.recent) for state in states if state.folded is not None and state.folded.slots]
    return parts if len(parts) == len(states) else []  # layers choose together, or not at all
