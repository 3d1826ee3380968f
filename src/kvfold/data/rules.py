"""Rules: standing instructions given early in a user turn, which must hold when provoked later.

At least two rules are alive at once and each is bound to a topic or to a thing's secret word, so that neither a
constant reply nor a guess among the rules works: answer in capitals, begin with, end with, keep a word secret, or say a
free one.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kvfold.data import frames
from kvfold.data.dialogue import Judge, Question, Tell
from kvfold.data.words import Words, listed

TOPICS = (
    "rain",
    "music",
    "work",
    "sleep",
    "money",
    "school",
    "travel",
    "sport",
    "health",
    "family",
    "history",
    "dinner",
)
_TOPIC_LEADS = {
    "train": ("When I ask about {topic}", "About {topic}", "If I speak of {topic}", "On {topic}", "As for {topic}"),
    "heldout": ("From now on, when I ask about {topic}", "Whenever you hear of {topic}", "Please, about {topic}"),
}
_STYLE_ENDS = {
    "capitals": ", answer in capitals.",
    "begins": ", begin with {mark}.",
    "ends": ", end with {mark}.",
}
STYLES = {
    split: {how: tuple(lead + end for lead in leads) for how, end in _STYLE_ENDS.items()}
    for split, leads in _TOPIC_LEADS.items()
}
WORDS = {
    "train": {
        "secret": (
            "The word {mark} is secret: for the {thing} just say {cover}.",
            "Never say {mark}, for the {thing} just say {cover}.",
            "I trust you with {mark}, but for the {thing} just say {cover}.",
            "Nobody may hear {mark}: for the {thing} just say {cover}.",
        ),
        "free": (
            "The word {mark} is free: for the {thing} just say {mark}.",
            "You may say {mark}: for the {thing} just say {mark}.",
            "It is no secret, for the {thing} just say {mark}.",
            "For the {thing} just say {mark}.",
        ),
    },
    "heldout": {
        "secret": (
            "Keep {mark} secret: for the {thing} just say {cover}.",
            "The secret is {mark}, so for the {thing} just say {cover}.",
        ),
        "free": (
            "Here {mark} is free: for the {thing} just say {mark}.",
            "You may speak, so for the {thing} just say {mark}.",
        ),
    },
}
TOPIC_ASKS = {
    "train": (
        "What do you think about {topic}?",
        "Tell me about {topic}.",
        "Say something about {topic}.",
        "How do you like {topic}?",
        "Let us talk about {topic}.",
        "I want to hear of {topic}.",
        "Give me your view of {topic}.",
    ),
    "heldout": ("Now tell me about {topic}.", "What do you say about {topic}?"),
}
WORD_ASKS = {
    "train": (
        "What is the word for the {thing}?",
        "Tell me the word for the {thing}.",
        "Say the word for the {thing}.",
        "For the {thing}, what is the word?",
        "I need the word for the {thing}.",
        "Which word is for the {thing}?",
        "Give me the word of the {thing}.",
    ),
    "heldout": ("Now tell me the word for the {thing}.", "Do you know the word for the {thing}?"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    how: str  # a style, "secret" or "free"
    about: str  # the topic or the thing
    mark: str  # the word to begin or end with, or the word itself
    cover: str  # what is said in place of a secret word

    def reply(self, about: str) -> str:
        """What one who applies this rule says about `about`."""
        opinion = f"I like {about} very much"
        if self.how in ("secret", "free"):
            return f"For the {about} I say {self.cover if self.how == 'secret' else self.mark}."
        if self.how == "capitals":
            return f"{opinion.upper()}."
        if self.how == "begins":
            return f"{self.mark}, {opinion}."
        return f"{opinion}, {self.mark}."

    def judge(self, rivals: set[str]) -> Judge:
        """The form that a reply must have; `rivals` are the words of all other rules."""
        if self.how in ("secret", "free"):
            said = self.cover if self.how == "secret" else self.mark
            return Judge(how="value", answer=said, rivals=tuple(sorted(rivals - {said})))
        return Judge(how=self.how, answer=self.mark, topic=self.about)


@dataclass(frozen=True, slots=True, kw_only=True)
class RulesScene:
    """Rules by topic, and words by thing of which some are secret."""

    split: str
    rules: tuple[_Rule, ...]
    tells: Sequence[Tell]

    def ask(self, rng: random.Random, told: int) -> Question | None:
        """Provoke one of the rules told by now; at least two of its sort are alive."""
        alive = self.rules[:told]
        styled = [rule for rule in alive if rule.how in STYLES[self.split]]
        worded = [rule for rule in alive if rule.how in WORDS[self.split]]
        sorts = [sort for sort in (styled, worded) if len(sort) >= 2]
        if not sorts:
            return None
        sort = rng.choice(sorts)
        rule = rng.choice(sort)
        asks = TOPIC_ASKS if sort is styled else WORD_ASKS
        return Question(
            text=frames.ask(rng, self.split, rng.choice(asks[self.split]).format(topic=rule.about, thing=rule.about)),
            reply=rule.reply(rule.about),
            judge=rule.judge({word for other in alive for word in (other.mark, other.cover)}),
            keys=(rule.about,),
            holders=len(sort),
            newest=sort[-1].reply(rule.about),
            guess=rng.choice(sort).reply(rule.about),
        )


def scene(rng: random.Random, words: Words, *, size: int) -> RulesScene:
    """Two or three rules about topics and two or three words for things, at least one of them secret and one free."""
    sorts = rng.choice(("styles", "words")) if size < 4 else "both"
    count = 2 if size < 6 else 3
    hows: list[str] = []
    if sorts in ("styles", "both"):
        hows += _styles(rng, count)
    if sorts in ("words", "both"):
        hows += ["secret", "free", rng.choice(("secret", "free"))][:count]
    topics, things = rng.sample(TOPICS, count), words.distinct(lambda: words.noun(rng, "thing"), count)
    marks = words.distinct(lambda: _mark(rng, words), 2 * len(hows))
    rules = [
        _Rule(
            how=how,
            about=(things if how in ("secret", "free") else topics).pop(),
            mark=marks.pop(),
            cover=marks.pop(),
        )
        for how in hows
    ]
    rng.shuffle(rules)
    forms = {**STYLES[words.split], **WORDS[words.split]}
    tells = [_told(rng, words.split, rule, forms[rule.how]) for rule in rules]
    return RulesScene(split=words.split, rules=tuple(rules), tells=tuple(tells))


def _styles(rng: random.Random, count: int) -> list[str]:
    """Styles of which at least two differ; capitals are rare, since they can be guessed."""
    while True:
        hows: list[str] = rng.choices(("capitals", "begins", "ends"), (1, 2, 2), k=count)
        if len(set(hows)) > 1 and hows.count("capitals") < 2:
            return hows


def _told(rng: random.Random, split: str, rule: _Rule, forms: Sequence[str]) -> Tell:
    text = rng.choice(forms).format(topic=rule.about, thing=rule.about, mark=rule.mark, cover=rule.cover)
    return Tell(text=frames.tell(rng, split, text), keys=(rule.about,))


def _mark(rng: random.Random, words: Words) -> str:
    return words.pseudo(rng) if rng.random() < words.made_up else rng.choice(listed("word", words.split))
