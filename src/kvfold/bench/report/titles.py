"""The title of a table: its suite and model, and the settings that make its run another than the next.

What shapes a text is always said: how long it is, when the question comes, what it was made from. Other settings are
said only where the tables of one page differ in them. It reads records and knows no tables.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from kvfold.bench.run.record import Record

SAID = ("tokens", "stage", "question", "data")
_FILE = re.compile(r"(\.jsonl)?(\.xz)? [0-9a-f]{12}\b")  # the end of a file's name, and its hash


def title(record: Record, *, fewest: int, also: Iterable[str] = ()) -> str:
    """Write the title of a table by one of its records, its shortest run, and what else is to be said."""
    what = f"{record.suite} {record.suite_version} on {record.model}"
    settings = []
    for name in (*SAID, *also):
        value = record.settings.get(name)
        settings.append(said(name, value))
    shown = ", ".join(filter(None, settings))
    samples = counted(record.n, "sample")
    if fewest != record.n:
        samples = f"{fewest} of {samples}"
    run = f"{record.dtype}, {samples}, seed {record.seed}"
    return f"{what}, {shown} ({run})" if shown else f"{what} ({run})"


def counted(number: int, noun: str) -> str:
    """Write a number and its noun, with an s where it is not one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def said(name: str, value: Any) -> str:
    """Write one setting; nothing where it is not given."""
    if value is None:
        return ""
    match name:
        case "tokens":
            return f"{value:,} tokens"
        case "stage":
            return str(value)
        case "data":
            return _FILE.sub("", str(value))
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    return f"{name} {value}"


def differing(records: Sequence[Record]) -> dict[tuple[str, str], list[str]]:
    """Name, for each suite and model, the settings in which their runs differ, beside those that are always said."""
    values: dict[tuple[str, str], dict[str, set[str]]] = {}
    for record in records:
        of_suite = values.setdefault((record.suite, record.model), {})
        for name, value in record.settings.items():
            seen = of_suite.setdefault(name, set())
            seen.add(str(value))
    found = {}
    for key, settings in values.items():
        several = [name for name, seen in settings.items() if len(seen) > 1]
        found[key] = sorted(set(several) - set(SAID))
    return found
