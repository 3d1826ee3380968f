"""What a model remembers, layer by layer: parts, the raw tail, and the layer that attends over them.

Read kv.py (the values that flow), part.py (what a part can do), dense.py (slots one after the other), tail.py (the
newest tokens, raw), recorders.py (what methods have recorded), state.py and layer.py (attend), context.py and fold.py
(fold), forward.py and memory.py (all layers together). Nothing here imports transformers or knows a method.
"""
