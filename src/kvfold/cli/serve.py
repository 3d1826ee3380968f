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
Least = Annotated[int, typer.Option(min=0, help="Tokens of a chat that a plan with keep= leaves in any case.")]
Memory = Annotated[str, typer.Option(help="The most that all chats together may take, such as 512MB or 2GB.")]
Host = Annotated[str, typer.Option(help="The address to listen at. Other machines need --token-file.")]
Store = Annotated[Path | None, typer.Option(help="Keep finished turns in this folder, over a restart too.")]
StoreLimit = Annotated[str, typer.Option(help="The most that files of chats may take. The oldest chats go.")]
TokenFile = Annotated[Path | None, typer.Option(help="A file with the tokens of clients, one in each line.")]
Name = Annotated[str | None, typer.Option(help="The name of the model for clients. Default: the value of --model.")]
ReplyTokens = Annotated[int, typer.Option(min=1, help="The most tokens that a request may ask for.")]


def serve(
    model: Model = "tiny",
    plan: Annotated[str, typer.Option(help="How the history of each chat is folded.")] = PLAN,
    least: Least = 256,
    memory: Memory = "2GB",
    store: Store = None,
    store_limit: StoreLimit = "10GB",
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen at.")] = 8000,
    token_file: TokenFile = None,
    name: Name = None,
    reply_tokens: ReplyTokens = 1024,
    rows: Annotated[int, typer.Option(min=1, help="How many chats decode at the same time.")] = 16,
    queue: Annotated[int, typer.Option(min=1, help="How many requests may wait.")] = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Serve chats over HTTP by OpenAI's API. Ctrl-C or SIGTERM ends it."""
    _refuse_without_extra()
    from kvfold.serve import access
    from kvfold.serve.run import serve as run
    from kvfold.serve.settings import ServeSettings, bytes_from

    settings = ServeSettings(
        model=name or model,
        plan=plan,
        least=least,
        memory_bytes=bytes_from(memory),
        store=store,
        store_bytes=bytes_from(store_limit),
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


def _refuse_without_extra() -> None:
    """Raise ModelError where a package that the server needs is not installed."""
    try:
        import kvfold.serve.run  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModelError(
            f"a server was asked for; {error.name} is not installed; pip install 'kvfold[serve]'"
        ) from error
