"""dialogue: does a folded history still hold what was said, in real dialogues about real errands?

Dialogues are read turn by turn and folded after each. Where a reply repeats a value that was last said some turns ago,
the words before it are given and the value must be what the model would say greedily, token for token; that share is
the score. Records also hold how likely the values were, and the divergence of the replies from the full cache's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvfold.bench.ask.read_turns import ValuesSuite
from kvfold.data.values import History, histories
from kvfold.errors import DataError, SuiteError


@dataclass(frozen=True, slots=True, kw_only=True)
class DialogueSuite(ValuesSuite):
    """Values that replies repeat."""

    joined: int = 1  # dialogues that follow one another in one history
    turns: int | None = None  # of a history, from its start; none: all
    distance: int = 2  # turns since a value was last said, at least; at 1 it may stand among the newest tokens
    data: Path | None = None

    name = "dialogue"
    version = 1
    data_file = "sgd.dev.jsonl.xz"

    def __post_init__(self) -> None:
        for name in ("joined", "turns", "distance"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SuiteError(f"--set {name}={value} was given; it counts from 1; give 1 or more")

    def samples(self, *, n: int, seed: int) -> Sequence[History]:
        """Draw histories in which a reply repeats a value that was last said early enough."""
        if self.data is None:
            raise DataError(
                "the suite dialogue was asked for; it reads real dialogues and was given none; "
                "give --data with a file of task dialogues, or the folder that holds sgd.dev.jsonl.xz"
            )
        return histories(self.data, n=n, seed=seed, joined=self.joined, turns=self.turns, distance=self.distance)


SUITE = DialogueSuite()
