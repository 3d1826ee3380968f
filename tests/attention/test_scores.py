"""Column sums of the attention matrix, block by block, against the matrix written out."""

import pytest
import torch

from kvfold.attention import scores as module
from kvfold.attention.reference import attend_part, causal_mask
from kvfold.attention.scores import attention_mass

SCALE = 0.4


def written_out(queries, keys, *, causal, counted):
    """Sums over queries of the softmax, averaged over each group."""
    group = queries.shape[1] // keys.shape[1]
    scores = queries @ keys.repeat_interleave(group, dim=1).mT * SCALE
    if causal:
        scores = scores.masked_fill(~causal_mask(queries.shape[2], keys.shape[2], keys.device), -torch.inf)
    weights = scores.softmax(dim=-1)
    if counted is not None:
        weights = weights * counted[:, None, :, None]
    return weights.sum(dim=2).unflatten(1, (-1, group)).mean(dim=2)


@pytest.mark.parametrize("block", [3, 1024])
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_sums_are_those_of_the_matrix(monkeypatch, causal, pads, block):
    monkeypatch.setattr(module, "_BLOCK", (block, block + 2))
    queries, keys = torch.randn(2, 4, 8, 6), torch.randn(2, 2, 8 if causal else 11, 6)
    mask = causal_mask(8, 8, keys.device) if causal else None
    weights = attend_part(queries, keys, keys, scale=SCALE, mask=mask)[1]
    counted = torch.rand(2, 8) < 0.5 if pads else None
    found = attention_mass(queries, keys, weights, scale=SCALE, causal=causal, counted=counted)
    wanted = written_out(queries, keys, causal=causal, counted=counted)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_every_counted_query_gives_a_mass_of_one():
    queries, keys = torch.randn(1, 2, 9, 4), torch.randn(1, 1, 20, 4)
    weights = attend_part(queries, keys, keys, scale=SCALE)[1]
    assert attention_mass(queries, keys, weights, scale=SCALE).sum().item() == pytest.approx(9, rel=1e-5)
