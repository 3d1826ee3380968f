"""Low-rank parts: what is kept, moved and counted, against the same slots read back."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.attention.reference import attend_part
from kvfold.encode.lowrank.part import LowRankPart
from kvfold.memory.kv import KV
from ranks import form

HEADS, SIZE, SCALE = 2, 8, 0.3
COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=3)


def part_of(count, own, *, rows=1, first=0, mass=False, dtype=torch.float32):
    """A part of random slots in random levels."""
    shape = (rows, HEADS, count, SIZE)
    positions = torch.arange(first, first + count).expand(rows, HEADS, -1)
    kv = KV(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), positions)

    def deal(keys, values, positions):
        return torch.randint(0, len(own.levels), (len(positions),))

    kept = torch.ones(rows, HEADS, count, dtype=torch.bool)
    return LowRankPart.of(kv, kept, deal, own, mass=torch.rand(rows, HEADS, count) if mass else None)


WAYS = [{}, {"parts": HEADS}, {"int8": True}, {"parts": HEADS, "int8": True}]  # in which latents lie


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 3), st.data())
def test_keep_extend_and_rows_move_slots_and_lose_none(way, count, more, rows, data):
    own = form(HEADS, SIZE, **way)
    part = part_of(count, own, rows=rows, mass=True)
    other = part_of(more, own, rows=rows, first=count, mass=True)
    some = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    order = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4))
    both = part.keep(some.repeat(rows * HEADS)).extend(other).rows(order)
    (old, old_mass), (new, new_mass), (found, mass) = part.read(), other.read(), both.read()
    for place, row in enumerate(order):
        for name in ("keys", "values", "positions"):
            first, second = getattr(old, name)[row][:, some], getattr(new, name)[row]
            wanted = torch.cat([first, second], dim=1).double()
            assert torch.allclose(getattr(found, name)[place].double(), wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(mass[place], torch.cat([old_mass[row][:, some], new_mass[row]], dim=1))
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for _, tensor in both.tensors())


def test_bytes_are_the_kept_dimensions_and_a_position_a_token():
    own = form(HEADS, SIZE)
    part = part_of(40, own, dtype=torch.bfloat16)
    held = part.held[0].tolist()
    numbers = sum(count * sum(level) for count, level in zip(held, own.levels, strict=True))
    size = {name: tensor.untyped_storage().nbytes() for name, tensor in part.tensors()}
    assert sum(held) == 40
    assert size == {"held": 4 * len(own.levels), "keys": size["keys"], "values": size["values"], "positions": 160}
    assert size["keys"] + size["values"] == 2 * numbers
    assert part.slots == 80


def test_latents_as_bytes_are_a_byte_a_number_and_two_scales_a_token_and_off_by_half_a_scale_at_most():
    own, count = form(HEADS, SIZE, int8=True), 40
    torch.manual_seed(1)
    part = part_of(count, own)
    torch.manual_seed(1)
    plain = part_of(count, replace(own, int8=False))
    size = {name: tensor.untyped_storage().nbytes() for name, tensor in part.tensors()}
    assert size["scales"] == 2 * 2 * count
    assert size["keys"] == dict(plain.tensors())["keys"].numel()
    for rough, exact in zip(part.blocks[0], plain.blocks[0], strict=True):
        off = (rough.latents.value_numbers() - exact.values).abs()
        assert (off <= 0.51 * rough.each["scales"][:, 1:].float()).all()


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_a_batch_attend_over_their_own_slots(way):
    own = form(HEADS, SIZE, **way)
    part = part_of(9, own).beside([part_of(0, own), part_of(4, own)])
    queries = torch.randn(3, 4, 2, SIZE)
    found = part.attend(queries, scale=SCALE)
    for row in (0, 2):
        kv, _ = part.rows([row]).read()
        output, weights = attend_part(queries[row : row + 1], kv.keys, kv.values, scale=SCALE)
        assert torch.allclose(found.output[row], output[0], rtol=1e-4, atol=1e-4)
        assert torch.allclose(found.log_sum_exp[row], weights[0], rtol=1e-4, atol=1e-4)
    assert (found.log_sum_exp[1] == -torch.inf).all()


@pytest.mark.parametrize("way", WAYS)
def test_mass_grows_by_the_attention_received(way):
    own = form(HEADS, SIZE, **way)
    part, queries = part_of(9, own, mass=True), torch.randn(1, 4, 5, SIZE)
    grown = part.with_mass(queries, part.attend(queries, scale=SCALE).log_sum_exp, scale=SCALE, counted=None)
    gain = (grown.mass - part.mass).sum(dim=0)
    assert torch.allclose(gain, torch.full((HEADS,), 5.0), rtol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_a_part_that_contradicts_its_tensors_is_refused(way):
    own = form(HEADS, SIZE, **way)
    part = part_of(9, own)
    tensors = dict(part.tensors())
    again = LowRankPart.restored(part.plain(), tensors, own)
    assert torch.equal(again.read()[0].keys, part.read()[0].keys)
    with pytest.raises(ValueError, match="keys are promised"):
        LowRankPart.restored(part.plain(), tensors | {"keys": tensors["keys"][1:]}, own)
    if own.int8:
        with pytest.raises(ValueError, match="scales are promised"):
            LowRankPart.restored(part.plain(), tensors | {"scales": tensors["scales"][1:]}, own)
    with pytest.raises(ValueError, match="parts are there"):
        LowRankPart.restored({**part.plain(), "parts": [7, 1]}, tensors, own)
    with pytest.raises(ValueError, match="are there, and the plan's are"):
        LowRankPart.restored(part.plain(), tensors, replace(own, int8=not own.int8))
    with pytest.raises(ValueError, match="dimensions are there"):
        LowRankPart.restored({**part.plain(), "levels": [[1, 1]]}, tensors, own)
