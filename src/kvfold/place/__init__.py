"""The place axis: where does a kept slot lie? One file, one placement; base.py says what a placement is.

A new placement is one new file here: a class that extends Place. Its file name is its name in plans.
"""
