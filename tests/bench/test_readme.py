"""README and docs/results.md show what the records in the repository say, and nothing else."""

from pathlib import Path

import pytest

from kvfold.bench.report import page as report
from kvfold.bench.run import journal

ROOT = Path(__file__).resolve().parents[2]
RUNS = sorted(path.parent for path in (ROOT / "docs" / "records").glob("*-tiny/records.jsonl"))


def between_marks(name: str) -> str:
    text = (ROOT / name).read_text(encoding="utf-8")
    _, begin, rest = text.partition(report.BEGIN)
    assert begin, f"{name} has a place for tables"
    return rest.partition(report.END)[0].strip()


@pytest.mark.parametrize(("name", "whole"), [("README.md", False), ("docs/results.md", True)])
def test_the_tables_are_those_of_the_records(name, whole):
    shown = between_marks(name)
    if not RUNS:
        assert shown == ""
        return
    assert shown == report.markdown(journal.gather(RUNS), whole=whole).strip(), "stale: run `make docs`"


@pytest.mark.skipif(not RUNS, reason="no records in docs/records")
def test_the_records_are_of_the_model_that_is_shipped():
    from kvfold.hf.load import fingerprint, load

    own = fingerprint(load("tiny")[0])
    assert {record.fingerprint for record in journal.gather(RUNS)} == {own}, "stale: run `make records docs`"
