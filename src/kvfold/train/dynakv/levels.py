"""Levels and untrained gates: how many dimensions a slot may keep, and which level it gets before any training.

A dimension's score is what the loss changes by when it is left out. Levels take dimensions by their scores; a gate
keeps a slot's dimensions until little enough of the score is left out. Knows nothing of models.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.adapters.ranks import left_out
from kvfold.attention.basis import Bases
from kvfold.encode.lowrank.format import Levels, LowRankFormat
from kvfold.encode.lowrank.gate import Gate
from kvfold.encode.lowrank.ranks import BasisRanks, LayerRanks
from kvfold.train.dynakv.moments import LayerMoments, energies

BUCKETS = 24  # that keys and values together are cut into; a level keeps the first of them
_KEPT = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24)  # buckets of each level
_SHARPNESS = 2.0  # of the untrained gate, in logarithms of what is left out
_SMALLEST = 0.05  # of the largest dimension's size, as the gate sees a dimension
_FLOOR = 1e-4  # of the mean slot's whole cost
_MIDDLE = 0.03  # of the mean slot's whole cost, left out where the untrained gate is in doubt


def with_gates(
    bases: Mapping[int, Bases],
    scores: Mapping[int, Tensor],
    moments: Mapping[int, LayerMoments],
) -> BasisRanks:
    """Levels by the scores of all dimensions, and untrained gates that share one threshold."""
    total = sum(layer.sum() for layer in scores.values())
    mean_cost = float(total) / len(scores)
    layers = {}
    for index, layer_bases in bases.items():
        layer = moments[index]
        energy = energies(layer_bases, layer)
        levels = levels_by_score(scores[index], len(layer_bases.keys.mean), parts=layer_bases.keys.parts)
        form = LowRankFormat(bases=layer_bases, levels=levels)
        gate = energy_gate(
            form,
            scores[index] / energy.clamp(min=1e-12),
            energy,
            floor=_FLOOR * mean_cost,
            middle=_MIDDLE * mean_cost,
        )
        layers[index] = LayerRanks(form=form, gate=gate, rates=(1.0,))
    return BasisRanks(layers=layers, grid=(1.0,), trained=False)


def levels_by_score(scores: Float[Tensor, " X"], keys: int, *, parts: int = 1) -> Levels:
    """How many dimensions of keys and of values each level keeps: bucket by bucket, whichever scores higher.

    Keys of several parts keep equally many of each.
    """
    values = len(scores) - keys
    # A bucket of keys has equally many dimensions of every part.
    keys_bucket = max(keys * 2 // BUCKETS // parts, 1) * parts
    values_bucket = max(values * 2 // BUCKETS, 1)
    kept_keys = kept_values = 0
    path = [(0, 0)]
    while kept_keys < keys or kept_values < values:
        keys_gain = _mean_score(scores[:keys], kept_keys, keys_bucket)
        values_gain = _mean_score(scores[keys:], kept_values, values_bucket)
        if values_gain > keys_gain:
            kept_values = min(kept_values + values_bucket, values)
        else:
            kept_keys = min(kept_keys + keys_bucket, keys)
        path.append((kept_keys, kept_values))
    last = len(path) - 1
    steps = {round(share / BUCKETS * last) for share in _KEPT}
    return tuple(path[step] for step in sorted(steps))


def _mean_score(scores: Float[Tensor, " X"], start: int, count: int) -> float:
    """The mean score of the next bucket; less than any where none is left."""
    if start >= len(scores):
        return -1.0
    return float(scores[start : start + count].mean())


def energy_gate(
    form: LowRankFormat,
    cost: Float[Tensor, " X"],
    energy: Float[Tensor, " X"],
    *,
    floor: float,
    middle: float,
) -> Gate:
    """A gate without training: a slot is kept until little enough is left out.

    It sees only what a level leaves out, as a parabola in its logarithm with the vertex at `middle`.
    """
    keys = len(form.bases.keys.mean)
    values = len(form.bases.values.mean)
    levels = len(form.levels)
    zero = torch.zeros(levels, device=cost.device)
    vertex = torch.tensor(middle).log()
    keys_size = _typical_size(energy[:keys])
    values_size = _typical_size(energy[keys:])
    return Gate(
        cost=cost,
        left_out=left_out(form.levels, keys, values).to(cost.device),
        floor=torch.tensor(floor, device=cost.device),
        scale=torch.cat([keys_size, values_size]),
        weight=torch.zeros(len(cost), levels, device=cost.device),
        linear=zero + 2 * _SHARPNESS * vertex,
        square=zero - _SHARPNESS,
        bias=zero.clone(),
    )


def _typical_size(energy: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Typical sizes of latent dimensions, none much smaller than the largest.

    A basis that turns a little pours more of a large dimension into a small one than that ever held; a gate that
    divides by too little would read just this, and training falls apart.
    """
    sizes = energy.sqrt()
    smallest = max(_SMALLEST * float(sizes.max()), 1e-6)
    return sizes.clamp(min=smallest)
