"""Lines that a person types, or that a pipe brings.

At a terminal a line can be edited, earlier ones come back with the arrow keys, and pasted text of several lines is one
message (prompt_toolkit). The history is forgotten with the program: what was said is private. In a pipe a line is a
message, and nothing is drawn.
"""

import sys
from typing import Any


class Lines:
    """Where messages come from. It changes: a terminal keeps what was typed."""

    def __init__(self) -> None:
        self.typed = sys.stdin.isatty()
        self._session: Any = _session() if self.typed and sys.stderr.isatty() else None

    def read(self) -> str:
        """Wait for the next message. Raises EOFError at the end of the input."""
        if self._session is not None:
            return self._session.prompt("> ")
        if self.typed:
            print("> ", end="", file=sys.stderr, flush=True)  # replies alone go to standard output
        return input()


def _session() -> Any:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.output import create_output

    return PromptSession(history=InMemoryHistory(), output=create_output(stdout=sys.stderr))
