"""The routes of a server: chat completions, completions, models, health, metrics and the page.

A request is read within limits, checked, and handed to the scheduler as a ticket; its events come back over an asyncio
queue. No file, model or plan that a request names is ever opened. Other sites' pages cannot ask: there is no CORS, and
bodies must be declared as JSON.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from kvfold.serve import body
from kvfold.serve.access import Access
from kvfold.serve.answers import Form, event
from kvfold.serve.arrival import JSON, Arrival
from kvfold.serve.held import hash_of
from kvfold.serve.listener import Listener
from kvfold.serve.metrics import CONTENT_TYPE, Metrics
from kvfold.serve.refusal import Refusal, refusal_of
from kvfold.serve.sampling import Sampling
from kvfold.serve.scheduler import Scheduler
from kvfold.serve.served import ServedModel
from kvfold.serve.sessions import Sessions
from kvfold.serve.settings import LOOPBACK, ServeSettings
from kvfold.serve.ticket import Asked, Ended, Failed, Piece

PAGE = Path(__file__).with_name("page.html")
SESSION = "X-Kvfold-Session"


def make_app(
    served: ServedModel, scheduler: Scheduler, sessions: Sessions, settings: ServeSettings, metrics: Metrics
) -> FastAPI:
    """Make the application. The scheduler starts and stops with it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.stop)

    app = bare_app(settings, lifespan)
    routes = Routes(served, scheduler, sessions, settings, metrics)
    app.post("/v1/chat/completions")(routes.chat)
    app.post("/v1/completions")(routes.complete)
    app.get("/v1/models")(routes.models)
    app.get("/v1/models/{name:path}")(routes.model)
    app.get("/metrics")(routes.metrics)
    app.get("/health")(health)
    app.get("/")(page)
    return app


def bare_app(settings: ServeSettings, lifespan: Any = None) -> FastAPI:
    """Make an application without routes, that answers errors in OpenAI's form, and local names only if it is local."""
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    if settings.is_local:  # a foreign name that leads here is some other site's trick
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]", "testserver"])
    for kind in (Exception, Refusal, HTTPException):
        app.add_exception_handler(kind, refused)
    return app


async def health() -> JSONResponse:
    """Say that the server answers."""
    return JSONResponse({"status": "ok"})


async def page() -> HTMLResponse:
    """Give the page: one file that loads nothing from anywhere."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
    headers = {"Content-Security-Policy": policy + "; frame-ancestors 'none'", "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)


class Routes:
    """What the routes of one server do."""

    def __init__(
        self,
        served: ServedModel,
        scheduler: Scheduler,
        sessions: Sessions,
        settings: ServeSettings,
        metrics: Metrics,
    ) -> None:
        self._served, self._scheduler, self._settings, self._metrics = served, scheduler, settings, metrics
        self._sessions = sessions
        self._access = Access(settings.tokens)
        self._arrival = Arrival(settings)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        owner = self._owner(request)
        asked = body.read(await self._arrival.read(request), body.ChatBody)
        self._refuse_other_model(asked.model)
        messages = tuple(said.message() for said in asked.messages)
        if messages[-1].role != "user" or not messages[-1].content.strip():
            truth = (
                f"the last one is of {messages[-1].role}" if messages[-1].content.strip() else "the last one is empty"
            )
            raise Refusal(400, f"messages were given; {truth}; end with what the user says", param="messages")
        name = request.headers.get(SESSION) or (asked.metadata or {}).get("session")
        session = self._sessions.claim(hash_of(name), owner) if name else None
        return await self._answer(request, asked, Asked(
            owner=owner, messages=messages, session=session, sampling=_sampling(asked),
            stops=asked.stops, longest=asked.longest, wants_kept=bool(asked.kvfold and asked.kvfold.kept),
        ))  # fmt: skip

    async def complete(self, request: Request) -> Response:
        """Go on from a prompt. Nothing of it is held afterwards."""
        owner = self._owner(request)
        asked = body.read(await self._arrival.read(request), body.CompletionBody)
        self._refuse_other_model(asked.model)
        return await self._answer(request, asked, Asked(
            owner=owner, prompt=asked.text, sampling=_sampling(asked), stops=asked.stops, longest=asked.longest
        ))  # fmt: skip

    async def models(self, request: Request) -> JSONResponse:
        """List the one model."""
        self._owner(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request, name: str) -> JSONResponse:
        """Describe the model."""
        self._owner(request)
        self._refuse_other_model(name)
        return JSONResponse(self._card())

    async def metrics(self, request: Request) -> Response:
        """Give numbers for Prometheus."""
        self._owner(request)
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    # Inside -----------------------------------------------------------------------------------------------------

    def _owner(self, request: Request) -> str:
        return self._access.owner(request.headers.get("Authorization"))

    def _card(self) -> dict[str, Any]:
        plan = str(self._served.plan)
        return {"id": self._served.name, "object": "model", "created": 0, "owned_by": "kvfold", "plan": plan}

    def _refuse_other_model(self, name: str) -> None:
        if name != self._served.name:
            message = f"the model {name!r} was asked for; this server has {self._served.name!r}; ask for that one"
            raise Refusal(404, message, code="model_not_found", param="model")

    async def _answer(self, request: Request, said: body.ChatBody | body.CompletionBody, asked: Asked) -> Response:
        is_chat = asked.prompt is None
        form = Form(
            self._served.name,
            is_chat=is_chat,
            text_of=self._served.text_of,
            tells_chances=asked.sampling.chances is not None,
        )
        listener = Listener(asked, closed=self._scheduler.look)
        self._scheduler.submit(listener.ticket)
        first = await listener.next(request)  # what is refused has a status of its own, streamed or not
        if isinstance(first, Failed):
            raise first.refusal
        if said.stream:
            events = _streamed(listener, first, form, is_chat=is_chat, wants_usage=said.wants_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        pieces, heard = [], first
        while isinstance(heard, Piece):
            pieces.append(heard)
            heard = await listener.next(request)
        if isinstance(heard, Failed):
            raise heard.refusal
        return JSONResponse(form.whole(pieces, heard), background=BackgroundTask(listener.close))


async def _streamed(
    listener: Listener, first: Piece | Ended, form: Form, *, is_chat: bool, wants_usage: bool
) -> AsyncIterator[str]:
    """Write the events of a stream. A client that goes away closes it, and with it the turn."""
    try:
        if is_chat:
            yield event(form.first())
        heard: Any = first
        while isinstance(heard, Piece):
            yield event(form.piece(heard))
            heard = await listener.next()
        if isinstance(heard, Failed):
            yield event(heard.refusal.body)
            return
        yield event(form.last(heard))
        if wants_usage:
            yield event(form.usage(heard))
        yield event("[DONE]")
    finally:
        listener.close()


def _sampling(asked: body.ChatBody | body.CompletionBody) -> Sampling:
    return Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=asked.seed,
        chances=asked.chances,
    )


async def refused(request: Request, error: Exception) -> Response:
    """Give an error in OpenAI's form."""
    if isinstance(error, HTTPException):
        error = Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    refusal = refusal_of(error)
    return Response(json.dumps(refusal.body), refusal.status, refusal.headers, JSON)
