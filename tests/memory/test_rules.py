"""What follows from a plan's members: whether a fold does anything, what is recorded, what a slot costs."""

import pytest

from kvfold.memory.attention_sums import AttentionSums
from kvfold.memory.recent_queries import RecentQueries
from memories import rules_of


@pytest.mark.parametrize(
    ("plan", "folds"),
    [
        ("full", False),
        ("dense", False),
        ("int8", True),
        ("snapkv(keep=0.5)", True),
        ("sentkv(budget=0.5)", True),
        ("none", True),
        ("kvzip(keep=0.5)", True),
    ],
)
def test_a_fold_changes_something_unless_all_is_kept_as_it_came(plan, folds):
    assert rules_of(plan).folds is folds


def test_a_method_and_a_place_record_recent_queries_once_and_the_wider_window():
    assert rules_of("snapkv(keep=0.5, window=7)").recorders == (RecentQueries(7),)
    (of_place,) = rules_of("sentkv(budget=0.5)").recorders
    narrow = rules_of("snapkv(keep=0.5, window=1) + sentkv(budget=0.5)")
    wide = rules_of("snapkv(keep=0.5, window=64) + sentkv(budget=0.5)")
    assert narrow.recorders == (of_place,)
    assert narrow.recent_queries == 1
    assert wide.recorders == (RecentQueries(64),)


def test_the_records_of_the_place_are_not_the_methods():
    rules = rules_of("sentkv(budget=0.5)")
    assert rules.recorders
    assert rules.select_records == frozenset()
    assert rules.recent_queries == 0


def test_token_ids_are_read_from_the_transcript_and_by_no_recorder_of_a_layer():
    rules = rules_of("kvzip(keep=0.5)")
    assert rules.reads_ids
    assert rules.recorders == ()
    assert not rules_of("snapkv(keep=0.5)").reads_ids


def test_a_slot_costs_a_position_and_a_sum_where_sums_are_kept():
    assert rules_of("snapkv(keep=0.5)").slot_extra_bytes == 4
    summed = rules_of("h2o(keep=0.5)")
    assert summed.slot_extra_bytes == 8
    assert summed.recorders == (AttentionSums(),)


def test_tokens_can_be_taken_back_unless_their_attention_was_added_up():
    assert rules_of("snapkv(keep=0.5)").allows_crop
    assert not rules_of("h2o(keep=0.5)").allows_crop


def test_raw_tokens_are_offloaded_only_where_nothing_is_lost_by_it():
    assert rules_of("sentkv(budget=0.5)").offload_above is not None
    assert rules_of("int8 + sentkv(budget=0.5)").offload_above is None
    assert rules_of("snapkv(keep=0.5) + sentkv(budget=0.5)").offload_above is None
    assert rules_of("snapkv(keep=0.5)").offload_above is None


def test_only_places_that_cut_text_read_delimiters():
    assert rules_of("full").delimiters is None
    assert rules_of("snapkv(keep=0.5)").delimiters is None


def test_a_layers_rules_differ_by_its_layout_only():
    rules = rules_of("snapkv(keep=0.5) + int8")
    of_layer = rules.of_layer(3)
    assert of_layer.select is rules.select
    assert of_layer.layout == rules.layout.of_layer(3)
