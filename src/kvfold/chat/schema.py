"""What the header of a saved chat may say: what that of a saved cache says, and the conversation.

Headers come from others. What must agree inside the header is checked here; whether it agrees with its tensors and with
a model is checked where these are known (saved.py). It opens no file.
"""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kvfold.hf.snapshot_schema import SavedHeader
from kvfold.integers import MOST
from kvfold.schema import Count, Strict


class Said(Strict):
    """A message."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatHeader(SavedHeader):
    """The header of a saved chat."""

    raw_turns: Count
    stride: Annotated[int, Field(ge=1, le=MOST)] | None
    messages: list[Said]
    turns: list[Annotated[list[Count], Field(min_length=3, max_length=3)]]
    ids: list[Count]
    generation: dict[str, Any]

    @model_validator(mode="after")
    def turns_follow_one_another(self) -> "ChatHeader":
        """Refuse turns that are none, or that do not cover the ids and the messages."""
        bounds = [(0, 0, 0), *(tuple(turn) for turn in self.turns)]
        for before, (start, reply, stop) in pairwise(bounds):
            if not before[2] == start < reply <= stop:
                raise ValueError(f"a turn from {start} over {reply} to {stop} follows one that ends at {before[2]}")
        if bounds[-1][2] != len(self.ids):
            raise ValueError(f"turns end at {bounds[-1][2]}, and {len(self.ids)} tokens were fed")
        roles = [said.role for said in self.messages]
        talk = roles[1:] if roles[:1] == ["system"] else roles
        if talk != ["user", "assistant"] * len(self.turns):
            raise ValueError(f"{len(self.turns)} turns are there, and messages of {', '.join(roles) or 'nobody'}")
        if self.cache.fed != len(self.ids):
            raise ValueError(f"a cache of {self.cache.fed} tokens is there, and {len(self.ids)} were fed")
        return self
