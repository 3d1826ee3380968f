"""The executors by their names: `here`, `processes` and `ray`.

Each is imported when it is opened, so that a run in this process reads neither multiprocessing nor Ray.
"""

from kvfold.bench.run.executor import Executor, InProcess
from kvfold.errors import SuiteError


def open_executor(name: str, *, workers: int) -> Executor:
    """Open the executor of that name. Raises SuiteError for a name that is none, and for a Ray that does not start."""
    if name == "here":
        return InProcess()
    if name == "processes":
        from kvfold.bench.run.pool import Pool

        return Pool(workers)
    if name == "ray":
        from kvfold.bench.run.rays import Rays

        return Rays(workers)
    raise SuiteError(f"executor {name!r} was asked for; there are here, processes and ray; give one of them")
