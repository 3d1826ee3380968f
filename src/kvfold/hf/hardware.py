"""Which device and precision a model is run in, where the user leaves the choice: "auto".

A CUDA device is taken where there is one. bfloat16 is half the memory and rounds more; it is taken only where the
processor multiplies it quickly, because elsewhere it is slower than float32.
"""

from functools import cache
from pathlib import Path

_QUICK = frozenset(("avx512_bf16", "amx_bf16", "bf16", "svebf16"))  # flags of x86 and ARM processors
_CPU_FLAGS = Path("/proc/cpuinfo")  # there is none but on Linux


def settled(*, device: str, dtype: str) -> tuple[str, str]:
    """Settle device and dtype by their names; what is not "auto" stays as it is, to be judged when it is used."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        on_cuda = device.startswith("cuda")
        quick = torch.cuda.is_available() and torch.cuda.is_bf16_supported() if on_cuda else _cpu_is_quick()
        dtype = "bfloat16" if quick else "float32"
    return device, dtype


@cache
def _cpu_is_quick() -> bool:
    try:
        lines = _CPU_FLAGS.read_text(encoding="utf-8", errors="replace").lower().splitlines()
    except OSError:
        return False
    flags = {flag for line in lines if line.startswith(("flags", "features")) for flag in line.split()}
    return bool(flags & _QUICK)
