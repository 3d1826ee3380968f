"""`kvfold ranks`: a page that shows how much of each token of a text a plan keeps.

Reads the text in one forward and folds it. Everything heavy is imported when the verb runs.
"""

import json as words
from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli.hardware import Device, Dtype


def ranks(
    text: Annotated[Path, typer.Option("--text", help="The text to read: .txt, .jsonl or .jsonl.xz (its first row).")],
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("ranks.html"),
    model: Annotated[
        str, typer.Option("--model", help="`smollm2`, `tiny`, a folder, a GGUF file, or a name on the Hub.")
    ] = "tiny",
    plan: Annotated[str, typer.Option("--plan", help="How the text is folded.")] = "dynakv(rate=0.3)",
    tokens: Annotated[int, typer.Option("--tokens", help="The most tokens of the text that are read.", min=8)] = 1024,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print what each layer keeps, as one JSON object.")] = False,
) -> None:
    """Draw a text as a page: each token is shaded by how much of it a plan keeps, layer by layer."""
    from kvfold.bench.report.page import write_whole
    from kvfold.bench.report.ranks import page, shares_of
    from kvfold.cli.hardware import load_model
    from kvfold.data.files import prose, read_rows

    loaded, tokenizer = load_model(model, device=device, dtype=dtype)
    read = prose(read_rows(text)[0])[: 8 * tokens]
    start = str(tokenizer.decode(tokenizer(read)["input_ids"][:tokens], skip_special_tokens=True))
    shares = shares_of(loaded, tokenizer, plan, start)
    write_whole(out, page(shares))
    kept = {str(index): round(sum(own) / len(own), 4) for index, own in shares.layers.items()}
    if json:
        typer.echo(words.dumps({"plan": shares.plan, "tokens": len(shares.tokens), "kept": kept, "page": str(out)}))
        return
    for index, share in kept.items():
        typer.echo(f"layer {index}: {share:.3f} of each token's numbers on average")
    typer.echo(f"the page is {out}")
