"""Refusal: a request that is not answered, with its status and in the form of OpenAI's errors.

Whatever the library refuses (KvfoldError) becomes a refusal of status 400: the one line says what was asked, what is
true and what to do. Errors of our own become a 500 that tells nothing of the inside.
"""

import sys
from typing import Any

from kvfold.errors import FileError, KvfoldError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class Refusal(KvfoldError):
    """A request that is refused. It may say after how many seconds to come again."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_seconds = status, code, param, retry_seconds

    @property
    def body(self) -> dict[str, Any]:
        """The answer's body."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """The answer's headers."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_seconds is None else {"Retry-After": str(self.retry_seconds)}


def refusal_of(error: Exception) -> Refusal:
    """Give the refusal that an error becomes."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, FileError):  # its line names places of this machine
        print("kvfold:", " ".join(str(error).split()), file=sys.stderr)
        return Refusal(503, "a chat could not be written to disk; the turn is undone; the server's log says why")
    if isinstance(error, KvfoldError):
        return Refusal(400, " ".join(str(error).split()), code="refused")
    return Refusal(500, "an error of the server's own ended this request; its log has it", code="internal_error")
