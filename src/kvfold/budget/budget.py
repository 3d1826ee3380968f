"""Budget: what a cache may spend on the tokens that it keeps, as a fraction, as tokens or in bytes.

A fraction and a number of bytes are turned into slots with everything that a slot costs counted (its position, its
observed mass), so that the ledger meets the budget, room for turns to come apart (memory/room.py). It knows sizes only,
no tensors and no methods.
"""

from dataclasses import dataclass
from numbers import Real

from kvfold.errors import BudgetError
from kvfold.integers import MOST_BYTES, integer_or_none


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Exactly one of the three. A fraction is of the bytes of the full cache, and grows with the text.

    >>> Budget(fraction=0.5).slots(seen=100, pinned=4, slot_bytes=128, token_bytes=128, shares=2)
    50
    """

    fraction: float | None = None
    tokens: int | None = None
    size_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.fraction, self.tokens, self.size_bytes) if value is not None]
        if len(given) != 1:
            raise BudgetError(
                f"a budget of {len(given)} kinds was asked for; it is one of keep (a fraction), tokens or bytes; "
                "give exactly one"
            )
        # True and False are numbers to Python, and no budgets. A comparison with NaN is never true.
        number = isinstance(self.fraction, Real) and not isinstance(self.fraction, bool)
        if self.fraction is not None and not (number and 0 < self.fraction <= 1):
            raise BudgetError(
                f"keep={self.fraction!r:.80} was asked for; it is a fraction; give more than 0 and at most 1"
            )
        integer_or_none("tokens", self.tokens, least=1, error=BudgetError)
        integer_or_none("max_bytes", self.size_bytes, least=1, most=MOST_BYTES, error=BudgetError)

    def slots(self, *, seen: int, pinned: int, slot_bytes: int, token_bytes: int, shares: int) -> int:
        """Slots per head that one row of one layer may hold after `seen` tokens, sinks included.

        `token_bytes` is what a token costs in the full cache of one layer, `slot_bytes` what it costs here, both over
        all heads; `shares` are the rows times layers that a budget in bytes is split over. A fraction always allows
        the sinks.
        """
        if self.fraction is not None:
            return max(int(self.fraction * seen * token_bytes + 1e-6) // slot_bytes, min(pinned, seen))
        if self.tokens is not None:
            return self._holding(self.tokens, pinned, "tokens", self.tokens, pinned + 1)
        assert self.size_bytes is not None
        slots = self.size_bytes // shares // slot_bytes
        return self._holding(slots, pinned, "max_bytes", self.size_bytes, (pinned + 1) * slot_bytes * shares)

    def floor(self, *, seen: int, least: int, once: bool) -> int:
        """Slots per head that one row of one layer holds in any case: for a fraction, its first `least` tokens.

        A budget in tokens or bytes is what was asked for, so it has no floor. Where a method chooses among the tokens
        of a segment `once`, later segments get half their fraction until the whole text meets it.

        >>> Budget(fraction=0.5).floor(seen=300, least=256, once=False)
        256
        """
        if self.fraction is None or not least:
            return 0
        beyond = max(seen - least, 0)
        return min(seen, least) + (int(self.fraction * beyond / 2) if once else 0)

    def check(self, *, pinned: int) -> None:
        """Refuse a budget in tokens that could never hold the sinks and one token more."""
        if self.tokens is not None:
            self._holding(self.tokens, pinned, "tokens", self.tokens, pinned + 1)

    def _holding(self, slots: int, pinned: int, setting: str, given: int, least: int) -> int:
        if slots <= pinned:
            raise BudgetError(
                f"{setting}={given} was asked for; its {slots} slots cannot hold {pinned} pinned tokens and a recent "
                f"one; give {setting}={least} or more, or pin less"
            )
        return slots
