"""Bases for keys and values: principal components of what a layer remembers, of several kinds.

`rotated`, `heads` and `mixed` are taken of keys after rotation: of all heads together, of each head by itself, or of
whichever is cheaper. `joint` is taken of keys before rotation. `rotary` is taken of keys after it, by a map that
commutes with rotation. Values are always taken of all heads together.
"""

from typing import Any, TypeAlias

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from kvfold.adapters.ranks import inverse
from kvfold.attention.basis import Bases, Basis, by_head
from kvfold.attention.rotary import Rotary
from kvfold.errors import DataError, ModelError
from kvfold.hf.rotary import rotary_of
from kvfold.train.dynakv.moments import LayerMoments, Moments, blocks

_ENERGY = 0.95  # of the energy that must be held when needs are compared
_DEARER = 1.65  # how many times the dimensions each head by itself may need

Component: TypeAlias = tuple[float, Tensor]  # energy, and the columns [X n] that take it


def known_rotary(model: Any) -> Rotary | None:
    """The rotations of a model; None where they are not known from positions alone."""
    try:
        return rotary_of(model)
    except ModelError:
        return None


def basis_names(rotary: Rotary | None) -> list[str]:
    """The kinds of bases that a model can have."""
    plain = ["mixed", "rotated", "heads"]
    return plain if rotary is None else [*plain, "joint", "rotary"]


def names_of(wanted: str | None, model: Any) -> list[str]:
    """The kinds of bases that a comma-separated list asks for, the adapter's default first.

    Without a list it is `joint`, or `mixed` where the model's rotations are not known. Raises DataError for others.
    """
    known = basis_names(known_rotary(model))
    if wanted is None:
        return ["joint" if "joint" in known else "mixed"]
    names = [name.strip() for name in wanted.split(",")]
    strange = [name for name in names if name not in known]
    if strange:
        raise DataError(
            f"basis {strange[0]!r} was asked; this model can have {', '.join(known)}; give one of them, or several "
            "with commas"
        )
    return names


def bases_of(name: str, moments: LayerMoments, heads: int, rotary: Rotary | None) -> Bases:
    """The bases of one kind for one layer."""
    # On real weights the mean of values must not be set apart: tokens that everything attends to have values near
    # nought, and the part of the mean that is cut off would be added to just those.
    return Bases(
        keys=_keys_basis(name, moments, heads, rotary),
        values=principal(moments.values, heads, centred=name != "joint"),
        rotary=rotary if name == "joint" else None,
    )


def _keys_basis(name: str, moments: LayerMoments, heads: int, rotary: Rotary | None) -> Basis:
    if name == "joint":
        return principal(moments.unrotated, heads, centred=False)
    if name == "rotary":
        assert rotary is not None, "a model without known rotations has no such basis"
        return rotary_basis(moments.rotated, heads, rotary)
    by_head = name == "heads"
    if name == "mixed":
        by_head = is_cheap_by_head(moments.rotated, heads)
    parts = heads if by_head else 1
    return principal(moments.rotated, heads, parts=parts)


def is_cheap_by_head(moments: Moments, heads: int) -> bool:
    """Whether keys of each head by itself need not many more dimensions than those of all heads together."""
    by_head = _needed(moments, heads)
    together = _needed(moments, 1)
    return by_head <= _DEARER * together


def _needed(moments: Moments, parts: int) -> int:
    """Dimensions that hold most of the energy, where all parts have equally many."""
    covariances = blocks(moments.covariance, parts)
    by_part = torch.linalg.eigvalsh(covariances).flip(-1)
    held = by_part.sum(dim=0).cumsum(dim=0)
    is_too_few = held < _ENERGY * held[-1]
    return parts * (int(is_too_few.sum()) + 1)


def principal(moments: Moments, heads: int, *, parts: int = 1, centred: bool = True) -> Basis:
    """Principal components about the mean or about zero, of each part by itself, the largest first."""
    covariances = blocks(moments.covariance if centred else moments.second, parts)
    _, vectors = torch.linalg.eigh(covariances)
    # The largest eigenvalue comes last.
    encode = vectors.flip(-1).float().contiguous()
    mean = moments.mean.float() if centred else torch.zeros_like(moments.mean).float()
    return Basis(encode=encode, decode=by_head(encode.mT, heads), mean=mean)


def rotary_basis(moments: Moments, heads: int, rotary: Rotary) -> Basis:
    """Complex components across heads within each frequency, the largest first: a map that commutes with rotation."""
    start = torch.zeros(1, dtype=torch.long, device=moments.mean.device)
    cosines, _ = rotary.at(start)
    half = cosines.shape[-1] // 2
    components = [
        *_turning_components(moments.second, heads, half),
        *_still_components(moments.second, heads, 2 * half),
    ]
    components.sort(key=_energy)
    columns = [columns for _, columns in components]
    encode = torch.cat(columns, dim=1).float()[None]
    # A mean would turn with the position, so there is none.
    mean = torch.zeros_like(moments.mean).float()
    return Basis(encode=encode, decode=inverse(encode, heads), mean=mean)


def _energy(component: Component) -> float:
    """The key that sorts the largest energy first."""
    return -component[0]


def _turning_components(second: Float[Tensor, "X X"], heads: int, half: int) -> list[Component]:
    """Components of the dimensions that are rotated, two columns each."""
    size = len(second) // heads
    found = []
    for frequency in range(half):
        # A head's numbers of one frequency are `half` apart: the real and the imaginary part.
        real = torch.arange(heads, device=second.device) * size + frequency
        both = torch.cat([real, real + half])
        of_frequency = second[both][:, both]
        values, vectors = torch.linalg.eigh(_complex_moments(of_frequency))
        for energy, vector in zip(values.tolist(), vectors.T, strict=True):
            columns = _columns(vector, both, len(second))
            found.append((energy, columns))
    return found


def _still_components(second: Float[Tensor, "X X"], heads: int, turned: int) -> list[Component]:
    """The dimensions of each head after the rotated ones, each by itself."""
    size = len(second) // heads
    found = []
    for dimension in range(turned, size):
        for head in range(heads):
            place = head * size + dimension
            column = torch.zeros_like(second[:, :1])
            column[place] = 1.0
            # Twice, as the energy of a complex component is that of two columns.
            energy = 2 * float(second[place, place])
            found.append((energy, column))
    return found


def _complex_moments(second: Float[Tensor, "both_sides both_sides"]) -> Complex[Tensor, "H H"]:
    """Second moments of real and imaginary parts, as those of the complex numbers."""
    heads = len(second) // 2
    real = second[:heads, :heads] + second[heads:, heads:]
    imaginary = second[heads:, :heads] - second[:heads, heads:]
    return torch.complex(real, imaginary)


def _columns(vector: Complex[Tensor, " H"], both: Int[Tensor, " both_sides"], size: int) -> Float[Tensor, "X 2"]:
    """The two real columns that take the complex component along a vector."""
    columns = torch.zeros(size, 2, dtype=torch.double, device=vector.device)
    real, imaginary = vector.real, vector.imag
    columns[both, 0] = torch.cat([real, imaginary])
    columns[both, 1] = torch.cat([-imaginary, real])
    return columns
