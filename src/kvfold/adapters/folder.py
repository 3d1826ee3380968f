"""The folder of an adapter of any kind: adapter.safetensors and adapter.json, on disk or on the Hub.

The JSON says what kind of adapter it is, for which base model (its fingerprint), how it was trained and what it scored.
From version 2 on it has a seal over itself and the tensors, so one flipped bit is refused. A wrong base model is
refused by name. Writing is atomic file by file, the JSON last, so a torn write is no adapter.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvfold import seal
from kvfold.adapters.likeness import BOUND, SAMPLES, least_cosine, samples_of
from kvfold.adapters.schema import AdapterWords
from kvfold.errors import FileError, ModelError, in_one_line
from kvfold.files import draft_of, put_in_place, refuse_special, write_text
from kvfold.hf.binding import ModelBinding
from kvfold.hf.load import SHIPPED, fingerprint, shape_digest
from kvfold.schema import first_fault

VERSION = 2
FIRST_SEALED = 2
TENSORS, WORDS = "adapter.safetensors", "adapter.json"
_SHOWN = 80  # characters of a word in an error
_SAID = 300  # characters of what another library says
_LONGEST_BYTES = 1 << 26  # no JSON of an adapter is longer


def write_folder(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, kind: str, model: Any, words: Mapping[str, Any]
) -> None:
    """Write an adapter of any kind: its tensors, and its sealed JSON, which says for which model it is."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {
        "kind": kind,
        "version": VERSION,
        "seal": seal.BLANK,
        "base": _called(model),
        "fingerprint": fingerprint(model),
        "shape": shape_digest(model),
        **words,
    }
    with draft_of(folder / TENSORS) as draft:
        save_file({**tensors, SAMPLES: samples_of(model)}, draft)
        with draft.open("rb") as file:
            digest = seal.digest_of(file)
        put_in_place(draft, folder / TENSORS)
    head = json.dumps(said, indent=1) + "\n"
    write_text(folder / WORDS, seal.sealed(head.encode(), digest).decode())


def folder_for(source: str | Path, model: Any, *, kind: str) -> Path:
    """Find the folder of an adapter: on this disk, fetched from the Hub, or, for "shipped", the one of this model."""
    if source != "shipped":
        return _folder(source)
    wanted = fingerprint(model)
    words = {}
    for path in sorted(SHIPPED.glob(f"*/adapters/{kind}/{WORDS}")):
        words[path.parent] = _read(path.parent)[1]
        if words[path.parent]["fingerprint"] == wanted:
            return path.parent
    for folder, said in words.items():
        if _likeness(folder, said, model) >= BOUND:
            return folder
    raise ModelError(
        f"{kind} was asked for with {ModelBinding.of(model).name}; no adapter ships for it; train one by "
        f"`kvfold train {kind}` and give its folder as {kind}(adapter=...)"
    )


def written_at(folder: Path) -> int:
    """Say when an adapter was written, in nanoseconds; 0 for a folder without one."""
    words = folder / WORDS
    return words.stat().st_mtime_ns if words.is_file() else 0


def words_for(folder: Path, model: Any, *, kind: str, schema: type[AdapterWords]) -> dict[str, Any]:
    """Read an adapter's JSON; refuse another kind, a newer version, another model, and what the schema does not take.

    One of an older version without a seal is read with a warning.
    """
    head, words = _read(folder)
    if words["kind"] != kind:
        raise FileError(
            f"{folder} was asked for as a {kind} adapter; it is one of {words['kind'][:_SHOWN]}; give a {kind} adapter"
        )
    if words["version"] > VERSION:
        version = str(words["version"])[:_SHOWN]
        raise FileError(
            f"{folder} was asked for; it is of version {version}, this kvfold reads up to {VERSION}; upgrade kvfold"
        )
    sealed = words["version"] >= FIRST_SEALED or "seal" in words
    if sealed and not seal.is_whole(head, words.get("seal")):
        _refuse_words(folder, "is not as it was written")
    _check(folder, head, schema)
    if words["fingerprint"] != fingerprint(model):
        _refuse_unlike(folder, words, model)
    if not sealed:
        warnings.warn(
            f"the adapter {folder} is of an older format without a digest; write it anew to seal it", stacklevel=3
        )
    return words


