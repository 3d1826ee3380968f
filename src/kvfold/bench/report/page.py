"""Records as one page that loads nothing: tables that sort, curves, each method, and what ran where.

The page is plain HTML with its style, script and pictures inside. The words of the tables come from
`tables.py`, the curves from `plot.py`, the frame from `report.html.j2`. It is written whole or not at all.
"""

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias

from kvfold.bench.report import methods, tables
from kvfold.bench.report.overview import overview
from kvfold.bench.report.plot import LOOKS, score_over_bytes
from kvfold.bench.report.retained import retained
from kvfold.bench.report.times import over_context, time_over_context
from kvfold.bench.run.record import Record
from kvfold.errors import FileError

Form: TypeAlias = Literal["tables", "overview", "retained"]

FILE_NAME = "report.html"
_CODE = re.compile(r"`([^`]+)`")
_ADDRESS = re.compile(r"https?://[^\s<>()]+[^\s<>().,;:]")
PLACES = ("plan", "model", "fingerprint", "device", "threads", "dtype", "first token s", "per token s", "wall s", "git")


def _kind(row: tables.Row) -> str:
    if tables.is_full(row.record) or tables.is_none(row.record):
        return "edge"
    return row.standing


def _pictures(draw: Callable[..., str], what: object) -> list[Any]:
    """Draw one thing for a light and for a dark page; the page shows one of the two."""
    from markupsafe import Markup

    pictures = []
    for page in LOOKS:
        drawn = draw(what, page=page)
        pictures.append(Markup(f'<div class="{page}">{drawn}</div>'))
    return pictures


def _block(shown: tables.Table) -> dict:
    from markupsafe import Markup

    heads = [tables.breakable(head) for head in tables.heads(shown)]
    rows = []
    for row in shown.rows:
        cells = [tables.unbroken(cell) for cell in tables.cells(shown, row)]
        rows.append({"kind": _kind(row), "cells": cells})
    return {
        "table": shown,
        "pictures": _pictures(score_over_bytes, shown),
        "heads": list(map(Markup, heads)),
        "rows": rows,
        "notes": tables.notes(shown, is_alone=False),
    }


def breaking(plan: str) -> Any:
    """Write a plan so that it breaks after a bracket or between settings, and nowhere else."""
    from markupsafe import Markup, escape

    text = str(escape(plan))
    return Markup(tables.BREAKS.sub(r"\1<wbr>", text))


def linked(words: str) -> Any:
    """Write a paragraph of a docstring: what stands between backticks as code, addresses as links."""
    from markupsafe import Markup, escape

    text = str(escape(words))
    text = _CODE.sub(r"<code>\1</code>", text)
    text = _ADDRESS.sub(r'<a href="\g<0>">\g<0></a>', text)
    return Markup(text)


def _place(record: Record, versions: Sequence[str]) -> tuple[str, ...]:
    """The cells that say where one record comes from; records of both scopes have a line here."""
    return (
        record.plan,
        record.model,
        record.fingerprint[:12],
        record.device,
        str(record.threads),
        record.dtype,
        *(f"{each:.4f}" if record.failure is None else "" for each in (record.ttft_seconds, record.tpot_seconds)),
        f"{record.wall_seconds:.1f}",
        (record.git or "unknown")[:12],
        *(record.versions.get(name, "") for name in versions),
    )


def html(records: Sequence[Record]) -> str:
    """Write the page as text."""
    from jinja2 import Environment

    source = resources.files("kvfold.bench.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    surroundings = Environment(autoescape=True, trim_blocks=True)
    surroundings.filters |= {"breaking": breaking, "linked": linked}
    page = surroundings.from_string(source)
    versions = sorted({name for record in records for name in record.versions})
    every = tables.tables(records)
    return page.render(
        count=len(records),
        seen=tables.seen_above(every),
        times=[_pictures(time_over_context, curves) for curves in over_context(records)],
        method_heads=methods.HEADS,
        methods=methods.methods(records),
        blocks=[_block(shown) for shown in every],
        places={"heads": (*PLACES, *versions), "rows": [_place(record, versions) for record in records]},
    )


def markdown(records: Sequence[Record], *, form: Form = "tables") -> str:
    """Write a table for each set of samples as Markdown, or one table over all suites."""
    if form == "overview":
        return overview(tables.tables(records))
    if form == "retained":
        return retained(tables.tables(records))
    every = tables.tables(records)
    parts = [tables.markdown(shown, is_alone=False) for shown in every]
    return "\n".join([f"{tables.seen_above(every)}\n", *parts])


BEGIN, END = "<!-- kvfold tables: begin -->", "<!-- kvfold tables: end -->"


def write_into(records: Sequence[Record], path: Path, *, form: Form = "tables") -> Path:
    """Replace the text between the two marks of a Markdown file by the tables. Raises FileError without marks."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(
            f"tables were to go into {path}; it cannot be read ({error.strerror}); give a text file"
        ) from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise FileError(f"tables were to go into {path}; it has no place for them; write {BEGIN} and {END} into it")
    return write_whole(path, f"{before}{BEGIN}\n\n{markdown(records, form=form)}\n{END}{after}")


def write_whole(path: Path, text: str) -> Path:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as sheet:
                sheet.write(text)
            os.chmod(draft, 0o644)
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise
    except OSError as error:
        raise FileError(f"{path} was to be written; {error.strerror}; give a folder that can be written") from None
    return path


def write(records: Sequence[Record], folder: Path) -> Path:
    """Write the page into a folder and return its path."""
    return write_whole(folder / FILE_NAME, html(records))
