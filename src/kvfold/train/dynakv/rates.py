"""Layers' shares of a rate: the rate of each layer when one threshold serves the gates of all of them.

Gates are read on batches of text. Where the gates of all layers together keep a rate, layers that matter more keep
more of their dimensions than others; these shares are measured once, and the cache then meets each layer's share.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kvfold.encode.lowrank.gate import allocate_ranks, largest_threshold, level_bias, levels_at
from kvfold.encode.lowrank.ranks import BasisRanks
from kvfold.train.dynakv.student import BLOCK, Reading, Student

LayerLogits: TypeAlias = Mapping[int, Tensor]  # [*slots L] of the gate of each layer
LayerDims: TypeAlias = Mapping[int, Sequence[int]]  # dimensions that each level of a layer keeps
LayerRates: TypeAlias = Mapping[int, float]

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
            scaled = share * rate * len(shares) / whole
            rates[index].append(min(scaled, 1.0))
    layers = {}
    for index, layer in ranks.layers.items():
        layers[index] = replace(layer, rates=(*rates[index], 1.0))
    return BasisRanks(layers=layers, grid=(*GRID, 1.0), trained=False)


def rates_at(ranks: BasisRanks, rate: float) -> dict[int, float]:
    """Each layer's share of a rate."""
    return {index: ranks.rate_of(index, rate) for index in ranks.layers}


def gate_logits(student: Student, batches: Sequence[TextBatch], rates: LayerRates | None) -> dict[int, Tensor]:
    """Logits [rows, S, L] of the gates of all layers over the batches, read at these rates."""
    seen: dict[int, list[Tensor]] = defaultdict(list)
    for ids, positions in batches:
        found: dict[int, Tensor] = {}
        context = middle_of(ids.shape[1])
        reading = Reading(context=context, rates=rates, logits=found)
        student.read(ids, positions, reading)
        for index, logits in found.items():
            seen[index].append(logits)
    return {index: torch.cat(logits) for index, logits in seen.items()}


def middle_of(length: int) -> int:
    """The start of the block in the middle of a row."""
    return length // 2 // BLOCK * BLOCK


def threshold_of(logits: LayerLogits, dims: LayerDims, rate: float) -> float:
    """The gates' threshold at which all layers together keep this share of their dimensions."""

    def kept(threshold: float) -> float:
        shares = shares_at(logits, dims, threshold)
        return sum(shares.values()) / len(shares)

    return largest_threshold(kept, rate)


def shares_at(logits: LayerLogits, dims: LayerDims, threshold: float) -> dict[int, float]:
    """The share of dimensions that each layer keeps at a threshold of all gates."""
    shares = {}
    for index, layer_logits in logits.items():
        layer_dims = dims[index]
        bias = level_bias(len(layer_dims), layer_logits)
        levels = levels_at(layer_logits, threshold, bias)
        dims_of = torch.tensor(layer_dims, device=layer_logits.device)
        kept = dims_of[levels].double().mean()
        shares[index] = float(kept) / layer_dims[-1]
    return shares


def spread_at(logits: LayerLogits, dims: LayerDims, rates: LayerRates) -> list[float]:
    """The share of all layers' slots in each level, when each layer meets its rate."""
    levels = []
    for index, layer_logits in logits.items():
        slots = layer_logits.flatten(0, -2)
        layer_dims = dims[index]
        layer_levels = allocate_ranks(slots, layer_dims, rate=rates[index], size=layer_dims[-1])
        levels.append(layer_levels)
    most = max(len(layer_dims) for layer_dims in dims.values())
    counts = torch.cat(levels).bincount(minlength=most).double()
    shares = counts / counts.sum()
    return [round(share, 4) for share in shares.tolist()]
