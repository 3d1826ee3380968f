"""Files that are written whole or not at all, and what is left of those whose process was killed.

A file is drafted in a folder beside its place and then renamed. That folder's name has the process that writes it,
which holds a lock on it, and inside lies a mark of ours. The next draft beside it removes what processes that are gone
have left. What is only called like a draft, or has anything else in it, is never touched.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvfold.errors import FileError

_DRAFTS = re.compile(r"\..+\.kvfold-(\d{1,9})-[a-z0-9_]{8}\.part")
_MARK, _DRAFT = "kvfold-draft", "draft"
_TEMPORARY = ".tmp"  # begins the names under which safetensors writes
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # of fallocate(2)
_LONGEST_NAME = 100  # bytes of a name that a draft's folder takes over: names have at most 255


def home() -> Path:
    """The folder for files that can be made again: KVFOLD_HOME, or kvfold in the user's cache folder."""
    if given := os.environ.get("KVFOLD_HOME"):
        return Path(given).expanduser().absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "kvfold"


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Give a place for a draft on the same disk, to be put at `path`. It is gone afterwards unless it was."""
    remove_leftovers(path.parent)
    name = path.name.encode(errors="ignore")[:_LONGEST_NAME].decode(errors="ignore")
    prefix = f".{name}.kvfold-{os.getpid()}-"
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix, suffix=".part"))
    try:
        with locked(folder, _MARK):
            yield folder / _DRAFT
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(folder: Path, mark: str) -> Iterator[None]:
    """Hold a lock on a folder of ours, and put a mark into it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a folder on a network may know no locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / mark).touch()
        yield
    finally:
        os.close(handle)


def put_in_place(draft: Path, path: Path) -> None:
    """Write a draft through to the disk, and give it the name that it is for."""
    flush(draft)
    os.replace(draft, path)
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    with draft_of(path) as draft:
        draft.write_text(text, encoding="utf-8")
        put_in_place(draft, path)


def flush(path: Path) -> None:
    """Write a file's bytes, or a folder's entries, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def give_back_room(handle: int, offset: int, size: int) -> bool:
    """Give a stretch of an open file back to the disk: it takes no room then, and reads as zeros.

    False where the system cannot do that.
    """
    punch = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if punch is None:
        return False
    place = (ctypes.c_longlong(offset), ctypes.c_longlong(size))
    return punch(handle, _PUNCH_HOLE | _KEEP_SIZE, *place) == 0


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove drafts of ours whose process is gone."""
    gone = []
    with contextlib.suppress(OSError):  # another's folder: whoever writes into it will say so
        for path in list(folder.iterdir()):
            found = _DRAFTS.fullmatch(path.name)
            if found and not is_running(int(found[1])) and _is_left(path):
                shutil.rmtree(path, ignore_errors=True)
                gone.append(path)
    return gone


def is_running(process: int) -> bool:
    """Tell whether a process of this number is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another's
        return True
    return True


def refuse_special(path: Path, what: str) -> None:
    """Raise FileError for all but a regular file that can be looked at: a pipe would be waited for without end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"{str(path)!r:.300} was to be read; {reason.lower()}; give the path of {what}") from None
    if stat.S_ISDIR(mode):
        raise FileError(f"{path} was to be read; it is a directory; give the path of {what}")
    if not stat.S_ISREG(mode):
        raise FileError(f"{path} was to be read; it is a pipe or a device, no regular file; give the path of {what}")


def names_of_unlocked(path: Path) -> set[str] | None:
    """List what lies in a folder of this user that nobody has locked; None for any other."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return set(os.listdir(handle)) if os.fstat(handle).st_uid == os.geteuid() else None
    except OSError:
        return None
    finally:
        os.close(handle)


def _is_left(path: Path) -> bool:
    """Tell whether a draft's folder is this user's, locked by nobody, and holds nothing but what we put there."""
    names = names_of_unlocked(path)
    if names is None:
        return False
    others = {name for name in names - {_MARK, _DRAFT} if not name.startswith(_TEMPORARY)}
    return not others and (not names or _MARK in names)
