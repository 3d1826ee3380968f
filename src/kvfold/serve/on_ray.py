"""A server on Ray Serve: a front that takes requests, and replicas that run the model, each with chats of its own.

A chat stays with one replica: its session's name, or its first messages, choose it among those that live. What a
replica has finished lies in a store that all of them share, so when it dies, others go on with its chats. Each replica
runs the whole application (app.py); the front passes requests on, bodies read. This file needs the extra `ray`.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import signal
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping, Sequence
from typing import Any

import ray
from fastapi import FastAPI, Request, Response
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.request_router import RequestRouter

from kvfold.errors import ModelError, in_one_line
from kvfold.hf.generation import Model, Tokenizer
from kvfold.serve.access import Access
from kvfold.serve.answers import event
from kvfold.serve.app import SESSION, bare_app, health, page
from kvfold.serve.arrival import Arrival
from kvfold.serve.folder import private_folder
from kvfold.serve.metrics import CONTENT_TYPE, summed
from kvfold.serve.refusal import Refusal
from kvfold.serve.run import GRACE_SECONDS, server
from kvfold.serve.scheduler import THREAD
from kvfold.serve.settings import ServeSettings

APP, CHATS = "kvfold", "chats"  # names in Ray
_TRIES = 3  # of a request whose replica dies before it says anything
_HEALTH_SECONDS = 3.0  # between two looks at whether a replica lives
_SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
_QUIET = {"log_level": "ERROR", "enable_access_log": False}  # of Ray: a line for each request says little

Load = Callable[[], tuple[Model, Tokenizer]]
Json = dict[str, Any]  # a message of ASGI, or the scope of a request


def key_of(session: str | None, raw: bytes) -> str:
    """Give what a request's chat is known by: its session's name, else its messages up to the first of the user.

    Requests without a chat are spread at random.
    """
    try:
        asked = json.loads(raw)
        session = session or (asked.get("metadata") or {}).get("session")
        messages = asked.get("messages") or ()
        beginning: Any = uuid.uuid4().hex
        for count, said in enumerate(messages, start=1):
            beginning = messages[:count]
            if said["role"] == "user":
                break
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):  # the replica says what is wrong
        beginning = repr(raw)
    return hashlib.sha256(json.dumps(session or beginning).encode()).hexdigest()


def ranked(key: str, replicas: Sequence[Any]) -> list[Any]:
    """Order replicas for a key. One that dies or comes moves the chats of no two others (rendezvous hashing)."""

    def weight(replica: Any) -> bytes:
        return hashlib.sha256(f"{key} {replica.replica_id.unique_id}".encode()).digest()

    return sorted(replicas, key=weight)


class StickyRouter(RequestRouter):
    """Chooses the replica of a chat among those that live. The key is the first argument of a call."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """List the replicas that may take a request, the best one first."""
        if pending_request is None:
            return [candidate_replicas]
        return [[replica] for replica in ranked(pending_request.args[0], candidate_replicas)]


class Replica:
    """One server without a port: it is handed requests, and gives the messages of its answers."""

    def __init__(self, load: Load, settings: ServeSettings) -> None:
        self._stack = contextlib.ExitStack()
        model, tokenizer = load()
        self._server = self._stack.enter_context(server(model, tokenizer, settings))
        self._server.scheduler.start()

    async def answer(self, key: str, scope: Json, raw: bytes) -> AsyncIterator[Json]:
        """Answer a request. A front that goes away ends the turn."""
        exchange = _Exchange(raw)
        running = asyncio.create_task(self._server.app(scope, exchange.receive, exchange.send))
        running.add_done_callback(exchange.end)
        try:
            async for message in exchange.messages():
                yield message
        finally:
            exchange.leave()
        await running

    def metrics(self) -> str:
        """Give this replica's numbers."""
        return self._server.metrics.text().decode()

    def check_health(self) -> None:
        """Raise where the model's thread is gone: Ray starts a replica anew then."""
        assert THREAD in {thread.name for thread in threading.enumerate()}, "the model's thread has ended"

    def __del__(self) -> None:
        """End what runs, when Ray stops a replica in peace."""
        self._stack.close()


class _Exchange:
    """One request and its answer, as ASGI has them. A message counts as sent once it was taken."""

    def __init__(self, raw: bytes) -> None:
        self._bodies = [{"type": "http.request", "body": raw, "more_body": False}]
        self._left = asyncio.Event()
        self._messages: asyncio.Queue[Json | None] = asyncio.Queue()

    async def receive(self) -> Json:
        if self._bodies:
            return self._bodies.pop()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if not self._left.is_set():
            self._messages.put_nowait(dict(message))
            await self._messages.join()

    async def messages(self) -> AsyncIterator[Json]:
        while (message := await self._messages.get()) is not None:
            yield message
            self._messages.task_done()

    def end(self, _: object) -> None:
        self._messages.put_nowait(None)

    def leave(self) -> None:
        """Take no more messages: whoever waits for one to be taken goes on."""
        self._left.set()
        while True:
            try:
                self._messages.task_done()
            except ValueError:  # all are done
                return


