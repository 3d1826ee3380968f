"""A rival's process as we see it: a request goes out as one line, a reply comes back as one, or a clear error.

It may crash, hang or answer nonsense: each becomes a PeerError that says how, and never takes the run with it. The
process is started with the first request and ends with us. What requests mean stands in `rows.py`.
"""

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from kvfold.errors import SuiteError

LIMIT_SECONDS = 600.0  # for one request, which is about one row
SPARE_SECONDS = 5.0  # that a dying process has to leave


class PeerError(SuiteError):
    """A rival that failed: the kind of its error and one line, for a row that says how."""

    def __init__(self, kind: str, says: str) -> None:
        super().__init__(f"{kind}: {says}")
        self.kind, self.says = kind, says


class Process:
    """One rival's process. It changes: it starts with the first request, and is gone after it failed."""

    def __init__(self, command: Sequence[str], *, limit_seconds: float = LIMIT_SECONDS) -> None:
        self._command, self._limit = list(command), limit_seconds
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - standard error, kept for its last words
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # Ctrl-C is ours to handle, and a hung rival's children go with it
            )
        except OSError as error:
            raise PeerError("OSError", f"{command[0]} cannot be started ({error.strerror})") from None
        assert self._process.stdout is not None
        reader = threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True)
        reader.start()
        self._end = weakref.finalize(self, _kill, self._process)

    @property
    def alive(self) -> bool:
        """Whether it can take one more request."""
        return self._end.alive and self._process.poll() is None

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send one request, read one reply. Raises PeerError for a failure, a crash, silence or nonsense."""
        line = json.dumps({"do": do} | request) + "\n"
        # In a thread: a process that no longer reads would block us in the middle of a long line.
        threading.Thread(target=_write, args=(self._process.stdin, line), daemon=True).start()
        try:
            reply = self._lines.get(timeout=self._limit)
        except queue.Empty:
            self.close()
            raise PeerError("TimeoutError", f"no answer to {do!r} within {self._limit:g} s; it was ended") from None
        if reply is None:
            raise self._crash(do)
        return self._result(do, reply)

    def nonsense(self, do: str, what: Any) -> PeerError:
        """Make the error for a reply that cannot be read, and end the process: its next reply could be anything."""
        self.close()
        return PeerError("RubbishError", f"the answer to {do!r} makes no sense: {str(what)[:120]!r}")

    def close(self) -> None:
        """End it."""
        self._end()

    def _result(self, do: str, reply: str) -> dict[str, Any]:
        try:
            found = json.loads(reply)
        except json.JSONDecodeError:
            raise self.nonsense(do, reply.strip()) from None
        if isinstance(found, dict) and isinstance(found.get("ok"), dict):
            return found["ok"]
        error = found.get("error") if isinstance(found, dict) else None
        if isinstance(error, dict) and set(error) == {"kind", "says"}:
            raise PeerError(str(error["kind"]), str(error["says"]))
        raise self.nonsense(do, reply.strip())

    def _crash(self, do: str) -> PeerError:
        try:
            code = self._process.wait(SPARE_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        self._errors.seek(0)
        words = self._errors.read().decode("utf-8", errors="replace").strip().splitlines()
        last = f"; its last words: {words[-1].strip()[:200]}" if words else ""
        return PeerError("CrashError", f"the process ended with code {code} at {do!r}{last}")


def _read(stream: Iterable[str], lines: "queue.SimpleQueue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _write(stream: Any, line: str) -> None:
    try:
        stream.write(line)
        stream.flush()
    except (OSError, ValueError):
        pass  # it is gone; the reading side will say so


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except OSError:
            process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout):
        try:
            if stream is not None:
                stream.close()
        except OSError:
            pass
