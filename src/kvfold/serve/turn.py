"""RunningTurn: one reply from its prompt to its end, step by step, on a cache of its own.

The cache is a fork of a held conversation, or a new one. So a turn is undone by forgetting it. The scheduler reads the
prompt in pieces, hands over logits, and asks for the end: the closing tokens are fed, the turn is folded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from kvfold.chat.reply import Reply
from kvfold.chat.turns import Past
from kvfold.hf.cache import FoldedCache
from kvfold.hf.generation import feed
from kvfold.serve.held import Held, keys_of
from kvfold.serve.index import Entry
from kvfold.serve.kept import kept_pieces
from kvfold.serve.sampling import Chance, Sampler
from kvfold.serve.served import ServedModel
from kvfold.serve.stops import StopText
from kvfold.serve.ticket import Ended, Piece, Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a turn begins."""

    cache: FoldedCache
    past: Past  # with the messages that the request adds
    pinned: int
    added: tuple[int, ...]  # tokens to be read
    longest: int  # tokens of the reply
    before: Entry | None  # the conversation that the turn goes on from
    promised_bytes: int


class RunningTurn:
    """One reply. It changes with every token."""

    def __init__(self, served: ServedModel, ticket: Ticket, start: Start) -> None:
        self.ticket, self.start, self.cache = ticket, start, start.cache
        self.reason: str | None = None  # why the reply ended
        self.first_seconds: float | None = None  # until the first token, since the request came
        self._served = served
        self._ids = (*start.past.ids, *start.added)
        self._talks = ticket.asked.prompt is None
        closing = served.closing
        stop = frozenset(served.generation.eos_token_id or ())
        line = closing.line and self._talks
        self._reply = Reply(served.tokenizer, stop=stop, line=line, strips=self._talks)
        self._text = StopText(ticket.asked.stops)
        self._sampler = Sampler(ticket.asked.sampling)
        self._chances: list[Chance] = []
        self._tokens = 0
        self._last = 0  # the newest token, which the model has not read
        self._closed: tuple[int, ...] = ()  # all tokens with those that close the reply, once it is over
        self._whole: tuple[int, ...] = ()  # the same, once the turn is folded and they are asked for
        self._after_prompt = None  # the cache as it was before the reply, where a stop string may cut it

    # Steps ------------------------------------------------------------------------------------------------------

    @property
    def unread(self) -> int:
        """Count the tokens of the prompt that are still to be read."""
        return max(len(self._ids) - self.cache.memory.fed, 0)

    @property
    def next_token(self) -> int:
        """The token that the next decoding step feeds."""
        return self._last if self.reason is None else self._closed[self.cache.memory.fed]

    @property
    def is_decoding(self) -> bool:
        """Whether decoding steps go on: for the reply, or for what closes it, which costs little beside other rows."""
        return self.reason is None or self.cache.memory.fed < len(self._closed)

    def read(self, count: int) -> None:
        """Read a piece of the prompt; the last one gives the first token of the reply."""
        fed = self.cache.memory.fed
        logits = feed(self._served.model, self.cache, self._ids[fed : fed + count])
        assert logits is not None, "a turn has something to read"
        if self.unread:
            return
        if self.ticket.asked.stops and self._talks:
            self._after_prompt = self.cache.mark()
        self.take(logits)

    def take(self, logits: Float[Tensor, " vocabulary"]) -> None:
        """Draw the next token of the reply and tell what it completes; nothing once it is over."""
        if self.reason is not None:
            return
        if self.first_seconds is None:
            self.first_seconds = self.ticket.age_seconds
        token, chance = self._sampler.draw(logits)
        self._tokens += 1
        self._last = token
        piece = self._text.add(self._reply.add(token))
        if self._reply.is_over or self._text.is_found:
            self.reason = "stop"
        elif self._tokens >= self.start.longest:
            self.reason = "length"
        if chance is not None and not self._reply.is_over:
            self._chances.append(chance)
        self._tell(piece)
        if self.reason is not None:
            self._end()

    def cut(self) -> None:
        """End the reply where it is: it took too long."""
        self.reason = "length"
        self._end()

    def finish(self) -> Held | None:
        """Feed what is left of what closes the reply, and fold the turn; give the conversation as it is held then."""
        if not self._talks:
            return None
        if self._text.is_found:
            self._cut_back()
        whole = self._closed
        feed(self._served.model, self.cache, whole[self.cache.memory.fed :])
        self._after_prompt = None  # what it keeps alive would lie beside what folding makes
        self.cache.fold()
        before = self.start.past
        past = before.followed_by((), self._text.text, ids=whole, reply_start=len(self._ids))
        asked = self.ticket.asked
        self._whole = whole if asked.wants_kept else ()
        return Held(
            owner=asked.owner,
            session=asked.session,
            past=past,
            cache=self.cache,
            pinned=self.start.pinned,
            key=keys_of(past.messages)[-1],
        )

    @property
    def end(self) -> Ended:
        """Give the last event for the client."""
        ledger = self.cache.ledger()
        kept = {"kept": kept_pieces(self.cache, self._whole, self._decode)} if self._whole else {}
        return Ended(
            reason=self.reason or "length",
            prompt_tokens=len(self._ids),
            cached_tokens=len(self.start.past.ids),
            reply_tokens=self._tokens,
            folded={
                "tokens_seen": ledger.seen,
                "slots_held": ledger.slots // max(ledger.layers * ledger.kv_heads, 1),
                "bytes_held": ledger.stored_bytes + ledger.other_bytes,
                "full_bytes": ledger.full_bytes + ledger.other_bytes,
                **kept,
            },
        )

    # Inside -----------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Tell the rest of the text. What closes the reply is fed by the next steps."""
        self._tell(self._text.add(self._reply.end()))
        self._tell(self._text.rest(), last=True)
        if self._talks and not self._text.is_found:
            self._closed = (*self._ids, *self._reply.ids, *self._served.closing.ids)

    def _cut_back(self) -> None:
        """Go back to where the reply began: a stop string cut it, and what is held is what the client saw."""
        assert self._after_prompt is not None
        self.cache.restore(self._after_prompt)
        messages = self.start.past.messages
        reply = self._served.template(messages).said(messages, self._text.text)
        self._closed = (*self._ids, *reply)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._served.tokenizer.decode(list(ids)))

    def _tell(self, text: str, *, last: bool = False) -> None:
        """Hand over text, with the chances of all tokens since the text before it."""
        if text or (last and self._chances):
            self.ticket.tell(Piece(text=text, chances=tuple(self._chances)))
            self._chances = []
