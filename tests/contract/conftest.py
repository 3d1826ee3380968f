"""Contract tests run over every member of the registry; for learned ones, the tiny models ship random adapters."""

import pytest

from fakes import FAMILIES
from folding import adapter_for
from kvfold.hf import adapter_files


@pytest.fixture(scope="session", autouse=True)
def shipped_adapters(tmp_path_factory):
    """Folders where the package would have its own: MODEL/adapters/KIND."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        adapter_for(family, folder / family / "adapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_files, "SHIPPED", folder)
        yield
