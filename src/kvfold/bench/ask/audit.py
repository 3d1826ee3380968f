"""The check that runs with every record: is what a plan says it holds what is there, and did it read what it was fed?

Rows that a suite opens are these. Whenever their ledger is read, the cache object is walked and its distinct storages
are summed; bytes that the ledger does not have are a lie about savings. The tokens that the cache has seen must be
those that it was fed; more is history read twice. It finds what a cache holds on to, not what is hidden elsewhere.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.bench.peers.programs.walker import bytes_held
from kvfold.budget.ledger import Ledger
from kvfold.chat.rows import Rows
from kvfold.errors import SuiteError


class AuditedRows(Rows):
    """Rows whose ledger is not taken at its word. It changes with every feed and fold."""

    def ledger(self) -> Ledger | None:
        """What the rows hold. Raises SuiteError where the cache holds more, or has read more than it was fed."""
        spent = super().ledger()
        if spent is not None:
            check_bytes(spent, bytes_held(self.cache, outside=self.model))
            check_fed(spent, fed=sum(self.fed_tokens), columns=self.mask.shape[1])
        return spent

    def trial(self, chunks: Sequence[Sequence[int]], *, singly: int = 0) -> list[Float[Tensor, "_ vocabulary"]]:
        """What `read` says, the last `singly` tokens read one by one; afterwards the rows are as they were."""
        assert self.folded is not None, "a stock cache has no way back"
        mask, fed, mark = self.mask, self.fed_tokens, self.folded.mark()
        assert all(len(chunk) > singly for chunk in chunks), "a chunk begins with tokens that are read together"
        steps = [[chunk[: len(chunk) - singly] for chunk in chunks]]
        steps += [[chunk[len(chunk) - left :][:1] for chunk in chunks] for left in range(singly, 0, -1)]
        try:
            read = [self.read(step) for step in steps]
            return [torch.cat(row) for row in zip(*read, strict=True)]
        finally:
            self.mask, self.fed_tokens = mask, fed
            self.folded.restore(mark)


def check_bytes(spent: Ledger, walked: dict[str, int]) -> None:
    """Raises SuiteError where the bytes found by walking are not those of the ledger: stored, other and learned."""
    found, said = sum(walked.values()), spent.stored_bytes + spent.other_bytes + spent.weight_bytes
    if found != said:
        raise SuiteError(
            f"{spent.plan} says that it holds {said} bytes; its cache keeps {found} bytes alive; "
            "a saving counts when it is freed: mend its ledger, or what it still refers to"
        )


def check_fed(spent: Ledger, *, fed: int, columns: int) -> None:
    """Raises SuiteError where a cache has seen other tokens than those that its rows were fed."""
    if spent.seen != fed or spent.fed != columns:
        raise SuiteError(
            f"{spent.plan} was fed {fed} tokens in {columns} columns; its cache has seen {spent.seen} in {spent.fed}; "
            "a turn feeds its own tokens and nothing twice: mend what counts or feeds them"
        )
    every = spent.seen * spent.layers * spent.kv_heads
    if spent.slots > every:
        raise SuiteError(
            f"{spent.plan} holds {spent.slots} slots for {fed} tokens, which fill {every}; history is in it twice; "
            "mend what stores it"
        )
