"""`kvfold delimiters`: how well each mark ends a sentence for one model, as a file for `sentkv(delimiters=...)`.

Everything heavy is imported when the verb runs.
"""

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli.hardware import Device, Dtype


def delimiters(
    text: Annotated[Path, typer.Option("--text", help="The text to measure on: .txt, .jsonl or .jsonl.xz.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("delimiters.json"),
    model: Annotated[
        str, typer.Option("--model", help="`smollm2`, `tiny`, a folder, a GGUF file, or a name on the Hub.")
    ] = "tiny",
    characters: Annotated[
        int, typer.Option("--characters", help="The most characters of the text that are read.", min=1)
    ] = 200_000,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure how well each mark ends a sentence for a model, as a file for sentkv(delimiters=...)."""
    from kvfold.cli.hardware import load_model
    from kvfold.data.files import prose, read_rows
    from kvfold.train.delimiters import measure, save_ends

    loaded, tokenizer = load_model(model, device=device, dtype=dtype)
    texts, left = [], characters
    for row in read_rows(text):
        texts.append(prose(row)[:left])
        left -= len(texts[-1])
        if left <= 0:
            break
    ends = measure(loaded, tokenizer, texts)
    save_ends(ends, out)
    for mark, level in sorted(ends.items(), key=lambda one: -one[1]):
        typer.echo(f"{mark!r}: {level}")
    typer.echo(f"the levels are in {out}")
