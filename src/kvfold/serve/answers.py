"""OpenAI's forms of an answer: chat completions and completions, whole and in pieces.

A field of our own, `kvfold`, says what the conversation takes after its turn. No model here: tokens come decoded.
"""

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from kvfold.serve.sampling import Chance
from kvfold.serve.ticket import Ended, Piece

Json = dict[str, Any]
TextOf = Callable[[int], str]


class Form:
    """The form of one answer; `kind` is that of OpenAI's object: a chat's or a text's."""

    def __init__(self, model: str, *, is_chat: bool, text_of: TextOf, tells_chances: bool) -> None:
        self._model, self._is_chat, self._text_of, self._tells_chances = model, is_chat, text_of, tells_chances
        self._id = ("chatcmpl-" if is_chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())
        self._characters = 0  # of the text that was sent so far

    def whole(self, pieces: Sequence[Piece], end: Ended) -> Json:
        """Give the whole answer."""
        text = "".join(piece.text for piece in pieces)
        chances = self._chances([chance for piece in pieces for chance in piece.chances])
        choice: Json = {"index": 0, "logprobs": chances, "finish_reason": end.reason}
        choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if self._is_chat else {}
        choice |= {} if self._is_chat else {"text": text}
        kind = "chat.completion" if self._is_chat else "text_completion"
        return self._object(kind, [choice]) | {"usage": usage(end), "kvfold": dict(end.folded)}

    def first(self) -> Json:
        """Give the piece that opens a stream of a chat."""
        return self._chunk({"role": "assistant", "content": ""}, None, None)

    def piece(self, piece: Piece) -> Json:
        """Give a piece of text."""
        return self._chunk({"content": piece.text}, self._chances(piece.chances), None)

    def last(self, end: Ended) -> Json:
        """Give the piece that says why the reply ended."""
        return self._chunk({}, None, end.reason) | {"kvfold": dict(end.folded)}

    def usage(self, end: Ended) -> Json:
        """Give the piece that says what was used, after the last one."""
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return self._object(kind, []) | {"usage": usage(end)}

    def _chunk(self, delta: Json, chances: Json | None, reason: str | None) -> Json:
        choice: Json = {"index": 0, "logprobs": chances, "finish_reason": reason}
        if self._is_chat:
            return self._object("chat.completion.chunk", [choice | {"delta": delta}])
        return self._object("text_completion", [choice | {"text": delta.get("content", "")}])

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "system_fingerprint": None,
        }

    def _chances(self, chances: Sequence[Chance]) -> Json | None:
        if not self._tells_chances:
            return None
        if self._is_chat:
            return {"content": [self._of_chat(chance) for chance in chances], "refusal": None}
        return self._of_text(chances)

    def _of_chat(self, chance: Chance) -> Json:
        best = [self._named(token, logprob) for token, logprob in chance.likeliest]
        return self._named(chance.token, chance.logprob) | {"top_logprobs": best}

    def _named(self, token: int, logprob: float) -> Json:
        text = self._text_of(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

    def _of_text(self, chances: Sequence[Chance]) -> Json:
        texts = [self._text_of(chance.token) for chance in chances]
        starts = []
        for text in texts:
            starts.append(self._characters)
            self._characters += len(text)
        best = [{self._text_of(token): _finite(log) for token, log in chance.likeliest} for chance in chances]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(chance.logprob) for chance in chances],
            "top_logprobs": best,
            "text_offset": starts,
        }


def usage(end: Ended) -> Json:
    """Say how many tokens were read, held already, and said."""
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.reply_tokens,
        "total_tokens": end.prompt_tokens + end.reply_tokens,
        "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
    }


def event(data: Json | str) -> str:
    """Write one event of a stream."""
    plain = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {plain}\n\n"


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes such a chance as -9999."""
    return max(logprob, -9999.0)
