"""Part: slots of some rows and heads in one physical layout, and what every layout can do.

A part attends for queries, can be read, cut, grown and saved, and says what it holds. It is a value: nothing changes
it, an operation gives a new part, so an interrupted fold leaves the old one as it was; where its buffers have room a
later part is written behind its slots (room.py). A Layout (a member of the encode
axis) makes parts of slots; a Placement (a member of the place axis, opened for one cache) puts parts into a tier.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.attention.kernels.compiled import Stored
from kvfold.attention.partial import Partial
from kvfold.errors import CacheError
from kvfold.memory.kv import KV
from kvfold.memory.ragged import Counts
from kvfold.memory.step import AttentionStep
from kvfold.memory.transcript import Transcript

State = tuple[dict[str, Any], dict[str, Tensor]]  # plain values in JSON's types, and tensors by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a part reads and holds, for ledgers and pictures."""

    attended_slots: int  # entries that a new token reads, over all rows and heads
    tiers: Mapping[str, str] = field(default_factory=dict)  # tensors, by name, that lie in another tier
    slack: Mapping[str, int] = field(default_factory=dict)  # by tensor: bytes of room for slots to come
    file_bytes: int = 0  # that the tier's file takes, of every part in it
    fetched: Mapping[str, float] | None = None  # counters of page selection and fetches
    shares: tuple[Float[Tensor, " _"], ...] | None = None  # by row: of each slot, oldest first, the numbers kept


class Part(ABC):
    """Slots of some rows and heads in one physical layout."""

    counts: Counts  # slots of each row and head
    stored: Stored | None = None  # where its slots lie, if the compiled kernel can read them; else it attends itself

    @abstractmethod
    def attend(self, step: AttentionStep) -> tuple[Partial, "Part"]:
        """Attend over every slot that the step reads. All slots lie before all queries, so there is no causal mask.

        Gives also the part afterwards: one that selects pages is another one then.
        """

    def stored_for(self, step: AttentionStep) -> tuple[Stored | None, "Part"]:
        """Say where the slots lie that one new token reads, for the compiled kernel, and give the part afterwards.

        Asked where `stored` is None. Default: there are none such, and the part attends itself.
        """
        del step
        return None, self

    @abstractmethod
    def read(self, heads: slice = slice(None)) -> KV:
        """Decode the slots of some heads, oldest first. Each row and head must hold as many."""

    @abstractmethod
    def keep(self, kept: Bool[Tensor, " slots"]) -> "Part":
        """Keep the slots that are True: row by row, head by head, oldest first."""

    @abstractmethod
    def extend(self, other: "Part", transcript: Transcript, most: int = 0) -> "Part":
        """Append another part's slots, row by row and head by head.

        A part that is copied for it gets room for more, as long as a head holds fewer than `most`; 0: it fits exactly.
        """

    @abstractmethod
    def take_rows(self, rows: Sequence[int]) -> "Part":
        """Pick these rows, in this order, repeats allowed."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor held, by name: what is counted and moved."""

    @abstractmethod
    def state(self) -> State:
        """Give plain values and tensors to save. The layout or placement that made the part has `from_state`."""

    def fork(self) -> "Part":
        """Copy what changes in place, for a second cache. Default: nothing changes, so the part is shared."""
        return self

    def pages(self, tier: Any) -> Any:
        """Open an empty page store for parts like this one in a tier (memory/pages.py).

        Raises CacheError where single slots of this layout cannot be fetched.
        """
        raise CacheError(
            f"a {type(self).__name__} was to lie in {tier.name} memory; single slots of it cannot be fetched; "
            "leave the place member away, or store slots in another way"
        )

    def usage(self) -> Usage:
        """Say what is read and where it lies. Default: every slot is attended, on the device."""
        return Usage(attended_slots=self.slots)

    @property
    def slots(self) -> int:
        """Count the slots of all rows and heads."""
        return sum(sum(row) for row in self.counts)


@runtime_checkable
class Layout(Protocol):
    """A member of the encode axis, as a layer sees it: how the slots that stay become a part."""

    lossless: ClassVar[bool]
    shared_heads: ClassVar[bool]  # all heads of a layer must keep the same slots

    @property
    def weight_bytes(self) -> int:
        """Count the bytes of its weights, which a model holds once."""
        ...

    def of_layer(self, index: int) -> "Layout":
        """Give the layout of one layer of the model."""
        ...

    def pack(self, kv: KV, kept: Bool[Tensor, "B H S"]) -> Part:
        """Make a part of the slots that are True."""
        ...

    def from_state(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
        """Build a part from its state. Raises ValueError for what contradicts itself."""
        ...


@runtime_checkable
class Placement(Protocol):
    """A member of the place axis, opened for one cache: where parts lie that a fold made."""

    records: tuple[Any, ...]  # recorders (memory/recorders.py) that its parts need
    delimiters: Mapping[str, int] | None  # its parts read delimiter classes: how good an end each mark is
    offload_above: int | None  # raw tokens beyond which the older ones are offloaded, where nothing is lost by that

    def set_limit(self, limit_bytes: int) -> None:
        """Set another limit of its file. Raises BudgetError for one below what lies there."""
        ...

    def tidy(self) -> None:
        """Let the tier close the gaps that a fold left; what lies there stays, and may move."""
        ...

    def place(self, fresh: Part, transcript: Transcript) -> Part:
        """Put a part that a fold made into its tier."""
        ...

    def from_state(
        self,
        plain: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        layout: Layout,
        transcript: Transcript,
    ) -> Part:
        """Build a part from its state. Raises ValueError for what contradicts itself."""
        ...


def slots_of_rows(part: Part) -> list[int]:
    """List the most slots that a head of each row holds."""
    return [max(row) for row in part.counts]  # heads that evict by themselves may hold fewer
