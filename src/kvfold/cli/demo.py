"""`kvfold demo`: a real benchmark with everything chosen: documents with facts, seven plans, a table and a page.

It runs on SmolLM2, or on `tiny`, which ships with the package, where those weights cannot be had. It takes about three
minutes on two cores. Stopped and started again, it goes on where it stopped.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli.bench import KEEPS, PLANS, carry_out
from kvfold.cli.printing import show_lines, show_tables
from kvfold.cli.report import FOLDER

SIDE_BY_SIDE = ("full", "int8", "kvzip(keep=0.25)", "snapkv(keep=0.25)", "streaming_llm(keep=0.25)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a demo runs on one model."""

    suite: str
    plans: str
    keep: str
    samples: int


SHOWN = {
    "smollm2": Shown(
        suite="facts",
        plans="int8; sonic; kvzip; snapkv; streaming_llm; sentkv(budget=0.1)",
        keep="0.25",
        samples=4,
    ),
    "tiny": Shown(suite="chat", plans=f"{PLANS}; sonic", keep=KEEPS, samples=32),
}


def demo(
    model: Annotated[str, typer.Option(help="`smollm2`, or `tiny`, which is always there.")] = "smollm2",
    n: Annotated[
        int | None, typer.Option(help="How many samples. Default: 4 documents, or 32 dialogues.", min=2)
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed from which the samples are made.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="The folder for report.html and the records.")] = FOLDER,
    json: Annotated[bool, typer.Option("--json", help="Print one record per line and nothing else.")] = False,
) -> None:
    """Run a real benchmark with everything chosen: seven plans on one model, a table, an exchange and a page."""
    from kvfold.bench.report import page as report

    name = _that_can_be_had(model)
    shown = SHOWN[name]
    count = n or shown.samples
    cores = os.cpu_count() or 1
    records = carry_out(
        shown.suite,
        model=name,
        plans=shown.plans,
        keep=shown.keep,
        n=count,
        seed=seed,
        out=out,
        dtype="auto" if name == "smollm2" else "float32",
        device="cpu",
        threads=1,  # two processes on one thread each do more than one on two
        executor="processes" if cores > 1 else "here",
        workers=min(cores, max(count // 2, 1)),
    )
    page = report.write(records, out)
    if json:
        show_lines(records)
        return
    show_tables(records)
    if name == "smollm2":
        _show_exchange(SIDE_BY_SIDE, seed)
    typer.echo(f"written: {page}")


def _that_can_be_had(name: str) -> str:
    """Give the model, or `tiny` with one line of why. Raises ModelError for a name that is neither."""
    from kvfold.errors import ModelError
    from kvfold.hf.load import load, source_of

    if name not in SHOWN:
        raise ModelError(f"a demo on {name!r} was asked for; it is made for {' and '.join(SHOWN)}; give one of these")
    if name != "tiny":
        try:
            if not Path(source_of(name)).is_dir():  # it is opened soon enough where it lies here
                load(name)
        except ModelError as error:
            typer.echo(f"{error}; showing `tiny` instead", err=True)
            return "tiny"
    return name


def _show_exchange(plans: Sequence[str], seed: int) -> None:
    """Print one question on a folded document, and what is replied under each plan."""
    from rich.console import Console
    from rich.table import Table

    from kvfold.bench.subject import open_subject
    from kvfold.bench.suites.facts import SUITE

    subject = open_subject("smollm2", dtype="auto", device="cpu")
    question, said = SUITE.exchange(subject, plans, SUITE.samples(n=1, seed=seed)[0])
    table = Table("plan", "reply", title=f"One exchange. {question}", title_justify="left")
    for plan, reply in said.items():
        table.add_row(plan, reply)
    Console().print(table)
