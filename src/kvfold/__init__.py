"""kvfold keeps the key-value cache of a Hugging Face model small, with bytes that are really freed.

Reading order: `plan` (what a method is made of), `memory` (what a layer holds), `attention` (how it is read),
`select`, `encode` and `place` (the three questions), `hf` (the one door to transformers), `chat` (turns over
time), `bench` (what it is worth). Public names are loaded when first used, so importing kvfold imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from kvfold.version import __version__ as __version__

if TYPE_CHECKING:
    from kvfold.bench.advise.advising import advise
    from kvfold.budget.ledger import Ledger
    from kvfold.chat.chat import Chat
    from kvfold.errors import KvfoldError
    from kvfold.hf.captured import captured
    from kvfold.hf.load import load
    from kvfold.open import cache, load_cache
    from kvfold.plan import Plan

__all__ = ["Chat", "KvfoldError", "Ledger", "Plan", "advise", "cache", "captured", "load", "load_cache"]

_HOMES = {
    "Chat": "kvfold.chat.chat",
    "KvfoldError": "kvfold.errors",
    "Ledger": "kvfold.budget.ledger",
    "Plan": "kvfold.plan",
    "advise": "kvfold.bench.advise.advising",
    "cache": "kvfold.open",
    "captured": "kvfold.hf.captured",
    "load": "kvfold.hf.load",
    "load_cache": "kvfold.open",
}


def __getattr__(name: str) -> object:
    """Load a public name from its home the first time it is asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kvfold' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # later look-ups skip this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
