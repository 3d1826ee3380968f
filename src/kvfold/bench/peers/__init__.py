"""Rivals in the same run: other people's caches, each in a process of its own, asked the same tokens as we are."""
