"""Sessions: whose a named conversation is. A name belongs to the client that used it first.

Names are hashed before they come here. What is on disk keeps its owner over a restart. Many threads may ask.
"""

import threading
from collections import OrderedDict

from kvfold.serve.refusal import Refusal

_MOST = 100_000  # names; those used longest ago are forgotten first


class Sessions:
    """Owners of names. It changes: names are claimed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: OrderedDict[str, str] = OrderedDict()

    def claim(self, session: str, owner: str) -> str:
        """Give the name to a client, if nobody else has it. Raises Refusal if somebody has."""
        with self._lock:
            if self._owners.setdefault(session, owner) != owner:
                message = "a conversation of that name is another client's; choose another name"
                raise Refusal(403, message, code="session_not_yours", param="metadata.session")
            self._owners.move_to_end(session)
            if len(self._owners) > _MOST:
                self._owners.popitem(last=False)
        return session
