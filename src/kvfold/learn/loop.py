"""The training loop: optimisers, schedule, averaged weights, checkpoints that resume exactly where they stopped.

Given a model and a source of batches it knows nothing of dialogues. Several processes average their gradients where
torch.distributed is running. A checkpoint is written to a new file and then renamed.
"""

import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.errors import FileError
from kvfold.learn.batches import Batch
from kvfold.learn.losses import TokenLoss, next_token_loss
from kvfold.learn.muon import Muon


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """How a run is optimised; its length is given in seconds of training or in tokens."""

    seconds: float | None = None
    tokens: int | None = None
    matrix_rate: float = 0.01  # Muon, for all matrices of the layers
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


class Trainer:
    """A model under training with its optimisers, averaged weights and counters."""

    def __init__(self, model: nn.Module, settings: LoopSettings) -> None:
        self.model: Any = model
        self.settings, self.progress = settings, Progress()
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        matrices = [parameter for name, parameter in named if parameter.ndim == 2 and "embed" not in name]
        others = [parameter for name, parameter in named if not (parameter.ndim == 2 and "embed" not in name)]
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=settings.matrix_rate),
            torch.optim.AdamW(others, lr=settings.other_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self.parameters = [parameter for _, parameter in named]
        self.averaged = [parameter.detach().clone() for parameter in self.parameters]
        self.bfloat16 = quick_in_bfloat16(self.parameters[0].device)
        self.processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

    def rate(self) -> float:
        """The share of the full learning rate at this point."""
        done, settings = self.progress.share(self.settings), self.settings
        warm = min(1.0, (self.progress.step + 1) / settings.warmup_steps)
        if done <= settings.flat_until:
            return warm
        left = (1 - done) / (1 - settings.flat_until)
        return warm * (settings.last_rate + (1 - settings.last_rate) * left)

    def step(self, batches: Iterator[Batch], learned: Callable[[Batch, TokenLoss], None]) -> None:
        """One step over several batches; `learned` is told the outcome of each."""
        started, tokens = time.monotonic(), 0
        for _ in range(self.settings.batches_a_step):
            batch = next(batches)
            loss = self.loss(batch)
            (loss.mean / self.settings.batches_a_step).backward()
            tokens += batch.ids.numel()
            self._note(batch, loss)
            learned(batch, loss)
        elapsed = self._average_gradients(time.monotonic() - started)
        started = time.monotonic()
        nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        for optimiser, rate in zip(self.optimisers, (self.settings.matrix_rate, self.settings.other_rate), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * self.rate()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        memory = min(self.settings.average, (self.progress.step + 1) / (self.progress.step + 10))
        for mean, parameter in zip(self.averaged, self.parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - memory)
        self.progress.step += 1
        self.progress.tokens += tokens * self.processes
        self.progress.seconds += elapsed + (time.monotonic() - started if self.processes == 1 else 0.0)

    def loss(self, batch: Batch) -> TokenLoss:
        """The loss of one batch; a mask of ones keeps jumps in positions from being read as packed sequences."""
        device = next(self.model.parameters()).device
        ids = batch.ids.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            output = self.model.model(
                input_ids=ids,
                position_ids=batch.positions.to(device),
                attention_mask=torch.ones_like(ids),
                use_cache=False,
            )
            return next_token_loss(output.last_hidden_state, self.model.lm_head, ids, batch.weights.to(device))

    def _note(self, batch: Batch, loss: TokenLoss) -> None:
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
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
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
        state = torch.load(path, weights_only=True)
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


def quick_in_bfloat16(device: torch.device) -> bool:
    """Whether products are quicker in bfloat16 than in float32 here; processors without them emulate bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    took = {}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(512, 512, dtype=dtype, device=device)
        laps = []
        for _ in range(8):
            started = time.monotonic()
            square @ square
            laps.append(time.monotonic() - started)
        took[dtype] = min(laps)
    return took[torch.bfloat16] < took[torch.float32]
