"""Benches that are killed: each finished sample is kept from the first on, and the same command goes on behind it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ASKS = (
    "bench",
    "ruler",
    "--model",
    "tiny",
    "--n",
    "9",
    "--set",
    "tokens=600",
    "--set",
    "tasks=niah_single_1",
    "--plans",
    "snapkv(keep=0.5)",
)
SOURCE = Path(__file__).parents[2] / "src"


def begun(folder):
    """A bench in a process of its own."""
    command = [sys.executable, "-m", "kvfold", *ASKS, "--threads", "1", "--out", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def kept(folder):
    """Samples that are on the disk as whole lines, by plan and number."""
    path = folder / "samples.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(entry["plan"], entry["sample"]) for entry in map(json.loads, lines)]


def scores(folder):
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return {record["plan"]: record["outcomes"] for record in records}


@pytest.mark.slow
def test_a_bench_that_is_killed_goes_on_behind_its_last_finished_sample(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    bench = begun(killed)
    while bench.poll() is None and not kept(killed):
        time.sleep(0.05)
    bench.send_signal(signal.SIGKILL)
    bench.communicate()
    found = kept(killed)
    assert found, "the first finished sample is on the disk"
    for folder in (killed, whole):
        bench = begun(folder)
        _, said = bench.communicate()
        assert bench.returncode == 0, said.decode()
    assert scores(killed) == scores(whole)
    assert not kept(killed), "the records have them now"
