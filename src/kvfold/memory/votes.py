"""The old names of pooling and dilating attention scores, which attention/scores.py holds. It adds nothing to them.

It stays until its last reader imports from there.
"""

from kvfold.attention.scores import POOL
from kvfold.attention.scores import pool_and_dilate as stretched

__all__ = ["POOL", "stretched"]
