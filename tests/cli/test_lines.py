"""Lines as they are typed or piped."""

import io
import sys

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from kvfold.cli.lines import Lines


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_pipe_gives_a_line_at_a_time_and_draws_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Anna?\nAnd the cat?\n"))
    lines = Lines()
    assert (lines.read(), lines.read()) == ("Anna?", "And the cat?")
    with pytest.raises(EOFError):
        lines.read()
    assert capsys.readouterr() == ("", "")


def test_pasted_text_is_one_message_and_earlier_lines_come_back(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("prompt_toolkit.output.create_output", lambda **_: DummyOutput())
    with create_pipe_input() as keys, create_app_session(input=keys):
        lines = Lines()
        keys.send_text("\x1b[200~one\ntwo\x1b[201~\n")
        assert lines.read() == "one\ntwo"
        keys.send_text("\x1b[A\n")  # the arrow up
        assert lines.read() == "one\ntwo"
        keys.send_text("\x04")  # Ctrl-D
        with pytest.raises(EOFError):
            lines.read()
