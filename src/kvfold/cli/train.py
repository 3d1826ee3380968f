"""`kvfold train`: train the models that kvfold ships or needs. `kvfold train base` trains a base model.

Shows a progress bar on a terminal and plain lines elsewhere. Everything heavy is imported when the verb runs.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train a model: base.", no_args_is_help=True)


@app.callback()
def train() -> None:
    """Train a model."""


@app.command()
def base(
    out: Annotated[Path, typer.Option("--out", help="Folder for checkpoint, record and finished model.")],
    preset: Annotated[str, typer.Option("--preset", help="Shape of the model: tiny or small.")] = "tiny",
    data: Annotated[Path | None, typer.Option("--data", help="Folder of real text (*.jsonl.xz) to mix in.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help="Length of the whole run in minutes.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Length of the whole run in tokens.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights, data and order.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    start: Annotated[Path | None, typer.Option("--from", help="Finished model of this preset to go on from.")] = None,
    rate: Annotated[float, typer.Option("--rate", help="Share of the usual learning rates.")] = 1.0,
) -> None:
    """Train a base model on generated dialogues and documents, mixed with real text.

    Give --minutes or --tokens. Stopped by Ctrl-C, the run goes on from its last checkpoint with --resume.
    """
    from kvfold.errors import DataError
    from kvfold.learn.base import BaseRun, BaseSettings
    from kvfold.learn.loop import LoopSettings

    if (minutes is None) == (tokens is None):
        raise DataError("a run was asked with no length, or with two; it needs one; give --minutes or --tokens")
    usual = LoopSettings(seconds=None if minutes is None else minutes * 60, tokens=tokens)
    loop = replace(usual, matrix_rate=rate * usual.matrix_rate, other_rate=rate * usual.other_rate)
    settings = BaseSettings(preset=preset, out=out, data=data, seed=seed, resume=resume, start=start, loop=loop)
    run = BaseRun(settings)
    _train(run)
    run.finish()
    typer.echo(f"the model is in {out}")


def _train(run) -> None:
    """Run to the end with a bar or with lines."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        run.train(lambda record: console.print(_line(record), soft_wrap=True))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=1.0)

        def show(record: dict) -> None:
            progress.update(task, completed=record["share"], description=_line(record))

        run.train(show)


def _line(record: dict) -> str:
    """Where a run stands, in one line."""
    climbed = " ".join(f"{name}@{at}:{right:.2f}" for name, (at, right, _) in record["ladders"].items())
    return f"step {record['step']} tokens {record['tokens']} done {record['share']:.1%} {climbed}"
