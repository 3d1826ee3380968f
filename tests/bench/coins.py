"""A suite without a model, for the tests of the runner: each plan answers a fixed share of the samples.

It counts how often it is asked, so that a test can hold that finished work is not done again, and it can be told to
fail at a plan, from a sample on, as a killed run would.
"""

import torch

from kvfold.bench.subject import Subject
from kvfold.bench.suite import Outcome, Suite

SUBJECT = Subject(
    name="coin", model=torch.nn.Identity(), tokenizer=None, fingerprint="f00d", dtype="float32", device="cpu"
)
SHARES = {"full": 1.0, "none": 0.0, "half": 0.5, "most": 0.75}


class Coins(Suite):
    """Sample i is answered under a plan when i/n lies below the plan's share. It changes: `asked` grows."""

    name, version, rows = "coins", 3, 4

    def __init__(self, breaks_at: str | None = None, error: type[BaseException] = RuntimeError, after: int = 0):
        self.asked: list[tuple[str, int]] = []
        self._breaks_at, self._error, self._after = breaks_at, error, after

    @property
    def settings(self):
        return {"sides": 2}

    def samples(self, *, n, seed):
        return [(i, n, ("heads", "tails")[i % 2]) for i in range(n)]

    def shortcut(self, samples):
        return {"heads": 0.2, "tails": 0.4}

    def ask(self, subject, plan, samples):
        if plan == self._breaks_at and samples[0][0] >= self._after:
            raise self._error("told to")
        self.asked.append((plan, len(samples)))
        share = SHARES[plan]
        return [
            Outcome(
                family=family,
                score=float(i < share * n),
                stored=share,
                resident=share,
                attended=share,
                stored_bytes=share * 100,
                resident_bytes=share * 100,
                full_bytes=100,
                ttft_seconds=0.5,
                tpot_seconds=0.25,
            )
            for i, n, family in samples
        ]
