"""Scheduler: the one thread that runs the model for all requests.

Each round admits waiting requests, reads a piece of one prompt, and decodes one token of every running reply by one
forward. Pieces are as long as the stall that a reply may suffer allows. Clients take turns; one that went away frees
its row, and its turn is undone by being forgotten.
"""

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from kvfold.hf.batched import BatchedCache
from kvfold.hf.generation import Model
from kvfold.serve.metrics import Metrics
from kvfold.serve.opening import Opener
from kvfold.serve.pace import LONGEST, Pace
from kvfold.serve.refusal import Refusal, refusal_of
from kvfold.serve.served import ServedModel
from kvfold.serve.settings import ServeSettings
from kvfold.serve.shelf import Shelf
from kvfold.serve.ticket import Failed, Ticket
from kvfold.serve.turn import RunningTurn
from kvfold.serve.waiting import Waiting, later

THREAD = "kvfold-serve"  # its name
_PATIENCE_SECONDS = 0.2  # between looks at those who wait while nothing runs


class Scheduler:
    """Runs turns side by side. It changes with every step."""

    def __init__(self, served: ServedModel, shelf: Shelf, settings: ServeSettings, metrics: Metrics) -> None:
        self._served, self._shelf, self._settings, self._metrics = served, shelf, settings, metrics
        self._opener = Opener(served, shelf, settings)
        self._wake = threading.Condition()
        self._waiting = Waiting(settings.queue)
        self._reading: deque[RunningTurn] = deque()
        self._replying: list[RunningTurn] = []
        self._has_changed = True  # whether somebody who waits may fit now
        self._is_stopping = False
        self._pace = Pace()
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the running step; what still runs is undone, and its client gets an error."""
        self._is_stopping = True
        self.look()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, ticket: Ticket) -> None:
        """Queue a request. Raises Refusal where the queue is full or the server stops."""
        with self._wake:
            if self._is_stopping:
                raise Refusal(503, "a request came while the server stops; send it again later", retry_seconds=5)
            self._waiting.put(ticket)
        self.look()

    def look(self) -> None:
        """Go through a round: a request came, or a listener is done."""
        with self._wake:
            self._has_changed = True
            self._wake.notify()

    @property
    def load(self) -> tuple[int, int]:
        """Count the requests that wait, and those that run."""
        return len(self._waiting), len(self._reading) + len(self._replying)

    # The thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait():
            self._round()
        stopped = Refusal(503, "the server stopped; the turn is undone; send it again", retry_seconds=5)
        self._fail_all(stopped)
        for ticket in self._waiting.take_all():
            ticket.tell(Failed(stopped))

    def _round(self) -> None:
        try:
            remove = self._shelf.remove_outdated
            for step in (remove, self._admit, self._drop_gone, self._read, self._decode, self._finish):
                step()
        except Exception as error:  # of the server itself: what runs is undone, and the rest goes on
            self._fail_all(error)
        self._metrics.show(self._shelf, self.load)

    def _fail_all(self, error: Exception) -> None:
        for turn in [*self._reading, *self._replying]:
            self._fail(turn, error)

    def _wait(self) -> bool:
        """Wait until there is something to do; False once the server stops."""
        with self._wake:
            while not (self._is_stopping or self._reading or self._replying or self._has_changed):
                self._wake.wait(_PATIENCE_SECONDS if self._waiting else None)
                if self._waiting:  # somebody may have waited for too long, or gone away
                    break
            return not self._is_stopping

    def _admit(self) -> None:
        """Begin the turns that fit, one of each client after the other."""
        self._refuse_late()
        if not self._has_changed:
            return
        self._has_changed = False
        owners = self._waiting.owners()
        blocked = 0
        while owners and blocked < len(owners):
            if len(self._reading) + len(self._replying) >= self._settings.rows:
                self._has_changed = True
                return
            owner = owners.pop(0)
            blocked = 0 if self._begin_one(owner) else blocked + 1
            owners += [] if self._waiting.head(owner) is None else [owner]

    def _begin_one(self, owner: str) -> bool:
        """Begin the next turn of a client; tell whether its queue has moved."""
        ticket = self._waiting.head(owner)
        if ticket is None:
            return False
        try:
            turn = self._opener.open(ticket)
        except Exception as error:
            self._refuse(ticket, error)
        else:
            if turn is None:
                return False
            self._reading.append(turn)
        self._waiting.take(owner)
        return True

    def _refuse_late(self) -> None:
        """Take away those who have gone, and send away those who have waited for too long."""
        for ticket in self._waiting.take_gone(self._settings.wait_seconds):
            self._refuse(ticket, later(f"the request waited for {ticket.age_seconds:.0f} seconds; there was no room"))

    def _drop_gone(self) -> None:
        for turn in [*self._reading, *self._replying]:
            if turn.ticket.is_cancelled:
                self._forget(turn)
                self._metrics.ended("gone")
            elif turn.reason is None and turn.ticket.age_seconds > self._settings.turn_seconds:
                if turn.unread:
                    self._fail(turn, later("the time of a turn was over before its prompt was read"))
                else:
                    turn.cut()

    def _read(self) -> None:
        """Read a piece of the prompt whose turn it is."""
        if not self._reading:
            return
        turn = self._reading[0]
        # Running replies wait for this piece.
        most = self._pace.piece(self._settings.stall_seconds) if self._replying else LONGEST
        count = min(most, turn.unread)
        began = time.monotonic()
        try:
            turn.read(count)
        except Exception as error:
            self._fail(turn, error)
            return
        self._pace.note(count, time.monotonic() - began)
        self._metrics.read(count)
        self._reading.popleft()
        if turn.unread:
            self._reading.append(turn)
        else:
            self._replying.append(turn)
            self._metrics.first(turn.first_seconds or 0.0)

    def _decode(self) -> None:
        """Decode one token of every reply that goes on or is being closed."""
        rows = [turn for turn in self._replying if turn.is_decoding]
        if not rows:
            return
        began = time.monotonic()
        for turn, found in zip(rows, _step(self._served.model, rows), strict=True):
            try:
                turn.take(_logits(found))
            except Exception as error:
                self._fail(turn, error)
        self._metrics.decoded(len(rows), time.monotonic() - began)

    def _finish(self) -> None:
        """End the replies that are over: fold, count, write, and only then tell the client."""
        for turn in [turn for turn in self._replying if not turn.is_decoding]:
            try:
                held = turn.finish()
                end = turn.end
                self._forget(turn)
                if held is not None:
                    self._shelf.add(held, turn.start.before, turn.ticket)
            except Exception as error:
                self._fail(turn, error)
                continue
            self._metrics.ended(end.reason, tokens=end.reply_tokens, cached=end.cached_tokens)
            self._metrics.show_chats(self._shelf)
            turn.ticket.tell(end)

    def _forget(self, turn: RunningTurn) -> None:
        """Take a turn out: what it goes on from is as it was."""
        if turn in self._reading:
            self._reading.remove(turn)
        elif turn in self._replying:
            self._replying.remove(turn)
        else:  # it is out already
            return
        self._shelf.holdings.promised_bytes -= turn.start.promised_bytes
        if turn.start.before is not None:
            self._shelf.close(turn.start.before)
        self._has_changed = True

    def _fail(self, turn: RunningTurn, error: Exception) -> None:
        self._forget(turn)
        self._refuse(turn.ticket, error)

    def _refuse(self, ticket: Ticket, error: Exception) -> None:
        refusal = refusal_of(error)
        if refusal.status == 500:
            traceback.print_exception(error, file=sys.stderr)
        self._metrics.ended(f"refused {refusal.status}")
        ticket.tell(Failed(refusal))


def _step(model: Model, rows: Sequence[RunningTurn]) -> list[Tensor | Exception]:
    """Decode one token of each row; give the logits after it, or the error that the row itself causes."""
    batch = BatchedCache([turn.cache for turn in rows])
    try:
        return list(batch.decode(model, [turn.next_token for turn in rows]))
    except Exception as error:  # it is undone in every row: whose is it?
        return [error] if len(rows) == 1 else [_step(model, [turn])[0] for turn in rows]


def _logits(found: Tensor | Exception) -> Tensor:
    if isinstance(found, Exception):
        raise found
    return found
