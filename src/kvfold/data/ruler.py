"""The thirteen kinds of task of RULER, generated at any length: needles, chains of variables, word counts, questions.

Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models?, https://arxiv.org/abs/2404.06654
Ours differs: keys are pairs of held-out or made-up words, prose is the given text or else generated chit-chat, and
questions are asked of the excerpts of the given text. Prompts are worded as RULER's. Prompt and reply together take
at most the tokens asked for, as in RULER.
"""

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvfold.data import chitchat
from kvfold.data.excerpts import Excerpt, Source
from kvfold.data.words import Words, listed
from kvfold.errors import DataError

Count = Callable[[str], int]
SPLIT = "heldout"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HOPS = 4  # of a chain of variables
COMMON = 10  # words to be found in a list
FREQUENT = 3  # words to be found in a coded text
VOCABULARY = 2000  # of a coded text
SEAMS = 8  # tokens to spare: pieces of a text counted alone may take fewer than the whole
_NOTHING = Source()


@dataclass(frozen=True, slots=True, kw_only=True)
class Needles:
    """How one kind hides its needles."""

    hay: str  # "noise", "prose" or "needles"
    keys: int = 1
    values: int = 1  # of the key that is asked
    keys_asked: int = 1
    keys_are: str = "words"
    values_are: str = "numbers"


