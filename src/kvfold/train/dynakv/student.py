"""Student: a model whose older tokens are read in few dimensions, as the cache will read them, with what is learned.

A row is a context that the model read raw and that was then folded, and blocks that read it so: each sees the blocks
before it in few dimensions and itself raw. The way back of a basis is its inverse, so the full rank is exact however
far training moves it. Soft masks let gradients through; hard ones, with the soft one's gradient, are what is stored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvfold.attention.basis import Bases, Basis, by_head
from kvfold.attention.reference import causal_mask
from kvfold.attention.rotary import rotate
from kvfold.encode.lowrank.format import LowRankFormat
from kvfold.encode.lowrank.gate import Gate, keep_probabilities, level_bias, levels_at, threshold_for_rate
from kvfold.encode.lowrank.ranks import BasisRanks, LayerRanks
from kvfold.hf.probe import replace_attention
from kvfold.train.dynakv.calibrate import SINKS

BLOCK = 64  # tokens that are folded at a time


class LearnedLayer(nn.Module):
    """One layer's bases and gate as parameters."""

    def __init__(self, own: LayerRanks) -> None:
        super().__init__()
        bases, gate = own.form.bases, own.gate
        self.own = own
        self.dims = [sum(level) for level in own.form.levels]
        self.keys, self.values = nn.Parameter(bases.keys.encode.clone()), nn.Parameter(bases.values.encode.clone())
        self.keys_mean = nn.Parameter(bases.keys.mean.clone())
        self.values_mean = nn.Parameter(bases.values.mean.clone())
        self.weight, self.bias = nn.Parameter(gate.weight.clone()), nn.Parameter(gate.bias.clone())
        self.linear, self.square = nn.Parameter(gate.linear.clone()), nn.Parameter(gate.square.clone())

    def bases(self) -> Bases:
        """The bases as they stand; differentiable."""
        old = self.own.form.bases
        sides = ((self.keys, self.keys_mean), (self.values, self.values_mean))
        keys, values = (
            Basis(encode=encode, decode=by_head(torch.linalg.inv(encode), old.heads), mean=mean)
            for encode, mean in sides
        )
        return Bases(keys=keys, values=values, rotary=old.rotary)

    def gate(self) -> Gate:
        """The gate as it stands; differentiable."""
        old = self.own.gate
        return Gate(
            cost=old.cost, left_out=old.left_out, floor=old.floor, scale=old.scale,
            weight=self.weight, linear=self.linear, square=self.square, bias=self.bias,
        )  # fmt: skip

    def learned(self, rates: Sequence[float]) -> LayerRanks:
        """What is to be saved."""
        with torch.no_grad():
            bases, gate = self.bases(), self.gate()
        form = LowRankFormat(bases=bases, levels=self.own.form.levels)
        return LayerRanks(form=form, gate=gate, rates=tuple(rates))


@dataclass(slots=True, kw_only=True)
class Reading:
    """How one forward reads: what it folds, at which rate of each layer, and what came of it. It changes as it runs."""

    context: int  # tokens that are read raw and then folded
    rates: Mapping[int, float] | None = None  # None: in full
    hard: float = 1.0  # share of slots whose mask is hard
    logits: dict[int, Tensor] | None = None  # of every layer's gate, when asked for


