"""SavedCache: what is saved of a folded cache, and the checks that a model and a plan are those it was saved with.

snapshot.py says what a cache holds, snapshot_file.py how a file is written and read as a whole; here lies what its
header means. A saved chat has one of these inside.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.budget.ledger import Ledger
from kvfold.errors import CacheError, FileError, in_one_line
from kvfold.hf import snapshot
from kvfold.hf.generation import Model, is_finite
from kvfold.hf.load import fingerprint
from kvfold.hf.snapshot_file import CACHE, COUNTERS, Header, read_tensors
from kvfold.hf.snapshot_schema import SavedHeader
from kvfold.memory.memory import Memory
from kvfold.memory.rules import Positions
from kvfold.memory.snapshot import Snapshot
from kvfold.plan import Plan
from kvfold.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCache:
    """A folded cache as its file holds it."""

    plan: str
    pinned: int  # first tokens of each row, never folded
    least: int  # tokens that a fraction leaves in any case
    positions: Positions
    snapshot: Snapshot

    @classmethod
    def of(cls, cache: Any) -> "SavedCache":
        """Take everything that a file of this cache holds."""
        rules = cache.memory.rules
        taken = snapshot.take(cache)
        return cls(
            plan=str(cache.plan),
            pinned=rules.pinned,
            least=rules.least,
            positions=cache.positions,
            snapshot=taken,
        )

    def header(self, model: Model, ledger: Ledger) -> Header:
        """Write the header, which also says which model the cache belongs to."""
        return {
            "kvfold": __version__,
            "model": _name(model),
            "fingerprint": fingerprint(model),
            "dtype": _dtype(model),
            "plan": self.plan,
            "pinned": self.pinned,
            "least": self.least,
            "positions": self.positions,
            "counters": {name: getattr(ledger, name) for name in COUNTERS},
            "cache": self.snapshot.plain,
        }

    @classmethod
    def from_header(cls, path: Path, header: Header, model: Model) -> "SavedCache":
        """Read what lies behind a header that was checked. Raises CacheError for another model or dtype."""
        _refuse_other_model(path, header, model)
        tensors = read_tensors(path, header, device=model.device)
        return cls(
            plan=header["plan"],
            pinned=header["pinned"],
            least=header.get("least", 0),  # chats of earlier versions had no floor
            positions=header.get("positions", "kept"),  # nor another way
            snapshot=Snapshot(tensors=tensors, plain=header["cache"]),
        )

    @classmethod
    def read(cls, path: Path, model: Model) -> "SavedCache":
        """Read a file. Raises FileError for one that is no whole saved cache, CacheError for another model or dtype."""
        return cls.from_header(path, CACHE.read_header(path, SavedHeader), model)

    def chosen_plan(self, path: Path, given: Plan | str | None, *, positions: str | None, trust: bool) -> Plan:
        """Choose the plan to load by: the caller's, or the file's if it reaches no file or the caller trusts it.

        Raises CacheError for a plan or for positions of the caller's under which what is saved means nothing.
        """
        if positions not in (None, self.positions):
            raise CacheError(
                f"{path} was to be loaded with positions={positions!r}; it was saved with positions="
                f"{self.positions!r}, and its keys stand there; leave positions away"
            )
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


def refuse_unusable(path: Path, cache: Any, model: Model, token: int) -> None:
    """Feed a token to a copy of a loaded cache. Raises FileError where the model cannot attend to what is there."""
    limit, fed = cache.lease.text_limit, cache.memory.fed
    if not fed or (limit is not None and cache.next_position >= limit):
        return
    try:
        fault = "" if is_finite(model, cache.fork(), token, _mask(cache.memory)) else "the model answers no numbers"
    except Exception as error:  # tensors that do not fit each other fail in any way
        fault = in_one_line(error, 200)
    if fault:
        raise FileError(f"{path} was to be read; its history cannot be used ({fault}); get a sound copy")


def _mask(memory: Memory) -> Int[Tensor, "B columns"]:
    """Mark the columns that are tokens, and one that is to come; those that left the raw tail are known by number."""
    state = next(iter(memory.layers.values())).state
    assert state.tail is not None, "where tokens were fed there is a tail"
    raw = state.tail.valid.long()  # B length
    gone = torch.tensor(state.seen, device=raw.device) - raw.sum(dim=1)  # of each row
    columns = torch.arange(state.tail.start, 0, -1, device=raw.device)  # counted from the tail back
    new = raw.new_ones(len(raw), 1)
    return torch.cat([(columns <= gone[:, None]).long(), raw, new], dim=1)


def is_of(header: Header, model: Model) -> bool:
    """Tell whether what lies behind a header was saved with this model, in this dtype."""
    return (header["fingerprint"], header["dtype"]) == (fingerprint(model), _dtype(model))


def _refuse_other_model(path: Path, header: Header, model: Model) -> None:
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
