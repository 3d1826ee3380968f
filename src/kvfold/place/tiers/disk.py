"""The disk tier: one file, readable by its owner only, in a folder that the user names.

Room is allocated before it is written and never beyond the limit, writes are checked, and the file goes when its cache
goes. Room that is given back goes back to the disk, is joined with free neighbours, and is used again; where more than
an eighth of it is free after a fold, buffers move down and the file is cut. A killed process
leaves its file behind without its lock; the next disk tier of that folder removes such files: those whose name and
first page say that a process made them which is gone. It knows no slots.
"""

import contextlib
import fcntl
import mmap
import os
import re
import stat
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from kvfold.errors import BudgetError, FileError, PlanError
from kvfold.files import give_back_room, is_running
from kvfold.memory.store import TensorBuffer, Tier
from kvfold.place.free_room import FreeRoom

_SUFFIX, _NEW = ".far", ".new"
_NAMES = re.compile(r"kvfold-(\d{1,9})-[a-z0-9_]{8}\.far(\.new)?")
_PAGE = mmap.ALLOCATIONGRANULARITY
_GAPS = 8  # of what lies in the file: one byte in so many may be free
_COPIED_BYTES = 1 << 20  # at a time, when a buffer moves


class DiskTier(Tier):
    """One file. It changes: buffers are allocated in it and given back when nothing refers to them.

    The limit counts buffers in whole pages: their slots, the room that a store has for slots to come (an eighth), and
    both the old and the new buffer while a store grows. The first page, which has the mark, is not counted.
    """

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
        self._size = _PAGE
        self._live_bytes = 0  # of buffers
        self._free = FreeRoom()
        self._punches = True  # what is free takes no room on the disk
        self._given_back: deque[tuple[int, int]] = deque()  # offset and size of buffers that are not free yet
        self._buffers: weakref.WeakSet[_MappedBuffer] = weakref.WeakSet()
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
            self._settle()
            offset = self._allocate(size)
            buffer = _MappedBuffer(self._mapped(shape, dtype, offset, size), self, offset, size)
            self._buffers.add(buffer)
        return buffer

    def _mapped(self, shape: Sequence[int], dtype: torch.dtype, offset: int, size: int) -> Tensor:
        """Map a place of the file; it is given back when no view of the mapping is left."""
        try:
            mapped = mmap.mmap(self._handle, size, offset=offset)
        except OSError:
            self._given_back.append((offset, size))
            raise
        freed = weakref.finalize(mapped, self._give_back, offset, size)
        freed.atexit = False  # views may outlive the last line of a program
        return torch.frombuffer(mapped, dtype=dtype, count=max(prod(shape), 1))[: prod(shape)].view(*shape)

    @property
    def file_bytes(self) -> int:
        """Count the bytes that the file takes on the disk, of every cache that shares it."""
        return _PAGE + self._taken_bytes

    @property
    def _taken_bytes(self) -> int:
        return self._live_bytes + (0 if self._punches else self._free.size_bytes)

    def set_limit(self, limit_bytes: int) -> None:
        """Set another limit of the file. Raises BudgetError for one below what it takes now."""
        with self._lock:
            self._settle()
            if limit_bytes < self._taken_bytes:
                raise BudgetError(
                    f"limit_bytes={limit_bytes} was asked for; {self.path} takes {self._taken_bytes} bytes already; "
                    f"give {self._taken_bytes} or more, or a new chat the smaller limit"
                )
            self.limit_bytes = limit_bytes

    def tidy(self) -> None:
        """Move buffers down and cut the file while it is more than an eighth longer than what lies in it."""
        with self._lock, contextlib.suppress(FileError, OSError):  # what cannot move lies where it is
            self._settle()
            left = 4 * len(self._buffers)  # to the end and back down, for each of them: half as many would do
            while left and self._free.size_bytes > self._live_bytes // _GAPS and self._move_one():
                left -= 1

    def put(self, offset: int, data: memoryview) -> None:
        """Write bytes at a place of the file. Raises FileError where they do not all arrive."""
        while len(data):
            try:
                written = os.pwrite(self._handle, data, offset)  # may write less than it is given
            except OSError as error:
                _refuse(self.path.parent, error)
            data, offset = data[written:], offset + written

    def _allocate(self, size: int) -> int:
        """Give the offset of room that is on the disk and reads as zeros. Raises FileError where there is none."""
        return self._reserve(self._free.take(size), size)

    def _reserve(self, offset: int | None, size: int) -> int:
        """Have a place of the file, or its end, on the disk; give its offset. Raises FileError likewise."""
        is_there = offset is not None and not self._punches  # it takes its room already
        more = 0 if is_there else size
        try:
            if self.limit_bytes is not None and self._taken_bytes + more > self.limit_bytes:
                raise FileError(
                    f"{size} bytes more were to be put into {self.path}; it has {self._taken_bytes} and may have "
                    f"{self.limit_bytes}; give a larger limit_bytes, or a shorter text"
                )
            self._fill(self._size if offset is None else offset, size, is_there=is_there)
        except FileError:
            if offset is not None:
                self._free.add(offset, size)
            raise
        self._live_bytes += size
        if offset is not None:
            return offset
        self._size += size
        return self._size - size

    def _fill(self, offset: int, size: int, *, is_there: bool) -> None:
        """Have zeros on the disk: a full disk refuses here, not in the middle of a fold."""
        if is_there:
            zeros = memoryview(bytes(min(size, 1 << 20)))
            for start in range(0, size, len(zeros)):
                self.put(offset + start, zeros[: size - start])
            return
        try:
            os.posix_fallocate(self._handle, offset, size)
        except OSError as error:
            with contextlib.suppress(OSError):  # give back what was allocated before it failed
                if offset == self._size:
                    os.ftruncate(self._handle, offset)
                else:
                    give_back_room(self._handle, offset, size)
            _refuse(self.path.parent, error)

    def _give_back(self, offset: int, size: int) -> None:
        """Note that nothing refers to a buffer. This runs wherever Python frees it, also while the lock is held."""
        self._given_back.append((offset, size))
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """Free the room of buffers that were given back. The lock is held."""
        while self._given_back:
            offset, size = self._given_back.popleft()
            self._live_bytes -= size
            self._free.add(offset, size)
            self._punches = self._punches and give_back_room(self._handle, offset, size)
        end = self._free.take_end(self._size)
        if end < self._size:
            os.ftruncate(self._handle, end)
            self._size = end

    def _move_one(self) -> bool:
        """Move a buffer towards the beginning; False where none can be moved. The lock is held."""
        at = {buffer.offset: buffer for buffer in self._buffers}
        if not at:  # the last ones went while others moved
            return False
        last = at[max(at)]
        offset = self._free.take_before(last.offset, last.size)
        if offset is not None:
            return self._move(last, offset)
        # No gap has room for the last one. Where the one behind a gap goes to the end, its place makes the gap larger.
        behind = next((at[end] for end in self._free.ends() if end in at), None)
        return behind is not None and self._move(behind, None)

    def _move(self, buffer: "_MappedBuffer", offset: int | None) -> bool:
        """Move a buffer to a place, or to the end; False where its old place is still looked at. The lock is held."""
        if not buffer.lock.acquire(blocking=False):  # somebody writes into it
            if offset is not None:
                self._free.add(offset, buffer.size)
            return False
        try:
            place, before = self._reserve(offset, buffer.size), self._live_bytes
            moved = self._mapped(buffer.tensor.shape, buffer.tensor.dtype, place, buffer.size)
            self._copy(buffer.offset, place, buffer.size)
            buffer.tensor, buffer.offset = moved, place
        finally:
            buffer.lock.release()
        del moved
        self._settle()
        return self._live_bytes < before  # the old mapping is gone: nobody has a view of it

    def _copy(self, source: int, target: int, size: int) -> None:
        for start in range(0, size, _COPIED_BYTES):
            piece = os.pread(self._handle, min(_COPIED_BYTES, size - start), source + start)
            self.put(target + start, memoryview(piece))


