"""A rival without a model, for tests: it speaks the protocol, claims half, and fails in the way that it is told to.

Run as a process by the tests, on the standard library alone. `method` says what goes wrong: Honest is right; Crash,
Hang, Rubbish, Odd and Refuse fail when a context is taken; LateCrash when it answers. An answer is the newest token of
the prompt, counted up. Every request is written to the file that the command line names.
"""

import json
import os
import sys
import time

log = open(sys.argv[1], "a") if len(sys.argv) > 1 else sys.stderr  # noqa: SIM115
weights = json.loads(os.environ.get("FAR_WEIGHTS", "[0, 0.0]"))
rows: dict[int, dict] = {}


def held(row):
    seen = len(rows[row]["ids"])
    half = seen // 2
    return {"seen": seen, "layers": 2, "kv_heads": 1, "slots": 2 * half, "stored_bytes": 16 * half,
            "resident_bytes": 16 * half, "other_bytes": 0, "full_bytes": 16 * seen, "claimed": 0.25}  # fmt: skip


def take(row, ids, method, settings):
    if method == "Crash":
        print("my last words", file=sys.stderr, flush=True)
        os._exit(3)
    if method == "Hang":
        time.sleep(600)
    if method == "Odd":
        return {"seen": "many"}
    if method == "Refuse":
        raise ValueError("too short\na context")
    rows[row] = {"ids": ids, "method": method}
    return held(row)


def answer(row, ids, max_new_tokens, stop):
    if rows[row]["method"] == "LateCrash":
        os._exit(4)
    tokens = [token for token in range(ids[-1] + 1, ids[-1] + 1 + max_new_tokens) if token not in stop]
    return {"tokens": tokens, "first_seconds": 0.5, "rest_seconds": 1.0, "steps": 2}


def read(row, ids, remember, newest):
    import base64
    import struct

    if remember:
        rows[row]["ids"] = rows[row]["ids"] + ids
    shown = ids[-newest:] if newest else ids
    data = struct.pack(f"<{2 * len(shown)}f", *(value for token in shown for value in (token, -token)))
    return {"shape": [len(shown), 2], "logits": base64.b64encode(data).decode()}


def steps(row, ids):
    rows[row]["ids"] = rows[row]["ids"] + ids
    return {"seconds": [0.25] * len(ids)}


VERBS = {
    "open": lambda **_: {"versions": {"far": "1.0"}, "weights": weights},
    "forget": lambda: {"gone": [rows.pop(row) and row for row in list(rows)]},
    "held": lambda row: held(row),
    "take": take,
    "answer": answer,
    "read": read,
    "steps": steps,
}

for line in sys.stdin:
    request = json.loads(line)
    print(line.strip(), file=log, flush=True)
    verb = request.pop("do")
    if verb == "take" and request["method"] == "Rubbish":
        print("Traceback: all is lost", flush=True)
        continue
    try:
        reply = {"ok": VERBS[verb](**request)}
    except Exception as error:
        reply = {"error": {"kind": type(error).__name__, "says": " ".join(str(error).split())}}
    print(json.dumps(reply), flush=True)
