"""Every error that a user of kvfold can cause, as one tree.

    KvfoldError
    ├── PlanError     a plan's text or its members: unknown name, unknown setting, two members of one axis
    ├── BudgetError   a budget that cannot be met: too few slots, or a plan that cannot shrink later
    ├── CacheError    a cache used in a way it cannot serve: another model, a branched or broken cache
    ├── ModelError    a model that cannot be loaded or folded: unknown name, NaN weights, too long a text
    ├── FileError     a file that is missing, truncated, foreign or newer than this version
    ├── DataError     data that cannot be read or generated as asked
    └── SuiteError    a benchmark suite that is unknown, or that cannot run as asked

A message has three parts: what was asked, what is true, what to do. The command line prints it as one line
and leaves with code 2. Broken invariants of our own are assertions, never members of this tree.
"""


class KvfoldError(Exception):
    """The root: catch it to catch whatever kvfold refuses on purpose."""


class PlanError(KvfoldError):
    """A plan that cannot be built from its text or its members."""


class BudgetError(KvfoldError):
    """A budget that cannot hold what must be kept."""


class CacheError(KvfoldError):
    """A cache that cannot do what was asked of it."""


class ModelError(KvfoldError):
    """A model that cannot be loaded, or that kvfold cannot fold."""


class FileError(KvfoldError):
    """A file that cannot be read or written as kvfold needs it."""


class DataError(KvfoldError):
    """Data, generated or read, that is not what was asked for."""


class SuiteError(KvfoldError):
    """A benchmark that is unknown, or that cannot run as asked."""


def in_one_line(error: BaseException, most: int | None = None) -> str:
    """Give what an error of any library says in one line, of `most` characters; its type where it says nothing."""
    said = " ".join(str(error).split())
    return said[:most] or type(error).__name__
