"""What a model remembers, layer by layer: parts, the raw tail, and the layer that attends over them.

Read kv.py (the values that flow), part.py (what a part can do), dense.py (slots one after the other), tail.py (the
newest tokens, raw), window.py (the last queries), layer.py (attend, append, fold). Nothing here imports transformers
or knows a method: a method is whatever can choose slots, a codec whatever can write and read them.
"""
