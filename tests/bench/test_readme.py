"""The pages of results show what the records in the repository say, and nothing else."""

from pathlib import Path

import pytest

from kvfold.bench.report import page as report
from kvfold.bench.run import journal

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "docs" / "records"
PAGES = {"docs/results.md": "*-tiny", "docs/results-smollm2.md": "*-smollm2", "docs/speed.md": "speed-*"}
RUNS = {page: sorted(path.parent for path in RECORDS.glob(f"{runs}/records.jsonl")) for page, runs in PAGES.items()}


def between_marks(name: str) -> str:
    text = (ROOT / name).read_text(encoding="utf-8")
    _, begin, rest = text.partition(report.BEGIN)
    assert begin, f"{name} has a place for tables"
    return rest.partition(report.END)[0].strip()


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_are_those_of_the_records(name):
    shown = between_marks(name)
    assert shown == report.markdown(journal.gather(RUNS[name])).strip(), "stale: run `make docs`"


def test_the_records_are_of_the_model_that_is_shipped():
    from kvfold.hf.load import fingerprint, load

    own = fingerprint(load("tiny")[0])
    assert {record.fingerprint for record in journal.gather(RUNS["docs/results.md"])} == {own}, (
        "stale: run `make records docs`"
    )
