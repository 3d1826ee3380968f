"""What to train on next: sources that grow from short to long, each at its pace.

A source is a ladder of rungs (keys of a drill, turns of a dialogue, tokens of a document). Its samples come mostly
from the highest rung it has reached; it climbs when the scored replies there are mostly right. Dialogues wait for
their drill. Without such a curriculum recall does not appear at all. Knows nothing of models.
"""

import random
from dataclasses import dataclass, field

CLIMB_AT = 0.8  # share of scored replies right before the next rung
_MEMORY = 12  # batches that the running share remembers


@dataclass(slots=True, kw_only=True)
class Ladder:
    """One source of samples and how far it has come; changes as training goes on."""

    name: str
    rungs: tuple[int, ...]
    weight: float  # share of batches, before it is mastered
    after: tuple[str, int] | None = None  # (other source, rung index) that must be reached first
    rung: int = 0
    right: float = 0.0  # running share of scored replies right, on the highest rung
    batches: int = 0  # seen on the highest rung

    @property
    def mastered(self) -> bool:
        """Whether the last rung is nearly always right."""
        return self.rung == len(self.rungs) - 1 and self.right >= CLIMB_AT and self.batches >= _MEMORY

    def choose(self, rng: random.Random) -> int:
        """A rung's index: the highest one in two thirds of the draws, else an earlier one."""
        return self.rung if self.rung == 0 or rng.random() < 0.67 else rng.randrange(self.rung)

    def learn(self, rung: int, share: float) -> bool:
        """Take note of one batch; True when the ladder climbed."""
        if rung != self.rung:
            return False
        self.batches += 1
        pace = max(1 / self.batches, 2 / (_MEMORY + 1))
        self.right += pace * (share - self.right)
        if self.right < CLIMB_AT or self.batches < _MEMORY or self.rung == len(self.rungs) - 1:
            return False
        self.rung, self.right, self.batches = self.rung + 1, 0.0, 0
        return True


@dataclass(slots=True, kw_only=True)
class Curriculum:
    """All ladders of a run; changes as training goes on, and goes into the checkpoint."""

    ladders: dict[str, Ladder] = field(default_factory=dict)
    mastered_share: float = 0.35  # what is left of a weight once its source is mastered

    def open(self) -> list[Ladder]:
        """The sources whose condition is met."""
        return [ladder for ladder in self.ladders.values() if self._met(ladder)]

    def draw(self, rng: random.Random) -> tuple[Ladder, int]:
        """The next source and rung."""
        ladders = self.open()
        weights = [one.weight * (self.mastered_share if one.mastered else 1.0) for one in ladders]
        ladder = rng.choices(ladders, weights)[0]
        return ladder, ladder.choose(rng)

    def state(self) -> dict:
        """Plain values for a checkpoint."""
        return {name: (one.rung, one.right, one.batches) for name, one in self.ladders.items()}

    def restore(self, state: dict) -> None:
        """Take up the values of `state`; sources it does not name start afresh."""
        for name, (rung, right, batches) in state.items():
            if name in self.ladders:
                one = self.ladders[name]
                one.rung, one.right, one.batches = min(rung, len(one.rungs) - 1), right, batches

    def climb(self) -> None:
        """Put every source on its last rung, for a model that has been there before."""
        for one in self.ladders.values():
            one.rung = len(one.rungs) - 1

    def _met(self, ladder: Ladder) -> bool:
        if ladder.after is None:
            return True
        other = self.ladders[ladder.after[0]]
        return other.rung >= ladder.after[1]


def base_curriculum() -> Curriculum:
    """The sources of the base model: copies, drills, dialogues, documents, natural text."""
    keys, turns, far = (2, 3, 4, 6), (2, 4, 8, 16, 24), (256, 512, 1024, 2048, 4096)
    ladders = [
        Ladder(name="copies", rungs=(64, 128, 256), weight=0.8),
        Ladder(name="drill/people", rungs=keys, weight=2.0),
        Ladder(name="drill/kinds", rungs=(4, 6, 8), weight=2.0),
        Ladder(name="drill/prices", rungs=keys, weight=2.0),
        Ladder(name="drill/sums", rungs=(30, 60, 100), weight=3.0),
        Ladder(name="drill/lists", rungs=(2, 4, 6), weight=1.2),
        Ladder(name="drill/relatives", rungs=(2, 4, 6), weight=1.5, after=("drill/people", 1)),
        Ladder(name="drill/places", rungs=(2, 4, 6), weight=1.2, after=("drill/people", 1)),
        Ladder(name="drill/rules", rungs=(2, 4, 6), weight=3.0),
        Ladder(name="chat/recall", rungs=turns, weight=4.0, after=("drill/people", 1)),
        Ladder(name="chat/coreference", rungs=turns, weight=4.5, after=("drill/people", 1)),
        Ladder(name="chat/arithmetic", rungs=turns, weight=4.5, after=("drill/prices", 1)),
        Ladder(name="chat/rules", rungs=turns, weight=2.5),
        Ladder(name="needle/single", rungs=far, weight=3.0, after=("copies", 1)),
        Ladder(name="needle/multikey", rungs=far, weight=8.0, after=("copies", 1)),
        Ladder(name="needle/multivalue", rungs=far, weight=2.0, after=("chat/recall", 1)),
        Ladder(name="needle/multiquery", rungs=far, weight=1.5, after=("chat/recall", 1)),
        Ladder(name="needle/variable", rungs=(256, 512, 1024), weight=0.8, after=("chat/recall", 1)),
        Ladder(name="natural", rungs=(256,), weight=0.8, after=("copies", 1)),
    ]
    return Curriculum(ladders={ladder.name: ladder for ladder in ladders})
