"""`kvfold bench SUITE`: one suite, one model, any plans; a record per plan, kept in a folder.

A run that was stopped goes on at its next sample when the same command is given again. Progress goes to standard
error; standard output has the final table, or with `--json` one record per line and nothing else.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvfold.cli.hardware import Device, Dtype
from kvfold.cli.printing import progress, show_lines, show_tables

if TYPE_CHECKING:
    from kvfold.bench.run.clock import Clock
    from kvfold.bench.run.job import Job
    from kvfold.bench.run.record import Record

PLANS = "full; none; streaming_llm; h2o; snapkv"
KEEPS = "0.5,0.2"


# The words and options of the command line, one a parameter of `bench`.
Suite = Annotated[
    str, typer.Argument(metavar="SUITE", help="The name of a suite, such as chat; `kvfold suites` lists them.")
]
Model = Annotated[
    str, typer.Option(help="`smollm2`, `tiny`, a folder, a GGUF file, a name on the Hub, or (speed) a shape.")
]
Plans = Annotated[str, typer.Option(help="Plans, with semicolons between them. `full` and `none` always run too.")]
Keep = Annotated[
    str | None,
    typer.Option(help=f"Sizes for every plan, with commas between them. Default: a plan's own size, or {KEEPS}."),
]
Peers = Annotated[
    str, typer.Option(help="Other projects' caches to run too, such as `kvpress:SnapKV; transformers:DynamicCache`.")
]
Samples = Annotated[int, typer.Option(help="How many samples.", min=1)]
Seed = Annotated[int, typer.Option(help="The seed from which the samples are made.", min=0)]
Folder = Annotated[Path, typer.Option(help="The folder for the records. What is finished there is not run again.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting of the suite. Repeat it for more settings."),
]
Data = Annotated[
    Path | None, typer.Option(help="Real text, which some suites need: a file, or the folder that holds it.")
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(help="The address of a judge with OpenAI's chat API. Its key is read from KVFOLD_JUDGE_KEY."),
]
JudgeModel = Annotated[str | None, typer.Option(help="The name of the judge's model.")]
Threads = Annotated[int | None, typer.Option(help="Processor threads. Default: torch's own choice.", min=1)]
Executor = Annotated[
    str,
    typer.Option(help="Where samples run: here, processes or ray; auto: processes, for a small model on a processor."),
]
Workers = Annotated[int, typer.Option(help="How many workers run. Each has its own threads.", min=1)]
Minutes = Annotated[
    float | None,
    typer.Option(help="Stop after so many minutes. Finished samples are kept, and the same command goes on.", min=0.1),
]
Json = Annotated[bool, typer.Option("--json", help="Print one record per line and nothing else.")]


def carry_out(
    suite: str,
    *,
    model: str,
    plans: str,
    keep: str | None,
    n: int,
    seed: int,
    out: Path,
    dtype: str,
    device: str,
    settings: Sequence[str] = (),
    data: Path | None = None,
    threads: int | None = None,
    executor: str = "here",
    workers: int = 2,
    peers: str = "",
    clock: "Clock | None" = None,
) -> "Sequence[Record]":
    """Run what the words of a command line mean, and return the records."""
    import torch

    from kvfold.bench.choices import choose
    from kvfold.bench.peers.rivals import Rivals
    from kvfold.bench.run import runner
    from kvfold.bench.run.executors import Spread, open_executor
    from kvfold.bench.run.setting import Setting
    from kvfold.bench.subject import open_subject
    from kvfold.bench.suites import find

    chosen = choose(find(suite), given=settings, data=data).bound_to(out)
    wanted, rivals = _wanted(plans, keep, peers, scopes=chosen.scopes)
    opened = cache(partial(open_subject, model, dtype=dtype, device=device))
    spread = Spread(executor=executor, workers=workers, threads=threads).over(chosen, opened)
    count = spread.threads or torch.get_num_threads()
    torch.set_num_threads(count)
    with open_executor(spread.executor, workers=spread.workers) as where:  # its workers start while the model is opened
        subject = opened()
        with Rivals(subject=subject, threads=count) if rivals else nullcontext() as called, progress() as watcher:
            setting = Setting(suite=chosen, subject=replace(subject, rivals=called), n=n, seed=seed, threads=count)
            return runner.run(setting, wanted, folder=out, executor=where, watcher=watcher, clock=clock)


def bench(
    suite: Suite,
    model: Model = "tiny",
    plans: Plans = PLANS,
    keep: Keep = None,
    peers: Peers = "",
    n: Samples = 64,
    seed: Seed = 0,
    out: Folder = Path("kvfold-runs"),
    settings: Settings = None,
    data: Data = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    executor: Executor = "auto",
    workers: Workers = 2,
    minutes: Minutes = None,
    json: Json = False,
) -> None:
    """Ask a model the questions of a suite under several plans, with the full cache and without any history."""
    records = carry_out(
        suite,
        model=model,
        plans=plans,
        keep=keep,
        n=n,
        seed=seed,
        out=out,
        dtype=dtype,
        device=device,
        settings=[*(settings or ()), *_judge(judge_url, judge_model)],
        data=data,
        threads=threads,
        executor=executor,
        workers=workers,
        peers=peers,
        clock=_started(minutes),  # opening the model counts
    )
    _show(records, out, as_json=json)


def _started(minutes: float | None) -> "Clock":
    """The clock of a run, started now."""
    from kvfold.bench.run.clock import Clock

    return Clock(minutes)


def _wanted(plans: str, keep: str | None, peers: str, *, scopes: Sequence[str]) -> "tuple[list[Job], list[Job]]":
    """Read the jobs of a command line: all of them, and the rivals among them."""
    from kvfold.bench.run import jobs

    sizes = jobs.sizes(keep, usual=KEEPS)
    rivals = jobs.parse_rivals(peers, **sizes)
    return [*jobs.parse_jobs(plans, **sizes, scopes=tuple(scopes)), *rivals], [*rivals]


def _show(records: "Sequence[Record]", out: Path, *, as_json: bool) -> None:
    """Print the records as lines, or as a table and the way to a page of them."""
    if as_json:
        show_lines(records)
        return
    show_tables(records)
    typer.echo(f"records: {out / 'records.jsonl'}; `kvfold report {out}` makes a page of them")


def _judge(url: str | None, model: str | None) -> list[str]:
    """The options of a judge as settings of the suite."""
    return [f"judge_{name}={value}" for name, value in (("url", url), ("model", model)) if value is not None]
