"""`kvfold serve`: an OpenAI-compatible server whose long chats stay small.

This file reads options and says on standard error where the server is. What the server does stands in `serve/`.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli.chat import PLAN
from kvfold.cli.hardware import Device, Dtype, load_model
from kvfold.errors import ModelError

Model = Annotated[str, typer.Option(help="`smollm2`, `tiny`, a folder, a GGUF file, or a name on the Hub.")]


def serve(
    model: Model = "tiny",
    plan: Annotated[str, typer.Option(help="How the history of every chat is folded.")] = PLAN,
    least: Annotated[int, typer.Option(min=0, help="Tokens of a chat that a fraction leaves in any case.")] = 256,
    memory: Annotated[str, typer.Option(help="What all chats together may take, such as 512MB or 2GB.")] = "2GB",
    store: Annotated[Path | None, typer.Option(help="Keep finished turns in this folder; a restart has them.")] = None,
    host: Annotated[str, typer.Option(help="Address; any but this machine's own needs --token-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 8000,
    token_file: Annotated[Path | None, typer.Option(help="Tokens of clients, one a line.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; the value of --model if left.")] = None,
    reply_tokens: Annotated[int, typer.Option(min=1, help="The longest reply that a request may ask for.")] = 1024,
    rows: Annotated[int, typer.Option(min=1, help="Chats that decode at once.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Serve chats over HTTP, by OpenAI's API, until Ctrl-C or SIGTERM."""
    try:
        from kvfold.serve import access
        from kvfold.serve.run import serve as run
        from kvfold.serve.settings import ServeSettings, bytes_from
    except ModuleNotFoundError as error:
        raise ModelError(
            f"a server was asked for; {error.name} is not installed; pip install 'kvfold[serve]'"
        ) from error
    settings = ServeSettings(
        model=name or model,
        plan=plan,
        least=least,
        memory_bytes=bytes_from(memory),
        store=store,
        host=host,
        port=port,
        tokens=() if token_file is None else access.read_tokens(token_file),
        reply_tokens=reply_tokens,
        rows=rows,
        queue=queue,
    )
    base, tokenizer = load_model(model, device=device, dtype=dtype)
    print(f"kvfold: {settings.model} with {plan}, {memory} for chats, at http://{host}:{port}/v1", file=sys.stderr)
    run(base, tokenizer, settings)
