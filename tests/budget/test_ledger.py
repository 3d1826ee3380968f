"""The ledger's fractions and its printed form; its bytes are held against tensors in tests/contract."""

# pyright: reportArgumentType=false

from kvfold.budget.ledger import FetchStats, Ledger, PartLine


def ledger(**changes):
    values = {
        "plan": "full",
        "fed": 12,
        "seen": 10,
        "layers": 2,
        "kv_heads": 2,
        "slots": 20,
        "stored_bytes": 300,
        "resident_bytes": 200,
        "slack_bytes": 20,
        "full_bytes": 400,
        "other_bytes": 0,
        "attended_slots": 10,
        "parts": (PartLine(name="tail", device="cpu", slots=20, stored_bytes=300, slack_bytes=20),),
    }
    return Ledger(**{**values, **changes})


def test_three_fractions_are_three_things():
    assert (ledger().stored, ledger().resident, ledger().attended) == (0.75, 0.5, 0.25)


def test_an_empty_cache_keeps_everything():
    empty = ledger(seen=0, full_bytes=0, slots=0, stored_bytes=0, resident_bytes=0, attended_slots=0, parts=())
    assert (empty.stored, empty.resident, empty.attended) == (1.0, 1.0, 1.0)
    assert "fed 12" in str(empty)


def test_it_says_first_in_words_what_the_whole_model_holds():
    held = ledger(stored_bytes=1_500_000, full_bytes=3_000_000, other_bytes=20_000_000)
    assert str(held).splitlines()[0] == "full holds 21.5 MB for 10 tokens; the full cache would hold 23.0 MB"
    assert ledger().in_words == "full holds 0.0003 MB for 10 tokens; the full cache would hold 0.0004 MB"


def test_it_prints_a_line_a_part():
    lines = str(ledger()).splitlines()
    assert "300 of 400 bytes" in lines[1]
    assert lines[2].split() == ["tail", "cpu", "20", "slots", "300", "bytes"]


def test_counters_of_fetching_start_at_nothing_and_give_the_share_that_stays():
    fresh = FetchStats()
    assert (fresh.reuse, fresh.reuse_evenly) == (None, None)
    assert set(fresh.counts().values()) == {0}
    counted = FetchStats(selections=2, wanted=8, reused=6, reused_evenly=4, fetched=2, fetched_bytes=64)
    assert (counted.reuse, counted.reuse_evenly) == (0.75, 0.5)
    assert FetchStats(**counted.counts()) == counted
    assert "2 selections kept 0.75, fetched 64 bytes" in str(ledger(traffic=counted))
