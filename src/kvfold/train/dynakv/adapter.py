"""An adapter without training: a model is loaded, read on text and its bases and losses are written.

What measuring means stands in calibrate.py, and what is read in mixture.py. No command line here.
"""

from typing import Any

from kvfold.adapters.ranks import save_ranks
from kvfold.encode.lowrank.ranks import Ranks
from kvfold.hf.load import load
from kvfold.train.dynakv.bases import names_of
from kvfold.train.dynakv.calibrate import Report, Samples, calibrate
from kvfold.train.dynakv.mixture import rows_of_kinds
from kvfold.train.dynakv.settings import CalibrationSettings
from kvfold.train.processes import device


def measured_adapter(settings: CalibrationSettings, report: Report) -> Ranks:
    """Measure a model's bases and write the adapter; `report` gets a line now and then."""
    model, tokenizer = load(settings.model)
    model.float().requires_grad_(False).to(device())  # pyright: ignore[reportArgumentType]
    names = names_of(settings.basis, model)
    rows, kinds = rows_of_kinds(
        tokenizer, settings.data, count=settings.rows, length=settings.length, seed=settings.seed
    )
    mixed = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
    report(f"bases {', '.join(names)} on {len(rows)} rows of {settings.length} tokens: {mixed}")
    if settings.data is None:
        report("only generated text is read; bases serve real text better with --data FOLDER")
    drawn = Samples() if settings.split == "loss" else None
    measured = calibrate(model, rows, names=names, drawn=drawn, report=report, seed=settings.seed)
    ranks = Ranks(bases={}, measured=measured, default=names[0])
    save_ranks(ranks, settings.out, model=model, about={"training": _words(settings, kinds)})
    return ranks


def _words(settings: CalibrationSettings, kinds: dict[str, int]) -> dict[str, Any]:
    """Say in JSON's types how the adapter was made."""
    return {
        "steps": 0,
        "seed": settings.seed,
        "length": settings.length,
        "rows": kinds,
        "split": settings.split,
    }
