"""Joining the processes of one training run, where a launcher (accelerate, torchrun) has started several.

Each draws different samples and gradients are averaged; the first one writes the files. On machines without a GPU
accelerate needs to know it, else every process takes itself for the only one.
"""

import os

import torch

from kvfold.errors import DataError


def device() -> torch.device:
    """The device of training: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def join_processes() -> int:
    """Return this process's rank, after joining the others where a launcher has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise DataError("several processes were asked; accelerate is not installed; install kvfold[train]") from error
    return PartialState(cpu=not torch.cuda.is_available()).process_index
