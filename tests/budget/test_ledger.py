"""The ledger's fractions and its printed form; its bytes are held against tensors in tests/contract."""

from kvfold.budget.ledger import Ledger, PartLine


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


def test_it_prints_a_line_a_part():
    lines = str(ledger()).splitlines()
    assert "300 of 400 bytes" in lines[1]
    assert lines[2].split() == ["tail", "cpu", "20", "slots", "300", "bytes"]
