"""Calibration: bases in which the keys and values of a model need few dimensions, measured on text. No training.

Covariances and means are added up in float64 over real tokens, sinks left out. A second reading measures what the
loss minds of a dimension: its first-order change, squared, when the dimension is left out of all tokens of a text at
once (token by token it is misleading: errors of values add up, errors of keys cancel). Rows stand at random positions,
so that a basis of rotated keys holds anywhere in the text. Knows nothing of files.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvfold.adapters.ranks import inverse, left_out
from kvfold.attention.basis import Bases, Basis
from kvfold.attention.rotary import Rotary, unrotate
from kvfold.encode.lowrank.format import Levels, LowRankFormat
from kvfold.encode.lowrank.gate import Gate
from kvfold.encode.lowrank.ranks import BasisRanks, LayerRanks, Ranks
from kvfold.errors import ModelError
from kvfold.hf.binding import ModelBinding
from kvfold.hf.probe import replace_attention
from kvfold.hf.rotary import rotary_of

SINKS = 4
BUCKETS = 24  # that keys and values together are cut into; a level keeps some of them
_KEPT = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24)  # buckets of each level
_SHARPNESS = 2.0  # of the untrained gate, in logarithms of what is left out
_SMALLEST = 0.05  # of the largest dimension's size, as the gate sees a dimension
_FLOOR = 1e-4  # of the mean slot's whole cost
_MOST, _DEARER = 0.95, 1.65  # of the energy; how many times the dimensions for it each head by itself may need


@dataclass(slots=True, kw_only=True)
class Moments:
    """Sums over tokens of one kind of rows of a layer. It changes as text is read."""

    count: int = 0
    total: Tensor | None = None
    square: Tensor | None = None

    def add(self, rows: Float[Tensor, "N X"]) -> None:
        """Take up some rows."""
        rows = rows.double()
        self.count += len(rows)
        self.total = rows.sum(dim=0) + (0 if self.total is None else self.total)
        self.square = rows.T @ rows + (0 if self.square is None else self.square)

    @property
    def mean(self) -> Float[Tensor, " X"]:
        """The mean row."""
        assert self.total is not None
        return self.total / self.count

    @property
    def covariance(self) -> Float[Tensor, "X X"]:
        """About the mean."""
        assert self.square is not None
        return self.square / self.count - self.mean[:, None] * self.mean


@dataclass(slots=True, kw_only=True)
class _Layer:
    """What is added up of one layer. It changes as text is read."""

    turned: Moments = field(default_factory=Moments)  # keys as they are scored
    plain: Moments = field(default_factory=Moments)  # keys before rotation
    values: Moments = field(default_factory=Moments)


def measure(model: Any, texts: Sequence[Sequence[int]], *, seed: int = 0) -> Ranks:
    """Ranks of a model measured on token rows of equal length, with a gate that goes by energy alone."""
    rotary = _rotary(model)
    sums = {index: _Layer() for index in ModelBinding.of(model).folding_layers}
    for rows in _readings(model, texts, seed):
        for index, own in rows.items():
            _add(sums[index], own, rotary)
    heads = model.config.get_text_config(decoder=True).num_key_value_heads
    names = ["mixed", "rotated", "heads"] + (["joint", "rotary"] if rotary is not None else [])
    values = {index: principal(own.values, heads) for index, own in sums.items()}
    bases = {
        name: {
            index: Bases(keys=_keys_basis(own, name, heads, rotary), values=values[index],
                         rotary=rotary if name == "joint" else None)
            for index, own in sums.items()
        }
        for name in names
    }  # fmt: skip
    worths: dict[tuple[str, int], Tensor] = {}
    for rows in _readings(model, texts, seed):
        for name in names:
            for index, own in rows.items():
                new = _worth(bases[name][index], own)
                worths[name, index] = new + worths.get((name, index), torch.zeros_like(new))
    tokens = sum(len(text) - SINKS for text in texts)
    found = {
        name: with_gates(bases[name], {index: worths[name, index] / tokens for index in sums}, sums) for name in names
    }
    return Ranks(bases=found)


def _rotary(model: Any) -> Rotary | None:
    try:
        return rotary_of(model)
    except ModelError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """One text in one layer: keys, values and the gradients of its loss to both, sinks left out."""

    keys: Tensor  # S H D
    values: Tensor
    keys_gradient: Tensor
    values_gradient: Tensor
    positions: Tensor


def _readings(model: Any, texts: Sequence[Sequence[int]], seed: int) -> Iterator[dict[int, _Rows]]:
    """Every text once, at a position that follows from the seed."""
    rng = random.Random(seed)
    for row in texts:
        ids = torch.tensor([list(row)], device=model.device)
        last = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or len(row)
        start = rng.randrange(max(last - len(row), 0) + 1)
        yield _read(model, ids, torch.arange(len(row), device=ids.device)[None] + start)


def _read(model: Any, ids: Int[Tensor, "1 Q"], positions: Int[Tensor, "1 Q"]) -> dict[int, _Rows]:
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        keys, values = (rows if rows.requires_grad else rows.requires_grad_() for rows in (keys, values))
        keys.retain_grad()
        values.retain_grad()
        seen[index] = (keys, values)
        return nn.functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )

    with replace_attention(model, attend), torch.enable_grad():
        logits = model(ids, position_ids=positions, use_cache=False).logits[0, :-1].float()
        nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    model.zero_grad(set_to_none=True)

    def rows(tensor: Tensor | None) -> Tensor:
        assert tensor is not None, "every layer is on the way to the loss"
        return tensor.detach()[0, :, SINKS:].transpose(0, 1).float()  # S H D

    return {
        index: _Rows(
            keys=rows(keys), values=rows(values), keys_gradient=rows(keys.grad), values_gradient=rows(values.grad),
            positions=positions[0, SINKS:],
        )
        for index, (keys, values) in seen.items()
    }  # fmt: skip


def _add(own: _Layer, rows: _Rows, rotary: Rotary | None) -> None:
    own.turned.add(rows.keys.flatten(1))
    own.values.add(rows.values.flatten(1))
    if rotary is not None:
        cosines, sines = (angles[:, None] for angles in rotary.at(rows.positions))
        own.plain.add(unrotate(rows.keys, cosines, sines).flatten(1))


def _keys_basis(own: _Layer, name: str, heads: int, rotary: Rotary | None) -> Basis:
    if name == "joint":
        return principal(own.plain, heads)
    if name == "rotary":
        assert rotary is not None
        return _rotary_basis(own.turned, heads, rotary)
    apart = name == "heads" or (name == "mixed" and cheap_apart(own.turned, heads))
    return principal(own.turned, heads, parts=heads if apart else 1)


def cheap_apart(moments: Moments, heads: int) -> bool:
    """Whether keys of each head by itself need not many more dimensions than those of all heads together."""
    return _needed(moments, heads) <= _DEARER * _needed(moments, 1)


def _needed(moments: Moments, parts: int) -> int:
    """Dimensions that hold most of the energy."""
    held = torch.linalg.eigvalsh(_diagonal(moments.covariance, parts)).flip(-1).sum(dim=0).cumsum(dim=0)
    return parts * (int((held < _MOST * held[-1]).sum()) + 1)


def _worth(bases: Bases, rows: _Rows) -> Float[Tensor, " X"]:
    """For each dimension, the square of what the loss changes by, to first order, when a whole text goes without it."""
    latents = bases.write(rows.keys, rows.values, rows.positions)
    gradient = rows.keys_gradient
    if bases.rotary is not None:  # the gradient to an unrotated key turns back by the transpose of the rotation
        cosines, sines = (angles[:, None] for angles in bases.rotary.at(rows.positions))
        size = cosines.shape[-1]
        back = unrotate(gradient, cosines, sines)
        grown = cosines.square() + sines.square()
        gradient = torch.cat([back[..., :size] * grown, back[..., size:]], dim=-1)
    sides = ((latents[0], gradient, bases.keys), (latents[1], rows.values_gradient, bases.values))
    changes = [(latent * basis.slopes(slope.flatten(1))).sum(dim=0) for latent, slope, basis in sides]
    return torch.cat(changes).square()


def with_gates(bases: Mapping[int, Bases], worths: Mapping[int, Tensor], sums: Mapping[int, _Layer]) -> BasisRanks:
    """Levels by worth, and untrained gates that share one threshold."""
    whole = float(sum(worth.sum() for worth in worths.values())) / len(worths)
    layers = {}
    for index, own in bases.items():
        keys = sums[index].turned if own.rotary is None else sums[index].plain
        energy = torch.cat([_energy_of(own.keys, keys), _energy_of(own.values, sums[index].values)])
        cost = worths[index] / energy.clamp(min=1e-12)
        form = LowRankFormat(bases=own, levels=levels_by(worths[index], len(own.keys.mean), parts=own.keys.parts))
        gate = energy_gate(form, cost, energy, floor=_FLOOR * whole, middle=0.03 * whole)
        layers[index] = LayerRanks(form=form, gate=gate, rates=(1.0,))
    return BasisRanks(layers=layers, grid=(1.0,), trained=False)


def principal(moments: Moments, heads: int, *, parts: int = 1) -> Basis:
    """Principal components about the mean, of each part by itself, the largest first."""
    _, vectors = torch.linalg.eigh(_diagonal(moments.covariance, parts))
    encode = vectors.flip(-1).float().contiguous()
    return Basis(encode=encode, decode=inverse(encode, heads), mean=moments.mean.float())


def _diagonal(square: Float[Tensor, "X X"], parts: int) -> Float[Tensor, "P x x"]:
    """The blocks of each part with itself."""
    blocks = square.unflatten(1, (parts, -1)).unflatten(0, (parts, -1))  # P x P x
    return torch.stack([blocks[part, :, part] for part in range(parts)])


def _rotary_basis(moments: Moments, heads: int, rotary: Rotary) -> Basis:
    """Complex components across heads within each frequency, the largest first: a map that commutes with rotation."""
    assert moments.square is not None
    size = len(moments.mean) // heads
    half = rotary.at(torch.zeros(1, dtype=torch.long, device=moments.mean.device))[0].shape[-1] // 2
    second = moments.square / moments.count
    found: list[tuple[float, Tensor]] = []
    for frequency in range(half):
        real = torch.arange(heads, device=second.device) * size + frequency
        both = torch.cat([real, real + half])
        values, vectors = torch.linalg.eigh(_complex(second[both][:, both]))
        for energy, vector in zip(values.tolist(), vectors.T, strict=True):
            found.append((energy, _columns(vector, both, len(second))))
    for other in range(2 * half, size):  # dimensions that are not rotated stand alone
        for head in range(heads):
            place = head * size + other
            found.append((2 * float(second[place, place]), nn.functional.one_hot(
                torch.tensor([place]), len(second)).double().T.to(second)))  # fmt: skip
    encode = torch.cat([columns for _, columns in sorted(found, key=lambda pair: -pair[0])], dim=1).float()[None]
    return Basis(encode=encode, decode=inverse(encode, heads), mean=torch.zeros_like(moments.mean).float())


def _complex(second: Float[Tensor, "Y Y"]) -> Tensor:
    """Second moments of real and imaginary parts, as those of the complex numbers."""
    heads = len(second) // 2
    real, mixed = second[:heads, :heads] + second[heads:, heads:], second[heads:, :heads] - second[:heads, heads:]
    return torch.complex(real, mixed)


def _columns(vector: Tensor, both: Tensor, size: int) -> Float[Tensor, "X 2"]:
    """The two real columns that take the complex component along a vector."""
    columns = torch.zeros(size, 2, dtype=torch.double, device=vector.device)
    real, imaginary = vector.real, vector.imag
    columns[both, 0] = torch.cat([real, imaginary])
    columns[both, 1] = torch.cat([-imaginary, real])
    return columns


def _energy_of(basis: Basis, moments: Moments) -> Float[Tensor, " R"]:
    """Mean square of each latent dimension."""
    assert moments.square is not None
    encode, mean = basis.encode.double(), basis.mean.double()
    about = moments.square / moments.count - moments.mean[:, None] * mean - mean[:, None] * (moments.mean - mean)
    by_part = (encode * (_diagonal(about, basis.parts) @ encode)).sum(dim=1)  # P r
    return by_part.T.flatten().clamp(min=0).float()


def levels_by(worth: Float[Tensor, " X"], keys: int, *, parts: int = 1) -> Levels:
    """How many dimensions of keys and of values each level keeps: bucket by bucket, whichever is worth more.

    Keys of several parts keep equally many of each.
    """
    worths = (worth[:keys], worth[keys:])
    sizes = [max(len(side) * 2 // BUCKETS // part, 1) * part for side, part in zip(worths, (parts, 1), strict=True)]
    kept, path = [0, 0], [(0, 0)]
    while kept[0] < len(worths[0]) or kept[1] < len(worths[1]):
        gains = [
            float(side[at : at + size].mean()) if at < len(side) else -1.0
            for side, at, size in zip(worths, kept, sizes, strict=True)
        ]
        better = int(gains[1] > gains[0])
        kept[better] = min(kept[better] + sizes[better], len(worths[better]))
        path.append((kept[0], kept[1]))
    steps = [round(share / BUCKETS * (len(path) - 1)) for share in _KEPT]
    return tuple(path[step] for step in sorted(set(steps)))


def energy_gate(form: LowRankFormat, cost: Tensor, energy: Tensor, *, floor: float, middle: float) -> Gate:
    """A gate without training: a slot is kept until little enough is left out."""
    levels, dims = len(form.levels), len(cost)
    zero = torch.zeros(levels, device=cost.device)
    wanted = torch.tensor(middle).log()
    out = left_out(form.levels, len(form.bases.keys.mean), len(form.bases.values.mean)).to(cost.device)
    return Gate(
        cost=cost,
        left_out=out,
        floor=torch.tensor(floor, device=cost.device),
        scale=torch.cat(
            [_usual_size(side) for side in (energy[: len(form.bases.keys.mean)], energy[len(form.bases.keys.mean) :])]
        ),
        weight=torch.zeros(dims, levels, device=cost.device),
        linear=zero + 2 * _SHARPNESS * wanted,
        square=zero - _SHARPNESS,
        bias=zero.clone(),
    )


def _usual_size(energy: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Typical sizes of latent dimensions, none much smaller than the largest.

    A basis that turns a little pours more of a large dimension into a small one than that ever held; a gate that
    divides by too little would read just this, and training falls apart.
    """
    sizes = energy.sqrt()
    return sizes.clamp(min=max(_SMALLEST * float(sizes.max()), 1e-6))


def stretches(texts: Iterator[Sequence[int]], *, length: int, count: int) -> list[list[int]]:
    """The first `count` pieces of `length` tokens out of texts."""
    found: list[list[int]] = []
    for text in texts:
        found += [list(text[start : start + length]) for start in range(0, len(text) - length + 1, length)]
        if len(found) >= count:
            break
    return found[:count]
