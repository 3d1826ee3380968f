"""Turns over time: conversations whose history is folded after every turn.

chat.py is one conversation with a person, rows.py many of them side by side for a benchmark, file.py what a saved
one looks like. Everything that touches transformers is in `hf/`.
"""
