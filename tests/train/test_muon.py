"""Muon moves every direction of a matrix alike."""

import torch

from kvfold.train.muon import Muon, orthogonal


def test_newton_schulz_brings_all_singular_values_near_one():
    torch.manual_seed(0)
    for rows, columns in ((24, 24), (16, 40), (40, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(rows, columns), steps=5))
        assert float(values.min()) > 0.3
        assert float(values.max()) < 1.3


def test_the_direction_keeps_the_singular_vectors():
    torch.manual_seed(1)
    left, right = torch.linalg.qr(torch.randn(12, 12)).Q, torch.linalg.qr(torch.randn(12, 12)).Q
    matrix = left @ torch.diag(torch.linspace(0.5, 2, 12)) @ right
    moved = left.T @ orthogonal(matrix, steps=5) @ right.T
    assert float((moved - torch.diag(moved.diagonal())).abs().max()) < 1e-4


def test_it_finds_a_linear_map():
    torch.manual_seed(2)
    wanted, weight = torch.randn(8, 8), torch.nn.Parameter(torch.zeros(8, 8))
    optimiser = Muon([weight], lr=0.05)
    for step in range(400):
        optimiser.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        loss = (weight - wanted).pow(2).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert float(loss.detach()) < 0.01 * float(wanted.pow(2).mean())
