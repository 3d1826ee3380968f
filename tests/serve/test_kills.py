"""kill -9 at random moments under load: every turn whose reply was complete is there after the restart.

KVFOLD_FAULTS=20 (`make faults`) kills thirty times.
"""

import concurrent.futures
import contextlib
import json
import os
import random
import time
from dataclasses import dataclass, field

import httpx2
import pytest

from serve.conftest import user
from serve.process import process

KILLS = 2 if os.environ.get("KVFOLD_FAULTS", "1") == "1" else 30
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix")
TURNS = 10  # of a conversation, before the client begins another one


@dataclass
class Talk:
    """A conversation as its client knows it: it changes with every reply that came to its end, and with no other."""

    name: str
    is_streamed: bool
    messages: list = field(default_factory=list)
    seen: int = 0  # tokens, as the newest complete reply says
    number: int = 0  # of the conversation
    replies: int = 0  # that were complete

    def go_on(self, url) -> None:
        """Take turns until the server is gone."""
        with contextlib.suppress(httpx2.HTTPError):
            while True:
                self.turn(url)

    def turn(self, url) -> None:
        """Say something: what was read before must be there."""
        if len(self.messages) >= 2 * TURNS:
            self.messages, self.seen, self.number = [], 0, self.number + 1
        said = user(f"{self.name}, conversation {self.number}, turn {len(self.messages)}: where does {self.name} live?")
        session = {"session": f"{self.name} {self.number}"}
        body = {"model": "tiny", "messages": [*self.messages, said], "max_tokens": 6, "temperature": 0}
        text, cached, seen = self.ask(f"{url}/v1/chat/completions", {**body, "metadata": session})
        assert cached == self.seen, "what a complete turn has read was not held"
        self.messages = [*body["messages"], {"role": "assistant", "content": text}]
        self.seen = seen
        self.replies += 1

    def ask(self, url, body):
        """The reply, the tokens that were held for it, and those that are held after it."""
        if not self.is_streamed:
            answer = httpx2.post(url, json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            whole = answer.json()
            return whole["choices"][0]["message"]["content"], cached_in(whole), whole["kvfold"]["tokens_seen"]
        asked = body | {"stream": True, "stream_options": {"include_usage": True}}
        with httpx2.stream("POST", url, json=asked, timeout=60) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines[-1] == "[DONE]", lines
        *pieces, last, usage = map(json.loads, lines[:-1])
        text = "".join(piece["choices"][0]["delta"]["content"] for piece in pieces)
        return text, cached_in(usage), last["kvfold"]["tokens_seen"]


def cached_in(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def spoil(folder, number) -> None:
    """Lay a file into the store that is cut short, as a disk that fails may leave it."""
    whole = next(folder.rglob("*.kvfold")).read_bytes()
    (folder / "anyone").mkdir(exist_ok=True)
    (folder / "anyone" / f"{number:032x}.kvfold").write_bytes(whole[: len(whole) // 2])


@pytest.mark.slow
def test_every_complete_turn_is_there_after_each_kill(tmp_path):
    chosen = random.Random(0)
    store = tmp_path / "store"
    talks = [Talk(name, is_streamed=number % 2 == 0) for number, name in enumerate(NAMES)]
    for _ in range(KILLS):
        with (
            process(tmp_path / "log", "--store", str(store)) as server,
            concurrent.futures.ThreadPoolExecutor(len(talks)) as pool,
        ):
            running = [pool.submit(talk.go_on, server.url) for talk in talks]
            time.sleep(chosen.uniform(0.1, 2.0))
            server.kill()
            for one in running:
                one.result()
    replies = sum(talk.replies for talk in talks)
    assert replies > KILLS
    assert not list(store.rglob("*.damaged"))
    spoil(store, 7)
    with process(tmp_path / "log", "--store", str(store)) as server:
        for talk in talks:
            talk.turn(server.url)
        (line,) = server.log.read_text().splitlines()[1:]
        assert "set aside" in line
    (damaged,) = store.rglob("*.damaged")
    assert damaged.name.startswith(f"{7:032x}")
    print(f"{KILLS} kills, {replies} complete replies, none lost")
