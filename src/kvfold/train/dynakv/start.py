"""The start of training: calibrated bases, levels along their own cuts, and gates that give all slots alike.

A level is what calibration keeps of a layer at some rate, so levels are nested and every layer begins with its measured
share of a rate. Untrained, `dynakv` is then `pca` at the rates of the grid, and training can only tell slots apart.
Knows nothing of text and of files.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.adapters.ranks import left_out
from kvfold.encode.lowrank.format import LowRankFormat
from kvfold.encode.lowrank.gate import Gate
from kvfold.encode.lowrank.measured import DimensionLoss, MeasuredRanks
from kvfold.encode.lowrank.ranks import BasisRanks, LayerRanks

GRID = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.47, 0.55, 0.65, 0.8, 1.0)
_LOWEST = 0.025  # rate of the first level, which every slot keeps
_SHARPNESS = 0.5  # of an untrained gate, in levels
_SMALLEST = 0.05  # of the largest dimension's size, as the gate sees a dimension
_FLOOR = 1e-4  # of the mean slot's whole cost
_SLACK = 1e-3  # of a dimension: a level's own rate must reach it in spite of rounding


def begin(measured: MeasuredRanks) -> BasisRanks:
    """Make ranks that can be trained of measured ones."""
    lowest = measured.cuts(_LOWEST)
    cuts = [measured.cuts(rate) for rate in GRID]
    layers = {}
    for index, layer in measured.layers.items():
        of_layer = [cut[index] for cut in cuts]
        levels = tuple(dict.fromkeys([lowest[index], *of_layer]))  # a layer may have one cut for several rates
        form = LowRankFormat(bases=layer.bases, levels=levels)
        rates = []
        for cut in of_layer:
            share = (sum(cut) + _SLACK) / form.size
            rates.append(min(share, 1.0))
        gate = even_gate(form, layer.loss)
        layers[index] = LayerRanks(form=form, gate=gate, rates=tuple(rates))
    return BasisRanks(layers=layers, grid=GRID, trained=False)


def even_gate(form: LowRankFormat, loss: DimensionLoss) -> Gate:
    """Make a gate that has learned nothing: every slot gets the same level."""
    keys = len(form.bases.keys.mean)
    values = len(form.bases.values.mean)
    count = len(form.levels)
    device = loss.noise.device
    cost = loss.noise / loss.size.square().clamp(min=1e-12)
    zeros = torch.zeros(count, device=device)
    # Its logits are a parabola over the levels; what is added for a rate moves the top of it.
    bias = -_SHARPNESS * torch.arange(count, device=device).square()
    whole_cost = loss.noise.sum().clamp(min=1e-12)
    keys_size = _typical_size(loss.size[:keys])
    values_size = _typical_size(loss.size[keys:])
    return Gate(
        cost=cost,
        left_out=left_out(form.levels, keys, values).to(device),
        floor=_FLOOR * whole_cost,
        scale=torch.cat([keys_size, values_size]),
        weight=torch.zeros(len(cost), count, device=device),
        linear=zeros,
        square=zeros.clone(),
        bias=bias.float(),
    )


def _typical_size(sizes: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Give the sizes of latent dimensions, none much smaller than the largest.

    A basis that turns a little pours more of a large dimension into a small one than that ever held; a gate that
    divides by too little would read just this, and training falls apart.
    """
    smallest = max(_SMALLEST * float(sizes.max()), 1e-6)
    return sizes.clamp(min=smallest)
