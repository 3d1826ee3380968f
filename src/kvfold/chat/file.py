"""A saved chat as a file: safetensors, with one JSON header that says which kind of file it is and what it holds.

The header can be read without torch. Files that are cut short, foreign or newer are refused. A file is written under
another name in the same folder and then renamed, so it is whole or not there. saved.py knows what the header means.
"""

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from kvfold.errors import FileError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Header: TypeAlias = dict[str, Any]

KIND = "kvfold-chat"
FORMAT_VERSION = 1

COUNTERS = ("fed", "seen", "slots", "stored_bytes", "full_bytes", "other_bytes")  # of the ledger when it was saved
PROMISED = (
    *("kvfold", "model", "fingerprint", "dtype", "plan", "pinned", "raw_turns", "stride", "counters"),
    *("messages", "turns", "ids", "generation", "cache"),
)

_LENGTH_BYTES = 8  # safetensors begins with the length of its header, little-endian
_LONGEST_BYTES = 1 << 30  # no header is longer: a larger number is no length, so the file is of another kind


def write(path: Path, header: Header, tensors: "Mapping[str, Tensor]") -> None:
    """Write a file, whole or not at all, that only its owner may read. Raises FileError if that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # One entry, because safetensors writes several in any order: equal chats shall make equal files.
    metadata = {KIND: json.dumps({"format_version": FORMAT_VERSION, **header})}
    try:
        with _draft_of(path) as draft:
            save_file(_unshared(tensors), draft, metadata=metadata)
            _flush(draft)
            os.replace(draft, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        _refuse(path, "written", f"that failed ({error})", "choose a folder that can be written to and has room")


def read_header(path: Path) -> Header:
    """Read the header of a file without its tensors. Raises FileError for all but a whole saved chat."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            outer = _read_outer(path, file.read(_LENGTH_BYTES), size, file)
    except OSError as error:
        reason = error.strerror or str(error)
        _refuse(path, "read", reason[:1].lower() + reason[1:], "give the path of a chat that was saved")
    metadata = outer.pop("__metadata__", None) or {}
    if KIND not in metadata:
        _refuse(path, "read as a chat", "it is another kind of safetensors file", "give one that `save` wrote")
    try:
        header = json.loads(metadata[KIND])
        version = header["format_version"]
    except (ValueError, KeyError, TypeError):
        _refuse(path, "read as a chat", "its header cannot be read", "get a sound copy")
    if version > FORMAT_VERSION:
        newer = f"kvfold {header.get('kvfold')} wrote it in format {version}, newer than {FORMAT_VERSION}"
        _refuse(path, "read", newer, "upgrade kvfold")
    missing = [name for name in PROMISED if name not in header]
    if missing:
        _refuse(path, "read", f"its header lacks {', '.join(missing)}", "get a sound copy")
    return header


def read_tensors(path: Path, *, device: "torch.device | str") -> "dict[str, Tensor]":
    """Read the tensors of a file whose header was found whole, into memory: the file may be removed after that."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        mapped = load_file(path, device=str(device))  # on the CPU these tensors are views of the mapped file
        return {name: tensor.clone() for name, tensor in mapped.items()}
    except (OSError, SafetensorError) as error:
        _refuse(path, "read", f"its tensors cannot be ({error})", "get a sound copy")


def _read_outer(path: Path, begin: bytes, size: int, file: Any) -> dict[str, Any]:
    """Read the header of safetensors, which holds ours. The file must be exactly as long as it says."""
    length = struct.unpack("<Q", begin)[0] if len(begin) == _LENGTH_BYTES else 0
    inside = file.read(min(length, _LONGEST_BYTES))
    if not inside.startswith(b"{") or length > _LONGEST_BYTES:
        _refuse(path, "read as a chat", "it is another kind of file", "give one that `save` wrote")
    if len(inside) < length:
        _cut_short(path, size, _LENGTH_BYTES + length)
    try:
        outer = json.loads(inside)
        tensors = [entry for name, entry in outer.items() if name != "__metadata__"]
        data_bytes = max((entry["data_offsets"][1] for entry in tensors), default=0)
        whole = _LENGTH_BYTES + length + data_bytes
    except (ValueError, KeyError, TypeError, AttributeError):
        _refuse(path, "read as a chat", "it is another kind of file", "give one that `save` wrote")
    if size != whole:
        _cut_short(path, size, whole)
    return outer


def _cut_short(path: Path, size: int, whole: int) -> NoReturn:
    _refuse(path, "read", f"it has {size} bytes of {whole}: it was cut short or added to", "get a whole copy")


def _refuse(path: Path, verb: str, truth: str, remedy: str) -> NoReturn:
    raise FileError(f"{path} was to be {verb}; {truth}; {remedy}")


@contextmanager
def _draft_of(path: Path) -> Iterator[Path]:
    """Make an empty file in the same folder. It is gone afterwards unless it was renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _flush(path: Path) -> None:
    """Write a file's bytes, or a folder's entries, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unshared(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Copy the tensors that share a storage or do not fill it: safetensors refuses those."""
    taken: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        fills = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        alone = fills and storage.data_ptr() not in taken
        unshared[name] = tensor if alone else tensor.clone().contiguous()
        taken.add(storage.data_ptr())
    return unshared
