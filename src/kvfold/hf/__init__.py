"""The one door to transformers: nothing outside this folder imports it.

load.py brings a model in and binding.py is what kvfold knows of it; cache.py is the cache that transformers sees,
batched.py several of them seen as one batch, and attention.py the attention and mask functions that it calls.
hooks.py says how long a hook stays on a model, and token_ids.py, hidden_states.py and drop_watch.py are such hooks.
saved.py is a cache that was written to a file (snapshot.py, snapshot_file.py); tuned_layers.py notices
that adapters were switched in the middle of a text.
passes.py runs rows and text for a fold, probe.py attends for training, generation.py streams replies.
Only public seams are used, nothing is patched, and nothing happens at import.
"""
