"""Chat: one conversation over time, whose history is folded after every turn.

A turn feeds the model only its new tokens and the closing tokens of its reply, however long the history is and however
it was folded. A turn that is not read to its end is undone. This file knows the order of the steps: template.py
renders, hf/ generates, reply.py decodes, the cache folds, saved.py keeps.
"""

import copy
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Unpack

from kvfold.budget.ledger import Ledger
from kvfold.chat.reply import Reply
from kvfold.chat.saved import SavedChat
from kvfold.chat.template import Template
from kvfold.chat.turns import Past, Turn, folded_until
from kvfold.data import Message
from kvfold.errors import CacheError, DataError, KvfoldError, ModelError, PlanError
from kvfold.hf import snapshot
from kvfold.hf.budgets import NewBudget
from kvfold.hf.cache import FoldedCache
from kvfold.hf.generation import Model, Settings, Tokenizer, feed, settings_for, stream
from kvfold.hf.refusals import why_positions_end
from kvfold.hf.saved import SavedCache, refuse_unusable
from kvfold.integers import integer, integer_or_none
from kvfold.memory.forward import Boundaries
from kvfold.memory.rules import Positions
from kvfold.open import LEAST, PLAN, SINKS, cache_with
from kvfold.plan import Plan

_BEGIN = "take another turn"


