"""Planted lies: each is told by a plan or a driver made for it here, and must be caught by the harness."""

import dataclasses
import io

import pytest
import torch
from coins import Coins
from rich.console import Console

from fakes import fresh, model_of
from kvfold.adapters.files import register_adapter
from kvfold.bench.ask.audit import AuditedRows, check_fed
from kvfold.bench.ask.cost import size_fields
from kvfold.bench.ask.reader import Reader
from kvfold.bench.report.live import PlainLines
from kvfold.bench.run.executor import InProcess
from kvfold.bench.run.job import Job
from kvfold.bench.run.kept import KeptSamples
from kvfold.bench.run.runner import run
from kvfold.bench.run.setting import Setting
from kvfold.bench.subject import Subject
from kvfold.encode.lowrank.ranks import Ranks
from kvfold.errors import SuiteError
from kvfold.plan import Plan
from kvfold.select.streaming_llm import StreamingLLM
from ranks import ranks_for


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Hoarder(StreamingLLM):
    """Drops slots and keeps what it dropped, where no ledger looks."""

    cellar: list = dataclasses.field(default_factory=list, compare=False)

    def choose_slots(self, candidates):
        self.cellar.append(candidates.kv.keys)
        return StreamingLLM.choose_slots(self, candidates)


class Boaster(AuditedRows):
    """Counts half of what it holds."""

    def __init__(self, *given, **settings):
        AuditedRows.__init__(self, *given, **settings)
        true = self.folded.ledger
        self.folded.ledger = lambda: dataclasses.replace(true(), stored_bytes=true().stored_bytes // 2)


class Repeater(AuditedRows):
    """Feeds the whole history again with every turn, as callers of a cut cache do, and says that it fed the turn."""

    heard = ((),)

    def feed(self, chunks):
        said = [fed + len(chunk) for fed, chunk in zip(self.fed_tokens, chunks, strict=True)]
        self.heard = [(*old, *new) for old, new in zip(self.heard, chunks, strict=True)]
        AuditedRows.feed(self, self.heard)
        self.fed_tokens = said


def two_turns(rows):
    for turn in (range(3, 40), range(40, 70)):
        rows.feed([list(turn)])
        rows.fold()
    return rows


def test_what_is_dropped_and_kept_elsewhere_is_caught_with_both_numbers():
    rows = two_turns(AuditedRows(model_of("llama"), Plan(select=Hoarder(keep=0.2)), rows=1))
    with pytest.raises(
        SuiteError, match=r"says that it holds (\d+) bytes; its cache keeps (\d+) bytes alive"
    ) as caught:
        rows.ledger()
    said, found = (int(word) for word in str(caught.value).split() if word.isdigit())
    assert found > said


def test_a_ledger_that_counts_half_is_caught():
    rows = two_turns(Boaster(model_of("llama"), "streaming_llm(keep=0.5)", rows=1))
    with pytest.raises(SuiteError, match="bytes alive"):
        rows.ledger()


def test_history_that_is_fed_twice_on_the_second_turn_is_caught():
    rows = Repeater(model_of("llama"), "streaming_llm(keep=0.5)", rows=1)
    rows.feed([[5, 6, 7]])
    assert rows.ledger().seen == 3
    rows.feed([[8]])
    with pytest.raises(SuiteError, match="was fed 4 tokens in 7 columns; its cache has seen 7 in 7"):
        rows.ledger()


def test_more_slots_than_tokens_are_history_held_twice():
    spent = two_turns(AuditedRows(model_of("llama"), "full", rows=1)).ledger()
    check_fed(spent, fed=67, columns=67)
    with pytest.raises(SuiteError, match="history is in it twice"):
        check_fed(dataclasses.replace(spent, slots=spent.slots + 1), fed=67, columns=67)


@pytest.mark.parametrize("plan", ["full", "none", "h2o(keep=0.3)", "snapkv(keep=0.5) + int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_honest_plan_passes_at_every_moment(plan, family):
    rows = AuditedRows(model_of(family), plan, rows=1)
    assert isinstance(rows, Reader)
    for turn in (range(3, 40), range(40, 70), range(3, 9)):
        rows.feed([list(turn)])
        rows.ledger()
        rows.fold()
        rows.ledger()
    rows.answer([[5, 6]], max_new_tokens=3)
    assert rows.ledger().seen == 73


def test_a_trial_leaves_the_rows_as_they_were():
    rows = two_turns(AuditedRows(model_of("llama"), "snapkv(keep=0.5)", rows=1))
    before = rows.ledger()
    tried = rows.trial([[9, 10, 11]])[0]
    assert rows.ledger() == before
    singly = rows.trial([[9, 10, 11]], singly=2)[0]
    assert rows.ledger() == before
    assert torch.allclose(singly, tried, atol=1e-4)
    assert rows.read([[9, 10, 11]])[0].equal(tried)


class Folding(Coins):
    """Coins whose sizes come from rows of a real model, under the plan of that name."""

    plans = {"full": "full", "none": "none", "hoarder": Plan(select=Hoarder(keep=0.2))}  # noqa: RUF012

    def ask(self, subject, plan, samples):
        sizes = size_fields(two_turns(AuditedRows(subject.model, self.plans[plan], rows=1)).ledger(), rows=1)
        score = float(plan == "full")
        return [
            dataclasses.replace(one, score=score, **sizes)
            for one in Coins.ask(self, subject, "full" if plan == "full" else "none", samples)
        ]


def test_a_lie_stops_the_run_and_finished_samples_are_kept(tmp_path):
    one = Subject(name="a", model=model_of("llama"), tokenizer=None, fingerprint="a", dtype="float32", device="cpu")
    setting = Setting(suite=Folding(), subject=one, n=4, seed=0, threads=1)
    with pytest.raises(SuiteError, match="a saving counts when it is freed"):
        run(setting, [Job(plan="hoarder", keep=0.2)], folder=tmp_path, executor=InProcess(),
            watcher=PlainLines(Console(file=io.StringIO())))  # fmt: skip
    kept = KeptSamples(tmp_path, setting)
    assert [len(kept.find(plan)) for plan in ("full", "none", "hoarder")] == [4, 4, 0]


@pytest.mark.parametrize("plan", ["dynakv(rate=0.47)", "pca(rate=0.3)", "kvtc"])
def test_the_ledger_of_measured_ranks_counts_what_their_caches_hold(plan):
    model = fresh("llama", head_dim=32)
    measured = ranks_for(model).measured
    register_adapter(model, "dynakv", lambda: Ranks(bases={}, measured=measured, default="joint"))
    rows = AuditedRows(model, plan, rows=1)
    rows.feed([list(range(3, 60))])
    rows.fold()
    assert rows.ledger().weight_bytes > 0  # reading it compares it with a walk
