"""The ledger of a memory, in numbers that can be checked by hand, and storages that are counted once."""

import pytest

from kvfold.memory.accounting import account
from memories import HEADS, LAYERS, PINNED, SIZE, Fed

TOKEN = HEADS * 2 * SIZE * 4  # bytes of a token in one layer: keys and values in float32
POSITION = 4
PAGES = "sentkv(budget=16, length=5, window=2, recent=2)"


def lines(ledger):
    return {line.name: line for line in ledger.parts}


def folded(plan="streaming_llm(tokens=9)", **more):
    run = Fed(plan, **more)
    run.forward(20, seed=1)
    run.memory.fold()
    return run


def test_an_empty_memory_holds_nothing():
    ledger = Fed("full").ledger()
    assert (ledger.fed, ledger.seen, ledger.slots, ledger.stored_bytes) == (0, 0, 0, 0)
    assert ledger.parts == ()


def test_raw_tokens_cost_their_keys_values_and_a_position_and_slack_is_a_part_of_them():
    run = Fed("full")
    run.forward(20, seed=1)
    ledger = run.ledger()
    columns = 20 + 20 // 8
    assert ledger.stored_bytes == len(LAYERS) * columns * (TOKEN + POSITION)
    assert ledger.slack_bytes == len(LAYERS) * 2 * (TOKEN + POSITION)
    assert ledger.slots == len(LAYERS) * HEADS * 20
    assert ledger.full_bytes == len(LAYERS) * 20 * TOKEN


def test_folded_slots_cost_a_position_for_every_head():
    ledger = folded().ledger()
    slot = TOKEN + HEADS * POSITION
    assert lines(ledger)["sinks"].stored_bytes == len(LAYERS) * PINNED * slot
    assert lines(ledger)["folded"].stored_bytes == len(LAYERS) * 5 * slot
    assert lines(ledger)["folded"].slots == len(LAYERS) * HEADS * 5


def test_a_fraction_is_met_with_positions_counted():
    ledger = folded("streaming_llm(keep=0.5)").ledger()
    assert ledger.stored_bytes <= 0.5 * ledger.full_bytes


def test_bytes_of_lower_precision_are_fewer():
    exact, rounded = (folded(plan).ledger() for plan in ("streaming_llm(tokens=20)", "streaming_llm(tokens=20) + int8"))
    assert lines(rounded)["folded"].stored_bytes < lines(exact)["folded"].stored_bytes / 2
    assert lines(rounded)["sinks"].stored_bytes == lines(exact)["sinks"].stored_bytes


def test_records_are_held_too():
    run = Fed("snapkv(keep=0.5, window=4)")
    run.forward(20, seed=1)
    window = lines(run.ledger())["window"]
    queries = 2 * HEADS * 4 * (SIZE + 1) * 4  # a log-sum-exp beside each query
    assert window.stored_bytes == len(LAYERS) * (queries + 4 * POSITION)
    assert window.slots == 0


def test_rows_that_share_a_storage_are_counted_once():
    run = folded()
    twin = run.memory.fork()
    assert account(twin, plan="", device="cpu", other_bytes=0).stored_bytes == run.ledger().stored_bytes


def test_slots_in_a_tier_are_stored_and_not_resident():
    ledger = folded(PAGES).ledger()
    assert ledger.resident_bytes < ledger.stored_bytes
    tiers = {line.device for line in ledger.parts if line.name == "folded"}
    assert "host" in tiers


def test_a_token_attends_to_fewer_slots_than_are_stored_where_pages_are_selected():
    run = folded(PAGES)
    run.forward(1, seed=2)
    ledger = run.ledger()
    assert ledger.attended_slots < ledger.slots
    assert ledger.traffic.fetched > 0


def test_without_a_place_all_slots_are_attended_and_nothing_moves():
    ledger = folded().ledger()
    assert ledger.attended_slots == ledger.slots
    assert ledger.traffic is None


def test_what_others_hold_and_what_was_learned_stand_beside():
    run = folded()
    ledger = account(run.memory, plan="a plan", device="cpu", other_bytes=7, adapter_bytes=11)
    assert (ledger.plan, ledger.other_bytes, ledger.weight_bytes) == ("a plan", 7, 11)
    assert ledger.stored_bytes == run.ledger().stored_bytes


def test_another_device_holds_nothing_here():
    run = folded()
    assert account(run.memory, plan="", device="cuda", other_bytes=0).resident_bytes == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_slots_are_counted_over_rows_layers_and_heads(rows):
    assert folded(rows=rows).ledger().slots == rows * len(LAYERS) * HEADS * 9


def test_delimiter_classes_are_a_line_of_their_own():
    run = Fed(PAGES)
    run.with_text(16, seed=1, classes=[0] * 16)
    text = lines(run.ledger())["text"]
    assert text.stored_bytes == 16 + 16 // 8 + 1
    assert text.slots == 0
