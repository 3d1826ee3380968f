"""Ledger: what a cache holds at one moment, in integers that can be checked against the tensors.

Bytes are those of distinct storages, slack included. Fractions come from the integers: stored (bytes anywhere),
resident (bytes on the model's device) and attended (slots read per step) are three different things. No tensors here.
"""

from dataclasses import dataclass, fields
from math import ceil


@dataclass(frozen=True, slots=True, kw_only=True)
class PartLine:
    """One kind of part, over all layers: `sinks`, `folded`, `tail`, records; for far slots `index` and `working`."""

    name: str
    device: str  # or the tier that it lies in: `host`, `disk`
    slots: int  # entries of one layer, row and head
    stored_bytes: int
    slack_bytes: int = 0


@dataclass(slots=True, kw_only=True)
class FetchStats:
    """Counters of what parts in far tiers select and fetch. They change with every selection of the part that counts.

    A ledger holds their sum over all layers, since the parts were made.
    """

    selections: int = 0  # after the first of each part, which finds nothing
    wanted: int = 0  # slots of these selections, over rows and heads
    reused: int = 0  # of those, there already
    reused_evenly: int = 0  # of those, what would be left if all heads of a row kept as few as the worst of them
    fetched: int = 0  # slots, those of the first selections too
    fetched_bytes: int = 0
    index_seconds: float = 0.0  # cutting text and summarising sentences, while folding
    write_seconds: float = 0.0  # moving slots away
    select_seconds: float = 0.0
    fetch_seconds: float = 0.0
    attend_seconds: float = 0.0  # over what is fetched, where that is read apart from the rest

    @property
    def reuse(self) -> float | None:
        """The share of slots that stay from one selection to the next; None where there was none."""
        return self.reused / self.wanted if self.wanted else None

    @property
    def reuse_evenly(self) -> float | None:
        """The same share, if all heads of a row kept as few as the worst of them."""
        return self.reused_evenly / self.wanted if self.wanted else None

    def counts(self) -> dict[str, float]:
        """Give the counters by their names."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


Traffic = FetchStats  # the name under which memory/accounting.py sums the counters of all parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The sizes of a cache at one moment. Printing it shows a table. Bytes and counts are integers."""

    plan: str
    fed: int  # columns given to the model, pads included
    seen: int  # real tokens, over all rows
    layers: int  # layers that fold
    kv_heads: int
    slots: int  # entries held, over rows, layers and heads
    stored_bytes: int  # over the layers that fold, slack included
    resident_bytes: int  # of those, on the model's device
    slack_bytes: int  # of those, room for tokens to come
    full_bytes: int  # what every real token would take in these layers, in the dtype the cache is handed
    other_bytes: int  # layers that never fold: sliding windows
    attended_slots: int  # slots that one new token of each row reads, over layers and heads
    parts: tuple[PartLine, ...]
    weight_bytes: int = 0  # of what was learned to store slots: once a model, not in stored_bytes
    file_bytes: int = 0  # that the file of a disk tier takes, what other caches have in it included
    traffic: FetchStats | None = None  # of parts in far tiers
    claimed: float | None = None  # the kept fraction that a rival's cache reports; None for our caches

    @property
    def stored(self) -> float:
        """Kept fraction of the full cache's bytes, wherever they lie."""
        return self.stored_bytes / self.full_bytes if self.full_bytes else 1.0

    @property
    def resident(self) -> float:
        """Fraction of the full cache's bytes that lies on the model's device."""
        return self.resident_bytes / self.full_bytes if self.full_bytes else 1.0

    @property
    def attended(self) -> float:
        """Fraction of all tokens that a step reads."""
        every = self.seen * self.layers * self.kv_heads
        return self.attended_slots / every if every else 1.0

    @property
    def stored_with_weights(self) -> float:
        """The kept fraction when what was learned is counted to this cache alone."""
        return (self.stored_bytes + self.weight_bytes) / self.full_bytes if self.full_bytes else 1.0

    @property
    def break_even_tokens(self) -> int | None:
        """Tokens, over all caches of the model, at which what was learned has saved its own bytes; None: never."""
        saved = self.full_bytes - self.stored_bytes
        return ceil(self.weight_bytes * self.seen / saved) if saved > 0 else None

    @property
    def short(self) -> str:
        """Say tokens and bytes in a few words."""
        return f"{self.seen:,} tokens in {self.stored_bytes:,} bytes of {self.full_bytes:,}"

    @property
    def in_words(self) -> str:
        """Say what the whole model holds and what its full cache would hold: layers that never fold are in both."""
        held, full = (megabytes(size + self.other_bytes) for size in (self.stored_bytes, self.full_bytes))
        return f"{self.plan} holds {held} for {self.seen:,} tokens; the full cache would hold {full}"

    def __str__(self) -> str:
        head = (
            f"{self.in_words}\n"
            f"{self.plan}: fed {self.fed}, seen {self.seen}, slots {self.slots}; "
            f"stored {self.stored:.3f} ({self.stored_bytes} of {self.full_bytes} bytes), "
            f"resident {self.resident:.3f}, attended {self.attended:.3f}, "
            f"slack {self.slack_bytes} bytes, layers that never fold {self.other_bytes} bytes"
        )
        lines = [
            f"  {part.name:<8} {part.device:<6} {part.slots:>10} slots {part.stored_bytes:>12} bytes"
            for part in self.parts
        ]
        if self.file_bytes:
            lines.append(f"  the file on disk takes {self.file_bytes} bytes")
        if self.weight_bytes:
            pays = "never" if self.break_even_tokens is None else f"from {self.break_even_tokens} tokens on"
            lines.append(
                f"  learned maps take {self.weight_bytes} bytes once a model: stored {self.stored_with_weights:.3f} "
                f"with them; they pay {pays}"
            )
        return "\n".join([head, *lines, *_traffic_line(self.traffic)])


def megabytes(size_bytes: int) -> str:
    """Write bytes as MB of a million bytes.

    >>> megabytes(1_234_567), megabytes(12_345)
    ('1.2 MB', '0.012 MB')
    """
    size = size_bytes / 1e6
    return f"{size:,.1f} MB" if size >= 1 else f"{size:.2g} MB"


def _traffic_line(traffic: FetchStats | None) -> list[str]:
    if traffic is None or traffic.reuse is None:
        return []
    return [f"  {traffic.selections} selections kept {traffic.reuse:.2f}, fetched {traffic.fetched_bytes} bytes"]
