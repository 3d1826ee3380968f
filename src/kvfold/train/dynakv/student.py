"""Student: a model whose older tokens are read in few dimensions, as the cache will read them, with what is learned.

A row is a context that the model read raw and that was then folded, and blocks that read it so: each sees the blocks
before it in few dimensions and itself raw. The way back of a basis is its inverse, so the full rank is exact however
far training moves it. Knows no loss.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvfold.attention.basis import Bases, Basis, by_head
from kvfold.attention.reference import causal_mask
from kvfold.attention.rotary import rotate
from kvfold.encode.lowrank.format import LowRankFormat
from kvfold.encode.lowrank.gate import Gate
from kvfold.encode.lowrank.ranks import BasisRanks, LayerRanks
from kvfold.hf.probe import replace_attention
from kvfold.train.dynakv.rank_masks import rank_mask
from kvfold.train.dynakv.readings import SINKS, read_context

BLOCK = 64  # tokens that are folded at a time
_ATTEND = nn.functional.scaled_dot_product_attention


class LearnedLayer(nn.Module):
    """One layer's bases and gate as parameters."""

    def __init__(self, start: LayerRanks) -> None:
        super().__init__()
        self.start = start
        self.dims = [sum(level) for level in start.form.levels]
        bases, gate = start.form.bases, start.gate
        self.keys = nn.Parameter(bases.keys.encode.clone())
        self.values = nn.Parameter(bases.values.encode.clone())
        self.keys_mean = nn.Parameter(bases.keys.mean.clone())
        self.values_mean = nn.Parameter(bases.values.mean.clone())
        self.weight = nn.Parameter(gate.weight.clone())
        self.bias = nn.Parameter(gate.bias.clone())
        self.linear = nn.Parameter(gate.linear.clone())
        self.square = nn.Parameter(gate.square.clone())

    @property
    def basis_parameters(self) -> list[nn.Parameter]:
        """The parameters of the bases."""
        return [self.keys, self.values, self.keys_mean, self.values_mean]

    @property
    def gate_parameters(self) -> list[nn.Parameter]:
        """The parameters of the gate."""
        return [self.weight, self.bias, self.linear, self.square]

    def bases(self) -> Bases:
        """The bases as they stand; differentiable."""
        return Bases(
            keys=self._basis(self.keys, self.keys_mean),
            values=self._basis(self.values, self.values_mean),
            rotary=self.start.form.bases.rotary,
        )

    def _basis(self, encode: Tensor, mean: Tensor) -> Basis:
        heads = self.start.form.bases.heads
        decode = by_head(torch.linalg.inv(encode), heads)
        return Basis(encode=encode, decode=decode, mean=mean)

    def gate(self) -> Gate:
        """The gate as it stands; differentiable."""
        start = self.start.gate
        return Gate(
            cost=start.cost,
            left_out=start.left_out,
            floor=start.floor,
            scale=start.scale,
            weight=self.weight,
            linear=self.linear,
            square=self.square,
            bias=self.bias,
        )

    def learned(self, rates: Sequence[float]) -> LayerRanks:
        """The layer's ranks, to be saved."""
        with torch.no_grad():
            form = LowRankFormat(bases=self.bases(), levels=self.start.form.levels)
            return LayerRanks(form=form, gate=self.gate(), rates=tuple(rates))


@dataclass(slots=True, kw_only=True)
class Reading:
    """How one forward reads: what it folds, at which rate of each layer, and what came of it. It changes as it runs."""

    context: int  # tokens that are read raw and then folded
    rates: Mapping[int, float] | None = None  # None: in full
    hard: float = 1.0  # share of slots whose mask is hard
    logits: dict[int, Tensor] | None = None  # [B S L] of every layer's gate, when a dictionary is given


