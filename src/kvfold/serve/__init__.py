"""A server that speaks OpenAI's chat completions, and whose long chats stay small.

Reading order: settings and refusal (plain values), body (what a request may say), sampling and stops (one token, one
text), held and holdings (chats between their turns, and their bytes), store and shelf (where chats lie), ticket (a
request on its way), opening, kept and turn (one reply), pace and scheduler (the thread that runs the model), answers
(OpenAI's forms), access and sessions (whose a request is), listener and app (the routes), address, connection, folder
and run (a process). load is the other side: many clients at once.
"""
