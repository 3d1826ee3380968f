"""The disk tier: one file, readable by its owner only, in a folder that the user names.

Room is allocated before it is written and never beyond the limit, writes are checked, and the file goes when its cache
goes. A killed process leaves its file behind without its lock; the next disk tier of that folder removes such files.
It knows no slots.
"""

import contextlib
import fcntl
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from kvfold.errors import BudgetError, FileError, PlanError
from kvfold.memory.store import TensorBuffer, Tier

_PREFIX, _SUFFIX = "kvfold-", ".far"
_NEW = ".new"
_PAGE = mmap.ALLOCATIONGRANULARITY


class DiskTier(Tier):
    """One file. It changes: buffers are allocated in it and given back when nothing refers to them."""

    name: ClassVar[str] = "disk"
    needs_directory: ClassVar[bool] = True

    def __init__(self, folder: Path, *, limit_bytes: int | None) -> None:
        """Create a file in the folder, after removing the files of processes that are gone. Raises FileError."""
        self.limit_bytes = limit_bytes
        try:
            remove_stale(folder)
            self._handle, name = _create(folder)
        except OSError as error:
            _refuse(folder, error)
        self.path = Path(name)
        self._size = 0
        self._free: list[tuple[int, int]] = []  # buffers given back: offset, size
        self._lock = threading.Lock()
        self.close = weakref.finalize(self, _remove, self._handle, self.path)

    @classmethod
    def open(cls, *, directory: str | None, limit_bytes: int | None) -> "DiskTier":
        """Open a file in a folder. Raises PlanError where no folder is named, FileError where none can be made."""
        if directory is None:
            raise PlanError(
                "tier='disk' with directory=None was asked for; a file on disk lies in a folder that you name; "
                "give directory= too"
            )
        return cls(Path(directory).expanduser(), limit_bytes=limit_bytes)

    def buffer(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> TensorBuffer:
        """Make room in the file, mapped into memory. Raises FileError beyond the limit, or where the disk is full."""
        wanted = max(prod(shape) * dtype.itemsize, 1)
        size = -(-wanted // _PAGE) * _PAGE  # rounded up: mappings begin at whole pages
        with self._lock:
            offset = self._reused(size)
            if offset is None:
                offset = self._allocate(size)
        mapped = mmap.mmap(self._handle, size, offset=offset)
        tensor = torch.frombuffer(mapped, dtype=dtype, count=max(prod(shape), 1))[: prod(shape)].view(*shape)
        buffer = _MappedBuffer(tensor, self, offset)
        weakref.finalize(mapped, self._give_back, offset, size)  # when no view of the mapping is left
        return buffer

    def set_limit(self, limit_bytes: int) -> None:
        """Set another limit of the file. Raises BudgetError for one below what it takes now."""
        with self._lock:
            if limit_bytes < self._size:
                raise BudgetError(
                    f"limit_bytes={limit_bytes} was asked for; {self.path} takes {self._size} bytes already; "
                    f"give {self._size} or more, or a new chat the smaller limit"
                )
            self.limit_bytes = limit_bytes

    def put(self, offset: int, data: memoryview) -> None:
        """Write bytes at a place of the file. Raises FileError where they do not all arrive."""
        while len(data):
            try:
                written = os.pwrite(self._handle, data, offset)  # may write less than it is given
            except OSError as error:
                _refuse(self.path.parent, error)
            data, offset = data[written:], offset + written

    def _allocate(self, size: int) -> int:
        if self.limit_bytes is not None and self._size + size > self.limit_bytes:
            raise FileError(
                f"{size} bytes more were to be put into {self.path}; it has {self._size} and may have "
                f"{self.limit_bytes}; give a larger limit_bytes, or a shorter text"
            )
        try:
            os.posix_fallocate(self._handle, self._size, size)  # a full disk refuses here, not in the middle of a fold
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self._size)  # give back what was allocated before it failed
            _refuse(self.path.parent, error)
        self._size += size
        return self._size - size

    def _reused(self, size: int) -> int | None:
        """Find a place that was given back and is large enough, and fill it with zeros; None where there is none."""
        for number, (offset, held) in enumerate(self._free):
            if held >= size:
                self._free[number : number + 1] = [(offset + size, held - size)] if held > size else []
                zeros = memoryview(bytes(min(size, 1 << 20)))
                for start in range(0, size, len(zeros)):
                    self.put(offset + start, zeros[: size - start])
                return offset
        return None

    def _give_back(self, offset: int, size: int) -> None:
        self._free.append((offset, size))


class _MappedBuffer(TensorBuffer):
    """A buffer of a file: read through the mapping, written through the file, so that a failure is an error."""

    def __init__(self, tensor: Tensor, tier: DiskTier, offset: int) -> None:
        super().__init__(tensor)
        self._tier, self._offset = tier, offset

    def write(self, head: int, start: int, values: Tensor) -> None:
        """Put the bytes into the file; the system writes them to the disk while work goes on."""
        slot = self.tensor.stride(1) * self.tensor.element_size()  # bytes of a slot
        place = self._offset + (head * self.tensor.shape[1] + start) * slot
        data = values.detach().to("cpu", self.tensor.dtype).contiguous().view(torch.uint8)
        flat: Any = data.flatten().numpy()
        self._tier.put(place, memoryview(flat))


def remove_stale(folder: Path) -> list[Path]:
    """Remove the files of processes that are gone: nobody holds their lock."""
    gone = []
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError):  # another's file, or another was quicker
            handle = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                gone.append(path)
            finally:
                os.close(handle)
    return gone


def _create(folder: Path) -> tuple[int, str]:
    """Create a file for its owner only, locked before it gets the name that others look for."""
    handle, draft = tempfile.mkstemp(dir=folder, prefix=_PREFIX, suffix=_SUFFIX + _NEW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        name = draft.removesuffix(_NEW)
        os.rename(draft, name)
    except OSError:
        _remove(handle, Path(draft))
        raise
    return handle, name


def _remove(handle: int, path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    os.close(handle)


def _refuse(folder: Path, error: OSError) -> NoReturn:
    why = (error.strerror or str(error)).lower()
    raise FileError(
        f"slots were to be put into {folder}; that failed ({why}); give directory= a folder that can be written to "
        "and has room"
    ) from error
