"""Template: messages as text, and the tokens that each turn adds to a conversation.

`render` is the only place where a chat template is applied. Tokenizers without a template use one of the plain forms
below. A chat feeds only what the template adds when the next message joins the old ones. So templates that write old
turns differently later are refused: by a trial when the chat begins, and by a comparison at every turn. This file
knows no cache and no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from kvfold.data import Message
from kvfold.errors import ModelError, in_one_line
from kvfold.hf.generation import Tokenizer

# For chats: a model that was not trained for chat goes on with such a script.
PLAIN_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Assistant:' + ' ' + message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# For dialogues that are only read: one line for each message.
PLAIN_LINES = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
# For prompts: the contents alone, each on a new line.
PLAIN_CONTENTS = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] if loop.first else '\\n' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"
)

_PROBES = ("Alpha", "Beta", "Gamma", "Delta", "Omega")  # contents that no template writes by itself


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    template: str | None = None,
    opens_reply: bool = False,
    unfinished: bool = False,
) -> str:
    """Write messages as one text, by `template` or by the tokenizer's chat template.

    `opens_reply` adds what stands before the next reply. `unfinished` leaves the last message open, so that a model
    goes on with it. Raises ModelError for a tokenizer without a template, and for messages that the template refuses.
    """
    if template is None and not tokenizer.chat_template:
        raise ModelError(
            "messages were to be written by a chat template; this tokenizer has no chat template; "
            "use a model made for chat"
        )
    plain = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            plain,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=opens_reply,
            continue_final_message=unfinished,
        )
    except Exception as error:  # a template is a program: it may raise what it likes
        reason = in_one_line(error)
        roles = ", ".join(message.role for message in messages)
        raise ModelError(
            f"messages of {roles} were given; the tokenizer's chat template refuses them ({reason}); "
            "leave the system prompt away, or give the tokenizer another chat_template"
        ) from error
    return str(text)


def only_adds(texts: Sequence[str]) -> bool:
    """Check that each text begins with the one before it: the template left the old messages as they were."""
    return all(longer.startswith(shorter) for shorter, longer in pairwise(texts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """The end of a reply."""

    ids: tuple[int, ...]  # fed after the reply: its closing token, and what the template writes behind it
    stop: tuple[int, ...]  # tokens that end a reply when the model generates them
    line: bool  # True: the end of a line ends a reply too, because the plain form has no closing token


class Template:
    """The chat template of one tokenizer, for one system prompt. Raises ModelError if it rewrites old turns."""

    def __init__(self, tokenizer: Tokenizer, *, system: str | None) -> None:
        self.beginning = () if system is None else (Message(role="system", content=system),)
        self._tokenizer = tokenizer
        self._plain = None if tokenizer.chat_template else PLAIN_CHAT
        self._refuse_rewriting()

    def opening(self, messages: Sequence[Message], text: str) -> list[int]:
        """Encode what the user's next message adds to a conversation, up to where the reply begins.

        Raises ModelError if the template writes the old messages differently once this one is there.
        """
        return self.added(messages, [Message(role="user", content=text)])

    def added(self, messages: Sequence[Message], new: Sequence[Message]) -> list[int]:
        """Encode what new messages of any roles add to a conversation, up to where the reply begins.

        Raises ModelError as `opening` does.
        """
        asked = self._render([*messages, *new], opens_reply=True)
        has_turns = any(message.role == "assistant" for message in messages)
        before = self._render(messages) if has_turns else ""  # the system prompt is part of the first turn
        if not only_adds([before, asked]):
            self._refuse("rewrites old turns when one is added")
        return self._encode(asked[len(before) :], first=not has_turns)

    def said(self, messages: Sequence[Message], reply: str) -> list[int]:
        """Encode a reply to messages as the template writes it, with what it writes behind it."""
        asked = self._render(messages, opens_reply=True)
        whole = self._render([*messages, Message(role="assistant", content=reply)])
        if not only_adds([asked, whole]):
            self._refuse("writes a reply differently once it is said")
        return self._encode(whole[len(asked) :], first=False)

    def closing(self) -> Closing:
        """Find what ends a reply: the tokens that the template writes behind one."""
        probe = _PROBES[-1]
        said = [Message(role="user", content="?"), Message(role="assistant", content=probe)]
        behind = self._render([*self.beginning, *said]).rpartition(probe)[2]
        ids = self._encode(behind, first=False)
        special = [token for token in ids[:1] if token in self._tokenizer.all_special_ids]
        stop = {end for end in (self._tokenizer.eos_token_id, *special) if isinstance(end, int)}
        return Closing(ids=tuple(ids), stop=tuple(sorted(stop)), line=self._plain is not None)

    def pinned(self) -> int:
        """Count the tokens before the first thing that the user says, whatever it is: the system prompt."""
        first, second = (self.opening(self.beginning, probe) for probe in _PROBES[:2])
        differs = (place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
        return next(differs, min(len(first), len(second)))

    def _render(self, messages: Sequence[Message], *, opens_reply: bool = False) -> str:
        return render(self._tokenizer, messages, template=self._plain, opens_reply=opens_reply)

    def _encode(self, text: str, *, first: bool) -> list[int]:
        """Encode a piece of a rendered text. The plain form leaves the tokenizer's opening token to the first piece."""
        return list(self._tokenizer.encode(text, add_special_tokens=first and self._plain is not None))

    def _refuse_rewriting(self) -> None:
        """Try the template on a short conversation: each step must add to what was there."""
        talk = list(self.beginning)
        before = ""
        for question, answer in zip(_PROBES[:2], _PROBES[2:4], strict=True):
            talk.append(Message(role="user", content=question))
            asked = self._render(talk, opens_reply=True)
            if not only_adds([before, asked]):
                self._refuse("rewrites old turns when one is added")
            talk.append(Message(role="assistant", content=answer))
            before = self._render(talk)
            if not only_adds([asked, before]) or not before[len(asked) :].lstrip().startswith(answer):
                self._refuse("writes a reply differently once it is said")

    def _refuse(self, fault: str) -> None:
        raise ModelError(
            f"a chat with {self._tokenizer.name_or_path or 'this tokenizer'} was asked for; its chat template {fault}, "
            "so what was read could not stay in the cache; give the tokenizer another chat_template, or None for a "
            "plain one"
        )
