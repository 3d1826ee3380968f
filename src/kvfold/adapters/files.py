"""Adapters with updates of a model's layers and a scorer, as files: saved, loaded, and found for a method.

folder.py knows how any adapter lies in a folder, schema.py what its JSON may say, this file what that means.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvfold.adapters.adapter import Adapter, features_of, query_heads_of
from kvfold.adapters.folder import folder_for, read_tensors, refuse_tensors, words_for, write_folder, written_at
from kvfold.adapters.schema import UpdateWords
from kvfold.adapters.scorer import DILATIONS, TokenFeatures
from kvfold.hf.binding import ModelBinding
from kvfold.hf.decoder import decoder_of
from kvfold.select.base import Select


def save_adapter(adapter: Adapter, folder: Path, *, kind: str, model: Any, about: Mapping[str, Any]) -> None:
    """Write an adapter; `about` is its training record and scores, in JSON's types."""
    learned = adapter.state_dict()
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in learned.items()}
    words = {
        "layers": [
            [name, down.shape[1], up.shape[0]]
            for name, down, up in zip(adapter.names, adapter.down, adapter.up, strict=True)
        ],
        "rank": adapter.rank,
        "scale": adapter.scale,
        "rows": adapter.embeddings.shape[0],
        "width": adapter.embeddings.shape[1],
        "reads": asdict(adapter.scorer.features),
        **about,
    }
    write_folder(folder, tensors, kind=kind, model=model, words=words)


def load_adapter(source: str | Path, model: Any, *, kind: str) -> Adapter:
    """Load the adapter in a folder or on the Hub and attach it to its base model.

    Raises FileError for what is missing, broken, newer or of another kind, and ModelError for another base model.
    """
    folder = folder_for(source, model, kind=kind)
    words = words_for(folder, model, kind=kind, schema=UpdateWords)
    try:
        _refuse_other_sizes(words, model)
        learned = read_tensors(folder, words)
        has_rows = "gates" in learned
        adapter = _promised(words, model, has_rows=has_rows)
        if not has_rows:
            learned = _without_rows(learned, adapter, (words["rows"], words["width"]))
        weights = {name: tensor.float() for name, tensor in learned.items()}
        adapter.load_state_dict(weights, assign=True)
        adapter.requires_grad_(False).to(device=model.device, dtype=model.dtype)
        adapter.scorer.float()  # close scores differ only in float32
        return adapter.attach(model)
    except Exception as error:  # safetensors and torch raise their own kinds for torn files and wrong shapes
        refuse_tensors(source, error)


def _promised(words: Mapping[str, Any], model: Any, *, has_rows: bool) -> Adapter:
    """Make the adapter that a JSON speaks of. It takes no room: sizes are promises until the tensors have them."""
    with torch.device("meta"):
        return Adapter(
            rows=words["rows"] if has_rows else 0,
            width=words["width"],
            layers=[tuple(layer) for layer in words["layers"]],
            rank=words["rank"],
            scale=words["scale"],
            query_heads=query_heads_of(model),
            features=TokenFeatures(**words["reads"]),
        )


def _refuse_other_sizes(words: Mapping[str, Any], model: Any) -> None:
    """Raise ValueError for layers that the model does not have, or has in other sizes."""
    modules = dict(decoder_of(model).named_modules())
    for name, inputs, outputs in words["layers"]:
        module: Any = modules.get(name)
        if not isinstance(module, torch.nn.Linear) or (module.in_features, module.out_features) != (inputs, outputs):
            raise ValueError(f"the model has no linear layer {name:.80} of {inputs} inputs and {outputs} outputs")
    there = asdict(features_of(model))
    for name in ("layers", "heads", "size"):
        if words["reads"][name] != there[name]:
            raise ValueError(f"it reads {words['reads'][name]} {name}, and the model has {there[name]}")


def _without_rows(
    learned: Mapping[str, torch.Tensor], adapter: Adapter, promised: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Make the tensors of an adapter of kvfold 0.1.0 those of one without rows: its rows were of another kind.

    Raises ValueError where its rows are not of the promised number and width.
    """
    there = tuple(learned["embeddings"].shape)
    if there != promised:
        raise ValueError(f"{promised[0]} rows of {promised[1]} numbers are promised, and {there} are there")
    completed = dict(learned)
    completed["embeddings"] = torch.zeros(adapter.embeddings.shape)
    completed["gates"] = torch.zeros(adapter.gates.shape)
    for name in ("weight", "bias"):
        of_slots = learned[f"salience.layers.{len(DILATIONS) - 1}.{name}"]
        completed[f"salience.rows.{name}"] = of_slots.clone()
    return completed


def find_adapter(model: Any, select: Select) -> Adapter | None:
    """Give the adapter that a method names for a model; None for a method without one."""
    source = select.adapter_source
    if source is None:
        return None
    kind = type(select).__module__.rpartition(".")[2]
    binding = ModelBinding.of(model)
    registered = binding.registered_adapter(kind) if source == "shipped" else None
    if registered is not None:
        return registered
    folder = folder_for(source, model, kind=kind)
    key = (kind, folder, written_at(folder), model.device, model.dtype)
    return binding.learned(key, lambda: load_adapter(folder, model, kind=kind))


def register_adapter(model: Any, kind: str, make: Callable[[], Any]) -> None:
    """Register a lazily built adapter (or ranks) as the shipped one of its kind for a model that none ships for."""
    ModelBinding.of(model).register_adapter(kind, make)
