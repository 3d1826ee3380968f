"""Contract: a turn costs what it is long, in every layout: what its fold writes does not grow with the text before it.

Bytes that are written are counted: into raw tails, folded parts, their index and their tier. What a method computes to
choose is not a part of it. Methods that choose anew among all that is held write what they keep of it, as they read it;
they are here with room for everything, and once a segment.
"""

from dataclasses import replace

import pytest
import torch

from kvfold.memory import fold
from kvfold.memory.accounting import account
from kvfold.memory.tail import Tail
from kvfold.place.tiers.disk import DiskTier
from kvfold.plan import Plan, members
from moved import MovedBytes
from plans import PLACED, lossless, lossy
from without_model import feed, memory_of

TURNS, LONG = 3, 160  # tokens of a turn; turns
CODED = {name: Plan(encode=kind()) for name, kind in members("encode").items()}
ROOMY = {name: plan for name, plan in lossless().items() if plan.has_budget}
ONCE = {f"{name}-turn": plan.with_scope("turn") for name, plan in ROOMY.items()}
PLACES = {
    "device": Plan(place=replace(PLACED, tier="device")),
    "latents-host": Plan(encode=members("encode")["dynakv"](), place=PLACED),
    "int8-disk": Plan(encode=members("encode")["int8"](), place=PLACED),
    "codes-disk": Plan(encode=members("encode")["kvtc"](), place=PLACED),
}
EVERY = {"full": Plan(), "dynakv-int8": lossy()["dynakv-int8"], **CODED, **ROOMY, **ONCE, **PLACES}
# Copies of a text that grows, by a sixteenth or (in tiers and tails) by an eighth, move at most 17 times its bytes;
# the rest is what appending itself writes on its way: indexes, bytes in order, and digests of keys that are read back.
# An index that began with few keys is measured anew at powers of two, until it has 1,024.
FACTOR, DIGESTS = 40, 30_000  # times what is held; bytes a turn


@pytest.mark.parametrize("name", EVERY)
def test_a_turn_moves_what_it_is_long(name, monkeypatch, tmp_path):
    plan, after = EVERY[name], []
    if "disk" in name:
        plan = replace(plan, place=replace(plan.place, tier="disk", directory=str(tmp_path)))
    memory = memory_of(plan)
    moved, put = MovedBytes(), DiskTier.put

    def counted(tier, offset, data):
        moved.bytes += len(data)
        put(tier, offset, data)

    monkeypatch.setattr(DiskTier, "put", counted)
    with moved.around(monkeypatch, (Tail, "append"), (Tail, "after"), (fold, "_joined")):
        for turn in range(1, LONG + 1):
            feed(memory, torch.ones(1, turn * TURNS, dtype=torch.bool), TURNS)
            memory.fold()
            after.append(moved.bytes)
    stored = account(memory, plan="", device="cpu", other_bytes=0).stored_bytes
    assert after[-1] <= FACTOR * stored + LONG * DIGESTS * (memory.rules.placement is not None)
    assert after[-1] <= 2.8 * after[LONG // 2 - 1], "twice the turns may not move four times the bytes"
