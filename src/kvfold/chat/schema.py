"""What the header of a saved chat may say: checked before anything is built from it, or room is made for it.

Headers come from others. Types, bounds, and what must agree inside the header are checked here; whether it agrees with
its tensors and with a model is checked where these are known (saved.py). It opens no file.
"""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvfold.integers import MOST, MOST_BYTES

Count = Annotated[int, Field(ge=0, le=MOST)]
Size = Annotated[int, Field(ge=0, le=MOST_BYTES)]
Index = Annotated[str, Field(pattern=r"^[0-9]{1,6}$")]  # of a layer
Name = Annotated[str, Field(max_length=500)]
Words = Annotated[str, Field(max_length=65536)]
Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Dtype = Literal["float16", "bfloat16", "float32", "float64"]


class _Strict(BaseModel):
    """Words are no numbers and True is no count. Fields of other versions are passed over."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Said(_Strict):
    """A message."""

    role: Literal["system", "user", "assistant"]
    content: str


class Part(_Strict):
    """Sinks, or a folded part: its plain values."""

    counts: list[list[Count]] | None = None  # low-rank parts keep them in their tensors
    dtype: Dtype | None = None
    since: list[Count] | None = None


class TailWords(_Strict):
    """The raw tail of a layer."""

    length: Count
    start: Count
    padded: bool


class LayerWords(_Strict):
    """What a layer holds besides tensors."""

    seen: list[Count]
    scale: Scale | None
    cap: Scale | None = None  # soft cap of the attention scores, where a model has one
    sinks: Part | None
    folded: Part | None
    tail: TailWords | None
    records: dict[Annotated[str, Field(max_length=64)], dict[str, Any]] = {}


class BoundaryWords(_Strict):
    """After which tokens the cache folds by itself."""

    prompt: Count | None
    stride: Annotated[int, Field(ge=1, le=MOST)] | None


class CacheWords(_Strict):
    """The snapshot of a cache."""

    fed: Count
    boundaries: BoundaryWords
    text_length: Count | None = None  # version 1 has none
    layers: Annotated[dict[Index, LayerWords], Field(max_length=10_000)]
    stock: dict[Index, Count]
    recurrent: dict[Index, list[Count]] = {}  # numbers of the states that a recurrent layer has


class Counters(_Strict):
    """Numbers of the ledger."""

    fed: Count
    seen: Count
    slots: Size
    stored_bytes: Size
    full_bytes: Size
    other_bytes: Size


class ChatHeader(_Strict):
    """The header of a saved chat."""

    format_version: Annotated[int, Field(ge=1)]
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


def first_fault(error: ValidationError) -> str:
    """Say where a header is first wrong, in one line."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(step) for step in fault["loc"][:6])
    return " ".join(f"{place} {fault['msg']}".split())[:300]
