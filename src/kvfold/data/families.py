"""The four families of dialogue: one scored question at the end for benchmarks, many along the way for training.

Every dialogue is a pure function of (family, split, settings, seed). Held-out dialogues use names, values and templates
that training never sees. The bench asks these; it generates the last reply only.
"""

import random
from collections import Counter
from collections.abc import Sequence

from kvfold.data import arithmetic, chitchat, coreference, recall, rules
from kvfold.data.dialogue import Dialogue, Message, Question, Scene, Tell
from kvfold.data.words import NOTHING, SPLITS, Borrowed, Words
from kvfold.errors import DataError

CHAT_VERSION = 1
FAMILIES = ("recall", "coreference", "arithmetic", "rules")
_SCENES = {
    "recall": recall.scene,
    "coreference": coreference.scene,
    "arithmetic": arithmetic.scene,
    "rules": rules.scene,
}


def dialogue(family: str, *, split: str, turns: int, seed: int) -> Dialogue:
    """A dialogue of `turns` user turns whose last asks for something told at least three turns before."""
    rng = _random("dialogue", family, split, turns, seed)
    words = Words(split=split)
    while True:
        scene = _SCENES[family](rng, words, size=_size(rng, turns))
        question = scene.ask(rng, len(scene.tells))
        if question is None:
            continue
        last = _last_source(scene.tells, question)
        distance = rng.randint(min(3, turns - 1), turns - 1)
        at = turns - 1 - distance
        when = _schedule(rng, scene.tells, last=last, at=at, end=turns - 2)
        return _scripted(rng, family, scene, question, when, turns, split, distance)


def training_dialogue(
    family: str,
    *,
    turns: int,
    seed: int,
    filler: float = 0.7,
    questions: float = 0.5,
    split: str = "train",
    borrowed: Borrowed = NOTHING,
) -> tuple[Message, ...]:
    """The same worlds with many questions on the way; replies to them carry weight 1, other replies 0.1.

    `filler` is the chance of each of three sentences of chit-chat a turn, `questions` the share of turns that ask.
    `borrowed` words and sentences are drawn besides the generator's.
    """
    rng = _random("training", family, split, turns, seed, filler, questions)
    words = Words(split=split, made_up=rng.choice((0.3, 0.6, 0.9)), borrowed=borrowed.words)
    scene = _SCENES[family](rng, words, size=_size(rng, turns))
    when = sorted(rng.randint(0, max(0, turns - 2)) for _ in scene.tells)
    if turns < 5:
        when = [0] * len(scene.tells)
    messages: list[Message] = []
    told = 0
    for turn in range(turns):
        now = [tell.text for tell, at in zip(scene.tells, when, strict=True) if at == turn]
        told += len(now)
        asks = turn == turns - 1 or (not now and rng.random() < questions)
        question = scene.ask(rng, told) if asks else None
        messages += _exchange(rng, split, now, question, filler, borrowed.sentences)
    return tuple(messages)


def best_shortcut(dialogues: Sequence[Dialogue]) -> float:
    """What the best reader without bindings would score on these dialogues of one family.

    The best of: a guess among the alive holders of the asked kind (its expectation), the newest value of the kind, and
    the one constant answer that is right most often (for rules, the one constant way to answer).
    """
    if not dialogues:
        raise DataError("a shortcut was asked for no dialogues; there is nothing to score; give at least one")
    guess = sum(1 / one.holders for one in dialogues)
    newest = sum(one.correct(one.shortcuts["newest_of_kind"]) for one in dialogues)
    constant = Counter(one.shortcuts["constant"] for one in dialogues).most_common(1)[0][1]
    return max(guess, newest, constant) / len(dialogues)


def _random(*key: object) -> random.Random:
    family, split, turns = key[1], key[2], key[3]
    if family not in _SCENES:
        raise DataError(f"family {family!r} was asked; there are {', '.join(FAMILIES)}; choose one of them")
    if split not in SPLITS:
        raise DataError(f"split {split!r} was asked; there are {', '.join(SPLITS)}; choose one of them")
    if not isinstance(turns, int) or turns < 2:
        raise DataError(f"{turns} turns were asked; one tells and one asks; give at least 2")
    return random.Random(f"{CHAT_VERSION}:{':'.join(map(str, key))}")


def _size(rng: random.Random, turns: int) -> int:
    """How many facts a dialogue of this length holds: 2 at two turns, 6 to 9 at sixteen and more."""
    return 2 if turns < 4 else min(9, max(2, round(turns * rng.uniform(0.3, 0.55))))


def _last_source(tells: Sequence[Tell], question: Question) -> int:
    """The index of the newest tell that the question depends on."""
    return max(index for index, tell in enumerate(tells) if set(tell.keys) & set(question.keys))


def _schedule(rng: random.Random, tells: Sequence[Tell], *, last: int, at: int, end: int) -> list[int]:
    """A turn for every tell, in order, with tell `last` in turn `at` and none after turn `end`."""
    before = sorted(rng.randint(0, at) for _ in range(last))
    after = sorted(rng.randint(at, end) for _ in range(len(tells) - last - 1))
    return [*before, at, *after]


def _exchange(
    rng: random.Random,
    split: str,
    told: Sequence[str],
    question: Question | None,
    filler: float,
    borrowed: Sequence[str] = (),
) -> list[Message]:
    """One turn: chit-chat around what is told or asked, and the reply to it."""
    sentences = [chitchat.sentence(rng, split, borrowed) for _ in range(3) if rng.random() < filler]
    for text in told:
        # Several facts keep their order, at the end.
        place = rng.randint(0, len(sentences)) if len(told) == 1 else len(sentences)
        sentences.insert(place, text)
    if question is not None:
        sentences.append(question.text)
        reply, weight = question.reply, 1.0
    elif told:
        reply, weight = chitchat.noted(rng, split), 0.1
    else:
        sentences = sentences or [chitchat.sentence(rng, split, borrowed)]
        reply, weight = chitchat.reply(rng, split), 0.1
    return [Message(role="user", content=" ".join(sentences)), Message(role="assistant", content=reply, weight=weight)]


def _scripted(
    rng: random.Random,
    family: str,
    scene: Scene,
    question: Question,
    when: Sequence[int],
    turns: int,
    split: str,
    distance: int,
) -> Dialogue:
    """The benchmark's form: scripted turns, other keys asked now and then, the asked key never before the end."""
    messages: list[Message] = []
    told = 0
    for turn in range(turns - 1):
        now = [tell.text for tell, at in zip(scene.tells, when, strict=True) if at == turn]
        told += len(now)
        side = scene.ask(rng, told) if not now and rng.random() < 0.15 else None
        if side is not None and set(side.keys) & set(question.keys):
            side = None
        messages += _exchange(rng, split, now, side, 0.75)
    messages.append(_exchange(rng, split, [], question, 0.75)[0])
    return Dialogue(
        family=family,
        messages=tuple(messages),
        answer=question.reply if family == "rules" else question.judge.answer,
        reply=question.reply,
        distance=distance,
        judge=question.judge,
        holders=question.holders,
        shortcuts={"kind_guess": question.guess, "newest_of_kind": question.newest, "constant": _constant(question)},
    )


def _constant(question: Question) -> str:
    """What one constant answer would have to be: the value, or for rules that need no word, the way to answer."""
    return "capitals" if question.judge.how == "capitals" else question.judge.answer
