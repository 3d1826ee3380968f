"""The plain values of a server: sizes, stop strings in pieces, keys of conversations, bytes that are shared."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.data import Message
from kvfold.errors import DataError, PlanError
from kvfold.serve.held import keys_of
from kvfold.serve.holdings import Holdings
from kvfold.serve.refusal import Refusal, refusal_of
from kvfold.serve.sampling import Sampler, Sampling
from kvfold.serve.settings import bytes_from
from kvfold.serve.stops import StopText


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000000", 10**6), ("512MB", 512 * 10**6), (" 2 gb", 2 * 10**9), ("1.5GiB", 3 << 29), ("7B", 7)],
)
def test_sizes_are_read(text, size):
    assert bytes_from(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2TBs", "lots", "nan", "infGB", "1e99"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(DataError, match="no number of bytes"):
        bytes_from(text)


@settings(deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_text_is_cut_at_the_first_stop_string_however_it_comes_in_pieces(text, stops, size):
    stopped = StopText(stops)
    given_out = "".join(stopped.add(text[start : start + size]) for start in range(0, len(text), size))
    given_out += stopped.rest()
    # Pieces are looked through as they come: the one that ends first is found, of those in one piece the first.
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    assert stopped.is_found == bool(ends)
    assert text.startswith(given_out)
    assert given_out == stopped.text
    assert not any(stop in given_out for stop in stops)
    if not ends:
        assert given_out == text


def test_keys_tell_every_beginning_of_a_conversation_apart():
    one = [Message(role="user", content="a"), Message(role="assistant", content="b")]
    two = [Message(role="user", content="ab"), Message(role="assistant", content="")]
    assert keys_of(one)[:1] == keys_of(one[:1])
    assert len({*keys_of(one), *keys_of(two), *keys_of([Message(role="system", content="a")])}) == 5


def test_shared_storages_are_counted_once_until_the_last_holder_is_gone():
    holdings = Holdings(100)
    holdings.add({1: 30, 2: 10})
    holdings.add({1: 30, 3: 5})
    holdings.promised_bytes = 20
    assert (holdings.held_bytes, holdings.free_bytes) == (45, 35)
    holdings.remove({1: 30, 2: 10})
    assert holdings.held_bytes == 35
    holdings.remove({1: 30, 3: 5})
    assert holdings.held_bytes == 0


def test_tokens_are_drawn_by_their_chances_within_top_p():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    sampler = Sampler(Sampling(seed=1))
    drawn = torch.tensor([sampler.draw(logits)[0] for _ in range(3000)]).bincount(minlength=3) / 3000
    assert (drawn - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.05
    narrow = Sampler(Sampling(seed=1, top_p=0.6))
    assert {narrow.draw(logits)[0] for _ in range(200)} == {0, 1}
    token, chance = Sampler(Sampling(temperature=0, chances=2)).draw(logits)
    assert token == 0
    assert chance is not None
    assert math.isclose(chance.logprob, math.log(0.5), rel_tol=1e-5)
    assert [one for one, _ in chance.likeliest] == [0, 1]


@pytest.mark.parametrize(
    "cold", [{"temperature": 1e-40}, {"temperature": 1e-38}, {"temperature": 5e-324}, {"top_p": 0.0}]
)
def test_what_is_as_cold_as_can_be_takes_the_likeliest_token(cold):
    logits = torch.tensor([30.0, 29.0, 2.0])
    sampler = Sampler(Sampling(seed=1, **cold))
    assert {sampler.draw(logits)[0] for _ in range(20)} == {0}


def test_an_error_of_ours_tells_nothing_of_the_inside():
    assert refusal_of(PlanError("a; b;\n c")).body["error"]["message"] == "a; b; c"
    assert refusal_of(PlanError("x")).status == 400
    inside = refusal_of(RuntimeError("secret text of a chat"))
    assert inside.status == 500
    assert "secret" not in str(inside.body)
    later = Refusal(429, "later", retry_seconds=5)
    assert later.headers == {"Retry-After": "5"}
