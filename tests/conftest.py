"""What every test stands on: shapes and types checked at run time, fixed seeds, few threads.

The import hook must be in place before the first kvfold module is read, so it is installed here at the top. It makes
what runs twice as slow: with KVFOLD_SHAPES=off, `make test` leaves it out where whole models, chats and benches run,
whose parts the other tests check. It knows nothing of what is tested; fakes live in `tests/fakes.py`.
"""

import os
import random
import sys
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

if os.environ.get("KVFOLD_SHAPES") != "off":
    install_import_hook("kvfold", "checker.check")

import kvfold.encode
import kvfold.select

# A member is registered by its file being there: the examples are members of every test run.
EXAMPLES = Path(__file__).parent / "examples"
kvfold.select.__path__.append(str(EXAMPLES / "select"))
kvfold.encode.__path__.append(str(EXAMPLES / "encode"))


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped where torch sees none; torch is imported only when such a test was collected."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA here"))


@pytest.fixture(autouse=True)
def seeds():
    """Every test starts from the same random state; torch and numpy only if something has imported them."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
