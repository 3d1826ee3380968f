"""What `generate` is given must have something behind what the cache was fed."""

from typing import Any

import pytest
import torch

import kvfold
from fakes import fresh, model_of, text
from kvfold.errors import CacheError

SETTINGS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def talk():
    """A cache after a first answer, and the text up to there."""
    cache = kvfold.cache(model_of("llama"), "snapkv(keep=0.5)", least=0)
    return cache, model_of("llama").generate(text(1, 20), past_key_values=cache, **SETTINGS)


@pytest.mark.parametrize("tokens", [9, 24])
def test_a_prompt_that_is_no_longer_than_what_was_fed_is_refused_in_one_line(talk, tokens):
    with pytest.raises(
        CacheError, match=f"a whole text of {tokens} tokens was given to a cache that was fed 24"
    ) as error:
        model_of("llama").generate(text(1, tokens, seed=4), past_key_values=talk[0], **SETTINGS)
    assert "\n" not in str(error.value)


def test_new_tokens_alone_are_taken_with_a_mask_of_all_columns(talk):
    cache, said = talk
    new = torch.cat([said[:, -1:], text(1, 2)], dim=1)
    mask = torch.ones(1, cache.memory.fed + 3, dtype=torch.long)
    model_of("llama").generate(new, past_key_values=cache, attention_mask=mask, **SETTINGS)
    assert cache.memory.fed == 24 + 3 + 4


def test_a_forward_that_reads_the_text_from_its_start_again_is_refused_before_anything_is_kept(monkeypatch):
    """As transformers before 5.21 does it, where a later turn comes in chunks."""
    model: Any = fresh("llama")
    cache = kvfold.cache(model, "snapkv(keep=0.5)", least=0)
    said = model.generate(text(1, 20), past_key_values=cache, **SETTINGS)
    whole = torch.cat([said, text(1, 30)], dim=1)

    def from_the_start(ids, *args, **kwargs):
        return model(ids[:, :9], past_key_values=cache)

    monkeypatch.setattr(model, "_prefill", from_the_start)
    with pytest.raises(CacheError, match="9 tokens were fed after 24; they are not the next ones") as error:
        model.generate(whole, past_key_values=cache, **SETTINGS)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    model.generate(whole, past_key_values=cache, **SETTINGS)
    assert cache.memory.fed == whole.shape[1] + 4
