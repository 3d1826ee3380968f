"""All rivals of one run: their processes, the model that they load, and rows opened on them.

One process serves all methods of a rival. A process that failed is replaced when it is next needed, so that one
method's crash does not cost the others. A copy for another worker starts new processes.
"""

from collections.abc import Mapping
from typing import Any

from kvfold.bench.peers.catalog import PEERS, Peer
from kvfold.bench.peers.plans import RivalPlan, parse
from kvfold.bench.peers.process import LIMIT_SECONDS, PeerError, Process
from kvfold.bench.peers.rows import PeerRows
from kvfold.bench.subject import Subject
from kvfold.errors import SuiteError
from kvfold.hf.gguf import source_file

WEIGHT_TOLERANCE = 1e-6  # of the sum over all weights, which two builds of torch may add in another order


class Rivals:
    """Rivals on one model. It changes: processes start with their first request."""

    def __init__(
        self,
        *,
        subject: Subject,
        threads: int,
        peers: Mapping[str, Peer] = PEERS,
        limit_seconds: float = LIMIT_SECONDS,
    ) -> None:
        weights = [weight.detach() for weight in subject.model.parameters()]
        self._sum = [sum(w.numel() for w in weights), sum(float(w.double().abs().sum()) for w in weights)]
        self._opening = {
            "checkpoint": subject.model.name_or_path,
            "dtype": subject.dtype,
            "device": subject.device,
            "threads": threads,
        }
        self._name = subject.name
        self._peers, self._limit = dict(peers), limit_seconds
        self._processes: dict[str, Process] = {}
        self._versions: dict[str, dict[str, str]] = {}

    def parse(self, text: str) -> RivalPlan:
        """Read a rival's plan from its text."""
        return parse(text, peers=self._peers)

    def rows(self, text: str, *, count: int) -> PeerRows:
        """Open rows under a rival's plan. Raises PeerError where it does not start or loads other weights."""
        plan = self.parse(text)
        return PeerRows(self.process(plan.peer), plan, rows=count)

    def check(self, text: str, do: str, **request: Any) -> dict[str, Any]:
        """Let a rival carry out one of the fault checks, which need no rows."""
        plan = self.parse(text)
        return self.process(plan.peer).ask(do, method=plan.method, settings=dict(plan.settings), **request)

    def versions(self, text: str) -> dict[str, str]:
        """Give the versions of a rival's packages; none before it has started."""
        return self._versions.get(self.parse(text).peer, {})

    def process(self, peer: str) -> Process:
        """Give a rival's process with the model loaded; a process that failed is replaced."""
        process = self._processes.get(peer)
        if process is None or not process.alive:
            opening = self._opening | self._file_of(self._peers[peer])
            process = Process(self._peers[peer].command(), limit_seconds=self._limit)
            self._versions[peer] = self._opened(process, opening, own_weights=self._peers[peer].reads_gguf)
            self._processes[peer] = process
        return process

    def close(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.close()
        self._processes.clear()

    def _file_of(self, peer: Peer) -> dict[str, str]:
        """Name the file that a rival reads instead of the checkpoint. Raises SuiteError where the model has none."""
        if not peer.reads_gguf:
            return {}
        file = source_file(self._name)
        if file is None:
            raise SuiteError(
                f"the rival {peer.name} was asked for on {self._name}; it reads GGUF files, and this model is none; "
                "give --model smollm2 or --model FILE.gguf"
            )
        return {"checkpoint": str(file)}

    def _opened(self, process: Process, opening: Mapping[str, Any], *, own_weights: bool) -> dict[str, str]:
        reply = process.ask("open", **opening)
        try:
            versions = dict(reply["versions"])
            if own_weights:
                return versions
            count, total = reply["weights"]
            same = count == self._sum[0] and abs(total - self._sum[1]) <= WEIGHT_TOLERANCE * self._sum[1]
        except (KeyError, TypeError, ValueError):
            raise process.nonsense("open", reply) from None
        if not same:
            process.close()
            raise PeerError("WeightsError", f"it loaded other weights than ours ({count} numbers, sum {total:.6g})")
        return versions

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_processes": {}}  # a process cannot be sent to another worker

    def __enter__(self) -> "Rivals":
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()
