"""The prompts of a judge, in our words after the public descriptions of MT-Bench and MT-Bench-101.

Both grade one reply at a time from 1 to 10, with reasons first and the rating in double brackets at the end
(https://arxiv.org/abs/2306.05685, https://arxiv.org/abs/2402.14762). Our wording differs from theirs, so scores are
comparable with one another, not with published tables. A change of a word here is a new VERSION.
"""

import re
from collections.abc import Mapping, Sequence

VERSION = 1
LOWEST, HIGHEST = 1.0, 10.0

_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*(?:/\s*10\s*)?\]\]")

_TASK = (
    "You grade how well an AI assistant replied in a conversation. Be fair and strict, and do not favour long replies."
)
_FORM = (
    "First explain your grade in a few sentences. Then write, alone on the last line, the grade from 1 (worst) to 10 "
    "(best) in double square brackets, like this: Rating: [[5]]"
)
_QUALITY = "Grade how helpful, relevant, correct, deep and detailed the reply is for what the user asked."
_ONLY_LAST = (
    "Only the assistant's last reply is graded. Everything before it is given: do not grade it, use it to understand "
    "what the user wants."
)

CRITERIA: Mapping[str, str] = {
    "CM": "The point here is memory: does the reply use what was said earlier in the conversation, rightly and where "
    "it matters, without contradicting or repeating it? If nothing earlier matters, judge the reply on its own.",
    "AR": "The point here is reference: does the reply understand what words like 'it', 'they' or 'that' of the last "
    "question stand for, and is it right about that very thing?",
    "SI": "The point here is a task and its input given apart: where the user has only named a task, a good reply asks "
    "for or awaits the input; where the input has come, a good reply carries the named task out on it, correctly.",
    "TS": "The point here is a change of topic: does the reply follow the user to the new topic and answer it well, "
    "without being pulled back by the old one?",
    "CC": "The point here is confusion: the last question looks like an earlier one but means something else. Does the "
    "reply answer the last question itself, truly, without borrowing from the look-alike?",
    "CR": "The point here is to rewrite: does the reply keep the meaning of the earlier text while changing its "
    "content as the user asked?",
    "FR": "The point here is to reformat: does the reply keep the meaning of the earlier text while putting it into "
    "the form that the user asked for?",
    "SC": "The point here is to correct oneself: the user rightly doubts an earlier, wrong reply. Does the reply admit "
    "the error and give the right answer?",
    "SA": "The point here is to stand firm: the user wrongly doubts an earlier, right reply. Does the reply hold to "
    "the truth and explain it politely, without giving in?",
    "MR": "The point here is mathematics: is the result right, and is each step sound and clear? Compare with the "
    "reference solution; another way to the same result is as good.",
    "GR": "The point here is reasoning: is the conclusion right, and does it follow step by step? Compare with the "
    "reference solution; another way to the same conclusion is as good.",
    "IC": "The point here is to ask back: where the question is unclear or lacks something needed, a good reply asks "
    "for it; once that is known, a good reply answers fully.",
    "PI": "The point here is to carry the conversation: does the reply take up what the user said, with fitting "
    "questions or comments that invite them to go on?",
}


def judge_task(
    task: str, history: Sequence[tuple[str, str]], question: str, reply: str, reference: str
) -> list[dict[str, str]]:
    """Word the prompt about one reply in an MT-Bench-101 dialogue, whose history is golden."""
    return _messages(f"{_TASK} {_ONLY_LAST} {CRITERIA[task]} {_FORM}", history, question, reply, reference)


def judge_quality(
    history: Sequence[tuple[str, str]], question: str, reply: str, reference: str
) -> list[dict[str, str]]:
    """Word the prompt about one reply in an MT-Bench dialogue, whose history is the assistant's."""
    return _messages(f"{_TASK} {_ONLY_LAST} {_QUALITY} {_FORM}", history, question, reply, reference)


def rating(text: str) -> float | None:
    """Read the grade in a judge's answer, the last one of several; None where there is none from 1 to 10."""
    found = [float(number) for number in _RATING.findall(text)]
    return found[-1] if found and LOWEST <= found[-1] <= HIGHEST else None


def _messages(
    system: str, history: Sequence[tuple[str, str]], question: str, reply: str, reference: str
) -> list[dict[str, str]]:
    blocks = []
    for user, assistant in history:
        blocks += [_block("user", user), _block("assistant", assistant)]
    blocks += [_block("user", question), _block("assistant, to be graded", reply)]
    if reference.strip():
        blocks.append(_block("a reference answer, for you alone", reference))
    return [{"role": "system", "content": system}, {"role": "user", "content": "\n\n".join(blocks)}]


def _block(who: str, text: str) -> str:
    return f"<<{who}>>\n{text.strip() or '(nothing)'}"
