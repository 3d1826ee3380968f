"""A server of the shipped tiny model on a free port of this machine, in a thread, and the official client for it."""

import contextlib
import threading
import time
from dataclasses import dataclass

import pytest
import uvicorn
from openai import OpenAI

import kvfold
from kvfold.serve.run import Server, http_settings, server
from kvfold.serve.settings import ServeSettings

PLAN = "snapkv(keep=0.5)"


@dataclass
class Address:
    """Where a server answers."""

    url: str

    def client(self, token: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=0, timeout=60)


@dataclass
class Running(Address):
    """A server in this process."""

    made: Server

    @property
    def shelf(self):
        return self.made.shelf

    def rest(self, seconds: float = 20.0) -> None:
        """Wait until nothing runs."""
        end = time.monotonic() + seconds
        while self.made.scheduler.load != (0, 0) and time.monotonic() < end:
            time.sleep(0.02)
        assert self.made.scheduler.load == (0, 0)


@pytest.fixture(scope="session")
def tiny():
    return kvfold.load("tiny")


@pytest.fixture(scope="session")
def serving(tiny):
    """Start a server with these settings, of another model where one is given; it stops with the `with`."""

    @contextlib.contextmanager
    def start(model=None, **settings):
        model, tokenizer = model or tiny
        chosen = ServeSettings(model="tiny", **{"plan": PLAN, "least": 0, "port": 0, **settings})
        with server(model, tokenizer, chosen) as made:
            config = http_settings(made.app, chosen)
            config.timeout_graceful_shutdown = 2
            process = uvicorn.Server(config)
            thread = threading.Thread(target=process.run)
            thread.start()
            while not process.started:
                assert thread.is_alive()
                time.sleep(0.01)
            port = process.servers[0].sockets[0].getsockname()[1]
            try:
                yield Running(url=f"http://127.0.0.1:{port}", made=made)
            finally:
                process.should_exit = True
                thread.join()

    return start


@pytest.fixture(scope="module")
def running(serving):
    with serving() as one:
        yield one


@pytest.fixture
def say(running):
    """Ask the server, greedily."""
    return sayer(running)


def sayer(running, token="none"):
    client = running.client(token)

    def say(messages, **settings):
        settings = {"temperature": 0, "max_tokens": 8, **settings}
        return client.chat.completions.create(model="tiny", messages=messages, **settings)

    return say


def user(text):
    return {"role": "user", "content": text}


def assistant(answer):
    return {"role": "assistant", "content": answer.choices[0].message.content}
