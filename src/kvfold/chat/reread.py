"""Reading a conversation anew: the same messages and replies under another plan or another system prompt.

The model reads every turn as it was said, so it costs a prefill of the whole text; folds come after each turn, as they
did. The old chat stays as it is. It generates nothing.
"""

from kvfold.chat.chat import Chat
from kvfold.chat.turns import folded_until
from kvfold.hf.generation import feed
from kvfold.plan import Plan


def reread(chat: Chat, *, plan: Plan | str | None = None, system: str | None = None) -> Chat:
    """Read a conversation under another plan, or with another system prompt; None leaves each as it is."""
    past = chat._past
    first = past.messages[0].content if past.messages and past.messages[0].role == "system" else None
    twin = Chat(
        chat.model,
        chat.tokenizer,
        chat.plan if plan is None else plan,
        system=first if system is None else system,
        generation=chat.generation,
        raw_turns=chat.raw_turns,
        stride=chat._stride,
        least=chat.cache.memory.rules.least,
        positions=chat.cache.positions,
    )
    for turn, (*said, replied) in zip(past.turns, past.talks, strict=True):
        before = twin._past
        opened = (*before.ids, *twin._template.added(before.messages, said))
        whole = (*opened, *past.ids[turn.reply : turn.stop])
        feed(twin.model, twin.cache, whole[twin.cache.memory.fed :])
        twin._past = before.followed_by(said, replied.content, ids=whole, reply_start=len(opened))
        twin.cache.fold(until=folded_until(twin.turns, raw=twin.raw_turns))
    return twin
