"""The storages that a cache holds in memory, by address: what several caches share is counted once by who adds them up.

Folding layers and stock ones count alike; what a plan put into a file does not. Nothing is read from tensors.
"""

from torch import Tensor

from kvfold.hf.cache import FoldedCache
from kvfold.memory.accounting import storages


def storages_of(cache: FoldedCache) -> dict[int, int]:
    """Give the address and the bytes of every storage of a cache."""
    cache.running.undo()
    held = storages(cache.memory)
    for index, layer in enumerate(cache.layers):
        if index in cache.memory.layers:
            continue
        for thing in vars(layer).values():
            if isinstance(thing, Tensor) and thing.numel():
                storage = thing.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
    return held
