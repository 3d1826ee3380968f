"""Learned ranks as files, and the layout that a plan's encode member makes of them.

The folder is that of any adapter (folder.py). Bases are written in 16 bits. The way back is not written but
computed: it is the inverse of what was written. Measured bases stand in measured.py.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.adapters import measured
from kvfold.adapters.folder import folder_for, read_tensors, refuse_tensors, words_for, write_folder, written_at
from kvfold.adapters.schema import RankWords
from kvfold.attention.basis import Bases, Basis, by_head
from kvfold.attention.rotary import Rotary
from kvfold.encode.base import Encode
from kvfold.encode.lowrank.format import Levels, LowRankFormat
from kvfold.encode.lowrank.gate import Gate
from kvfold.encode.lowrank.measured import MeasuredLayer, MeasuredRanks
from kvfold.encode.lowrank.ranks import BasisRanks, LayerRanks, Ranks
from kvfold.hf.binding import ModelBinding
from kvfold.hf.rotary import rotary_of
from kvfold.memory.part import Layout

KIND = "dynakv"
_GATE = ("cost", "floor", "scale", "weight", "linear", "square", "bias")


def layout_for(model: Any, encode: Encode) -> Layout:
    """Give the layout of a plan's encode member: the member, or what it makes of the adapter that it names."""
    source = encode.adapter_source
    if source is None:
        return encode
    binding = ModelBinding.of(model)
    registered = binding.registered_adapter(KIND) if source == "shipped" else None
    if registered is not None:
        return encode.bound(registered)
    folder = folder_for(source, model, kind=KIND)
    key = (KIND, folder, written_at(folder), model.device)
    return encode.bound(binding.learned(key, lambda: load_ranks(folder, model)))


def save_ranks(ranks: Ranks, folder: Path, *, model: Any, about: Mapping[str, Any]) -> None:
    """Write what was learned; `about` is the record of how, in JSON's types."""
    tensors: dict[str, Tensor] = {}
    words: dict[str, Any] = {}
    for name, basis in ranks.bases.items():
        layers: dict[str, Any] = {}
        for index, layer in basis.layers.items():
            layers[str(index)] = _words(layer)
            for key, tensor in _tensors(layer).items():
                tensors[f"{name}.{index}.{key}"] = tensor
        words[name] = {
            "trained": basis.trained,
            "grid": list(basis.grid),
            "layers": layers,
        }
    tensors |= measured.tensors_of(ranks.measured)
    said = {"bases": words, "measured": measured.words_of(ranks.measured), "default": ranks.default, **about}
    write_folder(folder, tensors, kind=KIND, model=model, words=said)


def load_ranks(source: str | Path, model: Any) -> Ranks:
    """Read what was learned for a model, from a folder, from the Hub, or "shipped".

    Raises FileError for what is missing, broken or of another kind, and ModelError for another base model.
    """
    folder = folder_for(source, model, kind=KIND)
    words = words_for(folder, model, kind=KIND, schema=RankWords)
    try:
        learned = read_tensors(folder, words)
        tensors = {name: tensor.to(model.device) for name, tensor in learned.items()}
        bases = {name: _basis_ranks(name, basis, tensors, model) for name, basis in words["bases"].items()}
        without_gates = measured.read(words.get("measured", {}), tensors, model)
        for basis in (*bases.values(), *without_gates.values()):
            _refuse_other_sizes(basis, model)
    except Exception as error:  # safetensors and torch raise their own kinds for torn files and wrong shapes
        refuse_tensors(source, error)
    return Ranks(bases=bases, measured=without_gates, default=words.get("default"))


def left_out(levels: Levels, keys: int, values: int) -> Tensor:
    """Mark with 1 the dimensions that a level does not keep, [dimensions of keys and values, levels]."""
    key_ranks = torch.tensor([level[0] for level in levels])
    value_ranks = torch.tensor([level[1] for level in levels])
    of_keys = torch.arange(keys)[:, None] >= key_ranks
    of_values = torch.arange(values)[:, None] >= value_ranks
    return torch.cat([of_keys, of_values]).float()


def inverse(encode: Tensor, heads: int) -> Tensor:
    """Compute the way back of a basis to each head, in float64."""
    back = torch.linalg.inv(encode.double())
    return by_head(back.to(encode.dtype), heads)


