import threading

import pytest

from kvfold.bench.judging.notebook import Notebook, key_of, open_notebook
from kvfold.errors import FileError


def test_what_was_written_is_found_again_in_this_and_the_next_process(tmp_path):
    path = tmp_path / "new folder" / "notes.jsonl"
    notebook = Notebook(path)
    assert notebook.find("a") is None
    notebook.write("a", {"score": 7.0, "text": "Gut, sehr gut.\nÜber alles"})
    assert notebook.find("a") == Notebook(path).find("a") == {"score": 7.0, "text": "Gut, sehr gut.\nÜber alles"}
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1


def test_what_others_add_is_found_as_well(tmp_path):
    one, other = Notebook(tmp_path / "n"), Notebook(tmp_path / "n")
    one.write("a", {"x": 1})
    assert other.find("a") == {"x": 1}
    other.write("b", {"x": 2})
    assert one.find("b") == {"x": 2}


@pytest.mark.parametrize("cut", [1, 5, 12, -2])
def test_a_line_that_a_kill_cut_short_is_passed_over_and_nothing_else(tmp_path, cut):
    path = tmp_path / "n"
    notebook = Notebook(path)
    notebook.write("a", {"x": 1})
    whole = path.read_bytes()
    notebook.write("b", {"x": 2})
    path.write_bytes(whole + path.read_bytes()[len(whole) :][:cut])
    again = Notebook(path)
    assert again.find("a") == {"x": 1}
    assert again.find("b") is None
    again.write("c", {"x": 3})
    assert {key: Notebook(path).find(key) for key in "abc"} == {"a": {"x": 1}, "b": None, "c": {"x": 3}}


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "n").write_text("dear diary\n")
    with pytest.raises(FileError, match="another kind of file; remove it or give another folder"):
        Notebook(tmp_path / "n").find("a")


def test_a_folder_that_cannot_be_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="was to be written"):
        Notebook(tmp_path / "file" / "n").write("a", {})


def test_a_file_that_was_removed_is_begun_anew(tmp_path):
    notebook = Notebook(tmp_path / "n")
    notebook.write("a", {"x": 1})
    assert notebook.find("a")
    (tmp_path / "n").unlink()
    notebook.write("b", {"y": 1})
    assert notebook.find("b") == {"y": 1}


def test_threads_write_whole_lines(tmp_path):
    notebook = open_notebook(tmp_path / "n")
    assert open_notebook(tmp_path / "n") is notebook
    threads = [threading.Thread(target=notebook.write, args=(str(i), {"x": "y" * 5000})) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(Notebook(tmp_path / "n").find(str(i)) == {"x": "y" * 5000} for i in range(20))


def test_keys_tell_values_apart_and_not_the_order_of_fields():
    assert key_of("m", {"a": 1, "b": 2}) == key_of("m", {"b": 2, "a": 1})
    assert len({key_of(1), key_of("1"), key_of(1, 1), key_of([1, 1]), key_of()}) == 5
