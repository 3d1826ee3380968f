"""Replies to real dialogues, and a judge's grades of them from any endpoint that speaks OpenAI's chat completions.

dialogues.py says what a dialogue is, replies.py lets a folded model answer it, rubric.py words what the judge is asked,
endpoint.py sends it, judge.py keeps the scores, notebook.py is the file that both are kept in. suite.py ties them.
"""
