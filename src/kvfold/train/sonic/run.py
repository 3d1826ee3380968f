"""Training SONIC's scores, Nexus rows and their adapter for a model that itself stays as it is.

Conversations are drawn, longer ones as the run goes on, and the budget of each is drawn too, so that one training
serves them all. Knows nothing of how a batch costs (loss.py), and of the command line.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kvfold.adapters.adapter import Adapter
from kvfold.adapters.files import load_adapter, save_adapter
from kvfold.hf.load import load
from kvfold.train.loop import Trainer
from kvfold.train.losses import TokenLoss
from kvfold.train.processes import device, join_processes
from kvfold.train.run import Run
from kvfold.train.sonic.budgets import FixedBudgets
from kvfold.train.sonic.loss import SonicLoss
from kvfold.train.sonic.settings import SonicSettings
from kvfold.train.sonic.soft_selection import HardChoice
from kvfold.train.sonic.study import Study
from kvfold.train.sonic.talk_batch import TalkBatch, batch_talks
from kvfold.train.sonic.talks import Talks

KIND = "sonic"
_TURNS = ((0.08, (3, 4, 6)), (0.2, (4, 8, 12)), (1.0, (4, 8, 16, 20, 24)))  # share of the run -> turns drawn
_TURN_TOKENS = 45  # of a turn, about
_CHECKED = (0.5, 0.2, 0.1, 0.05, 1.0)  # kept fractions
_CHECKED_TURNS = 16
CHECK_SECONDS = 60.0  # after which a check of a finished run begins no further batch


@dataclass(slots=True, kw_only=True)
class _CheckSum:
    """What a check found at one budget. It changes with every batch."""

    batches: int = 0
    right: int = 0
    scored: int = 0
    divergence: float = 0.0
    rows: int = 0
    kept: int = 0

    def add(self, loss: TokenLoss, choice: HardChoice) -> None:
        """Add a batch."""
        self.batches += 1
        self.right += loss.right
        self.scored += loss.scored
        self.divergence += float(loss.mean)
        self.rows += choice.rows
        self.kept += choice.kept

    def words(self) -> dict[str, float]:
        """Give shares and the mean, in JSON's types."""
        return {
            "right": round(self.right / max(self.scored, 1), 4),
            "divergence": round(self.divergence / self.batches, 4),
            "rows": round(self.rows / max(self.kept, 1), 4),
        }


