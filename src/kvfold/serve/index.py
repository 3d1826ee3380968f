"""Index: the conversations of a shelf by their keys and by the names that clients gave them.

It knows neither bytes nor files. What other servers have written to a store that they share is found there: those who
make an index say how.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kvfold.data import Message
from kvfold.serve.held import Held, keys_of
from kvfold.serve.store import Place

Key = tuple[str, str]  # of the owner and of the messages
Found = tuple["Entry", int]  # a conversation, and how many of the messages it has


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """A conversation on the shelf. It changes: it moves between memory and disk."""

    session: str | None = None  # a hash of the name that the client gave it
    held: Held | None = None  # in memory
    place: Place | None = None  # on disk; both may be
    before: Key | None = None  # the state before its newest turn
    is_superseded: bool = False  # a newer turn went on from it
    users: int = 0  # running turns that go on from it
    storages: dict[int, int] = field(default_factory=dict)  # in memory, by address
    full_bytes: int = 0  # that it would take in memory, had nothing been folded


class Index:
    """Entries in the order of their use, the oldest first. It changes with every turn."""

    def __init__(self, elsewhere: Callable[[str], Mapping[str, Place]]) -> None:
        """`elsewhere` lists what others have written for an owner, by the keys of the messages."""
        self._elsewhere = elsewhere
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._sessions: dict[str, list[Key]] = {}  # the newest last

    def find(self, owner: str, messages: Sequence[Message], session: str | None) -> Found | None:
        """Find what is held of a conversation, and how many of its messages that are. One message at least is new."""
        found = self._named(owner, messages, session)
        keys = keys_of(messages[:-1])
        for count in range(len(keys), found[1] if found else 0, -1):
            entry = self._entries.get((owner, keys[count - 1]))
            if entry is not None:
                found = (entry, count)
                break
        if found is not None and found[1] == len(keys):
            return found
        written = self._elsewhere(owner)
        for count in range(len(keys), found[1] if found else 0, -1):
            place = written.get(keys[count - 1])
            if place is not None:
                entry = Entry(place=place, session=place.session)
                self.put((owner, place.key), entry)
                return entry, count
        return found

    def get(self, key: Key) -> Entry | None:
        """Give an entry, if there is one."""
        return self._entries.get(key)

    def put(self, key: Key, entry: Entry) -> None:
        """Put an entry behind all others, in place of the one that has its key."""
        if key in self._entries:
            self.pop(key)
        self._entries[key] = entry
        if entry.session is not None:
            self._sessions.setdefault(entry.session, []).append(key)

    def pop(self, key: Key) -> Entry:
        """Take an entry out; a session without entries is forgotten."""
        entry = self._entries.pop(key)
        if entry.session is not None:
            self._sessions[entry.session].remove(key)
            if not self._sessions[entry.session]:
                del self._sessions[entry.session]
        return entry

    def note_use(self, key: Key) -> None:
        """Put an entry behind all others: it is used now."""
        self._entries.move_to_end(key)

    def items(self) -> Iterator[tuple[Key, Entry]]:
        """List what is there now, used longest ago first. The index may change meanwhile."""
        return iter(list(self._entries.items()))

    def values(self) -> Iterator[Entry]:
        """List the entries that are there now."""
        return iter(list(self._entries.values()))

    def _named(self, owner: str, messages: Sequence[Message], session: str | None) -> Found | None:
        """Find the newest conversation of that name in memory; space around messages does not matter."""
        for key in reversed(self._sessions.get(session or "", ())):
            held = self._entries[key].held
            if held is not None and key[0] == owner:
                said = held.past.messages
                if len(said) < len(messages) and _same(said, messages[: len(said)]):
                    return self._entries[key], len(said)
        return None


def _same(said: Sequence[Message], given: Sequence[Message]) -> bool:
    """Tell whether messages differ at most in the space around them: some clients trim it."""
    return all(
        one.role == other.role and one.content.strip() == other.content.strip()
        for one, other in zip(said, given, strict=True)
    )
