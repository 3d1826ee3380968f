"""Damage: bits that flip, values that turn strange, and what may come of it: the same as before, or one line.

Everything is drawn from seeds. KVFOLD_FAULTS says how many times as many cases are drawn (`make faults`).
"""

import json
import os
from pathlib import Path

import torch
from transformers import GenerationConfig

from kvfold.errors import KvfoldError

SHORT = GenerationConfig(max_new_tokens=6, do_sample=False)
SCALE = int(os.environ.get("KVFOLD_FAULTS", "1"))
STRANGE = [None, True, -1, 0, 1, 3, 2**31, 2**40, 10**30, 1.5, -0.5, 1e308, "", "x", "full", "\x1b[2J", [], [[]], [-1],
           [0], [2**40], {}, {"x": 1}, [[1, 2], [3]], "9" * 5000, float("nan"), float("inf")]  # fmt: skip

# What may be done to a tensor; some are refused by torch itself for tensors of one dimension.
DEEDS = [
    lambda tensor: tensor[..., :-1].contiguous(), lambda tensor: torch.cat([tensor, tensor]),
    lambda tensor: tensor.flatten(), lambda tensor: tensor[None], lambda tensor: tensor.double(),
    lambda tensor: tensor.to(torch.int64), lambda tensor: torch.zeros(0), lambda tensor: tensor.mT.contiguous(),
    lambda tensor: tensor[1:].contiguous(), lambda tensor: tensor[..., None].contiguous(), lambda tensor: tensor.half(),
    lambda tensor: tensor.bool(), lambda tensor: tensor[:0].contiguous(), lambda tensor: tensor.flip(0).contiguous(),
    lambda tensor: (-tensor.double() - 1).to(tensor.dtype), lambda tensor: (tensor.double() + 1e9).to(tensor.dtype),
    lambda tensor: (torch.rand(tensor.shape) * 300 - 20).to(tensor.dtype),
]  # fmt: skip


def flipped(path: Path, byte: int, bit: int) -> None:
    """Flip one bit of a file."""
    held = bytearray(path.read_bytes())
    held[byte] ^= 1 << bit
    path.write_bytes(held)


def places(value, at=()):
    """Every place of a value in JSON's types, as the keys that lead to it."""
    found = [at] if at else []
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in list(keys)[:12]:
            found += places(value[key], (*at, key))
    return found


def damaged(words, generator):
    """A copy of some words in which one place has a strange value, is gone, or is there twice; and what was done."""
    copy = json.loads(json.dumps(words))
    at = generator.choice(places(copy))
    holder = copy
    for key in at[:-1]:
        holder = holder[key]
    deed = generator.choice(["gone", "twice", *["strange"] * 4])
    if deed == "gone":
        del holder[at[-1]]
    elif deed == "twice" and isinstance(holder, list):
        holder.insert(at[-1], holder[at[-1]])
    else:
        deed = repr(generator.choice(STRANGE))[:40]
        holder[at[-1]] = eval(deed, {"nan": float("nan"), "inf": float("inf")}) if len(deed) < 40 else "9" * 5000
    return copy, f"{at}: {deed}"


def one_line(call) -> str:
    """What a call refuses with, which must be one of ours in one line; empty where it is done."""
    try:
        call()
    except KvfoldError as error:
        said = str(error)
        assert "\n" not in said
        assert len(said) < 2000
        return said
    return ""
