"""`kvfold serve`: an OpenAI-compatible server whose long chats stay small.

This file reads options and says on standard error where the server is. What the server does stands in `serve/`.
"""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvfold.cli.chat import PLAN
from kvfold.cli.hardware import Device, Dtype, load_model
from kvfold.errors import ModelError

if TYPE_CHECKING:
    from kvfold.serve.settings import ServeSettings

    Load = partial[tuple[Any, Any]]

Model = Annotated[str, typer.Option(help="`smollm2`, `tiny`, a folder, a GGUF file, or a name on the Hub.")]
Least = Annotated[int, typer.Option(min=0, help="Tokens of a chat that a plan with keep= leaves in any case.")]
Memory = Annotated[str, typer.Option(help="The most that all chats together may take, such as 512MB or 2GB.")]
Host = Annotated[str, typer.Option(help="The address to listen at. Other machines need --token-file.")]
Store = Annotated[Path | None, typer.Option(help="Keep finished turns in this folder, over a restart too.")]
StoreLimit = Annotated[str, typer.Option(help="The most that files of chats may take. The oldest chats go.")]
TokenFile = Annotated[Path | None, typer.Option(help="A file with the tokens of clients, one in each line.")]
Name = Annotated[str | None, typer.Option(help="The name of the model for clients. Default: the value of --model.")]
Ray = Annotated[bool, typer.Option("--ray", help="Run on Ray Serve: here, or on the cluster at RAY_ADDRESS.")]
Replicas = Annotated[int | None, typer.Option(min=1, help="How many models run, on Ray, each with chats of its own.")]
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
    ray: Ray = False,
    replicas: Replicas = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Serve chats over HTTP by OpenAI's API. Ctrl-C or SIGTERM ends it."""
    _refuse_without_extra()
    from kvfold.serve import access
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
    load = partial(load_model, _found(model), device=device, dtype=dtype)
    line = f"kvfold: {settings.model} with {plan}, {memory} for chats, at http://{host}:{port}/v1"
    (_serve_on_ray if ray or replicas else _serve_here)(load, settings, line, replicas or 1)


def _serve_here(load: "Load", settings: "ServeSettings", line: str, _: int) -> None:
    """Serve in this process until Ctrl-C or SIGTERM."""
    from kvfold.serve import address
    from kvfold.serve.run import serve as run

    with address.bound(settings.host, settings.port) as sockets:
        model, tokenizer = load()
        address.listen(settings.host, settings.port, sockets)
        print(line, file=sys.stderr)
        run(model, tokenizer, settings, sockets)


def _serve_on_ray(load: "Load", settings: "ServeSettings", line: str, replicas: int) -> None:
    """Serve on Ray until Ctrl-C or SIGTERM. Raises ModelError where Ray's Serve is not installed."""
    try:
        from kvfold.serve.on_ray import on_ray
    except ModuleNotFoundError as error:
        truth = f"{error.name or 'ray[serve]'} is not installed"
        raise ModelError(f"a server on Ray was asked for; {truth}; pip install 'kvfold[serve,ray]'") from error
    from kvfold.hf.hardware import settled

    gpus = int(settled(device=load.keywords["device"], dtype="auto")[0] == "cuda")
    with on_ray(load, settings, replicas=replicas, gpus=gpus) as over:
        print(f"{line}, {replicas} replicas on Ray", file=sys.stderr)
        over.wait()


def _found(model: str) -> str:
    """Give a folder's or a file's whole path, which holds in other processes too; a shipped model has its name."""
    from kvfold.hf.load import is_shipped

    if is_shipped(model):
        return model
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() else model


def _refuse_without_extra() -> None:
    """Raise ModelError where a package that the server needs is not installed."""
    try:
        import kvfold.serve.run  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModelError(
            f"a server was asked for; {error.name} is not installed; pip install 'kvfold[serve]'"
        ) from error
