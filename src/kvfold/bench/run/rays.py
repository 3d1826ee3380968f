"""Work spread by Ray, over this machine or a cluster: `RAY_ADDRESS` says which, no address is a Ray of one's own.

Every span is one task; Ray gives it to another worker when its worker dies. The records are the same, bit for bit,
where workers have the same processor and threads. Ray is an extra and is imported when this executor is opened.
"""

import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from kvfold.bench.run.executor import ATTEMPTS, Executor, given_up, work
from kvfold.bench.run.setting import Setting, Span
from kvfold.bench.suite import Outcome
from kvfold.errors import KvfoldError, SuiteError


class Rays(Executor):
    """A Ray, ours or one that is there already. It changes nothing once it is open."""

    def __init__(self, workers: int) -> None:
        try:
            import ray
        except ImportError:
            raise SuiteError(
                "the executor ray was asked for; Ray is not installed; install the extra kvfold[ray], or use processes"
            ) from None
        self._ray: Any = ray
        self._own = not ray.is_initialized()
        if self._own:
            here = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers}
            try:
                self._ray.init(log_to_driver=False, include_dashboard=False, **here)
            except Exception as error:  # Ray has no class for it
                said = " ".join(str(error).split())[:200]
                raise SuiteError(
                    f"the executor ray was asked for; Ray did not start ({said}); see RAY_ADDRESS, or use processes"
                ) from error

    def __exit__(self, *problem: object) -> None:
        """Leave a Ray that was there before as it was."""
        if self._own:
            self._ray.shutdown()

    def map(self, setting: Setting, plan: str, spans: Sequence[Span]) -> Iterator[list[Outcome]]:
        """Give out all spans, yield them in order. A mistake of the user's is not tried again."""
        order = self._ray.put(pickle.dumps(setting.order))
        task = self._ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1, retry_exceptions=[OSError, RuntimeError])(work)
        references = [task.remote(order, plan, span) for span in spans]
        for span, reference in zip(spans, references, strict=True):
            try:
                yield self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                cause = error.cause
                if isinstance(cause, KvfoldError):
                    raise cause from None
                raise given_up(plan, span, cause) from error
            except self._ray.exceptions.RayError as error:
                raise given_up(plan, span, error) from error
