"""A saved chat as a file: safetensors, with one JSON header that says which kind of file it is and what it holds.

The header can be read without torch. Files that are cut short, foreign, newer or changed by a bit are refused: format 2
has a seal over header and tensors. A file is written under another name in the same folder and then renamed, so it is
whole or not there. schema.py knows what a header may say, saved.py what it means.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeAlias

from kvfold import seal
from kvfold.errors import FileError
from kvfold.files import draft_of, put_in_place, refuse_special

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Header: TypeAlias = dict[str, Any]

KIND = "kvfold-chat"
FORMAT_VERSION = 2
FIRST_SEALED = 2

COUNTERS = ("fed", "seen", "slots", "stored_bytes", "full_bytes", "other_bytes")  # of the ledger when it was saved
_LENGTH_BYTES = 8  # safetensors begins with the length of its header, little-endian
_LONGEST_BYTES = 1 << 28  # no header is longer: a larger number is no length, so the file is of another kind


def write(path: Path, header: Header, tensors: "Mapping[str, Tensor]") -> None:
    """Write a file, whole or not at all, that only its owner may read. Raises FileError if that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # One entry, because safetensors writes several in any order: equal chats shall make equal files.
    metadata = {KIND: json.dumps({"format_version": FORMAT_VERSION, "seal": seal.BLANK} | header)}
    try:
        with draft_of(path) as draft:
            save_file(_unshared(tensors), draft, metadata=metadata)
            _seal(draft)
            put_in_place(draft, path)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a name with a NUL in it
        _refuse(path, "written", f"that failed ({error})", "choose a folder that can be written to and has room")


def read_header(path: Path) -> Header:
    """Read the header of a file without its tensors. Raises FileError for all but a whole saved chat."""
    from pydantic import ValidationError

    from kvfold.chat.schema import ChatHeader
    from kvfold.schema import first_fault

    refuse_special(path, "a chat that was saved")
    head, outer = _read_head(path)
    metadata = outer.get("__metadata__")
    if not isinstance(metadata, dict) or KIND not in metadata:
        _refuse(path, "read as a chat", "it is another kind of safetensors file", "give one that `save` wrote")
    try:
        header = json.loads(metadata[KIND])
        version = int(header["format_version"])
    except (ValueError, KeyError, TypeError, RecursionError):
        _refuse(path, "read as a chat", "its header cannot be read", "get a sound copy")
    if version > FORMAT_VERSION:
        newer = f"kvfold {header.get('kvfold')!s:.40} wrote it in format {version}, newer than {FORMAT_VERSION}"
        _refuse(path, "read", newer, "upgrade kvfold")
    if version >= FIRST_SEALED and not seal.is_whole(head, header.get("seal")):
        _refuse(path, "read", "its header is not as it was written", "get a sound copy")
    try:
        ChatHeader.model_validate(header)
    except (ValidationError, RecursionError) as error:
        fault = first_fault(error) if isinstance(error, ValidationError) else "it is too deep"
        _refuse(path, "read", f"its header is none of a chat ({fault})", "get a sound copy")
    return header


def read_tensors(path: Path, header: Header, *, device: "torch.device | str") -> "dict[str, Tensor]":
    """Read the tensors of a file with this header, into memory: the file may be removed after that.

    Raises FileError where they are not those that were sealed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if "seal" in header:
            with path.open("rb") as file:
                file.seek(_LENGTH_BYTES + _length(file.read(_LENGTH_BYTES)))
                seal.refuse_other_data(file, header["seal"], path)
        mapped = load_file(path, device=str(device))  # on the CPU these tensors are views of the mapped file
        return {name: tensor.clone() for name, tensor in mapped.items()}
    except (OSError, SafetensorError) as error:
        _refuse(path, "read", f"its tensors cannot be ({error})", "get a sound copy")


def _seal(draft: Path) -> None:
    """Fill in the blank seal of a file that was just written."""
    with draft.open("r+b") as file:
        begin = file.read(_LENGTH_BYTES)
        head = begin + file.read(_length(begin))
        whole = seal.sealed(head, seal.digest_of(file))
        file.seek(0)
        file.write(whole)


def _length(begin: bytes) -> int:
    return struct.unpack("<Q", begin)[0] if len(begin) == _LENGTH_BYTES else 0


def _read_head(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Read the head of a file, as bytes and as JSON. The file must be exactly as long as it says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = _head(path, size, file)
    except OSError as error:
        _refuse(path, "read", (error.strerror or str(error)).lower(), "give the path of a chat that was saved")
    try:
        outer = json.loads(head[_LENGTH_BYTES:])
        tensors = [entry for name, entry in outer.items() if name != "__metadata__"]
        data_bytes = max((entry["data_offsets"][1] for entry in tensors), default=0)
        whole = len(head) + int(data_bytes)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
        _refuse(path, "read as a chat", "it is another kind of file", "give one that `save` wrote")
    if size != whole:
        _cut_short(path, size, whole)
    return head, outer


def _head(path: Path, size: int, file: BinaryIO) -> bytes:
    begin = file.read(_LENGTH_BYTES)
    length = _length(begin)
    inside = file.read(min(length, _LONGEST_BYTES))
    if not inside.startswith(b"{") or length > _LONGEST_BYTES:
        _refuse(path, "read as a chat", "it is another kind of file", "give one that `save` wrote")
    if len(inside) < length:
        _cut_short(path, size, _LENGTH_BYTES + length)
    return begin + inside


def _cut_short(path: Path, size: int, whole: int) -> NoReturn:
    _refuse(path, "read", f"it has {size} bytes of {whole}: it was cut short or added to", "get a whole copy")


def _refuse(path: Path, verb: str, truth: str, remedy: str) -> NoReturn:
    raise FileError(f"{path} was to be {verb}; {truth}; {remedy}")


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
