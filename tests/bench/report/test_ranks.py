"""The picture of ranks: every token once, shaded by what is kept of it."""

import torch

from fakes import model_of, text
from kvfold.bench.report.ranks import Shares, page, shares_of


class Words:
    """A tokenizer whose tokens are words w0, w1, ..."""

    def __call__(self, given, return_tensors=None):
        return {"input_ids": torch.tensor([[int(word[1:]) for word in given.split()]])}

    def decode(self, ids):
        return " ".join(f"w{one}" for one in ids)


def test_shares_are_what_the_cache_keeps():
    words = " ".join(f"w{one}" for one in text(1, 40)[0].tolist())
    found = shares_of(model_of("llama"), Words(), "streaming_llm(tokens=14)", words)
    kept = [share for share in found.layers[0] if share]
    assert len(found.tokens) == 40
    assert kept == [1.0] * 14
    assert found.layers[0][:4] == (1.0,) * 4


def test_the_page_holds_every_token_and_layer():
    shares = Shares(plan="a < b", tokens=("the", " <s>", "the", "the"), layers={0: (0.1, 1.0, 0.2, 0.3), 4: (1.0,) * 4})
    drawn = page(shares)
    assert "a &lt; b" in drawn
    assert drawn.count("&lt;s&gt;") == 3  # the mean, and each layer
    assert "<td>the<td>" in drawn
    assert "Layer 4: 1.000" in drawn
