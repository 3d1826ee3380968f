"""Adapters: what was learned for a model, as modules and as files. Nothing here imports transformers."""
