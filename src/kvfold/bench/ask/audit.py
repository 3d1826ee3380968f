"""The audit of every benchmark: are a ledger's bytes those that are really held, and was each token read once?

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
    """Rows whose ledger is checked whenever it is read. It changes with every feed and fold."""

    def ledger(self) -> Ledger | None:
        """Give the checked ledger. Raises SuiteError where the cache holds more, or has read more than it was fed."""
        ledger = super().ledger()
        if ledger is not None:
            check_bytes(ledger, bytes_held(self.cache, outside=self.model))
            check_fed(ledger, fed=sum(self.fed_tokens), columns=self.mask.shape[1])
        return ledger

    def trial(self, chunks: Sequence[Sequence[int]], *, singly: int = 0) -> list[Float[Tensor, "_ vocabulary"]]:
        """Give the logits of `read`, the last `singly` tokens read one by one, and put the rows back."""
        assert self.folded is not None, "a stock cache has no way back"
        together = [chunk[: len(chunk) - singly] for chunk in chunks]
        assert not singly or all(together), "a chunk begins with tokens that are read together"
        mask, fed, mark = self.mask, self.fed_tokens, self.folded.mark()
        steps = [together]
        for left in range(singly, 0, -1):  # tokens that are still to be read, counted from each chunk's end
            steps.append([chunk[len(chunk) - left :][:1] for chunk in chunks])
        try:
            logits = [self.read(step) for step in steps]
            return [torch.cat(row) for row in zip(*logits, strict=True)]
        finally:
            self.mask, self.fed_tokens = mask, fed
            self.folded.restore(mark)


def check_bytes(ledger: Ledger, walked: dict[str, int]) -> None:
    """Compare the bytes found by walking with the ledger's: stored, other and learned. Raises SuiteError."""
    found = sum(walked.values())
    claimed = ledger.stored_bytes + ledger.other_bytes + ledger.weight_bytes
    if found != claimed:
        raise SuiteError(
            f"{ledger.plan} says that it holds {claimed} bytes; its cache keeps {found} bytes alive; "
            "a saving counts when it is freed: mend its ledger, or what it still refers to"
        )


def check_fed(ledger: Ledger, *, fed: int, columns: int) -> None:
    """Compare the tokens that a cache has seen with those that its rows were fed. Raises SuiteError."""
    if ledger.seen != fed or ledger.fed != columns:
        raise SuiteError(
            f"{ledger.plan} was fed {fed} tokens in {columns} columns; its cache has seen {ledger.seen} in "
            f"{ledger.fed}; a turn feeds its own tokens and nothing twice: mend what counts or feeds them"
        )
    every = ledger.seen * ledger.layers * ledger.kv_heads
    if ledger.slots > every:
        raise SuiteError(
            f"{ledger.plan} holds {ledger.slots} slots for {fed} tokens, which fill {every}; history is in it twice; "
            "mend what stores it"
        )
