"""Distillation: the divergence of a student's next-token distributions from a teacher's, over the vocabulary.

It is computed in chunks of tokens that are computed again for the gradient, so that memory is bounded whatever the
vocabulary. Knows nothing of data and of attention.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_CHUNK = 1024  # tokens whose logits are held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Sums over tokens, each times its weight."""

    kl: Float[Tensor, ""]  # of the student from the teacher
    cross_entropy: Float[Tensor, ""]  # of the student, of the true next tokens
    right: Bool[Tensor, " tokens"]  # where the true next token is the student's most likely one


def divergence(
    student: Float[Tensor, "tokens width"],
    teacher: Float[Tensor, "tokens width"],
    head: nn.Module,
    targets: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
) -> Divergence:
    """Compute how far the student's next-token distributions are from the teacher's, and from the text."""
    kl = student.new_zeros(()).float()
    cross_entropy = student.new_zeros(()).float()
    right = []
    for first in range(0, len(targets), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        sums = checkpoint(
            _chunk,
            student[chunk],
            teacher[chunk],
            head,
            targets[chunk],
            weights[chunk],
            use_reentrant=False,
        )
        assert sums is not None
        kl = kl + sums[0]
        cross_entropy = cross_entropy + sums[1]
        right.append(sums[2])
    return Divergence(kl=kl, cross_entropy=cross_entropy, right=torch.cat(right))


def _chunk(student: Tensor, teacher: Tensor, head: nn.Module, targets: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Both weighted sums over a chunk of tokens, and where the student is right."""
    logs = head(student).float().log_softmax(dim=-1)
    with torch.no_grad():
        wanted = head(teacher).float().log_softmax(dim=-1)
    kl = (wanted.exp() * (wanted - logs)).sum(dim=-1)
    cross_entropy = -logs.gather(-1, targets[:, None])[:, 0]
    right = logs.detach().argmax(dim=-1) == targets
    return (kl * weights).sum(), (cross_entropy * weights).sum(), right