class Chat:
    """A conversation with a model. It changes with every turn.

    >>> chat = Chat(model, tokenizer, "snapkv(keep=0.2)", system="You answer briefly.")
    >>> for piece in chat.send("Where does Anna live?"):
    ...     print(piece, end="")
    >>> chat.save("anna.kvfold")
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        plan: Plan | str = PLAN,
        *,
        system: str | None = None,
        generation: Settings | Mapping[str, Any] | None = None,
        raw_turns: int = 0,
        stride: int | None = None,
        least: int = LEAST,
        positions: Positions = "kept",
    ) -> None:
        """Begin a conversation.

        The system prompt is pinned: it stays raw in every plan, and so do the newest `raw_turns` turns. With a `stride`
        the chat also folds inside a turn. A fraction leaves `least`; `positions="compact"` knows no last position.
        Replies follow `generation`, or the model's settings. Raises PlanError, BudgetError and ModelError.
        """
        raw_turns = integer("raw_turns", raw_turns, least=0, error=PlanError)
        stride = integer_or_none("stride", stride, least=1, error=PlanError)
        _refuse_both(raw_turns, stride)
        self.model, self.tokenizer = model, tokenizer
        self.raw_turns, self._stride = raw_turns, stride
        self._template = Template(tokenizer, system=system)
        self._closing = self._template.closing()
        self._pinned = max(SINKS, self._template.pinned())
        self.generation = settings_for(model, generation, stop=self._closing.stop)
        # No forward is a prompt here: a chat folds between turns, or by its stride.
        self._cache = cache_with(
            model,
            plan,
            boundaries=Boundaries(prompt=0, stride=stride),
            pinned=self._pinned,
            least=least,
            positions=positions,
            tokenizer=tokenizer,
        )
        self._past = Past(messages=self._template.beginning)
        self._busy = threading.Lock()  # held from the first piece of a reply to the end of its fold

    def __repr__(self) -> str:
        turns = f"{len(self.turns)} turn{'' if len(self.turns) == 1 else 's'}{' and an open one' * self._busy.locked()}"
        return f"<{type(self).__name__} of {turns}, on {self._cache!r}>"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages, system prompt included, as chat templates take them. A copy."""
        return [{"role": message.role, "content": message.content} for message in self._past.messages]

    @property
    def turns(self) -> Sequence[Turn]:
        """The places of the finished turns among the tokens."""
        return self._past.turns

    @property
    def ids(self) -> Sequence[int]:
        """Every token that was fed, in order."""
        return self._past.ids

    @property
    def plan(self) -> Plan:
        """The plan by which the history is folded."""
        return self._cache.plan

    @property
    def cache(self) -> FoldedCache:
        """The cache that holds the history. Feed it only through `send`."""
        return self._cache

    def send(self, text: str) -> Generator[str, None, None]:
        """Send a message; iterate over the pieces of the reply as they come.

        The turn counts once the iterator has ended. If it is closed before, or stopped by an error or Ctrl-C, the turn
        is undone: chat and cache are as before. Before anything is fed, it raises DataError for an empty message and
        ModelError for one that does not fit into the model's positions.
        """
        _refuse_in_turn(self._busy, _BEGIN)
        self._opening(text)  # raises at once, not when the first piece is asked for
        return self._turn(text)

    def reply(self, text: str) -> str:
        """Send a message and give the whole reply. Raises as `send` does."""
        return "".join(self.send(text))

    def fork(self) -> "Chat":
        """Copy the conversation: both go on from the same past, and share the memory of the folded history."""
        _refuse_in_turn(self._busy, "be forked")
        twin = copy.copy(self)
        twin._cache, twin._busy = self._cache.fork(), threading.Lock()
        return twin

    def ledger(self) -> Ledger:
        """Count the slots and bytes of the history as it is now."""
        _refuse_in_turn(self._busy, "say what it holds")
        return self._cache.ledger()

    def rebudget(self, **budget: Unpack[NewBudget]) -> None:
        """Set another budget by `keep`, `tokens` or `max_bytes`, or another `limit_bytes` of the file of a disk tier.

        A lower budget evicts at once, or at the next fold if the method needs queries. Raises BudgetError if the plan
        has nothing of the kind to change, or if the new one cannot hold what is pinned.
        """
        _refuse_in_turn(self._busy, "be given another budget")
        self._cache.rebudget(**budget)

    def save(self, path: str | Path) -> None:
        """Write the conversation, folded as it is, to one file. Raises FileError if it fails; an old file stays."""
        _refuse_in_turn(self._busy, "be saved")
        _as_saved(self).write(Path(path).expanduser(), model=self.model, ledger=self._cache.ledger())

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Model,
        tokenizer: Tokenizer,
        *,
        generation: Settings | Mapping[str, Any] | None = None,
        plan: Plan | str | None = None,
        positions: Positions | None = None,
        trust: bool = False,
    ) -> "Chat":
        """Load a saved conversation, to go on with the model that it was saved with.

        A file whose plan names folders, files or adapters is loaded with `trust`, or by your own `plan` of the same
        members. Raises FileError for a file that is no whole saved chat, CacheError for another model, dtype,
        tokenizer, kind of plan or other `positions`, and for a plan that is not trusted.
        """
        place = Path(path).expanduser()
        saved = SavedChat.read(place, model)
        chosen = saved.cache.chosen_plan(place, plan, positions=positions, trust=trust)
        chat = cls(model, tokenizer, chosen, generation=generation or saved.generation, **saved.settings)
        saved.refuse_other_tokenizer(place, chat._template, pinned=chat._pinned)
        snapshot.put_back(chat._cache, saved.cache.snapshot)
        chat._past = saved.past
        refuse_unusable(place, chat._cache, model, chat.ids[-1] if chat.ids else 0)
        return chat

    # One turn ---------------------------------------------------------------------------------------------------

    def _opening(self, text: str) -> list[int]:
        """Encode what a message adds. Raises for a turn that cannot be."""
        _refuse_no_words(text)
        opening = self._template.opening(self._past.messages, text)
        _refuse_too_long(self._cache, len(opening), self.generation, closing=len(self._closing.ids))
        return opening

    def _turn(self, text: str) -> Generator[str, None, None]:
        # Turns may be begun in threads: one of them takes the chat, and holds it until what it said is folded.
        if not self._busy.acquire(blocking=False):
            raise _in_turn(_BEGIN)
        try:
            yield from self._pieces(text)
            _fold(self._cache, folded_until(self._past.turns, raw=self.raw_turns))
        finally:
            self._busy.release()

    def _pieces(self, text: str) -> Generator[str, None, None]:
        """Give the pieces of a reply; when the last one is taken, the turn counts."""
        opening = self._opening(text)
        before, mark = self._past, self._cache.mark()
        ids = (*before.ids, *opening)
        reply = Reply(self.tokenizer, stop=frozenset(self.generation.eos_token_id or ()), line=self._closing.line)
        pieces: list[str] = []
        try:
            # Ctrl-C may fall between the frames of these generators: the worker must stop before the cache goes back.
            with closing(self._generated(ids, reply)) as tokens:
                for piece in reply.pieces(tokens):
                    if piece:
                        pieces.append(piece)
                        yield piece
            whole = (*ids, *reply.ids, *self._closing.ids)
            # The model has not read the token that it chose last, nor the closing tokens.
            feed(self.model, self._cache, whole[self._cache.memory.fed :])
            said = [Message(role="user", content=text)]
            self._past = before.followed_by(said, "".join(pieces), ids=whole, reply_start=len(ids))
        finally:
            if self._past is before:
                self._cache.restore(mark)

    def _generated(self, ids: Sequence[int], reply: Reply) -> Generator[int, None, None]:
        """Generate the tokens of a reply. Raises CacheError if the model did not use the cache for all of them."""
        count = 0
        with closing(
            stream(self.model, self.tokenizer, self._cache, ids, settings=self.generation, ends=reply.ends_line)
        ) as tokens:
            for token in tokens:
                count += 1
                yield token
        _refuse_bypassed(self._cache.memory.fed, prompt=len(ids), reply=count)


