"""The one door to transformers: nothing outside this folder imports it.

load.py brings a model in, cache_bridge.py is the cache that transformers sees, attention_bridge.py the attention and
mask functions that it calls. Only public seams are used, nothing is patched, and nothing happens at import.
"""