class SonicRun(Run):
    """A run that trains SONIC's adapter for a model; it changes as it trains."""

    settings: SonicSettings

    def __init__(self, settings: SonicSettings) -> None:
        super().__init__(settings, rank=join_processes())
        self._right: dict[str, float] = {}  # running share of whole replies right, by source
        self.rng = random.Random(f"{settings.seed}:{self.rank}")
        torch.manual_seed(settings.seed)
        self.model, self.tokenizer = load(settings.model, dtype=torch.float32)
        self.model.requires_grad_(False)
        self.model.to(device())  # pyright: ignore[reportArgumentType]
        self.talks = Talks(self.tokenizer, settings.mix, settings.data, self._study())
        self.adapter = self._begun().to(self.model.device)
        self.loss = SonicLoss(self.model, self.adapter, settings, self.rng)
        self.trainer = Trainer(self.adapter, settings.loop, self.loss)
        if settings.resume:
            self.resume()

    def _begun(self) -> Adapter:
        """A fresh adapter, with the scorer, and the rows if it has some, of the one to begin with."""
        settings = self.settings
        rows = 0 if settings.scorer_until >= 1 else 1
        adapter = Adapter.for_model(self.model, rows=rows, rank=settings.rank)
        if settings.start is None:
            return adapter
        begun = load_adapter(settings.start, self.model, kind=KIND)
        adapter.scorer.load_state_dict(begun.scorer.state_dict())
        if begun.has_rows and rows and begun.rank == settings.rank:
            adapter.load_state_dict(begun.state_dict())
        return adapter

    def _study(self) -> Study | None:
        """What asks the model about texts, where the mix wants it; the model answers in its usual number type."""
        if not self.settings.mix.study:
            return None
        model: Any = load(self.settings.model)[0]
        return Study(model.to(self.model.device), self.tokenizer)

    def batches(self) -> Iterator[TalkBatch]:
        """Talks without end, longer ones as the run goes on."""
        while True:
            share = self.trainer.share
            self.loss.share = share
            turns = next(turns for until, turns in _TURNS if share <= until)
            yield self.talks_of(self.rng, turns=self.rng.choice(turns))

    def talks_of(self, rng: random.Random, *, turns: int, jump: bool = True) -> TalkBatch:
        """Draw conversations of so many turns, about a batch of tokens."""
        settings = self.settings
        count = max(1, settings.batch_tokens // (_TURN_TOKENS * turns))
        source, talks = self.talks.draw(rng, turns=turns, count=count, most=settings.most_tokens)
        pad: Any = self.tokenizer.pad_token_id or 0
        return batch_talks(
            talks,
            sinks=settings.budgets.sinks,
            longest_jump=settings.budgets.gaps if jump else 0,
            rng=rng,
            pad=pad,
            source=source,
        )

    def learned(self, batch: TalkBatch, loss: TokenLoss) -> None:
        """Take the share of whole replies right into the running mean of the source."""
        if loss.scored:
            share = loss.right / loss.scored
            before = self._right.get(batch.source)
            self._right[batch.source] = share if before is None else 0.95 * before + 0.05 * share

    def state(self) -> dict:
        """Nothing: the adapter's weights are all that is learned."""
        return {}

    def restore(self, state: dict) -> None:
        """Nothing is to be taken up."""

    def findings(self) -> dict[str, Any]:
        """The losses, and the shares of whole replies right, by source."""
        losses = self.trainer.progress.losses
        return {
            "loss": {name: round(loss, 4) for name, loss in sorted(losses.items())},
            "right": {name: round(share, 3) for name, share in sorted(self._right.items())},
        }

    def finish(self) -> None:
        """Write the adapter, made of the averaged weights, with its training record; then once more with its scores."""
        if self.rank:
            return
        self.trainer.swap_averaged()
        self._write({"training": self.words()})
        self._write({"training": self.words(), "scores": self.check()})
        self.trainer.swap_averaged()

    def _write(self, about: dict[str, Any]) -> None:
        save_adapter(self.adapter, self.settings.out, kind=KIND, model=self.model, about=about)

    def check(
        self, *, batches: int = 8, seconds: float = CHECK_SECONDS, verbatim: float | None = None
    ) -> dict[str, Any]:
        """Whole replies right, divergence, and the share of rows, of conversations of 16 turns at several budgets.

        No batch begins after so many seconds; the first one always does.
        """
        sums = {keep: _CheckSum() for keep in _CHECKED}
        rng = random.Random("check")
        started = time.monotonic()
        for number in range(batches):
            if number and time.monotonic() - started > seconds:
                break
            batch = self.talks_of(rng, turns=_CHECKED_TURNS, jump=False)
            read = self.loss.read(batch)
            for keep, found in sums.items():
                budgets = FixedBudgets(slots_of=lambda tokens, keep=keep: int(keep * tokens))
                choice = HardChoice(verbatim=verbatim)
                found.add(self.loss.check(batch, read, budgets, choice), choice)
        return {str(keep): found.words() for keep, found in sums.items()}

    def words(self) -> dict[str, Any]:
        """How the adapter was trained, in JSON's types."""
        settings, progress = self.settings, self.trainer.progress
        return {
            "seed": settings.seed,
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds),
            "mix": asdict(settings.mix),
            "draw": asdict(settings.budgets),
            "terms": asdict(settings.terms),
            "rate": settings.loop.other_rate,
        }
