"""What kernels of Triton share, where it needs no kernel: padding, merging, and whether they can be launched."""

import pytest
import torch

from kvfold.attention.kernels import programs
from kvfold.attention.kernels.programs import merged, padded, power_of_two
from kvfold.attention.reference import attend_part


@pytest.mark.parametrize(("number", "power", "dimensions"), [(1, 1, 16), (16, 16, 16), (17, 32, 32), (96, 128, 128)])
def test_sizes_are_padded_to_powers_of_two(number, power, dimensions):
    assert power_of_two(number) == power
    assert padded(number) == dimensions


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_answers_of_programs_are_merged_to_that_of_all_slots(splits):
    queries, keys, values = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 20, 8), torch.randn(1, 3, 20, 8)
    shares = zip(keys.chunk(splits, dim=2), values.chunk(splits, dim=2), strict=True)
    answers = [attend_part(queries, *share, scale=0.3) for share in shares]
    outputs, weights = (torch.stack(side, dim=2)[0] for side in zip(*answers, strict=True))
    found = merged(outputs, weights)
    for one, wanted in zip(found, attend_part(queries, keys, values, scale=0.3), strict=True):
        torch.testing.assert_close(one, wanted[0])


def test_programs_without_slots_are_merged_to_zeros_that_weigh_nothing():
    output, weight = merged(torch.zeros(1, 3, 2, 8), torch.full((1, 3, 2), -torch.inf))
    assert not output.any()
    assert (weight == -torch.inf).all()


@pytest.mark.parametrize(
    ("name", "value"), [("triton", None), ("shutil", None), ("sysconfig", None), ("KVFOLD_KERNELS", "off")]
)
def test_kernels_are_launched_where_triton_a_compiler_and_headers_are(name, value, monkeypatch, tmp_path):
    """Everything that is wanted is pretended to be there, but one thing."""
    (tmp_path / "Python.h").touch()
    found = {"triton": object(), "shutil": "/usr/bin/cc", "sysconfig": str(tmp_path), "KVFOLD_KERNELS": ""}

    def pretend(found):
        monkeypatch.setattr(programs, "triton", found["triton"])
        monkeypatch.setattr(programs.shutil, "which", lambda name: found["shutil"])
        monkeypatch.setattr(programs.sysconfig, "get_config_var", lambda name: found["sysconfig"])
        monkeypatch.setenv("KVFOLD_KERNELS", found["KVFOLD_KERNELS"])
        return programs.launches.__wrapped__()

    assert pretend(found)
    assert not pretend(found | {name: value})
