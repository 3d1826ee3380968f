import dataclasses
import io

import pytest
from coins import SUBJECT, Coins
from rich.console import Console

from kvfold.bench.report.live import LiveTable, PlainLines, drawn
from kvfold.bench.report.tables import tables
from kvfold.bench.run import journal
from kvfold.bench.run.clock import Clock
from kvfold.bench.run.executor import InProcess
from kvfold.bench.run.job import Job
from kvfold.bench.run.runner import run
from kvfold.bench.run.setting import Setting
from kvfold.errors import SuiteError

HALF, MOST = Job(plan="half", keep=0.5), Job(plan="most", keep=0.75)
TIMES = ("ttft_seconds", "tpot_seconds", "wall_seconds")


def go(folder, *, suite=None, jobs=(HALF, MOST), n=10, seed=0, watcher=None, clock=None):
    setting = Setting(suite=suite or Coins(), subject=SUBJECT, n=n, seed=seed, threads=1)
    watcher = watcher or PlainLines(Console(file=io.StringIO()))
    return run(setting, jobs, folder=folder, executor=InProcess(), watcher=watcher, clock=clock)


def untimed(records):
    return [dataclasses.replace(record, **dict.fromkeys(TIMES, 0.0)) for record in records]


def test_the_ceiling_and_the_floor_run_unasked_and_every_record_names_them(tmp_path):
    records = go(tmp_path)
    assert [record.plan for record in records] == ["full", "none", "half", "most"]
    assert {(record.full, record.none) for record in records} == {(1.0, 0.0)}
    assert records[2].score == records[2].retained == 0.5


def test_samples_are_asked_in_chunks_of_the_suites_rows(tmp_path):
    suite = Coins()
    go(tmp_path, suite=suite, jobs=[])
    assert suite.asked == [("full", 4), ("none", 4), ("full", 4), ("none", 4), ("full", 2), ("none", 2)]


def test_the_first_chunk_may_be_small_and_the_others_begin_where_they_would():
    class Early(Coins):
        opens_with = 1

    setting = Setting(suite=Early(), subject=SUBJECT, n=10, seed=0, threads=1)
    assert setting.batches == [range(1), range(1, 4), range(4, 8), range(8, 10)]
    assert dataclasses.replace(setting, n=1).batches == [range(1)]


def test_finished_work_is_not_done_again(tmp_path):
    first = go(tmp_path)
    suite = Coins()
    assert go(tmp_path, suite=suite) == first
    assert suite.asked == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("plan", ["full", "none", "half", "most"])
def test_a_killed_run_goes_on_at_the_sample_where_it_stopped(tmp_path, plan, error):
    killed = Coins(breaks_at=plan, error=error, after=4)
    with pytest.raises(error):
        go(tmp_path, suite=killed)
    suite = Coins()
    records = go(tmp_path, suite=suite)
    asked = [*killed.asked, *suite.asked]
    assert sorted(asked) == sorted([(name, count) for name in ("full", "none", "half", "most") for count in (4, 4, 2)])
    assert untimed(records) == untimed(go(tmp_path / "in one go"))
    assert not (tmp_path / "samples.jsonl").exists(), "the records have them now"


def test_samples_of_another_run_stay_in_their_file(tmp_path):
    with pytest.raises(RuntimeError):
        go(tmp_path, suite=Coins(breaks_at="most"))
    go(tmp_path, jobs=[], seed=1)
    suite = Coins()
    go(tmp_path, suite=suite)
    assert ("full", 4) in suite.asked
    assert suite.asked.count(("full", 4)) == 1


class Slow(Coins):
    """Each chunk takes a minute by a clock that the test turns."""

    def __init__(self, hands):
        Coins.__init__(self)
        self.hands = hands

    def ask(self, subject, plan, samples):
        self.hands[0] += 60.0
        return Coins.ask(self, subject, plan, samples)


@pytest.fixture
def hands(monkeypatch):
    """The seconds that clocks show."""
    shown = [0.0]
    monkeypatch.setattr("kvfold.bench.run.clock.monotonic", lambda: shown[0])
    monkeypatch.setattr("kvfold.bench.run.executor.perf_counter", lambda: shown[0])
    return shown


def test_when_the_time_is_up_records_are_of_the_samples_that_every_plan_has(tmp_path, hands):
    records = go(tmp_path, suite=Slow(hands), clock=Clock(minutes=7))  # four plans of one chunk, and two more
    assert hands[0] <= 7 * 60
    assert [len(record.outcomes) for record in records] == [4] * 4
    assert not any(record.is_whole for record in records)
    assert records[2].remarks[-1] == "4 of 10 samples: the time was up"
    assert (records[2].full, records[2].none, records[2].score) == (1.0, 0.0, 1.0)
    assert [record.line() for record in journal.Journal(tmp_path).records] == [record.line() for record in records]
    (shown,) = tables(records)
    assert "4 of 10 samples" in shown.title
    suite = Slow(hands)
    whole = go(tmp_path, suite=suite)
    assert len(suite.asked) == 12 - 6, "what was finished was asked again"
    assert untimed(whole) == untimed(go(tmp_path / "in one go"))
    assert [len(record.outcomes) for record in journal.gather([tmp_path])] == [10] * 4


