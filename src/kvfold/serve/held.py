"""Held: a conversation between two turns, as a server holds it; and the keys by which conversations are found.

A held conversation is never fed again: its next turn feeds a fork of its cache, which shares what is folded. So a turn
that fails leaves it as it was, and an edited turn goes on from the state before it. Keys are hashes of all messages so
far: equal keys, equal text.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.chat.turns import Past
from kvfold.data import Message
from kvfold.hf.cache import FoldedCache


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """A conversation whose last turn is finished."""

    owner: str  # the client's
    session: str | None  # a hash of the name that the client gave it
    past: Past
    cache: FoldedCache
    pinned: int  # tokens of the system prompt, never folded
    key: str  # of its messages


def keys_of(messages: Sequence[Message]) -> list[str]:
    """Give the key of every beginning of a conversation, the whole one last."""
    keys = []
    before = ""
    for message in messages:
        plain = json.dumps([before, message.role, message.content])
        before = hashlib.sha256(plain.encode()).hexdigest()[:32]
        keys.append(before)
    return keys


def hash_of(name: str) -> str:
    """Give a name as a file may carry it."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]
