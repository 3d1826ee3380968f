"""Text: tokens of a reply to pieces of text as they come.

A token may be half a character, or change how the one before it is written; so only text that further tokens cannot
change is given out. It decodes a short window, however long the reply is.
"""

from kvfold.hf.generation import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how a decoder writes bytes that are no whole character yet
_WINDOW = 5  # tokens behind the newest text that decoding starts from


class Text:
    """A reply as it grows. What `add` and `rest` give, put together, is the reply without space around it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  # tokens whose text is out
        self._space = ""  # held back until something follows: a reply does not end in space
        self._begun = False

    def add(self, token: int) -> str:
        """What can be said now that this token is there; often nothing, or several characters."""
        self._ids.append(token)
        fresh = self._fresh()
        if fresh.endswith(_UNFINISHED):
            return ""
        self._given = len(self._ids)
        return self._stripped(fresh)

    def rest(self) -> str:
        """What was held back, now that no token follows."""
        fresh = self._fresh()
        self._given = len(self._ids)
        return self._stripped(fresh)

    def _fresh(self) -> str:
        """The text of the newest tokens, as it reads behind the ones before."""
        start = max(self._given - _WINDOW, 0)
        old = self._decode(self._ids[start : self._given])
        return self._decode(self._ids[start:])[len(old) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _stripped(self, fresh: str) -> str:
        whole = self._space + fresh
        said = whole.rstrip()
        if not said:
            self._space = whole if self._begun else ""
            return ""
        self._space = whole[len(said) :]
        said = said if self._begun else said.lstrip()
        self._begun = True
        return said