class Front:
    """Takes requests from the network and passes them on to the replica of their chat."""

    def __init__(self, chats: Any, settings: ServeSettings) -> None:
        self._chats = chats
        self._access, self._arrival = Access(settings.tokens), Arrival(settings)

    async def forward(self, request: Request) -> Response:
        """Pass a request on. Its replica may die before it says anything: then another one is asked."""
        self._access.owner(request.headers.get("Authorization"))
        raw = await self._arrival.read(request) if request.method == "POST" else b""
        key = key_of(request.headers.get(SESSION), raw)
        # Before version 2.4 an application listens for the client's going away, which a queue does not raise.
        scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
        scope |= {"asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": ""}
        for _ in range(_TRIES):
            answer = self._chats.options(stream=True).answer.remote(key, scope, raw)
            try:
                return _Relayed(await anext(answer), answer)
            except RayActorError:
                continue
        raise _died()

    async def metrics(self, request: Request) -> Response:
        """Give the numbers of all replicas, added up."""
        self._access.owner(request.headers.get("Authorization"))
        found = await self._chats.broadcast("metrics").results_async(return_exceptions=True)
        return Response(summed([text for text in found if isinstance(text, str)]), media_type=CONTENT_TYPE)


class _Relayed(Response):
    """An answer whose messages come from a replica."""

    def __init__(self, first: Json, others: Any) -> None:
        self._first, self._others = first, others
        self.background = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the messages; a stream whose replica dies ends with an event that says so."""
        headers = dict(self._first.get("headers", ()))
        try:
            await send(self._first)
            async for message in self._others:
                await send(message)
        except RayActorError:
            if not headers.get(b"content-type", b"").startswith(b"text/event-stream"):
                raise
            await send({"type": "http.response.body", "body": event(_died().body).encode(), "more_body": False})
        finally:
            self._others.cancel()  # a client that went away; nothing to what has ended


def front_app(chats: Any, settings: ServeSettings) -> FastAPI:
    """Make the front's application."""
    app, front = bare_app(settings), Front(chats, settings)
    app.get("/metrics")(front.metrics)
    app.get("/health")(health)
    app.get("/")(page)
    app.api_route("/{path:path}", methods=["GET", "POST"])(front.forward)
    return app


def application(load: Load, settings: ServeSettings, *, replicas: int, gpus: int) -> Any:
    """Make what Ray Serve runs. Memory is divided among the replicas."""
    share = dataclasses.replace(settings, memory_bytes=settings.memory_bytes // replicas, is_shared=True)

    def build() -> FastAPI:
        return front_app(serve.get_deployment_handle(CHATS, APP), settings)

    sticky: Any = StickyRouter  # Ray's annotation is narrower than what it takes
    common: Any = {"max_ongoing_requests": settings.connections, "logging_config": _QUIET}
    chats = serve.deployment(
        Replica,
        name=CHATS,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        request_router_config=RequestRouterConfig(request_router_class=sticky),
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=GRACE_SECONDS,
        **common,
    )
    front = serve.deployment(serve.ingress(build)(), name="front", ray_actor_options={"num_cpus": 0}, **common)
    return front.bind(chats.bind(load, share))


@contextlib.contextmanager
def on_ray(load: Load, settings: ServeSettings, *, replicas: int, gpus: int) -> Iterator[threading.Event]:
    """Serve with so many replicas, of so many GPUs each; give what SIGTERM and Ctrl-C set, once requests are answered.

    Raises ModelError where Ray or a replica does not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        folder = settings.store
        if folder is None:
            folder = stack.enter_context(private_folder())
        settings = dataclasses.replace(settings, store=folder.expanduser().absolute())
        stack.enter_context(_ray(replicas))
        over = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # only now: Ray's way to take them is to write out its stacks
            signal.signal(number, lambda *_: over.set())
        try:
            serve.start(http_options=HTTPOptions(host=settings.host, port=settings.port), logging_config=_QUIET)
            serve.run(application(load, settings, replicas=replicas, gpus=gpus), name=APP, logging_config=_QUIET)
        except RuntimeError as error:  # a replica's whole story; its last line says what is wrong
            last = str(error).strip().splitlines()[-1]
            raise ModelError(f"{replicas} replicas were to be started; {last}; see Ray's logs") from error
        yield over


@contextlib.contextmanager
def _ray(replicas: int) -> Iterator[None]:
    """Use the Ray at RAY_ADDRESS, or start one here; stop what was started. Raises ModelError where that fails."""
    is_theirs = "RAY_ADDRESS" in os.environ
    sizes = {} if is_theirs else {"num_cpus": max(replicas, os.cpu_count() or 1), "include_dashboard": False}
    try:
        ray.init(logging_level=logging.ERROR, **sizes)
    except Exception as error:  # Ray has no class for it
        raise ModelError(
            f"a server on Ray was asked for; Ray did not start ({in_one_line(error, 200)}); see RAY_ADDRESS"
        ) from error
    try:
        yield
    finally:
        if is_theirs:
            serve.delete(APP)
        else:
            serve.shutdown()
        ray.shutdown()


def _died() -> Refusal:
    return Refusal(503, "the replica of this chat died; the turn is undone; send it again", retry_seconds=5)
