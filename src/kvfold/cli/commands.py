"""What begins with a slash in a talk: taking turns back, other plans and prompts, files, budgets.

A command changes the talk or says something about it; the lines that it answers go to standard error. Turns themselves
are chat.py's.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kvfold.cli.printing import escaped
from kvfold.errors import BudgetError, FileError, KvfoldError

if TYPE_CHECKING:
    from kvfold.budget.ledger import Ledger
    from kvfold.chat.chat import Chat

HELP = """/undo               take back the newest turn
/retry [0.8]        take it back and ask it again, at another temperature if you give one
/plan [PLAN]        show the plan; with PLAN: read the conversation again under this plan
/system [TEXT]      show the system prompt; with TEXT: read the conversation again with this one
/budget 0.2         keep a fifth from now on; /budget 512 keeps 512 tokens
/ledger             show what is held, part by part
/save [FILE]        save the conversation
/load FILE          go on with a saved conversation of this model
/help, /quit        show this list; leave (Ctrl-D leaves too)"""


class Talk:
    """A conversation at the command line: the chat of now, and that of before its newest turn, to come back to."""

    def __init__(self, chat: "Chat", save: Path | None) -> None:
        self.chat = chat
        self.before: Chat | None = None  # shares what both hold
        self.save = save  # where /save without a file writes
        self.again: str | None = None  # a message that a command wants to be said

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash says. Raises KvfoldError for what cannot be."""
        name, _, value = line[1:].strip().partition(" ")
        known: dict[str, Callable[[str], None]] = {
            "undo": self._undo,
            "retry": self._retry,
            "plan": self._plan,
            "system": self._system,
            "budget": self._budget,
            "ledger": lambda _: tell(str(self.chat.ledger())),
            "save": self._save,
            "load": self._load,
            "help": lambda _: tell(HELP),
        }
        if name not in known:
            raise KvfoldError(f"/{name} was given; there is no such command; give one of /{', /'.join(known)}, /quit")
        known[name](value.strip())

    def _undo(self, _: str = "") -> None:
        if self.before is None:
            raise KvfoldError(
                "/undo was given; it takes the newest turn back, once; none is there; say something first"
            )
        self.chat, self.before = self.before, None
        tell(status(self.chat.ledger()))

    def _retry(self, value: str) -> None:
        if self.before is None:
            raise KvfoldError(
                "/retry was given; it tries the newest turn again, once; none is there; say something first"
            )
        temperature = _number("/retry", value, "/retry, or /retry 0.8") if value else None
        said = self.chat.messages[-2]["content"]
        self._undo()
        if temperature is not None:
            settings = copy.deepcopy(self.chat.generation)
            settings.do_sample, settings.temperature = temperature > 0, temperature or None
            self.chat.generation = settings
        self.again = said

    def _plan(self, value: str) -> None:
        if value:
            self._reread(plan=value)
        tell(str(self.chat.plan))

    def _system(self, value: str) -> None:
        if value:
            self._reread(system=value)
        tell(next((one["content"] for one in self.chat.messages if one["role"] == "system"), "no system prompt"))

    def _reread(self, **changes: str) -> None:
        from kvfold.chat.reread import reread

        self.chat, self.before = reread(self.chat, **changes), None
        tell(status(self.chat.ledger()))

    def _save(self, value: str) -> None:
        path = Path(value) if value else self.save
        if path is None:
            raise FileError("/save was given without a file; --save named none either; write /save FILE")
        self.chat.save(path)
        tell(f"saved: {path}")

    def _load(self, value: str) -> None:
        from kvfold.chat.chat import Chat

        if not value:
            raise FileError("/load was given without a file; it goes on with a saved chat; write /load FILE")
        chat = self.chat
        self.chat = Chat.load(value, chat.model, chat.tokenizer, generation=chat.generation)
        self.before = None
        tell_loaded(self.chat)

    def _budget(self, value: str) -> None:
        number = _number("/budget", value, "/budget 0.2 or /budget 512")
        if number <= 1:
            self.chat.rebudget(keep=number)
        else:
            self.chat.rebudget(tokens=int(number))
        tell(status(self.chat.ledger()))


def tell_loaded(chat: "Chat") -> None:
    """Say what a loaded chat holds, and what that saved."""
    ledger = chat.ledger()
    tell(status(ledger))
    tell(f"{ledger.fed:,} tokens did not have to be read again")


def status(ledger: "Ledger") -> str:
    """Say in one line what the history takes."""
    every = ledger.seen * ledger.layers * ledger.kv_heads
    return (
        f"[{ledger.seen:,} tokens seen, {ledger.slots:,} of {every:,} slots stored, "
        f"{ledger.stored_bytes:,} bytes: {ledger.stored:.2f} kept]"
    )


def tell(line: str) -> None:
    """Say something that is no reply."""
    print("\n".join(escaped(one) for one in line.splitlines()), file=sys.stderr, flush=True)


def _number(command: str, value: str, usage: str) -> float:
    try:
        number = float(value)
    except ValueError as error:
        raise BudgetError(f"{command} {value} was given; it takes a number; write {usage}") from error
    if not 0 <= number < float("inf"):
        raise BudgetError(f"{command} {value} was given; it takes a number above 0; write {usage}")
    return number
