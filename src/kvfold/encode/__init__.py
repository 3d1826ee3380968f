"""The encode axis: how is a kept slot stored? One file, one codec; base.py says what a codec is.

A new codec is one new file here: a class that extends Encode. Its file name is its name in plans.
"""
