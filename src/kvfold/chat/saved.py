"""SavedChat: what the file of a chat holds, and the check that a tokenizer is the one it was saved with.

Its cache is a saved cache (hf/saved.py), which is checked there. It generates nothing.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.budget.ledger import Ledger
from kvfold.chat.file import CHAT, read_header
from kvfold.chat.template import Template
from kvfold.chat.turns import Past, as_saved, from_saved
from kvfold.data import Message
from kvfold.errors import CacheError, FileError, in_one_line
from kvfold.hf.generation import Model, Settings, plain_settings, settings_from
from kvfold.hf.saved import SavedCache
from kvfold.hf.snapshot_file import Header


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedChat:
    """A conversation as its file holds it."""

    cache: SavedCache  # pinned is the system prompt
    raw_turns: int
    stride: int | None
    past: Past
    generation: Settings

    @property
    def settings(self) -> dict[str, Any]:
        """The settings with which the chat began, by the names of its arguments."""
        first = self.past.messages[:1]
        return {
            "system": first[0].content if first and first[0].role == "system" else None,
            "raw_turns": self.raw_turns,
            "stride": self.stride,
            "least": self.cache.least,
            "positions": self.cache.positions,
        }

    def write(self, path: Path, *, model: Model, ledger: Ledger) -> None:
        """Write the file; the header also says which model it belongs to. Raises FileError; an old file stays then."""
        header = {
            **self.cache.header(model, ledger),
            "raw_turns": self.raw_turns,
            "stride": self.stride,
            "messages": [{"role": message.role, "content": message.content} for message in self.past.messages],
            "turns": as_saved(self.past.turns),
            "ids": list(self.past.ids),
            "generation": plain_settings(self.generation),
        }
        CHAT.write(path, header, self.cache.snapshot.tensors)

    @classmethod
    def read(cls, path: Path, model: Model) -> "SavedChat":
        """Read a file. Raises FileError for one that is no whole saved chat, CacheError for another model or dtype."""
        header = read_header(path)
        cache = SavedCache.from_header(path, header, model)
        _refuse_other_words(path, header, model)
        if header["format_version"] < CHAT.first_sealed:
            warnings.warn(f"{path} is of an older format without a digest; save it again to seal it", stacklevel=3)
        past = Past(
            messages=tuple(Message(role=said["role"], content=said["content"]) for said in header["messages"]),
            ids=tuple(header["ids"]),
            turns=from_saved(header["turns"], messages=len(header["messages"])),
        )
        return cls(
            cache=cache,
            raw_turns=header["raw_turns"],
            stride=header["stride"],
            past=past,
            generation=_settings(path, header),
        )

    def refuse_other_tokenizer(self, path: Path, template: Template, *, pinned: int) -> None:
        """Raise CacheError if the template and its tokenizer encode the first turn in other tokens than were fed."""
        if not self.past.turns:
            return
        *said, _ = self.past.talks[0]
        fed = self.past.ids[: self.past.turns[0].reply]
        first = tuple(template.added(template.beginning, said))
        if pinned != self.cache.pinned or first != fed:
            raise CacheError(
                f"{path} was to be loaded with this tokenizer; it writes the first message in other tokens than were "
                "fed; give the tokenizer and the chat template that the chat was saved with"
            )


def _refuse_other_words(path: Path, header: Header, model: Model) -> None:
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    highest = max(header["ids"], default=0)
    if highest >= vocabulary:
        raise FileError(
            f"{path} was to be read; it has token {highest}, and the model knows {vocabulary}; get a sound copy"
        )


def _settings(path: Path, header: Header) -> Settings:
    """Read the settings of replies. Raises FileError for what transformers does not take."""
    try:
        return settings_from(header["generation"])
    except Exception as error:  # of whatever kind transformers raises
        reason = in_one_line(error, 200)
        raise FileError(
            f"{path} was to be read; its generation settings are none ({reason}); get a sound copy"
        ) from error
