"""Training DynaKV's ranks for a model: bases and gates, against the model itself; one adapter for all rates.

Every step draws a rate, of which each layer has its measured share; a layer's gate is shifted, either way, until just
that is stored, as the cache does it. The loss is the distance to the full model's predictions and the
cross-entropy. No command line here.
"""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kvfold.adapters.ranks import load_ranks, save_ranks
from kvfold.encode.lowrank.measured import MeasuredRanks
from kvfold.encode.lowrank.ranks import BasisRanks, Ranks
from kvfold.errors import DataError
from kvfold.hf.binding import ModelBinding
from kvfold.hf.load import load
from kvfold.train.dynakv.bases import names_of
from kvfold.train.dynakv.calibrate import Report, Samples, calibrate
from kvfold.train.dynakv.lora import settle, updatable
from kvfold.train.dynakv.loss import RATES, RankBatch, RankCost, RankLoss
from kvfold.train.dynakv.rates import TextBatch, gate_logits, rates_at, spread_at
from kvfold.train.dynakv.settings import DynaSettings
from kvfold.train.dynakv.start import GRID, begin
from kvfold.train.dynakv.student import BLOCK, Reading, Student
from kvfold.train.dynakv.texts import TokenRows
from kvfold.train.loop import Trainer
from kvfold.train.losses import quick_in_bfloat16
from kvfold.train.optimisers import ParameterGroup
from kvfold.train.processes import device
from kvfold.train.run import Run

_FIXED = 2  # batches that distances and the spread over levels are measured on


def silent(line: str) -> None:
    """Say nothing."""


