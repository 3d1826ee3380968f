"""`kvfold train`: train the models that kvfold ships or needs: a base model, SONIC's adapter, DynaKV's.

Shows a progress bar on a terminal and plain lines elsewhere. Everything heavy is imported when the verb runs.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.errors import DataError

app = typer.Typer(help="Train a model or an adapter: base, sonic, dynakv.", no_args_is_help=True)
Data = Annotated[Path | None, typer.Option("--data", help="A folder of real text (*.jsonl.xz) to mix in.")]
Minutes = Annotated[float | None, typer.Option("--minutes", help="How many minutes the whole run takes.")]
Tokens = Annotated[int | None, typer.Option("--tokens", help="How many tokens the whole run reads.")]
Scorer = Annotated[
    float,
    typer.Option(
        "--judge",
        help="The share of the run that trains the scorer alone. 1: all, so no Nexus rows.",
    ),
]
Study = Annotated[
    float, typer.Option("--study", help="The share of talks in which the model asks itself about the data.", min=0)
]
Repeats = Annotated[
    float,
    typer.Option("--repeats", help="The share of talks that are read twice, as KVzip does.", min=0),
]
TermWeights = Annotated[
    str, typer.Option("--terms", help="Weights of the loss's terms, such as 'choice=1,salience=0'.")
]
Without = Annotated[str | None, typer.Option("--without", help="A family of dialogues that training leaves out.")]
Rows = Annotated[
    int | None,
    typer.Option("--rows", help="Rows of text. Default: 3 in a training step, 30 in a measurement.", min=1),
]
Basis = Annotated[
    str | None,
    typer.Option("--basis", help="Bases to measure: joint, mixed, rotated, heads, rotary. The first one is trained."),
]
Length = Annotated[
    int | None,
    typer.Option("--length", help="Tokens of a row. Default: 768 in a training, 1,024 in a measurement."),
]


@app.callback()
def train() -> None:
    """Train a model or an adapter."""


@app.command()
def base(
    out: Annotated[Path, typer.Option("--out", help="The folder for checkpoint, record and finished model.")],
    preset: Annotated[str, typer.Option("--preset", help="The shape of the model: tiny or small.")] = "tiny",
    data: Data = None,
    minutes: Minutes = None,
    tokens: Tokens = None,
    seed: Annotated[int, typer.Option("--seed", help="The seed of weights, data and order.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    start: Annotated[Path | None, typer.Option("--from", help="A finished model of this preset to start with.")] = None,
    soup: Annotated[
        Path | None,
        typer.Option("--soup", help="A finished model of this preset; the result is the mean of both weights."),
    ] = None,
    rate: Annotated[float, typer.Option("--rate", help="A factor for the usual learning rates.")] = 1.0,
) -> None:
    """Train a base model on generated dialogues and documents, mixed with real text.

    Give --minutes or --tokens. Ctrl-C stops the run; with --resume it goes on from its last checkpoint.
    """
    from kvfold.train.base.run import BaseRun
    from kvfold.train.base.settings import BaseSettings
    from kvfold.train.loop import LoopSettings

    _refuse_no_length(minutes, tokens)
    usual = LoopSettings(seconds=None if minutes is None else minutes * 60, tokens=tokens)
    matrix_rate = None if usual.matrix_rate is None else rate * usual.matrix_rate
    loop = replace(usual, matrix_rate=matrix_rate, other_rate=rate * usual.other_rate)
    settings = BaseSettings(
        preset=preset, out=out, data=data, seed=seed, resume=resume, start=start, soup=soup, loop=loop
    )
    run = BaseRun(settings)
    _train(run)
    run.finish()
    typer.echo(f"the model is in {out}")


@app.command()
def sonic(
    out: Annotated[Path, typer.Option("--out", help="The folder for checkpoint, record and finished adapter.")],
    model: Annotated[str, typer.Option("--model", help="The model that the adapter is for.")] = "tiny",
    data: Data = None,
    minutes: Minutes = None,
    tokens: Tokens = None,
    seed: Annotated[int, typer.Option("--seed", help="The seed of rows, data and order.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    rank: Annotated[int, typer.Option("--rank", help="The rank of the adapter's updates.", min=1)] = 32,
    rate: Annotated[float, typer.Option("--rate", help="The learning rate.")] = 2e-3,
    scorer: Scorer = 0.15,
    without: Without = None,
    study: Study = 0.0,
    repeats: Repeats = 0.0,
    start: Annotated[
        str | None, typer.Option("--from", help="An adapter to start with: a folder, or `shipped`.")
    ] = None,
    terms: TermWeights = "",
    as_used: Annotated[bool, typer.Option("--as-used", help="Train on the hard choice, as in use.")] = False,
) -> None:
    """Train the adapter of sonic for a model. One adapter serves every budget.

    Give --minutes or --tokens. Ctrl-C stops the run; with --resume it goes on from its last checkpoint.
    """
    from kvfold.train.loop import LoopSettings
    from kvfold.train.sonic.run import SonicRun
    from kvfold.train.sonic.settings import SonicSettings, Terms
    from kvfold.train.sonic.talks import Mix

    _refuse_no_length(minutes, tokens)
    loop = LoopSettings(
        seconds=None if minutes is None else minutes * 60, tokens=tokens, matrix_rate=None, other_rate=rate,
        warmup_steps=40, batches_a_step=1, average=0.99,
    )  # fmt: skip
    run = SonicRun(SonicSettings(
        model=model, out=out, data=data, seed=seed, resume=resume, rank=rank, loop=loop, scorer_until=scorer,
        start=start, as_used=as_used,
        mix=Mix(without=without, study=study, repeats=repeats), terms=Terms(**_weights(terms, Terms)),
    ))  # fmt: skip
    _train(run)
    run.finish()
    typer.echo(f"the adapter is in {out}")


@app.command()
def dynakv(
    out: Annotated[Path, typer.Option("--out", help="The folder for checkpoint, record and finished adapter.")],
    model: Annotated[str, typer.Option("--model", help="The model that the adapter is for.")] = "tiny",
    data: Annotated[
        Path | None, typer.Option("--data", help="Real text to mix in: a folder of *.jsonl.xz, or a file.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps of training. 0 only measures bases.", min=0)] = 0,
    basis: Basis = None,
    seed: Annotated[int, typer.Option("--seed", help="The seed of data and order.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    rows: Rows = None,
    length: Length = None,
    split: Annotated[
        str, typer.Option("--split", help="How layers share a rate without training: loss, or even (no backward pass).")
    ] = "loss",
    update: Annotated[
        int,
        typer.Option("--update", help="Rank of updates to the model's attention. The updated model is in OUT/model."),
    ] = 0,
    without: Annotated[
        str, typer.Option("--without", help="Parts that are not trained: bases, gates, hard or entropy.")
    ] = "",
    minutes: Annotated[float | None, typer.Option("--minutes", help="Minutes of training, in place of steps.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", help="An adapter whose measured bases are trained: a folder, or `shipped`.")
    ] = None,
) -> None:
    """Train ranks of dynakv for a model, or only measure a basis. One adapter serves every rate.

    A measurement (--steps 0) takes minutes. Ctrl-C stops a training; with --resume it goes on from its checkpoint.
    """
    given = {name: value for name, value in (("rows", rows), ("length", length)) if value is not None}
    if steps or minutes:
        if split != "loss":
            raise DataError(f"--split {split} was given; ranks are trained here; leave it away, or give --steps 0")
        _train_ranks(
            model=model, out=out, data=data, steps=steps or None, minutes=minutes, basis=basis, seed=seed,
            resume=resume, start=start, update=update, without=without, **given,
        )  # fmt: skip
    else:
        _refuse_training_only({"--resume": resume, "--update": update, "--without": without, "--from": start})
        _measure_ranks(model=model, out=out, data=data, basis=basis, seed=seed, split=split, **given)
    typer.echo(f"the adapter is in {out}")


def _train_ranks(*, minutes: float | None, without: str, **settings: Any) -> None:
    from kvfold.train.dynakv.run import DynaRun
    from kvfold.train.dynakv.settings import DynaSettings

    seconds = None if minutes is None else 60 * minutes
    parts = tuple(filter(None, without.split(",")))
    run = DynaRun(DynaSettings(seconds=seconds, without=parts, **settings), _line_to_stderr)
    _train(run)
    run.finish()


def _measure_ranks(**settings: Any) -> None:
    from kvfold.train.dynakv.adapter import measured_adapter
    from kvfold.train.dynakv.settings import CalibrationSettings

    measured_adapter(CalibrationSettings(**settings), _line_to_stderr)


def _line_to_stderr(line: str) -> None:
    typer.echo(line, err=True)


def _refuse_training_only(given: Mapping[str, object]) -> None:
    """Refuse what only a training can do where nothing is trained."""
    asked = [name for name, value in given.items() if value]
    if asked:
        raise DataError(
            f"{asked[0]} was given without steps; nothing is trained then; give --steps, or leave out {asked[0]}"
        )


def _weights(text: str, kind: type) -> dict[str, float]:
    """Named numbers of an option, "choice=1,salience=0.1"."""
    from dataclasses import fields

    known, found = [field.name for field in fields(kind)], {}
    for pair in filter(None, text.split(",")):
        name, _, value = pair.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            found[name.strip()] = None
    wrong = [name for name, value in found.items() if name not in known or value is None]
    if wrong:
        raise DataError(
            f"{text!r} was given; {wrong[0]!r} is no number for one of {', '.join(known)}; write choice=1,salience=0"
        )
    return found


def _refuse_no_length(minutes: float | None, tokens: int | None) -> None:
    if (minutes is None) == (tokens is None):
        raise DataError("a run was asked with no length, or with two; it needs one; give --minutes or --tokens")


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
    climbed = " ".join(f"{name}@{at}:{right:.2f}" for name, (at, right, _) in record.get("ladders", {}).items())
    climbed += " ".join(f"{name}:{right:.2f}" for name, right in record.get("right", {}).items())
    climbed += " ".join(f"{name}:{loss:.4f}" for name, loss in record.get("losses", {}).items())
    return f"step {record['step']} tokens {record['tokens']} done {record['share']:.1%} {climbed}"