class Student:
    """A frozen model and the layers that are learned for it."""

    def __init__(self, model: Any, ranks: BasisRanks) -> None:
        self.model = model
        self.trains_model = any(parameter.requires_grad for parameter in model.parameters())
        self.layers = nn.ModuleDict()
        for index, layer in ranks.layers.items():
            self.layers[str(index)] = LearnedLayer(layer)
        self.dims = {index: self.layer(index).dims for index in ranks.layers}  # dimensions that each level keeps

    @property
    def basis_parameters(self) -> list[nn.Parameter]:
        """The bases of all layers."""
        return [parameter for index in self.dims for parameter in self.layer(index).basis_parameters]

    @property
    def gate_parameters(self) -> list[nn.Parameter]:
        """The gates of all layers."""
        return [parameter for index in self.dims for parameter in self.layer(index).gate_parameters]

    def layer(self, index: int) -> LearnedLayer:
        """One layer's parameters."""
        layer = self.layers[str(index)]
        assert isinstance(layer, LearnedLayer)
        return layer

    def read(
        self,
        ids: Int[Tensor, "B Q"],
        positions: Int[Tensor, "B Q"],
        reading: Reading,
        past: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "B N W"]:
        """Compute the logits at the tokens after the context, each block reading what is before it in few dimensions.

        `past` is a stock cache that holds the context and nothing more, by its argument's name; it takes the rest up.
        Without it the context is read here.
        """
        context = reading.context

        def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
            # In bfloat16 the way to a latent and back would lose more than the last dimensions hold.
            with torch.autocast(keys.device.type, enabled=False):
                few_keys, few_values = self._fold(index, keys.float(), values.float(), positions, reading)
            folded = (few_keys.to(keys.dtype), few_values.to(values.dtype))
            blocks = _attend_blocks(
                queries,
                (keys, values),
                folded,
                context=context,
                scale=scale,
            )
            return torch.cat(list(blocks), dim=2)

        if past is None:
            # Bases and gates act on what comes after the context, so only updates of the model need its gradient.
            with torch.set_grad_enabled(self.trains_model and torch.is_grad_enabled()):
                past = read_context(self.model, ids[:, :context], positions[:, :context])
        with replace_attention(self.model, attend):
            output = self.model(ids[:, context:], position_ids=positions[:, context:], **past)
        return output.logits

    def _fold(
        self,
        index: int,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        reading: Reading,
    ) -> tuple[Float[Tensor, "B H Q D"], Float[Tensor, "B H Q D"]]:
        """Keys and values as they come back from few dimensions; sinks stay."""
        layer = self.layer(index)
        bases = layer.bases()
        rows, _, tokens, _ = keys.shape
        slots = positions.flatten()
        latent_keys, latent_values = bases.write(_by_slot(keys), _by_slot(values), slots)
        logits = layer.gate().logits(latent_keys, latent_values)
        if reading.logits is not None:
            by_row = logits.detach().view(rows, tokens, -1)
            reading.logits[index] = by_row[:, SINKS:]
        rate = 1.0 if reading.rates is None else reading.rates[index]
        left_out = layer.start.gate.left_out
        mask = rank_mask(logits, layer.dims, left_out, rate=rate, hard_share=reading.hard)
        split = latent_keys.shape[1]
        heads = (bases.heads, -1)
        kept_keys = latent_keys * mask[:, :split]
        kept_values = latent_values * mask[:, split:]
        few_keys = bases.keys.read(kept_keys).unflatten(-1, heads)
        if bases.rotary is not None:
            cosines, sines = bases.rotary.at(slots)
            few_keys = rotate(few_keys, cosines[:, None], sines[:, None])
        few_values = bases.values.read(kept_values).unflatten(-1, heads)
        return _with_sinks(keys, few_keys), _with_sinks(values, few_values)


def _by_slot(side: Float[Tensor, "B H Q D"]) -> Float[Tensor, "S H D"]:
    """The slots of all rows one after the other."""
    return side.transpose(1, 2).flatten(0, 1).float()


def _with_sinks(raw: Float[Tensor, "B H Q D"], few: Float[Tensor, "S H D"]) -> Float[Tensor, "B H Q D"]:
    """Slots that come back from few dimensions, in rows, where sinks are raw."""
    rows, _, tokens, _ = raw.shape
    by_row = few.unflatten(0, (rows, tokens)).transpose(1, 2)
    is_sink = torch.arange(tokens, device=raw.device)[:, None] < SINKS
    return torch.where(is_sink, raw, by_row)


def _attend_blocks(
    queries: Float[Tensor, "B G N D"],
    raw: tuple[Tensor, Tensor],
    folded: tuple[Tensor, Tensor],
    *,
    context: int,
    scale: float,
) -> Iterator[Float[Tensor, "B G _ D"]]:
    """After the context, attend block by block over folded rows before a block and raw rows in it.

    `raw` and `folded` are keys and values [B H Q D] of all tokens; queries are those after the context.
    """
    tokens = raw[0].shape[2]
    for begun in range(context, tokens, BLOCK):
        end = min(begun + BLOCK, tokens)
        sides = []
        for raw_rows, folded_rows in zip(raw, folded, strict=True):
            before = folded_rows[:, :, :begun]
            inside = raw_rows[:, :, begun:end]
            sides.append(torch.cat([before, inside], dim=2))
        yield _ATTEND(
            queries[:, :, begun - context : end - context],
            *sides,
            attn_mask=causal_mask(end - begun, end, queries.device),
            scale=scale,
            enable_gqa=True,
        )
