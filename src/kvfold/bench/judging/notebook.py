"""A file of results that were expensive to get, each under a key, so that none is made twice.

One entry is one line of JSON, written by a single call and flushed to the disk; a line that a kill cut short is passed
over, and the next entry begins on a new line. Entries are only ever added. It knows nothing of what they mean.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kvfold.errors import FileError

_BEGIN = b'{"key": "'  # of every line


def key_of(*parts: Any) -> str:
    """Hash JSON values to a short name that is the same in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@cache  # one object a file, so that threads of this process share its lock
def open_notebook(path: Path) -> "Notebook":
    """Open the notebook in that file, which need not exist yet."""
    return Notebook(path)


class Notebook:
    """Entries by their keys. It changes: `write` adds one, and what other processes add is found as well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._entries: dict[str, Mapping[str, Any]] = {}
        self._read_bytes = 0

    def find(self, key: str) -> Mapping[str, Any] | None:
        """Find an entry by its key; None where there is none. Raises FileError for a file of another kind."""
        with self._lock:
            self._catch_up()
            return self._entries.get(key)

    def values(self, name: str) -> set[Any]:
        """Collect what all entries say under one name."""
        with self._lock:
            self._catch_up()
            return {entry.get(name) for entry in self._entries.values()}

    def write(self, key: str, value: Mapping[str, Any]) -> None:
        """Keep an entry; when this returns, it is on the disk."""
        line = json.dumps({"key": key, **value}, ensure_ascii=False, allow_nan=False) + "\n"
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _append(self.path, line.encode())
            except OSError as error:
                raise FileError(f"{self.path} was to be written; {error.strerror}; what it holds is kept") from None
            self._entries[key] = dict(value)

    def _catch_up(self) -> None:
        """Read what was added to the file since the last look."""
        try:
            size = self.path.stat().st_size
            if size < self._read_bytes:  # it is another file now
                self._entries, self._read_bytes = {}, 0
            if size == self._read_bytes:
                return
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                whole, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        except OSError as error:
            raise FileError(f"{self.path} was asked for; it cannot be read ({error.strerror}); remove it") from None
        self._read_bytes += len(whole) + len(end)
        for line in whole.split(b"\n"):
            if not _BEGIN.startswith(line[: len(_BEGIN)]):
                raise FileError(
                    f"{self.path} was read for what is known already; it is another kind of file; "
                    "remove it or give another folder"
                )
            try:
                entry = json.loads(line)
            except ValueError:  # cut short by a kill
                continue
            self._entries[entry.pop("key")] = entry


def _append(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":  # the last line was cut short
            data = b"\n" + data
        os.write(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)
