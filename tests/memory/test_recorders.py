"""What methods ask to have recorded: each kind once, wide enough for everybody, ids by the transcript alone."""

import pytest
import torch

from kvfold.memory.attention_sums import AttentionSums
from kvfold.memory.hidden_states import HiddenStates
from kvfold.memory.recent_queries import RecentQueries
from kvfold.memory.recorders import TokenIds, combined


def test_each_kind_is_recorded_once_and_wide_enough_for_all():
    asked = (RecentQueries(4), AttentionSums(), RecentQueries(32), HiddenStates(), AttentionSums())
    assert combined(asked) == (RecentQueries(32), AttentionSums(), HiddenStates())


def test_nothing_is_recorded_where_nobody_asks():
    assert combined(()) == ()


def test_kinds_have_different_names_for_files_and_ledgers():
    names = {kind.name for kind in (RecentQueries, AttentionSums, HiddenStates, TokenIds)}
    assert len(names) == 4


@pytest.mark.parametrize("ask", [lambda ids: ids.open(torch.empty(1, 1, 0, 4)), lambda ids: ids.restore({}, {})])
def test_no_layer_keeps_token_ids(ask):
    with pytest.raises(AssertionError, match="kept by the transcript"):
        ask(TokenIds())


def test_only_sums_forbid_that_tokens_are_taken_back():
    assert [kind.allows_crop for kind in (RecentQueries, HiddenStates, TokenIds, AttentionSums)] == [
        True,
        True,
        True,
        False,
    ]