def test_time_for_no_sample_at_all_is_said_in_one_line(tmp_path, hands):
    with pytest.raises(SuiteError, match="before one was finished under every plan"):
        go(tmp_path, suite=Slow(hands), clock=Clock(minutes=3))
    assert (tmp_path / "samples.jsonl").exists()


def test_a_plan_that_was_finished_before_keeps_all_its_samples(tmp_path, hands):
    go(tmp_path, jobs=[HALF])
    records = go(tmp_path, suite=Slow(hands), clock=Clock(minutes=2))
    assert [len(record.outcomes) for record in records] == [10, 10, 10, 4]
    assert records[3].full == 1.0
    (shown,) = tables(records)
    assert [row.against_full is None for row in shown.rows] == [True, False, True, False]


def test_how_long_the_rest_takes_is_said_when_the_first_samples_are_finished(tmp_path, hands):
    said = io.StringIO()
    go(tmp_path, suite=Slow(hands), watcher=PlainLines(Console(file=said, width=200)))
    lines = [line for line in said.getvalue().splitlines() if " of 10 samples" in line]
    assert lines[0] == "4 of 10 samples; the others take about 6 minutes at this pace"
    assert lines[-1] == "10 of 10 samples"


def test_other_samples_are_run_anew_in_the_same_folder(tmp_path):
    go(tmp_path)
    assert go(tmp_path, seed=1)[0].seed == 1
    assert len(journal.Journal(tmp_path).records) == 8


def test_the_same_seed_gives_the_same_records_apart_from_times(tmp_path):
    lines = [[r.line() for r in untimed(go(tmp_path / name))] for name in ("a", "b")]
    assert lines[0] == lines[1]


def test_the_shortcut_is_weighted_by_the_families_of_the_samples(tmp_path):
    record = go(tmp_path, n=3)[0]  # heads, tails, heads
    assert record.shortcut == pytest.approx((0.2 + 0.4 + 0.2) / 3)
    assert record.by_family == {"heads": 1.0, "tails": 1.0}


def test_a_ceiling_of_zero_retains_nothing_that_could_be_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("coins").SHARES, "full", 0.0)
    assert go(tmp_path)[2].retained is None


def test_plain_lines_say_what_starts_and_what_came_out(tmp_path):
    said = io.StringIO()
    go(tmp_path, watcher=PlainLines(Console(file=said, width=40)))
    assert said.getvalue().splitlines()[:2] == ["full: 10 samples", "none: 10 samples"]
    assert "half: score 0.500, kept 0.500" in said.getvalue()


def test_a_terminal_sees_a_table_that_fills(tmp_path):
    said = io.StringIO()
    with LiveTable(Console(file=said, force_terminal=True, width=100)) as watcher:
        go(tmp_path, watcher=watcher)
    assert "4/10" in said.getvalue()
    assert "10/10" in said.getvalue()


def test_the_final_table_on_a_terminal_has_intervals_and_notes(tmp_path):
    said = io.StringIO()
    Console(file=said, width=200).print(drawn(tables(go(tmp_path, jobs=[HALF, Job(plan="most", keep=0.5)]))[0]))
    text = said.getvalue()
    assert "0.800" in text
    assert "0.200 to 0.800" in text
    assert "best guess that does not know" in text


def test_metrics_are_the_means_over_the_samples_that_have_them(tmp_path):
    class Weighed(Coins):
        def ask(self, subject, plan, samples):
            found = super().ask(subject, plan, samples)
            return [
                dataclasses.replace(one, metrics={"weight": sample[0], **({"edge": 3.0} if sample[0] == 1 else {})})
                for one, sample in zip(found, samples, strict=True)
            ]

    record = go(tmp_path, suite=Weighed(), jobs=[], n=4)[0]
    assert record.metrics == {"weight": 1.5, "edge": 3.0}
    low, high = record.metric_intervals["weight"]
    assert 0.0 <= low < 1.5 < high <= 3.0
    assert record.metric_intervals["edge"] == (3.0, 3.0)
    assert journal.Journal(tmp_path).records[0] == record


def test_a_method_saw_the_question_where_it_looks_and_the_suite_shows_it(tmp_path):
    class Open(Coins):
        query_aware = True

    looking = Job(plan="half", keep=0.5, looks_at_queries=True)
    assert [r.query_aware for r in go(tmp_path, suite=Open(), jobs=[looking, MOST])] == [False, False, True, False]
    assert not any(r.query_aware for r in go(tmp_path / "b", jobs=[looking]))


def test_what_a_suite_foretells_is_said_before_it_is_measured(tmp_path):
    class Seer(Coins):
        def prediction(self, subject, plan):
            return f"{plan} will take a while"

    said = io.StringIO()
    go(tmp_path, suite=Seer(), watcher=PlainLines(Console(file=said, width=200)))
    assert said.getvalue().startswith("full: 10 samples; full will take a while\n")
