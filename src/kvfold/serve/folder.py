"""The private folder of a server without a store: chats that memory has no room for lie there until the server ends.

Its process holds a lock on it, and inside lies a mark of ours. What a killed server has left is removed by the next
one; a folder that is locked, another user's, or without the mark is never touched.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvfold.files import is_running, locked, names_of_unlocked

_PREFIX = "kvfold-serve-"
_NAMES = re.compile(rf"{_PREFIX}(\d{{1,9}})-[a-z0-9_]{{8}}")
_MARK = "kvfold-serve"


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Give a folder that only this user may read; it is gone at the end."""
    remove_left_behind()
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-") as name:
        folder = Path(name)
        with locked(folder, _MARK):
            yield folder


def remove_left_behind() -> None:
    """Remove the private folders of servers that were killed."""
    with contextlib.suppress(OSError):  # another's folder of temporary files: making ours says what is wrong
        for path in list(Path(tempfile.gettempdir()).glob(f"{_PREFIX}*")):
            found = _NAMES.fullmatch(path.name)
            if found and not is_running(int(found[1])) and _MARK in (names_of_unlocked(path) or ()):
                shutil.rmtree(path, ignore_errors=True)
