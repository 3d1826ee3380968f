"""The private folder of a server without a store: chats that memory has no room for lie there until the server ends.

Its process holds a lock on it, and inside lies a mark of ours. What a killed server has left is removed by the next
one; a folder that is locked, another user's, or without the mark is never touched.
"""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvfold.files import is_running

_PREFIX = "kvfold-serve-"
_NAMES = re.compile(rf"{_PREFIX}(\d{{1,9}})-[a-z0-9_]{{8}}")
_MARK = "kvfold-serve"


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Give a folder that only this user may read; it is gone at the end."""
    remove_left_behind()
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-") as name:
        folder = Path(name)
        handle = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a folder on a network may know no locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / _MARK).touch()
            yield folder
        finally:
            os.close(handle)


def remove_left_behind() -> None:
    """Remove the private folders of servers that were killed."""
    with contextlib.suppress(OSError):  # another's folder of temporary files: making ours says what is wrong
        for path in list(Path(tempfile.gettempdir()).glob(f"{_PREFIX}*")):
            found = _NAMES.fullmatch(path.name)
            if found and not is_running(int(found[1])) and _is_left(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_left(path: Path) -> bool:
    """Tell whether a folder is this user's, has our mark, and is locked by nobody."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(handle).st_uid == os.geteuid() and _MARK in os.listdir(handle)
    except OSError:
        return False
    finally:
        os.close(handle)
