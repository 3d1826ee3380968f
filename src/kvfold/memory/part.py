"""What every part of a layer can do: attend for a query, say its bytes, be cut, grown and saved.

A part holds slots in one physical layout. It is a value: nothing changes it, an operation gives a new part, so an
interrupted fold leaves the old one as it was. Layouts are one file each (dense.py is the first); a Layout, a member
of the encode axis, makes parts and reads saved ones, so no caller knows which layout it holds.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from kvfold.attention.partial import Partial
from kvfold.memory.asking import Asking
from kvfold.memory.kv import KV

Counts: TypeAlias = tuple[tuple[int, ...], ...]  # slots per row, per key/value head


class Part(ABC):
    """Slots of some rows and heads in one physical layout."""

    counts: Counts

    @abstractmethod
    def attend(self, queries: Float[Tensor, "B G Q D"], *, scale: float) -> Partial:
        """Attention of every query over every slot of its row; all slots lie before all queries."""

    @abstractmethod
    def with_mass(self, queries: Float[Tensor, "B G Q D"], log_sum_exp: Float[Tensor, "B G Q"], *, scale: float,
                  counted: Bool[Tensor, "B Q"] | None) -> "Part":  # fmt: skip
        """The part after these queries: each slot's mass grown by the attention it received."""

    @abstractmethod
    def read(self, heads: slice = slice(None)) -> tuple[KV, Float[Tensor, "B H S"] | None]:
        """The slots of some heads, decoded, and their mass if it is counted. Each row and head holds as many."""

    @abstractmethod
    def keep(self, kept: Bool[Tensor, " slots"]) -> "Part":
        """The part with only the slots that are True (row by row, head by head, as `read` orders them)."""

    @abstractmethod
    def extend(self, other: "Part") -> "Part":
        """The part with another's slots after its own, row by row and head by head."""

    @abstractmethod
    def beside(self, others: Sequence["Part"]) -> "Part":
        """The part with the others' rows after its own."""

    @abstractmethod
    def rows(self, indices: Sequence[int]) -> "Part":
        """The part with these rows, in this order, repeats allowed."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor held, by name: what is counted, moved and saved."""

    @abstractmethod
    def plain(self) -> dict[str, Any]:
        """What is to be saved besides the tensors, in JSON's types."""

    @abstractmethod
    def places(self, row: int, head: int) -> Int[Tensor, " S"]:
        """Positions of the slots of one row and head, oldest first."""

    def shares(self, row: int) -> tuple[Int[Tensor, " S"], Float[Tensor, " S"]] | None:
        """Position of each slot of a row, oldest first, and which share of its numbers is kept; None: all of them."""
        return None

    def saved(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that a saved file needs; all of them, unless some follow from others."""
        return self.tensors()

    def tier_of(self, name: str) -> str | None:
        """Where a tensor lies, by its name, if that is not the device that it is on."""
        return None

    def apart(self) -> "Part":
        """The part for a second cache: itself, unless it has something that changes."""
        return self

    def told(self, positions: Int[Tensor, "B S"], marks: UInt8[Tensor, "B S"]) -> "Part":
        """The part that knows what the text says at these positions: itself, unless it cuts text."""
        return self

    def whole(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, H, S, D] as they lie there; None where they are written in another way, or ragged."""
        return None

    def asked(self, asking: Asking) -> "Part":
        """The part as these new tokens will read it: itself, unless it lets them choose."""
        return self

    def votes(self, asking: Asking) -> "Float[Tensor, 'B S'] | None":
        """How much the newest queries look at each slot, where layers choose together and it is time to."""
        return None

    def heeding(self, votes: "Float[Tensor, 'B S']") -> "Part":
        """The part that chooses with an eye to all layers' votes: itself, unless it lets new tokens choose."""
        return self

    def reach(self, new: int) -> int:
        """How many of `new` tokens may attend before the part must be asked again."""
        return new

    @property
    def traffic(self) -> Mapping[str, float] | None:
        """Counters of what was selected and fetched, where that is done."""
        return None

    @property
    def attended_slots(self) -> int:
        """Entries that a new token reads, over all rows and heads."""
        return self.slots

    @property
    def slots(self) -> int:
        """Entries held over all rows and heads."""
        return sum(sum(row) for row in self.counts)

    @property
    def slots_of_rows(self) -> list[int]:
        """The most entries that a head of each row holds."""
        return [max(row) for row in self.counts]


@runtime_checkable
class Layout(Protocol):
    """A member of the encode axis, as a layer sees it: how the slots that stay become a part."""

    lossless: ClassVar[bool]
    together: ClassVar[bool]  # all heads of a layer must keep the same slots

    @property
    def weight_bytes(self) -> int:
        """Bytes that it takes besides what it stores, once a model."""
        ...

    def of_layer(self, index: int) -> "Layout":
        """The layout of one layer of the model."""
        ...

    def pack(self, kv: KV, kept: Bool[Tensor, "B H S"], *, mass: Float[Tensor, "B H S"] | None = None) -> Part:
        """A part of the slots that are True."""
        ...

    def restore(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
        """A part from what it saved. Raises ValueError for what contradicts itself."""
        ...


@runtime_checkable
class Placer(Protocol):
    """A member of the place axis, opened for one cache: where parts lie that a fold made."""

    queries: int  # how many of the newest queries its parts are asked with
    reads_text: bool  # its parts want the marks of the text
    ends: Mapping[str, int] | None  # how good an end each mark is, where that is not the usual
    spill: int | None  # raw tokens beyond which the older ones move away, where nothing is lost by that

    def place(self, fresh: Part, text: tuple[Tensor, Tensor] | None) -> Part:
        """The part where it will lie. `text` are positions and marks of its rows, as `Part.told` takes them."""
        ...

    def restore(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor], layout: Layout) -> Part:
        """A part from what it saved. Raises ValueError for what contradicts itself."""
        ...


def uniform(counts: Counts) -> bool:
    """Whether every row and head holds the same number of slots."""
    return len({count for row in counts for count in row}) <= 1


def positions_of_rows(rows: Int[Tensor, "B S"], heads: int) -> Int[Tensor, "B H S"]:
    """Positions of a row's tokens, for every head."""
    return rows[:, None].expand(-1, heads, -1)
