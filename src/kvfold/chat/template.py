"""Template: messages to text, turn by turn, so that what was read once is never rendered again.

A turn's text is what the tokenizer's template adds when the next message joins the old ones. That works only for
templates that render old turns the same afterwards; others are refused, by trial when the chat begins and by
comparison at every turn. Tokenizers without a template get a plain one. It knows no cache and no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kvfold.errors import ModelError
from kvfold.hf.generation import Tokenizer

Message: TypeAlias = dict[str, str]  # role and content, as templates want them

PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'Assistant:' + ' ' + message['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

_PROBES = ("Alpha", "Beta", "Gamma", "Delta", "Omega")  # contents that no template writes by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """What ends a reply."""

    ids: tuple[int, ...]  # fed after the reply: its closing token, and what the template writes behind it
    stop: tuple[int, ...]  # tokens that end a reply when the model says them
    line: bool  # whether a reply also ends with its line: the plain template has no token for it


class Template:
    """How one tokenizer writes a conversation. Raises ModelError for a template that rewrites old turns."""

    def __init__(self, tokenizer: Tokenizer, *, system: str | None) -> None:
        self._tokenizer = tokenizer
        self._template = None if tokenizer.chat_template else PLAIN
        self._refuse_rewriting(system)

    def opening(self, messages: Sequence[Message], text: str) -> list[int]:
        """Tokens that the user's next message adds to a conversation, up to where the reply begins.

        Raises ModelError where the template, with it, writes the old messages differently.
        """
        whole = self._render([*messages, {"role": "user", "content": text}], reply=True)
        said = [message["role"] for message in messages]
        before = self._render(messages) if "assistant" in said else ""
        if not whole.startswith(before):
            self._refuse("rewrites old turns when one is added")
        return self._encode(whole[len(before) :], first=not before)

    def closing(self, messages: Sequence[Message]) -> Closing:
        """What ends a reply in a conversation with this beginning."""
        probe = _PROBES[-1]
        shown = self._render([*messages, {"role": "user", "content": "?"}, {"role": "assistant", "content": probe}])
        ids = self._encode(shown.rpartition(probe)[2], first=False)
        special = ids[:1] if ids and ids[0] in self._tokenizer.all_special_ids else []
        ends = [self._tokenizer.eos_token_id, *special]
        stop = {end for end in ends if isinstance(end, int)}
        return Closing(ids=tuple(ids), stop=tuple(sorted(stop)), line=self._template is not None)

    def pinned(self, messages: Sequence[Message]) -> int:
        """Tokens that stand before the first thing the user says, whatever it is: the system prompt."""
        first, second = (self.opening(messages, probe) for probe in _PROBES[:2])
        same = [one == other for one, other in zip(first, second, strict=False)]
        return same.index(False) if False in same else len(same)

    def _render(self, messages: Sequence[Message], *, reply: bool = False) -> str:
        given: list[Any] = list(messages)
        try:
            text = self._tokenizer.apply_chat_template(
                given, chat_template=self._template, tokenize=False, add_generation_prompt=reply
            )
        except Exception as error:  # a template is a program: it may raise what it likes
            why = " ".join(str(error).split()) or type(error).__name__
            roles = ", ".join(message["role"] for message in messages)
            raise ModelError(
                f"messages of {roles} were given; the tokenizer's chat template refuses them ({why}); "
                "leave the system prompt away, or give the tokenizer another chat_template"
            ) from error
        return str(text)

    def _encode(self, text: str, *, first: bool) -> list[int]:
        """Tokens of a piece of a rendered text; the plain template leaves the first token of all to the tokenizer."""
        return list(self._tokenizer.encode(text, add_special_tokens=first and self._template is not None))

    def _refuse_rewriting(self, system: str | None) -> None:
        """Try the template on a short conversation: each step must add to what was there."""
        talk: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        before = ""
        for question, answer in zip(_PROBES[:2], _PROBES[2:4], strict=True):
            talk.append({"role": "user", "content": question})
            asked = self._render(talk, reply=True)
            if not asked.startswith(before):
                self._refuse("rewrites old turns when one is added")
            talk.append({"role": "assistant", "content": answer})
            before = self._render(talk)
            if not before.startswith(asked) or not before[len(asked) :].lstrip().startswith(answer):
                self._refuse("writes a reply differently once it is said")

    def _refuse(self, what: str) -> None:
        raise ModelError(
            f"a chat with {self._tokenizer.name_or_path or 'this tokenizer'} was asked for; its chat template {what}, "
            "so what was read could not stay in the cache; give the tokenizer another chat_template, or None for a "
            "plain one"
        )
