"""The legend of sizes: one letter per dimension, the same in every signature.

    B  batch rows             G  query heads
    Q  new tokens, as queries H  key/value heads (G is a multiple of H)
    S  stored slots           D  head size
    R  latent size            W  vocabulary, where logits are meant

The letters appear inside jaxtyping annotations, `Float[Tensor, "B H S D"]`, as they stand; the tests check them at
run time. This file holds words only: no torch, so that anything may read it.
"""

from typing import Final

LEGEND: Final = {
    "B": "batch rows",
    "Q": "new tokens, as queries",
    "S": "stored slots",
    "G": "query heads",
    "H": "key/value heads",
    "D": "head size",
    "R": "latent size",
    "W": "vocabulary",
}
