"""A release says one version everywhere, and every shipped adapter has its card."""

import json
import re
import tomllib

import pytest
import source

from kvfold.version import __version__

CARDS = sorted((source.SOURCE / "models").glob("*/adapters/*/adapter.json"))


def test_one_version_stands_everywhere():
    project = tomllib.loads((source.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (source.ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (source.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert project["version"] == __version__
    assert f"\nversion: {__version__}\n" in citation
    assert f"\nlicense: {project['license']}\n" in citation
    assert re.findall(r"^## \[(\d\S*)\]", changes, flags=re.MULTILINE)[0] == __version__


@pytest.mark.parametrize("words", CARDS, ids=lambda path: f"{path.parents[2].name}-{path.parent.name}")
def test_a_shipped_adapter_has_a_card_that_fits_it(words):
    said = json.loads(words.read_text(encoding="utf-8"))
    card = (words.parent / "README.md").read_text(encoding="utf-8")
    head, text = card.removeprefix("---\n").split("\n---\n", 1)
    assert "license: apache-2.0" in head
    assert "base_model: " in head
    assert said["fingerprint"] in text
    assert f"`kvfold train {said['kind']} --model {said['base']} " in text
    assert f"version {said['version']}" in text
    for row in ("used by", "base model", "format", "made by", "data", "licence"):
        assert f"| {row} | " in text
    for licence in ("MIT", "Apache-2.0", "public domain"):  # of the texts that an adapter was made on
        assert licence in text


def test_the_licence_of_the_model_that_is_read_and_not_shipped_is_named():
    pages = [source.SOURCE / "models" / "smollm2" / name for name in ("README.md", "adapters/dynakv/README.md")]
    for page in pages:
        assert re.search(r"SmolLM2-135M-Instruct by Hugging Face[^\n]*Apache-2\.0", page.read_text(encoding="utf-8"))
