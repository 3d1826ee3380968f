"""Joining the processes of one training run, where a launcher (accelerate, torchrun) has started several.

Each draws samples of its own and gradients are averaged; the first one writes the files. On machines without a GPU
accelerate must be told so, else every process takes itself for the only one.
"""

import os

import torch

from kvfold.errors import DataError


def device() -> torch.device:
    """Where training runs: on the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def join_processes() -> int:
    """This process's rank, after joining the others where a launcher (accelerate, torchrun) has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise DataError("several processes were asked; accelerate is not installed; install kvfold[train]") from error
    return PartialState(cpu=not torch.cuda.is_available()).process_index
