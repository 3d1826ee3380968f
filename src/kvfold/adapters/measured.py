"""Measured ranks as files: their part of an adapter's JSON and tensors.

A measured basis is orthogonal, so its way back is its transpose and neither is computed by inversion. It is written
once, in float16, and made orthogonal again when it is read: full rank then gives back what was written.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from jaxtyping import Float
from torch import Tensor

from kvfold.attention.basis import Bases, Basis, by_head
from kvfold.encode.lowrank.measured import DimensionLoss, MeasuredLayer, MeasuredRanks
from kvfold.hf.rotary import rotary_of

_LOSSES = tuple(field.name for field in fields(DimensionLoss))


def words_of(measured: Mapping[str, MeasuredRanks]) -> dict[str, Any]:
    """Say in JSON's types what the tensors do not: which layers there are, and their heads."""
    words = {}
    for name, ranks in measured.items():
        heads = {layer.bases.heads for layer in ranks.layers.values()}
        words[name] = {"layers": list(ranks.layers), "heads": heads.pop()}
    return words


def tensors_of(measured: Mapping[str, MeasuredRanks]) -> dict[str, Tensor]:
    """Name the tensors of every basis and layer as files do."""
    found = {}
    for name, ranks in measured.items():
        for index, layer in ranks.layers.items():
            for key, tensor in _of_layer(layer).items():
                found[f"measured.{name}.{index}.{key}"] = tensor.detach().cpu().contiguous().clone()
    return found


def _of_layer(layer: MeasuredLayer) -> dict[str, Tensor]:
    """Name the tensors of one layer, in the dtypes in which they are written."""
    keys = layer.bases.keys
    values = layer.bases.values
    found = {loss: getattr(layer.loss, loss).float() for loss in _LOSSES}
    found["keys.encode"] = keys.encode.half()
    found["keys.mean"] = keys.mean.float()
    found["values.encode"] = values.encode.half()
    found["values.mean"] = values.mean.float()
    return found


def read(words: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Any) -> dict[str, MeasuredRanks]:
    """Put measured ranks together from a file's words and tensors. Raises KeyError for tensors that are missing."""
    found = {}
    for name, said in words.items():
        rotary = rotary_of(model) if name == "joint" else None  # a joint basis is taken before rotation
        layers = {}
        for index in said["layers"]:
            prefix = f"measured.{name}.{index}"
            keys = _basis(f"{prefix}.keys", tensors, said["heads"])
            values = _basis(f"{prefix}.values", tensors, said["heads"])
            losses = {loss: tensors[f"{prefix}.{loss}"] for loss in _LOSSES}
            bases = Bases(keys=keys, values=values, rotary=rotary)
            layers[index] = MeasuredLayer(bases=bases, loss=DimensionLoss(**losses))
        found[name] = MeasuredRanks(layers=layers)
    return found


def orthogonal(encode: Float[Tensor, "P part_size part_rank"]) -> Float[Tensor, "P part_size part_rank"]:
    """Find the orthogonal map next to one that is nearly so, by a step of Newton and Schulz in float32."""
    near = encode.float()
    return 1.5 * near - 0.5 * near @ (near.mT @ near)


def _basis(prefix: str, tensors: Mapping[str, Tensor], heads: int) -> Basis:
    encode = orthogonal(tensors[f"{prefix}.encode"])
    return Basis(encode=encode, decode=by_head(encode.mT, heads), mean=tensors[f"{prefix}.mean"])
