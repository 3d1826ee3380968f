"""Conversations whose history is folded after every turn.

Reading order: turns (plain values), template (messages to text), tokens and text (text to tokens and back), reply (one
generated reply), chat (the conversation), saved and file (a conversation on disk), rows (many scripted conversations
side by side, for benchmarks). Everything that touches transformers is in `hf/`.
"""
