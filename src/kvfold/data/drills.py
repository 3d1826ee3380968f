"""Short exercises that make binding appear in training: many keys of one kind, each asked; sums; copies of tokens.

Without them a model learns to read the kind only and to guess among its holders. Training only, never scored.
Chats come as messages; copies come as ids, since they mean nothing as text.
"""

import random
from collections.abc import Sequence

from kvfold.data import arithmetic, chitchat, recall
from kvfold.data.coreference import lists, places, relatives
from kvfold.data.dialogue import Message, Scene, Tell
from kvfold.data.rules import scene as rules_scene
from kvfold.data.words import KINDS, NOTHING, Borrowed, Words

DRILLS = ("people", "kinds", "prices", "sums", "lists", "relatives", "places", "rules")
_CHANGED_SHARE = 0.15  # of the facts, which are told again with another value


def drill(
    kind: str,
    *,
    keys: int,
    seed: int,
    split: str = "train",
    borrowed: Borrowed = NOTHING,
) -> tuple[Message, ...]:
    """Make a drill: facts told in one message, then each asked in a random order, every reply with weight 1.

    `keys` is the number of facts; for sums, what the amounts stay below.
    """
    rng = random.Random(f"drill:{kind}:{keys}:{split}:{seed}")
    words = Words(split=split, made_up=rng.choice((0.3, 0.6, 0.9)), borrowed=borrowed.words)
    if kind == "sums":
        return _sums(rng, keys)
    if kind in ("people", "kinds"):
        return _people(rng, words, keys, kinds=1 if kind == "people" else 2)
    return _questions_on(rng, words.split, _scene(kind, rng, words, keys), keys)


def _scene(kind: str, rng: random.Random, words: Words, keys: int) -> Scene:
    """A little world with enough tells for `keys` questions."""
    if kind == "prices":
        return arithmetic.scene(rng, words, size=round(keys / 0.65))
    if kind == "rules":
        return rules_scene(rng, words, size=keys)
    makers = {"lists": lists, "relatives": relatives, "places": places}
    return makers[kind](rng, words, size=keys + 2)


def _questions_on(rng: random.Random, split: str, scene: Scene, keys: int) -> tuple[Message, ...]:
    """All tells in one message, then `keys` different questions."""
    messages = _telling(rng, split, scene.tells)
    texts: set[str] = set()
    for _ in range(3 * keys):
        question = scene.ask(rng, len(scene.tells))
        if question is None or question.text in texts or len(texts) == keys:
            continue
        texts.add(question.text)
        messages += _exchange(question.text, question.reply)
    return tuple(messages)


def _telling(rng: random.Random, split: str, tells: Sequence[Tell]) -> list[Message]:
    content = " ".join(tell.text for tell in tells)
    return [
        Message(role="user", content=content),
        Message(role="assistant", content=chitchat.noted(rng, split), weight=0.1),
    ]


def _exchange(question: str, reply: str) -> list[Message]:
    return [
        Message(role="user", content=question),
        Message(role="assistant", content=reply, weight=1.0),
    ]


def _people(rng: random.Random, words: Words, keys: int, *, kinds: int) -> tuple[Message, ...]:
    """`keys` facts: people who all have one kind, or the same two kinds; a few are changed; all are asked once."""
    people = max(2, keys // kinds)

    def name_of_anyone() -> str:
        return words.name(rng, rng.choice(("woman", "man")))

    def value_of_any_kind() -> str:
        return words.value(rng, rng.choice(KINDS))

    names = words.distinct(name_of_anyone, people)
    pairs = [(name, kind) for kind in rng.sample(KINDS, kinds) for name in names]
    rng.shuffle(pairs)
    changed = [pair for pair in pairs if rng.random() < _CHANGED_SHARE]
    values = words.distinct(value_of_any_kind, len(pairs) + len(changed))
    alive: dict[tuple[str, str], str] = {}
    tells = []
    for pair, value in zip(pairs + changed, values, strict=True):
        name, kind = pair
        text = recall.told(rng, words.split, name=name, kind=kind, value=value, change=pair in alive)
        alive[pair] = value
        tells.append(Tell(text=text, keys=(f"{name}/{kind}",)))
    messages = _telling(rng, words.split, tells)
    rng.shuffle(pairs)
    for name, kind in pairs:
        question = recall.asked(rng, words.split, name=name, kind=kind)
        messages += _exchange(question, recall.replied(name, kind, alive[name, kind]))
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
            question = f"{high} - {low}"
            reply = arithmetic.less(high, low)
        else:
            terms = rng.sample((low, high), 2) if draw < 0.7 or below < 50 else rng.choices(amounts, k=3)
            question = " + ".join(str(term) for term in terms)
            reply = arithmetic.steps(terms)
        messages += _exchange(question, f"{reply}.")
    return tuple(messages)


def copies(*, ids: range, length: int, seed: int) -> tuple[list[int], list[float]]:
    """Random tokens in which phrases come back: ids and loss weights, 1 where a phrase repeats and can be known.

    Phrases are a key of one to three tokens and a value of one to four; from 128 tokens on keys share their tokens, so
    that the whole key must be matched and not its last token only.
    """
    rng = random.Random(f"copies:{length}:{seed}")
    phrases = _phrases(rng, ids, length)
    tokens: list[int] = []
    weights: list[float] = []
    seen = set()
    order = list(phrases)
    rng.shuffle(order)
    while len(tokens) < length:
        # Every phrase once, then any of them again.
        key = order.pop() if order else rng.choice(list(phrases))
        value = phrases[key]
        tokens += [*key, *value]
        weights += [0.0] * len(key)
        weights += [1.0 if key in seen else 0.0] * len(value)
        seen.add(key)
    return tokens[:length], weights[:length]


def _phrases(rng: random.Random, ids: range, length: int) -> dict[tuple[int, ...], list[int]]:
    """Values by key, where no key ends with another one."""
    is_short = length < 128
    pool = [rng.choice(ids) for _ in range(32 if is_short else max(4, length // 24))]
    phrases: dict[tuple[int, ...], list[int]] = {}
    while len(phrases) < max(2, length // 16):
        size = 1 if is_short else rng.choice((1, 2, 2, 3))
        key = tuple(rng.choice(pool) for _ in range(size))
        if any(_ends_alike(key, other) for other in phrases):
            pool.append(rng.choice(ids))
        else:
            phrases[key] = [rng.choice(ids) for _ in range(rng.choice((1, 1, 2, 3, 4)))]
    return phrases


def _ends_alike(key: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one key ends with the other."""
    shared = min(len(key), len(other))
    return key[-shared:] == other[-shared:]
