"""Adapters as files: a folder with adapter.safetensors and adapter.json, on disk or on the Hub.

The JSON says what kind of adapter it is, for which base model (its fingerprint), how it was trained and what it scored.
A wrong base model is refused by name. Writing is atomic file by file, the JSON last, so a torn write is no adapter.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kvfold.adapters.adapter import Adapter, query_heads_of
from kvfold.adapters.scorer import DILATIONS, TokenFeatures
from kvfold.errors import FileError, ModelError, in_one_line
from kvfold.files import draft_of, put_in_place, write_text
from kvfold.hf.binding import ModelBinding
from kvfold.hf.load import SHIPPED, fingerprint
from kvfold.select.base import Select

VERSION = 1
TENSORS, WORDS = "adapter.safetensors", "adapter.json"
_SHOWN = 80  # characters of a word in an error
_SAID = 300  # characters of what another library says
_ALWAYS = ("kind", "version", "base", "fingerprint")
_OF_UPDATES = ("layers", "rank", "scale", "rows", "width", "reads")


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
    words = words_for(folder, model, kind=kind, needed=_OF_UPDATES)
    try:
        learned = read_tensors(folder)
        has_rows = "gates" in learned
        layers = [tuple(layer) for layer in words["layers"]]
        features = TokenFeatures(**words["reads"])
        with torch.device("meta"):  # takes no room: sizes are promises until they are those of the tensors
            adapter = Adapter(
                rows=words["rows"] if has_rows else 0,
                width=words["width"],
                layers=layers,
                rank=words["rank"],
                scale=words["scale"],
                query_heads=query_heads_of(model),
                features=features,
            )
        if not has_rows:
            learned = _without_rows(learned, adapter, (words["rows"], words["width"]))
        weights = {name: tensor.float() for name, tensor in learned.items()}
        adapter.load_state_dict(weights, assign=True)
        adapter.requires_grad_(False).to(device=model.device, dtype=model.dtype)
        adapter.scorer.float()  # close scores differ only in float32
        return adapter.attach(model)
    except Exception as error:  # safetensors and torch raise their own kinds for torn files and wrong shapes
        raise FileError(
            f"{source} was asked for; its tensors cannot be read ({in_one_line(error, _SAID)}); get a sound copy"
        ) from error


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of an adapter. Raises ValueError where one holds other things than numbers."""
    learned = load_file(folder / TENSORS)
    for name, tensor in learned.items():
        # A loss that no layer could bear is infinite: what it falls by comes first (encode/lowrank/measured.py).
        found = tensor.nan_to_num(posinf=0.0, nan=torch.nan) if name.endswith(".falls") else tensor
        finite = found.isfinite()
        if not bool(finite.all()):
            raise ValueError(f"{name} holds what is no number")
    return learned


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
    registered = ModelBinding.of(model).registered_adapter(kind) if source == "shipped" else None
    return load_adapter(source, model, kind=kind) if registered is None else registered


def register_adapter(model: Any, kind: str, make: Callable[[], Any]) -> None:
    """Register a lazily built adapter (or ranks) as the shipped one of its kind for a model that none ships for."""
    ModelBinding.of(model).register_adapter(kind, make)


def write_folder(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, kind: str, model: Any, words: Mapping[str, Any]
) -> None:
    """Write an adapter of any kind: its tensors and its JSON, which says for which model it is."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {
        "kind": kind,
        "version": VERSION,
        "base": _called(model),
        "fingerprint": fingerprint(model),
        **words,
    }
    with draft_of(folder / TENSORS) as draft:
        save_file(dict(tensors), draft)
        put_in_place(draft, folder / TENSORS)
    write_text(folder / WORDS, json.dumps(said, indent=1) + "\n")


def folder_for(source: str | Path, model: Any, *, kind: str) -> Path:
    """Find the folder of an adapter: on this disk, fetched from the Hub, or, for "shipped", the one of this model."""
    if source != "shipped":
        return _folder(source)
    wanted = fingerprint(model)
    for path in sorted(SHIPPED.glob(f"*/adapters/{kind}/{WORDS}")):
        if _words(path.parent, ())["fingerprint"] == wanted:
            return path.parent
    raise ModelError(
        f"{kind} was asked for with {model.config.name_or_path}; no adapter ships for it; train one by "
        f"`kvfold train {kind}` and give its folder as {kind}(adapter=...)"
    )


def words_for(folder: Path, model: Any, *, kind: str, needed: Sequence[str] = ()) -> dict[str, Any]:
    """Read an adapter's JSON; refuse another kind, a newer version and another model."""
    words = _words(folder, ())
    said = {name: str(words[name])[:_SHOWN] for name in _ALWAYS}  # words of others may be of any length
    if words["kind"] != kind:
        raise FileError(
            f"{folder} was asked for as a {kind} adapter; it is one of {said['kind']}; give a {kind} adapter"
        )
    words = _words(folder, needed)
    if words["version"] > VERSION:
        raise FileError(
            f"{folder} was asked for; it is of version {said['version']}, this kvfold reads up to {VERSION}; "
            "upgrade kvfold"
        )
    if words["fingerprint"] != fingerprint(model):
        raise ModelError(
            f"the adapter {folder} was asked for with {model.config.name_or_path}; it was trained for {said['base']} "
            "with other weights; give the adapter of this model, or train one with `kvfold train`"
        )
    return words


def _called(model: Any) -> str:
    """Name a model as on the Hub, or by its folder without where that lies."""
    name = str(model.config.name_or_path)
    return Path(name).name if Path(name).is_dir() else name


def _folder(source: str | Path) -> Path:
    try:
        if Path(source).is_dir():
            return Path(source)
    except OSError as error:  # a name that is too long
        raise FileError(
            f"the adapter {str(source)[:100]!r}... was asked for; it cannot be a name ({error.strerror}); give a folder"
        ) from error
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=[TENSORS, WORDS]))
    except Exception as error:  # whatever keeps the Hub from answering, the user must give another source
        first = in_one_line(error, _SAID)
        raise FileError(
            f"the adapter {str(source)!r:.300} was asked for; it is no folder and the Hub has none ({first}); "
            "give a folder"
        ) from error


def _words(folder: Path, needed: Sequence[str]) -> dict[str, Any]:
    try:
        words = json.loads((folder / WORDS).read_text(encoding="utf-8"))
        missing = {*_ALWAYS, *needed} - set(words)
        if not isinstance(words, dict) or type(words.get("version", 1)) is not int:
            raise ValueError("it is no adapter's")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise FileError(
            f"the adapter {folder} was asked for; its {WORDS} cannot be read ({error}); get a sound copy"
        ) from error
    if missing:
        raise FileError(
            f"the adapter {folder} was asked for; its {WORDS} lacks {', '.join(sorted(missing))}; get a sound copy"
        )
    return words
