"""A digest tells texts apart by their ids and places, grows with its text, and goes back as far as its turns say."""

import pytest
import torch

from kvfold.memory.text_digest import TextDigest

IDS = torch.randint(0, 50_000, (2, 2100), generator=torch.Generator().manual_seed(3))


def fed(ids, *sizes):
    """The digest of ids that came in pieces."""
    digest = TextDigest()
    for piece in ids.split(list(sizes), dim=1):
        digest = digest.extended(piece)
    return digest


@pytest.mark.parametrize("sizes", [(2100,), (1, 2099), (1000, 1, 1, 30, 1068), (1024, 1024, 52)])
def test_a_text_has_one_digest_however_it_comes(sizes):
    digest = fed(IDS, *sizes)
    assert digest.columns == 2100
    assert digest.sums == fed(IDS, 2100).sums
    assert digest.other_rows(IDS) == []


def test_the_digest_of_a_text_is_the_same_in_every_process():
    assert fed(torch.tensor([[7, 8, 9]]), 3).sums == (16109607606023044920,)


def test_a_text_that_goes_on_begins_alike():
    longer = torch.cat([IDS, IDS[:, :7]], dim=1)
    assert fed(IDS, 2100).other_rows(longer) == []


@pytest.mark.parametrize("column", [0, 1, 1023, 1024, 2099])
def test_one_other_id_shows_in_its_row_alone(column):
    other = IDS.clone()
    other[1, column] += 1
    assert fed(IDS, 2000, 100).other_rows(other) == [1]


def test_two_ids_that_changed_places_show():
    other = IDS.clone()
    other[0, [5, 6]] = IDS[0, [6, 5]]
    assert fed(IDS, 2100).other_rows(other) == [0]


def test_it_covers_less_after_a_crop_and_never_what_is_gone():
    digest = fed(IDS, 40, 1, 1, 30, 1, 2027)
    for columns, covered in ((2100, 2100), (2099, 73), (73, 73), (72, 42), (42, 42), (41, 0)):
        assert digest.cropped(columns).columns == covered
    assert digest.cropped(50).sums == fed(IDS[:, :42], 42).sums
    assert digest.cropped(41).other_rows(IDS + 1) == []


def test_only_the_newest_turns_are_there_to_go_back_to():
    digest = fed(IDS, *[2] * 1050)
    assert len(digest.earlier) == 16
    assert digest.cropped(2097).columns == 2096
    assert digest.cropped(1000).columns == 0


def test_rows_are_picked_with_all_that_they_were():
    digest = fed(IDS, 40, 2060).take_rows([1, 1, 0])
    picked = IDS[[1, 1, 0]]
    assert digest.other_rows(picked) == []
    assert digest.cropped(50).other_rows(picked) == []
    assert TextDigest().take_rows([0, 0]).columns == 0
