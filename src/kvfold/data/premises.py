"""Word problems given over several turns: each premise a message, then the question, then the worked solution.

GSM8K's questions and solutions are given by a file (Cobbe et al., https://arxiv.org/abs/2110.14168). In a third of the
problems one premise is given with another number first and corrected later. The values that are asked for are the
numbers of the solution. Knows nothing of tokens.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path

from kvfold.data.dialogue import Message
from kvfold.data.files import read_rows
from kvfold.data.values import History, Value
from kvfold.errors import DataError

NOTED = "Noted."
_CORRECTED_SHARE = 1 / 3  # of the problems in which a premise can be wrong first
_STEPS = re.compile(r"<<[^>]*>>")  # a calculator's notes in the solutions
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def problems(path: Path, *, n: int, seed: int) -> list[History]:
    """Draw `n` problems with two premises or more. Raises DataError for a file of another shape, or with too few."""
    rows = read_rows(path, fields=("question", "answer"))
    rng = random.Random(f"premises:{seed}")
    rng.shuffle(rows)
    found = []
    for row in rows:
        *premises, question = _SENTENCE.split(" ".join(str(row["question"]).split()))
        solution, mark, answer = str(row["answer"]).partition("####")
        if len(premises) >= 2 and mark:
            given = _corrected(premises, rng)
            found.append(_history(given, question, _STEPS.sub("", solution), answer.strip()))
        if len(found) == n:
            return found
    raise DataError(
        f"{n} problems were asked of {path}; {len(found)} of its rows have two premises or more and an answer behind "
        "####; ask for fewer with --n"
    )


def _corrected(premises: Sequence[str], rng: random.Random) -> list[str]:
    """List the messages that give the premises; one may be wrong first and corrected after the others."""
    given = list(premises)
    numbered = [at for at, premise in enumerate(premises) if _NUMBER.search(premise)]
    if numbered and rng.random() < _CORRECTED_SHARE:
        at = rng.choice(numbered)
        wrong = str(rng.randint(2, 99))
        given[at] = _NUMBER.sub(lambda _: wrong, premises[at], count=1)
        given.append(f"I was wrong there: {premises[at]}")
    return given


def _history(premises: Sequence[str], question: str, solution: str, answer: str) -> History:
    messages = []
    for premise in premises:
        messages.append(Message(role="user", content=premise))
        messages.append(Message(role="assistant", content=NOTED))
    reply = f"{' '.join(solution.split())} The answer is {answer}."
    messages.append(Message(role="user", content=question))
    messages.append(Message(role="assistant", content=reply))
    values = [
        Value(message=len(messages) - 1, start=number.start(), end=number.end(), slot="number", distance=1)
        for number in _NUMBER.finditer(reply)
    ]
    return History(family="gsm8k", messages=tuple(messages), values=tuple(values))
