"""Contract tests run over every member of the registry; for learned ones, the tiny models ship random adapters."""

import pytest

from fakes import FAMILIES, model_of
from folding import adapter_for
from kvfold.adapters import folder as adapter_folder
from kvfold.adapters.ranks import save_ranks
from ranks import ranks_for


@pytest.fixture(scope="session")
def random_adapters(tmp_path_factory):
    """A folder like the package's own: MODEL/adapters/KIND."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        adapter_for(family, folder / family / "adapters")
        save_ranks(
            ranks_for(model_of(family)), folder / family / "adapters" / "dynakv", model=model_of(family), about={}
        )
    (folder / "tiny").symlink_to(adapter_folder.SHIPPED / "tiny")
    return folder


@pytest.fixture(scope="module", autouse=True)
def shipped_adapters(random_adapters):
    """Each module gives back the package's own folder: other tests of the same process want that one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_folder, "SHIPPED", random_adapters)
        yield
