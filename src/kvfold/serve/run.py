"""One server process: model, shelf and scheduler put together, and served by uvicorn until SIGTERM or Ctrl-C.

On SIGTERM no more requests are taken, and running replies go on to their end for a while. With a store, every finished
turn is on disk already. Without one, what memory has no room for lies in a private folder that goes with the process.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from kvfold.hf.generation import Model, Tokenizer
from kvfold.serve.app import make_app
from kvfold.serve.connection import BoundedHttp
from kvfold.serve.holdings import Holdings
from kvfold.serve.metrics import Metrics
from kvfold.serve.scheduler import Scheduler
from kvfold.serve.served import ServedModel
from kvfold.serve.sessions import Sessions
from kvfold.serve.settings import ServeSettings
from kvfold.serve.shelf import Shelf
from kvfold.serve.store import Store

GRACE_SECONDS = 30  # for running replies after SIGTERM


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The pieces of one server."""

    app: FastAPI
    shelf: Shelf
    scheduler: Scheduler
    metrics: Metrics


@contextlib.contextmanager
def server(model: Model, tokenizer: Tokenizer, settings: ServeSettings) -> Iterator[Server]:
    """Put a server together; at the end its thread is stopped, and a private folder is gone."""
    served = ServedModel(model, tokenizer, settings.plan, name=settings.model, least=settings.least)
    with contextlib.ExitStack() as stack:
        folder = settings.store
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvfold-serve-")))
        store = Store(folder, served)
        shelf = Shelf(
            store,
            Holdings(settings.memory_bytes),
            is_durable=settings.store is not None,
            is_shared=settings.is_shared,
            kept_turns=settings.kept_turns,
            store_bytes=settings.store_bytes,
        )
        sessions = Sessions()
        for session, owner in store.owners_of_sessions().items():
            sessions.claim(session, owner)
        metrics = Metrics()
        scheduler = Scheduler(served, shelf, settings, metrics)
        app = make_app(served, scheduler, sessions, settings, metrics)
        yield Server(app=app, shelf=shelf, scheduler=scheduler, metrics=metrics)
        scheduler.stop()
        shelf.remove_outdated()


def serve(model: Model, tokenizer: Tokenizer, settings: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    with server(model, tokenizer, settings) as made:
        uvicorn.Server(http_settings(made.app, settings)).run()


def http_settings(app: FastAPI, settings: ServeSettings) -> uvicorn.Config:
    """Give uvicorn its settings, with what bounds connections."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=BoundedHttp,
        log_level="error",  # its warnings are about requests that are no HTTP, one line each
        limit_concurrency=settings.connections,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=20,
        server_header=False,
    )
