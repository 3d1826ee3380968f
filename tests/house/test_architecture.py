"""The newcomer's page agrees with the tree: its paths exist, its folders are all, its import table is the held one."""

import re

import source
from test_imports import RANKS

PAGE = (source.ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"`([^`\s]+)`", PAGE)
PATHS = {quoted for quoted in QUOTED if re.fullmatch(r"[a-z_/]+(\.py|/)", quoted)}
BY_HAND = ("base.py",)  # of each of the three axes


def section(title):
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def test_every_path_that_the_page_names_is_there():
    roots = (source.SOURCE, source.ROOT, source.SOURCE / "attention")  # `kernels/` stands beside its folder
    named = PATHS - set(BY_HAND) - {"src/kvfold/"}
    assert len(named) > 40
    assert not [path for path in named if not any((root / path).exists() for root in roots)]


def test_every_folder_of_the_package_is_on_the_page():
    folders = {path.name for path in source.SOURCE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert not [folder for folder in folders if f"`{folder}/`" not in section("Layout")]


def test_the_import_table_is_the_one_that_is_held():
    rows = re.findall(r"^\| \d+ \| (.+) \|$", section("Who may import whom"), flags=re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in rows] == list(RANKS)


def test_a_life_takes_ten_lines_that_name_files():
    for title in ("The life of a key: one decoding step", "The life of a turn: one fold"):
        lines = re.findall(r"^\d+\. .+$", section(title), flags=re.MULTILINE)
        assert len(lines) == 10
        assert not [line for line in lines if not re.search(r"`[a-z_/]+(\.py|/)`", line)]


def test_every_place_that_newcomers_ask_for_is_answered():
    asked = re.findall(r"^\*\*A (\w+(?: \w+)?)\*\*", section("Where do I put ...?"), flags=re.MULTILINE)
    assert asked == ["method", "codec", "tier", "model family", "kernel", "suite"]
