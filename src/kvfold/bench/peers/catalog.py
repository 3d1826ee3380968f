"""The catalogue of rivals: the methods of each, and where its interpreter lies.

One entry per rival: adding one is an entry here and a program in `programs/`. kvpress wants another transformers
than ours, so it lives in a second virtual environment that `make peers` builds. Nothing is started here.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from kvfold.errors import SuiteError

PROGRAMS = Path(__file__).parent / "programs"
OTHER_PYTHON = "KVFOLD_PEERS_PYTHON"  # names the interpreter of the second environment, where it is not .venv-peers


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerMethod:
    """One method of a rival, and what a run must know of it."""

    sized: bool = True  # takes a kept fraction
    looks_at_queries: bool = False  # the newest queries choose what it keeps


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One rival: its program, the interpreter that runs it, its methods by the names that it gives them."""

    name: str
    program: Path
    python: Path | None  # None: the second environment's
    methods: Mapping[str, PeerMethod]
    reads_gguf: bool = False  # reads the model's GGUF file, with its weights as they lie there

    def command(self) -> tuple[str, ...]:
        """Give the command that starts its process. Raises SuiteError where its interpreter is missing."""
        python = self.python or second_python()
        if not python.exists():
            raise SuiteError(
                f"the rival {self.name} was asked for; its interpreter {python} is not there; "
                f"run `make peers`, or name one by {OTHER_PYTHON}"
            )
        return str(python), str(self.program)

    def method(self, name: str) -> PeerMethod:
        """Find the method of that name. Raises SuiteError for one that it does not have."""
        if name not in self.methods:
            near = get_close_matches(name, self.methods, n=1, cutoff=0.5) or list(self.methods)
            raise SuiteError(
                f"{self.name}:{name} was asked for; {self.name} has no such method here; near it: {', '.join(near)}"
            )
        return self.methods[name]


def second_python() -> Path:
    """Give the path of the second environment's interpreter, there or not."""
    named = os.environ.get(OTHER_PYTHON)
    return Path(named) if named else Path(__file__).resolve().parents[4] / ".venv-peers" / "bin" / "python"


KVPRESS = Peer(
    name="kvpress",
    program=PROGRAMS / "kvpress_presses.py",
    python=None,
    methods={
        "SnapKV": PeerMethod(looks_at_queries=True),
        "KVzip": PeerMethod(),
        "ExpectedAttention": PeerMethod(looks_at_queries=True),
        "StreamingLLM": PeerMethod(),
        "ObservedAttention": PeerMethod(looks_at_queries=True),
        "ThinK": PeerMethod(looks_at_queries=True),
    },
)
TRANSFORMERS = Peer(
    name="transformers",
    program=PROGRAMS / "stock_caches.py",
    python=Path(sys.executable),
    methods={name: PeerMethod(sized=False) for name in ("DynamicCache", "StaticCache", "QuantizedCache")},
)
LLAMA_CPP = Peer(
    name="llama_cpp",
    program=PROGRAMS / "llama_cpp_caches.py",
    python=None,
    methods={name: PeerMethod(sized=False) for name in ("F16", "Q8_0", "Q4_0")},
    reads_gguf=True,
)
PEERS: Mapping[str, Peer] = {peer.name: peer for peer in (KVPRESS, TRANSFORMERS, LLAMA_CPP)}
