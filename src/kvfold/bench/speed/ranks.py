"""Ranks for models of real shapes with random weights, spread as a trained adapter's: what speed is measured with.

Time depends on how many slots have which rank, not on what a latent means. So bases are random, levels are those of
the shipped tiny adapter in this shape's sizes, layer by layer in proportion to depth, and the gate goes by one random
direction, cut so that levels come as often as they did in training.
"""

import json
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch

from kvfold.adapters.files import WORDS
from kvfold.adapters.ranks import KIND, left_out
from kvfold.attention.low_rank import Bases, Basis, by_head
from kvfold.encode.lowrank.gate import Gate
from kvfold.encode.lowrank.part import Form, Levels
from kvfold.encode.lowrank.ranks import BasisRanks, LayerRanks, Ranks
from kvfold.hf.load import SHIPPED
from kvfold.hf.rotary import rotary_of
from kvfold.hf.tap import folding_layers

_RATE = "0.47"  # whose spread of levels is taken
_SHARPNESS = 40.0


def ranks_in_shape(model: Any, *, seed: int = 0) -> Ranks:
    """Ranks for a model of any shape, spread as the shipped tiny adapter's are at rate 0.47."""
    words = json.loads((SHIPPED / "tiny" / "adapters" / KIND / WORDS).read_text(encoding="utf-8"))
    config = model.config.get_text_config(decoder=True)
    heads = config.num_key_value_heads
    size = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    folding, source = folding_layers(model), torch.Generator().manual_seed(seed)
    bases = {}
    for name, trained in words["bases"].items():
        rotary = rotary_of(model) if name.startswith("joint") else None
        known = list(trained["layers"].values())
        layers = {}
        for at, index in enumerate(folding):
            like = known[at * len(known) // len(folding)]  # the trained layer at the same share of the depth
            key_parts = heads if like["parts"] > 1 else 1
            keys = _basis(size, heads, key_parts, source, model.device)
            values = _basis(size, heads, 1, source, model.device)
            form = Form(
                bases=Bases(keys=keys, values=values, rotary=rotary),
                levels=_scaled(like["levels"], size, keys.parts),
            )
            gate = _gate(form, words["training"]["spread"].get(_RATE), source).to(model.device)
            layers[index] = LayerRanks(form=form, gate=gate, rates=tuple(like["rates"]))
        bases[name] = BasisRanks(layers=layers, grid=tuple(trained["grid"]), trained=False)
    return Ranks(bases=bases)


def _basis(size: int, heads: int, parts: int, source: torch.Generator, device: torch.device) -> Basis:
    """A random orthogonal basis of so many parts."""
    square = torch.randn(parts, size // parts, size // parts, generator=source)
    encode = torch.linalg.qr(square)[0].contiguous().to(device)
    return Basis(encode=encode, decode=by_head(encode.mT, heads), mean=torch.zeros(size, device=device))


def _scaled(levels: Sequence[Sequence[int]], size: int, parts: int) -> Levels:
    """The same shares of keys and values in another size, equally many dimensions of every part of keys."""
    key_dims, value_dims = levels[-1]  # the highest level keeps everything
    found = []
    for keys, values in levels:
        key_share = keys / key_dims * size
        found.append((round(key_share / parts) * parts, round(values / value_dims * size)))
    return tuple(found)


def _gate(form: Form, spread: Sequence[float] | None, source: torch.Generator) -> Gate:
    """A gate whose levels come as often as `spread` says, for latents of independent normal numbers.

    The latent's length along one random direction is a normal number. Each level has a place on that line, in the
    middle of its share of the normal distribution, and the gate takes the level whose place is nearest.
    """
    count, dims = len(form.levels), form.size
    shares = torch.tensor(spread or [1 / count] * count).clamp(min=1e-4)
    shares = shares / shares.sum()
    ends = shares.cumsum(0).clamp(max=1 - 1e-4)
    middles = (ends - shares / 2).clamp(1e-4, 1 - 1e-4)
    places = torch.tensor([NormalDist().inv_cdf(float(middle)) for middle in middles])
    direction = torch.nn.functional.normalize(torch.randn(dims, generator=source), dim=0)
    zero, half = torch.zeros(count), len(form.bases.keys.mean)
    return Gate(
        cost=torch.ones(dims),
        left_out=left_out(form.levels, half, dims - half),
        floor=torch.tensor(1.0),
        scale=torch.ones(dims),
        # -sharpness * (x - place)^2 without its x^2, which all levels share.
        weight=2 * _SHARPNESS * direction[:, None] * places,
        linear=zero,
        square=zero,
        bias=-_SHARPNESS * places.square(),
    )
