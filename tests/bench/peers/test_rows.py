import json
import pickle
import time

import called
import pytest

from kvfold.bench.ask.cost import size_fields
from kvfold.bench.ask.reader import Reader
from kvfold.bench.peers.process import PeerError, Process
from kvfold.errors import DataError


@pytest.fixture
def log(tmp_path):
    return tmp_path / "asked.jsonl"


@pytest.fixture
def far(monkeypatch, log):
    with called.rivals(monkeypatch, log) as rivals:
        yield rivals


def test_what_is_fed_before_the_first_question_is_one_context_a_row(far, log):
    rows = far.rows("far:Honest", count=2)
    assert isinstance(rows, Reader)
    for turn in ([[1, 2], [3]], [[4], [5, 6, 7]]):
        rows.feed(turn)
        rows.fold()
    assert called.asked(log) == ["open", "forget"]
    rows.ledger()
    taken = [json.loads(line) for line in log.read_text().splitlines() if '"take"' in line]
    assert [one["ids"] for one in taken] == [[1, 2, 4], [3, 5, 6, 7]]
    assert rows.fed_tokens == [3, 4]


def test_sizes_are_what_was_found_by_walking_and_the_claim_stands_beside(far):
    rows = far.rows("far:Honest", count=2)
    rows.feed([[1] * 10, [1] * 30])
    spent = rows.ledger()
    assert (spent.seen, spent.stored_bytes, spent.full_bytes) == (40, 320, 640)
    assert size_fields(spent, rows=2) == {
        "stored": 0.5, "resident": 0.5, "attended": 0.5, "stored_bytes": 160, "resident_bytes": 160,
        "full_bytes": 320, "claimed": 0.25,
    }  # fmt: skip


def test_answers_come_back_a_row_each_with_their_pace(far):
    rows = far.rows("far:Honest", count=2)
    rows.feed([[1], [2]])
    assert rows.answer([[5], [7, 20]], max_new_tokens=3, stop={22}) == [[6, 7, 8], [21, 23]]
    assert (rows.pace.first_seconds, rows.pace.token_seconds) == (0.5, 0.5)


def test_chunks_are_read_after_the_context_and_remembered_unless_on_trial(far):
    rows = far.rows("far:Honest", count=2)
    rows.feed([[1, 1], [2]])
    one, two = rows.read([[8, 9], []])
    assert one.tolist() == [[8, -8], [9, -9]]
    assert len(two) == 0
    assert rows.trial([[3], [4]])[1].tolist() == [[4, -4]]
    assert rows.logits([[3], [4, 5]]).tolist() == [[3, -3], [5, -5]]
    assert rows.ledger().seen == rows.fed_tokens[0] + rows.fed_tokens[1] == 5 + 3


def test_a_row_without_a_context_is_refused(far):
    rows = far.rows("far:Honest", count=2)
    rows.feed([[1], []])
    with pytest.raises(DataError, match="row 1 has no context"):
        rows.ledger()
    with pytest.raises(DataError, match="3 chunks were given; there are 2 rows"):
        rows.feed([[1], [2], [3]])


@pytest.mark.parametrize(
    ("method", "kind", "says"),
    [
        ("Crash", "CrashError", "code 3 at 'take'; its last words: my last words"),
        ("Rubbish", "RubbishError", "Traceback: all is lost"),
        ("Odd", "RubbishError", "many"),
        ("Refuse", "ValueError", "too short a context"),
    ],
)
def test_each_way_to_fail_says_how_in_one_line(far, method, kind, says):
    rows = far.rows(f"far:{method}", count=1)
    rows.feed([[1, 2]])
    with pytest.raises(PeerError, match=says) as caught:
        rows.ledger()
    assert caught.value.kind == kind
    assert "\n" not in str(caught.value)


def test_a_silent_rival_is_ended_at_the_time_limit(monkeypatch, log):
    with called.rivals(monkeypatch, log, limit_seconds=10.0) as rivals:
        rows = rivals.rows("far:Hang", count=1)
        rows._process._limit = 0.2
        rows.feed([[1]])
        with pytest.raises(PeerError, match=r"TimeoutError: no answer to 'take' within 0.2 s"):
            rows.ledger()
        assert not rows._process.alive
        assert rivals.rows("far:Honest", count=1) is not None


def test_a_rival_that_died_is_started_again_for_the_next_method(far, log):
    rows = far.rows("far:LateCrash", count=1)
    rows.feed([[1]])
    with pytest.raises(PeerError, match="CrashError"):
        rows.answer([[1]], max_new_tokens=1)
    later = far.rows("far:Honest", count=1)
    later.feed([[1, 2]])
    assert later.ledger().seen == 2
    assert called.asked(log).count("open") == 2


def test_a_rival_that_only_refuses_keeps_its_process(far, log):
    for method in ("Refuse", "Honest"):
        rows = far.rows(f"far:{method}", count=1)
        rows.feed([[1, 2]])
        if method == "Refuse":
            with pytest.raises(PeerError):
                rows.ledger()
    assert rows.ledger().seen == 2
    assert called.asked(log).count("open") == 1


def test_other_weights_than_ours_are_noticed(monkeypatch, log):
    with (
        called.rivals(monkeypatch, log, weights=[6, 99.0]) as rivals,
        pytest.raises(PeerError, match="WeightsError: it loaded other weights"),
    ):
        rivals.rows("far:Honest", count=1)


def test_a_command_that_cannot_be_started_is_a_failure_of_the_rival(tmp_path):
    with pytest.raises(PeerError, match="cannot be started"):
        Process([str(tmp_path / "nothing")])


def test_a_closed_run_leaves_no_process_and_a_copy_starts_its_own(far):
    far.rows("far:Honest", count=1)
    process = far.process("far")
    assert far.versions("far:Honest") == {"far": "1.0"}
    copy = pickle.loads(pickle.dumps({"_peers": None} | {k: v for k, v in far.__getstate__().items() if k != "_peers"}))
    assert copy["_processes"] == {}
    far.close()
    assert not process.alive
    begun = time.monotonic()
    with pytest.raises(PeerError, match="CrashError"):
        process.ask("forget")
    assert time.monotonic() - begun < 60
