"""The keyword by which a model takes a cache: `past_key_values`, and `cache` from transformers 5.24 on.

The newer releases still take the older name, with a warning. What a model takes is read from the signature of its
forward, so that code which came with a model keeps the name that it knows.
"""

import inspect
from functools import cache
from typing import Any

import transformers

OLDER, NEWER = "past_key_values", "cache"
_NEWER_SINCE = (5, 24)


def given(model: Any, past: Any) -> dict[str, Any]:
    """Give a cache as the keyword that the forward of this model, or of this decoder, takes."""
    return {_argument(type(model)): past}


def given_to_generate(past: Any) -> dict[str, Any]:
    """Give a cache as the keyword that `model.generate` of this release takes."""
    release = tuple(int(number) for number in transformers.__version__.split(".")[:2])
    return {NEWER if release >= _NEWER_SINCE else OLDER: past}


def taken(keywords: dict[str, Any]) -> Any:
    """Find the cache among the keywords of a forward; None where there is none."""
    return keywords.get(NEWER) if keywords.get(OLDER) is None else keywords[OLDER]


@cache
def _argument(kind: type) -> str:
    return NEWER if NEWER in inspect.signature(kind.forward).parameters else OLDER
