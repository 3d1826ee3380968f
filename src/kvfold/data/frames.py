"""Openers and tails around what is told and asked in training, so that no place in a sentence is learnt by heart.

Held-out sentences are used as they are written; their frames are none of those that can be made here (a test holds it).
"""

import random

TELL_OPENERS = (
    "Well, ", "By the way, ", "They told me that ", "I heard that ", "I think that ", "As you know, ",
    "For the record, ", "Let me say that ", "Good news: ", "Also, ", "It is true that ", "Listen: ",
    "Today I learned that ", "One more thing: ", "Here is a fact: ", "So ", "And ", "You may note that ",
    "I was told that ", "In short, ", "Yes, ", "No, ",
)  # fmt: skip
TELL_TAILS = (", I think", ", by the way", ", as far as I know", ", they say", ", and that is all", ", it seems")
ASK_OPENERS = (
    "So, ", "Well, ", "And ", "One question: ", "By the way, ", "Please, ", "Sorry, ", "I wonder: ", "Listen: ",
    "My question: ", "Once more: ", "Let me ask: ", "Wait, ", "Then ", "If you can, ", "Back to something else: ",
    "Also, ", "It is time to ask: ", "Here is a question for you: ", "Let us see, ", "After all that, ",
    "Think back, ", "Yes, but ",
)  # fmt: skip
ASK_TAILS = (", please", " again", " once more", " if you can", " for me", ", if you know", " today", ", my friend")


def tell(rng: random.Random, split: str, text: str) -> str:
    """A sentence that tells, in training often with an opener and now and then a tail."""
    return _framed(rng, text, TELL_OPENERS, 0.5, TELL_TAILS, 0.15) if split == "train" else text


def ask(rng: random.Random, split: str, text: str) -> str:
    """A sentence that asks, in training often with an opener and now and then a tail."""
    return _framed(rng, text, ASK_OPENERS, 0.6, ASK_TAILS, 0.3) if split == "train" else text


def _framed(
    rng: random.Random,
    text: str,
    openers: tuple[str, ...],
    often: float,
    tails: tuple[str, ...],
    seldom: float,
) -> str:
    if rng.random() < seldom:
        text = text[:-1] + rng.choice(tails) + text[-1]
    if rng.random() >= often:
        return text
    first = text.split(" ", 1)[0].rstrip(",")
    return rng.choice(openers) + (text[0].lower() + text[1:] if first in _COMMON else text)


# First words that are no names and lose their capital after an opener.
_COMMON = frozenset((
    "The", "As", "About", "You", "Please", "For", "Speaking", "What", "Do", "Tell", "And", "Actually", "There", "In",
    "They", "My", "This", "Here", "Of", "Think", "When", "Keep", "It", "Never", "How", "Say", "Always", "Which", "Can",
    "Is", "Give", "With", "Where", "Begin", "End", "Use", "If", "Let", "By", "One", "Some", "Note", "Remember", "Read",
))  # fmt: skip
