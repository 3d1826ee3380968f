"""A run says how long it will take, and ends in time with what is finished."""

import io

import pytest
from coins import SUBJECT, Coins
from rich.console import Console

from kvfold.bench.report.live import PlainLines
from kvfold.bench.run.executor import InProcess
from kvfold.bench.run.job import Job
from kvfold.bench.run.pace import OutOfTime, Pace
from kvfold.bench.run.runner import run
from kvfold.bench.run.setting import Setting

HALF, MOST = Job(plan="half", keep=0.5), Job(plan="most", keep=0.75)


class Seconds:
    """A clock on which each look takes a while."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


def go(folder, pace):
    setting = Setting(suite=Coins(), subject=SUBJECT, n=4, seed=0, threads=1)
    watcher = PlainLines(Console(file=io.StringIO()))
    return run(setting, (HALF, MOST), folder=folder, executor=InProcess(), watcher=watcher, pace=pace)


def test_the_estimate_comes_once_after_the_first_batch():
    said = []
    pace = Pace(say=said.append, clock=Seconds(10.0))
    pace.begin(40, 5)
    pace.count(4)
    pace.count(4)
    assert said == ["about 2 min for 40 samples, 5 plans in all"]


def test_a_run_out_of_time_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path):
    said = []
    cut = go(tmp_path, Pace(minutes=0.5, say=said.append, clock=Seconds(10.0)))  # three batches of four
    assert [record.plan for record in cut] == ["full", "none"]
    assert said[-1] == "0.5 minutes are over: 2 plans are left; the same command goes on with them"
    assert [record.plan for record in go(tmp_path, Pace())] == ["full", "none", "half", "most"]


def test_time_that_ends_with_the_last_sample_is_enough():
    pace = Pace(minutes=0.1, clock=Seconds(60.0))
    pace.begin(4, 1)
    pace.count(4)
    pace.begin(8, 1)
    with pytest.raises(OutOfTime):
        pace.count(4)
