"""SavedChat: what the file of a chat holds, and the checks that a model and a tokenizer are those it was saved with.

file.py knows how such a file is written and read as a whole, this file what its header means. It generates nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.budget.ledger import Ledger
from kvfold.chat import file
from kvfold.chat.template import Template
from kvfold.chat.turns import Past, Turn
from kvfold.data import Message
from kvfold.errors import CacheError
from kvfold.hf.generation import Model, Settings, plain_settings, settings_from
from kvfold.hf.load import fingerprint
from kvfold.memory.snapshot import Snapshot
from kvfold.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedChat:
    """A conversation as its file holds it."""

    plan: str
    pinned: int  # tokens of the system prompt, never folded
    raw_turns: int
    stride: int | None
    least: int  # tokens that a fraction leaves in any case
    past: Past
    generation: Settings
    snapshot: Snapshot

    @property
    def settings(self) -> dict[str, Any]:
        """The settings with which the chat began, by the names of its arguments."""
        system = next((message.content for message in self.past.messages if message.role == "system"), None)
        return {"system": system, "raw_turns": self.raw_turns, "stride": self.stride, "least": self.least}

    def write(self, path: Path, *, model: Model, ledger: Ledger) -> None:
        """Write the file; the header also says which model it belongs to. Raises FileError; an old file stays then."""
        header = {
            "kvfold": __version__,
            "model": _name(model),
            "fingerprint": fingerprint(model),
            "dtype": _dtype(model),
            "plan": self.plan,
            "pinned": self.pinned,
            "raw_turns": self.raw_turns,
            "stride": self.stride,
            "least": self.least,
            "counters": {name: getattr(ledger, name) for name in file.COUNTERS},
            "messages": [{"role": message.role, "content": message.content} for message in self.past.messages],
            "turns": [[turn.start, turn.reply, turn.stop] for turn in self.past.turns],
            "ids": list(self.past.ids),
            "generation": plain_settings(self.generation),
            "cache": self.snapshot.plain,
        }
        file.write(path, header, self.snapshot.tensors)

    @classmethod
    def read(cls, path: Path, model: Model) -> "SavedChat":
        """Read a file. Raises FileError for one that is no whole saved chat, CacheError for another model or dtype."""
        header = file.read_header(path)
        _refuse_other_model(path, header, model)
        past = Past(
            messages=tuple(Message(role=said["role"], content=said["content"]) for said in header["messages"]),
            ids=tuple(header["ids"]),
            turns=tuple(Turn(start=start, reply=reply, stop=stop) for start, reply, stop in header["turns"]),
        )
        return cls(
            plan=header["plan"],
            pinned=header["pinned"],
            raw_turns=header["raw_turns"],
            stride=header["stride"],
            least=header.get("least", 0),  # chats of earlier versions had no floor
            past=past,
            generation=settings_from(header["generation"]),
            snapshot=Snapshot(tensors=file.read_tensors(path, device=model.device), plain=header["cache"]),
        )

    def refuse_other_tokenizer(self, path: Path, template: Template, *, pinned: int) -> None:
        """Raise CacheError if the template and its tokenizer encode the first message in other tokens than were fed."""
        said = next((message.content for message in self.past.messages if message.role == "user"), None)
        if said is None:
            return
        fed = self.past.ids[: self.past.turns[0].reply]
        first = tuple(template.opening(template.beginning, said))
        if pinned != self.pinned or first != fed:
            raise CacheError(
                f"{path} was to be loaded with this tokenizer; it writes the first message in other tokens than were "
                "fed; give the tokenizer and the chat template that the chat was saved with"
            )


def _refuse_other_model(path: Path, header: file.Header, model: Model) -> None:
    given = fingerprint(model)
    if given != header["fingerprint"]:
        raise CacheError(
            f"{path} was to be loaded with {_name(model)} ({given}); it was saved with {header['model']} "
            f"({header['fingerprint']}); what one model remembers means nothing to another; load it with that one"
        )
    if _dtype(model) != header["dtype"]:
        raise CacheError(
            f"{path} was to be loaded with a model in {_dtype(model)}; it was saved in {header['dtype']}; "
            f"load the model with dtype=torch.{header['dtype']}"
        )


def _name(model: Model) -> str:
    return str(model.config.name_or_path or type(model).__name__)


def _dtype(model: Model) -> str:
    return str(model.dtype).removeprefix("torch.")
