"""What verbs print: results on standard output, progress on standard error.

With `--json`, standard output holds one record per line and nothing else. Tables are drawn by `bench/`; this file
chooses where they go and how progress looks on a terminal or in a log.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from kvfold.bench.report.live import LiveTable, PlainLines
    from kvfold.bench.run.record import Record


# Control characters, and those that turn the direction of a line: a terminal would act on them.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """Write control characters, which come from others' files, as `\\u001b`."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@contextmanager
def progress() -> "Iterator[LiveTable | PlainLines]":
    """A table that fills itself on a terminal, plain lines anywhere else; both on standard error."""
    from rich.console import Console

    from kvfold.bench.report.live import LiveTable, PlainLines

    console = Console(stderr=True)
    if console.is_terminal:
        with LiveTable(console) as watcher:
            yield watcher
    else:
        yield PlainLines(console)


def show_tables(records: "Sequence[Record]") -> None:
    """The tables of some records, as wide as they need to be where nobody watches."""
    from rich.console import Console

    from kvfold.bench.report.live import drawn
    from kvfold.bench.report.tables import tables

    console = Console()
    if not console.is_terminal:
        console = Console(width=250)
    for shown in tables(records):
        console.print(drawn(shown, width=console.width))


def show_lines(records: "Sequence[Record]") -> None:
    """One record per line, as JSON."""
    for record in records:
        typer.echo(record.line())
