"""Open the model that a suite asks, with the words that its records will use for it.

The model comes through `hf/load.py`, like everywhere; here is only the choice of precision and device by their
names, and the fingerprint. It knows no suite and no plan.
"""

from typing import Any

from kvfold.bench.suite import Subject
from kvfold.errors import ModelError

DTYPES = ("float32", "bfloat16", "float16")
LONGEST = 2**18  # positions of a model of random weights


def open_subject(name: str, *, dtype: str = "float32", device: str = "cpu") -> Subject:
    """The model of that name, in this precision, on this device; a shape by its name or config.json is random.

    Raises ModelError for what is not there.
    """
    import torch

    from kvfold.bench.speed.models import SHAPES, shaped
    from kvfold.hf.load import fingerprint, load

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