class _MappedBuffer(TensorBuffer):
    """A buffer of a file: read through the mapping, written through the file, so that a failure is an error."""

    def __init__(
        self,
        tensor: Tensor,
        tier: DiskTier,
        offset: int,
        size: int,
    ) -> None:
        super().__init__(tensor)
        self.offset, self.size = offset, size  # of its place in the file; it may move
        self.lock = threading.Lock()  # held while it is written, or moves
        self._tier = tier

    def write(self, head: int, start: int, values: Tensor) -> None:
        """Put the bytes into the file; the system writes them to the disk while work goes on."""
        slot = self.tensor.stride(1) * self.tensor.element_size()  # bytes of a slot
        behind = (head * self.tensor.shape[1] + start) * slot
        data = values.detach().to("cpu", self.tensor.dtype).contiguous().view(torch.uint8)
        flat: Any = data.flatten().numpy()
        with self.lock:
            self._tier.put(self.offset + behind, memoryview(flat))


def remove_stale(folder: Path) -> list[Path]:
    """Remove files of ours whose process is gone: nobody holds their lock. What is only called like one stays."""
    gone = []
    for path in list(folder.iterdir()):
        named = _NAMES.fullmatch(path.name)
        if named is None:
            continue
        with contextlib.suppress(OSError):  # another's file, or another was quicker
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_left(handle, int(named[1])):
                    path.unlink()
                    gone.append(path)
            finally:
                os.close(handle)
    return gone


def _is_left(handle: int, process: int) -> bool:
    """Tell whether an open file is this user's, has our mark, and was made by a process that is gone."""
    mark = _mark_of(process)
    there = os.fstat(handle)
    if not stat.S_ISREG(there.st_mode) or there.st_uid != os.geteuid() or os.pread(handle, len(mark), 0) != mark:
        return False
    # Numbers are used again: one that is ours now, of a file that we have not locked, was another's.
    return process == os.getpid() or not is_running(process)


def _mark_of(process: int) -> bytes:
    return f"kvfold disk tier of process {process}\n".encode()


def _create(folder: Path) -> tuple[int, str]:
    """Create a file for its owner only, locked and marked before it gets the name that others look for."""
    handle, draft = tempfile.mkstemp(dir=folder, prefix=f"kvfold-{os.getpid()}-", suffix=_SUFFIX + _NEW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.posix_fallocate(handle, 0, _PAGE)
        os.pwrite(handle, _mark_of(os.getpid()), 0)
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
