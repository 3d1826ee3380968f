"""Rules: what the layers of a memory fold by: the plan's members, and how many first tokens are pinned.

The members come as values of three axes, and this file says what a layer asks of each. Everything that follows from
them is worked out once, when the rules are made: a decode step asks for it often.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from kvfold.attention.rotary import Rotary
from kvfold.memory.part import Layout, Placement
from kvfold.memory.recent_queries import RecentQueries
from kvfold.memory.recorders import Recorder, TokenIds, combined

Positions: TypeAlias = Literal["kept", "compact"]  # of slots: those of their tokens, or moved together at every fold


@runtime_checkable
class Allowance(Protocol):
    """A budget, as a layer reads it."""

    def slots(
        self,
        *,
        seen: int,
        pinned: int,
        slot_bytes: int,
        token_bytes: int,
        shares: int,
    ) -> int:
        """Count the slots a head may hold in one row of one layer after `seen` tokens, sinks included."""
        ...

    def floor(self, *, seen: int, least: int, once: bool) -> int:
        """Count the slots it holds in any case, of the first `least` tokens; `once`: no token is chosen among again."""
        ...


@runtime_checkable
class Chooser(Protocol):
    """A member of the select axis, as a memory sees it."""

    chooses_jointly: ClassVar[bool]  # for all layers at once; a segment is then folded once, never again

    @property
    def records(self) -> tuple[Recorder, ...]:
        """List what must be recorded before it can choose."""
        ...

    @property
    def scope(self) -> Literal["history", "turn"]:
        """Say what it chooses among: everything held, or each new segment once."""
        ...

    @property
    def budget(self) -> Allowance | None:
        """Give the budget; None keeps everything."""
        ...

    @property
    def choose(self) -> Callable[[Any], Any]:
        """Choose what stays: a FoldContext becomes a Selection (memory/context.py)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The members of a plan and the pinned tokens, as a layer folds by them."""

    select: Chooser
    layout: Layout
    raw: Layout  # how sinks are stored: as they came
    pinned: int  # first real tokens of each row that stay raw
    layers: int  # layers that fold: a budget in bytes is split over them
    least: int = 0  # tokens that a budget in fractions leaves in any case
    placement: Placement | None = None  # None: parts lie where they are made
    also: tuple[Recorder, ...] = ()  # recorded too, for other rules that will fold the same text (handover.py)
    rotary: Rotary | None = None  # of the model, to move slots together (compaction.py); None: they stay

    folds: bool = field(init=False)  # whether a fold changes anything
    recorders: tuple[Recorder, ...] = field(init=False)  # of every layer, for the method and for the place
    reads_ids: bool = field(init=False)
    delimiters: Any = field(init=False)  # how good an end each mark is, where the place reads delimiter classes
    offload_above: int | None = field(init=False)  # raw tokens beyond which older ones are offloaded
    allows_crop: bool = field(init=False)  # tokens can be taken back
    closes_gaps: bool = field(init=False)  # a fold leaves gaps between positions, and they are closed
    slot_extra_bytes: int = field(init=False)  # of a folded slot, besides its key and value

    def __post_init__(self) -> None:
        select, placement = self.select, self.placement
        # A method that chooses jointly may drop or make slots without a budget.
        unlimited = select.budget is None and not select.chooses_jointly
        lossless = unlimited and self.layout.lossless  # a fold moves slots and changes none
        of_place = () if placement is None else placement.records
        asked = (*select.records, *of_place, *self.also)
        # Ids are kept by the transcript, not by layers.
        recorders = combined([recorder for recorder in asked if not isinstance(recorder, TokenIds)])
        sums = any(not recorder.allows_crop for recorder in (*select.records, *self.also))  # attention is added up
        derived = {
            "folds": not lossless or placement is not None,
            "recorders": recorders,
            "reads_ids": any(isinstance(recorder, TokenIds) for recorder in (*select.records, *self.also)),
            "delimiters": None if placement is None else placement.delimiters,
            # Tokens may go early only where the method would keep them all as they are.
            "offload_above": placement.offload_above if placement is not None and lossless else None,
            "allows_crop": not sums,
            "closes_gaps": self.rotary is not None and not unlimited,
            "slot_extra_bytes": _POSITION_BYTES + (_SUM_BYTES if sums else 0),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # frozen: only here, while it is made

    @property
    def select_records(self) -> frozenset[str]:
        """Name the records that the select member reads."""
        return frozenset(recorder.name for recorder in self.select.records)

    @property
    def weight_bytes(self) -> int:
        """Count the bytes that a model has once, whatever is stored: the layout's weights, and tables of rotations."""
        return self.layout.weight_bytes + (0 if self.rotary is None else self.rotary.table_bytes)

    @property
    def recent_queries(self) -> int:
        """Count the recent queries that the select member reads."""
        counts = [recorder.count for recorder in self.select.records if isinstance(recorder, RecentQueries)]
        return max(counts, default=0)

    def slots(self, *, seen: int, rows: int, heads: int, token_bytes: int) -> int | None:
        """Count the slots of a head after `seen` tokens of a row, sinks included; None: no limit.

        `token_bytes` is a raw token of one layer, over its heads. Raises BudgetError where the sinks do not fit.
        """
        budget = self.select.budget
        if budget is None:
            return None
        slots = budget.slots(
            seen=seen,
            pinned=self.pinned,
            slot_bytes=token_bytes + heads * self.slot_extra_bytes,
            token_bytes=token_bytes,
            shares=self.layers * rows,
        )
        return max(slots, self.floor(seen))

    def floor(self, seen: int) -> int:
        """Count the slots of a row that stay however small a fraction is, sinks included."""
        budget = self.select.budget
        return 0 if budget is None else budget.floor(seen=seen, least=self.least, once=self.select.scope == "turn")

    def tidy_place(self) -> None:
        """Let the place close the gaps that a fold left in its tier."""
        if self.placement is not None:
            self.placement.tidy()

    def of_layer(self, index: int) -> "Rules":
        """Give the rules of one layer of the model."""
        return replace(self, layout=self.layout.of_layer(index))


_POSITION_BYTES = 4  # int32
_SUM_BYTES = 4  # float32
