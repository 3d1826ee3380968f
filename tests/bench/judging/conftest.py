"""A judge for every test that asks for one; never through a proxy."""

import pytest
from stub_judge import stub_judge


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("KVFOLD_JUDGE_KEY", raising=False)
    with stub_judge() as serving:
        yield serving
