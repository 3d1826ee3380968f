"""The pages of the site: each is in the navigation, links lead somewhere, generated parts are fresh, methods agree."""

import os
import re
import subprocess
import sys
from functools import cache
from importlib import util
from pathlib import Path

import pytest
import source
import yaml
from markdown.extensions.toc import slugify

DOCS = source.ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FORM = (
    "What it does",
    "When to take it",
    "When not to take it",
    "Settings",
    "Cost",
    "Results",
    "How ours differs from the paper",
    "Paper",
)


def made_by(name):
    """Load a file of docs/make, which is no package."""
    spec = util.spec_from_file_location(name, DOCS / "make" / f"{name}.py")
    sys.modules[name] = module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


drawings, members, long_chat = map(made_by, ("drawings", "members", "long_chat"))


def short(path):
    return path.relative_to(source.ROOT).as_posix()


@cache
def prose(path):
    """A page without its code."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^(    ).*$", "", text, flags=re.MULTILINE))


@cache
def anchors(path):
    """The anchors of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slugify(re.sub(r"[`*]", "", head), "-") for head in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}


def navigated(entries):
    """Every page that the navigation names."""
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(value, list):
            yield from navigated(value)
        else:
            yield value


def test_every_page_is_in_the_navigation_once():
    configuration = yaml.safe_load((source.ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = list(navigated(configuration["nav"]))
    assert len(named) == len(set(named))
    assert sorted(named) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


@pytest.mark.parametrize("page", [source.ROOT / "README.md", *PAGES], ids=short)
def test_every_link_leads_somewhere(page):
    dead = []
    for target in re.findall(r"\]\(([^()\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        is_page = place.suffix == ".md"
        if not place.exists() or (anchor and is_page and anchor not in anchors(place)):
            dead.append(target)
    assert not dead


def test_generated_pages_are_what_their_command_makes():
    stale = [short(path) for path, text in members.pages().items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "stale; run `make docs`"


def test_drawings_are_what_their_command_makes():
    made = dict(drawings.drawings())
    stale = [short(path) for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    assert not stale, "stale; run `make docs`"
    shown = {
        place for page in PAGES for place in re.findall(r"pictures/([\w-]+\.svg)", page.read_text(encoding="utf-8"))
    }
    assert {path.name for path in made} <= shown


def test_the_dark_picture_of_readme_is_the_light_one_in_other_colours():
    light = long_chat.PICTURE.read_text(encoding="utf-8")
    stale = long_chat.DARK.read_text(encoding="utf-8") != long_chat.darkened(light)
    assert not stale, "stale; run `python docs/make/long_chat.py --dark`"
    assert set(re.findall("#[0-9a-f]{6}", light)) <= set(long_chat.COLOURS)


@pytest.mark.parametrize("name", [name for _, name, _ in members.every_member()])
def test_a_member_has_a_page_in_the_form_of_all(name):
    page = DOCS / "methods" / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {name}: ")
    heads = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert tuple(heads[: len(FORM)]) == FORM
    assert heads[len(FORM) :] in ([], ["In detail"])
    said = re.search(r"^## What it does\n\n(.+?)\n\n", text, flags=re.MULTILINE | re.DOTALL)
    assert said is not None
    assert len(re.findall(r"[.?](?=\s|$)", said[1])) in (3, 4), "three sentences, or four with a question"


def test_every_setting_of_a_member_says_what_it_means():
    without = [
        (name, one.name)
        for _, name, kind in members.every_member()
        for one in members.settings(kind)
        if not one.meaning
    ]
    assert not without, "a comment beside the field says it"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # of the theme, about versions of mkdocs to come
    built = subprocess.run(command, cwd=source.ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert Path(tmp_path / "quickstart" / "index.html").is_file()


@pytest.mark.parametrize("page", [source.ROOT / "README.md", DOCS / "index.md"], ids=["README.md", "docs/index.md"])
def test_the_families_that_a_page_counts_are_those_that_were_judged(page):
    right, refused = re.search(
        r"^(\d+) are right, (\d+) refused", (DOCS / "models.md").read_text(), re.MULTILINE
    ).groups()
    assert re.search(rf"\b{right} families\b", re.sub(r"\]\(.*?\)|\[", "", page.read_text()))
    assert re.search(rf"\b{refused} are refused\b", page.read_text())
