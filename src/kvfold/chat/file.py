"""A saved chat as a file: safetensors, with one JSON header that says what it is and what it holds.

The header can be read without torch; what is cut short, foreign or newer is refused. A file is written beside its
place and put there in one step, so it is whole or not there. What the header means is chat.py's business.
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

_LENGTH_BYTES = 8  # safetensors begins with the length of its own header
_LONGEST_BYTES = 1 << 30  # no header is longer: such a length is no length


def write(path: Path, header: Header, tensors: "Mapping[str, Tensor]") -> None:
    """Put a file in its place, whole or not at all; only its owner may read it. Raises FileError where it cannot."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    words = {KIND: json.dumps({"format_version": FORMAT_VERSION, **header})}  # one word: equal chats, equal files
    try:
        with _beside(path) as draft:
            save_file(_apart(tensors), draft, metadata=words)
            _flush(draft)
            os.replace(draft, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        _refuse(path, "written", f"that failed ({error})", "choose a folder that can be written to and has room")


def read_header(path: Path) -> Header:
    """What a file says of itself, without its tensors. Raises FileError for all but a whole saved chat."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            outer = _outer(path, file.read(_LENGTH_BYTES), size, file)
    except OSError as error:
        why = error.strerror or str(error)
        _refuse(path, "read", why[:1].lower() + why[1:], "give the path of a chat that was saved")
    words = outer.pop("__metadata__", None) or {}
    if KIND not in words:
        _refuse(path, "read as a chat", "it is another kind of safetensors file", "give one that `save` wrote")
    try:
        header = json.loads(words[KIND])
        version = header["format_version"]
    except (ValueError, KeyError, TypeError):
        _refuse(path, "read as a chat", "its header cannot be read", "get a sound copy")
    if version > FORMAT_VERSION:
        newer = f"kvfold {header.get('kvfold')} wrote it in format {version}, newer than {FORMAT_VERSION}"
        _refuse(path, "read", newer, "upgrade kvfold")
    lacking = [name for name in PROMISED if name not in header]
    if lacking:
        _refuse(path, "read", f"its header lacks {', '.join(lacking)}", "get a sound copy")
    return header


def read_tensors(path: Path, *, device: "torch.device | str") -> "dict[str, Tensor]":
    """The tensors of a file whose header was found whole, in memory of their own: the file may go."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        mapped = load_file(path, device=str(device))  # on the CPU these are windows into the file
        return {name: tensor.clone() for name, tensor in mapped.items()}
    except (OSError, SafetensorError) as error:
        _refuse(path, "read", f"its tensors cannot be ({error})", "get a sound copy")


def _outer(path: Path, begin: bytes, size: int, file: Any) -> dict[str, Any]:
    """The header of safetensors itself; the file must be exactly as long as that says."""
    length = struct.unpack("<Q", begin)[0] if len(begin) == _LENGTH_BYTES else 0
    inside = file.read(min(length, _LONGEST_BYTES))
    if not inside.startswith(b"{") or length > _LONGEST_BYTES:
        _refuse(path, "read as a chat", "it is another kind of file", "give one that `save` wrote")
    if len(inside) < length:
        _cut_short(path, size, _LENGTH_BYTES + length)
    try:
        outer = json.loads(inside)
        tensors = [entry for name, entry in outer.items() if name != "__metadata__"]
        whole = _LENGTH_BYTES + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
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
def _beside(path: Path) -> Iterator[Path]:
    """An empty file in the same folder, gone afterwards unless it was moved."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _flush(path: Path) -> None:
    """Make the disk have it: a file's bytes, or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _apart(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Tensors in storages of their own, as safetensors wants them."""
    taken: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        tight = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        apart[name] = tensor if tight and place not in taken else tensor.clone().contiguous()
        taken.add(place)
    return apart
