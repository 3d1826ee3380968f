"""`kvfold advise`: which plan to take for one model, one context and one memory.

Without weights it answers at once, from the config.json; with them it compares the plans in a few minutes. Progress
goes to standard error, the advice to standard output.
"""

import json as words
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli.hardware import Device, Dtype
from kvfold.cli.printing import escaped


def advise(
    model: Annotated[
        str, typer.Option(help="`smollm2`, `tiny`, a folder, a config.json, a GGUF file, or a name on the Hub.")
    ] = "tiny",
    text: Annotated[
        Path | None, typer.Option(help="A file of plain text to compare the plans on; generated dialogues if left.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of the longest conversation.", min=1)] = 32_768,
    memory: Annotated[
        str | None, typer.Option(help="What the cache may take, such as 2GB; if left, any plan that saves memory.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    forecast: Annotated[bool, typer.Option("--forecast", help="Load no weights and measure nothing.")] = False,
    minutes: Annotated[
        float, typer.Option(help="How long plans are compared; those without time are left out.", min=0.1)
    ] = 2.5,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Say which plan to take for a model, with its bytes, and with its loss where the weights are on this disk."""
    from kvfold.bench.advise.advising import advise as advised

    advice = advised(
        model,
        text=text,
        context=context,
        memory=memory,
        device=device,
        dtype=dtype,
        forecast=forecast,
        minutes=minutes,
        tell=_tell,
    )
    if json:
        typer.echo(escaped(words.dumps(advice.as_json(), ensure_ascii=False)))
        return
    for line in str(advice).splitlines():
        typer.echo(escaped(line))


def _tell(line: str) -> None:
    """Print a line of progress."""
    print(escaped(line), file=sys.stderr, flush=True)
