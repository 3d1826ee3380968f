"""A snapshot of a whole cache: its memory, and the sliding layers that transformers keeps beside it.

memory/snapshot.py does the memory; here the stock layers are read and filled. Which model it is for is the caller's
to check (hf/load.py has the fingerprint). No files.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from kvfold.errors import CacheError, KvfoldError, in_one_line
from kvfold.hf.stock_layers import StockState
from kvfold.memory import snapshot
from kvfold.memory.forward import Mark
from kvfold.memory.memory import Memory
from kvfold.memory.snapshot import Snapshot

_STOCK, _RECURRENT = "stock", "recurrent"


class CacheMark(NamedTuple):
    """A moment of a cache, to come back to."""

    memory: Mark
    stock: dict[int, StockState]  # of the layers that never fold
    is_branched: bool  # its rows are beams


@runtime_checkable
class Marked(Protocol):
    """What a snapshot is taken of, and put back into: a folded cache."""

    memory: Memory
    layers: list[Any]

    def mark(self) -> CacheMark:
        """Give the moment as it is now."""
        ...


def take(cache: Marked) -> Snapshot:
    """What a cache holds now: folded layers and stock ones."""
    mark = cache.mark()  # takes back a forward that never ended
    memory = snapshot.take(cache.memory)
    tensors: dict[str, Tensor] = dict(memory.tensors)
    stock: dict[str, Any] = {}
    recurrent: dict[str, Any] = {}
    for index, state in mark.stock.items():
        held = dict(state.tensors())
        tensors |= {f"{_STOCK}.{index}.{name}": tensor for name, tensor in held.items()}
        if "keys" in held:
            stock[str(index)] = state.held["cumulative_length"]
        if "has_previous_state" in state.held:
            recurrent[str(index)] = sorted(number for number, has in state.held["has_previous_state"].items() if has)
    return Snapshot(tensors=tensors, plain={**memory.plain, _STOCK: stock, _RECURRENT: recurrent})


def put_back(cache: Marked, taken: Snapshot) -> None:
    """Make a fresh cache of the same model and plan hold what the snapshot says.

    Raises CacheError for another model's, and FileError for one that contradicts itself, in whatever way.
    """
    try:
        _put_back(cache, taken)
    except KvfoldError:
        raise
    except Exception as error:  # tensors of others may be anything
        snapshot.contradiction(in_one_line(error, 200))


def _put_back(cache: Marked, taken: Snapshot) -> None:
    sliding = {str(index) for index in range(len(cache.layers)) if index not in cache.memory.layers}
    stock = taken.plain[_STOCK]
    if not stock.keys() <= sliding:
        raise CacheError(
            f"a cache with sliding layers {', '.join(stock)} was to be read; this model's are "
            f"{', '.join(sorted(sliding)) or 'none'}; load it with the model that it was saved with"
        )
    own = {name: tensor for name, tensor in taken.tensors.items() if not name.startswith(_STOCK)}
    snapshot.put_back(cache.memory, Snapshot(tensors=own, plain=taken.plain))
    for index, length in stock.items():
        layer: Any = cache.layers[int(index)]
        keys, values = (taken.tensors[f"{_STOCK}.{index}.{name}"] for name in ("keys", "values"))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, length
    for index, numbers in taken.plain.get(_RECURRENT, {}).items():  # earlier files have none
        for number in numbers:
            _fill(cache.layers[int(index)], f"{_STOCK}.{index}", number, taken.tensors)


def _fill(layer: Any, prefix: str, number: int, tensors: Mapping[str, Tensor]) -> None:
    """Let one numbered recurrent state hold what the snapshot says."""
    for name in ("conv_states", "recurrent_states"):
        state = tensors.get(f"{prefix}.{name}.{number}")
        if state is not None:
            layer.lazy_initialization(**{name: state, "state_idx": number})
            getattr(layer, name)[number].copy_(state)
            layer.device = state.device
    layer.has_previous_state[number] = True
