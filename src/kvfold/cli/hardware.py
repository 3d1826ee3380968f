"""The options of every verb that loads a model: in which precision, and on which device.

What "auto" means is settled by hf/hardware.py when the verb runs; nothing heavy is imported before.
"""

from typing import Annotated, Any

import typer

Dtype = Annotated[
    str,
    typer.Option(
        help="auto, float32, bfloat16 or float16. auto is bfloat16 on CUDA and on processors that are fast in it, "
        "else float32."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda. auto is cuda if there is one, else cpu.")]

DTYPES = ("float32", "bfloat16", "float16")


def load_model(name: str, *, device: str, dtype: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer as these options say. Raises ModelError for what cannot be had."""
    from kvfold.errors import ModelError
    from kvfold.hf.hardware import settled
    from kvfold.hf.load import load

    device, dtype = settled(device=device, dtype=dtype)
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} was asked for; models are run in {', '.join(DTYPES)}; give one, or auto")
    import torch

    return load(name, dtype=getattr(torch, dtype), device=device)
