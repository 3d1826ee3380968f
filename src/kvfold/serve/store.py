"""Store: conversations of a server as saved chats in a folder, one file each, named by their owner and their key.

A file is written whole or not at all (hf/snapshot_file.py). One that cannot be read is set aside under another name,
with one line on standard error, and the rest is served. `kvfold chat --load` opens the same files. Equal names mean
equal messages, so it does no harm where two servers write one file.
"""

import contextlib
import math
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvfold.chat.file import read_header
from kvfold.chat.saved import SavedChat
from kvfold.errors import CacheError, FileError, in_one_line
from kvfold.hf import snapshot
from kvfold.hf.saved import SavedCache, is_of, refuse_unusable
from kvfold.plan import Plan
from kvfold.serve.held import Held
from kvfold.serve.served import ServedModel

_ENDING = ".kvfold"
_DAMAGED = ".damaged"
_LOOKS = 50  # at the whole folder, while as much is written as it may hold


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
        self._unlooked_bytes: float = math.inf  # written since the whole folder was looked at
        self._foreign: set[Place] = set()  # files of another model, which are not looked for again
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
        place = _place(path)
        self._foreign.discard(place)
        self._unlooked_bytes += place.size_bytes
        return place

    def read(self, place: Place) -> Held | None:
        """Read a conversation; None where that cannot be. A damaged file is set aside then, another model's stays."""
        if not place.path.exists():
            return None
        try:
            if not is_of(read_header(place.path), self._served.model):
                self._pass_over(place)
                return None
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
        for place in self._listed("*"):
            try:
                read_header(place.path)
            except (FileError, CacheError) as error:
                set_aside(place.path, error)
                continue
            yield place

    def written(self, owner: str) -> dict[str, Place]:
        """List what is there of an owner by the keys of the messages, whoever has written it."""
        return {place.key: place for place in self._listed(owner) if place not in self._foreign}

    def owners_of_sessions(self) -> dict[str, str]:
        """List the names of conversations, as hashes, with their owners; who wrote first comes first."""
        places = self._listed("*")
        return {place.session: place.owner for place in reversed(places) if place.session is not None}

    def bound(self, limit_bytes: int) -> None:
        """Remove what was written longest ago, by whomever, beyond so many bytes. It looks once in a while."""
        if self._unlooked_bytes < limit_bytes / _LOOKS:
            return
        self._unlooked_bytes = 0
        places = self._listed("*")
        taken = sum(place.size_bytes for place in places)
        for place in places[:-1]:
            if taken <= limit_bytes:
                return
            self.remove(place)
            taken -= place.size_bytes

    def _pass_over(self, place: Place) -> None:
        """Leave a sound file to the model that it belongs to, and say so in one line."""
        self._foreign.add(place)
        truth = "it was saved with another model or dtype"
        print(f"kvfold: passed over {place.path.name}: {truth}; its text is read anew", file=sys.stderr)

    def _listed(self, owner: str) -> list[Place]:
        """List the files of an owner, or of all, by when they were written."""
        found = []
        for path in self.folder.glob(f"{owner}/*{_ENDING}"):
            with contextlib.suppress(FileNotFoundError):  # another server has removed it just now
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    found.append((status.st_mtime, _place(path)))
        return [place for _, place in sorted(found, key=lambda pair: pair[0])]


def _place(path: Path) -> Place:
    """Read a file's name and size. Raises FileNotFoundError for one that is gone."""
    key, _, session = path.name.removesuffix(_ENDING).partition(".")
    size = path.stat().st_size
    return Place(path=path, owner=path.parent.name, key=key, session=session or None, size_bytes=size)


def set_aside(path: Path, error: Exception) -> None:
    """Rename a file that cannot be read, and say so in one line."""
    reason = in_one_line(error)
    print(f"kvfold: set aside {path.name}{_DAMAGED}: {reason}", file=sys.stderr)
    with contextlib.suppress(OSError):
        os.replace(path, path.with_name(f"{path.name}{_DAMAGED}"))
