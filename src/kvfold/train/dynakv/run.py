"""Training DynaKV's ranks for a model: bases and gates, against the model itself; one adapter for all rates.

Every step draws a rate, of which each layer has its measured share; a layer's gate is shifted, either way, until just
that is stored, as the cache does it. The loss is the distance to the full model's predictions and the
cross-entropy. Writes a checkpoint to resume from, a record of the run and the adapter. No command line here.
"""

import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from kvfold.adapters.ranks import save_ranks
from kvfold.encode.lowrank.ranks import BasisName, BasisRanks, Ranks
from kvfold.errors import DataError, FileError
from kvfold.hf.load import load
from kvfold.train.dynakv.calibrate import measure
from kvfold.train.dynakv.lora import settle, updatable
from kvfold.train.dynakv.student import BLOCK, Reading, Student, shares_at, shift_of, spread_at
from kvfold.train.dynakv.texts import Rows
from kvfold.train.processes import device

RATES = (0.15, 0.2, 0.3, 0.47, 0.6)  # drawn in training; lower ones cost so much that they would rule
_JUDGED = 25  # steps after which the fixed batches are read
GRID = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.47, 0.55, 0.65, 0.8)
ABLATIONS = ("bases", "gates", "hard", "entropy")  # what a run may go without


@dataclass(frozen=True, slots=True, kw_only=True)
class DynaSettings:
    """One run."""

    model: str
    out: Path
    data: Path | None = None  # a folder of sets, or one file; without it only generated text is read
    steps: int = 0  # 0: calibration only
    basis: str = "mixed"
    seed: int = 0
    resume: bool = False
    length: int = 768
    rows: int = 3
    calibration: int = 24  # rows that bases are measured on
    basis_rate: float = 1e-4
    gate_rate: float = 2e-3
    entropy: float = (
        0.05  # weight of the cross-entropy beside the distance to the full model; more makes it a fine-tuning
    )
    hard_from: float = 0.2  # share of the run at which every mask is hard; the share of hard masks grows up to there
    save_every: int = 100
    update: int = 0  # rank of updates to the model's attention projections, trained along; 0: the model stays
    update_rate: float = 5e-4
    without: tuple[str, ...] = ()  # ablations, of ABLATIONS

    def __post_init__(self) -> None:
        strange = [name for name in self.without if name not in ABLATIONS]
        if strange:
            raise DataError(
                f"a run without {', '.join(strange)} was asked; {', '.join(ABLATIONS)} can be left out; name these"
            )
        if self.basis not in get_args(BasisName):
            raise DataError(
                f"basis {self.basis!r} was asked; there are {', '.join(get_args(BasisName))}; give one of them"
            )
        if self.update < 0 or (self.update and not self.steps):
            raise DataError(
                f"updates of rank {self.update} were asked with {self.steps} steps; they are trained, or there are "
                "none; give steps, or 0 as the rank"
            )
        if self.steps < 0 or self.length < 4 * BLOCK:
            raise DataError(
                f"{self.steps} steps over rows of {self.length} tokens were asked; a run has 0 steps or more and rows "
                f"of at least {4 * BLOCK} tokens; give such numbers"
            )


