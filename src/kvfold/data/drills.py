"""Short exercises that make binding appear in training: many keys of one kind, each asked; sums; copies of tokens.

Without them a model learns to read the kind only and to guess among its holders. Training only, never scored.
Chats come as messages; copies come as ids, since they mean nothing as text.
"""

import random
from collections.abc import Sequence

from kvfold.data import arithmetic, chitchat, recall
from kvfold.data.coreference import lists, places, relatives
from kvfold.data.dialogue import Judge, Message, Question, Scene, Tell
from kvfold.data.rules import scene as rules_scene
from kvfold.data.words import KINDS, NOTHING, Borrowed, Words

DRILLS = ("people", "kinds", "prices", "sums", "lists", "relatives", "places", "rules")


def drill(
    kind: str, *, keys: int, seed: int, split: str = "train", borrowed: Borrowed = NOTHING
) -> tuple[Message, ...]:
    """Facts told in one message, then each asked in a random order, every reply with weight 1.

    `keys` is the number of facts; for sums, what the amounts stay below.
    """
    rng = random.Random(f"drill:{kind}:{keys}:{split}:{seed}")
    words = Words(split=split, made_up=rng.choice((0.3, 0.6, 0.9)), borrowed=borrowed.words)
    if kind == "sums":
        return _sums(rng, keys)
    if kind in ("people", "kinds"):
        return _people(rng, words, keys, kinds=1 if kind == "people" else 2)
    if kind == "prices":
        scene: Scene = arithmetic.scene(rng, words, size=round(keys / 0.65))
    elif kind == "rules":
        scene = rules_scene(rng, words, size=keys)
    else:
        scene = {"lists": lists, "relatives": relatives, "places": places}[kind](rng, words, size=keys + 2)
    return _told_then_asked(rng, words.split, scene, keys)


def _told_then_asked(rng: random.Random, split: str, scene: Scene, keys: int) -> tuple[Message, ...]:
    """All tells in one message, then `keys` different questions."""
    messages = _telling(rng, split, scene.tells)
    asked: set[str] = set()
    for _ in range(3 * keys):
        question = scene.ask(rng, len(scene.tells))
        if question is not None and question.text not in asked and len(asked) < keys:
            asked.add(question.text)
            messages += _asked(question)
    return tuple(messages)


def _telling(rng: random.Random, split: str, tells: Sequence[Tell]) -> list[Message]:
    content = " ".join(tell.text for tell in tells)
    return [
        Message(role="user", content=content),
        Message(role="assistant", content=chitchat.noted(rng, split), weight=0.1),
    ]


def _asked(question: Question) -> list[Message]:
    return [
        Message(role="user", content=question.text),
        Message(role="assistant", content=question.reply, weight=1.0),
    ]


def _people(rng: random.Random, words: Words, keys: int, *, kinds: int) -> tuple[Message, ...]:
    """`keys` facts: people who all have one kind, or the same two kinds; a few are changed; all are asked once."""
    people = max(2, keys // kinds)
    names = words.distinct(lambda: words.name(rng, rng.choice(("woman", "man"))), people)
    pairs = [(name, kind) for kind in rng.sample(KINDS, kinds) for name in names]
    rng.shuffle(pairs)
    changed = [pair for pair in pairs if rng.random() < 0.15]
    values = words.distinct(lambda: words.value(rng, rng.choice(KINDS)), len(pairs) + len(changed))
    alive, tells = {}, []
    for (name, kind), value in zip(pairs + changed, values, strict=True):
        text = recall.told(rng, words.split, name=name, kind=kind, value=value, change=(name, kind) in alive)
        alive[name, kind] = value
        tells.append(Tell(text=text, keys=(f"{name}/{kind}",)))
    messages = _telling(rng, words.split, tells)
    rng.shuffle(pairs)
    for name, kind in pairs:
        value = alive[name, kind]
        messages += _asked(
            Question(
                text=recall.asked(rng, words.split, name=name, kind=kind),
                reply=recall.replied(name, kind, value),
                judge=Judge(how="value", answer=value, rivals=tuple(sorted(set(alive.values()) - {value}))),
                keys=(f"{name}/{kind}",),
                holders=people,
                newest=value,
                guess=value,
            )
        )
    return tuple(messages)


def _sums(rng: random.Random, below: int) -> tuple[Message, ...]:
    """Pure sums and differences of amounts below `below`, in the form that replies use.

    Small ones come alone: among others, looking everywhere at once does not show the amounts, and nothing is learnt.
    """
    messages = []
    amounts = range(arithmetic.AMOUNTS.start, below)
    for _ in range(1 if below < 50 else rng.choice((1, 2, 4))):
        low, high = sorted(rng.choices(amounts, k=2))
        draw = rng.random()
        if draw < 0.3:
            asked, said = f"{high} - {low}", f"{arithmetic.less(high, low)}."
        elif draw < 0.7 or below < 50:
            first, second = rng.sample((low, high), 2)
            asked, said = f"{first} + {second}", f"{arithmetic.steps((first, second))}."
        else:
            three = rng.choices(amounts, k=3)
            asked, said = " + ".join(map(str, three)), f"{arithmetic.steps(three)}."
        messages += [Message(role="user", content=asked), Message(role="assistant", content=said, weight=1.0)]
    return tuple(messages)


def copies(*, ids: range, length: int, seed: int) -> tuple[list[int], list[float]]:
    """Random tokens in which phrases come back: ids and loss weights, 1 where a phrase repeats and can be known.

    Phrases are a key of one to three tokens and a value of one to four; from 128 tokens on keys share their tokens, so
    that the whole key must be matched and not its last token only.
    """
    rng = random.Random(f"copies:{length}:{seed}")
    short = length < 128
    pool = [rng.choice(ids) for _ in range(32 if short else max(4, length // 24))]
    phrases: dict[tuple[int, ...], list[int]] = {}
    while len(phrases) < max(2, length // 16):
        key = tuple(rng.choice(pool) for _ in range(1 if short else rng.choice((1, 2, 2, 3))))
        if not any(key[-len(other) :] == other or other[-len(key) :] == key for other in phrases):
            phrases[key] = [rng.choice(ids) for _ in range(rng.choice((1, 1, 2, 3, 4)))]
        else:
            pool.append(rng.choice(ids))
    out, weights, seen = [], [], set()
    order = list(phrases)
    rng.shuffle(order)
    while len(out) < length:
        key = order.pop() if order else rng.choice(list(phrases))
        out += [*key, *phrases[key]]
        weights += [0.0] * len(key) + [1.0 if key in seen else 0.0] * len(phrases[key])
        seen.add(key)
    return out[:length], weights[:length]
