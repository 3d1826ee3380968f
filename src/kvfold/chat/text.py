"""Incremental detokenization: the tokens of a reply become pieces of text as they come.

A token may be half a character, or change how the one before it is written. So a piece holds only text that further
tokens cannot change. Decoding looks at a short window of tokens, however long the reply is.
"""

from collections.abc import Sequence

from kvfold.hf.generation import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # a decoder writes it for bytes that are no whole character yet
_WINDOW = 5  # tokens before the newest text with which decoding starts: how a token reads depends on those before it


class Detokenizer:
    """Decodes one reply. It changes with every token.

    The pieces that `add` and `rest` return, put together, are the reply without the space around it.
    """

    def __init__(self, tokenizer: Tokenizer, *, strips: bool = True) -> None:
        """`strips` leaves away the space around the reply; without it every space is returned as it comes."""
        self._tokenizer = tokenizer
        self._strips = strips
        self._ids: list[int] = []
        self._decoded = 0  # tokens whose text was returned
        self._space = ""  # held back until a word follows: a reply does not end in space
        self._begun = False

    def add(self, token: int) -> str:
        """Return the text that this token completes: often nothing, or several characters."""
        self._ids.append(token)
        fresh = self._fresh()
        if fresh.endswith(_UNFINISHED):
            return ""
        self._decoded = len(self._ids)
        return self._stripped(fresh)

    def rest(self) -> str:
        """Return the text that was held back, once no token follows."""
        fresh = self._fresh()
        self._decoded = len(self._ids)
        return self._stripped(fresh)

    def _fresh(self) -> str:
        """The text of the newest tokens, as it reads behind the ones before."""
        start = max(self._decoded - _WINDOW, 0)
        old = self._decode(self._ids[start : self._decoded])
        return self._decode(self._ids[start:])[len(old) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _stripped(self, fresh: str) -> str:
        """The text without leading space of the reply; trailing space waits for the next piece."""
        if not self._strips:
            return fresh
        whole = self._space + fresh
        words = whole.rstrip()
        if not words:
            self._space = whole if self._begun else ""
            return ""
        self._space = whole[len(words) :]
        if self._begun:
            return words
        self._begun = True
        return words.lstrip()
