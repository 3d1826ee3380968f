"""Reply: the tokens of one reply as the model generates them, and its text in pieces.

A reply ends with a stop token. Without a chat template it ends with its first line too. This file knows no model and
no cache: the tokens come from the caller.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

from kvfold.chat.text import Detokenizer
from kvfold.hf.generation import Tokenizer


class Reply:
    """One reply. It changes with every token; `ids` never holds the token that ended it once the reply is complete."""

    def __init__(self, tokenizer: Tokenizer, *, stop: Collection[int], line: bool, strips: bool = True) -> None:
        """`stop` are the tokens that end a reply. `line` says that the end of a line ends it too.

        `strips` leaves away the space around the text.
        """
        self.ids: list[int] = []
        self._tokenizer = tokenizer
        self._stop = stop
        self._line = line
        self._text = Detokenizer(tokenizer, strips=strips)

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Decode the generated tokens as they come. Pieces may be empty; all together they are the reply."""
        for token in tokens:
            yield self.add(token)
        yield self.end()

    def add(self, token: int) -> str:
        """Take a generated token; return the text that it completes: none where it ends the reply."""
        self.ids.append(token)
        return "" if self.is_over else self._text.add(token)

    def end(self) -> str:
        """Drop the token that ended the reply, and return the text that was held back."""
        words = [self._text.add(token) for token in self._drop_end()]
        return "".join(words) + self._text.rest()

    @property
    def is_over(self) -> bool:
        """Whether the newest token ends the reply."""
        return self.ids[-1] in self._stop or self.ends_line(self.ids)

    def ends_line(self, ids: Sequence[int]) -> bool:
        """Check whether the newest token ends a line, and with it a reply of a model without a chat template."""
        if not self._line or "\n" not in self._decode(ids[-1:]):
            return False
        return bool(self._decode(ids).strip())  # a line break before the first word ends nothing

    def _drop_end(self) -> Sequence[int]:
        """Take the token that ended the reply from `ids`. Return the tokens of the words that stood in it."""
        last = self.ids[-1]
        if last in self._stop:
            self.ids.pop()
            return ()
        if not self.ends_line(self.ids):
            return ()  # the reply reached its longest length: its last token was decoded already
        self.ids.pop()
        words = self._decode([last]).partition("\n")[0]
        encoded = self._tokenizer.encode(words, add_special_tokens=False) if words else []
        self.ids += encoded
        return encoded

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))
