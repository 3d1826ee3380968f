"""Layers' shares of a rate: the rate of each layer when one threshold serves the gates of all of them.

Gates are read on batches of text. Where the gates of all layers together keep a rate, layers that matter more keep
more of their dimensions than others; these shares are measured once, and the cache then meets each layer's share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kvfold.encode.lowrank.gate import allocate_ranks, largest_threshold, level_bias, levels_at
from kvfold.encode.lowrank.ranks import BasisRanks
from kvfold.train.dynakv.student import BLOCK, Reading, Student

GRID = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.47, 0.55, 0.65, 0.8)

TextBatch: TypeAlias = tuple[Tensor, Tensor]  # ids and positions, [B, Q] each


@torch.no_grad()
def with_rates(model: Any, ranks: BasisRanks, batches: Sequence[TextBatch]) -> BasisRanks:
    """Measure, on full readings of the batches, each layer's share of every rate of the grid."""
    student = Student(model, ranks)
    logits = gate_logits(student, batches, None)
    rates: dict[int, list[float]] = {index: [] for index in student.dims}
    for rate in GRID:
        threshold = threshold_of(logits, student.dims, rate)
        shares = shares_at(logits, student.dims, threshold)
        whole = max(sum(shares.values()), 1e-9)
        for index, share in shares.items():
            # Levels are steps, so the threshold keeps a little less than the rate; shares are scaled up to it.
            rates[index].append(min(share * rate * len(shares) / whole, 1.0))
    layers = {index: replace(layer, rates=(*rates[index], 1.0)) for index, layer in ranks.layers.items()}
    return BasisRanks(layers=layers, grid=(*GRID, 1.0), trained=False)


def rates_at(ranks: BasisRanks, rate: float) -> dict[int, float]:
    """Each layer's share of a rate."""
    return {index: ranks.rate_of(index, rate) for index in ranks.layers}


def gate_logits(student: Student, batches: Sequence[TextBatch], rates: Mapping[int, float] | None) -> dict[int, Tensor]:
    """Logits [rows, S, L] of the gates of all layers over the batches, read at these rates."""
    seen: dict[int, list[Tensor]] = {index: [] for index in student.dims}
    for ids, positions in batches:
        reading = Reading(context=middle_of(ids.shape[1]), rates=rates, logits={})
        student.read(ids, positions, reading)
        for index, logits in (reading.logits or {}).items():
            seen[index].append(logits)
    return {index: torch.cat(logits) for index, logits in seen.items()}


def middle_of(length: int) -> int:
    """The start of the block in the middle of a row."""
    return length // 2 // BLOCK * BLOCK


def threshold_of(logits: Mapping[int, Tensor], dims: Mapping[int, Sequence[int]], rate: float) -> float:
    """The gates' threshold at which all layers together keep this share of their dimensions."""

    def kept(threshold: float) -> float:
        shares = shares_at(logits, dims, threshold)
        return sum(shares.values()) / len(shares)

    return largest_threshold(kept, rate)


def shares_at(logits: Mapping[int, Tensor], dims: Mapping[int, Sequence[int]], threshold: float) -> dict[int, float]:
    """The share of dimensions that each layer keeps at a threshold of all gates."""
    shares = {}
    for index, layer_logits in logits.items():
        bias = level_bias(len(dims[index]), layer_logits)
        levels = levels_at(layer_logits, threshold, bias)
        kept = torch.tensor(dims[index], device=layer_logits.device)[levels]
        shares[index] = float(kept.double().mean()) / dims[index][-1]
    return shares


def spread_at(
    logits: Mapping[int, Tensor], dims: Mapping[int, Sequence[int]], rates: Mapping[int, float]
) -> list[float]:
    """The share of all layers' slots in each level, when each layer meets its rate."""
    levels = []
    for index, layer_logits in logits.items():
        slots = layer_logits.flatten(0, -2)
        levels.append(allocate_ranks(slots, dims[index], rate=rates[index], size=dims[index][-1]))
    most = max(len(layer_dims) for layer_dims in dims.values())
    counts = torch.cat(levels).bincount(minlength=most).double()
    return [round(share, 4) for share in (counts / counts.sum()).tolist()]
