"""What JSON in files of others may hold: the types that schemas of chats and adapters are made of.

Words are no numbers, True is no count, and numbers have bounds. It knows no file.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvfold.integers import MOST, MOST_BYTES

Count = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[int, Field(ge=1, le=MOST)]
Size = Annotated[int, Field(ge=0, le=MOST_BYTES)]
Version = Annotated[int, Field(ge=1)]
Index = Annotated[str, Field(pattern=r"^[0-9]{1,6}$")]  # of a layer
Name = Annotated[str, Field(max_length=500)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Strict(BaseModel):
    """Takes each value only as its own type. Fields of other versions are passed over."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


def first_fault(error: ValidationError) -> str:
    """Say where JSON is first wrong, in one line."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(step) for step in fault["loc"][:6])
    return " ".join(f"{place} {fault['msg']}".split())[:300]
