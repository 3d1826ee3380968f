"""How long the way of a key is: calls of kvfold's functions in a decode step, and files on the way of a fold.

Every call is a place where a reader must follow, and a microsecond of every layer of every token. The bounds are a
little above what the way needs; tracer.py does the counting, on the shipped tiny model.
"""

import json
import os
import subprocess
import sys

import pytest
import source

LAYERS = 5  # of tiny, that fold
DECODE_CALLS = {"full": 22, "snapkv(keep=0.5)": 40, "sonic(keep=0.2)": 40}  # a layer
FOLD_PLAN, FOLD_FILES = "dynakv(rate=0.47) + sentkv(budget=0.1)", 37  # records that wait are one of them


def traced(trip, *plans):
    """Calls by plan and function, counted in a process without the run-time checker that these tests run under."""
    program = [sys.executable, source.ROOT / "tests" / "house" / "tracer.py", trip, *plans]
    environment = os.environ | {"PYTHONPATH": str(source.ROOT / "src")}
    return json.loads(subprocess.run(program, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def decode_steps():
    return traced("decode", *DECODE_CALLS)


@pytest.mark.parametrize("plan", DECODE_CALLS)
def test_a_decode_step_takes_few_calls_a_layer(decode_steps, plan):
    calls = decode_steps[plan]
    assert any(name.startswith("hf/attention.py:") for name in calls), "the step did not go through kvfold"
    assert sum(calls.values()) / LAYERS <= DECODE_CALLS[plan], calls


def test_the_fold_of_latents_that_are_cut_into_sentences_goes_through_few_files():
    files = {name.split(":")[0] for name in traced("fold", FOLD_PLAN)[FOLD_PLAN]}
    assert {"attention/low_rank.py", "place/page_table.py"} <= files, "the fold did not encode or did not index"
    assert len(files) <= FOLD_FILES, sorted(files)
