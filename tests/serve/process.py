"""A server of the shipped tiny model as a process of its own, to be watched and killed from outside."""

import contextlib
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2

from serve.conftest import PLAN, Address

_START_SECONDS, _STOP_SECONDS = 300, 60


@dataclass
class Process(Address):
    """A server in a process of its own, and the file with what it said on standard error."""

    pid: int
    log: Path
    ended: subprocess.Popen

    def kill(self) -> None:
        """End it as the system does: it gets no chance to do anything."""
        self.ended.kill()
        self.ended.wait()


@contextlib.contextmanager
def process(log, *options):
    """Start `kvfold serve` on a free port with these options, and stop it at the end if it still runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", "--model", "tiny", "--plan", PLAN, "--least", "0", "--port", str(port), *options]
    with log.open("w") as said, subprocess.Popen([sys.executable, "-m", "kvfold", *command], stderr=said) as one:
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for(one, url, log)
            yield Process(url, one.pid, log, one)
        finally:
            stop(one)


def stop(one):
    """Let it end in peace, if it does so soon."""
    one.terminate()
    try:
        one.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        one.kill()


def wait_for(one, url, log):
    """Wait until the server answers."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        assert one.poll() is None, log.read_text()
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(f"{url}/health").is_success:  # a proxy may answer before the server is there
                return
        time.sleep(0.05)
    raise AssertionError(f"no answer within {_START_SECONDS} s: {log.read_text()}")
