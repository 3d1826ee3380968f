import dataclasses
import io

import pytest
from coins import SUBJECT, Coins
from rich.console import Console

from kvfold.bench.report.live import LiveTable, PlainLines, drawn
from kvfold.bench.report.tables import tables
from kvfold.bench.run import journal
from kvfold.bench.run.executor import InProcess
from kvfold.bench.run.job import Job
from kvfold.bench.run.runner import run
from kvfold.bench.run.setting import Setting

HALF, MOST = Job(plan="half", keep=0.5), Job(plan="most", keep=0.75)
TIMES = ("ttft_seconds", "tpot_seconds", "wall_seconds")


def go(folder, *, suite=None, jobs=(HALF, MOST), n=10, seed=0, watcher=None):
    setting = Setting(suite=suite or Coins(), subject=SUBJECT, n=n, seed=seed, threads=1)
    watcher = watcher or PlainLines(Console(file=io.StringIO()))
    return run(setting, jobs, folder=folder, executor=InProcess(), watcher=watcher)


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
    assert suite.asked == [("full", 4), ("full", 4), ("full", 2), ("none", 4), ("none", 4), ("none", 2)]


def test_finished_work_is_not_done_again(tmp_path):
    first = go(tmp_path)
    suite = Coins()
    assert go(tmp_path, suite=suite) == first
    assert suite.asked == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("plan", ["full", "none", "half", "most"])
def test_a_killed_run_goes_on_where_it_stopped(tmp_path, plan, error):
    with pytest.raises(error):
        go(tmp_path, suite=Coins(breaks_at=plan, error=error))
    finished = journal.Journal(tmp_path).records
    suite = Coins()
    records = go(tmp_path, suite=suite)
    assert records[: len(finished)] == finished
    assert {name for name, _ in suite.asked} == {"full", "none", "half", "most"} - {r.plan for r in finished}
    assert untimed(records) == untimed(go(tmp_path / "in one go"))


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
    assert "0.800 (best)" in text
    assert "0.200 to 0.800" in text
    assert "best shortcut" in text


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
