"""The legend of sizes: one letter per dimension, the same in every signature.

    B  batch rows                         G  query heads
    Q  new tokens                         H  key/value heads (G is a multiple of H)
    S  stored slots                       D  size of a key of one head
    W  recent queries that are kept       E  size of a value of one head
    K  query rows of a pass or selection  N  key/value heads of all rows (B x H)
    T  tokens of a whole text             L  layers that fold
    M  pages                              X  numbers of a slot over all heads (H x D)
    C  vectors of a page's digest         P  parts of a basis: groups of heads that share a map
    V  vocabulary                         R  latent size

The letters appear inside jaxtyping annotations, `Float[Tensor, "B H S D"]`, as they stand; the tests check them at
run time. A size that has no letter is a word, `Int[Tensor, "B levels"]`. This file holds words only: no torch, so that
anything may read it.
"""

from typing import Final

LEGEND: Final = {
    "B": "batch rows",
    "Q": "new tokens",
    "S": "stored slots",
    "W": "recent queries that are kept",
    "K": "query rows of a pass or selection",
    "T": "tokens of a whole text",
    "M": "pages",
    "C": "vectors of a page's digest",
    "V": "vocabulary",
    "G": "query heads",
    "H": "key/value heads",
    "D": "size of a key of one head",
    "E": "size of a value of one head",
    "N": "key/value heads of all rows",
    "L": "layers that fold",
    "X": "numbers of a slot over all heads",
    "P": "parts of a basis",
    "R": "latent size",
}
