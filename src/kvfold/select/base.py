"""What a method of the select axis is: settings, a budget, records, and one verb, `choose(context) -> Selection`.

A method names what must be recorded before (`records`), and pulls everything else from the context. Most methods choose
layer by layer: they extend PerLayerSelect and say which of some candidate slots stay. Methods that choose for all
layers at once extend JointSelect. Helpers for common choices are below.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.budget.budget import Budget
from kvfold.errors import PlanError
from kvfold.memory.candidates import Candidates, choose_by_layer
from kvfold.memory.context import FoldContext, Segment, Selection
from kvfold.memory.kv import KV
from kvfold.memory.recorders import Recorder


@dataclass(frozen=True, slots=True, kw_only=True)
class Select(ABC):
    """A method that says which slots stay. Give one of keep, tokens and max_bytes."""

    keep: float | None = None  # fraction of the full cache's bytes that may be held, sinks included
    tokens: int | None = None  # slots that each row and head may hold
    max_bytes: int | None = None  # bytes that all rows and layers together may hold
    scope: Literal["history", "turn"] = "history"  # what it chooses among: all that is held, or one segment

    query_aware: ClassVar[bool]  # whether it looks at recent queries, which may be the question itself
    paper: ClassVar[str | None]
    names_files: ClassVar[tuple[str, ...]] = ()  # settings that name files, folders or adapters
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})  # older names of settings, with their names of today
    chooses_jointly: ClassVar[bool] = False  # for all layers at once; a segment is then folded once, never again

    def __post_init__(self) -> None:
        if self.scope not in ("history", "turn"):
            raise PlanError(f"scope={self.scope!r} was asked for; a method knows two; give 'history' or 'turn'")
        if self.chooses_jointly and self.scope != "turn":
            raise PlanError(f"scope={self.scope!r} was asked for; a segment is folded once; leave scope away")
        if (self.keep, self.tokens, self.max_bytes) == (None, None, None):
            raise PlanError(
                "no budget was given; a method must know how much to keep; give keep=, tokens= or max_bytes="
            )
        _ = self.budget  # refuses two kinds, and numbers that no budget can be

    def refuse_budget(self, why: str) -> None:
        """Refuse a budget, for members without one."""
        if (self.keep, self.tokens, self.max_bytes) != (None, None, None):
            raise PlanError(f"a budget was given; {why}; leave keep=, tokens= and max_bytes= away")

    @property
    def records(self) -> tuple[Recorder, ...]:
        """List what must be recorded before the method can choose. Default: nothing."""
        return ()

    @property
    def budget(self) -> Budget | None:
        """Give what may be kept; None keeps everything."""
        return Budget(fraction=self.keep, tokens=self.tokens, size_bytes=self.max_bytes)

    @property
    def adapter_source(self) -> str | None:
        """Name a folder or Hub name of the adapter, or "shipped"; None for methods without one."""
        return None

    @property
    def reads_ages(self) -> bool:
        """Tell whether it reads from a slot's position how old it is. Default: positions are an order, and no more."""
        return False

    @abstractmethod
    def choose(self, context: FoldContext) -> Selection:
        """Choose the slots that stay of a finished segment, and make new ones, in the layers of the context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PerLayerSelect(Select):
    """A method that evicts layer by layer, again and again."""

    def choose(self, context: FoldContext) -> Selection:
        """Ask for every layer, and for every group of rows that hold equally many slots."""
        return choose_by_layer(context, self.choose_slots)

    @abstractmethod
    def choose_slots(self, candidates: Candidates) -> Bool[Tensor, "B H S"]:
        """Mark the slots that stay: at most `candidates.slots` of each row and head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JointSelect(Select):
    """A method that folds each finished segment once, all layers together."""

    scope: Literal["history", "turn"] = "turn"

    chooses_jointly: ClassVar[bool] = True
    query_aware: ClassVar[bool] = False


def newest(kv: KV, count: int) -> Bool[Tensor, "B H S"]:
    """Mark the newest `count` slots of each row and head."""
    kept = torch.zeros(kv.positions.shape, dtype=torch.bool, device=kv.positions.device)
    kept[:, :, len(kv) - count :] = True
    return kept


def best(scores: Float[Tensor, "B H S"], count: int, *, among: Bool[Tensor, "B H S"],
         shared_heads: bool = False) -> Bool[Tensor, "B H S"]:  # fmt: skip
    """Mark the `count` slots with the highest scores of each row and head; the older one where scores are equal.

    `shared_heads` adds the scores up over the heads, so that all heads keep the same slots.
    """
    if shared_heads:
        scores = scores.sum(dim=1, keepdim=True).expand_as(scores)
    ranked = scores.masked_fill(~among, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(among)
    return kept.scatter_(2, ranked[:, :, :count], True) & among


def top_slots(scores: Float[Tensor, "L H S"], slots: int, *, shared_heads: bool = False) -> Bool[Tensor, "L H S"]:
    """Mark the best `slots` a head on average: layers and heads share one budget, and one with high scores has more.

    With `shared_heads` only layers differ.
    """
    layers, heads, _ = scores.shape
    among = scores.amax(dim=1, keepdim=True) if shared_heads else scores
    kept = torch.zeros_like(among, dtype=torch.bool).flatten()
    kept[among.flatten().topk(slots * layers * (1 if shared_heads else heads)).indices] = True
    return kept.view_as(among).expand_as(scores)


def top_slots_of_rows(segment: Segment, scores: Float[Tensor, "B L H S"]) -> Bool[Tensor, "B L H S"]:
    """Mark the best slots of each row's segment within its budget, its newest token always.

    A segment that fits stays as it is.
    """
    kept = segment.nothing_kept()
    for row, slots in enumerate(segment.slots):
        tokens = segment.tokens(row)
        if slots >= len(tokens):
            kept[row] = segment.real[row]
        elif slots:
            of_row = scores[row].masked_fill(~segment.real[row], -1.0)
            of_row[..., tokens[-1]] = torch.inf
            kept[row] = top_slots(of_row, slots, shared_heads=segment.shared_heads)
    return kept


def stretches(tokens: int, slots: int) -> list[int]:
    """List the last token of each of `slots` stretches that share `tokens` tokens out evenly.

    >>> stretches(6, 2)
    [2, 5]
    """
    return [-(-tokens * (at + 1) // slots) - 1 for at in range(slots)]
