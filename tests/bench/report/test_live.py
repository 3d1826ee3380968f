"""The finished table on a terminal: every cell that is shown can be read, however narrow it is."""

import io

import made
import pytest
from rich.console import Console

from kvfold.bench.report.live import drawn
from kvfold.bench.report.tables import heads, tables


def shown_at(width: int) -> str:
    said = io.StringIO()
    rival = made.record("kvpress:StreamingLLM(keep=0.5)", 0.5, (1.0, 0.0) * 10, claimed=0.5)
    (table,) = tables([*made.run(), rival])
    Console(file=said, width=width).print(drawn(table, width=width))
    return said.getvalue()


def test_a_wide_terminal_has_every_column():
    text = shown_at(250)
    for name in heads(tables(made.run())[0]):
        assert name in text
    assert "no room" not in text


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_a_narrow_one_cuts_no_cell_and_names_what_it_leaves_out(width):
    text = shown_at(width)
    assert "…" not in text
    assert "no room here for resident" in " ".join(text.split())
    head = text.splitlines()[2]
    for name in ("plan", "kept", "score"):
        assert name in head


def test_columns_go_one_by_one_as_it_gets_narrower():
    def columns(width: int) -> int:
        return shown_at(width).splitlines()[2].count("┃")

    counted = [columns(width) for width in (250, 130, 100, 80)]
    assert counted == sorted(counted, reverse=True)
    assert counted[0] > counted[-1]
