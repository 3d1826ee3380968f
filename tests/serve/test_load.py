"""The load program: every chat is held whole, the table has a row for each number of clients, errors are one line."""

import os

import pytest

from kvfold.cli.load import load as table
from kvfold.errors import SuiteError
from kvfold.serve.load import Load, resident_bytes, send


def test_a_row_holds_every_chat_turn_by_turn_and_replies_do_not_depend_on_how_many_ask(running):
    sent = Load(url=f"{running.url}/v1", model="tiny", chats=4, turns=2, notes=1, tokens=6)
    alone = send(sent, 1)
    held = running.shelf.holdings.held_bytes
    together = send(sent, 4)
    assert [len(chat) for chat in alone.replies] == [2, 2, 2, 2]
    assert together.same(alone) == 4
    assert together.tokens == alone.tokens <= 4 * 2 * 6
    assert all(chat[1].cached_tokens > chat[0].cached_tokens == 0 for chat in alone.replies)
    assert 0 < alone.first_seconds < alone.seconds
    assert 0 < alone.memory["held_bytes"] <= held  # the last turn may be counted a moment later


def test_the_table_has_a_row_for_each_number_of_clients(running, capsys):
    table(f"{running.url}/v1", model="tiny", clients="1,2", chats=2, turns=1, notes=1, tokens=4, pid=os.getpid())
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert {line.count("|") for line in (head, rule, *rows)} == {11}
    assert [row.split("|")[1].strip() for row in rows] == ["1", "2"]
    assert all("2 of 2" in row for row in rows)


def test_a_server_that_refuses_or_is_not_there_is_one_line(running):
    with pytest.raises(SuiteError, match="404"):
        send(Load(url=f"{running.url}/v1", model="other", chats=1), 1)
    with pytest.raises(SuiteError, match="see whether the server runs"):
        send(Load(url="http://127.0.0.1:9/v1", model="tiny", chats=1), 1)
    with pytest.raises(SuiteError, match="leave --pid away"):
        resident_bytes(2**30)
    now, most = resident_bytes(os.getpid())
    assert 0 < now <= most
