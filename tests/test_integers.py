"""Whole numbers are taken wherever Python takes them for an index, and refused in one line elsewhere."""

import os
import subprocess
import sys

import pytest
import source
import torch

from kvfold.errors import PlanError
from kvfold.integers import MOST, integer, integer_or_none


def given(value, **bounds):
    return integer("stride", value, **({"least": 1, "error": PlanError} | bounds))


@pytest.mark.parametrize("value", [3, torch.tensor(3), torch.tensor([3])[0]])
def test_a_whole_number_is_pythons_own(value):
    assert type(given(value)) is int
    assert given(value) == 3


@pytest.mark.parametrize("value", [2.5, 3.0, True, "5", None, [3], float("nan"), torch.tensor(3.0), 0, -5, 2**31])
def test_all_else_is_one_line_that_names_it(value):
    with pytest.raises(PlanError, match="stride=") as caught:
        given(value)
    assert "\n" not in str(caught.value)


def test_a_number_of_many_digits_is_not_written_out():
    with pytest.raises(PlanError, match="very many digits was given") as caught:
        given(10**5000)
    assert len(str(caught.value)) < 200


def test_none_may_be_allowed():
    assert integer_or_none("stride", None, least=1, error=PlanError) is None
    assert integer_or_none("stride", MOST, least=1, error=PlanError) == MOST


CALLS = """
import pytest, kvfold
from fakes import model_of, text
from kvfold.errors import KvfoldError

model = model_of("llama")
nan, many = float("nan"), 10**40
for settings in (
    {"stride": 0}, {"stride": 2.5}, {"prompt_tokens": -5}, {"prompt_tokens": True}, {"pinned": -1}, {"pinned": "4"},
):
    with pytest.raises(KvfoldError, match="^" + next(iter(settings)) + "="):
        kvfold.cache(model, "snapkv(keep=0.5)", **settings)
cache = kvfold.cache(model, "snapkv(keep=0.4)", prompt_tokens=0)
for _ in range(2):
    for budget in (
        {"tokens": "5"}, {"tokens": 2.5}, {"tokens": 0}, {"keep": "x"}, {"keep": nan}, {"keep": True}, {"keep": 1.5},
        {"max_bytes": many}, {"keep": 0.5, "tokens": 4}, {"limit_bytes": 5}, {"keep": 0.5, "limit_bytes": "x"}, {},
    ):
        with pytest.raises(KvfoldError):
            cache.rebudget(**budget)
        assert str(cache.plan) == "snapkv(keep=0.4)"
    for until in (2.5, True, "5", many, -1):
        with pytest.raises(KvfoldError, match="^until="):
            cache.fold(until=until)
    for removed in (-2.5, "1", 3):
        with pytest.raises(KvfoldError):
            cache.crop(removed)
    model(text(1, 20), past_key_values=cache)
"""


def test_every_door_refuses_counts_that_are_none():
    """In a process without the run-time checker, which would refuse other types before the library does."""
    paths = os.pathsep.join(str(source.ROOT / folder) for folder in ("src", "tests"))
    subprocess.run([sys.executable, "-c", CALLS], env=os.environ | {"PYTHONPATH": paths}, check=True)
