"""Who may ask, and what of others nobody learns: tokens, sessions, other sites' pages, bodies that are no requests."""

import http.client
import json
import socket
import urllib.error
import urllib.request

import openai
import pytest

from kvfold.errors import DataError
from kvfold.serve.access import Access, read_tokens
from kvfold.serve.refusal import Refusal
from kvfold.serve.settings import ServeSettings
from serve.conftest import assistant, sayer, user

ANNA, BEN = "anna-token", "ben-token-2"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def guarded(serving):
    with serving(tokens=(ANNA, BEN), body_bytes=10_000, body_seconds=0.5) as one:
        yield one


def ask(running, data, *, token=ANNA, path="/v1/chat/completions", **headers):
    """Status, body and headers of a request as it is sent by hand."""
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}", **headers}
    request = urllib.request.Request(running.url + path, raw, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("header", [None, "Bearer wrong-token", "Bearer", ANNA, f"Basic {ANNA}", "Bearer \xff\xfe"])
def test_a_request_without_a_known_token_is_refused(guarded, path, header):
    status, body, headers = ask(guarded, CHAT, path=path, Authorization=header or "")
    assert status == 401
    assert body["error"]["type"] == "authentication_error"
    assert headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/metrics"])
def test_what_is_only_read_asks_for_a_token_too(guarded, path):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(guarded.url + path)


def test_health_and_the_page_need_none(guarded):
    for path in ("/health", "/"):
        assert urllib.request.urlopen(guarded.url + path).status == 200


def test_one_clients_chat_is_never_matched_for_another(guarded):
    messages = [user("The code of the blue door is 4711.")]
    first = sayer(guarded, ANNA)(messages)
    messages += [assistant(first), user("What is the code?")]
    assert sayer(guarded, BEN)(messages).usage.prompt_tokens_details.cached_tokens == 0
    assert sayer(guarded, ANNA)(messages).usage.prompt_tokens_details.cached_tokens > 0


def test_another_clients_session_is_refused_and_ones_own_forgives_trimmed_space(guarded):
    say = sayer(guarded, ANNA)
    messages = [user("Anna lives in Turin.  ")]
    first = say(messages, metadata={"session": "door"})
    with pytest.raises(openai.PermissionDeniedError) as caught:
        sayer(guarded, BEN)(messages, extra_headers={"X-Kvfold-Session": "door"})
    assert caught.value.code == "session_not_yours"
    trimmed = [user("Anna lives in Turin."), assistant(first), user("Where?")]
    assert say(trimmed).usage.prompt_tokens_details.cached_tokens == 0
    named = say(trimmed, extra_headers={"X-Kvfold-Session": "door"})
    assert named.usage.prompt_tokens_details.cached_tokens == first.kvfold["tokens_seen"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[" * 5000, "no JSON"),
        (b'{"messages": "\xff"}', "no JSON"),
        (b'"\\ud800"', "no JSON"),
        (b"[]", "valid dictionary"),
        ({}, "model"),
        ({"model": "tiny"}, "messages"),
        ({**CHAT, "messages": []}, "messages"),
        ({**CHAT, "messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({**CHAT, "messages": [{"role": "assistant", "content": "x"}]}, "end with what the user says"),
        ({**CHAT, "messages": [{"role": "user", "content": "  "}]}, "is empty"),
        ({**CHAT, "temperature": -1}, "temperature"),
        ({**CHAT, "temperature": "hot"}, "temperature"),
        ({**CHAT, "top_p": -0.1}, "top_p"),
        ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is read"),
        ({**CHAT, "n": True}, "n"),
        ({**CHAT, "best_of": True}, "best_of"),
        ({**CHAT, "best_of": 2}, "best_of"),
        ({**CHAT, "echo": True}, "echo"),
        ({**CHAT, "presence_penalty": 1}, "presence_penalty"),
        ({**CHAT, "frequency_penalty": 1.0}, "frequency_penalty"),
        ({**CHAT, "max_tokens": 0}, "max_tokens"),
        ({**CHAT, "n": 2}, "n"),
        ({**CHAT, "stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({**CHAT, "stop": ""}, "stop"),
        ({**CHAT, "seed": 2**70}, "seed"),
        ({**CHAT, "top_logprobs": 99}, "top_logprobs"),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools"),
        ({**CHAT, "logit_bias": {"5": 1}}, "logit_bias"),
        ({**CHAT, "presence_penalty": 0.5}, "presence_penalty"),
        ({**CHAT, "response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_a_body_that_asks_for_nothing_possible_is_refused_in_one_line(guarded, data, says):
    status, body, _ = ask(guarded, data)
    assert status == 400
    assert says in body["error"]["message"]
    assert "\n" not in body["error"]["message"]


def test_what_changes_nothing_is_ignored(guarded):
    extra = {"user": "anna", "store": False, "n": 1, "tools": [], "presence_penalty": 0, "frequency_penalty": 0.0}
    extra |= {"suffix": "", "echo": False, "best_of": 1, "modalities": ["text"], "top_p": 0}
    status, _, _ = ask(guarded, {**CHAT, **extra, "parallel_tool_calls": True, "response_format": {"type": "text"}})
    assert status == 200


def test_bodies_too_long_too_slow_or_of_another_type_are_refused(guarded):
    assert ask(guarded, b" " * 20_000)[0] == 413
    assert ask(guarded, CHAT, **{"Content-Type": "text/plain"})[0] == 415
    host, port = guarded.url.removeprefix("http://").split(":")
    slow = http.client.HTTPConnection(host, int(port), timeout=10)
    slow.putrequest("POST", "/v1/chat/completions")
    for name, value in (("Content-Type", "application/json"), ("Authorization", f"Bearer {ANNA}")):
        slow.putheader(name, value)
    slow.putheader("Content-Length", "50")
    slow.endheaders(b"{")
    assert slow.getresponse().status == 408
    slow.close()


def test_a_foreign_name_that_leads_here_and_another_sites_page_get_nothing(guarded):
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert b" 400 " in raw.recv(1000).split(b"\r\n")[0]
    _, _, headers = ask(guarded, CHAT, Origin="https://evil.example")
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_an_address_that_others_reach_needs_tokens():
    with pytest.raises(DataError, match="give --token-file"):
        ServeSettings(model="tiny", host="0.0.0.0")
    assert not ServeSettings(model="tiny", host="0.0.0.0", tokens=(ANNA,)).is_local


def test_tokens_are_read_one_a_line(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"# clients\n{ANNA}\n\n  # and one more\n  {BEN}\n")
    assert read_tokens(path) == (ANNA, BEN)
    access = Access(read_tokens(path))
    assert access.owner(f"Bearer {ANNA}") != access.owner(f"bearer {BEN}")
    assert ANNA not in access.owner(f"Bearer {ANNA}")
    with pytest.raises(Refusal):
        access.owner("Bearer anna-toke")
    path.write_text("short\n")
    with pytest.raises(DataError, match="8 characters"):
        read_tokens(path)
