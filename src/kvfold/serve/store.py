"""Store: conversations of a server as saved chats in a folder, one file each, named by their owner and their key.

A file is written whole or not at all (hf/snapshot_file.py). One that cannot be read is set aside under another name,
with one line on standard error, and the rest is served. `kvfold chat --load` opens the same files.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvfold.chat.file import read_header
from kvfold.chat.saved import SavedChat
from kvfold.errors import CacheError, FileError, in_one_line
from kvfold.hf import snapshot
from kvfold.hf.saved import SavedCache, refuse_unusable
from kvfold.plan import Plan
from kvfold.serve.held import Held
from kvfold.serve.served import ServedModel

_ENDING = ".kvfold"
_DAMAGED = ".damaged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a conversation lies, and all that its file's name says."""

    path: Path
    owner: str
    key: str
    session: str | None
    size_bytes: int  # of the file


class Store:
    """A folder of saved conversations. Only its owner may read it."""

    def __init__(self, folder: Path, served: ServedModel) -> None:
        """Raises FileError for a folder that cannot be made."""
        self.folder = folder.expanduser()
        self._served = served
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"chats were to be kept in {folder}; {error.strerror}; give another folder") from error

    def write(self, held: Held) -> Place:
        """Write a conversation. Raises FileError if that fails."""
        name = held.key if held.session is None else f"{held.key}.{held.session}"
        path = self.folder / held.owner / f"{name}{_ENDING}"
        with contextlib.suppress(OSError):  # else writing says what is wrong
            path.parent.mkdir(mode=0o700, exist_ok=True)
        saved = SavedChat(
            cache=SavedCache.of(held.cache),
            raw_turns=0,
            stride=None,
            past=held.past,
            generation=self._served.generation,
        )
        saved.write(path, model=self._served.model, ledger=held.cache.ledger())
        size = path.stat().st_size
        return Place(path=path, owner=held.owner, key=held.key, session=held.session, size_bytes=size)

    def read(self, place: Place) -> Held | None:
        """Read a conversation; None, and the file set aside, where that cannot be."""
        try:
            saved = SavedChat.read(place.path, self._served.model)
            # A plan that names files acts by the server's own words: those of the file may be another's.
            given = self._served.plan if Plan.parse(saved.cache.plan).reaches else None
            plan = saved.cache.chosen_plan(place.path, given, positions="kept", trust=False)
            cache = self._served.cache(saved.cache.pinned, plan, saved.cache.least)
            snapshot.put_back(cache, saved.cache.snapshot)
            refuse_unusable(place.path, cache, self._served.model, saved.past.ids[-1])
        except Exception as error:  # whatever is wrong with a file: the rest is served
            set_aside(place.path, error)
            return None
        return Held(
            owner=place.owner,
            session=place.session,
            past=saved.past,
            cache=cache,
            pinned=saved.cache.pinned,
            key=place.key,
        )

    def remove(self, place: Place) -> None:
        """Remove the file of a conversation that another one has taken the place of."""
        with contextlib.suppress(OSError):
            place.path.unlink(missing_ok=True)

    def places(self) -> Iterator[Place]:
        """List what is there, oldest first. Files that are cut short or foreign are set aside."""
        paths = [path for path in self.folder.glob(f"*/*{_ENDING}") if path.is_file()]
        for path in sorted(paths, key=lambda path: path.stat().st_mtime):
            key, _, session = path.name.removesuffix(_ENDING).partition(".")
            try:
                read_header(path)
            except (FileError, CacheError) as error:
                set_aside(path, error)
                continue
            size = path.stat().st_size
            yield Place(path=path, owner=path.parent.name, key=key, session=session or None, size_bytes=size)


def set_aside(path: Path, error: Exception) -> None:
    """Rename a file that cannot be read, and say so in one line."""
    reason = in_one_line(error)
    print(f"kvfold: set aside {path.name}{_DAMAGED}: {reason}", file=sys.stderr)
    with contextlib.suppress(OSError):
        os.replace(path, path.with_name(f"{path.name}{_DAMAGED}"))