class DynaRun:
    """A run: everything it needs, made once; `train` and `finish` do the work."""

    def __init__(self, settings: DynaSettings) -> None:
        self.settings = settings
        if settings.resume and not self._checkpoint.is_file():
            raise FileError(
                f"resuming from {self._checkpoint} was asked; there is no such checkpoint; leave out --resume to start"
            )
        self.model, self.tokenizer = load(settings.model)
        self.model.float().requires_grad_(False).to(device())  # pyright: ignore[reportArgumentType]
        torch.manual_seed(settings.seed)
        self.rng = random.Random(settings.seed)
        self.rows = Rows(self.tokenizer, settings.data, length=settings.length)
        self.last = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", 1 << 20)
        self.measured = self._measured()
        self.start = self._with_rates(self.measured.under(settings.basis))
        self.reader, self.updates = updatable(self.model, settings.update) if settings.update else (self.model, None)
        self.student = Student(self.reader, self.start)
        self.dims = {index: self.student.layer(index).dims for index in self.start.layers}
        self.optimiser = torch.optim.AdamW(self._groups(), betas=(0.9, 0.99), weight_decay=0.0)
        self.usual = self._distances() if settings.steps else {}
        self.held = 1.0  # on the fixed batches, masks hard: the mean over rates of how far it is now over the start's
        self.spread: dict[str, list[float]] = {}  # at each rate of the grid, the share of slots in each level
        self.step, self.seconds, self.loss = 0, 0.0, {"kl": 0.0, "entropy": 0.0}
        if settings.resume:
            self._resume()

    def train(self, report: Callable[[dict], None]) -> None:
        """All steps, with checkpoints; `report` is told where the run stands."""
        while self.step < self.settings.steps:
            started = time.monotonic()
            self._step()
            self.seconds += time.monotonic() - started
            if self.step % _JUDGED == 0 or self.step == self.settings.steps:
                now = self._distances()
                self.held = sum(now[rate] / self.usual[rate] for rate in RATES) / len(RATES)
            if self.step % 10 == 0 or self.step == self.settings.steps:
                report(self._record())
            if self.step % self.settings.save_every == 0 or self.step == self.settings.steps:
                self._save()

    def finish(self) -> Ranks:
        """Measure each layer's share of each rate on fresh rows, and write the adapter."""
        settings = self.settings
        if settings.update:
            settle(self.reader)
            self.model = self.reader  # what the adapter is for
            self.measured = self._measured()
            for part in (self.model, self.tokenizer):
                part.save_pretrained(settings.out / "model")
        bases = {name: self._with_rates(own) for name, own in self.measured.bases.items()}
        if settings.steps:
            bases[f"{settings.basis}-measured"] = self.start
            bases[settings.basis] = self._trained()
        ranks = Ranks(bases=bases)
        about = {
            "steps": self.step, "seconds": round(self.seconds), "seed": settings.seed, "length": settings.length,
            "data": None if settings.data is None else settings.data.name, "losses": self.loss,
            "without": list(settings.without), "update": settings.update, "spread": self.spread,
        }  # fmt: skip
        save_ranks(ranks, settings.out, model=self.model, about={"training": about})
        return ranks

    def _measured(self) -> Ranks:
        """Bases and gates of the model as it is, without training."""
        seeds = [f"calibration:{self.settings.seed}:{row}" for row in range(self.settings.calibration)]
        return measure(self.model, [self.rows.draw(random.Random(seed)) for seed in seeds], seed=self.settings.seed)

    def _groups(self) -> list[dict[str, Any]]:
        named = list(self.student.layers.named_parameters())
        bases = [one for name, one in named if name.split(".")[1] in ("keys", "values", "keys_mean", "values_mean")]
        gates = [one for name, one in named if name.split(".")[1] in ("weight", "bias", "linear", "square")]
        for name, group in (("bases", bases), ("gates", gates)):
            for parameter in group:
                parameter.requires_grad_(name not in self.settings.without)
        trained = [(bases, self.settings.basis_rate), (gates, self.settings.gate_rate)]
        if self.updates is not None:
            trained.append((list(self.updates.parameters()), self.settings.update_rate))
        return [{"params": some, "lr": rate, "highest": rate} for some, rate in trained]

    def _step(self) -> None:
        settings = self.settings
        done = self.step / settings.steps
        for group in self.optimiser.param_groups:
            group["lr"] = (
                group["highest"] * min(1.0, (self.step + 1) / 20) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
            )
        rate = self.rng.choice(RATES)
        hard = 0.0 if "hard" in settings.without else min(1.0, done / max(settings.hard_from, 1e-6))
        rates = self._rates(rate)
        blocks = settings.length // BLOCK
        reading = Reading(context=BLOCK * self.rng.randint(blocks // 3, max(blocks - 3, 1)), rates=rates, hard=hard)
        distance, entropy = self._losses(reading, self._batch())
        loss = distance + (0.0 if "entropy" in settings.without else settings.entropy) * entropy
        (loss / self.usual[rate]).backward()
        nn.utils.clip_grad_norm_([one for group in self.optimiser.param_groups for one in group["params"]], 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        for name, value in (("kl", distance / self.usual[rate]), ("entropy", entropy)):
            self.loss[name] += 0.05 * (float(value.detach()) - self.loss[name]) if self.step else float(value.detach())
        self.step += 1

    def _batch(self) -> tuple[Tensor, Tensor]:
        ids = self.rows.batch(self.settings.rows, self.rng).to(self.model.device)
        start = self.rng.randrange(max(self.last - ids.shape[1], 0) + 1)
        return ids, (torch.arange(ids.shape[1], device=ids.device) + start).expand_as(ids)

    @torch.no_grad()
    def _distances(self) -> dict[float, float]:
        """At each rate, how far from the full model the fixed batches are, masks hard."""
        found = {}
        for rate in RATES:
            reading = Reading(context=self.settings.length // 2 // BLOCK * BLOCK, rates=self._rates(rate))
            costs = [float(self._losses(reading, batch)[0]) for batch in self._fixed_batches()]
            found[rate] = max(sum(costs) / len(costs), 1e-6)
        return found

    def _rates(self, rate: float) -> dict[int, float]:
        """Each layer's share of a rate."""
        return {index: self.start.rate_of(index, rate) for index in self.dims}

    def _losses(self, reading: Reading, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Distance to the full model, and cross-entropy, of the tokens after the context."""
        ids, positions = batch
        kept = ids.shape[1] - reading.context
        with torch.no_grad():
            full = self.model(ids, position_ids=positions, use_cache=False, logits_to_keep=kept + 1).logits[:, :-1]
        found = self.student.read(ids, positions, reading)
        targets = ids[:, reading.context :].flatten()
        entropy = nn.functional.cross_entropy(found.flatten(0, 1).float(), targets)
        wanted, got = full.float().log_softmax(dim=-1), found.float().log_softmax(dim=-1)
        return (wanted.exp() * (wanted - got)).sum(dim=-1).mean(), entropy

    @torch.no_grad()
    def _with_rates(self, ranks: BasisRanks) -> BasisRanks:
        """The layers with their own share of each rate of the grid, as one shift of all gates deals it."""
        student = Student(self.model, ranks)
        dims = {index: student.layer(index).dims for index in ranks.layers}
        whole = _logits(student, self._fixed_batches(), None)
        rates: dict[int, list[float]] = {index: [] for index in dims}
        for rate in GRID:
            kept = shares_at(whole, dims, shift_of(whole, dims, rate))
            for index, share in kept.items():
                rates[index].append(min(share * rate * len(kept) / max(sum(kept.values()), 1e-9), 1.0))
        layers = {index: replace(own, rates=(*rates[index], 1.0)) for index, own in ranks.layers.items()}
        return BasisRanks(layers=layers, grid=(*GRID, 1.0), trained=False)

    @torch.no_grad()
    def _trained(self) -> BasisRanks:
        """What was learned; on the way, how its levels spread at each rate."""
        batches = self._fixed_batches()
        for rate in GRID:
            rates = self._rates(rate)
            self.spread[str(rate)] = spread_at(_logits(self.student, batches[:1], rates), self.dims, rates)
        layers = {index: self.student.layer(index).learned(own.rates) for index, own in self.start.layers.items()}
        return BasisRanks(layers=layers, grid=self.start.grid, trained=True)

    def _fixed_batches(self) -> list[tuple[Tensor, Tensor]]:
        """The same four batches in every run of a seed, whatever was drawn before."""
        state, self.rng = self.rng, random.Random("rates")
        batches = [self._batch() for _ in range(4)]
        self.rng = state
        return batches

    def _record(self) -> dict[str, Any]:
        return {
            "step": self.step, "share": self.step / max(self.settings.steps, 1), "seconds": round(self.seconds, 1),
            "tokens": self.step * self.settings.rows * self.settings.length,
            "losses": {name: round(value, 4) for name, value in (*self.loss.items(), ("held", self.held))},
        }  # fmt: skip

    def _save(self) -> None:
        settings = self.settings
        settings.out.mkdir(parents=True, exist_ok=True)
        state = {
            "layers": self.student.layers.state_dict(),
            "updates": None if self.updates is None else self.updates.state_dict(),
            "optimiser": self.optimiser.state_dict(), "step": self.step,
            "seconds": self.seconds, "loss": self.loss, "rng": self.rng.getstate(),
            "torch": torch.get_rng_state(),
        }  # fmt: skip
        torch.save(state, self._checkpoint.with_suffix(".new"))
        os.replace(self._checkpoint.with_suffix(".new"), self._checkpoint)
        with (settings.out / "record.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(self._record()) + "\n")

    def _resume(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True, map_location="cpu")
        self.student.layers.load_state_dict(state["layers"])
        if self.updates is not None:
            self.updates.load_state_dict(state["updates"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds, self.loss = state["step"], state["seconds"], state["loss"]
        version, numbers, gauss = state["rng"]
        self.rng.setstate((version, tuple(numbers), gauss))
        torch.set_rng_state(state["torch"])

    @property
    def _checkpoint(self) -> Path:
        return self.settings.out / "checkpoint.pt"


def _logits(student: Student, batches: Sequence[tuple[Tensor, Tensor]],
            rates: Mapping[int, float] | None) -> dict[int, Tensor]:  # fmt: skip
    """What the gates of all layers say of some batches, read at these rates."""
    seen: dict[int, list[Tensor]] = {int(index): [] for index in student.layers}
    for ids, positions in batches:
        reading = Reading(context=ids.shape[1] // 2 // BLOCK * BLOCK, rates=rates, logits={})
        student.read(ids, positions, reading)
        for index, logits in (reading.logits or {}).items():
            seen[index].append(logits)
    return {index: torch.cat(logits) for index, logits in seen.items()}