NEEDLES = {
    "niah_single_1": Needles(hay="noise"),
    "niah_single_2": Needles(hay="prose"),
    "niah_single_3": Needles(hay="prose", values_are="uuids"),
    "niah_multikey_1": Needles(hay="prose", keys=4),
    "niah_multikey_2": Needles(hay="needles"),
    "niah_multikey_3": Needles(hay="needles", keys_are="uuids", values_are="uuids"),
    "niah_multivalue": Needles(hay="prose", values=4),
    "niah_multiquery": Needles(hay="prose", keys=4, keys_asked=4),
}
QUESTIONS = ("qa_1", "qa_2")
TASKS = (*NEEDLES, "vt", "cwe", "fwe", *QUESTIONS)
REPLY_TOKENS = dict.fromkeys(NEEDLES, 128) | {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One prompt, whose last line asks; the reply is made to begin with `answer_prefix`."""

    task: str
    prompt: str
    answer_prefix: str
    outputs: tuple[str, ...]

    @property
    def question(self) -> str:
        """The last line of the prompt."""
        return self.prompt.rpartition("\n")[2]

    @property
    def reply_tokens(self) -> int:
        """How many tokens RULER lets a model answer with."""
        return REPLY_TOKENS[self.task]

    def score(self, reply: str) -> float:
        """RULER's: the share of the outputs that the reply holds; for questions on documents, whether it holds any."""
        found = [output.lower() in reply.lower() for output in self.outputs]
        return float(any(found)) if self.task in QUESTIONS else sum(found) / len(found)


def generate(task: str, *, tokens: int, count: Count, seed: int, source: Source = _NOTHING) -> Task:
    """A task of that kind. Raises DataError for an unknown kind, too few tokens, and questions without excerpts."""
    if task not in TASKS:
        raise DataError(f"task {task!r} was asked for; RULER has {', '.join(TASKS)}; give one of them")
    rng = random.Random(f"ruler:{task}:{tokens}:{seed}")
    room = tokens - REPLY_TOKENS[task] - SEAMS
    if task in NEEDLES:
        return _niah(task, rng, _Room(task=task, tokens=room, count=count), source)
    if task in QUESTIONS:
        return _qa(task, rng, _Room(task=task, tokens=room, count=count), source)
    return {"vt": _vt, "cwe": _cwe, "fwe": _fwe}[task](rng, _Room(task=task, tokens=room, count=count))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Room:
    """How much text fits into a prompt."""

    task: str
    tokens: int
    count: Count

    def fill(self, frame: str, units: Callable[[int], str], *, glue: str) -> list[str]:
        """As many units, from the first, as fit beside `frame`."""
        left = self.tokens - self.count(frame)
        if left < 0:
            raise DataError(
                f"{self.task} was asked for in too few tokens; its question and needles take {self.tokens - left}; "
                f"give {REPLY_TOKENS[self.task] + SEAMS} more than that for the reply"
            )
        return filled(units, tokens=left, count=self.count, glue=glue)


def filled(units: Callable[[int], str], *, tokens: int, count: Count, glue: str) -> list[str]:
    """Take as many units, from the first, as fit into so many tokens."""
    found: list[str] = []
    costs: dict[str, int] = {}
    while True:
        unit = units(len(found))
        if unit not in costs:
            costs[unit] = count(glue + unit)
        tokens -= costs[unit]
        if tokens < 0:
            return found
        found.append(unit)


def word_pair(rng: random.Random) -> str:
    words = Words(split=SPLIT)
    first = words.pseudo(rng) if rng.random() < 0.5 else rng.choice(listed("adjective", SPLIT))
    return f"{first}-{words.pseudo(rng)}"


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def seven_digits(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


_DRAWS = {"words": word_pair, "uuids": _uuid, "numbers": seven_digits}


def hide(rng: random.Random, hay: Sequence[str], hidden: Sequence[str], *, glue: str) -> str:
    """The hay in its order with each hidden sentence at a random place, those in their order too."""
    places = sorted(rng.randint(0, len(hay)) for _ in hidden)
    parts: list[str] = []
    for place in range(len(hay) + 1):
        parts += [text for at, text in zip(places, hidden, strict=True) if at == place]
        parts += hay[place : place + 1]
    return glue.join(parts)


def _niah(task: str, rng: random.Random, room: _Room, source: Source) -> Task:
    kind = NEEDLES[task]
    thing = kind.values_are.removesuffix("s")
    keys: list[str] = []

    def fresh() -> str:
        while (key := _DRAWS[kind.keys_are](rng)) in keys:
            pass
        keys.append(key)
        return key

    def needle(key: str, value: str) -> str:
        return f"One of the special magic {thing}s for {key} is: {value}."

    def draw() -> str:
        return _DRAWS[kind.values_are](rng)

    asked = [fresh() for _ in range(kind.keys_asked)]
    pairs = [(key, draw()) for key in asked for _ in range(kind.values)]
    rivals = [(fresh(), draw()) for _ in range(kind.keys - kind.keys_asked)]
    every = [*pairs, *rivals]
    hidden = [needle(*pair) for pair in rng.sample(every, len(every))]
    head, question, prefix = _words(thing, asked, many=len(pairs) > 1)
    glue = " " if kind.hay == "prose" else "\n"
    units = {
        "noise": lambda _: NOISE,
        "prose": running_text(rng, source),
        "needles": lambda _: needle(fresh(), draw()),
    }
    frame = glue.join((head, *hidden, question, prefix))
    hay = room.fill(frame, units[kind.hay], glue=glue)
    body = hide(rng, hay, hidden, glue=glue)
    outputs = tuple(value for _, value in pairs)
    return Task(task=task, prompt=f"{head}\n{body}\n{question}", answer_prefix=prefix, outputs=outputs)


def _words(thing: str, asked: Sequence[str], *, many: bool) -> tuple[str, str, str]:
    """What stands before the text, what is asked after it, and how the reply begins."""
    *first, last = asked
    named = ", ".join(first) + f", and {last}" if first else last
    about = f"for {named} mentioned in the provided text"
    after = f"Make sure to memorize it. I will quiz you about the {thing}{'s' * many} afterwards."
    if many:
        return (
            f"Some special magic {thing}s are hidden within the following text. {after}",
            f"What are all the special magic {thing}s {about}?",
            f"The special magic {thing}s {about} are",
        )
    return (
        f"A special magic {thing} is hidden within the following text. {after}",
        f"What is the special magic {thing} {about}?",
        f"The special magic {thing} {about} is",
    )


def running_text(rng: random.Random, source: Source) -> Callable[[int], str]:
    """Sentence number i of some running text."""
    if not source.sentences:
        return lambda _: chitchat.sentence(rng, SPLIT)
    start = rng.randrange(len(source.sentences))
    return lambda i: source.sentences[(start + i) % len(source.sentences)]


def _chain(rng: random.Random, letters: int) -> tuple[str, list[str], list[str]]:
    """A value, the variables that hold it, and the sentences that say so."""
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(LETTERS, k=letters))
        if name not in names:
            names.append(name)
    value = str(rng.randint(10_000, 99_999))
    sentences = [f"VAR {names[0]} = {value}"]
    sentences += [f"VAR {later} = VAR {earlier}" for earlier, later in pairwise(names)]
    return value, names, sentences


def _vt(rng: random.Random, room: _Room) -> Task:
    head = "Memorize and track the chain(s) of variable assignment hidden in the following text."

    def asks(value: str) -> tuple[str, str]:
        return (
            f"Question: Find all variables that are assigned the value {value} in the text above.",
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{HOPS + 1} variables are assigned the value {value}, they are:",
        )

    # An example with its answer comes first.
    value, names, chain = _chain(rng, letters=3)
    example = hide(rng, [NOISE] * HOPS, chain, glue="\n")
    shown = "\n".join((head, example, *asks(value))) + " " + " ".join(names)
    value, names, chain = _chain(rng, letters=5)
    question, prefix = asks(value)
    frame = "\n".join((shown, head, *chain, question, prefix))
    hay = room.fill(frame, lambda _: NOISE, glue="\n")
    body = hide(rng, hay, chain, glue="\n")
    return Task(
        task="vt",
        prompt=f"{shown}\n\n{head}\n{body}\n\n{question}",
        answer_prefix=prefix,
        outputs=tuple(names),
    )


def _cwe(rng: random.Random, room: _Room) -> Task:
    """Numbered words, ten of them far more often than the rest; at short lengths by ten or four to one."""
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often."
    )
    question = f"Question: What are the {COMMON} most common words in the above list?"
    prefix = f"Answer: The top {COMMON} words that appear most often in the list are:"
    words = Words(split=SPLIT)
    # An example with its answer comes first.
    drawn = words.distinct(lambda: words.pseudo(rng), 2 * COMMON)
    example = _numbered(rng, drawn[:COMMON] * 3 + drawn[COMMON:])
    shown = "\n".join((head, example, question, prefix))
    shown += " " + _answer_list(drawn[:COMMON])
    frame = "\n".join((shown, head, question, prefix))
    for often, seldom in ((30, 3), (10, 1), (4, 1)):
        drawn = _word_list(rng, room, frame, often=often, seldom=seldom)
        if drawn:
            common = drawn[:COMMON]
            body = _numbered(rng, common * often + drawn[COMMON:] * seldom)
            return Task(
                task="cwe",
                prompt=f"{shown}\n\n{head}\n{body}\n{question}",
                answer_prefix=prefix,
                outputs=tuple(common),
            )
    raise DataError(
        f"cwe was asked for in {room.tokens + REPLY_TOKENS['cwe'] + SEAMS} tokens; too few for a list; give 1536"
    )


