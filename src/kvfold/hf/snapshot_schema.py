"""What the header of a saved cache may say: checked before anything is built from it, or room is made for it.

Headers come from others. Types and bounds are checked here; whether a header agrees with its tensors and with a model
is checked where these are known (snapshot.py, saved.py). It opens no file.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from kvfold.integers import MOST
from kvfold.memory.rules import Positions
from kvfold.schema import Count, Index, Name, Scale, Size, Strict, Version

Words = Annotated[str, Field(max_length=65536)]
Dtype = Literal["float16", "bfloat16", "float32", "float64"]


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
    closed: list[Count] = Field(default_factory=list)  # positions that gaps left free, where they are closed
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


class DigestWords(Strict):
    """The digest of the ids that were fed."""

    columns: Count
    sums: list[Annotated[int, Field(ge=0, lt=1 << 64)]]  # by row


class CacheWords(Strict):
    """The snapshot of a cache."""

    fed: Count
    boundaries: BoundaryWords
    text_length: Count | None = None  # version 1 has none
    digest: DigestWords | None = None  # earlier files have none
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


class SavedHeader(Strict):
    """What the header of every kind of file says: which model and plan it belongs to, and what the cache holds."""

    format_version: Version
    kvfold: Name
    model: Name
    fingerprint: Name
    dtype: Dtype
    plan: Words
    pinned: Count
    least: Count = 0  # chats of earlier versions had no floor
    positions: Positions = "kept"  # nor another way
    counters: Counters
    cache: CacheWords
