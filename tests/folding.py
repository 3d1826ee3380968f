"""Random adapters for the tiny models, so that what folds by passes can be tested without training."""

import torch

from fakes import model_of
from kvfold.adapters.adapter import Adapter
from kvfold.adapters.files import save_adapter


def adapter_for(family, folder, *, kind="sonic"):
    """A folder with an adapter of random updates that are large enough to be seen."""
    model = model_of(family)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        adapter = Adapter.for_model(model, rank=2)
        with torch.no_grad():
            for up in adapter.up:
                up.normal_(std=0.1)
            adapter.gates.normal_()
            adapter.embeddings.normal_(std=0.1)
            adapter.scorer.rows.bias += 0.15  # so that rows win often
    save_adapter(adapter, folder / kind, kind=kind, model=model, about={})
    return folder / kind
