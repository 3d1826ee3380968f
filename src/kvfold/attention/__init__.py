"""Attention over one layer: a slow reference, one part at a time, and the exact merge.

Read reference.py first, then partial.py (one part, with its log-sum-exp), merge.py (parts into a whole) and scores.py
(how much attention each slot received). basis.py and low_rank.py do the same over latents; kernels/ has what runs on a
GPU. Nothing here knows what a cache, a method or a model is.
"""
