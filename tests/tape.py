"""A pretended graph: what some work asks of torch is written down, and done again on the same memory.

As on CUDA, what is replayed is a fixed sequence of operations with the numbers of the host as they were, every tensor
has one place for good, and what would make the host wait for the device, or bring numbers from the host, is an error.
What does not go through torch's dispatcher is not on the tape, and so not done again.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "lift_fresh", "lift", "masked_select", "unique_dim")


class Tape(TorchDispatchMode):
    """The graph of some work, in the place of CudaGraph. It changes what its outputs hold."""

    def __init__(self, work):
        super().__init__()
        self.taken = []  # function, its arguments, and the tensors that it has given
        work()  # to warm up, which leaves no trace
        with self:
            self.outputs = work()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in _WAITS:
            raise RuntimeError(f"{name}: the host waits for the device, or hands it numbers, while a graph is captured")
        given = func(*args, **kwargs)
        self.taken.append((func, args, kwargs, tree_leaves(given)))
        return given

    def replay(self):
        """Do it again: what was made then is written over, views and what is written in place are where they were."""
        for func, args, kwargs, before in self.taken:
            for old, new in zip(before, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and _place(old) != _place(new):
                    old.copy_(new)


def _place(tensor):
    return tensor.untyped_storage().data_ptr()
