"""A pretended accelerator: tensors that say they are elsewhere, computed here, and refused beside tensors from here.

torch knows a device `away`; an operation between its tensors and ones of the processor fails, as on a real one. So
a machine without a GPU finds code that forgets a device. It says nothing of kernels or speed.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("away")
AWAY = torch.device("away:0")
_module: Any = torch.get_device_module(AWAY)  # what torch asks of every device when random states are kept
_module.get_rng_state, _module.set_rng_state = lambda device: torch.zeros(0), lambda state, device: None
_module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
_BETWEEN = ("aten._to_copy.default", "aten.copy_.default")  # may read one device and write another


class AwayTensor(torch.Tensor):
    """A tensor that says it is elsewhere."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "AwayTensor":
        """Around a tensor of the processor, sharing its numbers."""
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, here.shape, **layout, device=AWAY, requires_grad=False)
        made.here = here
        return made

    def tolist(self) -> Any:
        """torch refuses it for subclasses."""
        return self.here.tolist()

    def untyped_storage(self) -> Any:
        """Where the numbers really are."""
        return self.here.untyped_storage()

    def __repr__(self) -> str:
        return f"AwayTensor({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Away(TorchDispatchMode):
    """While entered, tensors can be made on the device `away`."""

    def __enter__(self) -> "Away":
        """`torch.tensor(list, device=...)` makes its tensor here first, so that the copy is seen."""
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation of torch, on the numbers; its outputs are where its tensors are, or where it is told to be."""
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    away = [one for one in tensors if isinstance(one, AwayTensor)]
    here = [one for one in tensors if not isinstance(one, AwayTensor) and one.dim()]
    name = str(func)
    indexed = name.startswith(("aten.index", "aten._index")) and isinstance(args[0], AwayTensor)  # indices may be here
    if away and here and not indexed and name not in _BETWEEN:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    elsewhere = bool(away)
    if kwargs.get("device") is not None:
        elsewhere = torch.device(kwargs["device"]).type == AWAY.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif name == "aten.copy_.default":
        elsewhere = isinstance(args[0], AwayTensor)
    args, kwargs = tree_map(lambda one: one.here if isinstance(one, AwayTensor) else one, (args, kwargs))
    known = {id(one.here): one for one in away}

    def placed(one: Any) -> Any:
        if not elsewhere or not isinstance(one, torch.Tensor):
            return one
        return known[id(one)] if id(one) in known else AwayTensor(one)

    return tree_map(placed, func(*args, **kwargs))
