"""Turns that are begun at once on one chat: one is taken, the others say so, and nothing of them is left."""

import threading

import pytest

from kvfold.errors import CacheError, FileError
from kvfold.memory.tail import Tail

SAYS = ("Where does Anna live?", "And the cat?")


def test_two_iterators_that_were_begun_before_either_was_read(begin):
    chat, calm = begin("snapkv(keep=0.5)"), begin("snapkv(keep=0.5)")
    first, second = (chat.send(text) for text in SAYS)
    pieces = [next(first)]
    with pytest.raises(CacheError, match="in the middle of a turn"):
        next(second)
    pieces += list(first)
    assert "".join(pieces) == calm.reply(SAYS[0])
    assert chat.reply(SAYS[1]) == calm.reply(SAYS[1])
    assert chat.ids == calm.ids


def test_of_turns_in_threads_one_is_taken_and_the_chat_is_as_if_it_had_been_alone(begin):
    chat, gate = begin("int8"), threading.Barrier(6)
    replies, refused, other = {}, [], []

    def say(number):
        gate.wait()
        try:
            replies[number] = chat.reply(f"{SAYS[0]} {number}")
        except CacheError as error:
            refused.append(str(error))
        except Exception as error:
            other.append(error)

    threads = [threading.Thread(target=say, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not other
    assert len(replies) + len(refused) == 6
    assert all("in the middle of a turn" in said and "\n" not in said for said in refused)
    assert len(chat.turns) == len(replies) >= 1
    calm = begin("int8")
    for message in chat.messages:
        if message["role"] == "user":
            calm.reply(message["content"])
    assert chat.messages == calm.messages
    assert chat.ids == calm.ids


def test_a_chat_is_taken_until_its_turn_is_folded_and_free_after_a_fold_that_failed(begin, monkeypatch):
    chat, found = begin("snapkv(keep=0.5)"), []
    after = Tail.after

    def broken(tail, columns):
        try:
            chat.fork()
        except CacheError as error:
            found.append(str(error))
        raise FileError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(Tail, "after", broken)
        with pytest.raises(FileError, match="the turn stays"):
            chat.reply(SAYS[0])
    assert Tail.after is after
    assert "in the middle of a turn" in found[0]
    chat.fork().reply(SAYS[1])
    assert chat.reply(SAYS[1])


def test_a_fork_takes_turns_of_its_own(begin):
    chat = begin("snapkv(keep=0.5)")
    fork = chat.fork()
    first, second = chat.send(SAYS[0]), fork.send(SAYS[0])
    assert next(first) == next(second)
    first.close()
    assert list(second)
    assert len(chat.turns) == 0
    assert len(fork.turns) == 1