def _words(layer: LayerRanks) -> dict[str, Any]:
    """Say in JSON's types what the tensors of a layer do not."""
    bases = layer.form.bases
    return {
        "levels": [list(level) for level in layer.form.levels],
        "rates": list(layer.rates),
        "heads": bases.heads,
        "parts": bases.keys.parts,
    }


def _tensors(layer: LayerRanks) -> dict[str, Tensor]:
    """Name the tensors of a layer as files do."""
    found: dict[str, Tensor] = {}
    bases = layer.form.bases
    for side, basis in (("keys", bases.keys), ("values", bases.values)):
        # The way back is the inverse of what is written, so rounding costs no exactness at the full rank.
        found[f"{side}.encode"] = basis.encode.half()
        found[f"{side}.mean"] = basis.mean.float()
    for name in _GATE:
        found[f"gate.{name}"] = getattr(layer.gate, name).float()
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}


def _basis_ranks(name: str, words: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Any) -> BasisRanks:
    """Put the ranks under one basis together from a file's words and tensors."""
    rotary = rotary_of(model) if name.startswith("joint") else None  # a joint basis is taken before rotation
    layers = {}
    for index, layer in words["layers"].items():
        layers[int(index)] = _layer_ranks(f"{name}.{index}", layer, tensors, rotary)
    return BasisRanks(layers=layers, grid=tuple(words["grid"]), trained=words["trained"])


def _refuse_other_sizes(ranks: BasisRanks | MeasuredRanks, model: Any) -> None:
    """Raise ValueError for ranks of other layers than fold in a model, or of keys and values of another size."""
    binding = ModelBinding.of(model)
    if sorted(ranks.layers) != list(binding.folding_layers):
        raise ValueError(f"layers {sorted(ranks.layers)} are there, and {list(binding.folding_layers)} fold")
    for index, layer in ranks.layers.items():
        bases = layer.form.bases
        most = (len(bases.keys.mean), len(bases.values.mean))
        if bases.heads != binding.kv_heads or most[0] != binding.kv_heads * binding.head_size:
            raise ValueError(f"layer {index} has {bases.heads} heads and keys of {most[0]} numbers, unlike the model")
        for basis, numbers in zip((bases.keys, bases.values), most, strict=True):
            parts, part_size, part_rank = basis.encode.shape
            if not parts * part_size == parts * part_rank == numbers:
                raise ValueError(f"layer {index} has a basis of {tuple(basis.encode.shape)} for {numbers} numbers")
        if any(rank > numbers for rank, numbers in zip(layer.form.levels[-1], most, strict=True)):
            raise ValueError(f"layer {index} has a level of {layer.form.levels[-1]} dimensions of {most}")
        wanted = sum(most)
        for name, learned in _by_dimension(layer).items():
            if len(learned) != wanted:
                raise ValueError(f"layer {index} has {len(learned)} numbers of {name} for {wanted} dimensions")


def _by_dimension(layer: LayerRanks | MeasuredLayer) -> dict[str, Tensor]:
    """Name the tensors of a layer that have a number for each dimension of keys and values."""
    if isinstance(layer, MeasuredLayer):
        return {field.name: getattr(layer.loss, field.name) for field in fields(layer.loss)}
    return {"cost": layer.gate.cost, "scale": layer.gate.scale, "weight": layer.gate.weight}


def _layer_ranks(
    prefix: str, words: Mapping[str, Any], tensors: Mapping[str, Tensor], rotary: Rotary | None
) -> LayerRanks:
    """Put the ranks of one layer together from a file's words and tensors."""
    heads = words["heads"]
    keys = _basis(f"{prefix}.keys", tensors, heads)
    values = _basis(f"{prefix}.values", tensors, heads)
    levels = tuple((key_rank, value_rank) for key_rank, value_rank in words["levels"])
    out = left_out(levels, len(keys.mean), len(values.mean))
    learned = {key: tensors[f"{prefix}.gate.{key}"] for key in _GATE}
    return LayerRanks(
        form=LowRankFormat(bases=Bases(keys=keys, values=values, rotary=rotary), levels=levels),
        gate=Gate(left_out=out.to(keys.mean.device), **learned),
        rates=tuple(words["rates"]),
    )


def _basis(prefix: str, tensors: Mapping[str, Tensor], heads: int) -> Basis:
    encode = tensors[f"{prefix}.encode"].float()
    return Basis(encode=encode, decode=inverse(encode, heads), mean=tensors[f"{prefix}.mean"])
