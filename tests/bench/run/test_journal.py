import os

import made
import pytest

from kvfold.bench.run import journal
from kvfold.errors import FileError


def test_what_was_written_is_found_again(tmp_path):
    first = journal.Journal(tmp_path / "new" / "folder")
    for record in made.run():
        first.write(record)
    again = journal.Journal(tmp_path / "new" / "folder")
    assert again.records == made.run()
    assert again.find(made.run()[2].work) == made.run()[2]
    assert again.find("other work") is None


def test_a_line_cut_by_a_kill_is_dropped_and_the_run_goes_on(tmp_path):
    first = journal.Journal(tmp_path)
    one, two = made.run()[:2]
    first.write(one)
    first.write(two)
    size = first.path.stat().st_size
    for cut in (1, 2, 40, len(two.line())):
        os.truncate(first.path, size - cut)
        again = journal.Journal(tmp_path)
        assert again.records == [one]
        again.write(two)
        assert journal.read(first.path) == [one, two]
        assert first.path.stat().st_size == size


def test_a_spoilt_line_in_the_middle_says_where(tmp_path):
    path = tmp_path / journal.FILE_NAME
    path.write_text(f"{made.record().line()}\nrubbish\n{made.record().line()}\n")
    with pytest.raises(FileError, match="line 2 was read as a record"):
        journal.Journal(tmp_path)


def test_several_folders_are_gathered_and_the_newest_wins(tmp_path):
    for folder, seconds in (("a", 1.0), ("b", 2.0)):
        kept = journal.Journal(tmp_path / folder)
        kept.write(made.record(wall_seconds=seconds))
    journal.Journal(tmp_path / "b").write(made.record(seed=7))
    found = journal.gather([tmp_path / "a", tmp_path / "b"])
    assert [(record.seed, record.wall_seconds) for record in found] == [(0, 2.0), (7, 1.5)]


def test_a_missing_folder_and_an_empty_one_are_one_clear_error(tmp_path):
    with pytest.raises(FileError, match=r"there is no records\.jsonl"):
        journal.gather([tmp_path])
    (tmp_path / journal.FILE_NAME).write_text('{"half": ')
    with pytest.raises(FileError, match="no record in it is finished"):
        journal.gather([tmp_path])


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="no folder can be there"):
        journal.Journal(tmp_path / "file" / "below")


def test_a_full_disk_is_a_clear_error_and_keeps_what_was_finished(tmp_path, monkeypatch):
    kept = journal.Journal(tmp_path)
    kept.write(made.run()[0])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.os, "write", full)
    with pytest.raises(FileError, match="No space left on device; finished records are kept"):
        kept.write(made.run()[1])
    assert journal.read(kept.path) == made.run()[:1]
