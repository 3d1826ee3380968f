"""Adapters: what was learned for a model, as modules and as files. Nothing here imports transformers.

scorer.py scores tokens, row_updates.py and adapter.py act on a model, files.py and ranks.py are what lies on a disk.
"""
