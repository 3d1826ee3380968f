import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from faulty import FaultySuite
from random_model import save_random_model

from kvfold.bench.run.clock import Clock
from kvfold.bench.run.executor import InProcess
from kvfold.bench.run.executors import Spread, open_executor
from kvfold.bench.run.setting import Setting
from kvfold.bench.run.task import tasks
from kvfold.bench.subject import Subject, open_subject
from kvfold.bench.suites import find
from kvfold.errors import ModelError, SuiteError

PLAN = "streaming_llm(keep=0.5)"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model"))


def setting(model: Path, folder: Path, **faults) -> Setting:
    suite = FaultySuite(folder=folder, **faults)
    return Setting(suite=suite, subject=open_subject(str(model)), n=5, seed=3, threads=1)


def answers(where, given: Setting):
    todo = tasks(given, [PLAN], lambda plan, number: False)
    found = {}
    for part in where.map(given, todo, Clock()):
        found |= part.outcomes
    return [found[number] for number in range(given.n)]


def test_batches_cover_every_sample_once(model, tmp_path):
    batches = setting(model, tmp_path).batches
    assert [i for batch in batches for i in batch] == list(range(5))
    assert [len(batch) for batch in batches] == [2, 2, 1]


def test_a_setting_is_sent_without_its_model_and_is_the_same_elsewhere(model, tmp_path):
    first = setting(model, tmp_path)
    pickled = pickle.dumps(first)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    assert again.subject.model is not first.subject.model
    assert again.sample_fields == first.sample_fields
    assert again.samples == first.samples


def test_a_worker_with_other_weights_is_refused(model, tmp_path):
    first = setting(model, tmp_path)
    other = save_random_model(tmp_path / "other", seed=1)
    pickled = pickle.dumps(replace(first, subject=replace(first.subject, name=str(other))))
    with pytest.raises(ModelError, match="it found other weights"):
        pickle.loads(pickled)


def test_an_unknown_executor_names_the_real_ones():
    with pytest.raises(SuiteError, match="here, processes and ray"):
        open_executor("cloud", workers=2)


@pytest.mark.parametrize(
    ("numbers", "suite", "device", "expected"),
    [
        (1 << 27, "needle", "cpu", ("processes", 4, 2)),
        (1 << 20, "needle", "cpu", ("here", 1, None)),  # sooner done than a process starts
        (1 << 27, "speed", "cpu", ("here", 1, None)),  # nothing may run beside it
        (1 << 27, "needle", "cuda", ("here", 1, None)),
        (1 << 32, "needle", "cpu", ("here", 1, None)),  # the memory holds one
    ],
)
def test_a_small_model_on_a_processor_is_asked_by_several_processes(monkeypatch, numbers, suite, device, expected):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1 << 12, "SC_PHYS_PAGES": 1 << 23}.get)  # 32 GiB
    model = SimpleNamespace(parameters=lambda: [torch.empty(numbers, device="meta")])
    subject = Subject(name="a", model=model, tokenizer=None, fingerprint="a", dtype="float32", device=device)
    spread = Spread(executor="auto", workers=2).over(find(suite), lambda: subject)
    assert (spread.executor, spread.workers, spread.threads) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["processes", "ray"])
class TestWorkers:
    """What must hold wherever the work is done."""

    @pytest.fixture(autouse=True)
    def path(self, monkeypatch):
        """Workers must find the suite of this test, which is in no package."""
        pytest.importorskip("ray")
        monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")  # a busy machine starts slowly
        here = str(Path(__file__).parents[1])
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))

    @pytest.fixture
    def opened(self, name):
        """The executor with two workers; a machine on which Ray cannot start says so."""
        try:
            where = open_executor(name, workers=2)
        except SuiteError as error:
            pytest.skip(str(error))
        with where:
            yield where

    def test_results_are_those_of_this_process_bit_for_bit_though_a_worker_dies(self, opened, model, tmp_path):
        expected = answers(InProcess(), setting(model, tmp_path))
        asked = setting(model, tmp_path, dies_at=2)
        assert answers(opened, asked) == expected
        assert (tmp_path / "died").exists(), "no worker died, so nothing was shown"

    def test_what_always_fails_is_given_up_and_a_mistake_is_not_repeated(self, opened, model, tmp_path):
        with pytest.raises(SuiteError, match="3 attempts failed, the last with RuntimeError: always"):
            answers(opened, setting(model, tmp_path, fails_at=0))
        tries = (tmp_path / "tries").read_text()
        with pytest.raises(SuiteError, match="yours"):
            answers(opened, setting(model, tmp_path, refuses_at=0))
        assert len(tries.split()) == 3
        assert len((tmp_path / "refusals").read_text().split()) == 1
