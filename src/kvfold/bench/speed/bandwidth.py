"""What this machine's memory does: how fast it is read, and the most of it that was in use.

A step of decoding reads every weight and every attended slot once, so bytes over read bandwidth is the time that no
kernel can beat. Peak memory is the process's own, from the system where it keeps one.
"""

from functools import cache
from pathlib import Path
from time import perf_counter

import torch

_BUFFER_BYTES = 256 * 2**20  # far larger than any cache of the processor
_TURNS = 5


@cache
def read_bandwidth(device: str = "cpu") -> float:
    """Bytes a second that a device reads, the processor with so many threads: the best of turns over a large buffer."""
    numbers = torch.ones(_BUFFER_BYTES // 4, device=device)
    seconds = []
    for _ in range(_TURNS):
        synchronise(numbers.device)
        start = perf_counter()
        numbers.sum()
        synchronise(numbers.device)
        seconds.append(perf_counter() - start)
    return _BUFFER_BYTES / min(seconds)


def synchronise(device: torch.device) -> None:
    """Wait until a device has done what it was asked; a clock read before says when it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory() -> None:
    """Start counting the peak anew, where the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """The most memory since the last reset: of the device where there is one, else resident memory of the process.

    0 where the system does not tell.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
