"""The far side of a rival's process: one JSON request per line in, one reply per line out.

Replies are {"ok": ...} or {"error": {"kind", "says"}}; whatever libraries print goes to standard error. It runs in the
rival's interpreter and imports nothing of kvfold.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from checks import padded, second_turn  # pyright: ignore[reportMissingImports]
from rival import Rival  # pyright: ignore[reportMissingImports]

VERBS = ("open", "take", "forget", "held", "read", "answer", "steps")
CHECKS = {"second_turn": second_turn, "padded": padded}


def verbs(rival: Rival) -> dict[str, Callable[..., dict[str, Any]]]:
    """Name everything that can be requested."""
    found = {name: getattr(rival, name) for name in VERBS}
    return found | {name: partial(check, rival) for name, check in CHECKS.items()}


def serve(rival: Rival) -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not stand between replies
    known = verbs(rival)
    for line in sys.stdin:
        try:
            request = json.loads(line)
            verb = request.pop("do")
            assert verb in known, f"{verb!r} is no verb"
            reply = {"ok": known[verb](**request)}
        except Exception as error:  # whatever it is, the other side judges it
            says = " ".join(str(error).split())[:300]
            reply = {"error": {"kind": type(error).__name__, "says": says}}
        print(json.dumps(reply), file=replies, flush=True)
