"""The process of a server: its address, how SIGTERM ends it, and the private folder that goes with it."""

import errno
import os
import socket
import subprocess
import sys
import tempfile

import pytest

from kvfold.cli.main import REFUSED, run
from kvfold.errors import DataError
from kvfold.serve import address
from kvfold.serve.folder import private_folder
from serve.conftest import sayer, user
from serve.process import process


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """The folder for temporary files, of this process and of those that it starts."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def private(folder):
    return [path for path in folder.iterdir() if path.name.startswith("kvfold-serve-")]


def test_sigterm_removes_the_chats_that_memory_had_no_room_for(temporary, tmp_path):
    with process(tmp_path / "log", "--memory", "100KB", "--reply-tokens", "4") as one:
        for name in ("Anna", "Ben", "Clara", "David", "Emma"):
            sayer(one)([user(f"{name} lives in Turin.")], max_tokens=4)
        (folder,) = private(temporary)
        assert list(folder.rglob("*.kvfold"))
        one.ended.terminate()
        assert one.ended.wait(60) == 143
        assert not private(temporary)
        assert "Traceback" not in one.log.read_text()


def test_what_a_killed_server_left_is_removed_by_the_next_one(temporary):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    left, unmarked, living = (
        temporary / f"kvfold-serve-{process}-{name}"
        for process, name in ((gone.pid, "abcdefgh"), (gone.pid, "hgfedcba"), (os.getpid(), "abcdefgh"))
    )
    for folder in (left, unmarked, living):
        (folder / "anyone").mkdir(parents=True)
    for folder in (left, living):
        (folder / "kvfold-serve").touch()
    with private_folder() as own:
        assert set(private(temporary)) == {own, unmarked, living}
        assert own.stat().st_mode & 0o077 == 0
    assert set(private(temporary)) == {unmarked, living}


def test_a_taken_port_is_one_line_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", "--model", "no such model", "--port", str(port)]) == REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert f"127.0.0.1:{port}" in line
    assert "another program listens there" in line


def test_a_port_that_needs_rights_and_a_name_that_is_no_address_are_one_line(monkeypatch):
    def no_rights(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with pytest.raises(DataError, match="give another --host"), address.bound("nowhere.invalid", 8000):
        pass
    monkeypatch.setattr(address, "_bind", no_rights)
    with pytest.raises(DataError, match=r"need rights.*give a higher --port"), address.bound("127.0.0.1", 80):
        pass


def test_of_two_that_took_a_port_the_one_that_is_late_to_listen_says_so():
    with address.bound("127.0.0.1", 0) as first:
        port = first[0].getsockname()[1]
        with address.bound("127.0.0.1", port) as second:
            address.listen("127.0.0.1", port, first)
            with pytest.raises(DataError, match="another program listens there"):
                address.listen("127.0.0.1", port, second)
