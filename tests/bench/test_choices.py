from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from coins import Coins

from kvfold.bench.choices import as_json, choose, kinds_of
from kvfold.errors import DataError, SuiteError


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards(Coins):
    """Coins with something to choose. Nothing in it changes."""

    tokens: int = 2048
    question: Literal["seen", "unseen"] = "unseen"
    kinds: tuple[str, ...] = ("a", "b")
    share: float = 0.5
    limit: int | None = None
    shuffled: bool = False
    data: Path | None = None

    settings = property(as_json)
    data_file = property(lambda self: f"cards.{self.tokens}.txt")


def test_settings_are_read_as_their_types():
    given = ["tokens=512", "question=seen", "kinds=x, y,z", "share=0.25", "limit=7", "shuffled=yes"]
    chosen = choose(Cards(), given=given)
    assert chosen == Cards(tokens=512, question="seen", kinds=("x", "y", "z"), share=0.25, limit=7, shuffled=True)
    assert choose(chosen, given=["limit=none"]).limit is None


def test_nothing_given_changes_nothing():
    suite = Cards()
    assert choose(suite) is suite
    assert list(kinds_of(suite)) == ["tokens", "question", "kinds", "share", "limit", "shuffled"]


@pytest.mark.parametrize("text", ["colour=red", "tokens", "data=here"])
def test_an_unknown_setting_lists_the_real_ones(text):
    with pytest.raises(SuiteError, match="lets you set tokens, question, kinds, share, limit, shuffled"):
        choose(Cards(), given=[text])


def test_a_suite_without_settings_says_so():
    with pytest.raises(SuiteError, match="lets you set nothing"):
        choose(Coins(), given=["tokens=5"])
    with pytest.raises(SuiteError, match="reads no files"):
        choose(Coins(), data=Path())


@pytest.mark.parametrize(
    ("text", "said"),
    [("tokens=many", "of type int"), ("share=half", "of type float"), ("question=maybe", "it knows seen, unseen"),
     ("shuffled=perhaps", "of type bool"), ("limit=x", "of type int")],
)  # fmt: skip
def test_a_value_of_the_wrong_type_says_which_is_right(text, said):
    with pytest.raises(SuiteError, match=said):
        choose(Cards(), given=[text])


def test_a_folder_stands_for_the_file_that_the_settings_name(tmp_path):
    path = tmp_path / "cards.512.txt"
    path.write_text("ace")
    assert choose(Cards(), given=["tokens=512"], data=tmp_path).data == path
    assert choose(Cards(), data=path).data == path
    with pytest.raises(DataError, match=r"there is no file .*cards\.2048\.txt"):
        choose(Cards(), data=tmp_path)
    with pytest.raises(DataError, match="there is no file"):
        choose(Cards(), data=tmp_path / "none.txt")


def test_records_know_a_file_by_its_name_and_content_only(tmp_path):
    for name, text in (("one", "ace"), ("two", "ace"), ("three", "king")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cards.txt").write_text(text)
    one, two, three = (as_json(choose(Cards(), data=tmp_path / name / "cards.txt")) for name in ("one", "two", "three"))
    assert one == two != three
    assert one["data"].startswith("cards.txt ")
    assert one["kinds"] == ["a", "b"]
    assert "data" not in as_json(Cards())
