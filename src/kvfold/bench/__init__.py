"""What a plan is worth: suites ask, the runner keeps score, records stay in files, reports make them readable.

Start at `suite.py` (what a suite promises), then `runner.py`, `record.py` and `report.py`.
"""
