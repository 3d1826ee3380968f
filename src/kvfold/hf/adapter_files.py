"""Adapters as files: a folder with adapter.safetensors and adapter.json, on disk or on the Hub.

The JSON says what kind of adapter it is, for which base model (its fingerprint), how it was trained and what it scored.
A wrong base model is refused by name. Writing is atomic file by file, the JSON last, so a torn write is no adapter.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kvfold.errors import FileError, ModelError
from kvfold.hf.adapters import Adapter
from kvfold.hf.load import SHIPPED, fingerprint
from kvfold.select.base import Select

VERSION = 1
_TENSORS, _WORDS = "adapter.safetensors", "adapter.json"


def save_adapter(adapter: Adapter, folder: Path, *, kind: str, model: Any, about: Mapping[str, Any]) -> None:
    """Write an adapter; `about` is its training record and scores, in JSON's types."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in adapter.state_dict().items()}
    words = {
        "kind": kind,
        "version": VERSION,
        "base": model.config.name_or_path,
        "fingerprint": fingerprint(model),
        "layers": [
            [name, down.shape[1], up.shape[0]]
            for name, down, up in zip(adapter.names, adapter.down, adapter.up, strict=True)
        ],
        "rank": adapter.rank,
        "scale": adapter.scale,
        "rows": adapter.embeddings.shape[0],
        "width": adapter.embeddings.shape[1],
        "values": len(adapter.salience.scale),
        **about,
    }
    save_file(tensors, folder / f"{_TENSORS}.new")
    os.replace(folder / f"{_TENSORS}.new", folder / _TENSORS)
    (folder / f"{_WORDS}.new").write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")
    os.replace(folder / f"{_WORDS}.new", folder / _WORDS)


def load_adapter(source: str | Path, model: Any, *, kind: str) -> Adapter:
    """The adapter in a folder or on the Hub, attached to its base model.

    Raises FileError for what is missing, broken, newer or of another kind, and ModelError for another base model.
    """
    folder = _folder(source)
    words = _words(folder)
    if words["kind"] != kind:
        raise FileError(
            f"{source} was asked for as a {kind} adapter; it is one of {words['kind']}; give a {kind} adapter"
        )
    if words["version"] > VERSION:
        raise FileError(
            f"{source} was asked for; it is of version {words['version']}, this kvfold reads up to {VERSION}; "
            "upgrade kvfold"
        )
    if words["fingerprint"] != fingerprint(model):
        raise ModelError(
            f"the adapter {source} was asked for with {model.config.name_or_path}; it was trained for {words['base']} "
            "with other weights; give the adapter of this model, or train one with `kvfold train`"
        )
    adapter = Adapter(
        rows=words["rows"],
        width=words["width"],
        layers=[tuple(layer) for layer in words["layers"]],
        rank=words["rank"],
        scale=words["scale"],
        values=words["values"],
    )
    try:
        adapter.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / _TENSORS).items()})
    except Exception as error:  # safetensors and torch raise their own kinds for torn files and wrong shapes
        raise FileError(f"{source} was asked for; its tensors cannot be read ({error}); get a sound copy") from error
    adapter.requires_grad_(False).to(device=model.device, dtype=model.dtype)
    adapter.salience.float()  # ranks are told apart in float32
    return adapter.attach(model)


def find_adapter(model: Any, select: Select) -> Adapter | None:
    """The adapter that a method names for a model; None for a method without one."""
    source = select.adapter_source
    if source is None:
        return None
    kind = type(select).__module__.rpartition(".")[2]
    if source != "shipped":
        return load_adapter(source, model, kind=kind)
    own = fingerprint(model)
    for path in sorted(SHIPPED.glob(f"*/adapters/{kind}/{_WORDS}")):
        if _words(path.parent)["fingerprint"] == own:
            return load_adapter(path.parent, model, kind=kind)
    raise ModelError(
        f"{kind} was asked for with {model.config.name_or_path}; no adapter ships for it; train one by "
        f"`kvfold train {kind}` and give its folder as {kind}(adapter=...)"
    )


def _folder(source: str | Path) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=[_TENSORS, _WORDS]))
    except Exception as error:  # whatever keeps the Hub from answering, the user must give another source
        first = str(error).splitlines()[0]
        raise FileError(
            f"the adapter {source} was asked for; it is no folder and the Hub has none ({first}); give a folder"
        ) from error


def _words(folder: Path) -> dict[str, Any]:
    try:
        words = json.loads((folder / _WORDS).read_text(encoding="utf-8"))
        missing = {
            "kind",
            "version",
            "base",
            "fingerprint",
            "layers",
            "rank",
            "scale",
            "rows",
            "width",
            "values",
        } - set(words)
    except (OSError, ValueError) as error:
        raise FileError(
            f"the adapter {folder} was asked for; its {_WORDS} cannot be read ({error}); get a sound copy"
        ) from error
    if missing:
        raise FileError(
            f"the adapter {folder} was asked for; its {_WORDS} lacks {', '.join(sorted(missing))}; get a sound copy"
        )
    return words
