"""The command line: one file per verb, and no work of its own.

A verb turns words into calls of the library and prints what comes back. Nothing heavy is imported at the top of
these files, so that `kvfold --help` answers at once.
"""
