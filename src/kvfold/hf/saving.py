"""How a folded cache leaves its process: by `save`, never by pickle, and how it is copied inside of it.

A cache belongs to a living model, with hooks on it and buffers that others may share; pickled it would be neither
small nor right. saved.py has what is written, `kvfold.load_cache` reads it.
"""

from pathlib import Path
from typing import Any, NoReturn

from transformers import Cache

from kvfold.errors import CacheError, ModelError
from kvfold.hf.saved import SavedCache
from kvfold.hf.snapshot_file import CACHE


class Saving(Cache):
    """A folded cache as something to be written to a file."""

    def save(self: Any, path: str | Path) -> None:
        """Write the cache, folded as it is, to one file, which `kvfold.load_cache(path, model)` reads.

        Raises FileError if that fails (an old file stays), CacheError for beams and ModelError where the model is gone.
        """
        binding = self.lease.binding
        if binding is None:
            raise ModelError(f"a cache of {self.lease.name} was to be saved; the model is gone; keep it alive")
        if self.is_branched:
            raise CacheError(
                f"a cache of {self.batch_size} beams was to be saved; they are branches of one past; "
                "keep one of them by batch_select_indices first"
            )
        saved = SavedCache.of(self)
        header = saved.header(binding.model, self.ledger())
        CACHE.write(Path(path).expanduser(), header, saved.snapshot.tensors)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise CacheError(
            "a folded cache was to be pickled; it belongs to a living model, and pickle knows none; write it by "
            "cache.save(path) and read it by kvfold.load_cache(path, model), or copy it by cache.fork()"
        )
