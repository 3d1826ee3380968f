"""What `kvfold serve` refuses before it starts: one line, with what to do."""

import sys

import pytest

from kvfold.cli.main import REFUSED, run


@pytest.fixture
def without_ray(monkeypatch):
    """Ray as it is where nobody has installed it."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "kvfold.serve.on_ray", raising=False)


@pytest.mark.parametrize("options", [("--ray",), ("--replicas", "2")])
def test_a_server_on_ray_without_ray_is_refused_in_one_line(without_ray, capsys, options):
    assert run(["serve", "--model", "tiny", *options]) == REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert "ray is not installed; pip install 'kvfold[serve,ray]'" in line
