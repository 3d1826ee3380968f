"""The memory of this machine: how fast it is read, and how much of it the process uses, now and at most.

A step of decoding reads every weight and every attended slot once, so bytes over read bandwidth is the time that no
kernel can beat. Use of memory comes from the system, and is 0 where the system does not keep it.
"""

from functools import cache
from pathlib import Path
from time import perf_counter

import torch

_BUFFER_BYTES = 256 * 2**20  # far larger than any cache of the processor
_TURNS = 5


@cache
def read_bandwidth(device: str = "cpu") -> float:
    """Measure the bytes a second that a device reads: the best of several sums over a large buffer."""
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
    """Wait until a device has finished its queue; without it a clock measures when work was queued."""
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
    """Read the most memory since the last reset: of the device where there is one, else of the process (VmHWM)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM")


def anonymous_bytes() -> int:
    """Read the memory of this process that is no file's (RssAnon)."""
    return _status_bytes("RssAnon")


def _status_bytes(name: str) -> int:
    """A line of Linux's status of this process, which counts in KiB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