def _refuse_no_words(text: object) -> None:
    if not isinstance(text, str):
        raise DataError(f"a message of {type(text).__name__} was sent; a message is a text; give a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        truth = f"its character {error.start + 1} is half of a pair, which no file holds"
        raise DataError(f"a message was sent; {truth}; read your text as UTF-8") from None
    if not text.strip():
        raise DataError("an empty message was sent; there is nothing to reply to; say something")


def _refuse_in_turn(busy: threading.Lock, asked: str) -> None:
    if busy.locked():
        raise _in_turn(asked)


def _in_turn(asked: str) -> CacheError:
    return CacheError(
        f"a chat was to {asked} in the middle of a turn; its reply is still being read; take the rest of its "
        "pieces, or close the iterator to undo the turn"
    )


def _as_saved(chat: Chat) -> SavedChat:
    """Take everything that a file of this chat holds."""
    return SavedChat(
        cache=SavedCache.of(chat.cache),
        raw_turns=chat.raw_turns,
        stride=chat._stride,
        past=chat._past,
        generation=chat.generation,
    )


def _fold(cache: FoldedCache, until: int) -> None:
    """Fold the history. Where that fails the turn stays, and what was not folded waits for the next fold."""
    try:
        cache.fold(until=until)
    except KvfoldError as error:
        raise type(error)(f"{error} (the turn stays; what it did not fold waits for the next one)") from error


def _refuse_bypassed(fed: int, *, prompt: int, reply: int) -> None:
    if fed != prompt + reply - 1:  # the last token was chosen, but not read yet
        raise CacheError(
            f"a reply of {reply} tokens to {prompt} was generated; the cache was fed {fed} in all, so the "
            "model dropped or bypassed it; use a model that keeps its cache, or shorter conversations"
        )


def _refuse_too_long(cache: FoldedCache, said: int, generation: Settings, *, closing: int) -> None:
    limit, fed, new = cache.lease.text_limit, cache.next_position, generation.max_new_tokens or 0
    longest = fed + said + new + closing
    if limit is not None and longest > limit:
        raise ModelError(
            f"a turn up to token {longest} was asked for ({fed} before it, {said} said, at most {new} in "
            f"reply); the model has {limit} positions; allow a shorter reply by max_new_tokens, or begin a new "
            f"chat: {why_positions_end(cache.positions)}"
        )


def _refuse_both(raw_turns: int, stride: int | None) -> None:
    if raw_turns and stride is not None:
        raise PlanError(
            f"raw_turns={raw_turns} and stride={stride} were asked for; one keeps the newest turns raw, the other "
            "folds inside them; give one of the two"
        )