def _refuse_unlike(folder: Path, words: Mapping[str, Any], model: Any) -> None:
    """Raise ModelError for a model that an adapter does not fit; say in a warning how like one is that it fits."""
    base, name = words["base"][:_SHOWN], ModelBinding.of(model).name
    cosine = _likeness(folder, words, model)
    if cosine < BOUND:
        raise ModelError(
            f"the adapter {folder} was asked for with {name}; it was trained for {base} with other weights; give the "
            "adapter of this model, or train one with `kvfold train`"
        )
    warnings.warn(
        f"the adapter {folder} was made for {base}; {name} has nearly its weights (cosine of samples at least "
        f"{cosine:.4f} in every matrix), so it is used",
        stacklevel=4,
    )


def _likeness(folder: Path, words: Mapping[str, Any], model: Any) -> float:
    """Say how like a model is to the one that an adapter was made for: a cosine; -1 where that cannot be said."""
    if words.get("shape") != shape_digest(model):
        return -1.0
    try:
        with safe_open(folder / TENSORS, framework="pt") as tensors:
            return least_cosine(model, tensors.get_tensor(SAMPLES))
    except Exception:  # torn files are refused where they are read
        return -1.0


def read_tensors(folder: Path, words: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Read the tensors of an adapter with this JSON.

    Raises FileError where they are not those that were sealed, ValueError where one holds other things than numbers.
    """
    path = folder / TENSORS
    refuse_special(path, "an adapter's tensors")
    if "seal" in words:
        with path.open("rb") as file:
            seal.refuse_other_data(file, words["seal"], path)
    learned = load_file(path)
    learned.pop(SAMPLES, None)  # of the model, and no part of the adapter
    for name, tensor in learned.items():
        # A loss that no layer could bear is infinite: what it falls by comes first (encode/lowrank/measured.py).
        found = tensor.nan_to_num(posinf=0.0, nan=torch.nan) if name.endswith(".falls") else tensor
        finite = found.isfinite()
        if not bool(finite.all()):
            raise ValueError(f"{name} holds what is no number")
    return learned


def refuse_tensors(source: str | Path, error: Exception) -> NoReturn:
    """Raise FileError for tensors that make no adapter, whatever of any library's errors says so."""
    if isinstance(error, FileError | ModelError):
        raise error
    said = in_one_line(error, _SAID)
    raise FileError(f"{source} was asked for; its tensors cannot be read ({said}); get a sound copy") from error


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


def _read(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """Read an adapter's JSON, as bytes and as words that every adapter has. Raises FileError for all else."""
    path = folder / WORDS
    if path.exists():
        refuse_special(path, "an adapter")
    try:
        with path.open("rb") as file:
            head = file.read(_LONGEST_BYTES)
        words = json.loads(head)
    except (OSError, ValueError, RecursionError) as error:
        _refuse_words(folder, f"cannot be read ({in_one_line(error, _SAID)})", error)
    _check(folder, head, AdapterWords)
    return head, words


def _check(folder: Path, head: bytes, schema: type[AdapterWords]) -> None:
    """Raise FileError where the bytes of a JSON are not what a schema takes."""
    try:
        schema.model_validate_json(head)
    except ValidationError as error:
        _refuse_words(folder, f"is none of an adapter ({first_fault(error)})", error)


def _refuse_words(folder: Path, truth: str, error: Exception | None = None) -> NoReturn:
    raise FileError(f"the adapter {folder} was asked for; its {WORDS} {truth}; get a sound copy") from error
