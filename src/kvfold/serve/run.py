"""One server process: model, shelf and scheduler put together, and served by uvicorn until SIGTERM or Ctrl-C.

On SIGTERM no more requests are taken, and running replies go on to their end for a while; the process ends with code
143. With a store, every finished turn is on disk already. Without one, what memory has no room for lies in a private
folder that goes with the process.
"""

import contextlib
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from kvfold.hf.generation import Model, Tokenizer
from kvfold.serve.app import make_app
from kvfold.serve.connection import BoundedHttp
from kvfold.serve.folder import private_folder
from kvfold.serve.holdings import Holdings
from kvfold.serve.metrics import Metrics
from kvfold.serve.scheduler import Scheduler
from kvfold.serve.served import ServedModel
from kvfold.serve.sessions import Sessions
from kvfold.serve.settings import ServeSettings
from kvfold.serve.shelf import Shelf
from kvfold.serve.store import Store

GRACE_SECONDS = 30  # for running replies after SIGTERM
_TERMINATED = 143  # what shells expect of a program ended by SIGTERM


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
            folder = stack.enter_context(private_folder())
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
        try:
            yield Server(app=app, shelf=shelf, scheduler=scheduler, metrics=metrics)
        finally:
            scheduler.stop()
            shelf.remove_outdated()


def serve(model: Model, tokenizer: Tokenizer, settings: ServeSettings, sockets: Sequence[socket.socket]) -> None:
    """Serve at these sockets until SIGTERM or Ctrl-C."""
    # uvicorn raises the signal anew once it is done: by the default the process would end before its folder is gone.
    signal.signal(signal.SIGTERM, _end)
    with server(model, tokenizer, settings) as made:
        uvicorn.Server(http_settings(made.app, settings)).run(list(sockets))


def _end(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what is open closes now
    sys.exit(_TERMINATED)


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
