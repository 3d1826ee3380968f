"""A snapshot as a file: safetensors, with one JSON header that says which kind of file it is and what it holds.

The header can be read without torch. Files that are cut short, foreign, newer or changed by a bit are refused: a seal
stands over header and tensors. A file is written under another name in the same folder and then renamed, so it is whole
or not there. What a header may say is its kind's schema (snapshot_schema.py has what all kinds share).
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeAlias

from kvfold import seal
from kvfold.errors import FileError
from kvfold.files import draft_of, put_in_place, refuse_special

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel
    from torch import Tensor

Header: TypeAlias = dict[str, Any]

COUNTERS = ("fed", "seen", "slots", "stored_bytes", "full_bytes", "other_bytes")  # of the ledger when it was saved
_LENGTH_BYTES = 8  # safetensors begins with the length of its header, little-endian
_LONGEST_BYTES = 1 << 28  # no header is longer: a larger number is no length, so the file is of another kind


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKind:
    """A kind of file: what stands in its head, and what a user calls it."""

    key: str  # of the header among safetensors' metadata
    noun: str  # what is saved in it
    writer: str  # what writes it
    version: int  # that is written
    first_sealed: int  # earlier versions have no seal

    def write(self, path: Path, header: Header, tensors: "Mapping[str, Tensor]") -> None:
        """Write a file, whole or not at all, that only its owner may read. Raises FileError if that fails."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        # One entry, because safetensors writes several in any order: equal snapshots shall make equal files.
        metadata = {self.key: json.dumps({"format_version": self.version, "seal": seal.BLANK} | header)}
        try:
            with draft_of(path) as draft:
                save_file(_unshared(tensors), draft, metadata=metadata)
                fill_in_seal(draft)
                put_in_place(draft, path)
        except (OSError, ValueError, SafetensorError) as error:  # ValueError: a name with a NUL in it
            _refuse(path, "written", f"that failed ({error})", "choose a folder that can be written to and has room")

    def is_in(self, path: Path) -> bool:
        """Tell whether a file that can be read is of this kind."""
        try:
            refuse_special(path, f"a {self.noun} that was saved")
            metadata = self._read_head(path)[1].get("__metadata__")
        except FileError:
            return False
        return isinstance(metadata, dict) and self.key in metadata

    def read_header(self, path: Path, schema: "type[BaseModel]") -> Header:
        """Read the header of a file without its tensors. Raises FileError for all but a whole file of this kind."""
        from pydantic import ValidationError

        from kvfold.schema import first_fault

        refuse_special(path, f"a {self.noun} that was saved")
        head, outer = self._read_head(path)
        header = self._header(path, head, outer.get("__metadata__"))
        try:
            schema.model_validate(header)
        except (ValidationError, RecursionError) as error:
            fault = first_fault(error) if isinstance(error, ValidationError) else "it is too deep"
            _refuse(path, "read", f"its header is none of a {self.noun} ({fault})", "get a sound copy")
        return header

    def _header(self, path: Path, head: bytes, metadata: Any) -> Header:
        """Take the header out of a file's metadata, if it is as it was written."""
        if not isinstance(metadata, dict) or self.key not in metadata:
            self._refuse_kind(path, "another kind of safetensors file")
        try:
            header = json.loads(metadata[self.key])
            version = int(header["format_version"])
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            _refuse(path, f"read as a {self.noun}", "its header cannot be read", "get a sound copy")
        if version > self.version:
            newer = f"kvfold {header.get('kvfold')!s:.40} wrote it in format {version}, newer than {self.version}"
            _refuse(path, "read", newer, "upgrade kvfold")
        if version >= self.first_sealed and not seal.is_whole(head, header.get("seal")):
            _refuse(path, "read", "its header is not as it was written", "get a sound copy")
        return header

    def _read_head(self, path: Path) -> tuple[bytes, dict[str, Any]]:
        """Read the head of a file, as bytes and as JSON. The file must be exactly as long as it says."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = self._head(path, size, file)
        except OSError as error:
            truth = (error.strerror or str(error)).lower()
            _refuse(path, "read", truth, f"give the path of a {self.noun} that was saved")
        try:
            outer = json.loads(head[_LENGTH_BYTES:])
            tensors = [entry for name, entry in outer.items() if name != "__metadata__"]
            data_bytes = max((entry["data_offsets"][1] for entry in tensors), default=0)
            whole = len(head) + int(data_bytes)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError):
            self._refuse_kind(path, "another kind of file")
        if size != whole:
            _cut_short(path, size, whole)
        return head, outer

    def _head(self, path: Path, size: int, file: BinaryIO) -> bytes:
        begin = file.read(_LENGTH_BYTES)
        length = _length(begin)
        inside = file.read(min(length, _LONGEST_BYTES))
        if not inside.startswith(b"{") or length > _LONGEST_BYTES:
            self._refuse_kind(path, "another kind of file")
        if len(inside) < length:
            _cut_short(path, size, _LENGTH_BYTES + length)
        return begin + inside

    def _refuse_kind(self, path: Path, found: str) -> NoReturn:
        _refuse(path, f"read as a {self.noun}", f"it is {found}", f"give one that `{self.writer}` wrote")


CACHE = FileKind(key="kvfold-cache", noun="cache", writer="cache.save", version=1, first_sealed=1)


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


def fill_in_seal(draft: Path) -> None:
    """Fill in the blank seal of a file that was just written."""
    with draft.open("r+b") as file:
        begin = file.read(_LENGTH_BYTES)
        head = begin + file.read(_length(begin))
        whole = seal.sealed(head, seal.digest_of(file))
        file.seek(0)
        file.write(whole)


def _length(begin: bytes) -> int:
    return struct.unpack("<Q", begin)[0] if len(begin) == _LENGTH_BYTES else 0


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
