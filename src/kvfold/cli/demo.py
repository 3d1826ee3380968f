"""`kvfold demo`: the chat suite on the shipped model, four methods, two sizes, a table and a page.

It is `kvfold bench chat` with everything chosen, so that a newcomer sees a real benchmark within three minutes on
two cores. Stopped and started again, it goes on where it stopped.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli.bench import KEEPS, PLANS, carry_out
from kvfold.cli.printing import show_lines, show_tables
from kvfold.cli.report import FOLDER

SAMPLES = 32  # what two cores answer under all plans within three minutes


def demo(
    n: Annotated[int, typer.Option(help="How many dialogues. The four families take turns.", min=4)] = SAMPLES,
    seed: Annotated[int, typer.Option(help="The seed from which the dialogues are made.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="The folder for report.html and the records.")] = FOLDER,
    json: Annotated[bool, typer.Option("--json", help="Print one record per line and nothing else.")] = False,
) -> None:
    """Run a real multi-turn benchmark on the shipped model: four methods at two sizes, full cache, no history."""
    from kvfold.bench.report import page as report

    # A model this small gains nothing from a second thread, but two processes do twice the work of one.
    cores = os.cpu_count() or 1
    records = carry_out(
        "chat",
        model="tiny",
        plans=f"{PLANS}; sonic",
        keep=KEEPS,
        n=n,
        seed=seed,
        out=out,
        dtype="float32",
        device="cpu",
        threads=1,
        executor="processes" if cores > 1 else "here",
        workers=min(cores, max(n // 16, 1)),
    )
    page = report.write(records, out)
    if json:
        show_lines(records)
    else:
        show_tables(records)
        typer.echo(f"written: {page}")
