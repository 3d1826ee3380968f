"""Talk that carries no fact: what fills the turns between telling and asking, and what the other side says to it.

Templates are split into a training and a held-out half; the words in their slots are common English. No sentence here
names a kind that facts are told about.
"""

import random
from collections.abc import Sequence

_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_TIMES = ("this morning", "last night", "today", "last week", "on the way home", "all day", "this evening", "again")
_MOODS = ["tired", "cheerful", "bored", "curious", "relaxed", "restless", "hopeful", "nervous"]
_WEATHER = ["rain", "snow", "wind", "fog", "sunshine", "thunder"]
_SUBJECTS = (
    "the news",
    "old films",
    "the neighbours",
    "my garden",
    "the train",
    "the weather",
    "a long walk",
    "the holidays",
)

_TEMPLATES = {
    "train": (
        "The {weather} kept me inside {time}.",
        "I felt a bit {mood} {time}.",
        "On {day} I read a few pages about {subject}.",
        "We talked about {subject} {time}.",
        "Someone told a long story about {subject}.",
        "It was a slow {day} and nothing much happened.",
        "I hope the {weather} stops before {day}.",
        "The bus was late {time}.",
        "My head is full of {subject} {time}.",
        "There was {weather} all over the hills {time}.",
        "I slept badly and woke up {mood}.",
        "I should write more often about {subject}.",
        "Nobody called me on {day}.",
        "I keep thinking about {subject}.",
        "They say there will be {weather} on {day}.",
        "By the way, I am quite {mood} {time}.",
        "The street was loud {time}.",
        "Let me think for a moment about {subject}.",
        "I am waiting for {day}.",
        "Well, {subject} can wait until {day}.",
        "What do you think about {subject}?",
        "Do you like {weather}?",
        "How was your {day}?",
        "Are you {mood} {time}?",
    ),
    "heldout": (
        "I spent {day} looking at the {weather}.",
        "A friend was {mood} about {subject} {time}.",
        "Nothing but {weather} {time}, it seems.",
        "I wonder why {subject} came up on {day}.",
        "My neighbour sounded {mood} on {day}.",
        "We waited a long time for {subject}.",
        "Did you hear about {subject} {time}?",
        "{subject} again, all through {day}, I am afraid.",
        "It is late and I am {mood}.",
        "After {day} there will be more {weather}.",
        "Some {mood} people talked about {subject} {time}.",
        "The {weather} was here {time}, and I did not mind.",
        "Have you read anything about {subject}?",
        "I was {mood} on {day} and I do not know why.",
        "Is it true that {weather} is good for {subject}?",
        "Let us not think about {subject} {time}.",
        "My friend wrote to me about {subject}.",
        "On {day} I was at home with {subject}.",
    ),
}
_REPLIES = {
    "train": (
        "I see.",
        "All right.",
        "Thank you for telling me.",
        "Good to know.",
        "I understand.",
        "That sounds fine to me.",
        "Yes, I follow you.",
        "Let us go on.",
        "I hear you.",
        "That is how it goes.",
        "Tell me more when you like.",
        "Of course.",
    ),
    "heldout": (
        "I am listening.",
        "Fine, go on.",
        "Yes, I see that.",
        "Thank you, I understand.",
        "That is good to hear.",
    ),
}
_NOTED = {
    "train": ("Noted.", "I will remember that.", "Thank you, I have noted it.", "Got it.", "I will keep that in mind."),
    "heldout": ("Thank you, noted.", "Got it, I will remember.", "I have noted that."),
}


def sentence(rng: random.Random, split: str, borrowed: Sequence[str] = ()) -> str:
    """One sentence of chit-chat, half of the time one of those that are borrowed."""
    if borrowed and rng.random() < 0.5:
        return rng.choice(borrowed)
    text = rng.choice(_TEMPLATES[split]).format(
        weather=rng.choice(_WEATHER),
        mood=rng.choice(_MOODS),
        time=rng.choice(_TIMES),
        day=rng.choice(_DAYS),
        subject=rng.choice(_SUBJECTS),
    )
    return text[0].upper() + text[1:]


def reply(rng: random.Random, split: str) -> str:
    """What is said to chit-chat."""
    return rng.choice(_REPLIES[split])


def noted(rng: random.Random, split: str) -> str:
    """What is said to a tell; it never repeats what was told."""
    return rng.choice(_NOTED[split])


def templates(split: str) -> tuple[str, ...]:
    """Every template of one half, for the test that holds them disjoint."""
    return _TEMPLATES[split] + _REPLIES[split] + _NOTED[split]
