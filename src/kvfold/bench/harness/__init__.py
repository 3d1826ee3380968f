"""The Language Model Evaluation Harness (lm_eval), with every number through the folded cache.

scoring.py folds contexts and scores what follows them, model.py is the class that lm_eval asks, tasks.py runs some
documents of a task for `kvfold bench lm-eval`, and `python -m kvfold.bench.harness` is lm_eval's own command with
our class in it.
"""
