"""StopText: the text of a reply up to a stop string, given out as it comes.

What might be the beginning of a stop string is held back until it is known. No tokens here.
"""

from collections.abc import Sequence


class StopText:
    """The text of one reply. It changes with every piece; once a stop string came, nothing follows."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.text = ""  # what was given out
        self.is_found = False
        self._stops = tuple(stops)
        self._held = ""

    def add(self, piece: str) -> str:
        """Take a piece of the reply; return the text that may be given out."""
        if self.is_found:
            return ""
        self._held += piece
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.is_found = True
            return self._give(min(places))
        return self._give(len(self._held) - self._open())

    def rest(self) -> str:
        """Return what was held back, once no piece follows."""
        return "" if self.is_found else self._give(len(self._held))

    def _open(self) -> int:
        """Count the last characters that may be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0

    def _give(self, count: int) -> str:
        given = self._held[:count]
        self._held = self._held[count:]
        self.text += given
        return given
