"""`kvfold report DIR...`: the records of one or many runs as one page, as Markdown, or as lines of JSON.

It merges: of the same work in two folders, the one named later counts. Nothing is run and no model is loaded.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvfold.cli.printing import show_lines, show_tables

if TYPE_CHECKING:
    from kvfold.bench.run.record import Record

FOLDER = Path("kvfold-report")


def report(
    places: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that `kvfold bench` wrote.")],
    out: Annotated[Path, typer.Option(help="The folder for report.html.")] = FOLDER,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown. No file is written.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the merged records. No file is written.")] = False,
    into: Annotated[
        Path | None,
        typer.Option(help="Renew the tables between the marks of this Markdown file. Nothing else is written."),
    ] = None,
    overview: Annotated[
        bool, typer.Option("--overview", help="With Markdown: one table, a row for each plan, a column for each suite.")
    ] = False,
    retained: Annotated[
        bool,
        typer.Option("--retained", help="With Markdown: one table of what each plan retains of the gain by history."),
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="Write the first picture as SVG: time, or score.")] = None,
    dark: Annotated[bool, typer.Option("--dark", help="With a picture: in colours for a dark page.")] = False,
) -> None:
    """Make one page from the records of one or many runs: tables, curves, and what ran where."""
    from kvfold.bench.report import page as pages
    from kvfold.bench.run import journal

    records = journal.gather(places)
    form: pages.Form = "retained" if retained else "overview" if overview else "tables"
    if json:
        show_lines(records)
    elif markdown or (form != "tables" and into is None):
        typer.echo(pages.markdown(records, form=form), nl=False)
    elif into is not None:
        typer.echo(pages.write_into(records, into, form=form))
    elif picture is not None:
        drawn = _picture(records, "dark" if dark else "light")
        typer.echo(pages.write_whole(picture, drawn))
    else:
        written = pages.write(records, out)  # first: a pipe that closes early takes no page away
        show_tables(records)
        typer.echo(f"written: {written}")


def _picture(records: "list[Record]", page: str) -> str:
    """Draw time over context where records have several lengths, and else the score of their first table."""
    from kvfold.bench.report import plot, tables, times

    over = times.over_context(records)
    if over:
        return times.time_over_context(over[0], page=page)
    return plot.score_over_bytes(tables.tables(records)[0], page=page)
