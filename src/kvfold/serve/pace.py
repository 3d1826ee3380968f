"""Pace: how long a piece of a prompt may be, so that reading it stalls running replies for a stated time at most.

The speed of reading is measured as pieces are read. Pieces have few lengths, because libraries of matrix products keep
what they compile for each one they meet. It knows no turns.
"""

LONGEST = 512  # tokens of a piece
_SHORTEST = 16
_FIRST_GUESS = 256.0  # tokens a second


class Pace:
    """The speed of reading. It changes with every piece."""

    def __init__(self) -> None:
        self._tokens_a_second = _FIRST_GUESS

    def piece(self, seconds: float) -> int:
        """Give the tokens of a piece that is read in about so long: 16, 24, 32, 48, 64, and so on."""
        tokens = min(max(int(self._tokens_a_second * seconds), _SHORTEST), LONGEST)
        step = 1 << (tokens.bit_length() - 2)
        return tokens // step * step

    def note(self, tokens: int, seconds: float) -> None:
        """Note how long a piece took; short ones say little."""
        if tokens >= _SHORTEST:
            self._tokens_a_second += (tokens / max(seconds, 1e-6) - self._tokens_a_second) / 4
