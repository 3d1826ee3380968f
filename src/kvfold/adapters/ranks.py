"""Learned ranks as files, and the layout that a plan's encode member makes of them.

The folder is that of any adapter (adapter_files.py). Bases are written as float32: rounded, they would not be undone
by their inverse. The way back is not written but computed: it is the inverse.
"""

import weakref
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from kvfold.adapters.files import TENSORS, WORDS, folder_for, words_for, write_folder
from kvfold.attention.basis import Bases, Basis, by_head
from kvfold.encode.base import Encode
from kvfold.encode.lowrank.gate import Gate
from kvfold.encode.lowrank.part import Form, Levels
from kvfold.encode.lowrank.ranks import BasisRanks, LayerRanks, Ranks
from kvfold.errors import FileError, ModelError
from kvfold.hf.rotary import rotary_of
from kvfold.memory.part import Layout

KIND = "dynakv"
_KNOWN: "weakref.WeakKeyDictionary[Any, dict[tuple[Path, int], Ranks]]" = weakref.WeakKeyDictionary()
_LENT: "weakref.WeakKeyDictionary[Any, Callable[[], Ranks]]" = weakref.WeakKeyDictionary()
_GATE = ("cost", "floor", "scale", "weight", "linear", "square", "bias")


def layout_for(model: Any, encode: Encode) -> Layout:
    """The layout of a plan's encode member for a model: its own, or what it makes of the adapter that it names."""
    if encode.adapter_source is None:
        return encode
    if encode.adapter_source == "shipped" and model in _LENT:
        return encode.bound(_LENT[model]())
    folder = folder_for(encode.adapter_source, model, kind=KIND)
    known = _KNOWN.setdefault(model, {})
    written = (folder / WORDS).stat().st_mtime_ns if (folder / WORDS).is_file() else 0
    if (folder, written) not in known:
        known[folder, written] = load_ranks(folder, model)
    return encode.bound(known[folder, written])


def lend(model: Any, make: Callable[[], Ranks]) -> None:
    """Let these ranks, made once they are asked for, be the shipped ones of a model that has no adapter of its own."""
    _LENT[model] = cache(make)


def save_ranks(ranks: Ranks, folder: Path, *, model: Any, about: Mapping[str, Any]) -> None:
    """Write what was learned; `about` is the record of how, in JSON's types."""
    tensors: dict[str, Tensor] = {}
    words: dict[str, Any] = {}
    for name, basis in ranks.bases.items():
        layers: dict[str, Any] = {}
        for index, own in basis.layers.items():
            tensors |= {f"{name}.{index}.{key}": tensor for key, tensor in _tensors(own).items()}
            levels = [list(level) for level in own.form.levels]
            written = {"heads": own.form.bases.heads, "parts": own.form.bases.keys.parts}
            layers[str(index)] = {"levels": levels, "rates": list(own.rates), **written}
        words[name] = {"trained": basis.trained, "grid": list(basis.grid), "layers": layers}
    write_folder(folder, tensors, kind=KIND, model=model, words={"bases": words, **about})


def load_ranks(source: str | Path, model: Any) -> Ranks:
    """What was learned for a model, from a folder, from the Hub, or "shipped".

    Raises FileError for what is missing, broken or of another kind, and ModelError for another base model.
    """
    folder = folder_for(source, model, kind=KIND)
    words = words_for(folder, model, kind=KIND, needed=("bases",))
    try:
        tensors = {name: tensor.to(model.device) for name, tensor in load_file(folder / TENSORS).items()}
        bases = {name: _basis(name, own, tensors, model) for name, own in words["bases"].items()}
    except ModelError:
        raise
    except Exception as error:  # safetensors and torch raise their own kinds for torn files and wrong shapes
        raise FileError(f"{source} was asked for; its tensors cannot be read ({error}); get a sound copy") from error
    return Ranks(bases=bases)


def left_out(levels: Levels, keys: int, values: int) -> Tensor:
    """1 where a level does not keep a dimension, [dimensions of keys and values, levels]."""
    of_keys = torch.arange(keys)[:, None] >= torch.tensor([level[0] for level in levels])
    of_values = torch.arange(values)[:, None] >= torch.tensor([level[1] for level in levels])
    return torch.cat([of_keys, of_values]).float()


def inverse(encode: Tensor, heads: int) -> Tensor:
    """The way back of a basis to each head, computed in float64."""
    return by_head(torch.linalg.inv(encode.double()).to(encode.dtype), heads)


def _tensors(own: LayerRanks) -> dict[str, Tensor]:
    bases = own.form.bases
    found = {
        "keys.encode": bases.keys.encode, "keys.mean": bases.keys.mean,
        "values.encode": bases.values.encode, "values.mean": bases.values.mean,
    }  # fmt: skip
    found |= {f"gate.{name}": getattr(own.gate, name) for name in _GATE}
    return {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in found.items()}


def _basis(name: str, words: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Any) -> BasisRanks:
    rotary = rotary_of(model) if name.startswith("joint") else None
    layers = {}
    for index, own in words["layers"].items():
        some = {key: tensors[f"{name}.{index}.{key}"] for key in _NAMES}
        levels = tuple((level[0], level[1]) for level in own["levels"])
        sides = [
            Basis(
                encode=some[f"{side}.encode"],
                decode=inverse(some[f"{side}.encode"], own["heads"]),
                mean=some[f"{side}.mean"],
            )
            for side in ("keys", "values")
        ]
        bases = Bases(keys=sides[0], values=sides[1], rotary=rotary)
        out = left_out(levels, len(sides[0].mean), len(sides[1].mean)).to(sides[0].mean.device)
        gate = Gate(left_out=out, **{key: some[f"gate.{key}"] for key in _GATE})
        layers[int(index)] = LayerRanks(form=Form(bases=bases, levels=levels), gate=gate, rates=tuple(own["rates"]))
    return BasisRanks(layers=layers, grid=tuple(words["grid"]), trained=words["trained"])


_NAMES = (
    *("keys.encode", "keys.mean", "values.encode", "values.mean"),
    *(f"gate.{name}" for name in _GATE),
)
