"""The suites, one file each; see `suite.py` for what such a file holds."""