class DynaRun(Run):
    """A run that measures and trains DynaKV's ranks for a model; it changes as it trains."""

    settings: DynaSettings

    def __init__(self, settings: DynaSettings, report: Report = silent) -> None:
        """`report` gets the lines of a calibration that comes first."""
        super().__init__(settings)
        self.report = report
        self.model, self.tokenizer = load(settings.model)
        self.model.float().requires_grad_(False).to(device())  # pyright: ignore[reportArgumentType]
        torch.manual_seed(settings.seed)
        self.rng = random.Random(settings.seed)
        self.rows = TokenRows(self.tokenizer, settings.data, length=settings.length)
        self.fixed = self._fixed_batches()
        self.names = names_of(settings.basis, self.model)
        self.measured = self._measured()
        self.start = begin(self.measured[self.names[0]])
        self.reader, self.updates = self.model, None
        if settings.update:
            self.reader, self.updates = updatable(self.model, settings.update)
        self.student = Student(self.reader, self.start)
        self.cost = RankCost(
            model=self.model,
            student=self.student,
            start=self.start,
            entropy_weight=settings.entropy_weight,
            bfloat16=quick_in_bfloat16(self.model.device),
        )
        self.cost.measure(self.fixed)
        self.losses = {"kl": 0.0, "entropy": 0.0}  # running means
        self.spread: dict[str, list[float]] = {}  # at each rate of the grid, the share of slots in each level
        self.trainer = self._trainer()
        if settings.resume:
            self.resume()

    def batches(self) -> Iterator[RankBatch]:
        """Rows of text, each batch at a drawn rate and with a drawn length of its context."""
        settings = self.settings
        blocks = settings.length // BLOCK
        while True:
            rate = self.rng.choice(RATES)
            raw_blocks = self.rng.randint(blocks // 3, max(blocks - 3, 1))
            context = BLOCK * raw_blocks
            hard = settings.hard_share(self.trainer.share)
            reading = Reading(context=context, rates=rates_at(self.start, rate), hard=hard)
            ids, positions = self._texts(self.rng)
            yield RankBatch(ids=ids, positions=positions, rate=rate, reading=reading)

    def learned(self, batch: RankBatch, loss: RankLoss) -> None:
        """Take both parts of the loss into their running means."""
        for name, part in (("kl", loss.distance), ("entropy", loss.entropy)):
            value = float(part.detach())
            pace = 0.05 if self.trainer.progress.step else 1.0
            self.losses[name] += pace * (value - self.losses[name])

    def findings(self) -> dict[str, Any]:
        """The running means of both parts of the loss; `kl` is over the distance before training."""
        return {"losses": {name: round(value, 4) for name, value in self.losses.items()}}

    def state(self) -> dict:
        """The running means, and torch's random state, which draws the hard masks."""
        return {"losses": self.losses, "torch": torch.get_rng_state()}

    def restore(self, state: dict) -> None:
        """Take up what `state` gave."""
        self.losses = state["losses"]
        torch.set_rng_state(state["torch"])

    def finish(self) -> Ranks:
        """Write the adapter, with the measured ranks beside the trained ones."""
        settings = self.settings
        if settings.update:
            settle(self.reader)
            self.model = self.reader  # the updated model, which the adapter is for
            self.measured = self._calibrated()
            for part in (self.model, self.tokenizer):
                part.save_pretrained(settings.out / "model")
        ranks = Ranks(bases={self.names[0]: self._trained()}, measured=self.measured, default=self.names[0])
        save_ranks(ranks, settings.out, model=self.model, about={"training": self._words()})
        return ranks

    def _words(self) -> dict[str, Any]:
        """How the adapter was trained, in JSON's types."""
        settings, progress = self.settings, self.trainer.progress
        return {
            "steps": progress.step,
            "seconds": round(progress.seconds),
            "seed": settings.seed,
            "length": settings.length,
            "data": None if settings.data is None else settings.data.name,
            "tokens": progress.tokens,
            "losses": self.losses,
            # On the fixed batches, how far the student is now over how far it was.
            "held": {str(rate): round(share, 4) for rate, share in self.cost.held(self.fixed).items()},
            "without": list(settings.without),
            "update": settings.update,
            "spread": self.spread,
        }

    def _trainer(self) -> Trainer:
        """The common loop over bases, gates and updates, each with its learning rate."""
        settings = self.settings
        groups = {
            "bases": ParameterGroup(parameters=self.student.basis_parameters, rate=settings.basis_rate),
            "gates": ParameterGroup(parameters=self.student.gate_parameters, rate=settings.gate_rate),
        }
        for name in settings.without:
            for parameter in groups[name].parameters if name in groups else ():
                parameter.requires_grad_(False)
        learned = nn.ModuleDict({"layers": self.student.layers})
        if self.updates is not None:
            learned["updates"] = self.updates
            parameters = list(self.updates.parameters())
            groups["updates"] = ParameterGroup(parameters=parameters, rate=settings.update_rate)
        return Trainer(learned, settings.loop, self.cost, list(groups.values()))

    def _measured(self) -> dict[str, MeasuredRanks]:
        """Take the measured ranks of the adapter to start with, or measure them."""
        start = self.settings.start
        return self._calibrated() if start is None else self._measured_before(start)

    def _calibrated(self) -> dict[str, MeasuredRanks]:
        """Measure ranks of the model as it is now."""
        settings = self.settings
        texts = []
        for row in range(settings.calibration):
            rng = random.Random(f"calibration:{settings.seed}:{row}")
            texts.append(self.rows.draw(rng))
        return calibrate(self.model, texts, names=self.names, drawn=Samples(), report=self.report, seed=settings.seed)

    def _measured_before(self, start: str) -> dict[str, MeasuredRanks]:
        """The measured ranks of an adapter. Raises DataError where it lacks a basis that is asked for."""
        found = load_ranks(start, self.model).measured
        missing = [name for name in self.names if name not in found]
        if missing:
            raise DataError(
                f"basis {missing[0]!r} was asked; the adapter {start} has measured {', '.join(found) or 'none'}; "
                "give one of these, or leave out --from"
            )
        return {name: found[name] for name in self.names}

    def _texts(self, rng: random.Random) -> TextBatch:
        """Rows of text, at positions that start anywhere the model has them."""
        limit = ModelBinding.of(self.model).position_limit or 1 << 20
        ids = self.rows.batch(self.settings.rows, rng).to(self.model.device)
        length = ids.shape[1]
        start = rng.randrange(max(limit - length, 0) + 1)
        positions = torch.arange(length, device=ids.device) + start
        return ids, positions.expand_as(ids)

    def _fixed_batches(self) -> list[TextBatch]:
        """The same batches in every run, whatever was drawn before."""
        rng = random.Random("rates")
        return [self._texts(rng) for _ in range(_FIXED)]

    @torch.no_grad()
    def _trained(self) -> BasisRanks:
        """The learned ranks; on the way, how slots spread over levels at each rate."""
        for rate in GRID:
            rates = rates_at(self.start, rate)
            logits = gate_logits(self.student, self.fixed[:1], rates)
            self.spread[str(rate)] = spread_at(logits, self.student.dims, rates)
        layers = {}
        for index, layer in self.start.layers.items():
            layers[index] = self.student.layer(index).learned(layer.rates)
        return BasisRanks(layers=layers, grid=self.start.grid, trained=True)
