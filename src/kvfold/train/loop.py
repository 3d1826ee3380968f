"""The training loop: steps of optimisers by a schedule, averaged weights, checkpoints that resume where they stopped.

Given a model and a source of batches it knows nothing of dialogues. Several processes average their gradients where
torch.distributed is running. A checkpoint is written to a new file and then renamed.
"""

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kvfold.errors import FileError, in_one_line
from kvfold.train.optimisers import FULL_RATE, ParameterGroup, groups_by_shape, optimisers_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """How a run is optimised; its length is given in seconds of training, in tokens or in steps."""

    seconds: float | None = None
    tokens: int | None = None
    steps: int | None = None
    matrix_rate: float | None = 0.01  # Muon, for all matrices of the layers; None: AdamW for them too
    other_rate: float = 0.0015  # AdamW, for embeddings and norms
    betas: tuple[float, float] = (0.9, 0.98)  # AdamW's
    fused: bool = True  # AdamW's fused kernel; the plain one differs from it in the last bits
    warmup_steps: int = 60
    flat_until: float = 0.3  # share of the run before the rate falls
    fall: Literal["linear", "cosine"] = "linear"
    last_rate: float = 0.02  # share of the rate at the end
    clip: float = 1.0
    average: float | None = 0.997  # memory of the averaged weights; None: there are none
    batches_a_step: int = 4

    def rate_at(self, step: int, share: float) -> float:
        """The share of the full learning rate at a step, when this share of the run is done."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        if share <= self.flat_until:
            return warm
        left = (1 - share) / (1 - self.flat_until)
        if self.fall == "cosine":
            left = (1 + math.cos(math.pi * (1 - left))) / 2
        return warm * (self.last_rate + (1 - self.last_rate) * left)


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
        if settings.steps:
            shares.append(self.step / settings.steps)
        return min(1.0, max(shares))

    def note(self, key: str, loss: float) -> None:
        """Take one loss into the running mean of its source."""
        before = self.losses.get(key)
        self.losses[key] = loss if before is None else 0.9 * before + 0.1 * loss


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


@runtime_checkable
class Differentiable(Protocol):
    """What the loop must know of a loss; the rest is between the loss and the run."""

    @property
    def mean(self) -> Tensor:
        """The number whose gradient is taken."""
        ...


class Trainer:
    """A model under training with its optimisers, averaged weights and counters."""

    def __init__(
        self,
        model: nn.Module,
        settings: LoopSettings,
        loss: Callable[[Any], Any],
        groups: Sequence[ParameterGroup] | None = None,
    ) -> None:
        """`model` holds the parameters to train; `loss` says what a batch costs; `groups` default to those by shape."""
        self.model: Any = model
        self.settings, self.progress, self.loss = settings, Progress(), loss
        if groups is None:
            groups = groups_by_shape(model, matrix_rate=settings.matrix_rate, other_rate=settings.other_rate)
            parameters = list(model.parameters())
        else:
            parameters = [parameter for group in groups for parameter in group.parameters]
        self.optimisers = optimisers_of(groups, betas=settings.betas, fused=settings.fused)
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        averaged = [] if settings.average is None else self.parameters
        self.averaged = [parameter.detach().clone() for parameter in averaged]
        self._since: float | None = None  # when time was last counted: waiting for other processes counts too
        self.processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

    @property
    def share(self) -> float:
        """How much of the run is done, 0 to 1."""
        return self.progress.share(self.settings)

    def rate(self) -> float:
        """The share of the full learning rate at this point."""
        return self.settings.rate_at(self.progress.step, self.share)

    def step(self, batches: Iterator[Any], learned: Callable[[Any, Any], None]) -> None:
        """One step over several batches; `learned` gets each batch and its loss."""
        tokens = 0
        since = self._since or time.monotonic()
        for _ in range(self.settings.batches_a_step):
            batch: Batched = next(batches)
            loss: Differentiable = self.loss(batch)
            (loss.mean / self.settings.batches_a_step).backward()
            tokens += batch.tokens
            self.progress.note(f"{batch.source}:{batch.rung}", float(loss.mean.detach()))
            learned(batch, loss)
        self._since = time.monotonic()
        self.progress.seconds += self._average_gradients(self._since - since)
        self._update()
        self.progress.step += 1
        self.progress.tokens += tokens * self.processes

    def _update(self) -> None:
        """Move the weights by their gradients, and the averaged weights towards them."""
        nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        rate = self.rate()
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group[FULL_RATE] * rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if self.settings.average is None:
            return
        # The memory is short at first, so that the first weights are soon forgotten.
        memory = min(self.settings.average, (self.progress.step + 1) / (self.progress.step + 10))
        for mean, parameter in zip(self.averaged, self.parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - memory)

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
        progress = self.progress
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "progress": (progress.step, progress.tokens, progress.seconds, progress.losses),
            "rng": rng.getstate(),
            "more": more,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        torch.save(state, new)
        os.replace(new, path)

    def resume(self, path: Path, *, rng: random.Random) -> dict:
        """Take up a checkpoint; returns what `save` was given as `more`. Raises FileError for one of another run."""
        refuse_missing(path)
        try:
            return self._taken_up(torch.load(path, weights_only=True, map_location="cpu"), rng)
        except Exception as error:  # of whatever kind torch, zip and pickle raise for what is no checkpoint
            reason = in_one_line(error, 200)
            raise FileError(
                f"resuming from {path} was asked; it is no whole checkpoint of this training ({reason}); leave out "
                "--resume to start"
            ) from error

    def _taken_up(self, state: Mapping[str, Any], rng: random.Random) -> dict:
        """Set weights, averages, optimisers, counters and random numbers as they were."""
        self.model.load_state_dict(state["model"])
        for mean, kept in zip(self.averaged, state["averaged"], strict=True):
            mean.copy_(kept)
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        step, tokens, seconds, losses = state["progress"]
        self.progress = Progress(step=step, tokens=tokens, seconds=seconds, losses=losses)
        version, numbers, gauss = state["rng"]
        rng.setstate((version, tuple(numbers), gauss))
        return state["more"]


def refuse_missing(checkpoint: Path) -> None:
    """Raise FileError where there is no checkpoint to resume from."""
    if not checkpoint.is_file():
        raise FileError(
            f"resuming from {checkpoint} was asked; there is no such checkpoint; leave out --resume to start"
        )
