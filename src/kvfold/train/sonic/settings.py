"""Settings of SONIC's training: one run, and the weights of its loss.

The run's length and learning rate stand in the loop's settings, the data in those of the talks.
"""

from dataclasses import dataclass, field

from kvfold.train.loop import LoopSettings
from kvfold.train.run import RunSettings
from kvfold.train.sonic.budgets import DrawnBudgets
from kvfold.train.sonic.talks import Mix


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Weights of the loss; 0 switches a term off."""

    kl: float = 1.0  # to the model with everything in sight
    cross_entropy: float = 0.2  # of the reply itself
    output: float = 0.1  # what is read of Nexus rows against what was read of the folded tokens
    weight: float = 0.02  # their log-sum-exp
    hinge: float = 0.0  # attention mass below half of the folded tokens'
    salience: float = 0.3  # error of the scores as a forecast of later attention
    choice: float = 1.0  # KL where the scores choose, softly, what stays; after a first fifth of their training

    @property
    def guided(self) -> bool:
        """Whether any term looks at attention."""
        return bool(self.output or self.weight or self.hinge)


@dataclass(frozen=True, slots=True, kw_only=True)
class SonicSettings(RunSettings):
    """One run of SONIC training."""

    model: str
    rank: int = 32
    batch_tokens: int = 3072  # tokens and Nexus rows of a batch
    most_tokens: int = 1600  # of a conversation
    guided_queries: int = 160  # queries a conversation whose attention is looked at
    scorer_until: float = 0.15  # share of the run in which only the salience scorer is trained
    mix: Mix = field(default_factory=Mix)
    budgets: DrawnBudgets = field(default_factory=DrawnBudgets)
    terms: Terms = field(default_factory=Terms)
    loop: LoopSettings = field(default_factory=LoopSettings)
