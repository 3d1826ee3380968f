"""Families of transformers keep their verdicts: a sample in every run, all of them where slow tests are asked for.

A family that gets better is welcome; `make families` writes the new verdict down.
"""

import json

import pytest

from families.builder import NAMES
from families.judge import NOT_BUILT, REFUSED, RIGHT, WRONG, judge
from families.survey import PAGE, VERDICTS, page

ORDER = (RIGHT, REFUSED, NOT_BUILT, WRONG)  # from best to worst
FOUND = json.loads(VERDICTS.read_text())
SAMPLE = ("bert", "falcon", "gemma2", "gemma4", "gpt2", "gpt_oss", "deepseek_v3", "llama", "qwen3_next")


def keeps_its_verdict(name):
    verdict = judge(name)
    kind, reason = FOUND[name]
    assert ORDER.index(verdict.kind) <= ORDER.index(kind), f"{name} was {kind} {reason}, and is {verdict}"


@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_is_no_worse_than_its_verdict(name):
    keeps_its_verdict(name)


@pytest.mark.survey
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SAMPLE])
def test_every_other_family_is_no_worse_than_its_verdict(name):
    keeps_its_verdict(name)


def test_every_family_has_a_verdict_and_none_is_wrong():
    assert set(FOUND) == set(NAMES)
    assert [name for name, (kind, _) in FOUND.items() if kind == WRONG] == []


def test_the_page_of_models_says_what_was_found():
    assert PAGE.read_text() == page(FOUND)
