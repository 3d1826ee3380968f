"""Malformed, oversized, slow, half-closed and hostile requests at once: nothing breaks, and nothing of others leaks.

KVFOLD_FAULTS=20 sends a thousand, five hundred at once.
"""

import asyncio
import collections
import os
import re
import time

import pytest

from kvfold.serve.connection import BoundedHttp
from serve.conftest import sayer, user
from serve.hostile import Hostile, drawn, sent

SCALE = int(os.environ.get("KVFOLD_FAULTS", "1"))
REQUESTS, AT_ONCE = (150, 75) if SCALE == 1 else (1000, 500)
ANNA, BEN = "anna-token", "ben-token-2"
SECRET = "Zanzibar 4711"
STATED = {200, 400, 401, 403, 404, 405, 408, 413, 415, 429, 503}


@pytest.fixture
def impatient(monkeypatch):
    """Connections that send no head are closed soon."""
    monkeypatch.setattr(BoundedHttp, "head_seconds", 1.0)


def test_hostile_requests_at_once_break_nothing_and_learn_nothing(serving, impatient, capsys):
    with serving(tokens=(ANNA, BEN), body_bytes=20_000, body_seconds=1.0, reply_tokens=8) as one:
        port = int(one.url.rpartition(":")[2])
        talk = [user(f"The code of the door is {SECRET}. Keep it.")]
        before = sayer(one, ANNA)(talk, metadata={"session": "door"})
        answers = asyncio.run(at_once(port, REQUESTS))
        seen = collections.Counter(int(status) for raw in answers for status in re.findall(rb"^HTTP/1.1 (\d+)", raw))
        assert seen.keys() <= STATED
        assert {200, 400, 401, 403, 404, 408} <= seen.keys()
        assert not [raw for raw in answers if b"Zanzibar" in raw or b"Traceback" in raw]
        one.rest()
        assert one.shelf.holdings.promised_bytes == 0
        assert sayer(one, ANNA)(talk).choices == before.choices
    assert "Traceback" not in capsys.readouterr().err


async def at_once(port, count):
    """What each request gets; only so many are on their way at a time."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(seed):
        async with gate:
            return await sent(port, drawn(seed, theirs="door", mine=BEN), seconds=20)

    return await asyncio.gather(*(one(seed) for seed in range(count)))


def test_a_head_that_does_not_come_closes_its_connection(serving, impatient):
    with serving() as one:
        port = int(one.url.rpartition(":")[2])
        for pieces in ((b"",), (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ",)):
            began = time.monotonic()
            assert asyncio.run(sent(port, Hostile(pieces, "plain"), seconds=10)) == b""
            assert time.monotonic() - began < 8, "the server closed it, not the client"
        twice = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert asyncio.run(sent(port, Hostile((twice, b"GET /he"), "slow"), seconds=10)).startswith(b"HTTP/1.1 200")


def test_bodies_that_arrive_together_have_a_bound(serving):
    with serving(body_bytes=20_000, bodies_bytes=30_000, body_seconds=5.0) as one:
        port = int(one.url.rpartition(":")[2])
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        half = Hostile((head + b"Content-Length: 20000\r\n\r\n" + b" " * 15_000,), "plain")

        async def three():
            return await asyncio.gather(*(sent(port, half, seconds=10) for _ in range(3)))

        answers = sorted(raw[9:12] for raw in asyncio.run(three()))
        assert answers == [b"408", b"408", b"429"]
        sayer(one)([user("Hello")])


def test_one_connection_too_many_gets_503(serving):
    with serving(connections=2) as one:
        port = int(one.url.rpartition(":")[2])
        silent = Hostile((b"GET /health HTTP/1.1\r\n",), "plain")
        asking = Hostile((b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",), "plain")

        async def both():
            waiting = [asyncio.create_task(sent(port, silent, seconds=1)) for _ in range(2)]
            await asyncio.sleep(0.3)
            found = await sent(port, asking, seconds=10)
            await asyncio.gather(*waiting)
            return found

        assert asyncio.run(both()).startswith(b"HTTP/1.1 503")
