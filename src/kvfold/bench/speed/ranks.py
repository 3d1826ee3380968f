"""Ranks for models of real shapes with random weights, spread as a trained adapter's: what speed is measured with.

Time depends on how many slots have which rank, not on what a latent means. So bases are random, levels are those of
the shipped tiny adapter in this shape's sizes, layer by layer in proportion to depth, and the gate goes by one random
direction, cut so that levels come as often as they did in training.
"""

import json
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import torch

from kvfold.adapters.folder import WORDS
from kvfold.adapters.ranks import KIND, left_out
from kvfold.attention.basis import Bases, Basis, by_head
from kvfold.attention.rotary import Rotary
from kvfold.encode.lowrank.format import Levels, LowRankFormat
from kvfold.encode.lowrank.gate import Gate
from kvfold.encode.lowrank.ranks import BasisRanks, LayerRanks, Ranks
from kvfold.hf.binding import ModelBinding
from kvfold.hf.load import SHIPPED
from kvfold.hf.rotary import rotary_of

_RATE = "0.47"  # whose spread of levels is taken
_SHARPNESS = 40.0  # of the gate: so steep that hardly any slot lies between two levels


def ranks_in_shape(model: Any, *, seed: int = 0) -> Ranks:
    """Draw ranks for a model of any shape, spread as the shipped tiny adapter's are at rate 0.47."""
    words = json.loads((SHIPPED / "tiny" / "adapters" / KIND / WORDS).read_text(encoding="utf-8"))
    spread = words["training"]["spread"].get(_RATE)
    source = torch.Generator().manual_seed(seed)
    bases = {}
    for name, basis in words["bases"].items():
        rotary = rotary_of(model) if name.startswith("joint") else None
        layers = _layers(model, list(basis["layers"].values()), rotary, spread, source)
        bases[name] = BasisRanks(layers=layers, grid=tuple(basis["grid"]), trained=False)
    return Ranks(bases=bases)


def _layers(
    model: Any,
    trained: Sequence[Mapping[str, Any]],
    rotary: Rotary | None,
    spread: Sequence[float] | None,
    source: torch.Generator,
) -> dict[int, LayerRanks]:
    """Draw the ranks of every folding layer, each like the trained layer at the same share of the depth."""
    binding = ModelBinding.of(model)
    heads = binding.kv_heads
    size = heads * binding.head_size
    folding = binding.folding_layers
    layers = {}
    for at, index in enumerate(folding):
        like = trained[at * len(trained) // len(folding)]
        parts = heads if like["parts"] > 1 else 1
        keys = _basis(size, heads, parts, source, model.device)
        values = _basis(size, heads, 1, source, model.device)
        bases = Bases(keys=keys, values=values, rotary=rotary)
        form = LowRankFormat(bases=bases, levels=_scaled(like["levels"], size, parts))
        gate = _gate(form, spread, source).to(model.device)
        layers[index] = LayerRanks(form=form, gate=gate, rates=tuple(like["rates"]))
    return layers


def _basis(size: int, heads: int, parts: int, source: torch.Generator, device: torch.device) -> Basis:
    """Draw an orthogonal map for each part."""
    width = size // parts
    square = torch.randn(parts, width, width, generator=source)
    orthogonal, _ = torch.linalg.qr(square)
    encode = orthogonal.contiguous().to(device)
    return Basis(encode=encode, decode=by_head(encode.mT, heads), mean=torch.zeros(size, device=device))


def _scaled(levels: Sequence[Sequence[int]], size: int, parts: int) -> Levels:
    """Scale levels to another size, with equally many dimensions of every part of keys."""
    most_keys, most_values = levels[-1]
    scaled = []
    for keys, values in levels:
        of_a_part = round(keys / most_keys * size / parts)
        scaled.append((of_a_part * parts, round(values / most_values * size)))
    return tuple(scaled)


def _gate(form: LowRankFormat, spread: Sequence[float] | None, source: torch.Generator) -> Gate:
    """Make a gate whose levels come as often as `spread` says, for latents of independent normal numbers.

    A random direction orders the slots. Level k wins between two thresholds on that order, which are those of a
    normal distribution: its weight and bias are those of a parabola around the middle between them.
    """
    count = len(form.levels)
    dims = form.size
    shares = torch.tensor(spread or [1 / count] * count).clamp(min=1e-4)
    shares = shares / shares.sum()
    ends = shares.cumsum(0).clamp(max=1 - 1e-4)
    middles = (ends - shares / 2).clamp(1e-4, 1 - 1e-4)
    normal = NormalDist()
    places = torch.tensor([normal.inv_cdf(float(middle)) for middle in middles])
    direction = torch.nn.functional.normalize(torch.randn(dims, generator=source), dim=0)
    half = len(form.bases.keys.mean)
    return Gate(
        cost=torch.ones(dims),
        left_out=left_out(form.levels, half, dims - half),
        floor=torch.tensor(1.0),
        scale=torch.ones(dims),
        weight=2 * _SHARPNESS * direction[:, None] * places,
        linear=torch.zeros(count),
        square=torch.zeros(count),
        bias=-_SHARPNESS * places.square(),
    )
