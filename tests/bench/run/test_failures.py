"""A rival that fails is a row that says how: in the run, in the file, in the table, on the page."""

import dataclasses
import io
import json
import math

import called
import made
import pytest
from coins import SUBJECT, Coins
from rich.console import Console

from kvfold.bench.ask.reader import open_rows
from kvfold.bench.peers.process import PeerError
from kvfold.bench.report import page as report
from kvfold.bench.report import tables
from kvfold.bench.report.live import LiveTable, PlainLines, drawn
from kvfold.bench.run import journal
from kvfold.bench.run.executor import InProcess
from kvfold.bench.run.job import Job
from kvfold.bench.run.record import UNMEASURED
from kvfold.bench.run.runner import run
from kvfold.bench.run.setting import Setting

RIVAL = Job(plan="half:Way(keep=0.5)", keep=0.5)
LATER = Job(plan="half", keep=0.5)


class Rivalled(Coins):
    """Coins whose rival fails on the second chunk, as often as it is told to."""

    def __init__(self, failures=1):
        Coins.__init__(self)
        self.failures, self.tries = failures, 0

    def ask(self, subject, plan, samples):
        if plan != RIVAL.plan:
            return Coins.ask(self, subject, plan, samples)
        self.tries += 1
        if self.tries % 2 == 0 and self.failures:
            self.failures -= 1
            raise PeerError("CrashError", "the process ended with code 3")
        return Coins.ask(self, subject, "half", samples)


def go(folder, suite, watcher=None):
    setting = Setting(suite=suite, subject=SUBJECT, n=8, seed=0, threads=1)
    watcher = watcher or PlainLines(Console(file=io.StringIO()))
    return run(setting, [RIVAL, LATER], folder=folder, executor=InProcess(), watcher=watcher)


def test_a_failure_is_a_record_and_the_run_goes_on(tmp_path):
    full, none, rival, later = go(tmp_path, Rivalled())
    assert rival.failure == "CrashError: the process ended with code 3"
    assert math.isnan(rival.score)
    assert (rival.full, rival.none, later.score) == (full.score, none.score, 0.5)


def test_in_the_file_what_was_not_measured_is_null_and_comes_back(tmp_path):
    records = go(tmp_path, Rivalled())
    line = json.loads((tmp_path / "records.jsonl").read_text().splitlines()[2])
    assert {name: line[name] for name in UNMEASURED} == dict.fromkeys(UNMEASURED)
    assert [record.line() for record in journal.Journal(tmp_path).records] == [record.line() for record in records]


def test_what_failed_is_tried_again_and_what_was_finished_is_not(tmp_path):
    go(tmp_path, Rivalled())
    suite = Rivalled(failures=0)
    records = go(tmp_path, suite)
    assert [record.failure for record in records] == [None] * 4
    assert {name for name, _ in suite.asked} == {"half"}
    assert [record.failure for record in journal.gather([tmp_path])] == [None] * 4


@pytest.mark.parametrize("watch", [LiveTable, PlainLines])
def test_who_watches_sees_the_failure(tmp_path, watch):
    said = io.StringIO()
    watcher = watch(Console(file=said, force_terminal=True, width=200))
    if watch is LiveTable:
        with watcher:
            go(tmp_path, Rivalled(), watcher)
    else:
        go(tmp_path, Rivalled(), watcher)
    assert "CrashError" in said.getvalue()


def failed_run():
    rival = made.record("kvpress:KVzip(keep=0.5)", 0.5, (0.0,) * 20)
    return [*made.run(), dataclasses.replace(rival, failure="ValueError: no keys", **UNMEASURED)]


def test_a_table_has_a_row_for_the_failure_and_a_note_that_says_how():
    (shown,) = tables.tables(failed_run())
    words = {row.label: tables.cells(shown, row) for row in shown.rows}
    assert words["kvpress:KVzip(keep=0.5)"][4] == "failed (ValueError)"
    assert {row.standing for row in shown.rows} == {"", "best", "failed"}
    assert "kvpress:KVzip(keep=0.5) failed: ValueError: no keys" in tables.markdown(shown)
    Console(file=io.StringIO()).print(drawn(shown))


def test_a_page_with_a_failure_can_be_drawn():
    page = report.html(failed_run())
    assert "failed (ValueError)" in page
    assert "<td>nan" not in page


def test_what_a_rival_claims_stands_beside_what_it_holds():
    rival = made.record("kvpress:ThinK(keep=0.5)", 0.5, (1.0, 0.0) * 10, stored=1.0, claimed=0.75)
    (shown,) = tables.tables([*made.run(), rival])
    words = {row.label: tables.cells(shown, row) for row in shown.rows}
    assert words["kvpress:ThinK(keep=0.5)"][1] == "1.000 (claims 0.750)"
    assert "kvpress:ThinK(keep=0.5) promises to keep 0.50 and stores 1.000" in shown.warnings


class Level(Coins):
    """A suite in which the floor answers as well as the ceiling."""

    def ask(self, subject, plan, samples):
        return Coins.ask(self, subject, "full", samples)


def test_a_suite_whose_floor_is_its_ceiling_says_so_in_every_record(tmp_path):
    records = go(tmp_path, Level())
    assert {record.remarks for record in records} == {
        ("no headroom: the floor (1.000) is not clearly below the ceiling (1.000)",)
    }
    assert go(tmp_path / "other", Rivalled(failures=0))[0].remarks == ()
    (shown,) = tables.tables(records)
    assert "no headroom" in shown.warnings[0]


def test_a_suite_in_which_holding_nothing_is_no_floor_does_not_warn_of_it(tmp_path):
    class Race(Level):
        has_floor = False

    assert {record.remarks for record in go(tmp_path, Race())} == {()}


def test_a_real_rivals_crash_goes_through_a_run(tmp_path, monkeypatch):
    class Fed(Coins):
        def ask(self, subject, plan, samples):
            if plan.startswith("far:"):
                rows = open_rows(subject, plan, count=len(samples))
                rows.feed([[1, 2]] * len(samples))
                rows.ledger()
            return Coins.ask(self, subject, plan if plan in ("full", "none") else "half", samples)

    one = called.subject()
    with called.rivals(monkeypatch, tmp_path / "log", one=one) as rivals:
        asked = type(one)(**{name: getattr(one, name) for name in one.__dataclass_fields__} | {"rivals": rivals})
        setting = Setting(suite=Fed(), subject=asked, n=4, seed=0, threads=1)
        jobs = [Job(plan=f"far:{name}", keep=None) for name in ("Crash", "Rubbish", "Honest")]
        records = run(setting, jobs, folder=tmp_path, executor=InProcess(),
                      watcher=PlainLines(Console(file=io.StringIO())))  # fmt: skip
    assert [(record.failure or "fine").partition(":")[0] for record in records[2:]] == [
        "CrashError", "RubbishError", "fine",
    ]  # fmt: skip
    assert records[4].versions["far"] == "1.0"
