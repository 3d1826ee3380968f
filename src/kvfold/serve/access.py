"""Access: who may ask. Tokens are compared in constant time; each token is a client of its own.

A client is known by a hash of its token, which names its folder in the store; the token itself is written nowhere. A
server without tokens has one client, and answers on this machine alone.
"""

import hmac
from collections.abc import Sequence
from pathlib import Path

from kvfold.errors import DataError, FileError
from kvfold.serve.held import hash_of
from kvfold.serve.refusal import Refusal

ANYONE = "anyone"
_SHORTEST = 8  # characters of a token


def read_tokens(path: Path) -> tuple[str, ...]:
    """Read tokens, one a line; empty lines and those that begin with # say nothing.

    Raises FileError for a file that cannot be read, DataError for one without tokens or with a short one.
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"tokens were to be read from {path}; {error}; give a file with one token a line") from error
    stripped = [line.strip() for line in lines]
    tokens = tuple(line for line in stripped if line and not line.startswith("#"))
    if not tokens or min(map(len, tokens)) < _SHORTEST or not all(token.isascii() for token in tokens):
        raise DataError(
            f"tokens were to be read from {path}; it has {len(tokens)}, and each needs {_SHORTEST} characters of "
            "plain ASCII or more; write one a line"
        )
    return tokens


class Access:
    """The clients of one server."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._owners = {token.encode(): hash_of(token) for token in tokens}

    @property
    def is_open(self) -> bool:
        """Whether no token is asked for."""
        return not self._owners

    def owner(self, authorization: str | None) -> str:
        """Tell whose request it is, by its Authorization header. Raises Refusal for a missing or a wrong token."""
        if self.is_open:
            return ANYONE
        kind, _, given = (authorization or "").partition(" ")
        found = None
        for token, owner in self._owners.items():  # every one is compared, so that time tells nothing
            if hmac.compare_digest(token, given.strip().encode("utf-8", "replace")):
                found = owner
        if kind.lower() != "bearer" or found is None:
            raise Refusal(401, "a request came without a known token; send Authorization: Bearer TOKEN", code="token")
        return found
