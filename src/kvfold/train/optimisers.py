"""Optimisers of a run: groups of parameters, each with its full learning rate, trained by Muon or by AdamW.

The loop scales every group's rate by the schedule. Matrices of layers go to Muon where a run asks for it; embeddings,
norms and everything else go to AdamW, without weight decay. Knows no model and no schedule.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kvfold.train.muon import Muon

FULL_RATE = "full_rate"  # the key of an optimiser's group under which its rate before the schedule is kept


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters that share an optimiser and a full learning rate."""

    parameters: Sequence[nn.Parameter]
    rate: float
    by_muon: bool = False


def groups_by_shape(model: nn.Module, *, matrix_rate: float | None, other_rate: float) -> list[ParameterGroup]:
    """Split the trained parameters into matrices of layers and others; without a `matrix_rate` all are others."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_matrix and matrix_rate is not None else others).append(parameter)
    groups = [ParameterGroup(parameters=others, rate=other_rate)]
    if matrix_rate is not None:
        groups.insert(0, ParameterGroup(parameters=matrices, rate=matrix_rate, by_muon=True))
    return groups


def optimisers_of(
    groups: Sequence[ParameterGroup],
    *,
    betas: tuple[float, float],
    fused: bool,
) -> list[torch.optim.Optimizer]:
    """Make a Muon and an AdamW over the groups that ask for them; `betas` and `fused` are AdamW's."""
    optimisers: list[torch.optim.Optimizer] = []
    by_muon = [_settings(group) for group in groups if group.by_muon]
    by_adam = [_settings(group) for group in groups if not group.by_muon]
    if by_muon:
        optimisers.append(Muon(by_muon))
    if by_adam:
        optimisers.append(torch.optim.AdamW(by_adam, betas=betas, weight_decay=0.0, fused=fused))
    return optimisers


def _settings(group: ParameterGroup) -> dict:
    """A group as torch's optimisers take it."""
    trained = [parameter for parameter in group.parameters if parameter.requires_grad]
    return {"params": trained, "lr": group.rate, FULL_RATE: group.rate}
