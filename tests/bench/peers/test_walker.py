import weakref

import numpy as np
import torch

from kvfold.bench.peers.programs.walker import SMALL_BYTES, bytes_held


class Slotted:
    __slots__ = ("__weakref__", "held")

    def __init__(self, held):
        self.held = held


def block(count=1000):
    return torch.zeros(count)


def test_a_storage_counts_once_however_many_views_there_are():
    whole = block()
    assert bytes_held([whole, whole[:10], {"a": (whole.view(10, 100),)}]) == {"cpu": 4000}


def test_a_small_view_counts_as_the_storage_that_it_keeps():
    assert bytes_held(block()[:1]) == {"cpu": 4000}
    assert bytes_held(block()[:1].clone()) == {"cpu": 4}


def test_attributes_slots_closures_and_defaults_are_followed():
    inside = block()

    def closed(other=block()):  # noqa: B008
        return inside, other

    class Plain:
        pass

    plain = Plain()
    plain.hidden = Slotted([block()])
    assert bytes_held(plain, closed) == {"cpu": 12000}


def test_a_cycle_ends_and_a_weak_reference_holds_nothing():
    ring = [block()]
    ring.append(ring)
    far = Slotted(block())
    assert bytes_held(ring, weakref.ref(far), weakref.WeakSet([far])) == {"cpu": 4000}


def test_a_models_weights_do_not_count_but_what_is_hidden_on_it_does_as_a_root():
    model = torch.nn.Linear(10, 10)
    model.masked = block()
    assert bytes_held([model, model.weight, model.weight.view(-1)], outside=model) == {}
    assert bytes_held([model], model.masked, outside=model) == {"cpu": 4000}


def test_memory_without_torch_counts_where_it_is_large():
    assert bytes_held(bytearray(SMALL_BYTES), b"key", np.zeros(1000)) == {"cpu": SMALL_BYTES + 8000}
    array = np.zeros(1000)
    assert bytes_held(torch.from_numpy(array)) == {"cpu": 8000}


class Wrapped(torch.Tensor):
    """A tensor whose shape is a promise and whose numbers lie in an attribute, as quantised ones are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, (1000, 1000), dtype=torch.float32)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def test_a_wrapped_tensor_counts_as_what_it_wraps():
    assert bytes_held([Wrapped(block().to(torch.int8))]) == {"cpu": 1000}
