"""The select axis: what stays? One file, one method, one paper; base.py says what a method is.

A new method is one new file here: a class that extends Select and has `choose`. Its file name is its name in plans.
"""
