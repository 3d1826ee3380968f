"""What the Triton kernels share: programs that each read a share of some slots, and how their answers are merged.

A program keeps a running softmax (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867) over tiles of its slots.
Sizes are padded to powers of two, for tl.dot takes no others. Triton comes with torch where there is CUDA; where it is
missing, or with KVFOLD_KERNELS=off, torch does the same. It knows no way of storing slots.
"""

import inspect
import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def _module(name: str) -> Any:
    """A module that comes with torch where there is CUDA; None elsewhere."""
    try:
        return import_module(name)
    except ImportError:
        return None


triton = _module("triton")
tl = _module("triton.language")
constexpr: Any = int if tl is None else tl.constexpr  # triton knows it by this name

MOST_ROWS = 64  # query rows that a program holds
PROGRAMS = 264  # two for every multiprocessor of a large card
SMALLEST = 16  # rows and dimensions that tl.dot takes


@cache
def launches() -> bool:
    """Tell whether kernels can be launched here: for that, triton has a little C compiled against Python's headers."""
    if triton is None or os.environ.get("KVFOLD_KERNELS") == "off":
        return False
    names = (os.environ.get("CC", "gcc"), "clang")
    found = map(shutil.which, names)
    headers = sysconfig.get_config_var("INCLUDEPY")
    return any(found) and Path(headers or "", "Python.h").is_file()


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function by triton, where there is one, as it was written: without what a test put around it."""
    if triton is None:
        return function
    written = inspect.unwrap(function)
    return triton.jit(written)


def power_of_two(number: int) -> int:
    """The next power of two, or the number itself."""
    return 1 << (number - 1).bit_length()


def padded(number: int) -> int:
    """The next power of two, 16 or more."""
    return max(SMALLEST, power_of_two(number))


def room_for_answers(
    queries: Float[Tensor, "N query_rows D"],
    splits: int,
    size: int,
) -> tuple[Float[Tensor, "N splits query_rows E"], Float[Tensor, "N splits query_rows"]]:
    """Memory for what each program answers: mean values of `size` dimensions, and log-sum-exps."""
    many, query_rows, _ = queries.shape
    shape = (many, splits, query_rows)
    outputs = queries.new_empty(*shape, size, dtype=torch.float32)
    weights = queries.new_empty(*shape, dtype=torch.float32)
    return outputs, weights


def merged(
    outputs: Float[Tensor, "N splits query_rows E"],
    weights: Float[Tensor, "N splits query_rows"],
) -> tuple[Float[Tensor, "N query_rows E"], Float[Tensor, "N query_rows"]]:
    """Merge the answers of programs, each for its share of the slots, as partial attentions are merged."""
    if weights.shape[1] == 1:
        return outputs[:, 0], weights[:, 0]
    total = weights.logsumexp(dim=1)
    lowest = torch.finfo(total.dtype).min
    finite = total.clamp(min=lowest)  # without slots: 0, not NaN
    shares = (weights - finite[:, None]).exp()
    weighted = outputs * shares[..., None]
    return weighted.sum(dim=1), total


@jit
def softmax_step(scores, highest, total):
    """Take a tile of scores [ROWS, TILE] into the running softmax: weights, fade, and the new highest and total.

    What was summed so far fades by as much as the highest score grew. Every tile has a slot that is there.
    """
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    fade = tl.exp(highest - higher)
    weight = tl.exp(scores - higher[:, None])
    total = total * fade + tl.sum(weight, axis=1)
    return weight, fade, higher, total


@jit
def store(outputs, weights, answer, real, dim, size, stored, highest, total, summed):
    """Write a program's answer: mean values and log-sum-exp, and -inf for the latter where it had no slot.

    `answer` numbers query rows over all programs; `dim` is where each column goes, if it is `stored`.
    """
    answer = answer.to(tl.int64)
    has_slots = total > 0
    divisor = tl.where(has_slots, total, 1.0)
    output = summed / divisor[:, None]
    place = answer[:, None] * size + dim[None]
    mask = real[:, None] & stored[None]
    tl.store(outputs + place, output, mask=mask)
    log_sum_exp = highest + tl.log(divisor)
    log_sum_exp = tl.where(has_slots, log_sum_exp, float("-inf"))
    tl.store(weights + answer, log_sum_exp, mask=real)
