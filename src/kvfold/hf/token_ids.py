"""Token ids of the running forward, and what each id says about the end of a sentence.

A cache is handed keys and values only. IdRecorder notes the ids where the model embeds them, and the cache that the
same forward fills takes them from there. A DelimiterTable holds the delimiter class of every vocabulary entry, from
the tokenizer that was given or from the one beside the model. Without either, text is cut into pieces of one length.
"""

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import AutoTokenizer, PreTrainedModel

from kvfold.hf.argument import taken
from kvfold.hf.hooks import ForwardHook
from kvfold.place.sentences import ENDS, Ends, table

_SPACES = ("▁", "Ġ")  # how tokenizers write a leading space inside their vocabulary
_Levels: TypeAlias = tuple[tuple[str, int], ...]  # a set of delimiters as a key of dictionaries


class IdRecorder(ForwardHook):
    """A recorder of token ids. It changes: it remembers the ids of one forward per thread, until they are taken.

    What is embedded may differ from what was given: a model that sees pictures puts another id in their places.
    """

    def __init__(self, model: PreTrainedModel, *, at: Literal["model", "embedding"] = "embedding") -> None:
        super().__init__()
        self._model, self._at = weakref.ref(model), at
        self._keyword = {"model": "input_ids", "embedding": "input"}[at]
        self._noted = threading.local()

    def register(self) -> Sequence[RemovableHandle]:
        """Listen at the model's forward, or at its input embedding."""
        model = self._model()
        assert model is not None, "a cache is made of a model that is there"
        module = model if self._at == "model" else model.get_input_embeddings()
        return [module.register_forward_pre_hook(self, with_kwargs=True)]

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note the ids that are about to be read; of a whole model's forwards, those over a cache that takes them."""
        ids = args[0] if args else kwargs.get(self._keyword)
        if self._at == "embedding":
            self._noted.ids = ids
            return
        past = taken(kwargs)
        if past is not None:  # a stock cache takes nothing, and the next folded one must not take its ids
            self._noted.ids = None if type(past).__module__.startswith("transformers.") else ids

    def note(self, ids: Any) -> None:
        """Note ids that the next cache of this thread shall take."""
        self._noted.ids = ids

    def take(self, rows: int, new: int) -> Int[Tensor, "B Q"] | None:
        """Give the ids of the forward that runs in this thread; None unless they have this many rows and columns."""
        ids = getattr(self._noted, "ids", None)
        self._noted.ids = None
        if not isinstance(ids, Tensor) or ids.shape != (rows, new):
            return None
        return ids


class DelimiterTable:
    """The delimiter class of every token id, one byte each. It changes: it moves to the device of the ids."""

    def __init__(self, classes: UInt8[Tensor, " vocabulary"]) -> None:
        self._classes = classes

    def classes_of(self, ids: Int[Tensor, "B Q"]) -> UInt8[Tensor, "B Q"]:
        """Look up the delimiter classes of some ids; an id beyond the vocabulary counts as the last entry."""
        if self._classes.device != ids.device:
            self._classes = self._classes.to(ids.device)
        return self._classes[ids.clamp(0, len(self._classes) - 1)]

    def same_as(self, classes: UInt8[Tensor, " vocabulary"]) -> bool:
        """Tell whether this table holds these classes."""
        return torch.equal(self._classes.to(classes.device), classes)


class DelimiterTables:
    """The delimiter tables of one model, kept for all its caches. It changes: a table is made when it is asked for."""

    def __init__(self) -> None:
        self._different: dict[_Levels, list[DelimiterTable]] = {}
        self._beside: dict[tuple[str, _Levels], DelimiterTable | None] = {}  # by the name of the model
        self._given: weakref.WeakKeyDictionary[Any, dict[_Levels, DelimiterTable]] = weakref.WeakKeyDictionary()

    def of_tokenizer(self, tokenizer: Any, ends: Ends = ENDS) -> DelimiterTable:
        """Give the table of a tokenizer, which is read once."""
        levels = tuple(ends.items())
        known = self._given.setdefault(tokenizer, {})
        if levels not in known:
            known[levels] = self._shared(levels, delimiter_classes(tokenizer, ends))
        return known[levels]

    def of_model(self, name_or_path: str, ends: Ends = ENDS) -> DelimiterTable | None:
        """Give the table of the tokenizer that lies beside a model's weights; None where there is none."""
        key = (name_or_path, tuple(ends.items()))
        if key in self._beside:
            return self._beside[key]
        tokenizer = _tokenizer_beside(name_or_path)
        found = None if tokenizer is None else self.of_tokenizer(tokenizer, ends)
        self._beside[key] = found
        return found

    def _shared(self, levels: _Levels, classes: UInt8[Tensor, " vocabulary"]) -> DelimiterTable:
        """Tokenizers that were loaded twice have one table: it stays as long as the model, so it must not pile up."""
        different = self._different.setdefault(levels, [])
        for known in different:
            if known.same_as(classes):
                return known
        different.append(DelimiterTable(classes))
        return different[-1]


def delimiter_classes(tokenizer: Any, ends: Ends = ENDS) -> UInt8[Tensor, " vocabulary"]:
    """Work out the delimiter class of every vocabulary entry from its decoded text."""
    ids = range(len(tokenizer))
    names = tokenizer.convert_ids_to_tokens(list(ids))
    texts = tokenizer.batch_decode([[number] for number in ids], clean_up_tokenization_spaces=False)
    spaced = [_with_space(str(name), text) for name, text in zip(names, texts, strict=True)]
    classes = table(spaced, ends)
    return torch.tensor(list(classes), dtype=torch.uint8)


def _with_space(name: str, text: str) -> str:
    """Put back the leading space that decoding a single token may take away."""
    lost = name.startswith(_SPACES) and not text[:1].isspace()
    return f" {text}" if lost else text


def _tokenizer_beside(name_or_path: str) -> Any:
    """Load the tokenizer from the place that a model was loaded from, if there is one on this disk."""
    if not name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
    except Exception:  # whatever is wrong with it: text is then cut without it
        return None
