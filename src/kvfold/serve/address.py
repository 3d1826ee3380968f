"""The address of a server, taken before its model is loaded: who cannot have it learns so at once, in one line.

Sockets that are bound answer nobody yet. They listen once the model is there.
"""

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any, NoReturn

from kvfold.errors import DataError

_WAITING = 2048  # connections that the system holds until they are taken
_SYSTEM_PORTS = 1024  # below, most systems ask for rights


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Take every address of a host's name; they are free again at the end. Raises DataError where none can be had."""
    with contextlib.ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            _refuse(host, port, error)
        sockets: list[socket.socket] = []
        last: OSError | None = None
        for family, kind, _, _, place in dict.fromkeys(found):
            try:
                one = stack.enter_context(socket.socket(family, kind))
                _bind(one, place)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    _refuse(host, port, error)
                last = error  # a name may have an address that this machine lacks
            else:
                sockets.append(one)
        if last is not None and not sockets:
            _refuse(host, port, last)
        yield sockets


def listen(host: str, port: int, sockets: list[socket.socket]) -> None:
    """Let connections come. Raises DataError where another program was quicker."""
    try:
        for one in sockets:
            one.listen(_WAITING)
    except OSError as error:
        _refuse(host, port, error)


def _bind(one: socket.socket, place: Any) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if one.family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    one.bind(place)


def _refuse(host: str, port: int, error: Exception) -> NoReturn:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        truth, remedy = "another program listens there", "stop that one, or give another --port"
    elif number in (errno.EACCES, errno.EPERM) and port < _SYSTEM_PORTS:
        truth, remedy = f"ports below {_SYSTEM_PORTS} need rights that this user lacks", "give a higher --port"
    else:
        reason = getattr(error, "strerror", None) or str(error)
        truth, remedy = reason[:1].lower() + reason[1:], "give another --host or --port"
    raise DataError(f"a server at {host}:{port} was asked for; {truth}; {remedy}") from error
