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

COLUMNS = ("plan", "samples", "score so far", "like full", "kept", "MB held", "tokens/s", "time")


class PlainLines:
    """For logs and pipes: a line when a plan starts and one when it is done."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, job: Job, n: int, prediction: str) -> None:
        """Print the plan that starts, and what is predicted of it."""
        ending = f"; {prediction}" if prediction else ""
        self._print(f"{job.plan}: {n} samples{ending}")

    def outcomes(self, job: Job, so_far: Sequence[Outcome]) -> None:
        """Print nothing: a log is read afterwards."""

    def samples(self, done: int, n: int, seconds_left: float) -> None:
        """Print how many samples are finished under every plan, and how long the others take at this pace."""
        self._print(pace(done, n, seconds_left))

    def finish(self, job: Job, record: Record) -> None:
        """Print what came out."""
        if record.failure is not None:
            self._print(f"{job.plan}: failed, {record.failure}")
            return
        self._print(f"{job.plan}: score {record.score:.3f}, kept {record.stored:.3f}, {record.wall_seconds:.1f} s")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


class LiveTable:
    """For terminals: one row per plan, redrawn as outcomes come in. It changes while it is entered."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=4)
        self._rows: dict[Job, tuple[str, ...]] = {}
        self._measured: dict[Job, tuple[str, ...]] = {}
        self._wanted = 0
        self._pace = ""

    def __enter__(self) -> "LiveTable":
        self._live.__enter__()
        return self

    def __exit__(self, *problem: object) -> None:
        self._live.__exit__(None, None, None)

    def begin(self, job: Job, n: int, prediction: str) -> None:
        """Open a row; what is predicted of it stands above the table."""
        self._wanted = n
        if prediction:
            self._live.console.print(f"{job.plan}: {prediction}", highlight=False)
        self._show(job, (job.plan, f"0/{n}"))

    def outcomes(self, job: Job, so_far: Sequence[Outcome]) -> None:
        """Fill the row with what is known so far."""
        self._measured[job] = _measured(so_far)
        self._show(job, (job.plan, f"{len(so_far)}/{self._wanted}", *self._measured[job]))

    def samples(self, done: int, n: int, seconds_left: float) -> None:
        """Say below the table how many samples are finished, and how long the others take."""
        self._pace = pace(done, n, seconds_left)

    def finish(self, job: Job, record: Record) -> None:
        """Close the row."""
        if record.failure is not None:
            self._show(job, (job.plan, "failed", record.failure))
            return
        done = f"{len(record.outcomes)}/{record.n}"
        seconds = f"{record.wall_seconds:.1f} s"
        _, alike, _, *others = self._measured.get(job, ("",) * 5)  # a record has no bytes of its samples
        self._show(job, (job.plan, done, f"{record.score:.3f}", alike, f"{record.stored:.3f}", *others, seconds))

    def _show(self, job: Job, words: tuple[str, ...]) -> None:
        self._rows[job] = words
        grid = Grid(*COLUMNS, caption=self._pace or None, caption_justify="left")
        for row in self._rows.values():
            grid.add_row(*row)
        self._live.update(grid, refresh=True)


def _measured(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Write the means of outcomes: score, agreement with the full cache, kept share, MB held, tokens a second."""
    score = fmean(outcome.score for outcome in outcomes)
    kept = fmean(outcome.stored for outcome in outcomes)
    held = fmean(outcome.stored_bytes for outcome in outcomes) / 1e6
    alike = [outcome.metrics["agreement"] for outcome in outcomes if "agreement" in outcome.metrics]
    paces = [1 / outcome.tpot_seconds for outcome in outcomes if outcome.tpot_seconds > 0]
    return (
        f"{score:.3f}",
        f"{fmean(alike):.3f}" if alike else "",
        f"{kept:.3f}",
        f"{held:.1f}",
        f"{fmean(paces):.1f}" if paces else "",
    )


def pace(done: int, n: int, seconds_left: float) -> str:
    """Say how many samples are finished under every plan, and how long the others take."""
    if done == n:
        return f"{done} of {n} samples"
    wait = f"{seconds_left / 60:.0f} minutes"
    if seconds_left < 100:
        wait = f"{seconds_left:.0f} seconds"
    return f"{done} of {n} samples; the others take about {wait} at this pace"


def drawn(shown: Table, *, width: int | None = None) -> Grid:
    """Draw a finished table for a terminal; columns that do not fit into its width are left out by name."""
    rows = [cells(shown, row) for row in shown.rows]
    names = heads(shown)
    left_out = [] if width is None else _left_out(shown, rows, width)
    lines = notes(shown)
    if left_out:
        lines.append(f"no room here for {', '.join(left_out)}; a wider terminal, --json and the page have them")
    grid = Grid(title=shown.title, title_justify="left", caption="\n".join(lines), caption_justify="left")
    chosen = [number for number, name in enumerate(names) if name not in left_out]
    for number in chosen:
        # Only the first column, the plan, may break over lines.
        grid.add_column(
            names[number],
            justify="right" if number else "left",
            no_wrap=number > 0,
            overflow="fold",
        )
    for row, words in zip(shown.rows, rows, strict=True):
        style = "bold" if row.standing == "best" else None
        grid.add_row(*(words[number] for number in chosen), style=style)
    return grid


def _left_out(shown: Table, rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The columns that are left out so that the rest fits; the plan, which may break, needs half of its length."""
    names = heads(shown)
    sizes: dict[str, int] = {}
    for number, name in enumerate(names):
        longest = max(len(words[number]) for words in [names, *rows])
        sizes[name] = longest + 3  # a border and two spaces
    plan = names[0]
    sizes[plan] = sizes[plan] // 2 + 3
    order = [  # what can be spared most comes first
        "resident",
        "attended",
        *reversed(shown.measures),
        *reversed(shown.families),
        AGAINST_RIVAL,
        "interval",
        "against full",
    ]
    gone: list[str] = []
    for name in order:
        if sum(size for head, size in sizes.items() if head not in gone) < width:
            break
        if name in names:
            gone.append(name)
    return gone
