"""Work spread by Ray, over this machine or a cluster: `RAY_ADDRESS` says which; no address starts a Ray here.

Ray gives a task to another worker when its worker dies. The records are the same, bit for bit,
where workers have the same processor and threads. Ray is an extra and is imported when this executor is opened.
"""

import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from kvfold.bench.run.clock import Clock
from kvfold.bench.run.executor import ATTEMPTS, Executor, given_up, work
from kvfold.bench.run.setting import Setting
from kvfold.bench.run.task import Part, Task
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
        self._started_here = not ray.is_initialized()
        if self._started_here:
            sizes = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers}
            try:
                self._ray.init(log_to_driver=False, include_dashboard=False, **sizes)
            except Exception as error:  # Ray has no class for it
                reason = " ".join(str(error).split())[:200]
                raise SuiteError(
                    f"the executor ray was asked for; Ray did not start ({reason}); see RAY_ADDRESS, or use processes"
                ) from error

    def __exit__(self, *problem: object) -> None:
        """Leave a Ray that was there before as it was."""
        if self._started_here:
            self._ray.shutdown()

    def map(self, setting: Setting, tasks: Sequence[Task], clock: Clock) -> Iterator[Part]:
        """Give out all tasks, yield what comes out in order. A mistake of the user's is not tried again."""
        pickled = self._ray.put(pickle.dumps(setting))
        remote = self._ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1, retry_exceptions=[OSError, RuntimeError])(work)
        references = [remote.remote(pickled, task) for task in tasks]
        for number, task in enumerate(tasks):
            try:
                yield from self._ray.get(references[number], timeout=clock.left)
            except self._ray.exceptions.GetTimeoutError:
                for late in references[number:]:
                    self._ray.cancel(late, force=True)
                return
            except self._ray.exceptions.RayTaskError as error:
                cause = error.cause
                if isinstance(cause, KvfoldError):
                    raise cause from None
                raise given_up(task, cause) from error
            except self._ray.exceptions.RayError as error:
                raise given_up(task, error) from error
