"""The file of a saved chat: a snapshot's file of a kind of its own, whose header has the conversation too.

schema.py knows what its header may say, saved.py what it means. Reading a header needs no torch.
"""

from pathlib import Path

from kvfold.hf.snapshot_file import FileKind, Header

CHAT = FileKind(key="kvfold-chat", noun="chat", writer="chat.save", version=2, first_sealed=2)


def read_header(path: Path) -> Header:
    """Read the header of a file without its tensors. Raises FileError for all but a whole saved chat."""
    from kvfold.chat.schema import ChatHeader

    return CHAT.read_header(path, ChatHeader)
