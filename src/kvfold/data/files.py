"""Rows of a file of real text: JSON Lines, plain or in xz, or one whole text.

What a row must hold is said by the reader's caller and checked here, so that a file of the wrong shape is one clear
line that names the file and the row. It knows nothing of what is done with the rows; `real.py` knows whole sets.
"""

import json
import lzma
from collections.abc import Sequence
from pathlib import Path

from kvfold.errors import DataError

KINDS = (".jsonl.xz", ".jsonl", ".txt")


def read_rows(path: Path, *, fields: Sequence[str] = ()) -> list[dict]:
    """Every row of the file in order, each with these fields; a `.txt` file is one row with a `text`.

    Raises DataError for a file that is missing, of another kind, broken or empty, and for a row without the fields.
    """
    if not path.name.endswith(KINDS):
        raise DataError(f"{path} was given; text is read from {', '.join(KINDS)}; convert it to one of them")
    text = _text(path)
    if path.suffix == ".txt":
        rows = [{"text": text}] if text.strip() else []
    else:
        rows = [_row(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} was given; there is no row in it; give a file that holds some")
    for number, row in enumerate(rows, 1):
        missing = [field for field in fields if field not in row]
        if missing:
            raise DataError(
                f"{path} was given; its row {number} holds {', '.join(row)} and no {', '.join(missing)}; "
                "give a file whose rows hold it"
            )
    return rows


def prose(row: dict) -> str:
    """The text of a row: its `text`, or its messages in order, each after its speaker where one is named."""
    if "text" in row:
        if not isinstance(row["text"], str):
            raise DataError(f"a row with the text {row['text']!r} was given; a text is a string; leave such rows out")
        return row["text"]
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(one, dict) and "content" in one for one in messages):
        raise DataError("a row of messages was given; each is an object with a content; convert the file")
    said = [(message.get("speaker"), str(message["content"]).strip()) for message in messages]
    return "\n".join(f"{speaker}: {content}" if speaker else content for speaker, content in said)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    except OSError as error:
        raise DataError(f"{path} was given; it cannot be read ({error.strerror}); give a file") from None
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} was given; it is broken ({error}); get a sound copy") from None


def _row(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} was given; its line {number} is not JSON ({error.msg}); get a sound copy") from None
    if not isinstance(row, dict):
        raise DataError(f"{path} was given; its line {number} is no object with fields; give JSON Lines of objects")
    return row
