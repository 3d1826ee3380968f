"""Recorders: what a method must have recorded before it can choose, and the records that a layer keeps for it.

A method names its recorders: `records = (RecentQueries(32),)`. A recorder is a setting; it opens a record in each
layer. A record is a value that follows its layer: attention, folds, crops, rows. It is counted in the ledger and saved.
Each kind of record is one file: recent_queries.py, attention_sums.py, hidden_states.py. Token ids are recorded once for
all layers, by the transcript.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.attention.rotary import Turn
from kvfold.memory.tail import Tail


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """New tokens of one layer after their attention: what a record may read of them."""

    queries: Float[Tensor, "B G Q D"]
    log_sum_exp: Float[Tensor, "B G Q"]  # over the whole layer
    scale: float  # of the attention scores
    positions: Int[Tensor, "#B Q"]  # one line where all rows stand at the same
    valid: Bool[Tensor, "B Q"] | None  # None: no pads
    tail: Tail  # with the new tokens
    before: int  # columns of the tail before them
    folded: Any  # the folded part, or None
    hidden_states: Float[Tensor, "B Q width"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldEvent:
    """A fold of one layer: which columns leave the tail, and which slots stay."""

    columns: int  # how many of the tail's oldest leave it
    kept: Bool[Tensor, "B H columns"]  # that join the folded part
    history: Bool[Tensor, " slots"] | None  # folded slots that stay; None: all
    counts: Any  # of the folded part before the fold, or None
    made: int  # new slots of each row and head that a method made
    tail: Tail  # after the fold
    next_positions: tuple[int, ...]  # where the next token of each row stands
    for_select: bool  # the select member asked for this record (else only the place did)


class Record(ABC):
    """A record of one layer. A value: every change gives another record."""

    @abstractmethod
    def observe(self, seen: Observation) -> "Record":
        """Record new tokens."""

    @abstractmethod
    def fold(self, event: FoldEvent) -> "Record | None":
        """Follow a fold. None: nothing is left to record."""

    @abstractmethod
    def crop(self, stops: Sequence[int], columns: int) -> "Record":
        """Forget the newest columns; the next token of each row stands at its stop afterwards."""

    @abstractmethod
    def invalidate(self, gone: Int[Tensor, "B columns"]) -> "Record":
        """Forget tokens at these positions of each row, which turned out to be pads (-1: none)."""

    @abstractmethod
    def take_rows(self, rows: Sequence[int]) -> "Record":
        """Pick these rows, in this order, repeats allowed."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor held, by name: what is counted, moved and saved."""

    def moved(self, back: Int[Tensor, " B"], turn: Turn) -> "Record":
        """Follow the raw tokens of each row, which move back by so many positions. Default: it knows no positions."""
        return self

    def plain(self) -> dict[str, Any]:
        """Give what is to be saved besides the tensors, in JSON's types."""
        return {}


class Recorder(ABC):
    """A setting of a method: what is to be recorded in every layer."""

    name: ClassVar[str]  # of its records, in states, ledgers and files
    allows_crop: ClassVar[bool] = True  # tokens can be taken back without a trace

    @abstractmethod
    def open(self, keys: Float[Tensor, "B H Q D"]) -> Record:
        """Open an empty record of a layer whose keys look like these."""

    @abstractmethod
    def restore(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> Record:
        """Build a record from what it saved. Raises ValueError for what contradicts itself."""

    def narrowed(self, record: Record) -> Record:
        """Give a record as this setting alone would have made it, from one that was made for others too."""
        return record

    def joined(self, other: "Recorder") -> "Recorder":
        """Combine two settings of one kind of record, such that both are served."""
        return self


@dataclass(frozen=True, slots=True)
class TokenIds(Recorder):
    """Ids of raw tokens. The transcript keeps them, once for all layers."""

    name: ClassVar[str] = "token_ids"

    def open(self, keys: Float[Tensor, "B H Q D"]) -> Record:
        """Refuse: no layer keeps ids."""
        raise AssertionError("ids are kept by the transcript, not by layers")

    def restore(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> Record:
        """Refuse: no file has ids in its layers."""
        raise AssertionError("ids are kept by the transcript, not by layers")


def combined(recorders: Sequence[Recorder]) -> tuple[Recorder, ...]:
    """Combine recorders so that each kind is there once."""
    kinds: dict[str, Recorder] = {}
    for recorder in recorders:
        known = kinds.get(recorder.name)
        kinds[recorder.name] = recorder if known is None else known.joined(recorder)
    return tuple(kinds.values())
