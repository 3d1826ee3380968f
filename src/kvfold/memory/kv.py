"""The values that flow between a layer, a method and a codec.

KV is what a layer remembers of some tokens; Observed is what it saw the queries do with them; Chooser is what the
layer asks of a method (what stays?), and Codec what a dense part asks of a codec (how is a single slot written?; what
a layer asks of the encode axis is part.py's Layout). No file here knows a method by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.memory.request import Pass, Segment

Payload: TypeAlias = Mapping[str, Tensor]  # tensors whose leading dimensions are slots, as one codec writes them


@dataclass(frozen=True, slots=True)
class KV:
    """What one layer remembers: a key, a value and a position per slot, oldest first. Every row has S slots."""

    keys: Float[Tensor, "B H S D"]  # as the model handed them: after RoPE
    values: Float[Tensor, "B H S E"]
    positions: Int[Tensor, "B H S"]  # where each slot sat in the text, before any folding

    def __len__(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What the queries did, as far as the method asked for it; None where it did not ask."""

    scale: float  # of the scores
    seen: Int[Tensor, " B"]  # real tokens of each row so far: the position that comes next
    queries: Float[Tensor, "B G W D"] | None = None  # the newest since the last fold, oldest first
    query_positions: Int[Tensor, "B W"] | None = None  # -1 where a row has fewer queries
    log_sum_exp: Float[Tensor, "B G W"] | None = None  # of those queries, over the whole layer as it was then
    mass: Float[Tensor, "B H S"] | None = None  # attention received so far, averaged over the query group
    together: bool = False  # all heads must keep the same slots: scores are then added up over the heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a method must have observed to choose. What it needs is kept by the layer, and counted."""

    queries: int = 0  # how many of the newest queries
    mass: bool = False  # the attention that every slot received
    text: bool = False  # the ids of raw tokens, kept beside them
    repetition: bool = False  # the most that each slot is attended to while its segment is repeated: its worth


@runtime_checkable
class Allowance(Protocol):
    """A budget, as the layer reads it."""

    def slots(self, *, seen: int, pinned: int, slot_bytes: int, token_bytes: int, shares: int) -> int:
        """Slots per head that one row of one layer may hold after `seen` tokens, sinks included."""
        ...


@runtime_checkable
class Chooser(Protocol):
    """A member of the select axis, as the layer sees it."""

    once: ClassVar[bool]  # what it folded stays as it is
    by_pass: ClassVar[bool]  # it is asked for a segment of all layers at once

    @property
    def needs(self) -> Needs: ...
    @property
    def scope(self) -> Literal["history", "turn"]: ...
    @property
    def budget(self) -> Allowance | None:
        """None keeps everything."""
        ...

    def choose(self, kv: KV, slots: int, observed: Observed) -> Bool[Tensor, "B H S"]:
        """True for the at most `slots` slots of each row and head that stay."""
        ...

    def request(self, segment: Segment) -> Pass:
        """What stays of a segment and the rows to run for it, from a method that folds by passes."""
        ...


@runtime_checkable
class Codec(Protocol):
    """A member of the encode axis, as a dense part sees it: each slot by itself, so that slots can be dropped."""

    lossless: ClassVar[bool]

    def encode(self, keys: Float[Tensor, "*slots D"], values: Float[Tensor, "*slots E"]) -> Payload:
        """What is stored of these slots."""
        ...

    def decode(self, payload: Payload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values again, in `dtype`, for payload tensors of any leading dimensions."""
        ...
