"""Bases: latents are projections, parts are read by themselves, and gradients and layouts follow."""

import pytest
import torch

from fakes import model_of
from kvfold.attention.basis import Bases, Basis, LatentBlock, by_head
from kvfold.attention.int8 import to_int8
from kvfold.hf.rotary import rotary_of
from ranks import form

HEADS, SIZE = 2, 8


def test_a_latent_cut_to_r_dimensions_is_the_projection_onto_the_first_r():
    own = form(HEADS, SIZE).bases.keys
    numbers = torch.randn(20, HEADS * SIZE)
    for rank in (1, 7, HEADS * SIZE):
        latents = (numbers - own.mean) @ own.encode[0, :, :rank]
        wanted = torch.cat([latents @ head for head in own.decode[:, :rank]], dim=1) + own.mean
        assert torch.allclose(own.read(own.write(numbers)[:, :rank]), wanted, rtol=1e-4, atol=1e-4)
    assert torch.allclose(own.read(own.write(numbers)), numbers, rtol=1e-4, atol=1e-4)


def test_a_latent_of_parts_is_the_projection_of_each_head_by_itself():
    own = form(HEADS, SIZE, parts=HEADS).bases.keys
    numbers = torch.randn(20, HEADS * SIZE)
    for rank in (1, 3, SIZE):
        wanted = [
            (numbers - own.mean).view(20, HEADS, SIZE)[:, head] @ own.encode[head, :, :rank] @ own.decode[head, :rank]
            for head in range(HEADS)
        ]
        found = own.read(own.write(numbers)[:, : rank * HEADS])
        assert torch.allclose(found, torch.cat(wanted, dim=1) + own.mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", [1, HEADS])
def test_slopes_of_a_latent_are_the_gradient_of_what_is_read(parts):
    basis = form(HEADS, SIZE, parts=parts).bases.keys
    latents = basis.write(torch.randn(5, HEADS * SIZE)).requires_grad_()
    slopes = torch.randn(5, HEADS * SIZE)
    (wanted,) = torch.autograd.grad((basis.read(latents) * slopes).sum(), latents)
    assert torch.allclose(basis.slopes(slopes), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", [1, HEADS])
def test_latents_come_back_from_how_they_are_stored(parts):
    basis = form(HEADS, SIZE, parts=parts).bases.keys
    latents = torch.randn(5, 6)
    flat = basis.flattened(latents)
    assert torch.equal(basis.unflattened(flat, 5, 6), latents)
    assert basis.unflattened(flat, 5, 6).untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


@pytest.mark.parametrize("parts", [1, HEADS])
def test_a_block_is_written_over_some_slots_of_another(parts):
    basis = form(HEADS, SIZE, parts=parts).bases.keys

    def block(count):
        numbers = torch.randn(count * 4)
        latents = basis.unflattened(numbers, count, 4)
        return LatentBlock(keys=latents, values=latents.clone(), positions=torch.arange(count)), numbers

    (whole, numbers), (some, _) = block(5), block(2)
    before = whole.keys.clone()
    whole.write(2, some)
    assert torch.equal(whole.keys, torch.cat([before[:2], some.keys, before[4:]]))
    assert torch.equal(whole.values[2:4], some.values)
    assert torch.equal(basis.unflattened(numbers, 5, 4), whole.keys), "it is written where the block lies"


def test_a_map_back_to_a_part_is_split_into_maps_back_to_its_heads():
    decode = torch.randn(2, 3, 8)  # two parts of two heads, three dimensions, four numbers a head
    of_heads = by_head(decode, 4)
    assert of_heads.shape == (4, 3, 4)
    latent = torch.randn(3)
    assert torch.allclose(torch.cat([latent @ of_heads[2], latent @ of_heads[3]]), latent @ decode[1], atol=1e-6)


def test_half_precision_is_mapped_in_float32():
    basis = form(HEADS, SIZE).bases.keys
    numbers = torch.randn(4, HEADS * SIZE).bfloat16()
    assert basis.write(numbers).dtype == torch.float32
    assert basis.read(basis.write(numbers).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("rotated", [False, True])
def test_keys_and_values_come_back_from_all_dimensions(rotated):
    bases = form(HEADS, SIZE, rotary=rotary_of(model_of("llama")) if rotated else None).bases
    keys, values, positions = torch.randn(6, HEADS, SIZE), torch.randn(6, HEADS, SIZE), torch.arange(3, 9)
    latents = bases.write(keys, values, positions)
    block = LatentBlock(keys=latents[0], values=latents[1], positions=positions)
    assert torch.allclose(bases.read_keys(block), keys, rtol=1e-3, atol=1e-3)
    assert torch.allclose(bases.read_values(block), values, rtol=1e-3, atol=1e-3)


def test_a_basis_before_rotation_gives_one_latent_to_a_key_at_any_position():
    bases = form(HEADS, SIZE, rotary=rotary_of(model_of("llama"))).bases
    key = torch.randn(1, HEADS, SIZE)
    latent = bases.keys.write(key.flatten(1))
    turned = []
    for position in (torch.tensor([0]), torch.tensor([9])):
        at_position = bases.read_keys(LatentBlock(keys=latent, values=latent, positions=position))
        again, _ = bases.write(at_position, key, position)
        assert torch.allclose(again, latent, rtol=1e-3, atol=1e-3)
        turned.append(at_position)
    assert not torch.allclose(turned[0], turned[1], atol=1e-3)


def test_latents_as_bytes_are_read_with_their_scales():
    latents = [torch.randn(5, 4), torch.randn(5, 3)]
    (keys, of_keys), (values, of_values) = map(to_int8, latents)
    scales = torch.stack([of_keys, of_values], dim=-1)
    block = LatentBlock(keys=keys, values=values, positions=torch.arange(5), scales=scales)
    assert torch.allclose(block.key_numbers(), latents[0], atol=float(of_keys.max()))
    assert torch.allclose(block.value_numbers(), latents[1], atol=float(of_values.max()))


def test_a_tile_of_a_block_has_its_share_of_everything():
    block = LatentBlock(
        keys=torch.randn(5, 4), values=torch.randn(5, 3), positions=torch.arange(5), scales=torch.rand(5, 2)
    )
    tile = block.tile(2, 9)
    assert torch.equal(tile.keys, block.keys[2:])
    assert tile.positions.tolist() == [2, 3, 4]
    assert torch.equal(tile.scales, block.scales[2:])
    assert block.tile(0, 2).values.untyped_storage().data_ptr() == block.values.untyped_storage().data_ptr()


def test_a_layer_has_as_many_heads_as_its_values_are_read_to():
    pair = form(HEADS, SIZE, parts=HEADS).bases
    assert pair.heads == HEADS
    assert (pair.keys.parts, pair.values.parts) == (HEADS, 1)
    assert isinstance(pair, Bases)
    assert isinstance(pair.keys, Basis)
