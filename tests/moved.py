"""How many bytes operations write: copies are counted, and no clock is asked.

What an operation makes counts whole; what it writes into a tensor that was there counts as much as is written. Views
and empty room count nothing. Bytes that a tier writes into its file are counted by whoever hands them to it.
"""

from contextlib import contextmanager

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

EMPTY = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")
SCATTERED = ("aten::index_put_", "aten::index_copy_", "aten::scatter_", "aten::masked_scatter_", "aten::index_add_")


class MovedBytes(TorchDispatchMode):
    """Adds up bytes that are written. It changes with every operation inside."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation and count what it wrote."""
        found = func(*args, **(kwargs or {}))
        name = func._schema.name
        if func._schema.is_mutable:
            tensors = [one for one in tree_leaves(args) if isinstance(one, Tensor)]
            self.bytes += tensors[-1 if name.startswith(SCATTERED) else 0].nbytes
        elif name not in EMPTY:
            given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
            made = [one for one in tree_leaves(found) if isinstance(one, Tensor)]
            self.bytes += sum(one.nbytes for one in made if one.untyped_storage().data_ptr() not in given)
        return found

    @contextmanager
    def around(self, patched, *places):
        """Count inside some functions only: pairs of what holds them and their name. Nested calls count once."""
        inside = []
        for holder, name in places:
            patched.setattr(holder, name, self._counting(getattr(holder, name), inside))
        yield self

    def _counting(self, function, inside):
        def counted(*args, **kwargs):
            if inside:
                return function(*args, **kwargs)
            inside.append(True)
            try:
                with self:
                    return function(*args, **kwargs)
            finally:
                inside.pop()

        return counted


def moved_by(action) -> int:
    """Bytes that an action writes."""
    with MovedBytes() as moved:
        action()
    return moved.bytes
