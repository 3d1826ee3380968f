"""Random ranks: bases and gates as training leaves them, without any, for models and for memories without one."""

import torch

from kvfold.adapters.ranks import inverse, left_out
from kvfold.attention.basis import Bases, Basis, by_head
from kvfold.encode.lowrank.format import LowRankFormat
from kvfold.encode.lowrank.gate import Gate
from kvfold.encode.lowrank.measured import DimensionLoss, MeasuredLayer, MeasuredRanks
from kvfold.encode.lowrank.ranks import BasisRanks, LayerRanks, Ranks
from kvfold.hf.binding import ModelBinding
from kvfold.hf.rotary import rotary_of

GRID = (0.25, 0.5, 1.0)


def basis(size, heads, parts=1):
    """A random map that is neither orthogonal nor far from it, for each part, and a mean."""
    shape = (parts, size // parts, size // parts)
    encode = torch.linalg.qr(torch.randn(shape))[0] + 0.1 * torch.randn(shape) / shape[-1] ** 0.5
    return Basis(encode=encode, decode=inverse(encode, heads), mean=torch.randn(size))


def levels_of(size):
    """Eight levels, the first without any dimension, the last with all."""
    steps = [0, 1, 2, 3, 4, 5, 6, 8]
    return tuple((step * size // 8, min(step + 1, 8) * size // 8 if step else 0) for step in steps)


def form(heads, size, *, rotary=None, parts=1, int8=False):
    pair = [basis(heads * size, heads, own) for own in (parts, 1)]
    levels = tuple((keys // parts * parts, values) for keys, values in levels_of(heads * size))
    return LowRankFormat(bases=Bases(keys=pair[0], values=pair[1], rotary=rotary), levels=levels, int8=int8)


def gate(own):
    dims, levels = own.size, len(own.levels)
    return Gate(
        cost=torch.rand(dims) + 0.1,
        left_out=left_out(own.levels, dims // 2, dims // 2),
        floor=torch.tensor(1e-3),
        scale=torch.ones(dims),
        weight=torch.randn(dims, levels) * 0.1,
        linear=torch.randn(levels) * 0.1,
        square=torch.randn(levels) * 0.1 - 1,
        bias=torch.randn(levels) * 0.1,
    )


def measured_layer(heads, size, rotary):
    """An orthogonal basis of each side, and losses that fall along it."""
    dims = heads * size
    losses = torch.cat([torch.rand(dims).sort(descending=True).values for _ in range(2)])
    encodes = [torch.linalg.qr(torch.randn(1, dims, dims))[0] for _ in range(2)]
    keys, values = (
        Basis(encode=encode, decode=by_head(encode.mT, heads), mean=torch.zeros(dims)) for encode in encodes
    )
    loss = DimensionLoss(falls=losses, alone=losses, noise=losses / 2, size=torch.ones(2 * dims))
    return MeasuredLayer(bases=Bases(keys=keys, values=values, rotary=rotary), loss=loss)


def random_ranks(heads, size, layers, *, rotary=None):
    """Ranks under every basis; `joint` only with rotations."""
    names = ["mixed", "heads", "rotated", "rotary"] + ["joint"] * (rotary is not None)
    bases = {}
    for name in names:
        turned = rotary if name == "joint" else None
        apart = {index: name == "heads" or (name == "mixed" and index % 2 == 0) for index in layers}
        forms = {index: form(heads, size, rotary=turned, parts=heads if apart[index] else 1) for index in layers}
        own = {
            index: LayerRanks(form=forms[index], gate=gate(forms[index]), rates=(0.2 + 0.05 * (index % 2), 0.5, 1.0))
            for index in layers
        }
        bases[name] = BasisRanks(layers=own, grid=GRID, trained=False)
    name = "rotated" if rotary is None else "joint"
    measured = {name: MeasuredRanks(layers={index: measured_layer(heads, size, rotary) for index in layers})}
    return Ranks(bases=bases, measured=measured)


def ranks_for(model):
    """Random ranks of a model."""
    binding = ModelBinding.of(model)
    try:
        rotary = rotary_of(model)
    except Exception:
        rotary = None
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return random_ranks(binding.kv_heads, binding.head_size, binding.folding_layers, rotary=rotary)
