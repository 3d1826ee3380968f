"""Settings of DynaKV training: one run, what it may go without, and how it is optimised.

A run that cannot be is refused when its settings are made. Knows nothing of how a run goes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from kvfold.encode.lowrank.ranks import BasisName
from kvfold.errors import DataError
from kvfold.train.dynakv.student import BLOCK
from kvfold.train.loop import LoopSettings
from kvfold.train.run import RunSettings

SPLITS = ("loss", "even")  # how a rate is shared out: by samples of the loss, or all alike without a backward pass
ABLATIONS = ("bases", "gates", "hard", "entropy")  # what a run may go without


@dataclass(frozen=True, slots=True, kw_only=True)
class DynaSettings(RunSettings):
    """One run."""

    model: str
    steps: int | None = 1200
    seconds: float | None = None  # of training, in place of steps
    start: str | None = None  # an adapter whose measured ranks are trained: a folder, or "shipped"; None: measure
    basis: str | None = None  # which are measured, by names with commas; the first is trained. None: the model's best
    length: int = 768
    rows: int = 3
    calibration: int = 24  # rows that bases are measured on
    basis_rate: float = 3e-4
    gate_rate: float = 2e-3
    # Weight of the cross-entropy beside the distance to the full model; more of it makes training a fine-tuning.
    entropy: float = 0.05
    hard_from: float = 0.2  # share of the run at which every mask is hard; the share of hard masks grows up to there
    update: int = 0  # rank of updates to the model's attention projections, trained along; 0: the model stays
    update_rate: float = 5e-4
    without: tuple[str, ...] = ()  # ablations, of ABLATIONS

    def __post_init__(self) -> None:
        strange = [name for name in self.without if name not in ABLATIONS]
        if strange:
            raise DataError(
                f"a run without {', '.join(strange)} was asked; {', '.join(ABLATIONS)} can be left out; name these"
            )
        strange = [name for name in (self.basis or "").split(",") if name.strip() not in ("", *get_args(BasisName))]
        if strange:
            raise DataError(
                f"basis {strange[0]!r} was asked; there are {', '.join(get_args(BasisName))}; give some of them"
            )
        if self.update < 0:
            raise DataError(f"updates of rank {self.update} were asked; 0 leaves the model as it is; give 0 or more")
        if (self.steps is None) == (self.seconds is None):
            raise DataError("a run was asked with no length, or with two; it needs one; give --steps or --minutes")
        if (self.steps is not None and self.steps < 1) or self.length < 4 * BLOCK:
            raise DataError(
                f"{self.steps} steps over rows of {self.length} tokens were asked; a run has a step or more and rows "
                f"of at least {4 * BLOCK} tokens; give such numbers"
            )

    @property
    def loop(self) -> LoopSettings:
        """The learning rates fall by a cosine from the start; the weights are not averaged."""
        return LoopSettings(
            steps=self.steps,
            seconds=self.seconds,
            betas=(0.9, 0.99),
            fused=False,
            warmup_steps=20,
            flat_until=0.0,
            fall="cosine",
            average=None,
            batches_a_step=1,
        )

    @property
    def entropy_weight(self) -> float:
        """The weight of the cross-entropy; 0 in a run that goes without it."""
        return 0.0 if "entropy" in self.without else self.entropy

    def hard_share(self, done: float) -> float:
        """The share of slots whose mask is hard when this share of the run is done."""
        return 0.0 if "hard" in self.without else min(1.0, done / max(self.hard_from, 1e-6))


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """One calibration: bases and what the loss minds, without training."""

    model: str
    out: Path  # the folder of the adapter
    data: Path | None = None  # a folder of sets, or a file; without it only generated text is read
    basis: str | None = None  # names with commas, the adapter's default first; None: the model's best
    rows: int = 30
    length: int = 1024  # tokens of a row
    seed: int = 0
    split: str = "loss"  # of SPLITS

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise DataError(f"split {self.split!r} was asked; a rate is shared out by {' or '.join(SPLITS)}; give one")
        if self.rows < 1 or self.length < 4 * BLOCK:
            raise DataError(
                f"{self.rows} rows of {self.length} tokens were asked; bases are measured on a row or more of at "
                f"least {4 * BLOCK} tokens; give such numbers"
            )
