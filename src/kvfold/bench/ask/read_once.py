"""ReadOnce: what the full cache says of some texts, computed for the first plan that is compared with it.

Every plan after that is given the same numbers again, so a run of many plans reads each text under `full` once. Where
they would take too much memory, they are computed anew for each plan.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, runtime_checkable

from kvfold.bench.ask.reader import Reader

Chunks = Sequence[Sequence[int]]

MOST_ENTRIES = 2**28  # logits that are remembered, 1 GiB of float32


@runtime_checkable
class Compared(Protocol):
    """What a comparison asks of the full cache: some of the verbs of a Reader."""

    def feed(self, chunks: Chunks) -> None:
        """Read one chunk a row; a row may have none."""
        ...

    def fold(self) -> None:
        """Drop the pads."""
        ...

    def read(self, chunks: Chunks) -> list[Any]:
        """Read one chunk a row; for each row the logits after each of its tokens, [tokens, vocabulary]."""
        ...

    def answer(self, prompts: Chunks, *, max_new_tokens: int, stop: Collection[int] = ()) -> list[list[int]]:
        """Decode each row greedily after its prompt, and put the rows back."""
        ...


class ReadOnce:
    """The full cache of some texts. It changes while the first plan is compared with it."""

    def __init__(self, begin: Callable[[], Reader], *, most: int = MOST_ENTRIES) -> None:
        """`begin` gives the full cache of the texts, before what is compared."""
        self._begin = begin
        self._most = most
        self._said: list[Any] | None = None  # in the order of the calls

    def reader(self) -> Compared:
        """Give the full cache for one more plan, which makes the same calls as the plan before it."""
        if self._said:
            return _Again(self._said)
        self._said = []
        return _First(self._begin(), self._said, self._most)


class _First:
    """The full cache itself; it writes down what it says, and drops that where it grows too large."""

    def __init__(self, reader: Reader, said: list[Any], most: int) -> None:
        self._reader = reader
        self._said = said
        self._room = most

    def feed(self, chunks: Chunks) -> None:
        self._reader.feed(chunks)

    def fold(self) -> None:
        self._reader.fold()

    def read(self, chunks: Chunks) -> list[Any]:
        logits = self._reader.read(chunks)
        self._write(logits, sum(of_row.numel() for of_row in logits))
        return logits

    def answer(self, prompts: Chunks, *, max_new_tokens: int, stop: Collection[int] = ()) -> list[list[int]]:
        answers = self._reader.answer(prompts, max_new_tokens=max_new_tokens, stop=stop)
        self._write(answers, sum(map(len, answers)))
        return answers

    def _write(self, said: Any, entries: int) -> None:
        self._room -= entries
        if self._room >= 0:
            self._said.append(said)
        else:
            self._said.clear()  # nothing is written any more, so the next plan computes it anew


class _Again:
    """The same words again, in the same order."""

    def __init__(self, said: Sequence[Any]) -> None:
        self._said = iter(said)

    def feed(self, chunks: Chunks) -> None:
        """Read nothing: what follows was computed behind these chunks."""

    def fold(self) -> None:
        """Fold nothing."""

    def read(self, chunks: Chunks) -> list[Any]:
        logits = next(self._said)
        assert [len(of_row) for of_row in logits] == [len(chunk) for chunk in chunks], "the same calls"
        return logits

    def answer(self, prompts: Chunks, *, max_new_tokens: int, stop: Collection[int] = ()) -> list[list[int]]:
        del prompts, max_new_tokens, stop
        return next(self._said)
