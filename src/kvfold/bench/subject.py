"""Subject: the model that a suite asks, under the words that records use for it.

The model comes through `hf/load.py`, like everywhere; here are the choice of precision and device by their names, and
the fingerprint. It knows no suite and no plan; `ask/reader.py` opens rows of a subject under a plan.
"""

from dataclasses import dataclass
from typing import Any

from kvfold.errors import ModelError

DTYPES = ("float32", "bfloat16", "float16")
LONGEST = 2**18  # positions of a model of random weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model with its tokenizer, and its name, precision, device and fingerprint as records write them."""

    name: str
    model: Any  # a transformers model; only hf/ knows more
    tokenizer: Any
    fingerprint: str
    dtype: str
    device: str
    rivals: Any = None  # peers.rivals.Rivals, where rivals run in the same benchmark


def open_subject(name: str, *, dtype: str = "float32", device: str = "cpu") -> Subject:
    """Load the model of that name; the name of a shape, or of a config.json, gives a model of random weights.

    Raises ModelError for a model that is not there, and for a precision or a device that cannot be had.
    """
    import torch

    from kvfold.bench.speed.models import SHAPES, shaped
    from kvfold.hf.hardware import settled
    from kvfold.hf.load import fingerprint, load

    device, dtype = settled(device=device, dtype=dtype)
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} was asked for; models are run in {', '.join(DTYPES)}; give one of them")
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"device {device!r} was asked for; torch refuses it ({first}); give cpu or cuda") from None
    model: Any
    if name in SHAPES or name.endswith(".json"):
        model, tokenizer = shaped(name, dtype=getattr(torch, dtype), positions=LONGEST), None
    else:
        model, tokenizer = load(name, dtype=getattr(torch, dtype))
    return Subject(
        name=name,
        model=model.to(place),
        tokenizer=tokenizer,
        fingerprint=fingerprint(model),
        dtype=dtype,
        device=place.type,
    )
