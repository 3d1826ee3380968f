"""The training loop: optimisers, schedule, averaged weights, checkpoints that resume exactly where they stopped.

Given a model and a source of batches it knows nothing of dialogues. Several processes average their gradients where
torch.distributed is running. A checkpoint is written to a new file and then renamed.
"""

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kvfold.errors import FileError
from kvfold.train.losses import TokenLoss
from kvfold.train.muon import Muon


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """How a run is optimised; its length is given in seconds of training or in tokens."""

    seconds: float | None = None
    tokens: int | None = None
    matrix_rate: float | None = 0.01  # Muon, for all matrices of the layers; None: AdamW for them too
    other_rate: float = 0.0015  # AdamW, for embeddings and norms
    warmup_steps: int = 60
    flat_until: float = 0.3  # share of the run before the rate falls linearly
    last_rate: float = 0.02  # share of the rate at the end
    clip: float = 1.0
    average: float = 0.997  # memory of the averaged weights
    batches_a_step: int = 4


@dataclass(slots=True, kw_only=True)
class Progress:
    """Counters of a run, which change with every step; they go into the checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)  # running mean by source

    def share(self, settings: LoopSettings) -> float:
        """How much of the run is done, 0 to 1."""
        shares = [0.0]
        if settings.seconds:
            shares.append(self.seconds / settings.seconds)
        if settings.tokens:
            shares.append(self.tokens / settings.tokens)
        return min(1.0, max(shares))


@runtime_checkable
class Batched(Protocol):
    """What the loop must know of a batch; the rest is between its source and the loss."""

    @property
    def source(self) -> str:
        """What it was drawn from."""
        ...

    @property
    def rung(self) -> int:
        """How hard it is, counted from 0."""
        ...

    @property
    def tokens(self) -> int:
        """Rows that it runs through the model, padding counted."""
        ...


class Trainer:
    """A model under training with its optimisers, averaged weights and counters."""

    def __init__(self, model: nn.Module, settings: LoopSettings, loss: Callable[[Any], TokenLoss]) -> None:
        """`model` holds the parameters to train; `loss` says what a batch costs."""
        self.model: Any = model
        self.settings, self.progress, self.loss = settings, Progress(), loss
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        by_muon = [settings.matrix_rate is not None and one.ndim == 2 and "embed" not in name for name, one in named]
        matrices = [parameter for (_, parameter), muon in zip(named, by_muon, strict=True) if muon]
        others = [parameter for (_, parameter), muon in zip(named, by_muon, strict=True) if not muon]
        self.optimisers: list[tuple[torch.optim.Optimizer, float]] = [
            (
                torch.optim.AdamW(others, lr=settings.other_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
                settings.other_rate,
            )
        ]
        if settings.matrix_rate is not None:
            self.optimisers.insert(0, (Muon(matrices, lr=settings.matrix_rate), settings.matrix_rate))
        self.parameters = [parameter for _, parameter in named]
        self.averaged = [parameter.detach().clone() for parameter in self.parameters]
        self._since: float | None = None  # when time was last counted: waiting for other processes counts too
        self.processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

    def rate(self) -> float:
        """The share of the full learning rate at this point."""
        done, settings = self.progress.share(self.settings), self.settings
        warm = min(1.0, (self.progress.step + 1) / settings.warmup_steps)
        if done <= settings.flat_until:
            return warm
        left = (1 - done) / (1 - settings.flat_until)
        return warm * (settings.last_rate + (1 - settings.last_rate) * left)

    def step(self, batches: Iterator[Any], learned: Callable[[Any, TokenLoss], None]) -> None:
        """One step over several batches; `learned` is told the outcome of each."""
        tokens, since = 0, self._since or time.monotonic()
        for _ in range(self.settings.batches_a_step):
            batch = next(batches)
            loss = self.loss(batch)
            (loss.mean / self.settings.batches_a_step).backward()
            tokens += batch.tokens
            self._note(batch, loss)
            learned(batch, loss)
        self._since = time.monotonic()
        self.progress.seconds += self._average_gradients(self._since - since)
        nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        for optimiser, rate in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * self.rate()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        memory = min(self.settings.average, (self.progress.step + 1) / (self.progress.step + 10))
        for mean, parameter in zip(self.averaged, self.parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - memory)
        self.progress.step += 1
        self.progress.tokens += tokens * self.processes

    def _note(self, batch: Batched, loss: TokenLoss) -> None:
        key = f"{batch.source}:{batch.rung}"
        before = self.progress.losses.get(key)
        now = float(loss.mean.detach())
        self.progress.losses[key] = now if before is None else 0.9 * before + 0.1 * now

    def _gradients(self) -> list[Tensor]:
        """Every parameter's gradient; a parameter that no loss reached is a broken model."""
        gradients = [parameter.grad for parameter in self.parameters]
        assert all(gradient is not None for gradient in gradients), "a parameter has no gradient"
        return [gradient for gradient in gradients if gradient is not None]

    def _average_gradients(self, elapsed: float) -> float:
        """Average gradients over the processes, and the time, so that all stop at the same step."""
        if self.processes == 1:
            return elapsed
        clock = torch.tensor([elapsed], device=self.parameters[0].device)
        flat = torch.cat([gradient.flatten() for gradient in self._gradients()] + [clock])
        torch.distributed.all_reduce(flat)
        flat /= self.processes
        start = 0
        for gradient in self._gradients():
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
        return float(flat[-1])

    def swap_averaged(self) -> None:
        """Exchange the weights with their running average; call twice to get back."""
        for parameter, mean in zip(self.parameters, self.averaged, strict=True):
            kept = parameter.detach().clone()
            parameter.data.copy_(mean)
            mean.copy_(kept)

    def save(self, path: Path, *, rng: random.Random, more: dict) -> None:
        """Write everything that resuming needs; a torn write leaves the old file."""
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged,
            "optimisers": [optimiser.state_dict() for optimiser, _ in self.optimisers],
            "progress": (self.progress.step, self.progress.tokens, self.progress.seconds, self.progress.losses),
            "rng": rng.getstate(),
            "more": more,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        torch.save(state, new)
        os.replace(new, path)

    def resume(self, path: Path, *, rng: random.Random) -> dict:
        """Take up a checkpoint; returns what `save` was given as `more`."""
        if not path.is_file():
            raise FileError(f"resuming from {path} was asked; there is no such checkpoint; leave out --resume to start")
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.model.load_state_dict(state["model"])
        for mean, kept in zip(self.averaged, state["averaged"], strict=True):
            mean.copy_(kept)
        for (optimiser, _), kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        step, tokens, seconds, losses = state["progress"]
        self.progress = Progress(step=step, tokens=tokens, seconds=seconds, losses=losses)
        version, numbers, gauss = state["rng"]
        rng.setstate((version, tuple(numbers), gauss))
        return state["more"]


def carry_out(trainer: Trainer, batches: Iterator[Any], learned: Callable[[Any, TokenLoss], None], *,
              record: Callable[[], dict], save: Callable[[], None], out: Path, first: bool, save_every_seconds: float,
              tell: Callable[[dict], None]) -> None:  # fmt: skip
    """Train to the end; `tell` gets a record every 25 steps, and the first process writes it, and the checkpoints."""

    def note() -> None:
        line = record()
        if first:
            with (out / "record.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
        tell(line)

    out.mkdir(parents=True, exist_ok=True)
    saved = time.monotonic()
    while trainer.progress.share(trainer.settings) < 1:
        trainer.step(batches, learned)
        if trainer.progress.step % 25 == 0:
            note()
        if first and time.monotonic() - saved > save_every_seconds:
            save()
            saved = time.monotonic()
    if first:
        save()
    note()
