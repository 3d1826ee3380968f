"""The index bounds what it should, and a budget takes exactly its number of slots, whole sentences first."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.place.page_choice import best_pages, fill_budget
from kvfold.place.page_index import PageIndex, halves, mean, minmax, spread


def indexed(keys, lengths, digest=minmax):
    """An index of one head, digested at once."""
    index = PageIndex.empty(1, torch.device("cpu"))
    flat = torch.tensor(lengths)
    return index.extend([lengths], digest(keys[: sum(lengths)], flat))


def written_out(digest, queries, scale):
    """Scores in full precision, of every query for every sentence."""
    return (queries @ digest.centres[:, 0].T + queries.abs() @ digest.spreads[:, 0].T) * scale


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_extremes_bound_every_product_of_their_sentence(lengths, seed):
    torch.manual_seed(seed)
    keys, queries = torch.randn(sum(lengths), 8), torch.randn(5, 8)
    scores = written_out(minmax(keys, torch.tensor(lengths)), queries, 0.5)
    for number, piece in enumerate(keys.split(lengths)):
        best = (queries @ piece.T * 0.5).amax(dim=1)
        assert bool((scores[:, number] >= best - 1e-5).all())


@given(lengths=st.lists(st.integers(1, 20), min_size=2, max_size=8), seed=st.integers(0, 99))
def test_scores_are_those_of_the_digests_up_to_a_number_a_query(lengths, seed):
    torch.manual_seed(seed)
    keys, queries = 10 + torch.randn(sum(lengths), 8), torch.randn(1, 5, 8)
    index = indexed(keys, lengths[:1])
    later = torch.tensor(lengths[1:])
    index = index.extend([lengths[1:]], minmax(keys[lengths[0] : sum(lengths)], later))
    for query in range(5):
        one = queries[:, query : query + 1]
        scores = index.rank(one, None, scale=0.5)[0]
        exact = written_out(minmax(keys, torch.tensor(lengths)), one[0], 0.5)[0]
        apart = (scores - exact) - (scores - exact)[:1]
        assert float(apart.abs().max()) < 0.01 * float(exact.abs().max()) + 0.2


def test_means_and_halves_are_what_they_say():
    keys = torch.tensor([[0.0, 2.0], [2.0, 4.0], [7.0, 7.0]])
    lengths = torch.tensor([2, 1])
    assert mean(keys, lengths).centres[:, 0].tolist() == [[1, 3], [7, 7]]
    assert spread(keys, lengths).spreads[:, 0].tolist() == [[1, 1], [0, 0]]
    assert halves(keys, lengths).centres.tolist() == [[[0, 2], [2, 4]], [[7, 7], [7, 7]]]


@st.composite
def heads(draw):
    """Lengths of the sentences of some heads, what is open behind them, budgets, newest, scores."""
    every = []
    for _ in range(draw(st.integers(1, 4))):
        lengths = draw(st.lists(st.integers(1, 9), max_size=12))
        opened = draw(st.integers(0, 9))
        if not sum(lengths) + opened:
            opened = 1
        stored = sum(lengths) + opened
        newest = min(max(draw(st.integers(1, 6)), opened), stored)
        every.append((lengths, stored, draw(st.integers(min(newest, stored), stored)), newest))
    return every, draw(st.integers(0, 99))


@settings(max_examples=200)
@given(case=heads())
def test_a_budget_is_met_exactly_by_the_newest_and_the_best_sentences(case):
    every, seed = case
    torch.manual_seed(seed)
    index = PageIndex.empty(len(every), torch.device("cpu"))
    lengths = [own for own, *_ in every]
    flat = torch.tensor([length for own in lengths for length in own], dtype=torch.long)
    index = index.extend(lengths, mean(torch.randn(int(flat.sum()), 4), flat)) if len(flat) else index
    scores = torch.randn(index.sizes.shape)
    found = fill_budget(index, scores, counts=[one[1] for one in every], budgets=[one[2] for one in every],
                        newest=[one[3] for one in every])  # fmt: skip
    for head, (own, stored, budget, newest) in enumerate(every):
        slots = [slot for slot in found[head].tolist() if slot >= 0]
        assert len(slots) == len(set(slots)) == budget
        assert set(range(stored - newest, stored)) <= set(slots) <= set(range(stored))
        assert set(slots) == best_by_hand(own, stored, budget, newest, scores[head, index.sizes[head] > 0].tolist())


def best_by_hand(lengths, stored, budget, newest, scores):
    """Sentences one after the other, as a person would take them."""
    chosen = list(range(stored - newest, stored))
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    for number in sorted(range(len(lengths)), key=lambda number: -scores[number]):
        span = range(starts[number], min(starts[number] + lengths[number], stored - newest))
        chosen += list(span)[: budget - len(chosen)]
    return set(chosen)


def test_an_index_grows_sentence_after_sentence():
    torch.manual_seed(0)
    keys = torch.randn(30, 4)
    whole = indexed(keys, [5, 6, 4, 8])
    grown = indexed(keys, [5, 6]).extend([[4, 8]], minmax(keys[11:23], torch.tensor([4, 8])))
    assert grown.closed == whole.closed == (23,)
    assert torch.equal(grown.starts, whole.starts)
    assert torch.equal(grown.sizes, whole.sizes)
    assert torch.equal(grown.pages["centres"][:, :2], indexed(keys, [5, 6]).pages["centres"])


def test_the_best_sentences_are_those_with_the_best_scores_until_their_slots_are_taken():
    index = PageIndex.empty(4, torch.device("cpu"))  # two rows of two heads; the second row has one sentence less
    lengths = [[3, 2, 4], [3, 2, 4], [2, 5], [2, 5]]
    index = index.extend(lengths, mean(torch.randn(32, 4), torch.tensor([n for own in lengths for n in own])))
    scores = torch.zeros(2, 11)
    scores[0, 4], scores[0, 8], scores[0, 10] = 0.5, 0.3, 0.9  # the last slot is in no finished sentence
    scores[1, 0], scores[1, 6] = 0.1, 0.2
    assert best_pages(index, scores, slots=[2, 0])[::2].tolist() == [[False, True, False], [False, False, False]]
    some = best_pages(index, scores, slots=[3, 9])
    assert some[::2].tolist() == [[False, True, True], [True, True, False]]
    assert torch.equal(some[0], some[1])


def test_pages_are_appended_into_room_and_an_index_that_was_left_behind_goes_on_in_a_copy():
    keys, lengths = torch.randn(600, 8), [3] * 200
    index = indexed(keys, lengths[:1])
    for at in range(1, 200):
        before, index = index, index.extend([[3]], minmax(keys[3 * at : 3 * at + 3], torch.tensor([3])))
        fork = before.extend([[2]], minmax(keys[:2], torch.tensor([2])))
        assert fork.starts.tolist() == [[*range(0, 3 * at, 3), 3 * at]]
        assert fork.sizes[0, -1] == 2
    whole = PageIndex.empty(1, torch.device("cpu"), index.reference).extend(
        [lengths], minmax(keys, torch.tensor(lengths))
    )
    for name, tensor in whole.tensors():
        assert torch.equal(tensor, dict(index.tensors())[name])
    room = index.pages.buffers["starts"].shape[1] - 200
    assert 0 < room <= 200 // 16 + 1
    assert index.slack["starts"] == 4 * room
