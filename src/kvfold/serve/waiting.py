"""Waiting: requests that have not begun, a queue for each client, so that none of them crowds the others out.

Many threads put requests in; the scheduler's thread takes them out.
"""

import threading
from collections import OrderedDict, deque

from kvfold.serve.refusal import Refusal
from kvfold.serve.ticket import Ticket


class Waiting:
    """The queues of one server. They change with every request."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._queues: OrderedDict[str, deque[Ticket]] = OrderedDict()  # by client, who is next first

    def __len__(self) -> int:
        with self._lock:
            return self._count()

    def put(self, ticket: Ticket) -> None:
        """Queue a request. Raises Refusal where the queue is full."""
        with self._lock:
            if self._count() >= self._limit:
                raise later(f"{self._limit} requests wait already; the queue is full")
            self._queues.setdefault(ticket.asked.owner, deque()).append(ticket)

    def owners(self) -> list[str]:
        """List the clients that wait, who is next first."""
        with self._lock:
            return list(self._queues)

    def head(self, owner: str) -> Ticket | None:
        """Give the oldest request of a client, which stays in the queue."""
        with self._lock:
            queue = self._queues.get(owner)
            return queue[0] if queue else None

    def take(self, owner: str) -> None:
        """Take the oldest request of a client out; the others come before its next one."""
        with self._lock:
            self._queues[owner].popleft()
            self._queues.move_to_end(owner)
            self._drop_empty()

    def take_gone(self, wait_seconds: float) -> list[Ticket]:
        """Take out the requests that nobody listens to, and those that have waited for too long; give the latter."""
        late = []
        with self._lock:
            for queue in self._queues.values():
                for ticket in list(queue):
                    is_late = ticket.age_seconds > wait_seconds
                    if is_late or ticket.is_cancelled:
                        queue.remove(ticket)
                    if is_late and not ticket.is_cancelled:
                        late.append(ticket)
            self._drop_empty()
        return late

    def take_all(self) -> list[Ticket]:
        """Take every request out."""
        with self._lock:
            left = [ticket for queue in self._queues.values() for ticket in queue]
            self._queues.clear()
        return left

    def _count(self) -> int:
        return sum(map(len, self._queues.values()))

    def _drop_empty(self) -> None:
        for owner in [owner for owner, queue in self._queues.items() if not queue]:
            del self._queues[owner]


def later(message: str) -> Refusal:
    """Refuse for now."""
    return Refusal(429, f"{message}; send the request again later", code="busy", retry_seconds=5)
