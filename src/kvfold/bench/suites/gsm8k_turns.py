"""gsm8k_turns: word problems given premise by premise, some corrected later, and solved at the end.

Each premise is a turn of its own, and every finished turn is folded. The worked solution is read, and each number in
it must be what the model would say greedily, token for token; that share is the score, and the likelihood of the
numbers is beside it. It mirrors a set of the SONIC paper (https://arxiv.org/abs/2601.21927), whose prompts are not
published, so the form of the turns is ours. Version 1 is frozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvfold.bench.ask.read_turns import ValuesSuite
from kvfold.data.premises import problems
from kvfold.data.values import History
from kvfold.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class GSM8KTurns(ValuesSuite):
    """Numbers of worked solutions."""

    data: Path | None = None

    name = "gsm8k_turns"
    version = 1
    data_file = "gsm8k.test.jsonl.xz"

    def samples(self, *, n: int, seed: int) -> Sequence[History]:
        """Draw problems in an order that follows from the seed."""
        if self.data is None:
            raise DataError(
                "the suite gsm8k_turns was asked for; it reads real problems and was given none; "
                "give --data with rows of question and answer, or the folder that holds gsm8k.test.jsonl.xz"
            )
        return problems(self.data, n=n, seed=seed)


SUITE = GSM8KTurns()
