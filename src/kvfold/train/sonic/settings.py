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

    choice: float = 1.0  # divergence from the model with everything in sight, where scores choose what stays
    cross_entropy: float = 0.0  # of the reply itself
    salience: float = 0.3  # error of the scores as a forecast of later attention


@dataclass(frozen=True, slots=True, kw_only=True)
class SonicSettings(RunSettings):
    """One run of SONIC training."""

    model: str
    rank: int = 32
    batch_tokens: int = 3072  # tokens and Nexus rows of a batch
    most_tokens: int = 1600  # of a conversation
    guided_queries: int = 160  # queries a conversation whose attention the scorer forecasts
    scorer_until: float = 0.15  # share of the run in which only the scorer is trained; 1: there are no rows
    as_used: bool = False  # replies see the choice of use; soft weights only give the gradient
    start: str | None = None  # an adapter to begin with: a folder, or "shipped"
    mix: Mix = field(default_factory=Mix)
    budgets: DrawnBudgets = field(default_factory=DrawnBudgets)
    terms: Terms = field(default_factory=Terms)
    loop: LoopSettings = field(default_factory=LoopSettings)
