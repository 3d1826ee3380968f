"""Graphs: what some work does on a device, captured once and done again at the cost of one launch.

A captured sequence of operations reads and writes the same memory each time, with the numbers of the host as they were.
It knows no model and no cache.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

_WARM_UP = 3  # times that work is done before it is captured: kernels are compiled, workspaces allocated


@runtime_checkable
class Graph(Protocol):
    """A step that was captured. Each replay writes over its outputs."""

    outputs: Any

    def replay(self) -> None:
        """Do the same operations on the same memory again."""
        ...


Capture: TypeAlias = Callable[[Callable[[], Any]], Graph]


class CudaGraph:
    """Everything that some work launches on a card, launched at once. It changes what its outputs hold."""

    def __init__(self, work: Callable[[], Any], *, device: torch.device) -> None:
        """Capture the work, which runs a few times before, on a stream of its own."""
        self._device = device
        with torch.cuda.device(device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    work()
            here.wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may use the card meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self.outputs = work()

    def replay(self) -> None:
        """Launch it on the current stream."""
        with torch.cuda.device(self._device):
            self._graph.replay()
