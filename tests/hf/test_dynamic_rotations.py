"""Models whose rotations grow with the text (dynamic NTK) answer with a folded cache as with transformers' own."""

import pytest
import torch
from transformers import DynamicCache

import kvfold
from driving import close, feed
from fakes import fresh, text

POSITIONS = 32


@pytest.fixture
def model():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return fresh("llama", max_position_embeddings=POSITIONS, rope_parameters=rope)


def test_a_text_beyond_the_first_positions_is_read_as_by_the_stock_cache(model):
    ids, sizes = text(1, 60), (20, 25, *(1,) * 10)
    wanted = feed(model, ids, DynamicCache(config=model.config), sizes=sizes)
    assert not close(wanted, feed(model, ids, DynamicCache(config=model.config)))  # pieces are rotated differently
    assert close(feed(model, ids, kvfold.cache(model, "full"), sizes=sizes), wanted)
    assert kvfold.cache(model, "full").lease.text_limit is None


def test_a_fold_that_runs_the_text_again_leaves_the_rotations_as_they_were(model):
    cache = kvfold.cache(model, "kvzip(keep=0.5)", prompt_tokens=0, least=0)
    feed(model, text(1, 40), cache)
    before = model.model.rotary_emb.inv_freq
    cache.fold()
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert model.model.rotary_emb.max_seq_len_cached == 40
