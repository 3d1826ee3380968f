"""Sampling of one token of one reply, and its log-probabilities.

Temperature 0, or a top_p of 0, takes the likeliest token. Else tokens are drawn from the softmax at that temperature,
cut to the fewest whose chances add up to top_p, by a generator of the reply's own: a seed gives the same reply beside
any other chats.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of a reply are drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None  # None: another reply each time
    chances: int | None = None  # likeliest tokens listed for each token; None: no log-probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """A token that was drawn, the logarithm of its chance at temperature 1, and the likeliest ones."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


class Sampler:
    """Draws the tokens of one reply. It changes with every token."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def draw(self, logits: Float[Tensor, " vocabulary"]) -> tuple[int, Chance | None]:
        """Draw a token; tell its chance where that is wanted."""
        scores = logits.float().cpu()
        token = self._token(scores)
        if self._sampling.chances is None:
            return token, None
        logs = scores.log_softmax(dim=-1)
        best = logs.topk(min(self._sampling.chances, len(logs)))
        likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return token, Chance(token=token, logprob=float(logs[token]), likeliest=likeliest)

    def _token(self, scores: Float[Tensor, " vocabulary"]) -> int:
        coldest = torch.finfo(scores.dtype).tiny  # what is colder may be 0 in this type
        if self._sampling.temperature < coldest or self._sampling.top_p == 0:
            return int(scores.argmax())
        below = scores - scores.max()  # never above 0: divided by very little, scores would overflow
        chances = (below / self._sampling.temperature).softmax(dim=-1)
        if self._sampling.top_p < 1:
            ordered = chances.sort(descending=True)
            above = ordered.values.cumsum(dim=-1) - ordered.values  # of the tokens before each
            gone = ordered.indices[above >= self._sampling.top_p]
            chances[gone] = 0.0
        return int(torch.multinomial(chances, 1, generator=self._generator))
