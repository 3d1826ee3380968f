"""A server on a Ray of this machine: two replicas, each with chats of its own, one store; replicas are killed."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from fastapi.testclient import TestClient

pytest.importorskip("ray.serve", reason="the extra ray is not installed; `make setup` brings it", exc_type=ImportError)

from ray.exceptions import RayActorError

from kvfold.serve.metrics import summed
from kvfold.serve.on_ray import Replica, front_app, key_of, ranked
from kvfold.serve.settings import ServeSettings
from serve.conftest import PLAN, assistant, sayer, user
from serve.process import process

CHATS = 12  # that one replica of two gets all of them happens once in 2,000 times
START_SECONDS = 300


def body(*messages, **fields):
    return json.dumps({"model": "tiny", "messages": list(messages), "temperature": 0, "max_tokens": 4, **fields})


def test_a_chat_keeps_its_key_and_a_session_has_one_whatever_is_said():
    first, more = user("Hello"), [user("Hello"), {"role": "assistant", "content": "Hi."}, user("And?")]
    system = {"role": "system", "content": "Be brief."}
    assert key_of(None, body(first).encode()) == key_of(None, body(*more).encode())
    assert key_of(None, body(system, first).encode()) != key_of(None, body(first).encode())
    assert key_of(None, body(system, first).encode()) != key_of(None, body(system, user("Bye")).encode())
    named = key_of("anna", body(first).encode())
    assert named == key_of(None, body(user("Bye"), metadata={"session": "anna"}).encode())
    assert key_of(None, b"") != key_of("", b'{"prompt": "Once"}')
    for hostile in (b"{", b"[" * 9000, b"null", b'{"messages": 3}', b'{"messages": [[]], "metadata": []}', b"\xff"):
        assert len(key_of(None, hostile)) == 64


def test_a_replica_that_goes_or_comes_moves_no_chat_between_the_others():
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in ("one", "two", "three")]
    for number in range(50):
        order = ranked(str(number), replicas)
        for gone in replicas:
            assert ranked(str(number), [one for one in replicas if one is not gone]) == [
                one for one in order if one is not gone
            ]
    assert len({id(ranked(str(number), replicas)[0]) for number in range(50)}) == 3


def test_numbers_of_replicas_are_added_up():
    one = '# TYPE a counter\na{end="stop"} 1.0\n# TYPE a_created gauge\na_created{end="stop"} 7.0\n'
    other = (
        '# TYPE a counter\na{end="stop"} 2.0\na{end="gone"} 5.0\n# TYPE a_created gauge\na_created{end="stop"} 6.0\n'
    )
    added = (
        '# TYPE a counter\na{end="stop"} 3.0\na{end="gone"} 5.0\n# TYPE a_created gauge\na_created{end="stop"} 6.0\n'
    )
    assert summed([one, other]) == added
    assert summed([]) == ""


class Handle:
    """Stands for Ray's handle of the replicas: one that is here, and that dies at these messages of its answers."""

    def __init__(self, replica, *deaths):
        self.answer = SimpleNamespace(remote=self._remote)
        self._replica, self._deaths = replica, list(deaths)

    def options(self, *, stream):
        assert stream
        return self

    def _remote(self, key, scope, raw):
        return Answer(self._replica.answer(key, scope, raw), self._deaths.pop(0) if self._deaths else None)


class Answer:
    def __init__(self, messages, death):
        self._messages, self._death, self._count = messages, death, 0

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._count == self._death:
            await self._messages.aclose()
            raise RayActorError
        self._count += 1
        return await anext(self._messages)

    def cancel(self):
        pass


@pytest.fixture
def replica(tiny, tmp_path):
    one = Replica(lambda: tiny, settings(store=tmp_path, is_shared=True))
    yield one
    del one


def settings(**chosen):
    return ServeSettings(model="tiny", **{"plan": PLAN, "least": 0, "reply_tokens": 8, **chosen})


JSON = {"Content-Type": "application/json"}


def test_a_request_whose_replica_dies_before_it_answers_is_asked_of_another(replica):
    whole = TestClient(front_app(Handle(replica), settings())).post(
        "/v1/chat/completions", content=body(user("Hello")), headers=JSON
    )
    assert whole.status_code == 200
    client = TestClient(front_app(Handle(replica, 0, 0), settings()))
    again = client.post("/v1/chat/completions", content=body(user("Hello")), headers=JSON)
    assert again.json()["choices"] == whole.json()["choices"]
    client = TestClient(front_app(Handle(replica, 0, 0, 0), settings()))
    refused = client.post("/v1/chat/completions", content=body(user("Hello")), headers=JSON)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")


def test_a_stream_whose_replica_dies_ends_with_an_event_that_says_so(replica):
    client = TestClient(front_app(Handle(replica, 3), settings()))
    answer = client.post("/v1/chat/completions", content=body(user("Hello"), stream=True), headers=JSON)
    *_, last = answer.text.strip().split("\n\n")
    assert "the replica of this chat died" in json.loads(last.removeprefix("data: "))["error"]["message"]


def test_the_front_asks_for_tokens_and_bounds_bodies_before_any_replica_is_asked():
    client = TestClient(front_app(None, settings(tokens=("anna-token",), body_bytes=100)))
    assert client.post("/v1/chat/completions", content=body(user("Hello")), headers=JSON).status_code == 401
    known = {**JSON, "Authorization": "Bearer anna-token"}
    assert client.post("/v1/chat/completions", content=b" " * 101, headers=known).status_code == 413
    assert client.get("/metrics").status_code == 401
    assert client.get("/health").status_code == 200


def replicas_of(driver):
    """The processes of the replicas that a server has: Ray names them, and they descend from it."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name = (path / "cmdline").read_bytes()
            if name.startswith(b"ray::ServeReplica:kvfold:chats") and driver in ancestors(int(path.name)):
                found.append(int(path.name))
        except OSError:  # it has ended
            continue
    return sorted(found)


def ancestors(pid):
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid


def number(one, name):
    lines = httpx2.get(f"{one.url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def wait_until(is_so):
    end = time.monotonic() + START_SECONDS
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.ray
def test_sessions_go_on_with_what_was_read_when_their_replica_is_killed(tmp_path):
    options = ("--ray", "--replicas", "2", "--store", str(tmp_path / "store"))
    with process(tmp_path / "log", *options) as one:
        wait_until(lambda: "2 replicas on Ray" in one.log.read_text())
        say = sayer(one)
        talks = {f"chat {i}": [user(f"Parcel {i} is for Anna, who lives in Turin.")] for i in range(CHATS)}
        seen = dict.fromkeys(talks, 0)

        def go_on():
            for name, messages in talks.items():
                answer = say(messages, metadata={"session": name})
                assert answer.usage.prompt_tokens_details.cached_tokens == seen[name]
                seen[name] = answer.kvfold["tokens_seen"]
                talks[name] += [assistant(answer), user("Whose is it?")]

        go_on()
        assert number(one, "kvfold_folds_total") == CHATS
        before = replicas_of(one.pid)
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        go_on()
        left = number(one, "kvfold_folds_total") - CHATS
        assert 0 < left < CHATS, "each of the two had chats"
        wait_until(lambda: len(replicas_of(one.pid)) == 2 and not {before[0]} & {*replicas_of(one.pid)})
        go_on()
        go_on()
