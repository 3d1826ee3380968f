"""Opening of a turn: the conversation that it goes on from, the tokens that it adds, and the room that it may need.

A request is matched to what is held of its client; only what follows is encoded and read. Where what is held leaves no
room for its own turn, the whole text is read anew. What cannot be read at all is refused, what does not fit at the
moment waits. Nothing is fed here.
"""

from dataclasses import dataclass

from kvfold.chat.template import Template
from kvfold.chat.turns import Past
from kvfold.data import Message
from kvfold.errors import ModelError
from kvfold.serve.index import Entry
from kvfold.serve.refusal import Refusal
from kvfold.serve.served import ServedModel
from kvfold.serve.settings import ServeSettings
from kvfold.serve.shelf import Shelf
from kvfold.serve.ticket import Ticket
from kvfold.serve.turn import RunningTurn, Start

_CHARACTERS = 40  # of a token, at most: a longer text is refused before it is encoded
_LARGE_TEXT = 1 << 20  # tokens, for models without a limit


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What is held of a request's conversation."""

    entry: Entry
    messages: tuple[Message, ...]  # as they are held
    new: tuple[Message, ...]
    added: tuple[int, ...]


class Opener:
    """Opens turns on the conversations of a shelf."""

    def __init__(self, served: ServedModel, shelf: Shelf, settings: ServeSettings) -> None:
        self._served, self._shelf, self._settings = served, shelf, settings
        self._limit = served.text_limit or _LARGE_TEXT

    def open(self, ticket: Ticket) -> RunningTurn | None:
        """Open a turn; None where there is no room for it yet. Raises Refusal for what will never fit."""
        asked = ticket.asked
        texts = [message.content for message in asked.messages] + [asked.prompt or ""]
        if sum(map(len, texts)) > _CHARACTERS * self._limit:
            raise self._too_long("more")
        return self._complete(ticket) if asked.prompt is not None else self._talk(ticket)

    def _complete(self, ticket: Ticket) -> RunningTurn | None:
        ids = tuple(self._served.tokenizer.encode(ticket.asked.prompt or ""))
        if not ids:
            raise Refusal(400, "an empty prompt was given; there is nothing to go on from; say something")
        longest = self._longest(ticket, len(ids))
        need = self._bytes(len(ids) + longest)
        if not self._fits(need):
            return None
        cache = self._served.cache(1)
        return self._begin(ticket, Start(
            cache=cache, past=Past(messages=()), pinned=1, added=ids, longest=longest, before=None, promised_bytes=need
        ))  # fmt: skip

    def _talk(self, ticket: Ticket) -> RunningTurn | None:
        template = self._served.template(ticket.asked.messages)
        found = self._found(ticket, template)
        if found is None:
            return self._read_anew(ticket, template)
        try:
            return self._go_on(ticket, found)
        except Refusal:  # what is held and its turn do not fit side by side: the text alone may
            return self._read_anew(ticket, template)

    def _read_anew(self, ticket: Ticket, template: Template) -> RunningTurn | None:
        """Open a turn that reads the whole text."""
        messages = ticket.asked.messages
        added = tuple(template.added((), messages))
        longest = self._longest(ticket, len(added))
        need = self._bytes(len(added) + longest + len(self._served.closing.ids))
        if not self._fits(need):
            return None
        pinned = self._served.pinned(template)
        return self._begin(ticket, Start(
            cache=self._served.cache(pinned), past=Past(messages=messages), pinned=pinned, added=added, longest=longest,
            before=None, promised_bytes=need,
        ))  # fmt: skip

    def _go_on(self, ticket: Ticket, found: _Found) -> RunningTurn | None:
        """Open a turn on what is held. Raises Refusal where that and the turn will never fit side by side."""
        entry = found.entry
        known = 0 if entry.held is None else len(entry.held.past.ids)
        longest = self._longest(ticket, known + len(found.added))
        new = self._bytes(len(found.added) + longest + len(self._served.closing.ids))
        entry.users += 1  # room is made beside it: it must not be what leaves
        try:
            if not self._fits(new + _copied(entry), beside=_in_memory(entry)):
                return None
            held = self._shelf.open(entry)
        finally:
            entry.users -= 1
        if held is None:  # its file cannot be read: now it is no longer found
            return self._talk(ticket)
        try:
            longest = self._longest(ticket, len(held.past.ids) + len(found.added))
        except Refusal:
            self._shelf.close(entry)
            raise
        return self._begin(ticket, Start(
            cache=held.cache.fork(),
            past=Past(messages=(*found.messages, *found.new), ids=held.past.ids, turns=held.past.turns),
            pinned=held.pinned,
            added=found.added,
            longest=longest,
            before=entry,
            promised_bytes=new + _copied(entry),  # what was wanted for reading a file is held now
        ))  # fmt: skip

    def _found(self, ticket: Ticket, template: Template) -> _Found | None:
        """Find the longest beginning that is held and that the template only adds to."""
        asked = ticket.asked
        found = self._shelf.find(asked.owner, asked.messages, asked.session)
        if found is None:
            return None
        entry, count = found
        messages = asked.messages[:count] if entry.held is None else entry.held.past.messages
        new = asked.messages[count:]
        try:
            added = tuple(template.added(messages, new))
        except ModelError:  # this template writes old messages differently now: the text is read anew
            return None
        return _Found(entry=entry, messages=messages, new=new, added=added)

    def _begin(self, ticket: Ticket, start: Start) -> RunningTurn:
        self._shelf.holdings.promised_bytes += start.promised_bytes
        return RunningTurn(self._served, ticket, start)

    def _longest(self, ticket: Ticket, prompt_tokens: int) -> int:
        """How many tokens the reply may have. Raises Refusal where the prompt leaves no room for one."""
        room = self._limit - prompt_tokens - len(self._served.closing.ids)
        if room < 1:
            raise self._too_long(str(prompt_tokens))
        return min(ticket.asked.longest or self._settings.reply_tokens, self._settings.reply_tokens, room)

    def _too_long(self, tokens: str) -> Refusal:
        truth = f"the model has {self._limit} positions for text and reply; folding saves memory, not positions"
        message = f"{tokens} tokens were given; {truth}; shorten the conversation"
        return Refusal(400, message, code="context_length_exceeded", param="messages")

    def _bytes(self, tokens: int) -> int:
        """Bytes of raw tokens, with the eighth by which their buffers grow ahead."""
        return tokens * self._served.token_bytes * 9 // 8

    def _fits(self, need: int, *, beside: int = 0) -> bool:
        """Make room. Raises Refusal where a memory that holds only what is `beside` it has none."""
        limit = self._shelf.holdings.limit_bytes
        if need + beside > limit:
            truth = f"all chats together have {limit}"
            message = f"a turn that may need {need} bytes was asked for; {truth}; allow a shorter reply, or say less"
            raise Refusal(400, message, code="memory_exceeded", param="messages")
        return self._shelf.make_room(need)


def _in_memory(entry: Entry) -> int:
    return sum(entry.storages.values())


def _copied(entry: Entry) -> int:
    """Bytes that may be written anew when the turn is folded: those of the conversation before it."""
    if entry.held is None:
        assert entry.place is not None, "an entry is in memory or on disk"
        return 2 * entry.place.size_bytes  # it is read into memory first
    return _in_memory(entry)