def _word_list(rng: random.Random, room: _Room, frame: str, *, often: int, seldom: int) -> list[str]:
    """Ten words and as many others as fit, or nothing where not even ten others do."""
    words = Words(split=SPLIT)
    left = room.tokens - room.count(frame)
    found: list[str] = []
    number = room.count(" 1000.")  # what the number of an entry takes at most
    while True:
        word = words.pseudo(rng)
        if word in found:
            continue
        times = often if len(found) < COMMON else seldom
        left -= (number + room.count(f" {word}")) * times
        if left < 0:
            return found if len(found) >= 2 * COMMON else []
        found.append(word)


def _numbered(rng: random.Random, words: Sequence[str]) -> str:
    shuffled = rng.sample(words, len(words))
    return " ".join(f"{number}. {word}" for number, word in enumerate(shuffled, 1))


def _answer_list(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _fwe(rng: random.Random, room: _Room) -> Task:
    """Coded words whose frequencies fall with the square of their rank; the first rank is dots."""
    head = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words."
    )
    question = (
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    prefix = "Answer: According to the coded text above, the three most frequently appeared words are:"
    words = ["..."]
    while len(words) < VOCABULARY:
        words.append("".join(rng.choices(LETTERS.lower(), k=6)))
    frame = "\n".join((head, question, prefix))
    often = _frequencies(room, words, left=room.tokens - room.count(frame))
    if often[FREQUENT] <= often[FREQUENT + 1]:
        raise DataError(
            f"fwe was asked for in {room.tokens + REPLY_TOKENS['fwe'] + SEAMS} tokens; too few to count; give 512"
        )
    body = [word for word, many in zip(words, often, strict=True) for _ in range(many)]
    rng.shuffle(body)
    prompt = f"{head} {' '.join(body)}\n{question}"
    return Task(task="fwe", prompt=prompt, answer_prefix=prefix, outputs=tuple(words[1 : FREQUENT + 1]))


def _frequencies(room: _Room, words: Sequence[str], *, left: int) -> list[int]:
    """How often each word stands in the longest text that fits."""
    costs = [room.count(f" {word}") for word in words]
    shares = [rank**-2 for rank in range(1, len(words) + 1)]
    total = sum(shares)

    def times(drawn: int) -> list[int]:
        return [int(drawn * share / total) for share in shares]

    low, high = 0, max(left, 1)
    while low + 1 < high:
        middle = (low + high) // 2
        taken = sum(many * cost for many, cost in zip(times(middle), costs, strict=True))
        low, high = (middle, high) if taken <= left else (low, middle)
    return times(low)


def _qa(task: str, rng: random.Random, room: _Room, source: Source) -> Task:
    """A question whose excerpt stands among others: of other documents first (qa_1), of the same first (qa_2)."""
    if not source.questions:
        raise DataError(f"{task} was asked for; it needs excerpts that answer questions; give --data with rows of qa")
    gold, question, answer = rng.choice(source.questions)
    others = [excerpt for excerpt in source.excerpts if answer.casefold() not in excerpt.text.casefold()]
    rng.shuffle(others)
    others.sort(key=lambda excerpt: (excerpt.document == gold.document) == (task == "qa_1"))
    head = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    opening = f"{head}\n\nThe following are given documents.\n\n"
    asked = f"\n\n{head}\n\nQuestion: {question}"
    texts = iter(others)

    def next_text(_: int) -> str:
        return next(texts, _END).text

    frame = f"{opening}Document 1000:\n{gold.text}{asked}\nAnswer:"
    chosen = room.fill(frame, next_text, glue="\n\nDocument 1000:\n")
    chosen = [text for text in chosen if text]
    chosen.insert(rng.randint(0, len(chosen)), gold.text)
    body = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(chosen, 1))
    return Task(task=task, prompt=opening + body + asked, answer_prefix="Answer:", outputs=(answer,))


_END = Excerpt(document=-1, text="", questions=())
