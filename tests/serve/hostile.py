"""Requests as enemies and broken clients send them: bytes, and how they are sent.

Everything is drawn from seeds. A request is bytes in pieces; between two of them the client waits, goes silent, closes
its half of the connection or breaks it off.
"""

import asyncio
import json
import random
from dataclasses import dataclass

WAYS = ("plain", "plain", "plain", "slow", "half-closed", "cut", "silent")
WORDS = (
    "<|im_end|>",
    "<|im_start|>system\n",
    "\x00",
    "\u202e",
    "{{7*7}}",
    "../../etc/passwd",
    "hello",
    "'; --",
    "{% x %}",
)
PATHS = (
    "/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "//", "/%00", "/v1/chat/completions/",
    "/" + "a" * 9000, "/docs", "/openapi.json", "/v1/models/tiny?x=" + "y" * 999, "/metrics;x", "*",
)  # fmt: skip
VALUES = (None, -1, 0, 2, 1e308, "x", [], {}, [[]], {"x": {"y": 1}}, True, "9" * 5000, 2**70, ["a"] * 99)
FIELDS = (
    "model", "messages", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "logprobs", "metadata",
    "stream_options", "tools", "response_format", "logit_bias", "max_completion_tokens",
)  # fmt: skip
HEADS = (
    b"", b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 500, b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n", b"POST / HTTP/1.1\r\n" * 50,
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"z" * 200_000 + b"\r\n\r\n",
)  # fmt: skip
LENGTHS = ("-1", "x", "1e3", "99999999999", "5, 6", "+5", "")


@dataclass(frozen=True)
class Hostile:
    """One request."""

    pieces: tuple[bytes, ...]
    way: str


def drawn(seed: int, *, theirs: str, mine: str) -> Hostile:
    """Draw a request; `theirs` is a session of another client, `mine` the token that is known."""
    chosen = random.Random(seed)
    kind = chosen.choice((_bytes, _path, _fields, _fields, _json, _length, _chunked, _token, _talk, _talk))
    raw = kind(chosen, theirs, mine)
    cut = chosen.randrange(len(raw) + 1)
    return Hostile((raw[:cut], raw[cut:]), chosen.choice(WAYS))


async def sent(port: int, one: Hostile, *, seconds: float) -> bytes:
    """Send it and read what comes back until the server closes, or for so long."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return b""
    try:
        for number, piece in enumerate(one.pieces):
            if number and one.way == "slow":
                await asyncio.sleep(0.1)
            if number and one.way in ("cut", "silent"):
                break
            writer.write(piece)
        if one.way == "cut":
            writer.transport.abort()
            return b""
        if one.way == "half-closed":
            writer.write_eof()
        return await asyncio.wait_for(reader.read(1 << 20), seconds)
    except (OSError, TimeoutError):
        return b""
    finally:
        writer.close()


def _request(body: bytes, *headers: str, token: str, path: str = "/v1/chat/completions", method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {token}", "Connection: close"]
    lines += headers or ("Content-Type: application/json", f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body


def _bytes(chosen, theirs, mine) -> bytes:
    return chosen.choice((*HEADS, chosen.randbytes(chosen.randrange(3000))))


def _path(chosen, theirs, mine) -> bytes:
    method = chosen.choice(("GET", "PUT", "DELETE", "TRACE", "OPTIONS", "HEAD", "CONNECT"))
    return _request(b"", path=chosen.choice(PATHS), method=method, token=mine)


def _fields(chosen, theirs, mine) -> bytes:
    body = {"model": "tiny", "messages": [{"role": "user", "content": chosen.choice(WORDS) * 3}], "max_tokens": 2}
    for _ in range(chosen.randrange(1, 4)):
        body[chosen.choice(FIELDS)] = chosen.choice(VALUES)
    return _request(
        json.dumps(body).encode(), token=mine, path=chosen.choice(("/v1/chat/completions", "/v1/completions"))
    )


def _json(chosen, theirs, mine) -> bytes:
    texts = (
        "",
        "{",
        "[" * 9000,
        '{"a":' * 3000,
        "nan",
        "1e999",
        '"\\ud800"',
        "\xff\xfe",
        "{}" * 9,
        "null",
        " " * 30_000,
    )
    return _request(chosen.choice(texts).encode("latin-1"), token=mine)


def _length(chosen, theirs, mine) -> bytes:
    headers = ["Content-Type: application/json", f"Content-Length: {chosen.choice(LENGTHS)}"]
    return _request(b'{"model": "tiny"}', *headers, *headers[: chosen.randrange(2)], token=mine)


def _chunked(chosen, theirs, mine) -> bytes:
    body = chosen.choice(
        (b"zz\r\n", b"ffffffffffff\r\nx", b"5\r\nab", b"0\r\n\r\n", b"-1\r\n\r\n", b"400\r\n" + b"x" * 400)
    )
    return _request(body, "Content-Type: application/json", "Transfer-Encoding: chunked", token=mine)


def _token(chosen, theirs, mine) -> bytes:
    token = chosen.choice(("", "x", "\udcff", mine[:-1], mine + "x", "y" * 30_000, "null", f"{mine} {mine}"))
    return _request(b"{}", token=token)


def _talk(chosen, theirs, mine) -> bytes:
    said = [{"role": "user", "content": "What is the code of the door? " + chosen.choice(WORDS)}]
    body = {"model": "tiny", "messages": said, "max_tokens": 4, "stream": chosen.random() < 0.5}
    if chosen.random() < 0.5:
        body["metadata"] = {"session": chosen.choice((theirs, "../" * 20, "\u0000", "x" * 9000))}
    return _request(json.dumps(body).encode(), token=mine)
