import time

import pytest
from stub_judge import be_silent, hang_up, refuse, say, stub_judge

from kvfold.bench.judging.endpoint import Endpoint
from kvfold.bench.judging.rubric import rating
from kvfold.errors import SuiteError

QUESTION = [{"role": "system", "content": "Grade."}, {"role": "user", "content": "Ünïcode, please"}]


def endpoint(judge, **settings):
    return Endpoint(**{"url": judge.url, "model": "wise", "pause_seconds": 0.0, "limit_seconds": 10.0, **settings})


def test_it_asks_the_named_model_for_a_chat_completion_without_chance(judge):
    assert endpoint(judge).ask(QUESTION, rating) == 7.0
    assert judge.asked == [{"model": "wise", "messages": QUESTION, "temperature": 0, "path": "/v1/chat/completions"}]


def test_a_full_address_is_taken_as_it_is(judge):
    assert endpoint(judge, url=judge.url + "/chat/completions").ask(QUESTION, rating) == 7.0
    assert judge.asked[0]["path"] == "/v1/chat/completions"


def test_the_key_comes_from_the_environment_and_is_in_no_error(judge, monkeypatch):
    endpoint(judge).ask(QUESTION, rating)
    monkeypatch.setenv("KVFOLD_JUDGE_KEY", "secret-123\n")
    endpoint(judge).ask(QUESTION, rating)
    assert judge.keys == [None, "Bearer secret-123"]
    judge.answers = [refuse(401, "who are you?")]
    with pytest.raises(SuiteError, match=r"refuses with 401 .*who are you.*KVFOLD_JUDGE_KEY") as caught:
        endpoint(judge).ask(QUESTION, rating)
    assert "secret-123" not in str(caught.value)


@pytest.mark.parametrize(
    "trouble",
    [refuse(429), refuse(500), refuse(503), hang_up, say(b"<html>"), say(b'{"choices": []}'), "I would rather not."],
    ids=["429", "500", "503", "hang up", "html", "no choice", "no rating"],
)
def test_what_may_pass_is_tried_again(judge, trouble):
    judge.answers = [trouble, trouble, "Rating: [[3]]"]
    assert endpoint(judge, tries=3).ask(QUESTION, rating) == 3.0
    assert len(judge.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_what_will_not_pass_is_said_at_once(judge, status):
    judge.answers = [refuse(status, "unknown model")]
    with pytest.raises(SuiteError, match=f"refuses with {status} .*unknown model"):
        endpoint(judge).ask(QUESTION, rating)
    assert len(judge.asked) == 1


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (refuse(503, "busy"), "503.*busy"),
        (say(b"<html>hello"), "<html>hello.*no chat completion"),
        (say(b'{"choices": [{"message": {"content": null}}]}'), "holds no text"),
        ("Lovely weather.", "'Lovely weather.', which holds no rating"),
        ("Rating: [[11]]", "holds no rating"),
        (hang_up, "connection broke|could not be reached"),
    ],
)
def test_the_last_failure_is_one_clear_line(judge, trouble, words):
    judge.answers = [trouble]
    with pytest.raises(
        SuiteError, match=f"(?s)wise at http.* was asked 2 times; .*({words}).*judgements are kept"
    ) as c:
        endpoint(judge, tries=2).ask(QUESTION, rating)
    assert "\n" not in str(c.value)
    assert len(judge.asked) == 2


def test_silence_ends_after_the_limit(judge):
    judge.answers = [be_silent(1.0)]
    with pytest.raises(SuiteError, match=r"said nothing for 0\.2 seconds"):
        endpoint(judge, tries=2, limit_seconds=0.2).ask(QUESTION, rating)


def test_nobody_there_is_said():
    with pytest.raises(SuiteError, match="could not be reached"):
        Endpoint(url="http://127.0.0.1:9", model="wise", tries=1).ask(QUESTION, rating)


def test_pauses_double_and_a_server_may_ask_for_longer_ones(judge, monkeypatch):
    from kvfold.bench.judging import endpoint as module

    pauses = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    judge.answers = [refuse(500), refuse(429, Retry_After="9"), refuse(500), refuse(429, Retry_After="7200"), "[[5]]"]
    assert endpoint(judge, tries=5, pause_seconds=0.5).ask(QUESTION, rating) == 5.0
    assert pauses == [0.5, 9.0, 2.0, 60.0]


@pytest.mark.parametrize(
    "settings", [{"url": "localhost:8000"}, {"tries": 0}, {"limit_seconds": 0.0}, {"pause_seconds": -1.0}]
)
def test_an_endpoint_that_cannot_work_is_refused(judge, settings):
    with pytest.raises(SuiteError, match="give"):
        endpoint(judge, **settings)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_carries_no_key_anywhere(judge, monkeypatch, status):
    monkeypatch.setenv("KVFOLD_JUDGE_KEY", "secret-123")
    with stub_judge() as other:
        judge.answers = [refuse(status, Location=other.url + "/chat/completions?key=secret-123")]
        with pytest.raises(SuiteError, match=f"refuses with {status} .*where no key is sent") as caught:
            endpoint(judge).ask(QUESTION, rating)
        assert other.asked == []
    assert "secret-123" not in str(caught.value)


@pytest.mark.parametrize("trouble", [refuse(503, "key secret-123"), refuse(401, "key secret-123"), "not secret-123",
                                     say(b"secret-123")])  # fmt: skip
def test_a_key_that_is_echoed_is_masked(judge, monkeypatch, trouble):
    monkeypatch.setenv("KVFOLD_JUDGE_KEY", "secret-123")
    judge.answers = [trouble]
    with pytest.raises(SuiteError, match=r"\*\*\*") as caught:
        endpoint(judge, tries=1).ask(QUESTION, rating)
    assert "secret-123" not in str(caught.value)


@pytest.mark.parametrize("key", ["two\nlines", "a b", "schlüssel"])
def test_a_key_that_is_none_is_refused_without_showing_it(judge, monkeypatch, key):
    monkeypatch.setenv("KVFOLD_JUDGE_KEY", key)
    with pytest.raises(SuiteError, match="give it as it is") as caught:
        endpoint(judge).ask(QUESTION, rating)
    assert key not in str(caught.value)
    assert judge.asked == []


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://" + "a" * 5000, "http://a..b/v1", "http://x:99999/"])
def test_addresses_that_cannot_be_are_one_line(url):
    with pytest.raises(SuiteError) as caught:
        Endpoint(url=url, model="wise", tries=1, limit_seconds=2.0).ask(QUESTION, rating)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def pour(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" " * (1 << 18))


@pytest.mark.parametrize(("trouble", "words"), [
    (drip, "not whole after"), (pour, "longer than"), (say(b"[" * 100_000), "no chat completion"),
])  # fmt: skip
def test_an_answer_is_bounded_in_time_size_and_depth(judge, trouble, words):
    judge.answers = [trouble]
    with pytest.raises(SuiteError, match=words):
        endpoint(judge, tries=1, limit_seconds=0.8).ask(QUESTION, rating)
