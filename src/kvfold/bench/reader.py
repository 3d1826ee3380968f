"""Reader: what suites use to put tokens to a plan, whoever carries it out: rows of ours, or a rival's process.

A few verbs, so that a suite is written once for all: feed and fold a history, read what the cache holds, ask and score.
It knows neither models nor tensors; `audit.py` has ours, `peers/rows.py` the rivals'.
"""

from collections.abc import Collection, Sequence
from typing import Any, Protocol, runtime_checkable

from kvfold.budget.ledger import Ledger


@runtime_checkable
class Reader(Protocol):
    """Conversations side by side. Chunks and prompts are token ids, one list a row."""

    fed_tokens: list[int]  # real tokens given to the model, row by row; answers are not counted
    pace: Any  # chat.rows.Pace of the newest answer, None before it

    def feed(self, chunks: Sequence[Sequence[int]]) -> None:
        """Read one chunk a row; a row may have none."""
        ...

    def fold(self) -> None:
        """Fold all that is still raw."""
        ...

    def ledger(self) -> Ledger | None:
        """What the rows hold together; None where nothing ever folds."""
        ...

    def logits(self, chunks: Sequence[Sequence[int]]) -> Any:
        """Read one chunk a row, none of them empty; what each row expects next, [B, vocabulary]."""
        ...

    def read(self, chunks: Sequence[Sequence[int]]) -> list[Any]:
        """Read one chunk a row; for each row what it expects after each token, [tokens, vocabulary]."""
        ...

    def trial(self, chunks: Sequence[Sequence[int]], *, singly: int = 0) -> list[Any]:
        """What `read` says, the last `singly` tokens read one by one; afterwards the rows are as they were."""
        ...

    def answer(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[list[int]]:
        """The greedy continuation of each row after its prompt; afterwards the rows are as they were."""
        ...
