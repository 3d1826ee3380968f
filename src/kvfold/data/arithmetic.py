"""Arithmetic: prices told over turns and revised on the way; a price, a difference or a total is asked at the end.

Amounts are 10 to 99. Replies go step by step: each price is said again, then tens and ones are added apart, then put
together: "36 + 47 = 70 + 13 = 83".
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from kvfold.data import frames
from kvfold.data.dialogue import Judge, Question, Tell
from kvfold.data.words import Words

AMOUNTS = range(10, 100)

TELLS = {
    "train": (
        "The {thing} costs {n}.",
        "The {thing} costs {n}.",
        "I saw that the {thing} costs {n}.",
        "In the shop the {thing} costs {n}.",
        "Please note the {thing} costs {n}.",
        "As for the {thing}, it costs {n}.",
        "They say the {thing} costs {n} here.",
    ),
    "heldout": (
        "Here in the shop the {thing} costs {n}.",
        "I saw the {thing}, it costs {n}.",
        "As they say, the {thing} costs {n}.",
        "Please, the {thing} costs {n} here.",
    ),
}
CHANGES = {
    "train": (
        "The {thing} now costs {n}.",
        "Actually, the {thing} now costs {n}.",
        "The price changed: the {thing} now costs {n}.",
        "I was wrong before, the {thing} now costs {n}.",
    ),
    "heldout": ("A change: the {thing} now costs {n}.", "I was wrong, actually the {thing} now costs {n}."),
}
PRICE_ASKS = {
    "train": (
        "What does the {a} cost?",
        "How much is the {a}?",
        "Tell me the price of the {a}.",
        "The {a}, what is its price?",
        "Say what the {a} costs.",
        "I need the price of the {a}.",
        "For the {a}, what do I pay?",
        "Do you still know what the {a} costs?",
        "How much does the {a} cost now?",
        "I do not know the price of the {a} any more.",
    ),
    "heldout": ("Do you know how much the {a} costs?", "I forgot the price of the {a}."),
}
SUM_ASKS = {
    "train": (
        "How much are {things} together?",
        "What do {things} cost in total?",
        "Tell me the total for {things}.",
        "For {things}, what is the sum?",
        "I need the sum of {things}.",
        "If I buy {things}, what do I pay?",
        "Say what {things} cost in all.",
        "How much do {things} cost, all in all?",
        "If I take {things}, how much do they cost?",
        "What is the price of {things} together?",
        "How much do I pay for {things}?",
        "Now the total for {things}.",
        "Taken together, what do {things} cost?",
        "All in all, how much are {things}?",
    ),
    "heldout": ("What is the total for {things}?", "Together, how much do {things} cost?"),
}
DIFFERENCE_ASKS = {
    "train": (
        "How much more does the {a} cost than the {b}?",
        "What is the difference between the {a} and the {b}?",
        "By how much is the {a} above the {b}?",
        "I need the difference of the {a} and the {b}.",
        "How much is the {a} over the {b}?",
        "Say how much more the {a} costs than the {b}.",
        "I want the difference between the {a} and the {b}.",
        "How much more is the {a} than the {b}?",
    ),
    "heldout": (
        "Tell me how much more the {a} costs than the {b}.",
        "Tell me the difference between the {a} and the {b}.",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticScene:
    """Things with prices, some revised."""

    split: str
    prices: tuple[tuple[str, int], ...]  # one per tell
    tells: Sequence[Tell]

    def ask(self, rng: random.Random, told: int) -> Question | None:
        """Ask for a price, a difference or a total of two or three things told by now."""
        alive: dict[str, int] = {}
        for thing, amount in self.prices[:told]:
            alive.pop(thing, None)
            alive[thing] = amount
        if len(alive) < 2:
            return None
        draw = rng.random()
        if draw < 0.25 or len(alive) == 2:
            return self._asked(rng, alive, 1, "price")
        if draw < 0.45 and len(set(alive.values())) == len(alive):
            return self._asked(rng, alive, 2, "difference")
        return self._asked(rng, alive, 3 if len(alive) > 3 and draw > 0.75 else 2, "sum")

    def _asked(self, rng: random.Random, alive: dict[str, int], count: int, how: str) -> Question:
        things = rng.sample(list(alive), count)
        if how == "difference":
            things.sort(key=lambda thing: -alive[thing])
        amounts = [alive[thing] for thing in things]
        newest = list(alive.values())[-count:]
        guess = [alive[thing] for thing in rng.sample(list(alive), count)]
        answer = result(how, amounts)
        return Question(
            text=_asking(rng, self.split, how, things),
            reply=reply(how, things, amounts),
            judge=Judge(how="amount", answer=str(answer)),
            keys=tuple(f"{thing}/price" for thing in things),
            holders=comb(len(alive), count),
            newest=str(result(how, newest)),
            guess=str(result(how, guess)),
        )


def _asking(rng: random.Random, split: str, how: str, things: Sequence[str]) -> str:
    return frames.ask(rng, split, _bare(rng, split, how, things))


def _bare(rng: random.Random, split: str, how: str, things: Sequence[str]) -> str:
    if how == "price":
        return rng.choice(PRICE_ASKS[split]).format(a=things[0])
    if how == "difference":
        return rng.choice(DIFFERENCE_ASKS[split]).format(a=things[0], b=things[1])
    named = ", ".join(f"the {thing}" for thing in things[:-1]) + f" and the {things[-1]}"
    return rng.choice(SUM_ASKS[split]).format(things=named)


def result(how: str, amounts: Sequence[int]) -> int:
    """The amount asked for."""
    return abs(amounts[0] - amounts[1]) if how == "difference" else sum(amounts)


def reply(how: str, things: Sequence[str], amounts: Sequence[int]) -> str:
    """The canonical reply: what each thing costs, then the sum step by step."""
    named = ", ".join(f"the {thing} costs {amount}" for thing, amount in zip(things, amounts, strict=True))
    named = named[0].upper() + named[1:]
    if how == "price":
        return f"{named}."
    if how == "difference":
        return f"{named}. {less(*amounts)}."
    return f"{named}. {steps(amounts)}."


def steps(amounts: Sequence[int]) -> str:
    """A sum in steps of two: "36 + 47 = 70 + 13 = 83, 83 + 12 = 90 + 5 = 95"."""
    total, said = amounts[0], []
    for amount in amounts[1:]:
        tens, ones = (total // 10 + amount // 10) * 10, total % 10 + amount % 10
        said.append(f"{total} + {amount} = {tens} + {ones} = {total + amount}")
        total += amount
    return ", ".join(said)


def less(high: int, low: int) -> str:
    """A difference in steps: "83 - 47 = 40 - 4 = 36"."""
    tens, ones = (high // 10 - low // 10) * 10, high % 10 - low % 10
    return f"{high} - {low} = {tens} {'-' if ones < 0 else '+'} {abs(ones)} = {high - low}"


def scene(rng: random.Random, words: Words, *, size: int) -> ArithmeticScene:
    """Two to five things with prices, and up to two revisions."""
    count = max(2, min(5, round(size * 0.65)))
    things = words.distinct(lambda: words.noun(rng, "thing"), count)
    order = list(things)
    changed = rng.sample(things, min(count - 1, rng.choice((0, 1, 1, 2)))) if size > 2 else []
    for thing in changed:
        order.insert(rng.randint(order.index(thing) + 1, len(order)), thing)
    amounts = rng.sample(AMOUNTS, len(order))
    prices = tuple(zip(order, amounts, strict=True))
    tells, seen = [], set()
    for thing, amount in prices:
        told = CHANGES if thing in seen else TELLS
        seen.add(thing)
        text = rng.choice(told[words.split]).format(thing=thing, n=amount)
        tells.append(Tell(text=frames.tell(rng, words.split, text), keys=(f"{thing}/price",)))
    return ArithmeticScene(split=words.split, prices=prices, tells=tuple(tells))
