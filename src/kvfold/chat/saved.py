"""SavedChat: what the file of a chat holds, and the checks that a model and a tokenizer are those it was saved with.

file.py knows how such a file is written and read as a whole, this file what its header means. It generates nothing.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.budget.ledger import Ledger
from kvfold.chat import file
from kvfold.chat.template import Template
from kvfold.chat.turns import Past, Turn
from kvfold.data import Message
from kvfold.errors import CacheError, FileError, in_one_line
from kvfold.hf.generation import Model, Settings, plain_settings, settings_from
from kvfold.hf.load import fingerprint
from kvfold.memory.snapshot import Snapshot
from kvfold.plan import Plan
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
        _refuse_other_words(path, header, model)
        if header["format_version"] < file.FIRST_SEALED:
            warnings.warn(f"{path} is of an older format without a digest; save it again to seal it", stacklevel=3)
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
            generation=_settings(path, header),
            snapshot=Snapshot(tensors=file.read_tensors(path, header, device=model.device), plain=header["cache"]),
        )

    def chosen_plan(self, path: Path, given: Plan | str | None, *, trust: bool) -> Plan:
        """Choose the plan to load by: the caller's, or the file's if it reaches no file or the caller trusts it.

        Raises CacheError for a plan of the caller's under which what is saved means nothing.
        """
        ours = Plan.parse(self.plan)
        if given is None:
            reached = ours.reaches
            if reached and not trust:
                raise CacheError(
                    f"{path} was to be loaded; its plan names {', '.join(reached)}, which loading would read or write; "
                    "give trust=True if the file is yours, or plan= with paths of your own"
                )
            return ours
        plan = Plan.parse(given) if isinstance(given, str) else given
        if not plan.reads_what_is_saved_by(ours):
            raise CacheError(
                f"{path} was to be loaded by {plan}; it was saved by {ours}; give a plan of the same members that "
                "differs in budgets and paths only"
            )
        return plan

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


def _refuse_other_words(path: Path, header: file.Header, model: Model) -> None:
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    highest = max(header["ids"], default=0)
    if highest >= vocabulary:
        raise FileError(
            f"{path} was to be read; it has token {highest}, and the model knows {vocabulary}; get a sound copy"
        )


def _settings(path: Path, header: file.Header) -> Settings:
    """Read the settings of replies. Raises FileError for what transformers does not take."""
    try:
        return settings_from(header["generation"])
    except Exception as error:  # of whatever kind transformers raises
        reason = in_one_line(error, 200)
        raise FileError(
            f"{path} was to be read; its generation settings are none ({reason}); get a sound copy"
        ) from error


def _name(model: Model) -> str:
    return str(model.config.name_or_path or type(model).__name__)


def _dtype(model: Model) -> str:
    return str(model.dtype).removeprefix("torch.")
