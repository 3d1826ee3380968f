"""What a method of the select axis is: settings, a budget, what it needs to have observed, and a choice.

The layer takes the sinks off before a method is asked, decodes what was encoded, and asks for rows of equal length
together; so a method sees plain tensors [B, H, S, D] and says which slots stay. Helpers for common choices are below.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.budget.budget import Budget
from kvfold.errors import PlanError
from kvfold.memory.kv import KV, Needs, Observed
from kvfold.memory.request import Pass, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Select(ABC):
    """A method that evicts: it drops whole slots, again and again. Give one of keep, tokens and max_bytes."""

    keep: float | None = None  # fraction of the full cache's bytes, sinks and everything else included
    tokens: int | None = None  # slots of every row and head
    max_bytes: int | None = None  # over all rows and layers
    scope: Literal["history", "turn"] = "history"  # choose among everything held, or each new segment once

    query_aware: ClassVar[bool]  # whether it looks at the newest queries, which may be the question itself
    paper: ClassVar[str | None]
    once: ClassVar[bool] = False  # whether each segment is folded once, never again; its scope is then "turn"
    by_pass: ClassVar[bool] = (
        False  # whether it says for all layers at once what stays, and which rows of its own to run
    )

    def __post_init__(self) -> None:
        if self.scope not in ("history", "turn"):
            raise PlanError(f"scope={self.scope!r} was asked for; a method knows two; give 'history' or 'turn'")
        if self.once and self.scope != "turn":
            raise PlanError(f"scope={self.scope!r} was asked for; a segment is folded once; leave scope away")
        if (self.keep, self.tokens, self.max_bytes) == (None, None, None):
            raise PlanError(
                "no budget was given; a method must know how much to keep; give keep=, tokens= or max_bytes="
            )
        _ = self.budget  # refuses two kinds, and numbers that no budget can be

    def refuse_budget(self, why: str) -> None:
        """For members without a budget: an error when one was given."""
        if (self.keep, self.tokens, self.max_bytes) != (None, None, None):
            raise PlanError(f"a budget was given; {why}; leave keep=, tokens= and max_bytes= away")

    @property
    def needs(self) -> Needs:
        """Nothing, unless a method says otherwise."""
        return Needs()

    @property
    def budget(self) -> Budget | None:
        """What may be kept; None keeps everything."""
        return Budget(fraction=self.keep, tokens=self.tokens, size_bytes=self.max_bytes)

    @property
    def adapter_source(self) -> str | None:
        """For learned methods: a folder or Hub name of the adapter, or "shipped"; None for methods without one."""
        return None

    def request(self, segment: Segment) -> Pass:
        """For methods that fold by passes: what stays of a segment, and the rows to run for it."""
        raise AssertionError("only a method that folds by passes is asked for one")

    @abstractmethod
    def choose(self, kv: KV, slots: int, observed: Observed) -> Bool[Tensor, "B H S"]:
        """True for the slots that stay: at most `slots` of each row and head, 0 < slots < len(kv)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByPass(Select):
    """A method that folds each finished segment once, all layers together, by what its `request` says."""

    scope: Literal["history", "turn"] = "turn"  # a segment is folded once

    once: ClassVar[bool] = True
    by_pass: ClassVar[bool] = True
    query_aware: ClassVar[bool] = False

    def choose(self, kv: KV, slots: int, observed: Observed) -> Bool[Tensor, "B H S"]:
        """Never asked: layers are folded together."""
        raise AssertionError("it folds by passes")

    @abstractmethod
    def request(self, segment: Segment) -> Pass:
        """What stays of a segment, and the rows to run for it."""


def newest(kv: KV, count: int) -> Bool[Tensor, "B H S"]:
    """The newest `count` slots of each row and head."""
    kept = torch.zeros(kv.positions.shape, dtype=torch.bool, device=kv.positions.device)
    kept[:, :, len(kv) - count :] = True
    return kept


def best(scores: Float[Tensor, "B H S"], count: int, *, among: Bool[Tensor, "B H S"],
         together: bool = False) -> Bool[Tensor, "B H S"]:  # fmt: skip
    """The `count` slots with the highest scores of each row and head; the older one where scores are equal.

    `together` adds the scores up over the heads, so that all heads keep the same slots.
    """
    if together:
        scores = scores.sum(dim=1, keepdim=True).expand_as(scores)
    ranked = scores.masked_fill(~among, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(among)
    return kept.scatter_(2, ranked[:, :, :count], True) & among


def most_worth(worth: Float[Tensor, "L H S"], slots: int, *, together: bool = False) -> Bool[Tensor, "L H S"]:
    """The best `slots` a head on average: heads with more to remember have more; together, only layers differ."""
    layers, heads, _ = worth.shape
    among = worth.amax(dim=1, keepdim=True) if together else worth
    kept = torch.zeros_like(among, dtype=torch.bool).flatten()
    kept[among.flatten().topk(slots * layers * (1 if together else heads)).indices] = True
    return kept.view_as(among).expand_as(worth)


def stretches(tokens: int, slots: int) -> list[int]:
    """The last token of each of `slots` stretches that share `tokens` tokens out evenly.

    >>> stretches(6, 2)
    [2, 5]
    """
    return [-(-tokens * (at + 1) // slots) - 1 for at in range(slots)]
