"""Progress while a suite runs: a table that fills itself on a terminal, plain lines anywhere else.

Everything here goes to the console that it is given, standard error in the command line, so that standard output
holds results only. It knows jobs, outcomes and records; it keeps none of them.
"""

from collections.abc import Sequence
from statistics import fmean

from rich.console import Console
from rich.live import Live
from rich.table import Table as Grid

from kvfold.bench.report.tables import AGAINST_RIVAL, Table, cells, heads, notes
from kvfold.bench.run.job import Job
from kvfold.bench.run.record import Record
from kvfold.bench.suite import Outcome

COLUMNS = ("plan", "samples", "score so far", "kept", "time")


class PlainLines:
    """For logs and pipes: a line when a plan starts and one when it is done."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, job: Job, n: int, prediction: str) -> None:
        """Say what starts, and what is expected of it."""
        said = f"; {prediction}" if prediction else ""
        self._console.print(f"{job.plan}: {n} samples{said}", highlight=False, soft_wrap=True)

    def outcomes(self, job: Job, so_far: Sequence[Outcome]) -> None:
        """Say nothing: a log is read afterwards."""

    def finish(self, job: Job, record: Record) -> None:
        """Say what came out."""
        if record.failure is not None:
            self._console.print(f"{job.plan}: failed, {record.failure}", highlight=False, soft_wrap=True)
            return
        line = f"{job.plan}: score {record.score:.3f}, kept {record.stored:.3f}, {record.wall_seconds:.1f} s"
        self._console.print(line, highlight=False, soft_wrap=True)


class LiveTable:
    """For terminals: one row per plan, redrawn as outcomes come in. It changes while it is entered."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=4)
        self._rows: dict[Job, tuple[str, ...]] = {}
        self._wanted = 0

    def __enter__(self) -> "LiveTable":
        self._live.__enter__()
        return self

    def __exit__(self, *problem: object) -> None:
        self._live.__exit__(None, None, None)

    def begin(self, job: Job, n: int, prediction: str) -> None:
        """Open a row; what is expected of it stands above the table."""
        self._wanted = n
        if prediction:
            self._live.console.print(f"{job.plan}: {prediction}", highlight=False)
        self._show(job, (job.plan, f"0/{n}", "", "", ""))

    def outcomes(self, job: Job, so_far: Sequence[Outcome]) -> None:
        """Fill the row with what is known so far."""
        score, kept = fmean(o.score for o in so_far), fmean(o.stored for o in so_far)
        self._show(job, (job.plan, f"{len(so_far)}/{self._wanted}", f"{score:.3f}", f"{kept:.3f}", ""))

    def finish(self, job: Job, record: Record) -> None:
        """Close the row."""
        done = f"{record.n}/{record.n}"
        words = (job.plan, done, f"{record.score:.3f}", f"{record.stored:.3f}", f"{record.wall_seconds:.1f} s")
        self._show(job, words if record.failure is None else (job.plan, "failed", record.failure, "", ""))

    def _show(self, job: Job, words: tuple[str, ...]) -> None:
        self._rows[job] = words
        grid = Grid(*COLUMNS)
        for row in self._rows.values():
            grid.add_row(*row)
        self._live.update(grid, refresh=True)


def drawn(shown: Table, *, width: int | None = None) -> Grid:
    """A finished table for a terminal; where that is narrower than the table, some columns are left out by name."""
    rows = [cells(shown, row) for row in shown.rows]
    left_out = [] if width is None else _left_out(shown, rows, width)
    lines = notes(shown)
    if left_out:
        lines.append(f"no room here for {', '.join(left_out)}; a wider terminal, --json and the page have them")
    grid = Grid(title=shown.title, title_justify="left", caption="\n".join(lines), caption_justify="left")
    chosen = [number for number, head in enumerate(heads(shown)) if head not in left_out]
    for number in chosen:
        grid.add_column(
            heads(shown)[number], justify="right" if number else "left", no_wrap=number > 0, overflow="fold"
        )
    for row, words in zip(shown.rows, rows, strict=True):
        grid.add_row(*(words[number] for number in chosen), style="bold" if row.standing == "best" else None)
    return grid


def _left_out(shown: Table, rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The columns that go first, until the rest fits; the plan, which may break, needs half of its length."""
    names = heads(shown)
    wide = [max(len(words[number]) for words in [names, *rows]) + 3 for number in range(len(names))]
    wide[0] = wide[0] // 2 + 3
    gone: list[str] = []
    for name in (
        "removed",
        "resident",
        "attended",
        *reversed(shown.measures),
        *reversed(shown.families),
        AGAINST_RIVAL,
        "interval",
        "against full",
    ):
        if sum(size for head, size in zip(names, wide, strict=True) if head not in gone) < width:
            break
        gone += [name] if name in names else []
    return gone
