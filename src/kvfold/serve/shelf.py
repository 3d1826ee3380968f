"""Shelf: all conversations of a server between their turns, in memory or on disk, under one limit of bytes.

A request finds the longest beginning of its messages that is held for the same client. Where memory is short, states
that were kept only for edited turns go first; then whole conversations, those used longest ago first, go to disk and
come back when they are asked for. Several servers may share a store: what one of them has written, the others find when
it is asked for, and nobody relies on a file that is there to stay. It knows no running turn.
"""

from collections.abc import Iterator, Sequence

from kvfold.data import Message
from kvfold.hf.storages import storages_of
from kvfold.serve.held import Held
from kvfold.serve.holdings import Holdings, give_back_freed
from kvfold.serve.index import Entry, Found, Index, Key
from kvfold.serve.store import Place, Store
from kvfold.serve.ticket import Ticket


class Shelf:
    """Conversations by owner and key. It changes with every turn. One thread uses it."""

    def __init__(
        self, store: Store, holdings: Holdings, *, is_durable: bool, is_shared: bool, kept_turns: int, store_bytes: int
    ) -> None:
        """`is_durable` says that a finished turn is written at once; without it, only what must leave memory.

        Of what is on disk the conversations used longest ago go where they would take more than `store_bytes`.
        """
        self.holdings = holdings
        self.moved_to_disk = 0
        self._store, self._is_durable, self._is_shared = store, is_durable, is_shared
        self._kept_turns, self._store_bytes = kept_turns, store_bytes
        self._entries = Index(store.written if is_shared else _nothing)
        self._outdated: list[tuple[Place, Ticket]] = []  # files that go once these tickets are closed
        for place in store.places() if is_durable and not is_shared else ():
            self._entries.put((place.owner, place.key), Entry(place=place, session=place.session))
        self._bound_store()

    # Finding ----------------------------------------------------------------------------------------------------

    def find(self, owner: str, messages: Sequence[Message], session: str | None) -> Found | None:
        """Find what is held of a conversation, and how many of its messages that are. One message at least is new."""
        return self._entries.find(owner, messages, session)

    def open(self, entry: Entry) -> Held | None:
        """Give a conversation for a turn to go on from; None where its file cannot be read: it is found no more then.

        The caller has made room for it. It stays in memory until `close`.
        """
        if entry.held is None:
            assert entry.place is not None, "an entry is in memory or on disk"
            held = self._store.read(entry.place)
            if held is None:
                self._entries.pop((entry.place.owner, entry.place.key))  # what lies on disk may be another model's
                return None
            self._hold(entry, held)
        assert entry.held is not None
        self._entries.note_use((entry.held.owner, entry.held.key))
        entry.users += 1
        return entry.held

    def close(self, entry: Entry) -> None:
        """Say that a turn no longer needs the conversation that it went on from."""
        entry.users -= 1

    # Adding and moving ------------------------------------------------------------------------------------------

    def add(self, held: Held, before: Entry | None, ticket: Ticket) -> None:
        """Put a finished turn on the shelf, on disk too where that is asked for. Raises FileError if that fails.

        The file of the state before it stays until the ticket is closed: a client that never got the reply goes on
        from there.
        """
        place = self._store.write(held) if self._is_durable else None
        self._outdated = [(old, gone) for old, gone in self._outdated if place is None or old.path != place.path]
        key = (held.owner, held.key)
        earlier = None if before is None or before.held is None else (before.held.owner, before.held.key)
        old = self._entries.get(key)
        if old is not None:  # the same text again: the newer one stays
            self._release(old)
            if old.place is not None and (place is None or place.path != old.place.path):
                self._store.remove(old.place)
        entry = Entry(place=place, before=earlier, session=held.session)
        self._entries.put(key, entry)
        self._hold(entry, held)
        if before is not None:
            self._supersede(before, entry, ticket)
        self._bound_store()
        self.make_room(0)

    def remove_outdated(self) -> None:
        """Remove the files of states before turns whose clients have got their replies."""
        waiting = []
        for place, ticket in self._outdated:
            if ticket.is_closed:  # asked once: another thread closes it
                self._store.remove(place)
            else:
                waiting.append((place, ticket))
        self._outdated = waiting

    def make_room(self, wanted_bytes: int) -> bool:
        """Free memory until so many bytes are free; tell whether that succeeded. What cannot succeed moves nothing."""
        in_use = sum(sum(entry.storages.values()) for entry in self._entries.values() if entry.users)
        if wanted_bytes > self.holdings.limit_bytes - self.holdings.promised_bytes - in_use:
            return False
        has_moved = False
        for key, entry in self._leaving():
            if self.holdings.free_bytes >= wanted_bytes:
                break
            self._leave(key, entry)
            has_moved = True
        if has_moved:
            give_back_freed()
        return self.holdings.free_bytes >= wanted_bytes

    @property
    def counts(self) -> tuple[int, int]:
        """Count the conversations in memory, and those that are only on disk."""
        live = [entry for entry in self._entries.values() if not entry.is_superseded]
        inside = sum(entry.held is not None for entry in live)
        return inside, len(live) - inside

    @property
    def full_bytes(self) -> int:
        """Count the bytes that the conversations in memory would take in full."""
        return sum(entry.full_bytes for entry in self._entries.values() if not entry.is_superseded)

    # Inside -----------------------------------------------------------------------------------------------------

    def _leaving(self) -> Iterator[tuple[Key, Entry]]:
        """List what may leave memory, in the order in which it goes."""
        idle = [(key, entry) for key, entry in self._entries.items() if entry.held is not None and not entry.users]
        yield from (pair for pair in idle if pair[1].is_superseded)
        yield from (pair for pair in idle if not pair[1].is_superseded)

    def _leave(self, key: Key, entry: Entry) -> None:
        """Let an entry leave memory: to disk, or away where a newer turn has taken its place."""
        assert entry.held is not None
        if entry.is_superseded:
            self._forget(key)
            return
        if entry.place is None:
            entry.place = self._store.write(entry.held)
        self.moved_to_disk += 1
        self._release(entry)
        if self._is_shared:  # it is looked for there when it is asked for: others may have removed it by then
            self._entries.pop(key)
        self._bound_store()

    def _bound_store(self) -> None:
        """Remove the files of conversations used longest ago, beyond the limit of the store. The newest one stays."""
        if self._is_shared:
            self._store.bound(self._store_bytes)
            return
        on_disk = [(key, entry, entry.place) for key, entry in self._entries.items() if entry.place is not None]
        taken = sum(place.size_bytes for _, _, place in on_disk)
        for key, entry, place in on_disk[:-1]:
            if taken <= self._store_bytes:
                return
            if entry.users:
                continue
            taken -= place.size_bytes
            if entry.held is None:
                self._forget(key)
            else:
                self._store.remove(place)
                entry.place = None

    def _supersede(self, before: Entry, entry: Entry, ticket: Ticket) -> None:
        """Keep the state before a turn for a while, in memory alone, and the newest few of those before it."""
        before.is_superseded = True
        if before.place is not None:
            self._outdated.append((before.place, ticket))
            before.place = None
        older, kept = entry, 0
        while older.before is not None:
            key, following = older.before, self._entries.get(older.before)
            if following is None:
                return
            kept += 1
            if kept > self._kept_turns and following.is_superseded and not following.users:
                self._forget(key)
            older = following

    def _hold(self, entry: Entry, held: Held) -> None:
        entry.held = held
        entry.storages = storages_of(held.cache)
        entry.full_bytes = held.cache.ledger().full_bytes
        self.holdings.add(entry.storages)

    def _release(self, entry: Entry) -> None:
        self.holdings.remove(entry.storages)
        entry.held, entry.storages, entry.full_bytes = None, {}, 0

    def _forget(self, key: Key) -> None:
        entry = self._entries.pop(key)
        self._release(entry)
        if entry.place is not None:
            self._store.remove(entry.place)


def _nothing(owner: str) -> dict[str, Place]:
    """List what others have written to a store that is nobody else's."""
    return {}
