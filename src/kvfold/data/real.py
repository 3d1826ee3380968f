"""Real text from files: JSON Lines in xz, one set a file, as plain documents.

Reads the sets by the fields they hold (messages, text, question and answer). Knows which sets the shipped model was
trained on (`SHIPPED`), and which no adapter learns from (`SHARE_ALIKE`); files are never copied into the package.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from kvfold.data.files import read_rows
from kvfold.data.words import Borrowed, may_train
from kvfold.errors import DataError

# Set name -> licence: what the shipped model was trained on.
SHIPPED = {
    "star": "MIT",
    "fairytaleqa.train": "Apache-2.0",
    "qmsum.train": "MIT",
    "gsm8k.train": "MIT",
    "novels": "public domain, markup CC BY",
}
SHARE_ALIKE = ("sgd.train", "sgd.dev")  # CC BY-SA: weights that learned from these could not ship under Apache-2.0


def documents(folder: Path, names: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
    """Every document of the named sets, or of all that may be trained on, as (set, text), in file order."""
    for name, row in rows(folder, names):
        yield name, _text(row)


def sets(folder: Path) -> list[str]:
    """The sets of a folder that may be trained on: SHIPPED in their order, then the others by name."""
    if not folder.is_dir():
        raise DataError(f"real text was asked from {folder}; that is no folder; give one that holds *.jsonl.xz files")
    found = {path.name.removesuffix(".jsonl.xz") for path in folder.glob("*.jsonl.xz")}.difference(SHARE_ALIKE)
    if not found:
        raise DataError(f"real text was asked from {folder}; it holds no *.jsonl.xz; give a folder that does")
    ours = [name for name in SHIPPED if name in found]
    return ours + sorted(found.difference(SHIPPED))


def rows(folder: Path, names: Sequence[str] | None = None) -> Iterator[tuple[str, dict]]:
    """Every row of the named sets, or of all that may be trained on, as (set, fields), in file order."""
    for name in sets(folder) if names is None else names:
        path = folder / f"{name}.jsonl.xz"
        if not path.is_file():
            raise DataError(f"the set {name} was asked; {folder} has no {path.name}; name another folder with --data")
        for row in read_rows(path):
            yield name, row


def borrow(texts: Sequence[str], *, sentences: int = 40_000, words: int = 12_000) -> Borrowed:
    """Pick short sentences, and the most frequent words that training may draw, out of real text; in a fixed order."""
    found: dict[str, None] = {}
    counts: Counter[str] = Counter()
    for text in texts:
        short = re.findall(r"[A-Z][A-Za-z ,;']{14,90}[.?!]", text)
        found.update(dict.fromkeys(short[:: max(1, len(short) // 400)]))
        counts.update(re.findall(r"\b[a-z]{4,11}\b", text[:400_000]))
    common = (word for word, count in counts.most_common() if count >= 3 and may_train(word))
    kept = list(found)[:: max(1, len(found) // sentences)]
    return Borrowed(words=tuple(islice(common, words)), sentences=tuple(kept))


def _text(row: dict) -> str:
    """The text of one row, whatever its set."""
    if "messages" in row:
        return "\n".join(message["content"].strip() for message in row["messages"])
    if "text" in row:
        return row["text"]
    if "question" in row and "answer" in row:
        return f"{row['question']}\n{row['answer']}"
    raise DataError(f"a row has the fields {', '.join(row)}; text is read from messages, text or question; convert it")