class Student:
    """A frozen model and the layers that are learned for it."""

    def __init__(self, model: Any, ranks: BasisRanks) -> None:
        self.model = model
        self.layers = nn.ModuleDict({str(index): LearnedLayer(own) for index, own in ranks.layers.items()})
        self.dims = {index: self.layer(index).dims for index in ranks.layers}  # dimensions that each level keeps

    @property
    def basis_parameters(self) -> list[nn.Parameter]:
        """The bases of all layers."""
        layers = [self.layer(index) for index in self.dims]
        return [one for layer in layers for one in (layer.keys, layer.values, layer.keys_mean, layer.values_mean)]

    @property
    def gate_parameters(self) -> list[nn.Parameter]:
        """The gates of all layers."""
        layers = [self.layer(index) for index in self.dims]
        return [one for layer in layers for one in (layer.weight, layer.bias, layer.linear, layer.square)]

    def layer(self, index: int) -> LearnedLayer:
        """One layer's parameters."""
        layer = self.layers[str(index)]
        assert isinstance(layer, LearnedLayer)
        return layer

    def read(self, ids: Int[Tensor, "B Q"], positions: Int[Tensor, "B Q"], reading: Reading) -> Float[Tensor, "B N W"]:
        """Logits after the context, each block reading what is before it in few dimensions."""

        def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
            return self._attend(index, (queries, keys, values), positions, reading, scale)

        kept = ids.shape[1] - reading.context
        with replace_attention(self.model, attend):
            return self.model(ids, position_ids=positions, use_cache=False, logits_to_keep=kept + 1).logits[:, :-1]

    def _attend(self, index: int, rows: tuple[Tensor, Tensor, Tensor], positions: Tensor, reading: Reading,
                scale: float) -> Tensor:  # fmt: skip
        queries, keys, values = rows
        split = reading.context
        first = nn.functional.scaled_dot_product_attention(
            queries[:, :, :split], keys[:, :, :split], values[:, :, :split], is_causal=True, scale=scale,
            enable_gqa=True,
        )  # fmt: skip
        few_keys, few_values = self._folded(index, keys, values, positions, reading)
        pieces = [first]
        for begun in range(split, keys.shape[2], BLOCK):
            end = min(begun + BLOCK, keys.shape[2])
            sides = ((few_keys, keys), (few_values, values))
            past = [torch.cat([few[:, :, :begun], raw[:, :, begun:end]], dim=2) for few, raw in sides]
            seen = causal_mask(end - begun, end, keys.device)
            pieces.append(
                nn.functional.scaled_dot_product_attention(
                    queries[:, :, begun:end], *past, attn_mask=seen, scale=scale, enable_gqa=True
                )
            )
        return torch.cat(pieces, dim=2)

    def _folded(self, index: int, keys: Tensor, values: Tensor, positions: Tensor,
                reading: Reading) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Keys and values [B, H, S, D] as they come back from few dimensions; sinks stay."""
        layer, shape = self.layer(index), keys.shape
        bases, levels = layer.bases(), layer.own.form.levels
        flat_keys, flat_values = (side.transpose(1, 2).flatten(0, 1).float() for side in (keys, values))  # B x S, H, D
        places = positions.flatten()
        latents = bases.write(flat_keys, flat_values, places)
        logits = layer.gate().logits(*latents)
        if reading.logits is not None:
            reading.logits[index] = logits.detach().view(shape[0], shape[2], -1)[:, SINKS:]
        rate = 1.0 if reading.rates is None else reading.rates[index]
        mask = _mask(logits, layer, rate, reading.hard)
        sides = [latents[0] * mask[:, : levels[-1][0]], latents[1] * mask[:, levels[-1][0] :]]
        few_keys = bases.keys.read(sides[0]).unflatten(-1, (shape[1], -1))
        if bases.rotary is not None:
            cosines, sines = bases.rotary.at(places)
            few_keys = rotate(few_keys, cosines[:, None], sines[:, None])
        few_values = bases.values.read(sides[1]).unflatten(-1, (shape[1], -1))
        sinks = torch.arange(shape[2], device=keys.device)[:, None] < SINKS
        backs = [side.view(shape[0], shape[2], shape[1], -1).transpose(1, 2) for side in (few_keys, few_values)]
        return torch.where(sinks, keys, backs[0]), torch.where(sinks, values, backs[1])


def _mask(logits: Tensor, layer: LearnedLayer, rate: float, hard_share: float) -> Float[Tensor, "N X"]:
    """Which dimensions are read: softly, or as they are stored with the soft mask's gradient.

    The shift that meets the rate is found anew, and its own change goes into the gradient: a slot can only gain what
    others lose. Without that every gate would ask for more and more, and the shift would run after it.
    """
    kept = 1 - layer.own.gate.left_out.T  # levels, dimensions
    size = layer.dims[-1]
    if rate >= 1:
        return kept[-1].expand(len(logits), -1)
    still, slope = logits.detach(), level_bias(len(layer.dims), logits)
    shift = threshold_for_rate(still, layer.dims, rate=rate, size=size)
    steps = torch.tensor(layer.dims, dtype=logits.dtype, device=logits.device).diff()
    with torch.enable_grad():
        moved = torch.tensor(shift, dtype=logits.dtype, device=logits.device, requires_grad=True)
        met = (keep_probabilities(still + moved * slope)[:, 1:] @ steps).mean()
        pull = torch.autograd.grad(met, moved)[0].clamp(min=1e-6)
    kept_softly = (keep_probabilities(logits + shift * slope)[:, 1:] @ steps).mean()
    chances = keep_probabilities(logits + (shift - (kept_softly - kept_softly.detach()) / pull) * slope)
    soft = kept[0] + chances[:, 1:] @ (kept[1:] - kept[:-1])
    hard = kept[levels_at(still, shift, slope)]
    if hard_share >= 1:
        return hard + soft - soft.detach()
    chosen = torch.rand(len(logits), 1, device=logits.device) < hard_share
    return torch.where(chosen, hard + soft - soft.detach(), soft)
