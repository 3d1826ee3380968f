"""Records in a file, so that a run that was killed goes on where it stopped.

One record is one line, written by a single call and flushed to the disk before the next begins; a line that a kill
cut short is dropped when the file is opened again, and only that line. It knows nothing of what a record means.
"""

import os
from pathlib import Path

from kvfold.bench.run.record import Record, from_line
from kvfold.errors import FileError

FILE_NAME = "records.jsonl"


def read(path: Path) -> list[Record]:
    """Read all finished records of a file, in the order of writing; a cut last line is no record."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise FileError(
            f"{path} was asked for; it cannot be read ({error.strerror}); give a folder of records"
        ) from None
    whole, _, _cut = text.rpartition("\n")
    lines = whole.split("\n") if whole else []
    return [from_line(line, where=f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]


def gather(places: list[Path]) -> list[Record]:
    """Read the records of several folders or files; of the same work the last one counts."""
    found: dict[str, Record] = {}
    for place in places:
        path = place / FILE_NAME if place.is_dir() else place
        if not path.is_file():
            raise FileError(f"{place} was asked for; there is no {FILE_NAME}; give a folder that `kvfold bench` wrote")
        found |= {record.work: record for record in read(path)}
    if not found:
        named = ", ".join(map(str, places))
        raise FileError(f"{named} was asked for; no record in it is finished; run `kvfold bench` again, it goes on")
    return list(found.values())


class Journal:
    """The records of one folder, old and new. It changes: `write` appends."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(
                f"{folder} was asked for; no folder can be there ({error.strerror}); give another"
            ) from None
        self.path = folder / FILE_NAME
        self.records = read(self.path) if self.path.exists() else []
        self._drop_cut_line()

    def find(self, work: str) -> Record | None:
        """Find the newest record of this work; None where it must still be run."""
        return next((record for record in reversed(self.records) if record.work == work), None)

    def write(self, record: Record) -> None:
        """Append one record; when this returns, it is on the disk."""
        data = (record.line() + "\n").encode()
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                written = os.write(handle, data)
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise FileError(f"{self.path} was to be written; {error.strerror}; finished records are kept") from None
        if written != len(data):
            raise FileError(f"{self.path} was to be written; the disk took half a line; make room, the run goes on")
        self.records.append(record)

    def _drop_cut_line(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)
