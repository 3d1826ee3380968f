"""What a method may ask of a fold: the segment and its budget, scores of every kind, rows and text that are run."""

import contextlib
from dataclasses import replace

import pytest
import torch

from kvfold.attention.reference import attend_part
from kvfold.memory.context import NO_ROW, FoldContext, ReplayText, Rows, Selection, mean_held_of_rows
from kvfold.memory.fold import pin
from kvfold.memory.transcript import Transcript
from memories import HEADS, LAYERS, PINNED, QUERY_HEADS, SCALE, SIZE, Fed


def context_of(run, *, columns=None, access=None):
    """The context of a fold of all layers now, sinks set apart."""
    memory = run.memory
    columns = memory.layers[0].state.tail.length if columns is None else columns
    return FoldContext(
        states={index: pin(layer.state, layer.rules, columns) for index, layer in memory.layers.items()},
        rules=memory.rules,
        columns=columns,
        scales=dict.fromkeys(memory.layers, SCALE),
        transcript=memory.transcript,
        access=access,
    )


def fed(plan="snapkv(keep=0.5, window=4)", *, rows=1, count=12, pads=False):
    run = Fed(plan, rows=rows)
    run.forward(count, seed=1, pads=pads)
    return run


def test_the_segment_is_the_oldest_columns_without_the_sinks():
    segment = context_of(fed(), columns=9).segment
    assert segment.tokens(0) == [4, 5, 6, 7, 8]
    assert segment.real.shape == (1, 9)
    assert segment.positions[0].tolist() == [-1] * PINNED + [4, 5, 6, 7, 8]  # sinks have left the tail
    assert (segment.layers, segment.heads) == (len(LAYERS), HEADS)


def test_pads_are_no_tokens_of_the_segment():
    segment = context_of(fed(rows=2, pads=True)).segment
    assert segment.tokens(0) == list(range(PINNED, 12))
    assert segment.tokens(1) == list(range(PINNED, 11))


@pytest.mark.parametrize(
    ("plan", "slots"),
    [("snapkv(tokens=9)", 5), ("snapkv(tokens=40)", 36), ("full", 8)],
)
def test_the_budget_of_a_segment_is_what_sinks_leave(plan, slots):
    assert context_of(fed(plan)).segment.slots == (slots,)


def test_a_fraction_grows_with_the_text_and_pays_for_positions():
    context = context_of(fed("snapkv(keep=0.5)"))
    token_bytes = HEADS * 2 * SIZE * 4
    slot_bytes = token_bytes + HEADS * 4
    allowed = context.allowed_slots(0, seen=1000, pinned=PINNED)
    assert allowed == 500 * token_bytes // slot_bytes - PINNED


def test_bytes_are_shared_out_over_layers_and_rows():
    token_bytes = HEADS * 2 * SIZE * 4 + HEADS * 4
    plan = f"snapkv(max_bytes={token_bytes * 10 * len(LAYERS) * 2})"
    context = context_of(fed(plan, rows=2))
    assert context.allowed_slots(0, seen=50, pinned=PINNED) == 10 - PINNED


def test_a_plan_without_a_budget_has_no_limit():
    assert context_of(fed("full")).allowed_slots(0, seen=50, pinned=0) is None


def test_what_was_folded_before_is_taken_off_the_budget():
    run = fed("snapkv(tokens=20)", count=14)
    run.memory.fold()
    run.forward(9, seed=2)
    context = context_of(run)
    assert mean_held_of_rows(list(context.states.values())) == [10]
    assert context.segment.slots == (20 - PINNED - 10,)


def test_held_slots_are_a_mean_over_heads_rounded_up():
    run = fed("snapkv(tokens=20)")
    run.memory.fold()
    state = run.memory.layers[0].state
    shorter = replace(state, folded=state.folded.keep(torch.arange(state.folded.slots) > 0))
    assert mean_held_of_rows([state]) == [8]
    assert mean_held_of_rows([shorter]) == [8]  # 7 and 8
    assert mean_held_of_rows([]) == []


