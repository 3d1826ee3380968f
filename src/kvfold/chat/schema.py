"""What the header of a saved chat may say: checked before anything is built from it, or room is made for it.

Headers come from others. Types, bounds, and what must agree inside the header are checked here; whether it agrees with
its tensors and with a model is checked where these are known (saved.py). It opens no file.
"""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kvfold.integers import MOST
from kvfold.schema import Count, Index, Name, Scale, Size, Strict, Version

Words = Annotated[str, Field(max_length=65536)]
Dtype = Literal["float16", "bfloat16", "float32", "float64"]


class Said(Strict):
    """A message."""

    role: Literal["system", "user", "assistant"]
    content: str


class Part(Strict):
    """Sinks, or a folded part: its plain values."""

    counts: list[list[Count]] | None = None  # low-rank parts keep them in their tensors
    dtype: Dtype | None = None
    since: list[Count] | None = None


class TailWords(Strict):
    """The raw tail of a layer."""

    length: Count
    start: Count
    padded: bool


class LayerWords(Strict):
    """What a layer holds besides tensors."""

    seen: list[Count]
    scale: Scale | None
    cap: Scale | None = None  # soft cap of the attention scores, where a model has one
    sinks: Part | None
    folded: Part | None
    tail: TailWords | None
    records: dict[Annotated[str, Field(max_length=64)], dict[str, Any]] = Field(default_factory=dict)


class BoundaryWords(Strict):
    """After which tokens the cache folds by itself."""

    prompt: Count | None
    stride: Annotated[int, Field(ge=1, le=MOST)] | None


class CacheWords(Strict):
    """The snapshot of a cache."""

    fed: Count
    boundaries: BoundaryWords
    text_length: Count | None = None  # version 1 has none
    layers: Annotated[dict[Index, LayerWords], Field(max_length=10_000)]
    stock: dict[Index, Count]
    recurrent: dict[Index, list[Count]] = Field(default_factory=dict)  # states of a recurrent layer


class Counters(Strict):
    """Numbers of the ledger."""

    fed: Count
    seen: Count
    slots: Size
    stored_bytes: Size
    full_bytes: Size
    other_bytes: Size


class ChatHeader(Strict):
    """The header of a saved chat."""

    format_version: Version
    kvfold: Name
    model: Name
    fingerprint: Name
    dtype: Dtype
    plan: Words
    pinned: Count
    raw_turns: Count
    stride: Annotated[int, Field(ge=1, le=MOST)] | None
    least: Count = 0  # chats of earlier versions had no floor
    counters: Counters
    messages: list[Said]
    turns: list[Annotated[list[Count], Field(min_length=3, max_length=3)]]
    ids: list[Count]
    generation: dict[str, Any]
    cache: CacheWords

    @model_validator(mode="after")
    def turns_follow_one_another(self) -> "ChatHeader":
        """Refuse turns that are none, or that do not cover the ids and the messages."""
        bounds = [(0, 0, 0), *(tuple(turn) for turn in self.turns)]
        for before, (start, reply, stop) in pairwise(bounds):
            if not before[2] == start < reply <= stop:
                raise ValueError(f"a turn from {start} over {reply} to {stop} follows one that ends at {before[2]}")
        if bounds[-1][2] != len(self.ids):
            raise ValueError(f"turns end at {bounds[-1][2]}, and {len(self.ids)} tokens were fed")
        roles = [said.role for said in self.messages]
        talk = roles[1:] if roles[:1] == ["system"] else roles
        if talk != ["user", "assistant"] * len(self.turns):
            raise ValueError(f"{len(self.turns)} turns are there, and messages of {', '.join(roles) or 'nobody'}")
        if self.cache.fed != len(self.ids):
            raise ValueError(f"a cache of {self.cache.fed} tokens is there, and {len(self.ids)} were fed")
        return self
