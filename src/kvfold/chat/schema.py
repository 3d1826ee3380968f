"""What the header of a saved chat may say: what that of a saved cache says, and the conversation.

Headers come from others. What must agree inside the header is checked here; whether it agrees with its tensors and with
a model is checked where these are known (saved.py). It opens no file.
"""

from itertools import accumulate, pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kvfold.chat.turns import from_saved
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
    turns: list[Annotated[list[Count], Field(min_length=3, max_length=4)]]  # the fourth: of messages
    ids: list[Count]
    generation: dict[str, Any]

    @model_validator(mode="after")
    def turns_follow_one_another(self) -> "ChatHeader":
        """Refuse turns that are none, or that do not cover the ids."""
        bounds = [(0, 0, 0), *((turn[0], turn[1], turn[2]) for turn in self.turns)]
        for before, (start, reply, stop) in pairwise(bounds):
            if not before[2] == start < reply <= stop:
                raise ValueError(f"a turn from {start} over {reply} to {stop} follows one that ends at {before[2]}")
        if bounds[-1][2] != len(self.ids):
            raise ValueError(f"turns end at {bounds[-1][2]}, and {len(self.ids)} tokens were fed")
        if self.cache.fed != len(self.ids):
            raise ValueError(f"a cache of {self.cache.fed} tokens is there, and {len(self.ids)} were fed")
        return self

    @model_validator(mode="after")
    def every_turn_ends_with_a_reply(self) -> "ChatHeader":
        """Refuse messages that are no turns: each ends with what the user says and the assistant's reply."""
        roles = [said.role for said in self.messages]
        begin = int(roles[:1] == ["system"])
        counts = [turn.messages for turn in from_saved(self.turns, messages=len(roles))]
        ends = list(accumulate(counts))
        talks = [roles[start:end] for start, end in pairwise([begin, *ends])]
        covered = ends[-1] if ends else begin
        if covered != len(roles) or any(talk[-2:] != ["user", "assistant"] for talk in talks):
            raise ValueError(f"{len(counts)} turns are there, and messages of {', '.join(roles) or 'nobody'}")
        return self