def test_keys_and_values_are_those_of_the_columns():
    run = fed()
    kv = context_of(run, columns=9).keys_values(2)
    assert torch.equal(kv.keys, run.tokens[2][0].keys[:, :, :9])
    assert torch.equal(kv.values, run.tokens[2][0].values[:, :, :9])
    assert len(kv) == 9


def test_recent_queries_are_as_many_as_the_method_reads():
    run = fed("snapkv(keep=0.5, window=4)")
    window = context_of(run).recent_queries(0)
    assert window.positions.tolist() == [[8, 9, 10, 11]]
    assert torch.equal(window.queries, run.tokens[0][0].queries[:, :, 8:])


def test_query_scores_are_the_most_attention_from_any_recent_query():
    run = fed("snapkv(keep=0.5, window=4)", count=10)
    found = context_of(run).query_scores()
    assert found.shape == (1, len(LAYERS), HEADS, 10)
    new = run.tokens[0][0]
    keys = new.keys.repeat_interleave(QUERY_HEADS // HEADS, dim=1)
    triangle = torch.ones(10, 10, dtype=torch.bool).tril()
    scores = (new.queries @ keys.mT * SCALE).masked_fill(~triangle, -torch.inf)
    weights = scores.softmax(dim=-1)[:, :, 6:].unflatten(1, (HEADS, -1)).amax(dim=(2, 3))
    assert torch.allclose(found[:, 0, :, PINNED:], weights[:, :, PINNED:], atol=1e-5)
    assert (found[..., :PINNED] == 0).all()  # sinks are no candidates


def test_attention_sums_are_those_of_the_columns():
    run = fed("h2o(keep=0.5)")
    context = context_of(run, columns=7)
    sums = run.memory.layers[0].state.records["attention_sums"].raw
    assert torch.equal(context.attention_sums(0), sums[:, :, :7])


def test_token_ids_are_those_of_the_columns():
    context = replace(context_of(fed(), columns=3), transcript=Transcript().with_ids(torch.arange(12)[None]))
    assert context.token_ids().tolist() == [[0, 1, 2]]


class Access:
    """A model that answers with what it was asked, as numbers."""

    def __init__(self, adapter=None):
        self.adapter = adapter
        self.asked = []

    def run(self, states, rows):
        """Keys are the row's number, values its position."""
        self.asked.append(rows)
        spread = [side[:, None, :, None].expand(-1, HEADS, -1, SIZE).float() for side in (rows.rows, rows.positions)]
        return {index: tuple(spread) for index in states}

    def replay(self, states, text):
        """Every column of the tail scores its number, more in later layers."""
        self.asked.append(text)
        found = {}
        for index, state in states.items():
            columns = torch.arange(state.tail.length).float() + 100 * index
            found[index] = columns.expand(len(text.ids), HEADS, -1)
        return found


class ScoringAdapter:
    """An adapter whose score of a slot is the first number of its key."""

    size_bytes = 0

    def embed(self, rows):
        """Nothing to run."""
        return torch.zeros(*rows.shape, 1)

    def moved(self, queries, positions, to):
        """Not known."""
        return

    def score(self, keys, values, positions, real):
        """By the keys [B, S, L, H, D]."""
        assert values.shape == keys.shape
        scores = keys[..., 0].permute(0, 2, 3, 1)
        return scores, -scores

    def gate(self, layer):
        """Closed."""
        return torch.zeros(HEADS)

    def active(self):
        """Nothing to update."""
        return contextlib.nullcontext()


def test_a_replay_scores_the_columns_of_the_segment_in_every_layer():
    run = fed("kvzip(keep=0.5)")
    access = Access()
    ids = torch.arange(20, 32)[None]
    context = replace(context_of(run, columns=8, access=access), transcript=Transcript().with_ids(ids))
    scores = context.replay()
    assert scores.shape == (1, len(LAYERS), HEADS, 8)
    assert scores[0, 1, 0].tolist() == [200.0 + column for column in range(8)]
    (text,) = access.asked
    assert isinstance(text, ReplayText)
    assert text.ids.tolist() == [list(range(20, 28))]
    assert text.first_position.tolist() == [12]
    assert text.real[0].tolist() == [False] * PINNED + [True] * 4


def test_learned_scores_are_asked_with_pads_and_sinks_blank():
    context = context_of(fed(), columns=6, access=Access(ScoringAdapter()))
    scores, rows = context.learned_scores()
    assert rows is None, "a row begins as its token, whose id is not recorded here"
    assert scores.shape == (1, len(LAYERS), HEADS, 6)
    assert torch.equal(scores[:, 1, :, PINNED:], context.keys_values(2).keys[:, :, PINNED:, 0])
    assert (scores[..., :PINNED] == 0).all()


def test_rows_have_scores_where_ids_of_tokens_are_recorded():
    known = Transcript().with_ids(torch.arange(20, 32)[None])
    context = replace(context_of(fed(), access=Access(ScoringAdapter())), transcript=known)
    scores, rows = context.learned_scores()
    assert torch.equal(rows, -scores)


def test_rows_run_through_the_model_and_come_back_as_slots():
    context = context_of(fed(), access=Access())
    rows = Rows.at(context.segment, [[(3, 4, 9, 8), (5, 4, 12, 11)]])
    made = context.run(rows)
    assert made.keys() == set(LAYERS)
    assert made[2].keys[0, 0, :, 0].tolist() == [3, 5]
    assert made[2].positions[0, 0].tolist() == [8, 11]


def test_no_rows_run_no_model():
    access = Access()
    context = context_of(fed(), access=access)
    assert context.run(Rows.at(context.segment, [[]])) == {}
    assert access.asked == []


def test_rows_are_padded_where_a_row_of_the_batch_has_fewer():
    segment = context_of(fed(rows=2)).segment
    rows = Rows.at(segment, [[(0, 4, 8, 7), (1, 4, 12, 11)], [(2, 4, 12, 11)]])
    assert rows.rows.tolist() == [[0, 1], [2, NO_ROW]]
    assert rows.real.tolist() == [[True, True], [True, False]]
    assert rows.first.tolist() == [[4, 4], [4, 0]]
    assert rows.stop.tolist() == [[8, 12], [12, 0]]


def test_rows_can_be_tokens_of_the_segment_read_anew():
    segment = context_of(fed()).segment
    rows = Rows.at(segment, [[(0, 4, 9, 6), (0, 4, 9, 8)]], ids=torch.arange(50, 62)[None])
    assert rows.ids.tolist() == [[56, 58]]
    assert rows.positions.tolist() == [[6, 8]]


def test_one_mask_is_shared_out_over_layers():
    kept = torch.rand(1, 2, HEADS, 5) < 0.5
    selection = Selection.of_layers(LAYERS, kept)
    assert torch.equal(selection.kept[2], kept[:, 1])
    assert selection.history == {}
    assert selection.made == {}


def test_a_mask_that_keeps_nothing_has_the_segments_shape():
    nothing = context_of(fed(rows=2), columns=7).segment.nothing_kept()
    assert nothing.shape == (2, len(LAYERS), HEADS, 7)
    assert not nothing.any()


def test_attention_that_the_scores_come_from_is_over_the_whole_layer():
    run = fed("snapkv(keep=0.5, window=2)", count=10)
    run.memory.fold()
    run.forward(3, seed=2)
    window = context_of(run).recent_queries(0)
    held = run.memory.layers[0].state
    folded, sinks = held.folded.read(), held.sinks.read()
    keys = torch.cat([sinks.keys, folded.keys, held.tail.keys[:, :, : held.tail.length]], dim=2)
    last = window.queries[:, :, -1:]
    wanted = attend_part(last, keys, keys, scale=SCALE)[1]
    assert torch.allclose(window.log_sum_exp[:, :, -1:], wanted, atol=1e-5)
