"""Rates in training: each layer's share of a rate, and how its gate spreads slots over levels there.

Gates are read on batches of text. Shares were measured by calibration, and the cache meets each layer's.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kvfold.encode.lowrank.gate import allocate_ranks
from kvfold.encode.lowrank.ranks import BasisRanks
from kvfold.train.dynakv.student import BLOCK, Reading, Student

LayerLogits: TypeAlias = Mapping[int, Tensor]  # [*slots L] of the gate of each layer
LayerDims: TypeAlias = Mapping[int, Sequence[int]]  # dimensions that each level of a layer keeps
LayerRates: TypeAlias = Mapping[int, float]

TextBatch: TypeAlias = tuple[Tensor, Tensor]  # ids and positions, [B, Q] each


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


def spread_at(logits: LayerLogits, dims: LayerDims, rates: LayerRates) -> list[float]:
    """The share of all layers' slots in each level, when each layer meets its rate."""
    levels = []
    for index, layer_logits in logits.items():
        slots = layer_logits.flatten(0, -2)
        layer_dims = dims[index]
        layer_levels = allocate_ranks(slots, layer_dims, rate=rates[index], size=layer_dims[-1])
        levels.append(layer_levels)
    most = max(len(layer_dims) for layer_dims in dims.values())
    counts = torch.cat(levels).bincount(minlength=most)
    counts = counts.double()
    shares = counts / counts.sum()
    return [round(share, 4) for share in shares.tolist()]
