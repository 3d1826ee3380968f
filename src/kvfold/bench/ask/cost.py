"""What an answer cost, as the fields of an Outcome: what the cache held, and how long the answer took.

Sizes come from the ledger of all rows together and are given for one of them. It measures nothing.
"""

from typing import Any

from kvfold.budget.ledger import Ledger
from kvfold.chat.rows import Pace


def size_fields(ledger: Ledger | None, *, rows: int) -> dict[str, Any]:
    """Give the fields of an Outcome that say what the cache held, from the ledger of this many rows together."""
    assert ledger is not None, "a plan has a ledger"
    return {
        "stored": ledger.stored,
        "resident": ledger.resident,
        "attended": ledger.attended,
        "stored_bytes": ledger.stored_bytes / rows,
        "resident_bytes": ledger.resident_bytes / rows,
        "full_bytes": ledger.full_bytes / rows,
        "claimed": ledger.claimed,
    }


def pace_fields(pace: Pace | None) -> dict[str, Any]:
    """Give the fields of an Outcome that say how long the newest answer took."""
    assert pace is not None, "an answer has a pace"
    return {"ttft_seconds": pace.first_seconds, "tpot_seconds": pace.token_seconds or 0.0}
