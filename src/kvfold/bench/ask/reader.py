"""Reader: what suites use to put tokens to a plan, whoever carries it out: rows of ours, or a rival's process.

A few verbs, so that a suite is written once for all: feed and fold a history, read what the cache holds, ask and score.
`audit.py` has our rows, which are checked while they run, `peers/rows.py` the rivals'; `open_rows` opens the ones that
a plan's text names.
"""

from collections.abc import Collection, Sequence
from typing import Any, Protocol, runtime_checkable

from kvfold.bench.ask.audit import AuditedRows
from kvfold.bench.peers.plans import is_rival
from kvfold.bench.subject import Subject
from kvfold.budget.ledger import Ledger
from kvfold.chat.rows import Pace
from kvfold.errors import SuiteError


@runtime_checkable
class Reader(Protocol):
    """Conversations side by side. Chunks and prompts are token ids, one list a row."""

    fed_tokens: list[int]  # real tokens given to the model, row by row; answers are not counted
    pace: Pace | None  # of the newest answer, None before it

    def feed(self, chunks: Sequence[Sequence[int]]) -> None:
        """Read one chunk a row; a row may have none."""
        ...

    def fold(self) -> None:
        """Fold all that is still raw."""
        ...

    def ledger(self) -> Ledger | None:
        """Say what the rows hold together; None where nothing ever folds."""
        ...

    def logits(self, chunks: Sequence[Sequence[int]]) -> Any:
        """Read one chunk a row, none of them empty; the logits of each row's next token, [B, vocabulary]."""
        ...

    def read(self, chunks: Sequence[Sequence[int]]) -> list[Any]:
        """Read one chunk a row; for each row the logits after each of its tokens, [tokens, vocabulary]."""
        ...

    def trial(self, chunks: Sequence[Sequence[int]], *, singly: int = 0) -> list[Any]:
        """Give the logits of `read`, the last `singly` tokens read one by one, and put the rows back."""
        ...

    def answer(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop: Collection[int] = ()
    ) -> list[list[int]]:
        """Decode each row greedily after its prompt, and put the rows back."""
        ...


def open_rows(subject: Subject, plan: str | None, *, count: int) -> Reader:
    """Open `count` conversations under a plan of ours, or a rival's; None is the stock cache, which never folds.

    Raises SuiteError for a rival that was not called into the run.
    """
    if plan is None or not is_rival(plan):
        return AuditedRows(subject.model, plan, rows=count, pad=subject.tokenizer.pad_token_id or 0)
    if subject.rivals is None:
        raise SuiteError(f"the rival {plan} was asked for; none was called into this run; give it by --peers")
    return subject.rivals.rows(plan, count=count)
