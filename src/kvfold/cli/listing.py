"""`kvfold plans` and `kvfold suites`: what can be named on the command line, one line each.

The lines are the first sentences of the files themselves, so a new file is listed without a change here.
"""

import sys
import textwrap
from dataclasses import MISSING, fields
from importlib import import_module
from shutil import get_terminal_size
from typing import Any

import typer

from kvfold.errors import KvfoldError

_QUESTIONS = {"select": "what stays", "encode": "how a slot is stored", "place": "where it lies"}
_BUDGET = ("keep", "tokens", "max_bytes")


def plans() -> None:
    """List the members of plans: what each does, which models it runs with, and its settings."""
    from kvfold.plan import members

    for axis, question in _QUESTIONS.items():
        typer.echo(f"{axis} ({question})")
        for name, kind in members(axis).items():
            _tell(f"  {name:<14} ", f"{_first_sentence(kind)} [{_models(kind)}] {_settings(kind)}".rstrip())
    _tell("", "a plan has one member of each axis at most: snapkv(keep=0.5) + int8; keep= is a fraction of the bytes")


def suites() -> None:
    """List the suites of `kvfold bench`, and what each asks."""
    from kvfold.bench.suites import names

    for name in names():
        words = (import_module(f"kvfold.bench.suites.{name}").__doc__ or "").strip().splitlines()[0]
        _tell(f"{name.replace('_', '-'):<19} ", words.partition(": ")[2] or words)


def _tell(name: str, words: str) -> None:
    """Write a name and what is said of it; a terminal gets lines of its width, a pipe one line."""
    if sys.stdout.isatty():
        width = max(get_terminal_size().columns, 2 * len(name))
        words = textwrap.fill(words, width, initial_indent=name, subsequent_indent=" " * len(name))
    else:
        words = name + words
    typer.echo(words)


def _first_sentence(kind: type) -> str:
    words = (import_module(kind.__module__).__doc__ or "").strip()
    paragraph = " ".join(words.partition("\n\n")[0].split())
    return paragraph.partition(": ")[2].partition(". ")[0].rstrip(".")


def _models(kind: Any) -> str:
    default = next((field.default for field in fields(kind) if field.name == "adapter"), None)
    return "any model" if default is None else "needs an adapter"


def _settings(kind: Any) -> str:
    """Write the settings with what holds where they are left out; one of the budgets must be given."""
    written = [
        field.name if field.default is MISSING else f"{field.name}={field.default!r}"
        for field in fields(kind)
        if field.init and field.name not in (*_BUDGET, "scope")
    ]
    if "keep" not in {field.name for field in fields(kind)}:
        return ", ".join(written)
    try:
        scope = f"scope={kind(keep=0.5).scope!r}"
    except KvfoldError:  # a member without a budget: it keeps everything, or nothing
        return ""
    return ", ".join(["keep= or tokens= or max_bytes=", scope, *written])
